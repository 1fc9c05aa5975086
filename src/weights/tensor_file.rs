//! One safetensors file: a checked header, tensors read straight into libtorch's memory, and atomic writing.
//!
//! Reading goes tensor by tensor, so a model is never held twice: the file is not mapped, and each tensor is converted
//! and moved to its device before the next one is read. Large files are written in the same way ([`write_stream`]).

use crate::error::{Error, Result};
use crate::platform::disguise::disguise;
use crate::platform::files;
use crate::platform::host;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde_json::json;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{Read, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use tch::{Kind, Tensor};

/// The largest header that is read: the format's own limit.
const MAX_HEADER: u64 = 100_000_000;

/// Most dimensions of a tensor: many of libtorch's operations take no more.
const MAX_DIMENSIONS: usize = 64;

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
        if files::kind(path) == Some(files::Kind::Other) {
            // To open a pipe is to wait for its writer.
            return Err(Error::format(
                path,
                "expected a safetensors file, found a pipe, device or broken link",
            ));
        }
        let mut file = File::open(path).map_err(|e| Error::io("open", path, e))?;
        let length = file.metadata().map_err(|e| Error::io("read", path, e))?.len();
        let not_safetensors = |why: String| {
            Error::format(path, format!("expected a safetensors file, found {why}"))
                .with_hint("is it one, and is the download complete?")
        };
        let mut size = [0u8; 8];
        if let Some((found, hint)) = disguise_of(&file) {
            let problem = format!("expected a safetensors file, found {found}");
            return Err(Error::format(path, problem).with_hint(hint));
        }
        file.read_exact(&mut size).map_err(|_| not_safetensors(format!("a file of {length} bytes")))?;
        let header = u64::from_le_bytes(size);
        if header > MAX_HEADER || 8 + header > length {
            return Err(not_safetensors(format!(
                "a file of {length} bytes whose first bytes promise a header of {header}"
            )));
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
        for (name, info) in metadata.tensors() {
            if !is_possible(&info.shape) {
                let dimensions = info.shape.len();
                let problem = format!(
                    "tensor `{name}`: expected up to {MAX_DIMENSIONS} dimensions whose product is a 64-bit number, \
                     found {dimensions}"
                );
                return Err(Error::format(path, problem));
            }
        }
        Ok(Self { path: path.to_path_buf(), file, metadata, data_start: 8 + header })
    }

    /// The same file with other names: `rename` gives the new one, `None` where it stays. Errors: two tensors get one name.
    pub fn renamed(mut self, rename: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let tensors = self.metadata.tensors().into_iter();
        let mut tensors: Vec<(String, TensorInfo)> =
            tensors.map(|(name, info)| (rename(&name).unwrap_or(name), info.clone())).collect();
        tensors.sort_by_key(|(_, info)| info.data_offsets);
        let mut names: Vec<&str> = tensors.iter().map(|(name, _)| name.as_str()).collect();
        names.sort_unstable();
        if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(Error::format(&self.path, format!("`{}` is there twice, by two names", pair[0])));
        }
        let text = self.metadata.metadata().clone();
        self.metadata = Metadata::new(text, tensors).map_err(|e| Error::format(&self.path, e.to_string()))?;
        Ok(self)
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file's free text, by key.
    pub fn texts(&self) -> BTreeMap<String, String> {
        self.metadata.metadata().iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect()
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.metadata.tensors().into_keys().collect();
        names.sort();
        names
    }

    /// A text of the header's metadata.
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

    /// The kind of number that a tensor holds, if libtorch has it.
    pub fn kind(&self, name: &str) -> Option<Kind> {
        self.metadata.info(name).and_then(|i| kind_of(i.dtype))
    }

    /// Reads one tensor as it is in the file, on the CPU.
    pub fn read(&self, name: &str) -> Result<Tensor> {
        let info = self.info(name)?;
        self.read_part(name, &info.shape, info.data_offsets.0..info.data_offsets.1)
    }

    /// Reads part `i` of the `n` equal parts into which the rows of a tensor divide.
    pub fn read_rows(&self, name: &str, i: usize, n: usize) -> Result<Tensor> {
        let info = self.info(name)?;
        let (mut shape, (start, end)) = (info.shape.clone(), info.data_offsets);
        match shape.first_mut() {
            Some(rows) if *rows % n == 0 => *rows /= n,
            _ => {
                let problem = format!("tensor `{name}`: expected rows in {n} equal parts, found {shape:?}");
                return Err(Error::format(&self.path, problem));
            }
        }
        let size = (end - start) / n;
        self.read_part(name, &shape, start + i * size..start + (i + 1) * size)
    }

    /// Reads one floating-point tensor, converted.
    pub fn read_as(&self, name: &str, kind: Kind) -> Result<Tensor> {
        let tensor = self.read(name)?;
        if !is_float(tensor.kind()) {
            let dtype = self.dtype(name);
            return Err(Error::format(
                &self.path,
                format!("tensor `{name}`: expected floating point, found {dtype}"),
            ));
        }
        Ok(tensor.f_to_kind(kind)?)
    }

    /// The first `count` bytes of part `i` of the `n` equal parts of a tensor's data (all of it, where it has fewer).
    pub fn first_bytes(&self, name: &str, i: usize, n: usize, count: usize) -> Result<Vec<u8>> {
        let (start, end) = self.info(name)?.data_offsets;
        let size = (end - start) / n;
        let mut bytes = vec![0u8; count.min(size)];
        self.file
            .read_exact_at(&mut bytes, self.data_start + (start + i * size) as u64)
            .map_err(|e| Error::io("read", &self.path, e))?;
        Ok(bytes)
    }

    fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.metadata.info(name).ok_or_else(|| {
            Error::format(&self.path, format!("expected a tensor `{name}`, found {}", list(&self.names())))
        })
    }

    fn read_part(&self, name: &str, shape: &[usize], bytes: Range<usize>) -> Result<Tensor> {
        let kind = self.kind(name).ok_or_else(|| {
            let dtype = self.dtype(name);
            Error::format(&self.path, format!("tensor `{name}` has dtype {dtype}, which is not supported"))
        })?;
        let shape: Vec<i64> = shape.iter().map(|&d| d as i64).collect();
        let tensor = host::empty(&shape, kind)?;
        if tensor.numel() * kind.elt_size_in_bytes() != bytes.len() {
            return Err(Error::format(&self.path, "the header's sizes contradict its shapes"));
        }
        if bytes.is_empty() {
            return Ok(tensor);
        }
        // SAFETY: the tensor is contiguous, ours alone, and holds exactly so many bytes.
        let memory = unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<u8>(), bytes.len()) };
        self.file
            .read_exact_at(memory, self.data_start + bytes.start as u64)
            .map_err(|e| Error::io("read", &self.path, e))?;
        Ok(tensor)
    }
}

