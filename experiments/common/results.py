"""What a grid leaves behind: results.json, a Markdown table, and two pictures."""

import json
import math
import statistics
import textwrap
from pathlib import Path

import matplotlib
import numpy as np

from experiments.common.grid import Arm, Ran, best_of, evaluations, read_loss, warnings
from switchlora_jax.errors import UserError
from switchlora_jax.methods import switchlora
from switchlora_jax.parallel.sharding import make_mesh
from switchlora_jax.runs.files import replace_text
from switchlora_jax.training.phases import build_phase
from switchlora_jax.training.report import bytes_of, parameter_count

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import EngFormatter

EDGE = "\n† the best learning rate lies at the edge of the sweep; a wider one may find a better\n"


def collect(arms, ran: list[Ran], read_at: float, step_times: dict[str, float] | None = None) -> dict:
  """Everything measured, as JSON: a row an arm, and every cell with its curve.

  Args:
    step_times: {label: time of a training step relative to full rank}, where it was measured.
  """
  rows = [row(arm, [r for r in ran if r.cell.arm is arm], read_at, (step_times or {}).get(arm.label)) for arm in arms]
  return {"read_at": read_at, "arms": rows, "cells": [cell(r, read_at) for r in ran]}


def row(arm: Arm, ran: list[Ran], read_at: float, step_time: float | None) -> dict:
  """One line of the table: an arm at its best learning rate."""
  config = ran[0].cell.config
  best, first_seed = best_of(arm, ran, read_at), ran[0].cell.seed
  sweep = {r.cell.learning_rate: read_loss(r, read_at) for r in ran if r.cell.seed == first_seed}
  losses = [read_loss(r, read_at) for r in ran if r.cell.learning_rate == best]
  perplexities = [math.exp(loss) for loss in losses if math.isfinite(loss)]
  state = build_phase(config, make_mesh()).abstract
  return {
    "label": arm.label,
    "overrides": arm.overrides,
    "learning_rate": best,
    "at_edge_of_sweep": at_edge(best, sweep),
    "sweep": {f"{rate:g}": finite(math.exp(min(loss, 700))) for rate, loss in sorted(sweep.items())},
    "seeds": len(losses),
    "perplexities": perplexities,
    "mean": statistics.mean(perplexities) if perplexities else None,
    "std": statistics.stdev(perplexities) if len(perplexities) > 1 else None,
    "trainable_parameters": parameter_count(state.params),
    "optimizer_bytes": bytes_of(state.opt_state),
    "state_bytes": bytes_of((state.params, state.frozen, state.candidates, state.opt_state)),
    "warnings": warnings(config),
    "candidates_cycled": switchlora.cycles(config) if config.method == "switchlora" else None,
    "step_time": step_time,
    "paper": arm.paper,
  }


def cell(ran: Ran, read_at: float) -> dict:
  """One run: what it was, how it ended, and its validation losses."""
  rows = evaluations(ran.workdir)
  return {
    "name": ran.cell.name,
    "label": ran.cell.arm.label,
    "learning_rate": ran.cell.learning_rate,
    "seed": ran.cell.seed,
    "failure": ran.failure,
    "val_loss": finite(read_loss(ran, read_at)),
    "curve": [[row["step"], row["val_loss"]] for row in rows],
    "learnt_rank": [[row["step"], row["learnt_rank"]] for row in rows if "learnt_rank" in row],
  }


def finite(number: float) -> float | None:
  """JSON has no infinity."""
  return number if math.isfinite(number) and number < math.exp(700) else None


COLUMNS = {
  "": lambda row: row["label"],
  "validation perplexity": lambda row: perplexity(row),
  "learning rate": lambda row: learning_rate(row),
  "trainable parameters": lambda row: f"{row['trainable_parameters']:,}",
  "optimizer, MiB": lambda row: f"{row['optimizer_bytes'] / 2**20:,.2f}",
  "all state, MiB": lambda row: f"{row['state_bytes'] / 2**20:,.2f}",
  "step time / full rank": lambda row: number(row["step_time"]),
  "candidates cycled": lambda row: number(row["candidates_cycled"]),
  "paper": lambda row: number(row["paper"]),
}


def at_edge(rate: float | None, tried) -> bool:
  """Whether the best learning rate is the least or the greatest of several."""
  return len(tried) > 1 and rate in (min(tried), max(tried))


def learning_rate(row: dict) -> str:
  """`0.02`, with a dagger at the edge of the sweep."""
  return f"{row['learning_rate']:g}{'†' * row['at_edge_of_sweep']}" if row["learning_rate"] else ""


