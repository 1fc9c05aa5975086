//! `hra train` through the real binary on the embedded model: losses, exact resume, interruption, run folders.

use crate::run_folder::{adapter, leftovers};
use crate::support::base::root;
use crate::support::finished::{Finished, finished};
use crate::support::records::records;
use crate::support::scratch::Scratch;
use std::path::Path;
use std::time::{Duration, Instant};

/// Losses of the first steps, recorded with libtorch 2.11.0 on x86-64; the steps themselves are compared with Python's in
/// tests/numbers/parity.rs, these numbers catch any change of the data, its order, the draws, or the defaults.
const FIRST_LOSSES: [f64; 3] = [0.20886161923408508, 0.21592830121517181, 0.395347535610199];

fn flags(all: &[String]) -> Vec<&str> {
    all.iter().map(String::as_str).collect()
}

#[test]
fn the_first_steps_give_the_listed_losses() {
    let scratch = Scratch::new();
    scratch.train("run", &["--max_train_steps", "3", "--train_batch_size", "2"]);
    let losses: Vec<f64> =
        records(&scratch.path("run")).iter().map(|r| r["loss"].as_f64().unwrap()).collect();
    for (found, expected) in losses.iter().zip(FIRST_LOSSES) {
        assert!((found - expected).abs() < 1e-5 * expected, "found {losses:?}, listed {FIRST_LOSSES:?}");
    }
    assert_eq!(losses.len(), 3);
}

#[test]
fn a_resumed_run_equals_an_uninterrupted_one_bit_for_bit() {
    let scratch = Scratch::new();
    // Everything that has state of its own, and records that do not fall on checkpoints.
    let more = [
        "--gradient_accumulation_steps",
        "2",
        "--use_ema",
        "--hra_lambda",
        "1e-3",
        "--snr_gamma",
        "5",
        "--lr_scheduler",
        "constant_with_warmup",
        "--lr_warmup_steps",
        "4",
        "--checkpointing_steps",
        "2",
        "--log_every",
        "3",
        "--validation_prompt",
        "a fluent 3d emoji of a sks cat face",
        "--validation_steps",
        "2",
        "--validation_inference_steps",
        "2",
        "--num_validation_images",
        "1",
    ];
    scratch.train("whole", &more);
    let mut short = more.to_vec();
    short.extend(["--max_train_steps", "4"]);
    scratch.train("parts", &short);
    let parts = scratch.path("parts");
    scratch.ok(&[
        "train",
        "--resume",
        "latest",
        "--output_dir",
        parts.to_str().unwrap(),
        "--max_train_steps",
        "6",
    ]);
    assert_eq!(adapter(&parts), adapter(&scratch.path("whole")));
    let (resumed, whole) = (records(&parts), records(&scratch.path("whole")));
    assert_eq!(resumed, whole);
}

#[test]
fn previews_and_measurements_do_not_disturb_training() {
    let scratch = Scratch::new();
    scratch.train("plain", &["--max_train_steps", "2"]);
    let held_out = root().join("assets/subjects/cat/held_out");
    let looked = scratch.train(
        "looked-at",
        &[
            "--max_train_steps",
            "2",
            "--validation_prompt",
            "a cat face",
            "--validation_steps",
            "1",
            "--validation_inference_steps",
            "2",
            "--num_validation_images",
            "2",
            "--held_out_data_dir",
            held_out.to_str().unwrap(),
            "--checkpointing_steps",
            "1",
        ],
    );
    assert_eq!(adapter(&scratch.path("plain")), adapter(&scratch.path("looked-at")));
    let record = &records(&scratch.path("looked-at"))[1];
    let held_out_loss = record["held_out_loss"].as_f64().unwrap();
    assert!(held_out_loss > 0.0 && record["weight_change"].as_f64().unwrap() > 0.0);
    let told = format!("step 2: held-out loss {held_out_loss:.4}");
    assert!(looked.err.contains(&told), "{told} in:\n{}", looked.err);
    assert!(record["orthogonality_error"].as_f64().unwrap() < 1e-5);
    for name in
        ["samples/step-000001/0000-0001.png", "samples/step-000002/grid.png", "dataset.txt", "config.toml"]
    {
        assert!(scratch.path("looked-at").join(name).is_file(), "{name}");
    }
}

