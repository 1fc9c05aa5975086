//! The flags of `hra sample`.

use crate::cli::choice::choice;
use crate::cli::control::ControlArgs;
use crate::cli::model_flags::ModelFlags;
use crate::cli::start::StartArgs;
use crate::diffusion::sampler::{SamplerKind, Spacing};
use crate::platform::device::{DeviceChoice, Precision};
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
    /// Number format of the model
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
