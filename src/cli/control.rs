//! The flags by which `hra sample` is given conditions, and what they lead to.

use crate::cli::choice::choice;
use crate::cli::prepare::thresholds;
use crate::data::image::decode::MAX_FILE_BYTES;
use crate::data::image::edges::may_be_edges;
use crate::data::image::{RgbImage, Thresholds};
use crate::data::pairs::{ConditionFiles, ConditionKind, PairFolder, PairSettings, shuffled};
use crate::diffusion::sample::{SampleSettings, Steering, Strength, conditions};
use crate::error::{Error, Result};
use crate::model::control::{
    ConditionEncoder, Control, ControlNet, EncoderConfig, PALETTE_FILE, Passes, encoder_of,
};
use crate::platform::choice::Choice;
use crate::platform::device::Compute;
use crate::platform::files;
use crate::platform::hub::{self, Wanted};
use crate::platform::observer::Observer;
use crate::weights::tensor_file;
use clap::Args;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

/// Flags of controlled drawing.
#[derive(Debug, Args)]
#[command(next_help_heading = "Control")]
pub struct ControlArgs {
    /// Condition (edges, map, landmarks ..) for a ControlNet or an adapter that was trained with conditions: one for all prompts,
    /// or one for each
    #[arg(long, value_name = "IMAGE")]
    control: Vec<PathBuf>,
    /// ControlNet: folder in the Hugging Face layout, or hub id owner/name[@revision]
    #[arg(long, value_name = "DIR")]
    controlnet: Option<PathBuf>,
    /// Draw the captions and conditions of pairs: a folder with metadata.jsonl or metadata.csv, or a .jsonl, .json or .csv file.
    /// Pictures get the names of the pairs' pictures
    #[arg(long, value_name = "PATH", conflicts_with_all = ["control", "prompt", "prompt_file", "latents"])]
    pairs: Option<PathBuf>,
    /// The first so many pairs [default: all]
    #[arg(long, value_name = "N")]
    num_pairs: Option<usize>,
    /// Each caption with the condition of the next pair of another picture: what of a score is chance
    #[arg(long)]
    shuffle_conditions: bool,
    /// What the conditions are [default: what the adapter was trained with, else other]
    #[arg(long, value_parser = choice::<ConditionKind>())]
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
    /// Colours of the classes (JSON), by which label maps become conditions [default: the adapter's]
    #[arg(long, value_name = "FILE")]
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
    /// Refuse --pairs whose files lie outside the folder of their table (absolute paths, `..`, links)
    #[arg(long)]
    strict_paths: bool,
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
    #[arg(long, value_parser = choice::<Passes>(), default_value = "both")]
    control_passes: Passes,
}

/// What was asked for, looked at; nothing is loaded yet.
pub struct Asked<'a> {
    args: &'a ControlArgs,
    encoders: Vec<TrainedEncoder>,
    settings: PairSettings,
    /// Pairs whose captions are drawn.
    pub pairs: Option<PairsFlags>,
}

/// Pairs whose captions are drawn.
pub struct PairsFlags {
    folder: PairFolder,
    count: usize,
    /// The pair whose condition is drawn with each caption.
    sources: Vec<usize>,
}

/// A control, and the conditions that it is shown.
pub struct Controlled<'a> {
    asked: &'a Asked<'a>,
    conditions: DrawnConditions<'a>,
    strength: Strength,
    /// The control encoder of an adapter, which the base model is drawn without.
    pub of_adapter: bool,
}

/// Where conditions come from.
enum DrawnConditions<'a> {
    /// One for all prompts, or one for each.
    Files(ConditionFiles, Vec<RgbImage>),
    Pairs(&'a PairsFlags),
}

/// What an adapter's control encoder was trained with.
struct TrainedEncoder {
    dir: PathBuf,
    config: EncoderConfig,
    /// Of its adapter.
    strength: f64,
}

