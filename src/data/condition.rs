//! The condition of a pair: a file of some kind, or edges made from the picture.

use std::path::{Path, PathBuf};

use crate::data::image::edges::{Thresholds, canny};
use crate::data::image::landmarks::{self, Point};
use crate::data::image::palette::{LabelMap, MapFile, Palette};
use crate::data::image::{Background, Filter, RgbImage, decode, resize, resize_nearest};
use crate::data::pair_settings::{ConditionKind, PairSettings};
use crate::data::{load_unchanged, load_usable, unchanged};
use crate::platform::observer::Observer;
use crate::{Error, Result};

/// Endings of files of points; other conditions are pictures.
pub const POINT_FILES: [&str; 3] = ["pts", "json", "txt"];
/// Edges, maps and landmarks are drawn on black.
const CONDITION_BACKGROUND: Background = Background::BLACK;
/// A picture all of whose values are below this may be a map of classes.
const FEW_CLASSES: u8 = 32;
/// The class of pixels that have none in COCO, ADE20K and Pascal VOC; they are black, unless the palette goes so far.
pub const VOID: u16 = 255;

/// Where the condition of a pair comes from.
#[derive(Debug, Clone, PartialEq)]
pub enum ConditionSource {
    /// Edges of the picture, after it was resized and cropped: those of what the model is shown.
    Made,
    /// A picture.
    Picture {
        /// Path of the file.
        path: PathBuf,
        /// Width in pixels, the right way up.
        width: u32,
        /// Height in pixels, the right way up.
        height: u32,
    },
    /// A map of class numbers, which a palette colours.
    Labels {
        /// Path of the file.
        path: PathBuf,
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
    },
    /// Points in pixels of the picture at its own size.
    Points {
        /// Path of the file.
        path: PathBuf,
        /// The points, at least one of them in the picture.
        points: Vec<Point>,
    },
}

impl ConditionSource {
    /// Its file; `None` where it is made.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Made => None,
            Self::Picture { path, .. } | Self::Labels { path, .. } | Self::Points { path, .. } => Some(path),
        }
    }
}

/// How conditions are read, made and drawn.
#[derive(Debug)]
pub(super) struct Conditions {
    kind: ConditionKind,
    make: bool,
    thresholds: Thresholds,
    palette: Option<Palette>,
    /// Of the pictures; conditions have [`CONDITION_BACKGROUND`].
    pub(super) background: Background,
}

impl Conditions {
    /// Reads the palette, if one is named.
    pub(super) fn new(settings: &PairSettings) -> Result<Self> {
        let PairSettings { condition: kind, make_conditions: make, thresholds, background, .. } = *settings;
        if make && kind != ConditionKind::Canny {
            return Err(Error::config(format!(
                "make_conditions: expected condition = \"canny\", found \"{kind}\": only edges can be made from a picture"
            )));
        }
        if settings.palette.is_some() && kind != ConditionKind::Segmentation {
            return Err(Error::config(format!(
                "palette: expected condition = \"segmentation\", found \"{kind}\": only its maps have classes"
            )));
        }
        let palette = settings.palette.as_deref().map(Palette::read).transpose()?;
        Ok(Self { kind, make, thresholds, palette, background })
    }

    pub(super) fn kind(&self) -> ConditionKind {
        self.kind
    }

    /// Looks at the condition's file, if one is named, for a picture of `size`; the error says what is wrong with it.
    pub(super) fn look(
        &self,
        path: Option<PathBuf>,
        size: (u32, u32),
    ) -> std::result::Result<ConditionSource, String> {
        let path = match path {
            _ if self.make => return Ok(ConditionSource::Made),
            None if self.kind == ConditionKind::Canny => return Ok(ConditionSource::Made),
            None => {
                return Err(
                    "expected a file, found none named (only canny conditions are made from the picture)"
                        .to_string(),
                );
            }
            Some(path) => path,
        };
        if self.kind == ConditionKind::Landmarks && is_point_file(&path) {
            let points = landmarks::read_points(&path).map_err(|e| e.reason())?;
            if points.is_empty() {
                return Err("expected points, found none".into());
            }
            let (width, height) = size;
            if landmarks::inside(&points, width, height) == 0 {
                let found = points.len();
                return Err(format!(
                    "expected points in the picture of {width}x{height}, found {found} outside"
                ));
            }
            return Ok(ConditionSource::Points { path, points });
        }
        let is_map = self.palette.is_some()
            && !matches!(MapFile::read(&path).map_err(|e| e.reason())?, MapFile::Colours(_));
        let (width, height) = if is_map {
            self.coloured(&path).map_err(|e| e.reason())?.dimensions()
        } else {
            load_usable(&path, CONDITION_BACKGROUND)?.pixels.dimensions()
        };
        same_aspect(size, (width, height))?;
        Ok(if is_map {
            ConditionSource::Labels { path, width, height }
        } else {
            ConditionSource::Picture { path, width, height }
        })
    }

