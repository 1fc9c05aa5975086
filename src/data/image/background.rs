//! What shows through the transparent parts of a picture: models know no transparency.

use ::image::{DynamicImage, RgbImage};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// The colour behind a picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Background(pub [u8; 3]);

impl Background {
    pub const WHITE: Self = Self([255; 3]);
    pub const BLACK: Self = Self([0; 3]);
    /// Those with a name.
    const NAMED: [(&'static str, Self); 3] =
        [("white", Self::WHITE), ("black", Self::BLACK), ("grey", Self([128; 3]))];

    /// `image` in front of this colour, at 8 bits a channel, and whether any of it was transparent. `None` for floating-point
    /// pixels, which have no agreed range.
    ///
    /// Values of 16 bits keep their high byte, then each is `(alpha v + (255 - alpha) background) / 255`, rounded: as Pillow's
    /// `Image.paste` with the alpha channel as mask.
    pub(super) fn behind(self, image: DynamicImage) -> Option<(RgbImage, bool)> {
        let (width, height) = (image.width(), image.height());
        let (bytes, transparent) = match image {
            DynamicImage::ImageRgb8(image) => return Some((image, false)),
            DynamicImage::ImageRgba8(image) => self.blend(&image, 4, |v| v),
            DynamicImage::ImageLuma8(image) => self.blend(&image, 1, |v| v),
            DynamicImage::ImageLumaA8(image) => self.blend(&image, 2, |v| v),
            DynamicImage::ImageRgb16(image) => self.blend(&image, 3, high_byte),
            DynamicImage::ImageRgba16(image) => self.blend(&image, 4, high_byte),
            DynamicImage::ImageLuma16(image) => self.blend(&image, 1, high_byte),
            DynamicImage::ImageLumaA16(image) => self.blend(&image, 2, high_byte),
            _ => return None,
        };
        Some((RgbImage::from_raw(width, height, bytes)?, transparent))
    }

    /// `samples` holds `channels` values a pixel: grey, grey and alpha, RGB, or RGB and alpha.
    fn blend<T: Copy>(self, samples: &[T], channels: usize, to_byte: impl Fn(T) -> u8) -> (Vec<u8>, bool) {
        let colours = if channels < 3 { [0, 0, 0] } else { [0, 1, 2] };
        let mut transparent = false;
        let pixel = |pixel: &[T]| {
            let alpha = if channels.is_multiple_of(2) { to_byte(pixel[channels - 1]) } else { u8::MAX };
            transparent |= alpha < u8::MAX;
            let alpha = u16::from(alpha);
            [0, 1, 2].map(|i| {
                let (value, behind) = (u16::from(to_byte(pixel[colours[i]])), u16::from(self.0[i]));
                // At most 255^2 + 127, which 16 bits hold.
                ((value * alpha + behind * (255 - alpha) + 127) / 255) as u8
            })
        };
        let bytes = samples.chunks_exact(channels).flat_map(pixel).collect();
        (bytes, transparent)
    }
}

fn high_byte(value: u16) -> u8 {
    (value >> 8) as u8
}

impl Default for Background {
    /// As in most programs that show pictures.
    fn default() -> Self {
        Self::WHITE
    }
}

impl fmt::Display for Background {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self([r, g, b]) = self;
        match Self::NAMED.iter().find(|(_, colour)| colour == self) {
            Some((name, _)) => f.write_str(name),
            None => write!(f, "#{r:02x}{g:02x}{b:02x}"),
        }
    }
}

impl FromStr for Background {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some((_, colour)) = Self::NAMED.iter().find(|(name, _)| *name == text) {
            return Ok(*colour);
        }
        let digits =
            text.strip_prefix('#').filter(|t| t.len() == 6 && t.bytes().all(|b| b.is_ascii_hexdigit()));
        let value = digits.and_then(|digits| u32::from_str_radix(digits, 16).ok());
        value.map(|v| Self([(v >> 16) as u8, (v >> 8) as u8, v as u8])).ok_or_else(|| {
            let names: Vec<&str> = Self::NAMED.iter().map(|(name, _)| *name).collect();
            format!("expected {} or #rrggbb, found `{text}`", names.join(", "))
        })
    }
}

impl From<Background> for String {
    fn from(background: Background) -> Self {
        background.to_string()
    }
}

impl TryFrom<String> for Background {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}
