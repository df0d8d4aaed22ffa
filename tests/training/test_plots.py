"""The loss plot. Matplotlib is imported only to draw it."""

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.image import imread
from paths import ROOT

from switchlora_jax.training import plots
from switchlora_jax.training.plots import plot_loss, running_mean


def test_the_running_mean_does_not_lag():
  """A mean of past values would be above a falling line by its slope times half of the window."""
  falling = 7 - 0.25 * np.arange(40)
  np.testing.assert_allclose(running_mean(falling), falling)
  noise = np.where(np.arange(40) % 2, 1.0, -1.0)
  assert abs(running_mean(falling + noise) - falling)[5:-5].max() < 0.1
  np.testing.assert_allclose(running_mean([1.0, 2.0, 6.0]), [1, 3, 6])
  assert len(running_mean([])) == 0


@pytest.fixture
def axes(monkeypatch, tmp_path):
  """rows -> the axes of their picture."""

  def draw(rows):
    drawn = []
    monkeypatch.setattr(plots.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure.axes[0]))
    plot_loss(rows, tmp_path / "loss.png", "a title")
    return drawn[0]

  return draw


def test_steps_on_the_axis_are_integers(axes):
  for last in (2, 3, 7):
    found = axes([{"step": step, "loss": 5 / step} for step in range(1, last)])
    assert all(float(tick).is_integer() for tick in found.get_xticks())


def test_the_hand_over_of_a_warm_start_is_marked(axes):
  rows = [{"step": step, "loss": 5 / step} for step in range(1, 9)]
  assert not axes(rows).texts
  rows[4]["hand_over"] = 1
  found = axes(rows)
  assert [text.get_text() for text in found.texts] == ["hand-over after step 4"]
  assert [4, 4] in [list(line.get_xdata()) for line in found.lines]


def test_further_validation_texts_have_lines_of_their_own(axes):
  rows = [{"step": step, "val_loss": 3.0, "val_loss/old": loss} for step, loss in ((0, 2.0), (4, None), (8, 2.5))]
  (line,) = [line for line in axes(rows).lines if line.get_label() == "validation, old"]
  np.testing.assert_array_equal(line.get_xydata(), [[0, 2], [4, np.nan], [8, 2.5]])


def test_the_picture_is_drawn(tmp_path):
  rows = [{"step": s, "loss": 5 / s} for s in range(1, 50)] + [{"step": 20, "val_loss": 0.4}, {"step": 3, "loss": None}]
  plot_loss(rows, tmp_path / "loss.png", "a title")
  picture = imread(tmp_path / "loss.png")
  assert picture.shape[:2] == (600, 960)
  assert (tmp_path / "loss.svg").read_text().rstrip().endswith("</svg>")
  assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 20


def test_a_picture_that_cannot_be_written_gives_a_warning(tmp_path, caplog):
  plot_loss([{"step": 1, "loss": 5}], tmp_path / "nowhere" / "loss.png", "a title")
  assert "loss.png cannot be written" in caplog.text and "loss.svg cannot be written" in caplog.text


BUILD = """
import sys
import switchlora_jax.training.phases
print(*sorted({"matplotlib", "tensorboardX", "datasets"} & sys.modules.keys()))
import switchlora_jax.training.trainer
print(*sorted({"matplotlib", "datasets"} & sys.modules.keys()))
"""


def test_neither_building_a_step_nor_training_imports_matplotlib():
  """Runs in a subprocess. The trainer imports TensorBoard to write its events."""
  done = subprocess.run([sys.executable, "-c", BUILD], cwd=ROOT, capture_output=True, text=True)
  assert (done.returncode, done.stdout) == (0, "\n\n"), done.stdout + done.stderr
