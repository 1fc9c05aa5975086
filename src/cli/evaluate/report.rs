//! What `hra evaluate` tells: a table, JSON, and rows of a CSV file.

use crate::cli::evaluate::EvaluateArgs;
use crate::cli::evaluate::conditions::FileScores;
use crate::cli::stdout::print_line;
use crate::error::Result;
use crate::lab::report::statistics::Bootstrap;
use crate::lab::results::{Better, Evaluation, OF_CONDITIONS, SCORES};
use crate::platform::columns::{self, left, right};
use crate::platform::device;
use crate::platform::spreadsheet::text_cell;
use serde_json::json;
use std::collections::BTreeMap;
use tch::Device;

/// Pictures, or prompts, that a score was taken of.
fn count(found: &Evaluation, files: &FileScores, key: &str) -> (usize, &'static str) {
    if let Some(maps) = files.maps(key) {
        return (maps, "map");
    }
    let pictures = || found.prompts.iter().flat_map(|prompt| &prompt.pictures);
    match found.prompts.iter().filter(|prompt| prompt.scores.contains_key(key)).count() {
        0 => (pictures().filter(|picture| picture.scores.contains_key(key)).count(), "picture"),
        prompts => (prompts, "prompt"),
    }
}

/// Over pictures, of scores that each has by itself.
fn intervals(found: &Evaluation) -> BTreeMap<&'static str, (f64, f64)> {
    let mut bootstrap = Bootstrap::default();
    let interval = |key: &&'static str| Some((*key, bootstrap.interval(&[found.values(key)])?));
    OF_CONDITIONS.iter().filter_map(interval).collect()
}

fn counted(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// Prints the scores, of these towers on this device. `counts`: pictures that were scored, real ones, and look-alikes.
pub fn report(
    args: &EvaluateArgs,
    found: &Evaluation,
    files: &FileScores,
    (identity, device): (&str, Device),
    [drawn, real, look_alikes]: [usize; 3],
) -> Result<()> {
    let intervals = intervals(found);
    if args.json {
        let pictures: Vec<_> = found
            .prompts
            .iter()
            .flat_map(|prompt| prompt.pictures.iter().map(move |picture| (prompt, picture)))
            .map(|(prompt, picture)| {
                let known = (!prompt.prompt.is_empty()).then_some(&prompt.prompt);
                json!({"file": picture.file, "prompt": known, "scores": picture.scores})
            })
            .collect();
        let prompts: Vec<_> = found
            .prompts
            .iter()
            .filter(|prompt| !prompt.prompt.is_empty())
            .map(|prompt| json!({"prompt": prompt.prompt, "pictures": prompt.pictures.len(), "scores": prompt.means()}))
            .collect();
        let counts: BTreeMap<&String, usize> =
            found.scores.keys().map(|key| (key, count(found, files, key).0)).collect();
        return super::super::print_json(&json!({
            "scores": found.scores,
            "counts": counts,
            "intervals": intervals,
            "segmentation": files.segmentation_json(),
            "landmarks": files.landmarks_json(),
            "towers": identity,
            "device": device::name(device),
            "real": {"folder": args.real, "pictures": real},
            "look_alikes": {"folder": args.look_alikes, "pictures": look_alikes},
            "prompts": prompts,
            "pictures": pictures,
            "csv": args.csv,
        }));
    }
    let prompts = found.prompts.iter().filter(|prompt| !prompt.prompt.is_empty()).count();
    let compared = [
        counted(drawn, "picture"),
        counted(prompts, "prompt"),
        counted(real, "real picture"),
        counted(look_alikes, "look-alike"),
    ];
    if drawn > 0 {
        print_line!("{}", compared.join(", "))?;
    }
    if !identity.is_empty() {
        print_line!("towers: {identity}")?;
    }
    if let Some(note) = files.note() {
        print_line!("{note}")?;
    }
    for line in table(found, files, &intervals) {
        print_line!("{line}")?;
    }
    if let Some(path) = &args.csv {
        print_line!("every picture's scores: {}", path.display())?;
    }
    Ok(())
}

/// The lines of the table of all scores.
fn table(
    found: &Evaluation,
    files: &FileScores,
    intervals: &BTreeMap<&'static str, (f64, f64)>,
) -> Vec<String> {
    let head = if intervals.is_empty() { "" } else { "95 % interval" };
    let mut rows = vec![["score", "mean", "of", "better", head].map(String::from).to_vec()];
    for kind in SCORES.iter().filter(|kind| found.scores.contains_key(kind.key)) {
        let (n, what) = count(found, files, kind.key);
        let better = match kind.better {
            Better::Higher => "higher",
            Better::Lower => "lower",
            Better::Neither => "-",
        };
        let interval = intervals.get(kind.key);
        let interval = interval.map_or_else(String::new, |(low, high)| format!("{low:.4} to {high:.4}"));
        let mean = format!("{:.4}", found.scores[kind.key]);
        rows.push(vec![kind.title.into(), mean, counted(n, what), better.into(), interval]);
    }
    columns::lines(&[left(18), right(10), left(13).after(2), left(8), left(0).after(2)], &rows)
}

/// A row for each picture: file, prompt, and every score that any of them has. Spreadsheets show the texts and run none.
pub fn csv(found: &Evaluation) -> String {
    let cell = |text: &str| {
        let text = text_cell(text);
        let quoted = text.contains(['"', ',', '\n', '\r']);
        if quoted { format!("\"{}\"", text.replace('"', "\"\"")) } else { text.into_owned() }
    };
    let keys: Vec<&str> =
        SCORES.iter().map(|kind| kind.key).filter(|key| found.scores.contains_key(*key)).collect();
    let mut text = ["file", "prompt"].iter().chain(&keys).copied().collect::<Vec<_>>().join(",") + "\n";
    for prompt in &found.prompts {
        for picture in &prompt.pictures {
            let mut row = vec![cell(&picture.file), cell(&prompt.prompt)];
            let value = |key: &&str| picture.scores.get(*key).or_else(|| prompt.scores.get(*key));
            row.extend(keys.iter().map(|key| value(key).map_or_else(String::new, f64::to_string)));
            text += &(row.join(",") + "\n");
        }
    }
    text
}
