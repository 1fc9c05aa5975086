//! `report.html`: one file with its style, script and data inside, that asks for nothing but the pictures beside it. All
//! text from plans and records is escaped by `maud`; the content security policy lets only this page's own script and style
//! run (by their hashes) and only pictures of its own folder load.

use crate::lab::report::classifier::{self, Classified};
use crate::lab::report::frontier::{self, Frontier};
use crate::lab::report::names::{
    CELLS_FILE, CLASSIFIER_FILE, FRONTIER_FILE, JSON_FILE, MARKDOWN_FILE, PICTURES_FILE,
};
use crate::lab::report::plots::figures;
use crate::lab::report::scroll::scroll;
use crate::lab::report::search::toml_snippet;
use crate::lab::report::table::{Analysis, MeanEstimate, PairedDifference, RowKind, TableRow};
use crate::lab::report::values::ScoreColumn;
use crate::lab::report::{changes, chart, pictures, words};
use crate::lab::results;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use maud::{DOCTYPE, Markup, PreEscaped, html};
use sha2::{Digest, Sha256};

const SCRIPT: &str = include_str!("page.js");
const STYLE: &str = include_str!("page.css");

/// The whole page.
pub fn page(a: &Analysis, curves: Option<&Frontier>, classified: Option<&Classified>) -> String {
    let style = format!("{STYLE}{}", chart::STYLE);
    let policy = format!(
        "default-src 'none'; img-src 'self' file:; style-src '{}'; script-src '{}'; base-uri 'none'; form-action 'none'",
        hash(&style),
        hash(SCRIPT)
    );
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta http-equiv="Content-Security-Policy" content=(policy);
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { (a.plan.title) }
                style { (PreEscaped(&style)) }
            }
            body {
                (header(a))
                main {
                    (notes(a))
                    (frontier::page::section(a, curves))
                    (summary(a))
                    (differences(a))
                    (changes::section(a))
                    (classifier::section(a, classified))
                    (rates(a))
                    (picture_grid(a))
                    (plots(a))
                    (about(a))
                }
                (large())
                script { (PreEscaped(SCRIPT)) }
            }
        }
    }
    .into_string()
}

fn hash(text: &str) -> String {
    format!("sha256-{}", STANDARD.encode(Sha256::digest(text.as_bytes())))
}

fn header(a: &Analysis) -> Markup {
    let plan = a.plan;
    let counted = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
    html! {
        header {
            div {
                h1 { (plan.title) }
                p .facts {
                    span { (a.records.len()) " of " (counted(plan.cells.len(), "cell")) }
                    span { (counted(plan.methods.len(), "method")) }
                    span { (counted(plan.subjects.len(), if a.control { "data set" } else { "subject" })) }
                    span { (counted(plan.seeds.len(), "seed")) }
                    span { "protocol " (plan.protocol) }
                }
            }
            button #theme type="button" aria-label="Switch between light and dark" { "Light / dark" }
        }
    }
}

fn notes(a: &Analysis) -> Markup {
    let gaps = a.gaps();
    html! {
        @if !a.notes.is_empty() {
            section .notes aria-label="Notes" { ul { @for note in &a.notes { li { (note) } } } }
        }
        @if !gaps.is_empty() {
            section .notes.gaps aria-label="What is missing" { ul { @for gap in &gaps { li { (gap) } } } }
        }
    }
}

/// A heading that sorts; `first` is the order of the first click.
fn sorted_heading(title: &str, about: &str, first: &str) -> Markup {
    html! {
        th scope="col" aria-sort="none" data-first=(first) {
            button .one[!title.contains(' ')] type="button" title=(about) { (title) span .arrow aria-hidden="true" {} }
        }
    }
}

fn score_heading(column: &ScoreColumn) -> Markup {
    let first = if column.sign < 0 { "ascending" } else { "descending" };
    // The arrow stays beside the last word.
    let title = words::heading(column).replace(" \u{2191}", "\u{a0}\u{2191}");
    sorted_heading(&title.replace(" \u{2193}", "\u{a0}\u{2193}"), &column.about, first)
}

fn swatch(a: &Analysis, row: &TableRow) -> Markup {
    let methods = a.rows.iter().filter(|r| r.kind == RowKind::Method);
    let number = methods.enumerate().find(|(_, r)| r.label == row.label).map(|(n, _)| n % chart::COLOURS);
    let class = number.map_or_else(|| "sb".to_string(), |n| format!("s{n}"));
    html! { @if row.kind != RowKind::Real { span .chart.swatch aria-hidden="true" { span .(class) {} } } }
}

