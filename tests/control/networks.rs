//! Control in the networks and in drawing: what a new control encoder changes, where gradients go, which calls and passes
//! are steered. Outputs and gradients are compared with diffusers' in tests/numbers/parity.rs.

use crate::support::cases::{Case, stored_cases};
use crate::support::error::relative_error;
use hra::StableDiffusion;
use hra::adapter::Method;
use hra::adapter::methods::full::FullConfig;
use hra::adapter::methods::hra::{HraConfig, HraInit};
use hra::adapter::peft::Bias;
use hra::adapter::target::{ATTENTION, TargetRule};
use hra::attach;
use hra::attach::parameters::Parameters;
use hra::diffusion::noise::NoiseSchedule;
use hra::diffusion::sample::{
    From, Noise, Request, SampleSettings, Session, SizeSettings, Steering, Strength, TextSettings,
};
use hra::diffusion::sampler::SamplerKind;
use hra::model::control::{ConditionEncoder, Control, ControlNet, EncoderConfig, Passes};
use hra::model::layers::{Layers, Module};
use hra::model::{Call, Conditioning, Denoiser, Signals};
use hra::platform::observer::Silent;
use hra::platform::random;
use hra::train::loss::{Batch, training_loss};
use tch::{Device, Kind, Tensor};

fn load(case: &Case) -> StableDiffusion {
    StableDiffusion::load(&case.pipeline(), Kind::Float, Device::Cpu).unwrap()
}

fn controlnet(case: &Case) -> Control {
    let (net, _) = ControlNet::load(&case.dir.join("controlnet"), Kind::Float, Device::Cpu).unwrap();
    Control::Net(Box::new(net))
}

/// The case's control encoder, which was not made to start at zero.
fn random_encoder(case: &Case) -> Control {
    let (encoder, _) = ConditionEncoder::load(&case.dir.join("control_encoder"), Device::Cpu).unwrap();
    Control::Encoder(encoder)
}

/// A new one, as training starts it.
fn new_encoder(model: &StableDiffusion) -> ConditionEncoder {
    let config = EncoderConfig::new(&model.unet, model.vae.factor(), "other", None);
    let mut encoder = ConditionEncoder::start(config, 3, Device::Cpu);
    let everything = TargetRule::from_words(&[".*".to_string()]).unwrap();
    attach::attach_new(&mut encoder, ("", &everything), &Method::new(FullConfig), Bias::None, 0).unwrap();
    encoder
}

fn attach_hra(model: &mut StableDiffusion) {
    let config =
        HraConfig { rank: 4, gram_schmidt: false, init: HraInit::Auto, allow_odd_rank: false, lambda: 0.0 };
    let targets = TargetRule::from_words(&ATTENTION.map(String::from)).unwrap();
    attach::attach_new(&mut model.unet, ("", &targets), &Method::new(config), Bias::None, 5).unwrap();
}

/// Numbers from 0 to 1.
fn uniform(seed: u64, shape: &[i64]) -> Tensor {
    random::seeded(seed, |draws| draws.uniform(shape, 0.0, 1.0))
}

/// Conditions for the sample of the case's call, anything but zero.
fn conditions(model: &StableDiffusion, sample: &Tensor) -> Tensor {
    let (size, factor) = (sample.size(), model.vae.factor());
    uniform(11, &[size[0], 3, size[2] * factor, size[3] * factor])
}

fn call(case: &Case) -> [Tensor; 3] {
    ["unet.sample", "unet.timestep", "unet.context"].map(|name| case.get(name))
}

fn largest(a: &Tensor, b: &Tensor) -> f64 {
    (a - b).abs().max().double_value(&[])
}

