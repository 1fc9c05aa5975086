//! The report's tables as text: Markdown for a README or a paper, and columns for a terminal.

use crate::lab::report::changes;
use crate::lab::report::classifier::{self, Classified};
use crate::lab::report::frontier::{self, Frontier};
use crate::lab::report::search::toml_snippet;
use crate::lab::report::table::{Analysis, TableRow};
use crate::lab::report::words;
use crate::lab::results;
use crate::platform::columns::{self, left, right};

/// `report.md`.
pub fn markdown(a: &Analysis, curves: Option<&Frontier>, classified: Option<&Classified>) -> String {
    let mut text = format!("# {}\n", escape(&a.plan.title));
    let mut list = |heading: &str, items: &[String]| {
        if !items.is_empty() {
            text += &format!("\n{heading}");
            if !heading.is_empty() {
                text += "\n\n";
            }
            for item in items {
                text += &format!("- {}\n", escape(item));
            }
        }
    };
    list("", &a.notes);
    list("", &a.gaps());
    text += &format!("\n## {}\n\n", a.heading());
    text += &summary(a);
    text += &frontier(a, curves);
    if let Some(classified) = classified {
        text += &told(classifier::TITLE, &classified.table(), &classified.about(a));
    }
    if let Some(reference) = &a.reference
        && a.rows.iter().any(|row| !row.differences.is_empty())
    {
        text += &format!("\n## Difference to {}\n\n", escape(reference));
        text += &differences(a);
    }
    if let Some(changed) = changes::rows(a) {
        text += &told(changes::TITLE, &changed, &changes::ABOUT.map(String::from));
    }
    let mut list = |heading: &str, items: &[String]| {
        if !items.is_empty() {
            text += &format!("\n## {heading}\n\n");
            for item in items {
                text += &format!("- {}\n", escape(item));
            }
        }
    };
    list("Findings", &a.findings());
    let rates: Vec<String> = a.searched().map(words::rate_line).collect();
    list("Learning rates", &[rates, a.rate_warnings()].concat());
    list("How to read it", &a.method_notes());
    let about: Vec<String> =
        a.columns.iter().map(|c| format!("{}: {}", words::heading(c), c.about)).collect();
    list("Scores", &about);
    let common: Vec<String> = a.plan.common.iter().map(|(key, value)| format!("{key}: {value}")).collect();
    list("The same for every cell", &common);
    let ran: Vec<String> =
        a.environments().iter().map(|(how, n)| format!("{how}: {}", results::cell_count(*n))).collect();
    list("Where it ran", &ran);
    text
}

/// Likeness at matched drift.
fn frontier(a: &Analysis, curves: Option<&Frontier>) -> String {
    let table = curves.and_then(|curves| frontier::tables::rows(a, curves));
    table.map_or_else(String::new, |table| told(frontier::TITLE, &table, &frontier::about(a)))
}

/// A table under its heading, and sentences on how it is to be read.
fn told(title: &str, (headings, rows): &(Vec<String>, Vec<Vec<String>>), about: &[String]) -> String {
    let about: String = about.iter().map(|item| format!("- {}\n", escape(item))).collect();
    format!("\n## {title}\n\n{}\n{about}", table(headings, rows))
}

fn summary(a: &Analysis) -> String {
    let (headings, rows) = summary_cells(a, words::heading);
    table(&headings, &rows)
}

fn table(headings: &[String], rows: &[Vec<String>]) -> String {
    let mut text = line(&headings.iter().map(|h| escape(h)).collect::<Vec<_>>());
    text += &format!("|---|{}\n", "---:|".repeat(headings.len() - 1));
    for row in rows {
        text += &line(&row.iter().map(|cell| escape(cell)).collect::<Vec<_>>());
    }
    text
}

/// Headings and rows of the summary table.
fn summary_cells(
    a: &Analysis,
    heading: fn(&super::values::ScoreColumn) -> String,
) -> (Vec<String>, Vec<Vec<String>>) {
    let budgets = a.budget_columns();
    let mut headings = vec!["method".to_string()];
    if a.has_rates() {
        headings.push("rate".into());
    }
    headings.extend(budgets.iter().map(|c| c.title.to_string()));
    headings.extend(a.columns.iter().map(heading));
    let cells = |row: &TableRow| {
        let mark = if row.interrupted > 0 { " *" } else { "" };
        let part =
            if row.cells < row.planned { format!(" ({}/{})", row.cells, row.planned) } else { String::new() };
        let mut cells = vec![format!("{}{mark}{part}", row.label)];
        if a.has_rates() {
            cells.push(row.rate.map_or_else(|| words::NONE.into(), |r| format!("{r:e}")));
        }
        cells.extend(
            budgets.iter().map(|c| (c.value)(&row.budget).map_or_else(|| words::NONE.into(), c.text)),
        );
        cells.extend(a.columns.iter().map(|c| {
            row.scores.get(&c.key).map_or_else(|| words::NONE.into(), |e| words::estimate(e, c.digits))
        }));
        cells
    };
    (headings, a.rows.iter().map(cells).collect())
}

fn differences(a: &Analysis) -> String {
    let mut text = String::from("| method | ");
    text += &a.columns.iter().map(|c| escape(&words::heading(c))).collect::<Vec<_>>().join(" | ");
    text += &format!(" |\n|---|{}\n", "---:|".repeat(a.columns.len()));
    for row in a.rows.iter().filter(|row| !row.differences.is_empty()) {
        let mut cells = vec![escape(&row.label)];
        cells.extend(a.columns.iter().map(|c| match row.differences.get(&c.key) {
            Some(d) => format!("{}<br>{}", words::difference(d, c.digits), words::verdict(d, c)),
            None => words::NONE.into(),
        }));
        text += &line(&cells);
    }
    text
}

fn line(cells: &[String]) -> String {
    format!("| {} |\n", cells.join(" | "))
}

/// Text that Markdown shows as it is: no markup, no cell or line of a table ends in it.
fn escape(text: &str) -> String {
    let mut escaped = String::new();
    for c in text.chars() {
        match c {
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '&' => escaped += "&amp;",
            c if c.is_control() => escaped.push(' '),
            '|' | '\\' | '`' | '*' | '_' | '[' | ']' | '#' | '~' | '!' => {
                escaped.push('\\');
                escaped.push(c);
            }
            c => escaped.push(c),
        }
    }
    escaped
}

/// What the command line prints: the summary table in columns, what is missing, findings, and the rates to paste.
pub fn terminal(a: &Analysis) -> String {
    let mut text = format!("{}\n{}\n", plain(&a.plan.title), a.heading());
    for note in &a.notes {
        text += &format!("note: {}\n", plain(note));
    }
    let (headings, rows) = summary_cells(a, |column| column.title.clone());
    let table: Vec<Vec<String>> = std::iter::once(headings)
        .chain(rows)
        .map(|row| row.iter().map(|cell| plain(cell)).collect())
        .collect();
    // Names to the left, numbers to the right.
    let mut all = vec![right(0).after(2); table[0].len()];
    all[0] = left(0);
    columns::lines(&all, &table).iter().for_each(|line| text += &format!("{line}\n"));
    let after = [a.findings(), a.gaps(), a.rate_warnings()].concat();
    for sentence in after {
        text += &format!("{}\n", plain(&sentence));
    }
    let snippet = toml_snippet(a.plan, &a.rates);
    if !snippet.is_empty() {
        text += &format!("rates chosen on validation, for a compare config:\n\n{snippet}");
    }
    text
}

/// Text without control characters, which could drive a terminal.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}
