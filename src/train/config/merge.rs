//! Where the settings come from and go to: command line over files over defaults, the copy in a run folder, and what a
//! resumed run may change.

use crate::error::{Error, Result};
use crate::platform::hub;
use crate::platform::observer::Observer;
use crate::train::config::{TrainConfig, UNSET, own_names};
use crate::train::optim::LrSchedule;
use std::path::{Path, PathBuf};

/// Settings that may differ when a run is resumed: they do not change the steps already made.
const FREE_ON_RESUME: [&str; 16] = [
    "output_dir",
    "device",
    "threads",
    "max_train_steps",
    "held_out_data_dir",
    "sample_batch_size",
    "validation_prompt",
    "validation_image",
    "num_validation_images",
    "validation_steps",
    "validation_inference_steps",
    "validation_guidance",
    "validation_scheduler",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "log_every",
];

impl TrainConfig {
    /// What was typed wins over `files`, of which a later one wins over an earlier one; the defaults come last.
    pub fn merged(files: &[&Path], typed: &toml::Table) -> Result<Self> {
        let mut merged = Self::defaults()?;
        for path in files {
            let text = crate::platform::files::read_to_string(path)?;
            let problem = |e: toml::de::Error| {
                let hint = "hint: keys are the long flags of `hra train --help`, with underscores";
                Error::format(path, format!("{}\n{hint}", e.to_string().trim_end()))
            };
            let table = own_names(toml::from_str(&text).map_err(problem)?);
            // Alone over the defaults first, so that a mistake is told with the file it is in.
            over(Self::defaults()?, &table).try_into::<Self>().map_err(problem)?;
            merged = over(merged, &table);
        }
        over(merged, &own_names(typed.clone()))
            .try_into()
            .map_err(|e: toml::de::Error| Error::config(e.to_string()))
    }

    /// Reads a resolved config, as a run folder holds it.
    pub fn read(path: &Path) -> Result<Self> {
        let problem = |e: toml::de::Error| Error::format(path, e.to_string().trim_end().to_string());
        let table: toml::Table =
            toml::from_str(&crate::platform::files::read_to_string(path)?).map_err(problem)?;
        // A run of an earlier version does not name the settings that came later.
        over(Self::defaults()?, &table).try_into().map_err(problem)
    }

    /// The settings of several tables, of which a later one wins over an earlier one, over the defaults.
    pub fn from_tables(tables: &[&toml::Table]) -> Result<Self> {
        let merged =
            tables.iter().fold(Self::defaults()?, |all, table| over(all, &own_names((*table).clone())));
        merged.try_into().map_err(|e: toml::de::Error| Error::config(e.to_string().trim_end().to_string()))
    }

    fn defaults() -> Result<toml::Table> {
        Self::default().to_table()
    }

    /// The same settings with every path made absolute, so that a run can be resumed from any folder. A hub id stays as it is.
    pub fn with_absolute_paths(mut self) -> Result<Self> {
        let absolute = |path: &mut PathBuf| {
            if !path.as_os_str().is_empty() {
                *path = std::path::absolute(&*path).map_err(|e| Error::io("find", path, e))?;
            }
            Ok::<(), Error>(())
        };
        if !hub::is_id(&self.pretrained_model_name_or_path) {
            absolute(&mut self.pretrained_model_name_or_path)?;
        }
        self.model_config.as_mut().map_or(Ok(()), absolute)?;
        absolute(&mut self.output_dir)?;
        absolute(&mut self.instance_data_dir)?;
        if let Some(adapter) = self.init_adapter.as_mut().filter(|path| !hub::is_id(path)) {
            absolute(adapter)?;
        }
        self.class_data_dir.as_mut().map_or(Ok(()), absolute)?;
        let optional = [&mut self.held_out_data_dir, &mut self.train_data_dir, &mut self.palette];
        optional.into_iter().flatten().chain(&mut self.validation_image).try_for_each(absolute)?;
        Ok(self)
    }

    /// As a config file. What is not set is named in a comment, with what happens then.
    pub fn to_toml(&self) -> Result<String> {
        let cannot = |e| Error::config(format!("the settings cannot be written as TOML: {e}"));
        let mut text = toml::to_string(self).map_err(cannot)?;
        let table = self.to_table()?;
        for (key, default) in UNSET.iter().filter(|(key, _)| !table.contains_key(*key)) {
            text += &format!("# {key} is not set: {default}\n");
        }
        Ok(text)
    }

    /// Fails with every setting that would change the steps that `before` has already made.
    pub fn check_resume(&self, before: &Self, observer: &dyn Observer) -> Result<()> {
        let (new, old) = (self.to_table()?, before.to_table()?);
        let mut differences = Vec::new();
        let mut keys: Vec<&String> = new.keys().chain(old.keys()).collect();
        keys.sort();
        keys.dedup();
        for key in keys {
            let show = |v: Option<&toml::Value>| v.map_or("nothing".to_string(), ToString::to_string);
            if !FREE_ON_RESUME.contains(&key.as_str()) && new.get(key) != old.get(key) {
                differences.push(format!(
                    "{key}: the run has {}, asked for is {}",
                    show(old.get(key)),
                    show(new.get(key))
                ));
            }
        }
        if differences.is_empty() {
            let whole = [LrSchedule::Constant, LrSchedule::ConstantWithWarmup];
            if self.max_train_steps != before.max_train_steps && !whole.contains(&self.lr_scheduler) {
                observer.note(&format!(
                    "the learning rate now follows its schedule over {} steps",
                    self.max_train_steps
                ));
            }
            return Ok(());
        }
        Err(Error::Run(format!(
            "a resumed run continues with its own settings, but these differ\n{}\nhint: leave them out, or start a new run in another output_dir",
            differences.join("\n")
        )))
    }

    /// As a table of a config file.
    pub fn to_table(&self) -> Result<toml::Table> {
        toml::Table::try_from(self)
            .map_err(|e| Error::config(format!("the settings cannot be written as TOML: {e}")))
    }
}

/// `table` with the entries of `winner` in place of its own.
fn over(mut table: toml::Table, winner: &toml::Table) -> toml::Table {
    table.extend(winner.iter().map(|(key, value)| (key.clone(), value.clone())));
    table
}
