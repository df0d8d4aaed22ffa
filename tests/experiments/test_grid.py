"""A grid of runs: its cells, what is run and what is not run again, and what is said when something is wrong.

Processes are replaced by `grids.Runs` here; those of tests/test_compare.py are real.
"""

import re
import sys
import time
from pathlib import Path
from queue import Queue

import pytest
from grids import fake_runs, tiny_base
from paths import ROOT

from experiments.common import grid, settings
from experiments.common.grid import Arm
from switchlora_jax.config import resolve
from switchlora_jax.errors import UserError

FULL = Arm("full", {"method": "full"})
LORA = Arm("lora, rank 4", {"method": "lora"}, (1e-3, 1e-2, 1e-1))


@pytest.fixture
def runs(monkeypatch):
  return fake_runs(monkeypatch)


def run(base, arms, folder, **options):
  return grid.run_grid(base, arms, **{"seeds": 1, "workdir": folder, "processes": 2, "read_at": 1.0} | options)


def test_a_cell_is_resolved_for_the_platform_it_will_run_on(tmp_path, monkeypatch):
  """Else a finished run, whose own config says bfloat16, would be taken for another."""
  base, arm = tiny_base(tmp_path), grid.Arm("lora", {"method": "lora"})
  for platform, dtype in (("cpu", "float32"), ("gpu", "bfloat16")):
    monkeypatch.setattr(grid, "platform", lambda platform=platform: platform)
    assert grid.make_cell(base, arm, None, 0).config.dtype == dtype


def test_the_cells_of_a_sweep_and_their_names(tmp_path):
  base = tiny_base(tmp_path, seed=7)
  before = base.config.to_dict()
  cells = grid.sweep_cells(base, (LORA, FULL))
  names = [*(f"lora-rank-4_lr={rate}_seed=7" for rate in ("0.001", "0.01", "0.1")), "full_lr=0.001_seed=7"]
  assert [cell.name for cell in cells] == names
  assert [cell.config.learning_rate for cell in cells] == [1e-3, 1e-2, 1e-1, 1e-3]  # each from the base, not the last
  assert [cell.config.method for cell in cells] == ["lora", "lora", "lora", "full"]
  assert base.config.to_dict() == before


@pytest.mark.parametrize("label", ["N = 5", "350M, galore, rank 32, length 512", "a/b\\c: *?", "../up", "…", "-x", "é"])
def test_names_are_safe_in_a_file_system(tmp_path, label):
  name = grid.make_cell(tiny_base(tmp_path), Arm(label, {}), 5e-4, 3).name
  assert re.fullmatch(r"[\w.=-]*_lr=0\.0005_seed=3", name) and not name.startswith("-")
  assert Path(name).name == name


def test_labels_that_name_the_same_directory_are_refused(tmp_path):
  with pytest.raises(UserError, match=r"cells twice \(a-b_lr=0\.02_seed=0\); give every value once"):
    grid.sweep_cells(tiny_base(tmp_path), (Arm("a b", {}), Arm("a-b", {"rank": 6})))
  with pytest.raises(UserError, match="cells twice"):
    grid.sweep_cells(tiny_base(tmp_path), (Arm("a", {}, (1e-2, 2e-2, 0.01)),))


def test_the_sweep_runs_first_and_then_the_other_seeds_at_the_best(tmp_path, runs):
  runs.losses = {"lora-rank-4_lr=0.01_seed=0": 2.0}
  runs.losses |= {f"lora-rank-4_lr=0.01_seed={seed}": 9.0 for seed in (1, 2)}  # a bad seed does not change the choice
  ran = run(tiny_base(tmp_path), (FULL, LORA), tmp_path, seeds=3)
  sweep = {"full_lr=0.001_seed=0", *(f"lora-rank-4_lr={rate}_seed=0" for rate in ("0.001", "0.01", "0.1"))}
  seeds = {f"{arm}_seed={seed}" for arm in ("full_lr=0.001", "lora-rank-4_lr=0.01") for seed in (1, 2)}
  assert set(runs.started[:4]) == sweep and set(runs.started[4:]) == seeds and len(runs.started) == 8
  assert {r.cell.name for r in ran} == sweep | seeds and all(r.failure is None for r in ran)
  assert grid.best_of(LORA, ran, 1.0) == 1e-2
  assert {r.cell.config.seed for r in ran} == {0, 1, 2}


def test_finished_cells_are_not_run_again(tmp_path, runs):
  base = tiny_base(tmp_path)
  first = run(base, (FULL, LORA), tmp_path)
  runs.started.clear()
  assert run(base, (FULL, LORA), tmp_path) == first
  assert runs.started == []
  run(base, (FULL, LORA), tmp_path, seeds=2)
  assert {name[-1] for name in runs.started} == {"1"} and len(runs.started) == 2


