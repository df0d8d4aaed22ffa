"""A short text from the model, to look at."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from switchlora_jax.sharding import replicated


def sample(model, params, frozen, prompt, *, new_tokens: int, pieces: int, temperature: float, seed: int) -> list[int]:
  """Continue `prompt`, a list of token ids, by `new_tokens` drawn ids; returns prompt and continuation.

  Only the first `pieces` ids are drawn, those that the tokenizer has: the model's vocabulary may be larger.

  Each token runs the model over the whole, padded row (the causal mask hides the padding): fit for
  a sample at the end of a run, not for serving. Every process must call it, and gets the same ids.
  """
  length = len(prompt) + new_tokens

  everywhere = replicated(jax.tree.leaves(params)[0].sharding.mesh)

  @partial(jax.jit, out_shardings=everywhere)
  def generate(params, frozen, row):
    def draw(position, row):
      logits = model.apply({"params": params, "frozen": frozen}, row[None])[0, position - 1, :pieces]
      key = jax.random.fold_in(jax.random.key(seed), position)
      token = jax.random.categorical(key, logits.astype(jnp.float32) / temperature)
      return row.at[position].set(token.astype(row.dtype))

    return jax.lax.fori_loop(len(prompt), length, draw, row)

  row = np.zeros(length, np.int32)  # of the host: it joins parameters that may lie on several processes
  row[: len(prompt)] = prompt
  return np.asarray(generate(params, frozen, row)).tolist()
