"""Part 6: how fast the program is beside Python, alone on the card: a training step and a picture of Stable Diffusion 1.5's size.

The sides take turns, each run a process of its own. What matters most comes first; a measure for which no time is left is left
out and named. Times are figures and no checks: these are that there are times, and that both methods begin at the same loss."""

import json
import math
import os
import random
import statistics
import time

from . import png
from .machine import PEERS
from .peers import Peers
from .program import Program, records, said_device, words_of
from .record import Error, Failure, Measured, Same, Skipped, kind_of
from .watch import Nvml, Watch, waits

PROMPT = "a photo of sks dog"
METHODS = {"hra HRA r 8": ("hra", 8), "hra LoRA r 4": ("lora", 4)}
PEFT, HRA, DIFFUSERS = "PEFT LoRA r 4", "hra", "diffusers"
COMPILED = "PEFT LoRA r 4, torch.compile"
# Both methods begin at the base model and see the same noise.
FIRST_LOSS_LIMIT = 2e-3
# A record is written every few steps, and its numbers are read at once.
MOST_WAITS = 0.99
# The first block, or picture, warms up. Runs of two lengths tell what a step alone waits. Below ten records, since at the
# tenth the program looks at every weight.
BLOCKS = (5, 9)
# A turn of all sides takes about so long, as long as none was seen; after that as long as the last one.
FIRST_GUESS = 25
COMPILE_NEEDS = 75
# Is kept for writing down.
RESERVE = 4


class Sizes:
    def __init__(self, dry):
        self.resolution, self.draw_steps = (64, 3) if dry else (512, 20)
        self.blocks, self.pictures = ((3, 5), (2, 3)) if dry else (BLOCKS, (3, 6))
        batch = 2 if dry else 4
        self.block = {1: 1, 2: 1} if dry else {1: 5, 4: 4}
        # Kind, number format, batch, and whether it is the longer run.
        # The first three are what the checks need.
        self.plan = [("train", "bf16", 1, 0), ("train", "f32", 1, 0), ("draw", "bf16", 1, 0), ("train", "bf16", 1, 1),
                     ("train", "bf16", batch, 0)]
        if dry:
            self.plan.append(("train", "f32", batch, 0))
        else:
            self.plan += [
                ("train", "f16", 1, 0), ("train", "f32", batch, 0), ("train", "f16", batch, 0), ("train", "bf16", batch, 1),
                ("draw", "bf16", 1, 1), ("train", "f32", 1, 1), ("train", "f16", 1, 1),
            ]


