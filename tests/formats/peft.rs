//! PEFT folders: what is written is read again the same, has PEFT's fields, and what cannot be honoured is refused with the
//! reason, whatever a file holds.

use crate::support::all_cases::cases;
use hra::adapter::Method;
use hra::adapter::blocks::{Cayley, Partition};
use hra::adapter::methods::boft::BoftConfig;
use hra::adapter::methods::dora::DoraConfig;
use hra::adapter::methods::hra::{HraConfig, HraInit};
use hra::adapter::methods::lora::{LoraConfig, LoraInit};
use hra::adapter::methods::oft::{Coft, OftConfig};
use hra::adapter::peft::{self, AdapterConfig, AdapterFile, Bias, CONFIG_FILE, WEIGHTS_FILE};
use hra::attach::loaded::{HOMES, UNET_CLASS as CLASS};
use hra::platform::random;
use hra::weights::tensor_file;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::Path;
use tch::{Device, Kind, Tensor};

const F32: (Kind, Device) = (Kind::Float, Device::Cpu);

fn lora() -> LoraConfig {
    LoraConfig { rslora: true, ..LoraConfig::new(2, 3.0) }
}

fn oft(partition: Partition, coft: Coft) -> OftConfig {
    OftConfig { partition, cayley: Cayley::Exact, coft, block_share: false }
}

fn methods() -> Vec<Method> {
    let hra =
        HraConfig { rank: 2, gram_schmidt: true, init: HraInit::Peft, allow_odd_rank: true, lambda: 0.0 };
    vec![
        Method::new(hra),
        Method::new(HraConfig { rank: 3, gram_schmidt: false, ..hra }),
        Method::new(lora()),
        Method::new(DoraConfig(LoraConfig { init: LoraInit::Kaiming, ..LoraConfig::new(2, 0.75) })),
        Method::new(oft(Partition::Blocks(4), Coft::None)),
        Method::new(OftConfig { cayley: Cayley::Neumann(7), ..oft(Partition::BlockSize(3), Coft::None) }),
        Method::new(oft(Partition::Blocks(4), Coft::Paper { eps: 6e-5 })),
        Method::new(oft(Partition::Blocks(4), Coft::Peft { eps: 0.5 })),
        Method::new(OftConfig { block_share: true, ..oft(Partition::BlockSize(4), Coft::None) }),
        Method::new(BoftConfig { partition: Partition::Blocks(2), factors: 1 }),
        Method::new(BoftConfig { partition: Partition::BlockSize(6), factors: 1 }),
    ]
}

fn config(method: Method) -> AdapterConfig {
    AdapterConfig {
        method,
        bias: Bias::Only,
        targets: json!(["to_q", "conv1"]),
        base_model: Some("owner/name".into()),
    }
}

/// Random tensors of a linear map and a convolution of 12 inputs, with a bias.
fn tensors(method: &Method) -> Vec<(String, Tensor)> {
    let mut seed = 7;
    let mut normal = |shape: &[i64]| {
        seed += 1;
        random::normal(seed, shape)
    };
    let mut tensors = Vec::new();
    for (layer, shape) in [("a.to_q", vec![5, 12]), ("a.conv1", vec![6, 3, 2, 2])] {
        let weight = normal(&shape);
        for (name, t) in method.start(&weight, 1).unwrap().parameters() {
            tensors.push((format!("{layer}.{name}"), &t + normal(&t.size()) * 0.1));
        }
        tensors.push((format!("{layer}.base_layer.bias"), normal(&shape[..1])));
    }
    tensors
}

fn write(dir: &Path, config: &AdapterConfig, tensors: &[(String, Tensor)]) {
    peft::write(dir, config, CLASS, tensors, Kind::Float, &[("base_fingerprint", "abc".into())]).unwrap();
}

fn json_of(dir: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(dir.join(CONFIG_FILE)).unwrap()).unwrap()
}

/// What a folder's reading fails with, after `change` was made to its config.
fn refused(method: Method, change: impl Fn(&mut Value)) -> String {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &config(method.clone()), &tensors(&method));
    let mut json = json_of(dir.path());
    change(&mut json);
    std::fs::write(dir.path().join(CONFIG_FILE), json.to_string()).unwrap();
    AdapterFile::read(dir.path()).err().map(|e| e.to_string()).unwrap_or_default()
}

