"""Draw one layer before and after a switch.

python docs/images/draw_method.py      # writes method.svg and method.png beside this file
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle

FROZEN, TRAINED, SPARE, SWITCHED, PAUSED = "#d0d0d0", "#9ecae1", "#ffffff", "#fdae6b", "#7b6fb0"
INK, ARROW = "#222222", "#b5500a"
RANK, SPARES = 4, 4  # vectors in the slots of a factor, spares of a factor
SIDE, CELL, PITCH = 3.2, 0.55, 0.72  # a full side, the width of a vector, the distance between vectors
LOW, SPARES_LOW = 0.0, -4.9  # lower edges of the matrices and of the spares


def main():
  plt.rcParams.update({"font.size": 12, "font.family": "DejaVu Sans", "svg.hashsalt": "method"})
  figure = plt.figure(figsize=(12, 5.4), facecolor="white")
  axes = figure.add_axes((0, 0, 1, 1))
  axes.axis("off")
  axes.set_xlim(-0.4, 26.2)
  axes.set_ylim(-6.9, 5.07)
  draw_layer(axes, 0.0, switched=False)
  draw_layer(axes, 15.0, switched=True)
  draw_arrow(axes, (11.6, 1.6), (14.3, 1.6), INK)
  write(axes, 12.95, 2.2, "switch b₂ with c₁", weight="bold")
  write(axes, 12.95, 0.75, "W + s·BA\nunchanged", size=11)
  draw_legend(axes)
  folder = Path(__file__).parent
  figure.savefig(folder / "method.svg", metadata={"Date": None})
  figure.savefig(folder / "method.png", dpi=110, metadata={"Software": None})


def draw_layer(axes, x: float, switched: bool):
  """The frozen kernel, the factors B and A and the spares of B, from the left edge `x`."""
  write(axes, x, LOW + SIDE + 1.25, "After" if switched else "Before", weight="bold", size=14, ha="left")
  box(axes, x, LOW, SIDE, SIDE, FROZEN, "W + s(b₂ − c₁)a₂ᵀ" if switched else "W", size=10.5 if switched else 14)
  write(axes, x + SIDE / 2, LOW + SIDE + 0.4, "kernel")
  write(axes, x + SIDE + 0.6, LOW + SIDE / 2, "+ s ·", size=14)

  left = x + SIDE + 1.2
  for k in range(RANK):
    new = switched and k == 1
    box(axes, left + k * PITCH, LOW, CELL, SIDE, SWITCHED if new else TRAINED, "c₁" if new else f"b{'₁₂₃₄'[k]}")
  write(axes, left + RANK * PITCH / 2, LOW + SIDE + 0.4, "B, r columns")

  right, top = left + RANK * PITCH + 0.3, LOW + SIDE
  for k in range(RANK):
    frozen = switched and k == 1
    color = PAUSED if frozen else TRAINED
    text = "a₂ᵀ, frozen" if frozen else f"a{'₁₂₃₄'[k]}ᵀ"
    y = top - k * (SIDE - CELL) / (RANK - 1) - CELL
    box(axes, right, y, SIDE, CELL, color, text, color="white" if frozen else INK)
  write(axes, right + SIDE / 2, top + 0.4, "A, r rows")

  for k in range(SPARES):
    new = switched and k == 0
    box(axes, left + k * PITCH, SPARES_LOW, CELL, SIDE, SWITCHED if new else SPARE, "b₂" if new else f"c{'₁₂₃₄'[k]}")
  note = "spares of B:\nthe c − r candidates\nthat are not in a slot\n(A has its own)"
  write(axes, left + SPARES * PITCH + 0.15, SPARES_LOW + SIDE / 2, note, size=11, ha="left")
  if not switched:
    draw_arrow(axes, (left + CELL / 2, SPARES_LOW + SIDE), (left + PITCH + CELL / 2, LOW), ARROW, "<|-|>")


def draw_legend(axes):
  """What the colours mean."""
  entries = [
    (FROZEN, "not trained"),
    (TRAINED, "trained"),
    (SPARE, "spare, stored"),
    (SWITCHED, "exchanged"),
    (PAUSED, "Adam state reset, frozen for N steps"),
  ]
  for x, (color, text) in zip((0.0, 4.2, 7.6, 11.9, 15.6), entries, strict=True):
    box(axes, x, -6.45, 0.5, 0.5, color, "")
    write(axes, x + 0.7, -6.2, text, size=11, ha="left")


def box(axes, x: float, y: float, width: float, height: float, face: str, text: str, **style):
  """A filled rectangle with a text in its middle."""
  axes.add_patch(Rectangle((x, y), width, height, facecolor=face, edgecolor=INK, linewidth=0.9))
  write(axes, x + width / 2, y + height / 2, text, **style)


def write(axes, x: float, y: float, text: str, ha="center", color=INK, **style):
  """A text around the point (x, y)."""
  axes.text(x, y, text, ha=ha, va="center", color=color, **style)


def draw_arrow(axes, start, end, color: str, style="-|>"):
  """An arrow between two points."""
  axes.add_patch(FancyArrowPatch(start, end, arrowstyle=style, mutation_scale=16, linewidth=1.8, color=color))


if __name__ == "__main__":
  main()
