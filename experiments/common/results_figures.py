"""Figures of a sweep, drawn from the contents of results.json: curves, parameters and learning rates."""

import math
import textwrap
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import LogNorm
from matplotlib.ticker import EngFormatter

from experiments.common.figures import line_style, save_figure
from experiments.common.stored import cell_point, point_key
from switchlora_jax.training.plots import label_steps, mark_hand_over


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
