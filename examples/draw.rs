//! Draws a prompt with and without an adapter: `cargo run --release --example draw -- MODEL ADAPTER PROMPT FOLDER`.

use hra::StableDiffusion;
use hra::attach::loaded::LoadedAdapter;
use hra::data::image::png::save_png;
use hra::diffusion::sample::{Request, SampleSettings, Session};
use hra::platform::observer::Silent;
use std::path::Path;
use tch::{Device, Kind};

fn main() -> anyhow::Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [model, adapter, prompt, folder] = &words[..] else {
        anyhow::bail!("expected MODEL ADAPTER PROMPT FOLDER");
    };
    std::fs::create_dir_all(folder)?;
    let model = StableDiffusion::load(Path::new(model), Kind::Float, Device::Cpu)?;
    let size = model.native_size() as u32;
    let settings = SampleSettings::square(&model, prompt, None, 20, 7.5, size)?;
    let mut session = Session::open(model, Vec::new(), None)?;
    let adapter = LoadedAdapter::read(Path::new(adapter), session.layer_names()?)?;
    session.put_on(vec![(adapter, 1.0)])?;
    for strength in [1.0, 0.5, 0.0] {
        session.scale(&[strength])?;
        let request = Request::new(&settings, &[0, 1], 2);
        for (i, picture) in session.draw(&request, &Silent)?.iter().enumerate() {
            let path = Path::new(folder).join(format!("{i}-at-{strength}.png"));
            save_png(&path, &picture.image, &[])?;
            println!("{}", path.display());
        }
    }
    Ok(())
}
