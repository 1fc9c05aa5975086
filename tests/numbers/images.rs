//! Pictures against Pillow: files of every kind, hostile ones, resizing to the same bit, PNG texts, contact sheets.
//! `tests/fixtures/make_image_fixtures.py`, `make_resize_fixtures.py` and `make_nearest_fixtures.py` made what is compared with.

use std::io::Cursor;
use std::path::{Path, PathBuf};

use hra::data::image::decode::{self, DecodedPicture};
use hra::data::image::{
    Background, Filter, Grid, GridRow, RgbImage, center_crop, crop, load_rgb, read_png_text, resize,
    resize_nearest, save_png,
};
use safetensors::SafeTensors;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// Name and picture of every `[height, width, 3]` tensor of a file.
fn pictures(name: &str) -> Vec<(String, RgbImage)> {
    let bytes = std::fs::read(fixture(name)).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let picture = |view: safetensors::tensor::TensorView| {
        let &[height, width, 3] = view.shape() else { panic!("a picture has three channels") };
        RgbImage::from_raw(width as u32, height as u32, view.data().to_vec()).unwrap()
    };
    file.tensors().into_iter().map(|(name, view)| (name, picture(view))).collect()
}

/// Mean and largest difference of two pictures of one size.
fn difference(a: &RgbImage, b: &RgbImage) -> (f64, u8) {
    assert_eq!(a.dimensions(), b.dimensions());
    let differences: Vec<u8> = a.iter().zip(b.iter()).map(|(x, y)| x.abs_diff(*y)).collect();
    let sum: f64 = differences.iter().map(|d| f64::from(*d)).sum();
    (sum / differences.len() as f64, differences.into_iter().max().unwrap())
}

/// A PNG that claims a size and holds nearly nothing.
fn hollow_png(width: u32, height: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut writer = png::Encoder::new(&mut bytes, width, height).write_header().unwrap();
    writer.write_chunk(png::chunk::IDAT, &[0x78, 0x9c, 3, 0, 0, 0, 0, 1]).unwrap();
    drop(writer);
    bytes
}

fn decode(bytes: &[u8]) -> Result<DecodedPicture, String> {
    decode::decode(bytes, Background::default())
}

#[test]
fn resizing_is_pillows_to_the_bit() {
    let pictures = pictures("resize.safetensors");
    let (_, source) = pictures.iter().find(|(name, _)| name == "source").unwrap();
    assert_eq!(pictures.len(), 1 + 7 * Filter::ALL.len());
    for (name, expected) in pictures.iter().filter(|(name, _)| name != "source") {
        let (_, filter) = Filter::ALL.iter().find(|(f, _)| name.starts_with(&format!("{f}."))).unwrap();
        let found = resize(source, expected.width(), expected.height(), *filter);
        assert!(found == *expected, "{name}: {:?}", difference(&found, expected));
    }
}

#[test]
fn every_kind_of_file_reads_as_in_pillow() {
    let pictures = pictures("images/expected.safetensors");
    assert_eq!(pictures.len(), 28);
    for (name, expected) in &pictures {
        let found = load_rgb(&fixture("images").join(name)).unwrap();
        let (mean, max) = difference(&found, expected);
        // Lossless files to the bit; JPEG decoders and the CMYK formula round differently.
        let lossy = name.ends_with(".jpg") || name == "cmyk.tif" || name == "lossy.webp";
        let allowed = if lossy { (0.5, 4) } else { (0.0, 0) };
        println!("{name}: mean {mean:.3}, at most {max}");
        assert!(mean <= allowed.0 && max <= allowed.1, "{name}: mean {mean}, at most {max}");
    }
}

#[test]
fn every_orientation_comes_upright() {
    let (red, white) = ([220, 40, 40], [240, 240, 240]);
    for n in 1..=8 {
        let picture =
            decode::load(&fixture(&format!("images/orientation_{n}.jpg")), Background::default()).unwrap();
        assert_eq!(picture.pixels.dimensions(), (24, 16), "{n}");
        for (x, y, expected) in [(3, 3, red), (20, 12, white)] {
            let found = picture.pixels.get_pixel(x, y).0;
            assert!(found.iter().zip(expected).all(|(f, e)| f.abs_diff(e) < 12), "{n}: {found:?}");
        }
        assert_eq!(picture.turned.is_some(), n != 1);
        assert_eq!(picture.format, "JPEG");
    }
}

