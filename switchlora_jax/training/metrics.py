"""What a run says while it goes: metrics.jsonl, TensorBoard, a progress bar, and a picture of the loss."""

import contextlib
import json
import logging
import math
import os
import time
from pathlib import Path

import matplotlib
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tqdm import tqdm

from switchlora_jax.errors import UserError
from switchlora_jax.runs.files import replace_text

matplotlib.use("Agg")
from matplotlib import pyplot as plt

log = logging.getLogger(__name__)


def read(path: Path, last_step: int | None = None) -> list[dict]:
  """The lines of a metrics.jsonl up to `last_step`; a line cut short by a kill, or damaged, is left out."""
  rows = [_row(line) for line in path.read_bytes().splitlines()] if path.exists() else []
  if damaged := rows[:-1].count(None):
    log.warning("%s: %d damaged lines are left out", path, damaged)
  return [row for row in rows if row and (last_step is None or row["step"] <= last_step)]


def _row(line: bytes) -> dict | None:
  """A line of metrics.jsonl, or None if it is none."""
  try:
    row = json.loads(line)
  except ValueError:
    return None
  return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


class Metrics:
  """metrics.jsonl and TensorBoard events of one run from `start` on; lines after `start` are dropped first.

  Lines that could not be written, since the disk is full, wait in memory: a disk that has room again before the next
  checkpoint is due costs nothing.
  """

  def __init__(self, workdir: Path, start: int):
    self.path = workdir / "metrics.jsonl"
    kept = read(self.path, start)
    replace_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
    self._file = self.path.open("ab", buffering=0)
    self._board = Board(workdir / "tensorboard", start)
    self._waiting, self._warned = b"", False

  def write(self, rows: list[dict]):
    """Append rows, each with a `step`; a number that is not finite becomes null.

    Raises:
      UserError: the file is not there any more.
    """
    finite = [{k: v if math.isfinite(v) else None for k, v in row.items()} for row in rows]
    self._waiting += "".join(json.dumps(row) + "\n" for row in finite).encode()
    if (failure := self._drain()) and not self._warned:
      log.warning("%s cannot be written (%s); its lines wait until the next checkpoint", self.path, failure.strerror)
      self._warned = True
    self._board.write(finite)

  def settle(self):
    """Raise `UserError` unless all lines are in the file: a step may be returned to only when its line is."""
    if failure := self._drain():
      raise UserError(
        f"{self.path} could not be written until this checkpoint was due ({failure.strerror}), so it was not saved; "
        "make room, and the same command continues from the checkpoint before"
      )
    os.fsync(self._file.fileno())

  def _drain(self) -> OSError | None:
    """Write what waits, and no half of a line; what prevents that."""
    self._check_there()
    end, left = os.fstat(self._file.fileno()).st_size, self._waiting
    try:
      while left:
        left = left[self._file.write(left) :]
    except OSError as error:
      with contextlib.suppress(OSError):
        self._file.truncate(end)
      return error
    self._waiting = b""
    return None

  def _check_there(self):
    here = os.fstat(self._file.fileno())
    with contextlib.suppress(FileNotFoundError):
      if os.path.samestat(here, self.path.stat()):
        return
    raise UserError(
      f"{self.path} was removed, moved or replaced while the run wrote it; put its directory back as it was, and the "
      "same command continues from the last checkpoint that is in it, or start anew"
    )

  def close(self):
    """Close both."""
    self._file.close()
    self._board.close()


class Board:
  """TensorBoard events of a run from step `start` on. All they say is in metrics.jsonl: errors are warnings here.

  Not with `tensorboardX.SummaryWriter`: a full disk ends its thread, and from then on it blocks whoever writes.
  """

  def __init__(self, folder: Path, start: int):
    self._writer = None
    with self._or_without():
      folder.mkdir(exist_ok=True)
      self._writer = EventsWriter(str(folder / "events"))
      for mark in (dict(file_version="brain.Event:2"), dict(session_log=SessionLog(status=SessionLog.START))):
        self._writer.write_event(Event(wall_time=time.time(), step=start + 1, **mark))  # hides later steps, if any

  @contextlib.contextmanager
  def _or_without(self):
    with only_warned("what TensorBoard shows"):
      try:
        yield
      except OSError:
        self._writer = None
        raise

  def write(self, rows: list[dict]):
    """Append the numbers of rows, each with a `step`."""
    with self._or_without():
      for row in rows if self._writer else ():
        for name, value in row.items():
          if name != "step" and value is not None:
            point = summary.scalar(name, value)
            self._writer.write_event(Event(wall_time=time.time(), step=row["step"], summary=point))
      if self._writer:
        self._writer.flush()

  def close(self):
    """Write what is left."""
    with self._or_without():
      if self._writer:
        self._writer.close()
        self._writer = None


@contextlib.contextmanager
def only_warned(what: str):
  """Turn a file error into a warning: of `what` is lost nothing that cannot be made again."""
  try:
    yield
  except OSError as error:
    log.warning("%s cannot be written (%s); the run goes on without", what, error)


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
  with only_warned(f"{path}"):
    figure.savefig(path, dpi=120)
  plt.close(figure)


def running_mean(values, decay: float) -> list[float]:
  """Exponential running mean, corrected for its start."""
  means, total, weight = [], 0.0, 0.0
  for value in values:
    total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
    means.append(total / weight)
  return means
