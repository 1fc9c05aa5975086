//! Text in cells of CSV files, which spreadsheets open: a prompt must stay a prompt there.

use std::borrow::Cow;

/// What a spreadsheet may take a cell that begins so for: a formula, which it runs. Those after the first four are passed over
/// on the way to one, or are their full-width forms (OWASP, "CSV Injection").
const RUN: [char; 11] =
    ['=', '+', '-', '@', '\t', '\r', '\n', '\u{ff1d}', '\u{ff0b}', '\u{ff0d}', '\u{ff20}'];

/// `text` as a cell that spreadsheets show and do not run: with an apostrophe before it where it begins like a formula. For
/// names, paths and prompts; numbers stay as they are, or -0.5 would be none.
pub fn text_cell(text: &str) -> Cow<'_, str> {
    if text.starts_with(RUN) { Cow::Owned(format!("'{text}")) } else { Cow::Borrowed(text) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_begins_like_a_formula_is_changed() {
        for text in ["", "a = b", "'=1", " a", "0.5", "a photo of sks dog, -1"] {
            assert!(matches!(text_cell(text), Cow::Borrowed(same) if same == text), "{text}");
        }
        for start in RUN {
            assert_eq!(text_cell(&format!("{start}1+1")), format!("'{start}1+1"));
        }
    }
}
