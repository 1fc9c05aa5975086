//! What trainings changed, in the records and reports of a real comparison.

use crate::compare::{METHODS, config, scratch};
use hra::lab::results::{CellRecord, Plan};
use serde_json::Value;
use std::path::PathBuf;

fn each_record(out: &std::path::Path) -> Vec<(PathBuf, CellRecord)> {
    let plan = Plan::read(out).unwrap();
    let path = |id: &str| out.join("cells").join(id).join("record.json");
    plan.cells.iter().map(|cell| (path(&cell.id), CellRecord::read(&path(&cell.id)).unwrap())).collect()
}

#[test]
fn trainings_say_what_they_changed_once_and_without_training_again() {
    let scratch = scratch(&config("", "", METHODS));
    scratch.ok(&["compare", "c.toml"]);
    let out = scratch.path("out");
    let before = each_record(&out);
    for (_, record) in &before {
        let Some(changes) = record.changes else {
            assert!(record.cell.is_base(), "{}", record.cell.id);
            continue;
        };
        let hra = record.cell.method() == "HRA";
        assert!(changes.angle > 0.0, "{changes:?}");
        assert_eq!(changes.singular_values < 1e-9, hra, "{changes:?}");
        assert!(changes.layers > 10 && changes.leading == 10 * changes.layers, "{changes:?}");
        assert!(!hra || changes.intruders == 0, "{changes:?}");
    }
    // Full fine-tuning counts the layers that HRA is on.
    let layers: Vec<usize> = before.iter().filter_map(|(_, r)| r.changes).map(|c| c.layers).collect();
    assert!(layers.len() == 4 && layers.iter().all(|count| *count == layers[0]), "{layers:?}");
    the_report_has_the_table(&out);

    // Records of an earlier version: measured anew where weights are there, and nowhere is anything trained.
    let trained =
        |path: &PathBuf| path.with_file_name("trained.json").metadata().unwrap().modified().unwrap();
    let times: Vec<_> = before.iter().filter(|(_, r)| !r.cell.is_base()).map(|(p, _)| trained(p)).collect();
    let weights =
        ["adapter_model.safetensors", "adapter_config.json", "unet/diffusion_pytorch_model.safetensors"];
    for (path, record) in &before {
        let text = CellRecord { changes: None, ..record.clone() };
        std::fs::write(path, serde_json::to_vec(&text).unwrap()).unwrap();
        if record.cell.method() != "HRA" {
            weights.iter().for_each(|name| drop(std::fs::remove_file(path.with_file_name("run").join(name))));
        }
    }
    scratch.ok(&["compare", "c.toml"]);
    for ((path, old), (_, new)) in before.iter().zip(each_record(&out)) {
        assert_eq!(new.changes, old.changes.filter(|_| old.cell.method() == "HRA"), "{}", path.display());
        assert_eq!(new.evaluations, old.evaluations);
    }
    let again: Vec<_> = before.iter().filter(|(_, r)| !r.cell.is_base()).map(|(p, _)| trained(p)).collect();
    assert_eq!(times, again, "a training was done again");
    let text = std::fs::read_to_string(out.join("report.md")).unwrap();
    let table = text.split("## What the training changed").nth(1).unwrap();
    let full = table.lines().find(|line| line.starts_with("| full")).unwrap();
    assert!(full.ends_with("| - | - | - | 0 |"), "{full}");
}

fn the_report_has_the_table(out: &std::path::Path) {
    let report: Value = serde_json::from_slice(&std::fs::read(out.join("report.json")).unwrap()).unwrap();
    let changes = report["changes"].as_array().unwrap();
    assert_eq!(changes.len(), 2, "{changes:?}");
    assert_eq!((&changes[0]["label"], &changes[0]["cells"]), (&"HRA".into(), &2.into()));
    for file in ["report.md", "report.html"] {
        let text = std::fs::read_to_string(out.join(file)).unwrap();
        assert!(
            text.contains("What the training changed") && text.contains("singular values moved"),
            "{file}"
        );
    }
    let text = std::fs::read_to_string(out.join("report-cells.csv")).unwrap();
    let mut lines = text.lines();
    let heading = lines.next().unwrap();
    assert!(
        heading
            .ends_with("changed_layers,row_angle,singular_values_moved,intruder_dimensions,leading_vectors")
    );
    let base = lines.find(|line| line.starts_with("base-")).unwrap();
    assert!(base.ends_with(",,,,,"), "{base}");
}
