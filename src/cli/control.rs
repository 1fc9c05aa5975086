//! The flags by which `hra sample` is given conditions, and what they lead to.

use crate::data::pairs::{ConditionKind, PairFolder, PairSettings};
use crate::device::Compute;
use crate::error::{Error, Result};
use crate::image::{Filter, RgbImage, Thresholds, canny, load_rgb, resize};
use crate::model::control::{ConditionEncoder, Control, ControlNet, EncoderConfig, Passes, encoder_of};
use crate::sample::{Settings, Steering, Strength, conditions};
use crate::tensor_file;
use clap::Args;
use std::path::{Path, PathBuf};

/// Flags of controlled drawing.
#[derive(Debug, Args)]
#[command(next_help_heading = "Control")]
pub struct ControlArgs {
    /// Condition (edges, map, landmarks ..) for a ControlNet or an adapter that was trained with conditions: one for all prompts,
    /// or one for each
    #[arg(long, value_name = "IMAGE")]
    control: Vec<PathBuf>,
    /// ControlNet in the Hugging Face layout
    #[arg(long, value_name = "DIR")]
    controlnet: Option<PathBuf>,
    /// Draw the captions and conditions of pairs: a folder with metadata.jsonl or metadata.csv, or a .jsonl, .json or .csv file.
    /// Pictures get the names of the pairs' pictures
    #[arg(long, value_name = "PATH", conflicts_with_all = ["control", "prompt", "prompt_file", "latents"])]
    pairs: Option<PathBuf>,
    /// The first so many pairs [default: all]
    #[arg(long, value_name = "N", requires = "pairs")]
    num_pairs: Option<usize>,
    /// Each caption with the condition of the pair after it: what of a score is chance
    #[arg(long, requires = "pairs")]
    shuffle_conditions: bool,
    /// What the conditions are [default: what the adapter was trained with, else other]
    #[arg(long, value_enum)]
    condition: Option<ConditionKind>,
    /// Make the edges of what --control or --pairs names, for canny
    #[arg(long)]
    make_conditions: bool,
    /// Lower threshold of edges that are made [default: the adapter's, else 100]
    #[arg(long, value_name = "N")]
    canny_low: Option<f64>,
    /// Upper threshold of edges that are made [default: the adapter's, else 200]
    #[arg(long, value_name = "N")]
    canny_high: Option<f64>,
    /// Colours of the classes (JSON), by which label maps become conditions
    #[arg(long, value_name = "FILE", requires = "pairs")]
    palette: Option<PathBuf>,
    /// Column of the pictures
    #[arg(long, default_value = "file_name", value_name = "NAME")]
    image_column: String,
    /// Column of the captions
    #[arg(long, default_value = "text", value_name = "NAME")]
    caption_column: String,
    /// Column of the conditions
    #[arg(long, default_value = "conditioning_image", value_name = "NAME")]
    conditioning_image_column: String,
    /// What the control adds is multiplied by this
    #[arg(
        long,
        alias = "controlnet-conditioning-scale",
        value_name = "SCALE",
        default_value_t = 1.0,
        allow_negative_numbers = true
    )]
    control_scale: f64,
    /// Share of the steps after which the control begins
    #[arg(long, alias = "control-guidance-start", value_name = "SHARE", default_value_t = 0.0)]
    control_start: f64,
    /// Share of the steps after which it ends
    #[arg(long, alias = "control-guidance-end", value_name = "SHARE", default_value_t = 1.0)]
    control_end: f64,
    /// Which of guidance's passes see the condition
    #[arg(long, value_enum, default_value_t = Passes::Both)]
    control_passes: Passes,
}

/// Pairs whose captions are drawn.
pub struct Pairs {
    folder: PairFolder,
    count: usize,
    shuffled: bool,
}

/// A control, and the conditions that it is shown.
pub struct Controlled<'a> {
    args: &'a ControlArgs,
    control: Control,
    conditions: Conditions<'a>,
    thresholds: Thresholds,
    /// The control encoder of an adapter, which the base model is drawn without.
    pub of_adapter: bool,
}

/// Where conditions come from.
enum Conditions<'a> {
    /// One for all prompts, or one for each.
    Pictures(Vec<RgbImage>),
    Pairs(&'a Pairs),
}

/// What an adapter's control encoder was trained with.
struct Trained {
    dir: PathBuf,
    config: EncoderConfig,
}

impl Trained {
    fn find(adapters: &[PathBuf]) -> Result<Vec<Self>> {
        let there = adapters.iter().filter_map(|path| encoder_of(path));
        there.map(|dir| Ok(Self { config: EncoderConfig::read(&dir)?, dir })).collect()
    }
}

