//! Seeded damage to files that were good: what a broken download, another program or a hostile sender makes of them.
//!
//! One seed gives one damage, on every machine. JSON and safetensors files are taken apart and put together again, so
//! that most of the damage gets past the parser, to the code that trusts what the parser lets through.

use serde_json::{Map, Value, json};

/// SplitMix64.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `n`; 0 for an empty choice.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    pub fn pick<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len())]
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

/// The same file, damaged. `other` is another good file, whose pieces may get in.
pub fn mutate(rng: &mut Rng, good: &[u8], other: &[u8]) -> Vec<u8> {
    if rng.one_in(4) {
        return bytes(rng, good, other);
    }
    if let Some((header, data)) = safetensors(good) {
        return tensor_file(rng, header, data);
    }
    let text = String::from_utf8_lossy(good);
    match serde_json::from_str::<Value>(&text) {
        Ok(value) if value.is_object() => json_text(rng, value),
        _ if std::str::from_utf8(good).is_ok() => lines(rng, &text),
        _ => bytes(rng, good, other),
    }
}

/// Bits, cuts, pieces of the other file, and numbers that stand for sizes.
fn bytes(rng: &mut Rng, good: &[u8], other: &[u8]) -> Vec<u8> {
    let mut bad = good.to_vec();
    // Headers are where the sizes are.
    let near =
        |rng: &mut Rng, len: usize| if rng.one_in(2) { rng.below(len.min(256)) } else { rng.below(len) };
    for _ in 0..1 + rng.below(4) {
        if bad.is_empty() {
            break;
        }
        let at = near(rng, bad.len());
        match rng.below(7) {
            0 | 1 => bad[at] ^= 1 << rng.below(8),
            2 => bad[at] = rng.next() as u8,
            3 => bad.truncate(at),
            4 => {
                let from = rng.below(other.len());
                let piece = &other[from..(from + 1 + rng.below(64)).min(other.len())];
                bad.splice(at..at, piece.iter().copied());
            }
            5 => {
                let to = (at + 1 + rng.below(64)).min(bad.len());
                bad.drain(at..to);
            }
            _ => {
                let number = *rng.pick(&[0, 1, 0x7fff_ffff, 0xffff_ffff, 1 << 62, u64::MAX >> 1, u64::MAX]);
                let width = *rng.pick(&[2, 4, 8]);
                let (mut number, mut width) = (number.to_le_bytes()[..width].to_vec(), width);
                if rng.one_in(2) {
                    number.reverse();
                }
                width = width.min(bad.len() - at);
                bad[at..at + width].copy_from_slice(&number[..width]);
            }
        }
    }
    bad
}

/// Lines of TOML or of a word list, moved about, and values that no setting has.
fn lines(rng: &mut Rng, good: &str) -> Vec<u8> {
    const VALUES: [&str; 16] = [
        "-1",
        "0",
        "9223372036854775807",
        "-9223372036854775808",
        "18446744073709551616",
        "1e308",
        "nan",
        "-inf",
        "\"\"",
        "\"../../../etc/passwd\"",
        "[]",
        "[[[[[[[[]]]]]]]]",
        "{}",
        "true",
        "\"\\u0000\"",
        "1979-05-27T07:32:00Z",
    ];
    let mut lines: Vec<String> = good.lines().map(str::to_string).collect();
    for _ in 0..1 + rng.below(3) {
        if lines.is_empty() {
            break;
        }
        let at = rng.below(lines.len());
        match rng.below(5) {
            0 => drop(lines.remove(at)),
            1 => lines.insert(at, lines[rng.below(lines.len())].clone()),
            2 => lines[at] = "[".repeat(1 << rng.below(14)),
            _ => match lines[at].split_once('=') {
                Some((key, _)) => lines[at] = format!("{key}= {}", rng.pick(&VALUES)),
                None => lines[at] += *rng.pick(&VALUES),
            },
        }
    }
    lines.join("\n").into_bytes()
}

