"""Checkpoints with LDM's key names, both ways: what tests/probes/convert.rs writes, read by diffusers' own conversion; and what
an independent script writes, read by `hra`.

`to_ldm` walks the modules that diffusers built and names them as CompVis' and OpenCLIP's code does. It serves any number of
layers per block, which diffusers' conversion does not.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders import single_file_utils as upstream
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import cases
from cases import CASES, REPO

BY_NAME = {case.name: case for case in CASES}
UNIFORM = [case.name for case in CASES if isinstance(case.unet["layers_per_block"], int)]
UNET, VAE, CLIP, OPEN = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.", "cond_stage_model.model."


@pytest.fixture(scope="session")
def convert():
    """Runs tests/probes/convert.rs."""
    subprocess.run(["cargo", "build", "--quiet", "--example", "convert"], cwd=REPO, check=True)
    target = Path(os.environ.get("CARGO_TARGET_DIR", REPO / "target"))

    def run(*words):
        subprocess.run([target / "debug" / "examples" / "convert", *map(str, words)], check=True)
        return Path(words[1])

    return run


def swap(name, pairs):
    for old, new in pairs:
        name = name.replace(old, new)
    return name


def rename(state, table):
    """Keys by the first entry of `table` (prefix, new prefix, changes of the rest) that fits."""
    renamed = {}
    for key, tensor in state.items():
        prefix, new, changes = next(entry for entry in table if key.startswith(entry[0]))
        renamed[new + swap(key.removeprefix(prefix), changes)] = tensor
    return renamed


RESNET = [("norm1.", "in_layers.0."), ("conv1.", "in_layers.2."), ("time_emb_proj.", "emb_layers.1."),
          ("norm2.", "out_layers.0."), ("conv2.", "out_layers.3."), ("conv_shortcut.", "skip_connection.")]


def unet_to_ldm(unet, leave_out="/"):
    """All tensors but those whose names begin with `leave_out`."""
    table, n = [], 1
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            table.append((f"down_blocks.{i}.resnets.{j}.", f"input_blocks.{n}.0.", RESNET))
            table.append((f"down_blocks.{i}.attentions.{j}.", f"input_blocks.{n}.1.", []))
            n += 1
        if block.downsamplers:
            table.append((f"down_blocks.{i}.downsamplers.0.conv.", f"input_blocks.{n}.0.op.", []))
            n += 1
    table += [("mid_block.resnets.0.", "middle_block.0.", RESNET), ("mid_block.attentions.0.", "middle_block.1.", []),
              ("mid_block.resnets.1.", "middle_block.2.", RESNET)]
    n = 0
    for i, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            table.append((f"up_blocks.{i}.resnets.{j}.", f"output_blocks.{n}.0.", RESNET))
            table.append((f"up_blocks.{i}.attentions.{j}.", f"output_blocks.{n}.1.", []))
            n += 1
        if block.upsamplers:
            place = 2 if hasattr(block, "attentions") else 1
            table.append((f"up_blocks.{i}.upsamplers.0.conv.", f"output_blocks.{n - 1}.{place}.conv.", []))
    table += [("time_embedding.linear_1.", "time_embed.0.", []), ("time_embedding.linear_2.", "time_embed.2.", []),
              ("conv_in.", "input_blocks.0.0.", []), ("conv_norm_out.", "out.0.", []), ("conv_out.", "out.2.", [])]
    return rename({k: v for k, v in unet.state_dict().items() if not k.startswith(leave_out)}, table)


def vae_to_ldm(vae):
    shortcut = [("conv_shortcut.", "nin_shortcut.")]
    attention = [("group_norm.", "norm."), ("to_q.", "q."), ("to_k.", "k."), ("to_v.", "v."), ("to_out.0.", "proj_out.")]
    table, levels = [], len(vae.decoder.up_blocks)
    for i in range(levels):
        up = levels - 1 - i
        table += [
            (f"encoder.down_blocks.{i}.resnets.", f"encoder.down.{i}.block.", shortcut),
            (f"encoder.down_blocks.{i}.downsamplers.0.", f"encoder.down.{i}.downsample.", []),
            (f"decoder.up_blocks.{i}.resnets.", f"decoder.up.{up}.block.", shortcut),
            (f"decoder.up_blocks.{i}.upsamplers.0.", f"decoder.up.{up}.upsample.", []),
        ]
    for side in ("encoder", "decoder"):
        table += [
            (f"{side}.mid_block.resnets.0.", f"{side}.mid.block_1.", []),
            (f"{side}.mid_block.resnets.1.", f"{side}.mid.block_2.", []),
            (f"{side}.mid_block.attentions.0.", f"{side}.mid.attn_1.", attention),
            (f"{side}.conv_norm_out.", f"{side}.norm_out.", []),
        ]
    state = rename(vae.state_dict(), [*table, ("", "", [])])
    return {k: v[:, :, None, None] if "attn_1" in k and v.dim() == 2 else v for k, v in state.items()}


def open_clip_to_ldm(state):
    changes = [("layer_norm", "ln_"), ("mlp.fc1.", "mlp.c_fc."), ("mlp.fc2.", "mlp.c_proj."), ("self_attn.", "attn.")]
    renamed = {}
    for key, tensor in state.items():
        if (third := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(\w+)", key)) is not None:
            stacked = [state[key.replace("q_proj", projection)] for projection in ("q_proj", "k_proj", "v_proj")]
            renamed[f"transformer.resblocks.{third[1]}.attn.in_proj_{third[2]}"] = torch.cat(stacked)
        elif key.startswith("encoder.layers.") and ".k_proj." not in key and ".v_proj." not in key:
            renamed["transformer.resblocks." + swap(key.removeprefix("encoder.layers."), changes)] = tensor
    renamed["positional_embedding"] = state["embeddings.position_embedding.weight"]
    renamed["token_embedding.weight"] = state["embeddings.token_embedding.weight"]
    return renamed | {f"ln_final.{w}": state[f"final_layer_norm.{w}"] for w in ("weight", "bias")}


def text_state(text_encoder):
    return {k.removeprefix("text_model."): v for k, v in text_encoder.state_dict().items() if "position_ids" not in k}


def to_ldm(pipe, kind):
    """The whole pipeline as one dictionary."""
    text = text_state(pipe.text_encoder)
    if kind == "sd21":
        text = {OPEN + k: v for k, v in open_clip_to_ldm(text).items()}
    else:
        text = {f"{CLIP}text_model.{k}": v for k, v in text.items()}
    unet = {UNET + k: v for k, v in unet_to_ldm(pipe.unet).items()}
    return unet | {VAE + k: v for k, v in vae_to_ldm(pipe.vae).items()} | text


def assert_same(found, expected):
    assert sorted(found) == sorted(expected)
    for key, tensor in expected.items():
        assert found[key].shape == tensor.shape, key
        assert torch.equal(found[key].float(), tensor.float()), key


def assert_same_pipeline(found, expected):
    for part in ("unet", "vae"):
        assert_same(getattr(found, part).state_dict(), getattr(expected, part).state_dict())
    assert_same(text_state(found.text_encoder), text_state(expected.text_encoder))


@pytest.fixture(scope="session")
def checkpoint(convert, folder, tmp_path_factory):
    """case -> the file that we make of its folder."""
    made = {}

    def get(case):
        if case.name not in made:
            made[case.name] = convert(folder(case), tmp_path_factory.mktemp("checkpoint") / f"{case.name}.safetensors")
        return made[case.name]

    return get


@pytest.mark.parametrize("name", BY_NAME)
def test_a_written_checkpoint_has_ldms_keys_shapes_and_values(checkpoint, folder, name):
    case = BY_NAME[name]
    state = load_file(checkpoint(case))
    assert_same(state, to_ldm(cases.load(folder(case), case.variant), case.kind))
    assert {t.dtype for t in state.values()} == {torch.float16 if case.variant else torch.float32}


@pytest.mark.parametrize("name", UNIFORM)
def test_upstreams_conversion_gives_the_folders_tensors(checkpoint, folder, name):
    case = BY_NAME[name]
    pipe = cases.load(folder(case), case.variant)
    state = load_file(checkpoint(case))
    assert_same(upstream.convert_ldm_unet_checkpoint(dict(state), dict(pipe.unet.config)), pipe.unet.state_dict())
    assert_same(upstream.convert_ldm_vae_checkpoint(dict(state), dict(pipe.vae.config)), pipe.vae.state_dict())
    if case.kind == "sd21":
        assert upstream.is_open_clip_model(state)
        text = upstream.convert_open_clip_checkpoint(pipe.text_encoder, dict(state))
    else:
        assert upstream.is_clip_model(state)
        text = upstream.convert_ldm_clip_checkpoint(dict(state))
    assert_same({k.removeprefix("text_model."): v for k, v in text.items()}, text_state(pipe.text_encoder))


@pytest.mark.parametrize("name", UNIFORM)
def test_from_single_file_gives_the_folders_pipeline(checkpoint, folder, name):
    case = BY_NAME[name]
    found = StableDiffusionPipeline.from_single_file(
        str(checkpoint(case)), config=str(folder(case)), local_files_only=True, dtype=torch.float32)
    assert_same_pipeline(found, cases.load(folder(case), case.variant))


@pytest.mark.parametrize("name", BY_NAME)
def test_a_foreign_checkpoint_becomes_the_folder_that_it_was(convert, folder, tmp_path, name):
    """`to_ldm`'s file holds no settings; those come from `--config`. One of them leaves out CLIP's inner prefix."""
    case = BY_NAME[name]
    pipe = cases.load(folder(case), case.variant)
    state = {k: v.contiguous() for k, v in to_ldm(pipe, case.kind).items()}
    if case.name == "sd15-b":
        state = {k.replace(CLIP + "text_model.", CLIP): v for k, v in state.items()}
    save_file(state | {"betas": torch.ones(1000), "model_ema.decay": torch.ones(1)}, tmp_path / "foreign.safetensors")
    out = convert(tmp_path / "foreign.safetensors", tmp_path / "out", "--config", folder(case))
    assert_same_pipeline(cases.load(out), pipe)


@pytest.mark.parametrize("name", BY_NAME)
def test_the_file_draws_what_the_folder_draws(hra, checkpoint, folder, tmp_path, name):
    case = BY_NAME[name]
    latents = []
    for i, model in enumerate((folder(case), checkpoint(case))):
        hra("sample", "--model", model, "--prompt", "an owl's nest, 2 RED hearts!!", "--steps", 3, "--height", case.height,
            "--width", case.width, "--output", tmp_path / str(i), "--save-latents", tmp_path / f"{i}.safetensors")
        latents.append(load_file(tmp_path / f"{i}.safetensors")["latents"])
    assert torch.equal(*latents)


def test_a_number_format_can_be_chosen(convert, folder, tmp_path):
    case = BY_NAME["sd21-b"]
    expected = to_ldm(cases.load(folder(case)), case.kind)
    for name, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16)):
        file = convert(folder(case), tmp_path / f"{name}.safetensors", "--dtype", name)
        with safe_open(file, "pt") as opened:
            assert opened.metadata()["modelspec.prediction_type"] == "v"
        assert_same(load_file(file), {k: v.to(dtype) for k, v in expected.items()})
        out = convert(folder(case), tmp_path / name, "--dtype", name)
        pipe = StableDiffusionPipeline.from_pretrained(out)
        assert pipe.text_encoder.dtype == dtype
        assert all(torch.equal(a, b.to(dtype)) for a, b in zip(
            text_state(pipe.text_encoder).values(), text_state(cases.load(folder(case)).text_encoder).values(), strict=True))


def test_a_pickle_is_refused_with_a_line_that_converts_it(hra, folder, tmp_path):
    case = BY_NAME["sd15-b"]
    state = to_ldm(cases.load(folder(case)), case.kind)
    torch.save({"state_dict": state, "global_step": 7}, tmp_path / "model.ckpt")
    words = ["--prompt", "an owl", "--steps", 1, "--height", 16, "--width", 16, "--config", folder(case)]
    with pytest.raises(AssertionError) as refused:
        hra("sample", "--model", tmp_path / "model.ckpt", "--output", tmp_path / "out", *words)
    line = next(line for line in str(refused.value).splitlines() if line.strip().startswith("python -c"))
    command = shlex.split(line)
    assert command[-2:] == [str(tmp_path / "model.ckpt"), str(tmp_path / "model.safetensors")]
    subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, check=True)
    assert_same(load_file(tmp_path / "model.safetensors"), state)
    hra("sample", "--model", tmp_path / "model.safetensors", "--output", tmp_path / "out", *words)
