"""Kills: runs that are ended at random moments, gone on with, and compared with one that nobody disturbed."""

import random
import re
import shutil
import signal
import time

from folders import difference, digest, halves, leftovers

SIGNALS = {signal.SIGKILL: "SIGKILL", signal.SIGTERM: "SIGTERM", signal.SIGINT: "SIGINT"}
# A run is killed up to so many times before it may end.
MOST_KILLS = 4
# Seconds that processes of a killed comparison have to end, and that any run here may take.
GRACE, TIMEOUT = 20, 300


class Scenario:
    """A command, what it writes, and how it goes on after an interruption."""

    def __init__(self, name, weight, words, output, go_on=None, settled=True):
        self.name, self.weight, self.words, self.output = name, weight, words, output
        # Words of the command that goes on, from the case's folder; the same command where there is none.
        self.go_on = go_on or (lambda case: self.words)
        # Whether what is there in the middle is as it will be in the end; whether all of it comes at once.
        self.settled, self.at_once = settled, words[0] in ("export", "merge")
        self.wanted, self.seconds = None, None

    def prepare(self, program, folder):
        """The undisturbed run; how long it takes and what it leaves."""
        done = program.run(self.words, folder, TIMEOUT)
        if done.code != 0:
            raise SystemExit(f"torture: {self.name}: the undisturbed run failed with {done.code}\n{done.err}")
        self.wanted, self.seconds = digest(folder, folder), done.seconds


def scenarios(root):
    """What is killed: every verb that writes over some time."""
    assets, model = root / "assets", root / "assets/tiny-sd"
    cat = assets / "subjects/cat"
    train = [
        "train", "--pretrained_model_name_or_path", model, "--instance_data_dir", cat / "train", "--instance_prompt", "a sks cat",
        "--held_out_data_dir", cat / "held_out", "--with_prior_preservation", "--class_prompt", "a cat", "--num_class_images", "6",
        "--class_steps", "2", "--sample_batch_size", "4", "--train_text_encoder", "--use_ema", "--rank", "2", "--learning_rate", "1e-3",
        "--max_train_steps", "6", "--checkpointing_steps", "2", "--log_every", "1", "--validation_prompt", "a sks cat",
        "--validation_steps", "2", "--validation_inference_steps", "2", "--num_validation_images", "1", "--output_dir", "run",
    ]
    resume = ["train", "--resume", "latest", "--output_dir", "run"]
    sample = ["sample", "--model", model, "--prompt", "a cat", "--prompt", "a red apple", "--num-images", "3", "--batch-size", "2",
              "--steps", "3", "--output", "out", "--save-latents", "latents.safetensors"]
    adapter = root / "tests/fixtures/cases/sd15/hra-r4"
    small = root / "tests/fixtures/cases/sd15/pipeline"
    export = ["export", "--model", small, "--adapter", adapter, "--output"]
    merge = ["merge", f"{adapter}=0.8", f"{adapter}=0.5", "--output", "both", "--how", "geodesic"]
    text = lambda words: [str(word) for word in words]
    return [
        Scenario("train", 10, text(train), "run", lambda case: resume if (case / "run/config.toml").is_file() else text(train)),
        Scenario("sample", 3, text(sample), "out", lambda case: [*text(sample), "--overwrite"]),
        Scenario("export-merged", 1, text([*export, "model", "--to", "merged"]), "model"),
        Scenario("export-checkpoint", 1, text([*export, "m.safetensors", "--to", "checkpoint"]), "m.safetensors"),
        Scenario("merge", 1, text(merge), "both"),
        Scenario("compare", 4, ["compare", "compare.toml"], "cmp", settled=False),
    ]


def without_stops(found, wanted):
    """Without the checkpoints that a training saved when it was asked to stop, as long as they have all files of a checkpoint."""
    step = re.compile(r"(.*checkpoints/step-\d+/)(.*)")
    folders = {}
    for match in filter(None, map(step.fullmatch, found)):
        folders.setdefault(match[1], set()).add(match[2])
    known = {match[1] for match in map(step.fullmatch, wanted) if match}
    whole = {match[2] for match in map(step.fullmatch, wanted) if match}
    stops = tuple(name for name, files in folders.items() if name not in known and files == whole)
    return {name: content for name, content in found.items() if not (stops and name.startswith(stops))}


COMPARISON = """\
title = "torture"
output_dir = "cmp"
seeds = [0]
jobs = 2
[train]
threads = 1
[train.model]
pretrained_model_name_or_path = "{model}"
[train.data]
resolution = 64
[train.prior]
with_prior_preservation = true
num_class_images = 3
class_steps = 1
sample_batch_size = 2
[train.schedule]
max_train_steps = 4
[train.checkpoints]
checkpointing_steps = 2
[draw]
prompts = ["a fluent 3d emoji of a {{subject}}"]
drift_prompts = ["a red apple"]
num_images = 2
num_drift_images = 1
steps = 2
[[subject]]
name = "cat"
class = "cat face"
data_dir = "{cat}/train"
test_data_dir = "{cat}/held_out"
instance_prompt = "a fluent 3d emoji of a {{subject}}"
class_prompt = "a fluent 3d emoji of a {{class}}"
[[method]]
label = "HRA r 2"
adapter = {{ method = "hra", rank = 2 }}
[[method]]
label = "LoRA r 2"
adapter = {{ method = "lora", rank = 2 }}
"""


