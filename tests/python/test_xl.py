"""Stable Diffusion XL in `hra sample` against diffusers 0.42.1, PEFT 0.21.2: pictures to start from, masks, refiners, single files,
adapters of other programs. tests/numbers/xl.rs has the networks and the schedulers.
"""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline, StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file

import cases
import xl_cases
from test_lora_file import lora
from test_single_file import UNET, VAE, open_clip_to_ldm, text_state, unet_to_ldm, vae_to_ldm

PROMPT, NEGATIVE = "an owl's nest, 2 RED hearts!! on a blue background", "a red apple!"
WIDTH, HEIGHT, STEPS = 40, 56, 10
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """kind -> its folder."""
    made = {}

    def get(kind="base"):
        if kind not in made:
            own = {"inpainting": dict(in_channels=9), "refiner": dict(refiner=True)}.get(kind, {})
            made[kind] = xl_cases.build(tmp_path_factory.mktemp("xl") / kind, 31, **own)
        return made[kind]

    return get


def picture(seed=5):
    small = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    return Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def mask():
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    pixels[:, WIDTH // 2 + 1:] = 255
    pixels[:3, :5] = 127
    pixels[-5:, :7] = 128
    return Image.fromarray(pixels)


def run(hra, out, folder, *words, scheduler="euler", seed=11, negative=NEGATIVE):
    hra("sample", "--model", folder, "--prompt", PROMPT, "--guidance", 5, "--scheduler", scheduler, "--steps", STEPS, "--seed", seed,
        "--save-latents", out / "out.safetensors", "--output", out / "pictures", *(["--negative-prompt", negative] if negative else []),
        *words)
    return load_file(out / "out.safetensors")["latents"]


def python(pipe, seed=11, negative=NEGATIVE, **own):
    settings = dict(
        prompt=PROMPT, negative_prompt=negative or None, num_inference_steps=STEPS, guidance_scale=5.0, output_type="latent",
        generator=torch.Generator("cpu").manual_seed(seed))
    with torch.no_grad():
        return pipe(**settings | own).images


def draw(pipe, **own):
    return python(pipe, width=WIDTH, height=HEIGHT, **own)


SIZE = ["--width", WIDTH, "--height", HEIGHT]


@pytest.mark.parametrize("negative", [NEGATIVE, ""])
@pytest.mark.parametrize("scheduler", xl_cases.SCHEDULERS)
def test_a_prompt_gives_pythons_latents(hra, model, tmp_path, scheduler, negative):
    found = run(hra, tmp_path, model(), *SIZE, scheduler=scheduler, negative=negative)
    assert cases.relative(found, draw(xl_cases.load(model(), scheduler=scheduler), negative=negative)) <= 1e-4


@pytest.mark.parametrize("strength", [0.4, 1.0])
@pytest.mark.parametrize("scheduler", xl_cases.SCHEDULERS)
def test_a_picture_gives_pythons_latents(hra, model, tmp_path, scheduler, strength):
    picture().save(tmp_path / "image.png")
    found = run(hra, tmp_path, model(), "--image", tmp_path / "image.png", "--strength", strength, "--crop", "8,16", scheduler=scheduler)
    pipe = xl_cases.load(model(), StableDiffusionXLImg2ImgPipeline, scheduler)
    expected = python(pipe, image=picture(), strength=strength, crops_coords_top_left=(8, 16))
    assert cases.relative(found, expected) <= 1e-4


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("scheduler", ["ddim", "euler", "euler-a"])
@pytest.mark.parametrize("kind", ["base", "inpainting"])
def test_a_mask_gives_pythons_latents(hra, model, tmp_path, kind, scheduler, strength):
    picture().save(tmp_path / "image.png")
    mask().save(tmp_path / "mask.png")
    words = ["--image", tmp_path / "image.png", "--mask", tmp_path / "mask.png", "--strength", strength]
    found = run(hra, tmp_path, model(kind), *words, scheduler=scheduler)
    pipe = xl_cases.load(model(kind), StableDiffusionXLInpaintPipeline, scheduler)
    expected = python(pipe, image=picture(), mask_image=mask(), strength=strength, width=WIDTH, height=HEIGHT)
    assert cases.relative(found, expected) <= 1e-4


@pytest.mark.parametrize("negative", [NEGATIVE, ""])
def test_a_refiner_gives_pythons_latents(hra, model, tmp_path, negative):
    picture().save(tmp_path / "image.png")
    found = run(hra, tmp_path, model("refiner"), "--image", tmp_path / "image.png", "--strength", 0.5, negative=negative)
    pipe = xl_cases.load(model("refiner"), StableDiffusionXLImg2ImgPipeline, "euler", requires_aesthetics_score=True)
    assert cases.relative(found, python(pipe, image=picture(), strength=0.5, negative=negative)) <= 1e-4
    told = hra("sample", "--model", model("refiner"), "--prompt", PROMPT, "--output", tmp_path / "other", fails=True)
    assert "refiner" in told and "--image" in told


# Single files


def to_ldm(pipe):
    """The whole pipeline by the keys of published files of Stable Diffusion XL."""
    second = {k.removeprefix("text_model."): v for k, v in pipe.text_encoder_2.state_dict().items()}
    place = "conditioner.embedders.1.model." if pipe.text_encoder is not None else "conditioner.embedders.0.model."
    tensors = {place + k: v for k, v in open_clip_to_ldm(second).items()}
    tensors[f"{place}text_projection"] = second["text_projection.weight"].T
    if pipe.text_encoder is not None:
        first = text_state(pipe.text_encoder)
        tensors |= {f"conditioner.embedders.0.transformer.text_model.{k}": v for k, v in first.items()}
    added = {"add_embedding.linear_1.": "label_emb.0.0.", "add_embedding.linear_2.": "label_emb.0.2."}
    state = pipe.unet.state_dict()
    for old, new in added.items():
        tensors |= {UNET + new + k.removeprefix(old): v for k, v in state.items() if k.startswith(old)}
    tensors |= {UNET + k: v for k, v in unet_to_ldm(pipe.unet, leave_out="add_embedding.").items()}
    tensors |= {VAE + k: v for k, v in vae_to_ldm(pipe.vae).items()}
    return {k: v.clone().contiguous() for k, v in tensors.items()}


@pytest.mark.parametrize("kind", ["base", "inpainting", "refiner"])
def test_a_single_file_draws_what_the_folder_draws(hra, model, tmp_path, kind):
    pipe = xl_cases.load(model(kind))
    save_file(to_ldm(pipe), tmp_path / "model.safetensors")
    picture().save(tmp_path / "image.png")
    mask().save(tmp_path / "mask.png")
    words = {"base": SIZE, "refiner": ["--image", tmp_path / "image.png"]}.get(
        kind, ["--image", tmp_path / "image.png", "--mask", tmp_path / "mask.png"])
    found = run(hra, tmp_path, tmp_path / "model.safetensors", "--config", model(kind), *words)
    assert torch.equal(found, run(hra, tmp_path, model(kind), *words, "--overwrite"))


def test_a_single_file_without_a_part_is_named(hra, model, tmp_path):
    whole = to_ldm(xl_cases.load(model()))
    for prefix in ("conditioner.embedders.0.", "conditioner.embedders.1.", VAE):
        save_file({k: v for k, v in whole.items() if not k.startswith(prefix)}, tmp_path / "model.safetensors")
        told = hra("sample", "--model", tmp_path / "model.safetensors", "--config", model(), "--prompt", PROMPT, "--output",
                   tmp_path / "none", fails=True)
        assert "Stable Diffusion XL" in told and prefix in told, told


# Adapters


def adapted(model):
    """A pipeline with a LoRA on all three networks, and the tensors of each by PEFT's names."""
    pipe = xl_cases.load(model())
    unet = lora(pipe.unet, 1, r=4, lora_alpha=8, target_modules=cases.ATTENTION)
    texts = [lora(part, 2 + i, r=3, lora_alpha=3, target_modules=TEXT[:4])
             for i, part in enumerate((pipe.text_encoder, pipe.text_encoder_2))]
    return pipe, unet, texts


def compare(hra, model, tmp_path, pipe, file, expected=None):
    found = run(hra, tmp_path, model(), "--adapter", file, *SIZE)
    expected = draw(pipe) if expected is None else expected
    plain = draw(xl_cases.load(model()))
    assert cases.relative(plain, expected) > 1e-2, "the adapter does something"
    assert cases.relative(found, expected) <= 1e-4


def test_a_lora_of_diffusers_draws_what_diffusers_draws(hra, model, tmp_path):
    pipe, unet, texts = adapted(model)
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path, weight_name="lora.safetensors", unet_lora_layers=convert_state_dict_to_diffusers(unet),
        text_encoder_lora_layers=convert_state_dict_to_diffusers(texts[0]),
        text_encoder_2_lora_layers=convert_state_dict_to_diffusers(texts[1]),
        unet_lora_adapter_metadata=pipe.unet.peft_config["default"].to_dict(),
        text_encoder_lora_adapter_metadata=pipe.text_encoder.peft_config["default"].to_dict(),
        text_encoder_2_lora_adapter_metadata=pipe.text_encoder_2.peft_config["default"].to_dict())
    compare(hra, model, tmp_path, pipe, tmp_path / "lora.safetensors")


