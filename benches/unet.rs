//! Forward and backward of one training step of the embedded model's UNet: nothing trained, and every method. One thread, f32,
//! on the CPU; 4 pictures of 64 px, as configs/demo.toml trains.
//!
//! ```text
//! cargo bench --bench unet
//! ```
//!
//! Times of two runs are not comparable, ratios within one run are. The row without adapter computes the gradient of the
//! text states, which passes through the same layers as an adapter's: what the others cost beyond it is the adapter's.

use divan::Bencher;
use hra::adapter::peft::Bias;
use hra::adapter::target::{ATTENTION, TargetRule};
use hra::attach;
use hra::diffusion::noise::NoiseSchedule;
use hra::diffusion::stable_diffusion::StableDiffusion;
use hra::model::Conditioning;
use hra::train::config::TrainConfig;
use hra::train::loss::{Batch, training_loss};
use std::fmt;
use std::path::Path;
use tch::{Device, Kind, Tensor};

const OPTIONS: (Kind, Device) = (Kind::Float, Device::Cpu);
const PICTURES: i64 = 4;

fn main() {
    tch::set_num_threads(1);
    divan::main();
}

/// What is trained: settings of `hra train`, none for nothing. divan sorts by name.
const METHODS: [(&str, &str); 9] = [
    ("1 frozen", ""),
    ("2 LoRA r 4", "method = 'lora'\nrank = 4"),
    ("2 LoRA r 8", "method = 'lora'\nrank = 8"),
    ("3 HRA r 8", "method = 'hra'\nrank = 8"),
    ("4 HRA r 8, Gram-Schmidt", "method = 'hra'\nrank = 8\ngram_schmidt = true"),
    ("5 DoRA r 4", "method = 'dora'\nrank = 4"),
    ("6 OFT 4 blocks", "method = 'oft'\nrank = 4"),
    ("7 BOFT 4 blocks", "method = 'boft'\nrank = 4"),
    ("8 full", "method = 'full'"),
];

/// One of [`METHODS`].
#[derive(Clone, Copy)]
struct Row(usize);

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(METHODS[self.0].0)
    }
}

#[divan::bench(args = (0..METHODS.len()).map(Row), sample_size = 1, sample_count = 100, max_time = 7)]
fn step(bencher: Bencher, Row(row): Row) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/tiny-sd");
    let mut model = StableDiffusion::load(&dir, OPTIONS.0, OPTIONS.1).expect("the embedded model");
    let schedule = NoiseSchedule::new(&model.scheduler, OPTIONS.1).expect("the embedded model's schedule");
    tch::manual_seed(0);
    let side = model.unet.sample_size().expect("the embedded model says its size");
    let shape = [PICTURES, model.denoiser().in_channels(), side, side];
    let (states, _) = model.encode_prompts(&["a fluent 3d emoji of a cat face"]).expect("a short prompt");
    let batch = Batch {
        latents: Tensor::randn(shape, OPTIONS),
        noise: Tensor::randn(shape, OPTIONS),
        timesteps: Tensor::from_slice(&[20i64, 300, 600, 980]),
        conditioning: states.repeat(PICTURES),
        conditions: None,
        class_half: true,
    };
    let (batch, trained) = if METHODS[row].1.is_empty() {
        let states = batch.conditioning.states().detach().set_requires_grad(true);
        let trained = vec![states.shallow_clone()];
        (Batch { conditioning: Conditioning::new(states), ..batch }, trained)
    } else {
        (batch, attach_new(&mut model, METHODS[row].1))
    };
    let step = || {
        let loss = training_loss(&model.unet, None, &schedule, &batch, 1.0, None);
        Tensor::run_backward(&[loss.total], &trained, false, false)
    };
    step(); // the first call allocates
    bencher.bench_local(step);
}

/// A method as `hra train` puts it on; the trained tensors.
fn attach_new(model: &mut StableDiffusion, settings: &str) -> Vec<Tensor> {
    let settings = format!("[adapter]\n{settings}").parse().expect("TOML");
    let method = TrainConfig::from_tables(&[&settings]).expect("the settings are right").adapter.method();
    let method = method.ok().flatten().expect("the words name a method");
    let targets = TargetRule::from_words(&ATTENTION.map(String::from)).expect("plain names");
    attach::attach_new(&mut model.unet, ("", &targets), &method, Bias::None, 0)
        .expect("the layers can be adapted");
    let parameters = attach::pack_parameters(&mut [&mut model.unet]);
    parameters.views().iter().map(|(_, view)| view.shallow_clone()).collect()
}
