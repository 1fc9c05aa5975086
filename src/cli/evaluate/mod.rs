//! `hra evaluate`: `conditions` scores what keeps to conditions, `report` tells the result.

mod conditions;
mod report;

use crate::cli::terminal;
use crate::cli::towers::TowerFlags;
use crate::data::caption::{MAX_CAPTION_BYTES, bounded};
use crate::data::image::decode::load_mask;
use crate::data::image::{Background, RgbImage, load_rgb, read_png_text};
use crate::data::{Image, ImageFolder};
use crate::error::{Error, Result};
use crate::lab::evaluate::scores::{References, ScoredSubject, drift, without_token};
use crate::lab::evaluate::{TowerPaths, Towers, towers};
use crate::lab::results::{Evaluation, PictureScores, PromptScores, Scores, Set};
use crate::platform::device::{self, DeviceChoice};
use crate::platform::files;
use crate::platform::observer::{Counter, Observer};
use crate::platform::precision::Precision;
use clap::Args;
use conditions::{ConditionArgs, ConditionFlags, FileScores};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Pictures without a prompt are scored so many at a time: nothing holds them together.
const AT_ONCE: usize = 32;

/// Flags of `hra evaluate`.
#[derive(Debug, Args)]
#[command(
    about = "Score pictures, of this program or another",
    after_help = "A score whose tower is not given is left out. Similarity is to --real, which should not have been trained on. \
                  CLIP-T needs a prompt, and diversity the pictures of one prompt: it is --prompt, a line of --prompt-file, what \
                  the PNG itself says (hra and A1111 write it), or the text file beside a picture (00.png, 00.txt). Means are over \
                  prompts, of the means over their pictures; those of edges, subjects and landmarks are over pictures.\n\nExamples:\n  hra evaluate out --real photos --clip \
                  openai/clip-vit-large-patch14 --dino facebook/dino-vits16 --token sks\n  hra evaluate out --base \
                  out/base --json\n  hra evaluate out/*.png --real photos/dog --look-alikes photos/dog2 --masks masks/dog \
                  --dino DIR --csv scores.csv\n  hra evaluate out --edges-of photos\n  hra evaluate --segmentation-truth maps \
                  --segmentation-predictions predicted --reduce-zero-label"
)]
pub struct EvaluateArgs {
    /// Pictures, or folders of them
    #[arg(required_unless_present_any = ["segmentation_truth", "landmarks_truth"], value_name = "PICTURES")]
    pictures: Vec<PathBuf>,
    /// Real pictures of the subject
    #[arg(long, value_name = "DIR", help_heading = "What to compare with")]
    real: Option<PathBuf>,
    /// Real pictures of others of its class: is the subject the nearest?
    #[arg(long, value_name = "DIR", requires = "real", help_heading = "What to compare with")]
    look_alikes: Option<PathBuf>,
    /// Masks of the real pictures, with the same names but for the ending: white where the subject is
    #[arg(long, value_name = "DIR", requires = "real", help_heading = "What to compare with")]
    masks: Option<PathBuf>,
    /// The base model's pictures, with the same names: drift from them
    #[arg(long, value_name = "DIR", help_heading = "What to compare with")]
    base: Option<PathBuf>,

    /// The prompt of all pictures
    #[arg(long, value_name = "TEXT", conflicts_with = "prompt_file", help_heading = "Prompts")]
    prompt: Option<String>,
    /// File with a line for each picture, in the order of the pictures
    #[arg(long, value_name = "FILE", help_heading = "Prompts")]
    prompt_file: Option<PathBuf>,
    /// The rare token, which CLIP is not shown
    #[arg(
        long,
        default_value = "",
        hide_default_value = true,
        value_name = "WORD",
        help_heading = "Prompts"
    )]
    token: String,

    #[command(flatten)]
    towers: TowerFlags,

    #[command(flatten)]
    conditions: ConditionArgs,

    /// Write every picture's scores as a table; those that pictures have together are in each one's row
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    csv: Option<PathBuf>,
    /// Print everything as JSON
    #[arg(long, help_heading = "Output")]
    json: bool,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value_t = DeviceChoice::Auto, help_heading = "Output")]
    device: DeviceChoice,
    /// CPU threads, 1024 at most, also for reading pictures; those that wait for work soon sleep, unless OMP_WAIT_POLICY or GOMP_SPINCOUNT says otherwise [default: libtorch's choice]
    #[arg(long, help_heading = "Output")]
    threads: Option<i32>,
}

