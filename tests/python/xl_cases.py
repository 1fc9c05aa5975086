"""Random small folders of Stable Diffusion XL, its refiner and its inpainting model, and what Python makes of them.

All is drawn from a seed. The scheduler's file says every key of Euler's, with `leading` spacing, so that nothing is left to the
defaults of the class that a test takes.
"""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from cases import shake, tiny_sd

FACTOR = 4
SCHEDULERS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler-a": EulerAncestralDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "unipc": UniPCMultistepScheduler,
}


def text_config(vocabulary=2274, **own):
    return CLIPTextConfig(
        num_hidden_layers=3, max_position_embeddings=30, vocab_size=vocabulary, bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1, **own)


def build(folder, seed, in_channels=None, refiner=False, latents=4, **of_vae):
    """Writes the folder as `save_pretrained` does; the first prompt's tower is left out of a refiner. Returns it."""
    torch.manual_seed(seed)
    first = CLIPTextModel(text_config(
        hidden_size=24, intermediate_size=48, num_attention_heads=3, hidden_act="quick_gelu", pad_token_id=2273))
    second = CLIPTextModelWithProjection(text_config(
        hidden_size=32, intermediate_size=80, num_attention_heads=4, hidden_act="gelu", projection_dim=28, pad_token_id=0))
    numbers = 5 if refiner else 6
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32, 32), layers_per_block=2, norm_num_groups=8, sample_size=16, in_channels=in_channels or latents, out_channels=latents,
        cross_attention_dim=32 if refiner else 56, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=[1, 1, 3],
        attention_head_dim=[1, 2, 4], use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=10,
        projection_class_embeddings_input_dim=28 + numbers * 10)
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 32), layers_per_block=1, norm_num_groups=8, latent_channels=latents, sample_size=64,
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3, scaling_factor=0.13025, **of_vae)
    for module in (first, second, unet, vae):
        shake(module)
    words = [
        CLIPTokenizer.from_pretrained(tiny_sd() / "tokenizer", model_max_length=30, pad_token=pad)
        for pad in ("<|endoftext|>", "!")
    ]
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading")
    StableDiffusionXLPipeline(
        vae=vae, text_encoder=None if refiner else first, text_encoder_2=second, tokenizer=None if refiner else words[0],
        tokenizer_2=words[1], unet=unet, scheduler=scheduler, force_zeros_for_empty_prompt=not refiner, add_watermarker=False,
    ).save_pretrained(folder)
    return folder


def load(folder, kind=StableDiffusionXLPipeline, scheduler=None, **own):
    """The pipeline `kind` of the folder, quiet, with the scheduler of that name."""
    pipe = kind.from_pretrained(folder, add_watermarker=False, dtype=torch.float32, **own)
    pipe.set_progress_bar_config(disable=True)
    if scheduler is not None:
        pipe.scheduler = SCHEDULERS[scheduler].from_config(pipe.scheduler.config)
    return pipe
