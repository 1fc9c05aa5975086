//! ETHER+ (arXiv 2405.20271, section 3.2): `W' = H_out W H_in`, each H block-diagonal with blocks `I - u u^T + v v^T` of unit
//! vectors u and v.
//!
//! H is symmetric but not orthogonal, and each block within sqrt 2 of the identity (Frobenius). It starts at `v = -u`, the
//! identity. With `D` the rows u and v in their blocks' places and `S` their signs,
//!
//! ```text
//! H = I + D^T S D,   W' = W + (W D_in^T S) D_in + (D_out^T S) (D_out W H_in)
//! ```
//!
//! PEFT has no such method: its files are read here, and `hra export` makes LoRA or whole models of them.

use crate::adapter::blocks::{Partition, PartitionSettings};
use crate::adapter::method::{
    Method, MethodSettings, OwnSection, OwnSettings, Parts, PeftReader, RegisteredMethod,
};
use crate::adapter::peft_fields::halves;
use crate::adapter::{Adapter, Change, Form, Frozen, Geometry, matrix_shape};
use crate::platform::host;
use crate::platform::random;
use serde_json::{Value, json};
use tch::Tensor;

/// Names of the tensors: u and v of the inputs, then of the outputs, each `(blocks, b)`.
const NAMES: [&str; 4] = ["ether_u", "ether_v", "ether_u_out", "ether_v_out"];

/// The settings of ETHER+.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EtherPlusConfig {
    /// Number or size of the blocks, of the inputs and of the outputs.
    pub partition: Partition,
}

/// What a training says of ETHER+.
#[derive(Default, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
struct EtherPlusSettings(PartitionSettings);

impl OwnSettings for EtherPlusSettings {
    fn method(self) -> Method {
        Method::new(EtherPlusConfig { partition: self.0.into() })
    }
}

/// ETHER+'s line in the registry.
pub const METHOD: RegisteredMethod = RegisteredMethod {
    name: "ether+",
    about: "A reflection undone by another one for each block of inputs and outputs, which bounds the change",
    own: OwnSection::of::<EtherPlusSettings>(),
    reader: Some(PeftReader {
        peft_type: "ETHER_PLUS",
        prefix: "ether_",
        read: |fields| {
            Some(Box::new(EtherPlusConfig { partition: fields.partition("num_blocks", "block_size", 0) }))
        },
    }),
};

impl EtherPlusConfig {
    /// `(blocks, b)` of the inputs and of the outputs.
    fn shapes(&self, weight: &[i64]) -> Result<[[i64; 2]; 2], String> {
        let (d_out, d_in) = matrix_shape(weight);
        let (n, b) = self.partition.of(d_in)?;
        let (m, c) = match d_out {
            1 => (1, 1),
            _ => self.partition.of(d_out).map_err(|problem| problem.replace("inputs", "outputs"))?,
        };
        Ok([[n, b], [m, c]])
    }
}

impl MethodSettings for EtherPlusConfig {
    fn name(&self) -> &'static str {
        METHOD.name
    }

    fn describe(&self) -> String {
        format!("ETHER+ {}", self.partition.describe())
    }

    fn validate(&self) -> crate::Result<()> {
        self.partition.validate()
    }

    fn start(&self, weight: &Tensor, seed: u64) -> Result<Box<dyn Adapter>, String> {
        let _guard = tch::no_grad_guard();
        let shapes = self.shapes(&weight.size())?;
        let pair = |u: Tensor| ReflectionPair { v: -&u, u };
        let draw = |draws: &random::Draws| shapes.map(|shape| draws.normal(&shape));
        let [input, output] = random::seeded(seed, draw).map(|u| pair(host::to_device(&u, weight.device())));
        Ok(Box::new(EtherPlus { input, output }))
    }

    fn parameters_for(&self, weight: &[i64]) -> Result<usize, String> {
        self.shapes(weight)?;
        let (d_out, d_in) = matrix_shape(weight);
        Ok((2 * (d_in + d_out)) as usize)
    }

    fn is_known_to_peft(&self) -> bool {
        false
    }

    fn tensor_names(&self) -> &'static [&'static str] {
        &NAMES
    }

    fn to_peft(&self) -> Option<(&'static str, Value)> {
        let (blocks, size) = halves(self.partition);
        Some(("ETHER_PLUS", json!({"block_size": size, "num_blocks": blocks})))
    }

    fn adapter(&self, mut parts: Parts) -> Result<Box<dyn Adapter>, String> {
        let mut pair = |names: [&'static str; 2]| {
            let [u, v] = [parts.take(names[0])?, parts.take(names[1])?];
            let (found, other) = (u.size(), v.size());
            if found.len() != 2 || found != other || found.contains(&0) {
                return Err(format!(
                    "{}, {}: expected one shape (blocks, b), found {found:?}, {other:?}",
                    names[0], names[1]
                ));
            }
            let shortest = |t: &Tensor| host::number(&t.norm_scalaropt_dim(2, [1], false).min());
            if shortest(&u) == 0.0 || shortest(&v) == 0.0 {
                return Err(format!("{}: holds a vector of length zero, which has no direction", names[0]));
            }
            Ok(ReflectionPair { u, v })
        };
        let input = pair([NAMES[0], NAMES[1]])?;
        Ok(Box::new(EtherPlus { input, output: pair([NAMES[2], NAMES[3]])? }))
    }
}

