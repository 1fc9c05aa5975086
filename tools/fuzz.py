#!/usr/bin/env python3
"""Feeds every reader with damaged files for so many minutes: what `make fuzz MINUTES=10` runs. Stable Rust is enough.

Each reader of tests/support/readers is a target; `tests/formats/fuzz.rs` damages its good files by seeds, in a process for each
target, so that one that ends its process stops no other. The time is shared evenly. A line for each target says how many inputs it
got; a target fails if it panics, takes memory without bound, hangs, ends its process, or writes outside of its folder. The input
that did it is kept in target/fuzz/. Files lie in memory (/dev/shm) where there is room: on a disk it is the disk that is measured. Coverage does not guide it: for that, tests/fuzz/README.md says how the
same targets run under libFuzzer with a nightly compiler. Standard library only.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEST = "fuzz::no_reader_falls_over_hostile_files"
NAME = re.compile(r'^    \("(\w+)", \w+\),$', re.MULTILINE)
LINE = re.compile(r"^(\w+): (\d+) inputs in .*$", re.MULTILINE)
# One input, and the making of good files, may take so many seconds more than the target's time.
PATIENCE = 300


def targets():
    """Names of all readers, from the table that lists them."""
    return NAME.findall((ROOT / "tests/support/readers/mod.rs").read_text(encoding="utf-8"))


def binary(release):
    """Builds the tests of files; the path of the program that they are."""
    command = [*shlex.split(os.environ.get("CARGO") or "cargo"), "test", "--locked", "--test", "formats", "--no-run",
               "--message-format", "json-render-diagnostics", *(["--release"] if release else [])]
    built = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if built.returncode:
        sys.exit(built.returncode)
    messages = (json.loads(line) for line in built.stdout.splitlines() if line.startswith("{"))
    return next(m["executable"] for m in messages if m.get("executable") and m["target"]["name"] == "formats")


def memory():
    """A folder in memory, where there is one with a gigabyte to spare; else None, which is the usual place."""
    shared = pathlib.Path("/dev/shm")
    try:
        return shared if os.access(shared, os.W_OK) and shutil.disk_usage(shared).free > 1 << 30 else None
    except OSError:
        return None


def run(program, name, seconds, seed, kept, scratch):
    """One target for its time; inputs tried, its line, and what is wrong."""
    current, log = scratch / f"{name}.input", kept / f"{name}.log"
    environ = dict(os.environ, HRA_TEST_ALONE="1", HRA_FUZZ_READER=name, HRA_FUZZ_SECONDS=str(seconds), HRA_FUZZ_SEED=str(seed),
                   HRA_FUZZ_INPUT=str(current), OMP_NUM_THREADS="1", TMPDIR=str(scratch))
    with open(log, "w", encoding="utf-8") as file:
        try:
            code = subprocess.run([program, "--exact", TEST, "--nocapture"], cwd=ROOT, env=environ, stdout=file,
                                  stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=seconds + PATIENCE).returncode
        except subprocess.TimeoutExpired:
            code = None
    text = log.read_text(encoding="utf-8", errors="replace")
    line = LINE.search(text)
    if code == 0 and line:
        log.unlink()
        return int(line[2]), line[0], None
    how = f"{'hangs' if code is None else f'ended with {code}'}; {log}"
    if current.exists():
        how += f", the last input in {shutil.copy2(current, kept)}"
    return int(line[2]) if line else 0, line[0] if line else f"{name}: no count", how


def main():
    parser = argparse.ArgumentParser(description="Feeds every reader with damaged files.", allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=10, help="for all targets together [default: %(default)s]")
    parser.add_argument("--seed", type=int, help="first seed [default: the clock's]")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="targets at once [default: one a core]")
    parser.add_argument("--target", action="append", choices=targets(), help="only this; may be repeated [default: all]")
    parser.add_argument("--release", action="store_true", help="with an optimised build (without checks of overflow)")
    given = parser.parse_args()
    program, names = binary(given.release), given.target or targets()
    # Seeds of two runs do not overlap.
    seed = (given.seed if given.seed is not None else int(time.time())) << 32
    jobs = max(1, min(given.jobs, len(names)))
    seconds = max(1, round(given.minutes * 60 * jobs / len(names)))
    kept = ROOT / "target/fuzz"
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    total, failures, started = 0, [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hra-fuzz-", dir=memory()) as scratch, concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        results = pool.map(lambda name: run(program, name, seconds, seed, kept, pathlib.Path(scratch)), names)
        for name, (count, line, wrong) in zip(names, results):
            total += count
            print(line, flush=True)
            if wrong:
                failures.append(name)
                print(f"FAILED {name}: {wrong}", flush=True)
    print(f"{len(names)} targets, {total} inputs tried in {time.monotonic() - started:.0f} s: {len(failures)} failed (seed {seed >> 32})")
    return 1 if failures else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
