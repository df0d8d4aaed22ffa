"""A stopped and continued run is bitwise equal to an uninterrupted one. For kills, see faults/test_kills.py."""

import errno
import json
import os
import signal
import threading
import time

import jax
import numpy as np
import poison
import pytest
from stages import slowly
from tiny import resolved, sentences, write_lines

from switchlora_jax.data import loader
from switchlora_jax.errors import RunFailed, Stopped, UserError
from switchlora_jax.parallel.sharding import make_mesh
from switchlora_jax.parallel.supervision import Supervisor
from switchlora_jax.runs.checkpoint import Checkpoints
from switchlora_jax.training import metrics, phases, trainer
from switchlora_jax.training import step as train_step
from switchlora_jax.training.evaluation import validate

pytestmark = [pytest.mark.user_flags, pytest.mark.two_linear_layers]


def lines(workdir):
  """metrics.jsonl without the throughput, which varies."""
  return [{k: v for k, v in row.items() if k not in metrics.TIMED} for row in metrics.read(workdir / "metrics.jsonl")]


def assert_same(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


class CountingWriter(metrics.Writer):
  """Counts the calls of `close`, and the rows that were written before the first one."""

  def __init__(self):
    self.rows, self.closed = 0, 0

  def write(self, rows):
    assert not self.closed
    self.rows += len(rows)

  def close(self):
    self.closed += 1


@pytest.fixture
def counting(monkeypatch):
  """The writers that runs use in addition to the default ones, one per start and per rollback."""
  default, used = trainer.default_writers, []

  def counted(workdir, start):
    used.append(CountingWriter())
    return [*default(workdir, start), used[-1]]

  monkeypatch.setattr(trainer, "default_writers", counted)
  return used


@pytest.fixture(scope="module", params=slowly(["switchlora", "full"], quick=["switchlora"]))
def finished(request, tmp_path_factory):
  """(folder with the text, method, workdir, outcome) of an uninterrupted run of 12 steps."""
  folder = tmp_path_factory.mktemp(request.param)
  outcome = trainer.train(resolved(folder, method=request.param), folder / "uninterrupted")
  return folder, request.param, folder / "uninterrupted", outcome


def test_a_run_writes_its_files_metrics_and_checkpoints(finished):
  _, _, workdir, outcome = finished
  assert {p.name for p in workdir.iterdir()} == {
    ".lock",
    "checkpoints",
    "config.json",
    "metrics.jsonl",
    "tensorboard",
    "tokenizer.model",
  }
  rows = lines(workdir)
  assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))
  assert [row["step"] for row in rows if "val_ppl" in row] == [4, 8, 12]
  assert json.loads((workdir / "config.json").read_text())["config"]["model"]["hidden_size"] == 16
  assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir()) == [4, 8, 12]
  assert int(outcome.state.step) == 12


def test_the_validation_loss_falls(finished):
  rows = [row["val_loss"] for row in lines(finished[2]) if "val_loss" in row]
  assert rows[-1] < rows[0]


@pytest.mark.parametrize("stop", [4, 5, 8, 11])
def test_a_stopped_run_continues_bitwise(finished, stop, monkeypatch):
  """An exception after step `stop` + 1 stops the run like a kill. metrics.jsonl is ahead of the checkpoint.

  One run is traced meanwhile. Its trace is written although the run ends early.
  """
  folder, method, uninterrupted, outcome = finished
  workdir = folder / f"stopped-{stop}"
  config = resolved(folder, method=method, profile_steps=100 * (stop == 4))
  original = metrics.Metrics.add

  class Killed(BaseException):
    pass

  def add(self, step, numbers):
    original(self, step, numbers)
    if step == stop + 1:
      self.flush()
      raise Killed

  with monkeypatch.context() as patch, pytest.raises(Killed):
    patch.setattr(metrics.Metrics, "add", add)
    trainer.train(config, workdir)
  assert len(list(workdir.glob("tensorboard/plugins/profile/*/*.xplane.pb"))) == (stop == 4)
  again = trainer.train(config, workdir)
  assert again.first_step == stop // 4 * 4
  assert lines(workdir) == lines(uninterrupted)
  assert_same(again.state, outcome.state)


def check_continues(config, folder, whole, monkeypatch):
  """A run that stops after step 7 and continues from step 4 is bitwise equal to `whole`, the run in `folder/whole`."""
  add = metrics.Metrics.add
  with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stop"):
    patch.setattr(metrics.Metrics, "add", lambda self, step, row: add(self, step, row) if step < 7 else error("stop"))
    trainer.train(config, folder / "stopped")
  again = trainer.train(config, folder / "stopped")
  assert again.first_step == 4 and lines(folder / "stopped") == lines(folder / "whole")
  assert_same(again.state, whole.state)


