"""The mesh, and where every array of a run lives on it.

A mesh has two axes, `data` and `fsdp`; the rows of a batch are split over both. The train state is repeated on
every device, but for what `config.sharding` says: trained arrays, optimizer state and base kernels may be split
over `fsdp`, and candidates over all devices or kept in the memory of the host.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from switchlora_jax.lowrank.layers import ADAPTER
from switchlora_jax.lowrank.spares import SPARES

DATA, FSDP = "data", "fsdp"
BOTH = (DATA, FSDP)
GATHERED = "gathered"  # the name under which a rematerialisation policy finds what `gather` returns


def make_mesh(devices=None, fsdp: int = 1) -> jax.sharding.Mesh:
  """[data, fsdp] over `devices`, by default all that are visible; `fsdp` must divide their number."""
  devices = jax.devices() if devices is None else devices
  shape, axis_types = (len(devices) // fsdp, fsdp), (jax.sharding.AxisType.Auto,) * 2
  return jax.make_mesh(shape, BOTH, axis_types=axis_types, devices=devices)


def replicated(mesh) -> NamedSharding:
  """A copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh) -> NamedSharding:
  """For batches [rows, length]: each device has its share of the rows."""
  return NamedSharding(mesh, PartitionSpec(BOTH))


class Placement(NamedTuple):
  """Where the arrays of a run live.

  Attributes:
    mesh: as from `make_mesh`.
    trained, optimizer, frozen: whether these are split over fsdp rather than repeated.
    candidates: `sharded` over all devices along the rows of spares, `replicated`, or `host`: whole, in the pinned
      memory of each device's host.
  """

  mesh: jax.sharding.Mesh
  trained: bool = False
  optimizer: bool = False
  frozen: bool = False
  candidates: str = "replicated"

  def specs(self, tree, part: str):
    """A PartitionSpec for each array of a tree that is the `part` trained, gradient, optimizer or frozen of a state."""
    split = self.trained or self.optimizer if part == "gradient" else getattr(self, part)
    parts = self.mesh.shape[FSDP] if split else 1
    return jax.tree.map_with_path(lambda path, x: _spec(path, x.shape, parts), tree)

  def shardings(self, state):
    """A sharding for each array of a train state, abstract or not."""
    named = lambda specs: jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs, is_leaf=_is_spec)
    return jax.tree.map(lambda _: replicated(self.mesh), state)._replace(
      params=named(self.specs(state.params, "trained")),
      frozen=named(self.specs(state.frozen, "frozen")),
      opt_state=named(self.specs(state.opt_state, "optimizer")),
      candidates=jax.tree.map_with_path(self._of_candidates, state.candidates),
    )

  def _of_candidates(self, path, leaf):
    if path[-1].key not in SPARES or self.candidates == "replicated":
      return replicated(self.mesh)
    if self.candidates == "host":
      return NamedSharding(self.mesh, PartitionSpec(), memory_kind="pinned_host")
    return NamedSharding(self.mesh, PartitionSpec(*[None] * (leaf.ndim - 2), BOTH))

  def pad(self, state):
    """The state with its spares filled up with rows of zeros, until the devices divide them; nothing reads these."""

    def padded(path, leaf):
      if path[-1].key not in SPARES:
        return leaf
      return jnp.pad(leaf, [(0, 0)] * (leaf.ndim - 2) + [(0, -leaf.shape[-2] % self.mesh.size), (0, 0)])

    if self.candidates != "sharded":
      return state
    return state._replace(candidates=jax.tree.map_with_path(padded, state.candidates))


def placement(config, mesh) -> Placement:
  """What `config.sharding` says of a mesh."""
  split = {name: config.sharding[name] == "sharded" for name in ("trained", "optimizer", "frozen")}
  return Placement(mesh, **split, candidates=config.sharding.candidates)


def is_split(specs) -> bool:
  """Whether any PartitionSpec of a tree splits along fsdp."""
  return any(FSDP in tuple(spec) for spec in jax.tree.leaves(specs, is_leaf=_is_spec))


def _is_spec(x):
  return isinstance(x, PartitionSpec)


def _spec(path, shape, parts: int) -> PartitionSpec:
  """Split along the longest axis that the parts divide, if there is one; LoRA vectors between vectors if possible.

  Never along the layers, which the model walks.
  """
  names = [getattr(key, "key", None) for key in path]
  axes = [axis for axis in range("blocks" in names, len(shape)) if shape[axis] % parts == 0]
  if parts == 1 or not axes:
    return PartitionSpec()
  axis = max(axes, key=lambda axis: shape[axis])
  if names[-1] in ADAPTER and len(shape) - 2 in axes:
    axis = len(shape) - 2  # a switch moves whole vectors: cut across, they would have to be put together first
  return PartitionSpec(*[None] * axis, FSDP)


def gather(tree, specs, lost: int = 0):
  """Whole arrays from this device's parts, inside a `shard_map`; the gradient of one is scattered again.

  Args:
    specs: PartitionSpecs as from `Placement.specs`, of the arrays with all their axes.
    lost: leading axes that the arrays have not any more.
  """

  def whole(part, spec):
    if FSDP not in tuple(spec):
      return part
    return checkpoint_name(jax.lax.all_gather(part, FSDP, axis=tuple(spec).index(FSDP) - lost, tiled=True), GATHERED)

  return jax.tree.map(whole, tree, specs)


def reduce(grads, held, wanted):
  """The sum of all devices' gradients, inside a `shard_map`, each in the parts that `wanted` says.

  Args:
    held: the PartitionSpecs of the parameters. A gradient of one in parts was summed over fsdp when it was scattered.
    wanted: the PartitionSpecs of the result, where the optimizer needs it.
  """

  def total(grad, held, wanted):
    if FSDP in tuple(held):
      return jax.lax.psum(grad, DATA)
    if FSDP in tuple(wanted):
      grad = jax.lax.psum_scatter(grad, FSDP, scatter_dimension=tuple(wanted).index(FSDP), tiled=True)
      return jax.lax.psum(grad, DATA)
    return jax.lax.psum(grad, BOTH)

  return jax.tree.map(total, grads, held, wanted)
