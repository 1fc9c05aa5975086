//! What a checkpoint file lacks, says or hides: settings from elsewhere, settings from shapes, broken and hostile files.

use crate::models::{assert_same, checkpoint, load, open};
use crate::support::all_cases::cases;
use crate::support::cases::Case;
use crate::support::records::records;
use crate::support::refused::refused;
use crate::support::scratch::Scratch;
use crate::support::training::tiny_sd;
use hra::convert::single_file::{Replaced, write_checkpoint, write_folder};
use hra::model::UNet;
use hra::model::layers::Layers;
use hra::model::text::TextEncoder;
use hra::weights::config::{TextConfig, UNetConfig, VaeConfig};
use hra::weights::ldm::TensorForm;
use hra::weights::part::Part;
use hra::weights::prediction::Prediction;
use hra::weights::source::{Source, TEXT_FILES};
use hra::weights::tensor_file::{self, TensorFile};
use hra::{ErrorKind, StableDiffusion};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// Tensors of a file that a test changes.
type Named = Vec<(String, Tensor)>;

/// A checkpoint with the keys and shapes that a folder with these configs would give, and no data in it: a sparse file.
fn of_shapes(dir: &Path, configs: &[(Part, Value)]) -> PathBuf {
    let (model, path) = (dir.join("configs"), dir.join("shapes.safetensors"));
    for (part, config) in configs {
        let folder = model.join(part.folder());
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("config.json"), config.to_string()).unwrap();
        tensor_file::write(&folder.join(format!("{}.safetensors", part.stem())), &[], &[]).unwrap();
    }
    let source = open(&model);
    let mut shapes: BTreeMap<String, Vec<i64>> = BTreeMap::new();
    for part in source.parts() {
        // Loaded from an empty file, a network lists every tensor as missing, with its shape.
        let missing = match part {
            Part::UNet => UNet::load(&source, Kind::Half, Device::Cpu).err().unwrap(),
            Part::TextEncoder | Part::TextEncoder2 => {
                TextEncoder::load(&source, part, Kind::Half, Device::Cpu).err().unwrap()
            }
            Part::Vae => {
                vae_shapes(&source, &mut shapes);
                continue;
            }
        };
        let ErrorKind::Weights { problems, .. } = missing.kind else { panic!("no error of weights") };
        let names = source.names(part).unwrap();
        for problem in problems {
            let inner = problem.strip_prefix('`').and_then(|p| p.strip_suffix(" is missing")).unwrap();
            let (name, shape) = inner.split_once("` ").unwrap();
            let mut shape: Vec<i64> = serde_json::from_str(shape).unwrap();
            let (key, form) = names.key(name).unwrap_or_else(|| panic!("no key for {name}"));
            if matches!(form, TensorForm::Third(_)) {
                shape[0] *= 3;
            }
            shapes.insert(key, shape);
        }
    }
    let (mut header, mut end) = (serde_json::Map::new(), 0i64);
    for (key, shape) in shapes {
        let size = 2 * shape.iter().product::<i64>();
        header.insert(key, json!({"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}));
        end += size;
    }
    let header = Value::from(header).to_string().into_bytes();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(&header);
    fs::write(&path, &bytes).unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_len(bytes.len() as u64 + end as u64).unwrap();
    path
}

/// What tells a VAE's sizes (the crate that it is from builds all of it at once, and lists nothing).
fn vae_shapes(source: &Source, shapes: &mut BTreeMap<String, Vec<i64>>) {
    let config = VaeConfig::parse(&source.text("vae/config.json").unwrap()).unwrap();
    let names = source.names(Part::Vae).unwrap();
    let mut put = |name: String, shape: Vec<i64>| shapes.insert(names.key(&name).unwrap().0, shape);
    for (i, &c) in config.block_out_channels.iter().enumerate() {
        for j in 0..config.layers_per_block {
            put(format!("encoder.down_blocks.{i}.resnets.{j}.conv2.weight"), vec![c, c, 3, 3]);
        }
    }
    put("encoder.conv_in.weight".into(), vec![config.block_out_channels[0], 3, 3, 3]);
    put("decoder.conv_out.weight".into(), vec![3, config.block_out_channels[0], 3, 3]);
    put("post_quant_conv.weight".into(), vec![config.latent_channels, config.latent_channels, 1, 1]);
}

/// The settings of the published models: their folders' config files, as far as they shape the networks.
fn published(two: bool) -> Vec<(Part, Value)> {
    let blocks = ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"];
    let unet = json!({
        "sample_size": if two { 96 } else { 64 },
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280, 1280],
        "down_block_types": blocks,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 2,
        "cross_attention_dim": if two { 1024 } else { 768 },
        "attention_head_dim": if two { json!([5, 10, 20, 20]) } else { json!(8) },
        "use_linear_projection": two,
        "upcast_attention": two,
        "norm_num_groups": 32,
    });
    let text = json!({
        "vocab_size": 49408,
        "hidden_size": if two { 1024 } else { 768 },
        "intermediate_size": if two { 4096 } else { 3072 },
        "num_hidden_layers": if two { 23 } else { 12 },
        "num_attention_heads": if two { 16 } else { 12 },
        "max_position_embeddings": 77,
        "hidden_act": if two { "gelu" } else { "quick_gelu" },
    });
    let vae = json!({
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": vec!["DownEncoderBlock2D"; 4],
        "up_block_types": vec!["UpDecoderBlock2D"; 4],
        "layers_per_block": 2,
        "latent_channels": 4,
    });
    vec![(Part::UNet, unet), (Part::TextEncoder, text), (Part::Vae, vae)]
}

#[test]
fn settings_of_the_published_families_follow_from_shapes() {
    for two in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let path = of_shapes(dir.path(), &published(two));
        refused(
            open(&path).check_complete().unwrap_err(),
            &[
                "no tokenizer/, no scheduler/",
                "hint: give --config DIR",
                if two {
                    "stabilityai/stable-diffusion-2-1"
                } else {
                    "stable-diffusion-v1-5/stable-diffusion-v1-5"
                },
            ],
        );
        let config = dir.path().join("config");
        fs::create_dir_all(config.join("scheduler")).unwrap();
        let prediction = if two { "v_prediction" } else { "epsilon" };
        let scheduler = json!({"prediction_type": prediction}).to_string();
        fs::write(config.join("scheduler/scheduler_config.json"), scheduler).unwrap();
        let source = Source::open(&path, Some(&config)).unwrap();
        let given = open(&dir.path().join("configs"));

        let unet = |s: &Source| UNetConfig::parse(&s.text("unet/config.json").unwrap()).unwrap();
        let ((found, levels), (expected, expected_levels)) = (unet(&source), unet(&given));
        assert_eq!(format!("{levels:?}"), format!("{expected_levels:?}"));
        assert_eq!(
            (
                found.sample_size,
                found.attention.use_linear_projection,
                found.attention.upcast_attention,
                found.attention.cross_attention_dim
            ),
            (
                expected.sample_size,
                expected.attention.use_linear_projection,
                expected.attention.upcast_attention,
                expected.attention.cross_attention_dim
            )
        );
        let text = |s: &Source| TextConfig::parse(&s.text("text_encoder/config.json").unwrap()).unwrap();
        let sizes = |c: TextConfig| {
            let layers = (c.num_hidden_layers, c.num_attention_heads, c.intermediate_size, c.layer_norm_eps);
            (c.vocab_size, c.hidden_size, c.max_position_embeddings, c.hidden_act, layers)
        };
        assert_eq!(sizes(text(&source)), sizes(text(&given)));
        let vae = |s: &Source| {
            let c = VaeConfig::parse(&s.text("vae/config.json").unwrap()).unwrap();
            (c.block_out_channels, c.layers_per_block, c.latent_channels, c.norm_num_groups, c.scaling_factor)
        };
        assert_eq!(vae(&source), vae(&given));
    }
}

