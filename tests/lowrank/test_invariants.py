"""What switching keeps, whatever the shapes, ranks, intervals, freeze times and draws."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import same_bits

from switchlora_jax.lowrank.kernel_storage import load_kernel, split_float32
from switchlora_jax.lowrank.layers import SwitchLoRADense
from switchlora_jax.lowrank.spares import coverage, draw_spare_indices, rank_and_spares
from switchlora_jax.lowrank.switching import SwitchSchedule, switch

SCALE = 0.5
STEPS = 12
# layers, in, out, rank: fewer spares than slots, odd ranks, one spare, as few as two slots, dozens switched at once.
SHAPES = [(2, 9, 6, 4), (1, 7, 9, 5), (3, 5, 4, 3), (2, 12, 10, 8), (1, 6, 20, 2), (2, 54, 56, 36)]
SCHEDULES = [(1, 0), (2, 1), (12, 5)]  # interval, freeze_steps
anything = (st.sampled_from(SHAPES), st.sampled_from(SCHEDULES), st.integers(0, 2**32 - 1))
many = settings(max_examples=20, deadline=None)
few = settings(max_examples=6, deadline=None)


def draw_layers(shape, dtype, seed):
  """The collections of L stacked layers, all vectors distinct, the cursors anywhere, no timer running."""
  layers, n, m, rank = shape
  spares, rng = min(n, m) - rank, np.random.default_rng(seed)
  normal = lambda *shape: rng.standard_normal((layers, *shape)).astype(dtype)
  timer = np.zeros((layers, rank), np.int32)
  return {
    "params": {"lora_a": normal(rank, n), "lora_b": normal(rank, m)},
    "frozen": {"kernel": normal(n, m)},
    "candidates": {
      "spare_a": normal(spares, n), "spare_b": normal(spares, m),
      "timer_a": timer, "timer_b": timer, "cursor": rng.integers(0, 100, layers, np.int32),
    },
  }  # fmt: skip


def indices_at(step, candidates, schedule):
  """The spares that a run in random order takes at a step."""
  return draw_spare_indices(jax.random.fold_in(jax.random.key(1), step), candidates, schedule)


class Traced(NamedTuple):
  """A `SwitchSchedule` of traced times: schedules of one window share a program."""

  schedule: SwitchSchedule
  size: int

  def window(self, rank, spares):
    return self.size

  def __getattr__(self, name):
    return getattr(self.schedule, name)


@partial(jax.jit, static_argnames=("window", "random"))
def switched(layers, uniforms, step, skip, times, *, window, random):
  """(layers, uniforms [L], step, skip, (interval, freeze_steps)) -> Switched; the rate hardly falls in these steps."""
  schedule = Traced(SwitchSchedule(*times, total_steps=10_000), window)
  indices = indices_at(step, layers["candidates"], schedule) if random else None
  plan = dict(schedule=schedule, scale=SCALE, step=step, uniforms={(): uniforms}, spare_indices=indices, skip=skip)
  return switch(**layers, **plan)


def switcher(interval, freeze_steps, random=False):
  """`switched` with a schedule."""

  def run(layers, uniforms, step, skip):
    window = SwitchSchedule(interval, freeze_steps).window(*rank_and_spares(layers["candidates"], ()))
    return switched(layers, uniforms, step, skip, (interval, freeze_steps), window=window, random=random)

  return run


def take(layers, index):
  """One layer of the stack."""
  return jax.tree.map(lambda x: x[index], layers)


def collections(out):
  return {"params": out.params, "frozen": out.frozen, "candidates": out.candidates}


split, join = jax.jit(split_float32), jax.jit(load_kernel)


def history(shape, times, seed, dtype=np.float32, random=False, tails=False, narrow=False):
  """The (before, after) of each of some steps, on the host; the first draws and a third of the others are 0.

  With `tails` the kernels are stored in 16 bits and 8 more; if `narrow`, the spares in 16.
  """
  layers, rng = draw_layers(shape, dtype, seed), np.random.default_rng(seed)
  if tails:
    head, tail = split(layers["frozen"]["kernel"])
    layers["frozen"] = {"kernel": np.asarray(head), "kernel_tail": np.asarray(tail)}
  if narrow:
    layers["candidates"] |= {name: layers["candidates"][name].astype(jnp.bfloat16) for name in ("spare_a", "spare_b")}
  steps = []
  for t in range(STEPS):
    uniforms = np.where((rng.random(shape[0]) < 1 / 3) | (t == 0), 0, rng.random(shape[0])).astype(dtype)
    out = jax.tree.map(np.asarray, switcher(*times, random)(layers, uniforms, t, False))
    steps.append((layers, out))
    layers = collections(out)
  return steps


def switched_rows(before, after, side):
  """[L, r] bool: the rows of a factor whose vector has changed."""
  return np.any(before["params"][f"lora_{side}"] != after.params[f"lora_{side}"], axis=-1)


def counts(before, after):
  return after.candidates["cursor"] - before["candidates"]["cursor"]


def in_force(frozen, params):
  """The merged weight W + s·BA in float64."""
  kernel = join(frozen) if "kernel_tail" in frozen else frozen["kernel"]
  kernel, a, b = (np.asarray(x, np.float64) for x in (kernel, params["lora_a"], params["lora_b"]))
  return kernel + SCALE * np.einsum("lrn,lrm->lnm", a, b)


def drift(before, after):
  """The change of `W + s·BA` in a step."""
  return np.abs(in_force(after.frozen, after.params) - in_force(before["frozen"], before["params"])).max()


def magnitudes(layers):
  """The largest entries: of W, and of a product of a vector of A and one of B."""
  both = lambda side: max(
    np.abs(layers["params"][f"lora_{side}"]).max(), np.abs(layers["candidates"][f"spare_{side}"]).max()
  )
  return np.abs(layers["frozen"]["kernel"]).max(), both("a") * both("b")


@many
@given(*anything)
def test_the_merged_weight_does_not_change_in_float64(shape, times, seed):
  with jax.enable_x64(True):
    for before, after in history(shape, times, seed, np.float64):
      kernel, product = magnitudes(before)
      assert drift(before, after) <= 1e-12 * (kernel + SCALE * shape[3] * product)


@few
@given(*anything)
def test_bfloat16_spares_round_evicted_vectors_and_keep_the_merged_weight(shape, times, seed):
  """A returning vector differs by a rounding of 2⁻⁹, and the kernel is corrected by the rounded one."""
  with jax.enable_x64(True):
    for before, after in history(shape, times, seed, np.float64, narrow=True):
      kernel, product = magnitudes(before)
      assert drift(before, after) <= 1e-6 * (kernel + SCALE * shape[3] * product)
      for side in "ab":
        left = before["params"][f"lora_{side}"][switched_rows(before, after, side)]
        waiting = after.candidates[f"spare_{side}"]
        assert waiting.dtype == jnp.bfloat16
        assert {tuple(v) for v in left.astype(jnp.bfloat16)} <= {tuple(v) for layer in waiting for v in layer}


@many
@given(*anything)
def test_the_merged_weight_does_not_change_in_float32(shape, times, seed):
  """Bound of a step, u = 2⁻²⁴: of 2K terms s·(old − new)·other each is rounded 2K + 2 times, their sum with W K times.

  At most: a term is a difference, two products and a place in a sum; W is written at least two terms at a time.
  """
  window = SwitchSchedule(*times).window(shape[3], min(shape[1:3]) - shape[3])
  for before, after in history(shape, times, seed):
    kernel, product = magnitudes(before)
    terms = 2 * window * SCALE * 2 * product
    assert drift(before, after) <= 2**-24 * ((2 * window + 2) * terms + window * (kernel + terms))


@few
@given(*anything)
def test_with_a_residual_the_weight_keeps_16_bits_and_the_function_8(shape, times, seed):
  """Of W, which a switch writes once for every 32 outer products. The function is that of the bfloat16 kernel.

  It may jump by the rounding of W before and after, but after all the steps it is no farther away than that.
  """
  window = SwitchSchedule(*times).window(shape[3], min(shape[1:3]) - shape[3])
  steps, writes = history(shape, times, seed, tails=True), -(-2 * window // 32)
  far = 0.0
  for before, after in steps:
    kernel, product = magnitudes(before)
    largest = kernel + 2 * window * SCALE * 2 * product
    near = (2**-16 * writes + 2**-24 * 6 * window) * largest
    assert drift(before, after) <= near
    far += near
    head = lambda layers: {"kernel": layers["frozen"]["kernel"]}
    function = lambda layers, head=head: in_force(head(layers), layers["params"])
    rounding = 2 * 2**-8 * largest
    assert np.abs(function(collections(after)) - function(before)).max() <= near + rounding
    assert np.abs(function(collections(after)) - function(steps[0][0])).max() <= far + rounding
    assert (after.frozen["kernel"].dtype, after.frozen["kernel_tail"].dtype) == (jnp.bfloat16, jnp.int8)
  assert any(not same_bits(before["frozen"], after.frozen) for before, after in steps)


def test_the_adapter_alone_does_change():
  """What the two tests above hold still is moved by every switch, on both sides of the sum."""
  before, after = history(SHAPES[0], SCHEDULES[0], 0)[0]
  nothing = {"kernel": np.zeros_like(before["frozen"]["kernel"])}
  assert np.abs(in_force(nothing, after.params) - in_force(nothing, before["params"])).max() > 0.1
  assert np.abs(after.frozen["kernel"] - before["frozen"]["kernel"]).max() > 0.1


def rows_of(layers, side):
  """For each layer the vectors of a side, slots and spares, as sorted bytes."""
  stacks = zip(layers["params"][f"lora_{side}"], layers["candidates"][f"spare_{side}"], strict=True)
  return [sorted(row.tobytes() for row in np.concatenate(stack)) for stack in stacks]


@many
@given(*anything)
def test_vectors_are_only_permuted(shape, times, seed):
  steps = history(shape, times, seed)
  first = steps[0][0]
  for side in "ab":
    assert len(set(rows_of(first, side)[0])) == min(shape[1:3])
    for _, after in steps:
      assert rows_of(collections(after), side) == rows_of(first, side)
    assert any(np.any(switched_rows(*step, side)) for step in steps), "some vector moved"


@few
@given(st.sampled_from([(1, 0), (12, 5)]), st.integers(0, 2**32 - 1))
def test_random_order_keeps_the_merged_weight_and_all_vectors(times, seed):
  shape = SHAPES[5]  # with more spares than a step can take
  with jax.enable_x64(True):
    steps = history(shape, times, seed, np.float64, random=True)
  for before, after in steps:
    kernel, product = magnitudes(before)
    assert drift(before, after) <= 1e-12 * (kernel + SCALE * shape[3] * product)
    for side in "ab":
      assert rows_of(collections(after), side) == rows_of(steps[0][0], side)
      assert not np.any(switched_rows(before, after, side) & (before["candidates"][f"timer_{side}"] > 0))
      np.testing.assert_array_equal(switched_rows(before, after, side).sum(-1), counts(before, after))
  assert sum(int(after.count) for _, after in steps) > 0


def test_random_order_loads_the_drawn_spares():
  """Evicted vectors take their places; counts and slots are those of the sequential order."""
  shape, times = SHAPES[5], (1, 0)
  rank, schedule, differ = shape[3], SwitchSchedule(*times, 10_000), False
  in_order = history(shape, times, 5)
  for t, (before, after) in enumerate(history(shape, times, 5, random=True)):
    np.testing.assert_array_equal(counts(before, after), counts(*in_order[t]))
    for side, offset, rows in zip("ab", (0, rank // 2), indices_at(t, before["candidates"], schedule)[()], strict=True):
      differ = differ or np.any(after.params[f"lora_{side}"] != in_order[t][1].params[f"lora_{side}"])
      for layer, count in enumerate(counts(before, after)):
        slots = (before["candidates"]["cursor"][layer] + offset + np.arange(count)) % rank
        taken = np.asarray(rows)[layer, :count]
        old, new = (x[f"lora_{side}"][layer][slots] for x in (before["params"], after.params))
        np.testing.assert_array_equal(new, before["candidates"][f"spare_{side}"][layer][taken])
        np.testing.assert_array_equal(after.candidates[f"spare_{side}"][layer][taken], old)
  assert differ


@few
@given(*anything)
def test_moved_is_the_norm_of_the_change_of_the_kernels(shape, times, seed):
  """Squares of float64 sums, which may cancel; a step that switches nothing moves exactly nothing."""
  with jax.enable_x64(True):
    steps = history(shape, times, seed, np.float64)
  for before, after in steps:
    expected = np.linalg.norm(after.frozen["kernel"] - before["frozen"]["kernel"])
    np.testing.assert_allclose(after.moved, expected, rtol=1e-7)
    assert (after.moved == 0) == (after.count == 0)


covered = jax.jit(coverage)


@few
@given(*anything)
def test_coverage_is_the_share_of_vectors_that_have_been_in_a_slot(shape, times, seed):
  layers, rng = draw_layers(shape, np.float32, seed), np.random.default_rng(seed)
  layers["candidates"]["cursor"][:] = 0
  seen = {(side, index): set() for side in "ab" for index in range(shape[0])}
  for t in range(STEPS):
    for (side, index), rows in seen.items():
      rows |= {row.tobytes() for row in layers["params"][f"lora_{side}"][index]}
    share = covered(layers["candidates"])
    for side in "ab":
      shares = [len(seen[side, index]) / min(shape[1:3]) for index in range(shape[0])]
      np.testing.assert_allclose(share, np.mean(shares), rtol=1e-6)
    out = switcher(*times)(layers, rng.random(shape[0], np.float32), t, bool(rng.random() < 0.2))
    layers = jax.tree.map(np.asarray, collections(out))


def test_coverage_is_complete_after_a_cycle():
  layers = draw_layers((2, 9, 6, 4), np.float32, 0)
  layers["candidates"]["cursor"][:] = 0
  shares = []
  for t in range(3):
    shares.append(float(covered(layers["candidates"])))
    layers = collections(switcher(1, 0)(layers, np.zeros(2, np.float32), t, False))
  assert shares == [np.float32(4 / 6), 1, 1], "two a step, of two spares"


@many
@given(*anything)
def test_nothing_frozen_is_switched(shape, times, seed):
  for before, after in history(shape, times, seed):
    for side in "ab":
      assert not np.any(switched_rows(before, after, side) & (before["candidates"][f"timer_{side}"] > 0))


@many
@given(*anything)
def test_slots_of_both_sides_are_disjoint_and_as_many_as_counted(shape, times, seed):
  _, n, m, rank = shape
  most = min(min(n, m) - rank, rank // 2)
  for before, after in history(shape, times, seed):
    rows_a, rows_b = (switched_rows(before, after, side) for side in "ab")
    assert not np.any(rows_a & rows_b)
    np.testing.assert_array_equal(rows_a.sum(-1), counts(before, after))
    np.testing.assert_array_equal(rows_b.sum(-1), counts(before, after))
    assert counts(before, after).min() >= 0 and counts(before, after).max() <= most
    assert after.count == counts(before, after).sum()


@many
@given(*anything)
def test_the_counterparts_are_reset_and_stay_frozen_for_the_freeze_steps(shape, times, seed):
  freeze_steps = times[1]
  since = {side: np.full((shape[0], shape[3]), 10**6) for side in "ab"}  # steps since the counterpart was switched
  for before, after in history(shape, times, seed):
    for side, other in ("ab", "ba"):
      hit = switched_rows(before, after, other)
      since[side] = np.where(hit, 0, since[side] + 1)
      np.testing.assert_array_equal(after.reset[f"lora_{side}"][..., 0], hit)
      np.testing.assert_array_equal(after.freeze[f"lora_{side}"][..., 0], since[side] < freeze_steps)


def test_the_largest_possible_number_of_vectors_is_switched():
  for shape in SHAPES:
    most = min(min(shape[1:3]) - shape[3], shape[3] // 2)
    assert max(counts(*step).max() for step in history(shape, (1, 0), 1)) == most


def test_frozen_vectors_limit_the_number_of_switches():
  """Rank 2, each draw asks for one vector: while one of a side is frozen the other may not be switched."""
  layers, done = draw_layers((1, 6, 20, 2), np.float32, 0), []
  for t in range(6):
    out = switcher(4, 2)(layers, np.zeros(1, np.float32), t, False)
    layers, _ = collections(out), done.append(int(out.count))
  assert done == [1, 0, 1, 0, 1, 0]


@many
@given(*anything)
def test_skip_changes_nothing(shape, times, seed):
  for _, after in history(shape, times, seed)[:3]:
    layers = collections(after)
    out = switcher(*times)(layers, np.zeros(shape[0], np.float32), 0, True)
    assert same_bits(collections(out), layers)
    assert out.count == out.moved == 0 and not any(np.any(mask) for mask in jax.tree.leaves(out.reset))


@many
@given(st.sampled_from(SHAPES), st.integers(0, 2**32 - 1))
def test_a_step_without_a_switch_changes_only_the_timers(shape, seed):
  times = (40, 5)  # fewer than one vector a step is expected, and the largest draw declines it
  before = collections(history(shape, times, seed)[0][1])
  out = switcher(*times)(before, np.full(shape[0], np.float32(1 - 2**-24)), 1, False)
  assert out.count == 0
  for side in "ab":
    timer = before["candidates"].pop(f"timer_{side}")
    assert np.any(timer == 4)
    np.testing.assert_array_equal(out.candidates.pop(f"timer_{side}"), np.maximum(timer - 1, 0))
  assert same_bits(collections(out), before)


def test_a_step_without_a_switch_runs_no_loop_iteration(monkeypatch):
  """All work on vectors and kernels is in loops, which visit the layers that switch."""
  turns = []

  def fori_loop(lower, upper, body, value):
    turns.append(int(upper))
    for index in range(lower, int(upper)):
      value = body(index, value)
    return value

  monkeypatch.setattr(jax.lax, "fori_loop", fori_loop)
  layers = jax.tree.map(jnp.asarray, draw_layers((3, 5, 4, 3), np.float32, 0))
  plan = dict(schedule=SwitchSchedule(12, 5), scale=SCALE, step=0)
  quiet = switch(**layers, **plan, uniforms={(): jnp.array([0.9, 0.9, 0.9])})
  assert turns == [0] and quiet.count == 0
  busy = switch(**layers, **plan, uniforms={(): jnp.array([0.9, 0.0, 0.0])})
  assert turns == [0, 1, 2] and busy.count == 2


@settings(max_examples=6, deadline=None)  # each shape is compiled twice
@given(*anything)
def test_stacked_layers_are_switched_like_single_layers(shape, times, seed):
  layers, uniforms = draw_layers(shape, np.float32, seed), np.random.default_rng(seed).random(shape[0], np.float32)
  together = jax.tree.map(np.asarray, switcher(*times)(layers, uniforms, 0, False))
  for index in range(shape[0]):
    alone = switcher(*times)(take(layers, index), uniforms[index], 0, False)
    assert same_bits(collections(alone), take(collections(together), index))
    assert same_bits((alone.reset, alone.freeze), take((together.reset, together.freeze), index))


def test_kinds_of_layers_are_switched_independently():
  wide, tall = draw_layers(SHAPES[0], np.float32, 0), draw_layers(SHAPES[3], np.float32, 1)
  tree = {name: {"blocks": {"tall": tall[name], "wide": wide[name]}} for name in wide}
  tree["params"]["head"] = {"kernel": np.ones((2, 2), np.float32)}
  draws = {("blocks", "tall"): np.float32([0, 0.9]), ("blocks", "wide"): np.float32([0.1, 0.8])}
  schedule = SwitchSchedule(2, 1, 10_000)
  run = jax.jit(lambda layers, draws: switch(**layers, schedule=schedule, scale=SCALE, step=0, uniforms=draws))
  out = run(tree, draws)
  for kind, layers in (("tall", tall), ("wide", wide)):
    alone = switcher(2, 1)(layers, draws["blocks", kind], 0, False)
    for name in collections(alone):
      assert same_bits(collections(out)[name]["blocks"][kind], collections(alone)[name])
  assert same_bits(out.params["head"], tree["params"]["head"])
  assert not out.reset["head"]["kernel"] and not out.freeze["head"]["kernel"]


@pytest.mark.parametrize("rank", [6, 7])
def test_a_layer_without_spares_is_never_switched(rank):
  variables = jax.jit(SwitchLoRADense(features=6, rank=rank).init)(jax.random.key(0), np.ones((1, 9), np.float32))
  variables["candidates"] = variables.get("candidates", {})
  out = switch(**variables, schedule=SwitchSchedule(1, 0), scale=SCALE, step=0, uniforms=0.0)
  assert out.count == 0 and same_bits(collections(out), variables)


def test_rank_1_is_never_switched():
  layers = draw_layers((2, 9, 6, 1), np.float32, 0)
  out = switch(**layers, schedule=SwitchSchedule(1, 0), scale=SCALE, step=0, uniforms=0.0)
  assert out.count == 0 and same_bits(collections(out), layers)
