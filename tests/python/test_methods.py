"""Adapters of every method, both ways: what `hra train` wrote in PEFT 0.21.2 and diffusers, and what PEFT wrote in `hra sample`.

The binary has no raw UNet call, so two DDIM steps stand for one (cases.two_steps). Relative errors are norms of differences over
norms of references. f32 against f64 in Python alone gives up to 3e-6 after two steps, with solves, Neumann sums and norms of
rows (DoRA) up to 5e-6; the two programs also sum in different orders.
"""

import dataclasses
import json
import warnings

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from peft import BOFTConfig, HRAConfig, IA3Config, LoraConfig, OFTConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import cases

TARGETS = {"target_modules": set(cases.ATTENTION)}
LAYERS = {"target_modules": set(cases.LAYERS)}
FLAGGED_LAYERS = ["--target_modules", ",".join(cases.LAYERS)]
LORA = dict(r=4, lora_alpha=4, use_dora=False, use_rslora=False, lora_bias=False, rank_pattern={}, alpha_pattern={}, bias="none")
OFT = dict(r=4, oft_block_size=0, coft=False, use_cayley_neumann=False, block_share=False, bias="none")
BOFT = dict(boft_block_num=4, boft_block_size=0, boft_n_butterfly_factor=1, bias="none")
EPS = 1e-4


@dataclasses.dataclass(frozen=True)
class Run:
    """Flags of `hra train`, and what the file must say: the class of the settings and its fields."""

    flags: list
    config: type = None
    fields: dict = dataclasses.field(default_factory=dict)
    text: bool = False


RUNS = {
    "hra": Run(["--method", "hra", "--rank", 4], HRAConfig, dict(r=4, apply_GS=False, bias="none") | TARGETS),
    "hra-gs": Run(["--method", "hra", "--rank", 4, "--gram-schmidt"], HRAConfig, dict(r=4, apply_GS=True) | TARGETS),
    "hra-only": Run(["--method", "hra", "--rank", 4, "--bias", "only"], HRAConfig, dict(r=4, bias="hra_only") | TARGETS),
    "hra-all": Run(["--method", "hra", "--rank", 4, "--bias", "all"], HRAConfig, dict(r=4, bias="all") | TARGETS),
    "hra-layers": Run(["--method", "hra", "--rank", 4, *FLAGGED_LAYERS], HRAConfig, dict(r=4) | LAYERS),
    "hra-regex": Run(
        ["--method", "hra", "--rank", 4, "--target_modules", r".*attn2\.to_[qkv]"], HRAConfig,
        dict(r=4, target_modules=r".*attn2\.to_[qkv]")),
    "hra-text": Run(
        ["--method", "hra", "--rank", 4, "--train_text_encoder", "--text_encoder_lr", 1e-3], HRAConfig, dict(r=4), text=True),
    "lora": Run(["--method", "lora", "--rank", 4], LoraConfig, LORA | TARGETS),
    "lora-rs": Run(
        ["--method", "lora", "--rank", 4, "--lora-alpha", 3, "--use-rslora", "--init-lora-weights", "kaiming"], LoraConfig,
        LORA | dict(lora_alpha=3, use_rslora=True) | TARGETS),
    "lora-all": Run(["--method", "lora", "--rank", 4, "--bias", "all"], LoraConfig, LORA | dict(bias="all") | TARGETS),
    "lora-layers": Run(["--method", "lora", "--rank", 4, *FLAGGED_LAYERS], LoraConfig, LORA | LAYERS),
    "lora-text": Run(
        ["--method", "lora", "--rank", 4, "--train_text_encoder", "--text_target_modules", "q_proj,out_proj,fc1"], LoraConfig, LORA,
        text=True),
    "dora": Run(["--method", "dora", "--rank", 4], LoraConfig, LORA | dict(use_dora=True) | TARGETS),
    "dora-layers": Run(["--method", "dora", "--rank", 4, *FLAGGED_LAYERS], LoraConfig, LORA | dict(use_dora=True) | LAYERS),
    "oft": Run(["--method", "oft", "--rank", 4], OFTConfig, OFT | TARGETS),
    "oft-b16": Run(["--method", "oft", "--block-size", 16], OFTConfig, OFT | dict(r=0, oft_block_size=16) | TARGETS),
    "coft": Run(["--method", "coft", "--rank", 4, "--coft-eps", EPS], OFTConfig, OFT | dict(eps=EPS) | TARGETS),
    "boft": Run(["--method", "boft", "--rank", 4], BOFTConfig, BOFT | TARGETS),
    "boft-b8": Run(
        ["--method", "boft", "--block-size", 8, "--bias", "only"], BOFTConfig,
        BOFT | dict(boft_block_num=0, boft_block_size=8, bias="boft_only") | TARGETS),
    "ia3": Run(["--method", "ia3"], IA3Config, dict(feedforward_modules=set()) | TARGETS),
    "full": Run(["--method", "full", "--learning_rate", 1e-4]),
}
ADAPTERS = {name: run for name, run in RUNS.items() if run.config}
PARTS = [(name, part) for name, run in ADAPTERS.items() for part in ("unet", "text_encoder")[:1 + run.text]]


