//! Reading photographs: PNG, JPEG, WebP, BMP and TIFF, known by their content, as 8-bit RGB the right way up.
//!
//! As `ImageOps.exif_transpose(Image.open(path)).convert("RGB")` of Pillow, which training scripts call: grey and palette images
//! become RGB, 16-bit channels keep their high byte. Unlike Pillow, 16-bit grey keeps its high byte too, where Pillow makes
//! everything above 255 of 65535 white, and transparent parts show the background instead of whatever colour lies under them.
//! A file cannot make us take more memory than the constants below allow.

use std::io::Cursor;
use std::ops::Deref;
use std::path::Path;

use ::image::metadata::Orientation;
use ::image::{
    ColorType, DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits, Rgb, RgbImage,
    guess_format,
};

use crate::data::image::background::Background;
use crate::data::image::budget::{MemoryBudget, MemoryShare};
use crate::data::image::png::check_chunks;
use crate::platform::files;
use crate::{Error, Result};

/// Largest number of pixels: twice what Pillow warns at, where it refuses too.
pub const MAX_PIXELS: u64 = 178_956_970;
/// Most memory that one picture may take while it is read, in bytes; so much takes a JPEG of [`MAX_PIXELS`].
pub const MAX_DECODED_BYTES: u64 = 3 << 29;
/// Largest file, in bytes.
pub const MAX_FILE_BYTES: u64 = 1 << 29;
/// Most memory that what stands beside the pixels of a PNG may take (colour profile, texts), unpacked. None of it is used but the
/// way up, and a profile that is longer is passed over.
pub(super) const MAX_METADATA_BYTES: u64 = 1 << 26;

/// What pictures that are read at once may take together; [`memory`] says what each does.
pub(super) static PIXELS: MemoryBudget = MemoryBudget::new(1 << 31);
/// What their files may take. Taken before [`PIXELS`], never after.
static FILES: MemoryBudget = MemoryBudget::new(MAX_FILE_BYTES);

/// A decoded picture and what its file said.
#[derive(Debug, Clone)]
pub struct DecodedPicture {
    /// The pixels, the right way up.
    pub pixels: RgbImage,
    /// Name of the file format, such as `JPEG`.
    pub format: &'static str,
    /// Whether parts of it were transparent, and show the background now.
    pub transparent: bool,
    /// What was done to bring the picture the right way up; `None` if nothing.
    pub turned: Option<&'static str>,
}

/// The pixels of an image file, white where it is transparent. An [`ErrorKind::Format`](crate::ErrorKind::Format) says what the
/// file is if it is no image that can be used.
pub fn load_rgb(path: &Path) -> Result<RgbImage> {
    Ok(load(path, Background::WHITE)?.pixels)
}

/// The bytes of a picture's file; others wait to read theirs where too many are held.
pub struct FileBytes {
    bytes: Vec<u8>,
    _room: MemoryShare,
}

impl Deref for FileBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Reads a picture's file. Whoever holds one must read no other.
pub fn read(path: &Path) -> Result<FileBytes> {
    let size = std::fs::metadata(path).map_or(0, |meta| meta.len());
    let _room = FILES.take(size);
    Ok(FileBytes { bytes: files::read(path, MAX_FILE_BYTES)?, _room })
}

/// The picture in an image file in front of `background`.
pub fn load(path: &Path, background: Background) -> Result<DecodedPicture> {
    let bytes = read(path)?;
    decode(&bytes, background).map_err(|problem| Error::format(path, problem))
}

/// A picture that is white where a mask is, and what a user must know of how it was read. Painting programs write a shape of one
/// colour on a transparent layer: what is opaque there is white here. Other transparent parts are black.
pub fn load_mask(path: &Path) -> Result<(RgbImage, Option<&'static str>)> {
    let bytes = read(path)?;
    let on = |background| decode(&bytes, background).map_err(|problem| Error::format(path, problem));
    let (light, dark) = (on(Background::WHITE)?, on(Background::BLACK)?);
    let (mut white, dark) = (light.pixels, dark.pixels);
    if !light.transparent {
        return Ok((dark, None));
    }
    // In front of white and of black a pixel differs by just what shows through: 255 - alpha.
    let alpha = |light: &Rgb<u8>, dark: &Rgb<u8>| 255 - (light.0[0] - dark.0[0]);
    let pixels = || white.pixels().zip(dark.pixels());
    // In front of black a pixel of that colour is alpha times it, but for rounding, here and in the painting program.
    let is = |colour: &Rgb<u8>, (light, dark): (&Rgb<u8>, &Rgb<u8>)| {
        let alpha = u16::from(alpha(light, dark));
        colour.0.iter().zip(dark.0).all(|(v, dark)| (u16::from(*v) * alpha / 255).abs_diff(dark.into()) <= 2)
    };
    let colour = pixels().find(|(light, dark)| alpha(light, dark) == u8::MAX).map(|(_, colour)| colour);
    if colour.is_some_and(|colour| !pixels().all(|pixel| is(colour, pixel))) {
        return Ok((dark, Some("its transparent parts count as black")));
    }
    for (pixel, dark) in white.pixels_mut().zip(dark.pixels()) {
        *pixel = Rgb([alpha(pixel, dark); 3]);
    }
    Ok((white, Some("it has one colour: its opaque parts are the mask")))
}

