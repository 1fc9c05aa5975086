//! The formulas of scores against numbers made elsewhere (numpy, scikit-learn, Pillow, the `lpips` package) and by hand.

use crate::support::base::{pin_threads, root};
use hra::data::image::RgbImage;
use hra::lab::evaluate::lpips::{Lpips, Net};
use hra::lab::evaluate::scores::{
    References, ScoredSubject, average_precision, cosines, cover, drift, mean_of_pairs, pixel_difference,
    top1, without_token,
};
use hra::lab::evaluate::{TowerPaths, Towers, towers};
use hra::lab::results::SCORES;
use hra::platform::observer::Silent;
use hra::platform::random;
use hra::weights::tensor_file;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

fn close(found: f64, expected: f64, tolerance: f64) {
    assert!((found - expected).abs() <= tolerance, "found {found}, expected {expected}");
}

#[test]
fn cosines_are_numpys_and_need_no_unit_rows() {
    let a = Tensor::from_slice2(&[[1.0f32, -2.0, 0.5], [0.25, 4.0, -1.0]]);
    let b = Tensor::from_slice2(&[[2.0f32, 2.0, 2.0], [-1.0, 0.5, 3.0], [10.0, -20.0, 5.0]]);
    let expected = [[-0.12598816, -0.06815982, 1.0], [0.45425676, -0.09452066, -0.87167174]];
    let found = cosines(&a, &b).unwrap();
    assert_eq!((found.len(), found[0].len()), (2, 3));
    for (found, expected) in found.iter().flatten().zip(expected.iter().flatten()) {
        close(*found, *expected, 1e-8);
    }
    let rows = random::seeded(5, |draws| draws.uniform(&[5, 300], -0.3, 0.7));
    (0..5).for_each(|i| close(cosines(&rows, &rows).unwrap()[i][i], 1.0, 1e-14));
    let none = cosines(&Tensor::zeros([1, 3], (Kind::Float, Device::Cpu)), &a).unwrap();
    assert_eq!(none, [[0.0, 0.0]], "nothing is similar to no direction");
}

#[test]
fn pairs_are_counted_once_and_never_with_themselves() {
    let table = [vec![1.0, 0.5, 0.25], vec![9.0, 1.0, 0.75], vec![9.0, 9.0, 1.0]];
    assert_eq!(mean_of_pairs(&table), Some(0.5));
    assert_eq!(mean_of_pairs(&table[..1].iter().map(|row| row[..1].to_vec()).collect::<Vec<_>>()), None);
    assert_eq!(mean_of_pairs(&[]), None);
}

/// The first two by `sklearn.metrics.average_precision_score`, the others by hand.
#[test]
fn rankings_have_the_average_precision_of_scikit_learn() {
    let own = [0.81, 0.42, 0.77, 0.13, 0.66];
    close(average_precision(&own, &[0.80, 0.79, 0.5, 0.41, 0.12, 0.05, 0.7]), 0.6, 1e-15);
    close(average_precision(&[0.31, -0.2, 0.05], &[0.3, 0.9, -0.1, -0.25]), 0.5, 1e-15);
    close(average_precision(&[0.9, 0.5], &[0.7]), (1.0 + 2.0 / 3.0) / 2.0, 1e-15);
    assert_eq!(average_precision(&[0.9, 0.5], &[0.1]), 1.0);
    assert_eq!(average_precision(&[0.1], &[0.9, 0.8, 0.7]), 0.25);
    // A look-alike that is as near goes first; the subject's own pictures do not stand in each other's way.
    assert_eq!(average_precision(&[0.5], &[0.5]), 0.5);
    assert_eq!(average_precision(&[0.5, 0.5], &[0.1]), 1.0);
    assert_eq!(
        [top1(&[0.2, 0.6], &[0.5]), top1(&[0.2, 0.4], &[0.5]), top1(&[0.5], &[0.1, 0.5])],
        [1.0, 0.0, 0.0]
    );
}

#[test]
fn the_rare_token_is_left_out_of_prompts_as_a_word() {
    for (prompt, token, expected) in [
        ("a photo of sks dog", "sks", "a photo of dog"),
        ("a SKS dog and a Sks cat", "sks", "a dog and a cat"),
        ("sks", "sks", ""),
        ("sks dog", "sks", "dog"),
        ("a photo of sks, red", "sks", "a photo of, red"),
        ("a dog (sks) here, sks.", "sks", "a dog () here,."),
        ("desks, sksy, sks_1, sks2", "sks", "desks, sksy, sks_1, sks2"),
        ("sks sks sks dog", "sks", "dog"),
        ("a <new1> dog", "<new1>", "a dog"),
        ("a.b axb a.b.", "a.b", "axb."),
        ("a zwx style dog", "zwx style", "a dog"),
        ("aa aa", "aa aa aa", "aa aa"),
        ("ein GRÜN Hund", "grün", "ein Hund"),
        ("a  dog", "sks", "a  dog"),
        ("a sks  dog", " ", "a sks  dog"),
        ("a sks dog", "", "a sks dog"),
    ] {
        assert_eq!(without_token(prompt, token), expected, "{prompt:?} without {token:?}");
    }
}

