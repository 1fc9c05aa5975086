//! Adapters: folders and files of PEFT, diffusers and kohya's scripts, whole, in halves and broken.

use super::{case, folder, refused, said};
use crate::support::finished::Finished;
use crate::support::scratch::Scratch;
use hra::weights::tensor_file::{self, TensorFile};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use tch::{Kind, Tensor};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

fn sample(scratch: &Scratch, adapters: &[&str], more: &[&str]) -> Finished {
    let model = case("pipeline");
    let mut args = vec!["sample", "--model", model.to_str().unwrap(), "--prompt", "a cat", "--steps", "1"];
    adapters.iter().for_each(|adapter| args.extend(["--adapter", adapter]));
    args.extend(["--overwrite", "--output", "drawn", "--save-latents", "latents.safetensors"]);
    args.extend(more);
    scratch.run(&args)
}

/// What is drawn, to the bit, and what is said.
fn drawn(scratch: &Scratch, adapters: &[&str]) -> (Vec<u8>, String) {
    let done = sample(scratch, adapters, &[]);
    assert_eq!(done.code, 0, "{adapters:?}\n{}", done.err);
    (fs::read(scratch.path("latents.safetensors")).unwrap(), done.err)
}

/// What `hra inspect`, `export` and `merge` make of an adapter that they refuse.
fn refused_by_all(scratch: &Scratch, adapter: &str, words: &[&str]) {
    let model = case("pipeline");
    let model = model.to_str().unwrap();
    refused(&sample(scratch, &[adapter], &[]), words);
    let export =
        ["export", "--model", model, "--adapter", adapter, "--to", "peft-lora", "--output", "exported"];
    refused(&scratch.run(&export), words);
    refused(&scratch.run(&["merge", adapter, "--output", "merged"]), words);
    refused(&scratch.run(&["inspect", adapter]), words);
    assert!(!scratch.path("exported").exists() && !scratch.path("merged").exists());
}

#[test]
fn peft_dreambooth_saved_the_unet_and_the_text_encoder_in_folders_of_their_own() {
    let scratch = Scratch::new();
    let [unet, text] = ["hra-r4", "text-hra-r4"].map(|name| case(name).to_str().unwrap().to_string());
    let both = folder(&scratch, "out", &[("hra-r4", "unet"), ("text-hra-r4", "text_encoder")]);
    let run = folder(&scratch, "run", &[("hra-r4", ""), ("text-hra-r4", "text_encoder")]);
    let by_step = folder(&scratch, "steps", &[("hra-r4", "unet/400"), ("text-hra-r4", "text_encoder/400")]);
    let by_name =
        folder(&scratch, "names", &[("hra-r4", "unet/400/sks"), ("text-hra-r4", "text_encoder/400/sks")]);
    let (whole, told) = drawn(&scratch, &[&unet, &text]);
    assert!(!told.contains("warning"), "{told}");
    for folder in [&both, &run, &by_step, &by_name] {
        let (latents, told) = drawn(&scratch, &[folder]);
        assert!(latents == whole, "{folder}: not both networks");
        assert!(told.contains("and text encoder") && !told.contains("warning"), "{folder}: {told}");
    }
    for half in [&unet, &text] {
        assert!(drawn(&scratch, &[half]).0 != whole, "{half} alone is not the whole");
    }

    let told = scratch.ok(&["inspect", &both]).out;
    said(
        &told,
        &["out/unet: PEFT adapter", "out/text_encoder: PEFT adapter", "attn1.to_q", "self_attn.q_proj"],
    );
    let model = case("pipeline");
    let export =
        ["export", "--model", model.to_str().unwrap(), "--adapter", &both, "--to", "peft", "--output"];
    scratch.ok(&[&export[..], &["exported"]].concat());
    scratch.ok(&["merge", &both, "--output", "merged"]);
    for made in ["exported", "merged"] {
        let made = scratch.path(made);
        assert!(made.join(WEIGHTS).is_file() && made.join("text_encoder").join(WEIGHTS).is_file());
    }
    assert!(drawn(&scratch, &[scratch.path("exported").to_str().unwrap()]).0 == whole);
}

