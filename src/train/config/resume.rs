//! What a resumed run may change, and paths that hold from any folder.

use crate::error::{Error, Result};
use crate::platform::hub;
use crate::platform::observer::Observer;
use crate::train::config::keys::{self, Key, value};
use crate::train::config::{
    CheckpointsSection, DataSection, PreviewsSection, PriorSection, ScheduleSection, TrainConfig,
};
use crate::train::optim::LrSchedule;
use std::path::PathBuf;
use toml::Value;

/// A setting in which two runs differ, with the values of both; `None` where it is not set.
pub struct Difference {
    pub key: &'static Key,
    pub values: [Option<Value>; 2],
}

impl TrainConfig {
    /// The settings in which `other` differs.
    pub fn differences(&self, other: &Self) -> Result<Vec<Difference>> {
        let tables = [self.to_table()?, other.to_table()?];
        let differences = keys::keys().map(|key| {
            let values = [0, 1].map(|i| value(&tables[i], key).cloned());
            Difference { key, values }
        });
        Ok(differences.filter(|d| d.values[0] != d.values[1]).collect())
    }

    /// What a run's steps depend on: the same settings, without those that a resumed run may change.
    fn of_its_steps(&self) -> Self {
        let free = Self::default();
        Self {
            output_dir: free.output_dir,
            device: free.device,
            threads: free.threads,
            data: DataSection { held_out_data_dir: None, strict_paths: false, ..self.data.clone() },
            prior: PriorSection { sample_batch_size: free.prior.sample_batch_size, ..self.prior.clone() },
            schedule: ScheduleSection {
                max_train_steps: free.schedule.max_train_steps,
                ..self.schedule.clone()
            },
            previews: PreviewsSection::default(),
            checkpoints: CheckpointsSection::default(),
            ..self.clone()
        }
    }

    /// Fails with every setting that would change the steps that `before` has already made.
    pub fn check_resume(&self, before: &Self, observer: &dyn Observer) -> Result<()> {
        let differences = self.of_its_steps().differences(&before.of_its_steps())?;
        if differences.is_empty() {
            let whole = [LrSchedule::Constant, LrSchedule::ConstantWithWarmup];
            let (new, old) = (&self.schedule, &before.schedule);
            if new.max_train_steps != old.max_train_steps && !whole.contains(&new.lr_scheduler) {
                observer.note(&format!(
                    "the learning rate now follows its schedule over {} steps",
                    new.max_train_steps
                ));
            }
            return Ok(());
        }
        let show = |v: &Option<Value>| v.as_ref().map_or("nothing".to_string(), ToString::to_string);
        let lines = differences.iter().map(|Difference { key, values: [new, old] }| {
            format!("{}: the run has {}, asked for is {}", key.place(), show(old), show(new))
        });
        Err(Error::run(format!(
            "a resumed run continues with its own settings, but these differ\n{}",
            lines.collect::<Vec<_>>().join("\n")
        ))
        .with_hint("leave them out, or start a new run in another output_dir"))
    }

    /// The same settings with every path made absolute, so that a run can be resumed from any folder. A hub id stays as it is.
    pub fn with_absolute_paths(mut self) -> Result<Self> {
        let absolute = |path: &mut PathBuf| {
            if !path.as_os_str().is_empty() {
                *path = std::path::absolute(&*path).map_err(|e| Error::io("find", path, e))?;
            }
            Ok::<(), Error>(())
        };
        let model = &mut self.model.pretrained_model_name_or_path;
        let of_a_hub = [Some(model), self.model.vae.as_mut(), self.adapter.init_adapter.as_mut()];
        of_a_hub.into_iter().flatten().filter(|path| !hub::is_id(path)).try_for_each(absolute)?;
        [&mut self.output_dir, &mut self.data.instance_data_dir].into_iter().try_for_each(absolute)?;
        let optional = [
            &mut self.model.model_config,
            &mut self.prior.class_data_dir,
            &mut self.data.held_out_data_dir,
            &mut self.data.train_data_dir,
            &mut self.data.palette,
        ];
        optional.into_iter().flatten().chain(&mut self.previews.validation_image).try_for_each(absolute)?;
        Ok(self)
    }
}
