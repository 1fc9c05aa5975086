"""`hra sample --control` against StableDiffusionControlNetPipeline and StableDiffusionControlNetImg2ImgPipeline of diffusers 0.42.1, and
a control run of `hra train` against its networks put together in Python.

Folders, schedulers and the tolerance (final latents within 1e-4, norm of the difference over norm of the reference) are those of
test_sampling.py. The control encoder of a run is diffusers' ControlNetConditioningEmbedding, made by the words of its config.json;
its answer is added to that of the UNet's first convolution, as the authors of OFT and HRA do.
"""

import contextlib
import dataclasses
import json

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetImg2ImgPipeline, StableDiffusionControlNetPipeline
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from PIL import Image
from safetensors.torch import load_file, save_file

import cases
from cases import CASES, SCHEDULERS

PROMPT, NEGATIVE = "an owl's nest, 2 RED hearts!! on a blue background", "a red apple!"
BY_NAME = {case.name: case for case in CASES}
BOTH = ["sd15-a", "sd21-a"]  # epsilon and velocity
WIDTHS = [6, 8, 10, 12]
STEPS = 10


def picture(width, height, seed=5):
    """Blocks of random colour, smooth at their edges."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def controlnet(tmp_path_factory, folder):
    """case, words of ControlNetModel -> a ControlNet of random weights, those that start at zero too."""
    made = {}

    def get(case, **words):
        key = (case.name, *sorted(words.items()))
        if key not in made:
            torch.manual_seed(case.seed + 3)
            widths = WIDTHS[:case.factor().bit_length()]
            net = ControlNetModel.from_unet(
                cases.load(folder(case), case.variant).unet, load_weights_from_unet=False,
                conditioning_embedding_out_channels=widths, **words)
            with torch.no_grad():
                for name, parameter in net.named_parameters():
                    if parameter.abs().max() == 0:
                        spread = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1
                        parameter += spread * torch.randn(parameter.shape)
                for parameter in net.controlnet_cond_embedding.parameters():
                    parameter *= 4 if parameter.dim() > 1 else 1  # or else all conditions would be nearly one
            cases.shake(net)
            made[key] = tmp_path_factory.mktemp("controlnet")
            net.save_pretrained(made[key])
        return made[key]

    return get


def python(case, model, net, scheduler, adapters=(), kind=StableDiffusionControlNetPipeline, **words):
    """Final latents of diffusers."""
    pipe = cases.adapted(case, model, *adapters)
    pipe = kind(**pipe.components, controlnet=ControlNetModel.from_pretrained(net), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    schedule, settings = SCHEDULERS[scheduler]
    pipe.scheduler = schedule.from_config(pipe.scheduler.config, **settings)
    words = dict(prompt=PROMPT, num_inference_steps=STEPS) | words
    count = len(words["prompt"]) if isinstance(words["prompt"], list) else 1
    negative = [NEGATIVE] * count if count > 1 else NEGATIVE
    with torch.no_grad():
        return pipe(negative_prompt=negative, guidance_scale=5.0, output_type="latent", **words).images


def run(hra, out, case, model, scheduler, *words, prompts=(PROMPT,), noise=None):
    """The same with the binary; returns its latents."""
    if noise is not None:
        save_file({"latents": noise}, out / "noise.safetensors")
        words += ("--latents", out / "noise.safetensors")
    hra("sample", "--model", model, *(word for prompt in prompts for word in ("--prompt", prompt)), "--negative-prompt", NEGATIVE,
        "--guidance", 5, "--scheduler", scheduler, "--steps", STEPS, "--height", case.height, "--width", case.width,
        "--save-latents", out / "out.safetensors", "--output", out / "pictures", *words)
    return load_file(out / "out.safetensors")["latents"]


def saved(image, path):
    image.save(path)
    return path


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "hra"])
@pytest.mark.parametrize("scheduler", ["ddim", "pndm", "dpm++2m", "heun", "euler"])
@pytest.mark.parametrize("name", BOTH)
def test_a_controlnet_gives_pythons_latents(hra, folder, adapter, controlnet, tmp_path, name, scheduler, adapted):
    """In some of the steps, at a scale, alone and with an adapter that PEFT wrote."""
    case = BY_NAME[name]
    adapters = [adapter(case, "r4")] if adapted else []
    image, noise = picture(case.width, case.height), cases.unit_noise(case, seed=case.seed + 1)
    words = ["--controlnet", controlnet(case), "--control", saved(image, tmp_path / "condition.png")]
    words += [word for path in adapters for word in ("--adapter", path)]
    found = run(hra, tmp_path, case, folder(case), scheduler, *words, "--control-scale", 0.7, "--control-start", 0.15,
                "--control-end", 0.8, noise=noise)
    reference = python(
        case, folder(case), controlnet(case), scheduler, adapters, image=image, latents=noise,
        controlnet_conditioning_scale=0.7, control_guidance_start=0.15, control_guidance_end=0.8)
    assert found.shape == reference.shape
    assert cases.relative(found, reference) <= 1e-4
    saved(picture(case.width, case.height, seed=6), tmp_path / "condition.png")
    other = run(hra, tmp_path, case, folder(case), scheduler, *words, noise=noise)
    assert cases.relative(other, reference) > 1e-2, "another condition gives another picture"


@pytest.mark.parametrize("order", ["rgb", "bgr"])
@pytest.mark.parametrize("name", ["sd15-c", "sd21-b"])
def test_a_condition_of_another_size_is_resized_as_python_does(hra, folder, controlnet, tmp_path, name, order):
    """In every step, in both orders of its colours, with levels without attention and latents of odd sizes."""
    case = BY_NAME[name]
    net = controlnet(case, controlnet_conditioning_channel_order=order)
    image, noise = picture(case.width * 2 + 3, case.height - 7), cases.unit_noise(case, seed=8)
    found = run(hra, tmp_path, case, folder(case), "ddim", "--controlnet", net, "--control",
                saved(image, tmp_path / "condition.png"), noise=noise)
    reference = python(case, folder(case), net, "ddim", image=image, latents=noise, height=case.height, width=case.width)
    assert cases.relative(found, reference) <= 1e-4
    nearest = image.resize((case.width, case.height), Image.Resampling.NEAREST)
    other = python(case, folder(case), net, "ddim", image=nearest, latents=noise)
    assert cases.relative(found, other) > 1e-3, "how it is resized matters"


def test_without_a_size_the_condition_gives_it(hra, folder, controlnet, tmp_path):
    case = dataclasses.replace(BY_NAME["sd21-a"], height=48, width=80)
    image, noise = picture(case.width, case.height), cases.unit_noise(case, seed=9)
    save_file({"latents": noise}, tmp_path / "noise.safetensors")
    hra("sample", "--model", folder(BY_NAME["sd21-a"]), "--prompt", PROMPT, "--negative-prompt", NEGATIVE, "--guidance", 5,
        "--scheduler", "ddim", "--steps", STEPS, "--controlnet", controlnet(BY_NAME["sd21-a"]), "--control",
        saved(image, tmp_path / "condition.png"), "--latents", tmp_path / "noise.safetensors",
        "--save-latents", tmp_path / "out.safetensors", "--output", tmp_path / "pictures")
    found = load_file(tmp_path / "out.safetensors")["latents"]
    reference = python(BY_NAME["sd21-a"], folder(BY_NAME["sd21-a"]), controlnet(BY_NAME["sd21-a"]), "ddim", image=image, latents=noise)
    assert cases.relative(found, reference) <= 1e-4


@pytest.mark.parametrize("conditions", [1, 2])
@pytest.mark.parametrize("name", BOTH)
def test_several_prompts_and_pictures_have_their_conditions(hra, folder, controlnet, tmp_path, name, conditions):
    """Two prompts of three pictures each, drawn in uneven batches, with one condition for both prompts or one for each."""
    case = BY_NAME[name]
    prompts = [PROMPT, "a robot"]
    images = [picture(case.width, case.height, seed) for seed in range(conditions)]
    noise = cases.unit_noise(case, seed=4, batch=3)
    words = [word for i, image in enumerate(images) for word in ("--control", saved(image, tmp_path / f"{i}.png"))]
    found = run(hra, tmp_path, case, folder(case), "pndm", "--controlnet", controlnet(case), *words, "--batch-size", 2,
                prompts=prompts, noise=noise)
    assert found.shape == case.latent_shape(6)
    reference = python(
        case, folder(case), controlnet(case), "pndm", prompt=prompts, image=images if conditions > 1 else images[0],
        num_images_per_prompt=3, latents=torch.cat([noise, noise]))
    assert cases.relative(found, reference) <= 1e-4
    swapped = python(
        case, folder(case), controlnet(case), "pndm", prompt=prompts, image=[images[-1], images[0]],
        num_images_per_prompt=3, latents=torch.cat([noise, noise]))
    assert conditions == 1 or cases.relative(found, swapped) > 1e-2, "which condition is whose matters"


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
@pytest.mark.parametrize("name", BOTH)
def test_a_picture_and_a_condition_give_pythons_latents(hra, folder, controlnet, tmp_path, name, scheduler):
    """Image to image: shares of the steps are those of the steps that are left."""
    case = BY_NAME[name]
    condition, image = picture(case.width, case.height), picture(case.width, case.height, seed=6)
    found = run(hra, tmp_path, case, folder(case), scheduler, "--controlnet", controlnet(case), "--control",
                saved(condition, tmp_path / "condition.png"), "--image", saved(image, tmp_path / "image.png"), "--strength", 0.6,
                "--control-scale", 0.8, "--control-end", 0.7, "--seed", 11)
    reference = python(
        case, folder(case), controlnet(case), scheduler, kind=StableDiffusionControlNetImg2ImgPipeline, image=image,
        control_image=condition, strength=0.6, controlnet_conditioning_scale=0.8, control_guidance_end=0.7,
        generator=torch.Generator("cpu").manual_seed(11))
    assert cases.relative(found, reference) <= 1e-4


@pytest.fixture(scope="session")
def control_run(hra, folder, tmp_path_factory):
    """case -> a run of `hra train` on pairs of random pictures."""
    made = {}

    def get(case):
        if case.name not in made:
            place = tmp_path_factory.mktemp(f"control-{case.name}")
            rows = []
            for i in range(3):
                for name, seed in ((f"{i}.png", i), (f"condition-{i}.png", 10 + i)):
                    picture(case.width, case.height, seed).save(place / name)
                rows.append({"file_name": f"{i}.png", "text": f"{i} red apples", "conditioning_image": f"condition-{i}.png"})
            (place / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
            hra("train", "--model", folder(case), "--train_data_dir", place, "--output_dir", place / "run", "--rank", 4,
                "--resolution", 8 * case.factor(), "--learning_rate", 3e-2, "--control_lr", 1e-1, "--max_train_steps", 4,
                "--train_batch_size", 2)
            made[case.name] = place / "run"
        return made[case.name]

    return get


@contextlib.contextmanager
def steered(unet, encoder, condition, scale, passes):
    """Adds the encoder's answer to that of the first convolution, in both of guidance's passes or in the second one."""
    pixels = torch.from_numpy(np.asarray(condition, np.float32) / 255).permute(2, 0, 1)[None]
    with torch.no_grad():
        hint = scale * encoder(pixels)

    def add(_module, _inputs, output):
        both = output.shape[0] // 2
        shares = torch.ones(output.shape[0])
        if passes == "conditional":
            shares[:both] = 0
        return output + shares[:, None, None, None] * hint

    hook = next(module for name, module in unet.named_modules() if name.endswith("conv_in")).register_forward_hook(add)
    yield
    hook.remove()


@pytest.mark.parametrize("passes, scale", [("both", 1.0), ("conditional", 1.0), ("both", 0.6)])
@pytest.mark.parametrize("name", BOTH)
def test_a_control_run_is_its_networks_in_python(hra, folder, control_run, tmp_path, name, passes, scale):
    case, place = BY_NAME[name], control_run(BY_NAME[name])
    config = json.loads((place / "control_encoder/config.json").read_text())
    assert config.pop("_class_name") == "ControlNetConditioningEmbedding"
    assert config.pop("condition") == "other"
    encoder = ControlNetConditioningEmbedding(**config)
    encoder.load_state_dict(load_file(place / "control_encoder/diffusion_pytorch_model.safetensors"))
    condition, noise = picture(case.width, case.height, seed=20), cases.unit_noise(case, seed=5, batch=2)
    found = run(hra, tmp_path, case, folder(case), "ddim", "--adapter", place, "--control",
                saved(condition, tmp_path / "condition.png"), "--control-passes", passes, "--control-scale", scale, noise=noise)
    pipe = cases.adapted(case, folder(case), place)

    def draw(control):
        with control:
            rows = [cases.sample(pipe, "ddim", PROMPT, NEGATIVE, height=case.height, width=case.width, noise=row[None], steps=STEPS)
                    for row in noise]
        return torch.cat(rows)

    assert cases.relative(found, draw(steered(pipe.unet, encoder, condition, scale, passes))) <= 1e-4
    assert cases.relative(found, draw(contextlib.nullcontext())) > 1e-2, "the condition matters"
