"""The command line: prepares, runs the parts, and tells what came out."""

import argparse
import contextlib
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

from . import __doc__ as about_package
from . import doctor, table
from .machine import Machine
from .parts import PARTS, counts, run_part, write_counts
from .program import Program
from .record import BREAK, Part, Results, broken_parts

WARM_UP = 60
# Failed checks of a part that are printed: who calls from afar sees the end of what is printed only.
SHOWN = 6


def options():
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description=about_package, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at small sizes")
    parser.add_argument("--out", type=pathlib.Path, help="folder for results.json and results.md (default: a new temporary one)")
    parser.add_argument("--bundle", metavar="DIR", help="what `make gpu-bundle` packed")
    parser.add_argument("--parts", default=",".join(PARTS), help="only these, separated by commas")
    parser.add_argument("--python", help="the Python with torch, diffusers, transformers and PEFT")
    parser.add_argument("--write-counts", action="store_true", help="with --dry-run: take over how many checks were made")
    given = parser.parse_args()
    given.parts = [name for name in given.parts.split(",") if name]
    unknown = [name for name in given.parts + broken_parts() if name not in PARTS]
    if unknown or not given.parts:
        parser.error(f"--parts and {BREAK}: expected some of {', '.join(PARTS)}, found {', '.join(unknown) or 'nothing'}")
    if given.write_counts and not given.dry_run:
        parser.error("--write-counts goes with --dry-run")
    return given


def warm_up(machine):
    """Imports the Python halves once, so that no part waits for a cold disk; the program is started by who calls."""
    script = "import torch, diffusers, transformers, peft; from diffusers import StableDiffusionPipeline"
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run([machine.python, "-c", script], env=machine.python_environ(), stdin=subprocess.DEVNULL,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=WARM_UP)


def look(machine, results):
    """What the tables are headed with. On a GPU this is the first start of CUDA, which no part should pay for."""
    helper = threading.Thread(target=warm_up, args=(machine,))
    if not machine.dry:
        helper.start()
    about = results.data["about"]
    try:
        report, _ = doctor.examine(Program(Part("look", machine, results, time.monotonic() + WARM_UP)))
        about.update(device=doctor.device_name(report, machine.device), hra=report["hra"],
                     libtorch=report["libtorch"]["version"], driver=report["cuda"]["driver"], cuDNN=report["cuda"]["cudnn"],
                     attention=doctor.attention(report, machine.device))
    except Exception as error:
        print(f"gpu_check: hra doctor: {error}", flush=True)
    if not machine.dry:
        helper.join()
    results.write()


def main():
    given = options()
    # So that what was started ends too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    out = given.out or pathlib.Path(tempfile.mkdtemp(prefix="gpu_check."))
    out.mkdir(parents=True, exist_ok=True)
    # Not below the results: they are all that a machine with a GPU gives back.
    scratch = pathlib.Path(tempfile.mkdtemp(prefix="gpu_check.scratch."))
    try:
        return check(given, out, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check(given, out, scratch):
    started = time.monotonic()
    machine = Machine(given, scratch)
    results = Results(out, {"device": None, "run": "dry" if machine.dry else "on the GPU", "date": time.strftime("%Y-%m-%d")})
    if machine.missing:
        print(f"gpu_check: {machine.python} has no {', '.join(machine.missing)}: what needs them is left out", flush=True)
    look(machine, results)
    print(f"gpu_check: ready after {time.monotonic() - started:.0f} s: {results.data['about']['device']}", flush=True)
    failed = []
    for name in given.parts:
        part = run_part(name, machine, results, None if given.write_counts else counts().get(name))
        print(f"{name}: {part['made']} checks made, {part['skipped']} skipped, {part['seconds']} s"
              + (f": FAILED: {part['message']}" if not part["ok"] else ""), flush=True)
        wrong = [one for one in results.checks_of(name) if not one["ok"]]
        for one in wrong[:SHOWN]:
            why = one.get("message") or one.get("skipped") or table.difference(one)
            print(f"  {one['name']}: {' '.join(why.split())}"[:400], flush=True)
        if len(wrong) > SHOWN:
            print(f"  and {len(wrong) - SHOWN} more, in results.md", flush=True)
        failed += [] if part["ok"] else [name]
    if given.write_counts:
        write_counts(results, given.parts)
    print(f"gpu_check: {len(given.parts) - len(failed)} of {len(given.parts)} parts passed "
          f"after {time.monotonic() - started:.0f} s, {out}/results.md", flush=True)
    if results.data["figures"]:
        print("\n".join(table.figures(results.data)), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
