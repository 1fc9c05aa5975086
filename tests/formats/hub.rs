//! Models and adapters from a hub on the loopback, through the real binary: what is asked for, what lies in the cache, what
//! a user is told. No request leaves this machine.

use crate::hub_server::{COMMIT, HubServer, sha256};
use crate::support::base::root;
use crate::support::finished::{Finished, finished};
use crate::support::scratch::Scratch;
use crate::support::training::tiny_sd;
use std::fs;
use std::path::{Path, PathBuf};

pub const NAME: &str = "someone/tiny-sd";
const TOKEN: &str = "hf_secretsecretsecret";

/// Runs `hra` with its cache in the scratch folder and `server` as the hub.
pub fn run(scratch: &Scratch, server: &HubServer, args: &[&str], env: &[(&str, &str)]) -> Finished {
    let mut command = scratch.command(args);
    for name in ["ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE"] {
        command.env_remove(name).env_remove(name.to_lowercase());
    }
    for name in ["HF_TOKEN_PATH", "HUGGINGFACE_HUB_CACHE"] {
        command.env_remove(name);
    }
    command
        .env("HF_ENDPOINT", &server.address)
        .env("HF_HOME", scratch.path("home"))
        .envs(env.iter().copied());
    finished(command.output().unwrap())
}

/// `hra sample` with one step; the latents that it drew from.
fn sample(
    scratch: &Scratch,
    server: &HubServer,
    model: &str,
    env: &[(&str, &str)],
) -> Result<Vec<u8>, String> {
    let (out, latents) = (scratch.path("out"), scratch.path("latents.safetensors"));
    let (out, file) = (out.to_str().unwrap(), latents.to_str().unwrap());
    let args = [
        "sample",
        "--overwrite",
        "--model",
        model,
        "--prompt",
        "a cat",
        "--steps",
        "1",
        "--output",
        out,
        "--save-latents",
        file,
    ];
    let done = run(scratch, server, &args, env);
    assert!(!done.err.contains(TOKEN) && !done.out.contains(TOKEN), "the token is printed");
    if done.code == 0 { Ok(fs::read(latents).unwrap()) } else { Err(format!("{} {}", done.code, done.err)) }
}

pub fn cache(scratch: &Scratch) -> PathBuf {
    scratch.path("home/hub/models--someone--tiny-sd")
}

/// Everything below `dir` that is not in the hub's cache, by name.
fn outside(dir: &Path, cache: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for path in fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()) {
        if path == cache {
            continue;
        }
        if path.is_dir() { found.extend(outside(&path, cache)) } else { found.push(path) }
    }
    found
}

fn refused(result: Result<Vec<u8>, String>, words: &[&str]) {
    let told = result.expect_err("a refusal");
    assert!(told.starts_with("2 "), "{told}");
    for word in words {
        assert!(told.contains(word), "expected `{word}` in\n{told}");
    }
    assert!(!told.contains("defect"), "{told}");
}