/// Writes the case's checkpoint again, changed by `change` and without metadata.
fn altered(case: &Case, dir: &Path, change: impl Fn(&mut Named)) -> PathBuf {
    let path = dir.join("plain.safetensors");
    let whole = dir.join("whole.safetensors");
    if !whole.exists() {
        write_checkpoint(&open(&case.pipeline()), &Replaced::new(), None, &whole).unwrap();
    }
    let file = TensorFile::open(&whole).unwrap();
    let mut tensors: Named =
        file.names().into_iter().map(|name| (name.clone(), file.read(&name).unwrap())).collect();
    change(&mut tensors);
    tensor_file::write(&path, &tensors, &[("modelspec.prediction_type", "epsilon".into())]).unwrap();
    path
}

/// Layers of the case's text tower.
fn layers(case: &Case) -> i64 {
    let config = open(&case.pipeline()).text("text_encoder/config.json").unwrap();
    TextConfig::parse(&config).unwrap().num_hidden_layers
}

fn load_with(path: &Path, case: &Case) -> hra::Result<StableDiffusion> {
    StableDiffusion::load_with(path, Some(&case.pipeline()), Kind::Float, Device::Cpu)
}

#[test]
fn a_folder_says_what_a_plain_checkpoint_does_not() {
    for case in cases() {
        let dir = tempfile::tempdir().unwrap();
        let path = altered(&case, dir.path(), |tensors| {
            // What training leaves in published files.
            let ones = |shape: &[i64]| Tensor::ones(shape, (Kind::Float, Device::Cpu));
            for name in ["alphas_cumprod", "betas", "model_ema.decay", "model_ema.diffusion_modelout2bias"] {
                tensors.push((name.into(), ones(&[2])));
            }
            tensors.push(("cond_stage_model.logit_scale".into(), ones(&[])));
            tensors.push((
                "cond_stage_model.transformer.text_model.embeddings.position_ids".into(),
                Tensor::arange(20, (Kind::Int64, Device::Cpu)),
            ));
            if case.name.starts_with("sd21") {
                tensors.retain(|(name, _)| !name.starts_with("cond_stage_model.transformer."));
                tensors.push(("cond_stage_model.model.logit_scale".into(), ones(&[])));
                tensors.push(("cond_stage_model.model.text_projection".into(), ones(&[24, 24])));
                // One block more than the folder has layers, made of the first.
                let first = |name: &str| name.contains("resblocks.0.");
                let block = |name: &str| name.replace("blocks.0.", &format!("blocks.{}.", layers(&case)));
                let last: Named = tensors
                    .iter()
                    .filter(|(name, _)| first(name))
                    .map(|(name, t)| (block(name), t.shallow_clone()))
                    .collect();
                tensors.extend(last);
            }
        });
        refused(StableDiffusion::load(&path, Kind::Float, Device::Cpu).err().unwrap(), &["no tokenizer/"]);
        let mut model = load_with(&path, &case).unwrap();
        let velocity = case.name.starts_with("sd21");
        // Averages are left over; the metadata's word counts before the folder's.
        let (averaged, said): (Vec<String>, Vec<String>) =
            model.notes.iter().cloned().partition(|note| note.contains("the averaged one is not used"));
        assert_eq!((averaged.len(), said.len()), (1, usize::from(velocity)), "{:?}", model.notes);
        let followed = |note: &String| note.contains("predicts `epsilon`") && note.contains("is followed");
        assert!(said.iter().all(followed), "{said:?}");
        assert_eq!(model.scheduler.prediction().unwrap(), Prediction::Epsilon);
        let mut folder = load(&case.pipeline());
        for (a, b) in model.layers_mut().into_iter().zip(folder.layers_mut()) {
            assert!(a.name == b.name && a.matrix().equal(&b.matrix()), "{}", a.name);
        }
        // The last block and the projection of OpenCLIP stay in a checkpoint and stay out of a folder.
        let source = Source::open(&path, Some(&case.pipeline())).unwrap();
        let (file, out) = (dir.path().join("again.safetensors"), dir.path().join("folder"));
        write_checkpoint(&source, &Replaced::new(), None, &file).unwrap();
        write_folder(&source, &Replaced::new(), None, &out).unwrap();
        assert_same(&out, &case.pipeline());
        let last =
            format!("cond_stage_model.model.transformer.resblocks.{}.attn.in_proj_bias", layers(&case));
        assert_eq!(TensorFile::open(&file).unwrap().shape(&last).is_some(), velocity);
        load(&file);
    }
}

