//! Householder Reflection Adaptation (arXiv 2405.17484): `W' = W H`, `H = H_1 H_2 .. H_r`, `H_i = I - 2 u_i u_i^T`.
//!
//! The product is applied in the compact WY form (paper eq. 3-5 in closed form): with `U = [u_1 .. u_r]`,
//!
//! ```text
//! H = I - U T U^T,   T^-1 = I/2 + strictly_upper(U^T U)
//! ```
//!
//! so a step needs one `r x r` Gram matrix and one triangular solve a layer, no `d x d` matrix, and no gradient for `W`.
//! Layers of one size do these together ([`Adapter::prepare`]): on a GPU a layer's own would take longer to start than to compute.
//! The Gram-Schmidt variant (paper section 3.3, lambda = infinity) is `H = I - 2 Q Q^T` with orthonormal `Q`.
//! Raw vectors, norms and `T` are f32; products with activations are in the activations' dtype.

use crate::adapter::few_inputs::{unit_columns, within};
use crate::adapter::how::ELSEWHERE;
use crate::adapter::method::{
    Combined, How, LayerChain, Link, Method, MethodSettings, OwnSection, OwnSettings, Parts, PeftReader,
    RegisteredMethod,
};
use crate::adapter::peft_fields::Fields;
use crate::adapter::reflections::{Reflections, wy_factor};
use crate::adapter::{Adapter, Change, Form, Frozen, Rotation, check_stored_rank, matrix_shape};
use crate::error::{Error, Result};
use crate::platform::choice::{Choice, Named, named};
use crate::platform::host;
use crate::platform::random;
use serde_json::{Value, json};
use std::any::Any;
use std::cell::RefCell;
use tch::{Kind, Tensor};

/// How the raw vectors start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HraInit {
    /// Ours: paired columns (or, for Gram-Schmidt, the directions that the layer uses least).
    Auto,
    /// PEFT's draw: its bound depends on the rank, and its Gram-Schmidt start is random.
    Peft,
}

impl Choice for HraInit {
    const CHOICES: &'static [Named<Self>] = &[
        named(
            Self::Auto,
            "auto",
            &[],
            "Ours: paired columns (or, for Gram-Schmidt, the directions that the layer uses least)",
        ),
        named(
            Self::Peft,
            "peft",
            &[],
            "PEFT's draw: its bound depends on the rank, and its Gram-Schmidt start is random",
        ),
    ];
}

/// The settings of HRA.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HraConfig {
    /// Number of reflections r.
    pub rank: i64,
    /// Orthonormalise the vectors (PEFT's `apply_GS`).
    pub gram_schmidt: bool,
    /// Start of the vectors.
    #[serde(rename = "hra_init")]
    pub init: HraInit,
    /// Allow an odd rank, which cannot start at the identity.
    pub allow_odd_rank: bool,
    /// Weight of the orthogonality regulariser (the paper's lambda).
    #[serde(rename = "hra_lambda")]
    pub lambda: f64,
}

impl Default for HraConfig {
    fn default() -> Self {
        Self { rank: 8, gram_schmidt: false, init: HraInit::Auto, allow_odd_rank: false, lambda: 0.0 }
    }
}

impl OwnSettings for HraConfig {
    fn method(self) -> Method {
        Method::new(self)
    }
}

/// HRA's line in the registry.
pub const METHOD: RegisteredMethod = RegisteredMethod {
    name: "hra",
    about: "Householder Reflection Adaptation",
    own: OwnSection::of::<HraConfig>(),
    reader: Some(PeftReader {
        peft_type: "HRA",
        prefix: "hra_",
        read: |fields| Some(Box::new(HraConfig::read(fields))),
    }),
};

/// Name of the raw vectors.
pub(super) const VECTORS: &str = "hra_u";
/// Of the draw of raw vectors: it sets the angle of the first Adam steps ([`Hra::new`]).
pub(super) const BOUND: f64 = 0.5;

