//! CLIP's tokenizer: byte-level BPE on lower-cased words, from `tokenizer.json` or from `vocab.json` and `merges.txt`.
//!
//! Special tokens come from `special_tokens_map.json`, `tokenizer_config.json` and `added_tokens.json`; the padding token
//! may be an ordinary character (`!` in Stable Diffusion 2.x), which then splits before the merges, as in transformers.

use crate::data::caption::bounded;
use crate::error::{Error, Result};
use crate::model::text::tokenizer_json::{self, MAX_ID};
use crate::weights::part::{Part, Text, read_below};
use crate::weights::source::Source;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::{
    NFC, Replace, Sequence as Normalizers, replace::ReplacePattern, utils::Lowercase,
};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior};

/// Words, numbers one digit at a time, and runs of other characters (CLIP's `simple_tokenizer`).
const WORDS: &str = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// Longest special token or added word, in bytes. The search for them takes minutes to set up for one of 100 000.
const MAX_TOKEN: usize = 1024;

/// So many characters of a prompt that is too long are told.
const SHOWN: usize = 40;

/// Prompts in, padded token ids out.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    start: u32,
    end: u32,
    pad: u32,
    length: usize,
}

impl Tokenizer {
    /// Loads the tokenizer of a text tower of `source`. `length` is the tower's: a tokenizer without one of its own pads to it.
    pub fn load(source: &Source, tower: Part, length: usize) -> Result<Self> {
        let folder = tower.tokenizer().unwrap_or_default();
        let find = |name: &str| source.find(&format!("{folder}/{name}"));
        Self::read(&Files { dir: source.path().join(folder), find: &find }, length)
    }

    /// [`Self::load`] of a folder that has the tokenizer's files at its top, as that of a whole CLIP model.
    pub fn in_folder(dir: &Path, length: usize) -> Result<Self> {
        Self::read(&Files { dir: dir.to_path_buf(), find: &|name| read_below(dir, name) }, length)
    }

    fn read(files: &Files, length: usize) -> Result<Self> {
        let dir = &files.dir;
        let settings = TokenizerSettings::read(files)?;
        let mut inner = if let Some(json) = (files.find)("tokenizer.json")? {
            let broken = |e| Error::format(&json.path, format!("not a tokenizer: {e}"));
            let value: Value = serde_json::from_str(&json.content).map_err(|e| broken(e.into()))?;
            let added = value["added_tokens"].as_array().into_iter().flatten();
            check_lengths(&json.path, added.filter_map(|token| token["content"].as_str()))?;
            let checked = tokenizer_json::checked(value).map_err(|problem| {
                Error::format(&json.path, format!("not a tokenizer of CLIP's kind: {problem}"))
            })?;
            let mut inner = tokenizers::Tokenizer::from_bytes(checked).map_err(broken)?;
            // Padding and truncation are done here, with the end token kept.
            inner.with_padding(None);
            inner.with_truncation(None).map_err(broken)?;
            inner
        } else {
            from_vocabulary(files)?
        };
        let special = [&settings.start, &settings.end, &settings.unknown, &settings.pad];
        let added = settings.added.iter().map(|token| token.content.as_str());
        check_lengths(dir, special.iter().map(|token| token.as_str()).chain(added))?;
        let tokens: Vec<AddedToken> =
            special.iter().map(|t| AddedToken::from((*t).clone(), true).normalized(false)).collect();
        inner.add_special_tokens(&tokens);
        inner.add_tokens(&settings.added);
        let id = |token: &str| {
            inner.token_to_id(token).ok_or_else(|| {
                Error::format(
                    dir,
                    format!("expected the special token `{token}` in the vocabulary, found none"),
                )
            })
        };
        let (start, end, pad) = (id(&settings.start)?, id(&settings.end)?, id(&settings.pad)?);
        let length = settings.length.map_or(length, |own| own.min(length));
        if length < 3 {
            return Err(Error::format(dir, format!("expected room for 3 tokens or more, found {length}")));
        }
        Ok(Self { inner, start, end, pad, length })
    }

    /// Ids of one prompt: start, tokens, end, padding. Also how many tokens did not fit and were left out.
    ///
    /// An [`ErrorKind::Data`](crate::ErrorKind::Data) for a prompt of more than
    /// [`MAX_CAPTION_BYTES`](crate::data::caption::MAX_CAPTION_BYTES).
    pub fn encode(&self, prompt: &str) -> Result<(Vec<i64>, usize)> {
        bounded(prompt).map_err(|problem| {
            let start: String = prompt.chars().take(SHOWN).collect();
            Error::data(format!("prompt `{start}..`: {problem}"))
        })?;
        let encoding = self
            .inner
            .encode(prompt, false)
            .map_err(|e| Error::data(format!("prompt `{prompt}` cannot be turned into tokens: {e}")))?;
        let tokens = encoding.get_ids();
        let kept = tokens.len().min(self.length - 2);
        let mut ids = Vec::with_capacity(self.length);
        ids.push(self.start);
        ids.extend_from_slice(&tokens[..kept]);
        ids.push(self.end);
        ids.resize(self.length, self.pad);
        Ok((ids.into_iter().map(i64::from).collect(), tokens.len() - kept))
    }

    /// Id of the token that ends every prompt.
    pub fn end(&self) -> i64 {
        i64::from(self.end)
    }

    /// Number of ids of an encoded prompt.
    pub fn length(&self) -> usize {
        self.length
    }

    /// The largest id that can come out, for a check against the text tower.
    pub fn largest_id(&self) -> u32 {
        self.inner.get_vocab(true).into_values().max().unwrap_or(0)
    }
}

