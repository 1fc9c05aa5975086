//! A Hugging Face hub of one repository on the loopback, with the faults that tests ask for. It speaks as the hub does:
//! a listing by revision, small files from `resolve`, large ones by a
//! redirection that names their SHA-256.

use sha1::Sha1;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

/// The commit that `main` and `v1` are at.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the server has, and how it misbehaves.
#[derive(Default)]
pub struct State {
    /// `owner/name`.
    pub name: String,
    pub files: BTreeMap<String, Vec<u8>>,
    /// Names in the listing that are no files of it.
    pub listed: Vec<String>,
    /// Listing and files only for this token.
    pub token: Option<String>,
    /// Sends large files only up to this offset, this many times.
    pub cut: Option<(usize, usize)>,
    /// Answers a range with the whole file.
    pub ignores_ranges: bool,
    /// Sends other bytes than the hash of a small file promises.
    pub corrupt: bool,
    /// The same of large files.
    pub corrupt_large: bool,
    /// What a portal between here and the hub sends in place of every small file.
    pub page: Option<String>,
    /// Says no length, and sends so many bytes of nothing behind a file of this name.
    pub endless: Option<(String, usize)>,
    /// Says that a file of this name has so many bytes.
    pub size: Option<(String, u64)>,
    /// Status of every answer.
    pub status: Option<u16>,
    /// `ETag` of every small file.
    pub etag: Option<String>,
    /// Commit in the listing.
    pub commit: Option<String>,
    /// Where large files are said to be; `/lfs` of this server if nothing is said.
    pub elsewhere: Option<String>,
    /// Requests: method, address, range.
    pub log: Vec<(String, String, Option<String>)>,
}

pub struct HubServer {
    pub address: String,
    pub state: Arc<Mutex<State>>,
}

impl HubServer {
    pub fn new(name: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(Mutex::new(State { name: name.to_string(), ..State::default() }));
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // A client that went away is no failure of the server.
                let _ = answer(stream, &shared);
            }
        });
        Self { address, state }
    }

    /// With all files below `dir`.
    pub fn of(name: &str, dir: &Path) -> Self {
        let server = Self::new(name);
        collect(dir, "", &mut server.state.lock().unwrap().files);
        server
    }

    pub fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap());
    }

    /// The requests since the last call.
    pub fn requests(&self) -> Vec<(String, String, Option<String>)> {
        std::mem::take(&mut self.state.lock().unwrap().log)
    }
}

fn collect(dir: &Path, prefix: &str, files: &mut BTreeMap<String, Vec<u8>>) {
    for path in std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()) {
        let name = format!("{prefix}{}", path.file_name().unwrap().to_str().unwrap());
        if path.is_dir() {
            collect(&path, &format!("{name}/"), files);
        } else {
            files.insert(name, std::fs::read(&path).unwrap());
        }
    }
}

pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Git's name of a blob.
pub fn git_blob(bytes: &[u8]) -> String {
    let hash = Sha1::new_with_prefix(format!("blob {}\0", bytes.len())).chain_update(bytes).finalize();
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn answer(mut stream: TcpStream, shared: &Mutex<State>) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().transpose()?.unwrap_or_default();
    let mut headers = BTreeMap::new();
    for line in lines {
        let line = line?;
        let Some((key, value)) = line.split_once(": ") else { break };
        headers.insert(key.to_ascii_lowercase(), value.to_string());
    }
    let mut words = first.split(' ');
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let path = path.replace("%20", " ").replace("%2F", "/");
    let mut state = shared.lock().unwrap();
    let range = headers.get("range").cloned();
    state.log.push((method.to_string(), path.clone(), range.clone()));

    let mut refuse = |status: u16, code: &str| {
        write!(
            stream,
            "HTTP/1.1 {status} no\r\nX-Error-Code: {code}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        )
    };
    if let Some(status) = state.status {
        return refuse(status, "");
    }
    let large = path.strip_prefix("/lfs/").map(str::to_string);
    let resolve = format!("/{}/resolve/", state.name);
    let listing = format!("/api/models/{}/revision/", state.name);
    let sent = headers.get("authorization").map(|value| value.trim_start_matches("Bearer ").to_string());
    if state.token.is_some() && state.token != sent && large.is_none() {
        return refuse(if sent.is_some() { 403 } else { 401 }, "GatedRepo");
    }
    if let Some(revision) = path.strip_prefix(&listing) {
        if ![COMMIT, "main", "v1", "refs/pr/1"].contains(&revision) {
            return refuse(404, "RevisionNotFound");
        }
        let names = state.files.keys().chain(&state.listed);
        let siblings: Vec<_> = names.map(|name| serde_json::json!({"rfilename": name})).collect();
        let sha = state.commit.as_deref().unwrap_or(COMMIT);
        let body = serde_json::json!({"id": state.name, "sha": sha, "siblings": siblings}).to_string();
        return write!(
            stream,
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        );
    }
    let file =
        path.strip_prefix(&resolve).and_then(|rest| rest.split_once('/')).map(|(_, name)| name.to_string());
    let bytes = match (&file, &large) {
        (Some(name), _) => state.files.get(name).cloned(),
        (_, Some(hash)) => state.files.values().find(|bytes| sha256(bytes) == *hash).cloned(),
        _ => None,
    };
    let Some(mut bytes) = bytes else {
        return refuse(
            if sent.is_some() { 404 } else { 401 },
            if file.is_some() { "EntryNotFound" } else { "RepoNotFound" },
        );
    };
    let hash = sha256(&bytes);
    let name = file.clone().unwrap_or_default();
    let announced = state.size.clone().filter(|(of, _)| *of == name).map(|(_, size)| size);
    if name.ends_with(".safetensors") {
        let place = state.elsewhere.clone().unwrap_or_else(|| "/lfs".into());
        return write!(
            stream,
            "HTTP/1.1 302 Found\r\nLocation: {place}/{hash}\r\nX-Linked-ETag: \"{hash}\"\r\nX-Linked-Size: {}\r\n\
             X-Repo-Commit: {COMMIT}\r\nETag: \"of-the-redirection\"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
            announced.unwrap_or(bytes.len() as u64)
        );
    }
    if let Some(page) = state.page.as_ref().filter(|_| file.is_some()) {
        bytes = page.clone().into_bytes();
    }
    let blob = git_blob(&bytes);
    if if large.is_some() { state.corrupt_large } else { state.corrupt } {
        bytes.iter_mut().for_each(|byte| *byte ^= 1);
    }
    let total = bytes.len();
    let from = range.as_deref().filter(|_| !state.ignores_ranges);
    let from = from.and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
    let status = match from {
        Some(from) if from >= total => return refuse(416, ""),
        Some(from) => format!("206 Partial\r\nContent-Range: bytes {from}-{}/{total}", total - 1),
        None => "200 OK".to_string(),
    };
    let from = from.unwrap_or(0);
    let mut end = total;
    if large.is_some()
        && method == "GET"
        && let Some((offset, times)) = &mut state.cut
        && *times > 0
    {
        *times -= 1;
        end = (*offset).clamp(from, total);
    }
    let etag = state.etag.clone().unwrap_or(blob);
    let endless = state.endless.clone().filter(|(of, _)| *of == name).map(|(_, more)| more);
    drop(state);
    let length = match endless {
        Some(_) => String::new(),
        None => format!("Content-Length: {}\r\n", announced.unwrap_or((total - from) as u64)),
    };
    write!(
        stream,
        "HTTP/1.1 {status}\r\nETag: \"{etag}\"\r\nX-Repo-Commit: {COMMIT}\r\n{length}Connection: close\r\n\r\n"
    )?;
    if method != "GET" {
        return Ok(());
    }
    stream.write_all(&bytes[from..end])?;
    let nothing = vec![b' '; 1 << 20];
    (0..endless.unwrap_or(0) >> 20).try_for_each(|_| stream.write_all(&nothing))
}
