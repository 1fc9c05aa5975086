"""Running the program that is checked, and reading what it says."""

import json
import os
import pathlib
import re
import subprocess
import time

from .record import Failure

SUBJECT_PROMPT = "a fluent 3d emoji of a sks cat face"


class Done:
    """What a finished process left."""

    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err

    def last_words(self):
        lines = [line for line in self.err.splitlines() if line.strip()]
        return " / ".join(lines[-4:])[-600:]


class Trained:
    """A finished training: its losses and gradient norms, its folder, and where it says that it computed."""

    def __init__(self, folder, done):
        self.folder, self.done = pathlib.Path(folder), done
        found = records(folder)
        self.losses = [record["loss"] for record in found]
        self.norms = [record["gradient_norm"] for record in found]
        self.steps = [record["step"] for record in found]
        self.skipped = [bool(record.get("skipped_steps")) for record in found]
        self.device, self.kind = said_device(done.err)

    def good_records(self):
        """Step, loss and gradient norm of each record since which nothing was skipped."""
        rows = zip(self.steps, self.losses, self.norms, self.skipped)
        return [(step, loss, norm) for step, loss, norm, skipped in rows if not skipped]


class Program:
    """The program, for one part; `slots` has a semaphore for each device, so that not too many run at once."""

    def __init__(self, part, slots=None):
        self.part, self.machine, self.slots = part, part.machine, slots or {}
        self.assets = self.machine.root / "assets"
        self.folder = self.machine.scratch / part.name
        self.folder.mkdir(parents=True, exist_ok=True)

    def start(self, words, environ=None, before=()):
        """Starts it; `before` are words of another program that becomes this one."""
        return subprocess.Popen(
            [*before, str(self.machine.program), *map(str, words)], cwd=self.folder, env=environ or self.machine.environ(),
            text=True, errors="replace", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def run(self, words, device=None, environ=None, before=()):
        """Runs it to its end, or to the end of the part's time."""
        slot = self.slots.get(device)
        if slot:
            slot.acquire()
        try:
            with self.start(words, environ, before) as child:
                try:
                    out, err = child.communicate(timeout=max(self.part.left(), 1))
                except subprocess.TimeoutExpired:
                    child.kill()
                    raise Failure(f"hra {words[0]} did not end in time") from None
            return Done(child.returncode, out, err)
        finally:
            if slot:
                slot.release()

    def ok(self, words, **how):
        """Runs it and expects success."""
        done = self.run(words, **how)
        if done.code:
            raise Failure(f"hra {words[0]}: exit code {done.code}: {done.last_words()}")
        return done

    def json(self, words, **how):
        """Runs it and reads what it prints as JSON."""
        done = self.ok([*words, "--json"], **how)
        try:
            return json.loads(done.out)
        except ValueError as error:
            raise Failure(f"hra {words[0]}: no JSON: {error}") from None

    def train_words(self, name, device, **more):
        """Words of a short training on the cat, or on what `more` says; the folder is called as the run and its device."""
        flags = {
            "pretrained_model_name_or_path": self.assets / "tiny-sd", "instance_data_dir": self.assets / "subjects/cat/train",
            "instance_prompt": SUBJECT_PROMPT, "rank": 4, "learning_rate": 1e-3, "train_batch_size": 2, "log_every": 1,
            "num_validation_images": 0, "device": device, "output_dir": self.folder / f"{name}-{device}", **more,
        }
        return ["train", *words_of(flags)]

    def train(self, name, device, environ=None, **more):
        """Trains and expects success."""
        words = self.train_words(name, device, **more)
        return self.trained(words, device, environ)

    def trained(self, words, device, environ=None):
        folder = words[words.index("--output_dir") + 1]
        return Trained(folder, self.ok(words, device=device, environ=environ))

    def resume(self, folder, device, environ=None, **more):
        words = ["train", "--resume", "latest", *words_of({"output_dir": folder, "device": device, **more})]
        return self.trained(words, device, environ)

    def help(self, verb):
        return self.ok([verb, "--help"]).out


def words_of(flags):
    """Flags as words; None leaves one away, True is a flag without a value, a list gives one several times."""
    words = []
    for flag, value in flags.items():
        for one in value if isinstance(value, list) else [value]:
            if one is not None and one is not False:
                words += [f"--{flag}"] if one is True else [f"--{flag}", str(one)]
    return words


def values_of(text, flag):
    """The possible values of a flag, from the program's help."""
    match = re.search(rf"^ +{re.escape(flag)} <.*?^ +Possible values:\n(.*?)\n *\n", text, re.MULTILINE | re.DOTALL)
    values = re.findall(r"^ +- ([^\s:]+):", match[1], re.MULTILINE) if match else []
    if not values:
        raise Failure(f"the program's help does not list the values of {flag}")
    return values


def records(folder):
    """The records of a run so far; a line that is being written is left away."""
    try:
        with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as file:
            lines = file.read().split("\n")[:-1]
    except OSError:
        return []
    return [json.loads(line) for line in lines]


def said_device(err):
    """Device and number format from the line with which a training begins."""
    for line in err.splitlines():
        match = re.match(r"training \d+ values .*\b(cpu|cuda[(:]?(\d+)\)?)(?: in (\w+))?", line, re.IGNORECASE)
        if match:
            return ("cpu" if match[2] is None else f"cuda:{match[2]}"), (match[3] or "").lower()
    return None, ""


def wait_for(condition, child, seconds):
    """Waits for something that a running process does; fails where it ends before."""
    until = time.monotonic() + seconds
    while not condition():
        if child.poll() is not None:
            raise Failure("the process ended too early")
        if time.monotonic() > until:
            raise Failure("waited in vain for what the process does")
        time.sleep(0.002)
