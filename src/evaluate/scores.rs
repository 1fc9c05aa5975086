//! Stub.
use super::towers::Towers;
use crate::error::Result;
use crate::image::RgbImage;
use crate::results::Scores;

/// The real pictures of a subject and what surrounds them, embedded once.
pub struct Subject;

/// The real pictures that scores compare with.
#[derive(Default)]
pub struct References<'a> {
    /// The subject, pictures that were not trained on; may be empty, then only text and diversity are scored.
    pub real: Vec<&'a RgbImage>,
    /// Look-alikes of its class; may be empty, then identity is not scored.
    pub look_alikes: Vec<&'a RgbImage>,
    /// For each of `real` where the subject is: white, at the picture's size. `None`: no masks.
    pub masks: Option<Vec<&'a RgbImage>>,
}

impl Subject {
    /// Embeds the references.
    pub fn new(_towers: &Towers, _references: &References) -> Result<Self> {
        unimplemented!()
    }

    /// Scores the pictures of one prompt: those that they have together, and each one's own. `text` is the prompt as CLIP
    /// is to read it; `None`: no CLIP-T.
    pub fn score(
        &self,
        _towers: &Towers,
        _text: Option<&str>,
        _pictures: &[RgbImage],
    ) -> Result<(Scores, Vec<Scores>)> {
        unimplemented!()
    }
}

/// `drift` and `drift_clip` of each picture from the base model's picture of the same prompt and noise.
pub fn drift(_towers: &Towers, _pictures: &[RgbImage], _base: &[RgbImage]) -> Result<Vec<Scores>> {
    unimplemented!()
}

/// `prompt` without the rare token, for CLIP-T: `a sks dog` becomes `a dog`.
pub fn without_token(_prompt: &str, _token: &str) -> String {
    _prompt.replace(&format!("{_token} "), "")
}