/// The ETHER+ adapter of one layer.
pub struct EtherPlus {
    input: ReflectionPair,
    output: ReflectionPair,
}

/// The vectors of one H, f32 `(blocks, b)`; only their directions matter.
struct ReflectionPair {
    u: Tensor,
    v: Tensor,
}

impl ReflectionPair {
    fn units(&self) -> [Tensor; 2] {
        [&self.u, &self.v].map(|t| t / t.norm_scalaropt_dim(2, [1], true))
    }

    fn inputs(&self) -> i64 {
        self.u.numel() as i64
    }

    fn blocks(&self) -> i64 {
        self.u.size()[0]
    }

    /// Every row of `rows` `(.., d)` times H, which is its own transpose.
    fn apply(&self, rows: &Tensor) -> Tensor {
        let [u, v] = self.units().map(|t| host::to_device(&t, rows.device()).to_kind(rows.kind()));
        let shape = rows.size();
        let rows = rows.reshape([-1, u.size()[0], u.size()[1]]);
        let along = |t: &Tensor| (&rows * t).sum_dim_intlist(-1, true, rows.kind()) * t;
        // In this order the start, v = -u, is the identity to the last bit.
        (&rows + (along(&v) - along(&u))).reshape(&shape[..])
    }

    /// `(D, D^T S)` of `H = I + D^T S D`, `(2 blocks, d)` and `(d, 2 blocks)`, f64 on the CPU.
    fn factors(&self) -> (Tensor, Tensor) {
        let [u, v] = self.units().map(|t| {
            let t = host::wide(&t);
            let n = t.size()[0];
            let rows = host::eye(n).unsqueeze(-1) * t.unsqueeze(0); // [n, n, b]
            rows.reshape([n, -1])
        });
        (Tensor::cat(&[&u, &v], 0), Tensor::cat(&[-u, v], 0).tr())
    }
}

impl Adapter for EtherPlus {
    fn forward(&self, frozen: &Frozen, x: &Tensor) -> Tensor {
        match frozen.geometry {
            Geometry::Linear => {
                let y = self.output.apply(&frozen.apply(&self.input.apply(x), frozen.weight, None));
                frozen.bias.map_or_else(|| y.shallow_clone(), |bias| &y + bias.to_kind(y.kind()))
            }
            Geometry::Conv { .. } => {
                let turned = self.input.apply(&frozen.matrix(x.kind())); // [d_out, d_in]
                let weight = self.output.apply(&turned.tr()).tr();
                frozen.apply(x, &weight.reshape(frozen.weight.size()), frozen.bias)
            }
        }
    }

    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        let Self { input, output } = self;
        let tensors = [&input.u, &input.v, &output.u, &output.v];
        NAMES.into_iter().zip(tensors.map(Tensor::shallow_clone)).collect()
    }

    fn replace_parameters(&mut self, replace: &mut dyn FnMut(&Tensor) -> Tensor) {
        let Self { input, output } = self;
        for t in [&mut input.u, &mut input.v, &mut output.u, &mut output.v] {
            *t = replace(t);
        }
    }

    fn check(&self, weight: &[i64]) -> Result<(), String> {
        let (d_out, d_in) = matrix_shape(weight);
        let found = (self.output.inputs(), self.input.inputs());
        if found == (d_out, d_in) {
            return Ok(());
        }
        Err(format!(
            "expected vectors for {d_in} inputs and {d_out} outputs for this model, found ether_u for {} and ether_u_out for {}",
            found.1, found.0
        ))
    }

    fn size(&self) -> (i64, i64) {
        (self.input.inputs(), self.output.inputs())
    }

    /// On the straight line from W to W': what is not orthogonal has no rotation between.
    fn change(&self, weight: &Tensor, strength: f64) -> Change {
        let _guard = tch::no_grad_guard();
        let (rows, columns) = (weight.size()[0], weight.size()[1]);
        if 2 * (self.input.blocks() + self.output.blocks()) > rows.min(columns) {
            let new = self.output.apply(&self.input.apply(weight).tr()).tr();
            return Form::Dense(weight + (new - weight) * strength).into();
        }
        let ((d_in, s_in), (d_out, s_out)) = (self.input.factors(), self.output.factors());
        let left = weight.matmul(&s_in); // [d_out, 2 blocks]
        let turned = weight + left.matmul(&d_in); // W H_in
        let down = Tensor::cat(&[&d_in, &d_out.matmul(&turned)], 0);
        Form::LowRank { down, up: Tensor::cat(&[left, s_out], 1) * strength }.into()
    }
}