#[test]
fn the_encoder_has_the_sizes_of_the_authors() {
    let model = load(&stored_cases()[0]);
    let of = |factor, width| {
        let config = EncoderConfig::new(&model.unet, factor, "other", None);
        assert_eq!(config.conditioning_embedding_channels, model.unet.first_channels());
        EncoderConfig { conditioning_embedding_channels: width, ..config }
    };
    assert_eq!(of(4, 64).block_out_channels, [16, 32, 96]);
    assert_eq!(of(8, 320).block_out_channels, [16, 32, 96, 256]);
    assert_eq!(of(1, 64).block_out_channels, [16]);
    let mut encoder = ConditionEncoder::start(of(8, 320), 0, Device::Cpu);
    let layers = encoder.layers_mut();
    let count = layers.iter().map(|l| l.weight().numel() + l.bias().map_or(0, Tensor::numel)).sum::<usize>();
    assert_eq!((layers.len(), count), (8, 1_086_480));
    let names: Vec<&str> = layers.iter().map(|layer| layer.name.as_str()).collect();
    assert_eq!((names[0], names[1], names[7]), ("conv_in", "blocks.0", "conv_out"));
    let image = uniform(10, &[2, 3, 40, 24]);
    assert_eq!(encoder.forward(&image).size(), [2, 320, 5, 3]);
}

#[test]
fn a_new_encoder_changes_nothing_whatever_the_condition() {
    for case in stored_cases() {
        let mut model = load(&case);
        let [sample, timesteps, context] = call(&case);
        let _guard = tch::no_grad_guard();
        let context = Conditioning::new(context);
        let call = Call { sample: &sample, timesteps: &timesteps, conditioning: &context };
        let base = model.unet.predict(call, &Signals::default());
        attach_hra(&mut model);
        let control = Control::Encoder(new_encoder(&model));
        for scale in [1.0, 50.0] {
            let features = control.features(&(conditions(&model, &sample) * scale));
            let signals = || control.signals(&features, 1.0, Passes::Both, call);
            let with = model.unet.predict(call, &signals());
            assert!(relative_error(&with, &base) < 1e-6, "{}: with the adapter", case.name);
            attach::set_enabled(&mut model, false);
            let without = model.unet.predict(call, &signals());
            assert_eq!(without, base, "{}: bit for bit without it", case.name);
            attach::set_enabled(&mut model, true);
        }
    }
}

/// One batch of training on the case's call.
fn batch(case: &Case, model: &StableDiffusion) -> Batch {
    let [latents, timesteps, context] = call(case);
    let noise = random::normal(12, &latents.size());
    let conditions = Some(conditions(model, &latents));
    let conditioning = Conditioning::new(context);
    Batch { noise, timesteps, conditioning, conditions, latents, class_half: false }
}

#[test]
fn gradients_reach_the_adapter_and_the_last_convolution_and_later_the_others_and_nothing_frozen() {
    for case in stored_cases() {
        let mut model = load(&case);
        attach_hra(&mut model);
        let mut encoder = new_encoder(&model);
        let mut parameters = attach::pack_parameters(&mut [&mut model.unet, &mut encoder]);
        let control = Control::Encoder(encoder);
        let schedule = NoiseSchedule::new(&model.scheduler, Device::Cpu).unwrap();
        let batch = batch(&case, &model);
        let gradients = |parameters: &mut Parameters| {
            parameters.zero_gradient();
            training_loss(&model.unet, Some(&control), &schedule, &batch, 0.0, None).total.backward();
            let norm = |t: &Tensor| t.grad().norm().double_value(&[]);
            parameters.views().iter().map(|(name, t)| (name.clone(), norm(t))).collect::<Vec<_>>()
        };
        // The last convolution is zero, so the loss does not see the ones before it yet.
        for (name, norm) in gradients(&mut parameters) {
            let unseen = name.starts_with("blocks.") || name.starts_with("conv_in.");
            assert_eq!(norm == 0.0, unseen, "{} {name}: {norm}", case.name);
        }
        {
            let _guard = tch::no_grad_guard();
            let (_, last) = parameters.views().iter().find(|(name, _)| name == "conv_out.weight").unwrap();
            last.shallow_clone().copy_(&(random::normal(13, &last.size()) * 0.1));
        }
        for (name, norm) in gradients(&mut parameters) {
            assert!(norm > 0.0, "{} {name}", case.name);
        }
        let frozen: &mut [&mut dyn Layers] = &mut [&mut model.unet, &mut model.texts[0].encoder];
        for module in frozen.iter_mut().flat_map(|network| network.modules_mut()) {
            let (name, tensors) = match module {
                Module::Layer(layer) => (&layer.name, [Some(layer.weight()), layer.bias()]),
                Module::Norm(norm) => (&norm.name, [Some(norm.weight()), Some(norm.bias())]),
            };
            let trains = |t: &Tensor| t.requires_grad() || t.grad().defined();
            assert!(!tensors.into_iter().flatten().any(trains), "{} {name} is frozen", case.name);
        }
    }
}

