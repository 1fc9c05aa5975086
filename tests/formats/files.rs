//! Files appear whole or not at all, and errors name the path.

use std::fs;
use std::path::Path;

use hra::platform::files::{self, Kind, LEFTOVER_PREFIX};
use hra::{Error, ErrorKind, Result};

fn names(dir: &Path) -> Vec<String> {
    files::list_dir(dir).unwrap().into_iter().map(|e| e.name.into_string().unwrap()).collect()
}

#[test]
fn an_atomic_write_replaces_the_file_and_leaves_nothing_beside_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.txt");
    for text in ["first", "second and longer", ""] {
        files::write_atomic(&path, text.as_bytes()).unwrap();
        assert_eq!(files::read_to_string(&path).unwrap(), text);
        assert_eq!(names(dir.path()), ["a.txt"]);
    }
}

#[test]
fn readers_never_see_half_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.bin");
    let content = |n: u8| vec![n; 200_000];
    files::write_atomic(&path, &content(0)).unwrap();
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| (1..40).for_each(|n| files::write_atomic(&path, &content(n)).unwrap()));
        while !writer.is_finished() {
            let found = files::read(&path, u64::MAX).unwrap();
            assert_eq!(found, content(found[0]));
        }
    });
}

#[test]
fn a_failed_write_keeps_what_was_there() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("folder");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("inside"), "old").unwrap();
    let told = files::write_atomic(&folder, b"new").unwrap_err().to_string();
    assert!(told.starts_with("cannot write ") && told.contains("folder: "), "{told}");
    assert_eq!(fs::read(folder.join("inside")).unwrap(), b"old");
    assert_eq!(names(dir.path()), ["folder"]);

    let orphan = dir.path().join("missing").join("a.txt");
    let told = files::write_atomic(&orphan, b"new").unwrap_err().to_string();
    assert!(told.contains("a.txt") && !told.contains(LEFTOVER_PREFIX), "{told}");
    assert!(files::write_atomic(Path::new("/"), b"new").is_err());
    assert!(files::write_atomic(&dir.path().join(".."), b"new").is_err());
}

#[test]
fn a_leftover_of_an_earlier_process_is_not_in_the_way() {
    let dir = tempfile::tempdir().unwrap();
    let taken: Vec<_> = (0..200).map(|n| format!("{LEFTOVER_PREFIX}{}-{n}", std::process::id())).collect();
    for name in &taken {
        fs::write(dir.path().join(name), "left over").unwrap();
    }
    files::write_atomic(&dir.path().join("a.txt"), b"new").unwrap();
    assert_eq!(names(dir.path()).len(), taken.len() + 1);
    assert!(taken.iter().all(|name| fs::read(dir.path().join(name)).unwrap() == b"left over"));
}

#[test]
fn a_staged_folder_replaces_the_old_one_as_a_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("step-100");
    for (file, other) in [("a", "b"), ("b", "a")] {
        let answer = files::stage_dir(&path, |temp| {
            assert!(temp.file_name().unwrap().to_str().unwrap().starts_with(LEFTOVER_PREFIX));
            fs::create_dir(temp.join("deep")).unwrap();
            files::write_atomic(&temp.join("deep").join(file), b"x")?;
            Ok(7)
        });
        assert_eq!(answer.unwrap(), 7);
        assert!(path.join("deep").join(file).exists() && !path.join("deep").join(other).exists());
        assert_eq!(names(dir.path()), ["step-100"]);
    }
}

#[test]
fn a_folder_that_cannot_be_filled_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("step-100");
    fs::create_dir(&path).unwrap();
    fs::write(path.join("old"), "old").unwrap();
    let failed: Result<()> = files::stage_dir(&path, |temp| {
        fs::write(temp.join("new"), "new").unwrap();
        files::read(&temp.join("deep").join("b"), 1).map(|_| ())
    });
    let Err(Error { kind: ErrorKind::Io { path: told, .. }, .. }) = failed else { panic!("{failed:?}") };
    assert_eq!(told, path.join("deep").join("b"), "the error is about the folder that the user knows");
    assert_eq!((names(dir.path()), names(&path)), (vec!["step-100".into()], vec!["old".into()]));

    let panicked =
        std::panic::catch_unwind(|| files::stage_dir(&path, |_| -> Result<()> { panic!("on purpose") }));
    assert!(panicked.is_err());
    assert_eq!(names(dir.path()), ["step-100"]);
}

#[test]
fn a_folder_does_not_replace_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.txt");
    fs::write(&path, "old").unwrap();
    let told = files::stage_dir(&path, |_| Ok(())).unwrap_err().to_string();
    assert!(told.contains("a file is in its place"), "{told}");
    assert_eq!(fs::read(&path).unwrap(), b"old");
    assert_eq!(names(dir.path()), ["a.txt"]);
}

#[test]
fn folders_are_listed_in_the_order_of_names() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["b", "B", "a10", "a9", ".hidden"] {
        fs::write(dir.path().join(name), "").unwrap();
    }
    fs::create_dir(dir.path().join("c")).unwrap();
    std::os::unix::fs::symlink("nowhere", dir.path().join("d")).unwrap();
    let entries = files::list_dir(dir.path()).unwrap();
    assert_eq!(names(dir.path()), [".hidden", "B", "a10", "a9", "b", "c", "d"]);
    let kinds: Vec<_> = entries[4..].iter().map(|e| e.kind).collect();
    assert_eq!(kinds, [Kind::File, Kind::Folder, Kind::Other]);
    let told = files::list_dir(&dir.path().join("missing")).unwrap_err().to_string();
    assert!(told.starts_with("cannot list ") && told.contains("missing"), "{told}");
}

#[test]
fn reading_refuses_what_it_cannot_hold() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.txt");
    fs::write(&path, b"abc\xff").unwrap();
    assert_eq!(files::read(&path, 4).unwrap(), b"abc\xff");
    let told = files::read(&path, 3).unwrap_err().to_string();
    assert!(told.ends_with("a.txt: expected at most 3 bytes, found 4"), "{told}");
    let told = files::read_to_string(&path).unwrap_err().to_string();
    assert!(told.ends_with("expected UTF-8 text, found another byte at offset 3"), "{told}");
    assert!(files::read(Path::new("/dev/zero"), 10).unwrap_err().to_string().contains("a pipe or device"));
}
