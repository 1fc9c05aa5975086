//! Pairs of picture and condition: the forms of their tables, what makes a pair bad, and that both are cut alike.

use std::fs;
use std::path::PathBuf;

use hra::data::image::edges::{Thresholds, canny};
use hra::data::image::{Filter, RgbImage, center_crop, resize, resize_nearest, resize_short_side, save_png};
use hra::data::pairs::{ConditionKind, ConditionSource, PairFolder, PairSettings, shuffled};
use hra::data::{Crop, Window};
use hra::platform::observer::Silent;
use hra::{Error, ErrorKind};
use tempfile::TempDir;

/// `width` x `height` pixels that tell their place.
fn picture(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| [x as u8, y as u8, (x / 4 + y) as u8].into())
}

/// A map of two classes, red and blue.
fn map(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| if (x * y) % 7 < 3 { [255, 0, 0] } else { [0, 0, 255] }.into())
}

struct Set(TempDir);

impl Set {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn at(&self, name: &str) -> PathBuf {
        let path = self.0.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        path
    }

    fn picture(&self, name: &str, image: &RgbImage) -> &Self {
        save_png(&self.at(name), image, &[]).unwrap();
        self
    }

    fn text(&self, name: &str, text: &str) -> &Self {
        fs::write(self.at(name), text).unwrap();
        self
    }

    fn read(&self, settings: &PairSettings) -> PairFolder {
        PairFolder::read(self.0.path(), settings, &Silent).unwrap()
    }

    /// What is told where nothing can be used.
    fn refused(&self, name: &str, settings: &PairSettings) -> String {
        PairFolder::read(&self.0.path().join(name), settings, &Silent).unwrap_err().to_string()
    }
}

/// Two pictures `a.png` and `sub/b.png` of 40 x 30 with conditions `c/a.png` and `c/b.png`.
fn two() -> Set {
    let set = Set::new();
    set.picture("a.png", &picture(40, 30)).picture("sub/b.png", &picture(40, 30));
    set.picture("c/a.png", &map(40, 30)).picture("c/b.png", &map(40, 30));
    set
}

fn kind(condition: ConditionKind) -> PairSettings {
    PairSettings { condition, ..PairSettings::default() }
}

/// Name, caption and file of the condition of each pair.
fn rows(pairs: &PairFolder) -> Vec<(&str, &str, String)> {
    let file = |source: &ConditionSource| match source {
        ConditionSource::Made => "made".to_string(),
        ConditionSource::Picture { path, .. }
        | ConditionSource::Labels { path, .. }
        | ConditionSource::Points { path, .. } => path.file_name().unwrap().to_str().unwrap().to_string(),
    };
    pairs.pairs().iter().map(|p| (p.name.as_str(), p.caption.as_str(), file(&p.condition))).collect()
}

#[test]
fn every_form_gives_the_same_pairs() {
    let forms = [
        (
            "metadata.jsonl",
            "\u{feff}{\"file_name\": \"a.png\", \"text\": \"one, \\\"two\\\"\", \"conditioning_image\": \"c/a.png\"}\r\n\r\n\
             {\"conditioning_image\": \"c/b.png\", \"extra\": [1], \"text\": \"three\", \"file_name\": \"sub/b.png\"}\r\n",
        ),
        (
            "metadata.csv",
            "\u{feff}file_name,text,conditioning_image\r\na.png,\"one, \"\"two\"\"\",c/a.png\r\n\"sub/b.png\",three,c/b.png\r\n",
        ),
        (
            "fill.json",
            "{\"source\": \"c/a.png\", \"target\": \"a.png\", \"prompt\": \"one, \\\"two\\\"\"}\n\
             {\"source\": \"c/b.png\", \"target\": \"sub/b.png\", \"prompt\": \"three\"}",
        ),
        (
            "array.json",
            "[{\"source\": \"c/a.png\", \"target\": \"a.png\", \"prompt\": \"one, \\\"two\\\"\"},\n \
             {\"image\": \"sub/b.png\", \"prompt\": \"three\", \"conditioning_image\": \"c/b.png\"}]",
        ),
    ];
    let expected =
        [("a.png", "one, \"two\"", "a.png".to_string()), ("sub/b.png", "three", "b.png".to_string())];
    for (name, text) in forms {
        let set = two();
        set.text(name, text);
        let given = if name.starts_with("metadata") { set.0.path().into() } else { set.at(name) };
        let pairs = PairFolder::read(&given, &kind(ConditionKind::Other), &Silent).unwrap();
        assert_eq!(rows(&pairs), expected, "{name}");
        assert_eq!(pairs.bad(), [], "{name}");
        assert_eq!(pairs.caption(1), "three");
        assert_eq!((pairs.pairs()[0].width, pairs.pairs()[0].height), (40, 30));
    }
}

