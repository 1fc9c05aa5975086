#!/usr/bin/env python3
"""Whether two builds give the same results, to the last bit: for changes that must not change any.

    python3 tests/same_results.py OLD > old.txt        losses and hashes of what this build makes
    python3 tests/same_results.py NEW --against old.txt

Runs every method for a few steps and the verbs that make something (not `hra compare`, whose cells are such runs), on the embedded
model and one thread, and lists losses and gradient norms of each step, and a hash of every picture, weight file and table that was made. Lists hold on one machine: another processor rounds otherwise
(tools/run_tests.py), so none is stored. Standard library only.
"""

import argparse
import difflib
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
ASSETS = ROOT / "assets"
MODEL = ASSETS / "tiny-sd"

# What a record tells of the clock or the machine.
CLOCK = ("seconds", "memory", "time")

SUBJECT = [
    "train", "--pretrained_model_name_or_path", MODEL, "--instance_data_dir", ASSETS / "subjects/cat/train", "--instance_prompt",
    "a fluent 3d emoji of a sks cat face", "--with_prior_preservation", "--class_data_dir", ASSETS / "subjects/robot/train",
    "--class_prompt", "a fluent 3d emoji of a robot", "--learning_rate", "3e-3", "--max_train_steps", "4", "--train_batch_size", "2",
    "--log_every", "1",
]
CONTROL = [
    "train", "--pretrained_model_name_or_path", MODEL, "--train_data_dir", ASSETS / "control/train", "--resolution", "64",
    "--learning_rate", "1e-3", "--max_train_steps", "4", "--train_batch_size", "2", "--log_every", "1",
]
DRAW = ["sample", "--model", MODEL, "--prompt", "a fluent 3d emoji of a sks cat face", "--num-images", "3", "--steps", "4",
        "--guidance", "4", "--seed", "7"]
PICTURE = ASSETS / "subjects/cat/held_out/00.png"

METHODS = {
    "hra": ["--rank", "8"],
    "hra-lambda": ["--rank", "8", "--hra_lambda", "1e-3"],
    "hra-gs": ["--rank", "8", "--gram_schmidt"],
    "hra-peft": ["--rank", "4", "--hra_init", "peft", "--bias", "all"],
    "hra-conv": ["--rank", "4", "--target_modules", "to_q,to_k,to_v,to_out.0,net.0.proj,net.2,conv1,conv2"],
    "hra-text": ["--rank", "4", "--train_text_encoder", "--snr_gamma", "5", "--use_ema"],
    "lora": ["--method", "lora", "--rank", "4"],
    "rslora": ["--method", "lora", "--rank", "4", "--use_rslora", "--init_lora_weights", "kaiming"],
    "dora": ["--method", "dora", "--rank", "4"],
    "oft": ["--method", "oft", "--rank", "4"],
    "coft": ["--method", "coft", "--rank", "4", "--coft_eps", "1e-3"],
    "boft": ["--method", "boft", "--rank", "4"],
    "full": ["--method", "full", "--learning_rate", "1e-4"],
    "accumulated": ["--gradient_accumulation_steps", "2", "--lr_scheduler", "cosine", "--lr_warmup_steps", "2"],
    "previews": ["--validation_prompt", "a fluent 3d emoji of a sks cat face", "--num_validation_images", "2",
                 "--validation_inference_steps", "3", "--validation_steps", "2", "--checkpointing_steps", "2",
                 "--held_out_data_dir", ASSETS / "subjects/cat/held_out"],
}


