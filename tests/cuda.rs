//! Every stored reference case on a GPU, in f32 and in half precision, and the dry run of the check that does this and more
//! (tools/gpu_check.sh, which runs `parity` of this binary).

mod reference;
mod support {
    pub mod base;
    pub mod cases;
    pub mod copied;
    pub mod error;
    pub mod finished;
    pub mod grown;
    pub mod stored_xl;
}

use hra::platform::device::{self, DeviceChoice};
use reference::{Compared, Comparer, Compute, adapters, control, networks, samplers, training, xl};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use support::base::root;
use support::cases::stored_cases;
use support::finished::{Finished, finished};
use support::stored_xl::stored_xl;
use tch::{Device, Kind};

/// On CUDA sums are added up in another order: f32 may err by so many times what f32 on the CPU may.
const F32_MARGIN: f64 = 10.0;
/// Half precision may err by so many times what bf16 on the CPU errs by, or by the rounding of one number to bf16.
const HALF_MARGIN: f64 = 2.0;
const HALF_ROUNDING: f64 = 1.0 / 256.0;
/// Steps of the samplers: on a GPU small tensors cost as much time as large ones.
const MOST_STEPS: usize = 12;

/// All networks, adapters and trainings of the stored cases; the comparisons by name.
fn compute_cases(compute: Compute, planted: f64) -> BTreeMap<String, Compared> {
    let mut here = Comparer::new(compute);
    here.planted = planted;
    if compute.kind == Kind::Float {
        training::loss_scale(&here);
    }
    for case in stored_cases() {
        networks::texts(&here, &case);
        networks::unet_and_vae(&here, &case);
        for adapter in adapters::names(&case, "out") {
            adapters::outputs_losses_and_gradients(&here, &case, &adapter);
        }
        adapters::merged_and_fixed(&here, &case);
        adapters::of_text_encoder(&here, &case);
        training::three_steps(&here, &case);
        assert!(control::controlnet(&here, &case), "{} has a ControlNet", case.name);
        assert!(control::encoder(&here, &case), "{} has a control encoder", case.name);
    }
    compute_xl(&here);
    here.finish()
}

fn compute_xl(here: &Comparer) {
    let case = stored_xl();
    xl::texts(here, &case);
    xl::adapted_texts(here, &case);
    networks::unet_and_vae(here, &case);
    for adapter in adapters::names(&case, "out") {
        adapters::outputs_losses_and_gradients(here, &case, &adapter);
    }
    training::three_steps(here, &case);
    // Twelve steps add up what half precision rounds.
    if here.compute.kind == Kind::Float {
        xl::drawings(here, &case);
        xl::adapted_drawings(here, &case);
        xl::controlled_drawing(here, &case);
    }
}

/// Prints a check as tools/gpu_check reads it; whether it passed.
fn check(name: &str, compute: Compute, error: f64, limit: f64) -> bool {
    let device = match compute.device {
        Device::Cuda(index) => format!("cuda:{index}"),
        _ => "cpu".to_string(),
    };
    let kind = match compute.kind {
        Kind::BFloat16 => "bf16",
        Kind::Half => "f16",
        _ => "f32",
    };
    let ok = error <= limit;
    // A number that is not finite has no place in JSON.
    let error = if error.is_finite() { error } else { f64::MAX };
    let line = json!({"name": format!("{name}, {kind}"), "device": device, "kind": kind, "error": error, "limit": limit, "ok": ok});
    println!("check: {line}");
    ok
}

/// Root of the mean square of the errors.
fn mean(compared: &Compared) -> f64 {
    let errors = &compared.errors;
    (errors.iter().map(|(error, _)| error * error).sum::<f64>() / errors.len() as f64).sqrt()
}

fn parity_on(device: Device, planted: f64) {
    let mut failed = 0;
    let compute = Compute { device, kind: Kind::Float };
    for (name, compared) in compute_cases(compute, planted) {
        failed += usize::from(!check(&name, compute, compared.worst(), F32_MARGIN));
    }
    let found = samplers::final_latents(device, MOST_STEPS);
    assert!(found.problems.is_empty(), "{}", found.problems.join("\n"));
    for (sampler, errors) in found.errors {
        let worst =
            Compared { errors: errors.iter().map(|(error, allowed, _)| (*error, *allowed)).collect() }
                .worst();
        failed += usize::from(!check(&format!("sampler {sampler}"), compute, worst, F32_MARGIN));
    }
    let cpu = compute_cases(Compute { device: Device::Cpu, kind: Kind::BFloat16 }, 1.0);
    for kind in [Kind::BFloat16, Kind::Half] {
        let compute = Compute { device, kind };
        for (name, compared) in compute_cases(compute, planted) {
            // A loss is one number, in which errors cancel by luck: it may err by half as much as the output that it is the
            // mean square of.
            let output = name.strip_suffix("loss").and_then(|case| cpu.get(&format!("{case}output")));
            let usual = output.map_or(HALF_ROUNDING, mean) / 2.0;
            let limit = HALF_MARGIN * mean(&cpu[&name]).max(usual);
            failed += usize::from(!check(&name, compute, mean(&compared), limit));
        }
    }
    assert_eq!(failed, 0, "{failed} checks failed");
}

