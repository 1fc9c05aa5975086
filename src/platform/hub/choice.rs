//! Which files of a repository are downloaded: those that are read, and no others.
//!
//! Chosen from the names alone, so that one rule says what a repository offers and whether the cache has all of it. Only
//! names of the expected forms are taken: a hostile listing (`../../x`) cannot name a place outside the cache.

use crate::error::{Error, Result};
use crate::platform::adapter_layout::{AdapterForm, AdapterLayout, PEFT_CONFIG, PEFT_WEIGHTS};
use crate::platform::hub::wanted::Wanted;
use std::collections::BTreeSet;
use std::path::PathBuf;

/// The parts of every model that have weights, and the stem of their file names in diffusers.
const PARTS: [(&str, &str); 2] = [("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model")];

/// Text encoders with their tokenizers; the second is of Stable Diffusion XL, whose refiner has no other.
const TEXTS: [(&str, &str); 2] = [("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")];

/// The stem of a text encoder's weight files in transformers.
const TEXT_STEM: &str = "model";

/// Endings of files that Python's pickle wrote, which can run code when they are read.
const PICKLED: [&str; 4] = [".bin", ".ckpt", ".pt", ".pth"];

/// Files to have.
#[derive(Debug, PartialEq, Eq)]
pub struct FileChoice {
    /// Names inside the repository, small files first.
    pub files: Vec<String>,
    /// What to open, inside the repository: a file, or nothing for the folder itself.
    pub entry: PathBuf,
    /// What a user should know of files that are passed over.
    pub note: Option<String>,
}

/// Chooses from `names`; the error is what is missing, and what to do about it where something can be done.
pub fn choose(names: &BTreeSet<String>, wanted: Wanted) -> Result<FileChoice> {
    match wanted {
        Wanted::Model => model(names),
        Wanted::Adapter => adapter(names),
        Wanted::Tower => tower(names),
        Wanted::ControlNet => network(names, "a ControlNet"),
        Wanted::Vae => network(names, "a VAE"),
    }
}

fn model(names: &BTreeSet<String>) -> Result<FileChoice> {
    // Before gigabytes are fetched that are not read.
    let has = |part: &str| names.contains(&format!("{part}/config.json"));
    if has("transformer") && !has("unet") {
        return Err(Error::hub(
            "a Stable Diffusion folder, found one of another family (a diffusion transformer, such as Flux, Stable Diffusion 3 or \
             PixArt), which is not supported",
        ));
    }
    let second = has(TEXTS[1].0);
    let first = !second || names.iter().any(|name| is_in(name, TEXTS[0].0));
    let texts: Vec<(&str, &str)> =
        TEXTS.into_iter().zip([first, second]).filter_map(|(text, there)| there.then_some(text)).collect();
    let of_texts = texts.iter().map(|(part, _)| (*part, TEXT_STEM));
    let parts: Vec<(&str, &str)> = PARTS.into_iter().chain(of_texts).collect();
    let mut files: Vec<String> = Vec::new();
    let mut missing: Vec<String> = Vec::new();
    let mut need = |name: String| {
        if names.contains(&name) { files.push(name) } else { missing.push(name) }
    };
    parts.iter().for_each(|(part, _)| need(format!("{part}/config.json")));
    need("scheduler/scheduler_config.json".into());
    files.extend(names.get("model_index.json").cloned());
    for (_, folder) in texts {
        let has = |name: &str| names.contains(&format!("{folder}/{name}"));
        let complete = has("tokenizer.json") || has("vocab.json") && has("merges.txt");
        if !complete {
            missing.push(format!("{folder}/vocab.json with {folder}/merges.txt"));
        }
        files.extend(names.iter().filter(|n| is_in(n, folder)).cloned());
    }
    let mut pickled = false;
    for (part, stem) in parts {
        match weights(names, part, stem) {
            Some(found) => files.extend(found),
            None => {
                missing.push(format!("{part}/{stem}.safetensors"));
                pickled |= names.iter().any(|n| is_in(n, part) && is_pickled(n));
            }
        }
    }
    if missing.is_empty() {
        return Ok(FileChoice { files, entry: PathBuf::new(), note: None });
    }
    let kind = if second { "Stable Diffusion XL" } else { "Stable Diffusion" };
    let lack = Error::hub(format!("a {kind} folder, without {}", missing.join(", ")));
    if pickled {
        return Err(lack.with_hint(
            "it has pickled weights, which can run code and are not read; convert them once in Python: \
             DiffusionPipeline.from_pretrained(\"OWNER/NAME\").save_pretrained(\"DIR\", safe_serialization=True), and give DIR",
        ));
    }
    let single = single_files(names);
    Err(lack.with_hints(single.first().map(|file| {
        format!("it has single files such as {file}; download the one you mean and give its path")
    })))
}

