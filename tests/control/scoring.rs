//! `hra evaluate` of control as a user runs it: pictures against their conditions, and files of predictions.
//! tests/python/test_conditions.py has the scores by numpy.

use crate::conditions::{fixtures, map, write};
use crate::prepare::{parsed, refused};
use crate::support::base::root;
use crate::support::scratch::Scratch;
use hra::data::image::{Mask, RgbImage, Thresholds, canny, save_png};
use hra::lab::evaluate::control::{overlap, subject_mask, subject_miou};
use serde_json::json;
use std::collections::BTreeMap;
use std::fs;

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