/// On the device of `HRA_CHECK_DEVICE`: `cuda`, or `cpu` in a dry run.
#[test]
#[ignore = "run by tools/gpu_check.sh"]
fn parity() {
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    let planted =
        if variable("HRA_GPU_CHECK_BREAK").split(',').any(|part| part == "parity") { 1.01 } else { 1.0 };
    device::start();
    let choice =
        if variable("HRA_CHECK_DEVICE") == "cpu" { DeviceChoice::Cpu } else { DeviceChoice::Cuda(0) };
    match device::resolve(choice, None) {
        Ok(compute) => parity_on(compute.device, planted),
        Err(error) if variable("HRA_REQUIRE_CUDA") == "1" => panic!("{error}"),
        Err(error) => println!("skipped: {error}"),
    }
}

/// A dry run of the whole check, and what it wrote.
fn dry_run(scratch: &Path, parts: &str, broken: &str) -> (Finished, Value) {
    let mut command = Command::new("bash");
    command.arg(root().join("tools/gpu_check.sh")).args(["--dry-run", "--parts", parts, "--out"]);
    command.arg(scratch.join("out")).stdin(Stdio::null());
    command.env("HRA_BIN", env!("CARGO_BIN_EXE_hra")).env("HRA_CUDA_TESTS", std::env::current_exe().unwrap());
    command.env("HRA_GPU_CHECK_BREAK", broken);
    let done = finished(command.output().unwrap());
    let results = std::fs::read_to_string(scratch.join("out/results.json"));
    let results = results.unwrap_or_else(|e| panic!("{e}\n{}\n{}", done.out, done.err));
    (done, serde_json::from_str(&results).unwrap())
}

const PARTS: [&str; 6] = ["doctor", "parity", "training", "drawing", "memory", "speed"];

/// One part of the results.
fn part<'a>(results: &'a Value, name: &str) -> &'a Value {
    let parts = results["parts"].as_array().unwrap();
    parts.iter().find(|part| part["part"] == name).unwrap_or_else(|| panic!("part {name} did not run"))
}

#[test]
fn the_dry_run_makes_every_check_and_passes() {
    let scratch = tempfile::tempdir().unwrap();
    let (done, results) = dry_run(scratch.path(), &PARTS.join(","), "");
    assert_eq!(done.code, 0, "{}\n{}", done.out, done.err);
    let counts = std::fs::read_to_string(root().join("tools/gpu_check/counts.json")).unwrap();
    let counts: Value = serde_json::from_str(&counts).unwrap();
    for name in PARTS {
        let part = part(&results, name);
        let number = |key: &str| part[key].as_i64().unwrap();
        assert!(part["ok"] == true && number("made") > 0, "{part}");
        assert_eq!(number("made") + number("skipped"), counts[name].as_i64().unwrap(), "{part}");
        // Without a GPU, or without Python's libraries, only the comparison of speed lacks something.
        assert!(number("skipped") == 0 || name == "speed", "{part}");
    }
    let table = std::fs::read_to_string(scratch.path().join("out/results.md")).unwrap();
    assert!(table.contains("## Checks") && !table.contains("**no**"), "{table}");
}

#[test]
fn a_planted_error_of_one_percent_fails_its_part_and_the_rest_goes_on() {
    let scratch = tempfile::tempdir().unwrap();
    let (done, results) = dry_run(scratch.path(), &PARTS.join(","), &PARTS.join(","));
    assert_eq!(done.code, 1, "{}\n{}", done.out, done.err);
    for name in PARTS {
        let part = part(&results, name);
        assert!(part["ok"] == false, "{part}");
        assert_eq!(
            part["made"].as_i64().unwrap() + part["skipped"].as_i64().unwrap(),
            part["expected"].as_i64().unwrap(),
            "{part}"
        );
    }
    // One alone: the others pass.
    let scratch = tempfile::tempdir().unwrap();
    let (done, results) = dry_run(scratch.path(), "doctor,memory", "doctor");
    assert_eq!(done.code, 1, "{}\n{}", done.out, done.err);
    assert!(
        part(&results, "doctor")["ok"] == false && part(&results, "memory")["ok"] == true,
        "{}",
        done.out
    );
}
