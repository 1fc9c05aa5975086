//! What a tower sees of a picture: `preprocessor_config.json`, or `image_processor` of `processor_config.json`, carried out as
//! transformers 5 does with its Pillow backend (`image_processing_backends.py`, `image_transforms.py`), to the same bit.
//!
//! In that order: resize, crop the middle, multiply, normalise. CLIP, ViT (DINO) and Bit (DINOv2) processors differ in their
//! defaults only, and in what a bare number for `size` means.

use crate::data::image::resize::short_side_size;
use crate::data::image::tensor::{self, PixelValues};
use crate::data::image::{Filter, RgbImage, resize};
use crate::error::{Error, Result};
use crate::weights::part::read_below;
use serde_json::{Map, Value, json};
use std::borrow::Cow;
use std::path::{Path, PathBuf};
use tch::Tensor;

/// Longest side of what a tower sees.
const MAX_SIDE: u32 = 2048;
/// Most pixels of a resized picture before it is cropped: only a very long and thin one comes near it.
const MAX_RESIZED: u64 = 1 << 26;

/// What a tower's folder says about its input.
#[derive(Debug, Clone)]
pub struct Processor {
    resize: Option<(ResizeTarget, Filter)>,
    crops: bool,
    /// What each of the 256 values becomes, for each channel.
    values: [PixelValues; 3],
    width: u32,
    height: u32,
}

/// The size after resizing.
#[derive(Debug, Clone, Copy)]
enum ResizeTarget {
    Exact { width: u32, height: u32 },
    ShortSide(u32),
}

impl Processor {
    /// Reads the processor of a tower's folder. Errors: a kind or setting that changes pixels in a way which is not known here,
    /// and settings under which pictures would keep different sizes.
    pub fn read(dir: &Path) -> Result<Self> {
        let (given, path) = settings(dir)?;
        let settings = ProcessorSettings { defaults: defaults(dir, &given, &path)?, given };
        Self::parse(&settings).map_err(|problem| Error::format(&path, problem))
    }

    fn parse(settings: &ProcessorSettings) -> std::result::Result<Self, String> {
        settings.refuse_unknown()?;
        let resize = match settings.flag("do_resize")? {
            true => Some((settings.target()?, settings.filter()?)),
            false => None,
        };
        let crops = settings.flag("do_center_crop")?;
        let (width, height) = match resize {
            _ if crops => settings.crop()?,
            Some((ResizeTarget::Exact { width, height }, _)) => (width, height),
            _ => {
                let expected =
                    "expected one size for all pictures: do_center_crop, or a size of height and width";
                return Err(format!("{expected}, found neither"));
            }
        };
        Ok(Self { resize, crops, values: settings.values()?, width, height })
    }

    /// Height and width of what comes out.
    pub fn size(&self) -> (i64, i64) {
        (i64::from(self.height), i64::from(self.width))
    }

    /// Pictures of any sizes to `(b, 3, h, w)`, f32, CPU. Errors: a picture without pixels, or one so long and thin that it
    /// would take too much memory when resized.
    pub fn pixels(&self, pictures: &[&RgbImage]) -> Result<Tensor> {
        let shown = |picture: &&RgbImage| Ok(tensor::mapped(&self.cut(picture)?, &self.values));
        let shown = pictures.iter().map(shown).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::f_cat(&shown, 0)?)
    }

    /// The pixels that a tower sees.
    fn cut(&self, picture: &RgbImage) -> Result<RgbImage> {
        let (width, height) = picture.dimensions();
        if width == 0 || height == 0 {
            return Err(Error::data(format!(
                "expected a picture with pixels, found one of {width}x{height}"
            )));
        }
        let resized = match self.resize {
            None => Cow::Borrowed(picture),
            Some((target, filter)) => {
                let (wide, high) = target.of(width, height).ok_or_else(|| {
                    Error::data(format!(
                        "expected a picture that is resized to {MAX_RESIZED} pixels at most, found one of \
                         {width}x{height}: too long and thin"
                    ))
                })?;
                Cow::Owned(resize(picture, wide, high, filter))
            }
        };
        let (width, height) = (i64::from(resized.width()), i64::from(resized.height()));
        // transformers' center_crop: the odd pixel of a cut goes from the right and below, that of padding comes to the left
        // and above; padding is black before it is normalised.
        let start = |length: i64, wanted: u32| match self.crops {
            true => (length - i64::from(wanted)).div_euclid(2),
            false => 0,
        };
        let (left, top) = (start(width, self.width), start(height, self.height));
        Ok(RgbImage::from_fn(self.width, self.height, |x, y| {
            let (x, y) = (i64::from(x) + left, i64::from(y) + top);
            let inside = (0..width).contains(&x) && (0..height).contains(&y);
            if inside { *resized.get_pixel(x as u32, y as u32) } else { [0; 3].into() }
        }))
    }
}

