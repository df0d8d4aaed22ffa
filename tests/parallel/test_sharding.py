"""Shardings: every layout trains the same run, and devices have only their shards."""

import math
from functools import lru_cache

import jax
import numpy as np
import pytest
import small_model
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec
from small_model import equations, host, same_bits
from stages import slowly

from switchlora_jax.errors import UserError
from switchlora_jax.parallel.sharding import FSDP, Placement, by_rows, replicated
from switchlora_jax.runs.checkpoint import Checkpoints
from switchlora_jax.training.phases import build_phase

pytestmark = pytest.mark.two_linear_layers

REPLICATED = {}
SPARES = dict(sharding__candidates="sharded")
LAYOUTS = {
  "candidates over 8 devices": SPARES,
  "candidates on the host": dict(sharding__candidates="host"),
  "optimizer over 8 devices": dict(**SPARES, sharding__fsdp=8, sharding__trained="replicated"),
  "trained over 8 devices": dict(**SPARES, sharding__fsdp=8),
  "all over 4 of 8 devices": dict(**SPARES, sharding__fsdp=4, sharding__frozen="sharded", remat="full"),
}
INT8 = dict(frozen_dtype="int8", sharding__fsdp=4, sharding__frozen="sharded")
# Other layouts change the order of sums, and Adam amplifies the differences in rounding.
SAME_SUMS = ("candidates over 8 devices", "candidates on the host")


def config(method="switchlora", **layout):
  """Rank 5 and 11 spares: only the hidden size and the vocabulary are multiples of 8."""
  return small_model.config(method, rank=5, **layout)


@lru_cache
def trained(devices=8, method="switchlora", steps=5, **layout):
  """Return the phase, the metrics of some steps, the last state on the host and some validation losses."""
  settings = config(method, **layout)
  phase, metrics = small_model.phase(settings, devices), []
  with jax.set_mesh(small_model.mesh(devices, settings.sharding.fsdp)):
    state = phase.create()
    for t in range(steps):
      state, report = phase.step(state, phase.shard_batch(small_model.rows(settings, t)))
      metrics.append(host(report))
    losses = phase.eval_step(state.params, state.frozen, phase.shard_batch(small_model.rows(settings, 99)))
    return phase, metrics, host(state), np.asarray(losses)


def without_padding(state):
  """Return a state on the host without the padding of its c - r = 11 spares."""
  real = lambda path, x: x[..., :11, :] if path[-1].key in ("spare_a", "spare_b") else x
  return state._replace(candidates=jax.tree.map_with_path(real, state.candidates))


# --- the same run -------------------------------------------------------------------------------------------------


# The quick layouts are compiled for other tests too, or combine most properties of the others.
@pytest.mark.parametrize("name", slowly(LAYOUTS, quick=(*SAME_SUMS, "all over 4 of 8 devices")))
def test_every_layout_trains_the_same_run(name):
  _, expected, last, losses = trained(**REPLICATED)
  _, found, state, found_losses = trained(**LAYOUTS[name])
  assert sum(int(report["switched"]) for report in expected) > 0
  assert [int(report["switched"]) for report in found] == [int(report["switched"]) for report in expected]
  state, last = without_padding(state), without_padding(last)
  if name in SAME_SUMS:
    assert same_bits(state, last) and same_bits(found_losses, losses)
  close = lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-4)
  jax.tree.map(close, (state, found_losses), (last, losses))
  np.testing.assert_allclose([r["loss"] for r in found], [r["loss"] for r in expected], rtol=1e-6)


@pytest.mark.parametrize("name", [None, "all over 4 of 8 devices"])
def test_the_first_state_is_the_same_in_every_layout(name):
  """A sharded rank adds one rounding to the merged weights. Other tests place a state made on one device."""
  settings = config(**LAYOUTS.get(name, REPLICATED))
  mesh = small_model.mesh(8, settings.sharding.fsdp)
  created, expected = (build(settings, mesh).create() for build in (build_phase.__wrapped__, build_phase))
  place = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree)
  assert place(created) == place(expected)
  assert same_bits(created._replace(frozen={}), expected._replace(frozen={}))
  near = lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=0 if name is None else 2**-23)
  jax.tree.map(near, host(created.frozen), host(expected.frozen))


OTHERS = {
  "full": {},
  "relora": dict(relora__restart_every=2, relora__restart_warmup_steps=0),
  "galore": {},
  "fira": {},
  "apollo": dict(apollo__refresh_every=2),
  "apollo_mini": dict(apollo_mini__refresh_every=2),
  "frugal": dict(frugal__directions="random"),
  "ldadam": {},
  "sltrain": dict(sltrain__density=0.25, sltrain__restart_every=2),
  "factored": dict(factored__restart_every=2),
}


@pytest.mark.parametrize("method", slowly(OTHERS, quick=[]))
def test_the_other_methods_train_the_same_run_sharded_over_8_devices(method):
  """ReLoRA merges after its third update; projections and factors change within the five steps."""
  options = dict(method=method, steps=5, **OTHERS[method])
  _, expected, last, losses = trained(**options)
  _, found, state, found_losses = trained(**options, sharding__fsdp=8, sharding__frozen="sharded")
  np.testing.assert_allclose([r["loss"] for r in found], [r["loss"] for r in expected], rtol=1e-6)
  np.testing.assert_allclose(found_losses, losses, rtol=1e-6)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-4), state.params, last.params)


