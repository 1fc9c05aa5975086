//! The training images of one folder: which files are used and which are not and why, and the crops that a model is shown.
//!
//! Each picture is treated as diffusers does in examples/dreambooth/train_dreambooth.py: turned upright, shorter side
//! resized to the resolution (bilinear, as Pillow), then a square cut out of it at random or from the middle. The choice of
//! the square is apart from the pixels, so that a caller can keep what it computed from (image, x, y).
//!
//! Pairs of picture and condition, which control trains on, are in [`pairs`].

mod cache;
pub mod caption;
pub mod condition;
pub mod image;
pub mod pair_settings;
pub mod pairs;
pub mod table;

use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256};

use cache::Cache;

use crate::data::image::decode::{self, DecodedPicture};
use crate::data::image::resize::{center_offset, short_side_size};
use crate::data::image::{Background, Filter, RgbImage, crop, resize};
use crate::platform::columns::{self, left};
use crate::platform::files::{self, Kind};
use crate::{Error, Result};

/// A picture whose longer side is more than this many times the shorter is skipped: a square of it shows nothing, and with
/// its shorter side at the resolution it could fill the memory.
const MAX_ASPECT: u32 = 16;
/// So many reasons are listed when no image can be used.
const MAX_REASONS: usize = 20;

/// A picture that can be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Name of the file in its folder.
    pub name: String,
    /// Path of the file.
    pub path: PathBuf,
    /// Width in pixels, the right way up.
    pub width: u32,
    /// Height in pixels, the right way up.
    pub height: u32,
    /// Name of the file format.
    pub format: &'static str,
    /// What was done to bring it the right way up, if anything.
    pub turned: Option<&'static str>,
    /// Whether parts of it are transparent.
    pub transparent: bool,
    /// Name of an earlier file with the same pixels, if there is one.
    pub same_as: Option<String>,
}

/// An entry of the folder that is not used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skipped {
    /// Name in the folder.
    pub name: String,
    /// Why it is not used.
    pub reason: String,
}

/// Which square is cut out of a resized picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Crop {
    /// The middle.
    Center,
    /// Drawn by this number: the low 32 bits choose x, the high 32 bits y, each by the remainder of a division (a bias
    /// below one in a million).
    Random(u64),
}

impl Crop {
    /// The square of `resolution` pixels in a picture that was resized to `width` x `height`.
    fn window(self, (width, height): (u32, u32), resolution: u32) -> Window {
        match self {
            Self::Center => {
                Window { x: center_offset(width, resolution), y: center_offset(height, resolution) }
            }
            Self::Random(draw) => Window {
                x: (draw as u32) % (width - resolution + 1),
                y: ((draw >> 32) as u32) % (height - resolution + 1),
            },
        }
    }
}

/// The upper left corner of a square in a resized picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Window {
    /// Columns from the left.
    pub x: u32,
    /// Rows from the top.
    pub y: u32,
}

/// The pictures of a folder, in the byte order of their names. Sub-folders are not entered.
#[derive(Debug)]
pub struct ImageFolder {
    dir: PathBuf,
    /// Of pictures with transparent parts.
    background: Background,
    images: Vec<Image>,
    skipped: Vec<Skipped>,
    resized: Cache<RgbImage>,
}

impl ImageFolder {
    /// Looks at every entry of `dir` and decodes every image once, which is the only way to know that it is whole. Transparent
    /// parts show `background`.
    ///
    /// An [`ErrorKind::Data`] with the reasons if not one image can be used.
    pub fn scan(dir: &Path, background: Background) -> Result<Self> {
        let mut folder = Self {
            dir: dir.into(),
            background,
            images: Vec::new(),
            skipped: Vec::new(),
            resized: Cache::default(),
        };
        let mut seen: HashMap<[u8; 32], String> = HashMap::new();
        for entry in files::list_dir(dir)? {
            let name = entry.name.to_string_lossy().into_owned();
            match look(&name, &entry, background) {
                Ok((mut image, hash)) => {
                    image.same_as = seen.get(&hash).cloned();
                    seen.entry(hash).or_insert(name);
                    folder.images.push(image);
                }
                Err(reason) => folder.skipped.push(Skipped { name, reason }),
            }
        }
        if folder.images.is_empty() { Err(folder.nothing_to_use()) } else { Ok(folder) }
    }

    /// The folder that was scanned.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The pictures that are used; every `index` below counts these.
    pub fn images(&self) -> &[Image] {
        &self.images
    }

    /// The entries that are not used.
    pub fn skipped(&self) -> &[Skipped] {
        &self.skipped
    }

    /// What the user is told before training: a line for each entry of the folder, used or not.
    pub fn report(&self, resolution: u32) -> String {
        let plural = if self.images.len() == 1 { "" } else { "s" };
        let mut text = format!("{}: {} image{plural} used", self.dir.display(), self.images.len());
        if !self.skipped.is_empty() {
            let _ = write!(text, ", {} skipped", self.skipped.len());
        }
        let mut rows = Vec::new();
        for image in &self.images {
            let size = format!("{}x{}", image.width, image.height);
            let notes = [
                image.turned.map(str::to_string),
                image.transparent.then(|| format!("transparent parts show {} (background)", self.background)),
                (image.width.min(image.height) < resolution)
                    .then(|| format!("smaller than {resolution} pixels, is enlarged")),
                image.same_as.as_ref().map(|other| format!("same picture as {other}")),
            ];
            let notes: String = notes.into_iter().flatten().map(|note| format!(", {note}")).collect();
            rows.push(vec![image.name.clone(), "used".into(), format!("{size} {}{notes}", image.format)]);
        }
        for Skipped { name, reason } in &self.skipped {
            rows.push(vec![name.clone(), "skipped".into(), reason.clone()]);
        }
        columns::lines(&[left(0).after(2); 3], &rows).iter().for_each(|line| text += &format!("\n{line}"));
        text
    }

