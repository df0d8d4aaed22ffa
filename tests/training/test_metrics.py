"""Metrics of a run: complete, readable, and without the steps that a continued run repeats."""

import errno
import json
import os
import re
import shutil
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from switchlora_jax.errors import UserError
from switchlora_jax.training import metrics, writers
from switchlora_jax.training.throughput import model_flops
from switchlora_jax.training.writers import JsonLinesWriter, TensorBoardWriter

SIZES = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2)
CONFIG = dict(steps=4, batch_size=2, seq_len=8, model=SIZES)


def test_lines_are_json_and_values_that_are_not_finite_are_null(tmp_path):
  log = JsonLinesWriter(tmp_path, start=0)
  log.write([{"step": 1, "loss": 2.5}, {"step": 2, "loss": float("nan")}])
  log.close()
  rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert rows == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": None}]


def test_continuing_drops_later_and_incomplete_lines(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
  log = JsonLinesWriter(tmp_path, start=1)
  log.write([{"step": 2, "loss": 4.0}])
  log.close()
  assert [row["loss"] for row in metrics.read(tmp_path / "metrics.jsonl")] == [1.0, 4.0]


@pytest.mark.parametrize(
  "damaged", [b'{"step": 2, "loss": \xff}', b'{"loss": 2.0}', b'{"step": "2"}', b"2", b'{"step": 2,, }']
)
def test_a_damaged_line_is_reported_and_left_out(tmp_path, caplog, damaged):
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(b'{"step": 1, "loss": 1.0}\n' + damaged + b'\n{"step": 3, "loss": 3.0}\n')
  JsonLinesWriter(tmp_path, start=3).close()
  assert "metrics.jsonl: 1 damaged lines are left out" in caplog.text
  assert [row["loss"] for row in metrics.read(path)] == [1.0, 3.0]


def test_tensorboard_has_the_numbers(tmp_path):
  log = TensorBoardWriter(tmp_path / "tensorboard", start=0)
  log.write([{"step": 1, "loss": 2.5}, {"step": 2, "nothing": float("nan")}])
  log.close()
  (events,) = (tmp_path / "tensorboard").iterdir()
  assert b"loss" in events.read_bytes() and b"nothing" not in events.read_bytes()


# --- disk errors -------------------------------------------------------------------------------------------------


class Full:
  """A file that accepts some bytes once, and then none until `room` is set."""

  def __init__(self, file):
    self.file, self.room = file, False

  def write(self, contents):
    if not self.room and len(contents) <= 7:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return self.file.write(contents if self.room else contents[:-7])

  def __getattr__(self, name):
    return getattr(self.file, name)


def test_lines_are_kept_in_memory_while_the_disk_is_full(tmp_path, caplog):
  """No line is lost, duplicated or incomplete. A checkpoint raises an error meanwhile."""
  log = JsonLinesWriter(tmp_path, start=0)
  log.write([{"step": 1, "loss": 1.0}])
  log._file = Full(log._file)
  for step in (2, 3):
    log.write([{"step": step, "loss": float(step)}])
    assert log.path.read_text().splitlines() == ['{"step": 1, "loss": 1.0}']
  assert [record.getMessage() for record in caplog.records] == [
    f"{log.path} cannot be written (No space left on device); its lines are kept until the next checkpoint"
  ]
  with pytest.raises(UserError, match=r"metrics.jsonl could not be written until this checkpoint was due \(No space"):
    log.sync()
  log._file.room = True
  log.sync()
  log.write([{"step": 4, "loss": 4.0}])
  assert metrics.read(log.path) == [{"step": step, "loss": float(step)} for step in range(1, 5)]
  log.close()


def test_a_checkpoint_syncs_the_lines_before_it_to_disk(tmp_path, monkeypatch):
  log, synced = JsonLinesWriter(tmp_path, start=0), []
  log.write([{"step": 1}])
  monkeypatch.setattr(os, "fsync", lambda number: synced.append((os.fstat(number), log.path.read_text())))
  log.sync()
  ((file, contents),) = synced
  assert os.path.samestat(file, log.path.stat()) and contents == '{"step": 1}\n'
  log.close()


@pytest.mark.parametrize("action", ["remove", "replace", "move"])
def test_a_directory_that_is_removed_or_moved_raises_a_clear_error(tmp_path, action):
  (tmp_path / "run").mkdir()
  log = JsonLinesWriter(tmp_path / "run", start=0)
  log.write([{"step": 1}])
  if action == "move":
    (tmp_path / "run").rename(tmp_path / "moved")
  else:
    shutil.rmtree(tmp_path / "run")
  if action == "replace":
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
  for call in (log.sync, lambda: log.write([{"step": 2}])):
    with pytest.raises(
      UserError, match=r"run/metrics.jsonl was removed, moved or replaced while the run wrote it; put"
    ):
      call()
  log.close()


def test_tensorboard_that_cannot_be_written_gives_one_warning(tmp_path, caplog, monkeypatch):
  """`tensorboardX.SummaryWriter` would block at the eleventh value. metrics.jsonl is complete."""
  log = writers.default_writers(tmp_path, 0)

  def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(writers.EventsWriter, "write_event", full)
  for step in range(1, 30):
    for writer in log:
      writer.write([{"step": step, "loss": 1.0}])
  for writer in log:
    writer.close()
  assert [record.getMessage() for record in caplog.records] == [
    "TensorBoard events cannot be written ([Errno 28] No space left on device); the run continues without it"
  ]
  assert len(metrics.read(tmp_path / "metrics.jsonl")) == 29


def test_tensorboard_hides_the_steps_that_are_repeated(tmp_path):
  board = TensorBoardWriter(tmp_path / "tensorboard", start=4)
  board.close()
  (events,) = (tmp_path / "tensorboard").iterdir()
  (_, *marks) = [writers.Event.FromString(record) for record in records(events.read_bytes())]
  assert [mark.step for mark in marks] == [5, 5] and marks[1].session_log.status == writers.SessionLog.START


def records(contents: bytes) -> list[bytes]:
  """The records of an event file. Layout: length (8 bytes), checksum (4), record, checksum (4)."""
  found = []
  while contents:
    length = int.from_bytes(contents[:8], "little")
    found.append(contents[12 : 12 + length])
    contents = contents[16 + length :]
  return found


# --- several writers ----------------------------------------------------------------------------------------------


class ListWriter(metrics.Writer):
  """A toy writer: keeps rows in memory."""

  def __init__(self):
    self.rows, self.calls = [], []

  def write(self, rows):
    self.rows += rows

  def sync(self):
    self.calls.append("sync")

  def close(self):
    self.calls.append("close")


def test_all_writers_are_closed_once_if_one_cannot_be_closed(monkeypatch):
  toys = [ListWriter(), ListWriter(), ListWriter()]

  def refuse():
    toys[1].calls.append("close")
    raise OSError("refused")

  monkeypatch.setattr(toys[1], "close", refuse)
  log = metrics.Metrics(ConfigDict(CONFIG), 0, toys)
  with pytest.raises(OSError, match="refused"):
    log.close()
  log.close()
  assert [toy.calls for toy in toys] == [["close"]] * 3 and log._bar.disable


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_is_shown_unless_quiet(capsys, quiet):
  log = metrics.Metrics(ConfigDict(CONFIG | dict(steps=40)), 0, quiet=quiet)
  for step in range(1, 41):
    log.add(step, {"loss": jnp.float32(4 / step), "skipped": jnp.int32(step > 30)})
    log.flush()
    if step % 20 == 0:
      log.print_progress()
  log.write_evaluation(40, {"val_loss": 1.5, "val_ppl": 4.5, "val_ppl/old": 7.125})
  log.close()
  out, err = capsys.readouterr()
  if quiet:
    assert out == err == ""
  else:
    assert [line.split(",")[0] for line in err.splitlines()] == ["train: 20 of 40", "train: 40 of 40"]
    assert re.search(r", loss=0.200, tokens/s=[\d,]+\n", err) and re.search(r", skipped=1\n$", err)
    assert out == "step 40: validation perplexity 4.50; old 7.12\n" and "\r" not in err


def test_every_writer_gets_all_rows():
  toys = [ListWriter(), ListWriter()]
  log = metrics.Metrics(ConfigDict(CONFIG), 0, toys)
  for step in (1, 2):
    log.add(step, {"loss": jnp.float32(step / 2), "skipped": jnp.int32(0)})
  assert toys[0].rows == []
  found = log.flush()
  assert found == [{"step": 1, "loss": 0.5, "skipped": 0}, {"step": 2, "loss": 1.0, "skipped": 0}] and log.flush() == []
  log.write_evaluation(2, {"val_loss": 1.5, "val_ppl": 4.5})
  log.sync()
  log.close()
  for toy in toys:
    *steps, evaluation = toy.rows
    assert [{k: v for k, v in row.items() if k not in metrics.TIMED} for row in steps] == found
    assert all(row["tokens_per_second"] > 0 for row in steps)
    assert evaluation == {"step": 2, "val_loss": 1.5, "val_ppl": 4.5} and toy.calls == ["sync", "close"]


def test_padding_counts_neither_for_speed_nor_for_utilisation(monkeypatch):
  """Two steps of 16 ids take 3 seconds. They have 10 and 3 tokens."""
  clock = iter(range(100, 1000, 3))
  monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: next(clock)))
  log = metrics.Metrics(ConfigDict(CONFIG), 0, [toy := ListWriter()], quiet=True, peak_flops=1e6)
  for step, tokens in ((1, 10), (2, 3)):
    log.add(step, {"loss": jnp.float32(1), "skipped": jnp.int32(0), "tokens": jnp.int32(tokens)})
  log.flush()
  for row in toy.rows:
    assert row["tokens_per_second"] == round(13 / 3, 1)
    assert row["mfu"] == round(13 / 16 * model_flops(SIZES, 2, 8) / 3 / 1e6, 4)
  log.close()