impl HraConfig {
    /// From PEFT's config, with what is wrong left in the fields.
    pub(super) fn read(fields: &mut Fields) -> Self {
        Self {
            rank: fields.positive("r"),
            gram_schmidt: fields.flag("apply_GS", false),
            init: HraInit::Peft,
            allow_odd_rank: true,
            lambda: 0.0,
        }
    }

    /// The reflections of one layer of a file.
    pub(super) fn hra(&self, parts: &mut Parts) -> std::result::Result<Hra, String> {
        check_stored_rank(self.rank)?;
        Ok(Hra::from_vectors(stored_vectors(parts, self.rank)?, self.gram_schmidt))
    }
}

impl MethodSettings for HraConfig {
    fn name(&self) -> &'static str {
        METHOD.name
    }

    fn describe(&self) -> String {
        format!("HRA r {}{}", self.rank, if self.gram_schmidt { ", Gram-Schmidt" } else { "" })
    }

    fn validate(&self) -> Result<()> {
        if self.rank < 1 {
            return Err(Error::config(format!("rank: expected at least 1, found {}", self.rank)));
        }
        if self.rank % 2 == 1 && !self.gram_schmidt && !self.allow_odd_rank {
            return Err(Error::config(format!(
                "rank: expected an even number for HRA, found {r}: reflections cancel in pairs, so {r} of them can \
                 never start at the base model (det H = -1)",
                r = self.rank
            ))
            .with_hint(format!(
                "use rank {} or {}, or --allow-odd-rank",
                (self.rank - 1).max(2),
                self.rank.saturating_add(1)
            )));
        }
        if !(0.0..=f64::from(f32::MAX)).contains(&self.lambda) {
            return Err(Error::config("hra_lambda: expected 0 or more"));
        }
        if self.lambda != 0.0 && self.gram_schmidt {
            return Err(Error::config("hra_lambda has no effect with gram_schmidt: use one of them"));
        }
        Ok(())
    }

    fn start(&self, weight: &Tensor, seed: u64) -> std::result::Result<Box<dyn Adapter>, String> {
        Ok(Box::new(Hra::new(&weight.flatten(1, -1), *self, seed)?))
    }

    fn parameters_for(&self, weight: &[i64]) -> std::result::Result<usize, String> {
        let d_in = matrix_shape(weight).1;
        check_rank(self.rank, d_in)?;
        Ok((self.rank * d_in) as usize)
    }

    fn tensor_names(&self) -> &'static [&'static str] {
        &[VECTORS]
    }

    fn regulariser_weight(&self) -> f64 {
        self.lambda
    }

    fn to_peft(&self) -> Option<(&'static str, Value)> {
        Some(("HRA", json!({"apply_GS": self.gram_schmidt, "init_weights": true, "r": self.rank})))
    }

    fn adapter(&self, mut parts: Parts) -> std::result::Result<Box<dyn Adapter>, String> {
        Ok(Box::new(self.hra(&mut parts)?))
    }

    /// A product of reflections, written as reflections.
    fn combine(&self, methods: &[&Method], layers: &[LayerChain], how: How) -> Result<Combined> {
        let vectors: Vec<Tensor> =
            layers.iter().map(|(name, chain)| combined(name, chain, how)).collect::<Result<_>>()?;
        let longest = vectors.iter().map(|v| v.size()[1]).max().unwrap_or(0);
        let parity = longest % 2;
        // One rank for all layers: the sum of the ranks where the number of reflections allows it.
        let ranks: i64 = methods.iter().filter_map(|method| method.of::<Self>()).map(|hra| hra.rank).sum();
        let rank = longest.max(ranks - (ranks + parity) % 2).max(2 - parity);
        let mut tensors = Vec::new();
        for ((name, _), vectors) in layers.iter().zip(vectors) {
            let missing = rank - vectors.size()[1];
            if missing % 2 != 0 {
                return Err(Error::config(format!(
                    "{name}: expected an {} number of reflections as in other layers, found the opposite (the sign \
                     of the determinant); one HRA adapter has one number for all layers",
                    if parity == 0 { "even" } else { "odd" }
                )).with_hint(ELSEWHERE));
            }
            // Pairs of equal vectors cancel.
            let pairs = vectors.new_ones([vectors.size()[0], missing], (vectors.kind(), vectors.device()));
            tensors.push((format!("{name}.{VECTORS}"), Tensor::cat(&[vectors, pairs], 1)));
        }
        Ok((Method::new(Self { rank, gram_schmidt: false, ..*self }), tensors))
    }
}

