"""`hra evaluate` with LPIPS against the `lpips` package 0.1.4, on random pictures and a random network made here; the linear layers
are the package's own. The weights go through tools/lpips_to_safetensors.py."""

import json
import subprocess
import sys
import warnings

import lpips
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models

import cases

NETS = {"vgg": models.vgg16, "alex": models.alexnet}


@pytest.fixture(scope="module", params=NETS)
def made(request, tmp_path_factory):
    """net, the package's model, the file for hra."""
    net, folder = request.param, tmp_path_factory.mktemp(request.param)
    torch.manual_seed(97)
    backbone = {
        name: tensor * (1.5 if tensor.dim() == 4 else 1)  # torchvision's start lets deep features die
        for name, tensor in NETS[net](weights=None).state_dict().items() if name.startswith("features.")
    }
    torch.save(backbone, folder / "backbone.pth")
    tool = [sys.executable, str(cases.REPO / "tools/lpips_to_safetensors.py"), net]
    subprocess.run([*tool, str(folder / "weights.safetensors"), "--backbone", str(folder / "backbone.pth")], check=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    with torch.no_grad():
        for name, parameter in model.net.named_parameters():
            parameter.copy_(backbone[name.replace(name.split(".")[0], "features", 1)])
    return net, model, folder / "weights.safetensors"


def picture(rng, width, height):
    """Coarse blobs under fine noise."""
    blobs = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    return np.clip(np.asarray(blobs, dtype=int) + rng.integers(-25, 26, (height, width, 3)), 0, 255).astype(np.uint8)


def fit(pixels, width, height):
    """The middle of the smallest size that covers width x height."""
    image = Image.fromarray(pixels)
    wide, high = width, width * image.height // image.width
    if high < height:
        wide, high = height * image.width // image.height, height
    if image.size != (wide, high):
        image = image.resize((wide, high), Image.BILINEAR)
    x, y = round((wide - width) / 2), round((high - height) / 2)
    return np.asarray(image.crop((x, y, x + width, y + height)))


# The drawn pictures' size, and that of the real ones.
@pytest.mark.parametrize("size, real_size", [((64, 64), (64, 64)), ((96, 72), (150, 101)), ((65, 87), (40, 200))])
def test_distances_are_those_of_the_package(hra, made, tmp_path, size, real_size):
    net, model, weights = made
    rng = np.random.default_rng(sum(size) + sum(real_size))
    drawn, real = [picture(rng, *size) for _ in range(4)], [picture(rng, *real_size) for _ in range(3)]
    for name, pictures in [("drawn", drawn), ("real", real)]:
        (tmp_path / name).mkdir()
        for i, pixels in enumerate(pictures):
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    prompts = ["a cat", "a dog", "a cat", "a cat"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    done = hra("evaluate", tmp_path / "drawn", "--real", tmp_path / "real", "--prompt-file", tmp_path / "prompts.txt",
               f"--lpips-{net}", weights, "--json", "--device", "cpu")
    found = json.loads(done.stdout)

    def distance(a, b):
        with torch.no_grad():
            return model(lpips.im2tensor(a), lpips.im2tensor(fit(b, *size))).item()

    by_file = {entry["file"]: entry["scores"][f"lpips_{net}"] for entry in found["pictures"]}
    for i, pixels in enumerate(drawn):
        expected = np.mean([distance(pixels, other) for other in real])
        assert by_file[str(tmp_path / "drawn" / f"{i}.png")] == pytest.approx(expected, rel=1e-4)
    cats = [0, 2, 3]
    expected = np.mean([distance(drawn[a], drawn[b]) for i, a in enumerate(cats) for b in cats[i + 1:]])
    scores = {entry["prompt"]: entry["scores"] for entry in found["prompts"]}
    assert scores["a cat"][f"diversity_{net}"] == pytest.approx(expected, rel=1e-4)
    assert f"diversity_{net}" not in scores["a dog"], "one picture has none"
