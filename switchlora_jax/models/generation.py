"""Text from a model, token by token: keys and values of the past are kept, and each token runs through it once."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from switchlora_jax.errors import UserError


class Sampling(NamedTuple):
  """How a token is chosen by the model's logits.

  Attributes:
    temperature: by which logits are divided; 0: always the likeliest token.
    top_k: the number of likeliest tokens that are drawn from; 0: all.
    top_p: of these, the likeliest that together have this probability are drawn from; 1: all.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0

  def check(self) -> None:
    """Raise `UserError` where a number makes no sense."""
    if not (self.temperature == 0 or 1e-6 <= self.temperature < float("inf")):
      raise UserError(
        f"temperature (={self.temperature:g}) must be 0, for the likeliest token, or a number from 1e-6 on; try 0.7"
      )
    if self.top_k < 0:
      raise UserError(f"top_k (={self.top_k}) must be a number of tokens; try 40, or 0 for all")
    if not 0 < self.top_p <= 1:
      raise UserError(f"top_p (={self.top_p:g}) must be a probability above 0; try 0.9, or 1 for all tokens")


def truncated(logits, top_k: int, top_p: float):
  """Logits [pieces] with -inf for what `top_k` and `top_p` leave out; of equal ones the first come first.

  Both keep the likeliest token; `top_p` keeps the one with which the probability is reached.
  """
  ranked, tokens = jax.lax.top_k(logits, min(top_k or len(logits), len(logits)))
  if top_p < 1:
    probability = jax.nn.softmax(ranked)
    before = jnp.cumsum(probability) - probability
    ranked = jnp.where(before < top_p, ranked, -jnp.inf)
  return jnp.full_like(logits, -jnp.inf).at[tokens].set(ranked)


def draw(logits, key, sampling: Sampling):
  """A token, [] int32, by its logits [pieces]."""
  if sampling.temperature == 0:
    return jnp.argmax(logits)
  return jax.random.categorical(key, truncated(logits / sampling.temperature, sampling.top_k, sampling.top_p))


@partial(jax.jit, static_argnames=("model", "pieces", "sampling"), donate_argnames="cache")
def advance(model, variables, cache, tokens, seed, position, *, pieces: int, sampling: Sampling):
  """Run `tokens` [1, n] behind those in the cache, and draw the one at `position`, which follows them.

  Args:
    cache: {} or what the last call returned; `seed`: the data of a random key.
  Returns:
    the token, [] int32, and the cache.
  """
  logits, cache = model.apply({**variables, **cache}, tokens, mutable="cache")
  key = jax.random.fold_in(jax.random.wrap_key_data(seed), position)
  return draw(logits[0, -1, :pieces].astype(jnp.float32), key, sampling), cache


def generate(model, variables, prompt, *, new_tokens: int, pieces: int, sampling: Sampling, seed: int, end: int):
  """Continue `prompt`, a list of token ids, at least one; yields at most `new_tokens` ids, those before `end`.

  Two programs are compiled, one for the prompt and one for a token. Every process must call it, and gets the same ids.

  Args:
    model: a LLaMA, with adapters or without; variables: its {"params", "frozen"}, wherever they lie.
    pieces: only ids below it are drawn: the tokenizer's; the model's vocabulary may be larger.
  """
  model = model.clone(cache_length=len(prompt) + new_tokens, remat="none")
  # On the host, as the tokens are: the parameters may lie on several devices or processes.
  seed = np.asarray(jax.random.key_data(jax.random.key(seed)))
  tokens, cache = prompt, {}
  for position in range(len(prompt), len(prompt) + new_tokens):
    row = np.array([tokens], np.int32)
    token, cache = advance(model, variables, cache, row, seed, position, pieces=pieces, sampling=sampling)
    if int(token) == end:
      return
    yield int(token)
    tokens = [int(token)]


def text_as_it_comes(tokenizer, tokens: Iterable[int]) -> Iterator[str]:
  """Parts that together are the text of all tokens; a character that takes several comes with its last."""
  known, shown = [], ""
  for token in tokens:
    known.append(token)
    # Decoded from the start: whether a piece begins with a space depends on what is before it.
    text = tokenizer.decode(known).rstrip("\N{REPLACEMENT CHARACTER}")  # which stands for the bytes of half a character
    yield text[len(shown) :]
    shown = max(shown, text, key=len)
  yield tokenizer.decode(known)[len(shown) :]
