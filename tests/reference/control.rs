//! ControlNets and control encoders against Python's.

use super::Comparer;
use super::networks::unet_call;
use crate::support::cases::Case;
use crate::support::error::relative_error;
use hra::adapter::Method;
use hra::adapter::methods::full::FullConfig;
use hra::adapter::peft::Bias;
use hra::adapter::target::TargetRule;
use hra::attach;
use hra::model::control::{CONTROL_ENCODER, ConditionEncoder, Control, ControlNet, Passes};
use hra::model::{Call, Conditioning, Signals};
use hra::weights::tensor_file::TensorFile;
use tch::Kind;

/// A case with the tensors of control: they lie beside its own (make_control_fixtures.py) or among them.
fn control_case(case: &Case) -> Case {
    let path = case.dir.join("control.safetensors");
    let path = if path.is_file() { path } else { case.dir.join("expected.safetensors") };
    let expected = TensorFile::open(&path).unwrap();
    Case { name: case.name.clone(), dir: case.dir.clone(), expected, _scratch: case._scratch.clone() }
}

/// Whether the case has a ControlNet, which then gives the same tensors.
pub fn controlnet(here: &Comparer, case: &Case) -> bool {
    let expected = control_case(case);
    if !expected.has("control.out") {
        return false;
    }
    let model = here.load(case);
    let _guard = tch::no_grad_guard();
    let dir = case.dir.join("controlnet");
    let (net, unused) = ControlNet::load(&dir, here.compute.kind, here.compute.device).unwrap();
    assert!(unused.is_empty(), "{}: {unused:?}", case.name);
    let control = Control::Net(Box::new(net));
    assert_eq!(control.misfit(&model.unet, model.vae.factor()), None);
    let features = control.features(&here.input(&expected, "control.image"));
    here.compare(&expected, "ControlNet", "control.hint", &features, 1e-5);
    let (sample, timesteps) = (&here.input(case, "unet.sample"), &here.input(case, "unet.timestep"));
    let conditioning = &Conditioning::new(here.input(case, "unet.context"));
    let call = Call { sample, timesteps, conditioning };
    let signals = |scale| control.signals(&features, scale, Passes::Both, call);
    let unscaled = signals(1.0);
    // The case's single residuals have the scale of its call, 0.8.
    let last = unscaled.skips.last().unwrap() * 0.8;
    here.compare(&expected, "ControlNet", "control.down.last", &last, 1e-5);
    let middle = unscaled.middle.as_ref().unwrap() * 0.8;
    here.compare(&expected, "ControlNet", "control.mid", &middle, 1e-5);
    let out = model.denoiser().predict(call, &signals(0.8));
    here.compare(&expected, "ControlNet", "control.out", &out, 1e-5);
    assert!(relative_error(&out, &unet_call(here, case, &model)) > 1e-2, "{}: it steers", case.name);
    true
}

/// Whether the case has a control encoder, which then gives the same output and gradients.
pub fn encoder(here: &Comparer, case: &Case) -> bool {
    let expected = control_case(case);
    if !expected.has("encoder.out") {
        return false;
    }
    let model = here.load(case);
    let dir = case.dir.join(CONTROL_ENCODER);
    let (mut encoder, unused) = ConditionEncoder::load(&dir, here.compute.device).unwrap();
    assert!(unused.is_empty(), "{}: {unused:?}", case.name);
    let everything = TargetRule::from_words(&[".*".to_string()]).unwrap();
    attach::attach_new(&mut encoder, ("", &everything), &Method::new(FullConfig), Bias::None, 0).unwrap();
    let parameters = attach::pack_parameters(&mut [&mut encoder]);
    let out = encoder.forward(&here.input(&expected, "control.image"));
    here.compare(&expected, "control encoder", "encoder.out", &out, 1e-5);
    (out.square().mean(Kind::Float) * here.loss_scale()).backward();
    let keys = expected.expected.names().iter().filter(|key| key.starts_with("encoder.grad.")).count();
    assert_eq!(keys, parameters.views().len(), "{}: as many tensors train", case.name);
    for (name, view) in parameters.views() {
        let key = format!("encoder.grad.{name}");
        here.compare(&expected, "control encoder gradients", &key, &(view.grad() / here.loss_scale()), 2e-5);
    }
    let _guard = tch::no_grad_guard();
    let signals = Signals { hint: Some(out), ..Signals::default() };
    let (sample, timesteps) = (&here.input(case, "unet.sample"), &here.input(case, "unet.timestep"));
    let conditioning = &Conditioning::new(here.input(case, "unet.context"));
    let call = Call { sample, timesteps, conditioning };
    let out = model.denoiser().predict(call, &signals);
    here.compare(&expected, "control encoder steering", "encoder.unet.out", &out, 1e-5);
    true
}