/// Starts a run, waits for its records, and gives it a signal.
fn interrupt(scratch: &Scratch, signal: i32, after: usize) -> (i32, String) {
    let run = scratch.path("run");
    let all = scratch.train_flags(
        "run",
        &["--max_train_steps", "400", "--checkpointing_steps", "2", "--checkpoints_total_limit", "2"],
    );
    let child = scratch.start(&flags(&all));
    let started = Instant::now();
    while records(&run).len() < after {
        assert!(started.elapsed() < Duration::from_secs(120), "no records");
        std::thread::sleep(Duration::from_millis(5));
    }
    // SAFETY: sends a signal to our own child.
    unsafe { libc::kill(child.id() as i32, signal) };
    let done = finished(child.wait_with_output().unwrap());
    (done.code, done.err)
}

fn checkpoints(run: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(run.join("checkpoints"))
        .unwrap()
        .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|n| n.starts_with("step-"))
        .collect();
    names.sort();
    names
}

/// Goes on to two steps after the last checkpoint, and compares with a run that was never stopped.
fn goes_on_as_if_nothing_had_happened(scratch: &Scratch) {
    let run = scratch.path("run");
    let last: i64 = checkpoints(&run).last().unwrap()[5..].parse().unwrap();
    let steps = (last + 2).to_string();
    scratch.ok(&[
        "train",
        "--resume",
        "latest",
        "--output_dir",
        run.to_str().unwrap(),
        "--max_train_steps",
        &steps,
    ]);
    scratch.train("whole", &["--max_train_steps", &steps]);
    assert_eq!(adapter(&run), adapter(&scratch.path("whole")));
    assert!(leftovers(&run).is_empty());
    assert_eq!(
        records(&run).iter().map(|r| r["loss"].clone()).collect::<Vec<_>>(),
        records(&scratch.path("whole")).iter().map(|r| r["loss"].clone()).collect::<Vec<_>>(),
    );
}

#[test]
fn ctrl_c_saves_a_checkpoint_and_says_how_to_go_on() {
    let scratch = Scratch::new();
    let (code, err) = interrupt(&scratch, libc::SIGINT, 3);
    assert_eq!(code, 130, "{err}");
    assert!(err.contains("saved") && err.contains("hra train --resume latest --output_dir"), "{err}");
    assert!(checkpoints(&scratch.path("run")).len() <= 2);
    goes_on_as_if_nothing_had_happened(&scratch);
}

#[test]
fn kill_9_loses_only_the_steps_since_the_last_checkpoint() {
    for after in [3, 4, 5] {
        let scratch = Scratch::new();
        let (code, _) = interrupt(&scratch, libc::SIGKILL, after);
        assert_eq!(code, -libc::SIGKILL);
        // What a kill inside a checkpoint would leave.
        std::fs::create_dir(scratch.path("run/checkpoints/.tmp-1-0")).unwrap();
        if after == 5 {
            // A record that was cut off in the middle, as a kill inside a write would leave it.
            let path = scratch.path("run/metrics.jsonl");
            let text = std::fs::read_to_string(&path).unwrap();
            std::fs::write(&path, &text[..text.len() - 20]).unwrap();
        }
        goes_on_as_if_nothing_had_happened(&scratch);
    }
}

