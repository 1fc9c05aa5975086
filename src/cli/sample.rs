//! `hra sample`.

use crate::attach;
use crate::attach::loaded::LoadedAdapter;
use crate::cli::control::{Controlled, PairsFlags};
use crate::cli::noise::NoiseSource;
use crate::cli::output::Output;
use crate::cli::prompts;
use crate::cli::sample_flags::SampleArgs;
use crate::cli::start::StartPictures;
use crate::cli::stdout::print_line;
use crate::cli::terminal;
use crate::data::image::grid::{Grid, GridRow};
use crate::data::image::{RgbImage, png};
use crate::diffusion::sample::{From, Noise, Picture, Request, SampleSettings, Session, Start, TextSettings};
use crate::diffusion::sampler::SamplerKind;
use crate::diffusion::stable_diffusion::StableDiffusion;
use crate::error::{Error, Result};
use crate::platform::device;
use crate::platform::files;
use crate::platform::hub::{self, Wanted};
use crate::platform::observer::{Counter, Observer};
use crate::weights::request::ModelRequest;
use crate::weights::tensor_file::{self, TensorFile};
use serde_json::{Value, json};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use tch::Tensor;

/// Rows of the contact sheet: a sheet of thousands of pictures is of no use, and does not fit into memory.
const MAX_ROWS: usize = 100;

/// Runs `hra sample`.
pub fn run(args: &SampleArgs, observer: &dyn Observer) -> Result<()> {
    let given = args
        .exchange
        .latents
        .as_deref()
        .map(|path| Noise::read(path, args.exchange.step_noise.as_deref()))
        .transpose()?;
    check_flags(args)?;
    check_outputs(args)?;
    device::set_threads(args.machine.threads, usize::MAX)?;
    let pictures = args.start.read(observer)?;
    let compute = device::resolve(args.machine.device, Some(args.machine.dtype))?;
    compute.notes.iter().for_each(|note| eprintln!("note: {note}"));
    let adapters: Vec<(PathBuf, f64)> =
        args.adapter.iter().map(|a| super::adapter_with_strength(a)).collect::<Result<_>>()?;
    terminal::listen()?;
    let asked_model = args.files.request(&args.model, observer)?;
    let adapters: Vec<(PathBuf, f64)> = adapters
        .into_iter()
        .map(|(word, strength)| Ok((hub::resolve(&word, Wanted::Adapter, observer)?, strength)))
        .collect::<Result<_>>()?;

    let asked = args.control.look(&adapters, observer)?;
    let prompts = asked_prompts(args, asked.pairs.as_ref())?;
    let names = asked.pairs.as_ref().map(PairsFlags::names).transpose()?;
    let mut session = open(args, &asked_model, &adapters, &compute)?;
    let controlled = asked.load(prompts.len(), &compute, observer)?.map(|(controlled, control)| {
        session.set_control(Some(control));
        controlled
    });
    let model = session.model();
    let settings = settings(args, model, given.as_ref(), pictures.as_ref(), controlled.as_ref())?;
    settings.validate(model)?;
    let start = pictures.map(|pictures| pictures.start(settings.width, settings.height)).transpose()?;
    let source = NoiseSource::new(args.pictures.num_images.unwrap_or(1), args.pictures.seed, given);
    let mut job = Job { args, controlled, settings, start, source, prompts };
    job.check(&mut session, observer)?;
    let mut output = Output::new(&args.output, names, job.source.count());
    let read = [args.start.files(), asked.files()].concat();
    output.prepare((args.with_base, args.overwrite), job.prompts.len(), &read, observer)?;
    let drawn = job.draw(&mut session, &output, observer)?;
    job.finish(&session, &output, drawn)
}

fn check_flags(args: &SampleArgs) -> Result<()> {
    if !(1..=4096).contains(&args.sampling.batch_size)
        || !(1..=100_000).contains(&args.pictures.num_images.unwrap_or(1))
    {
        return Err(Error::config(
            "--batch-size: expected 1 to 4096, and --num-images: expected 1 to 100000",
        ));
    }
    if args.with_base && args.adapter.is_empty() {
        return Err(Error::config("--with-base compares an adapter with the base model: give an --adapter"));
    }
    Ok(())
}

