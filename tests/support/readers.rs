//! Every reader of a file that comes from somewhere else, as `fn(scratch, input)`: what it says of the input is ignored,
//! only that it comes back counts. `tests/fuzz.rs` runs them on a bounded corpus, `tests/fuzz/` under libFuzzer.
//!
//! Readers of several files take them in one input, with [`SEPARATOR`] between them.

use hra::StableDiffusion;
use hra::adapter::combine::{How, combine};
use hra::adapter::lora_file::{LoraFile, Part as LoraPart};
use hra::adapter::peft::{self, AdapterFile};
use hra::adapter::{Adapter, Full};
use hra::attach::fixed::attach_fixed;
use hra::attach::loaded::{FULL_UNET, LayerNames, LoadedAdapter, UNET_CLASS};
use hra::attach::parameters::Parameters;
use hra::attach::{attach_trained, set_enabled};
use hra::data::Crop;
use hra::data::image::landmarks::{self, read_points};
use hra::data::image::palette::{MapFile, Palette};
use hra::data::image::{LabelMap, RgbImage};
use hra::data::pairs::{ConditionKind, PairFolder, PairSettings};
use hra::diffusion::noise::{NoiseSchedule, SchedulerConfig};
use hra::diffusion::sampler::{Plan, SamplerKind};
use hra::lab::evaluate::clip::Clip;
use hra::lab::evaluate::vit::Vit;
use hra::model::text::{TextEncoder, Tokenizer};
use hra::model::{UNet, Vae};
use hra::platform::observer::Silent;
use hra::train::checkpoint::{Loaded, TrainedPart};
use hra::train::config::TrainConfig;
use hra::train::optim::{AdamW, AdamWConfig, Ema};
use hra::train::run::Metrics;
use hra::weights::config::{TextConfig, UNetConfig, VaeConfig};
use hra::weights::part::{Part, Text};
use hra::weights::source::Source;
use hra::weights::tensor_file::TensorFile;
use std::cell::RefCell;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// Between the files of one input.
pub const SEPARATOR: &[u8] = b"\n=====\n";

/// Reads `input`, putting files into `scratch` where the reader wants a path.
pub type Reader = fn(scratch: &Path, input: &[u8]);

/// All of them by name.
pub const READERS: [(&str, Reader); 26] = [
    ("tensor_file", tensor_file),
    ("adapter", adapter),
    ("merge", merge),
    ("lora_file", lora_file),
    ("full_unet", full_unet),
    ("unet_config", unet_config),
    ("vae_config", vae_config),
    ("text_config", text_config),
    ("unet", unet),
    ("vae", vae),
    ("text_encoder", text_encoder),
    ("scheduler", scheduler),
    ("tokenizer", tokenizer),
    ("vocabulary", vocabulary),
    ("checkpoint", checkpoint),
    ("train_config", train_config),
    ("run", run),
    ("shards", shards),
    ("picture", picture),
    ("points", points),
    ("palette", palette),
    ("label_map", label_map),
    ("hub_id", hub_id),
    ("clip", clip),
    ("vit", vit),
    ("pairs", pairs),
];

/// Several files as one input.
#[allow(dead_code)] // the fuzz targets only take apart
pub fn join(files: &[Vec<u8>]) -> Vec<u8> {
    files.join(SEPARATOR)
}

/// The first `N` files of an input; empty ones for those that it lacks.
fn split<const N: usize>(input: &[u8]) -> [&[u8]; N] {
    let mut rest = Some(input);
    std::array::from_fn(|i| {
        let Some(all) = rest.take() else { return &[][..] };
        let at = all.windows(SEPARATOR.len()).position(|window| window == SEPARATOR);
        match at.filter(|_| i + 1 < N) {
            Some(at) => {
                rest = Some(&all[at + SEPARATOR.len()..]);
                &all[..at]
            }
            None => all,
        }
    })
}

/// Writes a file below `scratch` that may be missing: no content, no file.
fn put_some(scratch: &Path, name: &str, content: &[u8]) {
    if !content.is_empty() {
        put(scratch, name, content);
    }
}

/// Writes a file below `scratch`.
fn put(scratch: &Path, name: &str, content: &[u8]) {
    let path = scratch.join(name);
    std::fs::create_dir_all(path.parent().expect("below scratch")).expect("scratch can be written");
    std::fs::write(path, content).expect("scratch can be written");
}

fn text(scratch: &Path, input: &[u8]) -> Text {
    Text { content: String::from_utf8_lossy(input).into_owned(), path: scratch.join("config.json") }
}

