//! Requests to the hub, and downloads that go on where they were cut off.
//!
//! The crate hf-hub is not used: its download takes the server's `ETag` as a file name unseen, appends a whole answer to a part
//! where the server does not know ranges, asks for nothing for ever once a part is complete, checks neither length nor
//! hash, and waits without end. Redirects are followed here, one by one: the token stays with the hub's own host, and
//! another host is asked over https only.

use crate::error::Error;
use crate::platform::hub::integrity;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::Path;
use std::time::Duration;
use ureq::http::{Response, Uri};
use ureq::{Agent, Body};

/// Redirects in a row; a repository that was renamed and keeps its weights elsewhere needs two.
const REDIRECTS: usize = 8;
/// Attempts without a new byte before giving up, with a pause that doubles.
const ATTEMPTS: u32 = 5;
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// A server that says nothing for this long has gone.
const SILENCE: Duration = Duration::from_secs(30);
/// The largest listing of a repository that is read.
const MAX_LISTING: u64 = 64 << 20;

/// Why a request gave nothing.
#[derive(Debug)]
pub enum TransferFailure {
    /// No answer, or it broke off; told in a few words.
    Network(String),
    /// A refusal: HTTP status, and the hub's own word for the reason (`X-Error-Code`).
    Status(u16, String),
    /// An answer that makes no sense; told in a few words.
    Answer(String),
    /// Trouble on this side: the disk, or the user.
    Local(Error),
}

impl From<Error> for TransferFailure {
    fn from(error: Error) -> Self {
        Self::Local(error)
    }
}

impl From<ureq::Error> for TransferFailure {
    fn from(error: ureq::Error) -> Self {
        Self::Network(error.to_string())
    }
}

impl TransferFailure {
    /// Whether the same request may succeed a little later.
    pub fn passes(&self) -> bool {
        match self {
            Self::Network(_) => true,
            Self::Status(code, _) => *code == 429 || *code >= 500,
            Self::Answer(_) | Self::Local(_) => false,
        }
    }
}

/// What the hub says of a file before it is downloaded.
#[derive(Debug)]
pub struct Remote {
    /// Without quotes; what the cache calls the content. SHA-256 for large files.
    pub etag: String,
    /// Bytes, where the server says.
    pub size: Option<u64>,
}

/// A connection to one hub.
pub struct Client {
    agent: Agent,
    token: Option<String>,
}

impl Client {
    /// `token` goes to the host of each request's own address, never to where it is redirected.
    pub fn new(token: Option<String>) -> Self {
        let config = Agent::config_builder()
            .max_redirects(0)
            .http_status_as_error(false)
            .timeout_connect(Some(SILENCE))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .accept_encoding("identity") // sizes and ranges are those of the file itself
            .user_agent(concat!("hra/", env!("CARGO_PKG_VERSION")));
        Self { agent: config.build().into(), token }
    }

    /// A JSON answer.
    pub fn json<T: serde::de::DeserializeOwned>(&self, url: &str) -> Result<T, TransferFailure> {
        retried(&mut || {
            let mut answer = self.request(url, None, false)?;
            let text = answer.body_mut().with_config().limit(MAX_LISTING).read_to_vec()?;
            serde_json::from_slice(&text)
                .map_err(|e| TransferFailure::Answer(format!("a listing that cannot be read ({e})")))
        })
    }

    /// Name and size of a file's content.
    pub fn remote(&self, url: &str) -> Result<Remote, TransferFailure> {
        retried(&mut || {
            let answer = self.request(url, None, true)?;
            let header = |name: &str| answer.headers().get(name).and_then(|value| value.to_str().ok());
            let etag = header("x-linked-etag").or_else(|| header("etag")).unwrap_or_default();
            let etag = etag.trim_start_matches("W/").trim_matches('"').to_string();
            // The length of a redirection is not that of the file.
            let own = (!answer.status().is_redirection()).then(|| header("content-length")).flatten();
            let size = header("x-linked-size").or(own).and_then(|n| n.parse().ok());
            Ok(Remote { etag, size })
        })
    }

