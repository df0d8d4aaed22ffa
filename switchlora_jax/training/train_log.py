"""The numbers of the steps of a run: collected on the devices, written every so many steps."""

import time
from pathlib import Path

import jax
import numpy as np

from switchlora_jax.errors import UserError
from switchlora_jax.parallel import processes
from switchlora_jax.training import anomalies, metrics


def due(step: int, every: int) -> bool:
  """Whether something that happens every so many steps happens after `step`."""
  return step % every == 0


class Log:
  """Collects the numbers of each step on the device, and writes them out every `log_every` steps.

  On every process, since each must find out by itself that the run goes nowhere; only the first writes.
  """

  def __init__(self, workdir: Path, config, start: int):
    self._metrics, self._config = metrics.Metrics(workdir, start) if processes.is_first() else None, config
    self._bar = metrics.progress_bar(config.steps, start, shown=processes.is_first())
    self._waiting, self._since = [], time.monotonic()

  def add(self, step: int, numbers: dict):
    """Take the numbers of a step, still being computed."""
    self._waiting.append({"step": step} | numbers)
    if due(step, self._config.log_every):
      self.flush()

  def flush(self):
    """Wait for the numbers collected so far and write them; stop the run if it goes nowhere, or has to go back."""
    if not self._waiting:
      return
    rows = [{name: value.item() for name, value in row.items()} for row in jax.tree.map(np.asarray, self._waiting)]
    seconds = max(time.monotonic() - self._since, 1e-9)  # a coarse clock may stand still
    speed = len(rows) * self._config.batch_size * self._config.seq_len / seconds
    self._write([row | {"tokens_per_second": round(speed, 1)} for row in rows])
    self._bar.update(len(rows))
    shown = {"loss": f"{rows[-1]['loss']:.3f}", "tokens/s": f"{speed:,.0f}"}
    self._bar.set_postfix(shown | ({"skipped": rows[-1]["skipped"]} if rows[-1]["skipped"] else {}))
    self._waiting, self._since = [], time.monotonic()
    anomalies.report_spikes(rows, self._config.spike, aloud=processes.is_first())
    self._stop_if_stuck(rows)

  def _stop_if_stuck(self, rows):
    worst, limit = max(row["skipped_in_a_row"] for row in rows), self._config.max_skipped
    if worst >= limit:
      self.close()
      raise UserError(
        f"the run was stopped after step {rows[-1]['step']}: {worst} updates in a row had a loss or gradient that "
        f"was not finite (max_skipped = {limit}); lower --config.learning_rate (= {self._config.learning_rate}) in a "
        f"new --workdir, or look at the data of these steps"
      )

  def evaluation(self, step: int, numbers: dict):
    """Write the numbers of an evaluation after `step`; flushed before it, its time is not training time."""
    self._write([{"step": step} | numbers])
    if processes.is_first():
      self._bar.write(f"step {step}: validation perplexity {numbers['val_ppl']:.2f}")
    self._since = time.monotonic()

  def settle(self):
    """Make sure that what was written can be read again, before the step can be returned to; see `Metrics.settle`."""
    if self._metrics:
      self._metrics.settle()

  def _write(self, rows: list[dict]):
    if self._metrics:
      self._metrics.write(rows)

  def close(self):
    """Write what is left and end the bar."""
    self._bar.close()
    if self._metrics:
      self._metrics.close()
