"""Output files of a sweep: results.json, and what is drawn from it: a Markdown table and figures."""

import functools
import math
import statistics
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import LogNorm
from matplotlib.ticker import EngFormatter
from ml_collections import FrozenConfigDict

from experiments.common import search, stored
from experiments.common.figures import line_style, save_figure
from experiments.common.paired import LEAST_SEEDS, paired_difference
from experiments.common.search import Point
from experiments.common.sweep import TrialResult, Variant, evaluation_loss, read_metrics, trial_evaluations
from switchlora_jax.errors import UserError
from switchlora_jax.methods import switchlora
from switchlora_jax.parallel.sharding import make_mesh
from switchlora_jax.runs import directory as run_directory
from switchlora_jax.runs.files import replace_text
from switchlora_jax.training.phases import build_phase
from switchlora_jax.training.plots import label_steps, mark_hand_over
from switchlora_jax.training.report import bytes_of, describe_warnings, parameter_count

EDGE = "\n† best learning rate at the edge of the sweep; a wider sweep may find a better one\n"
TESTED = f"""
difference: mean over seeds of the validation loss minus that of {{reference}}, in nats per token, ± its standard error.
The difference is the logarithm of the ratio of the perplexities. p: two-sided paired t-test over the seeds, which share
the order of the data; not corrected for the number of rows. The first seed also selected the learning rates. Rows with
fewer than {LEAST_SEEDS} common seeds, with a diverged seed or at the edge of their sweep are not compared.
"""
GRADIENTS = "\ngradients: bytes that a data-parallel step all-reduces; each of n devices sends 2(n - 1)/n of them\n"
TIMES = """
training time: of one run, with compilation, without evaluations and checkpoints; step: its median. Other processes on
the machine, such as concurrent runs, are included in both.
"""


def collect(
  variants,
  results: list[TrialResult],
  read_at: float,
  step_times: dict[str, float] | None = None,
  reference: str | None = None,
) -> dict:
  """All measurements of a sweep as JSON values: `arms`, one row per variant, and `cells`, one entry per trial.

  A variant without results has no row.

  Args:
    read_at: fraction of a run's steps at which its validation loss is compared.
    step_times: {label: time of a training step relative to full rank}, where measured.
    reference: label of the variant that the others are compared with by `paired_difference`; None: no comparison.
  """
  times, entries = step_times or {}, [trial_entry(result, read_at) for result in results]
  rows = []
  for variant in variants:
    own = [(r.trial.config, entry) for r, entry in zip(results, entries, strict=True) if r.trial.variant is variant]
    if own:
      rows.append(variant_row(variant, own[0][0], [entry for _, entry in own], times.get(variant.label)))
  add_differences(rows, entries, reference)
  return stored.with_shared_config({"read_at": read_at, "reference": reference, "arms": rows, "cells": entries})


def variant_row(variant: Variant, config, cells: list[dict], step_time: float | None) -> dict:
  """One line of the table: a variant at its best learning rates.

  Args:
    config: the resolved config of one of its trials.
    cells: the entries of its trials, from `trial_entry`.
  """
  first_seed = [cell for cell in cells if cell["seed"] == min(cell["seed"] for cell in cells)]
  losses = {cell_point(cell): math.inf if cell["val_loss"] is None else cell["val_loss"] for cell in first_seed}
  best = search.best_point(losses)
  at_edges = search.edges({cell_point(c): losses[cell_point(c)] for c in first_seed if not c["failure"]})
  seeds = {cell["seed"]: cell["val_loss"] for cell in cells if best and cell_point(cell) == best}
  perplexities = [math.exp(loss) for loss in seeds.values() if loss is not None]
  at_best = [cell for cell in cells if best and cell_point(cell) == best and not cell["failure"]]
  timed = [cell for cell in at_best if cell["step_seconds"]]
  positions = config.steps * config.batch_size * config.seq_len
  return {
    "label": variant.label,
    "overrides": variant.overrides,
    "learning_rate": best and best[0],
    "rest_learning_rate": best and best[1],
    "at_edge_of_sweep": any(at_edges),
    "edges": list(at_edges),
    "sweep": {point_key(point): finite_or_none(math.exp(min(losses[point], 700))) for point in sorted(losses)},
    "seeds": len(seeds),
    "perplexities": perplexities,
    "mean": statistics.mean(perplexities) if perplexities else None,
    "std": statistics.stdev(perplexities) if len(perplexities) > 1 else None,
    "tokens": median_of(at_best, "tokens") or (None if config.data.packing == "pad" else positions),
    **{key: median_of(timed, key) for key in ("seconds", "step_seconds", "tokens_per_second", "peak_memory_bytes")},
    "devices": sorted({cell["devices"] for cell in timed}),
    **sizes(FrozenConfigDict(config.to_dict() | {"seed": 0, "learning_rate": 1.0, "rest_learning_rate": 1.0})),
    "warnings": describe_warnings(config),
    "candidates_cycled": switchlora.cycles(config) if config.method == "switchlora" else None,
    "hand_over": config.warm_start_steps if 0 < config.warm_start_steps < config.steps else None,
    "step_time": step_time,
    "paper": variant.paper,
  }