#[test]
fn a_model_is_downloaded_once_and_used_offline() {
    let scratch = Scratch::new();
    let server = HubServer::of(NAME, &tiny_sd());
    server.set(|s| {
        s.files.insert("safety_checker/model.safetensors".into(), vec![0; 1000]);
        s.files.insert("unet/diffusion_pytorch_model.fp16.safetensors".into(), vec![0; 1000]);
        s.files.insert("README.md".into(), b"hello".to_vec());
    });
    let local = sample(&scratch, &server, tiny_sd().to_str().unwrap(), &[]).unwrap();
    assert!(server.requests().is_empty(), "a local folder asks nobody");

    assert_eq!(sample(&scratch, &server, NAME, &[]).unwrap(), local);
    let requests = server.requests();
    let got: Vec<&str> = requests.iter().map(|(_, path, _)| path.as_str()).collect();
    for unread in ["safety_checker", "fp16", "README"] {
        assert!(!got.iter().any(|path| path.contains(unread)), "{got:?}");
    }
    // Python's layout: blobs by hash, a snapshot of links, the branch's commit.
    let snapshot = cache(&scratch).join("snapshots").join(COMMIT);
    let unet = snapshot.join("unet/diffusion_pytorch_model.safetensors");
    let bytes = fs::read(tiny_sd().join("unet/diffusion_pytorch_model.safetensors")).unwrap();
    assert_eq!(fs::read_link(&unet).unwrap(), Path::new("../../../blobs").join(sha256(&bytes)));
    assert_eq!(fs::read(&unet).unwrap(), bytes);
    assert_eq!(fs::read_to_string(cache(&scratch).join("refs/main")).unwrap(), COMMIT);
    let drawn = String::from_utf8_lossy(&fs::read(scratch.path("out/0000-0000.png")).unwrap()).into_owned();
    assert!(drawn.contains(NAME), "the picture says which model drew it");

    // The branch is looked up again, no file is; a commit needs no look.
    assert_eq!(sample(&scratch, &server, NAME, &[]).unwrap(), local);
    let requests = server.requests();
    assert_eq!(requests.len(), 1, "{requests:?}");
    assert_eq!(requests[0].1, format!("/api/models/{NAME}/revision/main"));
    assert_eq!(sample(&scratch, &server, &format!("{NAME}@{COMMIT}"), &[]).unwrap(), local);
    assert_eq!(sample(&scratch, &server, NAME, &[("HF_HUB_OFFLINE", "1")]).unwrap(), local);
    assert!(server.requests().is_empty());

    // A hub that does not answer, and one that answers badly.
    let dead = HubServer { address: "http://127.0.0.1:9".into(), state: Default::default() };
    assert_eq!(sample(&scratch, &dead, NAME, &[]).unwrap(), local);
    server.set(|s| s.status = Some(503));
    assert_eq!(sample(&scratch, &server, NAME, &[]).unwrap(), local);

    fs::remove_file(snapshot.join("vae/config.json")).unwrap();
    let offline = [("HF_HUB_OFFLINE", "true")];
    refused(sample(&scratch, &server, NAME, &offline), &["vae/config.json", "HF_HUB_OFFLINE", "hint:"]);
    refused(sample(&scratch, &server, "someone/other", &offline), &["someone/other", "does not hold"]);
    refused(
        sample(&scratch, &dead, "someone/other", &[]),
        &["someone/other", "cannot be reached", "nothing is at that path"],
    );
}

#[test]
fn a_download_that_was_cut_goes_on() {
    let scratch = Scratch::new();
    let server = HubServer::of(NAME, &tiny_sd());
    let unet = fs::read(tiny_sd().join("unet/diffusion_pytorch_model.safetensors")).unwrap();
    let half = unet.len() / 2;
    let lfs = format!("/lfs/{}", sha256(&unet));
    let of_unet = |requests: Vec<(String, String, Option<String>)>| -> Vec<Option<String>> {
        requests.into_iter().filter(|(_, path, _)| *path == lfs).map(|(_, _, range)| range).collect()
    };
    // Past `half` nothing comes: the program gives up and keeps what it has.
    server.set(|s| s.cut = Some((half, usize::MAX)));
    refused(sample(&scratch, &server, NAME, &[]), &["connection", "hint:"]);
    let part = cache(&scratch).join("blobs").join(format!("{}.incomplete", sha256(&unet)));
    assert_eq!(fs::metadata(&part).unwrap().len(), half as u64);
    assert!(!cache(&scratch).join("refs/main").exists(), "a branch that is not whole is not recorded");
    server.requests();

    // Cut once more, a little further on: the same run takes the rest.
    server.set(|s| s.cut = Some((half + 1000, 1)));
    let drawn = sample(&scratch, &server, NAME, &[]).unwrap();
    let ranges = of_unet(server.requests());
    assert_eq!(ranges, [Some(format!("bytes={half}-")), Some(format!("bytes={}-", half + 1000))]);
    assert_eq!(fs::read(cache(&scratch).join("blobs").join(sha256(&unet))).unwrap(), unet);
    assert!(!part.exists());

    // A server without ranges sends all of it again.
    let other = Scratch::new();
    server.set(|s| (s.cut, s.ignores_ranges) = (Some((half, 1)), true));
    assert_eq!(sample(&other, &server, NAME, &[]).unwrap(), drawn);
    assert_eq!(fs::read(cache(&other).join("blobs").join(sha256(&unet))).unwrap(), unet);
}