#[test]
fn peft_dreambooth_kept_the_adapter_of_several_steps() {
    let scratch = Scratch::new();
    let parts = [("hra-r4", "unet/200"), ("hra-r3", "unet/400"), ("text-hra-r4", "text_encoder/400")];
    let out = folder(&scratch, "out", &parts);
    refused_by_all(&scratch, &out, &["several", "unet/200/", "unet/400/", "its own --adapter"]);
    let [unet, text] = ["unet/400", "text_encoder/400"].map(|place| format!("{out}/{place}"));
    let [own, own_text] = ["hra-r3", "text-hra-r4"].map(|name| case(name).to_str().unwrap().to_string());
    assert!(drawn(&scratch, &[&unet, &text]).0 == drawn(&scratch, &[&own, &own_text]).0);
}

#[test]
fn the_text_encoder_was_trained_alone() {
    let scratch = Scratch::new();
    let out = folder(&scratch, "out", &[("text-hra-r4", "text_encoder")]);
    let text = case("text-hra-r4");
    assert!(drawn(&scratch, &[&out]).0 == drawn(&scratch, &[text.to_str().unwrap()]).0);
    for adapter in [&out, text.to_str().unwrap()] {
        let _ = fs::remove_dir_all(scratch.path("merged"));
        said(&scratch.ok(&["merge", adapter, "--output", "merged"]).out, &["text encoder: HRA"]);
        let config = fs::read_to_string(scratch.path("merged/text_encoder").join(CONFIG)).unwrap();
        assert!(
            config.contains("CLIPTextModel") && !scratch.path("merged").join(CONFIG).exists(),
            "{config}"
        );
    }
}

#[test]
fn half_of_an_adapter_is_missing() {
    let scratch = Scratch::new();
    let out = folder(&scratch, "out", &[("hra-r4", "unet"), ("text-hra-r4", "text_encoder")]);
    fs::remove_file(scratch.path("out/text_encoder").join(WEIGHTS)).unwrap();
    refused_by_all(&scratch, &out, &["text_encoder/adapter_config.json without adapter_model.safetensors"]);
    fs::remove_file(scratch.path("out/text_encoder").join(CONFIG)).unwrap();
    drawn(&scratch, &[&out]);
    fs::remove_file(scratch.path("out/unet").join(CONFIG)).unwrap();
    refused_by_all(&scratch, &out, &["unet/adapter_model.safetensors without adapter_config.json"]);
    let bare = folder(&scratch, "bare", &[("hra-r4", "")]);
    fs::remove_file(scratch.path("bare").join(CONFIG)).unwrap();
    refused_by_all(
        &scratch,
        &bare,
        &["found adapter_model.safetensors without adapter_config.json", "rank and alpha"],
    );
}

#[test]
fn two_adapters_of_one_network_lie_in_one_folder() {
    let scratch = Scratch::new();
    let out = folder(&scratch, "out", &[("hra-r4", ""), ("hra-r3", "unet")]);
    refused_by_all(&scratch, &out, &["several", "adapter_config.json", "unet"]);
    let xl = folder(&scratch, "xl", &[("hra-r4", "unet"), ("text-hra-r4", "text_encoder_2")]);
    refused(&sample(&scratch, &[&xl], &[]), &["text_encoder_2", "found one for Stable Diffusion XL"]);
}

#[test]
fn an_adapter_lies_below_its_own_name() {
    let scratch = Scratch::new();
    let own = case("lora-r4");
    let (wanted, _) = drawn(&scratch, &[own.to_str().unwrap()]);
    for name in ["default", "sks dog"] {
        let out = folder(&scratch, &format!("out of {name}"), &[("lora-r4", name)]);
        assert!(drawn(&scratch, &[&out]).0 == wanted, "{name}");
        said(&scratch.ok(&["inspect", &out]).out, &["LoRA r 4"]);
    }
    let several = folder(&scratch, "several", &[("lora-r4", "dog"), ("hra-r4", "style")]);
    refused_by_all(&scratch, &several, &["several: dog/, style/"]);
    // PEFT's `save_pretrained` with a second adapter beside the default one.
    let beside = folder(&scratch, "beside", &[("lora-r4", ""), ("hra-r4", "style")]);
    let (latents, told) = drawn(&scratch, &[&beside]);
    assert!(latents == wanted);
    said(&told, &["warning", "not used: style/"]);
    said(&scratch.ok(&["inspect", &beside]).out, &["odd", "not used: style/"]);
    let merged = scratch.ok(&["merge", &beside, "--output", "merged"]);
    said(&merged.err, &["not used: style/"]);
}

