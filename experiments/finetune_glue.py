"""Full fine-tuning of pre-trained models on GLUE, and a comparison as in Tables 6 and 7 of the paper.

python -m experiments.finetune_glue --model=runs/tiny --task=cola --data=glue --workdir=runs/glue
python -m experiments.finetune_glue --model=runs/full --model=runs/switchlora --task=cola,stsb,mrpc,rte,sst2 \
    --data=hub --seeds=5 --workdir=runs/glue

The first seed runs every learning rate, and the other seeds run the best one. Existing results are reused: the same
command continues with the first unfinished fine-tuning.
"""

import hashlib
import json
import logging
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

from absl import flags
from flax.traverse_util import flatten_dict

from experiments.common import cli, glue_table, sweep
from experiments.paper.items import ITEMS
from switchlora_jax.data.tokenizer import load_tokenizer
from switchlora_jax.errors import UserError
from switchlora_jax.glue import classifier, examples
from switchlora_jax.glue import tasks as glue
from switchlora_jax.interop import pretrained
from switchlora_jax.models import architecture_of
from switchlora_jax.progress import print_line, progress_bar
from switchlora_jax.runs.files import replace_text
from switchlora_jax.training.report import parameter_count

log = logging.getLogger(__name__)

MODEL = flags.DEFINE_multi_string(
  "model", [], "directory of a run, or a Hugging Face folder; repeat the flag to compare models"
)
TASK = flags.DEFINE_list("task", [], f"comma-separated tasks, from {', '.join(glue.TASKS)}")
DATA = flags.DEFINE_string("data", glue.HUB, "folder with CoLA/train.tsv.gz and so on, or hub to download them")
SEEDS = flags.DEFINE_integer("seeds", 5, "seeds per model and task, at the best learning rate", lower_bound=1)
WORKDIR = flags.DEFINE_string("workdir", None, "directory of the results: created, or continued if it exists")
RATES = flags.DEFINE_list("learning_rates", [], "learning rates of the sweep; default: those of Tables 8 and 9")
EPOCHS = flags.DEFINE_integer("epochs", 30, "passes over the training examples", lower_bound=1)
SEQ_LEN = flags.DEFINE_integer("seq_len", 512, "maximum tokens per example", lower_bound=4)
ROWS = flags.DEFINE_integer(
  "rows", None, "maximum number of training rows, a random subset that is the same for all models", lower_bound=1
)

cli.define_quiet()

LARGE = 700e6  # parameters; larger models use the learning rates of the paper's 1.3B, smaller ones those of its 350M
PAPER_ROWS = {"full": "full-rank", "galore": "GaLore"}  # row of Tables 8 and 9; methods with adapters use SwitchLoRA's


class Model(NamedTuple):
  """A model to fine-tune.

  Attributes:
    name: in tables and paths.
    method: the pre-training method.
    pretrained: the weights, sizes and tokenizer.
    checksum: of the weights.
  """

  name: str
  method: str
  pretrained: pretrained.Pretrained
  checksum: str


def load_model(path: str) -> Model:
  """Loads the model of a run or a Hugging Face folder. A folder does not record its method; full rank is assumed."""
  folder = Path(path).expanduser()
  found = pretrained.load(folder)
  return Model(folder.resolve().name, found.method or "full", found, weights_checksum(found.weights))


def weights_checksum(weights: dict) -> str:
  """Identifies a model by its weights, because the contents of its folder may change between two commands."""
  digest = hashlib.sha256()
  for _, array in sorted(flatten_dict(weights, sep="/").items()):
    digest.update(array)
  return digest.hexdigest()[:16]


def paper_rate(model: Model, task: glue.Task) -> float:
  """The paper's learning rate: Table 9 for large models, Table 8 for the others and where Table 9 has no row."""
  name = PAPER_ROWS.get(model.method, "SwitchLoRA")
  large = parameter_count(model.pretrained.weights) > LARGE
  rows = (ITEMS["table9"].paper if large else ()) + ITEMS["table8"].paper
  return next(row[task.title] for row in rows if row[""] == name)


# One model on one task.


class FineTuning(NamedTuple):
  """A model on a task, with any learning rate and seed. Results are written to `folder`."""

  model: Model
  task: glue.Task
  train: examples.Examples
  dev: examples.Examples
  folder: Path