fn tower(names: &BTreeSet<String>) -> Result<FileChoice> {
    /// Of a text tower's tokenizer; each where it is there.
    const TOKENIZER: [&str; 6] = [
        "added_tokens.json",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    ];
    // transformers 5 writes the second one.
    const PROCESSORS: [&str; 2] = ["preprocessor_config.json", "processor_config.json"];
    let mut missing: Vec<&str> = Vec::new();
    if !names.contains("config.json") {
        missing.push("config.json");
    }
    if !PROCESSORS.iter().any(|name| names.contains(*name)) {
        missing.push(PROCESSORS[0]);
    }
    let found = weights(names, "", "model");
    if found.is_none() {
        missing.push("model.safetensors");
    }
    if !missing.is_empty() {
        let pickled = found.is_none() && names.iter().any(|n| is_plain_name(n) && is_pickled(n));
        let hint = pickled.then_some(
            "it has pickled weights, which can run code and are not read; give a revision that has model.safetensors \
             (owner/name@refs/pr/N), or convert them once in Python: AutoModel.from_pretrained(\"OWNER/NAME\")\
             .save_pretrained(\"DIR\"), put the repository's other .json and .txt files beside them, and give DIR",
        );
        return Err(Error::hub(format!("a vision tower, without {}", missing.join(", "))).with_hints(hint));
    }
    let small =
        ["config.json"].iter().chain(&PROCESSORS).chain(&TOKENIZER).filter(|name| names.contains(**name));
    let files = small.map(|name| name.to_string()).chain(found.into_iter().flatten());
    Ok(FileChoice { files: files.collect(), entry: PathBuf::new(), note: None })
}

fn adapter(names: &BTreeSet<String>) -> Result<FileChoice> {
    /// Of our control encoder; the palette where there is one.
    const CONTROL: [&str; 3] = [
        "control_encoder/config.json",
        "control_encoder/diffusion_pytorch_model.safetensors",
        "control_encoder/palette.json",
    ];
    let names: BTreeSet<String> =
        names.iter().filter(|name| name.split('/').all(is_plain_name)).cloned().collect();
    let layout = AdapterLayout::find(&names)
        .map_err(|lack| Error::hub(format!("an adapter, found {}", lack.found)).with_hint(lack.hint))?;
    let mut files: Vec<String> = Vec::new();
    for part in &layout.parts {
        match part.form {
            AdapterForm::Peft if part.place.is_empty() => {
                files.extend([PEFT_CONFIG, PEFT_WEIGHTS].map(String::from))
            }
            AdapterForm::Peft => {
                files.extend([PEFT_CONFIG, PEFT_WEIGHTS].map(|name| format!("{}/{name}", part.place)))
            }
            // A network by itself is told from others by its config.
            AdapterForm::FullUNet if !part.place.contains('/') => {
                files.extend(
                    [names.get("config.json").cloned(), Some(part.place.clone())].into_iter().flatten(),
                );
            }
            AdapterForm::Lora | AdapterForm::FullUNet => files.push(part.place.clone()),
        }
    }
    files.extend(CONTROL.iter().filter_map(|name| names.get(*name).cloned()));
    let entry = match &layout.parts[..] {
        [part] if part.form == AdapterForm::Lora && files.len() == 1 => PathBuf::from(&part.place),
        _ => PathBuf::new(),
    };
    Ok(FileChoice { files, entry, note: layout.note("the repository") })
}

