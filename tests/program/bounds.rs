//! Inputs larger than anyone's: each is refused with what was found and the bound, before it takes the memory or the time.

use crate::support::base::root;
use crate::support::finished::Finished;
use crate::support::memory::measured;
use crate::support::scratch::Scratch;
use crate::support::training::tiny_sd;
use hra::data::caption::MAX_CAPTION_BYTES;
use hra::data::image::decode::MAX_DECODED_BYTES;
use hra::data::image::{RgbImage, save_png};
use hra::lab::compare::config::MAX_TRAININGS;
use hra::platform::device::MAX_THREADS;
use std::borrow::Cow;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Stdio;

fn refused(done: &Finished, words: &[&str]) {
    assert_eq!(done.code, 2, "{}", done.err);
    assert!(words.iter().all(|word| done.err.contains(word)), "{words:?} in:\n{}", done.err);
    assert!(done.err.len() < 2000, "the text is not told whole: {} bytes", done.err.len());
}

/// Flags of a drawing of one step.
fn draw<'a>(model: &'a Path, more: &[&'a str]) -> Vec<&'a str> {
    let own = ["sample", "--model", model.to_str().unwrap(), "--steps", "1", "--output", "out"];
    [&own[..], more].concat()
}

fn small() -> RgbImage {
    RgbImage::from_fn(16, 16, |x, y| [x as u8 * 15, y as u8 * 15, 90].into())
}

#[test]
fn a_caption_file_of_a_megabyte_is_refused_by_its_name_and_size() {
    let scratch = Scratch::new();
    fs::create_dir(scratch.path("drawn")).unwrap();
    save_png(&scratch.path("drawn/00.png"), &small(), &[]).unwrap();
    fs::write(scratch.path("drawn/00.txt"), "a cat ".repeat(200_000)).unwrap();
    let clip = root().join("assets/tiny-clip");
    let words = ["evaluate", "drawn", "--clip", clip.to_str().unwrap()];
    let bound = format!("at most {MAX_CAPTION_BYTES} bytes");
    refused(&scratch.run(&words), &["drawn/00.txt", &bound, "found 1200000"]);
    // What the picture says of itself, which comes first.
    save_png(&scratch.path("drawn/00.png"), &small(), &[("prompt".into(), "a cat ".repeat(20_000))]).unwrap();
    refused(&scratch.run(&words), &["drawn/00.png", &bound, "found 120000"]);
}

#[test]
fn a_prompt_longer_than_any_is_refused_and_the_longest_is_cut_and_told() {
    let scratch = Scratch::new();
    let model = tiny_sd();
    let longest = "cat ".repeat(MAX_CAPTION_BYTES / 4 - 1) + "cats";
    fs::write(scratch.path("prompts"), format!("a cat\n\n# cats\n{longest}s\n")).unwrap();
    let bound =
        format!("at most {MAX_CAPTION_BYTES} bytes (models read 77 tokens), found {}", longest.len() + 1);
    let words = draw(&model, &["--prompt-file", "prompts"]);
    refused(&scratch.run(&words), &["prompts: line 4: ", &bound]);
    fs::write(scratch.path("prompts"), longest.as_bytes()).unwrap();
    let told = scratch.ok(&words).err;
    assert!(told.contains("tokens more than the"), "{}", &told[told.len() - 200..]);
    // From a config file no flag's length bounds it.
    let config = format!("[data]\ninstance_prompt = \"{longest}s\"\n");
    fs::write(scratch.path("c.toml"), config).unwrap();
    let mut train = scratch.train_flags("run", &["--max_train_steps", "1", "c.toml"]);
    let at = train.iter().position(|word| word == "--instance_prompt").unwrap();
    train.drain(at..at + 2);
    let train: Vec<&str> = train.iter().map(String::as_str).collect();
    refused(&scratch.run(&train), &["prompt `cat cat ", &bound]);
}

#[test]
fn a_file_of_a_million_prompts_and_one_is_refused() {
    let scratch = Scratch::new();
    fs::write(scratch.path("prompts"), "a\n".repeat(1_000_001)).unwrap();
    let done = scratch.run(&draw(&tiny_sd(), &["--prompt-file", "prompts"]));
    refused(&done, &["prompts: expected at most 1000000 prompts, found more"]);
    assert!(!scratch.path("out").exists());
}

#[test]
fn a_pair_whose_caption_is_longer_than_any_is_left_out_with_the_reason() {
    let scratch = Scratch::new();
    fs::create_dir(scratch.path("photos")).unwrap();
    save_png(&scratch.path("photos/0.png"), &small(), &[]).unwrap();
    let row = |text: &str| serde_json::json!({"file_name": "0.png", "text": text}).to_string();
    let rows = [row(&"a cat ".repeat(200_000)), row("a cat")].join("\n");
    fs::write(scratch.path("photos/metadata.jsonl"), rows).unwrap();
    let done = scratch.ok(&["prepare", "canny", "photos", "--low", "1", "--high", "2"]);
    assert!(done.out.starts_with("1 condition in photos/canny, 1 skipped"), "{}", done.out);
    assert!(done.err.contains("line 1: expected a prompt of at most 65536 bytes"), "{}", done.err);
}

/// A PNG of 8 x 8 pixels with a colour profile of this many zeros.
fn with_profile(path: &Path, colour: png::ColorType, bytes: usize) {
    let mut info = png::Info::with_size(8, 8);
    (info.color_type, info.bit_depth) = (colour, png::BitDepth::Eight);
    info.icc_profile = Some(Cow::Owned(vec![0; bytes]));
    let mut file = fs::File::create(path).unwrap();
    let mut writer = png::Encoder::with_info(&mut file, info).unwrap().write_header().unwrap();
    let pixels: Vec<u8> = (0..64 * colour.samples()).map(|i| (i * 37 % 256) as u8).collect();
    writer.write_image_data(&pixels).unwrap();
    writer.finish().unwrap();
}

#[test]
fn a_colour_profile_of_half_a_gigabyte_is_passed_over() {
    const PROFILE: u64 = 512 << 20;
    let scratch = Scratch::new();
    for (folder, colour) in [("photos", png::ColorType::Rgb), ("maps", png::ColorType::Grayscale)] {
        fs::create_dir(scratch.path(folder)).unwrap();
        with_profile(&scratch.path(folder).join("a.png"), colour, PROFILE as usize);
    }
    assert!(fs::metadata(scratch.path("photos/a.png")).unwrap().len() < 1 << 20);
    let colours: Vec<[u8; 3]> = (0..=255).map(|i| [i, i, i]).collect();
    fs::write(scratch.path("palette.json"), serde_json::to_string(&colours).unwrap()).unwrap();
    for words in [
        &["prepare", "canny", "photos", "--low", "1", "--high", "2"][..],
        &["prepare", "segmentation", "maps", "--palette", "palette.json"],
        &["evaluate", "photos", "--base", "photos"],
    ] {
        let (done, bytes) = measured(&scratch, scratch.command(words));
        assert_eq!(done.code, 0, "{words:?}: {}", done.err);
        assert!(bytes < PROFILE, "{words:?} took {} MiB", bytes >> 20);
    }
}

/// CRC-32 of PNG (ISO 3309), bit by bit.
fn crc(bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg()))
    };
    !bytes.iter().fold(!0, step)
}

