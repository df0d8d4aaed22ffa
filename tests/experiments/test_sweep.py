"""Sweeps: which of their trials run, which do not run again, and the errors.

`grids.Runs` replaces the processes here; those of test_compare.py are real.
"""

import json
import math
import os
import shutil
import sys
import time
from queue import Queue
from types import SimpleNamespace

import pytest
from grids import FULL, LORA, fake_runs, fake_text, tiny_base
from paths import ROOT

from experiments.common import children, results, stored, sweep
from experiments.common.outcomes import TrialResult, best_rates, evaluation_loss, evaluation_step
from experiments.common.trials import (
  Variant,
  base_from_file,
  first_seed_trials,
  make_trial,
)
from switchlora_jax.config import resolve
from switchlora_jax.errors import UserError


@pytest.fixture
def runs(monkeypatch):
  return fake_runs(monkeypatch)


def run(base, variants, folder, **options):
  return sweep.run_sweep(base, variants, **{"seeds": 1, "workdir": folder, "processes": 2, "read_at": 1.0} | options)


def test_the_sweep_runs_first_and_then_the_other_seeds_at_the_best(tmp_path, runs):
  runs.losses = {"lora-rank-4_lr=0.01_seed=0": 2.0}
  runs.losses |= {f"lora-rank-4_lr=0.01_seed={seed}": 9.0 for seed in (1, 2)}  # a bad seed does not change the choice
  ran = run(tiny_base(tmp_path), (FULL, LORA), tmp_path, seeds=3)
  first = {"full_lr=0.001_seed=0", *(f"lora-rank-4_lr={rate}_seed=0" for rate in ("0.001", "0.01", "0.1"))}
  seeds = {f"{variant}_seed={seed}" for variant in ("full_lr=0.001", "lora-rank-4_lr=0.01") for seed in (1, 2)}
  assert set(runs.started[:4]) == first and set(runs.started[4:]) == seeds and len(runs.started) == 8
  assert {r.trial.name for r in ran} == first | seeds and all(r.failure is None for r in ran)
  assert best_rates(LORA, ran, 1.0) == (1e-2, None)
  assert {r.trial.config.seed for r in ran} == {0, 1, 2}


def test_finished_trials_do_not_run_again(tmp_path, runs):
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
def test_a_run_with_another_config_is_neither_finished_nor_overwritten(tmp_path, runs, changes, sentence):
  run(tiny_base(tmp_path), (FULL, LORA), tmp_path)
  runs.started.clear()
  base = tiny_base(tmp_path, **changes)
  trial = first_seed_trials(base, (FULL,))[0]
  assert not sweep.is_finished(tmp_path / "cells" / trial.name, trial.config)
  with pytest.raises(UserError, match=sentence):
    run(base, (FULL, LORA), tmp_path)
  assert runs.started == []


def test_finished_trials_on_other_data_are_refused(tmp_path, runs):
  """The files behind a glob may have changed; beside such trials, new ones would be trained on other text."""
  runs.text = fake_text(old="first")
  run(tiny_base(tmp_path), (FULL,), tmp_path)
  runs.started.clear()
  for text, message in (
    (fake_text("def"), r"cells/full_lr=0\.001_seed=0 was started on other data \(fingerprint abc, now def\)"),
    (
      fake_text(old="second"),
      r"eval_also=old is not the one that the run in .*/full_lr=0\.001_seed=0 was evaluated on",
    ),
  ):
    runs.text = text
    with pytest.raises(UserError, match=message):
      run(tiny_base(tmp_path), (FULL, LORA), tmp_path)
  assert runs.started == []


