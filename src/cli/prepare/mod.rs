//! `hra prepare`: pictures that a model is conditioned on, made from photographs, label maps or points.

mod sources;

use crate::cli::stdout::print_line;
use crate::cli::terminal;
use crate::data;
use crate::data::image::{
    Background, Filter, LabelMap, Palette, RgbImage, Thresholds, canny, center_crop, read_png_text,
    resize_short_side, save_png,
};
use crate::data::image::{decode, landmarks};
use crate::data::pairs::{POINT_FILES, VOID, same_aspect};
use crate::error::{Error, Result};
use crate::platform::files;
use crate::platform::observer::{Counter, Observer};
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use sources::{Bad, PictureFile, Tables, is_picture};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Text chunk of every PNG that this command writes: what was made, and how.
const MARK: &str = "condition";
/// Its counterpart in the lines of [`METADATA_FILE`].
const MADE_BY: &str = "made_by";
/// Pairs that can be trained on, in the folder of the conditions.
const METADATA_FILE: &str = "metadata.jsonl";
/// Folder in that of the conditions for the pictures that --resolution has changed too.
const PICTURES: &str = "pictures";
/// A scale beyond this is none between sizes of pictures.
const MAX_SCALE: f64 = 1000.0;
/// So many reasons are shown.
const MAX_REASONS: usize = 20;

/// Flags of `hra prepare`.
#[derive(Debug, Args)]
#[command(
    about = "Make the conditions of controllable generation: edges, coloured segmentation maps, landmarks",
    after_help = "One PNG for each picture, map or point file, with its name. Where the pictures' folder has a metadata.jsonl or \
                  metadata.csv (file_name, text), the output gets a metadata.jsonl of pairs that can be trained on.\n\nExamples:\n  \
                  hra prepare canny photos\n  hra prepare segmentation maps --palette palette.json --pictures photos --output \
                  pairs\n  hra prepare landmarks points --pictures faces --scale 0.5 --resolution 512"
)]
pub struct PrepareArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Edges as OpenCV's Canny finds them, white on black
    Canny(CannyArgs),
    /// Label maps, coloured by a palette
    Segmentation(SegmentationArgs),
    /// Points, drawn as white discs; 68 points of a face are joined by lines
    Landmarks(LandmarksArgs),
}

#[derive(Debug, Args)]
struct CannyArgs {
    /// Folder of pictures
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// Gradient that an edge must exceed beside a stronger one
    #[arg(long, default_value_t = 100.0, value_name = "N")]
    low: f64,
    /// Gradient above which a pixel is an edge
    #[arg(long, default_value_t = 200.0, value_name = "N")]
    high: f64,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Args)]
struct SegmentationArgs {
    /// Folder of label maps: PNG with a class for each pixel
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// Colours of the classes: JSON, {"name": [r, g, b], ..} or [[r, g, b], ..]
    #[arg(long, value_name = "FILE")]
    palette: PathBuf,
    /// Folder of the pictures, with the names of the maps but for the ending
    #[arg(long, value_name = "DIR")]
    pictures: Option<PathBuf>,
    /// Label of pixels without a class, drawn black [default: 255, unless the palette has it]
    #[arg(long, value_name = "N")]
    ignore_label: Option<u16>,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Args)]
struct LandmarksArgs {
    /// Folder of point files: iBUG .pts, JSON lists of [x, y], or lines of `x y`
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// Folder of the pictures, with the names of the point files but for the ending
    #[arg(long, value_name = "DIR")]
    pictures: PathBuf,
    /// What coordinates are multiplied by: 0.5 where they belong to pictures twice as large
    #[arg(long, default_value_t = 1.0, value_name = "X")]
    scale: f64,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Args)]
struct Common {
    /// Folder for the conditions [default: DIR/canny, DIR/segmentation or DIR/landmarks]
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// First resize the shorter side to this and cut out the middle square
    #[arg(long, value_name = "PIXELS", value_parser = clap::value_parser!(u32).range(8..=8192))]
    resolution: Option<u32>,
    /// Refuse a table of the pictures that names files outside its folder (absolute paths, `..`, links)
    #[arg(long)]
    strict_paths: bool,
    /// Print what was made as JSON
    #[arg(long)]
    json: bool,
}

/// How a condition is made.
enum Maker {
    Canny(Thresholds),
    Segmentation { palette: Palette, ignored: Option<u16> },
    Landmarks { scale: f64 },
}

