"""The candidates that wait: how their rows are reached wherever they lie, and which of them come next.

A layer's candidates are `spare_a [c - r, in]`, `spare_b [c - r, out]`, `timer_a [r]`, `timer_b [r]` and `cursor []`,
stacked along leading axes or not. There may be more rows of spares than c - r, so that devices divide them
evenly; those are never touched.
"""

import math

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec

IN_BOUNDS = dict(mode="promise_in_bounds", unique_indices=True)


def replicate(rows):
  """Rows on every device, where there is a mesh: else XLA may bring the whole kernel to the rows."""
  if jax.sharding.get_abstract_mesh().empty:
    return rows
  return jax.lax.with_sharding_constraint(rows, PartitionSpec())


def read_rows(spares, picks, live):
  """`spares[l, picks[l]]` of L layers, [L, K, d], on every device; spares [L, S, d], picks [L, K].

  From the memory of the host only the rows that are `live` [L, K] come, one by one; the others are zeros.
  """
  if jax.typeof(spares).memory_space != jax.memory.Space.Host:
    return replicate(spares.at[jnp.arange(picks.shape[0])[:, None], picks].get(**IN_BOUNDS))

  def fetch(layer, k, rows):
    row = jax.lax.dynamic_slice(spares, (layer, picks[layer, k], 0), (1, 1, spares.shape[-1]))
    return jax.lax.dynamic_update_slice(rows, jax.device_put(row, jax.memory.Space.Device), (layer, k, 0))

  return for_each(live, fetch, jnp.zeros((*picks.shape, spares.shape[-1]), spares.dtype))


def write_rows(spares, picks, live, rows):
  """`spares` with `rows` [L, K, d] at `picks`; where not `live`, rows must hold what is there already.

  To the memory of the host only the live ones go.
  """
  if jax.typeof(spares).memory_space != jax.memory.Space.Host:
    return spares.at[jnp.arange(picks.shape[0])[:, None], picks].set(rows, **IN_BOUNDS)

  def store(layer, k, spares):
    row = jax.lax.dynamic_slice(rows, (layer, k, 0), (1, 1, rows.shape[-1]))
    return jax.lax.dynamic_update_slice(spares, jax.device_put(row, jax.memory.Space.Host), (layer, picks[layer, k], 0))

  return for_each(live, store, spares)


def for_each(live, turn, carry):
  """`carry = turn(l, k, carry)` for each l, k where `live` [L, K]."""
  first = jnp.argsort(~live.reshape(-1))
  body = lambda number, carry: turn(*jnp.divmod(first[number], live.shape[1]), carry)
  return jax.lax.fori_loop(0, jnp.sum(live), body, carry)


def switchable(candidates) -> list[tuple[str, ...]]:
  """The paths of the layers that keep spares, in sorted order: their index numbers the random draws."""
  return sorted({path[:-1] for path in flatten_dict(candidates)})


def layer_shape(candidates, path) -> tuple[int, ...]:
  """The leading axes along which the layers under `path` are stacked: () or (layers,)."""
  return flatten_dict(candidates)[(*path, "cursor")].shape


def rank_and_spares(candidates, path) -> tuple[int, int]:
  """r and c - r of the layers under `path`, of which there may be more rows."""
  sizes = {name: flatten_dict(candidates)[*path, name].shape[-1] for name in ("spare_a", "spare_b", "timer_a")}
  rank = sizes["timer_a"]
  return rank, min(sizes["spare_a"], sizes["spare_b"]) - rank


def draw_uniforms(key, candidates) -> dict:
  """One number in [0, 1) for each layer: {path: [...]}; the key is folded with the layer's number."""
  draws, number = {}, 0
  for path in switchable(candidates):
    shape = layer_shape(candidates, path)
    size = math.prod(shape)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, number + jnp.arange(size))
    draws[path] = jax.vmap(jax.random.uniform)(keys).reshape(shape)
    number += size
  return draws


def draw_picks(key, candidates, schedule) -> dict:
  """Spare rows for each side of each layer, drawn without repetition: {path: ([..., K], [..., K])}."""
  picks = {}
  for number, path in enumerate(switchable(candidates)):
    lead, (rank, spares) = layer_shape(candidates, path), rank_and_spares(candidates, path)
    chances = jax.random.uniform(jax.random.fold_in(key, number), (2, *lead, spares))
    picks[path] = tuple(jax.lax.top_k(chances, schedule.window(rank, spares))[1])
  return picks


def exchanged_bytes(candidates, schedule) -> int:
  """Bytes of spare rows that a step brings at most, and as many that it puts in their place; abstract arrays will do.

  Of their K rows a side, all move where a step switches as many as it can, as the first steps do.
  """
  flat, total = flatten_dict(candidates), 0
  for path in switchable(candidates):
    rows = math.prod(layer_shape(candidates, path)) * schedule.window(*rank_and_spares(candidates, path))
    sides = (flat[*path, name] for name in ("spare_a", "spare_b"))
    total += sum(rows * side.shape[-1] * side.dtype.itemsize for side in sides)
  return total


def coverage(candidates):
  """The share of all candidates, of all layers, that have been in a slot so far, [] in [0, 1].

  Only where they are taken in order: the first r of a layer are there from the start, and every load up to the
  (c - r)-th brings a new one. Of random draws no state remembers which rows have come.
  """
  flat, seen, there_are = flatten_dict(candidates), 0, 0
  for path in switchable(candidates):
    rank, spares = rank_and_spares(candidates, path)
    cursor = flat[(*path, "cursor")]
    seen += jnp.sum(rank + jnp.minimum(cursor, spares))
    there_are += cursor.size * (rank + spares)
  return seen / there_are
