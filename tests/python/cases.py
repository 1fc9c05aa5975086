"""Random small Stable Diffusion folders, random PEFT adapters of every method for them, and what Python makes of both.

The folders have the two layouts of published models. `sd15`: PNDM, epsilon, one number of heads, convolutional
projections, a padding token that is the end token, `tokenizer.json`. `sd21`: DDIM, v-prediction, heads per level, linear
projections, a GELU text tower, `vocab.json` + `merges.txt` only, `!` as padding, and the key names of older files
(`text_model.` before the text encoder's, an I64 `position_ids`, `query`/`key`/`value`/`proj_attn` in the VAE). Everything
else varies by case. All is drawn from the case's seed, so that a failure can be repeated.
"""

import dataclasses
import json
import os
import pathlib
from unittest import mock

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from diffusers.utils import logging as diffusers_logging
from peft import BOFTConfig, HRAConfig, IA3Config, LoraConfig, OFTConfig, PeftModel, get_peft_model
from peft.tuners.boft import layer as boft
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

for library in (diffusers_logging, transformers_logging):
    library.set_verbosity_error()
    library.disable_progress_bar()
boft.get_fbd_cuda = lambda: None  # PEFT tries to compile it for every layer, in vain without CUDA

REPO = pathlib.Path(__file__).resolve().parents[2]


def tiny_sd():
    """The embedded model: HRA_TINY_SD, or assets/tiny-sd, or shared/tiny-sd/model beside the repository."""
    places = [REPO / "assets/tiny-sd", REPO.parent / "shared/tiny-sd/model"]
    if "HRA_TINY_SD" in os.environ:
        places = [pathlib.Path(os.environ["HRA_TINY_SD"])]
    for place in places:
        for folder in (place, place / "model"):
            if (folder / "model_index.json").is_file():
                return folder
    raise FileNotFoundError(f"no embedded model in {', '.join(map(str, places))}; set HRA_TINY_SD")


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = ATTENTION + ["net.0.proj", "net.2", "proj_in", "conv1", "conv2", "conv_shortcut"]

# What make_adapter is given: ranks, the Gram-Schmidt variant, trained biases, convolutions, and the text encoder.
ADAPTERS = {
    "r2": dict(r=2),
    "r4": dict(r=4),
    "r8": dict(r=8),
    "r3": dict(r=3),
    "r4-gs": dict(r=4, apply_GS=True),
    "r8-bias": dict(r=8, bias="hra_only"),
    "r4-conv": dict(r=4, targets=CONVOLUTIONS),
    "r4-regex": dict(r=4, targets=r".*attn2\.to_[qkv]"),
    "text-r4": dict(r=4, targets=["q_proj", "k_proj", "v_proj", "out_proj"]),
}

LAYERS = CONVOLUTIONS + ["proj_out"]
TEXT_ATTENTION = ADAPTERS["text-r4"]["targets"]
NEUMANN = dict(method=OFTConfig, r=0, oft_block_size=8)
EXACT = NEUMANN | dict(use_cayley_neumann=False)
# Every method as PEFT writes it. Blocks of 8 and 4 blocks divide every width of the cases. PEFT's eps in COFT is a radius that
# shortens about half the blocks (b = 8, so that |S| is about 0.75 before, and the radius eps over the root of their number).
METHODS = {
    "lora": dict(method=LoraConfig, r=4, lora_alpha=8),
    "lora-rs": dict(method=LoraConfig, r=4, lora_alpha=3, use_rslora=True),
    "lora-bias": dict(method=LoraConfig, r=2, lora_alpha=2, bias="lora_only"),
    "lora-layers": dict(
        method=LoraConfig, r=4, lora_alpha=8, targets=LAYERS,
        rank_pattern={"conv1": 2, r"attn2\.to_[kv]": 3}, alpha_pattern={"proj_in": 1, "conv1": 6, r"up_blocks.*\.to_q": 12.5}),
    "dora": dict(method=LoraConfig, r=2, lora_alpha=3, use_dora=True),
    "dora-layers": dict(method=LoraConfig, r=2, lora_alpha=2, use_dora=True, targets=LAYERS),
    "oft": NEUMANN,
    "oft-exact": EXACT,
    "oft-blocks": EXACT | dict(r=4, oft_block_size=0),
    "oft-shared": NEUMANN | dict(block_share=True),
    "oft-layers": EXACT | dict(targets=LAYERS),
    "coft": NEUMANN | dict(coft=True, eps=2.0),
    "coft-exact": EXACT | dict(coft=True, eps=2.0),
    "boft": dict(method=BOFTConfig, boft_block_size=8),
    "boft-blocks": dict(method=BOFTConfig, boft_block_size=0, boft_block_num=4),
    "boft-layers": dict(method=BOFTConfig, boft_block_size=4, targets=LAYERS),
    "boft-all": dict(method=BOFTConfig, boft_block_size=4, bias="all"),
    "hra-all": dict(r=4, bias="all"),
    "ia3": dict(method=IA3Config, feedforward_modules=[]),
    "ia3-layers": dict(method=IA3Config, targets=LAYERS, feedforward_modules=["conv1", "proj_in"]),
    "text-lora": dict(method=LoraConfig, r=4, lora_alpha=6, targets=TEXT_ATTENTION + ["fc1"]),
    "text-oft": EXACT | dict(targets=TEXT_ATTENTION),
}
# PEFT's OFT on a convolution of 3 x 3, before it is merged, is not W R^T: it unfolds the input without its padding and sums overlaps.
MERGED_ONLY = ["oft-layers"]