#[test]
fn a_damaged_line_of_the_metrics_is_dropped_and_told() {
    let scratch = Scratch::new();
    scratch.train("run", &["--max_train_steps", "2", "--checkpointing_steps", "2", "--log_every", "1"]);
    let path = scratch.path("run/metrics.jsonl");
    let text = std::fs::read_to_string(&path).unwrap();
    let (_, second) = text.split_once('\n').unwrap();
    std::fs::write(&path, format!("{{\"loss\":,\n{second}")).unwrap();
    let words = ["train", "--resume", "latest", "--output_dir", "run", "--max_train_steps", "3"];
    let resumed = scratch.ok(&words).err;
    assert!(resumed.contains("metrics.jsonl: lines that are no records are dropped: 1"), "{resumed}");
    let kept = std::fs::read_to_string(&path).unwrap();
    assert!(kept.starts_with(second) && kept.lines().count() == 2, "{kept}");
    // A line that a kill cut off is no damage.
    std::fs::write(&path, format!("{kept}{{\"loss\":")).unwrap();
    let again =
        scratch.ok(&["train", "--resume", "latest", "--output_dir", "run", "--max_train_steps", "4"]).err;
    assert!(!again.contains("no records"), "{again}");
}

/// The same settings and seed, and the same pixels: to a level, because a sum is rounded otherwise in a batch of another size
/// on some processors.
fn same_picture(a: &[u8], b: &[u8]) {
    let settings = |png: &[u8]| {
        let pixels = png.windows(4).position(|name| name == b"IDAT").unwrap();
        String::from_utf8_lossy(&png[..pixels - 4]).into_owned()
    };
    assert_eq!(settings(a), settings(b), "seeded one by one");
    let [a, b] = [a, b].map(|png| image::load_from_memory(png).unwrap().into_rgb8());
    let off = a.iter().zip(b.iter()).map(|(a, b)| a.abs_diff(*b)).max();
    assert!(a.dimensions() == b.dimensions() && off <= Some(1), "pixels are off by {off:?} levels");
}

#[test]
fn class_pictures_are_made_once_finished_later_and_never_mixed() {
    let scratch = Scratch::new();
    let class = scratch.path("class");
    let with = |out: &str, count: &str, prompt: &str| {
        let all = scratch.train_flags(
            out,
            &[
                "--class_data_dir",
                class.to_str().unwrap(),
                "--num_class_images",
                count,
                "--class_prompt",
                prompt,
                "--class_steps",
                "2",
                "--max_train_steps",
                "1",
            ],
        );
        scratch.run(&flags(&all))
    };
    let first = with("a", "3", "a robot");
    assert!(first.err.contains("3 made"), "{}", first.err);
    let file = class.join("class-00001.png");
    let before = std::fs::read(&file).unwrap();
    std::fs::remove_file(&file).unwrap();
    let second = with("b", "4", "a robot");
    assert!(second.err.contains("2 made, 2 there before"), "{}", second.err);
    let after = std::fs::read(&file).unwrap();
    same_picture(&before, &after);
    let third = with("c", "4", "a cat face");
    assert_eq!(third.code, 2);
    assert!(third.err.contains("made from other settings") && third.err.contains("prompt"), "{}", third.err);
    assert!(!scratch.path("c").exists(), "refused before the run folder is made");
    assert_eq!(with("d", "4", "a robot").code, 0);
}

#[test]
fn a_run_is_never_overwritten_nor_resumed_with_other_settings() {
    let scratch = Scratch::new();
    scratch.train("run", &["--max_train_steps", "1"]);
    let run = scratch.path("run");
    let before = adapter(&run);
    let again = scratch.run(&flags(&scratch.train_flags("run", &[])));
    assert_eq!(again.code, 2);
    assert!(
        again.err.contains("holds a run already") && again.err.contains("--resume latest"),
        "{}",
        again.err
    );
    let other = scratch.run(&[
        "train",
        "--resume",
        "latest",
        "--output_dir",
        run.to_str().unwrap(),
        "--learning_rate",
        "1e-2",
    ]);
    assert_eq!(other.code, 2);
    assert!(other.err.contains("learning_rate: the run has 0.003, asked for is 0.01"), "{}", other.err);
    let none =
        scratch.run(&["train", "--resume", "latest", "--output_dir", scratch.path("none").to_str().unwrap()]);
    assert_eq!(none.code, 2);
    assert!(none.err.contains("expected a run to resume"), "{}", none.err);
    assert_eq!(adapter(&run), before);
    std::fs::create_dir(scratch.path("mine")).unwrap();
    std::fs::write(scratch.path("mine/notes.txt"), "mine").unwrap();
    let full = scratch.run(&flags(&scratch.train_flags("mine", &[])));
    assert_eq!(full.code, 2);
    assert!(full.err.contains("is not empty"), "{}", full.err);
}

