//! OFT and COFT (arXiv 2306.07280): `W' = W blockdiag(R)^T`, each block R the Cayley transform of a skew matrix S.
//!
//! As PEFT 0.21 stores it (`oft/layer.py`): the strict upper triangles of S, row by row. Linear maps rotate their input,
//! `x blockdiag(R)`; convolutions rotate their weight, seen as `(d_out, c kh kw)`, which is what PEFT merges. (PEFT's own
//! forward unfolds a picture, rotates the patches and folds them, adding up where patches overlap: for kernels larger than
//! 1x1 another map, which is not the base model's even at R = I.)
//!
//! COFT of the paper's code keeps a raw dense P with `S = (P - P^T) / 2` in a ball. Its gradient is
//! `dL/dP = (G - G^T) / 2` for `G = dL/dS`: skew, so P, which starts at zero, stays skew under SGD and Adam (equal sizes of
//! opposite sign at `ij` and `ji`), weight decay and the projection, which scales it; then `S = P`. Training the upper
//! triangle, whose gradient is twice that, is the same path for Adam, which divides the factor away.

use crate::adapter::blocks::{self, Cayley, Partition, PartitionSettings};
use crate::adapter::how::ELSEWHERE;
use crate::adapter::method::{
    Combined, FileFacts, How, LayerChain, Method, MethodSettings, OwnSection, OwnSettings, Parts, PeftReader,
    RegisteredMethod,
};
use crate::adapter::peft_fields::{Fields, halves};
use crate::adapter::{Adapter, Change, Form, Frozen, Geometry, Rotation, matrix_shape};
use crate::error::{Error, Result};
use crate::platform::host;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

/// The ball that S is kept in.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Coft {
    /// Plain OFT.
    None,
    /// The paper's: `|S|_F <= eps b^2 / sqrt(blocks)` for each block, after every step of training.
    Paper { eps: f64 },
    /// PEFT's: `|S|_F <= eps / sqrt(blocks)`, before every use.
    Peft { eps: f64 },
}

/// A ball of this size holds every rotation.
const MOST_EPS: f64 = 1e6;
/// More terms of PEFT's series than anyone uses (it starts at 5), and few enough to compute.
const MOST_TERMS: i64 = 64;

/// The settings of an OFT or COFT adapter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OftConfig {
    /// Number or size of the blocks.
    pub partition: Partition,
    /// From S to R.
    pub cayley: Cayley,
    /// Whether S is constrained.
    pub coft: Coft,
    /// One block for all.
    pub block_share: bool,
}

/// What a training says of OFT.
#[derive(Default, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
struct OftSettings(PartitionSettings);

impl OwnSettings for OftSettings {
    fn method(self) -> Method {
        let (partition, cayley, coft) = (self.0.into(), Cayley::Exact, Coft::None);
        Method::new(OftConfig { partition, cayley, coft, block_share: false })
    }
}

/// What a training says of COFT.
#[derive(serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
struct CoftSettings {
    rank: i64,
    block_size: Option<i64>,
    coft_eps: f64,
}

impl Default for CoftSettings {
    fn default() -> Self {
        let PartitionSettings { rank, block_size } = PartitionSettings::default();
        Self { rank, block_size, coft_eps: 6e-5 }
    }
}

impl OwnSettings for CoftSettings {
    fn method(self) -> Method {
        let Self { rank, block_size, coft_eps: eps } = self;
        let partition = PartitionSettings { rank, block_size }.into();
        let (cayley, coft) = (Cayley::Exact, Coft::Paper { eps });
        Method::new(OftConfig { partition, cayley, coft, block_share: false })
    }
}

/// OFT's line in the registry.
pub const METHOD: RegisteredMethod = RegisteredMethod {
    name: "oft",
    about: "Orthogonal fine-tuning: a rotation of blocks of the inputs",
    own: OwnSection::of::<OftSettings>(),
    reader: Some(PeftReader {
        peft_type: "OFT",
        prefix: "oft_",
        read: |fields| Some(Box::new(OftConfig::read(fields))),
    }),
};

/// COFT's line in the registry.
pub const CONSTRAINED: RegisteredMethod = RegisteredMethod {
    name: "coft",
    about: "OFT whose rotations stay small",
    own: OwnSection::of::<CoftSettings>(),
    reader: None,
};

