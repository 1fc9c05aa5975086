//! HRA as algebra: what must hold for any shapes and any vectors, checked on random ones.

use crate::support::error::relative_error;
use crate::support::process::alone;
use hra::adapter::methods::hra::{Hra, HraConfig, HraInit};
use hra::adapter::reflections::wy_factor;
use hra::adapter::{Adapter, Form, Frozen, Geometry, MethodSettings, Reflections};
use hra::platform::random::normal;
use proptest::prelude::*;
use tch::{Device, Kind, Tensor};

const F64: (Kind, Device) = (Kind::Double, Device::Cpu);

/// The paper's definition, one dense reflection after another: `H = H_1 H_2 .. H_r`.
fn dense(v: &Tensor) -> Tensor {
    let v = v.to_kind(Kind::Double);
    let d = v.size()[0];
    let mut h = Tensor::eye(d, F64);
    for j in 0..v.size()[1] {
        let u = v.narrow(1, j, 1);
        let u = &u / u.norm();
        h = h.matmul(&(Tensor::eye(d, F64) - u.matmul(&u.tr()) * 2.0));
    }
    h
}

/// The dense matrix of fixed reflections.
fn matrix(h: &Reflections, d: i64) -> Tensor {
    h.merge(&Tensor::eye(d, F64))
}

/// `||W' - W|| / ||W||`.
fn moved(adapter: &Hra, weight: &Tensor) -> f64 {
    let weight = weight.to_kind(Kind::Double);
    adapter.change(&weight, 1.0).form.relative_change(&weight)
}

fn distance(a: &Tensor, b: &Tensor) -> f64 {
    (a.to_kind(Kind::Double) - b.to_kind(Kind::Double)).abs().max().double_value(&[])
}

