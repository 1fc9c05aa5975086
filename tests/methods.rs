//! All methods as algebra: what must hold for any shapes and any numbers, checked on random ones.

mod support;

use hra::adapter::blocks::{Cayley, Partition};
use hra::adapter::combine::{How, combine};
use hra::adapter::methods::boft::BoftConfig;
use hra::adapter::methods::dora::DoraConfig;
use hra::adapter::methods::ether_plus::EtherPlusConfig;
use hra::adapter::methods::full::FullConfig;
use hra::adapter::methods::hra::{HraConfig, HraInit};
use hra::adapter::methods::ia3::Ia3Config;
use hra::adapter::methods::lora::{LoraConfig, LoraInit};
use hra::adapter::methods::oft::{Coft, OftConfig};
use hra::adapter::peft::{self, AdapterFile};
use hra::adapter::{Adapter, Boft, Dora, Form, Frozen, Geometry, Lora, Method, Oft};
use hra::weights::tensor_file::{self, TensorFile};
use proptest::prelude::*;
use std::sync::Mutex;
use support::relative_error;
use tch::{Device, Kind, Tensor};

const F64: (Kind, Device) = (Kind::Double, Device::Cpu);
const F32: (Kind, Device) = (Kind::Float, Device::Cpu);

/// The generator is the process's, and tests run beside each other.
static DRAWING: Mutex<()> = Mutex::new(());

fn randn(seed: u64, shape: &[i64]) -> Tensor {
    let _drawing = DRAWING.lock();
    tch::manual_seed(seed as i64);
    Tensor::randn(shape, F32)
}

fn distance(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    (a.to_kind(Kind::Double) - b.to_kind(Kind::Double)).abs().max().double_value(&[])
}

fn oft(partition: Partition) -> OftConfig {
    OftConfig { partition, cayley: Cayley::Exact, coft: Coft::None, block_share: false }
}

/// Every kind of adapter, for a layer whose inputs come in blocks of `b`.
fn methods(b: i64) -> Vec<Method> {
    let lora = LoraConfig { rank: 2, alpha: 3.0, rslora: false, ..LoraConfig::new(1, 1.0) };
    let blocks = oft(Partition::BlockSize(b));
    let hra =
        HraConfig { rank: 2, gram_schmidt: false, init: HraInit::Auto, allow_odd_rank: false, lambda: 0.0 };
    vec![
        Method::new(hra),
        Method::new(lora.clone()),
        Method::new(LoraConfig { rslora: true, init: LoraInit::Kaiming, ..lora.clone() }),
        Method::new(DoraConfig(lora)),
        Method::new(blocks),
        Method::new(OftConfig { block_share: true, ..blocks }),
        Method::new(OftConfig { cayley: Cayley::Neumann(5), ..blocks }),
        Method::new(OftConfig { coft: Coft::Paper { eps: 1e-2 }, ..blocks }),
        Method::new(BoftConfig { partition: Partition::BlockSize(b), factors: 1 }),
        Method::new(EtherPlusConfig { partition: Partition::Blocks(1) }),
        Method::new(Ia3Config::default()),
        Method::new(FullConfig),
    ]
}

/// An adapter of the method with random numbers in it, of which rotations stay well below half a turn.
fn random(method: &Method, weight: &Tensor, seed: u64) -> Box<dyn Adapter> {
    let mut adapter = method.start(weight, seed).unwrap();
    let mut n = seed;
    adapter.replace_parameters(&mut |t| {
        n += 1;
        t + randn(n, &t.size()) * 0.3
    });
    adapter
}

/// `W'` at a strength, f64.
fn merged(adapter: &dyn Adapter, weight: &Tensor, strength: f64) -> Tensor {
    let weight = weight.to_kind(Kind::Double);
    adapter.change(&weight, strength).form.merged(&weight)
}

