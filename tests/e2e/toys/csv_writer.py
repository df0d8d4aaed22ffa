"""Writes the training loss as CSV.

The toy metrics writer of CONTRIBUTING.md.
"""

from pathlib import Path

from switchlora_jax.training.metrics import Writer


class CsvWriter(Writer):
  """Appends `step,loss` to loss.csv, one line per training step."""

  def __init__(self, workdir: Path):
    self._file = (workdir / "loss.csv").open("a", encoding="utf-8")

  def write(self, rows: list[dict]) -> None:
    """Rows of evaluations, which have no `loss`, are left out."""
    self._file.writelines(f"{row['step']},{row['loss']}\n" for row in rows if "loss" in row)

  def close(self) -> None:
    """Close the file."""
    self._file.close()
