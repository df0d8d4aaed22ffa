"""Training rows that cannot be read any more, or are others."""

import os
import threading

import pytest
from hurt_runs import assert_same_end, finish, small, start

from configs import base
from switchlora_jax.rows import Rows


def test_a_shard_that_is_cut_under_the_run(whole, tmp_path):
  """Case 15. One sentence names the file; with the rows as they were, the relaunch ends as the uninterrupted run.

  With others it does not begin. (A file that is removed stays open, and its run goes on: tests/test_rows.py.)
  """
  folder, uninterrupted = whole
  config, workdir = small(folder, data__cache_dir=str(tmp_path / "cache")), tmp_path / "run"
  run = start(config, workdir)
  run.until(12)
  (shard,) = (tmp_path / "cache").glob("text-*/train-*.npy")
  rows = shard.read_bytes()
  os.truncate(shard, len(rows) // 2)
  assert run.end() == 2
  assert_sentence(run, f"{shard} must have {len(rows):,} bytes; it was cut to")

  shard.write_bytes(rows[:-1] + bytes([rows[-1] ^ 1]))
  run = start(config, workdir)
  assert run.end() == 2
  assert_sentence(run, f"{shard} must have the SHA-256")

  shard.write_bytes(rows)
  finish(config, workdir)
  assert_same_end(workdir, uninterrupted)


def block(step: str):
  """The reader never comes back with the batch of a step."""
  read, batches = Rows.__getitem__, []

  def reading(self, which):
    batches.extend([which] if getattr(which, "shape", None) == (8,) else [])
    if len(batches) > int(step):
      threading.Event().wait()
    return read(self, which)

  Rows.__getitem__ = reading


@pytest.mark.skipif("hang_seconds" not in base.get_config(), reason="nothing watches for hangs")
def test_a_reader_that_blocks(whole, tmp_path):
  """Case 15. The run ends by itself; the relaunch ends as the uninterrupted run."""
  folder, uninterrupted = whole
  run = start(small(folder), tmp_path / "run", "--config.hang_seconds=45", fault="test_data_faults:block=12")
  assert run.end() > 0
  assert "Traceback" not in run.said() and "hang_seconds" in run.said(), run.said()
  finish(small(folder), tmp_path / "run")
  assert_same_end(tmp_path / "run", uninterrupted)


def assert_sentence(run, sentence: str):
  """It ended with one error, which says so."""
  (error,) = run.errors()
  assert sentence in error and "Traceback" not in run.said(), run.said()