def warn_of_length(tuning: FineTuning) -> None:
  """Warns about examples that are longer than the sequences of pre-training."""
  seq_len, name = tuning.model.pretrained.seq_len, f"{tuning.model.name}, {tuning.task.title}"
  if longer := sum(len(row) > seq_len for row in (*tuning.train.tokens, *tuning.dev.tokens)):
    log.warning(
      "%s: %d examples are longer than the %d tokens of pre-training; --seq_len=%d truncates them",
      *(name, longer, seq_len, seq_len),
    )


def at_edge(rate: float | None, tried) -> bool:
  """Whether the best learning rate is the smallest or the largest of several."""
  return len(tried) > 1 and rate in (min(tried), max(tried))


def sweep_and_repeat(tuning: FineTuning, rates: list[float]) -> dict:
  """A row of results.json: the first seed at every learning rate, and all seeds at the best one."""
  sweep = {rate: run_or_reuse(tuning, rate, 0) for rate in rates}
  # Scores are at least −1, so a diverged run is never the best unless all are.
  best = max(rates, key=lambda rate: -2 if sweep[rate]["score"] is None else sweep[rate]["score"])
  results = [sweep[best], *(run_or_reuse(tuning, best, seed) for seed in range(1, SEEDS.value))]
  best_epoch = mean_and_std([result["score"] for result in results])
  return {
    "model": tuning.model.name,
    "origin": tuning.model.pretrained.origin,
    "task": tuning.task.title,
    "metric": tuning.task.metric,
    "learning_rate": best,
    "at_edge_of_sweep": best_epoch["mean"] is not None and at_edge(best, sweep),
    "sweep": {f"{rate:g}": result["score"] for rate, result in sweep.items()},
    "best_epoch": best_epoch,
    "last_epoch": mean_and_std([result["scores"][-1] if result["scores"] else None for result in results]),
    "constant": glue.majority_baseline(tuning.task, tuning.dev.labels),
    "cells": results,
  }


def mean_and_std(scores: list[float | None]) -> dict:
  """Mean and sample standard deviation over seeds. Diverged seeds, whose score is None, are left out."""
  finite = [score for score in scores if score is not None]
  return {
    "scores": scores,
    "mean": statistics.mean(finite) if finite else None,
    "std": statistics.stdev(finite) if len(finite) > 1 else None,
  }


def run_or_reuse(tuning: FineTuning, rate: float, seed: int) -> dict:
  """The contents of result.json of one fine-tuning, which is run unless the file exists.

  Raises:
    UserError: the folder has the result of a fine-tuning with other settings.
  """
  folder = tuning.folder / f"lr={rate:g}_seed={seed}"
  settings_used = {"weights": tuning.model.checksum, "rows": len(tuning.train.tokens)}
  settings_used |= {"epochs": EPOCHS.value, "seq_len": SEQ_LEN.value, "learning_rate": rate, "seed": seed}
  settings_used["architecture"] = tuning.model.pretrained.architecture
  if (path := folder / "result.json").exists():
    saved = json.loads(path.read_text())
    saved.setdefault("architecture", settings_used["architecture"])  # results of earlier versions have none
    changed = [
      f"{key}: {saved[key]!r} → {value!r}" for key, value in settings_used.items() if saved.get(key, value) != value
    ]
    if changed:
      raise UserError(
        f"{folder} has the result of a fine-tuning with other settings ({'; '.join(changed)}); choose a new --workdir"
      )
    return saved
  folder.mkdir(parents=True, exist_ok=True)
  start = time.perf_counter()
  result = settings_used | fine_tune(tuning, folder, rate, seed) | {"seconds": time.perf_counter() - start}
  replace_text(path, json.dumps(result, indent=1) + "\n")
  return result


