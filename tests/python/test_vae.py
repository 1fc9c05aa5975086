"""Autoencoders that are not those of Stable Diffusion 1.x and 2.x, in `hra sample`, against diffusers 0.42.1."""

import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLImg2ImgPipeline
from PIL import Image

import cases
import xl_cases
from test_xl import SIZE, draw, picture, python, run

KINDS = {
    "mean and deviation": dict(latents_mean=[0.3, -0.2, 0.1, 0.5], latents_std=[1.5, 0.8, 2.0, 1.1]),
    "no convolutions around the latents": dict(use_quant_conv=False, use_post_quant_conv=False),
    "one convolution": dict(use_post_quant_conv=False),
    "no attention": dict(mid_block_add_attention=False),
    "sixteen channels": dict(latents=16, use_quant_conv=False, use_post_quant_conv=False),
}


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = xl_cases.build(tmp_path_factory.mktemp("vae") / "model", 77, **KINDS[kind])
        return made[kind]

    return get


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def decoded(pipe, latents):
    """As the pipeline ends, in bytes."""
    with torch.no_grad():
        mean, std = (getattr(pipe.vae.config, f"latents_{name}") for name in ("mean", "std"))
        if mean is not None:
            latents = latents * torch.tensor(std).view(1, -1, 1, 1)
        latents = latents / pipe.vae.config.scaling_factor
        if mean is not None:
            latents = latents + torch.tensor(mean).view(1, -1, 1, 1)
        image = pipe.vae.decode(latents).sample[0]
    return ((image / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy().astype(int)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_gives_pythons_picture(hra, model, tmp_path, kind):
    pipe = xl_cases.load(model(kind))
    latents = run(hra, tmp_path, model(kind), *SIZE)
    assert cases.relative(latents, draw(pipe)) <= 1e-4
    with torch.no_grad():
        whole = draw(pipe, output_type="np")[0]
    ours = pixels(tmp_path / "pictures/0000-0000.png")
    assert np.abs(ours - decoded(pipe, latents)).max() <= 1
    assert np.abs(ours - whole * 255).mean() < 0.6


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_gives_pythons_latents(hra, model, tmp_path, kind):
    picture().save(tmp_path / "in.png")
    found = run(hra, tmp_path, model(kind), "--image", tmp_path / "in.png", "--strength", 0.5)
    pipe = xl_cases.load(model(kind), StableDiffusionXLImg2ImgPipeline)
    assert cases.relative(found, python(pipe, image=picture(), strength=0.5)) <= 1e-4


def test_a_shift_is_taken_from_latents(hra, tmp_path):
    """As the pipelines that know `shift_factor` do (Stable Diffusion 3): those of XL leave it out."""
    folder = xl_cases.build(tmp_path / "model", 78, shift_factor=0.7)
    latents = run(hra, tmp_path, folder, *SIZE)
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    with torch.no_grad():
        image = vae.decode(latents / 0.13025 + 0.7).sample[0]
    expected = ((image / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy().astype(int)
    assert np.abs(pixels(tmp_path / "pictures/0000-0000.png") - expected).max() <= 1


@pytest.mark.parametrize("kind", ["no convolutions around the latents", "one convolution"])
def test_a_vae_beside_the_model(hra, model, tmp_path, kind):
    folder = model(kind)
    base = shutil.copytree(folder, tmp_path / "base")
    shutil.rmtree(base / "vae")
    run(hra, tmp_path, folder, *SIZE)
    (tmp_path / "beside").mkdir()
    run(hra, tmp_path / "beside", base, *SIZE, "--vae", folder / "vae")
    first, second = (pixels(place / "pictures/0000-0000.png") for place in (tmp_path, tmp_path / "beside"))
    assert np.array_equal(first, second)


def test_number_formats_of_the_vae(hra, model, tmp_path):
    folder = xl_cases.build(tmp_path / "model", 77)
    pictures = {}
    for dtype in ("f32", "bf16", "f16"):
        (tmp_path / dtype).mkdir()
        run(hra, tmp_path / dtype, folder, *SIZE, "--vae-dtype", dtype)
        pictures[dtype] = pixels(tmp_path / dtype / "pictures/0000-0000.png")
    assert np.abs(pictures["f16"] - pictures["f32"]).mean() < 0.5
    difference = np.abs(pictures["bf16"] - pictures["f32"])
    assert 0 < difference.mean() < 4, difference.mean()
