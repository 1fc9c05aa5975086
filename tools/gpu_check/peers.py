"""The Python halves, as this side calls them: a process that has imported the libraries once and forks for each request."""

import json
import os
import pathlib
import re
import select
import signal
import subprocess

from .record import Failure

# What torch and CUDA say in a fork of a process that has begun to use CUDA.
FORK_TROUBLE = re.compile(r"fork|initiali[sz]|no cuda gpus|ended with status", re.IGNORECASE)
SCRIPT = pathlib.Path(__file__).with_name("peer.py")


class Peers:
    """Where forking does not work (a library has begun to use CUDA already), each request is a process of its own."""

    def __init__(self, machine, environ, log):
        self.machine, self.environ, self.log = machine, environ, log
        self.server, self.forks = None, True

    def start(self):
        """Begins to import; the first request waits for it."""
        self.server = self.process("serve")

    def process(self, *words):
        # Unbuffered, so that select sees all that can be read; a group of its own, so that forks end with it.
        return subprocess.Popen(
            [self.machine.python, str(SCRIPT), *words], env=self.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.log, bufsize=0, preexec_fn=os.setpgrp)

    def stop(self):
        if self.server:
            end(self.server)
            self.server = None

    def ask(self, request, watch, deadline):
        """Does what is asked while `watch` looks on; the answer."""
        if self.forks:
            try:
                return self.forked(request, watch, deadline)
            except Failure as failure:
                if isinstance(failure, Unanswered) or not FORK_TROUBLE.search(str(failure)):
                    raise
                self.stop()
                self.forks = False
        return self.alone(request, watch, deadline)

    def forked(self, request, watch, deadline):
        if self.server is None:
            self.start()
        try:
            self.server.stdin.write(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise Failure(f"the Python half ended: {error}") from None
        try:
            return answer(self.server.stdout, watch, deadline)
        except Unanswered as failure:
            self.stop()
            raise Unanswered(f"{failure}: {self.last_words()}") from None

    def last_words(self):
        with open(self.log.name, encoding="utf-8", errors="replace") as file:
            return " ".join(file.read()[-300:].split())

    def alone(self, request, watch, deadline):
        child = self.process("once")
        try:
            child.stdin.write(json.dumps(request).encode() + b"\n")
            return answer(child.stdout, watch, deadline)
        except Unanswered as failure:
            raise Unanswered(f"{failure}: {self.last_words()}") from None
        finally:
            end(child)


class Unanswered(Failure):
    """The process is in no state to be asked again."""


def end(child):
    """Ends a process and its forks."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.wait()


def answer(pipe, watch, deadline):
    """The next line, JSON; what else a library prints there is passed over."""
    text = b""
    while True:
        if not watch.until(lambda: select.select([pipe], [], [], 0)[0], deadline):
            raise Unanswered("the Python half did not answer in time")
        more = pipe.read(1 << 16)
        if not more:
            raise Unanswered("the Python half ended without an answer")
        text += more
        *lines, text = text.split(b"\n")
        for line in lines:
            if line.startswith(b"{"):
                found = json.loads(line)
                if "error" in found:
                    raise Failure(found["error"])
                return found
