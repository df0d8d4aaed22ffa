"""What it costs that a checkpoint can tell damage: the state of a run, saved again some times beside the clock."""

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
from switchlora_jax.runs import manifest
from switchlora_jax.runs.array_checksums import array_checksums
from switchlora_jax.runs.checkpoint import Checkpoints
from switchlora_jax.runs.directory import open_run
from switchlora_jax.training.metrics import progress_bar
from switchlora_jax.training.phases import restore_phase


class Save(NamedTuple):
  """Seconds of one save and of what is done to tell damage.

  Attributes:
    whole: from its start until it has its name and the save before it is removed.
    arrays: their checksums: a step waits for them before a save, and they are compared after a restore.
    files: their checksums and the manifest, brought to the disk, at the end of a save.
    verify: the same files read and compared, as before a restore; the disk is idle and they are still in memory then.
  """

  whole: float
  arrays: float
  files: float
  verify: float


class Timed(Checkpoints):
  """Checkpoints that know how long their last manifest took, in seconds: `spent`."""

  def finish(self):
    """As there."""
    self.spent = seconds(super().finish)


def report(directory: Path, times: int) -> str:
  """Save the newest good state of a run so many times more, in a folder of its directory that is removed; the text.

  Raises:
    UserError: the directory is not that of a run, or nothing in it can be read back.
  """
  run = open_run(directory)
  cli.set_precision(run.config)
  mesh = make_mesh(fsdp=math.gcd(run.config.sharding.fsdp, jax.device_count()))
  _, state = restore_phase(run, None, mesh, whole=True)
  with tempfile.TemporaryDirectory(prefix="cost-", dir=directory) as folder:
    size, saves = measure(state, Path(folder) / "checkpoints", times)
  devices = f"{jax.device_count()} × {jax.devices()[0].device_kind}"
  head = f"step {int(state.step)}: {size / 2**20:,.2f} MiB ({size:,} bytes), saved {times} times on {devices}"
  return f"{head}\n\n{table(saves)}"


def measure(state, folder: Path, times: int) -> tuple[int, list[Save]]:
  """(bytes of a checkpoint of `state`, what each save of it took); one more goes before, which compiles."""
  saves = []
  with Timed(folder, keep=1) as checkpoints, progress_bar(times, what="save", unit="save") as bar:
    for step in range(times + 1):
      arrays = seconds(lambda: array_checksums(state))
      whole = seconds(lambda step=step: (checkpoints.save(step, state), checkpoints.wait()))
      os.sync()  # a restore comes with a new process, not while the disk still works on a save
      verify = seconds(lambda step=step: manifest.verify(folder / str(step)))
      saves.append(Save(whole, arrays, checkpoints.spent, verify))
      bar.update(step > 0)
    return manifest.read(folder / str(times)).size, saves[1:]


def seconds(action) -> float:
  """How long a call takes."""
  began = time.perf_counter()
  action()
  return time.perf_counter() - began


def table(saves: list[Save]) -> str:
  """Median and range of a save in seconds, and of the others in per cent of it."""
  parts = {
    "in a save: checksums of the arrays": lambda save: save.arrays,
    "in a save: checksums of the files, and the manifest": lambda save: save.files,
    "in a save: both": lambda save: save.arrays + save.files,
    "before a restore: the files compared": lambda save: save.verify,
    "after a restore: checksums of the arrays": lambda save: save.arrays,
  }
  rows = [("", "median", "least", "most")]
  rows.append(("seconds of a save", *spread([save.whole for save in saves], "{:.3f} s")))
  rows.append(("share of these seconds",))
  rows += [
    (f"  {name}", *spread([100 * of(save) / save.whole for save in saves], "{:.1f}%")) for name, of in parts.items()
  ]
  width = max(len(row[0]) for row in rows)
  return "\n".join(f"{name:<{width}}{''.join(f'{cell:>10}' for cell in cells)}".rstrip() for name, *cells in rows)


def spread(numbers: list[float], style: str) -> list[str]:
  """Median, least and greatest."""
  return [style.format(number) for number in (statistics.median(numbers), min(numbers), max(numbers))]
