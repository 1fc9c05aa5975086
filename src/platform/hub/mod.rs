//! Models and adapters by their name on the Hugging Face hub: `owner/name` or `owner/name@revision` becomes a local path.
//!
//! The cache is the one that Python's `huggingface_hub` uses, in its layout (`models--OWNER--NAME/{blobs,refs,snapshots}`),
//! so what one has downloaded the other finds. A branch is looked up at every use, as there; a commit that is all in the
//! cache is used without a request, and so is a branch where the hub cannot be reached. Only files that are read are
//! downloaded ([`choice`]). Every name that the server sends is checked before it becomes part of a path.

pub mod choice;
mod id;
mod integrity;
mod neighbours;
mod transfer;
mod wanted;

use crate::error::{Error, ErrorKind, Result};
use crate::platform::adapter_layout::names_below;
use crate::platform::files::{self, shell_word};
use crate::platform::observer::{Counter, Observer};
use choice::{FileChoice, choose, is_plain_name};
use id::{Id, MAIN};
use serde::Deserialize;
use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
pub use wanted::Wanted;

use transfer::{Client, Remote, TransferFailure};

/// The hub, where `HF_ENDPOINT` names no other.
const ENDPOINT: &str = "https://huggingface.co";

/// Whether every file that is used is looked at whole, and taken anew where it is damaged.
static REFRESH: AtomicBool = AtomicBool::new(false);

/// From here on, in this process, cached files are hashed before they are used, weights too, and those that are not what the hub named
/// are taken anew. Without it small files are hashed, and a damaged one is an error.
pub fn refresh() {
    REFRESH.store(true, Ordering::Relaxed);
}

/// The local path that `word` means: itself if something is there, otherwise the hub's files in the cache, downloaded if
/// need be. Errors tell both readings of the word.
pub fn resolve(word: &Path, wanted: Wanted, observer: &dyn Observer) -> Result<PathBuf> {
    if files::kind(word).is_some() {
        return Ok(word.to_path_buf());
    }
    let Some(id) = word.to_str().and_then(Id::parse) else {
        let (what, hint) = match wanted {
            Wanted::Model => (
                "a Stable Diffusion folder",
                "give a folder with model_index.json, unet/, vae/, text_encoder/, tokenizer/ and scheduler/, or a hub id",
            ),
            Wanted::Adapter => (
                "an adapter",
                "give a folder with adapter_config.json and adapter_model.safetensors, a .safetensors file, or a hub id",
            ),
            Wanted::Tower => (
                "a vision tower",
                "give a folder with config.json, preprocessor_config.json and model.safetensors, or a hub id",
            ),
            Wanted::Vae => (
                "a VAE",
                "give a folder with config.json and diffusion_pytorch_model.safetensors, a .safetensors file, or a hub id",
            ),
            Wanted::ControlNet => (
                "a ControlNet",
                "give a folder with config.json and diffusion_pytorch_model.safetensors, or a hub id",
            ),
        };
        return Err(Error::hub(format!(
            "{}: expected {what}, found nothing there, nor is it a hub id of the form owner/name or \
             owner/name@revision",
            word.display()
        ))
        .with_hint(hint));
    };
    Hub::from_env(id)?.path(wanted, observer)
}

/// Whether `word` is read as a hub id: nothing is at that path, and it has an id's form.
pub fn is_id(word: &Path) -> bool {
    files::kind(word).is_none() && word.to_str().and_then(Id::parse).is_some()
}

/// `owner/name` of the repository in whose snapshot `path` lies; `None` for a path outside such a cache.
pub fn repository_of(path: &Path) -> Option<String> {
    let parts: Vec<&str> = path.iter().rev().filter_map(|part| part.to_str()).collect();
    let at = parts.iter().position(|part| *part == "snapshots")?;
    Some(parts.get(at + 1)?.strip_prefix("models--")?.replacen("--", "/", 1))
}

/// What the hub says of a revision.
#[derive(Deserialize)]
struct RepoInfo {
    /// The commit.
    sha: String,
    /// Its files.
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    /// Name inside the repository.
    rfilename: String,
}