#[test]
fn going_on_from_an_older_step_leaves_the_newer_ones_behind() {
    let scratch = Scratch::new();
    scratch.train("whole", &["--max_train_steps", "5"]);
    scratch.train("run", &["--max_train_steps", "4", "--checkpointing_steps", "1"]);
    let run = scratch.path("run");
    let go_on = ["train", "--resume", "2", "--output_dir", run.to_str().unwrap(), "--max_train_steps", "5"];
    let told = scratch.ok(&[&go_on[..], &["--checkpoints_total_limit", "2"]].concat()).err;
    assert!(
        told.contains("resuming after step 2") && told.contains("2 checkpoints after step 2 are removed"),
        "{told}"
    );
    assert_eq!(adapter(&run), adapter(&scratch.path("whole")));
    assert_eq!(checkpoints(&run), ["step-000004", "step-000005"]);
    assert_eq!(records(&run).len(), 5);
}

#[test]
fn settings_of_pictures_to_come_are_checked_before_the_first_step() {
    let scratch = Scratch::new();
    for more in [
        &["--validation_prompt", "x", "--validation_inference_steps", "0"][..],
        &["--validation_prompt", "x", "--validation_inference_steps", "2000"],
        &["--class_steps", "2000", "--class_data_dir", "new"],
    ] {
        let done = scratch.run(&flags(&scratch.train_flags("run", more)));
        assert_eq!(done.code, 2, "{}", done.err);
        assert!(done.err.contains("steps") && !scratch.path("run").exists(), "{}", done.err);
    }
}

