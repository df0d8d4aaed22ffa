"""A checksum of every array of a state, computed where the array lies: by it a checkpoint knows what was saved."""

import jax
import jax.numpy as jnp

STRIDES = (1_000_003, 2_654_435_761, 2_246_822_519, 3_266_489_917)  # of the weights, from the last axis but one on


@jax.jit
def checksums(leaves) -> list[jax.Array]:
  """One uint32 a leaf: Σ bits·weight mod 2³², with an odd weight for each place: 2·(i + Σ stride·other index) + 1.

  Any single flipped bit changes it. Rows of zeros at the end of an axis do not, so that it is the same for
  every layout's padding; and it is summed where the parts of an array lie.
  """

  def of(leaf):
    kind = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    bits = jnp.atleast_1d(jax.lax.bitcast_convert_type(jax.device_put(leaf, jax.memory.Space.Device), kind))
    bits = bits.astype(jnp.uint32)
    places = 2 * jax.lax.broadcasted_iota(jnp.uint32, bits.shape, bits.ndim - 1) + 1
    # Both sums of a row in one pass: XLA's CPU compiler writes the operands of a plain sum to memory first.
    add, zero = (lambda a, b: (a[0] + b[0], a[1] + b[1])), jnp.uint32(0)
    weighted, plain = jax.lax.reduce((bits * places, bits), (zero, zero), add, (bits.ndim - 1,))
    rows = (jax.lax.broadcasted_iota(jnp.uint32, plain.shape, axis) for axis in reversed(range(plain.ndim)))
    row = sum((i * jnp.uint32(stride) for i, stride in zip(rows, STRIDES, strict=False)), jnp.uint32(0))
    return jnp.sum(weighted + 2 * row * plain, dtype=jnp.uint32)

  return [of(leaf) for leaf in leaves]


def named_checksums(state) -> dict[str, list[int]]:
  """{path of the leaf: its checksum and its shape}, on the host; of whole arrays, wherever their parts lie."""
  named = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}
  # What waits in the memory of the host comes to the device one array at a time.
  there = {name: leaf for name, leaf in named.items() if leaf.sharding.memory_kind == "pinned_host"}
  here = {name: leaf for name, leaf in named.items() if name not in there}
  found = dict(zip(here, checksums(list(here.values())), strict=True))
  found |= {name: jax.block_until_ready(checksums([leaf])[0]) for name, leaf in there.items()}
  return {name: [int(x), *_shape(name, named[name])] for name, x in jax.device_get(found).items()}


def _shape(name: str, leaf) -> tuple[int, ...]:
  """The shape of an array, without the rows of spares: in some layouts there are more, which nothing reads."""
  return leaf.shape if "spare" not in name else (*leaf.shape[:-2], leaf.shape[-1])
