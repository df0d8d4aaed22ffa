"""Output files of a sweep: results.json, a Markdown table and two figures."""

import json
import math
import statistics
import textwrap
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import EngFormatter

from experiments.common.figures import line_style, save_figure
from experiments.common.sweep import (
  TrialResult,
  Variant,
  best_learning_rate,
  evaluation_loss,
  evaluations,
)
from switchlora_jax.errors import UserError
from switchlora_jax.methods import switchlora
from switchlora_jax.parallel.sharding import make_mesh
from switchlora_jax.runs.files import replace_text
from switchlora_jax.training.phases import build_phase
from switchlora_jax.training.plots import label_steps, mark_hand_over
from switchlora_jax.training.report import bytes_of, describe_warnings, parameter_count

EDGE = "\n† best learning rate at the edge of the sweep; a wider sweep may find a better one\n"


def collect(variants, results: list[TrialResult], read_at: float, step_times: dict[str, float] | None = None) -> dict:
  """All measurements of a sweep as JSON values: `arms`, one row per variant, and `cells`, one entry per trial.

  Args:
    read_at: fraction of a run's steps at which its validation loss is compared.
    step_times: {label: time of a training step relative to full rank}, where measured.
  """
  times = step_times or {}
  rows = [
    variant_row(variant, [r for r in results if r.trial.variant is variant], read_at, times.get(variant.label))
    for variant in variants
  ]
  return {"read_at": read_at, "arms": rows, "cells": [trial_entry(r, read_at) for r in results]}


def variant_row(variant: Variant, results: list[TrialResult], read_at: float, step_time: float | None) -> dict:
  """One line of the table: a variant at its best learning rate."""
  config = results[0].trial.config
  best, first_seed = best_learning_rate(variant, results, read_at), results[0].trial.seed
  sweep = {r.trial.learning_rate: evaluation_loss(r, read_at) for r in results if r.trial.seed == first_seed}
  losses = [evaluation_loss(r, read_at) for r in results if r.trial.learning_rate == best]
  perplexities = [math.exp(loss) for loss in losses if math.isfinite(loss)]
  state = build_phase(config, make_mesh()).abstract
  return {
    "label": variant.label,
    "overrides": variant.overrides,
    "learning_rate": best,
    "at_edge_of_sweep": at_edge(best, sweep),
    "sweep": {f"{rate:g}": finite_or_none(math.exp(min(loss, 700))) for rate, loss in sorted(sweep.items())},
    "seeds": len(losses),
    "perplexities": perplexities,
    "mean": statistics.mean(perplexities) if perplexities else None,
    "std": statistics.stdev(perplexities) if len(perplexities) > 1 else None,
    "trainable_parameters": parameter_count(state.params),
    "optimizer_bytes": bytes_of(state.opt_state),
    "state_bytes": bytes_of((state.params, state.frozen, state.candidates, state.opt_state)),
    "warnings": describe_warnings(config),
    "candidates_cycled": switchlora.cycles(config) if config.method == "switchlora" else None,
    "hand_over": config.warm_start_steps if 0 < config.warm_start_steps < config.steps else None,
    "step_time": step_time,
    "paper": variant.paper,
  }


def trial_entry(result: TrialResult, read_at: float) -> dict:
  """One trial: its settings, its outcome and its validation losses, [step, nats per token]."""
  trial, rows = result.trial, evaluations(result.workdir)
  return {
    "name": trial.name,
    "label": trial.variant.label,
    "learning_rate": trial.learning_rate,
    "seed": trial.seed,
    "failure": result.failure,
    "val_loss": finite_or_none(evaluation_loss(result, read_at)),
    "curve": [[row["step"], row["val_loss"]] for row in rows],
    "learnt_rank": [[row["step"], row["learnt_rank"]] for row in rows if "learnt_rank" in row],
  }


def finite_or_none(number: float) -> float | None:
  """The number, or None for infinity, which JSON cannot hold."""
  return number if math.isfinite(number) and number < math.exp(700) else None


COLUMNS = {
  "": lambda row: row["label"],
  "validation perplexity": lambda row: format_perplexity(row),
  "learning rate": lambda row: format_learning_rate(row),
  "trainable parameters": lambda row: f"{row['trainable_parameters']:,}",
  "optimizer, MiB": lambda row: f"{row['optimizer_bytes'] / 2**20:,.2f}",
  "all state, MiB": lambda row: f"{row['state_bytes'] / 2**20:,.2f}",
  "step time / full rank": lambda row: format_number(row["step_time"]),
  "candidates cycled": lambda row: format_number(row["candidates_cycled"]),
  "paper": lambda row: format_number(row["paper"]),
}


def at_edge(rate: float | None, tried) -> bool:
  """Whether the best learning rate is the smallest or the largest of several."""
  return len(tried) > 1 and rate in (min(tried), max(tried))


def format_learning_rate(row: dict) -> str:
  """`0.02`, with a dagger at the edge of the sweep."""
  return f"{row['learning_rate']:g}{'†' * row['at_edge_of_sweep']}" if row["learning_rate"] else ""


