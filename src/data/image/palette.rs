//! Segmentation: maps with a class for each pixel, the colours of classes, and both ways between them.
//!
//! Data sets store maps as PNG files of grey values that are the classes (COCO, ADE20K; 8 or 16 bits), of palette indices that
//! are the classes (Pascal VOC), or of the colours themselves. Only the last have a meaning as pictures, so the others are
//! read here and not by [`super::load_rgb`], which would drop bits and indices.

use std::fmt;
use std::io::Cursor;
use std::path::Path;

use ::image::{Rgb, RgbImage};
use ::png::{BitDepth, ColorType, Decoder, Limits, Transformations};
use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::data::image::background::Background;
use crate::data::image::decode::{self, MAX_METADATA_BYTES, MAX_PIXELS, PIXELS};
use crate::data::image::mask::Mask;
use crate::data::image::png::check_chunks;
use crate::data::image::resize::nearest_covering;
use crate::platform::files;
use crate::{Error, Result};

/// The longest palette file.
const MAX_PALETTE_BYTES: u64 = 1 << 20;
/// Classes are 16-bit numbers.
const MAX_COLOURS: usize = 1 << 16;
const PNG_SIGNATURE: &[u8] = b"\x89PNG\r\n\x1a\n";

/// The colours of classes; class i has the i-th.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Palette {
    colours: Vec<[u8; 3]>,
    /// Empty, or a name for each.
    names: Vec<String>,
}

/// A class for each pixel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabelMap {
    width: u32,
    height: u32,
    /// Rows from the top.
    labels: Vec<u16>,
}

/// What a file of a map holds.
#[derive(Debug, Clone)]
pub enum MapFile {
    /// Grey values, which are classes.
    Grey(LabelMap),
    /// Indices into colours of its own.
    Indexed(LabelMap, Vec<[u8; 3]>),
    /// Colours.
    Colours(RgbImage),
}

impl Palette {
    /// Reads a JSON file: `{"name": [r, g, b], ..}`, in the order of the classes, or `[[r, g, b], ..]`.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = files::read(path, MAX_PALETTE_BYTES)?;
        let Entries(entries) = serde_json::from_slice(&bytes).map_err(|e| {
            let expected = "expected colours as {\"name\": [r, g, b], ..} or [[r, g, b], ..]";
            Error::format(path, format!("{expected}: {e}"))
        })?;
        if entries.is_empty() || entries.len() > MAX_COLOURS {
            let found = entries.len();
            return Err(Error::format(path, format!("expected 1 to {MAX_COLOURS} colours, found {found}")));
        }
        let (names, colours): (Vec<_>, Vec<_>) = entries.into_iter().unzip();
        Ok(Self { colours, names: names.into_iter().flatten().collect() })
    }

    /// The colours in the order of the classes.
    pub fn colours(&self) -> &[[u8; 3]] {
        &self.colours
    }

    /// Names of the classes; empty where the file has none.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The colours of what is no subject: the first class's, and black, which pixels without a class have, where it is no class's.
    pub fn background(&self) -> Vec<[u8; 3]> {
        let void = (!self.colours.contains(&[0; 3])).then_some([0; 3]);
        std::iter::once(self.colours[0]).chain(void).collect()
    }

    /// The class whose colour is nearest (squared distance; of equally near ones the first).
    pub fn nearest(&self, colour: [u8; 3]) -> u16 {
        let distance = |other: &[u8; 3]| -> u32 {
            colour.iter().zip(other).map(|(a, b)| u32::from(a.abs_diff(*b)).pow(2)).sum()
        };
        let mut best = (u32::MAX, 0);
        for (class, other) in self.colours.iter().enumerate() {
            best = best.min((distance(other), class));
        }
        best.1 as u16
    }

    /// The picture of a map; pixels of the class `ignored` are black. The error is a sentence: a class without a colour.
    pub fn colour(&self, map: &LabelMap, ignored: Option<u16>) -> std::result::Result<RgbImage, String> {
        let mut bytes = Vec::with_capacity(map.labels.len() * 3);
        for (at, &label) in map.labels.iter().enumerate() {
            let colour = match self.colours.get(usize::from(label)) {
                _ if Some(label) == ignored => [0; 3],
                Some(colour) => *colour,
                None => {
                    let (x, y) = (at as u32 % map.width, at as u32 / map.width);
                    let most = self.colours.len() - 1;
                    return Err(format!(
                        "expected classes 0 to {most} as in the palette, found {label} at ({x}, {y})"
                    ));
                }
            };
            bytes.extend(colour);
        }
        Ok(RgbImage::from_raw(map.width, map.height, bytes).expect("three bytes a pixel"))
    }

    /// The classes of a coloured picture: each pixel's nearest colour.
    /// Black, where no class has it, is `void` if that is given.
    pub fn classes(&self, picture: &RgbImage, void: Option<u16>) -> LabelMap {
        let void = void.filter(|_| !self.colours.contains(&[0; 3]));
        let class = |colour| void.filter(|_| colour == [0; 3]).unwrap_or_else(|| self.nearest(colour));
        // Neighbours mostly have one colour.
        let mut last = ([0; 3], class([0; 3]));
        let labels = picture.pixels().map(|Rgb(colour)| {
            if *colour != last.0 {
                last = (*colour, class(*colour));
            }
            last.1
        });
        let labels = labels.collect();
        LabelMap { width: picture.width(), height: picture.height(), labels }
    }
}