/// Writes tensors and free text to `path`, whole or not at all.
pub fn write(path: &Path, tensors: &[(String, Tensor)], text: &[(&str, String)]) -> Result<()> {
    let planned = |(name, tensor): &(String, Tensor)| PlannedTensor {
        name: name.clone(),
        kind: tensor.kind(),
        shape: tensor.size(),
    };
    let by_name: HashMap<&str, &Tensor> = tensors.iter().map(|(name, t)| (name.as_str(), t)).collect();
    write_stream(path, tensors.iter().map(planned).collect(), text, |name| Ok(by_name[name].shallow_clone()))
}

/// What a tensor that is yet to be written will be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedTensor {
    /// Its name in the file.
    pub name: String,
    /// Its number format.
    pub kind: Kind,
    /// Its shape.
    pub shape: Vec<i64>,
}

/// Writes a file whose tensors are fetched one at a time, in the order of the file; whole or not at all. With the same
/// tensors the bytes are those of [`to_bytes`].
///
/// `fetch` is given a name and must answer with the kind and shape that were planned, on any device.
pub fn write_stream(
    path: &Path,
    plan: Vec<PlannedTensor>,
    text: &[(&str, String)],
    mut fetch: impl FnMut(&str) -> Result<Tensor>,
) -> Result<()> {
    let (plan, header) = layout(plan, text)?;
    files::write_atomic_with(path, |file| {
        let mut write = |bytes: &[u8]| file.write_all(bytes).map_err(|e| Error::io("write", path, e));
        write(&header)?;
        for PlannedTensor { name, kind, shape } in &plan {
            let tensor = fetch(name)?;
            if (tensor.kind(), tensor.size()) != (*kind, shape.clone()) {
                let found = format!("{:?} {:?}", tensor.kind(), tensor.size());
                return Err(Error::format(
                    path,
                    format!("`{name}`: planned {kind:?} {shape:?}, got {found}"),
                ));
            }
            with_bytes(&tensor, &mut write)??;
        }
        Ok(())
    })
}

