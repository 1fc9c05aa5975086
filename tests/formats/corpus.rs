//! Good files of every kind that a reader reads, which the fuzzing damages.

use crate::support::base;
use crate::support::readers;
use hra::convert::single_file::{Replaced, write_checkpoint};
use hra::data::image::{RgbImage, save_png};
use hra::lab::compare::task::Task;
use hra::lab::results::{CellRecord, Plan};
use hra::train::checkpoint::TrainState;
use hra::train::config::TrainConfig;
use hra::train::run::Sums;
use hra::weights::part::Part;
use hra::weights::source::Source;
use hra::weights::tensor_file::to_bytes;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// The files of one good input.
pub type Files = Vec<Vec<u8>>;

/// Good inputs of a reader, and how many damaged ones it gets.
pub type Corpus = (Vec<Files>, usize);

fn root(path: &str) -> PathBuf {
    base::root().join(path)
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

/// A stored model.
fn sd() -> [String; 2] {
    ["sd15", "sd21"].map(|case| format!("tests/fixtures/cases/{case}/pipeline"))
}

/// One file of each stored model.
fn text(name: &str) -> Vec<Files> {
    sd().iter().map(|dir| vec![file(&format!("{dir}/{name}"))]).collect()
}

/// A part of each stored model.
fn part(part: Part) -> Vec<Files> {
    let (folder, stem) = (part.folder(), part.stem());
    let names = |dir: &String| {
        ["config.json".to_string(), format!("{stem}.safetensors")]
            .map(|name| file(&format!("{dir}/{folder}/{name}")))
            .to_vec()
    };
    sd().iter().map(names).collect()
}

/// A file of one tensor.
fn small(name: &str, shape: &[i64]) -> Vec<u8> {
    let tensors = [(name.to_string(), Tensor::ones(shape, (Kind::Float, Device::Cpu)))];
    to_bytes(&tensors, &[]).unwrap()
}

fn tower(name: &str, processor: &str) -> Files {
    let files = ["config.json", processor, "model.safetensors"];
    files.map(|file_name| file(&format!("tests/fixtures/towers/{name}/{file_name}"))).to_vec()
}

/// What a reader is fed with.
pub fn corpus(reader: &str, scratch: &Path) -> Corpus {
    let found = of_adapters(reader)
        .or_else(|| of_models(reader, scratch))
        .or_else(|| of_runs(reader))
        .or_else(|| of_pictures(reader, scratch))
        .or_else(|| of_lab(reader, scratch));
    let (mut good, count) = found.unwrap_or_else(|| panic!("{reader}: no corpus"));
    for files in kept(reader) {
        // Each is given to the reader in pieces as the others are.
        if good.first().is_none_or(|first| first.len() == files.len()) {
            good.push(files);
        }
    }
    (good, count)
}

/// Inputs in `tests/fuzz/seeds/READER/`.
fn kept(reader: &str) -> Vec<Files> {
    let folder = root("tests/fuzz/seeds").join(reader);
    let mut paths: Vec<PathBuf> =
        fs::read_dir(folder).into_iter().flatten().map(|e| e.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| readers::parts(&fs::read(path).unwrap())).collect()
}

/// Adapters of every form.
fn of_adapters(reader: &str) -> Option<Corpus> {
    Some(match reader {
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
            let (mut all, _) = of_adapters("adapter").unwrap();
            // Of one method each, a folder and the one after it.
            let kind =
                |files: &Files| serde_json::from_slice::<Value>(&files[0]).unwrap()["peft_type"].to_string();
            all.sort_by_key(kind);
            let pairs = all.windows(2).filter(|two| kind(&two[0]) == kind(&two[1]));
            (pairs.map(|two| [&two[0][..], &two[1][..]].concat()).collect(), 120)
        }
        "full_unet" => {
            let unet = |dir: &String| vec![file(&format!("{dir}/unet/diffusion_pytorch_model.safetensors"))];
            (sd().iter().map(unet).collect(), 60)
        }
        "lora_file" => (each("tests/fixtures/lora", &["safetensors"]), 300),
        _ => return None,
    })
}

