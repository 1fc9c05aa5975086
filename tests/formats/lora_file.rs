//! LoRA files: every style has the effect that diffusers and PEFT give it (`fixtures/make_lora_fixtures.py`), what is written
//! has the names and numbers that other programs look for, and no broken file gets further than an error.

use crate::support::base::root;
use crate::support::error::relative_error;
use hra::StableDiffusion;
use hra::adapter::lora_file::{LayerProduct, LoraFile, LoraLayer, Style, canonical, write};
use hra::model::layers::Layers;
use hra::platform::random::normal;
use hra::platform::seed;
use hra::weights::part::Part;
use hra::weights::tensor_file::{self, TensorFile};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

const STYLES: [&str; 7] = ["adapter", "dora", "kohya", "peft", "pipeline", "processor", "script"];
const F32: (Kind, Device) = (Kind::Float, Device::Cpu);

fn fixture(style: &str) -> PathBuf {
    root().join(format!("tests/fixtures/lora/{style}.safetensors"))
}

/// Names of a part's layers, as the model has them, and their weights as matrices.
fn weights(part: &mut dyn Layers, file: &str) -> BTreeMap<String, Tensor> {
    let dir = root().join("tests/fixtures/cases/sd15/pipeline");
    let file = TensorFile::open(&dir.join(file)).unwrap();
    let weight = |name: &str| {
        let names = ["", "text_model."].map(|prefix| format!("{prefix}{name}.weight"));
        let name = names.iter().find(|name| file.shape(name).is_some()).unwrap();
        file.read(name).unwrap().flatten(1, -1)
    };
    part.layers_mut().into_iter().map(|layer| (layer.name.clone(), weight(&layer.name))).collect()
}

/// The change of a weight that a layer makes.
fn change(layer: &LoraLayer, weight: &Tensor) -> Tensor {
    let product = layer.product();
    match &layer.magnitude {
        None => product,
        Some(magnitude) => {
            let adapted = weight + product;
            let norms = adapted.norm_scalaropt_dim(2, [1], true);
            magnitude.unsqueeze(1) * adapted / norms - weight
        }
    }
}

#[test]
fn every_style_has_the_effect_that_python_gives_it() {
    let dir = root().join("tests/fixtures/cases/sd15/pipeline");
    let mut model = StableDiffusion::load(&dir, Kind::Float, Device::Cpu).unwrap();
    let parts = [
        (Part::UNet, weights(&mut model.unet, "unet/diffusion_pytorch_model.safetensors")),
        (Part::TextEncoder, weights(&mut model.texts[0].encoder, "text_encoder/model.safetensors")),
    ];
    let expected = TensorFile::open(&fixture("expected")).unwrap();
    let probe = expected.read("probe").unwrap();
    for style in STYLES {
        let file = LoraFile::read(&fixture(style)).unwrap();
        assert_eq!(file.unused, Vec::<String>::new(), "{style}");
        assert_eq!(file.notes.len(), usize::from(style == "peft"), "{style}: {:?}", file.notes);
        let mut seen = 0;
        for (part, weights) in &parts {
            let names: Vec<&str> = weights.keys().map(String::as_str).collect();
            let resolved = file.resolve(*part, &names, &[]).unwrap();
            assert!(resolved.unmatched.is_empty(), "{style}: {:?}", resolved.unmatched);
            for (name, layer) in resolved.layers {
                let key = format!("{style}/{}.{name}", part.folder());
                let reference = expected.read(&key).unwrap();
                let weight = &weights[&name];
                let found = change(layer, weight).matmul(&probe.narrow(0, 0, weight.size()[1]));
                let error = relative_error(&found, &reference);
                assert!(error < 1e-5, "{key}: {error:.1e}");
                seen += 1;
            }
        }
        let there = expected.names().iter().filter(|name| name.starts_with(&format!("{style}/"))).count();
        assert_eq!(seen, there, "{style}: layers");
        assert_eq!(seen, file.layers.len(), "{style}: layers of the file");
    }
}

type Tensors = Vec<(String, Tensor)>;

/// Halves of rank 2 for a linear layer 5 -> 3.
fn halves(down: &str, up: &str) -> Tensors {
    let random = |name: &str, shape: [i64; 2]| (name.to_string(), normal(seed::derive(1, name, 0), &shape));
    vec![random(down, [2, 5]), random(up, [3, 2])]
}

