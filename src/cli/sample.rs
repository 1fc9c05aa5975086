//! `hra sample`.

use crate::attach::loaded::LoadedAdapter;
use crate::attach::{self, fixed};
use crate::cli::control::{ControlArgs, Controlled, Pairs};
use crate::cli::output::Output;
use crate::cli::start::{Pictures, StartArgs};
use crate::cli::terminal;
use crate::data::image::grid::{Grid, GridRow};
use crate::data::image::png;
use crate::diffusion::sample::{self, Guides, Noise, Picture, Settings};
use crate::diffusion::sampler::{SamplerKind, Spacing};
use crate::diffusion::stable_diffusion::StableDiffusion;
use crate::error::{Error, Result};
use crate::platform::device::{self, DeviceChoice, Precision};
use crate::platform::hub::{self, Wanted};
use crate::platform::observer::{Counter, Observer};
use crate::weights::tensor_file::{self, TensorFile};
use clap::Args;
use serde_json::json;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// Flags of `hra sample`.
#[derive(Debug, Args)]
#[command(
    about = "Draw pictures from prompts",
    after_help = "Picture i of a prompt is drawn from seed --seed + i, as diffusers draws it from a CPU generator with that \
                  seed.\n\nExamples:\n  hra sample --model assets/tiny-sd --prompt \"a fluent 3d emoji of a cat face\" \
                  --output out\n  hra sample --model DIR --adapter runs/dog=0.8 --prompt-file prompts.txt --with-base \
                  --output out"
)]
pub struct SampleArgs {
    /// Stable Diffusion: folder, checkpoint file (.safetensors), or hub id owner/name[@revision]
    #[arg(long, alias = "pretrained-model-name-or-path", value_name = "MODEL")]
    model: PathBuf,
    /// Folder with what a checkpoint file does not say: tokenizer/, scheduler/, other parts' config.json
    #[arg(long, alias = "model-config", value_name = "DIR")]
    config: Option<PathBuf>,
    /// Adapter folder, LoRA file or hub id, with a strength, of its control encoder too: 1 is as trained, 0 the base model. Several
    /// act in their order
    #[arg(long, value_name = "DIR[=STRENGTH]")]
    adapter: Vec<String>,
    /// What to draw; may be given several times
    #[arg(long)]
    prompt: Vec<String>,
    /// File with a prompt on each line; empty lines and lines that begin with # are passed over
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
    /// What not to draw
    #[arg(long, default_value = "", hide_default_value = true)]
    negative_prompt: String,
    /// Folder for the pictures: PROMPT-PICTURE.png, counted from 0000-0000 (with --pairs, their own names), and grid.png
    #[arg(long, alias = "output-dir", value_name = "DIR")]
    output: PathBuf,
    /// Draw each picture with the base model too, from the same noise: in base/, and beside the others in grid.png
    #[arg(long)]
    with_base: bool,
    /// Print what was drawn as JSON
    #[arg(long)]
    json: bool,

    /// Pictures for each prompt [default: 1, or as many as --latents holds]
    #[arg(long, alias = "num-images-per-prompt", value_name = "N", help_heading = "Pictures")]
    num_images: Option<usize>,
    /// Seed of the first picture of each prompt
    #[arg(long, default_value_t = 0, help_heading = "Pictures")]
    seed: u64,
    /// Width in pixels [default: that of --image, --latents or --control, else what the model was trained at]
    #[arg(long, value_name = "PIXELS", help_heading = "Pictures")]
    width: Option<i64>,
    /// Height in pixels [default: that of --image, --latents or --control, else what the model was trained at]
    #[arg(long, value_name = "PIXELS", help_heading = "Pictures")]
    height: Option<i64>,

