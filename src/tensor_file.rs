//! One safetensors file: a checked header, tensors read straight into libtorch's memory, and atomic writing.
//!
//! Reading goes tensor by tensor, so a model is never held twice: the file is not mapped, and each tensor is converted
//! and moved to its device before the next one is read.

use crate::error::{Error, Result};
use crate::files;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde_json::json;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// The largest header that is read: the format's own limit.
const MAX_HEADER: u64 = 100_000_000;

/// An open safetensors file whose header has been checked against its length.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    file: File,
    metadata: Metadata,
    data_start: u64,
}

impl TensorFile {
    /// Opens `path` and checks its header: sizes, offsets, and that all of the data is there.
    pub fn open(path: &Path) -> Result<Self> {
        let mut file = File::open(path).map_err(|e| Error::io("open", path, e))?;
        let length = file.metadata().map_err(|e| Error::io("read", path, e))?.len();
        let not_safetensors = |why: String| {
            Error::format(
                path,
                format!("expected a safetensors file, found {why}\nhint: is the download complete?"),
            )
        };
        let mut size = [0u8; 8];
        file.read_exact(&mut size).map_err(|_| not_safetensors(format!("a file of {length} bytes")))?;
        let header = u64::from_le_bytes(size);
        if header > MAX_HEADER || 8 + header > length {
            return Err(not_safetensors(format!("a header of {header} bytes in a file of {length} bytes")));
        }
        let mut buffer = vec![0u8; header as usize];
        file.read_exact(&mut buffer).map_err(|e| Error::io("read", path, e))?;
        // Deserialising checks that shapes, dtypes and offsets agree and that the tensors cover the data without gap.
        let metadata: Metadata =
            serde_json::from_slice(&buffer).map_err(|e| not_safetensors(format!("a broken header ({e})")))?;
        let expected = (8 + header).saturating_add(metadata.data_len() as u64);
        if expected != length {
            return Err(not_safetensors(format!("{length} bytes where its header promises {expected}")));
        }
        Ok(Self { path: path.to_path_buf(), file, metadata, data_start: 8 + header })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.metadata.tensors().into_keys().collect();
        names.sort();
        names
    }

    /// An entry of the file's metadata.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.metadata.metadata().as_ref()?.get(key).map(String::as_str)
    }

    /// Shape of a tensor, if it is there.
    pub fn shape(&self, name: &str) -> Option<Vec<i64>> {
        self.metadata.info(name).map(|i| i.shape.iter().map(|&d| d as i64).collect())
    }

    /// Whether a tensor holds floating-point numbers that can be converted.
    pub fn is_float(&self, name: &str) -> bool {
        self.metadata.info(name).and_then(|i| kind_of(i.dtype)).is_some_and(is_float)
    }

    /// The dtype's name in the file, for messages.
    pub fn dtype(&self, name: &str) -> String {
        self.metadata.info(name).map(|i| format!("{:?}", i.dtype)).unwrap_or_default()
    }

    /// Reads one tensor as it is in the file, on the CPU.
    pub fn read(&self, name: &str) -> Result<Tensor> {
        let info = self.metadata.info(name).ok_or_else(|| {
            Error::format(&self.path, format!("expected a tensor `{name}`, found {}", list(&self.names())))
        })?;
        let kind = kind_of(info.dtype).ok_or_else(|| {
            Error::format(
                &self.path,
                format!("tensor `{name}` has dtype {:?}, which is not supported", info.dtype),
            )
        })?;
        let shape: Vec<i64> = info.shape.iter().map(|&d| d as i64).collect();
        let tensor = Tensor::f_empty(&shape[..], (kind, Device::Cpu))?;
        self.read_into(info, &tensor)?;
        Ok(tensor)
    }

    /// Reads one floating-point tensor, converted and moved.
    pub fn read_as(&self, name: &str, kind: Kind, device: Device) -> Result<Tensor> {
        let tensor = self.read(name)?;
        if !is_float(tensor.kind()) {
            let dtype = self.dtype(name);
            return Err(Error::format(
                &self.path,
                format!("tensor `{name}`: expected floating point, found {dtype}"),
            ));
        }
        Ok(tensor.f_to_device(device)?.f_to_kind(kind)?)
    }

    fn read_into(&self, info: &TensorInfo, tensor: &Tensor) -> Result<()> {
        let (start, end) = info.data_offsets;
        let bytes = tensor.numel() * tensor.kind().elt_size_in_bytes();
        if bytes != end - start {
            return Err(Error::format(&self.path, "the header's sizes contradict its shapes"));
        }
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the tensor is contiguous, ours alone, and holds exactly `bytes` bytes.
        let memory = unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<u8>(), bytes) };
        self.file
            .read_exact_at(memory, self.data_start + start as u64)
            .map_err(|e| Error::io("read", &self.path, e))
    }
}

