//! Our own autoencoder against Python's and against the crate's, and with an adapter on it.

use crate::reference::{Comparer, REFERENCE};
use crate::support::all_cases::cases;
use crate::support::cases::{Case, stored_cases};
use crate::support::error::relative_error;
use crate::support::xl_cases::xl_cases;
use hra::adapter::{Adapter, Lora};
use hra::model::Vae;
use hra::model::layers::Layers;
use hra::platform::precision::Numbers;
use hra::platform::random;
use hra::weights::source::Source;
use tch::{Device, Kind};

fn ours(case: &Case, numbers: impl Into<Numbers>) -> Vae {
    let source = Source::open(&case.pipeline(), None).unwrap();
    let (vae, unused) = Vae::load_ours(&source, numbers, Device::Cpu).unwrap();
    assert!(unused.is_empty() && vae.is_ours(), "{unused:?}");
    vae
}

#[test]
fn it_encodes_and_decodes_as_python_does() {
    for case in cases().into_iter().chain(xl_cases()) {
        let (here, vae) = (Comparer::new(REFERENCE), ours(&case, Kind::Float));
        let (mean, log_variance) = vae.encode(&case.get("vae.image"));
        here.compare(&case, "our VAE", "vae.mean", &mean, 1e-5);
        here.compare(&case, "our VAE", "vae.logvar", &log_variance, 1e-5);
        here.compare(&case, "our VAE", "vae.decoded", &vae.decode(&case.get("vae.mean")), 1e-5);

        let crates = here.load(&case).vae;
        assert!(!crates.is_ours(), "the crate's serves where it can");
        assert!(
            relative_error(&vae.encode(&case.get("vae.image")).0, &crates.encode(&case.get("vae.image")).0)
                < 1e-5
        );
    }
}

#[test]
fn half_precision_rounds_and_no_more() {
    for case in stored_cases() {
        for (numbers, allowed) in [
            (Numbers { rest: Kind::BFloat16, compute: Kind::Float }, 0.02),
            (Numbers { rest: Kind::Half, compute: Kind::Float }, 0.01),
            (Kind::BFloat16.into(), 0.05),
        ] {
            let vae = ours(&case, numbers);
            let decoded = vae.decode(&case.get("vae.mean"));
            assert_eq!(decoded.kind(), Kind::Float);
            let error = relative_error(&decoded, &case.get("vae.decoded"));
            assert!(error > 1e-5 && error < allowed, "{} {numbers}: {error:.1e}", case.name);
        }
    }
}

#[test]
fn it_carries_adapters_and_the_crates_none() {
    let case = &stored_cases()[0];
    assert!(Comparer::new(REFERENCE).load(case).vae.layers_mut().is_empty());
    let (mut adapted, mut merged) = (ours(case, Kind::Float), ours(case, Kind::Float));
    let layers = adapted.layers_mut().len();
    assert!(layers > 20, "{layers}");
    for (seed, (layer, target)) in (0u64..).zip(adapted.layers_mut().into_iter().zip(merged.layers_mut())) {
        let weight = layer.weight().size();
        let tail = if weight.len() == 4 { vec![weight[2], weight[3]] } else { vec![] };
        let ones = vec![1; tail.len()];
        let shape = |head: [i64; 2], tail: &[i64]| [&head[..], tail].concat();
        let draw = |seed, shape: Vec<i64>| random::normal(seed, &shape) * 0.05;
        let lora = Lora::from_tensors(
            draw(2 * seed, shape([2, weight[1]], &tail)),
            draw(2 * seed + 1, shape([weight[0], 2], &ones)),
            1.0,
        );
        let lora = lora.unwrap();
        let matrix = target.matrix().to_kind(Kind::Double);
        let changed = lora.change(&matrix, 1.0).form.merged(&matrix).to_kind(Kind::Float);
        target.set_frozen(changed.reshape(&weight[..]), None);
        layer.attach(Some(Box::new(lora)), None);
    }
    let latents = case.get("vae.mean");
    let (found, expected) = (adapted.decode(&latents), merged.decode(&latents));
    assert!(relative_error(&found, &expected) < 1e-5);
    assert!(relative_error(&found, &case.get("vae.decoded")) > 1e-2, "the adapters change the picture");
}
