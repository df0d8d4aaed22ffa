"""Line styles and files of all figures: distinct colours and markers of lines, and an SVG beside each PNG."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import to_rgb

matplotlib.use("Agg")
from matplotlib import pyplot as plt

MARKERS = "os^vDPX*<>ph"
LINE_STYLES = ("-", "--", ":")


def distinct_colors() -> tuple[tuple[float, ...], ...]:
  """32 colours: matplotlib's ten, black and navy, then ten darker ones, then ten lighter ones."""
  ten = np.array([to_rgb(f"tab:{name}") for name in "blue orange green red purple brown pink gray olive cyan".split()])
  rows = (*ten, to_rgb("black"), to_rgb("navy"), *(0.55 * ten), *(0.5 + 0.5 * ten))
  return tuple(tuple(map(float, row)) for row in rows)


COLORS = distinct_colors()


def line_style(number: int) -> dict[str, Any]:
  """Colour, marker and line style of line `number` (from 0) of a figure.

  The first 32 have different colours, and lines of similar colours have different markers and line styles. The first
  96 differ.
  """
  return {
    "color": COLORS[number % len(COLORS)],
    "marker": MARKERS[number % len(MARKERS)],
    "linestyle": LINE_STYLES[number // len(MARKERS) % len(LINE_STYLES)],
  }


def save_figure(figure, path: Path):
  """Write a figure as `path` (a .png) and as an SVG of the same name, and close it.

  Equal figures give equal bytes.
  """
  figure.savefig(path, dpi=120)
  with plt.rc_context({"svg.hashsalt": path.stem}):  # else element ids are random
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
  plt.close(figure)
