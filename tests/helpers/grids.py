"""Sweeps without training, and commands in this process or in their own."""

import contextlib
import importlib
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from absl import flags
from paths import ROOT
from tiny import ONE_DEVICE, ONE_DEVICE_QUICK, tiny_config

from experiments.common import children, sweep
from experiments.common.trials import BaseConfig, Variant, base_from_file
from switchlora_jax.runs import directory as run_directory
from switchlora_jax.runs.directory import flatten
from switchlora_jax.training.writers import JsonLinesWriter

FULL = Variant("full", {"method": "full"})
LORA = Variant("lora, rank 4", {"method": "lora"}, (1e-3, 1e-2, 1e-1))


def tiny_base(folder: Path, **changes) -> BaseConfig:
  """`tiny_config` over llama_tiny.py, as a base config with command-line overrides."""
  shared = base_from_file("llama_tiny", {}).config
  config = tiny_config(folder, **changes)
  default, keys = flatten(shared), flatten(config)
  overrides = {key: value for key, value in keys.items() if value != default[key]}
  return BaseConfig(str(ROOT / "configs" / "llama_tiny.py"), overrides, config)


def as_flags(base: BaseConfig) -> list[str]:
  """The flags of a base config, except its config file."""
  return [f"--config.{key}={value}" for key, value in base.overrides.items()]


def fake_text(fingerprint: str = "abc", **also: str) -> SimpleNamespace:
  """A dataset of which only the fingerprints are known, its own and those of `data.eval_also`."""
  further = tuple(SimpleNamespace(label=label, fingerprint=found) for label, found in also.items())
  return SimpleNamespace(fingerprint=fingerprint, also=further)


def write_run(workdir: Path, config, losses: dict[int, float], text=None) -> None:
  """The files of a run, {step: validation loss}, without any training or checkpoint."""
  tokenizer = workdir.parent / "some.model"
  run_directory.prepare(workdir, config)
  tokenizer.write_bytes(b"pieces")
  run_directory.record(workdir, config, SimpleNamespace(**vars(text or fake_text()), tokenizer_path=str(tokenizer)))
  log = JsonLinesWriter(workdir, 0)
  with np.errstate(over="ignore"):
    log.write([{"step": step, "val_loss": loss, "val_ppl": float(np.exp(loss))} for step, loss in losses.items()])
  log.close()


def curve(config, last: float) -> dict[int, float]:
  """{step: validation loss} that falls by 0.1 an evaluation to `last`."""
  steps = sorted({*range(config.eval_every, config.steps + 1, config.eval_every), config.steps})
  return {step: last + 0.1 * (len(steps) - 1 - i) for i, step in enumerate(steps)}


class Runs:
  """Stands in for the processes of trials.

  Attributes:
    started: names of the trials whose process was started, in order.
    losses: {name of a trial, or the beginning of it: last validation loss}; 3.0 where there is none.
    surface: from a trial to its last validation loss; if given, it replaces `losses`.
    broken: names of trials whose process fails.
    text: the data that they are trained on.
  """

  def __init__(self):
    self.started, self.losses, self.broken, self.text = [], {}, set(), fake_text()
    self.surface = None

  def open(self, command, stdout, **_):
    trial, workdir = command
    self.started.append(trial.name)
    if trial.name in self.broken:
      stdout.write("some words\nerror: what went wrong\n")
      return SimpleNamespace(pid=0, wait=lambda: 2)
    fitting = [name for name in self.losses if trial.name.startswith(name)]
    last = self.losses[max(fitting, key=len)] if fitting else 3.0
    last = self.surface(trial) if self.surface else last
    write_run(workdir, trial.config, curve(trial.config, last), self.text)
    return SimpleNamespace(pid=0, wait=lambda: 0)


def fake_runs(monkeypatch) -> Runs:
  """`Runs` in place of processes; no text is tokenised."""
  made = Runs()
  monkeypatch.setattr(sweep, "trial_command", lambda base, trial, workdir: (trial, workdir))
  monkeypatch.setattr(children, "subprocess", SimpleNamespace(Popen=made.open))
  monkeypatch.setattr(children, "share_cores", lambda pid, *share: None)
  monkeypatch.setattr(
    sweep, "prepare_datasets", lambda trials, quiet: dict.fromkeys((c.variant.label for c in trials), made.text)
  )
  return made


def command(name: str, *arguments, user_flags: bool = False) -> subprocess.CompletedProcess:
  """Run `python -m experiments.NAME` to its end; it compiles quickly, or with the flags that users have."""
  words = [sys.executable, "-m", f"experiments.{name}", *map(str, arguments)]
  environment = os.environ | (ONE_DEVICE if user_flags else ONE_DEVICE_QUICK)
  return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)


@contextlib.contextmanager
def imported(name: str, *arguments):
  """The module of a command with its flags parsed; they are taken away again, since commands share names of flags."""
  before, argv = set(flags.FLAGS), sys.argv
  sys.argv = [name, *map(str, arguments)]  # where the keys of --config are looked up
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", DeprecationWarning)  # of how ml_collections loads a config file
      module = importlib.import_module(f"experiments.{name}")
      flags.FLAGS(sys.argv)
    yield module
  finally:
    sys.argv = argv
    for flag in set(flags.FLAGS) - before:
      delattr(flags.FLAGS, flag)
    flags.FLAGS.unparse_flags()
    del sys.modules[f"experiments.{name}"]