fn row_heading(a: &Analysis, row: &TableRow) -> Markup {
    html! {
        th scope="row" data-value=(row.label) {
            (swatch(a, row)) (row.label)
            @if row.interrupted > 0 { span .mark title="interrupted and gone on with" { " *" } }
            @if row.cells < row.planned { span .part { (row.cells) " of " (results::cell_count(row.planned)) } }
        }
    }
}

fn summary(a: &Analysis) -> Markup {
    let budgets = a.budget_columns();
    let empty = || html! { td .none { (words::NONE) } };
    let table = html! {
        table .sortable {
            thead {
                tr {
                    (sorted_heading("method", "", "ascending"))
                    @if a.has_rates() { (sorted_heading("rate", "learning rate, chosen on validation", "ascending")) }
                    @for column in &a.columns { (score_heading(column)) }
                    @for column in &budgets { (sorted_heading(column.title, column.about, "ascending")) }
                }
            }
            tbody {
                @for row in &a.rows {
                    tr .real[row.kind == RowKind::Real] .base[row.kind == RowKind::Base] {
                        (row_heading(a, row))
                        @if a.has_rates() {
                            @match row.rate {
                                Some(rate) => td data-title="rate" data-value=(rate) { (format!("{rate:e}")) },
                                None => (empty()),
                            }
                        }
                        @for column in &a.columns {
                            @match row.scores.get(&column.key) {
                                Some(e) => td data-title=(words::heading(column)) data-value=(e.mean) { (estimate(a, e, column)) },
                                None => (empty()),
                            }
                        }
                        @for column in &budgets {
                            @match (column.value)(&row.budget) {
                                Some(value) => td data-title=(column.title) data-value=(value) { ((column.text)(value)) },
                                None => (empty()),
                            }
                        }
                    }
                }
            }
        }
    };
    html! {
        section #summary {
            h2 { "Summary" }
            p .sub { (a.heading()) ". Click a heading to sort." }
            (scroll("Summary table", &table))
            @if a.rows.iter().any(|r| r.interrupted > 0) {
                p .sub { "* holds interrupted cells, whose times and memory do not count" }
            }
        }
    }
}

fn estimate(a: &Analysis, e: &MeanEstimate, column: &ScoreColumn) -> Markup {
    let digits = column.digits;
    html! {
        (format!("{:.digits$}", e.mean))
        @if let Some(spread) = e.spread {
            span .spread { " ± " (format!("{spread:.digits$}")) }
        } @else if let Some(interval) = e.interval {
            " " span .interval { (words::interval(interval, digits)) }
        }
        @if a.few_subjects && e.seeds.len() > 1 { (seeds(&e.seeds, |v| format!("{v:.digits$}"))) }
    }
}

/// Each seed's own value, below the mean.
fn seeds(seeds: &[(u64, f64)], text: impl Fn(f64) -> String) -> Markup {
    html! {
        span .seeds {
            @for (seed, value) in seeds { span title={ "seed " (seed) } { (text(*value)) } " " }
        }
    }
}

fn differences(a: &Analysis) -> Markup {
    let Some(reference) = &a.reference else { return html! {} };
    let rows: Vec<&TableRow> = a.rows.iter().filter(|row| !row.differences.is_empty()).collect();
    if rows.is_empty() {
        return html! {};
    }
    let table = html! {
        table .sortable.differences {
            thead {
                tr {
                    (sorted_heading("method", "", "ascending"))
                    @for column in &a.columns { (score_heading(column)) }
                }
            }
            tbody {
                @for row in rows {
                    tr {
                        (row_heading(a, row))
                        @for column in &a.columns {
                            @match row.differences.get(&column.key) {
                                Some(d) => (difference(a, d, column)),
                                None => td .none { (words::NONE) },
                            }
                        }
                    }
                }
            }
        }
    };
    html! {
        section #differences {
            h2 { "Difference to " (reference) }
            p .sub { "Each row minus " (reference) ", with its 95 % interval, from n " (a.resampled) "." }
            (scroll("Differences", &table))
            ul .findings { @for finding in a.findings() { li { (finding) } } }
        }
    }
}

fn difference(a: &Analysis, d: &PairedDifference, column: &ScoreColumn) -> Markup {
    let verdict = words::verdict(d, column);
    let (digits, class) = (column.digits, verdict.split(' ').next().unwrap_or_default());
    html! {
        td data-title=(words::heading(column)) data-value=(d.value) {
            (words::signed(d.value, digits))
            @if let Some((low, high)) = d.interval {
                span .interval { "[" (words::signed(low, digits)) ", " (words::signed(high, digits)) "]" }
            }
            span .verdict.(class) { (verdict) span .n { " n " (d.n) } }
            @if a.few_subjects && d.seeds.len() > 1 { (seeds(&d.seeds, |v| words::signed(v, digits))) }
        }
    }
}

