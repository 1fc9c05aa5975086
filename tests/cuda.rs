//! The GPU against the CPU, on the embedded model: networks, gradients, sampling, training in bf16, resuming.
//!
//! Run by `make test-cuda`; where CUDA cannot be used, each test says so and passes:
//!
//! ```text
//! cargo test --test cuda -- --ignored --nocapture
//! ```
//!
//! Both sides compute in full f32: TF32, which libtorch lets convolutions round to, is switched off for the process. What
//! is left is the order of sums.

mod support;

use hra::StableDiffusion;
use hra::adapter::Method;
use hra::adapter::methods::hra::{HraConfig, HraInit};
use hra::adapter::peft::Bias;
use hra::adapter::target::{ATTENTION, TargetRule};
use hra::attach;
use hra::diffusion::noise::NoiseSchedule;
use hra::diffusion::sample::{Request, Session, Settings};
use hra::diffusion::sampler::SamplerKind;
use hra::model::control::Control;
use hra::model::{Conditioning, Denoiser};
use hra::platform::cuda::cuda_memory;
use hra::platform::device::{self, DeviceChoice};
use hra::platform::observer::Silent;
use hra::train::loss::{Batch, training_loss};
use std::process::Stdio;
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::time::Duration;
use support::program::{Finished, Scratch, finished, records};
use support::{relative_error, tiny_sd};
use tch::{Device, Kind, Tensor};

/// NVIDIA's libraries and libtorch read these at their first use: no TF32 in cuDNN and cuBLAS.
const FULL_F32: [(&str, &str); 2] =
    [("NVIDIA_TF32_OVERRIDE", "0"), ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "0")];
const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);
const PROMPT: &str = "a fluent 3d emoji of a cat face";
/// Bytes in a GB.
const GB: f64 = 1e9;

/// The first GPU, for one test at a time, so that memory can be told apart; `None`, said aloud, where there is none.
fn gpu() -> Option<(MutexGuard<'static, ()>, Device)> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    static START: Once = Once::new();
    let guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    START.call_once(|| {
        for (name, value) in FULL_F32 {
            // SAFETY: the other tests wait for the lock above and read nothing meanwhile; libtorch has not begun.
            unsafe { std::env::set_var(name, value) };
        }
        device::start();
    });
    match device::resolve(DeviceChoice::Cuda(0), None) {
        Ok(compute) => Some((guard, compute.device)),
        Err(error) => {
            println!("skipped: no CUDA device ({})", error.to_string().lines().next().unwrap_or_default());
            None
        }
    }
}

fn load(device: Device) -> StableDiffusion {
    StableDiffusion::load(&tiny_sd(), Kind::Float, device).unwrap()
}

/// Fails where `found`, on any device, differs from `expected` by more than `tolerance`, relative.
fn check(what: &str, found: &Tensor, expected: &Tensor, tolerance: f64) {
    let error = relative_error(&found.to_device(Device::Cpu), &expected.to_device(Device::Cpu));
    println!("{what}: {error:.1e}");
    assert!(error <= tolerance, "{what}: relative error {error:.2e}, allowed {tolerance:.0e}");
}

/// Memory in use on the first GPU, by all processes, in bytes.
fn used() -> u64 {
    let (free, total) = cuda_memory(0).expect("the runtime tells the memory of a device that works");
    total - free
}

/// libtorch keeps what it has taken, so what is in use at the end is the most that was.
fn print_memory(what: &str) {
    println!("{what}: {:.2} GB in use on the GPU", used() as f64 / GB);
}