/// As Pillow 11 blends with `Image.paste(picture, mask=alpha)`.
#[test]
fn transparent_pixels_show_the_background() {
    let pixels: [[u8; 4]; 5] =
        [[10, 20, 30, 0], [10, 20, 30, 255], [190, 240, 126, 194], [81, 36, 71, 227], [64, 67, 0, 2]];
    let mut file = Cursor::new(Vec::new());
    image::RgbaImage::from_raw(5, 1, pixels.concat())
        .unwrap()
        .write_to(&mut file, image::ImageFormat::Png)
        .unwrap();
    for (background, expected) in [
        ("white", [[255, 255, 255], [10, 20, 30], [206, 244, 157], [100, 60, 91], [254, 254, 253]]),
        ("#000000", [[0, 0, 0], [10, 20, 30], [145, 183, 96], [72, 32, 63], [1, 1, 0]]),
        ("#123456", [[18, 52, 86], [10, 20, 30], [149, 195, 116], [74, 38, 73], [18, 52, 85]]),
    ] {
        let found = decode::decode(file.get_ref(), background.parse().unwrap()).unwrap();
        assert!(found.transparent);
        assert_eq!(found.pixels.pixels().map(|p| p.0).collect::<Vec<_>>(), expected, "{background}");
    }
    for wrong in ["", "#12345", "#12345g", "weiss", "#+12345"] {
        assert!(wrong.parse::<Background>().unwrap_err().contains("#rrggbb"), "{wrong}");
    }
}

#[test]
fn half_a_file_is_refused() {
    for (name, _) in pictures("images/expected.safetensors") {
        let bytes = std::fs::read(fixture("images").join(&name)).unwrap();
        for eighths in 0..=4 {
            let problem = decode(&bytes[..bytes.len() * eighths / 8]).expect_err(&name);
            let told = ["broken or truncated", "an empty file"].iter().any(|words| problem.contains(words));
            assert!(told, "{name}, {eighths}/8: {problem}");
        }
    }
}

#[test]
fn a_jpeg_that_ends_in_its_pixels_is_refused() {
    let bytes = std::fs::read(fixture("images/orientation_1.jpg")).unwrap();
    assert!(decode(&bytes).is_ok());
    let problem = decode(&bytes[..bytes.len() - 20]).unwrap_err();
    assert_eq!(problem, "broken or truncated JPEG image: it has no end marker");
}

#[test]
fn damaged_files_do_not_panic() {
    let mut state = 1_u64;
    let mut draw = |below: usize| {
        state = hra::platform::seed::derive(state, "damage", 0);
        state as usize % below
    };
    for (name, _) in pictures("images/expected.safetensors") {
        let bytes = std::fs::read(fixture("images").join(&name)).unwrap();
        for _ in 0..150 {
            let mut damaged = bytes.clone();
            for _ in 0..=draw(4) {
                let at = draw(damaged.len());
                damaged[at] = draw(256) as u8;
            }
            let _ = decode(&damaged);
        }
    }
}

#[test]
fn what_is_no_image_is_told_by_its_content() {
    let expect = |bytes: &[u8], words: &str| {
        let problem = decode(bytes).unwrap_err();
        assert!(problem.contains(words), "{problem}");
    };
    expect(b"", "found an empty file");
    expect(b"prompt,image\na dog,1.png\n", "found text");
    expect("ein Hund, \u{fc}ber".as_bytes(), "found text");
    expect(b"GIF89a\x01\0\x01\0", "found a GIF image");
    expect(b"\0\0\0\x18ftypheic\0\0\0\0", "found a HEIC image; export");
    expect(b"version https://git-lfs.github.com/spec/v1\n", "found a Git LFS pointer");
    expect(&[7, 0, 255, 254], "found data of an unknown kind");
    expect(b"\x89PNG\r\n\x1a\n", "broken or truncated PNG image");
}

