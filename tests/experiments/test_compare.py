"""Comparisons of methods: a small one that is killed and continued, then one in which a trial fails."""

import contextlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from grids import as_flags, command, curve, imported, tiny_base, write_run
from paths import ROOT
from tiny import ONE_DEVICE_QUICK

from experiments.common import refreshes, sweep
from experiments.common.outcomes import TrialResult, evaluations, trial_summary
from experiments.common.trials import Variant, base_from_flags, make_trial
from switchlora_jax.errors import UserError
from switchlora_jax.methods import LOW_RANK, METHODS
from switchlora_jax.runs import directory as run_directory

TRIALS = ["full_lr=0.001_seed=0", *(f"lora-rank-4_lr={rate}_seed=0" for rate in ("0.01", "0.02"))]
BROKEN = "lora-rank-4_lr=0.05_seed=0"


def finished(workdir) -> set[str]:
  """The names of the trials that have been evaluated after their last step."""
  runs = (path.parent for path in workdir.glob("cells/*/metrics.jsonl"))
  return {run.name for run in runs if any(row["step"] == 6 for row in evaluations(run))}


def ages(workdir, trials) -> dict[str, tuple[int, ...]]:
  files = {trial: (f"{trial}.log", f"{trial}/metrics.jsonl", f"{trial}/config.json") for trial in trials}
  return {trial: tuple((workdir / "cells" / name).stat().st_mtime_ns for name in files[trial]) for trial in trials}


@pytest.fixture(scope="module")
def story(tmp_path_factory):
  """A killed command, the same command again, and again with a learning rate whose directory is a file."""
  folder = tmp_path_factory.mktemp("compare")
  workdir = folder / "grid"
  base = tiny_base(folder, steps=6, eval_every=3, checkpoint_every=3)
  flags = ["--methods=full,lora", "--ranks=4", "--seeds=1", "--processes=2", "--time=false", f"--workdir={workdir}"]
  flags += ["--extend=0", "--allow_edges", *as_flags(base)]
  words = [sys.executable, "-m", "experiments.compare", *flags, "--learning_rates=lora:1e-2,2e-2"]
  options = dict(cwd=ROOT, env=os.environ | ONE_DEVICE_QUICK, start_new_session=True, stderr=subprocess.DEVNULL)
  with subprocess.Popen(words, **options) as process:
    deadline = time.monotonic() + 900
    while process.poll() is None and not finished(workdir) and time.monotonic() < deadline:
      time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
  time.sleep(0.5)  # the runs go, too
  before = ages(workdir, finished(workdir))
  again = command("compare", *flags, "--learning_rates=lora:1e-2,2e-2", user_flags=True)
  after = ages(workdir, before)
  first_table, all_ages = (workdir / "table.md").read_text(), ages(workdir, finished(workdir))
  first_results = json.loads((workdir / "results.json").read_text())
  (workdir / "cells" / BROKEN).write_text("in the way")
  failing, printed = None, io.StringIO()
  with (
    imported("compare", *flags, "--learning_rates=lora:1e-2,2e-2,5e-2") as compare,
    pytest.MonkeyPatch.context() as patch,
  ):
    for key, value in ONE_DEVICE_QUICK.items():
      patch.setenv(key, value)
    with contextlib.redirect_stdout(printed), pytest.raises(UserError) as failing:
      compare.main()
  return SimpleNamespace(**locals())


@pytest.mark.slow
def test_a_killed_comparison_continues(story):
  assert story.process.returncode == -signal.SIGKILL
  assert 0 < len(story.before) < 3  # killed halfway
  assert story.again.returncode == 0, story.again.stderr
  assert story.after == story.before  # finished trials did not run again
  assert {*TRIALS} == finished(story.workdir)


@pytest.mark.slow
def test_table_and_results(story):
  full, lora = story.first_results["arms"]
  assert [variant["label"] for variant in (full, lora)] == ["full", "lora, rank 4"]
  assert len(full["perplexities"]) == len(lora["perplexities"]) == 1
  assert lora["learning_rate"] == min((1e-2, 2e-2), key=lambda rate: lora["sweep"][f"{rate:g}"])
  assert lora["at_edge_of_sweep"] and not full["at_edge_of_sweep"]
  assert story.first_results["read_at"] == 1.0 and len(story.first_results["cells"]) == 3
  for trial in story.first_results["cells"]:
    assert trial["failure"] is None and [step for step, _ in trial["curve"]] == [3, 6]
    assert 0 < trial["val_loss"] < 2 * math.log(320)
  assert "full | " in story.first_table and "step time" not in story.first_table
  assert story.first_table in story.again.stdout and f"written to {story.workdir}" in story.again.stdout
  for name in ("curves.png", "parameters.png"):
    assert (story.workdir / name).stat().st_size > 10_000