def test_fresh_candidates_transported_moments_and_chosen_slots_are_the_same_in_every_layout():
  """Every device draws the vectors, and no spares are stored. After one gradient, all ratios are 1 up to rounding."""
  fresh = dict(
    switch__candidates="fresh", switch__state="transport", switch__slots="snr", switch__min_age=2, switch__snr_below=2.0
  )
  _, expected, last, losses = trained(**fresh)
  _, found, state, found_losses = trained(**fresh, **LAYOUTS["all over 4 of 8 devices"])
  assert sum(int(report["switched"]) for report in expected) > 0
  assert [int(report["switched"]) for report in found] == [int(report["switched"]) for report in expected]
  close = lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-4)
  jax.tree.map(close, (state, found_losses), (last, losses))
  assert not any("spare" in str(path) for path, _ in jax.tree.leaves_with_path(state.candidates))


@pytest.mark.slow
def test_int8_kernels_split_over_devices_train_the_same_run():
  """A kernel and its residual are split alike; scales are split along their only axis."""
  _, expected, last, losses = trained(frozen_dtype="int8")
  phase, found, state, found_losses = trained(**INT8)
  np.testing.assert_allclose([r["loss"] for r in found], [r["loss"] for r in expected], rtol=1e-5)
  np.testing.assert_allclose(found_losses, losses, rtol=1e-5)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-4), state.params, last.params)
  up = phase.abstract.frozen["blocks"]["up"]
  assert up["kernel"].sharding.spec == up["kernel_tail"].sharding.spec != up["kernel_scale"].sharding.spec


def test_padding_exists_and_stays_zero():
  spares = trained(**SPARES)[2].candidates["blocks"]["up"]["spare_b"]
  assert spares.shape == (2, 16, 24) and not spares[:, 11:].any() and spares[:, :11].any()
  assert trained(**REPLICATED)[2].candidates["blocks"]["up"]["spare_b"].shape == (2, 11, 24)


@pytest.mark.parametrize("remat", ["none", "linear", "full"])
def test_gathered_arrays_are_not_kept_for_the_backward_pass(remat):
  """In the jaxpr of a step no scan over layers returns complete kernels, unlike without sharding."""

  def stacked(**layout):
    settings = config("full", batch_size=8, model__num_layers=3, model__vocab_size=56, **layout)
    phase = small_model.phase(settings, 8)
    rows = jax.ShapeDtypeStruct((8, 8), np.int32, sharding=by_rows(small_model.mesh(8)))
    traced = equations(jax.make_jaxpr(phase.step)(phase.abstract, rows).jaxpr)
    return {out.aval.shape for e in traced if e.primitive.name == "scan" for out in e.outvars}

  kernels = {(3, 16, 24), (3, 24, 16)}
  assert not stacked(sharding__fsdp=8, sharding__frozen="sharded", remat=remat) & kernels
  assert stacked() & kernels == kernels, "at least their gradients"


# --- arrays per device --------------------------------------------------------------------------------------------


def size_per_device(tree) -> int:
  """Return the number of elements on one device."""
  return sum(math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))


def test_a_device_has_only_its_shard():
  abstract = lambda layout: small_model.phase(config(**layout), 8).abstract
  full, layouts = abstract(REPLICATED), {name: abstract(layout) for name, layout in LAYOUTS.items()}
  spares = lambda state: [{n: x for n, x in c.items() if "spare" in n} for c in state.candidates["blocks"].values()]
  assert size_per_device(spares(layouts["candidates over 8 devices"])) * 8 == size_per_device(spares(full)) * 16 / 11
  for part in ("params", "frozen", "opt_state"):
    assert size_per_device(getattr(layouts["candidates over 8 devices"], part)) == size_per_device(getattr(full, part))
  split = layouts["optimizer over 8 devices"]
  assert (size_per_device(split.params), size_per_device(split.frozen)) == (
    size_per_device(full.params),
    size_per_device(full.frozen),
  )
  vectors_of_5 = 2 * 7 * 2 * 5  # their counts in Adam's state, which cannot be sharded
  assert size_per_device(split.opt_state) < size_per_device(full.opt_state) / 8 + vectors_of_5 + 10
  assert size_per_device(layouts["trained over 8 devices"].params) == size_per_device(full.params) / 8
  assert size_per_device(layouts["trained over 8 devices"].frozen) == size_per_device(full.frozen)
  assert size_per_device(layouts["all over 4 of 8 devices"].frozen) == size_per_device(full.frozen) / 4


def test_candidates_on_the_host_are_in_its_pinned_memory():
  kinds = lambda layout: {
    (path[-1].key, x.sharding.memory_kind)
    for path, x in jax.tree.leaves_with_path(small_model.phase(config(**layout), 8).abstract.candidates)
  }
  spares_on_host = {("spare_a", "pinned_host"), ("spare_b", "pinned_host")}
  assert kinds(LAYOUTS["candidates on the host"]) & spares_on_host == spares_on_host
  assert all(kind == "device" for _, kind in kinds(REPLICATED))


