//! The pictures of a comparison as data for the page's script: what is common, and a block for each subject, which the
//! script reads when that subject is chosen. Addresses are relative to the comparison's folder.

use crate::lab::report::frontier::counts;
use crate::lab::report::table::{Analysis, RowKind};
use crate::lab::report::values::ScoreColumn;
use crate::lab::results::{BASE, CellRecord, Evaluation, FrontierPoint, PlannedPairs, PromptScores, Scores};
use serde_json::{Value, json};

/// Titles of scores, methods, subjects with their own pictures, seeds, steps and sets.
pub fn common(a: &Analysis) -> String {
    let plan = a.plan;
    let columns: Vec<Value> =
        a.columns.iter().map(|c| json!({"title": c.title, "digits": c.digits, "about": c.about})).collect();
    let subjects: Vec<Value> = plan
        .subjects
        .iter()
        .map(|s| {
            let addresses = |files: &[String]| files.iter().map(|f| address(f)).collect::<Vec<_>>();
            json!({
                "name": s.name,
                "class": s.class,
                "trained": s.instance_prompt,
                "pictures": [
                    ["trained on", addresses(&s.train_pictures)],
                    ["validation", addresses(&s.validation_pictures)],
                    ["test", addresses(&s.test_pictures)],
                ],
                "pairs": s.control.as_ref().map(|c| json!({
                    "test": pairs(&c.test, real_scores(a, &s.name)),
                    "validation": pairs(&c.validation, Vec::new()),
                })),
            })
        })
        .collect();
    let mut sets: Vec<&str> = a
        .records
        .iter()
        .flat_map(|r| &r.evaluations)
        .filter(|e| !e.prompts.is_empty())
        .map(|e| e.set.name())
        .collect();
    sets.sort_unstable();
    sets.dedup();
    let drift = a.records.iter().flat_map(|r| &r.evaluations).any(|e| !e.drift.is_empty());
    text(&json!({
        "columns": columns,
        "methods": plan.methods.iter().map(|m| &m.label).collect::<Vec<_>>(),
        "subjects": subjects,
        "seeds": plan.seeds.iter().map(u64::to_string).collect::<Vec<_>>(),
        "steps": plan.steps,
        "scales": scales(a),
        "paper": !a.chosen_steps.is_empty(),
        "sets": sets,
        "set": a.set.name(),
        "drift": drift,
    }))
}

/// Adapter scales that are drawn, the base model's left out.
fn scales(a: &Analysis) -> Vec<f64> {
    let planned = a.plan.frontier.iter().flat_map(|frontier| &frontier.scales).copied();
    let mut scales: Vec<f64> = planned.filter(|scale| *scale != 0.0 && *scale != 1.0).chain([1.0]).collect();
    scales.sort_by(f64::total_cmp);
    scales
}

/// Pictures and conditions of pairs, the number of the pair whose condition each is drawn with too, and the pictures' scores.
fn pairs(pairs: &PlannedPairs, scores: Vec<Vec<Value>>) -> Value {
    let addresses = |files: &[String]| files.iter().map(|f| address(f)).collect::<Vec<_>>();
    json!({
        "pictures": addresses(&pairs.pictures),
        "conditions": addresses(&pairs.conditions),
        "shuffled": pairs.shuffled,
        "scores": scores,
    })
}

fn real_scores(a: &Analysis, subject: &str) -> Vec<Vec<Value>> {
    let of_subject = a.records.iter().filter(|r| r.cell.subject == subject);
    of_subject.flat_map(|r| &r.real_pictures).map(|p| values(&a.columns, &p.scores)).collect()
}

/// The cells of one subject with every picture drawn in them.
pub fn of_subject(a: &Analysis, subject: &str) -> String {
    let records = a.records.iter().filter(|r| r.cell.subject == subject);
    text(&Value::Array(records.map(|r| cell(a, r)).collect()))
}

