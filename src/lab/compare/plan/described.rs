//! What a plan says to readers: methods, subjects, and what is the same for every cell.

use crate::error::{Error, Result};
use crate::lab::compare::config::MethodEntry;
use crate::lab::compare::plan::Planner;
use crate::lab::compare::subject::{Subject, SubjectPicture, SubjectPictures};
use crate::lab::results::{PlannedMethod, PlannedSubject};
use crate::model::control::Passes;
use crate::platform::choice::Choice;
use crate::train::config::keys::{keys, value};
use crate::train::config::{ScheduleSection, TrainConfig};

impl Planner<'_> {
    pub(super) fn method(&self, method: &MethodEntry) -> Result<PlannedMethod> {
        let own = TrainConfig::own_words(&method.settings)?;
        let said = keys().filter_map(|key| Some((key.name.to_string(), value(&own, key)?)));
        let settings = said.map(|(name, value)| Ok((name, serde_json::to_value(value)?)));
        let settings = settings.collect::<serde_json::Result<_>>().map_err(|_| {
            Error::config(format!("method `{}`: settings that JSON does not hold", method.label))
        })?;
        let learning_rates = self.config.learning_rates(method)?;
        Ok(PlannedMethod { label: method.label.clone(), settings, learning_rates })
    }

    /// What is the same for every cell and a reader wants to know.
    pub(super) fn common(&self) -> Result<Vec<(String, String)>> {
        let (train, draw) = (&self.train, &self.config.draw);
        let scheduler = draw.scheduler.map_or("the model's".to_string(), |s| s.to_string());
        let mut common = vec![
            ("model".to_string(), train.model.pretrained_model_name_or_path.display().to_string()),
            ("resolution".into(), train.data.resolution.map_or("the model's".into(), |r| r.to_string())),
            ("steps".into(), train.schedule.max_train_steps.to_string()),
            (
                if self.config.topic.is_control() { "pairs a step" } else { "subject pictures a step" }
                    .into(),
                (train.schedule.train_batch_size * train.schedule.gradient_accumulation_steps).to_string(),
            ),
            ("learning-rate schedule".into(), self.schedule(train)),
            ("pictures a prompt".into(), draw.num_images.to_string()),
            ("drawn with".into(), format!("{scheduler}, {} steps, guidance {}", draw.steps, draw.guidance)),
        ];
        if self.config.topic.is_control() {
            let passes = match draw.control_passes {
                Passes::Both => "both passes of guidance",
                Passes::Conditional => "the prompt's pass of guidance",
            };
            common.push(("condition".into(), format!("in {passes}, scale {}", draw.control_scale)));
            common.retain(|(key, _)| key != "pictures a prompt");
            common.push(("captions left out".into(), train.data.proportion_empty_prompts.to_string()));
        }
        let mut targets = Vec::new();
        for method in &self.config.methods {
            targets.push(self.train_config(method).adapter.target_modules.clone());
        }
        if targets.iter().all(|words| *words == train.adapter.target_modules) {
            common.push(("target modules of adapters".into(), train.adapter.target_modules.join(", ")));
        }
        if train.prior.with_prior_preservation {
            common.push((
                "class pictures".into(),
                format!("{}, weight {}", train.prior.num_class_images, train.prior.prior_loss_weight),
            ));
        }
        Ok(common)
    }

    fn schedule(&self, train: &TrainConfig) -> String {
        let ScheduleSection { lr_scheduler, lr_warmup_steps, .. } = &train.schedule;
        format!("{}, warm-up {lr_warmup_steps}", lr_scheduler.word())
    }
}

pub(super) fn planned_subject(subject: &Subject) -> PlannedSubject {
    let place = |kind: &str, pictures: &[SubjectPicture]| {
        pictures.iter().map(|p| format!("subjects/{}/{kind}/{}", subject.name, p.name)).collect()
    };
    let none = SubjectPictures::default();
    let own = subject.pictures().unwrap_or(&none);
    PlannedSubject {
        name: subject.name.clone(),
        class: subject.class.clone(),
        instance_prompt: own.instance_prompt.clone(),
        prompts: subject.prompts.iter().map(|p| p.prompt.clone()).collect(),
        validation_prompts: subject.validation_prompts.iter().map(|p| p.prompt.clone()).collect(),
        train_pictures: place("train", &own.train),
        validation_pictures: place("validation", &own.validation),
        test_pictures: place("test", &own.test),
        notes: subject.notes.clone(),
        control: subject.pairs().map(|pairs| pairs.planned(&subject.name)),
    }
}