def test_a_run_of_a_version_with_another_meaning_of_a_key_is_neither_finished_nor_used(tmp_path, runs):
  """Its losses are of another learning rate; see `changed_keys`."""
  base = tiny_base(tmp_path, min_lr_ratio=0.1)
  ran = run(base, (FULL,), tmp_path)[0]
  runs.started.clear()
  path = ran.workdir / "config.json"
  saved = json.loads(path.read_text())
  del saved["schedule"]
  path.write_text(json.dumps(saved))
  message = rf"^{ran.workdir} holds a run of an earlier version, in which min_lr_ratio \(=0\.1\) was a lower bound"
  with pytest.raises(UserError, match=message):
    sweep.is_finished(ran.workdir, ran.trial.config)
  with pytest.raises(UserError, match=message):
    run(base, (FULL,), tmp_path)
  assert runs.started == []


def test_a_prepared_folder_may_have_moved(tmp_path, runs):
  """Its contents are compared by their fingerprint."""
  moved = lambda path: tiny_base(tmp_path, data__source="prepared", data__path=path)
  run(moved("here"), (FULL,), tmp_path)
  runs.started.clear()
  run(moved("there"), (FULL,), tmp_path)
  assert runs.started == []
  runs.text = fake_text("def")
  with pytest.raises(UserError, match="was started on other data"):
    run(moved("there"), (FULL,), tmp_path)


def test_keys_that_change_no_result_may_change(tmp_path, runs):
  run(tiny_base(tmp_path), (FULL,), tmp_path)
  runs.started.clear()
  run(tiny_base(tmp_path, eval_every=6, checkpoint_every=2, accumulation=2), (FULL,), tmp_path)
  assert runs.started == []


def test_a_finished_run_without_the_required_evaluation_is_an_error(tmp_path, runs):
  run(tiny_base(tmp_path, eval_every=5), (FULL,), tmp_path)
  with pytest.raises(UserError, match=r"full_lr=0\.001_seed=0 has no evaluation at step 6; delete it"):
    run(tiny_base(tmp_path, eval_every=6), (FULL,), tmp_path, read_at=0.5)


def test_a_failed_trial_stops_no_other_and_is_reported_with_the_last_line_of_its_log(tmp_path, runs, capsys):
  runs.broken = {"lora-rank-4_lr=0.001_seed=0"}
  runs.losses = {"lora-rank-4_lr=0.1": 2.0}
  ran = run(tiny_base(tmp_path), (LORA, FULL), tmp_path, processes=1, seeds=2)
  failed = [r for r in ran if r.failure]
  log = tmp_path / "cells" / "lora-rank-4_lr=0.001_seed=0.log"
  assert [r.trial.name for r in failed] == ["lora-rank-4_lr=0.001_seed=0"] and len(ran) == 6
  assert failed[0].failure == f"failed with exit code 2: error: what went wrong (see {log})"
  assert f"lora-rank-4_lr=0.001_seed=0: {failed[0].failure}\n" in capsys.readouterr().out
  assert best_rates(LORA, ran, 1.0) == (0.1, None)
  runs.started.clear()
  run(tiny_base(tmp_path), (LORA, FULL), tmp_path, seeds=2)
  assert runs.started == ["lora-rank-4_lr=0.001_seed=0"]  # the same command tries it again


def test_an_exception_in_one_trial_returns_its_share_of_the_cores(tmp_path, runs, monkeypatch):
  """Otherwise other trials would wait forever."""
  queues = []

  def refuse(*_):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr(sweep, "SimpleQueue", lambda: queues.append(Queue()) or queues[0])
  monkeypatch.setattr(sweep, "run_trial", refuse)
  with pytest.raises(PermissionError):
    run(tiny_base(tmp_path), (FULL,), tmp_path, processes=2)
  assert queues[0].qsize() == 2


def test_a_folder_that_cannot_be_created_is_an_error_before_data_preparation(tmp_path, runs, monkeypatch):
  monkeypatch.setattr(sweep, "prepare_datasets", None)
  (tmp_path / "file").touch()
  with pytest.raises(UserError, match="cannot create the folder"):
    run(tiny_base(tmp_path), (FULL,), tmp_path / "file")


