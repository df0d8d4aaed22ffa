"""The candidate vectors of SwitchLoRA: gather and scatter of the rows of spares, random draws, and metrics.

The candidates of a layer are `spare_a [c - r, in]`, `spare_b [c - r, out]`, `timer_a [r]`, `timer_b [r]` and
`cursor []`, with or without leading axes along which layers are stacked. The spares may be padded with rows beyond
c - r to a multiple of the number of devices. The padding is never read or written. Layers with fresh candidates have no
spares: see `FreshVectors`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec

from switchlora_jax.lowrank.layers import adapter_std, draw_vectors

SPARES = ("spare_a", "spare_b")  # the names of a layer's spares in `candidates`
IN_BOUNDS = dict(mode="promise_in_bounds", unique_indices=True)


def replicate(rows):
  """Replicate rows over the mesh, if there is one; otherwise XLA may all-gather the kernel they are added to."""
  if jax.sharding.get_abstract_mesh().empty:
    return rows
  return jax.lax.with_sharding_constraint(rows, PartitionSpec())


def gather_rows(vectors, indices, active):
  """Gather `vectors[l, indices[l]]` of L layers to every device.

  In host memory only the `active` rows are read, one by one; the others are returned as zeros.

  Shapes: vectors [L, S, d], indices and active [L, K]. Returns [L, K, d].
  """
  if jax.typeof(vectors).memory_space != jax.memory.Space.Host:
    return replicate(vectors.at[jnp.arange(indices.shape[0])[:, None], indices].get(**IN_BOUNDS))

  def fetch(layer, k, rows):
    row = jax.lax.dynamic_slice(vectors, (layer, indices[layer, k], 0), (1, 1, vectors.shape[-1]))
    return jax.lax.dynamic_update_slice(rows, jax.device_put(row, jax.memory.Space.Device), (layer, k, 0))

  return for_each_active(active, fetch, jnp.zeros((*indices.shape, vectors.shape[-1]), vectors.dtype))


def scatter_rows(vectors, indices, active, rows):
  """Set `vectors[l, indices[l]] = rows[l]` for L layers; inactive rows must equal the rows they overwrite.

  In host memory only the `active` rows are written.

  Shapes: vectors [L, S, d], indices and active [L, K], rows [L, K, d]. Returns the new vectors.
  """
  if jax.typeof(vectors).memory_space != jax.memory.Space.Host:
    return vectors.at[jnp.arange(indices.shape[0])[:, None], indices].set(rows, **IN_BOUNDS)

  def store(layer, k, vectors):
    row = jax.lax.dynamic_slice(rows, (layer, k, 0), (1, 1, rows.shape[-1]))
    place = (layer, indices[layer, k], 0)
    return jax.lax.dynamic_update_slice(vectors, jax.device_put(row, jax.memory.Space.Host), place)

  return for_each_active(active, store, vectors)


def for_each_active(active, body, carry):
  """Run `carry = body(l, k, carry)` for each l, k with `active[l, k]`; active [L, K]."""
  active_first = jnp.argsort(~active.reshape(-1))
  iteration = lambda number, carry: body(*jnp.divmod(active_first[number], active.shape[1]), carry)
  return jax.lax.fori_loop(0, jnp.sum(active), iteration, carry)


def switchable(candidates) -> list[tuple[str, ...]]:
  """The paths of the layers that can switch, sorted; the random draws are numbered in this order."""
  return sorted({path[:-1] for path in flatten_dict(candidates)})


def no_spares(path) -> str:
  """The message for layers with fresh candidates where stored ones are needed."""
  return f"{'/'.join(path) or 'the layer'} stores no spares"


def stack_shape(candidates, path) -> tuple[int, ...]:
  """The leading axes along which the layers under `path` are stacked: () or (layers,)."""
  return flatten_dict(candidates)[(*path, "cursor")].shape


def rank_and_spares(candidates, path) -> tuple[int, int]:
  """r and c - r of the layers under `path`; padding of the spares is not counted.

  Raises:
    ValueError: the layers store no spares.
  """
  flat = flatten_dict(candidates)
  rank = flat[*path, "timer_a"].shape[-1]
  if (*path, SPARES[0]) not in flat:
    raise ValueError(no_spares(path))
  return rank, min(flat[*path, name].shape[-1] for name in SPARES) - rank


def draw_uniforms(key, candidates) -> dict:
  """One uniform random number in [0, 1) per layer, for `switch`.

  Args:
    key: a random key, which is folded with the number of each layer.
    candidates: the collection of all layers.
  Returns:
    {path: float array of the shape of the layer's leading axes, [] or [layers]}.
  """
  draws, number = {}, 0
  for path in switchable(candidates):
    shape = stack_shape(candidates, path)
    size = math.prod(shape)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, number + jnp.arange(size))
    draws[path] = jax.vmap(jax.random.uniform)(keys).reshape(shape)
    number += size
  return draws


class FreshVectors(NamedTuple):
  """Candidates that are drawn when they are loaded, and not kept when they are evicted: no spares are stored.

  A vector depends on `key`, and on its layer, its factor and how many the layer has loaded before. It has the
  distribution of the initial vectors.

  Attributes:
    key: a random key, the same in all steps.
    init: `adapter_init` of the layers.
  """

  key: jax.Array
  init: str = "switchlora"

  def draw(self, layers, loads, rank: int, sizes: tuple[int, int], dtype):
    """The vectors that L layers load.

    Args:
      layers: [L] int32, the numbers of the layers.
      loads: [L, K] int32, the numbers of the loads of each layer.
      rank: r.
      sizes: (in, out).
      dtype: of the vectors.

    Returns:
      ([L, K, in] for A, [L, K, out] for B).
    """
    stds, fold = adapter_std(*sizes, rank, self.init), jax.random.fold_in

    def vectors(layer, load):
      keys = jax.random.split(fold(fold(self.key, layer), load))
      return tuple(draw_vectors(*of, dtype) for of in zip(keys, stds, sizes, strict=True))

    of_layers = jax.vmap(jax.vmap(vectors, (None, 0)))
    return tuple(map(replicate, of_layers(layers, loads)))


def draw_spare_indices(key, candidates, schedule) -> dict:
  """K distinct random indices of spares per factor of each layer, for `switch` in random order (section 2.2).

  Args:
    key: a random key.
    candidates: the collection of all layers.
    schedule: a `SwitchSchedule`, which gives K.
  Returns:
    {path: ([..., K] int32 for A, [..., K] int32 for B)}.
  """
  indices = {}
  for number, path in enumerate(switchable(candidates)):
    stack, (rank, spares) = stack_shape(candidates, path), rank_and_spares(candidates, path)
    priorities = jax.random.uniform(jax.random.fold_in(key, number), (2, *stack, spares))
    indices[path] = tuple(jax.lax.top_k(priorities, schedule.window(rank, spares))[1])
  return indices


def exchanged_bytes(candidates, schedule) -> int:
  """The largest number of bytes of spares that one step reads, and that it writes back; 0 for fresh candidates.

  A step that switches the most vectors it can, as the first steps do, exchanges K spares per factor of each layer.

  Args:
    candidates: arrays or ShapeDtypeStructs.
    schedule: a `SwitchSchedule`.
  """
  flat, total = flatten_dict(candidates), 0
  for path in (path for path in switchable(candidates) if (*path, SPARES[0]) in flat):
    rows = math.prod(stack_shape(candidates, path)) * schedule.window(*rank_and_spares(candidates, path))
    spares = (flat[*path, name] for name in SPARES)
    total += sum(rows * x.shape[-1] * x.dtype.itemsize for x in spares)
  return total


def coverage(candidates):
  """The share of the candidates of all layers that have been LoRA vectors so far, [] in [0, 1].

  This is defined for the sequential order only. There the first r candidates of a layer are LoRA vectors from the
  start, and each of the first c - r loads adds another one. The state does not record spares drawn at random.
  """
  flat, seen, total = flatten_dict(candidates), 0, 0
  for path in switchable(candidates):
    rank, spares = rank_and_spares(candidates, path)
    cursor = flat[(*path, "cursor")]
    seen += jnp.sum(rank + jnp.minimum(cursor, spares))
    total += cursor.size * (rank + spares)
  return seen / total