#[test]
#[ignore = "needs a GPU"]
fn the_networks_give_what_they_give_on_the_cpu() {
    let Some((_guard, gpu)) = gpu() else { return };
    let _no_grad = tch::no_grad_guard();
    let (here, there) = (load(Device::Cpu), load(gpu));
    assert_eq!(there.unet.device(), gpu);

    let states =
        |model: &StableDiffusion| model.encode_prompts(&[PROMPT, ""]).unwrap().0.states().shallow_clone();
    let context = states(&here);
    check("text states", &states(&there), &context, 1e-4);

    tch::manual_seed(1);
    let side = here.unet.sample_size().unwrap();
    let sample = Tensor::randn([2, 4, side, side], CPU);
    let timesteps = Tensor::from_slice(&[3i64, 801]);
    let expected = here.unet.forward(&sample, &timesteps, &Conditioning::new(context.shallow_clone()));
    let found = there.unet.forward(
        &sample.to_device(gpu),
        &timesteps.to_device(gpu),
        &Conditioning::new(context.to_device(gpu)),
    );
    check("unet", &found, &expected, 1e-4);

    let size = side * here.vae.factor();
    let pictures = Tensor::rand([2, 3, size, size], CPU) * 2.0 - 1.0;
    let (mean, log_variance) = here.vae.encode(&pictures);
    let (mean_there, log_variance_there) = there.vae.encode(&pictures);
    check("vae mean", &mean_there, &mean, 1e-4);
    check("vae log-variance", &log_variance_there, &log_variance, 1e-4);
    check("vae pictures", &there.vae.decode(&mean), &here.vae.decode(&mean), 1e-4);
    print_memory("networks");
}

/// Loss and the gradient of every trained tensor, of a batch and an adapter that do not depend on the device.
fn loss_and_gradients(device: Device, gram_schmidt: bool) -> (Tensor, Vec<(String, Tensor)>) {
    let mut model = load(device);
    let mut words = ATTENTION.map(String::from).to_vec();
    if !gram_schmidt {
        // That variant starts from the eigenvectors of the weight, which for a convolution's d_in takes minutes.
        words.push("conv1".into());
    }
    let targets = TargetRule::from_words(&words).unwrap();
    let config = HraConfig { rank: 8, gram_schmidt, init: HraInit::Auto, allow_odd_rank: false };
    attach::attach_new(&mut model.unet, &targets, &Method::new(config), Bias::Only, 5).unwrap();
    let mut parameters = attach::pack_parameters(&mut [&mut model.unet]);
    // Away from the start, where pairs of reflections cancel.
    tch::manual_seed(2);
    let move_by = Tensor::randn([parameters.count() as i64], CPU) * 0.1;
    parameters.set(&(parameters.flat() + move_by.to_device(device)));

    let side = model.unet.sample_size().unwrap();
    let random = |shape: &[i64]| Tensor::randn(shape, CPU).to_device(device);
    let text = &model.texts[0].encoder;
    let batch = Batch {
        latents: random(&[2, 4, side, side]),
        noise: random(&[2, 4, side, side]),
        timesteps: Tensor::from_slice(&[40i64, 700]).to_device(device),
        conditioning: Conditioning::new(random(&[2, text.length(), text.width()])),
        conditions: None,
        class_half: true,
    };
    let schedule = NoiseSchedule::new(&model.scheduler, device).unwrap();
    let mut total = training_loss(&model.unet, None, &schedule, &batch, 0.5, Some(5.0)).total;
    if let Some(regulariser) = attach::regulariser(&mut model.unet) {
        total += regulariser * 1e-3;
    }
    total.backward();
    let gradients = parameters.views().iter().map(|(name, view)| (name.clone(), view.grad())).collect();
    (total.detach(), gradients)
}

#[test]
#[ignore = "needs a GPU"]
fn loss_and_gradients_are_those_of_the_cpu() {
    let Some((_guard, gpu)) = gpu() else { return };
    for gram_schmidt in [false, true] {
        let (expected_loss, expected) = loss_and_gradients(Device::Cpu, gram_schmidt);
        let (loss, found) = loss_and_gradients(gpu, gram_schmidt);
        assert_eq!(loss.device(), gpu);
        check("loss", &loss, &expected_loss, 1e-4);
        assert!(found.len() > 56, "attention and biases: {}", found.len());
        let norm = |t: &Tensor| t.norm().double_value(&[]);
        let whole = expected.iter().map(|(_, t)| norm(t).powi(2)).sum::<f64>().sqrt();
        for ((name, found), (same, expected)) in found.iter().zip(&expected) {
            assert_eq!(name, same);
            // Some gradients (of queries, as a rule) are 100,000 times smaller than the whole, the rest of sums that
            // cancel: beside them rounding is large, beside the whole it is nothing.
            let size = norm(expected).max(1e-2 * whole);
            let error = norm(&(found.to_device(Device::Cpu) - expected)) / size;
            assert!(error <= 1e-4, "{name}: relative error {error:.2e}, allowed 1e-4");
        }
    }
    print_memory("gradients");
}

