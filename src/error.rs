//! The one error type of the library.
//!
//! Messages are for users: lower case, no full stop, what was expected and what was found, the file or flag, and where
//! the user can act a hint. Nothing here is shown to a user as a panic.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

/// What went wrong, and what the user can do about it. Shown as the problem, then a line for each hint.
#[derive(Debug)]
pub struct Error {
    /// What went wrong.
    pub kind: ErrorKind,
    hints: Vec<String>,
}

/// What can go wrong, grouped by what the user has to look at.
#[derive(Debug, thiserror::Error)]
pub enum ErrorKind {
    /// A setting, from a config file or a flag. All problems of one check are listed, one a line.
    #[error("{0}")]
    Config(String),
    /// A file or folder that could not be read, written or made.
    #[error("cannot {action} {}: {source}", path.display())]
    Io { action: &'static str, path: PathBuf, source: std::io::Error },
    /// A file that is there but does not hold what it should.
    #[error("{}: {problem}", path.display())]
    Format { path: PathBuf, problem: String },
    /// Weights that do not fit the model: every problem of a file, one a line.
    #[error("{}: {} problem{} with the weights\n{}", path.display(), problems.len(), if problems.len() == 1 { "" } else { "s" }, bullets(problems))]
    Weights { path: PathBuf, problems: Vec<String> },
    /// Training or class images.
    #[error("{0}")]
    Data(String),
    /// A device or number format that is not there.
    #[error("{0}")]
    Device(String),
    /// A run folder in a state that the command must not touch.
    #[error("{0}")]
    Run(String),
    /// A loss or weight that is not a finite number.
    #[error("{0}")]
    NotFinite(String),
    /// A repository of the Hugging Face hub that could not be had.
    #[error("{0}")]
    Hub(String),
    /// The user asked to stop; the work so far is saved.
    #[error("{0}")]
    Interrupted(String),
    /// An error that libtorch reported.
    #[error("{}", of_torch(.0))]
    Torch(#[source] tch::TchError),
}

/// `Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// A constructor for each kind that is a text.
macro_rules! of_text {
    ($($(#[$doc:meta])* $name:ident: $kind:ident),+) => {
        impl Error {
            $($(#[$doc])* pub fn $name(problem: impl Into<String>) -> Self {
                ErrorKind::$kind(problem.into()).into()
            })+
        }
    };
}

of_text! {
    /// An [`ErrorKind::Config`].
    config: Config,
    /// An [`ErrorKind::Data`].
    data: Data,
    /// An [`ErrorKind::Device`].
    device: Device,
    /// An [`ErrorKind::Run`].
    run: Run,
    /// An [`ErrorKind::NotFinite`].
    not_finite: NotFinite,
    /// An [`ErrorKind::Hub`].
    hub: Hub,
    /// An [`ErrorKind::Interrupted`].
    interrupted: Interrupted
}

impl Error {
    /// An [`ErrorKind::Io`]; `action` completes "cannot ..", such as `read`.
    pub fn io(action: &'static str, path: &Path, source: std::io::Error) -> Self {
        let (path, kind) = (path.to_path_buf(), source.kind());
        if kind == std::io::ErrorKind::OutOfMemory {
            let source = std::io::Error::new(kind, OUT_OF_MEMORY.0);
            return Self::from(ErrorKind::Io { action, path, source }).with_hint(OUT_OF_MEMORY.1);
        }
        ErrorKind::Io { action, path, source }.into()
    }

    /// An [`ErrorKind::Format`] about `path`.
    pub fn format(path: &Path, problem: impl Into<String>) -> Self {
        ErrorKind::Format { path: path.to_path_buf(), problem: problem.into() }.into()
    }

    /// An [`ErrorKind::Weights`] about the file `path`.
    pub fn weights(path: &Path, problems: Vec<String>) -> Self {
        ErrorKind::Weights { path: path.to_path_buf(), problems }.into()
    }

    /// The same error with one more thing that the user can do.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }

    /// As [`Self::with_hint`], where there is one.
    #[must_use]
    pub fn with_hints(mut self, hints: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.hints.extend(hints.into_iter().map(Into::into));
        self
    }

    /// What the user can do, each shown on a line of its own.
    pub fn hints(&self) -> &[String] {
        &self.hints
    }

    /// The same error with `place` and a colon before what went wrong, where that is a text.
    #[must_use]
    pub fn at(mut self, place: impl fmt::Display) -> Self {
        use ErrorKind::{Config, Data, Device, Hub, Interrupted, NotFinite, Run};
        let kind = &mut self.kind;
        if let Config(text) | Data(text) | Device(text) | Run(text) | NotFinite(text) | Hub(text)
        | Interrupted(text) = kind
        {
            *text = format!("{place}: {text}");
        }
        self
    }

    /// What is wrong with a file and what helps, on one line and without the file's name, for tables that have it already.
    pub fn reason(&self) -> String {
        let problem = match &self.kind {
            ErrorKind::Io { action, source, .. } => format!("cannot {action}: {source}"),
            ErrorKind::Format { problem, .. } => problem.clone(),
            other => other.to_string(),
        };
        std::iter::once(&problem).chain(&self.hints).map(String::as_str).collect::<Vec<_>>().join("; ")
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.kind)?;
        self.hints.iter().try_for_each(|hint| write!(f, "\nhint: {hint}"))
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        std::error::Error::source(&self.kind)
    }
}

impl From<ErrorKind> for Error {
    fn from(kind: ErrorKind) -> Self {
        Self { kind, hints: Vec::new() }
    }
}

impl From<tch::TchError> for Error {
    fn from(error: tch::TchError) -> Self {
        let hints = hint(&error.to_string()).map(str::to_string).into_iter().collect();
        Self { kind: ErrorKind::Torch(error), hints }
    }
}

/// A line for each problem; for problems that only the name of a tensor tells apart (`name`: why), one with their number. What
/// has a shape in it is of its tensor alone.
fn bullets(problems: &[String]) -> String {
    /// So many alike are told one by one.
    const FEW: usize = 3;
    let why = |problem: &str| {
        let (_, why) = problem.strip_prefix('`')?.split_once("`: ")?;
        (!why.contains('[')).then(|| why.to_string())
    };
    let mut count: BTreeMap<String, usize> = BTreeMap::new();
    for why in problems.iter().filter_map(|problem| why(problem)) {
        *count.entry(why).or_default() += 1;
    }
    let mut lines = Vec::new();
    for problem in problems {
        // Zero where they were told with the first of them.
        match why(problem).and_then(|why| count.get_mut(&why).map(|n| (why, n))) {
            Some((_, 0)) => {}
            Some((why, n)) if *n > FEW => {
                let first = problem.strip_suffix(&format!(": {why}")).unwrap_or(problem);
                lines.push(format!("  - {first} and {} more: {why}", *n - 1));
                *n = 0;
            }
            _ => lines.push(format!("  - {problem}")),
        }
    }
    lines.join("\n")
}

/// What is told where memory runs out, and the hint.
pub const OUT_OF_MEMORY: (&str, &str) = (
    "out of memory",
    "memory does not suffice: lower the batch size (--batch-size; --train_batch_size, --sample_batch_size), --width and --height or \
     --resolution, or --threads, or use --dtype bf16",
);

/// Words of libtorch, oneDNN, CUDA, C++, Rust and the system where there is no memory left.
const MEMORY: &[&str] = &[
    "out of memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "bad_alloc",
    "ALLOC_FAILED",
    "cudaErrorMemoryAllocation",
    "ALLOCATION_FAILED",
    "memory allocation of",
    "memory allocation failed",
    PROBABLE[0],
    PROBABLE[1],
    PROBABLE[2],
    PROBABLE[3],
    PROBABLE[4],
];

/// Those that have another reason now and then, and are told with it.
const PROBABLE: [&str; 5] = [
    // cuDNN, where no plan's workspace could be had; cuBLAS, whose handle takes memory.
    "unable to find an engine to execute this computation",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    // oneDNN, which compiles a kernel for each shape and keeps it.
    "could not create a primitive",
    "could not create a memory",
    // A thread needs a stack.
    "failed to spawn thread",
];

/// What to tell of a failure of which `text` says that memory ran out, with how much was asked for where it says so; `None` for
/// others.
pub fn out_of_memory(text: &str) -> Option<String> {
    if !MEMORY.iter().any(|word| text.contains(word)) {
        return None;
    }
    let told = OUT_OF_MEMORY.0;
    let after = |words: &str| {
        let (_, rest) = text.split_once(words)?;
        // As libtorch has it: `33554432 bytes`, or `2.00 GiB`.
        let mut parts = rest.split([' ', '\\', '\n', '"']);
        Some((parts.next()?.parse::<f64>().ok()?, parts.next()?.trim_end_matches('.')))
    };
    let asked = ["ried to allocate ", "memory allocation of "].into_iter().find_map(after);
    Some(match asked {
        Some((bytes, "bytes")) => format!("{told}: {:.1} MB more were needed", bytes / 1e6),
        Some((number, unit)) => format!("{told}: {number:.2} {unit} more were needed"),
        None => match PROBABLE.iter().find_map(|word| text.lines().find(|line| line.contains(word))) {
            Some(line) => format!("{told}, most likely: {}", in_panic(line).unwrap_or(line.trim())),
            None => told.to_string(),
        },
    })
}

/// libtorch's own first line within a panic of tch, whose text has it between quotes, with the backtrace behind escaped line ends;
/// `None` for other texts.
pub fn in_panic(text: &str) -> Option<&str> {
    let (_, said) = text.split_once("Torch(\"")?;
    let line = said.split("\\n").next().unwrap_or(said);
    Some(line.strip_suffix("\")").unwrap_or(line))
}

/// The first line of what libtorch says, since a C++ backtrace follows, or that memory ran out.
fn of_torch(error: &tch::TchError) -> String {
    let text = error.to_string();
    let first = || format!("libtorch: {}", text.lines().next().unwrap_or_default());
    out_of_memory(&text).unwrap_or_else(first)
}

/// What a user can do about a failure inside libtorch, CUDA, cuBLAS or cuDNN: words of their messages, and the hint.
const CAUSES: [(&[&str], &str); 4] = [
    (MEMORY, OUT_OF_MEMORY.1),
    (
        &["no kernel image", "invalid device function", "architecture mismatch"],
        "this libtorch has no kernels for this GPU: `hra doctor` names both; use a libtorch made for it, or --device cpu",
    ),
    (
        &[
            "driver version is insufficient",
            "CUDA driver initialization failed",
            "system not yet initialized",
        ],
        "NVIDIA's driver does not serve this libtorch: `hra doctor` names both; install a newer driver, or use \
         --device cpu",
    ),
    (
        &[
            "device lost",
            "CUDA error: unknown error",
            "unspecified launch failure",
            "illegal memory access",
            "launch timed out",
            "fallen off the bus",
            "uncorrectable ECC",
            "hardware stack error",
            "busy or unavailable",
            "driver shutting down",
            "context is destroyed",
            "device not ready",
        ],
        "the GPU does not answer any more: look at `nvidia-smi` and the kernel's log, then go on from the last checkpoint with \
         `hra train --resume latest`",
    ),
];

/// What a user can do about a failure of which libtorch says `text`; `None` where its cause is not known.
pub fn hint(text: &str) -> Option<&'static str> {
    let names = |words: &[&str]| words.iter().any(|word| text.contains(word));
    CAUSES.iter().find(|(words, _)| names(words)).map(|(_, hint)| *hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alike_problems_of_many_tensors_are_one_line() {
        let problem = |i: usize| match i {
            0..300 => format!("`a.{i}`: expected floating point, found I8"),
            300..303 => format!("`b.{i}`: holds numbers that are not finite"),
            _ => format!("`c.{i}`: expected shape [2], found [3]"),
        };
        let text = bullets(&(0..310).map(problem).collect::<Vec<_>>());
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "  - `a.0` and 299 more: expected floating point, found I8");
        assert_eq!(lines[1..4], [300, 301, 302].map(|i| format!("  - {}", problem(i))));
        assert_eq!(lines.len(), 11, "{text}");
    }

    #[test]
    fn failures_of_the_gpu_are_told_apart() {
        // As libtorch 2.11 words them.
        for (text, expected) in [
            (
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.19 GiB",
                "memory does",
            ),
            ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "memory does"),
            ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "memory does"),
            ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", "memory does"),
            ("GET was unable to find an engine to execute this computation", "memory does"),
            ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", "memory does"),
            ("CUDA error: unknown error", "the GPU does not answer"),
            (
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
                "memory does",
            ),
            ("CUDA error: no kernel image is available for execution on the device", "this libtorch has no"),
            ("CUDA error: CUDA driver version is insufficient for CUDA runtime version", "NVIDIA's driver"),
            (
                "CUDA error: unspecified launch failure\nCUDA kernel errors might be",
                "the GPU does not answer",
            ),
            ("CUDA error: an illegal memory access was encountered", "the GPU does not answer"),
        ] {
            assert!(hint(text).is_some_and(|hint| hint.starts_with(expected)), "{text}");
        }
        assert_eq!(hint("mat1 and mat2 shapes cannot be multiplied"), None);
        let asked =
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 33554432 bytes. Error code 12";
        assert_eq!(out_of_memory(asked).as_deref(), Some("out of memory: 33.6 MB more were needed"));
        let asked = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.19 GiB";
        assert_eq!(out_of_memory(asked).as_deref(), Some("out of memory: 2.00 GiB more were needed"));
        for end in ["", "\\nException raised from make"] {
            let text = format!(
                "called `Result::unwrap()` on an `Err` value: Torch(\"could not create a primitive{end}\")"
            );
            let told = out_of_memory(&text);
            assert_eq!(told.as_deref(), Some("out of memory, most likely: could not create a primitive"));
        }
        assert_eq!(out_of_memory("linalg.svd: failed to converge"), None);
    }

    #[test]
    fn a_backtrace_is_left_out_and_a_hint_is_given() {
        let error = tch::TchError::Torch("CUDA out of memory. Tried\nException raised from malloc".into());
        let message = Error::from(error).to_string();
        assert!(
            message.starts_with("out of memory\nhint: ")
                && message.contains("\nhint: memory does not suffice"),
            "{message}"
        );
        assert!(!message.contains("Exception raised"), "{message}");
    }
}