impl MapFile {
    /// Reads a map. Files that are not PNG hold colours; what is transparent is black, as what has no class is.
    pub fn read(path: &Path) -> Result<Self> {
        // Let go of before it is read anew.
        let map =
            decode::read(path).map(|bytes| bytes.starts_with(PNG_SIGNATURE).then(|| read_png(&bytes)))?;
        match map {
            Some(Ok(Some(map))) => Ok(map),
            Some(Err(problem)) => Err(Error::format(path, problem)),
            Some(Ok(None)) | None => Ok(Self::Colours(decode::load(path, Background::BLACK)?.pixels)),
        }
    }

    /// Where the subject is: what has no colour of [`Palette::background`], or without a palette is not black; of classes, read as
    /// [`LabelMap::read`] does, all but 0.
    pub fn subject(&self, palette: Option<&Palette>) -> Mask {
        let all_but_0 = |map: &LabelMap| {
            Mask::new(map.width, map.height, map.labels.iter().map(|label| *label != 0).collect())
        };
        match self {
            Self::Grey(map) => all_but_0(map),
            Self::Indexed(map, own) => all_but_0(
                palette.and_then(|palette| map.by_colour(own, palette, None)).as_ref().unwrap_or(map),
            ),
            Self::Colours(picture) => {
                let background = palette.map_or(vec![[0; 3]], Palette::background);
                Mask::of(picture, |colour| !background.contains(&colour))
            }
        }
    }
}

impl LabelMap {
    /// `labels` row by row from the top.
    ///
    /// # Panics
    /// If they are not `width` x `height`.
    pub fn new(width: u32, height: u32, labels: Vec<u16>) -> Self {
        assert_eq!(labels.len(), width as usize * height as usize, "a map has its size");
        Self { width, height, labels }
    }

    /// Reads a map of classes. Grey values are classes; colours become the nearest of `palette`, and are an error without one;
    /// indices become the palette's classes by their colours where all these are the palette's, else they are the classes.
    pub fn read(path: &Path, palette: Option<&Palette>) -> Result<Self> {
        Self::read_with(path, palette, None)
    }

    /// [`Self::read`] of a true map: in colours, black that is no class's is the label `void`.
    pub fn read_truth(path: &Path, palette: Option<&Palette>, void: u16) -> Result<Self> {
        Self::read_with(path, palette, Some(void))
    }

    fn read_with(path: &Path, palette: Option<&Palette>, void: Option<u16>) -> Result<Self> {
        match (MapFile::read(path)?, palette) {
            (MapFile::Grey(map), _) | (MapFile::Indexed(map, _), None) => Ok(map),
            (MapFile::Indexed(map, own), Some(palette)) => {
                Ok(map.by_colour(&own, palette, void).unwrap_or(map))
            }
            (MapFile::Colours(picture), Some(palette)) => Ok(palette.classes(&picture, void)),
            (MapFile::Colours(_), None) => Err(Error::format(
                path,
                "expected a PNG of classes (grey values or a palette), found colours",
            )
            .with_hint("--palette FILE says which classes they are")),
        }
    }

