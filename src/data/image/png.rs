//! PNG files with their settings in text chunks (PNG specification, third edition, 11.3.3: tEXt and iTXt), and the checksums of
//! their chunks.
//!
//! Texts that fit Latin-1 go into tEXt, the chunk that every reader knows, others as UTF-8 into iTXt. Pillow shows both as
//! `Image.text`.

use std::io::Cursor;
use std::path::Path;

use ::image::RgbImage;
use ::png::text_metadata::{ITXtChunk, TEXtChunk};
use ::png::{BitDepth, ColorType, Decoder, Encoder, EncodingError};

use crate::platform::files;
use crate::{Error, Result};

/// The largest PNG file that [`read_png_text`] takes into memory.
const MAX_FILE_BYTES: u64 = 1 << 30;

/// The longest text of a chunk, unpacked.
const MAX_TEXT_BYTES: usize = 1 << 20;

/// Writes `image` and the texts (keyword, text) so that the file is there whole or not at all.
///
/// Keywords are 1 to 79 Latin-1 characters; neither they nor texts may hold a NUL character.
pub fn save_png(path: &Path, image: &RgbImage, text: &[(String, String)]) -> Result<()> {
    if let Some((keyword, _)) = text.iter().find(|(k, t)| k.contains('\0') || t.contains('\0')) {
        let keyword = keyword.escape_debug();
        return Err(Error::format(
            path,
            format!("expected PNG text without NUL characters, found one in \"{keyword}\""),
        ));
    }
    let bytes =
        encode(image, text).map_err(|e| Error::format(path, format!("cannot be made into a PNG: {e}")))?;
    files::write_atomic(path, &bytes)
}

fn encode(image: &RgbImage, text: &[(String, String)]) -> std::result::Result<Vec<u8>, EncodingError> {
    let mut bytes = Vec::new();
    let mut encoder = Encoder::new(&mut bytes, image.width(), image.height());
    encoder.set_color(ColorType::Rgb);
    encoder.set_depth(BitDepth::Eight);
    let mut writer = encoder.write_header()?;
    for (keyword, text) in text {
        if text.chars().all(|c| u32::from(c) < 256) {
            writer.write_text_chunk(&TEXtChunk::new(keyword, text))?;
        } else {
            writer.write_text_chunk(&ITXtChunk::new(keyword, text))?;
        }
    }
    writer.write_image_data(image)?;
    writer.finish()?;
    Ok(bytes)
}

/// Fails where a chunk's checksum is not that of its bytes (5.3 and 5.4 of the specification), as Pillow does. Decoders look at those of
/// chunks that pixels need and pass over others, and the way up would be lost without a word. What is cut off is theirs to tell.
pub(super) fn check_chunks(bytes: &[u8]) -> std::result::Result<(), String> {
    let mut rest = bytes.get(8..).unwrap_or_default();
    while let Some((length, body)) = rest.split_first_chunk::<4>() {
        let length = u32::from_be_bytes(*length) as usize;
        let (Some(kind), Some(sum)) = (body.get(..4), body.get(4 + length..8 + length)) else { break };
        if crc32fast::hash(&body[..4 + length]).to_be_bytes() != *sum {
            return Err(format!(
                "broken PNG image: the checksum of its chunk {} is wrong",
                kind.escape_ascii()
            ));
        }
        if kind == b"IEND" {
            break;
        }
        rest = &body[8 + length..];
    }
    Ok(())
}

/// The texts of a PNG file (keyword, text), before or after the pixels: first those in tEXt, then zTXt, then iTXt chunks.
pub fn read_png_text(path: &Path) -> Result<Vec<(String, String)>> {
    let bytes = files::read(path, MAX_FILE_BYTES)?;
    let broken = |e: ::png::DecodingError| Error::format(path, format!("expected a PNG image: {e}"));
    let mut decoder = Decoder::new(Cursor::new(bytes));
    decoder.set_ignore_iccp_chunk(true);
    let mut reader = decoder.read_info().map_err(broken)?;
    reader.finish().map_err(broken)?;
    let info = reader.info();
    let plain = info.uncompressed_latin1_text.iter().map(|c| Ok((c.keyword.clone(), c.text.clone())));
    // Unpacked with a limit first: a megabyte may unpack to a gigabyte.
    let packed = info.compressed_latin1_text.iter().cloned().map(|mut c| {
        c.decompress_text_with_limit(MAX_TEXT_BYTES)?;
        Ok((c.keyword.clone(), c.get_text()?))
    });
    let utf8 = info.utf8_text.iter().cloned().map(|mut c| {
        c.decompress_text_with_limit(MAX_TEXT_BYTES)?;
        Ok((c.keyword.clone(), c.get_text()?))
    });
    plain.chain(packed).chain(utf8).collect::<std::result::Result<_, _>>().map_err(broken)
}