/// The bytes of a safetensors file. The same tensors give the same bytes: the crate's own writer puts the metadata in the
/// order of a hash map, which differs from run to run.
pub fn to_bytes(tensors: &[(String, Tensor)], text: &[(&str, String)]) -> Result<Vec<u8>> {
    let plan =
        |(name, t): &(String, Tensor)| PlannedTensor { name: name.clone(), kind: t.kind(), shape: t.size() };
    let (plan, mut bytes) = layout(tensors.iter().map(plan).collect(), text)?;
    let by_name: HashMap<&str, &Tensor> = tensors.iter().map(|(name, t)| (name.as_str(), t)).collect();
    for planned in &plan {
        with_bytes(by_name[planned.name.as_str()], |data| bytes.extend_from_slice(data))?;
    }
    Ok(bytes)
}

/// The tensors in the order of the file, and all that comes before their data.
fn layout(plan: Vec<PlannedTensor>, text: &[(&str, String)]) -> Result<(Vec<PlannedTensor>, Vec<u8>)> {
    let mut plan: Vec<(Dtype, PlannedTensor)> =
        plan.into_iter().map(|p| Ok((dtype_of(&p)?, p))).collect::<Result<_>>()?;
    // As upstream: wide numbers first, so that all are aligned; then by name.
    plan.sort_by(|(a, left), (b, right)| (b, &left.name).cmp(&(a, &right.name)));
    let mut metadata = serde_json::Map::from_iter([("format".to_string(), "pt".into())]);
    metadata.extend(text.iter().map(|(k, v)| (k.to_string(), v.as_str().into())));
    let mut header = serde_json::Map::from_iter([("__metadata__".to_string(), metadata.into())]);
    let mut end = 0;
    for (dtype, PlannedTensor { name, kind, shape }) in &plan {
        let start = end;
        end += shape.iter().product::<i64>() as usize * kind.elt_size_in_bytes();
        header.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]}));
    }
    let mut header = serde_json::Value::from(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut header);
    Ok((plan.into_iter().map(|(_, planned)| planned).collect(), bytes))
}

fn dtype_of(planned: &PlannedTensor) -> Result<Dtype> {
    Ok(match planned.kind {
        Kind::Float => Dtype::F32,
        Kind::Double => Dtype::F64,
        Kind::Half => Dtype::F16,
        Kind::BFloat16 => Dtype::BF16,
        Kind::Int64 => Dtype::I64,
        other => {
            let name = &planned.name;
            return Err(Error::device(format!("{name}: tensors of kind {other:?} are not written to files")));
        }
    })
}

/// Hands a tensor's values to `take`, as the file holds them.
fn with_bytes<T>(tensor: &Tensor, take: impl FnOnce(&[u8]) -> T) -> Result<T> {
    let t = host::try_to_device(&tensor.detach(), host::CPU)?.f_contiguous()?;
    let length = t.numel() * t.kind().elt_size_in_bytes();
    if length == 0 {
        return Ok(take(&[]));
    }
    // SAFETY: `t` is contiguous on the CPU, holds `length` bytes, and lives until `take` is done.
    Ok(take(unsafe { std::slice::from_raw_parts(t.data_ptr().cast::<u8>(), length) }))
}

/// What a file is in place of tensors, by its first bytes ([`disguise`]).
pub(super) fn disguise_of(file: &File) -> Option<(&'static str, &'static str)> {
    let mut first = [0u8; 256];
    let length = file.read_at(&mut first, 0).ok()?;
    disguise(&first[..length])
}

/// Whether libtorch can have a tensor of this shape. A dimension of 0 makes any other one pass for a file's size.
fn is_possible(shape: &[usize]) -> bool {
    let numbers = |product: i64, d: &usize| product.checked_mul(i64::try_from(*d).ok()?.max(1));
    // A number has up to 8 bytes.
    let bytes = shape.iter().try_fold(8, numbers);
    shape.len() <= MAX_DIMENSIONS && bytes.is_some()
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
