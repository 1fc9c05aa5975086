//! The curves on the page: the plot, whose points open their pictures, and the table of matched values.

use crate::lab::report::frontier::{Frontier, TITLE, about, plot, tables};
use crate::lab::report::plain_table::plain_table;
use crate::lab::report::scroll::scroll;
use crate::lab::report::table::Analysis;
use maud::{Markup, html};

/// Nothing, where no cell was drawn along a grid.
pub fn section(a: &Analysis, curves: Option<&Frontier>) -> Markup {
    let Some(frontier) = curves else { return html! {} };
    let table = tables::rows(a, frontier).map(|(headings, rows)| plain_table(&headings, &rows));
    html! {
        section #frontier {
            h2 { (TITLE) }
            @if let Some(figure) = plot::figure(a, frontier) {
                figure .large { (figure.chart.svg()) figcaption { (figure.caption) } }
            }
            @if let Some(table) = &table { (scroll("Likeness and drift, matched", table)) }
            ul .findings { @for sentence in about(a) { li { (sentence) } } }
        }
    }
}
