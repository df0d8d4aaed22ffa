"""The configs of the papers' models: parameter counts, batches and steps of their tables, and documentation."""

import importlib
import re
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict
from paths import ROOT

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


PROTOCOL = {  # of GaLore: steps, rank, hidden, intermediate, layers, heads, and parameters with 32,100 ids
  "llama_60m": (10_000, 128, 512, 1376, 8, 8, "58.2M"),
  "llama_130m": (20_000, 256, 768, 2048, 12, 12, "134.3M"),
  "llama_350m": (60_000, 256, 1024, 2736, 24, 16, "368.2M"),
  "llama_1b": (100_000, 512, 2048, 5461, 24, 32, "1339.5M"),
}
NAMES = [
  path.relative_to(ROOT / "configs").with_suffix("").as_posix() for path in (ROOT / "configs").rglob("llama_*.py")
]


def load(name, **changes):
  config = ConfigDict(importlib.import_module(f"configs.{name.replace('/', '.')}").get_config())
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


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_config_states_its_command_and_resolves(name):
  module = importlib.import_module(f"configs.{name.replace('/', '.')}")
  command = {"llama_mini": "compare", "llama_350m_cut": "benchmark"}.get(name, "pretrain")
  assert f"python -m experiments.{command} --config=configs/{name}.py" in module.__doc__
  resolve(load(name), devices=1)


@pytest.mark.parametrize("name", PROTOCOL)
def test_the_protocol_of_galore(name):
  """Its section 5.1 and appendix: sizes, steps, batches, schedule, rank, and the settings of GaLore itself."""
  config = resolve(load(f"protocol/{name}"), devices=8)
  steps, rank, *shape, parameters = PROTOCOL[name]
  keys = ("hidden_size", "intermediate_size", "num_layers", "num_heads")
  assert (config.steps, config.rank, [config.model[key] for key in keys]) == (steps, rank, shape)
  assert (config.batch_size, config.seq_len, config.data.packing) == (512, 256, "pad")
  assert (config.warmup_steps, config.schedule.name, config.min_lr_ratio) == (steps / 10, "cosine", 0.1)
  assert (config.method, config.learning_rate, config.galore.scale) == ("galore", 1e-2, 0.25)
  assert (config.galore.refresh_every, config.optimizer.weight_decay) == (200, 0)
  assert (config.model.vocab_size, config.eval_every, config.eval_tokens) == (32_100, 1000, 10_000_000)
  full = resolve(load(f"protocol/{name}", method="full"), devices=8)
  params = build_phase(full, make_mesh()).abstract.params
  assert report.parameters_line("trainable", params).startswith(f"trainable parameters: {parameters}")


def test_every_config_is_tested():
  protocol = {name.removeprefix("protocol/") for name in NAMES if name.startswith("protocol/")}
  assert protocol == {*PROTOCOL} and len(NAMES) > len(PROTOCOL) + 5


def test_every_key_of_the_base_config_has_a_comment():
  source = Path(importlib.import_module("configs.base").__file__).read_text()
  keys = [line for line in source.splitlines() if re.match(r"  config\.[\w.]+ = ", line) and "ConfigDict()" not in line]
  assert len(keys) > 30
  assert [line for line in keys if "  # " not in line] == []


def test_building_a_phase_allocates_no_arrays():
  before = len(jax.live_arrays())
  build_phase(resolve(load("llama_1b"), devices=1), make_mesh())
  assert len(jax.live_arrays()) <= before
