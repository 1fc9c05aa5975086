//! Stable Diffusion XL: both towers, and whole drawings.

use super::{Comparer, adapters};
use crate::support::cases::Case;
use hra::attach::loaded::LoadedAdapter;
use hra::data::image::load_rgb;
use hra::diffusion::sample::{
    From, Noise, Request, SampleSettings, Session, SizeSettings, Steering, Strength, TextSettings, conditions,
};
use hra::diffusion::sampler::SamplerKind;
use hra::model::control::{Control, ControlNet};
use hra::platform::choice::Choice;
use hra::platform::observer::Silent;
use serde_json::Value;
use tch::{Kind, Tensor};

pub fn texts(here: &Comparer, case: &Case) {
    let model = here.load(case);
    assert!(model.is_xl() && !model.is_refiner() && model.zeros_for_no_prompt);
    for (i, prompt) in case.json()["prompts"].as_array().unwrap().iter().enumerate() {
        let prompt = prompt.as_str().unwrap();
        for (n, tower) in model.texts.iter().enumerate() {
            let (ids, cut) = tower.tokenizer.encode(prompt).unwrap();
            let expected = case.get(&format!("text.{i}.input_ids.{}", n + 1)).reshape([-1]);
            assert_eq!(ids, Vec::<i64>::try_from(expected).unwrap(), "{} `{prompt}`, tower {n}", case.name);
            assert_eq!(cut, 0);
        }
        let (found, _) = model.encode_prompts(&[prompt]).unwrap();
        here.compare(case, "text states", &format!("text.{i}.hidden"), found.states(), 1e-5);
        here.compare(case, "pooled text", &format!("text.{i}.pooled"), found.get("pooled").unwrap(), 1e-5);
    }
}

/// The adapters of the towers, found by the class in their configs.
pub fn adapted_texts(here: &Comparer, case: &Case) {
    for (adapter, tower) in [("text1-hra-r4", 0), ("text2-hra-r4", 1)] {
        let mut model = here.load(case);
        let names = model.layer_names().unwrap();
        let read = LoadedAdapter::read(&case.dir.join(adapter), &names).unwrap();
        let session = Session::open(model, vec![(read, 1.0)], None).unwrap();
        assert!(session.reports()[0].unused.is_empty() && session.reports()[0].layers > 0);
        let json = case.json();
        let (found, _) = session.model().encode_prompts(&[json["prompts"][0].as_str().unwrap()]).unwrap();
        let widths: Vec<i64> = session.model().texts.iter().map(|tower| tower.encoder.width()).collect();
        let own = found.states().narrow(2, widths[..tower].iter().sum(), widths[tower]);
        here.compare(case, &format!("{adapter} states"), &format!("{adapter}.hidden"), &own, 1e-5);
        if tower == 1 {
            let pooled = found.get("pooled").unwrap();
            here.compare(case, &format!("{adapter} pooled"), &format!("{adapter}.pooled"), pooled, 1e-5);
        }
    }
}

/// The settings of the stored drawings.
fn settings(case: &Case, session: &Session) -> SampleSettings {
    let (json, factor) = (case.json(), session.model().vae.factor());
    let size = case.get("sample.noise").size();
    let text = |value: &Value| value.as_str().unwrap().to_string();
    SampleSettings {
        prompt: text(&json["prompts"][0]),
        negative_prompt: text(&json["negative"]),
        sampler: SamplerKind::Euler,
        spacing: None,
        karras: None,
        steps: json["steps"].as_u64().unwrap() as usize,
        guidance: json["guidance"].as_f64().unwrap(),
        guidance_rescale: 0.0,
        width: size[3] * factor,
        height: size[2] * factor,
        texts: TextSettings::default(),
        sizes: SizeSettings::default(),
    }
}