/// `blockdiag(R)` of an adapter on `d` inputs at a strength: what it makes of the identity, transposed.
fn rotation(adapter: &dyn Adapter, d: i64, strength: f64) -> Tensor {
    merged(adapter, &Tensor::eye(d, F64), strength).tr()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_forward_pass_is_that_of_the_merged_weight(
        seed in 0u64..1000, b in 2i64..6, n in 1i64..5, d_out in 1i64..20, tokens in 1i64..9, kernel in 1i64..4, stride in 1i64..3,
    ) {
        let weight = randn(seed, &[d_out, b * n]);
        let filters = randn(seed + 1, &[d_out, b * n, kernel, kernel]);
        let bias = randn(seed + 2, &[d_out]);
        let x = randn(seed + 3, &[2, tokens, b * n]);
        let picture = randn(seed + 4, &[2, b * n, 7, 6]);
        let conv = Geometry::Conv { stride, padding: kernel / 2 };
        for method in methods(b) {
            for (weight, x, geometry) in [(&weight, &x, Geometry::Linear), (&filters, &picture, conv)] {
                let adapter = random(&method, weight, seed);
                prop_assert!(adapter.check(&weight.size()).is_ok());
                let new = merged(&*adapter, &weight.flatten(1, -1), 1.0).reshape(&weight.size()[..]).to_kind(Kind::Float);
                for bias in [None, Some(&bias)] {
                    let frozen = Frozen { weight, bias, geometry };
                    let own = bias.and_then(|bias| adapter.change_bias(&bias.to_kind(Kind::Double), 1.0));
                    let own = own.map(|bias| bias.to_kind(Kind::Float));
                    let merged = frozen.apply(x, &new, own.as_ref().or(bias));
                    let error = relative_error(&adapter.forward(&frozen, x), &merged);
                    prop_assert!(error < 1e-5, "{} {geometry:?}: {error:.1e}", method.describe());
                }
                // Half precision: products in the dtype of the input, numbers of the adapter in f32.
                let half = |t: &Tensor| t.to_kind(Kind::BFloat16);
                let (narrow, bias16) = (half(weight), half(&bias));
                let frozen = Frozen { weight: &narrow, bias: Some(&bias16), geometry };
                let y = adapter.forward(&frozen, &half(x));
                prop_assert_eq!(y.kind(), Kind::BFloat16);
                let exact = Frozen { weight, bias: Some(&bias), geometry };
                let own = adapter.change_bias(&bias.to_kind(Kind::Double), 1.0);
                let own = own.map_or_else(|| bias.shallow_clone(), |own| own.to_kind(Kind::Float));
                let error = relative_error(&y, &exact.apply(x, &new, Some(&own)));
                prop_assert!(error < 0.05, "{} {geometry:?} in bf16: {error:.1e}", method.describe());
            }
        }
    }

    #[test]
    fn training_starts_at_the_base_model(seed in 0u64..1000, b in 2i64..6, n in 1i64..5, d_out in 2i64..20) {
        for shape in [vec![d_out, b * n], vec![d_out, b * n, 3, 3]] {
            let weight = randn(seed, &shape);
            for method in methods(b) {
                prop_assert!(method.validate().is_ok());
                let adapter = method.start(&weight, seed).unwrap();
                let matrix = weight.flatten(1, -1).to_kind(Kind::Double);
                let moved = adapter.change(&matrix, 1.0).form.relative_change(&matrix);
                prop_assert!(moved < 1e-6, "{} starts {moved:.1e} away", method.describe());
                let trained: i64 = adapter.parameters().iter().map(|(_, t)| t.numel() as i64).sum();
                prop_assert_eq!(method.parameters_for(&shape), Ok(trained as usize));
            }
        }
    }

    #[test]
    fn strength_moves_along_a_path_from_the_base_model_through_the_adapter(
        seed in 0u64..1000, b in 2i64..6, n in 1i64..5, d_out in 1i64..20, s in -2.0f64..2.0,
    ) {
        let narrow = randn(seed, &[d_out, b * n]);
        let weight = narrow.to_kind(Kind::Double);
        let norm = weight.norm().double_value(&[]);
        for method in methods(b) {
            let adapter = random(&method, &narrow, seed);
            let at = |s: f64| merged(&*adapter, &weight, s);
            let name = method.describe();
            prop_assert!(distance(&at(0.0), &weight) < 1e-10, "{name}");
            // The path runs through the adapter itself, which strength 1 takes without the path's formula.
            prop_assert!(distance(&at(1.0 + 1e-9), &at(1.0)) < 1e-6 * norm, "{name}");
            prop_assert!(distance(&at(s + 1e-6), &at(s)) < 1e-4 * norm, "{name}");
        }
    }

    #[test]
    fn rotations_stay_rotations_at_every_strength_and_their_exponents_add(
        seed in 0u64..1000, b in 2i64..9, n in 1i64..5, s in -2.0f64..2.0, size in 0.0f64..3.0,
    ) {
        let d = b * n;
        let eye = Tensor::eye(d, F64);
        let upper = randn(seed, &[n, b * (b - 1) / 2]) * size;
        let oft = Oft::from_tensor(upper, oft(Partition::BlockSize(b))).unwrap();
        let boft = Boft::from_tensors(randn(seed, &[1, n, b, b]) * size, Tensor::ones([d, 1], F32)).unwrap();
        for adapter in [&oft as &dyn Adapter, &boft] {
            let r = rotation(adapter, d, s);
            prop_assert!(distance(&r.matmul(&r.tr()), &eye) < 1e-10);
            prop_assert!((Tensor::linalg_slogdet(&r).0.double_value(&[]) - 1.0).abs() < 1e-9);
            let applied = r.to_kind(Kind::Float).to_kind(Kind::Double);
            prop_assert!(distance(&applied.matmul(&applied.tr()), &eye) < 5e-6);
            let whole = rotation(adapter, d, 1.0);
            prop_assert!(distance(&r.matmul(&rotation(adapter, d, 1.0 - s)), &whole) < 1e-9);
            prop_assert!(distance(&rotation(adapter, d, -1.0), &whole.tr()) < 1e-9);
            // angles: the trace of a rotation is the sum of 2 cos over its planes, and 1 for what rests
            let turned = adapter.rotation().unwrap();
            let planes: f64 = turned.angles.iter().map(|angle| 2.0 * angle.cos()).sum();
            let trace = whole.trace().double_value(&[]);
            prop_assert!((planes + (d - 2 * turned.angles.len() as i64) as f64 - trace).abs() < 1e-8);
            prop_assert!(turned.orthogonality_error < 5e-6, "{:.1e}", turned.orthogonality_error);
            prop_assert_eq!(adapter.orthogonality_error(), Some(turned.orthogonality_error));
        }
    }

    #[test]
    fn oft_blocks_are_the_cayley_transform_of_the_upper_triangle(seed in 0u64..1000, b in 2i64..7, n in 1i64..4) {
        let upper = randn(seed, &[n, b * (b - 1) / 2]) * 0.4;
        let exact = Oft::from_tensor(upper.shallow_clone(), oft(Partition::Blocks(n))).unwrap();
        let r = rotation(&exact, b * n, 1.0);
        for block in 0..n {
            let mut entries = (0..b * (b - 1) / 2).map(|k| upper.double_value(&[block, k]));
            let s = Tensor::zeros([b, b], F64);
            for i in 0..b {
                for j in i + 1..b {
                    let value = entries.next().unwrap();
                    let _ = s.get(i).get(j).fill_(value);
                    let _ = s.get(j).get(i).fill_(-value);
                }
            }
            let eye = Tensor::eye(b, F64);
            let expected = (&eye - &s).matmul(&(&eye + &s).inverse());
            let found = r.narrow(0, block * b, b).narrow(1, block * b, b);
            prop_assert!(distance(&found, &expected) < 1e-10);
        }
    }

    #[test]
    fn pefts_series_is_nearly_the_transpose_of_the_exact_block(seed in 0u64..1000, b in 2i64..7, terms in 4i64..9) {
        let series = OftConfig { cayley: Cayley::Neumann(terms), ..oft(Partition::Blocks(1)) };
        let make = |size: f64, config| {
            let upper = randn(seed, &[1, b * (b - 1) / 2]) * size;
            (upper.norm().double_value(&[]), rotation(&Oft::from_tensor(upper, config).unwrap(), b, 1.0))
        };
        let (norm, exact) = make(0.01, oft(Partition::Blocks(1)));
        let (_, found) = make(0.01, series);
        // the first term that differs from the transpose is the last one, S^(terms - 1)
        prop_assert!(distance(&found, &exact.tr()) < 1e-7 + 4.0 * norm.powi(terms as i32 - 1));
        prop_assert!(distance(&found, &exact) > norm / b as f64);
    }

    #[test]
    fn what_a_series_stretches_is_stretched_in_proportion(seed in 0u64..1000, b in 2i64..7, s in -1.0f64..2.0) {
        let upper = randn(seed, &[1, b * (b - 1) / 2]) * 0.2;
        let series = OftConfig { cayley: Cayley::Neumann(5), ..oft(Partition::Blocks(1)) };
        let adapter = Oft::from_tensor(upper, series).unwrap();
        let lengths = |s: f64| rotation(&adapter, b, s).svd(true, true).1.sort(-1, false).0;
        let expected = ((lengths(1.0) - 1.0) * s + 1.0).abs().sort(-1, false).0;
        prop_assert!(distance(&lengths(s), &expected) < 1e-8);
    }

    #[test]
    fn coft_shortens_what_is_outside_of_its_ball_and_nothing_else(seed in 0u64..1000, b in 2i64..7, n in 1i64..5, eps in 1e-3f64..1e-1) {
        // blocks of all sizes, around the radius
        let radius = eps * (b * b) as f64 / (n as f64).sqrt();
        let sizes = Tensor::arange(n, F32).unsqueeze(1) * (2.0 * radius / n as f64) / (b as f64);
        let start = randn(seed, &[n, b * (b - 1) / 2]) * (sizes + 0.01 * radius);
        let config = OftConfig { coft: Coft::Paper { eps }, ..oft(Partition::BlockSize(b)) };
        let adapter = Oft::from_tensor(start.copy(), config).unwrap();
        adapter.project();
        let after = adapter.parameters().remove(0).1;
        for block in 0..n {
            // |S|_F counts the upper triangle twice
            let length = |t: &Tensor| t.get(block).norm().double_value(&[]) * 2f64.sqrt();
            let (before, now) = (length(&start), length(&after));
            prop_assert!((now - before.min(radius)).abs() < 1e-5 * radius, "{before} {now} {radius}");
            prop_assert!(distance(&(after.get(block) * before), &(start.get(block) * now)) < 1e-5 * before.max(now));
        }
        let shared = OftConfig { block_share: true, ..config };
        let one = Oft::from_tensor(randn(seed, &[1, b * (b - 1) / 2]) * 100.0, shared).unwrap();
        one.project();
        let length = one.parameters()[0].1.norm().double_value(&[]) * 2f64.sqrt();
        prop_assert!((length - eps * (b * b) as f64).abs() < 1e-5 * length, "the radius of a shared block is eps b^2");
        // PEFT's is another one, and is kept at use
        let theirs = OftConfig { coft: Coft::Peft { eps }, ..config };
        let adapter = Oft::from_tensor(randn(seed, &[n, b * (b - 1) / 2]) * 100.0, theirs).unwrap();
        let norms = adapter.parameters()[0].1.norm_scalaropt_dim(2, [1], false) * 2f64.sqrt();
        prop_assert!((norms - eps / (n as f64).sqrt()).abs().max().double_value(&[]) < 1e-5 * eps);
    }

    #[test]
    fn dora_rows_have_the_lengths_that_it_trains(seed in 0u64..1000, d_in in 2i64..20, d_out in 1i64..20) {
        let weight = randn(seed, &[d_out, d_in]);
        let lora = Lora::from_tensors(randn(seed + 1, &[2, d_in]), randn(seed + 2, &[d_out, 2]), 0.5).unwrap();
        let lengths = randn(seed + 3, &[d_out]).abs() + 0.1;
        let dora = Dora::from_tensors(lora, lengths.shallow_clone()).unwrap();
        let norms = merged(&dora, &weight, 1.0).norm_scalaropt_dim(2, [1], false);
        prop_assert!(distance(&norms, &lengths) < 1e-6);
    }
}