impl ControlArgs {
    /// The pairs that are to be drawn, where any are named.
    pub fn read_pairs(&self, adapters: &[PathBuf]) -> Result<Option<Pairs>> {
        let Some(path) = &self.pairs else { return Ok(None) };
        let trained = Trained::find(adapters)?;
        let settings = PairSettings {
            image_column: self.image_column.clone(),
            caption_column: self.caption_column.clone(),
            conditioning_image_column: self.conditioning_image_column.clone(),
            condition: self.kind(&trained)?,
            make_conditions: self.make_conditions,
            thresholds: self.thresholds(&trained)?,
            palette: self.palette.clone(),
        };
        let folder = PairFolder::read(path, &settings)?;
        if !folder.bad().is_empty() {
            eprintln!("warning: {}", folder.report(1));
        }
        let count = folder.pairs().len().min(self.num_pairs.unwrap_or(usize::MAX));
        if count == 0 || self.shuffle_conditions && count < 2 {
            return Err(Error::config("--num-pairs: expected 1 or more, and 2 or more to shuffle them"));
        }
        Ok(Some(Pairs { folder, count, shuffled: self.shuffle_conditions }))
    }

    /// Loads the control that was asked for; `None` where there are no conditions. `adapters` are the paths of adapters,
    /// `prompts` their number.
    pub fn load<'a>(
        &'a self,
        adapters: &[PathBuf],
        pairs: Option<&'a Pairs>,
        prompts: usize,
        compute: &Compute,
    ) -> Result<Option<Controlled<'a>>> {
        let trained = Trained::find(adapters)?;
        if self.control.is_empty() && pairs.is_none() {
            if self.controlnet.is_some() {
                return Err(Error::config(
                    "--controlnet: expected a condition, found none\nhint: give --control IMAGE",
                ));
            }
            for encoder in &trained {
                eprintln!("note: {} is not used: no --control IMAGE is given", encoder.dir.display());
            }
            return Ok(None);
        }
        if pairs.is_none() && self.control.len() != 1 && self.control.len() != prompts {
            let found = self.control.len();
            return Err(Error::config(format!(
                "--control: expected one condition, or one for each of {prompts} prompts, found {found}"
            )));
        }
        let (control, unused) = match (&self.controlnet, &trained[..]) {
            (Some(dir), []) => {
                let (net, unused) = ControlNet::load(dir, compute.kind, compute.device)?;
                (Control::Net(Box::new(net)), unused)
            }
            (None, [encoder]) => {
                let (encoder, unused) = ConditionEncoder::load(&encoder.dir, compute.device)?;
                (Control::Encoder(encoder), unused)
            }
            (None, []) if pairs.is_some() => {
                eprintln!("note: nothing reads the conditions; the captions are drawn without them");
                return Ok(None);
            }
            (None, []) => {
                return Err(Error::config(
                    "--control: nothing reads the condition\nhint: give --controlnet DIR, or an --adapter that was trained with \
                     conditions (its folder has control_encoder/)",
                ));
            }
            _ => {
                let encoders = trained.iter().map(|encoder| &encoder.dir);
                let found: Vec<String> =
                    self.controlnet.iter().chain(encoders).map(|p| p.display().to_string()).collect();
                let found = found.join(" and ");
                return Err(Error::config(format!("--control: expected one control, found {found}")));
            }
        };
        if !unused.is_empty() {
            eprintln!("note: control: tensors that were not used: {}", tensor_file::list(&unused));
        }
        let kind = self.kind(&trained)?;
        if self.make_conditions && kind != ConditionKind::Canny {
            return Err(Error::config(format!(
                "--make-conditions: only edges can be made, found conditions `{kind}`\nhint: give --condition canny if they are edges"
            )));
        }
        let conditions = match pairs {
            Some(pairs) => Conditions::Pairs(pairs),
            None => {
                Conditions::Pictures(self.control.iter().map(|path| load_rgb(path)).collect::<Result<_>>()?)
            }
        };
        Ok(Some(Controlled {
            args: self,
            conditions,
            thresholds: self.thresholds(&trained)?,
            of_adapter: matches!(control, Control::Encoder(_)),
            control,
        }))
    }

    /// What the conditions are, as the user or else the adapter says.
    fn kind(&self, trained: &[Trained]) -> Result<ConditionKind> {
        let own = trained.first().and_then(|encoder| {
            <ConditionKind as clap::ValueEnum>::from_str(&encoder.config.condition, true).ok()
        });
        if let (Some(asked), Some(own)) = (self.condition, own)
            && asked != own
        {
            eprintln!("warning: --condition {asked}: the adapter was trained with conditions `{own}`");
        }
        Ok(self.condition.or(own).unwrap_or_default())
    }

    fn thresholds(&self, trained: &[Trained]) -> Result<Thresholds> {
        let own = trained.first().and_then(|encoder| encoder.config.canny_thresholds);
        let own = own.map_or_else(Thresholds::default, |[low, high]| Thresholds { low, high });
        let thresholds =
            Thresholds { low: self.canny_low.unwrap_or(own.low), high: self.canny_high.unwrap_or(own.high) };
        let Thresholds { low, high } = thresholds;
        if !(0.0..=1e9).contains(&low) || !(low..=1e9).contains(&high) {
            return Err(Error::config(format!(
                "--canny-low and --canny-high: expected two numbers from 0 up, the first not above the second, found {low} and {high}"
            )));
        }
        Ok(thresholds)
    }

    fn strength(&self) -> Strength {
        Strength {
            scale: self.control_scale,
            start: self.control_start,
            end: self.control_end,
            passes: self.control_passes,
        }
    }
}

