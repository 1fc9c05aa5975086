//! What there is of CUDA: libtorch's CUDA half, NVIDIA's driver and runtime, all opened at run time.
//!
//! The binary is linked to libtorch_cpu only, so that it starts where no NVIDIA library is installed (libtorch_cuda.so
//! of the 2.11.0 wheel needs a dozen of them, by readelf). Opening libtorch_cuda.so before the first tensor is made
//! registers its kernels, as linking it would (tch-rs issue 988). The driver (libcuda) and the runtime (libcudart) are
//! asked through their documented C functions for what tch does not bind: names, memory, error texts.

use std::ffi::{CStr, c_char, c_int, c_uint};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::Error;
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use serde::Serialize;

/// What became of libtorch_cuda.so.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum CudaState {
    /// It is in this process; whether a device can be used is another question ([`unusable`]).
    Loaded { library: PathBuf },
    /// This libtorch has no CUDA half.
    Absent { folder: PathBuf },
    /// It is there, but the loader refused it, for this reason: as a rule a library it needs is missing.
    Refused { library: PathBuf, message: String },
}

/// Opens libtorch_cuda.so beside the loaded libtorch_cpu.so. Must be called before the first tch call of the process;
/// later calls return what the first one found.
pub fn load_cuda() -> &'static CudaState {
    static STATE: OnceLock<CudaState> = OnceLock::new();
    STATE.get_or_init(|| open_beside(&libtorch_folder().unwrap_or_default()))
}

fn open_beside(folder: &Path) -> CudaState {
    let library = folder.join("libtorch_cuda.so");
    if !library.exists() {
        return CudaState::Absent { folder: folder.to_path_buf() };
    }
    // SAFETY: the initialisers that run are libtorch's own, which are made to run at any time before its first use.
    match unsafe { Library::open(Some(&library), RTLD_NOW | RTLD_GLOBAL) } {
        Ok(handle) => {
            // Its kernels are registered in libtorch_cpu for the rest of the process.
            std::mem::forget(handle);
            CudaState::Loaded { library }
        }
        Err(error) => {
            let message = deepest(&error).trim_start_matches(&format!("{}: ", library.display())).to_string();
            CudaState::Refused { library, message }
        }
    }
}

/// libloading wraps the loader's own words, which are what the user needs.
fn deepest(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(|| error.to_string(), deepest)
}

/// The folder that libtorch_cpu.so was loaded from.
pub fn libtorch_folder() -> Option<PathBuf> {
    loaded_library("libtorch_cpu.so").and_then(|library| library.parent().map(Path::to_path_buf))
}

/// The path of the first library in this process whose file name begins with `prefix`.
pub fn loaded_library(prefix: &str) -> Option<PathBuf> {
    library_in_maps(&std::fs::read_to_string("/proc/self/maps").ok()?, prefix)
}

/// proc(5): five columns, then the path to the end of the line, which may hold spaces.
fn library_in_maps(maps: &str, prefix: &str) -> Option<PathBuf> {
    maps.lines().filter_map(|line| line.find('/').map(|at| Path::new(&line[at..]))).find_map(|path| {
        let name = path.file_name()?.to_str()?;
        name.starts_with(prefix).then(|| path.to_path_buf())
    })
}

/// Why CUDA cannot be used, with what to do about it as hint, or `None` where it can.
pub fn unusable() -> Option<Error> {
    let needs = "run `make setup` on a machine with an NVIDIA driver; `hra doctor` shows what is missing";
    match load_cuda() {
        CudaState::Absent { folder } => Some(
            Error::device(format!(
                "there is no libtorch_cuda.so in {}: this libtorch is for CPUs only",
                folder.display()
            ))
            .with_hint(
                "run `make setup` without LIBTORCH, or set LIBTORCH to a libtorch with CUDA and build again",
            ),
        ),
        CudaState::Refused { message, .. } => {
            let driver = if driver_version().is_none() { "; there is no NVIDIA driver either" } else { "" };
            let why = format!("libtorch_cuda.so could not be loaded: {message}{driver}");
            Some(Error::device(why).with_hint(needs))
        }
        CudaState::Loaded { .. } if tch::Cuda::is_available() => None,
        CudaState::Loaded { .. } => {
            let (found, hint) = match (driver_version(), Driver::open()) {
                (None, Err(message)) => (
                    format!("there is no NVIDIA driver: {message}"),
                    "install NVIDIA's driver, or run on the CPU with `--device cpu`".to_string(),
                ),
                (version, driver) => {
                    let version = version.map_or_else(String::new, |v| format!(" {v}"));
                    let said = driver.err().or_else(runtime_error).unwrap_or_else(|| "no device".to_string());
                    let hint = "check `nvidia-smi`, CUDA_VISIBLE_DEVICES and the driver's age (CUDA 13 needs 580 or newer)";
                    (format!("NVIDIA's driver{version} gives no device: {said}"), hint.to_string())
                }
            };
            Some(Error::device(found).with_hint(format!("{hint}; `hra doctor` shows more")))
        }
    }
}

