"""Eight simulated CPU devices, quick compiling, no silent broadcasting, and access to the recorded numbers."""

import os

# Compiling takes most of the time of tests. JAX reads it when it is imported, as do the processes that tests start.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

import jax
import pytest
from recorded import load

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def golden():
  """name -> (arrays, what its .json says) of an extract in tests/golden."""
  return load


@pytest.fixture
def x64():
  """float64 for the length of one test."""
  with jax.enable_x64(True):
    yield


def pytest_addoption(parser):
  """`--faults`: see tests/faults/conftest.py; only this file may add options."""
  parser.addoption("--faults", action="store_true", help="run every injected fault, as `make faults` does")
