//! Where and in which number format to compute, and what a process must do before its first tensor.
//!
//! [`start`] comes first in `main`; [`resolve`] turns what the user asked for into a [`Compute`] or an error that names
//! what is missing.

use std::fmt;
use std::str::FromStr;
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde::{Deserialize, Serialize};
use tch::{Device, Kind};

use crate::error::{Error, Result};
use crate::platform::cuda;
pub use crate::platform::cuda::{CudaState, load_cuda};
use crate::platform::precision::{Numbers, Precision};

/// The device a user asks for: `auto`, `cpu`, `cuda` (the first GPU) or `cuda:N`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DeviceChoice {
    /// CUDA where it can be used, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU of this number, counted from 0.
    Cuda(usize),
}

impl FromStr for DeviceChoice {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let found = match text {
            "auto" => Some(Self::Auto),
            "cpu" => Some(Self::Cpu),
            "cuda" => Some(Self::Cuda(0)),
            _ => text
                .strip_prefix("cuda:")
                // `parse` alone would take "+1".
                .filter(|index| index.bytes().all(|b| b.is_ascii_digit()))
                .and_then(|index| index.parse().ok())
                .map(Self::Cuda),
        };
        found.ok_or_else(|| {
            Error::config(format!(
                "device: expected auto, cpu, cuda or cuda:N such as cuda:1, found `{text}`"
            ))
        })
    }
}

impl TryFrom<String> for DeviceChoice {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

impl From<DeviceChoice> for String {
    fn from(choice: DeviceChoice) -> Self {
        choice.to_string()
    }
}

/// How a device is called: `cpu` or `cuda:N`.
pub fn name(device: Device) -> String {
    match device {
        Device::Cuda(index) => format!("cuda:{index}"),
        _ => "cpu".to_string(),
    }
}

/// Whether attention to what came before adds a mask on this device, as the references were rounded; the kernels that keep no matrix
/// of scores take none.
pub fn adds_mask(device: Device) -> bool {
    device == Device::Cpu
}

/// Where to compute and in which number format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compute {
    /// The device of every tensor.
    pub device: Device,
    /// The number formats of the base model.
    pub numbers: Numbers,
    /// What the user should be told about the choice, one sentence each.
    pub notes: Vec<String>,
}

/// Turns a choice into a device that works. Without a precision it is f32, as in accelerate.
///
/// # Errors
/// [`ErrorKind::Device`] when CUDA is asked for and cannot be used, or has no device of that number; the message says which
/// library or driver is missing.
pub fn resolve(choice: DeviceChoice, precision: Option<Precision>) -> Result<Compute> {
    let available = match choice {
        DeviceChoice::Cpu => Ok(0),
        _ => cuda::unusable().map_or_else(|| Ok(tch::Cuda::device_count()), Err),
    };
    let unused = match &available {
        // Without this, a half-installed machine would train on its CPU and nobody would know why it is slow.
        Err(why) if choice == DeviceChoice::Auto && cuda::driver_version().is_some() => {
            Some(format!("the GPU of this machine is not used: {why}"))
        }
        _ => None,
    };
    let precision = precision.unwrap_or_default();
    let mut on_cpu = Numbers::on(Device::Cpu, precision);
    // Slow; tests of training in f16 ask for it.
    if std::env::var_os("HRA_F16_ON_CPU").is_some() && precision == Precision::F16 {
        on_cpu = Kind::Half.into();
    }
    let mut compute = choose(choice, precision, available, on_cpu)?;
    compute.notes.extend(unused);
    Ok(compute)
}

/// The decision itself, without a look at the machine: `available` is the number of usable GPUs or why there is none, `on_cpu` the
/// formats that a CPU is given.
fn choose(
    choice: DeviceChoice,
    precision: Precision,
    available: Result<i64>,
    on_cpu: Numbers,
) -> Result<Compute> {
    let device = match (choice, available) {
        (DeviceChoice::Cuda(_), Err(why)) => {
            let problem = format!("device {choice} was asked for, but {}", why.kind);
            return Err(Error::device(problem).with_hints(why.hints()));
        }
        (DeviceChoice::Cuda(index), Ok(count)) if index as i64 >= count => {
            let found =
                if count == 1 { "only cuda:0".into() } else { format!("cuda:0 to cuda:{}", count - 1) };
            return Err(Error::device(format!("device {choice} was asked for, but there is {found}")));
        }
        (DeviceChoice::Cuda(index), Ok(_)) => Device::Cuda(index),
        (DeviceChoice::Auto, Ok(count)) if count > 0 => Device::Cuda(0),
        (DeviceChoice::Auto | DeviceChoice::Cpu, _) => Device::Cpu,
    };
    let mut notes = Vec::new();
    let numbers = if device == Device::Cpu { on_cpu } else { precision.kind().into() };
    if numbers.rest != numbers.compute {
        notes.push(format!("weights in {numbers}, which this CPU is faster in"));
    }
    Ok(Compute { device, numbers, notes })
}

