//! `hra sample --image` and `--mask` through the real binary: how much changes, what stays, what is told and refused. The
//! numbers are compared with Python's in tests/python/test_img2img.py.

use crate::support::base::root;
use crate::support::error::relative_error;
use crate::support::finished::Finished;
use crate::support::scratch::Scratch;
use crate::support::training::tiny_sd;
use hra::convert::single_file::{Replaced, write_checkpoint};
use hra::data::image::png::{read_png_text, save_png};
use hra::data::image::{Filter, RgbImage, load_rgb, resize};
use hra::platform::random;
use hra::weights::source::Source;
use hra::weights::tensor_file::{self, TensorFile};
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// A photograph of this size, as `image.png` of the scratch folder.
fn photograph(scratch: &Scratch, width: u32, height: u32) -> RgbImage {
    let image = load_rgb(&root().join("assets/subjects/cat/train/00.png")).unwrap();
    let image = resize(&image, width, height, Filter::Bicubic);
    save_png(&scratch.path("image.png"), &image, &[]).unwrap();
    image
}

fn run(scratch: &Scratch, model: &Path, out: &str, more: &[&str]) -> Finished {
    let model = model.to_str().unwrap();
    let mut args = vec!["sample", "--model", model, "--prompt", "a red apple", "--output", out];
    args.extend(["--guidance", "4"]);
    for default in [["--scheduler", "euler-a"], ["--steps", "10"]] {
        if !more.contains(&default[0]) {
            args.extend(default);
        }
    }
    args.extend(more);
    scratch.run(&args)
}

/// The first picture of a run that must succeed.
fn draw(scratch: &Scratch, model: &Path, out: &str, more: &[&str]) -> RgbImage {
    let done = run(scratch, model, out, more);
    assert_eq!(done.code, 0, "{}", done.err);
    load_rgb(&scratch.path(out).join("0000-0000.png")).unwrap()
}

fn latents(path: &Path) -> Tensor {
    TensorFile::open(path).unwrap().read("latents").unwrap()
}

/// Mean difference of two pictures' levels.
fn distance(a: &RgbImage, b: &RgbImage) -> f64 {
    assert_eq!(a.dimensions(), b.dimensions());
    let sum: f64 = a.iter().zip(b.iter()).map(|(x, y)| f64::from(x.abs_diff(*y))).sum();
    sum / a.len() as f64
}

/// A mask of this size, white where `white` says so.
fn mask(path: &Path, width: u32, height: u32, white: impl Fn(u32, u32) -> bool) {
    let pixels = RgbImage::from_fn(width, height, |x, y| [if white(x, y) { 255 } else { 0 }; 3].into());
    save_png(path, &pixels, &[]).unwrap();
}

/// A small reference case's folder with a UNet of 9 input channels; the five new ones have no weight.
fn inpainting_model(scratch: &Scratch) -> PathBuf {
    let from = root().join("tests/fixtures/cases/sd15/pipeline");
    let to = scratch.path("nine");
    for part in ["", "unet", "vae", "text_encoder", "tokenizer", "scheduler"] {
        std::fs::create_dir_all(to.join(part)).unwrap();
        for entry in std::fs::read_dir(from.join(part)).unwrap().map(|e| e.unwrap().path()) {
            if entry.is_file() {
                std::fs::copy(&entry, to.join(part).join(entry.file_name().unwrap())).unwrap();
            }
        }
    }
    let config = to.join("unet/config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    let mut values: serde_json::Value = serde_json::from_str(&text).unwrap();
    values["in_channels"] = 9.into();
    std::fs::write(&config, values.to_string()).unwrap();
    let weights = to.join("unet/diffusion_pytorch_model.safetensors");
    let file = TensorFile::open(&weights).unwrap();
    let tensors: Vec<(String, Tensor)> = file
        .names()
        .into_iter()
        .map(|name| {
            let tensor = file.read(&name).unwrap();
            let tensor = if name == "conv_in.weight" {
                let zeros = Tensor::zeros([tensor.size()[0], 5, 3, 3], (tensor.kind(), Device::Cpu));
                Tensor::cat(&[tensor, zeros], 1)
            } else {
                tensor
            };
            (name, tensor)
        })
        .collect();
    drop(file);
    std::fs::remove_file(&weights).unwrap();
    tensor_file::write(&weights, &tensors, &[]).unwrap();
    to
}

#[test]
fn strength_says_how_far_a_drawing_goes_from_its_picture() {
    let scratch = Scratch::new();
    let picture = photograph(&scratch, 64, 64);
    let from = |out: &str, more: &[&str]| {
        draw(&scratch, &tiny_sd(), out, &[&["--image", "image.png"], more].concat())
    };
    let strengths = ["0.1", "0.5", "1"];
    let drawn = strengths.map(|s| from(s, &["--strength", s]));
    let distances = drawn.each_ref().map(|image| distance(image, &picture));
    assert!(distances[0] * 1.3 < distances[1] && distances[1] * 1.1 < distances[2], "{distances:?}");
    // Even at full strength the noise leaves a trace of the picture, and the seed's first numbers go to its latents.
    let from_text = draw(&scratch, &tiny_sd(), "text", &[]);
    assert!(distance(&drawn[2], &from_text) > 1e-3);
    // The default is 0.8, and the settings are in the file.
    assert_eq!(from("default", &[]), from("0.8", &["--strength", "0.8"]));
    let text = read_png_text(&scratch.path("default/0000-0000.png")).unwrap();
    let get = |key: &str| text.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str());
    assert_eq!((get("image"), get("strength"), get("mask")), (Some("image.png"), Some("0.8"), None));
    assert!(get("parameters").unwrap().ends_with(", Denoising strength: 0.8"));
}

