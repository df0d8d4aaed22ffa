"""Switching: the recorded schedule and rates, and rounding. Its invariants are in test_invariants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import host, same_bits

from switchlora_jax.lowrank.kernel_storage import load_kernel, split_float32
from switchlora_jax.lowrank.layers import SwitchLoRADense
from switchlora_jax.lowrank.switching import (
  Layer,
  SwitchSchedule,
  expected_loads,
  norm_squared,
  switch,
  switch_count,
  switch_layers,
)

RECORDED = "r4 r8 r32 r128 hi_r8_i10_N5 hi_r8_i4_N2 hi_r16_i10_N5 hi_r16_i2_N1 hi_r5_i10_N5 hi_r3_i2_N1 hi_r1_i10_N5"


# --- compared with the authors' code ------------------------------------------------------------------------------


def recorded_case(arrays, meta, name):
  """The arrays of one recorded case without its prefix, and its shape and schedule."""
  case = next(c for c in meta["cases"] if c.get("tag", f"r{c['r']}") == name)
  interval, freeze_steps = case.get("interval", meta["base_interval"]), case.get("N", meta["N"])
  point = meta["expect_switch_descend_step"] / meta["total_steps"]
  schedule = SwitchSchedule(interval, freeze_steps, meta["total_steps"], point, decay_to=0.3)
  prefix = name + "_"
  return {k[len(prefix) :]: v for k, v in arrays.items() if k.startswith(prefix)}, case, schedule


def replay(case, schedule, uniforms, first_a, first_b):
  """Switches vectors whose elements are their candidate's id; returns the first element of each after every step."""
  rank, spares = case["r"], case["c"] - case["r"]
  vectors = lambda ids: np.tile(np.asarray(ids, np.float64)[:, None], case["c"])
  zero = np.zeros(rank, np.int32)
  layer = {
    "params": {"lora_a": vectors(first_a), "lora_b": vectors(first_b)},
    "frozen": {"kernel": np.zeros((case["c"], case["c"]))},
    "candidates": {
      "spare_a": vectors(range(spares)), "spare_b": vectors(range(spares)),
      "timer_a": zero, "timer_b": zero, "cursor": np.zeros((), np.int32),
    },
  }  # fmt: skip

  def one(layer, at):
    step, uniform = at
    out = switch(**layer, schedule=schedule, scale=0.5, step=step, uniforms=uniform)
    layer = {"params": out.params, "frozen": out.frozen, "candidates": out.candidates}
    masks = {"reset": out.reset, "freeze": out.freeze}
    wide = jax.tree.map(lambda m, p: jnp.broadcast_to(m, (p.shape[0], 1)), masks, {k: out.params for k in masks})
    seen = {"params": out.params, "candidates": {n: x for n, x in out.candidates.items() if "spare" not in n}}
    return layer, (jax.tree.map(lambda x: x[..., :1] if x.ndim == 2 else x, seen), wide, out.count)

  run = jax.jit(lambda layer: jax.lax.scan(one, layer, (np.arange(len(uniforms), dtype=np.int32), uniforms))[1])
  return jax.tree.map(np.asarray, run(layer))


