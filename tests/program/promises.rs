//! `docs/promises.md`: each promise names a test that is there.

use crate::support::base::root;
use std::fs;

/// File and name of the test in a table's row.
fn test_of(row: &str) -> Option<(&str, &str)> {
    let (_, cell) = row.trim().strip_suffix('|')?.rsplit_once('|')?;
    let mut words = cell.split('`').skip(1).step_by(2);
    Some((words.next()?, words.next()?))
}

#[test]
fn every_promise_names_a_test_that_is_there() {
    let text = fs::read_to_string(root().join("docs/promises.md")).unwrap();
    let rows: Vec<&str> =
        text.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| promise |")).collect();
    assert!(rows.len() > 30, "{} promises", rows.len());
    let mut missing = Vec::new();
    for row in rows {
        let Some((file, name)) = test_of(row) else {
            missing.push(format!("no test: {row}"));
            continue;
        };
        let source = fs::read_to_string(root().join(file)).unwrap_or_default();
        let lines: Vec<&str> = source.lines().map(str::trim).collect();
        let is_there = lines.iter().enumerate().any(|(i, line)| {
            // Attributes stand above the function: a test that is ignored keeps nothing.
            let above = lines[..i].iter().rev().take_while(|line| line.starts_with("#["));
            let above: Vec<&&str> = above.collect();
            line.starts_with(&format!("fn {name}("))
                && above.iter().any(|line| **line == "#[test]")
                && !above.iter().any(|line| line.starts_with("#[ignore"))
        });
        if !is_there {
            missing.push(format!("{file}: no test `{name}`"));
        }
    }
    assert!(missing.is_empty(), "{}", missing.join("\n"));
}