/// The version of the kernel driver, such as `580.82.07`, from /proc/driver/nvidia/version.
pub fn driver_version() -> Option<String> {
    let text = std::fs::read_to_string("/proc/driver/nvidia/version").ok()?;
    driver_version_in(&text)
}

/// The first word of the form 1.2 or 1.2.3: the line begins with names that differ from driver to driver.
fn driver_version_in(text: &str) -> Option<String> {
    let line = text.lines().find(|line| line.starts_with("NVRM version"))?;
    let version = |word: &&str| word.contains('.') && word.split('.').all(|n| n.parse::<u32>().is_ok());
    line.split_whitespace().find(version).map(str::to_string)
}

/// One GPU as the driver describes it.
#[derive(Debug, Clone, Serialize)]
pub struct Gpu {
    /// The number to put after `cuda:`.
    pub index: usize,
    /// The product name.
    pub name: String,
    /// Memory in bytes.
    pub memory: u64,
    /// Compute capability, major and minor.
    pub capability: (i32, i32),
}

/// NVIDIA's driver library, initialised.
pub struct Driver(Library);

type DriverResult = c_int; // CUresult, 0 is success

impl Driver {
    /// Opens and initialises libcuda; the error is the loader's or the driver's own word.
    pub fn open() -> Result<Self, String> {
        // SAFETY: the driver library may be opened at any time; the signatures are those of cuda.h.
        unsafe {
            let library = Library::open(Some("libcuda.so.1"), RTLD_NOW).map_err(|e| deepest(&e))?;
            let init = library
                .get::<unsafe extern "C" fn(c_uint) -> DriverResult>(b"cuInit\0")
                .map_err(|e| deepest(&e))?;
            match init(0) {
                0 => Ok(Self(library)),
                code => Err(format!("cuInit answers {}", error_name(&library, code))),
            }
        }
    }

    /// The GPUs that CUDA_VISIBLE_DEVICES leaves, in CUDA's order.
    pub fn gpus(&self) -> Result<Vec<Gpu>, String> {
        let mut count: c_int = 0;
        // SAFETY: cuda.h: CUresult cuDeviceGetCount(int*).
        self.call::<unsafe extern "C" fn(*mut c_int) -> DriverResult>("cuDeviceGetCount", |f| unsafe {
            f(&mut count)
        })?;
        (0..count).map(|ordinal| self.gpu(ordinal)).collect()
    }

    fn gpu(&self, ordinal: c_int) -> Result<Gpu, String> {
        let (mut device, mut name, mut memory): (c_int, [c_char; 256], usize) = (0, [0; 256], 0);
        // SAFETY (all below): the signatures are those of cuda.h and every pointer is to a live local of that size.
        self.call::<unsafe extern "C" fn(*mut c_int, c_int) -> DriverResult>("cuDeviceGet", |f| unsafe {
            f(&mut device, ordinal)
        })?;
        self.call::<unsafe extern "C" fn(*mut c_char, c_int, c_int) -> DriverResult>(
            "cuDeviceGetName",
            // One less than the room, so that the text ends in a zero whatever the driver does.
            |f| unsafe { f(name.as_mut_ptr(), 255, device) },
        )?;
        self.call::<unsafe extern "C" fn(*mut usize, c_int) -> DriverResult>(
            "cuDeviceTotalMem_v2",
            |f| unsafe { f(&mut memory, device) },
        )?;
        let attribute = |id: c_int| {
            let mut value: c_int = 0;
            self.call::<unsafe extern "C" fn(*mut c_int, c_int, c_int) -> DriverResult>(
                "cuDeviceGetAttribute",
                |f| unsafe { f(&mut value, id, device) },
            )
            .map(|()| value)
        };
        // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        let capability = (attribute(75)?, attribute(76)?);
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
        Ok(Gpu { index: ordinal as usize, name, memory: memory as u64, capability })
    }

    fn call<F>(&self, name: &str, call: impl FnOnce(&F) -> DriverResult) -> Result<(), String> {
        // SAFETY: the caller names the function's signature as cuda.h has it.
        let function = unsafe { self.0.get::<F>(name.as_bytes()) }.map_err(|e| deepest(&e))?;
        match call(&function) {
            0 => Ok(()),
            code => Err(format!("{name} answers {}", error_name(&self.0, code))),
        }
    }
}