/// A condition, and its picture where that was read.
struct MadeFile {
    condition: RgbImage,
    picture: Option<RgbImage>,
}

/// Runs `hra prepare`.
pub fn run(args: &PrepareArgs, observer: &dyn Observer) -> Result<()> {
    let (kind, dir, pictures, common) = match &args.what {
        What::Canny(args) => ("canny", &args.dir, Some(&args.dir), &args.common),
        What::Segmentation(args) => ("segmentation", &args.dir, args.pictures.as_ref(), &args.common),
        What::Landmarks(args) => ("landmarks", &args.dir, Some(&args.pictures), &args.common),
    };
    let maker = Maker::new(&args.what)?;
    terminal::listen()?;
    let tables = Tables { strict_paths: common.strict_paths, observer };
    let sources = match &args.what {
        What::Canny(args) => tables.of_pictures(&args.dir)?,
        What::Segmentation(args) => tables.beside(dir, args.pictures.as_deref(), is_picture)?,
        What::Landmarks(args) => {
            tables.beside(dir, Some(&args.pictures), |ending| POINT_FILES.contains(&ending))?
        }
    };
    let output = PreparedOutput { dir: common.output.clone().unwrap_or_else(|| dir.join(kind)) };
    for folder in [Some(dir), pictures].into_iter().flatten() {
        output.refuse(folder)?;
    }
    let (mut jobs, mut bad) = (Vec::new(), sources.bad);
    let mut claimed: BTreeMap<PathBuf, PathBuf> = BTreeMap::new();
    for source in sources.sources {
        let path = output.file(&source.name);
        match claimed.insert(path.clone(), source.path.clone()) {
            Some(other) => bad.push(Bad::new(
                &source.path,
                format!(
                    "expected a name of its own, found that {} makes {} too",
                    other.display(),
                    path.display()
                ),
            )),
            None => jobs.push(source),
        }
    }
    for source in &jobs {
        output.check(&output.file(&source.name))?;
        if common.resolution.is_some() && source.caption.is_some() {
            output.check(&output.picture(&source.name))?;
        }
    }
    output.check_metadata()?;
    files::check_folder_writable(&output.dir)?;

    let progress = Counter::new(observer, kind, 0, jobs.len() as u64);
    let mut made = Vec::new();
    for (i, source) in jobs.iter().enumerate() {
        observer
            .check(|| format!("stopped; {i} of {} conditions are in {}", jobs.len(), output.dir.display()))?;
        match maker.make(source, common.resolution) {
            Ok(pair) => {
                files::create_dir_all(&output.dir)?;
                made.push(output.save(
                    source,
                    pair,
                    &maker.describe(common.resolution),
                    common.resolution,
                )?);
            }
            Err(problem) => bad.push(Bad::new(&source.path, problem.reason())),
        }
        progress.set(i as u64 + 1, "");
    }
    drop(progress);
    if made.is_empty() {
        let reasons: String = bad.iter().take(MAX_REASONS).map(|bad| format!("\n  {bad}")).collect();
        return Err(Error::data(format!(
            "{}: nothing that a condition could be made of{reasons}",
            dir.display()
        )));
    }
    let pairs: Vec<&Value> = made.iter().filter(|pair| pair.get("text").is_some()).collect();
    let metadata = output.dir.join(METADATA_FILE);
    if !pairs.is_empty() {
        let lines: String = pairs.iter().map(|pair| format!("{pair}\n")).collect();
        files::write_atomic(&metadata, lines.as_bytes())?;
    }
    let metadata = (!pairs.is_empty()).then_some(metadata);
    report(common.json, kind, &output, &made, metadata.as_deref(), &bad)
}

fn report(
    as_json: bool,
    kind: &str,
    output: &PreparedOutput,
    made: &[Value],
    metadata: Option<&Path>,
    bad: &[Bad],
) -> Result<()> {
    if as_json {
        let conditions: Vec<PathBuf> = made
            .iter()
            .filter_map(|pair| pair["conditioning_image"].as_str().map(|name| output.dir.join(name)))
            .collect();
        let skipped: Vec<Value> =
            bad.iter().map(|bad| json!({"file": bad.path, "reason": bad.reason})).collect();
        return super::print_json(&json!({
            "kind": kind, "output": output.dir, "conditions": conditions, "metadata": metadata, "skipped": skipped,
        }));
    }
    for bad in bad.iter().take(MAX_REASONS) {
        eprintln!("skipped: {bad}");
    }
    if bad.len() > MAX_REASONS {
        eprintln!("skipped: {} more (--json lists all)", bad.len() - MAX_REASONS);
    }
    let skipped = if bad.is_empty() { String::new() } else { format!(", {} skipped", bad.len()) };
    let plural = if made.len() == 1 { "" } else { "s" };
    print_line!("{} condition{plural} in {}{skipped}", made.len(), output.dir.display())?;
    if let Some(path) = metadata {
        print_line!("pairs: {}", path.display())?;
    }
    Ok(())
}