class Speed:
    def __init__(self, part):
        self.part, self.machine = part, part.machine
        self.sizes = Sizes(self.machine.dry)
        self.program = Program(part)
        self.nvml = Nvml()
        self.model = self.program.folder / "sd15" if part.device == "cuda" else self.program.assets / "tiny-sd"
        self.data = self.program.folder / "pictures"
        self.runs = {}
        self.problems = {}
        self.left_out = []
        self.versions = {}
        self.devices = {}
        # Alone on the machine, as a user is.
        self.more = {"OMP_NUM_THREADS": "1" if self.machine.dry else str(min(os.cpu_count() or 1, 8))}
        if self.machine.counter and part.device == "cuda":
            self.more["LD_PRELOAD"] = str(self.machine.counter)
        self.log = open(self.program.folder / "peers.log", "w+", encoding="utf-8", errors="replace")
        self.peers = None
        if not self.lacking(DIFFUSERS):
            self.peers = Peers(self.machine, self.machine.python_environ(**self.more), self.log)

    def lacking(self, side):
        """The libraries that this side needs and the Python has not."""
        needs = {DIFFUSERS: PEERS[:-1], PEFT: PEERS, COMPILED: PEERS}.get(side, ())
        return [name for name in needs if name in self.machine.missing]

    def deadline(self):
        return self.part.deadline - RESERVE

    def prepare(self):
        """The model, on a machine with a GPU, and the pictures."""
        if self.peers:
            self.peers.start()
        self.data.mkdir()
        side, draws = self.sizes.resolution, random.Random(0)
        for number in range(4):
            pixels = draws.getrandbits(24 * side * side).to_bytes(3 * side * side, "little")
            png.write(self.data / f"{number}.png", side, side, pixels)
        if self.part.device == "cpu":
            return
        if not self.peers:
            raise Failure(f"the model is made by diffusers, but there is no {', '.join(self.lacking(DIFFUSERS))}")
        self.model.mkdir()
        cases = self.machine.root / "tests/fixtures/cases/sd15/pipeline"
        request = {"do": "model", "folder": str(self.model), "pipeline": str(cases), "device": "cuda"}
        self.peers.ask(request, Watch(self.nvml, lambda: 0), self.deadline())

    def take_turns(self):
        """The whole plan, as far as the time goes."""
        seconds = 0 if self.machine.dry else FIRST_GUESS
        for turn in self.sizes.plan:
            if self.part.left() < seconds + RESERVE:
                self.left_out.append(name_of(*turn[:3]) + (", again" if turn[3] else ""))
                continue
            started = time.monotonic()
            sides = [HRA, DIFFUSERS] if turn[0] == "draw" else [*METHODS, PEFT]
            for side in sides:
                self.take(turn, side)
            seconds = time.monotonic() - started
        if not self.machine.dry and self.part.left() > COMPILE_NEEDS:
            self.take(("train", "bf16", 1, 0), COMPILED)

    def take(self, turn, side):
        """One run of one side; what goes wrong is told by the side's check."""
        if self.lacking(side):
            return
        kind, dtype, batch, longer = turn
        name = name_of(kind, dtype, batch)
        folder = self.program.folder / f"{kind}-{dtype}-{batch}-{longer}-{''.join(c for c in side if c.isalnum())}"
        folder.mkdir()
        try:
            self.keep(name, side, Run(self, turn, side, folder))
        except Exception as error:
            if time.monotonic() > self.deadline() or side == COMPILED:
                self.left_out.append(f"{name}, {side} ({error})")
            else:
                self.problems.setdefault(side, f"{name}: {error}")

    def keep(self, name, side, run):
        """Writes the figure of all runs so far."""
        self.devices.setdefault(side, set()).add(run.device)
        runs = self.runs.setdefault((name, side), [])
        runs.append(run)
        every = [interval for one in runs for interval in one.intervals]
        idle = [one.idle for one in runs if one.idle is not None]
        entry = {
            "milliseconds": statistics.median(every), "rounds": [statistics.median(one.intervals) for one in runs],
            "allocated": run.allocated, "reserved": run.reserved, "idle": statistics.mean(idle) if idle else None,
        }
        if len(runs) > 1 and all(one.waits for one in runs) and runs[0].steps != runs[1].steps:
            (first, second), steps = runs[:2], runs[1].steps - runs[0].steps
            entry["waits"], entry["copies"] = [(b - a) / steps for a, b in zip(first.waits, second.waits)]
        self.part.results.figure({"measure": name, "side": side}, entry)


def name_of(kind, dtype, batch):
    return f"a picture, {dtype}" if kind == "draw" else f"a training step, {dtype}, batch {batch}"