    /// The picture at its own size, the right way up.
    pub fn load(&self, index: usize) -> Result<RgbImage> {
        Ok(decode::load(&self.images[index].path, self.background)?.pixels)
    }

    /// The square that `crop` chooses from the picture with its shorter side at `resolution`. Reads no pixels.
    pub fn crop_window(&self, index: usize, resolution: u32, crop: Crop) -> Window {
        crop.window(self.resized_size(index, resolution), resolution)
    }

    /// How many different squares [`Crop::Random`] can choose for this picture.
    pub fn window_count(&self, index: usize, resolution: u32) -> u64 {
        windows(self.resized_size(index, resolution), resolution)
    }

    /// The `resolution` x `resolution` pixels at `window`, which [`Self::crop_window`] gave for the same picture.
    ///
    /// Resized pictures are kept in memory. An error if the file can no longer be read or has another size than before.
    pub fn prepare(&self, index: usize, resolution: u32, window: Window) -> Result<RgbImage> {
        Ok(crop(&*self.resized(index, resolution)?, window.x, window.y, resolution))
    }

    fn resized_size(&self, index: usize, resolution: u32) -> (u32, u32) {
        let image = &self.images[index];
        short_side_size(image.width, image.height, resolution)
    }

    fn resized(&self, index: usize, resolution: u32) -> Result<Arc<RgbImage>> {
        self.resized.get((index, resolution), || {
            let Image { width, height, path, .. } = &self.images[index];
            let full = load_unchanged(path, (*width, *height), self.background)?;
            let (width, height) = self.resized_size(index, resolution);
            let small = resize(&full, width, height, Filter::Bilinear);
            let bytes = small.len();
            Ok((small, bytes))
        })
    }

    fn nothing_to_use(&self) -> Error {
        let mut text = format!("{}: no image that can be used", self.dir.display());
        if self.skipped.is_empty() {
            text += ": the folder is empty";
        }
        for Skipped { name, reason } in self.skipped.iter().take(MAX_REASONS) {
            let _ = write!(text, "\n  {name}: {reason}");
        }
        if self.skipped.len() > MAX_REASONS {
            let _ = write!(text, "\n  and {} more", self.skipped.len() - MAX_REASONS);
        }
        let hint =
            "put PNG, JPEG, WebP, BMP or TIFF images straight into this folder (sub-folders are not read)";
        Error::data(text).with_hint(hint)
    }
}

/// The image of a folder entry and the hash of its pixels, or why there is none.
fn look(
    name: &str,
    entry: &files::DirEntry,
    background: Background,
) -> std::result::Result<(Image, [u8; 32]), String> {
    if name.starts_with('.') {
        return Err("hidden".into());
    }
    if ["thumbs.db", "desktop.ini"].contains(&name.to_ascii_lowercase().as_str()) {
        return Err("made by the file manager".into());
    }
    match entry.kind {
        Kind::File => {}
        Kind::Folder => return Err("a folder: sub-folders are not read".into()),
        Kind::Other => return Err("no regular file".into()),
    }
    let picture = load_usable(&entry.path, background)?;
    let (width, height) = picture.pixels.dimensions();
    let mut hash = Sha256::new();
    hash.update(width.to_le_bytes());
    hash.update(picture.pixels.as_raw());
    let image = Image {
        name: name.into(),
        path: entry.path.clone(),
        width,
        height,
        format: picture.format,
        turned: picture.turned,
        transparent: picture.transparent,
        same_as: None,
    };
    Ok((image, hash.finalize().into()))
}

/// The picture of a file, or why it cannot be trained on.
fn load_usable(path: &Path, background: Background) -> std::result::Result<DecodedPicture, String> {
    let bytes = decode::read(path).map_err(|e| e.reason())?;
    let picture = decode::decode(&bytes, background)?;
    let (width, height) = picture.pixels.dimensions();
    no_strip((width, height))?;
    Ok(picture)
}

/// An error for pictures so long and narrow that they are not trained on.
pub fn no_strip((width, height): (u32, u32)) -> std::result::Result<(), String> {
    if width.max(height) <= MAX_ASPECT.saturating_mul(width.min(height)) {
        return Ok(());
    }
    Err(format!("a strip of {width}x{height} pixels: no square of it shows the picture"))
}

/// The pixels of a file that had this size when it was looked at.
fn load_unchanged(path: &Path, size: (u32, u32), background: Background) -> Result<RgbImage> {
    let full = decode::load(path, background)?.pixels;
    unchanged(path, &full, size)?;
    Ok(full)
}

/// An error if the picture of a file has not the size that it had when it was looked at.
fn unchanged(path: &Path, now: &RgbImage, (width, height): (u32, u32)) -> Result<()> {
    let (now_width, now_height) = now.dimensions();
    if (now_width, now_height) == (width, height) {
        return Ok(());
    }
    let problem = format!(
        "expected {width}x{height} pixels as at the start, found {now_width}x{now_height}: the file was changed"
    );
    Err(Error::format(path, problem))
}

/// How many squares of `resolution` pixels lie in a picture of this size.
fn windows((width, height): (u32, u32), resolution: u32) -> u64 {
    u64::from(width - resolution + 1) * u64::from(height - resolution + 1)
}
