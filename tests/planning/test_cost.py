"""Costs are counted, not guessed: operations against arithmetic, memory against the compiler's own figures."""

import jax
import jax.numpy as jnp
import pytest
from tiny import resolved

from switchlora_jax.parallel.sharding import make_mesh
from switchlora_jax.planning import cost
from switchlora_jax.training.phases import build_phase


def test_a_product_in_loops_and_calls_counts_every_time():
  x, w = jnp.ones((5, 7)), jnp.ones((7, 7))

  def body(x, _):
    return jax.jit(jnp.matmul)(x, w), None

  assert cost.operations(lambda x: jax.lax.scan(body, x, None, length=4)[0], x) == 4 * 2 * 5 * 7 * 7
  assert cost.operations(lambda x: jax.lax.cond(True, lambda: x @ w, lambda: x), x) == 2 * 5 * 7 * 7
  assert cost.operations(lambda x: x + 1, x) == 0


def test_methods_cost_what_the_layer_promises(tmp_path):
  """Per token: full rank 6P, merged 4P + 4p, in the adapted layers; merging itself 2 × 2·r·in·out a step."""
  shape = dict(model__hidden_size=64, model__intermediate_size=96, rank=8, model__vocab_size=320, seq_len=32)
  mesh = make_mesh()
  count = {}
  for method in ("full", "lora"):
    config = resolved(tmp_path, method=method, **shape)
    program = build_phase(config, mesh)
    rows = jax.ShapeDtypeStruct((config.batch_size // 8, config.seq_len), jnp.int32)
    state = program.abstract

    def loss(params, frozen, rows, program=program):
      logits = program.model.apply({"params": params, "frozen": frozen}, rows)
      return logits.sum()

    count[method] = cost.operations(jax.grad(loss), state.params, state.frozen, rows)
  tokens, weights, sides = 32, 2 * (4 * 64 * 64 + 3 * 64 * 96), 2 * 8 * (4 * 128 + 3 * 160)
  assert count["full"] - count["lora"] == tokens * (2 * weights - 4 * sides) - 2 * 2 * 8 * weights


def test_memory_adds_up():
  """40,000 bytes come in and 40,004 go out, of which 40,000 take the place of what came in."""
  compiled = jax.jit(lambda x: (x * 2, jnp.float32(1)), donate_argnums=0).lower(jnp.ones((1000, 10))).compile()
  memory = cost.memory(compiled)
  assert memory["arguments"] == memory["shared"] == 40_000
  assert memory["outputs"] == pytest.approx(40_004, abs=64)
  assert memory["peak"] == pytest.approx(40_004, abs=64)