impl Maker {
    fn new(what: &What) -> Result<Self> {
        Ok(match what {
            What::Canny(args) => Self::Canny(thresholds(args.low, args.high, ["--low", "--high"])?),
            What::Segmentation(args) => {
                let palette = Palette::read(&args.palette)?;
                let has = |label: u16| usize::from(label) < palette.colours().len();
                let ignored = args.ignore_label.or_else(|| (!has(VOID)).then_some(VOID));
                Self::Segmentation { palette, ignored }
            }
            What::Landmarks(args) if args.scale > 0.0 && args.scale <= MAX_SCALE => {
                Self::Landmarks { scale: args.scale }
            }
            What::Landmarks(args) => {
                let found = args.scale;
                return Err(Error::config(format!(
                    "--scale: expected a number above 0, at most {MAX_SCALE}, found {found}"
                )));
            }
        })
    }

    /// What the PNG files say of themselves.
    fn describe(&self, resolution: Option<u32>) -> String {
        let how = match self {
            Self::Canny(Thresholds { low, high }) => format!("canny, thresholds {low} and {high}"),
            Self::Segmentation { palette, .. } => {
                format!("segmentation, {} classes", palette.colours().len())
            }
            Self::Landmarks { scale } => format!("landmarks, coordinates times {scale}"),
        };
        resolution.map_or(how.clone(), |side| format!("{how}, {side}x{side}"))
    }

    fn make(&self, source: &PictureFile, resolution: Option<u32>) -> Result<MadeFile> {
        let picture =
            source.picture.as_deref().map(|path| decode::load(path, Background::WHITE)).transpose()?;
        if picture.as_ref().is_some_and(|picture| picture.transparent) {
            eprintln!("note: {}: its transparent parts are white here", source.path.display());
        }
        let picture = picture.map(|picture| picture.pixels);
        let size = picture.as_ref().map(RgbImage::dimensions);
        let picture = match resolution.zip(picture.as_ref()) {
            Some((side, picture)) => Some(square(&source.path, picture, side)?),
            None => picture,
        };
        let condition = match self {
            Self::Canny(thresholds) => {
                let picture = picture.as_ref().expect("edges are of a picture");
                canny(picture, *thresholds).to_rgb()
            }
            Self::Segmentation { palette, ignored } => {
                let map = LabelMap::read(&source.path, Some(palette))?;
                if let Some(size) = size {
                    same_aspect(size, map.dimensions())
                        .map_err(|problem| Error::format(&source.path, problem))?;
                }
                let map = match resolution {
                    Some(side) => {
                        no_strip(&source.path, map.dimensions())?;
                        map.square(side)
                    }
                    None => map,
                };
                palette.colour(&map, *ignored).map_err(|problem| Error::format(&source.path, problem))?
            }
            Self::Landmarks { scale } => {
                let (width, height) = size.expect("points are in a picture");
                let points = landmarks::read_points(&source.path)?;
                let points = landmarks::scaled(&points, *scale)
                    .map_err(|problem| Error::format(&source.path, format!("times {scale}: {problem}")))?;
                let (points, width, height) = match resolution {
                    Some(side) => (landmarks::square(&points, width, height, side), side, side),
                    None => (points, width, height),
                };
                if landmarks::inside(&points, width, height) == 0 {
                    let problem = format!(
                        "expected points in the picture of {width}x{height}, found {} outside; --scale changes their \
                         size",
                        points.len()
                    );
                    return Err(Error::format(&source.path, problem));
                }
                landmarks::draw(&points, width, height)
            }
        };
        Ok(MadeFile { condition, picture })
    }
}

/// Thresholds as the user gave them with two flags.
pub(super) fn thresholds(low: f64, high: f64, flags: [&str; 2]) -> Result<Thresholds> {
    let thresholds = Thresholds { low, high };
    if thresholds.are_possible() {
        return Ok(thresholds);
    }
    let [low_flag, high_flag] = flags;
    Err(Error::config(format!(
        "{low_flag} and {high_flag}: expected 0 <= low <= high, found {low} and {high}"
    ))
    .with_hint(format!("gradients go up to {}", Thresholds::MAX)))
}