def test_ctrl_c_starts_no_queued_trial(tmp_path, runs, monkeypatch):
  def stop_at_the_first(base, trial, folder, share, _):
    runs.started.append(trial.name)
    if len(runs.started) == 1:
      raise KeyboardInterrupt
    time.sleep(0.3)  # the worker may have taken one more before the others were called off
    return TrialResult(trial, folder, "stopped")

  monkeypatch.setattr(sweep, "run_trial", stop_at_the_first)
  with pytest.raises(KeyboardInterrupt):
    run(tiny_base(tmp_path), (LORA, FULL), tmp_path, processes=1)
  assert len(runs.started) <= 2


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), 800.0])  # the perplexity of the last is infinite
def test_diverged_trials_are_never_best(tmp_path, runs, loss, capsys):
  runs.losses = {"lora-rank-4_lr=0.001": loss, "lora-rank-4_lr=0.01": 8.0, "lora-rank-4_lr=0.1": 9.0}
  ran = run(tiny_base(tmp_path), (LORA,), tmp_path)
  assert "lora-rank-4_lr=0.001_seed=0: diverged\n" in capsys.readouterr().out
  assert evaluation_loss(ran[0], 1.0) == float("inf") and best_rates(LORA, ran, 1.0) == (1e-2, None)


def test_without_a_finite_loss_there_is_no_best_rate_and_no_further_seed(tmp_path, runs):
  runs.losses, runs.broken = {"lora": float("nan")}, {"lora-rank-4_lr=0.1_seed=0"}
  ran = run(tiny_base(tmp_path), (LORA, FULL), tmp_path, seeds=2)
  assert best_rates(LORA, ran, 1.0) is None
  assert [r.trial.name for r in ran if r.trial.seed == 1] == ["full_lr=0.001_seed=1"]


INVALID_CHANGES = {
  "missing key": ({"rnk": 4}, r"unknown config key 'rnk'; configs/base\.py lists all keys"),
  "missing nested key": ({"switch.intervl": 4}, r"unknown config key 'switch\.intervl'"),
  "key below a number": ({"rank.x": 4}, r"unknown config key 'rank\.x'"),
  "wrong type": ({"rank": "four"}, r"rank \(='four'\) has the wrong type"),
  "a number for a section": ({"switch": 4}, r"switch \(=4\) has the wrong type"),
  "invalid value": ({"batch_size": -8}, r"batch_size \(=-8\) must be greater than 0"),
  "invalid combination": ({"rank": 16}, r"rank \(=16\) leaves no spare vectors"),
}


@pytest.mark.parametrize("name", INVALID_CHANGES)
def test_invalid_configs_are_errors_before_the_first_trial(tmp_path, runs, name):
  changes, sentence = INVALID_CHANGES[name]
  with pytest.raises(UserError, match=sentence):
    run(tiny_base(tmp_path), (FULL, Variant("second", changes)), tmp_path)
  assert runs.started == [] and not (tmp_path / "cells").exists()


def test_an_invalid_learning_rate_or_evaluation_step_is_an_error_before_the_first_trial(tmp_path, runs):
  for rate, must in ((-1e-3, "be greater than 0"), (float("nan"), "be a finite number")):
    with pytest.raises(UserError, match=rf"learning_rate \(={rate}\) must {must}"):
      run(tiny_base(tmp_path), (FULL, LORA._replace(learning_rates=(1e-3, rate))), tmp_path)
  with pytest.raises(UserError, match="compared at step 6"):
    run(tiny_base(tmp_path), (FULL,), tmp_path, read_at=0.5)
  assert runs.started == []


def test_evaluation_step(tmp_path):
  config = resolve(tiny_base(tmp_path, steps=100, eval_every=15).config, 1)
  assert [evaluation_step(config, at) for at in (1.0, 0.3, 0.75)] == [100, 30, 75]
  with pytest.raises(UserError) as caught:
    evaluation_step(config, 0.95)
  assert str(caught.value) == (
    "the validation loss is compared at step 95 (0.95 of 100 steps), but eval_every (=15) has no evaluation there; "
    "set --config.eval_every to a divisor of 95"
  )


