//! Pairs of picture and condition with a caption, on which control trains (table.rs says in which forms they are given).
//!
//! Both are resized and cut alike: the picture's shorter side at the resolution, then one square of both. Pictures are
//! resized bilinearly as the scripts of diffusers and ControlNet do; segmentation maps take the nearest pixel, since a mean
//! of two classes would be the colour of a third, or of none. Edges that are made are made last, of the square itself:
//! the condition then is the edges of what the model is to draw.
//!
//! A pair that cannot be used is kept with its reason; it never ends the reading, unless none is left.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::data::cache::Cache;
use crate::data::condition::Conditions;
pub use crate::data::condition::{ConditionFiles, ConditionSource, POINT_FILES, VOID, same_aspect};
use crate::data::image::resize::{center_offset, covering_size, short_side_size};
use crate::data::image::{Filter, RgbImage, crop, landmarks, resize};
pub use crate::data::pair_settings::{ConditionKind, PairSettings};
use crate::data::table::{self, Row, TableEntry};
use crate::data::{Crop, MAX_REASONS, Skipped, Window, load_unchanged, load_usable, windows};
use crate::platform::device;
use crate::platform::observer::{Counter, Observer};
use crate::{Error, Result};

/// So many threads look at files: more would only wait for the disk, and each holds a decoded picture.
const MAX_THREADS: usize = 8;
/// Reading so many pairs takes seconds, and is told.
const MANY: usize = 1000;

/// A pair that can be used.
#[derive(Debug, Clone, PartialEq)]
pub struct Pair {
    /// The picture's name in the table.
    pub name: String,
    /// Path of the picture.
    pub image: PathBuf,
    /// What the picture shows; empty where the table says nothing.
    pub caption: String,
    /// Whether the caption is the first of several.
    pub first_of_several: bool,
    /// Where the condition comes from.
    pub condition: ConditionSource,
    /// Width of the picture in pixels, the right way up.
    pub width: u32,
    /// Height of the picture in pixels, the right way up.
    pub height: u32,
    /// Whether parts of the picture are transparent.
    pub transparent: bool,
}

/// The pairs of a table, in its order.
#[derive(Debug)]
pub struct PairFolder {
    path: PathBuf,
    conditions: Conditions,
    pairs: Vec<Pair>,
    bad: Vec<Skipped>,
    resized: Cache<Resized>,
}

/// Picture and condition at one resolution, before the square is cut out.
#[derive(Debug)]
struct Resized {
    picture: RgbImage,
    /// `None` where it is made of the square.
    condition: Option<RgbImage>,
}

impl PairFolder {
    /// Reads the table of the folder at `path`, or the table at `path`, and decodes every file that it names, which is the
    /// only way to know that it is whole.
    ///
    /// An [`ErrorKind::Data`] with the reasons if not one pair can be used, or for files that the settings refuse, an [`ErrorKind::Format`] if the table cannot be read, an
    /// [`ErrorKind::Config`] for settings that contradict each other.
    pub fn read(path: &Path, settings: &PairSettings, observer: &dyn Observer) -> Result<Self> {
        let conditions = Conditions::new(settings)?;
        let table = table::read(path, settings)?;
        table.confine(settings.strict_paths, !settings.make_conditions, observer)?;
        let (mut pairs, mut bad) = (Vec::new(), Vec::new());
        for found in look_at_all(&table.rows, table.root(), &conditions, observer)? {
            match found {
                Ok(pair) => pairs.push(pair),
                Err(skipped) => bad.push(skipped),
            }
        }
        let folder = Self { path: path.into(), conditions, pairs, bad, resized: Cache::default() };
        if folder.pairs.is_empty() { Err(folder.nothing_to_use()) } else { Ok(folder) }
    }

    /// The folder or table that was read.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The pairs that are used; every index below counts these.
    pub fn pairs(&self) -> &[Pair] {
        &self.pairs
    }

    /// The rows that are not used.
    pub fn bad(&self) -> &[Skipped] {
        &self.bad
    }

    /// What the picture of a pair shows.
    pub fn caption(&self, index: usize) -> &str {
        &self.pairs[index].caption
    }

