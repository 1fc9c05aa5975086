//! HRA's form without its orthogonality: `W' = W (I + U S U^T)`, U `(d_in, r)` of unit columns and a core S `(r, r)` of free
//! values that starts at zero.
//!
//! HRA itself is the case `S = -T`, where T follows from U ([`super::hra`]). Beside HRA of the same rank it tells what
//! orthogonality is worth: the same subspace, the same cost, r^2 more values.
//!
//! PEFT has no such method: its files are read here, and `hra export` makes LoRA or whole models of them.

use crate::adapter::few_inputs::{unit_columns, within};
use crate::adapter::method::{
    Method, MethodSettings, OwnSection, OwnSettings, Parts, PeftReader, RegisteredMethod,
};
use crate::adapter::methods::hra;
use crate::adapter::{Adapter, Change, Form, Frozen, check_stored_rank, matrix_shape};
use crate::error::{Error, Result};
use crate::platform::host;
use crate::platform::random;
use serde_json::{Value, json};
use tch::{Kind, Tensor};

const CORE: &str = "hra_s";

/// The settings of HRA's form with a free core.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HraFreeConfig {
    /// Number of directions r.
    pub rank: i64,
}

impl Default for HraFreeConfig {
    fn default() -> Self {
        Self { rank: 8 }
    }
}

impl OwnSettings for HraFreeConfig {
    fn method(self) -> Method {
        Method::new(self)
    }
}

/// Its line in the registry.
pub const METHOD: RegisteredMethod = RegisteredMethod {
    name: "hra-free",
    about: "HRA's form with a free core, not orthogonal: what HRA is compared with to see what orthogonality is worth",
    own: OwnSection::of::<HraFreeConfig>(),
    reader: Some(PeftReader {
        peft_type: "HRA_FREE",
        prefix: "hra_",
        read: |fields| Some(Box::new(HraFreeConfig { rank: fields.positive("r") })),
    }),
};

impl MethodSettings for HraFreeConfig {
    fn name(&self) -> &'static str {
        METHOD.name
    }

    fn describe(&self) -> String {
        format!("HRA's form, free core, r {}", self.rank)
    }

    fn validate(&self) -> Result<()> {
        if self.rank < 1 {
            return Err(Error::config(format!("rank: expected at least 1, found {}", self.rank)));
        }
        Ok(())
    }

    fn start(&self, weight: &Tensor, seed: u64) -> std::result::Result<Box<dyn Adapter>, String> {
        let (_, d_in) = matrix_shape(&weight.size());
        hra::check_rank(self.rank, d_in)?;
        let v = random::seeded(seed, |draws| draws.uniform(&[d_in, self.rank], -hra::BOUND, hra::BOUND));
        let core = Tensor::zeros([self.rank, self.rank], (Kind::Float, weight.device()));
        Ok(Box::new(HraFree { v: host::to_device(&v, weight.device()), core }))
    }

    fn parameters_for(&self, weight: &[i64]) -> std::result::Result<usize, String> {
        let (_, d_in) = matrix_shape(weight);
        hra::check_rank(self.rank, d_in)?;
        Ok((self.rank * (d_in + self.rank)) as usize)
    }

    fn is_known_to_peft(&self) -> bool {
        false
    }

    fn tensor_names(&self) -> &'static [&'static str] {
        &[hra::VECTORS, CORE]
    }

    fn to_peft(&self) -> Option<(&'static str, Value)> {
        Some(("HRA_FREE", json!({"r": self.rank})))
    }

    fn adapter(&self, mut parts: Parts) -> std::result::Result<Box<dyn Adapter>, String> {
        check_stored_rank(self.rank)?;
        let v = hra::stored_vectors(&mut parts, self.rank)?;
        let core = parts.take(CORE)?;
        let expected = [self.rank, self.rank];
        if core.size() != expected {
            return Err(format!("{CORE}: expected shape {expected:?}, found {:?}", core.size()));
        }
        Ok(Box::new(HraFree { v, core }))
    }
}

/// The adapter of one layer.
pub struct HraFree {
    /// Raw vectors `(d_in, r)`, f32; only their directions matter.
    v: Tensor,
    /// S: `(r, r)`, f32.
    core: Tensor,
}

impl Adapter for HraFree {
    fn forward(&self, frozen: &Frozen, x: &Tensor) -> Tensor {
        let u = unit_columns(&self.v);
        // W (I - P U^T) with P = -U S
        let p = -u.matmul(&self.core);
        within(frozen, x, &u.to_kind(x.kind()), &p.to_kind(x.kind()))
    }

    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        vec![(hra::VECTORS, self.v.shallow_clone()), (CORE, self.core.shallow_clone())]
    }

    fn replace_parameters(&mut self, replace: &mut dyn FnMut(&Tensor) -> Tensor) {
        self.v = replace(&self.v);
        self.core = replace(&self.core);
    }

    fn check(&self, weight: &[i64]) -> std::result::Result<(), String> {
        hra::check_inputs(&self.v, weight)
    }

    fn size(&self) -> (i64, i64) {
        (self.v.size()[0], 0)
    }

    /// `W (I + s U S U^T)`: on the straight line.
    fn change(&self, weight: &Tensor, strength: f64) -> Change {
        let u = unit_columns(&host::wide(&self.v));
        let up = weight.matmul(&u).matmul(&host::wide(&self.core)) * strength;
        Form::LowRank { down: u.tr(), up }.into()
    }
}
