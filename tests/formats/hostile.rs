//! Files made to hurt, one for each weak place that was found: each is refused with a sentence, at once and in little memory.

use crate::support::all_cases::cases;
use crate::support::cases::Case;
use crate::support::refused::refused;
use hra::adapter::combine::{How, combine};
use hra::adapter::lora_file::LoraFile;
use hra::adapter::peft::{self, AdapterFile};
use hra::attach;
use hra::data::image;
use hra::diffusion::noise::{NoiseSchedule, SchedulerConfig};
use hra::model::Vae;
use hra::model::layers::Layers;
use hra::model::text::Tokenizer;
use hra::platform::files;
use hra::train::checkpoint;
use hra::weights::config::{TextConfig, UNetConfig, VaeConfig};
use hra::weights::part::{Part, Text};
use hra::weights::source::Source;
use hra::weights::tensor_file::{self, TensorFile};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use tch::{Device, Kind, Tensor};

const F32: (Kind, Device) = (Kind::Float, Device::Cpu);

fn case() -> Case {
    cases().into_iter().find(|case| case.name == "sd15").unwrap()
}

/// A safetensors file with one tensor of these sizes and no data.
fn lying_file(path: &Path, shape: &str) {
    let header = format!(r#"{{"lora_A.weight":{{"dtype":"F32","shape":{shape},"data_offsets":[0,0]}}}}"#);
    fs::write(path, [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat()).unwrap();
}

#[test]
fn sizes_that_cannot_be_multiplied_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    let many = format!("[{}0]", "0,".repeat(64));
    // A 0 makes any sizes agree with no data.
    for shape in ["[4611686018427387904,2,0]", "[0,9223372036854775808]", "[2,0,4611686018427387904]", &many]
    {
        lying_file(&path, shape);
        refused(TensorFile::open(&path).unwrap_err(), &["lora_A.weight", "dimensions"]);
    }
    lying_file(&path, "[0,4096,3,3]");
    assert_eq!(TensorFile::open(&path).unwrap().read("lora_A.weight").unwrap().size(), [0, 4096, 3, 3]);
}

/// A reader that opened it would wait for ever.
#[test]
fn a_pipe_is_no_weight_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: a NUL-terminated path that outlives the call.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    refused(TensorFile::open(&path).unwrap_err(), &["found a pipe"]);
}

/// A terabyte of nothing takes no room on a disk.
#[test]
fn a_text_file_is_not_read_whatever_its_size() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    fs::File::create(&path).unwrap().set_len(1 << 40).unwrap();
    refused(files::read_to_string(&path).unwrap_err(), &["expected at most 67108864 bytes"]);
}

fn edited(json: &Path, edits: &[(&str, Value)]) -> Text {
    let mut value: Value = serde_json::from_slice(&fs::read(json).unwrap()).unwrap();
    for (key, edit) in edits {
        value[*key] = edit.clone();
    }
    Text { content: value.to_string(), path: json.to_path_buf() }
}

#[test]
fn configs_ask_for_no_more_than_a_network() {
    let pipeline = case().pipeline();
    let unet = |edits: &[(&str, Value)]| {
        UNetConfig::parse(&edited(&pipeline.join("unet/config.json"), edits)).map(|_| ()).unwrap_err()
    };
    let deep = [("layers_per_block", json!(64)), ("transformer_layers_per_block", json!(64))];
    refused(unet(&deep), &["at most 2048 layers and transformer blocks"]);
    for size in [json!(i64::MAX), json!(-8), json!(0), json!(1.5)] {
        refused(unet(&[("sample_size", size)]), &["sample_size: expected 1 to"]);
    }
    for name in ["freq_shift", "norm_eps", "mid_block_scale_factor"] {
        refused(unet(&[(name, json!(1e308))]), &[name, "expected a number up to 1e6"]);
    }
    let vae = edited(&pipeline.join("vae/config.json"), &[("scaling_factor", json!(1e308))]);
    refused(VaeConfig::parse(&vae).unwrap_err(), &["scaling_factor"]);
    let scheduler = pipeline.join("scheduler/scheduler_config.json");
    let text = edited(&scheduler, &[("beta_end", json!(1e308))]);
    let config = SchedulerConfig::parse(&text.content, &scheduler).unwrap();
    refused(NoiseSchedule::new(&config, Device::Cpu).unwrap_err(), &["beta_end: expected a number"]);
    // The mask of the text takes the square of this.
    let text =
        edited(&pipeline.join("text_encoder/config.json"), &[("max_position_embeddings", json!(65536))]);
    refused(TextConfig::parse(&text).unwrap_err(), &["max_position_embeddings: expected 1 to 4096"]);
}

