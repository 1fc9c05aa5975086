//! Pictures as 8-bit RGB pixels: reading, resizing, writing, contact sheets; `edges`, `palette` and `landmarks` make the
//! pictures that a model is conditioned on, `tensor` turns pictures into numbers. Knows nothing of training.
//!
//! What Python's training scripts do with Pillow is done here to the same bit, so that a run trains on the same pixels;
//! only lossy decoders differ in rounding (JPEG: by 0.02 to 0.15 levels on average, 5 at most).

pub mod background;
mod budget;
pub mod decode;
pub mod edges;
pub mod grid;
pub mod landmarks;
pub mod mask;
pub mod palette;
pub mod png;
pub mod resize;
pub mod tensor;

pub use ::image::RgbImage;
pub use background::Background;
pub use decode::load_rgb;
pub use edges::{Thresholds, canny};
pub use grid::{Grid, GridRow};
pub use mask::Mask;
pub use palette::{LabelMap, Palette};
pub use png::{read_png_text, save_png};
pub use resize::{Filter, center_crop, crop, resize, resize_nearest, resize_short_side};
