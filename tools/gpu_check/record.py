"""Checks, figures and the files that they are written to."""

import json
import math
import os
import threading
import time

from . import table

# Parts whose findings are made wrong by 1 %, so that a test can see the part fail.
BREAK = "HRA_GPU_CHECK_BREAK"


class Failure(Exception):
    """Why a check could not be made; the text goes into the table."""


class Skipped(Exception):
    """Why a check was left out."""


class Finding:
    """What a check found, and how far it is from what was expected."""

    def __init__(self, device, found, expected, error, limit):
        self.device, self.found, self.expected, self.error, self.limit = device, found, expected, error, limit


class Measured:
    """A number or a list of them from the device, beside what it should be: the largest relative error counts."""

    def __init__(self, device, found, expected, limit):
        self.device, self.found, self.expected, self.limit = device, found, expected, limit

    def finding(self, planted):
        found = [number * (1 + planted) for number in numbers(self.found)]
        expected = numbers(self.expected)
        if len(found) != len(expected) or not found:
            raise Failure(f"found {len(found)} numbers, expected {len(expected)}")
        error = max((relative(a, b) for a, b in zip(found, expected)), key=lambda e: math.inf if math.isnan(e) else e)
        return Finding(self.device, single(found), single(expected), error, self.limit)


class Error:
    """An error that somebody else computed, beside its limit."""

    def __init__(self, device, error, limit):
        self.device, self.error, self.limit = device, error, limit

    def finding(self, planted):
        return Finding(self.device, None, None, self.error + planted, self.limit)


class Same:
    """Something that is or is not as expected; it has no size that could be 1 % wrong."""

    def __init__(self, device, found, expected):
        self.device, self.found, self.expected = device, found, expected

    def finding(self, _planted):
        return Finding(self.device, self.found, self.expected, 0.0 if self.found == self.expected else math.inf, 0.0)


def numbers(value):
    return [float(number) for number in (value if isinstance(value, (list, tuple)) else [value])]


def single(values):
    return values[0] if len(values) == 1 else values


def relative(found, expected):
    """The difference as a share of what was expected; of zero only zero is no error."""
    if found == expected:
        return 0.0
    return abs(found - expected) / abs(expected) if expected else math.inf


def kind_of(device):
    """`cpu` or `cuda` of a device's name as the program or a test says it (`cuda:0`, `Cuda(0)`, `cuda:0, NAME`)."""
    word = str(device or "").lower()
    return next((kind for kind in ("cuda", "cpu") if word.startswith(kind)), word)


def broken_parts():
    return [part for part in os.environ.get(BREAK, "").split(",") if part]


class Results:
    """The files of a run. One process writes at a time: the part that runs, then the one that started it."""

    def __init__(self, folder, about):
        self.folder = folder
        self.lock = threading.Lock()
        self.data = {"about": about, "parts": [], "checks": [], "figures": []}

    def reload(self):
        """Reads what a part wrote."""
        self.data = json.loads((self.folder / "results.json").read_text(encoding="utf-8"))

    def write(self):
        for name, text in (("results.json", json.dumps(self.data, indent=1) + "\n"), ("results.md", table.page(self.data))):
            scratch = self.folder / f".{name}.new"
            scratch.write_text(text, encoding="utf-8")
            os.replace(scratch, self.folder / name)

    def add(self, kind, entry):
        with self.lock:
            self.data[kind].append(entry)
            self.write()

    def figure(self, key, entry):
        """Puts a figure where an earlier one of this key stands, or at the end."""
        with self.lock:
            rows = self.data["figures"]
            at = next((i for i, row in enumerate(rows) if all(row.get(k) == v for k, v in key.items())), None)
            if at is None:
                rows.append({**key, **entry})
            else:
                rows[at] = {**key, **entry}
            self.write()

    def checks_of(self, part):
        return [check for check in self.data["checks"] if check["part"] == part]


class Part:
    """What a part checks with."""

    def __init__(self, name, machine, results, deadline):
        self.name, self.machine, self.results, self.deadline = name, machine, results, deadline
        self.planted = 0.01 if name in broken_parts() else 0.0
        self.device = machine.device

    def left(self):
        """Seconds until the limit."""
        return self.deadline - time.monotonic()

    def check(self, name, made, seconds=0.0):
        """Records a check: `made` is a Measured, Error or Same, or the exception that came instead of one."""
        entry = {"part": self.name, "name": name, "device": None, "found": None, "expected": None, "error": None, "limit": None,
                 "ok": False, "seconds": round(seconds, 2)}
        try:
            if isinstance(made, Exception):
                raise made
            finding = made.finding(self.planted)
            entry.update(device=str(finding.device), found=plain(finding.found), expected=plain(finding.expected),
                         error=plain(finding.error), limit=finding.limit)
            if kind_of(finding.device) != self.device:
                raise Failure(f"computed on {finding.device}, expected {self.device}")
            # Not `>`, which a NaN would pass.
            entry["ok"] = finding.error <= finding.limit
        except Skipped as reason:
            entry.update(skipped=str(reason), ok=self.machine.dry)
        except Exception as error:
            entry["message"] = str(error) if isinstance(error, Failure) else f"{type(error).__name__}: {error}"
        self.results.add("checks", entry)

    def job(self, names, make):
        """Records checks that come out of one piece of work: `make` returns one for each name."""
        started = time.monotonic()
        try:
            made = make()
            if len(made) != len(names):
                raise Failure(f"made {len(made)} checks of {len(names)}")
        except Exception as error:
            made = [error] * len(names)
        seconds = time.monotonic() - started
        for name, one in zip(names, made):
            self.check(name, one, seconds)

    def jobs(self, jobs, workers):
        """The same for many at once."""
        waiting = list(jobs)
        lock = threading.Lock()

        def work():
            while True:
                with lock:
                    if not waiting:
                        return
                    names, make = waiting.pop(0)
                self.job(names, make)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def plain(value):
    """As JSON can hold it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return value
