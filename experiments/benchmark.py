"""Time whole training steps of each method against full rank, in one run, in turns; medians and ratios.

python -m experiments.benchmark                      # the 350M shape cut to 2 layers, both vocabularies
python -m experiments.benchmark --memory --layers=24 # what switching adds to the memory of a step; on the GPU
                                                     # compiler if it is installed, see switchlora_jax/topology.py
python -m experiments.benchmark --json=out.json
"""

import json
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from configs import llama_350m
from experiments import cli
from switchlora_jax import cost, topology
from switchlora_jax.config import resolve
from switchlora_jax.dense import LoRADense
from switchlora_jax.methods import METHODS, lora
from switchlora_jax.methods.base import Method
from switchlora_jax.metrics import progress_bar
from switchlora_jax.program import Program, assemble
from switchlora_jax.sharding import by_rows, make_mesh

LAYERS = flags.DEFINE_integer("layers", 2, "transformer blocks of the 350M shape", lower_bound=1)
ROWS = flags.DEFINE_integer("rows", 4, "rows of a step", lower_bound=1)
LENGTH = flags.DEFINE_integer("length", 512, "tokens of a row", lower_bound=2)
VOCABULARIES = flags.DEFINE_multi_integer("vocabulary", [2048, 32100], "vocabulary size; repeat for one table each")
RANKS = flags.DEFINE_multi_integer("rank", [128, 256], "LoRA rank; repeat for several", lower_bound=2)
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


class Case(NamedTuple):
  """A program to measure."""

  config: Any
  method: Method
  program: Program


def make_case(name: str, rank: int, vocabulary: int, mesh) -> Case:
  """A method, or LoRA with `two products`, on the 350M shape cut as the flags say, without accumulation."""
  config = ConfigDict(llama_350m.get_config())
  config.method, config.rank, config.accumulation = name if name in METHODS else "lora", rank or 1, 1
  config.batch_size, config.seq_len = ROWS.value, LENGTH.value
  config.model.num_layers, config.model.vocab_size = LAYERS.value, vocabulary
  config = resolve(config, devices=1)
  method = METHODS[config.method].build(config)
  if name == "two products":
    method = method._replace(dense=lora.layer(config, TwoProductDense))
  return Case(config, method, assemble(config, method, mesh))


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


def switcher(case: Case, step: int):
  """A call that runs the switching of one step by itself, from `step` of the schedule on."""

  def adjust(state):
    adjusted = case.method.adjust(state, False)
    return adjusted.state._replace(step=state.step + 1), adjusted.masks

  state = case.program.create()._replace(step=jnp.int32(step))
  jitted = jax.jit(adjust, donate_argnums=0)

  def call():
    nonlocal state
    state, masks = jitted(state)
    return state.frozen, masks

  return call


def benchmark(vocabulary: int) -> list[dict]:
  """One row a program: seconds of its step (median), ratios to full rank of time and of operations. One device."""
  mesh, full = make_mesh(jax.devices()[:1]), ("full", 0)
  names = [full, *((name, rank) for rank in RANKS.value for name in ("switchlora", "two products"))]
  cases = {name: make_case(*name, vocabulary, mesh) for name in names}
  rows = np.random.default_rng(0).integers(0, vocabulary, (ROWS.value, LENGTH.value), np.int32)
  with jax.set_mesh(mesh):
    calls = {name: stepper(case.program, rows) for name, case in cases.items()}
    for rank in RANKS.value:
      case = cases["switchlora", rank]
      calls["switching alone, first steps", rank] = switcher(case, 0)
      calls["switching alone, last steps", rank] = switcher(case, case.config.steps)
    seconds = time_in_turns(calls, f"vocabulary {vocabulary}")
    work = {name: cost.operations(case.program.step, case.program.abstract, rows) for name, case in cases.items()}
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
  mesh, compiler = topology.gpu_mesh("h100") or (make_mesh(jax.devices()[:1]), "XLA for this machine's CPU")
  tokens = jax.ShapeDtypeStruct((ROWS.value, LENGTH.value), jnp.int32, sharding=by_rows(mesh))
  results = []
  for name, rank in [("full", 0), *((name, rank) for rank in RANKS.value for name in ("lora", "switchlora"))]:
    program = make_case(name, rank, VOCABULARIES.value[0], mesh).program
    compiled = program.step.lower(program.abstract, tokens).compile()
    results.append({"program": name, "rank": rank, "compiler": compiler} | cost.memory(compiled))
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
  results = memory() if MEMORY.value else [row for vocabulary in VOCABULARIES.value for row in benchmark(vocabulary)]
  where = "compiled only" if MEMORY.value else f"one {jax.devices()[0].device_kind}"
  print(f"layers: {LAYERS.value}, tokens a step: {ROWS.value} × {LENGTH.value}, float32, {where}")
  print(table(results))
  if JSON.value:
    Path(JSON.value).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
  cli.run(main)