/// The raw vectors `(d_in, rank)` of one layer of a file.
pub(super) fn stored_vectors(parts: &mut Parts, rank: i64) -> std::result::Result<Tensor, String> {
    let vectors = parts.take(VECTORS)?;
    let shape = vectors.size();
    if shape.len() != 2 || shape[0] < 1 || shape[1] != rank {
        return Err(format!("{VECTORS}: expected shape (d_in, {rank}), found {shape:?}"));
    }
    // They are divided by their norms.
    if host::number(&vectors.norm_scalaropt_dim(2, [0], false).min()) == 0.0 {
        return Err(format!("{VECTORS}: holds a vector of length zero, which has no direction"));
    }
    Ok(vectors)
}

/// Refuses vectors of another model.
pub(super) fn check_inputs(vectors: &Tensor, weight: &[i64]) -> std::result::Result<(), String> {
    let (expected, found) = (matrix_shape(weight).1, vectors.size()[0]);
    if expected == found {
        return Ok(());
    }
    Err(format!("{VECTORS}: expected {expected} rows for this model, found {found}"))
}

pub(super) fn check_rank(rank: i64, d_in: i64) -> std::result::Result<(), String> {
    if rank <= d_in {
        return Ok(());
    }
    Err(format!("rank: expected at most {d_in}, the layer's inputs, found {rank}"))
}

/// The vectors `(d_in, n)` of one layer's combination, n as small as it comes.
fn combined(name: &str, chain: &[Link], how: How) -> Result<Tensor> {
    let unreachable = || {
        Error::config(format!(
            "{name}: an odd number of reflections (determinant -1) has no orthogonal matrix between it and the base \
             model"
        ))
        .with_hint("give it strength 1 and `--how chain`; `hra sample --adapter DIR=S` does the nearest thing")
    };
    let factors: Vec<(&Hra, f64)> = chain.iter().map(|link| (link.get::<Hra>(), link.strength)).collect();
    if how == How::Geodesic {
        let factors: Vec<(Reflections, f64)> =
            factors.iter().map(|(hra, s)| (hra.reflections(), *s)).collect();
        return Ok(Reflections::geodesic_sum(&factors).ok_or_else(unreachable)?.vectors());
    }
    // As they are, no digit is lost.
    if factors.iter().all(|(hra, strength)| !hra.gram_schmidt && *strength == 1.0) {
        return Ok(Tensor::cat(&factors.iter().map(|(hra, _)| &hra.v).collect::<Vec<_>>(), 1));
    }
    let mut product: Option<Reflections> = None;
    for (hra, strength) in factors {
        let (power, left_over) = hra.reflections().power(strength);
        if left_over && strength.fract() != 0.0 {
            return Err(unreachable());
        }
        product = Some(match product {
            None => power,
            Some(before) => before.then(&power),
        });
    }
    Ok(product.expect("the layer is in one of the files").vectors())
}

/// The HRA adapter of one layer.
pub struct Hra {
    /// Raw vectors `(d_in, r)`, f32; only their directions matter.
    v: Tensor,
    gram_schmidt: bool,
    /// What a step's forwards take in place of their own.
    prepared: RefCell<Option<Factors>>,
}

/// `U` and `U T` of `H = I - (U T) U^T`, both `(d_in, r)` in the dtype of the activations, with gradients.
struct Factors {
    u: Tensor,
    ut: Tensor,
}

impl Factors {
    fn shallow_clone(&self) -> Self {
        Self { u: self.u.shallow_clone(), ut: self.ut.shallow_clone() }
    }
}

