//! CLIP's two towers with their projections (transformers `CLIPModel`, `modeling_clip.py`), of any size: CLIP-I compares
//! pictures with pictures, CLIP-T pictures with texts (Ruiz et al. 2022, "DreamBooth", section 4.2).

use crate::data::image::RgbImage;
use crate::error::{Error, Result};
use crate::lab::evaluate::processor::Processor;
use crate::lab::evaluate::vision::{self, Division, Eye, Patches};
use crate::model::attention::Sees;
use crate::model::layers::{Layer, Norm};
use crate::model::text::encoder::{EncoderLayer, LayerSizes};
use crate::model::text::{TextEncoder, Tokenizer};
use crate::platform::host;
use crate::weights::bounds::MAX_WIDTH;
use crate::weights::config::TextConfig;
use crate::weights::part::Text;
use crate::weights::scope::Weights;
use serde_json::{Value, json};
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// Texts that go through the tower at once.
const TEXTS_AT_ONCE: usize = 32;

/// CLIP's two towers with their projections.
pub struct Clip {
    text: TextEncoder,
    text_projection: Layer,
    tokenizer: Tokenizer,
    end: End,
    eye: Eye,
    pre_layrnorm: Norm,
    layers: Vec<EncoderLayer>,
    post_layernorm: Norm,
    visual_projection: Layer,
}

/// Which token's state stands for a text.
#[derive(Debug, Clone, Copy)]
enum End {
    /// The first one with this id.
    Id(i64),
    /// The first one with the largest id: configs from before the id was written down say 2.
    Largest,
}

impl Clip {
    /// Loads a Hugging Face folder of a `CLIPModel` with processor and tokenizer. Everything is computed in f32. Errors: every
    /// problem of a file at once.
    pub fn load(dir: &Path, device: Device) -> Result<Self> {
        let _guard = tch::no_grad_guard();
        let config = ClipTowerConfig::read(dir)?;
        let processor = Processor::read(dir)?;
        if processor.size() != config.division.image {
            let ((height, width), (h, w)) = (config.division.image, processor.size());
            return Err(Error::format(
                dir,
                format!(
                    "expected a processor that gives the {height}x{width} pixels of config.json's image_size, found \
                     one that gives {h}x{w}"
                ),
            ));
        }
        let weights = Weights::in_folder(dir, "model", Kind::Float.into(), device)?;
        let (root, width) = (weights.root(), config.vision.width);
        let vision = root.at("vision_model");
        let norm = |name: &str| Norm::layer(&vision.at(name), width, config.vision.eps);
        let patches = Patches::clip(&vision.at("embeddings"), config.division, width);
        let (pre_layrnorm, post_layernorm) = (norm("pre_layrnorm"), norm("post_layernorm"));
        let layer = |i| EncoderLayer::new(&vision.at("encoder.layers").at(i), config.vision);
        let layers = (0..config.vision_layers).map(layer).collect();
        let project = |name: &str, from: i64| Layer::linear(&root.at(name), from, config.projection, false);
        let visual_projection = project("visual_projection", width);
        let text_projection = project("text_projection", config.text.hidden_size);
        let text = TextEncoder::new(&root.at("text_model"), &config.text, device);
        weights.finish()?;
        let patches = patches.fitted(processor.size()).map_err(|problem| Error::format(dir, problem))?;
        let tokenizer = Tokenizer::in_folder(dir, text.length() as usize)?;
        check_tokenizer(dir, &tokenizer, &config)?;
        let eye = Eye { dir: dir.to_path_buf(), processor, patches, width: config.projection, device };
        Ok(Self {
            text,
            text_projection,
            tokenizer,
            end: config.end,
            eye,
            pre_layrnorm,
            layers,
            post_layernorm,
            visual_projection,
        })
    }

    /// Unit embeddings `(b, d)`, f32, CPU.
    pub fn images(&self, pictures: &[&RgbImage]) -> Result<Tensor> {
        self.eye.embed(pictures, |tokens| {
            let mut x = self.pre_layrnorm.forward(tokens);
            for layer in &self.layers {
                x = layer.forward(&x, Sees::All);
            }
            self.visual_projection.forward(&self.post_layernorm.forward(&x.select(1, 0)))
        })
    }