fn config(rank: i64) -> HraConfig {
    HraConfig { rank, gram_schmidt: false, init: HraInit::Auto, allow_odd_rank: false, lambda: 0.0 }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn compact_wy_is_the_chain_of_reflections(seed in 0u64..1000, d in 2i64..40, r in 1i64..9) {
        let v = normal(seed, &[d, r]);
        let h = Reflections::from_vectors(&v, false);
        prop_assert!(distance(&matrix(&h, d), &dense(&v)) < 1e-5);
        let product = h.then(&h.inverse());
        prop_assert!(distance(&matrix(&product, d), &Tensor::eye(d, F64)) < 1e-5);
        prop_assert!(h.orthogonality_error() < 1e-5);
    }

    #[test]
    fn both_sides_and_the_convolution_equal_the_merged_weight(
        seed in 0u64..1000, d_in in 2i64..24, d_out in 1i64..24, r in 1i64..7, n in 1i64..40, wants_gradient: bool, gs: bool,
    ) {
        let r = r.min(d_in);
        let v = normal(seed, &[d_in, r]);
        let weight = normal(seed + 1, &[d_out, d_in]);
        let bias = normal(seed + 2, &[d_out]);
        let x = normal(seed + 3, &[2, n, d_in]).set_requires_grad(wants_gradient);
        let adapter = Hra::from_vectors(v.shallow_clone(), gs);
        let merged = Reflections::from_vectors(&v, gs).merge(&weight);
        let frozen = Frozen { weight: &weight, bias: Some(&bias), geometry: Geometry::Linear };
        let y = adapter.forward(&frozen, &x);
        prop_assert!(relative_error(&y.detach(), &x.linear(&merged, Some(&bias)).detach()) < 1e-5);

        let (c, kernel) = (d_in, [1 + n % 3, 1 + (n + seed as i64) % 3]);
        let weight = normal(seed + 4, &[d_out, c, kernel[0], kernel[1]]);
        let v = normal(seed + 5, &[c * kernel[0] * kernel[1], r]);
        let x = normal(seed + 6, &[2, c, 7, 6]);
        let merged = Reflections::from_vectors(&v, gs).merge(&weight.flatten(1, -1)).reshape(&weight.size()[..]);
        let frozen = Frozen { weight: &weight, bias: None, geometry: Geometry::Conv { stride: 1 + n % 2, padding: n % 2 } };
        let y = Hra::from_vectors(v, gs).forward(&frozen, &x);
        prop_assert!(relative_error(&y, &frozen.apply(&x, &merged, None)) < 1e-5);
    }

    #[test]
    fn even_ranks_start_at_the_base_model(seed in 0u64..1000, d in 2i64..64, half in 1i64..6, peft: bool) {
        let init = if peft { HraInit::Peft } else { HraInit::Auto };
        let weight = normal(seed, &[5, d]);
        let rank = 2 * half.min(d / 2);
        let adapter = Hra::new(&weight, HraConfig { init, ..config(rank) }, seed).unwrap();
        prop_assert!(moved(&adapter, &weight) < 1e-6);
        prop_assert!(distance(&adapter.reflections().merge(&weight), &weight) < 1e-6);
    }

    #[test]
    fn strength_is_a_path_of_orthogonal_matrices_from_the_identity_through_h(
        seed in 0u64..1000, d in 2i64..30, half in 1i64..5, s in -2.0f64..2.0, copies: bool,
    ) {
        let v = if copies { normal(seed, &[d, half]).repeat_interleave_self_int(2, 1, None) + normal(seed, &[d, 2 * half]) * 0.05 }
            else { normal(seed, &[d, 2 * half]) };
        let h = Reflections::from_vectors(&v, false);
        let whole = matrix(&h, d);
        let (part, left_over) = h.power(s);
        prop_assert!(!left_over);
        let m = matrix(&part, d).to_kind(Kind::Double);
        prop_assert!(distance(&m.matmul(&m.tr()), &Tensor::eye(d, F64)) < 1e-5);
        prop_assert!(distance(&matrix(&h.power(0.0).0, d), &Tensor::eye(d, F64)) < 1e-6);
        prop_assert!(distance(&matrix(&h.power(1.0).0, d), &whole) < 1e-5);
        // Powers along one path multiply as their exponents add.
        let rest = h.power(1.0 - s).0;
        prop_assert!(distance(&matrix(&part.then(&rest), d), &whole) < 1e-5);
        // Nearby strengths are nearby matrices.
        let near = h.power(s + 1e-3).0;
        prop_assert!(distance(&matrix(&near, d), &m) < 0.02);
    }

    #[test]
    fn low_rank_form_and_relative_change_describe_the_merged_weight(
        seed in 0u64..1000, d_in in 2i64..30, d_out in 1i64..30, r in 1i64..8,
    ) {
        let weight = normal(seed, &[d_out, d_in]);
        let h = Reflections::from_vectors(&normal(seed + 1, &[d_in, r]), false);
        let merged = h.merge(&weight);
        let (down, up) = h.low_rank(&weight);
        prop_assert!(relative_error(&(&weight + up.matmul(&down)), &merged) < 1e-5);
        let change = relative_error(&merged, &weight);
        let form = Form::LowRank { down, up };
        prop_assert!((form.relative_change(&weight.to_kind(Kind::Double)) - change).abs() < 1e-5);
        prop_assert!(relative_error(&h.inverse().merge(&merged), &weight) < 1e-5);
    }
}

#[test]
fn an_odd_number_of_reflections_has_one_direction_that_strength_cannot_turn() {
    let h = Reflections::from_vectors(&normal(3, &[9, 3]), false);
    let (half, left_over) = h.power(0.5);
    assert!(left_over);
    let eigenvalues = matrix(&half, 9).to_kind(Kind::Double);
    // All directions but one keep their length.
    let singular = eigenvalues.svd(true, true).1;
    assert!((singular.double_value(&[7]) - 1.0).abs() < 1e-6);
    assert!(singular.double_value(&[8]).abs() < 1e-6);
    assert!(distance(&matrix(&h.power(1.0).0, 9), &matrix(&h, 9)) < 1e-6);
}

/// Vectors as a short training leaves them: pairs that were equal, moved apart by a few thousandths.
fn barely_trained(seed: u64, d_in: i64) -> Tensor {
    let pairs = normal(seed, &[d_in, 4]).repeat_interleave_self_int(2, 1, None);
    pairs + normal(seed + 1, &[d_in, 8]) * 3e-3
}

