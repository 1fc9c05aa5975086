//! Base models as users have them: checkpoints that mark what they predict, that lack a VAE or have only an averaged UNet, models of
//! other families. All through the real binary.

use crate::support::base::root;
use crate::support::error::relative_error;
use crate::support::finished::Finished;
use crate::support::records::records;
use crate::support::scratch::Scratch;
use crate::support::training::tiny_sd;
use hra::convert::single_file::{Replaced, write_checkpoint};
use hra::data::image::load_rgb;
use hra::weights::source::Source;
use hra::weights::tensor_file::{self, TensorFile};
use std::fs;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

pub(super) type Named = Vec<(String, Tensor)>;

/// The empty tensors by which checkpoints are marked.
fn markers() -> Named {
    ["v_pred", "ztsnr"].map(|name| (name.to_string(), Tensor::zeros([0], (Kind::Float, Device::Cpu)))).into()
}

/// The tensors of the embedded model as a checkpoint has them.
fn checkpoint_tensors(scratch: &Scratch) -> Named {
    let whole = scratch.path("whole.safetensors");
    if !whole.exists() {
        write_checkpoint(&Source::open(&tiny_sd(), None).unwrap(), &Replaced::new(), None, &whole).unwrap();
    }
    let file = TensorFile::open(&whole).unwrap();
    file.names().into_iter().map(|name| (name.clone(), file.read(&name).unwrap())).collect()
}

/// A checkpoint without settings, and with these metadata.
pub(super) fn write(
    scratch: &Scratch,
    name: &str,
    tensors: &[(String, Tensor)],
    text: &[(&str, &str)],
) -> PathBuf {
    let path = scratch.path(name);
    let text: Vec<(&str, String)> = text.iter().map(|(key, value)| (*key, value.to_string())).collect();
    tensor_file::write(&path, tensors, &text).unwrap();
    path
}

/// Tensors of one number, with these names.
pub(super) fn named(keys: &[&str]) -> Named {
    keys.iter().map(|key| (key.to_string(), Tensor::from(1f32).reshape([1]))).collect()
}