/// A picture to be scored.
struct DrawnFolder {
    path: PathBuf,
    prompt: Option<String>,
}

/// Pictures that are compared with, and where they are from.
#[derive(Default)]
struct Known {
    pictures: Vec<RgbImage>,
    paths: Vec<PathBuf>,
}

/// Runs `hra evaluate`.
pub fn run(args: &EvaluateArgs, observer: &dyn Observer) -> Result<()> {
    if args.towers.paths() == TowerPaths::default() && args.base.is_none() && args.conditions.nothing() {
        return Err(Error::config("nothing to score with").with_hint(
            "give a tower (--clip, --dino, --dinov2, --lpips-vgg, --lpips-alex) for similarity to --real, --base DIR \
             for drift, or --edges-of DIR, --subject-masks DIR .. for conditions",
        ));
    }
    args.csv.as_deref().map_or(Ok(()), files::check_place_writable)?;
    let compute = device::resolve(args.device, Some(Precision::F32))?;
    compute.notes.iter().for_each(|note| eprintln!("note: {note}"));
    device::set_threads(args.threads, usize::MAX)?;
    terminal::listen()?;
    let drawn = if args.pictures.is_empty() { Vec::new() } else { drawn(args)? };
    let conditions = ConditionFlags::of(&args.conditions, drawn.iter().map(|drawn| drawn.path.as_path()))?;
    // What is wrong with these files is told before the slow part.
    let files = FileScores::of(&args.conditions, observer)?;
    let real = args.real.as_deref().map(Known::read).transpose()?.unwrap_or_default();
    let look_alikes = args.look_alikes.as_deref().map(Known::read).transpose()?.unwrap_or_default();
    let masks = args.masks.as_deref().map(|dir| masks(dir, &real.paths, observer)).transpose()?;
    let paths = args.towers.paths().resolved(observer)?;
    let towers = Towers::load(&paths, compute.device, observer)?;
    let references = References {
        real: real.pictures.iter().collect(),
        look_alikes: look_alikes.pictures.iter().collect(),
        masks: masks.as_ref().map(|masks| masks.iter().collect()),
    };
    let subject = ScoredSubject::new(&towers, &references)?;
    let scoring =
        Scoring { args, towers: &towers, subject: &subject, conditions: &conditions, real: &real, observer };

    let mut found =
        Evaluation { step: 0, set: Set::Test, prompts: Vec::new(), drift: Vec::new(), scores: Scores::new() };
    let progress = Counter::new(observer, "scoring", 0, drawn.len() as u64);
    let mut done = 0;
    for (prompt, group) in groups(&drawn) {
        observer.check(|| "stopped; nothing was written".to_string())?;
        let (together, each) = scoring.group(prompt, &group)?;
        let scored = group.iter().zip(each).map(|(drawn, scores)| PictureScores {
            seed: 0,
            file: drawn.path.to_string_lossy().into_owned(),
            scores,
        });
        let pictures: Vec<PictureScores> = scored.collect();
        // Pictures of unknown prompts are together by chance.
        let scores = if prompt.is_some() { together } else { Scores::new() };
        match found.prompts.last_mut().filter(|last| prompt.is_none() && last.prompt.is_empty()) {
            Some(last) => last.pictures.extend(pictures),
            None => found.prompts.push(PromptScores {
                prompt: prompt.unwrap_or_default().to_string(),
                scores,
                pictures,
            }),
        }
        done += group.len() as u64;
        progress.set(done, "");
    }
    drop(progress);
    found.prompts.extend(files.pictures());
    found.summarise();
    found.scores.extend(files.scores());
    if found.scores.is_empty() {
        return Err(Error::config("nothing could be scored with what was given")
            .with_hint("give --real DIR for similarity, prompts for CLIP-T and diversity"));
    }
    if let Some(path) = &args.csv {
        files::write_atomic(path, report::csv(&found).as_bytes())?;
    }
    let counts = [drawn.len(), real.paths.len(), look_alikes.paths.len()];
    report::report(args, &found, &files, (&towers::identity(&paths, observer)?, compute.device), counts)
}

