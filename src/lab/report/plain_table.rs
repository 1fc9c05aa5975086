//! A table of plain text on the page.

use maud::{Markup, html};

/// Headings, and rows of cells of which the first is the row's heading.
pub fn plain_table(headings: &[String], rows: &[Vec<String>]) -> Markup {
    html! {
        table {
            thead { tr { @for heading in headings { th scope="col" { (heading) } } } }
            tbody {
                @for row in rows {
                    tr {
                        th scope="row" { (row[0]) }
                        @for (heading, cell) in headings.iter().zip(row).skip(1) { td data-title=(heading) { (cell) } }
                    }
                }
            }
        }
    }
}
