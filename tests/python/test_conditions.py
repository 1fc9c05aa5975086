"""`hra prepare canny` beside cv2.Canny, and the scores of `hra evaluate` beside numpy's.

Needs pytest, numpy, pillow, opencv-python and the binary (conftest.py). Photographs are the DreamBooth ones below $HRA_SHARED or
../shared (else that test is skipped).
"""

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("HRA_SHARED", ROOT.parent / "shared"))
PHOTOS = sorted((SHARED / "dreambooth" / "dataset").glob("*/*.jpg"))


def compared(hra, folder, low, high):
    """Share of pixels that agree over all pictures of a folder, and how many of them are edges."""
    output = folder / f"edges-{low}-{high}"
    told = hra("prepare", "canny", folder, "--low", low, "--high", high, "--output", output, "--json")
    assert json.loads(told.stdout)["skipped"] == []
    same = total = edges = 0
    for path in sorted(folder.glob("*.png")):
        ours = np.array(Image.open(output / path.name).convert("L"))
        theirs = cv2.Canny(cv2.imread(str(path)), low, high)
        assert ours.shape == theirs.shape and set(np.unique(ours)) <= {0, 255}
        same += (ours == theirs).sum()
        total += theirs.size
        edges += (theirs > 0).sum()
    assert total > 0
    return same / total, edges


@pytest.mark.skipif(not PHOTOS, reason=f"no photographs below {SHARED}: set HRA_SHARED")
def test_edges_of_photographs(hra, tmp_path):
    """Each subject's first photograph, losslessly, so that both sides see the same pixels."""
    firsts = {photo.parent: photo for photo in reversed(PHOTOS)}
    for folder, photo in sorted(firsts.items()):
        Image.open(photo).convert("RGB").save(tmp_path / f"{folder.name}.png", compress_level=1)
    for low, high in [(100, 200), (40, 90)]:
        share, edges = compared(hra, tmp_path, low, high)
        print(f"thresholds {low} and {high}: {share:.6%} of the pixels agree, {edges} edges")
        assert share >= 0.995 and edges > 10_000


def test_edges_of_random_pictures(hra, tmp_path):
    """Noise, coarse and fine, few and many levels: equal gradients of channels and neighbours are frequent."""
    rng = np.random.default_rng(3)
    for i, (width, height) in enumerate([(1, 1), (1, 16), (16, 1), (2, 3), (7, 5), (64, 48), (101, 77), (320, 33)]):
        for levels in (2, 4, 256):
            noise = rng.integers(0, levels, (height, width, 3)) * (255 // (levels - 1))
            Image.fromarray(noise.astype(np.uint8)).save(tmp_path / f"{i}-{levels}.png")
            smooth = cv2.GaussianBlur(noise.astype(np.uint8), (0, 0), 2)
            Image.fromarray(smooth).save(tmp_path / f"{i}-{levels}-smooth.png")
    for low, high in [(100, 200), (0, 0), (10, 60), (700, 1500)]:
        share, edges = compared(hra, tmp_path, low, high)
        print(f"thresholds {low} and {high}: {share:.6%} of the pixels agree, {edges} edges")
        assert share >= 0.995 and edges > 100


def test_scores_of_edges(hra, tmp_path):
    rng = np.random.default_rng(4)
    expected = {"edge_f1": [], "edge_iou": []}
    for name in ("real", "drawn"):
        (tmp_path / name).mkdir()
    for i in range(6):
        real = cv2.GaussianBlur(rng.integers(0, 256, (40, 56, 3), dtype=np.uint8), (0, 0), 1 + i / 4)
        drawn = np.clip(real + rng.normal(0, 6, real.shape), 0, 255).astype(np.uint8)
        masks = []
        for name, picture in (("real", real), ("drawn", drawn)):
            cv2.imwrite(str(tmp_path / name / f"{i}.png"), picture)
            masks.append(cv2.Canny(picture, 60, 120) > 0)
        a, b = masks
        expected["edge_iou"].append((a & b).sum() / (a | b).sum())
        precision, recall = (a & b).sum() / b.sum(), (a & b).sum() / a.sum()
        expected["edge_f1"].append(2 * precision * recall / (precision + recall))
    told = json.loads(hra("evaluate", tmp_path / "drawn", "--edges-of", tmp_path / "real", "--canny-low", 60, "--canny-high", 120,
                          "--device", "cpu", "--json").stdout)
    for key, values in expected.items():
        found = [picture["scores"][key] for picture in told["pictures"]]
        assert found == pytest.approx(values, abs=1e-12)
        assert told["scores"][key] == pytest.approx(np.mean(values), abs=1e-12)
        assert 0.1 < np.mean(values) < 0.95, "pictures that say something"
        # The interval of the mean by a bootstrap of our own.
        draws = np.array(values)[rng.integers(0, 6, (100_000, 6))].mean(1)
        assert told["intervals"][key] == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.01)


