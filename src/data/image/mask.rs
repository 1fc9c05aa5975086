//! Yes or no for each pixel: edges, or where the subject is.

use ::image::{Rgb, RgbImage};

use crate::data::image::resize::nearest_covering;

/// A picture of yes and no.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mask {
    width: u32,
    height: u32,
    /// Rows from the top.
    pixels: Vec<bool>,
}

impl Mask {
    /// `pixels` row by row from the top.
    ///
    /// # Panics
    /// If they are not `width` x `height`.
    pub fn new(width: u32, height: u32, pixels: Vec<bool>) -> Self {
        assert_eq!(pixels.len(), width as usize * height as usize, "a mask has its size");
        Self { width, height, pixels }
    }

    /// Yes where `is_in` says so of a pixel of `image`.
    pub fn of(image: &RgbImage, is_in: impl Fn([u8; 3]) -> bool) -> Self {
        Self::new(image.width(), image.height(), image.pixels().map(|pixel| is_in(pixel.0)).collect())
    }

    /// Width and height in pixels.
    pub fn dimensions(&self) -> (u32, u32) {
        (self.width, self.height)
    }

    /// Row by row from the top.
    pub fn pixels(&self) -> &[bool] {
        &self.pixels
    }

    /// How many pixels are yes.
    pub fn count(&self) -> usize {
        self.pixels.iter().filter(|yes| **yes).count()
    }

    /// The mask of a picture that is resized until it covers `width` x `height` and whose middle is cut out; the nearest pixels'.
    pub fn covering(&self, width: u32, height: u32) -> Self {
        let pixels = nearest_covering(&self.pixels, (self.width, self.height), (width, height));
        Self::new(width, height, pixels)
    }

    /// White where yes, black elsewhere.
    pub fn to_rgb(&self) -> RgbImage {
        RgbImage::from_fn(self.width, self.height, |x, y| {
            Rgb([if self.pixels[(y * self.width + x) as usize] { 255 } else { 0 }; 3])
        })
    }
}