    /// Scheduler [default: the model's]
    #[arg(long, value_enum, help_heading = "Sampling")]
    scheduler: Option<SamplerKind>,
    /// How timesteps are spread [default: the sampler's own way]
    #[arg(long, value_enum, help_heading = "Sampling")]
    timestep_spacing: Option<Spacing>,
    /// Karras' noise levels: true or false [default: true for heun, unipc and dpm++2m-karras]
    #[arg(long, value_name = "BOOL", help_heading = "Sampling")]
    karras_sigmas: Option<bool>,
    /// Number of steps
    #[arg(long, alias = "num-inference-steps", default_value_t = 30, help_heading = "Sampling")]
    steps: usize,
    /// Classifier-free guidance; 1 is none
    #[arg(long, alias = "guidance-scale", default_value_t = 7.5, help_heading = "Sampling")]
    guidance: f64,
    /// Pictures drawn at once; the pictures do not depend on it
    #[arg(long, default_value_t = 4, help_heading = "Sampling")]
    batch_size: usize,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value_t = DeviceChoice::Auto, help_heading = "Sampling")]
    device: DeviceChoice,
    /// Number format of the model
    #[arg(long, alias = "mixed-precision", value_enum, default_value_t = Precision::F32, help_heading = "Sampling")]
    dtype: Precision,
    /// CPU threads [default: libtorch's choice]
    #[arg(long, help_heading = "Sampling")]
    threads: Option<i32>,

    #[command(flatten)]
    control: ControlArgs,
    #[command(flatten)]
    start: StartArgs,

    /// Unit noise to start from: tensor `latents` (b, c, h, w) of a safetensors file, the same for each prompt. With --image,
    /// `image_noise` is the noise of the picture's latents and `masked_image_noise` that of the masked picture's, which an
    /// inpainting model sees; where one is missing, the mean that the encoder gives is taken
    #[arg(long, value_name = "FILE", help_heading = "Exchange with other software")]
    latents: Option<PathBuf>,
    /// Noise of each step for ancestral samplers: tensor `noise` (steps, b, c, h, w)
    #[arg(long, value_name = "FILE", requires = "latents", help_heading = "Exchange with other software")]
    step_noise: Option<PathBuf>,
    /// Write the final latents of all pictures, prompt by prompt, as tensor `latents`
    #[arg(long, value_name = "FILE", help_heading = "Exchange with other software")]
    save_latents: Option<PathBuf>,
}

/// Rows of the contact sheet: a sheet of thousands of pictures is of no use, and does not fit into memory.
const MAX_ROWS: usize = 100;

/// Where the noise comes from.
enum Source {
    Seeds(Vec<u64>),
    Given(Noise),
}

