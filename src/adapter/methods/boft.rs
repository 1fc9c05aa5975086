//! BOFT (arXiv 2311.06243): `W' = diag(s) W B^T`, `B = B_(m-1) .. B_1 B_0`, each factor a permuted block-diagonal rotation.
//!
//! As PEFT 0.21 stores it (`boft/layer.py`): raw blocks P `(m, d_in / b, b, b)`, made skew as `(P - P^T) / 2` and then
//! rotations by the exact Cayley transform, and a scale for each output, which leaves the bias alone. One factor is OFT
//! with dense raw blocks and that scale; PEFT makes more only with its CUDA extension.

use crate::adapter::blocks::{self, Cayley, Partition, PartitionSettings};
use crate::adapter::how::ELSEWHERE;
use crate::adapter::method::{
    Combined, FileFacts, How, LayerChain, Method, MethodSettings, OwnSection, OwnSettings, Parts, PeftReader,
    RegisteredMethod,
};
use crate::adapter::peft_fields::halves;
use crate::adapter::{Adapter, Change, Form, Frozen, Geometry, Rotation, matrix_shape};
use crate::error::{Error, Result};
use crate::platform::host;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use tch::{Device, Kind, Tensor};

/// The settings of a BOFT adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BoftConfig {
    /// Number or size of the blocks of a factor.
    pub partition: Partition,
    /// m.
    pub factors: i64,
}

/// What a training says of BOFT.
#[derive(Default, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
struct BoftSettings(PartitionSettings);

impl OwnSettings for BoftSettings {
    fn method(self) -> Method {
        Method::new(BoftConfig { partition: self.0.into(), factors: 1 })
    }
}

/// BOFT's line in the registry.
pub const METHOD: RegisteredMethod = RegisteredMethod {
    name: "boft",
    about: "OFT of butterfly factors, with a trained scale for each output",
    own: OwnSection::of::<BoftSettings>(),
    reader: Some(PeftReader {
        peft_type: "BOFT",
        prefix: "boft_",
        read: |fields| {
            fields.refuse("fan_in_fan_out", "weights stored the other way round");
            let partition = fields.partition("boft_block_num", "boft_block_size", 4);
            let factors = fields.integer("boft_n_butterfly_factor", 1);
            if factors < 1 {
                fields.expected("boft_n_butterfly_factor", "a positive number");
            }
            Some(Box::new(BoftConfig { partition, factors }))
        },
    }),
};

impl MethodSettings for BoftConfig {
    fn name(&self) -> &'static str {
        METHOD.name
    }

    fn describe(&self) -> String {
        let partition = self.partition.describe();
        match self.factors {
            1 => format!("BOFT {partition}"),
            factors => format!("BOFT {partition}, {factors} factors"),
        }
    }

    fn validate(&self) -> Result<()> {
        self.partition.validate()?;
        if self.factors == 1 {
            return Ok(());
        }
        let found = self.factors;
        Err(Error::config(format!("boft_n_butterfly_factor: expected 1 for training, found {found}")))
    }

    fn start(&self, weight: &Tensor, _: u64) -> std::result::Result<Box<dyn Adapter>, String> {
        Ok(Box::new(Boft::new(&weight.size(), weight.device(), *self)?))
    }

    fn parameters_for(&self, weight: &[i64]) -> std::result::Result<usize, String> {
        let (d_out, d_in) = matrix_shape(weight);
        let (n, b) = self.partition.of(d_in)?;
        Ok((self.factors * n * b * b + d_out) as usize)
    }

    fn tensor_names(&self) -> &'static [&'static str] {
        &["boft_R", "boft_s"]
    }

    fn to_peft(&self) -> Option<(&'static str, Value)> {
        let (blocks, size) = halves(self.partition);
        let own = json!({
            "boft_block_num": blocks,
            "boft_block_size": size,
            "boft_dropout": 0.0,
            "boft_n_butterfly_factor": self.factors,
            "fan_in_fan_out": false,
            "init_weights": true,
        });
        Some(("BOFT", own))
    }

    /// PEFT without its CUDA extension makes one factor whatever the config says, and writes the config.
    fn settle(&mut self, file: &FileFacts) -> std::result::Result<Vec<String>, Vec<String>> {
        let raw = file.layers.iter().filter_map(|parts| parts.tensors.get("boft_R"));
        let factors: BTreeSet<i64> = raw.filter_map(|raw| raw.size().first().copied()).collect();
        if factors.is_empty() || factors == BTreeSet::from([self.factors]) {
            return Ok(Vec::new());
        }
        let said = self.factors;
        if factors == BTreeSet::from([1]) {
            self.factors = 1;
            return Ok(vec![format!(
                "its config speaks of {said} butterfly factors, its tensors are of one"
            )]);
        }
        Err(vec![format!(
            "boft_n_butterfly_factor: expected {said} factors in every boft_R, found {factors:?}"
        )])
    }

    fn adapter(&self, mut parts: Parts) -> std::result::Result<Box<dyn Adapter>, String> {
        Ok(Box::new(Boft::from_tensors(parts.take("boft_R")?, parts.take("boft_s")?)?))
    }

    /// Rotations of the same blocks, multiplied or added up; scales multiply.
    fn combine(&self, _: &[&Method], layers: &[LayerChain], how: How) -> Result<Combined> {
        let mut tensors = Vec::new();
        for (name, chain) in layers {
            let mut factors = Vec::new();
            let mut scale: Option<Tensor> = None;
            for link in chain {
                let boft = link.get::<Boft>();
                let raw = boft.wide(); // [m, n, b, b]
                if raw.size()[0] != 1 {
                    return Err(Error::config(format!(
                        "{name}: expected BOFT adapters of one butterfly factor, found {}",
                        raw.size()[0]
                    ))
                    .with_hint(ELSEWHERE));
                }
                factors.push((skew(&raw.squeeze_dim(0)), link.strength));
                let own = (&boft.scale - 1.0) * link.strength + 1.0;
                // One file may hold them as a row and the other as a column, which would make a matrix of them.
                scale =
                    Some(scale.map_or_else(|| own.shallow_clone(), |before| &before * own.view_as(&before)));
            }
            let s = blocks::combined(name, &factors, how)?;
            tensors.push((format!("{name}.boft_R"), s.unsqueeze(0).to_kind(Kind::Float)));
            tensors.extend(scale.map(|scale| (format!("{name}.boft_s"), scale)));
        }
        Ok((Method::new(*self), tensors))
    }
}

