"""LoRA files between `hra` and diffusers 0.42.1 / PEFT 0.21.2, on folders that are made here.

Reading: files that Python writes, in every style, give diffusers' latents in `hra sample --adapter FILE=S`. Writing: what
`hra export` makes of an HRA adapter gives PEFT's latents of that adapter in `pipe.load_lora_weights`.
"""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import cases

PROMPT, NEGATIVE = "an owl's nest, 2 RED hearts!! on a blue background", "a red apple!"
BY_NAME = {case.name: case for case in cases.CASES}
NAMES = ["sd15-a", "sd21-a"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]
WIDE = [*cases.CONVOLUTIONS, "time_emb_proj", "downsamplers.0.conv", "conv_in"]


def lora(part, seed, **settings):
    """`part` with a random LoRA; its tensors by PEFT's names."""
    torch.manual_seed(seed)
    part.add_adapter(LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in part.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape))
            elif "magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.rand(parameter.shape))
    return {k: v.clone().contiguous() for k, v in get_peft_model_state_dict(part).items()}


def prefixed(prefix, tensors):
    return {f"{prefix}.{k}": v for k, v in tensors.items()}


def of_text(tensors):
    return {f"text_encoder.text_model.{k.removeprefix('text_model.')}": v for k, v in tensors.items()}


# Each writes a file for `pipe` into `out` and returns its name; `apply` of a style is how Python reads it.


def peft_style(pipe, out, seed):
    tensors = lora(pipe.unet, seed, r=4, lora_alpha=4, target_modules=WIDE)
    save_file(prefixed("base_model.model", tensors), out / "peft.safetensors")


def save_lora_adapter(pipe, out, seed):
    lora(pipe.unet, seed, r=4, lora_alpha=6, target_modules=WIDE, use_rslora=True,
         rank_pattern={"to_k": 3, "conv1": 2}, alpha_pattern={r"attn1\.to_q": 2, "proj_in": 5})
    pipe.unet.save_lora_adapter(out, weight_name="adapter.safetensors")


def dora(pipe, out, seed):
    lora(pipe.unet, seed, r=4, lora_alpha=4, target_modules=WIDE, use_dora=True)
    pipe.unet.save_lora_adapter(out, weight_name="dora.safetensors")


def save_lora_weights(pipe, out, seed):
    unet = lora(pipe.unet, seed, r=4, lora_alpha=8, target_modules=cases.ATTENTION)
    text = lora(pipe.text_encoder, seed + 1, r=3, lora_alpha=3, target_modules=TEXT[:4])
    StableDiffusionPipeline.save_lora_weights(
        out, weight_name="pipeline.safetensors", unet_lora_layers=convert_state_dict_to_diffusers(unet),
        text_encoder_lora_layers=convert_state_dict_to_diffusers(text),
        unet_lora_adapter_metadata=pipe.unet.peft_config["default"].to_dict(),
        text_encoder_lora_adapter_metadata=pipe.text_encoder.peft_config["default"].to_dict())


def without_settings(pipe, out, seed):
    unet = lora(pipe.unet, seed, r=4, lora_alpha=4, target_modules=cases.ATTENTION)
    text = of_text(lora(pipe.text_encoder, seed + 1, r=3, lora_alpha=3, target_modules=TEXT[:4]))
    save_file(prefixed("unet", convert_state_dict_to_diffusers(unet)) | convert_state_dict_to_diffusers(text),
              out / "plain.safetensors")


def processors(pipe, out, seed):
    tensors = {}
    for key, value in lora(pipe.unet, seed, r=4, lora_alpha=4, target_modules=cases.ATTENTION).items():
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            for half, word in (("lora_A", "down"), ("lora_B", "up")):
                key = key.replace(f".{name}.{half}", f".processor.{name.removesuffix('.0')}_lora.{word}")
        tensors[f"unet.{key}"] = value
    save_file(tensors, out / "processor.safetensors")


def kohya(pipe, out, seed):
    """One alpha for all layers: diffusers loses those of attention layers where they differ."""
    tensors = prefixed("unet", lora(pipe.unet, seed, r=4, lora_alpha=4, target_modules=WIDE))
    tensors |= of_text(lora(pipe.text_encoder, seed + 1, r=4, lora_alpha=4, target_modules=TEXT))
    tensors = {k.replace("lora_te1_", "lora_te_"): v for k, v in convert_state_dict_to_kohya(tensors).items()}
    save_file({k: torch.tensor(3.0) if k.endswith(".alpha") else v for k, v in tensors.items()}, out / "kohya.safetensors")


STYLES = [peft_style, save_lora_adapter, dora, save_lora_weights, without_settings, processors, kohya]


