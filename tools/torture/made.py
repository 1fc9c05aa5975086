"""Files that the program itself writes and reads again, and the recipes that damage them."""

import shutil

from kills import comparison
from recipes import PROMPT, Recipe


def material(program, root, made):
    """Fills the folder `made`: a checkpoint file, a run, a comparison, latents, class pictures, tables."""
    fixtures, case = root / "tests/fixtures", root / "tests/fixtures/cases/sd15"
    made.mkdir(parents=True)

    def run(*words):
        done = program.run([str(word) for word in words], made, 300)
        if done.code != 0:
            raise SystemExit(f"torture: {words}: {done.err}")

    model = case / "pipeline"
    run("export", "--model", model, "--adapter", case / "hra-r4", "--to", "checkpoint", "--output", "m.safetensors")
    run("sample", "--model", model, *PROMPT[:-1], "pictures", "--save-latents", "latents.safetensors", "--num-images", "2")
    shutil.copytree(root / "assets/subjects/cat/train", made / "cat")
    run("train", "--model", model, "--instance_data_dir", "cat", "--instance_prompt", "a cat", "--resolution", "16", "--use_ema", "--rank",
        "2", "--max_train_steps", "2", "--checkpointing_steps", "1", "--log_every", "1", "--with_prior_preservation", "--class_prompt", "a cat",
        "--num_class_images", "2", "--class_steps", "1", "--class_data_dir", "class", "--train_batch_size", "1", "--output_dir", "run")
    text = comparison(root).replace(str(root / "assets/tiny-sd"), str(model)).replace("resolution = 64", "resolution = 16")
    text = text.replace("max_train_steps = 4", "max_train_steps = 2").replace("[train.checkpoints]\ncheckpointing_steps = 2", "")
    (made / "compare.toml").write_text(text, encoding="utf-8")
    run("compare", "compare.toml")
    pairs = made / "pairs"
    pairs.mkdir()
    for name, source in (("a.png", "rgba.png"), ("b.jpg", "subsampled.jpg"), ("c.webp", "rgb.webp")):
        shutil.copy2(fixtures / "images" / source, pairs / name)
    rows = [("a.png", "a red, small bird"), ("b.jpg", 'of "it"'), ("c.webp", "\u00e9t\u00e9")]
    for style in ("json", "csv"):
        shutil.copytree(pairs, made / f"pairs-{style}")
    with open(made / "pairs-json/metadata.jsonl", "w", encoding="utf-8") as file:
        file.writelines(f'{{"file_name": "{name}", "text": "{text}"}}\n' for name, text in rows if '"' not in text)
    with open(made / "pairs-csv/metadata.csv", "w", encoding="utf-8") as file:
        file.write("file_name,text\n" + "".join('{},"{}"\n'.format(name, text.replace('"', '""')) for name, text in rows))
    (made / "points").mkdir()
    (made / "points/a.pts").write_text("version: 1\nn_points: 2\n{\n102.5 103\n130 141.25\n}\n", encoding="utf-8")
    (made / "points/b.json").write_text('{"image": "b.png", "landmarks": [[101.5, 102.0], [130, 110.25]]}', encoding="utf-8")
    (made / "faces").mkdir()
    for name in ("a.png", "b.png"):
        shutil.copy2(root / "assets/subjects/cat/train/00.png", made / "faces" / name)
    (made / "prompts.txt").write_text("# words\na cat\n\na red, small bird\n", encoding="utf-8")
    (made / "colours-4.json").write_text("[[3, 252, 9], [2, 253, 6], [1, 254, 3], [0, 255, 0]]", encoding="utf-8")
    (made / "classes.json").write_text(str([[i, 255 - i, 3 * i % 256] for i in range(256)]), encoding="utf-8")
    shutil.copytree(made / "pictures", made / "captioned")
    for name in ("0000-0000", "0000-0001"):
        (made / f"captioned/{name}.txt").write_text("a photo of a cat\n", encoding="utf-8")
    shutil.copytree(case / "hra-r4", made / "controlled")
    shutil.copytree(case / "control_encoder", made / "controlled/control_encoder")


