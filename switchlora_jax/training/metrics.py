"""Metrics of a training run: collected on the devices, shown as progress, and handed to a list of writers."""

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from switchlora_jax.parallel import processes
from switchlora_jax.progress import print_line, progress_bar, set_rate
from switchlora_jax.training.evaluation import describe_perplexities
from switchlora_jax.training.throughput import model_flops, peak_memory

log = logging.getLogger(__name__)
# Metrics of a step that depend on the machine and its load; all others of a run are the same whenever it is repeated.
TIMED = ("tokens_per_second", "model_tflops_per_second", "mfu", "data_wait_share", "peak_memory_bytes")


class Writer:
  """A destination for the metrics of a run. `writers.default_writers` lists those in use.

  An exception raised by a writer ends the run. A writer whose output can be made again from metrics.jsonl should
  reduce I/O errors to warnings, see `warn_on_os_error`.
  """

  def write(self, rows: list[dict]) -> None:
    """Write rows, each `{"step": int, name: number, …}`; a number may be NaN or infinite."""
    raise NotImplementedError

  def sync(self) -> None:
    """Called before a checkpoint is saved: make durable what a continued run will not write again."""

  def close(self) -> None:
    """Called once, after the last row, also if the run ends by an exception; not if its process is killed."""


class Metrics:
  """Metrics of a run from step `start` on.

  Every process collects them, because each one checks them for loss spikes and non-finite updates. Only process 0
  shows progress and has writers.

  Args:
    config: the resolved config.
    start: number of steps done before the first one that is added.
    writers: destinations of the rows, in the order in which they are called.
    quiet: whether to show no progress and no results of evaluations.
    peak_flops: operations per second that all devices reach at most, for MFU; None: not known.
  """

  def __init__(
    self, config, start: int, writers: Sequence[Writer] = (), quiet: bool = False, peak_flops: float | None = None
  ):
    self._tokens_per_step = config.batch_size * config.seq_len
    self._flops_per_token = model_flops(config.model, config.batch_size, config.seq_len) / self._tokens_per_step
    self._peak_flops, self._waited = peak_flops, 0.0
    self._writers, self._open = tuple(writers), contextlib.ExitStack()
    for writer in self._writers:
      self._open.callback(writer.close)
    self._shown = processes.is_first() and not quiet
    shape = dict(total=config.steps, initial=start, desc="train", unit="step")
    self._bar = progress_bar(**shape, shown=self._shown, seconds=math.inf)
    self._open.callback(self._bar.close)
    self._pending, self._since = [], time.monotonic()

  def add(self, step: int, values: dict[str, jax.Array | int]) -> None:
    """Collect the metrics of a step, numbers or [] arrays that may still be computed; does not wait for them."""
    self._pending.append({"step": step} | values)

  def flush(self) -> list[dict]:
    """Wait for the metrics collected since the last flush, and write them.

    Returns:
      One row per step, `{"step": int, name: float or int, …}`; empty if no step was added.
    """
    if not self._pending:
      return []
    rows = [{name: value.item() for name, value in row.items()} for row in jax.tree.map(np.asarray, self._pending)]
    seconds = max(time.monotonic() - self._since, 1e-9)  # a coarse clock may not have advanced
    timed = self._timed(rows, seconds)
    self._write([row | timed for row in rows])
    last = rows[-1]
    shown = {"loss": f"{last['loss']:.3f}", "tokens/s": f"{timed['tokens_per_second']:,.0f}"}
    self._bar.set_postfix(shown | ({"skipped": last["skipped"]} if last["skipped"] else {}), refresh=False)
    set_rate(self._bar, len(rows) / seconds)
    self._bar.update(len(rows))
    self._pending, self._waited, self._since = [], 0.0, time.monotonic()
    return rows

  def _timed(self, rows: list[dict], seconds: float) -> dict[str, float | int]:
    """The metrics of `TIMED` for the steps since the last flush. Padding is not counted."""
    tokens = sum(row.get("tokens", self._tokens_per_step) for row in rows)
    flops = tokens * self._flops_per_token / seconds
    timed = {
      "tokens_per_second": round(tokens / seconds, 1),
      "model_tflops_per_second": float(f"{flops / 1e12:.4g}"),
      "data_wait_share": round(self._waited / seconds, 4),
      "peak_memory_bytes": peak_memory(),
    }
    return timed | ({"mfu": round(flops / self._peak_flops, 4)} if self._peak_flops else {})

  @contextlib.contextmanager
  def reading_batch(self) -> Iterator[None]:
    """Count the time inside this context as time in which the host waits for data."""
    begin = time.monotonic()
    yield
    self._waited += time.monotonic() - begin

  def print_progress(self) -> None:
    """Print the progress as of the last flush as a line, if the output is not a terminal, which shows a bar anyway."""
    self._bar.refresh()

  def write_evaluation(self, step: int, values: dict[str, float]) -> None:
    """Write the metrics of an evaluation after `step`. Flush before it: its duration is not training time."""
    self._write([{"step": step} | values])
    if self._shown:
      print_line(f"step {step}: {describe_perplexities(values)}")
    self._since = time.monotonic()

  def sync(self) -> None:
    """Make the written rows durable, before the step they end with is saved; see `Writer.sync`."""
    for writer in self._writers:
      writer.sync()

  def close(self) -> None:
    """Close the progress bar and all writers, even if one raises; pending metrics are dropped. Once closed, no-op."""
    self._open.close()

  def _write(self, rows: list[dict]):
    for writer in self._writers:
      writer.write(rows)


def read(path: Path, last_step: int | None = None) -> list[dict]:
  """The rows of a metrics.jsonl up to `last_step`, leaving out a line cut short by a kill and damaged lines.

  Damaged lines before the last one are reported by a warning. A file that does not exist has no rows.
  """
  rows = [_parse_row(line) for line in path.read_bytes().splitlines()] if path.exists() else []
  if damaged := rows[:-1].count(None):
    log.warning("%s: %d damaged lines are left out", path, damaged)
  return [row for row in rows if row and (last_step is None or row["step"] <= last_step)]


def _parse_row(line: bytes) -> dict | None:
  """A line of metrics.jsonl as a row, or None if it is damaged."""
  try:
    row = json.loads(line)
  except ValueError:
    return None
  return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def due(step: int, every: int) -> bool:
  """Whether an action taken every `every` steps is due after `step` steps."""
  return step % every == 0


@contextlib.contextmanager
def warn_on_os_error(what: str) -> Iterator[None]:
  """Reduce an `OSError` to a warning. For output that can be made again, such as `what`."""
  try:
    yield
  except OSError as error:
    log.warning("%s cannot be written (%s); the run continues without it", what, error)
