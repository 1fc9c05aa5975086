//! The noise schedule: the scheduler's config file, the beta table, and batched noising for training.
//!
//! Forward process: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e, with a_t the running product of 1 - beta (DDPM, arXiv
//! 2006.11239, eq. 4). Velocity: arXiv 2202.00512, appendix D. Min-SNR weights: arXiv 2303.09556, section 3.4. Zero
//! terminal SNR: arXiv 2305.08891, algorithm 1. The table is computed in f32 by libtorch on the CPU, as `diffusers`
//! computes it, so that both programs hold the same bits.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};

use crate::platform::host;
use crate::weights::bounds::MAX_FACTOR;
use crate::weights::python_json;
use crate::{Error, Result};

pub use crate::weights::prediction::Prediction;

/// More training timesteps than any model has; refuses a damaged file before it asks for memory.
const MAX_TRAIN_TIMESTEPS: usize = 100_000;

/// The numbers of a scheduler that are not counts, with the least and the most that each can be; beyond them lies no scheduler, only a
/// damaged file.
const NUMBERS: [(&str, f64, f64); 7] = [
    ("beta_start", 0.0, 1.0),
    ("beta_end", 0.0, 1.0),
    ("sigma_min", 0.0, MAX_FACTOR),
    ("sigma_max", 0.0, MAX_FACTOR),
    ("clip_sample_range", 0.0, MAX_FACTOR),
    ("sample_max_value", 0.0, MAX_FACTOR),
    ("lambda_min_clipped", f64::NEG_INFINITY, MAX_FACTOR),
];

/// `beta_start` and `beta_end` of a `diffusers` class, which count where the file says nothing.
pub const DEFAULT_BETAS: (f64, f64) = (0.0001, 0.02);

/// A `scheduler/scheduler_config.json`, kept as the keys it really has.
///
/// `diffusers` builds any scheduler from any other's config: keys that are there carry over, keys that are missing take
/// the defaults of the class that is built. Hence every getter takes the default of the caller's class.
#[derive(Debug, Clone)]
pub struct SchedulerConfig {
    values: Map<String, Value>,
    path: PathBuf,
}

impl SchedulerConfig {
    /// Reads the config file at `path`. Errors: the file cannot be read, or is no JSON object.
    pub fn read(path: &Path) -> Result<Self> {
        Self::parse(&crate::platform::files::read_to_string(path)?, path)
    }

    /// Parses the text of a config; `path` is for messages. Python's `Infinity` and `NaN` are understood.
    pub fn parse(text: &str, path: &Path) -> Result<Self> {
        let values = python_json::parse(text)
            .map_err(|e| Error::format(path, format!("expected a JSON object: {e}")))?;
        Ok(Self { values, path: path.to_path_buf() })
    }

    /// The `diffusers` class that the file names, if any.
    pub fn class_name(&self) -> Option<&str> {
        self.values.get("_class_name")?.as_str()
    }

