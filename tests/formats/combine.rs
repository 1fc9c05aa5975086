//! Several adapters as one: as algebra, and as files that the program writes and reads.

use crate::support::all_cases::cases;
use crate::support::error::relative_error;
use crate::support::scratch::Scratch;
use hra::adapter::Reflections;
use hra::adapter::combine::{How, combine};
use hra::adapter::peft::AdapterFile;
use hra::platform::random::normal;
use proptest::prelude::*;
use tch::{Device, Kind, Tensor};

const F64: (Kind, Device) = (Kind::Double, Device::Cpu);

fn matrix(h: &Reflections) -> Tensor {
    h.merge(&Tensor::eye(h.inputs(), F64))
}

fn distance(a: &Tensor, b: &Tensor) -> f64 {
    (a.to_kind(Kind::Double) - b.to_kind(Kind::Double)).abs().max().double_value(&[])
}

fn reflections(seed: u64, d: i64, r: i64) -> Reflections {
    Reflections::from_vectors(&normal(seed, &[d, r]), false)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_product_is_few_reflections_again(seed in 0u64..1000, d in 2i64..24, r in 1i64..7, s in -2.0f64..2.0) {
        let h = reflections(seed, d, r);
        let again = h.vectors();
        prop_assert!(again.size()[1] <= r.min(d));
        prop_assert!(distance(&matrix(&Reflections::from_vectors(&again, false)), &matrix(&h)) < 1e-5);
        let (power, left_over) = h.power(s);
        if !left_over {
            let v = power.vectors();
            prop_assert!(v.size()[1] % 2 == 0, "a power on the path from the identity turns, it does not reflect");
            let back = if v.size()[1] == 0 { Tensor::eye(d, F64) } else { matrix(&Reflections::from_vectors(&v, false)) };
            prop_assert!(distance(&back, &matrix(&power)) < 1e-5);
        }
    }

    #[test]
    fn the_geodesic_sum_is_orthogonal_symmetric_and_the_power_of_one(
        seed in 0u64..1000, d in 4i64..20, half in 1i64..3, s in -1.5f64..1.5, t in -1.5f64..1.5,
    ) {
        let sum = |parts: Vec<(Reflections, f64)>| matrix(&Reflections::geodesic_sum(&parts).unwrap());
        let (a, b) = (|| reflections(seed, d, 2 * half), || reflections(seed + 1, d, 2 * half));
        let both = sum(vec![(a(), s), (b(), t)]);
        prop_assert!(distance(&both.matmul(&both.tr()), &Tensor::eye(d, F64)) < 1e-5);
        prop_assert!(distance(&both, &sum(vec![(b(), t), (a(), s)])) < 1e-5);
        prop_assert!(distance(&sum(vec![(a(), s)]), &matrix(&a().power(s).0)) < 1e-5);
        prop_assert!(distance(&sum(vec![(a(), 0.5), (a(), 0.5)]), &matrix(&a())) < 1e-5);
        // Rotations of planes that do not meet commute: there the sum is the product.
        let apart = |first: i64| {
            let v = Tensor::zeros([d + 4, 2], F64);
            v.narrow(0, first, 2).copy_(&normal(seed + first as u64, &[2, 2]));
            Reflections::from_vectors(&v, false)
        };
        let product = matrix(&apart(0).then(&apart(2)));
        prop_assert!(distance(&sum(vec![(apart(0), 1.0), (apart(2), 1.0)]), &product) < 1e-5);
    }
}

#[test]
fn a_reflection_has_no_geodesic() {
    assert!(Reflections::geodesic_sum(&[(reflections(1, 8, 3), 1.0)]).is_none());
}