/// What a folder's reading fails with, with other tensors in it.
fn refused_tensors(method: Method, change: impl Fn(&mut Vec<(String, Tensor)>)) -> String {
    let dir = tempfile::tempdir().unwrap();
    let mut tensors = tensors(&method);
    change(&mut tensors);
    write(dir.path(), &config(method), &tensors);
    AdapterFile::read(dir.path()).err().map(|e| e.to_string()).unwrap_or_default()
}

#[test]
fn every_method_is_read_as_it_was_written() {
    for method in methods() {
        let dir = tempfile::tempdir().unwrap();
        let written = tensors(&method);
        write(dir.path(), &config(method.clone()), &written);
        let file = AdapterFile::read(dir.path()).unwrap();
        assert_eq!(file.config.bias, Bias::Only);
        assert_eq!(file.config.targets, json!(["to_q", "conv1"]));
        assert_eq!(file.config.base_model.as_deref(), Some("owner/name"));
        assert_eq!(file.metadata["base_fingerprint"], "abc");
        assert!(file.unused.is_empty() && file.notes.is_empty(), "{:?} {:?}", file.unused, file.notes);
        assert_eq!(file.config.method, method, "{}", json_of(dir.path()));
        let mut read: Vec<(String, Tensor)> = Vec::new();
        for (layer, adapter) in &file.layers {
            read.extend(adapter.parameters().into_iter().map(|(name, t)| (format!("{layer}.{name}"), t)));
        }
        read.extend(file.biases.iter().map(|(layer, t)| (format!("{layer}.base_layer.bias"), t.copy())));
        assert_eq!(read.len(), written.len());
        for (name, expected) in written {
            let found = &read.iter().find(|(n, _)| *n == name).unwrap().1;
            assert_eq!(found.size(), expected.size());
            let clipped = method.describe().starts_with("PEFT's COFT");
            let difference = (found - &expected).abs().max().double_value(&[]);
            assert!(clipped || difference == 0.0, "{name} of {}: {difference}", method.describe());
        }
        // written once more, it is the same folder
        let again = tempfile::tempdir().unwrap();
        write(again.path(), &file.config, &read);
        assert_eq!(json_of(again.path()), json_of(dir.path()));
    }
}

#[test]
fn configs_have_the_fields_that_peft_writes() {
    let mut compared = BTreeSet::new();
    for case in cases() {
        for entry in std::fs::read_dir(&case.dir).unwrap() {
            let dir = entry.unwrap().path();
            if !dir.join(CONFIG_FILE).is_file() {
                continue;
            }
            let theirs = json_of(&dir);
            let file = AdapterFile::read(&dir).unwrap();
            let name = theirs["auto_mapping"]["base_model_class"].as_str().unwrap();
            let (_, class) = HOMES.into_iter().find(|(_, class)| class.name == name).unwrap();
            let ours = file.config.to_json(class).unwrap();
            let keys = |v: &Value| v.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
            assert_eq!(keys(&ours), keys(&theirs), "{}", dir.display());
            for (key, value) in ours.as_object().unwrap() {
                // how the weights start is of training; patterns are written out by layer
                if !key.starts_with("init_") && !key.ends_with("_pattern") && key != "boft_n_butterfly_factor"
                {
                    assert_eq!(value, &theirs[key], "{key} of {}", dir.display());
                }
            }
            compared.insert(theirs["peft_type"].to_string());
        }
    }
    assert_eq!(compared.len(), 4, "{compared:?}");
}

