//! What `hra export` says of what it wrote, as text and as JSON.

use crate::attach::fixed::AttachReport;
use serde::Serialize;
use std::fmt::{Display, Formatter};
use std::path::PathBuf;

/// What was written, and how true it is to what was asked for.
#[derive(Debug, Serialize)]
pub struct Written {
    /// `adapter`, `LoRA` or `model`.
    pub what: &'static str,
    /// Folder or file.
    pub path: PathBuf,
    /// What was read.
    pub adapters: Vec<AttachReport>,
    /// What a user should know, one sentence each.
    pub warnings: Vec<String>,
    /// The same of less weight.
    pub notes: Vec<String>,
    /// What a LoRA could not take over; `None` if it took all.
    pub approximation: Option<Approximation>,
    /// The file compared with what was to be in it.
    pub read_back: ReadBack,
}

/// Changes of full rank that became the best LoRA of a rank.
#[derive(Debug, Serialize)]
pub struct Approximation {
    /// How many layers.
    pub layers: usize,
    /// Rank of the LoRA.
    pub rank: i64,
    /// Share of the energy that is kept, 0 to 1: mean over layers.
    pub mean_energy: f64,
    /// The least of any layer.
    pub least_energy: f64,
    /// Which layer that is.
    pub least_layer: String,
}

/// How far what was read back is from what was to be written.
#[derive(Debug, Serialize)]
pub struct ReadBack {
    /// Of any weight.
    pub largest_difference: f64,
    /// Norm of all differences over the norm of the change; `None` of whole models.
    pub relative_difference: Option<f64>,
    /// Layers or biases that are not in both.
    pub missing: usize,
    /// Changed tensors of a whole model.
    pub tensors: Option<usize>,
}

impl Display for Written {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        self.warnings.iter().try_for_each(|warning| writeln!(f, "warning: {warning}"))?;
        self.adapters.iter().try_for_each(|report| writeln!(f, "{report}"))?;
        self.notes.iter().try_for_each(|note| writeln!(f, "note: {note}"))?;
        writeln!(f, "{}: {}", self.what, self.path.display())?;
        if let Some(Approximation { layers, rank, mean_energy, least_energy, least_layer }) =
            &self.approximation
        {
            let (mean, least) = (mean_energy * 100.0, least_energy * 100.0);
            writeln!(
                f,
                "{layers} layers' changes are not of low rank: rank {rank} keeps {mean:.2} % of their energy on average, \
                 {least:.2} % at least ({least_layer})"
            )?;
        }
        write!(f, "{}", self.read_back)?;
        let lost = self.read_back.relative_difference.unwrap_or_default();
        if self.approximation.is_none() && lost > VISIBLE {
            write!(
                f,
                "\nwarning: {:.0} % of what the adapter changes is lost in this number format: write it with --dtype f32",
                lost * 100.0
            )?;
        }
        Ok(())
    }
}

/// A share of an adapter's change whose loss may be seen.
const VISIBLE: f64 = 0.01;

impl Display for ReadBack {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        let largest = self.largest_difference;
        if let Some(tensors) = self.tensors {
            return write!(
                f,
                "read back: the largest difference in {tensors} changed tensors is {largest:.1e}"
            );
        }
        let relative = self.relative_difference.unwrap_or_default();
        write!(
            f,
            "read back: the largest difference of a weight is {largest:.1e}; {relative:.1e} of the change in all"
        )?;
        if self.missing == 0 {
            Ok(())
        } else {
            write!(f, "; {} layers or biases are not in both", self.missing)
        }
    }
}
