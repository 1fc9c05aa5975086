"""What trainings changed, by a comparison's records, worked out anew by numpy from the base model's and the merged weights."""

import json

import cases
import numpy as np
import pytest
from safetensors.torch import load_file

CONFIG = """
title = "changes"
output_dir = "OUT"
[train]
threads = 1
[train.model]
pretrained_model_name_or_path = "ASSETS/tiny-sd"
[train.schedule]
max_train_steps = 6
[draw]
prompts = ["a {subject}"]
num_images = 1
scheduler = "ddim"
steps = 1
guidance = 1.0
[scores]
clip = "ASSETS/tiny-clip"
[[subject]]
name = "cat"
class = "cat face"
data_dir = "ASSETS/subjects/cat/train"
test_data_dir = "ASSETS/subjects/cat/held_out"
instance_prompt = "a {subject}"
[[method]]
label = "HRA"
adapter = { method = "hra", rank = 8 }
optimizer = { learning_rate = 3e-2 }
[[method]]
label = "LoRA"
adapter = { method = "lora", rank = 4 }
optimizer = { learning_rate = 1e-1 }
[[method]]
label = "OFT"
adapter = { method = "oft", rank = 4 }
optimizer = { learning_rate = 3e-2 }
[[method]]
label = "DoRA"
adapter = { method = "dora", rank = 4 }
optimizer = { learning_rate = 1e-1 }
[[method]]
label = "full"
adapter = { method = "full" }
optimizer = { learning_rate = 3e-3 }
"""


@pytest.fixture(scope="module")
def compared(hra, tmp_path_factory):
    folder = tmp_path_factory.mktemp("changes")
    text = CONFIG.replace("OUT", str(folder / "out")).replace("ASSETS", str(cases.REPO / "assets"))
    (folder / "c.toml").write_text(text)
    hra("compare", folder / "c.toml")
    return folder


def unet(model):
    weights = load_file(model / "unet/diffusion_pytorch_model.safetensors")
    return {name: weight.double().flatten(1).numpy() for name, weight in weights.items() if weight.ndim > 1}


def measured(base, tuned):
    """angle, singular values moved, intruders, leading vectors of one weight."""
    cosine = (base * tuned).sum(1) / np.linalg.norm(base, axis=1) / np.linalg.norm(tuned, axis=1)
    left, old, _ = np.linalg.svd(base, full_matrices=False)
    new_left, new, _ = np.linalg.svd(tuned, full_matrices=False)
    leading = new_left[:, :10]
    intruders = (np.abs(left.T @ leading).max(axis=0) < 0.5).sum()
    angle = np.degrees(np.arccos(np.clip(cosine, -1, 1))).mean()
    return angle, np.linalg.norm(new - old) / np.linalg.norm(old), intruders, leading.shape[1]


@pytest.mark.parametrize("label", ["HRA", "LoRA", "OFT", "DoRA", "full"])
def test_changes_are_numpys(compared, hra, tmp_path, label):
    base = unet(cases.tiny_sd())
    records = [json.loads(path.read_text()) for path in compared.glob("out/cells/*/record.json")]
    record = next(record for record in records if record["cell"]["method"] == label)
    run = compared / "out/cells" / record["cell"]["id"] / "run"
    hra("export", "--model", cases.tiny_sd(), "--adapter", run, "--to", "merged", "--dtype", "f32",
        "--output", tmp_path / "merged")
    tuned = unet(tmp_path / "merged")
    names = [name for name in base if any(name.endswith(f".{target}.weight") for target in cases.ATTENTION)]
    found = np.array([measured(base[name], tuned[name]) for name in names])
    told = record["changes"]
    assert (told["layers"], told["intruders"], told["leading"]) == (len(names), found[:, 2].sum(), found[:, 3].sum())
    # Merged weights are rounded to f32.
    assert told["angle"] == pytest.approx(found[:, 0].mean(), rel=1e-4)
    assert told["singular_values"] == pytest.approx(found[:, 1].mean(), rel=1e-4, abs=1e-6)
    assert told["angle"] > 0.5, "the training moved something"
    if label in ("HRA", "OFT"):
        assert told["singular_values"] < 1e-6 and told["intruders"] == 0