#[test]
fn a_folder_holds_a_lora_file() {
    let scratch = Scratch::new();
    let lora = case("../../lora/kohya.safetensors");
    let (wanted, told) = drawn(&scratch, &[lora.to_str().unwrap()]);
    assert!(!told.contains("warning"), "{told}");
    for name in ["pytorch_lora_weights.safetensors", "my dog.safetensors"] {
        let out = scratch.path(&format!("with {name}"));
        fs::create_dir_all(&out).unwrap();
        fs::copy(&lora, out.join(name)).unwrap();
        fs::write(out.join("README.md"), "trained on a dog").unwrap();
        let (latents, told) = drawn(&scratch, &[out.to_str().unwrap()]);
        assert!(latents == wanted && !told.contains("warning"), "{name}: {told}");
        said(&scratch.ok(&["inspect", out.to_str().unwrap()]).out, &["LoRA file", "nothing odd"]);
    }
    // diffusers takes the file of this name, whatever lies beside it.
    let beside = scratch.path("with pytorch_lora_weights.safetensors");
    fs::copy(&lora, beside.join("other.safetensors")).unwrap();
    said(&drawn(&scratch, &[beside.to_str().unwrap()]).1, &["warning", "not used: other.safetensors"]);
    let many = scratch.path("with my dog.safetensors");
    fs::copy(&lora, many.join("my dog-000010.safetensors")).unwrap();
    let words = ["2 LoRA files: my dog-000010.safetensors, my dog.safetensors", "its own --adapter"];
    refused_by_all(&scratch, many.to_str().unwrap(), &words);
}

#[test]
fn a_lora_file_is_given_to_be_merged_as_a_folder() {
    let scratch = Scratch::new();
    let lora = case("../../lora/kohya.safetensors");
    let done = scratch.run(&["merge", lora.to_str().unwrap(), "--output", "merged"]);
    refused(&done, &["LoRA file", "hra export", "peft-lora"]);
}

#[test]
fn a_training_was_cut_before_its_end() {
    let scratch = Scratch::new();
    let out = folder(&scratch, "out", &[("hra-r4", "checkpoint-500"), ("hra-r4", "checkpoint-1000")]);
    refused_by_all(&scratch, &out, &["checkpoint-500", "checkpoint-1000", "give the one you mean"]);
    let run = folder(&scratch, "run", &[("hra-r4", "checkpoints/step-000200")]);
    refused_by_all(&scratch, &run, &["checkpoints/step-000200", "give the one you mean"]);
    drawn(&scratch, &[&format!("{run}/checkpoints/step-000200")]);
}

#[test]
fn a_file_of_the_folder_is_given_in_place_of_the_folder() {
    let scratch = Scratch::new();
    let (wanted, _) = drawn(&scratch, &[case("lora-r4").to_str().unwrap()]);
    for name in [CONFIG, WEIGHTS] {
        let file = case("lora-r4").join(name);
        assert!(
            drawn(&scratch, &[file.to_str().unwrap()]).0 == wanted,
            "{name}: with the alpha of its config"
        );
        said(&scratch.ok(&["inspect", file.to_str().unwrap()]).out, &["PEFT adapter", "nothing odd"]);
    }
}

#[test]
fn a_whole_model_is_given_as_an_adapter() {
    let scratch = Scratch::new();
    let model = folder(&scratch, "model", &[("pipeline", "")]);
    let model = model.as_str();
    let words = ["expected an adapter, found a whole model", "--model"];
    refused(&sample(&scratch, &[model], &[]), &words);
    refused(&scratch.run(&["merge", model, "--output", "merged"]), &words);
    // A checkpoint of diffusers' DreamBooth script, which has no model_index.json.
    fs::remove_file(scratch.path("model/model_index.json")).unwrap();
    refused(&sample(&scratch, &[model], &[]), &["a whole UNet and a whole text encoder", "--model DIR"]);
    fs::remove_dir_all(scratch.path("model/text_encoder")).unwrap();
    said(&drawn(&scratch, &[model]).1, &["full fine-tuning"]);
    said(&drawn(&scratch, &[&format!("{model}/unet")]).1, &["full fine-tuning"]);
}

#[test]
fn a_folder_holds_no_adapter() {
    let scratch = Scratch::new();
    let out = scratch.path("out");
    fs::create_dir_all(out.join("samples")).unwrap();
    refused_by_all(&scratch, out.to_str().unwrap(), &["expected an adapter, found no files", "hint:"]);
    fs::write(out.join("samples/0.png"), "").unwrap();
    fs::write(out.join("metrics.jsonl"), "").unwrap();
    refused_by_all(&scratch, out.to_str().unwrap(), &["found metrics.jsonl, samples/", "hint:"]);
}

