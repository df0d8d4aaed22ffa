"""Algorithms 1 and 2 of the paper: swap a few LoRA vectors a step with spare candidates.

The invariant: a switch changes A, B, the spares and W, and leaves `W + s·B·A` as it was. In the
layout of `dense`, `kernel + scale·AᵀB` with one LoRA vector a row: `lora_a [r, in]`, `lora_b [r, out]`.

Three cursors walk a layer, all derived from `cursor`, the number k of vectors loaded so far: load
k of A goes to slot `k mod r`, load k of B to slot `(k + r//2) mod r`, and both take and leave spare
row `k mod (c - r)`, unless rows are drawn (`candidates.draw_picks`). The authors keep all c candidates and write
an evicted vector back to its own id; swapping with c - r spares visits the same vectors in the same order.

Pure functions. No model, no config: any pytree whose `params`, `frozen` and `candidates` hold a
layer's arrays under one path will do, stacked along leading axes or not.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from switchlora_jax.lowrank.kernel_storage import KERNEL, TAIL, read, write
from switchlora_jax.lowrank.spares import layer_shape, read_rows, replicate, switchable, write_rows


class SwitchSchedule(NamedTuple):
  """How often vectors are switched, and for how long their counterparts stay frozen.

  Attributes:
    interval: steps between two switches of one vector at the start (interval₀, 40 in the paper); 0: never.
    freeze_steps: N, steps for which the counterpart is frozen, the step of the switch included.
    total_steps: T, the steps of the whole run.
    decay_point: p, the fraction of T at which the rate has fallen to `decay_to` of its start.
    decay_to: d, 1/3 in the text (the authors' code has 0.3).
  """

  interval: int = 40
  freeze_steps: int = 5
  total_steps: int = 40_000
  decay_point: float = 0.1
  decay_to: float = 1 / 3

  def rate(self, step):
    """The switching rate at `step` relative to the start: d^((t+1) / (p·T)), at least 1e-8."""
    return jnp.maximum(self.decay_to ** ((step + 1) / (self.decay_point * self.total_steps)), 1e-8)

  def window(self, rank: int, spares: int) -> int:
    """K, the most vectors a side that one step may switch; 0 where the interval is 0, which means never."""
    if self.interval == 0:
      return 0
    return min(rank // self.interval + 1, spares, rank // 2)


class Switched(NamedTuple):
  """What `switch` returns.

  Attributes:
    params, frozen, candidates: the collections.
    reset, freeze: the optimizer's masks, trees like `params`: [..., r, 1] bool for switchable LoRA vectors, else False.
    count: [] int32, vectors switched a side, over all layers.
    moved: [] Frobenius norm of what the kernels absorbed, over all layers.
  """

  params: Any
  frozen: Any
  candidates: Any
  reset: Any
  freeze: Any
  count: jax.Array
  moved: jax.Array


class Layer(NamedTuple):
  """The arrays of L stacked layers of one kind that a switch rewrites."""

  kernel: jax.Array  # [L, in, out]
  lora_a: jax.Array  # [L, r, in]
  lora_b: jax.Array  # [L, r, out]
  spare_a: jax.Array  # [L, c - r, in]
  spare_b: jax.Array  # [L, c - r, out]
  kernel_tail: jax.Array | None = None  # [L, in, out], where the kernel is a head

  @property
  def base(self) -> dict[str, jax.Array]:
    """The arrays that hold the kernels."""
    return {KERNEL: self.kernel} if self.kernel_tail is None else {KERNEL: self.kernel, TAIL: self.kernel_tail}

  def rank_and_spares(self) -> tuple[int, int]:
    """r and c - r."""
    rank = self.lora_a.shape[1]
    return rank, min(self.kernel.shape[1:]) - rank


class Clock(NamedTuple):
  """Where L stacked layers stand: the cursor, and for how many steps each vector stays frozen."""

  cursor: jax.Array  # [L] int32, vectors loaded so far, a side
  timer_a: jax.Array  # [L, r] int32
  timer_b: jax.Array  # [L, r] int32


def switch_count(uniform, expected):
  """⌊s⌋ + Bernoulli(s - ⌊s⌋) from a uniform number in [0, 1) and the expected number s (Algorithm 2)."""
  whole = jnp.floor(expected)
  return (whole + (uniform < expected - whole)).astype(jnp.int32)


def swap(vectors, spares, slots, picks, live):
  """Algorithm 1, line 2, for one side of L layers: exchange `vectors[slots]` with `spares[picks]` where `live`.

  Idle rows are rewritten with themselves. They may not name the slot or spare of a live row, and within
  a window nothing does; that both writes depend on both reads is what lets XLA do without copies.

  Spares may be of fewer bits: a vector is rounded when it leaves, and the kernel absorbs what comes, as it comes.

  Shapes: vectors [L, r, d], spares [L, c - r, d], slots, picks, live [L, K].
  Returns the new vectors, the new spares, and the rows that left minus those that came, [L, K, d], in
  float32 or wider.
  """
  old, new = read_rows(vectors, slots, live), read_rows(spares, picks, live).astype(vectors.dtype)
  moving = live[:, :, None]
  vectors = write_rows(vectors, slots, live, jnp.where(moving, new, old))
  spares = write_rows(spares, picks, live, jnp.where(moving, old, new).astype(spares.dtype))
  wide = jnp.promote_types(vectors.dtype, jnp.float32)
  return vectors, spares, jnp.where(moving, old.astype(wide) - new.astype(wide), 0)


def switch_vectors(layers: Layer, slots_a, slots_b, picks_a, picks_b, live):
  """Algorithm 1 on both sides of L layers, but for the kernel.

  A's and B's slots never meet, so the counterpart of a switched vector is not switched itself, and
  lines 1 and 4 of both sides are one product of rank 2K.

  Returns the layers and the factors left [L, 2K, in], right [L, 2K, out] of what s·AᵀB has lost.
  """
  lora_a, spare_a, lost_a = swap(layers.lora_a, layers.spare_a, slots_a, picks_a, live)
  lora_b, spare_b, lost_b = swap(layers.lora_b, layers.spare_b, slots_b, picks_b, live)
  with_b = replicate(jnp.take_along_axis(lora_b, slots_a[:, :, None], 1))
  with_a = replicate(jnp.take_along_axis(lora_a, slots_b[:, :, None], 1))
  layers = layers._replace(lora_a=lora_a, lora_b=lora_b, spare_a=spare_a, spare_b=spare_b)
  return layers, jnp.concatenate([lost_a, with_a], 1), jnp.concatenate([with_b, lost_b], 1)


def absorb(base, left, right, busy):
  """kernel[l] += left[l]ᵀ·right[l] for the layers l that are `busy` [L] (Algorithm 1, lines 1 and 4), in place.

  `base` holds the stacked kernels as a layer's frozen arrays do: heads alone, or with their tails.

  A sum of outer products rather than a matrix product: XLA fuses it into one pass over the kernel,
  with nothing of the kernel's size beside it, or one layer of it where there are tails to write as well.
  The sum is taken in the dtype of `left`, float32 or wider, and rounded once, as the kernel is stored.
  Only busy layers are visited; a quiet step costs nothing.
  """
  rows = left.shape[1]
  chunk = min(rows, 32)  # more terms in one fusion, and XLA starts to keep partial sums in memory
  chunks = -(-rows // chunk)
  left, right = (jnp.pad(x, ((0, 0), (0, chunks * chunk - rows), (0, 0))) for x in (left, right))
  busy_first = jnp.argsort(~busy)

  def turn(number, base):
    layer, first = busy_first[number // chunks], number % chunks * chunk
    x, y = (jax.lax.dynamic_slice(side, (layer, first, 0), (1, chunk, side.shape[2])) for side in (left, right))
    old = {name: jax.lax.dynamic_slice_in_dim(stack, layer, 1) for name, stack in base.items()}  # [1, in, out]
    new = write(read(old) + sum(x[:, k, :, None] * y[:, k, None, :] for k in range(chunk)), old)
    return {name: jax.lax.dynamic_update_slice_in_dim(stack, new[name], layer, 0) for name, stack in base.items()}

  return jax.lax.fori_loop(0, jnp.sum(busy) * chunks, turn, base)


def switch_layers(layers: Layer, cursor, count, window: int, scale, picks=None):
  """Switch `count` [L] vectors a side of L layers, from `cursor` [L] on; at most `window` (K).

  A loop of one turn or none, not a branch: XLA copies what passes through a branch.
  `picks`, if any, are the spare rows of A and of B to use, each [L, K].

  Returns the layers and ‖s·ΔAᵀB‖², [] summed over them.
  """
  rank, spares = layers.rank_and_spares()
  ahead = cursor[:, None] + jnp.arange(window)[None]
  live = jnp.arange(window)[None] < count[:, None]
  slots_a, slots_b = ahead % rank, (ahead + rank // 2) % rank
  picks_a, picks_b = picks or (ahead % spares, ahead % spares)

  def turn(_, carry):
    layers, left, right = switch_vectors(carry[0], slots_a, slots_b, picks_a, picks_b, live)
    right = scale * right
    return layers._replace(**absorb(layers.base, left, right, count > 0)), norm_squared(left, right)

  nothing = jnp.zeros((), jnp.promote_types(layers.lora_a.dtype, jnp.float32))
  return jax.lax.fori_loop(0, jnp.any(count > 0).astype(jnp.int32), turn, (layers, nothing))


def norm_squared(left, right):
  """Σ ‖left[l]ᵀ·right[l]‖² over layers, left [L, K, in], right [L, K, out], without forming the products."""
  gram = lambda side: jnp.einsum("lkd,ljd->lkj", side, side)
  return jnp.sum(gram(left) * gram(right))


def switched_slots(cursor, count, rank: int, offset: int):
  """[L, r] bool: the slots a side switches, `count` [L] of them from `cursor + offset` on."""
  return (jnp.arange(rank)[None] - cursor[:, None] - offset) % rank < count[:, None]


def freeze(timer, hit, freeze_steps: int, skip):
  """Start the timers of the vectors that are `hit`; returns which are frozen now, and the timers a step later."""
  running = jnp.where(hit, freeze_steps, timer)
  return running > 0, jnp.where(skip, timer, jnp.maximum(running - 1, 0))


def available(clock: Clock):
  """[L]: how many vectors a side may be switched now without touching a frozen one.

  The cursors stay half the rank apart, and behind each of them lie the slots of the other side that it
  froze: as many as are frozen is how much closer the other cursor may not come.
  """
  half = clock.timer_a.shape[1] // 2
  frozen = [jnp.sum(timer > 0, 1, dtype=jnp.int32) for timer in (clock.timer_a, clock.timer_b)]
  return half - jnp.maximum(*frozen)


def switch_kind(layers: Layer, clock: Clock, uniforms, picks, schedule: SwitchSchedule, scale, step, skip):
  """One step of Algorithm 2 for L stacked layers of one kind, with `uniforms` [L] and `picks` as `switch_layers`.

  Returns layers, clock, {"lora_a": (reset, frozen), "lora_b": (reset, frozen)} with masks [L, r], count [L], ‖s·ΔAᵀB‖².
  """
  rank, spares = layers.rank_and_spares()
  window = schedule.window(rank, spares)
  wanted = switch_count(uniforms, rank * schedule.rate(step) / schedule.interval)
  count = jnp.where(skip, 0, jnp.clip(wanted, 0, jnp.minimum(window, available(clock))))
  layers, moved = switch_layers(layers, clock.cursor, count, window, scale, picks)
  reset_b = switched_slots(clock.cursor, count, rank, 0)  # switching a_k resets and freezes b_k
  reset_a = switched_slots(clock.cursor, count, rank, rank // 2)  # and the other way round
  frozen_a, timer_a = freeze(clock.timer_a, reset_a, schedule.freeze_steps, skip)
  frozen_b, timer_b = freeze(clock.timer_b, reset_b, schedule.freeze_steps, skip)
  clock = Clock(clock.cursor + count, timer_a, timer_b)
  return layers, clock, {"lora_a": (reset_a, frozen_a), "lora_b": (reset_b, frozen_b)}, count, moved


# The collection of each array; of all others, candidates.
COLLECTION = dict.fromkeys(("lora_a", "lora_b"), "params") | dict.fromkeys((KERNEL, TAIL), "frozen")


def switch(
  params, frozen, candidates=None, *, schedule: SwitchSchedule, scale, step, uniforms, picks=None, skip=False
) -> Switched:
  """One step's switching of every layer that keeps spares. `kernel + scale·AᵀB` does not change.

  Where a kernel has a tail, that holds of the two joined. The function is that of the head alone, and moves by
  no more than the rounding of the kernel to bfloat16, however often it is switched.

  Args:
    params, frozen, candidates: the collections of `dense.SwitchLoRADense`, nested under equal paths; there are no
      candidates where no layer has spares.
    schedule: rates and freeze time.
    scale: s = α/r.
    step: t, from 0.
    uniforms: {path: [...] in [0, 1)} as from `draw_uniforms`, or one number for every layer.
    picks: spare rows as from `draw_picks`; None: the next ones in order, as the authors do.
    skip: [] bool; where true nothing moves, timers included.
  """
  candidates = candidates or {}
  flat = {"params": flatten_dict(params), "frozen": flatten_dict(frozen), "candidates": flatten_dict(candidates)}
  reset, frozen_now = dict.fromkeys(flat["params"], False), dict.fromkeys(flat["params"], False)
  total, moved = jnp.zeros((), jnp.int32), 0.0
  for path in switchable(candidates):
    lead = layer_shape(candidates, path)
    find = lambda name, path=path: flat[COLLECTION.get(name, "candidates")].get((*path, name))
    stack = lambda x, lead=lead: None if x is None else x.reshape(-1, *x.shape[len(lead) :])
    layers, clock = (kind(*(stack(find(name)) for name in kind._fields)) for kind in (Layer, Clock))
    if schedule.window(*layers.rank_and_spares()) == 0:
      continue
    draws = uniforms[path] if isinstance(uniforms, dict) else jnp.full(lead, uniforms)
    chosen = picks and tuple(rows.reshape(-1, rows.shape[-1]) for rows in picks[path])
    layers, clock, masks, count, norm2 = switch_kind(
      layers, clock, draws.reshape(-1), chosen, schedule, scale, step, skip
    )
    for name, value in (layers._asdict() | clock._asdict()).items():
      if value is not None:
        flat[COLLECTION.get(name, "candidates")][*path, name] = value.reshape(*lead, *value.shape[1:])
    for name, both in masks.items():
      reset[*path, name], frozen_now[*path, name] = (mask.reshape(*lead, -1, 1) for mask in both)
    total, moved = total + jnp.sum(count, dtype=jnp.int32), moved + norm2
  return Switched(*map(unflatten_dict, (*flat.values(), reset, frozen_now)), total, jnp.sqrt(moved))


def expected_cycles(schedule: SwitchSchedule, rank: int, candidates: int) -> float:
  """How many times a layer's c candidates are all cycled through in a run; far below 1, switching cannot matter."""
  decayed = schedule.decay_point * schedule.total_steps / math.log(1 / schedule.decay_to)
  return rank / (candidates - rank) * decayed / schedule.interval
