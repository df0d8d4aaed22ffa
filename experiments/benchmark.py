"""Time whole training steps of each method against full rank, in one run, in turns; medians and ratios.

python -m experiments.benchmark                      # the 350M shape cut to 2 layers, both vocabularies
python -m experiments.benchmark --memory             # what switching adds to the memory of the 24-layer step
python -m experiments.benchmark --json=out.json
"""

import json
import statistics
import time
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from configs import llama_350m
from experiments import cli
from switchlora_jax import cost, topology, trainer
from switchlora_jax.config import resolve
from switchlora_jax.dense import LoRADense
from switchlora_jax.errors import UserError
from switchlora_jax.methods import METHODS
from switchlora_jax.methods.switchlora import schedule
from switchlora_jax.metrics import progress_bar
from switchlora_jax.sharding import by_rows, make_mesh
from switchlora_jax.switching import draw_uniforms, switch

LAYERS = flags.DEFINE_integer("layers", 2, "transformer blocks of the 350M shape", lower_bound=1)
VOCABULARIES = flags.DEFINE_list("vocabularies", ["2048", "32100"], "vocabulary sizes, one table each")
RANKS = flags.DEFINE_list("ranks", ["128", "256"], "LoRA ranks")
TOKENS = flags.DEFINE_string("tokens", "4x512", "rows × tokens of a step")
REPEATS = flags.DEFINE_integer("repeats", 5, "timed steps of each program", lower_bound=1)
MEMORY = flags.DEFINE_bool("memory", False, "compile only, and print the memory of the step with and without switching")
JSON = flags.DEFINE_string("json", None, "write the results to this file as well")


class TwoProductDense(LoRADense):
  """The usual LoRA layer, x·W + s·(x·Aᵀ)·B: what `merged_dense` is measured against."""

  @nn.compact
  def __call__(self, x):
    """x [..., in] to [..., features]."""
    if self.is_initializing():
      return super().__call__(x)
    lora_a, lora_b = self.get_variable("params", "lora_a"), self.get_variable("params", "lora_b")
    return x @ self.get_variable("frozen", "kernel") + self.scale * ((x @ lora_a.T) @ lora_b)


def batch_shape() -> tuple[int, int]:
  """(rows, tokens a row) of --tokens."""
  try:
    rows, length = (int(number) for number in TOKENS.value.split("x"))
    return rows, length
  except ValueError:
    raise UserError(f"--tokens (={TOKENS.value!r}) must be ROWSxLENGTH; pass --tokens=4x512") from None


def configure(method: str, rank: int, vocabulary: int):
  """The 350M config without accumulation, cut as the flags say; resolved."""
  config = ConfigDict(llama_350m.get_config())
  config.method, config.rank, config.accumulation = method, rank, 1
  config.batch_size, config.seq_len = batch_shape()
  config.model.num_layers, config.model.vocab_size = LAYERS.value, vocabulary
  return resolve(config, devices=1)


def candidates(vocabulary: int, mesh) -> dict:
  """The programs to compare: {(method, rank): (config, Program)}; full rank is the first."""
  programs = {("full", 0): "full"} | {(m, int(r)): m for r in RANKS.value for m in ("switchlora", "two products")}
  for (name, rank), _ in programs.items():
    config = configure("lora" if name == "two products" else name, rank or 1, vocabulary)
    method = METHODS[config.method].build(config)
    if name == "two products":
      method = method._replace(dense=partial(TwoProductDense, **method.dense.keywords))
    programs[name, rank] = (config, trainer.assemble(config, method, mesh))
  return programs


def time_in_turns(calls: dict, what: str) -> dict:
  """{name: seconds of each timed call}; each call once untimed, then all of them in turns."""
  seconds = {name: [] for name in calls}
  with progress_bar((REPEATS.value + 1) * len(calls), what=what) as bar:
    for repeat in range(REPEATS.value + 1):
      for name, call in calls.items():
        start = time.perf_counter()
        jax.block_until_ready(call())
        if repeat:
          seconds[name].append(time.perf_counter() - start)
        bar.update()
  return seconds


