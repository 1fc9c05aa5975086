//! The curves on the page: the plot, whose points open their pictures, and the table of matched values.

use crate::lab::report::frontier::{Frontier, TITLE, about, plot, tables};
use crate::lab::report::scroll::scroll;
use crate::lab::report::table::Analysis;
use maud::{Markup, html};

/// Nothing, where no cell was drawn along a grid.
pub fn section(a: &Analysis, curves: Option<&Frontier>) -> Markup {
    let Some(frontier) = curves else { return html! {} };
    let table = tables::rows(a, frontier).map(|(headings, rows)| {
        html! {
            table {
                thead { tr { @for heading in &headings { th scope="col" { (heading) } } } }
                tbody {
                    @for row in &rows {
                        tr {
                            th scope="row" { (row[0]) }
                            @for (heading, cell) in headings.iter().zip(row).skip(1) { td data-title=(heading) { (cell) } }
                        }
                    }
                }
            }
        }
    });
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