impl Hra {
    /// An adapter with the given raw vectors `(d_in, r)`.
    pub fn from_vectors(v: Tensor, gram_schmidt: bool) -> Self {
        Self { v, gram_schmidt, prepared: RefCell::new(None) }
    }

    /// A new adapter for the frozen `weight` `(d_out, d_in)`. Draws on the CPU from `seed` alone.
    ///
    /// Paired columns `u_1 = u_2, u_3 = u_4, ..` cancel, so training starts at the base model. The bound of the draw is
    /// a free choice (H depends on directions only) that sets the angle of the first Adam steps, about
    /// `lr * sqrt(3) / bound`: a constant 0.5 keeps that angle the same for every rank, where PEFT's
    /// `1 / sqrt(r / 2)` makes it grow with the rank.
    ///
    /// Errors: more reflections than the layer has inputs.
    pub fn new(weight: &Tensor, config: HraConfig, seed: u64) -> std::result::Result<Self, String> {
        let _guard = tch::no_grad_guard();
        let d_in = weight.size()[1];
        let r = config.rank;
        check_rank(r, d_in)?;
        let v = if config.gram_schmidt && config.init == HraInit::Auto {
            least_energy_directions(weight, r)
        } else {
            let paired = r % 2 == 0 && !config.gram_schmidt;
            let columns = if paired { r / 2 } else { r };
            let bound = match config.init {
                HraInit::Auto => BOUND,
                // kaiming_uniform(a = sqrt 5) of a (d_in, columns) tensor, whose fan-in torch takes to be `columns`
                HraInit::Peft => 1.0 / (columns as f64).sqrt(),
            };
            let half = random::seeded(seed, |draws| draws.uniform(&[d_in, columns], -bound, bound));
            if paired { half.repeat_interleave_self_int(2, 1, None) } else { half }
        };
        Ok(Self::from_vectors(host::to_device(&v, weight.device()), config.gram_schmidt))
    }

    /// The product of reflections as it is now.
    pub fn reflections(&self) -> Reflections {
        Reflections::from_vectors(&self.v, self.gram_schmidt)
    }

    /// `(U, U T)` of raw vectors `v` `(.., d_in, r)` in f32, with gradients.
    fn factors(v: &Tensor, gram_schmidt: bool) -> (Tensor, Tensor) {
        if gram_schmidt {
            // QR by Householder reflections stays orthonormal to f32 for any independent columns.
            let (q, _) = Tensor::linalg_qr(v, "reduced");
            let qt = &q * 2.0;
            (q, qt)
        } else {
            let u = unit_columns(v);
            let ut = u.matmul(&wy_factor(&u));
            (u, ut)
        }
    }

    /// [`Adapter::prepare`] of reflections of one size.
    pub(super) fn prepare_all(&self, alike: &[&Self], kind: Kind) {
        let (u, ut) = Self::factors(&Self::stacked(alike), self.gram_schmidt);
        let (u, ut) = (u.to_kind(kind).unbind(0), ut.to_kind(kind).unbind(0));
        for ((hra, u), ut) in alike.iter().zip(u).zip(ut) {
            hra.prepared.replace(Some(Factors { u, ut }));
        }
    }

    /// `||I - U^T U||_F^2` on unit columns (paper eq. 6) of reflections of one size; nothing for the Gram-Schmidt variant,
    /// where it is zero.
    pub(super) fn regulariser_of(&self, alike: &[&Self]) -> Option<Tensor> {
        if self.gram_schmidt {
            return None;
        }
        let u = unit_columns(&Self::stacked(alike));
        let gram = u.mt().matmul(&u);
        let eye = Tensor::eye(gram.size()[1], (Kind::Float, gram.device()));
        Some((eye - gram).square().sum(Kind::Float))
    }

