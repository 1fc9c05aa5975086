//! Hostile files: every reader on good files and on some hundred damaged ones. None may panic, take memory without bound,
//! or write outside of the folder it was given. The same readers run without an end under libFuzzer (`tests/fuzz/`).
//!
//! `HRA_FUZZ_ROUNDS=20 cargo test --test fuzz` runs twenty times as many; a failure names reader, seed and length.

#[path = "support/mutate.rs"]
mod mutate;
#[path = "support/readers.rs"]
mod readers;
mod support;

use hra::convert::single_file::{Replaced, write_checkpoint};
use hra::data::image::{RgbImage, save_png};
use hra::platform::device::peak_process_memory;
use hra::train::checkpoint::State;
use hra::train::config::TrainConfig;
use hra::train::run::Sums;
use hra::weights::part::Part;
use hra::weights::source::{EMBEDDED, Source};
use hra::weights::tensor_file::to_bytes;
use mutate::{Rng, mutate};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Instant;
use tch::{Device, Kind, Tensor};

/// More than any input or model here needs, less than a size that a file claims.
const MOST_GROWTH: u64 = 256 << 20;

/// The files of one good input.
type Files = Vec<Vec<u8>>;

/// What a reader's panic said, and whether one is at work.
static PANIC: Mutex<String> = Mutex::new(String::new());
static READING: AtomicBool = AtomicBool::new(false);

fn root(path: &str) -> PathBuf {
    support::root().join(path)
}

