//! Trainings that were killed, or whose folder was taken away, at moments that are hard to hit: what a resumed run ends with, and
//! what a run does that cannot be gone on with.

use crate::run_folder::{adapter, leftovers};
use crate::support::finished::{Finished, finished};
use crate::support::records::records;
use crate::support::scratch::Scratch;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

/// Trains into `out` and does `act` to the process once `there` is true.
fn disturbed(
    scratch: &Scratch,
    out: &str,
    more: &[&str],
    there: impl Fn() -> bool,
    act: impl Fn(&Child),
) -> Finished {
    let all = scratch.train_flags(out, more);
    let mut child = scratch.start(&all.iter().map(String::as_str).collect::<Vec<_>>());
    let started = Instant::now();
    while !there() {
        assert!(child.try_wait().unwrap().is_none(), "the run ended before it was disturbed");
        assert!(started.elapsed() < Duration::from_secs(300), "waited too long");
        std::thread::sleep(Duration::from_millis(5));
    }
    act(&child);
    finished(child.wait_with_output().unwrap())
}

fn signal(child: &Child, signal: i32) {
    // SAFETY: sends a signal to our own child.
    unsafe { libc::kill(child.id() as i32, signal) };
}

fn resume(scratch: &Scratch, out: &str, steps: &str) -> Finished {
    let run = scratch.path(out);
    let run = run.to_str().unwrap();
    scratch.ok(&["train", "--resume", "latest", "--output_dir", run, "--max_train_steps", steps])
}

/// The files below `dir`, by their paths.
fn tree(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for path in std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()) {
        if path.is_dir() {
            let below = tree(&path).into_iter();
            files.extend(below.map(|(name, bytes)| (Path::new(path.file_name().unwrap()).join(name), bytes)));
        } else {
            files.insert(path.file_name().unwrap().into(), std::fs::read(&path).unwrap());
        }
    }
    files
}

#[test]
fn a_kill_between_class_pictures_of_one_batch_changes_neither_them_nor_the_adapter() {
    let scratch = Scratch::new();
    let flags = |class: &'static str, steps: &'static str| {
        let common = ["--num_class_images", "4", "--class_steps", "4", "--class_prompt", "a robot"];
        [&["--class_data_dir", class, "--max_train_steps", steps][..], &common].concat()
    };
    scratch.train("whole", &flags("class-whole", "3"));
    let last = scratch.path("class-parts/class-00003.png");
    let killed = disturbed(
        &scratch,
        "parts",
        &flags("class-parts", "400"),
        || last.is_file(),
        |child| signal(child, libc::SIGKILL),
    );
    assert_eq!(killed.code, -libc::SIGKILL);
    // As a kill after the third of the four leaves it.
    std::fs::remove_file(&last).unwrap();
    let told = resume(&scratch, "parts", "3").err;
    assert!(told.contains("1 made, 3 there before"), "{told}");
    let [whole, parts] = ["class-whole", "class-parts"].map(|name| tree(&scratch.path(name)));
    assert_eq!(whole.len(), 5, "four pictures and a note");
    assert!(whole == parts, "the same class pictures, to the byte");
    assert_eq!(adapter(&scratch.path("parts")), adapter(&scratch.path("whole")));
}

#[test]
fn previews_that_a_stop_took_are_drawn_on_resuming() {
    for how in [libc::SIGKILL, libc::SIGTERM] {
        let scratch = Scratch::new();
        let flags = |steps: &'static str| {
            let previews = ["--validation_prompt", "a cat face", "--validation_steps", "2", "--use_ema"];
            let sizes = ["--num_validation_images", "2", "--validation_inference_steps", "25"];
            let steps = ["--checkpointing_steps", "2", "--max_train_steps", steps];
            [&previews[..], &sizes, &steps].concat()
        };
        let run = scratch.path("run");
        let first = run.join("checkpoints/step-000002");
        let stopped =
            disturbed(&scratch, "run", &flags("400"), || first.is_dir(), |child| signal(child, how));
        assert_eq!(stopped.code, if how == libc::SIGTERM { 130 } else { -how }, "{}", stopped.err);
        // Whatever the moment was: as it is before the previews of the last checkpoint, with a half of them beside.
        let names = std::fs::read_dir(run.join("checkpoints")).unwrap().map(|e| e.unwrap().file_name());
        let last = names.filter(|name| name.to_string_lossy().starts_with("step-")).max().unwrap();
        let _ = std::fs::remove_dir_all(run.join("samples").join(&last));
        std::fs::create_dir_all(run.join("samples/.tmp-1-0")).unwrap();
        let steps = last.to_string_lossy()[5..].trim_start_matches('0').to_string();
        resume(&scratch, "run", &steps);
        assert!(leftovers(&run).is_empty(), "{:?}", leftovers(&run));
        // The pictures name the folder: the undisturbed run takes the same.
        std::fs::rename(&run, scratch.path("resumed")).unwrap();
        scratch.train("run", &flags(steps.leak()));
        let [resumed, whole] = ["resumed", "run"].map(|name| tree(&scratch.path(name).join("samples")));
        assert!(whole.contains_key(&Path::new(&last).join("grid.png")));
        assert!(resumed == whole, "{:?}, of {:?}", resumed.keys(), whole.keys());
        assert_eq!(adapter(&scratch.path("resumed")), adapter(&run));
    }
}

