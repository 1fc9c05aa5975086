#!/usr/bin/env python3
"""Runs all Rust tests, on after a failure, and ends with a line that counts them: what `make test` calls.

    HRA_TEST_THREADS=2    threads that libtorch computes with (default 1)
    HRA_TEST_CPU=avx2     compute as on a processor that has no more than this: default (SSE), avx2 or avx512
    --everywhere          once for each of these that this processor has, on one and on two threads; a line for each
                          (what libtorch chooses by itself may go further: plain `make test` runs that)

Sums are rounded in the order in which a processor's instructions and the threads add them up, so a test with a limit of its own
making passes on one machine alone. libtorch, oneDNN and MKL each choose their kernels by processor, and each can be told.
Words that are given beside go to `cargo test`. Standard library only.
"""

import argparse
import os
import pathlib
import re
import shlex
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent

# level -> (what /proc/cpuinfo must list, what tells ATen, oneDNN and MKL to go no further)
LEVELS = {
    "default": (set(), ("default", "SSE41", "SSE4_2")),
    "avx2": ({"avx2", "fma"}, ("avx2", "AVX2", "AVX2")),
    "avx512": (
        {"avx2", "fma", "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
        ("avx512", "AVX512_CORE", "AVX512"),
    ),
}
VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")

RESULT = re.compile(r"test result: \w+\. (\d+) passed; (\d+) failed; (\d+) ignored")
FAILED = re.compile(r"test (.+) \.\.\. FAILED")
BINARY = re.compile(r"\s+(?:Running (?:unittests )?|Doc-tests )(\S+)")


def processor():
    """The features that this processor has, as Linux names them."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return set(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), []))


def levels_here():
    features = processor()
    return [level for level, (needs, _) in LEVELS.items() if needs <= features]


def environment(level, threads):
    environ = dict(os.environ, HRA_TEST_THREADS=str(threads), OMP_NUM_THREADS=str(threads), CARGO_TERM_COLOR="never")
    if level:
        environ.update(zip(VARIABLES, LEVELS[level][1]))
    if threads > 1:
        # Tests run beside each other: threads that spin while they wait would take the cores from those that work.
        environ.setdefault("OMP_WAIT_POLICY", "passive")
    return environ


def run(level, threads, words):
    """Runs the suite; returns the exit code and the line that counts."""
    command = [*shlex.split(os.environ.get("CARGO") or "cargo"), "test", "--locked", "--no-fail-fast", *words]
    started, counts, names, ended, failed = time.monotonic(), [0, 0, 0], [], set(), []
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(level, threads), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace",
    ) as child:
        for line in child.stdout:
            print(line, end="", flush=True)
            if match := BINARY.match(line):
                names.append(match[1])
            elif match := FAILED.match(line):
                failed.append(f"{names[-1] if names else '?'} {match[1]}")
            elif match := RESULT.match(line):
                counts = [count + int(more) for count, more in zip(counts, match.groups())]
                ended.update(names[-1:])
    seconds = round(time.monotonic() - started)
    for name in failed:
        print(f"failed: {name}")
    lost = [name for name in names if name not in ended]
    for name in lost:
        print(f"ended without a result: {name}")
    code = child.returncode
    line = (
        f"{len(names)} test binaries: {counts[0]} passed, {counts[1]} failed, {counts[2]} ignored"
        + (f", {len(lost)} ended without a result" if lost else "")
        + f", {seconds} s ({level or 'as libtorch chooses'}, {threads} thread{'s' if threads > 1 else ''})"
    )
    if code == 0 and (counts[1] or lost or not counts[0]):
        code = 1
    return code, line + ("" if code == 0 else f": FAILED, cargo's exit code {child.returncode}")


def threads_asked():
    text = os.environ.get("HRA_TEST_THREADS") or "1"
    if not text.isdigit() or int(text) < 1:
        sys.exit(f"HRA_TEST_THREADS: expected a number of threads, found `{text}`")
    return int(text)


def level_asked():
    level = os.environ.get("HRA_TEST_CPU") or None
    if level and level not in levels_here():
        what = "this processor lacks it" if level in LEVELS else "not known"
        sys.exit(f"HRA_TEST_CPU: expected one of {', '.join(levels_here())}, found `{level}` ({what})")
    return level


def main():
    parser = argparse.ArgumentParser(description="Runs all Rust tests and counts them.", allow_abbrev=False)
    parser.add_argument("--everywhere", action="store_true",
                        help="at every level that this processor has, on one and on two threads")
    arguments, words = parser.parse_known_args()
    asked = [(level_asked(), threads_asked())]
    if arguments.everywhere:
        asked = [(level, threads) for level in levels_here() for threads in (1, 2)]
    done = [run(level, threads, words) for level, threads in asked]
    print()
    for _, line in done:
        print(line)
    return next((code for code, _ in done if code), 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except FileNotFoundError as error:
        sys.exit(f"cannot run {error.filename}: is Rust installed, and on the path?")
