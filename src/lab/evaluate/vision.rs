//! What the towers that look at pictures have in common (transformers `CLIPVisionEmbeddings`, `ViTEmbeddings`,
//! `Dinov2Embeddings`): settings with their class's defaults, patches with positions, and pictures in batches.

use crate::data::image::RgbImage;
use crate::error::{Error, Result};
use crate::lab::evaluate::processor::Processor;
use crate::platform::host;
use crate::weights::bounds::{Transformer, out_of_range};
use crate::weights::part::Text;
use crate::weights::part::read_below;
use crate::weights::scope::Scope;
use serde::Deserialize;
use serde_json::Value;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// Longest side of a tower's pictures, in its config.
const MAX_SIDE: i64 = 2048;
/// Most patches of a picture: attention takes the square of it.
const MAX_PATCHES: i64 = 4096;
/// How many tokens go through a tower at once: some 20 pictures of ViT-S/16, or about 100 MB in ViT-L.
const TOKENS_AT_ONCE: i64 = 4096;
/// How many pixels: 50 MB.
const PIXELS_AT_ONCE: i64 = 1 << 22;

/// `config.json` of a tower's folder, which must be there.
pub fn config(dir: &Path) -> Result<(Value, Text)> {
    let text = read_below(dir, "config.json")?.ok_or_else(|| {
        let found = if dir.is_dir() { "a folder without it" } else { "no folder of this name" };
        Error::format(dir, format!("expected config.json of a Hugging Face folder, found {found}"))
    })?;
    let value: Value =
        serde_json::from_str(&text.content).map_err(|e| Error::format(&text.path, e.to_string()))?;
    Ok((value, text))
}

/// `given` on top of its class's defaults.
pub fn with_defaults(mut defaults: Value, given: &Value) -> Value {
    for (key, value) in given.as_object().into_iter().flatten() {
        defaults[key.as_str()] = value.clone();
    }
    defaults
}

/// The transformer and its division of pictures, with one of these activations. Errors: every problem.
pub fn sizes(settings: &Value, activations: &[&str]) -> std::result::Result<(Transformer, Division), String> {
    let transformer = Transformer::deserialize(settings).map_err(|e| e.to_string())?;
    let mut problems = transformer.problems();
    let activation = &settings["hidden_act"];
    if !activation.as_str().is_some_and(|name| activations.contains(&name)) {
        problems.push(format!("hidden_act: expected {}, found {activation}", activations.join(" or ")));
    }
    match Division::parse(settings) {
        Ok(division) if problems.is_empty() => return Ok((transformer, division)),
        Ok(_) => {}
        Err(more) => problems.extend(more),
    }
    Err(problems.join("\n"))
}

/// How a tower divides its pictures.
#[derive(Debug, Clone, Copy)]
pub struct Division {
    /// Height and width of the pictures that it was trained on.
    pub image: (i64, i64),
    /// Side of a patch.
    pub patch: i64,
}

impl Division {
    /// `image_size` and `patch_size`, each one number or two, and `num_channels`. Errors: every problem.
    fn parse(settings: &Value) -> std::result::Result<Self, Vec<String>> {
        let pair = |name: &str| {
            let value = &settings[name];
            let two = value.as_array().filter(|list| list.len() == 2);
            let sides = two.map_or((value.as_i64(), value.as_i64()), |l| (l[0].as_i64(), l[1].as_i64()));
            sides
                .0
                .zip(sides.1)
                .ok_or_else(|| vec![format!("{name}: expected a number or two, found {value}")])
        };
        let (image, patch) = (pair("image_size")?, pair("patch_size")?);
        if settings["num_channels"] != 3 {
            return Err(vec![format!("num_channels: expected 3, found {}", settings["num_channels"])]);
        }
        if patch.0 != patch.1 {
            return Err(vec![format!(
                "patch_size: expected square patches, found {}",
                settings["patch_size"]
            )]);
        }
        let (smaller, larger) = (image.0.min(image.1), image.0.max(image.1));
        let mut problems =
            out_of_range(&[("image_size", smaller, MAX_SIDE), ("image_size", larger, MAX_SIDE)]);
        problems.extend(out_of_range(&[("patch_size", patch.0, smaller.max(1))]));
        let division = Self { image, patch: patch.0 };
        if problems.is_empty() {
            problems.extend(out_of_range(&[("patches of a picture", division.count(), MAX_PATCHES)]));
        }
        if problems.is_empty() { Ok(division) } else { Err(problems) }
    }

    /// Rows and columns of patches in a picture of this height and width; what is left over is not looked at.
    fn grid(&self, (height, width): (i64, i64)) -> (i64, i64) {
        (height / self.patch, width / self.patch)
    }

    fn count(&self) -> i64 {
        let (rows, columns) = self.grid(self.image);
        rows * columns
    }
}

/// Pictures to tokens: patches through a linear map, a class token before them, positions added.
pub struct Patches {
    weight: Tensor,       // [d, 3, p, p]
    bias: Option<Tensor>, // [d]
    class: Tensor,        // [1, 1, d]
    positions: Tensor,    // [1, 1 + n, d]
    division: Division,
}

