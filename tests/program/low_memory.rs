//! The program with less memory than its work needs (`ulimit -v`): it does its work, or says that memory ran out and what lowers it.

use crate::support::finished::{Finished, finished};
use crate::support::scratch::Scratch;
use crate::support::training::tiny_sd;
use std::os::unix::process::CommandExt;

/// Runs the program in an address space of `mb` megabytes.
fn within(mb: u64, scratch: &Scratch, args: &[&str]) -> Finished {
    let bytes = mb * 1_000_000;
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: bytes };
    let mut command = scratch.command(args);
    // SAFETY: sets a limit of the child, before it becomes the program.
    unsafe {
        command.pre_exec(move || match libc::setrlimit(libc::RLIMIT_AS, &limit) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
    finished(command.output().unwrap())
}

/// The least address space in which the program itself starts, in steps of 50 MB: libtorch's libraries alone take some hundreds.
fn least(scratch: &Scratch) -> u64 {
    (4..60).map(|step| step * 50).find(|mb| within(*mb, scratch, &["--version"]).code == 0).unwrap()
}

/// Tries limits from the least on; every end is success, or a sentence about memory. How many of each.
fn tried(scratch: &Scratch, least: u64, name: &str, args: &[&str]) -> (usize, usize) {
    let (mut done, mut short) = (0, 0);
    for more in [0, 50, 100, 150, 200, 300, 400, 600, 800] {
        let out = format!("{name}-{more}");
        let args: Vec<&str> =
            args.iter().map(|word| if *word == "OUT" { out.as_str() } else { word }).collect();
        let end = within(least + more, scratch, &args);
        let told = &end.err;
        let what = format!("{name} within {} MB: {}\n{told}", least + more, end.code);
        match end.code {
            0 => done += 1,
            2 => {
                assert!(
                    told.contains("out of memory") && told.contains("hint: memory does not suffice"),
                    "{what}"
                );
                assert!(!told.contains("defect of hra") && !told.contains("Result::unwrap"), "{what}");
                short += 1;
            }
            _ => panic!("{what}"),
        }
    }
    (done, short)
}

#[test]
fn too_little_memory_is_told_with_what_lowers_it() {
    let scratch = Scratch::new();
    let least = least(&scratch);
    let model = tiny_sd();
    let model = model.to_str().unwrap();
    let size = ["--width", "512", "--height", "512"];
    let drawn = ["sample", "--model", model, "--prompt", "a cat", "--steps", "1", "--output", "OUT"];
    let (_, short) = tried(&scratch, least, "drawn", &[&drawn[..], &size[..]].concat());
    assert!(short > 0, "pictures of 512 pixels take more");
    let mut words = scratch.train_flags("OUT", &["--resolution", "256", "--max_train_steps", "1"]);
    let at = words.iter().position(|word| word == "--output_dir").unwrap();
    words[at + 1] = "OUT".into();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    tried(&scratch, least, "trained", &words);
    scratch.train("adapter", &["--max_train_steps", "1"]);
    let exported = ["export", "--model", model, "--adapter", "adapter", "--to", "merged", "--output", "OUT"];
    tried(&scratch, least, "exported", &exported);
}
