"""The spares: random draws of counts and rows, coverage, and rows gathered and scattered with any sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_model
from jax.sharding import NamedSharding, PartitionSpec
from small_model import same_bits

from switchlora_jax.lowrank.layers import adapter_std
from switchlora_jax.lowrank.spares import (
  FreshVectors,
  coverage,
  draw_spare_indices,
  draw_uniforms,
  exchanged_bytes,
  gather_rows,
  scatter_rows,
)
from switchlora_jax.lowrank.switching import SwitchSchedule
from switchlora_jax.parallel.sharding import BOTH

# --- draws --------------------------------------------------------------------------------------------------------


def candidates_of(layers, value=0.0, spares=2):
  """The candidates of stacked layers of rank 4."""
  vectors, timer = np.full((layers, spares, 4 + spares), value, np.float32), np.zeros((layers, 4), np.int32)
  cursor = np.full(layers, value, np.int32)
  return {"spare_a": vectors, "spare_b": vectors, "timer_a": timer, "timer_b": timer, "cursor": cursor}


def test_draws_depend_on_the_key_and_the_number_of_the_layer():
  key, candidates = jax.random.key(7), {"blocks": {"q": candidates_of(3), "v": candidates_of(2)}}
  draws = draw_uniforms(key, candidates)
  assert {path: u.shape for path, u in draws.items()} == {("blocks", "q"): (3,), ("blocks", "v"): (2,)}
  flat = np.concatenate(list(draws.values()))
  np.testing.assert_array_equal(flat, [jax.random.uniform(jax.random.fold_in(key, number)) for number in range(5)])
  assert len(np.unique(flat)) == 5 and flat.min() >= 0 and flat.max() < 1
  assert same_bits(draw_uniforms(key, candidates), draws)
  elsewhere = draw_uniforms(jax.random.fold_in(key, 1), candidates)
  assert not np.any(np.isin(np.concatenate(list(elsewhere.values())), flat))


def test_draws_do_not_depend_on_the_values_of_the_layers():
  key = jax.random.key(7)
  assert same_bits(draw_uniforms(key, {"q": candidates_of(3)}), draw_uniforms(key, {"q": candidates_of(3, 1.0)}))


DRAWING = SwitchSchedule(interval=2)  # at most two vectors per factor of a layer of rank 4


def test_indices_are_distinct_rows_determined_by_the_key():
  key, candidates = jax.random.key(7), {"blocks": {"q": candidates_of(3, spares=50), "v": candidates_of(2, spares=40)}}
  indices = draw_spare_indices(key, candidates, DRAWING)
  rows = [np.stack(indices["blocks", name]) for name in "qv"]  # [factor, layer, K]
  assert [x.shape for x in rows] == [(2, 3, 2), (2, 2, 2)]
  assert all(x.min() >= 0 for x in rows) and rows[0].max() < 50 and rows[1].max() < 40
  assert all(np.all(x[..., 0] != x[..., 1]) for x in rows)
  flat = [tuple(pair) for x in rows for pair in x.reshape(-1, 2)]
  assert len(set(flat)) == 10, "each factor of each layer is drawn independently"
  assert same_bits(draw_spare_indices(key, candidates, DRAWING), indices)
  assert same_bits(draw_spare_indices(key, jax.tree.map(lambda x: x + 1, candidates), DRAWING), indices)
  assert not same_bits(draw_spare_indices(jax.random.fold_in(key, 1), candidates, DRAWING), indices)


def test_indices_are_drawn_evenly_and_without_repetition():
  """2,000 draws of 2 of 5 rows: each row is drawn 800 times, within six standard deviations of 22."""
  draw = jax.jit(jax.vmap(lambda key: draw_spare_indices(key, {"q": candidates_of(1, spares=5)}, DRAWING)["q",]))
  for factor in draw(jax.random.split(jax.random.key(0), 2000)):
    assert np.all(factor[..., 0] != factor[..., 1])
    for rows, expected, slack in ((factor, 800, 132), (factor[..., 0], 400, 108)):
      assert np.abs(np.bincount(rows.ravel(), minlength=5) - expected).max() < slack


def test_indices_of_every_spare_are_a_permutation():
  """There are as many spares as the window, two, so that both are drawn."""
  for factor in draw_spare_indices(jax.random.key(3), {"q": candidates_of(20)}, DRAWING)["q",]:
    np.testing.assert_array_equal(np.sort(factor, -1), np.tile([0, 1], (20, 1)))
    assert len({tuple(row) for row in np.asarray(factor)}) == 2, "both orders occur"


@pytest.mark.parametrize("init", ["switchlora", "lora"])
def test_fresh_vectors_have_the_distribution_of_the_initial_ones(init):
  """Uniform, and independent of the other loads of the call. There are 19,200 and 25,600 elements."""
  draw = jax.jit(FreshVectors(jax.random.key(7), init).draw, static_argnums=(2, 3, 4))
  layers, loads = np.arange(5), np.tile(np.arange(40), (5, 1))
  found = [np.asarray(x) for x in draw(layers, loads, 8, (96, 128), np.float32)]
  stds = adapter_std(96, 128, 8, init)
  for rows, size, std in zip(found, (96, 128), stds, strict=True):
    assert rows.shape == (5, 40, size) and np.abs(rows).max() <= 3**0.5 * std * (1 + 1e-6)
    np.testing.assert_allclose(rows.std(), std, rtol=2e-2)
    assert std == 0 or len(np.unique(rows[..., 0])) == 200, "each layer and load has its own"
  assert same_bits(draw(layers[1:2], loads[1:2, 7:9], 8, (96, 128), np.float32), tuple(x[1:2, 7:9] for x in found))
  other = FreshVectors(jax.random.key(8), init).draw(layers, loads, 8, (96, 128), np.float32)
  assert not np.any(np.all(other[0] == found[0], -1)), "other keys give other vectors"
  if init == "switchlora":
    assert abs(np.corrcoef(found[0].ravel(), found[1][..., :96].ravel())[0, 1]) < 0.04, "A and B are independent"


def test_functions_of_spares_refuse_fresh_candidates():
  clock = {name: x for name, x in candidates_of(2).items() if "spare" not in name}
  for function in (coverage, lambda layers: draw_spare_indices(jax.random.key(0), layers, DRAWING)):
    with pytest.raises(ValueError, match=r"^blocks/q stores no spares$"):
      function({"blocks": {"q": clock}})
  assert exchanged_bytes({"blocks": {"q": clock}}, DRAWING) == 0


# --- coverage -----------------------------------------------------------------------------------------------------


def test_coverage_is_the_share_of_the_candidates_of_all_layers():
  """Rank 4: 4, 5, 6 and 6 of 4 + 2 candidates have been in a slot; 7 of 4 + 6 after three loads."""
  walked = candidates_of(4) | {"cursor": np.array([0, 1, 2, 9], np.int32)}
  other = candidates_of(1, spares=6) | {"cursor": np.array([3], np.int32)}
  np.testing.assert_allclose(coverage({"blocks": {"q": walked}}), (4 + 5 + 6 + 6) / 6 / 4, rtol=1e-6)
  np.testing.assert_allclose(coverage({"q": walked, "v": other}), (4 + 5 + 6 + 6 + 7) / (4 * 6 + 10), rtol=1e-6)
  single = jax.tree.map(lambda x: x[1], walked)
  np.testing.assert_allclose(coverage({"q": single}), 5 / 6, rtol=1e-6)


def test_padding_is_neither_drawn_nor_counted():
  """Rank 4, 4 + 2 candidates, and six rows of padding."""
  padded = candidates_of(20) | {name: np.zeros((20, 8, 6), np.float32) for name in ("spare_a", "spare_b")}
  assert same_bits(
    draw_spare_indices(jax.random.key(3), {"q": padded}, DRAWING),
    draw_spare_indices(jax.random.key(3), {"q": candidates_of(20)}, DRAWING),
  )
  assert coverage({"q": padded}) == coverage({"q": candidates_of(20)}) == 4 / 6


def test_exchanged_bytes_are_those_of_the_paper_for_both_factors_of_all_layers():
  """1.3B, rank 512, 16 bits: 23.9 MB each way for the 12.8 vectors expected at first; the window is 13."""
  shapes = [(2048, 2048)] * 4 + [(2048, 5461)] * 2 + [(5461, 2048)]
  spare = lambda width: jax.ShapeDtypeStruct((24, 1536, width), jnp.bfloat16)
  count = lambda *shape: jax.ShapeDtypeStruct((24, *shape), jnp.int32)
  clock = {"timer_a": count(512), "timer_b": count(512), "cursor": count()}
  layers = {f"{i}": clock | {"spare_a": spare(n), "spare_b": spare(m)} for i, (n, m) in enumerate(shapes)}
  assert exchanged_bytes(layers, SwitchSchedule(interval=40)) == 2 * 24 * 13 * sum(n + m for n, m in shapes)
  assert round(exchanged_bytes(layers, SwitchSchedule(interval=40)) * 12.8 / 13 / 1e6, 1) == 23.9
  assert exchanged_bytes(layers, SwitchSchedule(interval=0)) == exchanged_bytes({}, SwitchSchedule()) == 0


# --- rows ---------------------------------------------------------------------------------------------------------

HOST = dict(spec=PartitionSpec(), memory_kind="pinned_host")
SHARDED = dict(spec=PartitionSpec(None, BOTH))


@pytest.mark.parametrize("placement", [HOST, SHARDED], ids=["host", "sharded"])
def test_rows_are_gathered_and_scattered_with_any_sharding(placement):
  """Two of three rows are active in one layer, none in the other. Inactive rows do not change."""
  rng, mesh = np.random.default_rng(0), small_model.mesh(8)
  spares = rng.standard_normal((2, 16, 5)).astype(np.float32)
  indices, active = jnp.asarray([[14, 15, 0], [3, 4, 5]]), jnp.asarray([[True, True, False], [False] * 3])

  @jax.jit
  def negate(spares):
    rows = gather_rows(spares, indices, active)
    return rows, scatter_rows(spares, indices, active, jnp.where(active[:, :, None], -rows, rows))

  sharding = NamedSharding(mesh, **placement)
  with jax.set_mesh(mesh):
    sharded = jax.jit(negate, in_shardings=sharding, out_shardings=(None, sharding))
    rows, after = sharded(jax.device_put(spares, sharding))
  expected = spares.copy()
  expected[0, 14:] *= -1
  np.testing.assert_array_equal(after, expected)
  np.testing.assert_array_equal(np.asarray(rows)[0, :2], spares[0, 14:])
  assert after.sharding == sharding
