//! What the training of a cell changed, measured on its weights: once, and never by a training.

use crate::adapter::spectrum::SpectrumChange;
use crate::adapter::target::TargetRule;
use crate::attach;
use crate::attach::loaded::LoadedAdapter;
use crate::attach::spectrum::spectrum_changes;
use crate::diffusion::stable_diffusion::StableDiffusion;
use crate::error::{ErrorKind, Result};
use crate::lab::compare::cell::{Cell, has_weights, is_done};
use crate::lab::compare::task::Task;
use crate::lab::results::{self, CellRecord, RECORD_FILE, WeightChanges};
use crate::platform::{device, host};
use crate::train::base;
use crate::train::config::{MethodName, TrainConfig};
use std::path::{Path, PathBuf};

impl Cell<'_> {
    /// Those of the record that is there.
    pub(super) fn kept_changes(&self) -> Option<WeightChanges> {
        let path = record_path(self.comparison, self.task);
        path.is_file().then(|| CellRecord::read(&path).ok())??.changes
    }

    /// A record with what the training changed, measured where it is not there and weights are. What cannot be measured is told and
    /// left out: the scores are as good without. Errors: an interrupt.
    pub(super) fn with_changes(&self, record: CellRecord) -> Result<CellRecord> {
        if record.changes.is_some() || !can_measure(self.task, &self.config) {
            return Ok(record);
        }
        match self.measured() {
            Err(e) if !matches!(e.kind, ErrorKind::Interrupted(_)) => {
                self.observer
                    .note(&format!("what the training changed in the weights was not measured: {e}"));
                Ok(record)
            }
            changes => Ok(CellRecord { changes: changes?, ..record }),
        }
    }

    fn measured(&self) -> Result<Option<WeightChanges>> {
        let TrainConfig { adapter, model, threads, output_dir, .. } = &self.config;
        // On the CPU, whatever the cell ran on: what is measured needs f64.
        let asked = base::request(model, self.observer)?;
        let mut model = StableDiffusion::open(&asked, self.compute.numbers, host::CPU)?;
        device::set_threads(*threads, attach::weight_count(&mut model.unet))?;
        let whole = adapter.method()?.is_some_and(|method| method.trains_whole_network());
        // Of a whole network the layers that the comparison's adapters are on.
        let targets = TargetRule::from_words(&adapter.target_modules)?;
        let loaded = LoadedAdapter::read(output_dir, &model.layer_names()?)?;
        Ok(means(&spectrum_changes(&mut model, loaded, whole.then_some(&targets), self.observer)?))
    }
}

/// Whether a cell that is done lacks what its training changed, and its weights are there to measure it.
pub fn lacks_changes(comparison: &Path, task: &Task) -> bool {
    can_measure(task, &task.train_config(comparison))
        && is_done(comparison, task)
        && CellRecord::read(&record_path(comparison, task))
            .is_ok_and(|record| record.changes.is_none() && record.failure.is_none())
}

/// Not of the base model, nor of control without an adapter.
fn can_measure(task: &Task, config: &TrainConfig) -> bool {
    let has_adapter = !task.cell.is_base() && config.adapter.method != MethodName::NONE;
    task.weight_changes && has_adapter && has_weights(&config.output_dir)
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
