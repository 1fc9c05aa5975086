//! Edges by Canny's method, as OpenCV's `cv2.Canny(image, low, high)` (modules/imgproc/src/canny.cpp of 4.x) finds them with
//! its default 3 x 3 Sobel kernel and `L2gradient=False`: every pixel is the same.
//!
//! The gradient of a pixel is that of its channel with the largest |dx| + |dy|; of equal ones the first of blue, green, red,
//! which is the order in which `cv2.imread` gives them. A pixel is kept where that magnitude is the largest across the edge,
//! and is an edge above `high`, or above `low` if a chain of kept neighbours leads to one above `high`.

use ::image::RgbImage;
use serde::{Deserialize, Serialize};

use crate::data::image::mask::Mask;

/// OpenCV's order of channels, as places in ours.
const BGR: [usize; 3] = [2, 1, 0];
/// tan 22.5 degrees with [`TAN_BITS`] binary places: 0.4142 2^15.
const TAN_22: i32 = 13573;
const TAN_BITS: i32 = 15;

/// Magnitudes of gradients, 0 to [`Self::MAX`], between which a pixel is an edge only beside a stronger one.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Thresholds {
    /// What is not above it is no edge.
    pub low: f64,
    /// What is above it is an edge.
    pub high: f64,
}

impl Thresholds {
    /// No gradient is larger: |dx| and |dy| reach 4 x 255.
    pub const MAX: f64 = 2040.0;

    /// Whether `0 <= low <= high <= MAX`, which settings and flags must keep.
    pub fn are_possible(self) -> bool {
        0.0 <= self.low && self.low <= self.high && self.high <= Self::MAX
    }
}

impl Default for Thresholds {
    /// 100 and 200, as the HRA authors' eval_canny.py.
    fn default() -> Self {
        Self { low: 100.0, high: 200.0 }
    }
}

/// Gradient of the picture's brightness at one pixel. Each part is at most 4 x 255, and a picture may have many pixels.
#[derive(Clone, Copy, Default)]
struct Gradient {
    dx: i16,
    dy: i16,
}

impl Gradient {
    /// |dx| + |dy|.
    fn magnitude(self) -> i32 {
        i32::from(self.dx.abs()) + i32::from(self.dy.abs())
    }
}

/// What is known of a pixel.
#[derive(Clone, Copy, PartialEq)]
enum EdgeState {
    No,
    /// An edge if it touches one.
    Weak,
    Edge,
}

/// The edges of `image`. Thresholds are rounded down and the smaller one is the lower, as in OpenCV.
pub fn canny(image: &RgbImage, thresholds: Thresholds) -> Mask {
    let (width, height) = (image.width() as usize, image.height() as usize);
    let floor = |threshold: f64| threshold.floor() as i32;
    let (low, high) =
        (floor(thresholds.low.min(thresholds.high)), floor(thresholds.low.max(thresholds.high)));
    let gradients = gradients(image);
    let mut states = vec![EdgeState::No; width * height];
    let mut strong = Vec::new();
    for y in 0..height {
        for x in 0..width {
            let at = y * width + x;
            let gradient = gradients[at];
            // No magnitude counts outside the picture.
            let magnitude = |dx: isize, dy: isize| {
                let (x, y) = (x.checked_add_signed(dx), y.checked_add_signed(dy));
                let inside = x.filter(|x| *x < width).zip(y.filter(|y| *y < height));
                inside.map_or(0, |(x, y)| gradients[y * width + x].magnitude())
            };
            if gradient.magnitude() <= low || !is_ridge(gradient, magnitude) {
                continue;
            }
            if gradient.magnitude() > high {
                states[at] = EdgeState::Edge;
                strong.push(at);
            } else {
                states[at] = EdgeState::Weak;
            }
        }
    }
    drop(gradients);
    while let Some(at) = strong.pop() {
        let (x, y) = (at % width, at / width);
        for y in y.saturating_sub(1)..(y + 2).min(height) {
            for x in x.saturating_sub(1)..(x + 2).min(width) {
                let neighbour = y * width + x;
                if states[neighbour] == EdgeState::Weak {
                    states[neighbour] = EdgeState::Edge;
                    strong.push(neighbour);
                }
            }
        }
    }
    let edges = states.iter().map(|state| *state == EdgeState::Edge).collect();
    Mask::new(image.width(), image.height(), edges)
}

