//! Contact sheets: images in rows and columns with labels, to look at many at once.
//!
//! Text is drawn with Noto Sans Mono, rendered into the binary (ASCII only; other characters show as `?`).

use ::image::imageops::{self, FilterType};
use ::image::{Rgb, RgbImage};
use noto_sans_mono_bitmap::{FontWeight, RasterHeight, get_raster, get_raster_width};

/// Small images are enlarged until they are at least this wide, in pixels.
const MIN_CELL: u32 = 192;
/// Around the sheet.
const MARGIN: u32 = 20;
/// Between cells.
const GAP: u32 = 8;
/// Between labels and cells.
const LABEL_GAP: u32 = 12;
/// Row labels are wrapped after this many characters.
const ROW_LABEL_CHARS: usize = 24;
/// From this cell width on, text is twice as large: such sheets are looked at from further away.
const LARGE_CELL: u32 = 384;
const WHITE: Rgb<u8> = Rgb([255; 3]);
const INK: u8 = 32;

/// A table of images with a label above each column and at the left of each row.
#[derive(Debug, Clone, Default)]
pub struct Grid {
    /// Labels above the columns; none if empty.
    pub columns: Vec<String>,
    /// The rows from top to bottom. A row may have fewer images than another: the rest stays white.
    pub rows: Vec<GridRow>,
}

/// One row of a [`Grid`].
#[derive(Debug, Clone, Default)]
pub struct GridRow {
    /// Label at the left; may be empty.
    pub label: String,
    /// The images from left to right.
    pub images: Vec<RgbImage>,
}

/// Size of the text of a sheet.
#[derive(Clone, Copy)]
struct Font {
    size: RasterHeight,
    /// From one line to the next, in pixels.
    line: u32,
}

impl Font {
    fn for_cell(width: u32) -> Self {
        if width < LARGE_CELL {
            Self { size: RasterHeight::Size16, line: 20 }
        } else {
            Self { size: RasterHeight::Size32, line: 40 }
        }
    }

    /// Width of every character, in pixels.
    fn advance(self) -> u32 {
        get_raster_width(FontWeight::Regular, self.size) as u32
    }
}

impl Grid {
    /// The sheet. All images are enlarged by one whole factor (pixels become squares) so that the widest is at least
    /// 192 pixels wide; an image smaller than its cell stands in the middle of it.
    pub fn render(&self) -> RgbImage {
        let images = || self.rows.iter().flat_map(|row| &row.images);
        let widest = images().map(RgbImage::width).max().unwrap_or(0).max(1);
        let factor = MIN_CELL.div_ceil(widest);
        let cell = widest * factor;
        let font = Font::for_cell(cell);
        let columns =
            self.rows.iter().map(|row| row.images.len()).chain([self.columns.len()]).max().unwrap_or(0);

        let headers: Vec<_> =
            self.columns.iter().map(|label| wrap(label, (cell / font.advance()) as usize)).collect();
        let labels: Vec<_> = self.rows.iter().map(|row| wrap(&row.label, ROW_LABEL_CHARS)).collect();
        let label_chars = labels.iter().flatten().map(String::len).max().unwrap_or(0);
        let left =
            MARGIN + if label_chars == 0 { 0 } else { label_chars as u32 * font.advance() + LABEL_GAP };
        let header_lines = headers.iter().map(Vec::len).max().unwrap_or(0);
        let top =
            MARGIN + if header_lines == 0 { 0 } else { header_lines as u32 * font.line + LABEL_GAP / 2 };
        let heights: Vec<u32> = self
            .rows
            .iter()
            .zip(&labels)
            .map(|(row, label)| {
                let tallest = row.images.iter().map(|i| i.height() * factor).max().unwrap_or(0);
                tallest.max(label.len() as u32 * font.line)
            })
            .collect();

        let width = left + spread(&vec![cell; columns]) + MARGIN;
        let height = top + spread(&heights) + MARGIN;
        let mut sheet = RgbImage::from_pixel(width, height, WHITE);
        for (column, lines) in headers.iter().enumerate() {
            let x = left + column as u32 * (cell + GAP);
            // Headers stand on the cells: a short one is as close to its column as a long one.
            let y = top - LABEL_GAP / 2 - lines.len() as u32 * font.line;
            for (n, line) in lines.iter().enumerate() {
                let inset = (cell - line.len() as u32 * font.advance()) / 2;
                draw_text(&mut sheet, x + inset, y + n as u32 * font.line, line, font, FontWeight::Bold);
            }
        }
        let mut y = top;
        for ((row, lines), height) in self.rows.iter().zip(&labels).zip(&heights) {
            let inset = (height - lines.len() as u32 * font.line) / 2;
            for (n, line) in lines.iter().enumerate() {
                draw_text(
                    &mut sheet,
                    MARGIN,
                    y + inset + n as u32 * font.line,
                    line,
                    font,
                    FontWeight::Regular,
                );
            }
            for (column, image) in row.images.iter().enumerate() {
                let image = enlarge(image, factor);
                let x = left + column as u32 * (cell + GAP) + (cell - image.width()) / 2;
                let y = y + (height - image.height()) / 2;
                imageops::replace(&mut sheet, &image, i64::from(x), i64::from(y));
            }
            y += height + GAP;
        }
        sheet
    }
}

