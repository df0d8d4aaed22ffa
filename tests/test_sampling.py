"""A sample continues its prompt as the model would have it."""

import jax
import jax.numpy as jnp
from tiny import resolved

from switchlora_jax.program import build
from switchlora_jax.sampling import sample
from switchlora_jax.sharding import make_mesh


def test_a_cold_sample_takes_the_likeliest_token_each_time(tmp_path):
  program = build(resolved(tmp_path), make_mesh())
  state = program.create()
  arguments = dict(new_tokens=5, pieces=320, temperature=1e-6, seed=0)
  tokens = sample(program.model, state.params, state.frozen, [5, 6, 7], **arguments)
  assert tokens[:3] == [5, 6, 7] and len(tokens) == 8
  for position in range(3, 8):
    row = jnp.array([tokens[:position]])
    logits = program.model.apply({"params": state.params, "frozen": state.frozen}, row)
    assert tokens[position] == int(jnp.argmax(logits[0, -1]))


def test_a_warm_sample_follows_the_seed(tmp_path):
  program = build(resolved(tmp_path), make_mesh())
  state = jax.tree.map(lambda x: x, program.create())
  draw = lambda seed: sample(
    program.model, state.params, state.frozen, [5], new_tokens=20, pieces=300, temperature=1.0, seed=seed
  )
  assert draw(1) == draw(1) != draw(2)
  assert max(draw(1)) < 300 and max(draw(2)) < 300