/// The embedded model as a folder whose scheduler's config has these values too.
fn folder(scratch: &Scratch, name: &str, scheduler: &[(&str, serde_json::Value)]) -> PathBuf {
    let dir = scratch.path(name);
    for part in ["unet", "vae", "text_encoder", "tokenizer"] {
        fs::create_dir_all(&dir).unwrap();
        std::os::unix::fs::symlink(tiny_sd().join(part), dir.join(part)).unwrap();
    }
    fs::copy(tiny_sd().join("model_index.json"), dir.join("model_index.json")).unwrap();
    let text = fs::read_to_string(tiny_sd().join("scheduler/scheduler_config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
    scheduler.iter().for_each(|(key, value)| config[*key] = value.clone());
    fs::create_dir_all(dir.join("scheduler")).unwrap();
    fs::write(dir.join("scheduler/scheduler_config.json"), config.to_string()).unwrap();
    dir
}

pub(super) fn word(path: &Path) -> &str {
    path.to_str().unwrap()
}

pub(super) fn sample_flags<'a>(model: &'a Path, out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let own = ["sample", "--model", word(model), "--prompt", "a cat face", "--steps", "4", "--output", out];
    [&own[..], more].concat()
}

/// Draws; gives what was told.
fn picture(scratch: &Scratch, out: &str, model: &Path, more: &[&str]) -> String {
    scratch.ok(&sample_flags(model, out, more)).err
}

/// Draws; gives the latents and what was told.
fn draw(scratch: &Scratch, out: &str, model: &Path, more: &[&str]) -> (Tensor, String) {
    let file = format!("{out}.safetensors");
    let told = picture(scratch, out, model, &[more, &["--save-latents", &file]].concat());
    (TensorFile::open(&scratch.path(&file)).unwrap().read("latents").unwrap(), told)
}

fn pixels(scratch: &Scratch, out: &str) -> Vec<u8> {
    load_rgb(&scratch.path(out).join("0000-0000.png")).unwrap().into_raw()
}

fn refused(done: &Finished, words: &[&str]) {
    assert_eq!(done.code, 2, "{}{}", done.out, done.err);
    words.iter().for_each(|word| assert!(done.err.contains(word), "expected `{word}` in: {}", done.err));
}

fn told(text: &str, words: &[&str]) {
    words.iter().for_each(|word| assert!(text.contains(word), "expected `{word}` in: {text}"));
}

fn train_flags(scratch: &Scratch, out: &str, model: &Path, more: &[&str]) -> Vec<String> {
    let own = ["--max_train_steps", "1", "--pretrained_model_name_or_path", word(model)];
    scratch.train_flags(out, &[&own[..], more].concat())
}

pub(super) fn train(scratch: &Scratch, out: &str, model: &Path, more: &[&str]) -> Finished {
    let flags = train_flags(scratch, out, model, more);
    scratch.run(&flags.iter().map(String::as_str).collect::<Vec<_>>())
}

#[test]
fn a_checkpoint_marked_v_pred_and_ztsnr_predicts_velocity_with_zero_terminal_snr() {
    let scratch = Scratch::new();
    let mut tensors = checkpoint_tensors(&scratch);
    let plain = write(&scratch, "plain.safetensors", &tensors, &[]);
    tensors.extend(markers());
    let marked = write(&scratch, "marked.safetensors", &tensors, &[]);
    let config = tiny_sd();
    let config = ["--config", word(&config)];
    let velocity = ("prediction_type", "v_prediction".into());
    let expected = folder(
        &scratch,
        "expected",
        &[velocity, ("rescale_betas_zero_snr", true.into()), ("timestep_spacing", "trailing".into())],
    );
    let (of_folder, _) = draw(&scratch, "a", &expected, &[]);
    let (of_marked, note) = draw(&scratch, "b", &marked, &config);
    assert!(relative_error(&of_marked, &of_folder) < 1e-6, "{note}");
    told(&note, &["predicts `v_prediction` (tensor `v_pred`)", "zero terminal SNR (tensor `ztsnr`)"]);
    let (of_plain, note) = draw(&scratch, "c", &plain, &config);
    assert!(relative_error(&of_plain, &of_folder) > 0.1 && !note.contains("note:"), "{note}");

    // The flag has the last word, and what it sets aside is told.
    let (overruled, note) =
        draw(&scratch, "d", &marked, &[&config[..], &["--prediction", "epsilon"]].concat());
    assert!(relative_error(&overruled, &of_plain) < 1e-6, "{note}");
    told(&note, &["--prediction epsilon is followed", "marked as one of zero terminal SNR"]);

    // Training learns to answer what drawing asks for.
    let done = train(&scratch, "run", &marked, &["--model_config", config[1]]);
    assert_eq!(done.code, 0, "{}", done.err);
    told(&done.err, &["tensor `v_pred`"]);
    assert_eq!(train(&scratch, "same", &expected, &[]).code, 0);
    assert_eq!(records(&scratch.path("run")), records(&scratch.path("same")));
    assert_eq!(train(&scratch, "other", &plain, &["--model_config", config[1]]).code, 0);
    assert_ne!(records(&scratch.path("run")), records(&scratch.path("other")));

    // What is written from it says the same, to us and to others.
    let export = ["export", "--model", word(&marked), "--adapter", "run=0", "--to"];
    scratch.ok(&[&export[..], &["checkpoint", "--output", "out.safetensors"], &config].concat());
    let written = TensorFile::open(&scratch.path("out.safetensors")).unwrap();
    assert_eq!([written.shape("v_pred"), written.shape("ztsnr")], [Some(vec![0]), Some(vec![0])]);
    let (again, _) = draw(&scratch, "e", &scratch.path("out.safetensors"), &[]);
    assert!(relative_error(&again, &of_folder) < 1e-5);
    scratch.ok(&[&export[..], &["merged", "--output", "merged"], &config].concat());
    let (again, _) = draw(&scratch, "f", &scratch.path("merged"), &[]);
    assert!(relative_error(&again, &of_folder) < 1e-5);
    let report = scratch.ok(&[&["inspect", word(&marked)][..], &config].concat()).out;
    told(&report, &["scheduler prediction_type: v_prediction", "rescale_betas_zero_snr: true"]);
}

#[test]
fn zero_terminal_snr_is_drawn_by_a_sampler_that_knows_it() {
    let scratch = Scratch::new();
    let mut tensors = checkpoint_tensors(&scratch);
    tensors.extend(markers());
    let marked = write(&scratch, "marked.safetensors", &tensors, &[]);
    // As the folders of Stable Diffusion 1.5 name it.
    let pndm = folder(&scratch, "pndm", &[("_class_name", "PNDMScheduler".into())]);
    let config = ["--config", word(&pndm)];
    let (own, note) = draw(&scratch, "a", &marked, &config);
    told(&note, &["the scheduler is DDIMScheduler unless another is asked for"]);
    let (ddim, _) = draw(&scratch, "b", &marked, &[&config[..], &["--scheduler", "ddim"]].concat());
    assert!(relative_error(&own, &ddim) < 1e-6);
    let (_, note) = draw(&scratch, "c", &marked, &[&config[..], &["--scheduler", "pndm"]].concat());
    told(&note, &["scheduler pndm knows nothing"]);
}

#[test]
fn a_checkpoint_whose_metadata_say_its_prediction_is_followed() {
    let scratch = Scratch::new();
    let tensors = checkpoint_tensors(&scratch);
    let velocity = folder(&scratch, "velocity", &[("prediction_type", "v_prediction".into())]);
    let (expected, _) = draw(&scratch, "a", &velocity, &[]);
    let (noise, _) = draw(&scratch, "b", &tiny_sd(), &[]);
    let key = "modelspec.prediction_type";
    let (v, epsilon) = (
        write(&scratch, "v.safetensors", &tensors, &[(key, "v")]),
        write(&scratch, "epsilon.safetensors", &tensors, &[(key, "epsilon")]),
    );
    let (config, of_velocity) = (tiny_sd(), ["--config", word(&velocity)]);
    let of_noise = ["--config", word(&config)];
    let (found, note) = draw(&scratch, "c", &v, &of_noise);
    assert!(relative_error(&found, &expected) < 1e-6);
    told(&note, &["predicts `v_prediction` (modelspec.prediction_type = v), which is followed"]);
    let (found, note) = draw(&scratch, "d", &epsilon, &of_velocity);
    assert!(relative_error(&found, &noise) < 1e-6);
    told(&note, &["predicts `epsilon`", "--prediction says otherwise"]);
    let (found, note) = draw(&scratch, "e", &epsilon, &[&of_velocity[..], &["--prediction", "v"]].concat());
    assert!(relative_error(&found, &expected) < 1e-6, "{note}");
    // What nobody knows is not passed over in silence.
    let flow = write(&scratch, "flow.safetensors", &tensors, &[(key, "rectified_flow")]);
    told(&draw(&scratch, "f", &flow, &of_noise).1, &["`rectified_flow`, which is not known: not followed"]);
}

#[test]
fn a_folder_with_a_wrong_prediction_is_corrected_by_the_flag() {
    let scratch = Scratch::new();
    let velocity = folder(&scratch, "velocity", &[("prediction_type", "v_prediction".into())]);
    let (expected, _) = draw(&scratch, "a", &tiny_sd(), &[]);
    let (found, note) = draw(&scratch, "b", &velocity, &["--prediction_type", "epsilon"]);
    assert!(relative_error(&found, &expected) < 1e-6);
    told(&note, &["scheduler_config.json says v_prediction; --prediction epsilon is followed"]);
    assert_eq!(train(&scratch, "run", &velocity, &["--prediction", "epsilon"]).code, 0);
    assert_eq!(train(&scratch, "same", &tiny_sd(), &[]).code, 0);
    assert_eq!(records(&scratch.path("run")), records(&scratch.path("same")));
    let config = fs::read_to_string(scratch.path("run/config.toml")).unwrap();
    told(&config, &["prediction = \"epsilon\""]);
}

/// What makes a checkpoint one of 2.x: the width of the text states, and OpenCLIP's tower.
fn second_generation(scratch: &Scratch, name: &str, text: &[(&str, &str)]) -> PathBuf {
    let mut tensors = named(&["first_stage_model.x", "cond_stage_model.model.x"]);
    let key = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight";
    tensors.push((key.into(), Tensor::zeros([1, 1024], (Kind::Float, Device::Cpu))));
    write(scratch, name, &tensors, text)
}

#[test]
fn a_checkpoint_of_2_x_without_settings_is_told_whose_fit_it() {
    let scratch = Scratch::new();
    let (base, large) = ("stable-diffusion-2-1-base", "of stabilityai/stable-diffusion-2-1\n");
    for (name, text, flags, expected) in [
        ("v2-1_512-ema-pruned.safetensors", &[][..], &[][..], base),
        ("v2-1_768-ema-pruned.safetensors", &[], &[], large),
        ("mine.safetensors", &[("modelspec.architecture", "stable-diffusion-v2-512")], &[], base),
        ("mine.safetensors", &[("modelspec.architecture", "stable-diffusion-v2-768-v")], &[], large),
        ("mine.safetensors", &[("modelspec.prediction_type", "epsilon")], &[], base),
        // Metadata know better than a name, and the user best.
        ("my-768.safetensors", &[("modelspec.prediction_type", "epsilon")], &[], base),
        ("my-768.safetensors", &[], &["--prediction", "epsilon"], base),
        ("mine.safetensors", &[], &["--prediction", "v"], large),
    ] {
        let path = second_generation(&scratch, name, text);
        let done = scratch.run(&sample_flags(&path, "out", flags));
        refused(&done, &["no tokenizer/, no scheduler/", "hint: give --config DIR", expected]);
        assert!(!done.err.contains("does not tell"), "{name} {text:?}: {}", done.err);
    }
    let path = second_generation(&scratch, "mine.safetensors", &[]);
    let open = ["--prediction epsilon (512)", "--prediction v_prediction (768)", "the file does not tell"];
    refused(&scratch.run(&sample_flags(&path, "out", &[])), &open);
    refused(&train(&scratch, "run", &path, &[]), &open);
    told(&scratch.ok(&["inspect", word(&path)]).out, &["cannot be used"]);
}

#[test]
fn zero_terminal_snr_with_noise_prediction_is_refused_everywhere() {
    let scratch = Scratch::new();
    let zero = ("rescale_betas_zero_snr", true.into());
    let model = folder(&scratch, "zero", std::slice::from_ref(&zero));
    let reason = ["zero terminal SNR", "predicts the noise (epsilon)", "--prediction v_prediction"];
    for scheduler in ["ddim", "pndm", "euler", "euler-a", "dpm++2m", "dpm++2m-karras", "heun", "unipc"] {
        refused(&scratch.run(&sample_flags(&model, "out", &["--scheduler", scheduler])), &reason);
    }
    refused(&scratch.run(&sample_flags(&model, "out", &["--timestep-spacing", "trailing"])), &reason);
    refused(&train(&scratch, "run", &model, &[]), &reason);
    assert!(!scratch.path("run").exists() && !scratch.path("out").exists());
    let comparison = fs::read_to_string(root().join("configs/compare-quick.toml")).unwrap();
    let comparison = comparison
        .replace("assets/tiny-sd", word(&model))
        .replace("assets/", &format!("{}/assets/", root().display()));
    fs::write(scratch.path("compare.toml"), comparison).unwrap();
    refused(&scratch.run(&["compare", "compare.toml", "--output", "compared"]), &reason);
    told(&scratch.ok(&["inspect", word(&model)]).out, &["cannot be used so", "zero terminal SNR"]);
    picture(&scratch, "drawn", &model, &["--prediction", "v_prediction"]);
    // A table of its own that ends in pure noise is the same.
    let betas: Vec<f64> = (0..1000).map(|i| if i == 999 { 1.0 } else { 0.001 }).collect();
    let table = folder(&scratch, "table", &[("trained_betas", betas.into())]);
    refused(&scratch.run(&sample_flags(&table, "out", &[])), &reason[..2]);
}

/// The VAE's tensors of a checkpoint with `prefix` in place of `first_stage_model.`.
fn vae_tensors(tensors: &Named, prefix: &str) -> Named {
    let of_vae = tensors.iter().filter_map(|(name, tensor)| {
        Some((format!("{prefix}{}", name.strip_prefix("first_stage_model.")?), tensor.shallow_clone()))
    });
    of_vae.collect()
}

#[test]
fn a_checkpoint_without_a_vae_takes_one_that_is_given() {
    let scratch = Scratch::new();
    let tensors = checkpoint_tensors(&scratch);
    let rest: Named = tensors
        .iter()
        .filter(|(name, _)| !name.starts_with("first_stage_model."))
        .map(|(name, tensor)| (name.clone(), tensor.shallow_clone()))
        .collect();
    let without = write(&scratch, "without.safetensors", &rest, &[]);
    let settings = tiny_sd();
    let config = ["--config", word(&settings)];
    let hint = ["it has no VAE", "--vae FILE|DIR"];
    refused(&scratch.run(&sample_flags(&without, "out", &config)), &hint);
    refused(&train(&scratch, "run", &without, &["--model_config", config[1]]), &hint);
    told(&scratch.ok(&["inspect", word(&without)]).out, &["cannot be used", "--vae FILE|DIR"]);

    picture(&scratch, "whole", &tiny_sd(), &[]);
    let dir = tiny_sd().join("vae");
    let model_dir = tiny_sd();
    let today = dir.join("diffusion_pytorch_model.safetensors");
    let ldm = write(&scratch, "vae-ldm.safetensors", &vae_tensors(&tensors, "first_stage_model."), &[]);
    let bare = write(&scratch, "vae-bare.safetensors", &vae_tensors(&tensors, ""), &[]);
    let copied = scratch.path("vae-today.safetensors");
    fs::copy(&today, &copied).unwrap();
    for (i, vae) in [&dir, &model_dir, &today, &copied, &ldm, &bare].into_iter().enumerate() {
        let (out, flag) = (format!("out{i}"), ["--vae", "--pretrained_vae_model_name_or_path"][i % 2]);
        let note = picture(&scratch, &out, &without, &[&config[..], &[flag, word(vae)]].concat());
        assert!(pixels(&scratch, &out) == pixels(&scratch, "whole"), "{}: {note}", vae.display());
        told(&note, &["the VAE is that of", word(vae)]);
    }
    let done = train(&scratch, "run", &without, &["--model_config", config[1], "--vae", word(&bare)]);
    assert_eq!(done.code, 0, "{}", done.err);
    told(&done.out, &[&format!("--vae {}", word(&bare))]);
    assert_eq!(train(&scratch, "same", &tiny_sd(), &[]).code, 0);
    assert_eq!(records(&scratch.path("run")), records(&scratch.path("same")));
    let export = ["export", "--model", word(&without), "--adapter", "run=0", "--vae", word(&bare), "--to"];
    scratch.ok(&[&export[..], &["checkpoint", "--output", "out.safetensors"], &config].concat());
    picture(&scratch, "again", &scratch.path("out.safetensors"), &[]);
    assert!(pixels(&scratch, "again") == pixels(&scratch, "whole"));
    told(&scratch.ok(&["inspect", word(&bare)]).out, &["VAE file (--vae takes it)"]);
}

#[test]
fn an_adapter_fits_the_model_with_another_vae_too() {
    let scratch = Scratch::new();
    assert_eq!(train(&scratch, "run", &tiny_sd(), &[]).code, 0);
    let dimmed: Named = vae_tensors(&checkpoint_tensors(&scratch), "")
        .into_iter()
        .map(
            |(name, tensor)| {
                if name.starts_with("decoder.conv_out") { (name, tensor * 0.5) } else { (name, tensor) }
            },
        )
        .collect();
    let vae = write(&scratch, "dimmed.safetensors", &dimmed, &[]);
    let note = picture(&scratch, "out", &tiny_sd(), &["--adapter", "run", "--vae", word(&vae)]);
    assert!(!note.contains("warning:"), "{note}");
    picture(&scratch, "own", &tiny_sd(), &["--adapter", "run"]);
    assert!(pixels(&scratch, "out") != pixels(&scratch, "own"), "the other VAE is used");
}

#[test]
fn a_vae_that_is_none_for_the_model_is_refused() {
    let scratch = Scratch::new();
    let vae = scratch.path("xl");
    fs::create_dir_all(&vae).unwrap();
    let config = fs::read_to_string(tiny_sd().join("vae/config.json")).unwrap();
    fs::write(vae.join("config.json"), config.replace("0.5717124012524964", "0.13025")).unwrap();
    fs::copy(
        tiny_sd().join("vae/diffusion_pytorch_model.safetensors"),
        vae.join("diffusion_pytorch_model.safetensors"),
    )
    .unwrap();
    let with = |vae: &Path| scratch.run(&sample_flags(&tiny_sd(), "out", &["--vae", word(vae)]));
    refused(&with(&vae), &["expected a VAE whose latents are scaled by 0.571", "found one with 0.13025"]);
    refused(&with(&tiny_sd().join("unet")), &["expected a VAE (AutoencoderKL), found UNet2DConditionModel"]);
    refused(
        &with(&tiny_sd().join("text_encoder/model.safetensors")),
        &["expected a VAE, encoder and decoder"],
    );
    refused(&with(&scratch.path("nowhere.safetensors")), &["expected a VAE, found nothing there"]);
    let pickle = scratch.path("vae-ft-mse.pt");
    fs::write(&pickle, b"PK\x03\x04").unwrap();
    refused(&with(&pickle), &["PyTorch's pickle format", "weights_only=True", "vae-ft-mse.safetensors"]);
}

/// `LitEma` of latent-diffusion leaves the dots out.
fn averaged(tensors: &Named) -> Named {
    let flat = |name: &str| {
        let inner = name.strip_prefix("model.").filter(|inner| inner.starts_with("diffusion_model."))?;
        Some(format!("model_ema.{}", inner.replace('.', "")))
    };
    let unet = tensors.iter().filter_map(|(name, tensor)| Some((flat(name)?, tensor.shallow_clone())));
    unet.chain(named(&["model_ema.decay", "model_ema.num_updates"])).collect()
}

#[test]
fn a_checkpoint_with_only_an_averaged_unet_is_drawn_with_it() {
    let scratch = Scratch::new();
    let tensors = checkpoint_tensors(&scratch);
    let is_unet = |name: &str| name.starts_with("model.diffusion_model.");
    let mut only: Named = averaged(&tensors);
    let others = tensors.iter().filter(|(name, _)| !is_unet(name));
    only.extend(others.map(|(name, tensor)| (name.clone(), tensor.shallow_clone())));
    let only = write(&scratch, "only.safetensors", &only, &[]);
    let settings = tiny_sd();
    let config = ["--config", word(&settings)];
    let (expected, _) = draw(&scratch, "a", &tiny_sd(), &[]);
    let (found, note) = draw(&scratch, "b", &only, &config);
    assert!(relative_error(&found, &expected) < 1e-6);
    told(&note, &["only averaged over its training (EMA, model_ema.*); that one is used"]);
    let report = scratch.ok(&[&["inspect", word(&only)][..], &config].concat()).out;
    told(&report, &[": unet", "that one is used"]);
    assert!(!report.contains("LoRA"), "{report}");

    // Beside the usual ones they are not used, whatever they are.
    let mut both: Named = averaged(&tensors).into_iter().map(|(name, tensor)| (name, tensor * 0.0)).collect();
    both.extend(tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())));
    let both = write(&scratch, "both.safetensors", &both, &[]);
    let (found, note) = draw(&scratch, "c", &both, &config);
    assert!(relative_error(&found, &expected) < 1e-6);
    told(&note, &["the averaged one is not used"]);
    let done = train(&scratch, "run", &only, &["--model_config", config[1]]);
    assert_eq!(done.code, 0, "{}", done.err);
    told(&done.err, &["that one is used"]);
    assert_eq!(train(&scratch, "same", &tiny_sd(), &[]).code, 0);
    assert_eq!(records(&scratch.path("run")), records(&scratch.path("same")));
}