    /// What the user is told before training: how many pairs there are and of what, and which are not used and why; with the
    /// resolution also what resizing does to them.
    pub fn report(&self, resolution: Option<u32>) -> String {
        let count = |what: &dyn Fn(&Pair) -> bool| self.pairs.iter().filter(|pair| what(pair)).count();
        let plural = |n: usize| if n == 1 { "" } else { "s" };
        let total = self.pairs.len();
        let mut text = format!("{}: {total} pair{} used", self.path.display(), plural(total));
        if !self.bad.is_empty() {
            let _ = write!(text, ", {} bad", self.bad.len());
        }
        let made = count(&|pair| pair.condition == ConditionSource::Made);
        let points = count(&|pair| matches!(pair.condition, ConditionSource::Points { .. }));
        let labels = count(&|pair| matches!(pair.condition, ConditionSource::Labels { .. }));
        let sources = [
            (made, "made from the pictures"),
            (points, "drawn from points"),
            (labels, "coloured by the palette"),
            (total - made - points - labels, "pictures"),
        ];
        let sources = sources.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{n} {what}"));
        let sources = sources.collect::<Vec<_>>().join(", ");
        let _ = write!(text, "\n  conditions: {}; {sources}", self.conditions.kind());
        let mut seen = HashMap::new();
        for pair in &self.pairs {
            *seen.entry(&pair.image).or_insert(0) += 1;
        }
        let resolution_text = resolution.map_or(String::new(), |r| r.to_string());
        let shrunk = |pair: &Pair| match pair.condition {
            ConditionSource::Picture { width, height, .. } => {
                self.conditions.kind() == ConditionKind::Canny
                    && resolution.is_some_and(|r| width.min(height) > r)
            }
            _ => false,
        };
        let partly_outside = |pair: &Pair| match &pair.condition {
            ConditionSource::Points { points, .. } => {
                landmarks::inside(points, pair.width, pair.height) < points.len()
            }
            _ => false,
        };
        let notes = [
            (count(&|pair| resolution.is_some_and(|r| pair.width.min(pair.height) < r)), {
                format!("with a picture smaller than {resolution_text} pixels, which is enlarged")
            }),
            (count(&shrunk), {
                format!(
                    "with edges larger than {resolution_text} pixels, which become grey and thin: make them at that size \
                     (hra prepare canny --resolution {resolution_text}, or make_conditions)"
                )
            }),
            (count(&|pair| pair.caption.is_empty()), "without a caption".to_string()),
            (
                count(&|pair| pair.first_of_several),
                "with several captions, of which the first is used".into(),
            ),
            (count(&|pair| pair.transparent), {
                format!("with transparent parts, which show {} (background)", self.conditions.background)
            }),
            (total - seen.len(), "with the picture of another pair".into()),
            (count(&partly_outside), "with points outside the picture, which are not drawn".into()),
        ];
        for (n, note) in notes.iter().filter(|(n, _)| *n > 0) {
            let _ = write!(text, "\n  {n} pair{} {note}", plural(*n));
        }
        text + &self.reasons("bad  ")
    }

    /// The square that `crop` chooses from the picture with its shorter side at `resolution`. Reads no pixels.
    pub fn crop_window(&self, index: usize, resolution: u32, crop: Crop) -> Window {
        crop.window(self.resized_size(index, resolution), resolution)
    }

    /// How many different squares [`Crop::Random`] can choose for this pair.
    pub fn window_count(&self, index: usize, resolution: u32) -> u64 {
        windows(self.resized_size(index, resolution), resolution)
    }

    /// The `resolution` x `resolution` pixels of picture and condition at `window`, which [`Self::crop_window`] gave for
    /// the same pair.
    ///
    /// Resized pictures are kept in memory. An error if a file can no longer be read or has another size than before.
    pub fn prepare(&self, index: usize, resolution: u32, window: Window) -> Result<(RgbImage, RgbImage)> {
        let resized = self.resized(index, resolution)?;
        Ok(self.cut(&resized, |image| crop(image, window.x, window.y, resolution)))
    }

    /// Picture and condition at `width` x `height`: resized until they cover it, and the middle cut out.
    ///
    /// An error if a file can no longer be read or has another size than before.
    pub fn at_size(&self, index: usize, width: u32, height: u32) -> Result<(RgbImage, RgbImage)> {
        let pair = &self.pairs[index];
        let size = covering_size((pair.width, pair.height), (width, height));
        let resized = self.resize(index, size)?;
        let (x, y) = (center_offset(size.0, width), center_offset(size.1, height));
        let middle = |image: &RgbImage| ::image::imageops::crop_imm(image, x, y, width, height).to_image();
        Ok(self.cut(&resized, middle))
    }

    /// What is shown of picture and condition; edges are made of it.
    fn cut(&self, resized: &Resized, shown: impl Fn(&RgbImage) -> RgbImage) -> (RgbImage, RgbImage) {
        let picture = shown(&resized.picture);
        let condition = resized.condition.as_ref().map_or_else(|| self.conditions.make(&picture), &shown);
        (picture, condition)
    }