/// The tokenizer's files, each of which may be missing.
struct Files<'a> {
    dir: PathBuf,
    find: &'a dyn Fn(&str) -> Result<Option<Text>>,
}

impl Files<'_> {
    /// `null` for a file that is missing.
    fn json(&self, name: &str) -> Result<Value> {
        (self.find)(name)?.map_or(Ok(Value::Null), |text| {
            serde_json::from_str(&text.content).map_err(|e| Error::format(&text.path, e.to_string()))
        })
    }
}

/// Special tokens and length, from whichever of the JSON files has them.
struct TokenizerSettings {
    start: String,
    end: String,
    unknown: String,
    pad: String,
    length: Option<usize>,
    added: Vec<AddedToken>,
}

impl TokenizerSettings {
    fn read(files: &Files) -> Result<Self> {
        let config = files.json("tokenizer_config.json")?;
        let map = files.json("special_tokens_map.json")?;
        let token = |name: &str, default: &str| {
            [&config[name], &map[name]]
                .into_iter()
                .find_map(token_text)
                .unwrap_or_else(|| default.to_string())
        };
        let end = token("eos_token", "<|endoftext|>");
        let mut added = Vec::new();
        if let Some(entries) = config["added_tokens_decoder"].as_object() {
            added.extend(entries.values().filter(|v| v["special"] != true).filter_map(added_token));
        }
        if let Some(entries) = files.json("added_tokens.json")?.as_object() {
            let mut entries: Vec<_> = entries.iter().collect();
            entries.sort_by_key(|(_, id)| id.as_i64());
            added.extend(entries.into_iter().map(|(text, _)| AddedToken::from(text.clone(), false)));
        }
        Ok(Self {
            start: token("bos_token", "<|startoftext|>"),
            unknown: token("unk_token", &end),
            pad: token("pad_token", &end),
            end,
            // transformers writes an astronomically large number for "no limit"
            length: config["model_max_length"].as_u64().map(|n| n as usize),
            added,
        })
    }
}

/// Fails if a special token or added word is longer than any model has one.
fn check_lengths<'a>(path: &Path, mut tokens: impl Iterator<Item = &'a str>) -> Result<()> {
    tokens.find(|token| token.len() > MAX_TOKEN).map_or(Ok(()), |token| {
        let (length, start) = (token.len(), token.chars().take(20).collect::<String>());
        Err(Error::format(
            path,
            format!("expected special tokens of up to {MAX_TOKEN} bytes, found `{start}..` of {length}"),
        ))
    })
}

/// A token's text: a string, or an object as older files have it.
fn token_text(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value["content"].as_str()).map(str::to_string)
}

fn added_token(value: &Value) -> Option<AddedToken> {
    let flag = |name: &str| value[name].as_bool().unwrap_or(false);
    Some(
        AddedToken::from(token_text(value)?, false)
            .single_word(flag("single_word"))
            .lstrip(flag("lstrip"))
            .rstrip(flag("rstrip"))
            .normalized(value["normalized"].as_bool().unwrap_or(true)),
    )
}

/// The tokenizer that transformers builds when there is no `tokenizer.json`.
fn from_vocabulary(files: &Files) -> Result<tokenizers::Tokenizer> {
    let dir = &files.dir;
    let (Some(vocab), Some(merges)) = ((files.find)("vocab.json")?, (files.find)("merges.txt")?) else {
        return Err(Error::format(
            dir,
            "expected tokenizer.json, or vocab.json and merges.txt, found neither",
        ));
    };
    let ids: BTreeMap<String, u32> = serde_json::from_str(&vocab.content)
        .map_err(|e| Error::format(&vocab.path, format!("expected the ids of tokens: {e}")))?;
    if let Some((word, id)) = ids.iter().find(|(_, id)| **id > MAX_ID) {
        return Err(Error::format(
            &vocab.path,
            format!("`{word}`: expected an id of at most {MAX_ID}, found {id}"),
        ));
    }
    // A line is a pair; the first may be a comment.
    let lines = merges.content.lines().filter(|line| !line.starts_with("#version"));
    let pair = |line: &str| line.split_once(' ').map(|(a, b)| (a.to_string(), b.to_string()));
    let pairs: Option<Vec<_>> = lines.map(pair).collect();
    let pairs = pairs.ok_or_else(|| Error::format(&merges.path, "expected two words on each line"))?;
    let broken =
        |e: tokenizers::Error| Error::format(dir, format!("vocab.json and merges.txt do not fit: {e}"));
    let bpe = BPE::builder()
        .vocab_and_merges(ids.into_iter().collect::<Vocab>(), pairs)
        .unk_token("<|endoftext|>".into())
        .end_of_word_suffix("</w>".into())
        .continuing_subword_prefix(String::new())
        .build()
        .map_err(broken)?;
    let mut inner = tokenizers::Tokenizer::new(bpe);
    let spaces = Replace::new(ReplacePattern::Regex(r"\s+".into()), " ").map_err(broken)?;
    inner.with_normalizer(Some(Normalizers::new(vec![
        NormalizerWrapper::NFC(NFC),
        NormalizerWrapper::Replace(spaces),
        NormalizerWrapper::Lowercase(Lowercase),
    ])));
    let words = Split::new(SplitPattern::Regex(WORDS.into()), SplitDelimiterBehavior::Removed, true)
        .map_err(broken)?;
    inner.with_pre_tokenizer(Some(PreTokenizers::new(vec![
        PreTokenizerWrapper::Split(words),
        PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, true)),
    ])));
    Ok(inner)
}