/// A safetensors file, read whole in every way.
pub fn tensor_file(scratch: &Path, input: &[u8]) {
    put(scratch, "x.safetensors", input);
    let path = scratch.join("x.safetensors");
    let Ok(file) = TensorFile::open(&path) else { return };
    let _ = file.texts();
    for name in file.names() {
        let _ = (file.shape(&name), file.is_float(&name), file.dtype(&name), file.text(&name));
        let _ = file.read(&name);
        let _ = file.read_as(&name, Kind::Float);
        let _ = file.read_rows(&name, 2, 3);
        let _ = file.first_bytes(&name, 1, 3, 256);
    }
}

/// A fixture, from the main package or from tests/fuzz.
fn fixture(name: &str) -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let found = [here.join("tests/fixtures"), here.join("../fixtures")].into_iter().find(|dir| dir.is_dir());
    found.expect("fixtures are in tests/fixtures").join(name)
}

/// The small model that Python wrote.
fn pipeline() -> PathBuf {
    fixture("cases/sd15/pipeline")
}

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
    for part in [LoraPart::UNet, LoraPart::TextEncoder] {
        let _ = file.resolve(part, &["mid_block.attentions.0.proj_in"], &[]);
    }
    for layer in &file.layers {
        let _ = (layer.rank(), layer.product());
    }
    Network::with(|network| network.attach(&scratch.join("lora.safetensors"), some(input)));
}

/// `unet/config.json`.
pub fn unet_config(scratch: &Path, input: &[u8]) {
    let _ = UNetConfig::parse(&text(scratch, input));
}

/// `vae/config.json`.
pub fn vae_config(scratch: &Path, input: &[u8]) {
    let _ = VaeConfig::parse(&text(scratch, input)).map(|config| config.factor());
}

/// `text_encoder/config.json`.
pub fn text_config(scratch: &Path, input: &[u8]) {
    let _ = TextConfig::parse(&text(scratch, input));
}

/// Config and weights of one part, in a model folder.
fn part(scratch: &Path, part: Part, input: &[u8]) -> Option<Source> {
    let [config, weights] = split(input);
    put(scratch, &format!("{}/config.json", part.folder()), config);
    put(scratch, &format!("{}/{}.safetensors", part.folder(), part.stem()), weights);
    Source::open(scratch, None).ok()
}

/// The UNet of a model folder.
pub fn unet(scratch: &Path, input: &[u8]) {
    if let Some(source) = part(scratch, Part::UNet, input) {
        let _ = UNet::load(&source, Kind::Float, Device::Cpu);
    }
}

/// The VAE of a model folder.
pub fn vae(scratch: &Path, input: &[u8]) {
    if let Some(source) = part(scratch, Part::Vae, input) {
        let _ = Vae::load(&source, Device::Cpu);
    }
}

/// The text encoder of a model folder.
pub fn text_encoder(scratch: &Path, input: &[u8]) {
    if let Some(source) = part(scratch, Part::TextEncoder, input) {
        let _ = TextEncoder::load(&source, Kind::Float, Device::Cpu);
    }
}

/// `scheduler_config.json`, for training and for every sampler.
pub fn scheduler(scratch: &Path, input: &[u8]) {
    let content = String::from_utf8_lossy(input);
    let Ok(config) = SchedulerConfig::parse(&content, &scratch.join("scheduler_config.json")) else { return };
    let config = config.for_latent_model();
    let _ = NoiseSchedule::new(&config, Device::Cpu);
    let _ = SamplerKind::from_config(&config);
    for name in ["ddim", "pndm", "euler", "euler-a", "dpm++2m", "dpm++2m-karras", "heun", "unipc"] {
        let kind: SamplerKind = name.parse().expect("a sampler's name");
        let settings = kind.settings(&config, None, None);
        for steps in [1, 2, 25] {
            let _ = Plan::new(kind, &settings, steps)
                .map(|plan| (plan.model_calls(), plan.noise_steps(), plan.init_noise_sigma()));
        }
        let _ =
            Plan::from_strength(kind, &settings, 5, 0.5).map(|plan| (plan.model_calls(), plan.noise_steps()));
        let zero = || Tensor::zeros([1, 1, 1, 1], (Kind::Float, Device::Cpu));
        if let Ok(plan) = Plan::new(kind, &settings, 5) {
            let _ = plan.run(zero(), &mut |x, _| Ok(x.shallow_clone()), &mut |_| Ok(zero()), &mut |_| Ok(()));
        }
    }
}

fn encode(scratch: &Path) {
    let Ok(source) = Source::open(scratch, None) else { return };
    let Ok(tokenizer) = Tokenizer::load(&source, 77) else { return };
    let _ = tokenizer.largest_id();
    for prompt in
        ["", "a photo of a sks dog, 4k!! <|endoftext|> \u{e9}\u{301}\u{1f415}\u{0}", &"ab ".repeat(200)]
    {
        let _ = tokenizer.encode(prompt);
    }
}

