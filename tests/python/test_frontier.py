"""Likeness at the same drift: the report's numbers, worked out anew by numpy from frontier.csv alone."""

import csv
import json

import cases
import numpy as np
import pytest

CONFIG = """
title = "frontier"
output_dir = "OUT"
seeds = [0, 1]
score_steps = [4]
[train]
threads = 1
[train.model]
pretrained_model_name_or_path = "ASSETS/tiny-sd"
[train.schedule]
max_train_steps = 8
[train.checkpoints]
checkpointing_steps = 4
[draw]
prompts = ["a fluent 3d emoji of a {subject}", "a {subject} on a red background"]
validation_prompts = ["a {subject}"]
drift_prompts = ["a noto emoji of a dog face", "a noto emoji of a cake"]
num_images = 2
num_validation_images = 1
num_drift_images = 1
scheduler = "ddim"
steps = 4
guidance = 3.0
[scores]
clip = "ASSETS/tiny-clip"
[frontier]
scales = [0, 0.5, 1, 2]
drifts = [1.0, 4.0, 9.0]
drift_limit = 6.0
[[subject]]
name = "cat"
class = "cat face"
data_dir = "ASSETS/subjects/cat/train"
test_data_dir = "ASSETS/subjects/cat/held_out"
instance_prompt = "a {subject}"
[[subject]]
name = "robot"
class = "robot"
data_dir = "ASSETS/subjects/robot/train"
test_data_dir = "ASSETS/subjects/robot/held_out"
instance_prompt = "a {subject}"
[[method]]
label = "HRA"
adapter = { method = "hra", rank = 8 }
optimizer = { learning_rate = 3e-2 }
[[method]]
label = "LoRA"
adapter = { method = "lora", rank = 4 }
optimizer = { learning_rate = 3e-2 }
"""


def envelope(points):
    """(drift, likeness, number) of the points that no other one beats with less drift, in the order of drift."""
    kept, best = [], -np.inf
    for drift, likeness, number in sorted(points, key=lambda p: (p[0], -p[1])):
        if likeness > best:
            kept.append((drift, likeness, number))
            best = likeness
    return np.array(kept)


class Curve:
    def __init__(self, drift, likeness, fidelity):
        self.fidelity = fidelity
        self.kept = envelope(zip(drift, likeness, range(len(drift))))
        self.reach = max(drift)

    def likeness_at(self, drift):
        if drift > self.reach:
            return None
        return np.interp(drift, self.kept[:, 0], self.kept[:, 1])

    def fidelity_at(self, drift):
        if drift > self.reach:
            return None
        return np.interp(drift, self.kept[:, 0], [self.fidelity[int(n)] for n in self.kept[:, 2]])

    def drift_at(self, likeness):
        if not self.kept[0, 1] <= likeness <= self.kept[-1, 1]:
            return None
        return np.interp(likeness, self.kept[:, 1], self.kept[:, 0])

    def mean_up_to(self, limit):
        if limit > self.reach:
            return None
        inside = self.kept[self.kept[:, 0] < limit]
        x = np.append(inside[:, 0], limit)
        y = np.append(inside[:, 1], self.likeness_at(limit))
        return np.trapezoid(y, x) / limit


