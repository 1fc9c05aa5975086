"""Folders of cases: made from links, compared by what they hold without times."""

import csv
import hashlib
import io
import json
import os
import pathlib
import shutil

from formats import png_chunks

# Values of the clock and of the machine: all else is promised to be the same after an interruption.
TIMES = {"seconds", "seconds_per_step", "peak_memory", "peak_device_memory", "interrupted", "minutes"}
# What tells of one process (logs, locks, TensorBoard's times), and pages that show times beside the rest.
OWN = ("out.txt", "err.txt", "log.txt", ".lock", "report.html", "report.md")
# Files that grow or are written anew while a run goes on.
GROWING = ("metrics.jsonl", "plan.json", "task.json", "resolution.json", "drawn.json", "report.json", "report.csv",
           "report-cells.csv", "grid.png", "trained.json", "record.json")


def link_tree(source, target):
    """The same files under another name; a file that is written anew leaves the source as it was."""
    source, target = pathlib.Path(source), pathlib.Path(target)
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        for entry in sorted(source.iterdir()):
            link_tree(entry, target / entry.name)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)  # of a link what it leads to
    except OSError:
        shutil.copy2(source, target)


def copy_tree(source, target):
    """Files of their own, for folders that are written into."""
    if pathlib.Path(source).is_dir():
        shutil.copytree(source, target)
    else:
        pathlib.Path(target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def files(folder):
    """Every file below a folder, relative to it, in order."""
    folder = pathlib.Path(folder)
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file() or path.is_symlink())


def leftovers(folder):
    """Names that say that a write did not end."""
    return sorted(str(path.relative_to(folder)) for path in pathlib.Path(folder).rglob(".tmp-*"))


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(inner) for key, inner in value.items() if key not in TIMES}
    if isinstance(value, list):
        return [without_times(inner) for inner in value]
    return value


def normal(name, content, case):
    """A file's content without times and without the place of its case."""
    # A case on a small disk stood one folder deeper.
    placeless = lambda text: text.replace(os.fsencode(f"{case}/disk"), b"CASE").replace(os.fsencode(str(case)), b"CASE")
    if name.endswith((".json", ".jsonl", ".toml", ".txt", ".csv")):
        content = placeless(content)
    try:
        if name.endswith(".png") and png_chunks(content):
            # Pictures say where their adapter lies.
            return b"".join(kind + placeless(body) for kind, body in png_chunks(content))
        if name.endswith(".json"):
            return json.dumps(without_times(json.loads(content))).encode()
        if name.endswith(".jsonl"):
            lines = [line for line in content.decode().splitlines() if line]
            return "\n".join(json.dumps(without_times(json.loads(line))) for line in lines).encode()
        if name.endswith(".csv"):
            rows = list(csv.reader(io.StringIO(content.decode())))
            kept = [i for i, title in enumerate(rows[0]) if title not in TIMES] if rows else []
            return repr([[row[i] for i in kept] for row in rows]).encode()
    except (ValueError, IndexError, RecursionError, csv.Error):
        pass
    return content


def digest(folder, case):
    """What a folder holds: a hash for each file, but for those that tell of one process alone."""
    found = {}
    for path in files(folder):
        parts = path.parts
        if path.name in OWN or "tensorboard" in parts or any(part.startswith(".tmp-") for part in parts):
            continue
        content = (pathlib.Path(folder) / path).read_bytes()
        found[str(path)] = hashlib.sha256(normal(path.name, content, case)).hexdigest()
    return found


def difference(found, wanted):
    """The first names in which two digests differ, as a text; empty where they are equal."""
    said = [f"{name} is missing" for name in wanted if name not in found]
    said += [f"{name} is one too many" for name in found if name not in wanted]
    said += [f"{name} differs" for name in found if name in wanted and found[name] != wanted[name]]
    return "; ".join(said[:6]) + (f"; and {len(said) - 6} more" if len(said) > 6 else "")


def halves(found, wanted):
    """Files of an interrupted run that are there and are not what they end as."""
    return [name for name in found
            if name in wanted and pathlib.PurePath(name).name not in GROWING and found[name] != wanted[name]]


def stamp(folder, names):
    """Sizes and times of files that nobody may write to."""
    state = {}
    for name in names:
        status = os.stat(folder / name)
        state[name] = (status.st_size, status.st_mtime_ns)
    return state
