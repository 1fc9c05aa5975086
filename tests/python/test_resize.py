"""The crate's pixels beside Pillow's: resizing to the same bit, decoding within a level or two, PNG texts.

Needs pytest, numpy and pillow, and the DreamBooth photographs below $HRA_SHARED or ../shared (else those tests are skipped).
"""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("HRA_SHARED", ROOT.parent / "shared"))
PHOTOS = sorted((SHARED / "dreambooth" / "dataset").glob("*/*.jpg"))
FILTERS = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC, "lanczos": Image.LANCZOS}
ORIENTATION = 0x0112

needs_photos = pytest.mark.skipif(not PHOTOS, reason=f"no photographs below {SHARED}: set HRA_SHARED")


@pytest.fixture(scope="session")
def ours(tmp_path_factory):
    """Runs tests/probes/resize.rs on a file and gives the path of the picture it wrote."""
    subprocess.run(["cargo", "build", "--quiet", "--example", "resize"], cwd=ROOT, check=True)
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    output = tmp_path_factory.mktemp("ours") / "out.png"

    def run(path, size, name="bilinear", *text):
        command = [target / "debug" / "examples" / "resize", path, output, size, name, *text]
        subprocess.run(command, check=True)
        return output

    return run


@pytest.fixture(scope="session")
def lossless(tmp_path_factory):
    """The photographs as PNG files, so that both sides resize the same pixels."""
    folder = tmp_path_factory.mktemp("lossless")
    paths = []
    for photo in PHOTOS:
        path = folder / f"{photo.parent.name}_{photo.stem}.png"
        Image.open(photo).convert("RGB").save(path, compress_level=1)
        paths.append(path)
    return paths


def pixels(image):
    return np.array(image if isinstance(image, Image.Image) else Image.open(image))


def short_side(image, size, method):
    """torchvision.transforms.Resize(size) on a PIL image."""
    short, long = sorted(image.size)
    new = (size, int(size * long / short))
    return image.resize(new if image.width <= image.height else new[::-1], method)


@needs_photos
@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("side", [512, 224, 64, 1400])
def test_whole_photographs_to_a_square(ours, lossless, name, side):
    for path in lossless[::3]:
        expected = Image.open(path).resize((side, side), FILTERS[name])
        assert (pixels(ours(path, f"{side}x{side}", name)) == pixels(expected)).all(), path.name


@needs_photos
@pytest.mark.parametrize("box", [(0, 0, 700, 411), (10, 20, 333, 650), (100, 100, 163, 147), (200, 3, 301, 697)])
@pytest.mark.parametrize("side", [512, 224, 64])
def test_short_side(ours, lossless, tmp_path, box, side):
    """Oblong cuts, among them one of 63 x 47 that is enlarged, and one so high that Pillow filters its columns first."""
    image = Image.open(lossless[0]).crop(box)
    image.save(tmp_path / "in.png")
    for name, method in FILTERS.items():
        expected = short_side(image, side, method)
        assert (pixels(ours(tmp_path / "in.png", f"short:{side}", name)) == pixels(expected)).all()


@needs_photos
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photograph(ours, lossless, tmp_path, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.open(lossless[0]).crop((0, 0, 700, 500)).save(tmp_path / "in.png", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "in.png"))
    assert upright.size == ((500, 700) if orientation > 4 else (700, 500))
    expected = short_side(upright, 224, Image.BILINEAR)
    assert (pixels(ours(tmp_path / "in.png", "short:224")) == pixels(expected)).all()


@needs_photos
def test_jpeg_decoders_agree(ours, tmp_path):
    """Ours and libjpeg-turbo differ in rounding only. A turned one, too: its tag is in the JPEG."""
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.open(PHOTOS[0]).crop((0, 0, 601, 433)).save(turned, quality=92, exif=exif)
    for photo in [*PHOTOS, turned]:
        expected = pixels(ImageOps.exif_transpose(Image.open(photo)).convert("RGB")).astype(int)
        found = pixels(ours(photo, "same")).astype(int)
        assert found.shape == expected.shape, photo
        difference = abs(found - expected)
        print(photo.name, "mean", difference.mean(), "max", difference.max())
        assert difference.mean() < 0.5 and np.percentile(difference, 99.9) <= 2, photo


@pytest.mark.parametrize("size", [(40, 30), (41, 30), (43, 28), (9, 40), (8, 8)])
def test_center_crop(ours, tmp_path, size):
    """torchvision's CenterCrop(12): offsets int(round(rest / 2)), black around what is smaller."""
    values = np.random.default_rng(0).integers(1, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "in.png")
    (width, height), crop = size, 12
    left, above = max(crop - width, 0) // 2, max(crop - height, 0) // 2
    right, below = (max(crop - width, 0) + 1) // 2, (max(crop - height, 0) + 1) // 2
    padded = np.pad(values, ((above, below), (left, right), (0, 0)))
    y, x = (int(round((length - crop) / 2.0)) for length in padded.shape[:2])
    assert (pixels(ours(tmp_path / "in.png", f"center:{crop}")) == padded[y : y + crop, x : x + crop]).all()


def test_pillow_reads_our_texts(ours, tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "in.png")
    texts = {
        "prompt": "a sks dog, snow",
        "latin": "caf\u00e9 \u00d7 2",
        "other": "\u72ac \u2014 \U0001f436",
        "lines": '{"steps": 50,\n "seed": 1}',
        "empty": "",
        "long": "word " * 20000,
    }
    output = ours(tmp_path / "in.png", "same", "bilinear", *(f"{k}={v}" for k, v in texts.items()))
    image = Image.open(output)
    assert image.text == texts
    assert (pixels(image) == values).all()
    kinds = [chunk for chunk in (b"tEXt", b"iTXt") for _ in range(output.read_bytes().count(chunk))]
    assert kinds == [b"tEXt"] * 5 + [b"iTXt"]