#[test]
fn conditional_passes_leave_the_negative_half_alone() {
    for case in stored_cases() {
        let model = load(&case);
        let _guard = tch::no_grad_guard();
        let [sample, timesteps, context] = call(&case).map(|t| t.narrow(0, 0, 2));
        // Another text for the negative half, so that a half in the wrong place shows.
        let context = Tensor::cat(&[&context.flip([0]), &context], 0);
        let [sample, timesteps] = [sample, timesteps].map(|t| Tensor::cat(&[&t, &t], 0));
        let context = Conditioning::new(context);
        let call = Call { sample: &sample, timesteps: &timesteps, conditioning: &context };
        let base = model.unet.predict(call, &Signals::default());
        let shown = conditions(&model, &sample.narrow(0, 0, 2));
        for control in [controlnet(&case), random_encoder(&case)] {
            let features = control.features(&shown);
            let out = |passes| {
                let signals = control.signals(&features, 0.7, passes, call);
                model.unet.predict(call, &signals)
            };
            let (both, conditional) = (out(Passes::Both), out(Passes::Conditional));
            let half = |t: &Tensor, i: i64| t.narrow(0, 2 * i, 2);
            assert!(relative_error(&half(&conditional, 0), &half(&base, 0)) < 1e-6, "{}", case.name);
            assert!(relative_error(&half(&conditional, 1), &half(&both, 1)) < 1e-5, "{}", case.name);
            for i in [0, 1] {
                assert!(relative_error(&half(&both, i), &half(&base, i)) > 1e-3, "{}: it steers", case.name);
            }
        }
    }
}

fn settings(sampler: SamplerKind, steps: usize, guidance: f64) -> SampleSettings {
    SampleSettings {
        prompt: "a red apple".into(),
        negative_prompt: "a yellow cat".into(),
        sampler,
        spacing: None,
        karras: None,
        steps,
        guidance,
        guidance_rescale: 0.0,
        width: 40,
        height: 24,
        texts: TextSettings::default(),
        sizes: SizeSettings::default(),
    }
}

fn noise(model: &StableDiffusion, settings: &SampleSettings, seeds: &[u64]) -> Noise {
    Session::<_, Control>::over(model, None).noise(seeds, settings, None).unwrap()
}

/// Final latents of two pictures at once.
fn draw(
    model: &StableDiffusion,
    settings: &SampleSettings,
    noise: &Noise,
    control: Option<(&Control, &Tensor, Strength)>,
) -> Tensor {
    let mut session = Session::over(model, control.map(|(control, ..)| control));
    let steering = control
        .map(|(_, conditions, strength)| Steering { conditions: conditions.shallow_clone(), strength });
    let request = Request { from: From::Noise(noise), steering, ..Request::new(settings, &[], 2) };
    let pictures = session.draw(&request, &Silent).unwrap();
    Tensor::cat(&pictures.iter().map(|p| &p.latents).collect::<Vec<_>>(), 0)
}

#[test]
fn without_strength_or_steps_a_control_draws_the_base_models_picture() {
    let case = &stored_cases()[1];
    let model = load(case);
    let settings = settings(SamplerKind::Ddim, 4, 5.0);
    let noise = noise(&model, &settings, &[1, 2]);
    let base = draw(&model, &settings, &noise, None);
    let shown = uniform(14, &[1, 3, settings.height, settings.width]);
    for control in [controlnet(case), random_encoder(case)] {
        let with = |strength| draw(&model, &settings, &noise, Some((&control, &shown, strength)));
        let whole = Strength::default();
        assert_eq!(with(Strength { scale: 0.0, ..whole }), base);
        assert_eq!(with(Strength { start: 0.8, ..whole }), base, "of four steps, none begins there");
        assert_eq!(with(Strength { end: 0.2, ..whole }), base, "of four steps, none ends there");
        assert_eq!(with(Strength { start: 0.3, end: 0.7, ..whole }), base, "no whole step is inside");
        assert!(largest(&with(Strength { start: 0.75, ..whole }), &base) > 1e-3);
        assert!(largest(&with(Strength { end: 0.25, ..whole }), &base) > 1e-3);
        assert!(largest(&with(Strength { scale: 0.5, ..whole }), &with(whole)) > 1e-3);
        assert!(
            largest(&with(Strength { passes: Passes::Conditional, ..whole }), &with(whole)) > 1e-3,
            "which passes see the condition matters"
        );
    }
}

