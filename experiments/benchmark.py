"""Benchmark training steps of each method relative to full rank: time, optimizer size and peak memory.

The timed steps of all programs alternate. The table has medians and ratios to full rank. With --peers=torch, the steps
of PyTorch's libraries alternate with them in a process of their own, and `peer_ratio` is relative to PyTorch's full
rank. `share` is the step's share of the speed of one large matrix product, which is measured in the same run: the model
FLOPs of the step (`throughput.model_flops`, the same for every method) per second, divided by those of the product.
On a GPU it is about the MFU. The peak is the compiler's for the timed device. With --memory the steps are only
compiled: for a GPU if XLA's GPU compiler is installed, which needs no GPU, else for the CPU. With --gpu, the steps are
timed on the CPU and also compiled for GPUs: `gpu_peak` is the memory of each, and `gpu_sent` what it sends to others in
a step.

python -m experiments.benchmark                      # the 350M shape cut to 2 layers, vocabulary 2,048
python -m experiments.benchmark --rank=128 --rank=256 --vocabulary=2048 --vocabulary=32100 --json=out.json
python -m experiments.benchmark --config=configs/llama_tiny.py --methods=full,switchlora
python -m experiments.benchmark --peers=torch        # needs requirements-torch.txt
python -m experiments.benchmark --gpu=h100           # needs requirements-gpu.txt, and no GPU
python -m experiments.benchmark --memory --config.model.num_layers=24
                                 # compile only; see switchlora_jax/planning/topology.py
"""

import contextlib
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.ad_checkpoint import checkpoint_name

from experiments.common import cli, refreshes, torch_peers
from switchlora_jax.config import resolve
from switchlora_jax.errors import UserError
from switchlora_jax.interop.families import hugging_face_config
from switchlora_jax.lowrank.kernel_storage import forward_kernel
from switchlora_jax.lowrank.layers import ADAPTER, LoRADense
from switchlora_jax.methods import LOW_RANK, METHODS, keys_for, lora
from switchlora_jax.methods.base import Method
from switchlora_jax.models.llama import LINEAR
from switchlora_jax.parallel.sharding import by_rows, make_mesh
from switchlora_jax.planning import cost, planner, topology
from switchlora_jax.progress import progress_bar
from switchlora_jax.training.phases import Phase, assemble_phase
from switchlora_jax.training.report import bytes_of
from switchlora_jax.training.throughput import model_flops

TWO_PRODUCTS, PRODUCT = "two products", "one matrix product"
PROGRAMS = (*METHODS, TWO_PRODUCTS, *refreshes.PROGRAMS)
CONFIG = cli.define_config("llama_350m_cut")
flags.declare_key_flag("config")
NAMES = flags.DEFINE_list(
  "methods", list(PROGRAMS), f"programs to measure, from {', '.join(PROGRAMS)}; full is always included"
)
VOCABULARIES = flags.DEFINE_multi_integer("vocabulary", [], "vocabulary size; default: the config's; repeatable")
RANKS = flags.DEFINE_multi_integer(
  "rank", [], "rank of the low-rank methods; default: the config's; repeatable", lower_bound=1
)
PEERS = flags.DEFINE_enum("peers", None, ["torch"], "also time the same steps in PyTorch; needs requirements-torch.txt")
REPEATS = flags.DEFINE_integer("repeats", 5, "number of timed steps per program", lower_bound=1)
GPU = flags.DEFINE_enum("gpu", None, topology.known_gpus(), "time on the CPU, and also compile for GPUs of this type")
TOPOLOGY = flags.DEFINE_string("topology", "1x1x8", "of --gpu: slices × hosts × GPUs per host, with a micro-batch each")
MEMORY = flags.DEFINE_bool("memory", False, "only compile, and print the memory of each step")
JSON = flags.DEFINE_string("json", None, "also write the results to this file")
cli.define_quiet()


