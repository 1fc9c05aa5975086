//! Every method through the real program: it trains, resumes bit for bit, writes files that draw, and starts from an adapter.

use crate::support::error::relative_error;
use crate::support::records::records;
use crate::support::scratch::Scratch;
use crate::support::training::tiny_sd;
use hra::weights::tensor_file::TensorFile;
use sha2::Digest;
use std::path::Path;

/// Everything that a run trained, by file and content.
fn trained(run: &Path) -> Vec<(String, String)> {
    let files = [
        "adapter_config.json",
        "adapter_model.safetensors",
        "text_encoder/adapter_config.json",
        "text_encoder/adapter_model.safetensors",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ];
    let there = files.iter().filter(|name| run.join(name).is_file());
    let hash = |name: &str| format!("{:x?}", sha2::Sha256::digest(std::fs::read(run.join(name)).unwrap()));
    there.map(|name| (name.to_string(), hash(name))).collect()
}

/// Trains four steps, goes back to the second and makes the last two again: the files are the same.
fn trains_and_resumes(words: &[&str], files: &[&str]) -> Scratch {
    let scratch = Scratch::new();
    let run = scratch.path("run");
    let common = ["--max_train_steps", "4", "--checkpointing_steps", "2", "--learning_rate", "1e-3"];
    let done = scratch.train("run", &[&common[..], words].concat());
    let idle = done.err.contains("`to_z` is the name of no layer");
    assert_eq!(idle, words.iter().any(|word| word.contains("to_z")), "{}", done.err);
    let whole = trained(&run);
    assert_eq!(whole.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), files, "{}", done.out);
    let losses = records(&run);
    scratch.ok(&["train", "--resume", "2", "--output_dir", run.to_str().unwrap()]);
    assert_eq!(trained(&run), whole, "{words:?}");
    assert_eq!(records(&run), losses);

    let model = tiny_sd();
    let sample = |name: &str, adapter: &str| {
        let file = scratch.path(&format!("{name}.safetensors"));
        let words = ["--prompt", "a cat face", "--steps", "2", "--save-latents", file.to_str().unwrap()];
        let place = ["sample", "--model", model.to_str().unwrap(), "--adapter", adapter, "--output", name];
        let done = scratch.ok(&[&place[..], &words].concat());
        assert!(done.err.contains("no unused keys"), "{}", done.err);
        TensorFile::open(&file).unwrap().read("latents").unwrap()
    };
    let (one, none) = (sample("one", "run"), sample("none", "run=0"));
    assert!(relative_error(&one, &none) > 1e-5, "{words:?}: training moved nothing");
    scratch
}

const ADAPTER: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

#[test]
fn lora_and_dora() {
    trains_and_resumes(&["--method", "lora", "--rank", "4"], &ADAPTER);
    trains_and_resumes(&["--method", "dora", "--rank", "4", "--use_rslora", "--lora_alpha", "8"], &ADAPTER);
}

#[test]
fn relatives_of_hra() {
    let words = ["--method", "hra-magnitude", "--rank", "4", "--hra_lambda", "1e-3"];
    trains_and_resumes(&words, &ADAPTER);
    trains_and_resumes(&["--method", "hra-free", "--rank", "3"], &ADAPTER);
}

#[test]
fn rotations_of_blocks() {
    trains_and_resumes(&["--method", "oft", "--rank", "4"], &ADAPTER);
    trains_and_resumes(&["--method", "boft", "--block_size", "8"], &ADAPTER);
    trains_and_resumes(&["--method", "ether+", "--rank", "4"], &ADAPTER);
    // A ball so small that the projection bites: every block ends on its surface.
    let scratch = trains_and_resumes(&["--method", "coft", "--rank", "4", "--coft_eps", "1e-7"], &ADAPTER);
    let file = TensorFile::open(&scratch.path("run/adapter_model.safetensors")).unwrap();
    assert_eq!(file.text("coft_eps"), Some("0.0000001"));
    for key in file.names() {
        let upper = file.read(&key).unwrap(); // [4, b (b - 1) / 2]
        let b = ((1.0 + (1.0 + 8.0 * upper.size()[1] as f64).sqrt()) / 2.0).round();
        let radius = 1e-7 * b * b / 2.0;
        let largest = upper.norm_scalaropt_dim(2, [1], false).max().double_value(&[]) * 2f64.sqrt();
        assert!(largest <= radius * 1.00001, "{key}: {largest} of {radius}");
    }
}

