"""The dry run of tools/gpu_check.sh with the Python halves: PEFT trains and diffusers draws beside the program."""

import json
import os
import subprocess
import sys

import cases


def test_the_comparison_of_speed_runs_both_sides(tmp_path):
    command = ["bash", cases.REPO / "tools/gpu_check.sh", "--dry-run", "--parts", "speed", "--python", sys.executable, "--out", tmp_path]
    environ = dict(os.environ, HRA_ROOT=str(cases.REPO))
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environ)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    sides = {figure["side"] for figure in results["figures"] if figure["milliseconds"] > 0}
    assert sides == {"hra", "hra HRA r 8", "hra LoRA r 4", "PEFT LoRA r 4", "diffusers"}
    skipped = [check["name"] for check in results["checks"] if "skipped" in check]
    assert len(skipped) == 4, f"only what needs a GPU is skipped: {skipped}"
