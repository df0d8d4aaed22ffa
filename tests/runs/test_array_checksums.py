"""Checksums of arrays: any flipped bit changes them, on the device and on the host."""

import jax.numpy as jnp
import numpy as np
import pytest

from switchlora_jax.runs.array_checksums import array_checksums


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "int8"])
def test_any_flipped_bit_changes_the_checksum(dtype):
  values = np.arange(60).astype(jnp.dtype(dtype)).reshape(6, 10)
  expected = array_checksums({"x": jnp.array(values)})
  rng = np.random.default_rng(0)
  for _ in range(50):
    bytes_ = bytearray(values.tobytes())
    bytes_[rng.integers(len(bytes_))] ^= 1 << rng.integers(8)
    flipped = np.frombuffer(bytes(bytes_), values.dtype).reshape(values.shape)
    assert array_checksums({"x": jnp.array(flipped)}) != expected
  assert array_checksums({"x": jnp.array(values)}) == expected


@pytest.mark.parametrize("shape", [(), (7,), (5, 9), (3, 5, 9), (2, 0), (2, 3, 4, 5)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_checksum_is_the_documented_sum(shape, dtype):
  """Manifests store it, so it must not change. Element (…, j, i) has the weight 2·(i + 1,000,003·j + …) + 1."""
  values = np.random.default_rng(0).integers(-99, 99, shape).astype(jnp.dtype(dtype))
  bits = np.atleast_1d(values).view(f"u{values.dtype.itemsize}").astype(np.uint64)
  strides = (1, 1_000_003, 2_654_435_761, 2_246_822_519)
  positions = sum(
    index.astype(np.uint64) * stride for index, stride in zip(np.indices(bits.shape)[::-1], strides, strict=False)
  )
  expected = int(np.sum(bits * (2 * positions + 1))) % 2**32
  for x in (values, jnp.array(values)):
    assert array_checksums({"x": x}) == {"['x']": [expected, *shape]}
