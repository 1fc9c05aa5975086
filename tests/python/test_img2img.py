"""`hra sample --image` and `--mask` against StableDiffusionImg2ImgPipeline and StableDiffusionInpaintPipeline of diffusers 0.42.1.

Folders, schedulers and the tolerance (final latents within 1e-4, norm of the difference over norm of the reference) are those of
test_sampling.py. `folder` of an inpainting UNet: the same case with 9 input channels.
"""

import contextlib
import dataclasses
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import cases
from cases import CASES, SCHEDULERS

PROMPT, NEGATIVE = "an owl's nest, 2 RED hearts!! on a blue background", "a red apple!"
BY_NAME = {case.name: case for case in CASES}
STRENGTHS = [0.3, 0.5, 0.75, 1.0]
STEPS = 12
BOTH = ["sd15-b", "sd21-a"]  # epsilon and velocity


def nine(case):
    """`case` with a UNet that sees a mask and a masked picture."""
    return dataclasses.replace(case, name=case.name + "-inpainting", unet=case.unet | {"in_channels": 9})


def picture(case, seed=5):
    """Blocks of random colour, smooth at their edges, at the case's size."""
    small = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    return Image.fromarray(small).resize((case.width, case.height), Image.Resampling.BICUBIC)


def mask_of(case):
    """White on the right, with a border that no latent shares, and grey that is just black or just white."""
    mask = np.zeros((case.height, case.width), np.uint8)
    mask[:, case.width // 2 + 1:] = 255
    mask[:3, :5] = 127
    mask[-5:, :7] = 128
    return Image.fromarray(mask)


@contextlib.contextmanager
def noise_from(drawn):
    """Whatever diffusers would draw, in its order, is the next tensor of `drawn`."""
    queue = iter(drawn)
    with contextlib.ExitStack() as stack:
        for place in ("pipelines.stable_diffusion.pipeline_stable_diffusion_img2img",
                      "pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint", "models.autoencoders.vae",
                      "schedulers.scheduling_euler_ancestral_discrete"):
            stack.enter_context(mock.patch(f"diffusers.{place}.randn_tensor", lambda *_, **__: next(queue)))
        yield


def python(case, model, scheduler, image, mask, strength, seed=None, drawn=None, steps=STEPS):
    """Final latents of diffusers for one picture, from a generator or from the tensors `drawn`."""
    kind = StableDiffusionImg2ImgPipeline if mask is None else StableDiffusionInpaintPipeline
    pipe = kind(**cases.load(model, case.variant).components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    schedule, settings = SCHEDULERS[scheduler]
    pipe.scheduler = schedule.from_config(pipe.scheduler.config, **settings)
    words = dict(negative_prompt=NEGATIVE, image=image, strength=strength, num_inference_steps=steps, guidance_scale=5.0)
    if mask is not None:
        words |= dict(mask_image=mask, height=case.height, width=case.width)
    if seed is not None:
        words["generator"] = torch.Generator("cpu").manual_seed(seed)
    with noise_from(drawn) if drawn is not None else contextlib.nullcontext(), torch.no_grad():
        return pipe(PROMPT, output_type="latent", **words).images


def run(hra, out, model, scheduler, image, mask, strength, *words, steps=STEPS):
    """The same with the binary; returns its latents."""
    image.save(out / "image.png")
    words = ["--image", out / "image.png", *words]
    if mask is not None:
        mask.save(out / "mask.png")
        words += ["--mask", out / "mask.png"]
    hra("sample", "--model", model, "--prompt", PROMPT, "--negative-prompt", NEGATIVE, "--guidance", 5, "--scheduler", scheduler,
        "--steps", steps, "--strength", strength, "--save-latents", out / "out.safetensors", "--output", out / "pictures", *words)
    return load_file(out / "out.safetensors")["latents"]


def compare(hra, out, case, model, scheduler, mask, strength):
    """Relative error for a seed, which pins the order of the draws."""
    found = run(hra, out, model, scheduler, picture(case), mask, strength, "--seed", 11)
    reference = python(case, model, scheduler, picture(case), mask, strength, seed=11)
    assert found.shape == reference.shape
    return cases.relative(found, reference)


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", BOTH)
def test_a_picture_at_any_strength_gives_pythons_latents(hra, folder, tmp_path, name, scheduler, strength):
    case = BY_NAME[name]
    assert compare(hra, tmp_path, case, folder(case), scheduler, None, strength) <= 1e-4


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", BOTH)
def test_a_mask_gives_pythons_latents(hra, folder, tmp_path, name, scheduler, strength):
    case = BY_NAME[name]
    assert compare(hra, tmp_path, case, folder(case), scheduler, mask_of(case), strength) <= 1e-4


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("scheduler", ["ddim", "pndm", "euler-a", "heun", "unipc"])
@pytest.mark.parametrize("name", BOTH)
def test_an_inpainting_unet_gives_pythons_latents(hra, folder, tmp_path, name, scheduler, strength):
    case = nine(BY_NAME[name])
    assert compare(hra, tmp_path, case, folder(case), scheduler, mask_of(case), strength) <= 1e-4


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("kind", ["picture", "mask", "inpainting"])
def test_given_noise_gives_pythons_latents(hra, folder, tmp_path, kind, strength):
    """All that is drawn comes from files; without the picture's noise, its encoder's mean is taken."""
    case = BY_NAME["sd15-b"] if kind != "inpainting" else nine(BY_NAME["sd15-b"])
    mask = None if kind == "picture" else mask_of(case)
    generator = torch.Generator().manual_seed(3)
    image, noise, masked = (torch.randn(case.latent_shape(), generator=generator) for _ in range(3))
    step = torch.randn((STEPS, *case.latent_shape()), generator=generator)
    save_file({"noise": step}, tmp_path / "step.safetensors")
    nothing = torch.zeros(case.latent_shape())
    results = []
    for has_all in (True, False):
        given = {"latents": noise} | ({"image_noise": image, "masked_image_noise": masked} if has_all else {})
        save_file(given, tmp_path / "noise.safetensors")
        found = run(hra, tmp_path, folder(case), "euler-a", picture(case), mask, strength,
                    "--latents", tmp_path / "noise.safetensors", "--step-noise", tmp_path / "step.safetensors")
        of_image, of_masked = (image, masked) if has_all else (nothing, nothing)
        drawn = [of_image] if kind != "inpainting" or strength < 1 else []
        drawn += [noise] + ([of_masked] if mask is not None else []) + list(step)
        reference = python(case, folder(case), "euler-a", picture(case), mask, strength, drawn=drawn)
        assert cases.relative(found, reference) <= 1e-4
        results.append(found)
    assert cases.relative(*results) > 1e-4, "the picture's noise has no effect"


@pytest.mark.parametrize("kind", ["picture", "mask", "inpainting"])
def test_image_i_of_a_seed_is_pythons_image_of_seed_plus_i(hra, folder, tmp_path, kind):
    case = BY_NAME["sd21-a"] if kind != "inpainting" else nine(BY_NAME["sd21-a"])
    mask = None if kind == "picture" else mask_of(case)
    found = run(hra, tmp_path, folder(case), "euler-a", picture(case), mask, 0.6,
                "--seed", 40, "--num-images", 3, "--batch-size", 2)
    for i in range(3):
        reference = python(case, folder(case), "euler-a", picture(case), mask, 0.6, seed=40 + i)
        assert cases.relative(found[i:i + 1], reference) <= 1e-4


@pytest.mark.parametrize("masked", [False, True])
def test_odd_sizes_are_stretched_as_python_stretches_them(hra, folder, tmp_path, masked):
    """A picture of no whole number of latents, and a coloured mask of another size."""
    case = BY_NAME["sd15-b"]
    image = picture(case).resize((case.width + 1, case.height + 1), Image.Resampling.BICUBIC)
    mask = None
    if masked:
        mask = Image.fromarray(np.random.default_rng(1).integers(0, 256, (9, 31, 3), np.uint8))
    found = run(hra, tmp_path, folder(case), "ddim", image, mask, 0.6, "--seed", 2)
    reference = python(case, folder(case), "ddim", image, mask, 0.6, seed=2)
    assert cases.relative(found, reference) <= 1e-4
    wide = run(hra, tmp_path, folder(case), "ddim", image, mask, 0.6, "--seed", 2, "--width", 32)
    assert wide.shape[2:] == (case.height // case.factor(), 32 // case.factor())
    stretched = image.resize((32, case.height), Image.Resampling.LANCZOS)
    other = dataclasses.replace(case, width=32)
    reference = python(other, folder(case), "ddim", image if masked else stretched, mask, 0.6, seed=2)
    assert cases.relative(wide, reference) <= 1e-4


def test_pixels_outside_the_mask_are_the_pictures_own(hra, folder, tmp_path):
    case = BY_NAME["sd15-a"]
    image, mask = picture(case), mask_of(case)
    latents = run(hra, tmp_path, folder(case), "ddim", image, mask, 1.0, "--seed", 2)
    found = np.asarray(Image.open(tmp_path / "pictures/0000-0000.png"))
    white = np.asarray(mask) >= 128
    assert (found[~white] == np.asarray(image)[~white]).all()
    pipe = cases.load(folder(case), case.variant)
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample[0]
    decoded = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy().astype(np.int64)
    assert np.abs(found[white] - decoded[white]).max() <= 1
