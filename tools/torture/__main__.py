"""Hurts the program in all ways that a machine, a user or a sender of files may: what `make torture` runs.

    python3 tools/torture --kills 200 --inputs 20000 --minutes 90 --seed 1

Kills: trainings, drawings, comparisons, exports and merges are ended by SIGKILL, SIGTERM and SIGINT at random moments, gone on with,
and compared byte for byte with a run that nobody disturbed. Limits: full disks, folders that are taken away, few open files,
little memory. Inputs: every kind of file that is read, damaged and read through the binary.

lost: what was finished is not there, or not the same. wrong: a damaged file passed without a word, a run ended well that did not
do what it says, something was written that is not the output, or a small file took minutes or gigabytes. panic: a defect's
words, or an end by a signal. The exit code is 0 only without any. Standard library only; Linux.
"""

import argparse
import concurrent.futures
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import time

from faults import Faults
from inputs import Inputs
from kills import Kills
from limits import Limits
from program import Program

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def arguments():
    parser = argparse.ArgumentParser(prog="tools/torture", description="Kills, limits and damaged files, through the real binary.",
                                     allow_abbrev=False)
    parser.add_argument("--program", type=pathlib.Path, default=ROOT / "target/release/hra", help="the binary")
    parser.add_argument("--kills", type=int, default=200, help="how many kills [default: %(default)s]")
    parser.add_argument("--limits", type=int, default=60, help="how many limited runs [default: %(default)s]")
    parser.add_argument("--inputs", type=int, default=20_000, help="how many damaged inputs [default: %(default)s]")
    parser.add_argument("--seed", type=int, default=None, help="of all that is chosen [default: the clock's]")
    parser.add_argument("--minutes", type=float, default=180, help="begin nothing after so many [default: %(default)s]")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="cases at once [default: one a core]")
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "target/torture", help="folder for what failed, made anew")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this case alone, such as input-17")
    parser.add_argument("--scenario", action="append", default=[], metavar="NAME", help="of the kills, only this; may be repeated")
    parser.add_argument("--recipe", action="append", default=[], metavar="NAME", help="of the inputs, only this; may be repeated")
    return parser.parse_args()


def cases(given):
    """Names of the cases to try, cheap ones between dear ones; kills until there are enough."""
    if given.only:
        return [(name.partition("-")[0], int(name.partition("-")[2])) for name in given.only]
    # A run is killed up to four times, and may have several damaged files: as many runs are more than enough, and the last are left out.
    return [(what, index) for what, count in (("kill", given.kills), ("limit", given.limits), ("input", given.inputs))
            for index in range(count)]


def main():
    given = arguments()
    # A shell's background jobs are deaf to Ctrl-C; the program under test must not be.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not given.program.is_file():
        sys.exit(f"{given.program}: no program there; `make build` makes it")
    seed = given.seed if given.seed is not None else int(time.time())
    kept = given.work.resolve()
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="hra-torture-", dir=memory()) as scratch:
        return torture(given, seed, pathlib.Path(scratch), Faults(kept, f"python3 tools/torture --program {given.program} --seed {seed}"))


def memory():
    """A folder in memory, where there is one with four gigabytes to spare; else None, which is the usual place."""
    shared = pathlib.Path("/dev/shm")
    try:
        return shared if os.access(shared, os.W_OK) and shutil.disk_usage(shared).free > 4 << 30 else None
    except OSError:
        return None


def torture(given, seed, work, faults):
    """All cases; the exit code."""
    program, started = Program(given.program), time.monotonic()
    wanted = cases(given)
    makers = {"kill": lambda: Kills(program, ROOT, work / "kills", faults, given.scenario),
              "limit": lambda: Limits(program, ROOT, work / "limits", faults),
              "input": lambda: Inputs(program, ROOT, work / "inputs", faults, given.recipe)}
    parts = {what: makers[what]() for what in dict.fromkeys(what for what, _ in wanted)}
    print(f"prepared in {time.monotonic() - started:.0f} s, seed {seed}", flush=True)
    stopped, asked = False, {"kill": given.kills, "limit": given.limits, "input": given.inputs}

    def one(case):
        what, index = case
        if stopped or time.monotonic() - started > given.minutes * 60:
            return
        if not given.only and faults.tried[what] >= asked[what]:
            return
        try:
            faults.count(what, parts[what].case(seed, index))
        except Exception as error:  # a judge that fails must not end the others, and has not judged
            faults.tell("wrong", f"{what}-{index}", work / "nothing", f"was not judged: {error!r}", [])

    with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
        told, results = time.monotonic(), pool.map(one, wanted)
        try:
            for _ in results:
                if time.monotonic() - told > 60:
                    told = time.monotonic()
                    print(f"{(told - started) / 60:.0f} min: {faults.line(seed)}", flush=True)
        except KeyboardInterrupt:
            stopped = True
            print("stopped", flush=True)
    for part in parts.values():
        part.close()
    if not given.only and any(faults.tried[what] < count for what, count in asked.items()):
        print(f"not all that was asked for: the time was over after {(time.monotonic() - started) / 60:.0f} minutes")
    print(f"{time.monotonic() - started:.0f} s")
    print(faults.line(seed), flush=True)
    return 1 if faults.any else 0


if __name__ == "__main__":
    sys.exit(main())