/// Length of the file at `path`, and its first and last 64 KiB (all of it, where it is shorter).
pub fn ends(path: &Path) -> Result<(u64, Vec<u8>)> {
    const END: u64 = 1 << 16;
    let fail = |e| Error::io("read", path, e);
    let file = File::open(path).map_err(fail)?;
    let length = file.metadata().map_err(fail)?.len();
    let first = length.min(END);
    let last = (length - first).min(END);
    let mut bytes = vec![0u8; (first + last) as usize];
    file.read_exact_at(&mut bytes[..first as usize], 0).map_err(fail)?;
    file.read_exact_at(&mut bytes[first as usize..], length - last).map_err(fail)?;
    Ok((length, bytes))
}

/// Writes tensors and free text to `path`, whole or not at all.
pub fn write(path: &Path, tensors: &[(String, Tensor)], text: &[(&str, String)]) -> Result<()> {
    files::write_atomic(path, &to_bytes(tensors, text)?)
}

/// The bytes of a safetensors file. The same tensors give the same bytes: the crate's own writer puts the metadata in the
/// order of a hash map, which differs from run to run.
pub fn to_bytes(tensors: &[(String, Tensor)], text: &[(&str, String)]) -> Result<Vec<u8>> {
    let mut views: Vec<View> = tensors.iter().map(|(name, t)| View::new(name, t)).collect::<Result<_>>()?;
    // As upstream: wide numbers first, so that all are aligned; then by name.
    views.sort_by(|a, b| (b.dtype, &a.name).cmp(&(a.dtype, &b.name)));
    let mut metadata = serde_json::Map::from_iter([("format".to_string(), "pt".into())]);
    metadata.extend(text.iter().map(|(k, v)| (k.to_string(), v.as_str().into())));
    let mut header = serde_json::Map::from_iter([("__metadata__".to_string(), metadata.into())]);
    let mut end = 0;
    for view in &views {
        let start = end;
        end += view.bytes.len();
        let entry = json!({"dtype": view.dtype, "shape": view.shape, "data_offsets": [start, end]});
        header.insert(view.name.clone(), entry);
    }
    let mut header = serde_json::Value::from(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut bytes = Vec::with_capacity(8 + header.len() + end);
    bytes.extend_from_slice(&(header.len() as u64).to_le_bytes());
    bytes.append(&mut header);
    views.iter().for_each(|view| bytes.extend_from_slice(&view.bytes));
    Ok(bytes)
}

/// A tensor as the file holds it.
struct View {
    name: String,
    dtype: Dtype,
    shape: Vec<i64>,
    bytes: Vec<u8>,
}

impl View {
    fn new(name: &str, tensor: &Tensor) -> Result<Self> {
        let t = tensor.detach().f_to_device(Device::Cpu)?.f_contiguous()?;
        let dtype = match t.kind() {
            Kind::Float => Dtype::F32,
            Kind::Double => Dtype::F64,
            Kind::Half => Dtype::F16,
            Kind::BFloat16 => Dtype::BF16,
            Kind::Int64 => Dtype::I64,
            other => {
                return Err(Error::Device(format!(
                    "{name}: tensors of kind {other:?} are not written to files"
                )));
            }
        };
        let length = t.numel() * t.kind().elt_size_in_bytes();
        let mut bytes = vec![0u8; length];
        if length > 0 {
            // SAFETY: `t` is contiguous on the CPU and holds `length` bytes.
            bytes.copy_from_slice(unsafe { std::slice::from_raw_parts(t.data_ptr().cast::<u8>(), length) });
        }
        Ok(Self { name: name.to_string(), dtype, shape: t.size(), bytes })
    }
}

fn kind_of(dtype: Dtype) -> Option<Kind> {
    Some(match dtype {
        Dtype::F32 => Kind::Float,
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::F64 => Kind::Double,
        Dtype::I64 => Kind::Int64,
        Dtype::I32 => Kind::Int,
        Dtype::I16 => Kind::Int16,
        Dtype::I8 => Kind::Int8,
        Dtype::U8 => Kind::Uint8,
        Dtype::BOOL => Kind::Bool,
        _ => return None,
    })
}

fn is_float(kind: Kind) -> bool {
    matches!(kind, Kind::Float | Kind::Half | Kind::BFloat16 | Kind::Double)
}

/// The first few of many names, for messages.
pub fn list(names: &[String]) -> String {
    const SHOWN: usize = 5;
    match names.len() {
        0 => "none".to_string(),
        n if n <= SHOWN => names.join(", "),
        n => format!("{}, .. ({n} in all)", names[..SHOWN].join(", ")),
    }
}
