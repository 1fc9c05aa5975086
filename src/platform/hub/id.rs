//! What a hub id is.

use crate::platform::hub::choice::is_plain_name;

/// The branch, where no revision is given.
pub const MAIN: &str = "main";

/// A repository and a revision of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Id {
    /// `owner/name`.
    pub name: String,
    /// A branch, tag or commit.
    pub revision: String,
}

impl Id {
    /// The id that `word` is, if it has the form of one: `owner/name` or `owner/name@revision`.
    pub fn parse(word: &str) -> Option<Self> {
        let (name, revision) = word.split_once('@').unwrap_or((word, MAIN));
        let (owner, repository) = name.split_once('/')?;
        // As `huggingface_hub.utils.validate_repo_id` has it.
        let is_name = |text: &str| {
            let inner = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
            let outer = |c: char| c.is_ascii_alphanumeric() || c == '_';
            (1..=96).contains(&text.len())
                && text.chars().all(inner)
                && text.starts_with(outer)
                && text.ends_with(outer)
                && !text.contains("--")
                && !text.contains("..")
        };
        let is_revision = revision.split('/').all(|part| {
            is_plain_name(part) && part.chars().all(|c| c.is_ascii_alphanumeric() || "-._+".contains(c))
        });
        // Rather a file that is not there.
        let is_file =
            [".git", ".safetensors", ".ckpt", ".bin", ".pt"].iter().any(|end| repository.ends_with(end));
        let ok = is_name(owner) && is_name(repository) && is_revision && !is_file;
        ok.then(|| Self { name: name.to_string(), revision: revision.to_string() })
    }

    /// What the cache calls the folder of the repository.
    pub fn folder(&self) -> String {
        format!("models--{}", self.name.replace('/', "--"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_told_from_paths() {
        let id = |word: &str| Id::parse(word).map(|id| (id.name, id.revision));
        let found = |name: &str, revision: &str| Some((name.to_string(), revision.to_string()));
        assert_eq!(id("a/b"), found("a/b", "main"));
        assert_eq!(id("stable-diffusion-v1-5/stable-diffusion-v1-5@fp16"), {
            found("stable-diffusion-v1-5/stable-diffusion-v1-5", "fp16")
        });
        assert_eq!(id("a/b.c_d@refs/pr/1"), found("a/b.c_d", "refs/pr/1"));
        for word in [
            "a",
            "a/",
            "/a",
            "a/b/c",
            "./a",
            "../a",
            "a/..",
            "a/b@",
            "a/b@../x",
            "a/b@/x",
            "a--b/c",
            "~/a",
            "a/b=0.8",
            "a/b c",
            "a/-b",
            "models/sd15.safetensors",
            "a/b@x y",
            "a/b@.",
            "",
        ] {
            assert_eq!(id(word), None, "{word}");
        }
    }
}
