"""Outcomes of trials: their validation losses, from directories of runs or from results.json, and the best rates."""

import functools
import math
import sys
from pathlib import Path
from typing import NamedTuple

from experiments.common import search
from experiments.common.search import Point
from experiments.common.trials import Trial, Variant
from switchlora_jax.errors import UserError
from switchlora_jax.training import metrics


class TrialResult(NamedTuple):
  """A trial that has ended.

  Attributes:
    workdir: the directory of its run.
    failure: the reason if it failed, else None.
    cell: its entry of results.json, see `stored`, if the trial was finished there; `workdir` may not exist then.
  """

  trial: Trial
  workdir: Path
  failure: str | None
  cell: dict | None = None


def evaluations(workdir: Path) -> list[dict]:
  """The evaluation rows of a run's metrics.jsonl."""
  return list(read_metrics(workdir)[0])


def read_metrics(workdir: Path) -> tuple[list[dict], list[dict]]:
  """The evaluation rows of a run's metrics.jsonl, and tokens and the `metrics.TIMED` of its training rows.

  The rows are kept in memory until the file changes. They must not be changed.
  """
  path = workdir / "metrics.jsonl"
  found = path.stat() if path.exists() else None
  return _parse_metrics(path, found and (found.st_mtime_ns, found.st_size))


@functools.cache
def _parse_metrics(path: Path, version) -> tuple[list[dict], list[dict]]:
  del version  # of the file, a key of the cache
  rows = metrics.read(path)
  kept = ("tokens", *metrics.TIMED)
  timed = [{key: row[key] for key in kept if key in row} for row in rows if "tokens_per_second" in row]
  return [row for row in rows if "val_loss" in row], timed


def trial_evaluations(result: TrialResult) -> list[dict]:
  """The evaluation rows of a trial, `step`, `val_loss` and `val_ppl` at least, from its directory or results.json."""
  if result.cell is None:
    return evaluations(result.workdir)
  perplexity = lambda loss: None if loss is None or loss > math.log(sys.float_info.max) else math.exp(loss)
  return [{"step": step, "val_loss": loss, "val_ppl": perplexity(loss)} for step, loss in result.cell["curve"]]


def evaluation_step(config, read_at: float) -> int:
  """The step whose validation loss is compared: the fraction `read_at` of the run's steps.

  Raises:
    UserError: the run has no evaluation at that step.
  """
  step = round(read_at * config.steps)
  if step != config.steps and step % config.eval_every:
    raise UserError(
      f"the validation loss is compared at step {step} ({read_at:g} of {config.steps} steps), but eval_every "
      f"(={config.eval_every}) has no evaluation there; set --config.eval_every to a divisor of {step}"
    )
  return step


def evaluation_loss(result: TrialResult, read_at: float) -> float:
  """The validation loss of a trial at `evaluation_step`, in nats per token; infinite if it failed or diverged.

  Raises:
    UserError: the run has no evaluation at that step, because it was made with another `eval_every`.
  """
  if result.failure:
    return math.inf
  step = evaluation_step(result.trial.config, read_at)
  for row in trial_evaluations(result):
    if row["step"] == step:
      return math.inf if row["val_ppl"] is None else row["val_loss"]
  if result.cell:
    raise UserError(
      f"the entry {result.trial.name} of results.json has no evaluation at step {step}; delete the entry, and the same "
      "command runs it again"
    )
  raise UserError(f"{result.workdir} has no evaluation at step {step}; delete it, and the same command runs it again")


def point_losses(variant: Variant, results: list[TrialResult], read_at: float) -> dict[Point, float]:
  """{point: loss} of a variant's first seed, infinite for runs that failed or diverged."""
  own = [result for result in results if result.trial.variant is variant]
  first_seed = min(result.trial.seed for result in own)
  return {r.trial.point: evaluation_loss(r, read_at) for r in own if r.trial.seed == first_seed}


def best_rates(variant: Variant, results: list[TrialResult], read_at: float) -> Point | None:
  """The learning rates with the lowest loss for a variant's first seed; None if no trial has a finite loss."""
  return search.best_point(point_losses(variant, results, read_at))


def trial_summary(result: TrialResult) -> str:
  """The outcome of a trial in a few words, for the progress output."""
  last = trial_evaluations(result)[-1]
  return "diverged" if last["val_ppl"] is None else f"validation perplexity {last['val_ppl']:.2f}"
