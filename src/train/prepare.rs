//! What a run needs before its first step, by parts. Everything is checked before anything is written.

use crate::adapter::Method;
use crate::adapter::target::TargetRule;
use crate::attach;
use crate::attach::parameters::Parameters;
use crate::data::ImageFolder;
use crate::diffusion::noise::NoiseSchedule;
use crate::diffusion::stable_diffusion::StableDiffusion;
use crate::error::{Error, Result};
use crate::model::control::{ConditionEncoder, Control};
use crate::model::layers::Layers;
use crate::platform::observer::Observer;
use crate::platform::{device, files, seed};
use crate::train::base;
use crate::train::batches::Batches;
use crate::train::checkpoint::{self, Loaded, Moving, Resume, TrainedPart};
use crate::train::class_images::{self, ClassImages};
use crate::train::config::{AdapterSection, TrainConfig};
use crate::train::fit;
use crate::train::loss_scale::LossScale;
use crate::train::optim::{AdamW, Ema, LearningRate};
use crate::train::picture_source::PictureSource;
use crate::train::pictures::Pictures;
use crate::train::preview::{HeldOut, Previews};
use crate::train::run::{Metrics, RunFolder, Sums};
use crate::train::setup::{self, find_checkpoint, trained_parts};
use crate::train::totals::Totals;
use crate::weights::source::Source;
use tch::Kind;

/// A run that can begin, or go on.
pub(super) struct PreparedRun {
    pub(super) config: TrainConfig,
    pub(super) run: Run,
    pub(super) networks: Networks,
    pub(super) data: Data,
    pub(super) optimisation: Optimisation,
}

/// Where the run is written, and where it stands.
pub(super) struct Run {
    pub(super) folder: RunFolder,
    pub(super) metrics: Metrics,
    /// Of the base model.
    pub(super) fingerprint: String,
    /// Steps already taken.
    pub(super) taken: i64,
    /// Seconds of earlier sessions.
    pub(super) earlier: f64,
}

/// What computes.
pub(super) struct Networks {
    pub(super) model: StableDiffusion,
    pub(super) schedule: NoiseSchedule,
    pub(super) control: Option<Control>,
    /// Number of adapted layers.
    pub(super) layers: usize,
    /// Whether there are adapters beside base weights that stay.
    pub(super) has_adapter: bool,
    /// See [`crate::adapter::MethodSettings::regulariser_weight`].
    pub(super) regulariser_weight: f64,
}

/// What is shown and looked at.
pub(super) struct Data {
    pub(super) batches: Batches,
    pub(super) held_out: Option<HeldOut>,
    pub(super) previews: Previews,
}

/// What changes the trained tensors, and keeps count.
pub(super) struct Optimisation {
    pub(super) parameters: Parameters,
    /// The files that they go into.
    pub(super) parts: Vec<TrainedPart>,
    pub(super) optimizer: AdamW,
    pub(super) ema: Option<Ema>,
    /// Where f16 trains.
    pub(super) loss_scale: Option<LossScale>,
    pub(super) learning_rates: Vec<LearningRate>,
    pub(super) totals: Totals,
}

impl Optimisation {
    pub(super) fn moving(&self) -> Moving<'_> {
        let Self { optimizer, ema, loss_scale, .. } = self;
        Moving { optimizer, ema: ema.as_ref(), loss_scale: loss_scale.as_ref() }
    }
}

