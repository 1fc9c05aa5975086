//! The report's files.

/// The page.
pub const PAGE_FILE: &str = "report.html";
/// A row for each picture.
pub const PICTURES_FILE: &str = "report.csv";
/// A row for each cell, step and set.
pub const CELLS_FILE: &str = "report-cells.csv";
/// The mean of every score at every place of the grid of scales and checkpoints.
pub const FRONTIER_FILE: &str = "frontier.csv";
/// The model's errors as a classifier.
pub const CLASSIFIER_FILE: &str = "classifier.csv";
/// Everything.
pub const JSON_FILE: &str = "report.json";
/// The tables as Markdown.
pub const MARKDOWN_FILE: &str = "report.md";
