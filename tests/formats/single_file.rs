//! One checkpoint file and a Hugging Face folder hold the same model, both ways.

use crate::models::{assert_same, checkpoint, load, open, weights};
use crate::support::all_cases::cases;
use crate::support::refused::refused;
use hra::StableDiffusion;
use hra::convert::single_file::{Replaced, write_checkpoint, write_folder};
use hra::model::Conditioning;
use hra::model::layers::Layers;
use hra::platform::random;
use hra::weights::part::Part;
use hra::weights::source::TEXT_FILES;
use hra::weights::tensor_file::{self, PlannedTensor, TensorFile};
use serde_json::Value;
use std::fs;
use tch::{Device, Kind, Tensor};

#[test]
fn a_checkpoint_gives_the_folders_tensors_states_and_output() {
    for case in cases() {
        let dir = tempfile::tempdir().unwrap();
        let path = checkpoint(&case, dir.path());
        assert_same(&path, &case.pipeline());
        let (one, other) = (load(&path), load(&case.pipeline()));
        assert_eq!(one.name(), case.name);
        let _guard = tch::no_grad_guard();
        let prompts = fs::read_to_string(case.dir.join("expected.json")).unwrap();
        let prompts: Value = serde_json::from_str(&prompts).unwrap();
        for prompt in prompts["prompts"].as_array().unwrap() {
            let states = |model: &StableDiffusion| {
                model.encode_prompts(&[prompt.as_str().unwrap()]).unwrap().0.states().copy()
            };
            assert!(states(&one).equal(&states(&other)), "{} {prompt}", case.name);
        }
        let call = |model: &StableDiffusion| {
            let conditioning = Conditioning::new(case.get("unet.context"));
            model.denoiser().forward(&case.get("unet.sample"), &case.get("unet.timestep"), &conditioning)
        };
        assert!(call(&one).equal(&call(&other)), "{}", case.name);
        let image = case.get("vae.image");
        assert!(one.vae.encode(&image).0.equal(&other.vae.encode(&image).0));
        let latents = case.get("vae.mean");
        assert!(one.vae.decode(&latents).equal(&other.vae.decode(&latents)));
    }
}

#[test]
fn folder_to_file_to_folder_is_the_same_model() {
    for case in cases() {
        let dir = tempfile::tempdir().unwrap();
        let path = checkpoint(&case, dir.path());
        let folder = dir.path().join(&case.name);
        assert!(write_folder(&open(&path), &Replaced::new(), None, &folder).unwrap().is_empty());
        assert_same(&folder, &case.pipeline());
        load(&folder);
        for name in TEXT_FILES {
            assert_eq!(fs::read(folder.join(name)).ok(), fs::read(case.pipeline().join(name)).ok(), "{name}");
        }
        let index: Value =
            serde_json::from_slice(&fs::read(folder.join("model_index.json")).unwrap()).unwrap();
        let before = fs::read(case.pipeline().join("model_index.json")).unwrap();
        let before: Value = serde_json::from_slice(&before).unwrap();
        for part in ["scheduler", "text_encoder", "tokenizer", "unet", "vae", "_class_name"] {
            assert_eq!(index[part], before[part], "{part}");
        }
        let again = dir.path().join(format!("{} again.safetensors", case.name));
        write_checkpoint(&open(&folder), &Replaced::new(), None, &again).unwrap();
        let (a, b) = (TensorFile::open(&path).unwrap(), TensorFile::open(&again).unwrap());
        assert_eq!(a.names(), b.names());
        // A checkpoint rewritten from a checkpoint loses nothing either.
        let third = dir.path().join(format!("{} third.safetensors", case.name));
        write_checkpoint(&open(&again), &Replaced::new(), None, &third).unwrap();
        assert_same(&third, &case.pipeline());
    }
}

