"""An adapter that `hra train` wrote, in Python PEFT 0.21.2: same names, shapes and fields, same output (1e-5).

The binary has no raw UNet call, so two DDIM steps stand for one; PEFT runs the adapter both unmerged and merged.
"""

import json
import warnings

import pytest
import torch
from PIL import Image
from peft import HRAConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import cases

PROMPT = "a fluent 3d emoji of a sks cat face on a blue background"
CLASS_PROMPT = "a fluent 3d emoji of a cat face"
# name: (flags of `hra train`, settings of HRAConfig)
VARIANTS = {
    "plain": ([], {}),
    "bias": (["--bias", "hra_only"], {"bias": "hra_only"}),
}
# Fields that we add to adapter_config.json and PEFT does not know; it warns of each, and goes on.
OWN_FIELDS = set()


@pytest.fixture(scope="module", params=VARIANTS)
def trained(request, hra, tmp_path_factory):
    """(run folder, settings of HRAConfig) after five steps on drawn pictures."""
    flags, settings = VARIANTS[request.param]
    root = tmp_path_factory.mktemp("trained")
    (root / "subject").mkdir()
    for i, colour in enumerate([(250, 215, 70), (60, 120, 220), (255, 255, 255)]):
        picture = Image.new("RGB", (96, 96), colour)
        picture.paste((200 - 40 * i, 90, 30), (24, 24 + 6 * i, 72, 72))
        picture.save(root / "subject" / f"{i}.png")
    hra("train", "--pretrained_model_name_or_path", cases.tiny_sd(), "--instance_data_dir", root / "subject",
        "--instance_prompt", PROMPT, "--with_prior_preservation", "--class_prompt", CLASS_PROMPT,
        "--num_class_images", 4, "--method", "hra", "--rank", 8, "--learning_rate", 3e-3, "--train_batch_size", 2,
        "--resolution", 64, "--max_train_steps", 5, "--seed", 3, "--output_dir", root / "out", *flags)
    return root / "out", settings


def peft(folder):
    return PeftModel.from_pretrained(cases.load(cases.tiny_sd()).unet, folder).eval()


def test_names_shapes_and_types_are_those_that_peft_saves(trained, tmp_path):
    out, settings = trained
    model = get_peft_model(
        cases.load(cases.tiny_sd()).unet, HRAConfig(r=8, target_modules=cases.ATTENTION, **settings))
    model.save_pretrained(tmp_path)
    tensors = [load_file(f / "adapter_model.safetensors") for f in (out, tmp_path)]
    found, expected = [{k: (tuple(t.shape), t.dtype) for k, t in side.items()} for side in tensors]
    assert found == expected
    assert all(t.isfinite().all() for t in tensors[0].values())


def test_the_config_has_pefts_fields_and_loads_without_a_warning(trained, tmp_path):
    out, settings = trained
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        config = HRAConfig.from_pretrained(out)
    assert not [str(w.message) for w in seen if not any(field in str(w.message) for field in OWN_FIELDS)]
    assert config.peft_type == "HRA" and config.r == 8 and config.apply_GS is False
    assert config.target_modules == set(cases.ATTENTION) and config.bias == settings.get("bias", "none")
    HRAConfig(r=8, target_modules=cases.ATTENTION).save_pretrained(tmp_path)
    fields = [set(json.loads((f / "adapter_config.json").read_text())) for f in (out, tmp_path)]
    assert fields[1] <= fields[0] <= fields[1] | OWN_FIELDS | {"auto_mapping"}


def test_peft_reads_every_tensor_of_the_file(trained):
    out, _ = trained
    stored = load_file(out / "adapter_model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of missing keys
        model = peft(out)
    own = {k.replace(".default", ""): v for k, v in model.state_dict().items()}
    for name, tensor in stored.items():
        assert torch.equal(own[name], tensor), name
    assert sum("hra_u" in name for name in own) == sum("hra_u" in name for name in stored) == 56


@pytest.mark.parametrize("merged", [False, True], ids=["live", "merged"])
def test_peft_gives_the_same_output(trained, hra, tmp_path, merged):
    out, _ = trained
    noise = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(5))
    save_file({"latents": noise}, tmp_path / "noise.safetensors")
    words = ["--model", cases.tiny_sd(), "--prompt", PROMPT, "--negative-prompt", "", "--scheduler", "ddim",
             "--steps", 2, "--guidance", 4, "--height", 64, "--width", 64, "--latents", tmp_path / "noise.safetensors"]
    hra("sample", *words, "--adapter", out, "--save-latents", tmp_path / "a.safetensors", "--output", tmp_path / "a")
    hra("sample", *words, "--save-latents", tmp_path / "b.safetensors", "--output", tmp_path / "b")
    adapted, base = [load_file(tmp_path / f"{x}.safetensors")["latents"] for x in "ab"]

    def python(unet):
        pipe = cases.load(cases.tiny_sd())
        pipe.unet = unet or pipe.unet
        return cases.sample(pipe, "ddim", PROMPT, "", height=64, width=64, noise=noise, steps=2, guidance=4.0)

    model = peft(out)
    reference = python(model.merge_and_unload() if merged else model)
    assert cases.relative(adapted, reference) <= 1e-5
    assert cases.relative(base, python(None)) <= 1e-5
    assert cases.relative(adapted, base) > 1e-3, "the adapter must have moved the output for this to mean anything"
