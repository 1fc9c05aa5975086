//! What this machine offers, whether it computes correctly, what is missing and how to get it.
//!
//! Presence says little (a driver can be too old, a kernel missing for a GPU), so each device runs one real matrix
//! product and one real convolution of a size that Stable Diffusion has. The results are compared with another way of
//! computing them: sums in f64 outside libtorch, and unfolded patches times weights in f64 on the CPU.

pub mod attention;
pub mod checks;

use std::fmt;
use std::path::PathBuf;

use serde::Serialize;
use tch::Device;

use crate::error::{Error, Result};
use crate::platform::columns::{self, left};
use crate::platform::cuda::{self, CudaState, Driver, Gpu};
use crate::platform::device::{self, PeakMemory, kib_line, peak_memory};
use crate::platform::doctor::attention::AttentionKernel;
use crate::platform::doctor::checks::{Check, check_device, formats, slow_bf16};
use crate::platform::precision::{cpu_flags, cpuinfo};

/// Everything that `hra doctor` found.
#[derive(Debug, Serialize)]
pub struct MachineReport {
    /// Version of this program.
    pub hra: &'static str,
    pub libtorch: Libtorch,
    pub cpu: Cpu,
    pub cuda: Cuda,
    pub checks: Vec<Check>,
    /// The kernels that attention runs in.
    pub attention: Vec<AttentionKernel>,
    /// The most memory that these checks took of each GPU.
    pub gpu_peaks: Vec<GpuPeak>,
    /// What works and is slow.
    pub warnings: Vec<String>,
    /// What cannot be used, each with what to do about it.
    pub missing: Vec<String>,
}