def test_evaluation_loss(tmp_path, runs):
  (ran,) = run(tiny_base(tmp_path), (FULL,), tmp_path)
  assert [evaluation_loss(ran, at) for at in (1 / 3, 2 / 3, 1.0)] == pytest.approx([3.2, 3.1, 3.0])


def test_the_command_line_of_a_trial(tmp_path):
  base = base_from_file("llama_tiny", {"steps": 700, "rank": 16, "learning_rate": 0.5, "data.path": "a b/*"})
  trial = make_trial(base, Variant("lora", {"method": "lora", "rank": 8}), 1e-3, 2)
  assert sweep.trial_command(base, trial, tmp_path / "run") == [
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


def test_each_text_is_tokenised_once_before_the_runs(tmp_path):
  trials = first_seed_trials(tiny_base(tmp_path), (FULL, LORA, Variant("short", {"seq_len": 8})))
  texts = sweep.prepare_datasets(trials)
  assert len(list((tmp_path / "cache").iterdir())) == 2
  assert texts["full"] == texts["lora, rank 4"] != texts["short"]
  with pytest.raises(UserError, match="no file"):
    sweep.prepare_datasets(first_seed_trials(tiny_base(tmp_path, data__path=str(tmp_path / "*.gz")), (FULL,)))


# --- flags ---------------------------------------------------------------------------------------------------------


def test_numbers_of_a_flag():
  assert sweep.parse_numbers("learning_rates", ["1e-3", "2"], float) == [1e-3, 2.0]
  assert sweep.parse_numbers("ranks", ["8", "16"], int) == [8, 16]
  assert sweep.parse_numbers("ranks", None, int) == sweep.parse_numbers("ranks", [], int) == []
  for words, kind in ((["8.5"], int), (["1e-3", ""], float), (["fast"], float)):
    with pytest.raises(UserError, match=r"--ranks must be a list of numbers such as 1e-3,2e-3 or 32,16; "):
      sweep.parse_numbers("ranks", words, kind)


def test_the_package_is_found_from_any_directory(tmp_path, monkeypatch):
  monkeypatch.setenv("PYTHONPATH", "elsewhere")
  assert children.environment()["PYTHONPATH"] == f"{ROOT}{os.pathsep}elsewhere"
  monkeypatch.delenv("PYTHONPATH")
  monkeypatch.setenv("SOME_SETTING", "kept")
  assert children.environment()["PYTHONPATH"] == str(ROOT) and children.environment()["SOME_SETTING"] == "kept"


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_one_process_per_core_or_one_with_accelerators(monkeypatch, platform):
  monkeypatch.setattr(sweep, "probe_devices", lambda: (platform, 4))
  assert sweep.default_processes() == (len(os.sched_getaffinity(0)) if platform == "cpu" else 1)


# --- sweeps of two learning rates, and their extension -------------------------------------------------------------

BOTH = Variant("full", {"method": "full"}, (1e-3, 2e-3), rest_learning_rates=(1e-3, 4e-3))


def bowl(best_rate, best_rest):
  """The loss of a trial, quadratic in the logarithms of its two learning rates."""

  def surface(trial):
    rest = trial.config.rest_learning_rate
    return 3 + 0.1 * math.log2(trial.learning_rate / best_rate) ** 2 + 0.1 * math.log2(rest / best_rest) ** 2

  return surface


def test_the_sweep_is_extended_until_the_best_is_inside_and_then_the_seeds_run(tmp_path, runs, capsys):
  runs.surface = bowl(8e-3, 2.5e-4)
  ran = run(tiny_base(tmp_path), (BOTH, LORA), tmp_path, extend=6, seeds=2)
  assert best_rates(BOTH, ran, 1.0) == (8e-3, 2.5e-4) and len(runs.started) == len(set(runs.started))
  assert [r.trial.point for r in ran if r.trial.seed == 1 and r.trial.variant is BOTH] == [(8e-3, 2.5e-4)]
  first = [r.trial.point for r in ran if r.trial.seed == 0 and r.trial.variant is BOTH]
  assert {(1.6e-2, 2.5e-4), (4e-3, 2.5e-4), (8e-3, 6.25e-5), (8e-3, 1e-3)} < set(first) and len(first) < 14
  assert (
    "full: best of 4 so far: learning rate 0.002 (embedding, norms, head: 0.001); next neighbour: learning rate 0.004 "
    "(embedding, norms, head: 0.001)\n"
  ) in capsys.readouterr().out
  started = len(runs.started)
  assert [r.trial.name for r in run(tiny_base(tmp_path), (BOTH, LORA), tmp_path, extend=6, seeds=2)] == [
    r.trial.name for r in ran
  ]
  assert len(runs.started) == started, "the same trials, which have finished"


def test_rates_that_are_not_given_are_not_extended_and_diverged_edges_end_the_search(tmp_path, runs):
  runs.losses = {"full": 2.0, "lora-rank-4_lr=0.1": 2.0, "lora-rank-4_lr=1": float("nan")}
  ran = run(tiny_base(tmp_path), (FULL, LORA), tmp_path, extend=4)
  assert [r.trial.learning_rate for r in ran] == [1e-3, 1e-3, 1e-2, 1e-1, 1.0]
  assert best_rates(LORA, ran, 1.0) == (0.1, None)


def test_a_variant_whose_runs_all_failed_is_not_extended(tmp_path, runs):
  runs.broken = {f"lora-rank-4_lr={rate}_seed=0" for rate in ("0.001", "0.01", "0.1")}
  assert len(run(tiny_base(tmp_path), (LORA,), tmp_path, extend=4)) == 3


def test_results_are_recorded_after_every_run_and_not_for_finished_ones(tmp_path, runs):
  recorded = []
  options = dict(record=lambda results: recorded.append([r.trial.name for r in results]), processes=1, seeds=2)
  ran = run(tiny_base(tmp_path), (FULL, LORA), tmp_path, **options)
  names = [r.trial.name for r in ran]
  assert recorded == [names[: n + 1] for n in range(len(names))]
  recorded.clear()
  run(tiny_base(tmp_path), (FULL, LORA), tmp_path, **options)
  assert recorded == []


# --- continuing from results.json ----------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path, runs):
  """A sweep whose directories are gone: its results.json alone is left. From changes of the config to the results."""
  variants = (BOTH, LORA)

  def again(**changes):
    base, options = tiny_base(tmp_path, **changes), {"workdir": tmp_path / "grid", "read_at": 1.0}
    record = results.recorder(variants, options, "title")
    return run(base, variants, tmp_path / "grid", seeds=2, extend=2, record=record)

  runs.surface = lambda trial: bowl(2e-3, 4e-3)(trial) + 0.01 * trial.seed
  first = again(clip_norm=float("inf"))
  shutil.rmtree(tmp_path / "grid" / "cells")
  runs.started.clear()
  return SimpleNamespace(again=again, first=first, path=tmp_path / "grid" / "results.json")


def test_a_sweep_continues_from_results_json_alone(written, runs):
  ran = written.again(clip_norm=float("inf"), eval_every=6, accumulation=2)  # keys that change no result
  assert runs.started == [] and [r.trial.name for r in ran] == [r.trial.name for r in written.first]
  assert all(r.cell and not r.workdir.exists() for r in ran)
  assert [evaluation_loss(r, 1.0) for r in ran] == pytest.approx([runs.surface(r.trial) for r in ran])
  cells = {cell["name"]: cell for cell in json.loads(written.path.read_text())["cells"]}
  collected = results.collect((BOTH, LORA), ran, 1.0)["cells"]
  assert [cell["curve"] for cell in collected] == [cells[cell["name"]]["curve"] for cell in collected]


@pytest.mark.parametrize("change", [{"clip_norm": 1.0}, {"clip_norm": float("inf"), "switch__interval": 3}])
def test_trials_of_another_config_in_results_json_run_again(written, runs, change, capsys):
  written.again(**change)
  assert len(runs.started) == len(written.first)
  assert "full_lr=0.001_rest=0.001_seed=0 runs, since results.json holds another run of this name (" in (
    capsys.readouterr().out
  )
  assert {cell["name"] for cell in json.loads(written.path.read_text())["cells"]} == {*runs.started}


def test_trials_on_other_data_in_results_json_run_again(written, runs, capsys):
  runs.text = fake_text("def", old="first")
  written.again(clip_norm=float("inf"))
  assert len(runs.started) == len(written.first)
  assert "(data fingerprint: abc → def)" in capsys.readouterr().out
  shutil.rmtree(written.path.parent / "cells")
  runs.text = fake_text("def", old="second")
  written.again(clip_norm=float("inf"))
  assert "(the text of data.eval_also=old has changed: first → second)" in capsys.readouterr().out


def test_unfinished_and_failed_trials_of_results_json_run_again_and_the_others_are_kept(written, runs):
  found = json.loads(written.path.read_text())
  stopped, failed, seed = found["cells"][0], found["cells"][1], found["cells"][-1]
  stopped["curve"].pop()
  failed["failure"] = "failed with exit code 2"
  written.path.write_text(json.dumps(found))
  kept = []
  runs.surface = lambda trial, before=runs.surface: kept.append(json.loads(written.path.read_text())) or before(trial)
  written.again(clip_norm=float("inf"))
  assert {*runs.started} == {stopped["name"], failed["name"]}
  after_first = [cell["name"] for part in ("cells", "other_cells") for cell in kept[-1].get(part, ())]
  assert seed["name"] in after_first, "the second seeds have not been reached again, and are not lost"
  last = json.loads(written.path.read_text())
  assert {cell["name"] for part in ("cells", "other_cells") for cell in last.get(part, ())} == {
    cell["name"] for cell in found["cells"]
  }


def test_a_moved_text_is_recognised_by_its_fingerprint(written, runs):
  written.again(clip_norm=float("inf"), data__path="elsewhere/*.txt", data__tokenizer="elsewhere/t5.model")
  assert runs.started == []


def test_a_moved_text_of_the_mixture_is_recognised_as_well(tmp_path, runs):
  options = {"workdir": tmp_path / "grid", "read_at": 1.0}
  for where in ("here", "there"):
    base = tiny_base(tmp_path, data__mixture=f"0.1={where}/*.txt")
    run(base, (LORA,), options["workdir"], record=results.recorder((LORA,), options, "title"))
    shutil.rmtree(options["workdir"] / "cells", ignore_errors=True)
  assert len(runs.started) == 3, "the three rates, once"


def test_a_stored_trial_without_the_required_evaluation_is_an_error(written):
  cells = stored.read_cells(written.path.parent)
  trial = written.first[0].trial
  result = TrialResult(trial, written.path.parent / "none", None, cells[trial.name] | {"curve": [[12, 3.0]]})
  with pytest.raises(
    UserError, match=r"full_lr=0\.001_rest=0\.001_seed=0 of results\.json has no evaluation at step 4"
  ):
    evaluation_loss(result, 1 / 3)


@pytest.mark.parametrize("text", ["{", "[]", '{"arms": 3, "cells": []}', '{"rows": []}'])
def test_a_damaged_results_json_is_an_error_before_the_first_run(written, runs, text):
  written.path.write_text(text)
  with pytest.raises(UserError, match=r"results\.json must "):
    written.again()
  assert runs.started == []


def test_results_of_earlier_versions_are_not_used(written, runs):
  """Their entries have no config."""
  found = json.loads(written.path.read_text())
  for cell in found["cells"]:
    del cell["config"], cell["data_fingerprint"]
  written.path.write_text(json.dumps(found))
  written.again(clip_norm=float("inf"))
  assert len(runs.started) == len(written.first)
