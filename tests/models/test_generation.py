"""Generation: with and without a cache, draws from the truncated distribution, and streamed text."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import small_model
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from tiny import write_text

from switchlora_jax.data.tokenizer import train_tokenizer
from switchlora_jax.errors import UserError
from switchlora_jax.lowrank.layers import LoRADense, adapter_scale
from switchlora_jax.models import make_model, weights
from switchlora_jax.models.generation import Sampling, advance, draw, generate, stream_text, truncated
from switchlora_jax.parallel.sharding import Placement

GREEDY = Sampling(temperature=0)
SIZES = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2)

# --- the model ----------------------------------------------------------------------------------------------------


def llama(dense=None):
  """A small model and its variables, drawn large enough that tokens affect each other's logits."""
  model = make_model(SIZES, dense)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
  draws = np.random.default_rng(0)
  return model, jax.tree.map(lambda x: draws.standard_normal(x.shape).astype(np.float32), shapes)


PLAIN, ADAPTED = llama(), llama(partial(LoRADense, rank=4))
SEVEN = [9, 3, 61, 7, 7, 20, 1]


def continued(model, variables, prompt, **changes):
  """The tokens of `generate`, as a list."""
  options = dict(new_tokens=20, pieces=64, sampling=GREEDY, seed=0, end=-1)
  return list(generate(model, variables, prompt, **options | changes))


def without_cache(model, variables, prompt, new_tokens=20):
  """The most likely tokens, each from a forward pass over the full row."""
  row = np.array([prompt + [0] * new_tokens])
  run = jax.jit(model.apply)
  for position in range(len(prompt), row.size):
    row[0, position] = np.argmax(np.asarray(run(variables, row))[0, position - 1])
  return row[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
  ("made", "prompt"), [(PLAIN, [5]), (ADAPTED, SEVEN)], ids=["plain, one token", "adapters, seven"]
)
def test_the_cache_does_not_change_the_tokens(made, prompt):
  found = continued(*made, prompt)
  assert found == without_cache(*made, prompt)
  assert len(set(found)) > 5, "the tokens vary"


FULL_ROW = jax.jit(PLAIN[0].apply)
CACHED = jax.jit(partial(PLAIN[0].clone(cache_length=15).apply, mutable="cache"))


@pytest.mark.parametrize("parts", [[12], [1] * 12, [3, 1, 5, 2, 1], [11, 1]], ids=str)
def test_a_row_in_parts_has_the_logits_of_the_full_row(parts):
  _, variables = PLAIN
  row = np.random.default_rng(1).integers(0, 64, (1, 12))
  expected, cache, found = np.asarray(FULL_ROW(variables, row)), {}, []
  for part in np.split(row, np.cumsum(parts)[:-1], axis=1):
    logits, cache = CACHED({**variables, **cache}, part)
    found.append(logits)
  np.testing.assert_allclose(np.concatenate(found, 1), expected, atol=1e-5 * np.abs(expected).max())
  assert np.std(expected) > 1


def test_adapters_generate_the_same_tokens_as_merged_weights():
  _, variables = ADAPTED
  merged = jax.jit(weights.merged, static_argnums=2)(variables["params"], variables["frozen"], adapter_scale(4))
  assert continued(PLAIN[0], {"params": merged}, SEVEN) == continued(*ADAPTED, SEVEN) != continued(*PLAIN, SEVEN)


@pytest.mark.slow
def test_sharded_arrays_generate_the_same_tokens():
  model, variables = ADAPTED
  placement = Placement(small_model.mesh(4, 2), trained=True, frozen=True)
  specs = {
    "params": placement.specs(variables["params"], "trained"),
    "frozen": placement.specs(variables["frozen"], "frozen"),
  }
  placed = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(placement.mesh, spec)), variables, specs)
  assert any(not x.is_fully_replicated for x in jax.tree.leaves(placed))
  assert continued(model, placed, SEVEN) == continued(*ADAPTED, SEVEN)


def test_two_functions_are_compiled_for_any_number_of_tokens():
  before = advance._cache_size()
  continued(*PLAIN, [1, 2, 3, 4], new_tokens=13)
  assert advance._cache_size() == before + 2
  continued(*PLAIN, [4, 3, 2, 1], new_tokens=13, seed=5)
  assert advance._cache_size() == before + 2


def test_generation_stops_before_the_end_token():
  tokens = continued(*PLAIN, [5])
  end = tokens[7]
  assert continued(*PLAIN, [5], end=end) == tokens[: tokens.index(end)]
  assert continued(*PLAIN, [5], new_tokens=3) == tokens[:3]
  assert continued(*PLAIN, [5], new_tokens=0) == []


def test_draws_depend_on_the_seed_and_stay_within_the_pieces_of_the_tokenizer():
  sample = lambda seed: continued(*PLAIN, [5], sampling=Sampling(2.0), pieces=30, seed=seed)
  assert sample(1) == sample(1) != sample(2)
  assert max(sample(1) + sample(2)) < 30 <= max(continued(*PLAIN, [5], sampling=Sampling(2.0)))


# --- draws --------------------------------------------------------------------------------------------------------


