//! What this machine offers, whether it computes correctly, what is missing and how to get it.
//!
//! Presence says little (a driver can be too old, a kernel missing for a GPU), so each device runs one real matrix
//! product and one real convolution of a size that Stable Diffusion has. The results are compared with another way of
//! computing them: sums in f64 outside libtorch, and unfolded patches times weights in f64 on the CPU.

use std::fmt;
use std::path::PathBuf;
use std::time::Instant;

use serde::Serialize;
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::platform::cuda::{self, CudaState, Driver, Gpu};
use crate::platform::device::kib_line;
use crate::platform::random;

/// Everything that `hra doctor` found.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Version of this program.
    pub hra: &'static str,
    pub libtorch: Libtorch,
    pub cpu: Cpu,
    pub cuda: Cuda,
    pub checks: Vec<Check>,
    /// What cannot be used, each with what to do about it.
    pub missing: Vec<String>,
}

/// The libtorch in this process.
#[derive(Debug, Serialize)]
pub struct Libtorch {
    /// Such as `2.11.0+cu130`, from the files beside the library.
    pub version: Option<String>,
    /// Where libtorch_cpu.so was loaded from.
    pub folder: Option<PathBuf>,
}

/// The processor and its memory.
#[derive(Debug, Serialize)]
pub struct Cpu {
    pub model: Option<String>,
    /// Processors that this process may use.
    pub cores: usize,
    /// Threads that libtorch computes with.
    pub threads: i32,
    /// Those instruction sets that decide how fast libtorch is.
    pub features: Vec<&'static str>,
    /// Bytes.
    pub memory_total: Option<u64>,
    /// Bytes.
    pub memory_available: Option<u64>,
}

/// NVIDIA's side.
#[derive(Debug, Serialize)]
pub struct Cuda {
    pub library: CudaState,
    /// Whether libtorch can compute on a GPU.
    pub usable: bool,
    /// Version of the kernel driver.
    pub driver: Option<String>,
    /// What the driver shows.
    pub gpus: Vec<Gpu>,
    /// Such as 91900.
    pub cudnn: Option<usize>,
}

/// One operation on one device in one number format.
#[derive(Debug, Serialize)]
pub struct Check {
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// `f32`, `bf16` or `f16`.
    pub precision: &'static str,
    pub operation: &'static str,
    /// The fastest of a few runs; `None` when it did not run.
    pub milliseconds: Option<f64>,
    /// Largest difference from the reference, as a share of the reference's largest value.
    pub error: Option<f64>,
    /// What `error` may be at most.
    pub tolerance: f64,
    /// libtorch's message when it did not run.
    pub message: Option<String>,
}

impl Check {
    /// Whether it ran and agrees with the reference.
    pub fn passed(&self) -> bool {
        // A NaN is no number below the tolerance.
        self.error.is_some_and(|error| error <= self.tolerance)
    }
}

impl Report {
    /// Fails when an operation failed or computed something wrong; no GPU is no error.
    ///
    /// # Errors
    /// [`Error::Device`] with how many of the checks did not pass.
    pub fn verdict(&self) -> Result<()> {
        match self.checks.iter().filter(|check| !check.passed()).count() {
            0 => Ok(()),
            failed => Err(Error::Device(format!("{failed} of {} checks failed", self.checks.len()))),
        }
    }
}

/// Looks at the machine and computes on each of its devices; takes a few seconds.
pub fn examine() -> Report {
    let library = cuda::load_cuda().clone();
    let unusable = cuda::unusable();
    let mut devices = vec![Device::Cpu];
    if unusable.is_none() {
        devices.extend((0..tch::Cuda::device_count() as usize).map(Device::Cuda));
    }
    let checks = devices.into_iter().flat_map(check_device).collect();
    let gpus = Driver::open().and_then(|driver| driver.gpus()).unwrap_or_default();
    Report {
        hra: env!("CARGO_PKG_VERSION"),
        libtorch: libtorch(),
        cpu: cpu(),
        cuda: Cuda {
            library,
            usable: unusable.is_none(),
            driver: cuda::driver_version(),
            gpus,
            cudnn: cuda::cudnn_version(),
        },
        checks,
        missing: unusable.into_iter().map(|why| format!("CUDA: {why}")).collect(),
    }
}

fn libtorch() -> Libtorch {
    let folder = cuda::libtorch_folder();
    let beside = |name: &str| std::fs::read_to_string(folder.as_ref()?.parent()?.join(name)).ok();
    let version = beside("version.py")
        .and_then(|text| python_version(&text))
        .or_else(|| beside("build-version").map(|text| text.trim().to_string()));
    Libtorch { version, folder }
}