/// Whether the magnitude is the largest of the three across the edge; `neighbour` gives that of the pixel so many columns and
/// rows away. Of two equal ones beside each other the left or upper one is kept, on a diagonal none, as in OpenCV.
fn is_ridge(gradient: Gradient, neighbour: impl Fn(isize, isize) -> i32) -> bool {
    let (dx, dy, magnitude) = (i32::from(gradient.dx), i32::from(gradient.dy), gradient.magnitude());
    let y = dy.abs() << TAN_BITS;
    let tan_22_x = dx.abs() * TAN_22;
    // tan 67.5 = tan 22.5 + 2.
    let tan_67_x = tan_22_x + (dx.abs() << (TAN_BITS + 1));
    if y < tan_22_x {
        magnitude > neighbour(-1, 0) && magnitude >= neighbour(1, 0)
    } else if y > tan_67_x {
        magnitude > neighbour(0, -1) && magnitude >= neighbour(0, 1)
    } else {
        let side = if (dx ^ dy) < 0 { -1 } else { 1 };
        magnitude > neighbour(-side, -1) && magnitude > neighbour(side, 1)
    }
}

/// 3 x 3 Sobel gradients, pixels beyond the border as those on it, of each pixel's steepest channel.
fn gradients(image: &RgbImage) -> Vec<Gradient> {
    let (width, height) = (image.width() as usize, image.height() as usize);
    let values = image.as_raw();
    let mut gradients = Vec::with_capacity(width * height);
    for y in 0..height {
        let rows = [y.saturating_sub(1), y, (y + 1).min(height - 1)];
        for x in 0..width {
            let columns = [x.saturating_sub(1), x, (x + 1).min(width - 1)];
            let mut steepest = Gradient::default();
            for channel in BGR {
                let value = |row: usize, column: usize| {
                    i32::from(values[(rows[row] * width + columns[column]) * 3 + channel])
                };
                let column = |c: usize| value(0, c) + 2 * value(1, c) + value(2, c);
                let row = |r: usize| value(r, 0) + 2 * value(r, 1) + value(r, 2);
                let (dx, dy) = (column(2) - column(0), row(2) - row(0));
                let magnitude = dx.abs() + dy.abs();
                if magnitude > steepest.magnitude() {
                    steepest = Gradient { dx: dx as i16, dy: dy as i16 };
                }
            }
            gradients.push(steepest);
        }
    }
    gradients
}

/// Whether a picture may be one of edges: grey, and for the most part black.
pub fn may_be_edges(image: &RgbImage) -> bool {
    let (mut grey, mut black) = (0, 0);
    for pixel in image.pixels() {
        let [r, g, b] = pixel.0;
        grey += usize::from(r.abs_diff(g).max(g.abs_diff(b)) <= 8);
        black += usize::from(r.max(g).max(b) < 64);
    }
    let total = image.pixels().len();
    100 * grey >= 99 * total && 2 * black >= total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_lie_where_gradients_do_and_the_lower_comes_first() {
        let possible = |low, high| Thresholds { low, high }.are_possible();
        assert!(possible(0.0, 0.0) && possible(100.0, 200.0) && possible(2040.0, 2040.0));
        assert!(!possible(200.0, 100.0) && !possible(-1.0, 100.0) && !possible(100.0, 2041.0));
        assert!(!possible(f64::NAN, 100.0) && !possible(100.0, f64::NAN));
    }
}