/// Final latents from the stored noise.
fn draw(session: &mut Session, case: &Case, settings: &SampleSettings, steering: Option<Steering>) -> Tensor {
    let steps = format!("sample.{}.step_noise", settings.sampler.name());
    let steps =
        if case.has(&steps) { case.get(&steps) } else { Tensor::zeros([0], (Kind::Float, tch::Device::Cpu)) };
    let noise = Noise { latents: case.get("sample.noise"), steps, image: None, masked_image: None };
    let request = Request { from: From::Noise(&noise), steering, ..Request::new(settings, &[], 2) };
    let pictures = session.draw(&request, &Silent).unwrap();
    Tensor::cat(&pictures.iter().map(|p| &p.latents).collect::<Vec<_>>(), 0)
        .to_device(session.model().device())
}

pub fn drawings(here: &Comparer, case: &Case) {
    let mut session = Session::open(here.load(case), Vec::new(), None).unwrap();
    let usual = settings(case, &session);
    for sampler in SamplerKind::CHOICES.iter().map(|choice| choice.value) {
        let latents = draw(&mut session, case, &SampleSettings { sampler, ..usual.clone() }, None);
        // DDIM clips here, which multiplies the last bits.
        let allowed = if sampler == SamplerKind::Ddim { 1e-3 } else { 1e-4 };
        here.compare(case, "drawing", &format!("sample.{}.latents", sampler.name()), &latents, allowed);
    }
    let json = case.json();
    let prompt_2 = Some(json["prompts"][1].as_str().unwrap().to_string());
    let (height, width) = (usual.height, usual.width);
    let variants = [
        ("no_negative", SampleSettings { negative_prompt: String::new(), ..usual.clone() }),
        (
            "micro",
            SampleSettings {
                sizes: SizeSettings {
                    original: Some([200, 300]),
                    crop: Some([20, 40]),
                    target: Some([height, width]),
                    negative_original: Some([32, 32]),
                    negative_crop: None,
                    negative_target: Some([64, 64]),
                },
                ..usual.clone()
            },
        ),
        (
            "two_prompts",
            SampleSettings {
                texts: TextSettings {
                    prompt_2,
                    negative_prompt_2: Some("a green pear".into()),
                    clip_skip: 0,
                },
                ..usual.clone()
            },
        ),
        (
            "clip_skip1",
            SampleSettings {
                texts: TextSettings { clip_skip: 1, ..TextSettings::default() },
                ..usual.clone()
            },
        ),
        ("rescale", SampleSettings { guidance_rescale: 0.7, ..usual.clone() }),
    ];
    for (name, settings) in variants {
        let latents = draw(&mut session, case, &settings, None);
        here.compare(case, "drawing", &format!("sample.{name}.latents"), &latents, 1e-4);
    }
}

/// Whole drawings with each adapter on the UNet.
pub fn adapted_drawings(here: &Comparer, case: &Case) {
    let names = adapters::names(case, "sample.latents");
    assert!(names.len() >= 3, "{}: {names:?}", case.name);
    let mut model = here.load(case);
    let layers = model.layer_names().unwrap();
    let mut session = Session::open(model, Vec::new(), None).unwrap();
    let usual = settings(case, &session);
    for name in names {
        let read = LoadedAdapter::read(&case.dir.join(&name), &layers).unwrap();
        session.put_on(vec![(read, 1.0)]).unwrap();
        let latents = draw(&mut session, case, &usual, None);
        here.compare(case, "adapted drawing", &format!("{name}.sample.latents"), &latents, 1e-4);
    }
}

/// A whole drawing with the ControlNet at 0.8.
pub fn controlled_drawing(here: &Comparer, case: &Case) {
    let (net, unused) =
        ControlNet::load(&case.dir.join("controlnet"), here.compute.kind, here.compute.device).unwrap();
    assert!(unused.is_empty(), "{unused:?}");
    let control = Control::Net(Box::new(net));
    let mut session = Session::open(here.load(case), Vec::new(), Some(control)).unwrap();
    let usual = settings(case, &session);
    let hint = load_rgb(&case.dir.join("hint.png")).unwrap();
    let steering = Steering {
        conditions: conditions(&[&hint], usual.width, usual.height),
        strength: Strength { scale: 0.8, ..Strength::default() },
    };
    let latents = draw(&mut session, case, &usual, Some(steering));
    here.compare(case, "controlled drawing", "control.latents", &latents, 1e-4);
}