    /// `W H^strength` as `W + up down`, `(down, up)` for `weight` f64, and what a user should know of it.
    pub(super) fn turned(&self, weight: &Tensor, strength: f64) -> (Tensor, Tensor, Vec<&'static str>) {
        let mut notes = Vec::new();
        if self.gram_schmidt && nearly_equal_columns(&self.v) {
            notes.push(
                "some vectors of this Gram-Schmidt adapter are nearly equal; other programs, which orthonormalise in one \
                 pass, give something else",
            );
        }
        let mut h = self.reflections();
        if strength != 1.0 {
            let (power, left_over) = h.power(strength);
            h = power;
            if left_over {
                notes.push(
                    "some layers have determinant -1 (an odd number of reflections), which no partial strength reaches by \
                     rotations alone; one direction of each is scaled instead",
                );
            }
        }
        let (down, up) = h.low_rank(weight);
        (down, up, notes)
    }

    /// The raw vectors `(n, d_in, r)` of adapters of one size.
    fn stacked(alike: &[&Self]) -> Tensor {
        Tensor::stack(&alike.iter().map(|hra| &hra.v).collect::<Vec<_>>(), 0)
    }

    fn all<'a>(alike: &[&'a dyn Adapter]) -> Vec<&'a Self> {
        let of = |adapter: &&'a dyn Adapter| -> &'a Self {
            let adapter: &'a dyn Any = *adapter;
            adapter.downcast_ref().expect("adapters that are alike are of one type")
        };
        alike.iter().map(of).collect()
    }
}

impl Adapter for Hra {
    fn forward(&self, frozen: &Frozen, x: &Tensor) -> Tensor {
        let kind = x.kind();
        let prepared = self.prepared.borrow();
        let usable = prepared.as_ref().filter(|factors| factors.u.kind() == kind);
        let Factors { u, ut } = usable.map(Factors::shallow_clone).unwrap_or_else(|| {
            let (u, ut) = Self::factors(&self.v, self.gram_schmidt);
            Factors { u: u.to_kind(kind), ut: ut.to_kind(kind) }
        });
        within(frozen, x, &u, &ut)
    }

    fn prepare(&self, alike: &[&dyn Adapter], kind: Kind) {
        self.prepare_all(&Self::all(alike), kind);
    }

    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        vec![(VECTORS, self.v.shallow_clone())]
    }

    fn replace_parameters(&mut self, replace: &mut dyn FnMut(&Tensor) -> Tensor) {
        self.prepared.take();
        self.v = replace(&self.v);
    }

    fn size(&self) -> (i64, i64) {
        (self.v.size()[0], 0)
    }

    fn project(&self) {
        self.prepared.take();
    }

    fn regulariser(&self, alike: &[&dyn Adapter]) -> Option<Tensor> {
        self.regulariser_of(&Self::all(alike))
    }

    fn check(&self, weight: &[i64]) -> std::result::Result<(), String> {
        check_inputs(&self.v, weight)
    }

    /// `W H^s`.
    fn change(&self, weight: &Tensor, strength: f64) -> Change {
        let (down, up, notes) = self.turned(weight, strength);
        Change { form: Form::LowRank { down, up }, notes }
    }

    fn rotation(&self) -> Option<Rotation> {
        let h = self.reflections();
        Some(Rotation { angles: h.angles(), orthogonality_error: h.orthogonality_error() })
    }
}

/// Whether two columns of `v` point the same way to three digits, where one-pass Gram-Schmidt loses its footing.
fn nearly_equal_columns(v: &Tensor) -> bool {
    let u = unit_columns(&v.detach());
    host::number(&u.tr().matmul(&u).triu(1).abs().max()) > 0.999
}

/// The `r` right-singular vectors of `weight` with the smallest singular values, `(d_in, r)`: reflecting these disturbs
/// the base model least (`|W - W H|_F = 2 |W U|_F`), and not at all where `d_in > d_out`.
fn least_energy_directions(weight: &Tensor, r: i64) -> Tensor {
    let w = host::wide(weight);
    let (_, vectors) = w.tr().matmul(&w).linalg_eigh("L"); // eigenvalues ascending
    vectors.narrow(1, 0, r).to_kind(Kind::Float).contiguous()
}
