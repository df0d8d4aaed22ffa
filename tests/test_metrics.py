"""The log of a run: complete, readable, and without what a continued run will write again."""

import json

import numpy as np
from matplotlib.image import imread

from switchlora_jax import metrics


def test_lines_are_json_and_not_finite_is_null(tmp_path):
  log = metrics.Metrics(tmp_path, start=0)
  log.write([{"step": 1, "loss": 2.5}, {"step": 2, "loss": float("nan")}])
  log.close()
  rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert rows == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": None}]


def test_continuing_drops_later_lines_and_half_lines(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
  log = metrics.Metrics(tmp_path, start=1)
  log.write([{"step": 2, "loss": 4.0}])
  log.close()
  assert [row["loss"] for row in metrics.read(tmp_path / "metrics.jsonl")] == [1.0, 4.0]


def test_tensorboard_has_the_numbers(tmp_path):
  log = metrics.Metrics(tmp_path, start=0)
  log.write([{"step": 1, "loss": 2.5}])
  log.close()
  (events,) = (tmp_path / "tensorboard").iterdir()
  assert b"loss" in events.read_bytes()


def test_running_mean_starts_at_the_first_value():
  np.testing.assert_allclose(metrics.running_mean([3.0, 3.0, 3.0], 0.9), 3.0)
  np.testing.assert_allclose(metrics.running_mean([1.0, 2.0], 0.5), [1.0, 5 / 3])


def test_the_picture_is_drawn(tmp_path):
  rows = [{"step": s, "loss": 5 / s} for s in range(1, 50)] + [{"step": 20, "val_loss": 0.4}, {"step": 3, "loss": None}]
  metrics.plot_loss(rows, tmp_path / "loss.png", "a title")
  picture = imread(tmp_path / "loss.png")
  assert picture.shape[:2] == (600, 960)
  assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 20
