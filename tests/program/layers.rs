//! Rooms (the folders of src/) import downwards only, in the order that src/lib.rs draws, and no files import each other in a circle.
//! That a folder's `mod.rs` calls the files below it, which use its types, is no circle.

use crate::support::base::root;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The rooms, lowest first: the lines of the drawing in src/lib.rs, which start with a room's name.
fn rooms() -> Vec<String> {
    let text = std::fs::read_to_string(root().join("src/lib.rs")).unwrap();
    let drawing = text.split("```text").nth(1).unwrap().split("```").next().unwrap();
    let first = |line: &str| {
        let name = line.strip_prefix("//! ")?.split(' ').next()?;
        name.strip_suffix('/').map(String::from)
    };
    let mut rooms: Vec<String> = drawing.lines().filter_map(first).collect();
    rooms.reverse();
    rooms
}

fn sources(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for path in std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()) {
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
    found
}

/// `a::{b, c::{self, d}}` as `a::b`, `a::c`, `a::c::d`.
fn expand(tree: &str) -> Vec<String> {
    let Some(open) = tree.find('{') else {
        let path = tree.split(" as ").next().unwrap().trim();
        return vec![path.strip_suffix("::self").unwrap_or(path).to_string()];
    };
    let (mut depth, mut start, mut found) = (0, open + 1, Vec::new());
    for (at, c) in tree.char_indices().skip(open) {
        depth += i32::from(c == '{') - i32::from(c == '}');
        if (c == ',' && depth == 1) || (c == '}' && depth == 0) {
            let item = tree[start..at].trim();
            if !item.is_empty() {
                found.extend(expand(&format!("{}{item}", &tree[..open])));
            }
            start = at + 1;
        }
    }
    found
}

/// The paths that a file names: its imports, and whatever it spells from `crate` or `super` elsewhere. Tests do not count, nor do
/// the files of a folder that its `mod.rs` declares, hands on and calls by name.
fn paths(text: &str, is_folder: bool) -> Vec<String> {
    let code = text.split("#[cfg(test)]").next().unwrap();
    let lines = code.lines().filter(|line| !line.trim_start().starts_with("//"));
    let code = lines.collect::<Vec<_>>().join(" ");
    let mut found = Vec::new();
    for statement in code.split(';') {
        let mut words = statement.splitn(2, "use ");
        let (before, tree) = (words.next().unwrap(), words.next());
        let handed_on = is_folder && before.trim_end().ends_with("pub");
        if let Some(tree) = tree.filter(|_| !handed_on) {
            found.extend(expand(&tree.split_whitespace().collect::<Vec<_>>().join(" ")));
        }
    }
    for root in ["crate::", "super::"] {
        for rest in code.split(root).skip(1) {
            let path: String =
                rest.chars().take_while(|c| c.is_ascii_alphanumeric() || ['_', ':'].contains(c)).collect();
            found.push(format!("{root}{path}"));
        }
    }
    found
}

/// What each file uses, by module path (`train::loss`).
fn imports() -> BTreeMap<String, BTreeSet<String>> {
    let src = root().join("src");
    let module = |path: &Path| {
        let parts = path.strip_prefix(&src).unwrap().with_extension("");
        let parts: Vec<&str> = parts.iter().map(|p| p.to_str().unwrap()).filter(|p| *p != "mod").collect();
        parts.join("::")
    };
    let files: BTreeMap<String, PathBuf> = sources(&src).into_iter().map(|p| (module(&p), p)).collect();
    let mut found = BTreeMap::new();
    for (name, path) in &files {
        let text = std::fs::read_to_string(path).unwrap();
        let own: Vec<&str> = name.split("::").collect();
        let mut uses = BTreeSet::new();
        for path in paths(&text, path.ends_with("mod.rs")) {
            let parts: Vec<&str> = path.split("::").collect();
            let up = parts.iter().take_while(|part| **part == "super").count();
            let full: Vec<&str> = match parts[0] {
                "crate" => parts[1..].to_vec(),
                "super" => own[..own.len() - up].iter().chain(&parts[up..]).copied().collect(),
                "self" => own.iter().chain(&parts[1..]).copied().collect(),
                _ => own.iter().chain(&parts).copied().collect(),
            };
            let file = (1..=full.len()).rev().map(|n| full[..n].join("::")).find(|m| files.contains_key(m));
            uses.extend(file.filter(|file| file != name));
        }
        found.insert(name.clone(), uses);
    }
    found
}