#[test]
fn content_that_is_not_what_the_hub_named_is_refused() {
    let scratch = Scratch::new();
    let server = HubServer::of(NAME, &tiny_sd());
    server.set(|s| s.corrupt = true);
    // The first files are small ones.
    refused(sample(&scratch, &server, NAME, &[]), &["unet/config.json", "SHA-1"]);
    server.set(|s| (s.corrupt, s.corrupt_large) = (false, true));
    refused(sample(&scratch, &server, NAME, &[]), &["safetensors", "SHA-256"]);
    server.set(|s| s.corrupt_large = false);

    // A part that was spoilt on this side is thrown away.
    let unet = fs::read(tiny_sd().join("unet/diffusion_pytorch_model.safetensors")).unwrap();
    let other = Scratch::new();
    let blobs = cache(&other).join("blobs");
    fs::create_dir_all(&blobs).unwrap();
    fs::write(blobs.join(format!("{}.incomplete", sha256(&unet))), vec![7; unet.len() / 3]).unwrap();
    sample(&other, &server, NAME, &[]).unwrap();
    assert_eq!(fs::read(blobs.join(sha256(&unet))).unwrap(), unet);
}

#[test]
fn gated_repositories_need_a_token_that_goes_nowhere_else() {
    let scratch = Scratch::new();
    let server = HubServer::of(NAME, &tiny_sd());
    server.set(|s| s.token = Some(TOKEN.into()));
    refused(
        sample(&scratch, &server, NAME, &[]),
        &["gated", "no token was sent", "HF_TOKEN", "settings/tokens"],
    );
    refused(sample(&scratch, &server, NAME, &[("HF_TOKEN", "hf_wrong")]), &["gated", "not enough"]);
    refused(sample(&scratch, &server, NAME, &[("HF_TOKEN", "two words")]), &["HF_TOKEN: expected a token"]);

    // Another host over plain http would see the request: it is not asked.
    let other = HubServer::new(NAME);
    server.set(|s| s.elsewhere = Some(other.address.clone()));
    refused(sample(&scratch, &server, NAME, &[("HF_TOKEN", TOKEN)]), &["not https"]);
    assert!(other.requests().is_empty());

    server.set(|s| s.elsewhere = None);
    fs::write(scratch.path("home/token"), format!("{TOKEN}\n")).unwrap();
    sample(&scratch, &server, NAME, &[]).unwrap();
}

#[test]
fn nothing_is_written_outside_the_cache() {
    let scratch = Scratch::new();
    let server = HubServer::of(NAME, &tiny_sd());
    let before = outside(scratch.dir.path(), &cache(&scratch));
    for etag in ["../../../../escaped", "/escaped-by-hra", "..", "a/b", ""] {
        server.set(|s| s.etag = Some(etag.into()));
        refused(sample(&scratch, &server, NAME, &[]), &["ETag"]);
    }
    server.set(|s| (s.etag, s.commit) = (None, Some("../../../../escaped".into())));
    refused(sample(&scratch, &server, NAME, &[]), &["commit"]);
    server.set(|s| s.commit = None);
    assert_eq!(outside(scratch.dir.path(), &cache(&scratch)), before);

    let hostile = [
        "../../escaped",
        "tokenizer/../../../escaped",
        "/etc/escaped",
        "tokenizer/..",
        "unet/../../x.safetensors",
    ];
    server.set(|s| s.listed = hostile.map(String::from).to_vec());
    sample(&scratch, &server, NAME, &[]).unwrap();
    let ours = ["out", "latents.safetensors", "home/hub/.locks"].map(|name| scratch.path(name));
    let strange: Vec<_> = outside(scratch.dir.path(), &cache(&scratch))
        .into_iter()
        .filter(|path| !ours.iter().any(|own| path.starts_with(own)))
        .collect();
    assert_eq!(strange, before);
    let asked = server.requests();
    assert!(asked.iter().all(|(_, path, _)| !path.contains("escaped") && !path.contains("..")), "{asked:?}");
}

