//! Three training steps, from noise to the optimiser's step, against PyTorch's.

use super::Comparer;
use crate::support::Case;
use hra::adapter::peft::AdapterFile;
use hra::attach;
use hra::diffusion::noise::NoiseSchedule;
use hra::model::Conditioning;
use hra::train::loss::{Batch, training_loss};
use hra::train::optim::{AdamW, AdamWConfig, clip_factor};
use tch::{Device, Tensor};

/// The steps of a case that has them.
pub fn three_steps(here: &Comparer, case: &Case) {
    if !case.has("step.latents") {
        return;
    }
    let mut model = here.load(case);
    let file = AdapterFile::read(&case.dir.join("hra-r4")).unwrap();
    attach::attach_trained(&mut model.unet, file).unwrap();
    let mut parameters = attach::pack_parameters(&mut [&mut model.unet]);
    for (name, view) in parameters.views() {
        let _guard = tch::no_grad_guard();
        view.shallow_clone().copy_(&case.get(&format!("step.before.{name}")));
    }
    let schedule = NoiseSchedule::new(&model.scheduler, here.compute.device).unwrap();
    let batch = Batch {
        latents: here.input(case, "step.latents"),
        noise: here.input(case, "step.noise"),
        timesteps: here.input(case, "step.timestep"),
        conditioning: Conditioning::new(here.input(case, "step.context")),
        conditions: None,
        class_half: true,
    };
    let compare = |what: &str, key: &str, found: &Tensor, tolerance: f64| {
        here.compare(case, &format!("training {what}"), &format!("step.{key}"), found, tolerance);
    };
    compare("noise", "noisy", &schedule.add_noise(&batch.latents, &batch.noise, &batch.timesteps), 1e-5);
    compare("noise", "target", &schedule.target(&batch.latents, &batch.noise, &batch.timesteps), 1e-5);

    let config = AdamWConfig { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.1 };
    let mut optimizer = AdamW::new(config, &parameters);
    let on_cpu = |t: &Tensor| t.detach().to_device(Device::Cpu).copy();
    let mut before: Vec<Tensor> = parameters.views().iter().map(|(_, t)| on_cpu(t)).collect();
    for step in 0..3 {
        let loss = training_loss(&model.unet, None, &schedule, &batch, 0.7, None);
        // After an optimiser step, Adam's division by the root of tiny moments has amplified rounding.
        let later = |first: f64| if step == 0 { first } else { 1e-3 };
        compare("predictions", &format!("{step}.pred"), &loss.prediction, later(1e-5));
        compare("losses", &format!("{step}.loss.instance"), &loss.instance, 1e-5);
        compare("losses", &format!("{step}.loss.prior"), loss.prior.as_ref().unwrap(), 1e-5);
        let regulariser = attach::regulariser(&mut model.unet).unwrap();
        compare("losses", &format!("{step}.regulariser"), &regulariser, 1e-5);
        let total = &loss.total + regulariser * 1e-3;
        compare("losses", &format!("{step}.total"), &total, 1e-5);
        parameters.zero_gradient();
        (total * here.loss_scale()).backward();
        for (name, view) in parameters.views() {
            if case.has(&format!("step.{step}.grad.{name}")) {
                compare(
                    "gradients",
                    &format!("{step}.grad.{name}"),
                    &(view.grad() / here.loss_scale()),
                    later(2e-5),
                );
            }
        }
        let norm = parameters.gradient_norm() / here.loss_scale();
        compare("gradients", &format!("{step}.grad_norm"), &norm, 1e-4);
        let factor = clip_factor(&norm, 0.01) / here.loss_scale();
        optimizer.step(&mut parameters, &factor, &[1e-2], None).unwrap();
        for (i, (name, view)) in parameters.views().iter().enumerate() {
            let after = case.get(&format!("step.{step}.after.{name}"));
            let expected_before = match step {
                0 => case.get(&format!("step.before.{name}")),
                _ => case.get(&format!("step.{}.after.{name}", step - 1)),
            };
            let moved = view.detach() - here.on_device(&before[i]);
            let what = format!("{} training moves", case.name);
            here.compare_with(&what, name, &moved, &(after - expected_before), 1e-3);
            before[i] = on_cpu(view);
        }
    }
}