#[test]
fn gradients_equal_finite_differences_of_the_merged_weight() {
    let (b, n, d_out) = (3, 2, 5);
    let x = randn(2, &[7, b * n]);
    let target = randn(4, &[7, d_out]);
    let weight = randn(1, &[d_out, b * n]);
    for method in methods(b) {
        if method.name() == "dora" {
            continue; // its norm is held fixed: the next test
        }
        let mut adapter = random(&method, &weight, 3);
        let mut leaves = Vec::new();
        adapter.replace_parameters(&mut |t| {
            leaves.push(t.detach().set_requires_grad(true));
            leaves[leaves.len() - 1].shallow_clone()
        });
        let frozen = Frozen { weight: &weight, bias: None, geometry: Geometry::Linear };
        (adapter.forward(&frozen, &x) - &target).square().sum(Kind::Float).backward();
        let _guard = tch::no_grad_guard();
        for (p, leaf) in leaves.iter().enumerate() {
            for entry in [0, leaf.numel() as i64 / 2, leaf.numel() as i64 - 1] {
                let mut loss = |by: f64| {
                    let mut i = 0;
                    adapter.replace_parameters(&mut |_| {
                        let values = leaves[i].to_kind(Kind::Double).copy();
                        if i == p {
                            let _ = values.view(-1).get(entry).g_add_scalar_(by);
                        }
                        i += 1;
                        values
                    });
                    let y = x.to_kind(Kind::Double).matmul(&merged(&*adapter, &weight, 1.0).tr());
                    (y - target.to_kind(Kind::Double)).square().sum(Kind::Double).double_value(&[])
                };
                let slope = (loss(1e-6) - loss(-1e-6)) / 2e-6;
                let found = leaf.grad().view(-1).double_value(&[entry]);
                assert!(
                    (slope - found).abs() < 1e-3 * (1.0 + slope.abs()),
                    "{} parameter {p} entry {entry}: {slope} {found}",
                    method.describe()
                );
            }
        }
    }
}

