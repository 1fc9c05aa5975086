//! Words that users of other trainers know: underscores in flags, and flags of diffusers' DreamBooth scripts that this
//! program does not need or does not have.

use crate::error::{Error, Result};
use std::ffi::OsString;
use std::hash::{BuildHasher, RandomState};

/// Flags of diffusers' and PEFT's scripts without an effect on the result here, and whether a value follows. They are
/// passed over with a note.
const NOT_NEEDED: [(&str, bool); 23] = [
    ("--report-to", true),
    ("--logging-dir", true),
    ("--dataloader-num-workers", true),
    ("--num-dataloader-workers", true),
    ("--local-rank", true),
    ("--variant", true),
    ("--tokenizer-name", true),
    ("--tokenizer-max-length", true),
    ("--prior-generation-precision", true),
    ("--wandb-key", true),
    ("--wandb-project-name", true),
    ("--wandb-run-name", true),
    ("--hub-token", true),
    ("--hub-model-id", true),
    ("--use-8bit-adam", false),
    ("--gradient-checkpointing", false),
    ("--allow-tf32", false),
    ("--set-grads-to-none", false),
    ("--enable-xformers-memory-efficient-attention", false),
    ("--pre-compute-text-embeddings", false),
    ("--skip-save-text-encoder", false),
    ("--no-tracemalloc", false),
    ("--use-hra", false),
];

/// Flags of diffusers' scripts that would change the result, and what to do instead.
const NOT_THERE: [(&str, &str); 10] = [
    ("--revision", "write it behind the hub id: owner/name@revision"),
    ("--scale-lr", "give the learning rate that you want"),
    ("--num-train-epochs", "give --max-train-steps"),
    ("--validation-epochs", "give --validation-steps"),
    ("--validation-images", "previews are drawn from prompts"),
    ("--push-to-hub", "nothing is uploaded"),
    ("--offset-noise", "the noise is the model's own"),
    ("--with-offset-noise", "the noise is the model's own"),
    ("--reg-data-dir", "give --class-data-dir and --with-prior-preservation"),
    ("--network-module", "give --method lora, or another of hra's methods"),
];

/// A seed that nobody chose. Others' programs know 32 bits.
fn drawn_seed() -> u32 {
    // Keyed by the system's randomness, anew in each process.
    RandomState::new().hash_one(std::process::id()) as u32
}

/// Writes long flags with hyphens, draws a seed where -1 asks for one, and takes out those that are not needed, with a note.
pub fn normalise(args: Vec<OsString>) -> Result<Vec<OsString>> {
    let mut result = Vec::new();
    // As in the reference, steps win over epochs.
    let has_steps =
        args.iter().any(|a| a.to_string_lossy().replace('_', "-").starts_with("--max-train-steps"));
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let Some(text) = arg.to_str().filter(|t| t.starts_with("--") && t.len() > 2) else {
            let rest = arg == "--";
            result.push(arg);
            if rest {
                result.extend(args);
                break;
            }
            continue;
        };
        let (name, value) = text.split_once('=').map_or((text, None), |(n, v)| (n, Some(v)));
        let name = name.replace('_', "-");
        let not_needed = NOT_NEEDED.iter().find(|(flag, _)| *flag == name).copied();
        let epochs = (has_steps && name == "--num-train-epochs").then_some(("", true));
        if let Some((_, takes_value)) = not_needed.or(epochs) {
            eprintln!("note: {name} has no effect here");
            if takes_value && value.is_none() {
                args.next();
            }
            continue;
        }
        if let Some((_, instead)) = NOT_THERE.iter().find(|(flag, _)| *flag == name) {
            return Err(Error::config(format!("{name} is not supported: {instead}")));
        }
        if name == "--seed" && value.or_else(|| args.as_slice().first()?.to_str()) == Some("-1") {
            if value.is_none() {
                args.next();
            }
            let seed = drawn_seed();
            eprintln!("note: --seed -1: seed {seed} was drawn; give it to get the same again");
            result.push(format!("--seed={seed}").into());
            continue;
        }
        result.push(value.map_or_else(|| name.clone(), |v| format!("{name}={v}")).into());
    }
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(args: &[&str]) -> Result<Vec<String>> {
        let args = args.iter().map(OsString::from).collect();
        Ok(normalise(args)?.into_iter().map(|a| a.into_string().unwrap()).collect())
    }

    #[test]
    fn underscores_in_flags_become_hyphens_and_values_stay() {
        let given = ["hra", "--instance_prompt", "a_b --c_d", "--learning_rate=1e_4", "--", "--a_b"];
        assert_eq!(
            words(&given).unwrap(),
            ["hra", "--instance-prompt", "a_b --c_d", "--learning-rate=1e_4", "--", "--a_b"]
        );
    }

    #[test]
    fn flags_that_are_not_needed_go_with_their_value() {
        assert_eq!(
            words(&["hra", "--report_to", "wandb", "--allow_tf32", "--seed", "1"]).unwrap(),
            ["hra", "--seed", "1"]
        );
        let epochs = ["hra", "--num_train_epochs", "3", "--max_train_steps=5"];
        assert_eq!(words(&epochs).unwrap(), ["hra", "--max-train-steps=5"]);
        assert!(words(&epochs[..3]).is_err());
        assert!(words(&["hra", "--push_to_hub"]).unwrap_err().to_string().contains("nothing is uploaded"));
    }
}