#[test]
fn what_cannot_be_had_is_told_with_a_way_out() {
    let scratch = Scratch::new();
    let server = HubServer::of(NAME, &tiny_sd());
    let refuse = |model: &str, words: &[&str]| refused(sample(&scratch, &server, model, &[]), words);
    refuse(&format!("{NAME}@no-such-branch"), &["no revision `no-such-branch`", "hint:"]);
    refuse("someone/nothing", &["someone/nothing", "no such repository", "nothing is at that path"]);
    // A slip of the pen in a path has an id's form too.
    fs::create_dir_all(scratch.path("models/tiny-sd-turbo")).unwrap();
    refuse("models/tiny-sd-tubro", &["no such repository", "the folder models holds tiny-sd-turbo"]);
    server.requests();
    for word in ["nothing", "a/b/c", "../a/b", "models/x.safetensors", "someone/tiny-sd@../x"] {
        refuse(word, &[word, "found nothing", "owner/name", "hint:"]);
    }
    assert!(server.requests().is_empty(), "what is no id is asked of nobody");

    // A path wins over an id of the same form.
    fs::create_dir_all(scratch.path(NAME)).unwrap();
    refuse(NAME, &["expected a Stable Diffusion folder"]);
    assert!(server.requests().is_empty());
    fs::remove_dir(scratch.path(NAME)).unwrap();

    server.set(|s| {
        for part in ["unet/diffusion_pytorch_model", "text_encoder/model"] {
            let bytes = s.files.remove(&format!("{part}.safetensors")).unwrap();
            s.files.insert(format!("{part}.bin"), bytes);
        }
    });
    refuse(NAME, &["unet/diffusion_pytorch_model.safetensors", "pickled", "safe_serialization=True"]);
    server.set(|s| {
        s.files.clear();
        s.files.insert("v1-5-pruned.safetensors".into(), vec![]);
    });
    refuse(NAME, &["unet/config.json", "hint: it has single files such as v1-5-pruned.safetensors"]);
    let bad = [("HF_ENDPOINT", "ftp://x")];
    refused(sample(&scratch, &server, NAME, &bad), &["HF_ENDPOINT", "https://"]);
    fs::write(scratch.path("home"), "a file where the cache should be").unwrap();
    server.set(|s| *s = crate::hub_server::State { name: NAME.into(), ..Default::default() });
    let full = HubServer::of(NAME, &tiny_sd());
    refused(sample(&scratch, &full, NAME, &[]), &["cannot make the folder", "home"]);
}

#[test]
fn adapters_come_with_a_strength_and_from_a_revision() {
    let scratch = Scratch::new();
    let case = root().join("tests/fixtures/cases/sd15");
    let server = HubServer::of("someone/my-adapter", &case.join("hra-r4-conv"));
    let model = case.join("pipeline");
    let draw = |adapter: &str| {
        let file = scratch.path("latents.safetensors");
        let args = [
            "sample",
            "--model",
            model.to_str().unwrap(),
            "--adapter",
            adapter,
            "--prompt",
            "a cat",
            "--steps",
            "1",
        ];
        let more = ["--output", "out", "--save-latents", file.to_str().unwrap()];
        let done = run(&scratch, &server, &[&args[..], &more[..]].concat(), &[]);
        assert_eq!(done.code, 0, "{}", done.err);
        fs::read(&file).unwrap()
    };
    let local = case.join("hra-r4-conv");
    assert_eq!(draw("someone/my-adapter=0.5"), draw(&format!("{}=0.5", local.display())));
    assert_eq!(draw("someone/my-adapter@refs/pr/1"), draw(local.to_str().unwrap()));
    let refs = scratch.path("home/hub/models--someone--my-adapter/refs");
    assert_eq!(fs::read_to_string(refs.join("refs/pr/1")).unwrap(), COMMIT);
}

#[test]
fn a_repository_holds_the_adapters_of_both_networks_in_folders_of_their_own() {
    let scratch = Scratch::new();
    let case = root().join("tests/fixtures/cases/sd15");
    let server = HubServer::new("someone/my-adapter");
    for (folder, place) in [("hra-r4", "unet"), ("text-hra-r4", "text_encoder")] {
        for name in ["adapter_config.json", "adapter_model.safetensors"] {
            let bytes = fs::read(case.join(folder).join(name)).unwrap();
            server.set(|s| drop(s.files.insert(format!("{place}/800/sks/{name}"), bytes)));
        }
    }
    let [model, unet, text] = ["pipeline", "hra-r4", "text-hra-r4"].map(|name| case.join(name));
    let draw = |adapters: &[&str], env: &[(&str, &str)]| {
        let file = scratch.path("latents.safetensors");
        let mut args =
            vec!["sample", "--model", model.to_str().unwrap(), "--prompt", "a cat", "--steps", "1"];
        adapters.iter().for_each(|adapter| args.extend(["--adapter", adapter]));
        args.extend(["--output", "out", "--save-latents", file.to_str().unwrap()]);
        let done = run(&scratch, &server, &args, env);
        assert_eq!(done.code, 0, "{}", done.err);
        (fs::read(&file).unwrap(), done.err)
    };
    let (wanted, _) = draw(&[unet.to_str().unwrap(), text.to_str().unwrap()], &[]);
    assert_eq!(draw(&["someone/my-adapter"], &[]).0, wanted);
    assert_eq!(draw(&["someone/my-adapter"], &[("HF_HUB_OFFLINE", "1")]).0, wanted, "from the cache");
    server.set(|s| drop(s.files.insert("learned_embeds.safetensors".into(), vec![0; 10])));
    let (latents, told) = draw(&["someone/my-adapter"], &[]);
    assert!(latents == wanted && told.contains("not used: learned_embeds.safetensors"), "{told}");
}