#[test]
fn doras_norm_is_a_constant_in_the_backward_pass() {
    let weight = randn(1, &[5, 6]).to_kind(Kind::Double);
    let x = randn(2, &[7, 6]).to_kind(Kind::Double);
    let leaf = |seed, shape: &[i64]| randn(seed, shape).to_kind(Kind::Double).set_requires_grad(true);
    let (a, b, m) = (leaf(3, &[2, 6]), leaf(4, &[5, 2]), leaf(5, &[5]));
    let dense = |constant: bool| {
        let moved = &weight + b.matmul(&a) * 1.5;
        let norm = moved.norm_scalaropt_dim(2, [1], true);
        let norm = if constant { norm.detach() } else { norm };
        let y = x.matmul(&(moved * (m.unsqueeze(1) / norm)).tr());
        Tensor::run_backward(&[y.square().sum(Kind::Double)], &[&a, &b, &m], false, false)
    };
    let narrow = |t: &Tensor| t.detach().to_kind(Kind::Float).set_requires_grad(true);
    let leaves = [narrow(&a), narrow(&b), narrow(&m)];
    let lora = Lora::from_tensors(leaves[0].shallow_clone(), leaves[1].shallow_clone(), 1.5).unwrap();
    let dora = Dora::from_tensors(lora, leaves[2].shallow_clone()).unwrap();
    let weight32 = weight.to_kind(Kind::Float);
    let frozen = Frozen { weight: &weight32, bias: None, geometry: Geometry::Linear };
    let y = dora.forward(&frozen, &x.to_kind(Kind::Float));
    let found = Tensor::run_backward(&[y.square().sum(Kind::Float)], &leaves, false, false);
    for ((found, constant), through) in found.iter().zip(dense(true)).zip(dense(false)).take(2) {
        assert!(relative_error(found, &constant) < 1e-5);
        assert!(relative_error(found, &through) > 1e-2, "a gradient through the norm is another one");
    }
    assert!(relative_error(&found[2], &dense(true)[2]) < 1e-5);
}

