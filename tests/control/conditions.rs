//! Conditions of controllable generation: edges and maps against OpenCV and Pillow (tests/fixtures/make_condition_fixtures.py),
//! landmarks and files that are wrong. tests/python/test_conditions.py has photographs.

use crate::support::base::root;
use hra::data::image::landmarks::{self, Point, read_points};
use hra::data::image::palette::MapFile;
use hra::data::image::{LabelMap, Mask, Palette, RgbImage, Thresholds, canny};
use hra::lab::evaluate::control::{overlap, subject_mask, subject_miou};
use safetensors::SafeTensors;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Shape and bytes of the tensors of the fixtures.
pub fn fixtures() -> BTreeMap<String, (Vec<usize>, Vec<u8>)> {
    let bytes = fs::read(root().join("tests/fixtures/conditions.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors = file.tensors().into_iter();
    tensors.map(|(name, view)| (name, (view.shape().to_vec(), view.data().to_vec()))).collect()
}

pub fn map((shape, labels): &(Vec<usize>, Vec<u8>)) -> LabelMap {
    let labels = labels.iter().map(|label| u16::from(*label)).collect();
    LabelMap::new(shape[1] as u32, shape[0] as u32, labels)
}

pub fn write(path: &Path, content: impl AsRef<[u8]>) -> PathBuf {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
    path.to_path_buf()
}

pub fn points(pairs: &[(f64, f64)]) -> Vec<Point> {
    pairs.iter().map(|(x, y)| Point { x: *x, y: *y }).collect()
}

#[test]
fn edges_are_opencvs() {
    let fixtures = fixtures();
    let (mut compared, mut edges) = (0, 0);
    for (name, (shape, expected)) in &fixtures {
        let Some((picture, thresholds)) = name.split_once('.').filter(|(name, _)| *name != "labels") else {
            continue;
        };
        let at = thresholds.char_indices().filter(|(_, c)| *c == '.').map(|(at, _)| at);
        // 50.5.100.9 has its middle point between the numbers.
        let at = at.clone().nth(at.count() / 2).unwrap();
        let number = |text: &str| text.parse::<f64>().unwrap();
        let thresholds = Thresholds { low: number(&thresholds[..at]), high: number(&thresholds[at + 1..]) };
        let (_, pixels) = &fixtures[picture];
        let image = RgbImage::from_raw(shape[1] as u32, shape[0] as u32, pixels.clone()).unwrap();
        let found = canny(&image, thresholds);
        let expected = expected.iter().map(|value| *value == 1).collect();
        let expected = Mask::new(shape[1] as u32, shape[0] as u32, expected);
        assert!(found == expected, "{name}: {:?}", overlap(&expected, &found));
        compared += 1;
        edges += found.count();
    }
    assert_eq!(compared, 12 * 5);
    assert!(edges > 5000, "only {edges}");
}

#[test]
fn a_mask_is_white_on_black() {
    let mask = Mask::new(2, 1, vec![true, false]);
    assert_eq!(mask.to_rgb().as_raw(), &[255, 255, 255, 0, 0, 0]);
}

#[test]
fn maps_are_resized_as_pillow_resizes_them() {
    let fixtures = fixtures();
    let mut compared = 0;
    for (name, expected) in fixtures.iter().filter(|(name, _)| name.matches('.').count() == 2) {
        let Some((source, side)) = name.rsplit_once('.').filter(|_| name.starts_with("labels.")) else {
            continue;
        };
        assert!(map(&fixtures[source]).square(side.parse().unwrap()) == map(expected), "{name}");
        compared += 1;
    }
    assert_eq!(compared, 9);
}

#[test]
fn maps_in_every_form_of_png_are_read() {
    let maps = map(&fixtures()["labels.maps"]);
    let expected = |classes: u16| -> Vec<u16> { maps.labels().iter().map(|label| label % classes).collect() };
    let folder = root().join("tests/fixtures/conditions");
    let read = |name: &str, palette: Option<&Palette>| LabelMap::read(&folder.join(name), palette).unwrap();
    assert_eq!(read("grey8-256.png", None), maps);
    let high: Vec<u16> = maps.labels().iter().map(|label| u16::from(*label > 127)).collect();
    assert_eq!(read("grey1-2.png", None).labels(), high);
    let deep: Vec<u16> = maps.labels().iter().map(|label| label * 257).collect();
    assert_eq!(read("grey16.png", None).labels(), deep);
    for (bits, classes) in [(1, 2), (2, 4), (4, 16), (8, 256)] {
        let name = format!("palette{bits}-{classes}.png");
        assert_eq!(read(&name, None).labels(), expected(classes), "{name}");
    }

    // By their colours, where these are a palette's: class 3 is what index 0 shows.
    let folder = tempfile::tempdir().unwrap();
    let path = write(&folder.path().join("p.json"), "[[3, 252, 9], [2, 253, 6], [1, 254, 3], [0, 255, 0]]");
    let palette = Palette::read(&path).unwrap();
    let turned: Vec<u16> = expected(4).iter().map(|label| 3 - label).collect();
    assert_eq!(read("palette2-4.png", Some(&palette)).labels(), turned);
    assert_eq!(read("palette4-16.png", Some(&palette)).labels(), expected(16), "colours of no class");
    assert_eq!(read("colours-4.png", Some(&palette)).labels(), turned);
    assert_eq!(read("grey8-256.png", Some(&palette)), maps);
    let colours = root().join("tests/fixtures/conditions/colours-4.png");
    assert!(LabelMap::read(&colours, None).unwrap_err().to_string().contains("hint: --palette FILE"));

    // And back: a coloured map has the classes that it was made of.
    let few = LabelMap::new(13, 7, turned);
    let picture = palette.colour(&few, None).unwrap();
    assert_eq!(palette.classes(&picture, None), few);
    let ignored = palette.colour(&few, Some(2)).unwrap();
    for (label, pixel) in few.labels().iter().zip(ignored.pixels()) {
        assert_eq!(pixel.0 == [0; 3], *label == 2);
    }
    let problem = palette.colour(&maps, Some(255)).unwrap_err();
    assert!(problem.starts_with("expected classes 0 to 3 as in the palette, found "), "{problem}");
}

#[test]
fn subjects_are_what_is_not_background() {
    let folder = tempfile::tempdir().unwrap();
    let path = write(&folder.path().join("p.json"), r#"{"sky": [1, 254, 3], "b": [0, 0, 0]}"#);
    let palette = Palette::read(&path).unwrap();
    assert_eq!(palette.names(), ["sky", "b"]);
    assert_eq!(palette.background(), [[1, 254, 3]]);
    let path = write(&folder.path().join("own.json"), "[[1, 254, 3], [0, 255, 0], [2, 253, 6], [3, 252, 9]]");
    let own = Palette::read(&path).unwrap();
    assert_eq!(own.background(), [[1, 254, 3], [0; 3]], "no class is black");
    let maps = map(&fixtures()["labels.maps"]);
    let read = |name: &str| MapFile::read(&root().join("tests/fixtures/conditions").join(name)).unwrap();
    let where_is =
        |wanted: &dyn Fn(u16) -> bool| -> Vec<bool> { maps.labels().iter().map(|l| wanted(*l)).collect() };
    assert_eq!(read("grey16.png").subject(None).pixels(), where_is(&|label| label != 0));
    assert_eq!(read("palette2-4.png").subject(Some(&own)).pixels(), where_is(&|label| label % 4 != 1));
    // Colours of its own say nothing: its indices are the classes.
    assert_eq!(read("palette2-4.png").subject(Some(&palette)).pixels(), where_is(&|label| label % 4 != 0));
    let dots = RgbImage::from_raw(3, 1, vec![0, 0, 0, 1, 254, 3, 0, 255, 0]).unwrap();
    let dots = MapFile::Colours(dots);
    assert_eq!(dots.subject(Some(&own)).pixels(), [false, false, true], "black is of no class");
    assert_eq!(dots.subject(Some(&palette)).pixels(), [true, false, true], "black is a class");
    assert_eq!(read("colours-4.png").subject(Some(&palette)).pixels(), where_is(&|label| label % 4 != 1));
    assert!(read("colours-4.png").subject(None).pixels().iter().all(|yes| *yes), "no pixel is black");

    // A grey square on noisy orange.
    let square = |x: u32, y: u32| (8..20).contains(&x) && (5..15).contains(&y);
    let picture = RgbImage::from_fn(32, 24, |x, y| {
        let noise = ((x * 7 + y * 13) % 11) as u8;
        image::Rgb(if square(x, y) { [128; 3] } else { [240 + noise, 140 - noise, 20 + noise] })
    });
    let truth = Mask::of(&picture, |pixel| pixel == [128; 3]);
    assert_eq!(truth.count(), 120);
    assert_eq!(subject_mask(&picture), truth);
    assert_eq!(subject_miou(&truth, &subject_mask(&picture)), 1.0);
    // Nothing found: no subject, and 648 of 768 pixels of background.
    assert_eq!(subject_miou(&truth, &Mask::of(&picture, |_| false)), (0.0 + 648.0 / 768.0) / 2.0);
}

#[test]
fn points_are_read_in_every_form() {
    let folder = tempfile::tempdir().unwrap();
    let expected = points(&[(1.5, 2.0), (-3.0, 40.25)]);
    for (name, content) in [
        ("a.json", "[[1.5, 2], [-3, 40.25]]"),
        ("b.json", r#"{"image": "b.png", "landmarks": [[1.5, 2.0], [-3, 40.25]]}"#),
        ("c.json", r#"{"points": [[1.5, 2.0], [-3, 40.25]]}"#),
        ("d.txt", "\u{feff}# x y\n1.5 2\r\n\n -3\t40.25 \n"),
        ("e.txt", "1.5, 2\n-3,40.25"),
        // Counted from 1.
        ("f.pts", "version: 1\nn_points:  2\n{\n2.5 3\n-2 41.25\n}\n"),
    ] {
        assert_eq!(read_points(&write(&folder.path().join(name), content)).unwrap(), expected, "{name}");
    }
    let empty = read_points(&write(&folder.path().join("none.json"), "[]")).unwrap();
    assert!(empty.is_empty(), "no face was found");
}

#[test]
fn wrong_points_and_palettes_are_told() {
    let folder = tempfile::tempdir().unwrap();
    for (content, part) in [
        (&b""[..], "found an empty file"),
        (b"  \n", "found an empty file"),
        (b"# nothing\n", "expected points, found none"),
        (b"1 2 3", "expected two numbers `x y` in a line, found `1 2 3`"),
        (b"a b", "found `a b`"),
        (b"NaN 1", "expected coordinates between -1000000 and 1000000, found (NaN, 1)"),
        (b"1 inf", "found (1, inf)"),
        (b"1e300 1", "expected coordinates between"),
        (b"[[1, -1e7]]", "expected coordinates between"),
        (b"[[1, 2, 3]]", "expected a JSON list of [x, y]"),
        (b"[1, 2]", "expected a JSON list of [x, y]"),
        (br#"{"faces": []}"#, "expected a JSON list of [x, y]"),
        (b"version: 1\nn_points: 3\n{\n1 2\n}", "expected 3 points as n_points says, found 1"),
        (b"version: 1\nn_points: 1\n{\n1 2\n", "found no }"),
        (b"version: 1\n1 2\n", "found no {"),
        (b"\xff\xfe1 2", "expected points as text"),
    ] {
        let error = read_points(&write(&folder.path().join("x.pts"), content)).unwrap_err().to_string();
        assert!(error.contains("x.pts: ") && error.contains(part), "{content:?}: {error}");
    }
    let long = vec![b'\n'; (1 << 20) + 1];
    assert!(read_points(&write(&folder.path().join("x.pts"), long)).is_err());

    for (content, part) in [
        ("{}", "expected 1 to 65536 colours, found 0"),
        ("[]", "expected 1 to 65536 colours, found 0"),
        ("", "expected colours as"),
        ("[[1, 2, 300]]", "expected colours as"),
        ("[[1, 2]]", "expected colours as"),
        (r#"{"a": "red"}"#, "expected colours as"),
        ("7", "an object or a list of colours"),
    ] {
        let error = Palette::read(&write(&folder.path().join("p.json"), content)).unwrap_err().to_string();
        assert!(error.contains("p.json: ") && error.contains(part), "{content:?}: {error}");
    }
}

#[test]
fn landmarks_are_drawn_as_discs_and_parts_of_a_face() {
    let white = |picture: &RgbImage| -> Vec<(u32, u32)> {
        picture.enumerate_pixels().filter(|(.., pixel)| pixel.0 == [255; 3]).map(|(x, y, _)| (x, y)).collect()
    };
    // Radius 1 at 64 pixels: a plus. What lies outside is cut off, what is far outside does nothing.
    let drawn = landmarks::draw(&points(&[(10.4, 5.6), (0.0, 63.0), (1e6, -1e6)]), 64, 64);
    let expected = [(10, 5), (9, 6), (10, 6), (11, 6), (10, 7), (0, 62), (0, 63), (1, 63)];
    assert_eq!(white(&drawn), expected);
    assert!(drawn.pixels().all(|pixel| [[0; 3], [255; 3]].contains(&pixel.0)));

    // 68 points on a line, apart: the parts are joined, what is between parts is not; an eye is closed.
    let face =
        |n: usize| -> Vec<Point> { (0..n).map(|i| Point { x: 8.0 * i as f64 + 4.0, y: 8.0 }).collect() };
    let joined = landmarks::draw(&face(68), 552, 17);
    let between = |i: u32| joined.get_pixel(8 * i + 8, 8).0 == [255; 3];
    let gaps: Vec<u32> = (0..67).filter(|i| !between(*i)).collect();
    assert_eq!(gaps, [16, 21, 26, 30, 35, 41, 47, 59]);
    let apart = landmarks::draw(&face(67), 552, 17);
    assert!((0..66).all(|i| apart.get_pixel(8 * i + 8, 8).0 == [0; 3]), "no lines but for 68 points");
    let mut eye = face(68);
    for (i, at) in
        (36..42).zip([(10.0, 50.0), (20.0, 40.0), (30.0, 40.0), (40.0, 50.0), (30.0, 60.0), (20.0, 60.0)])
    {
        eye[i] = Point { x: at.0, y: at.1 };
    }
    let eye = landmarks::draw(&eye, 552, 80);
    assert_eq!(eye.get_pixel(15, 55).0, [255; 3], "from the last point to the first");

    // Ends far outside: only what crosses the picture is walked. The lines are those of the jaw, down and then up.
    let mut far = vec![Point { x: -1e15, y: -1e15 }; 68];
    (far[0], far[1]) = (Point { x: 20.0, y: -1e15 }, Point { x: 20.0, y: 1e15 });
    (far[2], far[3]) = (Point { x: 1e15, y: 1e15 }, Point { x: -1e15, y: -1e15 });
    let far = white(&landmarks::draw(&far, 64, 48));
    let mut expected: Vec<(u32, u32)> =
        (0..48).flat_map(|y| if y < 20 { [(y, y), (20, y)] } else { [(20, y), (y, y)] }).collect();
    expected.dedup();
    assert_eq!(far, expected);

    // 100 x 50 to 20: x' = (x + 0.5) * 40 / 100 - 0.5 - 10, y' = (y + 0.5) * 20 / 50 - 0.5.
    let found = landmarks::square(&points(&[(49.5, 24.5), (0.0, 0.0)]), 100, 50, 20);
    for (found, expected) in found.iter().zip([(9.5, 9.5), (-10.3, -0.3)]) {
        assert!((found.x - expected.0).abs() < 1e-9 && (found.y - expected.1).abs() < 1e-9, "{found:?}");
    }
}
