//! Stable Diffusion 1.5's size: one training step and two sampling steps at 512 px on the CPU, with 2.2 GB of disk and 7 GB of memory.

use super::fill::{
    CLIP_L_VALUES, all_finite, assert_drawn, clip_l, config, measured, text, tokenizer, vae, values, weights,
};
use crate::support::base::root;
use crate::support::records::records;
use crate::support::scratch::Scratch;
use hra::weights::part::Part;
use hra::weights::tensor_file::TensorFile;
use serde_json::json;
use std::path::Path;
use std::time::Instant;
use tch::Kind;

/// Values of the UNet of Stable Diffusion 1.5, as its model card counts them.
const UNET_VALUES: i64 = 859_520_964;
/// Values of an HRA adapter of rank 8 on its attention projections: 8 (6 * (5 * 320 + 5 * 640 + 6 * 1280) + 16 * 2 * 768).
const ADAPTER_VALUES: i64 = 795_648;
/// Attention projections: 16 transformer blocks with 2 attentions of 4.
const ADAPTED_LAYERS: usize = 128;

#[test]
#[ignore = "makes 2 GB of weights and computes for minutes"]
fn a_model_of_full_size_is_trained_and_drawn_with() {
    let scratch = Scratch::new();
    let model = scratch.path("sd15");
    let started = Instant::now();
    make_model(&model);
    println!("made the model in {:.0} s", started.elapsed().as_secs_f64());

    let (model, run, out) = (text(&model), text(&scratch.path("run")), text(&scratch.path("out")));
    let pictures = text(&root().join("assets/subjects/cat/train"));
    let prompt = "a fluent 3d emoji of a sks cat face";
    let (trained, _) = measured(
        &scratch,
        "one training step",
        &[
            "train",
            "--device=cpu",
            "--pretrained_model_name_or_path",
            &model,
            "--instance_data_dir",
            &pictures,
            "--instance_prompt",
            prompt,
            "--output_dir",
            &run,
            "--max_train_steps=1",
        ],
        &[],
    );
    assert!(trained.out.contains(&format!("({ADAPTER_VALUES} values")), "{}", trained.out);
    let config = std::fs::read_to_string(scratch.path("run/config.toml")).unwrap();
    assert!(config.contains("resolution = 512"), "the model's own resolution is taken\n{config}");
    let record = &records(&scratch.path("run"))[0];
    println!("{record}");
    for key in ["loss", "gradient_norm", "weight_change"] {
        assert!(record[key].as_f64().is_some_and(|v| v.is_finite() && v > 0.0), "{key} of {record}");
    }
    assert!(record["orthogonality_error"].as_f64().unwrap() < 1e-5, "{record}");

    let adapter = TensorFile::open(&scratch.path("run/adapter_model.safetensors")).unwrap();
    let names = adapter.names();
    assert_eq!(names.len(), ADAPTED_LAYERS);
    assert_eq!(names.iter().map(|n| values(&adapter.shape(n).unwrap())).sum::<i64>(), ADAPTER_VALUES);
    for name in &names {
        assert!(all_finite(&adapter.read(name).unwrap()), "{name}");
    }

    let latents = text(&scratch.path("latents.safetensors"));
    let (drawn, _) = measured(
        &scratch,
        "two sampling steps with guidance",
        &[
            "sample",
            "--device=cpu",
            "--model",
            &model,
            "--adapter",
            &run,
            "--prompt",
            prompt,
            "--steps=2",
            "--save-latents",
            &latents,
            "--output",
            &out,
        ],
        &[],
    );
    assert!(drawn.err.contains(&format!("{ADAPTED_LAYERS} layers matched")), "{}", drawn.err);
    assert_drawn(Path::new(&latents), Path::new(&out), 512);
}

/// Writes a model folder of Stable Diffusion 1.5's shape, with the embedded model's tokenizer.
fn make_model(dir: &Path) {
    config(
        dir,
        "unet",
        "config.json",
        json!({
            "_class_name": "UNet2DConditionModel",
            "sample_size": 64,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": [320, 640, 1280, 1280],
            "down_block_types":
                ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
            "layers_per_block": 2,
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
            "norm_num_groups": 32,
        }),
    );
    vae(dir, 512, 0.18215);
    clip_l(dir);
    config(
        dir,
        "scheduler",
        "scheduler_config.json",
        json!({
            "_class_name": "PNDMScheduler",
            "num_train_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "set_alpha_to_one": false,
            "skip_prk_steps": true,
            "steps_offset": 1,
        }),
    );
    tokenizer(dir, "tokenizer", None);

    weights(dir, Kind::Half, UNET_VALUES, &[(Part::TextEncoder, CLIP_L_VALUES)]);
}
