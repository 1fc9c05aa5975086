"""Train and sample with `hra`, and score by the embedded model's card, beside what Python's PEFT reached.

The flags are acceptance 4's: rank 8, learning rate 3e-3, 300 steps of 2, 48 class pictures, 64 px. Sampling: 30 DDIM
steps, guidance 4, seed 1000, 4 pictures for each of the 8 prompts of a subject and for the 4 drift prompts, which the
base model draws from the same noise. Prints a table of means and spreads over the seeds, and with --baseline whether the
means are within the bounds: CLIP-I at most 0.02 below, background at most 0.05 below, drift at most 1.15 times.

Usage: quality.py --assets DIR --out DIR [--hra BIN] [--subjects cat="cat face" robot=robot] [--seeds 0 1 2]
                  [--train-flags "..."] [--baseline baseline.jsonl]
"""

import argparse
import json
import os
import pathlib
import shlex
import statistics
import subprocess
import time

import measure

SEED = 1000
KEYS = ["clip_i", "background", "drift"]


def call(*words):
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(map(str, words))}\nexit {done.returncode}\n{done.stderr}")


def draw(args, texts, output, *words):
    prompts = [word for text in texts for word in ("--prompt", text)]
    call(args.hra, "sample", "--model", args.assets / "model", *prompts, "--negative-prompt", "", "--scheduler", "ddim",
         "--steps", measure.STEPS, "--guidance", measure.GUIDANCE, "--height", 64, "--width", 64, "--seed", SEED,
         "--num-images", measure.IMAGES, "--batch-size", 8, "--output", output, *words)
    return measure.read(output)


def run(args, subject, class_name, seed):
    source = pathlib.Path(subject) if pathlib.Path(subject, "train").is_dir() else args.assets / "subjects" / subject
    folder = args.out / f"{source.name}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    call(args.hra, "train", "--pretrained_model_name_or_path", args.assets / "model",
         "--instance_data_dir", source / "train", "--instance_prompt", f"a fluent 3d emoji of a sks {class_name}",
         "--with_prior_preservation", "--class_prompt", f"a fluent 3d emoji of a {class_name}",
         "--num_class_images", 48, "--method", "hra", "--rank", 8, "--learning_rate", 3e-3, "--train_batch_size", 2,
         "--resolution", 64, "--max_train_steps", 300, "--seed", seed, "--output_dir", folder / "run",
         *shlex.split(args.train_flags))
    line = {"subject": source.name, "seed": seed, "train_s": round(time.monotonic() - start, 1)}
    adapter = ["--adapter", folder / "run"]
    line |= measure.score(args.assets, source, class_name,
                          draw(args, measure.prompts(class_name)[0], folder / "subject", *adapter))
    base = draw(args, measure.DRIFT_PROMPTS, folder / "base")
    line["drift"] = measure.drift(draw(args, measure.DRIFT_PROMPTS, folder / "drift", *adapter), base)
    return line


def summary(lines):
    """subject -> key -> (mean, standard deviation)"""
    table = {}
    for subject in sorted({line["subject"] for line in lines}):
        rows = [line for line in lines if line["subject"] == subject]
        table[subject] = {
            key: (statistics.mean(r[key] for r in rows), statistics.pstdev([r[key] for r in rows])) for key in KEYS}
    return table


def show(title, table):
    for subject, row in table.items():
        print(f"{title:8} {subject:12} " + "  ".join(f"{k} {row[k][0]:.3f} +- {row[k][1]:.3f}" for k in KEYS))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=pathlib.Path, required=True, help="folder with model/, clip/ and subjects/")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--hra", default=os.environ.get("HRA_BIN", "target/release/hra"))
    parser.add_argument("--subjects", nargs="+", default=["cat=cat face", "robot=robot"], metavar="NAME_OR_DIR=CLASS")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--train-flags", default="", help="more flags for `hra train`")
    parser.add_argument("--baseline", type=pathlib.Path, help="peft_baseline.py's baseline.jsonl")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    lines = []
    for seed in args.seeds:
        for subject in args.subjects:
            name, class_name = subject.split("=", 1)
            lines.append(run(args, name, class_name, seed))
            print(json.dumps(lines[-1]), flush=True)
            with open(args.out / "quality.jsonl", "a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
    ours = summary(lines)
    show("hra", ours)
    if args.baseline:
        rows = [json.loads(line) for line in args.baseline.read_text().splitlines()]
        theirs = summary([row for row in rows if row["method"] == "hra" and row["subject"] in ours])
        show("peft", theirs)
        for subject, row in theirs.items():
            own = {key: ours[subject][key][0] for key in KEYS}
            within = (own["clip_i"] >= row["clip_i"][0] - 0.02 and own["background"] >= row["background"][0] - 0.05
                      and own["drift"] <= row["drift"][0] * 1.15)
            print(f"{subject}: {'within' if within else 'OUTSIDE'} the bounds")


if __name__ == "__main__":
    main()