class Run:
    """A process of one side, what it made and how it was seen to compute."""

    def __init__(self, speed, turn, side, folder):
        self.speed, self.folder, self.side = speed, folder, side
        self.kind, self.dtype, self.batch, longer = turn
        sizes = speed.sizes
        if self.kind == "draw":
            self.marks = sizes.pictures[longer]
            self.steps = self.marks * sizes.draw_steps
        else:
            self.marks = sizes.blocks[longer]
            self.steps = self.marks * sizes.block[self.batch]
        self.allocated = self.reserved = self.waits = None
        self.out = folder / "out"
        self.watch = Watch(speed.nvml, lambda: len(self.made()))
        self.sync_log = folder / "sync"
        self.device = self.by_program() if side in METHODS or side == HRA else self.by_peer()
        self.read()

    def made(self):
        """What is there so far."""
        return sorted(self.out.glob("0*.png")) if self.kind == "draw" else records(self.out)

    def by_program(self):
        """Runs the program; the device that it says."""
        sizes, speed = self.speed.sizes, self.speed
        common = {"dtype": self.dtype, "device": speed.part.device}
        if self.kind == "draw":
            words = ["sample", "--json", *words_of({
                "model": speed.model, "prompt": [PROMPT] * self.marks, "steps": sizes.draw_steps, "scheduler": "ddim",
                "guidance": 7.5, "width": sizes.resolution, "height": sizes.resolution, "output": self.out, **common})]
        else:
            method, rank = METHODS[self.side]
            words = ["train", *words_of({
                "pretrained_model_name_or_path": speed.model, "instance_data_dir": speed.data, "instance_prompt": PROMPT,
                "resolution": sizes.resolution, "center_crop": True, "train_batch_size": self.batch,
                "max_train_steps": self.steps, "method": method, "rank": rank, "learning_rate": 1e-6,
                "log_every": sizes.block[self.batch], "checkpointing_steps": 1000000, "validation_steps": 1000000,
                "num_validation_images": 0, "output_dir": self.out, **common})]
        environ = speed.machine.environ(full_f32=False, HRA_SYNC_LOG=str(self.sync_log))
        environ.update(speed.more)
        child = speed.program.start(words, environ)
        try:
            if not self.watch.until(lambda: child.poll() is not None, speed.deadline()):
                raise Failure("did not end in time")
        finally:
            child.kill()
            out, err = child.communicate()
        if child.returncode:
            raise Failure(f"exit code {child.returncode}: {err.strip()[-400:]}")
        return json.loads(out).get("device") if self.kind == "draw" else said_device(err)[0]

    def by_peer(self):
        """Asks the Python half; the device that it says."""
        sizes, speed = self.speed.sizes, self.speed
        self.out.mkdir()
        answer = speed.peers.ask({
            "do": self.kind, "model": str(speed.model), "data": str(speed.data), "out": str(self.out),
            "device": speed.part.device, "dtype": self.dtype, "batch": self.batch, "resolution": sizes.resolution,
            "pictures": self.marks,
            "steps": sizes.draw_steps if self.kind == "draw" else self.steps, "block": sizes.block[self.batch],
            "compile": self.side == COMPILED, "sync_log": str(self.sync_log),
        }, self.watch, speed.deadline())
        speed.versions.update(answer.get("versions", {}))
        self.allocated, self.reserved = answer.get("allocated"), answer.get("reserved")
        return answer["device"]

    def read(self):
        """Times between what was made, in milliseconds; peak memory, waits and idle share."""
        made = self.made()
        if len(made) != self.marks:
            raise Failure(f"made {len(made)} of {self.marks}")
        if self.kind == "draw":
            times, each = [path.stat().st_mtime for path in made], 1
        else:
            times, each = [record["seconds"] for record in made], self.speed.sizes.block[self.batch]
            self.first_loss = made[0]["loss"]
            self.allocated, self.reserved = made[-1].get("gpu_allocated_peak"), made[-1].get("gpu_reserved_peak")
        self.intervals = [1000 * (b - a) / each for a, b in zip(times, times[1:])]
        self.waits = waits(self.sync_log)
        self.idle = self.watch.idle(self.marks)


def run(part):
    speed = Speed(part)
    try:
        part.job(["the model's folder"], lambda: [speed.prepare() or Same(part.device, speed.model.is_dir(), True)])
        speed.take_turns()
        part.results.data["about"]["speed"] = note(speed)
        check(part, speed)
    finally:
        if speed.peers:
            speed.peers.stop()