/// The wheel's torch/version.py has a line `__version__ = '2.11.0+cu130'`.
fn python_version(text: &str) -> Option<String> {
    let value = text.lines().find_map(|line| line.strip_prefix("__version__ = "))?;
    Some(value.trim().trim_matches(['\'', '"']).to_string())
}

fn cpu() -> Cpu {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let flags: Vec<_> = cpuinfo(&info, "flags").unwrap_or_default().split(' ').collect();
    Cpu {
        model: cpu_model(),
        cores: std::thread::available_parallelism().map_or(1, usize::from),
        threads: tch::get_num_threads(),
        features: ["avx2", "avx512f", "avx512_bf16", "amx_bf16"]
            .into_iter()
            .filter(|feature| flags.contains(feature))
            .collect(),
        memory_total: kib_line(&memory, "MemTotal:"),
        memory_available: kib_line(&memory, "MemAvailable:"),
    }
}

/// A device in words: its number and the name of the processor or GPU.
pub fn device_name(device: Device) -> String {
    let (kind, name) = match device {
        Device::Cuda(index) => {
            let gpus = Driver::open().and_then(|driver| driver.gpus()).unwrap_or_default();
            (format!("cuda:{index}"), gpus.get(index).map(|gpu| gpu.name.clone()))
        }
        _ => ("cpu".to_string(), cpu_model()),
    };
    name.map_or(kind.clone(), |name| format!("{kind}, {name}"))
}

/// The processor's name, where the system tells it.
fn cpu_model() -> Option<String> {
    let info = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    cpuinfo(&info, "model name").map(str::to_string)
}

/// The first value of a `name : value` line of /proc/cpuinfo; an Arm machine has no `model name`.
fn cpuinfo<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.trim() == name)
        .map(|(_, v)| v.trim())
}

type Operation = fn(Device, Kind) -> std::result::Result<Measured, tch::TchError>;

struct Measured {
    milliseconds: f64,
    error: f64,
}

