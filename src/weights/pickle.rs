//! PyTorch's pickles, which are told from what is read here and refused.

use crate::error::{Error, Result};
use crate::platform::disguise::pickle_line;
use crate::platform::files;
use crate::weights::tensor_file;
use std::io::Read;
use std::path::Path;

/// Refuses PyTorch's own formats, by the file's ending and by its first bytes.
pub fn refuse_pickle(path: &Path) -> Result<()> {
    let ending = path.extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default();
    let mut first = Vec::new();
    let file = std::fs::File::open(path).map_err(|e| Error::io("open", path, e))?;
    if tensor_file::disguise_of(&file).is_some() {
        // What it is in truth is told where it is opened.
        return Ok(());
    }
    file.take(4).read_to_end(&mut first).map_err(|e| Error::io("read", path, e))?;
    // A zip, or a pickle of protocol 2 to 5. The size with which a safetensors file begins may look like either.
    let pickled = first.starts_with(b"PK\x03\x04") || matches!(first[..], [0x80, 2..=5, ..]);
    let pickled = pickled && ending != "safetensors";
    if !pickled && !["ckpt", "pt", "pth", "bin", "pkl"].contains(&ending.as_str()) {
        return Ok(());
    }
    let problem = "expected a .safetensors file, found PyTorch's pickle format: to load it is to run code that is in it, so it \
                   is not read";
    let [from, to] =
        [path, &path.with_extension("safetensors")].map(|path| files::shell_word(&path.to_string_lossy()));
    Err(Error::format(path, problem).with_hint(format!(
        "convert it with Python, which loads nothing but tensors here:\n  {}",
        pickle_line(&from, &to)
    )))
}
