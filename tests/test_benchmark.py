"""The benchmark runs, small, and its table has what it promises."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from switchlora_jax.dense import LoRADense

ROOT = Path(__file__).parents[1]


def benchmark(*flags):
  command = [sys.executable, "-m", "experiments.benchmark", "--layers=1", "--vocabulary=64", "--rank=4", *flags]
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_times_and_operations_of_each_program(tmp_path):
  done = benchmark("--repeats=1", "--rows=2", "--length=16", f"--json={tmp_path / 'out.json'}")
  assert done.returncode == 0, done.stderr
  rows = {row["program"]: row for row in json.loads((tmp_path / "out.json").read_text())}
  assert list(rows) == [
    "full",
    "switchlora",
    "two products",
    "switching alone, first steps",
    "switching alone, last steps",
  ]
  assert rows["full"]["time_ratio"] == rows["full"]["operations_ratio"] == 1
  assert 0 < rows["two products"]["operations_ratio"] < 1
  assert "time_ratio" in done.stdout


def test_memory_with_and_without_switching(tmp_path):
  done = benchmark("--memory", "--rows=2", "--length=16", f"--json={tmp_path / 'out.json'}")
  assert done.returncode == 0, done.stderr
  rows = {row["program"]: row for row in json.loads((tmp_path / "out.json").read_text())}
  assert list(rows) == ["full", "lora", "switchlora"]
  assert rows["switchlora"]["arguments"] > rows["lora"]["arguments"] > 0


def test_the_layer_it_compares_with_computes_the_same():
  from experiments.benchmark import TwoProductDense

  x = jax.random.normal(jax.random.key(0), (5, 12))
  variables = LoRADense(7, rank=3).init(jax.random.key(1), x)
  merged, usual = (kind(7, rank=3).apply(variables, x) for kind in (LoRADense, TwoProductDense))
  np.testing.assert_allclose(merged, usual, atol=1e-5)
  assert float(jnp.abs(merged - x @ variables["frozen"]["kernel"]).max()) > 0.1


def test_bad_numbers_are_a_sentence():
  for flag in ("--rows=four", "--rank=r", "--layers=0"):
    done = benchmark(flag)
    assert done.returncode == 2 and f"error: flag {flag}:" in done.stderr and "Traceback" not in done.stderr