class TwoProductDense(LoRADense):
  """The usual LoRA layer, x·W + s·(x·Aᵀ)·B, as the reference for `merged_dense`."""

  @nn.compact
  def __call__(self, x):
    """Map x [..., in] to [..., features]."""
    if self.is_initializing():
      return super().__call__(x)
    kernel = forward_kernel(self.variables["frozen"])
    arrays = (x, kernel, *(self.get_variable("params", name) for name in ADAPTER))
    x, kernel, lora_a, lora_b = (array.astype(self.dtype) for array in arrays)
    narrow = checkpoint_name(x @ lora_a.T, LINEAR)  # kept for the backward pass, as libraries do
    return x @ kernel + self.scale * (narrow @ lora_b)


class BenchmarkCase(NamedTuple):
  """A program to measure: its config, method and compiled phase."""

  config: Any
  method: Method
  phase: Phase


def make_case(name: str, rank: int, vocabulary: int, mesh) -> BenchmarkCase:
  """The case of a program: a method, LoRA with two products, or a method that does its periodic work in every step.

  Gradient accumulation is disabled: a step has one micro-batch.
  """
  config = CONFIG.value.copy_and_resolve_references()  # a plain copy would share the placeholders
  config.update(keys_for(config, name if name in METHODS else refreshes.PROGRAMS.get(name, "lora")))
  config.rank = rank or 1
  config.batch_size, config.accumulation, config.warm_start_steps = batch_size() * mesh.size, 1, 0
  config.model.vocab_size = vocabulary
  if name in refreshes.PROGRAMS:
    config.update_from_flattened_dict(refreshes.keys(config.method))
  config = resolve(config, devices=mesh.size, platform=mesh.devices.flat[0].platform)
  method = METHODS[config.method].build(config)
  if name == TWO_PRODUCTS:
    method = method._replace(dense=lora.layer(config, TwoProductDense))
  return BenchmarkCase(config, method, assemble_phase(config, method, mesh))


def batch_size() -> int:
  """Number of sequences in a timed step: one micro-batch of the config."""
  if CONFIG.value.accumulation < 1:
    raise UserError(f"accumulation (={CONFIG.value.accumulation}) must be at least 1; set --config.accumulation")
  return CONFIG.value.batch_size // CONFIG.value.accumulation


def make_cases(vocabulary: int, mesh) -> dict[tuple[str, int], BenchmarkCase]:
  """{(program, rank): case}, full rank first."""
  if unknown := set(NAMES.value) - set(PROGRAMS):
    raise UserError(f"--methods has {', '.join(sorted(unknown))}; expected some of {', '.join(PROGRAMS)}")
  without_rank = [name for name in NAMES.value if name in METHODS and name not in LOW_RANK]
  names = dict.fromkeys((name, 0) for name in ("full", *without_rank))
  for rank in RANKS.value or [CONFIG.value.rank]:
    names |= dict.fromkeys((name, rank) for name in NAMES.value if name not in without_rank)
  return {name: make_case(*name, vocabulary, mesh) for name in names}


def time_in_turns(calls: dict, what: str) -> dict:
  """{name: seconds of each timed call}; runs each call once untimed, then alternates between all calls."""
  seconds = {name: [] for name in calls}
  pause = 0.02 if PEERS.value else 0  # until the threads of the other process sleep
  total = (REPEATS.value + 1) * len(calls)
  with progress_bar(total=total, desc=what, unit="step", shown=not flags.FLAGS.quiet) as bar:
    for repeat in range(REPEATS.value + 1):
      for name, call in calls.items():
        time.sleep(pause)
        start = time.perf_counter()
        jax.block_until_ready(call())
        if repeat:
          seconds[name].append(time.perf_counter() - start)
        bar.update()
  return seconds


def compile_step(phase: Phase, mesh):
  """The compiled training step of a phase; the devices of the mesh need not exist."""
  rows = jax.ShapeDtypeStruct((batch_size(), CONFIG.value.seq_len), jnp.int32, sharding=by_rows(mesh))
  return phase.step.lower(phase.abstract, rows).compile()


