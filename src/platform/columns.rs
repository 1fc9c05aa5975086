//! Tables as text for a terminal.

use std::iter::repeat_n;

/// Where the cells of a column stand. It is as wide as its widest cell.
#[derive(Debug, Clone, Copy)]
pub struct Column {
    right: bool,
    least: usize,
    gap: usize,
}

/// A column whose cells stand at its left; at least so many characters wide.
pub const fn left(least: usize) -> Column {
    Column { right: false, least, gap: 0 }
}

/// A column whose cells stand at its right; at least so many characters wide.
pub const fn right(least: usize) -> Column {
    Column { right: true, least, gap: 0 }
}

impl Column {
    /// With so many spaces before it.
    pub const fn after(self, gap: usize) -> Self {
        Self { gap, ..self }
    }
}

/// A line for each row, without spaces at its end. Rows may have fewer cells than there are columns.
pub fn lines(columns: &[Column], rows: &[Vec<String>]) -> Vec<String> {
    let length = |cell: &String| cell.chars().count();
    let width = |(i, column): (usize, &Column)| {
        rows.iter().filter_map(|row| row.get(i)).map(length).chain([column.least]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = columns.iter().enumerate().map(width).collect();
    let line = |row: &Vec<String>| {
        let mut line = String::new();
        for ((cell, column), width) in row.iter().zip(columns).zip(&widths) {
            let space = repeat_n(' ', width - length(cell));
            line.extend(repeat_n(' ', column.gap));
            if column.right {
                line.extend(space);
                line += cell;
            } else {
                line += cell;
                line.extend(space);
            }
        }
        line.trim_end().to_string()
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell_or_wider() {
        let rows =
            [vec!["näme", "1"], vec!["a", "123", "x"]].map(|row| row.into_iter().map(String::from).collect());
        assert_eq!(lines(&[left(0), right(2).after(2), left(9)], &rows), ["näme    1", "a     123x"]);
    }
}