    /// A boolean. `null` is false, as it is in Python.
    pub fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.values.get(key) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(Value::Null) => Ok(false),
            Some(other) => Err(self.mismatch(key, "true or false", other)),
        }
    }

    /// A number that f32 holds, infinite ones too: libtorch takes no other factor for f32.
    pub fn number(&self, key: &str, default: f64) -> Result<f64> {
        match self.values.get(key) {
            None => Ok(default),
            Some(value) => value
                .as_f64()
                .filter(|x| x.abs() <= f64::from(f32::MAX))
                .or_else(|| match value.as_str() {
                    Some("inf") => Some(f64::INFINITY),
                    Some("-inf") => Some(f64::NEG_INFINITY),
                    _ => None,
                })
                .ok_or_else(|| self.mismatch(key, "a number", value)),
        }
    }

    /// A number that may be `null` or missing.
    pub fn optional_number(&self, key: &str) -> Result<Option<f64>> {
        match self.values.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(_) => self.number(key, 0.0).map(Some),
        }
    }

    /// A number from 0 up.
    pub fn count(&self, key: &str, default: usize) -> Result<usize> {
        match self.values.get(key) {
            None => Ok(default),
            Some(value) => value
                .as_u64()
                .and_then(|n| usize::try_from(n).ok())
                .ok_or_else(|| self.mismatch(key, "a whole number, 0 or more", value)),
        }
    }

    /// A list of whole numbers; missing and `null` are the empty list.
    pub fn indices(&self, key: &str) -> Result<Vec<i64>> {
        let value = match self.values.get(key) {
            None | Some(Value::Null) => return Ok(Vec::new()),
            Some(value) => value,
        };
        let items = value.as_array().and_then(|items| items.iter().map(Value::as_i64).collect());
        items.ok_or_else(|| self.mismatch(key, "a list of whole numbers", value))
    }

    /// One of several words, turned into what the word stands for; `default` where the key is missing.
    pub fn choice<T: Copy>(&self, key: &str, default: T, words: &[(&str, T)]) -> Result<T> {
        let Some(value) = self.values.get(key) else { return Ok(default) };
        let found = words.iter().find(|(word, _)| value.as_str() == Some(word));
        found.map(|(_, choice)| *choice).ok_or_else(|| {
            let known: Vec<_> = words.iter().map(|(word, _)| *word).collect();
            self.mismatch(key, &known.join(" or "), value)
        })
    }

    /// The same config with `key` set to `value`.
    pub fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.values.insert(key.to_string(), value.into());
        self
    }

    /// The same config without `key`, if it has the value `value`.
    pub fn without(mut self, key: &str, value: &str) -> Self {
        if self.values.get(key).and_then(Value::as_str) == Some(value) {
            self.values.remove(key);
        }
        self
    }

    /// Whether the key is there at all.
    pub fn has(&self, key: &str) -> bool {
        self.values.contains_key(key)
    }

    /// As `StableDiffusionPipeline` corrects it on loading: files of its first months lack the offset of one timestep,
    /// and ask for clipping that no latent model can bear.
    pub fn for_latent_model(self) -> Self {
        let clips = matches!(self.class_name(), Some("DDIMScheduler" | "DDPMScheduler"));
        let config = self.with("steps_offset", 1);
        if clips { config.with("clip_sample", false) } else { config }
    }

    /// Whether the key is there with a value other than `null`, `false` or an empty list.
    pub fn is_set(&self, key: &str) -> bool {
        match self.values.get(key) {
            None | Some(Value::Null | Value::Bool(false)) => false,
            Some(Value::Array(items)) => !items.is_empty(),
            Some(_) => true,
        }
    }

    /// What the UNet predicts (`prediction_type`).
    pub fn prediction(&self) -> Result<Prediction> {
        let words = [
            ("epsilon", Prediction::Epsilon),
            ("v_prediction", Prediction::Velocity),
            ("sample", Prediction::Sample),
        ];
        self.choice("prediction_type", Prediction::Epsilon, &words)
    }

    /// How many timesteps the model was trained on (`num_train_timesteps`).
    pub fn train_timesteps(&self) -> Result<usize> {
        let count = self.count("num_train_timesteps", 1000)?;
        if (1..=MAX_TRAIN_TIMESTEPS).contains(&count) {
            return Ok(count);
        }
        Err(self.problem(format!("num_train_timesteps: expected 1 to {MAX_TRAIN_TIMESTEPS}, found {count}")))
    }

    /// Refuses numbers that no scheduler has, also those that its class has no use for or that are corrected on loading: a file that
    /// says such is damaged.
    pub fn check_numbers(&self) -> Result<()> {
        let train = self.train_timesteps()?;
        let offset = self.count("steps_offset", 0)?;
        if offset > train {
            return Err(self.problem(format!("steps_offset: expected 0 to {train}, found {offset}")));
        }
        for (key, least, most) in NUMBERS {
            let Some(found) = self.optional_number(key)?.filter(|found| !(least..=most).contains(found))
            else {
                continue;
            };
            let expected = match (least.is_finite(), most.is_finite()) {
                (true, true) => format!("a number from {least} to {most}"),
                (true, false) => format!("a number from {least} up"),
                _ => format!("a number up to {most:e}"),
            };
            return Err(self.problem(format!("{key}: expected {expected}, found {found}")));
        }
        Ok(())
    }

    /// The table of a_t, f32 on the CPU, `[num_train_timesteps]`.
    ///
    /// `betas` are the class's defaults for `beta_start` and `beta_end`; `rescale` says whether the class honours
    /// `rescale_betas_zero_snr`. Errors: a schedule that is not supported, or one that leaves [0, 1].
    pub fn alphas_cumprod(&self, betas: (f64, f64), rescale: bool) -> Result<Tensor> {
        let mut betas = self.betas(betas)?;
        if rescale && self.flag("rescale_betas_zero_snr", false)? {
            betas = rescale_zero_terminal_snr(&betas);
        }
        if host::all(&betas.ge(0.0).logical_and(&betas.le(1.0))) {
            return Ok(cumulative_alphas(&betas));
        }
        Err(self.problem("betas: expected a noise schedule between 0 and 1, found one that leaves it"))
    }

    /// Refuses a schedule that ends in pure noise for a model that predicts the noise: at that timestep its answer says nothing of
    /// the image (arXiv 2305.08891, section 3.2), so that no sampler can begin there and no training can teach it.
    pub fn check_terminal_snr(&self) -> Result<()> {
        // A table that cannot be made is told by whoever uses it.
        let (Ok(alphas), Prediction::Epsilon) =
            (self.alphas_cumprod(DEFAULT_BETAS, true), self.prediction()?)
        else {
            return Ok(());
        };
        if host::number(&alphas.get(-1)) > 0.0 {
            return Ok(());
        }
        let error = self.problem(
            "expected a model that predicts the velocity, since its noise schedule has zero terminal SNR (the last timestep is pure \
             noise), found one that predicts the noise (epsilon), which says nothing of the image there",
        );
        Err(error.with_hint(
            "if it was trained to predict the velocity, say --prediction v_prediction (prediction in [model] of a training); if \
             it was trained without zero terminal SNR, take rescale_betas_zero_snr out of its scheduler_config.json",
        ))
    }

    /// An error about this file.
    pub fn problem(&self, problem: impl Into<String>) -> Error {
        Error::format(&self.path, problem)
    }

    fn betas(&self, (start, end): (f64, f64)) -> Result<Tensor> {
        let steps = self.train_timesteps()?;
        if self.is_set("trained_betas") {
            let value = &self.values["trained_betas"];
            let betas: Option<Vec<f64>> =
                value.as_array().and_then(|items| items.iter().map(Value::as_f64).collect());
            return match betas {
                Some(betas) if betas.len() == steps => Ok(host::tensor(&betas).to_kind(Kind::Float)),
                Some(betas) => Err(self.problem(format!(
                    "trained_betas: expected {steps} values (num_train_timesteps), found {}",
                    betas.len()
                ))),
                None => Err(self.mismatch("trained_betas", "a list of numbers", value)),
            };
        }
        let (start, end) = (self.number("beta_start", start)?, self.number("beta_end", end)?);
        let scaled = self.choice("beta_schedule", false, &[("linear", false), ("scaled_linear", true)])?;
        let line = |start, end| host::line(start, end, steps as i64);
        Ok(if scaled { line(start.sqrt(), end.sqrt()).square() } else { line(start, end) })
    }

    fn mismatch(&self, key: &str, expected: &str, found: &Value) -> Error {
        self.problem(format!("{key}: expected {expected}, found {found}"))
    }
}