impl ResizeTarget {
    /// Width and height that a picture of this size gets, unless they are too large.
    fn of(self, width: u32, height: u32) -> Option<(u32, u32)> {
        match self {
            Self::Exact { width, height } => Some((width, height)),
            Self::ShortSide(short) => {
                let area =
                    u64::from(short).pow(2) * u64::from(width.max(height)) / u64::from(width.min(height));
                // transformers cuts the longer side off, as torchvision does.
                (area <= MAX_RESIZED).then(|| short_side_size(width, height, short))
            }
        }
    }
}

/// The settings of a folder and the file that they are in: `image_processor` of processor_config.json comes first.
fn settings(dir: &Path) -> Result<(Map<String, Value>, PathBuf)> {
    for (name, key) in
        [("processor_config.json", Some("image_processor")), ("preprocessor_config.json", None)]
    {
        let Some(text) = read_below(dir, name)? else { continue };
        let value: Value =
            serde_json::from_str(&text.content).map_err(|e| Error::format(&text.path, e.to_string()))?;
        match key.map_or(Some(&value), |key| value.get(key)) {
            None => {}
            Some(Value::Object(map)) => return Ok((map.clone(), text.path)),
            Some(other) => {
                return Err(Error::format(&text.path, format!("expected a JSON object, found {other}")));
            }
        }
    }
    Err(Error::format(dir, "expected preprocessor_config.json, found none")
        .with_hint("give a tower's whole folder, as it is on the Hugging Face hub"))
}

/// What a processor does where its file says nothing, by its kind; that of the model where there is none in the file.
fn defaults(dir: &Path, given: &Map<String, Value>, path: &Path) -> Result<Value> {
    let of_model = || -> Result<String> {
        let config: Value = match read_below(dir, "config.json")? {
            None => Value::Null,
            Some(text) => {
                serde_json::from_str(&text.content).map_err(|e| Error::format(&text.path, e.to_string()))?
            }
        };
        Ok(match config["model_type"].as_str() {
            Some("clip") => "CLIPImageProcessor",
            Some("vit") => "ViTImageProcessor",
            Some("dinov2") => "BitImageProcessor",
            _ => "none",
        }
        .to_string())
    };
    let named =
        ["image_processor_type", "feature_extractor_type"].iter().find_map(|key| given.get(*key)?.as_str());
    let name = match named {
        Some(name) => name.replace("FeatureExtractor", "ImageProcessor"),
        None => of_model()?,
    };
    // Suffixes of other backends of the same processor.
    let kind = name.trim_end_matches("Fast").trim_end_matches("Pil").trim_end_matches("ImageProcessor");
    let short_side = json!({
        "do_resize": true, "size": {"shortest_edge": 224}, "resample": 3, "default_to_square": false,
        "do_center_crop": true, "crop_size": {"height": 224, "width": 224},
        "do_rescale": true, "rescale_factor": 1.0 / 255.0, "do_normalize": true,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    });
    let square = json!({
        "do_resize": true, "size": {"height": 224, "width": 224}, "resample": 2, "default_to_square": true,
        "do_center_crop": false,
        "do_rescale": true, "rescale_factor": 1.0 / 255.0, "do_normalize": true,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    });
    match kind {
        "CLIP" | "Bit" => Ok(short_side),
        "ViT" => Ok(square),
        _ => Err(Error::format(
            path,
            format!(
                "image_processor_type: expected CLIPImageProcessor, ViTImageProcessor or BitImageProcessor, found {name}"
            ),
        )),
    }
}

struct ProcessorSettings {
    given: Map<String, Value>,
    defaults: Value,
}

type Problem<T> = std::result::Result<T, String>;

impl ProcessorSettings {
    /// A setting; `null` in the file counts, as it does in Python.
    fn get(&self, name: &str) -> &Value {
        self.given.get(name).unwrap_or(&self.defaults[name])
    }

    /// Refuses steps that are not known here.
    fn refuse_unknown(&self) -> Problem<()> {
        const KNOWN: [&str; 5] =
            ["do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"];
        let steps =
            self.given.iter().filter(|(name, _)| name.starts_with("do_") || *name == "use_square_size");
        let unknown = |(name, value): &(&String, &Value)| {
            !KNOWN.contains(&name.as_str()) && !value.is_null() && **value != Value::Bool(false)
        };
        steps.into_iter().find(unknown).map_or(Ok(()), |(name, value)| {
            Err(format!("{name}: expected no steps but {}, found {value}", KNOWN.join(", ")))
        })
    }