/// Changes an adapter's config.
fn change(folder: &Path, change: impl Fn(&mut Value)) {
    let path = folder.join(CONFIG);
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    change(&mut config);
    fs::write(&path, config.to_string()).unwrap();
}

#[test]
fn a_newer_peft_wrote_settings_that_are_not_known_here() {
    let scratch = Scratch::new();
    for method in ["lora-r4", "hra-r4", "oft-b4", "boft-b4", "dora-r2"] {
        let out = folder(&scratch, method, &[(method, "")]);
        let (wanted, before) = drawn(&scratch, &[&out]);
        assert!(!before.contains("PEFT 0.21.2"), "{method}: {before}");
        let neutral = [json!(null), json!(false), json!(0), json!(0.0), json!(""), json!([]), json!({})];
        for value in neutral {
            change(Path::new(&out), |config| config["newer"] = value.clone());
            let (latents, told) = drawn(&scratch, &[&out]);
            assert!(latents == wanted && told == before, "{method}: {told}");
        }
        // A size that only another setting would use, or a name.
        for value in [json!(16), json!("megatron.core")] {
            change(Path::new(&out), |config| config["newer"] = value.clone());
            let (latents, told) = drawn(&scratch, &[&out]);
            assert!(latents == wanted, "{method}");
            said(&told, &["warning", "`newer`", &value.to_string()]);
            said(&scratch.ok(&["inspect", &out]).out, &["odd", "`newer`"]);
        }
        for value in [json!(true), json!(["a"]), json!({"a": 1})] {
            change(Path::new(&out), |config| config["newer"] = value.clone());
            refused(&sample(&scratch, &[&out], &[]), &["newer", &value.to_string(), "null", "0.21.2"]);
        }
    }
}

#[test]
fn the_settings_of_a_lora_file_are_of_a_newer_peft() {
    let scratch = Scratch::new();
    let from = TensorFile::open(&case("../../lora/pipeline.safetensors")).unwrap();
    let tensors: Vec<_> = from.names().into_iter().map(|n| (n.clone(), from.read(&n).unwrap())).collect();
    let text = from.text("lora_adapter_metadata").expect("the fixture has PEFT's settings").to_string();
    let settings: Value = serde_json::from_str(&text).unwrap();
    let path = scratch.path("new.safetensors");
    for (value, code) in [(json!(null), 0), (json!(7), 0), (json!(true), 2)] {
        let mut settings = settings.clone();
        settings["unet.newer"] = value.clone();
        tensor_file::write(&path, &tensors, &[("lora_adapter_metadata", settings.to_string())]).unwrap();
        let done = sample(&scratch, &[path.to_str().unwrap()], &[]);
        assert_eq!(done.code, code, "{}", done.err);
        assert_eq!(done.err.contains("`newer`"), !value.is_null(), "{}", done.err);
    }
}

#[test]
fn target_modules_name_layers_that_the_file_has_no_tensors_of() {
    let scratch = Scratch::new();
    let out = folder(&scratch, "out", &[("lora-r4", "")]);
    change(Path::new(&out), |config| {
        config["target_modules"].as_array_mut().unwrap().extend([json!("conv1"), json!("ff.net.2")]);
    });
    let words = ["target_modules", "conv1, ff.net.2"];
    said(&drawn(&scratch, &[&out]).1, &words);
    said(&scratch.ok(&["inspect", &out]).out, &words);
    said(&scratch.ok(&["merge", &out, "--output", "merged"]).err, &words);
    change(Path::new(&out), |config| config["target_modules"] = json!(".*(to_q|to_k|to_v|to_out\\.0)"));
    assert!(!drawn(&scratch, &[&out]).1.contains("warning"));
    change(Path::new(&out), |config| config["target_modules"] = json!(".*conv1"));
    said(&drawn(&scratch, &[&out]).1, &["target_modules", ".*conv1"]);
}

#[test]
fn an_old_peft_pickled_the_adapter() {
    let scratch = Scratch::new();
    let out = folder(&scratch, "out", &[("lora-r4", "")]);
    fs::rename(scratch.path("out").join(WEIGHTS), scratch.path("out/adapter_model.bin")).unwrap();
    let words = ["adapter_model.bin", "python -c", "weights_only=True", "adapter_model.safetensors"];
    refused_by_all(&scratch, &out, &words);
    refused_by_all(&scratch, &format!("{out}/adapter_model.bin"), &words);
    let old = scratch.path("old");
    fs::create_dir(&old).unwrap();
    fs::write(old.join("pytorch_lora_weights.bin"), b"PK\x03\x04").unwrap();
    let words = ["python -c", "weights_only=True", "pytorch_lora_weights.safetensors"];
    refused_by_all(&scratch, old.to_str().unwrap(), &words);
}

