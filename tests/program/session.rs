//! The drawing session: what requests share is made once, adapters come off bit for bit, and several sessions draw at once.

use crate::support::base::{pin_threads, root};
use crate::support::error::relative_error;
use hra::StableDiffusion;
use hra::attach::loaded::{FULL_UNET, LoadedAdapter};
use hra::data::image::RgbImage;
use hra::diffusion::sample::{Made, Request, SampleSettings, Session, SizeSettings, Start, TextSettings};
use hra::diffusion::sampler::SamplerKind;
use hra::model::layers::{Layers, Module};
use hra::platform::observer::Silent;
use hra::platform::random;
use hra::weights::tensor_file::{self, TensorFile};
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

fn case() -> PathBuf {
    root().join("tests/fixtures/cases/sd15")
}

fn open() -> Session {
    pin_threads();
    let model = StableDiffusion::load(&case().join("pipeline"), Kind::Float, Device::Cpu).unwrap();
    Session::open(model, Vec::new(), None).unwrap()
}

fn settings(prompt: &str) -> SampleSettings {
    SampleSettings {
        prompt: prompt.into(),
        negative_prompt: "a yellow cat".into(),
        sampler: SamplerKind::Ddim,
        spacing: None,
        karras: None,
        steps: 2,
        guidance: 4.0,
        guidance_rescale: 0.0,
        width: 16,
        height: 24,
        texts: TextSettings::default(),
        sizes: SizeSettings::default(),
    }
}

fn draw(session: &mut Session, settings: &SampleSettings) -> Tensor {
    let pictures = session.draw(&Request::new(settings, &[3, 4], 2), &Silent).unwrap();
    assert_eq!(pictures.iter().map(|p| p.seed).collect::<Vec<_>>(), [Some(3), Some(4)]);
    Tensor::cat(&pictures.iter().map(|p| &p.latents).collect::<Vec<_>>(), 0)
}

fn read(session: &mut Session, path: &Path) -> LoadedAdapter {
    LoadedAdapter::read(path, session.layer_names().unwrap()).unwrap()
}

/// Every frozen tensor of the model's networks.
fn weights(model: &mut StableDiffusion) -> Vec<Tensor> {
    let tensors = |module: Module| match module {
        Module::Layer(layer) => [Some(layer.weight().copy()), layer.bias().map(Tensor::copy)],
        Module::Norm(norm) => [Some(norm.weight().copy()), Some(norm.bias().copy())],
    };
    model.modules_mut().into_iter().flat_map(tensors).flatten().collect()
}

#[test]
fn what_requests_share_is_made_once() {
    let mut session = open();
    let picture = RgbImage::from_fn(16, 24, |x, y| image::Rgb([(x * 9) as u8, (y * 7) as u8, 80]));
    let start = Start::new(&picture, None, 0.8, (16, 24)).unwrap();
    let other = Start::new(&picture, None, 0.8, (16, 24)).unwrap();
    let made = |session: &Session| {
        let Made { texts, starts, plans } = session.made();
        (texts, starts, plans)
    };
    let _ = draw(&mut session, &settings("a red apple"));
    assert_eq!(made(&session), (2, 0, 1), "the prompt and the negative one, and a plan");
    let _ = draw(&mut session, &settings("a red apple"));
    let _ = draw(&mut session, &settings("a yellow cat"));
    assert_eq!(made(&session), (2, 0, 1), "nothing new was asked for");
    let _ = draw(&mut session, &settings("a blue car"));
    assert_eq!(made(&session), (3, 0, 1));
    let mut image = |start: &Start, steps: usize| {
        let settings = SampleSettings { steps, ..settings("a blue car") };
        let request = Request { start: Some(start), ..Request::new(&settings, &[1], 1) };
        session.draw(&request, &Silent).unwrap();
        made(&session)
    };
    assert_eq!(image(&start, 2), (3, 1, 2));
    assert_eq!(image(&start, 2), (3, 1, 2));
    assert_eq!(image(&start.clone(), 2), (3, 1, 2), "a copy is the same picture");
    assert_eq!(image(&start, 3), (3, 1, 3));
    assert_eq!(image(&other, 3), (3, 2, 3));
    // An adapter of the text encoder gives texts another meaning.
    let adapter = read(&mut session, &case().join("text-hra-r4"));
    session.put_on(vec![(adapter, 1.0)]).unwrap();
    let _ = draw(&mut session, &settings("a red apple"));
    assert_eq!(made(&session), (5, 2, 3));
    session.set_enabled(false);
    let _ = draw(&mut session, &settings("a red apple"));
    session.set_enabled(true);
    let _ = draw(&mut session, &settings("a red apple"));
    assert_eq!(made(&session), (7, 2, 3), "each meaning once");
}