#[test]
fn a_checkpoint_of_another_family_is_named() {
    let scratch = Scratch::new();
    for (family, keys) in [
        ("Flux", &["double_blocks.0.img_attn.norm.key_norm.scale", "single_blocks.0.linear1.weight"][..]),
        ("Flux", &["model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "text_encoders.clip_l.x"]),
        ("Stable Diffusion 3", &["joint_blocks.0.x_block.attn.qkv.weight", "first_stage_model.x"]),
        ("Stable Diffusion 3", &["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"]),
        ("PixArt", &["y_embedder.y_proj.fc1.weight", "blocks.0.scale_shift_table"]),
        ("Stable Cascade", &["clip_txt_mapper.weight", "down_blocks.0.0.channelwise.0.weight"]),
    ] {
        let path = write(&scratch, "other.safetensors", &named(keys), &[]);
        let words = [&format!("checkpoint of another family ({family})"), "not supported"];
        refused(&scratch.run(&sample_flags(&path, "out", &[])), &words);
        refused(&train(&scratch, "run", &path, &[]), &words);
        told(
            &scratch.ok(&["inspect", word(&path)]).out,
            &[&format!("checkpoint of {family}\n"), "not supported"],
        );
    }
}

#[test]
fn a_folder_of_another_family_is_named() {
    let scratch = Scratch::new();
    let make = |name: &str, class: &str, parts: &[&str]| {
        let dir = scratch.path(name);
        parts.iter().for_each(|part| fs::create_dir_all(dir.join(part)).unwrap());
        if !class.is_empty() {
            fs::write(dir.join("model_index.json"), format!("{{\"_class_name\": \"{class}\"}}")).unwrap();
        }
        dir
    };
    let transformer = ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"];
    for (family, dir) in [
        ("Flux", make("c", "FluxPipeline", &transformer)),
        ("Stable Diffusion 3", make("d", "StableDiffusion3Pipeline", &transformer)),
        ("PixArt", make("e", "PixArtSigmaPipeline", &transformer)),
        ("Stable Cascade", make("f", "StableCascadeCombinedPipeline", &["prior_prior"])),
        ("a diffusion transformer", make("g", "", &transformer)),
    ] {
        let words = [&format!("model folder of another family ({family}"), "not supported"];
        refused(&scratch.run(&sample_flags(&dir, "out", &[])), &words);
        refused(&train(&scratch, "run", &dir, &[]), &words);
        told(
            &scratch.ok(&["inspect", word(&dir)]).out,
            &[&format!("model folder of {family}"), "not supported"],
        );
    }
}

#[test]
fn an_adapter_of_another_family_is_named() {
    let scratch = Scratch::new();
    for (family, key, text) in [
        ("Flux", "lora_unet_double_blocks_0_img_attn_qkv", &[][..]),
        ("Flux", "transformer.single_transformer_blocks.0.attn.to_q", &[]),
        ("Stable Diffusion 3", "lora_unet_joint_blocks_0_x_block_attn_qkv", &[]),
    ] {
        let ones = |shape: &[i64]| Tensor::ones(shape, (Kind::Float, Device::Cpu));
        let [down, up] = ["down", "up"].map(|half| format!("{key}.lora_{half}.weight"));
        let path = write(&scratch, "lora.safetensors", &[(down, ones(&[2, 8])), (up, ones(&[8, 2]))], text);
        let words = [&format!("adapter for models of another family ({family})"), "not supported"];
        refused(&scratch.run(&sample_flags(&tiny_sd(), "out", &["--adapter", word(&path)])), &words);
        told(&scratch.ok(&["inspect", word(&path)]).out, &words);
    }
}