fn cumulative_alphas(betas: &Tensor) -> Tensor {
    one_minus(betas).cumprod(0, Kind::Float)
}

/// 1 - x. The operator of tch computes -(x - 1), which makes -0 of a 1, and the SNR of pure noise -0 with it.
fn one_minus(x: &Tensor) -> Tensor {
    x.rsub_scalar(1.0)
}

/// Betas whose last timestep is pure noise (arXiv 2305.08891, algorithm 1).
fn rescale_zero_terminal_snr(betas: &Tensor) -> Tensor {
    let root = cumulative_alphas(betas).sqrt();
    let (first, last) = (root.get(0), root.get(-1));
    let root = (root - &last) * (&first / (&first - &last));
    let product = root.square();
    let len = product.size()[0];
    let ratio = product.narrow(0, 1, len - 1) / product.narrow(0, 0, len - 1);
    one_minus(&Tensor::cat(&[product.narrow(0, 0, 1), ratio], 0))
}

/// The training side of a noise schedule: tables on one device, indexed by a timestep for each sample.
///
/// No method waits for the device. Timesteps outside `0..num_train_timesteps` are a bug of the caller.
#[derive(Debug)]
pub struct NoiseSchedule {
    prediction: Prediction,
    alphas_cumprod: Tensor,
    signal: Tensor,
    noise: Tensor,
    snr: Tensor,
}

