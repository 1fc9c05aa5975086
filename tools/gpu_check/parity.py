"""Part 2: the reference cases, by the Rust test binary, which prints a line of JSON for each check."""

import json
import re
import subprocess

from .record import Error, Failure, Same, Skipped

# With --nocapture the first line of a test stands behind the test's name.
LINE = re.compile(r"check: (\{.*\})\s*$")
ARGUMENTS = ["parity", "--ignored", "--nocapture", "--test-threads", "1"]


def run(part):
    machine = part.machine
    # The binary plants its error itself.
    part.planted = 0.0
    binary = machine.test_binary()
    if binary is None:
        part.check("the test binary", Failure("found none: set HRA_CUDA_TESTS, or build the tests"))
        return
    more = {"HRA_CHECK_DEVICE": part.device, "HRA_ROOT": str(machine.root), "HRA_BIN": str(machine.program)}
    if not machine.dry:
        more["HRA_REQUIRE_CUDA"] = "1"
    try:
        child = subprocess.Popen(
            [str(binary), *ARGUMENTS], env=machine.environ(**more), cwd=machine.scratch, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    except OSError as error:
        part.check("the test binary", Failure(f"cannot run it: {error}"))
        return
    said, wrong = [], 0
    with child:
        for line in child.stdout:
            match = LINE.search(line)
            if match:
                wrong += not record(part, match[1])
            elif line.strip():
                said = [*said[-5:], line.strip()]
    part.job(["the test binary's exit code"], lambda: [exit_code(part, child.returncode, wrong, said)])


def exit_code(part, code, wrong, said):
    """It must be 0 where every check is right, and another one where one is wrong."""
    if (code == 0) != (wrong == 0):
        raise Failure(f"exit code {code} where {wrong} checks are wrong: {' / '.join(said)}")
    return Same(part.device, code == 0, wrong == 0)


def record(part, text):
    """Records a check that the binary made; whether it is right."""
    try:
        check = json.loads(text)
        name, error, limit = check["name"], check["error"], check["limit"]
    except (ValueError, KeyError):
        part.check(text[:80], Failure("not a check as it should be"))
        return False
    if check.get("skipped"):
        part.check(name, Skipped(check["skipped"]))
        return True
    number = float(error) if isinstance(error, (int, float)) else float("nan")
    right = bool(check["ok"]) and number <= limit
    made = Error(check["device"], number, limit) if right or not number <= limit else Failure("the test says that it is wrong")
    part.check(name, made)
    return right