@pytest.mark.slow
def test_methods_saw_the_same_data_and_budget(story):
  configs = [json.loads((story.workdir / "cells" / name / "config.json").read_text()) for name in TRIALS]
  assert len({config["data_fingerprint"] for config in configs}) == 1
  shared = ("steps", "batch_size", "seq_len", "eval_tokens", "warmup_steps", "data", "model")
  assert all(config["config"][key] == configs[0]["config"][key] for config in configs for key in shared)
  assert [config["config"]["seed"] for config in configs] == [0, 0, 0]


@pytest.mark.slow
def test_a_failed_trial_is_an_error_after_all_files_are_written(story):
  printed = story.printed.getvalue()
  assert str(story.failing.value).startswith(f"1 of 4 runs failed: {BROKEN}; repeat the same command")
  blocked = story.workdir / "cells" / BROKEN
  assert f"{BROKEN}: failed with exit code 2: error: --workdir={blocked} cannot be written" in printed
  assert ages(story.workdir, story.all_ages) == story.all_ages
  found = json.loads((story.workdir / "results.json").read_text())
  assert found["arms"][1]["sweep"] == story.first_results["arms"][1]["sweep"] | {"0.05": None}
  assert found["arms"][1]["mean"] == story.first_results["arms"][1]["mean"]
  assert (story.workdir / "table.md").read_text() in printed


@pytest.fixture
def lora(story):
  """The result of one trial of the story."""
  trial = make_trial(story.base, Variant("lora, rank 4", {"method": "lora", "rank": 4}), 1e-2, 0)
  return TrialResult(trial, story.workdir / "cells" / trial.name, None)


@pytest.mark.slow
def test_a_process_trains_the_config_of_its_trial(lora):
  assert run_directory.read(lora.workdir)["config"] == lora.trial.config.to_dict()
  assert [row["step"] for row in evaluations(lora.workdir)] == [3, 6]
  assert re.fullmatch(r"validation perplexity \d+\.\d\d", trial_summary(lora))


@pytest.mark.slow
def test_a_finished_trial_starts_no_process(story, lora):
  assert sweep.run_trial(story.base, lora.trial, lora.workdir.parent, (0, 2), None) == lora


@pytest.mark.slow
def test_a_run_without_its_last_evaluation_is_not_finished(lora, tmp_path):
  shutil.copytree(lora.workdir, tmp_path / "run")
  assert sweep.is_finished(tmp_path / "run", lora.trial.config)
  path = tmp_path / "run" / "metrics.jsonl"
  lines = path.read_text().splitlines(keepends=True)
  assert "val_loss" in lines[-1] and json.loads(lines[-1])["step"] == 6
  path.write_text("".join(lines[:-1]))
  assert not sweep.is_finished(tmp_path / "run", lora.trial.config)
  assert not sweep.is_finished(tmp_path / "none", lora.trial.config)


@pytest.mark.slow
def test_write_run_writes_files_like_a_real_run(lora, tmp_path):
  """Other tests depend on `write_run`."""
  write_run(tmp_path / "run", lora.trial.config, curve(lora.trial.config, 3.0))
  made, found = (run_directory.read(folder) for folder in (tmp_path / "run", lora.workdir))
  assert made.keys() == found.keys() and made["config"] == found["config"]
  made, found = (evaluations(folder) for folder in (tmp_path / "run", lora.workdir))
  assert [row["step"] for row in made] == [row["step"] for row in found]
  assert made[0].keys() <= found[0].keys()


def test_a_missing_workdir_is_an_error():
  with imported("compare") as compare, pytest.raises(UserError, match=r"--workdir is missing.*--workdir=runs/grid"):
    compare.main()


