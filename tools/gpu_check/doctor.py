"""Part 1: `hra doctor` finds the device, and what it computes there is right."""

import json

from .program import Program
from .record import Error, Failure, Same, kind_of

OPERATIONS = ("matrix product", "convolution")


def examine(program):
    """The report and the exit code."""
    done = program.run(["doctor", "--json"])
    try:
        return json.loads(done.out), done.code
    except ValueError:
        raise Failure(f"hra doctor: exit code {done.code}, no JSON: {done.last_words()}") from None


def device_name(report, device):
    """The device as it is called: the GPU, or the processor; None where it is not there."""
    if device == "cpu":
        return report["cpu"]["model"] or "a processor"
    gpus = report["cuda"]["gpus"] if report["cuda"]["usable"] else []
    return gpus[0]["name"] if gpus else None


def attention(report, device):
    """Which kernels libtorch chooses for attention, by number format."""
    chosen = {}
    for choice in report.get("attention", []):
        if kind_of(choice["device"]) == device:
            chosen.setdefault(choice["precision"], []).append(f"{choice['attention']} {choice['kernel']}")
    return "; ".join(f"{precision}: {' '.join(kernels)}" for precision, kernels in chosen.items()) or None


def run(part):
    program = Program(part)
    found = {}

    def report():
        """Made once, by the first check that asks."""
        if not found:
            found["report"], found["code"] = examine(program)
        return found["report"]

    def there():
        name = device_name(report(), part.device)
        if name is None:
            raise Failure("; ".join(report()["missing"]) or "there is no such device")
        devices = [check["device"] for check in report()["checks"] if kind_of(check["device"]) == part.device]
        return [Same(devices[0] if devices else "not checked", bool(name), True), Same(part.device, found["code"], 0)]

    part.job(["the device is there and has a name", "exit code"], there)
    for operation in OPERATIONS:
        part.job([f"{operation}: error in the format that is nearest to its limit"],
                 lambda operation=operation: [worst(report(), operation, part.device)])


def worst(report, operation, device):
    """The operation on the device, in the number format in which it came nearest to its limit."""
    checks = [check for check in report["checks"] if kind_of(check["device"]) == device and check["operation"] == operation]
    formats = {check["precision"] for check in checks}
    expected = {"f32", "bf16"} if device == "cpu" else {"f32", "bf16", "f16"}
    if not expected <= formats:
        raise Failure(f"checked in {sorted(formats)}, expected {sorted(expected)}")
    for check in checks:
        if check["error"] is None:
            raise Failure(f"{check['precision']}: {check['message']}")
    check = max(checks, key=lambda check: check["error"] / check["tolerance"])
    return Error(check["device"], check["error"], check["tolerance"])