/// Sets the process up; call it first in `main`, before any thread is started and before the first tch call.
///
/// - A write beyond the file size limit (`ulimit -f`) becomes an ordinary error instead of the death of the process.
/// - cuBLAS gets a workspace with which its results repeat, unless the user set CUBLAS_WORKSPACE_CONFIG (cuBLAS
///   documentation, "Results reproducibility").
/// - libtorch's CUDA half is loaded where it is there.
/// - Freed memory stays with the process (glibc): large tensors that come and go at every step are not mapped anew each time,
///   which was half of the time of a step of full fine-tuning.
pub fn start() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: ignoring a signal installs no handler, and no other thread runs yet, so that nobody reads the
        // environment meanwhile.
        unsafe {
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
            if std::env::var_os("CUBLAS_WORKSPACE_CONFIG").is_none() {
                std::env::set_var("CUBLAS_WORKSPACE_CONFIG", ":4096:8");
            }
        }
        keep_freed_memory();
        load_cuda();
    });
}

/// Large blocks are taken from the heap, and a heap of this size is not given back.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn keep_freed_memory() {
    const KEEP: libc::c_int = 1 << 30;
    /// Older versions of glibc take no more for blocks (HEAP_MAX_SIZE / 2).
    const OLD_LIMIT: libc::c_int = 32 << 20;
    let set = |parameter, value, variable| {
        // SAFETY: sets a number of the allocator, before any other thread runs.
        std::env::var_os(variable).is_some() || unsafe { libc::mallopt(parameter, value) } != 0
    };
    let blocks = |value| set(libc::M_MMAP_THRESHOLD, value, "MALLOC_MMAP_THRESHOLD_");
    // Without the first the second would do harm: by it glibc stops raising the size of blocks by itself.
    if blocks(KEEP) || blocks(OLD_LIMIT) {
        set(libc::M_TRIM_THRESHOLD, KEEP, "MALLOC_TRIM_THRESHOLD_");
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn keep_freed_memory() {}

/// Networks with fewer values than this compute on one thread unless the user says otherwise: a second one gains little
/// there, and a picture then does not depend on the number of cores, whose sums are rounded in another order.
const ONE_THREAD_BELOW: usize = 4_000_000;

/// Most threads that may be asked for: more than nearly any machine has cores. With tens of thousands libtorch never comes back.
pub const MAX_THREADS: i32 = 1024;

/// What [`set_threads`] was last asked for; 0 where nobody said.
static ASKED_THREADS: AtomicUsize = AtomicUsize::new(0);

/// Sets how many threads this process works with on the CPU: libtorch's, for a network of `values` weights, and
/// [`own_threads`]. `None` leaves libtorch's to OMP_NUM_THREADS, or to libtorch, which takes the number of cores, except for very
/// small networks. Call it with `usize::MAX` before pictures are read, and again when the network is known.
///
/// # Errors
/// [`ErrorKind::Config`] for a number below 1 or above [`MAX_THREADS`].
pub fn set_threads(threads: Option<i32>, values: usize) -> Result<()> {
    let small = values < ONE_THREAD_BELOW && std::env::var_os("OMP_NUM_THREADS").is_none();
    match threads {
        Some(count) if !(1..=MAX_THREADS).contains(&count) => {
            let cores = cores();
            let machine = format!("this machine has {cores} core{}", if cores == 1 { "" } else { "s" });
            let problem = format!("threads: expected 1 to {MAX_THREADS}, found {count}; {machine}");
            return Err(Error::config(problem));
        }
        Some(count) => {
            ASKED_THREADS.store(count as usize, Ordering::Relaxed);
            tch::set_num_threads(count);
        }
        None if small => tch::set_num_threads(1),
        None => {}
    }
    Ok(())
}

/// How many threads the program's own work has, such as reading pictures: what [`set_threads`] was asked for, else OMP_NUM_THREADS,
/// else the number of cores.
pub fn own_threads() -> usize {
    let of_omp = || std::env::var("OMP_NUM_THREADS").ok()?.trim().parse().ok().filter(|count| *count > 0);
    match ASKED_THREADS.load(Ordering::Relaxed) {
        0 => of_omp().unwrap_or_else(cores),
        asked => asked,
    }
}

/// Cores that this process may use.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The most GPU memory that this process has used, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct PeakMemory {
    /// Held by tensors.
    pub allocated: u64,
    /// Taken from the GPU by libtorch, which keeps what was freed.
    pub reserved: u64,
}

/// What libtorch's allocator says of a GPU; `None` on the CPU.
pub fn peak_memory(device: Device) -> Option<PeakMemory> {
    let Device::Cuda(index) = device else { return None };
    let [allocated, reserved] = torch_extra::device_peaks(index).ok()?;
    Some(PeakMemory { allocated, reserved })
}

