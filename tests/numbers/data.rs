//! The training images of a folder: what is used, what is skipped and why, and the squares cut out of them.

use std::fs;
use std::path::{Path, PathBuf};

use hra::data::image::tensor::signed;
use hra::data::image::{Background, Filter, RgbImage, center_crop, resize_short_side, save_png};
use hra::data::{Crop, ImageFolder, Window};
use hra::{Error, ErrorKind};
use proptest::prelude::*;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/images").join(name)
}

/// `width` x `height` pixels that tell their place.
fn picture(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| [x as u8, y as u8, (x / 4 + y) as u8].into())
}

#[test]
fn every_entry_is_reported_with_its_reason() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    save_png(&at("a.png"), &picture(70, 90), &[]).unwrap();
    save_png(&at("b.png"), &picture(70, 90), &[("other".into(), "text".into())]).unwrap();
    fs::copy(fixture("orientation_6.jpg"), at("c.png")).unwrap();
    fs::copy(fixture("orientation_6.jpg"), at(".hidden.jpg")).unwrap();
    fs::write(at("d.png"), "no image").unwrap();
    fs::write(at("e.jpg"), "").unwrap();
    let whole = fs::read(fixture("rgb16.png")).unwrap();
    fs::write(at("f.png"), &whole[..whole.len() / 2]).unwrap();
    fs::create_dir(at("g.png")).unwrap();
    fs::write(at("Thumbs.db"), "x").unwrap();
    std::os::unix::fs::symlink("nowhere.png", at("h.png")).unwrap();
    save_png(&at("i.png"), &picture(2, 33), &[]).unwrap();

    let folder = ImageFolder::scan(dir.path(), Background::default()).unwrap();
    let report = folder.report(64);
    let expected = [
        ": 3 images used, 8 skipped",
        "\n  a.png        used     70x90 PNG\n",
        "\n  b.png        used     70x90 PNG, same picture as a.png\n",
        "\n  c.png        used     24x16 JPEG, turned by 90 degrees, smaller than 64 pixels, is enlarged\n",
        "\n  .hidden.jpg  skipped  hidden\n",
        "\n  Thumbs.db    skipped  made by the file manager\n",
        "\n  d.png        skipped  expected a PNG, JPEG, WebP, BMP or TIFF image, found text\n",
        "\n  e.jpg        skipped  expected a PNG, JPEG, WebP, BMP or TIFF image, found an empty file\n",
        "\n  f.png        skipped  broken or truncated PNG image: ",
        "\n  g.png        skipped  a folder: sub-folders are not read\n",
        "\n  h.png        skipped  no regular file\n",
        "\n  i.png        skipped  a strip of 2x33 pixels: ",
    ];
    for words in expected {
        assert!(report.contains(words), "{words} is not in\n{report}");
    }
    assert_eq!(report.lines().count(), 12, "{report}");
    assert_eq!(folder.images().len() + folder.skipped().len(), 11);
}

#[test]
fn a_folder_without_images_is_an_error_with_reasons() {
    let dir = tempfile::tempdir().unwrap();
    let scan = |path: &Path| match ImageFolder::scan(path, Background::default()) {
        Err(e @ Error { kind: ErrorKind::Data(_), .. }) => e.to_string(),
        other => panic!("{other:?}"),
    };
    let told = scan(dir.path());
    assert!(told.contains("the folder is empty\nhint: put PNG"), "{told}");
    for n in 0..25 {
        fs::write(dir.path().join(format!("{n:02}.heic")), b"\0\0\0\x18ftypheic").unwrap();
    }
    let told = scan(dir.path());
    assert!(told.starts_with(&format!("{}: no image", dir.path().display())), "{told}");
    assert!(told.contains("\n  19.heic: ") && told.contains("found a HEIC image; export"), "{told}");
    assert!(told.contains("\n  and 5 more\nhint: ") && !told.contains("20.heic"), "{told}");
    assert!(matches!(
        ImageFolder::scan(&dir.path().join("missing"), Background::default()),
        Err(Error { kind: ErrorKind::Io { .. }, .. })
    ));
}