@functools.cache
def sizes(config) -> dict[str, int]:
  """Sizes of the train state of a resolved config, and of its gradients; nothing is allocated."""
  state = build_phase(config, make_mesh()).abstract
  return {
    "trainable_parameters": parameter_count(state.params),
    "gradient_bytes": bytes_of(state.params),
    "optimizer_bytes": bytes_of(state.opt_state),
    "state_bytes": bytes_of((state.params, state.frozen, state.candidates, state.opt_state)),
  }


def median_of(cells: list[dict], key: str) -> float | None:
  """The median of a number over the trials that have it."""
  found = [cell[key] for cell in cells if cell.get(key) is not None]
  return statistics.median(found) if found else None


def cell_point(cell: dict) -> Point:
  """The place of an entry of results.json in the sweep of its variant."""
  return cell["learning_rate"], cell.get("rest_learning_rate")


def point_key(point: Point) -> str:
  """`0.002`, or `0.002, 0.01`: the learning rate, and that of embedding, norms and head if it is swept."""
  return ", ".join(f"{rate:g}" for rate in point if rate is not None)


def add_differences(rows: list[dict], cells: list[dict], reference: str | None) -> None:
  """Add `difference` to each row: the `paired_difference` to the reference at the best learning rates, or None.

  Seeds are paired if both runs had the same data. The reference itself is not compared.
  """
  best = {row["label"]: (row["learning_rate"], row["rest_learning_rate"]) for row in rows}
  own = {label: [c for c in cells if c["label"] == label and cell_point(c) == best[label]] for label in best}
  data = {label: {cell["data_fingerprint"] for cell in found} for label, found in own.items()}
  losses = {label: {cell["seed"]: cell["val_loss"] for cell in found} for label, found in own.items()}
  for row in rows:
    label = row["label"]
    compared = reference in own and label != reference and data[label] == data[reference] and len(data[label]) == 1
    found = paired_difference(losses[label], losses[reference]) if compared else None
    row["difference"] = found and found._asdict()


def trial_entry(result: TrialResult, read_at: float) -> dict:
  """One trial: its settings, its outcome, its validation losses, [step, nats per token], and its times.

  The entry of a trial that was finished in results.json is kept; only its loss is read at `read_at`.
  """
  trial, loss = result.trial, finite_or_none(evaluation_loss(result, read_at))
  if result.cell:
    return result.cell | {"label": trial.variant.label, "val_loss": loss}
  rows = trial_evaluations(result)
  saved = None if result.failure else run_directory.read(result.workdir)
  return {
    "name": trial.name,
    "label": trial.variant.label,
    "learning_rate": trial.learning_rate,
    "rest_learning_rate": trial.rest_learning_rate,
    "seed": trial.seed,
    "failure": result.failure,
    "val_loss": loss,
    "curve": [[row["step"], row["val_loss"]] for row in rows],
    "learnt_rank": [[row["step"], row["learnt_rank"]] for row in rows if "learnt_rank" in row],
    **run_costs(result.workdir, trial.config),
    "devices": saved and saved["devices"],
    "data_fingerprint": saved and saved["data_fingerprint"],
    "config": stored.config_keys(trial.config),
  }


