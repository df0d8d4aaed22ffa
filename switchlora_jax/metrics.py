"""What a run says while it goes: metrics.jsonl, TensorBoard, a progress bar, and a picture of the loss."""

import json
import math
from pathlib import Path

import matplotlib
import tensorboardX
from tqdm import tqdm

from switchlora_jax.run_directory import replace_text

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def read(path: Path, last_step: int | None = None) -> list[dict]:
  """The lines of a metrics.jsonl up to `last_step`; a line cut short by a kill is left out."""
  rows = []
  if path.exists():
    for line in path.read_text().splitlines():
      try:
        rows.append(json.loads(line))
      except ValueError:
        continue
  return [row for row in rows if last_step is None or row["step"] <= last_step]


class Metrics:
  """metrics.jsonl and TensorBoard events of one run from `start` on; lines after `start` are dropped first."""

  def __init__(self, workdir: Path, start: int):
    self.path = workdir / "metrics.jsonl"
    kept = read(self.path, start)
    replace_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
    self._file = self.path.open("a")
    self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)

  def write(self, rows: list[dict]):
    """Append rows, each with a `step`; a number that is not finite becomes null."""
    for row in rows:
      finite = {k: v if math.isfinite(v) else None for k, v in row.items()}
      self._file.write(json.dumps(finite) + "\n")
      for name, value in finite.items():
        if name != "step" and value is not None:
          self._board.add_scalar(name, value, row["step"])
    self._file.flush()

  def close(self):
    """Flush both."""
    self._file.close()
    self._board.close()


def progress_bar(total: int, start: int = 0, what: str = "train", unit: str = "step", shown: bool = True):
  """A tqdm bar in the one style of this project."""
  style = dict(unit=unit, dynamic_ncols=True, smoothing=0.05, disable=not shown)
  return tqdm(total=total, initial=start, desc=what, **style)


def plot_loss(rows: list[dict], path: Path, title: str):
  """Draw training loss (with a running mean) and validation loss in nats a token against the step."""
  train = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
  valid = [(row["step"], row["val_loss"]) for row in rows if row.get("val_loss") is not None]
  figure, axes = plt.subplots(figsize=(8, 5))
  if train:
    steps, losses = zip(*train, strict=True)
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.7, label="training, each step")
    axes.plot(steps, running_mean(losses, 0.9), color="tab:blue", label="training, running mean")
  if valid:
    axes.plot(*zip(*valid, strict=True), "o-", color="tab:orange", markersize=4, label="validation")
  axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
  axes.grid(alpha=0.3)
  if train or valid:
    axes.legend()
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  plt.close(figure)


def running_mean(values, decay: float) -> list[float]:
  """Exponential running mean, corrected for its start."""
  means, total, weight = [], 0.0, 0.0
  for value in values:
    total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
    means.append(total / weight)
  return means
