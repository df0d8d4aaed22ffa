"""The projectors that `directions` selects: their distribution, their random keys, and their settings."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_model
from projected import gradients, matrices, run
from small_model import host, same_bits
from stages import slowly
from tiny import resolved, tiny_config

from switchlora_jax.config import resolve
from switchlora_jax.errors import UserError
from switchlora_jax.methods import METHODS, galore, projectors

pytestmark = pytest.mark.two_linear_layers

PROJECTED = ("galore", "fira", "frugal")
each = pytest.mark.parametrize("method", PROJECTED)
SHAPES = {"up": (2, 4, 6), "down": (2, 6, 4)}
RANDOM = ("random", "sara", "coordinates")


def draws(find, matrix, rank, count):
  """`count` draws of a projector, [count, small, r]."""
  keys = jax.random.split(jax.random.key(0), count)
  return np.asarray(jax.jit(jax.vmap(lambda key: find(matrix, rank, key)))(keys), np.float64)


# --- distributions ------------------------------------------------------------------------------------------------


def test_random_directions_are_uniform_and_orthonormal():
  """E[PPᵀ] = r/n · 1 and E[P] = 0; the columns of a plain QR decomposition have signs that depend on their values.

  With 4,000 draws, means of elements of variance below 1/4 have standard deviations below 0.008.
  """
  found = draws(projectors.random_directions, jnp.zeros((4, 6)), 2, 4000)
  np.testing.assert_allclose(np.swapaxes(found, 1, 2) @ found, np.tile(np.eye(2), (4000, 1, 1)), rtol=0, atol=1e-5)
  np.testing.assert_allclose(np.mean(found @ np.swapaxes(found, 1, 2), axis=0), np.eye(4) / 2, rtol=0, atol=0.04)
  np.testing.assert_allclose(found.mean(0), np.zeros((4, 2)), rtol=0, atol=0.04)


def test_sampled_directions_are_drawn_without_replacement_in_proportion_to_the_singular_values():
  """σ = 4, 2, 1: two of three. First i, then j ≠ i, with probability σ_i/7 · σ_j/(7 − σ_i)."""
  sizes = np.array([4.0, 2.0, 1.0])
  matrix = jnp.asarray(np.eye(3, 5) * sizes[:, None], jnp.float32)
  found = np.abs(draws(projectors.sampled_directions, matrix, 2, 4000)).round(6)
  axes = found.argmax(1)  # [draws, 2]: the singular vectors are axes
  assert (found.max(1) == 1).all() and (axes[:, 0] < axes[:, 1]).all(), "different ones, in the order of falling σ"
  for i, j in ((0, 1), (0, 2), (1, 2)):
    expected = sizes[i] / 7 * sizes[j] / (7 - sizes[i]) + sizes[j] / 7 * sizes[i] / (7 - sizes[j])
    assert abs(np.mean((axes == (i, j)).all(1)) - expected) < 0.03


def test_random_coordinates_are_axes_and_each_is_drawn_as_often():
  found = draws(projectors.random_coordinates, jnp.zeros((4, 6)), 2, 2000)
  assert set(np.unique(found)) == {0, 1} and (found.sum(1) == 1).all() and (found.sum(2) <= 1).all()
  np.testing.assert_allclose(found.sum(2).mean(0), [0.5] * 4, rtol=0, atol=0.05)


@pytest.mark.parametrize("name", RANDOM)
def test_a_rank_above_the_smaller_side_keeps_all_directions(name):
  matrix = jnp.asarray(gradients(1, np.float32, x=(3, 5))[0]["x"])
  found = np.asarray(projectors.DRAWN[name](matrix, 9, jax.random.key(0)))
  np.testing.assert_allclose(found @ found.T, np.eye(3), rtol=0, atol=1e-6)


# --- keys ---------------------------------------------------------------------------------------------------------


def transformation(seed=0, name="random", refresh_every=2):
  config = small_model.config("galore", seed=seed, galore__directions=name)
  options = projectors.options(config, config.galore)
  return galore.scale_by_galore(galore.ProjectedAdam(2, refresh_every, matrices, **options), 1.0)


def kernels(state):
  """The four projectors of two leaves with two layers each."""
  return [projector for name in sorted(SHAPES) for projector in state.projector[name]]


def test_draws_differ_between_kernels_refreshes_and_seeds_and_are_repeatable():
  grads = gradients(3, np.float32, **SHAPES)
  _, states = run(transformation(), grads)
  _, again = run(transformation(), grads)
  _, other_seed = run(transformation(seed=1), grads)
  assert same_bits(again, states) and same_bits(states[0].projector, states[1].projector)
  drawn = [*kernels(states[0]), *kernels(states[2]), *kernels(other_seed[0])]
  assert len({projector.tobytes() for projector in drawn}) == 12


@pytest.mark.parametrize("name", RANDOM)
def test_draws_do_not_depend_on_earlier_ones(name):
  """A run that continues from a saved state has the same bits."""
  grads = gradients(5, np.float32, **SHAPES)
  updates, states = run(transformation(name=name), grads)
  resumed, resumed_states = run(transformation(name=name), grads[3:], jax.device_put(states[2]))
  assert same_bits(resumed, updates[3:]) and same_bits(resumed_states, states[3:])
  assert not same_bits(states[2].projector, states[4].projector)


def test_golore_decomposes_first_and_draws_in_the_last_updates():
  """The share counts the updates after the full-rank warm start: here the last 2 of 4."""
  changes = dict(steps=10, warm_start_steps=6, galore__directions="golore", galore__random_share=0.5)
  config = small_model.config("galore", **changes)
  options = projectors.options(config, config.galore)
  tx = galore.scale_by_galore(galore.ProjectedAdam(2, 1, matrices, **options), 1.0)
  grads = gradients(4, np.float32, up=(2, 4, 6))
  _, states = run(tx, grads)
  for t, state in enumerate(states):
    for layer in range(2):
      key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), t), layer)
      grad = jnp.asarray(grads[t]["up"][layer])
      leading, drawn = projectors.leading_directions(grad, 2), projectors.random_directions(grad, 2, key)
      expected = np.asarray(drawn if t >= 2 else leading)
      np.testing.assert_allclose(state.projector["up"][layer], expected, rtol=0, atol=1e-5)


def test_golore_draws_when_the_random_share_begins():
  """In place of update 6, the next that is a multiple of 3, the share begins at update 5; it never begins at 10."""
  found = []
  for share in (0.5, 0.0):
    config = small_model.config("galore", steps=10, galore__directions="golore", galore__random_share=share)
    tx = galore.scale_by_galore(galore.ProjectedAdam(2, 3, matrices, **projectors.options(config, config.galore)), 1.0)
    _, states = run(tx, gradients(10, np.float32, up=(2, 4, 6)))
    found.append([t for t, (x, y) in enumerate(pairwise(states), 1) if not same_bits(x.projector, y.projector)])
  assert found == [[3, 5, 6, 9], [3, 6, 9]]


@each
def test_every_method_refreshes_when_the_random_share_begins(method):
  changes = {"steps": 4, f"{method}__directions": "golore", f"{method}__refresh_every": 200}
  config = small_model.config(method, **changes, **{f"{method}__random_share": 0.5})
  tx = METHODS[method].build(config).optimizer
  grads = [{"blocks": {"up": {"kernel": tree["up"]}}} for tree in gradients(4, np.float32, up=(2, 4, 6))]
  _, states = run(tx, grads)
  same = [same_bits(x.projector, y.projector) for x, y in pairwise(states)]
  assert same == [True, False, True]


# --- in the train step --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", slowly(PROJECTED, quick=["galore"]))
def test_the_section_of_a_method_selects_its_projectors(method):
  config = small_model.config(method, **{f"{method}__directions": "coordinates", f"{method}__refresh_every": 2})
  state, step = small_model.first_state(config, 1), small_model.step(config, 1)
  found = []
  for t in range(3):
    state, report = step(state, small_model.shard_batch(small_model.rows(config, t), 1))
    found.append(host(state.opt_state.projector["blocks"]))
  assert report["svd_failed"] == 0 and not report["skipped"]
  assert all(set(np.unique(leaf)) == {0, 1} for leaf in jax.tree.leaves(found))
  assert same_bits(found[0], found[1]) and not same_bits(found[1], found[2])


# --- the config ---------------------------------------------------------------------------------------------------

MISTAKES = {
  "rank 0": (dict(rank=0), "rank (=0) must be at least 1; set --config.rank or use --config.method=full"),
  "rank": (dict(rank=17), "rank (=17) exceeds the smaller side of every kernel (16); lower --config.rank"),
  "never": (dict(refresh_every=0), ".refresh_every (=0) must be at least 1; set --config."),
  "unknown": (
    dict(directions="pca"),
    ".directions (='pca') must be one of svd, random, golore, sara, coordinates; set --config.",
  ),
  "share": (dict(random_share=1.5), ".random_share (=1.5) must lie between 0 and 1; set --config."),
}


@each
@pytest.mark.parametrize("name", MISTAKES)
def test_an_invalid_config_raises_an_error_with_a_remedy(tmp_path, method, name):
  changes, sentence = MISTAKES[name]
  changes = {key if key == "rank" else f"{method}__{key}": value for key, value in changes.items()}
  with pytest.raises(UserError) as caught:
    resolve(tiny_config(tmp_path, method=method, **changes), devices=8)
  assert (method if sentence.startswith(".") else "") + sentence in str(caught.value)


@each
def test_the_description_counts_decompositions_and_draws(tmp_path, method):
  """12 steps, of which 2 are the warm start: refreshes at updates 0, 3, 6 and 9 of 10, with golore also at update 5."""

  def lines(directions):
    keys = {"directions": directions, "refresh_every": 3, "random_share": 0.5}
    changes = {f"{method}__{key}": value for key, value in keys.items()}
    return METHODS[method].describe(resolved(tmp_path, method=method, warm_start_steps=2, **changes))

  decomposed, drawn = "decompositions of every block gradient: {}, one", "drawn for every block gradient: {}, one"
  for directions, counts in {"svd": (4, 0), "sara": (4, 0), "golore": (2, 3), "random": (0, 4)}.items():
    expected = [text.format(n) for text, n in zip((decomposed, drawn), counts, strict=True) if n]
    found = lines(directions)
    assert len(found) == len(expected) and all(text in line for text, line in zip(expected, found, strict=True))


@each
def test_a_random_share_shorter_than_an_interval_is_counted(tmp_path, method):
  """Updates 0, 200, 400, 600 and 800, and 850 of 1000."""
  keys = {"directions": "golore", "refresh_every": 200, "random_share": 0.15}
  changes = {f"{method}__{key}": value for key, value in keys.items()}
  decomposed, drawn = METHODS[method].describe(resolved(tmp_path, method=method, steps=1000, **changes))
  assert "decompositions of every block gradient: 5, one every" in decomposed
  assert "drawn for every block gradient: 1, one every" in drawn


def test_the_default_adds_nothing_to_galore(tmp_path):
  config = resolved(tmp_path, method="galore")
  assert config.galore.directions == "svd" and projectors.options(config, config.galore) == {}