@pytest.mark.parametrize(
  ("changes", "sentence"),
  [
    (dict(rank=6), r"cells/full_lr=0\.001_seed=0 holds a run with another config \(rank: 4 → 6\)"),
    (dict(steps=24), r"\(steps: 12 → 24\); choose a new --workdir"),  # extended, it would have had two horizons
    (dict(switch__interval=4), r"switch\.interval: 2 → 4"),
  ],
)
def test_a_changed_config_is_neither_taken_for_finished_nor_run_over_the_old(tmp_path, runs, changes, sentence):
  run(tiny_base(tmp_path), (FULL, LORA), tmp_path)
  runs.started.clear()
  base = tiny_base(tmp_path, **changes)
  cell = grid.sweep_cells(base, (FULL,))[0]
  assert not grid.finished(tmp_path / "cells" / cell.name, cell.config)
  with pytest.raises(UserError, match=sentence):
    run(base, (FULL, LORA), tmp_path)
  assert runs.started == []


def test_finished_cells_of_another_text_are_not_taken_for_these(tmp_path, runs):
  """The files behind a glob may have changed; beside such cells, new ones would be trained on other text."""
  run(tiny_base(tmp_path), (FULL,), tmp_path)
  runs.started.clear()
  runs.text = "def"
  with pytest.raises(UserError, match=r"cells/full_lr=0\.001_seed=0 was started on \(fingerprint def, then abc\)"):
    run(tiny_base(tmp_path), (FULL, LORA), tmp_path)
  assert runs.started == []


def test_what_changes_no_number_may_change(tmp_path, runs):
  run(tiny_base(tmp_path), (FULL,), tmp_path)
  runs.started.clear()
  run(tiny_base(tmp_path, eval_every=6, checkpoint_every=2), (FULL,), tmp_path)
  assert runs.started == []


def test_a_finished_run_that_was_not_evaluated_where_it_is_read_is_a_sentence(tmp_path, runs):
  run(tiny_base(tmp_path, eval_every=5), (FULL,), tmp_path)
  with pytest.raises(UserError, match=r"full_lr=0\.001_seed=0 was not evaluated at step 6; delete it"):
    run(tiny_base(tmp_path, eval_every=6), (FULL,), tmp_path, read_at=0.5)


def test_a_failed_cell_stops_no_other_and_is_named_with_the_last_line_of_its_log(tmp_path, runs, capsys):
  runs.broken = {"lora-rank-4_lr=0.001_seed=0"}
  runs.losses = {"lora-rank-4_lr=0.1": 2.0}
  ran = run(tiny_base(tmp_path), (LORA, FULL), tmp_path, processes=1, seeds=2)
  failed = [r for r in ran if r.failure]
  log = tmp_path / "cells" / "lora-rank-4_lr=0.001_seed=0.log"
  assert [r.cell.name for r in failed] == ["lora-rank-4_lr=0.001_seed=0"] and len(ran) == 6
  assert failed[0].failure == f"failed with exit code 2: error: what went wrong (see {log})"
  assert f"lora-rank-4_lr=0.001_seed=0: {failed[0].failure}\n" in capsys.readouterr().out
  assert grid.best_of(LORA, ran, 1.0) == 0.1
  runs.started.clear()
  run(tiny_base(tmp_path), (LORA, FULL), tmp_path, seeds=2)
  assert runs.started == ["lora-rank-4_lr=0.001_seed=0"]  # the same command tries it again


def test_an_exception_in_one_cell_takes_no_share_from_the_others(tmp_path, runs, monkeypatch):
  """Else they would wait for it for ever."""
  queues = []

  def refuse(*_):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr(grid, "SimpleQueue", lambda: queues.append(Queue()) or queues[0])
  monkeypatch.setattr(grid, "run_cell", refuse)
  with pytest.raises(PermissionError):
    run(tiny_base(tmp_path), (FULL,), tmp_path, processes=2)
  assert queues[0].qsize() == 2


def test_a_folder_that_cannot_be_made_is_a_sentence_before_anything_is_prepared(tmp_path, runs, monkeypatch):
  monkeypatch.setattr(grid, "prepare_data", None)
  (tmp_path / "file").touch()
  with pytest.raises(UserError, match="cannot be made"):
    run(tiny_base(tmp_path), (FULL,), tmp_path / "file")


def test_ctrl_c_starts_no_run_that_still_waits(tmp_path, runs, monkeypatch):
  def stop_at_the_first(base, cell, folder, share, _):
    runs.started.append(cell.name)
    if len(runs.started) == 1:
      raise KeyboardInterrupt
    time.sleep(0.3)  # the worker may have taken one more before the others were called off
    return grid.Ran(cell, folder, "stopped")

  monkeypatch.setattr(grid, "run_cell", stop_at_the_first)
  with pytest.raises(KeyboardInterrupt):
    run(tiny_base(tmp_path), (LORA, FULL), tmp_path, processes=1)
  assert len(runs.started) <= 2


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), 800.0])  # of the last no finite perplexity exists
def test_what_diverged_is_never_best(tmp_path, runs, loss, capsys):
  runs.losses = {"lora-rank-4_lr=0.001": loss, "lora-rank-4_lr=0.01": 8.0, "lora-rank-4_lr=0.1": 9.0}
  ran = run(tiny_base(tmp_path), (LORA,), tmp_path)
  assert "lora-rank-4_lr=0.001_seed=0: diverged\n" in capsys.readouterr().out
  assert grid.read_loss(ran[0], 1.0) == float("inf") and grid.best_of(LORA, ran, 1.0) == 1e-2


