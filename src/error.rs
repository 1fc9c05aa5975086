//! The one error type of the library.
//!
//! Messages are for users: lower case, no full stop, what was expected and what was found, the file or flag, and where
//! the user can act a hint. Nothing here is shown to a user as a panic.

use std::path::{Path, PathBuf};

/// What can go wrong, grouped by what the user has to look at.
#[derive(Debug, thiserror::Error)]
pub enum Error {
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
    #[error("libtorch: {}", explained(&.0.to_string()))]
    Torch(#[from] tch::TchError),
}

/// `Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An [`Error::Io`]; `action` completes "cannot ..", such as `read`.
    pub fn io(action: &'static str, path: &Path, source: std::io::Error) -> Self {
        Self::Io { action, path: path.to_path_buf(), source }
    }

    /// An [`Error::Format`] about `path`.
    pub fn format(path: &Path, problem: impl Into<String>) -> Self {
        Self::Format { path: path.to_path_buf(), problem: problem.into() }
    }

    /// An [`Error::Config`].
    pub fn config(problem: impl Into<String>) -> Self {
        Self::Config(problem.into())
    }
}

fn bullets(problems: &[String]) -> String {
    problems.iter().map(|p| format!("  - {p}")).collect::<Vec<_>>().join("\n")
}

/// The first line of what libtorch says, since a C++ backtrace follows, and a hint where the cause is known.
fn explained(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default();
    hint(text).map_or_else(|| line.to_string(), |hint| format!("{line}\nhint: {hint}"))
}

/// What a user can do about a failure inside libtorch, CUDA, cuBLAS or cuDNN: words of their messages, and the hint.
const CAUSES: [(&[&str], &str); 4] = [
    (
        &[
            "out of memory",
            "can't allocate memory",
            "bad_alloc",
            "ALLOC_FAILED",
            "cudaErrorMemoryAllocation",
            "ALLOCATION_FAILED",
            // cuDNN, where no plan's workspace could be had; cuBLAS, whose handle takes memory.
            "unable to find an engine to execute this computation",
            "CUBLAS_STATUS_NOT_INITIALIZED",
        ],
        "memory does not suffice: lower the batch size, --width and --height or --resolution, or use --dtype bf16",
    ),
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
        "NVIDIA's driver does not serve this libtorch: `hra doctor` names both; install a newer driver, or use --device cpu",
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
    }

    #[test]
    fn a_backtrace_is_left_out_and_a_hint_is_given() {
        let error = tch::TchError::Torch("CUDA out of memory. Tried\nException raised from malloc".into());
        let message = Error::Torch(error).to_string();
        assert!(
            message.starts_with("libtorch: ") && message.contains("\nhint: memory does not suffice"),
            "{message}"
        );
        assert!(!message.contains("Exception raised"), "{message}");
    }
}
