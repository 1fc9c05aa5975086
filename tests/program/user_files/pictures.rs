//! Pictures: transparent ones, masks of painting programs, photos of phones.

use crate::support::base::root;
use crate::support::scratch::Scratch;
use crate::support::training::tiny_sd;
use hra::data::image::png::save_png;
use hra::data::image::{RgbImage, load_rgb};
use image::{Rgba, RgbaImage};
use std::path::Path;

/// A picture of these pixels with an alpha channel.
fn save(path: &Path, pixel: impl Fn(u32, u32) -> [u8; 4]) {
    RgbaImage::from_fn(64, 64, |x, y| Rgba(pixel(x, y))).save(path).unwrap();
}

/// A drawing with `mask.png`; its pixels and what was said.
fn drawn(scratch: &Scratch, out: &str, more: &[&str]) -> (RgbImage, String) {
    let (model, cat) = (tiny_sd(), root().join("assets/subjects/cat/train/00.png"));
    let mut args = vec![
        "sample",
        "--model",
        model.to_str().unwrap(),
        "--image",
        cat.to_str().unwrap(),
        "--prompt",
        "a red apple",
    ];
    args.extend(["--steps", "4", "--width", "64", "--height", "64", "--output", out]);
    args.extend(more);
    let done = scratch.ok(&args);
    (load_rgb(&scratch.path(out).join("0000-0000.png")).unwrap(), done.err)
}

fn in_circle(x: u32, y: u32) -> bool {
    (x as i32 - 30).pow(2) + (y as i32 - 34).pow(2) < 300
}

#[test]
fn a_mask_painted_in_one_colour_on_a_transparent_layer() {
    let scratch = Scratch::new();
    let plain = RgbImage::from_fn(64, 64, |x, y| [if in_circle(x, y) { 255 } else { 0 }; 3].into());
    save_png(&scratch.path("plain.png"), &plain, &[]).unwrap();
    let (expected, said) = drawn(&scratch, "plain", &["--mask", "plain.png"]);
    assert!(!said.contains("--mask:"), "{said}");
    for colour in [255, 0] {
        let alpha = |x, y| if in_circle(x, y) { 255 } else { 0 };
        save(&scratch.path("alpha.png"), |x, y| [colour, colour, colour, alpha(x, y)]);
        let (found, said) = drawn(&scratch, &format!("alpha{colour}"), &["--mask", "alpha.png"]);
        assert!(said.contains("note: --mask: it has one colour: its opaque parts are the mask"), "{said}");
        assert!(found == expected, "{colour}");
    }
    // White and black are there: they decide, and what is transparent is no mask.
    save(&scratch.path("both.png"), |x, y| match in_circle(x, y) {
        true => [255; 4],
        false if x < 32 => [0, 0, 0, 255],
        false => [255, 255, 255, 0],
    });
    // A brush that is not quite opaque leaves white all the same.
    save(&scratch.path("soft.png"), |x, y| match in_circle(x, y) {
        true => [255, 255, 255, 250],
        false => [0, 0, 0, 255],
    });
    for name in ["both", "soft"] {
        let (found, said) = drawn(&scratch, name, &["--mask", &format!("{name}.png")]);
        assert!(said.contains("note: --mask: its transparent parts count as black"), "{name}: {said}");
        assert!(found == expected, "{name}");
    }
    // Its edge is soft, and of the same colour.
    save(&scratch.path("edge.png"), |x, y| {
        let from_middle = (x as i32 - 30).pow(2) + (y as i32 - 34).pow(2);
        [200, 30, 90, (255 - (from_middle - 200).clamp(0, 255)) as u8]
    });
    let (_, said) = drawn(&scratch, "edge", &["--mask", "edge.png"]);
    assert!(said.contains("its opaque parts are the mask"), "{said}");
}

#[test]
fn a_background_for_no_picture() {
    let (scratch, model) = (Scratch::new(), tiny_sd());
    let args = ["sample", "--model", model.to_str().unwrap(), "--prompt", "p", "--output", "out"];
    let done = scratch.run(&[&args[..], &["--background", "black"]].concat());
    assert!(done.code == 2 && done.err.contains("--image <FILE>"), "{}", done.err);
}

#[test]
fn a_mask_that_is_white_everywhere() {
    let scratch = Scratch::new();
    save_png(&scratch.path("white.png"), &RgbImage::from_pixel(8, 8, [255; 3].into()), &[]).unwrap();
    let (_, said) = drawn(&scratch, "out", &["--mask", "white.png"]);
    assert!(said.contains("note: --mask: it is white everywhere: the whole picture is drawn anew"), "{said}");
}

#[test]
fn photos_cut_out_of_their_background() {
    let scratch = Scratch::new();
    std::fs::create_dir(scratch.path("cut")).unwrap();
    // What lies under the transparent part is not to be seen.
    let under = |x: u32, y: u32| [(x * 4) as u8, (y * 4) as u8, 77];
    save(&scratch.path("cut/a.png"), |x, y| {
        let [r, g, b] = under(x, y);
        [r, g, b, if in_circle(x, y) { 255 } else { 0 }]
    });
    let train = |out: &str, folder: &str, more: &[&str]| {
        let flags = ["--instance_data_dir", folder, "--max_train_steps", "1"];
        let done = scratch.train(out, &[&flags, more].concat());
        let metrics = std::fs::read_to_string(scratch.path(out).join("metrics.jsonl")).unwrap();
        let record: serde_json::Value = serde_json::from_str(metrics.lines().last().unwrap()).unwrap();
        (format!("{}{}", done.out, done.err), record["loss"].as_f64().unwrap())
    };
    for (name, level) in [("white", 255), ("black", 0)] {
        let folder = scratch.path(&format!("flat-{name}"));
        std::fs::create_dir(&folder).unwrap();
        save(&folder.join("a.png"), |x, y| {
            let [r, g, b] = if in_circle(x, y) { under(x, y) } else { [level; 3] };
            [r, g, b, 255]
        });
        let (said, found) = train(&format!("cut-{name}"), "cut", &["--background", name]);
        assert!(said.contains(&format!("transparent parts show {name} (background)")), "{said}");
        let (said, expected) = train(&format!("run-{name}"), folder.to_str().unwrap(), &[]);
        assert!(!said.contains("transparent"), "{said}");
        assert_eq!(found, expected, "{name}");
    }
}

#[test]
fn heic_photos_of_every_brand() {
    let scratch = Scratch::new();
    for brand in ["heic", "heix", "hevc", "hevx", "heim", "heis", "mif1"] {
        let bytes = [&[0, 0, 0, 24][..], b"ftyp", brand.as_bytes(), &[0; 32]].concat();
        std::fs::write(scratch.path("IMG_0001.HEIC"), bytes).unwrap();
        let model = tiny_sd();
        let args = [
            "sample",
            "--model",
            model.to_str().unwrap(),
            "--image",
            "IMG_0001.HEIC",
            "--prompt",
            "p",
            "--output",
            "out",
        ];
        let done = scratch.run(&args);
        assert_eq!(done.code, 2);
        assert!(
            done.err.contains("found a HEIC image") && done.err.contains("as JPEG"),
            "{brand}: {}",
            done.err
        );
    }
}