/// Runs `hra sample`.
pub fn run(args: &SampleArgs, observer: &dyn Observer) -> Result<()> {
    let given =
        args.latents.as_deref().map(|path| read_noise(path, args.step_noise.as_deref())).transpose()?;
    if !(1..=4096).contains(&args.batch_size) || !(1..=100_000).contains(&args.num_images.unwrap_or(1)) {
        return Err(Error::config(
            "--batch-size: expected 1 to 4096, and --num-images: expected 1 to 100000",
        ));
    }
    if args.with_base && args.adapter.is_empty() {
        return Err(Error::config("--with-base compares an adapter with the base model: give an --adapter"));
    }
    let pictures = args.start.read()?;
    let compute = device::resolve(args.device, Some(args.dtype))?;
    compute.notes.iter().for_each(|note| eprintln!("note: {note}"));
    let adapters: Vec<(PathBuf, f64)> =
        args.adapter.iter().map(|a| super::adapter_with_strength(a)).collect::<Result<_>>()?;
    terminal::listen()?;
    let dir = hub::resolve(&args.model, Wanted::Model, observer)?;
    let adapters: Vec<(PathBuf, f64)> = adapters
        .into_iter()
        .map(|(word, strength)| Ok((hub::resolve(&word, Wanted::Adapter, observer)?, strength)))
        .collect::<Result<_>>()?;

    let asked = args.control.look(&adapters, observer)?;
    let prompts = prompts(args, asked.pairs.as_ref())?;
    let names = asked.pairs.as_ref().map(Pairs::names).transpose()?;

    let config = args.config.as_deref();
    let mut model = StableDiffusion::load_with(&dir, config, compute.kind, compute.device)?;
    model.notes.iter().for_each(|note| eprintln!("note: {note}"));
    device::set_threads(args.threads, attach::weight_count(&mut model.unet))?;
    let mut reports = Vec::new();
    if !adapters.is_empty() {
        let names = model.layer_names()?;
        let adapters: Vec<(LoadedAdapter, f64)> = adapters
            .iter()
            .map(|(path, strength)| Ok((LoadedAdapter::read(path, &names)?, *strength)))
            .collect::<Result<_>>()?;
        let base = model.fingerprint()?;
        for (adapter, _) in &adapters {
            if let Some(note) = adapter.other_base(&base) {
                eprintln!("warning: {note}");
            }
        }
        reports = fixed::attach_fixed(&mut model, adapters, args.with_base)?;
        reports.iter().for_each(|report| eprintln!("{report}"));
    }
    let control = asked.load(prompts.len(), &compute, observer)?;
    let settings = settings(args, &model, given.as_ref(), pictures.as_ref(), control.as_ref())?;
    settings.validate(&model)?;
    let start = pictures.map(|pictures| pictures.start(settings.width, settings.height)).transpose()?;
    let first = control.as_ref().map(|control| control.condition(0, &settings)).transpose()?;
    let steering = control.as_ref().zip(first.as_ref()).map(|(control, first)| control.steering(first));
    let guides = Guides { start: start.as_ref(), control: steering };
    guides.validate(&settings, &model)?;
    note_of_size(args, &settings, &model);
    if let (Some(control), Some(first)) = (&control, &first) {
        control.warn_of_no_edges(first);
    }
    let source = source(args, &model, &settings, &guides, given)?;
    let all: Vec<&str> = prompts
        .iter()
        .map(String::as_str)
        .chain([args.negative_prompt.as_str()])
        .filter(|p| !p.is_empty())
        .collect();
    if !all.is_empty() {
        model.prompt_ids(&all)?.1.iter().for_each(|warning| eprintln!("warning: {warning}"));
    }

    let count = source.count();
    if let Some(parent) = args.save_latents.as_deref().and_then(Path::parent)
        && !parent.as_os_str().is_empty()
        && !parent.is_dir()
    {
        return Err(Error::config(format!(
            "--save-latents: expected an existing folder, found no {}",
            parent.display()
        )));
    }
    let output = Output { dir: &args.output, names, count };
    let read = [args.start.files(), asked.files()].concat();
    output.prepare(args.with_base, prompts.len(), &read)?;
    let passes = if args.with_base { 2 } else { 1 };
    let calls =
        sample::model_calls(&model, &settings, &guides, count, args.batch_size)? * prompts.len() * passes;
    let progress = Counter::new(observer, "sampling", 0, calls as u64);
    let mut done = 0;
    let mut rows = Vec::new();
    let mut latents = Vec::new();
    let mut drawn = Vec::new();
    for (p, prompt) in prompts.iter().enumerate() {
        let settings = Settings { prompt: prompt.clone(), ..settings.clone() };
        let noise = source.noise(&settings, &model, &guides)?;
        let condition = control.as_ref().map(|control| control.condition(p, &settings)).transpose()?;
        let mut images: Vec<_> = condition.iter().cloned().collect();
        for base in if args.with_base { &[true, false][..] } else { &[false] } {
            attach::set_enabled(&mut model, !base);
            let mut tick = || {
                done += 1;
                progress.set(done, prompt);
            };
            // An adapter's control encoder is not the base model's.
            let control = control.as_ref().filter(|control| !(*base && control.of_adapter));
            let steering = control.zip(condition.as_ref()).map(|(control, image)| control.steering(image));
            let guides = Guides { start: start.as_ref(), control: steering };
            let mut pictures =
                sample::sample(&model, &settings, &noise, &guides, args.batch_size, observer, &mut tick)?;
            source.name(&mut pictures);
            let names = if *base { String::new() } else { args.adapter.join(", ") };
            let text = |seed| {
                let mut text = settings.to_text(seed, &model.name(), &names);
                args.start.add_to(&mut text);
                text.extend(control.iter().flat_map(|control| control.text(p)));
                text
            };
            output.save(p, &pictures, *base, &text)?;
            if !base {
                let wanted = pictures.iter().filter(|_| args.save_latents.is_some());
                latents.extend(wanted.map(|p| p.latents.shallow_clone()));
                drawn.extend(pictures.iter().enumerate().map(|(i, picture)| {
                    let base = args.with_base.then(|| output.file(p, i, true));
                    json!({"file": output.file(p, i, false), "base": base, "prompt": prompt, "seed": picture.seed})
                }));
            }
            images.extend(pictures.into_iter().map(|p| p.image));
        }
        if rows.len() < MAX_ROWS {
            rows.push(GridRow { label: prompt.clone(), images });
        }
    }
    drop(progress);
    if prompts.len() > MAX_ROWS {
        eprintln!("note: grid.png holds the first {MAX_ROWS} of {} prompts", prompts.len());
    }
    let columns = (0..passes).flat_map(|pass| {
        let what = if passes == 1 { "" } else { ["base, ", "tuned, "][pass] };
        source.labels().into_iter().map(move |label| format!("{what}{label}"))
    });
    if let Some(path) = &args.save_latents {
        tensor_file::write(path, &[("latents".to_string(), Tensor::cat(&latents, 0))], &[])?;
    }
    let condition = control.iter().map(|_| "condition".to_string());
    let grid = Grid { columns: condition.chain(columns).collect(), rows };
    let all = Settings { prompt: prompts.join("\n"), ..settings };
    let mut text = all.to_text(Some(args.seed), &model.name(), &args.adapter.join(", "));
    args.start.add_to(&mut text);
    text.extend(control.iter().flat_map(Controlled::about));
    let sheet = args.output.join("grid.png");
    png::save_png(&sheet, &grid.render(), &text)?;
    if args.json {
        return super::print_json(&json!({
            "output": args.output, "pictures": drawn, "grid": sheet, "latents": args.save_latents, "adapters": reports,
            "start": args.start.to_json(), "control": control.map(|c| c.about().into_iter().collect::<BTreeMap<_, _>>()),
        }));
    }
    let total = prompts.len() * count;
    let base =
        if args.with_base { format!(", and {total} of the base model in base/") } else { String::new() };
    println!("{total} picture{} in {}{base}", if total == 1 { "" } else { "s" }, args.output.display());
    Ok(())
}