def run_costs(workdir: Path, config) -> dict[str, float | None]:
  """Tokens, times and peak memory of a run from its metrics; None if it logged no training step.

  Returns:
    tokens: number of training tokens, without padding; seconds: sum over the steps; step_seconds, tokens_per_second:
    medians; peak_memory_bytes: maximum.
  """
  rows = [row for row in read_metrics(workdir)[1] if row["tokens_per_second"]]
  if not rows:
    return dict.fromkeys(("tokens", "seconds", "step_seconds", "tokens_per_second", "peak_memory_bytes"))
  tokens = [row.get("tokens", config.batch_size * config.seq_len) for row in rows]
  seconds = [count / row["tokens_per_second"] for count, row in zip(tokens, rows, strict=True)]
  return {
    "tokens": sum(tokens),
    "seconds": round(sum(seconds), 3),
    "step_seconds": float(f"{statistics.median(seconds):.4g}"),
    "tokens_per_second": statistics.median(row["tokens_per_second"] for row in rows),
    "peak_memory_bytes": max((row["peak_memory_bytes"] for row in rows if row.get("peak_memory_bytes")), default=None),
  }


def finite_or_none(number: float) -> float | None:
  """The number, or None for infinity, which JSON cannot hold."""
  return number if math.isfinite(number) and number < math.exp(700) else None


COLUMNS = {
  "": lambda row: row["label"],
  "validation perplexity": lambda row: format_perplexity(row),
  "learning rate": lambda row: format_learning_rate(row, 0),
  "of embedding, norms, head": lambda row: format_learning_rate(row, 1),
  "rates tried": lambda row: str(len(row["sweep"])) if len(row["sweep"]) > 1 else "",
  "difference": lambda row: format_difference(row),
  "p": lambda row: format_p(row),
  "tokens": lambda row: format_count(row.get("tokens")),
  "training time, s": lambda row: format_significant(row.get("seconds")),
  "step, ms": lambda row: format_significant(row.get("step_seconds"), 1000),
  "tokens / s": lambda row: format_count(row.get("tokens_per_second")),
  "peak memory, MiB": lambda row: format_count(row.get("peak_memory_bytes"), 2**-20),
  "trainable parameters": lambda row: f"{row['trainable_parameters']:,}",
  "optimizer, MiB": lambda row: f"{row['optimizer_bytes'] / 2**20:,.2f}",
  "all state, MiB": lambda row: f"{row['state_bytes'] / 2**20:,.2f}",
  "gradients, MiB": lambda row: f"{row['gradient_bytes'] / 2**20:,.2f}" if "gradient_bytes" in row else "",
  "step time / full rank": lambda row: format_number(row["step_time"]),
  "candidates cycled": lambda row: format_number(row["candidates_cycled"]),
  "paper": lambda row: format_number(row["paper"]),
}


def at_edge(rate: float | None, tried) -> bool:
  """Whether the best learning rate is the smallest or the largest of several."""
  return len(tried) > 1 and rate in (min(tried), max(tried))


def format_learning_rate(row: dict, dimension: int) -> str:
  """`0.02`, with a dagger at the edge of the sweep; dimension 1 is the rate of embedding, norms and head."""
  rate = (row["learning_rate"], row.get("rest_learning_rate"))[dimension]
  edge = row.get("edges", [row["at_edge_of_sweep"], False])[dimension]
  return f"{rate:g}{'†' * edge}" if rate else ""


def format_difference(row: dict) -> str:
  """`+0.0123 ± 0.0040`; empty if the row is not compared, see `TESTED`."""
  found = row.get("difference")
  return f"{found['mean']:+.4f} ± {found['standard_error']:.4f}" if found else ""


def format_p(row: dict) -> str:
  """`0.034`, or `< 0.001`; empty if the row is not compared."""
  p = (row.get("difference") or {}).get("p")
  return "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def format_count(value: float | None, factor: float = 1) -> str:
  """An integer with separators of thousands; empty for None."""
  return "" if value is None else f"{value * factor:,.0f}"