impl OftConfig {
    /// From PEFT's config.
    fn read(fields: &mut Fields) -> Self {
        fields.refuse("fan_in_fan_out", "weights stored the other way round");
        if fields.set("oft_block_size").is_none() {
            fields.problems.push(
                "oft_block_size: expected a number, found nothing: this OFT was written by PEFT before 0.14, whose tensors \
                 have another form; train it again"
                    .into(),
            );
        }
        let partition = if fields.set("oft_block_size").is_some() {
            fields.partition("r", "oft_block_size", 0)
        } else {
            Partition::Blocks(1)
        };
        let terms = fields.integer("num_cayley_neumann_terms", 5);
        let cayley = if !fields.flag("use_cayley_neumann", true) {
            Cayley::Exact
        } else if (1..=MOST_TERMS).contains(&terms) {
            if !fields.set("peft_version").and_then(Value::as_str).is_some_and(since_0_18) {
                fields.notes.push(
                    "this OFT may be of PEFT before 0.18, which had another Cayley-Neumann series; it is used as newer \
                     ones use it"
                        .into(),
                );
            }
            Cayley::Neumann(terms)
        } else {
            fields.expected("num_cayley_neumann_terms", &format!("1 to {MOST_TERMS}"));
            Cayley::Exact
        };
        let eps = fields.number("eps", 6e-5);
        let coft = if fields.flag("coft", false) {
            if !(0.0..=MOST_EPS).contains(&eps) {
                fields.expected("eps", &format!("0 or a positive number up to {MOST_EPS:e}"));
            }
            Coft::Peft { eps }
        } else {
            Coft::None
        };
        let block_share = fields.flag("block_share", false);
        Self { partition, cayley, coft, block_share }
    }

    /// `(stored blocks, block size)` for `d_in` inputs. Errors: see [`Partition::of`].
    pub fn shape(&self, d_in: i64) -> std::result::Result<(i64, i64), String> {
        let (n, b) = self.partition.of(d_in)?;
        Ok((if self.block_share { 1 } else { n }, b))
    }
}

