"""Stable Diffusion XL in `hra train`, `hra export` and `hra inspect` against diffusers 0.42.1 and PEFT 0.21.2: what a batch is told of
its pictures' sizes, runs on all three networks as Python reads them, LoRA files and whole models as diffusers draws with them.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from torchvision import transforms
from transformers import CLIPTextModel, CLIPTextModelWithProjection

import cases
import xl_cases
from test_xl import PROMPT, SIZE, draw, model, run  # noqa: F401  (model is a fixture)

PARTS = {"unet": "", "text_encoder": "text_encoder", "text_encoder_2": "text_encoder_2"}
RESOLUTION = 32
# Wide and tall, larger and smaller than the resolution, of odd rests.
SHAPES = [(32, 32), (48, 32), (32, 51), (100, 67), (64, 128), (47, 96), (20, 24), (333, 250), (41, 40)]
CLASS_SHAPES = SHAPES[::-1]


def pictures(folder, shapes, seed):
    folder.mkdir()
    for i, (width, height) in enumerate(shapes):
        small = np.random.default_rng(seed + i).integers(0, 256, (4, 3, 3), np.uint8)
        Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def subject(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("subject") / "pictures", SHAPES, 70)


def train(hra, model, subject, out, *words):
    hra("train", "--pretrained_model_name_or_path", model(), "--instance_data_dir", subject, "--instance_prompt", PROMPT,
        "--resolution", RESOLUTION, "--output_dir", out, "--seed", 5, *words)
    return out


# What a step is trained on


MASK = (1 << 64) - 1


def mix(z):
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def derive(seed, purpose, index):
    """The number of a draw: docs of src/platform/seed.rs."""
    golden, fnv = 0x9E3779B97F4A7C15, 0xCBF29CE484222325
    for byte in purpose.encode():
        fnv = ((fnv ^ byte) * 0x100000001B3) & MASK
    start = mix(mix((seed + golden) & MASK) ^ fnv)
    return mix((start + golden * (index + 1)) & MASK)


def prepared(path, crop):
    """A picture as train_dreambooth_lora_sdxl.py has it: its original size, where it is cropped, and the pixels."""
    image = Image.open(path)
    original = (image.height, image.width)
    image = transforms.Resize(RESOLUTION, interpolation=transforms.InterpolationMode.BILINEAR)(image)
    if crop is None:
        top = max(0, int(round((image.height - RESOLUTION) / 2.0)))
        left = max(0, int(round((image.width - RESOLUTION) / 2.0)))
    else:
        left, top = (crop & 0xFFFFFFFF) % (image.width - RESOLUTION + 1), (crop >> 32) % (image.height - RESOLUTION + 1)
    pixels = transforms.functional.crop(image, top, left, RESOLUTION, RESOLUTION)
    return original, (top, left), transforms.ToTensor()(pixels) * 2 - 1


def losses(pipe, folder, count, name, prompt, is_centred, tell=True):
    """The loss of each picture of a first batch that has them all; without `tell` as if all were as large as the crop."""
    unet = SimpleNamespace(config=pipe.unet.config, add_embedding=pipe.unet.add_embedding)
    size = (RESOLUTION, RESOLUTION)
    found = []
    with torch.no_grad():
        states, _, pooled, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
        order = permutation(derive(5, f"{name} order", 0), count)
        for number in range(count):
            def noise(what, like):
                generator = torch.Generator().manual_seed(derive(5, f"{name} {what}", number))
                return torch.randn(like, generator=generator)

            crop = None if is_centred else derive(5, f"{name} crop", number)
            original, corner, pixels = prepared(folder / f"{order[number]}.png", crop)
            told = (original, corner, size) if tell else (size, (0, 0), size)
            ids = StableDiffusionXLPipeline._get_add_time_ids(
                SimpleNamespace(unet=unet), *told, torch.float32, pipe.text_encoder_2.config.projection_dim)
            latent = pipe.vae.encode(pixels[None]).latent_dist
            latents = (latent.mean + latent.std * noise("latent", latent.mean.shape)) * pipe.vae.config.scaling_factor
            added, timestep = noise("noise", latents.shape), torch.tensor([derive(5, f"{name} timestep", number) % 1000])
            product = alphas_cumprod(pipe)[timestep].reshape(-1, 1, 1, 1)
            noisy = product.sqrt() * latents + (1 - product).sqrt() * added
            out = pipe.unet(noisy, timestep, states, added_cond_kwargs=dict(text_embeds=pooled, time_ids=ids)).sample
            found.append((out - added).square().mean().item())
    return np.array(found)


def alphas_cumprod(pipe):
    config = pipe.scheduler.config
    return (1 - torch.linspace(config.beta_start**0.5, config.beta_end**0.5, 1000) ** 2).cumprod(0)


def permutation(seed, n):
    """Fisher and Yates from the end, by SplitMix64; no rejection happens for so few."""
    order, state = list(range(n)), seed
    for last in range(n - 1, 0, -1):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        other = mix(state) % (last + 1)
        order[last], order[other] = order[other], order[last]
    return order


@pytest.mark.parametrize("text", [False, True], ids=["", "text"])
@pytest.mark.parametrize("is_centred", [False, True], ids=["random", "center"])
def test_a_batch_is_told_the_sizes_that_diffusers_prepares(hra, model, subject, tmp_path, is_centred, text):
    others = pictures(tmp_path / "class", CLASS_SHAPES, 170)
    count = len(SHAPES)
    out = train(
        hra, model, subject, tmp_path / "run", "--max_train_steps", 1, "--train_batch_size", count, "--log_every", 1, "--rank", 4,
        "--with_prior_preservation", "--class_data_dir", others, "--class_prompt", "a cat", "--num_class_images", count,
        *(["--center_crop"] if is_centred else []), *(["--train_text_encoder"] if text else []))
    record = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    pipe = xl_cases.load(model())
    for name, folder, prompt, key in (("instance", subject, PROMPT, "loss_instance"), ("class", others, "a cat", "loss_prior")):
        expected = losses(pipe, folder, count, name, prompt, is_centred).mean()
        untold = losses(pipe, folder, count, name, prompt, is_centred, tell=False).mean()
        assert abs(untold - expected) > 1e-4 * expected, "the sizes matter"
        assert abs(record[key] - expected) <= 1e-5 * expected, (name, record[key], expected)


def test_each_text_encoder_has_its_rate(hra, model, subject, tmp_path):
    words = ["--max_train_steps", 2, "--rank", 4, "--train_text_encoder", "--learning_rate", 1e-3]
    moved = {}
    for rates in ("1e-9,1e-2", "1e-2,1e-9", "1e-2"):
        out = train(hra, model, subject, tmp_path / rates, *words, "--text-encoder-lr", rates)
        for part in ("text_encoder", "text_encoder_2"):
            report = json.loads(hra("inspect", out / part, "--json").stdout)["parts"][0]
            moved[rates, part] = max(layer["largest_angle"] for layer in report["layers"])
    assert moved["1e-9,1e-2", "text_encoder"] < 1e-3 < 0.1 < moved["1e-9,1e-2", "text_encoder_2"]
    assert moved["1e-2,1e-9", "text_encoder_2"] < 1e-3 < 0.1 < moved["1e-2,1e-9", "text_encoder"]
    assert min(moved["1e-2", part] for part in ("text_encoder", "text_encoder_2")) > 0.1


# Runs as Python reads them

RUNS = {
    "hra": ["--method", "hra", "--rank", 8],
    "hra-gs": ["--method", "hra", "--rank", 4, "--gram-schmidt"],
    "hra-all": ["--method", "hra", "--rank", 4, "--bias", "all"],
    "lora": ["--method", "lora", "--rank", 4, "--lora-alpha", 8],
    "dora": ["--method", "dora", "--rank", 2],
    "oft": ["--method", "oft", "--block-size", 4],
    "coft": ["--method", "coft", "--block-size", 4, "--coft-eps", 0.5],
    "boft": ["--method", "boft", "--block-size", 4],
    "ia3": ["--method", "ia3"],
}


@pytest.fixture(scope="session")
def trained(hra, model, subject, tmp_path_factory):  # noqa: F811
    """Name of RUNS -> a run on the UNet and both text encoders, far from where it began."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = train(
                hra, model, subject, tmp_path_factory.mktemp(name) / "run", "--max_train_steps", 6, "--train_batch_size", 2,
                "--learning_rate", 2e-2, "--text-encoder-lr", "3e-2,2e-2", "--train_text_encoder", *RUNS[name])
        return made[name]

    return get


