//! The number of values that each method trains in Stable Diffusion 1.5, by the shapes of its weights alone.

use hra::adapter::Method;
use hra::adapter::blocks::{Cayley, Partition};
use hra::adapter::methods::boft::BoftConfig;
use hra::adapter::methods::dora::DoraConfig;
use hra::adapter::methods::full::FullConfig;
use hra::adapter::methods::hra::{HraConfig, HraInit};
use hra::adapter::methods::lora::LoraConfig;
use hra::adapter::methods::oft::{Coft, OftConfig};

/// Weights, biases and norms of Stable Diffusion 1.5's UNet.
#[derive(Default)]
struct Shapes {
    weights: Vec<(&'static str, Vec<i64>)>,
    others: i64,
}

impl Shapes {
    fn layer(&mut self, name: &'static str, shape: &[i64], bias: bool) {
        self.weights.push((name, shape.to_vec()));
        self.others += if bias { shape[0] } else { 0 };
    }

    fn resnet(&mut self, c_in: i64, c_out: i64) {
        self.others += 2 * c_in + 2 * c_out; // two norms
        self.layer("conv", &[c_out, c_in, 3, 3], true);
        self.layer("time", &[c_out, 1280], true);
        self.layer("conv", &[c_out, c_out, 3, 3], true);
        if c_in != c_out {
            self.layer("shortcut", &[c_out, c_in, 1, 1], true);
        }
    }

    fn transformer(&mut self, c: i64) {
        self.others += 4 * 2 * c; // a norm before, three inside
        self.layer("proj", &[c, c, 1, 1], true);
        for context in [c, 768] {
            self.layer("attention", &[c, c], false);
            self.layer("attention", &[c, context], false);
            self.layer("attention", &[c, context], false);
            self.layer("attention", &[c, c], true);
        }
        self.layer("geglu", &[8 * c, c], true);
        self.layer("feed forward", &[c, 4 * c], true);
        self.layer("proj", &[c, c, 1, 1], true);
    }

    fn stable_diffusion_1_5() -> Self {
        let mut unet = Self::default();
        let widths = [320, 640, 1280, 1280];
        unet.layer("conv", &[320, 4, 3, 3], true);
        unet.layer("time", &[1280, 320], true);
        unet.layer("time", &[1280, 1280], true);
        let mut skips = vec![320];
        for (i, width) in widths.into_iter().enumerate() {
            for _ in 0..2 {
                let before = if skips.len() % 3 == 1 { skips[skips.len() - 1] } else { width };
                unet.resnet(before, width);
                skips.push(width);
                if i < 3 {
                    unet.transformer(width);
                }
            }
            if i < 3 {
                unet.layer("conv", &[width, width, 3, 3], true);
                skips.push(width);
            }
        }
        unet.resnet(1280, 1280);
        unet.transformer(1280);
        unet.resnet(1280, 1280);
        let mut before = 1280;
        for (i, width) in widths.into_iter().rev().enumerate() {
            for _ in 0..3 {
                unet.resnet(before + skips.pop().unwrap(), width);
                before = width;
                if i > 0 {
                    unet.transformer(width);
                }
            }
            if i < 3 {
                unet.layer("conv", &[width, width, 3, 3], true);
            }
        }
        unet.others += 2 * 320;
        unet.layer("conv", &[4, 320, 3, 3], true);
        unet
    }

    fn sum(&self, names: &[&str], method: &Method) -> usize {
        let chosen = self.weights.iter().filter(|(name, _)| names.contains(name));
        chosen.map(|(_, shape)| method.parameters_for(shape).unwrap()).sum()
    }
}

#[test]
fn the_papers_parameter_counts_for_stable_diffusion_1_5() {
    let unet = Shapes::stable_diffusion_1_5();
    let attention = ["attention"];
    let with_geglu = ["attention", "geglu"];
    assert_eq!(unet.weights.iter().filter(|(name, _)| attention.contains(name)).count(), 128);
    assert_eq!(unet.weights.iter().filter(|(name, _)| with_geglu.contains(name)).count(), 144);

    let everything: usize =
        unet.weights.iter().map(|(_, s)| Method::new(FullConfig).parameters_for(s).unwrap()).sum();
    assert_eq!(everything + unet.others as usize, 859_520_964);

    let hra = |rank| {
        Method::new(HraConfig {
            rank,
            gram_schmidt: false,
            init: HraInit::Auto,
            allow_odd_rank: true,
            lambda: 0.0,
        })
    };
    assert_eq!(unet.sum(&attention, &hra(7)), 696_192); // the paper's 0.69 M
    assert_eq!(unet.sum(&attention, &hra(8)), 795_648);
    assert_eq!(unet.sum(&with_geglu, &hra(8)), 895_488); // 0.89 M

    let config = LoraConfig { rank: 4, alpha: 4.0, rslora: false, ..LoraConfig::new(1, 1.0) };
    assert_eq!(unet.sum(&attention, &Method::new(config.clone())), 797_184); // 0.80 M
    assert_eq!(unet.sum(&with_geglu, &Method::new(config.clone())), 1_246_464); // 1.25 M
    let outputs: i64 = unet.weights.iter().filter(|(name, _)| *name == "attention").map(|(_, s)| s[0]).sum();
    let dora = Method::new(DoraConfig(config.clone()));
    assert_eq!(unet.sum(&attention, &dora), 797_184 + outputs as usize);

    let partition = Partition::Blocks(4);
    let oft = OftConfig { partition, cayley: Cayley::Exact, coft: Coft::None, block_share: false };
    assert_eq!(unet.sum(&attention, &Method::new(oft)), 11_602_368);
    // The paper counts the raw blocks, as BOFT stores them: 23.30 M, 26.40 M.
    let boft = Method::new(BoftConfig { partition, factors: 1 });
    let raw = |names: &[&str]| {
        let outputs: i64 =
            unet.weights.iter().filter(|(name, _)| names.contains(name)).map(|(_, s)| s[0]).sum();
        unet.sum(names, &boft) - outputs as usize
    };
    assert_eq!((raw(&attention) as f64 / 1e4).round() / 100.0, 23.30);
    assert_eq!((raw(&with_geglu) as f64 / 1e4).round() / 100.0, 26.40);
}
