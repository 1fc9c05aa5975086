//! What a run is shown: a folder of pictures with one prompt, or pairs of picture and condition with captions.

use crate::data::image::RgbImage;
use crate::data::image::edges::may_be_edges;
use crate::data::image::tensor;
use crate::data::pairs::{ConditionKind, ConditionSource, PairFolder};
use crate::data::{Crop, ImageFolder, Window};
use crate::diffusion::picture_sizes::PictureSizes;
use crate::diffusion::stable_diffusion::StableDiffusion;
use crate::error::{Error, Result};
use crate::platform::observer::Observer;
use crate::train::config::TrainConfig;
use std::path::Path;
use tch::Tensor;

/// So many conditions are looked at.
const LOOKED_AT: usize = 8;

/// Pictures that were scanned.
pub enum Pictures {
    /// Of one prompt.
    Folder(ImageFolder),
    /// Each with a condition and a caption.
    Pairs(PairFolder),
}

impl Pictures {
    /// What `setting` names: pairs where control trains, a folder of pictures otherwise.
    pub fn read(config: &TrainConfig, setting: &str, path: &Path, observer: &dyn Observer) -> Result<Self> {
        if config.is_control() {
            return PairFolder::read(path, &config.data.pair_settings(), observer).map(Self::Pairs);
        }
        if !path.is_dir() {
            return Err(Error::data(format!(
                "{setting}: expected a folder of pictures, found {} at {}",
                if path.exists() { "a file" } else { "nothing" },
                path.display()
            ))
            .with_hint("paths are relative to the folder in which hra is started"));
        }
        ImageFolder::scan(path, config.data.background).map(Self::Folder)
    }

    /// The number of pictures.
    pub fn len(&self) -> usize {
        match self {
            Self::Folder(folder) => folder.images().len(),
            Self::Pairs(pairs) => pairs.pairs().len(),
        }
    }

    /// What the user is told of them.
    pub fn report(&self, resolution: u32) -> String {
        match self {
            Self::Folder(folder) => folder.report(resolution),
            Self::Pairs(pairs) => pairs.report(Some(resolution)),
        }
    }

    /// The square that `crop` chooses.
    pub fn crop_window(&self, index: usize, resolution: u32, crop: Crop) -> Window {
        match self {
            Self::Folder(folder) => folder.crop_window(index, resolution, crop),
            Self::Pairs(pairs) => pairs.crop_window(index, resolution, crop),
        }
    }

    /// What Stable Diffusion XL is told of a crop's sizes, as diffusers' `train_dreambooth_lora_sdxl.py` has them: of the picture before
    /// it was resized, where the crop lies after it, and of the crop.
    pub fn sizes(&self, index: usize, resolution: u32, window: Window) -> PictureSizes {
        let (width, height) = match self {
            Self::Folder(folder) => (folder.images()[index].width, folder.images()[index].height),
            Self::Pairs(pairs) => (pairs.pairs()[index].width, pairs.pairs()[index].height),
        };
        PictureSizes {
            original: [height, width].map(i64::from),
            crop: [window.y, window.x].map(i64::from),
            target: [i64::from(resolution); 2],
        }
    }

    /// How many different squares there are.
    pub fn window_count(&self, index: usize, resolution: u32) -> u64 {
        match self {
            Self::Folder(folder) => folder.window_count(index, resolution),
            Self::Pairs(pairs) => pairs.window_count(index, resolution),
        }
    }

    /// One crop, and its condition; `None` of a folder.
    pub fn prepare(
        &self,
        index: usize,
        resolution: u32,
        window: Window,
    ) -> Result<(RgbImage, Option<RgbImage>)> {
        match self {
            Self::Folder(folder) => Ok((folder.prepare(index, resolution, window)?, None)),
            Self::Pairs(pairs) => {
                let (picture, condition) = pairs.prepare(index, resolution, window)?;
                Ok((picture, Some(condition)))
            }
        }
    }

    /// Whether every picture has a condition.
    pub fn has_conditions(&self) -> bool {
        matches!(self, Self::Pairs(_))
    }

    /// Whether edges are made for some pair.
    pub fn makes_conditions(&self) -> bool {
        match self {
            Self::Folder(_) => false,
            Self::Pairs(pairs) => pairs.pairs().iter().any(|pair| pair.condition == ConditionSource::Made),
        }
    }

    /// Says so where conditions that should be edges are pictures of another kind, looking at the first few.
    pub fn warn_of_no_edges(
        &self,
        config: &TrainConfig,
        resolution: u32,
        observer: &dyn Observer,
    ) -> Result<()> {
        if config.data.condition != ConditionKind::Canny {
            return Ok(());
        }
        for i in 0..self.len().min(LOOKED_AT) {
            let window = self.crop_window(i, resolution, Crop::Center);
            if self.prepare(i, resolution, window)?.1.is_some_and(|condition| !may_be_edges(&condition)) {
                observer.warn(&format!(
                    "the condition of pair {} is no picture of edges (white on black)\nhint: --make_conditions makes edges of \
                     the pictures; --condition says what the conditions are",
                    i + 1
                ));
                return Ok(());
            }
        }
        Ok(())
    }

    /// The caption of a pair; `None` of a folder.
    pub fn caption(&self, index: usize) -> Option<&str> {
        match self {
            Self::Folder(_) => None,
            Self::Pairs(pairs) => Some(pairs.caption(index)),
        }
    }

    /// Caption and condition of a pair, the middle of it; `None` of a folder.
    pub fn shown(&self, index: usize, resolution: u32) -> Result<Option<(String, RgbImage)>> {
        let Self::Pairs(pairs) = self else { return Ok(None) };
        let window = pairs.crop_window(index, resolution, Crop::Center);
        let (_, condition) = pairs.prepare(index, resolution, window)?;
        Ok(Some((pairs.caption(index).to_string(), condition)))
    }
}

/// Mean and log-variance of the latents of a square picture, each `(1, c, h, w)`.
pub fn encode(model: &StableDiffusion, pixels: &RgbImage) -> (Tensor, Tensor) {
    model.vae.encode(&tensor::signed(pixels))
}
