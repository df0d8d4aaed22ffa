"""Projectors of gradients: what `directions` of `config.galore`, `config.fira` and `config.frugal` selects.

A projector P [small, r] of a gradient [small, large] has orthonormal columns. Its span is:

  svd          the r leading left singular vectors (GaLore, arXiv 2403.03507)
  random       uniform among all subspaces of r dimensions (GoLore, arXiv 2410.11289)
  golore       svd, and random in the last `random_share` of the updates (as the same paper advises); a refresh is due
               when this share begins
  sara         r left singular vectors, drawn without replacement in proportion to their σ (SARA, arXiv 2502.05790)
  coordinates  r random axes: rows of the gradient (the column-wise projection of FRUGAL, arXiv 2411.07837)

All are computed in float32 and returned in the dtype of the gradient.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import path_aware_map

from switchlora_jax.errors import UserError
from switchlora_jax.models.architecture import smaller_sides
from switchlora_jax.models.weights import in_block

DIRECTIONS = ("svd", "random", "golore", "sara", "coordinates")


def wide(x):
  """Transposed, if needed, so that the smaller of the last two sides is first."""
  return x if x.shape[-2] <= x.shape[-1] else x.mT


def oriented(x, shape):
  """The inverse of `wide`, for arrays that are of this shape in the orientation of the parameter."""
  return x if x.shape == shape else x.mT


def block_kernels(params):
  """A tree of bools, true for the kernels of the blocks' linear layers, which the methods project."""
  return path_aware_map(lambda path, _: in_block(path), params)


def leading_directions(matrix, rank: int):
  """The first `rank` left singular vectors of [small, large], as columns; computed in float32 as by the authors."""
  left, _, _ = jnp.linalg.svd(matrix.astype(jnp.float32), full_matrices=False)
  return left[:, :rank].astype(matrix.dtype)


def random_directions(matrix, rank: int, key):
  """Orthonormal columns [small, min(rank, small)], uniform among all; the values of the matrix do not matter."""
  small = len(matrix)
  gaussian = jax.random.normal(key, (small, min(rank, small)), jnp.float32)
  columns, upper = jnp.linalg.qr(gaussian)
  signs = jnp.where(jnp.diagonal(upper) < 0, -1.0, 1.0).astype(columns.dtype)  # without them the draw is not uniform
  return (columns * signs[None, :]).astype(matrix.dtype)


def sampled_directions(matrix, rank: int, key):
  """Left singular vectors, drawn without replacement in proportion to their σ, in the order of falling σ."""
  left, sizes, _ = jnp.linalg.svd(matrix.astype(jnp.float32), full_matrices=False)
  # The largest of log σ + Gumbel noise are distributed as draws one after the other in proportion to σ.
  _, drawn = jax.lax.top_k(jnp.log(sizes) + jax.random.gumbel(key, sizes.shape, sizes.dtype), min(rank, len(sizes)))
  return left[:, jnp.sort(drawn)].astype(matrix.dtype)


def random_coordinates(matrix, rank: int, key):
  """Random columns of the identity, [small, min(rank, small)], in their order."""
  small = len(matrix)
  drawn = jnp.sort(jax.random.permutation(key, small)[:rank])
  return jax.nn.one_hot(drawn, small, axis=0, dtype=matrix.dtype)


DRAWN = {"random": random_directions, "sara": sampled_directions, "coordinates": random_coordinates}


def updates_of(config) -> int:
  """The number of updates of the method, without those of the full-rank warm start."""
  return config.steps - config.warm_start_steps


def first_random_update(config, section) -> int:
  """With `golore`, the number of the update from which on new projectors are random."""
  return updates_of(config) - round(section.random_share * updates_of(config))


def options(config, section) -> dict[str, Any]:
  """`directions`, `seed` and `refresh_at` of a config for `galore.ProjectedAdam`; {} selects its default, svd.

  Args:
    section: the section of the method, with the keys `directions` and `random_share`.
  """
  if section.directions == "svd":
    return {}
  if section.directions == "golore":
    first_random = first_random_update(config, section)
    return {
      "directions": partial(_leading_then_random, first_random),
      "seed": config.seed,
      "refresh_at": first_random,
    }
  return {"directions": partial(_of_key, DRAWN[section.directions]), "seed": config.seed}


def _of_key(directions: Callable, matrix, rank, count, key):
  del count
  return directions(matrix, rank, key)


def _leading_then_random(first_random, matrix, rank, count, key):
  leading, drawn = lambda: leading_directions(matrix, rank), lambda: random_directions(matrix, rank, key)
  return jax.lax.cond(count < first_random, leading, drawn)


def check_rank(config):
  """Raise `UserError` unless every gradient of a block has at least `config.rank` directions."""
  if config.rank < 1:
    raise UserError(f"rank (={config.rank}) must be at least 1; set --config.rank or use --config.method=full")
  if config.rank > (largest := max(smaller_sides(config.model).values())):
    raise UserError(
      f"rank (={config.rank}) exceeds the smaller side of every kernel ({largest}); "
      f"lower --config.rank or use --config.method=full"
    )


def check(config, name: str):
  """Raise `UserError` if the rank, or a key of section `name` that selects the projectors, is invalid."""
  section = config[name]
  check_rank(config)
  if section.refresh_every < 1:
    raise UserError(
      f"{name}.refresh_every (={section.refresh_every}) must be at least 1; set --config.{name}.refresh_every"
    )
  if section.directions not in DIRECTIONS:
    raise UserError(
      f"{name}.directions (={section.directions!r}) must be one of {', '.join(DIRECTIONS)}; "
      f"set --config.{name}.directions"
    )
  if not 0 <= section.random_share <= 1:
    raise UserError(
      f"{name}.random_share (={section.random_share}) must lie between 0 and 1; set --config.{name}.random_share"
    )


def describe(config, section) -> list[str]:
  """The number of decompositions and of random draws; decompositions take most of the extra time of a method."""
  every, last = section.refresh_every, updates_of(config)
  starts = {"golore": first_random_update(config, section), "random": 0, "coordinates": 0}
  first_random = starts.get(section.directions, last)
  found = {*range(0, last, every), *range(first_random, last)[:1]}
  decomposed = [update for update in found if update < first_random]
  counts = {
    "singular value decompositions of every block gradient": len(decomposed),
    "random projections drawn for every block gradient": len(found) - len(decomposed),
  }
  return [f"{what}: {count}, one every {every} steps" for what, count in counts.items() if count]