/// Parts of models, and what describes them.
fn of_models(reader: &str, scratch: &Path) -> Option<Corpus> {
    Some(match reader {
        "unet_config" => (text("unet/config.json"), 250),
        "vae_config" => (text("vae/config.json"), 250),
        "text_config" => (text("text_encoder/config.json"), 250),
        "unet" => (part(Part::UNet), 60),
        "vae" => (part(Part::Vae), 60),
        "text_encoder" => (part(Part::TextEncoder), 80),
        "scheduler" => (text("scheduler/scheduler_config.json"), 200),
        "tokenizer" => {
            let config = br#"{"pad_token": "!", "model_max_length": 77, "added_tokens_decoder": {"9": {"content": "<x>"}}}"#;
            (vec![vec![file(&format!("{}/tokenizer/tokenizer.json", sd()[0])), config.to_vec()]], 60)
        }
        "vocabulary" => {
            let files =
                ["vocab.json", "merges.txt"].map(|name| file(&format!("{}/tokenizer/{name}", sd()[0])));
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
            (sd().iter().enumerate().map(write).collect(), 80)
        }
        "shards" => {
            let index = |shard: &str| {
                let map = BTreeMap::from([("conv_in.weight", shard)]);
                serde_json::to_vec(&json!({"metadata": {"total_size": 32}, "weight_map": map})).unwrap()
            };
            let good = ["shard-1.safetensors", "../outside.safetensors", "/etc/hostname", "..", ""];
            (good.iter().map(|s| vec![index(s), small("conv_in.weight", &[8])]).collect(), 200)
        }
        _ => return None,
    })
}