#[test]
fn keys_and_shapes_are_those_of_published_checkpoints() {
    for case in cases() {
        let dir = tempfile::tempdir().unwrap();
        let file = TensorFile::open(&checkpoint(&case, dir.path())).unwrap();
        let mut model = load(&case.pipeline());
        let [unet, text] = [Part::UNet, Part::TextEncoder].map(|part| model.source.names(part).unwrap());
        for (names, network) in [
            (unet, &mut model.unet as &mut dyn Layers),
            (text, &mut model.texts[0].encoder as &mut dyn Layers),
        ] {
            for layer in network.layers_mut() {
                match names.layer(&layer.name) {
                    Some(name) => {
                        assert!(file.shape(&format!("{}{name}.weight", names.prefix())).is_some(), "{name}")
                    }
                    None => assert!(case.name.starts_with("sd21") && layer.name.contains("self_attn")),
                }
            }
        }
        let c = file.shape("first_stage_model.encoder.mid.attn_1.q.bias").unwrap()[0];
        assert_eq!(file.shape("first_stage_model.encoder.mid.attn_1.q.weight").unwrap(), [c, c, 1, 1]);
        let projection = file.shape("model.diffusion_model.middle_block.1.proj_in.weight").unwrap();
        if case.name.starts_with("sd21") {
            assert_eq!(projection.len(), 2);
            let q = "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight";
            let width = file.shape("cond_stage_model.model.positional_embedding").unwrap()[1];
            assert_eq!(file.shape(q).unwrap(), [3 * width, width]);
            assert_eq!(file.text("modelspec.prediction_type"), Some("v"));
        } else {
            assert_eq!(projection.len(), 4);
            let q = "cond_stage_model.transformer.text_model.encoder.layers.1.self_attn.q_proj.weight";
            assert!(file.shape(q).is_some());
            assert_eq!(file.text("modelspec.prediction_type"), Some("epsilon"));
        }
    }
}

#[test]
fn replaced_tensors_and_number_formats_are_written() {
    for case in cases() {
        let dir = tempfile::tempdir().unwrap();
        let source = open(&case.pipeline());
        let names = [
            (Part::UNet, "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"),
            (Part::UNet, "mid_block.attentions.0.proj_in.weight"),
            (Part::TextEncoder, "encoder.layers.1.self_attn.k_proj.weight"),
            (Part::Vae, "decoder.mid_block.attentions.0.to_v.weight"),
        ];
        let before = weights(&case.pipeline());
        let new =
            |(part, name): (Part, &str)| before[&(part, name.to_string())].to_kind(Kind::Double) * 2 + 1;
        let replaced: Replaced =
            names.iter().map(|&(part, name)| ((part, name.to_string()), new((part, name)))).collect();
        let (file, folder) = (dir.path().join("m.safetensors"), dir.path().join("m"));
        write_checkpoint(&source, &replaced, Some(Kind::Half), &file).unwrap();
        write_folder(&source, &replaced, Some(Kind::Half), &folder).unwrap();
        for path in [&file, &folder] {
            for ((part, name), tensor) in weights(path) {
                let key = (part, name);
                let expected = replaced.get(&key).unwrap_or(&before[&key]).to_kind(Kind::Half);
                assert!(tensor.reshape(expected.size()).equal(&expected), "{key:?}");
            }
        }
        let config = fs::read_to_string(folder.join("text_encoder/config.json")).unwrap();
        assert!(config.contains("\"dtype\": \"float16\""), "{config}");

        let odd: Replaced = [
            ((Part::UNet, "nothing.weight".to_string()), Tensor::zeros([1], (Kind::Float, Device::Cpu))),
            ((Part::UNet, "conv_in.bias".to_string()), Tensor::zeros([3], (Kind::Float, Device::Cpu))),
        ]
        .into();
        let words = ["no tensor `nothing.weight`", "`conv_in.bias`: expected shape"];
        refused(
            write_checkpoint(&source, &odd, None, &dir.path().join("x.safetensors")).unwrap_err(),
            &words,
        );
        let large = Tensor::full([1], 1e6, (Kind::Float, Device::Cpu));
        let shape = before[&(Part::UNet, "conv_out.bias".to_string())].size();
        let large: Replaced =
            [((Part::UNet, "conv_out.bias".to_string()), large.expand(shape, false))].into();
        let x = dir.path().join("x");
        refused(write_folder(&source, &large, Some(Kind::Half), &x).unwrap_err(), &["f16 cannot hold"]);
        assert!(!x.exists(), "nothing is left of a write that failed");
        fs::remove_file(&file).unwrap();
        fs::remove_dir_all(&folder).unwrap();
    }
}