#[test]
fn a_mask_keeps_the_pixels_where_it_is_black_whatever_the_batch() {
    let scratch = Scratch::new();
    let (width, height) = (64, 56);
    let picture = photograph(&scratch, width, height);
    // Its border is no latent's: the pixels of one latent are on both sides.
    let white = |x: u32, y: u32| x > width / 2 + 1 && y > 5;
    mask(&scratch.path("mask.png"), width, height, white);
    let words = ["--image", "image.png", "--mask", "mask.png", "--seed", "5"];
    let many = |out: &str, batch: &str| {
        let more = ["--num-images", "3", "--batch-size", batch, "--json"];
        let done = run(&scratch, &tiny_sd(), out, &[&words[..], &more].concat());
        assert_eq!(done.code, 0, "{}", done.err);
        let json: serde_json::Value = serde_json::from_str(&done.out).unwrap();
        assert_eq!((&json["start"]["mask"], &json["start"]["strength"]), (&"mask.png".into(), &1.0.into()));
    };
    many("together", "3");
    many("apart", "1");
    for i in 0..3 {
        let name = format!("0000-000{i}.png");
        let together = load_rgb(&scratch.path("together").join(&name)).unwrap();
        let apart = load_rgb(&scratch.path("apart").join(&name)).unwrap();
        let largest = together.iter().zip(apart.iter()).map(|(a, b)| a.abs_diff(*b)).max();
        assert!(largest.unwrap() <= 1, "{largest:?}");
        let mut changed = 0;
        for (x, y, pixel) in together.enumerate_pixels() {
            if white(x, y) {
                changed += usize::from(pixel != picture.get_pixel(x, y));
            } else {
                assert_eq!(pixel, picture.get_pixel(x, y), "{x} {y}");
            }
        }
        assert!(changed as f64 > 0.9 * f64::from(width / 2 - 2) * f64::from(height - 6), "{changed}");
    }
    let text = read_png_text(&scratch.path("apart/0000-0002.png")).unwrap();
    assert!(
        text.contains(&("mask".into(), "mask.png".into())) && text.contains(&("seed".into(), "7".into()))
    );
}

#[test]
fn sizes_come_from_the_picture_and_flags_stretch_it() {
    let scratch = Scratch::new();
    let image = photograph(&scratch, 43, 38);
    mask(&scratch.path("mask.png"), 11, 7, |x, _| x > 5);
    let words = ["--image", "image.png", "--mask", "mask.png", "--steps", "2"];
    assert_eq!(draw(&scratch, &tiny_sd(), "own", &words).dimensions(), (40, 36));
    let wide = draw(&scratch, &tiny_sd(), "wide", &[&words[..], &["--width", "64"]].concat());
    assert_eq!(wide.dimensions(), (64, 36));
    let stretched = resize(&image, 64, 36, Filter::Lanczos);
    for y in 0..36 {
        assert_eq!(wide.get_pixel(3, y), stretched.get_pixel(3, y));
    }
}

#[test]
fn base_and_adapter_start_from_the_same_picture() {
    let scratch = Scratch::new();
    let case = root().join("tests/fixtures/cases/sd15");
    let (model, adapter) = (case.join("pipeline"), case.join("hra-r4"));
    photograph(&scratch, 40, 24);
    let words = ["--image", "image.png", "--strength", "0.7"];
    let with = ["--with-base", "--adapter", adapter.to_str().unwrap()];
    let tuned = draw(&scratch, &model, "both", &[&words[..], &with].concat());
    let plain = draw(&scratch, &model, "plain", &words);
    let base = load_rgb(&scratch.path("both/base/0000-0000.png")).unwrap();
    assert!(distance(&base, &plain) < 0.01);
    assert!(distance(&tuned, &plain) > 0.1);
}

