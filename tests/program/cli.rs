//! What users type and read: help texts, config files, and one clear message for each kind of bad input.

use crate::run_folder::leftovers;
use crate::support::base::root;
use crate::support::finished::Finished;
use crate::support::scratch::Scratch;
use crate::support::training::tiny_sd;

fn refused(done: &Finished, parts: &[&str]) {
    assert_eq!(done.code, 2, "{}", done.err);
    for part in parts {
        assert!(done.err.contains(part), "expected `{part}` in: {}", done.err);
    }
    assert!(!done.err.contains("panicked") && !done.err.contains("RUST_BACKTRACE"), "{}", done.err);
}

/// Runs training with some flags replaced, and checks that nothing was made.
fn training_is_refused(more: &[&str], parts: &[&str]) {
    let scratch = Scratch::new();
    let all = scratch.train_flags("run", more);
    let done = scratch.run(&all.iter().map(String::as_str).collect::<Vec<_>>());
    refused(&done, parts);
    assert!(!scratch.path("run").exists(), "{more:?} left a run folder");
}

#[test]
fn every_flag_of_every_command_has_a_help_text() {
    let command = hra::cli::command();
    for sub in command.get_subcommands() {
        assert!(sub.get_about().is_some(), "{}", sub.get_name());
        for arg in sub.get_arguments() {
            let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.len() > 5, "{} {}", sub.get_name(), arg.get_id());
        }
    }
    let help = Scratch::new().ok(&["train", "--help"]).out;
    for part in [
        "Prior preservation",
        "--learning-rate",
        "[default: 0.0001]",
        "Examples:",
        "hra train configs/demo.toml",
    ] {
        assert!(help.contains(part), "{part}");
    }
}

#[test]
fn every_config_in_the_folder_validates_and_is_printed_whole() {
    let scratch = Scratch::new();
    let (mut count, mut comparisons) = (0, 0);
    for entry in std::fs::read_dir(root().join("configs")).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            continue;
        }
        let table: toml::Table = toml::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        if table.contains_key("title") {
            hra::lab::compare::CompareConfig::read(&path).unwrap();
            comparisons += 1;
            continue;
        }
        let printed = scratch.ok(&["train", path.to_str().unwrap(), "--print-config", "--seed", "5"]).out;
        let table: toml::Table = toml::from_str(&printed).unwrap();
        assert_eq!(table["seed"].as_integer(), Some(5));
        let values: usize = table.values().map(|v| v.as_table().map_or(1, toml::Table::len)).sum();
        assert!(values > 40, "every effective value: {values}");
        let config: hra::train::config::TrainConfig = table.try_into().unwrap();
        config.validate().unwrap();
        count += 1;
    }
    let whole = root().join("configs/sd15-subject.toml");
    for entry in std::fs::read_dir(root().join("configs/methods")).unwrap() {
        let part = entry.unwrap().path();
        let [whole, part] = [&whole, &part].map(|path| path.to_str().unwrap());
        let printed = scratch.ok(&["train", whole, part, "--print-config", "--seed", "5"]).out;
        let table: toml::Table = toml::from_str(&printed).unwrap();
        let overlay: toml::Table = toml::from_str(&std::fs::read_to_string(part).unwrap()).unwrap();
        for (section, settings) in overlay.iter().filter(|(section, _)| *section != "output_dir") {
            let settings = settings.as_table().unwrap().iter();
            assert!({ settings }.all(|(key, value)| table[section][key] == *value), "{part}: {section}");
        }
        let folder = overlay["output_dir"].as_str().unwrap();
        assert!(table["output_dir"].as_str().unwrap().ends_with(folder), "{part}");
        assert_eq!(table["seed"].as_integer(), Some(5), "flags win over both");
        // In the other order the whole file wins.
        let printed = scratch.ok(&["train", part, whole, "--print-config"]).out;
        assert!(printed.contains("method = \"hra\"") && printed.contains("runs/sd15-subject\""), "{printed}");
        assert_eq!(
            table["data"]["instance_prompt"].as_str(),
            Some("a photo of qwe dog"),
            "from the first file"
        );
        table.try_into::<hra::train::config::TrainConfig>().unwrap().validate().unwrap();
        count += 1;
    }
    // One rate or two; a file after them is a file.
    for (rates, expected) in
        [("5e-6", "text_encoder_lr = 0.000005"), ("1e-5,5e-6", "[0.00001, 0.000005]"), ("[1e-5]", "")]
    {
        let words = ["train", "--text_encoder_lr", rates, whole.to_str().unwrap(), "--print-config"];
        let done = scratch.run(&words);
        assert_eq!(done.code, if expected.is_empty() { 2 } else { 0 }, "{}", done.err);
        assert!(done.out.contains(expected), "{}", done.out);
    }
    let rate = scratch.path("rate.toml");
    std::fs::write(&rate, "[optimizer]\ntext_encoder_lr = \"fast\"\n").unwrap();
    let done = scratch.run(&["train", whole.to_str().unwrap(), rate.to_str().unwrap(), "--print-config"]);
    let words = "[optimizer] text_encoder_lr: expected a number, or a list of numbers, found";
    assert!(done.code == 2 && done.err.contains(words), "{}", done.err);
    let broken = scratch.path("broken.toml");
    std::fs::write(&broken, "[adapter]\nrank = \"eight\"\n").unwrap();
    let done = scratch.run(&["train", whole.to_str().unwrap(), broken.to_str().unwrap(), "--print-config"]);
    assert!(done.code == 2 && done.err.contains("broken.toml: [adapter] rank: "), "{}", done.err);
    let done = scratch.run(&["train", whole.to_str().unwrap(), "--center_crop", "false"]);
    assert!(
        done.code == 2 && done.err.contains("cannot read false: No such file or directory"),
        "{}",
        done.err
    );
    assert!(comparisons >= 7, "quick, full, search, the paper's subjects, and control");
    assert!(count >= 10, "the demo, control, and the methods of the paper's table");
}