#[test]
fn a_full_disk_is_one_message_and_leaves_no_halves() {
    let scratch = Scratch::new();
    let all = scratch.train_flags("run", &["--checkpointing_steps", "1", "--max_train_steps", "2"]);
    let quoted: Vec<String> = all.iter().map(|f| format!("'{f}'")).collect();
    // 200 KiB: room for the config and metrics, not for the adapter (about 300 KB).
    let script = format!("ulimit -f 200; exec '{}' {}", env!("CARGO_BIN_EXE_hra"), quoted.join(" "));
    let done = finished(std::process::Command::new("bash").arg("-c").arg(script).output().unwrap());
    assert_eq!(done.code, 2, "{}", done.err);
    assert!(done.err.contains("cannot write") && done.err.contains("File too large"), "{}", done.err);
    let run = scratch.path("run");
    assert!(leftovers(&run).is_empty(), "{:?}", leftovers(&run));
    assert!(!run.join("adapter_config.json").exists() && checkpoints(&run).is_empty());
    // With room again, the run goes on.
    scratch.ok(&["train", "--resume", "latest", "--output_dir", run.to_str().unwrap()]);
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run_with_the_step_and_the_last_checkpoint() {
    let scratch = Scratch::new();
    let all = scratch.train_flags(
        "run",
        &["--checkpointing_steps", "1", "--hra_lambda", "1e38", "--max_train_steps", "5"],
    );
    let done = scratch.run(&flags(&all));
    assert_eq!(done.code, 2, "{}", done.err);
    assert!(done.err.contains("is not a finite number") && done.err.contains("step "), "{}", done.err);
    assert!(!scratch.path("run/adapter_config.json").exists());
}

/// Layers compute f16 in f32 on a CPU unless a test asks for it.
fn train_in_f16(scratch: &Scratch, out: &str, more: &[&str]) -> Finished {
    let flags = scratch.train_flags(out, &[&["--dtype", "f16"], more].concat());
    let mut command = scratch.command(&flags.iter().map(String::as_str).collect::<Vec<_>>());
    finished(command.env("HRA_F16_ON_CPU", "1").output().unwrap())
}

#[test]
fn f16_trains_beside_f32_and_goes_on_as_if_it_had_not_stopped() {
    let scratch = Scratch::new();
    let losses = |run: &str| -> Vec<f64> {
        records(&scratch.path(run)).iter().map(|record| record["loss"].as_f64().unwrap()).collect()
    };
    scratch.train("f32", &[]);
    assert_eq!(train_in_f16(&scratch, "whole", &[]).code, 0);
    let (half, full) = (losses("whole"), losses("f32"));
    assert!(
        half.iter().zip(&full).all(|(a, b)| a != b && (a - b).abs() < 0.02 * b),
        "{half:?} beside {full:?}"
    );
    assert!(
        records(&scratch.path("whole"))
            .iter()
            .all(|r| r["loss_scale"] == 65536.0 && r["skipped_steps"] == 0.0)
    );
    assert!(records(&scratch.path("f32")).iter().all(|r| r.get("loss_scale").is_none()));

    assert_eq!(
        train_in_f16(&scratch, "parts", &["--max_train_steps", "3", "--checkpointing_steps", "3"]).code,
        0
    );
    let mut command =
        scratch.command(&["train", "--resume", "latest", "--output_dir", "parts", "--max_train_steps", "6"]);
    let done = finished(command.env("HRA_F16_ON_CPU", "1").output().unwrap());
    assert_eq!(done.code, 0, "{}", done.err);
    assert_eq!(losses("parts"), half);
    assert_eq!(adapter(&scratch.path("parts")), adapter(&scratch.path("whole")));
}

#[test]
fn f16_skips_steps_that_overflow_and_stops_where_all_do() {
    let scratch = Scratch::new();
    // A weight that makes gradients overflow until the scale has been halved a few times.
    let flags = ["--prior_loss_weight", "3e5", "--max_train_steps", "12", "--checkpointing_steps", "4"];
    let done = train_in_f16(&scratch, "heavy", &flags);
    assert_eq!(done.code, 0, "{}", done.err);
    let records = records(&scratch.path("heavy"));
    let skipped: f64 = records.iter().map(|record| record["skipped_steps"].as_f64().unwrap()).sum();
    let last = records.last().unwrap()["loss_scale"].as_f64().unwrap();
    assert!((1.0..12.0).contains(&skipped), "{skipped} skipped");
    assert_eq!(last, 65536.0 * 0.5f64.powf(skipped), "each skipped step halves it");

    let done = train_in_f16(&scratch, "lost", &["--prior_loss_weight", "1e12", "--max_train_steps", "40"]);
    assert_eq!(done.code, 2, "{}", done.err);
    assert!(done.err.contains("gradients overflow in f16 however small"), "{}", done.err);
    assert!(done.err.contains("--dtype bf16"), "{}", done.err);
}

#[test]
fn a_resumed_run_of_another_method_than_the_default_keeps_its_settings() {
    let scratch = Scratch::new();
    let method =
        ["--method", "lora", "--lora_alpha", "8", "--max_train_steps", "1", "--checkpointing_steps", "1"];
    scratch.train("run", &[&method[..], &["--use_rslora"]].concat());
    let resume = |words: &[&str]| {
        let own = ["train", "--resume", "latest", "--output_dir", "run", "--max_train_steps", "2"];
        scratch.ok(&[&own[..], words].concat()).err
    };
    // Settings of the run's method alone, typed.
    assert!(resume(&["--lora_alpha", "8"]).contains("resuming after step 1"));
    // Files of which the first names another method: what the run has and they do not say stays.
    std::fs::write(scratch.path("hra.toml"), "[adapter]\nmethod = \"hra\"\n").unwrap();
    std::fs::write(scratch.path("lora.toml"), "[adapter]\nmethod = \"lora\"\n").unwrap();
    let told = resume(&["hra.toml", "lora.toml"]);
    assert!(!told.contains("left out"), "{told}");
    assert!(std::fs::read_to_string(scratch.path("run/config.toml")).unwrap().contains("use_rslora = true"));
}