/// Refuses to draw what could not be written, before the model is loaded.
fn check_outputs(args: &SampleArgs) -> Result<()> {
    files::check_folder_writable(&args.output)?;
    let Some(path) = args.exchange.save_latents.as_deref() else { return Ok(()) };
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty() && !parent.is_dir()) {
        return Err(Error::config(format!(
            "--save-latents: expected an existing folder, found no {}",
            parent.display()
        )));
    }
    if path.exists() {
        TensorFile::open(path).map_err(|_| {
            Error::run(format!(
                "--save-latents: {} is no file of tensors, and is not written over",
                path.display()
            ))
            .with_hint("give another name")
        })?;
    }
    files::check_place_writable(path)
}

/// The model with its adapters; says what putting them on did.
fn open(
    args: &SampleArgs,
    asked: &ModelRequest,
    adapters: &[(PathBuf, f64)],
    compute: &device::Compute,
) -> Result<Session> {
    let mut model = StableDiffusion::open(asked, compute.numbers, compute.device)?;
    model.notes.iter().for_each(|note| eprintln!("note: {note}"));
    device::set_threads(args.machine.threads, attach::weight_count(&mut model.unet))?;
    if adapters.is_empty() {
        return Session::open(model, Vec::new(), None);
    }
    let names = model.layer_names()?;
    let adapters: Vec<(LoadedAdapter, f64)> = adapters
        .iter()
        .map(|(path, strength)| Ok((LoadedAdapter::read(path, &names)?, *strength)))
        .collect::<Result<_>>()?;
    let base = model.fingerprint()?;
    for note in adapters.iter().filter_map(|(adapter, _)| adapter.other_base(&base)) {
        eprintln!("warning: {note}");
    }
    let session = if args.with_base {
        Session::open(model, adapters, None)?
    } else {
        Session::open_for_good(model, adapters, None)?
    };
    session.reports().iter().for_each(|report| eprintln!("{report}"));
    Ok(session)
}

/// What is drawn, for all prompts.
struct Job<'a> {
    args: &'a SampleArgs,
    controlled: Option<Controlled<'a>>,
    /// With an empty prompt.
    settings: SampleSettings,
    start: Option<Start>,
    source: NoiseSource,
    prompts: Vec<String>,
}

/// What was drawn.
#[derive(Default)]
struct Drawn {
    rows: Vec<GridRow>,
    latents: Vec<Tensor>,
    /// A line of `--json` for each picture.
    pictures: Vec<Value>,
}

