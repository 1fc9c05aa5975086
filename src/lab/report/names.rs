//! The report's files.

/// The page.
pub const PAGE_FILE: &str = "report.html";
/// A row for each picture.
pub const PICTURES_FILE: &str = "report.csv";
/// A row for each cell, step and set.
pub const CELLS_FILE: &str = "report-cells.csv";
/// Everything.
pub const JSON_FILE: &str = "report.json";
/// The tables as Markdown.
pub const MARKDOWN_FILE: &str = "report.md";