#[test]
fn the_papers_ball_for_the_narrowest_layers_of_stable_diffusion() {
    // 320 inputs in 4 blocks at eps 6e-5: 6e-5 * 80^2 / 2
    let config = OftConfig { coft: Coft::Paper { eps: 6e-5 }, ..oft(Partition::Blocks(4)) };
    let adapter = Oft::from_tensor(randn(1, &[4, 80 * 79 / 2]), config).unwrap();
    adapter.project();
    let lengths = adapter.parameters()[0].1.norm_scalaropt_dim(2, [1], false) * 2f64.sqrt();
    assert!((lengths - 0.192).abs().max().double_value(&[]) < 1e-6);
}

#[test]
fn blocks_of_stable_diffusions_size_stay_orthogonal_in_f32() {
    for (n, b, size) in [(4, 80, 0.01), (4, 320, 0.01), (2, 320, 0.1), (64, 5, 1.0)] {
        let upper = randn(1, &[n, b * (b - 1) / 2]) * size;
        let error =
            Oft::from_tensor(upper, oft(Partition::Blocks(n))).unwrap().orthogonality_error().unwrap();
        assert!(error < 5e-6, "{n} blocks of {b}, entries of size {size}: {error:.1e}");
    }
}

#[test]
fn several_butterfly_factors_multiply_as_in_peft() {
    // PEFT 0.21 BOFTLayer.block_butterfly_perm for 16 inputs in blocks of 4 with 3 factors.
    let orders: [[i64; 16]; 3] = [
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
        [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15],
        [0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15],
    ];
    let raw = randn(1, &[3, 4, 4, 4]) * 0.5;
    let scale = randn(2, &[5, 1]);
    let mut total = Tensor::eye(16, F64);
    for (i, order) in orders.iter().enumerate() {
        let p = raw.get(i as i64).to_kind(Kind::Double);
        let s = (&p - p.transpose(1, 2)) * 0.5;
        let eye = Tensor::eye(4, F64);
        let blocks: Vec<Tensor> =
            (0..4).map(|k| (&eye - s.get(k)).matmul(&(&eye + s.get(k)).inverse())).collect();
        let permutation = Tensor::zeros([16, 16], F64);
        for (row, column) in order.iter().enumerate() {
            let _ = permutation.get(row as i64).get(*column).fill_(1.0);
        }
        let factor = permutation.matmul(&Tensor::block_diag(&blocks)).matmul(&permutation.tr());
        total = factor.matmul(&total);
    }
    let weight = randn(3, &[5, 16]);
    let expected = weight.to_kind(Kind::Double).matmul(&total.tr()) * scale.to_kind(Kind::Double);
    let boft = Boft::from_tensors(raw, scale).unwrap();
    assert!(distance(&merged(&boft, &weight, 1.0), &expected) < 1e-6);
    let x = randn(4, &[3, 16]);
    let frozen = Frozen { weight: &weight, bias: None, geometry: Geometry::Linear };
    let y = x.matmul(&expected.to_kind(Kind::Float).tr());
    assert!(relative_error(&boft.forward(&frozen, &x), &y) < 1e-5);
    let filters = weight.view([5, 4, 2, 2]);
    let picture = randn(5, &[1, 4, 6, 6]);
    let frozen = Frozen { weight: &filters, bias: None, geometry: Geometry::Conv { stride: 1, padding: 0 } };
    let y = frozen.apply(&picture, &expected.to_kind(Kind::Float).view([5, 4, 2, 2]), None);
    assert!(relative_error(&boft.forward(&frozen, &picture), &y) < 1e-5);
    // one that the blocks cannot be paired for
    assert!(Boft::from_tensors(randn(1, &[3, 6, 4, 4]), randn(2, &[5, 1])).is_err());
}

