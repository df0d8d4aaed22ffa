"""Configs and texts so small that a whole run takes seconds."""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import compiled_programs
import jax
import numpy as np
import pytest
import small_model
from ml_collections import ConfigDict

from configs import llama_tiny
from switchlora_jax.config import resolve
from switchlora_jax.data import packing, tokenizer
from switchlora_jax.runs import directory as run_directory
from switchlora_jax.runs.checkpoint import Checkpoints
from switchlora_jax.runs.directory import flatten
from switchlora_jax.training.phases import build_phase

# For processes on one device. On several devices in several processes, a program from the cache can hang.
ONE_DEVICE = {
  "JAX_PLATFORMS": "cpu",
  "JAX_NUM_CPU_DEVICES": "1",
  "JAX_COMPILATION_CACHE_DIR": compiled_programs.FOLDER,
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none",
}
# For processes whose numbers are not compared with those of a user's flags: they compile in half the time.
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
ONE_DEVICE_QUICK = ONE_DEVICE | QUICK


# Documents that tests of tokenizers train on.
DOCUMENTS = ["The tide rises.\n\n  The tide falls, and the waves\tbreak.\n", "A wave, a tide; 12 rocks.", ""] * 5


def write_text(folder: Path, lines: int = 400) -> str:
  """A plain text file of numbered sentences; returns its path."""
  words = "the model learns a low rank update while the frozen weight absorbs what was switched away".split()
  path = folder / "text.txt"
  path.write_text("\n".join(f"{i}: {' '.join(words[i % 7 :])} and {words[i % 16]}." for i in range(lines)))
  return str(path)


def tiny_config(folder: Path, **changes) -> ConfigDict:
  """Two layers of width 16, 12 steps, on `write_text` in `folder`; `changes` are keys such as `switch__interval`."""
  config = ConfigDict(llama_tiny.get_config())
  config.update(steps=12, warmup_steps=2, batch_size=8, seq_len=16, rank=4, eval_every=4, checkpoint_every=4)
  config.update(eval_tokens=256, log_every=3)
  config.model.update(vocab_size=320, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2)
  config.switch.update(interval=2, freeze_steps=1)
  config.data.update(source="text", path=write_text(folder), cache_dir=str(folder / "cache"))
  for key, value in changes.items():
    config.update_from_flattened_dict({key.replace("__", "."): value})
  return config


def resolved(folder: Path, devices: int = 8, **changes):
  """`tiny_config`, resolved."""
  return resolve(tiny_config(folder, **changes), devices)


def flags_of(config) -> list[str]:
  """The flags that make the default config this one."""
  default = flatten(llama_tiny.get_config())
  return [f"--config.{key}={value}" for key, value in flatten(config).items() if value != default[key]]


def sentences(start: int, stop: int) -> list[str]:
  """A document of two lines for each number."""
  return [f"Wave {n} of the tide breaks on rock {n * n}.\nIt falls back {n % 7} times.\n" for n in range(start, stop)]


def write_lines(path: Path, documents: list[str]) -> Path:
  """A file of JSON lines, a document each; its folder is made."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
  return path


def rows_of(model, documents: list[str], seq_len: int) -> np.ndarray:
  """What packing makes of documents, in one go: each ended by EOS, joined, cut, the remainder dropped."""
  tokens = [token for text in documents if text for token in [*model.encode([text])[0], model.eos]]
  whole = len(tokens) // seq_len
  return np.reshape(np.array(tokens[: whole * seq_len], np.int32), (whole, seq_len))


def padded_rows_of(model, documents: list[str], seq_len: int) -> np.ndarray:
  """The rows of padding, document by document: the first tokens, EOS, and then -1."""
  rows = [[*model.encode([text])[0][: seq_len - 1], model.eos] for text in documents if text]
  return np.array([row + [-1] * (seq_len - len(row)) for row in rows], np.int32).reshape(-1, seq_len)


@contextlib.contextmanager
def packing_in(group: int, shard: int = packing.SHARD):
  """Groups of so many characters, shards of so many tokens."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(packing, "GROUP", group)
    patch.setattr(packing, "SHARD", shard)
    yield


def saved_run(workdir: Path, steps: int = 0, **changes) -> Path:
  """The directory of a run on one device with a checkpoint after so many steps on random ids.

  What is trained starts three times as large as in a run, so that logits, and what adapters add to them, are not tiny.
  """
  workdir.mkdir()
  config = resolved(workdir, devices=1, **{"learning_rate": 0.05, "warmup_steps": 1} | changes)
  text = workdir / "text.txt"
  tokenizer.train_tokenizer([text.read_text()], 320, workdir / "own.model")
  data = SimpleNamespace(also=(), fingerprint="random ids", tokenizer_path=workdir / "own.model")
  mesh = small_model.mesh(1)
  phase = build_phase(config, mesh)
  with jax.set_mesh(mesh), Checkpoints(workdir / "checkpoints", 1) as checkpoints:
    state = phase.create()
    larger = jax.jit(lambda params: jax.tree.map(lambda x: 3 * x, params))
    state = state._replace(params=larger(state.params))
    for step in range(steps):
      rows = np.random.default_rng(step).integers(0, 320, (config.batch_size, config.seq_len))
      state, _ = phase.step(state, phase.shard_batch(rows))
    checkpoints.save(steps, state)
  run_directory.record(workdir, config, data)
  return workdir
