"""`hra export`, `hra merge`, `hra inspect`, and LoRA files of other programs, against PEFT 0.21.2 and diffusers 0.42.1.

Models and adapters are random and made here (cases.py): none is in the repository. What a file is worth is judged by the latents
of two DDIM steps, which Python draws with the file and with the adapter that it was made from. Random HRA adapters turn the weights
by large angles, and a LoRA of them cancels what it replaces: hence 1e-4 for those.

Two things that diffusers 0.42.1 does with files, as seen here. It looks up a kohya file's alphas of attention layers under names that
do not match, and gives all of them the commonest one: files that must mean the same there have one alpha for all layers, or none. And
`save_lora_weights`, as its training scripts call it, writes `lora.down` for attention and `lora_A` for other layers, but reads all of
a file as its first key is: with other layers adapted it does not read its own files. Here every key counts for itself.
"""

import dataclasses
import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import cases

BY_NAME = {case.name: case for case in cases.CASES}
SMALL = ["sd15-b", "sd21-c"]
STRENGTHS = [-1, 0.25, 0.5, 1.5]


@pytest.fixture
def made(folder):
    """Name of a case -> the case, its folder, unit noise."""
    return lambda name: (BY_NAME[name], folder(BY_NAME[name]), cases.unit_noise(BY_NAME[name], seed=BY_NAME[name].seed + 11))


@pytest.fixture
def export(hra, tmp_path):
    """Runs `hra export`; returns the path and what was printed."""

    def call(to, model, *adapters, name="exported", words=()):
        path = tmp_path / name
        done = hra("export", "--model", model, "--to", to, "--output", path, *words,
                   *(word for adapter in adapters for word in ("--adapter", adapter)))
        assert "difference" in done.stdout, "the file is read back and compared"
        return path, done.stdout

    return call


def with_lora(case, model, path):
    """The pipeline with a LoRA file or folder, as diffusers loads it."""
    pipe = cases.load(model, case.variant)
    if path.is_file():
        pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    else:
        pipe.load_lora_weights(str(path))
    return pipe


def with_peft(case, model, path):
    """The pipeline with PEFT folders: the UNet's, and in text_encoder/ the text encoder's."""
    pipe = cases.with_adapter(cases.load(model, case.variant), path)
    return cases.with_adapter(pipe, path / "text_encoder", "text_encoder") if (path / "text_encoder").is_dir() else pipe


# LoRA that equals an HRA adapter

FORMS = {
    "kohya": ("kohya-lora", "exported.safetensors", with_lora),
    "diffusers": ("diffusers-lora", "exported", with_lora),
    "peft": ("peft-lora", "exported", with_peft),
}