@pytest.mark.slow
def test_a_run_with_fresh_candidates_transported_moments_and_chosen_slots_continues_bitwise(tmp_path, monkeypatch):
  chosen = dict(switch__slots="snr", switch__min_age=1, switch__snr_below=2.0)
  often = dict(switch__decay="learning_rate", switch__start=1, switch__state="transport", **chosen)
  config = resolved(tmp_path, **often, switch__candidates="fresh")
  whole = trainer.train(config, tmp_path / "whole")
  assert sum(row.get("switched", 0) for row in lines(tmp_path / "whole")[6:]) > 0, "after the checkpoint as well"
  check_continues(config, tmp_path, whole, monkeypatch)
  with pytest.raises(UserError, match=r"switch\.candidates: 'fresh' → 'stored'"):
    trainer.train(resolved(tmp_path, **often), tmp_path / "whole")


def test_a_run_on_a_mixture_continues_bitwise(tmp_path, monkeypatch):
  """It has the rows of two texts, and evaluates a third; without these settings it is another run."""
  for name in ("old", "held_out"):
    write_lines(tmp_path / f"{name}.jsonl", sentences(0, 60) if name == "old" else sentences(60, 80))
  changes = dict(data__mixture=f"0.25={tmp_path}/old.jsonl", data__eval_also=f"old={tmp_path}/held_out.jsonl")
  config = resolved(tmp_path, **changes)
  whole = trainer.train(config, tmp_path / "whole")
  rows = [row for row in lines(tmp_path / "whole") if "val_loss" in row]
  assert [row["step"] for row in rows] == [4, 8, 12] and all(row["val_loss/old"] != row["val_loss"] for row in rows)
  assert {name for name in rows[0] if name.endswith("/old")} == {
    f"val_{of}{se}/old" for of in ("loss", "ppl", "bpb") for se in ("", "_se")
  }
  (also,) = whole.data.also
  found = validate(whole.phase, whole.state, also.rows[:16], 8, also.bytes_per_token)
  assert found["val_loss"] == rows[-1]["val_loss/old"], "the first 256 tokens"
  check_continues(config, tmp_path, whole, monkeypatch)
  with pytest.raises(UserError, match=r"data\.mixture"):
    trainer.train(resolved(tmp_path), tmp_path / "whole")
  trainer.train(resolved(tmp_path, **changes | dict(data__eval_also="")), tmp_path / "whole")  # nothing is left to do
  (tmp_path / "old.jsonl").rename(tmp_path / "moved.jsonl")
  moved = changes | dict(data__mixture=f"0.25={tmp_path}/moved.jsonl")
  trainer.train(resolved(tmp_path, **moved), tmp_path / "whole")
  write_lines(tmp_path / "held_out.jsonl", sentences(60, 90))
  with pytest.raises(UserError, match=r"eval_also=old is not the one that the run in .* was evaluated on"):
    trainer.train(resolved(tmp_path, **moved), tmp_path / "whole")
  added = dict(data__eval_also=f"longer={tmp_path}/held_out.jsonl")
  trainer.train(resolved(tmp_path, **moved | added), tmp_path / "whole")
  assert json.loads((tmp_path / "whole" / "config.json").read_text())["eval_also"].keys() == {"old", "longer"}


def error(message):
  raise RuntimeError(message)


def test_a_finished_run_is_not_trained_again(finished):
  folder, method, uninterrupted, outcome = finished
  before = (uninterrupted / "metrics.jsonl").read_bytes()
  again = trainer.train(resolved(folder, method=method), uninterrupted)
  assert again.first_step == 12
  assert (uninterrupted / "metrics.jsonl").read_bytes() == before
  assert_same(again.state, outcome.state)


def test_another_config_in_the_workdir_is_refused(finished):
  folder, method, uninterrupted, _ = finished
  with pytest.raises(UserError, match=r"holds a run with another config \(seed: 0 → 1\)"):
    trainer.train(resolved(folder, method=method, seed=1), uninterrupted)


def test_a_run_that_skips_too_many_updates_stops_with_an_error(tmp_path, monkeypatch, counting):
  build = phases.build_phase

  def broken(config, mesh):
    phase = build(config, mesh)

    def create():
      state = phase.create()
      norm = {"scale": state.params["norm"]["scale"] * np.nan}
      return state._replace(params=state.params | {"norm": norm})

    return phase._replace(create=create)

  monkeypatch.setattr(phases, "build_phase", broken)
  with pytest.raises(UserError, match=r"stopped after step 6: 6 updates in a row .* lower --config.learning_rate"):
    trainer.train(resolved(tmp_path, max_skipped=5), tmp_path / "run")
  assert [row["loss"] for row in lines(tmp_path / "run") if "loss" in row] == [None] * 6
  (writer,) = counting
  assert writer.closed == 1 and writer.rows == 7  # 6 steps and an evaluation


