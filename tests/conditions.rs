//! Conditions of controllable generation and their scores: edges and maps against OpenCV and Pillow
//! (tests/fixtures/make_condition_fixtures.py), landmarks and files that are wrong, `hra prepare` and `hra evaluate` as a user runs
//! them. tests/python/test_conditions.py has photographs, and scores by numpy.

mod support;

use hra::data::image::landmarks::{self, Point, read_points};
use hra::data::image::palette::MapFile;
use hra::data::image::{LabelMap, Mask, Palette, RgbImage, Thresholds, canny, load_rgb, save_png};
use hra::lab::evaluate::control::{overlap, subject_mask, subject_miou};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use support::program::{Finished, Scratch};
use support::root;

/// Shape and bytes of the tensors of the fixtures.
fn fixtures() -> BTreeMap<String, (Vec<usize>, Vec<u8>)> {
    let bytes = fs::read(root().join("tests/fixtures/conditions.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors = file.tensors().into_iter();
    tensors.map(|(name, view)| (name, (view.shape().to_vec(), view.data().to_vec()))).collect()
}

fn map((shape, labels): &(Vec<usize>, Vec<u8>)) -> LabelMap {
    let labels = labels.iter().map(|label| u16::from(*label)).collect();
    LabelMap::new(shape[1] as u32, shape[0] as u32, labels)
}

fn write(path: &Path, content: impl AsRef<[u8]>) -> PathBuf {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
    path.to_path_buf()
}

fn points(pairs: &[(f64, f64)]) -> Vec<Point> {
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

fn refused(done: &Finished, part: &str) {
    assert_eq!(done.code, 2, "{}", done.err);
    assert!(done.err.contains(part) && !done.err.contains("panicked"), "expected `{part}` in: {}", done.err);
}

fn parsed(done: &Finished) -> Value {
    assert_eq!(done.code, 0, "{}", done.err);
    serde_json::from_str(&done.out).unwrap()
}

/// Three pictures in `photos`, one in a folder, a broken one, and their metadata.
fn photos(scratch: &Scratch) {
    let picture = |seed: u32| {
        RgbImage::from_fn(40, 24, |x, y| image::Rgb([(x / 8 * 40 + seed) as u8, (y / 6 * 60) as u8, 9]))
    };
    for (i, name) in ["one.png", "two.b.png", "more/three.png"].iter().enumerate() {
        let path = scratch.path("photos").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        save_png(&path, &picture(i as u32), &[]).unwrap();
    }
    write(&scratch.path("photos/broken.png"), b"\x89PNG\r\n\x1a\nno more");
    let lines = [
        json!({"file_name": "one.png", "text": "the \"first\"", "other": 1}).to_string(),
        json!({"file_name": "two.b.png", "text": ["second", "2nd"]}).to_string(),
        json!({"file_name": "more/three.png", "text": null}).to_string(),
        json!({"file_name": "broken.png", "text": "b"}).to_string(),
        json!({"file_name": "gone.png", "text": "g"}).to_string(),
        "{".to_string(),
    ];
    write(&scratch.path("photos/metadata.jsonl"), format!("\u{feff}{}\n", lines.join("\n")));
}

#[test]
fn canny_is_prepared_with_pairs_and_reasons() {
    let scratch = Scratch::new();
    photos(&scratch);
    let told = parsed(&scratch.run(&["prepare", "canny", "photos", "--low", "20", "--high", "40", "--json"]));
    assert_eq!(
        told["conditions"],
        json!(["photos/canny/one.png", "photos/canny/two.b.png", "photos/canny/more/three.png"])
    );
    let skipped: Vec<String> = told["skipped"]
        .as_array()
        .unwrap()
        .iter()
        .map(|bad| format!("{}: {}", bad["file"].as_str().unwrap(), bad["reason"].as_str().unwrap()))
        .collect();
    assert_eq!(skipped.len(), 3, "{skipped:?}");
    for (bad, parts) in skipped.iter().zip([
        ["photos/gone.png: ", "line 5 of photos/metadata.jsonl"],
        ["photos/metadata.jsonl: line 6", "broken JSON"],
        ["photos/broken.png: ", "PNG"],
    ]) {
        assert!(parts.iter().all(|part| bad.contains(part)), "{bad}");
    }
    let text = fs::read_to_string(scratch.path("photos/canny/metadata.jsonl")).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let told: Vec<_> =
        lines.iter().map(|l| (&l["file_name"], &l["text"], &l["conditioning_image"])).collect();
    let expected = [
        ("../one.png", "the \"first\"", "one.png"),
        ("../two.b.png", "second", "two.b.png"),
        ("../more/three.png", "", "more/three.png"),
    ]
    .map(|(a, b, c)| (json!(a), json!(b), json!(c)));
    assert_eq!(told, expected.iter().map(|(a, b, c)| (a, b, c)).collect::<Vec<_>>());
    let thresholds = Thresholds { low: 20.0, high: 40.0 };
    for (file, _, condition) in told {
        let [picture, made] = [file, condition]
            .map(|name| load_rgb(&scratch.path("photos/canny").join(name.as_str().unwrap())).unwrap());
        assert_eq!(made, canny(&picture, thresholds).to_rgb());
        assert!(made.contains(&255), "no edge in {condition}");
    }

    // Again, with pictures at 16: both are squares of one size.
    let words = ["prepare", "canny", "photos", "--resolution", "16"];
    let done = scratch.ok(&words);
    assert_eq!(done.out, "3 conditions in photos/canny, 3 skipped\npairs: photos/canny/metadata.jsonl\n");
    assert!(done.err.contains("skipped: photos/gone.png: "), "{}", done.err);
    let text = fs::read_to_string(scratch.path("photos/canny/metadata.jsonl")).unwrap();
    let first: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    assert_eq!(first["file_name"], "pictures/one.png");
    for name in ["one.png", "pictures/one.png", "pictures/more/three.png"] {
        assert_eq!(load_rgb(&scratch.path("photos/canny").join(name)).unwrap().dimensions(), (16, 16));
    }

    // Nothing of others is written over, nor the sources.
    save_png(
        &scratch.path("photos/canny/two.b.png"),
        &RgbImage::new(2, 2),
        &[("software".into(), "hra".into())],
    )
    .unwrap();
    refused(&scratch.run(&words), "two.b.png: a file that hra prepare did not make is in the way");
    refused(
        &scratch.run(&["prepare", "canny", "photos", "--output", "photos/../photos"]),
        "expected another folder",
    );
    write(&scratch.path("out/metadata.jsonl"), "{\"file_name\": \"x\"}\n");
    refused(
        &scratch.run(&["prepare", "canny", "photos", "--output", "out"]),
        "metadata.jsonl: a file that hra prepare",
    );
    assert!(!scratch.path("out/one.png").exists());
    refused(
        &scratch.run(&["prepare", "canny", "photos", "--low", "300"]),
        "expected 0 <= low <= high, found 300 and 200",
    );
    refused(&scratch.run(&["prepare", "canny", "photos", "--low", "nan"]), "expected 0 <= low <= high");
}

#[test]
fn pictures_without_metadata_have_conditions_and_no_pairs() {
    let scratch = Scratch::new();
    photos(&scratch);
    fs::remove_file(scratch.path("photos/metadata.jsonl")).unwrap();
    save_png(&scratch.path("photos/one.jpg"), &RgbImage::new(9, 9), &[]).unwrap();
    let done = scratch.ok(&["prepare", "canny", "photos", "--output", "out"]);
    assert_eq!(done.out, "2 conditions in out, 2 skipped\n");
    assert!(done.err.contains("found that photos/one.jpg makes out/one.png too"), "{}", done.err);
    assert!(!scratch.path("out/metadata.jsonl").exists());

    write(&scratch.path("photos/metadata.csv"), "file_name,text\r\none.png,\"a, b\"\r\n");
    scratch.ok(&["prepare", "canny", "photos", "--output", "out"]);
    let text = fs::read_to_string(scratch.path("out/metadata.jsonl")).unwrap();
    let line: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&line["text"], &line["file_name"]), (&json!("a, b"), &json!("../photos/one.png")));
    write(&scratch.path("photos/metadata.csv"), "name,text\none.png,a\n");
    refused(
        &scratch.run(&["prepare", "canny", "photos", "--output", "out"]),
        "line 2: expected a column `file_name`, found name, text",
    );
    write(&scratch.path("photos/metadata.csv"), "file_name,text\none.png,\"a\ntwo.b.png,b\n");
    refused(
        &scratch.run(&["prepare", "canny", "photos", "--output", "out"]),
        "a quote that line 2 opens is never closed",
    );
    fs::remove_file(scratch.path("photos/metadata.csv")).unwrap();
    write(&scratch.path("photos/metadata.jsonl"), "{\"file_name\": \"one.png\"}\n");
    refused(
        &scratch.run(&["prepare", "canny", "photos", "--output", "out"]),
        "line 1: expected a column `text`, found file_name",
    );

    fs::create_dir(scratch.path("empty")).unwrap();
    refused(&scratch.run(&["prepare", "canny", "empty"]), "empty: nothing that a condition could be made of");
    refused(&scratch.run(&["prepare", "canny", "gone"]), "gone");
}

#[test]
fn maps_and_points_are_prepared_for_their_pictures() {
    let scratch = Scratch::new();
    photos(&scratch);
    let palette = write(&scratch.path("palette.json"), r#"{"z": [9, 8, 7], "a": [255, 0, 0]}"#);
    let grey = |path: &str, width: u32, labels: &[u8]| {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, width, labels.len() as u32 / width);
        encoder.set_color(png::ColorType::Grayscale);
        encoder.write_header().unwrap().write_image_data(labels).unwrap();
        write(&scratch.path(path), bytes);
    };
    // Of the pictures' aspect, 40 x 24.
    let labels: Vec<u8> = [0, 1, 255, 1, 0].repeat(3);
    grey("maps/one.png", 5, &labels);
    grey("maps/two.b.png", 3, &labels);
    grey("maps/three.png", 5, &[7; 15]);
    grey("maps/extra.png", 5, &labels);
    let palette = palette.to_str().unwrap();
    // Of the pictures' aspect seen from the picture: 248 of 400 is 24.8 of 40.
    grey("large/one.png", 400, &[1; 400 * 248]);
    let words = ["prepare", "segmentation", "large", "--palette", palette, "--pictures", "photos", "--json"];
    assert_eq!(parsed(&scratch.run(&words))["conditions"], json!(["large/segmentation/one.png"]));
    let words = ["prepare", "segmentation", "maps", "--palette", palette];
    let told =
        parsed(&scratch.run(&[&words[..], &["--pictures", "photos", "--output", "out", "--json"]].concat()));
    assert_eq!(told["conditions"], json!(["out/one.png"]));
    let skipped = told["skipped"].to_string();
    for part in [
        "expected the aspect of the picture, 40x24, found 3x5",
        "expected a picture of its name in photos, found none",
        "expected classes 0 to 1 as in the palette, found 7 at (0, 0)",
        "expected a file of its name in maps, found none",
    ] {
        assert!(skipped.contains(part), "{part}: {skipped}");
    }
    let colours: Vec<[u8; 3]> =
        load_rgb(&scratch.path("out/one.png")).unwrap().pixels().take(5).map(|pixel| pixel.0).collect();
    assert_eq!(colours, [[9, 8, 7], [255, 0, 0], [0; 3], [255, 0, 0], [9, 8, 7]]);
    let alone = scratch.ok(&[&words[..], &["--output", "alone", "--resolution", "12"]].concat());
    assert_eq!(alone.out, "3 conditions in alone, 1 skipped\n");
    assert_eq!(load_rgb(&scratch.path("alone/one.png")).unwrap().dimensions(), (12, 12));

    write(&scratch.path("points/one.txt"), "20 10\n");
    write(&scratch.path("points/two.b.json"), "[[800, 100]]");
    write(&scratch.path("points/three.json"), "[]");
    let words = ["prepare", "landmarks", "points", "--pictures", "photos", "--scale", "0.5", "--json"];
    let told = parsed(&scratch.run(&words));
    assert_eq!(told["conditions"], json!(["points/landmarks/one.png"]));
    let skipped = told["skipped"].to_string();
    assert!(skipped.contains("expected points in the picture of 40x24, found 1 outside"), "{skipped}");
    assert!(skipped.contains("found 0 outside"), "{skipped}");
    let expected = landmarks::draw(&points(&[(10.0, 5.0)]), 40, 24);
    assert_eq!(load_rgb(&scratch.path("points/landmarks/one.png")).unwrap(), expected);
    refused(
        &scratch.run(&[&words[..5], &["--scale", "0"]].concat()),
        "--scale: expected a number above 0, at most 1000, found 0",
    );
    refused(&scratch.run(&[&words[..5], &["--scale", "1e300"]].concat()), "at most 1000, found ");
    // Pictures and points in one folder, one picture with two files of points.
    fs::create_dir(scratch.path("both")).unwrap();
    save_png(&scratch.path("both/one.png"), &RgbImage::new(40, 24), &[]).unwrap();
    write(&scratch.path("both/one.pts"), "version: 1\nn_points: 1\n{\n9 9\n}");
    write(&scratch.path("both/one.txt"), "a caption");
    let told = parsed(&scratch.run(&["prepare", "landmarks", "both", "--pictures", "both", "--json"]));
    assert_eq!(told["conditions"], json!(["both/landmarks/one.png"]));
    let twice = json!([{
        "file": "both/one.txt",
        "reason": "expected one file of a name, found both/one.pts too, which is used",
    }]);
    assert_eq!(told["skipped"], twice);
    write(&scratch.path("points/two.b.json"), "[[1e6, 10], [4, 4]]");
    let told = parsed(&scratch.run(&[&words[..5], &["--scale", "1.5", "--json"]].concat()));
    let skipped = told["skipped"].to_string();
    assert!(skipped.contains("times 1.5: expected coordinates between -1000000 and 1000000"), "{skipped}");
}

#[test]
fn pictures_are_scored_against_their_conditions() {
    let scratch = Scratch::new();
    let subject = |left: u32, side: u32| {
        RgbImage::from_fn(side, side, |x, y| {
            let inside = (left..left + side / 2).contains(&x) && (side / 4..side / 2).contains(&y);
            image::Rgb(if inside { [200, 30, 40] } else { [20, 90, 220] })
        })
    };
    for folder in ["drawn", "photos", "maps"] {
        fs::create_dir(scratch.path(folder)).unwrap();
    }
    for i in 0..6 {
        let save = |name: &str, picture: &RgbImage| save_png(&scratch.path(name), picture, &[]).unwrap();
        save(&format!("drawn/{i}.png"), &subject(8 + i, 32));
        save(&format!("photos/{i}.png"), &subject(8, 32));
        let mask = RgbImage::from_fn(64, 64, |x, y| {
            let inside = (16..48).contains(&x) && (16..32).contains(&y);
            image::Rgb(if inside { [255, 221, 51] } else { [0; 3] })
        });
        save(&format!("maps/{i}.png"), &mask);
    }
    let words = ["evaluate", "drawn", "--edges-of", "photos", "--subject-masks", "maps", "--device", "cpu"];
    let told = parsed(&scratch.run(&[&words[..], &["--json", "--csv", "scores.csv"]].concat()));
    let pictures = told["pictures"].as_array().unwrap();
    let mut sums = BTreeMap::<&str, f64>::new();
    for (i, picture) in pictures.iter().enumerate() {
        // A box of 16 x 8 moved by i columns: these overlap in 16 - i columns.
        let (both, either) = ((16.0 - i as f64) * 8.0, (16.0 + i as f64) * 8.0);
        let outside = (32.0 * 32.0 - either) / (32.0 * 32.0 - both);
        let expected = (both / either + outside) / 2.0;
        let found = picture["scores"]["subject_miou"].as_f64().unwrap();
        assert!((found - expected).abs() < 1e-12, "{i}: {found} {expected}");
        for key in ["edge_f1", "edge_iou", "subject_miou"] {
            *sums.entry(key).or_default() += picture["scores"][key].as_f64().unwrap();
        }
        let edges = |left| canny(&subject(left, 32), Thresholds::default());
        let expected = overlap(&edges(8), &edges(8 + i as u32));
        assert_eq!(picture["scores"]["edge_iou"], json!(expected.iou));
        assert_eq!(picture["scores"]["edge_f1"], json!(expected.f1));
    }
    assert_eq!(pictures[0]["scores"]["edge_f1"], 1.0);
    assert!(pictures[3]["scores"]["edge_f1"].as_f64().unwrap() < 0.9);
    for (key, sum) in sums {
        let mean = told["scores"][key].as_f64().unwrap();
        assert!((mean - sum / 6.0).abs() < 1e-12 && told["counts"][key] == 6, "{key}");
        let interval = &told["intervals"][key];
        assert!(interval[0].as_f64().unwrap() < mean && mean < interval[1].as_f64().unwrap(), "{key}");
    }
    let csv = fs::read_to_string(scratch.path("scores.csv")).unwrap();
    assert!(csv.starts_with("file,prompt,edge_f1,edge_iou,subject_miou\n"), "{csv}");

    // The mean is over pictures, whatever the prompts: five of one prompt and one of another.
    write(&scratch.path("prompts.txt"), "a\na\na\na\na\nb\n");
    let again = parsed(&scratch.run(&[&words[..], &["--json", "--prompt-file", "prompts.txt"]].concat()));
    for key in ["edge_f1", "subject_miou"] {
        let [one, two] = [&told, &again].map(|told| told["scores"][key].as_f64().unwrap());
        assert!((one - two).abs() < 1e-12, "{key}: {one} {two}");
    }
    let done = scratch.ok(&words);
    assert!(done.out.contains("95 % interval") && done.out.contains("subject mIoU"), "{}", done.out);

    for i in [1, 4] {
        fs::remove_file(scratch.path(&format!("photos/{i}.png"))).unwrap();
    }
    let done = scratch.run(&words);
    refused(&done, "2 have none:\n  drawn/1.png\n  drawn/4.png");
    // A drawing that is no square: the source covers it, and the middle is cut out as of pairs.
    let wide = RgbImage::from_fn(64, 48, |x, y| {
        image::Rgb([(x * 3) as u8, (y * 5) as u8, if x > 30 { 255 } else { 0 }])
    });
    let middle = image::imageops::crop_imm(&wide, 0, 8, 64, 32).to_image();
    save_png(&scratch.path("photos/0.png"), &wide, &[]).unwrap();
    save_png(&scratch.path("maps/0.png"), &wide, &[]).unwrap();
    save_png(&scratch.path("drawn/0.png"), &middle, &[]).unwrap();
    let words =
        ["evaluate", "drawn/0.png", "--edges-of", "photos", "--subject-masks", "maps", "--device", "cpu"];
    let told = parsed(&scratch.run(&[&words[..], &["--json"]].concat()));
    assert_eq!(told["scores"]["edge_f1"], 1.0, "the very edges of the middle");
    let truth = Mask::of(&middle, |colour| colour != [0; 3]);
    let expected = subject_miou(&truth, &subject_mask(&middle));
    assert_eq!(told["scores"]["subject_miou"], json!(expected));
}

#[test]
fn predictions_are_scored_from_files() {
    let scratch = Scratch::new();
    for (name, content) in [
        ("truth/a.pts", "version: 1\nn_points: 2\n{\n1 1\n41 81\n}"),
        ("truth/b.json", "[[0, 0], [2, 2]]"),
        ("truth/c.json", "[[0, 0], [2, 2]]"),
        ("truth/d.json", "[[0, 0], [2, 2]]"),
        // At half the size: distances 5 and 1; 1 and 1.
        ("found/a.json", "[[3, 4], [20, 41]]"),
        ("found/b.txt", "0 1\n1 2"),
        ("found/c.json", "[]"),
        ("truth/e.json", "[]"),
        ("found/e.json", "[[1, 1]]"),
    ] {
        write(&scratch.path(name), content);
    }
    let words =
        ["evaluate", "--landmarks-truth", "truth", "--landmarks-predictions", "found", "--device", "cpu"];
    let told = parsed(&scratch.run(&[&words[..], &["--truth-scale", "0.5", "--json"]].concat()));
    assert_eq!(told["scores"]["landmark_error"], 2.0);
    assert_eq!(
        told["landmarks"],
        json!({"pictures": 5, "without_prediction": ["c", "d"], "without_truth": ["e"]})
    );
    let done = scratch.ok(&words);
    assert!(
        done.out.contains("landmarks: 2 of 5 pictures have a prediction; 1 left out: no points in the truth"),
        "{}",
        done.out
    );
    write(&scratch.path("found/b.txt"), "0 1");
    refused(&scratch.run(&words), "found/b.txt: expected 2 points as truth/b.json, found 1");
    // Before anything slow, such as reading a tower.
    refused(&scratch.run(&[&words[..], &["--clip", "nowhere"]].concat()), "found/b.txt: expected 2 points");
    refused(
        &scratch.run(&[&words[..], &["--truth-scale", "0"]].concat()),
        "--truth-scale: expected a number above 0",
    );

    let maps = root().join("tests/fixtures/conditions");
    for (folder, file) in [("t", "grey8-256.png"), ("p", "palette2-4.png")] {
        fs::create_dir(scratch.path(folder)).unwrap();
        fs::copy(maps.join(file), scratch.path(folder).join("x.png")).unwrap();
    }
    let words =
        ["evaluate", "--segmentation-truth", "t", "--segmentation-predictions", "p", "--device", "cpu"];
    let told = parsed(&scratch.run(&[&words[..], &["--json"]].concat()));
    // Predicted is the label modulo 4.
    let labels: Vec<u16> =
        map(&fixtures()["labels.maps"]).labels().iter().copied().filter(|l| *l != 255).collect();
    let right = labels.iter().filter(|label| **label < 4).count() as f64 / labels.len() as f64;
    assert_eq!(told["scores"]["seg_aacc"], json!(right));
    assert_eq!((&told["counts"]["seg_miou"], &told["segmentation"]["maps"]), (&json!(1), &json!(1)));
    // In colours: black of no class is not counted; the others are right, wrong and right.
    let colours = |name: &str, bytes: Vec<u8>| {
        save_png(&scratch.path(name), &RgbImage::from_raw(4, 1, bytes).unwrap(), &[]).unwrap();
    };
    for folder in ["ct", "cp"] {
        fs::create_dir(scratch.path(folder)).unwrap();
    }
    colours("ct/x.png", vec![0, 0, 0, 200, 0, 0, 0, 200, 0, 0, 200, 0]);
    colours("cp/x.png", vec![200, 0, 0, 200, 0, 0, 200, 0, 0, 0, 200, 0]);
    let [dark, plain] =
        [("dark", "[[200, 0, 0], [0, 200, 0], [0, 0, 0]]"), ("plain", "[[200, 0, 0], [0, 200, 0]]")]
            .map(|(name, palette)| write(&scratch.path(&format!("{name}.json")), palette));
    for (palette, right) in [(plain, 2.0 / 3.0), (dark, 2.0 / 4.0)] {
        let coloured =
            ["evaluate", "--segmentation-truth", "ct", "--segmentation-predictions", "cp", "--device", "cpu"];
        let more = ["--json", "--palette", palette.to_str().unwrap()];
        let told = parsed(&scratch.run(&[&coloured[..], &more].concat()));
        assert_eq!(told["scores"]["seg_aacc"], json!(right), "{palette:?}");
    }
    let palette = write(&scratch.path("p.json"), "[[1, 2, 3], [4, 5, 6]]");
    let done = scratch.run(&[&words[..], &["--palette", palette.to_str().unwrap()]].concat());
    refused(&done, "expected classes 0 to 1 in the truth, found ");
    fs::rename(scratch.path("p/x.png"), scratch.path("p/y.png")).unwrap();
    refused(&scratch.run(&words), "1 have none:\n  t/x.png");
    refused(&scratch.run(&["evaluate", "--segmentation-truth", "t"]), "--segmentation-predictions");
}