/// The crate behind the VAE allocates what the config says before a weight is read.
#[test]
fn a_vae_has_the_layers_that_its_file_has() {
    let dir = tempfile::tempdir().unwrap();
    let (from, vae) = (case().pipeline().join("vae"), dir.path().join("vae"));
    fs::create_dir(&vae).unwrap();
    let weights = "diffusion_pytorch_model.safetensors";
    fs::copy(from.join(weights), vae.join(weights)).unwrap();
    let config = edited(&from.join("config.json"), &[("layers_per_block", json!(64))]);
    fs::write(vae.join("config.json"), config.content).unwrap();
    let source = Source::open(dir.path(), None).unwrap();
    let problem = Vae::load(&source, Device::Cpu).map(|_| ()).unwrap_err().to_string();
    assert!(
        problem.contains("resnets") && problem.contains("1 problem"),
        "found before the network is made: {problem}"
    );
}

fn tokenizer(dir: &Path, edit: impl FnOnce(&mut Value)) -> hra::Result<Tokenizer> {
    let mut value: Value =
        serde_json::from_slice(&fs::read(case().pipeline().join("tokenizer/tokenizer.json")).unwrap())
            .unwrap();
    edit(&mut value);
    fs::create_dir_all(dir.join("tokenizer")).unwrap();
    fs::write(dir.join("tokenizer/tokenizer.json"), value.to_string()).unwrap();
    Tokenizer::load(&Source::open(dir, None).unwrap(), Part::TextEncoder, 77)
}

#[test]
fn a_pattern_that_has_the_special_tokens_gives_the_same_ids() {
    // As today's transformers writes it.
    let dir = tempfile::tempdir().unwrap();
    let plain = tokenizer(dir.path(), |_| {}).unwrap();
    let todays = tokenizer(dir.path(), |v| {
        let pattern = &mut v["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"];
        let own = pattern.as_str().unwrap();
        *pattern = json!(format!(r"<\|startoftext\|>|<\|endoftext\|>|{own}"));
    })
    .unwrap();
    for prompt in ["a photo of a sks dog, 4k!!", "it's <|endoftext|> \u{e9}\u{1f415} 12 <|startoftext|>x"] {
        assert_eq!(todays.encode(prompt).unwrap(), plain.encode(prompt).unwrap(), "{prompt}");
    }
}

#[test]
fn a_tokenizer_is_a_byte_level_bpe_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let doubling = json!({"type": "Replace", "pattern": {"String": " "}, "content": "  "});
    let many = json!({"type": "Sequence", "normalizers": vec![doubling; 60]});
    type Edit = fn(&mut Value, Value);
    let edits: [(Edit, Value, &str); 8] = [
        (|v, x| v["normalizer"] = x, many, "at most 8 steps"),
        (
            |v, x| v["normalizer"] = x,
            json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
            "normalizer: expected",
        ),
        (
            |v, x| v["normalizer"] = x,
            json!({"type": "Replace", "pattern": {"String": " "}, "content": "x".repeat(99)}),
            "replacement",
        ),
        (
            |v, x| v["model"]["continuing_subword_prefix"] = x,
            json!("\u{20ac}\u{20ac}"),
            "continuing_subword_prefix",
        ),
        (|v, x| v["model"]["vocab"]["<|endoftext|>"] = x, json!(u32::MAX), "an id of at most"),
        (|v, x| v["model"]["dropout"] = x, json!(0.5), "dropout"),
        (|v, x| v["model"]["type"] = x, json!("Unigram"), "type BPE"),
        (
            |v, x| v["added_tokens"][0]["content"] = x,
            json!("x".repeat(100_000)),
            "special tokens of up to 1024 bytes",
        ),
    ];
    for (edit, with, word) in edits {
        let problem = tokenizer(dir.path(), |value| edit(value, with)).map(drop);
        refused(problem.unwrap_err(), &[word]);
    }
    // What ends up in no id is not looked at, and may be anything.
    let problem = tokenizer(dir.path(), |value| {
        value["decoder"] = json!({"type": "ByteLevel", "add_prefix_space": -1e308});
        value["post_processor"] = json!({"type": "RobertaProcessing", "sep": 1});
        value["model"]["vocab"] = json!({});
    });
    refused(problem.map(drop).unwrap_err(), &["not a tokenizer"]);
}