MISTAKES = {
  "unknown method": (["--methods=full,loar"], "--methods has loar; expected some of full, lora, switchlora, relora"),
  "no methods": (["--methods="], "--methods has none; expected some of full"),
  "unknown method of rates": (
    ["--learning_rates=loar:1e-3"],
    r"--learning_rates=loar:1e-3 names loar; expected some of --methods, which are full",
  ),
  "rates of a method that is not trained": (
    ["--methods=full,lora", "--learning_rates=galore:1e-2"],
    "--learning_rates=galore:1e-2 names galore; expected some of --methods, which are full, lora",
  ),
  "no number": (["--learning_rates=full:fast"], "--learning_rates must be a list of numbers .*fast"),
  "no colon": (["--learning_rates=full,lora"], "--learning_rates must be a list of numbers .*full"),
  "nothing after the colon": (["--learning_rates=full:"], "--learning_rates must be a list of numbers"),
  "no rank": (["--ranks=8,x", "--methods=full"], "--ranks must be a list of numbers .*x"),
  "twice": (["--methods=full,full"], "duplicate runs .full_lr=0.001_seed=0"),
  "unknown method of rest rates": (
    ["--methods=full,lora", "--rest_learning_rates=loar:1e-3"],
    r"--rest_learning_rates=loar:1e-3 names loar; expected some of --methods, which are full, lora",
  ),
  "no rest rate": (["--rest_learning_rates=full:fast"], "--rest_learning_rates must be a list of numbers .*fast"),
  "variant without keys": (["--variant=muon"], r"--variant=muon must be LABEL:KEY=VALUE,KEY=VALUE,…"),
  "variant without a value": (["--variant=muon:method"], "--variant=muon:method must be LABEL:KEY=VALUE"),
  "variant with a comma": (["--variant=a,b:rank=4"], "must be LABEL:KEY=VALUE,KEY=VALUE,… with a label without commas"),
  "variant with the name of a method": (["--variant=full:rank=4"], "needs a label of its own; full is taken"),
  "variant with an unknown key": (["--variant=a:rnk=4"], "unknown config key 'rnk'"),
  "variant with a wrong value": (["--variant=a:rank=four"], "rank must be of type int; found 'four'"),
  "variant with an unknown method": (["--variant=a:method=loar"], r"method \(='loar'\) must be one of full"),
  "rates of no variant": (
    ["--variant=a:rank=4", "--methods=full", "--learning_rates=b:1e-3"],
    "names b; expected some of --methods and --variant, which are full, a",
  ),
  "unknown reference": (
    ["--methods=full,lora", "--ranks=4", "--reference=loar"],
    r"--reference \(='loar'\) must name one row of the table; give one of: full; lora, rank 4",
  ),
  "reference with several ranks": (
    ["--methods=full,lora", "--ranks=4,2", "--reference=lora"],
    "must name one row of the table; give one of: full; lora, rank 4; lora, rank 2",
  ),
  "redraw with a choice": (["--redraw", "--allow_edges"], r"for which --allow_edges is already decided; repeat the"),
  "variant with a rate": (
    ["--methods=full", "--variant=fixed:method=full,learning_rate=5e-4", "--learning_rates=1e-3,2e-3"],
    r"--variant=fixed:… fixes learning_rate \(=0\.0005\), and --learning_rates sweeps it as well; leave out one of",
  ),
  "nothing to draw": (["--redraw"], r"must hold the results\.json of a sweep with at least one finished run"),
  "rank too large": (["--methods=switchlora", "--ranks=8,512"], r"rank \(=512\) leaves no spare vectors"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_errors_before_the_first_run(tmp_path, name):
  flags, sentence = MISTAKES[name]
  with (
    imported("compare", *flags, f"--workdir={tmp_path / 'grid'}") as compare,
    pytest.raises(UserError, match=sentence),
  ):
    compare.main()
  assert not (tmp_path / "grid").exists()


def test_the_flags_of_a_sweep(tmp_path):
  with imported("compare", "--workdir=~/grid", "--seeds=5", "--processes=3"):
    options = sweep.sweep_options()
  assert options == {"workdir": sweep.Path.home() / "grid", "seeds": 5, "processes": 3, "read_at": 1.0}


def test_one_variant_per_method_and_rank():
  flags = [
    "--methods=full,lora,galore",
    "--ranks=8,4",
    "--learning_rates=1e-4,1e-3",
    "--learning_rates=lora:0.5",
  ]
  with imported("compare", *flags) as compare:
    assert compare.method_variants(compare.CONFIG.value) == [
      Variant("full", {"method": "full"}, (1e-4, 1e-3)),
      Variant("lora, rank 8", {"method": "lora", "rank": 8}, (0.5,)),
      Variant("lora, rank 4", {"method": "lora", "rank": 4}, (0.5,)),
      Variant("galore, rank 8", {"method": "galore", "rank": 8}, (1e-4, 1e-3)),
      Variant("galore, rank 4", {"method": "galore", "rank": 4}, (1e-4, 1e-3)),
    ]


def test_further_variants_have_labels_of_their_own_and_both_rates():
  flags = [
    "--methods=lora",
    "--ranks=4",
    "--config.frozen_dtype=bfloat16",
    "--variant=muon:method=full,optimizer.name=muon",
    "--variant=wide:rank=8,optimizer.weight_decay=0.1",
    "--learning_rates=1e-3,2e-3",
    "--learning_rates=muon:0.02",
    "--rest_learning_rates=muon,lora:1e-3,4e-3",
    "--reference=muon",
  ]
  with imported("compare", *flags) as compare:
    config = compare.CONFIG.value
    found = compare.method_variants(config)
    assert compare.reference_label(found) == "muon"
  muon = {"method": "full", "frozen_dtype": "float32", "optimizer.name": "muon"}
  wide = {"method": config.method, "rank": 8, "optimizer.weight_decay": 0.1}
  assert found == [
    Variant("lora, rank 4", {"method": "lora", "rank": 4}, (1e-3, 2e-3), rest_learning_rates=(1e-3, 4e-3)),
    Variant("muon", muon, (0.02,), rest_learning_rates=(1e-3, 4e-3)),
    Variant("wide", wide, (1e-3, 2e-3)),
  ]


def test_the_reference_is_the_first_row_or_a_method_with_one_rank():
  for flags, label in (
    ([], "lora, rank 4"),
    (["--reference=galore"], "galore, rank 4"),
    (["--reference=full"], "full"),
  ):
    with imported("compare", "--methods=lora,galore,full", "--ranks=4", *flags) as compare:
      assert compare.reference_label(compare.method_variants(compare.CONFIG.value)) == label


def test_variants_without_methods_and_the_options_of_the_search(tmp_path, monkeypatch):
  found = {}
  flags = ["--methods=", "--variant=a:method=full", "--extend=2", f"--workdir={tmp_path}", "--time=false", "--seeds=2"]
  with imported("compare", *flags, "--processes=1", "--learning_rates=1e-3,2e-3") as compare:
    monkeypatch.setattr(compare.sweep, "run_sweep", lambda base, variants, **options: found.update(options) or [])
    monkeypatch.setattr(compare.results, "conclude", lambda *arguments: found.update(concluded=arguments))
    compare.main()
  assert (found["extend"], found["seeds"], callable(found["record"])) == (2, 2, True)
  (variant,), _, options, title, _ = found["concluded"]
  assert variant == Variant("a", {"method": "full"}, (1e-3, 2e-3))
  assert (options["allow_edges"], options["reference"], title) == (False, "a", "llama_tiny: comparison of methods")


@pytest.mark.slow
def test_redraw_writes_and_prints_the_same_again_without_runs(story, tmp_path, capsys):
  shutil.copy(story.workdir / "results.json", tmp_path)
  with imported("compare", "--redraw", f"--workdir={tmp_path}") as compare:
    compare.main()
  assert (tmp_path / "table.md").read_text() == (story.workdir / "table.md").read_text()
  assert (tmp_path / "table.md").read_text() in capsys.readouterr().out
  for name in ("curves.svg", "parameters.svg"):
    assert (tmp_path / name).read_bytes() == (story.workdir / name).read_bytes()
  assert {path.name for path in tmp_path.iterdir()} == {
    "results.json", "table.md", "curves.png", "curves.svg", "parameters.png", "parameters.svg"
  }  # fmt: skip


@pytest.mark.slow
def test_a_real_run_has_its_times_memory_and_sizes(story):
  full = story.first_results["arms"][0]
  assert full["tokens"] == 6 * story.base.config.batch_size * story.base.config.seq_len
  assert full["seconds"] > 5 * full["step_seconds"] > 0 and full["peak_memory_bytes"] > 2**20
  assert full["gradient_bytes"] == 4 * full["trainable_parameters"]
  assert {"tokens", "training time, s", "step, ms", "tokens / s", "peak memory, MiB", "gradients, MiB"} < {
    name.strip() for name in story.first_table.splitlines()[0].split("|")
  }


def test_keys_that_a_method_does_not_use_are_not_set():
  flags = ["--config.frozen_dtype=bfloat16", "--config.warm_start_steps=200", "--ranks=4"]
  with imported("compare", *flags) as compare:
    variants = {
      variant.overrides["method"]: variant.overrides for variant in compare.method_variants(compare.CONFIG.value)
    }
    base = base_from_flags()
    trials = {name: make_trial(base, Variant(name, keys), None, 0).config for name, keys in variants.items()}
  assert {name: (c.frozen_dtype, c.warm_start_steps) for name, c in trials.items()} == {
    "full": ("float32", 0),
    **dict.fromkeys(("galore", "fira", "apollo", "apollo_mini", "frugal", "ldadam"), ("float32", 200)),
    **dict.fromkeys(("lora", "switchlora", "relora"), ("bfloat16", 200)),
    **dict.fromkeys(("sltrain", "factored"), ("float32", 200)),
  }


def test_defaults_are_all_methods_the_configs_rank_and_the_methods_rates():
  with imported("compare", "--config.rank=16") as compare:
    found = compare.method_variants(compare.CONFIG.value)
  assert [variant.label for variant in found] == [
    "full",
    *(f"{method}, rank 16" if method in LOW_RANK else method for method in METHODS if method != "full"),
  ]
  assert {variant.learning_rates for variant in found} == {()}


ROWS = [
  {"program": "full", "rank": 0, "time_ratio": 1.0},
  {"program": "lora", "rank": 4, "time_ratio": 0.5},
  {"program": "lora", "rank": 8, "time_ratio": 0.75},
]


def test_step_times_have_the_labels_of_the_variants(tmp_path, monkeypatch):
  base, commands = tiny_base(tmp_path), []

  def benchmark(words, **_):
    commands.append(words)
    (out,) = (word.removeprefix("--json=") for word in words if word.startswith("--json="))
    sweep.Path(out).write_text(json.dumps(ROWS))
    return SimpleNamespace(returncode=0)

  with imported("compare", "--methods=lora,full", "--ranks=4,8") as compare:
    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(run=benchmark, DEVNULL=None))
    times = compare.step_times(base, tmp_path)
    assert {*times} == {variant.label for variant in compare.method_variants(base.config)}
  assert times == {"full": 1.0, "lora, rank 4": 0.5, "lora, rank 8": 0.75}
  assert commands[0][:4] == [sys.executable, "-m", "experiments.benchmark", f"--config={base.file}"]
  assert {"--config.model.hidden_size=16", "--rank=4", "--rank=8", "--methods=full,lora"} < {*commands[0]}


@pytest.mark.parametrize(("method", "key"), refreshes.INTERVALS.items())
def test_a_step_time_includes_its_share_of_a_refresh(tmp_path, monkeypatch, method, key):
  measured = {"full": 1.0, method: 1.25, f"{method} refreshing": 5.25}
  rows = [{"program": name, "rank": 0 if name == "full" else 4, "time_ratio": r} for name, r in measured.items()]

  def benchmark(words, **_):
    assert f"--methods=full,{method},{method} refreshing" in words
    (tmp_path / "step_time.json").write_text(json.dumps(rows))
    return SimpleNamespace(returncode=0)

  with imported("compare", f"--methods={method}", "--ranks=4") as compare:
    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(run=benchmark, DEVNULL=None))
    times = compare.step_times(tiny_base(tmp_path, **{key.replace(".", "__"): 200}), tmp_path)
  assert times[f"{method}, rank 4"] == 1.25 + 4 / 200


def test_a_failed_benchmark_gives_no_step_times(tmp_path, monkeypatch, capsys):
  with imported("compare", "--methods=full") as compare:
    failed = SimpleNamespace(run=lambda *_, **__: SimpleNamespace(returncode=137), DEVNULL=None)
    monkeypatch.setattr(compare, "subprocess", failed)
    assert compare.step_times(tiny_base(tmp_path), tmp_path) == {}
  assert "no step times: the benchmark failed with exit code 137" in capsys.readouterr().err
