"""The checkpoints of a run: their steps, sizes, and whether they are what was saved.

python -m experiments.checkpoints --run=runs/tiny
python -m experiments.checkpoints --run=runs/tiny --cost    # what the checksums cost

Every file is read and compared with its checksum; no device is used, and the run may be training meanwhile. Exits
with 1 where a directory with the name of a step cannot be restored from. With --cost, the newest good state is
restored, saved again some times in a folder of the run's directory that is removed, and timed.
"""

import contextlib
import os
import sys
from pathlib import Path
from typing import NamedTuple

from absl import flags

from experiments.common import cli, save_cost
from switchlora_jax.errors import UserError
from switchlora_jax.runs import directory as run_directory
from switchlora_jax.runs import manifest

RUN = flags.DEFINE_string("run", None, "directory of a run: its --workdir")
COST = flags.DEFINE_bool("cost", False, "save the newest good state again, and print which share the checksums take")
SAVES = flags.DEFINE_integer("saves", 10, "how often --cost saves it", lower_bound=1)


class Row(NamedTuple):
  """A line of the table: the name of a directory, its bytes, when it was saved, and what there is to say of it."""

  name: str
  size: int
  saved: str
  health: str


def main():
  """Look at every directory, print the table, and say how many cannot be restored from; or what saves cost."""
  checkpoints = find(RUN.value)
  if COST.value:
    print(save_cost.report(checkpoints.parent, SAVES.value))
    return
  rows = [row for path in manifest.directories(checkpoints).values() if (row := examine(path))]
  bad = [row for row in rows if row.health != "good"]
  rows += [
    Row(path.name, size(path), "", "being saved, or left by a run that was killed") for path in partial(checkpoints)
  ]
  aside = sorted(checkpoints.parent.glob("damaged-*"))
  rows += [Row(f"../{path.name}", size(path), "", "moved aside by the run, which does not need it") for path in aside]
  if not rows:
    raise UserError(f"the run in {checkpoints.parent} has saved no checkpoint yet; let it train longer")
  print(table(rows))
  if bad:
    print(f"\n{len(bad)} cannot be restored from; a run that continues passes over them to the newest good one")
    sys.exit(1)


def find(run: str | None) -> Path:
  """The directory with the checkpoints of a run."""
  if run is None:
    raise UserError("--run is missing: give the directory of a run, say --run=runs/tiny")
  directory = Path(run).expanduser()
  run_directory.check_is_run(f"--run={directory}", directory, "checkpoints")
  return directory / "checkpoints"


def examine(path: Path) -> Row | None:
  """The line of a step; None where the run has removed it meanwhile."""
  saved = ""
  try:
    saved = manifest.read(path).saved
    manifest.verify(path)
    health = "good"
  except manifest.Damaged as error:
    health = str(error)
  return Row(path.name, size(path), saved, health) if path.exists() else None


def partial(checkpoints: Path) -> list[Path]:
  """The directories among the checkpoints that do not have the name of a step."""
  return sorted(
    {path for path in checkpoints.iterdir() if path.is_dir()} - {*manifest.directories(checkpoints).values()}
  )


def size(path: Path) -> int:
  """Bytes of all files in a directory, of which any may vanish meanwhile."""
  total = 0
  for folder, _, names in os.walk(path):
    for name in names:
      with contextlib.suppress(FileNotFoundError):
        total += os.path.getsize(os.path.join(folder, name))
  return total


def table(rows: list[Row]) -> str:
  """Columns side by side."""
  lines = [("step", "MiB", "saved", "health")]
  lines += [(row.name, f"{row.size / 2**20:,.2f}", row.saved, row.health) for row in rows]
  widths = [max(len(line[column]) for line in lines) for column in range(3)]
  return "\n".join(
    f"{name:>{widths[0]}}  {size:>{widths[1]}}  {saved:<{widths[2]}}  {health}" for name, size, saved, health in lines
  )


if __name__ == "__main__":
  cli.run(main)
