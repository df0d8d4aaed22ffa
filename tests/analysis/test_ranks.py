"""The effective rank of weight changes: known matrices, and models with changes of known rank."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_model
from flax.traverse_util import flatten_dict
from small_model import host

from switchlora_jax.analysis.ranks import effective_ranks, make_learnt_rank, participation_ratio, ranks, singular_values
from switchlora_jax.config import resolve
from switchlora_jax.models import weights
from switchlora_jax.training import phases

pytestmark = pytest.mark.two_linear_layers

# --- matrices -----------------------------------------------------------------------------------------------------


def normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def by_decomposition(matrix):
  """(Σσ²)² / Σσ⁴ from the singular values, in float64."""
  squares = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False) ** 2
  return squares.sum(-1) ** 2 / (squares**2).sum(-1)


@pytest.mark.parametrize("sides", [(6, 9), (9, 6), (7, 7)])
def test_known_matrices(sides):
  near = dict(rtol=1e-5)
  small = min(sides)
  np.testing.assert_allclose(participation_ratio(jnp.outer(*map(jnp.arange, map(float, sides)))), 1, **near)
  np.testing.assert_allclose(participation_ratio(3 * jnp.eye(*sides)), small, **near)
  np.testing.assert_allclose(participation_ratio(jnp.eye(*sides).at[2:].set(0)), 2, **near)
  orthogonal = np.linalg.qr(normal(0, max(sides), small))[0]
  np.testing.assert_allclose(participation_ratio(jnp.asarray(orthogonal)), small, **near)
  assert participation_ratio(jnp.zeros(sides)) == 0


@pytest.mark.parametrize("sides", [(1, 5), (6, 9), (9, 6), (20, 40)])
def test_the_participation_ratio_is_that_of_the_singular_values(sides):
  for seed in range(3):
    matrix = normal(seed, *sides)
    ratio = participation_ratio(jnp.asarray(matrix))
    np.testing.assert_allclose(ratio, by_decomposition(matrix), rtol=1e-5)
    np.testing.assert_allclose(participation_ratio(jnp.asarray(matrix.T)), ratio, rtol=1e-5)
    np.testing.assert_allclose(participation_ratio(jnp.asarray(1e-4 * matrix)), ratio, rtol=1e-5)
    assert 1 - 1e-5 <= ratio <= min(sides)


def of_spectrum(seed, values, sides):
  """A float32 matrix with the given singular values."""
  left, right = (np.linalg.qr(normal(seed + side, side, len(values)))[0] for side in sides)
  return ((left * values) @ right.T).astype(np.float32)


@pytest.mark.parametrize("sides", [(6, 9), (9, 6)])
def test_singular_values_and_ranks_of_known_spectra(sides):
  known = np.array([[6, 5, 4, 3, 2, 1], [7, 1, 1, 1e-3, 0, 0], [2, 2, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0]], float)
  stack = np.stack([of_spectrum(10 * i, values, sides) for i, values in enumerate(known)])
  found = singular_values(stack)
  np.testing.assert_allclose(found, known, atol=1e-5)
  np.testing.assert_allclose(effective_ranks(found)[:3], by_decomposition(stack[:3]), rtol=1e-5)
  assert effective_ranks(found)[3] == 0
  assert ranks(found, known[:, 0], max(sides)).tolist() == [6, 4, 6, 0]


def test_the_rank_does_not_count_the_rounding_of_the_weights():
  """Large weights are rounded coarsely. Singular values that come from this rounding are not counted."""
  weight = of_spectrum(0, np.full(40, 1e4), (40, 60))
  small = of_spectrum(5, np.array([1.0, 0.5, 0.25]), (40, 60))
  values = singular_values(((weight + small) - weight)[None])
  assert values[0, 3] > 60 * np.finfo(np.float32).eps * values[0, 0], (
    "relative to its own largest singular value, the rank would be more than 3"
  )
  assert ranks(values, np.array([1e4]), 60).tolist() == [3]
  assert ranks(values, np.array([1e6]), 60).tolist() == [0]


# --- models -------------------------------------------------------------------------------------------------------

RANK = 2


@pytest.fixture(scope="module")
def lora():
  """The phase of a LoRA of rank 2, its initial host state, and a function from params to the effective rank."""
  first = phases.build_phase(resolve(small_model.config("lora", rank=RANK), devices=1), small_model.mesh(1))
  state, learnt_rank = host(first.create()), make_learnt_rank(first)
  return first, state, lambda params: float(learnt_rank(params, state.frozen, first.scale))


def changed(params, factor, vectors):
  """The parameters with the first `vectors` vectors of one factor redrawn in each layer, at about the initial scale."""
  names = {name for name, layer in params["blocks"].items() if factor in layer}

  def draw(seed, layer):
    rows = layer[factor].copy()
    rows[:, :vectors] = 0.5 * normal(seed, *rows[:, :vectors].shape)
    return layer | {factor: rows}

  blocks = {name: draw(seed, params["blocks"][name]) for seed, name in enumerate(sorted(names))}
  return params | {"blocks": params["blocks"] | blocks}


def test_the_effective_rank_is_0_at_step_0(lora):
  """Exactly 0, because W_0 is drawn again and is bitwise the same.

  The ratio does not depend on magnitude, so any difference in rounding would give a rank above 0.
  """
  _, state, learnt_rank = lora
  assert learnt_rank(state.params) == 0


def test_the_residuals_of_bfloat16_kernels_are_included():
  config = small_model.config("switchlora", rank=RANK, frozen_dtype="bfloat16")
  first = phases.build_phase(resolve(config, devices=1), small_model.mesh(1))
  state, learnt_rank = host(first.create()), make_learnt_rank(first)
  ratio = lambda frozen: float(learnt_rank(state.params, frozen, first.scale))
  move = lambda path, x: x + np.int8(1) if path[-1].key == "kernel_tail" else x
  assert ratio(state.frozen) == 0 < ratio(jax.tree.map_with_path(move, state.frozen))


def test_the_effective_rank_grows_with_the_number_of_changed_vectors(lora):
  """The rank of a LoRA's change is at most the sum of the ranks of its adapter now and at step 0."""
  _, state, learnt_rank = lora
  one, two = (changed(state.params, "lora_b", vectors) for vectors in (1, RANK))
  np.testing.assert_allclose(learnt_rank(one), 1, rtol=1e-4)
  assert 1.2 < learnt_rank(two) <= RANK < learnt_rank(changed(two, "lora_a", RANK)) <= 2 * RANK