/// A row of pixels, each with its own grey, no two alike and none of them grey as covers are.
fn row(n: u32) -> RgbImage {
    RgbImage::from_fn(n, 1, |x, _| [(x * 9 % 128) as u8, 1, 2].into())
}

#[test]
fn masks_cover_by_their_nearest_pixels_as_pillow_finds_them() {
    // Which pixel of a row of n `Image.resize((m, 1), Image.NEAREST)` takes for each of m.
    let nearest: [(u32, &[u32]); 6] = [
        (5, &[0, 2, 4]),
        (3, &[0, 0, 1, 2, 2]),
        (7, &[0, 2, 4, 6]),
        (2, &[0, 0, 0, 0, 1, 1, 1, 1, 1]),
        (9, &[2, 6]),
        (6, &[0, 2, 3, 5]),
    ];
    for (n, taken) in nearest {
        let picture = row(taken.len() as u32);
        for white in 0..n {
            let mask = RgbImage::from_fn(n, 1, |x, _| if x == white { [128; 3] } else { [127; 3] }.into());
            for subject in [true, false] {
                let covered = cover(&picture, &mask, subject);
                for (x, from) in taken.iter().enumerate() {
                    let hidden = (*from == white) == subject;
                    let expected = if hidden { [128; 3].into() } else { *picture.get_pixel(x as u32, 0) };
                    assert_eq!(*covered.get_pixel(x as u32, 0), expected, "{n} to {}, {white}", taken.len());
                }
            }
        }
    }
}

#[test]
fn drift_is_the_mean_absolute_difference() {
    let picture = |values: [u8; 6]| RgbImage::from_raw(2, 1, values.to_vec()).unwrap();
    let (a, b) = (picture([0, 255, 10, 7, 7, 7]), picture([255, 0, 13, 7, 7, 7]));
    assert_eq!(pixel_difference(&a, &b).unwrap(), 513.0 / 6.0);
    assert_eq!(pixel_difference(&a, &a).unwrap(), 0.0);
    let scores = drift(&Towers::default(), &[a.clone(), b.clone()], &[b.clone(), b.clone()]).unwrap();
    assert_eq!(scores[0].iter().map(|(k, v)| (k.as_str(), *v)).collect::<Vec<_>>(), [("drift", 85.5)]);
    assert_eq!(scores[1]["drift"], 0.0);
    assert!(
        drift(&Towers::default(), std::slice::from_ref(&a), &[])
            .unwrap_err()
            .to_string()
            .contains("expected 1 picture")
    );
    let other = pixel_difference(&a, &row(3)).unwrap_err().to_string();
    assert!(other.contains("2x1") && other.contains("3x1"), "{other}");
}

#[test]
fn without_towers_there_is_nothing_to_score_but_masks_are_checked() {
    let (towers, picture) = (Towers::default(), row(4));
    let subject = ScoredSubject::new(&towers, &References::default()).unwrap();
    let (together, each) = subject.score(&towers, Some("a dog"), &[row(3), row(4)], &Silent).unwrap();
    assert!(together.is_empty() && each.len() == 2 && each.iter().all(|scores| scores.is_empty()));
    let masked = |masks: Vec<&RgbImage>| {
        let references = References { real: vec![&picture], masks: Some(masks), ..Default::default() };
        ScoredSubject::new(&towers, &references).map(drop).unwrap_err().to_string()
    };
    assert!(masked(vec![]).contains("expected a mask for each of 1 real pictures, found 0"));
    assert!(masked(vec![&RgbImage::new(4, 1)]).contains("found all black"));
    let white = RgbImage::from_pixel(2, 2, [255; 3].into());
    assert!(masked(vec![&white]).contains("found all white"));
}

// LPIPS with the weights and pictures of tests/fixtures/make_lpips_fixtures.py.

/// 32 bits of which each depends on `k` and `i`.
fn mixed(k: u32, i: u32) -> u32 {
    let mut x = i.wrapping_add(k.wrapping_mul(0x9E37_79B9));
    for factor in [0x7FEB_352Du32, 0x846C_A68B] {
        x ^= x >> 16;
        x = x.wrapping_mul(factor);
    }
    x ^ (x >> 16)
}

