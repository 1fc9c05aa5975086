"""`hra sample` against diffusers 0.42.1 on folders that are made here: latents, seeds, pixels, batches.

Schedulers are made from the folder's config by docs/schedulers.md. Both sides start from the same unit noise; the final latents, before
the VAE and not divided by its scaling factor, agree within 1e-4 (norm of the difference over norm of the reference) after
12 steps at guidance 5. f32 against f64 in Python alone gives up to 5e-5 for the clipped DDIM of sd15, 1e-6 for the rest.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import cases
from cases import CASES, SCHEDULERS

PROMPT, NEGATIVE = "an owl's nest, 2 RED hearts!! on a blue background", "a red apple!"
BY_NAME = {case.name: case for case in CASES}
# Every case meets every scheduler with and without an adapter; which adapter goes with the case.
PARTNER = dict(zip(BY_NAME, ["r2", "r4-conv", "r8-bias", "r4-gs", "r8", "r4"], strict=True))


def run(hra, model, out, case, *words):
    """Sample with the binary; returns the latents it saved."""
    hra("sample", "--model", model, "--prompt", PROMPT, "--negative-prompt", NEGATIVE, "--guidance", 5,
        "--height", case.height, "--width", case.width, "--save-latents", out / "out.safetensors",
        "--output", out / "pictures", *words)
    return load_file(out / "out.safetensors")["latents"]


def python(case, model, scheduler, adapters=(), **words):
    """The same in diffusers. `adapters`: (folder, part of the pipeline)."""
    pipe = cases.load(model, case.variant)
    for folder, part in adapters:
        cases.with_adapter(pipe, folder, part)
    return cases.sample(pipe, scheduler, PROMPT, NEGATIVE, height=case.height, width=case.width, **words)


def both(hra, out, case, model, scheduler, adapters=()):
    """Relative error of the binary's latents, from noise and step noise that both are given."""
    noise = cases.unit_noise(case, seed=case.seed + 1)
    save_file({"latents": noise}, out / "noise.safetensors")
    words = ["--scheduler", scheduler, "--steps", 12, "--latents", out / "noise.safetensors"]
    for folder, _ in adapters:
        words += ["--adapter", folder]
    step_noise = None
    if scheduler == "euler-a":
        step_noise = torch.randn((12, *noise.shape), generator=torch.Generator().manual_seed(case.seed + 2))
        save_file({"noise": step_noise}, out / "step.safetensors")
        words += ["--step-noise", out / "step.safetensors"]
    found = run(hra, model, out, case, *words)
    reference = python(case, model, scheduler, adapters, noise=noise, step_noise=step_noise)
    assert found.shape == reference.shape and found.dtype == torch.float32
    return cases.relative(found, reference)


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "hra"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", BY_NAME)
def test_every_scheduler_gives_pythons_latents(hra, folder, adapter, tmp_path, name, scheduler, adapted):
    case = BY_NAME[name]
    adapters = [(adapter(case, PARTNER[name]), "unet")] if adapted else []
    assert both(hra, tmp_path, case, folder(case), scheduler, adapters) <= 1e-4


@pytest.mark.parametrize("kind", [name for name in cases.ADAPTERS if not name.startswith("text")])
@pytest.mark.parametrize("name", ["sd15-a", "sd21-a"])
def test_every_kind_of_hra_file_gives_pythons_latents(hra, folder, adapter, tmp_path, name, kind):
    case = BY_NAME[name]
    assert both(hra, tmp_path, case, folder(case), "pndm", [(adapter(case, kind), "unet")]) <= 1e-4


@pytest.mark.parametrize("name", ["sd15-a", "sd21-a"])
def test_an_adapter_of_the_text_encoder_gives_pythons_latents(hra, folder, adapter, tmp_path, name):
    case = BY_NAME[name]
    adapters = [(adapter(case, "r4"), "unet"), (adapter(case, "text-r4"), "text_encoder")]
    assert both(hra, tmp_path, case, folder(case), "pndm", adapters) <= 1e-4