#[test]
fn what_does_not_divide_is_refused_with_what_does() {
    let problem = |method: Method| method.parameters_for(&[7, 12]).unwrap_err();
    let text = problem(Method::new(oft(Partition::Blocks(5))));
    assert!(text.contains("12 inputs, found 5") && text.ends_with("hint: 1, 2, 3, 4, 6"), "{text}");
    let text = problem(Method::new(oft(Partition::BlockSize(5))));
    assert!(text.contains("12 inputs, found 5") && text.ends_with("hint: 2, 3, 4, 6, 12"), "{text}");
    let boft = Method::new(BoftConfig { partition: Partition::Blocks(24), factors: 1 });
    assert_eq!(boft.start(&randn(0, &[7, 12]), 0).err(), boft.parameters_for(&[7, 12]).err());
    assert!(problem(boft).contains("1, 2, 3, 4, 6"));
    assert!(
        problem(Method::new(oft(Partition::Blocks(12)))).contains("1, 2, 3, 4, 6"),
        "blocks of one cannot turn"
    );
    let lora = LoraConfig {
        rank: 13,
        alpha: 1.0,
        rslora: false,
        init: LoraInit::Kaiming,
        ..LoraConfig::new(1, 1.0)
    };
    assert!(problem(Method::new(lora)).contains("at most 12"));
    let hra =
        HraConfig { rank: 14, gram_schmidt: false, init: HraInit::Auto, allow_odd_rank: false, lambda: 0.0 };
    assert!(problem(Method::new(hra)).contains("at most 12"));
}

