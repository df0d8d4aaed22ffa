"""Base kernels in 16 bits and 8 more: a bfloat16 head to compute with, and an int8 tail so that sums do not drift.

A bfloat16 number is the upper half of a float32. `split` rounds a float32 to its upper 24 bits, 16 of them
mantissa, and cuts these in two: the head is the nearest bfloat16, the tail what must be added to the head's
bits. Both are whole numbers, so `join` is exact. Three bytes a weight, of which the model reads two.

A layer's frozen arrays are {"kernel"}, or {"kernel", "kernel_tail"} where the kernel is a head.
"""

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

KERNEL, TAIL = "kernel", "kernel_tail"


def split(values) -> tuple[jax.Array, jax.Array]:
  """Float32 values as (head bfloat16, tail int8); `join` gives them back to 2⁻¹⁶ of their size, the nearest there is.

  In value order all floats of one sign are consecutive whole numbers, so a carry from the mantissa into the
  exponent is right as it comes. Ties of the 24 bits go to the even one: sums of many roundings have no bias.
  """
  values = jnp.where(jnp.isnan(values), jnp.nan, values)  # some NaNs would be carried into the sign
  bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
  kept = (bits + 0x7F + (bits >> 8 & 1)) >> 8  # 24 bits
  head = (kept + 0x80) >> 8
  tail = (kept - (head << 8)).astype(jnp.int8)  # modulo 2⁸, in [-128, 127]
  return jax.lax.bitcast_convert_type(head.astype(jnp.uint16), jnp.bfloat16), tail


def join(head, tail) -> jax.Array:
  """The float32 values that `split` has cut in two; a tail of 0 leaves the head as it is."""
  upper = jax.lax.bitcast_convert_type(head, jnp.uint16).astype(jnp.uint32) << 16
  return jax.lax.bitcast_convert_type(upper + (tail.astype(jnp.int32) << 8).astype(jnp.uint32), jnp.float32)


def read(base) -> jax.Array:
  """The kernel in a layer's frozen arrays, as exactly as they hold it."""
  return join(base[KERNEL], base[TAIL]) if TAIL in base else base[KERNEL]


def write(kernel, like) -> dict[str, jax.Array]:
  """A kernel as the frozen arrays of a layer, of the names and dtypes of `like`."""
  if TAIL in like:
    return dict(zip((KERNEL, TAIL), split(kernel), strict=True))
  return {KERNEL: kernel.astype(like[KERNEL].dtype)}


def bases(frozen) -> dict[tuple[str, ...], dict[str, jax.Array]]:
  """{path of a layer: its frozen arrays} of a `frozen` collection."""
  return flatten_dict(frozen, is_leaf=lambda _, layer: KERNEL in layer)
