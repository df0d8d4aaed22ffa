"""Output files of a sweep: its measurements in results.json, and the table and the figures that are made from them."""

import functools
import math
import statistics
from collections.abc import Callable
from pathlib import Path

from ml_collections import FrozenConfigDict

from experiments.common import search, stored
from experiments.common.outcomes import TrialResult, evaluation_loss, evaluation_step, read_metrics, trial_evaluations
from experiments.common.paired import paired_difference
from experiments.common.results_figures import plot_curves, plot_parameters, plot_rates, swept_rows, wrapped
from experiments.common.results_table import results_table
from experiments.common.stored import cell_point, point_key
from experiments.common.trials import Variant
from switchlora_jax.errors import UserError
from switchlora_jax.lowrank.layers import STORED
from switchlora_jax.methods import switchlora
from switchlora_jax.parallel.sharding import make_mesh
from switchlora_jax.runs import directory as run_directory
from switchlora_jax.runs.files import replace_text
from switchlora_jax.training import evaluation
from switchlora_jax.training.phases import build_phase
from switchlora_jax.training.report import bytes_of, describe_warnings, parameter_count


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
      row = variant_row(variant, own[0][0], [entry for _, entry in own], times.get(variant.label), read_at)
      rows.append(row)
  add_differences(rows, entries, reference)
  return stored.with_shared_config({"read_at": read_at, "reference": reference, "arms": rows, "cells": entries})


def variant_row(variant: Variant, config, cells: list[dict], step_time: float | None, read_at: float) -> dict:
  """One line of the table: a variant at its best learning rates.

  Args:
    config: the resolved config of one of its trials.
    cells: the entries of its trials, from `trial_entry`.
    read_at: as for `collect`.
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
    "further": mean_further(at_best, evaluation_step(config, read_at)),
    "tokens": median_of(at_best, "tokens") or (None if config.data.packing == "pad" else positions),
    **{key: median_of(timed, key) for key in ("seconds", "step_seconds", "tokens_per_second", "peak_memory_bytes")},
    "devices": sorted({cell["devices"] for cell in timed}),
    **sizes(FrozenConfigDict(config.to_dict() | {"seed": 0, "learning_rate": 1.0, "rest_learning_rate": 1.0})),
    "warnings": describe_warnings(config),
    "candidates_cycled": switchlora.cycles(config) if _cycles_candidates(config) else None,
    "hand_over": config.warm_start_steps if 0 < config.warm_start_steps < config.steps else None,
    "step_time": step_time,
    "paper": variant.paper,
  }


def _cycles_candidates(config) -> bool:
  """Whether candidates come back, and their number follows from the config."""
  kinds = config.switch.candidates, config.switch.slots
  return config.method == "switchlora" and kinds == (STORED, switchlora.SEQUENTIAL)


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
    "further": further_curves(rows),
    "learnt_rank": [[row["step"], row["learnt_rank"]] for row in rows if "learnt_rank" in row],
    **run_costs(result.workdir, trial.config),
    "devices": saved and saved["devices"],
    "data_fingerprint": saved and saved["data_fingerprint"],
    "eval_also": saved.get("eval_also", {}) if saved else {},
    "config": stored.config_keys(trial.config),
  }


def further_curves(rows: list[dict]) -> dict[str, list]:
  """{label: [step, perplexity] of each evaluation} of the further validation texts."""
  found = {}
  for row in rows:
    for label, perplexity in evaluation.further(row).items():
      found.setdefault(label, []).append([row["step"], perplexity])
  return found


def mean_further(cells: list[dict], step: int) -> dict[str, dict]:
  """{label: mean, standard deviation and number} of the finite perplexities of further validation texts at a step."""
  found, curves = {}, [cell.get("further", {}) for cell in cells]
  for label in {label: None for curve in curves for label in curve}:
    values = [value for curve in curves for at, value in curve.get(label, ()) if at == step and value is not None]
    if values:
      spread = statistics.stdev(values) if len(values) > 1 else None
      found[label] = {"mean": statistics.mean(values), "std": spread, "seeds": len(values)}
  return found


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
