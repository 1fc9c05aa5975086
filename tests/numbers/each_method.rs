//! What one method alone promises: its paper's formula, PEFT's numbers, the settings that it refuses.

use crate::methods::{distance, merged, oft, random};
use crate::support::base::root;
use crate::support::error::relative_error;
use hra::adapter::blocks::Partition;
use hra::adapter::combine::{How, combine};
use hra::adapter::methods::boft::BoftConfig;
use hra::adapter::methods::ether_plus::EtherPlusConfig;
use hra::adapter::methods::hra::{HraConfig, HraInit};
use hra::adapter::methods::hra_free::HraFreeConfig;
use hra::adapter::methods::hra_magnitude::HraMagnitudeConfig;
use hra::adapter::methods::lora::{LoraConfig, LoraInit};
use hra::adapter::methods::oft::{Coft, OftConfig};
use hra::adapter::peft::{self, AdapterFile, PythonClass};
use hra::adapter::{Adapter, Boft, Dora, Form, Frozen, Geometry, Lora, Method, Oft};
use hra::platform::random::normal;
use hra::weights::tensor_file::{self, TensorFile};
use tch::{Device, Kind, Tensor};

const F64: (Kind, Device) = (Kind::Double, Device::Cpu);
const F32: (Kind, Device) = (Kind::Float, Device::Cpu);

#[test]
fn doras_norm_is_a_constant_in_the_backward_pass() {
    let weight = normal(1, &[5, 6]).to_kind(Kind::Double);
    let x = normal(2, &[7, 6]).to_kind(Kind::Double);
    let leaf = |seed, shape: &[i64]| normal(seed, shape).to_kind(Kind::Double).set_requires_grad(true);
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
    let adapter = Oft::from_tensor(normal(1, &[4, 80 * 79 / 2]), config).unwrap();
    adapter.project();
    let lengths = adapter.parameters()[0].1.norm_scalaropt_dim(2, [1], false) * 2f64.sqrt();
    assert!((lengths - 0.192).abs().max().double_value(&[]) < 1e-6);
}

