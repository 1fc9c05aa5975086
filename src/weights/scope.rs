//! The weights of one model part, handed out by name with every check made.
//!
//! A module asks its [`Scope`] for `weight` with the shape it needs. What is missing or does not fit is noted, a
//! stand-in without memory is given instead, and [`Weights::finish`] reports all problems of the part at once.

use crate::error::{Error, Result};
use crate::platform::host;
use crate::platform::precision::{Numbers, Precision};
use crate::weights::part::Part;
use crate::weights::source::Source;
use crate::weights::tensors::Tensors;
use sha2::Sha256;
use std::cell::RefCell;
use std::collections::HashSet;
use std::fmt::Display;
use std::path::Path;
use tch::{Device, Tensor};

/// The tensors of one model part, for a network with certain numbers on a device.
pub struct Weights {
    tensors: Tensors,
    numbers: Numbers,
    device: Device,
    problems: RefCell<Vec<String>>,
    used: RefCell<HashSet<String>>,
}

impl Weights {
    /// Opens the weights of a part.
    pub fn open(source: &Source, part: Part, numbers: Numbers, device: Device) -> Result<Self> {
        Ok(Self::new(source.tensors(part)?, numbers, device))
    }

    /// Opens the weights of a folder that holds one model: `STEM.safetensors`, or the index of its shards.
    pub fn in_folder(dir: &Path, stem: &str, numbers: Numbers, device: Device) -> Result<Self> {
        Ok(Self::new(Tensors::in_folder(dir, stem, |_| None)?, numbers, device))
    }

    fn new(tensors: Tensors, numbers: Numbers, device: Device) -> Self {
        let problems = RefCell::new(tensors.problems().to_vec());
        Self { tensors, numbers, device, problems, used: RefCell::default() }
    }

    /// The top of the name tree.
    pub fn root(&self) -> Scope<'_> {
        Scope { weights: self, prefix: String::new() }
    }

    /// Hashes what tells these weights from others: [`Tensors::identify`].
    pub fn identify(&self, hash: &mut Sha256) -> Result<()> {
        self.tensors.identify(hash)
    }

    /// Shape of the tensor `name`, if the file has it.
    pub fn shape(&self, name: &str) -> Option<Vec<i64>> {
        self.tensors.shape(name)
    }

    /// Fails with every problem found; otherwise names the tensors of the file that nothing asked for.
    pub fn finish(self) -> Result<Vec<String>> {
        let problems = self.problems.into_inner();
        if !problems.is_empty() {
            return Err(Error::weights(self.tensors.place(), problems));
        }
        let used = self.used.into_inner();
        let unused =
            self.tensors.names().filter(|name| !used.contains(*name) && !self.tensors.is_spare(name));
        Ok(unused.chain(self.tensors.unknown().iter().map(String::as_str)).map(str::to_string).collect())
    }

    fn tensor(&self, name: &str, shape: &[i64]) -> Tensor {
        let problem = match self.tensors.key(name) {
            None => format!("`{name}` {shape:?} is missing"),
            Some(key) => {
                self.used.borrow_mut().insert(name.to_string());
                let in_file = self.tensors.shape(name).unwrap_or_default();
                if !same_shape(&in_file, shape) {
                    format!("`{key}`: expected shape {shape:?}, found {in_file:?}")
                } else if !self.tensors.is_float(name) {
                    format!("`{key}`: expected floating point, found {}", self.tensors.dtype(name))
                } else {
                    match self.converted(name) {
                        Ok(tensor) if host::all_finite(&tensor) => {
                            let tensor = tensor.reshape(shape);
                            return if shape.len() == 1 {
                                tensor.to_kind(self.numbers.compute)
                            } else {
                                tensor
                            };
                        }
                        Ok(_) if self.tensors.read(name).is_ok_and(|tensor| host::all_finite(&tensor)) => {
                            let dtype = Precision::of(self.numbers.rest).unwrap_or_default();
                            format!("`{key}`: holds numbers that --dtype {dtype} does not hold")
                        }
                        Ok(_) => format!("`{key}`: holds numbers that are not finite"),
                        Err(e) => e.to_string(),
                    }
                }
            }
        };
        self.problems.borrow_mut().push(problem);
        // Never computed with: finish() fails. An expanded scalar costs no memory, however large a config's sizes are.
        host::zeros(&[1], self.numbers.rest).expand(shape, false)
    }

    fn converted(&self, name: &str) -> Result<Tensor> {
        Ok(host::upload(&self.tensors.read(name)?, self.device)?.f_to_kind(self.numbers.rest)?)
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

    /// The tensor `name` below this place, which must have this shape; as it rests, a vector as it computes.
    pub fn tensor(&self, name: &str, shape: &[i64]) -> Tensor {
        self.weights.tensor(&self.at(name).prefix, shape)
    }

    /// How the network holds its numbers.
    pub fn numbers(&self) -> Numbers {
        self.weights.numbers
    }

    /// This place's full name, as in the checkpoint.
    pub fn path(&self) -> String {
        self.prefix.clone()
    }
}