#[test]
fn settings_that_no_layer_can_train_are_refused() {
    let lora = LoraConfig { rank: 4, alpha: 4.0, rslora: false, ..LoraConfig::new(1, 1.0) };
    let blocks = oft(Partition::Blocks(4));
    for (method, word) in [
        (Method::new(LoraConfig { rank: 0, ..lora.clone() }), "rank"),
        (Method::new(LoraConfig { alpha: f64::NAN, ..lora.clone() }), "lora_alpha"),
        (Method::new(LoraConfig { alpha: 0.0, ..lora }), "lora_alpha"),
        (Method::new(oft(Partition::Blocks(0))), "rank"),
        (Method::new(oft(Partition::BlockSize(1))), "block_size"),
        (Method::new(OftConfig { coft: Coft::Paper { eps: 0.0 }, ..blocks }), "coft_eps"),
        (Method::new(OftConfig { coft: Coft::Peft { eps: 1.0 }, ..blocks }), "--method coft"),
        (Method::new(BoftConfig { partition: Partition::Blocks(4), factors: 2 }), "butterfly"),
    ] {
        let text = method.validate().unwrap_err().to_string();
        assert!(text.contains(word), "{text}");
    }
}

#[test]
fn ether_plus_is_the_papers_product_on_both_sides_and_its_change_is_bounded() {
    // arXiv 2405.20271, eq. 5: H+ = I - u u^T + v v^T on each diagonal block, W' = H_out W H_in
    let weight = randn(1, &[8, 12]);
    let method = Method::new(EtherPlusConfig { partition: Partition::Blocks(2) });
    let adapter = random(&method, &weight, 5);
    let tensors: Vec<Tensor> =
        adapter.parameters().into_iter().map(|(_, t)| t.to_kind(Kind::Double)).collect();
    let dense = |u: &Tensor, v: &Tensor| {
        let (n, b) = (u.size()[0], u.size()[1]);
        let h = Tensor::zeros([n * b, n * b], F64);
        for i in 0..n {
            let unit = |t: &Tensor| t.get(i) / t.get(i).norm();
            let (u, v) = (unit(u), unit(v));
            let block = Tensor::eye(b, F64) - u.outer(&u) + v.outer(&v);
            h.narrow(0, i * b, b).narrow(1, i * b, b).copy_(&block);
        }
        h
    };
    let (h_in, h_out) = (dense(&tensors[0], &tensors[1]), dense(&tensors[2], &tensors[3]));
    let expected = h_out.matmul(&weight.to_kind(Kind::Double)).matmul(&h_in);
    assert!(distance(&merged(&*adapter, &weight, 1.0), &expected) < 1e-6);
    // its scale is the straight line
    let half = (&expected + weight.to_kind(Kind::Double)) * 0.5;
    assert!(distance(&merged(&*adapter, &weight, 0.5), &half) < 1e-6);
    // and no block is further from the identity than the square root of 2
    let away = (h_in - Tensor::eye(12, F64)).norm().double_value(&[]);
    assert!(away <= 2.0 + 1e-12 && away > 0.1, "{away}");
}

