"""Line styles and files of all figures: distinct colour and marker per line, and an SVG beside each PNG."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# 12 colours that are easy to tell apart: matplotlib's ten, black and navy. Beyond 12 lines the line style changes.
COLORS = (*(f"tab:{name}" for name in "blue orange green red purple brown pink gray olive cyan".split()), "k", "navy")
MARKERS = "os^vDPX*<>ph"
LINE_STYLES = ("-", "--", ":")


def line_style(number: int) -> dict[str, Any]:
  """Colour, marker and line style of line `number` (from 0) of a figure; the first 36 differ."""
  return {
    "color": COLORS[number % len(COLORS)],
    "marker": MARKERS[number % len(MARKERS)],
    "linestyle": LINE_STYLES[number // len(COLORS) % len(LINE_STYLES)],
  }


def save_figure(figure, path: Path):
  """Write a figure as `path` (a .png) and as an SVG of the same name, and close it.

  Equal figures give equal bytes.
  """
  figure.savefig(path, dpi=120)
  with plt.rc_context({"svg.hashsalt": path.stem}):  # else element ids are random
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
  plt.close(figure)