def test_writers_are_closed_once_when_a_run_ends(tmp_path, counting):
  trainer.train(resolved(tmp_path), tmp_path / "run")
  assert [writer.closed for writer in counting] == [1]


@pytest.mark.parametrize("error", [KeyboardInterrupt("pressed"), RunFailed("lost"), OSError("full")])
def test_writers_are_closed_once_after_an_exception(tmp_path, monkeypatch, counting, caplog, error):
  """The run raises this exception even if a writer cannot be closed."""

  def fail(self, rows):
    raise error

  def refuse(self):
    self.closed += 1
    raise OSError(errno.EIO, "Input/output error")

  monkeypatch.setattr(CountingWriter, "write", fail)
  monkeypatch.setattr(CountingWriter, "close", refuse)
  with pytest.raises(type(error), match=str(error)):
    trainer.train(resolved(tmp_path), tmp_path / "run")
  assert [writer.closed for writer in counting] == [1]
  assert "the metrics could not be closed: [Errno 5] Input/output error" in caplog.text


@pytest.mark.parametrize("step", [3, 4])
def test_a_signal_during_a_flush_stops_after_that_step(tmp_path, monkeypatch, step):
  """Steps 3 and 4 are logged; step 4 is also saved and evaluated. The next one does not begin."""
  flush, report = metrics.Metrics.flush, []

  def interrupted(self):
    rows = flush(self)
    report.append(rows)
    if rows[-1]["step"] == step:
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(1)  # until it is received
    return rows

  monkeypatch.setattr(metrics.Metrics, "flush", interrupted)
  with pytest.raises(Stopped, match=f"stopped by SIGTERM after step {step}, which is saved"):
    trainer.train(resolved(tmp_path), tmp_path / "run")
  assert max(row["step"] for row in lines(tmp_path / "run")) == step
  assert report[-1][-1]["step"] == step


def test_a_signal_between_flushes_stops_after_that_step_with_its_metrics(tmp_path, monkeypatch):
  """Although no log is due, the step is flushed before it is saved. `should_stop` is called once per step."""
  step, should_stop, calls = trainer.Run.step, Supervisor.should_stop, []

  def interrupted(self):
    step(self)
    if self.done == 2:
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(1)

  monkeypatch.setattr(trainer.Run, "step", interrupted)
  monkeypatch.setattr(Supervisor, "should_stop", lambda self: calls.append(should_stop(self)) or calls[-1])
  with pytest.raises(Stopped, match="stopped by SIGTERM after step 2, which is saved"):
    trainer.train(resolved(tmp_path), tmp_path / "run")
  assert [row["step"] for row in lines(tmp_path / "run")] == [1, 2] and calls == [False, True]


def test_a_save_that_fails_ends_the_run_at_its_next_step(tmp_path, monkeypatch):
  """The error is raised at the next step, not only at the next save four steps later."""
  save = trainer.Run.save

  def full(self):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  def save_and_wait(self):
    save(self)
    for thread in threading.enumerate():
      if thread.name == "async_save":
        thread.join()

  monkeypatch.setattr(Checkpoints, "finish", full)
  monkeypatch.setattr(trainer.Run, "save", save_and_wait)
  config = resolved(tmp_path, log_every=1)
  with pytest.raises(
    UserError, match=r"step 4 could not be saved in .*: No space left on device; there is none before"
  ):
    trainer.train(config, tmp_path / "run")
  assert max(row["step"] for row in lines(tmp_path / "run")) == 4


def test_the_step_compiles_once(tmp_path):
  """With a separate phase: the step returns a state with the layout of its input."""
  config = resolved(tmp_path)
  built = phases.build_phase.__wrapped__(config, make_mesh())
  state = built.create()
  for step in range(3):
    state, _ = built.step(state, built.shard_batch(np.full((8, 16), step)))
  assert built.step._cache_size() == 1


def test_a_run_compiles_its_step_once(finished):
  """All runs of the tests above share one compiled step."""
  assert finished[-1].phase.step._cache_size() == 1


# --- rollbacks after a loss spike ---------------------------------------------------------------------------------

ROLLBACK = dict(spike__window=4, spike__action="rollback", checkpoint_every=12, eval_every=12, log_every=1)


@pytest.fixture
def batch_numbers(monkeypatch):
  """The numbers of the batches that runs read. Batches 5 and 11 cause loss spikes."""
  monkeypatch.setattr(train_step, "mean_loss", poison.loss)
  marked, numbers = poison.make_batch_fn("spike", (5, 11)), []

  def recorded(train, config):
    batch_of = marked(train, config)
    return lambda number: numbers.append(number) or batch_of(number)

  monkeypatch.setattr(loader, "make_batch_fn", recorded)
  return numbers


