"""Eight simulated CPU devices, quick compiling, no silent broadcasting, and access to the recorded numbers."""

import gc
import os

# Compiling takes most of the time of tests; without fusion emitters a quarter less. But then a product and a sum are
# rounded as one in some programs and not in others, which AVX rules out: it has no such instruction. JAX reads both
# when it starts, as do the processes that tests start.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false --xla_cpu_max_isa=AVX"

import jax
import pytest
import shared_programs
from recorded import load

from switchlora_jax.analysis import ranks
from switchlora_jax.training import phases

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
phases.build_phase, ranks.make_learnt_rank = (
  shared_programs.build,
  shared_programs.make_learnt_rank,
)  # for all to import
gc.freeze()  # what is imported stays: the collector need not walk it again and again

collect_ignore = ["helpers"]


@pytest.fixture(scope="module", autouse=True)
def programs_of_a_file():
  """What is compiled for the tests of one file is not kept for the next: compilers fail in a process with too much."""
  yield
  shared_programs.forget()


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
