//! Text states, the UNet and the VAE against Python's.

use super::Comparer;
use crate::support::cases::Case;
use hra::StableDiffusion;
use hra::model::Conditioning;
use hra::model::conditioning::{POOLED, SIZES};
use tch::Tensor;

/// What the UNet is told in the stored call.
pub fn told(here: &Comparer, case: &Case) -> Conditioning {
    let states = Conditioning::new(here.input(case, "unet.context"));
    if !case.has("unet.pooled") {
        return states;
    }
    states.with(POOLED, here.input(case, "unet.pooled")).with(SIZES, here.input(case, "unet.time_ids"))
}

/// The stored call of the UNet.
pub fn unet_call(here: &Comparer, case: &Case, model: &StableDiffusion) -> Tensor {
    let conditioning = told(here, case);
    let (sample, timestep) = (here.input(case, "unet.sample"), here.input(case, "unet.timestep"));
    model.denoiser().forward(&sample, &timestep, &conditioning)
}

pub fn texts(here: &Comparer, case: &Case) {
    let model = here.load(case);
    let json = case.json();
    for (i, prompt) in json["prompts"].as_array().unwrap().iter().enumerate() {
        let prompt = prompt.as_str().unwrap();
        let (ids, cut) = model.texts[0].tokenizer.encode(prompt).unwrap();
        let expected: Vec<i64> =
            Vec::try_from(case.get(&format!("text.{i}.input_ids")).reshape([-1])).unwrap();
        assert_eq!(ids, expected, "{} `{prompt}`", case.name);
        assert_eq!(cut, 0);
        let (states, _) = model.encode_prompts(&[prompt]).unwrap();
        here.compare(case, "text states", &format!("text.{i}.hidden"), states.states(), 1e-5);
    }
}

pub fn unet_and_vae(here: &Comparer, case: &Case) {
    let model = here.load(case);
    let _guard = tch::no_grad_guard();
    here.compare(case, "UNet", "unet.out", &unet_call(here, case, &model), 1e-5);
    let (mean, logvar) = model.vae.encode(&case.get("vae.image"));
    here.compare(case, "VAE encoder", "vae.mean", &mean, 1e-5);
    here.compare(case, "VAE encoder", "vae.logvar", &logvar, 1e-5);
    here.compare(case, "VAE decoder", "vae.decoded", &model.vae.decode(&case.get("vae.mean")), 1e-5);
}
