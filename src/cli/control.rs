//! The flags by which `hra sample` is given conditions, and what they lead to.

use crate::device::Compute;
use crate::error::{Error, Result};
use crate::image::{Filter, RgbImage, load_rgb, resize};
use crate::model::control::{CONTROL_ENCODER, ConditionEncoder, Control, ControlNet, Passes};
use crate::sample::{Settings, Steering, Strength, conditions};
use crate::tensor_file;
use clap::Args;
use std::path::PathBuf;

/// Flags of controlled drawing.
#[derive(Debug, Args)]
pub struct ControlArgs {
    /// Condition (edges, map, landmarks ..) for a ControlNet or an adapter trained with a control encoder: one for all prompts,
    /// or one for each
    #[arg(long, value_name = "IMAGE", help_heading = "Control")]
    control: Vec<PathBuf>,
    /// ControlNet in the Hugging Face layout
    #[arg(long, value_name = "DIR", requires = "control", help_heading = "Control")]
    controlnet: Option<PathBuf>,
    /// What the control adds is multiplied by this
    #[arg(
        long,
        alias = "controlnet-conditioning-scale",
        value_name = "SCALE",
        default_value_t = 1.0,
        allow_negative_numbers = true,
        help_heading = "Control"
    )]
    control_scale: f64,
    /// Share of the steps after which the control begins
    #[arg(
        long,
        alias = "control-guidance-start",
        value_name = "SHARE",
        default_value_t = 0.0,
        help_heading = "Control"
    )]
    control_start: f64,
    /// Share of the steps after which it ends
    #[arg(
        long,
        alias = "control-guidance-end",
        value_name = "SHARE",
        default_value_t = 1.0,
        help_heading = "Control"
    )]
    control_end: f64,
    /// Which of guidance's passes see the condition
    #[arg(long, value_enum, default_value_t = Passes::Both, help_heading = "Control")]
    control_passes: Passes,
}

/// A control, and the conditions that it is shown.
pub struct Controlled {
    control: Control,
    pictures: Vec<RgbImage>,
    strength: Strength,
    /// The control encoder of an adapter, which the base model is drawn without.
    pub of_adapter: bool,
    /// For the texts of a picture.
    about: Vec<(String, String)>,
    files: Vec<PathBuf>,
}

impl ControlArgs {
    /// Loads what was asked for; `None` where nothing was. `adapters` are the paths of adapters, `prompts` their number.
    pub fn load(
        &self,
        adapters: &[PathBuf],
        prompts: usize,
        compute: &Compute,
    ) -> Result<Option<Controlled>> {
        let encoders: Vec<PathBuf> = adapters
            .iter()
            .map(|path| path.join(CONTROL_ENCODER))
            .filter(|path| path.join("config.json").is_file())
            .collect();
        if self.control.is_empty() {
            for encoder in &encoders {
                eprintln!("note: {} is not used: no --control IMAGE is given", encoder.display());
            }
            return Ok(None);
        }
        if self.control.len() != 1 && self.control.len() != prompts {
            let found = self.control.len();
            return Err(Error::config(format!(
                "--control: expected one condition, or one for each of {prompts} prompts, found {found}"
            )));
        }
        let strength = Strength {
            scale: self.control_scale,
            start: self.control_start,
            end: self.control_end,
            passes: self.control_passes,
        };
        strength.validate()?;
        let (control, unused) = match (&self.controlnet, &encoders[..]) {
            (Some(dir), []) => {
                let (net, unused) = ControlNet::load(dir, compute.kind, compute.device)?;
                (Control::Net(Box::new(net)), unused)
            }
            (None, [dir]) => {
                let (encoder, unused) = ConditionEncoder::load(dir, compute.device)?;
                (Control::Encoder(encoder), unused)
            }
            (None, []) => {
                return Err(Error::config(
                    "--control: nothing reads the condition\nhint: give --controlnet DIR, or an --adapter that was trained with \
                     conditions (its folder has control_encoder/)",
                ));
            }
            _ => {
                let of_net = self.controlnet.iter().cloned();
                let found: Vec<String> =
                    of_net.chain(encoders.iter().cloned()).map(|p| p.display().to_string()).collect();
                return Err(Error::config(format!(
                    "--control: expected one control, found {}",
                    found.join(" and ")
                )));
            }
        };
        if !unused.is_empty() {
            eprintln!("note: control: tensors that were not used: {}", tensor_file::list(&unused));
        }
        let pictures = self.control.iter().map(|path| load_rgb(path)).collect::<Result<Vec<_>>>()?;
        Ok(Some(Controlled {
            pictures,
            strength,
            of_adapter: matches!(control, Control::Encoder(_)),
            about: self.about(),
            files: self.control.clone(),
            control,
        }))
    }

    /// What a picture says of its control, beside the condition.
    fn about(&self) -> Vec<(String, String)> {
        let net = self.controlnet.as_ref().map(|dir| ("controlnet".into(), dir.display().to_string()));
        let passes = if self.control_passes == Passes::Both { "both" } else { "conditional" };
        let own = [
            ("control_scale", self.control_scale.to_string()),
            ("control_start", self.control_start.to_string()),
            ("control_end", self.control_end.to_string()),
            ("control_passes", passes.to_string()),
        ];
        net.into_iter().chain(own.map(|(key, value)| (key.to_string(), value))).collect()
    }
}

impl Controlled {
    /// Width and height of the first condition, each cut to a multiple of `factor`: what is drawn where no size is given.
    pub fn size(&self, factor: i64) -> [i64; 2] {
        let (width, height) = self.pictures[0].dimensions();
        [width, height].map(|n| i64::from(n) / factor * factor)
    }

    /// The steering of prompt `p` at this size.
    pub fn steering(&self, p: usize, width: i64, height: i64) -> Steering<'_> {
        let conditions = conditions(&[self.picture(p)], width, height);
        Steering { control: &self.control, conditions, strength: self.strength }
    }

    fn picture(&self, p: usize) -> &RgbImage {
        &self.pictures[p.min(self.pictures.len() - 1)]
    }

    /// The condition of prompt `p` as the control is shown it, for the contact sheet.
    pub fn shown(&self, p: usize, settings: &Settings) -> RgbImage {
        let (width, height) = (settings.width as u32, settings.height as u32);
        resize(self.picture(p), width, height, Filter::Lanczos)
    }

    /// What the pictures of prompt `p` say of it.
    pub fn text(&self, p: usize) -> Vec<(String, String)> {
        let file = self.files[p.min(self.files.len() - 1)].display().to_string();
        std::iter::once(("control".to_string(), file)).chain(self.about.clone()).collect()
    }
}