@pytest.fixture(scope="module")
def trained(hra, tmp_path_factory):
    """Name in RUNS -> run folder after four steps on drawn pictures, each made once."""
    pictures, made = tmp_path_factory.mktemp("subject"), {}
    for i, colour in enumerate([(250, 215, 70), (60, 120, 220), (255, 255, 255)]):
        picture = Image.new("RGB", (96, 96), colour)
        picture.paste((200 - 40 * i, 90, 30), (24, 24 + 6 * i, 72, 72))
        picture.save(pictures / f"{i}.png")

    def get(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "out"
            rate = [] if "--learning_rate" in RUNS[name].flags else ["--learning_rate", 3e-3]
            hra("train", "--pretrained_model_name_or_path", cases.tiny_sd(), "--instance_data_dir", pictures,
                "--instance_prompt", cases.PROMPT, "--train_batch_size", 2, "--resolution", 32, "--max_train_steps", 4,
                "--seed", 3, "--output_dir", made[name], *rate, *RUNS[name].flags)
        return made[name]

    return get


def part_folder(out, part):
    return out if part == "unet" else out / part


def loaded(out, part):
    """The PEFT model of a part of the embedded model, and what was warned of."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(getattr(cases.load(cases.tiny_sd()), part), part_folder(out, part))
    return model.eval(), [str(w.message) for w in seen]


@pytest.mark.parametrize("name, part", PARTS)
def test_the_config_has_pefts_fields_and_loads_without_a_warning(trained, tmp_path, name, part):
    folder, run = part_folder(trained(name), part), ADAPTERS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of fields that it does not know
        config = PeftConfig.from_pretrained(folder)
    assert type(config) is run.config
    found = {field: getattr(config, field) for field in run.fields if part == "unet" or field != "target_modules"}
    assert found == {field: run.fields[field] for field in found}
    model = getattr(cases.load(cases.tiny_sd()), part)
    named = {field: getattr(config, field) for field in ("target_modules", "feedforward_modules") if hasattr(config, field)}
    get_peft_model(model, run.config(**named)).save_pretrained(tmp_path)
    ours, pefts = (json.loads((f / "adapter_config.json").read_text()) for f in (folder, tmp_path))
    assert ours.keys() == pefts.keys()
    assert ours["auto_mapping"] == pefts["auto_mapping"] and ours["peft_type"] == pefts["peft_type"]


@pytest.mark.parametrize("name, part", PARTS)
def test_peft_reads_every_tensor_of_the_file_and_would_write_the_same(trained, name, part):
    out = trained(name)
    stored = load_file(part_folder(out, part) / "adapter_model.safetensors")
    model, warned = loaded(out, part)
    assert not [w for w in warned if any(word in w for word in ("missing", "unexpected", "adapter keys", "Adjusted"))]
    read = get_peft_model_state_dict(model)
    assert read.keys() == stored.keys()
    for key, tensor in stored.items():
        assert tensor.dtype == torch.float32 and tensor.isfinite().all() and torch.equal(read[key], tensor), key


def test_targets_of_the_text_encoder_are_those_asked_for(trained):
    assert PeftConfig.from_pretrained(trained("hra-text") / "text_encoder").target_modules == set(cases.TEXT_ATTENTION)
    assert PeftConfig.from_pretrained(trained("lora-text") / "text_encoder").target_modules == {"q_proj", "out_proj", "fc1"}


@pytest.fixture(scope="module")
def base():
    """Unit noise for the embedded model, and what Python makes of it without an adapter."""
    noise = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(5))
    return noise, cases.two_steps(cases.load(cases.tiny_sd()), noise)


@pytest.mark.parametrize("name", RUNS)
def test_python_gives_what_the_run_gives(trained, draw, base, name):
    out, (noise, without) = trained(name), base
    pipe = cases.load(cases.tiny_sd())
    found = draw(cases.tiny_sd(), noise, out, factor=pipe.vae_scale_factor)
    if name == "full":
        pipe.unet = UNet2DConditionModel.from_pretrained(out, subfolder="unet")
        assert cases.relative(found, cases.two_steps(pipe, noise)) <= 1e-5
    else:
        for part in ("unet", "text_encoder")[:1 + RUNS[name].text]:
            cases.with_adapter(pipe, part_folder(out, part), part)
        if not (name.startswith("oft") and "layers" in name):  # see cases.MERGED_ONLY
            assert cases.relative(found, cases.two_steps(pipe, noise)) <= 1e-5
        assert cases.relative(found, cases.two_steps(cases.merge(pipe), noise)) <= 1e-5
    assert cases.relative(found, without) > 1e-3, "the adapter must have moved the output for this to mean anything"


def test_the_text_encoder_of_a_run_counts(trained, draw, base):
    """Without it the output is another one, so that the comparison above is one of both."""
    noise, _ = base
    pipe = cases.with_adapter(cases.load(cases.tiny_sd()), trained("hra-text"))
    found = draw(cases.tiny_sd(), noise, trained("hra-text"), factor=pipe.vae_scale_factor)
    assert cases.relative(found, cases.two_steps(pipe, noise)) > 1e-4


def test_a_full_run_is_a_unet_of_diffusers(trained):
    folder = trained("full")
    unet, info = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    before = cases.load(cases.tiny_sd()).unet
    assert {k: v for k, v in unet.config.items() if k[0] != "_"} == {k: v for k, v in before.config.items() if k[0] != "_"}
    start = before.state_dict()
    still = [name for name, tensor in unet.state_dict().items() if torch.equal(tensor, start[name])]
    assert not still, f"not trained: {still[:5]}"


def norms(weight):
    """|S|_F of each block, from the strictly upper triangles that PEFT stores."""
    return (2 * weight.double().square().sum(1)).sqrt()


def test_coft_keeps_every_block_in_its_ball(trained):
    """The paper's radius eps b^2 / sqrt(r), after the last step; some block has reached it."""
    path = trained("coft") / "adapter_model.safetensors"
    filled = []
    for name, weight in load_file(path).items():
        blocks, entries = weight.shape
        size = round((1 + (1 + 8 * entries) ** 0.5) / 2)
        assert blocks == 4 and size * (size - 1) // 2 == entries
        radius = EPS * size**2 / blocks**0.5
        assert norms(weight).max() <= radius * (1 + 1e-5), name
        filled.append(float(norms(weight).max()) / radius)
    assert max(filled) > 0.99
    with safe_open(path, "pt") as file:
        assert float(file.metadata()["coft_eps"]) == EPS
    assert max(float(norms(w).max()) for w in load_file(trained("oft") / "adapter_model.safetensors").values()) > 0.1, "no bound"


# Files that PEFT wrote

BY_NAME = {case.name: case for case in cases.CASES}
SMALL = ["sd15-b", "sd21-c"]


def python(case, model, noise, *adapters, merged=False):
    pipe = cases.adapted(case, model, *adapters)
    return cases.two_steps(cases.merge(pipe) if merged else pipe, noise)


@pytest.mark.parametrize("method", cases.METHODS)
@pytest.mark.parametrize("name", SMALL)
def test_files_of_every_method_give_pythons_latents(draw, folder, adapter, name, method):
    case = BY_NAME[name]
    model, noise = folder(case), cases.unit_noise(case, seed=case.seed + 3)
    given = adapter(case, method)
    found = draw(model, noise, given, factor=case.factor())
    for merged in (True,) if method in cases.MERGED_ONLY else (False, True):
        assert cases.relative(found, python(case, model, noise, given, merged=merged)) <= 1e-5, f"merged: {merged}"
    assert cases.relative(found, python(case, model, noise)) > 1e-2


@pytest.mark.parametrize("method", ["text-r4", "text-lora", "text-oft"])
@pytest.mark.parametrize("name", SMALL)
def test_names_of_before_transformers_5_are_read(draw, folder, adapter, tmp_path, name, method):
    case = BY_NAME[name]
    model, noise, given = folder(case), cases.unit_noise(case, seed=case.seed + 4), adapter(case, method)
    (tmp_path / "old").mkdir()
    stored = load_file(given / "adapter_model.safetensors")
    renamed = {key.replace("base_model.model.", "base_model.model.text_model."): t for key, t in stored.items()}
    save_file(renamed, tmp_path / "old/adapter_model.safetensors", metadata={"format": "pt"})
    (tmp_path / "old/adapter_config.json").write_text((given / "adapter_config.json").read_text())
    reference = python(case, model, noise, given)
    assert cases.relative(draw(model, noise, tmp_path / "old", factor=case.factor()), reference) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["r4", "lora", "oft-exact", "boft"])
