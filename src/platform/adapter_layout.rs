//! Which files of a folder or repository are an adapter, and of which network: from their names alone, so that one rule
//! serves a disk and a hub.
//!
//! What writes adapters, and where:
//!
//! ```text
//! hra                       adapter_config.json + adapter_model.safetensors, text_encoder/ (the same), control_encoder/
//! PEFT's save_pretrained    the two files; below NAME/ for an adapter that is not called `default`
//! PEFT's DreamBooth scripts unet/ and text_encoder/; those of HRA, OFT and BOFT unet/STEP/ and text_encoder/STEP/
//! diffusers                 pytorch_lora_weights.safetensors; checkpoint-STEP/ beside it
//! kohya's scripts           FILE.safetensors, FILE-000010.safetensors ..
//! full fine-tuning          unet/diffusion_pytorch_model.safetensors
//! ```

use crate::error::{Error, Result};
use crate::platform::disguise::pickle_line;
use crate::platform::files::{self, Kind, shell_word};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// PEFT's settings of an adapter.
pub const PEFT_CONFIG: &str = "adapter_config.json";
/// PEFT's tensors of an adapter.
pub const PEFT_WEIGHTS: &str = "adapter_model.safetensors";
/// The same as PEFT wrote them before it had safetensors.
const PEFT_PICKLE: &str = "adapter_model.bin";
/// The name under which diffusers' `save_lora_weights` writes.
pub const DIFFUSERS_LORA: &str = "pytorch_lora_weights.safetensors";
/// One network of diffusers.
const NETWORK: &str = "diffusion_pytorch_model.safetensors";
/// Folders of networks, as diffusers calls them.
const UNET: &str = "unet";
const TEXT_ENCODERS: [&str; 3] = ["text_encoder", "text_encoder_2", "text_encoder_3"];
/// Our control encoder, and the checkpoints of a run.
const CONTROL: &str = "control_encoder";
const CHECKPOINTS: &str = "checkpoints";
/// What Python's pickle wrote.
const PICKLED: [&str; 4] = [".bin", ".pt", ".pth", ".ckpt"];
/// Beginnings of files by which a training goes on, and nothing draws.
const TRAINING_STATE: [&str; 6] =
    ["optimizer", "scheduler", "scaler", "random_states", "rng_state", "training_args"];

/// Endings of pictures.
const PICTURES: [&str; 4] = [".png", ".jpg", ".jpeg", ".webp"];

/// How many folders deep an adapter may lie: `unet/STEP/NAME`.
const DEPTH: usize = 3;
/// More files than a folder of adapters has.
const MOST_FILES: usize = 20_000;

/// How a part of an adapter is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AdapterForm {
    /// PEFT's folder.
    Peft,
    /// One file of a LoRA.
    Lora,
    /// The weights of a whole UNet.
    FullUNet,
}

/// A part of an adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayoutPart {
    /// How it is kept.
    pub form: AdapterForm,
    /// PEFT's folder, or the file, below the folder that was looked at; empty for that folder itself.
    pub place: String,
}

/// What a folder holds of an adapter.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct AdapterLayout {
    /// The UNet's before the text encoders'; empty where there is a control encoder alone.
    pub parts: Vec<LayoutPart>,
    /// Weights and adapters that are part of none of it.
    pub unused: Vec<String>,
}

/// Why a folder is no adapter that can be used.
#[derive(Debug, PartialEq, Eq)]
pub struct NoAdapter {
    /// What was found; completes `expected an adapter, found ..`.
    pub found: String,
    /// What to do about it.
    pub hint: String,
}

impl AdapterLayout {
    /// Finds the adapter whose files have these names, `/` between folders.
    ///
    /// Errors: none, one half of it, or several of which one must be chosen.
    pub fn find(names: &BTreeSet<String>) -> std::result::Result<Self, NoAdapter> {
        Listing { names }.layout("")
    }

