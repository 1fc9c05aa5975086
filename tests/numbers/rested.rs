//! Weights that rest in half precision under layers that compute in f32, against the same weights in f32, which the other tests hold
//! against Python's.

use crate::reference::networks::unet_call;
use crate::reference::{Comparer, REFERENCE, adapters};
use crate::support::cases::{Case, stored_cases};
use crate::support::copied::copy;
use crate::support::error::relative_error;
use crate::support::stored_xl::stored_xl;
use hra::StableDiffusion;
use hra::adapter::peft::AdapterFile;
use hra::attach;
use hra::model::layers::Layers;
use hra::platform::precision::Numbers;
use hra::weights::tensor_file::{self, TensorFile};
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// The same model with every number of UNet and text towers rounded to `rest`, in files of f32.
fn rounded(case: &Case, rest: Kind, to: &Path) {
    copy(&case.pipeline(), to);
    for (part, stem) in
        [("unet", "diffusion_pytorch_model"), ("text_encoder", "model"), ("text_encoder_2", "model")]
    {
        let path = to.join(part).join(format!("{stem}.safetensors"));
        if !path.is_file() {
            continue;
        }
        let file = TensorFile::open(&path).unwrap();
        let round = |name: &String| {
            let tensor = file.read(name).unwrap();
            let value =
                if tensor.is_floating_point() { tensor.to_kind(rest).to_kind(Kind::Float) } else { tensor };
            (name.clone(), value)
        };
        let tensors: Vec<(String, Tensor)> = file.names().iter().map(round).collect();
        std::fs::remove_file(&path).unwrap();
        tensor_file::write(&path, &tensors, &[]).unwrap();
    }
}

/// What the UNet answers with an adapter on it, and the gradients of its mean square.
fn trained(case: &Case, adapter: &str, mut model: StableDiffusion) -> Vec<Tensor> {
    let file = AdapterFile::read(&case.dir.join(adapter)).unwrap();
    attach::attach_trained(&mut model.unet, file).unwrap();
    let parameters = attach::pack_parameters(&mut [&mut model.unet]);
    let out = unet_call(&Comparer::new(REFERENCE), case, &model);
    out.square().mean(Kind::Float).backward();
    let gradients = parameters.views().iter().map(|(_, tensor)| tensor.grad());
    std::iter::once(out.detach()).chain(gradients).collect()
}

#[test]
fn weights_at_rest_in_half_precision_compute_as_their_values_in_f32_do() {
    for (case, rest) in
        stored_cases().into_iter().chain([stored_xl()]).zip([Kind::Half, Kind::BFloat16, Kind::BFloat16])
    {
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path().join("rounded");
        rounded(&case, rest, &dir);
        let resting = || {
            StableDiffusion::load(&case.pipeline(), Numbers { rest, compute: Kind::Float }, Device::Cpu)
                .unwrap()
        };
        let plain = || StableDiffusion::load(&dir, Kind::Float, Device::Cpu).unwrap();

        let mut model = resting();
        for layer in model.layers_mut() {
            assert_eq!((layer.weight().kind(), layer.kind()), (rest, Kind::Float), "{}", layer.name);
        }
        let json = case.json();
        let prompts = [json["prompts"][0].as_str().unwrap()];
        let states =
            |model: &StableDiffusion| model.encode_prompts(&prompts).unwrap().0.states().shallow_clone();
        assert!(relative_error(&states(&model), &states(&plain())) < 1e-6, "{}", case.name);

        let names = adapters::names(&case, "out");
        assert!(names.len() >= 3, "{}: {names:?}", case.name);
        for name in names {
            let (found, expected) = (trained(&case, &name, resting()), trained(&case, &name, plain()));
            assert_eq!(found.len(), expected.len());
            for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                let error = relative_error(found, expected);
                assert!(error < 1e-5, "{} {name}, tensor {i}: relative error {error:.1e}", case.name);
            }
        }
    }
}