def step_call(phase: Phase, step, rows):
  """A function that runs the next compiled step of a phase, starting at step 0, where the switching rate is highest."""
  state = phase.create()

  def call():
    nonlocal state
    state, numbers = step(state, phase.shard_batch(rows))
    return numbers

  return call


def switch_call(case: BenchmarkCase, step: int):
  """A function that runs only the switches of the next step, from `step` of the schedule on."""

  def switch_only(state):
    adjusted = case.method.before_update(state, False)
    return adjusted.state._replace(step=state.step + 1), adjusted.masks

  state = case.phase.create()._replace(step=jnp.int32(step))
  jitted = jax.jit(switch_only, donate_argnums=0)

  def call():
    nonlocal state
    state, masks = jitted(state)
    return state.frozen, masks

  return call


def product_call(config, mesh):
  """A function that multiplies two large matrices in the compute dtype, and its FLOPs."""
  size = 8192 if mesh.devices.flat[0].platform == "gpu" else 2048
  matrix, product = jnp.ones((size, size), config.dtype), jax.jit(jnp.matmul)
  return lambda: product(matrix, matrix), 2 * size**3


def peer_calls(peers: torch_peers.Peers | None) -> dict:
  """{(peer, rank): a function that does its next step}."""
  if peers is None:
    return {}
  full, *others = torch_peers.installed()
  ranks = RANKS.value or [CONFIG.value.rank]
  names = [(full, 0), *((peer, rank) for peer in others for rank in ranks)]
  return {name: partial(peers.step, *name) for name in names}


def start_peers(config, rows):
  """The context of the process of the peers; None without --peers."""
  if PEERS.value is None:
    return contextlib.nullcontext()
  torch_peers.installed()
  return torch_peers.Peers(hugging_face_config(config.model), rows.tolist(), config.dtype, config.clip_norm)


def benchmark(vocabulary: int) -> list[dict]:
  """One row per program, on one device: median seconds per step, and ratios to full rank."""
  gpu = gpu_costs(vocabulary)
  mesh, full = make_mesh(jax.devices()[:1]), ("full", 0)
  cases = make_cases(vocabulary, mesh)
  shape = (batch_size(), CONFIG.value.seq_len)
  rows = np.random.default_rng(0).integers(0, vocabulary, shape, np.int32)
  with jax.set_mesh(mesh), start_peers(cases[full].config, rows) as peers:
    steps = {name: compile_step(case.phase, mesh) for name, case in cases.items()}
    calls = {name: step_call(case.phase, steps[name], rows) for name, case in cases.items()}
    whole_steps = {**calls, **peer_calls(peers)}
    calls[PRODUCT, 0], product_flops = product_call(cases[full].config, mesh)
    for (name, rank), case in cases.items():
      if name == "switchlora":
        calls["switching alone, first steps", rank] = switch_call(case, 0)
        calls["switching alone, last steps", rank] = switch_call(case, case.config.steps)
    seconds = time_in_turns(whole_steps | calls, f"vocabulary {vocabulary}")
    work = {name: cost.operations(case.phase.step, case.phase.abstract, rows) for name, case in cases.items()}
  optimizer = {name: bytes_of(case.phase.abstract.opt_state) for name, case in cases.items()}
  peak = {name: cost.memory(step)["peak"] for name, step in steps.items()}
  relative = {"operations_ratio": work, "optimizer_ratio": optimizer, "peak_ratio": peak}
  if gpu:
    relative["gpu_peak_ratio"] = {name: costs["gpu_peak"] for name, costs in gpu.items()}
  ratio = lambda times, other: statistics.median(a / b for a, b in zip(times, seconds[other], strict=True))
  flops = dict.fromkeys(whole_steps, model_flops(cases[full].config.model, *shape)) | {(PRODUCT, 0): product_flops}
  speed = product_flops / statistics.median(seconds[PRODUCT, 0])
  return [
    {
      "vocabulary": vocabulary,
      "program": name[0],
      "rank": name[1],
      "dtype": cases[name].config.dtype if name in cases else None,
      "seconds": statistics.median(times),
      "gflops": flops[name] / 1e9 if name in flops else None,
      "share": flops[name] / statistics.median(times) / speed if name in flops else None,
      "time_ratio": ratio(times, full),
      "peer_ratio": ratio(times, (torch_peers.FULL, 0)) if peers else None,
    }
    | {key: found[name] / found[full] if name in found else None for key, found in relative.items()}
    | ({key: gpu.get(name, {}).get(key) for key in gpu[full]} if gpu else {})
    for name, times in seconds.items()
  ]


