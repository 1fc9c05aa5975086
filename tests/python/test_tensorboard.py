"""TensorBoard's own reader on what src/train/tensorboard.rs writes (by way of tests/formats/tensorboard.rs)."""

import os
import pathlib
import subprocess

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("events")
    command = ["cargo", "test", "--quiet", "--test", "formats", "tensorboard::a_resumed_run"]
    subprocess.run(command, cwd=ROOT, env=dict(os.environ, HRA_EVENTS=str(folder)), check=True)
    assert len(list(folder.glob("events.out.tfevents.*"))) == 2
    return folder


def test_scalars_are_read(folder):
    reader = EventAccumulator(str(folder))
    reader.Reload()
    assert reader.Tags()["scalars"] == ["train/loss"]
    events = reader.Scalars("train/loss")
    # What the killed run logged after its last checkpoint is gone: no 99 at steps 5 and 6.
    assert [event.step for event in events] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [event.value for event in events] == pytest.approx([1 / step for step in range(1, 9)], rel=1e-7)
    assert [event.wall_time for event in events] == [1001, 1002, 1003, 1004, 2005, 2006, 2007, 2008]


def test_a_damaged_record_is_noticed(folder, tmp_path):
    """The reader checks checksums, so that the test above has checked ours."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader

    source = min(folder.glob("events.out.tfevents.*"))
    damaged = bytearray(source.read_bytes())
    damaged[-6] ^= 1
    copy = tmp_path / source.name
    copy.write_bytes(damaged)
    whole = len(list(RawEventFileLoader(str(source)).Load()))
    assert len(list(RawEventFileLoader(str(copy)).Load())) == whole - 1