#[test]
fn a_palette_that_ends_within_a_colour_is_a_broken_picture() {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, 1, 1);
    encoder.set_color(png::ColorType::Indexed);
    encoder.set_palette(vec![9; 5]);
    encoder.set_trns(vec![255, 0]);
    encoder.write_header().unwrap().write_image_data(&[0]).unwrap();
    let problem = decode(&bytes).unwrap_err();
    assert!(problem.starts_with("broken PNG image"), "{problem}");
}

#[test]
fn a_damaged_chunk_beside_the_pixels_is_a_broken_picture() {
    // What turns a picture: a TIFF header with the one entry 274 (orientation) = 6.
    let turn = b"MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0";
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, 2, 1);
    encoder.set_color(png::ColorType::Grayscale);
    let mut writer = encoder.write_header().unwrap();
    writer.write_chunk(png::chunk::eXIf, turn).unwrap();
    writer.write_image_data(&[0, 255]).unwrap();
    writer.finish().unwrap();
    let upright = decode(&bytes).unwrap();
    assert_eq!(upright.pixels.dimensions(), (1, 2), "turned by a quarter");
    let at = bytes.windows(4).position(|kind| kind == b"eXIf").unwrap();
    for (offset, value) in [(1, b'\\'), (1, b'Y'), (4 + 20, 1), (4 + turn.len(), 0)] {
        let mut damaged = bytes.clone();
        assert_ne!(std::mem::replace(&mut damaged[at + offset], value), value);
        let problem = decode(&damaged).unwrap_err();
        assert!(problem.starts_with("broken PNG image: the checksum of its chunk e"), "{problem}");
    }
    // Behind the last chunk there is nothing that counts.
    bytes.extend(b"\0\0\0\x01xxxx?????");
    assert_eq!(decode(&bytes).unwrap().pixels, upright.pixels);
}

#[test]
fn decompression_bombs_are_refused_before_they_unfold() {
    for (width, height) in [(100_000, 100_000), (2_000_000_000, 1), (20_000, 10_000)] {
        let problem = decode(&hollow_png(width, height)).unwrap_err();
        // A row of two thousand million pixels is refused before all pixels are counted.
        let bound = if height == 1 { "at most 1536 MiB" } else { "at most 178956970 pixels" };
        assert!(problem.contains(bound), "{problem}");
    }
    // A JPEG says its size in the segment ff c0: length 2, precision 1, height 2, width 2.
    let mut bytes = std::fs::read(fixture("images/orientation_1.jpg")).unwrap();
    let at = bytes.windows(2).position(|pair| pair == [0xff, 0xc0]).unwrap() + 5;
    bytes[at..at + 4].fill(0xff);
    let problem = decode(&bytes).unwrap_err();
    assert!(problem.contains("found a JPEG image of 65535x65535"), "{problem}");
}

#[test]
fn a_folder_or_nothing_in_place_of_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("x.png");
    std::fs::create_dir(&folder).unwrap();
    let told = load_rgb(&folder).unwrap_err().to_string();
    assert!(told.ends_with("x.png: expected a file, found a folder"), "{told}");
    let told = load_rgb(&dir.path().join("y.png")).unwrap_err().to_string();
    assert!(told.starts_with("cannot read ") && told.contains("y.png"), "{told}");
}

#[test]
fn crops_count_from_the_upper_left() {
    let image = RgbImage::from_fn(5, 4, |x, y| [x as u8, y as u8, 9].into());
    let cut = crop(&image, 2, 1, 3);
    assert_eq!((cut.get_pixel(0, 0).0, cut.get_pixel(2, 2).0), ([2, 1, 9], [4, 3, 9]));
    // Python rounds a half to even: (5 - 2) / 2 to 2, (4 - 3) / 2 to 0.
    assert_eq!(center_crop(&image, 2).get_pixel(0, 0).0, [2, 1, 9]);
    assert_eq!(center_crop(&image, 3).get_pixel(0, 0).0, [1, 0, 9]);
}

#[test]
fn png_texts_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.png");
    let image = RgbImage::from_fn(6, 4, |x, y| [x as u8 * 40, y as u8 * 60, 200].into());
    let texts =
        [("prompt", "a sks dog"), ("latin", "caf\u{e9}"), ("other", "\u{72ac} \u{1f436}"), ("none", "")];
    let mut texts: Vec<_> = texts.map(|(k, t)| (k.to_string(), t.to_string())).into();
    save_png(&path, &image, &texts).unwrap();
    assert_eq!(load_rgb(&path).unwrap(), image);
    let mut found = read_png_text(&path).unwrap();
    found.sort();
    texts.sort();
    assert_eq!(found, texts);
}