/// Says so where a picture is drawn much larger than the model knows pictures, which costs time and coherence, unless asked for.
fn note_of_size(args: &SampleArgs, settings: &Settings, model: &StableDiffusion) {
    let (width, height, native) = (settings.width, settings.height, model.native_size());
    if args.width.or(args.height).is_none() && width * height > 2 * native * native {
        eprintln!(
            "note: drawing at {width}x{height}, but the model was trained at {native}x{native}; --width and --height make the \
             picture smaller"
        );
    }
}

fn prompts(args: &SampleArgs, pairs: Option<&Pairs>) -> Result<Vec<String>> {
    let mut prompts = args.prompt.clone();
    prompts.extend(pairs.into_iter().flat_map(Pairs::captions));
    if let Some(path) = &args.prompt_file {
        prompts.extend(super::prompt_lines(path)?);
    }
    if prompts.iter().chain([&args.negative_prompt]).any(|prompt| prompt.contains('\0')) {
        return Err(Error::config("prompt: expected text, found a NUL character in it"));
    }
    if prompts.is_empty() {
        return Err(Error::config(
            "expected a prompt, found none\nhint: give --prompt TEXT or --prompt-file FILE",
        ));
    }
    Ok(prompts)
}

fn read_noise(path: &Path, steps: Option<&Path>) -> Result<Noise> {
    let read = |path: &Path, name: &str, dims: usize| {
        let file = TensorFile::open(path)?;
        let tensor = file.read_as(name, Kind::Float, Device::Cpu)?;
        if tensor.dim() != dims || tensor.numel() == 0 {
            let found = tensor.size();
            return Err(Error::format(
                path,
                format!("`{name}`: expected {dims} dimensions, found shape {found:?}"),
            ));
        }
        Ok(tensor)
    };
    let latents = read(path, "latents", 4)?;
    let beside = |name: &str| {
        if TensorFile::open(path)?.shape(name).is_none() {
            return Ok(None);
        }
        let (tensor, expected) = (read(path, name, 4)?, latents.size());
        if tensor.size() != expected {
            let found = tensor.size();
            return Err(Error::format(
                path,
                format!("`{name}`: expected shape {expected:?}, found {found:?}"),
            ));
        }
        Ok(Some(tensor))
    };
    let (image, masked_image) = (beside("image_noise")?, beside("masked_image_noise")?);
    let Some(steps) = steps else {
        let steps = Tensor::empty([0], (Kind::Float, Device::Cpu));
        return Ok(Noise { latents, steps, image, masked_image });
    };
    let noise = read(steps, "noise", 5)?;
    if noise.size()[1..] != latents.size()[..] {
        let (expected, found) = (latents.size(), noise.size());
        return Err(Error::format(
            steps,
            format!("`noise`: expected (steps, ..) over {expected:?}, found {found:?}"),
        ));
    }
    Ok(Noise { latents, steps: noise, image, masked_image })
}