impl MethodSettings for OftConfig {
    fn name(&self) -> &'static str {
        if self.coft == Coft::None { METHOD.name } else { CONSTRAINED.name }
    }

    fn describe(&self) -> String {
        let Self { partition, cayley, coft, block_share } = self;
        let shared = if *block_share { ", shared" } else { "" };
        let series = if *cayley == Cayley::Exact { "" } else { ", Cayley-Neumann series" };
        let partition = partition.describe();
        match coft {
            Coft::None => format!("OFT {partition}{shared}{series}"),
            Coft::Paper { eps } => format!("COFT {partition}{shared}{series}, eps {eps}"),
            Coft::Peft { eps } => format!("PEFT's COFT {partition}{shared}{series}, eps {eps}"),
        }
    }

    fn validate(&self) -> Result<()> {
        self.partition.validate()?;
        match self.coft {
            Coft::Paper { eps } if !(eps > 0.0 && eps <= MOST_EPS) => Err(Error::config(format!(
                "coft_eps: expected a positive number up to {MOST_EPS:e}, found {eps}"
            ))),
            Coft::Peft { .. } => {
                Err(Error::config("coft: an adapter that PEFT constrains can be used, but not trained on")
                    .with_hint("start a new one with --method coft"))
            }
            _ => Ok(()),
        }
    }

    fn start(&self, weight: &Tensor, _: u64) -> std::result::Result<Box<dyn Adapter>, String> {
        Ok(Box::new(Oft::new(&weight.size(), weight.device(), *self)?))
    }

    fn parameters_for(&self, weight: &[i64]) -> std::result::Result<usize, String> {
        let (n, b) = self.shape(matrix_shape(weight).1)?;
        Ok((n * (b * (b - 1) / 2)) as usize)
    }

    fn tensor_names(&self) -> &'static [&'static str] {
        &["oft_R.weight"]
    }

    /// The paper's COFT is a constraint of training: the file says OFT, and its `eps` is for information.
    fn to_peft(&self) -> Option<(&'static str, Value)> {
        let (blocks, size) = halves(self.partition);
        let (neumann, terms) = match self.cayley {
            Cayley::Exact => (false, 5),
            Cayley::Neumann(terms) => (true, terms),
        };
        let (coft, eps) = match self.coft {
            Coft::None => (false, 6e-5),
            Coft::Paper { eps } => (false, eps),
            Coft::Peft { eps } => (true, eps),
        };
        let own = json!({
            "block_share": self.block_share,
            "coft": coft,
            "eps": eps,
            "fan_in_fan_out": false,
            "init_weights": true,
            "module_dropout": 0.0,
            "num_cayley_neumann_terms": terms,
            "oft_block_size": size,
            "r": blocks,
            "use_cayley_neumann": neumann,
        });
        Some(("OFT", own))
    }

    fn metadata(&self) -> Vec<(&'static str, String)> {
        match self.coft {
            Coft::Paper { eps } => vec![("coft_eps", eps.to_string())],
            _ => Vec::new(),
        }
    }

    /// The paper's COFT, which a file keeps as text: a constraint of training that its use does not need.
    fn settle(&mut self, file: &FileFacts) -> std::result::Result<Vec<String>, Vec<String>> {
        if self.coft == Coft::None
            && let Some(eps) = file.metadata.get("coft_eps").and_then(|text| text.parse::<f64>().ok())
            && eps > 0.0
            && eps <= MOST_EPS
        {
            self.coft = Coft::Paper { eps };
        }
        Ok(Vec::new())
    }

    fn adapter(&self, mut parts: Parts) -> std::result::Result<Box<dyn Adapter>, String> {
        Ok(Box::new(Oft::from_tensor(parts.take("oft_R.weight")?, *self)?))
    }

    /// Rotations of the same blocks, multiplied or added up; plain OFT, as a combination need not stay in COFT's ball.
    fn combine(&self, _: &[&Method], layers: &[LayerChain], how: How) -> Result<Combined> {
        let mut tensors = Vec::new();
        for (name, chain) in layers {
            let mut factors = Vec::new();
            for link in chain {
                let oft = link.get::<Oft>();
                if oft.config.cayley != Cayley::Exact || oft.config.block_share != self.block_share {
                    return Err(Error::config(format!(
                        "expected OFT adapters with exact Cayley blocks, all shared or none, found {} in the form of \
                         PEFT's series (use_cayley_neumann), which is not orthogonal, or of the other \
                         kind",
                        link.method.describe()
                    )).with_hint(ELSEWHERE));
                }
                factors.push((oft.skew(), link.strength));
            }
            let s = blocks::combined(name, &factors, how)?; // [n, b, b]
            tensors.push((format!("{name}.oft_R.weight"), blocks::upper(&s).to_kind(Kind::Float)));
        }
        Ok((Method::new(Self { coft: Coft::None, ..*self }), tensors))
    }
}

/// Whether a version such as `0.21.2` or `0.18.1.dev0@abc` is 0.18 or newer.
fn since_0_18(version: &str) -> bool {
    let mut numbers = version.split('.').map(|part| part.parse::<u32>().ok());
    let release = (numbers.next().flatten(), numbers.next().flatten());
    matches!(release, (Some(major), Some(minor)) if (major, minor) >= (0, 18))
}

/// The OFT adapter of one layer.
pub struct Oft {
    /// Strict upper triangles `(blocks, b (b - 1) / 2)`, f32.
    upper: Tensor,
    b: i64,
    config: OftConfig,
}

impl Oft {
    /// An adapter with the given upper triangles; what PEFT's COFT allows of them.
    ///
    /// Errors: what is wrong with their shape.
    pub fn from_tensor(upper: Tensor, config: OftConfig) -> std::result::Result<Self, String> {
        let size = upper.size();
        // b (b - 1) / 2 = n  <=>  b = (1 + sqrt(1 + 8 n)) / 2
        let b = match size[..] {
            [blocks, n] if blocks >= 1 && n >= 1 => {
                ((1.0 + (1.0 + 8.0 * n as f64).sqrt()) / 2.0).round() as i64
            }
            _ => 0,
        };
        if b < 2 || b * (b - 1) / 2 != size[1] {
            return Err(format!("oft_R: expected shape (blocks, b (b - 1) / 2), found {size:?}"));
        }
        if config.block_share && size[0] != 1 {
            return Err(format!("oft_R: expected one block, which block_share says, found {}", size[0]));
        }
        let oft = Self { upper, b, config };
        if let Coft::Peft { eps } = config.coft {
            oft.shrink(eps / (size[0] as f64).sqrt());
        }
        Ok(oft)
    }