fn check_device(device: Device) -> Vec<Check> {
    let mut precisions = vec![("f32", Kind::Float), ("bf16", Kind::BFloat16)];
    let name = match device {
        Device::Cuda(index) => {
            precisions.push(("f16", Kind::Half));
            format!("cuda:{index}")
        }
        _ => "cpu".to_string(),
    };
    let operations: [(&'static str, Operation); 2] =
        [("matrix product", product), ("convolution", convolution)];
    let mut checks = Vec::new();
    for (precision, kind) in precisions {
        for (operation, measure) in operations {
            let result = measure(device, kind);
            checks.push(Check {
                device: name.clone(),
                precision,
                operation,
                milliseconds: result.as_ref().ok().map(|m| m.milliseconds),
                error: result.as_ref().ok().map(|m| m.error),
                tolerance: tolerance(device, kind),
                message: result.err().map(|e| Error::Torch(e).to_string()),
            });
        }
    }
    checks
}

/// Inputs are rounded before both ways of computing, so what differs is the rounding of sums and of the result:
/// 2^-9 of the value for bf16 and 2^-12 for f16, and some 2^-24 for each step of a sum in f32. libtorch lets
/// convolutions on CUDA round f32 inputs to the 10 bits of TF32.
fn tolerance(device: Device, kind: Kind) -> f64 {
    match (kind, device) {
        (Kind::BFloat16, _) => 8e-3,
        (Kind::Half, _) | (Kind::Float, Device::Cuda(_)) => 2e-3,
        _ => 1e-5,
    }
}

/// Random numbers, rounded to `kind`, on the CPU.
fn normal(shape: &[i64], kind: Kind) -> std::result::Result<Tensor, tch::TchError> {
    random::seeded(shape.iter().sum::<i64>() as u64, || Tensor::f_randn(shape, (Kind::Float, Device::Cpu)))?
        .f_to_kind(kind)
}

/// Runs `compute` once to warm up and three times against the clock; returns its result and the best time in ms.
fn timed(
    device: Device,
    compute: impl Fn() -> std::result::Result<Tensor, tch::TchError>,
) -> std::result::Result<(Tensor, f64), tch::TchError> {
    let mut result = compute()?;
    let mut best = f64::INFINITY;
    for _ in 0..3 {
        wait_for(device);
        let start = Instant::now();
        result = compute()?;
        wait_for(device);
        best = best.min(start.elapsed().as_secs_f64() * 1e3);
    }
    Ok((result, best))
}

fn wait_for(device: Device) {
    if let Device::Cuda(index) = device {
        tch::Cuda::synchronize(index as i64);
    }
}

/// `(m, k) x (k, n)`, the size of a feed-forward projection; some entries are summed up again in f64 without libtorch.
fn product(device: Device, kind: Kind) -> std::result::Result<Measured, tch::TchError> {
    let (m, k, n) = (1024, 640, 1280);
    let (a, b) = (normal(&[m, k], kind)?, normal(&[k, n], kind)?);
    let (a_there, b_there) = (a.f_to_device(device)?, b.f_to_device(device)?);
    let (result, milliseconds) = timed(device, || a_there.f_matmul(&b_there))?;
    let result = result.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?;
    let (mut difference, mut largest): (f64, f64) = (0.0, 0.0);
    // Rows and columns from all tiles a kernel may cut the result into.
    for row in (0..m).step_by(93) {
        let left = Vec::<f64>::try_from(a.f_get(row)?.f_to_kind(Kind::Double)?)?;
        for column in (0..n).step_by(129) {
            let right =
                Vec::<f64>::try_from(b.f_select(1, column)?.f_to_kind(Kind::Double)?.f_contiguous()?)?;
            let expected: f64 = left.iter().zip(&right).map(|(x, y)| x * y).sum();
            // Not `max`, which would pass over a NaN.
            let distance = (result.f_double_value(&[row, column])? - expected).abs();
            if distance.is_nan() || distance > difference {
                difference = distance;
            }
            largest = largest.max(expected.abs());
        }
    }
    Ok(Measured { milliseconds, error: difference / largest })
}

/// A 3x3 convolution of a resnet block; the reference unfolds the image into patches and multiplies, in f64.
fn convolution(device: Device, kind: Kind) -> std::result::Result<Measured, tch::TchError> {
    let (channels, side, filters) = (160, 32, 320);
    let (image, weight) =
        (normal(&[1, channels, side, side], kind)?, normal(&[filters, channels, 3, 3], kind)?);
    let (image_there, weight_there) = (image.f_to_device(device)?, weight.f_to_device(device)?);
    let (result, milliseconds) =
        timed(device, || image_there.f_conv2d(&weight_there, None::<Tensor>, 1, 1, 1, 1))?;
    let patches = image.f_to_kind(Kind::Double)?.f_im2col([3, 3], [1, 1], [1, 1], [1, 1])?; // [1, c*9, h*w]
    let expected = weight
        .f_to_kind(Kind::Double)?
        .f_view([filters, channels * 9])?
        .f_matmul(&patches)? // [1, filters, h*w]
        .f_view([1, filters, side, side])?;
    let result = result.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?;
    let difference = result.f_sub(&expected)?.f_abs()?.f_max()?.f_double_value(&[])?;
    let largest = expected.f_abs()?.f_max()?.f_double_value(&[])?;
    Ok(Measured { milliseconds, error: difference / largest })
}

fn gib(bytes: Option<u64>) -> String {
    bytes.map_or_else(|| "unknown".to_string(), |b| format!("{:.1} GiB", b as f64 / (1u64 << 30) as f64))
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let unknown = || "unknown".to_string();
        writeln!(f, "hra        {}", self.hra)?;
        let folder = self.libtorch.folder.as_ref().map_or_else(unknown, |p| p.display().to_string());
        writeln!(f, "libtorch   {} in {folder}", self.libtorch.version.clone().unwrap_or_else(unknown))?;
        let cpu = &self.cpu;
        let model = cpu.model.clone().unwrap_or_else(|| std::env::consts::ARCH.to_string());
        write!(f, "cpu        {model}, {} cores, {} threads", cpu.cores, cpu.threads)?;
        writeln!(f, "{}{}", if cpu.features.is_empty() { "" } else { ", " }, cpu.features.join(" "))?;
        writeln!(f, "memory     {}, {} available", gib(cpu.memory_total), gib(cpu.memory_available))?;
        writeln!(f, "driver     {}", self.cuda.driver.as_deref().unwrap_or("no NVIDIA driver"))?;
        for gpu in &self.cuda.gpus {
            let (major, minor) = gpu.capability;
            let memory = gib(Some(gpu.memory));
            writeln!(f, "cuda:{:<6}{}, {memory}, compute capability {major}.{minor}", gpu.index, gpu.name)?;
        }
        match &self.cuda.library {
            CudaState::Loaded { library } => writeln!(f, "cuda       {} is loaded", library.display())?,
            CudaState::Absent { .. } => writeln!(f, "cuda       this libtorch is for CPUs only")?,
            CudaState::Refused { message, .. } => writeln!(f, "cuda       not loaded: {message}")?,
        }
        if let Some(version) = self.cuda.cudnn {
            writeln!(f, "cudnn      {}.{}.{}", version / 10000, version / 100 % 100, version % 100)?;
        }
        writeln!(f)?;
        for check in &self.checks {
            write!(f, "{:<8}{:<6}{:<16}", check.device, check.precision, check.operation)?;
            let verdict = if check.passed() { "ok" } else { "failed" };
            match (&check.message, check.milliseconds, check.error) {
                (None, Some(time), Some(error)) => {
                    writeln!(f, "{time:>9.2} ms  error {error:.1e}  {verdict}")?;
                }
                (message, ..) => {
                    writeln!(f, "{verdict}: {}", message.as_deref().unwrap_or("it did not run"))?
                }
            }
        }
        for missing in &self.missing {
            writeln!(f, "\n{missing}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_computes_correctly() {
        let checks = check_device(Device::Cpu);
        assert_eq!(checks.len(), 4);
        for check in &checks {
            assert!(check.passed(), "{check:?}");
            // Two ways of rounding never agree to the last bit; a reference computed by itself would.
            assert!(check.error.is_some_and(|error| error > 0.0), "{check:?}");
        }
    }

    fn check(error: Option<f64>) -> Check {
        Check {
            device: "cpu".into(),
            precision: "f32",
            operation: "convolution",
            milliseconds: error.map(|_| 1.0),
            error,
            tolerance: 1e-5,
            message: error.is_none().then(|| "libtorch: no kernel image".into()),
        }
    }

    #[test]
    fn a_wrong_result_fails() {
        assert!(check(Some(1e-6)).passed());
        assert!(!check(Some(1e-4)).passed());
        assert!(!check(Some(f64::NAN)).passed());
        assert!(!check(None).passed());
    }

    fn report() -> Report {
        Report {
            hra: "1.2.3",
            libtorch: Libtorch { version: Some("2.11.0+cu130".into()), folder: Some("lib".into()) },
            cpu: Cpu {
                model: Some("Model".into()),
                cores: 8,
                threads: 4,
                features: vec!["avx2"],
                memory_total: Some(3 << 29),
                memory_available: None,
            },
            cuda: Cuda {
                library: CudaState::Refused {
                    library: "x.so".into(),
                    message: "libnccl.so.2: missing".into(),
                },
                usable: false,
                driver: None,
                gpus: vec![Gpu { index: 0, name: "Card".into(), memory: 80 << 30, capability: (9, 0) }],
                cudnn: Some(91900),
            },
            checks: vec![check(Some(1e-6)), check(None)],
            missing: vec!["CUDA: why\nhint: what to do".into()],
        }
    }

    #[test]
    fn the_text_says_what_was_found() {
        let expected = "\
hra        1.2.3
libtorch   2.11.0+cu130 in lib
cpu        Model, 8 cores, 4 threads, avx2
memory     1.5 GiB, unknown available
driver     no NVIDIA driver
cuda:0     Card, 80.0 GiB, compute capability 9.0
cuda       not loaded: libnccl.so.2: missing
cudnn      9.19.0

cpu     f32   convolution          1.00 ms  error 1.0e-6  ok
cpu     f32   convolution     failed: libtorch: no kernel image

CUDA: why
hint: what to do
";
        assert_eq!(report().to_string(), expected);
    }

    #[test]
    fn the_json_has_the_same_facts() {
        let json = serde_json::to_value(report()).expect("plain data");
        assert_eq!(json["libtorch"]["version"], "2.11.0+cu130");
        assert_eq!(json["cuda"]["library"]["state"], "refused");
        assert_eq!(json["checks"][0]["error"], 1e-6);
        assert_eq!(json["missing"][0], "CUDA: why\nhint: what to do");
    }

    #[test]
    fn reads_the_systems_files() {
        assert_eq!(
            python_version("debug = False\n__version__ = '2.11.0+cu130'\n").as_deref(),
            Some("2.11.0+cu130")
        );
        let info = "processor\t: 0\nmodel name\t: A CPU @ 2: fast\nflags\t\t: fpu avx2 avx512f\n";
        assert_eq!(cpuinfo(info, "model name"), Some("A CPU @ 2: fast"));
        assert_eq!(cpuinfo(info, "flags"), Some("fpu avx2 avx512f"));
        assert_eq!(cpuinfo(info, "Features"), None);
    }
}
