"""The configs of the paper's models: parameter counts of Table 4, batches of Table 1, and documentation."""

import importlib
import re
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict

from switchlora_jax.config import resolve
from switchlora_jax.parallel.sharding import make_mesh
from switchlora_jax.training import report
from switchlora_jax.training.phases import build_phase

TABLE_4 = [
  ("llama_250m", "full", 0, "247.5M"),
  ("llama_250m", "switchlora", 128, "98.9M"),
  ("llama_250m", "lora", 256, "148.4M"),
  ("llama_350m", "full", 0, "368.2M"),
  ("llama_350m", "lora", 128, "125.6M"),
  ("llama_350m", "switchlora", 256, "185.4M"),
  ("llama_1b", "full", 0, "1339.5M"),
  ("llama_1b", "switchlora", 256, "370.7M"),
  ("llama_1b", "switchlora", 512, "609.7M (609,720,320)"),
]


def load(name, **changes):
  config = ConfigDict(importlib.import_module(f"configs.{name}").get_config())
  config.update(**changes)
  return config


@pytest.mark.parametrize(("name", "method", "rank", "expected"), TABLE_4)
def test_trainable_parameters_are_those_of_table_4(name, method, rank, expected):
  config = resolve(load(name, method=method, rank=rank), devices=1)
  state = build_phase(config, make_mesh()).abstract
  assert report.parameters_line("trainable", state.params).startswith(f"trainable parameters: {expected}")


def test_batches_are_those_of_table_1():
  """Sequences per GPU and micro-batch: 150 on 4 GPUs for 130M; 72, 72 and 16 on 8 GPUs for the others."""
  sizes = {name: load(name) for name in ("llama_130m", "llama_250m", "llama_350m", "llama_1b")}
  per_gpu = [c.batch_size // (c.accumulation * gpus) for c, gpus in zip(sizes.values(), (4, 8, 8, 8), strict=True)]
  assert per_gpu == [150, 72, 72, 16]
  assert [c.seq_len for c in sizes.values()] == [256, 512, 512, 512]


@pytest.mark.parametrize("name", ["llama_tiny", "llama_130m", "llama_250m", "llama_350m", "llama_1b"])
def test_a_config_states_its_command_and_resolves(name):
  module = importlib.import_module(f"configs.{name}")
  assert f"python -m experiments.pretrain --config=configs/{name}.py" in module.__doc__
  resolve(load(name), devices=1)


def test_every_key_of_the_base_config_has_a_comment():
  source = Path(importlib.import_module("configs.base").__file__).read_text()
  keys = [line for line in source.splitlines() if re.match(r"  config\.[\w.]+ = ", line) and "ConfigDict()" not in line]
  assert len(keys) > 30
  assert [line for line in keys if "  # " not in line] == []


def test_building_a_phase_allocates_no_arrays():
  before = len(jax.live_arrays())
  build_phase(resolve(load("llama_1b"), devices=1), make_mesh())
  assert len(jax.live_arrays()) <= before