/// `tokenizer.json` and `tokenizer_config.json`.
pub fn tokenizer(scratch: &Path, input: &[u8]) {
    let [json, config] = split(input);
    put(scratch, "tokenizer/tokenizer.json", json);
    put_some(scratch, "tokenizer/tokenizer_config.json", config);
    encode(scratch);
}

/// `vocab.json`, `merges.txt`, `special_tokens_map.json` and `added_tokens.json`.
pub fn vocabulary(scratch: &Path, input: &[u8]) {
    let [vocab, merges, special, added] = split(input);
    put(scratch, "tokenizer/vocab.json", vocab);
    put(scratch, "tokenizer/merges.txt", merges);
    put_some(scratch, "tokenizer/special_tokens_map.json", special);
    put_some(scratch, "tokenizer/added_tokens.json", added);
    encode(scratch);
}

/// A single-file checkpoint, and all that it says of itself.
pub fn checkpoint(scratch: &Path, input: &[u8]) {
    put(scratch, "model.safetensors", input);
    let path = scratch.join("model.safetensors");
    let Ok(source) = Source::open(&path, None) else { return };
    let _ = (source.check_complete(), source.foreign_keys(), source.fingerprint());
    for part in Part::ALL {
        let _ = source.names(part);
        let Ok(tensors) = source.tensors(part) else { continue };
        for name in tensors.names() {
            let _ = (tensors.shape(name), tensors.read(name));
        }
    }
    let _ = StableDiffusion::from_source(source, Kind::Float, Device::Cpu);
}

/// A TOML file with the settings of a training run.
pub fn train_config(scratch: &Path, input: &[u8]) {
    put(scratch, "config.toml", input);
    let path = scratch.join("config.toml");
    let given = TrainConfig::merged(&[&path], &toml::Table::new(), &Silent);
    for config in [given, TrainConfig::read(&path)].into_iter().flatten() {
        let _ = (
            config.adapter.method().map(|m| m.map(|m| m.describe())),
            config.to_toml(),
            config.check_resume(&config, &Silent),
        );
        if config.validate().is_err() {
            continue;
        }
        for shape in [[8, 8], [320, 768]] {
            let Ok(Some(method)) = config.adapter.method() else { continue };
            let _ = method.parameters_for(&shape);
            let weight = Tensor::ones(shape, (Kind::Float, Device::Cpu));
            let _ = method.start(&weight, config.seed).map(|adapter| adapter.project());
        }
        for rate in config.learning_rates() {
            let _ = [0, 1, config.schedule.max_train_steps].map(|step| rate.at(step));
        }
        let _ = config.optimizer.adamw();
    }
}

/// What a run goes on from: `state.json`, `optimizer.safetensors` and `metrics.jsonl`.
pub fn run(scratch: &Path, input: &[u8]) {
    let [state, optimizer, metrics] = split(input);
    put(scratch, "state.json", state);
    put(scratch, "optimizer.safetensors", optimizer);
    put(scratch, "metrics.jsonl", metrics);
    let loaded = Loaded::read(scratch);
    let step = loaded.as_ref().map_or(0, |loaded| loaded.state.step);
    if let Ok(loaded) = loaded {
        put(scratch, FULL_UNET, optimizer);
        let (name, weight) =
            Full::new(Tensor::ones([4, 2], (Kind::Float, Device::Cpu))).parameters().remove(0);
        let mut parameters = Parameters::pack(&[vec![(name.to_string(), weight)]]);
        let config = AdamWConfig { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0 };
        let (mut adam, mut ema) = (AdamW::new(config, &parameters), Ema::new(0.9, &parameters));
        let parts = [TrainedPart::Network { folder: "unet", files: Vec::new() }];
        if loaded.restore(&parts, &mut parameters, &mut adam, Some(&mut ema), None).is_ok() {
            adam.step(&mut parameters, &Tensor::from(1f32), &[1e-3], None).unwrap();
            ema.update(&parameters, 1);
        }
    }
    let _ = Metrics::open(scratch, step, true);
}

/// The index of a UNet's shards, with one shard beside it.
pub fn shards(scratch: &Path, input: &[u8]) {
    let [index, shard] = split(input);
    put(scratch, "unet/diffusion_pytorch_model.safetensors.index.json", index);
    put(scratch, "unet/shard-1.safetensors", shard);
    let Ok(source) = Source::open(scratch, None) else { return };
    let Ok(tensors) = source.tensors(Part::UNet) else { return };
    for name in tensors.names() {
        let _ = tensors.read(name);
    }
}

/// A photograph, or a picture of ours with its settings.
pub fn picture(scratch: &Path, input: &[u8]) {
    let _ = hra::data::image::decode::decode(input);
    put(scratch, "picture.png", input);
    let _ = hra::data::image::read_png_text(&scratch.join("picture.png"));
}