#[test]
fn a_chain_of_files_is_the_product_of_the_files() {
    for case in cases() {
        let read = |name: &str| AdapterFile::read(&case.dir.join(name)).unwrap();
        let (a, b) = (read("hra-r4"), read("hra-r4-gs"));
        let (config, tensors) = combine(&[(&a, 1.0), (&b, -0.5)], How::Chain).unwrap();
        assert_eq!(config.method.describe(), "HRA r 8");
        for (name, vectors) in tensors {
            let layer = name.strip_suffix(".hra_u").unwrap();
            let product =
                [(&a, 1.0), (&b, -0.5)].iter().fold(Tensor::eye(vectors.size()[0], F64), |m, (file, s)| {
                    file.layers[layer].change(&m, *s).form.merged(&m)
                });
            let found = matrix(&Reflections::from_vectors(&vectors, false));
            assert!(distance(&found, &product) < 1e-5, "{} {layer}", case.name);
        }
        let odd = read("hra-r3");
        let text = combine(&[(&odd, 0.5)], How::Chain).err().unwrap().to_string();
        assert!(text.contains("determinant -1"), "{text}");
        assert!(combine(&[(&odd, 1.0), (&a, 1.0)], How::Chain).is_ok());
        let lora = read("lora-r4");
        let text = combine(&[(&a, 1.0), (&lora, 1.0)], How::Chain).err().unwrap().to_string();
        assert!(text.contains("one method") && text.contains("hra export"), "{text}");
        assert!(combine(&[(&read("hra-r4-bias"), 1.0)], How::Chain).is_err());
    }
}

#[test]
fn lora_adapters_add_up() {
    for case in cases() {
        let read = |name: &str| AdapterFile::read(&case.dir.join(name)).unwrap();
        let a = read("lora-r4");
        let (config, tensors) = combine(&[(&a, 0.8), (&a, -0.3)], How::Chain).unwrap();
        assert_eq!(config.method.describe(), "LoRA r 8, alpha 8");
        for pair in tensors.chunks_exact(2) {
            let (down, up) = (&pair[0].1, &pair[1].1);
            let layer = pair[0].0.strip_suffix(".lora_A.weight").unwrap();
            let zero = Tensor::zeros([up.size()[0], down.size()[1]], F64);
            let once = a.layers[layer].change(&zero, 1.0).form.merged(&zero);
            assert!(relative_error(&up.matmul(down), &(once * 0.5)) < 1e-6, "{layer}");
        }
    }
}

#[test]
fn the_program_writes_what_sampling_with_all_of_them_draws() {
    let case = &cases()[0];
    let scratch = Scratch::new();
    let place = |name: &str| case.dir.join(name).to_str().unwrap().to_string();
    let model = place("pipeline");
    let merged = scratch.path("merged").to_str().unwrap().to_string();
    let weights = [format!("{}=0.8", place("hra-r4")), format!("{}=-0.5", place("hra-r4-gs"))];
    let done = scratch.ok(&["merge", &weights[0], &weights[1], "--output", &merged]);
    assert!(done.out.contains("HRA r 8"), "{}", done.out);
    let latents = |name: &str, adapters: &[&str]| {
        let file = scratch.path(&format!("{name}.safetensors")).to_str().unwrap().to_string();
        let mut args = vec![
            "sample", "--model", &model, "--prompt", "a cat", "--steps", "2", "--width", "32", "--height",
            "32",
        ];
        args.extend(adapters.iter().flat_map(|a| ["--adapter", a]));
        args.extend(["--save-latents", &file, "--output", name]);
        scratch.ok(&args);
        hra::weights::tensor_file::TensorFile::open(file.as_ref()).unwrap().read("latents").unwrap()
    };
    let one = latents("one", &[&merged]);
    let two = latents("two", &[&weights[0], &weights[1]]);
    let base = latents("base", &[]);
    assert!(relative_error(&one, &two) < 1e-4);
    assert!(relative_error(&one, &base) > 1e-3, "the adapters must change something");
    let again = scratch.run(&["merge", &weights[0], "--output", &merged]);
    assert_eq!(again.code, 2);
    assert!(again.err.contains("is there already"), "{}", again.err);
}