fn read(tensors: &Tensors, text: &[(&str, String)]) -> Result<LoraFile, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    tensor_file::write(&path, tensors, text).unwrap();
    LoraFile::read(&path).map_err(|e| e.to_string())
}

fn kohya(layer: &str) -> Tensors {
    halves(&format!("lora_unet_{layer}.lora_down.weight"), &format!("lora_unet_{layer}.lora_up.weight"))
}

#[test]
fn alpha_scales_each_layer_whatever_its_type() {
    let mut tensors = kohya("a");
    tensors.extend(kohya("b"));
    tensors.extend(kohya("c"));
    tensors.push(("lora_unet_a.alpha".into(), Tensor::from(3i64)));
    tensors.push(("lora_unet_b.alpha".into(), Tensor::from_slice(&[0.5f32]).to_kind(Kind::Half)));
    tensors.push(("lora_unet_gone.alpha".into(), Tensor::from(1.0)));
    let file = read(&tensors, &[]).unwrap();
    let found: Vec<_> = file.layers.iter().map(|l| (l.name.as_str(), l.alpha, l.scale)).collect();
    assert_eq!(found, [("a", Some(3.0), 1.5), ("b", Some(0.5), 0.25), ("c", None, 1.0)]);
    assert_eq!(file.unused, ["lora_unet_gone.alpha"]);
    assert!(file.notes[0].contains("1 of 3 layers have no alpha"), "{:?}", file.notes);
    let half: Tensors = tensors.iter().map(|(k, t)| (k.clone(), t.to_kind(Kind::BFloat16))).collect();
    assert_eq!(read(&half, &[]).unwrap().layers[0].scale, 1.5);
}

#[test]
fn ldm_names_find_their_layers() {
    let mut tensors = kohya("input_blocks_1_1_transformer_blocks_0_attn1_to_q");
    tensors.extend(kohya("middle_block_0_in_layers_2"));
    tensors.extend(kohya("output_blocks_9_9"));
    let file = read(&tensors, &[]).unwrap();
    let to_q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q";
    let names = [to_q, "mid_block.resnets.0.conv1"];
    let ldm = [
        ("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q", to_q),
        ("middle_block.0.in_layers.2", "mid_block.resnets.0.conv1"),
    ];
    let resolved = file.resolve(Part::UNet, &names, &ldm).unwrap();
    assert_eq!(resolved.layers.keys().collect::<Vec<_>>(), names);
    assert_eq!(resolved.unmatched.iter().map(|l| l.name.as_str()).collect::<Vec<_>>(), ["output_blocks_9_9"]);
    assert!(file.resolve(Part::TextEncoder, &names, &ldm).unwrap().layers.is_empty());
    assert_eq!(file.resolve(Part::UNet, &names, &[]).unwrap().unmatched.len(), 3);

    tensors.extend(kohya(&canonical(to_q)));
    let told = read(&tensors, &[]).unwrap().resolve(Part::UNet, &names, &ldm).unwrap_err().to_string();
    assert!(told.contains(to_q) && told.contains("input_blocks_1_1"), "{told}");
}