#[test]
fn columns_may_have_other_names() {
    let set = two();
    set.text("t.csv", "text,file,words,edges\nno,a.png,yes,c/a.png\n");
    let settings = PairSettings {
        image_column: "file".into(),
        caption_column: "words".into(),
        conditioning_image_column: "edges".into(),
        ..PairSettings::default()
    };
    let pairs = PairFolder::read(&set.at("t.csv"), &settings, &Silent).unwrap();
    assert_eq!(rows(&pairs), [("a.png", "yes", "a.png".to_string())]);
    // A name that was given is not guessed around.
    let told = set.refused("t.csv", &PairSettings { image_column: "picture".into(), ..settings.clone() });
    assert!(
        told.contains("line 2: expected a column `picture`, found text, file, words, edges\nhint: "),
        "{told}"
    );
    let told = set.refused("t.csv", &PairSettings { conditioning_image_column: "x".into(), ..settings });
    assert!(told.contains("line 2, a.png: condition: expected a file, found none named"), "{told}");
}

#[test]
fn captions_may_be_lists_or_nothing() {
    let set = two();
    let row = |text: &str| {
        format!("{{\"file_name\": \"a.png\", \"text\": {text}, \"conditioning_image\": \"c/a.png\"}}\n")
    };
    let texts = ["[\"first\", \"second\"]", "[\"only\"]", "null", "[]", "\" \"", "3", "[3]", "{}"];
    set.text("metadata.jsonl", &texts.map(row).concat());
    let pairs = set.read(&kind(ConditionKind::Other));
    let captions: Vec<&str> = pairs.pairs().iter().map(|p| p.caption.as_str()).collect();
    assert_eq!(captions, ["first", "only", "", "", ""]);
    let reasons: Vec<&str> = pairs.bad().iter().map(|bad| bad.reason.as_str()).collect();
    assert_eq!(
        reasons,
        [
            "expected a text as caption, found a number",
            "expected texts as captions, found a number",
            "expected a text as caption, found an object"
        ]
    );
    let report = pairs.report(Some(32));
    for words in [
        ": 5 pairs used, 3 bad\n  conditions: other; 5 pictures\n",
        "\n  5 pairs with a picture smaller than 32 pixels, which is enlarged\n",
        "\n  3 pairs without a caption\n",
        "\n  1 pair with several captions, of which the first is used\n",
        "\n  4 pairs with the picture of another pair\n",
        "\n  bad  line 6: expected a text as caption, found a number\n",
    ] {
        assert!(report.contains(words), "{words} is not in\n{report}");
    }
}