#[test]
fn words_of_other_trainers_are_accepted_and_settings_have_an_order() {
    let scratch = Scratch::new();
    let config = root().join("configs/demo.toml");
    let printed = scratch.ok(&[
        "train",
        config.to_str().unwrap(),
        "--print_config",
        "--mixed_precision=bf16",
        "--learning_rate",
        "1e-3",
        "--report_to",
        "tensorboard",
        "--adam_weight_decay=0.5",
    ]);
    let table: toml::Table = toml::from_str(&printed.out).unwrap();
    assert_eq!(table["model"]["dtype"].as_str(), Some("bf16"));
    assert_eq!(table["optimizer"]["learning_rate"].as_float(), Some(1e-3), "flags win over the file");
    assert_eq!(table["schedule"]["train_batch_size"].as_integer(), Some(2), "the file wins over defaults");
    assert_eq!(table["optimizer"]["adam_beta1"].as_float(), Some(0.9));
    assert!(printed.err.contains("--report-to has no effect here"));
}

#[test]
fn bad_settings_are_listed_together() {
    training_is_refused(
        &["--rank", "7", "--train_batch_size", "0", "--instance_prompt", " "],
        &["expected an even number", "--allow-odd-rank", "train_batch_size", "instance_prompt"],
    );
    let nothing = Scratch::new().run(&["train"]);
    refused(
        &nothing,
        &["pretrained_model_name_or_path: a model folder is needed", "instance_data_dir", "instance_prompt"],
    );
    training_is_refused(&["--method", "full", "--train_text_encoder"], &["full trains the UNet alone"]);
    training_is_refused(
        &["--method", "lora", "--gram_schmidt", "--block_size", "4"],
        &["gram_schmidt", "block_size"],
    );
    let blocks = ["expected a number of blocks that divides", "found 5", "hint: 1, 2, 4, 8", "attn1.to_q"];
    training_is_refused(&["--method", "oft", "--rank", "5"], &blocks);
    training_is_refused(
        &["--method", "boft", "--block_size", "7"],
        &["expected a size that divides", "found 7"],
    );
    training_is_refused(&["--target_modules", "to_x"], &["matches none", "layers are"]);
    training_is_refused(&["--resolution", "66"], &["expected a multiple of 4", "found 66"]);
    training_is_refused(&["--device", "gpu"], &["auto, cpu, cuda"]);
    training_is_refused(&["--no-such-flag"], &["--no-such-flag"]);
}

