//! `--json`: one object on the standard output, with what the text says, and nothing else there.

use crate::support::base::root;
use crate::support::finished::Finished;
use crate::support::scratch::Scratch;
use serde_json::Value;

fn parsed(done: &Finished) -> Value {
    assert_eq!(done.code, 0, "{}", done.err);
    serde_json::from_str(&done.out).unwrap_or_else(|e| panic!("{e} in: {}", done.out))
}

/// A command without and with `--json`; output folders differ.
struct Both {
    text: String,
    json: Value,
}

fn both(scratch: &Scratch, words: &[&str], end: &str) -> Both {
    let run = |more: &[&str], output: String| {
        let mut all = words.to_vec();
        all.extend(more);
        all.extend(["--output", &output]);
        scratch.run(&all)
    };
    let text = run(&[], format!("text{end}"));
    assert_eq!(text.code, 0, "{}", text.err);
    let json = parsed(&run(&["--json"], format!("json{end}")));
    Both { text: text.out, json }
}

#[test]
fn a_training_says_how_it_ended() {
    let scratch = Scratch::new();
    let done = scratch.train("run", &["--max_train_steps", "2", "--checkpointing_steps", "1", "--json"]);
    let found = parsed(&done);
    assert_eq!((&found["steps"], &found["method"]), (&2.into(), &"hra".into()));
    assert_eq!(found["folder"], scratch.path("run").to_str().unwrap());
    assert_eq!(found["checkpoints"], serde_json::json!([1, 2]));
    for key in ["parameters", "seconds", "loss", "orthogonality_error", "peak_memory"] {
        assert!(found[key].as_f64().unwrap() > 0.0, "{key}: {found}");
    }
    assert!(found["weights_moved"]["largest"].as_f64() >= found["weights_moved"]["mean"].as_f64());
}

#[test]
fn drawn_pictures_are_listed() {
    let scratch = Scratch::new();
    let adapter = root().join("tests/fixtures/cases/sd15/hra-r4");
    let model = root().join("tests/fixtures/cases/sd15/pipeline");
    let words = [
        "sample",
        "--model",
        model.to_str().unwrap(),
        "--adapter",
        adapter.to_str().unwrap(),
        "--prompt",
        "a cat",
        "--prompt",
        "a dog",
        "--num-images",
        "2",
        "--seed",
        "7",
        "--steps",
        "2",
        "--width",
        "32",
        "--height",
        "32",
        "--with-base",
    ];
    let Both { text, json } = both(&scratch, &words, "");
    assert_eq!(text, "4 pictures in text, and 4 of the base model in base/\n");
    let pictures = json["pictures"].as_array().unwrap();
    let seeds: Vec<&Value> = pictures.iter().map(|p| &p["seed"]).collect();
    assert_eq!(seeds, [7, 8, 7, 8]);
    let prompts: Vec<&Value> = pictures.iter().map(|p| &p["prompt"]).collect();
    assert_eq!(prompts, ["a cat", "a cat", "a dog", "a dog"]);
    for path in pictures.iter().flat_map(|p| [&p["file"], &p["base"]]).chain([&json["grid"]]) {
        assert!(scratch.path(path.as_str().unwrap()).is_file(), "{path}");
    }
    assert!(json["adapters"][0]["layers"].as_u64().unwrap() > 0 && json["adapters"][0]["strength"] == 1.0);
}

#[test]
fn exports_and_merges_are_told_in_numbers() {
    let scratch = Scratch::new();
    let case = |name: &str| root().join("tests/fixtures/cases/sd15").join(name).to_str().unwrap().to_string();
    let (model, hra, oft) = (case("pipeline"), case("hra-r4"), case("oft-b4"));
    let export = |to: &str, adapter: &str, more: &[&str], end: &str| {
        let words = [&["export", "--model", &model, "--adapter", adapter, "--to", to], more].concat();
        both(&scratch, &words, end)
    };
    let Both { text, json } = export("kohya-lora", &hra, &[], ".safetensors");
    assert_eq!((&json["what"], &json["path"]), (&"LoRA".into(), &"json.safetensors".into()));
    assert!(text.contains("LoRA: text.safetensors\nread back: the largest difference"), "{text}");
    let largest = json["read_back"]["largest_difference"].as_f64().unwrap();
    assert!(text.contains(&format!("{largest:.1e}")) && largest < 1e-4, "{text}");
    assert!(text.contains(&format!("{} layers matched", json["adapters"][0]["layers"])), "{text}");
    assert!(json["approximation"].is_null());

    let Both { text, json } = export("diffusers-lora", &oft, &["--rank", "3"], "");
    let kept = &json["approximation"];
    assert_eq!(kept["rank"], 3);
    let mean = kept["mean_energy"].as_f64().unwrap() * 100.0;
    assert!(text.contains(&format!("rank 3 keeps {mean:.2} %")) && mean < 100.0, "{text}");

    let Both { text, json } = export("checkpoint", &hra, &[], "-model.safetensors");
    assert!(text.contains("\nmodel: text-model.safetensors\n"), "{text}");
    let tensors = json["read_back"]["tensors"].as_u64().unwrap();
    assert!(text.contains(&format!("in {tensors} changed tensors")) && tensors > 0, "{text}");

    let Both { text, json } = both(&scratch, &["merge", &hra, &format!("{hra}=0.5")], "-merged");
    let part = &json["parts"][0];
    assert_eq!(
        text,
        format!(
            "UNet: {}, {} values\nadapter: text-merged\n",
            part["method"].as_str().unwrap(),
            part["values"]
        )
    );
    assert!(scratch.path(json["path"].as_str().unwrap()).join("adapter_config.json").is_file());
    let inspected = parsed(&scratch.run(&["inspect", "json-merged", "--json"]));
    assert_eq!(inspected["parts"][0]["parameters"], part["values"]);
    assert!(parsed(&scratch.run(&["doctor", "--json"])).is_object());
}
