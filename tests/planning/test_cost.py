"""Costs of a step: operations compared with formulas, memory with the sizes of the arrays."""

import jax
import jax.numpy as jnp
import pytest
from tiny import resolved

from switchlora_jax.parallel.sharding import make_mesh
from switchlora_jax.planning import cost
from switchlora_jax.training.phases import build_phase


def test_a_product_counts_once_per_loop_iteration_and_call():
  x, w = jnp.ones((5, 7)), jnp.ones((7, 7))

  def body(x, _):
    return jax.jit(jnp.matmul)(x, w), None

  assert cost.operations(lambda x: jax.lax.scan(body, x, None, length=4)[0], x) == 4 * 2 * 5 * 7 * 7
  assert cost.operations(lambda x: jax.lax.cond(True, lambda: x @ w, lambda: x), x) == 2 * 5 * 7 * 7
  assert cost.operations(lambda x: x + 1, x) == 0


def test_operations_of_full_rank_and_lora_match_the_formulas(tmp_path):
  """Per token: full rank 6P, merged 4P + 4p, in the adapted layers; merging itself 2 × 2·r·in·out per step."""
  shape = dict(model__hidden_size=64, model__intermediate_size=96, rank=8, model__vocab_size=320, seq_len=32)
  mesh = make_mesh()
  count = {}
  for method in ("full", "lora"):
    config = resolved(tmp_path, method=method, **shape)
    phase = build_phase(config, mesh)
    rows = jax.ShapeDtypeStruct((config.batch_size // 8, config.seq_len), jnp.int32)
    state = phase.abstract

    def loss(params, frozen, rows, phase=phase):
      logits = phase.model.apply({"params": params, "frozen": frozen}, rows)
      return logits.sum()

    count[method] = cost.operations(jax.grad(loss), state.params, state.frozen, rows)
  tokens, kernels, factors = 32, 2 * (4 * 64 * 64 + 3 * 64 * 96), 2 * 8 * (4 * 128 + 3 * 160)
  assert count["full"] - count["lora"] == tokens * (2 * kernels - 4 * factors) - 2 * 2 * 8 * kernels


def test_memory_of_a_function_with_a_donated_argument():
  """The argument has 40,000 bytes; the outputs have 40,004, of which 40,000 use the buffer of the argument."""
  compiled = jax.jit(lambda x: (x * 2, jnp.float32(1)), donate_argnums=0).lower(jnp.ones((1000, 10))).compile()
  memory = cost.memory(compiled)
  assert memory["arguments"] == memory["shared"] == 40_000
  assert memory["outputs"] == pytest.approx(40_004, abs=64)
  assert memory["peak"] == pytest.approx(40_004, abs=64)
