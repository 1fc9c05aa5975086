//! How the program's threads wait, as libgomp itself says it, and that setting it leaves the process what it was.

use crate::support::base::root;
use crate::support::finished::{Finished, finished};
use crate::support::scratch::Scratch;
use crate::support::training::tiny_sd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const VARIABLES: [&str; 4] = ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY"];

/// The program where nobody has decided how threads wait.
fn undecided(scratch: &Scratch, args: &[&str]) -> Command {
    let mut command = scratch.command(args);
    VARIABLES.iter().for_each(|name| {
        command.env_remove(name);
    });
    command
}

/// How long a thread spins, which libgomp displays when it is loaded: 0 where threads sleep at once.
fn spins(scratch: &Scratch, set: &[(&str, &str)]) -> String {
    let mut command = undecided(scratch, &["--version"]);
    command.envs(set.iter().copied()).env("OMP_DISPLAY_ENV", "verbose");
    let Finished { code, out, err } = finished(command.output().unwrap());
    assert_eq!((code, out.as_str()), (0, concat!("hra ", env!("CARGO_PKG_VERSION"), "\n")), "{err}");
    let found = err.lines().find_map(|line| line.trim().strip_prefix("GOMP_SPINCOUNT = '"));
    found.unwrap_or_else(|| panic!("libgomp says nothing: {err}")).trim_end_matches('\'').to_string()
}

#[test]
fn threads_spin_shortly_while_they_wait_unless_the_user_says_otherwise() {
    let scratch = Scratch::new();
    assert_eq!(spins(&scratch, &[]), "10000");
    assert_eq!(spins(&scratch, &[("OMP_WAIT_POLICY", "passive")]), "0");
    assert_eq!(spins(&scratch, &[("GOMP_SPINCOUNT", "77")]), "77");
    // libgomp's own words: active threads spin for long, and what Intel's OpenMP reads is nothing to it.
    assert!(spins(&scratch, &[("OMP_WAIT_POLICY", "active")]).parse::<f64>().unwrap() > 1e9);
    assert_eq!(spins(&scratch, &[("KMP_BLOCKTIME", "1")]), "300000", "the default of libgomp");
}

#[test]
fn the_process_keeps_its_input_its_arguments_and_its_signals() {
    let scratch = Scratch::new();
    let model = tiny_sd();
    std::fs::write(scratch.path("prompts"), "a fluent 3d emoji of a cat face\n").unwrap();
    // Enough to draw that it is still there when it is looked at.
    let args = [
        "sample",
        "--model",
        model.to_str().unwrap(),
        "--num-images",
        "8",
        "--output",
        "out",
        "--prompt-file",
        "/dev/stdin",
    ];
    let mut command = undecided(&scratch, &args);
    command.stdin(std::fs::File::open(scratch.path("prompts")).unwrap());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    // SAFETY: both functions may be called between fork and exec.
    unsafe {
        command.pre_exec(|| {
            libc::signal(libc::SIGHUP, libc::SIG_IGN);
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigaddset(&mut set, libc::SIGUSR1);
            libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
            Ok(())
        });
    }
    let child = command.spawn().unwrap();
    let of_child = |file: &str| std::fs::read_to_string(format!("/proc/{}/{file}", child.id())).unwrap();
    let started = Instant::now();
    while !of_child("environ").split('\0').any(|entry| entry == "GOMP_SPINCOUNT=10000") {
        assert!(started.elapsed() < Duration::from_secs(60), "the variable is not set in this process");
        std::thread::sleep(Duration::from_millis(5));
    }
    let given: Vec<String> = of_child("cmdline").split_terminator('\0').map(String::from).collect();
    assert_eq!(given[0], env!("CARGO_BIN_EXE_hra"));
    assert_eq!(given[1..], args);
    let status = of_child("status");
    for (mask, signal) in [("SigIgn:", libc::SIGHUP), ("SigBlk:", libc::SIGUSR1)] {
        let bits = status.lines().find_map(|line| line.strip_prefix(mask)).unwrap();
        let bits = u64::from_str_radix(bits.trim(), 16).unwrap();
        assert_ne!(bits & (1 << (signal - 1)), 0, "{mask} {bits:x}");
    }
    let done = finished(child.wait_with_output().unwrap());
    assert_eq!(done.code, 0, "{}", done.err);
    assert!(scratch.path("out/0000-0007.png").is_file());
}

#[test]
fn the_help_of_threads_says_how_to_wait_otherwise() {
    let scratch = Scratch::new();
    for verb in ["train", "sample", "evaluate"] {
        let help = scratch.ok(&[verb, "--help"]).out;
        let words = help.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(words.contains("soon sleep, unless OMP_WAIT_POLICY"), "{verb}");
    }
    assert!(std::fs::read_to_string(root().join("README.md")).unwrap().contains("OMP_WAIT_POLICY"));
}
