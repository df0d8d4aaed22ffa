"""One training step in a process of its own: what was planned for it, and what it took. For test_planner.py."""

import gc
from pathlib import Path

import jax
import numpy as np

from configs.base import get_config
from switchlora_jax.config import resolve
from switchlora_jax.parallel.sharding import make_mesh
from switchlora_jax.planning import planner
from switchlora_jax.training.phases import build_phase


def resident(key: str) -> int:
  """VmRSS (now) or VmHWM (the most since it was reset), bytes."""
  lines = Path("/proc/self/status").read_text().splitlines()
  return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


config = get_config()
config.update(method="full", batch_size=144, seq_len=128)  # quick to compile; temporaries to measure by
config.model.update(vocab_size=8192, hidden_size=128, intermediate_size=256, num_layers=2, num_heads=4)
config = resolve(config, devices=1)
mesh = make_mesh()
phase = build_phase(config, mesh)
plan = planner.plan_step(phase, config, mesh, 0)
rows = phase.shard_batch(np.zeros((config.batch_size, config.seq_len)))
jax.block_until_ready(phase.step(phase.create(), rows))  # compiles once more, and starts the threads
gc.collect()

state = jax.block_until_ready(phase.create())
held = planner.device_bytes(phase.abstract) + rows.nbytes
live = sum(array.nbytes for array in jax.live_arrays())
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
jax.block_until_ready(phase.step(state, rows))
print(f"held={held} live={live} temporaries={plan.temporaries} peak={plan.peak} grown={resident('VmHWM') - before}")