def with_adapters(model, folder):
    """The pipeline with the PEFT folders of a run on its three networks."""
    pipe = xl_cases.load(model())
    for part, place in PARTS.items():
        setattr(pipe, part, PeftModel.from_pretrained(getattr(pipe, part), folder / place).eval())
    return pipe


@pytest.mark.parametrize("name", RUNS)
def test_a_run_draws_what_peft_draws_with_it(hra, model, trained, tmp_path, name):
    out = trained(name)
    classes = {"": "UNet2DConditionModel", "text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
    for place, cls in classes.items():
        config = json.loads((out / place / "adapter_config.json").read_text())
        assert config["auto_mapping"]["base_model_class"] == cls
    expected = draw(with_adapters(model, out))
    assert cases.relative(draw(xl_cases.load(model())), expected) > 1e-2, "the adapters do something"
    assert cases.relative(run(hra, tmp_path, model(), "--adapter", out, *SIZE), expected) <= 1e-4


@pytest.mark.parametrize("name", ["hra", "lora", "oft"])
def test_a_training_goes_on_from_adapters_that_peft_saved(hra, model, subject, trained, tmp_path, name):
    """PEFT's own folders of all three networks, as `init_adapter`: with a rate of nothing the run writes them again."""
    pipe = with_adapters(model, trained(name))
    for part, place in PARTS.items():
        getattr(pipe, part).save_pretrained(tmp_path / "peft" / place)
    out = train(hra, model, subject, tmp_path / "run", "--init_adapter", tmp_path / "peft", "--max_train_steps", 1, "--train_text_encoder",
                "--learning_rate", 1e-12, *RUNS[name])
    for place in PARTS.values():
        expected = load_file(tmp_path / "peft" / place / "adapter_model.safetensors")
        found = load_file(out / place / "adapter_model.safetensors")
        assert found.keys() == expected.keys()
        # The first tower's last layer is not looked at, and stays as it began.
        assert all(torch.allclose(found[key], expected[key], rtol=1e-6, atol=1e-9) for key in found)


# Files for other programs


def with_lora(model, path, scale=1.0):
    pipe = xl_cases.load(model())
    pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="one")
    pipe.set_adapters("one", scale)
    return pipe


