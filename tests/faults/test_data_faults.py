"""Training rows that cannot be read any more, or are others."""

import shutil
import threading

import pytest

from configs import base
from runs import assert_same_end, finish, small, start
from switchlora_jax.rows import Rows


@pytest.fixture
def own_rows(whole, tmp_path):
  """(config, shard): that of the uninterrupted run on a copy of its packed rows, and the file that has these."""
  folder, _ = whole
  shutil.copytree(folder / "cache", tmp_path / "cache")
  (shard,) = (tmp_path / "cache").glob("text-*/train-*.npy")
  return small(folder, data__cache_dir=str(tmp_path / "cache")), shard


def test_a_shard_that_is_cut_under_the_run(whole, own_rows, tmp_path):
  """Case 15. One sentence names the file; with the rows as they were, the relaunch ends as the uninterrupted run.

  With other rows or none it does not begin.
  """
  config, shard = own_rows
  rows, workdir = shard.read_bytes(), tmp_path / "run"
  run = start(config, workdir)
  run.until(12)
  shard.write_bytes(rows[: len(rows) // 2])
  assert run.end() == 2
  assert_sentence(run, f"{shard} must have {len(rows):,} bytes; it was cut to")

  for damaged in (b"", rows[:-1] + bytes([rows[-1] ^ 1])):
    shard.write_bytes(damaged)
    run = start(config, workdir)
    assert run.end() == 2
    assert_sentence(run, f"{shard} must have the SHA-256")

  shard.write_bytes(rows)
  finish(config, workdir)
  assert_same_end(workdir, whole[1])


def test_a_shard_that_is_removed_under_the_run(whole, own_rows, tmp_path):
  """Case 15. The run has the file open, and ends as the uninterrupted one."""
  config, shard = own_rows
  run = start(config, tmp_path / "run")
  run.until(3)
  shard.unlink()
  assert run.end() == 0, run.said()
  assert_same_end(tmp_path / "run", whole[1])


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
  run = start(small(folder), tmp_path / "run", "--config.hang_seconds=20", fault="test_data_faults:block=12")
  assert run.end() > 0
  assert "Traceback" not in run.said() and "hang_seconds" in run.said(), run.said()
  finish(small(folder), tmp_path / "run")
  assert_same_end(tmp_path / "run", uninterrupted)


def assert_sentence(run, sentence: str):
  """It ended with one error, which says so."""
  *_, last = run.said().splitlines()
  assert last.startswith("error: ") and sentence in last and "Traceback" not in run.said(), run.said()