/// Prepares a run from its start, or from a checkpoint of the run in `config.output_dir`.
pub(super) fn prepare(
    config: TrainConfig,
    resume: Option<&Resume>,
    observer: &dyn Observer,
) -> Result<PreparedRun> {
    config.validate()?;
    let config = config.whole()?;
    let checkpoint = match resume {
        None => RunFolder::check_new(&config.output_dir).map(|()| None)?,
        Some(resume) => find_checkpoint(&config, resume, observer)?,
    };
    files::check_folder_writable(&config.output_dir)?;
    let inputs = Inputs::read(config, observer)?;
    let fingerprint = inputs.model.fingerprint()?;
    let Inputs { config, resolution, mut model, schedule, instance, held_out, mut report } = inputs;
    let trained = TrainedNetworks::attach(&config, &mut model, &instance, observer)?;
    let TrainedNetworks { method, layers, control, mut parameters, parts } = trained;
    if checkpoint.is_none() {
        setup::start_from(&config, &fingerprint, &parts, &mut parameters, observer)?;
    }
    let previews = Previews::new(&model, &config, resolution, held_out.as_ref(), observer)?;
    let class_images = config
        .prior
        .with_prior_preservation
        .then(|| ClassImages::check(&model, &config, resolution, &fingerprint))
        .transpose()?;
    check_base(&config, checkpoint.as_ref(), &fingerprint)?;

    let folder = match resume {
        None => RunFolder::create(&config.output_dir, &config.to_toml()?)?,
        Some(_) => RunFolder::open(&config.output_dir, &config.to_toml()?)?,
    };
    let class = class_images
        .map(|images| make_class(&images, &mut model, &config, resolution, &mut report, observer))
        .transpose()?;
    // Class pictures take long.
    folder.write(|run| files::write_atomic(&run.join("dataset.txt"), report.as_bytes()))?;

    let mut batches = Batches::new(&model, &config, resolution, (instance, class), observer)?;
    let held_out = held_out.map(|f| HeldOut::new(&model, &config, resolution, &f)).transpose()?;
    let whole = method.as_ref().is_some_and(|method| method.trains_whole_network());
    if whole {
        attach::release_base(&mut model.unet);
    }
    let regulariser_weight = method.as_ref().map_or(0.0, |method| method.regulariser_weight());
    let has_adapter = method.is_some() && !whole;
    let mut networks = Networks { schedule, control, layers, has_adapter, regulariser_weight, model };
    let (optimisation, taken, earlier) =
        optimisation(&config, checkpoint, (parameters, parts), &networks.model, &folder, observer)?;
    encode_ahead(&config, taken, &mut batches, &mut networks.model, observer)?;
    let metrics = Metrics::open(folder.path(), taken, resume.is_some(), observer)?;
    let run = Run { folder, metrics, fingerprint, taken, earlier };
    Ok(PreparedRun { run, networks, data: Data { batches, held_out, previews }, optimisation, config })
}

/// What a run reads.
struct Inputs {
    /// With its resolution.
    config: TrainConfig,
    resolution: u32,
    model: StableDiffusion,
    schedule: NoiseSchedule,
    /// The subject's pictures, or pairs.
    instance: Pictures,
    held_out: Option<Pictures>,
    /// What is said of the pictures.
    report: String,
}

impl Inputs {
    fn read(config: TrainConfig, observer: &dyn Observer) -> Result<Self> {
        let compute = device::resolve(config.device, Some(config.model.dtype))?;
        compute.notes.iter().for_each(|note| observer.note(note));
        device::set_threads(config.threads, usize::MAX)?;
        let (setting, path) = match &config.data.train_data_dir {
            Some(path) => ("train_data_dir", path),
            None => ("instance_data_dir", &config.data.instance_data_dir),
        };
        let instance = Pictures::read(&config, setting, path, observer)?;
        let held_out = config.data.held_out_data_dir.as_deref();
        let held_out =
            held_out.map(|dir| Pictures::read(&config, "held_out_data_dir", dir, observer)).transpose()?;
        let asked = base::request(&config.model, observer)?;
        let source = Source::open_as(&asked)?;
        source.check_complete()?;
        fit::check(&config, &source)?;
        let mut model = StableDiffusion::from_source(source, compute.numbers, compute.device)?;
        model.expect_text_to_image()?;
        model.notes.iter().for_each(|note| observer.note(note));
        device::set_threads(config.threads, attach::weight_count(&mut model.unet))?;
        let resolution = setup::resolution(&config, &model)?;
        let mut config = config;
        config.data.resolution = Some(resolution);
        let (what, held_out_what) = if config.is_control() {
            ("pairs", "held-out pairs")
        } else {
            ("subject pictures", "held-out pictures")
        };
        let mut report = format!("{what}: {}\n", instance.report(resolution));
        if let Some(pictures) = &held_out {
            report += &format!("{held_out_what}: {}\n", pictures.report(resolution));
        }
        observer.say(report.trim_end());
        instance.warn_of_no_edges(&config, resolution, observer)?;
        note_of_idle(&config, observer);
        let schedule = NoiseSchedule::new(&model.scheduler, model.device())?;
        Ok(Self { config, resolution, model, schedule, instance, held_out, report })
    }
}