/// Total length of cells with gaps between them.
fn spread(cells: &[u32]) -> u32 {
    cells.iter().sum::<u32>() + GAP * cells.len().saturating_sub(1) as u32
}

/// Each pixel becomes a square of `factor` x `factor`, so that one sees the pixels that the model made.
fn enlarge(image: &RgbImage, factor: u32) -> RgbImage {
    imageops::resize(image, image.width() * factor, image.height() * factor, FilterType::Nearest)
}

/// Breaks a label into lines of at most `limit` characters, at spaces where there are some; the lines are ASCII.
fn wrap(label: &str, limit: usize) -> Vec<String> {
    let mut lines = Vec::new();
    for paragraph in label.lines() {
        let mut line = String::new();
        for word in paragraph.split_whitespace() {
            let mut word: String = word.chars().map(|c| if c.is_ascii_graphic() { c } else { '?' }).collect();
            if !line.is_empty() && line.len() + 1 + word.len() > limit {
                lines.push(std::mem::take(&mut line));
            }
            while word.len() > limit {
                let rest = word.split_off(limit);
                lines.push(std::mem::replace(&mut word, rest));
            }
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(&word);
        }
        if !line.is_empty() {
            lines.push(line);
        }
    }
    lines
}

fn draw_text(sheet: &mut RgbImage, x: u32, y: u32, text: &str, font: Font, weight: FontWeight) {
    for (n, c) in text.chars().enumerate() {
        let Some(glyph) = get_raster(c, weight, font.size) else { continue };
        for (dy, row) in glyph.rows().enumerate() {
            for (dx, coverage) in row.iter().enumerate() {
                let grey = 255 - (u32::from(*coverage) * u32::from(255 - INK) / 255) as u8;
                let (x, y) = (x + n as u32 * font.advance() + dx as u32, y + dy as u32);
                if grey < 255 {
                    sheet.put_pixel(x, y, Rgb([grey; 3]));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_break_at_spaces_and_only_then_inside_words() {
        assert_eq!(wrap("a dog in the snow", 8), ["a dog in", "the snow"]);
        assert_eq!(wrap("tiny incomprehensible x", 8), ["tiny", "incompre", "hensible", "x"]);
        assert_eq!(wrap("  \n", 8), Vec::<String>::new());
        assert_eq!(wrap("rank 8\nlr 1e-4", 20), ["rank 8", "lr 1e-4"]);
    }

    #[test]
    fn characters_beyond_ascii_are_question_marks() {
        assert_eq!(wrap("caf\u{e9} \u{72ac}\u{1f436}", 20), ["caf? ??"]);
    }
}
