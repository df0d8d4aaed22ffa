"""Splitting float32 into bfloat16 and int8 and joining them again: precision, order, special values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_model import same_bits

from switchlora_jax.lowrank.kernel_storage import (
  forward_kernel,
  frozen_layers,
  join_float32,
  load_kernel,
  split_float32,
  store_kernel,
  store_new,
)

SPLIT = jax.jit(split_float32)
JOIN = jax.jit(join_float32)
any_bits = st.lists(st.integers(0, 2**32 - 1), min_size=64, max_size=64)
many = settings(max_examples=50, deadline=None)


def floats(bits):
  """Float32 numbers from their bits."""
  return np.asarray(bits, np.uint32).view(np.float32)


def finite(bits):
  """Those below 2^127 in magnitude: finite, also after rounding to bfloat16."""
  values = floats(bits)
  return values[np.abs(np.nan_to_num(values, nan=np.inf)) < 2.0**127]


def padded(values):
  """Pads to 64 numbers, so that all calls share one compiled function."""
  return np.pad(values, (0, 64 - len(values)))


def round_trip(values):
  values = padded(values)
  kernel, residual = SPLIT(values)
  assert (kernel.dtype, residual.dtype) == (jnp.bfloat16, jnp.int8)
  return values.astype(np.float64), np.asarray(kernel, np.float64), np.asarray(JOIN(kernel, residual), np.float64)


@many
@given(any_bits)
def test_the_rounding_error_of_a_kernel_with_a_residual_and_alone(bits):
  """At most half a unit in the last place: 2⁻¹⁶ and 2⁻⁸ of a normal number, 2⁻¹⁴² and 2⁻¹³⁴ of a subnormal one.

  The kernel is rounded twice, to 24 bits and then to bfloat16. The first rounding adds half a unit of the 24 bits.
  """
  values, kernel, joined = round_trip(finite(bits))
  assert np.all(np.abs(joined - values) <= np.maximum(2.0**-16 * np.abs(values), 2.0**-142))
  assert np.all(np.abs(kernel - values) <= np.maximum(2.0**-8 * np.abs(values), 2.0**-134) * (1 + 2.0**-8))


def test_the_bound_is_reached_with_the_residual_and_exceeded_without():
  values, kernel, joined = round_trip(floats(0x3F800000 + np.arange(0, 2**16, 1024) + 0x80))
  assert np.abs(joined / values - 1).max() > 2.0**-16 * 0.99
  assert np.abs(kernel / values - 1).max() > 2.0**-9


@many
@given(any_bits)
def test_rounding_is_monotonic(bits):
  values = np.sort(finite(bits))
  neighbours = np.sort(np.concatenate([values, np.nextafter(values, np.float32(np.inf))]))[:64]
  for ordered in (values, neighbours):
    _, kernel, joined = (x[: len(ordered)] for x in round_trip(ordered))
    assert np.all(np.diff(kernel) >= 0) and np.all(np.diff(joined) >= 0)


@many
@given(any_bits)
@example([0x7F7F8000] * 64)
def test_values_of_24_bits_are_restored_bitwise(bits):
  values = floats(np.asarray(bits, np.uint32) & np.uint32(0xFFFFFF00))
  values = np.where(np.isnan(values), np.float32(1), values)
  assert same_bits(JOIN(*SPLIT(values)), values)


def test_every_bfloat16_has_a_residual_of_0():
  """All 65,536 values, including both zeros and infinities. NaN stays NaN."""
  values = np.arange(2**16, dtype=np.uint16).view(jnp.bfloat16)
  kernel, residual = split_float32(values.astype(np.float32))
  number = ~np.isnan(values.astype(np.float32))
  assert not np.any(np.asarray(residual)[number])
  assert same_bits(np.asarray(kernel)[number], values[number])
  assert np.all(np.isnan(np.asarray(kernel, np.float32)[~number]))
  assert same_bits(np.asarray(join_float32(kernel, residual))[number], values.astype(np.float32)[number])


@many
@given(any_bits)
@example([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001, 0x7FC00000, 0x7F800000, 0xFF800000, 0x7F7FFFFF] * 8)
def test_nan_and_infinity_are_preserved(bits):
  values = floats(bits)
  kernel, residual = SPLIT(values)
  for kept in (np.asarray(kernel, np.float32), np.asarray(JOIN(kernel, residual))):
    assert np.all(np.isnan(kept[np.isnan(values)]))
    assert np.array_equal(kept[np.isinf(values)], values[np.isinf(values)])


def test_many_roundings_are_not_biased():
  """Small numbers are added 10,000 times. The mean error of 256 sums is 0 within five standard deviations.

  One addition in 256 is a tie. If ties were always rounded up, the mean error would be 20 units in the last place,
  11 standard deviations.
  """
  rng = np.random.default_rng(0)
  start, small = rng.uniform(1, 1.5, 256), rng.uniform(-1, 1, (10_000, 256)) * 2.0**-12
  last_place, small = 2.0**-15, np.round(small * 2.0**23) / 2.0**23

  def step(parts, x):
    return split_float32(join_float32(*parts) + x), None

  parts, _ = jax.jit(lambda s, xs: jax.lax.scan(step, split_float32(s), xs))(np.float32(start), np.float32(small))
  error = (np.asarray(join_float32(*parts), np.float64) - start - small.sum(0)) / last_place
  deviation = (10_000 / 12 / 256) ** 0.5
  assert abs(error.mean()) < 5 * deviation and error.std() > 10


KERNEL = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_kernel_without_a_residual_is_loaded_unchanged_and_stored_with_a_cast(dtype):
  base = store_kernel(KERNEL, {"kernel": jax.ShapeDtypeStruct((3, 4), dtype)})
  assert list(base) == ["kernel"] and same_bits(base["kernel"], KERNEL.astype(dtype))
  assert same_bits(load_kernel(base), KERNEL.astype(dtype))


def test_a_kernel_with_a_residual_is_loaded_with_16_bits():
  like = {"kernel": jnp.zeros((), jnp.bfloat16), "kernel_tail": jnp.zeros((), jnp.int8)}
  base = store_kernel(KERNEL, like)
  assert {name: x.dtype for name, x in base.items()} == {name: x.dtype for name, x in like.items()}
  np.testing.assert_allclose(load_kernel(base), KERNEL, rtol=2**-16)
  assert np.abs(base["kernel"].astype(np.float32) / KERNEL - 1).max() > 2**-10
  assert same_bits(store_kernel(load_kernel(base), base), base)


def test_an_int8_kernel_has_a_scale_per_row_and_half_a_step_of_error():
  """Rows of very different magnitudes, also zeros and subnormal numbers. The largest element of a row is kept."""
  values = KERNEL * np.float32([[1e-20], [0], [1e15]])
  assert np.all(load_kernel(store_new(np.full((1, 3), 1e-40, np.float32), "int8", True)) < 1e-36)
  steps = np.abs(values).max(-1, keepdims=True) / 127
  for residual, parts in ((False, 1), (True, 256)):
    base = store_new(values, "int8", residual)
    assert {name: (x.dtype, x.shape) for name, x in base.items()} == {
      "kernel": (np.int8, (3, 4)), "kernel_scale": (np.float32, (3, 1))
    } | ({"kernel_tail": (np.int8, (3, 4))} if residual else {})  # fmt: skip
    np.testing.assert_allclose(np.asarray(base["kernel_scale"])[[0, 2]], steps[[0, 2]], rtol=1e-6)
    assert np.all(np.abs(load_kernel(base) - values) <= steps / parts * (0.5 + 2**-12))
    again = store_kernel(load_kernel(base), base)
    assert all(same_bits(again[name], base[name]) for name in base if name != "kernel_scale")
    np.testing.assert_allclose(again["kernel_scale"], base["kernel_scale"], rtol=2**-22)
    assert np.all(np.abs(forward_kernel(base) - load_kernel(base)) <= steps * 0.5001)
  assert not same_bits(forward_kernel(base), load_kernel(base))


def test_a_row_with_a_nan_stays_visible():
  values = np.where([[False] * 4, [True] + [False] * 3, [False] * 4], np.nan, KERNEL).astype(np.float32)
  for residual in (False, True):
    found = np.asarray(load_kernel(store_new(values, "int8", residual)))
    assert np.all(np.isnan(found[1])) and np.all(np.isfinite(found[[0, 2]]))


@pytest.mark.parametrize("residual", [False, True])
def test_many_int8_writes_are_not_biased(residual):
  """Small numbers are added 2,000 times; the mean error of 1,024 sums is 0 within five standard deviations."""
  rng = np.random.default_rng(0)
  start = rng.uniform(-1, 1, (8, 129)).astype(np.float32)
  start[:, 0] = 1  # the largest element stays, and with it the scale
  small = rng.uniform(-1, 1, (2000, 8, 129)).astype(np.float32) * np.float32(0.002)
  small[:, :, 0] = 0

  def step(base, x):
    return store_kernel(load_kernel(base) + x, base), None

  base = store_new(start, "int8", residual)
  last, _ = jax.jit(lambda base, xs: jax.lax.scan(step, base, xs))(base, small)
  error = (np.asarray(load_kernel(last), np.float64) - start - small.astype(np.float64).sum(0))[:, 1:]
  unit = 1 / 127 / (256 if residual else 1)
  assert abs(error.mean()) < 5 * error.std() / 1024**0.5
  assert error.std() < (0.5 * unit * 2000**0.5 if residual else np.inf)


def test_frozen_layers_finds_a_single_layer_and_nested_layers():
  layer, other = {"kernel": 1}, {"kernel": 2, "kernel_tail": 3}
  assert frozen_layers(layer) == {(): layer}
  assert frozen_layers({"blocks": {"q": layer, "v": other}}) == {("blocks", "q"): layer, ("blocks", "v"): other}
  assert frozen_layers({}) == {}
