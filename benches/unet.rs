//! Forward and backward of one training step of the embedded model's UNet: nothing trained, LoRA, HRA. One thread, f32,
//! on the CPU; 4 pictures of 64 px, as configs/demo.toml trains.
//!
//! ```text
//! cargo bench --bench unet
//! ```
//!
//! Times of two runs are not comparable, ratios within one run are. The row without adapter computes the gradient of the
//! text states, which passes through the same layers as an adapter's: what the others cost beyond it is the adapter's.

use divan::Bencher;
use hra::adapter::LowRank;
use hra::adapter::hra::{HraConfig, HraInit};
use hra::adapter::peft::Bias;
use hra::adapter::target::{ATTENTION, TargetRule};
use hra::model::attach;
use hra::model::layers::Layers;
use hra::noise::NoiseSchedule;
use hra::stable_diffusion::StableDiffusion;
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

/// What is trained.
#[derive(Clone, Copy)]
enum Method {
    Frozen,
    Lora(i64),
    Hra { gram_schmidt: bool },
}

/// divan sorts by these names.
impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Frozen => write!(f, "1 frozen"),
            Self::Lora(rank) => write!(f, "2 LoRA r {rank}"),
            Self::Hra { gram_schmidt: false } => write!(f, "3 HRA r 8"),
            Self::Hra { gram_schmidt: true } => write!(f, "4 HRA r 8, Gram-Schmidt"),
        }
    }
}

const METHODS: [Method; 5] = [
    Method::Frozen,
    Method::Lora(4),
    Method::Lora(8),
    Method::Hra { gram_schmidt: false },
    Method::Hra { gram_schmidt: true },
];

#[divan::bench(args = METHODS, sample_size = 1, sample_count = 100, max_time = 7)]
fn step(bencher: Bencher, method: Method) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/tiny-sd");
    let mut model = StableDiffusion::load(&dir, OPTIONS.0, OPTIONS.1).expect("the embedded model");
    let schedule = NoiseSchedule::new(&model.scheduler, OPTIONS.1).expect("the embedded model's schedule");
    tch::manual_seed(0);
    let side = model.unet.sample_size().expect("the embedded model says its size");
    let shape = [PICTURES, model.unet.in_channels(), side, side];
    let (states, _) = model.encode_prompts(&["a fluent 3d emoji of a cat face"]).expect("a short prompt");
    let batch = Batch {
        latents: Tensor::randn(shape, OPTIONS),
        noise: Tensor::randn(shape, OPTIONS),
        timesteps: Tensor::from_slice(&[20i64, 300, 600, 980]),
        context: states.repeat([PICTURES, 1, 1]),
        class_half: true,
    };
    let (batch, trained) = match method {
        Method::Frozen => {
            let context = batch.context.detach().set_requires_grad(true);
            let trained = vec![context.shallow_clone()];
            (Batch { context, ..batch }, trained)
        }
        Method::Lora(rank) => (batch, attach_lora(&mut model, rank)),
        Method::Hra { gram_schmidt } => (batch, attach_hra(&mut model, gram_schmidt)),
    };
    let step = || {
        let loss = training_loss(&model.unet, &schedule, &batch, 1.0, None);
        Tensor::run_backward(&[loss.total], &trained, false, false)
    };
    step(); // the first call allocates
    bencher.bench_local(step);
}

fn targets() -> TargetRule {
    TargetRule::from_words(&ATTENTION.map(String::from)).expect("plain names")
}

/// HRA as `hra train` puts it on; the trained tensors.
fn attach_hra(model: &mut StableDiffusion, gram_schmidt: bool) -> Vec<Tensor> {
    let config = HraConfig { rank: 8, gram_schmidt, init: HraInit::Auto, allow_odd_rank: false };
    attach::attach_new(&mut model.unet, &targets(), config, Bias::None, 0)
        .expect("the model has attention layers");
    let parameters = attach::pack_parameters(&mut model.unet);
    parameters.views().iter().map(|(_, view)| view.shallow_clone()).collect()
}

/// LoRA on the same layers, as a yardstick: the low-rank product that sampling uses, with gradients.
fn attach_lora(model: &mut StableDiffusion, rank: i64) -> Vec<Tensor> {
    let targets = targets();
    let mut trained = Vec::new();
    for layer in model.unet.layers_mut() {
        if targets.matches(&layer.name) {
            let size = layer.matrix().size();
            let random = |shape: [i64; 2]| (Tensor::randn(shape, OPTIONS) * 0.02).set_requires_grad(true);
            let (down, up) = (random([rank, size[1]]), random([size[0], rank]));
            trained.extend([down.shallow_clone(), up.shallow_clone()]);
            layer.attach(Box::new(LowRank { down, up }), None);
        }
    }
    trained
}