#[test]
fn config_files_with_mistakes_name_the_file_and_the_key() {
    let scratch = Scratch::new();
    for (text, part) in [
        ("learning_rat = 1", "learning_rat: unknown field; the nearest is [optimizer] learning_rate"),
        (
            "[schedule]\nlearning_rat = 1",
            "[schedule] learning_rat: unknown field; the nearest is [optimizer] learning_rate",
        ),
        (
            "[adapter]\nlearning_rate = 1",
            "[adapter] learning_rate: it belongs to another section: [optimizer] learning_rate",
        ),
        ("[schedule]\nseed = 1", "[schedule] seed: it stands before the first section: seed"),
        (
            "[optimizer]\nlearning_rate = 'fast'",
            "[optimizer] learning_rate: expected a number, found \"fast\"",
        ),
        (
            "[adapter]\nmethod = 'lora'\ngram_schmidt = true",
            "[adapter] gram_schmidt: only the methods hra, hra-magnitude have it",
        ),
        (
            "[adapter]\nmethod = 'hra'\nlora_alpha = 2.0",
            "[adapter] lora_alpha: only the methods lora, dora have it",
        ),
        ("[adapter]\nrank = 4\nhra_r = 8", "[adapter] rank: given twice, by two of its names: rank, hra_r"),
        ("[optimiser]\nlearning_rate = 1", "[optimiser]: unknown section; the nearest is [optimizer]"),
        ("adapter = []", "adapter: expected a section [adapter], found array"),
        ("optimizer = 3", "optimizer: expected a section [optimizer], found integer"),
        // As earlier versions had them.
        ("learning_rate = 1", "learning_rate: settings have sections now: [optimizer] learning_rate"),
        ("apply_gs = true", "apply_gs: settings have sections now: [adapter] gram_schmidt"),
        (
            "model = 'dir'",
            "model: expected a section [model], found string; write [model] pretrained_model_name_or_path = \"dir\"",
        ),
        // Nothing is like it.
        ("[optimizer]\nzzqqzz = 1", "[optimizer] zzqqzz: unknown field\nhint"),
        ("[zzqqzz]\na = 1", "[zzqqzz]: unknown section; the sections are [model], [data], "),
        (
            "[adapter]\ntarget_modules = 'to_q'",
            "[adapter] target_modules: expected a list of texts, such as [\"a\", \"b\"], found \"to_q\"",
        ),
        (
            "[schedule]\nmax_train_steps = 1.5",
            "[schedule] max_train_steps: expected a whole number, found 1.5",
        ),
        ("[adapter]\nrank = ", "TOML"),
        ("[adapter]\nmethod = 'magic'", "magic"),
    ] {
        std::fs::write(scratch.path("bad.toml"), text).unwrap();
        let done = scratch.run(&["train", "bad.toml", "--print-config"]);
        refused(&done, &["bad.toml", part]);
    }
    refused(&scratch.run(&["train", "none.toml"]), &["cannot read none.toml", "between quotes"]);
}

#[test]
fn files_of_trainings_and_of_comparisons_are_not_taken_for_one_another() {
    let scratch = Scratch::new();
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/");
    let (training, comparison) = (format!("{root}demo.toml"), format!("{root}compare-quick.toml"));
    refused(
        &scratch.run(&["train", &comparison]),
        &["one training", "of a comparison", "hint: hra compare "],
    );
    refused(&scratch.run(&["compare", &training]), &["a comparison", "of one training", "hint: hra train "]);
}

