"""A run directory that cannot be written or is removed."""

import errno
import io
import os
import shutil

from fault_runs import assert_same_end, finish, metrics_rows, saved_steps, small_config, start
from tensorboardX import record_writer

from switchlora_jax.training import writers


class FullDiskFile(io.FileIO):
  """A file whose writes number `first` to `last` fail as on a full disk; the first of them still writes ten bytes."""

  first, last, writes = 0, 0, 0

  def write(self, contents):
    FullDiskFile.writes += 1
    if FullDiskFile.writes == FullDiskFile.first:
      return super().write(contents[:10])
    if FullDiskFile.first < FullDiskFile.writes <= FullDiskFile.last:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return super().write(contents)


def fail_writes(writes: str):
  """Writes to metrics.jsonl fail from number FIRST to LAST (`FIRST-LAST`); all writes of TensorBoard events fail."""
  FullDiskFile.first, FullDiskFile.last = map(int, writes.split("-"))
  opened = writers.Path.open
  writers.Path.open = lambda path, mode="r", *rest, **named: (
    FullDiskFile(path, mode) if (path.name, mode) == ("metrics.jsonl", "ab") else opened(path, mode, *rest, **named)
  )
  record_writer.open = lambda path, mode: io.FileIO("/dev/full", mode)


def test_a_temporarily_full_disk_loses_nothing(uninterrupted_run, tmp_path):
  """Case 17. No row of metrics is lost, and one warning is printed. TensorBoard events are given up."""
  folder, uninterrupted = uninterrupted_run
  run = start(small_config(folder), tmp_path / "run", fault="test_disk_faults:fail_writes=12-14")
  assert run.exit_code() == 0, run.output()
  assert run.output().count("metrics.jsonl cannot be written (No space left on device)") == 1, run.output()
  assert run.output().count("TensorBoard events cannot be written") == 1, run.output()
  assert_same_end(tmp_path / "run", uninterrupted)


def test_a_permanently_full_disk_ends_the_run(uninterrupted_run, tmp_path):
  """Case 17. The run ends before its next checkpoint is saved; the relaunch has the same result."""
  folder, uninterrupted = uninterrupted_run
  run = start(small_config(folder), tmp_path / "run", fault="test_disk_faults:fail_writes=12-999")
  assert run.exit_code() == 2
  assert "metrics.jsonl could not be written until this checkpoint was due (No space left" in run.output()
  assert "Traceback" not in run.output() and saved_steps(tmp_path / "run")[-1] == 10
  assert [row["step"] for row in metrics_rows(tmp_path / "run")] == list(range(1, 12))
  assert (tmp_path / "run" / "metrics.jsonl").read_text().endswith("}\n"), "an incomplete line is left"
  finish(small_config(folder), tmp_path / "run")
  assert_same_end(tmp_path / "run", uninterrupted)


def test_a_removed_run_directory_ends_the_run(uninterrupted_run, tmp_path):
  """Case 17. The next write ends the run. The directory is not created again."""
  folder, _ = uninterrupted_run
  run = start(small_config(folder, steps=4000, checkpoint_every=2000), tmp_path / "run", "--config.data.epochs=1000")
  run.wait_for_step(12)
  shutil.rmtree(tmp_path / "run")
  assert run.exit_code() == 2
  (error,) = run.errors()
  assert error.startswith(f"error: {tmp_path / 'run'}/metrics.jsonl was removed, moved or replaced")
  assert "Traceback" not in run.output() and not (tmp_path / "run" / "metrics.jsonl").exists()