@given(st.lists(st.sampled_from([1, 2, 3, 5, 8, 16, 24, 40]), min_size=1, max_size=3), st.booleans(), st.booleans())
def test_arrays_are_sharded_evenly_and_never_along_the_layers(shape, in_blocks, vectors):
  name = "lora_a" if vectors else "kernel"
  tree = {"blocks": {"q": {name: np.zeros(shape)}}} if in_blocks else {"head": {name: np.zeros(shape)}}
  placement = Placement(small_model.mesh(8, 8), trained=True)
  (spec,) = jax.tree.leaves(placement.specs(tree, "trained"), is_leaf=lambda x: isinstance(x, PartitionSpec))
  axes = [axis for axis in range(in_blocks, len(shape)) if shape[axis] % 8 == 0]
  if FSDP not in tuple(spec):
    assert not axes
    return
  axis = tuple(spec).index(FSDP)
  assert axis in axes
  if vectors and len(shape) - 2 in axes:
    assert axis == len(shape) - 2, "LoRA vectors are not divided"
  else:
    assert shape[axis] == max(shape[a] for a in axes)


@pytest.mark.slow
def test_operations_per_device_do_not_grow_with_devices():
  """With equal sequences per device, one device and each of eight need the same number of operations.

  The sum over the devices, an addition per gradient, is not counted: one device has none.
  """

  def operations(devices, **layout):
    settings = config(batch_size=2 * devices, **layout)
    phase = small_model.phase(settings, devices)
    tokens = jax.ShapeDtypeStruct((2 * devices, 8), np.int32, sharding=by_rows(small_model.mesh(devices)))
    sums = sum(x.size for x in jax.tree.leaves(phase.abstract.params)) if devices > 1 else 0
    return phase.step.lower(phase.abstract, tokens).compile().cost_analysis()["flops"] - sums

  assert operations(8, **SPARES) <= 1.01 * operations(1)


# --- checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
  ("saved", "restored_as"),
  [
    (SPARES, REPLICATED),
    (REPLICATED, LAYOUTS["all over 4 of 8 devices"]),
    (LAYOUTS["candidates on the host"], SPARES),
    (LAYOUTS["all over 4 of 8 devices"], LAYOUTS["candidates on the host"]),
  ],
)
def test_a_checkpoint_of_one_layout_restores_in_another(saved, restored_as, tmp_path):
  phase, _, state, _ = trained(**saved)
  placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), state, phase.abstract)
  with Checkpoints(tmp_path, 1) as checkpoints:
    checkpoints.save(5, placed)
  abstract = trained(**restored_as)[0].abstract
  with Checkpoints(tmp_path, 1) as checkpoints:
    restored = checkpoints.restore(lambda _: abstract)
  assert same_bits(without_padding(restored), without_padding(state))
  place = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree)
  assert place(restored) == place(abstract)


def test_a_checkpoint_of_other_shapes_is_not_padded_with_zeros(tmp_path):
  """Only the padding of spares may differ, not the rank or the sizes of the model."""
  state = {"blocks": {"lora_a": np.ones((2, 4, 16), np.float32), "spare_a": np.ones((2, 12, 16), np.float32)}}
  on_one = replicated(small_model.mesh(1))
  with Checkpoints(tmp_path, 1) as checkpoints:
    checkpoints.save(5, jax.device_put(state, on_one))

  def restore(lora_a, spare_a):
    kind = lambda shape: jax.ShapeDtypeStruct(shape, np.float32, sharding=on_one)
    with Checkpoints(tmp_path) as checkpoints:
      return checkpoints.restore(lambda _: {"blocks": {"lora_a": kind(lora_a), "spare_a": kind(spare_a)}})

  assert restore((2, 4, 16), (2, 16, 16))["blocks"]["spare_a"].shape == (2, 16, 16)
  for lora_a, spare_a in (((2, 6, 16), (2, 12, 16)), ((2, 4, 24), (2, 12, 16)), ((2, 4, 16), (2, 12, 24))):
    with pytest.raises(UserError, match=r"\['blocks'\]\['(lora|spare)_a'\] has the shape \["):
      restore(lora_a, spare_a)


def test_one_device_continues_from_a_checkpoint_of_eight(tmp_path):
  phase, _, state, _ = trained(**SPARES)
  with Checkpoints(tmp_path, 1) as checkpoints:
    checkpoints.save(5, jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), state, phase.abstract))
  one = small_model.phase(config(**SPARES), 1)
  with Checkpoints(tmp_path, 1) as checkpoints:
    restored = checkpoints.restore(lambda _: one.abstract)
  assert same_bits(without_padding(restored), without_padding(state))
  rows = small_model.rows(config(), 5)
  on_one, report = one.step(restored, one.shard_batch(rows))
  assert np.isfinite(report["loss"]) and int(on_one.step) == 6