#[test]
fn prepared_squares_are_torchvisions() {
    let dir = tempfile::tempdir().unwrap();
    for (name, (width, height)) in [("a.png", (101, 67)), ("b.png", (40, 50)), ("c.png", (48, 48))] {
        save_png(&dir.path().join(name), &picture(width, height), &[]).unwrap();
    }
    let folder = ImageFolder::scan(dir.path(), Background::default()).unwrap();
    for index in 0..3 {
        let full = folder.load(index).unwrap();
        let resized = resize_short_side(&full, 48, Filter::Bilinear);
        let middle = folder.crop_window(index, 48, Crop::Center);
        assert_eq!(folder.prepare(index, 48, middle).unwrap(), center_crop(&resized, 48));
        let right = Window { x: resized.width() - 48, y: resized.height() - 48 };
        let corner = folder.prepare(index, 48, right).unwrap();
        assert_eq!(corner.get_pixel(47, 47), resized.get_pixel(resized.width() - 1, resized.height() - 1));
    }
    // int(48 * 101 / 67) = 72 columns leave 25 places; a square leaves one.
    assert_eq!([0, 1, 2].map(|index| folder.window_count(index, 48)), [25, 13, 1]);
}

#[test]
fn random_squares_reach_every_place_equally_often() {
    let dir = tempfile::tempdir().unwrap();
    save_png(&dir.path().join("a.png"), &picture(20, 16), &[]).unwrap();
    let folder = ImageFolder::scan(dir.path(), Background::default()).unwrap();
    let mut counts = [0; 5];
    for index in 0..5000 {
        let window = folder.crop_window(0, 16, Crop::Random(hra::platform::seed::derive(3, "crop", index)));
        assert_eq!(window.y, 0);
        counts[window.x as usize] += 1;
    }
    // 1000 each, standard deviation 28: five of them either way.
    assert!(counts.iter().all(|n| (860..1140).contains(n)), "{counts:?}");
}

#[test]
fn resized_pictures_are_kept_and_changed_files_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.png");
    save_png(&path, &picture(20, 16), &[]).unwrap();
    let folder = ImageFolder::scan(dir.path(), Background::default()).unwrap();
    let window = Window { x: 1, y: 0 };
    let first = folder.prepare(0, 16, window).unwrap();
    save_png(&path, &picture(16, 20), &[]).unwrap();
    assert_eq!(folder.prepare(0, 16, window).unwrap(), first);
    let told = folder.prepare(0, 8, window).unwrap_err().to_string();
    assert!(told.contains("a.png: expected 20x16 pixels as at the start, found 16x20"), "{told}");
    fs::remove_file(&path).unwrap();
    assert!(matches!(folder.prepare(0, 8, window), Err(Error { kind: ErrorKind::Io { .. }, .. })));
}

/// The bits that numpy's float32 gives for (v / 255 - 0.5) / 0.5.
#[test]
fn pixels_become_numbers_as_in_torchvision() {
    let image = RgbImage::from_raw(2, 1, vec![0, 1, 100, 255, 127, 128]).unwrap();
    let bits: Vec<u32> =
        Vec::try_from(signed(&image).view([-1])).unwrap().into_iter().map(f32::to_bits).collect();
    assert_eq!(bits, [0xbf80_0000, 0x3f80_0000, 0xbf7d_fdfe, 0xbb80_8080, 0xbe5c_dcdc, 0x3b80_8100]);
}

proptest! {
    #[test]
    fn windows_lie_inside_the_resized_picture(width in 16_u32..200, height in 16_u32..200, resolution in 1_u32..120, draw: u64) {
        let dir = tempfile::tempdir().unwrap();
        save_png(&dir.path().join("a.png"), &picture(width, height), &[]).unwrap();
        let folder = ImageFolder::scan(dir.path(), Background::default()).unwrap();
        for crop in [Crop::Center, Crop::Random(draw)] {
            let window = folder.crop_window(0, resolution, crop);
            prop_assert_eq!(folder.prepare(0, resolution, window).unwrap().dimensions(), (resolution, resolution));
        }
    }
}