/// Says which settings that were changed have no effect.
fn note_of_idle(config: &TrainConfig, observer: &dyn Observer) {
    let prior = &config.prior;
    if !prior.with_prior_preservation && (prior.class_data_dir.is_some() || !prior.class_prompt.is_empty()) {
        observer.note("class_data_dir and class_prompt have no effect without --with_prior_preservation");
    }
    let adapter = &config.adapter;
    if !adapter.train_text_encoder && config.optimizer.text_encoder_lr.is_some() {
        observer.note("text_encoder_lr has no effect without --train_text_encoder");
    }
    let whole = adapter.method().ok().flatten().is_some_and(|method| method.trains_whole_network());
    if whole && adapter.target_modules != AdapterSection::default().target_modules {
        observer.note(&format!("target_modules has no effect: method {} trains every layer", adapter.method));
    }
}

/// What trains.
struct TrainedNetworks {
    /// None where the control encoder trains alone.
    method: Option<Method>,
    /// Number of adapted layers.
    layers: usize,
    control: Option<Control>,
    parameters: Parameters,
    parts: Vec<TrainedPart>,
}

impl TrainedNetworks {
    /// Puts new adapters on the networks, and makes a control encoder where control trains.
    fn attach(
        config: &TrainConfig,
        model: &mut StableDiffusion,
        instance: &Pictures,
        observer: &dyn Observer,
    ) -> Result<Self> {
        let targets = TargetRule::from_words(&config.adapter.target_modules)?;
        let text_targets = TargetRule::from_words(&config.adapter.text_target_modules)?;
        let method = config.adapter.method()?;
        let mut layers = 0;
        if let Some(method) = &method {
            layers += attach::attach_new(
                &mut model.unet,
                ("target_modules", &targets),
                method,
                config.adapter.bias,
                config.seed,
            )?;
            setup::warn_of_idle_words("target_modules", &targets, &mut [&mut model.unet], observer);
        }
        let texts = if config.adapter.train_text_encoder { &mut model.texts[..] } else { &mut [] };
        for (i, tower) in texts.iter_mut().enumerate() {
            let (network, seed) = (&mut tower.encoder, seed::derive(config.seed, "text encoder", i as u64));
            if let Some(method) = &method {
                let targets = ("text_target_modules", &text_targets);
                layers += attach::attach_new(network, targets, method, config.adapter.bias, seed)?;
            }
        }
        if config.adapter.train_text_encoder {
            let towers = model.texts.iter_mut().map(|tower| &mut tower.encoder as &mut dyn Layers);
            let mut towers: Vec<_> = towers.collect();
            setup::warn_of_idle_words("text_target_modules", &text_targets, &mut towers, observer);
        }
        let mut encoder = setup::control_encoder(config, model, instance)?;
        let mut networks: Vec<&mut dyn Layers> = Vec::new();
        if method.is_some() {
            networks.push(&mut model.unet);
        }
        if config.adapter.train_text_encoder {
            networks.extend(model.texts.iter_mut().map(|tower| &mut tower.encoder as &mut dyn Layers));
        }
        networks.extend(encoder.iter_mut().map(|encoder| encoder as &mut dyn Layers));
        let parameters = attach::pack_parameters(&mut networks);
        let own = encoder.as_ref().map(ConditionEncoder::config);
        let parts = trained_parts(config, model, &targets, &text_targets, own)?;
        Ok(Self { method, layers, control: encoder.map(Control::Encoder), parameters, parts })
    }
}

fn check_base(config: &TrainConfig, checkpoint: Option<&Loaded>, fingerprint: &str) -> Result<()> {
    match checkpoint.filter(|loaded| loaded.state.base_fingerprint != fingerprint) {
        None => Ok(()),
        Some(loaded) => Err(Error::run(format!(
            "{}: the base model's weights are not those that this run began with (step {})",
            config.model.pretrained_model_name_or_path.display(),
            loaded.state.step
        ))),
    }
}

/// The class pictures, drawn by the base model, which an adapter that starts at the identity is only up to rounding.
fn make_class(
    images: &ClassImages,
    model: &mut StableDiffusion,
    config: &TrainConfig,
    resolution: u32,
    report: &mut String,
    observer: &dyn Observer,
) -> Result<Pictures> {
    attach::set_enabled(model, false);
    observer.say(&images.make(model, config, observer)?);
    attach::set_enabled(model, true);
    let folder = ImageFolder::scan(&class_images::folder(config), config.data.background)?;
    *report += &format!("class pictures: {}\n", folder.report(resolution));
    Ok(Pictures::Folder(folder))
}