/// Settings and states of trainings, names, tensors.
fn of_runs(reader: &str) -> Option<Corpus> {
    Some(match reader {
        "tensor_file" => {
            let mut files = vec![vec![small("x", &[6, 2])]];
            for kind in [Kind::Double, Kind::Half, Kind::BFloat16, Kind::Int64] {
                let tensor = Tensor::zeros([3, 4], (kind, Device::Cpu));
                files.push(vec![to_bytes(&[("a.b".into(), tensor)], &[("key", "value".into())]).unwrap()]);
            }
            (files, 400)
        }
        "hub_id" => {
            let good = ["owner/name", "owner/name@refs/pr/1", "a.b/c-d@v1.0", "../../x", "a/..", "a/b@../c"];
            (good.iter().map(|id| vec![id.as_bytes().to_vec()]).collect(), 300)
        }
        "train_config" => {
            let mut files = each("configs", &["toml"]);
            let whole = TrainConfig::read(&root("configs/demo.toml")).unwrap().to_toml().unwrap();
            files.push(vec![whole.into_bytes()]);
            (files, 200)
        }
        "run" => {
            let state = TrainState {
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
        _ => return None,
    })
}

/// Pictures, conditions, and what scores them.
fn of_pictures(reader: &str, scratch: &Path) -> Option<Corpus> {
    Some(match reader {
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
        _ => return None,
    })
}

/// What comparisons read, and what a training takes from elsewhere.
fn of_lab(reader: &str, scratch: &Path) -> Option<Corpus> {
    Some(match reader {
        "comparison" => {
            let good = each("configs", &["toml"]);
            let is_one = |files: &Files| String::from_utf8_lossy(&files[0]).contains("[[method]]");
            (good.into_iter().filter(is_one).collect(), 200)
        }
        // What is kept of these was written by a comparison; where their form has changed they are to be made anew.
        "plan" => {
            let comparison = scratch.join("comparison");
            for files in kept("plan") {
                fs::create_dir_all(&comparison).unwrap();
                fs::write(comparison.join("plan.json"), &files[0]).unwrap();
                Plan::read(&comparison).unwrap();
            }
            (Vec::new(), 60)
        }
        "record" => {
            let records: Vec<Files> = kept("plan")
                .into_iter()
                .flat_map(|files| files[1..].to_vec())
                .map(|file| vec![file])
                .collect();
            for files in &records {
                let path = scratch.join("record.json");
                fs::write(&path, &files[0]).unwrap();
                CellRecord::read(&path).unwrap();
            }
            (records, 300)
        }
        "task" => {
            for files in kept("task") {
                fs::create_dir_all(scratch.join("cells/kept")).unwrap();
                fs::write(scratch.join("cells/kept/task.json"), &files[0]).unwrap();
                Task::read(scratch, "kept").unwrap();
            }
            (Vec::new(), 300)
        }
        "dreambooth" => {
            let good = "Classes\nsubject_name,class\ndog2,dog\nred_vase, vase\n\nObject Prompts\nprompt_list = [\n  'a {0} {1} \
                        in the snow'.format(unique_token, class_token),\n]\n\nLive Subject Prompts\nprompt_list = [\n  \"a {0} \
                        {1}\".format(unique_token, class_token),\n]\n";
            (vec![vec![good.as_bytes().to_vec()]], 300)
        }
        "lpips" => (vec![vec![alex()]], 20),
        "controlnet" | "control_encoder" => {
            let names = ["config.json", "diffusion_pytorch_model.safetensors"];
            let files = names.map(|name| file(&format!("tests/fixtures/cases/sd15/{reader}/{name}")));
            (vec![files.to_vec()], 120)
        }
        "class_images" => {
            readers::make_classes(scratch);
            (vec![vec![fs::read(scratch.join("class/class_images.json")).unwrap()]], 200)
        }
        "latents" => {
            let ones = |name: &str, shape: &[i64]| {
                (name.to_string(), Tensor::ones(shape, (Kind::Float, Device::Cpu)))
            };
            let latents =
                ["latents", "image_noise", "masked_image_noise"].map(|name| ones(name, &[2, 4, 2, 2]));
            let steps = small("noise", &[3, 2, 4, 2, 2]);
            (vec![vec![to_bytes(&latents, &[]).unwrap(), steps]], 300)
        }
        "hub_listing" => {
            let listing = |names: &[&str]| {
                let siblings: Vec<Value> = names.iter().map(|name| json!({"rfilename": name})).collect();
                vec![json!({"sha": "0".repeat(40), "siblings": siblings}).to_string().into_bytes()]
            };
            let model = [
                "model_index.json",
                "unet/config.json",
                "unet/diffusion_pytorch_model.safetensors",
                "vae/config.json",
                "vae/diffusion_pytorch_model.safetensors",
                "text_encoder/config.json",
                "text_encoder/model.safetensors",
                "tokenizer/vocab.json",
                "tokenizer/merges.txt",
                "scheduler/scheduler_config.json",
            ];
            let adapter =
                ["adapter_config.json", "adapter_model.safetensors", "a/../b.safetensors", "../x.json"];
            let tower = ["config.json", "preprocessor_config.json", "model.safetensors", "tokenizer.json"];
            let net =
                ["config.json", "diffusion_pytorch_model.fp16.safetensors", "x-00001-of-00002.safetensors"];
            (vec![listing(&model), listing(&adapter), listing(&tower), listing(&net)], 400)
        }
        _ => return None,
    })
}

/// Weights of LPIPS with AlexNet, all ones.
fn alex() -> Vec<u8> {
    let mut tensors = Vec::new();
    let mut add = |name: String, shape: &[i64]| {
        tensors.push((name, Tensor::ones(shape, (Kind::Float, Device::Cpu))));
    };
    let layers = [
        (0, [64, 3, 11, 11]),
        (3, [192, 64, 5, 5]),
        (6, [384, 192, 3, 3]),
        (8, [256, 384, 3, 3]),
        (10, [256, 256, 3, 3]),
    ];
    for (i, (number, shape)) in layers.iter().enumerate() {
        add(format!("features.{number}.weight"), shape);
        add(format!("features.{number}.bias"), &shape[..1]);
        add(format!("lin{i}.model.1.weight"), &[1, shape[0], 1, 1]);
    }
    to_bytes(&tensors, &[]).unwrap()
}
