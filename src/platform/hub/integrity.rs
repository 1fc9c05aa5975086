//! Whether a file of the hub is what the hub named: its hash is its name in the cache, and no file is larger than its kind can be.
//!
//! The hub's `ETag` of a small file is git's name of a blob with its content, SHA-1 over `blob LENGTH\0` and the content
//! (git's "Git Objects"); that of a large file is its SHA-256.

use crate::error::{Error, Result};
use crate::platform::disguise::disguise;
use crate::platform::files;
use sha1::Sha1;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// The most bytes of a JSON or text file of a repository: as many as are read of one.
pub const MOST_TEXT: u64 = 64 << 20;
/// So much of a file is looked at for what it is.
const FIRST: u64 = 4096;

/// The most bytes that the file `name` can have; `None` for weights, whose size the hub announces.
pub fn most_bytes(name: &str) -> Option<u64> {
    (!name.ends_with(".safetensors")).then_some(MOST_TEXT)
}

/// What is wrong with the content at `path`, which the hub calls `etag`, in a few words; `None` where it is right, or where the name is
/// no hash and the content no web page.
///
/// Errors: it cannot be read.
pub fn damage(path: &Path, etag: &str) -> Result<Option<String>> {
    let mut first = Vec::new();
    let fail = |e| Error::io("read", path, e);
    File::open(path).and_then(|file| file.take(FIRST).read_to_end(&mut first)).map_err(fail)?;
    if let Some((found, _)) = disguise(&first) {
        return Ok(Some(format!("{found} in its place")));
    }
    let expected = etag.to_ascii_lowercase();
    let (name, found) = match HashKind::of(etag) {
        None => return Ok(None),
        Some(HashKind::Sha256) => ("SHA-256", hash(path, Sha256::new())?),
        Some(HashKind::GitBlob) => {
            let length = std::fs::metadata(path).map_err(fail)?.len();
            let git = hash(path, Sha1::new_with_prefix(format!("blob {length}\0")))?;
            // Mirrors of the hub name a file by the SHA-1 of its bytes alone.
            let found = if git == expected { git } else { hash(path, Sha1::new())? };
            ("SHA-1 (git's of a blob, or plain)", found)
        }
    };
    Ok((found != expected).then(|| format!("content whose {name} is not the one that it names")))
}

/// Whether `etag` says what the content is, so that [`damage`] misses none.
pub fn is_hash(etag: &str) -> bool {
    HashKind::of(etag).is_some()
}

/// Hashes that the hub names contents by.
enum HashKind {
    Sha256,
    GitBlob,
}

impl HashKind {
    fn of(etag: &str) -> Option<Self> {
        match etag.len() {
            _ if !etag.bytes().all(|b| b.is_ascii_hexdigit()) => None,
            64 => Some(Self::Sha256),
            40 => Some(Self::GitBlob),
            _ => None,
        }
    }
}

fn hash(path: &Path, mut hash: impl Digest) -> Result<String> {
    let fail = |e| Error::io("read", path, e);
    let mut file = File::open(path).map_err(fail)?;
    let mut buffer = vec![0u8; 1 << 20];
    loop {
        let n = file.read(&mut buffer).map_err(fail)?;
        if n == 0 {
            return Ok(files::hex(hash.finalize()));
        }
        hash.update(&buffer[..n]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_have_the_names_that_git_and_sha256sum_give_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        std::fs::write(&path, "hello\n").unwrap();
        // `git hash-object x`, `sha256sum x`.
        let git = "ce013625030ba8dba906f756967f9e9ca394464a";
        let sha256 = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
        // `sha1sum x`
        let plain = "f572d396fae9206628714fb2ce00f72e94f2258f";
        for etag in [git, plain, sha256, "W1234", ""] {
            assert_eq!(damage(&path, etag).unwrap(), None, "{etag}");
        }
        std::fs::write(&path, "hellO\n").unwrap();
        assert!(damage(&path, git).unwrap().unwrap().contains("SHA-1"));
        assert!(damage(&path, sha256).unwrap().unwrap().contains("SHA-256"));
        std::fs::write(&path, "<!DOCTYPE html><title>Log in</title>").unwrap();
        assert!(damage(&path, "W1234").unwrap().unwrap().contains("a web page"));
    }
}
