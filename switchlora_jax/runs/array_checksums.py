"""A checksum of every array of a state, computed on the devices that hold it; see `runs.files` for the other kinds."""

import jax
import jax.numpy as jnp
import numpy as np

STRIDES = (1_000_003, 2_654_435_761, 2_246_822_519, 3_266_489_917)  # weights of the indices, from the second last axis


@jax.jit
def sum_weighted_bits(leaves) -> list[jax.Array]:
  """One uint32 per leaf: Σ bits·weight mod 2³², with the odd weight 2·(i + Σ stride·other index) + 1 per element.

  Any single flipped bit changes the sum. Rows of zeros at the end of an axis do not, so it is independent of the
  padding of a layout. Each device sums its own part of an array.
  """

  def of(leaf):
    kind = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    bits = jnp.atleast_1d(jax.lax.bitcast_convert_type(jax.device_put(leaf, jax.memory.Space.Device), kind))
    bits = bits.astype(jnp.uint32)
    weights = 2 * jax.lax.broadcasted_iota(jnp.uint32, bits.shape, bits.ndim - 1) + 1
    # Both sums of a row in one pass: XLA's CPU compiler writes the operands of a plain sum to memory first.
    add, zero = (lambda a, b: (a[0] + b[0], a[1] + b[1])), jnp.uint32(0)
    weighted, plain = jax.lax.reduce((bits * weights, bits), (zero, zero), add, (bits.ndim - 1,))
    indices = (jax.lax.broadcasted_iota(jnp.uint32, plain.shape, axis) for axis in reversed(range(plain.ndim)))
    row = sum((i * jnp.uint32(stride) for i, stride in zip(indices, STRIDES, strict=False)), jnp.uint32(0))
    return jnp.sum(weighted + 2 * row * plain, dtype=jnp.uint32)

  return [of(leaf) for leaf in leaves]


def array_checksums(state) -> dict[str, list[int]]:
  """{path of a leaf: [checksum, *shape]} on the host; of whole arrays, for any sharding.

  Args:
    state: a pytree of JAX or NumPy arrays.
  """
  named = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}
  # Arrays in host memory are copied to the device one at a time.
  host = {name: leaf for name, leaf in named.items() if _is_on_host(leaf)}
  device = {name: leaf for name, leaf in named.items() if name not in host}
  found = dict(zip(device, sum_weighted_bits(list(device.values())), strict=True))
  found |= {name: jax.block_until_ready(sum_weighted_bits([leaf])[0]) for name, leaf in host.items()}
  return {name: [int(x), *saved_shape(name, named[name].shape)] for name, x in jax.device_get(found).items()}


def saved_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """The shape of an array without the axis of spare rows, which some layouts pad."""
  return shape if "spare" not in name else (*shape[:-2], shape[-1])


def _is_on_host(leaf) -> bool:
  return isinstance(leaf, np.ndarray) or leaf.sharding.memory_kind == "pinned_host"
