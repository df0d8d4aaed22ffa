"""Training data that become unreadable or change."""

import errno
import os
import signal
import threading
import time

import pytest
from fault_runs import assert_same_end, finish, finish_pair, saved_steps, small_config, start, start_pair
from tiny import sentences, write_lines

from experiments.common.distributed import FAREWELL
from switchlora_jax.data import packing, readers
from switchlora_jax.data.loader import SequenceStream
from switchlora_jax.data.shards import PackedSequences
from switchlora_jax.errors import HUNG
from switchlora_jax.parallel.supervision import GRACE
from switchlora_jax.runs.checkpoint import Checkpoints


@pytest.mark.parametrize("left", [0.5, 0], ids=["cut", "emptied"])
def test_a_shard_truncated_during_the_run_ends_it(uninterrupted_run, tmp_path, left):
  """Case 15. The error names the file. A run does not start from a changed shard; from the original one it continues.

  A removed file stays open, and the run continues: see tests/data/test_shards.py.
  """
  folder, uninterrupted = uninterrupted_run
  config, workdir = small_config(folder, data__cache_dir=str(tmp_path / "cache")), tmp_path / "run"
  run = start(config, workdir)
  run.wait_for_step(12)
  (shard,) = (tmp_path / "cache").glob("text-*/train-*.npy")
  rows = shard.read_bytes()
  os.truncate(shard, int(left * len(rows)))
  assert run.exit_code() == 2
  assert_one_error(run, f"{shard} must have {len(rows):,} bytes; it was cut to")

  for others in (b"", rows[:-1] + bytes([rows[-1] ^ 1])):
    shard.write_bytes(others)
    run = start(config, workdir)
    assert run.exit_code() == 2
    assert_one_error(run, f"{shard} must have the SHA-256")

  shard.write_bytes(rows)
  finish(config, workdir)
  assert_same_end(workdir, uninterrupted)


def block_reader(step: str):
  """The reader never returns the batch of a step."""
  read, batches = PackedSequences.__getitem__, []

  def reading(self, which):
    batches.extend([which] if getattr(which, "shape", None) == (8,) else [])
    if len(batches) > int(step):
      threading.Event().wait()
    return read(self, which)

  PackedSequences.__getitem__ = reading


def fail_reader(step: str):
  """The reader raises the error of a network drive at the batch of a step."""
  read, batches = PackedSequences.__getitem__, []

  def reading(self, which):
    batches.extend([which] if getattr(which, "shape", None) == (4,) else [])  # each process reads half a batch
    if len(batches) > int(step):
      raise OSError(errno.EIO, os.strerror(errno.EIO), "train-00000.npy")
    return read(self, which)

  PackedSequences.__getitem__ = reading


@pytest.mark.parametrize("victim", [0, 1])
def test_a_reader_error_ends_both_processes(uninterrupted_pair, tmp_path, victim):
  """Case 15. On one of two processes: both end within seconds with an error; the relaunch has the same result."""
  folder, uninterrupted = uninterrupted_pair
  faults = ["test_data_faults:fail_reader=12" if process == victim else None for process in (0, 1)]
  pair = start_pair(small_config(folder), tmp_path / "run", faults=faults)
  pair[0].wait_for_step(11)
  began = time.monotonic()
  assert [run.exit_code() for run in pair] == [2 if process == victim else HUNG for process in (0, 1)]
  assert time.monotonic() - began < FAREWELL + 2 * GRACE, "the processes ended too late"
  assert_one_error(pair[1 - victim], f"process {victim} has failed (OSError: [Errno 5] Input/output error: 'train-0")
  assert_one_error(pair[victim], "'train-00000.npy' could not be used: Input/output error")
  finish_pair(small_config(folder), tmp_path / "run")
  assert_same_end(tmp_path / "run", uninterrupted)


def fail_reader_during_save(step: str):
  """`fail_reader`, and the save in progress takes longer than the other processes wait."""
  fail_reader(step)
  end = Checkpoints.__exit__
  Checkpoints.__exit__ = lambda self, *error: (time.sleep(8 * GRACE), end(self, *error))


def test_a_reader_error_during_a_save_ends_both_processes(uninterrupted_run, tmp_path):
  """Case 15. The other process does not wait for the save; both print the error."""
  pair = start_pair(
    small_config(uninterrupted_run[0]), tmp_path / "run", faults=(None, "test_data_faults:fail_reader_during_save=12")
  )
  assert [run.exit_code() for run in pair] == [HUNG, -signal.SIGABRT], [run.output() for run in pair]
  why = "OSError: [Errno 5] Input/output error: 'train-00000.npy'"
  assert f"{why}\nthis process ends after a save in progress, the others in {GRACE:g} s" in pair[1].output()
  assert_one_error(pair[0], f"process 1 has failed ({why}), see its output")


TEXTS = {"train.jsonl": (0, 600), "valid.jsonl": (600, 700)}


def fail_text(step: str):
  """Reading the user's text fails from the batch of a step on."""
  packing.GROUP, asked = 2000, [0]  # characters read ahead
  batch, read = SequenceStream.batch, readers._json_row

  def batch_of(self, now, size):
    asked.append(now)
    return batch(self, now, size)

  def reading(*line):
    if max(asked) >= int(step):
      raise OSError(errno.EIO, os.strerror(errno.EIO))
    return read(*line)

  SequenceStream.batch, readers._json_row = batch_of, reading


def test_unreadable_streamed_text_ends_the_run(uninterrupted_run, tmp_path):
  """Case 15. Of a run that streams its text: the error names the file; the relaunch has the same result."""
  train, valid = (write_lines(tmp_path / name, sentences(*lines)) for name, lines in TEXTS.items())
  config = small_config(tmp_path, data__source="stream", data__path=str(train), data__eval_path=str(valid))
  config.data.tokenizer = str(uninterrupted_run[1] / "tokenizer.model")
  finish(config, tmp_path / "whole")
  run = start(config, tmp_path / "run", fault="test_data_faults:fail_text=8")
  assert run.exit_code() == 2
  assert_one_error(run, f"{train} could not be read (Input/output error); check the disk or the network drive")
  assert saved_steps(tmp_path / "run"), "the run ended before its first save"
  finish(config, tmp_path / "run")
  assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_a_blocked_reader_ends_the_run(uninterrupted_run, tmp_path):
  """Case 15. `hang_seconds` ends the run; the relaunch has the same result."""
  folder, uninterrupted = uninterrupted_run
  run = start(
    small_config(folder), tmp_path / "run", "--config.hang_seconds=45", fault="test_data_faults:block_reader=12"
  )
  assert run.exit_code() == HUNG
  assert "Traceback" not in run.output() and "at: step 13, reading its batch; no progress for 45 s" in run.output()
  finish(small_config(folder), tmp_path / "run")
  assert_same_end(tmp_path / "run", uninterrupted)


def assert_one_error(run, message: str):
  """The run printed one error, which contains `message`, and no traceback."""
  (error,) = run.errors()
  assert message in error and "Traceback" not in run.output(), run.output()
