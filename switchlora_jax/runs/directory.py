"""What a run leaves in its `--workdir` besides checkpoints: config, tokenizer, and the rules for continuing."""

import contextlib
import json
import logging
import platform
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import jax
from ml_collections import ConfigDict, FrozenConfigDict

from switchlora_jax.errors import UserError
from switchlora_jax.runs import lock
from switchlora_jax.runs.files import replace_text, write_bytes

log = logging.getLogger(__name__)
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "sentencepiece")
KEYS = {"config", "data_fingerprint", "versions", "devices", "git_revision"}  # of config.json

# What may differ when a run is continued: none of it changes what the run computes, but the layout the order of sums.
FREE = (
  "eval_every",
  "checkpoint_every",
  "keep_checkpoints",
  "log_every",
  "max_skipped",
  "spike.max_rollbacks",
  "hang_seconds",
  "data.cache_dir",
  "data.epochs",
  *(f"sharding.{key}" for key in ("fsdp", "trained", "optimizer", "frozen", "candidates")),
)


def prepare(workdir: Path, config) -> None:
  """Make sure that `workdir` can be written and holds no other run.

  A larger `steps` than before is allowed: it extends a run, with a warning, since the schedules then
  have another horizon than the steps already done.

  Raises:
    UserError: not writable, or it holds a run with another config; names the keys.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    probe = workdir / ".writable"
    probe.touch()
    probe.unlink()
  except OSError as error:
    raise UserError(f"--workdir={workdir} cannot be written ({error.strerror}); choose a directory that can") from error
  saved = read(workdir)
  if saved is None:
    if (workdir / "checkpoints").exists():
      raise UserError(f"--workdir={workdir} has checkpoints but no config.json to say of what; choose a new --workdir")
    return
  _check_same_run(workdir, saved, config)
  for what, now in (versions() | {"devices": devices()}).items():
    if (then := (saved["versions"] | saved)[what]) != now:
      log.warning("%s: %s when this run started and %s now; the rest may differ in its bits", what, then, now)


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[None]:
  """While no other run trains in `workdir`, which was prepared; those that only read it need not ask.

  Every process of a run calls it, process 0 first: each has a lock of its own, so that one that outlived its run is
  found as well.

  Raises:
    UserError: another one does; says which process.
  """
  here = jax.process_index()
  with contextlib.ExitStack() as stack:
    try:
      stack.enter_context(lock.alone(workdir, wait=False, name=f"{lock.NAME}.{here}" if here else lock.NAME))
      for other in [] if here else workdir.glob(f"{lock.NAME}.*"):  # of a run with any number of processes
        with lock.alone(workdir, wait=False, name=other.name):
          pass
    except lock.Taken as holder:
      raise UserError(
        f"another run trains in --workdir={workdir} ({holder}); wait until it ends, end it, or choose a new --workdir"
      ) from None
    except OSError as error:  # some file systems of clusters
      if not here:
        log.warning("%s cannot be locked (%s); see that no other run trains in it", workdir, error.strerror)
    yield


def _check_same_run(workdir: Path, saved: dict, config):
  changed = differences(saved["config"], config.to_dict())
  if saved["config"]["data"]["source"] == config.data.source == "prepared":  # it may lie elsewhere: `record` knows it
    changed = [change for change in changed if not change.startswith("data.path:")]
  if not changed:
    return
  then, now = saved["config"]["steps"], config.steps
  if now > then and all(change.startswith("steps:") for change in changed):
    log.warning("extending the run from %d to %d steps: learning rate and switching follow the new horizon", then, now)
    return
  raise another_run(f"--workdir={workdir}", changed)


def another_run(where, changed: list[str]) -> UserError:
  """The sentence for a directory that holds a run whose config has `changed`, as from `differences`."""
  return UserError(
    f"{where} holds a run with another config ({'; '.join(changed)}); "
    f"choose a new --workdir, or set these keys as they were to continue it"
  )


def read(workdir: Path) -> dict | None:
  """The contents of config.json, or None where there is none."""
  path = workdir / "config.json"
  if not path.exists():
    return None
  try:
    saved = json.loads(path.read_text())
    if missing := KEYS - (saved.keys() if isinstance(saved, dict) else set()):
      raise ValueError(f"it has no {', '.join(sorted(missing))}")
    return saved
  except ValueError as error:
    raise UserError(
      f"{path} is not the JSON that a run writes ({error}); restore it, or name another directory"
    ) from error


def check_is_run(named: str, directory: Path, *parts: str) -> None:
  """Raise `UserError` unless the directory, which a user `named` so, holds config.json and these parts of a run."""
  *first, last = "config.json", *parts
  if not all((directory / part).exists() for part in (*first, last)):
    raise UserError(
      f"{named} must be the directory of a run, with its {', '.join(first)} and {last}; "
      f"{'they are not there' if directory.is_dir() else 'there is no such directory'}; give the --workdir of a run"
    )


def record(workdir: Path, config, dataset) -> None:
  """Write config.json and the tokenizer of a new run, once its data are known; check those of an old one.

  Raises:
    UserError: the run was started on other data.
  """
  saved = read(workdir)
  check_same_data(workdir, saved, dataset.fingerprint)
  if not saved:
    write_bytes(workdir / "tokenizer.model", Path(dataset.tokenizer_path).read_bytes())
    now = {"versions": versions(), "devices": devices(), "git_revision": git_revision()}
    _write(workdir, {"config": config.to_dict(), "data_fingerprint": dataset.fingerprint} | now)


def check_same_data(workdir: Path, saved: dict | None, fingerprint: str) -> None:
  """Raise `UserError` where the run that lies in `workdir`, if any does, was started on other data than these."""
  if saved and saved["data_fingerprint"] != fingerprint:
    raise UserError(
      f"the data are not those that the run in {workdir} was started on (fingerprint {fingerprint}, then "
      f"{saved['data_fingerprint']}); restore the files, the packages and the code of then (git revision "
      f"{saved['git_revision']}), or choose a new --workdir"
    )


def check_shared(workdir: Path) -> None:
  """Raise `UserError` unless this process sees what process 0 has recorded."""
  if read(workdir) is None:
    raise UserError(
      f"--workdir={workdir} holds no config.json here, though process 0 has written one; all processes must share "
      f"the file system of the run: choose a --workdir that they all see under this name"
    )


def update(workdir: Path, config) -> None:
  """Let config.json say what the checkpoint about to be saved was trained with, where a run was extended."""
  saved = read(workdir)
  if saved is None:
    raise UserError(f"{workdir / 'config.json'} was removed under the run; put it back, and the same command continues")
  if saved["config"] != config.to_dict():
    _write(workdir, saved | {"config": config.to_dict(), "git_revision": git_revision()})


def _write(workdir: Path, contents: dict):
  replace_text(workdir / "config.json", json.dumps(contents, indent=2) + "\n")


def devices() -> str:
  """How many of which kind: another number sums in another order."""
  return f"{jax.device_count()} × {jax.devices()[0].device_kind}"


def versions() -> dict[str, str]:
  """Of Python and of the packages that can change a number."""
  return {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}


def git_revision() -> str | None:
  """The commit of the code that runs, or None outside a repository."""
  try:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    return None


def flatten(config) -> dict:
  """{"model.hidden_size": 128, …}"""
  flat = {}
  for key, value in config.items():
    nested = isinstance(value, (dict, ConfigDict, FrozenConfigDict))
    flat |= {f"{key}.{k}": v for k, v in flatten(value).items()} if nested else {key: value}
  return flat


def differences(old: dict, new: dict) -> list[str]:
  """Keys whose change makes another run, as `key: old → new`; both are plain dicts of resolved configs."""
  old, new = flatten(old), flatten(new)
  keys = sorted((old.keys() | new.keys()) - set(FREE))
  return [f"{key}: {old.get(key)!r} → {new.get(key)!r}" for key in keys if old.get(key) != new.get(key)]
