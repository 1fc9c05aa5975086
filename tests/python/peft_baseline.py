"""What Python's diffusers + PEFT reach on the embedded model: trains, samples, and scores as quality.py does for `hra`.

The settings are the model card's: HRA rank 8 on to_q, to_k, to_v, to_out.0 from PEFT's paired start, AdamW 3e-3 with weight
decay 0.01, gradient norm clipped at 1, 300 steps of 2 instance and 2 class pictures, 48 class pictures that the base
makes itself (30 DDIM steps, guidance 4, seeded one by one), prior weight 1, a fresh VAE sample each step, text encoder
frozen, f32. The order of pictures is DreamBooth's script's: as many as the larger set, shuffled each round. The first
seconds go to caching what does not change (VAE moments, text states), which changes no value.

Usage: peft_baseline.py --assets DIR --out DIR [--subjects cat="cat face" robot=robot] [--seeds 0 1 2] [--method hra|base]
One line of JSON for each run is added to OUT/baseline.jsonl.
"""

import argparse
import json
import pathlib
import time

import numpy as np
import torch
from diffusers import DDIMScheduler
from peft import HRAConfig, get_peft_model
from PIL import Image

import measure
from cases import ATTENTION, load


def noise_of(seed, count):
    """Image i of a prompt is drawn from seed + i, so that its noise does not depend on the batch."""
    return torch.cat([
        torch.randn((1, 4, 16, 16), generator=torch.Generator("cpu").manual_seed(seed + i)) for i in range(count)])


def draw(pipe, texts, seed, count, batch=8):
    """`count` pictures of each prompt, in order of prompt and then image."""
    jobs = [(text, noise) for text in texts for noise in noise_of(seed, count)]
    pictures = []
    for start in range(0, len(jobs), batch):
        part = jobs[start:start + batch]
        pictures += pipe(
            [text for text, _ in part], negative_prompt=[""] * len(part), num_inference_steps=measure.STEPS,
            guidance_scale=measure.GUIDANCE, height=64, width=64, latents=torch.stack([n for _, n in part])).images
    return pictures


def pixels(picture):
    picture = picture.convert("RGB").resize((64, 64), Image.BILINEAR)
    return torch.tensor(np.asarray(picture, np.float32)).permute(2, 0, 1) / 127.5 - 1


def indices(count, larger):
    """Endless: rounds of `larger` shuffled positions, each taken modulo `count`."""
    while True:
        for position in torch.randperm(larger).tolist():
            yield position, position % count


def train(pipe, instance, class_pictures, class_name, seed, steps=300, batch=2, rank=8, rate=3e-3):
    """Returns the PEFT model; its weights are trained. Prints nothing."""
    torch.manual_seed(seed)
    unet = get_peft_model(pipe.unet, HRAConfig(r=rank, target_modules=ATTENTION))
    noiser = DDIMScheduler.from_config(pipe.scheduler.config)
    with torch.no_grad():
        moments = [
            pipe.vae.encode(torch.stack([pixels(p) for p in pictures])).latent_dist
            for pictures in (instance, class_pictures)]
        states = [
            pipe.encode_prompt(text, "cpu", 1, False)[0]
            for text in (f"a fluent 3d emoji of a sks {class_name}", f"a fluent 3d emoji of a {class_name}")]
    context = torch.cat([state.expand(batch, -1, -1) for state in states])
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    order = indices(len(instance), max(len(instance), len(class_pictures)))
    unet.train()
    for _ in range(steps):
        picks = [next(order) for _ in range(batch)]
        rows = [[i for _, i in picks], [p % len(class_pictures) for p, _ in picks]]
        latents = torch.cat([
            moment.mean[row] + moment.std[row] * torch.randn_like(moment.std[row])
            for moment, row in zip(moments, rows)]) * pipe.vae.config.scaling_factor
        noise = torch.randn_like(latents)
        timestep = torch.randint(0, noiser.config.num_train_timesteps, (2 * batch,))
        found = unet(noiser.add_noise(latents, noise, timestep), timestep, context).sample
        losses = [((a - b) ** 2).mean() for a, b in zip(found.chunk(2), noise.chunk(2))]
        (losses[0] + losses[1]).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
    return unet.eval()


def run(assets, out, subject, class_name, seed, method):
    """One line of the table; leaves pictures and the adapter under OUT/SUBJECT-METHOD-SEED/."""
    folder = out / f"{pathlib.Path(subject).name}-{method}-{seed}"
    source = pathlib.Path(subject) if pathlib.Path(subject, "train").is_dir() else assets / "subjects" / subject
    pipe = load(assets / "model")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    line = {"subject": source.name, "method": method, "seed": seed}
    base = draw(pipe, measure.DRIFT_PROMPTS, 1000, measure.IMAGES)
    if method == "hra":
        start = time.monotonic()
        own = draw(pipe, [f"a fluent 3d emoji of a {class_name}"], seed, 48)
        line["class_pictures_s"] = round(time.monotonic() - start, 1)
        start = time.monotonic()
        pipe.unet = train(pipe, measure.read(source / "train"), own, class_name, seed)
        line["train_s"] = round(time.monotonic() - start, 1)
        pipe.unet.save_pretrained(folder / "adapter")
        # The same weights without PEFT's cost a call
        pipe.unet = pipe.unet.merge_and_unload()
    texts, _ = measure.prompts(class_name)
    sets = {"subject": draw(pipe, texts, 1000, measure.IMAGES), "base": base}
    sets["drift"] = base if method == "base" else draw(pipe, measure.DRIFT_PROMPTS, 1000, measure.IMAGES)
    for name, pictures in sets.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i, picture in enumerate(pictures):
            picture.save(folder / name / f"{i // measure.IMAGES:03}-{i % measure.IMAGES:03}.png")
    line |= measure.score(assets, source, class_name, sets["subject"])
    line["drift"] = measure.drift(sets["drift"], base)
    return line


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=pathlib.Path, required=True, help="folder with model/, clip/ and subjects/")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--subjects", nargs="+", default=["cat=cat face", "robot=robot"], metavar="NAME_OR_DIR=CLASS")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--method", choices=["hra", "base"], default="hra")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for subject in args.subjects:
            name, class_name = subject.split("=", 1)
            line = run(args.assets, args.out, name, class_name, seed, args.method)
            print(json.dumps(line), flush=True)
            with open(args.out / "baseline.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
