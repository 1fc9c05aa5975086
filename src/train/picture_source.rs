//! Pictures of a subject, of its class, or pairs, with what is said of them: which is shown when, and what text encoders and VAE make
//! of them. Both are frozen unless text encoders train, so that what they make is exact when it is kept.

use crate::data::image::RgbImage;
use crate::data::{Crop, Window};
use crate::diffusion::picture_sizes::PictureSizes;
use crate::diffusion::sample::conditions;
use crate::diffusion::stable_diffusion::{StableDiffusion, Tokens};
use crate::error::Result;
use crate::model::Conditioning;
use crate::platform::observer::{Counter, Observer};
use crate::platform::{random, seed};
use crate::train::pictures::{Pictures, encode};
use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use tch::Tensor;

/// Moments are kept for at most this many different crops; a folder of large pictures with random crops has more, and
/// is encoded anew at each step.
const MAX_CACHED: u64 = 4096;
/// Crops are encoded before the first step where a run sees no more than this.
const MAX_AHEAD: usize = 256;
/// So many bytes of captions' states are made before the first step.
const MAX_TEXT_BYTES: i64 = 1 << 30;
/// Samples are looked at by so many.
const CHUNK: u64 = 1024;

/// What a sample's random numbers depend on beside its number.
#[derive(Clone, Copy)]
pub(super) struct BatchDraws {
    pub(super) seed: u64,
    pub(super) resolution: u32,
    pub(super) center_crop: bool,
    pub(super) train_timesteps: u64,
}

/// A sample's number, counted over the whole run, and its picture.
#[derive(Clone, Copy)]
pub(super) struct Sample {
    number: u64,
    image: usize,
}

/// What a sample is.
pub(super) struct BatchRow {
    /// Mean and standard deviation of the latents, `(1, c, h, w)`, on the device.
    pub(super) mean: Tensor,
    pub(super) deviation: Tensor,
    /// What the latents are drawn with, and what is added to them; the same shape, on the host.
    pub(super) latent_noise: Tensor,
    pub(super) noise: Tensor,
    pub(super) timestep: i64,
    pub(super) sizes: PictureSizes,
    /// `(1, 3, H, W)`, on the host.
    pub(super) condition: Option<Tensor>,
}

/// What is said of pictures.
pub(super) enum Said {
    /// The same of all.
    Prompt(FixedPrompt),
    /// Each its own, of which a share is left out; with what some of them become.
    Captions { empty: f64, known: HashMap<String, Conditioning> },
}

/// One prompt for all pictures.
pub(super) struct FixedPrompt {
    tokens: Tokens,
    /// What it becomes, unless text encoders train: then it is made anew for each batch, with gradient.
    conditioning: Option<Conditioning>,
}

/// See the module.
pub(super) struct PictureSource {
    /// In the purposes of random draws.
    name: &'static str,
    pictures: Pictures,
    /// Pictures that are used.
    count: usize,
    said: Said,
    /// How many different crops there are.
    crops: u64,
    /// Mean and standard deviation of a crop's latents, `(1, c, h, w)`.
    moments: HashMap<(usize, Window), (Tensor, Tensor)>,
}

impl FixedPrompt {
    pub(super) fn new(
        model: &StableDiffusion,
        prompt: &str,
        trains_text: bool,
        observer: &dyn Observer,
    ) -> Result<Self> {
        let (tokens, warnings) = model.tokens(&[prompt])?;
        warnings.iter().for_each(|w| observer.warn(w));
        Ok(Self { conditioning: (!trains_text).then(|| model.conditioning(&tokens)), tokens })
    }
}

impl BatchDraws {
    fn crop(self, draw: u64) -> Crop {
        if self.center_crop { Crop::Center } else { Crop::Random(draw) }
    }
}

impl PictureSource {
    /// Of the first `most` pictures.
    pub(super) fn new(
        name: &'static str,
        pictures: Pictures,
        said: Said,
        most: usize,
        draws: BatchDraws,
    ) -> Self {
        let count = pictures.len().min(most);
        let crops = (0..count)
            .map(|i| if draws.center_crop { 1 } else { pictures.window_count(i, draws.resolution) })
            .fold(0, u64::saturating_add);
        Self { name, pictures, count, said, crops, moments: HashMap::new() }
    }