#[test]
fn a_run_whose_folder_is_taken_away_stops_and_makes_nothing_anew() {
    // Taken away between two checkpoints, and where one is likely to be on its way.
    for (another_in_its_place, checkpoints) in [(false, "40"), (true, "2")] {
        let scratch = Scratch::new();
        let run = scratch.path("run");
        let more = ["--max_train_steps", "80", "--checkpointing_steps", checkpoints];
        let take_away = |_: &Child| {
            // At once, as a removal is not: then nothing is written into the folder while it goes.
            std::fs::rename(&run, scratch.path("gone")).unwrap();
            std::fs::remove_dir_all(scratch.path("gone")).unwrap();
            if another_in_its_place {
                std::fs::create_dir(&run).unwrap();
            }
        };
        let done = disturbed(&scratch, "run", &more, || records(&run).len() >= 2, take_away);
        assert_eq!(done.code, 2, "{}", done.err);
        assert!(done.err.contains("removed, renamed or replaced while the training ran"), "{}", done.err);
        assert_eq!(run.exists(), another_in_its_place);
        assert!(!another_in_its_place || tree(&run).is_empty(), "{:?}", tree(&run).keys());
    }
}

#[test]
fn a_run_without_its_settings_stops() {
    let scratch = Scratch::new();
    let run = scratch.path("run");
    let remove = |_: &Child| std::fs::remove_file(run.join("config.toml")).unwrap();
    let more = ["--max_train_steps", "80"];
    let done = disturbed(&scratch, "run", &more, || records(&run).len() >= 2, remove);
    assert!(done.code == 2 && done.err.contains("config.toml was removed"), "{} {}", done.code, done.err);
}

/// `/proc` takes no files, not even from root. That the model, the adapter and the tower are not there would be told later.
#[test]
fn a_place_that_cannot_be_written_is_told_before_anything_is_read() {
    let scratch = Scratch::new();
    let photos = crate::support::base::root().join("assets/subjects/cat/train");
    let photos = photos.to_str().unwrap();
    let train =
        ["train", "--instance_data_dir", photos, "--instance_prompt", "x", "--output_dir", "/proc/run"];
    let csv = ["evaluate", "pictures", "--clip", "tower", "--real", "photos", "--csv", "/proc/scores.csv"];
    for (args, place) in [
        (&["sample", "--model", "m", "--prompt", "x", "--output", "/proc"][..], "write into /proc:"),
        (&["sample", "--model", "m", "--prompt", "x", "--output", "/proc/out"], "make the folder /proc/out:"),
        (
            &["sample", "--model", "m", "--prompt", "x", "--output", "out", "--save-latents", "/proc/l"],
            "write /proc/l:",
        ),
        (
            &["export", "--model", "m", "--adapter", "a", "--to", "merged", "--output", "/proc/merged"],
            "write /proc/merged:",
        ),
        (&["merge", "a", "b", "--output", "/proc/both"], "write /proc/both:"),
        (&[&train[..], &["--pretrained_model_name_or_path", "m"]].concat(), "make the folder /proc/run:"),
        (&csv, "write /proc/scores.csv:"),
        (&["prepare", "canny", photos, "--output", "/proc/edges"], "make the folder /proc/edges:"),
    ] {
        let done = scratch.run(args);
        assert!(done.code == 2 && done.err.contains(&format!("cannot {place}")), "{args:?}: {}", done.err);
    }
    assert!(!scratch.path("out").exists());
}
