//! What prompts are to a model's text towers.

/// A prompt: what the first text tower reads, and what the second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PromptTexts<'a> {
    /// For the first tower, or the only one.
    pub first: &'a str,
    /// For the second tower of Stable Diffusion XL.
    pub second: &'a str,
}

impl<'a> From<&'a str> for PromptTexts<'a> {
    /// The same for all towers.
    fn from(text: &'a str) -> Self {
        Self { first: text, second: text }
    }
}