    fn purpose(&self, draws: BatchDraws, what: &str, number: u64) -> u64 {
        seed::derive(draws.seed, &format!("{} {what}", self.name), number)
    }

    /// The samples of these numbers: every picture once, in a new order, before any comes again.
    pub(super) fn samples(&self, draws: BatchDraws, numbers: Range<u64>) -> Vec<Sample> {
        let n = self.count as u64;
        let (mut round, mut order) = (None, Vec::new());
        let sample = |number: u64| {
            if round != Some(number / n) {
                round = Some(number / n);
                order = seed::permutation(self.purpose(draws, "order", number / n), self.count);
            }
            Sample { number, image: order[(number % n) as usize] }
        };
        numbers.map(sample).collect()
    }

    /// What is said of samples.
    pub(super) fn conditioning(
        &self,
        model: &StableDiffusion,
        draws: BatchDraws,
        samples: &[Sample],
        trains_text: bool,
    ) -> Result<Conditioning> {
        let known = match &self.said {
            Said::Prompt(prompt) => {
                let one = match &prompt.conditioning {
                    Some(fixed) => fixed.shallow_clone(),
                    None => model.conditioning_with_gradient(&prompt.tokens),
                };
                return Ok(one.repeat(samples.len() as i64));
            }
            Said::Captions { known, .. } => known,
        };
        let captions: Vec<&str> = samples.iter().map(|sample| self.caption(draws, *sample)).collect();
        if trains_text {
            return Ok(model.conditioning_with_gradient(&model.tokens(&captions)?.0));
        }
        // Each alone, so that it does not depend on its neighbours.
        let text = |caption: &&str| match known.get(*caption) {
            Some(known) => Ok(known.shallow_clone()),
            None => Ok(model.conditioning(&model.tokens(&[*caption])?.0)),
        };
        let texts = captions.iter().map(text).collect::<Result<Vec<_>>>()?;
        Ok(Conditioning::cat(&texts.iter().collect::<Vec<_>>()))
    }

    /// The caption of a sample, or none where it is left out.
    fn caption(&self, draws: BatchDraws, sample: Sample) -> &str {
        let Said::Captions { empty, .. } = &self.said else { return "" };
        // The upper 53 bits, a number from 0 up to 1.
        let draw = (self.purpose(draws, "caption", sample.number) >> 11) as f64 / (1u64 << 53) as f64;
        if draw < *empty { "" } else { self.pictures.caption(sample.image).unwrap_or_default() }
    }

    /// Where a sample is cut out.
    fn window(&self, draws: BatchDraws, sample: Sample) -> Window {
        let crop = draws.crop(self.purpose(draws, "crop", sample.number));
        self.pictures.crop_window(sample.image, draws.resolution, crop)
    }

    /// Makes what the captions of these numbers become, if it is not too much to be kept; the answer says whether there is nothing
    /// to be made then.
    pub(super) fn encode_texts_ahead(
        &mut self,
        model: &StableDiffusion,
        draws: BatchDraws,
        numbers: Range<u64>,
        observer: &dyn Observer,
    ) -> Result<bool> {
        let Said::Captions { empty, .. } = &self.said else { return Ok(true) };
        let most = (MAX_TEXT_BYTES / model.bytes_of_text()).max(1) as usize;
        let captions = if numbers.end - numbers.start < self.count as u64 {
            let of_sample = |sample| self.caption(draws, sample).to_string();
            self.looked_at(draws, numbers, (self.count, most), of_sample)
        } else {
            // All that can be said: a long run need not be looked through.
            let own = (0..self.count).filter_map(|i| self.pictures.caption(i).map(str::to_string));
            let all: BTreeSet<String> = own.chain((*empty > 0.0).then(String::new)).collect();
            (all.len() <= most).then_some(all)
        };
        let Some(captions) = captions else { return Ok(false) };
        let mut made = HashMap::new();
        each_told(captions, "captions", observer, |caption| {
            let text = model.conditioning(&model.tokens(&[caption.as_str()])?.0);
            made.insert(caption, text);
            Ok(())
        })?;
        if let Said::Captions { known, .. } = &mut self.said {
            *known = made;
        }
        Ok(true)
    }

