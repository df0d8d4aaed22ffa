"""The plan of a run: memory compared with formulas and a run, traffic, roofline, largest micro-batch."""

import importlib
import itertools
import os
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from paths import ROOT

from switchlora_jax.config import resolve
from switchlora_jax.parallel.sharding import DATA, make_mesh
from switchlora_jax.planning import planner
from switchlora_jax.planning.collectives import Collective
from switchlora_jax.planning.planner import Estimate, StepPlan
from switchlora_jax.planning.topology import Gpu
from switchlora_jax.training.phases import build_phase

# --- bytes of the state, by hand ----------------------------------------------------------------------------------

PRESETS = ("llama_130m", "llama_250m", "llama_350m", "llama_1b")


def by_hand(method: str, model, rank: int) -> dict[str, int]:
  """Bytes of each part of the state on one of 8 devices: 4 per number or count. Only the spares are sharded."""
  hidden, inner, layers = model.hidden_size, model.intermediate_size, model.num_layers
  shapes = [(hidden, hidden)] * 4 + [(hidden, inner)] * 2 + [(inner, hidden)]
  outside = 2 * model.vocab_size * hidden + (2 * layers + 1) * hidden  # embedding, head, norms
  kernels = layers * sum(n * m for n, m in shapes)
  if method == "full":
    counts = len(shapes) + 5  # one per array: 7 kernels, 3 kinds of norms, embedding, head
    trained = outside + kernels
    return {"trainable": 4 * trained, "frozen": 0, "candidates": 0, "optimizer": 4 * (2 * trained + counts)}
  trained = outside + layers * sum(rank * (n + m) for n, m in shapes)
  counts = layers * 2 * 7 * rank + 5  # one per LoRA vector
  spares = layers * sum((min(n, m) - rank) * (n + m) for n, m in shapes)
  timers = layers * 7 * (2 * rank + 1)  # a timer for each LoRA vector, and a cursor per layer
  return {
    "trainable": 4 * trained,
    "frozen": 4 * kernels,
    "candidates": 4 * (spares // 8 + timers) if method == "switchlora" else 0,
    "optimizer": 4 * (2 * trained + counts),
  }


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("method", ["full", "lora", "switchlora"])
def test_state_bytes_match_the_formula(name, method):
  config = ConfigDict(importlib.import_module(f"configs.{name}").get_config())
  config.method = method
  state = build_phase(resolve(config, devices=8), make_mesh()).abstract
  parts = {"trainable": state.params, "frozen": state.frozen, "candidates": state.candidates}
  parts["optimizer"] = state.opt_state
  found = {part: planner.device_bytes(tree) for part, tree in parts.items()}
  assert found == by_hand(method, config.model, config.rank)


def abstract(shape, spec=(), dtype=jnp.float32, kind=None):
  sharding = NamedSharding(small_model.mesh(8), PartitionSpec(*spec), memory_kind=kind)
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def test_a_device_holds_its_shard():
  tree = {"copied": abstract((16, 3)), "split": [abstract((16, 3), (DATA,), jnp.bfloat16)]}
  assert planner.device_bytes(tree) == 16 * 3 * 4 + 2 * 3 * 2
  assert planner.device_bytes({}) == 0


def test_host_bytes_are_those_in_pinned_host_memory():
  tree = {"device": abstract((16, 3)), "host": abstract((16, 5), (DATA,), kind="pinned_host")}
  assert planner.host_bytes(tree) == 2 * 5 * 4
  assert planner.host_bytes(tree["device"]) == 0


# --- the compiled step --------------------------------------------------------------------------------------------


HOST = 1000  # assumed bytes on the host


@lru_cache
def plan(method: str, accumulation: int, devices: int = 8):
  """The plan of the small model with 4 sequences per device, its state and its config; compiled once for all tests."""
  config = small_model.config(method, accumulation=accumulation, batch_size=4 * devices)
  config = resolve(config, devices)
  phase = build_phase(config, small_model.mesh(devices))
  return planner.plan_step(phase, config, small_model.mesh(devices), HOST), phase.abstract, config


CASES = list(itertools.product(("full", "switchlora"), (1, 4)))  # (method, accumulation)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_all_reduce_has_the_gradients_and_the_loss(case):
  method, accumulation = case
  found, _, _ = plan(method, accumulation)
  assert found.collective_bytes("all-reduce") == found.trainable + 4
  assert {collective.kind for collective in found.traffic} == {"all-reduce"}
  assert all(collective.certain and len(collective.groups[0]) == 8 for collective in found.traffic)


@pytest.mark.slow
def test_switchlora_reduces_only_its_trainable_parameters():
  full, ours = (plan(method, 1)[0] for method in ("full", "switchlora"))
  assert (
    0 < full.trainable - ours.trainable == full.collective_bytes("all-reduce") - ours.collective_bytes("all-reduce")
  )


def test_the_peak_of_a_plan_is_the_sum_of_its_parts():
  """The peak excludes bytes on the host. Metrics and the table of outputs add less than 16 bytes per array."""
  found, state, config = plan("switchlora", 1)
  counters = planner.device_bytes([state.step, state.skipped, state.skipped_in_a_row, state.spikes])
  state_bytes = found.trainable + found.frozen + found.candidates + found.optimizer + counters
  rows = 4 * config.seq_len * 4
  rest = found.peak - (state_bytes + rows + found.temporaries - HOST)
  assert 0 < rest < 16 * len(jax.tree.leaves(state))
  assert found.tokens == 4 * config.seq_len
  assert found.seconds > 0 and found.host == HOST
  assert found.moved == pytest.approx(2 * state_bytes + rows + 2 * found.temporaries, abs=rest)


def test_temporaries_are_moved_once_per_micro_batch():
  memory = {"arguments": 100, "outputs": 10, "temporaries": 3}
  assert [planner.moved_bytes(memory, accumulation) for accumulation in (1, 4)] == [116, 134]


def test_operations_per_token_do_not_depend_on_the_number_of_devices():
  (alone, _, _), (found, _, _) = plan("full", 1, devices=1), plan("full", 1)
  assert (alone.operations, alone.tokens) == (found.operations, found.tokens)
  assert sum(collective.sent for collective in alone.traffic) == 0


# --- compared with a run ------------------------------------------------------------------------------------------

RUN = ROOT / "tests" / "helpers" / "measured_step.py"
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux reports the memory of a process")
@pytest.mark.slow
def test_a_run_uses_the_planned_memory():
  """The bytes of live arrays match exactly. In a step, resident memory grows by the temporaries, within 10%.

  The tolerance covers workspaces of threads for matrix products (18 of 418 MB here), and pages that are never
  written and therefore not resident.
  """
  done = subprocess.run([sys.executable, RUN], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  numbers = {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", done.stdout)}
  assert numbers["held"] == numbers["live"] > 2e7
  assert numbers["grown"] == pytest.approx(numbers["temporaries"], rel=0.1)
  assert numbers["peak"] == pytest.approx(numbers["held"] + numbers["temporaries"], abs=1024)
  assert numbers["temporaries"] > 8 * numbers["held"], "the temporaries are too small for the tolerance"


# --- roofline -----------------------------------------------------------------------------------------------------

GPU = Gpu(memory=1000, bandwidth=100.0, nvlink=50.0, network=10.0, peak={"bfloat16": 400.0, "float32": 200.0})
BLANK = StepPlan(*[0] * 8, moved=300, operations=2000, tokens=10, traffic=[], seconds=0.0)


def reduction(*groups, size=1000):
  return Collective("all-reduce", size, groups, 1, True)


def test_an_estimate_is_the_maximum_of_compute_and_memory_plus_links():
  estimate = planner.estimate(BLANK._replace(traffic=[reduction((0, 1))]), GPU, "float32", per_host=2)
  assert estimate == Estimate(products=10.0, memory=3.0, links=20.0)
  assert (estimate.step, estimate.link_share, estimate.peak_share) == (30.0, 20 / 30, 10 / 30)
  half = planner.estimate(BLANK._replace(moved=3000), GPU, "bfloat16", per_host=2)
  assert (half.products, half.step, half.peak_share) == (5.0, 30.0, 5 / 30)


@pytest.mark.parametrize(
  ("groups", "per_host", "speed"),
  [
    ([(0, 1, 2, 3)], 4, 50.0),
    ([(0, 1, 2, 3)], 2, 20.0),  # two adapters per host
    ([(0, 1), (2, 3)], 2, 50.0),
    ([(0, 2), (1, 3)], 2, 10.0),  # each group has one GPU per host
    ([tuple(range(16))], 8, 50.0),  # eight adapters are faster than NVLink
  ],
)
def test_a_link_is_as_fast_as_its_slowest_part(groups, per_host, speed):
  assert planner.link_speed(reduction(*groups), GPU, per_host) == speed


# --- the largest micro-batch --------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 1000), st.integers(1, 50), st.integers(0, 20_000))
def test_the_largest_micro_batch_is_found_in_three_probes_if_memory_is_linear(rows, most, base, slope, limit):
  rows = min(rows, most)
  peaks = planner.search_micro_batch(lambda n: base + slope * n, rows, most, limit)
  assert len(peaks) <= 3 and max(peaks) <= max(most, rows)
  assert planner.largest_fitting(peaks, limit) == max(
    (n for n in range(1, most + 1) if base + slope * n <= limit), default=0
  )


@given(st.integers(1, 100), st.integers(1, 400), st.integers(0, 10**6))
def test_the_found_micro_batch_fits_if_memory_is_quadratic(rows, most, limit):
  rows, probes = min(rows, most), []

  def peak_of(n):
    probes.append(n)
    return 100 + 40 * n + n * n

  peaks = planner.search_micro_batch(peak_of, rows, most, limit)
  found = planner.largest_fitting(peaks, limit)
  assert probes == list(peaks) and len(probes) <= 5 and min(probes) >= 1
  assert found == 0 or peak_of(found) <= limit