/// Writes a PEFT folder and reads it.
fn adapter(dir: &Path, config: Value, tensors: &[(&str, Tensor)]) -> hra::Result<AdapterFile> {
    fs::create_dir_all(dir).unwrap();
    let tensors: Vec<_> =
        tensors.iter().map(|(n, t)| (format!("base_model.model.{n}"), t.shallow_clone())).collect();
    tensor_file::write(&dir.join(peft::WEIGHTS_FILE), &tensors, &[]).unwrap();
    fs::write(dir.join(peft::CONFIG_FILE), config.to_string()).unwrap();
    AdapterFile::read(dir)
}

/// What an adapter is takes the square of its rank: a file of 2 MB would ask for 500 GB.
#[test]
fn a_rank_is_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let r = 250_000;
    let hra = json!({"peft_type": "HRA", "r": r});
    let problem = adapter(dir.path(), hra, &[("x.hra_u", Tensor::ones([2, r], F32))]).err().unwrap();
    refused(problem, &["rank of at most 4096", "250000"]);
    let lora = json!({"peft_type": "LORA", "r": r});
    let halves =
        [("x.lora_A.weight", Tensor::ones([r, 1], F32)), ("x.lora_B.weight", Tensor::ones([1, r], F32))];
    refused(adapter(dir.path(), lora, &halves).err().unwrap(), &["rank of at most 4096", "250000"]);
}

/// libtorch panics where a tensor of f32 is multiplied by what f32 does not hold.
#[test]
fn factors_are_those_of_f32() {
    let dir = tempfile::tempdir().unwrap();
    let halves =
        [("x.lora_A.weight", Tensor::ones([2, 4], F32)), ("x.lora_B.weight", Tensor::ones([4, 2], F32))];
    let lora = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 1e308});
    refused(adapter(dir.path(), lora, &halves).err().unwrap(), &["a scale that f32 holds"]);
    let oft = json!({"peft_type": "OFT", "r": 0, "oft_block_size": 2, "coft": true, "eps": 1e308});
    refused(
        adapter(dir.path(), oft, &[("x.oft_R.weight", Tensor::ones([2, 1], F32))]).err().unwrap(),
        &["eps: expected"],
    );
}

#[test]
fn patterns_are_short_and_few() {
    let dir = tempfile::tempdir().unwrap();
    let halves =
        [("x.lora_A.weight", Tensor::ones([2, 4], F32)), ("x.lora_B.weight", Tensor::ones([4, 2], F32))];
    let read = |patterns: Value| {
        adapter(dir.path(), json!({"peft_type": "LORA", "r": 2, "rank_pattern": patterns}), &halves)
            .err()
            .unwrap()
    };
    refused(read(json!({"a|".repeat(1_000_000): 2})), &["not a regular expression that is understood"]);
    refused(read(json!({r"(\w{100}){1000}": 2})), &["not a regular expression that is understood"]);
    let many: serde_json::Map<_, _> = (0..20_000).map(|i| (format!("layer{i}"), json!(2))).collect();
    refused(read(many.into()), &["at most 10000 entries"]);
    // The same in the metadata of a LoRA file, where all are in memory at once.
    let path = dir.path().join("lora.safetensors");
    let settings = json!({"r": 2, "lora_alpha": 2, "rank_pattern": {r"(\w{100}){1000}": 2}});
    let tensors: Vec<_> = halves.iter().map(|(n, t)| (format!("unet.{n}"), t.shallow_clone())).collect();
    tensor_file::write(&path, &tensors, &[("lora_adapter_metadata", settings.to_string())]).unwrap();
    refused(LoraFile::read(&path).unwrap_err(), &["rank_pattern", "cannot use the entry"]);
}

