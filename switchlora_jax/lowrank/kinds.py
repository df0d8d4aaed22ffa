"""The kinds of linear layers with factors A and B: how each merges to a plain kernel, and how it stores a plain kernel.

The names of a layer's arrays determine its kind. The kind is all that export, evaluation, warm starts and the analysis
of ranks need to know about a layer.

  kind    arrays beside lora_a, lora_b      kernel
  BASE    kernel, or as `kernel_storage`    kernel + s·AᵀB   (`lowrank.layers`)
  SPARSE  sparse_values, sparse_support     s·AᵀB + S        (`lowrank.factored`)
  LOW     none                              s·AᵀB            (`lowrank.factored`)
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from flax.traverse_util import flatten_dict

from switchlora_jax.lowrank.factored import (
  SUPPORT,
  VALUES,
  add_at_support,
  at_support,
  best_factors,
  factors_beside_support,
  low_rank_kernel,
)
from switchlora_jax.lowrank.kernel_storage import KERNEL, load_kernel, store_kernel
from switchlora_jax.lowrank.layers import ADAPTER, LORA_A, merge


class Kind(NamedTuple):
  """What a kind of layer does with plain kernels; arrays are {name: array}, single or stacked on a leading axis.

  Attributes:
    merged: (arrays, scale) -> the plain kernel [..., in, out].
    stored: (kernel, arrays, scale) -> the arrays that store a plain kernel, with the names and dtypes of the given
      ones.
    exact: whether `stored` keeps every kernel, up to rounding.
  """

  merged: Callable
  stored: Callable
  exact: bool


def linear_layers(params, frozen) -> dict[tuple[str, ...], dict[str, jax.Array]]:
  """{path of a layer with factors: its arrays of both collections by name}."""
  flat, flat_frozen = flatten_dict(params), flatten_dict(frozen)
  layers = {path[:-1]: {} for path in flat if path[-1] == LORA_A}
  for path, array in (flat | flat_frozen).items():
    if path[:-1] in layers:
      layers[path[:-1]][path[-1]] = array
  return layers


def kind_of(arrays) -> Kind:
  """The kind of a layer with factors, from the names of its arrays."""
  return BASE if KERNEL in arrays else SPARSE if VALUES in arrays else LOW


def _factors(arrays):
  return (arrays[name] for name in ADAPTER)


def _merged_base(arrays, scale):
  return merge(load_kernel(arrays), *_factors(arrays), scale)


def _store_base(kernel, arrays, scale):
  """The kernel minus the adapter, which stays the same."""
  base = {name: array for name, array in arrays.items() if name not in ADAPTER}
  return arrays | store_kernel(merge(kernel, *_factors(arrays), -scale), base)


def _merged_low(arrays, scale):
  return low_rank_kernel(*_factors(arrays), scale)


def _store_low(kernel, arrays, scale):
  """The best approximation by `scale·AᵀB`."""
  rank = arrays[LORA_A].shape[-2]
  factors = _one_by_one(lambda layer: best_factors(layer, rank, scale), kernel)
  return arrays | {name: x.astype(arrays[name].dtype) for name, x in zip(ADAPTER, factors, strict=True)}


def _merged_sparse(arrays, scale):
  return add_at_support(_merged_low(arrays, scale), arrays[SUPPORT], arrays[VALUES])


def _store_sparse(kernel, arrays, scale):
  """`scale·AᵀB` by `factors_beside_support`, and what it lacks at the support."""
  rank = arrays[LORA_A].shape[-2]

  def store(layer):
    kernel, support = layer
    factors = [x.astype(arrays[LORA_A].dtype) for x in factors_beside_support(kernel, support, rank, scale)]
    with jax.default_matmul_precision("highest"):
      return *factors, at_support(kernel - low_rank_kernel(*factors, scale), support)

  found = zip((*ADAPTER, VALUES), _one_by_one(store, (kernel, arrays[SUPPORT])), strict=True)
  return arrays | {name: x.astype(arrays[name].dtype) for name, x in found}


def _one_by_one(function, layers):
  """The function of each of the stacked layers; all at once would need the workspace of all decompositions."""
  kernel = jax.tree.leaves(layers)[0]
  return function(layers) if kernel.ndim == 2 else jax.lax.map(function, layers)


BASE = Kind(_merged_base, _store_base, exact=True)
SPARSE = Kind(_merged_sparse, _store_sparse, exact=False)
LOW = Kind(_merged_low, _store_low, exact=False)
