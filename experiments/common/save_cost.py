"""Overhead of checkpoint checksums: saves the state of a run repeatedly and times each part."""

import math
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax

from experiments.common import cli
from switchlora_jax.parallel.sharding import make_mesh
from switchlora_jax.progress import progress_bar
from switchlora_jax.runs import manifest
from switchlora_jax.runs.array_checksums import array_checksums
from switchlora_jax.runs.checkpoint import Checkpoints
from switchlora_jax.runs.directory import open_run
from switchlora_jax.training.phases import restore_phase


class SaveTimes(NamedTuple):
  """Seconds of one save and of its corruption detection.

  Attributes:
    whole: from the start of the save until the checkpoint has its final name and the previous one is removed.
    arrays: checksums of the arrays, computed before a save and compared after a restore.
    files: checksums of the files and the manifest, flushed to disk, at the end of a save.
    verify: reading and comparing the files, as before a restore, with an idle disk and the files in the page cache.
  """

  whole: float
  arrays: float
  files: float
  verify: float


class TimedCheckpoints(Checkpoints):
  """Checkpoints that record the time of the last manifest in `spent`, in seconds."""

  def finish(self):
    """Write the manifest of a save and time it."""
    self.spent = elapsed_seconds(super().finish)


def cost_report(directory: Path, times: int) -> str:
  """Save the newest readable state of a run `times` times to a temporary folder in its directory, and report.

  Raises:
    UserError: the directory is not that of a run, or has no readable checkpoint.
  """
  run = open_run(directory)
  cli.set_precision(run.config)
  mesh = make_mesh(fsdp=math.gcd(run.config.sharding.fsdp, jax.device_count()))
  _, state = restore_phase(run, None, mesh, whole=True)
  with tempfile.TemporaryDirectory(prefix="cost-", dir=directory) as folder:
    size, saves = time_saves(state, Path(folder) / "checkpoints", times)
  devices = f"{jax.device_count()} × {jax.devices()[0].device_kind}"
  head = f"step {int(state.step)}: {size / 2**20:,.2f} MiB ({size:,} bytes), saved {times} times on {devices}"
  return f"{head}\n\n{cost_table(saves)}"


def time_saves(state, folder: Path, times: int) -> tuple[int, list[SaveTimes]]:
  """(bytes of a checkpoint of `state`, the times of each save); a first, untimed save compiles the checksums."""
  saves = []
  with TimedCheckpoints(folder, keep=1) as checkpoints, progress_bar(total=times, desc="save", unit="save") as bar:
    for step in range(times + 1):
      arrays = elapsed_seconds(lambda: array_checksums(state))
      whole = elapsed_seconds(lambda step=step: (checkpoints.save(step, state), checkpoints.wait()))
      os.sync()  # as for a restore, which runs in a new process after the save is on disk
      verify = elapsed_seconds(lambda step=step: manifest.verify(folder / str(step)))
      saves.append(SaveTimes(whole, arrays, checkpoints.spent, verify))
      bar.update(step > 0)
    return manifest.read(folder / str(times)).size, saves[1:]


def elapsed_seconds(action) -> float:
  """The wall-clock time of a call."""
  began = time.perf_counter()
  action()
  return time.perf_counter() - began


def cost_table(saves: list[SaveTimes]) -> str:
  """Median, minimum and maximum: seconds per save, and each part of it in per cent."""
  parts = {
    "in a save: checksums of the arrays": lambda save: save.arrays,
    "in a save: checksums of the files, and the manifest": lambda save: save.files,
    "in a save: both": lambda save: save.arrays + save.files,
    "before a restore: comparison of the files": lambda save: save.verify,
    "after a restore: checksums of the arrays": lambda save: save.arrays,
  }
  rows = [("", "median", "min", "max")]
  rows.append(("seconds per save", *spread([save.whole for save in saves], "{:.3f} s")))
  rows.append(("relative to the save",))
  rows += [
    (f"  {name}", *spread([100 * of(save) / save.whole for save in saves], "{:.1f}%")) for name, of in parts.items()
  ]
  width = max(len(row[0]) for row in rows)
  return "\n".join(f"{name:<{width}}{''.join(f'{cell:>10}' for cell in cells)}".rstrip() for name, *cells in rows)


def spread(numbers: list[float], style: str) -> list[str]:
  """Median, minimum and maximum, formatted."""
  return [style.format(number) for number in (statistics.median(numbers), min(numbers), max(numbers))]