#[test]
fn bad_pairs_are_told_and_the_others_used() {
    let set = two();
    set.text("no.png", "text").picture("wide.png", &map(60, 30)).picture("strip.png", &picture(2, 90));
    set.picture("near.png", &map(80, 61)).picture("half.png", &map(20, 15));
    let whole = fs::read(set.at("a.png")).unwrap();
    fs::write(set.at("cut.png"), &whole[..whole.len() / 2]).unwrap();
    let pair = |image: &str, condition: &str| {
        format!("{{\"file_name\": \"{image}\", \"text\": \"x\", \"conditioning_image\": {condition}}}")
    };
    // Each with its reason; an empty one is a good pair.
    let lines = [
        (pair("a.png", "\"c/a.png\""), ""),
        (pair("a.png", "\"half.png\""), ""),
        (pair("a.png", "\"near.png\""), ""),
        (pair("gone.png", "\"c/a.png\""), "line 4, gone.png: picture: cannot read: No such file"),
        (
            pair("no.png", "\"c/a.png\""),
            "line 5, no.png: picture: expected a PNG, JPEG, WebP, BMP or TIFF image, found text",
        ),
        (pair("cut.png", "\"c/a.png\""), "line 6, cut.png: picture: broken or truncated PNG image"),
        (pair("sub", "\"c/a.png\""), "line 7, sub: picture: expected a file, found a folder"),
        (pair("strip.png", "\"c/a.png\""), "line 8, strip.png: picture: a strip of 2x90 pixels"),
        (pair("a.png", "\"gone.png\""), "line 9, a.png: condition gone.png: cannot read: No such file"),
        (pair("a.png", "\"cut.png\""), "line 10, a.png: condition cut.png: broken or truncated PNG image"),
        (
            pair("a.png", "\"wide.png\""),
            "line 11, a.png: condition wide.png: expected the aspect of the picture, 40x30, found 60x30",
        ),
        (pair("a.png", "null"), "line 12, a.png: condition: expected a file, found none named"),
        (pair("a.png", "\"\""), "line 13, a.png: condition: expected a file, found none named"),
        (pair("a.png", "7"), "line 14: expected a file name as condition, found a number"),
        (pair("", "\"c/a.png\""), "line 15: expected a file name as picture, found an empty text"),
        ("{\"file_name\": \"a.png\"".into(), "line 16: broken JSON: "),
        (
            "{\"file_name\": \"a.png\", \"conditioning_image\": \"c/a.png\"}".into(),
            "line 17: expected a column `text`, found file_name, conditioning_image",
        ),
        (
            "{\"text\": \"x\", \"text\": \"y\", \"file_name\": \"a.png\"}".into(),
            "line 18: `text` is there more than once",
        ),
        (
            "[1]".into(),
            "line 19: broken JSON: invalid type: sequence, expected an object with a picture and a caption",
        ),
        ("{}".into(), "line 20: expected a column `file_name`, found none"),
    ];
    let text: Vec<&str> = lines.iter().map(|(line, _)| line.as_str()).collect();
    set.text("metadata.jsonl", &text.join("\n"));
    let pairs = set.read(&kind(ConditionKind::Other));
    let told: Vec<String> = pairs.bad().iter().map(|bad| format!("{}: {}", bad.name, bad.reason)).collect();
    let expected: Vec<&str> = lines.iter().map(|(_, reason)| *reason).filter(|r| !r.is_empty()).collect();
    assert_eq!(told.len(), expected.len(), "{told:#?}");
    for (told, expected) in told.iter().zip(expected) {
        assert!(told.starts_with(expected), "expected {expected}, found {told}");
    }
    assert_eq!(pairs.pairs().len(), 3);
    assert!(pairs.report(Some(16)).contains(": 3 pairs used, 17 bad\n"), "{}", pairs.report(Some(16)));
}

#[test]
fn tables_that_cannot_be_trusted_are_refused() {
    let set = two();
    let default = PairSettings::default();
    let missing = set.refused("nowhere", &default);
    assert!(
        missing.contains("found nothing at") && missing.contains("\nhint: paths are relative"),
        "{missing}"
    );
    assert!(set.refused("a.png", &default).contains("found another kind of file"));
    assert!(
        set.refused("", &default).contains("expected a table of pairs, found none\nhint: put metadata.jsonl")
    );
    set.text("train/metadata.csv", "file_name,text\n");
    let deeper = set.refused("", &default);
    assert!(deeper.contains("/train has one: give that"), "{deeper}");
    assert!(
        set.refused("train", &default)
            .contains("metadata.csv: expected pairs of picture and condition, found an empty table")
    );
    set.text("train/metadata.jsonl", "{}");
    assert!(set.refused("train", &default).contains("found metadata.jsonl and metadata.csv\nhint: "));
    set.text("parquet/metadata.parquet", "PAR1");
    assert!(
        set.refused("parquet", &default)
            .contains("metadata.parquet cannot be read: write it as metadata.jsonl")
    );
    set.text("e.jsonl", "\n\n").text("b.json", "[{\"image\": \"a.png\"").text("n.json", "[3]");
    assert!(set.refused("e.jsonl", &default).contains("found an empty table"));
    assert!(set.refused("b.json", &default).contains("b.json: broken JSON: EOF"));
    assert!(set.refused("n.json", &default).contains("expected an object with a picture and a caption"));
    fs::write(set.at("l.csv"), b"file_name,text\n\xe9.png,x\n").unwrap();
    assert!(set.refused("l.csv", &default).contains("expected UTF-8 text, found another byte at offset 15"));
    // A quote that is never closed would swallow the pairs after it.
    set.text(
        "q.csv",
        "file_name,text,conditioning_image\na.png,x,c/a.png\na.png,\"y,c/a.png\na.png,z,c/a.png\n",
    );
    assert!(set.refused("q.csv", &default).contains("a quote that line 3 opens is never closed"));
    set.text("f.csv", "file_name,text,conditioning_image\na.png,x\na.png,5\" wide,c/a.png\na.png,\"of\ntwo lines\",c/a.png,d\n");
    let pairs = PairFolder::read(&set.at("f.csv"), &default, &Silent).unwrap();
    assert_eq!(rows(&pairs), [("a.png", "5\" wide", "a.png".to_string())]);
    let bad: Vec<String> = pairs.bad().iter().map(|bad| format!("{}: {}", bad.name, bad.reason)).collect();
    assert_eq!(bad, ["line 2: expected 3 fields, found 2", "line 4: expected 3 fields, found 4"]);
    set.text("g.csv", "file_name,text\n").text("o.csv", "\"file_name,text\na.png,x\n");
    assert!(set.refused("g.csv", &default).contains("found an empty table"));
    assert!(set.refused("o.csv", &default).contains("found an empty table"));
    set.text("h.csv", "file_name,text,text\na.png,x,y\n");
    assert!(set.refused("h.csv", &default).contains("line 2: `text` is there more than once"));
}