impl Job<'_> {
    /// What the request for a prompt is, less its noise.
    fn request<'r>(
        &'r self,
        settings: &'r SampleSettings,
        from: From<'r>,
        condition: Option<&RgbImage>,
    ) -> Request<'r> {
        let steering =
            self.controlled.as_ref().zip(condition).map(|(control, image)| control.steering(image));
        let batch_size = self.args.sampling.batch_size;
        Request { settings, from, start: self.start.as_ref(), steering, batch_size, tick: None }
    }

    /// Refuses what cannot be drawn, and says what a user should know, before anything is written.
    fn check(&mut self, session: &mut Session, observer: &dyn Observer) -> Result<()> {
        let args = self.args;
        let first = self.controlled.as_ref().map(|c| c.condition(0, &self.settings)).transpose()?;
        session.check(&self.request(&self.settings, From::Seeds(&[]), first.as_ref()))?;
        note_of_size(args, &self.settings, session.model());
        if let (Some(control), Some(first)) = (&self.controlled, &first) {
            control.warn_of_no_edges(first);
        }
        let asked = (args.pictures.num_images, args.pictures.seed);
        self.source.check(asked, session, &self.settings, self.start.as_ref())?;
        let all = self.prompts.iter().chain(args.all_others()).map(String::as_str);
        let all: Vec<&str> = all.filter(|p| !p.is_empty()).collect();
        prompts::note_of_syntax(all.iter().copied(), observer);
        if !all.is_empty() {
            session.model().tokens(&all)?.1.iter().for_each(|warning| eprintln!("warning: {warning}"));
        }
        Ok(())
    }

    fn draw(&self, session: &mut Session, output: &Output, observer: &dyn Observer) -> Result<Drawn> {
        let passes = if self.args.with_base { &[true, false][..] } else { &[false] };
        let calls = session.calls(&self.request(&self.settings, self.source.from(), None))?;
        let total = calls * self.prompts.len() * passes.len();
        let progress = Counter::new(observer, "sampling", 0, total as u64);
        let done = Cell::new(0);
        let mut drawn = Drawn::default();
        for (p, prompt) in self.prompts.iter().enumerate() {
            let settings = SampleSettings { prompt: prompt.clone(), ..self.settings.clone() };
            let condition = self.controlled.as_ref().map(|c| c.condition(p, &settings)).transpose()?;
            let mut images: Vec<_> = condition.iter().cloned().collect();
            let tick = || {
                done.set(done.get() + 1);
                progress.set(done.get(), prompt);
            };
            for base in passes {
                session.set_enabled(!base);
                // An adapter's control encoder is not the base model's.
                let control = self.controlled.as_ref().filter(|control| !(*base && control.of_adapter));
                let shown = control.and(condition.as_ref());
                let request =
                    Request { tick: Some(&tick), ..self.request(&settings, self.source.from(), shown) };
                let pictures = session.draw(&request, observer)?;
                let names = if *base { String::new() } else { self.args.adapter.join(", ") };
                let text = |seed| {
                    let mut text = settings.to_text(seed, &session.model().name(), &names);
                    self.args.start.add_to(&mut text);
                    text.extend(control.iter().flat_map(|control| control.text(p)));
                    text
                };
                output.save(p, &pictures, *base, &text)?;
                if !base {
                    drawn.add(self.args, output, p, prompt, &pictures);
                }
                images.extend(pictures.into_iter().map(|p| p.image));
            }
            if drawn.rows.len() < MAX_ROWS {
                drawn.rows.push(GridRow { label: prompt.clone(), images });
            }
        }
        Ok(drawn)
    }

    /// Writes what holds all pictures, and says what was drawn.
    fn finish(self, session: &Session, output: &Output, drawn: Drawn) -> Result<()> {
        let Self { args, controlled, settings, source, prompts, .. } = self;
        let Drawn { rows, latents, pictures } = drawn;
        if prompts.len() > MAX_ROWS {
            eprintln!("note: grid.png holds the first {MAX_ROWS} of {} prompts", prompts.len());
        }
        let passes: &[&str] = if args.with_base { &["base, ", "tuned, "] } else { &[""] };
        let columns = passes
            .iter()
            .flat_map(|pass| source.labels().into_iter().map(move |label| format!("{pass}{label}")));
        if let Some(path) = &args.exchange.save_latents {
            tensor_file::write(path, &[("latents".to_string(), Tensor::cat(&latents, 0))], &[])?;
        }
        let condition = controlled.iter().map(|_| "condition".to_string());
        let grid = Grid { columns: condition.chain(columns).collect(), rows };
        let total = prompts.len() * source.count();
        let all = SampleSettings { prompt: prompts.join("\n"), ..settings };
        let mut text =
            all.to_text(Some(args.pictures.seed), &session.model().name(), &args.adapter.join(", "));
        args.start.add_to(&mut text);
        text.extend(controlled.iter().flat_map(Controlled::about));
        let sheet = output.sheet();
        png::save_png(&sheet, &grid.render(), &text)?;
        if args.json {
            return super::print_json(&json!({
                "device": device::name(session.model().device()), "output": args.output, "pictures": pictures, "grid": sheet, "latents": args.exchange.save_latents,
                "adapters": session.reports(), "start": args.start.to_json(),
                "control": controlled.map(|c| c.about().into_iter().collect::<BTreeMap<_, _>>()),
            }));
        }
        let base =
            if args.with_base { format!(", and {total} of the base model in base/") } else { String::new() };
        print_line!(
            "{total} picture{} in {}{base}",
            if total == 1 { "" } else { "s" },
            args.output.display()
        )?;
        Ok(())
    }
}

