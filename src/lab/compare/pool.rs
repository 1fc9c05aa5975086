//! Cells as processes: so many at once, each with a log of its own, all told to stop when this one is.

use crate::error::{Error, Result};
use crate::lab::compare::task::Task;
use crate::lab::results;
use crate::platform::observer::Observer;
use crate::platform::{device, files};
use std::collections::VecDeque;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

const LOG_FILE: &str = "log.txt";
const POLL: Duration = Duration::from_millis(50);

/// A cell that could not be done.
#[derive(Debug)]
pub struct CellFailure {
    /// Its id.
    pub id: String,
    /// The last line of its log, or how it ended.
    pub why: String,
}

/// Runs the tasks, `jobs` at a time, in their order. A cell that fails does not stop the others; they are returned.
///
/// Errors: an interrupt, after all processes have saved what they had.
pub fn run(
    comparison: &Path,
    tasks: &[&Task],
    jobs: usize,
    observer: &dyn Observer,
) -> Result<Vec<CellFailure>> {
    let (count, at_once) = (tasks.len(), jobs.min(tasks.len()));
    observer.say(&format!(
        "{}, {at_once} at a time; each has a log, {}/cells/ID/{LOG_FILE}",
        results::cell_count(count),
        comparison.display()
    ));
    let queue: Mutex<VecDeque<&&Task>> = Mutex::new(tasks.iter().collect());
    let progress = Mutex::new(Told { done: 0, total: tasks.len(), jobs, started: Instant::now() });
    let failures = Mutex::new(Vec::new());
    let problems = Mutex::new(Vec::new());
    let lock = |e| PoisonError::into_inner(e);
    std::thread::scope(|scope| {
        for _ in 0..jobs.min(tasks.len()) {
            scope.spawn(|| {
                while !observer.asks_to_stop() {
                    let Some(task) = queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front() else {
                        break;
                    };
                    let started = Instant::now();
                    let outcome = one(comparison, task, jobs, observer);
                    let failed = !matches!(outcome, Ok(None));
                    match outcome {
                        Ok(None) => {}
                        Ok(Some(why)) => {
                            let id = task.cell.id.clone();
                            observer.say(&format!("{id}: {why}"));
                            failures
                                .lock()
                                .unwrap_or_else(PoisonError::into_inner)
                                .push(CellFailure { id, why });
                        }
                        Err(e) => problems.lock().unwrap_or_else(PoisonError::into_inner).push(e),
                    }
                    if !observer.asks_to_stop() {
                        let mut told = progress.lock().unwrap_or_else(PoisonError::into_inner);
                        observer.say(&told.line(task, started.elapsed(), failed));
                    }
                }
            });
        }
    });
    observer.check(|| "stopped; the same command goes on".into())?;
    match problems.into_inner().unwrap_or_else(lock).into_iter().next() {
        Some(problem) => Err(problem),
        None => Ok(failures.into_inner().unwrap_or_else(PoisonError::into_inner)),
    }
}

struct Told {
    done: usize,
    total: usize,
    jobs: usize,
    started: Instant,
}

impl Told {
    fn line(&mut self, task: &Task, took: Duration, failed: bool) -> String {
        self.done += 1;
        let left = self.started.elapsed().as_secs_f64() / self.done as f64 * (self.total - self.done) as f64;
        let left = if self.done >= self.jobs && self.done < self.total {
            format!(", about {} left", duration(left))
        } else {
            String::new()
        };
        let cell = &task.cell;
        let what = match cell.learning_rate() {
            Some(rate) => format!("{}, {}, seed {}, rate {rate:e}", cell.method(), cell.subject, cell.seed()),
            None => format!("{} model, {}", cell.method(), cell.subject),
        };
        let took = if failed { "failed".to_string() } else { duration(took.as_secs_f64()) };
        format!("[{}/{}] {what}: {took}{left}", self.done, self.total)
    }
}

/// Seconds, minutes or hours, as far as they matter.
pub fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 100.0 => format!("{s:.0} s"),
        s if s < 6000.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}

/// Runs one cell; why it failed, if it did.
fn one(comparison: &Path, task: &Task, jobs: usize, observer: &dyn Observer) -> Result<Option<String>> {
    let log_path = results::cell_folder(comparison, &task.cell.id).join(LOG_FILE);
    let log = files::open_append(&log_path)?;
    let start = log.metadata().map_or(0, |m| m.len()) as usize;
    let also = log.try_clone().map_err(|e| Error::io("open", &log_path, e))?;
    let program = std::env::current_exe().map_err(|e| Error::io("find", Path::new("hra"), e))?;
    let mut command = Command::new(&program);
    command
        .args(["compare", "cell"])
        .arg(comparison)
        .arg(&task.cell.id)
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(also)
        // A terminal's Ctrl-C comes to us alone; a second one would end a cell before it has saved.
        .process_group(0);
    if std::env::var_os("OMP_NUM_THREADS").is_none() {
        command.env("OMP_NUM_THREADS", (device::cores() / jobs).max(1).to_string());
    }
    end_with_us(&mut command);
    let mut child = command.spawn().map_err(|e| Error::io("start", &program, e))?;
    let status = wait(&mut child, observer).map_err(|e| Error::io("wait for", &program, e))?;
    if status.success() || observer.asks_to_stop() {
        return Ok(None);
    }
    let text = std::fs::read(&log_path).map_err(|e| Error::io("read", &log_path, e))?;
    let text = String::from_utf8_lossy(&text[start.min(text.len())..]).into_owned();
    let said = text.lines().rev().find_map(|line| line.strip_prefix("error: "));
    let how = match (status.signal(), said) {
        (Some(signal), _) => format!("ended by signal {signal} (9: perhaps out of memory)"),
        (None, Some(said)) => said.to_string(),
        (None, None) => format!("{status}"),
    };
    Ok(Some(format!("{how}; the log is {}", log_path.display())))
}

/// Tells the process that is started to stop when this one ends, however it ends: nobody would wait for it. Elsewhere than on
/// Linux it goes on to the end of its cell.
fn end_with_us(command: &mut Command) {
    #[cfg(target_os = "linux")]
    {
        let us = std::process::id();
        let before_exec = move || {
            // SAFETY: both are system calls that may be made between fork and exec (signal-safety(7)).
            let parent = unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM);
                libc::getppid()
            };
            // Whoever ended before the first call is not told of any more.
            if parent as u32 == us { Ok(()) } else { Err(std::io::ErrorKind::BrokenPipe.into()) }
        };
        // SAFETY: as above; nothing is allocated.
        unsafe { command.pre_exec(before_exec) };
    }
}

/// Waits for a process, and hands on a request to stop.
fn wait(child: &mut Child, observer: &dyn Observer) -> std::io::Result<ExitStatus> {
    let mut told = false;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if observer.asks_to_stop() && !told {
            told = true;
            // SAFETY: the process is ours and not yet waited for, so its number is still its own.
            unsafe { libc::kill(child.id() as libc::pid_t, libc::SIGTERM) };
        }
        std::thread::sleep(POLL);
    }
}