#[test]
fn what_does_not_fit_is_told_with_its_key() {
    let all = cases();
    let case = all.iter().find(|case| case.name.starts_with("sd21")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let told = |words: &[&str], change: &dyn Fn(&mut Named)| {
        let path = altered(case, dir.path(), change);
        refused(load_with(&path, case).err().unwrap(), words);
    };
    let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
    let set = |tensors: &mut Named, name: &str, value: Tensor| {
        tensors.iter_mut().find(|(n, _)| n == name).unwrap_or_else(|| panic!("no {name}")).1 = value;
    };
    for (prefix, told_as) in [
        ("model.diffusion_model.", "no model.diffusion_model.*"),
        ("first_stage_model.", "no first_stage_model.*"),
        ("cond_stage_model.", "no cond_stage_model.*"),
    ] {
        told(&[told_as], &|tensors| tensors.retain(|(name, _)| !name.starts_with(prefix)));
    }
    told(&["conv_in.weight", "is missing"], &|tensors| {
        tensors.retain(|(name, _)| name != "model.diffusion_model.input_blocks.0.0.weight");
    });
    let q = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight";
    told(&[q, "three equal parts"], &|tensors| set(tensors, q, zeros(&[71, 24])));
    told(&[q, "expected shape [24, 24], found [30, 24]"], &|tensors| set(tensors, q, zeros(&[90, 24])));
    told(&[q, "three equal parts"], &|tensors| set(tensors, q, zeros(&[])));
    let conv = "first_stage_model.decoder.conv_in.weight";
    told(&[conv, "expected shape"], &|tensors| set(tensors, conv, zeros(&[1, 2, 3, 3])));
    told(&[conv, "expected floating point, found I64"], &|tensors| {
        let whole = tensors.iter().find(|(n, _)| n == conv).unwrap().1.to_kind(Kind::Int64);
        set(tensors, conv, whole);
    });

    let source = Source::open(&dir.path().join("plain.safetensors"), Some(&case.pipeline())).unwrap();
    let out = dir.path().join("out");
    let words = [conv, "expected floating point, found I64"];
    refused(write_folder(&source, &Replaced::new(), None, &out).unwrap_err(), &words);
    assert!(!out.exists());

    let path = altered(case, dir.path(), |tensors| {
        tensors.push(("model.diffusion_model.label_emb.weight".into(), zeros(&[1])));
        tensors.push(("somebody.else".into(), zeros(&[1])));
    });
    let notes = load_with(&path, case).unwrap().notes.join("\n");
    assert!(
        notes.contains("unet: tensors that were not used: model.diffusion_model.label_emb.weight"),
        "{notes}"
    );
    assert!(notes.contains("checkpoint: tensors that were not used: somebody.else"), "{notes}");
    // Neither is it the model of another folder, nor can its own settings be guessed.
    let other = all.iter().find(|case| case.name.starts_with("sd15")).unwrap();
    refused(load_with(&path, other).err().unwrap(), &["problems with the weights"]);
    refused(open(&path).text("unet/config.json").unwrap_err(), &["768", "1024", "found 24", "--config"]);
}

#[test]
fn broken_and_foreign_files_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let case = &cases()[0];
    let whole = fs::read(checkpoint(case, dir.path())).unwrap();
    let path = dir.path().join("x.safetensors");
    let told = |path: &Path, words: &[&str]| refused(Source::open(path, None).unwrap_err(), words);
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    for length in [0, 7, 8, 100, header - 1, header, whole.len() - 1] {
        fs::write(&path, &whole[..length]).unwrap();
        told(&path, &["expected a safetensors file"]);
    }
    for ending in ["ckpt", "pt", "bin", "pth", "CKPT"] {
        let path = dir.path().join(format!("model.{ending}"));
        fs::write(&path, &whole).unwrap();
        told(&path, &["pickle", "run code", "python -c", "weights_only=True"]);
    }
    for first in [b"PK\x03\x04rest", b"\x80\x02}q\x00X.."] {
        let path = dir.path().join("model");
        fs::write(&path, first).unwrap();
        told(&path, &["pickle"]);
    }
    told(&dir.path().join("nowhere.safetensors"), &["found nothing"]);
    tensor_file::write(&path, &[("lora_unet_x.alpha".into(), Tensor::from(1f32))], &[]).unwrap();
    told(&path, &["looks like an adapter"]);
    fs::copy(case.pipeline().join("unet/diffusion_pytorch_model.safetensors"), &path).unwrap();
    told(&path, &["one part of a Hugging Face folder"]);
    let key = "conditioner.embedders.1.model.ln_final.bias";
    tensor_file::write(&path, &[(key.into(), Tensor::from(1f32))], &[]).unwrap();
    told(&path, &["expected a Stable Diffusion XL checkpoint", "conditioner.embedders.0.transformer."]);
    let both = Source::open(&case.pipeline(), Some(&tiny_sd())).unwrap_err();
    refused(both, &["goes with a checkpoint file only"]);
}