/// One revision of one repository, seen from this machine.
struct Hub {
    id: Id,
    endpoint: String,
    cache_dir: PathBuf,
    client: Client,
    has_token: bool,
    offline: bool,
    /// [`refresh`] was asked for.
    refresh: bool,
}

impl Hub {
    /// Settings from the variables that `huggingface_hub` knows.
    fn from_env(id: Id) -> Result<Self> {
        let variable = |name: &str| env::var_os(name).filter(|value| !value.is_empty());
        let text = |name: &str| variable(name).map(|value| value.to_string_lossy().trim().to_string());
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.into());
        let endpoint = endpoint.trim_end_matches('/').to_string();
        if !endpoint.starts_with("http://") && !endpoint.starts_with("https://") {
            return Err(Error::hub(format!(
                "HF_ENDPOINT: expected an address with https://, found `{endpoint}`"
            )));
        }
        let home = variable("HF_HOME").map(PathBuf::from).or_else(|| {
            let caches = variable("XDG_CACHE_HOME").map(PathBuf::from);
            caches.or_else(|| Some(env::home_dir()?.join(".cache"))).map(|caches| caches.join("huggingface"))
        });
        let home =
            home.ok_or_else(|| Error::hub("no folder for downloads is known").with_hint("set HF_HOME"))?;
        let cache_dir =
            variable("HF_HUB_CACHE").or_else(|| variable("HUGGINGFACE_HUB_CACHE")).map(PathBuf::from);
        let cache_dir = cache_dir.unwrap_or_else(|| home.join("hub"));
        let cache_dir = std::path::absolute(&cache_dir).map_err(|e| Error::io("find", &cache_dir, e))?;
        let token_file = variable("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
        let token = text("HF_TOKEN")
            .or_else(|| Some(fs::read_to_string(token_file).ok()?.trim().to_string()))
            .filter(|token| !token.is_empty());
        if token.as_ref().is_some_and(|token| !token.bytes().all(|b| b.is_ascii_graphic())) {
            return Err(Error::hub("HF_TOKEN: expected a token, found characters that no token has"));
        }
        let yes = |value: String| ["1", "ON", "YES", "TRUE"].contains(&value.to_uppercase().as_str());
        Ok(Self {
            has_token: token.is_some(),
            client: Client::new(token),
            refresh: REFRESH.load(Ordering::Relaxed),
            offline: text("HF_HUB_OFFLINE").is_some_and(yes),
            id,
            endpoint,
            cache_dir,
        })
    }

    fn path(&self, wanted: Wanted, observer: &dyn Observer) -> Result<PathBuf> {
        if self.offline && self.refresh {
            return Err(Error::hub("--refresh asks the hub, and HF_HUB_OFFLINE is set")
                .with_hint("leave out one of them"));
        }
        let cached = self.cached(wanted);
        if self.offline {
            return cached.map_err(|lack| self.not_in_cache(&lack, "HF_HUB_OFFLINE is set"));
        }
        if is_commit(&self.id.revision)
            && !self.refresh
            && let Ok(path) = cached
        {
            return Ok(path);
        }
        let revision = self.id.revision.replace('/', "%2F");
        let url = format!("{}/api/models/{}/revision/{revision}", self.endpoint, self.id.name);
        let info: RepoInfo = match self.client.json(&url) {
            Ok(info) => info,
            Err(failure) if failure.passes() => {
                let why = match failure {
                    TransferFailure::Status(code, _) => {
                        format!("{} answered with status {code}", self.endpoint)
                    }
                    TransferFailure::Network(why) | TransferFailure::Answer(why) => {
                        format!("{} cannot be reached ({why})", self.endpoint)
                    }
                    TransferFailure::Local(error) => return Err(error),
                };
                let path = cached.map_err(|lack| self.not_in_cache(&lack, &why))?;
                observer.note(&format!("{why}; going on with the copy of {} in the cache", self.id.name));
                return Ok(path);
            }
            Err(failure) => return Err(self.told(failure)),
        };
        if !is_commit(&info.sha) {
            return Err(self.told(TransferFailure::Answer("a commit that is not one".into())));
        }
        let names = info.siblings.into_iter().map(|sibling| sibling.rfilename).collect();
        let choice = choose(&names, wanted)
            .map_err(|lack| self.error(&format!("expected {}", lack.kind)).with_hints(lack.hints()))?;
        if let Some(note) = &choice.note {
            observer.warn(&format!("{}: {note}", self.id.name));
        }
        let snapshot = self.snapshot(&info.sha);
        let mut missing: Vec<&String> = Vec::new();
        for name in &choice.files {
            let path = snapshot.join(name);
            if !path.is_file() || self.refresh && self.is_to_replace(&path, observer)? {
                missing.push(name);
            }
        }
        if !missing.is_empty() {
            self.download(&info.sha, &missing, &snapshot, observer)?;
        }
        self.check(&choice.files, &snapshot)?;
        // Last, so that a branch in the cache always has all of its files.
        if !is_commit(&self.id.revision) {
            let path = self.folder().join("refs").join(&self.id.revision);
            path.parent().map_or(Ok(()), files::create_dir_all)?;
            files::write_atomic(&path, info.sha.as_bytes())?;
        }
        Ok(snapshot.join(choice.entry))
    }