#[test]
fn controlnets_are_downloaded_too() {
    let scratch = Scratch::new();
    let case = root().join("tests/fixtures/cases/sd15");
    let server = HubServer::of("someone/controlnet", &case.join("controlnet"));
    let (model, local) = (case.join("pipeline"), case.join("controlnet"));
    let condition = root().join("assets/control/held_out/segmentation/0000.png");
    let draw = |net: &str| {
        let file = scratch.path("latents.safetensors");
        let words = ["sample", "--prompt", "a cat", "--steps", "2", "--output", "out", "--model"];
        let more = [model.to_str().unwrap(), "--control", condition.to_str().unwrap(), "--controlnet", net];
        let save = ["--save-latents", file.to_str().unwrap()];
        let done = run(&scratch, &server, &[&words[..], &more[..], &save[..]].concat(), &[]);
        assert_eq!(done.code, 0, "{}", done.err);
        fs::read(&file).unwrap()
    };
    assert_eq!(draw("someone/controlnet"), draw(local.to_str().unwrap()));
}

#[test]
fn a_run_keeps_the_id_as_typed() {
    let scratch = Scratch::new();
    let server = HubServer::of(NAME, &tiny_sd());
    let id = format!("{NAME}@v1");
    let mut flags =
        scratch.train_flags("run", &["--max_train_steps", "1", "--pretrained_model_name_or_path", &id]);
    flags.retain(|flag| flag != "--with_prior_preservation");
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let line = format!("pretrained_model_name_or_path = \"{id}\"");
    let printed = run(&scratch, &server, &[&flags[..], &["--print-config"]].concat(), &[]);
    assert!(printed.out.contains(&line), "{}\n{}", printed.out, printed.err);
    assert!(server.requests().is_empty());
    let done = run(&scratch, &server, &flags, &[]);
    assert_eq!(done.code, 0, "{}", done.err);
    assert!(fs::read_to_string(scratch.path("run/config.toml")).unwrap().contains(&line));
    assert!(done.out.contains(&format!("--model {id} ")), "{}", done.out);
    let again = ["train", "--resume", "latest", "--output_dir", "run", "--max_train_steps", "2"];
    let done = run(&scratch, &server, &again, &[]);
    assert_eq!(done.code, 0, "{}", done.err);
}

#[test]
fn towers_are_downloaded_for_scores() {
    let scratch = Scratch::new();
    let clip = root().join("assets/tiny-clip");
    let server = HubServer::of("someone/tiny-clip", &clip);
    server.set(|s| {
        s.files.insert("tf_model.h5".into(), vec![0; 1000]);
    });
    let photos = root().join("assets/subjects/cat/train");
    let photos = photos.to_str().unwrap();
    let evaluate = |clip: &str, env: &[(&str, &str)]| {
        run(
            &scratch,
            &server,
            &["evaluate", photos, "--prompt", "a cat", "--clip", clip, "--device", "cpu"],
            env,
        )
    };
    let local = evaluate(clip.to_str().unwrap(), &[]);
    assert!(local.code == 0 && server.requests().is_empty(), "{}", local.err);
    let fetched = evaluate("someone/tiny-clip", &[]);
    assert_eq!(fetched.out, local.out, "{}", fetched.err);
    let requests = server.requests();
    assert!(!requests.iter().any(|(_, path, _)| path.contains("tf_model")), "{requests:?}");
    assert_eq!(requests.iter().filter(|(_, path, _)| path.contains("/api/")).count(), 1, "{requests:?}");
    assert_eq!(evaluate("someone/tiny-clip", &[("HF_HUB_OFFLINE", "1")]).out, local.out);

    server.set(|s| {
        let weights = s.files.remove("model.safetensors").unwrap();
        s.files.insert("pytorch_model.bin".into(), weights);
    });
    let other = Scratch::new();
    let words = ["evaluate", photos, "--prompt", "a cat", "--clip", "someone/tiny-clip"];
    let pickled = run(&other, &server, &words, &[]);
    for word in ["--clip: ", "without model.safetensors", "pickled", "openai/clip-vit-large-patch14"] {
        assert!(pickled.code == 2 && pickled.err.contains(word), "expected `{word}` in {}", pickled.err);
    }
}