#[test]
fn ranks_and_alphas_by_pattern_are_those_of_the_first_that_matches() {
    let mut written = tensors(&Method::new(lora()));
    for (name, t) in &mut written {
        if name.starts_with("a.conv1.lora_A") {
            *t = Tensor::ones([1, 3, 2, 2], F32);
        } else if name.starts_with("a.conv1.lora_B") {
            *t = Tensor::ones([6, 1, 1, 1], F32);
        }
    }
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &config(Method::new(lora())), &written);
    let text = std::fs::read_to_string(dir.path().join(CONFIG_FILE)).unwrap();
    // The order of the keys counts, and JSON libraries that sort them would turn it round.
    let text = text
        .replace("\"rank_pattern\": {}", "\"rank_pattern\": {\"z?conv1\": 1, \"a.conv.\": 9, \"onv1\": 8}")
        .replace("\"alpha_pattern\": {}", "\"alpha_pattern\": {\"^a.to_q\": 6, \".*to_q\": 7.5}");
    std::fs::write(dir.path().join(CONFIG_FILE), text).unwrap();
    let file = AdapterFile::read(dir.path()).unwrap();
    let exceptions = |file: &AdapterFile| file.config.method.of::<LoraConfig>().unwrap().exceptions.clone();
    let own = exceptions(&file);
    assert_eq!(own.rank.iter().collect::<Vec<_>>(), [(&"a.conv1".to_string(), &1)]);
    assert_eq!(own.alpha.iter().collect::<Vec<_>>(), [(&"a.to_q".to_string(), &6.0)]);
    let change = |file: &AdapterFile, layer: &str, shape: [i64; 2]| {
        file.layers[layer].change(&Tensor::zeros(shape, (Kind::Double, Device::Cpu)), 1.0).form
    };
    // rsLoRA: alpha 3 by the root of rank 1
    let zero = Tensor::zeros([6, 12], (Kind::Double, Device::Cpu));
    let conv = change(&file, "a.conv1", [6, 12]).merged(&zero);
    assert!((conv - 3.0).abs().max().double_value(&[]) < 1e-12);
    // written again, with patterns of whole names, it is the same adapter
    let again = tempfile::tempdir().unwrap();
    write(again.path(), &file.config, &written);
    let second = AdapterFile::read(again.path()).unwrap();
    assert_eq!(exceptions(&second), own);
    let zero = Tensor::zeros([5, 12], (Kind::Double, Device::Cpu));
    let pair = [&file, &second].map(|f| change(f, "a.to_q", [5, 12]).merged(&zero));
    assert!((&pair[0] - &pair[1]).abs().max().double_value(&[]) == 0.0);
}

#[test]
fn what_cannot_be_honoured_is_refused_with_the_reason() {
    let hra = methods().remove(0);
    let plain = Method::new(lora());
    let oft = Method::new(oft(Partition::BlockSize(4), Coft::None));
    let boft = Method::new(BoftConfig { partition: Partition::BlockSize(4), factors: 1 });
    let set =
        |method: &Method, key: &str, value: Value| refused(method.clone(), |json| json[key] = value.clone());
    for method in [&hra, &plain, &oft, &boft] {
        assert_eq!(refused(method.clone(), |_| ()), "");
        assert!(set(method, "modules_to_save", json!(["conv_in"])).contains("modules_to_save"));
        assert!(set(method, "bias", json!("some")).contains("bias: expected none, all or"));
        assert!(set(method, "peft_type", json!("LOHA")).contains("found LOHA"));
    }
    for (method, key, value, words) in [
        (&hra, "r", json!(0), "r: expected a positive number"),
        (&hra, "r", json!("2"), "r: expected a whole number"),
        (&hra, "apply_GS", json!("yes"), "apply_GS: expected true or false"),
        (&plain, "fan_in_fan_out", json!(true), "fan_in_fan_out"),
        (&plain, "lora_bias", json!(true), "lora_bias"),
        (&plain, "layer_replication", json!([[0, 4], [2, 5]]), "layer_replication"),
        (&plain, "use_qalora", json!(true), "use_qalora"),
        (&plain, "use_bdlora", json!({"nblocks": 2}), "use_bdlora"),
        (&plain, "trainable_token_indices", json!([1, 2]), "trainable_token_indices"),
        (&plain, "target_parameters", json!(["a.weight"]), "target_parameters"),
        (&plain, "alora_invocation_tokens", json!([3]), "alora_invocation_tokens"),
        (&plain, "arrow_config", json!({"top_k": 2}), "arrow_config"),
        (&plain, "init_lora_weights", json!("pissa_niter_4"), "may change the base weights"),
        (&plain, "lora_alpha", json!("4"), "lora_alpha: expected a number"),
        (&plain, "r", json!(3), "lora_A: expected rank 3, found 2"),
        (&plain, "use_dora", json!(true), "expected a tensor lora_magnitude_vector"),
        (&plain, "rank_pattern", json!({"to_q": 4}), "`a.to_q`: lora_A: expected rank 4, found 2"),
        (&plain, "rank_pattern", json!({"(": 2}), "`(` is not a regular expression"),
        (&plain, "rank_pattern", json!({"to_q": "x"}), "rank_pattern"),
        (&plain, "rank_pattern", json!({"to_q": -1}), "expected positive numbers"),
        (&oft, "r", json!(3), "expected one of r and oft_block_size to be 0"),
        (&oft, "oft_block_size", Value::Null, "before 0.14"),
        (&oft, "oft_block_size", json!(1e30), "oft_block_size: expected a whole number"),
        (&oft, "block_share", json!(true), "expected one block"),
        (&oft, "coft", json!(1), "coft: expected true or false"),
        (&boft, "boft_block_num", json!(3), "expected one of boft_block_num and boft_block_size"),
        (&boft, "fan_in_fan_out", json!(true), "fan_in_fan_out"),
    ] {
        let text = set(method, key, value.clone());
        assert!(text.contains(words), "{key} = {value}: {text}");
    }
    let neumann = refused(oft, |json| {
        json["use_cayley_neumann"] = json!(true);
        json["num_cayley_neumann_terms"] = json!(1_000_000);
    });
    assert!(neumann.contains("num_cayley_neumann_terms: expected 1 to 64, found 1000000"), "{neumann}");
    // all at once
    let both = refused(plain, |json| {
        json["lora_bias"] = json!(true);
        json["r"] = json!(-4);
    });
    assert!(both.contains("lora_bias") && both.contains("r: expected"), "{both}");
}

