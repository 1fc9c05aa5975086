//! Resizing with the 8-bit arithmetic of Pillow (src/libImaging/Resample.c), to the same bit, and the crops of torchvision
//! (transforms/functional.py) for PIL images.
//!
//! Each output pixel is a weighted mean of the input pixels under a filter. When an image shrinks, the filter is widened by
//! the ratio, which is what keeps fine texture from turning into noise (antialiasing). Rows are filtered first, then
//! columns, with 8-bit values in between; the other way round where a picture loses more than twice as many rows as columns
//! (Pillow 13; older ones differ there by some levels of 255). Weights are normalised in f64 and then rounded to 22 binary places.

use ::image::{RgbImage, imageops};
use std::borrow::Cow;

/// 32 bits, less 8 of the pixel, less 2 because the weights of a sharpening filter can sum to more than 1 on one side.
const PRECISION_BITS: u32 = 32 - 8 - 2;

const CHANNELS: usize = 3;

/// How input pixels are weighted, named as in Pillow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    /// All pixels under an output pixel count the same.
    Box,
    /// A triangle, two output pixels wide: what training scripts use.
    Bilinear,
    /// Sharper than bilinear at the same width.
    Hamming,
    /// Keys' cubic with a = -0.5: what CLIP's image processor uses.
    Bicubic,
    /// A sinc under a wider sinc, six output pixels wide.
    Lanczos,
}