#[test]
fn what_cannot_be_honoured_is_refused_by_key() {
    let (down, up) = ("unet.a.lora_A.weight", "unet.a.lora_B.weight");
    let with = |name: &str, tensor: Tensor| {
        let mut tensors = halves(down, up);
        tensors.retain(|(key, _)| key != name);
        tensors.push((name.to_string(), tensor));
        tensors
    };
    let ones = |shape: &[i64]| Tensor::ones(shape, F32);
    let bad = |value: f64| {
        let tensor = ones(&[2, 5]);
        let _ = tensor.get(1).get(3).fill_(value);
        tensor
    };
    for (tensors, words) in [
        (halves(down, up)[..1].to_vec_shallow(), [down, "no up half"]),
        (halves(down, up)[1..].to_vec_shallow(), [up, "no down half"]),
        (with(down, bad(f64::NAN)), [down, "not finite"]),
        (with(down, bad(f64::INFINITY)), [down, "not finite"]),
        (with(down, ones(&[0, 5])), [down, "rank"]),
        (with(down, ones(&[4, 5])), [up, "expected shape (d_out, 4)"]),
        (with(down, ones(&[2, 5, 3])), [down, "two dimensions, or four"]),
        (with(down, ones(&[10])), [down, "two dimensions, or four"]),
        (with(down, Tensor::ones([2, 5], (Kind::Int64, Device::Cpu))), [down, "floating point"]),
        (with(up, ones(&[3, 2, 3, 3])), [up, "kernel of 1x1"]),
        (with(down, ones(&[1, (1 << 20) + 1])), [down, "size of a layer"]),
        (with("unet.a.alpha", ones(&[2])), ["unet.a.alpha", "one number"]),
        (with("unet.a.alpha", Tensor::from(f64::NAN)), ["unet.a.alpha", "finite number"]),
        (with("unet.a.lora_magnitude_vector", ones(&[5])), ["lora_magnitude_vector", "3 norms of rows"]),
        (with("unet.a.dora_scale", ones(&[1, 5])), ["dora_scale", "norms of columns"]),
        (with("unet.b.lora_magnitude_vector", ones(&[3])), ["unet.b", "no down and up halves"]),
        (with("unet.a.lora_down.weight", ones(&[2, 5])), [down, "says the same"]),
        (with("unet.a.lora_mid.weight", ones(&[2, 2])), ["lora_mid", "tucker"]),
        (with("unet.a.lora_B.bias", ones(&[3])), ["lora_B.bias", "lora_bias"]),
        (with("lora_te3_x.lora_up.weight", ones(&[3, 2])), ["lora_te3_x", "SD 3"]),
        (vec![("unet.a.weight".into(), ones(&[3, 5]))], ["expected LoRA tensors", "unet.a.weight"]),
    ] {
        let told = read(&tensors, &[]).expect_err(words[1]);
        for word in words {
            assert!(told.contains(word), "expected `{word}` in\n{told}");
        }
    }
    let equal = with("unet.a.dora_scale", ones(&[3, 1]));
    assert!(read(&equal, &[]).unwrap().layers[0].magnitude.is_some());
    let strange = read(&with("unet.a.weight", ones(&[3, 5])), &[]).unwrap();
    assert_eq!(strange.unused, ["unet.a.weight"]);
}

