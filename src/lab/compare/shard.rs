//! Which share of the cells this worker has: `--shard I/N`, or what Slurm's job arrays and Kubernetes' indexed jobs tell their
//! workers in the environment.

use crate::error::{Error, Result};

/// Share `index` (from 0) of `count`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    /// From 0.
    pub index: usize,
    /// 1 or more.
    pub count: usize,
}

impl Shard {
    /// Everything.
    pub const WHOLE: Self = Self { index: 0, count: 1 };

    /// From the flags `--shard` (`I/N`, or `auto`) and `--shard-count`; `environment` looks a variable up.
    ///
    /// `auto`: I is SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN and N SLURM_ARRAY_TASK_COUNT; or I is JOB_COMPLETION_INDEX
    /// and N `--shard-count`.
    pub fn from_flags(
        shard: Option<&str>,
        count: Option<usize>,
        environment: impl Fn(&str) -> Option<String>,
    ) -> Result<Self> {
        let number = |name: &str| -> Result<Option<usize>> {
            let Some(text) = environment(name).filter(|t| !t.is_empty()) else { return Ok(None) };
            let problem = || Error::config(format!("{name}: expected a number, found `{text}`"));
            text.trim().parse().map(Some).map_err(|_| problem())
        };
        let shard = match (shard, count) {
            (None, None) => return Ok(Self::WHOLE),
            (Some(text), count) if text != "auto" => {
                let wrong =
                    || Error::config(format!("--shard: expected I/N such as 0/4, or auto, found `{text}`"));
                let (index, own) = match text.split_once('/') {
                    Some((index, own)) => (index, Some(own.parse().map_err(|_| wrong())?)),
                    None => (text, None),
                };
                let count = own.or(count).ok_or_else(wrong)?;
                Self { index: index.parse().map_err(|_| wrong())?, count }
            }
            (_, count) => {
                let slurm =
                    match (number("SLURM_ARRAY_TASK_ID")?, number("SLURM_ARRAY_TASK_MIN")?) {
                        (Some(id), min) => Some(id.checked_sub(min.unwrap_or(0)).ok_or_else(|| {
                            Error::config("SLURM_ARRAY_TASK_ID is below SLURM_ARRAY_TASK_MIN")
                        })?),
                        _ => None,
                    };
                let index = match slurm {
                    Some(index) => Some(index),
                    None => number("JOB_COMPLETION_INDEX")?,
                };
                let index = index.ok_or_else(|| {
                    Error::config(
                        "--shard: expected SLURM_ARRAY_TASK_ID or JOB_COMPLETION_INDEX in the environment, found neither",
                    ).with_hint("--shard I/N names the share itself")
                })?;
                let count = match count {
                    Some(count) => Some(count),
                    None => number("SLURM_ARRAY_TASK_COUNT")?,
                };
                let count = count.ok_or_else(|| {
                    Error::config("--shard: how many shares there are is not known")
                        .with_hint("give --shard-count N")
                })?;
                Self { index, count }
            }
        };
        if shard.count == 0 || shard.index >= shard.count {
            return Err(Error::config(format!(
                "--shard: expected I from 0 to N - 1, found {}/{}",
                shard.index, shard.count
            )));
        }
        Ok(shard)
    }

    /// Whether cell number `cell` is in this share.
    pub fn has(self, cell: usize) -> bool {
        cell % self.count == self.index
    }
}
