//! What Stable Diffusion XL is told of a picture's sizes (arXiv 2307.01952, section 2.2): how large it was, where it was cropped, how large
//! the result is to look.

/// Numbers of them.
pub const XL_NUMBERS: i64 = 6;

/// Sizes of one picture, height before width, top before left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PictureSizes {
    /// Before it was resized.
    pub original: [i64; 2],
    /// Where the crop lies in the resized picture.
    pub crop: [i64; 2],
    /// Of the crop.
    pub target: [i64; 2],
}

impl PictureSizes {
    /// Of a picture that is drawn at this height and width.
    pub fn whole(size: [i64; 2]) -> Self {
        Self { original: size, crop: [0, 0], target: size }
    }

    /// In the order of diffusers' `_get_add_time_ids`.
    pub fn numbers(&self) -> [f32; XL_NUMBERS as usize] {
        let [[a, b], [c, d], [e, f]] =
            [self.original, self.crop, self.target].map(|pair| pair.map(|n| n as f32));
        [a, b, c, d, e, f]
    }
}
