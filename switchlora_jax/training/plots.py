"""The loss curve of a run. Imported when it is drawn: training itself does not need Matplotlib."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from switchlora_jax.training.evaluation import further
from switchlora_jax.training.metrics import warn_on_os_error

WINDOW = 11  # steps in the running mean; odd


def plot_loss(rows: list[dict], path: Path, title: str) -> None:
  """Draw training and validation loss against the training step, as PNG and SVG.

  A vertical line marks the hand-over of a full-rank warm start.

  Args:
    rows: rows of metrics.jsonl.
    path: the PNG file; the SVG file beside it has the same name. An I/O error is a warning.
    title: title of the picture.
  """
  train = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
  valid = [(row["step"], row["val_loss"]) for row in rows if row.get("val_loss") is not None]
  figure = Figure(figsize=(8, 5))  # not pyplot's: a notebook keeps its backend, and nothing needs to be closed
  axes = figure.subplots()
  if train:
    steps, losses = zip(*train, strict=True)
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.7, label="training, each step")
    axes.plot(steps, running_mean(losses), color="tab:green", label=f"training, centred mean of {WINDOW} steps")
  if valid:
    axes.plot(*zip(*valid, strict=True), "o-", color="tab:orange", markersize=4, label="validation")
  others = [(row["step"], further(row, "val_loss")) for row in rows]
  for label in sorted({label for _, losses in others for label in losses}):
    points = [(step, np.nan if losses[label] is None else losses[label]) for step, losses in others if label in losses]
    axes.plot(*zip(*points, strict=True), "o--", markersize=3, label=f"validation, {label}")
  for row in rows:
    if row.get("hand_over"):
      mark_hand_over(axes, row["step"] - 1)
  axes.set(ylabel="cross-entropy loss (nats per token)", title=title)
  label_steps(axes)
  axes.grid(alpha=0.3)
  if train or valid:
    axes.legend()
  figure.tight_layout()
  for target in (path, path.with_suffix(".svg")):
    with warn_on_os_error(str(target)):
      figure.savefig(target, dpi=120)


def label_steps(axes) -> None:
  """Label the x axis as training steps, with integer ticks."""
  axes.set_xlabel("training step")
  axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))


def mark_hand_over(axes, step: int) -> None:
  """Draw a vertical line with the word `hand-over` at the last full-rank step of a warm start."""
  axes.axvline(step, color="black", linestyle=":", linewidth=1)
  across = axes.get_xaxis_transform()  # x is a step, y is a fraction of the height
  style = dict(rotation=90, va="bottom", ha="right", fontsize="small")
  axes.text(step, 0.02, f"hand-over after step {step:,}", transform=across, **style)


def running_mean(values) -> np.ndarray:
  """Mean of the `WINDOW` values around each one, of fewer near the ends, as many before as after it.

  Unlike a mean of past values, it does not lag: that of a straight line is the line.
  """
  values = np.asarray(values, float)
  sums = np.concatenate([[0], np.cumsum(values)])
  index = np.arange(len(values))
  half = np.minimum(np.minimum(index, index[::-1]), WINDOW // 2)
  return (sums[index + half + 1] - sums[index - half]) / (2 * half + 1)