def ldm_layers(unet):
    """Layers by diffusers' names to their names in published checkpoints."""
    marks = {k: torch.tensor([float(i)]) for i, k in enumerate(unet.state_dict())}

    class Marked:
        down_blocks, up_blocks = unet.down_blocks, unet.up_blocks

        def state_dict(self):
            return marks

    named = unet_to_ldm(Marked(), leave_out="add_embedding.")
    by_mark = {int(tensor): key for key, tensor in named.items()}
    return {k.removesuffix(".weight"): by_mark[int(t)].removesuffix(".weight") for k, t in marks.items() if int(t) in by_mark}


@pytest.mark.parametrize("spelling", ["diffusers", "ldm"])
def test_a_lora_of_kohya_draws_what_diffusers_draws(hra, model, tmp_path, spelling):
    pipe, unet, texts = adapted(model)
    expected = draw(pipe)
    names = ldm_layers(xl_cases.load(model()).unet)
    tensors = {}
    for prefix, found, alpha in (("lora_unet", unet, 8.0), ("lora_te1", texts[0], 3.0), ("lora_te2", texts[1], 3.0)):
        for key, tensor in found.items():
            layer, half = key.removeprefix("base_model.model.").split(".lora_")
            if prefix == "lora_unet" and spelling == "ldm":
                layer = names[layer]
            if prefix != "lora_unet":
                layer = "text_model." + layer.removeprefix("text_model.")
            place = f"{prefix}_{layer.replace('.', '_')}"
            tensors[f"{place}.lora_{'down' if half.startswith('A') else 'up'}.weight"] = tensor
            tensors[f"{place}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "kohya.safetensors", metadata={"ss_base_model_version": "sdxl_base_v1-0"})
    compare(hra, model, tmp_path, pipe, tmp_path / "kohya.safetensors", expected)


def test_adapters_of_another_family_are_refused_by_name(hra, model, tmp_path, folder):
    pipe, _, texts = adapted(model)
    second = {f"text_encoder_2.{k}": v for k, v in convert_state_dict_to_diffusers(texts[1]).items()}
    save_file(second, tmp_path / "second.safetensors")
    small = folder(next(case for case in cases.CASES if case.name == "sd15-b"))
    told = hra("sample", "--model", small, "--prompt", PROMPT, "--adapter", tmp_path / "second.safetensors", "--output",
               tmp_path / "none", fails=True)
    assert "found one for Stable Diffusion XL" in told and "1.x or 2.x, as the model is" in told
    other = cases.load(folder(next(case for case in cases.CASES if case.name == "sd15-a")))
    torch.manual_seed(3)
    other.unet.add_adapter(LoraConfig(r=2, target_modules=cases.ATTENTION))
    other.unet.save_lora_adapter(tmp_path, weight_name="one.safetensors")
    told = hra("sample", "--model", model(), "--prompt", PROMPT, "--adapter", tmp_path / "one.safetensors", "--output",
               tmp_path / "none", fails=True)
    assert "found one for Stable Diffusion 1.x or 2.x" in told and "XL, as the model is" in told


# Of 1.x and 2.x too


def skipping(pipe, layers):
    """The prompts as the pipeline's `clip_skip` makes them; that itself needs transformers 4 here."""
    words = [pipe.tokenizer(text, padding="max_length", return_tensors="pt").input_ids for text in (PROMPT, NEGATIVE)]
    with torch.no_grad():
        states = pipe.text_encoder(words[0], output_hidden_states=True).hidden_states[-(layers + 1)]
        states = pipe.text_encoder.final_layer_norm(states) if layers else pipe.text_encoder(words[0])[0]
        return dict(prompt=None, negative_prompt=None, prompt_embeds=states, negative_prompt_embeds=pipe.text_encoder(words[1])[0])


@pytest.mark.parametrize("words, own", [
    (["--clip-skip", 1], dict(clip_skip=1)), (["--clip-skip", 2], dict(clip_skip=2)), (["--guidance-rescale", 0.7], dict(guidance_rescale=0.7)),
])
@pytest.mark.parametrize("name", ["sd15-b", "sd21-a"])
def test_clip_skip_and_guidance_rescale_of_smaller_models(hra, folder, tmp_path, name, words, own):
    case = next(case for case in cases.CASES if case.name == name)
    size = ["--width", case.width, "--height", case.height]
    found = run(hra, tmp_path, folder(case), *words, *size, scheduler="ddim")
    pipe = cases.load(folder(case), case.variant)
    pipe.scheduler = xl_cases.DDIMScheduler.from_config(pipe.scheduler.config)
    told = skipping(pipe, own["clip_skip"]) if "clip_skip" in own else own
    expected = python(pipe, width=case.width, height=case.height, **told)
    assert cases.relative(found, expected) <= 1e-4
    text = Image.open(tmp_path / "pictures/0000-0000.png").text
    assert any(str(value) in text.get(key, "") for key, value in own.items()), json.dumps(text)