#[test]
fn every_problem_of_the_tensors_is_told() {
    let plain = Method::new(lora());
    let text = refused_tensors(plain.clone(), |tensors| {
        tensors.retain(|(name, _)| name != "a.to_q.lora_B.weight");
        tensors[1].1 = Tensor::full([5], f64::NAN, F32); // the bias of a.to_q, as it comes second now
        tensors.push(("b.lora_embedding_A".into(), Tensor::ones([2, 2], F32)));
    });
    for words in [
        "`a.to_q`: expected a tensor lora_B.weight beside the others, found none",
        "`base_model.model.a.to_q.base_layer.bias`: holds numbers that are not finite",
        "`base_model.model.b.lora_embedding_A`: expected only tensors of",
        "3 problems",
    ] {
        assert!(text.contains(words), "{words}\n{text}");
    }
    let same = refused_tensors(plain.clone(), |tensors| {
        let copy = tensors[0].1.copy();
        tensors.push(("text_model.a.to_q.lora_A.weight".into(), copy));
    });
    assert!(same.contains("names the same tensor as another key"), "{same}");
    let nothing = refused_tensors(plain.clone(), |tensors| tensors.clear());
    assert!(nothing.contains("expected tensors named `..LAYER.lora_A.weight`, found none"), "{nothing}");
    let dora = refused_tensors(plain.clone(), |tensors| {
        tensors.push(("a.to_q.lora_magnitude_vector".into(), Tensor::ones([5], F32)));
    });
    assert!(dora.contains("lora_magnitude_vector`: expected only tensors of"), "{dora}");
    let other = refused_tensors(methods().remove(0), |tensors| {
        tensors.push(("c.oft_R.weight".into(), Tensor::ones([2, 3], F32)));
    });
    assert!(other.contains("expected only tensors of HRA"), "{other}");
    // shapes of every kind, of which none may stop the program
    for method in methods() {
        for shape in [
            vec![],
            vec![0],
            vec![1],
            vec![0, 0],
            vec![0, 3],
            vec![3, 0],
            vec![5, 4],
            vec![1, 0, 0, 0],
            vec![3; 6],
        ] {
            let part = method.start(&Tensor::zeros([5, 12], F32), 0).unwrap().parameters()[0].0;
            let text = refused_tensors(method.clone(), |tensors| {
                let at = tensors.iter().position(|(name, _)| name.ends_with(part)).unwrap();
                tensors[at].1 = Tensor::ones(&shape[..], F32);
            });
            assert!(text.contains("expected"), "{} {shape:?}: {text}", method.describe());
        }
    }
}