#[test]
fn settings_in_the_metadata_are_honoured_or_refused() {
    let tensors = halves("unet.a.b.lora_A.weight", "unet.a.b.lora_B.weight");
    let settings = |json: &str| {
        let file = read(&tensors, &[("lora_adapter_metadata", json.to_string())])?;
        Ok::<_, String>((file.layers[0].alpha.unwrap(), file.layers[0].scale))
    };
    for (json, scale) in [
        (r#"{"r": 2, "lora_alpha": 3}"#, (3.0, 1.5)),
        (r#"{"unet.r": 2, "unet.lora_alpha": 6, "text_encoder.r": 9}"#, (6.0, 3.0)),
        (r#"{"r": 2, "lora_alpha": 4, "use_rslora": true}"#, (4.0, 4.0 / 2f64.sqrt())),
        (
            r#"{"r": 7, "rank_pattern": {"a.b": 2}, "lora_alpha": 1, "alpha_pattern": {"^a.b": 5}}"#,
            (5.0, 2.5),
        ),
        (r#"{"r": 2, "lora_alpha": 4, "alpha_pattern": {"xb": 5, "a": 6}}"#, (4.0, 2.0)),
        (
            r#"{"r": 2, "lora_alpha": 2, "init_lora_weights": "gaussian", "lora_bias": false, "bias": "none"}"#,
            (2.0, 1.0),
        ),
    ] {
        assert_eq!(settings(json).unwrap(), scale, "{json}");
    }
    for (json, word) in [
        (r#"{"r": 3, "lora_alpha": 3}"#, "say rank 3, its tensors have rank 2"),
        (r#"{"r": 2, "use_dora": true}"#, "DoRA"),
        (r#"{"r": 2, "lora_bias": true}"#, "lora_bias"),
        (r#"{"r": 2, "modules_to_save": ["conv_in"]}"#, "modules_to_save"),
        (r#"{"r": 2, "init_lora_weights": "pissa"}"#, "base weights"),
        (r#"{"r": 2, "bias": "lora_only"}"#, "biases"),
        (r#"{"r": 2, "peft_type": "LOHA"}"#, "LOHA"),
        (r#"{"r": 2, "lora_alpha": "much"}"#, "lora_alpha"),
        (r#"{"r": 2, "alpha_pattern": {"(": 1}}"#, "alpha_pattern"),
        ("[1", "not JSON"),
    ] {
        let told = settings(json).unwrap_err();
        assert!(told.contains(word), "{json}: {told}");
    }
    let mut both = halves("unet.a.b.lora_A.weight", "unet.a.b.lora_B.weight");
    both.push(("unet.a.b.alpha".into(), Tensor::from(2.0)));
    let said = |alpha: i64| [("lora_adapter_metadata", format!(r#"{{"r": 2, "lora_alpha": {alpha}}}"#))];
    assert_eq!(read(&both, &said(2)).unwrap().layers[0].scale, 1.0);
    assert!(read(&both, &said(4)).unwrap_err().contains("unet.a.b.alpha"));
}

/// `Tensor` has no `Clone`.
trait Shallow {
    fn to_vec_shallow(&self) -> Tensors;
}

impl Shallow for [(String, Tensor)] {
    fn to_vec_shallow(&self) -> Tensors {
        self.iter().map(|(key, tensor)| (key.clone(), tensor.shallow_clone())).collect()
    }
}

/// A linear layer of each kind of name, a convolution, a text encoder's layer; ranks 2 and 4.
fn changes(scale_down: f64, scale_up: f64) -> Vec<LayerProduct> {
    let make = |part, layer: &str, down: &[i64], up: &[i64]| {
        let seeds = [0, 1].map(|half| seed::derive(3, layer, half));
        LayerProduct {
            part,
            layer: layer.to_string(),
            ldm: None,
            down: normal(seeds[0], down) * scale_down,
            up: normal(seeds[1], up) * scale_up,
            magnitude: None,
        }
    };
    let block = "down_blocks.0.attentions.0.transformer_blocks.0";
    vec![
        make(Part::UNet, &format!("{block}.attn1.to_out.0"), &[2, 12], &[12, 2]),
        make(Part::UNet, &format!("{block}.attn2.to_k"), &[4, 16], &[12, 4]),
        make(Part::UNet, &format!("{block}.ff.net.2"), &[2, 48], &[12, 2]),
        make(Part::UNet, "down_blocks.0.resnets.0.conv1", &[2, 12, 3, 3], &[12, 2, 1, 1]),
        make(Part::TextEncoder, "encoder.layers.0.self_attn.q_proj", &[2, 16], &[16, 2]),
    ]
}

/// Largest relative error of the products after writing and reading.
fn round_trip(path: &Path, style: Style, changes: &[LayerProduct], kind: Kind) -> f64 {
    write(path, style, changes, kind, &[("base", "123".to_string())]).unwrap();
    let file = LoraFile::read(path).unwrap();
    assert_eq!((file.layers.len(), file.unused.len()), (changes.len(), 0));
    let error = |change: &LayerProduct| {
        let name = canonical(&change.layer);
        let layer = file.layers.iter().find(|l| l.part == change.part && l.name == name).unwrap();
        let product = change.up.flatten(1, -1).matmul(&change.down.flatten(1, -1));
        assert_eq!(layer.down.dim(), change.down.dim());
        relative_error(&layer.product(), &product)
    };
    changes.iter().map(error).fold(0.0, f64::max)
}

#[test]
fn what_is_written_is_read_back_with_the_same_effect() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    for style in [Style::Diffusers, Style::Kohya] {
        for (kind, tolerance) in [(Kind::Float, 1e-6), (Kind::Half, 2e-3), (Kind::BFloat16, 2e-2)] {
            // Halves that f16 could not hold as they are: 65504 is its largest number, 6e-8 its smallest.
            for (down, up) in [(1.0, 1.0), (1e7, 1e-7), (1e-9, 1e8), (1e3, 1e3)] {
                let error = round_trip(&path, style, &changes(down, up), kind);
                assert!(error < tolerance, "{style:?} {kind:?} {down:e} {up:e}: {error:.1e}");
            }
        }
        // Ranks of very different sizes in one layer are balanced one by one.
        let changes = changes(1.0, 1.0);
        for change in &changes {
            let _ = change.down.get(0).g_mul_scalar_(1e6);
            let _ = change.up.select(1, 0).g_mul_scalar_(1e-6);
        }
        assert!(round_trip(&path, style, &changes, Kind::Half) < 2e-3);
        let zero = |part: &Tensor| part.zeros_like();
        let untrained: Vec<LayerProduct> =
            changes.into_iter().map(|c| LayerProduct { up: zero(&c.up), ..c }).collect();
        round_trip(&path, style, &untrained, Kind::Half);
        assert_eq!(LoraFile::read(&path).unwrap().layers[0].product().abs().max().double_value(&[]), 0.0);
    }
    let told = write(&path, Style::Kohya, &changes(1e6, 1e6), Kind::Half, &[]).unwrap_err().to_string();
    assert!(told.contains("f16 cannot hold") && told.contains("lora_unet_"), "{told}");
}

#[test]
fn names_and_metadata_are_those_that_other_programs_look_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    let mut changes = changes(1.0, 1.0);
    for (i, d_out) in [(0, 12), (3, 12), (4, 16)] {
        changes[i].magnitude = Some(Tensor::ones([d_out], F32));
    }
    write(&path, Style::Diffusers, &changes, Kind::Half, &[("base", "123".to_string())]).unwrap();
    let file = TensorFile::open(&path).unwrap();
    let block = "unet.down_blocks.0.attentions.0.transformer_blocks.0";
    for (name, shape) in [
        (format!("{block}.attn1.processor.to_out_lora.down.weight"), &[2i64, 12][..]),
        (format!("{block}.attn1.to_out.0.lora_magnitude_vector"), &[12]),
        ("unet.down_blocks.0.resnets.0.conv1.lora_magnitude_vector".into(), &[1, 12, 1, 1]),
        (
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_magnitude_vector.weight".into(),
            &[16],
        ),
        (format!("{block}.attn2.processor.to_k_lora.up.weight"), &[12, 4]),
        (format!("{block}.ff.net.2.lora.down.weight"), &[2, 48]),
        ("unet.down_blocks.0.resnets.0.conv1.lora.up.weight".into(), &[12, 2, 1, 1]),
        (
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight".into(),
            &[16, 2],
        ),
    ] {
        assert_eq!(file.shape(&name).as_deref(), Some(shape), "{name} in {:?}", file.names());
    }
    assert_eq!(file.text("base"), Some("123"));
    assert_eq!(LoraFile::read(&path).unwrap().layers.iter().filter(|l| l.magnitude.is_some()).count(), 3);

    write(&path, Style::Kohya, &changes, Kind::Half, &[("base", "123".to_string())]).unwrap();
    let file = TensorFile::open(&path).unwrap();
    let block = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0";
    for (name, shape) in [
        (format!("{block}_attn1_to_out_0.lora_down.weight"), &[2i64, 12][..]),
        (format!("{block}_attn1_to_out_0.dora_scale"), &[12, 1]),
        ("lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight".into(), &[2, 12, 3, 3]),
        ("lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight".into(), &[12, 2, 1, 1]),
        ("lora_unet_down_blocks_0_resnets_0_conv1.dora_scale".into(), &[12, 1, 1, 1]),
        ("lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha".into(), &[]),
    ] {
        assert_eq!(file.shape(&name).as_deref(), Some(shape), "{name} in {:?}", file.names());
    }
    // One alpha for all layers, whatever their ranks.
    for name in file.names().iter().filter(|name| name.ends_with(".alpha")) {
        assert_eq!(file.read(name).unwrap().double_value(&[]), 4.0);
    }
    for (key, value) in
        [("ss_network_module", "networks.lora"), ("ss_network_dim", "4"), ("ss_network_alpha", "4.0")]
    {
        assert_eq!(file.text(key), Some(value));
    }
}

/// Numbers that look random and are the same in every run.
fn draw(state: &mut u64) -> usize {
    *state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
    (*state >> 33) as usize
}

#[test]
fn broken_files_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    let mut state = 7;
    let (mut read, mut refused) = (0, 0);
    for style in STYLES {
        let whole = std::fs::read(fixture(style)).unwrap();
        let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
        for round in 0..400 {
            let mut bytes = whole.clone();
            match round % 4 {
                0 => bytes.truncate(draw(&mut state) % whole.len()),
                // Mostly the header, where structure is.
                1 | 2 => (0..1 + draw(&mut state) % 4).for_each(|_| {
                    let at = draw(&mut state) % header;
                    bytes[at] = b"0123456789-[]{},:\"aA._\0\xff"[draw(&mut state) % 24];
                }),
                _ => (0..1 + draw(&mut state) % 8).for_each(|_| {
                    let at = draw(&mut state) % bytes.len();
                    bytes[at] = draw(&mut state) as u8;
                }),
            }
            std::fs::write(&path, &bytes).unwrap();
            match LoraFile::read(&path) {
                Ok(file) => {
                    file.layers.iter().for_each(|layer| drop(layer.product()));
                    read += 1;
                }
                Err(e) => {
                    assert!(!e.to_string().is_empty());
                    refused += 1;
                }
            }
        }
    }
    assert!(read > 100 && refused > 500, "{read} read, {refused} refused");
}
