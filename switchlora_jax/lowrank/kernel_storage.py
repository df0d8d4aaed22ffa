"""How base kernels are stored: in the dtype of the parameters, in bfloat16, or in int8 with a scale per row.

  frozen arrays of a layer             forward pass reads      stored weight
  kernel                               kernel                  kernel
  kernel, kernel_tail                  bfloat16                float32 with a significand of 16 bits
  kernel, kernel_scale                 scale · int8            scale · int8
  kernel, kernel_scale, kernel_tail    scale · int8            scale · (int8 + residual / 256)

`kernel_tail` is an int8 residual. Methods that change kernels (the switch, ReLoRA's merge) need it: they add to the sum
of kernel and residual and round the result to 16 bits rather than 8. Over thousands of small changes the kernel drifts
250 to 300 times less; see docs/results/drift.md. The forward pass does not read the residual.

A bfloat16 number is the upper half of a float32. `split_float32` rounds a float32 to its upper 24 bits (a significand
of 16 bits) and splits these into the nearest bfloat16 and the int8 that must be added to its bits. Both are integers,
so `join_float32` is exact.

`quantize` divides each row, the weights of one input feature, by a scale that maps its largest magnitude to 127.
"""

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

KERNEL = "kernel"
RESIDUAL = "kernel_tail"  # the array's name in the collection `frozen`, and so in checkpoints
SCALE = "kernel_scale"
STORAGE = (KERNEL, SCALE, RESIDUAL)
LARGEST = 127  # magnitude of an int8 kernel


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


def quantize(values, residual: bool) -> dict[str, jax.Array]:
  """Store values [..., in, out] as int8 with a float32 scale per row, and perhaps an int8 residual.

  The error is at most half a step. A step is the largest magnitude of the row divided by 127, or by 32,512 with a
  residual. A row with a NaN or infinity becomes NaN.
  """
  values = values.astype(jnp.float32)
  largest = jnp.max(jnp.abs(values), -1, keepdims=True)
  scale = jnp.maximum(largest / LARGEST, jnp.finfo(jnp.float32).tiny)
  steps = 256 if residual else 1
  whole = jnp.round(values / scale * steps).astype(jnp.int32)
  if not residual:
    return {KERNEL: whole.astype(jnp.int8), SCALE: scale}
  kernel = (whole + 128) >> 8  # to the nearest
  return {KERNEL: kernel.astype(jnp.int8), SCALE: scale, RESIDUAL: (whole - (kernel << 8)).astype(jnp.int8)}


def store_new(kernel, dtype, residual: bool) -> dict[str, jax.Array]:
  """The frozen arrays of a new layer, which store `kernel` in `dtype`.

  Args:
    residual: whether to add an int8 residual if `dtype` is narrower than that of the kernel.
  """
  dtype = jnp.dtype(dtype)
  return _store(kernel, dtype, residual and dtype.itemsize < kernel.dtype.itemsize)


def store_kernel(kernel, like) -> dict[str, jax.Array]:
  """The frozen arrays of a layer that store `kernel`, with the names and dtypes of `like`."""
  return _store(kernel, like[KERNEL].dtype, RESIDUAL in like)


def _store(kernel, dtype, residual: bool) -> dict[str, jax.Array]:
  if dtype == jnp.int8:
    return quantize(kernel, residual)
  if residual:
    return dict(zip((KERNEL, RESIDUAL), split_float32(kernel), strict=True))
  return {KERNEL: kernel.astype(dtype)}


def load_kernel(frozen_layer) -> jax.Array:
  """The kernel stored in the frozen arrays of a layer, its residual included.

  It is float32 if there is a residual or a scale, else in its own dtype.
  """
  if SCALE not in frozen_layer and RESIDUAL in frozen_layer:
    return join_float32(frozen_layer[KERNEL], frozen_layer[RESIDUAL])
  if SCALE not in frozen_layer:
    return frozen_layer[KERNEL]
  kernel = frozen_layer[KERNEL].astype(jnp.float32)
  if RESIDUAL in frozen_layer:
    kernel += frozen_layer[RESIDUAL].astype(jnp.float32) / 256
  return frozen_layer[SCALE] * kernel


def forward_kernel(frozen_layer) -> jax.Array:
  """The kernel with which a layer computes: as `load_kernel`, without the residual."""
  return load_kernel(without_residual(frozen_layer))


def without_residual(frozen_layer) -> dict[str, jax.Array]:
  """The frozen arrays that the forward pass reads."""
  return {name: array for name, array in frozen_layer.items() if name != RESIDUAL}


def frozen_layers(frozen) -> dict[tuple[str, ...], dict[str, jax.Array]]:
  """The layers of a `frozen` collection that have a base kernel: {path of the layer: its frozen arrays}."""
  layers = flatten_dict(frozen, is_leaf=lambda _, layer: KERNEL in layer)
  return {path: layer for path, layer in layers.items() if not hasattr(layer, "shape")}  # else an array of another kind
