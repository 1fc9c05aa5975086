"""Part 4: pictures and scores of the device are those of the CPU, and a small comparison runs to its end."""

import json
import pathlib

from . import png
from .program import Program, SUBJECT_PROMPT, values_of, words_of
from .record import Error, Failure, Measured, Same

# Of the mean level of each picture, relative; and how many levels a pixel may be off on average.
LEVEL_LIMIT = 5e-3
PIXEL_LIMIT = 1.0
SCORE_LIMIT = 1e-3
WORKERS = {"cpu": 2, "cuda": 5}
PROMPT = "a fluent 3d emoji of a cat face"


def run(part):
    program = Program(part)
    steps = 2 if part.machine.dry else 8
    jobs = [(["the quick comparison's report", "the quick comparison's cells"], lambda: comparison(program))]
    try:
        jobs += [case_job(program, name, flags) for name, flags in cases(program, steps)]
    except Exception as error:
        part.check("the program's schedulers", error)
    jobs.append((["scores by CLIP"], lambda: scores(program)))
    part.jobs(jobs, WORKERS[part.device])


def cases(program, steps):
    """Name and flags of what is drawn on both devices."""
    usual = {"prompt": PROMPT, "num-images": 2, "steps": steps, "guidance": 4, "scheduler": "ddim"}
    for scheduler in values_of(program.help("sample"), "--scheduler"):
        yield f"scheduler {scheduler}", {**usual, "scheduler": scheduler}
    start = {"image": program.assets / "subjects/cat/held_out/00.png", "width": 64, "height": 64}
    yield "from a picture", {**usual, **start, "strength": 0.6}
    mask = program.folder / "mask.png"
    png.write(mask, 64, 64, (b"\xff" * 96 + b"\0" * 96) * 64)
    yield "inpainting", {**usual, **start, "mask": mask}
    adapters = [program.folder / f"{method}-cpu" for method in ("hra", "lora")]
    yield "two adapters", {**usual, "adapter": [f"{adapters[0]}=0.8", adapters[1]]}
    yield "control, one condition for a batch", {
        **usual, "adapter": program.folder / "control-cpu", "control": program.assets / "control/train/segmentation/0000.png",
        "batch-size": 2}
    yield "a batch of two prompts", {**usual, "prompt": [PROMPT, SUBJECT_PROMPT], "num-images": 3, "batch-size": 3}


def case_job(program, name, flags):
    def make():
        if "control" in flags:
            program.train("control", "cpu", train_data_dir=program.assets / "control/train", instance_data_dir=None,
                          instance_prompt=None, condition="segmentation", resolution=64, max_train_steps=2, learning_rate=1e-2)
        elif "adapter" in flags:
            for method in ("hra", "lora"):
                program.train(method, "cpu", method=method, max_train_steps=2, learning_rate=1e-2)
        folder = "".join(letter if letter.isalnum() else "-" for letter in name)
        # Pictures do not depend on the batch, which on the CPU is another one.
        _, here = draw(program, f"{folder}-beside", "cpu", {**flags, "batch-size": 1})
        device, there = draw(program, folder, program.part.device, flags)
        return [Measured(device, png.levels(there), png.levels(here), LEVEL_LIMIT),
                Error(device, png.difference(there, here), PIXEL_LIMIT)]

    return [f"{name}: mean level", f"{name}: mean difference of a pixel, in levels"], make


def draw(program, name, device, flags):
    """Draws; where it was drawn, and the pictures."""
    folder = program.folder / f"{name}-{device}"
    words = words_of({"model": program.assets / "tiny-sd", **flags, "device": device, "output": folder})
    report = program.json(["sample", *words])
    return said(report, device, "sample"), [pathlib.Path(picture["file"]) for picture in report["pictures"]]


def said(report, device, verb):
    """The device that a report names."""
    name = report.get("device")
    if name is None:
        raise Failure(f"hra {verb} --json does not say its device")
    if not name.startswith(device):
        raise Failure(f"computed on {name}, expected {device}")
    return name


def scores(program):
    """Scores of the same pictures on both devices."""
    found = []
    for device in ("cpu", program.part.device):
        report = program.json(["evaluate", program.assets / "subjects/cat/train", *words_of({
            "real": program.assets / "subjects/cat/held_out", "clip": program.assets / "tiny-clip", "prompt": PROMPT,
            "device": device})])
        found.append((said(report, device, "evaluate"), report["scores"]))
    (_, here), (device, there) = found
    if not here or sorted(here) != sorted(there):
        raise Failure(f"scores {sorted(there)}, expected {sorted(here)}")
    keys = sorted(here)
    return [Measured(device, [there[key] for key in keys], [here[key] for key in keys], SCORE_LIMIT)]


def comparison(program):
    """A comparison of one method and the base model: it ends, its report is there, its cells were on the device."""
    folder = program.folder / "comparison"
    config = program.folder / "comparison.toml"
    config.write_text(comparison_config(program, folder), encoding="utf-8")
    program.ok(["compare", config])
    cells = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("cells/*/record.json"))]
    devices = sorted({cell["environment"]["device"] for cell in cells})
    if len(devices) != 1:
        raise Failure(f"computed on {devices}")
    return [Same(devices[0], (folder / "report.html").is_file(), True), Same(devices[0], len(cells), 2)]


def comparison_config(program, folder):
    """configs/compare-quick.toml at its smallest."""
    assets, quote = program.assets, json.dumps
    steps, drawn = (2, 2) if program.machine.dry else (20, 8)
    return f"""title = "gpu_check"
output_dir = {quote(str(folder))}
seeds = [0]
jobs = 2

[train]
device = {quote(program.part.device)}
threads = 1

[train.model]
pretrained_model_name_or_path = {quote(str(assets / "tiny-sd"))}

[train.data]
resolution = 64

[train.schedule]
max_train_steps = {steps}
train_batch_size = 2

[draw]
prompts = ["a fluent 3d emoji of a {{subject}}"]
drift_prompts = ["a fluent 3d emoji of a red apple"]
num_images = 2
num_drift_images = 1
scheduler = "dpm++2m"
steps = {drawn}
guidance = 4.0

[scores]
clip = {quote(str(assets / "tiny-clip"))}

[[subject]]
name = "cat"
class = "cat face"
data_dir = {quote(str(assets / "subjects/cat/train"))}
test_data_dir = {quote(str(assets / "subjects/cat/held_out"))}
instance_prompt = "a fluent 3d emoji of a {{subject}}"

[[method]]
label = "HRA r 4"
adapter = {{ method = "hra", rank = 4 }}
optimizer = {{ learning_rate = 1e-3 }}
"""