#[test]
fn nothing_imports_upwards() {
    let rooms = rooms();
    assert_eq!(rooms.len(), 11, "{rooms:?}");
    let room = |file: &str| file.split("::").next().unwrap().to_string();
    // `error` is everybody's.
    let level = |file: &str| match file {
        "error" => 0,
        _ => {
            1 + rooms.iter().position(|r| *r == room(file)).unwrap_or_else(|| panic!("`{file}` has no room"))
        }
    };
    let imports = imports();
    let (mut seen, mut wrong) = (0, Vec::new());
    for (file, uses) in imports.iter().filter(|(file, _)| !["lib", "main"].contains(&file.as_str())) {
        seen += uses.len();
        wrong.extend(
            uses.iter().filter(|used| level(used) > level(file)).map(|used| format!("{file} uses {used}")),
        );
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(seen > 500, "only {seen} imports were found");
}

#[test]
fn no_files_import_in_a_circle() {
    let imports = imports();
    // All that a file reaches; files that reach each other are in one circle.
    let mut reached: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for file in imports.keys() {
        let (mut seen, mut next) = (BTreeSet::new(), vec![file.as_str()]);
        while let Some(at) = next.pop() {
            for used in &imports[at] {
                if seen.insert(used.as_str()) {
                    next.push(used);
                }
            }
        }
        reached.insert(file, seen);
    }
    let circle = |file: &str| -> Vec<&str> {
        reached[file].iter().copied().filter(|other| reached[other].contains(file)).collect()
    };
    let found: BTreeSet<Vec<&str>> =
        reached.keys().map(|file| circle(file)).filter(|c| !c.is_empty()).collect();
    assert!(found.is_empty(), "files that import each other: {found:#?}");
}

/// Where values cross between the host and the device: clippy.toml forbids the functions, and this what it cannot name.
#[test]
fn only_the_platform_makes_host_tensors_and_reads_them() {
    let src = root().join("src");
    let words = [
        "Device::Cpu",
        "(Kind::Float, host::CPU)",
        "(Kind::Double, host::CPU)",
        "(kind, host::CPU)",
        "copy_data(",
        "Vec::try_from(",
        "bool::try_from(",
        "f64::try_from(",
        "f32::try_from(",
    ];
    let words: Vec<String> = words
        .map(String::from)
        .into_iter()
        .chain(["f32", "f64", "i64", "u8"].map(|t| format!("Vec::<{t}>::try_from(")))
        .collect();
    let (mut looked_at, mut wrong) = (0, Vec::new());
    for path in sources(&src).into_iter().filter(|path| !path.starts_with(src.join("platform"))) {
        let text = std::fs::read_to_string(&path).unwrap();
        let code = text.split("#[cfg(test)]").next().unwrap();
        looked_at += code.lines().count();
        let found = words.iter().filter(|word| code.contains(word.as_str()));
        wrong.extend(found.map(|word| format!("{}: {word}", path.display())));
    }
    assert!(wrong.is_empty(), "use platform::host: {wrong:#?}");
    assert!(looked_at > 10_000, "only {looked_at} lines were looked at");
}

#[test]
fn only_the_command_line_knows_clap() {
    let src = root().join("src");
    let uses = |path: &PathBuf| std::fs::read_to_string(path).unwrap().contains("clap::");
    let (own, others): (Vec<_>, Vec<_>) =
        sources(&src).into_iter().filter(uses).partition(|path| path.starts_with(src.join("cli")));
    assert!(others.is_empty(), "{others:?}");
    assert!(own.len() > 10, "{own:?}");
}

/// What stands at the start of a line, private or public: a reader who meets a name has met it once.
#[test]
fn every_type_has_a_name_of_its_own() {
    let pattern =
        regex::Regex::new(r"(?m)^(?:pub(?:\([a-z]+\))? )?(?:struct|enum|trait|type) (\w+)").unwrap();
    let mut places: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
    for path in sources(&root().join("src")) {
        let text = std::fs::read_to_string(&path).unwrap();
        for found in pattern.captures_iter(&text) {
            places.entry(found[1].to_string()).or_default().push(path.clone());
        }
    }
    assert!(places.len() > 300, "only {} types were looked at", places.len());
    places.retain(|_, paths| paths.len() > 1);
    assert!(places.is_empty(), "{places:#?}");
}
