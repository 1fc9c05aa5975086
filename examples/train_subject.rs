//! Trains HRA on a subject's pictures: `cargo run --release --example train_subject -- MODEL PICTURES RUN [STEPS]`.

use hra::platform::observer::{Event, Observer};
use hra::train::config::TrainConfig;
use hra::train::train;

/// Hears how the training goes.
struct Losses;

impl Observer for Losses {
    fn tell(&self, event: Event) {
        match event {
            Event::Metrics(record) => println!("step {}: loss {}", record["step"], record["loss"]),
            Event::Warning(text) => eprintln!("warning: {text}"),
            _ => {}
        }
    }
}

fn main() -> anyhow::Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [model, pictures, run, steps @ ..] = &words[..] else {
        anyhow::bail!("expected MODEL PICTURES RUN [STEPS]");
    };
    let mut settings = toml::toml! {
        instance_prompt = "a photo of sks cat"
        method = "hra"
        rank = 8
        learning_rate = 3e-3
        log_every = 1
    };
    settings.insert("pretrained_model_name_or_path".into(), model.as_str().into());
    settings.insert("instance_data_dir".into(), pictures.as_str().into());
    settings.insert("output_dir".into(), run.as_str().into());
    settings.insert("max_train_steps".into(), steps.first().map_or(Ok(100), |n| n.parse())?.into());
    let outcome = train(TrainConfig::from_tables(&[&settings])?, None, &Losses)?;
    println!("{} values in {}", outcome.parameters, outcome.folder.display());
    Ok(())
}