/// Paths in metadata are names to look up and nothing else: what is not on the list is not even looked at.
#[test]
fn metadata_leads_to_no_path() {
    let dir = tempfile::tempdir().unwrap();
    let case = &cases()[0];
    let path = checkpoint(case, dir.path());
    let file = TensorFile::open(&path).unwrap();
    let tensors: Named =
        file.names().into_iter().map(|name| (name.clone(), file.read(&name).unwrap())).collect();
    let mut text: Vec<(String, String)> = TEXT_FILES
        .iter()
        .filter_map(|name| Some((format!("hra/{name}"), file.text(&format!("hra/{name}"))?.to_string())))
        .collect();
    for evil in
        ["hra/../evil.json", "hra//tmp/evil.json", "hra/unet/../../evil.json", "hra/tokenizer/evil.py"]
    {
        text.push((evil.into(), "evil".into()));
    }
    let evil = dir.path().join("evil.safetensors");
    let text: Vec<(&str, String)> = text.iter().map(|(key, value)| (key.as_str(), value.clone())).collect();
    tensor_file::write(&evil, &tensors, &text).unwrap();
    let out = dir.path().join("deep/er/out");
    fs::create_dir_all(out.parent().unwrap()).unwrap();
    write_folder(&open(&evil), &Replaced::new(), None, &out).unwrap();
    assert_same(&out, &case.pipeline());
    let mut files = Vec::new();
    let mut folders = vec![dir.path().to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()) {
            if entry.is_dir() { folders.push(entry) } else { files.push(entry) }
        }
    }
    assert!(files.iter().all(|file| !file.to_string_lossy().contains("evil.json")), "{files:?}");
    assert!(files.iter().all(|file| file.extension() != Some("py".as_ref())), "{files:?}");
}

