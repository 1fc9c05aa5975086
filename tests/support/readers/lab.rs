//! What comparisons read: their config, their plans, records and tasks, the prompts of a data set, LPIPS.

use super::{put, split};
use hra::data::image::RgbImage;
use hra::lab::compare::CompareConfig;
use hra::lab::compare::cell::is_done;
use hra::lab::compare::dreambooth::DreamBoothPrompts;
use hra::lab::compare::task::Task;
use hra::lab::evaluate::lpips::{Lpips, Net};
use hra::lab::report;
use hra::lab::results::{CellRecord, PLAN_FILE, Plan, RECORD_FILE, cell_folder};
use hra::platform::observer::Silent;
use std::path::Path;
use tch::Device;

/// The config file of a comparison; what every method of it trains with.
pub fn comparison(scratch: &Path, input: &[u8]) {
    put(scratch, "compare.toml", input);
    let Ok(config) = CompareConfig::read(&scratch.join("compare.toml")) else { return };
    let _ = (config.steps(), config.objective(), config.validate());
    for method in &config.methods {
        let _ = config.learning_rates(method);
        let _ = config.train_config(method).map(|train| (train.validate().is_ok(), train.to_toml()));
    }
}

/// `plan.json` and the records of its first two cells; the report is made of them.
pub fn plan(scratch: &Path, input: &[u8]) {
    let [plan, first, second] = split(input);
    put(scratch, PLAN_FILE, plan);
    let Ok(plan) = Plan::read(scratch) else { return };
    for (cell, record) in plan.cells.iter().zip([first, second]) {
        let folder = cell_folder(scratch, &cell.id);
        if is_inside(&folder, scratch) {
            put(&folder, RECORD_FILE, record);
        }
    }
    let records = plan.records(scratch).unwrap_or_default();
    let _ = report::best_rates(&plan, &records);
    let _ = report::write(scratch);
}

/// Whether this test may write there: ids are what the plan says.
fn is_inside(path: &Path, folder: &Path) -> bool {
    let below = path.strip_prefix(folder).unwrap_or(Path::new(".."));
    path.as_os_str().len() < 300
        && below.components().all(|part| matches!(part, std::path::Component::Normal(_)))
        && !path.to_string_lossy().contains('\0')
}

/// `record.json`, with the means over its pictures made anew.
pub fn record(scratch: &Path, input: &[u8]) {
    put(scratch, RECORD_FILE, input);
    let Ok(mut record) = CellRecord::read(&scratch.join(RECORD_FILE)) else { return };
    let scored_with = record.scored_with.clone();
    assert!(record.has(&scored_with));
    record.evaluations.iter_mut().for_each(|evaluation| evaluation.summarise());
}

/// `task.json` of a cell, up to where it would train.
pub fn task(scratch: &Path, input: &[u8]) {
    put(scratch, "cells/cell/task.json", input);
    let Ok(task) = Task::read(scratch, "cell") else { return };
    let config = task.train_config(scratch);
    let _ = (is_done(scratch, &task), config.validate().is_ok(), config.to_toml());
}

/// `prompts_and_classes.txt` of a data set.
pub fn dreambooth(scratch: &Path, input: &[u8]) {
    put(scratch, "prompts_and_classes.txt", input);
    let Ok(prompts) = DreamBoothPrompts::read(scratch) else { return };
    for (name, class) in &prompts.subjects {
        assert!(!name.contains(['/', '\\']) && !name.starts_with('.'), "{name:?}");
        assert!(!prompts.prompts(class).is_empty());
    }
}

/// Weights of LPIPS with AlexNet; two pictures are compared with what loads.
pub fn lpips(scratch: &Path, input: &[u8]) {
    put(scratch, "lpips.safetensors", input);
    let path = scratch.join("lpips.safetensors");
    assert!(Lpips::load(&path, Net::Vgg, Device::Cpu).is_err(), "AlexNet's are not VGG's");
    let Ok(lpips) = Lpips::load(&path, Net::Alex, Device::Cpu) else { return };
    let pictures = [RgbImage::new(31, 40), RgbImage::from_pixel(31, 40, [255; 3].into())];
    let _ = lpips.distances(&[&pictures[0]], &[&pictures[1]], &Silent);
}