impl NoiseSchedule {
    /// The schedule that the model was trained with, its tables on `device`. Missing keys take the defaults of
    /// `diffusers`' `DDPMScheduler`, the class that its training scripts build.
    pub fn new(config: &SchedulerConfig, device: Device) -> Result<Self> {
        let alphas_cumprod = config.alphas_cumprod(DEFAULT_BETAS, true)?;
        let rest = one_minus(&alphas_cumprod);
        Ok(Self {
            prediction: config.prediction()?,
            signal: host::to_device(&alphas_cumprod.sqrt(), device),
            noise: host::to_device(&rest.sqrt(), device),
            snr: host::to_device(&(&alphas_cumprod / rest), device),
            alphas_cumprod: host::to_device(&alphas_cumprod, device),
        })
    }

    /// How many timesteps there are; training draws from `0..train_timesteps`.
    pub fn train_timesteps(&self) -> i64 {
        self.alphas_cumprod.size()[0]
    }

    /// What the UNet predicts.
    pub fn prediction(&self) -> Prediction {
        self.prediction
    }

    /// The table of a_t, f32, `[train_timesteps]`.
    pub fn alphas_cumprod(&self) -> &Tensor {
        &self.alphas_cumprod
    }

    /// x_t = sqrt(a_t) x + sqrt(1 - a_t) e, in the kind of `latents`. `latents` and `noise` `[b, c, h, w]`, `timesteps`
    /// `[b]` i64.
    pub fn add_noise(&self, latents: &Tensor, noise: &Tensor, timesteps: &Tensor) -> Tensor {
        self.mix(latents, noise, timesteps)
    }

    /// What the UNet should have answered, in the kind of `latents`: the noise, the velocity or the latents. Shapes as
    /// in [`NoiseSchedule::add_noise`].
    pub fn target(&self, latents: &Tensor, noise: &Tensor, timesteps: &Tensor) -> Tensor {
        match self.prediction {
            Prediction::Epsilon => noise.shallow_clone(),
            Prediction::Velocity => self.mix(noise, &-latents, timesteps),
            Prediction::Sample => latents.shallow_clone(),
        }
    }

    /// Min-SNR weights of the samples' losses, f32 `[b]`: with s the signal-to-noise ratio, min(s, gamma) / s for
    /// epsilon, / (s + 1) for velocity, / 1 for sample.
    pub fn snr_weights(&self, timesteps: &Tensor, gamma: f64) -> Tensor {
        let snr = self.snr.index_select(0, &host::to_device(timesteps, self.snr.device()));
        match self.prediction {
            // min(s, gamma) / s written so that s = 0 (zero terminal SNR) gives its limit 1 and not 0 / 0.
            Prediction::Epsilon => (snr.reciprocal() * gamma).clamp_max(1.0),
            Prediction::Velocity => snr.clamp_max(gamma) / (snr + 1.0),
            Prediction::Sample => snr.clamp_max(gamma),
        }
    }