#[test]
fn nothing_is_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let (file, folder) = (dir.path().join("a.safetensors"), dir.path().join("a"));
    fs::write(&file, "mine").unwrap();
    fs::create_dir(&folder).unwrap();
    let source = open(&cases()[0].pipeline());
    refused(write_checkpoint(&source, &Replaced::new(), None, &file).unwrap_err(), &["there already"]);
    refused(write_folder(&source, &Replaced::new(), None, &folder).unwrap_err(), &["there already"]);
    assert_eq!(fs::read(&file).unwrap(), b"mine");
    assert!(fs::read_dir(&folder).unwrap().next().is_none());
}

#[test]
fn a_streamed_file_has_the_bytes_of_one_written_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    let tensors: Vec<(String, Tensor)> = vec![
        ("b".into(), random::normal(1, &[3, 5]).tr()),
        ("a".into(), random::normal(2, &[2]).to_kind(Kind::Half)),
        ("z".into(), Tensor::from_slice(&[1i64, 2, 3])),
        ("empty".into(), Tensor::zeros([0, 4], (Kind::Float, Device::Cpu))),
        ("c".into(), random::normal(3, &[1]).to_kind(Kind::BFloat16)),
    ];
    let text = [("x", "y".to_string()), ("a", "\"quoted\"".to_string())];
    let plan: Vec<PlannedTensor> = tensors
        .iter()
        .map(|(name, t)| PlannedTensor { name: name.clone(), kind: t.kind(), shape: t.size() })
        .collect();
    let find = |name: &str| tensors.iter().find(|(n, _)| n == name).unwrap().1.shallow_clone();
    tensor_file::write_stream(&path, plan.clone(), &text, |name| Ok(find(name))).unwrap();
    assert_eq!(fs::read(&path).unwrap(), tensor_file::to_bytes(&tensors, &text).unwrap());
    let file = TensorFile::open(&path).unwrap();
    assert!(file.read("b").unwrap().equal(&tensors[0].1));
    assert!(file.read_rows("b", 2, 5).unwrap().equal(&tensors[0].1.narrow(0, 2, 1)));
    assert!(file.read_rows("b", 0, 3).is_err(), "five rows have no third");

    let lies = tensor_file::write_stream(&path, plan, &text, |name| Ok(find(name).to_kind(Kind::Double)));
    refused(lies.unwrap_err(), &["planned"]);
    assert!(file.read("b").unwrap().equal(&tensors[0].1), "the file is as it was");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

/// Folders have 23 blocks of OpenCLIP's tower, checkpoints 24.
#[test]
fn the_last_block_of_the_second_generation_is_filled_in() {
    let dir = tempfile::tempdir().unwrap();
    let all = cases();
    let case = all.iter().find(|case| case.name.starts_with("sd21")).unwrap();
    let model = dir.path().join("model");
    write_folder(&open(&case.pipeline()), &Replaced::new(), None, &model).unwrap();
    let config = model.join("text_encoder/config.json");
    let text = fs::read_to_string(&config).unwrap();
    let text = text.replace("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 23");
    fs::write(&config, text).unwrap();
    let weights = model.join("text_encoder/model.safetensors");
    let file = TensorFile::open(&weights).unwrap();
    let mut tensors = Vec::new();
    for name in file.names() {
        let tensor = file.read(&name).unwrap();
        if name.contains(".layers.1.") {
            let each = (2..23).map(|i| (name.replace(".1.", &format!(".{i}.")), &tensor * f64::from(i)));
            tensors.extend(each);
        }
        tensors.push((name, tensor));
    }
    tensor_file::write(&weights, &tensors, &[]).unwrap();
    let path = dir.path().join("a.safetensors");
    write_checkpoint(&open(&model), &Replaced::new(), None, &path).unwrap();
    let file = TensorFile::open(&path).unwrap();
    let block = |i: i64| {
        file.read(&format!("cond_stage_model.model.transformer.resblocks.{i}.attn.in_proj_weight")).unwrap()
    };
    assert!(block(23).equal(&block(22)) && !block(22).equal(&block(21)));
    let loaded = load(&path);
    let states = |model: &StableDiffusion| model.encode_prompts(&["a red apple"]).unwrap().0.states().copy();
    assert!(states(&loaded).equal(&states(&load(&model))), "the last block is not computed");
}