def test_files_in_half_precision_are_read_as_peft_reads_them(draw, folder, adapter, tmp_path, method, dtype):
    case = BY_NAME["sd15-b"]
    model, noise, given = folder(case), cases.unit_noise(case, seed=case.seed + 5), adapter(case, method)
    (tmp_path / "half").mkdir()
    halves = {key: t.to(dtype) for key, t in load_file(given / "adapter_model.safetensors").items()}
    save_file(halves, tmp_path / "half/adapter_model.safetensors", metadata={"format": "pt"})
    (tmp_path / "half/adapter_config.json").write_text((given / "adapter_config.json").read_text())
    reference = python(case, model, noise, tmp_path / "half", merged=True)
    assert cases.relative(draw(model, noise, tmp_path / "half", factor=case.factor()), reference) <= 1e-5


@pytest.mark.parametrize("strength", [-0.7, 0.4, 1.6])
@pytest.mark.parametrize("method", ["lora", "lora-rs", "lora-layers"])
def test_the_strength_of_a_lora_is_pefts_scale(draw, folder, adapter, method, strength):
    case = BY_NAME["sd21-c"]
    model, noise, given = folder(case), cases.unit_noise(case, seed=case.seed + 6), adapter(case, method)
    pipe = cases.adapted(case, model, given)
    for module in pipe.unet.modules():
        if hasattr(module, "lora_A"):
            module.set_scale("default", strength)
    assert cases.relative(draw(model, noise, f"{given}={strength}", factor=case.factor()), cases.two_steps(pipe, noise)) <= 1e-5