@pytest.mark.parametrize("kind", ["r4", "r3", "r4-gs", "r4-conv", "r4-regex"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SMALL)
def test_a_lora_of_an_hra_adapter_gives_its_latents(made, adapter, export, draw, name, form, kind):
    (case, model, noise), (to, file, load) = made(name), FORMS[form]
    reference = cases.two_steps(cases.adapted(case, model, adapter(case, kind)), noise)
    path, _ = export(to, model, adapter(case, kind), name=file)
    assert cases.relative(cases.two_steps(load(case, model, path), noise), reference) <= 1e-4
    assert cases.relative(draw(model, noise, path, factor=case.factor()), reference) <= 1e-4


def test_a_lora_of_diffusers_may_be_one_file(made, adapter, export):
    case, model, _ = made("sd15-b")
    path, _ = export("diffusers-lora", model, adapter(case, "r2"), name="x.safetensors")
    folder, _ = export("diffusers-lora", model, adapter(case, "r2"))
    found, expected = load_file(path), load_file(folder / "pytorch_lora_weights.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SMALL)
def test_a_lora_of_both_parts_gives_their_latents(made, adapter, export, draw, name, form):
    (case, model, noise), (to, file, load) = made(name), FORMS[form]
    given = [adapter(case, "r4-conv"), adapter(case, "text-r4")]
    reference = cases.two_steps(cases.adapted(case, model, *given), noise)
    path, _ = export(to, model, *given, name=file)
    assert cases.relative(cases.two_steps(load(case, model, path), noise), reference) <= 1e-4
    assert cases.relative(draw(model, noise, path, factor=case.factor()), reference) <= 1e-4


def test_a_kohya_file_has_kohyas_names(made, adapter, export):
    case, model, _ = made("sd15-b")
    path, _ = export("kohya-lora", model, adapter(case, "r4-conv"), adapter(case, "text-r4"), name="x.safetensors")
    pipe = cases.load(model)
    layers = {f"lora_unet_{name.replace('.', '_')}" for name, _ in pipe.unet.named_modules()}
    layers |= {f"lora_te_text_model_{name.replace('.', '_')}" for name, _ in pipe.text_encoder.named_modules()}
    stored = load_file(path)
    assert {key.partition(".")[0] for key in stored} < layers
    assert {key.partition(".")[2] for key in stored} - {"alpha"} == {"lora_down.weight", "lora_up.weight"}


@pytest.mark.parametrize("form", FORMS)
def test_adapters_on_different_layers_become_one_lora(made, adapter, export, form):
    """Ranks differ by layer then: 4 + 4 in attn2, 4 elsewhere. What diffusers makes of unequal alphas is said above."""
    (case, model, noise), (to, file, load) = made("sd15-b"), FORMS[form]
    pipe = cases.load(model)
    for kind in ("r4", "r4-regex"):
        cases.merge(cases.with_adapter(pipe, adapter(case, kind)))
    path, _ = export(to, model, adapter(case, "r4"), adapter(case, "r4-regex"), name=file)
    assert cases.relative(cases.two_steps(load(case, model, path), noise), cases.two_steps(pipe, noise)) <= 1e-4


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("name, kind", [("sd15-b", "r4"), ("sd15-b", "r4-conv"), ("sd21-c", "r4-conv"), ("sd21-c", "r3")])
def test_an_export_at_a_strength_is_the_adapter_at_that_strength(made, adapter, export, draw, name, kind, strength):
    case, model, noise = made(name)
    given = adapter(case, kind)
    reference = draw(model, noise, f"{given}={strength}", factor=case.factor())
    assert cases.relative(reference, draw(model, noise, given, factor=case.factor())) > 1e-3
    path, _ = export("kohya-lora", model, f"{given}={strength}", name="a.safetensors")
    assert cases.relative(cases.two_steps(with_lora(case, model, path), noise), reference) <= 1e-4


@pytest.mark.parametrize("dtype, bound", [("f16", 5e-3), ("bf16", 4e-2)])
@pytest.mark.parametrize("form", FORMS)
def test_a_lora_in_half_precision(made, adapter, export, form, dtype, bound):
    (case, model, noise), (to, file, load) = made("sd15-b"), FORMS[form]
    reference = cases.two_steps(cases.adapted(case, model, adapter(case, "r4")), noise)
    path, _ = export(to, model, adapter(case, "r4"), name=file, words=["--dtype", dtype])
    files = [path] if path.is_file() else list(path.glob("*.safetensors"))
    kinds = {t.dtype for f in files for key, t in load_file(f).items() if "alpha" not in key}
    assert kinds == {{"f16": torch.float16, "bf16": torch.bfloat16}[dtype]}
    assert cases.relative(cases.two_steps(load(case, model, path), noise), reference) <= bound


def merged_weights(case, model, *adapters):
    """Tensors of a part after PEFT has merged the adapters, for each of the parts."""
    pipe = cases.merge(cases.adapted(case, model, *adapters))
    return {part: getattr(pipe, part).state_dict() for part in ("unet", "text_encoder", "vae")}


@pytest.mark.parametrize("method", ["oft", "boft-layers", "dora"])
def test_other_methods_become_the_nearest_lora_of_a_rank(made, adapter, export, method):
    """The best of rank 6 in each layer: what is left is the change's singular values beyond the sixth."""
    case, model, _ = made("sd15-b")
    given, rank = adapter(case, method), 6
    path, told = export("kohya-lora", model, given, name="x.safetensors", words=["--rank", rank])
    assert "%" in told or "energy" in told, "how much is kept must be told"
    stored, after = load_file(path), merged_weights(case, model, given)["unet"]
    before = cases.load(model).unet.state_dict()
    layers = [name.removesuffix(".weight") for name in after if not torch.equal(after[name], before[name])]
    assert layers and len(layers) == sum(key.endswith("lora_down.weight") for key in stored)
    for layer in layers:
        change = (after[f"{layer}.weight"] - before[f"{layer}.weight"]).double().flatten(1)
        key = f"lora_unet_{layer.replace('.', '_')}"
        up, down = (stored[f"{key}.lora_{side}.weight"].double().flatten(1) for side in ("up", "down"))
        scale = float(stored.get(f"{key}.alpha", torch.tensor(len(down)))) / len(down)
        assert len(down) <= rank
        values = torch.linalg.svdvals(change)
        left = (change - scale * up @ down).norm()
        assert abs(left - values[rank:].norm()) <= 1e-4 * change.norm(), layer


# PEFT folders, whole models, checkpoints


@pytest.mark.parametrize("method", ["r4-gs", "r8-bias", "lora-layers", "dora", "oft", "coft", "boft-blocks", "hra-all"])
def test_a_peft_folder_is_read_by_peft(made, adapter, export, method):
    case, model, noise = made("sd21-c")
    given = adapter(case, method)
    path, _ = export("peft", model, given)
    reference = cases.two_steps(cases.adapted(case, model, given), noise)
    assert cases.relative(cases.two_steps(with_peft(case, model, path), noise), reference) <= 1e-5


@pytest.mark.parametrize("strength", STRENGTHS)
def test_a_peft_folder_at_a_strength(made, adapter, export, draw, strength):
    """An HRA adapter at a strength is an HRA adapter."""
    case, model, noise = made("sd21-c")
    given = adapter(case, "r4-conv")
    path, _ = export("peft", model, f"{given}={strength}")
    reference = draw(model, noise, f"{given}={strength}", factor=case.factor())
    assert cases.relative(cases.two_steps(with_peft(case, model, path), noise), reference) <= 1e-4


MODELS = [
    ("sd15-a", ["r4-conv", "text-r4"]), ("sd15-b", ["hra-all"]), ("sd15-c", ["lora-layers", "text-lora"]),
    ("sd21-a", ["dora-layers"]), ("sd21-b", ["r4-gs", "text-oft"]), ("sd21-c", ["boft-all"]), ("sd15-b", ["coft"]),
]


@pytest.mark.parametrize("name, methods", MODELS)
def test_a_merged_model_is_what_peft_merges(made, adapter, export, name, methods):
    case, model, _ = made(name)
    given = [adapter(case, method) for method in methods]
    path, _ = export("merged", model, *given, words=["--dtype", "f32"])
    pipe, expected = cases.load(path), merged_weights(case, model, *given)
    changed = 0
    for part, tensors in expected.items():
        found = getattr(pipe, part).state_dict()
        assert found.keys() == tensors.keys()
        before = getattr(cases.load(model, case.variant), part).state_dict()
        for key, tensor in tensors.items():
            if torch.equal(tensor, before[key]):
                assert torch.equal(found[key], tensor), f"{part} {key}: not to be changed"
            else:
                changed += 1
                assert cases.relative(found[key], tensor) <= 1e-5, f"{part} {key}"
    assert changed
    files = [f.relative_to(path) for f in path.rglob("*") if f.is_file()]
    assert not [f for f in files if f.suffix == ".md" or f.name.startswith("adapter")]


@pytest.mark.parametrize("name, methods", [
    ("sd15-a", ["r4-conv", "text-r4"]), ("sd15-c", ["r4"]), ("sd21-a", ["r4-conv", "text-r4"]), ("sd21-b", ["lora-layers"])])
def test_a_checkpoint_converts_back_to_the_same_tensors(made, adapter, export, draw, name, methods):
    case, model, noise = made(name)
    given = [adapter(case, method) for method in methods]
    merged, _ = export("merged", model, *given, words=["--dtype", "f32"])
    path, _ = export("checkpoint", model, *given, name="x.safetensors", words=["--dtype", "f32"])
    pipe = StableDiffusionPipeline.from_single_file(
        str(path), config=str(merged), local_files_only=True, safety_checker=None, torch_dtype=torch.float32)
    expected = cases.load(merged)
    for part in ("unet", "text_encoder", "vae"):
        found, tensors = getattr(pipe, part).state_dict(), getattr(expected, part).state_dict()
        assert found.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert found[key].device.type == "cpu" and torch.equal(found[key], tensor), f"{part} {key}"
    reference = cases.two_steps(expected, noise)
    found = draw(path, noise, factor=case.factor(), words=["--config", merged])
    assert cases.relative(found, reference) <= 1e-5


def test_a_checkpoint_in_half_precision(made, adapter, export):
    case, model, _ = made("sd15-a")
    path, _ = export("checkpoint", model, adapter(case, "r4"), name="x.safetensors", words=["--dtype", "f16"])
    kinds = {t.dtype for key, t in load_file(path).items() if key.startswith("model.diffusion_model.")}
    assert kinds == {torch.float16}


# LoRA files that other programs wrote


def injected(case, model, targets, text_targets, seed, **settings):
    """The pipeline with random LoRA layers put in by diffusers and transformers."""
    torch.manual_seed(seed)
    pipe = cases.load(model, case.variant)
    pipe.unet.add_adapter(LoraConfig(target_modules=targets, init_lora_weights=False, **settings))
    if text_targets:
        pipe.text_encoder.add_adapter(
            LoraConfig(target_modules=text_targets, init_lora_weights=False, r=settings["r"], lora_alpha=settings["lora_alpha"]),
            adapter_name="default")
    return pipe


def lora_layers(part):
    """Name, down, up, rank and alpha of each LoRA layer."""
    for name, module in part.named_modules():
        if hasattr(module, "lora_A"):
            down, up = module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach()
            rank = down.shape[0]
            yield name, module, down.contiguous(), up.contiguous(), module.scaling["default"] * rank


def write_kohya(pipe, path, alpha=True):
    tensors = {}
    for prefix, part in (("lora_unet_", pipe.unet), ("lora_te_text_model_", pipe.text_encoder)):
        for name, module, down, up, scale in lora_layers(part):
            key = prefix + name.replace(".", "_")
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            if alpha:
                tensors[f"{key}.alpha"] = torch.tensor(float(scale))
            for vector in getattr(module, "lora_magnitude_vector", {}).values():
                size = vector.weight.numel()
                tensors[f"{key}.dora_scale"] = vector.weight.detach().reshape(size, *[1] * (down.dim() - 1)).contiguous()
    save_file(tensors, path)


def write_diffusers(pipe, path, metadata=False):
    layers = {
        f"{part}_lora_layers": convert_state_dict_to_diffusers(get_peft_model_state_dict(getattr(pipe, part)))
        for part in ("unet", "text_encoder")}
    told = _collate_lora_metadata({"unet": pipe.unet, "text_encoder": pipe.text_encoder}) if metadata else {}
    StableDiffusionPipeline.save_lora_weights(str(path.parent), weight_name=path.name, **layers, **told)


def write_processors(pipe, path, prefix="unet."):
    """The names of attention processors (diffusers before 0.22)."""
    tensors = {}
    for name, _, down, up, _ in lora_layers(pipe.unet):
        layer, _, kind = name.removesuffix(".0").rpartition(".")
        for side, tensor in (("down", down), ("up", up)):
            tensors[f"{prefix}{layer}.processor.{kind}_lora.{side}.weight"] = tensor
    for name, _, down, up, _ in lora_layers(pipe.text_encoder):
        layer, _, kind = name.rpartition(".")
        kind = kind.replace("_proj", "")
        for side, tensor in (("down", down), ("up", up)):
            tensors[f"text_encoder.text_model.{layer}.to_{kind}_lora.{side}.weight"] = tensor
    save_file(tensors, path)


def write_unet(pipe, path):
    pipe.unet.save_lora_adapter(str(path.parent), weight_name=path.name)


TEXT = cases.TEXT_ATTENTION
PLAIN, SCALED = dict(r=4, lora_alpha=4), dict(r=4, lora_alpha=7)
# How the file is written; the layers; rank and alpha; whether diffusers reads it with the meaning that it was written with.
WRITERS = {
    "kohya": (write_kohya, cases.LAYERS, TEXT + ["fc1", "fc2"], SCALED, True),
    "kohya-no-alpha": (lambda *a: write_kohya(*a, alpha=False), cases.LAYERS, TEXT, PLAIN, True),
    "kohya-many-alphas": (
        write_kohya, cases.LAYERS, TEXT,
        SCALED | dict(rank_pattern={"conv1": 2, "attn2.to_k": 3}, alpha_pattern={"proj_in": 1, "attn1.to_q": 2.5}), False),
    "kohya-dora": (write_kohya, cases.LAYERS, [], SCALED | dict(use_dora=True), False),
    "diffusers": (write_diffusers, cases.ATTENTION, TEXT + ["fc1"], PLAIN, True),
    "diffusers-metadata": (lambda *a: write_diffusers(*a, metadata=True), cases.ATTENTION, TEXT, SCALED, True),
    "diffusers-mixed": (lambda *a: write_diffusers(*a, metadata=True), cases.LAYERS, TEXT, SCALED, False),
    "unet": (write_unet, cases.LAYERS, [], SCALED, True),
    "processors": (write_processors, cases.ATTENTION, TEXT, PLAIN, True),
    "processors-bare": (lambda *a: write_processors(*a, prefix=""), cases.ATTENTION, [], PLAIN, True),
}


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("name", SMALL)
def test_lora_files_of_other_programs_give_their_latents(made, draw, tmp_path, name, form):
    case, model, noise = made(name)
    write, targets, text_targets, settings, understood = WRITERS[form]
    pipe = injected(case, model, targets, text_targets, case.seed + 12, **settings)
    if settings.get("use_dora"):
        with torch.no_grad():
            for _, module, *_ in lora_layers(pipe.unet):
                weight = module.lora_magnitude_vector["default"].weight
                weight *= 1 + 0.2 * torch.randn(weight.shape)
    reference, path = cases.two_steps(pipe, noise), tmp_path / "lora.safetensors"
    write(pipe, path)
    if understood:
        again = cases.load(model, case.variant)
        if form in ("unet", "processors-bare"):
            again.unet.load_lora_adapter(str(tmp_path), prefix=None, weight_name=path.name)
        else:
            again = with_lora(case, model, path)
        assert cases.relative(cases.two_steps(again, noise), reference) <= 1e-5, "diffusers reads this otherwise"
    assert cases.relative(draw(model, noise, path, factor=case.factor()), reference) <= 1e-5
    assert cases.relative(draw(model, noise, f"{path}=0", factor=case.factor()), reference) > 1e-2


def test_a_lora_folder_of_diffusers_is_read(made, draw, tmp_path):
    case, model, noise = made("sd15-b")
    pipe = injected(case, model, cases.ATTENTION, TEXT, case.seed + 13, **PLAIN)
    (tmp_path / "lora").mkdir()
    write_diffusers(pipe, tmp_path / "lora/pytorch_lora_weights.safetensors")
    found = draw(model, noise, tmp_path / "lora", factor=case.factor())
    assert cases.relative(found, cases.two_steps(pipe, noise)) <= 1e-5


def test_an_export_meets_another_base_with_a_word(made, adapter, export, hra, folder):
    """The model's hash is in the file: on other weights it is refused, or there is a warning."""
    case, model, _ = made("sd21-c")
    path, _ = export("kohya-lora", model, adapter(case, "r4"), name="x.safetensors")
    other = folder(dataclasses.replace(case, name="other", seed=case.seed + 1000))
    words = ["--adapter", path, "--prompt", "x", "--steps", 1, "--width", case.width, "--height", case.height,
             "--output", path.parent / "pictures"]
    assert "warning" not in hra("sample", "--model", model, *words).stderr.lower()
    try:
        told = hra("sample", "--model", other, *words).stderr
    except AssertionError as refused:
        told = "warning: " + str(refused).partition("\nexit ")[2]
    assert "warning" in told.lower() and "base" in told.lower(), told


# Merging adapters, and looking at them


def in_order(case, model, *adapters):
    """The pipeline with several active HRA adapters: W D_1 D_2 and so on."""
    pipe = cases.load(model, case.variant)
    unet = PeftModel.from_pretrained(pipe.unet, adapters[0], adapter_name="a0")
    for i, folder in enumerate(adapters[1:], 1):
        unet.load_adapter(folder, adapter_name=f"a{i}")
    unet.base_model.set_adapter([f"a{i}" for i in range(len(adapters))])
    pipe.unet = unet.eval()
    return pipe


@pytest.mark.parametrize("kinds", [("r4", "r2"), ("r2", "r4"), ("r4-conv", "r2"), ("r4", "r3"), ("r4-gs", "r2"), ("r4", "r4-regex")])
@pytest.mark.parametrize("name", SMALL)
def test_a_chain_of_two_is_pefts_two_in_order(made, adapter, hra, draw, tmp_path, name, kinds):
    case, model, noise = made(name)
    given = [adapter(case, kind) for kind in kinds]
    hra("merge", f"{given[0]}=1", f"{given[1]}=1", "--how", "chain", "--output", tmp_path / "chain")
    reference = cases.two_steps(in_order(case, model, *given), noise)
    found = cases.two_steps(cases.adapted(case, model, tmp_path / "chain"), noise)
    assert cases.relative(found, reference) <= 2e-5
    assert cases.relative(draw(model, noise, *given, factor=case.factor()), reference) <= 2e-5
    assert cases.relative(draw(model, noise, tmp_path / "chain", factor=case.factor()), reference) <= 2e-5


def test_a_chain_with_strengths(made, adapter, hra, draw, tmp_path):
    case, model, noise = made("sd21-c")
    given = [f"{adapter(case, 'r4')}=0.8", f"{adapter(case, 'r2')}=0.6"]
    hra("merge", *given, "--how", "chain", "--output", tmp_path / "chain")
    reference = draw(model, noise, *given, factor=case.factor())
    found = cases.two_steps(cases.adapted(case, model, tmp_path / "chain"), noise)
    assert cases.relative(found, reference) <= 1e-4


def test_the_geodesic_mean_of_an_adapter_with_itself_is_the_adapter(made, adapter, hra, tmp_path):
    case, model, noise = made("sd21-c")
    given = adapter(case, "r4")
    hra("merge", f"{given}=0.3", f"{given}=0.7", "--how", "geodesic", "--output", tmp_path / "mean")
    found, reference = (cases.two_steps(cases.adapted(case, model, f), noise) for f in (tmp_path / "mean", given))
    assert cases.relative(found, reference) <= 1e-4


def test_the_geodesic_mean_of_two_is_an_hra_adapter_between_them(made, adapter, hra, tmp_path):
    case, model, noise = made("sd21-c")
    given = [adapter(case, "r4"), adapter(case, "r2")]
    hra("merge", f"{given[0]}=0.5", f"{given[1]}=0.5", "--how", "geodesic", "--output", tmp_path / "mean")
    assert json.loads((tmp_path / "mean/adapter_config.json").read_text())["peft_type"] == "HRA"
    found, *ends = (cases.two_steps(cases.adapted(case, model, f), noise) for f in (tmp_path / "mean", *given))
    assert found.isfinite().all() and all(cases.relative(found, end) > 1e-2 for end in ends)


@pytest.mark.parametrize("method", ["r4-conv", "hra-all", "lora-layers", "dora", "oft", "coft", "boft", "text-r4"])
def test_inspect_tells_of_an_adapter_in_json(made, adapter, hra, method):
    case, model, _ = made("sd15-b")
    given = adapter(case, method)
    told = json.loads(hra("inspect", given, "--json").stdout)
    assert isinstance(told, dict)
    assert told, "something is told"
    if "bias" not in method and "all" not in method:
        assert str(sum(t.numel() for t in load_file(given / "adapter_model.safetensors").values())) in json.dumps(told)
    assert isinstance(json.loads(hra("inspect", given, "--model", model, "--json").stdout), dict)


def test_inspect_sees_what_is_wrong_with_a_file(made, adapter, hra, tmp_path):
    case, _, _ = made("sd15-b")
    given = adapter(case, "r4")
    stored = load_file(given / "adapter_model.safetensors")
    broken = next(iter(stored))
    stored[broken][0, 0] = float("nan")
    save_file(stored, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((given / "adapter_config.json").read_text())
    assert "nan" in hra("inspect", tmp_path).stdout.lower()
    found, healthy = (json.loads(hra("inspect", f, "--json").stdout) for f in (tmp_path, given))
    assert broken.removeprefix("base_model.model.").removesuffix(".hra_u") in json.dumps(found)
    assert isinstance(healthy, dict)


def test_inspect_reads_lora_files(made, hra, tmp_path):
    case, model, _ = made("sd15-b")
    write_kohya(injected(case, model, cases.ATTENTION, TEXT, case.seed + 14, **PLAIN), tmp_path / "x.safetensors")
    assert "lora" in json.dumps(json.loads(hra("inspect", tmp_path / "x.safetensors", "--json").stdout)).lower()