impl Patches {
    /// CLIP's, at its `embeddings`.
    pub fn clip(scope: &Scope, division: Division, width: i64) -> Self {
        let places = 1 + division.count();
        Self {
            weight: scope.tensor("patch_embedding.weight", &[width, 3, division.patch, division.patch]),
            bias: None,
            class: scope.tensor("class_embedding", &[width]).reshape([1, 1, width]),
            positions: scope.tensor("position_embedding.weight", &[places, width]).unsqueeze(0),
            division,
        }
    }

    /// DINO's or DINOv2's, at its `embeddings`.
    pub fn vit(scope: &Scope, division: Division, width: i64) -> Self {
        let projection = scope.at("patch_embeddings.projection");
        Self {
            weight: projection.tensor("weight", &[width, 3, division.patch, division.patch]),
            bias: Some(projection.tensor("bias", &[width])),
            class: scope.tensor("cls_token", &[1, 1, width]),
            positions: scope.tensor("position_embeddings", &[1, 1 + division.count(), width]),
            division,
        }
    }

    /// For pictures of this height and width: where they have another grid than those that the tower was trained on,
    /// positions between the trained ones, bicubic in f32 (`interpolate_pos_encoding`). Errors: what does not fit.
    pub fn fitted(mut self, size: (i64, i64)) -> std::result::Result<Self, String> {
        let (rows, columns) = self.division.grid(size);
        if !(1..=MAX_PATCHES).contains(&(rows * columns)) {
            let patch = self.division.patch;
            return Err(format!(
                "expected 1 to {MAX_PATCHES} patches of {patch} pixels, found {rows}x{columns} in {}x{} pixels",
                size.0, size.1
            ));
        }
        if (rows, columns) == self.division.grid(self.division.image) {
            return Ok(self);
        }
        let (count, width) = (self.division.count(), self.positions.size()[2]);
        let side = count.isqrt();
        if side * side != count {
            return Err(format!(
                "expected a square of positions to fill {rows}x{columns} patches from, found {count}"
            ));
        }
        let trained = self.positions.narrow(1, 1, count).reshape([1, side, side, width]);
        let between = trained.permute([0, 3, 1, 2]).upsample_bicubic2d([rows, columns], false, None, None); // [1, d, rows, columns]
        let between = between.permute([0, 2, 3, 1]).reshape([1, rows * columns, width]);
        self.positions = Tensor::cat(&[self.positions.narrow(1, 0, 1), between], 1);
        Ok(self)
    }

    /// Tokens of a picture.
    fn tokens(&self) -> i64 {
        self.positions.size()[1]
    }

    /// `(b, 3, h, w)` to `(b, 1 + n, d)`, the class token first.
    pub fn forward(&self, pixels: &Tensor) -> Tensor {
        let (b, _, h, w) = pixels.size4().unwrap_or_default();
        let p = self.division.patch;
        let (rows, columns) = self.division.grid((h, w));
        // A convolution whose stride is its width, as a product of matrices: cuDNN would round its inputs to TF32.
        let patches = pixels.narrow(2, 0, rows * p).narrow(3, 0, columns * p);
        let patches = patches.reshape([b, 3, rows, p, columns, p]).permute([0, 2, 4, 1, 3, 5]);
        let patches = patches.reshape([b, rows * columns, 3 * p * p]);
        let tokens = patches.linear(&self.weight.flatten(1, -1), self.bias.as_ref()); // [b, n, d]
        let class = self.class.expand([b, 1, -1], false);
        Tensor::cat(&[class, tokens], 1) + &self.positions
    }
}

/// What a tower looks through: from pictures to its tokens, and from what it makes of them to embeddings.
pub struct Eye {
    /// The tower's folder, for messages.
    pub dir: PathBuf,
    /// From pictures to pixels.
    pub processor: Processor,
    /// From pixels to tokens.
    pub patches: Patches,
    /// Numbers in an embedding.
    pub width: i64,
    /// Where the tower is.
    pub device: Device,
}

impl Eye {
    /// Unit embeddings `(b, d)`, f32, CPU: a few pictures at a time, so that memory does not grow with their number. `tower`
    /// makes `(b, d)` of tokens `(b, 1 + n, width)`.
    pub fn embed(&self, pictures: &[&RgbImage], tower: impl Fn(&Tensor) -> Tensor) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        let (height, width) = self.processor.size();
        let at_once = (TOKENS_AT_ONCE / self.patches.tokens()).min(PIXELS_AT_ONCE / (height * width)).max(1);
        let mut rows = vec![host::zeros(&[0, self.width], Kind::Float)];
        for some in pictures.chunks(at_once as usize) {
            let pixels = host::try_to_device(&self.processor.pixels(some)?, self.device)?;
            rows.push(unit_rows(&self.dir, &tower(&self.patches.forward(&pixels)))?);
        }
        Ok(Tensor::f_cat(&rows, 0)?)
    }
}

/// Rows `(b, d)` at length 1, f32, CPU. Errors: what has no direction.
pub fn unit_rows(dir: &Path, rows: &Tensor) -> Result<Tensor> {
    let rows = host::try_to_device(rows, host::CPU)?;
    let rows = &rows / rows.square().sum_dim_intlist([-1].as_slice(), true, Kind::Float).sqrt();
    if !host::all_finite(&rows) {
        return Err(Error::not_finite(format!(
            "{}: expected embeddings of finite numbers, found others",
            dir.display()
        ))
        .with_hint("are its weights whole?"));
    }
    Ok(rows)
}
