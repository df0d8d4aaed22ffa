"""CONTRIBUTING.md: each of its guides is followed to the letter in a copy of the repository, which is then run.

A toy adds its own file, from `toys/`, and edits the files that the guide names. One short run uses all four toys.
"""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
import small_model
from paths import ROOT
from tiny import ONE_DEVICE_QUICK, flags_of, tiny_config

from switchlora_jax.methods import METHODS
from switchlora_jax.models import architecture_of
from switchlora_jax.parallel.sharding import Placement
from switchlora_jax.training.step import accumulated_gradients

GUIDE = (ROOT / "CONTRIBUTING.md").read_text()
TOYS = Path(__file__).parent / "toys"


class Toy(NamedTuple):
  """A toy extension.

  Attributes:
    new: {path in the repository: file in `toys/`}.
    edits: {path in the repository: [(line or part of a line, what replaces it), …]}.
  """

  new: dict[str, str]
  edits: dict[str, list[tuple[str, str]]]


EXTENSIONS = {
  "Add a method": Toy(
    {"switchlora_jax/methods/adabelief.py": "adabelief.py"},
    {
      "switchlora_jax/methods/__init__.py": [
        ("from switchlora_jax.methods import (", "from switchlora_jax.methods import (\n  adabelief,"),
        ("METHODS = {", 'METHODS = {"adabelief": adabelief, '),
      ],
      "configs/base.py": [
        (
          "  return config.lock()",
          "  config.adabelief = ConfigDict()\n  config.adabelief.eps_root = 1e-16\n  return config.lock()",
        )
      ],
    },
  ),
  "Add a model": Toy(
    {"switchlora_jax/models/squared_relu.py": "squared_relu.py"},
    {
      "switchlora_jax/models/__init__.py": [
        (
          "from switchlora_jax.models.llama import INIT, LLaMA",
          "from switchlora_jax.models.llama import INIT, LLaMA\n"
          "from switchlora_jax.models.squared_relu import SquaredReLU",
        ),
        (
          "  return LLaMA(",
          '  model = SquaredReLU if dict(keys).get("mlp") == "squared_relu" else LLaMA\n  return model(',
        ),
      ],
      "configs/base.py": [("  return config.lock()", '  config.model.mlp = "swiglu"\n  return config.lock()')],
    },
  ),
  "Add a dataset source": Toy(
    {"switchlora_jax/data/countdown.py": "countdown.py"},
    {
      "switchlora_jax/data/dataset.py": [
        ("from switchlora_jax.data import ", "from switchlora_jax.data import countdown, "),
        ("SOURCES = {", 'SOURCES = {\n  "countdown": "documents that count down",'),
        (
          '  if data.source == "docs":\n    return documentation.origin()',
          '  if data.source == "countdown":\n    return countdown.ORIGIN\n'
          '  if data.source == "docs":\n    return documentation.origin()',
        ),
        (
          '  if data.source == "docs":\n    return documentation.read_corpus',
          '  if data.source == "countdown":\n    return countdown.open_countdowns()\n'
          '  if data.source == "docs":\n    return documentation.read_corpus',
        ),
      ],
    },
  ),
  "Add a metrics writer": Toy(
    {"switchlora_jax/training/csv_writer.py": "csv_writer.py"},
    {
      "switchlora_jax/training/writers.py": [
        (
          "from switchlora_jax.training import metrics",
          "from switchlora_jax.training import metrics\nfrom switchlora_jax.training.csv_writer import CsvWriter",
        ),
        ("  return [JsonLinesWriter(", "  return [CsvWriter(workdir, start), JsonLinesWriter("),
      ],
    },
  ),
}


def section(title: str) -> str:
  """The text of a section of CONTRIBUTING.md."""
  return re.search(rf"^##+ {re.escape(title)}\n(.*?)(?=^##|\Z)", GUIDE, re.MULTILINE | re.DOTALL)[1]


