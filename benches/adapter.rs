//! Forward and backward of one square linear layer: without adapter, with each method, and with HRA as PEFT computes it.
//! One thread, f32, on the CPU.
//!
//! ```text
//! cargo bench --bench adapter
//! ```
//!
//! Times of two runs are not comparable, ratios within one run are: the cases of one layer follow each other. Every case
//! computes the gradient of the layer's input too, as all layers but the first few of a network must.

use divan::Bencher;
use hra::adapter::blocks::{Cayley, Partition};
use hra::adapter::methods::boft::BoftConfig;
use hra::adapter::methods::dora::DoraConfig;
use hra::adapter::methods::hra::{Hra, HraConfig, HraInit};
use hra::adapter::methods::lora::LoraConfig;
use hra::adapter::methods::oft::{Coft, OftConfig};
use hra::adapter::{Adapter, Frozen, Geometry, Method};
use std::fmt;
use tch::{Device, Kind, Tensor};

const OPTIONS: (Kind, Device) = (Kind::Float, Device::Cpu);
const RANK: i64 = 8;
/// Of OFT and BOFT, as in the papers' image experiments.
const BLOCKS: i64 = 4;

fn main() {
    tch::set_num_threads(1);
    the_dense_chain_is_the_same_map();
    divan::main();
}

/// How the layer is adapted.
#[derive(Clone, Copy)]
enum How {
    Frozen,
    Lora(i64),
    Hra,
    DenseHra,
    Dora,
    Oft,
    Boft,
}

impl How {
    /// The method, where the layer has one of ours.
    fn method(self) -> Option<Method> {
        let lora = |rank| LoraConfig::new(rank, rank as f64);
        let partition = Partition::Blocks(BLOCKS);
        match self {
            Self::Frozen | Self::DenseHra => None,
            Self::Lora(rank) => Some(Method::new(lora(rank))),
            Self::Dora => Some(Method::new(DoraConfig(lora(RANK)))),
            Self::Hra => Some(Method::new(hra_config())),
            Self::Oft => Some(Method::new(OftConfig {
                partition,
                cayley: Cayley::Exact,
                coft: Coft::None,
                block_share: false,
            })),
            Self::Boft => Some(Method::new(BoftConfig { partition, factors: 1 })),
        }
    }
}

/// The layer's input and adapter.
#[derive(Clone, Copy)]
struct Case {
    tokens: i64,
    how: How,
}

/// divan sorts by these names, so they begin with what the table is to be sorted by.
impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} tokens, ", self.tokens)?;
        match self.how {
            How::Frozen => write!(f, "1 frozen"),
            How::Lora(rank) => write!(f, "2 LoRA r {rank}"),
            How::Hra => write!(f, "3 HRA r {RANK}"),
            How::DenseHra => write!(f, "4 HRA r {RANK} as in PEFT"),
            How::Dora => write!(f, "5 DoRA r {RANK}"),
            How::Oft => write!(f, "6 OFT {BLOCKS} blocks"),
            How::Boft => write!(f, "7 BOFT {BLOCKS} blocks"),
        }
    }
}

fn cases() -> Vec<Case> {
    let all =
        [How::Frozen, How::Lora(4), How::Lora(8), How::Hra, How::DenseHra, How::Dora, How::Oft, How::Boft];
    [77, 512, 2048].into_iter().flat_map(|tokens| all.map(|how| Case { tokens, how })).collect()
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
    let (forward, trained): (Forward, Vec<Tensor>) = match case.how.method() {
        Some(method) => {
            let mut adapter = method.start(&weight, 0).unwrap();
            adapter.replace_parameters(&mut |t| t.detach().set_requires_grad(true));
            let trained = adapter.parameters().into_iter().map(|(_, t)| t).collect();
            (Box::new(move |frozen, x| adapter.forward(frozen, x)), trained)
        }
        None if matches!(case.how, How::DenseHra) => {
            let v = vectors(&new_hra(&weight)).set_requires_grad(true);
            let trained = vec![v.shallow_clone()];
            (Box::new(move |frozen, x| dense_chain(frozen, x, &v)), trained)
        }
        None => (Box::new(|frozen, x| frozen.forward(x)), Vec::new()),
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

fn hra_config() -> HraConfig {
    HraConfig { rank: RANK, gram_schmidt: false, init: HraInit::Auto, allow_odd_rank: false, lambda: 0.0 }
}

fn new_hra(weight: &Tensor) -> Hra {
    Hra::new(weight, hra_config(), 0).unwrap()
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
