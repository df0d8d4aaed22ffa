"""The loss plot. Matplotlib is imported only to draw it."""

import subprocess
import sys

import numpy as np
from matplotlib.image import imread
from paths import ROOT

from switchlora_jax.training.plots import plot_loss, running_mean


def test_running_mean_starts_at_the_first_value():
  np.testing.assert_allclose(running_mean([3.0, 3.0, 3.0], 0.9), 3.0)
  np.testing.assert_allclose(running_mean([1.0, 2.0], 0.5), [1.0, 5 / 3])


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