/// Landmarks of a picture, drawn at two sizes.
pub fn points(scratch: &Path, input: &[u8]) {
    put(scratch, "points.pts", input);
    let Ok(points) = read_points(&scratch.join("points.pts")) else { return };
    let _ = landmarks::draw(&points, 64, 48);
    let _ = landmarks::draw(&landmarks::square(&points, 64, 48, 16), 16, 16);
}

/// Colours of classes, used both ways.
pub fn palette(scratch: &Path, input: &[u8]) {
    put(scratch, "palette.json", input);
    let Ok(palette) = Palette::read(&scratch.join("palette.json")) else { return };
    assert!(palette.names().is_empty() || palette.names().len() == palette.colours().len());
    let _ = palette.colour(&LabelMap::new(2, 1, vec![0, u16::MAX]), None);
    let _ = palette.classes(&RgbImage::new(3, 2), None);
}

/// A segmentation map in any form, and a palette.
pub fn label_map(scratch: &Path, input: &[u8]) {
    let [map, palette] = split(input);
    put(scratch, "map.png", map);
    put(scratch, "palette.json", palette);
    let path = scratch.join("map.png");
    let palette = Palette::read(&scratch.join("palette.json")).ok();
    let Ok(map) = LabelMap::read(&path, palette.as_ref()) else { return };
    let (width, height) = map.dimensions();
    assert_eq!(map.labels().len(), width as usize * height as usize);
    let _ = map.square(8);
    let _ = palette.as_ref().map(|palette| palette.colour(&map, Some(255)));
    let _ = MapFile::read(&path).map(|file| file.subject(palette.as_ref()));
}

/// What a user or a config may give as a hub id: whatever it is, it names one folder of the cache.
pub fn hub_id(_: &Path, input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    let word = Path::new(&*text);
    let _ = hra::platform::hub::repository_of(word);
    if hra::platform::hub::is_id(word) {
        let (name, revision) = text.split_once('@').unwrap_or((&text, "main"));
        assert_eq!(name.split('/').count(), 2, "{text:?}");
        let mut parts = name.split('/').chain(revision.split('/'));
        assert!(parts.all(|part| !part.is_empty() && !part.starts_with('.')), "{text:?}");
    }
}

/// Config, processor and weights of a tower's folder.
fn tower(scratch: &Path, processor: &str, input: &[u8]) -> [RgbImage; 2] {
    let [config, settings, weights] = split(input);
    put(scratch, "config.json", config);
    put(scratch, processor, settings);
    put(scratch, "model.safetensors", weights);
    [RgbImage::new(31, 7), RgbImage::new(5, 40)]
}

/// CLIP's folder, with a tokenizer that is good; a picture or text is scored with what loads.
pub fn clip(scratch: &Path, input: &[u8]) {
    let pictures = tower(scratch, "processor_config.json", input);
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        put(scratch, name, &std::fs::read(fixture("towers/clip").join(name)).expect("a fixture"));
    }
    let Ok(clip) = Clip::load(scratch, Device::Cpu) else { return };
    let _ = clip.images(&pictures.each_ref());
    let _ = clip.texts(&["a cat", ""]);
}

/// DINO's or DINOv2's folder; pictures are scored with what loads.
pub fn vit(scratch: &Path, input: &[u8]) {
    let pictures = tower(scratch, "preprocessor_config.json", input);
    let Ok(vit) = Vit::load(scratch, Device::Cpu) else { return };
    let _ = vit.images(&pictures.each_ref());
}

/// A table of pairs with a picture, a condition, points and a palette.
pub fn pairs(scratch: &Path, input: &[u8]) {
    let [table, picture, condition, points, palette] = split(input);
    let files = [("a.png", picture), ("c.png", condition), ("p.pts", points), ("palette.json", palette)];
    for (name, content) in files {
        put(scratch, name, content);
    }
    let with_palette = Some(scratch.join("palette.json"));
    let kinds = [
        (ConditionKind::Canny, None),
        (ConditionKind::Landmarks, None),
        (ConditionKind::Segmentation, with_palette),
    ];
    for (name, (condition, palette)) in ["t.csv", "t.json", "t.jsonl"].into_iter().zip(kinds) {
        put(scratch, name, table);
        let settings = PairSettings { condition, palette, ..PairSettings::default() };
        let Ok(pairs) = PairFolder::read(&scratch.join(name), &settings, &Silent) else { continue };
        let _ = pairs.report(Some(64));
        for index in 0..pairs.pairs().len().min(3) {
            let window = pairs.crop_window(index, 24, Crop::Random(7 << 32 | 7));
            let _ = (pairs.prepare(index, 24, window), pairs.at_size(index, 16, 24));
        }
    }
}