    /// What a user should know of files that are passed over; none where there are none.
    pub fn note(&self, path: &str) -> Option<String> {
        let unused = self.unused.join(", ");
        (!unused.is_empty()).then(|| format!("{path} also holds what is not used: {unused}"))
    }
}

/// The parts of an adapter on a disk.
#[derive(Debug)]
pub struct AdapterParts {
    /// PEFT's folders and the other files; none where there is a control encoder alone.
    pub parts: Vec<(AdapterForm, PathBuf)>,
    /// What a user should know of files that are passed over.
    pub note: Option<String>,
}

impl AdapterParts {
    /// Finds the adapter at `path`: a folder, a LoRA file, or a file of PEFT's folder, which stands for the folder.
    ///
    /// Errors: those of [`AdapterLayout::find`]; a folder that cannot be listed.
    pub fn at(path: &Path) -> Result<Self> {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let folder = path.parent().filter(|folder| {
            [PEFT_CONFIG, PEFT_WEIGHTS, PEFT_PICKLE].contains(&name) && folder.join(PEFT_CONFIG).is_file()
        });
        let folder = match folder {
            Some(folder) if folder.as_os_str().is_empty() => Path::new("."),
            Some(folder) => folder,
            None if path.is_file() => {
                return Ok(Self { parts: vec![(AdapterForm::Lora, path.to_path_buf())], note: None });
            }
            None => path,
        };
        let layout = AdapterLayout::find(&names_below(folder)?).map_err(|lack| {
            Error::format(folder, format!("expected an adapter, found {}", lack.found)).with_hint(lack.hint)
        })?;
        let place = |place: &str| if place.is_empty() { folder.to_path_buf() } else { folder.join(place) };
        let parts = layout.parts.iter().map(|part| (part.form, place(&part.place))).collect();
        Ok(Self { parts, note: layout.note(&folder.to_string_lossy()) })
    }
}

/// Names of the files in a folder and in those below it that may hold an adapter, `/` between folders; without hidden ones, and
/// with one picture of each folder, which may hold thousands.
pub fn names_below(dir: &Path) -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    let mut folders = vec![(String::new(), dir.to_path_buf(), 0)];
    while let Some((prefix, path, depth)) = folders.pop() {
        let entries = match files::list_dir(&path) {
            Ok(entries) => entries,
            Err(error) if depth == 0 => return Err(error),
            // A folder that may not be read is none of an adapter's.
            Err(_) => continue,
        };
        let mut has_picture = false;
        for entry in entries {
            let name = entry.name.to_string_lossy();
            let is_picture = PICTURES.iter().any(|end| name.ends_with(end));
            if name.starts_with('.') || names.len() >= MOST_FILES || (is_picture && has_picture) {
                continue;
            }
            has_picture |= is_picture;
            let name = format!("{prefix}{name}");
            match entry.kind {
                Kind::File => drop(names.insert(name)),
                Kind::Folder if depth < DEPTH => folders.push((format!("{name}/"), entry.path, depth + 1)),
                _ => {}
            }
        }
    }
    Ok(names)
}

/// The names of files, and questions about them. Folders are given without the last slash, the top is empty.
struct Listing<'a> {
    names: &'a BTreeSet<String>,
}

fn join(dir: &str, name: &str) -> String {
    if dir.is_empty() { name.to_string() } else { format!("{dir}/{name}") }
}

impl<'a> Listing<'a> {
    fn has(&self, dir: &str, name: &str) -> bool {
        self.names.contains(&join(dir, name))
    }

    /// Names below a folder, relative to it.
    fn below(&self, dir: &str) -> impl Iterator<Item = &'a str> + use<'a> {
        let prefix = if dir.is_empty() { String::new() } else { format!("{dir}/") };
        self.names.iter().filter_map(move |name| name.strip_prefix(prefix.as_str()))
    }