#[test]
fn a_pointer_or_a_web_page_was_saved_in_place_of_the_file() {
    let scratch = Scratch::new();
    let out = folder(&scratch, "out", &[("lora-r4", "")]);
    let lora = scratch.path("lora.safetensors");
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 3000\n";
    let page = "\n<!DOCTYPE html>\n<html><head><title>x</title></head></html>";
    for (text, words) in
        [(pointer, ["git-lfs pointer", "git lfs pull"]), (page, ["web page", "download the file"])]
    {
        fs::write(&lora, text).unwrap();
        refused(&sample(&scratch, &[lora.to_str().unwrap()], &[]), &words);
        refused(&scratch.run(&["inspect", lora.to_str().unwrap()]), &words);
        for name in [CONFIG, WEIGHTS] {
            fs::write(scratch.path("out").join(name), text).unwrap();
            refused(&sample(&scratch, &[&out], &[]), &[&words[..], &[name]].concat());
            fs::copy(case("lora-r4").join(name), scratch.path("out").join(name)).unwrap();
        }
        let model = folder(&scratch, "model", &[("pipeline", "")]);
        for name in
            ["unet/config.json", "tokenizer/tokenizer.json", "vae/diffusion_pytorch_model.safetensors"]
        {
            let path = scratch.path("model").join(name);
            let whole = fs::read(&path).unwrap();
            fs::write(&path, text).unwrap();
            let draw = ["sample", "--model", &model, "--prompt", "x", "--output", "o", "--steps", "1"];
            refused(&scratch.run(&draw), &[&words[..], &[name]].concat());
            fs::write(&path, whole).unwrap();
        }
    }
}

/// `lora-r4-conv` as one file, its matrices in the shapes that `shape` gives: of the key and the usual shape.
fn reshaped(path: &Path, shape: impl Fn(&[i64]) -> Vec<i64>) {
    let from = TensorFile::open(&case("../../lora/kohya.safetensors")).unwrap();
    let tensors: Vec<(String, Tensor)> = from
        .names()
        .into_iter()
        .map(|name| {
            let tensor = from.read(&name).unwrap();
            let shape = if tensor.dim() < 2 { tensor.size() } else { shape(&tensor.size()) };
            (name, tensor.reshape(&shape[..]))
        })
        .collect();
    tensor_file::write(path, &tensors, &[]).unwrap();
}

#[test]
fn a_lora_has_flat_convolutions_or_linear_layers_of_four_dimensions() {
    let scratch = Scratch::new();
    let path = scratch.path("lora.safetensors");
    let file = path.to_str().unwrap();
    reshaped(&path, <[i64]>::to_vec);
    let (wanted, _) = drawn(&scratch, &[file]);
    let inspect = || scratch.ok(&["inspect", file, "--model", case("pipeline").to_str().unwrap()]).out;
    let told = inspect();
    let flat = |shape: &[i64]| vec![shape[0], shape[1..].iter().product()];
    let deep = |shape: &[i64]| if shape.len() == 2 { vec![shape[0], shape[1], 1, 1] } else { shape.to_vec() };
    for shapes in [&flat as &dyn Fn(&[i64]) -> Vec<i64>, &deep] {
        reshaped(&path, shapes);
        assert!(drawn(&scratch, &[file]).0 == wanted, "equal to the bit");
        assert_eq!(inspect(), told);
    }
    // PEFT's folder, and DoRA.
    for method in ["lora-r4-conv", "dora-r2-conv"] {
        let out = folder(&scratch, method, &[(method, "")]);
        let (wanted, _) = drawn(&scratch, &[&out]);
        let from = TensorFile::open(&case(method).join(WEIGHTS)).unwrap();
        for shapes in [&flat as &dyn Fn(&[i64]) -> Vec<i64>, &deep] {
            let halves = |name: &str| name.contains("lora_A") || name.contains("lora_B");
            let tensor = |name: String| {
                let tensor = from.read(&name).unwrap();
                let shape = if halves(&name) { shapes(&tensor.size()) } else { tensor.size() };
                (name, tensor.reshape(&shape[..]))
            };
            let tensors: Vec<_> = from.names().into_iter().map(tensor).collect();
            tensor_file::write(&scratch.path(method).join(WEIGHTS), &tensors, &[]).unwrap();
            assert!(drawn(&scratch, &[&out]).0 == wanted, "{method}: equal to the bit");
        }
    }
    // Other numbers in the same count are not the same mathematics.
    reshaped(&path, |shape| {
        if shape.len() == 4 { vec![shape[0], shape[2], shape[1], shape[3]] } else { shape.to_vec() }
    });
    assert_eq!(sample(&scratch, &[file], &[]).code, 2);
}