    /// A new adapter for a weight of this shape on this device: S = 0, the base model.
    pub fn new(weight: &[i64], device: Device, config: OftConfig) -> std::result::Result<Self, String> {
        let (n, b) = config.shape(matrix_shape(weight).1)?;
        Self::from_tensor(Tensor::zeros([n, b * (b - 1) / 2], (Kind::Float, device)), config)
    }

    /// The blocks `(blocks, b, b)` in f32, with gradient.
    fn blocks(&self) -> Tensor {
        self.config.cayley.blocks(&blocks::skew(&self.upper, self.b))
    }

    /// S `(blocks, b, b)` in f64 on the CPU.
    fn skew(&self) -> Tensor {
        blocks::skew(&host::wide(&self.upper), self.b)
    }

    /// Scales each block whose S is longer than `radius` back to it, in place.
    fn shrink(&self, radius: f64) {
        let _guard = tch::no_grad_guard();
        // |S|_F^2 counts each entry of the triangle twice
        let norms = self.upper.norm_scalaropt_dim(2, [1], true) * 2f64.sqrt();
        let scale = (norms.clamp_min(1e-30).reciprocal() * radius).clamp_max(1.0);
        let _ = self.upper.shallow_clone().g_mul_(&scale);
    }
}

impl Adapter for Oft {
    fn forward(&self, frozen: &Frozen, x: &Tensor) -> Tensor {
        let r = self.blocks().to_kind(x.kind());
        match frozen.geometry {
            Geometry::Linear => frozen.forward(&blocks::rotate(x, &r)),
            Geometry::Conv { .. } => {
                let rotated = blocks::rotate(&frozen.matrix(x.kind()), &r.transpose(1, 2));
                frozen.apply(x, &rotated.view_as(frozen.weight), frozen.bias)
            }
        }
    }

    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        vec![("oft_R.weight", self.upper.shallow_clone())]
    }

    fn replace_parameters(&mut self, replace: &mut dyn FnMut(&Tensor) -> Tensor) {
        self.upper = replace(&self.upper);
    }

    fn check(&self, weight: &[i64]) -> std::result::Result<(), String> {
        let (d_in, n) = (matrix_shape(weight).1, self.upper.size()[0]);
        let fits = if self.config.block_share { d_in % self.b == 0 } else { n * self.b == d_in };
        if fits {
            return Ok(());
        }
        Err(format!("oft_R: expected blocks for {d_in} inputs for this model, found {n} of {}", self.b))
    }

    /// `W blockdiag(R^s)^T`, each block on the geodesic of the rotation group.
    fn change(&self, weight: &Tensor, strength: f64) -> Change {
        let _guard = tch::no_grad_guard();
        let r = self.config.cayley.power(&self.skew(), strength);
        let mut notes = Vec::new();
        if self.config.cayley != Cayley::Exact && self.orthogonality_error().is_some_and(|e| e > 1e-3) {
            notes.push(
                "some blocks are not orthogonal, as PEFT's Cayley-Neumann series is not for large rotations; a strength \
                 scales what is not rotation along a straight line",
            );
        }
        Change { form: Form::Dense(blocks::rotate(weight, &r.transpose(1, 2))), notes }
    }

    fn project(&self) {
        if let Coft::Paper { eps } = self.config.coft {
            // one shared block counts as one
            let blocks = self.upper.size()[0] as f64;
            self.shrink(eps * (self.b * self.b) as f64 / blocks.sqrt());
        }
    }

    fn rotation(&self) -> Option<Rotation> {
        let _guard = tch::no_grad_guard();
        Some(Rotation {
            angles: self.config.cayley.angles(&self.skew()),
            orthogonality_error: self.orthogonality_error()?,
        })
    }

    fn orthogonality_error(&self) -> Option<f64> {
        let _guard = tch::no_grad_guard();
        Some(blocks::orthogonality_error(&self.blocks()))
    }

    fn notes(&self, weight: &[i64]) -> Vec<&'static str> {
        if weight.len() == 4 && weight[2..] != [1, 1] {
            vec![
                "OFT on convolutions larger than 1x1 is used as PEFT merges it; PEFT's own forward computes \
                 something else",
            ]
        } else {
            Vec::new()
        }
    }
}
