"""Base kernels stored as a bfloat16 kernel and an int8 residual.

The model computes with the bfloat16 kernel. Methods that change kernels (the switch, ReLoRA's merge) add to the sum of
kernel and residual and round the result to 16 bits of significand rather than 8. Over thousands of small changes the
kernel drifts about 260 times less than in plain bfloat16, by 0.034% to 0.087% in docs/results/drift.md.

A bfloat16 number is the upper half of a float32. `split_float32` rounds a float32 to its upper 24 bits (a significand
of 16 bits) and splits these into the nearest bfloat16 and the int8 that must be added to its bits. Both are integers,
so `join_float32` is exact. Each weight takes three bytes; the forward pass reads two of them.

The frozen arrays of a layer are {"kernel"}, or {"kernel", "kernel_tail"} where the kernel has a residual.
"""

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

KERNEL = "kernel"
RESIDUAL = "kernel_tail"  # the array's name in the collection `frozen`, and so in checkpoints


def split_float32(values) -> tuple[jax.Array, jax.Array]:
  """Split float32 values into (bfloat16 kernel, int8 residual) of the same shape.

  `join_float32` restores the values with a relative error of at most 2⁻¹⁶, half a unit in the last place.

  The bit patterns of all floats of one sign are consecutive integers in the order of their values. A carry from the
  mantissa into the exponent therefore gives the right number. Ties of the 24 bits are rounded to even, so that a sum
  of many roundings has no bias.
  """
  values = jnp.where(jnp.isnan(values), jnp.nan, values)  # some NaN patterns would carry into the sign bit
  bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
  upper = (bits + 0x7F + (bits >> 8 & 1)) >> 8  # 24 bits
  kernel = (upper + 0x80) >> 8
  residual = (upper - (kernel << 8)).astype(jnp.int8)  # modulo 2⁸, in [-128, 127]
  return jax.lax.bitcast_convert_type(kernel.astype(jnp.uint16), jnp.bfloat16), residual


def join_float32(kernel, residual) -> jax.Array:
  """Join a bfloat16 kernel and its int8 residual to float32; with a residual of 0 the values are the kernel's."""
  upper = jax.lax.bitcast_convert_type(kernel, jnp.uint16).astype(jnp.uint32) << 16
  return jax.lax.bitcast_convert_type(upper + (residual.astype(jnp.int32) << 8).astype(jnp.uint32), jnp.float32)


def load_kernel(frozen_layer) -> jax.Array:
  """The kernel stored in the frozen arrays of a layer: float32 if there is a residual, else in its own dtype."""
  if RESIDUAL in frozen_layer:
    return join_float32(frozen_layer[KERNEL], frozen_layer[RESIDUAL])
  return frozen_layer[KERNEL]


def store_kernel(kernel, like) -> dict[str, jax.Array]:
  """The frozen arrays of a layer that store `kernel`, with the names and dtypes of `like`."""
  if RESIDUAL in like:
    return dict(zip((KERNEL, RESIDUAL), split_float32(kernel), strict=True))
  return {KERNEL: kernel.astype(like[KERNEL].dtype)}


def frozen_layers(frozen) -> dict[tuple[str, ...], dict[str, jax.Array]]:
  """The layers of a `frozen` collection that have a base kernel: {path of the layer: its frozen arrays}."""
  layers = flatten_dict(frozen, is_leaf=lambda _, layer: KERNEL in layer)
  return {path: layer for path, layer in layers.items() if not hasattr(layer, "shape")}  # else an array of another kind