def format_significant(value: float | None, factor: float = 1) -> str:
  """Three significant digits, without exponent; empty for None."""
  return "" if value is None else f"{float(f'{value * factor:.3g}'):,g}"


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
  rows = [refuse_comparison(row, results) for row in results["arms"]]
  filled = {name: show for name, show in COLUMNS.items() if any(show(row) for row in rows)}
  text = markdown([{name: show(row) for name, show in filled.items()} for row in rows])
  if any(row["at_edge_of_sweep"] for row in rows):
    text += EDGE
  if "difference" in filled:
    text += TESTED.format(reference=results["reference"])
  if "gradients, MiB" in filled:
    text += GRADIENTS
  if "training time, s" in filled:
    text += TIMES
  if len(devices := {name for row in rows for name in row.get("devices", ())}) > 1:
    text += f"\ntimes are of runs on different devices: {', '.join(sorted(devices))}\n"
  warned = [f"{row['label']}: {warning}" for row in rows for warning in row["warnings"]]
  return text + "".join(f"\n{line}\n" for line in warned)


def refuse_comparison(row: dict, results: dict) -> dict:
  """The row without its difference to the reference if one of both is at the edge of its sweep, unless allowed."""
  edges = {row["label"] for row in results["arms"] if row["at_edge_of_sweep"]}
  refused = {row["label"], results.get("reference")} & edges and not results.get("allow_edges")
  return row | {"difference": None} if refused else row


def markdown(rows) -> str:
  """Dictionaries with the same keys as a Markdown table."""
  lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
  return "\n".join(lines + ["| " + " | ".join(map(str, row.values())) + " |" for row in rows]) + "\n"


def recorder(variants, options: dict, title: str) -> Callable[[list[TrialResult]], None]:
  """A function that writes the results so far to results.json; see `run_sweep`. Arguments as for `conclude`."""
  return lambda results: stored.write_results_json(describe(variants, results, options, title), options["workdir"])


def describe(variants, results: list[TrialResult], options: dict, title: str, step_times=None) -> dict:
  """The contents of results.json; arguments as for `conclude`."""
  collected = collect(variants, results, options["read_at"], step_times, options.get("reference"))
  return collected | {"title": title, "allow_edges": options.get("allow_edges", True)}


def conclude(
  variants, results: list[TrialResult], options: dict, title: str, step_times: dict[str, float] | None = None
):
  """Write all files, print the table and report failures.

  Args:
    options: the keyword arguments of `run_sweep`, and optionally `reference`, see `collect`, and `allow_edges`, whether
      a best learning rate may be at the edge of its sweep; by default it may.
    title: of the figures.
    step_times: see `collect`.
  Raises:
    UserError: some trials failed, or a best learning rate is at an edge. All files have been written.
  """
  collected, workdir = describe(variants, results, options, title, step_times), options["workdir"]
  write_results(collected, workdir, title)
  print_results(collected, workdir)
  if failed := [r.trial.name for r in results if r.failure]:
    count = f"{len(failed)} of {len(results)} runs failed"
    raise UserError(f"{count}: {', '.join(failed)}; repeat the same command to run only these again")
  edges = [row["label"] for row in collected["arms"] if row["at_edge_of_sweep"]]
  if edges and not collected["allow_edges"]:
    raise UserError(
      f"the best learning rate is at the edge of its sweep for {'; '.join(edges)}, so these rows cannot be compared; "
      "raise --extend or give further rates, and the same command continues; or pass --allow_edges"
    )


def print_results(results: dict, workdir: Path):
  """Print the table and the names of the files."""
  print(f"\n{results_table(results)}\nwritten to {workdir}: table.md, results.json,", end=" ")
  rates = "rates.png, " if swept_rows(results) else ""
  print(f"curves.png, {rates}parameters.png (and .svg); runs in cells/")


def write_results(results: dict, workdir: Path, title: str):
  """Write results.json and what is drawn from it to `workdir`."""
  stored.write_results_json(results, workdir)
  draw_results(results, workdir, title)


def draw_results(results: dict, workdir: Path, title: str):
  """Write table.md, curves and parameters, and rates of a sweep of both rates (as .png and .svg) to `workdir`."""
  replace_text(workdir / "table.md", results_table(results))
  plot_curves(results, workdir / "curves.png", wrapped(title))
  plot_parameters(results, workdir / "parameters.png", wrapped(title))
  if swept_rows(results):
    plot_rates(results, workdir / "rates.png", wrapped(title))