def test_a_run_without_a_checkpoint_rolls_back_to_the_start(tmp_path, batch_numbers, monkeypatch):
  """Twice: step 5 reads batch 5, then batch 11. The result is that of a run whose data start after both."""
  back = trainer.train(resolved(tmp_path, **ROLLBACK), tmp_path / "back")
  assert batch_numbers == [*range(6), *range(6, 12), *range(12, 24)]
  assert (int(back.state.spikes.rollbacks), int(back.state.spikes.offset)) == (2, 12)
  assert [row["step"] for row in lines(tmp_path / "back") if "loss" in row] == list(range(1, 13))

  make_batch_fn = loader.make_batch_fn

  def later(train, config):
    batch_of = make_batch_fn(train, config)
    return lambda number: batch_of(number + 12)

  monkeypatch.setattr(loader, "make_batch_fn", later)
  behind = trainer.train(resolved(tmp_path, **ROLLBACK), tmp_path / "behind")
  assert int(behind.state.spikes.rollbacks) == 0
  np.testing.assert_array_equal(back.state.spikes.losses, behind.state.spikes.losses)
  assert_same(back.state._replace(spikes=None), behind.state._replace(spikes=None))


@pytest.mark.slow
@pytest.mark.parametrize(
  ("every", "message", "repeated"),
  [(4, "SIGTERM after step 4, which is saved; the same", 2), (12, "SIGTERM before anything was saved; the same", 6)],
)
def test_a_run_stopped_at_a_spike_rolls_back_and_stops(tmp_path, batch_numbers, monkeypatch, every, message, repeated):
  """It does not first repeat the steps up to the spike. The continued run is bitwise equal to an uninterrupted one."""
  config = resolved(tmp_path, **ROLLBACK | dict(checkpoint_every=every))
  uninterrupted = trainer.train(config, tmp_path / "uninterrupted")
  number, step = len(batch_numbers), trainer.Run.step

  def signalled(run):
    if len(batch_numbers) == 5:
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(2)  # until it is received
    step(run)

  batch_numbers.clear()
  with monkeypatch.context() as once, pytest.raises(Stopped, match=message):
    once.setattr(trainer.Run, "step", signalled)
    trainer.train(config, tmp_path / "stopped")
  assert batch_numbers == list(range(6))
  again = trainer.train(config, tmp_path / "stopped")
  assert len(batch_numbers) == number + repeated and lines(tmp_path / "stopped") == lines(tmp_path / "uninterrupted")
  assert_same(again.state, uninterrupted.state)


def test_a_signal_during_the_flush_of_a_spike_rolls_back_and_stops(tmp_path, batch_numbers, monkeypatch):
  """Step 6 has the spike, and the last checkpoint is of step 4. No step is repeated before the run stops."""
  flush = metrics.Metrics.flush

  def interrupted(self):
    rows = flush(self)
    if rows[-1]["step"] == 6:
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(1)
    return rows

  monkeypatch.setattr(metrics.Metrics, "flush", interrupted)
  with pytest.raises(Stopped, match="stopped by SIGTERM after step 4, which is saved"):
    trainer.train(resolved(tmp_path, **ROLLBACK | dict(checkpoint_every=4)), tmp_path / "run")
  assert batch_numbers == list(range(6))


def test_a_run_stopped_by_max_rollbacks_continues_with_a_higher_limit(tmp_path, batch_numbers, counting):
  with pytest.raises(UserError, match=r"stopped at step 6, a loss spike, after 1 rollbacks"):
    trainer.train(resolved(tmp_path, **ROLLBACK, spike__max_rollbacks=1), tmp_path / "run")
  assert batch_numbers == list(range(12)) and [row["spike"] for row in lines(tmp_path / "run") if "loss" in row] == [
    0
  ] * 5 + [1]
  assert [writer.closed for writer in counting] == [1, 1]
  again = trainer.train(resolved(tmp_path, **ROLLBACK), tmp_path / "run")
  assert int(again.state.spikes.offset) == 12


def test_the_rows_must_suffice_for_the_skipped_batches(tmp_path, batch_numbers, monkeypatch):
  """12 steps and 6 skipped batches of 8 rows: 144 rows."""
  prepare = trainer.prepare_data
  few = lambda config, quiet: (data := prepare(config, quiet))._replace(train=data.train[:100])
  monkeypatch.setattr(trainer, "prepare_data", few)
  with pytest.raises(
    UserError, match=r"skips 6 batches .* needs 144 rows; the text has 100 rows .* --config.data.epochs=2"
  ):
    trainer.train(resolved(tmp_path, **ROLLBACK), tmp_path / "run")
  again = trainer.train(resolved(tmp_path, **ROLLBACK, data__epochs=3), tmp_path / "run")
  assert int(again.state.spikes.offset) == 12