impl ControlArgs {
    /// Looks at what was asked for, with these adapters and their strengths. Reads the pairs, where any are named.
    pub fn look(&self, adapters: &[(PathBuf, f64)], observer: &dyn Observer) -> Result<Asked<'_>> {
        let encoders = adapters.iter().filter_map(|(path, strength)| Some((encoder_of(path)?, *strength)));
        let encoders = encoders
            .map(|(dir, strength)| Ok(TrainedEncoder { config: EncoderConfig::read(&dir)?, dir, strength }))
            .collect::<Result<Vec<_>>>()?;
        self.refuse_idle_flags()?;
        self.strength().validate()?;
        let kind = self.kind(encoders.first());
        if self.make_conditions && kind != ConditionKind::Canny {
            return Err(Error::config(format!(
                "--make-conditions: only edges can be made, found conditions `{kind}`"
            ))
            .with_hint("give --condition canny if they are edges"));
        }
        let own = encoders.first().map(|encoder| encoder.dir.join(PALETTE_FILE));
        let own = own.filter(|path| kind == ConditionKind::Segmentation && path.is_file());
        let settings = PairSettings {
            image_column: self.image_column.clone(),
            caption_column: self.caption_column.clone(),
            conditioning_image_column: self.conditioning_image_column.clone(),
            condition: kind,
            make_conditions: self.make_conditions,
            thresholds: self.thresholds(encoders.first())?,
            palette: self.palette.clone().or(own),
            strict_paths: self.strict_paths,
            ..PairSettings::default()
        };
        let pairs =
            self.pairs.as_deref().map(|path| self.read_pairs(path, &settings, observer)).transpose()?;
        Ok(Asked { args: self, encoders, settings, pairs })
    }

    /// clap's own `requires` does not hold for what conflicts with a flag that is there.
    fn refuse_idle_flags(&self) -> Result<()> {
        let of_pairs = self.num_pairs.is_some() || self.shuffle_conditions || self.strict_paths;
        if self.pairs.is_none() && of_pairs {
            return Err(Error::config(
                "--num-pairs, --shuffle-conditions and --strict-paths: only with --pairs",
            ));
        }
        let plain = Strength::default() == self.strength()
            && !self.make_conditions
            && self.palette.is_none()
            && self.condition.is_none()
            && self.canny_low.or(self.canny_high).is_none();
        if self.pairs.is_none() && self.control.is_empty() && !plain {
            return Err(Error::config("flags of control have no effect without conditions")
                .with_hint("give --control IMAGE or --pairs PATH"));
        }
        Ok(())
    }

    fn read_pairs(
        &self,
        path: &Path,
        settings: &PairSettings,
        observer: &dyn Observer,
    ) -> Result<PairsFlags> {
        let folder = PairFolder::read(path, settings, observer)?;
        if !folder.bad().is_empty() {
            eprintln!("warning: {}", folder.report(None));
        }
        let count = folder.pairs().len().min(self.num_pairs.unwrap_or(usize::MAX));
        let sources = if self.shuffle_conditions {
            let read = |i: usize| files::read(&folder.pairs()[i].image, MAX_FILE_BYTES);
            let hashed = |i| read(i).map(Sha256::digest);
            shuffled(&(0..count).map(hashed).collect::<Result<Vec<_>>>()?)
        } else {
            (0..count).collect()
        };
        if sources.is_empty() {
            return Err(Error::config(
                "--num-pairs: expected 1 or more, and 2 different pictures to shuffle them",
            ));
        }
        Ok(PairsFlags { folder, count, sources })
    }

    /// What the conditions are, as the user or else the adapter says.
    fn kind(&self, encoder: Option<&TrainedEncoder>) -> ConditionKind {
        let own = encoder.and_then(|e| ConditionKind::find(&e.config.condition));
        if let (Some(asked), Some(own)) = (self.condition, own)
            && asked != own
        {
            eprintln!("warning: --condition {asked}: the adapter was trained with conditions `{own}`");
        }
        self.condition.or(own).unwrap_or_default()
    }

    fn thresholds(&self, encoder: Option<&TrainedEncoder>) -> Result<Thresholds> {
        let own = encoder.and_then(|encoder| encoder.config.canny_thresholds);
        let own = own.map_or_else(Thresholds::default, |[low, high]| Thresholds { low, high });
        let (low, high) = (self.canny_low.unwrap_or(own.low), self.canny_high.unwrap_or(own.high));
        thresholds(low, high, ["--canny-low", "--canny-high"])
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

impl Asked<'_> {
    /// Every file that is read, which nothing may be written over.
    pub fn files(&self) -> Vec<PathBuf> {
        let mut files = self.args.control.clone();
        for pair in self.pairs.iter().flat_map(|pairs| pairs.folder.pairs()) {
            files.push(pair.image.clone());
            files.extend(pair.condition.path().map(Path::to_path_buf));
        }
        files
    }

    /// Loads the control; `None` where there are no conditions, or nothing that reads those of pairs. `prompts` is their number.
    pub fn load(
        &self,
        prompts: usize,
        compute: &Compute,
        observer: &dyn Observer,
    ) -> Result<Option<(Controlled<'_>, Control)>> {
        let args = self.args;
        if args.control.is_empty() && self.pairs.is_none() {
            if args.controlnet.is_some() {
                return Err(Error::config("--controlnet: expected a condition, found none")
                    .with_hint("give --control IMAGE"));
            }
            for encoder in &self.encoders {
                eprintln!("note: {} is not used: no --control IMAGE is given", encoder.dir.display());
            }
            return Ok(None);
        }
        if self.pairs.is_none() && args.control.len() != 1 && args.control.len() != prompts {
            let found = args.control.len();
            return Err(Error::config(format!(
                "--control: expected one condition, or one for each of {prompts} prompts, found {found}"
            )));
        }
        let mut strength = args.strength();
        let (control, unused) = match (&args.controlnet, &self.encoders[..]) {
            (Some(dir), []) => {
                let dir = hub::resolve(dir, Wanted::ControlNet, observer)?;
                let (net, unused) = ControlNet::load(&dir, compute.numbers, compute.device)?;
                (Control::Net(Box::new(net)), unused)
            }
            (None, [encoder]) => {
                strength.scale *= encoder.strength;
                let (encoder, unused) = ConditionEncoder::load(&encoder.dir, compute.device)?;
                (Control::Encoder(encoder), unused)
            }
            (None, []) if self.pairs.is_some() => {
                eprintln!("note: nothing reads the conditions; the captions are drawn without them");
                return Ok(None);
            }
            (None, []) => {
                return Err(Error::config("--control: nothing reads the condition").with_hint(
                    "give --controlnet DIR, or an --adapter that was trained with conditions (its folder has \
                     control_encoder/)",
                ));
            }
            _ => {
                let encoders = self.encoders.iter().map(|encoder| &encoder.dir);
                let found: Vec<String> =
                    args.controlnet.iter().chain(encoders).map(|p| p.display().to_string()).collect();
                let found = found.join(" and ");
                return Err(Error::config(format!("--control: expected one control, found {found}")));
            }
        };
        if !unused.is_empty() {
            eprintln!("note: control: tensors that were not used: {}", tensor_file::list(&unused));
        }
        let conditions = match &self.pairs {
            Some(pairs) => DrawnConditions::Pairs(pairs),
            None => {
                let files = ConditionFiles::new(&self.settings)?;
                let pictures =
                    args.control.iter().map(|path| files.load(path, observer)).collect::<Result<_>>()?;
                DrawnConditions::Files(files, pictures)
            }
        };
        let of_adapter = matches!(control, Control::Encoder(_));
        Ok(Some((Controlled { asked: self, conditions, strength, of_adapter }, control)))
    }
}