    /// What the cache has without asking anyone; the error is what it lacks.
    fn cached(&self, wanted: Wanted) -> Result<PathBuf> {
        let revision = &self.id.revision;
        let commit = if is_commit(revision) {
            Some(revision.clone())
        } else {
            fs::read_to_string(self.folder().join("refs").join(revision)).ok()
        };
        let commit = commit.map(|c| c.trim().to_string()).filter(|c| is_commit(c));
        let snapshot = commit.map(|c| self.snapshot(&c)).filter(|path| path.is_dir());
        let snapshot = snapshot.ok_or_else(|| Error::hub("any file of it"))?;
        let names = names_below(&snapshot).unwrap_or_default();
        let FileChoice { entry, files, .. } = choose(&names, wanted)?;
        if !self.refresh {
            self.check(&files, &snapshot)?;
        }
        Ok(snapshot.join(entry))
    }

    /// Fails for a text file of the snapshot that is not what the hub named, or a web page. Weights are hashed with [`refresh`] alone.
    fn check(&self, names: &[String], snapshot: &Path) -> Result<()> {
        for name in names.iter().filter(|name| integrity::most_bytes(name).is_some()) {
            let path = snapshot.join(name);
            if let Some(problem) = integrity::damage(&path, &content_name(&path))? {
                return Err(Error::format(&path, format!("the cached file is damaged: found {problem}"))
                    .with_hint("the same command with --refresh takes it anew"));
            }
        }
        Ok(())
    }

    /// Whether a cached file is damaged, which is said, or has a name that does not tell.
    fn is_to_replace(&self, path: &Path, observer: &dyn Observer) -> Result<bool> {
        let etag = content_name(path);
        let damage = integrity::damage(path, &etag)?;
        if let Some(problem) = &damage {
            observer.note(&format!("{} is taken anew: found {problem}", path.display()));
        }
        Ok(damage.is_some() || !integrity::is_hash(&etag))
    }

