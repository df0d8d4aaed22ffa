"""Fine-tune pre-trained models on GLUE, in full, and compare them as Tables 6 and 7 of the paper do.

python -m experiments.finetune_glue --model=runs/tiny --task=cola --data=glue --workdir=runs/glue
python -m experiments.finetune_glue --model=runs/full --model=runs/switchlora --task=cola,stsb,mrpc,rte,sst2 \
    --data=hub --seeds=5 --workdir=runs/glue

With the first seed every learning rate is tried, with the other seeds the best of them. A model that is finished on a
task with a seed is not trained again: the same command goes on where it was stopped.
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
from experiments.common.results import at_edge
from experiments.paper.items import ITEMS
from switchlora_jax.data.tokenizer import load_tokenizer
from switchlora_jax.errors import UserError
from switchlora_jax.glue import classifier, examples
from switchlora_jax.glue import tasks as glue
from switchlora_jax.interop import pretrained
from switchlora_jax.runs.files import replace_text
from switchlora_jax.training.metrics import progress_bar
from switchlora_jax.training.report import parameter_count

log = logging.getLogger(__name__)

MODEL = flags.DEFINE_multi_string(
  "model", [], "directory of a run, or a Hugging Face LLaMA folder; repeat to compare several"
)
TASK = flags.DEFINE_list("task", [], f"tasks, of {', '.join(glue.TASKS)}")
DATA = flags.DEFINE_string("data", glue.HUB, "folder with CoLA/train.tsv.gz and so on, or hub to download")
SEEDS = flags.DEFINE_integer("seeds", 5, "fine-tunings of a model on a task, at its best learning rate", lower_bound=1)
WORKDIR = flags.DEFINE_string("workdir", None, "directory of the results: created, or continued")
RATES = flags.DEFINE_list("learning_rates", [], "to choose from with the first seed; default: Tables 8 and 9")
EPOCHS = flags.DEFINE_integer("epochs", 30, "passes over the training rows", lower_bound=1)
SEQ_LEN = flags.DEFINE_integer("seq_len", 512, "tokens of a row, at most", lower_bound=4)
ROWS = flags.DEFINE_integer("rows", None, "training rows, at most: the same random ones for all", lower_bound=1)

BIG = 700e6  # parameters from which on a model is nearer to the paper's 1.3B than to its 350M
PAPER_ROWS = {"full": "full-rank", "galore": "GaLore"}  # what has adapters is like SwitchLoRA


class Model(NamedTuple):
  """A model to fine-tune, its name in tables, the method that trained it, and the checksum of its weights."""

  name: str
  method: str
  pretrained: pretrained.Pretrained
  checksum: str


def load(path: str) -> Model:
  """The model of a run or a Hugging Face folder; of the latter nobody knows the method, and it counts as full-rank."""
  folder = Path(path).expanduser()
  found = pretrained.load(folder)
  return Model(folder.resolve().name, found.method or "full", found, checksum(found.weights))


def checksum(weights: dict) -> str:
  """By which a model is known again: the folder of a run or of an export may hold another one by then."""
  digest = hashlib.sha256()
  for _, array in sorted(flatten_dict(weights, sep="/").items()):
    digest.update(array)
  return digest.hexdigest()[:16]


def paper_rate(model: Model, task: glue.Task) -> float:
  """The learning rate of Table 9 for models like the 1.3B, else, and for GaLore, of Table 8."""
  name = PAPER_ROWS.get(model.method, "SwitchLoRA")
  big = parameter_count(model.pretrained.weights) > BIG
  rows = (ITEMS["table9"].paper if big else ()) + ITEMS["table8"].paper
  return next(row[task.title] for row in rows if row[""] == name)


# One model on one task.


class Trial(NamedTuple):
  """What a fine-tuning starts from, but for learning rate and seed."""

  model: Model
  task: glue.Task
  train: examples.Examples
  dev: examples.Examples
  folder: Path


def warn_of_length(trial: Trial) -> None:
  """Say how many rows reach positions that the model has never seen."""
  known, name = trial.model.pretrained.seq_len, f"{trial.model.name}, {trial.task.title}"
  if longer := sum(len(row) > known for row in (*trial.train.tokens, *trial.dev.tokens)):
    log.warning("%s: %d rows are longer than those of pre-training; --seq_len=%d cuts them", name, longer, known)


def compare(trial: Trial, rates: list[float]) -> dict:
  """A row of the results: the sweep of the first seed, and all seeds at the best learning rate."""
  sweep = {rate: run(trial, rate, 0) for rate in rates}
  best = max(rates, key=lambda rate: -2 if sweep[rate]["score"] is None else sweep[rate]["score"])
  cells = [sweep[best], *(run(trial, best, seed) for seed in range(1, SEEDS.value))]
  best_epoch = spread([cell["score"] for cell in cells])
  return {
    "model": trial.model.name,
    "origin": trial.model.pretrained.origin,
    "task": trial.task.title,
    "metric": trial.task.metric,
    "learning_rate": best,
    "at_edge_of_sweep": best_epoch["mean"] is not None and at_edge(best, sweep),
    "sweep": {f"{rate:g}": cell["score"] for rate, cell in sweep.items()},
    "best_epoch": best_epoch,
    "last_epoch": spread([cell["scores"][-1] if cell["scores"] else None for cell in cells]),
    "constant": glue.best_constant(trial.task, trial.dev.labels),
    "cells": cells,
  }


def spread(scores: list[float | None]) -> dict:
  """Mean and standard deviation over the seeds that did not diverge."""
  good = [score for score in scores if score is not None]
  return {
    "scores": scores,
    "mean": statistics.mean(good) if good else None,
    "std": statistics.stdev(good) if len(good) > 1 else None,
  }


def run(trial: Trial, rate: float, seed: int) -> dict:
  """One fine-tuning, or what is left of it if it was finished before.

  Raises:
    UserError: another one lies there.
  """
  folder = trial.folder / f"lr={rate:g}_seed={seed}"
  wanted = {"weights": trial.model.checksum, "rows": len(trial.train.tokens)}
  wanted |= {"epochs": EPOCHS.value, "seq_len": SEQ_LEN.value, "learning_rate": rate, "seed": seed}
  if (path := folder / "result.json").exists():
    found = json.loads(path.read_text())
    changed = [f"{key}: {found[key]!r} → {value!r}" for key, value in wanted.items() if found.get(key) != value]
    if changed:
      raise UserError(f"{folder} holds another fine-tuning ({'; '.join(changed)}); choose a new --workdir")
    return found
  folder.mkdir(parents=True, exist_ok=True)
  start = time.perf_counter()
  result = wanted | fit(trial, folder, rate, seed) | {"seconds": time.perf_counter() - start}
  replace_text(path, json.dumps(result, indent=1) + "\n")
  return result


def fit(trial: Trial, folder: Path, rate: float, seed: int) -> dict:
  """Fine-tune and write the dev rows' answers; keep the weights if no learning rate or seed was better so far."""
  task, found, labels = trial.task, trial.model.pretrained, trial.dev.labels
  plan = classifier.Plan(rate, EPOCHS.value, seed)
  judge = lambda outputs: glue.score(task, glue.answers(task, outputs), labels)
  before = [json.loads(path.read_text())["score"] for path in trial.folder.glob("*/result.json")]
  params = classifier.with_head(found.weights, task.outputs, seed)
  name = f"{trial.model.name}, {task.title}, lr {rate:g}, seed {seed}"
  with progress_bar(classifier.steps_of(plan, len(trial.train.tokens)), what=name) as bar:
    try:
      fitted = classifier.fit(
        classifier.build(task.outputs, **found.sizes), params, trial.train, trial.dev, judge, plan, bar
      )
    except classifier.Diverged as error:
      bar.write(f"{name}: {error}; lower --learning_rates")
      return {"score": None, "scores": [], "losses": [], "failure": str(error)}
  score = max(fitted.scores)
  write_answers(folder / "predictions.tsv", task, glue.answers(task, fitted.outputs), labels)
  if all(other is None or score > other for other in before):
    classifier.save(trial.folder / "best.npz", fitted.params)
  return {"score": score, "scores": fitted.scores, "losses": fitted.losses, "failure": None}