def note(speed):
    sizes = speed.sizes
    what = f"{'the embedded model' if speed.machine.dry else 'Stable Diffusion 1.5 with random weights'}, {sizes.resolution} px"
    steps = ", ".join(f"{block} at batch {batch}" for batch, block in sizes.block.items())
    text = (
        f"{what}. Medians over blocks of steps ({steps}; the first block left out), after each of which the loss is read; "
        f"a picture is {sizes.draw_steps} DDIM steps with guidance, decoded and written. "
        "TF32 as libtorch has it: convolutions yes, matrix products no.")
    if speed.versions:
        text += f" Python: {', '.join(f'{name} {version}' for name, version in speed.versions.items())}."
    if speed.left_out:
        text += f" No time was left for: {'; '.join(speed.left_out)}."
    return text


def check(part, speed):
    for side in (*METHODS, PEFT, HRA, DIFFUSERS):
        part.job([f"{side}: times"], lambda side=side: [times(speed, side)])
    part.job(["host waits are counted"], lambda: [counted(speed)])
    part.job(["no step waits: host waits a step, fewer than one"], lambda: [waiting(speed)])
    part.job(["the GPU's idle share is seen"], lambda: [seen(speed)])
    part.job(["peak memory is told"], lambda: [told(speed)])
    part.job(["first loss in f32: HRA beside LoRA"], lambda: [first_loss(speed)])


def times(speed, side):
    """There are times of every run, and they are times."""
    if speed.lacking(side):
        raise Skipped(f"there is no {', '.join(speed.lacking(side))} in {speed.machine.python}")
    if side in speed.problems:
        raise Failure(speed.problems[side])
    runs = [run for (_, one), runs in speed.runs.items() if one == side for run in runs]
    if not runs:
        raise Failure("was not measured: no time was left")
    intervals = [interval for run in runs for interval in run.intervals]
    devices = sorted(map(str, speed.devices[side]))
    strange = [device for device in devices if kind_of(device) != speed.part.device]
    return Same((strange or devices)[0], all(0 < value < math.inf for value in intervals), True)


def hra_runs(speed):
    return [run for (_, side), runs in speed.runs.items() if side in METHODS for run in runs]


def counted(speed):
    if speed.part.device == "cpu":
        raise Skipped("the CPU waits for nothing")
    if not speed.machine.counter:
        raise Skipped("there is no libsync_counter.so: give --bundle")
    return Same(said(speed), any(run.waits and sum(run.waits) > 0 for run in hra_runs(speed)), True)


def waiting(speed):
    """A record waits, a step does not: the longer run has more records, by far fewer than it has more steps."""
    if speed.part.device == "cpu":
        raise Skipped("the CPU waits for nothing")
    if not speed.machine.counter:
        raise Skipped("there is no libsync_counter.so: give --bundle")
    found = []
    for (_, side), (first, *later) in speed.runs.items():
        if side in METHODS and later and first.waits and later[0].waits and later[0].steps > first.steps:
            found.append((later[0].waits[0] - first.waits[0]) / (later[0].steps - first.steps))
    if not found:
        raise Failure("no measure had a longer run: no time was left")
    return Error(said(speed), max(found), MOST_WAITS)


def said(speed):
    """The device that the program's runs say."""
    devices = sorted({str(run.device) for run in hra_runs(speed)}) or ["no device"]
    return next((device for device in devices if kind_of(device) != speed.part.device), devices[0])


def seen(speed):
    if speed.part.device == "cpu":
        raise Skipped("there is no GPU")
    if speed.nvml.missing:
        raise Skipped(f"no NVML: {speed.nvml.missing}")
    return Same(said(speed), any(run.idle is not None for run in hra_runs(speed)), True)


def told(speed):
    if speed.part.device == "cpu":
        raise Skipped("the allocator of a GPU is asked")
    runs = hra_runs(speed)
    return Same(said(speed), bool(runs) and all(run.allocated and run.reserved for run in runs), True)


def first_loss(speed):
    name = name_of("train", "f32", 1)
    found = [speed.runs.get((name, side)) for side in METHODS]
    if not all(found):
        raise Failure(f"was not measured: {name}")
    hra, lora = (runs[0] for runs in found)
    return Measured(hra.device, hra.first_loss, lora.first_loss, FIRST_LOSS_LIMIT)