/// A row of scales times a column of them would be a matrix: 4 MB each, 4 TB together.
#[test]
fn boft_scales_of_either_shape_multiply_one_by_one() {
    let dir = tempfile::tempdir().unwrap();
    let config = json!({"peft_type": "BOFT", "boft_block_size": 2, "boft_block_num": 0});
    let scales = Tensor::arange(1 << 20, F32) + 1.0;
    let read = |name: &str, shape: [i64; 2]| {
        let tensors = [("x.boft_R", Tensor::zeros([1, 2, 2, 2], F32)), ("x.boft_s", scales.view(shape))];
        adapter(&dir.path().join(name), config.clone(), &tensors).unwrap()
    };
    let (column, row) = (read("column", [-1, 1]), read("row", [1, -1]));
    let (_, tensors) = combine(&[(&column, 1.0), (&row, 1.0)], How::Chain).unwrap();
    let product = &tensors.iter().find(|(name, _)| name == "x.boft_s").unwrap().1;
    assert_eq!(product.size(), [1 << 20, 1]);
    assert!(product.reshape([-1]).equal(&scales.square()));
}

#[test]
fn biases_that_do_not_fit_are_refused_when_training_goes_on_from_them() {
    let dir = tempfile::tempdir().unwrap();
    let layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0";
    let mut model = crate::models::load(&case().pipeline());
    let width = model.unet.layers_mut().iter().find(|l| l.name == layer).unwrap().weight().size()[1];
    for name in [layer, "conv_norm_out"] {
        let config = json!({"peft_type": "HRA", "r": 2, "bias": "all"});
        let u = format!("{layer}.hra_u");
        let tensors =
            [(u.as_str(), Tensor::ones([width, 2], F32)), (&format!("{name}.bias"), Tensor::ones([3], F32))];
        let file = adapter(dir.path(), config, &tensors).unwrap();
        let problem = attach::attach_trained(&mut model.unet, file).unwrap_err();
        refused(problem, &[name, "expected a bias of shape", "[3]"]);
    }
}

#[test]
fn a_checkpoint_is_at_a_step_that_a_run_can_reach() {
    let dir = tempfile::tempdir().unwrap();
    tensor_file::write(&dir.path().join("optimizer.safetensors"), &[], &[]).unwrap();
    for step in [-1, i64::MAX] {
        let sums = json!({"count": 0.0, "loss": 0.0, "instance": 0.0, "prior": 0.0, "regulariser": 0.0});
        let state = json!({"format": 1, "step": step, "seconds": 0.0, "base_fingerprint": "", "parameters": [], "sums": sums});
        fs::write(dir.path().join("state.json"), state.to_string()).unwrap();
        refused(checkpoint::Loaded::read(dir.path()).map(|_| ()).unwrap_err(), &["step: expected 0 to"]);
    }
}

/// A chunk of zeros shrinks to a thousandth.
#[test]
fn texts_of_a_picture_unpack_to_a_megabyte_at_most() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.png");
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, 1, 1);
    encoder.add_ztxt_chunk("software".into(), "\0x".repeat(8 << 20)).unwrap();
    encoder.write_header().unwrap().write_image_data(&[0]).unwrap();
    assert!(bytes.len() < 1 << 18, "{} bytes", bytes.len());
    fs::write(&path, bytes).unwrap();
    refused(image::read_png_text(&path).unwrap_err(), &["expected a PNG image"]);
}
