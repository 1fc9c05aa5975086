//! Stable Diffusion XL's size, its weights in bf16 on disk and in memory: two drawing steps at 1024 px and one training step at 512 px on
//! the CPU, with 7 GB of disk.

use super::fill::{CLIP_L_VALUES, assert_drawn, clip_l, config, measured, text, tokenizer, vae, weights};
use super::phases::watched;
use crate::support::base::root;
use crate::support::records::records;
use crate::support::scratch::Scratch;
use hra::weights::part::Part;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::Instant;
use tch::Kind;

/// Values of the UNet and of the second text tower of Stable Diffusion XL 1.0, as they are published.
const UNET_VALUES: i64 = 2_567_463_684;
const BIGG_VALUES: i64 = 694_659_840;

/// Values of an HRA adapter of rank 8 on its attention projections: 8 for each input of 10 transformer blocks of width 640 and 60 of
/// width 1280, each with six projections of that width and two of the text's.
const ADAPTER_VALUES: i64 = 8 * (10 * (6 * 640 + 2 * 2048) + 60 * (6 * 1280 + 2 * 2048));

/// The model, made where it is not kept.
fn model(scratch: &Scratch) -> PathBuf {
    let model = kept_model().unwrap_or_else(|| scratch.path("sdxl"));
    if !model.is_dir() {
        let started = Instant::now();
        make_model(&model);
        println!("made the model in {:.0} s", started.elapsed().as_secs_f64());
    }
    model
}

#[test]
#[ignore = "makes 7 GB of weights and computes for minutes"]
fn stable_diffusion_xl_of_full_size_trains() {
    let scratch = Scratch::new();
    let (model, run) = (text(&model(&scratch)), text(&scratch.path("run")));
    let pictures = text(&root().join("assets/subjects/cat/train"));
    let words = [
        "train",
        "--device=cpu",
        "--dtype=bf16",
        "--pretrained_model_name_or_path",
        &model,
        "--instance_data_dir",
        &pictures,
        "--instance_prompt=a fluent 3d emoji of a sks cat face",
        "--resolution=512",
        "--method=hra",
        "--rank=8",
        "--max_train_steps=1",
        "--output_dir",
        &run,
    ];
    let (trained, phases) = watched(&scratch, &words, &["encoding instance pictures", "training"]);
    assert_eq!(trained.code, 0, "{}", trained.err);
    assert!(trained.out.contains(&format!("({ADAPTER_VALUES} values")), "{}", trained.out);
    let names: Vec<&str> = phases.iter().map(|phase| phase.name.as_str()).collect();
    assert_eq!(names, ["loading", "encoding instance pictures", "training"]);
    let gb = |bytes: u64| bytes as f64 / 1e9;
    for phase in &phases {
        let (most, last) = (gb(phase.most), gb(phase.last));
        println!("{}: {:.0} s, at most {most:.2} GB, {last:.2} GB in the end", phase.name, phase.seconds);
    }
    println!("{}", trained.out);
    assert!(phases.iter().all(|phase| phase.most < 24_000_000_000));
    let record = &records(Path::new(&run))[0];
    for key in ["loss", "gradient_norm", "weight_change"] {
        assert!(record[key].as_f64().is_some_and(|v| v.is_finite() && v > 0.0), "{key} of {record}");
    }
}

#[test]
#[ignore = "makes 7 GB of weights and computes for minutes"]
fn stable_diffusion_xl_of_full_size_draws() {
    let scratch = Scratch::new();
    let model = model(&scratch);
    // As this CPU computes, and as one without arithmetic of bf16 does.
    for (name, isa) in [("as chosen", "ALL"), ("in f32", "AVX512_CORE")] {
        let latents = scratch.path(&format!("{name}.safetensors"));
        let [model, out, latents] = [&model, &scratch.path(name), &latents].map(|path| text(path));
        let words = [
            "sample",
            "--device=cpu",
            "--dtype=bf16",
            "--model",
            &model,
            "--prompt",
            "a fluent 3d emoji of a cat face",
            "--steps=2",
            "--save-latents",
            &latents,
            "--output",
            &out,
        ];
        let what = format!("two drawing steps with guidance at 1024 px, {name}");
        let (drawn, peak) = measured(&scratch, &what, &words, &[("ONEDNN_MAX_CPU_ISA", isa)]);
        println!("{}", drawn.err);
        assert!(peak < 24_000_000_000, "{peak} bytes");
        assert!(name == "as chosen" || drawn.err.contains("computed in f32"), "{}", drawn.err);
        assert_drawn(Path::new(&latents), Path::new(&out), 1024);
    }
}

/// Where a developer keeps the model, to make it once: `HRA_LARGE_XL`.
fn kept_model() -> Option<PathBuf> {
    std::env::var_os("HRA_LARGE_XL").map(PathBuf::from)
}

/// Writes a model folder of Stable Diffusion XL's shape, with the embedded model's tokenizer.
fn make_model(dir: &Path) {
    config(
        dir,
        "unet",
        "config.json",
        json!({
            "_class_name": "UNet2DConditionModel",
            "sample_size": 128,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "layers_per_block": 2,
            "transformer_layers_per_block": [1, 2, 10],
            "cross_attention_dim": 2048,
            "attention_head_dim": [5, 10, 20],
            "use_linear_projection": true,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "norm_num_groups": 32,
        }),
    );
    vae(dir, 1024, 0.13025);
    clip_l(dir);
    let bigg = json!({
        "architectures": ["CLIPTextModelWithProjection"],
        "vocab_size": 49408,
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "max_position_embeddings": 77,
        "hidden_act": "gelu",
        "projection_dim": 1280,
    });
    config(dir, "text_encoder_2", "config.json", bigg);
    let scheduler = json!({
        "_class_name": "EulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "timestep_spacing": "leading",
        "steps_offset": 1,
    });
    config(dir, "scheduler", "scheduler_config.json", scheduler);
    tokenizer(dir, "tokenizer", None);
    tokenizer(dir, "tokenizer_2", Some("!"));

    let texts = [(Part::TextEncoder, CLIP_L_VALUES), (Part::TextEncoder2, BIGG_VALUES)];
    weights(dir, Kind::BFloat16, UNET_VALUES, &texts);
}
