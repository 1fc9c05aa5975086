//! Short trainings on the embedded model by the real binary.

use super::base::root;
use super::finished::Finished;
use super::scratch::Scratch;
use std::path::PathBuf;

/// The embedded model.
pub fn tiny_sd() -> PathBuf {
    root().join("assets/tiny-sd")
}

impl Scratch {
    /// Flags of a short training run on the cat into `out`, with prior preservation from pictures that are there.
    pub fn train_flags(&self, out: &str, more: &[&str]) -> Vec<String> {
        let assets = root().join("assets");
        let asset = |name: &str| assets.join(name).to_str().unwrap().to_string();
        let mut flags: Vec<String> = vec!["train".into()];
        for (flag, value) in [
            ("--pretrained_model_name_or_path", tiny_sd().to_str().unwrap().into()),
            ("--instance_data_dir", asset("subjects/cat/train")),
            ("--instance_prompt", "a fluent 3d emoji of a sks cat face".into()),
            ("--class_data_dir", asset("subjects/robot/train")),
            ("--class_prompt", "a fluent 3d emoji of a robot".into()),
            ("--output_dir", self.path(out).to_str().unwrap().into()),
            ("--learning_rate", "3e-3".into()),
            ("--log_every", "1".into()),
            ("--max_train_steps", "6".into()),
        ] {
            if !more.contains(&flag) {
                flags.extend([flag.to_string(), value]);
            }
        }
        flags.push("--with_prior_preservation".into());
        flags.extend(more.iter().map(|s| s.to_string()));
        flags
    }

    /// Trains with [`Self::train_flags`] and expects success.
    pub fn train(&self, out: &str, more: &[&str]) -> Finished {
        let flags = self.train_flags(out, more);
        self.ok(&flags.iter().map(String::as_str).collect::<Vec<_>>())
    }
}
