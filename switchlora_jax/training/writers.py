"""Writers of the metrics of a run: metrics.jsonl, which is complete, and TensorBoard events, a copy for viewing."""

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from switchlora_jax.errors import UserError
from switchlora_jax.runs.files import replace_text
from switchlora_jax.training import metrics

log = logging.getLogger(__name__)


def default_writers(workdir: Path, start: int) -> list[metrics.Writer]:
  """The writers of a run in `workdir` that continues after `start` steps; called by process 0 alone."""
  return [JsonLinesWriter(workdir, start), TensorBoardWriter(workdir / "tensorboard", start)]


class JsonLinesWriter(metrics.Writer):
  """Writes metrics.jsonl, one JSON object per row; rows after step `start` are dropped when it is opened.

  Lines that cannot be written because the disk is full are kept in memory and written later. They are lost only if
  the disk is still full when the next checkpoint is due, which ends the run.
  """

  def __init__(self, workdir: Path, start: int):
    self.path = workdir / "metrics.jsonl"
    kept = metrics.read(self.path, start)
    replace_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
    self._file = self.path.open("ab", buffering=0)
    self._pending, self._warned = b"", False

  def write(self, rows: list[dict]) -> None:
    """Append rows; a number that is not finite becomes null.

    Raises:
      UserError: the file was removed, moved or replaced.
    """
    finite = [{name: value if math.isfinite(value) else None for name, value in row.items()} for row in rows]
    self._pending += "".join(json.dumps(row) + "\n" for row in finite).encode()
    if (failure := self._drain()) and not self._warned:
      reason = failure.strerror
      log.warning("%s cannot be written (%s); its lines are kept until the next checkpoint", self.path, reason)
      self._warned = True

  def sync(self) -> None:
    """Flush all lines to the disk.

    Raises:
      UserError: some cannot be written. A run may continue from a checkpoint only if the rows before it are on disk.
    """
    if failure := self._drain():
      raise UserError(
        f"{self.path} could not be written until this checkpoint was due ({failure.strerror}), so it was not saved; "
        "make room, and the same command continues from the checkpoint before"
      )
    os.fsync(self._file.fileno())

  def _drain(self) -> OSError | None:
    """Write the pending lines, all or none; returns the error that prevents it."""
    self._check_same_file()
    end, left = os.fstat(self._file.fileno()).st_size, self._pending
    try:
      while left:
        left = left[self._file.write(left) :]
    except OSError as error:
      with contextlib.suppress(OSError):
        self._file.truncate(end)
      return error
    self._pending = b""
    return None

  def _check_same_file(self):
    opened = os.fstat(self._file.fileno())
    with contextlib.suppress(FileNotFoundError):
      if os.path.samestat(opened, self.path.stat()):
        return
    raise UserError(
      f"{self.path} was removed, moved or replaced while the run wrote it; put its directory back as it was, and the "
      "same command continues from the last checkpoint that is in it, or start anew"
    )

  def close(self) -> None:
    """Close the file."""
    self._file.close()


class TensorBoardWriter(metrics.Writer):
  """Writes TensorBoard events. metrics.jsonl has the same numbers: after an I/O error this writer warns and stops.

  `tensorboardX.SummaryWriter` is not used: a full disk ends its thread, after which it blocks its callers.
  """

  def __init__(self, folder: Path, start: int):
    self._events = None
    with self._stop_on_os_error():
      folder.mkdir(exist_ok=True)
      self._events = EventsWriter(str(folder / "events"))
      for mark in (dict(file_version="brain.Event:2"), dict(session_log=SessionLog(status=SessionLog.START))):
        # A START event at step s makes TensorBoard hide earlier events of steps >= s, which this run writes again.
        self._events.write_event(Event(wall_time=time.time(), step=start + 1, **mark))

  @contextlib.contextmanager
  def _stop_on_os_error(self) -> Iterator[None]:
    with metrics.warn_on_os_error("TensorBoard events"):
      try:
        yield
      except OSError:
        self._events = None
        raise

  def write(self, rows: list[dict]) -> None:
    """Append the finite numbers of rows."""
    with self._stop_on_os_error():
      for row in rows if self._events else ():
        for name, value in row.items():
          if name != "step" and math.isfinite(value):
            point = summary.scalar(name, value)
            self._events.write_event(Event(wall_time=time.time(), step=row["step"], summary=point))
      if self._events:
        self._events.flush()

  def close(self) -> None:
    """Flush and close the event file."""
    with self._stop_on_os_error():
      if self._events:
        self._events.close()
        self._events = None
