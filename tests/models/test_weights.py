"""Merging adapters into plain weights, and splitting them off again."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_model
from flax.traverse_util import flatten_dict
from small_model import same_bits

from switchlora_jax.errors import UserError
from switchlora_jax.methods import METHODS
from switchlora_jax.models import weights
from switchlora_jax.training.phases import create_state

KINDS = ("down", "gate", "k", "o", "q", "up", "v")
FLOAT64 = dict(dtype="float64", param_dtype="float64")


# --- any tree -----------------------------------------------------------------------------------------------------


def normal(seed, *shape, dtype=np.float32):
  return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def some_trees(lead=(), dtype=np.float32):
  """(plain weights, params, frozen) of two adapted layers, with leading axes `lead`, and of layers without adapters."""
  draw = lambda seed, *shape: normal(seed, *lead, *shape, dtype=dtype)
  rest = {"embed": {"embedding": draw(0, 7, 6)}, "norm": {"scale": draw(1, 6)}, "head": {"kernel": draw(2, 6, 7)}}
  adapter = lambda seed, n, m: {"lora_a": draw(seed, 3, n), "lora_b": draw(seed + 1, 3, m)}
  sizes = {"q": (6, 6), "up": (6, 9)}
  plain = rest | {"blocks": {name: {"kernel": draw(3 + m, n, m)} for name, (n, m) in sizes.items()}}
  others = jax.tree.map(lambda x: x + 1, rest)
  params = others | {"blocks": {name: adapter(20 + m, n, m) for name, (n, m) in sizes.items()}}
  return plain, params, {"blocks": {name: {"kernel": draw(40 + m, n, m)} for name, (n, m) in sizes.items()}}


def largest_difference(a, b):
  return max(np.abs(np.asarray(x, np.float64) - y).max() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def round_trips(lead, dtype, tolerance):
  """Checks that merging undoes splitting, and that splitting undoes merging."""
  plain, params, frozen = some_trees(lead, dtype)
  params_of, base = weights.split(plain, params, frozen, 0.7)
  back = weights.merged(params_of, base, 0.7)
  assert jax.tree.structure(back) == jax.tree.structure(plain)
  assert largest_difference(back, plain) <= tolerance
  assert largest_difference(base, {"blocks": plain["blocks"]}) > 1, "the adapter was split off"

  params_again, frozen_again = weights.split(weights.merged(params, frozen, 0.7), params, frozen, 0.7)
  assert largest_difference(frozen_again, frozen) <= tolerance
  assert same_bits(params_again, params)


@pytest.mark.parametrize("lead", [(), (3,)], ids=["single", "stacked"])
def test_split_undoes_merged_and_merged_undoes_split_float64(lead, x64):
  round_trips(lead, np.float64, 1e-12)


@pytest.mark.parametrize("lead", [(), (3,)], ids=["single", "stacked"])
def test_split_undoes_merged_and_merged_undoes_split_float32(lead):
  """The product P is the same in both. W - P and its sum with P are rounded once each, and |W| + |P| ≤ 16."""
  round_trips(lead, np.float32, 2**-24 * 2 * 16)


@pytest.mark.parametrize(
  ("with_residual", "unit"), [(True, 2**-16), (False, 2**-8)], ids=["with residuals", "kernels alone"]
)
def test_bfloat16_kernels_are_split_and_merged_with_their_stored_precision(with_residual, unit):
  """The kernels have magnitudes up to 16, and the adapter is float32."""
  plain, params, frozen = some_trees((3,))
  kinds = {"kernel": jnp.bfloat16} | ({"kernel_tail": jnp.int8} if with_residual else {})
  like = {"blocks": {q: {n: jnp.zeros((), d) for n, d in kinds.items()} for q in frozen["blocks"]}}
  params_of, base = weights.split(plain, params, like, 0.7)
  assert jax.tree.map(lambda x: x.dtype, base) == jax.tree.map(lambda x: x.dtype, like)
  back = weights.merged(params_of, base, 0.7)
  assert {leaf.dtype for leaf in jax.tree.leaves(back)} == {np.dtype("float32")}
  assert unit / 4 < largest_difference(back, plain) <= unit * 16


@pytest.mark.parametrize("lead", [(), (3,)], ids=["single", "stacked"])
def test_merged_is_the_sum_of_the_paper(lead, x64):
  _, params, frozen = some_trees(lead, np.float64)
  plain = weights.merged(params, frozen, 0.7)
  for name, layer in params["blocks"].items():
    expected = frozen["blocks"][name]["kernel"] + 0.7 * np.einsum("...rn,...rm->...nm", *layer.values())
    np.testing.assert_allclose(plain["blocks"][name]["kernel"], expected, rtol=0, atol=1e-12)


def test_stacked_layers_are_merged_and_split_like_single_layers(x64):
  plain, params, frozen = some_trees((3,), np.float64)
  take = lambda index, *trees: (jax.tree.map(lambda x: x[index], tree) for tree in trees)
  together = (weights.merged(params, frozen, 0.7), *weights.split(plain, params, frozen, 0.7))
  for index in range(3):
    one_plain, one_params, one_frozen = take(index, plain, params, frozen)
    alone = (weights.merged(one_params, one_frozen, 0.7), *weights.split(one_plain, one_params, one_frozen, 0.7))
    assert largest_difference(tuple(take(index, *together)), alone) <= 1e-12


def test_leaves_without_an_adapter_are_copied_bitwise():
  plain, params, frozen = some_trees((3,))
  rest = lambda tree: [tree[name] for name in ("embed", "norm", "head")]
  assert same_bits(rest(weights.merged(params, frozen, 0.7)), rest(params))
  split, _ = weights.split(plain, params, frozen, 0.7)
  assert same_bits(rest(split), rest(plain)) and not same_bits(rest(split), rest(params))
  assert same_bits(split["blocks"], params["blocks"]), "the adapters are those passed in"


def test_plain_weights_without_adapters_do_not_change():
  plain, _, _ = some_trees()
  fresh = jax.tree.map(jnp.zeros_like, plain)
  assert same_bits(weights.merged(plain, {}, None), plain)
  params, frozen = weights.split(plain, fresh, {}, None)
  assert same_bits(params, plain) and frozen == {}


@pytest.mark.parametrize("adapted", [True, False], ids=["adapters", "full rank"])
def test_weights_of_another_architecture_are_refused(adapted):
  """Missing arrays would stay random, and unknown ones would be dropped."""
  plain, params, frozen = some_trees()
  into = (params, frozen, 0.7) if adapted else (plain, {}, None)
  renamed = plain | {"blocks": {{"up": "gate"}.get(name, name): layer for name, layer in plain["blocks"].items()}}
  for other, missing, unknown in (
    (renamed, "blocks/up/kernel", "blocks/gate/kernel"),
    (plain | {"bias": plain["head"]["kernel"]}, "none", "bias"),
    ({name: part for name, part in plain.items() if name != "norm"}, "norm/scale", "none"),
  ):
    with pytest.raises(UserError, match=f"missing: {missing}; not in the model: {unknown}; start from"):
      weights.split(other, *into)


# --- models -------------------------------------------------------------------------------------------------------


def shapes(config):
  """The abstract train state of a config."""
  optimizer = METHODS[config.method].build(config).optimizer
  return jax.eval_shape(lambda: create_state(small_model.model(config), optimizer, 0, 2))


def drawn(tree):
  """Random arrays for an abstract tree, with a standard deviation of 0.3."""
  leaves, structure = jax.tree.flatten(tree)
  return jax.tree.unflatten(structure, [0.3 * normal(i, *x.shape, dtype=x.dtype) for i, x in enumerate(leaves)])


@lru_cache
def model(method, **changes):
  """A config and its compiled (params, frozen, tokens) -> logits."""
  config = small_model.config(method, **changes)
  apply = small_model.model(config).apply
  return config, jax.jit(lambda params, frozen, tokens: apply({"params": params, "frozen": frozen}, tokens))


def models_agree(method, tolerance, **changes):
  """Checks that merged weights in the full-rank model, and split weights in the low-rank model, keep the logits."""
  (low, of_low), (full, of_full) = (model(name, **changes) for name in (method, "full"))
  scale, state, tokens = METHODS[method].build(low).scale, shapes(low), small_model.rows(low, 0)
  params, frozen, plain = map(drawn, (state.params, state.frozen, shapes(full).params))
  expected, near = of_low(params, frozen, tokens), dict(rtol=0, atol=tolerance)
  np.testing.assert_allclose(of_full(weights.merged(params, frozen, scale), {}, tokens), expected, **near)
  without_adapters = of_full(weights.merged(params, frozen, 0), {}, tokens)
  assert np.abs(without_adapters - expected).max() > 0.1, "the adapter changes the logits"
  split = weights.split(plain, params, frozen, scale)
  np.testing.assert_allclose(of_low(*split, tokens), of_full(plain, {}, tokens), **near)


@pytest.mark.parametrize("method", ["lora", "relora"])
def test_logits_are_those_of_the_plain_model_float64(method, x64):
  models_agree(method, 1e-12, **FLOAT64)


def test_logits_are_those_of_the_plain_model_float32():
  """Kernels of about 1 and logits are rounded by 2⁻²⁴. After two blocks of width 16 the error is below 2⁻¹⁶."""
  models_agree("switchlora", 2**-16)


@pytest.mark.parametrize(
  ("method", "frozen_dtype"), [(m, None) for m in METHODS] + [(m, "bfloat16") for m in ("lora", "switchlora", "relora")]
)
def test_the_plain_weights_of_every_method_have_the_shapes_and_dtypes_of_full(method, frozen_dtype):
  """So any run can be warm-started from any other."""
  low = small_model.config(method, frozen_dtype=frozen_dtype)
  merged = jax.eval_shape(
    lambda state: weights.merged(state.params, state.frozen, METHODS[method].build(low).scale), shapes(low)
  )
  plain = shapes(small_model.config("full")).params
  kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert kinds(merged) == kinds(plain)


def test_in_block_selects_the_seven_kernels_of_the_blocks():
  plain = drawn(shapes(small_model.config("full", model__vocab_size=40)).params)
  inside = {path for path in flatten_dict(plain) if weights.in_block(path)}
  assert inside == {("blocks", name, "kernel") for name in KINDS}