    fn flag(&self, name: &str) -> Problem<bool> {
        let value = self.get(name);
        let known = if value.is_null() { Some(false) } else { value.as_bool() };
        known.ok_or_else(|| format!("{name}: expected true or false, found {value}"))
    }

    fn number(&self, name: &str) -> Problem<f64> {
        let value = self.get(name);
        let in_f32 = |x: &f64| (*x as f32).is_finite();
        value.as_f64().filter(in_f32).ok_or_else(|| format!("{name}: expected a number, found {value}"))
    }

    fn target(&self) -> Problem<ResizeTarget> {
        let size = self.get("size");
        if let Some(number) = size.as_u64() {
            let side = side("size", Some(number), size)?;
            return Ok(match self.flag("default_to_square")? {
                true => ResizeTarget::Exact { width: side, height: side },
                false => ResizeTarget::ShortSide(side),
            });
        }
        let keys: Vec<&str> = size
            .as_object()
            .into_iter()
            .flatten()
            .filter(|(_, v)| !v.is_null())
            .map(|(k, _)| k.as_str())
            .collect();
        if keys == ["shortest_edge"] {
            return Ok(ResizeTarget::ShortSide(side("size", size["shortest_edge"].as_u64(), size)?));
        }
        let (width, height) = width_and_height("size", size)?;
        Ok(ResizeTarget::Exact { width, height })
    }

    fn crop(&self) -> Problem<(u32, u32)> {
        let size = self.get("crop_size");
        match size.as_u64() {
            Some(number) => side("crop_size", Some(number), size).map(|side| (side, side)),
            None => width_and_height("crop_size", size),
        }
    }

    /// Pillow's numbers of filters.
    fn filter(&self) -> Problem<Filter> {
        let value = self.get("resample");
        Ok(match value.as_u64() {
            Some(1) => Filter::Lanczos,
            Some(2) => Filter::Bilinear,
            Some(3) => Filter::Bicubic,
            Some(4) => Filter::Box,
            Some(5) => Filter::Hamming,
            _ => {
                return Err(format!(
                    "resample: expected 1 (Lanczos), 2 (bilinear), 3 (bicubic), 4 (box) or 5 (Hamming), found {value}"
                ));
            }
        })
    }

    /// What the 256 values become in each channel, in NumPy's precision: multiplied in f64, normalised in f32.
    fn values(&self) -> Problem<[PixelValues; 3]> {
        let factor = if self.flag("do_rescale")? { self.number("rescale_factor")? } else { 1.0 };
        let (mean, std) = match self.flag("do_normalize")? {
            true => (self.channels("image_mean")?, self.channels("image_std")?),
            false => ([0.0; 3], [1.0; 3]),
        };
        if std.contains(&0.0) {
            return Err(format!("image_std: expected numbers other than 0, found {}", self.get("image_std")));
        }
        let value = |i: usize, channel: usize| ((i as f64 * factor) as f32 - mean[channel]) / std[channel];
        Ok(std::array::from_fn(|channel| std::array::from_fn(|i| value(i, channel))))
    }

    /// A number for each channel, or one for all.
    fn channels(&self, name: &str) -> Problem<[f32; 3]> {
        let value = self.get(name);
        if value.is_number() {
            return Ok([self.number(name)? as f32; 3]);
        }
        let numbers: Option<Vec<f32>> =
            value.as_array().and_then(|list| list.iter().map(|v| v.as_f64().map(|x| x as f32)).collect());
        let three = numbers.and_then(|list| <[f32; 3]>::try_from(list).ok());
        let finite = three.filter(|list| list.iter().all(|x| x.is_finite()));
        finite.ok_or_else(|| format!("{name}: expected a number or three, found {value}"))
    }
}

/// `{"height": h, "width": w}` or `[h, w]`.
fn width_and_height(name: &str, size: &Value) -> Problem<(u32, u32)> {
    let pair = match size {
        Value::Array(list) if list.len() == 2 => Some((&list[1], &list[0])),
        Value::Object(map) if map.values().filter(|v| !v.is_null()).count() == 2 => {
            map.get("width").zip(map.get("height"))
        }
        _ => None,
    };
    let Some((width, height)) = pair else {
        let short = if name == "size" { " shortest_edge, or of" } else { "" };
        return Err(format!("{name}: expected a size of{short} height and width, found {size}"));
    };
    Ok((side(name, width.as_u64(), size)?, side(name, height.as_u64(), size)?))
}

fn side(name: &str, number: Option<u64>, found: &Value) -> Problem<u32> {
    let fits = number.and_then(|n| u32::try_from(n).ok()).filter(|n| (1..=MAX_SIDE).contains(n));
    fits.ok_or_else(|| format!("{name}: expected 1 to {MAX_SIDE} pixels, found {found}"))
}
