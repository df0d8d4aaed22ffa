"""Singular values of trained weights W and of their change W − W₀, per kind of layer: a table and figures."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D

from experiments.common import cli
from experiments.common.figures import line_style, save_figure
from experiments.common.results_table import markdown
from switchlora_jax.analysis.ranks import KINDS, effective_ranks, ranks, singular_values
from switchlora_jax.errors import UserError
from switchlora_jax.interop.pretrained import full_precision, restore_weights
from switchlora_jax.methods import LOW_RANK
from switchlora_jax.models import weights
from switchlora_jax.parallel.sharding import make_mesh
from switchlora_jax.progress import progress_bar
from switchlora_jax.runs.directory import SavedRun
from switchlora_jax.runs.files import replace_text
from switchlora_jax.training import metrics
from switchlora_jax.training.phases import build_phases
from switchlora_jax.training.plots import label_steps

log = logging.getLogger(__name__)

NO_START = "it started from another run's weights (warm_start_from), so W₀ cannot be recomputed from the seed"
PROJECTIONS = {"q": "query", "k": "key", "v": "value", "o": "attention output"}
RANK_LINES = {"-": "effective rank", "--": "numerical rank"}


def measure_spectra(run: SavedRun) -> dict[str, Any]:
  """The spectra of a run as JSON values.

  Returns:
    run, method, rank: identify the run. step: that of its newest readable checkpoint.
    weights: {kind of layer: `spectrum_entry` of its merged weights at that step}.
    learnt: {step of a checkpoint: the same for W_t - W_0}; empty if W_0 cannot be recomputed.
    learnt_rank: [step, mean effective rank] pairs recorded during training.
  """
  run, learnt = run.alone(), {}
  config, start = run.config, initial_kernels(run)
  for step, now in kernels_over_training(run):
    found = {kind: singular_values(now[kind]) for kind in KINDS}
    if start:
      learnt[step] = {kind: change_entry(start[kind], now[kind], found[kind]) for kind in KINDS}
  rows = metrics.read(run.directory / "metrics.jsonl")
  return {
    "run": run.directory.name,
    "method": config.method,
    "rank": config.rank if config.method in LOW_RANK else None,
    "step": step,
    "weights": {kind: spectrum_entry(values) for kind, values in found.items()},
    "learnt": learnt,
    "learnt_rank": [[row["step"], row["learnt_rank"]] for row in rows if row.get("learnt_rank") is not None],
  }


def initial_kernels(run: SavedRun) -> dict[str, np.ndarray] | None:
  """`merged_kernels` at step 0, recomputed from the seed; None if the run started from other weights."""
  with run.missing_key_as_error(), full_precision(run.config.param_dtype):
    first = build_phases(run.config, one_device())[0]
    return None if run.config.warm_start_from else merged_kernels(first.create(), first.scale)


def kernels_over_training(run: SavedRun) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
  """Yield (step, `merged_kernels`) of each checkpoint, oldest first; skips damaged and deleted checkpoints.

  Raises:
    UserError: no checkpoint can be read.
  """
  failures = []
  for step in run.steps:
    try:
      with full_precision(run.config.param_dtype):
        state = restore_weights(run, step)
        found = merged_kernels(state, state.scale)
    except UserError as error:
      log.warning("step %d is skipped: %s", step, error)
      failures.append(error)
      continue
    yield step, found
  if len(failures) == len(run.steps):
    raise failures[-1]


def one_device():
  """A mesh of the first device."""
  return make_mesh(jax.devices()[:1])


def merged_kernels(state, scale) -> dict[str, np.ndarray]:
  """{kind of layer: merged weights [layers, in, out], float32} of a train state."""
  plain = jax.jit(lambda params, frozen: weights.merged(params, frozen, scale))(state.params, state.frozen)
  return {kind: np.asarray(plain["blocks"][kind]["kernel"], np.float32) for kind in KINDS}


def spectrum_entry(values: np.ndarray) -> dict[str, list]:
  """Singular values [layers, count] and effective ranks [layers], as JSON lists."""
  return {"singular_values": values.tolist(), "effective_rank": effective_ranks(values).tolist()}


def change_entry(start, now, values_now) -> dict[str, list]:
  """`spectrum_entry` of W_t - W_0 for one kind of layer, and its numerical ranks [layers].

  Args:
    start, now: W_0 and W_t [layers, in, out].
    values_now: singular values of W_t [layers, count], which scale the tolerance of the rank.
  """
  values = singular_values(now - start)
  return spectrum_entry(values) | {"rank": ranks(values, values_now[:, 0], max(now.shape[1:])).tolist()}


def rank_table(runs: list[dict]) -> str:
  """Ranks per kind of layer, averaged over layers, as a Markdown table."""
  rows = []
  for run in runs:
    learnt = run["learnt"].get(run["step"])
    measured = {"effective rank of W": (run["weights"], "effective_rank")}
    if learnt:
      measured |= {"effective rank of W − W₀": (learnt, "effective_rank"), "rank of W − W₀": (learnt, "rank")}
    for name, (source, key) in measured.items():
      rows.append({"run": run["run"], "": name} | {kind: f"{np.mean(source[kind][key]):.1f}" for kind in KINDS})
  return markdown(rows)


def conclude(found: list[SavedRun], out: Path, quiet: bool = False) -> None:
  """Measure runs, print the table and write ranks.json, weights and learnt (each as .png and .svg) to `out`.

  Args:
    quiet: whether to show no progress.

  Raises:
    UserError: `out` cannot be created.
  """
  cli.make_folder(out)
  runs = []
  with progress_bar(total=len(found), desc="singular values", unit="run", shown=not quiet) as bar:
    for run in found:
      runs.append(measure_spectra(run))
      bar.update()
  replace_text(out / "ranks.json", json.dumps(runs, indent=1) + "\n")
  plot_weights(runs, out / "weights.png")
  with_start = [run for run in runs if run["learnt"]]
  if with_start:
    plot_learnt(with_start, out / "learnt.png")
  print(f"\n{rank_table(runs)}")
  for run in runs:
    if not run["learnt"]:
      print(f"{run['run']}: W − W₀ is not measured: {NO_START}")
  print(f"written to {out}: ranks.json, weights.png{', learnt.png' * bool(with_start)} (and .svg)")


def plot_weights(runs: list[dict], path: Path):
  """Singular values of the merged weights, one panel per kind of layer."""
  figure, last = plot_panels([(run["run"], run["weights"]) for run in runs], "singular value of W")
  last.axis("off")
  finish(figure, path, "Singular values of the merged weights W: mean and range over layers")


def plot_learnt(runs: list[dict], path: Path):
  """Singular values of W_T - W_0, one panel per kind of layer, and the ranks over training steps."""
  lines = [(run["run"], run["learnt"][run["step"]]) for run in runs]
  figure, last = plot_panels(lines, "singular value of W − W₀")
  for number, run in enumerate(runs):
    style = line_style(number)
    steps, recorded = zip(*run["learnt_rank"], strict=True) if run["learnt_rank"] else ((), ())
    last.plot(steps, recorded, **style | {"linestyle": "-"}, markersize=4)
    means = [np.mean([kind["rank"] for kind in kinds.values()]) for kinds in run["learnt"].values()]
    last.plot(list(run["learnt"]), means, **style | {"linestyle": "--"}, markersize=6, fillstyle="none")
  handles = [Line2D([], [], color="k", linestyle=line, label=label) for line, label in RANK_LINES.items()]
  last.legend(handles=handles, fontsize="small")
  last.set(ylabel="rank of W − W₀", title="mean over all linear layers")
  label_steps(last)
  last.grid(alpha=0.3)
  finish(figure, path, "Singular values of W − W₀ at the last step: mean and range over layers")


def plot_panels(lines: list[tuple[str, dict]], ylabel: str):
  """A figure with one panel of singular values per kind of layer; returns it and its eighth panel, still empty.

  Args:
    lines: (label, {kind of layer: `spectrum_entry`}).
  """
  figure, axes = plt.subplots(2, 4, figsize=(16, 8), layout="constrained")
  for kind, panel in zip(KINDS, axes.flat[:-1], strict=True):
    for number, (label, found) in enumerate(lines):
      values, style = np.array(found[kind]["singular_values"]), line_style(number)
      index = np.arange(1, values.shape[1] + 1)
      panel.semilogy(index, values.mean(0), **style, markersize=4, markevery=0.1, label=label)
      panel.fill_between(index, values.min(0), values.max(0), color=style["color"], alpha=0.2, linewidth=0)
    lowest, highest = panel.get_ylim()
    panel.set_ylim(max(lowest, highest / 1e5), highest)  # smaller values are rounding errors
    panel.set(xlabel="index of the singular value", ylabel=ylabel)
    panel.set_title(f"{kind}: {PROJECTIONS.get(kind, f'MLP {kind}')} projection")
    panel.grid(alpha=0.3)
  return figure, axes.flat[-1]


def finish(figure, path: Path, title: str):
  """Add the title and a legend of the runs below all panels, and write the figure."""
  figure.suptitle(title)
  figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
  save_figure(figure, path)
