//! The one way to draw: a model with what is put on it, asked for pictures. What several requests share is made once: what a
//! text becomes, what a picture to start from becomes, a sampler's plan.

use crate::attach::fixed::{AttachReport, attach_fixed};
use crate::attach::loaded::{LayerNames, LoadedAdapter};
use crate::attach::{detach, set_enabled};
use crate::diffusion::prompt::PromptTexts;
use crate::diffusion::sample::batch::{Drawing, draw_batch, to_image};
use crate::diffusion::sample::noise::Noise;
use crate::diffusion::sample::settings::SampleSettings;
use crate::diffusion::sample::sizes::ToldPicture;
use crate::diffusion::sample::start::{PreparedStart, Start};
use crate::diffusion::sample::steering::{Steered, Steering};
use crate::diffusion::sample::texts::{KnownTexts, TextKey, Texts};
use crate::diffusion::sampler::SamplerPlan;
use crate::diffusion::stable_diffusion::StableDiffusion;
use crate::error::{Error, Result};
use crate::model::Conditioning;
use crate::model::control::Control;
use crate::model::layers::Layers;
use crate::platform::host;
use crate::platform::observer::Observer;
use std::borrow::Borrow;
use std::collections::HashMap;
use std::sync::Arc;
use tch::{Kind, Tensor};

/// So many pictures to start from are kept.
const MOST_STARTS: usize = 8;

/// What to draw.
pub struct Request<'a> {
    /// Prompt, size, sampler.
    pub settings: &'a SampleSettings,
    /// What each picture begins with.
    pub from: From<'a>,
    /// A picture to start from.
    pub start: Option<&'a Start>,
    /// Conditions, which the session's control reads.
    pub steering: Option<Steering>,
    /// Pictures drawn at once; their last bits depend on it, as libtorch chooses its kernels and sums by it.
    pub batch_size: usize,
    /// Called after every call of the denoiser.
    pub tick: Option<&'a dyn Fn()>,
}

/// What pictures begin with.
#[derive(Clone, Copy)]
pub enum From<'a> {
    /// A seed for each.
    Seeds(&'a [u64]),
    /// Noise, a row for each.
    Noise(&'a Noise),
}

impl<'a> Request<'a> {
    /// A picture for each seed, with nothing but the settings.
    pub fn new(settings: &'a SampleSettings, seeds: &'a [u64], batch_size: usize) -> Self {
        Self { settings, from: From::Seeds(seeds), start: None, steering: None, batch_size, tick: None }
    }

    /// Number of pictures.
    pub fn count(&self) -> usize {
        match self.from {
            From::Seeds(seeds) => seeds.len(),
            From::Noise(noise) => noise.latents.size()[0] as usize,
        }
    }
}

/// A finished picture.
pub struct Picture {
    /// The seed it was drawn from; `None` if the noise was given.
    pub seed: Option<u64>,
    /// Final latents `(1, c, h, w)`, f32, CPU, not divided by the scaling factor.
    pub latents: Tensor,
    /// The pixels.
    pub image: crate::data::image::RgbImage,
}

/// How often something was made in a session.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Made {
    /// Texts encoded.
    pub texts: usize,
    /// Pictures to start from encoded.
    pub starts: usize,
    /// Sampler's plans.
    pub plans: usize,
}

/// A model that draws. `M` and `C` own a model and a control, or borrow them.
pub struct Session<M = StableDiffusion, C = Control> {
    model: M,
    control: Option<C>,
    adapters: Vec<(LoadedAdapter, f64)>,
    reports: Vec<AttachReport>,
    names: Option<LayerNames>,
    /// Whether the adapters can come off.
    keeps_base: bool,
    enabled: bool,
    /// Whether an adapter changes what texts become.
    adapts_text: bool,
    texts: Texts,
    starts: HashMap<u64, PreparedStart>,
    plans: HashMap<String, Arc<SamplerPlan>>,
    made: Made,
}

impl Session {
    /// A model with adapters, each at its strength, and the control that reads conditions. The adapters can be scaled and taken
    /// off again.
    pub fn open(
        model: StableDiffusion,
        adapters: Vec<(LoadedAdapter, f64)>,
        control: Option<Control>,
    ) -> Result<Self> {
        let mut session = Self::over(model, control);
        session.put_on(adapters)?;
        Ok(session)
    }