#[test]
fn chains_of_barely_trained_adapters_keep_an_even_number_of_reflections() {
    for seed in 0..40 {
        let half = |seed, s| Reflections::from_vectors(&barely_trained(seed, 32), false).power(s).0;
        let chain = half(10 * seed, 0.8).then(&half(10 * seed + 5, 0.6));
        let vectors = chain.vectors();
        assert_eq!(vectors.size()[1] % 2, 0, "seed {seed}");
        assert!(distance(&dense(&vectors), &matrix(&chain, 32)) < 1e-5, "seed {seed}");
    }
}

#[test]
fn the_low_rank_form_of_a_barely_trained_adapter_can_be_rounded() {
    let (weight, h) = (normal(1, &[24, 64]), Reflections::from_vectors(&barely_trained(2, 64), false));
    let (down, up) = h.low_rank(&weight);
    let exact = up.matmul(&down);
    let short = |t: &Tensor| t.to_kind(Kind::Half).to_kind(Kind::Double);
    assert!(relative_error(&short(&up).matmul(&short(&down)), &exact) < 1e-3);
}

#[test]
fn chains_multiply_in_the_order_given() {
    let (a, b) = (normal(1, &[12, 4]), normal(2, &[12, 3]));
    let chain = Reflections::from_vectors(&a, false).then(&Reflections::from_vectors(&b, false));
    assert!(distance(&matrix(&chain, 12), &dense(&a).matmul(&dense(&b))) < 1e-6);
}

#[test]
fn gram_schmidt_is_an_involution_and_its_start_disturbs_a_wide_layer_not_at_all() {
    let v = normal(5, &[16, 4]);
    let h = Reflections::from_vectors(&v, true);
    assert!(distance(&matrix(&h.then(&h), 16), &Tensor::eye(16, F64)) < 1e-6);
    assert!(h.orthogonality_error() < 1e-5);
    let wide = normal(6, &[8, 16]); // d_in > d_out: there are directions that the layer does not use
    let gs = HraConfig { gram_schmidt: true, ..config(4) };
    assert!(moved(&Hra::new(&wide, gs, 0).unwrap(), &wide) < 1e-5);
    let square = normal(7, &[16, 16]);
    let quiet = moved(&Hra::new(&square, gs, 0).unwrap(), &square);
    let random = Hra::new(&square, HraConfig { init: HraInit::Peft, ..gs }, 0).unwrap();
    assert!(quiet < 0.5 * moved(&random, &square), "{quiet}");
}

#[test]
fn odd_ranks_are_refused_with_the_reason_unless_allowed() {
    let text = config(7).validate().unwrap_err().to_string();
    assert!(text.contains("expected an even number") && text.contains("rank 6 or 8"), "{text}");
    assert!(HraConfig { allow_odd_rank: true, ..config(7) }.validate().is_ok());
    assert!(HraConfig { gram_schmidt: true, ..config(7) }.validate().is_ok());
    assert!(config(0).validate().is_err());
    let problem = Hra::new(&normal(1, &[4, 6]), config(8), 0).err().unwrap();
    assert!(problem.contains("at most 6"), "{problem}");
}

#[test]
fn gradients_equal_finite_differences_on_both_sides() {
    for (tokens, wants_gradient) in [(2, true), (40, false)] {
        let weight = normal(1, &[6, 10]);
        let x = normal(2, &[tokens, 10]).set_requires_grad(wants_gradient);
        let v = normal(3, &[10, 4]).set_requires_grad(true);
        let frozen = Frozen { weight: &weight, bias: None, geometry: Geometry::Linear };
        let loss = |v: &Tensor| {
            Hra::from_vectors(v.shallow_clone(), false).forward(&frozen, &x).square().sum(Kind::Float)
        };
        loss(&v).backward();
        let exact = v.grad();
        let _guard = tch::no_grad_guard();
        let merged_loss = |v: &Tensor| {
            let merged = Tensor::matmul(&weight.to_kind(Kind::Double), &dense(v));
            x.to_kind(Kind::Double)
                .linear(&merged, None::<Tensor>)
                .square()
                .sum(Kind::Double)
                .double_value(&[])
        };
        for (i, j) in [(0, 0), (3, 1), (9, 3)] {
            let h = 1e-6;
            let shifted = |by: f64| {
                let v = v.detach().to_kind(Kind::Double).copy();
                let _ = v.get(i).get(j).g_add_scalar_(by);
                v
            };
            let (up, down) = (merged_loss(&shifted(h)), merged_loss(&shifted(-h)));
            let slope = (up - down) / (2.0 * h);
            let found = exact.double_value(&[i, j]);
            assert!((slope - found).abs() < 1e-3 * (1.0 + slope.abs()), "tokens {tokens}: {slope} {found}");
        }
    }
}