    /// Files right in a folder.
    fn files(&self, dir: &str) -> Vec<&'a str> {
        self.below(dir).filter(|name| !name.contains('/')).collect()
    }

    /// Folders at any depth below a folder, relative to it, that hold an adapter by its name.
    fn marked(&self, dir: &str) -> Vec<&'a str> {
        let of = |name: &'a str| {
            let (folder, file) = name.rsplit_once('/')?;
            [PEFT_CONFIG, DIFFUSERS_LORA].contains(&file).then_some(folder)
        };
        let folders: BTreeSet<&str> = self.below(dir).filter_map(of).collect();
        folders.into_iter().collect()
    }

    /// Folders below `dir` that hold adapters and belong to no network: other adapters, and checkpoints.
    fn others(&self, dir: &str) -> (Vec<String>, Vec<String>) {
        let (mut others, mut steps) = (BTreeSet::new(), BTreeSet::new());
        for path in self.marked(dir) {
            let mut folders = path.split('/');
            match (folders.next().unwrap_or_default(), folders.next()) {
                (UNET | CONTROL, _) => {}
                (name, _) if TEXT_ENCODERS.contains(&name) => {}
                (CHECKPOINTS, Some(step)) => drop(steps.insert(join(CHECKPOINTS, step))),
                (name, _) if name.starts_with("checkpoint-") => drop(steps.insert(name.to_string())),
                (name, _) => drop(others.insert(name.to_string())),
            }
        }
        (others.into_iter().collect(), steps.into_iter().collect())
    }

    fn layout(&self, dir: &str) -> std::result::Result<AdapterLayout, NoAdapter> {
        let top = self.named(dir)?;
        let unet = self.network(&join(dir, UNET))?;
        let texts = self.text_encoders(dir)?;
        if let (Some(top), Some(unet)) = (&top, &unet) {
            return Err(several(&[&top.place, &unet.place].map(|place| shown(place))));
        }
        let (others, steps) = self.others(dir);
        let mut parts: Vec<LayoutPart> = [top, unet].into_iter().chain(texts).flatten().collect();
        if parts.is_empty() {
            parts.extend(self.own(dir)?);
        }
        if parts.is_empty() {
            parts.extend(self.full(dir)?);
        }
        let control = self.has(&join(dir, CONTROL), "config.json");
        if parts.is_empty() && !control {
            return match &others[..] {
                [] => Err(self.nothing(dir, &steps)),
                [one] => self.layout(&join(dir, one)).map(|mut layout| {
                    layout.unused.extend(self.unused(dir, &layout.parts, &[]));
                    layout
                }),
                many => {
                    Err(several(&many.iter().map(|name| format!("{}/", join(dir, name))).collect::<Vec<_>>()))
                }
            };
        }
        let unused = self.unused(dir, &parts, &others);
        Ok(AdapterLayout { parts, unused })
    }

    /// The adapter that lies right in a folder, under a name that says what it is.
    fn named(&self, dir: &str) -> std::result::Result<Option<LayoutPart>, NoAdapter> {
        let [config, weights] = [PEFT_CONFIG, PEFT_WEIGHTS].map(|name| self.has(dir, name));
        let lora = self.has(dir, DIFFUSERS_LORA);
        Ok(match (config, weights) {
            (true, true) => Some(LayoutPart { form: AdapterForm::Peft, place: dir.to_string() }),
            (true, false) => return Err(self.without_weights(dir)),
            (false, _) if lora => {
                Some(LayoutPart { form: AdapterForm::Lora, place: join(dir, DIFFUSERS_LORA) })
            }
            (false, true) => {
                return Err(NoAdapter {
                    found: format!("{} without {PEFT_CONFIG}, half of an adapter", join(dir, PEFT_WEIGHTS)),
                    hint: format!("{PEFT_CONFIG} has its method, rank and alpha: copy it beside it"),
                });
            }
            (false, false) => None,
        })
    }

    /// The adapter that lies right in a folder: a named one, or the only file that may be a LoRA.
    fn own(&self, dir: &str) -> std::result::Result<Option<LayoutPart>, NoAdapter> {
        if let Some(named) = self.named(dir)? {
            return Ok(Some(named));
        }
        // Beside a whole model it would be that model as one file.
        let is_model = self.has(dir, "model_index.json");
        let loras = self.files(dir).into_iter().filter(|name| !is_model && may_be_lora(name));
        match &loras.collect::<Vec<_>>()[..] {
            [] => Ok(None),
            [one] => Ok(Some(LayoutPart { form: AdapterForm::Lora, place: join(dir, one) })),
            many => Err(NoAdapter {
                found: format!("{} LoRA files: {}", many.len(), many.join(", ")),
                hint: "give the path of the one you mean; several act together, each with its own --adapter"
                    .into(),
            }),
        }
    }

    /// The adapter of the network in a folder: right there, or in the one folder below that has one.
    fn network(&self, dir: &str) -> std::result::Result<Option<LayoutPart>, NoAdapter> {
        if let Some(own) = self.own(dir)? {
            return Ok(Some(own));
        }
        match &self.marked(dir)[..] {
            [] => Ok(None),
            [one] => self.own(&join(dir, one)),
            many => {
                Err(several(&many.iter().map(|name| format!("{}/", join(dir, name))).collect::<Vec<_>>()))
            }
        }
    }

    fn text_encoders(&self, dir: &str) -> std::result::Result<[Option<LayoutPart>; 2], NoAdapter> {
        let [first, second, third] = TEXT_ENCODERS.map(|name| self.network(&join(dir, name)));
        if third?.is_some() {
            return Err(NoAdapter {
                found: format!("one for {}/ too", TEXT_ENCODERS[2]),
                hint: "a third text encoder is of Stable Diffusion 3, which is not supported".into(),
            });
        }
        Ok([first?, second?])
    }

    /// The weights of a whole UNet, where nothing else is an adapter.
    fn full(&self, dir: &str) -> std::result::Result<Option<LayoutPart>, NoAdapter> {
        if self.has(dir, "model_index.json") {
            return Err(NoAdapter {
                found: "a whole model (model_index.json)".into(),
                hint: "give it with --model in place of the base model".into(),
            });
        }
        let place = [join(&join(dir, UNET), NETWORK), join(dir, NETWORK)];
        let Some(place) = place.into_iter().find(|place| self.names.contains(place)) else { return Ok(None) };
        let text = join(dir, TEXT_ENCODERS[0]);
        if let Some(text) = self.files(&text).into_iter().find(|name| is_weights(name)) {
            return Err(NoAdapter {
                found: format!("a whole UNet and a whole text encoder ({}/{text})", TEXT_ENCODERS[0]),
                hint: "fully fine-tuned text encoders are not put on another model: save both as one model in Python, \
                       StableDiffusionPipeline.from_pretrained(BASE, unet=.., text_encoder=..).save_pretrained(\"DIR\"), and \
                       give --model DIR"
                    .into(),
            });
        }
        Ok(Some(LayoutPart { form: AdapterForm::FullUNet, place }))
    }

    /// Weights right in the folder and in those of networks, and whole adapters, that `parts` do not use.
    fn unused(&self, dir: &str, parts: &[LayoutPart], others: &[String]) -> Vec<String> {
        let mut unused = Vec::new();
        let [first, second, _] = TEXT_ENCODERS.map(|name| join(dir, name));
        for folder in [dir.to_string(), join(dir, UNET), first, second] {
            for file in self.files(&folder).into_iter().filter(|name| is_weights(name)) {
                let name = join(&folder, file);
                let is_used = parts.iter().any(|part| match part.form {
                    // The pickle beside the tensors is the same once more.
                    AdapterForm::Peft => part.place == folder && [PEFT_WEIGHTS, PEFT_PICKLE].contains(&file),
                    _ => part.place == name,
                });
                if !is_used {
                    unused.push(name);
                }
            }
        }
        // Whatever lies below a network's own adapter.
        for part in parts.iter().filter(|part| !part.place.is_empty() && part.form == AdapterForm::Peft) {
            let below = self.marked(&part.place).into_iter();
            unused.extend(below.map(|name| format!("{}/", join(&part.place, name))));
        }
        unused.extend(others.iter().map(|name| format!("{}/", join(dir, name))));
        unused
    }

    fn without_weights(&self, dir: &str) -> NoAdapter {
        let config = join(dir, PEFT_CONFIG);
        if self.has(dir, PEFT_PICKLE) {
            let [from, to] = [PEFT_PICKLE, PEFT_WEIGHTS].map(|name| shell_word(&join(dir, name)));
            return NoAdapter {
                found: format!(
                    "{config} with {PEFT_PICKLE}, which is pickled: to load it is to run code that is in it"
                ),
                hint: format!("convert it once, in that folder: {}", pickle_line(&from, &to)),
            };
        }
        NoAdapter {
            found: format!("{config} without {PEFT_WEIGHTS}, half of an adapter"),
            hint: format!("copy {PEFT_WEIGHTS} beside it"),
        }
    }

    /// What there is in place of an adapter.
    fn nothing(&self, dir: &str, steps: &[String]) -> NoAdapter {
        let files = self.files(dir);
        let folders: BTreeSet<String> =
            self.below(dir).filter_map(|name| Some(format!("{}/", name.split_once('/')?.0))).collect();
        let all: Vec<String> = files.iter().map(|name| name.to_string()).chain(folders).collect();
        let found = match all.len() {
            0 => "no files".to_string(),
            n if n <= 8 => all.join(", "),
            n => format!("{}, .. ({n} in all)", all[..8].join(", ")),
        };
        let pickled =
            files.iter().find(|name| PICKLED.iter().any(|end| name.ends_with(end)) && is_weights(name));
        let hint = if !steps.is_empty() {
            let shown = steps.iter().rev().take(6).rev().map(|step| join(dir, step)).collect::<Vec<_>>();
            format!("there are adapters below it, {}: give the one you mean", shown.join(", "))
        } else if let Some(file) = pickled {
            let stem = file.rsplit_once('.').map_or(*file, |(stem, _)| stem);
            format!(
                "{file} is pickled, which can run code and is not read; convert it once: {}",
                pickle_line(
                    &shell_word(&join(dir, file)),
                    &shell_word(&join(dir, &format!("{stem}.safetensors")))
                )
            )
        } else {
            format!(
                "give a folder with {PEFT_CONFIG} and {PEFT_WEIGHTS} (or with unet/ and text_encoder/ that hold them), a run, or \
                 a LoRA file (.safetensors)"
            )
        };
        NoAdapter { found, hint }
    }
}

fn several(places: &[String]) -> NoAdapter {
    NoAdapter {
        found: format!("several: {}", places.join(", ")),
        hint: "give the folder of the one you mean; the UNet's and the text encoder's act together, each with its own --adapter"
            .into(),
    }
}

/// A place as a user knows it.
fn shown(place: &str) -> String {
    if place.is_empty() { PEFT_CONFIG.into() } else { place.to_string() }
}

/// Whether a file holds weights by its name, and not what a training goes on with.
fn is_weights(name: &str) -> bool {
    let ends = name.ends_with(".safetensors") || PICKLED.iter().any(|end| name.ends_with(end));
    ends && !TRAINING_STATE.iter().any(|start| name.starts_with(start))
}

/// Whether a file may hold a LoRA by its name: not one of those that have other uses.
fn may_be_lora(name: &str) -> bool {
    let others = ["model.safetensors", "model-", "diffusion_pytorch_model"];
    name.ends_with(".safetensors") && is_weights(name) && !others.iter().any(|other| name.starts_with(other))
}
