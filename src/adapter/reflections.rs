//! Fixed products of reflections, `H = I - U T U^T`, in f64: strength, chains, inverse, merging, and how far a weight moves.
//!
//! H is orthogonal and differs from the identity only on span(U), so everything here is an `r x r` problem beside
//! products with `(d_in, r)` matrices. The largest matrix is the weight itself.

use crate::platform::host;
use tch::{Kind, Tensor};

/// An orthogonal factor `H = I - U T U^T` on the input side of a weight.
#[derive(Debug)]
pub struct Reflections {
    /// `(d_in, r)`, f64, CPU.
    u: Tensor,
    /// `(r, r)`, f64, CPU.
    t: Tensor,
}

/// The WY factor `(.., r, r)` of unit columns `u` `(.., d, r)`: `T = (I/2 + strictly_upper(U^T U))^-1`, upper triangular.
pub fn wy_factor(u: &Tensor) -> Tensor {
    let eye = Tensor::eye(*u.size().last().unwrap_or(&0), (u.kind(), u.device()));
    let inverse = u.mt().matmul(u).triu(1) + &eye * 0.5;
    inverse.linalg_solve_triangular(&eye, true, true, false)
}

impl Reflections {
    /// From HRA's raw vectors `(d_in, r)`.
    pub fn from_vectors(v: &Tensor, gram_schmidt: bool) -> Self {
        let _guard = tch::no_grad_guard();
        let v = host::wide(v);
        if gram_schmidt {
            let (u, _) = Tensor::linalg_qr(&v, "reduced");
            let t = host::eye(u.size()[1]) * 2.0;
            Self { u, t }
        } else {
            let u = &v / v.norm_scalaropt_dim(2, [0], true);
            let t = wy_factor(&u);
            Self { u, t }
        }
    }

    /// d_in.
    pub fn inputs(&self) -> i64 {
        self.u.size()[0]
    }

    /// `H^T`, which undoes H.
    pub fn inverse(&self) -> Self {
        Self { u: self.u.shallow_clone(), t: self.t.tr() }
    }

    /// `H_self H_other`, of rank `r_self + r_other`: the weight becomes `W H_self H_other`.
    pub fn then(&self, other: &Self) -> Self {
        let corner = -self.t.matmul(&self.u.tr().matmul(&other.u)).matmul(&other.t);
        let zero = corner.zeros_like().tr();
        let top = Tensor::cat(&[self.t.shallow_clone(), corner], 1);
        let bottom = Tensor::cat(&[zero, other.t.shallow_clone()], 1);
        Self {
            u: Tensor::cat(&[self.u.shallow_clone(), other.u.shallow_clone()], 1),
            t: Tensor::cat(&[top, bottom], 0),
        }
    }

    /// `H^s` along the geodesic of the orthogonal group: orthogonal at every `s`, `H^0 = I`, `H^1 = H`.
    ///
    /// On an orthonormal basis Q of span(U), `M = Q^T H Q` is orthogonal and turns planes, whose angles are multiplied by
    /// `s`. Eigenvalues -1 come in pairs, each pair a half turn in the plane of its two eigenvectors, unless det H = -1.
    /// Then one is left over: no path of orthogonal matrices leads from the identity to H, and that direction alone is
    /// scaled by `cos(pi s)` instead; the second value says so.
    pub fn power(&self, s: f64) -> (Self, bool) {
        let _guard = tch::no_grad_guard();
        let (q, m) = self.core();
        let (power, left_over) = orthogonal_power(&m, s);
        let t = host::eye(q.size()[1]) - power;
        (Self { u: q, t }, left_over)
    }

    /// `exp(sum_i s_i log H_i)`: the one-parameter path of each factor, added up where the paths start. Orthogonal for any
    /// strengths, independent of the order, and `H^s` for one factor. `None` if a factor has determinant -1, for which
    /// there is no such path.
    pub fn geodesic_sum(factors: &[(Self, f64)]) -> Option<Self> {
        let _guard = tch::no_grad_guard();
        let all: Vec<Tensor> = factors.iter().map(|(h, _)| h.u.shallow_clone()).collect();
        let q = span(&Tensor::cat(&all, 1)); // [d_in, k]
        let eye = host::eye(q.size()[1]);
        let mut sum = eye.zeros_like();
        for (h, s) in factors {
            let qu = q.tr().matmul(&h.u);
            let m = &eye - qu.matmul(&h.t).matmul(&qu.tr());
            sum += orthogonal_log(&m)? * *s;
        }
        let t = eye - sum.matrix_exp();
        Some(Self { u: q, t })
    }

    /// H as reflections again: vectors `(d_in, n)`, f32, n as small as can be and at most the rank of span(U); none where
    /// H is the identity.
    pub fn vectors(&self) -> Tensor {
        let _guard = tch::no_grad_guard();
        let (q, m) = self.core();
        q.matmul(&householder_vectors(&m)).to_kind(Kind::Float)
    }

