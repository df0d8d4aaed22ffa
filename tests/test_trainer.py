"""A run that is stopped and continued is, bit by bit, the run that was never stopped."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import flags_of, resolved, tiny_config

from switchlora_jax import metrics, program, train_log, trainer
from switchlora_jax.errors import UserError
from switchlora_jax.sharding import make_mesh

ROOT = Path(__file__).parents[1]
compiled_once = functools.cache(program.build)


@pytest.fixture(autouse=True)
def build_once(monkeypatch):
  """Equal configs share their compiled programs, which hold no state; the kill test uses processes of its own."""
  monkeypatch.setattr(program, "build", compiled_once)


def lines(workdir):
  """metrics.jsonl without the one thing that is a matter of time."""
  return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in metrics.read(workdir / "metrics.jsonl")]


def assert_same(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.fixture(scope="module", params=["switchlora", "full"])
def finished(request, tmp_path_factory):
  """(folder with the text, method, workdir, outcome) of an uninterrupted run of 12 steps."""
  folder = tmp_path_factory.mktemp(request.param)
  outcome = trainer.train(resolved(folder, method=request.param), folder / "whole")
  return folder, request.param, folder / "whole", outcome


def test_a_run_leaves_what_it_says(finished):
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


def test_training_learns(finished):
  rows = [row["val_loss"] for row in lines(finished[2]) if "val_loss" in row]
  assert rows[-1] < rows[0]


@pytest.mark.parametrize("stop", [4, 5, 8, 11])
def test_a_stopped_run_continues_bit_by_bit(finished, stop, monkeypatch):
  """Stopped after `stop` steps, on a checkpoint or between two, as by a kill: nothing is flushed or closed."""
  folder, method, whole, outcome = finished
  workdir = folder / f"stopped-{stop}"
  config = resolved(folder, method=method)
  original = train_log.Log.add

  class Killed(BaseException):
    pass

  def add(self, step, numbers):
    original(self, step, numbers)
    if step == stop + 1:
      raise Killed

  with monkeypatch.context() as patch, pytest.raises(Killed):
    patch.setattr(train_log.Log, "add", add)
    trainer.train(config, workdir)
  again = trainer.train(config, workdir)
  assert again.first_step == stop // 4 * 4
  assert lines(workdir) == lines(whole)
  assert_same(again.state, outcome.state)


def test_a_finished_run_is_not_run_again(finished):
  folder, method, whole, outcome = finished
  before = (whole / "metrics.jsonl").read_bytes()
  again = trainer.train(resolved(folder, method=method), whole)
  assert again.first_step == 12
  assert (whole / "metrics.jsonl").read_bytes() == before
  assert_same(again.state, outcome.state)


def test_a_run_killed_by_sigkill_continues_bit_by_bit(tmp_path):
  """Real processes, killed wherever they happen to be, until the run is through."""
  config = tiny_config(tmp_path, steps=60, checkpoint_every=5, eval_every=20)
  command = [sys.executable, "-m", "experiments.pretrain", *flags_of(config)]
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}

  def start(workdir):
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([*command, f"--workdir={workdir}"], cwd=ROOT, env=environment, **quiet)

  whole, killed, kills = tmp_path / "whole", tmp_path / "killed", 0
  first = start(whole)
  assert first.communicate()[1] is not None and first.returncode == 0
  for reach in (13, 34, 52):
    process = start(killed)
    while process.poll() is None and _last_step(killed) < reach:
      time.sleep(0.01)
    kills += process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
  last = start(killed)
  _, error = last.communicate()
  assert last.returncode == 0, error
  assert kills >= 2, "the run was through before it could be killed"
  assert lines(killed) == lines(whole)
  sums = [(d / "checkpoints" / "60" / "checksums" / "metadata").read_text() for d in (whole, killed)]
  assert json.loads(sums[0]) == json.loads(sums[1])


def _last_step(workdir):
  rows = metrics.read(workdir / "metrics.jsonl")
  return rows[-1]["step"] if rows else 0


def test_another_config_in_the_workdir_is_refused(finished):
  folder, method, whole, _ = finished
  with pytest.raises(UserError, match=r"holds a run with another config \(seed: 0 → 1\)"):
    trainer.train(resolved(folder, method=method, seed=1), whole)


def test_a_run_that_goes_nowhere_stops_with_a_sentence(tmp_path, monkeypatch):
  build = program.build

  def broken(config, mesh):
    whole = build(config, mesh)

    def create():
      state = whole.create()
      norm = {"scale": state.params["norm"]["scale"] * np.nan}
      return state._replace(params=state.params | {"norm": norm})

    return whole._replace(create=create)

  monkeypatch.setattr(program, "build", broken)
  with pytest.raises(UserError, match=r"stopped after step 6: 6 updates in a row .* lower --config.learning_rate"):
    trainer.train(resolved(tmp_path, max_skipped=5), tmp_path / "run")
  assert [row["loss"] for row in lines(tmp_path / "run") if "loss" in row] == [None] * 6


def test_the_step_compiles_once(tmp_path):
  config = resolved(tmp_path)
  built = program.build(config, make_mesh())
  state = built.create()
  for step in range(3):
    state, _ = built.step(state, built.place(np.full((8, 16), step)))
  assert built.step._cache_size() == 1