def number(value: float | None) -> str:
  """Two digits, or nothing."""
  return "" if value is None else f"{value:.2f}"


def perplexity(row: dict) -> str:
  """`38.01 ± 0.12 (3 seeds)`: mean, standard deviation and number of seeds; `(2 of 3 seeds)` where one has none."""
  if row["mean"] is None:
    return "failed"
  good, seeds = len(row["perplexities"]), row["seeds"]
  spread = f" ± {row['std']:.2f}" if row["std"] is not None else ""
  among = f" ({good} of {seeds} seeds)" if good < seeds else f" ({seeds} seeds)" if seeds > 1 else ""
  return f"{row['mean']:.2f}{spread}{among}"


def table(results: dict) -> str:
  """The rows in Markdown, without the columns that are empty."""
  filled = {name: show for name, show in COLUMNS.items() if any(show(row) for row in results["arms"])}
  text = markdown([{name: show(row) for name, show in filled.items()} for row in results["arms"]])
  if any(row["at_edge_of_sweep"] for row in results["arms"]):
    text += EDGE
  warned = [f"{row['label']}: {warning}" for row in results["arms"] for warning in row["warnings"]]
  return text + "".join(f"\n{line}\n" for line in warned)


def markdown(rows) -> str:
  """Rows with the same keys as a Markdown table."""
  lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
  return "\n".join(lines + ["| " + " | ".join(map(str, row.values())) + " |" for row in rows]) + "\n"


def conclude(arms, ran: list[Ran], options: dict, title: str, step_times: dict[str, float] | None = None):
  """Write everything, print the table, and say what failed.

  Raises:
    UserError: some runs failed; after everything was written.
  """
  results, workdir = collect(arms, ran, options["read_at"], step_times), options["workdir"]
  write(results, workdir, title)
  print(f"\n{table(results)}\nwritten to {workdir}: table.md, results.json, curves.png, parameters.png; runs in cells/")
  if failed := [r.cell.name for r in ran if r.failure]:
    raise UserError(f"{len(failed)} of {len(ran)} runs failed: {', '.join(failed)}; the same command tries them again")


def write(results: dict, workdir: Path, title: str):
  """Leave results.json, table.md, curves.png and parameters.png in `workdir`."""
  replace_text(workdir / "results.json", json.dumps(results, indent=1) + "\n")
  replace_text(workdir / "table.md", table(results))
  title = textwrap.fill(title, 84)  # characters above a picture
  plot_curves(results, workdir / "curves.png", title)
  plot_parameters(results, workdir / "parameters.png", title)


def plot_curves(results: dict, path: Path, title: str):
  """Validation loss against the step, each arm at its best learning rate: mean, and the band of all seeds."""
  figure, axes = plt.subplots(figsize=(9, 6))
  for arm in results["arms"]:
    chosen = [c for c in results["cells"] if c["label"] == arm["label"] and c["learning_rate"] == arm["learning_rate"]]
    curves = [dict(c["curve"]) for c in chosen if not c["failure"]]
    if not curves:
      continue
    steps = [step for step in curves[0] if all(step in curve for curve in curves)]
    losses = np.array([[curve[step] for step in steps] for curve in curves], float)  # None becomes nan
    (line,) = axes.plot(steps, losses.mean(0), marker=".", label=f"{arm['label']}, lr {arm['learning_rate']:g}")
    axes.fill_between(steps, losses.min(0), losses.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
  axes.set(xlabel="step", ylabel="validation loss (nats per token)", title=title)
  finish(figure, axes, path)


def plot_parameters(results: dict, path: Path, title: str):
  """Perplexity against trainable parameters, with the standard deviation over seeds."""
  figure, axes = plt.subplots(figsize=(9, 6))
  for arm in results["arms"]:
    if arm["mean"] is not None:
      place = arm["trainable_parameters"], arm["mean"]
      axes.errorbar(*place, yerr=arm["std"] or 0, fmt="o", capsize=3, label=arm["label"])
  axes.xaxis.set_major_formatter(EngFormatter())  # 1.2 M
  axes.set(xlabel="trainable parameters", ylabel="validation perplexity", title=title)
  finish(figure, axes, path)


def finish(figure, axes, path: Path):
  """Grid, legend, file."""
  axes.grid(alpha=0.3)
  if axes.get_legend_handles_labels()[0]:
    axes.legend(fontsize="small")
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  plt.close(figure)