def format_number(value: float | None) -> str:
  """Two decimals; empty for None."""
  return "" if value is None else f"{value:.2f}"


def format_perplexity(row: dict) -> str:
  """`38.01 ± 0.12 (3 seeds)`: mean, standard deviation, number of seeds; `(2 of 3 seeds)` if some diverged."""
  if row["mean"] is None:
    return "failed"
  good, seeds = len(row["perplexities"]), row["seeds"]
  spread = f" ± {row['std']:.2f}" if row["std"] is not None else ""
  among = f" ({good} of {seeds} seeds)" if good < seeds else f" ({seeds} seeds)" if seeds > 1 else ""
  return f"{row['mean']:.2f}{spread}{among}"


def results_table(results: dict) -> str:
  """The rows as a Markdown table without empty columns, followed by notes and warnings."""
  filled = {name: show for name, show in COLUMNS.items() if any(show(row) for row in results["arms"])}
  text = markdown([{name: show(row) for name, show in filled.items()} for row in results["arms"]])
  if any(row["at_edge_of_sweep"] for row in results["arms"]):
    text += EDGE
  warned = [f"{row['label']}: {warning}" for row in results["arms"] for warning in row["warnings"]]
  return text + "".join(f"\n{line}\n" for line in warned)


def markdown(rows) -> str:
  """Dictionaries with the same keys as a Markdown table."""
  lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
  return "\n".join(lines + ["| " + " | ".join(map(str, row.values())) + " |" for row in rows]) + "\n"


def conclude(
  variants, results: list[TrialResult], options: dict, title: str, step_times: dict[str, float] | None = None
):
  """Write all files, print the table and report failures.

  Args:
    options: the keyword arguments of `run_sweep`.
    title: of the figures.
    step_times: see `collect`.
  Raises:
    UserError: some trials failed. All files have been written.
  """
  collected, workdir = collect(variants, results, options["read_at"], step_times), options["workdir"]
  write_results(collected, workdir, title)
  print(f"\n{results_table(collected)}\nwritten to {workdir}: table.md, results.json,", end=" ")
  print("curves.png, parameters.png (and .svg); runs in cells/")
  if failed := [r.trial.name for r in results if r.failure]:
    count = f"{len(failed)} of {len(results)} runs failed"
    raise UserError(f"{count}: {', '.join(failed)}; repeat the same command to run only these again")


def write_results(results: dict, workdir: Path, title: str):
  """Write results.json, table.md, curves and parameters (each as .png and .svg) to `workdir`."""
  replace_text(workdir / "results.json", json.dumps(results, indent=1) + "\n")
  replace_text(workdir / "table.md", results_table(results))
  plot_curves(results, workdir / "curves.png", wrapped(title))
  plot_parameters(results, workdir / "parameters.png", wrapped(title))


def wrapped(text: str) -> str:
  """A title, or a label of a legend, in lines that fit the width of a figure."""
  return textwrap.fill(text, 84)


def plot_curves(results: dict, path: Path, title: str):
  """Validation loss over training steps, each variant at its best learning rate: mean and range over seeds."""
  figure, axes = plt.subplots(figsize=(9, 6))
  for number, row in enumerate(results["arms"]):
    trials = [t for t in results["cells"] if (t["label"], t["learning_rate"]) == (row["label"], row["learning_rate"])]
    curves = [dict(trial["curve"]) for trial in trials if not trial["failure"]]
    if not curves:
      continue
    steps = [step for step in curves[0] if all(step in curve for curve in curves)]
    losses = np.array([[curve[step] for step in steps] for curve in curves], float)  # None becomes nan
    style, label = line_style(number), wrapped(f"{row['label']}, learning rate {row['learning_rate']:g}")
    axes.plot(steps, losses.mean(0), **style, markersize=5, label=label)
    axes.fill_between(steps, losses.min(0), losses.max(0), color=style["color"], alpha=0.2, linewidth=0)
  for step in sorted({row["hand_over"] for row in results["arms"] if row.get("hand_over")}):
    mark_hand_over(axes, step)
  axes.set(ylabel="validation loss (nats per token)", title=title)
  label_steps(axes)
  finish(figure, axes, path)


def plot_parameters(results: dict, path: Path, title: str):
  """Perplexity over the number of trainable parameters, with the standard deviation over seeds."""
  figure, axes = plt.subplots(figsize=(9, 6))
  for number, row in enumerate(results["arms"]):
    if row["mean"] is not None:
      style = line_style(number) | {"linestyle": "none"}
      point = row["trainable_parameters"], row["mean"]
      axes.errorbar(*point, yerr=row["std"] or 0, **style, markersize=8, capsize=3, label=wrapped(row["label"]))
  axes.xaxis.set_major_formatter(EngFormatter())  # 1.2 M
  axes.set(xlabel="number of trainable parameters", ylabel="validation perplexity", title=title)
  finish(figure, axes, path)


def finish(figure, axes, path: Path):
  """Add the grid and the legend, and write the figure."""
  axes.grid(alpha=0.3)
  if axes.get_legend_handles_labels()[0]:
    axes.legend(fontsize="small")
  figure.tight_layout()
  save_figure(figure, path)
