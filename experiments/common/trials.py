"""The trials of a sweep: a base config, the variants of a table, and the resolved config of each run."""

import functools
import importlib
import re
import subprocess
import sys
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, FrozenConfigDict, config_flags

from experiments.common import cli
from experiments.common.search import Point
from switchlora_jax.config import resolve
from switchlora_jax.errors import UserError
from switchlora_jax.training import warm_start


class BaseConfig(NamedTuple):
  """The config that all trials of a sweep start from.

  Attributes:
    file: path of the config file.
    overrides: keys changed relative to the file.
    config: the file's config with these overrides applied.
  """

  file: str
  overrides: dict[str, Any]
  config: ConfigDict


class Variant(NamedTuple):
  """One line of a table.

  Attributes:
    label: its name in tables and legends.
    overrides: keys changed relative to the base config.
    learning_rates: candidates for the first seed; empty selects the method's default.
    paper: the paper's perplexity, if it reports one.
    rest_learning_rates: candidates for embedding, norms and head, each with each of `learning_rates`; empty: not swept.
  """

  label: str
  overrides: dict[str, Any]
  learning_rates: tuple[float, ...] = ()
  paper: float | None = None
  rest_learning_rates: tuple[float, ...] = ()


class Trial(NamedTuple):
  """One run of a variant: its learning rates, its seed and the resolved config.

  Attributes:
    rest_learning_rate: of embedding, norms and head; None if it is not swept.
  """

  variant: Variant
  learning_rate: float
  seed: int
  config: FrozenConfigDict
  overrides: dict[str, Any]
  rest_learning_rate: float | None = None

  @property
  def name(self) -> str:
    """The name of its directory: `switchlora-rank-16_lr=0.02_seed=0`, or `full_lr=0.002_rest=0.01_seed=0`."""
    words = re.sub(r"[^\w.]+", "-", self.variant.label).strip("-")
    rest = "" if self.rest_learning_rate is None else f"_rest={self.rest_learning_rate:g}"
    return f"{words}_lr={self.learning_rate:g}{rest}_seed={self.seed}"

  @property
  def point(self) -> Point:
    """Its place in the sweep."""
    return self.learning_rate, self.rest_learning_rate


def base_from_flags() -> BaseConfig:
  """The base config given by this command's own --config flags."""
  flag = flags.FLAGS["config"]
  return BaseConfig(config_flags.get_config_filename(flag), config_flags.get_override_values(flag), flags.FLAGS.config)


def base_from_file(name: str, overrides: dict[str, Any]) -> BaseConfig:
  """The base config `configs/{name}.py` with the given overrides."""
  config = ConfigDict(importlib.import_module(f"configs.{name}").get_config())
  update_config(config, overrides)
  return BaseConfig(str(cli.CONFIGS / f"{name}.py"), overrides, config)


def parse_config_value(config: ConfigDict, key: str, text: str):
  """Convert a value from the command line to the type of a config key.

  Raises:
    UserError: the key does not exist, or the text does not have its type.
  """
  try:
    kind = config.get_type(key) if "." not in key else config[key.rsplit(".", 1)[0]].get_type(key.rsplit(".", 1)[1])
  except (KeyError, AttributeError) as error:
    raise UserError(f"unknown config key {key!r}; configs/base.py lists all keys") from error
  try:
    return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
  except (KeyError, ValueError, AttributeError) as error:  # AttributeError: a section such as `switch`
    raise UserError(f"{key} must be of type {kind.__name__}; found {text!r}") from error


def update_config(config: ConfigDict, overrides: dict[str, Any]) -> None:
  """Set flattened keys such as `switch.interval` in place.

  Raises:
    UserError: a key does not exist, or its value has the wrong type.
  """
  for key, value in overrides.items():
    try:
      config.update_from_flattened_dict({key: value})
    except (KeyError, AttributeError) as error:
      raise UserError(f"unknown config key {key!r}; configs/base.py lists all keys") from error
    except TypeError as error:
      raise UserError(f"{key} (={value!r}) has the wrong type: {error}") from error


@functools.cache
def probe_devices() -> tuple[str, int]:
  """(platform, number of devices) of a run, such as ("gpu", 8); a child process queries them and releases them again.

  Raises:
    UserError: JAX does not start.
  """
  probe = [sys.executable, "-c", "import jax; print(jax.default_backend(), jax.device_count())"]
  done = subprocess.run(probe, capture_output=True, text=True)
  if done.returncode:
    reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    raise UserError(f"JAX does not find its devices: {reason}; a run would not start either: check the drivers")
  platform, count = done.stdout.split()[-2:]
  return platform, int(count)


def make_trial(
  base: BaseConfig,
  variant: Variant,
  learning_rate: float | None,
  seed_number: int,
  rest_learning_rate: float | None = None,
) -> Trial:
  """A trial of a variant.

  Args:
    learning_rate: None selects the method's default.
    seed_number: added to the seed of the base config.
    rest_learning_rate: of embedding, norms and head; None if it is not swept: the config's.
  """
  config = base.config.copy_and_resolve_references()  # a plain copy would share the placeholder of learning_rate
  update_config(config, variant.overrides)
  own = {"seed": config.seed + seed_number}
  if learning_rate is not None:
    own["learning_rate"] = learning_rate
  if rest_learning_rate is not None:
    own["rest_learning_rate"] = rest_learning_rate
  update_config(config, own)
  overrides = base.overrides | variant.overrides | own
  # As the run does, with the weights: several runs will need them.
  warm_start.adopt_architecture(config, cli.given_keys(config, overrides), None, weights=True)
  platform, devices = probe_devices()
  resolved = resolve(config, devices, platform)
  return Trial(variant, resolved.learning_rate, resolved.seed, resolved, overrides, rest_learning_rate)


def first_seed_trials(base: BaseConfig, variants) -> list[Trial]:
  """The trials of the first seed: each variant at each of its learning rates.

  Raises:
    UserError: a trial's config is invalid, or two trials have the same name. Nothing has run yet.
  """
  trials = [
    make_trial(base, variant, rate, 0, rest)
    for variant in variants
    for rate in variant.learning_rates or (None,)
    for rest in variant.rest_learning_rates or (None,)
  ]
  names = [trial.name for trial in trials]
  if duplicates := {name for name in names if names.count(name) > 1}:
    raise UserError(f"the sweep has duplicate runs ({', '.join(sorted(duplicates))}); give each value once")
  return trials