    /// Downloads to `part`, at most `most` bytes, going on with what is there; what comes is what its `ETag` names. `tick` is told the number of bytes that are there.
    pub fn download(
        &self,
        url: &str,
        remote: &Remote,
        most: Option<u64>,
        part: &Path,
        tick: &mut dyn FnMut(u64) -> Result<(), Error>,
    ) -> Result<(), TransferFailure> {
        let resumed = length(part) > 0;
        self.persist(url, remote, most, part, tick)?;
        let Some(problem) = integrity::damage(part, &remote.etag)? else { return Ok(()) };
        std::fs::remove_file(part).map_err(|e| Error::io("remove", part, e))?;
        if resumed {
            // The part was spoilt before; all of it anew may be right.
            return self.download(url, remote, most, part, tick);
        }
        Err(TransferFailure::Answer(problem))
    }

    /// Attempts until all is there, or nothing more comes.
    fn persist(
        &self,
        url: &str,
        remote: &Remote,
        most: Option<u64>,
        part: &Path,
        tick: &mut dyn FnMut(u64) -> Result<(), Error>,
    ) -> Result<(), TransferFailure> {
        let (mut attempt, mut pause) = (1, FIRST_PAUSE);
        loop {
            let before = length(part);
            match self.attempt(url, remote, most, part, tick) {
                Err(failure) if failure.passes() => {
                    let moved = length(part) > before;
                    (attempt, pause) = if moved { (1, FIRST_PAUSE) } else { (attempt + 1, pause * 2) };
                    if attempt > ATTEMPTS {
                        return Err(failure);
                    }
                    std::thread::sleep(pause);
                }
                other => return other,
            }
        }
    }

    fn attempt(
        &self,
        url: &str,
        remote: &Remote,
        most: Option<u64>,
        part: &Path,
        tick: &mut dyn FnMut(u64) -> Result<(), Error>,
    ) -> Result<(), TransferFailure> {
        let fail = |e| TransferFailure::Local(Error::io("write", part, e));
        let mut file = OpenOptions::new().append(true).create(true).open(part).map_err(fail)?;
        // Without a length nobody can tell whether a part is a part.
        let mut have = if remote.size.is_some() { length(part) } else { 0 };
        if remote.size.is_some_and(|size| have > size) {
            have = 0;
        }
        if remote.size != Some(have) || have == 0 {
            let answer = self.request(url, Some(have).filter(|have| *have > 0), false);
            let answer = match answer {
                Err(TransferFailure::Status(416, _)) if have > 0 => self.request(url, None, false)?,
                other => other?,
            };
            let range = answer.headers().get("content-range").and_then(|value| value.to_str().ok());
            let continues = answer.status() == 206
                && range.is_some_and(|range| range.starts_with(&format!("bytes {have}-")));
            if !continues {
                have = 0;
            }
            file.set_len(have).map_err(fail)?;
            have = copy(answer, (&mut file, part), have, (remote.size, most), tick)?;
        }
        if let Some(size) = remote.size.filter(|size| *size != have) {
            return Err(TransferFailure::Network(format!(
                "the connection ended after {have} of {size} bytes"
            )));
        }
        file.sync_all().map_err(fail)
    }

    /// One request and the redirects after it. A `head` request ends at the first answer that says what the file is.
    fn request(&self, url: &str, from: Option<u64>, head: bool) -> Result<Response<Body>, TransferFailure> {
        let home = origin(url)?;
        let mut url = url.to_string();
        for _ in 0..REDIRECTS {
            let mut request = if head { self.agent.head(&url) } else { self.agent.get(&url) };
            if let Some(token) = self.token.as_ref().filter(|_| gets_token(&home, &url)) {
                request = request.header("authorization", format!("Bearer {token}"));
            }
            if let Some(from) = from {
                request = request.header("range", format!("bytes={from}-"));
            }
            let answer = request.call()?;
            let status = answer.status();
            let header = |name: &str| answer.headers().get(name).and_then(|value| value.to_str().ok());
            if status.is_success() || (head && status.is_redirection() && header("x-linked-etag").is_some()) {
                return Ok(answer);
            }
            if !status.is_redirection() {
                return Err(TransferFailure::Status(
                    status.as_u16(),
                    header("x-error-code").unwrap_or_default().to_string(),
                ));
            }
            let Some(location) = header("location") else {
                return Err(TransferFailure::Answer("a redirection to nowhere".into()));
            };
            url = redirected(&home, &url, location)?;
        }
        Err(TransferFailure::Answer("redirections without end".into()))
    }
}

