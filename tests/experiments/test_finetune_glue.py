"""The command on made-up GLUE files, and on a run that has not learnt anything yet."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import glue_files
import jax
import numpy as np
import pytest
from grids import imported
from paths import ROOT
from tiny import resolved

from experiments.paper.items import ITEMS
from switchlora_jax.data.tokenizer import load_tokenizer, train_tokenizer
from switchlora_jax.errors import UserError
from switchlora_jax.glue import classifier, examples
from switchlora_jax.glue import tasks as glue
from switchlora_jax.glue.tasks import TASKS
from switchlora_jax.interop import export, pretrained
from switchlora_jax.models import architecture_of
from switchlora_jax.parallel.sharding import make_mesh
from switchlora_jax.runs import directory as run_directory
from switchlora_jax.runs.checkpoint import Checkpoints
from switchlora_jax.training.phases import build_phase

SHORT = ["--epochs=4", "--rows=240", "--seq_len=64", "--seeds=2", "--learning_rates=1e-5,1e-2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """`run`, a switchlora run before its first step; `glue`, RTE and STS-B with as many rows as the real ones."""
  folder = tmp_path_factory.mktemp("finetune")
  config, run = resolved(folder, devices=1, method="switchlora"), folder / "run"
  with Checkpoints(run / "checkpoints", keep=1) as saves:
    saves.save(0, build_phase(config, make_mesh(jax.devices()[:1])).create())
  train_tokenizer([Path(config.data.path).read_text()], config.model.vocab_size, folder / "own.model")
  run_directory.record(run, config, SimpleNamespace(also=(), fingerprint="none", tokenizer_path=folder / "own.model"))
  for name in ("rte", "stsb"):
    glue_files.write_task(folder / "glue", name)
  return folder


def finetune(folder, *flags, model="run", task="rte"):
  """The command, imported, with the flags that it always wants."""
  always = [f"--model={folder / model}", f"--task={task}", f"--data={folder / 'glue'}", f"--workdir={folder / 'out'}"]
  return imported("finetune_glue", *always, *flags)


@pytest.fixture(scope="module")
def results(folder):
  """What the command leaves in results.json."""
  with finetune(folder, *SHORT, task="rte,stsb") as command:
    command.main()
  return json.loads((folder / "out" / "results.json").read_text())


@pytest.mark.slow
def test_the_results(folder, results):
  """The words that tell the label are learnt, at the learning rate that is not far too small."""
  assert [(row["model"], row["task"], row["learning_rate"]) for row in results] == [
    ("run", "RTE", 1e-2),
    ("run", "STS-B", 1e-2),
  ]
  for row in results:
    assert row["sweep"]["1e-05"] < 0.75 * row["sweep"]["0.01"]
    assert row["best_epoch"]["mean"] > 0.8 and len(row["best_epoch"]["scores"]) == 2
    assert row["best_epoch"]["scores"] == [max(cell["scores"]) for cell in row["cells"]]
    assert row["last_epoch"]["scores"] == [cell["scores"][-1] for cell in row["cells"]]
    assert row["best_epoch"]["std"] == pytest.approx(np.std(row["best_epoch"]["scores"], ddof=1))
    assert [cell["seed"] for cell in row["cells"]] == [0, 1] and "switchlora, step 0 of " in row["origin"]
    assert all(cell["losses"][-1] < cell["losses"][0] and cell["rows"] == 240 for cell in row["cells"])


@pytest.mark.slow
def test_the_table(folder, results):
  text = (folder / "out" / "table.md").read_text()
  mean, std = (100 * results[0]["best_epoch"][key] for key in ("mean", "std"))
  assert f"| run | {mean:.2f} ± {std:.2f}† |" in text and "|  | RTE | STS-B |" in text
  constant = 100 * results[0]["constant"]
  assert f"| majority-class baseline | {constant:.2f} | 0.00 |" in text and 50 < constant < 60
  assert "| SwitchLoRA, 350M | 56.24±5 | 87.71±0.5 |" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rte", "stsb"])
def test_predictions_and_the_best_weights_have_the_score(folder, results, name):
  task = TASKS[name]
  row = next(row for row in results if row["task"] == task.title)
  best = max(row["cells"], key=lambda cell: cell["score"])
  lines = (folder / "out" / "run" / name / f"lr=0.01_seed={best['seed']}" / "predictions.tsv").read_text().splitlines()
  index, answered, labels = zip(*(line.split("\t") for line in lines[1:]), strict=True)
  assert lines[0] == "index\tprediction\tlabel" and list(map(int, index)) == list(range(task.rows["dev"]))
  number = task.classes.index if task.classes else float
  answered, labels = (np.array(list(map(number, column))) for column in (answered, labels))
  assert glue.score_predictions(task, answered, labels) == pytest.approx(best["score"], abs=1e-4)

  rows = glue.read_task(task, str(folder / "glue"))["dev"]
  np.testing.assert_array_equal(rows.labels, labels)
  model = pretrained.load(folder / "run")
  dev = examples.encode_examples(rows, load_tokenizer(model.tokenizer), 64)
  params = classifier.load_params(folder / "out" / "run" / name / "best.npz")
  outputs = classifier.compute_outputs(
    classifier.build_classifier(task.outputs, architecture_of(model.architecture)), params, dev
  )
  np.testing.assert_allclose(glue.predictions_of(task, outputs), answered, atol=1e-3)


@pytest.mark.slow
def test_the_same_command_trains_nothing_again(folder, results, monkeypatch):
  monkeypatch.setattr(classifier, "fit", lambda *_: pytest.fail("trained again"))
  with finetune(folder, *SHORT, task="rte,stsb") as command:
    command.main()
  assert json.loads((folder / "out" / "results.json").read_text()) == results


@pytest.mark.slow
def test_a_hugging_face_folder_is_fine_tuned_as_its_run_is(folder, results, tmp_path, capfd):
  export.export(folder / "run", tmp_path / "exported")
  flags = ["--epochs=4", "--rows=240", "--seq_len=64", "--seeds=1", "--learning_rates=1e-2", f"--workdir={tmp_path}"]
  with imported(
    "finetune_glue", f"--model={tmp_path / 'exported'}", "--task=rte", f"--data={folder / 'glue'}", *flags
  ) as m:
    m.main()
  (row,) = json.loads((tmp_path / "results.json").read_text())
  assert row["best_epoch"]["scores"] == pytest.approx(results[0]["best_epoch"]["scores"][:1])
  assert not row["at_edge_of_sweep"] and "†" not in (tmp_path / "table.md").read_text(), "of one rate there is no edge"
  shown = capfd.readouterr().err
  assert f"exported: {tmp_path / 'exported'}" in shown and "\r" not in shown
  assert re.search(r"^exported, RTE, lr 0\.01, seed 0: 60 of 60, .*, epoch=4, loss=.*, score=", shown, re.MULTILINE)


def test_by_default_it_is_as_the_paper_has_it(folder):
  with finetune(folder) as command:
    assert (command.EPOCHS.default, command.SEQ_LEN.default, command.SEEDS.default) == (30, 512, 5)
  assert classifier.FineTuningPlan(1e-5, 30, 0).batch_size == 16


@pytest.mark.slow
def test_what_was_stopped_goes_on_with_what_is_missing(folder, results, tmp_path, monkeypatch):
  """Of three fine-tunings on RTE, the one whose result is not there; it finds what it found before."""
  shutil.copytree(folder / "out", tmp_path / "out")
  (tmp_path / "out" / "run" / "rte" / "lr=0.01_seed=1" / "result.json").unlink()
  fit, fitted = classifier.fit, []
  monkeypatch.setattr(classifier, "fit", lambda *args: (fitted.append(args[5].seed), fit(*args))[1])
  with finetune(folder, *SHORT, f"--workdir={tmp_path / 'out'}") as command:
    command.main()
  assert fitted == [1]
  (row,), scores = json.loads((tmp_path / "out" / "results.json").read_text()), results[0]["best_epoch"]["scores"]
  assert row["best_epoch"]["scores"] == pytest.approx(scores)


@pytest.mark.slow
def test_another_fine_tuning_is_not_taken_for_this_one(folder, results):
  flags = [*SHORT[1:], "--epochs=5"]
  with finetune(folder, *flags) as command, pytest.raises(UserError, match=r"epochs: 4 → 5\); choose a new --workdir"):
    command.main()


@pytest.mark.slow
def test_a_model_is_known_by_its_weights_and_not_by_its_path(folder, results, monkeypatch):
  """A folder may be trained or exported anew; and the same one may be given from elsewhere."""
  monkeypatch.setattr(classifier, "fit", lambda *_: pytest.fail("trained again"))
  monkeypatch.chdir(folder)
  with imported("finetune_glue", "--model=run", "--task=rte", "--data=glue", "--workdir=out", *SHORT) as command:
    command.main()
  load, twice = pretrained.load, lambda weights: jax.tree.map(lambda x: 2 * x, weights)
  monkeypatch.setattr(pretrained, "load", lambda path: (found := load(path))._replace(weights=twice(found.weights)))
  with finetune(folder, *SHORT) as command, pytest.raises(UserError, match=r"weights: '\w+' → '\w+'\); choose a new"):
    command.main()


def test_what_diverges_is_said_and_others_go_on(folder, tmp_path, capsys):
  flags = ["--epochs=1", "--rows=32", "--seeds=1", "--learning_rates=1e38,1e-3", f"--workdir={tmp_path}"]
  with finetune(folder, *flags) as command:
    command.main()
  (row,) = json.loads((tmp_path / "results.json").read_text())
  assert row["sweep"]["1e+38"] is None and row["learning_rate"] == 1e-3 and row["best_epoch"]["mean"] > 0
  assert "lr 1e+38, seed 0: outputs are not finite after epoch 1; lower --learning_rates" in capsys.readouterr().out
  with finetune(folder, *flags[:3], "--learning_rates=1e38,2e38", f"--workdir={tmp_path}") as command:
    command.main()
  assert "| run | diverged (0 of 1 seeds) |" in (tmp_path / "table.md").read_text()
  assert not (tmp_path / "run" / "rte" / "lr=1e+38_seed=0" / "predictions.tsv").exists()


def test_what_stood_before_texts_in_pre_training_stands_before_rows(folder, tmp_path, monkeypatch):
  load = pretrained.load
  monkeypatch.setattr(pretrained, "load", lambda path: load(path)._replace(prefix=(7,)))
  with finetune(folder, *SHORT, f"--workdir={tmp_path}") as command:
    monkeypatch.setattr(command, "sweep_and_repeat", lambda trial, _: pytest.fail(f"began with {first_tokens(trial)}"))
    with pytest.raises(pytest.fail.Exception, match=r"began with \{7\}"):
      command.main()


def first_tokens(trial):
  return {int(row[0]) for row in (*trial.train.tokens, *trial.dev.tokens)}


def test_rows_longer_than_those_of_pre_training_are_counted(folder, caplog):
  """Rows had 16 tokens there; the default of the command is 512."""
  rows = lambda *lengths: examples.Examples([np.zeros(length) for length in lengths], None)
  with finetune(folder) as command:
    model = command.load_model(folder / "run")
    command.warn_of_length(command.FineTuning(model, TASKS["rte"], rows(3, 16), rows(16), folder))
    assert not caplog.text
    command.warn_of_length(command.FineTuning(model, TASKS["rte"], rows(3, 17), rows(16, 99), folder))
  assert (
    "run, RTE: 2 examples are longer than the 16 tokens of pre-training; --seq_len=16 truncates them" in caplog.text
  )


# The paper's learning rates.


@pytest.mark.parametrize(
  ("method", "parameters", "rates"),
  [
    ("full", 1e6, [8e-6, 1e-5, 1e-5, 8e-6, 3e-6]),
    ("switchlora", 368e6, [3e-5, 5e-5, 5e-5, 5e-5, 1e-5]),
    ("lora", 368e6, [3e-5, 5e-5, 5e-5, 5e-5, 1e-5]),
    ("galore", 368e6, [2e-6, 5e-6, 5e-6, 3e-6, 8e-7]),
    ("full", 1.3e9, [8e-6, 1e-5, 2e-5, 1e-5, 5e-6]),
    ("lora", 1.3e9, [1e-5, 1e-5, 1e-5, 2e-6, 5e-6]),
    ("galore", 1.3e9, [2e-6, 5e-6, 5e-6, 3e-6, 8e-7]),
  ],
)
def test_learning_rates_are_the_papers(folder, monkeypatch, method, parameters, rates):
  with finetune(folder) as command:
    monkeypatch.setattr(command, "parameter_count", lambda _: parameters)
    model = command.Model("x", method, pretrained.Pretrained({}, {}, Path(), "", 64, method), "")
    assert [command.paper_rate(model, TASKS[name]) for name in ("cola", "stsb", "mrpc", "rte", "sst2")] == rates


def test_the_method_of_a_run_is_known(folder):
  with finetune(folder) as command:
    assert command.load_model(str(folder / "run")).method == "switchlora"


def test_the_method_of_a_hugging_face_folder_is_not(folder, tmp_path):
  export.export(folder / "run", tmp_path / "exported")
  with finetune(folder) as command:
    model = command.load_model(str(tmp_path / "exported"))
  assert (model.name, model.method, model.pretrained.method) == ("exported", "full", None)


def test_titles_are_those_of_the_papers_tables():
  assert sorted(task.title for task in TASKS.values()) == sorted(key for key in ITEMS["table8"].paper[0] if key)


# Mistakes.


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--task=rte,qnli"], r"the task \(='qnli'\) must be one of cola, stsb, mrpc, rte, sst2"),
    (["--task=cola"], r"must hold CoLA/train\.tsv or \.tsv\.gz; found neither"),
    (["--task="], r"--model and --task are required"),
    (["--learning_rates=1e-3,fast"], r"--learning_rates must be a list of numbers .*fast"),
    (["--learning_rates=0"], r"--learning_rates \(=0\) must be greater than 0"),
    (["--model={folder}/none"], r"none must be the directory of a run"),
    (["--workdir={folder}/own.model"], r"^cannot create the folder .*own\.model \(File exists\)"),
    (["--model={folder}/run/../run"], r"two are called run; rename"),
  ],
)
def test_mistakes_are_sentences(folder, monkeypatch, flags, message):
  monkeypatch.setattr(classifier, "fit", lambda *_: pytest.fail("trained"))
  flags = [flag.format(folder=folder) for flag in flags]
  with finetune(folder, *flags) as command, pytest.raises(UserError, match=message):
    command.main()


def test_a_mistake_ends_the_command_with_a_sentence():
  command = [sys.executable, "-m", "experiments.finetune_glue", "--model=x", "--task=rte"]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 2 and done.stderr.startswith("error: --workdir is missing: set")