    /// As [`Self::open`], with adapters that stay: whole new weights take the place of the base model's, and cost no memory
    /// beside them.
    pub fn open_for_good(
        model: StableDiffusion,
        adapters: Vec<(LoadedAdapter, f64)>,
        control: Option<Control>,
    ) -> Result<Self> {
        let mut session = Self { keeps_base: false, ..Self::over(model, control) };
        session.adapters = adapters;
        session.attach()?;
        session.adapters = Vec::new();
        Ok(session)
    }

    /// Puts adapters on, in place of those that were on before.
    ///
    /// Errors: adapters that do not fit; the model is then the base model.
    pub fn put_on(&mut self, adapters: Vec<(LoadedAdapter, f64)>) -> Result<()> {
        self.take_off()?;
        self.adapters = adapters;
        let done = self.attach();
        if done.is_err() {
            self.take_off()?;
        }
        done
    }

    /// Gives the adapters other strengths, in their order, and leaves them as they are switched.
    ///
    /// Errors: another number of strengths; a file that cannot be read again, after which the adapters are off.
    pub fn scale(&mut self, strengths: &[f64]) -> Result<()> {
        self.check_keeps_base()?;
        if strengths.len() != self.adapters.len() {
            let (expected, found) = (self.adapters.len(), strengths.len());
            return Err(Error::config(format!(
                "strengths: expected one for each of {expected} adapters that can be scaled, found {found}"
            )));
        }
        self.adapters.iter_mut().zip(strengths).for_each(|((_, own), new)| *own = *new);
        detach(&mut self.model);
        let enabled = self.enabled;
        let done = self.attach();
        match &done {
            Ok(()) => self.set_enabled(enabled),
            Err(_) => self.take_off()?,
        }
        done
    }

    /// Takes all adapters off: the model is the base model again, bit for bit.
    pub fn take_off(&mut self) -> Result<()> {
        self.check_keeps_base()?;
        detach(&mut self.model);
        self.adapters.clear();
        self.reports.clear();
        self.texts_changed();
        Ok(())
    }

    /// What the layers of the model are called, for [`LoadedAdapter::read`].
    pub fn layer_names(&mut self) -> Result<&LayerNames> {
        if self.names.is_none() {
            self.names = Some(self.model.layer_names()?);
        }
        Ok(self.names.as_ref().expect("they were just read"))
    }

    /// Switches the adapters on or off. Those that were put on for good stay.
    pub fn set_enabled(&mut self, enabled: bool) {
        if self.keeps_base {
            self.enabled = enabled;
            set_enabled(&mut self.model, enabled);
        }
    }

    fn check_keeps_base(&self) -> Result<()> {
        if self.keeps_base {
            return Ok(());
        }
        Err(Error::config("the adapters of this session were put on for good"))
    }

    /// Replaces the control.
    pub fn set_control(&mut self, control: Option<Control>) {
        self.control = control;
    }

    fn attach(&mut self) -> Result<()> {
        self.reports = attach_fixed(&mut self.model, &mut self.adapters, self.keeps_base)?;
        self.enabled = true;
        self.texts_changed();
        Ok(())
    }

    fn texts_changed(&mut self) {
        let mut layers = self.model.texts.iter_mut().flat_map(|tower| tower.encoder.modules_mut());
        self.adapts_text = layers.any(|module| module.is_attached());
        drop(layers);
        self.texts.forget();
    }
}

impl<M: Borrow<StableDiffusion>, C: Borrow<Control>> Session<M, C> {
    /// A model as it is, and the control that reads conditions.
    pub fn over(model: M, control: Option<C>) -> Self {
        Self {
            model,
            control,
            adapters: Vec::new(),
            reports: Vec::new(),
            names: None,
            keeps_base: true,
            enabled: true,
            adapts_text: true, // as far as is known of a model that is lent
            texts: Texts::default(),
            starts: HashMap::new(),
            plans: HashMap::new(),
            made: Made::default(),
        }
    }

    /// The same, for which what these texts become is known.
    pub fn with_texts(mut self, known: &KnownTexts) -> Self {
        self.texts.add(known);
        self
    }