def test_where_all_diverged_or_failed_there_is_no_best_and_no_other_seed(tmp_path, runs):
  runs.losses, runs.broken = {"lora": float("nan")}, {"lora-rank-4_lr=0.1_seed=0"}
  ran = run(tiny_base(tmp_path), (LORA, FULL), tmp_path, seeds=2)
  assert grid.best_of(LORA, ran, 1.0) is None
  assert [r.cell.name for r in ran if r.cell.seed == 1] == ["full_lr=0.001_seed=1"]


NONSENSE = {
  "missing key": ({"rnk": 4}, r"unknown config key 'rnk'; every key stands in configs/base\.py"),
  "missing nested key": ({"switch.intervl": 4}, r"unknown config key 'switch\.intervl'"),
  "key below a number": ({"rank.x": 4}, r"unknown config key 'rank\.x'"),
  "wrong type": ({"rank": "four"}, r"rank \(='four'\) has the wrong type"),
  "a number for a section": ({"switch": 4}, r"switch \(=4\) has the wrong type"),
  "nonsense": ({"batch_size": -8}, r"batch_size \(=-8\) must be greater than 0"),
  "nonsense together": ({"rank": 16}, r"rank \(=16\) leaves no spare vectors"),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_a_sentence_before_the_first_cell(tmp_path, runs, name):
  changes, sentence = NONSENSE[name]
  with pytest.raises(UserError, match=sentence):
    run(tiny_base(tmp_path), (FULL, Arm("second", changes)), tmp_path)
  assert runs.started == [] and not (tmp_path / "cells").exists()


def test_a_bad_learning_rate_and_a_read_step_are_sentences_before_the_first_cell(tmp_path, runs):
  for rate, must in ((-1e-3, "be greater than 0"), (float("nan"), "be a finite number")):
    with pytest.raises(UserError, match=rf"learning_rate \(={rate}\) must {must}"):
      run(tiny_base(tmp_path), (FULL, LORA._replace(learning_rates=(1e-3, rate))), tmp_path)
  with pytest.raises(UserError, match="read at step 6"):
    run(tiny_base(tmp_path), (FULL,), tmp_path, read_at=0.5)
  assert runs.started == []


def test_the_step_at_which_a_loss_is_read(tmp_path):
  config = resolve(tiny_base(tmp_path, steps=100, eval_every=15).config, 1)
  assert [grid.read_step(config, at) for at in (1.0, 0.3, 0.75)] == [100, 30, 75]
  with pytest.raises(UserError) as caught:
    grid.read_step(config, 0.95)
  assert str(caught.value) == (
    "the validation loss is read at step 95 (0.95 of 100), where eval_every (=15) does not evaluate; "
    "set --config.eval_every to a divisor of 95"
  )


def test_a_loss_is_read_at_its_step(tmp_path, runs):
  (ran,) = run(tiny_base(tmp_path), (FULL,), tmp_path)
  assert [grid.read_loss(ran, at) for at in (1 / 3, 2 / 3, 1.0)] == pytest.approx([3.2, 3.1, 3.0])


def test_the_command_line_of_a_cell(tmp_path):
  base = settings.base_from_file("llama_tiny", {"steps": 700, "rank": 16, "learning_rate": 0.5, "data.path": "a b/*"})
  cell = grid.make_cell(base, Arm("lora", {"method": "lora", "rank": 8}), 1e-3, 2)
  assert grid.command(base, cell, tmp_path / "run") == [
    sys.executable,
    "-m",
    "experiments.pretrain",
    f"--config={ROOT}/configs/llama_tiny.py",
    "--config.steps=700",
    "--config.rank=8",
    "--config.learning_rate=0.001",
    "--config.data.path=a b/*",
    "--config.method=lora",
    "--config.seed=2",
    f"--workdir={tmp_path}/run",
  ]


def test_text_is_tokenised_once_before_the_runs(tmp_path):
  cells = grid.sweep_cells(tiny_base(tmp_path), (FULL, LORA, Arm("short", {"seq_len": 8})))
  texts = grid.prepare_data(cells)
  assert len(list((tmp_path / "cache").iterdir())) == 2
  assert texts["full"] == texts["lora, rank 4"] != texts["short"]
  with pytest.raises(UserError, match="no file"):
    grid.prepare_data(grid.sweep_cells(tiny_base(tmp_path, data__path=str(tmp_path / "*.gz")), (FULL,)))
