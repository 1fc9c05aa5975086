"""What was found: counted, and kept with its files and the command that repeats it."""

import shlex
import shutil
import threading


class Faults:
    """Faults of three kinds. A case without one leaves nothing."""

    KINDS = ("lost", "wrong", "panic")

    def __init__(self, work, repeat):
        self.kept, self.repeat, self.lock = work, repeat, threading.Lock()
        self.counts = dict.fromkeys(self.KINDS, 0)
        self.tried = {"kill": 0, "limit": 0, "input": 0}

    def count(self, what, number=1):
        with self.lock:
            self.tried[what] += number

    def tell(self, kind, name, folder, what, words, done=None):
        """Keeps a case's folder, and says what happened and how to see it again."""
        with self.lock:
            self.counts[kind] += 1
            self.kept.mkdir(parents=True, exist_ok=True)
            target = self.kept / name
            shutil.rmtree(target, ignore_errors=True)
            if folder.is_dir():
                shutil.copytree(folder, target, symlinks=True)
            else:
                target.mkdir()
            lines = [f"{kind}: {what}", "in this folder: hra " + shlex.join(map(str, words)), f"again: {self.repeat} --only {name}"]
            if done:
                lines.append(f"exit code {done.code}, {done.seconds:.1f} s, {done.memory >> 20} MB\n{done.err[-2000:]}")
            (target / "WHAT.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
            print(f"{kind}: {name}: {what}\n  {lines[1]}\n  files: {target}\n  {lines[2]}", flush=True)

    def line(self, seed):
        """The line that sums up."""
        tried = f"{self.tried['kill']} kills, {self.tried['limit']} limits, {self.tried['input']} inputs tried"
        lost, wrong, panics = (self.counts[kind] for kind in self.KINDS)
        return f"{tried}: {lost} lost, {wrong} wrong, {panics} panics (seed {seed})"

    @property
    def any(self):
        return any(self.counts.values())