/// The BOFT adapter of one layer.
pub struct Boft {
    /// P, `(m, d_in / b, b, b)`, f32.
    raw: Tensor,
    /// `(d_out, 1)`, or `(1, d_out)` for a convolution, f32.
    scale: Tensor,
}

impl Boft {
    /// An adapter with the given raw blocks `(m, blocks, b, b)` and scales `(d_out, 1)` or `(1, d_out)`.
    ///
    /// Errors: what is wrong with their shapes.
    pub fn from_tensors(raw: Tensor, scale: Tensor) -> std::result::Result<Self, String> {
        let (size, scales) = (raw.size(), scale.size());
        let blocks = matches!(size[..], [m, n, b, c] if m >= 1 && n >= 1 && b >= 1 && b == c);
        if !blocks {
            return Err(format!("boft_R: expected shape (factors, blocks, b, b), found {size:?}"));
        }
        let (m, n, b) = (size[0], size[1], size[2]);
        if m > 1 && (m > 40 || n % (1 << (m - 1)) != 0 || b % 2 != 0) {
            return Err(format!(
                "boft_R: expected an even block size and blocks in pairs for each of {m} factors, found shape {size:?}"
            ));
        }
        if scales.len() != 2 || scales.iter().all(|d| *d != 1) || scales.contains(&0) {
            return Err(format!("boft_s: expected shape (d_out, 1) or (1, d_out), found {scales:?}"));
        }
        Ok(Self { raw, scale })
    }

    /// A new adapter for a weight of this shape on this device: no rotation, scale 1.
    pub fn new(weight: &[i64], device: Device, config: BoftConfig) -> std::result::Result<Self, String> {
        let (d_out, d_in) = matrix_shape(weight);
        let (n, b) = config.partition.of(d_in)?;
        let scale = if weight.len() == 4 { [1, d_out] } else { [d_out, 1] };
        let options = (Kind::Float, device);
        Self::from_tensors(Tensor::zeros([config.factors, n, b, b], options), Tensor::ones(scale, options))
    }

    /// The factors `B_0, B_1, ..` of skew matrices made by `block`, each between its permutation and that's inverse.
    fn factors(&self, raw: &Tensor, block: impl Fn(&Tensor) -> Tensor) -> Vec<Factor> {
        let (m, n, b) = (raw.size()[0], raw.size()[1], raw.size()[2]);
        (0..m)
            .map(|i| {
                let raw = raw.get(i);
                let butterfly = (m > 1).then(|| Butterfly { groups: n >> i, run: b / 2 });
                Factor { blocks: block(&skew(&raw)), butterfly }
            })
            .collect()
    }

    fn wide(&self) -> Tensor {
        host::wide(&self.raw)
    }
}

/// S of raw blocks P `(blocks, b, b)`.
fn skew(raw: &Tensor) -> Tensor {
    (raw - raw.transpose(1, 2)) * 0.5
}

/// One factor `P B P^T`.
struct Factor {
    blocks: Tensor,
    /// P; `None` for the identity.
    butterfly: Option<Butterfly>,
}