#[test]
fn prepared_together_layers_give_what_each_gives_alone_until_a_step_is_over() {
    for gram_schmidt in [false, true] {
        let weight = normal(1, &[6, 10]);
        let x = normal(2, &[5, 10]).set_requires_grad(true);
        let frozen = Frozen { weight: &weight, bias: None, geometry: Geometry::Linear };
        let vectors: Vec<Tensor> =
            (3..6).map(|seed| normal(seed, &[10, 4]).set_requires_grad(true)).collect();
        let layers: Vec<Hra> =
            vectors.iter().map(|v| Hra::from_vectors(v.shallow_clone(), gram_schmidt)).collect();
        let alike: Vec<&dyn Adapter> = layers.iter().map(|layer| layer as &dyn Adapter).collect();
        let outputs = || -> Vec<Tensor> { layers.iter().map(|layer| layer.forward(&frozen, &x)).collect() };
        let gradients = |outputs: &[Tensor]| -> Vec<Tensor> {
            let total = Tensor::stack(outputs, 0).square().sum(Kind::Float);
            Tensor::run_backward(&[total], &vectors, false, false)
        };
        let alone = outputs();
        layers[0].prepare(&alike, Kind::Float);
        let together = outputs();
        let pairs = gradients(&alone).into_iter().zip(gradients(&together));
        for (a, b) in alone.iter().map(Tensor::shallow_clone).zip(together).chain(pairs) {
            assert!(relative_error(&b, &a) < 1e-5, "Gram-Schmidt: {gram_schmidt}");
        }
        // Other parameters: what was prepared from those before is used until the step is over, and no longer.
        let _guard = tch::no_grad_guard();
        layers[0].prepare(&alike, Kind::Float);
        let before = outputs();
        for v in &vectors {
            v.shallow_clone().copy_(&normal(9, &[10, 4]));
        }
        assert_eq!(outputs(), before);
        layers.iter().for_each(Adapter::project);
        let fresh = Hra::from_vectors(normal(9, &[10, 4]), gram_schmidt).forward(&frozen, &x);
        assert_eq!(outputs()[2], fresh);
    }
}

#[test]
fn no_bytes_are_spent_on_a_matrix_of_the_weights_size_nor_on_its_gradient() {
    const NAME: &str = "adapters::no_bytes_are_spent_on_a_matrix_of_the_weights_size_nor_on_its_gradient";
    alone(NAME, watch_the_memory_of_a_step);
}

fn watch_the_memory_of_a_step() {
    // 4096 inputs: a d x d matrix has 64 MiB, and so has the weight's gradient. Activations here are under 1 MiB each.
    let d = 4096;
    let weight = normal(1, &[d, d]);
    let x = normal(2, &[8, d]).set_requires_grad(true);
    let v = normal(3, &[d, 8]).set_requires_grad(true);
    let frozen = Frozen { weight: &weight, bias: None, geometry: Geometry::Linear };
    let step = || {
        Hra::from_vectors(v.shallow_clone(), false).forward(&frozen, &x).square().sum(Kind::Float).backward()
    };
    step(); // the first call makes the libraries' own buffers
    let before = hra::platform::device::peak_process_memory().unwrap();
    step();
    let grown = hra::platform::device::peak_process_memory().unwrap() - before;
    assert!(grown < 16 << 20, "the step needed {} MiB more than before", grown >> 20);
    assert!(!weight.requires_grad() && !weight.grad().defined());
}

#[test]
fn wy_factor_satisfies_its_equation() {
    let u = normal(8, &[20, 5]);
    let u = &u / u.norm_scalaropt_dim(2, [0], true);
    let t = wy_factor(&u).to_kind(Kind::Double);
    let gram = u.tr().matmul(&u).to_kind(Kind::Double);
    // H H^T = I  <=>  T + T^T = T G T^T
    assert!(distance(&(&t + t.tr()), &t.matmul(&gram).matmul(&t.tr())) < 1e-5);
}