/// Decodes the bytes of an image file in front of `background`; the error is a sentence without the file's name.
pub fn decode(bytes: &[u8], background: Background) -> std::result::Result<DecodedPicture, String> {
    let (format, name) = accepted(bytes)
        .ok_or_else(|| format!("expected a PNG, JPEG, WebP, BMP or TIFF image, found {}", describe(bytes)))?;
    // Decoders panic on some damaged files, such as a PNG whose palette ends within a colour.
    let decoded = std::panic::catch_unwind(|| decode_as(format, name, bytes, background));
    decoded.unwrap_or_else(|_| Err(format!("broken {name} image: its decoder gave up")))
}

fn decode_as(
    format: ImageFormat,
    name: &'static str,
    bytes: &[u8],
    background: Background,
) -> std::result::Result<DecodedPicture, String> {
    if format == ImageFormat::Png {
        check_chunks(bytes)?;
    }
    let explain = |e: ImageError| explain(name, &e);
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(if format == ImageFormat::Png { MAX_METADATA_BYTES } else { MAX_DECODED_BYTES });
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    reader.limits(limits);
    let mut decoder = reader.into_decoder().map_err(explain)?;
    let (width, height) = decoder.dimensions();
    if width == 0 || height == 0 {
        return Err(format!("expected pixels, found a {name} image of {width}x{height}"));
    }
    if u64::from(width) * u64::from(height) > MAX_PIXELS {
        return Err(format!(
            "expected at most {MAX_PIXELS} pixels, found a {name} image of {width}x{height}"
        ));
    }
    if format == ImageFormat::Jpeg && !jpeg_reaches_its_end(bytes) {
        return Err("broken or truncated JPEG image: it has no end marker".into());
    }
    // Damaged metadata is no reason to refuse the pixels.
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let needed = memory(format, &decoder, orientation);
    if needed > MAX_DECODED_BYTES {
        let (most, needed) = (MAX_DECODED_BYTES >> 20, needed >> 20);
        return Err(format!(
            "expected an image that takes at most {most} MiB while it is read, found a {name} image of {width}x{height} that \
             takes {needed}"
        ));
    }
    let _room = PIXELS.take(needed);
    let image = DynamicImage::from_decoder(decoder).map_err(explain)?;
    let (pixels, transparent) = background
        .behind(image)
        .ok_or_else(|| format!("expected 8 or 16 bits a channel, found a floating-point {name} image"))?;
    let mut upright = DynamicImage::ImageRgb8(pixels);
    upright.apply_orientation(orientation);
    Ok(DecodedPicture { pixels: upright.into_rgb8(), format: name, transparent, turned: turned(orientation) })
}

/// Bytes that are held at once, at most, while a picture is decoded, put in front of its background and turned.
fn memory(format: ImageFormat, decoder: &impl ImageDecoder, orientation: Orientation) -> u64 {
    let (width, height) = decoder.dimensions();
    let pixels = u64::from(width) * u64::from(height);
    let (decoded, rgb) = (decoder.total_bytes(), 3 * pixels);
    let own = match format {
        // Coefficients of a progressive file, 16 bits each.
        ImageFormat::Jpeg => 2 * rgb,
        // Planes of four channels.
        ImageFormat::WebP => 4 * pixels,
        // A strip or tile may hold all of it.
        ImageFormat::Tiff => decoded,
        _ => 0,
    };
    let blended = if decoder.color_type() == ColorType::Rgb8 { 0 } else { rgb };
    let turned = if orientation == Orientation::NoTransforms { 0 } else { rgb };
    decoded + own.max(blended).max(turned)
}