#[test]
fn what_means_nothing_there_is_refused_or_said() {
    training_is_refused(
        &["--print-config", "--learning_rate", "nan"],
        &["learning_rate: expected a number above 0"],
    );
    training_is_refused(&["--canny_low", "3"], &["canny_low", "only with train_data_dir"]);
    training_is_refused(&["--caption_column", "words"], &["caption_column", "only with train_data_dir"]);
    let scratch = Scratch::new();
    let flags = scratch
        .train_flags("run", &["--method", "full", "--target_modules", "to_q", "--max_train_steps", "1"]);
    let done = scratch.ok(&flags.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(
        done.err.contains("note: target_modules has no effect: method full trains every layer"),
        "{}",
        done.err
    );
    let drawn = scratch.run(&[
        "sample",
        "--model",
        "m",
        "--adapter",
        "a",
        "--strength",
        "0.5",
        "--prompt",
        "p",
        "--output",
        "o",
    ]);
    refused(&drawn, &["--strength: expected --image", "--adapter DIR=0.5"]);
}

#[test]
fn bad_data_is_refused_before_anything_is_written() {
    let scratch = Scratch::new();
    let folder = |name: &str, file: Option<(&str, &[u8])>| {
        let dir = scratch.path(name);
        std::fs::create_dir(&dir).unwrap();
        if let Some((file, bytes)) = file {
            std::fs::write(dir.join(file), bytes).unwrap();
        }
        dir.to_str().unwrap().to_string()
    };
    let empty = folder("empty", None);
    let text = folder("text", Some(("a.png", b"not a picture")));
    let png = std::fs::read(root().join("assets/subjects/cat/train/00.png")).unwrap();
    let cut = folder("cut", Some(("a.png", &png[..png.len() / 2])));
    training_is_refused(&["--instance_data_dir", &empty], &["empty"]);
    training_is_refused(&["--instance_data_dir", &text], &["a.png"]);
    training_is_refused(&["--instance_data_dir", &cut], &["a.png"]);
    training_is_refused(&["--instance_data_dir", "/nowhere/at/all"], &["/nowhere/at/all"]);
}

#[test]
fn folders_that_cannot_be_made_are_named() {
    let scratch = Scratch::new();
    std::fs::write(scratch.path("file"), "").unwrap();
    let all = scratch.train_flags("file/run", &[]);
    let done = scratch.run(&all.iter().map(String::as_str).collect::<Vec<_>>());
    refused(&done, &["file/run"]);
    let model = tiny_sd();
    let done = scratch.run(&[
        "sample",
        "--model",
        model.to_str().unwrap(),
        "--prompt",
        "x",
        "--steps",
        "1",
        "--output",
        "file/out",
    ]);
    refused(&done, &["file/out"]);
}

/// A copy of the embedded model whose large files are links, with one file replaced.
fn broken_model(scratch: &Scratch, name: &str, replace: &str, bytes: &[u8]) -> String {
    let copy = scratch.path(name);
    for part in ["unet", "vae", "text_encoder", "tokenizer", "scheduler"] {
        std::fs::create_dir_all(copy.join(part)).unwrap();
        for entry in std::fs::read_dir(tiny_sd().join(part)).unwrap() {
            let from = entry.unwrap().path();
            std::os::unix::fs::symlink(&from, copy.join(part).join(from.file_name().unwrap())).unwrap();
        }
    }
    std::fs::remove_file(copy.join(replace)).unwrap_or_else(|e| panic!("{replace}: {e}"));
    std::fs::write(copy.join(replace), bytes).unwrap();
    copy.to_str().unwrap().to_string()
}

#[test]
fn broken_models_are_refused_with_every_problem() {
    let scratch = Scratch::new();
    let sample = |model: &str| {
        scratch.run(&["sample", "--model", model, "--prompt", "x", "--steps", "1", "--output", "out"])
    };
    let weights = "unet/diffusion_pytorch_model.safetensors";
    let good = std::fs::read(tiny_sd().join(weights)).unwrap();

    refused(
        &sample(&broken_model(&scratch, "cut", weights, &good[..good.len() - 100])),
        &[weights, "bytes where its header promises"],
    );
    refused(
        &sample(&broken_model(&scratch, "tiny", weights, b"abc")),
        &[weights, "expected a safetensors file"],
    );
    let mut hostile = u64::MAX.to_le_bytes().to_vec();
    hostile.extend(b"{}");
    refused(
        &sample(&broken_model(&scratch, "hostile", weights, &hostile)),
        &["promise a header of 18446744073709551615"],
    );
    let huge = br#"{"w":{"dtype":"F32","shape":[4611686018427387904,8],"data_offsets":[0,16]}}"#;
    let mut overflow = (huge.len() as u64).to_le_bytes().to_vec();
    overflow.extend(huge);
    overflow.extend([0u8; 16]);
    refused(&sample(&broken_model(&scratch, "overflow", weights, &overflow)), &["broken header"]);

    // Another width in the config: every tensor that does not fit is told at once.
    let config = std::fs::read_to_string(tiny_sd().join("unet/config.json")).unwrap();
    let wider = config.replacen("64,\n    128,\n    192", "64,\n    128,\n    256", 1);
    assert_ne!(wider, config);
    let done = sample(&broken_model(&scratch, "wide", "unet/config.json", wider.as_bytes()));
    refused(&done, &["problems with the weights", "expected shape [256", "mid_block"]);
    assert!(done.err.lines().count() > 20, "{}", done.err);
    let absurd = config.replacen("192", "19200000000000", 1);
    refused(
        &sample(&broken_model(&scratch, "absurd", "unet/config.json", absurd.as_bytes())),
        &["unet/config.json"],
    );
    let sdxl = config.replacen("\"addition_embed_type\": null", "\"addition_embed_type\": \"text_time\"", 1);
    refused(
        &sample(&broken_model(&scratch, "sdxl", "unet/config.json", sdxl.as_bytes())),
        &["expected a Stable Diffusion XL folder, found no text_encoder_2/, no tokenizer_2/"],
    );

    refused(&sample("nowhere"), &["nowhere", "expected a Stable Diffusion folder, found nothing"]);
    let lone = scratch.path("lone");
    std::fs::create_dir(&lone).unwrap();
    refused(&sample(lone.to_str().unwrap()), &["found no unet/, no vae/"]);
    assert!(!scratch.path("out").exists());
    assert!(leftovers(scratch.dir.path()).is_empty());
}

#[test]
fn bad_requests_to_sample_are_refused_before_the_folder_is_made() {
    let scratch = Scratch::new();
    let model = tiny_sd();
    let model = model.to_str().unwrap();
    let sample = |more: &[&str]| {
        let mut args = vec!["sample", "--model", model, "--output", "out"];
        args.extend(more);
        scratch.run(&args)
    };
    refused(&sample(&[]), &["expected a prompt"]);
    refused(&sample(&["--prompt", "x", "--width", "66"]), &["--width: expected a multiple of 4"]);
    refused(&sample(&["--prompt", "x", "--steps", "0"]), &["steps"]);
    refused(&sample(&["--prompt", "x", "--scheduler", "magic"]), &["magic", "ddim"]);
    refused(&sample(&["--prompt", "x", "--adapter", "none"]), &["none", "adapter_config.json"]);
    refused(&sample(&["--prompt", "x", "--with-base"]), &["--adapter"]);
    refused(&sample(&["--prompt", "x", "--latents", "none.safetensors"]), &["none.safetensors"]);
    refused(&sample(&["--prompt", "x", "--batch-size", "0"]), &["--batch-size"]);
    assert!(!scratch.path("out").exists());
}

#[test]
fn cuda_that_is_not_there_is_refused_with_what_is_missing() {
    if hra::platform::device::resolve("cuda".parse().unwrap(), None).is_ok() {
        return;
    }
    let scratch = Scratch::new();
    let model = tiny_sd();
    let done = scratch.run(&[
        "sample",
        "--model",
        model.to_str().unwrap(),
        "--prompt",
        "x",
        "--output",
        "out",
        "--device",
        "cuda",
    ]);
    refused(&done, &["cuda", "hint"]);
}

#[test]
fn printed_settings_read_back_to_the_same_run_and_those_of_earlier_versions_too() {
    let scratch = Scratch::new();
    let words = [
        "train",
        "--method",
        "coft",
        "--lr_scheduler",
        "cosine",
        "--target_modules",
        "to_q,to_k",
        "--print-config",
    ];
    let printed = scratch.ok(&words).out;
    let file = scratch.path("printed.toml");
    std::fs::write(&file, &printed).unwrap();
    assert_eq!(scratch.ok(&["train", file.to_str().unwrap(), "--print-config"]).out, printed);
    // Without sections, and with the settings of all methods, as a run's config.toml once was.
    let sections: toml::Table = toml::from_str(&printed).unwrap();
    let mut flat = toml::Table::new();
    for (name, value) in sections {
        match value {
            toml::Value::Table(section) => flat.extend(section),
            value => drop(flat.insert(name, value)),
        }
    }
    flat.insert("hra_lambda".into(), 0.0.into());
    flat.insert("use_rslora".into(), false.into());
    std::fs::write(&file, toml::to_string(&flat).unwrap()).unwrap();
    let read = hra::train::config::TrainConfig::read(&file).unwrap();
    assert_eq!(read.to_toml().unwrap(), printed);
    for odd in ["adapter = []\nrank = 8", "data = 1\nresolution = 64", "[[adapter]]"] {
        std::fs::write(&file, odd).unwrap();
        let told = hra::train::config::TrainConfig::read(&file).unwrap_err().to_string();
        assert!(told.contains("expected a section"), "{odd}: {told}");
    }
}

#[test]
fn the_document_of_settings_has_every_setting_in_its_section() {
    let text = std::fs::read_to_string(root().join("docs/settings.md")).unwrap();
    for key in hra::train::config::keys::keys() {
        let heading = key
            .section
            .name()
            .map_or("Before the first section\n".to_string(), |name| format!("`[{name}]`\n"));
        let section = text.split("\n## ").find(|part| part.starts_with(&heading));
        let section = section.unwrap_or_else(|| panic!("no section {heading}"));
        let row = section.lines().find(|line| line.starts_with(&format!("| `{}`", key.name)));
        let row = row.unwrap_or_else(|| panic!("{} has no row", key.place()));
        assert!(row.contains(&format!("| {} |", key.about)) && row.contains(key.unset), "{row}");
        assert!(key.others.iter().all(|other| row.contains(&format!("`{other}`"))), "{row}");
    }
}
