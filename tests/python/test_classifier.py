"""The model as a classifier: the errors of classifier.csv, by a loop over diffusers' own parts with the same noise."""

import csv
import json

import cases
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

CLASSES = ["screwdriver", "a telephone, noto emoji", "a twemoji emoji of a sloth"]
NOISES, SEED = 5, 7
CONFIG = """
title = "classifier"
output_dir = "OUT"
[train]
threads = 1
[train.model]
pretrained_model_name_or_path = "ASSETS/tiny-sd"
prediction = "PREDICTION"
[train.schedule]
max_train_steps = 4
[draw]
prompts = ["a fluent 3d emoji of a {subject}"]
num_images = 1
scheduler = "ddim"
steps = 2
seed = SEED
[scores]
clip = "ASSETS/tiny-clip"
[classifier]
data_dir = "ASSETS/control/held_out"
prompts = CLASSES
num_noises = NOISES
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
"""


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def compared(hra, tmp_path_factory, request):
    """What the model predicts, the folder of the comparison, and the rows of classifier.csv."""
    out = tmp_path_factory.mktemp("classifier") / "out"
    words = {"PREDICTION": request.param, "CLASSES": json.dumps(CLASSES), "NOISES": str(NOISES), "SEED": str(SEED),
             "OUT": str(out), "ASSETS": str(cases.REPO / "assets")}
    text = CONFIG
    for word, value in words.items():
        text = text.replace(word, value)
    (out.parent / "c.toml").write_text(text)
    hra("compare", out.parent / "c.toml")
    with open(out / "classifier.csv", newline="") as file:
        return request.param, out, list(csv.DictReader(file))


def errors(pipe, prediction, picture, noise, timesteps):
    """Mean squared error of each class, one call of the UNet for each class and timestep."""
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type=prediction)
    pixels = torch.from_numpy(np.array(Image.open(picture).convert("RGB"))).float().permute(2, 0, 1)[None]
    latents = pipe.vae.encode(pixels / 127.5 - 1).latent_dist.mean * pipe.vae.config.scaling_factor
    found = []
    for prompt in CLASSES:
        ids = pipe.tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
        states = pipe.text_encoder(ids)[0]
        of_class = []
        for own, timestep in zip(noise, timesteps):
            time = torch.tensor([timestep])
            noisy = scheduler.add_noise(latents, own[None], time)
            target = own[None] if prediction == "epsilon" else scheduler.get_velocity(latents, own[None], time)
            answer = pipe.unet(noisy, time, encoder_hidden_states=states).sample
            of_class.append(torch.nn.functional.mse_loss(answer, target).item())
        found.append(np.mean(of_class))
    return found


@torch.no_grad()
def test_errors_are_those_of_a_loop_in_diffusers(compared):
    prediction, out, rows = compared
    # As in the code of arXiv:2303.16203: the middles of equal parts of the schedule.
    timesteps = list(range(1000 // NOISES // 2, 1000, 1000 // NOISES))[:NOISES]
    noise = torch.randn((NOISES, 4, 16, 16), generator=torch.Generator("cpu").manual_seed(SEED))
    pictures = list(dict.fromkeys(row["picture"] for row in rows))
    assert len(pictures) == len(CLASSES)
    (trained,) = (out / "cells").glob("hra-*")
    answers = {}
    for method, adapter in [("base", None), ("HRA", trained / "run")]:
        pipe = cases.load(cases.tiny_sd())
        if adapter:
            cases.with_adapter(pipe, adapter)
        for picture in pictures:
            own = [row for row in rows if (row["method"], row["picture"]) == (method, picture)]
            assert [row["class"] for row in own] == CLASSES
            ours = torch.tensor([float(row["error"]) for row in own])
            theirs = torch.tensor(errors(pipe, prediction, out / picture, noise, timesteps))
            assert float(((ours - theirs) / theirs).abs().max()) < 1e-5, (method, picture)
            answers[method, picture] = theirs
    far = [cases.relative(answers["HRA", picture], answers["base", picture]) for picture in pictures]
    assert min(far) > 1e-3, "what was trained is seen"


def test_accuracy_is_that_of_the_least_errors(compared):
    _, out, rows = compared
    told = json.loads((out / "report.json").read_text())["classifier"]
    for row in told["rows"]:
        own = [r for r in rows if r["method"] == row["label"]]
        table = np.array([float(r["error"]) for r in own]).reshape(-1, len(CLASSES))
        right = [CLASSES.index(r["caption"]) for r in own[:: len(CLASSES)]] == table.argmin(axis=1)
        (point,) = row["scales"]
        assert point["accuracy"] == pytest.approx(np.mean(right), abs=1e-12)