fn file(path: &str) -> Vec<u8> {
    fs::read(root(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// The files of a folder with this ending, one an input.
fn each(folder: &str, endings: &[&str]) -> Vec<Files> {
    let mut paths: Vec<PathBuf> = fs::read_dir(root(folder)).unwrap().map(|e| e.unwrap().path()).collect();
    paths.sort();
    let fits = |p: &PathBuf| p.extension().is_some_and(|e| endings.contains(&e.to_str().unwrap()));
    paths.iter().filter(|p| fits(p)).map(|p| vec![fs::read(p).unwrap()]).collect()
}

/// Good inputs of a reader, and how many damaged ones it gets.
fn corpus(reader: &str, scratch: &Path) -> (Vec<Files>, usize) {
    let sd = ["sd15", "sd21"].map(|case| format!("tests/fixtures/cases/{case}/pipeline"));
    let text = |name: &str| sd.iter().map(|dir| vec![file(&format!("{dir}/{name}"))]).collect::<Vec<_>>();
    let part = |part: Part| {
        let names = |dir: &String| {
            let (folder, stem) = (part.folder(), part.stem());
            vec![
                file(&format!("{dir}/{folder}/config.json")),
                file(&format!("{dir}/{folder}/{stem}.safetensors")),
            ]
        };
        sd.iter().map(names).collect::<Vec<_>>()
    };
    let small = |name: &str, shape: &[i64]| {
        let tensors = [(name.to_string(), Tensor::ones(shape, (Kind::Float, Device::Cpu)))];
        to_bytes(&tensors, &[]).unwrap()
    };
    let tower = |name: &str, processor: &str| {
        let files = ["config.json", processor, "model.safetensors"];
        files.map(|file_name| file(&format!("tests/fixtures/towers/{name}/{file_name}"))).to_vec()
    };
    match reader {
        "tensor_file" => {
            let mut files = vec![vec![small("x", &[6, 2])]];
            for kind in [Kind::Double, Kind::Half, Kind::BFloat16, Kind::Int64] {
                let tensor = Tensor::zeros([3, 4], (kind, Device::Cpu));
                files.push(vec![to_bytes(&[("a.b".into(), tensor)], &[("key", "value".into())]).unwrap()]);
            }
            (files, 400)
        }
        "adapter" => {
            let mut dirs: Vec<PathBuf> = fs::read_dir(root("tests/fixtures/cases/sd15"))
                .unwrap()
                .map(|e| e.unwrap().path())
                .filter(|p| p.join("adapter_config.json").is_file())
                .collect();
            dirs.sort();
            let files = ["adapter_config.json", "adapter_model.safetensors"];
            let read = |dir: &PathBuf| files.map(|name| fs::read(dir.join(name)).unwrap()).to_vec();
            (dirs.iter().map(read).collect(), 400)
        }
        "merge" => {
            let (mut all, _) = corpus("adapter", scratch);
            // Of one method each, a folder and the one after it.
            let kind =
                |files: &Files| serde_json::from_slice::<Value>(&files[0]).unwrap()["peft_type"].to_string();
            all.sort_by_key(kind);
            let pairs = all.windows(2).filter(|two| kind(&two[0]) == kind(&two[1]));
            (pairs.map(|two| [&two[0][..], &two[1][..]].concat()).collect(), 120)
        }
        "full_unet" => {
            let unet = |dir: &String| vec![file(&format!("{dir}/unet/diffusion_pytorch_model.safetensors"))];
            (sd.iter().map(unet).collect(), 60)
        }
        "hub_id" => {
            let good = ["owner/name", "owner/name@refs/pr/1", "a.b/c-d@v1.0", "../../x", "a/..", "a/b@../c"];
            (good.iter().map(|id| vec![id.as_bytes().to_vec()]).collect(), 300)
        }
        "lora_file" => (each("tests/fixtures/lora", &["safetensors"]), 300),
        "unet_config" => (text("unet/config.json"), 250),
        "vae_config" => (text("vae/config.json"), 250),
        "text_config" => (text("text_encoder/config.json"), 250),
        "unet" => (part(Part::UNet), 60),
        "vae" => (part(Part::Vae), 60),
        "text_encoder" => (part(Part::TextEncoder), 80),
        "scheduler" => (text("scheduler/scheduler_config.json"), 200),
        "tokenizer" => {
            let config = br#"{"pad_token": "!", "model_max_length": 77, "added_tokens_decoder": {"9": {"content": "<x>"}}}"#;
            (vec![vec![file(&format!("{}/tokenizer/tokenizer.json", sd[0])), config.to_vec()]], 60)
        }
        "vocabulary" => {
            let files = ["vocab.json", "merges.txt"].map(|name| file(&format!("{}/tokenizer/{name}", sd[0])));
            let [vocab, merges] = files;
            let special = br#"{"bos_token": {"content": "<|startoftext|>"}, "pad_token": "!"}"#.to_vec();
            (vec![vec![vocab, merges, special, br#"{"<y>": 5000, "<z>": 5001}"#.to_vec()]], 60)
        }
        "checkpoint" => {
            let write = |(i, dir): (usize, &String)| {
                let path = scratch.join(format!("{i}.safetensors"));
                let source = Source::open(&root(dir), None).unwrap();
                write_checkpoint(&source, &Replaced::new(), None, &path).unwrap();
                vec![fs::read(path).unwrap()]
            };
            (sd.iter().enumerate().map(write).collect(), 80)
        }
        "train_config" => {
            let mut files = each("configs", &["toml"]);
            let whole = TrainConfig::read(&root("configs/demo.toml")).unwrap().to_toml().unwrap();
            files.push(vec![whole.into_bytes()]);
            (files, 200)
        }
        "run" => {
            let state = State {
                format: 1,
                step: 10,
                seconds: 1.5,
                base_fingerprint: "0".repeat(64),
                parameters: vec!["weight".into()],
                sums: Sums::default(),
            };
            let record = json!({"step": 10, "loss": 0.1, "loss_instance": 0.1, "learning_rate": 1e-4, "gradient_norm": 1.0, "seconds": 1.5});
            let metrics = format!("{record}\n{record}\n").into_bytes();
            let flat = |name: &str| (name.to_string(), Tensor::ones([8], (Kind::Float, Device::Cpu)));
            let mut tensors = Vec::from(["exp_avg", "exp_avg_sq", "ema"].map(flat));
            tensors.push(("weight".into(), Tensor::ones([4, 2], (Kind::Float, Device::Cpu))));
            let optimizer = to_bytes(&tensors, &[]).unwrap();
            (vec![vec![serde_json::to_vec(&state).unwrap(), optimizer, metrics]], 200)
        }
        "shards" => {
            let index = |shard: &str| {
                let map = BTreeMap::from([("conv_in.weight", shard)]);
                serde_json::to_vec(&json!({"metadata": {"total_size": 32}, "weight_map": map})).unwrap()
            };
            let good = ["shard-1.safetensors", "../outside.safetensors", "/etc/hostname", "..", ""];
            (good.iter().map(|s| vec![index(s), small("conv_in.weight", &[8])]).collect(), 200)
        }
        "picture" => {
            let mut files = each("tests/fixtures/images", &["png", "jpg", "tif", "webp", "bmp"]);
            let path = scratch.join("text.png");
            let words = ["prompt", "a dog", "Title", "a \u{1f415}"].map(String::from);
            let texts = [(words[0].clone(), words[1].clone()), (words[2].clone(), words[3].clone())];
            save_png(&path, &RgbImage::new(5, 4), &texts).unwrap();
            files.push(vec![fs::read(path).unwrap()]);
            (files, 700)
        }
        "points" => {
            let good = [
                "version: 1\nn_points: 2\n{\n2.5 3\n-2 41.25\n}\n",
                "[[1.5, 2], [-3, 40.25]]",
                r#"{"image": "b.png", "landmarks": [[1.5, 2.0], [-3, 1e5]]}"#,
                "# x y\n1.5, 2\r\n-3\t40.25\n",
            ];
            let face: String = (0..68).map(|i| format!("{} {}\n", i % 9 * 7, i / 9 * 6)).collect();
            let good = good.iter().map(|text| text.as_bytes().to_vec()).chain([face.into_bytes()]);
            (good.map(|text| vec![text]).collect(), 600)
        }
        "palette" => {
            let good = [
                r#"{"background": [0, 0, 0], "a": [255, 221, 51]}"#,
                "[[0, 0, 0], [1, 2, 3], [255, 255, 255]]",
            ];
            (good.iter().map(|text| vec![text.as_bytes().to_vec()]).collect(), 300)
        }
        "label_map" => {
            let mut files = each("tests/fixtures/conditions", &["png"]);
            files
                .iter_mut()
                .for_each(|file| file.push(b"[[3, 252, 9], [2, 253, 6], [1, 254, 3], [0, 255, 0]]".to_vec()));
            (files, 700)
        }
        "clip" => (vec![tower("clip", "processor_config.json")], 120),
        "vit" => {
            let names = ["dino", "dino-wide", "dinov2", "dinov2-gated"];
            (names.map(|name| tower(name, "preprocessor_config.json")).to_vec(), 250)
        }
        "pairs" => {
            let rows = [("a.png", "c.png"), ("a.png", "p.pts"), ("a.png", "")];
            let csv: String = rows.map(|(a, c)| format!("{a},\"of \"\"it\"\"\",{c}\n")).concat();
            let row = |(a, c)| json!({"target": a, "source": c, "prompt": ["one", "two"]});
            let array = Value::from(rows.map(row).to_vec()).to_string();
            let lines: String = rows.map(|pair| format!("{}\n", row(pair))).concat();
            let tables = [format!("file_name,text,conditioning_image\n{csv}"), array, lines];
            let others = [
                file("tests/fixtures/images/rgb.bmp"),
                file("tests/fixtures/images/palette.png"),
                b"version: 1\nn_points: 2\n{\n1 2\n3.5 4\n}\n".to_vec(),
                b"{\"background\": [0, 0, 0], \"dog\": [255, 9, 9]}".to_vec(),
            ];
            let files = |table: String| [vec![table.into_bytes()], others.to_vec()].concat();
            (tables.map(files).to_vec(), 200)
        }
        other => panic!("{other}: no corpus"),
    }
}

/// One damaged input: some of its files, at least one.
fn damaged(rng: &mut Rng, good: &[Files]) -> Vec<u8> {
    let mut files = rng.pick(good).clone();
    let sure = rng.below(files.len());
    for (i, file) in files.iter_mut().enumerate() {
        if i == sure || rng.below(4) == 0 {
            let other = &rng.pick(good)[i];
            *file = if rng.below(3) == 0 { embedded(rng, file) } else { None }
                .unwrap_or_else(|| mutate(rng, file, other));
        }
    }
    readers::join(&files)
}

/// A checkpoint with one of the texts in its header damaged.
fn embedded(rng: &mut Rng, file: &[u8]) -> Option<Vec<u8>> {
    let (mut header, data) = mutate::safetensors(file)?;
    let texts = header.get_mut("__metadata__")?.as_object_mut()?;
    let names: Vec<String> = texts.keys().filter(|key| key.starts_with(EMBEDDED)).cloned().collect();
    if names.is_empty() {
        return None;
    }
    let name = rng.pick(&names);
    let good = texts[name].as_str()?.as_bytes().to_vec();
    let bad = mutate(rng, &good, &good);
    texts.insert(name.clone(), Value::from(String::from_utf8_lossy(&bad).into_owned()));
    Some(mutate::with_header(&header, data))
}

/// What a reader did with an input that it must not do.
fn fault(reader: readers::Reader, scratch: &Path, input: &[u8]) -> Option<String> {
    let _ = fs::remove_dir_all(scratch);
    fs::create_dir(scratch).unwrap();
    READING.store(true, Relaxed);
    let result = panic::catch_unwind(AssertUnwindSafe(|| reader(scratch, input)));
    READING.store(false, Relaxed);
    if result.is_err() {
        return Some(PANIC.lock().unwrap().clone());
    }
    // The folder lies alone in one that lies alone in another.
    scratch.ancestors().skip(1).take(2).find_map(|above| {
        let names: Vec<_> = fs::read_dir(above).unwrap().map(|e| e.unwrap().file_name()).collect();
        (names.len() != 1).then(|| format!("files outside of the given folder: {names:?}"))
    })
}

#[test]
fn no_reader_falls_over_hostile_files() {
    support::pin_threads();
    let rounds: usize = std::env::var("HRA_FUZZ_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    let only = std::env::var("HRA_FUZZ_READER").ok();
    let folder = tempfile::tempdir().unwrap();
    let [cage, made] = ["cage", "made"].map(|name| folder.path().join(name));
    let scratch = cage.join("given/folder");
    fs::create_dir_all(&scratch).unwrap();
    fs::create_dir(&made).unwrap();
    // What a reader writes to a relative path comes to light, too.
    std::env::set_current_dir(scratch.parent().unwrap()).unwrap();
    let corpora: Vec<_> = readers::READERS
        .into_iter()
        .filter(|(name, _)| only.as_ref().is_none_or(|only| only == name))
        .map(|(name, reader)| (name, reader, corpus(name, &made)))
        .collect();

    let usual = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        if !READING.load(Relaxed) {
            return usual(info);
        }
        let first: String = info.to_string().chars().take(400).collect();
        *PANIC.lock().unwrap_or_else(|e| e.into_inner()) = first;
    }));
    let mut faults = BTreeMap::new();
    for (name, reader, (good, _)) in &corpora {
        for files in good {
            let input = readers::join(files);
            if let Some(what) = fault(*reader, &scratch, &input) {
                faults.entry(what).or_insert(format!("{name}, a good file of {} bytes", input.len()));
            }
        }
    }
    for (name, reader, (good, count)) in &corpora {
        let (start, before) = (Instant::now(), peak_process_memory().expect("Linux has /proc"));
        let mut slowest = (0.0, 0);
        for seed in 0..(count * rounds) as u64 {
            let input = damaged(&mut Rng::new(seed), good);
            let begun = Instant::now();
            let found = fault(*reader, &scratch, &input);
            let seconds = begun.elapsed().as_secs_f64();
            if seconds > slowest.0 {
                slowest = (seconds, seed);
            }
            if let Some(what) = found {
                faults.entry(what).or_insert(format!("{name}, seed {seed}, {} bytes", input.len()));
            }
            let growth = peak_process_memory().expect("Linux has /proc").saturating_sub(before);
            if growth > MOST_GROWTH {
                let what = format!("{} MB more memory than before", growth >> 20);
                faults.insert(what, format!("{name}, seed {seed}, {} bytes", input.len()));
                break;
            }
        }
        let growth = peak_process_memory().expect("Linux has /proc").saturating_sub(before);
        println!(
            "{name}: {} inputs in {:.1} s, slowest {:.2} s (seed {}), {} MB more",
            count * rounds,
            start.elapsed().as_secs_f64(),
            slowest.0,
            slowest.1,
            growth >> 20
        );
    }
    let told: Vec<String> = faults.iter().map(|(what, input)| format!("{input}: {what}")).collect();
    assert!(told.is_empty(), "{} faults\n{}", told.len(), told.join("\n"));
}
