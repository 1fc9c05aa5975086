//! `hra prepare` as a user runs it: conditions of folders of pictures, maps and points, and what is skipped or refused.

use crate::conditions::{points, write};
use crate::support::finished::Finished;
use crate::support::scratch::Scratch;
use hra::data::image::landmarks;
use hra::data::image::{RgbImage, Thresholds, canny, load_rgb, save_png};
use serde_json::{Value, json};
use std::fs;

pub fn refused(done: &Finished, part: &str) {
    assert_eq!(done.code, 2, "{}", done.err);
    assert!(done.err.contains(part) && !done.err.contains("panicked"), "expected `{part}` in: {}", done.err);
}

pub fn parsed(done: &Finished) -> Value {
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