@pytest.fixture(scope="module")
def compared(hra, tmp_path_factory):
    folder = tmp_path_factory.mktemp("frontier")
    text = CONFIG.replace("OUT", str(folder / "out")).replace("ASSETS", str(cases.REPO / "assets"))
    (folder / "c.toml").write_text(text)
    hra("compare", folder / "c.toml")
    with open(folder / "out/frontier.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return rows, json.loads((folder / "out/report.json").read_text())


def values(rows, method, places, kind, score, split):
    """Means over subjects of the means over their seeds and prompts, at each place."""
    subjects = sorted({r["subject"] for r in rows})
    found = np.zeros((len(subjects), len(places)))
    for s, subject in enumerate(subjects):
        for p, place in enumerate(places):
            base = place[1] == 0.0
            if base and kind == "unrelated":
                continue
            here = [float(r["value"]) for r in rows if r["subject"] == subject and r["kind"] == kind
                    and r["score"] == score and r["set"] == split
                    and r["method"] == ("base" if base else method)
                    and (int(r["step"]), float(r["scale"])) == place]
            assert here, (method, subject, place, kind, score)
            found[s, p] = np.mean(here)
    return found.mean(axis=0)


def test_matched_values_are_numpys(compared):
    rows, report = compared
    frontier = report["frontier"]
    places = [(0, 0.0)] + [(step, scale) for step in (4, 8) for scale in (0.5, 1.0, 2.0)]
    curves = {}
    for told in frontier["curves"]:
        of = lambda kind, score, split="test": values(rows, told["label"], places, kind, score, split)
        drift, likeness, fidelity = of("unrelated", "drift"), of("prompt", "clip_i"), of("prompt", "clip_t")
        points = told["points"]
        assert [(p["step"], p["scale"]) for p in points] == places
        for key, mine in (("drift", drift), ("likeness", likeness), ("fidelity", fidelity)):
            np.testing.assert_allclose([p[key] for p in points], mine, rtol=0, atol=1e-12)
        curves[told["label"]] = curve = Curve(drift, likeness, fidelity)
        assert told["envelope"] == [int(n) for n in curve.kept[:, 2]]
    # Quarters of what both reach.
    low, high = curves["HRA"].kept[0, 1], min(curve.kept[-1, 1] for curve in curves.values())
    np.testing.assert_allclose(frontier["levels"], low + np.array([0.25, 0.5, 0.75]) * (high - low), rtol=0, atol=1e-9)
    compared_values = 0
    for told in frontier["curves"]:
        curve, reference = curves[told["label"]], curves["HRA"]
        asked = [(told["at_drift"], "likeness_at", frontier["drifts"]), (told["at_likeness"], "drift_at", frontier["levels"]),
                 ([told["area"]], "mean_up_to", [frontier["drift_limit"]])]
        for answers, question, places_asked in asked:
            for answer, place in zip(answers, places_asked, strict=True):
                mine, theirs = getattr(curve, question)(place), getattr(reference, question)(place)
                assert (answer is None) == (mine is None)
                if answer is None:
                    continue
                compared_values += 1
                assert abs(answer["value"] - mine) < 1e-9
                if told["label"] != "HRA" and theirs is not None:
                    assert abs(answer["difference"] - (mine - theirs)) < 1e-9
        for answer, drift in zip(told["fidelity"], frontier["drifts"], strict=True):
            mine = curve.fidelity_at(drift)
            assert (answer is None) == (mine is None)
            assert answer is None or abs(answer - mine) < 1e-9
    assert compared_values >= 6, "too little was measured to compare"


def test_the_chosen_point_is_the_best_of_validation_within_the_limit(compared):
    rows, report = compared
    places = [(0, 0.0)] + [(step, scale) for step in (4, 8) for scale in (0.5, 1.0, 2.0)]
    for told in report["frontier"]["curves"]:
        validated = [r for r in rows if r["set"] == "validation" and r["score"] == "clip_i" and r["kind"] == "prompt"]
        # Of the robot's pictures none is left for validation.
        subjects = {r["subject"] for r in validated}
        mine = []
        for place in places:
            method = "base" if place[1] == 0.0 else told["label"]
            here = {}
            for r in validated:
                if r["method"] == method and (int(r["step"]), float(r["scale"])) == place:
                    here.setdefault((r["subject"], r["seed"]), []).append(float(r["value"]))
            mine.append(np.mean([np.mean(v) for v in here.values()]))
        within = [i for i, p in enumerate(told["points"]) if p["drift"] <= 6.0]
        best = max(within, key=lambda i: mine[i])
        assert subjects and (told["chosen"]["step"], told["chosen"]["scale"]) == places[best]
