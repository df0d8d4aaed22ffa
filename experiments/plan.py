"""Estimate what a run costs before renting GPUs: memory, traffic, operations, and a lower bound of the step time.

python -m experiments.plan --config=configs/llama_350m.py --gpu=h100 --topology=1x1x8
python -m experiments.plan --config=configs/llama_1b.py --methods=full,switchlora --gpu=a100 --topology=1x2x8 --largest

The config's own training step is compiled. With the GPU extra (requirements-gpu.txt), XLA's GPU compiler is used; no
GPU is needed or touched. Without it, XLA's CPU compiler is used, and its memory figures are only a hint.
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags
from ml_collections import FrozenConfigDict

from experiments.common import cli
from switchlora_jax.config import resolve
from switchlora_jax.errors import UserError
from switchlora_jax.methods import METHODS, keys_for
from switchlora_jax.parallel.sharding import make_mesh
from switchlora_jax.planning import planner, topology
from switchlora_jax.planning.collectives import COLLECTIVE_KINDS
from switchlora_jax.planning.planner import Estimate, StepPlan
from switchlora_jax.training import warm_start
from switchlora_jax.training.phases import build_phases

CONFIG = cli.define_config("llama_350m")
flags.declare_key_flag("config")
GPU = flags.DEFINE_string("gpu", "h100", f"GPU type, one of {', '.join(topology.known_gpus())}")
TOPOLOGY = flags.DEFINE_string("topology", "1x1x8", "slices × hosts × GPUs per host; 1x2x8 is 16 GPUs in 2 hosts")
NAMES = flags.DEFINE_list(
  "methods", [], f"one column per method, from {', '.join(METHODS)}; default: the config's method"
)
FRACTION = flags.DEFINE_float(
  "memory_fraction", 0.75, "share of GPU memory available to JAX, XLA_CLIENT_MEM_FRACTION in the run", 0.01, 1.0
)
LINK = flags.DEFINE_float(
  "link", None, "link speed between any two GPUs, GB/s in one direction; default: that of the GPU type"
)
LARGEST = flags.DEFINE_bool(
  "largest", False, "find the largest micro-batch that fits, with up to 4 more compilations per column"
)
JSON = flags.DEFINE_string("json", None, "also write the results to this JSON file")


class Column(NamedTuple):
  """A column of the table: a compiled step, its roofline, and {micro-batch size tried: peak bytes}."""

  name: str
  plan: StepPlan
  estimate: Estimate
  tried: dict[int, int]


class Machine(NamedTuple):
  """The planned machine: the GPU type, a mesh to compile for, a mesh of as many simulated CPUs, GPUs per host."""

  gpu: topology.Gpu
  mesh: Any
  cpus: Any
  compiler: str
  per_host: int

  @property
  def limit(self) -> float:
    """Bytes of GPU memory available to JAX."""
    return self.gpu.memory * FRACTION.value


def machine() -> Machine:
  """The machine that the flags describe; raises `UserError` if they are invalid."""
  if LINK.value is not None and not LINK.value > 0:
    raise UserError(f"--link (={LINK.value}) must be greater than 0; leave it out for the links of {GPU.value}")
  gpu = topology.read_gpu(GPU.value)
  if LINK.value:
    gpu = gpu._replace(nvlink=LINK.value * 1e9, network=LINK.value * 1e9)
  devices, per_host = topology.parse_topology(TOPOLOGY.value)
  topology.without_gpus()
  jax.config.update("jax_num_cpu_devices", devices)
  fsdp = CONFIG.value.sharding.fsdp
  found = topology.gpu_mesh(GPU.value, TOPOLOGY.value, fsdp)
  cpus = make_mesh(jax.devices("cpu"), fsdp)
  mesh, compiler = found or (cpus, "XLA for CPUs, since the GPU extra is missing: memory is only a hint")
  return Machine(gpu, mesh, cpus, compiler, per_host)


def configs(devices: int) -> dict[str, FrozenConfigDict]:
  """{method: resolved config} of the columns."""
  if unknown := set(NAMES.value) - set(METHODS):
    raise UserError(f"--methods has {', '.join(sorted(unknown))}; expected some of {', '.join(METHODS)}")
  warm_start.adopt_architecture(CONFIG.value, cli.given_keys(CONFIG.value), None)
  found = {}
  for name in NAMES.value or [CONFIG.value.method]:
    config = CONFIG.value.copy_and_resolve_references()  # a plain copy would share the placeholders
    config.update(keys_for(config, name))
    found[name] = resolve(config, devices, platform="gpu")
  return found


def columns(where: Machine, config) -> list[Column]:
  """The columns of a config: a full-rank warm start, if it has one, then its method."""
  names = ["full (warm start)", config.method] if config.warm_start_steps else [config.method]
  return [column(name, where, config, phase) for phase, name in enumerate(names)]


def column(name: str, where: Machine, config, phase: int) -> Column:
  """One column; with --largest, includes the search for the largest micro-batch."""
  plan = compiled(name, where, config, phase)
  share = where.mesh.size * config.accumulation

  def peak_of(rows: int) -> int:
    if rows * share == config.batch_size:
      return plan.peak
    changed = FrozenConfigDict(config.to_dict() | {"batch_size": rows * share})
    return compiled(name, where, changed, phase).peak

  rows, most = config.batch_size // share, config.batch_size // where.mesh.size
  tried = planner.search_micro_batch(peak_of, rows, most, where.limit) if LARGEST.value else {}
  return Column(name, plan, planner.estimate(plan, where.gpu, config.dtype, where.per_host), tried)


def compiled(name: str, where: Machine, config, phase: int) -> StepPlan:
  """Compile one phase of a config, and print how long it took."""
  rows = config.batch_size // (where.mesh.size * config.accumulation)
  print(f"compiling {name}, micro-batch {rows} × {config.seq_len} …", file=sys.stderr, flush=True)
  phase, on_cpus = (build_phases(config, mesh)[phase] for mesh in (where.mesh, where.cpus))
  plan = planner.plan_step(phase, config, where.mesh, planner.host_bytes(on_cpus.abstract))
  print(f"  {plan.seconds:.1f} s, peak {mib(plan.peak)}", file=sys.stderr, flush=True)
  return plan


def mib(size: float) -> str:
  """Bytes as MiB."""
  return f"{size / 2**20:,.1f} MiB"


def table(where: Machine, found: list[Column]) -> str:
  """The aligned table, one column per compiled step."""
  lines = [("", [column.name for column in found])]
  lines += [(label, [cell(column) for column in found]) for label, cell in cells(where, found)]
  left = max(len(label) for label, _ in lines)
  widths = [max(map(len, column)) for column in zip(*(texts for _, texts in lines), strict=True)]
  return "\n".join(
    f"{label:<{left}}  " + "  ".join(text.rjust(width) for text, width in zip(texts, widths, strict=True))
    for label, texts in lines
  )


def cells(where: Machine, found: list[Column]):
  """(label, column -> cell) of each line of the table. Lines that are empty for all columns are left out."""
  share = lambda part: f"{part:.1%}"
  for key in ("trainable", "frozen", "candidates", "optimizer"):
    yield key, lambda column, key=key: mib(getattr(column.plan, key))
  if any(column.plan.host for column in found):
    yield "  of these, in host memory", lambda column: mib(column.plan.host)
  if any(column.plan.exchanged for column in found):
    yield "  moved by one switch, at most", lambda column: mib(column.plan.exchanged)
  yield "activations and temporaries", lambda column: mib(column.plan.temporaries)
  yield "peak memory", lambda column: mib(column.plan.peak)
  yield f"  share of {mib(where.limit)}", lambda column: share(column.plan.peak / where.limit)
  for kind in COLLECTIVE_KINDS:
    if any(column.plan.collective_bytes(kind) for column in found):
      yield f"{kind} per step", lambda column, kind=kind: mib(column.plan.collective_bytes(kind))
  yield "operations per token", lambda column: f"{column.plan.operations / column.plan.tokens / 1e6:,.1f} M"
  yield "roofline: matrix products", lambda column: f"{column.estimate.products:.4f} s"
  yield "  memory traffic", lambda column: f"{column.estimate.memory:.4f} s"
  yield "  communication", lambda column: f"{column.estimate.links:.4f} s"
  yield "roofline step time", lambda column: f"{column.estimate.step:.4f} s"
  yield "  share of communication", lambda column: share(column.estimate.link_share)
  yield "  share of peak operations", lambda column: share(column.estimate.peak_share)
  yield "compile time", lambda column: f"{column.plan.seconds:.1f} s"
  if LARGEST.value:
    yield "largest micro-batch", lambda column: f"{planner.largest_fitting(column.tried, where.limit)} rows"


def results(where: Machine, column: Column) -> dict:
  """A column as JSON: sizes in bytes, times in seconds, and the micro-batch sizes tried with their peaks."""
  traffic = [collective._asdict() | {"sent": collective.sent} for collective in column.plan.traffic]
  names = {"program": column.name, "gpu": GPU.value, "topology": TOPOLOGY.value, "compiler": where.compiler}
  times = column.estimate._asdict() | {"step": column.estimate.step}
  largest = (
    {"tried": column.tried, "largest": planner.largest_fitting(column.tried, where.limit)} if LARGEST.value else {}
  )
  return names | column.plan._asdict() | {"traffic": traffic, "limit": where.limit, "estimate": times} | largest


def main():
  """Check the flags, compile, print the table and write it."""
  cli.check_json(JSON.value)
  devices, _ = topology.parse_topology(TOPOLOGY.value)
  wanted, where = configs(devices), machine()
  first = next(iter(wanted.values()))
  cli.set_precision(first)
  print(f"per device of {TOPOLOGY.value} {GPU.value}, {first.dtype}, {where.compiler}")
  found = [column for config in wanted.values() for column in columns(where, config)]
  print(table(where, found))
  print("roofline times are lower bounds, not measured: a real step takes longer")
  if any(not collective.certain for column in found for collective in column.plan.traffic):
    print("some traffic is in loops with unknown trip count: counted as 1 iteration")
  if JSON.value:
    Path(JSON.value).write_text(json.dumps([results(where, column) for column in found], indent=2) + "\n")


if __name__ == "__main__":
  cli.run(main)
