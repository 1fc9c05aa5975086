//! Landmarks: points of a face (or of anything) in files, and the picture that a model is conditioned on.

use std::path::Path;

use ::image::{Rgb, RgbImage};
use serde::Deserialize;

use crate::data::image::resize::{center_offset, short_side_size};
use crate::platform::files;
use crate::{Error, Result};

/// The longest file of points.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// A coordinate beyond this is none of a picture that can be read.
const MAX_COORDINATE: f64 = 1e6;
const WHITE: Rgb<u8> = Rgb([255; 3]);
/// A disc's radius is this share of the shorter side, 3 pixels at 512.
const DISC_SHARE: f64 = 1.0 / 170.0;

/// Number of points in iBUG's scheme of a face.
const IBUG_POINTS: usize = 68;
/// First and last point of each part of a face, and whether its ends are joined (300-W, Sagonas et al. 2013, figure 1, counted
/// from 0): jaw, brows, bridge and base of the nose, eyes, outer and inner lips.
const IBUG_PARTS: [(usize, usize, bool); 9] = [
    (0, 16, false),
    (17, 21, false),
    (22, 26, false),
    (27, 30, false),
    (31, 35, false),
    (36, 41, true),
    (42, 47, true),
    (48, 59, true),
    (60, 67, true),
];

/// A place in a picture, in pixels; (0, 0) is the middle of the upper left pixel.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    /// Columns from the left.
    pub x: f64,
    /// Rows from the top.
    pub y: f64,
}

/// Points in one of the JSON forms.
#[derive(Deserialize)]
#[serde(untagged)]
enum LandmarksJson {
    List(Vec<[f64; 2]>),
    Named {
        #[serde(alias = "points")]
        landmarks: Vec<[f64; 2]>,
    },
}

/// Reads points: an iBUG `.pts` file, whose points count from 1 and are taken to count from 0; JSON, as a list of `[x, y]` or
/// an object with such `landmarks` or `points`; or lines of `x y`.
///
/// An empty JSON list says that no face was found, and is no error.
pub fn read_points(path: &Path) -> Result<Vec<Point>> {
    let wrong = |problem: String| Error::format(path, problem);
    let bytes = files::read(path, MAX_FILE_BYTES)?;
    let text = std::str::from_utf8(&bytes)
        .map_err(|_| wrong("expected points as text, found other bytes".into()))?;
    let text = text.trim_start_matches('\u{feff}').trim();
    let points = if text.is_empty() {
        Err("expected points, found an empty file".into())
    } else if text.starts_with(['[', '{']) {
        parse_json(text)
    } else if text.starts_with("version") || text.contains('{') {
        parse_pts(text)
    } else {
        parse_lines(text.lines())
    };
    let points = points.map_err(wrong)?;
    bounded(&points).map_err(wrong)?;
    Ok(points)
}

fn bounded(points: &[Point]) -> std::result::Result<(), String> {
    let bad = |p: &&Point| !(p.x.abs() <= MAX_COORDINATE && p.y.abs() <= MAX_COORDINATE);
    match points.iter().find(bad) {
        Some(Point { x, y }) => Err(format!(
            "expected coordinates between -{MAX_COORDINATE} and {MAX_COORDINATE}, found ({x}, {y})"
        )),
        None => Ok(()),
    }
}

/// The points times `scale`. The error is a sentence: coordinates that become too large.
pub fn scaled(points: &[Point], scale: f64) -> std::result::Result<Vec<Point>, String> {
    let points: Vec<Point> = points.iter().map(|p| Point { x: p.x * scale, y: p.y * scale }).collect();
    bounded(&points).map(|()| points)
}

/// How many of the points lie in a `width` x `height` picture.
pub fn inside(points: &[Point], width: u32, height: u32) -> usize {
    let inside =
        |p: &&Point| (0.0..f64::from(width)).contains(&p.x) && (0.0..f64::from(height)).contains(&p.y);
    points.iter().filter(inside).count()
}

fn parse_json(text: &str) -> std::result::Result<Vec<Point>, String> {
    let (LandmarksJson::List(points) | LandmarksJson::Named { landmarks: points }) =
        serde_json::from_str(text).map_err(|e| {
            let where_ = if e.line() > 0 {
                format!(" (line {}, column {})", e.line(), e.column())
            } else {
                String::new()
            };
            format!("expected a JSON list of [x, y], or an object with such `landmarks` or `points`{where_}")
        })?;
    Ok(points.into_iter().map(|[x, y]| Point { x, y }).collect())
}

