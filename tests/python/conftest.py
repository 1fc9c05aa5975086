"""Fixtures: the binary (HRA_BIN, or target/release/hra), and the random folders of cases.py, each made once."""

import os
import pathlib
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

import cases

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def hra():
    """Call the binary; returns the finished process. A failure shows the command and what it printed; one that is expected (`fails`)
    returns what it said."""
    binary = pathlib.Path(os.environ.get("HRA_BIN", cases.REPO / "target/release/hra"))
    if not binary.is_file():
        pytest.fail(f"no binary at {binary}: run `make build`, or set HRA_BIN")

    def call(*words, fails=False):
        words = [str(binary), *map(str, words)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=900)
        if fails:
            assert done.returncode == 2, f"{' '.join(words)}\nexit {done.returncode}\n{done.stdout}\n{done.stderr}"
            return done.stderr
        assert done.returncode == 0, f"{' '.join(words)}\nexit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return call


@pytest.fixture
def draw(hra, tmp_path):
    """model, unit noise, values of --adapter -> what `hra sample` makes of two DDIM steps (cases.two_steps)."""

    def call(model, noise, *adapters, factor, words=()):
        save_file({"latents": noise}, tmp_path / "noise.safetensors")
        height, width = (side * factor for side in noise.shape[2:])
        hra("sample", "--model", model, "--prompt", cases.PROMPT, "--negative-prompt", cases.NEGATIVE, "--scheduler", "ddim",
            "--steps", 2, "--guidance", 4, "--height", height, "--width", width, "--latents", tmp_path / "noise.safetensors",
            "--save-latents", tmp_path / "latents.safetensors", "--output", tmp_path / "pictures", *words,
            *(word for adapter in adapters for word in ("--adapter", adapter)))
        return load_file(tmp_path / "latents.safetensors")["latents"]

    return call


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """case -> its folder."""
    made = {}

    def get(case):
        if case.name not in made:
            made[case.name] = cases.build(case, tmp_path_factory.mktemp(case.name))
        return made[case.name]

    return get


@pytest.fixture(scope="session")
def adapter(tmp_path_factory, folder):
    """case, name of cases.ADAPTERS or cases.METHODS -> a folder that PEFT saved."""
    made = {}

    def get(case, name):
        if (case.name, name) not in made:
            pipe = cases.load(folder(case), case.variant)
            part = pipe.text_encoder if name.startswith("text") else pipe.unet
            made[case.name, name] = cases.make_adapter(
                part, tmp_path_factory.mktemp(f"{case.name}-{name}"), case.seed + 7,
                **(cases.ADAPTERS | cases.METHODS)[name])
        return made[case.name, name]

    return get