    fn resized_size(&self, index: usize, resolution: u32) -> (u32, u32) {
        let pair = &self.pairs[index];
        short_side_size(pair.width, pair.height, resolution)
    }

    fn resized(&self, index: usize, resolution: u32) -> Result<Arc<Resized>> {
        self.resized.get((index, resolution), || {
            let resized = self.resize(index, self.resized_size(index, resolution))?;
            let bytes = resized.picture.len() + resized.condition.as_ref().map_or(0, |image| image.len());
            Ok((resized, bytes))
        })
    }

    fn resize(&self, index: usize, size: (u32, u32)) -> Result<Resized> {
        let Pair { image, condition, width, height, .. } = &self.pairs[index];
        let full = load_unchanged(image, (*width, *height), self.conditions.background)?;
        let picture = resize(&full, size.0, size.1, Filter::Bilinear);
        let condition = self.conditions.at_size(condition, (*width, *height), size)?;
        Ok(Resized { picture, condition })
    }

    /// A line for each of the first bad rows.
    fn reasons(&self, word: &str) -> String {
        let mut text = String::new();
        for Skipped { name, reason } in self.bad.iter().take(MAX_REASONS) {
            let _ = write!(text, "\n  {word}{name}: {reason}");
        }
        if self.bad.len() > MAX_REASONS {
            let _ = write!(text, "\n  and {} more", self.bad.len() - MAX_REASONS);
        }
        text
    }

    fn nothing_to_use(&self) -> Error {
        let text = format!("{}: no pair that can be used{}", self.path.display(), self.reasons(""));
        Error::data(text).with_hint("paths in a table are relative to the folder it lies in")
    }
}

/// For each of these pictures the next one that is another, the first following the last: whose condition a caption is drawn with
/// to see what of a score is chance. Empty where all are the same, or there is one.
pub fn shuffled<T: PartialEq>(pictures: &[T]) -> Vec<usize> {
    let count = pictures.len();
    let next = |i: usize| (1..count).map(|by| (i + by) % count).find(|other| pictures[*other] != pictures[i]);
    (0..count).map(next).collect::<Option<_>>().unwrap_or_default()
}

/// A pair, or the row that is none.
type Found = std::result::Result<Pair, Skipped>;

/// Looks at every row, on several threads, and gives them in their order.
fn look_at_all(
    rows: &[Row],
    root: &Path,
    conditions: &Conditions,
    observer: &dyn Observer,
) -> Result<Vec<Found>> {
    let threads = device::own_threads().min(MAX_THREADS);
    let next = AtomicUsize::new(0);
    let work = |progress: Option<Counter>| {
        let mut found = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(row) = rows.get(index).filter(|_| !observer.asks_to_stop()) else { break };
            found.push((index, look(row, root, conditions)));
            if let Some(progress) = &progress {
                progress.set(index as u64 + 1, "");
            }
        }
        found
    };
    let total = rows.len() as u64;
    let mut found = std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads.min(rows.len())).map(|_| scope.spawn(|| work(None))).collect();
        let mut found =
            work((rows.len() >= MANY).then(|| Counter::new(observer, "checking pairs", 0, total)));
        for other in others {
            // A thread that panicked must not look like one without bad pairs.
            found.extend(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
        found
    });
    observer.check(|| "stopped while the pairs were checked; nothing was written".into())?;
    found.sort_by_key(|(index, _)| *index);
    Ok(found.into_iter().map(|(_, found)| found).collect())
}

/// The pair of a row, with its files looked at.
fn look(row: &Row, root: &Path, conditions: &Conditions) -> Found {
    let TableEntry { image: name, caption, condition, first_of_several } = match &row.entry {
        Ok(entry) => entry,
        Err(reason) => return Err(Skipped { name: row.place.clone(), reason: reason.clone() }),
    };
    let bad = |file: &str, reason: String| Skipped {
        name: format!("{}, {name}", row.place),
        reason: format!("{file}: {reason}"),
    };
    let image = root.join(name);
    let picture = load_usable(&image, conditions.background).map_err(|reason| bad("picture", reason))?;
    let ((width, height), transparent) = (picture.pixels.dimensions(), picture.transparent);
    // Before the condition is read, which may be as large.
    drop(picture);
    let path = condition.as_ref().map(|path| root.join(path));
    let what = condition.as_ref().map_or("condition".to_string(), |path| format!("condition {path}"));
    let condition = conditions.look(path, (width, height)).map_err(|reason| bad(&what, reason))?;
    Ok(Pair {
        name: name.clone(),
        image,
        caption: caption.clone(),
        first_of_several: *first_of_several,
        condition,
        width,
        height,
        transparent,
    })
}