/// The most memory that was taken of a GPU.
#[derive(Debug, Serialize)]
pub struct GpuPeak {
    /// `cuda:N`.
    pub device: String,
    #[serde(flatten)]
    pub peak: PeakMemory,
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

impl MachineReport {
    /// Fails when an operation failed or computed something wrong; no GPU is no error.
    ///
    /// # Errors
    /// [`ErrorKind::Device`] with how many of the checks did not pass.
    pub fn verdict(&self) -> Result<()> {
        match self.checks.iter().filter(|check| !check.passed()).count() {
            0 => Ok(()),
            failed => Err(Error::device(format!("{failed} of {} checks failed", self.checks.len()))),
        }
    }
}

/// Looks at the machine and computes on each of its devices; takes a few seconds.
pub fn examine() -> MachineReport {
    let library = cuda::load_cuda().clone();
    let unusable = cuda::unusable();
    let mut devices = vec![Device::Cpu];
    if unusable.is_none() {
        devices.extend((0..tch::Cuda::device_count() as usize).map(Device::Cuda));
    }
    let checks: Vec<Check> = devices.iter().flat_map(|device| check_device(*device)).collect();
    // Where it cannot be asked, the checks say why.
    let attention = devices.iter().flat_map(|device| attention_of(*device).unwrap_or_default()).collect();
    let gpu_peaks = devices
        .iter()
        .filter_map(|device| Some(GpuPeak { device: device::name(*device), peak: peak_memory(*device)? }))
        .collect();
    let gpus = Driver::open().and_then(|driver| driver.gpus()).unwrap_or_default();
    let driver = cuda::driver_version();
    // A machine without a driver has no GPU to use: the facts say what there is, and nothing is missing.
    let missing = unusable.as_ref().filter(|_| driver.is_some());
    let missing = missing.map(|why| format!("CUDA: {why}")).into_iter().collect();
    MachineReport {
        hra: env!("CARGO_PKG_VERSION"),
        libtorch: libtorch(),
        cpu: cpu(),
        cuda: Cuda { library, usable: unusable.is_none(), driver, gpus, cudnn: cuda::cudnn_version() },
        warnings: slow_bf16(&checks).into_iter().collect(),
        checks,
        attention,
        gpu_peaks,
        missing,
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
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let flags = cpu_flags();
    Cpu {
        model: cpu_model(),
        cores: device::cores(),
        threads: tch::get_num_threads(),
        features: ["avx2", "avx512f", "avx512_bf16", "amx_bf16"]
            .into_iter()
            .filter(|feature| flags.iter().any(|flag| flag == feature))
            .collect(),
        memory_total: kib_line(&memory, "MemTotal:"),
        memory_available: kib_line(&memory, "MemAvailable:"),
    }
}

/// A device in words: its number and the name of the processor or GPU.
pub fn device_name(device: Device) -> String {
    let model = match device {
        Device::Cuda(index) => {
            let gpus = Driver::open().and_then(|driver| driver.gpus()).unwrap_or_default();
            gpus.get(index).map(|gpu| gpu.name.clone())
        }
        _ => cpu_model(),
    };
    let name = device::name(device);
    model.map_or(name.clone(), |model| format!("{name}, {model}"))
}

/// The processor's name, where the system tells it.
fn cpu_model() -> Option<String> {
    let info = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    cpuinfo(&info, "model name").map(str::to_string)
}

fn attention_of(device: Device) -> Result<Vec<AttentionKernel>> {
    let (name, precisions) = formats(device);
    attention::choices(device, &name, &precisions)
}

fn gib(bytes: Option<u64>) -> String {
    bytes.map_or_else(|| "unknown".to_string(), |b| format!("{:.1} GiB", b as f64 / (1u64 << 30) as f64))
}

impl MachineReport {
    /// What there is, by name.
    fn facts(&self) -> Vec<Vec<String>> {
        let unknown = || "unknown".to_string();
        let folder = self.libtorch.folder.as_ref().map_or_else(unknown, |p| p.display().to_string());
        let version = self.libtorch.version.clone().unwrap_or_else(unknown);
        let cpu = &self.cpu;
        let model = cpu.model.clone().unwrap_or_else(|| std::env::consts::ARCH.to_string());
        let features = cpu.features.join(" ");
        let features = if features.is_empty() { features } else { format!(", {features}") };
        let memory = [cpu.memory_total, cpu.memory_available].map(gib);
        let mut facts = vec![
            ("hra".to_string(), self.hra.to_string()),
            ("libtorch".into(), format!("{version} in {folder}")),
            ("cpu".into(), format!("{model}, {} cores, {} threads{features}", cpu.cores, cpu.threads)),
            ("memory".into(), format!("{}, {} available", memory[0], memory[1])),
            ("driver".into(), self.cuda.driver.as_deref().unwrap_or("no NVIDIA driver").into()),
        ];
        for Gpu { index, name, memory, capability: (major, minor) } in &self.cuda.gpus {
            let memory = gib(Some(*memory));
            let text = format!("{name}, {memory}, compute capability {major}.{minor}");
            facts.push((format!("cuda:{index}"), text));
        }
        let library = match &self.cuda.library {
            CudaState::Loaded { library } => format!("{} is loaded", library.display()),
            CudaState::Absent { .. } => "this libtorch is for CPUs only".into(),
            CudaState::Refused { message, .. } => format!("not loaded: {message}"),
        };
        facts.push(("cuda".into(), library));
        if let Some(version) = self.cuda.cudnn {
            let text = format!("{}.{}.{}", version / 10000, version / 100 % 100, version % 100);
            facts.push(("cudnn".into(), text));
        }
        facts.into_iter().map(|(name, text)| vec![name, text]).collect()
    }

    /// Which kernels attention runs in, and how much memory the checks took of each GPU.
    fn kernels(&self) -> Vec<Vec<String>> {
        let mut rows = Vec::new();
        for of in self.attention.chunk_by(|a, b| (&a.device, a.precision) == (&b.device, b.precision)) {
            let kernels: Vec<String> = of.iter().map(|k| format!("{} {}", k.attention, k.kernel)).collect();
            let AttentionKernel { device, precision, .. } = &of[0];
            rows.push([device, *precision, "attention", &kernels.join(", ")].map(String::from).to_vec());
        }
        for GpuPeak { device, peak } in &self.gpu_peaks {
            let [allocated, reserved] = [peak.allocated, peak.reserved].map(|bytes| gib(Some(bytes)));
            let text = format!("{allocated} in tensors, {reserved} reserved");
            rows.push([device, "", "peak memory", &text].map(String::from).to_vec());
        }
        rows
    }
}

/// One check by device, format and operation, and what came of it.
fn row(check: &Check) -> Vec<String> {
    let verdict = if check.passed() { "ok" } else { "failed" };
    let text = match (&check.message, check.milliseconds, check.error) {
        (None, Some(time), Some(error)) => format!("{time:>9.2} ms  error {error:.1e}  {verdict}"),
        (message, ..) => format!("{verdict}: {}", message.as_deref().unwrap_or("it did not run")),
    };
    [&check.device, check.precision, check.operation, &text].map(String::from).to_vec()
}

impl fmt::Display for MachineReport {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let of_device = [left(8), left(6), left(16), left(0)];
        let checks: Vec<_> = self.checks.iter().map(row).collect();
        let mut lines = columns::lines(&[left(11), left(0)], &self.facts());
        lines.push(String::new());
        lines.extend(columns::lines(&of_device, &checks));
        if !self.attention.is_empty() {
            lines.push(String::new());
        }
        lines.extend(columns::lines(&of_device, &self.kernels()));
        for line in lines {
            writeln!(f, "{line}")?;
        }
        for warning in &self.warnings {
            writeln!(f, "\nwarning: {warning}")?;
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

    fn kernel(attention: &'static str) -> AttentionKernel {
        AttentionKernel { device: "cuda:0".into(), precision: "bf16", attention, kernel: "flash" }
    }

    fn report() -> MachineReport {
        MachineReport {
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
            attention: ["self", "cross"].map(kernel).into(),
            gpu_peaks: vec![GpuPeak {
                device: "cuda:0".into(),
                peak: PeakMemory { allocated: 1 << 29, reserved: 1 << 30 },
            }],
            warnings: vec!["bf16 is slow".into()],
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

cuda:0  bf16  attention       self flash, cross flash
cuda:0        peak memory     0.5 GiB in tensors, 1.0 GiB reserved

warning: bf16 is slow

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