@pytest.mark.parametrize("name", RECORDED.split())
def test_schedule_is_the_recorded_one(name, golden, x64):
  """Counts, slots, ids and timers of every step, from the recorded draws."""
  arrays, meta = golden("schedule")
  ref, case, schedule = recorded_case(arrays, meta, name)
  rank, steps, window = case["r"], len(ref["u"]), schedule.window(case["r"], case["c"] - case["r"])
  assert ref["num"].max() <= window, "the window holds every recorded switch"
  layers, masks, counts = replay(case, schedule, ref["u"], ref["selA"][0], ref["selB"][0])
  np.testing.assert_array_equal(counts, ref["num"])
  assert counts.sum() == case["total_switched"]

  cursor = layers["candidates"]["cursor"]
  np.testing.assert_array_equal(cursor, np.cumsum(ref["num"]))
  np.testing.assert_array_equal(cursor % rank, ref["curA"][1:])
  np.testing.assert_array_equal((cursor + rank // 2) % rank, ref["curB"][1:])
  for factor, first, counterpart in (("a", ref["selA"][0], "B"), ("b", ref["selB"][0], "A")):
    upper = factor.upper()
    ids = np.concatenate([first[None], layers["params"][f"lora_{factor}"][..., 0]])  # before and after each step
    for t in range(steps):
      slots, loaded, evicted = (ref[f"{key}{upper}"][t][: ref["num"][t]] for key in ("slots", "loaded", "evicted"))
      expected = ids[t].copy()
      expected[slots] = loaded
      np.testing.assert_array_equal(ids[t][slots], evicted)
      np.testing.assert_array_equal(ids[t + 1], expected)
      hit = np.isin(np.arange(rank), slots)
      np.testing.assert_array_equal(masks["reset"][f"lora_{counterpart.lower()}"][t][:, 0], hit)
    np.testing.assert_array_equal(ids[[0, 10, 100, -1]], ref[f"sel{upper}"])
    np.testing.assert_array_equal(layers["candidates"][f"timer_{factor}"], ref[f"fixed{upper}"][1:])
    np.testing.assert_array_equal(masks["freeze"][f"lora_{factor}"][..., 0], ref[f"frozen{upper}"])


@pytest.mark.parametrize("name", RECORDED.split())
def test_counts_before_the_cap_are_the_recorded_ones(name, golden, x64):
  arrays, meta = golden("schedule")
  ref, case, schedule = recorded_case(arrays, meta, name)
  steps = np.arange(len(ref["u"]), dtype=np.int32)
  count = lambda uniforms: switch_count(uniforms, case["r"] * schedule.rate(steps) / schedule.interval)
  np.testing.assert_array_equal(jax.jit(count)(ref["u"]), ref["raw_num"])


def test_rate_is_the_recorded_one(golden, x64):
  arrays, meta = golden("schedule")
  schedule = recorded_case(arrays, meta, "r4")[2]
  np.testing.assert_allclose(schedule.rate(np.arange(1000, dtype=np.int32)), arrays["r4_rate"], rtol=1e-12)


def test_rate_falls_to_decay_to_at_the_decay_point_and_stays_positive(x64):
  schedule = SwitchSchedule(total_steps=1000)
  np.testing.assert_allclose(schedule.rate(99), 1 / 3, rtol=1e-12)
  assert schedule.rate(10**6) == 1e-8


def test_before_its_start_nothing_is_switched_and_the_decay_counts_from_it(x64):
  now, later = SwitchSchedule(total_steps=1000), SwitchSchedule(total_steps=1000, start=300)
  assert np.all(later.rate(np.arange(300)) == 0)
  np.testing.assert_array_equal(later.rate(np.arange(300, 1000)), now.rate(np.arange(700)))


def test_a_curve_replaces_the_decay(x64):
  schedule = SwitchSchedule(total_steps=100, start=10, curve=lambda step: 1 - step / 100)
  np.testing.assert_array_equal(schedule.rate(np.asarray([0, 9, 10, 50])), [0, 0, 0.9, 0.5])
  assert schedule.rate(100) == 1e-8
  np.testing.assert_allclose(expected_loads(schedule, 8), 8 / 40 * sum(1 - t / 100 for t in range(10, 100)), rtol=1e-6)


def test_expected_loads_are_those_of_the_recorded_run(golden, x64):
  """r128: 256 vectors are loaded; the sum, a mean over draws, gives 265."""
  arrays, meta = golden("schedule")
  ref, case, schedule = recorded_case(arrays, meta, "r128")
  loads = expected_loads(schedule, case["r"])
  np.testing.assert_allclose(loads, 128 / 40 * np.sum(0.3 ** (np.arange(1, 1001) / 100)), rtol=1e-9)
  np.testing.assert_allclose(loads, ref["num"].sum(), rtol=0.1)
  later = expected_loads(schedule, case["r"], first_step=100)
  np.testing.assert_allclose(later, 0.3 * (loads - 128 / 40 * np.sum(0.3 ** (np.arange(901, 1001) / 100))), rtol=1e-9)
  assert expected_loads(schedule._replace(interval=0), case["r"]) == 0


def test_switch_count_rounds_up_with_the_probability_of_the_fraction():
  uniforms = np.linspace(0, 1, 1000, endpoint=False, dtype=np.float32)
  count = lambda expected: np.asarray(jax.jit(switch_count)(uniforms, expected))
  np.testing.assert_allclose(count(2.3).mean(), 2.3, rtol=1e-3)
  assert set(np.unique(count(2.3))) == {2, 3}
  assert set(np.unique(count(2.0))) == {2}


# --- metrics ------------------------------------------------------------------------------------------------------


def test_norm_squared_is_that_of_the_matrix_products(x64):
  rng = np.random.default_rng(0)
  left, right = rng.standard_normal((3, 5, 8)), rng.standard_normal((3, 5, 6))
  expected = np.sum(np.einsum("lkn,lkm->lnm", left, right) ** 2)
  of = jax.jit(norm_squared)
  np.testing.assert_allclose(of(left, right), expected, rtol=1e-12)
  assert of(left, np.zeros((3, 5, 6))) == 0


# --- rounding, and layers that never switch ------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("with_residual", "unit"), [(False, 2**-8), (True, 2**-16)], ids=["kernel alone", "with a residual"]
)
def test_a_bfloat16_kernel_is_rounded_once_per_switch(with_residual, unit):
  """To 8 bits, or to 16 with a residual. The forward pass uses the bfloat16 kernel, with 8 bits before and after.

  The only other error is that of a sum of 16 float32 outer products, which is less than 8.
  """
  rng = np.random.default_rng(0)
  shapes = ((1, 40, 30), (1, 16, 40), (1, 16, 30), (1, 14, 40), (1, 14, 30))
  kernel, *vectors = (rng.standard_normal(shape, np.float32) for shape in shapes)
  stored, residual = host(jax.jit(split_float32)(kernel))
  before = Layer(stored, *vectors, residual if with_residual else None)
  after, _ = host(jax.jit(switch_layers, static_argnums=3)(before, np.zeros(1, int), np.array([8]), 8, 1 / 16))
  assert (after.kernel.dtype, after.kernel_tail is None) == (jnp.bfloat16, not with_residual)
  product = lambda layers: np.einsum("krn,krm->nm", np.float64(layers.lora_a), np.float64(layers.lora_b)) / 16
  old, new = (np.float64(jax.jit(load_kernel)(layers.frozen))[0] for layers in (before, after))
  moved = product(before) - product(after)
  assert np.all(np.abs(new - old - moved) <= unit * np.abs(new) + 1e-5) and np.abs(moved).max() > 1
  assert np.abs(new - old - moved).max() > unit / 4, "a float32 kernel would have a smaller error"
  old_kernel, new_kernel = (np.asarray(layers.kernel[0], np.float64) for layers in (before, after))
  rounding = 2**-8 * (np.abs(old_kernel) + np.abs(new_kernel)) * 1.01 + 1e-5
  assert np.all(np.abs(new_kernel - old_kernel - moved) <= rounding)


def test_an_interval_of_0_and_layers_without_spares_are_never_switched():
  layer = SwitchLoRADense(6, rank=4)
  variables = jax.jit(layer.init)(jax.random.key(0), np.ones((1, 8), np.float32))
  never = switch(**variables, schedule=SwitchSchedule(interval=0), scale=1, step=0, uniforms=0.0)
  assert never.count == 0 and same_bits(never.params, variables["params"])
  full = jax.jit(SwitchLoRADense(6, rank=6).init)(jax.random.key(0), np.ones((1, 8), np.float32))
  assert "candidates" not in full
  assert switch(**full, schedule=SwitchSchedule(interval=2), scale=1, step=0, uniforms=0.0).count == 0
