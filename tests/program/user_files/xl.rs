//! Files of Stable Diffusion XL, or of a smaller model beside it, as users have them.

use super::models::{named, sample_flags, train, word, write};
use super::refused;
use crate::support::scratch::Scratch;
use crate::support::training::tiny_sd;
use std::fs;
use tch::{Device, Kind, Tensor};

#[test]
fn what_lacks_a_part_of_stable_diffusion_xl_is_named_so() {
    let scratch = Scratch::new();
    for (keys, missing) in [
        (
            &["conditioner.embedders.1.model.ln_final.bias", "first_stage_model.x"][..],
            "no model.diffusion_model.*, no conditioner.embedders.0.transformer.*",
        ),
        (
            &["conditioner.embedders.0.model.ln_final.bias", "model.diffusion_model.out.0.bias"],
            "no first_stage_model.*",
        ),
        (
            &["model.diffusion_model.label_emb.0.0.bias", "first_stage_model.x"],
            "no conditioner.embedders.0.transformer.*, no conditioner.embedders.1.model.*",
        ),
    ] {
        let path = write(&scratch, "xl.safetensors", &named(keys), &[]);
        let words = ["expected a Stable Diffusion XL checkpoint", missing];
        refused(&scratch.run(&sample_flags(&path, "out", &[])), &words);
        refused(&train(&scratch, "run", &path, &[]), &words);
    }
    let dir = scratch.path("folder");
    for part in ["unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "scheduler"] {
        fs::create_dir_all(dir.join(part)).unwrap();
    }
    let words = ["expected a Stable Diffusion XL folder, found no tokenizer_2/"];
    refused(&scratch.run(&sample_flags(&dir, "out", &[])), &words);
    refused(&train(&scratch, "run", &dir, &[]), &words);
}

#[test]
fn an_adapter_of_stable_diffusion_xl_is_named_by_a_smaller_model() {
    let scratch = Scratch::new();
    for (key, text) in [
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", &[][..]),
        ("lora_unet_mid_block_attentions_0_transformer_blocks_9_attn1_to_q", &[]),
        ("lora_unet_down_blocks_1_attentions_0_proj_in", &[("ss_base_model_version", "sdxl_base_v1-0")]),
    ] {
        let ones = |shape: &[i64]| Tensor::ones(shape, (Kind::Float, Device::Cpu));
        let [down, up] = ["down", "up"].map(|half| format!("{key}.lora_{half}.weight"));
        let path = write(&scratch, "lora.safetensors", &[(down, ones(&[2, 8])), (up, ones(&[8, 2]))], text);
        let words =
            ["adapter for Stable Diffusion 1.x or 2.x, as the model is, found one for Stable Diffusion XL"];
        refused(&scratch.run(&sample_flags(&tiny_sd(), "out", &["--adapter", word(&path)])), &words);
    }
}
