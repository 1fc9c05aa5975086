"""The measure of the embedded model's card: CLIP-I, background share and drift, from folders of PNGs.

`hra sample` names its pictures so that they sort by prompt and then by image, so a folder and the list of prompts are
all there is to know. CLIP-I is the mean cosine between every picture and every held-out picture. A background counts when
the mean of the four 3 x 3 corners is nearest (Euclidean, 0-255) to the colour asked for, among the eleven colours as
the model saw them in training (its blue is not #0000ff: with plain RGB a correct blue would count as gray); prompts
that name no colour are left out. Drift is the mean absolute difference, 0-255, to the base model's pictures.

Usage: measure.py --assets DIR --subject NAME --class-name CLASS --images DIR [--drift TUNED BASE]
"""

import argparse
import functools
import json
import pathlib

import numpy as np
import torch
from PIL import Image
from transformers import CLIPModel

PALETTE = {
    "red": (220, 50, 47), "orange": (245, 150, 40), "yellow": (250, 215, 70), "green": (70, 170, 80),
    "blue": (60, 120, 220), "purple": (140, 80, 190), "pink": (245, 160, 190), "brown": (130, 90, 60),
    "black": (25, 25, 28), "gray": (140, 140, 145), "white": (255, 255, 255),
}
COLOURS = ["blue", "red", "green", "black", "purple", "yellow", "pink"]
DRIFT_PROMPTS = [
    "a fluent 3d emoji of a red apple",
    "a noto emoji of a dog face",
    "a twemoji emoji of a pizza on a blue background",
    "a fluent 3d emoji of a grinning face",
]
IMAGES = 4  # for each prompt
STEPS, GUIDANCE = 30, 4.0
SIDE = 64
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def prompts(class_name):
    """The eight prompts of a subject, and the colour that each asks for (None: not counted)."""
    plain = f"a fluent 3d emoji of a sks {class_name}"
    return [plain] + [f"{plain} on a {colour} background" for colour in COLOURS], [None] + COLOURS


def read(folder):
    """The pictures of a folder in order of their names, without the grid. RGB."""
    files = sorted(f for f in pathlib.Path(folder).glob("*.png") if not f.name.startswith("grid"))
    return [Image.open(f).convert("RGB") for f in files]


@functools.cache
def clip(folder):
    return CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()


def embed(model, pictures):
    """Unit image embeddings (n, d). Pictures of another size are resized to the tower's with Lanczos."""
    rows = []
    for picture in pictures:
        if picture.size != (SIDE, SIDE):
            picture = picture.resize((SIDE, SIDE), Image.LANCZOS)
        rows.append((np.asarray(picture, np.float32) / 255 - MEAN) / DEVIATION)
    pixels = torch.tensor(np.stack(rows), dtype=torch.float32).permute(0, 3, 1, 2)
    with torch.no_grad():
        found = model.visual_projection(model.vision_model(pixels).pooler_output)
    return found / found.norm(dim=1, keepdim=True)


def clip_i(model, pictures, held_out):
    return float((embed(model, pictures) @ embed(model, held_out).T).mean())


def corner_colour(picture):
    a = np.asarray(picture, np.float64)
    corners = [a[:3, :3], a[:3, -3:], a[-3:, :3], a[-3:, -3:]]
    mean = np.mean([c.reshape(-1, 3) for c in corners], axis=(0, 1))
    return min(PALETTE, key=lambda name: np.linalg.norm(mean - PALETTE[name]))


def background(pictures, asked):
    """`asked`: a colour or None for each picture."""
    hits = [corner_colour(p) == colour for p, colour in zip(pictures, asked, strict=True) if colour]
    return sum(hits) / len(hits)


def drift(tuned, base):
    pairs = [np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean() for a, b in zip(tuned, base, strict=True)]
    return float(np.mean(pairs))


def score(assets, subject, class_name, pictures):
    """CLIP-I and background of the 8 x IMAGES pictures of a subject. `subject` is a name in assets or a folder."""
    folder = pathlib.Path(subject)
    if not (folder / "held_out").is_dir():
        folder = pathlib.Path(assets) / "subjects" / subject
    texts, colours = prompts(class_name)
    if len(pictures) != len(texts) * IMAGES:
        raise ValueError(f"expected {len(texts) * IMAGES} pictures, found {len(pictures)}")
    asked = [colour for colour in colours for _ in range(IMAGES)]
    held_out = read(folder / "held_out")
    return {
        "clip_i": clip_i(clip(str(pathlib.Path(assets) / "clip")), pictures, held_out),
        "background": background(pictures, asked),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", required=True, help="folder with clip/ and subjects/")
    parser.add_argument("--subject", required=True, help="a name under subjects/, or a folder with held_out/")
    parser.add_argument("--class-name", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--drift", nargs=2, metavar=("TUNED", "BASE"))
    args = parser.parse_args()
    result = score(args.assets, args.subject, args.class_name, read(args.images))
    if args.drift:
        result["drift"] = drift(*map(read, args.drift))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
