//! What texts become in a session: each is made once, and may be known from an earlier session.

use crate::diffusion::prompt::PromptTexts;
use crate::model::Conditioning;
use std::collections::HashMap;

/// So many texts are kept; a file of prompts may hold any number.
const MOST_TEXTS: usize = 256;

/// What a text becomes depends on these.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct TextKey {
    adapted: bool,
    /// For each text tower.
    texts: [String; 2],
    clip_skip: usize,
}

impl TextKey {
    /// Of a prompt, read by towers that are adapted or not, of which so many layers are left out.
    pub(super) fn new(adapted: bool, prompt: PromptTexts, clip_skip: usize) -> Self {
        Self { adapted, texts: [prompt.first, prompt.second].map(str::to_string), clip_skip }
    }
}

/// What texts became: for sessions that borrow the same model ([`Session::over`](super::Session::over)), when its text encoders were let go.
#[derive(Default)]
pub struct KnownTexts(HashMap<TextKey, Conditioning>);

/// The texts of a session.
#[derive(Default)]
pub(super) struct Texts {
    known: KnownTexts,
    made: HashMap<TextKey, Conditioning>,
}

impl Texts {
    /// Takes over what is known already.
    pub(super) fn add(&mut self, known: &KnownTexts) {
        self.known.0.extend(known.0.iter().map(|(key, text)| (key.clone(), text.shallow_clone())));
    }

    /// What was made since the last such call; it stays known.
    pub(super) fn take(&mut self) -> KnownTexts {
        let made = KnownTexts(std::mem::take(&mut self.made));
        self.add(&made);
        made
    }

    /// Forgets all: an adapter changed it.
    pub(super) fn forget(&mut self) {
        *self = Self::default();
    }

    /// What a text became.
    pub(super) fn get(&self, key: &TextKey) -> Option<Conditioning> {
        self.known.0.get(key).or_else(|| self.made.get(key)).map(Conditioning::shallow_clone)
    }

    /// Keeps what a text became.
    pub(super) fn put(&mut self, key: TextKey, text: &Conditioning) {
        if self.made.len() >= MOST_TEXTS {
            self.made.clear();
        }
        self.made.insert(key, text.shallow_clone());
    }
}

impl KnownTexts {
    /// With those of another.
    pub(super) fn extend(&mut self, other: Self) {
        self.0.extend(other.0);
    }
}