#[test]
fn butterfly_factors_are_those_of_the_tensors() {
    // PEFT without its CUDA extension trains one factor and writes the number it was asked for.
    let method = Method::new(BoftConfig { partition: Partition::BlockSize(4), factors: 1 });
    let dir = tempfile::tempdir().unwrap();
    let asked = Method::new(BoftConfig { partition: Partition::BlockSize(4), factors: 2 });
    write(dir.path(), &config(asked.clone()), &tensors(&method));
    let file = AdapterFile::read(dir.path()).unwrap();
    assert_eq!(file.config.method, method);
    assert!(file.notes[0].contains("2 butterfly factors"), "{:?}", file.notes);
    // two are read as two, where all have two
    let two = |tensors: &mut Vec<(String, Tensor)>| {
        for (_, t) in tensors.iter_mut().filter(|(name, _)| name.ends_with("boft_R")) {
            *t = Tensor::zeros([2, 6, 2, 2], F32);
        }
    };
    let pairs = Method::new(BoftConfig { partition: Partition::BlockSize(2), factors: 1 });
    assert!(refused_tensors(pairs, two).contains("boft_n_butterfly_factor: expected 1 factors"));
}

#[test]
fn old_series_of_oft_are_used_with_a_word() {
    let method =
        Method::new(OftConfig { cayley: Cayley::Neumann(5), ..oft(Partition::Blocks(4), Coft::None) });
    for (version, notes) in
        [(json!("0.17.1"), 1), (Value::Null, 1), (json!("0.18.0"), 0), (json!("1.0.dev0@abc"), 0)]
    {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &config(method.clone()), &tensors(&method));
        let mut json = json_of(dir.path());
        json["peft_version"] = version.clone();
        std::fs::write(dir.path().join(CONFIG_FILE), json.to_string()).unwrap();
        assert_eq!(AdapterFile::read(dir.path()).unwrap().notes.len(), notes, "{version}");
    }
}

#[test]
fn a_minimal_config_and_half_precision_are_enough() {
    let method = Method::new(LoraConfig { rslora: false, ..lora() });
    let dir = tempfile::tempdir().unwrap();
    let halves: Vec<(String, Tensor)> = tensors(&method)
        .into_iter()
        .map(|(name, t)| (format!("base_model.model.text_model.{name}"), t.to_kind(Kind::BFloat16)))
        .collect();
    tensor_file::write(&dir.path().join(WEIGHTS_FILE), &halves, &[]).unwrap();
    let minimal = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["to_q"]});
    std::fs::write(dir.path().join(CONFIG_FILE), minimal.to_string()).unwrap();
    let file = AdapterFile::read(dir.path()).unwrap();
    assert_eq!(file.layers.keys().collect::<Vec<_>>(), ["a.conv1", "a.to_q"]);
    assert_eq!(file.layers["a.to_q"].parameters()[0].1.kind(), Kind::Float);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn broken_files_are_errors_and_nothing_else(
        which in 0usize..11, config_at: prop::sample::Index, config_byte: u8, at: prop::sample::Index, byte: u8, cut: bool,
    ) {
        let method = methods().remove(which);
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &config(method.clone()), &tensors(&method));
        for (name, at, byte) in [(CONFIG_FILE, config_at, config_byte), (WEIGHTS_FILE, at, byte)] {
            let path = dir.path().join(name);
            let mut bytes = std::fs::read(&path).unwrap();
            let at = at.index(bytes.len().min(3000)); // mostly in the header
            if cut { bytes.truncate(at) } else { bytes[at] = byte }
            std::fs::write(&path, bytes).unwrap();
            // an adapter or an error
            if let Ok(file) = AdapterFile::read(dir.path()) {
                for adapter in file.layers.values() {
                    let _ = (adapter.check(&[5, 12]), adapter.check(&[6, 3, 2, 2]));
                }
            }
        }
    }
}