@pytest.mark.parametrize("name", SMALL)
def test_adapters_of_different_methods_at_once_are_taken_in_order(draw, folder, adapter, name):
    """W goes through one after the other: each is merged into what the one before left."""
    case = BY_NAME[name]
    model, noise = folder(case), cases.unit_noise(case, seed=case.seed + 8)
    names = ["r4-conv", "oft-exact", "lora-layers"]
    pipe = cases.load(model, case.variant)
    for method in names:
        cases.merge(cases.with_adapter(pipe, adapter(case, method)))
    cases.with_adapter(pipe, adapter(case, "text-lora"), "text_encoder")
    found = draw(model, noise, *(adapter(case, method) for method in names), adapter(case, "text-lora"), factor=case.factor())
    assert cases.relative(found, cases.two_steps(pipe, noise)) <= 1e-5


# Strength of HRA: W H^s


@pytest.mark.parametrize("method", ["r4", "r4-gs", "r4-conv", "text-r4"])
def test_hra_at_strengths_whose_result_is_known(draw, folder, adapter, method):
    """H^0 = I, H^1 = H, H^(1/2) H^(1/2) = H, H^(-1) = H^T: the reflections in the other order, as PEFT has it."""
    case = BY_NAME["sd21-c"]
    model, noise, given = folder(case), cases.unit_noise(case, seed=case.seed + 9), adapter(case, method)
    base, full = python(case, model, noise), python(case, model, noise, given)

    def found(*strengths):
        return draw(model, noise, *(f"{given}={s}" for s in strengths), factor=case.factor())

    assert cases.relative(found(0), base) <= 1e-6
    assert cases.relative(found(1), full) <= 1e-5
    assert cases.relative(found(0.5, 0.5), full) <= 2e-5
    assert cases.relative(found(1.5, -0.5), full) <= 2e-5
    back = cases.adapted(case, model, given)
    with torch.no_grad():
        for module in (back.text_encoder if method.startswith("text") else back.unet).modules():
            if hasattr(module, "hra_u"):
                u = module.hra_u["default"]
                if method != "r4-gs":  # whose product is its own inverse
                    u.copy_(u.flip(1))
    assert cases.relative(found(-1), cases.two_steps(back, noise)) <= 1e-5


def test_a_trained_adapter_moves_the_output_more_with_more_strength(trained, draw, base):
    noise, without = base
    factor = cases.load(cases.tiny_sd()).vae_scale_factor
    moved = [cases.relative(draw(cases.tiny_sd(), noise, f"{trained('hra')}={s}", factor=factor), without)
             for s in (0, 0.25, 0.5, 0.75, 1)]
    assert moved[0] <= 1e-6 and all(a < b for a, b in zip(moved, moved[1:])), moved