def comparison(root):
    """A config of the smallest comparison that has all parts."""
    return COMPARISON.format(model=root / "assets/tiny-sd", cat=root / "assets/subjects/cat")


class Kills:
    """All scenarios with their references."""

    def __init__(self, program, root, work, faults, names=()):
        self.program, self.root, self.work, self.faults = program, root, work, faults
        self.scenarios = [one for one in scenarios(root) if not names or one.name in names]
        for one in self.scenarios:
            one.prepare(program, self.fresh(f"reference-{one.name}", one))

    def fresh(self, name, scenario):
        folder = self.work / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if scenario.name == "compare":
            (folder / "compare.toml").write_text(comparison(self.root), encoding="utf-8")
        return folder

    def case(self, seed, index):
        """One run, killed a few times, then finished; returns how often it was killed."""
        name = f"kill-{index}"
        rng = random.Random(f"{seed} {name}")
        one = rng.choices(self.scenarios, [scenario.weight for scenario in self.scenarios])[0]
        folder, words, kills, story, ended = self.fresh(name, one), one.words, 0, [], False
        for _ in range(rng.randint(1, MOST_KILLS)):
            number = rng.choice(list(SIGNALS))
            moment = rng.uniform(0, one.seconds * rng.choice((0.3, 1.0, 1.0, 1.6)))
            running = self.program.start(words, folder)
            while time.monotonic() - running.started < moment and not running.poll():
                time.sleep(0.003)
            ended_before = running.poll()
            running.send(number)
            sent = (number,)
            if number != signal.SIGKILL and rng.random() < 0.3:
                time.sleep(rng.uniform(0, 0.2))
                running.send(signal.SIGKILL)
                sent = (number, signal.SIGKILL)
            done = running.wait(TIMEOUT)
            story.append(f"{' and '.join(SIGNALS[number] for number in sent)} at {moment:.2f} s")
            kills += not ended_before
            if not self.is_right(done, sent, name, folder, words, one, running, story):
                return kills
            words = one.go_on(folder)
            # An export or merge is written at once, and refused where it is there.
            ended = done.code == 0 or one.at_once and (folder / one.output).exists()
            if ended:
                break
        self.finish(name, folder, one, words, story, ended)
        return kills

    def is_right(self, done, sent, name, folder, words, one, running, story):
        """Whether an interrupted run ended as it may, with nothing half-done under a final name."""
        told = ", then ".join(story)
        if panic := done.panic(sent):
            self.faults.tell("panic", name, folder, f"{one.name}, {told}: {panic}", words, done)
            return False
        if done.code not in {0, 130, *(-number for number in sent)}:
            kind = "wrong" if done.code is None else "lost"
            self.faults.tell(kind, name, folder, f"{one.name}, {told}: ended with {done.code}", words, done)
            return False
        deadline = time.monotonic() + GRACE
        while (left := running.family()) and time.monotonic() < deadline:
            time.sleep(0.05)
        if left:
            self.faults.tell("wrong", name, folder, f"{one.name}, {told}: {len(left)} processes stayed behind", words, done)
            return False
        found = digest(folder, folder)
        if one.settled and (half := [file for file in halves(found, one.wanted) if file != "latents.safetensors"]):
            self.faults.tell("lost", name, folder, f"{one.name}, {told}: {', '.join(half[:4])} there and not whole", words, done)
            return False
        return True

    def finish(self, name, folder, one, words, story, ended):
        """Goes on to the end, and compares."""
        told, done = ", then ".join(story) + ", then to the end", None
        if not ended:
            done = self.program.run(words, folder, TIMEOUT)
            if panic := done.panic():
                return self.faults.tell("panic", name, folder, f"{one.name}, {told}: {panic}", words, done)
            if done.code != 0:
                return self.faults.tell("lost", name, folder, f"{one.name}, {told}: ended with {done.code}", words, done)
        found = digest(folder, folder)
        if "SIGTERM" in told or "SIGINT" in told:
            found = without_stops(found, one.wanted)
        if differs := difference(found, one.wanted):
            return self.faults.tell("lost", name, folder, f"{one.name}, {told}: {differs}", words, done)
        # Runs and comparisons are folders of the program's own; elsewhere another process may be writing, and nothing is cleared away.
        if not ended and one.words[0] in ("train", "compare") and (left := leftovers(folder)):
            return self.faults.tell("lost", name, folder, f"{one.name}, {told}: left behind: {', '.join(left[:4])}", words, done)
        shutil.rmtree(folder, ignore_errors=True)
        return None

    def close(self):
        """Nothing is kept open."""