/// Appends an answer to `file`, which has `have` bytes; how many it has then.
fn copy(
    answer: Response<Body>,
    (file, part): (&mut File, &Path),
    mut have: u64,
    (size, most): (Option<u64>, Option<u64>),
    tick: &mut dyn FnMut(u64) -> Result<(), Error>,
) -> Result<u64, TransferFailure> {
    let mut reader = answer.into_body().into_reader();
    let mut buffer = vec![0u8; 1 << 18];
    loop {
        let n = reader.read(&mut buffer).map_err(|e| TransferFailure::Network(e.to_string()))?;
        if n == 0 {
            return Ok(have);
        }
        have += n as u64;
        if size.is_some_and(|size| have > size) {
            return Err(TransferFailure::Answer("more bytes than it promised".into()));
        }
        if let Some(most) = most.filter(|most| have > *most) {
            return Err(TransferFailure::Answer(format!(
                "more than {most} bytes, the most that is read of it"
            )));
        }
        file.write_all(&buffer[..n]).map_err(|e| Error::io("write", part, e))?;
        tick(have)?;
    }
}

/// Makes a small request again while its failure may pass.
fn retried<T>(request: &mut dyn FnMut() -> Result<T, TransferFailure>) -> Result<T, TransferFailure> {
    let mut pause = FIRST_PAUSE;
    loop {
        match request() {
            Err(failure) if failure.passes() && pause < FIRST_PAUSE * 4 => std::thread::sleep(pause),
            other => return other,
        }
        pause *= 2;
    }
}

/// The address that `location`, an answer of `url`, leads to. `home` is the origin of the first request: any other is asked over https
/// only, so that nobody on the way reads or changes what comes; also the same host without https is another.
fn redirected(home: &str, url: &str, location: &str) -> Result<String, TransferFailure> {
    let next = if location.starts_with('/') && !location.starts_with("//") {
        format!("{}{location}", origin(url)?)
    } else {
        location.to_string()
    };
    let target = origin(&next)?;
    if target != home && !target.starts_with("https://") {
        return Err(TransferFailure::Answer(format!("a redirection to {target}, which is not https")));
    }
    Ok(next)
}

/// Whether the token goes along to `url`: to the host, port and scheme of the first request alone.
fn gets_token(home: &str, url: &str) -> bool {
    origin(url).is_ok_and(|origin| origin == home)
}

/// Scheme, host and port of an address.
fn origin(url: &str) -> Result<String, TransferFailure> {
    let uri: Option<Uri> = url.parse().ok();
    let parts = uri.as_ref().and_then(|uri| Some((uri.scheme_str()?, uri.authority()?)));
    match parts {
        Some((scheme @ ("http" | "https"), authority)) => {
            Ok(format!("{scheme}://{authority}").to_ascii_lowercase())
        }
        _ => Err(TransferFailure::Answer("an address that cannot be read".into())),
    }
}

fn length(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |meta| meta.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirections_stay_with_https_and_the_token_with_its_host() {
        let home = "https://huggingface.co";
        let at = "https://huggingface.co/a/b/resolve/main/x";
        let to = |location: &str| redirected(home, at, location).map_err(|failure| format!("{failure:?}"));
        for (location, next, token) in [
            ("/c/d", "https://huggingface.co/c/d", true),
            ("https://huggingface.co/c", "https://huggingface.co/c", true),
            ("https://HuggingFace.co/c", "https://HuggingFace.co/c", true),
            ("https://cdn.example/x?sig=1", "https://cdn.example/x?sig=1", false),
            ("https://huggingface.co.example/x", "https://huggingface.co.example/x", false),
            ("https://huggingface.co:8443/x", "https://huggingface.co:8443/x", false),
            ("https://huggingface.co@example.com/x", "https://huggingface.co@example.com/x", false),
        ] {
            assert_eq!(to(location).unwrap(), next);
            assert_eq!(gets_token(home, next), token, "{location}");
        }
        for down in ["http://huggingface.co/c", "http://cdn.example/x", "http://127.0.0.1/x"] {
            assert!(to(down).unwrap_err().contains("which is not https"), "{down}");
        }
        for none in ["//cdn.example/x", "ftp://x/y", "file:///etc/passwd", "x", ""] {
            assert!(to(none).unwrap_err().contains("cannot be read"), "{none}");
        }
        // From another host on, a relative address is of that host: still without the token.
        let next = redirected(home, "https://cdn.example/x", "/y").unwrap();
        assert!(next == "https://cdn.example/y" && !gets_token(home, &next));
    }
}