def iou_metric(pairs, classes, ignored, reduce_zero):
    """mIoU, mAcc and aAcc as MMSegmentation's IoUMetric defines them: areas summed over pictures, NaN classes left out."""
    both, predicted, true = (np.zeros(classes) for _ in range(3))
    for truth, found in pairs:
        if reduce_zero:
            truth = np.where(truth == 0, ignored, np.where(truth == ignored, ignored, truth - 1))
        truth, found = truth[truth != ignored], found[truth != ignored]
        for c in range(classes):
            both[c] += ((truth == c) & (found == c)).sum()
            predicted[c] += (found == c).sum()
            true[c] += (truth == c).sum()
    with np.errstate(invalid="ignore"):
        return (np.nanmean(both / (predicted + true - both)), np.nanmean(both / true), both.sum() / true.sum())


@pytest.mark.parametrize("reduce_zero", [False, True])
def test_scores_of_segmentation(hra, tmp_path, reduce_zero):
    """Class 9 of 11 only in predictions, class 10 nowhere."""
    rng = np.random.default_rng(5)
    pairs = []
    for name in ("truth", "found"):
        (tmp_path / name).mkdir()
    for i in range(5):
        truth = rng.integers(0, 9, (30 + i, 40)).astype(int)
        found = np.where(rng.random(truth.shape) < 0.6, truth - reduce_zero, rng.integers(0, 10, truth.shape))
        found = np.clip(found, 0, 9)
        truth[rng.random(truth.shape) < 0.1] = 255
        pairs.append((truth, found))
        Image.fromarray(truth.astype(np.uint8)).save(tmp_path / "truth" / f"{i}.png")
        Image.fromarray(found.astype(np.uint16)).save(tmp_path / "found" / f"{i}.png")
    (tmp_path / "palette.json").write_text(json.dumps({f"c{i}": [i, i, 0] for i in range(11)}))
    words = ["--reduce-zero-label"] if reduce_zero else []
    expected = iou_metric(pairs, 11, 255, reduce_zero)
    for more in ([], ["--palette", tmp_path / "palette.json"]):
        told = json.loads(hra("evaluate", "--segmentation-truth", tmp_path / "truth", "--segmentation-predictions",
                              tmp_path / "found", "--device", "cpu", "--json", *words, *more).stdout)
        found = [told["scores"][key] for key in ("seg_miou", "seg_macc", "seg_aacc")]
        assert found == pytest.approx(expected, abs=1e-12)


def test_scores_of_landmarks(hra, tmp_path):
    rng = np.random.default_rng(6)
    errors = []
    for name in ("truth", "found"):
        (tmp_path / name).mkdir()
    for i in range(7):
        truth = rng.random((68, 2)) * 1024
        found = truth / 2 + rng.normal(0, 3, truth.shape)
        (tmp_path / "truth" / f"{i}.json").write_text(json.dumps(truth.tolist()))
        if i < 6:
            errors.append(np.linalg.norm(truth / 2 - found, axis=1).mean())
            np.savetxt(tmp_path / "found" / f"{i}.txt", found)
    told = json.loads(hra("evaluate", "--landmarks-truth", tmp_path / "truth", "--landmarks-predictions", tmp_path / "found",
                          "--truth-scale", 0.5, "--device", "cpu", "--json").stdout)
    assert told["scores"]["landmark_error"] == pytest.approx(np.mean(errors), abs=1e-9)
    assert told["landmarks"] == {"pictures": 7, "without_prediction": ["6"], "without_truth": []}