/// The driver's name of an error, such as CUDA_ERROR_NO_DEVICE.
fn error_name(library: &Library, code: DriverResult) -> String {
    type Name = unsafe extern "C" fn(DriverResult, *mut *const c_char) -> DriverResult;
    let mut text: *const c_char = std::ptr::null();
    // SAFETY: cuda.h: CUresult cuGetErrorName(CUresult, const char**), which points at a constant text or null.
    unsafe {
        match library.get::<Name>(b"cuGetErrorName\0") {
            Ok(name) if name(code, &mut text) == 0 && !text.is_null() => {
                CStr::from_ptr(text).to_string_lossy().into_owned()
            }
            _ => format!("error {code}"),
        }
    }
}

/// libcudart as libtorch_cpu brought it along.
fn runtime() -> Option<Library> {
    let path = loaded_library("libcudart.so")?;
    // SAFETY: it is in the process already; this only counts one more user.
    unsafe { Library::open(Some(path), RTLD_NOW) }.ok()
}

/// What the runtime says about the devices, such as "CUDA driver version is insufficient for CUDA runtime version".
fn runtime_error() -> Option<String> {
    let library = runtime()?;
    // SAFETY: cuda_runtime_api.h: cudaError_t cudaGetDeviceCount(int*), const char* cudaGetErrorString(cudaError_t).
    unsafe {
        let count = library.get::<unsafe extern "C" fn(*mut c_int) -> c_int>(b"cudaGetDeviceCount\0").ok()?;
        let text =
            library.get::<unsafe extern "C" fn(c_int) -> *const c_char>(b"cudaGetErrorString\0").ok()?;
        let mut devices: c_int = 0;
        match count(&mut devices) {
            0 => None,
            code => Some(CStr::from_ptr(text(code)).to_string_lossy().into_owned()),
        }
    }
}

/// The version of the loaded cuDNN, such as 91900; `None` where it is not loaded.
pub fn cudnn_version() -> Option<usize> {
    let path = loaded_library("libcudnn.so")?;
    // SAFETY: cudnn.h: size_t cudnnGetVersion(void).
    unsafe {
        let library = Library::open(Some(path), RTLD_NOW).ok()?;
        let version = library.get::<unsafe extern "C" fn() -> usize>(b"cudnnGetVersion\0").ok()?;
        Some(version())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_libraries_in_the_memory_map() {
        let maps = "\
7f0000000000-7f0000001000 r--p 00000000 08:01 11 /usr/lib/libc.so.6
7f0000001000-7f0000002000 rw-p 00000000 00:00 0
7f0000002000-7f0000003000 r-xp 00001000 08:01 12 /opt/my libs/torch/lib/libtorch_cpu.so
7f0000003000-7f0000004000 rw-p 00000000 00:00 0 [heap]
";
        assert_eq!(
            library_in_maps(maps, "libtorch_cpu.so"),
            Some(PathBuf::from("/opt/my libs/torch/lib/libtorch_cpu.so"))
        );
        assert_eq!(library_in_maps(maps, "libtorch_cuda.so"), None);
    }

    #[test]
    fn reads_both_forms_of_the_driver_line() {
        let closed = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54.03  Tue Jun  6 22:20:39 UTC 2023\n\
                      GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n";
        let open = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build\n";
        assert_eq!(driver_version_in(closed).as_deref(), Some("535.54.03"));
        assert_eq!(driver_version_in(open).as_deref(), Some("580.82.07"));
        assert_eq!(driver_version_in("GCC version:  gcc version 12.2.0\n"), None);
    }

    #[test]
    fn a_folder_without_the_cuda_half_is_absent() {
        let folder = tempfile::tempdir().expect("a scratch folder");
        assert!(matches!(open_beside(folder.path()), CudaState::Absent { .. }));
    }

    #[test]
    fn keeps_the_loaders_words() {
        let folder = tempfile::tempdir().expect("a scratch folder");
        let library = folder.path().join("libtorch_cuda.so");
        std::fs::write(
            &library,
            "this is no library, but long enough to have a header of sixty-four bytes or so",
        )
        .expect("a scratch file");
        let CudaState::Refused { message, .. } = open_beside(folder.path()) else {
            panic!("a text file was loaded as a library")
        };
        // glibc's text, without our path in front of it.
        assert_eq!(message, "invalid ELF header");
    }
}