/// The middle square as training takes it. The error is about `path`: a strip, whose longer side would become too long.
pub(super) fn square(path: &Path, picture: &RgbImage, side: u32) -> Result<RgbImage> {
    no_strip(path, picture.dimensions())?;
    Ok(center_crop(&resize_short_side(picture, side, Filter::Bilinear), side))
}

/// Fails for pictures that training does not take either.
pub(super) fn no_strip(path: &Path, size: (u32, u32)) -> Result<()> {
    data::no_strip(size).map_err(|problem| Error::format(path, problem))
}

/// The folder that conditions go into.
struct PreparedOutput {
    dir: PathBuf,
}

impl PreparedOutput {
    /// Fails if the output is a folder that is read from.
    fn refuse(&self, folder: &Path) -> Result<()> {
        let same = match (self.dir.canonicalize(), folder.canonicalize()) {
            (Ok(own), Ok(other)) => own == other,
            _ => false,
        };
        if !same {
            return Ok(());
        }
        Err(Error::config(format!(
            "--output: expected another folder than {}, which is read from",
            folder.display()
        )))
    }

    fn file(&self, name: &Path) -> PathBuf {
        self.dir.join(png(name))
    }

    fn picture(&self, name: &Path) -> PathBuf {
        self.dir.join(PICTURES).join(png(name))
    }

    /// Fails if something is at `path` that this command has not made.
    fn check(&self, path: &Path) -> Result<()> {
        let ours = || read_png_text(path).is_ok_and(|text| text.iter().any(|(key, _)| key == MARK));
        if files::kind(path).is_none() || ours() { Ok(()) } else { Err(in_the_way(path)) }
    }

    fn check_metadata(&self) -> Result<()> {
        let path = self.dir.join(METADATA_FILE);
        if files::kind(&path).is_none() {
            return Ok(());
        }
        let text = files::read_to_string(&path)?;
        let first: Option<Value> = text.lines().next().and_then(|line| serde_json::from_str(line).ok());
        if first.is_some_and(|first| first.get(MADE_BY).is_some()) { Ok(()) } else { Err(in_the_way(&path)) }
    }

    /// Writes a condition, and its picture where that is another than the file's. What it returns is a line of
    /// [`METADATA_FILE`] where there is a caption.
    fn save(
        &self,
        source: &PictureFile,
        made: MadeFile,
        how: &str,
        resolution: Option<u32>,
    ) -> Result<Value> {
        let software = format!("hra {}", env!("CARGO_PKG_VERSION"));
        let write = |path: &Path, image: &RgbImage, how: &str| {
            if let Some(folder) = path.parent() {
                files::create_dir_all(folder)?;
            }
            let text = [(MARK, how), ("software", &software)].map(|(k, v)| (k.to_string(), v.to_string()));
            save_png(path, image, &text)
        };
        let path = self.file(&source.name);
        write(&path, &made.condition, how)?;
        let name = self.name(&path);
        let Some((caption, file)) = source.caption.as_ref().zip(source.picture.as_ref()) else {
            return Ok(json!({"conditioning_image": name}));
        };
        let picture = match (resolution, &made.picture) {
            (Some(side), Some(picture)) => {
                let path = self.picture(&source.name);
                write(&path, picture, &format!("its picture, {side}x{side}"))?;
                self.name(&path)
            }
            _ => self.name(file),
        };
        Ok(json!({"file_name": picture, "text": caption, "conditioning_image": name, MADE_BY: software}))
    }

    /// A path as the metadata names it: relative where it is in the output's folder or in that which holds it.
    fn name(&self, path: &Path) -> String {
        let whole = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
        let (dir, path) = (whole(&self.dir), whole(path));
        let above = dir.parent().map(|above| path.strip_prefix(above));
        let name = match (path.strip_prefix(&dir), above) {
            (Ok(inside), _) => inside.to_path_buf(),
            (_, Some(Ok(beside))) => Path::new("..").join(beside),
            _ => path.clone(),
        };
        name.to_string_lossy().into_owned()
    }
}

/// `name.png`, whatever dots are in the name.
fn png(name: &Path) -> PathBuf {
    let mut name = name.as_os_str().to_os_string();
    name.push(".png");
    name.into()
}

fn in_the_way(path: &Path) -> Error {
    Error::run(format!("{}: a file that hra prepare did not make is in the way", path.display()))
        .with_hint("give another --output")
}