/// Channels in, out and kernel of the convolutions, by their numbers in torchvision's `features`.
fn convolutions(net: Net) -> Vec<(usize, [i64; 3])> {
    let wide = |n: &[i64]| n.windows(2).map(|io| [io[0], io[1], 3]).collect::<Vec<_>>();
    let vgg = wide(&[3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]);
    match net {
        Net::Vgg => [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28].into_iter().zip(vgg).collect(),
        Net::Alex => [0, 3, 6, 8, 10]
            .into_iter()
            .zip([[3, 64, 11], [64, 192, 5], [192, 384, 3], [384, 256, 3], [256, 256, 3]])
            .collect(),
    }
}

fn weights(net: Net) -> Vec<(String, Tensor)> {
    let mut tensors: Vec<(String, Tensor)> = Vec::new();
    let mut add = |name: String, shape: &[i64], bound: f64, positive: bool| {
        let k = tensors.len() as u32;
        let number = |i: u32| {
            let value = ((mixed(k, i) >> 8) as f32 / (1 << 23) as f32 - 1.0) * bound as f32;
            if positive { value.abs() } else { value }
        };
        let values: Vec<f32> = (0..shape.iter().product::<i64>() as u32).map(number).collect();
        tensors.push((name, Tensor::from_slice(&values).reshape(shape)));
    };
    for (n, [input, output, kernel]) in convolutions(net) {
        let bound = (6.0 / (input * kernel * kernel) as f64).sqrt();
        add(format!("features.{n}.weight"), &[output, input, kernel, kernel], bound, false);
        add(format!("features.{n}.bias"), &[output], 0.1, false);
    }
    let tapped = match net {
        Net::Vgg => [64, 128, 256, 512, 512],
        Net::Alex => [64, 192, 384, 256, 256],
    };
    for (i, channels) in tapped.into_iter().enumerate() {
        add(format!("lin{i}.model.1.weight"), &[1, channels, 1, 1], 1.0, true);
    }
    tensors
}

fn picture(k: u32, width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| {
        let value = |c: u32| {
            let noise = mixed(1000 + k, (y * width + x) * 3 + c) >> 26;
            ((x * (3 + k) + y * (2 * c + 1) + noise) % 256) as u8
        };
        [value(0), value(1), value(2)].into()
    })
}

fn file(dir: &Path, net: Net) -> PathBuf {
    let path = dir.join(format!("{net:?}.safetensors"));
    tensor_file::write(&path, &weights(net), &[]).unwrap();
    path
}

fn expected() -> serde_json::Value {
    let path = root().join("tests/fixtures/lpips.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn lpips_distances_are_those_of_the_package() {
    pin_threads();
    let dir = tempfile::tempdir().unwrap();
    let expected = expected();
    let numbers = |value: &serde_json::Value| -> Vec<u32> {
        value.as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as u32).collect()
    };
    let list = |key: &str| expected[key].as_array().unwrap().iter().map(numbers).collect::<Vec<_>>();
    let pictures: Vec<RgbImage> = list("pictures").iter().map(|p| picture(p[0], p[1], p[2])).collect();
    let pictures: Vec<&RgbImage> = pictures.iter().collect();
    let pairs: Vec<(usize, usize)> = list("pairs").iter().map(|p| (p[0] as usize, p[1] as usize)).collect();
    for (net, key) in [(Net::Vgg, "vgg"), (Net::Alex, "alex")] {
        let lpips = Lpips::load(&file(dir.path(), net), net, Device::Cpu).unwrap();
        let found = lpips.pairs(&pictures, &pairs, &Silent).unwrap();
        assert_eq!(found.len(), pairs.len());
        for (found, expected) in found.iter().zip(expected[key].as_array().unwrap()) {
            let expected = expected.as_f64().unwrap();
            close(*found, expected, 1e-5 * expected.max(1e-3));
        }
        let table = lpips.distances(&pictures[..2], &pictures[2..4], &Silent).unwrap();
        let single = lpips.pairs(&pictures, &[(0, 2), (0, 3), (1, 2), (1, 3)], &Silent).unwrap();
        assert_eq!(table, single, "rows are of the first, columns of the second");
        assert!(lpips.distances(&pictures, &[], &Silent).unwrap().is_empty());
    }
}

