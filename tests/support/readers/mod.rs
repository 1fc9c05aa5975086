//! Every reader of a file that comes from somewhere else, as `fn(scratch, input)`: what it says of the input is ignored,
//! only that it comes back counts. `tests/formats/fuzz.rs` runs them on a bounded corpus, `tests/fuzz/` under libFuzzer.
//!
//! Readers of several files take them in one input, with [`SEPARATOR`] between them.

mod adapters;
mod lab;
mod models;
mod pictures;
mod runs;

pub use adapters::{adapter, full_unet, lora_file, merge};
pub use lab::{comparison, dreambooth, lpips, plan, record, task};
pub use models::{
    checkpoint, control_encoder, controlnet, scheduler, shards, text_config, text_encoder, tokenizer, unet,
    unet_config, vae, vae_config, vocabulary,
};
pub use pictures::{clip, label_map, pairs, palette, picture, points, vit};
pub use runs::{class_images, latents, make_classes, run, train_config};

use hra::platform::hub::Wanted;
use hra::platform::hub::choice::choose;
use hra::weights::part::Text;
use hra::weights::tensor_file::TensorFile;
use std::path::{Component, Path, PathBuf};
use tch::Kind;

/// Between the files of one input.
pub const SEPARATOR: &[u8] = b"\n=====\n";

/// Reads `input`, putting files into `scratch` where the reader wants a path.
pub type Reader = fn(scratch: &Path, input: &[u8]);

/// All of them by name.
pub const READERS: [(&str, Reader); 37] = [
    ("tensor_file", tensor_file),
    ("adapter", adapter),
    ("merge", merge),
    ("lora_file", lora_file),
    ("full_unet", full_unet),
    ("unet_config", unet_config),
    ("vae_config", vae_config),
    ("text_config", text_config),
    ("unet", unet),
    ("vae", vae),
    ("text_encoder", text_encoder),
    ("scheduler", scheduler),
    ("tokenizer", tokenizer),
    ("vocabulary", vocabulary),
    ("checkpoint", checkpoint),
    ("train_config", train_config),
    ("run", run),
    ("shards", shards),
    ("picture", picture),
    ("points", points),
    ("palette", palette),
    ("label_map", label_map),
    ("hub_id", hub_id),
    ("clip", clip),
    ("vit", vit),
    ("pairs", pairs),
    ("comparison", comparison),
    ("plan", plan),
    ("record", record),
    ("task", task),
    ("dreambooth", dreambooth),
    ("lpips", lpips),
    ("controlnet", controlnet),
    ("control_encoder", control_encoder),
    ("class_images", class_images),
    ("latents", latents),
    ("hub_listing", hub_listing),
];

/// Several files as one input.
pub fn join(files: &[Vec<u8>]) -> Vec<u8> {
    files.join(SEPARATOR)
}

/// All files of an input.
pub fn parts(input: &[u8]) -> Vec<Vec<u8>> {
    let (mut found, mut rest) = (Vec::new(), input);
    while let Some(at) = rest.windows(SEPARATOR.len()).position(|window| window == SEPARATOR) {
        found.push(rest[..at].to_vec());
        rest = &rest[at + SEPARATOR.len()..];
    }
    found.push(rest.to_vec());
    found
}

/// The first `N` files of an input; empty ones for those that it lacks.
fn split<const N: usize>(input: &[u8]) -> [&[u8]; N] {
    let mut rest = Some(input);
    std::array::from_fn(|i| {
        let Some(all) = rest.take() else { return &[][..] };
        let at = all.windows(SEPARATOR.len()).position(|window| window == SEPARATOR);
        match at.filter(|_| i + 1 < N) {
            Some(at) => {
                rest = Some(&all[at + SEPARATOR.len()..]);
                &all[..at]
            }
            None => all,
        }
    })
}

/// Writes a file below `scratch` that may be missing: no content, no file.
fn put_some(scratch: &Path, name: &str, content: &[u8]) {
    if !content.is_empty() {
        put(scratch, name, content);
    }
}

/// Writes a file below `scratch`.
fn put(scratch: &Path, name: &str, content: &[u8]) {
    let path = scratch.join(name);
    std::fs::create_dir_all(path.parent().expect("below scratch")).expect("scratch can be written");
    std::fs::write(path, content).expect("scratch can be written");
}

fn text(scratch: &Path, input: &[u8]) -> Text {
    Text { content: String::from_utf8_lossy(input).into_owned(), path: scratch.join("config.json") }
}

/// A safetensors file, read whole in every way.
pub fn tensor_file(scratch: &Path, input: &[u8]) {
    put(scratch, "x.safetensors", input);
    let path = scratch.join("x.safetensors");
    let Ok(file) = TensorFile::open(&path) else { return };
    let _ = file.texts();
    for name in file.names() {
        let _ = (file.shape(&name), file.is_float(&name), file.dtype(&name), file.text(&name));
        let _ = file.read(&name);
        let _ = file.read_as(&name, Kind::Float);
        let _ = file.read_rows(&name, 2, 3);
        let _ = file.first_bytes(&name, 1, 3, 256);
    }
}

/// A fixture, from the main package or from tests/fuzz.
fn fixture(name: &str) -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let found = [here.join("tests/fixtures"), here.join("../fixtures")].into_iter().find(|dir| dir.is_dir());
    found.expect("fixtures are in tests/fixtures").join(name)
}

/// The small model that Python wrote.
fn pipeline() -> PathBuf {
    fixture("cases/sd15/pipeline")
}

/// What a user or a config may give as a hub id: whatever it is, it names one folder of the cache.
pub fn hub_id(_: &Path, input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    let word = Path::new(&*text);
    let _ = hra::platform::hub::repository_of(word);
    if hra::platform::hub::is_id(word) {
        let (name, revision) = text.split_once('@').unwrap_or((&text, "main"));
        assert_eq!(name.split('/').count(), 2, "{text:?}");
        let mut parts = name.split('/').chain(revision.split('/'));
        assert!(parts.all(|part| !part.is_empty() && !part.starts_with('.')), "{text:?}");
    }
}

/// What a hub says of a repository: whatever the names are, those that are taken lie inside of it.
pub fn hub_listing(_: &Path, input: &[u8]) {
    let Ok(listing) = serde_json::from_slice::<serde_json::Value>(input) else { return };
    let siblings = listing["siblings"].as_array().into_iter().flatten();
    let names = siblings.filter_map(|file| file["rfilename"].as_str()).map(String::from).collect();
    for wanted in [Wanted::Model, Wanted::Adapter, Wanted::Tower, Wanted::ControlNet, Wanted::Vae] {
        let Ok(choice) = choose(&names, wanted) else { continue };
        let plain = |path: &Path| path.components().all(|part| matches!(part, Component::Normal(_)));
        assert!(plain(&choice.entry), "{:?}", choice.entry);
        for name in &choice.files {
            assert!(plain(Path::new(name)) && !name.is_empty() && !name.contains('\\'), "{name:?}");
        }
    }
}