impl PairsFlags {
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
            return Err(Error::data(format!(
                "--pairs: expected pictures of different names, found `{}` twice",
                twice[0]
            )));
        }
        if names.iter().any(|name| name == "grid") {
            return Err(Error::data("--pairs: a picture called `grid` would be in the way of grid.png"));
        }
        Ok(names)
    }

    fn condition(&self, p: usize, width: u32, height: u32) -> Result<RgbImage> {
        Ok(self.folder.at_size(self.sources[p], width, height)?.1)
    }

    /// What the condition of pair `p` is, in words.
    fn condition_of(&self, p: usize) -> String {
        let pair = &self.folder.pairs()[self.sources[p]];
        match pair.condition.path() {
            Some(path) => path.display().to_string(),
            None => format!("edges of {}", pair.image.display()),
        }
    }
}

impl Controlled<'_> {
    /// Width and height of the first condition, each cut to a multiple of `factor`: what is drawn where no size is given, unless
    /// there are pairs, which are cut to what is drawn.
    pub fn size(&self, factor: i64) -> Result<Option<[i64; 2]>> {
        let DrawnConditions::Files(_, pictures) = &self.conditions else { return Ok(None) };
        let (width, height) = pictures[0].dimensions();
        let size = [width, height].map(i64::from);
        if size.iter().any(|side| *side < factor) {
            return Err(Error::config(format!(
                "--control: expected {factor} pixels or more on each side (one latent of this model), found \
                 {width}x{height}"
            )));
        }
        Ok(Some(size.map(|side| side / factor * factor)))
    }

    /// The condition of prompt `p` as it is shown.
    pub fn condition(&self, p: usize, settings: &SampleSettings) -> Result<RgbImage> {
        let (width, height) = (settings.width as u32, settings.height as u32);
        let condition = match &self.conditions {
            DrawnConditions::Pairs(pairs) => pairs.condition(p, width, height)?,
            DrawnConditions::Files(files, pictures) => {
                files.shown(&pictures[p.min(pictures.len() - 1)], width, height)
            }
        };
        Ok(condition)
    }

    /// Says so where a condition that should be edges is a picture of another kind.
    pub fn warn_of_no_edges(&self, condition: &RgbImage) {
        if self.asked.settings.condition == ConditionKind::Canny && !may_be_edges(condition) {
            eprintln!(
                "warning: the condition is no picture of edges (white on black)\nhint: --make-conditions makes edges \
                 of pictures"
            );
        }
    }

    /// How a condition that [`Self::condition`] gave steers.
    pub fn steering(&self, condition: &RgbImage) -> Steering {
        let (width, height) = condition.dimensions();
        let conditions = conditions(&[condition], width.into(), height.into());
        Steering { conditions, strength: self.strength }
    }

    /// What the pictures of prompt `p` say of their control.
    pub fn text(&self, p: usize) -> Vec<(String, String)> {
        let Asked { args, settings, .. } = self.asked;
        let file = match &self.conditions {
            DrawnConditions::Pairs(pairs) => pairs.condition_of(p),
            DrawnConditions::Files(..) => {
                let path = args.control[p.min(args.control.len() - 1)].display();
                if args.make_conditions { format!("edges of {path}") } else { path.to_string() }
            }
        };
        let mut text = vec![("control".to_string(), file)];
        text.extend(self.about());
        if settings.condition == ConditionKind::Canny {
            let Thresholds { low, high } = settings.thresholds;
            text.push(("canny_thresholds".into(), format!("{low}, {high}")));
        }
        text
    }

    /// What is the same for all pictures.
    pub fn about(&self) -> Vec<(String, String)> {
        let Asked { args, settings, encoders, .. } = self.asked;
        let by = args.controlnet.as_deref().or(encoders.first().map(|encoder| encoder.dir.as_path()));
        let passes = if args.control_passes == Passes::Both { "both" } else { "conditional" };
        let own = [
            ("control_network", by.map_or_else(String::new, |dir| dir.display().to_string())),
            ("condition", settings.condition.to_string()),
            ("control_scale", self.strength.scale.to_string()),
            ("control_start", args.control_start.to_string()),
            ("control_end", args.control_end.to_string()),
            ("control_passes", passes.to_string()),
        ];
        own.map(|(key, value)| (key.to_string(), value)).into()
    }
}