def made_recipes(root, made):
    """Those whose files are in `made`, the folder of [`material`]."""
    fixtures, case = root / "tests/fixtures", root / "tests/fixtures/cases/sd15"
    model, controlnet, images = case / "pipeline", case / "controlnet", fixtures / "images"
    sample, found = ["sample", "--model", model], []
    add = lambda *words, **more: found.append(Recipe(*words, **more))
    at = {"m.safetensors": made / "m.safetensors"}
    add("checkpoint-inspect", 6, at, ["inspect", "in/m.safetensors", "--json"])
    add("checkpoint-sample", 5, at, ["sample", "--model", "in/m.safetensors", *PROMPT])
    add("comparison-config", 10, {"c.toml": made / "compare.toml"}, ["compare", "in/c.toml", "--dry-run", "--json"], may_take_long=True)
    for style in ("json", "csv"):
        add("table", 4, {"p": made / f"pairs-{style}"}, ["prepare", "canny", "in/p", "--output", "out"], damaged=("p/metadata",))
        pairs = ["--pairs", "in/p", "--condition", "canny", "--make-conditions", *PROMPT[2:]]
        add("pairs", 4, {"p": made / f"pairs-{style}"}, [*sample, "--controlnet", controlnet, *pairs])
    for name, palette in (("grey8-256.png", "classes"), ("palette4-16.png", "classes"), ("colours-4.png", "colours-4")):
        add("label-map", 2, {f"p/{name}": fixtures / "conditions" / name, "palette.json": made / f"{palette}.json"},
            ["prepare", "segmentation", "in/p", "--palette", "in/palette.json", "--output", "out"])
    add("points", 4, {"p": made / "points"}, ["prepare", "landmarks", "in/p", "--pictures", made / "faces", "--resolution", "32", "--output", "out"])
    add("prompt-file", 4, {"p.txt": made / "prompts.txt"}, [*sample, "--prompt-file", "in/p.txt", *PROMPT[2:]], may_take_long=True)
    clip = fixtures / "towers/clip"
    add("captions", 4, {"p": made / "captioned"}, ["evaluate", "in/p", "--clip", clip, "--json"])
    add("tower-clip", 4, {"t": clip}, ["evaluate", made / "captioned", "--clip", "in/t", "--json"])
    for name in ("dino", "dinov2"):
        add("tower-vit", 2, {"t": fixtures / "towers" / name},
            ["evaluate", made / "pictures", "--real", made / "cat", f"--{name}", "in/t", "--json"])
    resume = ["train", "--resume", "latest", "--output_dir", "in/run", "--max_train_steps", "3"]
    for part, weight in (("checkpoints/step-000002", 6), ("config.toml", 2), ("metrics.jsonl", 3), ("", 1)):
        add("resume", weight, {"run": made / "run"}, resume, damaged=(f"run/{part}",), own=("run",), may_take_long=part != "metrics.jsonl")
    train = ["train", "--model", model, "--instance_prompt", "a cat", "--resolution", "16", "--rank", "2", "--max_train_steps", "1",
             "--train_batch_size", "1", "--output_dir", "out"]
    prior = ["--with_prior_preservation", "--class_prompt", "a cat", "--num_class_images", "2", "--class_steps", "1", "--class_data_dir",
             "in/class", "--instance_data_dir", made / "cat"]
    add("class-images", 5, {"class": made / "class"}, [*train, *prior], own=("class",))
    add("instance-pictures", 4, {"p": made / "pairs"}, [*train, "--instance_data_dir", "in/p"])
    for part, weight in (("plan.json", 4), ("cells", 6), ("", 1)):
        add("report", weight, {"cmp": made / "cmp"}, ["compare", "report", "in/cmp", "--json"], damaged=(f"cmp/{part}",), own=("cmp",))
    cell = next(path.name for path in sorted((made / "cmp/cells").iterdir()) if path.name.startswith("base"))
    add("task", 4, {"cmp": made / "cmp"}, ["compare", "cell", "in/cmp", cell], damaged=(f"cmp/cells/{cell}/task.json",), own=("cmp",),
        may_take_long=True)
    control = [*sample, "--control", images / "rgba.png", "--condition", "other", *PROMPT]
    add("control-encoder", 5, {"a": made / "controlled"}, [*control, "--adapter", "in/a"], damaged=("a/control_encoder",))
    add("latents", 5, {"l.safetensors": made / "latents.safetensors"}, [*sample, "--latents", "in/l.safetensors", *PROMPT])
    return found