fn accepted(bytes: &[u8]) -> Option<(ImageFormat, &'static str)> {
    let format = guess_format(bytes).ok()?;
    let name = match format {
        ImageFormat::Png => "PNG",
        ImageFormat::Jpeg => "JPEG",
        ImageFormat::WebP => "WebP",
        ImageFormat::Bmp => "BMP",
        ImageFormat::Tiff => "TIFF",
        _ => return None,
    };
    Some((format, name))
}

fn turned(orientation: Orientation) -> Option<&'static str> {
    match orientation {
        Orientation::NoTransforms => None,
        Orientation::Rotate90 => Some("turned by 90 degrees"),
        Orientation::Rotate180 => Some("turned by 180 degrees"),
        Orientation::Rotate270 => Some("turned by 270 degrees"),
        Orientation::FlipHorizontal => Some("mirrored"),
        Orientation::FlipVertical => Some("mirrored top to bottom"),
        Orientation::Rotate90FlipH => Some("turned by 90 degrees and mirrored"),
        Orientation::Rotate270FlipH => Some("turned by 270 degrees and mirrored"),
    }
}

fn explain(name: &str, error: &ImageError) -> String {
    match error {
        ImageError::Limits(_) => {
            let most = MAX_DECODED_BYTES >> 20;
            format!(
                "expected a {name} image that takes at most {most} MiB while it is read, found one that takes more"
            )
        }
        ImageError::Unsupported(e) => format!("a kind of {name} image that cannot be read: {e}"),
        e => format!("broken or truncated {name} image: {e}"),
    }
}

/// Whether a JPEG file has an end marker after its pixels. The decoder fills what is missing with grey; nobody wants to train
/// on that.
fn jpeg_reaches_its_end(bytes: &[u8]) -> bool {
    let mut at = 2;
    while let Some(&[first, marker]) = bytes.get(at..at + 2) {
        match (first, marker) {
            (0xff, 0xd9) => return true,
            // Padding, an escaped 0xff among the pixels, or a marker without a segment.
            (0xff, 0xff) => at += 1,
            (0xff, 0x00 | 0x01 | 0xd0..=0xd8) => at += 2,
            // A segment with its length; what it holds (a thumbnail, say) may look like markers.
            (0xff, _) => match bytes.get(at + 2..at + 4) {
                Some(&[high, low]) => at += 2 + usize::from(u16::from_be_bytes([high, low])),
                _ => return false,
            },
            // Pixels.
            _ => at += 1,
        }
    }
    false
}

/// What a file that is no usable image seems to be, by its first bytes.
fn describe(bytes: &[u8]) -> &'static str {
    // (offset, bytes, name)
    const KNOWN: [(usize, &[u8], &str); 23] = [
        (0, b"GIF8", "a GIF image"),
        (4, b"ftypheic", HEIC),
        (4, b"ftypheix", HEIC),
        (4, b"ftypmif1", HEIC),
        (4, b"ftypmsf1", HEIC),
        (4, b"ftyphev", HEIC),
        (4, b"ftypheim", HEIC),
        (4, b"ftypheis", HEIC),
        (4, b"ftypavif", "an AVIF image"),
        (4, b"ftyp", "a video"),
        (0, b"\x1aE\xdf\xa3", "a video"),
        (0, b"\0\0\0\x0cJXL ", "a JPEG XL image"),
        (0, b"\xff\x0a", "a JPEG XL image"),
        (0, b"\0\0\0\x0cjP  ", "a JPEG 2000 image"),
        (0, b"8BPS", "a Photoshop file"),
        (0, b"\0\0\x01\0", "an icon"),
        (0, b"%PDF", "a PDF document"),
        (0, b"PK\x03\x04", "a ZIP archive"),
        (0, b"\x1f\x8b", "a gzip archive"),
        (0, b"version https://git-lfs", "a Git LFS pointer instead of the file"),
        (0, b"<svg", "an SVG drawing"),
        (0, b"<!DOCTYPE html", "a web page"),
        (0, b"<html", "a web page"),
    ];
    const HEIC: &str = "a HEIC image; export it from the phone or photo program as JPEG";
    if bytes.is_empty() {
        return "an empty file";
    }
    let known =
        KNOWN.iter().find(|(at, magic, _)| bytes.get(*at..).is_some_and(|rest| rest.starts_with(magic)));
    if let Some((_, _, name)) = known {
        return name;
    }
    let start = &bytes[..bytes.len().min(1024)];
    // The cut may go through a character.
    let text = match std::str::from_utf8(start) {
        Ok(_) => true,
        Err(e) => e.error_len().is_none(),
    };
    if text && !start.contains(&0) { "text" } else { "data of an unknown kind" }
}