def softmax(logits):
  powers = np.exp(logits - np.max(logits))
  return powers / powers.sum()


def reference(logits, top_k, top_p):
  """The truncated probabilities in float64, and the smallest distance of a cumulative probability from `top_p`."""
  ranked = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[: top_k or None]
  masses = np.cumsum(softmax(logits[ranked]))
  count = int(np.searchsorted(masses[:-1], top_p)) + 1 if top_p < 1 else len(ranked)
  found = np.zeros(len(logits))
  found[ranked[:count]] = softmax(logits[ranked[:count]])
  return found, np.min(np.abs(masses[:-1] - top_p), initial=1.0) if top_p < 1 else 1.0


@settings(max_examples=60, deadline=None)
@given(
  st.lists(st.integers(-12, 12), min_size=9, max_size=9),
  st.sampled_from((0, 1, 4, 9, 12)),  # each is compiled
  st.one_of(st.just(1.0), st.floats(1e-3, 0.999)),
)
def test_truncation_is_that_of_the_reference(halves, top_k, top_p):
  """Many logits are equal, so that the order of ties matters."""
  logits = np.array(halves) / 2
  expected, nearest = reference(logits, top_k, top_p)
  assume(nearest > 1e-5)  # else rounding may decide which tokens are kept
  found = softmax(np.asarray(truncated(jnp.asarray(logits, jnp.float32), top_k, top_p), np.float64))
  np.testing.assert_array_equal(found > 0, expected > 0)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_most_likely_token_is_always_kept():
  logits = jnp.array([0.0, 3.0, 1.0])
  for options in ((1, 1.0), (0, 1e-6), (1, 1e-6)):
    assert np.isfinite(truncated(logits, *options)).tolist() == [False, True, False]
  assert np.isfinite(truncated(logits, 0, 1.0)).all() and np.isfinite(truncated(logits, 2, 1.0)).sum() == 2


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.5), Sampling(2.0, 4), Sampling(1.5, 0, 0.8)], ids=str)
def test_frequencies_of_draws_match_the_probabilities(sampling):
  logits, count = np.array([0.5, 2.0, -1.0, 1.5, 0.0, 1.9], np.float32), 20_000
  keys = jax.random.split(jax.random.key(0), count)
  tokens = np.asarray(jax.jit(jax.vmap(lambda key: draw(jnp.asarray(logits), key, sampling)))(keys))
  expected, _ = reference(logits.astype(np.float64) / sampling.temperature, sampling.top_k, sampling.top_p)
  found = np.bincount(tokens, minlength=6) / count
  np.testing.assert_allclose(found, expected, atol=5 * 0.5 / count**0.5)
  assert not found[expected == 0].any()


@pytest.mark.parametrize(
  ("sampling", "sentence"),
  [
    (Sampling(-1), r"temperature \(=-1\) must be 0, .* or at least 1e-6; try 0.7"),
    (Sampling(1e-9), r"temperature \(=1e-09\)"),
    (Sampling(float("nan")), r"temperature \(=nan\)"),
    (Sampling(float("inf")), r"temperature \(=inf\)"),
    (Sampling(top_k=-3), r"top_k \(=-3\) must be a number of tokens; try 40"),
    (Sampling(top_p=0), r"top_p \(=0\) must be a probability above 0"),
    (Sampling(top_p=1.5), r"top_p \(=1.5\)"),
    (Sampling(top_p=float("nan")), r"top_p \(=nan\)"),
  ],
)
def test_invalid_sampling_raises(sampling, sentence):
  with pytest.raises(UserError, match=sentence):
    sampling.check()


def test_valid_sampling_is_accepted():
  for sampling in (Sampling(), GREEDY, Sampling(1e-6, 10**6, 1e-9)):
    sampling.check()


# --- text ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  """A tokenizer of 300 pieces with byte fallback."""
  folder = tmp_path_factory.mktemp("tokenizer")
  train_tokenizer([Path(write_text(folder)).read_text()], 300, folder / "some.model")
  return sentencepiece.SentencePieceProcessor(model_file=str(folder / "some.model"))


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_text_is_streamed_in_complete_characters(tokenizer, text):
  tokens = tokenizer.encode(text)
  assume(tokenizer.decode(tokens) == text)  # false for a few characters that SentencePiece uses itself
  parts = list(stream_text(tokenizer, tokens))
  assert "".join(parts) == text
  assert ("\ufffd" in text) or all("\ufffd" not in part for part in parts)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 299), max_size=30))
def test_any_tokens_are_streamed_as_their_decoded_text(tokenizer, tokens):
  """Also for bytes that are not valid UTF-8."""
  assert "".join(stream_text(tokenizer, tokens)) == tokenizer.decode(tokens)


def test_text_is_streamed_as_soon_as_its_tokens(tokenizer):
  tokens = tokenizer.encode("the model é!")
  seen = []

  def observed():
    for token in tokens:
      seen.append("".join(parts))
      yield token

  parts = []
  for part in stream_text(tokenizer, observed()):
    parts.append(part)
  assert seen == [tokenizer.decode(tokens[:count]).rstrip("\ufffd") for count in range(len(tokens))]