#[test]
fn an_inpainting_unet_draws_into_masks_alone() {
    let scratch = Scratch::new();
    let model = inpainting_model(&scratch);
    photograph(&scratch, 40, 24);
    mask(&scratch.path("mask.png"), 40, 24, |x, _| x > 20);
    let noise = random::normal(9, &[1, 4, 6, 10]);
    tensor_file::write(&scratch.path("noise.safetensors"), &[("latents".into(), noise)], &[]).unwrap();
    let words = ["--scheduler", "ddim", "--latents", "noise.safetensors", "--save-latents"];
    let masked = ["--image", "image.png", "--mask", "mask.png"];
    draw(&scratch, &model, "nine", &[&words[..], &["nine.safetensors"], &masked].concat());
    // Its new channels weigh nothing, so from the same noise it draws what the plain model makes of the text.
    let plain = root().join("tests/fixtures/cases/sd15/pipeline");
    draw(&scratch, &plain, "plain", &[&words[..], &["plain.safetensors"]].concat());
    let [nine, plain] = ["nine", "plain"].map(|name| latents(&scratch.path(&format!("{name}.safetensors"))));
    assert!(relative_error(&nine, &plain) < 1e-5);

    // As one file, with its settings and without.
    let file = scratch.path("one.safetensors");
    let source = Source::open(&model, None).unwrap();
    write_checkpoint(&source, &Replaced::new(), None, &file).unwrap();
    draw(&scratch, &file, "one", &[&words[..], &["one-latents.safetensors"], &masked].concat());
    assert!(relative_error(&latents(&scratch.path("one-latents.safetensors")), &nine) < 1e-6);
    let bare: Vec<(String, Tensor)> = Tensor::read_safetensors(&file).unwrap().into_iter().collect();
    tensor_file::write(&scratch.path("bare.safetensors"), &bare, &[]).unwrap();
    let done = run(&scratch, &scratch.path("bare.safetensors"), "refused", &masked);
    assert!(done.err.contains("files of stable-diffusion-v1-5/stable-diffusion-inpainting"), "{}", done.err);

    for more in [&[][..], &masked[..2]] {
        let done = run(&scratch, &model, "refused", more);
        assert!(done.code == 2 && done.err.contains("give --image FILE --mask FILE"), "{}", done.err);
    }
    let model = model.to_str().unwrap();
    let flags = scratch.train_flags("run", &["--pretrained_model_name_or_path", model]);
    let mut flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    flags.retain(|flag| *flag != "--with_prior_preservation");
    let done = scratch.run(&flags);
    assert!(done.code == 2 && done.err.contains("found one for inpainting"), "{}", done.err);
    assert!(done.err.contains("9 input channels"), "{}", done.err);
}

#[test]
fn what_cannot_be_started_from_is_refused() {
    let scratch = Scratch::new();
    let (width, height, image) = (64, 64, "image.png");
    photograph(&scratch, width, height);
    mask(&scratch.path("black.png"), width, height, |_, _| false);
    mask(&scratch.path("fine.png"), width, height, |x, y| (x, y) == (9, 9));
    mask(&scratch.path("tiny.png"), 3, 64, |_, _| true);
    let noise = Tensor::zeros([1, 4, 6, 10], (Kind::Float, Device::Cpu));
    let file =
        [("latents".to_string(), noise.shallow_clone()), ("image_noise".to_string(), noise.narrow(3, 0, 2))];
    tensor_file::write(&scratch.path("noise.safetensors"), &file[..1], &[]).unwrap();
    tensor_file::write(&scratch.path("beside.safetensors"), &file, &[]).unwrap();
    let cases: [(&[&str], &str); 13] = [
        (
            &["--image", image, "--strength", "0"],
            "--strength: expected a number above 0 and up to 1, found 0",
        ),
        (&["--image", image, "--strength", "1.5"], "up to 1, found 1.5"),
        (&["--image", image, "--strength", "-1"], "up to 1, found -1"),
        (&["--image", image, "--strength", "NaN"], "up to 1, found NaN"),
        (&["--image", image, "--strength", "0.05"], "0.05 of 10 steps is less than one step"),
        (&["--strength", "0.5"], "--image"),
        (&["--mask", "black.png"], "--image"),
        (&["--image", image, "--mask", "black.png"], "--mask: expected white"),
        (
            &["--image", image, "--mask", "fine.png"],
            "--mask: its white is finer than the 4 pixels of a latent",
        ),
        (
            &["--image", "tiny.png"],
            "expected 4 pixels or more on each side (one latent of this model), found 3x64",
        ),
        (&["--image", "nowhere.png"], "nowhere.png"),
        (&["--image", image, "--latents", "noise.safetensors"], "--latents: expected (b, 4, 16, 16)"),
        (
            &["--image", image, "--latents", "beside.safetensors"],
            "`image_noise`: expected shape [1, 4, 6, 10], found [1, 4, 6, 2]",
        ),
    ];
    for (words, expected) in cases {
        let done = run(&scratch, &tiny_sd(), "out", words);
        assert!(done.code == 2 && done.err.contains(expected), "{words:?}: {}\n{}", done.code, done.err);
        assert!(!scratch.path("out").exists(), "{words:?}");
    }
    let done = run(&scratch, &tiny_sd(), "out", &["--image", image, "--width", "30"]);
    assert!(done.code == 2 && done.err.contains("--width: expected a multiple of 4"), "{}", done.err);
}