/// The most memory this process has held so far, in bytes (VmHWM of proc(5)).
pub fn peak_process_memory() -> Option<u64> {
    kib_line(&std::fs::read_to_string("/proc/self/status").ok()?, "VmHWM:")
}

/// The value of a line such as `VmHWM:     1234 kB`, in bytes; /proc/meminfo has the same form.
pub(crate) fn kib_line(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_names_round_trip() {
        for (text, choice, shown) in [
            ("auto", DeviceChoice::Auto, "auto"),
            ("cpu", DeviceChoice::Cpu, "cpu"),
            ("cuda", DeviceChoice::Cuda(0), "cuda:0"),
            ("cuda:12", DeviceChoice::Cuda(12), "cuda:12"),
        ] {
            assert_eq!(text.parse::<DeviceChoice>().ok(), Some(choice));
            assert_eq!(choice.to_string(), shown);
            assert_eq!(serde_json::to_value(choice).ok(), Some(shown.into()));
            assert_eq!(serde_json::from_value::<DeviceChoice>(text.into()).ok(), Some(choice));
        }
        for text in [
            "",
            "gpu",
            "CUDA",
            "cuda:",
            "cuda:-1",
            "cuda:+1",
            "cuda:x",
            "cuda 0",
            "cuda:99999999999999999999",
        ] {
            let message = text.parse::<DeviceChoice>().expect_err(text).to_string();
            assert!(message.ends_with(&format!("found `{text}`")), "{message}");
        }
    }

    fn why() -> Result<i64> {
        Err(Error::device("there is no driver").with_hint("install one"))
    }

    #[test]
    fn auto_takes_cuda_where_it_works() {
        let on = |choice, available| {
            choose(choice, Precision::F32, available, Kind::Float.into()).map(|c| c.device).ok()
        };
        assert_eq!(on(DeviceChoice::Auto, Ok(2)), Some(Device::Cuda(0)));
        assert_eq!(on(DeviceChoice::Auto, Ok(0)), Some(Device::Cpu));
        assert_eq!(on(DeviceChoice::Auto, why()), Some(Device::Cpu));
        assert_eq!(on(DeviceChoice::Cuda(1), Ok(2)), Some(Device::Cuda(1)));
        assert_eq!(on(DeviceChoice::Cpu, Ok(0)), Some(Device::Cpu));
    }

    #[test]
    fn asking_for_a_missing_gpu_is_an_error_with_the_reason() {
        let message = |choice, available| {
            let chosen = choose(choice, Precision::F32, available, Kind::Float.into());
            chosen.expect_err("there is no such device").to_string()
        };
        assert_eq!(
            message(DeviceChoice::Cuda(0), why()),
            "device cuda:0 was asked for, but there is no driver\nhint: install one"
        );
        assert_eq!(
            message(DeviceChoice::Cuda(1), Ok(1)),
            "device cuda:1 was asked for, but there is only cuda:0"
        );
        assert_eq!(
            message(DeviceChoice::Cuda(7), Ok(2)),
            "device cuda:7 was asked for, but there is cuda:0 to cuda:1"
        );
    }

    #[test]
    fn a_cpu_that_computes_in_another_format_says_so() {
        let numbers = Numbers { rest: Kind::Half, compute: Kind::Float };
        let of = |choice, available| choose(choice, Precision::F16, available, numbers).expect("it is there");
        let on_cpu = of(DeviceChoice::Cpu, Ok(0));
        assert_eq!(on_cpu.numbers, numbers);
        assert_eq!(on_cpu.notes, ["weights in f16, computed in f32, which this CPU is faster in"]);
        let on_gpu = of(DeviceChoice::Auto, Ok(1));
        assert_eq!((on_gpu.numbers, on_gpu.notes.len()), (Kind::Half.into(), 0));
    }

    #[test]
    fn thread_counts_that_no_machine_has_are_refused() {
        for count in [0, -1, MAX_THREADS + 1, i32::MAX] {
            let told = set_threads(Some(count), 0).expect_err("no such count").to_string();
            let expected = format!("threads: expected 1 to {MAX_THREADS}, found {count}; this machine has ");
            assert!(told.starts_with(&expected), "{told}");
        }
    }

    #[test]
    fn memory_lines_are_in_bytes() {
        let text = "Name:\thra\nVmPeak:\t 9 kB\nVmHWM:\t  1536 kB\nThreads:\t1\n";
        assert_eq!(kib_line(text, "VmHWM:"), Some(1536 * 1024));
        assert_eq!(kib_line(text, "Threads:"), None);
    }

    #[test]
    fn peak_memory_grows_with_use() {
        let before = peak_process_memory().expect("Linux has /proc");
        // Larger than what any other test of this binary holds at a time.
        let block = vec![1u8; (before + (64 << 20)) as usize];
        let after = peak_process_memory().expect("Linux has /proc");
        assert!(
            after > before,
            "{after} after {} bytes on top of {before}",
            std::hint::black_box(&block).len()
        );
    }
}
