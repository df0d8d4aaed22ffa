"""Cost of a run before it starts: memory, traffic between devices, and a lower bound of the step time.

Memory and traffic are those of the compiled step. The times are a roofline, not measured; see `estimate`.
"""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from switchlora_jax.parallel.sharding import by_rows
from switchlora_jax.planning import cost
from switchlora_jax.planning.collectives import Collective, collectives
from switchlora_jax.planning.topology import Gpu
from switchlora_jax.training.phases import Phase


class StepPlan(NamedTuple):
  """Cost of a compiled training step, per device.

  Attributes:
    trainable, frozen, candidates, optimizer: bytes of the state.
    host: bytes of the state in host memory.
    exchanged: upper bound of the bytes of candidates that one switch reads, and again of those that it writes.
    temporaries: bytes of activations, gradients and other arrays that live only within a step.
    peak: bytes of device memory.
    moved: bytes read and written in device memory per step, approximately; see `moved_bytes`.
    operations: operations of the matrix products per step.
    tokens: tokens per step.
    traffic: the collectives of a step.
    seconds: compile time.
  """

  trainable: int
  frozen: int
  candidates: int
  optimizer: int
  host: int
  exchanged: int
  temporaries: int
  peak: int
  moved: int
  operations: int
  tokens: int
  traffic: list[Collective]
  seconds: float

  def collective_bytes(self, kind: str) -> int:
    """Total size in bytes per step of all collectives of a kind."""
    return sum(collective.times * collective.size for collective in self.traffic if collective.kind == kind)


class Estimate(NamedTuple):
  """Seconds per step of matrix products, memory traffic and links, each at the peak of the GPU; see `estimate`."""

  products: float
  memory: float
  links: float

  @property
  def step(self) -> float:
    """Seconds per step: products and memory overlap, links do not."""
    return max(self.products, self.memory) + self.links

  @property
  def link_share(self) -> float:
    """Share of the step spent on communication, in [0, 1]."""
    return self.links / self.step

  @property
  def peak_share(self) -> float:
    """Upper bound of the share of peak operations that a step reaches (MFU), in [0, 1]."""
    return self.products / self.step


def device_bytes(tree) -> int:
  """Bytes per device of a tree of abstract arrays with shardings, in device or host memory."""
  return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def host_bytes(tree) -> int:
  """`device_bytes` of the leaves in pinned host memory.

  Without a GPU attached, XLA does not model host memory, in shardings or in its memory analysis. The tree
  must therefore be placed on (simulated) CPUs, and these bytes are subtracted from the peak.
  """
  return device_bytes([leaf for leaf in jax.tree.leaves(tree) if leaf.sharding.memory_kind == "pinned_host"])


def plan_step(phase: Phase, config, mesh, host: int) -> StepPlan:
  """Compile the training step of a phase for a mesh, whose devices need not exist. Allocates nothing.

  Args:
    config: the resolved config of the phase.
    host: `host_bytes` of the state of the same phase built for CPUs.
  """
  rows = jax.ShapeDtypeStruct((config.batch_size, config.seq_len), jnp.int32, sharding=by_rows(mesh))
  start, state = time.monotonic(), phase.abstract
  with jax.set_mesh(mesh):
    compiled = phase.step.lower(state, rows).compile()
    seconds = time.monotonic() - start
    operations = cost.operations(phase.step, state, rows)
  memory = cost.memory(compiled)
  return StepPlan(
    trainable=device_bytes(state.params),
    frozen=device_bytes(state.frozen),
    candidates=device_bytes(state.candidates),
    optimizer=device_bytes(state.opt_state),
    host=host,
    exchanged=phase.exchanged_bytes,
    temporaries=memory["temporaries"],
    peak=memory["peak"] - host,
    moved=moved_bytes(memory, config.accumulation) - 2 * host,
    operations=operations,
    tokens=config.batch_size * config.seq_len // mesh.size,
    traffic=collectives(compiled.as_text(), mesh.size),
    seconds=seconds,
  )


def moved_bytes(memory: dict[str, int], accumulation: int) -> int:
  """Approximate bytes that a step reads and writes: arguments and outputs once, temporaries twice per micro-batch.

  An overestimate for state that a step leaves unchanged, such as most candidates and frozen kernels. An underestimate
  for buffers that are reused within a step, such as with rematerialisation. XLA's own count cannot be used: on CPUs it
  counts every loop, including that over layers, as 1 iteration, and without a GPU attached it is not available.
  """
  return memory["arguments"] + memory["outputs"] + 2 * accumulation * memory["temporaries"]


def estimate(plan: StepPlan, gpu: Gpu, dtype: str, per_host: int) -> Estimate:
  """A roofline: a lower bound of the step time from operations, memory traffic and communication. Not measured.

  Matrix products take operations / peak of their dtype and memory takes `moved` / bandwidth. The two overlap fully.
  Communication takes `Collective.sent` / link speed and overlaps with nothing. Real kernels do not reach these peaks.

  Args:
    dtype: of the computation.
    per_host: number of GPUs per host.
  """
  links = sum(collective.sent / link_speed(collective, gpu, per_host) for collective in plan.traffic)
  return Estimate(plan.operations / gpu.peak[dtype], plan.moved / gpu.bandwidth, links)


def link_speed(collective: Collective, gpu: Gpu, per_host: int) -> float:
  """Bytes per second at which each device sends in the ring: NVLink's, if all groups stay within a host.

  Otherwise each of the k GPUs of a group in a host has its own network adapter, and the bytes are shared by k rings:
  k × network, at most NVLink's.
  """
  speed = gpu.nvlink
  for group in collective.groups:
    hosts = {device // per_host for device in group}
    if len(hosts) > 1:
      speed = min(speed, gpu.network * len(group) / len(hosts))
  return speed


def search_micro_batch(
  peak_of: Callable[[int], int], rows: int, most: int, limit: float, tries: int = 5
) -> dict[int, int]:
  """Search for the largest micro-batch whose peak is within a limit.

  Peaks grow almost linearly. After `rows` and twice or half as many, each next size is where the line through the two
  points nearest to the limit crosses it.

  Args:
    peak_of: micro-batch size in sequences -> peak in bytes.
    rows: the first size.
    most: the largest size allowed.
    limit: bytes.
    tries: maximum number of sizes.
  Returns:
    {size: peak} of all sizes tried; see `largest_fitting`.
  """
  known = {rows: peak_of(rows)}
  guess = min(2 * rows, most) if known[rows] <= limit else rows // 2
  while len(known) < tries and guess > 0 and guess not in known:
    known[guess] = peak_of(guess)
    guess = min(_crossing(known, limit), most)
  return known


def largest_fitting(known: dict[int, int], limit: float) -> int:
  """The largest size tried by `search_micro_batch` that is within the limit, or 0."""
  return max((rows for rows, peak in known.items() if peak <= limit), default=0)


def _crossing(known: dict[int, int], limit: float) -> int:
  """The largest size within the limit by the line through the two points nearest to it, within the known bounds."""
  low = largest_fitting(known, limit)
  high = min((rows for rows, peak in known.items() if peak > limit), default=math.inf)
  (x, y), (other_x, other_y) = sorted(known.items(), key=lambda point: abs(point[1] - limit))[:2]
  slope = (other_y - y) / (other_x - x)
  guess = x + math.floor((limit - y) / slope) if slope > 0 else low
  return min(max(guess, low, 1), high - 1)
