//! The flags of `hra sample` for a picture to start from.

use crate::data::image::{Background, RgbImage, decode};
use crate::diffusion::sample::Start;
use crate::error::{Error, Result};
use crate::platform::observer::Observer;
use clap::Args;
use serde_json::{Value, json};
use std::path::PathBuf;

/// Image-to-image and inpainting.
#[derive(Debug, Args)]
#[command(next_help_heading = "Starting from a picture")]
pub struct StartArgs {
    /// Picture to start from; drawn at its own size, cut to whole latents, or stretched to --width and --height
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,
    /// Draw anew only where this picture is white (inpainting); it is stretched to the drawing's size. Where it is black, the
    /// pixels stay those of --image to the bit; --save-latents has the latents as they were drawn
    #[arg(long, alias = "mask-image", value_name = "FILE", requires = "image")]
    mask: Option<PathBuf>,
    /// How much is drawn anew, above 0 to 1: this part of --steps is taken [default: 0.8; with --mask 1]
    #[arg(long, value_name = "S", allow_negative_numbers = true)]
    strength: Option<f64>,
    /// Colour behind the transparent parts of --image: white, black, grey or #rrggbb
    #[arg(long, value_name = "COLOUR", default_value_t = Background::default(), requires = "image")]
    background: Background,
}

/// The pictures that the flags name, as they are in their files.
pub struct StartPictures<'a> {
    args: &'a StartArgs,
    image: RgbImage,
    mask: Option<RgbImage>,
}

impl StartArgs {
    /// Reads the files, if any are named.
    pub fn read(&self, observer: &dyn Observer) -> Result<Option<StartPictures<'_>>> {
        let Some(path) = &self.image else {
            return match self.strength {
                None => Ok(None),
                Some(s) => {
                    Err(Error::config("--strength: expected --image, a picture to start from, found none")
                        .with_hint(format!("an adapter's strength stands beside it: --adapter DIR={s}")))
                }
            };
        };
        let strength = self.strength();
        if !(strength > 0.0 && strength <= 1.0) {
            return Err(Error::config(format!(
                "--strength: expected a number above 0 and up to 1, found {strength}"
            )));
        }
        let image = decode::load(path, self.background)?;
        if image.transparent {
            observer.note(&format!("--image: transparent parts show {} (--background)", self.background));
        }
        let mask = self.mask.as_deref().map(decode::load_mask).transpose()?.map(|(mask, note)| {
            note.into_iter().for_each(|note| observer.note(&format!("--mask: {note}")));
            mask
        });
        if mask.as_ref().is_some_and(|mask| mask.iter().all(|v| *v == 255)) {
            observer.note("--mask: it is white everywhere: the whole picture is drawn anew");
        }
        Ok(Some(StartPictures { args: self, image: image.pixels, mask }))
    }

    /// The files that are read.
    pub fn files(&self) -> Vec<PathBuf> {
        self.image.iter().chain(&self.mask).cloned().collect()
    }

    fn strength(&self) -> f64 {
        self.strength.unwrap_or(if self.mask.is_some() { 1.0 } else { 0.8 })
    }

    /// For `--json`: null without a picture.
    pub fn to_json(&self) -> Value {
        let described = |image| json!({"image": image, "mask": self.mask, "strength": self.strength()});
        self.image.as_ref().map_or(Value::Null, described)
    }

    /// Adds the settings to a PNG's texts, and the strength to the line that A1111 reads.
    pub fn add_to(&self, text: &mut Vec<(String, String)>) {
        let Some(image) = &self.image else { return };
        for (_, line) in text.iter_mut().filter(|(key, _)| key == "parameters") {
            *line += &format!(", Denoising strength: {}", self.strength());
        }
        text.push(("image".into(), image.display().to_string()));
        text.push(("strength".into(), self.strength().to_string()));
        text.extend(self.mask.iter().map(|mask| ("mask".into(), mask.display().to_string())));
    }
}

impl StartPictures<'_> {
    /// Width and height of the picture, cut to multiples of `factor` pixels.
    pub fn size(&self, factor: i64) -> Result<[i64; 2]> {
        let size = [i64::from(self.image.width()), i64::from(self.image.height())];
        if size.iter().any(|side| *side < factor) {
            return Err(Error::config(format!(
                "--image: expected {factor} pixels or more on each side (one latent of this model), found {}x{}",
                size[0], size[1]
            )));
        }
        Ok(size.map(|side| side - side % factor))
    }

    /// What the drawing starts from, at `width` x `height` pixels.
    pub fn start(&self, width: i64, height: i64) -> Result<Start> {
        let size = (width as u32, height as u32);
        Start::new(&self.image, self.mask.as_ref(), self.args.strength(), size)
    }
}
