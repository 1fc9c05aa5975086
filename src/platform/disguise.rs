//! What a file is that is not what its name says: a git-lfs pointer, a web page, a pickle.

/// How a git-lfs pointer begins (git-lfs `docs/spec.md`).
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";

/// What the first bytes of a file say that it is in place of data, as words after `found`, and what to do about it; `None`
/// for everything else.
pub fn disguise(first: &[u8]) -> Option<(&'static str, &'static str)> {
    if first.starts_with(LFS_POINTER) {
        return Some((
            "a git-lfs pointer: the name of the file's content, which was not downloaded",
            "run `git lfs install` and `git lfs pull` in that repository, or download the file itself",
        ));
    }
    let text = first.strip_prefix(b"\xef\xbb\xbf").unwrap_or(first).trim_ascii_start();
    let begins =
        |tag: &str| text.len() >= tag.len() && text[..tag.len()].eq_ignore_ascii_case(tag.as_bytes());
    ["<!doctype html", "<html", "<head"].into_iter().any(begins).then_some((
        "a web page (HTML)",
        "the page about the file was saved in its place: download the file itself (on the hub, by `resolve` in place of `blob` \
         in its address)",
    ))
}

/// The line of Python that turns pickled tensors into a safetensors file and runs no code that is in them; `from` and `to` are
/// words of a shell.
pub fn pickle_line(from: &str, to: &str) -> String {
    format!(
        "python -c \"import sys, torch, safetensors.torch as s; d = torch.load(sys.argv[1], map_location='cpu', \
         weights_only=True); d = d.get('state_dict', d); s.save_file({{k: v.clone().contiguous() for k, v in d.items() if \
         torch.is_tensor(v)}}, sys.argv[2])\" {from} {to}"
    )
}