def redraw(workdir: Path):
  """Write and print again what is drawn from results.json, which alone is needed.

  Raises:
    UserError: there is no results.json, or it has no finished trial.
  """
  results = stored.read_results(workdir)
  if not results or not results["arms"]:
    raise UserError(f"--workdir={workdir} must hold the results.json of a sweep with at least one finished run")
  draw_results(results, workdir, results.get("title", workdir.name))
  print_results(results, workdir)


def wrapped(text: str) -> str:
  """A title, or a label of a legend, in lines that fit the width of a figure."""
  return textwrap.fill(text, 84)


def plot_curves(results: dict, path: Path, title: str):
  """Validation loss over training steps, each variant at its best learning rate: mean and range over seeds."""
  figure, axes = plt.subplots(figsize=(9, 6))
  for number, row in enumerate(results["arms"]):
    trials = [t for t in results["cells"] if t["label"] == row["label"] and cell_point(t) == cell_point(row)]
    curves = [dict(trial["curve"]) for trial in trials if not trial["failure"]]
    if not curves:
      continue
    steps = [step for step in curves[0] if all(step in curve for curve in curves)]
    losses = np.array([[curve[step] for step in steps] for curve in curves], float)  # None becomes nan
    style, label = line_style(number), wrapped(f"{row['label']}, learning rate {point_key(cell_point(row))}")
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


def swept_rows(results: dict) -> list[dict]:
  """The rows of variants whose first seed was trained at several rates of embedding, norms and head."""
  rates = lambda row: {c.get("rest_learning_rate") for c in results["cells"] if c["label"] == row["label"]}
  return [row for row in results["arms"] if len(rates(row)) > 1]


def plot_rates(results: dict, path: Path, title: str):
  """Perplexity of the first seed over both learning rates, one panel per variant; the best is framed."""
  rows = swept_rows(results)
  across = min(3, len(rows))
  down = -(-len(rows) // across)
  figure, panels = plt.subplots(down, across, figsize=(4.6 * across, 3.8 * down + 0.6), squeeze=False)
  for axes in panels.flat[len(rows) :]:
    axes.set_axis_off()
  for row, axes in zip(rows, panels.flat, strict=False):
    plot_rates_of(row, [cell for cell in results["cells"] if cell["label"] == row["label"]], axes)
  figure.suptitle(title, fontsize="medium")
  figure.tight_layout()
  save_figure(figure, path)


def plot_rates_of(row: dict, cells: list[dict], axes):
  """The panel of one variant; points that have not run are empty."""
  seed = min(cell["seed"] for cell in cells)
  losses = {cell_point(cell): cell["val_loss"] for cell in cells if cell["seed"] == seed and not cell["failure"]}
  rates, rests = (sorted({point[dimension] for point in losses}) for dimension in (0, 1))
  image = np.full((len(rests), len(rates)), np.nan)
  for (rate, rest), loss in losses.items():
    x, y = rates.index(rate), rests.index(rest)
    image[y, x] = math.nan if loss is None else math.exp(loss)
    shown = "diverged" if loss is None else f"{image[y, x]:.4g}"
    axes.text(x, y, shown, ha="center", va="center", fontsize="small", bbox=dict(fc="white", ec="none", alpha=0.7))
  if (low := np.nanmin(image, initial=np.inf)) < np.inf:
    norm = LogNorm(low, max(min(np.nanmax(image), 2 * low), low * 1.001))
    axes.imshow(image, norm=norm, cmap="viridis_r", origin="lower", aspect="auto")
  best = cell_point(row)
  if best in losses:
    corner = rates.index(best[0]) - 0.5, rests.index(best[1]) - 0.5
    axes.add_patch(plt.Rectangle(corner, 1, 1, fill=False, edgecolor="red", linewidth=2.5))
  axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates], rotation=30)
  axes.set_yticks(range(len(rests)), [f"{rest:g}" for rest in rests])
  axes.set(xlabel="learning rate", ylabel="of embedding, norms, head", title=wrapped(row["label"]))


def finish(figure, axes, path: Path):
  """Add the grid and the legend, and write the figure."""
  axes.grid(alpha=0.3)
  if axes.get_legend_handles_labels()[0]:
    axes.legend(fontsize="small")
  figure.tight_layout()
  save_figure(figure, path)
