//! How progress looks: on a terminal, and in a log.

use crate::support::finished::finished;
use crate::support::records::records;
use crate::support::scratch::Scratch;
use std::io::Read;
use std::os::fd::{FromRawFd, OwnedFd};
use std::ptr;

/// What the program writes to a terminal that is 120 columns wide, and its exit code.
fn on_a_terminal(scratch: &Scratch, args: &[String]) -> (i32, String) {
    let (mut ours, mut its) = (0, 0);
    let size = libc::winsize { ws_row: 24, ws_col: 120, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: writes two new descriptors, which nobody else has.
    let (ours, its) = unsafe {
        assert_eq!(libc::openpty(&mut ours, &mut its, ptr::null_mut(), ptr::null(), &size), 0);
        (OwnedFd::from_raw_fd(ours), OwnedFd::from_raw_fd(its))
    };
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let mut command = scratch.command(&args);
    let mut child = command.env("TERM", "xterm").stderr(its).spawn().unwrap();
    // This process's copy of the other end.
    drop(command);
    let (mut text, mut part) = (Vec::new(), [0; 4096]);
    let mut terminal = std::fs::File::from(ours);
    // A terminal that nobody holds any more answers with an error.
    while let Ok(count @ 1..) = terminal.read(&mut part) {
        text.extend_from_slice(&part[..count]);
    }
    (child.wait().unwrap().code().unwrap(), String::from_utf8_lossy(&text).into_owned())
}

/// What a terminal shows between two moves of its cursor, without what moves it.
fn frames(text: &str) -> Vec<String> {
    let moves = regex::Regex::new(r"\x1b\[[0-9;]*[A-Za-z]").unwrap();
    text.split('\r').map(|part| moves.replace_all(part, "").trim().to_string()).collect()
}

#[test]
fn a_bar_draws_a_frame_once_and_guesses_no_time_before_its_first_step() {
    let scratch = Scratch::new();
    let (code, text) = on_a_terminal(&scratch, &scratch.train_flags("run", &["--max_train_steps", "12"]));
    assert_eq!(code, 0, "{text}");
    let drawn: Vec<String> = frames(&text)
        .into_iter()
        .filter(|frame| frame.starts_with("training ") && frame.contains("/12 ["))
        .collect();
    assert!(drawn.len() >= 3, "{drawn:?} in {text:?}");
    assert!(drawn[0].contains(" 0/12 [") && !drawn[0].contains("left"), "{}", drawn[0]);
    for pair in drawn.windows(2) {
        assert_ne!(pair[0], pair[1], "drawn twice");
    }
    assert!(drawn.iter().all(|frame| !frame.contains("00:00:00 left")), "{drawn:?}");
    assert!(drawn.iter().any(|frame| frame.contains("(mean of last ")), "{drawn:?}");
}

#[test]
fn a_log_says_at_once_what_is_made_and_ends_with_the_mean_of_the_last_losses() {
    let scratch = Scratch::new();
    let more = ["--class_data_dir", "class", "--num_class_images", "2", "--max_train_steps", "8"];
    let args = scratch.train_flags("run", &more);
    let done =
        finished(scratch.command(&args.iter().map(String::as_str).collect::<Vec<_>>()).output().unwrap());
    assert_eq!(done.code, 0, "{}", done.err);
    let lines: Vec<&str> = done.err.lines().collect();
    let at = |line: &str| {
        lines.iter().position(|l| *l == line).unwrap_or_else(|| panic!("no `{line}` in {lines:?}"))
    };
    assert!(at("class pictures 0/2") < at("class pictures 2/2, 0 s left"));
    assert!(done.err.contains(" on cpu in f32"), "{}", done.err);
    let losses: Vec<f64> = records(&scratch.path("run")).iter().filter_map(|r| r["loss"].as_f64()).collect();
    assert_eq!(losses.len(), 8);
    let mean = losses.iter().sum::<f64>() / 8.0;
    let expected = format!("training 8/8, 0 s left, loss {mean:.4} (mean of last 8) lr ");
    assert!(lines.iter().any(|line| line.starts_with(&expected)), "{expected}: {lines:?}");
}
