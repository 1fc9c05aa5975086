//! LPIPS, version 0.1: "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (Zhang et al. 2018,
//! arXiv 1801.03924, eq. 1), as the `lpips` package computes it, on VGG-16 or AlexNet of torchvision.
//!
//! The features of five layers are divided by their length over the channels; the squares of their differences are weighted
//! by channel with the `lin` layers, averaged over the picture, and summed over the layers.
//!
//! Two pictures are compared at the size of the first. The other one is brought to it as training brings photographs to its
//! resolution: resized (bilinear, as Pillow) until it covers the first, and its middle cut out. Nothing is stretched.
//!
//! On CUDA the convolutions round their inputs to TF32, as PyTorch's do; on the CPU all is f32.

use crate::data::image::resize::center_offset;
use crate::data::image::{Filter, RgbImage, resize, tensor};
use crate::error::{Error, Result};
use crate::platform::files;
use crate::platform::files::Kind as FileKind;
use crate::platform::host;
use crate::platform::observer::Observer;
use crate::weights::tensor_file::TensorFile;
use ::image::imageops;
use std::borrow::Cow;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// Features of pictures that are held at once, in bytes; two pictures at least.
const MAX_BYTES: u64 = 1 << 30;
/// Input is -1 to 1; the package's ScalingLayer takes it to what torchvision's networks were trained on.
const SHIFT: [f32; 3] = [-0.030, -0.088, -0.188];
const SCALE: [f32; 3] = [0.458, 0.448, 0.450];
/// Keeps the length of features from being 0.
const EPS: f64 = 1e-10;

/// Which network LPIPS looks through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Net {
    /// VGG-16.
    Vgg,
    /// AlexNet.
    Alex,
}

/// A convolution of torchvision's `features`, followed by a ReLU.
struct LpipsLayer {
    /// Its number there.
    number: usize,
    channels: i64,
    kernel: i64,
    stride: i64,
    padding: i64,
    /// Max pooling comes before it.
    pooled: bool,
    /// Its output is one of the five.
    tapped: bool,
}

impl Net {
    /// Its key among the scores.
    pub fn key(self) -> &'static str {
        ["lpips_vgg", "lpips_alex"][self as usize]
    }

    /// The key of the mean distance between the pictures of one prompt.
    pub fn diversity_key(self) -> &'static str {
        ["diversity_vgg", "diversity_alex"][self as usize]
    }

    fn name(self) -> &'static str {
        ["vgg", "alex"][self as usize]
    }

    fn steps(self) -> Vec<LpipsLayer> {
        let step = |(number, channels, kernel, pooled, tapped)| {
            let (stride, padding) = if kernel == 11 { (4, 2) } else { (1, kernel / 2) };
            LpipsLayer { number, channels, kernel, stride, padding, pooled, tapped }
        };
        const VGG: [(usize, i64, i64, bool, bool); 13] = [
            (0, 64, 3, false, false),
            (2, 64, 3, false, true),
            (5, 128, 3, true, false),
            (7, 128, 3, false, true),
            (10, 256, 3, true, false),
            (12, 256, 3, false, false),
            (14, 256, 3, false, true),
            (17, 512, 3, true, false),
            (19, 512, 3, false, false),
            (21, 512, 3, false, true),
            (24, 512, 3, true, false),
            (26, 512, 3, false, false),
            (28, 512, 3, false, true),
        ];
        const ALEX: [(usize, i64, i64, bool, bool); 5] = [
            (0, 64, 11, false, true),
            (3, 192, 5, true, true),
            (6, 384, 3, true, true),
            (8, 256, 3, false, true),
            (10, 256, 3, false, true),
        ];
        match self {
            Self::Vgg => VGG.map(step).into(),
            Self::Alex => ALEX.map(step).into(),
        }
    }

    /// Kernel of its max pooling, whose stride is 2.
    fn pool(self) -> i64 {
        [2, 3][self as usize]
    }

    /// The shortest side of pictures of which every layer leaves something.
    fn least(self) -> u32 {
        [16, 31][self as usize]
    }
}

/// Learned Perceptual Image Patch Similarity, version 0.1.
pub struct Lpips {
    net: Net,
    /// Weight and bias of each step.
    steps: Vec<(LpipsLayer, Tensor, Tensor)>,
    /// `(1, c, 1, 1)` of each tapped step.
    lins: Vec<Tensor>,
    device: Device,
}

/// What the network sees in one picture: `(1, c, h, w)` of each tapped step, of length 1 over the channels.
type Features = Vec<Tensor>;

/// A pair of [`Lpips::pairs`], and where the features of its two pictures are among all.
struct Placed {
    pair: usize,
    places: [usize; 2],
}