SPREAD = {"timestep_spacing": "linspace"}
KARRAS = {"timestep_spacing": "linspace", "use_karras_sigmas": True}
# `hra` does not pass on a spacing that is only the default of the file's class, and gives heun and unipc Karras' noise
# levels (docs/schedulers.md); in Python both are said here.
SCHEDULERS = {
    "ddim": (DDIMScheduler, {}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True}),
    "euler": (EulerDiscreteScheduler, SPREAD),
    "heun": (HeunDiscreteScheduler, KARRAS),
    "dpm++2m": (DPMSolverMultistepScheduler, SPREAD),
    "dpm++2m-karras": (DPMSolverMultistepScheduler, KARRAS),
    "unipc": (UniPCMultistepScheduler, KARRAS),
    "euler-a": (EulerAncestralDiscreteScheduler, SPREAD),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One folder: `unet`, `vae` and `text` override the kind's defaults; `variant` is "" or "fp16"."""

    name: str
    kind: str
    seed: int
    height: int
    width: int
    tokens: int = 77
    variant: str = ""
    shard: str = ""  # the largest size of one file ("300KB"); "" keeps one
    unet: dict = dataclasses.field(default_factory=dict)
    vae: dict = dataclasses.field(default_factory=dict)
    text: dict = dataclasses.field(default_factory=dict)
    scheduler: dict = dataclasses.field(default_factory=dict)

    def factor(self):
        return 2 ** (len(self.vae.get("block_out_channels", (32, 32, 64))) - 1)

    def latent_shape(self, batch=1):
        return (batch, 4, self.height // self.factor(), self.width // self.factor())


CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")


def blocks(*levels):
    """Block types of levels written from the top down, in the form that the UNet's config wants."""
    return {
        "down_block_types": [level[0] for level in levels],
        "up_block_types": [level[1] for level in reversed(levels)],
    }


CASES = [
    # 8 px a latent, 77 tokens, three levels, wide first level, attention in the upper two as in SD itself
    Case("sd15-a", "sd15", 101, 128, 192, unet=dict(
        block_out_channels=(32, 64, 96), layers_per_block=1, attention_head_dim=8, cross_attention_dim=48,
        norm_num_groups=8, **blocks(CROSS, CROSS, PLAIN)),
        vae=dict(block_out_channels=(16, 16, 32, 32), norm_num_groups=8, layers_per_block=2),
        text=dict(hidden_size=48, intermediate_size=96, num_attention_heads=6, num_hidden_layers=2)),
    # a list of layers per block, attention below only, 2 px a latent
    Case("sd15-b", "sd15", 102, 16, 24, tokens=24, unet=dict(
        block_out_channels=(48, 96), layers_per_block=(1, 2), attention_head_dim=6, cross_attention_dim=64,
        norm_num_groups=12, **blocks(PLAIN, CROSS)),
        vae=dict(block_out_channels=(24, 48), norm_num_groups=12), text=dict(hidden_size=64, num_hidden_layers=4)),
    # half precision in two kinds of shards; latents of 5 x 7, which the up path must meet again
    Case("sd15-c", "sd15", 103, 40, 56, tokens=33, variant="fp16", shard="150KB", unet=dict(
        block_out_channels=(32, 32, 64), layers_per_block=1, attention_head_dim=4, cross_attention_dim=32,
        norm_num_groups=4, transformer_layers_per_block=(1, 2, 1), **blocks(CROSS, CROSS, CROSS)),
        vae=dict(block_out_channels=(8, 16, 16, 32), norm_num_groups=8)),
    # SD 2.1's form at 77 tokens with two transformer layers everywhere
    Case("sd21-a", "sd21", 201, 96, 64, unet=dict(
        block_out_channels=(32, 64), attention_head_dim=[4, 8], layers_per_block=2, cross_attention_dim=40,
        norm_num_groups=16, transformer_layers_per_block=2, **blocks(CROSS, PLAIN)),
        vae=dict(block_out_channels=(16, 32, 32, 32), norm_num_groups=16),
        text=dict(hidden_size=40, intermediate_size=160, num_attention_heads=5)),
    # four levels, the second without attention
    Case("sd21-b", "sd21", 202, 64, 32, tokens=20, unet=dict(
        block_out_channels=(32, 32, 64, 64), attention_head_dim=[2, 4, 8, 8], layers_per_block=1, cross_attention_dim=32,
        norm_num_groups=32, **blocks(CROSS, PLAIN, CROSS, PLAIN)),
        vae=dict(block_out_channels=(32, 32, 64), layers_per_block=2)),
    # one file each, but of the fp16 variant
    Case("sd21-c", "sd21", 203, 24, 40, tokens=16, variant="fp16", unet=dict(
        block_out_channels=(64, 32), attention_head_dim=[8, 2], layers_per_block=[2, 1], cross_attention_dim=24,
        norm_num_groups=8, transformer_layers_per_block=[1, 2], **blocks(CROSS, CROSS)),
        vae=dict(block_out_channels=(16, 32), norm_num_groups=4), text=dict(hidden_size=24, num_attention_heads=2)),
]

KINDS = {
    "sd15": dict(unet={"use_linear_projection": False}, text={"hidden_act": "quick_gelu"}, pad="<|endoftext|>"),
    "sd21": dict(unet={"use_linear_projection": True}, text={"hidden_act": "gelu"}, pad="!"),
}


def shake(module):
    """Move biases and norms off their trivial start, so that leaving one out shows."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn(parameter.shape)
            else:
                parameter *= 1 + 0.1 * torch.randn(parameter.shape)


def text_config(case, vocabulary=2274):
    settings = dict(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=3,
        vocab_size=vocabulary, max_position_embeddings=case.tokens, bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1,
    )
    settings |= KINDS[case.kind]["text"] | case.text
    settings["projection_dim"] = settings["hidden_size"]
    return CLIPTextConfig(**settings)


def scheduler_of(case):
    shared = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    if case.kind == "sd15":
        return PNDMScheduler(**shared | dict(skip_prk_steps=True) | case.scheduler)
    return DDIMScheduler(**shared | dict(
        clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction") | case.scheduler)


def rename(folder, pattern, change):
    """Apply `change` (name -> name) to the keys of every safetensors file and index that matches `pattern`."""
    for path in sorted(folder.glob(pattern + "*")):
        if path.suffix == ".safetensors":
            save_file({change(k): v for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
        elif path.suffix == ".json":
            index = json.loads(path.read_text())
            index["weight_map"] = {change(k): v for k, v in index["weight_map"].items()}
            path.write_text(json.dumps(index))


def old_vae_name(name):
    head, mid, tail = name.partition("mid_block.attentions.0.")
    for new, old in (("to_q.", "query."), ("to_k.", "key."), ("to_v.", "value."), ("to_out.0.", "proj_attn.")):
        tail = tail.replace(new, old)
    return head + mid + tail if mid else name


def build(case, folder):
    """Write the folder of `case` as `save_pretrained` does, then give it its kind's names. Returns the folder."""
    torch.manual_seed(case.seed)
    kind = KINDS[case.kind]
    text = CLIPTextModel(text_config(case))
    width = case.text.get("hidden_size", 32)
    unet = UNet2DConditionModel(**dict(
        sample_size=16, in_channels=4, out_channels=4, cross_attention_dim=width) | kind["unet"] | case.unet)
    levels = len(case.vae.get("block_out_channels", (32, 32, 64)))
    vae = AutoencoderKL(**dict(
        block_out_channels=(32, 32, 64), latent_channels=4, layers_per_block=1, norm_num_groups=32, sample_size=64,
        down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels) | case.vae)
    for module in (text, unet, vae):
        shake(module)
    tokenizer = CLIPTokenizer.from_pretrained(
        tiny_sd() / "tokenizer", model_max_length=case.tokens, pad_token=kind["pad"])
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler_of(case),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    if case.variant:
        pipe.to(torch.float16)
    pipe.save_pretrained(folder, variant=case.variant or None, **{"max_shard_size": case.shard} if case.shard else {})
    if case.kind == "sd21":
        for file in ("vocab.json", "merges.txt"):
            (folder / "tokenizer" / file).write_bytes((tiny_sd() / "tokenizer" / file).read_bytes())
        (folder / "tokenizer" / "tokenizer.json").unlink()
        rename(folder / "vae", "diffusion_pytorch_model", old_vae_name)
        rename(folder / "text_encoder", "model", lambda name: "text_model." + name.removeprefix("text_model."))
        path = sorted((folder / "text_encoder").glob("*.safetensors"))[0]
        ids = {"text_model.embeddings.position_ids": torch.arange(case.tokens)[None]}
        save_file(load_file(path) | ids, path, metadata={"format": "pt"})
    return folder


def load(folder, variant=""):
    """The pipeline as Python loads it, f32, quiet."""
    pipe = StableDiffusionPipeline.from_pretrained(
        folder, variant=variant or None, dtype=torch.float32, safety_checker=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_adapter(part, folder, seed, targets=ATTENTION, bias="none", method=HRAConfig, **settings):
    """Save a random adapter for `part` with PEFT (which leaves it wrapped: throw it away). Returns the folder."""
    torch.manual_seed(seed)
    start = {"init_lora_weights" if method is LoraConfig else "init_weights": False, "bias": bias}
    # (IA)^3 keeps no biases; its own random start is far from the factor 1, which is moved below.
    start = {} if method is IA3Config else start
    model = get_peft_model(part, method(target_modules=targets, **start, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name.endswith("bias"):
                parameter += 0.2 * torch.randn(parameter.shape)
            if ".lora_magnitude_vector." in name or ".ia3_l." in name:  # or else it is the norm, or the factor, 1
                parameter *= 1 + 0.2 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return folder


def with_adapter(pipe, folder, part="unet"):
    setattr(pipe, part, PeftModel.from_pretrained(getattr(pipe, part), folder).eval())
    return pipe


def adapted(case, model, *adapters):
    """The pipeline of `model` with adapters; each says itself which part it is for."""
    pipe = load(model, case.variant)
    for folder in adapters:
        with_adapter(pipe, folder, "text_encoder" if is_text(folder) else "unet")
    return pipe


def is_text(folder):
    mapping = json.loads((pathlib.Path(folder) / "adapter_config.json").read_text())["auto_mapping"]
    return "CLIPText" in mapping["base_model_class"]


def merge(pipe):
    """Takes the adapters of `with_adapter` into the weights."""
    for part in ("unet", "text_encoder"):
        if isinstance(getattr(pipe, part), PeftModel):
            setattr(pipe, part, getattr(pipe, part).merge_and_unload())
    return pipe


def unit_noise(case, seed, batch=1):
    return torch.randn(case.latent_shape(batch), generator=torch.Generator("cpu").manual_seed(seed))


def sample(pipe, name, prompt, negative, *, height, width, noise=None, step_noise=None, steps=12, guidance=5.0,
           generator=None):
    """Final latents of diffusers. `step_noise` (steps, b, c, h, w) takes the place of what an ancestral sampler draws."""
    kind, settings = SCHEDULERS[name]
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **settings)
    patches = []
    if step_noise is not None:
        drawn = iter(step_noise)
        patches.append(mock.patch(
            "diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor", lambda *_, **__: next(drawn)))
    for patch in patches:
        patch.start()
    try:
        with torch.no_grad():
            return pipe(
                prompt, negative_prompt=negative, num_inference_steps=steps, guidance_scale=guidance, height=height,
                width=width, latents=noise, generator=generator, output_type="latent").images
    finally:
        for patch in patches:
            patch.stop()


def relative(found, reference):
    """Norm of the difference over norm of the reference."""
    found, reference = found.double(), reference.double()
    return float((found - reference).norm() / reference.norm())


# What tests of adapters draw: two DDIM steps stand for one call of the UNet, which the binary does not offer.
PROMPT, NEGATIVE = "a fluent 3d emoji of a sks cat face on a blue background", "a red apple!"


def two_steps(pipe, noise):
    """Latents of diffusers; `hra sample` gives the same with the words of the fixture `draw`."""
    height, width = (side * pipe.vae_scale_factor for side in noise.shape[2:])
    return sample(pipe, "ddim", PROMPT, NEGATIVE, height=height, width=width, noise=noise, steps=2, guidance=4.0)