/// What pictures are scored by.
struct Scoring<'a> {
    args: &'a EvaluateArgs,
    towers: &'a Towers,
    subject: &'a ScoredSubject,
    conditions: &'a ConditionFlags,
    real: &'a Known,
    observer: &'a dyn Observer,
}

impl Scoring<'_> {
    /// Scores of the pictures of a prompt together, and of each.
    fn group(&self, prompt: Option<&str>, group: &[&DrawnFolder]) -> Result<(Scores, Vec<Scores>)> {
        let pictures: Vec<RgbImage> =
            group.iter().map(|drawn| load_rgb(&drawn.path)).collect::<Result<_>>()?;
        for (picture, drawn) in pictures.iter().zip(group) {
            if let Some(same) = self.real.pictures.iter().position(|other| other == picture) {
                self.observer.warn(&format!(
                    "{} and the real picture {} are the same, pixel by pixel",
                    drawn.path.display(),
                    self.real.paths[same].display()
                ));
            }
        }
        let text = prompt.map(|prompt| without_token(prompt, &self.args.token));
        let (together, mut each) =
            self.subject.score(self.towers, text.as_deref(), &pictures, self.observer)?;
        if let Some(dir) = &self.args.base {
            let base: Vec<RgbImage> =
                group.iter().map(|drawn| load_rgb(&counterpart(&drawn.path, dir)?)).collect::<Result<_>>()?;
            for (own, drift) in each.iter_mut().zip(drift(self.towers, &pictures, &base)?) {
                own.extend(drift);
            }
        }
        for ((own, picture), drawn) in each.iter_mut().zip(&pictures).zip(group) {
            own.extend(self.conditions.score(&drawn.path, picture)?);
        }
        Ok((together, each))
    }
}

/// The pictures that were named, with their prompts.
fn drawn(args: &EvaluateArgs) -> Result<Vec<DrawnFolder>> {
    let mut images: Vec<(PathBuf, bool)> = Vec::new();
    for path in &args.pictures {
        if files::kind(path) == Some(files::Kind::Folder) {
            let folder = scan(path)?;
            for skipped in folder.skipped() {
                let name = &skipped.name;
                let beside = [".txt", ".json", ".jsonl", ".csv"].iter().any(|end| name.ends_with(end));
                if !beside && !name.starts_with('.') && !path.join(name).is_dir() {
                    eprintln!("note: {} is not scored: {}", path.join(name).display(), skipped.reason);
                }
            }
            images.extend(folder.images().iter().map(|image| (image.path.clone(), is_png(image))));
        } else {
            let is_png = path.extension().is_some_and(|end| end.eq_ignore_ascii_case("png"));
            images.push((path.clone(), is_png));
        }
    }
    let mut drawn = Vec::new();
    for (path, is_png) in images {
        let text = if is_png { read_png_text(&path)? } else { Vec::new() };
        let text: BTreeMap<String, String> = text.into_iter().collect();
        // The contact sheet that `hra sample` puts beside its pictures.
        if path.file_name().is_some_and(|name| name == "grid.png") && text.contains_key("software") {
            continue;
        }
        let prompt = match &args.prompt {
            Some(prompt) => Some(prompt.clone()),
            None if args.prompt_file.is_some() => None,
            None => own_prompt(&path, &text)?,
        };
        drawn.push(DrawnFolder { path, prompt });
    }
    if let Some(path) = &args.prompt_file {
        let lines = crate::cli::prompts::read(path)?;
        if lines.len() != drawn.len() {
            let (expected, found) = (drawn.len(), lines.len());
            return Err(Error::format(
                path,
                format!("expected a prompt for each of {expected} pictures, found {found}"),
            ));
        }
        drawn.iter_mut().zip(lines).for_each(|(drawn, line)| drawn.prompt = Some(line));
    }
    if drawn.is_empty() {
        return Err(Error::data("expected pictures to score, found contact sheets only"));
    }
    let unknown = drawn.iter().filter(|drawn| drawn.prompt.is_none()).count();
    let TowerPaths { clip, lpips_vgg, lpips_alex, .. } = &args.towers.paths();
    if unknown > 0 && [clip, lpips_vgg, lpips_alex].into_iter().any(Option::is_some) {
        eprintln!(
            "note: {unknown} of {} pictures come without a prompt and get no clip_t or diversity (--prompt, \
             --prompt-file)",
            drawn.len()
        );
    }
    Ok(drawn)
}

