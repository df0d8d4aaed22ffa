"""Progress of long work: a bar at a terminal, and whole lines in a file or a pipe."""

import os
import sys
from collections.abc import Iterable

from tqdm import tqdm

LINE = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {elapsed} elapsed, {remaining} left{postfix}"
LINE_WITHOUT_TOTAL = "{desc}: {n_fmt}, {rate_fmt}, {elapsed} elapsed{postfix}"


class LineFile:
  """A file for tqdm in which each drawing of a bar is a line, written at once and without carriage returns."""

  def __init__(self, stream):
    self._stream = stream

  def write(self, text: str) -> None:
    """Write the text of a bar as a line, without the blanks with which tqdm erases a bar and aligns numbers."""
    if words := text.split():
      self._stream.write(f"{' '.join(words)}\n")

  def flush(self) -> None:
    """Flush the file."""
    self._stream.flush()


class LineBar(tqdm):
  """A bar in a `LineFile`: no line repeats the count of the line before it.

  Attributes:
    rate: units per second, if known; by default, their mean since the start, since lines are rare.
  """

  rate: float | None = None
  _drawn = None

  @property
  def format_dict(self):
    """See tqdm. A total that is unknown, or that was estimated too low, has no time left."""
    found = super().format_dict
    found |= {"rate": self.rate} if self.rate else {}
    known = found["total"] is not None and found["n"] <= found["total"]
    return found | {"bar_format": LINE if known else LINE_WITHOUT_TOTAL}

  def display(self, msg=None, pos=None):
    """See tqdm."""
    if msg is None and self.n != self._drawn:
      self._drawn = self.n
      super().display(pos=pos)


def progress_bar(
  iterable: Iterable | None = None,
  *,
  desc: str = "",
  unit: str = "step",
  shown: bool = True,
  seconds: float = 30.0,
  **options,
) -> tqdm:
  """A tqdm bar on stderr, in the style that all commands share.

  If stderr is not a terminal, the bar prints lines instead: at most one per `seconds`, and one at its end unless it
  ends within `seconds`. `bar.refresh()` prints a line at any time.

  Args:
    iterable, desc, unit: see tqdm.
    shown: whether to print anything.
    seconds: least time between two lines; infinity leaves them to `refresh`. Not used at a terminal.
    **options: of tqdm, such as `total`, `initial` and `unit_scale`.
  """
  style = dict(desc=desc, unit=unit, smoothing=0.05, disable=not shown)
  if sys.stderr is None:  # closed by the shell
    return tqdm(iterable, disable=True, **options)
  if sys.stderr.isatty():
    return tqdm(iterable, **style, **_size(sys.stderr), **options)
  # With position 0, tqdm does not move the cursor. With miniters 1, its thread does not redraw the bar.
  lines = dict(mininterval=seconds, delay=seconds, miniters=1, position=0)
  return LineBar(iterable, file=LineFile(sys.stderr), **style, **options | lines)


def set_rate(bar: tqdm, rate: float) -> None:
  """Set the units per second that lines show; a bar at a terminal has a moving average of its own."""
  if isinstance(bar, LineBar):
    bar.rate = rate


def _size(terminal) -> dict:
  """Options of tqdm for the size of a terminal: as it changes, or fixed at a pseudo-terminal that has none."""
  return dict(dynamic_ncols=True) if all(os.get_terminal_size(terminal.fileno())) else dict(ncols=80, nrows=24)


def print_line(text: str) -> None:
  """Print a line on stdout at once, above the bars that a terminal shows."""
  tqdm.write(text)
  sys.stdout.flush()