    /// The condition at the size to which its picture was resized; `None` where it is made of what is cropped from that.
    pub(super) fn at_size(
        &self,
        source: &ConditionSource,
        full: (u32, u32),
        (width, height): (u32, u32),
    ) -> Result<Option<RgbImage>> {
        let picture = match source {
            ConditionSource::Made => return Ok(None),
            ConditionSource::Points { points, .. } => {
                // Points are middles of pixels.
                let place = |at: f64, from: u32, to: u32| (at + 0.5) * f64::from(to) / f64::from(from) - 0.5;
                let scaled: Vec<Point> = points
                    .iter()
                    .map(|p| Point { x: place(p.x, full.0, width), y: place(p.y, full.1, height) })
                    .collect();
                return Ok(Some(landmarks::draw(&scaled, width, height)));
            }
            ConditionSource::Picture { path, width, height } => {
                load_unchanged(path, (*width, *height), CONDITION_BACKGROUND)?
            }
            ConditionSource::Labels { path, width, height } => {
                let map = self.coloured(path)?;
                unchanged(path, &map, (*width, *height))?;
                map
            }
        };
        Ok(Some(match self.kind {
            ConditionKind::Segmentation => resize_nearest(&picture, width, height),
            _ => resize(&picture, width, height, Filter::Bilinear),
        }))
    }

    /// Edges of what the model is shown.
    pub(super) fn make(&self, shown: &RgbImage) -> RgbImage {
        canny(shown, self.thresholds).to_rgb()
    }

    /// The colours of a map of classes.
    fn coloured(&self, path: &Path) -> Result<RgbImage> {
        let map = LabelMap::read(path, self.palette.as_ref())?;
        let palette = self.palette.as_ref().expect("only with a palette a map is one");
        let ignored = (palette.colours().len() <= usize::from(VOID)).then_some(VOID);
        palette.colour(&map, ignored).map_err(|problem| Error::format(path, problem))
    }
}

/// Reads conditions that are given alone, without the pictures that they belong to.
#[derive(Debug)]
pub struct ConditionFiles {
    conditions: Conditions,
}

impl ConditionFiles {
    /// As the conditions of pairs with these settings.
    pub fn new(settings: &PairSettings) -> Result<Self> {
        Conditions::new(settings).map(|conditions| Self { conditions })
    }

    /// The condition in a file at its own size, label maps in colours; where conditions are made, the picture that they are made of.
    ///
    /// Errors: a file that is no picture, points (whose picture's size nobody says), labels outside the palette.
    pub fn load(&self, path: &Path, observer: &dyn Observer) -> Result<RgbImage> {
        let own = &self.conditions;
        if is_point_file(path) {
            return Err(Error::format(path, "expected a picture, found a file of points")
                .with_hint("`hra prepare landmarks` draws them for the pictures they belong to"));
        }
        if own.palette.is_some() && !matches!(MapFile::read(path)?, MapFile::Colours(_)) {
            return own.coloured(path);
        }
        let picture =
            decode::load(path, if own.make { own.background } else { CONDITION_BACKGROUND })?.pixels;
        if own.kind == ConditionKind::Segmentation && picture.iter().all(|v| *v < FEW_CLASSES) {
            observer.warn(&format!(
                "{} is nearly black: if it holds numbers of classes, a palette makes colours of them",
                path.display()
            ));
        }
        Ok(picture)
    }

    /// What [`Self::load`] gave as the model is shown it: stretched as diffusers does, classes by nearest pixels; edges are made of
    /// that where conditions are made.
    pub fn shown(&self, picture: &RgbImage, width: u32, height: u32) -> RgbImage {
        let own = &self.conditions;
        let stretched = match own.kind {
            ConditionKind::Segmentation => resize_nearest(picture, width, height),
            _ => resize(picture, width, height, Filter::Lanczos),
        };
        if own.make { own.make(&stretched) } else { stretched }
    }
}

fn is_point_file(path: &Path) -> bool {
    path.extension().is_some_and(|e| POINT_FILES.iter().any(|p| e.eq_ignore_ascii_case(p)))
}

/// An error unless one of the two pictures, resized to the width of the other, has its height within a pixel.
pub fn same_aspect(picture: (u32, u32), condition: (u32, u32)) -> std::result::Result<(), String> {
    let off = |(width, height): (u32, u32), (other_width, other_height): (u32, u32)| {
        (f64::from(width) * f64::from(other_height) / f64::from(other_width) - f64::from(height)).abs()
    };
    if off(picture, condition).min(off(condition, picture)) <= 1.0 {
        return Ok(());
    }
    Err(format!(
        "expected the aspect of the picture, {}x{}, found {}x{}",
        picture.0, picture.1, condition.0, condition.1
    ))
}