def stepper(program, rows):
  """A call that runs one more training step; its state starts from step 0, where switching is busiest."""
  state = program.create()

  def call():
    nonlocal state
    state, numbers = program.step(state, program.place(rows))
    return numbers

  return call


def switcher(config, program, step: int):
  """A call that runs the switching of one step by itself, at `step` of the schedule."""
  state, plan = program.create(), schedule(config)
  scale = program.model.dense(features=1).scale

  def move(params, frozen, candidates, key):
    uniforms = draw_uniforms(key, candidates)
    return switch(params, frozen, candidates, schedule=plan, scale=scale, step=step, uniforms=uniforms)[:3]

  jitted, held, turn = jax.jit(move, donate_argnums=(0, 1, 2)), (state.params, state.frozen, state.candidates), 0

  def call():
    nonlocal held, turn
    turn += 1
    held = jitted(*held, jax.random.key(turn))
    return held

  return call


def benchmark(vocabulary: int) -> list[dict]:
  """One row a program: seconds of its step (median), ratios to full rank of time and of operations."""
  mesh = make_mesh()
  programs = candidates(vocabulary, mesh)
  rows = np.random.default_rng(0).integers(0, vocabulary, batch_shape(), np.int32)
  with jax.set_mesh(mesh):
    calls = {name: stepper(program, rows) for name, (_, program) in programs.items()}
    for (name, rank), (config, program) in programs.items():
      if name == "switchlora":
        calls["switching alone, first steps", rank] = switcher(config, program, 0)
        calls["switching alone, last steps", rank] = switcher(config, program, config.steps)
    seconds = time_in_turns(calls, f"vocabulary {vocabulary}")
    tokens = jax.ShapeDtypeStruct(rows.shape, jnp.int32)
    work = {name: cost.operations(program.step, program.abstract, tokens) for name, (_, program) in programs.items()}
  full = "full", 0
  return [
    {
      "vocabulary": vocabulary,
      "program": name[0],
      "rank": name[1],
      "seconds": statistics.median(times),
      "time_ratio": statistics.median(a / b for a, b in zip(times, seconds[full], strict=True)),
      "operations_ratio": work[name] / work[full] if name in work else None,
    }
    for name, times in seconds.items()
  ]


def memory() -> list[dict]:
  """One row a program: bytes of the compiled step, for full rank, without switching (lora) and with it."""
  mesh, compiler = topology.gpu_mesh("h100") or (make_mesh(), "CPU")
  results = []
  for method in ("full", "lora", "switchlora"):
    for rank in map(int, RANKS.value if method != "full" else "0"):
      config = configure(method, rank or 1, int(VOCABULARIES.value[0]))
      program = trainer.build(config, mesh)
      tokens = jax.ShapeDtypeStruct(batch_shape(), jnp.int32, sharding=by_rows(mesh))
      compiled = program.step.lower(program.abstract, tokens).compile()
      results.append({"program": method, "rank": rank, "compiler": compiler} | cost.memory(compiled))
  return results


def table(rows: list[dict]) -> str:
  """Rows as an aligned text table."""
  shown = [list(rows[0])] + [[_cell(key, value) for key, value in row.items()] for row in rows]
  widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
  return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in shown)


def _cell(key: str, value) -> str:
  if key in ("arguments", "outputs", "shared", "temporaries", "peak"):
    return f"{value / 2**20:,.1f} MiB"
  return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def main():
  """Measure, print, write."""
  results = memory() if MEMORY.value else [row for v in VOCABULARIES.value for row in benchmark(int(v))]
  print(f"{LAYERS.value} layers, {TOKENS.value} tokens, float32, {jax.device_count()} × {jax.devices()[0].device_kind}")
  print(table(results))
  if JSON.value:
    Path(JSON.value).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
  cli.run(main)