#[test]
fn the_whole_unet() {
    let files = ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"];
    let scratch = trains_and_resumes(&["--method", "full"], &files);
    // Two halves of one change are the whole of it, biases and norms included.
    let model = tiny_sd();
    let sample = |name: &str, adapters: &[&str]| {
        let file = scratch.path(&format!("{name}.safetensors"));
        let mut words =
            vec!["sample", "--model", model.to_str().unwrap(), "--prompt", "a cat face", "--steps", "2"];
        words.extend(["--save-latents", file.to_str().unwrap(), "--output", name]);
        words.extend(adapters.iter().flat_map(|adapter| ["--adapter", adapter]));
        scratch.ok(&words);
        TensorFile::open(&file).unwrap().read("latents").unwrap()
    };
    let (whole, halves) = (sample("whole", &["run"]), sample("halves", &["run=0.5", "run=0.5"]));
    assert!(relative_error(&halves, &whole) < 1e-4);
}

#[test]
fn convolutions_feed_forward_biases_and_the_text_encoder() {
    let text = ["text_encoder/adapter_config.json", "text_encoder/adapter_model.safetensors"];
    let words = ["--train_text_encoder", "--text_encoder_lr", "1e-2", "--bias", "all", "--target_modules"];
    let targets = "to_q,to_z,net.0.proj,net.2,proj_in,conv1,conv_shortcut";
    let scratch = trains_and_resumes(&[&words[..], &[targets]].concat(), &[ADAPTER, text].concat());
    let keys = |file: &str| TensorFile::open(&scratch.path(file)).unwrap().names();
    let unet = keys("run/adapter_model.safetensors");
    let has = |part: &str| unet.iter().any(|key| key.ends_with(part));
    assert!(has("conv1.hra_u") && has("conv1.base_layer.bias") && has("conv2.bias") && has("norm1.bias"));
    let text = keys("run/text_encoder/adapter_model.safetensors");
    assert!(
        text.contains(&"base_model.model.encoder.layers.0.self_attn.q_proj.hra_u".to_string()),
        "{text:?}"
    );
}

#[test]
fn a_run_starts_where_another_adapter_ended() {
    let scratch = Scratch::new();
    let words = ["--method", "lora", "--rank", "4", "--max_train_steps", "2", "--train_text_encoder"];
    scratch.train("first", &words);
    let more = ["--init_adapter", "first", "--learning_rate", "1e-12"];
    scratch.train("second", &[&words[..], &more].concat());
    for file in ["adapter_model.safetensors", "text_encoder/adapter_model.safetensors"] {
        let open = |run: &str| TensorFile::open(&scratch.path(run).join(file)).unwrap();
        let (first, second) = (open("first"), open("second"));
        for key in first.names() {
            let error = relative_error(&second.read(&key).unwrap(), &first.read(&key).unwrap());
            assert!(error < 1e-6, "{key}: {error}");
        }
    }
    let other = scratch.train_flags("third", &["--init_adapter", "first", "--max_train_steps", "2"]);
    let done = scratch.run(&other.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(done.code, 2);
    assert!(
        done.err.contains("first") && done.err.contains("LoRA r 4") && done.err.contains("HRA r 8"),
        "{}",
        done.err
    );
}

#[test]
fn factors_of_outputs() {
    // Those of to_out.0 multiply its bias too.
    trains_and_resumes(&["--method", "ia3"], &ADAPTER);
    let scratch = Scratch::new();
    let flags = scratch.train_flags("run", &["--method", "ia3", "--bias", "only"]);
    let refused = scratch.run(&flags.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(refused.err.contains("bias: method ia3 has no place for trained biases"), "{}", refused.err);
}