def fine_tune(tuning: FineTuning, folder: Path, rate: float, seed: int) -> dict:
  """Fine-tunes and writes predictions.tsv, and best.npz if no other learning rate or seed had a better score so far."""
  task, source, labels = tuning.task, tuning.model.pretrained, tuning.dev.labels
  plan = classifier.FineTuningPlan(rate, EPOCHS.value, seed)
  score_fn = lambda outputs: glue.score_predictions(task, glue.predictions_of(task, outputs), labels)
  earlier_scores = [json.loads(path.read_text())["score"] for path in tuning.folder.glob("*/result.json")]
  params = classifier.with_head(source.weights, task.outputs, seed)
  name = f"{tuning.model.name}, {task.title}, lr {rate:g}, seed {seed}"
  steps = classifier.total_steps(plan, len(tuning.train.tokens))
  with progress_bar(total=steps, desc=name, unit="step", shown=not flags.FLAGS.quiet) as bar:
    try:
      compiled = classifier.build_classifier(task.outputs, architecture_of(source.architecture))
      fitted = classifier.fit(compiled, params, tuning.train, tuning.dev, score_fn, plan, bar)
    except classifier.Diverged as error:
      print_line(f"{name}: {error}; lower --learning_rates")
      return {"score": None, "scores": [], "losses": [], "failure": str(error)}
  score = max(fitted.scores)
  write_predictions(folder / "predictions.tsv", task, glue.predictions_of(task, fitted.outputs), labels)
  if all(other is None or score > other for other in earlier_scores):
    classifier.save_params(tuning.folder / "best.npz", fitted.params)
  return {"score": score, "scores": fitted.scores, "losses": fitted.losses, "failure": None}


def write_predictions(path: Path, task: glue.Task, predictions, labels):
  """Writes one line per dev row, in the order of the file: index, prediction, label."""
  show = (lambda x: task.classes[x]) if task.classes else (lambda x: f"{x:.3f}")
  lines = [f"{i}\t{show(a)}\t{show(b)}" for i, (a, b) in enumerate(zip(predictions, labels, strict=True))]
  replace_text(path, "\n".join(["index\tprediction\tlabel", *lines]) + "\n")


# All models on all tasks.


def read_inputs() -> tuple[list[float], list[tuple[str, glue.Task, dict[str, glue.LabelledTexts]]], list[Model]]:
  """Checks the flags and reads the data: (learning rates, [(task name, task, splits)], models)."""
  if WORKDIR.value is None:
    raise UserError("--workdir is missing: set the directory of the results, for example --workdir=runs/glue")
  if not TASK.value or not MODEL.value:
    raise UserError(
      f"--model and --task are required: a run, for example runs/tiny, and a task of {', '.join(glue.TASKS)}"
    )
  rates = sweep.parse_numbers("learning_rates", RATES.value, float)
  if any(not rate > 0 for rate in rates):
    raise UserError(f"--learning_rates (={','.join(RATES.value)}) must be greater than 0")
  tasks = [(name, glue.task_named(name)) for name in dict.fromkeys(TASK.value)]
  data = [(name, task, glue.read_task(task, DATA.value)) for name, task in tasks]
  models = [load_model(path) for path in MODEL.value]
  names = [model.name for model in models]
  if duplicates := {name for name in names if names.count(name) > 1}:
    raise UserError(
      f"models must have different folder names, under which results are stored; two are called {min(duplicates)}; "
      "rename one of the folders"
    )
  return rates, data, models


def main():
  """Fine-tunes every model on every task, and writes results.json and table.md after each."""
  rates, tasks, models = read_inputs()
  workdir, rows = Path(WORKDIR.value).expanduser(), []
  cli.make_folder(workdir)
  for model in models:
    if not flags.FLAGS.quiet:
      print(f"{model.name}: {model.pretrained.origin}", file=sys.stderr, flush=True)
    tokenizer = load_tokenizer(model.pretrained.tokenizer)
    encode = partial(
      examples.encode_examples, tokenizer=tokenizer, seq_len=SEQ_LEN.value, prefix=model.pretrained.prefix
    )
    for name, task, splits in tasks:
      train, dev = encode(glue.random_subset(splits["train"], ROWS.value)), encode(splits["dev"])
      tuning = FineTuning(model, task, train, dev, workdir / model.name / name)
      warn_of_length(tuning)
      rows.append(sweep_and_repeat(tuning, rates or [paper_rate(model, task)]))
      replace_text(workdir / "results.json", json.dumps(rows, indent=1) + "\n")
      table = glue_table.glue_tables(rows)
      replace_text(workdir / "table.md", table)
  print(f"\n{table}\nwritten to {workdir}: table.md, results.json, and one folder per model and task")


if __name__ == "__main__":
  cli.run(main, continues=True)