/// Which model calls are steered, worked out by hand from diffusers' rule for `n` calls: call i is left out where
/// i / n < start or (i + 1) / n > end.
const KEPT: [(SamplerKind, usize, f64, f64, &[u8]); 6] = [
    (SamplerKind::Ddim, 10, 0.2, 0.7, &[0, 0, 1, 1, 1, 1, 1, 0, 0, 0]),
    (SamplerKind::Ddim, 10, 0.0, 0.3, &[1, 1, 1, 0, 0, 0, 0, 0, 0, 0]),
    (SamplerKind::Ddim, 7, 0.3, 0.9, &[0, 0, 0, 1, 1, 1, 0]),
    (SamplerKind::Ddim, 3, 0.34, 1.0, &[0, 0, 1]),
    // PNDM calls the model once more than there are steps, Heun twice a step but for the last.
    (SamplerKind::Pndm, 5, 0.5, 1.0, &[0, 0, 0, 1, 1, 1]),
    (SamplerKind::Heun, 4, 0.25, 0.75, &[0, 0, 1, 1, 1, 0, 0]),
];

#[test]
fn the_steered_calls_are_those_of_diffusers() {
    let case = &stored_cases()[0];
    let model = load(case);
    let control = controlnet(case);
    for (sampler, steps, start, end, kept) in KEPT {
        let settings = settings(sampler, steps, 1.0);
        let noise = noise(&model, &settings, &[4, 5]);
        let _guard = tch::no_grad_guard();
        let shown = uniform(15, &[2, 3, settings.height, settings.width]);
        let strength = Strength { start, end, scale: 0.9, passes: Passes::Both };
        let found = draw(&model, &settings, &noise, Some((&control, &shown, strength)));

        let plan = settings.plan(&model).unwrap();
        assert_eq!(plan.model_calls(), kept.len(), "{sampler}");
        let features = control.features(&shown);
        let conditioning = &model.encode_prompts(&[&settings.prompt]).unwrap().0.repeat(2);
        let mut calls = kept.iter();
        let expected = plan.run(
            &noise.latents * plan.init_noise_sigma(),
            &mut |x, t| {
                let timesteps = Tensor::full([2], t, (Kind::Float, Device::Cpu));
                let call = Call { sample: x, timesteps: &timesteps, conditioning };
                let signals = match calls.next() {
                    Some(1) => control.signals(&features, 0.9, Passes::Both, call),
                    _ => Signals::default(),
                };
                Ok(model.denoiser().predict(call, &signals))
            },
            &mut |_| unreachable!("no sampler here draws noise on its way"),
            &mut |_| Ok(()),
        );
        let error = relative_error(&found, &expected.unwrap());
        assert!(error < 1e-5, "{sampler} {start}..{end}: {error:.1e}");
    }
}

#[test]
fn a_control_of_another_model_is_refused() {
    let [first, second] = &stored_cases()[..] else { panic!("two cases are stored") };
    let model = load(first);
    assert_eq!(controlnet(first).misfit(&model.unet, 4), None);
    assert_eq!(random_encoder(first).misfit(&model.unet, 4), None);
    let told = |control: Control, factor| control.misfit(&model.unet, factor).unwrap();
    let net = told(controlnet(second), 4);
    assert!(net.contains("skip connections of [12, 12, 12, 20] channels, found one for [8, "), "{net}");
    let encoder = told(random_encoder(second), 4);
    assert!(encoder.contains("for 12 channels and 4 pixels a latent, found one for 8 and 4"), "{encoder}");
    assert!(told(random_encoder(first), 8).contains("8 pixels a latent, found one for 12 and 4"));
    assert!(
        told(controlnet(first), 8).contains("8 pixels a latent"),
        "its embedding halves the condition twice"
    );
}