/// A value that no reader should trust.
fn hostile(rng: &mut Rng) -> Value {
    match rng.below(24) {
        0 => Value::Null,
        1 => true.into(),
        2 => (-1).into(),
        3 => 0.into(),
        4 => 1.into(),
        5 => 3.into(),
        6 => 1e308.into(),
        7 => (-1e308).into(),
        8 => 5e-324.into(),
        9 => i64::MAX.into(),
        10 => i64::MIN.into(),
        11 => u64::MAX.into(),
        12 => (1u64 << 63).into(),
        13 => (1u64 << 31).into(),
        14 => 65_536.into(),
        15 => "".into(),
        16 => "../../../outside".into(),
        17 => "a)|(b*".into(),
        18 => "x".repeat(100_000).into(),
        19 => json!([]),
        20 => json!({}),
        21 => json!([1, "x", null, -1]),
        22 => (0..100).fold(json!(1), |inner, _| json!([inner])),
        _ => vec![0; 1000].into(),
    }
}

/// JSON with one to three values changed, taken out, renamed or put elsewhere; sometimes what is not JSON at all.
fn json_text(rng: &mut Rng, mut value: Value) -> Vec<u8> {
    for _ in 0..1 + rng.below(3) {
        let nodes = count(&value);
        // Not the whole document, but the few nodes near its top as often as the many below.
        let top = value.as_object().map_or(0, Map::len);
        let at = if rng.one_in(2) && top > 0 { None } else { Some(1 + rng.below(nodes.saturating_sub(1))) };
        match at {
            None => top_level(rng, &mut value),
            Some(mut at) => replace(&mut value, &mut at, &mut |old| *old = hostile(rng)),
        }
    }
    let mut text = value.to_string();
    if rng.one_in(12) {
        let numbers: Vec<usize> =
            text.match_indices(": ").chain(text.match_indices(':')).map(|(i, _)| i + 1).collect();
        if !numbers.is_empty() {
            let odd = ["NaN,", "-Infinity,", "1e999,", "00,", "\"\\ud800\",", "+1,"];
            text.insert_str(*rng.pick(&numbers), rng.pick::<&str>(&odd));
        }
    } else if rng.one_in(24) {
        text = "[{\"a\":".repeat(50_000) + &text;
    }
    text.into_bytes()
}

/// One key of an object: another value, gone, or under another name.
fn top_level(rng: &mut Rng, value: &mut Value) {
    let Some(map) = value.as_object_mut() else { return };
    let keys: Vec<String> = map.keys().cloned().collect();
    if keys.is_empty() {
        return;
    }
    let key = rng.pick(&keys).clone();
    match rng.below(6) {
        0 => drop(map.remove(&key)),
        1 => {
            let moved = map.remove(&key).unwrap_or_default();
            map.insert(rng.pick(&keys).clone(), moved);
        }
        2 => {
            let other = map[rng.pick(&keys)].clone();
            map.insert(key, other);
        }
        _ => drop(map.insert(key, hostile(rng))),
    }
}

fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(list) => list.iter().map(count).sum(),
        Value::Object(map) => map.values().map(count).sum(),
        _ => 0,
    }
}

/// Visits the node that `at` counts down to.
fn replace(value: &mut Value, at: &mut usize, with: &mut dyn FnMut(&mut Value)) {
    if *at == 0 {
        with(value);
        *at = usize::MAX;
        return;
    }
    *at = at.wrapping_sub(1);
    match value {
        Value::Array(list) => list.iter_mut().for_each(|v| {
            if *at != usize::MAX {
                replace(v, at, with);
            }
        }),
        Value::Object(map) => map.values_mut().for_each(|v| {
            if *at != usize::MAX {
                replace(v, at, with);
            }
        }),
        _ => {}
    }
}

/// Header and data of a safetensors file, if it is one.
pub fn safetensors(file: &[u8]) -> Option<(Map<String, Value>, &[u8])> {
    let size = u64::from_le_bytes(file.get(..8)?.try_into().ok()?);
    let end = usize::try_from(size).ok()?.checked_add(8)?;
    let header = serde_json::from_slice(file.get(8..end)?).ok()?;
    Some((header, &file[end..]))
}