fn is_png(image: &Image) -> bool {
    image.format == "PNG"
}

/// What the picture's own texts or the text file beside it say.
fn own_prompt(path: &Path, text: &BTreeMap<String, String>) -> Result<Option<String>> {
    // A1111: the prompt, the negative one, and a line of settings.
    let first = |text: &String| {
        let ends = ["\nNegative prompt:", "\nSteps:"].iter().filter_map(|end| text.find(end)).min();
        text[..ends.unwrap_or(text.len())].to_string()
    };
    let inside = text.get("prompt").cloned().or_else(|| text.get("parameters").map(first));
    let beside = path.with_extension("txt");
    let prompt = match inside {
        None if beside.is_file() => Some(files::read_text(&beside, MAX_CAPTION_BYTES as u64)?),
        // ComfyUI writes whole graphs there.
        Some(text) => match bounded(&text) {
            Ok(()) => Some(text),
            Err(problem) => {
                eprintln!("note: {}: its own text is no prompt: {problem}", path.display());
                None
            }
        },
        None => None,
    };
    let prompt = prompt.map(|prompt| prompt.trim_start_matches('\u{feff}').trim().to_string());
    Ok(prompt.filter(|prompt| !prompt.is_empty() && !prompt.contains('\0')))
}

/// The pictures of a folder; says of transparent ones that they are scored in front of white.
fn scan(dir: &Path) -> Result<ImageFolder> {
    let folder = ImageFolder::scan(dir, Background::WHITE)?;
    let transparent = folder.images().iter().filter(|image| image.transparent).count();
    if transparent > 0 {
        let of = folder.images().len();
        eprintln!(
            "note: {}: {transparent} of {of} pictures have transparent parts, which are white here",
            dir.display()
        );
    }
    Ok(folder)
}

impl Known {
    fn read(dir: &Path) -> Result<Self> {
        let folder = scan(dir)?;
        let pictures = (0..folder.images().len()).map(|i| folder.load(i)).collect::<Result<_>>()?;
        Ok(Self { pictures, paths: folder.images().iter().map(|image| image.path.clone()).collect() })
    }
}

/// The mask of each real picture: the picture in `dir` with its name, whatever the ending.
fn masks(dir: &Path, real: &[PathBuf], observer: &dyn Observer) -> Result<Vec<RgbImage>> {
    let folder = ImageFolder::scan(dir, Background::default())?;
    let (masks, _) = files::by_stem(folder.images(), |image| &image.path);
    let mask = |path: &PathBuf| {
        let found = masks.get(files::stem(path)).ok_or_else(|| {
            let stem = files::stem(path).to_string_lossy();
            Error::data(format!(
                "{}: expected a mask {stem}.png for {}, found none",
                dir.display(),
                path.display()
            ))
        })?;
        let (mask, note) = load_mask(&found.path)?;
        note.into_iter().for_each(|note| observer.note(&format!("{}: {note}", found.path.display())));
        Ok(mask)
    };
    real.iter().map(mask).collect()
}

/// The base model's picture of the same name.
fn counterpart(picture: &Path, dir: &Path) -> Result<PathBuf> {
    let path = dir.join(picture.file_name().unwrap_or_default());
    if path.is_file() {
        return Ok(path);
    }
    Err(Error::data(format!("--base: expected {} beside {}, found none", path.display(), picture.display()))
        .with_hint("draw the same prompts and seeds with the base model (`hra sample --with-base`)"))
}

/// Pictures of one prompt, in the order in which prompts first appear; those without one at the end.
fn groups(drawn: &[DrawnFolder]) -> Vec<(Option<&str>, Vec<&DrawnFolder>)> {
    let mut groups: Vec<(Option<&str>, Vec<&DrawnFolder>)> = Vec::new();
    let mut places: BTreeMap<&str, usize> = BTreeMap::new();
    for picture in drawn {
        if let Some(prompt) = picture.prompt.as_deref() {
            let place = *places.entry(prompt).or_insert(groups.len());
            if place == groups.len() {
                groups.push((Some(prompt), Vec::new()));
            }
            groups[place].1.push(picture);
        }
    }
    let rest: Vec<&DrawnFolder> = drawn.iter().filter(|picture| picture.prompt.is_none()).collect();
    groups.extend(rest.chunks(AT_ONCE).map(|chunk| (None, chunk.to_vec())));
    groups
}