/// `version: 1`, `n_points: N`, and N lines in braces.
fn parse_pts(text: &str) -> std::result::Result<Vec<Point>, String> {
    let (head, rest) = text.split_once('{').ok_or("expected points between { and }, found no {")?;
    let (inside, _) = rest.split_once('}').ok_or("expected points between { and }, found no }")?;
    let points = parse_lines(inside.lines())?;
    let stated = head.lines().find_map(|line| line.trim().strip_prefix("n_points:"));
    if let Some(stated) = stated.map(str::trim)
        && stated.parse() != Ok(points.len())
    {
        return Err(format!("expected {stated} points as n_points says, found {}", points.len()));
    }
    Ok(points.into_iter().map(|Point { x, y }| Point { x: x - 1.0, y: y - 1.0 }).collect())
}

/// Two numbers a line, with spaces or a comma between; empty lines and those that begin with # are passed over.
fn parse_lines<'a>(lines: impl Iterator<Item = &'a str>) -> std::result::Result<Vec<Point>, String> {
    let mut points = Vec::new();
    for line in lines.map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let numbers: Option<Vec<f64>> = line
            .split(|c: char| c.is_whitespace() || c == ',')
            .filter(|word| !word.is_empty())
            .map(|word| word.parse().ok())
            .collect();
        match numbers.as_deref() {
            Some(&[x, y]) => points.push(Point { x, y }),
            _ => {
                let start: String = line.chars().take(60).collect();
                return Err(format!(
                    "expected two numbers `x y` in a line, found `{}`",
                    start.escape_debug()
                ));
            }
        }
    }
    if points.is_empty() { Err("expected points, found none".into()) } else { Ok(points) }
}

/// Where `points` of a `width` x `height` picture lie when its shorter side is resized to `resolution` and the middle square
/// is cut out.
pub fn square(points: &[Point], width: u32, height: u32, resolution: u32) -> Vec<Point> {
    let (wide, high) = short_side_size(width, height, resolution);
    let place = |at: f64, old: u32, new: u32| {
        (at + 0.5) * f64::from(new) / f64::from(old) - 0.5 - f64::from(center_offset(new, resolution))
    };
    points.iter().map(|p| Point { x: place(p.x, width, wide), y: place(p.y, height, high) }).collect()
}

/// White discs on black, and with 68 points the parts of a face as lines, one pixel wide. Whole pixels, no grey between; what
/// lies outside is cut off.
pub fn draw(points: &[Point], width: u32, height: u32) -> RgbImage {
    let mut picture = RgbImage::new(width, height);
    let radius = (f64::from(width.min(height)) * DISC_SHARE).round().max(1.0) as i64;
    let pixels: Vec<(i64, i64)> = points.iter().map(|p| (p.x.round() as i64, p.y.round() as i64)).collect();
    for &(x, y) in &pixels {
        for (dx, dy) in (-radius..=radius).flat_map(|dx| (-radius..=radius).map(move |dy| (dx, dy))) {
            if dx * dx + dy * dy <= radius * radius {
                dot(&mut picture, x + dx, y + dy);
            }
        }
    }
    if pixels.len() == IBUG_POINTS {
        for (first, last, closed) in IBUG_PARTS {
            let part = &pixels[first..=last];
            part.windows(2).for_each(|ends| line(&mut picture, ends[0], ends[1]));
            if closed {
                line(&mut picture, part[part.len() - 1], part[0]);
            }
        }
    }
    picture
}

fn dot(picture: &mut RgbImage, x: i64, y: i64) {
    if (0..i64::from(picture.width())).contains(&x) && (0..i64::from(picture.height())).contains(&y) {
        picture.put_pixel(x as u32, y as u32, WHITE);
    }
}

/// A pixel in each column, or row where the line is steep, at the nearest whole place.
fn line(picture: &mut RgbImage, (x, y): (i64, i64), (to_x, to_y): (i64, i64)) {
    let (wide, high) = (to_x - x, to_y - y);
    let steps = wide.abs().max(high.abs()).max(1);
    // Ends may be far outside: only the steps in the picture's columns, or rows, are taken. Each is one pixel long.
    let (start, ahead, side) = if wide.abs() == steps {
        (x, wide > 0, i64::from(picture.width()))
    } else {
        (y, high > 0, i64::from(picture.height()))
    };
    let (first, last) = if ahead { (-start, side - 1 - start) } else { (start - side + 1, start) };
    // Integers, so that every machine draws the same: rounds i * length / steps, halves upwards.
    let share = |length: i64, i: i64| {
        let [length, i, steps] = [length, i, steps].map(i128::from);
        (2 * i * length + steps).div_euclid(2 * steps) as i64
    };
    for i in first.max(0)..=last.min(steps) {
        dot(picture, x + share(wide, i), y + share(high, i));
    }
}
