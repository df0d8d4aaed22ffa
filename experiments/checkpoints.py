"""List the checkpoints of a run with their steps, sizes and integrity.

python -m experiments.checkpoints --run=runs/tiny
python -m experiments.checkpoints --run=runs/tiny --cost    # overhead of the checksums

Reads every file and compares its checksum. Needs no device, and the run may be training at the same time. Exits with
code 1 if a step directory cannot be restored. With --cost, the newest readable state is restored, saved repeatedly to
a temporary folder in the run's directory, and timed.
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
COST = flags.DEFINE_bool("cost", False, "time repeated saves of the newest readable state: overhead of the checksums")
SAVES = flags.DEFINE_integer("saves", 10, "number of timed saves with --cost", lower_bound=1)


class CheckpointRow(NamedTuple):
  """A line of the table: directory name, bytes, time of the save, and its integrity or the reason it is incomplete."""

  name: str
  size: int
  saved: str
  health: str


def main():
  """Verify each directory and print the table; with --cost, print the overhead of the checksums instead."""
  checkpoints = checkpoints_folder(RUN.value)
  if COST.value:
    print(save_cost.cost_report(checkpoints.parent, SAVES.value))
    return
  rows = [row for path in manifest.directories(checkpoints).values() if (row := verify_step(path))]
  bad = [row for row in rows if row.health != "good"]
  rows += [
    CheckpointRow(path.name, folder_size(path), "", "incomplete: a save in progress, or left by a killed run")
    for path in partial_saves(checkpoints)
  ]
  rows += [
    CheckpointRow(f"../{path.name}", folder_size(path), "", "moved aside by the run; not needed to continue")
    for path in sorted(checkpoints.parent.glob("damaged-*"))
  ]
  if not rows:
    raise UserError(f"the run in {checkpoints.parent} has saved no checkpoint yet; let it train longer")
  print(checkpoint_table(rows))
  if bad:
    print(f"\n{len(bad)} cannot be restored; the run continues from the newest valid checkpoint")
    sys.exit(1)


def checkpoints_folder(run: str | None) -> Path:
  """The directory with the checkpoints of the run that --run names."""
  if run is None:
    raise UserError("--run is missing: give the directory of a run, for example --run=runs/tiny")
  directory = Path(run).expanduser()
  run_directory.check_is_run(f"--run={directory}", directory, "checkpoints")
  return directory / "checkpoints"


def verify_step(path: Path) -> CheckpointRow | None:
  """The row of a step directory; None if the run has deleted it in the meantime."""
  saved = ""
  try:
    saved = manifest.read(path).saved
    manifest.verify(path)
    health = "good"
  except manifest.Damaged as error:
    health = str(error)
  return CheckpointRow(path.name, folder_size(path), saved, health) if path.exists() else None


def partial_saves(checkpoints: Path) -> list[Path]:
  """The directories in `checkpoints` whose name is not that of a step."""
  return sorted(
    {path for path in checkpoints.iterdir() if path.is_dir()} - {*manifest.directories(checkpoints).values()}
  )


def folder_size(path: Path) -> int:
  """Total bytes of all files in a directory; files may disappear during the count."""
  total = 0
  for folder, _, names in os.walk(path):
    for name in names:
      with contextlib.suppress(FileNotFoundError):
        total += os.path.getsize(os.path.join(folder, name))
  return total


def checkpoint_table(rows: list[CheckpointRow]) -> str:
  """The rows as aligned columns."""
  lines = [("step", "MiB", "saved", "health")]
  lines += [(row.name, f"{row.size / 2**20:,.2f}", row.saved, row.health) for row in rows]
  widths = [max(len(line[column]) for line in lines) for column in range(3)]
  return "\n".join(
    f"{name:>{widths[0]}}  {size:>{widths[1]}}  {saved:<{widths[2]}}  {health}" for name, size, saved, health in lines
  )


if __name__ == "__main__":
  cli.run(main)
