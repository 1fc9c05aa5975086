//! Hostile files: every reader on good files and on some hundred damaged ones. None may panic, take memory without bound,
//! or write outside of the folder it was given. The same readers run without an end under libFuzzer (`tests/fuzz/`).
//!
//! `make fuzz MINUTES=10` (`tools/fuzz.py`) goes on with other seeds for as long as it is told: `HRA_FUZZ_READER` names one reader,
//! `HRA_FUZZ_SECONDS` is its time, `HRA_FUZZ_SEED` its first seed, and each input lies in the file `HRA_FUZZ_INPUT` while it is read, so
//! that one that ends the process is there afterwards. A failure names reader, seed and length.

use crate::corpus::{Files, corpus};
use crate::mutate::{self, Rng, mutate};
use crate::support::base::pin_threads;
use crate::support::process::alone;
use crate::support::readers;
use hra::platform::device::peak_process_memory;
use hra::weights::checkpoint::EMBEDDED;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Instant;

/// More than any input or model here needs, less than a size that a file claims.
const MOST_GROWTH: u64 = 256 << 20;

/// What a reader's panic said, and whether one is at work.
static PANIC: Mutex<String> = Mutex::new(String::new());
static READING: AtomicBool = AtomicBool::new(false);

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
    alone("fuzz::no_reader_falls_over_hostile_files", read_all);
}

/// A number that the environment says.
fn asked(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}: expected a number, found {text}")))
}

fn read_all() {
    pin_threads();
    let seconds = asked("HRA_FUZZ_SECONDS");
    let first = asked("HRA_FUZZ_SEED").unwrap_or(0);
    let only = std::env::var("HRA_FUZZ_READER").ok();
    let current = std::env::var_os("HRA_FUZZ_INPUT");
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
        let mut tried = 0;
        for seed in (0..).map(|i| first.wrapping_add(i)) {
            // A time where one is given, else the reader's own number.
            let over = match seconds {
                Some(seconds) => start.elapsed().as_secs() >= seconds,
                None => tried == *count,
            };
            if over {
                break;
            }
            tried += 1;
            let input = damaged(&mut Rng::new(seed), good);
            if let Some(path) = &current {
                fs::write(path, &input).unwrap();
            }
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
            "{name}: {tried} inputs in {:.1} s, slowest {:.2} s (seed {}), {} MB more",
            start.elapsed().as_secs_f64(),
            slowest.0,
            slowest.1,
            growth >> 20
        );
    }
    let told: Vec<String> = faults.iter().map(|(what, input)| format!("{input}: {what}")).collect();
    assert!(told.is_empty(), "{} faults\n{}", told.len(), told.join("\n"));
}
