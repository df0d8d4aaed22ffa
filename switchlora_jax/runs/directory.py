"""The directory of a run: config.json, tokenizer, lock, the rules for continuing it, and reading it as a saved run.

Checkpoints are in `runs.checkpoint`, metrics.jsonl in `training.metrics`.
"""

import contextlib
import json
import logging
import platform
import re
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import ConfigDict, FrozenConfigDict

from switchlora_jax.errors import UserError
from switchlora_jax.runs import manifest
from switchlora_jax.runs.files import LOCK_NAME, LockTaken, exclusive_lock, replace_text
from switchlora_jax.runs.tokenizer_files import keep_tokenizer, tokenizer_in

log = logging.getLogger(__name__)
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "sentencepiece", "tokenizers")
# The keys of config.json, and the types of their values.
KEYS = {"config": dict, "data_fingerprint": str, "versions": dict, "devices": str, "git_revision": (str, type(None))}

# Written to config.json as `schedule`; runs from before there was one have 1. In 1, `min_lr_ratio` was a lower bound of
# the learning rate for these methods, in 2 it is the end of the cosine for all.
SCHEDULE_VERSION, LOWER_BOUND_METHODS = 2, ("full", "lora", "switchlora")

# Config keys that earlier runs do not have, with the values that they trained with; see `with_added_keys`.
ADDED = {
  "profile_steps": 0,
  "data": {"field": "text", "bad_rows": "stop", "packing": "pack", "mixture": "", "eval_also": ""},
  "schedule": {"name": "cosine", "decay_share": 0.2},
  "optimizer": {"name": "adam", "b1": 0.9, "b2": 0.999, "weight_decay": 0.0},
  "galore": {"directions": "svd", "random_share": 0.2},
  "switch": {
    "candidates": "stored",
    "decay": "exponential",
    "start": 0,
    "slots": "sequential",
    "min_age": 40,
    "snr_below": 1.0,
  },
  "model": {
    "norm_eps": 1e-6,
    "tied_embeddings": False,
    "qkv_bias": False,
    "qk_norm": False,
    "rope": {
      "base": 10_000.0,
      "scaling": "none",
      "factor": 1.0,
      "original_length": 0,
      "low_freq_factor": 1.0,
      "high_freq_factor": 4.0,
      "beta_fast": 32.0,
      "beta_slow": 1.0,
      "attention_factor": None,
    },
  },
}

# Sections of methods that were added later. A run without one did not use it, and its settings are not compared.
LATER_SECTIONS = ("fira", "apollo", "apollo_mini", "frugal", "ldadam", "sltrain", "factored")

# Config keys that distribute a step of `batch_size` sequences over devices and micro-batches: only the order of sums
# changes with them.
LAYOUT = ("accumulation", *(f"sharding.{key}" for key in ("fsdp", "trained", "optimizer", "frozen", "candidates")))

# Config keys that may change on resume, because they do not change what the run computes.
FREE = (
  "eval_every",
  "checkpoint_every",
  "keep_checkpoints",
  "log_every",
  "max_skipped",
  "spike.max_rollbacks",
  "hang_seconds",
  "profile_steps",
  "data.cache_dir",
  "data.epochs",
  "data.bad_rows",
  "data.eval_also",
  *LAYOUT,
)