    /// Unit embeddings `(b, d)`, f32, CPU. A text that is longer than the tower is cut before its end token.
    pub fn texts(&self, texts: &[&str]) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        let mut rows = vec![host::zeros(&[0, self.eye.width], Kind::Float)];
        for some in texts.chunks(TEXTS_AT_ONCE) {
            let encoded: Result<Vec<Vec<i64>>> =
                some.iter().map(|text| Ok(self.tokenizer.encode(text)?.0)).collect();
            let encoded = encoded?;
            let ends: Vec<i64> = encoded.iter().map(|ids| self.end.place(ids)).collect();
            let ids = host::rows(&encoded);
            let states = self.text.forward(&ids); // [b, n, width]
            let ends = host::to_device(&host::tensor(&ends), states.device()).view([-1, 1, 1]);
            let width = self.text.width();
            let ends = states.gather(1, &ends.expand([-1, 1, width], false), false).squeeze_dim(1); // [b, width]
            rows.push(vision::unit_rows(&self.eye.dir, &self.text_projection.forward(&ends))?);
        }
        Ok(Tensor::f_cat(&rows, 0)?)
    }
}

impl End {
    fn place(self, ids: &[i64]) -> i64 {
        let wanted = match self {
            Self::Id(id) => Some(id),
            Self::Largest => ids.iter().copied().max(),
        };
        // As transformers: the first place where there is none.
        ids.iter().position(|id| Some(*id) == wanted).unwrap_or(0) as i64
    }
}

/// Fails unless the text tower knows every id of the tokenizer, and the end of a text is what the tokenizer puts there.
fn check_tokenizer(dir: &Path, tokenizer: &Tokenizer, config: &ClipTowerConfig) -> Result<()> {
    let mut problems = Vec::new();
    if i64::from(tokenizer.largest_id()) >= config.text.vocab_size {
        problems.push(format!(
            "tokenizer: expected ids below the text tower's vocab_size of {}, found {}",
            config.text.vocab_size,
            tokenizer.largest_id()
        ));
    }
    if let End::Id(id) = config.end
        && id != tokenizer.end()
    {
        problems.push(format!(
            "text_config: eos_token_id: expected the id of the tokenizer's end token, {}, found {id}",
            tokenizer.end()
        ));
    }
    if problems.is_empty() { Ok(()) } else { Err(Error::format(dir, problems.join("\n"))) }
}

/// What `config.json` says, with the defaults of transformers' `CLIPConfig`.
struct ClipTowerConfig {
    text: TextConfig,
    end: End,
    vision: LayerSizes,
    vision_layers: i64,
    division: Division,
    projection: i64,
}

impl ClipTowerConfig {
    fn read(dir: &Path) -> Result<Self> {
        let (value, file) = vision::config(dir)?;
        if value["model_type"] != "clip" {
            let found = &value["model_type"];
            let problem = format!("model_type: expected clip (a CLIPModel with both towers), found {found}");
            return Err(Error::format(&file.path, problem));
        }
        let at = |name: &str| file.path.join(name);
        let settings = vision::with_defaults(text_defaults(), tower(&value, "text_config"));
        let text = TextConfig::parse(&Text { content: settings.to_string(), path: at("text_config") })?;
        let end = settings["eos_token_id"].as_i64().ok_or_else(|| {
            let found = &settings["eos_token_id"];
            Error::format(
                &at("text_config"),
                format!("eos_token_id: expected the id of a token, found {found}"),
            )
        })?;
        let settings = vision::with_defaults(vision_defaults(), tower(&value, "vision_config"));
        let (sizes, division) = vision::sizes(&settings, &["quick_gelu", "gelu"])
            .map_err(|problem| Error::format(&at("vision_config"), problem))?;
        let projection = value.get("projection_dim").map_or(Some(512), Value::as_i64);
        let projection = projection.filter(|n| (1..=MAX_WIDTH).contains(n)).ok_or_else(|| {
            let problem = format!("expected 1 to {MAX_WIDTH}, found {}", value["projection_dim"]);
            Error::format(&file.path, format!("projection_dim: {problem}"))
        })?;
        Ok(Self {
            text,
            end: if end == 2 { End::Largest } else { End::Id(end) },
            vision: LayerSizes {
                width: sizes.hidden_size,
                hidden: sizes.intermediate_size,
                heads: sizes.num_attention_heads,
                eps: sizes.layer_norm_eps,
                quick_gelu: settings["hidden_act"] == "quick_gelu",
            },
            vision_layers: sizes.num_hidden_layers,
            division,
            projection,
        })
    }
}

/// The settings of a tower. An old config has them in `.._dict`, which then counts alone.
fn tower<'a>(config: &'a Value, name: &str) -> &'a Value {
    let old = &config[format!("{name}_dict")];
    if old.is_object() { old } else { &config[name] }
}

fn text_defaults() -> Value {
    json!({
        "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
        "num_attention_heads": 8, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
        "eos_token_id": 49407,
    })
}

fn vision_defaults() -> Value {
    json!({
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "num_channels": 3, "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    })
}
