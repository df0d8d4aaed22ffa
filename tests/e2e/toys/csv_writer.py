"""Writes the training loss as CSV.

The toy metrics writer of CONTRIBUTING.md.
"""

from pathlib import Path

from switchlora_jax.training.metrics import Writer


class CsvWriter(Writer):
  """Appends `step,loss` to loss.csv, one line per training step. The lines of steps after `start` are dropped."""

  def __init__(self, workdir: Path, start: int):
    self._file = (workdir / "loss.csv").open("a+", encoding="utf-8")
    self._file.seek(0)
    kept = [line for line in self._file if int(line.partition(",")[0]) <= start]
    self._file.truncate(0)
    self._file.writelines(kept)

  def write(self, rows: list[dict]) -> None:
    """Rows of evaluations, which have no `loss`, are left out."""
    self._file.writelines(f"{row['step']},{row['loss']}\n" for row in rows if "loss" in row)

  def close(self) -> None:
    """Close the file."""
    self._file.close()