@pytest.mark.parametrize("peak", [None, 1e6])
def test_a_row_has_speed_utilisation_wait_and_memory(monkeypatch, peak):
  clock = iter(range(100, 1000))
  # A second passes between two calls.
  monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: next(clock)))
  toy = ListWriter()
  log = metrics.Metrics(ConfigDict(CONFIG), 0, [toy], quiet=True, peak_flops=peak)  # 100
  for step in (1, 2):
    with log.reading_batch():  # a second each, from 101 to 102, and from 103 to 104
      pass
    log.add(step, {"loss": jnp.float32(1), "skipped": jnp.int32(0)})
  log.flush()  # 105
  log.add(3, {"loss": jnp.float32(1), "skipped": jnp.int32(0)})
  log.flush()
  (row, _, last), flops = toy.rows, 2 * model_flops(SIZES, 2, 8) / 5
  assert row["tokens_per_second"] == round(2 * 2 * 8 / 5, 1) and row["data_wait_share"] == 0.4
  assert row["model_tflops_per_second"] == float(f"{flops / 1e12:.4g}") and row["peak_memory_bytes"] > 1e7
  assert row.get("mfu") == (round(flops / 1e6, 4) if peak else None)
  assert last["data_wait_share"] == 0
  assert {*row} - {"step", "loss", "skipped"} <= {*metrics.TIMED}
  log.close()