#[test]
fn a_checkpoints_fingerprint_is_of_its_weights() {
    let dir = tempfile::tempdir().unwrap();
    let all = cases();
    let case = all.iter().find(|case| case.name.starts_with("sd21")).unwrap();
    let path = checkpoint(case, dir.path());
    let whole = load(&path).fingerprint().unwrap();
    assert_eq!(open(&case.pipeline()).fingerprint().unwrap(), whole, "the same weights in another layout");
    let plain = altered(case, dir.path(), |_| {});
    assert_eq!(
        load_with(&plain, case).unwrap().fingerprint().unwrap(),
        whole,
        "other metadata, same weights"
    );
    let plain = altered(case, dir.path(), |tensors| {
        let weight =
            tensors.iter_mut().find(|(name, _)| name.ends_with("middle_block.1.proj_in.weight")).unwrap();
        weight.1 = &weight.1 * 1.5;
    });
    assert_ne!(load_with(&plain, case).unwrap().fingerprint().unwrap(), whole);
}

#[test]
fn training_from_a_checkpoint_is_training_from_its_folder() {
    let scratch = Scratch::new();
    let folder = tiny_sd();
    let embedded = scratch.path("tiny.safetensors");
    write_checkpoint(&open(&folder), &Replaced::new(), None, &embedded).unwrap();
    let file = TensorFile::open(&embedded).unwrap();
    let tensors: Named = file.names().into_iter().map(|n| (n.clone(), file.read(&n).unwrap())).collect();
    let plain = scratch.path("plain.safetensors");
    tensor_file::write(&plain, &tensors, &[]).unwrap();
    let [folder, embedded, plain] = [&folder, &embedded, &plain].map(|path| path.to_str().unwrap());
    let step = ["--max_train_steps", "1", "--pretrained_model_name_or_path"];
    for (out, model, more) in [
        ("folder", folder, &[][..]),
        ("embedded", embedded, &[]),
        ("plain", plain, &["--model-config", folder]),
    ] {
        let done = scratch.train(out, &[&step[..], &[model], more].concat());
        let [a, b] = [out, "folder"].map(|run| scratch.path(run).join("adapter_model.safetensors"));
        let [a, b] = [a, b].map(|path| TensorFile::open(&path).unwrap());
        assert_eq!(a.names(), b.names());
        assert!(a.names().iter().all(|n| a.read(n).unwrap().equal(&b.read(n).unwrap())), "{out}");
        assert_eq!(records(&scratch.path(out)), records(&scratch.path("folder")));
        assert_eq!(done.out.contains("--config"), out == "plain", "{}", done.out);
    }
    let sample =
        ["sample", "--prompt", "a cat", "--steps", "1", "--output", "out", "--adapter", "plain", "--model"];
    let refused = scratch.run(&[&sample[..], &[plain]].concat());
    assert!(refused.code != 0 && refused.err.contains("give --config DIR"), "{}", refused.err);
    scratch.ok(&[&sample[..], &[plain, "--config", folder]].concat());
}