    /// Width and height in pixels.
    pub fn dimensions(&self) -> (u32, u32) {
        (self.width, self.height)
    }

    /// Row by row from the top.
    pub fn labels(&self) -> &[u16] {
        &self.labels
    }

    /// The map at the size at which a picture of its size is shown to a model: shorter side at `resolution`, the middle square
    /// cut out. Each pixel takes the class of the nearest one.
    pub fn square(&self, resolution: u32) -> Self {
        let side = (resolution, resolution);
        let labels = nearest_covering(&self.labels, (self.width, self.height), side);
        Self { width: resolution, height: resolution, labels }
    }

    /// The classes of indices whose colours are all in the palette; black may be `void` instead.
    fn by_colour(&self, own: &[[u8; 3]], palette: &Palette, void: Option<u16>) -> Option<Self> {
        let class = |colour: &[u8; 3]| {
            let class = palette.colours.iter().position(|other| other == colour).map(|class| class as u16);
            class.or(void.filter(|_| *colour == [0; 3]))
        };
        let classes: Vec<Option<u16>> = own.iter().map(class).collect();
        let labels = self.labels.iter().map(|&index| *classes.get(usize::from(index))?);
        Some(Self { labels: labels.collect::<Option<_>>()?, ..*self })
    }
}

/// The map in a PNG file; `None` where it holds colours.
fn read_png(bytes: &[u8]) -> std::result::Result<Option<MapFile>, String> {
    check_chunks(bytes)?;
    let broken = |e: ::png::DecodingError| format!("broken or truncated PNG image: {e}");
    let limit = Limits { bytes: MAX_METADATA_BYTES as usize };
    let mut decoder = Decoder::new_with_limits(Cursor::new(bytes), limit);
    decoder.set_transformations(Transformations::IDENTITY);
    decoder.set_ignore_iccp_chunk(true);
    let mut reader = decoder.read_info().map_err(broken)?;
    let info = reader.info();
    let (width, height, depth) = (info.width, info.height, info.bit_depth);
    if !matches!(info.color_type, ColorType::Grayscale | ColorType::Indexed) {
        return Ok(None);
    }
    if u64::from(width) * u64::from(height) > MAX_PIXELS {
        return Err(format!("expected at most {MAX_PIXELS} pixels, found {width}x{height}"));
    }
    let own = (info.color_type == ColorType::Indexed).then(|| info.palette.clone().unwrap_or_default());
    let size =
        reader.output_buffer_size().ok_or_else(|| format!("a PNG image too large: {width}x{height}"))?;
    let _room = PIXELS.take(size as u64 + 2 * u64::from(width) * u64::from(height));
    let mut data = vec![0; size];
    let frame = reader.next_frame(&mut data).map_err(broken)?;
    let mut labels = Vec::with_capacity(width as usize * height as usize);
    for row in data.chunks_exact(frame.line_size.max(1)).take(height as usize) {
        let value = |x: usize| match depth {
            BitDepth::Sixteen => u16::from_be_bytes([row[2 * x], row[2 * x + 1]]),
            BitDepth::Eight => u16::from(row[x]),
            few => {
                let (bits, each) = (few as usize, 8 / few as usize);
                let shift = (each - 1 - x % each) * bits;
                u16::from(row[x / each]) >> shift & ((1 << bits) - 1)
            }
        };
        labels.extend((0..width as usize).map(value));
    }
    let map = LabelMap::new(width, height, labels);
    Ok(Some(match own {
        None => MapFile::Grey(map),
        Some(own) => MapFile::Indexed(map, own.as_chunks::<3>().0.to_vec()),
    }))
}

/// Colours of a palette file in its order, which a map type of serde_json would not keep.
struct Entries(Vec<(Option<String>, [u8; 3])>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object or a list of colours")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some((name, colour)) = map.next_entry::<String, [u8; 3]>()? {
                    entries.push((Some(name), colour));
                }
                Ok(Entries(entries))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> std::result::Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some(colour) = list.next_element::<[u8; 3]>()? {
                    entries.push((None, colour));
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_any(InOrder)
    }
}