fn settings(
    args: &SampleArgs,
    model: &StableDiffusion,
    given: Option<&Noise>,
    pictures: Option<&Pictures>,
    control: Option<&Controlled>,
) -> Result<Settings> {
    let factor = model.vae.factor();
    let of_picture = pictures.map(|pictures| pictures.size(factor)).transpose()?;
    let of_noise = given.map(|noise| [3, 2].map(|dim| noise.latents.size()[dim] * factor));
    let of_condition = control.map(|control| control.size(factor)).transpose()?.flatten();
    let own = of_picture.or(of_noise).or(of_condition).unwrap_or([model.native_size(); 2]);
    let (sampler, note) = match args.scheduler {
        Some(kind) => (kind, None),
        None => SamplerKind::from_config(&model.scheduler)?,
    };
    note.iter().for_each(|note| eprintln!("note: {note}"));
    Ok(Settings {
        prompt: String::new(),
        negative_prompt: args.negative_prompt.clone(),
        sampler,
        spacing: args.timestep_spacing,
        karras: args.karras_sigmas,
        steps: args.steps,
        guidance: args.guidance,
        width: args.width.unwrap_or(own[0]),
        height: args.height.unwrap_or(own[1]),
    })
}

fn source(
    args: &SampleArgs,
    model: &StableDiffusion,
    settings: &Settings,
    guides: &Guides,
    given: Option<Noise>,
) -> Result<Source> {
    let Some(mut noise) = given else {
        let count = args.num_images.unwrap_or(1) as u64;
        return Ok(Source::Seeds((0..count).map(|i| args.seed.wrapping_add(i)).collect()));
    };
    let (expected, found) = (settings.latent_shape(model), noise.latents.size());
    if found[1..] != expected[1..] {
        return Err(Error::config(format!(
            "--latents: expected (b, {}, {}, {}) for this model at {}x{} pixels, found {found:?}",
            expected[1], expected[2], expected[3], settings.width, settings.height
        )));
    }
    if args.num_images.is_some_and(|n| n as i64 != found[0]) {
        return Err(Error::config(format!(
            "--num-images: --latents holds {} pictures; leave it out",
            found[0]
        )));
    }
    let needed = guides.plan(settings, model)?.noise_steps();
    if needed > 0 && noise.steps.dim() != 5 {
        // Without the noise of each step, picture i takes it from seed + i as it would without --latents.
        let seeds: Vec<u64> = (0..found[0] as u64).map(|i| args.seed.wrapping_add(i)).collect();
        noise.steps = Noise::draw_guided(&seeds, settings, model, guides)?.steps;
    } else if needed > 0 && noise.steps.size()[0] < needed as i64 {
        let found = noise.steps.size()[0];
        return Err(Error::config(format!("--step-noise: expected noise for {needed} steps, found {found}")));
    }
    Ok(Source::Given(noise))
}

impl Source {
    fn count(&self) -> usize {
        match self {
            Self::Seeds(seeds) => seeds.len(),
            Self::Given(noise) => noise.latents.size()[0] as usize,
        }
    }

    fn noise(&self, settings: &Settings, model: &StableDiffusion, guides: &Guides) -> Result<Noise> {
        match self {
            Self::Seeds(seeds) => Noise::draw_guided(seeds, settings, model, guides),
            Self::Given(noise) => Ok(noise.shallow_clone()),
        }
    }

    fn name(&self, pictures: &mut [Picture]) {
        if let Self::Seeds(seeds) = self {
            pictures.iter_mut().zip(seeds).for_each(|(picture, seed)| picture.seed = Some(*seed));
        }
    }

    fn labels(&self) -> Vec<String> {
        match self {
            Self::Seeds(seeds) => seeds.iter().map(|seed| format!("seed {seed}")).collect(),
            Self::Given(_) => (0..self.count()).map(|i| format!("latents {i}")).collect(),
        }
    }
}