    /// `(Q, M)` with orthonormal `Q (d_in, k)` of span(U) and the orthogonal `M = Q^T H Q`: `H = I + Q (M - I) Q^T`.
    fn core(&self) -> (Tensor, Tensor) {
        let q = span(&self.u); // [d_in, k]
        let qu = q.tr().matmul(&self.u); // [k, r]
        let m = host::eye(q.size()[1]) - qu.matmul(&self.t).matmul(&qu.tr());
        (q, m)
    }

    /// As a LoRA of the frozen `weight` `(d_out, d_in)`, exact, but only for this weight:
    /// `down = Q^T (k, d_in)`, `up = W Q (M - I) (d_out, k)`, both f64 on the CPU. The columns of Q are orthonormal, so that rounding
    /// to a shorter format loses a share of the change, and none of the two reflections that nearly cancel.
    pub fn low_rank(&self, weight: &Tensor) -> (Tensor, Tensor) {
        let _guard = tch::no_grad_guard();
        let (q, m) = self.core();
        let turned = host::wide(weight).matmul(&q).matmul(&(m - host::eye(q.size()[1])));
        (q.tr().contiguous(), turned)
    }

    /// `W H` in f32.
    pub fn merge(&self, weight: &Tensor) -> Tensor {
        let _guard = tch::no_grad_guard();
        let change = self.product(weight).matmul(&self.t).matmul(&self.u.tr());
        let merged = host::wide(weight) - change;
        host::to_device(&merged.to_kind(Kind::Float), weight.device())
    }

    /// The angles by which H turns its planes, in radians, the largest first; an eigenvalue -1 without partner counts as pi.
    pub fn angles(&self) -> Vec<f64> {
        let _guard = tch::no_grad_guard();
        let (_, m) = self.core();
        let turns = Turns::of(&m);
        let mut angles: Vec<f64> = turns.planes.iter().map(|plane| plane.angle).collect();
        angles.extend(turns.minus_ones.iter().map(|_| std::f64::consts::PI));
        angles.sort_by(|a, b| b.total_cmp(a));
        angles
    }

    /// `max |H H^T - I|` over all entries of the factor as it is in f32, the precision that training applies.
    pub fn orthogonality_error(&self) -> f64 {
        let _guard = tch::no_grad_guard();
        let u = self.u.to_kind(Kind::Float).to_kind(Kind::Double);
        let t = self.t.to_kind(Kind::Float).to_kind(Kind::Double);
        // H H^T = I + U M U^T,  M = T (U^T U) T^T - T - T^T
        let m = t.matmul(&u.tr().matmul(&u)).matmul(&t.tr()) - &t - t.tr();
        let um = u.matmul(&m);
        let mut largest = 0f64;
        for rows in um.split(256, 0) {
            largest = largest.max(host::number(&rows.matmul(&u.tr()).abs().max()));
        }
        largest
    }

    /// `W U` in f64 on the CPU.
    fn product(&self, weight: &Tensor) -> Tensor {
        host::wide(weight).matmul(&self.u)
    }
}

/// An orthonormal basis `(d, k)` of the columns of `u`, which may coincide (they do at the start of training).
fn span(u: &Tensor) -> Tensor {
    let (left, singular, _) = u.svd(true, true);
    let largest = host::number(&singular.max());
    let rank = host::integer(&singular.gt(1e-9 * largest).sum(Kind::Int64));
    left.narrow(1, 0, rank)
}

/// An orthogonal matrix as turns of planes: `m v = cos(angle) v + sin(angle) w` and `m w = cos(angle) w - sin(angle) v`.
struct Turns {
    planes: Vec<Plane>,
    /// Unit vectors `(k)` with eigenvalue -1; with 1 is all the rest.
    minus_ones: Vec<Tensor>,
}

/// Orthonormal `v` and `w`, `(k)`, and the angle of the turn from v towards w, in radians.
struct Plane {
    v: Tensor,
    w: Tensor,
    angle: f64,
}

impl Turns {
    /// The planes of an orthogonal `m` `(k, k)`.
    ///
    /// Its symmetric part A and skew part K commute. An eigenspace of A holds the planes of one cosine, where K^T K has
    /// the eigenvector v of a plane, and `K v = sin(angle) w`. Both problems are symmetric, which always has an answer;
    /// QR iterations for a general Schur form need not end for an orthogonal matrix (all eigenvalues have one modulus).
    fn of(m: &Tensor) -> Self {
        let (a, k) = ((m + m.tr()) * 0.5, (m - m.tr()) * 0.5);
        let (cosines, vectors) = a.linalg_eigh("L");
        let cosines = numbers(&cosines); // ascending
        let mut turns = Self { planes: Vec::new(), minus_ones: Vec::new() };
        let mut start = 0;
        for end in 1..=cosines.len() {
            // Eigenvectors of neighbours that are nearer than this are mixed by rounding.
            if end < cosines.len() && cosines[end] - cosines[end - 1] < 1e-7 {
                continue;
            }
            turns.add_eigenspace(&a, &k, &vectors.narrow(1, start as i64, (end - start) as i64));
            start = end;
        }
        turns
    }

