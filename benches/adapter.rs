//! Forward and backward of one square linear layer: without adapter, with LoRA, with our HRA, and with HRA as PEFT
//! computes it. One thread, f32, on the CPU.
//!
//! ```text
//! cargo bench --bench adapter
//! ```
//!
//! Times of two runs are not comparable, ratios within one run are: the cases of one layer follow each other. Every case
//! computes the gradient of the layer's input too, as all layers but the first few of a network must.

use divan::Bencher;
use hra::adapter::hra::{Hra, HraConfig, HraInit};
use hra::adapter::{Adapter, Frozen, Geometry};
use std::fmt;
use tch::{Device, Kind, Tensor};

const OPTIONS: (Kind, Device) = (Kind::Float, Device::Cpu);
const RANK: i64 = 8;

fn main() {
    tch::set_num_threads(1);
    the_dense_chain_is_the_same_map();
    divan::main();
}

/// How the layer is adapted.
#[derive(Clone, Copy)]
enum Method {
    Frozen,
    Lora(i64),
    Hra,
    DenseHra,
}

/// The layer's input and adapter.
#[derive(Clone, Copy)]
struct Case {
    tokens: i64,
    method: Method,
}

/// divan sorts by these names, so they begin with what the table is to be sorted by.
impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} tokens, ", self.tokens)?;
        match self.method {
            Method::Frozen => write!(f, "1 frozen"),
            Method::Lora(rank) => write!(f, "2 LoRA r {rank}"),
            Method::Hra => write!(f, "3 HRA r {RANK}"),
            Method::DenseHra => write!(f, "4 HRA r {RANK} as in PEFT"),
        }
    }
}

fn cases() -> Vec<Case> {
    let methods = [Method::Frozen, Method::Lora(4), Method::Lora(8), Method::Hra, Method::DenseHra];
    [77, 512, 2048].into_iter().flat_map(|tokens| methods.map(|method| Case { tokens, method })).collect()
}

/// A text prompt's 77 tokens, and the pixels of feature maps, at the widths of Stable Diffusion 1.5.
#[divan::bench(consts = [320, 768, 1280], args = cases(), sample_size = 1, sample_count = 60, max_time = 0.9)]
fn layer<const WIDTH: i64>(bencher: Bencher, case: Case) {
    tch::manual_seed(0);
    let weight = random(&[WIDTH, WIDTH]);
    let bias = random(&[WIDTH]);
    let frozen = Frozen { weight: &weight, bias: Some(&bias), geometry: Geometry::Linear };
    let x = random(&[1, case.tokens, WIDTH]).set_requires_grad(true);
    let grad_y = random(&[1, case.tokens, WIDTH]);
    let (forward, trained): (Forward, Vec<Tensor>) = match case.method {
        Method::Frozen => (Box::new(|frozen, x| frozen.forward(x)), Vec::new()),
        Method::Lora(rank) => {
            let down = random(&[rank, WIDTH]).set_requires_grad(true);
            let up = random(&[WIDTH, rank]).set_requires_grad(true);
            let trained = vec![down.shallow_clone(), up.shallow_clone()];
            (Box::new(move |frozen, x| lora(frozen, x, &down, &up)), trained)
        }
        Method::Hra => {
            let mut adapter = new_hra(&weight);
            adapter.replace_parameters(&mut |v| v.detach().set_requires_grad(true));
            let trained = adapter.parameters().into_iter().map(|(_, v)| v).collect();
            (Box::new(move |frozen, x| adapter.forward(frozen, x)), trained)
        }
        Method::DenseHra => {
            let v = vectors(&new_hra(&weight)).set_requires_grad(true);
            let trained = vec![v.shallow_clone()];
            (Box::new(move |frozen, x| dense_chain(frozen, x, &v)), trained)
        }
    };
    let mut inputs = vec![x.shallow_clone()];
    inputs.extend(trained);
    let step = || {
        let loss = (forward(&frozen, &x) * &grad_y).sum(Kind::Float);
        Tensor::run_backward(&[loss], &inputs, false, false)
    };
    step(); // the first call allocates
    bencher.bench_local(step);
}

type Forward = Box<dyn Fn(&Frozen, &Tensor) -> Tensor>;

/// `y = x W^T + b + (x A^T) B^T`, A `(r, d_in)`, B `(d_out, r)` (LoRA, arXiv 2106.09685, eq. 3, with alpha = r).
fn lora(frozen: &Frozen, x: &Tensor, down: &Tensor, up: &Tensor) -> Tensor {
    frozen.forward(x) + x.linear(down, None::<Tensor>).linear(up, None::<Tensor>)
}

/// HRA with the `d_in x d_in` matrix of PEFT 0.21: the reflections one after another on a dense identity, the identity of
/// the adapters before this one times that, the weight times that, and then the layer.
fn dense_chain(frozen: &Frozen, x: &Tensor, v: &Tensor) -> Tensor {
    let u = v / v.norm_scalaropt_dim(2, [0], true);
    let mut h = Tensor::eye(u.size()[0], OPTIONS);
    for i in 0..u.size()[1] {
        let column = u.narrow(1, i, 1); // [d_in, 1]
        h = &h - (&h * 2.0).matmul(&column).matmul(&column.tr());
    }
    let all = Tensor::eye(u.size()[0], OPTIONS).matmul(&h);
    frozen.apply(x, &frozen.weight.matmul(&all), frozen.bias)
}

fn new_hra(weight: &Tensor) -> Hra {
    let config = HraConfig { rank: RANK, gram_schmidt: false, init: HraInit::Auto, allow_odd_rank: false };
    Hra::new(weight, config, 0).unwrap()
}

fn vectors(adapter: &Hra) -> Tensor {
    adapter.parameters().remove(0).1
}

/// Values with the deviation of a layer's weights.
fn random(shape: &[i64]) -> Tensor {
    Tensor::randn(shape, OPTIONS) * 0.02
}

/// Times of two different maps would say nothing.
fn the_dense_chain_is_the_same_map() {
    tch::manual_seed(0);
    let (weight, x, v) = (random(&[96, 64]), random(&[1, 5, 64]), random(&[64, RANK]));
    let frozen = Frozen { weight: &weight, bias: None, geometry: Geometry::Linear };
    let ours = Hra::from_vectors(v.shallow_clone(), false).forward(&frozen, &x);
    let dense = dense_chain(&frozen, &x, &v);
    let error = ((&ours - &dense).norm() / dense.norm()).double_value(&[]);
    assert!(error < 1e-5, "the two forms of HRA differ by {error:.1e}");
}