/// One network of diffusers by itself.
fn network(names: &BTreeSet<String>, what: &str) -> Result<FileChoice> {
    match weights(names, "", "diffusion_pytorch_model").filter(|_| names.contains("config.json")) {
        Some(mut files) => {
            files.insert(0, "config.json".into());
            Ok(FileChoice { files, entry: PathBuf::new(), note: None })
        }
        None => Err(Error::hub(format!("{what}: config.json with diffusion_pytorch_model.safetensors"))),
    }
}

/// One set of weight files of a part (its folder; empty: the top): full precision before fp16, a single file before shards.
fn weights(names: &BTreeSet<String>, part: &str, stem: &str) -> Option<Vec<String>> {
    let stem = if part.is_empty() { stem.to_string() } else { format!("{part}/{stem}") };
    let full = format!("{stem}.safetensors");
    let half = format!("{stem}.fp16.safetensors");
    let index = format!("{stem}.safetensors.index.json");
    let half_indexes =
        ["safetensors.index.fp16.json", "fp16.safetensors.index.json"].map(|end| format!("{stem}.{end}"));
    let sharded = |index: &String, half: bool| {
        let mut files = shards(names, &stem, half).filter(|_| names.contains(index))?;
        files.insert(0, index.clone());
        Some(files)
    };
    let single = |name: String| names.contains(&name).then(|| vec![name]);
    single(full)
        .or_else(|| sharded(&index, false))
        .or_else(|| single(half))
        .or_else(|| half_indexes.iter().find_map(|index| sharded(index, true)))
}

/// The shards `STEM-00001-of-00003.safetensors` .. of a part, if all are there. An fp16 variant is named
/// `STEM.fp16-00001-of-00003.safetensors` or `STEM-00001-of-00003.fp16.safetensors`.
fn shards(names: &BTreeSet<String>, stem: &str, half: bool) -> Option<Vec<String>> {
    let of = |name: &String| -> Option<(usize, usize)> {
        let middle = name.strip_prefix(stem)?.strip_suffix(".safetensors")?;
        let marked = middle.strip_prefix(".fp16").or_else(|| middle.strip_suffix(".fp16"));
        let (number, total) = match (half, marked) {
            (true, Some(rest)) => rest,
            (false, None) => middle,
            _ => return None,
        }
        .strip_prefix('-')?
        .split_once("-of-")?;
        Some((number.parse().ok()?, total.parse().ok()?))
    };
    let found: Vec<(String, (usize, usize))> =
        names.iter().filter_map(|name| of(name).map(|place| (name.clone(), place))).collect();
    let total = found.first()?.1.1;
    let numbers: BTreeSet<usize> =
        found.iter().filter(|(_, (_, t))| *t == total).map(|(_, (n, _))| *n).collect();
    let complete = numbers.len() == total && numbers.first() == Some(&1) && numbers.last() == Some(&total);
    complete.then(|| found.into_iter().map(|(name, _)| name).collect())
}

/// Safetensors files at the top.
fn single_files(names: &BTreeSet<String>) -> Vec<&str> {
    names.iter().map(String::as_str).filter(|n| n.ends_with(".safetensors") && is_plain_name(n)).collect()
}

/// Whether `name` is a file right inside `folder`.
fn is_in(name: &str, folder: &str) -> bool {
    name.strip_prefix(folder).and_then(|rest| rest.strip_prefix('/')).is_some_and(is_plain_name)
}

/// Whether text that a server sent can be the name of a file in a given folder and nothing else.
pub fn is_plain_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 200
        && !name.starts_with('.')
        && !name.contains(|c: char| c == '/' || c == '\\' || c.is_control())
}

