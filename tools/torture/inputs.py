"""Damaged files of every kind, read through the binary, and the rule for what may come of them."""

import pathlib
import random
import re
import shutil
import threading

from damage import damage
from folders import difference, digest, files, leftovers, stamp
from formats import problem, read_json
from made import made_recipes, material
from recipes import stored

# A case of a few kilobytes takes neither so many seconds nor so much memory.
TIMEOUT, MOST_MEMORY = 120, 1500 << 20
# What a terminal shows of progress is no word about the file.
PROGRESS = re.compile(r"\d+/\d+|\bs left\b|^  ?hra |pictures? in |draw with it|^peak memory")
# Of a run's words: its time, and the hash of a tower's file, which is another one whatever was damaged.
OF_THIS_RUN = re.compile(r'(?<=steps in )\d+(?= s)|(?<="towers": ")[^"]*')
LISTS = (".csv", ".jsonl", ".txt")
SIMPLE = re.compile(r"[0-9.e+-]+")
NUMBERLESS = re.compile(r"(?<![\w-])(-?inf|nan)(?![\w-])", re.IGNORECASE)


def said(done, both):
    """The lines that a run wrote, without their numbers."""
    lines = (done.err + (done.out if both else "")).splitlines()
    return {SIMPLE.sub("#", line) for line in lines if line.strip() and not PROGRESS.search(line)}


class Good:
    """What a recipe does with good files."""

    def __init__(self, inputs, recipe, index):
        self.folder = inputs.fresh(f"good-{index}")
        recipe.lay(self.folder)
        names = [name for name in files(self.folder / "in") if str(name).startswith(tuple(recipe.damaged))]
        # What a process keeps for itself, and what it writes and never reads.
        self.names = [str(name) for name in names if name.name not in (".lock", "log.txt", "dataset.txt", "task.json")
                      and not name.name.startswith(("report", "events.")) or "task.json" in recipe.damaged[0]]
        self.contents = {name: (self.folder / "in" / name).read_bytes() for name in self.names}
        done = inputs.program.run(recipe.words, self.folder, TIMEOUT)
        if done.code != 0:
            raise SystemExit(f"torture: {recipe.name}: good files ended with {done.code}\n{' '.join(recipe.words)}\n{done.err}")
        self.result, self.seconds = inputs.result(recipe, self.folder, done), done.seconds
        self.said = {both: said(done, both) for both in (False, True)}
        shutil.rmtree(self.folder)