#[test]
#[ignore = "needs a GPU"]
fn twelve_ddim_steps_end_where_the_cpu_ends() {
    let Some((_guard, gpu)) = gpu() else { return };
    let (here, there) = (load(Device::Cpu), load(gpu));
    let settings = Settings {
        prompt: PROMPT.into(),
        negative_prompt: "a robot".into(),
        sampler: SamplerKind::Ddim,
        spacing: None,
        karras: None,
        steps: 12,
        guidance: 4.0,
        width: 64,
        height: 64,
    };
    let draw = |model: &StableDiffusion| {
        let mut session: Session<_, Control> = Session::over(model, None);
        let pictures = session.draw(&Request::new(&settings, &[0, 1], 2), &Silent).unwrap();
        Tensor::cat(&pictures.iter().map(|p| &p.latents).collect::<Vec<_>>(), 0)
    };
    check("latents", &draw(&there), &draw(&here), 1e-3);
    print_memory("sampling");
}

/// Runs the program, expects success, and prints the most GPU memory that was in use meanwhile beyond what was before.
fn watched(scratch: &Scratch, what: &str, args: &[String]) -> Finished {
    let before = used();
    let mut command = scratch.command(&args.iter().map(String::as_str).collect::<Vec<_>>());
    command.envs(FULL_F32).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut most = before;
    while child.try_wait().unwrap().is_none() {
        most = most.max(used());
        std::thread::sleep(Duration::from_millis(20));
    }
    let done = finished(child.wait_with_output().unwrap());
    assert_eq!(done.code, 0, "{what}\n{}", done.err);
    println!("{what}: peak {:.2} GB on the GPU", most.saturating_sub(before) as f64 / GB);
    done
}

/// Trains on the GPU into `out`; the loss of each step.
fn train(scratch: &Scratch, out: &str, more: &[&str]) -> Vec<f64> {
    let more: Vec<&str> = ["--device", "cuda"].iter().chain(more).copied().collect();
    let done = watched(scratch, out, &scratch.train_flags(out, &more));
    assert!(done.err.contains("Cuda(0)"), "trained elsewhere\n{}", done.err);
    losses(scratch, out)
}

fn losses(scratch: &Scratch, out: &str) -> Vec<f64> {
    let losses: Vec<f64> = records(&scratch.path(out)).iter().filter_map(|r| r["loss"].as_f64()).collect();
    println!("{out}: {losses:?}");
    losses
}

/// Fails where two runs' losses differ by more than `tolerance`, relative, in any step.
fn assert_close(found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() <= tolerance * expected.abs(), "{found} beside {expected}");
    }
}

#[test]
#[ignore = "needs a GPU"]
fn bf16_trains_beside_f32() {
    let Some((_guard, _)) = gpu() else { return };
    let scratch = Scratch::new();
    let full = train(&scratch, "f32", &["--max_train_steps", "3"]);
    let brain = train(&scratch, "bf16", &["--max_train_steps", "3", "--dtype", "bf16"]);
    assert_eq!(full.len(), 3);
    assert!(brain.iter().all(|loss| loss.is_finite()), "{brain:?}");
    assert_ne!(brain, full, "bf16 was not used");
    assert_close(&brain, &full, 0.05);
}

#[test]
#[ignore = "needs a GPU"]
fn a_run_resumed_on_the_gpu_goes_on_as_if_it_had_not_stopped() {
    let Some((_guard, _)) = gpu() else { return };
    let scratch = Scratch::new();
    let whole = train(&scratch, "whole", &[]);
    train(&scratch, "parts", &["--max_train_steps", "4", "--checkpointing_steps", "2"]);
    let parts = scratch.path("parts").to_str().unwrap().to_string();
    let resume = ["train", "--resume", "latest", "--output_dir", &parts, "--max_train_steps", "6"];
    let done = watched(&scratch, "resumed", &resume.map(String::from));
    assert!(done.err.contains("steps 5 to 6, Cuda(0)"), "{}", done.err);
    assert_close(&losses(&scratch, "parts"), &whole, 1e-3);
}