def load(pipe, path, strength=1.0):
    """`pipe` with the LoRA of a file, as Python loads it."""
    keys = load_file(path)
    if any(key.startswith(("unet.", "lora_unet_")) for key in keys):
        pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name="own")
    elif any(key.startswith("base_model.model.") for key in keys):
        tensors = {k.removeprefix("base_model.model."): v for k, v in keys.items()}
        pipe.unet.load_lora_adapter(tensors, prefix=None, adapter_name="own")
    else:
        pipe.unet.load_lora_adapter(path.parent, weight_name=path.name, prefix=None, adapter_name="own")
    pipe.set_adapters("own", strength)
    return pipe


def python(case, pipe, noise):
    return cases.sample(
        pipe, "ddim", PROMPT, NEGATIVE, height=case.height, width=case.width, noise=noise, steps=4)


def run(hra, case, model, out, noise, *words):
    save_file({"latents": noise}, out / "noise.safetensors")
    hra("sample", "--model", model, "--prompt", PROMPT, "--negative-prompt", NEGATIVE, "--guidance", 5, "--height",
        case.height, "--width", case.width, "--scheduler", "ddim", "--steps", 4, "--latents", out / "noise.safetensors",
        "--save-latents", out / "out.safetensors", "--output", out / "pictures", *words)
    return load_file(out / "out.safetensors")["latents"]


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_python_wrote_gives_pythons_latents(hra, folder, tmp_path, name, style):
    case = BY_NAME[name]
    (tmp_path / "lora").mkdir()
    style(cases.load(folder(case)), tmp_path / "lora", case.seed)
    (path,) = (tmp_path / "lora").iterdir()
    noise = cases.unit_noise(case, seed=case.seed + 1)
    base = python(case, cases.load(folder(case)), noise)
    # DoRA's strength scales the product inside the norm in PEFT; there only 1 means the same everywhere.
    for strength in [1] if style is dora else [1, 0.5]:
        reference = python(case, load(cases.load(folder(case)), path, strength), noise)
        found = run(hra, case, folder(case), tmp_path, noise, "--adapter", f"{path}={strength}")
        assert cases.relative(found, reference) <= 1e-4, strength
        assert cases.relative(reference, base) > 1e-3, "the LoRA must show for this to mean anything"


@pytest.mark.parametrize("dtype, tolerance", [("f32", 1e-4), ("f16", 5e-3), ("bf16", 3e-2)])
@pytest.mark.parametrize("kind", ["diffusers-lora", "kohya-lora"])
@pytest.mark.parametrize("adapter_name", ["r8", "r4-conv"])
@pytest.mark.parametrize("name", NAMES)
def test_an_exported_hra_adapter_gives_its_latents_in_diffusers(
        hra, folder, adapter, tmp_path, name, adapter_name, kind, dtype, tolerance):
    case = BY_NAME[name]
    path = tmp_path / "exported.safetensors"
    hra("export", "--model", folder(case), "--adapter", adapter(case, adapter_name), "--to", kind, "--dtype", dtype,
        "--output", path)
    noise = cases.unit_noise(case, seed=case.seed + 1)
    hra_in_peft = cases.with_adapter(cases.load(folder(case)), adapter(case, adapter_name))
    reference = python(case, hra_in_peft, noise)
    found = python(case, load(cases.load(folder(case)), path), noise)
    assert cases.relative(found, reference) <= tolerance
    assert cases.relative(reference, python(case, cases.load(folder(case)), noise)) > 10 * tolerance


@pytest.mark.parametrize("strength", [-1, 0.25, 0.5, 1.5])
@pytest.mark.parametrize("kind", ["diffusers-lora", "kohya-lora"])
def test_an_export_at_a_strength_is_the_adapter_at_that_strength(hra, folder, adapter, tmp_path, kind, strength):
    case = BY_NAME["sd15-a"]
    path = tmp_path / "exported.safetensors"
    hra("export", "--model", folder(case), "--adapter", f"{adapter(case, 'r4')}={strength}", "--to", kind,
        "--output", path)
    noise = cases.unit_noise(case, seed=case.seed + 1)
    found = python(case, load(cases.load(folder(case)), path), noise)
    reference = run(hra, case, folder(case), tmp_path, noise, "--adapter", f"{adapter(case, 'r4')}={strength}")
    again = run(hra, case, folder(case), tmp_path, noise, "--adapter", path)
    assert cases.relative(found, reference) <= 1e-4
    assert cases.relative(again, reference) <= 1e-4


def test_a_kohya_export_says_what_it_is(hra, folder, adapter, tmp_path):
    case = BY_NAME["sd15-a"]
    path = tmp_path / "exported.safetensors"
    hra("export", "--model", folder(case), "--adapter", adapter(case, "r8"), "--to", "kohya-lora", "--output", path)
    with safe_open(path, "pt") as file:
        text, keys = file.metadata(), list(file.keys())
    assert text["ss_network_module"] == "networks.lora"
    assert text["ss_network_dim"] == "8" and float(text["ss_network_alpha"]) == 8
    assert all(key.startswith("lora_unet_") and key.count(".") <= 2 for key in keys)