@pytest.mark.parametrize("scheduler", ["pndm", "euler-a"])
@pytest.mark.parametrize("name", ["sd15-b", "sd21-a"])
def test_image_i_of_a_seed_is_pythons_image_of_seed_plus_i(hra, folder, tmp_path, name, scheduler):
    """Latents first, then an ancestral sampler's noise, from one CPU generator for each image."""
    case = BY_NAME[name]
    found = run(hra, folder(case), tmp_path, case,
                "--scheduler", scheduler, "--steps", 12, "--seed", 40, "--num-images", 3, "--batch-size", 2)
    assert found.shape == case.latent_shape(3)
    for i in range(3):
        reference = python(case, folder(case), scheduler, generator=torch.Generator("cpu").manual_seed(40 + i))
        assert cases.relative(found[i:i + 1], reference) <= 1e-4


@pytest.mark.parametrize("scheduler", ["unipc", "euler-a"])
def test_one_seed_gives_one_image_whatever_the_batch(hra, folder, adapter, tmp_path, scheduler):
    case = BY_NAME["sd21-b"]
    found, pictures = [], []
    for batch in (1, 3):
        out = tmp_path / str(batch)
        out.mkdir()
        found.append(run(hra, folder(case), out, case, "--adapter", adapter(case, "r8"), "--scheduler", scheduler,
                         "--steps", 12, "--seed", 7, "--num-images", 3, "--batch-size", batch))
        pictures.append(read(out / "pictures"))
    assert cases.relative(found[1], found[0]) <= 1e-5
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert cases.relative(found[0][1], found[0][0]) > 0.1, "two images of one prompt are different images"


def read(folder):
    """(n, h, w, 3) of the pictures in order of their names, without the grid."""
    files = sorted(f for f in folder.glob("*.png") if f.name != "grid.png")
    return np.stack([np.asarray(Image.open(f).convert("RGB"), np.int64) for f in files])


@pytest.mark.parametrize("name", BY_NAME)
def test_the_pictures_are_the_latents_through_pythons_vae(hra, folder, tmp_path, name):
    case = BY_NAME[name]
    latents = run(hra, folder(case), tmp_path, case, "--scheduler", "ddim", "--steps", 3, "--num-images", 2, "--seed", 3)
    pipe = cases.load(folder(case), case.variant)
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    expected = (((decoded / 2 + 0.5).clamp(0, 1) * 255).round()).permute(0, 2, 3, 1).numpy()
    found = read(tmp_path / "pictures")
    assert found.shape == (2, case.height, case.width, 3)
    assert np.abs(found - expected).max() <= 1
    assert (tmp_path / "pictures" / "grid.png").is_file()


def test_pictures_sort_by_prompt_and_then_by_image_and_hold_their_settings(hra, folder, tmp_path):
    """Eleven prompts (so that 10 must not sort before 2): each alone gives what it gave among the others."""
    case = BY_NAME["sd21-c"]
    texts = [f"a red apple and {n} owls" for n in range(11)]
    words = ["--height", case.height, "--width", case.width, "--steps", 2, "--scheduler", "ddim", "--guidance", 5,
             "--num-images", 2, "--seed", 9]
    many = [word for text in texts for word in ("--prompt", text)]
    hra("sample", "--model", folder(case), *many, *words, "--output", tmp_path / "all")
    found = read(tmp_path / "all")
    assert len(found) == 22
    for i in (0, 2, 10):
        hra("sample", "--model", folder(case), "--prompt", texts[i], *words, "--output", tmp_path / f"one-{i}")
        assert np.abs(read(tmp_path / f"one-{i}") - found[2 * i:2 * i + 2]).max() <= 1
    files = sorted(f for f in (tmp_path / "all").glob("*.png") if f.name != "grid.png")
    for i, file in enumerate(files):
        stored = " ".join(Image.open(file).text.values())
        assert texts[i // 2] in stored and "ddim" in stored.lower()