#[test]
fn ia3_is_pefts() {
    let folder = support::root().join("tests/fixtures/ia3");
    let file = AdapterFile::read(&folder).unwrap();
    assert!(file.unused.is_empty() && file.notes.is_empty());
    let numbers = TensorFile::open(&folder.join("numbers.safetensors")).unwrap();
    let get = |name: &str| numbers.read(name).unwrap();
    for (name, adapter) in &file.layers {
        let (weight, bias) = (get(&format!("{name}.weight")), get(&format!("{name}.bias")));
        let (x, geometry) = match weight.dim() {
            2 => (get("rows"), Geometry::Linear),
            _ => (get("picture"), Geometry::Conv { stride: 1, padding: 1 }),
        };
        adapter.check(&weight.size()).unwrap();
        let frozen = Frozen { weight: &weight, bias: Some(&bias), geometry };
        let y = adapter.forward(&frozen, &x);
        assert!(relative_error(&y, &get(&format!("output.{name}"))) < 1e-6, "{name}");
        let new = merged(&**adapter, &weight.flatten(1, -1), 1.0).view_as(&weight);
        assert!(relative_error(&new, &get(&format!("merged.{name}.weight"))) < 1e-6, "{name}");
        let wide = bias.to_kind(Kind::Double);
        let new = adapter.change_bias(&wide, 1.0).unwrap_or(wide);
        assert!(relative_error(&new, &get(&format!("merged.{name}.bias"))) < 1e-6, "{name}");
    }
    assert_eq!(file.layers.len(), 4);
    // written again, it says the same
    let again = tempfile::tempdir().unwrap();
    let class = ("Layers", "__main__");
    peft::write(again.path(), &file.config, class, &file.tensors(), Kind::Float, &[]).unwrap();
    let read = |dir: &std::path::Path| {
        let text = std::fs::read_to_string(dir.join(peft::CONFIG_FILE)).unwrap();
        let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
        for key in ["target_modules", "feedforward_modules"] {
            config[key].as_array_mut().unwrap().sort_by_key(|name| name.to_string());
        }
        config
    };
    assert_eq!(read(again.path()), read(&folder));
}

#[test]
fn ia3_adapters_multiply_and_those_of_other_layers_are_refused() {
    let file = |d_out: i64, factor: f64| {
        let dir = tempfile::tempdir().unwrap();
        let config =
            serde_json::json!({"peft_type": "IA3", "target_modules": ["to_q"], "feedforward_modules": []});
        std::fs::write(dir.path().join(peft::CONFIG_FILE), config.to_string()).unwrap();
        let factors = Tensor::full([d_out, 1], factor, F32);
        let tensors = [("base_model.model.a.to_q.ia3_l".to_string(), factors)];
        tensor_file::write(&dir.path().join(peft::WEIGHTS_FILE), &tensors, &[]).unwrap();
        AdapterFile::read(dir.path()).unwrap()
    };
    let (double, triple, other) = (file(5, 2.0), file(5, 3.0), file(4, 3.0));
    let (_, tensors) = combine(&[(&double, 0.5), (&triple, 1.0)], How::Chain).unwrap();
    assert!(distance(&tensors[0].1, &Tensor::full([5, 1], 1.5 * 3.0, F32)) < 1e-6);
    let problem = combine(&[(&double, 1.0), (&other, 1.0)], How::Chain).unwrap_err().to_string();
    assert!(problem.contains("layers of other sizes"), "{problem}");
}

#[test]
fn ether_plus_of_many_blocks_is_the_same_map() {
    // More blocks than a low-rank change would pay for: the weight itself is made.
    let weight = randn(1, &[8, 12]);
    for blocks in [1, 4] {
        let method = Method::new(EtherPlusConfig { partition: Partition::Blocks(blocks) });
        let adapter = random(&method, &weight, 5);
        let change = adapter.change(&weight.to_kind(Kind::Double), 1.0).form;
        assert_eq!(matches!(change, Form::Dense(_)), blocks == 4);
        let x = randn(2, &[3, 12]);
        let frozen = Frozen { weight: &weight, bias: None, geometry: Geometry::Linear };
        let expected = x.to_kind(Kind::Double).matmul(&merged(&*adapter, &weight, 1.0).tr());
        assert!(relative_error(&adapter.forward(&frozen, &x), &expected) < 1e-6);
        let start = method.start(&weight, 7).unwrap();
        assert_eq!(
            start.forward(&frozen, &x),
            frozen.forward(&x),
            "it starts at the base model, bit for bit"
        );
    }
}