#[test]
fn none_that_can_be_used_is_an_error_with_reasons() {
    let set = two();
    let line = "{\"target\": \"gone.png\", \"source\": \"c/a.png\", \"prompt\": \"\"}\n";
    set.text("t.jsonl", &line.repeat(25));
    let told = match PairFolder::read(&set.at("t.jsonl"), &PairSettings::default(), &Silent) {
        Err(e @ Error { kind: ErrorKind::Data(_), .. }) => e.to_string(),
        other => panic!("{other:?}"),
    };
    assert!(
        told.contains("t.jsonl: no pair that can be used\n  line 1, gone.png: picture: cannot read"),
        "{told}"
    );
    assert!(told.contains("\n  line 20, ") && !told.contains("line 21"), "{told}");
    assert!(
        told.ends_with("\n  and 5 more\nhint: paths in a table are relative to the folder it lies in"),
        "{told}"
    );
}

#[test]
fn settings_that_contradict_each_other_are_refused() {
    let set = two();
    set.text("metadata.csv", "file_name,text\na.png,x\n").text("palette.json", "{\"a\": [0, 0, 0]}");
    let made = PairSettings { make_conditions: true, ..kind(ConditionKind::Segmentation) };
    assert!(
        set.refused("", &made)
            .contains("make_conditions: expected condition = \"canny\", found \"segmentation\"")
    );
    let palette = PairSettings { palette: Some(set.at("palette.json")), ..kind(ConditionKind::Canny) };
    assert!(
        set.refused("", &palette).contains("palette: expected condition = \"segmentation\", found \"canny\"")
    );
}

#[test]
fn edges_are_made_of_the_square_that_is_shown() {
    let set = two();
    set.picture("a.png", &map(40, 30));
    set.text("metadata.csv", "file_name,text,conditioning_image\na.png,x,\nsub/b.png,y,c/b.png\n");
    let thresholds = Thresholds { low: 300.0, high: 600.0 };
    let settings = PairSettings { thresholds, ..kind(ConditionKind::Canny) };
    let pairs = set.read(&settings);
    assert_eq!(rows(&pairs).iter().map(|row| row.2.as_str()).collect::<Vec<_>>(), ["made", "b.png"]);
    assert!(pairs.report(Some(16)).contains("\n  conditions: canny; 1 made from the pictures, 1 pictures"));
    let window = pairs.crop_window(0, 24, Crop::Random(3));
    let (shown, edges) = pairs.prepare(0, 24, window).unwrap();
    assert!(edges == canny(&shown, thresholds).to_rgb());
    assert!(edges != canny(&shown, Thresholds::default()).to_rgb(), "the thresholds count");
    // Made even where the pairs name files.
    let all = set.read(&PairSettings { make_conditions: true, ..settings });
    assert_eq!(all.pairs()[1].condition, ConditionSource::Made);
}