/// A PNG of a few bytes that says it has `side` x `side` pixels of RGBA in 16 bits.
fn claimed(path: &Path, side: u32) {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, 1, 1);
    encoder.set_color(png::ColorType::Rgba);
    encoder.set_depth(png::BitDepth::Sixteen);
    let mut writer = encoder.write_header().unwrap();
    writer.write_image_data(&[0; 8]).unwrap();
    writer.finish().unwrap();
    // After the signature: length, `IHDR`, width, height, 5 bytes of kind, CRC.
    for at in [16, 20] {
        bytes[at..at + 4].copy_from_slice(&side.to_be_bytes());
    }
    let sum = crc(&bytes[12..29]);
    bytes[29..33].copy_from_slice(&sum.to_be_bytes());
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_picture_that_would_take_gigabytes_is_refused_by_its_header() {
    let scratch = Scratch::new();
    fs::create_dir(scratch.path("photos")).unwrap();
    claimed(&scratch.path("photos/a.png"), 13_377);
    let (done, bytes) = measured(&scratch, scratch.command(&["prepare", "canny", "photos"]));
    let most = format!("takes at most {} MiB while it is read", MAX_DECODED_BYTES >> 20);
    refused(&done, &["photos/a.png", &most, "found a PNG image of 13377x13377 that takes 1877"]);
    assert!(bytes < 1 << 30, "{} MiB", bytes >> 20);
    // A smaller one is read, until its pixels are missed.
    claimed(&scratch.path("photos/a.png"), 1000);
    refused(&scratch.run(&["prepare", "canny", "photos"]), &["photos/a.png", "broken or truncated PNG"]);
}