@pytest.mark.parametrize("title", EXTENSIONS)
def test_a_toy_touches_the_files_that_the_guide_lists(title):
  listed = re.findall(r"^\d+\. `([\w/]+\.py)`", section(title).replace("NAME", Path(*EXTENSIONS[title].new).stem), re.M)
  assert sorted(listed) == sorted([*EXTENSIONS[title].new, *EXTENSIONS[title].edits])
  assert all(name in section(title) for name in EXTENSIONS[title].new.values()), "the guide links the toy"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
  """The directory of a run that uses all toys, made by a copy of the repository that has them."""
  folder = tmp_path_factory.mktemp("contribution")
  copy = folder / "repository"
  for name in ("switchlora_jax", "configs", "experiments"):
    shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
  for toy in EXTENSIONS.values():
    for path, source in toy.new.items():
      assert not (copy / path).exists()
      shutil.copy(TOYS / source, copy / path)
    for path, edits in toy.edits.items():
      text = (copy / path).read_text()
      for old, new in edits:
        assert text.count(old) == 1, f"{path} must contain once: {old}"
        text = text.replace(old, new)
      (copy / path).write_text(text)
  config = tiny_config(folder, data__path="", steps=6, eval_every=6, checkpoint_every=6)
  options = (
    "method=adabelief adabelief.eps_root=1e-14 model.mlp=squared_relu data.source=countdown data.epochs=100".split()
  )
  flags = [*flags_of(config), *(f"--config.{option}" for option in options), f"--workdir={folder / 'run'}"]
  environment = os.environ | ONE_DEVICE_QUICK | {"PYTHONPATH": str(copy)}
  command = [sys.executable, "-m", "experiments.pretrain", "--config=configs/llama_tiny.py", *flags]
  done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
  return folder / "run"


def rows(run: Path) -> list[dict]:
  """The rows of training steps in metrics.jsonl."""
  return [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in row]


@pytest.mark.slow
def test_the_method_and_the_model_train(run):
  config = json.loads((run / "config.json").read_text())
  losses = [row["loss"] for row in rows(run)]
  assert "adabelief" in str(config) and "squared_relu" in str(config)
  assert len(losses) == 6 and losses[-1] < losses[0]


def test_the_model_trains_with_sharded_parameters():
  """Each layer's shards are gathered in the loop over the layers, and gathered again for the backward pass."""
  toy, config = runpy.run_path(TOYS / "squared_relu.py"), small_model.config("full")
  model = toy["SquaredReLU"](architecture_of(config.model), dense=METHODS["full"].build(config).dense)
  params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
  assert "gate" not in params["blocks"], "its blocks are the toy's"
  state, rows = SimpleNamespace(params=params, frozen={}), jax.ShapeDtypeStruct((4, 8), jnp.int32)
  step = accumulated_gradients(model, Placement(small_model.mesh(2, fsdp=2), trained=True), state, accumulation=1)
  traced = jax.make_jaxpr(step)(params, {}, rows)
  gathered = [e.outvars[0].aval.shape for e in small_model.equations(traced.jaxpr) if e.primitive.name == "all_gather"]
  assert gathered.count((24, 16)) == 2, "the kernel of `down`"


@pytest.mark.slow
def test_the_writer_gets_every_row(run):
  written = [line.split(",") for line in (run / "loss.csv").read_text().splitlines()]
  assert [(int(step), float(loss)) for step, loss in written] == [(row["step"], row["loss"]) for row in rows(run)]


def test_the_paths_and_names_of_the_guide_exist():
  """Files, folders, commands and the functions and classes of the tour."""
  code = re.findall(r"`([^`\n]+)`", GUIDE)
  paths = [text for text in code if re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", text) and ("/" in text or "." in text)]
  paths = [text for text in paths if "/" in text and "NAME" not in text]
  missing = [text for text in paths if not any((parent / text).exists() for parent in (ROOT, ROOT / "switchlora_jax"))]
  assert paths and not missing
  package = "\n".join(path.read_text() for path in (ROOT / "switchlora_jax").rglob("*.py"))
  called = [text.removesuffix("()").split(".")[-1] for text in code if re.fullmatch(r"[\w.]+\(\)", text)]
  assert called and not [name for name in called if not re.search(rf"^\s*def {name}\(", package, re.MULTILINE)]
  targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
  assert set(re.findall(r"\bmake ([a-z]+)\b(?=[`\s])", "\n".join(code))) <= set(targets)