    /// What the texts of these settings become.
    pub fn know_texts<'a>(&mut self, all: impl Iterator<Item = &'a SampleSettings>) -> Result<KnownTexts> {
        let mut known = KnownTexts::default();
        for settings in all {
            self.text_rows(settings)?;
            known.extend(self.texts.take());
        }
        Ok(known)
    }

    /// The model.
    pub fn model(&self) -> &StableDiffusion {
        self.model.borrow()
    }

    /// Whether something reads conditions.
    pub fn has_control(&self) -> bool {
        self.control.is_some()
    }

    /// What putting the adapters on did, for each.
    pub fn reports(&self) -> &[AttachReport] {
        &self.reports
    }

    /// How often something was made.
    pub fn made(&self) -> Made {
        self.made
    }

    /// The sampler's steps for a request, less those that a [`Start`] leaves out.
    pub fn plan(&mut self, settings: &SampleSettings, start: Option<&Start>) -> Result<Arc<SamplerPlan>> {
        let SampleSettings { sampler, spacing, karras, steps, .. } = settings;
        let strength = start.map(Start::strength);
        let key = format!("{sampler:?} {spacing:?} {karras:?} {steps} {strength:?}");
        if let Some(plan) = self.plans.get(&key) {
            return Ok(plan.clone());
        }
        let plan = Arc::new(settings.plan_from(self.model(), strength)?);
        self.made.plans += 1;
        self.plans.insert(key, plan.clone());
        Ok(plan)
    }

    /// Refuses what does not fit the model or its control, before anything is drawn.
    pub fn check(&mut self, request: &Request) -> Result<()> {
        let Request { settings, start, .. } = request;
        settings.check_numbers(self.model())?;
        if self.model().is_inpainting() && !start.is_some_and(Start::is_inpainting) {
            return Err(Error::config(
                "this model is made for inpainting (its UNet sees a mask and a masked picture): it expects a picture \
                 and a mask",
            ).with_hint("give --image FILE --mask FILE"));
        }
        if self.model().is_refiner() && start.is_none() {
            return Err(Error::config(
                "this model is a refiner of Stable Diffusion XL, which draws from a picture and not from noise alone",
            )
            .with_hint("give --image FILE --strength 0.3"));
        }
        if let Some(start) = start {
            start.validate(settings, self.model())?;
        }
        if let Some(steering) = &request.steering {
            steering.validate(self.control()?, self.model())?;
        }
        self.plan(settings, *start).map(|_| ())
    }

    /// Number of calls of the denoiser that a request takes.
    pub fn calls(&mut self, request: &Request) -> Result<usize> {
        let plan = self.plan(request.settings, request.start)?;
        Ok(plan.model_calls() * request.count().div_ceil(request.batch_size.max(1)))
    }

    /// The noise of `seeds`, with what a [`Start`] takes from the same stream.
    pub fn noise(
        &mut self,
        seeds: &[u64],
        settings: &SampleSettings,
        start: Option<&Start>,
    ) -> Result<Noise> {
        let plan = self.plan(settings, start)?;
        Noise::draw(seeds, settings, self.model(), &plan, start)
    }

    /// Draws.
    ///
    /// Errors: an interrupt, a request that does not fit, or latents that are not finite.
    pub fn draw(&mut self, request: &Request, observer: &dyn Observer) -> Result<Vec<Picture>> {
        let _guard = tch::no_grad_guard();
        self.check(request)?;
        if request.count() == 0 {
            return Ok(Vec::new());
        }
        let settings = request.settings;
        let plan = self.plan(settings, request.start)?;
        let drawn;
        let (noise, seeds) = match request.from {
            From::Noise(noise) => (noise, &[][..]),
            From::Seeds(seeds) => {
                drawn = Noise::draw(seeds, settings, self.model(), &plan, request.start)?;
                (&drawn, seeds)
            }
        };
        let conditioning = self.conditioning(settings, request.start.is_some())?;
        self.prepare(request.start);
        let model = self.model();
        let drawing = Drawing {
            model,
            plan: &plan,
            conditioning: &conditioning,
            guidance: settings.guidance,
            guidance_rescale: settings.guidance_rescale,
            picture: request.start.and_then(|start| self.starts.get(&start.id())),
            tick: request.tick,
            observer,
        };
        let (mut pictures, mut first) = (Vec::new(), 0);
        while first < noise.latents.size()[0] {
            let length = (noise.latents.size()[0] - first).min(request.batch_size.max(1) as i64);
            let steered = match &request.steering {
                Some(steering) => {
                    let calls = plan.model_calls();
                    Some(Steered::new(self.control()?, steering, (first, length), calls, model.device()))
                }
                None => None,
            };
            let latents = draw_batch(&drawing, &noise.batch(first, length), steered)?;
            for latents in latents.split(1, 0) {
                let computed_in = model.denoiser().numbers().compute;
                check_finite(&latents, "latents", (computed_in, "--dtype"), &settings.prompt)?;
                // One at a time: the decoder is what needs most memory, and a picture must not depend on its neighbours.
                let pixels = model.vae.decode(&model.vae.scaling().from_unet(&latents));
                let computed_in = model.vae.numbers().compute;
                check_finite(&pixels, "pixels of the VAE", (computed_in, "--vae-dtype"), &settings.prompt)?;
                let mut image = to_image(&pixels)?;
                if let Some(start) = request.start {
                    start.paste(&mut image);
                }
                let seed = seeds.get(pictures.len()).copied();
                pictures.push(Picture { seed, latents: host::to_host(&latents), image });
            }
            first += length;
        }
        Ok(pictures)
    }

    fn control(&self) -> Result<&Control> {
        let missing = || Error::config("conditions: expected a control that reads them, found none");
        self.control.as_ref().map(Borrow::borrow).ok_or_else(missing)
    }

    /// What the negative prompt and the prompt become, or with no guidance the prompt alone.
    fn text_rows(&mut self, settings: &SampleSettings) -> Result<Vec<Conditioning>> {
        let prompt = self.text(settings.positive(), settings.texts.clip_skip)?;
        let mut rows = vec![prompt];
        if settings.is_guided() {
            let zeros = self.model().zeros_for_no_prompt && settings.negative_prompt.is_empty();
            let negative = match zeros {
                true => rows[0].zeros_like(),
                // All layers: diffusers' pipelines leave some out for the prompt alone.
                false => self.text(settings.negative(), 0)?,
            };
            rows.insert(0, negative);
        }
        Ok(rows)
    }

    /// [`Self::text_rows`] as one, with what is told of sizes.
    fn conditioning(&mut self, settings: &SampleSettings, has_start: bool) -> Result<Conditioning> {
        let rows = self.text_rows(settings)?;
        let all = Conditioning::cat(&rows.iter().collect::<Vec<_>>());
        let model = self.model();
        if !model.is_xl() {
            return Ok(all);
        }
        let size = [settings.height, settings.width];
        let told = ToldPicture { size, has_start, is_refiner: model.is_refiner() };
        let sizes = [settings.sizes.of_negative(told), settings.sizes.of_prompt(told)];
        Ok(model.told_numbers(all, &sizes[2 - rows.len()..]))
    }

    /// What a text becomes. Each is encoded alone, so that it does not depend on the texts before it.
    fn text(&mut self, prompt: PromptTexts, clip_skip: usize) -> Result<Conditioning> {
        let adapted = self.enabled && self.adapts_text;
        let key = TextKey::new(adapted, prompt, clip_skip);
        if let Some(known) = self.texts.get(&key) {
            return Ok(known);
        }
        let (tokens, _) = self.model().tokens(&[prompt])?;
        let new = self.model().conditioning(&tokens.skipping(clip_skip));
        self.made.texts += 1;
        self.texts.put(key, &new);
        Ok(new)
    }

    /// Encodes a picture to start from, where that was not done.
    fn prepare(&mut self, start: Option<&Start>) {
        let Some(start) = start.filter(|start| !self.starts.contains_key(&start.id())) else { return };
        if self.starts.len() >= MOST_STARTS {
            self.starts.clear();
        }
        self.made.starts += 1;
        let prepared = start.prepare(self.model());
        self.starts.insert(start.id(), prepared);
    }
}

/// Fails unless all numbers are finite: a picture of others is black. What they were computed in goes with the flag that says so.
fn check_finite(numbers: &Tensor, what: &str, (kind, flag): (Kind, &str), prompt: &str) -> Result<()> {
    if host::all_finite(numbers) {
        return Ok(());
    }
    let hint = match kind {
        Kind::Float => {
            "`hra inspect` names the tensors of a model or an adapter that are not finite; an adapter's strength nearer 0, or less \
             --guidance, keeps large numbers small"
                .to_string()
        }
        _ => format!("try {flag} f32"),
    };
    Err(Error::not_finite(format!("prompt `{prompt}`: the {what} are not finite numbers")).with_hint(hint))
}
