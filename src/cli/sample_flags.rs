//! The flags of `hra sample`.

use crate::cli::choice::choice;
use crate::cli::control::ControlArgs;
use crate::cli::model_flags::ModelFlags;
use crate::cli::start::StartArgs;
use crate::diffusion::sample::SizeSettings;
use crate::diffusion::sampler::{SamplerKind, Spacing};
use crate::platform::device::DeviceChoice;
use crate::platform::precision::Precision;
use clap::Args;
use std::path::PathBuf;

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
    pub model: PathBuf,
    #[command(flatten)]
    pub files: ModelFlags,
    /// Adapter folder, LoRA file or hub id, with a strength, of its control encoder too: 1 is as trained, 0 the base model. Several
    /// act in their order
    #[arg(long, value_name = "DIR[=STRENGTH]")]
    pub adapter: Vec<String>,
    /// What to draw; may be given several times
    #[arg(long)]
    pub prompt: Vec<String>,
    /// File with a prompt on each line; empty lines and lines that begin with # are passed over
    #[arg(long, value_name = "FILE")]
    pub prompt_file: Option<PathBuf>,
    /// What not to draw
    #[arg(long, default_value = "", hide_default_value = true)]
    pub negative_prompt: String,
    #[command(flatten)]
    pub texts: TextArgs,
    #[command(flatten)]
    pub sizes: SizeArgs,
    /// Folder for the pictures: PROMPT-PICTURE.png, counted from 0000-0000 (with --pairs, their own names), and grid.png
    #[arg(long, alias = "output-dir", value_name = "DIR")]
    pub output: PathBuf,
    /// Replace pictures that hra drew into that folder before, instead of counting on after them
    #[arg(long)]
    pub overwrite: bool,
    /// Draw each picture with the base model too, from the same noise: in base/, and beside the others in grid.png
    #[arg(long)]
    pub with_base: bool,
    /// Print what was drawn as JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub pictures: PictureArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    pub machine: MachineArgs,
    #[command(flatten)]
    pub control: ControlArgs,
    #[command(flatten)]
    pub start: StartArgs,
    #[command(flatten)]
    pub exchange: ExchangeArgs,
}

impl SampleArgs {
    /// Every text beside the prompts.
    pub fn all_others(&self) -> impl Iterator<Item = &String> {
        let second = self.texts.prompt_2.iter().chain(&self.texts.negative_prompt_2);
        [&self.negative_prompt].into_iter().chain(second)
    }
}

/// How texts are read.
#[derive(Debug, Args)]
pub struct TextArgs {
    /// What the second text encoder of Stable Diffusion XL reads, of every prompt [default: the prompt]
    #[arg(long, value_name = "PROMPT", help_heading = "Texts")]
    pub prompt_2: Option<String>,
    /// What it reads of what not to draw [default: --negative-prompt]
    #[arg(long, value_name = "PROMPT", requires = "negative_prompt", help_heading = "Texts")]
    pub negative_prompt_2: Option<String>,
    /// Layers of the text encoders that are left out for the prompt, as in diffusers: A1111's Clip skip is one more, and is for the
    /// negative prompt too
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Texts")]
    pub clip_skip: usize,
}

/// What Stable Diffusion XL is told of sizes.
#[derive(Debug, Args)]
pub struct SizeArgs {
    /// Size of the picture before it was cropped: small ones give blurred pictures [default: that of the picture]
    #[arg(long, value_name = "WIDTHxHEIGHT", value_parser = size, help_heading = "Stable Diffusion XL")]
    pub original_size: Option<[i64; 2]>,
    /// Where the picture was cropped: 0,0 gives centred subjects [default: 0,0]
    #[arg(long, alias = "crops-coords-top-left", value_name = "TOP,LEFT", value_parser = place, help_heading = "Stable Diffusion XL")]
    pub crop: Option<[i64; 2]>,
    /// Size of the result [default: that of the picture]
    #[arg(long, value_name = "WIDTHxHEIGHT", value_parser = size, help_heading = "Stable Diffusion XL")]
    pub target_size: Option<[i64; 2]>,
    /// As --original-size, of what not to draw; goes with --negative-target-size
    #[arg(long, value_name = "WIDTHxHEIGHT", value_parser = size, help_heading = "Stable Diffusion XL")]
    pub negative_original_size: Option<[i64; 2]>,
    /// As --crop, of what not to draw
    #[arg(long, alias = "negative-crops-coords-top-left", value_name = "TOP,LEFT", value_parser = place, help_heading = "Stable Diffusion XL")]
    pub negative_crop: Option<[i64; 2]>,
    /// As --target-size, of what not to draw
    #[arg(long, value_name = "WIDTHxHEIGHT", value_parser = size, help_heading = "Stable Diffusion XL")]
    pub negative_target_size: Option<[i64; 2]>,
}

impl SizeArgs {
    /// As settings.
    pub fn settings(&self) -> SizeSettings {
        SizeSettings {
            original: self.original_size,
            crop: self.crop,
            target: self.target_size,
            negative_original: self.negative_original_size,
            negative_crop: self.negative_crop,
            negative_target: self.negative_target_size,
        }
    }
}