#[test]
fn blocks_of_stable_diffusions_size_stay_orthogonal_in_f32() {
    for (n, b, size) in [(4, 80, 0.01), (4, 320, 0.01), (2, 320, 0.1), (64, 5, 1.0)] {
        let upper = normal(1, &[n, b * (b - 1) / 2]) * size;
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
    let raw = normal(1, &[3, 4, 4, 4]) * 0.5;
    let scale = normal(2, &[5, 1]);
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
    let weight = normal(3, &[5, 16]);
    let expected = weight.to_kind(Kind::Double).matmul(&total.tr()) * scale.to_kind(Kind::Double);
    let boft = Boft::from_tensors(raw, scale).unwrap();
    assert!(distance(&merged(&boft, &weight, 1.0), &expected) < 1e-6);
    let x = normal(4, &[3, 16]);
    let frozen = Frozen { weight: &weight, bias: None, geometry: Geometry::Linear };
    let y = x.matmul(&expected.to_kind(Kind::Float).tr());
    assert!(relative_error(&boft.forward(&frozen, &x), &y) < 1e-5);
    let filters = weight.view([5, 4, 2, 2]);
    let picture = normal(5, &[1, 4, 6, 6]);
    let frozen = Frozen { weight: &filters, bias: None, geometry: Geometry::Conv { stride: 1, padding: 0 } };
    let y = frozen.apply(&picture, &expected.to_kind(Kind::Float).view([5, 4, 2, 2]), None);
    assert!(relative_error(&boft.forward(&frozen, &picture), &y) < 1e-5);
    // one that the blocks cannot be paired for
    assert!(Boft::from_tensors(normal(1, &[3, 6, 4, 4]), normal(2, &[5, 1])).is_err());
}

#[test]
fn what_does_not_divide_is_refused_with_what_does() {
    let problem = |method: Method| method.parameters_for(&[7, 12]).unwrap_err();
    let text = problem(Method::new(oft(Partition::Blocks(5))));
    assert!(text.contains("12 inputs, found 5") && text.ends_with("hint: 1, 2, 3, 4, 6"), "{text}");
    let text = problem(Method::new(oft(Partition::BlockSize(5))));
    assert!(text.contains("12 inputs, found 5") && text.ends_with("hint: 2, 3, 4, 6, 12"), "{text}");
    let boft = Method::new(BoftConfig { partition: Partition::Blocks(24), factors: 1 });
    assert_eq!(boft.start(&normal(0, &[7, 12]), 0).err(), boft.parameters_for(&[7, 12]).err());
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
    let weight = normal(1, &[8, 12]);
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

/// `H_1 .. H_r` of raw vectors `(d, r)`, multiplied out as the paper writes it.
fn reflected(vectors: &Tensor) -> Tensor {
    let (d, r) = (vectors.size()[0], vectors.size()[1]);
    (0..r).fold(Tensor::eye(d, F64), |product, i| {
        let v = vectors.select(1, i).to_kind(Kind::Double);
        let u = &v / v.norm();
        product.matmul(&(Tensor::eye(d, F64) - u.outer(&u) * 2.0))
    })
}

#[test]
fn a_magnitude_is_the_length_of_each_row_over_its_old_one_because_reflections_keep_lengths() {
    let weight = normal(1, &[8, 12]);
    let method = Method::new(HraMagnitudeConfig(HraConfig { rank: 4, ..HraConfig::default() }));
    let adapter = random(&method, &weight, 5);
    let parameters = adapter.parameters();
    let (vectors, magnitude) = (&parameters[0].1, parameters[1].1.to_kind(Kind::Double));
    let wide = weight.to_kind(Kind::Double);
    let expected = wide.matmul(&reflected(vectors)) * magnitude.unsqueeze(1);
    let new = merged(&*adapter, &weight, 1.0);
    assert!(distance(&new, &expected) < 1e-6);
    let lengths = |w: &Tensor| w.norm_scalaropt_dim(2, [1], false);
    assert!(distance(&(lengths(&new) / lengths(&wide)), &magnitude.abs()) < 1e-6);
    assert!(distance(&magnitude, &magnitude.ones_like()) > 0.1, "magnitudes moved");
    let start = method.start(&weight, 7).unwrap();
    let starts = start.parameters().remove(1).1;
    assert_eq!(starts, starts.ones_like());
}

#[test]
fn hra_is_the_free_core_at_one_place() {
    // H = I - U T U^T with T^-1 = I/2 + strictly_upper(U^T U): the compact WY form of Householder products
    let (weight, vectors) = (normal(1, &[8, 12]), normal(2, &[12, 4]));
    let u = vectors.to_kind(Kind::Double) / vectors.to_kind(Kind::Double).norm_scalaropt_dim(2, [0], true);
    let inverse = Tensor::eye(4, F64) * 0.5 + u.tr().matmul(&u).triu(1);
    let core = -inverse.inverse();
    let mut adapter = Method::new(HraFreeConfig { rank: 4 }).start(&weight, 3).unwrap();
    assert_eq!(adapter.parameters()[1].1, Tensor::zeros([4, 4], F32), "it starts at the base model");
    let mut numbers = [vectors.shallow_clone(), core.to_kind(Kind::Float)].into_iter();
    adapter.replace_parameters(&mut |_| numbers.next().unwrap());
    let expected = weight.to_kind(Kind::Double).matmul(&reflected(&vectors));
    assert!(distance(&merged(&*adapter, &weight, 1.0), &expected) < 1e-5);
    // And elsewhere it is not orthogonal.
    let half = merged(&*adapter, &Tensor::eye(12, F64), 0.5);
    assert!(distance(&half.matmul(&half.tr()), &Tensor::eye(12, F64)) > 0.1);
    assert_eq!(adapter.rotation(), None);
}

#[test]
fn ia3_is_pefts() {
    let folder = root().join("tests/fixtures/ia3");
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
    let class = PythonClass { name: "Layers", module: "__main__", before: "" };
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
    let weight = normal(1, &[8, 12]);
    for blocks in [1, 4] {
        let method = Method::new(EtherPlusConfig { partition: Partition::Blocks(blocks) });
        let adapter = random(&method, &weight, 5);
        let change = adapter.change(&weight.to_kind(Kind::Double), 1.0).form;
        assert_eq!(matches!(change, Form::Dense(_)), blocks == 4);
        let x = normal(2, &[3, 12]);
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