    fn download(
        &self,
        commit: &str,
        names: &[&String],
        snapshot: &Path,
        observer: &dyn Observer,
    ) -> Result<()> {
        // By commit, so that all files are of one state of the repository.
        let url =
            |name: &str| format!("{}/{}/resolve/{commit}/{}", self.endpoint, self.id.name, encoded(name));
        let mut remotes: Vec<(&str, Remote)> = Vec::new();
        for name in names {
            observer.check(|| "stopped before the download".to_string())?;
            let remote = self.client.remote(&url(name)).map_err(|failure| self.told(failure))?;
            if !is_plain_name(&remote.etag) {
                return Err(
                    self.told(TransferFailure::Answer(format!("no ETag that can be used for {name}")))
                );
            }
            self.check_size(name, remote.size)?;
            remotes.push((name, remote));
        }
        let total: u64 = remotes.iter().filter_map(|(_, remote)| remote.size).sum();
        observer.say(&format!(
            "downloading {} ({}, commit {}): {} file{}, {:.1} MB, to {}",
            self.id.name,
            self.id.revision,
            &commit[..7],
            names.len(),
            if names.len() == 1 { "" } else { "s" },
            total as f64 / 1e6,
            self.cache_dir.display()
        ));
        const MB: u64 = 1_000_000;
        let progress = Counter::new(observer, "downloading, MB", 0, total.div_ceil(MB));
        let mut before = 0;
        for (name, remote) in &remotes {
            let mut tick = |bytes: u64| {
                progress.set((before + bytes).min(total) / MB, name);
                observer.check(|| {
                    "stopped downloading; what is there is kept, and the same command goes on with it"
                        .to_string()
                })
            };
            self.fetch(&url(name), name, remote, snapshot, &mut tick)?;
            before += remote.size.unwrap_or(0);
        }
        progress.set(total.div_ceil(MB), "");
        Ok(())
    }

    /// Refuses a size that no file of this kind has, before anything is fetched.
    fn check_size(&self, name: &str, size: Option<u64>) -> Result<()> {
        let problem = match (integrity::most_bytes(name), size) {
            (Some(most), Some(size)) if size > most => {
                format!("{size} bytes of {name}, of which {most} are the most that is read")
            }
            (None, None) => format!("no size of {name}"),
            _ => return Ok(()),
        };
        Err(self.told(TransferFailure::Answer(problem)))
    }

    /// One file into `blobs/`, with a link to it in the snapshot.
    fn fetch(
        &self,
        url: &str,
        name: &str,
        remote: &Remote,
        snapshot: &Path,
        tick: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<()> {
        let blobs = self.folder().join("blobs");
        let blob = blobs.join(&remote.etag);
        files::create_dir_all(&blobs)?;
        // Other processes wait here, Python's too; the lock goes with the file handle.
        let locks = self.cache_dir.join(".locks").join(self.id.folder());
        files::create_dir_all(&locks)?;
        let path = locks.join(format!("{}.lock", remote.etag));
        let lock =
            File::options().append(true).create(true).open(&path).map_err(|e| Error::io("open", &path, e))?;
        lock.lock().map_err(|e| Error::io("lock", &path, e))?;
        let mut whole = files::kind(&blob) == Some(files::Kind::File);
        if whole && self.refresh {
            whole = integrity::is_hash(&remote.etag) && integrity::damage(&blob, &remote.etag)?.is_none();
        }
        if !whole {
            let part = blobs.join(format!("{}.incomplete", remote.etag));
            let most = integrity::most_bytes(name);
            self.client.download(url, remote, most, &part, tick).map_err(|failure| match failure {
                TransferFailure::Answer(what) => {
                    self.told(TransferFailure::Answer(format!("{name}: {what}")))
                }
                other => self.told(other),
            })?;
            fs::rename(&part, &blob).map_err(|e| Error::io("write", &blob, e))?;
        }
        let link = snapshot.join(name);
        let fail = |e| Error::io("write", &link, e);
        link.parent().map_or(Ok(()), files::create_dir_all)?;
        if fs::symlink_metadata(&link).is_ok() {
            fs::remove_file(&link).map_err(fail)?; // it leads to nothing, or is taken anew
        }
        let up = "../".repeat(name.matches('/').count() + 2);
        let linked = std::os::unix::fs::symlink(format!("{up}blobs/{}", remote.etag), &link);
        // Some file systems have no links.
        linked.or_else(|_| fs::rename(&blob, &link)).map_err(fail)
    }

    /// The repository's folder in the cache.
    fn folder(&self) -> PathBuf {
        self.cache_dir.join(self.id.folder())
    }

    /// The folder of the files of a commit, which are links into `blobs/`.
    fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder().join("snapshots").join(commit)
    }