@pytest.fixture(scope="session")
def exported(hra, model, trained, tmp_path_factory):  # noqa: F811
    """Name of a run, form -> the file or folder."""
    made = {}

    def get(name, form, *words):
        if (name, form) not in made:
            place = tmp_path_factory.mktemp(f"{name}-{form}") / ("x" if form in ("peft", "peft-lora", "merged") else "x.safetensors")
            hra("export", "--model", model(), "--adapter", trained(name), "--to", form, "--output", place, *words)
            made[name, form] = place
        return made[name, form]

    return get


@pytest.mark.parametrize("scale", [-1, 0.5, 1, 1.5])
@pytest.mark.parametrize("form", ["diffusers-lora", "kohya-lora"])
@pytest.mark.parametrize("name", ["hra", "lora"])
def test_a_lora_file_draws_in_diffusers_what_it_draws_here(hra, model, exported, trained, tmp_path, name, form, scale):
    path = exported(name, form)
    expected = draw(with_lora(model, path, scale))
    assert cases.relative(run(hra, tmp_path, model(), "--adapter", f"{path}={scale}", *SIZE), expected) <= 1e-4
    if scale == 1:
        assert cases.relative(draw(with_adapters(model, trained(name))), expected) <= 1e-4


def test_a_kohya_file_has_the_names_of_kohyas_trainer_for_xl(exported):
    keys = load_file(exported("lora", "kohya-lora")).keys()
    starts = ["lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.", "lora_unet_middle_block_1_transformer_blocks_2_attn2_to_v.",
              "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.", "lora_te2_text_model_encoder_layers_2_self_attn_out_proj."]
    for start in starts:
        assert {start + end for end in ("lora_down.weight", "lora_up.weight", "alpha")} <= keys, start


@pytest.mark.parametrize("name", ["oft", "dora"])
def test_other_methods_become_the_nearest_lora_of_a_rank(hra, model, trained, tmp_path, name):
    hra("export", "--model", model(), "--adapter", trained(name), "--to", "kohya-lora", "--rank", 32, "--output", tmp_path / "x.safetensors")
    expected = draw(with_adapters(model, trained(name)))
    # Of the tiny model's widths a rank of 32 is whole.
    assert cases.relative(draw(with_lora(model, tmp_path / "x.safetensors")), expected) <= 1e-4


@pytest.mark.parametrize("form", ["peft", "peft-lora"])
def test_a_peft_folder_draws_in_peft(model, trained, exported, form):
    expected = draw(with_adapters(model, trained("hra")))
    assert cases.relative(draw(with_adapters(model, exported("hra", form))), expected) <= 1e-4


