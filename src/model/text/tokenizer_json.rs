//! What of a `tokenizer.json` is handed to the `tokenizers` crate: that of a byte-level BPE, as CLIP's is, and no more.
//!
//! The format describes any pipeline, and the crate trusts it: some values of decoders and merges make it panic, ids near
//! 2^32 overflow, and steps that lengthen the text can be chained until no memory is left. So what ends up in no id is
//! taken out, and the rest is checked first.

use serde_json::Value;

/// Ids of tokens above this are no model's.
pub const MAX_ID: u32 = (1 << 24) - 1;
/// Steps before the merges; CLIP has 3 of the one kind and 2 of the other.
const MAX_STEPS: usize = 8;
/// Steps that may make a text longer, and by how much.
const MAX_LONGER: usize = 2;
const MAX_REPLACEMENT: usize = 8;

const NORMALIZERS: [&str; 9] =
    ["BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Replace", "Strip", "StripAccents"];
const PRE_TOKENIZERS: [&str; 7] =
    ["BertPreTokenizer", "ByteLevel", "Digits", "Punctuation", "Split", "Whitespace", "WhitespaceSplit"];

/// The text of a `tokenizer.json` with this value that is safe to build. Errors: what was expected.
pub fn checked(mut value: Value) -> Result<String, String> {
    let map = value.as_object_mut().ok_or("expected a JSON object")?;
    // Padding and truncation are done here; nothing is decoded, and special tokens are added here.
    for unused in ["truncation", "padding", "post_processor", "decoder"] {
        map.insert(unused.to_string(), Value::Null);
    }
    steps(&value["normalizer"], "normalizer", "normalizers", &NORMALIZERS, |step| step["type"] == "Replace")?;
    let pre = &value["pre_tokenizer"];
    steps(pre, "pre_tokenizer", "pretokenizers", &PRE_TOKENIZERS, |step| step["type"] == "ByteLevel")?;
    let model = &value["model"];
    if model["type"] != "BPE" {
        return Err(format!("model: expected type BPE, found {}", model["type"]));
    }
    let prefix = &model["continuing_subword_prefix"];
    if !prefix.is_null() && prefix != "" {
        return Err(format!("continuing_subword_prefix: expected none, found {prefix}"));
    }
    if !model["dropout"].is_null() && model["dropout"].as_f64() != Some(0.0) {
        return Err(format!("dropout: expected none, found {}", model["dropout"]));
    }
    let vocabulary = model["vocab"].as_object().ok_or("vocab: expected the ids of tokens, found none")?;
    let is_id = |id: &Value| id.as_u64().is_some_and(|id| id <= u64::from(MAX_ID));
    if let Some((word, id)) = vocabulary.iter().find(|(_, id)| !is_id(id)) {
        return Err(format!("`{word}`: expected an id of at most {MAX_ID}, found {id}"));
    }
    Ok(value.to_string())
}

/// Checks one step, or a sequence of them, which may hold others.
fn steps(
    value: &Value,
    what: &str,
    inside: &str,
    known: &[&str],
    longer: fn(&Value) -> bool,
) -> Result<(), String> {
    let mut waiting = vec![value];
    let mut all = Vec::new();
    while let Some(step) = waiting.pop() {
        match step["type"].as_str() {
            None if step.is_null() => {}
            Some("Sequence") => waiting.extend(step[inside].as_array().into_iter().flatten()),
            Some(kind) if known.contains(&kind) => all.push(step),
            _ => return Err(format!("{what}: expected {}, found {}", known.join(", "), step["type"])),
        }
    }
    let long = all.iter().filter(|step| longer(step)).count();
    if all.len() > MAX_STEPS || long > MAX_LONGER {
        return Err(format!(
            "{what}: expected at most {MAX_STEPS} steps, {MAX_LONGER} that lengthen, found {}",
            all.len()
        ));
    }
    match all.iter().find(|step| step["content"].as_str().is_some_and(|text| text.len() > MAX_REPLACEMENT)) {
        Some(step) => {
            Err(format!("{what}: expected a replacement of at most {MAX_REPLACEMENT} bytes, found {step}"))
        }
        None => Ok(()),
    }
}
