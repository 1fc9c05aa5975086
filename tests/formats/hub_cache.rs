//! A cache of the hub that was damaged, and answers that are not what the hub announced.

use crate::hub::{NAME, cache, run};
use crate::hub_server::{COMMIT, HubServer, git_blob};
use crate::support::finished::Finished;
use crate::support::scratch::Scratch;
use crate::support::training::tiny_sd;
use std::fs;
use std::path::{Path, PathBuf};

/// Draws one picture with the hub's model.
fn sample(scratch: &Scratch, server: &HubServer, model: &str, more: &[&str]) -> Finished {
    let words =
        ["sample", "--overwrite", "--model", model, "--prompt", "a cat", "--steps", "1", "--output", "out"];
    run(scratch, server, &[&words[..], more].concat(), &[])
}

fn ok(done: Finished) -> Finished {
    assert_eq!(done.code, 0, "{}", done.err);
    done
}

fn refused(done: &Finished, words: &[&str]) {
    assert_eq!(done.code, 2, "{}", done.err);
    for word in words {
        assert!(done.err.contains(word), "expected `{word}` in\n{}", done.err);
    }
}

fn cached(scratch: &Scratch, name: &str) -> PathBuf {
    cache(scratch).join("snapshots").join(COMMIT).join(name)
}

/// Changes one bit in the middle.
fn flip(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_damaged_file_of_the_cache_is_named_and_taken_anew_when_asked() {
    let scratch = Scratch::new();
    let server = HubServer::of(NAME, &tiny_sd());
    ok(sample(&scratch, &server, NAME, &[]));
    let at_commit = format!("{NAME}@{COMMIT}");
    let small = "tokenizer/merges.txt";
    let good = fs::read(tiny_sd().join(small)).unwrap();
    let blob = cache(&scratch).join("blobs").join(git_blob(&good));
    assert_eq!(fs::read(&blob).unwrap(), good, "small files are called as git calls them");

    flip(&blob);
    for model in [NAME, at_commit.as_str()] {
        refused(&sample(&scratch, &server, model, &[]), &[small, "the cached file is damaged", "--refresh"]);
    }
    let done = ok(sample(&scratch, &server, NAME, &["--refresh"]));
    assert!(done.err.contains(&format!("{small} is taken anew")), "{}", done.err);
    assert_eq!(fs::read(&blob).unwrap(), good);
    ok(sample(&scratch, &server, &at_commit, &[]));

    // A page that a portal sent, under its own name, before there was a check.
    let tokenizer = cached(&scratch, small);
    let page = cache(&scratch).join("blobs/W-portal");
    fs::write(&page, "<!DOCTYPE html><html><title>Log in to the network</title></html>").unwrap();
    fs::remove_file(&tokenizer).unwrap();
    std::os::unix::fs::symlink("../../../blobs/W-portal", &tokenizer).unwrap();
    refused(&sample(&scratch, &server, NAME, &[]), &[small, "a web page (HTML)", "--refresh"]);
    ok(sample(&scratch, &server, NAME, &["--refresh"]));
    assert_eq!(fs::read(&tokenizer).unwrap(), good);

    // Weights are hashed when it is asked for: a commit too, which is asked of nobody otherwise.
    let weights = "vae/diffusion_pytorch_model.safetensors";
    flip(&cached(&scratch, weights));
    let done = ok(sample(&scratch, &server, &at_commit, &["--refresh"]));
    assert!(done.err.contains(&format!("{weights} is taken anew")), "{}", done.err);
    assert_eq!(fs::read(cached(&scratch, weights)).unwrap(), fs::read(tiny_sd().join(weights)).unwrap());

    let offline = [("HF_HUB_OFFLINE", "1")];
    let words = ["sample", "--model", NAME, "--prompt", "x", "--output", "out", "--refresh"];
    refused(&run(&scratch, &server, &words, &offline), &["--refresh", "HF_HUB_OFFLINE"]);
}

#[test]
fn a_login_page_in_place_of_a_file_is_called_that() {
    let scratch = Scratch::new();
    let server = HubServer::of(NAME, &tiny_sd());
    for page in
        ["<!DOCTYPE html><html><title>Log in</title></html>", "<html><body>Accept the terms</body></html>"]
    {
        server.set(|s| s.page = Some(page.into()));
        refused(&sample(&scratch, &server, NAME, &[]), &["config.json", "a web page (HTML)"]);
    }
    assert!(!cached(&scratch, "unet/config.json").exists());
    server.set(|s| s.page = None);
    ok(sample(&scratch, &server, NAME, &[]));
}

#[test]
fn an_answer_that_is_not_of_the_announced_size_is_refused() {
    let scratch = Scratch::new();
    let server = HubServer::of(NAME, &tiny_sd());
    let most = 64 << 20;
    let name = "unet/config.json".to_string();
    // No length, and far more than a config has.
    server.set(|s| s.endless = Some((name.clone(), 2 * most)));
    refused(&sample(&scratch, &server, NAME, &[]), &[&name, "more than 67108864 bytes"]);
    let blobs = cache(&scratch).join("blobs");
    let kept: u64 = fs::read_dir(&blobs).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum();
    assert!(kept <= most as u64, "{kept} bytes are kept");
    // A length that no config has is refused before it is asked for.
    server.set(|s| (s.endless, s.size) = (None, Some((name.clone(), 5_000_000_000))));
    server.requests();
    refused(&sample(&scratch, &server, NAME, &[]), &[&name, "5000000000 bytes"]);
    assert!(!server.requests().iter().any(|(method, path, _)| method == "GET" && path.contains("resolve")));
    // More and fewer bytes of weights than were announced.
    let weights = "vae/diffusion_pytorch_model.safetensors".to_string();
    for (size, told) in [(1000, "more bytes than it promised"), (1 << 30, "the connection ended after")] {
        let other = Scratch::new();
        server.set(|s| s.size = Some((weights.clone(), size)));
        refused(&sample(&other, &server, NAME, &[]), &[told]);
        assert!(!cached(&other, &weights).exists());
    }
    server.set(|s| s.size = None);
    ok(sample(&scratch, &server, NAME, &[]));
}
