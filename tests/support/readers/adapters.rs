//! Adapters, put on a model.

use super::{pipeline, put, split};
use hra::StableDiffusion;
use hra::adapter::combine::{How, combine};
use hra::adapter::lora_file::LoraFile;
use hra::adapter::peft::{self, AdapterFile};
use hra::attach::fixed::attach_fixed;
use hra::attach::loaded::{FULL_UNET, LayerNames, LoadedAdapter, UNET_CLASS};
use hra::attach::{attach_trained, set_enabled};
use hra::weights::part::Part;
use std::cell::RefCell;
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// A model, loaded once, that adapters are put on.
struct Network {
    model: StableDiffusion,
    names: LayerNames,
}

impl Network {
    fn with(run: impl FnOnce(&mut Self)) {
        thread_local!(static NETWORK: RefCell<Option<Network>> = const { RefCell::new(None) });
        NETWORK.with_borrow_mut(|network| {
            let network = network.get_or_insert_with(|| {
                let mut model =
                    StableDiffusion::load(&pipeline(), Kind::Float, Device::Cpu).expect("a model");
                let names = model.layer_names().expect("names of layers");
                Network { model, names }
            });
            run(network);
            set_enabled(&mut network.model, false);
        });
    }

    /// What `hra sample` does with the adapter at `path`.
    fn attach(&mut self, path: &Path, use_it: bool) {
        let Ok(adapter) = LoadedAdapter::read(path, &self.names) else { return };
        let _ = adapter.other_base(&"0".repeat(64));
        if attach_fixed(&mut self.model, &mut [(adapter, 0.7)], true).is_ok() && use_it {
            self.forward();
        }
    }

    fn forward(&mut self) {
        let _guard = tch::no_grad_guard();
        let (states, _) = self.model.encode_prompts(&["a cat"]).expect("a prompt");
        let latents =
            Tensor::ones([1, self.model.denoiser().in_channels(), 8, 8], (Kind::Float, Device::Cpu));
        let _ = self.model.denoiser().forward(&latents, &Tensor::from_slice(&[500i64]), &states);
    }
}

/// A use of the network takes longer than all the rest, so only some inputs get one.
fn some(input: &[u8]) -> bool {
    input.len().is_multiple_of(8)
}

/// A PEFT folder: config and weights. What can be read is combined with itself, measured, and put on a model, at a strength
/// and to be trained.
pub fn adapter(scratch: &Path, input: &[u8]) {
    let [config, weights] = split(input);
    put(scratch, "adapter_config.json", config);
    put(scratch, "adapter_model.safetensors", weights);
    let Ok(file) = AdapterFile::read(scratch) else { return };
    let _ = file.tensors();
    for how in [How::Chain, How::Geodesic] {
        let _ = combine(&[(&file, 0.5), (&file, 1.0)], how);
    }
    let _ = (file.config.method.describe(), file.config.to_json(UNET_CLASS));
    for adapter in file.layers.values() {
        let _ = (adapter.rotation(), adapter.orthogonality_error(), adapter.regulariser(&[adapter.as_ref()]));
        let _ = (adapter.check(&[8, 8]), adapter.check(&[8, 4, 3, 3]));
        adapter.project();
    }
    Network::with(|network| {
        network.attach(scratch, some(input));
        set_enabled(&mut network.model, false);
        if attach_trained(&mut network.model, file).is_ok() && some(input) {
            network.forward();
        }
    });
}

/// Two PEFT folders, merged; what comes out is written and read.
pub fn merge(scratch: &Path, input: &[u8]) {
    let [first, a, second, b] = split(input);
    let mut files = Vec::new();
    for (name, config, weights) in [("a", first, a), ("b", second, b)] {
        put(scratch, &format!("{name}/{}", peft::CONFIG_FILE), config);
        put(scratch, &format!("{name}/{}", peft::WEIGHTS_FILE), weights);
        let Ok(file) = AdapterFile::read(&scratch.join(name)) else { return };
        files.push(file);
    }
    for (how, strengths) in [(How::Chain, [1.0, 1.0]), (How::Chain, [0.5, -2.0]), (How::Geodesic, [0.8, 0.6])]
    {
        let chain: Vec<_> = files.iter().zip(strengths).collect();
        let Ok((config, tensors)) = combine(&chain, how) else { continue };
        let out = scratch.join("out");
        std::fs::create_dir_all(&out).expect("scratch can be written");
        if peft::write(&out, &config, UNET_CLASS, &tensors, Kind::Float, &[]).is_ok() {
            let _ = AdapterFile::read(&out);
        }
    }
}

/// A fully fine-tuned UNet in a run folder, put on a model in place of its own weights.
pub fn full_unet(scratch: &Path, input: &[u8]) {
    put(scratch, FULL_UNET, input);
    Network::with(|network| network.attach(scratch, some(input)));
}

/// A LoRA file.
pub fn lora_file(scratch: &Path, input: &[u8]) {
    put(scratch, "lora.safetensors", input);
    let Ok(file) = LoraFile::read(&scratch.join("lora.safetensors")) else { return };
    for part in Part::ADAPTED {
        let _ = file.resolve(part, &["mid_block.attentions.0.proj_in"], &[]);
    }
    for layer in &file.layers {
        let _ = (layer.rank(), layer.product());
    }
    Network::with(|network| network.attach(&scratch.join("lora.safetensors"), some(input)));
}