impl Filter {
    /// Every filter with its name.
    pub const ALL: [(&'static str, Self); 5] = [
        ("box", Self::Box),
        ("bilinear", Self::Bilinear),
        ("hamming", Self::Hamming),
        ("bicubic", Self::Bicubic),
        ("lanczos", Self::Lanczos),
    ];

    /// Half the width of the filter, in output pixels.
    fn support(self) -> f64 {
        match self {
            Self::Box => 0.5,
            Self::Bilinear | Self::Hamming => 1.0,
            Self::Bicubic => 2.0,
            Self::Lanczos => 3.0,
        }
    }

    /// Height of the filter at `x` output pixels from its middle.
    fn at(self, x: f64) -> f64 {
        let r = x.abs();
        match self {
            // Half open, so that a pixel on the border of two output pixels counts once.
            Self::Box => f64::from(u8::from(-0.5 < x && x <= 0.5)),
            Self::Bilinear => (1.0 - r).max(0.0),
            Self::Hamming if r == 0.0 => 1.0,
            Self::Hamming if r >= 1.0 => 0.0,
            Self::Hamming => sinc(r) * (0.54 + 0.46 * (r * std::f64::consts::PI).cos()),
            Self::Bicubic => keys_cubic(r),
            Self::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            Self::Lanczos => 0.0,
        }
    }
}

/// R. Keys 1981, "Cubic convolution interpolation for digital image processing", eq. (15), a = -1/2.
fn keys_cubic(r: f64) -> f64 {
    const A: f64 = -0.5;
    if r < 1.0 {
        ((A + 2.0) * r - (A + 3.0)) * r * r + 1.0
    } else if r < 2.0 {
        (((r - 5.0) * r + 8.0) * r - 4.0) * A
    } else {
        0.0
    }
}

fn sinc(x: f64) -> f64 {
    if x == 0.0 {
        return 1.0;
    }
    let angle = x * std::f64::consts::PI;
    angle.sin() / angle
}

/// The input pixels that one output pixel is made of: `weights` belong to `first, first + 1, ..`.
struct FilterWindow {
    first: usize,
    weights: Vec<i32>,
}

/// One window for each of `output` pixels along an axis of `input` pixels. The order of the operations is Pillow's: another
/// one rounds differently.
fn windows(input: usize, output: usize, filter: Filter) -> Vec<FilterWindow> {
    let scale = input as f64 / output as f64;
    let widening = scale.max(1.0);
    let support = filter.support() * widening;
    let inverse = 1.0 / widening;
    (0..output)
        .map(|i| {
            let center = (i as f64 + 0.5) * scale;
            // `as` cuts off towards zero and takes negative numbers to 0.
            let first = (center - support + 0.5) as usize;
            let end = ((center + support + 0.5) as usize).min(input);
            let raw: Vec<f64> =
                (first..end).map(|j| filter.at((j as f64 - center + 0.5) * inverse)).collect();
            let sum: f64 = raw.iter().sum();
            let weights = raw.iter().map(|w| to_fixed(if sum == 0.0 { *w } else { w / sum })).collect();
            FilterWindow { first, weights }
        })
        .collect()
}

/// Rounds half away from zero, as adding a signed half and cutting off does.
fn to_fixed(weight: f64) -> i32 {
    let scaled = weight * f64::from(1 << PRECISION_BITS);
    (if weight < 0.0 { scaled - 0.5 } else { scaled + 0.5 }) as i32
}

/// From fixed point to a pixel; the half that rounds is in the sum already.
fn clip8(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

const HALF: i32 = 1 << (PRECISION_BITS - 1);

/// `image` at `width` x `height` pixels, as Pillow's `Image.resize((width, height), filter)` makes it.
///
/// # Panics
/// If one of the four sides is 0.
pub fn resize(image: &RgbImage, width: u32, height: u32, filter: Filter) -> RgbImage {
    let (from_width, from_height) = image.dimensions();
    assert!(width > 0 && height > 0 && from_width > 0 && from_height > 0, "resize needs pixels to work with");
    // An axis that keeps its size is left alone: Pillow does the same.
    let lost = |from: u32, to: u32| i64::from(from) - i64::from(to);
    let columns_first = lost(from_height, height) > 0.max(2 * lost(from_width, width));
    let mut image = Cow::Borrowed(image);
    for columns in [columns_first, !columns_first] {
        if columns && height != from_height {
            image = Cow::Owned(resize_columns(&image, height, filter));
        } else if !columns && width != from_width {
            image = Cow::Owned(resize_rows(&image, width, filter));
        }
    }
    image.into_owned()
}

fn resize_rows(image: &RgbImage, width: u32, filter: Filter) -> RgbImage {
    let windows = windows(image.width() as usize, width as usize, filter);
    let mut out = RgbImage::new(width, image.height());
    let in_row = image.width() as usize * CHANNELS;
    let out_row = width as usize * CHANNELS;
    for (from, to) in image.chunks_exact(in_row).zip(out.chunks_exact_mut(out_row)) {
        for (window, pixel) in windows.iter().zip(to.chunks_exact_mut(CHANNELS)) {
            let mut sums = [HALF; CHANNELS];
            let inputs = from[window.first * CHANNELS..].chunks_exact(CHANNELS);
            for (weight, input) in window.weights.iter().zip(inputs) {
                for (sum, value) in sums.iter_mut().zip(input) {
                    *sum += weight * i32::from(*value);
                }
            }
            for (out, sum) in pixel.iter_mut().zip(sums) {
                *out = clip8(sum);
            }
        }
    }
    out
}

fn resize_columns(image: &RgbImage, height: u32, filter: Filter) -> RgbImage {
    let windows = windows(image.height() as usize, height as usize, filter);
    let mut out = RgbImage::new(image.width(), height);
    let row = image.width() as usize * CHANNELS;
    let mut sums = vec![HALF; row];
    for (window, to) in windows.iter().zip(out.chunks_exact_mut(row)) {
        sums.fill(HALF);
        for (weight, from) in
            window.weights.iter().zip(image.as_raw()[window.first * row..].chunks_exact(row))
        {
            for (sum, value) in sums.iter_mut().zip(from) {
                *sum += weight * i32::from(*value);
            }
        }
        for (out, sum) in to.iter_mut().zip(&sums) {
            *out = clip8(*sum);
        }
    }
    out
}

/// `image` at `width` x `height` pixels, each the pixel under its middle: Pillow's `NEAREST`. For maps whose colours are
/// classes, which a mean would turn into colours of no class.
///
/// # Panics
/// If one of the four sides is 0.
pub fn resize_nearest(image: &RgbImage, width: u32, height: u32) -> RgbImage {
    let (from_width, from_height) = image.dimensions();
    assert!(width > 0 && height > 0 && from_width > 0 && from_height > 0, "resize needs pixels to work with");
    let [columns, rows] = [(from_width, width), (from_height, height)].map(|(from, to)| middles(from, to));
    RgbImage::from_fn(width, height, |x, y| *image.get_pixel(columns[x as usize], rows[y as usize]))
}

/// The input pixel under the middle of each output pixel. The place is summed up in f64, as Pillow does (ImagingScaleAffine
/// in Geometry.c): exact fractions fall on the other pixel now and then.
fn middles(from: u32, to: u32) -> Vec<u32> {
    let step = f64::from(from) / f64::from(to);
    let mut place = step * 0.5;
    let next = |_| {
        let middle = (place as u32).min(from - 1);
        place += step;
        middle
    };
    (0..to).map(next).collect()
}

/// The size at which the shorter side is `short`, as torchvision's `Resize(short)` reckons it: the longer side is cut off,
/// not rounded.
///
/// # Panics
/// If a side is 0.
pub fn short_side_size(width: u32, height: u32, short: u32) -> (u32, u32) {
    assert!(width > 0 && height > 0, "an image has pixels");
    let long = |long: u32, by: u32| (u64::from(short) * u64::from(long) / u64::from(by)) as u32;
    if width <= height { (short, long(height, width)) } else { (long(width, height), short) }
}

/// `image` with its shorter side at `short` pixels, as torchvision's `Resize(short)` does on PIL images.
///
/// # Panics
/// If a side or `short` is 0.
pub fn resize_short_side(image: &RgbImage, short: u32, filter: Filter) -> RgbImage {
    let (width, height) = short_side_size(image.width(), image.height(), short);
    resize(image, width, height, filter)
}

/// Where torchvision's `CenterCrop(size)` starts on an axis of `length >= size` pixels: half the rest, a half rounded to even
/// (Python's `round`).
pub fn center_offset(length: u32, size: u32) -> u32 {
    (f64::from(length - size) / 2.0).round_ties_even() as u32
}

/// The middle `size` x `size` pixels, as torchvision's `CenterCrop(size)`: an image that is smaller is first put on black,
/// the odd pixel of padding to the right and below.
pub fn center_crop(image: &RgbImage, size: u32) -> RgbImage {
    let (width, height) = image.dimensions();
    if width >= size && height >= size {
        return crop(image, center_offset(width, size), center_offset(height, size), size);
    }
    let (wide, high) = (width.max(size), height.max(size));
    let mut padded = RgbImage::new(wide, high);
    imageops::replace(&mut padded, image, i64::from((wide - width) / 2), i64::from((high - height) / 2));
    crop(&padded, center_offset(wide, size), center_offset(high, size), size)
}

/// The `size` x `size` pixels with their upper left corner at column `x`, row `y`.
///
/// # Panics
/// If they do not lie within the image.
pub fn crop(image: &RgbImage, x: u32, y: u32, size: u32) -> RgbImage {
    let inside = |at: u32, length: u32| at.checked_add(size).is_some_and(|end| end <= length);
    assert!(inside(x, image.width()) && inside(y, image.height()), "a crop lies within its image");
    imageops::crop_imm(image, x, y, size, size).to_image()
}

/// The least size of a `width` x `height` picture that covers `to`, a width and a height, with its aspect; for a square that of
/// [`short_side_size`].
///
/// # Panics
/// If a side is 0.
pub fn covering_size((width, height): (u32, u32), to: (u32, u32)) -> (u32, u32) {
    assert!(width > 0 && height > 0, "an image has pixels");
    let [width, height, wide, high] = [width, height, to.0, to.1].map(u64::from);
    // The axis that fits decides, and the other one has at least as many pixels as are wanted.
    if wide * height >= high * width {
        (to.0, (height * wide / width) as u32)
    } else {
        ((width * high / height) as u32, to.1)
    }
}

/// `image` resized until it covers `to`, a width and a height, and the middle of that cut out.
///
/// # Panics
/// If a side is 0.
pub fn resize_covering(image: &RgbImage, to: (u32, u32), filter: Filter) -> RgbImage {
    let (wide, high) = covering_size(image.dimensions(), to);
    let resized = resize(image, wide, high, filter);
    let (x, y) = (center_offset(wide, to.0), center_offset(high, to.1));
    imageops::crop_imm(&resized, x, y, to.0, to.1).to_image()
}

/// [`resize_covering`] for `size.0` x `size.1` values that must not be blended, row by row from the top: each new one is that
/// under its middle, as Pillow's NEAREST.
///
/// # Panics
/// If a side is 0, or the values have not that size.
pub fn nearest_covering<T: Copy>(values: &[T], size: (u32, u32), to: (u32, u32)) -> Vec<T> {
    let (width, height) = size;
    assert_eq!(values.len(), width as usize * height as usize, "values of the size that is said");
    let (wide, high) = covering_size(size, to);
    let taken = |old: u32, new: u32, shown: u32| {
        let start = center_offset(new, shown) as usize;
        middles(old, new).into_iter().skip(start).take(shown as usize).map(|at| at as usize)
    };
    let columns: Vec<usize> = taken(width, wide, to.0).collect();
    let rows = taken(height, high, to.1).map(|y| y * width as usize);
    rows.flat_map(|row| columns.iter().map(move |column| values[row + column])).collect()
}
