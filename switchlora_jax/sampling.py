"""A short text from the model, to look at."""

import jax
import jax.numpy as jnp


def sample(model, params, frozen, prompt, *, new_tokens: int, temperature: float, seed: int) -> list[int]:
  """Continue `prompt`, a list of token ids, by `new_tokens` drawn ids; returns prompt and continuation.

  Each token runs the model over the whole, padded row (the causal mask hides the padding): fit for
  a sample at the end of a run, not for serving.
  """
  length = len(prompt) + new_tokens

  def draw(position, row):
    logits = model.apply({"params": params, "frozen": frozen}, row[None])[0, position - 1]
    key = jax.random.fold_in(jax.random.key(seed), position)
    return row.at[position].set(jax.random.categorical(key, logits.astype(jnp.float32) / temperature))

  row = jnp.zeros(length, jnp.int32).at[: len(prompt)].set(jnp.array(prompt, jnp.int32))
  row = jax.jit(lambda row: jax.lax.fori_loop(len(prompt), length, draw, row))(row)
  return [int(token) for token in row]