def prepare(workdir: Path, config) -> None:
  """Checks that `workdir` is writable and holds no run with another config; creates it if needed.

  A larger `steps` is allowed: it extends the run, with a warning, because the steps already done used
  schedules over fewer steps.

  Raises:
    UserError: the directory is not writable, or it holds a run with another config; the message names the keys.
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
      raise UserError(
        f"--workdir={workdir} has checkpoints but no config.json; restore that file, or choose a new --workdir"
      )
    return
  _check_same_run(workdir, saved, config)
  for name, now in (versions() | {"devices": devices()}).items():
    # Runs from before a package was recorded did not depend on it.
    if (before := (saved["versions"] | saved).get(name, now)) != now:
      log.warning("%s: %s when this run started and %s now; results may differ in the last bits", name, before, now)


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
  """Holds the lock of a run that trains in `workdir`; reading a run needs no lock.

  Every process of a run calls it, process 0 first. Each process has a lock of its own, so that a process that is still
  alive after its run is detected as well.

  Raises:
    UserError: another run trains there; the message names its process.
  """
  here = jax.process_index()
  with contextlib.ExitStack() as stack:
    try:
      stack.enter_context(exclusive_lock(workdir, wait=False, name=f"{LOCK_NAME}.{here}" if here else LOCK_NAME))
      for other in [] if here else workdir.glob(f"{LOCK_NAME}.*"):  # of a run with any number of processes
        with exclusive_lock(workdir, wait=False, name=other.name):
          pass
    except LockTaken as holder:
      raise UserError(
        f"another run trains in --workdir={workdir} ({holder}); wait until it ends, end it, or choose a new --workdir"
      ) from None
    except OSError as error:  # some network file systems have no locks
      if not here:
        log.warning("%s cannot be locked (%s); make sure that no other run trains in it", workdir, error.strerror)
    yield


def _check_same_run(workdir: Path, saved: dict, config):
  changed = changed_keys(f"--workdir={workdir}", saved, config)
  if not changed:
    return
  before, now = saved["config"]["steps"], config.steps
  if all(change.startswith("steps:") for change in changed) and isinstance(before, int) and now > before:
    log.warning("extending the run from %d to %d steps: the schedules now span the new number of steps", before, now)
    return
  raise another_run(f"--workdir={workdir}", changed)


def changed_keys(where, saved: dict, config) -> list[str]:
  """The changed keys that make `config` another run than the saved one, as from `differences`; empty if none does.

  `data.path` of prepared data, `data.tokenizer` and the texts of `data.mixture` are not compared, because the files may
  have moved: `check_same_data` compares the data. Earlier versions did not set the tokenizer of a warm start.

  Args:
    where: how messages name the directory of the saved run.
    saved: its config.json.
    config: the resolved config to compare.
  Raises:
    UserError: another version of the code made the run, with other keys or with another meaning of `min_lr_ratio`.
  """
  then, now = flatten(saved["config"]), flatten(config)
  ratio, earlier = then.get("min_lr_ratio"), saved.get("schedule", 1) < 2
  if earlier and then.get("method") in LOWER_BOUND_METHODS and ratio not in (None, 0):
    raise UserError(
      f"{where} holds a run of an earlier version, in which min_lr_ratio (={ratio}) was a lower bound of the learning "
      f"rate and not the end of its cosine; continue it with the code that made it (git revision "
      f"{saved['git_revision']}), or choose a new --workdir"
    )
  changed = differences(saved["config"], config.to_dict())
  if then.get("data.source") == now["data.source"] == "prepared":
    changed = [change for change in changed if not change.startswith("data.path:")]
  if now["data.tokenizer"] and (then.get("data.tokenizer") or now["warm_start_from"]):
    changed = [change for change in changed if not change.startswith("data.tokenizer:")]
  if then.get("data.mixture") and now["data.mixture"]:
    changed = [change for change in changed if not change.startswith("data.mixture:")]
  keys = {change.partition(":")[0] for change in changed}
  if changed and (keys := sorted(keys & (then.keys() ^ now.keys()))):
    raise UserError(
      f"{where} holds a run of another version of the code, whose config differs in the keys {', '.join(keys)}; "
      f"continue it with the code that made it (git revision {saved['git_revision']}), or choose a new --workdir"
    )
  return changed


def another_run(where, changed: list[str]) -> UserError:
  """The error for a directory that holds a run with another config; `changed` is from `differences`."""
  return UserError(
    f"{where} holds a run with another config ({'; '.join(changed)}); "
    f"choose a new --workdir, or set these keys as they were to continue it"
  )


def read(workdir: Path) -> dict | None:
  """The contents of config.json, or None if there is no such file."""
  path = workdir / "config.json"
  if not path.exists():
    return None
  try:
    saved = json.loads(path.read_bytes())  # decodes by the BOM that an editor may have added
    if missing := KEYS.keys() - (saved.keys() if isinstance(saved, dict) else set()):
      raise ValueError(f"it has no {', '.join(sorted(missing))}")
    if wrong := [key for key, kind in KEYS.items() if not isinstance(saved[key], kind)]:
      raise ValueError(f"{wrong[0]} is {saved[wrong[0]]!r:.40}")
    if not re.match(r"\d+ ", saved["devices"]):
      raise ValueError(f"devices is {saved['devices']!r:.40}, without their number")
    return saved | {"config": with_added_keys(saved["config"])}
  except ValueError as error:
    raise UserError(
      f"{path} is not the JSON that a run writes ({error}); restore it, or name another directory"
    ) from error


def with_added_keys(config: dict) -> dict:
  """A saved config with the keys that later versions of the code added, at the values with which it was trained."""
  added = {
    "rest_learning_rate": config.get("learning_rate"),
    "warm_start_rest_learning_rate": config.get("warm_start_learning_rate"),
    "optimizer": {
      "eps": 1e-6 if config.get("method") == "galore" else 1e-8,
      "moments_dtype": config.get("param_dtype"),
    },
    "model": _attention_keys(config.get("model"), config.get("seq_len")),
  }
  config = dict(config)
  switch = config.get("switch")
  if isinstance(switch, dict) and isinstance(switch.get("reset"), bool):  # before there was `state`
    switch = dict(switch)
    config["switch"] = {"state": "reset" if switch.pop("reset") else "keep"} | switch
  for keys in (ADDED, added):
    for key, value in keys.items():
      found = config.get(key, {} if isinstance(value, dict) else value)
      config[key] = value | found if isinstance(value, dict) and isinstance(found, dict) else found
  return config


def _attention_keys(model, seq_len) -> dict:
  """The keys of a saved `config.model` that follow from its sizes, as `switchlora_jax.config` fills them in."""
  hidden, heads = (model.get(key) if isinstance(model, dict) else None for key in ("hidden_size", "num_heads"))
  if not (isinstance(hidden, int) and isinstance(heads, int) and heads > 0):
    return {}  # the check of the missing or wrong size follows
  return {"num_kv_heads": heads, "head_dim": hidden // heads, "max_position": seq_len}


def check_is_run(named: str, directory: Path, *parts: str) -> None:
  """Raises `UserError` unless the directory holds config.json and the given parts of a run.

  Args:
    named: how the user named the directory, for example `--run=runs/tiny`.
    parts: names of files or folders, for example `checkpoints`.
  """
  *first, last = "config.json", *parts
  if not all((directory / part).exists() for part in (*first, last)):
    raise UserError(
      f"{named} must be the directory of a run, with its {', '.join(first)} and {last}; "
      f"{'they are not there' if directory.is_dir() else 'there is no such directory'}; give the --workdir of a run"
    )


def record(workdir: Path, config, dataset) -> None:
  """Writes config.json and the tokenizer of a new run; compares the data fingerprints of an existing one.

  Raises:
    UserError: see `check_same_data`.
  """
  saved = read(workdir)
  check_same_data(workdir, saved, dataset)
  known = saved.get("eval_also", {}) if saved else {}
  further = {text.label: text.fingerprint for text in dataset.also}
  if saved and further.keys() - known.keys():
    _write(workdir, saved | {"eval_also": known | further})
  if not saved:
    keep_tokenizer(Path(dataset.tokenizer_path), workdir)
    environment = {"versions": versions(), "devices": devices(), "git_revision": git_revision()}
    environment["schedule"] = SCHEDULE_VERSION
    fingerprints = {"data_fingerprint": dataset.fingerprint, "eval_also": further}
    _write(workdir, {"config": config.to_dict()} | fingerprints | environment)


def check_same_data(workdir: Path, saved: dict | None, dataset) -> None:
  """Checks that the run in `workdir` was started on this data, and evaluated on these texts of `data.eval_also`.

  Args:
    saved: config.json of the run; None if there is none.

  Raises:
    UserError: it was started on other data, or a text of `data.eval_also` has changed.
  """
  if not saved:
    return
  if (then := saved["data_fingerprint"]) != dataset.fingerprint:
    raise UserError(
      f"the run in {workdir} was started on other data (fingerprint {then}, now {dataset.fingerprint}); "
      f"restore the files, the packages and the code that it was started with (git revision {saved['git_revision']}), "
      f"or choose a new --workdir"
    )
  for label, then, now in changed_texts(saved, dataset):
    raise UserError(
      f"the text of --config.data.eval_also={label} is not the one that the run in {workdir} was evaluated on "
      f"(fingerprint {then}, now {now}); restore it, or give this text another name"
    )


def changed_texts(saved: dict, dataset) -> list[tuple[str, str, str]]:
  """(name, fingerprint then, fingerprint now) of each text of `data.eval_also` that is not that of a run.

  Args:
    saved: with the fingerprints of the run under `eval_also`.
  """
  known = saved.get("eval_also", {})
  found = [(text.label, known.get(text.label, text.fingerprint), text.fingerprint) for text in dataset.also]
  return [(label, then, now) for label, then, now in found if then != now]


def check_shared(workdir: Path) -> None:
  """Raises `UserError` unless this process sees the config.json that process 0 wrote."""
  if read(workdir) is None:
    raise UserError(
      f"--workdir={workdir} holds no config.json here, though process 0 has written one; all processes must share "
      f"the file system of the run: choose a --workdir that they all see under this name"
    )


def update(workdir: Path, config) -> None:
  """Updates config.json if the run was extended, before a checkpoint of the new config is saved."""
  saved = read(workdir)
  if saved is None:
    raise UserError(
      f"{workdir / 'config.json'} was removed while the run trained; put it back, and the same command continues"
    )
  if saved["config"] != config.to_dict():
    _write(workdir, saved | {"config": config.to_dict(), "git_revision": git_revision()})


def _write(workdir: Path, contents: dict):
  replace_text(workdir / "config.json", json.dumps(contents, indent=2) + "\n")


def devices() -> str:
  """Number and kind of devices; the order of sums depends on the number."""
  return f"{jax.device_count()} × {jax.devices()[0].device_kind}"


def versions() -> dict[str, str]:
  """Versions of Python and of the packages that can change results."""
  return {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}


def git_revision() -> str | None:
  """The git commit of this code, or None if it is not tracked by git, as in an installed package.

  An installed package may lie in the repository of another project, in whose .venv it is.
  """
  source = Path(__file__)
  git = lambda *words: subprocess.check_output(
    ["git", "-C", str(source.parent), *words], stderr=subprocess.DEVNULL, text=True
  )
  try:
    git("ls-files", "--error-unmatch", source.name)
    return git("describe", "--always", "--dirty", "--abbrev=40").strip()
  except (OSError, subprocess.CalledProcessError):
    return None


def flatten(config) -> dict:
  """{"model.hidden_size": 128, …}: the leaves of a nested config under dotted keys."""
  flat = {}
  for key, value in config.items():
    nested = isinstance(value, (dict, ConfigDict, FrozenConfigDict))
    flat |= {f"{key}.{k}": v for k, v in flatten(value).items()} if nested else {key: value}
  return flat


def differences(old: dict, new: dict) -> list[str]:
  """Changed keys that make it another run, as `key: old → new`; both arguments are dicts of resolved configs.

  Those of `LATER_SECTIONS` that the old config lacks as a whole are not compared.
  """
  old, new = flatten(old), flatten(new)
  section = lambda key: key.partition(".")[0]
  absent = set(LATER_SECTIONS) - set(map(section, old))
  later = {key for key in new if section(key) in absent}
  keys = sorted((old.keys() | new.keys()) - later - set(FREE))
  return [f"{key}: {old.get(key)!r} → {new.get(key)!r}" for key in keys if old.get(key) != new.get(key)]


class SavedRun(NamedTuple):
  """The directory of a run that is only read.

  Attributes:
    directory: the --workdir of the run.
    config: its resolved config, as it was saved.
    fingerprint: of its training data.
    devices: number of devices that it was started on.
    revision: git commit of the code that started it or saved it last, or None.
    steps: the steps that have a checkpoint, in ascending order; at least one.
  """

  directory: Path
  config: FrozenConfigDict
  fingerprint: str
  devices: int
  revision: str | None
  steps: list[int]

  @property
  def tokenizer(self) -> Path:
    """The tokenizer of its token ids, see `data.tokenizer.load_tokenizer`."""
    return tokenizer_in(self.directory)

  @property
  def architecture(self) -> dict:
    """The keys of `config.model`."""
    with self.missing_key_as_error():
      return self.config.model.to_dict()

  def alone(self) -> "SavedRun":
    """The same run with the sharding of a single device."""
    with self.missing_key_as_error():
      layout = self.config.sharding.to_dict() | {"fsdp": 1, "frozen": "replicated"}
    return self._replace(config=FrozenConfigDict(self.config.to_dict() | {"sharding": layout}))

  def check_step(self, step: int, flag: str) -> None:
    """Raises `UserError` unless there is a checkpoint of `step`, the value of the command line's `flag`."""
    if step not in self.steps:
      raise UserError(
        f"{flag} (={step}) must be a step of which the run in {self.directory} has a checkpoint: "
        f"{', '.join(map(str, self.steps))}; name one of them, or none for the newest"
      )

  @contextlib.contextmanager
  def missing_key_as_error(self) -> Iterator[None]:
    """Turns a lookup of a key that the saved config lacks into a `UserError` with the key and the git revision."""
    try:
      yield
    except (AttributeError, KeyError) as error:
      raise UserError(
        f"the run in {self.directory} was made by another version of the code: a key of its config is missing "
        f"({error}); read it with the code that made it (git revision {self.revision})"
      ) from error


def open_run(directory: Path) -> SavedRun:
  """Opens the directory of a run for reading.

  Raises:
    UserError: it does not hold a run, or nothing was saved yet.
  """
  check_is_run(f"{directory}", directory, tokenizer_in(directory).name)
  saved = read(directory)
  if not (steps := manifest.finished(directory / "checkpoints")):
    raise UserError(f"the run in {directory} has saved no checkpoint yet; let it train longer")
  devices = int(saved["devices"].split()[0])
  config = FrozenConfigDict(saved["config"])
  return SavedRun(directory, config, saved["data_fingerprint"], devices, saved["git_revision"], steps)