impl Pairs {
    /// The captions, in the order of the pairs.
    pub fn captions(&self) -> Vec<String> {
        (0..self.count).map(|i| self.folder.caption(i).to_string()).collect()
    }

    /// The names of the pairs' pictures without folder and ending, which the drawn ones get.
    pub fn names(&self) -> Result<Vec<String>> {
        let stem = |i: usize| {
            let path = &self.folder.pairs()[i].image;
            path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
        };
        let names: Vec<String> = (0..self.count).map(stem).collect();
        let mut sorted = names.clone();
        sorted.sort();
        if let Some(twice) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(Error::Data(format!(
                "--pairs: expected pictures of different names, found `{}` twice",
                twice[0]
            )));
        }
        if names.iter().any(|name| name == "grid") {
            return Err(Error::Data(
                "--pairs: a picture called `grid` would be in the way of grid.png".into(),
            ));
        }
        Ok(names)
    }

    /// The pair whose condition the caption of pair `p` is drawn with.
    fn source(&self, p: usize) -> usize {
        if self.shuffled { (p + 1) % self.count } else { p }
    }

    fn condition(&self, p: usize, width: u32, height: u32) -> Result<RgbImage> {
        Ok(self.folder.at_size(self.source(p), width, height)?.1)
    }

    fn path(&self, p: usize) -> &Path {
        &self.folder.pairs()[self.source(p)].image
    }
}

impl Controlled<'_> {
    /// Width and height of the first condition, each cut to a multiple of `factor`: what is drawn where no size is given, unless
    /// there are pairs, which are cut to what is drawn.
    pub fn size(&self, factor: i64) -> Option<[i64; 2]> {
        let Conditions::Pictures(pictures) = &self.conditions else { return None };
        let (width, height) = pictures[0].dimensions();
        Some([width, height].map(|n| i64::from(n) / factor * factor))
    }

    /// The steering of prompt `p`, and its condition as it is shown.
    pub fn steering(&self, p: usize, settings: &Settings) -> Result<(Steering<'_>, RgbImage)> {
        let (width, height) = (settings.width as u32, settings.height as u32);
        let condition = match &self.conditions {
            Conditions::Pairs(pairs) => pairs.condition(p, width, height)?,
            Conditions::Pictures(pictures) => {
                let picture = resize(&pictures[p.min(pictures.len() - 1)], width, height, Filter::Lanczos);
                if self.args.make_conditions { canny(&picture, self.thresholds).to_rgb() } else { picture }
            }
        };
        let conditions = conditions(&[&condition], settings.width, settings.height);
        Ok((Steering { control: &self.control, conditions, strength: self.args.strength() }, condition))
    }

    /// What the pictures of prompt `p` say of their control.
    pub fn text(&self, p: usize) -> Vec<(String, String)> {
        let args = self.args;
        let file = match &self.conditions {
            Conditions::Pictures(_) => &args.control[p.min(args.control.len() - 1)],
            Conditions::Pairs(pairs) => pairs.path(p),
        };
        let made = if args.make_conditions { "edges of " } else { "" };
        let passes = if args.control_passes == Passes::Both { "both" } else { "conditional" };
        let net = args.controlnet.as_ref().map(|dir| ("controlnet", dir.display().to_string()));
        let own = [
            ("control", format!("{made}{}", file.display())),
            ("control_scale", args.control_scale.to_string()),
            ("control_start", args.control_start.to_string()),
            ("control_end", args.control_end.to_string()),
            ("control_passes", passes.to_string()),
        ];
        own.into_iter().chain(net).map(|(key, value)| (key.to_string(), value)).collect()
    }
}
