//! The weights of one part of a model folder, handed out by name with every check made.
//!
//! A module asks its [`Scope`] for `weight` with the shape it needs. What is missing or does not fit is noted, a
//! stand-in without memory is given instead, and [`Weights::finish`] reports all problems of the part at once.

use crate::error::{Error, Result};
use crate::files;
use crate::tensor_file::{self, TensorFile};
use std::cell::RefCell;
use std::collections::{BTreeMap, HashSet};
use std::fmt::Display;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// A rule that turns a published key into the name that today's layout uses; `None` leaves the key as it is.
pub type Rename = fn(&str) -> Option<String>;

/// The tensors of one model part, from one file or several shards.
pub struct Weights {
    dir: PathBuf,
    files: Vec<TensorFile>,
    /// Today's name -> (file, key in the file).
    index: BTreeMap<String, (usize, String)>,
    kind: Kind,
    device: Device,
    problems: RefCell<Vec<String>>,
    used: RefCell<HashSet<String>>,
}

impl Weights {
    /// Opens the weights in `dir`: `stem.safetensors`, its fp16 variant, or the index of its shards.
    pub fn open(dir: &Path, stem: &str, rename: Rename, kind: Kind, device: Device) -> Result<Self> {
        let files: Vec<TensorFile> =
            find_files(dir, stem)?.iter().map(|path| TensorFile::open(path)).collect::<Result<_>>()?;
        let mut index = BTreeMap::new();
        let mut problems = Vec::new();
        for (i, file) in files.iter().enumerate() {
            for key in file.names() {
                let name = rename(&key).unwrap_or_else(|| key.clone());
                if let Some((_, other)) = index.insert(name.clone(), (i, key.clone())) {
                    problems.push(format!("`{name}` is there twice, as `{other}` and `{key}`"));
                }
            }
        }
        Ok(Self {
            dir: dir.to_path_buf(),
            files,
            index,
            kind,
            device,
            problems: RefCell::new(problems),
            used: RefCell::default(),
        })
    }

    /// The top of the name tree.
    pub fn root(&self) -> Scope<'_> {
        Scope { weights: self, prefix: String::new() }
    }

    /// Shape of the tensor `name`, if the file has it.
    pub fn shape(&self, name: &str) -> Option<Vec<i64>> {
        self.index.get(name).and_then(|(i, key)| self.files[*i].shape(key))
    }

    /// Fails with every problem found; otherwise names the tensors of the file that nothing asked for.
    pub fn finish(self) -> Result<Vec<String>> {
        let problems = self.problems.into_inner();
        if !problems.is_empty() {
            return Err(Error::Weights { path: self.dir, problems });
        }
        let used = self.used.into_inner();
        Ok(self.index.into_keys().filter(|name| !used.contains(name)).collect())
    }

    fn tensor(&self, name: &str, shape: &[i64]) -> Tensor {
        let found = self.index.get(name).map(|(i, key)| (&self.files[*i], key));
        let problem = match found {
            None => format!("`{name}` {shape:?} is missing"),
            Some((file, key)) => {
                self.used.borrow_mut().insert(name.to_string());
                let in_file = file.shape(key).unwrap_or_default();
                if !same_shape(&in_file, shape) {
                    format!("`{key}`: expected shape {shape:?}, found {in_file:?}")
                } else if !file.is_float(key) {
                    format!("`{key}`: expected floating point, found {}", file.dtype(key))
                } else {
                    match file.read_as(key, self.kind, self.device) {
                        Ok(tensor) => return tensor.reshape(shape),
                        Err(e) => e.to_string(),
                    }
                }
            }
        };
        self.problems.borrow_mut().push(problem);
        // Never computed with: finish() fails. An expanded scalar costs no memory, however large a config's sizes are.
        Tensor::zeros([1], (self.kind, Device::Cpu)).expand(shape, false)
    }
}

/// A 1x1 convolution and a linear map hold the same numbers; published files have either form.
fn same_shape(found: &[i64], expected: &[i64]) -> bool {
    fn trimmed(shape: &[i64]) -> &[i64] {
        if shape.len() == 4 && shape[2..] == [1, 1] { &shape[..2] } else { shape }
    }
    trimmed(found) == trimmed(expected)
}

/// A place in the name tree of a [`Weights`].
#[derive(Clone)]
pub struct Scope<'a> {
    weights: &'a Weights,
    prefix: String,
}

impl Scope<'_> {
    /// The place below this one.
    pub fn at(&self, name: impl Display) -> Self {
        let dot = if self.prefix.is_empty() { "" } else { "." };
        Self { weights: self.weights, prefix: format!("{}{dot}{name}", self.prefix) }
    }

    /// The tensor `name` below this place, which must have this shape.
    pub fn tensor(&self, name: &str, shape: &[i64]) -> Tensor {
        self.weights.tensor(&self.at(name).prefix, shape)
    }

    /// This place's full name, as in the checkpoint.
    pub fn path(&self) -> String {
        self.prefix.clone()
    }
}

/// The files that hold the weights of `dir`, in the order of preference that diffusers has.
fn find_files(dir: &Path, stem: &str) -> Result<Vec<PathBuf>> {
    for name in [format!("{stem}.safetensors"), format!("{stem}.fp16.safetensors")] {
        let path = dir.join(name);
        if path.is_file() {
            return Ok(vec![path]);
        }
    }
    let indexes = ["safetensors.index.json", "safetensors.index.fp16.json", "fp16.safetensors.index.json"];
    for name in indexes.map(|end| format!("{stem}.{end}")) {
        let path = dir.join(name);
        if path.is_file() {
            return shards(dir, &path);
        }
    }
    let found: Vec<String> =
        files::list_dir(dir)?.iter().map(|entry| entry.name.to_string_lossy().into_owned()).collect();
    let pickled = found.iter().any(|n| n.ends_with(".bin") || n.ends_with(".ckpt"));
    let hint = if pickled {
        "\nhint: only safetensors files are read; convert with diffusers' `save_pretrained(.., safe_serialization=True)`"
    } else {
        ""
    };
    Err(Error::format(dir, format!("expected {stem}.safetensors, found {}{hint}", tensor_file::list(&found))))
}

/// The shard files that an index names. A shard is a plain file name: an index must not lead out of its folder.
fn shards(dir: &Path, index: &Path) -> Result<Vec<PathBuf>> {
    let value: serde_json::Value = serde_json::from_str(&files::read_to_string(index)?)
        .map_err(|e| Error::format(index, format!("not an index of shards: {e}")))?;
    let map = value["weight_map"].as_object();
    let map = map.ok_or_else(|| Error::format(index, "expected an object `weight_map`, found none"))?;
    let mut names: Vec<&str> = map.values().filter_map(|v| v.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    if let Some(bad) = names.iter().find(|n| Path::new(n).file_name() != Some(n.as_ref())) {
        return Err(Error::format(index, format!("expected plain file names of shards, found `{bad}`")));
    }
    Ok(names.into_iter().map(|n| dir.join(n)).collect())
}