#[test]
fn png_texts_that_cannot_be_kept_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.png");
    let image = RgbImage::new(1, 1);
    for (keyword, text) in [("", "x"), ("\u{72ac}", "x"), (&*"k".repeat(80), "x"), ("k", "a\0b")] {
        assert!(save_png(&path, &image, &[(keyword.into(), text.into())]).is_err(), "{keyword}");
        assert!(!path.exists());
    }
    std::fs::write(&path, "no image").unwrap();
    let told = read_png_text(&path).unwrap_err().to_string();
    assert!(told.contains("a.png: expected a PNG image"), "{told}");
}

/// Where pixels differ from white: left, top, right, bottom.
fn ink(sheet: &RgbImage) -> (u32, u32, u32, u32) {
    let inked = sheet.enumerate_pixels().filter(|(.., p)| p.0 != [255; 3]);
    inked.fold((u32::MAX, u32::MAX, 0, 0), |(l, t, r, b), (x, y, _)| (l.min(x), t.min(y), r.max(x), b.max(y)))
}

#[test]
fn a_sheet_without_labels_holds_its_images_enlarged_in_rows() {
    let images: Vec<_> = (0..5).map(|n| RgbImage::from_pixel(64, 64, [n * 50, 0, 0].into())).collect();
    let rows = images.chunks(3).map(|row| GridRow { label: String::new(), images: row.to_vec() }).collect();
    let sheet = Grid { columns: Vec::new(), rows }.render();
    // Cells of 192, gaps of 8, margins of 20.
    assert_eq!(sheet.dimensions(), (20 + 3 * 192 + 2 * 8 + 20, 20 + 2 * 192 + 8 + 20));
    for (n, image) in images.iter().enumerate() {
        let (x, y) = (20 + (n as u32 % 3) * 200, 20 + (n as u32 / 3) * 200);
        for (dx, dy) in [(0, 0), (191, 191)] {
            assert_eq!(sheet.get_pixel(x + dx, y + dy), image.get_pixel(0, 0), "{n}");
        }
    }
    assert_eq!(sheet.get_pixel(20 + 2 * 200 + 5, 20 + 200 + 5).0, [255; 3], "the sixth cell is empty");
    assert_eq!(Grid { columns: Vec::new(), rows: Vec::new() }.render().dimensions(), (40, 40));
}

#[test]
fn labels_stay_in_the_margins_of_the_sheet() {
    let black = |width, height| RgbImage::new(width, height);
    for side in [8, 64, 200, 512] {
        let long = "a very long prompt of a dog \u{1f436} in the snow ".repeat(40);
        let grid = Grid {
            columns: vec!["short".into(), long.clone()],
            rows: vec![
                GridRow { label: long, images: vec![black(side, side), black(side / 2, side)] },
                GridRow { label: String::new(), images: vec![black(side, side)] },
            ],
        };
        let sheet = grid.render();
        let (left, top, right, bottom) = ink(&sheet);
        assert!(left >= 20 && top >= 20, "{side}: {left} {top}");
        assert!(right < sheet.width() - 20 && bottom == sheet.height() - 21, "{side}: {right} {bottom}");
    }
}

/// Indices that Pillow 13's `resize(.., NEAREST)` takes; half of the cases differ from exact arithmetic.
#[test]
fn nearest_pixels_are_pillows() {
    let path = fixture("nearest.json");
    let cases: Vec<(u32, u32, Vec<u32>)> =
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    assert!(cases.len() > 20);
    for (from, to, expected) in cases {
        let ramp = RgbImage::from_fn(from, 3, |x, _| [(x % 256) as u8, (x / 256) as u8, 0].into());
        let columns = resize_nearest(&ramp, to, 2);
        let found: Vec<u32> = (0..to)
            .map(|x| columns.get_pixel(x, 1).0)
            .map(|p| u32::from(p[0]) + 256 * u32::from(p[1]))
            .collect();
        assert_eq!(found, expected, "{from} to {to}");
    }
}