def merged(model, folder):
    pipe = with_adapters(model, folder)
    for part in PARTS:
        setattr(pipe, part, getattr(pipe, part).merge_and_unload())
    return pipe


@pytest.mark.parametrize("name", ["hra", "oft", "hra-all"])
def test_a_merged_folder_is_what_peft_merges(model, trained, exported, name):
    expected, place = merged(model, trained(name)), exported(name, "merged")
    pipe = StableDiffusionXLPipeline.from_pretrained(place, dtype=torch.float32, add_watermarker=False)
    for part in PARTS:
        own = getattr(pipe, part).state_dict()
        for key, tensor in getattr(expected, part).state_dict().items():
            assert cases.relative(own[key], tensor) <= 1e-5, (part, key)


def test_a_single_file_has_the_folders_tensors_in_diffusers(model, exported, monkeypatch):
    """`from_single_file` knows the model's sizes from its own config here; what it is, it tells by keys and shapes."""
    folder = StableDiffusionXLPipeline.from_pretrained(exported("hra", "merged"), dtype=torch.float32, add_watermarker=False)
    path = exported("hra", "checkpoint")
    pipe = StableDiffusionXLPipeline.from_single_file(str(path), config=str(model()), dtype=torch.float32, add_watermarker=False)
    for part in [*PARTS, "vae"]:
        own, expected = getattr(pipe, part).state_dict(), getattr(folder, part).state_dict()
        assert own.keys() == expected.keys(), own.keys() ^ expected.keys()
        assert all(torch.equal(own[key], expected[key]) for key in own), part
    for kind, place in ((UNet2DConditionModel, "unet"), (CLIPTextModel, "text_encoder"), (CLIPTextModelWithProjection, "text_encoder_2")):
        assert isinstance(getattr(pipe, place), kind)


def test_a_single_file_loads_here_with_nothing_beside_it(hra, model, trained, exported, tmp_path):
    expected = run(hra, tmp_path, exported("hra", "merged"), *SIZE)
    assert torch.equal(run(hra, tmp_path, exported("hra", "checkpoint"), *SIZE, "--overwrite"), expected)
    assert cases.relative(expected, draw(with_adapters(model, trained("hra")))) <= 1e-4


def test_a_model_whose_empty_prompt_is_no_zeros_keeps_that_in_one_file(hra, model, trained, tmp_path):
    """diffusers' `force_zeros_for_empty_prompt`, which only model_index.json says."""
    pipe = xl_cases.load(model())
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    pipe.save_pretrained(tmp_path / "model")
    hra("export", "--model", tmp_path / "model", "--adapter", f"{trained('hra')}=0", "--to", "checkpoint", "--output",
        tmp_path / "x.safetensors")
    found = run(hra, tmp_path, tmp_path / "x.safetensors", *SIZE, negative="")
    expected = draw(xl_cases.load(tmp_path / "model"), negative="")
    assert cases.relative(draw(xl_cases.load(model()), negative=""), expected) > 1e-3
    hra("export", "--model", tmp_path / "x.safetensors", "--adapter", f"{trained('hra')}=0", "--to", "merged", "--output", tmp_path / "merged")
    assert json.loads((tmp_path / "merged/model_index.json").read_text())["force_zeros_for_empty_prompt"] is False
    assert cases.relative(found, expected) <= 1e-4


def test_what_files_are_is_told(hra, model, trained, exported):
    for path, words in (
        (trained("hra"), ["text_encoder_2", "HRA r 8"]),
        (exported("hra", "checkpoint"), ["text_encoder_2", "unet", "vae"]),
        (exported("hra", "kohya-lora"), ["LoRA file", "sdxl_base_v1-0"]),
        (model(), ["text_encoder_2"]),
    ):
        told = hra("inspect", path).stdout
        assert all(word in told for word in words), told[:2000]


def test_two_adapters_become_one(hra, model, trained, tmp_path):
    hra("merge", f"{trained('hra')}=0.5", trained("hra-gs"), "--output", tmp_path / "one")
    both = run(hra, tmp_path, model(), "--adapter", f"{trained('hra')}=0.5", "--adapter", trained("hra-gs"), *SIZE)
    one = run(hra, tmp_path, model(), "--adapter", tmp_path / "one", *SIZE, "--overwrite")
    assert cases.relative(one, both) <= 1e-4
    assert cases.relative(draw(with_adapters(model, tmp_path / "one")), one) <= 1e-4
