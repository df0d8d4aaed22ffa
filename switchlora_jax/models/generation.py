"""Text generation with a cache of keys and values: each token passes through the model once."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from switchlora_jax.errors import UserError


class Sampling(NamedTuple):
  """How the next token is sampled from the logits.

  Attributes:
    temperature: divisor of the logits; 0: greedy decoding.
    top_k: sample from this number of likeliest tokens; 0: all.
    top_p: of these, sample from the smallest set of likeliest tokens with at least this total probability; 1: all.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0

  def check(self) -> None:
    """Raise `UserError` if a number is out of range."""
    if not (self.temperature == 0 or 1e-6 <= self.temperature < float("inf")):
      raise UserError(
        f"temperature (={self.temperature:g}) must be 0, for the likeliest token, or at least 1e-6; try 0.7"
      )
    if self.top_k < 0:
      raise UserError(f"top_k (={self.top_k}) must be a number of tokens; try 40, or 0 for all")
    if not 0 < self.top_p <= 1:
      raise UserError(f"top_p (={self.top_p:g}) must be a probability above 0; try 0.9, or 1 for all tokens")


def truncated(logits, top_k: int, top_p: float):
  """Set the logits [pieces] that `top_k` and `top_p` exclude to -inf; of equal logits, the first ranks higher.

  The likeliest token always remains. `top_p` includes the token with which its probability is reached.
  """
  ranked, tokens = jax.lax.top_k(logits, min(top_k or len(logits), len(logits)))
  if top_p < 1:
    probability = jax.nn.softmax(ranked)
    before = jnp.cumsum(probability) - probability
    ranked = jnp.where(before < top_p, ranked, -jnp.inf)
  return jnp.full_like(logits, -jnp.inf).at[tokens].set(ranked)


def draw(logits, key, sampling: Sampling):
  """Sample a token, [] int32, from logits [pieces]."""
  if sampling.temperature == 0:
    return jnp.argmax(logits)
  return jax.random.categorical(key, truncated(logits / sampling.temperature, sampling.top_k, sampling.top_p))


@partial(jax.jit, static_argnames=("model", "pieces", "sampling"), donate_argnames="cache")
def advance(model, variables, cache, tokens, seed, position, *, pieces: int, sampling: Sampling):
  """Append `tokens` [1, n] to the cache, and sample the next token.

  Args:
    cache: {} or the cache of the previous call, which is donated.
    seed: the data of a random key.
    position: the position of the next token; it is folded into the key.
  Returns:
    The token, [] int32, and the cache.
  """
  logits, cache = model.apply({**variables, **cache}, tokens, mutable="cache")
  key = jax.random.fold_in(jax.random.wrap_key_data(seed), position)
  return draw(logits[0, -1, :pieces].astype(jnp.float32), key, sampling), cache


def generate(model, variables, prompt, *, new_tokens: int, pieces: int, sampling: Sampling, seed: int, end: int):
  """Continue a prompt, token by token.

  It compiles `advance` twice, for the prompt and for one token. On several processes, all must call it and get the
  same ids.

  Args:
    model: a LLaMA, with or without adapters.
    variables: its {"params", "frozen"}, with any sharding.
    prompt: a list of token ids, at least one.
    new_tokens: largest number of tokens to generate.
    pieces: number of tokens of the tokenizer; ids from there up to the model's vocabulary size are never sampled.
    end: the id at which generation stops.
  Yields:
    The new token ids, without `end`.
  """
  model = model.clone(cache_length=len(prompt) + new_tokens, remat="none")
  # The seed and the tokens are on the host, because the parameters may be on several devices or processes.
  seed = np.asarray(jax.random.key_data(jax.random.key(seed)))
  tokens, cache = prompt, {}
  for position in range(len(prompt), len(prompt) + new_tokens):
    row = np.array([tokens], np.int32)
    token, cache = advance(model, variables, cache, row, seed, position, pieces=pieces, sampling=sampling)
    if int(token) == end:
      return
    yield int(token)
    tokens = [int(token)]


def stream_text(tokenizer, tokens: Iterable[int]) -> Iterator[str]:
  """Yield the text of tokens in parts; a character that takes several tokens is in the part of the last one."""
  known, shown = [], ""
  for token in tokens:
    known.append(token)
    # Decode from the start, because a piece may begin with a space or not, depending on the pieces before it.
    text = tokenizer.decode(known).rstrip("\N{REPLACEMENT CHARACTER}")  # the decoding of an incomplete character
    yield text[len(shown) :]
    shown = max(shown, text, key=len)
  yield tokenizer.decode(known)[len(shown) :]