def gpu_costs(vocabulary: int) -> dict[tuple[str, int], dict[str, int]]:
  """{(program, rank): bytes of memory and of communication per GPU and step} of steps compiled for --gpu; {} without.

  Raises:
    UserError: XLA's GPU compiler is not installed.
  """
  if GPU.value is None:
    return {}
  mesh, compiler = topology.gpu_mesh(GPU.value, TOPOLOGY.value) or (None, "")
  if mesh is None:
    raise UserError(f"--gpu={GPU.value} needs XLA's GPU compiler; install requirements-gpu.txt, or leave out --gpu")
  found = {}
  for name, case in make_cases(vocabulary, mesh).items():
    plan = planner.plan_step(case.phase, case.config, mesh, host=0)
    found[name] = {"gpu_peak": plan.peak, "gpu_sent": round(sum(collective.sent for collective in plan.traffic))}
  print(f"compiled for {TOPOLOGY.value} {GPU.value} by {compiler}", file=sys.stderr, flush=True)
  return found


def benchmark_memory(vocabulary: int) -> list[dict]:
  """One row per program: bytes of the compiled step and of the optimizer state in it, and ratios to full rank."""
  topology.without_gpus()
  mesh, compiler = topology.gpu_mesh("h100") or (make_mesh(jax.devices()[:1]), "XLA for this machine's CPU")
  results = []
  for (name, rank), case in make_cases(vocabulary, mesh).items():
    row = {"vocabulary": vocabulary, "program": name, "rank": rank, "dtype": case.config.dtype, "compiler": compiler}
    row |= {"optimizer": bytes_of(case.phase.abstract.opt_state)} | cost.memory(compile_step(case.phase, mesh))
    full = results[0] if results else row
    results.append(row | {f"{key}_ratio": row[key] / full[key] for key in ("optimizer", "peak")})
  return results


SIZES = ("optimizer", "arguments", "outputs", "shared", "temporaries", "peak", "gpu_peak", "gpu_sent")  # in bytes


def benchmark_table(rows: list[dict]) -> str:
  """Rows as an aligned text table."""
  shown = [list(rows[0])] + [[_format_cell(key, value) for key, value in row.items()] for row in rows]
  widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
  return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in shown)


def _format_cell(key: str, value) -> str:
  if value is not None and key in SIZES:
    return f"{value / 2**20:,.1f} MiB"
  return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def main():
  """Check the flags, measure, print, write."""
  cli.check_json(JSON.value)
  if MEMORY.value and (PEERS.value or GPU.value):
    raise UserError("--peers and --gpu are columns of the timed table, and --memory times nothing; leave out --memory")
  if GPU.value:
    topology.without_gpus()
  measure = benchmark_memory if MEMORY.value else benchmark
  config = CONFIG.value
  cli.set_precision(config)
  results = [row for vocabulary in VOCABULARIES.value or [config.model.vocab_size] for row in measure(vocabulary)]
  where = "compiled only" if MEMORY.value else f"one {jax.devices()[0].device_kind}"
  print(f"layers: {config.model.num_layers}, tokens per step: {batch_size()} × {config.seq_len}, {where}")
  print(benchmark_table(results))
  if JSON.value:
    Path(JSON.value).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
  cli.run(main)