def test_the_effective_rank_is_the_mean_over_the_kernels_of_all_blocks(lora):
  first, state, learnt_rank = lora
  params = changed(changed(state.params, "lora_a", 2), "lora_b", 1)
  plain = lambda params: flatten_dict(weights.merged(params, state.frozen, first.scale))
  kernels = lambda params: [kernel for path, kernel in sorted(plain(params).items()) if weights.in_block(path)]
  stacks = [np.asarray(a) - b for a, b in zip(kernels(params), kernels(state.params), strict=True)]
  expected = np.concatenate([by_decomposition(stack) for stack in stacks])
  assert expected.shape == (4,) and np.ptp(expected) > 0.5
  np.testing.assert_allclose(learnt_rank(params), expected.mean(), rtol=1e-4)
  rest = jax.tree.map(lambda x: x + 1, {name: params[name] for name in ("embed", "norm", "head")})
  assert learnt_rank(params | rest) == learnt_rank(params)


@pytest.mark.parametrize("adapted", [False, True], ids=["full rank", "adapters"])
def test_the_initial_and_current_weights_may_have_different_arrays_and_scales(adapted):
  """As after a full-rank phase. W_0 may also have adapters, with another scale."""
  head, frozen = {"kernel": normal(1, 6, 5)}, {"blocks": {"q": {"kernel": normal(0, 1, 9, 6)}}}
  adapter = lambda seed: {"blocks": {"q": {"lora_a": normal(seed, 1, 3, 9), "lora_b": normal(seed + 1, 1, 3, 6)}}}
  start = (adapter(2) | {"head": head}, frozen, 2.0) if adapted else (frozen | {"head": head}, {}, None)
  state = SimpleNamespace(params=start[0], frozen=start[1], step=jnp.zeros(()))
  first = SimpleNamespace(create=lambda: state, scale=start[2], abstract=state)
  learnt = jnp.outer(normal(4, 9), normal(5, 6)) + jnp.outer(normal(6, 9), normal(7, 6))
  now = weights.merged(*start)
  now["blocks"]["q"]["kernel"] += learnt[None]
  params, frozen = weights.split(now, adapter(8) | {"head": head}, frozen, 0.5)
  np.testing.assert_allclose(make_learnt_rank(first)(params, frozen, 0.5), by_decomposition(learnt), rtol=1e-4)
