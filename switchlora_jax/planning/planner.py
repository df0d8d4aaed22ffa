"""What a run costs, known before it starts: memory, traffic between devices, and the least time of a step.

Memory and traffic are those of the compiled step. The times are a roofline, an estimate that nothing here was
measured against: see `estimate`.
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


class Plan(NamedTuple):
  """A compiled training step, seen from one device.

  Attributes:
    trainable, frozen, candidates, optimizer: bytes of the state.
    host: how many of them lie in the memory of the host.
    exchanged: bytes of candidates that a switch brings from where they lie at most, and as many that it puts there.
    temporaries: bytes of activations, gradients and whatever else lives only within a step.
    peak: bytes of the device that the step needs at once.
    moved: bytes read and written in its memory in a step, roughly: see `moved_bytes`.
    operations: multiplications and additions of the matrix products of a step.
    tokens: of a step.
    traffic: the collectives of a step.
    seconds: that compiling took.
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

  def carried(self, kind: str) -> int:
    """Bytes that all collectives of a kind work on in a step."""
    return sum(collective.times * collective.size for collective in self.traffic if collective.kind == kind)


class Estimate(NamedTuple):
  """Seconds of a step if every part of the GPU worked at its peak, see `estimate`."""

  products: float
  memory: float
  links: float

  @property
  def step(self) -> float:
    """Of all parts together."""
    return max(self.products, self.memory) + self.links

  @property
  def link_share(self) -> float:
    """Share of the step that is spent on sending, in [0, 1]."""
    return self.links / self.step

  @property
  def peak_share(self) -> float:
    """Share of the GPU's peak operations that such a step would use, in [0, 1]; a real one uses less."""
    return self.products / self.step


def device_bytes(tree) -> int:
  """Bytes that each device (or its host) holds of a tree of abstract arrays, by their shardings."""
  return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def host_bytes(tree) -> int:
  """As `device_bytes`, of the leaves alone that are placed in the memory of the host.

  Absent GPUs forget such a placement, and so do the compiler's figures on CPUs: the tree must be one for
  (simulated) CPUs, and these bytes are to be taken out of a peak by hand.
  """
  return device_bytes([leaf for leaf in jax.tree.leaves(tree) if leaf.sharding.memory_kind == "pinned_host"])


def plan(phase: Phase, config, mesh, host: int) -> Plan:
  """Compile the training step of a resolved config's program for its mesh, real or not. Allocates nothing.

  Args:
    host: `host_bytes` of the same program's state on CPUs.
  """
  rows = jax.ShapeDtypeStruct((config.batch_size, config.seq_len), jnp.int32, sharding=by_rows(mesh))
  start, state = time.monotonic(), phase.abstract
  with jax.set_mesh(mesh):
    compiled = phase.step.lower(state, rows).compile()
    seconds = time.monotonic() - start
    operations = cost.operations(phase.step, state, rows)
  memory = cost.memory(compiled)
  return Plan(
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
  """Bytes that a step reads and writes, roughly: all it is given and returns once, temporaries twice a micro-batch.

  Too many where much of the state stays as it is, as candidates and frozen kernels mostly do.
  Space that is used several times in a step, as under recomputation, moves more. The compiler's own count is of no
  use: on CPUs it takes every loop, that over layers too, for one turn, and for absent GPUs there is none.
  """
  return memory["arguments"] + memory["outputs"] + 2 * accumulation * memory["temporaries"]


def estimate(plan: Plan, gpu: Gpu, dtype: str, per_host: int) -> Estimate:
  """A roofline: no kernel can be faster than its operations, its memory or its links allow. Not measured.

  Products take operations / peak of their dtype, memory takes `moved` / bandwidth; the two overlap fully. Sending
  takes `Collective.sent` / speed of the link, and overlaps with nothing. Kernels reach less than these peaks:
  a real step is slower.

  Args:
    dtype: of the computation. per_host: GPUs of a host.
  """
  links = sum(collective.sent / link_speed(collective, gpu, per_host) for collective in plan.traffic)
  return Estimate(plan.operations / gpu.peak[dtype], plan.moved / gpu.bandwidth, links)


def link_speed(collective: Collective, gpu: Gpu, per_host: int) -> float:
  """Bytes a second at which each device sends around the ring: NVLink's, if the ring stays within a host.

  Otherwise each of the k GPUs that it has in a host brings its own adapter, and k rings share the bytes:
  k × network, at most NVLink's.
  """
  speed = gpu.nvlink
  for group in collective.groups:
    hosts = {device // per_host for device in group}
    if len(hosts) > 1:
      speed = min(speed, gpu.network * len(group) / len(hosts))
  return speed


def largest(peak_of: Callable[[int], int], rows: int, most: int, limit: float, tries: int = 5) -> dict[int, int]:
  """Look for the largest number of rows, up to `most`, whose peak is within a limit: {rows: peak} of those tried.

  Peaks grow almost linearly: after `rows` and twice or half as many, the line through the two points nearest to the
  limit says where to look, until it says nothing new or there were so many `tries`.
  """
  known = {rows: peak_of(rows)}
  guess = min(2 * rows, most) if known[rows] <= limit else rows // 2
  while len(known) < tries and guess > 0 and guess not in known:
    known[guess] = peak_of(guess)
    guess = min(_crossing(known, limit), most)
  return known


def fitting(known: dict[int, int], limit: float) -> int:
  """The largest of the numbers of rows tried by `largest` that is within the limit, or 0."""
  return max((rows for rows, peak in known.items() if peak <= limit), default=0)


def _crossing(known: dict[int, int], limit: float) -> int:
  """The most rows within the limit by the line through the points nearest to it, bounded by what is known."""
  low = fitting(known, limit)
  high = min((rows for rows, peak in known.items() if peak > limit), default=math.inf)
  (x, y), (other_x, other_y) = sorted(known.items(), key=lambda point: abs(point[1] - limit))[:2]
  slope = (other_y - y) / (other_x - x)
  guess = x + math.floor((limit - y) / slope) if slope > 0 else low
  return min(max(guess, low, 1), high - 1)
