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
    #[error("libtorch: {}", first_line(.0))]
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

/// libtorch appends a C++ backtrace, which says nothing to a user.
fn first_line(error: &tch::TchError) -> String {
    error.to_string().lines().next().unwrap_or_default().to_string()
}