impl Drawn {
    fn add(&mut self, args: &SampleArgs, output: &Output, p: usize, prompt: &str, pictures: &[Picture]) {
        for (i, picture) in pictures.iter().enumerate() {
            if args.exchange.save_latents.is_some() {
                self.latents.push(picture.latents.shallow_clone());
            }
            let base = args.with_base.then(|| output.file(p, i, true));
            let file = output.file(p, i, false);
            self.pictures.push(json!({"file": file, "base": base, "prompt": prompt, "seed": picture.seed}));
        }
    }
}

/// Says so where a picture is drawn much larger than the model knows pictures, which costs time and coherence, unless asked for.
fn note_of_size(args: &SampleArgs, settings: &SampleSettings, model: &StableDiffusion) {
    let (width, height, native) = (settings.width, settings.height, model.native_size());
    if args.pictures.width.or(args.pictures.height).is_none() && width * height > 2 * native * native {
        eprintln!(
            "note: drawing at {width}x{height}, but the model was trained at {native}x{native}; --width and --height make the \
             picture smaller"
        );
    }
}

fn asked_prompts(args: &SampleArgs, pairs: Option<&PairsFlags>) -> Result<Vec<String>> {
    let mut prompts = args.prompt.clone();
    prompts.extend(pairs.into_iter().flat_map(PairsFlags::captions));
    if let Some(path) = &args.prompt_file {
        prompts.extend(prompts::read(path)?);
    }
    if prompts.iter().chain(args.all_others()).any(|prompt| prompt.contains('\0')) {
        return Err(Error::config("prompt: expected text, found a NUL character in it"));
    }
    if prompts.is_empty() {
        return Err(Error::config("expected a prompt, found none")
            .with_hint("give --prompt TEXT or --prompt-file FILE"));
    }
    Ok(prompts)
}

fn settings(
    args: &SampleArgs,
    model: &StableDiffusion,
    given: Option<&Noise>,
    pictures: Option<&StartPictures>,
    control: Option<&Controlled>,
) -> Result<SampleSettings> {
    let factor = model.vae.factor();
    let of_picture = pictures.map(|pictures| pictures.size(factor)).transpose()?;
    let of_noise = given.map(|noise| [3, 2].map(|dim| noise.latents.size()[dim] * factor));
    let of_condition = control.map(|control| control.size(factor)).transpose()?.flatten();
    let own = of_picture.or(of_noise).or(of_condition).unwrap_or([model.native_size(); 2]);
    let (sampler, note) = match args.sampling.scheduler {
        Some(kind) => (kind, None),
        None => SamplerKind::from_config(&model.scheduler)?,
    };
    note.into_iter().chain(sampler.note(&model.scheduler)).for_each(|note| eprintln!("note: {note}"));
    Ok(SampleSettings {
        prompt: String::new(),
        negative_prompt: args.negative_prompt.clone(),
        sampler,
        spacing: args.sampling.timestep_spacing,
        karras: args.sampling.karras_sigmas,
        steps: args.sampling.steps,
        guidance: args.sampling.guidance,
        guidance_rescale: args.sampling.guidance_rescale,
        width: args.pictures.width.unwrap_or(own[0]),
        height: args.pictures.height.unwrap_or(own[1]),
        texts: TextSettings {
            prompt_2: args.texts.prompt_2.clone(),
            negative_prompt_2: args.texts.negative_prompt_2.clone(),
            clip_skip: args.texts.clip_skip,
        },
        sizes: args.sizes.settings(),
    })
}