#[test]
fn lpips_scores_are_means_over_real_pictures_and_over_pairs_of_a_prompt() {
    pin_threads();
    let dir = tempfile::tempdir().unwrap();
    let paths = TowerPaths { lpips_alex: Some(file(dir.path(), Net::Alex)), ..Default::default() };
    let loaded = Towers::load(&paths, Device::Cpu, &Silent).unwrap();
    let lpips = &loaded.lpips[0].1;
    let drawn: Vec<RgbImage> = (0..3).map(|k| picture(k, 40, 31)).collect();
    let other = picture(3, 50, 50);
    let subject =
        ScoredSubject::new(&loaded, &References { real: vec![&drawn[0], &other], ..Default::default() })
            .unwrap();
    let (together, each) = subject.score(&loaded, None, &drawn, &Silent).unwrap();
    let distance = |a: &RgbImage, b: &RgbImage| lpips.distances(&[a], &[b], &Silent).unwrap()[0];
    for (scores, picture) in each.iter().zip(&drawn) {
        let mean = (distance(picture, &drawn[0]) + distance(picture, &other)) / 2.0;
        close(scores["lpips_alex"], mean, 1e-12);
    }
    let pairs = [(0, 1), (0, 2), (1, 2)].map(|(a, b)| distance(&drawn[a], &drawn[b]));
    close(together["diversity_alex"], pairs.iter().sum::<f64>() / 3.0, 1e-12);
    let (together, each) = subject.score(&loaded, None, &drawn[..1], &Silent).unwrap();
    assert!(together.is_empty(), "one picture has no diversity");
    assert!(each[0]["lpips_alex"] > 0.0, "the other real picture counts too");
    let known = |key: &String| SCORES.iter().any(|score| score.key == key);
    assert!(each[0].keys().all(known));

    let identity = towers::identity(&paths, &Silent).unwrap();
    assert!(identity.starts_with("lpips_alex "), "{identity}");
    let changed = weights(Net::Alex);
    let _ = changed[3].1.get(0).fill_(0.5);
    tensor_file::write(&dir.path().join("Alex.safetensors"), &changed, &[]).unwrap();
    assert_ne!(towers::identity(&paths, &Silent).unwrap(), identity, "other weights are another tower");
}

#[test]
fn damaged_or_missing_lpips_weights_are_told_with_what_makes_them() {
    let dir = tempfile::tempdir().unwrap();
    let alex = file(dir.path(), Net::Alex);
    let failure = |path: &Path, net| Lpips::load(path, net, Device::Cpu).map(drop).unwrap_err().to_string();
    let missing = failure(&dir.path().join("none"), Net::Vgg);
    assert!(missing.contains("tools/lpips_to_safetensors.py vgg lpips-vgg.safetensors"), "{missing}");
    let other = failure(&alex, Net::Vgg);
    assert!(
        other.contains("`features.0.weight`: expected shape [64, 3, 3, 3]") && other.contains("more"),
        "{other}"
    );
    let mut broken = weights(Net::Alex);
    let _ = broken[0].1.fill_(f64::NAN);
    tensor_file::write(&alex, &broken, &[]).unwrap();
    let nan = failure(&alex, Net::Alex);
    assert!(nan.contains("`features.0.weight`: holds numbers that are not finite"), "{nan}");
    // Each is finite, and what comes of them is not.
    let _ = broken[0].1.fill_(3e38);
    tensor_file::write(&alex, &broken, &[]).unwrap();
    let lpips = Lpips::load(&alex, Net::Alex, Device::Cpu).unwrap();
    let small = lpips.distances(&[&row(40)], &[&row(40)], &Silent).unwrap_err().to_string();
    assert!(small.contains("at least 31 pixels") && small.contains("40x1"), "{small}");
    let nan =
        lpips.distances(&[&picture(0, 40, 40)], &[&picture(1, 40, 40)], &Silent).unwrap_err().to_string();
    assert!(nan.contains("its weights are damaged"), "{nan}");
}

#[test]
fn a_tower_that_is_not_there_is_told_with_its_flag_and_what_to_fetch() {
    for (paths, words) in [
        (
            TowerPaths { clip: Some("/no/clip".into()), ..Default::default() },
            ["--clip", "openai/clip-vit-large-patch14"],
        ),
        (
            TowerPaths { dino: Some("/no/dino".into()), ..Default::default() },
            ["--dino", "facebook/dino-vits16"],
        ),
        (
            TowerPaths { dinov2: Some("nothing".into()), ..Default::default() },
            ["--dinov2", "facebook/dinov2-base"],
        ),
    ] {
        let failure = Towers::load(&paths, Device::Cpu, &Silent).map(drop).unwrap_err().to_string();
        assert!(words.iter().all(|word| failure.contains(word)), "{failure}");
        assert_eq!(towers::identity(&paths, &Silent).unwrap_err().to_string(), failure);
    }
    assert_eq!(towers::identity(&TowerPaths::default(), &Silent).unwrap(), "");
    assert!(Towers::load(&TowerPaths::default(), Device::Cpu, &Silent).unwrap().is_empty());
}
