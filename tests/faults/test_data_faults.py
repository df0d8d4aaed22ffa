"""Training data that become unreadable, or are changed."""

import errno
import os
import signal
import threading
import time

import datasets
import pytest
from hurt_runs import assert_same_end, finish, finish_pair, saved_steps, small, start, start_pair
from tiny import sentences, write_lines

from experiments.common.distributed import FAREWELL
from switchlora_jax.data import packing
from switchlora_jax.data.loader import SequenceStream
from switchlora_jax.data.shards import PackedSequences
from switchlora_jax.errors import HUNG
from switchlora_jax.parallel.supervision import GRACE
from switchlora_jax.runs.checkpoint import Checkpoints


@pytest.mark.parametrize("left", [0.5, 0], ids=["cut", "emptied"])
def test_a_shard_that_is_cut_under_the_run(whole, tmp_path, left):
  """Case 15. One sentence names the file; with the rows as they were, the relaunch ends as the uninterrupted run.

  With others it does not begin. (A removed file stays open, and its run goes on: tests/data/test_shards.py.)
  """
  folder, uninterrupted = whole
  config, workdir = small(folder, data__cache_dir=str(tmp_path / "cache")), tmp_path / "run"
  run = start(config, workdir)
  run.until(12)
  (shard,) = (tmp_path / "cache").glob("text-*/train-*.npy")
  rows = shard.read_bytes()
  os.truncate(shard, int(left * len(rows)))
  assert run.end() == 2
  assert_sentence(run, f"{shard} must have {len(rows):,} bytes; it was cut to")

  for others in (b"", rows[:-1] + bytes([rows[-1] ^ 1])):
    shard.write_bytes(others)
    run = start(config, workdir)
    assert run.end() == 2
    assert_sentence(run, f"{shard} must have the SHA-256")

  shard.write_bytes(rows)
  finish(config, workdir)
  assert_same_end(workdir, uninterrupted)


def block(step: str):
  """The reader never comes back with the batch of a step."""
  read, batches = PackedSequences.__getitem__, []

  def reading(self, which):
    batches.extend([which] if getattr(which, "shape", None) == (8,) else [])
    if len(batches) > int(step):
      threading.Event().wait()
    return read(self, which)

  PackedSequences.__getitem__ = reading


def fail(step: str):
  """The reader raises what a network drive does, once it is to read the batch of a step."""
  read, batches = PackedSequences.__getitem__, []

  def reading(self, which):
    batches.extend([which] if getattr(which, "shape", None) == (4,) else [])  # a process reads its half
    if len(batches) > int(step):
      raise OSError(errno.EIO, os.strerror(errno.EIO), "train-00000.npy")
    return read(self, which)

  PackedSequences.__getitem__ = reading


@pytest.mark.parametrize("victim", [0, 1])
def test_a_reader_that_raises(whole_pair, tmp_path, victim):
  """Case 15. To one of two: both end within seconds, by a sentence; the relaunch ends as the uninterrupted run."""
  folder, uninterrupted = whole_pair
  faults = ["test_data_faults:fail=12" if process == victim else None for process in (0, 1)]
  pair = start_pair(small(folder), tmp_path / "run", faults=faults)
  pair[0].until(11)
  began = time.monotonic()
  assert [run.end() for run in pair] == [2 if process == victim else HUNG for process in (0, 1)]
  assert time.monotonic() - began < FAREWELL + 2 * GRACE, "as long as that takes without JAX's farewell"
  assert_sentence(pair[1 - victim], f"process {victim} has failed (OSError: [Errno 5] Input/output error: 'train-0")
  assert_sentence(pair[victim], "'train-00000.npy' could not be used: Input/output error")
  finish_pair(small(folder), tmp_path / "run")
  assert_same_end(tmp_path / "run", uninterrupted)


def fail_while_saving(step: str):
  """The same, and the save in flight takes longer than the others wait."""
  fail(step)
  end = Checkpoints.__exit__
  Checkpoints.__exit__ = lambda self, *error: (time.sleep(8 * GRACE), end(self, *error))


def test_a_reader_that_raises_while_a_save_is_in_flight(whole, tmp_path):
  """Case 15. The others do not wait for it, and what failed is said all the same."""
  pair = start_pair(small(whole[0]), tmp_path / "run", faults=(None, "test_data_faults:fail_while_saving=12"))
  assert [run.end() for run in pair] == [HUNG, -signal.SIGABRT], [run.said() for run in pair]
  why = "OSError: [Errno 5] Input/output error: 'train-00000.npy'"
  assert f"{why}\nthis process ends after a save in progress, the others in {GRACE:g} s" in pair[1].said()
  assert_sentence(pair[0], f"process 1 has failed ({why}), see its output")


TEXTS = {"train.jsonl": (0, 600), "valid.jsonl": (600, 700)}


def unreadable(step: str):
  """The user's text cannot be read further from the batch of a step on."""
  packing.GROUP, asked = 2000, [0]  # characters that are read ahead
  batch, read = SequenceStream.batch, datasets.IterableDataset.iter

  def batch_of(self, now, size):
    asked.append(now)
    return batch(self, now, size)

  def reading(self, **options):
    for lines in read(self, **options):
      if max(asked) >= int(step):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
      yield lines

  SequenceStream.batch, datasets.IterableDataset.iter = batch_of, reading


def test_text_that_cannot_be_read_further(whole, tmp_path):
  """Case 15. Of a run that reads its text as it goes: a sentence names the file; the relaunch ends as without it."""
  train, valid = (write_lines(tmp_path / name, sentences(*lines)) for name, lines in TEXTS.items())
  config = small(tmp_path, data__source="stream", data__path=str(train), data__eval_path=str(valid))
  config.data.tokenizer = str(whole[1] / "tokenizer.model")
  finish(config, tmp_path / "whole")
  run = start(config, tmp_path / "run", fault="test_data_faults:unreadable=8")
  assert run.end() == 2
  assert_sentence(run, f"{train} could not be read (Input/output error); check the disk or the network drive")
  assert saved_steps(tmp_path / "run"), "it ended before anything was saved"
  finish(config, tmp_path / "run")
  assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_a_reader_that_blocks(whole, tmp_path):
  """Case 15. The run ends by itself; the relaunch ends as the uninterrupted run."""
  folder, uninterrupted = whole
  run = start(small(folder), tmp_path / "run", "--config.hang_seconds=45", fault="test_data_faults:block=12")
  assert run.end() == HUNG
  assert "Traceback" not in run.said() and "at: step 13, reading its batch; no progress for 45 s" in run.said()
  finish(small(folder), tmp_path / "run")
  assert_same_end(tmp_path / "run", uninterrupted)


def assert_sentence(run, sentence: str):
  """It ended with one error, which says so."""
  (error,) = run.errors()
  assert sentence in error and "Traceback" not in run.said(), run.said()