fn rates(a: &Analysis) -> Markup {
    let searched: Vec<_> = a.searched().collect();
    if searched.is_empty() {
        return html! {};
    }
    let table = html! {
        table {
            thead { tr { th scope="col" { "method" } th scope="col" { "learning rate" } th scope="col" { "objective" } th scope="col" { "cells" } } }
            tbody {
                @for best in &searched {
                    @for (number, tried) in best.rates.iter().enumerate() {
                        tr .chosen[tried.rate == best.rate] {
                            th scope="row" { @if number == 0 { (best.method) } }
                            td { (format!("{:e}", tried.rate)) @if tried.rate == best.rate { " (chosen)" } }
                            td { (words::objective_of(tried)) (words::reach_of(tried)) }
                            td { (tried.cells) " of " (tried.planned) }
                        }
                    }
                }
            }
        }
    };
    html! {
        section #rates {
            h2 { "Learning rates" }
            p .sub { "Chosen on validation pictures and prompts only, never on the test set: " (a.objective()) "." }
            @for warning in a.rate_warnings() { p .warning { (warning) } }
            (scroll("Learning rates", &table))
            details { summary { "As a compare config" } pre { (toml_snippet(a.plan, &a.rates)) } }
        }
    }
}

fn plots(a: &Analysis) -> Markup {
    let figures = figures(a);
    html! {
        @if !figures.is_empty() {
            section #plots {
                h2 { "Plots" }
                div .figures {
                    @for figure in &figures {
                        figure {
                            h3 { (figure.chart.title) }
                            (figure.chart.svg())
                            figcaption { (figure.caption) }
                        }
                    }
                }
            }
        }
    }
}

fn picture_grid(a: &Analysis) -> Markup {
    let json =
        |id: &str, text: String| html! { script type="application/json" id=(id) { (PreEscaped(text)) } };
    let select = |id: &str, label: &str| html! { label { span { (label) } select id=(id) {} } };
    html! {
        section #pictures {
            h2 { "Pictures" }
            noscript { p { "The grid of pictures needs the page's script; the files lie in cells/ and subjects/." } }
            form .choices {
                (select("subject", "subject"))
                (select("seed", "seed"))
                (select("picture", "picture"))
                (select("step", "step"))
                (select("scale", "adapter scale"))
                (select("set", "prompts"))
                (select("rates-of", "learning rates"))
            }
            div #own {}
            div .wide {
                div #grid .scroll role="region" aria-label="Pictures by prompt and method" tabindex="0" {}
                p .more hidden { "more columns to the right \u{2192}" }
            }
            (json("common", pictures::common(a)))
            @for (number, subject) in a.plan.subjects.iter().enumerate() {
                (json(&format!("subject-{number}"), pictures::of_subject(a, &subject.name)))
            }
        }
    }
}

fn large() -> Markup {
    html! {
        dialog #large aria-label="Picture" {
            div .frame { img alt=""; }
            div .beside {
                p .prompt {}
                dl {}
                div .buttons {
                    button type="button" data-move="left" aria-label="Picture to the left" { "\u{2190}" }
                    button type="button" data-move="right" aria-label="Picture to the right" { "\u{2192}" }
                    button type="button" data-move="up" aria-label="Picture above" { "\u{2191}" }
                    button type="button" data-move="down" aria-label="Picture below" { "\u{2193}" }
                    button type="button" data-move="close" { "Close" }
                }
            }
        }
    }
}

fn about(a: &Analysis) -> Markup {
    let of_frontier = a.plan.frontier.as_ref().map(|_| FRONTIER_FILE);
    let of_classifier = a.plan.classifier.as_ref().map(|_| CLASSIFIER_FILE);
    let files = [PICTURES_FILE, CELLS_FILE, JSON_FILE, MARKDOWN_FILE].into_iter();
    let files = files.chain(of_frontier).chain(of_classifier);
    html! {
        section #about {
            h2 { "How to read it" }
            ul { @for note in a.method_notes() { li { (note) } } }
            h3 { "Scores" }
            dl { @for column in &a.columns { dt { (words::heading(column)) } dd { (column.about) } } }
            @if !a.plan.common.is_empty() {
                h3 { "The same for every cell" }
                dl { @for (key, value) in &a.plan.common { dt { (key) } dd { (value) } } }
            }
            @if !a.records.is_empty() {
                h3 { "Where it ran" }
                ul { @for (how, cells) in a.environments() { li { (how) ": " (results::cell_count(cells)) } } }
            }
            h3 { "Files" }
            p { @for file in files { a href=(file) { (file) } " " } }
        }
    }
}
