"""A run directory that takes no more lines, or is not there any more."""

import errno
import io
import os
import shutil

from hurt_runs import assert_same_end, finish, lines, saved_steps, small, start
from tensorboardX import record_writer

from switchlora_jax.training import writers


class Full(io.FileIO):
  """A file on a disk that is full from its `first` to its `last` write on; the first of these still takes ten bytes."""

  first, last, writes = 0, 0, 0

  def write(self, contents):
    Full.writes += 1
    if Full.writes == Full.first:
      return super().write(contents[:10])
    if Full.first < Full.writes <= Full.last:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return super().write(contents)


def full(writes: str):
  """metrics.jsonl cannot be written from one write to another, `FIRST-LAST`; TensorBoard's events never can."""
  Full.first, Full.last = map(int, writes.split("-"))
  opened = writers.Path.open
  writers.Path.open = lambda path, mode="r", *rest, **named: (
    Full(path, mode) if (path.name, mode) == ("metrics.jsonl", "ab") else opened(path, mode, *rest, **named)
  )
  record_writer.open = lambda path, mode: io.FileIO("/dev/full", mode)


def test_a_disk_that_has_room_again(whole, tmp_path):
  """Case 17. Nothing is lost, and it is said once; TensorBoard, which has its own file, is given up."""
  folder, uninterrupted = whole
  run = start(small(folder), tmp_path / "run", fault="test_disk_faults:full=12-14")
  assert run.end() == 0, run.said()
  assert run.said().count("metrics.jsonl cannot be written (No space left on device)") == 1, run.said()
  assert run.said().count("TensorBoard events cannot be written") == 1, run.said()
  assert_same_end(tmp_path / "run", uninterrupted)


def test_a_disk_that_stays_full(whole, tmp_path):
  """Case 17. The run ends when a checkpoint is due, which is not saved; the relaunch ends as the uninterrupted run."""
  folder, uninterrupted = whole
  run = start(small(folder), tmp_path / "run", fault="test_disk_faults:full=12-999")
  assert run.end() == 2
  assert "metrics.jsonl could not be written until this checkpoint was due (No space left" in run.said()
  assert "Traceback" not in run.said() and saved_steps(tmp_path / "run")[-1] == 10
  assert [row["step"] for row in lines(tmp_path / "run")] == list(range(1, 12))
  assert (tmp_path / "run" / "metrics.jsonl").read_text().endswith("}\n"), "half of a line is left"
  finish(small(folder), tmp_path / "run")
  assert_same_end(tmp_path / "run", uninterrupted)


def test_a_run_directory_that_is_removed(whole, tmp_path):
  """Case 17. The next line that is written ends the run; nothing is left of it, and nothing is made again."""
  folder, _ = whole
  run = start(small(folder, steps=4000, checkpoint_every=2000), tmp_path / "run", "--config.data.epochs=1000")
  run.until(12)
  shutil.rmtree(tmp_path / "run")
  assert run.end() == 2
  (error,) = run.errors()
  assert error.startswith(f"error: {tmp_path / 'run'}/metrics.jsonl was removed, moved or replaced")
  assert "Traceback" not in run.said() and not (tmp_path / "run" / "metrics.jsonl").exists()