impl Lpips {
    /// Loads weights converted to safetensors: torchvision's `features.*` and lpips' `lin*.model.1.weight` in one file.
    pub fn load(file: &Path, net: Net, device: Device) -> Result<Self> {
        let hint = format!(
            "`python tools/lpips_to_safetensors.py {0} lpips-{0}.safetensors` makes one of torchvision's and \
             lpips' weights",
            net.name()
        );
        if files::kind(file) != Some(FileKind::File) {
            let found = if file.exists() { "a folder" } else { "nothing" };
            let what = format!("expected a file with the weights of LPIPS ({}), found {found}", net.name());
            return Err(Error::format(file, what).with_hint(hint));
        }
        let weights = TensorFile::open(file)?;
        let mut problems = Vec::new();
        let mut read = |name: String, shape: &[i64]| -> Result<Tensor> {
            match weights.shape(&name) {
                Some(found) if found == shape => {
                    let tensor = weights.read_as(&name, Kind::Float)?;
                    if host::all_finite(&tensor) {
                        return host::try_to_device(&tensor, device);
                    }
                    problems.push(format!("`{name}`: holds numbers that are not finite"));
                }
                Some(found) => problems.push(format!("`{name}`: expected shape {shape:?}, found {found:?}")),
                None => problems.push(format!("`{name}` {shape:?} is missing")),
            }
            Ok(host::zeros(&[1], Kind::Float))
        };
        let (mut steps, mut lins, mut channels) = (Vec::new(), Vec::new(), 3);
        for step in net.steps() {
            let n = step.number;
            let shape = [step.channels, channels, step.kernel, step.kernel];
            let weight = read(format!("features.{n}.weight"), &shape)?;
            let bias = read(format!("features.{n}.bias"), &shape[..1])?;
            channels = step.channels;
            if step.tapped {
                lins.push(read(format!("lin{}.model.1.weight", lins.len()), &[1, channels, 1, 1])?);
            }
            steps.push((step, weight, bias));
        }
        if let Some(first) = problems.first() {
            let more = match problems.len() - 1 {
                0 => String::new(),
                n => format!(", and {n} more"),
            };
            let what = format!("expected the weights of LPIPS ({}): {first}{more}", net.name());
            return Err(Error::format(file, what).with_hint(hint));
        }
        Ok(Self { net, steps, lins, device })
    }

    /// Distances of every picture of `a` to every picture of `b`, row by row: `a.len() * b.len()` values.
    pub fn distances(&self, a: &[&RgbImage], b: &[&RgbImage], observer: &dyn Observer) -> Result<Vec<f64>> {
        let pictures: Vec<&RgbImage> = a.iter().chain(b).copied().collect();
        let pairs = (0..a.len()).flat_map(|i| (0..b.len()).map(move |j| (i, a.len() + j)));
        self.pairs(&pictures, &pairs.collect::<Vec<_>>(), observer)
    }

    /// Distances of pairs of pictures, at the size of the first of a pair.
    ///
    /// Each picture goes through the network once where the features of all fit into [`MAX_BYTES`].
    pub fn pairs(
        &self,
        pictures: &[&RgbImage],
        pairs: &[(usize, usize)],
        observer: &dyn Observer,
    ) -> Result<Vec<f64>> {
        let most = pairs.iter().map(|(a, _)| self.bytes(pictures[*a].dimensions())).max().unwrap_or(0);
        // Two blocks are held at a time.
        self.pairs_in_blocks(pictures, pairs, (MAX_BYTES / most.max(1) / 2).max(1) as usize, observer)
    }

    fn pairs_in_blocks(
        &self,
        pictures: &[&RgbImage],
        pairs: &[(usize, usize)],
        block: usize,
        observer: &dyn Observer,
    ) -> Result<Vec<f64>> {
        let _guard = tch::no_grad_guard();
        let sided = |&(a, b): &(usize, usize)| {
            let size = pictures[a].dimensions();
            [(size, a), (size, b)]
        };
        let items: Vec<((u32, u32), usize)> =
            pairs.iter().flat_map(sided).collect::<BTreeSet<_>>().into_iter().collect();
        // Pairs by the blocks that their pictures are in.
        let mut work: BTreeMap<(usize, usize), Vec<Placed>> = BTreeMap::new();
        for (pair, sides) in pairs.iter().enumerate() {
            let places = sided(sides).map(|item| items.partition_point(|other| *other < item));
            let blocks = places.map(|place| place / block);
            work.entry((blocks[0].min(blocks[1]), blocks[0].max(blocks[1])))
                .or_default()
                .push(Placed { pair, places });
        }
        let mut distances = vec![0.0; pairs.len()];
        let mut held: BTreeMap<usize, Vec<Features>> = BTreeMap::new();
        for ((low, high), wanted) in work {
            held.retain(|number, _| *number == low || *number == high);
            for number in [low, high] {
                if let Entry::Vacant(free) = held.entry(number) {
                    let chunk = items.iter().skip(number * block).take(block);
                    let features = chunk.map(|(size, i)| self.features(&fit(pictures[*i], *size)));
                    free.insert(features.collect::<Result<_>>()?);
                }
            }
            observer.check(|| "stopped while comparing pictures".to_string())?;
            for Placed { pair, places } in wanted {
                let [a, b] = places.map(|place| &held[&(place / block)][place % block]);
                distances[pair] = self.distance(a, b)?;
            }
        }
        Ok(distances)
    }