/// The file with this header.
pub fn with_header(header: &Map<String, Value>, data: &[u8]) -> Vec<u8> {
    let header = Value::from(header.clone()).to_string().into_bytes();
    [&(header.len() as u64).to_le_bytes(), &header[..], data].concat()
}

fn width(dtype: &str) -> u64 {
    match dtype {
        "F64" | "I64" | "U64" => 8,
        "F32" | "I32" => 4,
        "F16" | "BF16" | "I16" => 2,
        _ => 1,
    }
}

/// A safetensors file with a lying header, or with an honest one of tensors that nobody expects.
fn tensor_file(rng: &mut Rng, mut header: Map<String, Value>, data: &[u8]) -> Vec<u8> {
    let names: Vec<String> = header.keys().filter(|k| *k != "__metadata__").cloned().collect();
    if names.is_empty() || rng.one_in(4) {
        // What is in the header, without care for the rest.
        let text = json_text(rng, header.into());
        return [&(text.len() as u64).to_le_bytes(), &text[..], data].concat();
    }
    let mut tensors: Vec<(String, String, Vec<u64>, Vec<u8>)> = names
        .iter()
        .filter_map(|name| {
            let info = header.remove(name)?;
            let shape = info["shape"].as_array()?.iter().map(Value::as_u64).collect::<Option<_>>()?;
            let [start, end] = [0, 1].map(|i| info["data_offsets"][i].as_u64().unwrap_or(0) as usize);
            Some((name.clone(), info["dtype"].as_str()?.to_string(), shape, data.get(start..end)?.to_vec()))
        })
        .collect();
    for _ in 0..1 + rng.below(3) {
        if tensors.is_empty() {
            break;
        }
        let at = rng.below(tensors.len());
        let donor = tensors[rng.below(tensors.len())].clone();
        match rng.below(12) {
            0 => drop(tensors.remove(at)),
            1 => tensors[at].0 = donor.0 + *rng.pick(&["", ".x", ".weight"]),
            2 => (tensors[at].1, tensors[at].2, tensors[at].3) = (donor.1, donor.2, donor.3),
            3 => {
                tensors[at].1 =
                    rng.pick(&["F64", "F16", "BF16", "I64", "BOOL", "U8", "F8_E4M3", "C64", "F4"]).to_string()
            }
            4 => tensors[at].2.reverse(),
            5 => tensors[at].2.push(1),
            6 => drop(tensors[at].2.pop()),
            7 => {
                let d = rng.below(tensors[at].2.len());
                if let Some(size) = tensors[at].2.get_mut(d) {
                    *size =
                        *rng.pick(&[0, 1, 2, 3, size.saturating_add(1), size.saturating_mul(2), *size / 2]);
                }
            }
            8 => {
                tensors[at].2 =
                    rng.pick(&[vec![1 << 62, 2, 0], vec![0, 1 << 63], vec![0; 70], vec![]]).clone()
            }
            _ => {
                let value = *rng.pick(&[
                    0f32,
                    -0.0,
                    f32::NAN,
                    f32::INFINITY,
                    f32::MAX,
                    f32::MIN,
                    1e-40,
                    1e20,
                    1e-20,
                    1.0,
                ]);
                let some = rng.one_in(2);
                for four in tensors[at].3.chunks_exact_mut(4) {
                    if !some || rng.one_in(8) {
                        four.copy_from_slice(&value.to_le_bytes());
                    }
                }
            }
        }
    }
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    tensors.dedup_by(|a, b| a.0 == b.0);
    let mut all = Vec::new();
    for (name, dtype, shape, mut data) in tensors {
        let size = shape.iter().fold(width(&dtype), |n, d| n.saturating_mul(*d));
        if size > 1 << 21 {
            continue;
        }
        if data.is_empty() {
            data.push(0);
        }
        let start = all.len();
        all.extend(data.iter().copied().cycle().take(size as usize));
        header.insert(name, json!({"dtype": dtype, "shape": shape, "data_offsets": [start, all.len()]}));
    }
    with_header(&header, &all)
}