#[test]
fn twenty_thousand_threads_are_refused_with_what_the_machine_has() {
    let scratch = Scratch::new();
    save_png(&scratch.path("a.png"), &small(), &[]).unwrap();
    let model = tiny_sd();
    let draw = draw(&model, &["--prompt", "a cat"]);
    let evaluate = ["evaluate", "a.png", "--base", "."];
    let train = scratch.train_flags("run", &["--max_train_steps", "1"]);
    let train: Vec<&str> = train.iter().map(String::as_str).collect();
    let cores = std::thread::available_parallelism().unwrap();
    let told = [
        format!("threads: expected 1 to {MAX_THREADS}, found 20000"),
        format!("this machine has {cores} core"),
    ];
    for words in [&draw[..], &evaluate, &train] {
        let done = scratch.run(&[words, &["--threads", "20000"]].concat());
        refused(&done, &[&told[0], &told[1]]);
    }
    assert!(!scratch.path("run").exists() && !scratch.path("out").exists());
}

/// Those that compute and those that read pictures: until now the latter were as many as there are cores.
#[test]
fn one_thread_means_one_for_reading_pictures_too() {
    let scratch = Scratch::new();
    fs::create_dir(scratch.path("photos")).unwrap();
    let picture = RgbImage::from_fn(700, 700, |x, y| [(x * y % 251) as u8, x as u8, y as u8].into());
    save_png(&scratch.path("photos/a.png"), &picture, &[]).unwrap();
    let mut table = fs::File::create(scratch.path("photos/metadata.jsonl")).unwrap();
    for _ in 0..60 {
        writeln!(table, "{{\"file_name\": \"a.png\", \"text\": \"a cat\"}}").unwrap();
    }
    let model = tiny_sd();
    let pairs = ["--pairs", "photos", "--num-pairs", "1", "--condition", "canny", "--threads", "1"];
    let mut command = scratch.command(&draw(&model, &pairs));
    command.env_remove("OMP_NUM_THREADS").stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let mut most = 0;
    while child.try_wait().unwrap().is_none() {
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let count = status.lines().find_map(|line| line.strip_prefix("Threads:"));
        most = most.max(count.map_or(0, |count| count.trim().parse::<usize>().unwrap()));
    }
    // The program itself, and one that waits for signals.
    assert!((1..=2).contains(&most), "{most} threads");
}

#[test]
fn a_comparison_of_more_trainings_than_anyone_lives_to_see_is_refused() {
    let scratch = Scratch::new();
    let config = |seeds: usize| {
        let assets = root().join("assets");
        let seeds: Vec<String> = (0..seeds).map(|seed| seed.to_string()).collect();
        format!(
            "title = \"t\"\noutput_dir = \"out\"\nseeds = [{}]\n[train.model]\npretrained_model_name_or_path = \"{assets}/tiny-sd\"\n\
             [train.data]\nresolution = 64\n[draw]\nprompts = [\"a {{subject}}\"]\n[scores]\nclip = \"{assets}/tiny-clip\"\n\
             [[subject]]\nname = \"cat\"\nclass = \"cat\"\ndata_dir = \"{assets}/subjects/cat/train\"\n\
             instance_prompt = \"a {{subject}}\"\n[[method]]\nlabel = \"HRA\"\nadapter = {{ method = \"hra\", rank = 2 }}\n",
            seeds.join(","),
            assets = assets.display()
        )
    };
    fs::write(scratch.path("c.toml"), config(MAX_TRAININGS + 1)).unwrap();
    let expected = format!("at most {MAX_TRAININGS} trainings, found {}", MAX_TRAININGS + 1);
    refused(&scratch.run(&["compare", "c.toml", "--dry-run"]), &[&expected, "seeds and rates 100001"]);
    refused(&scratch.run(&["compare", "c.toml"]), &[&expected]);
    assert!(!scratch.path("out").exists());
    fs::write(scratch.path("c.toml"), config(300)).unwrap();
    assert!(scratch.ok(&["compare", "c.toml", "--dry-run"]).out.contains("300 trainings planned"));
}
