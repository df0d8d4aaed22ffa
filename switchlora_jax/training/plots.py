"""The loss curve of a run. Imported when it is drawn: training itself does not need Matplotlib."""

from pathlib import Path

from matplotlib.figure import Figure

from switchlora_jax.training.metrics import warn_on_os_error


def plot_loss(rows: list[dict], path: Path, title: str) -> None:
  """Draw training and validation loss against the training step, as PNG and SVG.

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
    axes.plot(steps, running_mean(losses, 0.9), color="tab:green", label="training, running mean of about 10 steps")
  if valid:
    axes.plot(*zip(*valid, strict=True), "o-", color="tab:orange", markersize=4, label="validation")
  axes.set(xlabel="training step", ylabel="cross-entropy loss (nats per token)", title=title)
  axes.grid(alpha=0.3)
  if train or valid:
    axes.legend()
  figure.tight_layout()
  for target in (path, path.with_suffix(".svg")):
    with warn_on_os_error(str(target)):
      figure.savefig(target, dpi=120)


def running_mean(values, decay: float) -> list[float]:
  """Exponential running mean of `values`, corrected for its start from 0 as Adam's moments are."""
  means, total, weight = [], 0.0, 0.0
  for value in values:
    total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
    means.append(total / weight)
  return means