    /// The same of the latents of these numbers' squares.
    pub(super) fn encode_pictures_ahead(
        &mut self,
        model: &StableDiffusion,
        draws: BatchDraws,
        numbers: Range<u64>,
        observer: &dyn Observer,
    ) -> Result<bool> {
        let all = usize::try_from(self.crops).unwrap_or(usize::MAX);
        let of_sample = |sample: Sample| (sample.image, self.window(draws, sample));
        let Some(places) = self.looked_at(draws, numbers, (all, MAX_AHEAD), of_sample) else {
            return Ok(false);
        };
        let _guard = tch::no_grad_guard();
        let what = format!("{} pictures", self.name);
        each_told(places, &what, observer, |(image, window)| {
            let (pixels, _) = self.pictures.prepare(image, draws.resolution, window)?;
            self.moments.insert((image, window), moments(model, &pixels));
            Ok(())
        })?;
        Ok(true)
    }

    /// What the samples of these numbers have in common, each once; `None` where it is more than `most`. There are `all` at most.
    fn looked_at<T: Ord>(
        &self,
        draws: BatchDraws,
        numbers: Range<u64>,
        (all, most): (usize, usize),
        of_sample: impl Fn(Sample) -> T,
    ) -> Option<BTreeSet<T>> {
        let mut found = BTreeSet::new();
        let mut next = numbers.start;
        // Squares are drawn evenly, so that few of them are soon all seen.
        while next < numbers.end && found.len() < all.min(most.saturating_add(1)) {
            let chunk = next..(next + CHUNK).min(numbers.end);
            next = chunk.end;
            found.extend(self.samples(draws, chunk).into_iter().map(&of_sample));
        }
        (found.len() <= most).then_some(found)
    }

    /// What a sample is, for the network.
    pub(super) fn row(
        &mut self,
        model: &StableDiffusion,
        draws: BatchDraws,
        sample: Sample,
    ) -> Result<BatchRow> {
        let Sample { number, image } = sample;
        let window = self.window(draws, sample);
        let purpose = |what: &str| self.purpose(draws, what, number);
        let (latent_seed, noise_seed) = (purpose("latent"), purpose("noise"));
        let timestep = (purpose("timestep") % draws.train_timesteps) as i64;

        let known = self.moments.get(&(image, window)).map(|(m, d)| (m.shallow_clone(), d.shallow_clone()));
        // Pixels are read where something is to be made of them.
        let prepared = match &known {
            Some(_) if !self.pictures.has_conditions() => None,
            _ => Some(self.pictures.prepare(image, draws.resolution, window)?),
        };
        let (mean, deviation) = match (known, &prepared) {
            (Some(known), _) => known,
            (None, Some((pixels, _))) => {
                let (mean, deviation) = moments(model, pixels);
                if self.crops <= MAX_CACHED {
                    let kept = (mean.shallow_clone(), deviation.shallow_clone());
                    self.moments.insert((image, window), kept);
                }
                (mean, deviation)
            }
            (None, None) => unreachable!("pixels are read where moments are not known"),
        };
        let side = i64::from(draws.resolution);
        let condition = prepared.and_then(|(_, condition)| condition);
        let shape = mean.size();
        Ok(BatchRow {
            latent_noise: random::normal(latent_seed, &shape),
            noise: random::normal(noise_seed, &shape),
            mean,
            deviation,
            timestep,
            sizes: self.pictures.sizes(image, draws.resolution, window),
            condition: condition.map(|c| conditions(&[&c], side, side)),
        })
    }
}

/// Encodes each of some things, which is counted and can be stopped.
fn each_told<T>(
    things: BTreeSet<T>,
    what: &str,
    observer: &dyn Observer,
    mut encode: impl FnMut(T) -> Result<()>,
) -> Result<()> {
    if things.is_empty() {
        return Ok(());
    }
    let (counted, count) = (format!("encoding {what}"), things.len() as u64);
    let progress = Counter::new(observer, &counted, 0, count);
    for (done, thing) in (1..).zip(things) {
        observer.check(|| format!("stopped while {what} were encoded; no step was taken"))?;
        encode(thing)?;
        progress.set(done, "");
    }
    Ok(())
}

/// Mean and standard deviation of a square picture's latents.
fn moments(model: &StableDiffusion, pixels: &RgbImage) -> (Tensor, Tensor) {
    let (mean, log_variance) = encode(model, pixels);
    (mean, (log_variance * 0.5).exp())
}
