"""Model FLOPs, memory and start-up time of a run, and a trace of its steps for a profiler."""

import logging
import math
import os
import resource
import time
from pathlib import Path

import jax

from switchlora_jax.models import architecture_of

log = logging.getLogger(__name__)
TRACE_DELAY = 2  # steps of a command before a trace begins: they are compiled, and the first one waits for its data


def model_flops(keys, batch: int, length: int) -> int:
  """Model FLOPs of a training step of full rank, the numerator of MFU (PaLM, arXiv 2204.02311, appendix B).

  Six operations per token and weight of the linear layers and the head, and those of causal attention: of half of the
  [length, length] scores. Recomputation and masked scores are not counted, nor what a low-rank method saves or adds.

  Args:
    keys: those of `config.model`.
    batch, length: of the step's sequences.
  """
  model = architecture_of(keys)
  per_block = sum(map(math.prod, model.linear_shapes().values())) + model.num_heads * model.head_dim * length
  return 6 * batch * length * (model.num_layers * per_block + model.hidden_size * model.vocab_size)


def peak_memory() -> int:
  """The largest number of bytes in use so far: of the fullest device of this process, or of the process on CPUs."""
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  known = [found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found]
  return max(known) if known else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def seconds_since_start() -> float:
  """Seconds since this process was started."""
  fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()  # of proc(5), from the third one on
  return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


class StepTracer:
  """A trace of some steps of a command for TensorBoard's profiler and xprof, in `folder`/plugins/profile/.

  A trace that cannot be written is reported by a warning.

  Args:
    steps: number of steps to trace; 0: none.
  """

  def __init__(self, folder: Path, steps: int):
    self._folder, self._left, self._delay, self._traces = folder, steps, TRACE_DELAY, False

  def before_step(self) -> None:
    """Begin the trace, if it is due."""
    self._delay -= 1
    if self._left and self._delay < 0 and not self._traces:
      self._try(lambda: jax.profiler.start_trace(self._folder))
      self._traces = self._left > 0

  def after_step(self, values) -> None:
    """Count a step, with its metrics, and end the trace after the last one, once the devices have computed it."""
    if self._traces:
      self._left -= 1
      if not self._left:  # `close` writes it
        jax.block_until_ready(values)
        self.close()

  def close(self) -> None:
    """Write the trace, if one is in progress."""
    if self._traces:
      self._traces, self._left = False, 0
      self._try(jax.profiler.stop_trace)
    elif self._left:
      log.warning("no trace was written: the command ended before its step %d", TRACE_DELAY + 1)

  def _try(self, action):
    """Call a function of the profiler; after an error, nothing more is traced."""
    try:
      action()
    except Exception as error:  # a run does not end because it cannot be profiled
      log.warning("the trace of the profiler cannot be written (%s); the run continues without it", error)
      self._left = 0