/// `1024x768` as height and width.
fn size(text: &str) -> Result<[i64; 2], String> {
    let [width, height] = two(text, 'x').ok_or("expected WIDTHxHEIGHT, such as 1024x768")?;
    Ok([height, width])
}

/// `0,128` as top and left.
fn place(text: &str) -> Result<[i64; 2], String> {
    two(text, ',').ok_or_else(|| "expected TOP,LEFT, such as 0,128".to_string())
}

fn two(text: &str, between: char) -> Option<[i64; 2]> {
    let (first, second) = text.split_once(between)?;
    Some([first.trim().parse().ok()?, second.trim().parse().ok()?])
}

/// How many pictures, from which seeds and how large.
#[derive(Debug, Args)]
pub struct PictureArgs {
    /// Pictures for each prompt [default: 1, or as many as --latents holds]
    #[arg(long, alias = "num-images-per-prompt", value_name = "N", help_heading = "Pictures")]
    pub num_images: Option<usize>,
    /// Seed of the first picture of each prompt
    #[arg(long, default_value_t = 0, help_heading = "Pictures")]
    pub seed: u64,
    /// Width in pixels [default: that of --image, --latents or --control, else what the model was trained at]
    #[arg(long, value_name = "PIXELS", help_heading = "Pictures")]
    pub width: Option<i64>,
    /// Height in pixels [default: that of --image, --latents or --control, else what the model was trained at]
    #[arg(long, value_name = "PIXELS", help_heading = "Pictures")]
    pub height: Option<i64>,
}

/// How a picture is drawn.
#[derive(Debug, Args)]
pub struct SamplingArgs {
    /// Scheduler [default: the model's]
    #[arg(long, alias = "sampler", value_parser = choice::<SamplerKind>(), help_heading = "Sampling")]
    pub scheduler: Option<SamplerKind>,
    /// How timesteps are spread [default: the sampler's own way]
    #[arg(long, value_parser = choice::<Spacing>(), help_heading = "Sampling")]
    pub timestep_spacing: Option<Spacing>,
    /// Karras' noise levels: true or false [default: true for heun, unipc and dpm++2m-karras]
    #[arg(long, value_name = "BOOL", help_heading = "Sampling")]
    pub karras_sigmas: Option<bool>,
    /// Number of steps
    #[arg(long, alias = "num-inference-steps", default_value_t = 30, help_heading = "Sampling")]
    pub steps: usize,
    /// Classifier-free guidance; 1 is none
    #[arg(long, aliases = ["guidance-scale", "cfg", "cfg-scale"], default_value_t = 7.5, help_heading = "Sampling")]
    pub guidance: f64,
    /// How far guidance's contrast is brought back to that of the prompt alone: 0 not at all, 1 wholly; 0.7 for models of zero terminal
    /// SNR
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, help_heading = "Sampling")]
    pub guidance_rescale: f64,
    /// Pictures drawn at once; in a batch of another size pixels may be off by a level of 255
    #[arg(long, default_value_t = 4, help_heading = "Sampling")]
    pub batch_size: usize,
}

/// Where it is computed, and in which number format.
#[derive(Debug, Args)]
pub struct MachineArgs {
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value_t = DeviceChoice::Auto, help_heading = "Sampling")]
    pub device: DeviceChoice,
    /// Number format of the model at rest; a CPU computes in f32 what it is slow in (f16, and bf16 without AMX)
    #[arg(long, alias = "mixed-precision", value_parser = choice::<Precision>(), default_value = "f32", help_heading = "Sampling")]
    pub dtype: Precision,
    /// CPU threads, 1024 at most, also for reading pictures; those that wait for work soon sleep, unless OMP_WAIT_POLICY or GOMP_SPINCOUNT says otherwise [default: libtorch's choice]
    #[arg(long, help_heading = "Sampling")]
    pub threads: Option<i32>,
}

/// Noise from and latents for other software.
#[derive(Debug, Args)]
pub struct ExchangeArgs {
    /// Unit noise to start from: tensor `latents` (b, c, h, w) of a safetensors file, the same for each prompt. With --image,
    /// `image_noise` is the noise of the picture's latents and `masked_image_noise` that of the masked picture's, which an
    /// inpainting model sees; where one is missing, the mean that the encoder gives is taken
    #[arg(long, value_name = "FILE", help_heading = "Exchange with other software")]
    pub latents: Option<PathBuf>,
    /// Noise of each step for ancestral samplers: tensor `noise` (steps, b, c, h, w)
    #[arg(long, value_name = "FILE", requires = "latents", help_heading = "Exchange with other software")]
    pub step_noise: Option<PathBuf>,
    /// Write the final latents of all pictures, prompt by prompt, as tensor `latents`
    #[arg(long, value_name = "FILE", help_heading = "Exchange with other software")]
    pub save_latents: Option<PathBuf>,
}