#[test]
fn weights_of_the_model_are_not_numbers() {
    let scratch = Scratch::new();
    let model = folder(&scratch, "model", &[("pipeline", "")]);
    let path = scratch.path("model/unet/diffusion_pytorch_model.safetensors");
    let from = TensorFile::open(&path).unwrap();
    let mut tensors: Vec<_> = from.names().into_iter().map(|n| (n.clone(), from.read(&n).unwrap())).collect();
    let broken = tensors.iter_mut().find(|(name, _)| name == "conv_in.weight").unwrap();
    broken.1 = broken.1.full_like(f64::NAN);
    tensor_file::write(&path, &tensors, &[]).unwrap();
    let draw =
        ["sample", "--model", &model, "--prompt", "x", "--output", "o", "--steps", "1", "--device", "cpu"];
    for dtype in ["f32", "bf16"] {
        let done = scratch.run(&[&draw[..], &["--dtype", dtype]].concat());
        refused(&done, &["`conv_in.weight`", "not finite"]);
        assert!(!done.err.contains("--dtype f32"), "no other format helps: {}", done.err);
    }
    said(&scratch.ok(&["inspect", &model]).out, &["`conv_in.weight` holds numbers that are not finite"]);
}

/// A safetensors file of `count` tensors in a format of eight bits.
fn eight_bits(path: &Path, names: impl Iterator<Item = String>) {
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for name in names {
        header.insert(name, json!({"dtype": "F8_E4M3", "shape": [2, 2], "data_offsets": [end, end + 4]}));
        end += 4;
    }
    let header = Value::from(header).to_string().into_bytes();
    let bytes = [&(header.len() as u64).to_le_bytes()[..], &header, &vec![0; end]].concat();
    fs::write(path, bytes).unwrap();
}

#[test]
fn three_hundred_tensors_have_a_number_format_that_is_not_read() {
    let scratch = Scratch::new();
    let lora = scratch.path("lora.safetensors");
    eight_bits(
        &lora,
        (0..150).flat_map(|i| ["down", "up"].map(|half| format!("lora_unet_{i}.lora_{half}.weight"))),
    );
    let out = folder(&scratch, "out", &[("lora-r4", "")]);
    let halves = |i: i32| ["A", "B"].map(|half| format!("base_model.model.l{i}.to_q.lora_{half}.weight"));
    eight_bits(&scratch.path("out").join(WEIGHTS), (0..150).flat_map(halves));
    for adapter in [lora.to_str().unwrap(), &out] {
        let done = sample(&scratch, &[adapter], &[]);
        refused(&done, &["F8_E4M3", "more"]);
        assert!(done.err.lines().count() < 6, "{}", done.err);
    }
    let model = folder(&scratch, "model", &[("pipeline", "")]);
    let path = scratch.path("model/unet/diffusion_pytorch_model.safetensors");
    let from = TensorFile::open(&path).unwrap();
    let tensors: Vec<_> =
        from.names().into_iter().map(|n| (n.clone(), from.read(&n).unwrap().to_kind(Kind::Int64))).collect();
    drop(from);
    tensor_file::write(&path, &tensors, &[]).unwrap();
    let done = scratch.run(&["sample", "--model", &model, "--prompt", "x", "--output", "o"]);
    refused(&done, &["expected floating point, found I64", "more"]);
    assert!(done.err.lines().count() < 8, "{}", done.err);
}

#[test]
fn a_lora_file_and_a_folder_of_the_text_encoder_name_one_layer_twice() {
    let scratch = Scratch::new();
    let out = folder(&scratch, "out", &[("text-lora-r4", "text_encoder")]);
    let lora = case("../../lora/kohya.safetensors");
    fs::copy(lora, scratch.path("out/pytorch_lora_weights.safetensors")).unwrap();
    refused(&sample(&scratch, &[&out], &[]), &["twice", "text_encoder"]);
}