fn is_pickled(name: &str) -> bool {
    PICKLED.iter().any(|end| name.ends_with(end))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|n| n.to_string()).collect()
    }

    const MODEL: [&str; 7] = [
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "vae/diffusion_pytorch_model.safetensors",
    ];

    fn with(more: &[&str]) -> BTreeSet<String> {
        set(&[&MODEL[..], more].concat())
    }

    #[test]
    fn one_set_of_weights_is_chosen_and_full_precision_first() {
        let text = "text_encoder/model.safetensors";
        let unet = |names: &[&str]| {
            let chosen = choose(&with(&[&[text], names].concat()), Wanted::Model).map(|c| c.files);
            chosen.map(|files| files.into_iter().filter(|f| f.starts_with("unet/d")).collect::<Vec<_>>())
        };
        let full = "unet/diffusion_pytorch_model.safetensors";
        let half = "unet/diffusion_pytorch_model.fp16.safetensors";
        let index = "unet/diffusion_pytorch_model.safetensors.index.json";
        let shards = ["1", "2"].map(|n| format!("unet/diffusion_pytorch_model-0000{n}-of-00002.safetensors"));
        let shards = [shards[0].as_str(), shards[1].as_str()];
        let half_index = "unet/diffusion_pytorch_model.safetensors.index.fp16.json";
        let half_shard = "unet/diffusion_pytorch_model.fp16-00001-of-00001.safetensors";
        let sharded = [index, shards[0], shards[1]];
        assert_eq!(unet(&[full, half, index, shards[0], shards[1]]).unwrap(), [full]);
        assert_eq!(unet(&[half, index, shards[0], shards[1]]).unwrap(), sharded);
        assert_eq!(
            unet(&[half, index, shards[1]]).unwrap(),
            [half],
            "a set without its first shard is no set"
        );
        assert_eq!(unet(&[half_index, half_shard]).unwrap(), [half_index, half_shard]);
        assert!(unet(&[index, half_shard]).is_err());
        assert!(unet(&["unet/diffusion_pytorch_model.bin"]).unwrap_err().to_string().contains("pickled"));
    }

    #[test]
    fn a_repository_of_another_family_is_named_before_it_is_fetched() {
        let flux = set(&["transformer/config.json", "text_encoder_2/config.json", "model_index.json"]);
        assert!(choose(&flux, Wanted::Model).unwrap_err().to_string().contains("such as Flux"));
    }

    #[test]
    fn stable_diffusion_xl_has_both_text_encoders_and_its_refiner_the_second() {
        let unet = "unet/diffusion_pytorch_model.safetensors";
        let text = "text_encoder/model.safetensors";
        let second = [
            "text_encoder_2/config.json",
            "text_encoder_2/model.safetensors",
            "tokenizer_2/vocab.json",
            "tokenizer_2/merges.txt",
        ];
        let all = with(&[&[unet, text][..], &second].concat());
        assert_eq!(BTreeSet::from_iter(choose(&all, Wanted::Model).unwrap().files), all);
        let is_first = |name: &String| name.starts_with("text_encoder/") || name.starts_with("tokenizer/");
        let refiner: BTreeSet<String> = all.iter().filter(|name| !is_first(name)).cloned().collect();
        assert_eq!(BTreeSet::from_iter(choose(&refiner, Wanted::Model).unwrap().files), refiner);
        let half = with(&[&[unet, text][..], &second[..2]].concat());
        let told = choose(&half, Wanted::Model).unwrap_err().to_string();
        assert!(told.contains("a Stable Diffusion XL folder, without tokenizer_2/vocab.json"), "{told}");
    }

    #[test]
    fn names_that_lead_elsewhere_are_never_chosen() {
        let hostile = [
            "../../x",
            "tokenizer/../../x",
            "tokenizer/..",
            "tokenizer/a/b",
            "/etc/x",
            "tokenizer/\0",
            "unet/diffusion_pytorch_model-00001-of-00001/../x.safetensors",
            "unet/diffusion_pytorch_model.safetensors",
            "text_encoder/model.safetensors",
            "safety_checker/model.safetensors",
            "..\\x.safetensors",
        ];
        let chosen = choose(&with(&hostile), Wanted::Model).unwrap();
        let expected = with(&["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"]);
        assert_eq!(BTreeSet::from_iter(chosen.files), expected);
        assert!(
            choose(&set(&["../x.safetensors", "..\\x.safetensors", ".x.safetensors"]), Wanted::Adapter)
                .is_err()
        );
    }

    #[test]
    fn adapters_are_peft_folders_or_one_file() {
        let chosen = |names: &[&str]| choose(&set(names), Wanted::Adapter);
        let peft = ["adapter_config.json", "adapter_model.safetensors"];
        let text = ["text_encoder/adapter_config.json", "text_encoder/adapter_model.safetensors"];
        let both = chosen(&[peft[0], peft[1], text[0], text[1], "other.safetensors", "README.md"]).unwrap();
        assert_eq!(
            both,
            FileChoice {
                files: [peft, text].concat().iter().map(|n| n.to_string()).collect(),
                entry: "".into(),
                note: Some("the repository also holds what is not used: other.safetensors".into()),
            }
        );
        let half = chosen(&[peft[0], peft[1], text[0]]).unwrap_err().to_string();
        assert!(
            half.contains("text_encoder/adapter_config.json without adapter_model.safetensors"),
            "{half}"
        );
        let [unet, by_step] =
            ["unet", "unet/800/sks"].map(|folder| peft.map(|name| format!("{folder}/{name}")));
        for unet in [&unet, &by_step] {
            let names = [&unet[0], &unet[1], text[0], text[1]];
            assert_eq!(chosen(&names).unwrap().files, names, "as PEFT's DreamBooth scripts save both");
        }
        let named = peft.map(|name| format!("sks/{name}"));
        assert_eq!(chosen(&[&named[0], &named[1]]).unwrap().files, named);
        let model = ["model_index.json", "unet/diffusion_pytorch_model.safetensors", "sd.safetensors"];
        assert!(chosen(&model).unwrap_err().to_string().contains("a whole model"));
        let control = ["control_encoder/config.json", "control_encoder/diffusion_pytorch_model.safetensors"];
        let with_control = chosen(&[peft[0], peft[1], control[0], control[1], "control_encoder/x"]).unwrap();
        assert_eq!(with_control.files, [peft, control].concat());
        assert_eq!(chosen(&control).unwrap().files, control, "a control encoder alone");
        let lora = chosen(&["pytorch_lora_weights.safetensors", "a.safetensors"]).unwrap();
        assert_eq!(lora.entry, PathBuf::from("pytorch_lora_weights.safetensors"));
        assert_eq!(
            chosen(&["my lora.safetensors", "x/y.safetensors"]).unwrap().files,
            ["my lora.safetensors"]
        );
        assert!(
            chosen(&["a.safetensors", "b.safetensors"])
                .unwrap_err()
                .to_string()
                .contains("a.safetensors, b.safetensors")
        );
        assert!(chosen(&["adapter_model.safetensors"]).is_err(), "weights without their settings");
        assert!(
            chosen(&["adapter_config.json", "adapter_model.bin"])
                .unwrap_err()
                .to_string()
                .contains("weights_only=True")
        );
    }

    #[test]
    fn towers_are_settings_weights_and_a_tokenizer_where_there_is_one() {
        let chosen = |names: &[&str]| choose(&set(names), Wanted::Tower);
        let settings = ["config.json", "preprocessor_config.json"];
        let all =
            [&settings[..], &["vocab.json", "merges.txt", "model.safetensors", "tf_model.h5", "README.md"]]
                .concat();
        let expected =
            ["config.json", "preprocessor_config.json", "merges.txt", "vocab.json", "model.safetensors"];
        assert_eq!(
            chosen(&all).unwrap(),
            FileChoice { files: expected.map(String::from).into(), entry: "".into(), note: None }
        );
        let shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
        let index = "model.safetensors.index.json";
        let sharded = [settings[0], settings[1], index, shards[0], shards[1]];
        assert_eq!(chosen(&sharded).unwrap().files, sharded);
        let new = ["config.json", "processor_config.json", "model.safetensors"];
        assert_eq!(chosen(&new).unwrap().files, new);
        assert!(chosen(&sharded[..4]).unwrap_err().to_string().contains("without model.safetensors"));
        let pickled = chosen(&[settings[0], "pytorch_model.bin"]).unwrap_err().to_string();
        assert!(pickled.contains("without preprocessor_config.json, model.safetensors"), "{pickled}");
        assert!(pickled.contains("refs/pr/N"), "{pickled}");
        assert!(!chosen(&[settings[0], settings[1], "x/y.bin"]).unwrap_err().to_string().contains("pickled"));
    }
}
