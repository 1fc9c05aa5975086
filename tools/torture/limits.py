"""Runs with too little of something: room on a disk, memory, open files, or a folder that is taken away under them.

Each has to end with its work done or with an error that says so; afterwards, with room again, the same command ends as if nothing
had happened.
"""

import random
import shlex
import shutil
import subprocess
import time

from folders import difference, digest, leftovers
from kills import TIMEOUT, Kills

# Kilobytes that a file, or a whole file system, may have; bytes of addresses; open files.
FILE_SIZES = (0, 1, 4, 20, 60, 90, 150, 300, 1000)
DISK_SIZES = (8, 40, 100, 200, 400, 800, 1600)
ADDRESSES = (300, 600, 900, 1200, 1500, 1800, 2200, 3000)
OPEN_FILES = (3, 5, 8, 12, 16, 24, 40)
# What is written to standard output, which may be full too.
PRINTED = (["--help"], ["sample", "--help"], ["train", "--print-config", "demo.toml"], ["inspect", "adapter", "--json"],
           ["--version"], ["doctor"])


def small_disks():
    """Whether this machine lets us mount a small file system."""
    try:
        tried = subprocess.run(["unshare", "-Urm", "sh", "-c", "mount -t tmpfs -o size=64k none /mnt"], capture_output=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return tried.returncode == 0


class Limits(Kills):
    """The scenarios of the kills, under limits."""

    def __init__(self, program, root, work, faults):
        super().__init__(program, root, work, faults)
        self.kinds = [self.file_size, self.disk, self.memory, self.open_files, self.taken_away, self.full_output]
        if not small_disks():
            self.kinds.remove(self.disk)
            print("a small file system cannot be mounted here: left out (`unshare -Urm` and tmpfs are needed)", flush=True)

    def case(self, seed, index):
        name = f"limit-{index}"
        rng = random.Random(f"{seed} {name}")
        kind = self.kinds[index % len(self.kinds)]
        one = rng.choice(self.scenarios)
        folder = self.fresh(name, one)
        kind(rng, name, folder, one)
        return 1

    def file_size(self, rng, name, folder, one):
        size = rng.choice(FILE_SIZES)
        self.limited(name, folder, one, f"files of at most {size} kB", f"ulimit -f {2 * size}; trap '' XFSZ")

    def disk(self, rng, name, folder, one):
        size = rng.choice(DISK_SIZES)
        # The disk is gone with the process: what it held is copied out.
        inside = ("mkdir disk; mount -t tmpfs -o size={size}k none disk && cp -a compare.toml disk/ 2>/dev/null; cd disk && {{}}; code=$?; "
                  "cd .. && cp -a disk/. . ; exit $code").format(size=size)
        self.limited(name, folder, one, f"a disk of {size} kB", f"exec unshare -Urm sh -c {shlex.quote(inside)} sh {{}}")

    def memory(self, rng, name, folder, one):
        size = rng.choice(ADDRESSES)
        self.limited(name, folder, one, f"{size} MB of addresses", f"ulimit -v {size * 1024}")

    def open_files(self, rng, name, folder, one):
        count = rng.choice(OPEN_FILES)
        self.limited(name, folder, one, f"{count} open files", f"ulimit -n {count}")

    def limited(self, name, folder, one, what, shell):
        done = self.program.run(one.words, folder, TIMEOUT, shell)
        shutil.rmtree(folder / "disk", ignore_errors=True)
        # The loader's own words, before the program begins.
        no_start = done.code in (126, 127) or "error while loading shared libraries" in done.err
        if panic := done.panic():
            return self.faults.tell("panic", name, folder, f"{one.name} with {what}: {panic}", one.words, done)
        if done.code not in (0, 2) and not no_start:
            return self.faults.tell("wrong", name, folder, f"{one.name} with {what}: ended with {done.code}", one.words, done)
        if done.code == 2 and "error: " not in done.err and "at most 0 kB" not in what:
            return self.faults.tell("wrong", name, folder, f"{one.name} with {what}: ended with 2 and no word", one.words, done)
        ended = done.code == 0 or one.at_once and (folder / one.output).exists()
        if one.settled and (left := leftovers(folder)):
            return self.faults.tell("wrong", name, folder, f"{one.name} with {what}: left behind: {', '.join(left[:4])}", one.words, done)
        return self.finish(name, folder, one, one.go_on(folder), [f"with {what}"], ended)

    def taken_away(self, rng, name, folder, one):
        """The output folder is removed while it is written to."""
        running, output = self.program.start(one.words, folder), folder / one.output
        while not output.exists() and not running.poll():
            time.sleep(0.003)
        time.sleep(rng.uniform(0, one.seconds / 2))
        ended_before = running.poll()
        shutil.rmtree(output, ignore_errors=True)
        done = running.wait(TIMEOUT)
        what = f"{one.name}, whose {one.output} was taken away"
        if panic := done.panic():
            return self.faults.tell("panic", name, folder, f"{what}: {panic}", one.words, done)
        if ended_before or one.at_once:
            return shutil.rmtree(folder, ignore_errors=True)
        if done.code == 0 and (differs := difference(digest(folder, folder), one.wanted)):
            return self.faults.tell("wrong", name, folder, f"{what}: ended with 0, and {differs}", one.words, done)
        if done.code not in (0, 2):
            return self.faults.tell("wrong", name, folder, f"{what}: ended with {done.code}", one.words, done)
        return shutil.rmtree(folder, ignore_errors=True)

    def full_output(self, rng, name, folder, _):
        """Standard output is a full disk: an error, and not half a text with exit code 0."""
        words = rng.choice(PRINTED)
        shutil.copy2(self.root / "configs/demo.toml", folder)
        (folder / "adapter").symlink_to(self.root / "tests/fixtures/cases/sd15/hra-r4")
        done = self.program.run(words, folder, TIMEOUT, "exec {} > /dev/full")
        if panic := done.panic():
            return self.faults.tell("panic", name, folder, f"standard output full: {panic}", words, done)
        if done.code != 2:
            return self.faults.tell("wrong", name, folder, f"standard output full: ended with {done.code}", words, done)
        return shutil.rmtree(folder, ignore_errors=True)