/// A fully fine-tuned UNet: the model's with other numbers.
fn full(folder: &Path) {
    let file = TensorFile::open(&case().join("pipeline/unet/diffusion_pytorch_model.safetensors")).unwrap();
    let moved = |(i, name): (usize, String)| {
        let t = file.read(&name).unwrap().to_kind(Kind::Float);
        let noise = random::normal(i as u64, &t.size());
        (name, t + noise * 0.02)
    };
    let tensors: Vec<(String, Tensor)> = file.names().into_iter().enumerate().map(moved).collect();
    std::fs::create_dir_all(folder.join("unet")).unwrap();
    tensor_file::write(&folder.join(FULL_UNET), &tensors, &[]).unwrap();
}

#[test]
fn adapters_come_off_bit_for_bit() {
    let scratch = tempfile::tempdir().unwrap();
    full(scratch.path());
    let mut session = open();
    let settings = settings("a red apple");
    let base = draw(&mut session, &settings);
    let mut model = StableDiffusion::load(&case().join("pipeline"), Kind::Float, Device::Cpu).unwrap();
    let before = weights(&mut model);
    let kinds = ["hra-r4-all", "lora-r4-conv", "dora-r2", "oft-b4", "boft-bias", "text-lora-r4"];
    let folders = kinds.map(|kind| case().join(kind)).into_iter().chain([scratch.path().to_path_buf()]);
    for folder in folders {
        let adapter = read(&mut session, &folder);
        session.put_on(vec![(adapter, 1.0)]).unwrap();
        let whole = draw(&mut session, &settings);
        let what = folder.display();
        assert_eq!(session.reports().len(), 1);
        assert!(session.reports()[0].unused.is_empty(), "{what}: {:?}", session.reports());
        assert!(relative_error(&whole, &base) > 1e-4, "{what}: it does something");
        session.scale(&[0.5]).unwrap();
        let half = draw(&mut session, &settings);
        assert!(relative_error(&half, &whole) > 1e-5, "{what}: a strength does something");
        session.scale(&[1.0]).unwrap();
        assert_eq!(draw(&mut session, &settings), whole, "{what}: scaled back");
        assert!(session.reports()[0].unused.is_empty(), "{what}");
        session.set_enabled(false);
        assert_eq!(draw(&mut session, &settings), base, "{what}: switched off");
        session.take_off().unwrap();
        assert_eq!(draw(&mut session, &settings), base, "{what}: taken off");
        assert!(session.scale(&[1.0]).is_err() && session.reports().is_empty(), "{what}: it is off");
    }
    // The adapters changed nothing that a session without them would not have.
    let adapter = read(&mut session, &case().join("hra-r4"));
    let mut whole = Session::open(model, vec![(adapter, 1.0)], None).unwrap();
    whole.take_off().unwrap();
    let mut model = StableDiffusion::load(&case().join("pipeline"), Kind::Float, Device::Cpu).unwrap();
    assert_eq!(weights(&mut model), before);
    assert_eq!(draw(&mut whole, &settings), base);
}

#[test]
fn what_does_not_fit_leaves_the_base_model() {
    let mut session = open();
    let settings = settings("a red apple");
    let base = draw(&mut session, &settings);
    let other = root().join("tests/fixtures/cases/sd21/hra-r4");
    let adapter = read(&mut session, &other);
    assert!(session.put_on(vec![(adapter, 1.0)]).is_err(), "it is of another model");
    assert_eq!(draw(&mut session, &settings), base);
    // Put on for good, they stay.
    let model = StableDiffusion::load(&case().join("pipeline"), Kind::Float, Device::Cpu).unwrap();
    let adapter = read(&mut session, &case().join("oft-b4"));
    let mut kept = Session::open_for_good(model, vec![(adapter, 1.0)], None).unwrap();
    let adapter = read(&mut session, &case().join("oft-b4"));
    session.put_on(vec![(adapter, 1.0)]).unwrap();
    assert_eq!(draw(&mut kept, &settings), draw(&mut session, &settings));
    assert!(kept.take_off().unwrap_err().to_string().contains("for good"));
    assert!(kept.scale(&[]).unwrap_err().to_string().contains("for good"));
    kept.set_enabled(false);
    assert_eq!(draw(&mut kept, &settings), draw(&mut session, &settings), "nothing came off");
    assert!(relative_error(&draw(&mut kept, &settings), &base) > 1e-4);
}

fn is_send<T: Send>(value: T) -> T {
    value
}

#[test]
fn several_sessions_draw_at_once_as_each_alone() {
    // Random numbers come from one generator of the process.
    let alone: Vec<Tensor> = (0..8u64).map(|seed| random::normal(seed, &[64, 64])).collect();
    let mut sessions: Vec<Session> = (0..3).map(|_| is_send(open())).collect();
    let expected = draw(&mut sessions[0], &settings("a red apple"));
    std::thread::scope(|scope| {
        for seed in 0..8u64 {
            let alone = is_send(alone[seed as usize].shallow_clone());
            scope.spawn(move || {
                for _ in 0..50 {
                    assert_eq!(random::normal(seed, &[64, 64]), alone);
                }
            });
        }
        for session in &mut sessions {
            let expected = is_send(expected.shallow_clone());
            scope.spawn(move || {
                pin_threads();
                for _ in 0..5 {
                    assert_eq!(draw(session, &settings("a red apple")), expected);
                }
            });
        }
    });
}