/// Makes what the steps after `taken` need of text encoders and VAE, and lets go of those that have nothing more to do. Previews
/// bring the VAE back.
fn encode_ahead(
    config: &TrainConfig,
    taken: i64,
    batches: &mut Batches,
    model: &mut StableDiffusion,
    observer: &dyn Observer,
) -> Result<()> {
    let accumulation = config.schedule.gradient_accumulation_steps as u64;
    let number = |step: i64| (step as u64).saturating_mul(accumulation);
    let numbers = number(taken)..number(config.schedule.max_train_steps);
    // Text encoders first, which are the larger: what they held is free when pictures are encoded.
    let texts =
        |source: &mut PictureSource, draws, own| source.encode_texts_ahead(model, draws, own, observer);
    if !config.adapter.train_text_encoder && batches.encode_ahead(numbers.clone(), texts)? {
        model.release_texts();
    }
    let pictures =
        |source: &mut PictureSource, draws, own| source.encode_pictures_ahead(model, draws, own, observer);
    if batches.encode_ahead(numbers, pictures)? {
        model.vae.release();
    }
    Ok(())
}

/// The optimiser as it starts, or as the checkpoint has it; then the steps taken, and their seconds.
fn optimisation(
    config: &TrainConfig,
    checkpoint: Option<Loaded>,
    (mut parameters, parts): (Parameters, Vec<TrainedPart>),
    model: &StableDiffusion,
    folder: &RunFolder,
    observer: &dyn Observer,
) -> Result<(Optimisation, i64, f64)> {
    let mut optimizer = AdamW::new(config.optimizer.adamw(), &parameters);
    let learning_rates = config.learning_rates(model.texts.len())?;
    let kind = model.denoiser().numbers().compute;
    let mut loss_scale = (kind == Kind::Half).then(|| LossScale::new(parameters.flat().device()));
    let mut ema = config.optimizer.use_ema.then(|| Ema::new(config.optimizer.ema_decay, &parameters));
    let (mut step, mut seconds, mut sums) = (0, 0.0, Sums::default());
    if let Some(loaded) = checkpoint {
        loaded.restore(&parts, &mut parameters, &mut optimizer, ema.as_mut(), loss_scale.as_mut())?;
        (step, seconds, sums) = (loaded.state.step, loaded.state.seconds, loaded.state.sums);
        observer.say(&format!("resuming after step {step}"));
        match checkpoint::remove_after(folder.path(), step)? {
            0 => {}
            n => observer.note(&format!(
                "{n} checkpoints after step {step} are removed, as the steps after it are made anew"
            )),
        }
    }
    let totals = Totals::new(&sums);
    let optimisation = Optimisation { parameters, parts, optimizer, ema, loss_scale, learning_rates, totals };
    Ok((optimisation, step, seconds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::observer::Silent;
    use std::path::Path;

    /// What of the embedded model is there when a run on it begins: text encoders, VAE.
    fn there(trains_text: bool, center_crop: bool) -> (bool, bool) {
        let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets");
        let scratch = tempfile::tempdir().unwrap();
        let mut config = TrainConfig { output_dir: scratch.path().join("run"), ..TrainConfig::default() };
        config.model.pretrained_model_name_or_path = assets.join("tiny-sd");
        config.data.instance_data_dir = scratch.path().join("pictures");
        std::fs::create_dir(&config.data.instance_data_dir).unwrap();
        // 4 pixels more than a square on one side: 5 squares of it for each of 60 pictures.
        for i in 0..60 {
            let pixels = image::RgbImage::from_pixel(36, 32, image::Rgb([i, 0, 0]));
            pixels.save(config.data.instance_data_dir.join(format!("{i}.png"))).unwrap();
        }
        config.data.instance_prompt = "a sks cat".into();
        config.data.resolution = Some(32);
        config.data.center_crop = center_crop;
        config.adapter.train_text_encoder = trains_text;
        let run = prepare(config, None, &Silent).unwrap();
        (!run.networks.model.texts.is_empty(), run.networks.model.vae.is_there())
    }

    #[test]
    fn what_has_nothing_more_to_do_is_let_go() {
        assert_eq!(there(false, true), (false, false));
        assert_eq!(there(true, true), (true, false));
        assert_eq!(there(false, false), (false, true), "300 squares are too many");
    }
}
