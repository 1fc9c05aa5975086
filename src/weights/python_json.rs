//! JSON as Python writes it: with bare `Infinity` and `NaN`, which JSON does not have (DPM++'s `lambda_min_clipped` is one in
//! many published files).

use serde_json::{Map, Value};

/// Bare words, and the texts that stand for them in what [`parse`] gives.
const NUMBERS: [(&str, &str); 3] = [("-Infinity", "\"-inf\""), ("Infinity", "\"inf\""), ("NaN", "\"nan\"")];

/// Parses an object; an infinite number becomes the text `inf` or `-inf`, no number `nan`.
pub fn parse(text: &str) -> serde_json::Result<Map<String, Value>> {
    serde_json::from_str(&quoted(text))
}

/// Writes an object that [`parse`] gave.
pub fn write(values: &Map<String, Value>) -> String {
    let text = format!("{:#}\n", Value::from(values.clone()));
    NUMBERS
        .iter()
        .fold(text, |text, (bare, quoted)| text.replace(&format!(": {quoted}"), &format!(": {bare}")))
}

/// Puts bare words in quotes; strings stay as they are.
fn quoted(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len());
    for (i, part) in text.split('"').enumerate() {
        let separator = if i == 0 { "" } else { "\"" };
        quoted.push_str(separator);
        // Odd parts lie inside a string. A key or value with an escaped quote would shift that; the parser then says
        // so, and no published config has one.
        if i % 2 == 1 {
            quoted.push_str(part);
        } else {
            // Each is replaced in what is still bare, so that the longer one goes first.
            let bare = NUMBERS.iter().fold(part.to_string(), |part, (bare, text)| part.replace(bare, text));
            quoted.push_str(&bare);
        }
    }
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bare_numbers_go_both_ways() {
        let text =
            "{\n  \"a\": -Infinity,\n  \"b\": Infinity,\n  \"c\": NaN,\n  \"d\": \"to -Infinity\"\n}\n";
        let values = parse(text).unwrap();
        assert_eq!([&values["a"], &values["b"], &values["c"]], ["-inf", "inf", "nan"]);
        assert_eq!(write(&values), text);
    }
}
