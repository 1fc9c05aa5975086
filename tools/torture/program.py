"""Runs the program under test in a folder of its own, and says which ends are never right."""

import os
import pathlib
import resource
import signal
import subprocess
import time

# Words that only a defect of the program writes.
PANICS = ("panicked", "defect of hra", "Result::unwrap", "Option::unwrap", "RUST_BACKTRACE", "stack overflow", "core dumped")
# How the program ends: done, error, stopped by the user.
DONE, ERROR, STOPPED = 0, 2, 130
# A guard for the machine, far above what any case needs.
MOST_ADDRESSES = 12 << 30


class Done:
    """How a process ended: its exit code (negative: the signal), what it wrote, seconds, bytes of memory."""

    def __init__(self, code, out, err, seconds, memory):
        self.code, self.out, self.err, self.seconds, self.memory = code, out, err, seconds, memory

    def panic(self, sent=()):
        """What of this end is a crash, if anything; `sent` are the signals that we sent."""
        for word in PANICS:
            if word in self.err or word in self.out:
                line = next(line for line in (self.err + self.out).splitlines() if word in line)
                return f"`{word}`: {line[:300]}"
        if self.code < 0 and -self.code not in sent:
            return f"ended by signal {-self.code}"
        return None


class Running:
    """A process that was started; its output goes to files, so that nobody waits for a reader."""

    def __init__(self, process, folder, started):
        self.process, self.folder, self.started, self.status = process, folder, started, None

    def poll(self):
        """Whether it has ended."""
        if self.status is None:
            pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
            if pid:
                self.ended(status, usage)
        return self.status is not None

    def ended(self, status, usage):
        self.status, self.usage = os.waitstatus_to_exitcode(status), usage
        self.process.returncode = self.status

    def send(self, number):
        if not self.poll():
            os.kill(self.process.pid, number)

    def wait(self, timeout):
        """Waits so many seconds; past them it is killed, and the code is None."""
        late = False
        if not self.poll():
            deadline, pause = self.started + timeout, 0.005
            while not self.poll():
                if time.monotonic() > deadline:
                    late = True
                    os.kill(self.process.pid, signal.SIGKILL)
                    self.ended(*os.wait4(self.process.pid, 0)[1:])
                    break
                time.sleep(pause)
                pause = min(pause * 1.3, 0.05)
        seconds = time.monotonic() - self.started
        read = lambda name: (self.folder / name).read_text(encoding="utf-8", errors="replace")
        code = None if late else self.status
        return Done(code, read("out.txt"), read("err.txt"), seconds, self.usage.ru_maxrss << 10)

    def family(self):
        """Processes of its session that are still there, itself apart."""
        found = []
        for entry in pathlib.Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != self.process.pid:
                try:
                    fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                except (OSError, IndexError):
                    continue
                if fields[3] == str(self.process.pid) and fields[0] != "Z":
                    found.append(int(entry.name))
        return found


class Program:
    """The binary, and the environment that it gets."""

    def __init__(self, path):
        self.path = pathlib.Path(path).resolve()
        # One thread each: cases run beside each other. The short spin, so that the program need not start itself anew.
        self.environ = dict(os.environ, OMP_NUM_THREADS="1", GOMP_SPINCOUNT="1000", HF_HUB_OFFLINE="1")
        for name in ("RUST_BACKTRACE", "HF_TOKEN"):
            self.environ.pop(name, None)

    def start(self, words, folder, shell=None):
        """Starts it in `folder`; `shell` are lines of sh before it, such as `ulimit -f 100`, or with `{}` in its place."""
        command = [str(self.path), *words]
        if shell:
            lines = shell if "{}" in shell else shell + '; exec {}'
            command = ["sh", "-c", lines.replace("{}", '"$@"'), "sh", *command]
        started = time.monotonic()
        with open(folder / "out.txt", "wb") as out, open(folder / "err.txt", "wb") as err:
            process = subprocess.Popen(
                command, cwd=folder, env=self.environ, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                start_new_session=True,
            )
        if not shell:
            try:
                resource.prlimit(process.pid, resource.RLIMIT_AS, (MOST_ADDRESSES, MOST_ADDRESSES))
            except (ProcessLookupError, PermissionError):
                pass
        return Running(process, folder, started)

    def run(self, words, folder, timeout=60, shell=None):
        return self.start(words, folder, shell).wait(timeout)
