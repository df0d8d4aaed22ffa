"""What the commands that run grids are told: a config to start from, keys to change, and their common flags."""

import functools
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from switchlora_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


class Base(NamedTuple):
  """What all cells share: a config file, the keys changed against it, and the config that makes."""

  file: str
  overrides: dict[str, Any]
  config: ConfigDict


def define_flags(*, seeds: int):
  """The flags that every command that runs a grid has."""
  flags.DEFINE_string("workdir", None, "directory of the grid: created, or continued if it holds one")
  flags.DEFINE_integer("seeds", seeds, "runs of each line at its best learning rate", lower_bound=1)
  flags.DEFINE_integer(
    "processes", None, "runs at one time; by default one a core, or one if there are accelerators", lower_bound=1
  )


def options() -> dict:
  """What these flags say, as `run_grid` takes it; a run is read at its end."""
  values = flags.FLAGS
  if values.workdir is None:
    raise UserError("--workdir is missing: give the directory in which the runs are kept, say --workdir=runs/grid")
  processes = values.processes or default_processes()
  return {"workdir": Path(values.workdir).expanduser(), "seeds": values.seeds, "processes": processes, "read_at": 1.0}


def numbers(flag: str, words: list[str] | None, kind) -> list:
  """The words of a flag as numbers of a kind.

  Raises:
    UserError: one is none.
  """
  try:
    return [kind(word) for word in words or []]
  except ValueError as error:
    raise UserError(f"--{flag} must be a list of numbers such as 1e-3,2e-3 or 32,16; {error}") from error


def base_from_flags() -> Base:
  """The base that this command's own --config flags describe."""
  flag = flags.FLAGS["config"]
  return Base(config_flags.get_config_filename(flag), config_flags.get_override_values(flag), flags.FLAGS.config)


def base_from_file(name: str, overrides: dict[str, Any]) -> Base:
  """The base of a config in configs/, by its name, with keys changed."""
  config = ConfigDict(importlib.import_module(f"configs.{name}").get_config())
  update(config, overrides)
  return Base(str(ROOT / "configs" / f"{name}.py"), overrides, config)


def parse_value(config: ConfigDict, key: str, text: str):
  """A value written on the command line, with the type that the config's key has.

  Raises:
    UserError: there is no such key, or the text is no such value.
  """
  try:
    kind = config.get_type(key) if "." not in key else config[key.rsplit(".", 1)[0]].get_type(key.rsplit(".", 1)[1])
  except (KeyError, AttributeError) as error:
    raise UserError(f"unknown config key {key!r}; every key stands in configs/base.py") from error
  try:
    return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
  except (KeyError, ValueError, AttributeError) as error:  # the last: of a section such as `switch`
    raise UserError(f"{key} must be of type {kind.__name__}; found {text!r}") from error


def update(config: ConfigDict, overrides: dict[str, Any]) -> None:
  """Set keys such as `switch.interval`.

  Raises:
    UserError: there is no such key, or its value has another type.
  """
  for key, value in overrides.items():
    try:
      config.update_from_flattened_dict({key: value})
    except (KeyError, AttributeError) as error:
      raise UserError(f"unknown config key {key!r}; every key stands in configs/base.py") from error
    except TypeError as error:
      raise UserError(f"{key} (={value!r}) has the wrong type: {error}") from error


def default_processes() -> int:
  """One process a core where JAX finds only CPUs, else one: a process takes all accelerators."""
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  return cores if platform() == "cpu" else 1


@functools.cache
def platform() -> str:
  """What the runs will run on, "cpu" or "gpu"; asked in a process of its own, which lets go of the accelerators."""
  probe = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
  return subprocess.run(probe, capture_output=True, text=True).stdout.strip()


def environment() -> dict[str, str]:
  """This process' environment, in which `experiments` is found from any directory."""
  path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
  return os.environ | {"PYTHONPATH": path}
