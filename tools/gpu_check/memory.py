"""Part 5: out of memory on purpose. The program says so and ends with 2, what it saved is whole, and a smaller batch works.

On the GPU the allocator may take 2 % of the card's memory; in a dry run the process may have 1 GiB more addresses than a
training needs. The batch then asks for many times of that."""

import re
import sys
import threading

from .program import Program, SUBJECT_PROMPT, records, said_device, words_of
from .record import Failure, Measured, Same

LIMIT = 1e-3
FRACTION = "per_process_memory_fraction:0.02"
EXIT_CODE = 2
BATCH, PICTURES = 1024, 4096
STEPS = 4
NO_MEMORY = re.compile(r"out of memory|not enough memory|memory does not suffice|can(no|')t allocate memory", re.IGNORECASE)
# What a message for a user does not have: a call for a report, or what Rust and C++ say of a panic.
WRONG_WORDS = (
    "defect of hra", "Result::unwrap()", "panicked at", "RUST_BACKTRACE", "stack backtrace", "Exception raised from", "frame #")


# Sets the limit and becomes the program.
LIMITED = """
import os, resource, sys
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
os.execv(sys.argv[2], sys.argv[2:])
"""
WORKERS = {"cpu": 2, "cuda": 3}


def run(part):
    program = Program(part)
    device = part.device
    names = [
        ["a small batch within the limit: losses as without one"],
        ["a batch too large: exit code", "a batch too large: the message", "a batch too large: nothing half written"],
        ["previews too large: exit code", "previews too large: the message", "previews too large: nothing half written",
         "previews too large: a checkpoint is whole, losses when it goes on with fewer"],
    ]
    try:
        whole, addresses = watched(program, program.train_words("whole", device, max_train_steps=STEPS))
    except Exception as error:
        for name in sum(names, []):
            part.check(name, error)
        return
    if device == "cuda":
        tight = {"environ": part.machine.environ(PYTORCH_CUDA_ALLOC_CONF=FRACTION)}
    else:
        tight = {"before": [sys.executable, "-c", LIMITED, str(addresses + (1 << 30))]}

    def small():
        done = program.ok(program.train_words("small", device, max_train_steps=STEPS), **tight)
        return [Measured(said_device(done.err)[0], losses(program.folder / f"small-{device}"), whole, LIMIT)]

    def large():
        return too_large(program, tight, "large", train_batch_size=BATCH, max_train_steps=STEPS)

    def previews():
        failed = too_large(
            program, tight, "previews", max_train_steps=STEPS, checkpointing_steps=1, validation_steps=2,
            validation_prompt=SUBJECT_PROMPT, num_validation_images=PICTURES, sample_batch_size=PICTURES,
            validation_inference_steps=2)
        return [*failed, goes_on(program, tight, whole)]

    part.jobs(zip(names, (small, large, previews)), WORKERS[device])


def losses(folder):
    return [record["loss"] for record in records(folder)]


def watched(program, words):
    """Trains; the losses, and the most addresses that the process had."""
    with program.start(words) as child:
        most = [0]

        def look():
            while child.poll() is None:
                most[0] = max(most[0], peak_addresses(child.pid))
                # At the end nothing is left to read, and addresses are only ever added.
                if stop.wait(0.01):
                    return

        stop = threading.Event()
        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            _, err = child.communicate(timeout=max(program.part.left(), 1))
        finally:
            child.kill()
            stop.set()
            thread.join()
    if child.returncode:
        raise Failure(f"exit code {child.returncode}: {err[-300:]}")
    return losses(words[words.index("--output_dir") + 1]), most[0]


def peak_addresses(pid):
    """VmPeak of proc(5), in bytes; 0 where the process is gone."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii") as file:
            match = re.search(r"VmPeak:\s*(\d+) kB", file.read())
    except OSError:
        return 0
    return int(match[1]) * 1024 if match else 0


def too_large(program, tight, name, **flags):
    """Asks for more than there is: exit code, message and what is left behind."""
    words = program.train_words(name, program.part.device, **flags)
    done = program.run(words, **tight)
    device, _ = said_device(done.err)
    if device is None:
        raise Failure(f"it did not come to the training: exit code {done.code}: {done.last_words()}")
    folder = program.folder / f"{name}-{program.part.device}"
    left = sorted(path.name for path in folder.rglob(".tmp-*"))
    return [Same(device, done.code, EXIT_CODE), Same(device, wrong_with(done), []), Same(device, left, [])]


def wrong_with(done):
    """What the message has and should not, or has not and should."""
    text = done.err + done.out
    wrong = [word for word in WRONG_WORDS if word.lower() in text.lower()]
    if not NO_MEMORY.search(text):
        wrong.append(f"does not say that memory is missing: {done.last_words()}")
    hints = [line for line in text.splitlines() if line.startswith("hint:")]
    if not any("batch" in hint for hint in hints):
        wrong.append("no hint about the batch size")
    return wrong


def goes_on(program, tight, whole):
    """The run that failed in its previews goes on from its last checkpoint, under the same limit."""
    folder = program.folder / f"previews-{program.part.device}"
    checkpoints = sorted(path.name for path in folder.glob("checkpoints/step-*"))
    if not checkpoints:
        return Failure("there is no checkpoint")
    words = ["train", "--resume", "latest", *words_of({
        "output_dir": folder, "device": program.part.device, "num_validation_images": 0, "validation_steps": 100})]
    done = program.run(words, **tight)
    if done.code or f"steps {int(checkpoints[-1][5:]) + 1} to {STEPS}" not in done.err:
        return Failure(f"did not go on from {checkpoints[-1]}: exit code {done.code}: {done.last_words()}")
    return Measured(said_device(done.err)[0], losses(folder), whole, LIMIT)