    /// Bytes of the features of a picture.
    fn bytes(&self, (width, height): (u32, u32)) -> u64 {
        // The first layers have nearly all: AlexNet's shrinks by 4, VGG's next ones have 1/2, 1/4 .. of the one before.
        let shrink = if self.net == Net::Alex { 8 } else { 1 };
        u64::from(width) * u64::from(height) * 64 * 4 * 2 / shrink
    }

    fn features(&self, picture: &RgbImage) -> Result<Features> {
        let (width, height) = picture.dimensions();
        if width.min(height) < self.net.least() {
            return Err(Error::data(format!(
                "LPIPS ({}): expected pictures of at least {} pixels on each side, found {width}x{height}",
                self.net.name(),
                self.net.least()
            )));
        }
        let constant =
            |values: [f32; 3]| host::to_device(&host::tensor(&values).view([1, 3, 1, 1]), self.device);
        let pixels = host::try_to_device(&tensor::signed(picture), self.device)?;
        let mut x = (pixels - constant(SHIFT)) / constant(SCALE);
        let mut features = Vec::new();
        for (step, weight, bias) in &self.steps {
            if step.pooled {
                let pool = self.net.pool();
                x = x.f_max_pool2d([pool; 2], [2, 2], [0, 0], [1, 1], false)?;
            }
            let (stride, padding) = ([step.stride; 2], [step.padding; 2]);
            x = x.f_conv2d(weight, Some(bias), stride, padding, [1, 1], 1)?.f_relu()?;
            if step.tapped {
                let length =
                    x.f_square()?.f_sum_dim_intlist([1i64].as_slice(), true, Kind::Float)?.f_sqrt()?;
                features.push(x.f_div(&length.f_add_scalar(EPS)?)?);
            }
        }
        Ok(features)
    }

    fn distance(&self, a: &Features, b: &Features) -> Result<f64> {
        let mut sum = 0.0;
        for ((a, b), lin) in a.iter().zip(b).zip(&self.lins) {
            let (_, _, height, width) = a.size4()?;
            let weighted = a.f_sub(b)?.f_square()?.f_mul(lin)?;
            sum += host::number(&weighted.f_sum(Kind::Double)?) / (height * width) as f64;
        }
        if sum.is_finite() {
            return Ok(sum);
        }
        Err(Error::not_finite(format!(
            "LPIPS ({}): expected a finite distance, found {sum}",
            self.net.name()
        ))
        .with_hint("its weights are damaged"))
    }
}

/// The middle of `picture`, resized so far that it covers `size`.
fn fit(picture: &RgbImage, size: (u32, u32)) -> Cow<'_, RgbImage> {
    if picture.dimensions() == size {
        return Cow::Borrowed(picture);
    }
    let [width, height, from_width, from_height] =
        [size.0, size.1, picture.width(), picture.height()].map(u64::from);
    let (wide, high) = if width * from_height >= height * from_width {
        (width, width * from_height / from_width)
    } else {
        (height * from_width / from_height, height)
    };
    let resized = resize(picture, wide as u32, high as u32, Filter::Bilinear);
    let (x, y) = (center_offset(wide as u32, size.0), center_offset(high as u32, size.1));
    Cow::Owned(imageops::crop_imm(&resized, x, y, size.0, size.1).to_image())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::observer::Silent;

    /// From outside, blocks show only with hundreds of large pictures.
    #[test]
    fn distances_do_not_depend_on_how_many_features_are_held() {
        const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);
        tch::manual_seed(3);
        let (mut steps, mut lins, mut channels) = (Vec::new(), Vec::new(), 3);
        for step in Net::Alex.steps() {
            let shape = [step.channels, channels, step.kernel, step.kernel];
            let weight = Tensor::randn(shape, FLOAT) / ((shape[1] * shape[2] * shape[3]) as f64).sqrt();
            channels = step.channels;
            lins.push(Tensor::rand([1, channels, 1, 1], FLOAT));
            steps.push((step, weight, Tensor::zeros([channels], FLOAT)));
        }
        let lpips = Lpips { net: Net::Alex, steps, lins, device: Device::Cpu };
        let picture = |k: u32| {
            let size = if k == 3 { (50, 33) } else { (32, 36) };
            RgbImage::from_fn(size.0, size.1, |x, y| {
                [0, 1, 2].map(|c| ((x * x + y * k * (c + 1) * 5) % 256) as u8).into()
            })
        };
        let pictures: Vec<RgbImage> = (0..5).map(picture).collect();
        let pictures: Vec<&RgbImage> = pictures.iter().collect();
        let pairs: Vec<(usize, usize)> = (0..5).flat_map(|a| (0..5).map(move |b| (a, b))).collect();
        let all = lpips.pairs(&pictures, &pairs, &Silent).unwrap();
        for block in [1, 2, 3, 7] {
            assert_eq!(lpips.pairs_in_blocks(&pictures, &pairs, block, &Silent).unwrap(), all, "{block}");
        }
        (0..5).for_each(|i| assert_eq!(all[i * 6], 0.0));
        assert!(
            all[1] > 0.0 && all[1] == all[5] && all[3] != all[15],
            "a pair has the size of its first picture"
        );
        assert!(lpips.pairs(&[], &[], &Silent).unwrap().is_empty());
    }
}
