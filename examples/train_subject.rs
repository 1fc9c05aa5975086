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
    let mut config = TrainConfig::default();
    config.model.pretrained_model_name_or_path = model.into();
    config.data.instance_data_dir = pictures.into();
    config.data.instance_prompt = "a photo of sks cat".into();
    config.output_dir = run.into();
    config.adapter.own = toml::toml! { rank = 8 };
    config.optimizer.learning_rate = 3e-3;
    config.schedule.max_train_steps = steps.first().map_or(Ok(100), |n| n.parse())?;
    config.checkpoints.log_every = 1;
    let outcome = train(config, None, &Losses)?;
    println!("{} values in {}", outcome.parameters, outcome.folder.display());
    Ok(())
}