impl Factor {
    /// Every row of `rows` times the factor, or times its transpose.
    fn rotate(&self, rows: &Tensor, transpose: bool) -> Tensor {
        let blocks = if transpose { self.blocks.transpose(1, 2) } else { self.blocks.shallow_clone() };
        let blocks = blocks.to_kind(rows.kind());
        match &self.butterfly {
            None => blocks::rotate(rows, &blocks),
            Some(butterfly) => butterfly.sort(&blocks::rotate(&butterfly.weave(rows), &blocks)),
        }
    }
}

/// PEFT's permutation: in each of `groups` equal parts of the indices, runs of `run` indices, first the even ones, then the odd
/// ones. A transposition of axes, so that nothing is looked up.
struct Butterfly {
    groups: i64,
    run: i64,
}

impl Butterfly {
    /// `rows P^T`: the even runs before the odd ones.
    fn sort(&self, rows: &Tensor) -> Tensor {
        self.transposed(rows, |pairs| [pairs, 2])
    }

    /// `rows P`: back in their old order.
    fn weave(&self, rows: &Tensor) -> Tensor {
        self.transposed(rows, |pairs| [2, pairs])
    }

    /// Every part's runs as a matrix of this shape, transposed.
    fn transposed(&self, rows: &Tensor, shape_of: impl Fn(i64) -> [i64; 2]) -> Tensor {
        let shape = rows.size();
        let [first, second] = shape_of(shape[shape.len() - 1] / (self.groups * self.run * 2));
        let parts = rows.reshape([-1, self.groups, first, second, self.run]);
        parts.transpose(2, 3).reshape(&shape[..])
    }
}

/// `rows B^T`.
fn times_transpose(rows: &Tensor, factors: &[Factor]) -> Tensor {
    factors.iter().fold(rows.shallow_clone(), |rows, factor| factor.rotate(&rows, true))
}

impl Adapter for Boft {
    fn forward(&self, frozen: &Frozen, x: &Tensor) -> Tensor {
        let factors = self.factors(&self.raw, |s| Cayley::Exact.blocks(s));
        let y = match frozen.geometry {
            Geometry::Linear => {
                let turned =
                    factors.iter().rev().fold(x.shallow_clone(), |x, factor| factor.rotate(&x, false));
                frozen.apply(&turned, frozen.weight, None)
            }
            Geometry::Conv { .. } => {
                let rotated = times_transpose(&frozen.matrix(x.kind()), &factors);
                frozen.apply(x, &rotated.view_as(frozen.weight), None)
            }
        };
        frozen.scaled(&y, &self.scale.reshape([-1]))
    }

    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        vec![("boft_R", self.raw.shallow_clone()), ("boft_s", self.scale.shallow_clone())]
    }

    fn replace_parameters(&mut self, replace: &mut dyn FnMut(&Tensor) -> Tensor) {
        self.raw = replace(&self.raw);
        self.scale = replace(&self.scale);
    }

    fn check(&self, weight: &[i64]) -> std::result::Result<(), String> {
        let (d_out, d_in) = matrix_shape(weight);
        let (raw, scales) = (self.raw.size(), self.scale.numel() as i64);
        if raw[1] * raw[2] == d_in && scales == d_out {
            return Ok(());
        }
        Err(format!(
            "expected blocks for {d_in} inputs and {d_out} scales for this model, found boft_R {raw:?} and {scales} scales"
        ))
    }

    fn size(&self) -> (i64, i64) {
        let raw = self.raw.size();
        (raw[1] * raw[2], self.scale.numel() as i64)
    }

    /// `diag(1 + strength (s - 1)) W B^T` with each factor's blocks on the geodesic of the rotation group.
    fn change(&self, weight: &Tensor, strength: f64) -> Change {
        let _guard = tch::no_grad_guard();
        let factors = self.factors(&self.wide(), |s| Cayley::Exact.power(s, strength));
        let scale = host::wide(&self.scale).reshape([-1, 1]);
        let scale = (scale - 1.0) * strength + 1.0;
        Form::Dense(times_transpose(weight, &factors) * scale).into()
    }

    /// The planes of all factors, each as if it were alone.
    fn rotation(&self) -> Option<Rotation> {
        let _guard = tch::no_grad_guard();
        Some(Rotation {
            angles: Cayley::Exact.angles(&skew(&self.wide().flatten(0, 1))),
            orthogonality_error: self.orthogonality_error()?,
        })
    }

    /// The largest of the factors' errors.
    fn orthogonality_error(&self) -> Option<f64> {
        let _guard = tch::no_grad_guard();
        let factors = self.factors(&self.raw, |s| Cayley::Exact.blocks(s));
        factors.iter().map(|factor| blocks::orthogonality_error(&factor.blocks)).reduce(f64::max)
    }
}