#[test]
fn both_pictures_are_cut_by_the_same_window() {
    let set = Set::new();
    // The condition tells the place as the picture does, at half its size.
    set.picture("a.png", &picture(100, 60)).picture("c.png", &resize(&picture(100, 60), 50, 30, Filter::Box));
    set.text("metadata.csv", "file_name,text,conditioning_image\na.png,x,c.png\n");
    let pairs = set.read(&kind(ConditionKind::Other));
    assert_eq!(pairs.window_count(0, 48), 80 - 48 + 1);
    let whole = resize_short_side(&picture(100, 60), 48, Filter::Bilinear);
    let mut seen = std::collections::BTreeSet::new();
    for draw in 0..40 {
        let window = pairs.crop_window(0, 48, Crop::Random(draw));
        let (picture, condition) = pairs.prepare(0, 48, window).unwrap();
        assert_eq!(picture.get_pixel(0, 0), whole.get_pixel(window.x, 0));
        for (a, b) in picture.pixels().zip(condition.pixels()) {
            let off = a.0.iter().zip(b.0).map(|(a, b)| a.abs_diff(b)).max().unwrap();
            assert!(off <= 2, "{off}: the condition is of another place");
        }
        seen.insert(window.x);
    }
    assert!(seen.len() > 20, "windows vary: {seen:?}");
    let middle = pairs.crop_window(0, 48, Crop::Center);
    assert!(pairs.prepare(0, 48, middle).unwrap().0 == center_crop(&whole, 48));
    set.picture("c.png", &picture(10, 6));
    let told = pairs.prepare(0, 24, Window { x: 0, y: 0 }).unwrap_err().to_string();
    assert!(told.contains("c.png: expected 50x30 pixels as at the start, found 10x6"), "{told}");
}

#[test]
fn segmentation_maps_keep_their_colours() {
    let set = Set::new();
    set.picture("a.png", &picture(90, 60)).picture("c.png", &map(90, 60));
    set.text("metadata.csv", "file_name,text,conditioning_image\na.png,x,c.png\n");
    let colours = |kind| {
        let pairs = set.read(&self::kind(kind));
        let window = pairs.crop_window(0, 32, Crop::Center);
        let (_, condition) = pairs.prepare(0, 32, window).unwrap();
        let colours: std::collections::BTreeSet<_> = condition.pixels().map(|p| p.0).collect();
        (colours.len(), condition)
    };
    let (count, condition) = colours(ConditionKind::Segmentation);
    assert_eq!(count, 2);
    assert!(condition == center_crop(&resize_nearest(&map(90, 60), 48, 32), 32));
    assert!(colours(ConditionKind::Other).0 > 2, "a mean of two colours is another one");
}

#[test]
fn maps_of_class_numbers_are_coloured_by_the_palette() {
    let set = two();
    let labels = hra::data::image::RgbImage::from_fn(40, 30, |x, _| [(x / 20) as u8; 3].into());
    let gray = ::image::DynamicImage::ImageRgb8(labels).to_luma8();
    gray.save(set.at("labels.png")).unwrap();
    ::image::GrayImage::from_pixel(40, 30, ::image::Luma([2])).save(set.at("outside.png")).unwrap();
    set.text("palette.json", "{\"background\": [0, 0, 0], \"dog\": [9, 200, 7]}");
    set.text(
        "metadata.csv",
        "file_name,text,conditioning_image\na.png,x,labels.png\na.png,y,c/a.png\na.png,z,outside.png\n",
    );
    let settings =
        PairSettings { palette: Some(set.at("palette.json")), ..kind(ConditionKind::Segmentation) };
    let pairs = set.read(&settings);
    assert!(matches!(pairs.pairs()[0].condition, ConditionSource::Labels { .. }));
    assert!(
        matches!(pairs.pairs()[1].condition, ConditionSource::Picture { .. }),
        "colours stay as they are"
    );
    assert!(
        pairs.bad()[0].name == "line 4, a.png" && pairs.bad()[0].reason.contains('2'),
        "{:?}",
        pairs.bad()
    );
    let (_, condition) = pairs.at_size(0, 40, 30).unwrap();
    let expected = RgbImage::from_fn(40, 30, |x, _| if x < 20 { [0, 0, 0] } else { [9, 200, 7] }.into());
    assert!(condition == expected);
    assert!(pairs.report(Some(30)).contains("segmentation; 1 coloured by the palette, 1 pictures"));
}

