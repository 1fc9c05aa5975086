"""Part 3: every method trains on the device as on the CPU, also interrupted, and begun on the one and resumed on the other."""

import signal
import threading

from . import png
from .program import Program, SUBJECT_PROMPT, records, values_of, wait_for
from .record import Failure, Measured, Same

# Noise is drawn on the CPU, so what differs is rounding.
LIMIT = 1e-3
# bf16 and f16 round inputs to 8 and 11 bits.
HALF_LIMIT = 0.05
# Class pictures are drawn on each device, and a level of a pixel may be another one.
DRAWN_LIMIT = 5e-3
PREVIEW_LIMIT = 5e-3
FORMATS = {"bf16": {"bf16"}, "f16": {"f16"}, None: {"f32"}}


class Sizes:
    def __init__(self, dry):
        self.steps, self.interrupted_steps, self.workers = (3, 12, 2) if dry else (20, 20, 16)
        # On the device four at a time; the CPU's own runs beside them.
        cpu, cuda = (2, 0) if dry else (6, 4)
        self.slots = {"cpu": threading.Semaphore(cpu), "cuda": threading.Semaphore(cuda)}


# As many of the first losses are compared.
FIRST = 3


def run(part):
    sizes = Sizes(part.machine.dry)
    program = Program(part, sizes.slots)
    jobs = [
        (["Ctrl-C: exit code", "Ctrl-C and resume: losses as of the uninterrupted run"], lambda: interrupted(program, sizes)),
        (["begun on the CPU, resumed on the device: losses"], lambda: moved(program, "there", "cpu", part.device)),
        (["begun on the device, resumed on the CPU: losses"], lambda: moved(program, "back", part.device, "cpu")),
    ]
    try:
        jobs += [case_job(program, sizes, *case) for case in cases(program)]
    except Exception as error:
        part.check("the program's methods", error)
    part.jobs(jobs, sizes.workers)


def cases(program):
    """Name, limit and flags of each training that is compared with the CPU's."""
    control = {
        "train_data_dir": program.assets / "control/train", "instance_data_dir": None, "instance_prompt": None,
        "condition": "canny", "make_conditions": True, "resolution": 64,
    }
    prior = {
        "with_prior_preservation": True, "class_prompt": "a fluent 3d emoji of a cat face", "num_class_images": 2,
        "class_steps": 2, "sample_batch_size": 2,
    }
    for method in values_of(program.help("train"), "--method"):
        own = {"full": {"rank": None, "learning_rate": 1e-4}, "none": {"rank": None, **control}, "ia3": {"rank": None}}
        yield f"method {method}", LIMIT, {"method": method, **own.get(method, {})}
    yield "Gram-Schmidt, PEFT's start", LIMIT, {"gram_schmidt": True, "hra_init": "peft"}
    yield "Gram-Schmidt", LIMIT, {"gram_schmidt": True}
    yield "text encoder", LIMIT, {"train_text_encoder": True}
    yield "control encoder", LIMIT, control
    yield "prior preservation, class pictures drawn", DRAWN_LIMIT, prior
    yield "previews", LIMIT, {
        "validation_prompt": SUBJECT_PROMPT, "num_validation_images": 2, "validation_steps": 2, "validation_inference_steps": 2,
    }
    yield "bf16 beside the CPU's f32", HALF_LIMIT, {"dtype": "bf16"}
    yield "f16 beside the CPU's f32", HALF_LIMIT, {"dtype": "f16"}


def case_job(program, sizes, name, limit, flags):
    names = [f"{name}: first losses", f"{name}: first gradient norms"]
    if flags.get("validation_prompt"):
        names.append(f"{name}: mean level of the pictures")

    def make():
        folder = "".join(letter if letter.isalnum() else "-" for letter in name)
        dtype = flags.get("dtype")
        device = program.part.device
        # f16 may skip the first steps, whose gradients overflow until the loss scale is small enough.
        beside, least = (sizes.steps, FIRST) if dtype == "f16" else (FIRST, sizes.steps)
        # In a dry run both are on the CPU, and need two folders.
        here = of_cpu(program.train(f"{folder}-beside", "cpu", **{**flags, "dtype": None}, max_train_steps=beside))
        there = program.train(folder, device, **flags, max_train_steps=sizes.steps)
        check_run(there, least)
        formats = FORMATS[dtype]
        if there.kind not in formats:
            raise Failure(f"computed in {there.kind or 'an unknown format'}, expected {' or '.join(formats)}")
        expected = dict(zip(here.steps, zip(here.losses, here.norms)))
        taken = [row for row in there.good_records() if row[0] in expected][:FIRST]
        made = [Measured(there.device, [row[which] for row in taken], [expected[row[0]][which - 1] for row in taken], limit)
                for which in (1, 2)]
        if flags.get("validation_prompt"):
            levels = [png.levels(sorted((path / "samples/step-000002").glob("0*.png"))) for path in (there.folder, here.folder)]
            made.append(Measured(there.device, *levels, PREVIEW_LIMIT))
        return made

    return names, make


def check_run(run, least):
    """At least so many losses, each a number; what is compared are the first ones only."""
    numbers = [loss for loss in run.losses if loss is not None and 0 <= loss < float("inf")]
    if len(numbers) != len(run.losses) or len(numbers) < least:
        raise Failure(f"expected {least} losses, found {len(run.losses)}, {len(numbers)} of them numbers")


def of_cpu(run):
    if run.device != "cpu":
        raise Failure(f"the CPU's own run was on {run.device}")
    return run


def interrupted(program, sizes):
    """Ctrl-C after the first step; the run then ends as one that was not interrupted."""
    device, steps = program.part.device, sizes.interrupted_steps
    whole = program.train("whole", device, max_train_steps=steps)
    words = program.train_words("stopped", device, max_train_steps=steps)
    folder = words[words.index("--output_dir") + 1]
    slot = program.slots[device]
    with slot, program.start(words) as child:
        try:
            wait_for(lambda: records(folder), child, program.part.left())
            child.send_signal(signal.SIGINT)
            child.communicate(timeout=max(program.part.left(), 1))
        finally:
            child.kill()
    stopped = len(records(folder))
    if stopped >= steps:
        raise Failure("the run was over before it could be interrupted")
    resumed = program.resume(folder, device)
    check_run(resumed, steps)
    return [Same(whole.device, child.returncode, 130), Measured(resumed.device, resumed.losses, whole.losses, LIMIT)]


def moved(program, name, first, then):
    """Half of a run on one device and half on the other, beside the CPU's."""
    begun = program.train(name, first, max_train_steps=FIRST)
    resumed = program.resume(begun.folder, then, max_train_steps=2 * FIRST)
    whole = of_cpu(program.train(f"{name}-beside", "cpu", max_train_steps=2 * FIRST))
    devices = [begun.device or "", resumed.device or ""]
    if [device.partition(":")[0] for device in devices] != [first, then]:
        raise Failure(f"computed on {' and then '.join(devices)}, expected {first} and then {then}")
    # The device of the check is that which is not the CPU, where there is one.
    return [Measured(max(devices), resumed.losses, whole.losses, LIMIT)]
