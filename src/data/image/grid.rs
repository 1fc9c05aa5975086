//! Contact sheets: images in rows and columns with labels, to look at many at once.
//!
//! Text is drawn with Noto Sans Mono (`assets/fonts/`), which is in the binary with its Latin, Greek and Cyrillic letters; other
//! characters show as a box.

use ::image::imageops::{self, FilterType};
use ::image::{Rgb, RgbImage};
use ab_glyph::{Font as _, FontRef, PxScale, ScaleFont, point};

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
const INK: f32 = 32.0;
const FONT: &[u8] = include_bytes!("../../../assets/fonts/NotoSansMono-Regular.ttf");

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

/// The text of a sheet.
struct LabelText {
    font: FontRef<'static>,
    scale: PxScale,
    /// Width of every character, in pixels.
    advance: u32,
    /// From one line to the next, in pixels.
    line: u32,
}

impl LabelText {
    fn for_cell(width: u32) -> Self {
        let font = FontRef::try_from_slice(FONT).expect("the font is part of the program");
        let (advance, line) = if width < LARGE_CELL { (7, 20) } else { (14, 40) };
        let scale = PxScale::from(
            advance as f32 * font.height_unscaled() / font.h_advance_unscaled(font.glyph_id('0')),
        );
        Self { font, scale, advance, line }
    }

    /// Draws one line with its upper left corner at `(x, y)`; twice, a little apart, where it is bold.
    fn draw(&self, sheet: &mut RgbImage, (x, y): (u32, u32), line: &str, bold: bool) {
        let baseline = y as f32 + self.font.as_scaled(self.scale).ascent();
        let apart = self.advance as f32 / 10.0;
        let strokes = if bold { &[0.0, apart][..] } else { &[0.0] };
        for (n, c) in line.chars().enumerate() {
            for stroke in strokes {
                let left = (x + n as u32 * self.advance) as f32 + stroke;
                let glyph = self.font.glyph_id(c).with_scale_and_position(self.scale, point(left, baseline));
                let Some(outline) = self.font.outline_glyph(glyph) else { continue };
                let corner = outline.px_bounds().min;
                outline.draw(|dx, dy, coverage| {
                    let (x, y) = (corner.x as u32 + dx, corner.y as u32 + dy);
                    if let Some(pixel) = sheet.get_pixel_mut_checked(x, y) {
                        let grey = 255.0 - coverage.min(1.0) * (255.0 - INK);
                        *pixel = Rgb([(grey as u8).min(pixel.0[0]); 3]);
                    }
                });
            }
        }
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
        let text = LabelText::for_cell(cell);
        let columns =
            self.rows.iter().map(|row| row.images.len()).chain([self.columns.len()]).max().unwrap_or(0);

        let headers: Vec<_> =
            self.columns.iter().map(|label| wrap(label, (cell / text.advance) as usize)).collect();
        let labels: Vec<_> = self.rows.iter().map(|row| wrap(&row.label, ROW_LABEL_CHARS)).collect();
        let label_chars = labels.iter().flatten().map(|line| length(line)).max().unwrap_or(0);
        let left = MARGIN + if label_chars == 0 { 0 } else { label_chars as u32 * text.advance + LABEL_GAP };
        let header_lines = headers.iter().map(Vec::len).max().unwrap_or(0);
        let top =
            MARGIN + if header_lines == 0 { 0 } else { header_lines as u32 * text.line + LABEL_GAP / 2 };
        let heights: Vec<u32> = self
            .rows
            .iter()
            .zip(&labels)
            .map(|(row, label)| {
                let tallest = row.images.iter().map(|i| i.height() * factor).max().unwrap_or(0);
                tallest.max(label.len() as u32 * text.line)
            })
            .collect();

        let width = left + spread(&vec![cell; columns]) + MARGIN;
        let height = top + spread(&heights) + MARGIN;
        let mut sheet = RgbImage::from_pixel(width, height, WHITE);
        for (column, lines) in headers.iter().enumerate() {
            let x = left + column as u32 * (cell + GAP);
            // Headers stand on the cells: a short one is as close to its column as a long one.
            let y = top - LABEL_GAP / 2 - lines.len() as u32 * text.line;
            for (n, line) in lines.iter().enumerate() {
                let inset = (cell - length(line) as u32 * text.advance) / 2;
                text.draw(&mut sheet, (x + inset, y + n as u32 * text.line), line, true);
            }
        }
        let mut y = top;
        for ((row, lines), height) in self.rows.iter().zip(&labels).zip(&heights) {
            let inset = (height - lines.len() as u32 * text.line) / 2;
            for (n, line) in lines.iter().enumerate() {
                text.draw(&mut sheet, (MARGIN, y + inset + n as u32 * text.line), line, false);
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

/// Breaks a label into lines of at most `limit` characters, at spaces where there are some.
fn wrap(label: &str, limit: usize) -> Vec<String> {
    let mut lines = Vec::new();
    for paragraph in label.lines() {
        let mut line = String::new();
        for mut word in paragraph.split_whitespace() {
            if !line.is_empty() && length(&line) + 1 + length(word) > limit {
                lines.push(std::mem::take(&mut line));
            }
            while let Some((end, _)) = word.char_indices().nth(limit) {
                lines.push(word[..end].to_string());
                word = &word[end..];
            }
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
        if !line.is_empty() {
            lines.push(line);
        }
    }
    lines
}

fn length(line: &str) -> usize {
    line.chars().count()
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
    fn words_break_between_letters_of_any_alphabet() {
        assert_eq!(
            wrap("caf\u{e9} \u{72ac}\u{1f436} \u{434}\u{43e}\u{43c}", 2),
            ["ca", "f\u{e9}", "\u{72ac}\u{1f436}", "\u{434}\u{43e}", "\u{43c}"]
        );
    }

    #[test]
    fn latin_greek_and_cyrillic_letters_are_drawn_and_others_are_a_box() {
        let LabelText { font, .. } = LabelText::for_cell(192);
        let letters = [0x21..=0x7e, 0xa1..=0xac, 0xae..=0x17f, 0x388..=0x38a, 0x3a3..=0x3ce, 0x400..=0x45f];
        for c in letters.into_iter().flatten().filter_map(char::from_u32) {
            assert!(font.glyph_id(c).0 != 0 && font.outline(font.glyph_id(c)).is_some(), "{c}");
        }
        let drawn = |label: &str| {
            let mut sheet = RgbImage::from_pixel(20, 20, WHITE);
            LabelText::for_cell(192).draw(&mut sheet, (2, 0), label, false);
            sheet
        };
        assert_eq!(drawn("\u{72ac}"), drawn("\u{1f436}"));
        assert!(drawn("\u{72ac}").pixels().filter(|pixel| pixel.0[0] < 200).count() > 20, "a box is seen");
        assert!(drawn("\u{72ac}") != drawn("?"));
    }
}
