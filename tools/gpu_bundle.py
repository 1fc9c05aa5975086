#!/usr/bin/env python3
"""Packs what tools/gpu_check.sh needs on a machine with a GPU and git does not hold: what `make gpu-bundle` calls.

    hra.xz, cuda_tests.xz     the program and the built tests/cuda.rs, stripped; unpacked there by Python
    libsync_counter.so        counts how often the host waits for the GPU (tools/gpu_check/sync_counter.c)
    wheels/                   the Python packages that such a machine lacks: torch, transformers and PEFT are there

The checkout and this folder travel together and may have 64 MiB. Standard library only; wheels come through pip, so that its
index and proxy settings hold.
"""

import argparse
import lzma
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

from gpu_check.machine import COUNTER, COUNTER_FLAGS

ROOT = pathlib.Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "tests/python/requirements.txt"
LIMIT = 64 << 20
# What diffusers needs and neither transformers nor PEFT do.
NEEDS = ["importlib_metadata==10.2.0", "zipp==4.1.2"]


class Failure(Exception):
    """Something the user has to act on."""


def run(command, what):
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise Failure(f"{what}: cannot run {command[0]}: {error}") from None
    if done.returncode:
        raise Failure(f"{what}: {done.stdout.strip()[-800:]}")
    return done.stdout


def pack(program, target):
    """A stripped copy, compressed; what the program is linked to stays as it is."""
    if not program.is_file():
        raise Failure(f"expected a program, found none at {program}\nhint: `make gpu-bundle` builds it first")
    with tempfile.TemporaryDirectory() as scratch:
        stripped = pathlib.Path(scratch) / program.name
        run(["strip", "-o", str(stripped), str(program)], f"stripping {program.name}")
        with open(stripped, "rb") as source, lzma.open(target, "wb", preset=9 | lzma.PRESET_EXTREME) as packed:
            shutil.copyfileobj(source, packed, 1 << 20)


def wheels_of(folder):
    """The wheels, downloaded where they are not there yet."""
    pinned = re.findall(r"^diffusers==\S+", REQUIREMENTS.read_text(encoding="utf-8"), re.MULTILINE)
    if not pinned:
        raise Failure(f"{REQUIREMENTS.relative_to(ROOT)} pins no diffusers")
    wanted = [*pinned, *NEEDS]
    there = {"-".join(path.name.split("-")[:2]) for path in folder.glob("*.whl")}
    if there != {package.replace("==", "-") for package in wanted}:
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                   "--only-binary=:all:", "--dest", str(folder)]
        if os.environ.get("WHEELS"):
            command += ["--find-links", os.environ["WHEELS"]]
        run(command + wanted, "downloading wheels")
    return sorted(folder.glob("*.whl"))


def tree_size():
    """Bytes of what travels as the checkout: files that git holds, and those that it would."""
    listed = run(["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"], "listing the checkout")
    paths = {ROOT / name for name in listed.split("\0") if name}
    return sum(path.lstat().st_size for path in paths if path.is_symlink() or path.is_file())


def bundle(program, tests, out):
    """Makes the folder; says what is in it, and fails where it is too large."""
    out.mkdir(parents=True, exist_ok=True)
    pack(program, out / "hra.xz")
    pack(tests, out / "cuda_tests.xz")
    source = ROOT / "tools/gpu_check/sync_counter.c"
    run(["cc", *COUNTER_FLAGS, "-o", str(out / COUNTER), str(source), "-ldl"], "compiling the counter")
    parts = [out / "hra.xz", out / "cuda_tests.xz", out / COUNTER, *wheels_of(out / "wheels")]
    strangers = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file() and path not in parts)
    if strangers:
        raise Failure(f"{out} holds other files, which would travel too: {', '.join(strangers)}\nhint: remove the folder")
    total = tree_size()
    print(f"{total / 1e6:8.2f} MB  the checkout")
    for part in parts:
        size = part.stat().st_size
        total += size
        print(f"{size / 1e6:8.2f} MB  {part.relative_to(out)}")
    print(f"{total / 1e6:8.2f} MB  together, of {LIMIT / 1e6:.2f}")
    if total > LIMIT:
        raise Failure(f"expected at most {LIMIT} bytes, found {total}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--program", type=pathlib.Path, required=True, help="the built hra")
    parser.add_argument("--tests", type=pathlib.Path, required=True, help="the built tests/cuda.rs")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the bundle, such as .gpu")
    given = parser.parse_args()
    try:
        bundle(given.program, given.tests, given.out)
    except Failure as failure:
        print(f"gpu_bundle: error: {failure}", file=sys.stderr)
        return 1
    print(f"bash tools/gpu_check.sh --bundle {given.out} --out OUT")
    return 0


if __name__ == "__main__":
    sys.exit(main())
