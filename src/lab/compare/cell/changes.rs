//! What the training of a cell changed, measured on its weights: once, and never by a training.

use crate::adapter::spectrum::SpectrumChange;
use crate::adapter::target::TargetRule;
use crate::attach;
use crate::attach::loaded::LoadedAdapter;
use crate::attach::spectrum::spectrum_changes;
use crate::diffusion::stable_diffusion::StableDiffusion;
use crate::error::Result;
use crate::lab::compare::cell::{Cell, has_weights, is_done};
use crate::lab::compare::task::Task;
use crate::lab::results::{self, CellRecord, RECORD_FILE, WeightChanges};
use crate::platform::{device, host};
use crate::train::base;
use crate::train::config::{AdapterSection, MethodName};
use std::path::{Path, PathBuf};

impl Cell<'_> {
    /// Those of the record that is there, or measured where there are weights; `None` for the base model, and of control without an
    /// adapter.
    pub(super) fn changes(&self) -> Result<Option<WeightChanges>> {
        let run = &self.config.output_dir;
        let adapter = &self.config.adapter;
        if self.task.cell.is_base() || adapter.method == MethodName::NONE {
            return Ok(None);
        }
        let path = record_path(self.comparison, self.task);
        let known = if path.is_file() { CellRecord::read(&path).ok() } else { None };
        let known = known.and_then(|record| record.changes);
        if known.is_some() || !has_weights(run) {
            return Ok(known);
        }
        // On the CPU, whatever the cell ran on: what is measured needs f64.
        let asked = base::request(&self.config.model, self.observer)?;
        let mut model = StableDiffusion::open(&asked, self.compute.kind, host::CPU)?;
        device::set_threads(self.config.threads, attach::weight_count(&mut model.unet))?;
        let whole = adapter.method()?.is_some_and(|method| method.trains_whole_network());
        let usual = TargetRule::from_words(&AdapterSection::default().target_modules)?;
        let loaded = LoadedAdapter::read(run, &model.layer_names()?)?;
        Ok(means(&spectrum_changes(&mut model, loaded, whole.then_some(&usual))?))
    }
}

/// Whether a cell that is done lacks what its training changed, and its weights are there to measure it.
pub fn lacks_changes(comparison: &Path, task: &Task) -> bool {
    let config = task.train_config(comparison);
    let could =
        !task.cell.is_base() && config.adapter.method != MethodName::NONE && has_weights(&config.output_dir);
    could
        && is_done(comparison, task)
        && CellRecord::read(&record_path(comparison, task))
            .is_ok_and(|record| record.changes.is_none() && record.failure.is_none())
}

fn record_path(comparison: &Path, task: &Task) -> PathBuf {
    results::cell_folder(comparison, &task.cell.id).join(RECORD_FILE)
}

fn means(layers: &[SpectrumChange]) -> Option<WeightChanges> {
    let mean = |of: fn(&SpectrumChange) -> f64| layers.iter().map(of).sum::<f64>() / layers.len() as f64;
    (!layers.is_empty()).then(|| WeightChanges {
        layers: layers.len(),
        angle: mean(|layer| layer.angle),
        singular_values: mean(|layer| layer.singular_values),
        intruders: layers.iter().map(|layer| layer.intruders).sum(),
        leading: layers.iter().map(|layer| layer.leading).sum(),
    })
}
