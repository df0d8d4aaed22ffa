"""Singular values of the weights of runs, and of what they have learnt, by kind of layer: table and pictures."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np

from experiments.common import cli
from experiments.common.results import markdown
from switchlora_jax.analysis.ranks import KINDS, effective_ranks, ranks, singular_values
from switchlora_jax.errors import UserError
from switchlora_jax.interop.pretrained import full_precision, restore_weights
from switchlora_jax.models import weights
from switchlora_jax.parallel.sharding import make_mesh
from switchlora_jax.runs.directory import SavedRun
from switchlora_jax.runs.files import replace_text
from switchlora_jax.training import metrics
from switchlora_jax.training.phases import build_phases

matplotlib.use("Agg")
from matplotlib import pyplot as plt

log = logging.getLogger(__name__)

NO_START = "it started from another run's weights (warm_start_from), so there is no W₀ to draw again"


def measure(run: SavedRun) -> dict[str, Any]:
  """A run in numbers, as JSON.

  Returns:
    run, method, rank: which it is; step: of its newest good checkpoint.
    weights: {kind of layer: `described` singular values of its merged weights at that step}.
    learnt: {step of a checkpoint: the same of W_t - W_0}; empty where W_0 cannot be drawn again.
    learnt_rank: [step, mean effective rank] as recorded while it was trained.
  """
  run, learnt = run.alone(), {}
  config, start = run.config, first_kernels(run)
  for step, now in kernels_over_training(run):
    found = {kind: singular_values(now[kind]) for kind in KINDS}
    if start:
      learnt[step] = {kind: learnt_since(start[kind], now[kind], found[kind]) for kind in KINDS}
  rows = metrics.read(run.directory / "metrics.jsonl")
  return {
    "run": run.directory.name,
    "method": config.method,
    "rank": None if config.method == "full" else config.rank,
    "step": step,
    "weights": {kind: described(values) for kind, values in found.items()},
    "learnt": learnt,
    "learnt_rank": [[row["step"], row["learnt_rank"]] for row in rows if row.get("learnt_rank") is not None],
  }


def first_kernels(run: SavedRun) -> dict[str, np.ndarray] | None:
  """`kernels` before step 0, drawn again; None where the run started from other weights."""
  with run.missing_key_as_error(), full_precision(run.config.param_dtype):
    first = build_phases(run.config, one_device())[0]
    return None if run.config.warm_start_from else kernels(first.create(), first.scale)


def kernels_over_training(run: SavedRun) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
  """(step, `kernels`) of each checkpoint, the oldest first; without those that are damaged, or gone by now.

  Raises:
    UserError: none is left.
  """
  failures = []
  for step in run.steps:
    try:
      with full_precision(run.config.param_dtype):
        state = restore_weights(run, step)
        found = kernels(state, state.scale)
    except UserError as error:
      log.warning("step %d is left out: %s", step, error)
      failures.append(error)
      continue
    yield step, found
  if len(failures) == len(run.steps):
    raise failures[-1]


def one_device():
  """A mesh of the first device."""
  return make_mesh(jax.devices()[:1])


def kernels(state, scale) -> dict[str, np.ndarray]:
  """{kind: merged weights [layers, in, out]} of a train state, float32."""
  plain = jax.jit(lambda params, frozen: weights.merged(params, frozen, scale))(state.params, state.frozen)
  return {kind: np.asarray(plain["blocks"][kind]["kernel"], np.float32) for kind in KINDS}


def described(values: np.ndarray) -> dict[str, list]:
  """Singular values [layers, count] and their effective ranks, a layer each."""
  return {"singular_values": values.tolist(), "effective_rank": effective_ranks(values).tolist()}


def learnt_since(start, now, values_now) -> dict[str, list]:
  """W_t - W_0 of a kind of layer `described`, and its rank, a layer each; `values_now` are those of W_t."""
  values = singular_values(now - start)
  return described(values) | {"rank": ranks(values, values_now[:, 0], max(now.shape[1:])).tolist()}


def table(runs: list[dict]) -> str:
  """Ranks by kind of layer, the mean over layers, as Markdown."""
  rows = []
  for run in runs:
    learnt = run["learnt"].get(run["step"])
    measured = {"effective rank of W": (run["weights"], "effective_rank")}
    if learnt:
      measured |= {"effective rank of W − W₀": (learnt, "effective_rank"), "rank of W − W₀": (learnt, "rank")}
    for name, (source, key) in measured.items():
      rows.append({"run": run["run"], "": name} | {kind: f"{np.mean(source[kind][key]):.1f}" for kind in KINDS})
  return markdown(rows)


def conclude(found: list[SavedRun], out: Path) -> None:
  """Measure runs, print the table, and leave ranks.json, weights.png and learnt.png in `out`.

  Raises:
    UserError: that cannot be made.
  """
  cli.make_folder(out)
  runs = []
  with metrics.progress_bar(len(found), what="singular values", unit="run") as bar:
    for run in found:
      runs.append(measure(run))
      bar.update()
  replace_text(out / "ranks.json", json.dumps(runs, indent=1) + "\n")
  plot_weights(runs, out / "weights.png")
  with_start = [run for run in runs if run["learnt"]]
  if with_start:
    plot_learnt(with_start, out / "learnt.png")
  print(f"\n{table(runs)}")
  for run in runs:
    if not run["learnt"]:
      print(f"{run['run']}: what it has learnt is not measured: {NO_START}")
  print(f"written to {out}: ranks.json, weights.png{', learnt.png' * bool(with_start)}")


def plot_weights(runs: list[dict], path: Path):
  """Singular values of the weights, a panel each kind of layer."""
  figure, last = panels([(run["run"], run["weights"]) for run in runs], "singular value of W")
  last.axis("off")
  save(figure, path, "Merged weights: singular values, mean of the layers and their range")


def plot_learnt(runs: list[dict], path: Path):
  """Singular values of W_T - W_0, a panel each kind of layer; and its ranks over training, the mean of all layers."""
  figure, last = panels([(run["run"], run["learnt"][run["step"]]) for run in runs], "singular value of W − W₀")
  for run in runs:
    steps, recorded = zip(*run["learnt_rank"], strict=True) if run["learnt_rank"] else ((), ())
    (line,) = last.plot(steps, recorded)
    means = [np.mean([kind["rank"] for kind in kinds.values()]) for kinds in run["learnt"].values()]
    last.plot(list(run["learnt"]), means, "o--", color=line.get_color(), markersize=4)
  last.set(xlabel="step", ylabel="mean of all layers", title="rank (dashed), effective rank")
  last.grid(alpha=0.3)
  save(figure, path, "W − W₀, what was learnt: singular values, mean of the layers and their range")


def panels(lines: list[tuple[str, dict]], ylabel: str):
  """A figure of seven panels, and its eighth, still empty; `lines` are (label, {kind: singular values, …})."""
  figure, axes = plt.subplots(2, 4, figsize=(16, 8), layout="constrained")
  for kind, panel in zip(KINDS, axes.flat[:-1], strict=True):
    for label, found in lines:
      values = np.array(found[kind]["singular_values"])
      index = np.arange(1, values.shape[1] + 1)
      (line,) = panel.semilogy(index, values.mean(0), label=label)
      panel.fill_between(index, values.min(0), values.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
    lowest, highest = panel.get_ylim()
    panel.set_ylim(max(lowest, highest / 1e5), highest)  # below is rounding, and nothing to see
    panel.set(xlabel="number of the singular value", ylabel=ylabel, title=kind)
    panel.grid(alpha=0.3)
  return figure, axes.flat[-1]


def save(figure, path: Path, title: str):
  """Title, the runs below all panels, file."""
  figure.suptitle(title)
  figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
  figure.savefig(path, dpi=120)
  plt.close(figure)
