"""The parts, in their order, and how each is run: in a process of its own, that ends with all that it started at its limit."""

import json
import multiprocessing
import os
import pathlib
import signal
import time
import traceback

from . import doctor, drawing, memory, parity, speed, training
from .record import Part

# Name -> what runs it, seconds on a GPU, seconds in a dry run, where processors are few and other things may run.
# What a GPU must show first is done within four minutes; the speed comes after.
PARTS = {
    "doctor": (doctor.run, 20, 60),
    "parity": (parity.run, 100, 400),
    "training": (training.run, 60, 300),
    "drawing": (drawing.run, 40, 300),
    "memory": (memory.run, 20, 200),
    "speed": (speed.run, 180, 400),
}
COUNTS = pathlib.Path(__file__).with_name("counts.json")


def counts():
    return json.loads(COUNTS.read_text(encoding="utf-8"))


def write_counts(results, names):
    """Takes over how many checks were made; for a change of what is checked."""
    new = {**counts(), **{name: len(distinct(results, name)) for name in names}}
    COUNTS.write_text(json.dumps({name: new.get(name, 0) for name in PARTS}, indent=2) + "\n", encoding="utf-8")


def distinct(results, name):
    return {check["name"] for check in results.checks_of(name)}


def run_part(name, machine, results, expected):
    """Runs a part to its end or its limit and writes down how it came out."""
    run, on_gpu, in_dry_run = PARTS[name]
    limit = in_dry_run if machine.dry else on_gpu
    started = time.monotonic()
    child = multiprocessing.get_context("fork").Process(target=inside, args=(run, name, machine, results, started + limit))
    child.start()
    try:
        child.join(limit)
        late = child.exitcode is None
    finally:
        end_session(child.pid)
        child.join()
    results.reload()
    seconds = round(time.monotonic() - started, 1)
    entry = outcome(results, name, expected, child.exitcode, limit if late else None)
    results.add("parts", {"part": name, "seconds": seconds, **entry})
    return results.data["parts"][-1]


def inside(run, name, machine, results, deadline):
    """The child's side; a session of its own, by which all that it starts is found."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        run(Part(name, machine, results, deadline))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def outcome(results, name, expected, exit_code, late):
    checks = results.checks_of(name)
    wrong = sum(not check["ok"] for check in checks)
    names = len(distinct(results, name))
    messages = [f"ran past its limit of {late} s"] if late else [f"ended with {exit_code}"] if exit_code else []
    messages += [f"{wrong} of {len(checks)} checks failed"] if wrong else []
    if len(checks) != names:
        messages.append(f"{len(checks) - names} names occur twice")
    if expected is not None and names != expected:
        messages.append(f"made {names} checks, expected {expected}")
    skipped = sum("skipped" in check for check in checks)
    return {"ok": not messages, "made": len(checks) - skipped, "skipped": skipped, "expected": expected,
            "message": "; ".join(messages)}


def end_session(leader):
    """Ends the processes of the session that `leader` began; some of them may have groups of their own."""
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            text = (folder / "stat").read_text(encoding="utf-8", errors="replace")
            # proc(5): after the name in brackets: state, parent, group, session.
            if int(text.rpartition(")")[2].split()[3]) == leader:
                os.kill(int(folder.name), signal.SIGKILL)
        except (OSError, ValueError, IndexError):
            continue