def write_answers(path: Path, task: glue.Task, answered, labels):
  """A line for each dev row, in their order: its number, the answer, the label."""
  show = (lambda x: task.classes[x]) if task.classes else (lambda x: f"{x:.3f}")
  lines = [f"{i}\t{show(a)}\t{show(b)}" for i, (a, b) in enumerate(zip(answered, labels, strict=True))]
  replace_text(path, "\n".join(["index\tprediction\tlabel", *lines]) + "\n")


# All of them.


def check() -> tuple[list[float], list[tuple[str, glue.Task, dict[str, glue.Rows]]], list[Model]]:
  """(learning rates, (name, task, rows) of each task, models), all that can be wrong looked at."""
  if WORKDIR.value is None:
    raise UserError("--workdir is missing: give the directory for the results, say --workdir=runs/glue")
  if not TASK.value or not MODEL.value:
    raise UserError(f"--model and --task are needed: a run, say runs/tiny, and a task of {', '.join(glue.TASKS)}")
  rates = sweep.parse_numbers("learning_rates", RATES.value, float)
  if any(not rate > 0 for rate in rates):
    raise UserError(f"--learning_rates (={','.join(RATES.value)}) must be greater than 0")
  tasks = [(name, glue.task_named(name)) for name in dict.fromkeys(TASK.value)]
  read = [(name, task, glue.read(task, DATA.value)) for name, task in tasks]
  models = [load(path) for path in MODEL.value]
  names = [model.name for model in models]
  if twice := {name for name in names if names.count(name) > 1}:
    raise UserError(f"two models are called {min(twice)}, by which results are kept; rename one of the folders")
  return rates, read, models


def main():
  """Check, then fine-tune every model on every task, writing the results so far after each."""
  rates, tasks, models = check()
  workdir, rows = Path(WORKDIR.value).expanduser(), []
  cli.make_folder(workdir)
  for model in models:
    print(f"{model.name}: {model.pretrained.origin}", file=sys.stderr, flush=True)
    processor = load_tokenizer(model.pretrained.tokenizer)
    encode = partial(examples.encode, processor=processor, seq_len=SEQ_LEN.value, prefix=model.pretrained.prefix)
    for name, task, splits in tasks:
      train, dev = encode(glue.part_of(splits["train"], ROWS.value)), encode(splits["dev"])
      trial = Trial(model, task, train, dev, workdir / model.name / name)
      warn_of_length(trial)
      rows.append(compare(trial, rates or [paper_rate(model, task)]))
      replace_text(workdir / "results.json", json.dumps(rows, indent=1) + "\n")
      table = glue_table.tables(rows)
      replace_text(workdir / "table.md", table)
  print(f"\n{table}\nwritten to {workdir}: table.md, results.json; a folder for each model and task")


if __name__ == "__main__":
  cli.run(main, continues=True)
