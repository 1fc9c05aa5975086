//! How long a text may be that a model is shown.

/// Longest prompt or caption in bytes: hundreds of times what a text tower reads, which has room for 77 tokens. A tokenizer takes a
/// hundred times as much memory as the text.
pub const MAX_CAPTION_BYTES: usize = 1 << 16;

/// The problem of a longer text, as a sentence.
pub fn bounded(text: &str) -> Result<(), String> {
    if text.len() <= MAX_CAPTION_BYTES {
        return Ok(());
    }
    let found = text.len();
    Err(format!(
        "expected a prompt of at most {MAX_CAPTION_BYTES} bytes (models read 77 tokens), found {found}"
    ))
}
