"""Checkpoints through orbax: asynchronous, the newest few kept, and read back only if they are what was written.

Orbax renames a finished save into place, so a save that was interrupted is never listed. What it
does not notice is a flipped bit: every save therefore carries checksums of the arrays themselves,
compared after a restore. Every process of a run calls each of these functions; each writes its share of the
arrays into the one directory that all share.
"""

import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from switchlora_jax import hosts
from switchlora_jax.errors import UserError

log = logging.getLogger(__name__)

LEFT_OUT = ocp.PLACEHOLDER  # in place of an array that is not to be read

STRIDES = (1, 1_000_003, 2_654_435_761, 2_246_822_519, 3_266_489_917)  # of the weights, from the last axis on


@jax.jit
def checksums(leaves) -> list[jax.Array]:
  """One uint32 a leaf: Σ bits·weight mod 2³², with an odd weight for each place.

  Any single flipped bit changes it. Rows of zeros at the end of an axis do not, so that it is the same for
  every layout's padding; and it is summed where the parts of an array lie.
  """

  def of(leaf):
    kind = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    bits = jax.lax.bitcast_convert_type(jax.device_put(leaf, jax.memory.Space.Device), kind).astype(jnp.uint32)
    places = (jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) for axis in reversed(range(bits.ndim)))
    place = sum((i * jnp.uint32(stride) for i, stride in zip(places, STRIDES, strict=False)), jnp.uint32(0))
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)

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


class Checkpoints:
  """The checkpoints of one run, in `directory`; a context that waits for the last save when it ends.

  Without `keep`, the number of newest ones that are kept, they are another's, only to be read.
  """

  def __init__(self, directory: Path, keep: int | None = None):
    self._directory, self._keep = directory.absolute(), keep
    self._manager = self._open()

  def _open(self):
    policy = ocp.checkpoint_managers.LatestN(self._keep) if self._keep else None
    return ocp.CheckpointManager(self._directory, options=ocp.CheckpointManagerOptions(preservation_policy=policy))

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._manager.close()

  def steps(self) -> list[int]:
    """The steps that have a finished checkpoint, oldest first."""
    return sorted(self._manager.all_steps())

  def save(self, step: int, state):
    """Start writing the state before step `step`; returns once the arrays may be overwritten."""
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), checksums=ocp.args.JsonSave(named_checksums(state)))
    self._manager.save(step, args=items)

  def restore(self, abstract_at, step: int | None = None):
    """The newest good state, or None where nothing was saved yet; or that of a step.

    Where a newer one is damaged, it is moved aside, next to `checkpoints/`, with a warning that names it.

    Args:
      abstract_at: from a step to a pytree of ShapeDtypeStruct with shardings, as its state shall come back; what is
        LEFT_OUT there is not read, and None comes back.
      step: one of `steps()`; the newest by default.
    Raises:
      UserError: there are checkpoints and none can be read back; they stay where they are.
    """
    hosts.check_same({f"the list of checkpoints in {self._directory}": self.steps()})
    damaged = {}
    for candidate in reversed(self.steps() if step is None else [step]):
      try:
        state = self._restore(candidate, abstract_at(candidate))
      except (jax.errors.JaxRuntimeError, MemoryError):  # no room for it here says nothing of the file
        raise
      except Exception as error:  # whatever a damaged file makes orbax, tensorstore or json raise
        damaged[candidate] = f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
        continue
      if damaged:
        self._pass_over(damaged)
      return state
    if damaged:
      raise UserError(
        f"none of the checkpoints in {self._directory} can be read back "
        f"({'; '.join(f'step {step}: {reason}' for step, reason in damaged.items())}); "
        f"{'start over in a new --workdir' if self._keep else 'choose another'}"
      )
    return None

  def _restore(self, step: int, abstract):
    leaves = jax.tree.leaves_with_path(abstract)
    left_out = {jax.tree_util.keystr(path) for path, leaf in leaves if leaf is LEFT_OUT}
    if left_out:
      wanted = ocp.args.PyTreeRestore(abstract, ocp.checkpoint_utils.construct_restore_args(abstract))
    else:
      # Padding is not the same in every layout. What else is cut off or added, checksums and shapes tell.
      wanted = ocp.args.StandardRestore(abstract, strict=False)
    items = ocp.args.Composite(state=wanted, checksums=ocp.args.JsonRestore())
    # A file that only one process could not read must be passed over by all.
    restored = hosts.everywhere(lambda: self._manager.restore(step, args=items))
    state = jax.tree.map(lambda leaf: None if leaf is LEFT_OUT else leaf, restored.state)
    expected, found = restored.checksums, named_checksums(state)
    names = (expected.keys() - left_out) | found.keys()
    if wrong := [name for name in names if expected.get(name) != found.get(name)]:
      raise ValueError(f"checksum or shape of {min(wrong)} and {len(wrong) - 1} more arrays is not what was saved")
    return state

  def _pass_over(self, damaged: dict[int, str]):
    """Say which checkpoints are damaged, {step: why}, and move them aside if they are ours."""
    self._manager.close()
    hosts.on_first(lambda: [self._report(step, reason) for step, reason in damaged.items()])
    self._manager = self._open()

  def _report(self, step: int, reason: str):
    where = f"moved to {self._set_aside(step)}" if self._keep else "an older one is read"
    log.warning("checkpoint of step %d is damaged (%s); %s", step, reason, where)

  def _set_aside(self, step: int) -> Path:
    number = 0
    while (target := self._directory.with_name(f"damaged-{step}-{number}")).exists():
      number += 1
    return (self._directory / str(step)).rename(target)
