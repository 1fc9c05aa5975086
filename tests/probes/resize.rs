//! Resizes one image file, so that `tests/python` can compare this crate with Pillow.
//!
//! `resize IN OUT.png WIDTHxHEIGHT|short:SIZE|center:SIZE|same FILTER [KEYWORD=TEXT ..]`

use std::path::Path;

use anyhow::{Context, bail};
use hra::data::image::{Filter, center_crop, load_rgb, resize, resize_short_side, save_png};

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [input, output, size, filter, text @ ..] = &arguments[..] else {
        bail!("usage: resize IN OUT.png WIDTHxHEIGHT|short:SIZE|center:SIZE|same FILTER [KEYWORD=TEXT ..]");
    };
    let known = Filter::ALL.iter().find(|(name, _)| name == filter);
    let (_, filter) = known.with_context(|| format!("no filter is called {filter}"))?;
    let image = load_rgb(Path::new(input))?;
    let image = if size == "same" {
        image
    } else if let Some(short) = size.strip_prefix("short:") {
        resize_short_side(&image, short.parse()?, *filter)
    } else if let Some(side) = size.strip_prefix("center:") {
        center_crop(&image, side.parse()?)
    } else {
        let (width, height) = size.split_once('x').context("expected WIDTHxHEIGHT")?;
        resize(&image, width.parse()?, height.parse()?, *filter)
    };
    let text = text.iter().map(|pair| pair.split_once('=').context("expected KEYWORD=TEXT"));
    let text = text.map(|pair| pair.map(|(k, t)| (k.to_string(), t.to_string())));
    save_png(Path::new(output), &image, &text.collect::<anyhow::Result<Vec<_>>>()?)?;
    Ok(())
}