    /// sqrt(a_t) a + sqrt(1 - a_t) b, computed in f32 and returned in the kind of `a`.
    fn mix(&self, a: &Tensor, b: &Tensor, timesteps: &Tensor) -> Tensor {
        let timesteps = host::to_device(timesteps, self.signal.device());
        let row = |table: &Tensor| table.index_select(0, &timesteps).view([-1, 1, 1, 1]); // [b, 1, 1, 1]
        (row(&self.signal) * a + row(&self.noise) * b).to_kind(a.kind())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> SchedulerConfig {
        SchedulerConfig::parse(text, Path::new("scheduler_config.json")).unwrap()
    }

    #[test]
    fn a_missing_key_is_not_a_present_one() {
        let config = parse(r#"{"clip_sample": false, "set_alpha_to_one": null, "steps_offset": 1}"#);
        assert!(!config.flag("clip_sample", true).unwrap());
        assert!(!config.flag("set_alpha_to_one", true).unwrap());
        assert!(config.flag("lower_order_final", true).unwrap());
        assert_eq!(config.count("steps_offset", 0).unwrap(), 1);
        assert_eq!(parse("{}").count("steps_offset", 0).unwrap(), 0);
        assert!(config.flag("steps_offset", true).is_err());
    }

    #[test]
    fn python_infinities_are_read() {
        let config = parse("{\"lambda_min_clipped\": -Infinity, \"a\": Infinity}");
        assert_eq!(config.number("lambda_min_clipped", 0.0).unwrap(), f64::NEG_INFINITY);
        assert_eq!(config.number("a", 0.0).unwrap(), f64::INFINITY);
    }

    #[test]
    fn what_is_not_supported_is_named() {
        let cases = [
            (r#"{"beta_schedule": "squaredcos_cap_v2"}"#, "beta_schedule: expected linear or scaled_linear"),
            (r#"{"num_train_timesteps": 3, "trained_betas": [0.1]}"#, "expected 3 values"),
            (r#"{"trained_betas": "x"}"#, "trained_betas: expected a list of numbers"),
            (r#"{"num_train_timesteps": 0}"#, "num_train_timesteps: expected 1 to"),
            (r#"{"beta_end": 1.5}"#, "betas: expected a noise schedule between 0 and 1"),
            (r#"{"num_train_timesteps": 1, "rescale_betas_zero_snr": true}"#, "betas: expected"),
            (r#"{"prediction_type": "flow_prediction"}"#, "prediction_type: expected epsilon or"),
        ];
        for (text, expected) in cases {
            let message = NoiseSchedule::new(&parse(text), Device::Cpu).unwrap_err().to_string();
            assert!(message.starts_with("scheduler_config.json: "), "{message}");
            assert!(message.contains(expected), "{text} gave: {message}");
        }
        assert!(SchedulerConfig::parse("[1]", Path::new("x")).is_err());
    }

    #[test]
    fn zero_terminal_snr_has_finite_weights() {
        for (kind, last) in [("epsilon", 1.0), ("v_prediction", 0.0), ("sample", 0.0)] {
            let config =
                parse(&format!(r#"{{"rescale_betas_zero_snr": true, "prediction_type": "{kind}"}}"#));
            let schedule = NoiseSchedule::new(&config, Device::Cpu).unwrap();
            assert_eq!(schedule.alphas_cumprod().double_value(&[999]), 0.0);
            let weights = schedule.snr_weights(&Tensor::from_slice(&[0i64, 999]), 5.0);
            assert_eq!(weights.double_value(&[1]), last, "{kind}");
            assert!(weights.double_value(&[0]).is_finite());
        }
    }
}