def jobs():
    """Name and words of each command, in order; what one makes others use."""
    for name, words in METHODS.items():
        flags = {word for word in words if str(word).startswith("--")}
        start = SUBJECT if "--learning_rate" not in flags else without(SUBJECT, "--learning_rate")
        yield f"train-{name}", [*start, *words, "--output_dir", f"train-{name}"]
    yield "train-class", [*without(without(SUBJECT, "--class_data_dir"), "--class_prompt"), "--class_prompt", "a robot",
                          "--num_class_images", "3", "--class_steps", "2", "--sample_batch_size", "2", "--output_dir", "train-class"]
    yield "train-resumed", ["train", "--resume", "latest", "--output_dir", "train-previews", "--max_train_steps", "6"]
    yield "train-canny", [*CONTROL, "--condition", "canny", "--make_conditions", "--output_dir", "train-canny"]
    yield "train-maps", [*CONTROL, "--condition", "segmentation", "--palette", ASSETS / "control/palette.json", "--method", "lora",
                         "--rank", "4", "--output_dir", "train-maps"]
    schedulers = ("ddim", "pndm", "euler", "euler-a", "dpm++2m", "dpm++2m-karras", "heun", "unipc")
    for scheduler in schedulers:
        yield f"draw-{scheduler}", [*DRAW, "--scheduler", scheduler, "--save-latents", f"draw-{scheduler}.safetensors", "--output",
                                    f"draw-{scheduler}"]
    yield "draw-adapter", [*DRAW, "--adapter", "train-hra=0.7", "--with-base", "--batch-size", "2", "--output", "draw-adapter"]
    yield "draw-adapters", [*DRAW, "--adapter", "train-lora", "--adapter", "train-hra-text=-0.5", "--output", "draw-adapters"]
    yield "draw-image", [*DRAW, "--image", PICTURE, "--strength", "0.6", "--output", "draw-image"]
    yield "draw-control", [*DRAW, "--adapter", "train-canny", "--control", ASSETS / "control/held_out/0000.png", "--make-conditions",
                           "--control-scale", "0.8", "--output", "draw-control"]
    for form in ("peft", "peft-lora", "diffusers-lora", "kohya-lora", "merged", "checkpoint"):
        yield f"export-{form}", ["export", "--model", MODEL, "--adapter", "train-hra", "--to", form, "--output",
                                 f"export-{form}" + ("" if form in ("peft", "peft-lora", "merged") else ".safetensors")]
    for how in ("chain", "geodesic"):
        yield f"merge-{how}", ["merge", "train-hra=0.8", "train-hra-lambda=0.6", "--how", how, "--output", f"merge-{how}"]
    yield "inspect", ["inspect", "train-hra", "--model", MODEL, "--json"]
    yield "evaluate", ["evaluate", ASSETS / "subjects/robot/train", "--real", ASSETS / "subjects/robot/held_out", "--clip",
                       ASSETS / "tiny-clip", "--csv", "scores.csv"]
    yield "prepare", ["prepare", "canny", ASSETS / "subjects/cat/train", "--output", "prepared"]


def without(words, flag):
    at = words.index(flag)
    return words[:at] + words[at + 2:]


def run(binary, words, folder):
    environ = dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run([binary, *map(str, words)], cwd=folder, env=environ, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))}\nexit {done.returncode}\n{done.stderr}")
    return done.stdout


def losses(path):
    """A run's records without what depends on the clock."""
    for line in path.read_text().splitlines():
        record = json.loads(line)
        yield json.dumps({key: value for key, value in record.items() if not any(word in key for word in CLOCK)})


def listing(binary):
    with tempfile.TemporaryDirectory() as scratch:
        folder, seen = pathlib.Path(scratch), {}
        for name, words in jobs():
            printed = run(binary, words, folder)
            if words[0] == "inspect":
                yield f"{name} {hashlib.sha256(printed.encode()).hexdigest()}"
            for path in sorted(folder.rglob("*")):
                if not path.is_file():
                    continue
                stamp = (path.stat().st_mtime_ns, path.stat().st_size)
                if seen.get(path) == stamp:
                    continue
                seen[path] = stamp
                if path.name == "metrics.jsonl":
                    yield from (f"{path.relative_to(folder)} {line}" for line in losses(path))
                elif path.suffix in (".png", ".safetensors", ".csv", ".jsonl"):
                    yield f"{path.relative_to(folder)} {digest(path, scratch)}"


def digest(path, scratch):
    """SHA-256 of a file; of a PNG without the chunks that tell the path of its run."""
    data = path.read_bytes()
    if path.suffix == ".png":
        chunks, at = [], 8
        while at < len(data):
            end = at + 12 + int.from_bytes(data[at:at + 4], "big")
            chunks.append(data[at:end])
            at = end
        data = b"".join(chunk for chunk in chunks if scratch.encode() not in chunk)
    return hashlib.sha256(data).hexdigest()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("binary", type=pathlib.Path)
    parser.add_argument("--against", type=pathlib.Path, help="list of another build")
    options = parser.parse_args()
    lines = listing(options.binary.resolve())
    if not options.against:
        for line in lines:
            print(line, flush=True)
        return 0
    expected, found = options.against.read_text().splitlines(), list(lines)
    differ = [line for line in difflib.unified_diff(expected, found, n=0, lineterm="") if line[:3] not in ("---", "+++", "@@ ")]
    for line in differ:
        print(line)
    print(f"{len(expected)} lines before, {len(found)} now, {len(differ)} lines of difference")
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main())
