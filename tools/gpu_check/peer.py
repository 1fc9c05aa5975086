"""The Python half of the speed part: diffusers and PEFT doing what the program does, as diffusers' scripts do it.

    peer.py serve     reads requests, one JSON object a line; each is done in a fork, so that the libraries are imported once
    peer.py once      does one request in this process

An answer is one line of JSON. Records of a training have the form of the program's own, and pictures its names. Needs torch,
diffusers, transformers, PEFT.
"""

import json
import os
import pathlib
import shutil
import sys
import time

# How many GPUs there are is then asked of NVML: asking CUDA would begin its use, after which a process cannot fork.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]
PROMPT = "a photo of sks dog"
LIBRARIES = ["torch", "diffusers", "transformers", "peft"]
TOKENS = ["bos_token_id", "eos_token_id", "pad_token_id"]


def dtype_of(name):
    import torch
    return {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[name]


def make_model(request):
    """A folder of Stable Diffusion 1.5's size with random weights in f16: the public configuration's numbers."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    folder, cases = pathlib.Path(request["folder"]), pathlib.Path(request["pipeline"])
    shutil.copytree(cases / "tokenizer", folder / "tokenizer")
    shutil.copytree(cases / "scheduler", folder / "scheduler")
    shutil.copy(cases / "model_index.json", folder)
    path = folder / "tokenizer/tokenizer_config.json"
    tokenizer = json.loads(path.read_text())
    path.write_text(json.dumps({**tokenizer, "model_max_length": 77}))
    ids = json.loads((cases / "text_encoder/config.json").read_text())
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    with torch.device(request["device"]):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4, sample_size=512)
        text = CLIPTextModel(CLIPTextConfig(
            vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
            projection_dim=768, hidden_act="quick_gelu", **{name: ids[name] for name in TOKENS}))
    for name, part in (("unet", unet), ("vae", vae), ("text_encoder", text)):
        part.save_pretrained(folder / name)
    return {"device": request["device"], "values": sum(p.numel() for part in (unet, vae, text) for p in part.parameters())}


def load(request):
    """UNet, VAE, text encoder and tokenizer of the folder, frozen, on the device in the number format."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    folder, dtype = request["model"], dtype_of(request["dtype"])
    parts = [
        UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=dtype),
        AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=dtype),
        CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=dtype),
    ]
    for part in parts:
        part.requires_grad_(False)
        part.to(request["device"])
    return (*parts, CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer"))


def pixels_of(folder, side):
    """The pictures of a folder in the order of their names, -1 to 1."""
    import numpy
    import torch
    from PIL import Image

    paths = sorted(pathlib.Path(folder).glob("*.png"))
    pictures = [Image.open(path).convert("RGB").resize((side, side)) for path in paths]
    rows = [torch.from_numpy(numpy.asarray(picture).copy()).permute(2, 0, 1) for picture in pictures]
    return torch.stack(rows).float() / 127.5 - 1


def cached(request, vae, text, tokenizer):
    """What does not change from step to step, made once as the program does: the pictures' moments, the prompt's states."""
    import torch

    with torch.no_grad():
        pixels = pixels_of(request["data"], request["resolution"]).to(request["device"], vae.dtype)
        found = [vae.encode(row[None]).latent_dist for row in pixels]
        mean, deviation = (torch.cat(rows) * vae.config.scaling_factor for rows in zip(*[(d.mean, d.std) for d in found]))
        tokens = tokenizer(PROMPT, padding="max_length", truncation=True, return_tensors="pt").input_ids
        states = text(tokens.to(request["device"]))[0]
    return mean, deviation, states


def train(request):
    """LoRA r 4 on the attention projections: the step of diffusers' train_dreambooth_lora.py."""
    import torch
    from diffusers import DDPMScheduler
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    device, dtype, batch = torch.device(request["device"]), dtype_of(request["dtype"]), request["batch"]
    torch.manual_seed(0)
    unet, vae, text, tokenizer = load(request)
    mean, deviation, states = cached(request, vae, text, tokenizer)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=ATTENTION))
    cast_training_params(unet, dtype=torch.float32)
    unet.train()
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=1e-2, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    schedule = DDPMScheduler.from_pretrained(request["model"], subfolder="scheduler")
    model = torch.compile(unet) if request.get("compile") else unet
    states = states.expand(batch, -1, -1)
    # Made at once: an index from a list would wait for the device at every step.
    order = (torch.arange(batch, batch * (request["steps"] + 1), device=device) % len(mean)).view(-1, batch)
    started = time.perf_counter()
    for step in range(1, request["steps"] + 1):
        rows = order[step - 1]
        latents = mean[rows] + deviation[rows] * torch.randn_like(mean[rows])
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, schedule.config.num_train_timesteps, (batch,), device=device)
        noisy = schedule.add_noise(latents, noise, timesteps)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            found = model(noisy.to(dtype), timesteps, states, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(found.float(), noise.float())
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        # As often as the program writes a record, which waits for the device.
        if step % request["block"] == 0:
            record(request, {"step": step, "loss": loss.item(), "seconds": time.perf_counter() - started})
    return {"device": str(parameters[0].device)}


def record(request, entry):
    import torch

    if request["device"] != "cpu":
        entry["gpu_allocated_peak"] = torch.cuda.max_memory_allocated()
        entry["gpu_reserved_peak"] = torch.cuda.max_memory_reserved()
    with open(pathlib.Path(request["out"]) / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def draw(request):
    """Pictures by DDIM with guidance, one after the other."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    unet, vae, text, tokenizer = load(request)
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, safety_checker=None, feature_extractor=None,
        scheduler=DDIMScheduler.from_pretrained(request["model"], subfolder="scheduler"), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    side = request["resolution"]
    for number in range(request["pictures"]):
        picture = pipe(
            PROMPT, num_inference_steps=request["steps"], guidance_scale=7.5, height=side, width=side,
            generator=torch.Generator("cpu").manual_seed(0)).images[0]
        picture.save(pathlib.Path(request["out"]) / f"{number:04}-0000.png")
    answer = {"device": str(unet.device)}
    if request["device"] != "cpu":
        answer.update(allocated=torch.cuda.max_memory_allocated(), reserved=torch.cuda.max_memory_reserved())
    return answer


def import_all():
    """Imports what requests need; a library that is missing is told by the request that needs it."""
    for name in [*LIBRARIES, "diffusers.training_utils", "PIL.Image"]:
        try:
            __import__(name)
        except Exception as error:
            print(f"cannot import {name}: {error}", file=sys.stderr, flush=True)
    # The parts of diffusers and transformers are imported when they are first asked for.
    try:
        from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401
        from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401
    except Exception as error:
        print(f"cannot import: {error}", file=sys.stderr, flush=True)


def answer_to(request):
    """The answer as a line; every error is one too."""
    try:
        if request.get("sync_log"):
            os.environ["HRA_SYNC_LOG"] = request["sync_log"]
        import torch
        # What libtorch has by itself, and so the program: convolutions may round to TF32, matrix products do not.
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = True, False
        found = {"model": make_model, "train": train, "draw": draw}[request["do"]](request)
        # As they were imported; what a request does not need is not there.
        found["versions"] = {name: sys.modules[name].__version__ for name in LIBRARIES if name in sys.modules}
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"[:600]}
    return json.dumps(found) + "\n"


def main():
    # Libraries that print must not stand between an answer and its reader.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    forks = sys.argv[1] == "serve"
    if forks:
        import_all()
    for line in sys.stdin:
        child = os.fork() if forks else 0
        if child == 0:
            out.write(answer_to(json.loads(line)))
            out.flush()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            out.write(json.dumps({"error": f"the process ended with status {status}"}) + "\n")
            out.flush()


if __name__ == "__main__":
    main()
