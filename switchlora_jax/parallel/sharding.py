"""The device mesh, and the sharding of every array of a run.

The mesh has two axes, `data` and `fsdp`; the sequences of a batch are split over both. The train state is replicated,
except as `config.sharding` selects: trained arrays, optimizer state and base kernels can be split over `fsdp`, and
candidates over all devices or kept in host memory.
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
GATHERED = "gathered"  # checkpoint name of the arrays that `gather` returns, for rematerialisation policies


def make_mesh(devices=None, fsdp: int = 1) -> jax.sharding.Mesh:
  """Return a mesh [data, fsdp] over `devices`, by default all visible ones; `fsdp` must divide their number."""
  devices = jax.devices() if devices is None else devices
  shape, axis_types = (len(devices) // fsdp, fsdp), (jax.sharding.AxisType.Auto,) * 2
  return jax.make_mesh(shape, BOTH, axis_types=axis_types, devices=devices)


def replicated(mesh) -> NamedSharding:
  """Return the sharding with a copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh) -> NamedSharding:
  """Return the sharding of batches [sequences, length]: each device has its share of the sequences."""
  return NamedSharding(mesh, PartitionSpec(BOTH))


class Placement(NamedTuple):
  """The sharding of each part of a train state.

  Attributes:
    mesh: as from `make_mesh`.
    trained, optimizer, frozen: whether this part is split over `fsdp` rather than replicated.
    candidates: "sharded" over all devices, along the rows of the spares; "replicated"; or "host": a full copy in the
      pinned host memory of each device.
  """

  mesh: jax.sharding.Mesh
  trained: bool = False
  optimizer: bool = False
  frozen: bool = False
  candidates: str = "replicated"

  def specs(self, tree, part: str):
    """Return a PartitionSpec for each array of a tree.

    Args:
      part: part of the state that the tree belongs to: "trained", "gradient", "optimizer" or "frozen".
    """
    split = self.trained or self.optimizer if part == "gradient" else getattr(self, part)
    parts = self.mesh.shape[FSDP] if split else 1
    return jax.tree.map_with_path(lambda path, x: _spec(path, x.shape, parts), tree)

  def shardings(self, state):
    """Return a sharding for each array of a train state, which may be abstract."""
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
    """Return the state with spares padded to a multiple of the number of devices, by rows of zeros that are unused."""

    def padded(path, leaf):
      if path[-1].key not in SPARES:
        return leaf
      return jnp.pad(leaf, [(0, 0)] * (leaf.ndim - 2) + [(0, -leaf.shape[-2] % self.mesh.size), (0, 0)])

    if self.candidates != "sharded":
      return state
    return state._replace(candidates=jax.tree.map_with_path(padded, state.candidates))


def placement(config, mesh) -> Placement:
  """Return the placement that `config.sharding` selects on a mesh."""
  split = {name: config.sharding[name] == "sharded" for name in ("trained", "optimizer", "frozen")}
  return Placement(mesh, **split, candidates=config.sharding.candidates)


def is_split(specs) -> bool:
  """Return whether any PartitionSpec of a tree splits over `fsdp`."""
  return any(FSDP in tuple(spec) for spec in jax.tree.leaves(specs, is_leaf=_is_spec))


def _is_spec(x):
  return isinstance(x, PartitionSpec)


def _spec(path, shape, parts: int) -> PartitionSpec:
  """Split along the longest axis that is a multiple of `parts`, if there is one; LoRA factors by vectors if possible.

  The axis of stacked layers is never split, since `nn.scan` iterates over it.
  """
  names = [getattr(key, "key", None) for key in path]
  axes = [axis for axis in range("blocks" in names, len(shape)) if shape[axis] % parts == 0]
  if parts == 1 or not axes:
    return PartitionSpec()
  axis = max(axes, key=lambda axis: shape[axis])
  if names[-1] in ADAPTER and len(shape) - 2 in axes:
    axis = len(shape) - 2  # a switch moves whole vectors, which a split along the other axis would have to gather
  return PartitionSpec(*[None] * axis, FSDP)


def gather(tree, specs, removed_axes: int = 0):
  """All-gather the arrays that are split over `fsdp`, inside a `shard_map`; their gradients are reduce-scattered.

  Args:
    tree: this device's parts of the arrays.
    specs: PartitionSpecs from `Placement.specs`, of the arrays with all their axes.
    removed_axes: number of leading axes that the arrays no longer have, such as that of the layers inside `nn.scan`.
  """

  def gather_one(part, spec):
    if FSDP not in tuple(spec):
      return part
    axis = tuple(spec).index(FSDP) - removed_axes
    return checkpoint_name(jax.lax.all_gather(part, FSDP, axis=axis, tiled=True), GATHERED)

  return jax.tree.map(gather_one, tree, specs)


def reduce(grads, param_specs, grad_specs):
  """Sum gradients over all devices, inside a `shard_map`.

  Args:
    param_specs: PartitionSpecs of the parameters. The transpose of its all-gather has already summed the gradient of a
      split parameter over `fsdp`.
    grad_specs: PartitionSpecs of the result, as the optimizer needs it.
  """

  def reduce_one(grad, param_spec, grad_spec):
    if FSDP in tuple(param_spec):
      return psum(grad, DATA)
    if FSDP in tuple(grad_spec):
      grad = jax.lax.psum_scatter(grad, FSDP, scatter_dimension=tuple(grad_spec).index(FSDP), tiled=True)
      return psum(grad, DATA)
    return psum(grad, BOTH)

  return jax.tree.map(reduce_one, grads, param_specs, grad_specs)


def psum(x, axes):
  """`jax.lax.psum` inside a `shard_map`; over one device x itself, which XLA would copy."""
  return x if jax.lax.axis_size(axes) == 1 else jax.lax.psum(x, axes)
