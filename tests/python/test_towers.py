"""The towers that score pictures beside transformers': random weights in the shapes of published towers, their real processors,
photographs and pictures of odd shapes; pixels to the bit, embeddings, and the scores that `hra evaluate` gives.

The photographs are those of DreamBooth below $HRA_SHARED or ../shared; without them there are drawn pictures only.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from cases import REPO

SHARED = Path(os.environ.get("HRA_SHARED", REPO.parent / "shared"))
PHOTOS = sorted((SHARED / "dreambooth" / "dataset").glob("*/*.jpg"))
TINY_CLIP = REPO / "assets/tiny-clip"
PROMPTS = ["a cat", "a pixel art emoji of a robot on the moon, at night, with 3 stars!", "caf\u00e9 " * 90]
TOLERANCE = 1e-4
PROCESSORS = {"clip": CLIPImageProcessorPil, "vit": ViTImageProcessorPil, "dinov2": BitImageProcessorPil}

# preprocessor_config.json as published, in its old and new forms.
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
OLD_CLIP = dict(crop_size=224, do_center_crop=True, do_normalize=True, do_resize=True, feature_extractor_type="CLIPFeatureExtractor",
                image_mean=CLIP_MEAN, image_std=CLIP_STD, resample=3, size=224)
DINO = dict(do_normalize=True, do_resize=True, feature_extractor_type="ViTFeatureExtractor", image_mean=IMAGENET_MEAN,
            image_std=IMAGENET_STD, resample=2, size=224)
DINOV2 = dict(crop_size={"height": 224, "width": 224}, do_center_crop=True, do_convert_rgb=True, do_normalize=True, do_rescale=True,
              do_resize=True, image_mean=IMAGENET_MEAN, image_processor_type="BitImageProcessor", image_std=IMAGENET_STD, resample=3,
              rescale_factor=0.00392156862745098, size={"shortest_edge": 256})


def redraw(model, seed):
    """Weights that keep the size of what goes through, and the rest far from where it starts."""
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        draw = torch.randn(parameter.shape, generator=random)
        if parameter.dim() >= 2 and "position" not in name and "token" not in name:
            draw *= 1.5 / parameter[0].numel() ** 0.5
        elif ("norm" in name and name.endswith("weight")) or "lambda" in name:
            draw = 1 + 0.3 * draw
        else:
            draw *= 0.5
        parameter.data = draw
    return model


def clip(patch, act, old_end, **processor):
    def write(folder, seed):
        tokenizer = CLIPTokenizer.from_pretrained(TINY_CLIP, model_max_length=77)
        tokenizer.save_pretrained(folder)
        end = tokenizer.eos_token_id
        text = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=3, max_position_embeddings=77)
        text |= dict(vocab_size=len(tokenizer), bos_token_id=end - 1, eos_token_id=2 if old_end else end, hidden_act=act)
        vision = dict(hidden_size=64, intermediate_size=100, num_hidden_layers=3, num_attention_heads=4, patch_size=patch)
        config = CLIPConfig(text_config=text, vision_config=vision | dict(hidden_act=act), projection_dim=40)
        redraw(CLIPModel(config), seed).save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return write


def dino(patch, **processor):
    def write(folder, seed):
        config = ViTConfig(hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=3, patch_size=patch)
        redraw(ViTModel(config, add_pooling_layer=bool(seed % 2)), seed).half().save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return write


def dinov2(gated, **processor):
    def write(folder, seed):
        sizes = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=3, image_size=518)
        redraw(Dinov2Model(Dinov2Config(**sizes, use_swiglu_ffn=gated)), seed).save_pretrained(folder, max_shard_size="200KB")
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return write


TOWERS = {
    "clip-vit-base-patch32": clip(32, "quick_gelu", True, **OLD_CLIP),
    "clip-vit-large-patch14": clip(14, "quick_gelu", False, **OLD_CLIP),
    "laion-clip": clip(16, "gelu", False, **OLD_CLIP),
    "dino-vits16": dino(16, **DINO),
    "dino-vits8": dino(8, **DINO),
    "dinov2-base": dinov2(False, **DINOV2),
    "dinov2-giant": dinov2(True, **DINOV2),
}


@pytest.fixture(scope="module", params=TOWERS)
def tower(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    TOWERS[request.param](folder, 100 + list(TOWERS).index(request.param))
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Lossless files: photographs, cuts of them in odd shapes, and noise in others."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(5)
    images = []
    for width, height in [(224, 224), (225, 224), (301, 97), (90, 333), (33, 700), (640, 31), (5, 7), (1, 1)]:
        slope = np.linspace(0, 1, width)[None, :, None] * random.integers(50, 200, 3)
        images.append(Image.fromarray((slope + random.integers(0, 56, (height, width, 3))).astype(np.uint8)))
    for photo in PHOTOS[:3]:
        image = Image.open(photo).convert("RGB")
        boxes = [(0, 0, 700, 411), (10, 20, 333, 650), (100, 100, 163, 147), (200, 3, 301, 697), (1, 300, 698, 361)]
        images += [image, *(image.crop(box) for box in boxes)]
    for i, image in enumerate(images):
        image.save(folder / f"{i:02}.png", compress_level=1)
    return sorted(folder.glob("*.png"))


def unit(rows):
    return rows / rows.norm(dim=-1, keepdim=True)


def model_type(folder):
    return json.loads((folder / "config.json").read_text())["model_type"]


@torch.no_grad()
def python(folder, paths):
    """Pixels and unit embeddings as transformers makes them."""
    kind = model_type(folder)
    model = {"clip": CLIPModel, "vit": ViTModel, "dinov2": Dinov2Model}[kind].from_pretrained(folder, dtype=torch.float32).eval()
    pixels = PROCESSORS[kind].from_pretrained(folder)([Image.open(path) for path in paths], return_tensors="pt").pixel_values
    rows = model.get_image_features(pixels).pooler_output if kind == "clip" else model(pixels).last_hidden_state[:, 0]
    return pixels, unit(rows)


@torch.no_grad()
def texts(folder, prompts):
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    length = min(tokenizer.model_max_length, model.config.text_config.max_position_embeddings)
    tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return unit(model.get_text_features(**tokens).pooler_output)


@pytest.fixture(scope="module")
def embed():
    """Runs tests/probes/embed.rs."""
    subprocess.run(["cargo", "build", "--quiet", "--example", "embed"], cwd=REPO, check=True)
    target = Path(os.environ.get("CARGO_TARGET_DIR", REPO / "target"))

    def run(folder, output, paths):
        subprocess.run([target / "debug" / "examples" / "embed", folder, output, *paths], check=True)
        return load_file(output)

    return run


def test_pixels_and_embeddings(embed, tower, pictures, tmp_path):
    pixels, rows = python(tower, pictures)
    found = embed(tower, tmp_path / "out.safetensors", pictures)
    for path, ours, theirs in zip(pictures, found["pixels"], pixels, strict=True):
        assert torch.equal(ours, theirs), f"{path.name}: {(ours - theirs).abs().max()}"
    worst = (found["images"] - rows).abs().max().item()
    print(f"{tower.name}: embeddings off by {worst:.1e}")
    assert worst < 1e-5


def evaluate(hra, flag, folder, drawn, real, *words):
    """Scores by name and key."""
    done = hra("evaluate", *drawn, "--real", real, flag, folder, "--json", "--device", "cpu", *words)
    said = json.loads(done.stdout)
    pictures = said["pictures"]
    assert said["real"]["pictures"] == len(list(real.iterdir())) and len(pictures) == len(drawn)
    return {Path(picture["file"]).name: picture["scores"] for picture in pictures}


def split(pictures, folder):
    """Drawn pictures, and some put into a folder as real ones: of usual shapes, as others are left out of folders."""
    usual = [path for path in pictures if max(Image.open(path).size) <= 4 * min(Image.open(path).size)]
    for path in usual[1::2]:
        (folder / path.name).symlink_to(path)
    return [path for path in pictures if path not in usual[1::2]], usual[1::2]


def compare(found, key, drawn, expected):
    worst = max(abs(found[path.name][key] - value) for path, value in zip(drawn, expected.tolist(), strict=True))
    spread = (expected.max() - expected.min()).item()
    print(f"{key}: off by {worst:.1e}, scores spread over {spread:.2f}")
    assert worst < TOLERANCE < spread / 10


def test_scores(hra, tower, pictures, tmp_path):
    drawn, real = split(pictures, tmp_path)
    _, rows = python(tower, drawn)
    cosines = (rows.double() @ python(tower, real)[1].double().T).mean(dim=1)
    kind = model_type(tower)
    flag, key = {"clip": ("--clip", "clip_i"), "vit": ("--dino", "dino"), "dinov2": ("--dinov2", "dinov2")}[kind]
    compare(evaluate(hra, flag, tower, drawn, tmp_path), key, drawn, cosines)
    if kind == "clip":
        for prompt, text in zip(PROMPTS, texts(tower, PROMPTS)):
            found = evaluate(hra, flag, tower, drawn, tmp_path, "--prompt", prompt)
            compare(found, "clip_t", drawn, rows.double() @ text.double())


def test_the_embedded_tower(hra, tmp_path):
    drawn = sorted((REPO / "assets/subjects/cat").rglob("*.png"))
    real = sorted((REPO / "assets/subjects/robot").rglob("*.png"))
    for i, path in enumerate(real):
        (tmp_path / f"{i}.png").symlink_to(path)
    _, rows = python(TINY_CLIP, drawn)
    cosines = rows.double() @ python(TINY_CLIP, real)[1].double().T
    texts_found = texts(TINY_CLIP, ["a pixel art emoji of a cat"])[0]
    # Names are the same in every folder, so each is scored alone.
    for path, clip_i, clip_t in zip(drawn, cosines.mean(dim=1).tolist(), (rows @ texts_found).tolist()):
        found = evaluate(hra, "--clip", TINY_CLIP, [path], tmp_path, "--prompt", "a pixel art emoji of a cat")[path.name]
        assert abs(found["clip_i"] - clip_i) < TOLERANCE and abs(found["clip_t"] - clip_t) < TOLERANCE, path