    /// Splits an eigenspace of A, an orthonormal `basis` `(k, n)`, into planes.
    fn add_eigenspace(&mut self, a: &Tensor, k: &Tensor, basis: &Tensor) {
        let kb = k.matmul(basis);
        let (_, inner) = kb.tr().matmul(&kb).linalg_eigh("L");
        let mut left = basis.matmul(&inner);
        loop {
            let lengths = numbers(&left.norm_scalaropt_dim(2, [0], false));
            let longest = (0..lengths.len()).max_by(|i, j| lengths[*i].total_cmp(&lengths[*j]));
            let Some(at) = longest.filter(|at| lengths[*at] >= 0.1) else {
                break; // what is left lies in the planes that were found
            };
            let v = left.select(1, at as i64) / lengths[at];
            let kv = k.mv(&v);
            let (sine, cosine) = (host::number(&kv.norm()), host::number(&a.mv(&v).dot(&v)));
            let mut found = vec![v.shallow_clone()];
            if sine > 1e-8 {
                let w = kv / sine;
                found.push(w.shallow_clone());
                self.planes.push(Plane { v, w, angle: sine.atan2(cosine) });
            } else if cosine < 0.0 {
                self.minus_ones.push(v);
            }
            for own in &found {
                left = &left - own.outer(&left.tr().mv(own));
            }
        }
    }

    /// The planes, with pairs of eigenvalues -1 as half turns, and the eigenvector of -1 that has no partner.
    fn paired(mut self) -> (Vec<Plane>, Option<Tensor>) {
        let mut single = None;
        for w in std::mem::take(&mut self.minus_ones) {
            match single.take() {
                None => single = Some(w),
                Some(v) => self.planes.push(Plane { v, w, angle: std::f64::consts::PI }),
            }
        }
        (self.planes, single)
    }
}

/// The skew-symmetric logarithm of an orthogonal `m` `(k, k)`; `None` if its determinant is -1.
fn orthogonal_log(m: &Tensor) -> Option<Tensor> {
    let (planes, single) = Turns::of(m).paired();
    let mut log = m.zeros_like();
    for Plane { v, w, angle } in planes {
        let turn = w.outer(&v) * angle;
        log += &turn - turn.tr();
    }
    single.is_none().then_some(log)
}

/// `m^s` for an orthogonal `m` `(k, k)`, and whether one eigenvalue -1 had no partner.
fn orthogonal_power(m: &Tensor, s: f64) -> (Tensor, bool) {
    let (planes, single) = Turns::of(m).paired();
    let mut power = host::eye(m.size()[0]);
    for Plane { v, w, angle } in planes {
        let (sin, cos) = (s * angle).sin_cos();
        let turn = w.outer(&v) * sin;
        power += (v.outer(&v) + w.outer(&w)) * (cos - 1.0) + &turn - turn.tr();
    }
    if let Some(z) = &single {
        power += z.outer(z) * ((s * std::f64::consts::PI).cos() - 1.0);
    }
    (power, single.is_some())
}

/// Unit columns `(k, n)` with `m = H_1 H_2 .. H_n`: each reflection turns one more column of what is left of the
/// orthogonal `m` `(k, k)` into that of the identity, the one that is furthest from it: of a short difference rounding makes
/// another direction, and with it another number of reflections.
fn householder_vectors(m: &Tensor) -> Tensor {
    let (mut left, eye) = (m.shallow_clone(), host::eye(m.size()[0]));
    let mut vectors = Vec::new();
    for _ in 0..m.size()[0] {
        let off = &left - &eye;
        let lengths = numbers(&off.norm_scalaropt_dim(2, [0], false));
        let furthest = (0..lengths.len()).max_by(|i, j| lengths[*i].total_cmp(&lengths[*j]));
        let Some(at) = furthest.filter(|at| lengths[*at] > 1e-8) else { break };
        let u = off.select(1, at as i64) / lengths[at];
        left = &left - u.outer(&left.tr().mv(&u)) * 2.0;
        vectors.push(u);
    }
    if vectors.is_empty() { eye.narrow(1, 0, 0) } else { Tensor::stack(&vectors, 1) }
}

/// The numbers of a vector `(n)` that was computed here.
fn numbers(vector: &Tensor) -> Vec<f64> {
    host::values(vector).expect("a tensor of this thread's own can be read")
}