class Inputs:
    """All recipes with what they do undisturbed."""

    def __init__(self, program, root, work, faults, names=()):
        self.program, self.work, self.faults = program, work, faults
        self.recipes, self.made = stored(root), work / "material"
        if not names or set(names) - {one.name for one in self.recipes}:
            material(program, root, self.made)
            self.recipes += made_recipes(root, self.made)
        self.recipes = [one for one in self.recipes if not names or one.name in names]
        self.good, self.state = {}, digest(self.made, self.work)

    def fresh(self, name):
        folder = self.work / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def result(self, recipe, folder, done):
        """What a run came to: its files, and what it printed."""
        found = {name: value for name, value in digest(folder, folder).items() if name.startswith("out")}
        for name in recipe.own:
            found |= {f"in/{name}/{file}": value for file, value in digest(folder / "in" / name, folder).items()}
        return found | {"stdout": OF_THIS_RUN.sub("#", done.out.replace(str(folder), "CASE"))}

    def reference(self, index):
        if index not in self.good:
            self.good[index] = Good(self, self.recipes[index], f"{index}-{threading.get_ident()}")
        return self.good[index]

    def case(self, seed, index):
        """One run with a damaged input or several; returns how many."""
        name = f"input-{index}"
        rng = random.Random(f"{seed} {name}")
        chosen = rng.choices(range(len(self.recipes)), [one.weight for one in self.recipes])[0]
        recipe, good = self.recipes[chosen], self.reference(chosen)
        folder = self.fresh(name)
        recipe.lay(folder)
        hurt, several = {}, 1 if rng.random() < 0.85 else 2
        for victim in rng.sample(good.names, min(recipe.many or several, len(good.names))):
            same_kind = [other for other in good.names if other.rpartition(".")[2] == victim.rpartition(".")[2]]
            hurt[victim] = damage(rng, victim, good.contents[victim], good.contents[rng.choice(same_kind)])
        for victim, (content, _) in hurt.items():
            (folder / "in" / victim).unlink()
            (folder / "in" / victim).write_bytes(content)
        read_only = [path for path in files(folder) if not any(str(path).startswith(f"in/{own}") for own in recipe.own)]
        before = stamp(folder, read_only)
        done = self.program.run(recipe.words, folder, TIMEOUT)
        what = f"{recipe.name}, " + ", ".join(f"{victim} ({how})" for victim, (_, how) in hurt.items())
        if fault := self.judge(recipe, good, hurt, folder, done, before):
            self.faults.tell(fault[0], name, folder, f"{what}: {fault[1]}", recipe.words, done)
        shutil.rmtree(folder, ignore_errors=True)
        return len(hurt) if recipe.many else 1

    def judge(self, recipe, good, hurt, folder, done, before):
        """The rule; a kind of fault and a text where it is broken."""
        if panic := done.panic():
            return "panic", panic
        if done.code is None:
            return None if recipe.may_take_long else ("wrong", f"not done after {TIMEOUT} s")
        if done.code not in (0, 2):
            return "wrong", f"ended with {done.code}"
        if done.code == 2 and "error: " not in done.err:
            return "wrong", "ended with 2 and no word"
        if done.memory > MOST_MEMORY and not recipe.may_take_long:
            return "wrong", f"took {done.memory >> 20} MB"
        names = set(files(folder))
        there = {path for path in names if path.parts[0] == "in" and not any(str(path).startswith(f"in/{own}") for own in recipe.own)}
        if stamp(folder, before) != before or len(there) != sum(path.parts[0] == "in" for path in before):
            return "wrong", "the input was written to"
        if outside := [str(path) for path in names if path.parts[0] not in ("in", "out", "out.safetensors", "out.txt", "err.txt")]:
            return "wrong", f"written outside of the output: {outside[:4]}"
        if left := leftovers(folder):
            return "wrong", f"left behind: {left[:4]}"
        return self.judge_result(recipe, good, hurt, folder, done) if done.code == 0 else None

    def judge_result(self, recipe, good, hurt, folder, done):
        """A damaged file that passed."""
        result = self.result(recipe, folder, done)
        own = [name for name in result if name in {f"in/{victim}" for victim in hurt}]
        differs = difference({k: v for k, v in result.items() if k not in own}, {k: v for k, v in good.result.items() if k not in own})
        if not differs:
            return None
        for path in files(folder):
            if path.suffix in (".safetensors", ".json") and path.parts[0] != "in" and (bad := problem(path.name, (folder / path).read_bytes())):
                return "wrong", f"wrote {path}, which is no good file: {bad}"
        if recipe.many:
            return self.judge_each(good, hurt, result, done)
        is_report = recipe.words[0] == "inspect"
        told = said(done, is_report) - good.said[is_report]
        if is_report and "--json" in recipe.words:
            try:
                read_json(done.out.encode())
            except ValueError as error:
                return "wrong", f"printed what is no JSON: {error}"
        elif NUMBERLESS.search(done.out) and not told:
            return "wrong", "printed a number that is none, and said nothing of it"
        bad = [f"{victim}: {why}" for victim, (content, _) in hurt.items() if (why := problem(victim, content))]
        if bad and not told:
            return "wrong", f"passed without a word, with another result ({differs[:200]}), though {'; '.join(bad)}"
        # A list with fewer lines asks for less.
        fewer = [name for name in good.result if name not in result]
        if fewer and not told and not all(victim.endswith(LISTS) for victim in hurt):
            return "wrong", f"without a word {', '.join(fewer[:4])} is missing"
        return None

    def judge_each(self, good, hurt, result, done):
        """Of files that are read one by one: one that its format refuses is named, or gives what it gave before."""
        for victim, (content, _) in hurt.items():
            name = pathlib.PurePath(victim)
            out = f"out/{name.stem}.png"
            if name.name in done.err or result.get(out) == good.result.get(out):
                continue
            if out not in result:
                return "wrong", f"without a word {out} is missing"
            if why := problem(victim, content):
                return "wrong", f"{victim} passed without a word, with another result, though {why}"
        return None

    def close(self):
        """Looks whether anything touched the material that all cases read."""
        if differs := difference(digest(self.made, self.work), self.state):
            self.faults.tell("wrong", "material", self.made, f"a case wrote to what it should only read: {differs}", [])