#[test]
fn points_are_drawn_where_they_are_in_the_picture() {
    let set = two();
    set.text("points.json", "[[10, 5], [30, 25]]").text("broken.json", "[[10, ").text("none.json", "[]");
    set.text("far.json", "[[40, 5], [3, 30]]").text("partly.json", "[[39, 29], [40, 29]]");
    set.text(
        "metadata.csv",
        "file_name,text,conditioning_image\na.png,x,points.json\na.png,y,broken.json\na.png,z,c/a.png\na.png,n,none.json\n\
         a.png,f,far.json\na.png,p,partly.json\n",
    );
    let pairs = set.read(&kind(ConditionKind::Landmarks));
    assert_eq!(pairs.bad().len(), 3);
    assert_eq!(
        pairs.bad()[2].reason,
        "condition far.json: expected points in the picture of 40x30, found 2 outside"
    );
    let told = pairs.report(Some(30));
    assert!(told.contains("\n  1 pair with points outside the picture, which are not drawn"), "{told}");
    assert_eq!(pairs.bad()[1].reason, "condition none.json: expected points, found none");
    assert!(
        pairs.bad()[0].name == "line 3, a.png"
            && pairs.bad()[0].reason.starts_with("condition broken.json: ")
    );
    assert!(pairs.report(Some(30)).contains("landmarks; 2 drawn from points, 1 pictures"));
    // At twice the size, the middle of pixel 10 is between pixels 20 and 21.
    let (_, condition) = pairs.at_size(0, 80, 60).unwrap();
    for (x, y, white) in [(20, 11, true), (61, 51, true), (40, 11, false)] {
        assert_eq!(condition.get_pixel(x, y).0 == [255; 3], white, "{x} {y}");
    }
    let window = pairs.crop_window(0, 60, Crop::Random(20 << 32 | 20));
    assert_eq!(window, Window { x: 20, y: 0 });
    let (_, cut) = pairs.prepare(0, 60, window).unwrap();
    assert_eq!(cut.get_pixel(41, 51).0, [255; 3]);
}

#[test]
fn sampling_sizes_are_covered_and_cut_in_the_middle() {
    let set = two();
    set.text("metadata.csv", "file_name,text,conditioning_image\na.png,x,c/a.png\n");
    let pairs = set.read(&kind(ConditionKind::Segmentation));
    for (size, resized) in
        [((40, 30), (40, 30)), ((64, 64), (85, 64)), ((64, 24), (64, 48)), ((20, 15), (20, 15))]
    {
        let (picture, condition) = pairs.at_size(0, size.0, size.1).unwrap();
        assert_eq!([picture.dimensions(), condition.dimensions()], [size; 2]);
        let whole = resize_nearest(&map(40, 30), resized.0, resized.1);
        let at = |length: u32, size: u32| (f64::from(length - size) / 2.0).round_ties_even() as u32;
        let corner = (at(resized.0, size.0), at(resized.1, size.1));
        assert_eq!(condition.get_pixel(0, 0), whole.get_pixel(corner.0, corner.1), "{size:?}");
    }
}

#[test]
fn edges_that_would_be_shrunk_are_told() {
    let set = two();
    set.text("metadata.csv", "file_name,text,conditioning_image\na.png,x,c/a.png\nsub/b.png,y,\n");
    let pairs = set.read(&kind(ConditionKind::Canny));
    let note = "\n  1 pair with edges larger than 29 pixels";
    assert!(pairs.report(Some(29)).contains(note), "{}", pairs.report(Some(29)));
    for told in
        [pairs.report(Some(30)), pairs.report(None), set.read(&kind(ConditionKind::Other)).report(Some(8))]
    {
        assert!(!told.contains("edges larger"), "{told}");
    }
}

#[test]
fn shuffled_pairs_are_of_other_pictures() {
    assert_eq!(shuffled(&["a", "b", "c"]), [1, 2, 0]);
    assert_eq!(shuffled(&["a", "a", "b", "a"]), [2, 2, 3, 2]);
    for same in [&[][..], &["a"], &["a", "a"]] {
        assert!(shuffled(same).is_empty(), "{same:?}");
    }
}
