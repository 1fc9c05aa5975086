//! Pictures and masks as tensors on the host: f32, channel by channel, rows from the top.

use ::image::RgbImage;
use tch::{Kind, Tensor};

use crate::data::image::mask::Mask;
use crate::platform::host;

/// What each of the 256 values of a channel becomes.
pub type PixelValues = [f32; 256];

/// A picture as `(1, 3, h, w)`, each value as its channel's levels say.
pub fn mapped(image: &RgbImage, levels: &[PixelValues; 3]) -> Tensor {
    let (width, height) = image.dimensions();
    let channel = |c: usize| image.pixels().map(move |pixel| levels[c][usize::from(pixel.0[c])]);
    let values: Vec<f32> = (0..3).flat_map(channel).collect();
    host::tensor(&values).view([1, 3, i64::from(height), i64::from(width)])
}

/// A picture as `(1, 3, h, w)`, black 0 and white 1: torchvision's `ToTensor`, to the same bit.
pub fn unit(image: &RgbImage) -> Tensor {
    mapped(image, &[std::array::from_fn(|v| v as f32 / 255.0); 3])
}

/// A picture as `(1, 3, h, w)`, black -1 and white 1: torchvision's `ToTensor` and `Normalize([0.5], [0.5])`, to the same bit.
pub fn signed(image: &RgbImage) -> Tensor {
    mapped(image, &[std::array::from_fn(|v| (v as f32 / 255.0 - 0.5) / 0.5); 3])
}

/// A mask as `(1, 1, h, w)`, 1 where yes and 0 elsewhere.
pub fn of_mask(mask: &Mask) -> Tensor {
    let (width, height) = mask.dimensions();
    host::tensor(mask.pixels()).to_kind(Kind::Float).view([1, 1, i64::from(height), i64::from(width)])
}
