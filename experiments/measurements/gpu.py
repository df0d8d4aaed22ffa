"""Measurements on one GPU, in at most eight minutes: training steps, memory, host candidates, attention and resume.

python -m experiments.measurements.gpu --json=gpu.json
python -m experiments.measurements.gpu --small        # a trial with tiny models, on any device

- Training steps of full rank, LoRA and SwitchLoRA at the 350M and the 1.3B shape: seconds, tokens per second, MFU, and
  the peak memory beside that of the compiler, which `experiments.plan` prints.
- SwitchLoRA with its candidates on the host, to compare with the same step with all arrays on the GPU.
- Attention, forward and backward: cuDNN's kernel and the blocks of `models.llama.causal_attention`.
- A run that is saved, restored and continued: whether every array of the state is the same to the bit.

Each measurement is a process of its own, since a process only knows its largest peak of memory. What is left when the
time is used up is reported as such. The data are random tokens: no text, tokenizer or network is used.

Besides JAX for CUDA it imports absl-py, flax, ml-collections, numpy, optax, orbax-checkpoint, sentencepiece, tqdm,
xxhash and zstandard, and neither datasets nor tensorboardX. To a machine without a package index, carry those that it
lacks as wheels; that of ml-collections has 0.08 MB.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from configs import llama_1b, llama_350m, llama_tiny
from experiments.common import children, cli
from switchlora_jax.config import resolve
from switchlora_jax.errors import UserError
from switchlora_jax.models.llama import causal_attention
from switchlora_jax.models.rotary import Rope, rotary_angles
from switchlora_jax.parallel.sharding import make_mesh
from switchlora_jax.planning import cost, topology
from switchlora_jax.runs.checkpoint import Checkpoints
from switchlora_jax.training.phases import build_phase
from switchlora_jax.training.throughput import model_flops, peak_memory

CONFIGS = {"350M": llama_350m, "1.3B": llama_1b}
RANKS = {"350M": 256, "1.3B": 512}
STEPS = [f"step {size} {method}" for size in CONFIGS for method in ("full", "lora", "switchlora")]
MEASUREMENTS = (*STEPS[:3], "attention", "resume", "step 350M switchlora host", *STEPS[3:])
BATCH, REPEATS = 16, 5  # sequences and timed steps of a measurement

JSON = flags.DEFINE_string("json", None, "also write the results to this file")
SMALL = flags.DEFINE_bool("small", False, "tiny models, on any device: a trial of this command")
SECONDS = flags.DEFINE_integer("seconds", 480, "time limit of all measurements together", lower_bound=1)
ONLY = flags.DEFINE_list("only", list(MEASUREMENTS), f"measurements to make, from {', '.join(MEASUREMENTS)}")
INSIDE = flags.DEFINE_string("inside", None, "make this measurement in this process, and print it as JSON; internal")


def step_config(size: str, method: str, host: bool = False):
  """The resolved config of a training step: one micro-batch, blocks recomputed as in the configs of the paper."""
  config = (llama_tiny if SMALL.value else CONFIGS[size]).get_config()
  config.method, config.batch_size, config.accumulation = method, BATCH, 1
  config.rank = 8 if SMALL.value else RANKS[size]
  config.sharding.candidates = "host" if host else "replicated"
  return resolve(config, devices=1, platform=jax.default_backend())


def random_rows(config) -> np.ndarray:
  """Token ids [batch, length]."""
  shape = (config.batch_size, config.seq_len)
  return np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)


def timed(call) -> tuple[float, Any]:
  """The median of the seconds of a call after two untimed ones, and the result of the last call."""
  seconds = []
  for _ in range(REPEATS + 2):
    began = time.perf_counter()
    result = jax.block_until_ready(call())
    seconds.append(time.perf_counter() - began)
  return statistics.median(seconds[2:]), result


def measure_step(size: str, method: str, host: bool = False) -> dict:
  """Seconds, MFU and memory of a training step; memory in bytes."""
  config = step_config(size, method, host)
  mesh = make_mesh(jax.devices()[:1])
  with jax.set_mesh(mesh):
    phase = build_phase(config, mesh)
    rows, began = phase.shard_batch(random_rows(config)), time.perf_counter()
    step = phase.step.lower(phase.abstract, rows).compile()
    compiled = time.perf_counter() - began
    state = phase.create()

    def one_step():
      nonlocal state
      state, values = step(state, rows)
      return values

    median, values = timed(one_step)
  flops = model_flops(config.model, *rows.shape)
  peak = topology.peak_flops(jax.devices()[0].device_kind, config.dtype)
  return {
    "dtype": config.dtype,
    "seconds": median,
    "tokens_per_second": rows.size / median,
    "model_tflops_per_second": flops / median / 1e12,
    "mfu": flops / median / peak if peak else None,
    "peak_memory": peak_memory(),
    "planned_memory": cost.memory(step)["peak"],
    "compile_seconds": compiled,
    "loss": float(values["loss"]),
  }


def measure_attention() -> dict:
  """Seconds of attention, forward and backward, by kernel, and the largest difference of their results."""
  batch, heads, length, size = (2, 2, 64, 16) if SMALL.value else (BATCH, 16, 512, 64)
  q, k, v, towards = np.random.default_rng(0).standard_normal((4, batch, heads, length, size)).astype(jnp.bfloat16)
  angles, found, results = rotary_angles(Rope(), length, size), {}, {}
  for kernel in ("cudnn", "batched"):
    if kernel == "cudnn" and jax.default_backend() != "gpu":
      continue

    @jax.jit
    def both(q, k, v, kernel=kernel):
      out, backward = jax.vjp(lambda *qkv: causal_attention(*qkv, angles, kernel), q, k, v)
      return out, *backward(towards)

    found[f"{kernel}_seconds"], results[kernel] = timed(partial(both, q, k, v))
  if len(results) == 2:
    wide = [[np.asarray(x, np.float32) for x in result] for result in results.values()]
    found["largest_difference"] = max(float(np.abs(x - y).max()) for x, y in zip(*wide, strict=True))
  return found


def measure_resume() -> dict:
  """Whether six steps, and three steps, a restored checkpoint and three more give the same state to the bit."""
  config = resolve(llama_tiny.get_config(), devices=1, platform=jax.default_backend())
  mesh = make_mesh(jax.devices()[:1])
  with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
    phase = build_phase(config, mesh)
    rows = phase.shard_batch(random_rows(config))

    def steps(state, number):
      for _ in range(number):
        state, _ = phase.step(state, rows)
      return state

    whole = jax.device_get(steps(phase.create(), 6))
    with Checkpoints(Path(folder) / "checkpoints", keep=1) as checkpoints:
      checkpoints.save(3, steps(phase.create(), 3))
      checkpoints.wait()
      restored = jax.device_get(steps(checkpoints.restore(lambda _: phase.abstract), 3))
  same = jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), whole, restored)
  return {"arrays": len(jax.tree.leaves(same)), "same_to_the_bit": all(jax.tree.leaves(same))}


def measure(name: str) -> dict:
  """The measurement of a name in `MEASUREMENTS`, in this process."""
  if name == "attention":
    return measure_attention()
  if name == "resume":
    return measure_resume()
  _, size, method, *host = name.split()
  return measure_step(size, method, bool(host))


def measure_in_child(name: str, seconds: float) -> dict:
  """The measurement in a process of its own; {"failed": why} if it has no result within the time."""
  command = [sys.executable, "-m", "experiments.measurements.gpu", f"--inside={name}", f"--small={SMALL.value}"]
  command += ["--compilation_cache=none"]  # `compile_seconds` must not be those of reading
  try:
    done = subprocess.run(
      command, cwd=cli.ROOT, env=children.environment(), capture_output=True, text=True, timeout=max(seconds, 1)
    )
  except subprocess.TimeoutExpired:
    return {"failed": f"no result within the {seconds:.0f} s that were left"}
  if done.returncode:
    return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
  return json.loads(done.stdout.splitlines()[-1])


def shown(value) -> str:
  """A result as text."""
  if isinstance(value, int) and not isinstance(value, bool) and value > 10**6:
    return f"{value / 2**30:.2f} GiB"
  return f"{value:.4g}" if isinstance(value, float) else str(value)


def main():
  """Make the measurements one after the other, and print each as soon as it is there."""
  if INSIDE.value:
    print(json.dumps(measure(INSIDE.value)))
    return
  cli.check_json(JSON.value)
  if unknown := set(ONLY.value) - set(MEASUREMENTS):
    raise UserError(f"--only has {', '.join(sorted(unknown))}; expected some of {', '.join(MEASUREMENTS)}")
  began, results = time.monotonic(), {}
  for name in MEASUREMENTS:
    if name in ONLY.value:
      results[name] = measure_in_child(name, SECONDS.value - (time.monotonic() - began))
      print(f"{name}: " + ", ".join(f"{key} {shown(value)}" for key, value in results[name].items()), flush=True)
      if JSON.value:
        Path(JSON.value).write_text(json.dumps(results, indent=2) + "\n")
  print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
  cli.run(main)