    fn error(&self, problem: &str) -> Error {
        let at = if self.id.revision == MAIN { String::new() } else { format!(" at {}", self.id.revision) };
        Error::hub(format!(
            "{}{at}: nothing is at that path here, and as a hub id ({}): {problem}",
            self.id.name, self.endpoint
        ))
        .with_hints(neighbours::of(Path::new(&self.id.name)))
    }

    fn not_in_cache(&self, lack: &Error, why: &str) -> Error {
        if let ErrorKind::Format { .. } = lack.kind {
            // It is there, and damaged.
            return Error::hub(format!("{why}: {}", lack.kind)).with_hints(lack.hints());
        }
        let cache = self.cache_dir.display();
        let error = self.error(&format!("{why}, and the cache at {cache} does not hold {}", lack.kind));
        if !lack.hints().is_empty() {
            return error.with_hints(lack.hints());
        }
        let word = shell_word(&format!("{}@{}", self.id.name, self.id.revision));
        error.with_hint(format!(
            "run the same command once with a connection and without HF_HUB_OFFLINE ({word})"
        ))
    }

    /// What a user can make of a failure.
    fn told(&self, failure: TransferFailure) -> Error {
        let page = format!("{}/{}", self.endpoint, self.id.name);
        let token =
            if self.has_token { "the token that was sent was not enough" } else { "no token was sent" };
        let give = format!(
            "a token comes from HF_TOKEN or `hf auth login`, is made at {}/settings/tokens, and must be allowed to read \
             this repository",
            self.endpoint
        );
        match failure {
            TransferFailure::Local(error) => error,
            TransferFailure::Network(why) => self
                .error(&format!("the hub cannot be reached ({why})"))
                .with_hint("check the connection and HF_ENDPOINT; what was downloaded is kept"),
            TransferFailure::Answer(what) => self.error(&format!("the hub answered with {what}")),
            TransferFailure::Status(_, reason) if reason == "RevisionNotFound" => self
                .error(&format!("no revision `{}` is there", self.id.revision))
                .with_hint(format!("{page} lists branches, tags and commits")),
            TransferFailure::Status(_, reason) if reason == "GatedRepo" => self
                .error(&format!("it is gated, and {token}"))
                .with_hints([format!("accept its terms at {page}"), give]),
            TransferFailure::Status(401 | 403, reason) if reason != "RepoNotFound" => {
                self.error(&format!("the hub refuses it, and {token}")).with_hint(give)
            }
            // The hub does not tell strangers whether a private repository is there.
            TransferFailure::Status(401 | 403 | 404, _) => self
                .error(&format!("no such repository or revision is there, or it is private, and {token}"))
                .with_hint(give),
            TransferFailure::Status(code, _) => self.error(&format!("the hub answered with status {code}")),
        }
    }
}

/// What the cache calls the content at `path`: the name of the blob that it leads to.
fn content_name(path: &Path) -> String {
    let blob = path.canonicalize().ok();
    blob.and_then(|blob| Some(blob.file_name()?.to_str()?.to_string())).unwrap_or_default()
}

/// Whether a revision is a commit, which never changes.
fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// A file name as part of an address.
fn encoded(name: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~/".contains(&b);
    name.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_knows_its_repository() {
        let path = Path::new("/c/hub/models--owner--my-model/snapshots/0123/x.safetensors");
        assert_eq!(repository_of(path).as_deref(), Some("owner/my-model"));
        assert_eq!(repository_of(path.parent().unwrap()).as_deref(), Some("owner/my-model"));
        assert_eq!(repository_of(Path::new("/models/snapshots")), None);
        assert_eq!(repository_of(Path::new("/models/a--b/snapshots/x")), None);
    }

    #[test]
    fn file_names_are_encoded_for_addresses() {
        assert_eq!(encoded("unet/my lora+v2#é.safetensors"), "unet/my%20lora%2Bv2%23%C3%A9.safetensors");
    }
}