fn cell(a: &Analysis, record: &CellRecord) -> Value {
    let cell = &record.cell;
    let method = a.plan.methods.iter().position(|m| m.label == cell.method() && cell.method() != BASE);
    // A row of the table stands for this cell.
    let chosen = a
        .rows
        .iter()
        .any(|row| row.kind == RowKind::Method && row.method == method && row.rate == cell.learning_rate());
    let prompts = |all: &[PromptScores]| all.iter().map(|p| prompt(&a.columns, p)).collect::<Vec<_>>();
    let drawn = |scale: f64, e: &Evaluation| {
        json!({
            "step": e.step,
            "scale": scale,
            "set": e.set.name(),
            "prompts": prompts(&e.prompts),
            "drift": prompts(&e.drift),
        })
    };
    let scored = |point: &&FrontierPoint| {
        let same = |e: &Evaluation| e.step == point.evaluation.step && e.set == point.evaluation.set;
        record.evaluations.iter().any(same) && (point.scale == 1.0 || cell.is_base())
    };
    let grid = record.frontier.iter().flat_map(|frontier| {
        let counts = |point: &&FrontierPoint| counts(a.plan, &cell.id, frontier, point.evaluation.set);
        frontier.points.iter().filter(counts)
    });
    let grid = grid.filter(|point| !scored(point));
    let evaluations: Vec<Value> = record
        .evaluations
        .iter()
        .map(|e| drawn(1.0, e))
        .chain(grid.map(|point| drawn(point.scale, &point.evaluation)))
        .collect();
    json!({
        "folder": address(&format!("cells/{}/", cell.id)),
        "method": method,
        // As text: numbers of JavaScript are exact up to 2^53 only.
        "seed": cell.seed().to_string(),
        "rate": cell.learning_rate().map(|rate| format!("{rate:e}")),
        "chosen": chosen,
        "steps": a.chosen_steps.get(cell.id.as_str()),
        "evaluations": evaluations,
    })
}

/// `[text, own scores, [[file, seed, scores], ..]]`; scores in the order of the columns, null for what is not there.
fn prompt(columns: &[ScoreColumn], prompt: &PromptScores) -> Value {
    let pictures: Vec<Value> = prompt
        .pictures
        .iter()
        .map(|p| json!([relative(&p.file), p.seed.to_string(), values(columns, &p.scores)]))
        .collect();
    json!([prompt.prompt, values(columns, &prompt.scores), pictures])
}

fn values(columns: &[ScoreColumn], scores: &Scores) -> Vec<Value> {
    let mut values: Vec<Value> = columns
        .iter()
        // Rounded as it is shown, so that thousands of pictures stay small.
        .map(|c| scores.get(&c.key).map_or(Value::Null, |v| rounded(*v, c.digits)))
        .collect();
    while values.last().is_some_and(Value::is_null) {
        values.pop();
    }
    values
}

fn rounded(value: f64, digits: usize) -> Value {
    let scale = 10f64.powi(digits as i32);
    let rounded = (value * scale).round() / scale;
    json!(if rounded.is_finite() { rounded } else { value })
}

/// The address of a file of the comparison's folder: never of another scheme or host, whatever the file is called.
pub fn address(file: &str) -> String {
    format!("./{}", relative(file))
}

/// Each part of a path with all but plain characters percent-encoded (RFC 3986, section 2.3).
fn relative(file: &str) -> String {
    let mut text = String::new();
    for byte in file.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                text.push(byte as char)
            }
            _ => text += &format!("%{byte:02X}"),
        }
    }
    text
}

/// JSON that cannot end the `<script>` that it stands in.
fn text(value: &Value) -> String {
    value.to_string().replace('<', "\\u003c")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_stay_in_the_folder_and_json_in_its_element() {
        assert_eq!(address("http://evil/a b\"<.png"), "./http%3A//evil/a%20b%22%3C.png");
        assert_eq!(address("//evil/ä.png"), ".///evil/%C3%A4.png");
        assert_eq!(text(&json!("</script><!--")), "\"\\u003c/script>\\u003c!--\"");
    }
}
