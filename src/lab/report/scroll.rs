//! Wide tables of the page.

use maud::{Markup, html};

/// A box in which a wide table scrolls, by keys too; below it, while there is more to the right, a word that says so.
pub fn scroll(label: &str, table: &Markup) -> Markup {
    html! {
        div .wide {
            div .scroll role="region" aria-label=(label) tabindex="0" { (table) }
            p .more hidden { "more columns to the right \u{2192}" }
        }
    }
}
