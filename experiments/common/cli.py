"""Start-up and error handling of all commands: flags with help texts, and a user's mistake as one sentence."""

import contextlib
import io
import logging
import os
import sys
import traceback
from collections.abc import Collection
from pathlib import Path

import absl.logging
import jax
import ml_collections
from absl import app, flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from configs import base
from experiments.common import compiled_programs, distributed
from switchlora_jax.errors import STOPPED, Stopped, UserError, to_stderr
from switchlora_jax.runs.directory import flatten

flags.disclaim_key_flags()  # the flags that this module defines are listed by --help of the command that calls it
ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
PARSERS = tuple(str(Path(package.__file__).parent) for package in (ml_collections, flags))


@contextlib.contextmanager
def exit_on_flag_errors():
  """Exit with code 2 and one sentence on an invalid flag, config key, value or config file.

  Handles all exceptions that absl, ml_collections and the config file raise.
  """
  try:
    yield
  except (UserError, flags.Error) as error:
    head, traced, trace = str(error).partition("Traceback (most recent call last):")  # quoted by ml_collections
    _exit_with_error(_config_file_error(error) or head + (trace.splitlines()[-1] if traced else ""))
  except Exception as error:  # a config file is code: it may raise anything
    _exit_with_error(_config_file_error(error) or _config_key_error(error))


def _config_file_error(error: BaseException | None) -> str | None:
  """The sentence for an error raised inside a config file, which only `config_flags` runs; else None.

  ml_collections and absl replace the original exception, so the whole chain that led to `error` is searched.
  """
  while error:
    frames = traceback.extract_tb(error.__traceback__)
    called = [n for n, frame in enumerate(frames) if frame.filename == config_flags.config_flags.__file__]
    inside = [f for f in frames[called[-1] :] if not f.filename.startswith((*PARSERS, "<frozen"))] if called else []
    if inside:
      line = f"{inside[0].filename}, line {inside[0].lineno}"
      return f"the config file failed at {line}: {type(error).__name__}: {error}; fix that line"
    error = error.__cause__ or error.__context__
  return None


def _config_key_error(error: Exception) -> str:
  """The sentence for an error that ml_collections raises for a config key or a config path."""
  if isinstance(error, AttributeError) and error.name == "get_config":
    return "the config file must define get_config(), but does not; see configs/llama_tiny.py"
  if isinstance(error, AttributeError | KeyError):  # the message is quoted once or twice
    found = str(error).replace("\\n", "; ").replace("\\'", "").replace("'", "").strip('"')
    return f"unknown config key: {found}; configs/base.py lists all keys"
  cause = error.__cause__ if "earlier failure to load" in str(error) else error
  return (
    f"--config could not be loaded: {cause}; give a file such as configs/llama_tiny.py, and set keys as in "
    "--config.rank=64"
  )


def define_config(name: str = "llama_tiny"):
  """Define the --config flag with `configs/{name}.py` as its default; `--config.KEY=VALUE` sets one key."""
  with exit_on_flag_errors():  # overrides of the default's keys are already looked up here
    description = "config file; --config.KEY=VALUE sets one key; configs/base.py documents all keys"
    return config_flags.DEFINE_config_file("config", str(CONFIGS / f"{name}.py"), description)


def given_keys(config: ConfigDict, overrides: Collection[str] | None = None) -> set[str]:
  """The keys that a warm start does not set: those of the command line, and some that the config file changes.

  A config file selects sizes for training from scratch. Its rotary positions, untied head and tokenizer count as given.

  Args:
    overrides: keys in place of those of the command line.
  """
  if overrides is None:
    overrides = config_flags.get_override_values(flags.FLAGS["config"])
  now, then = flatten(config), flatten(base.get_config())
  kept = ("model.rope.", "model.max_position", "model.tied_embeddings", "data.tokenizer")
  return {key for key in now if key.startswith(kept) and now[key] != then.get(key)} | set(overrides)


def define_quiet():
  """Define the --quiet flag of commands that take long."""
  flags.DEFINE_bool("quiet", False, "print only warnings, errors and the final results: no progress, no descriptions")


def check_json(path: str | None):
  """Raise `UserError` if --json is given and is not a writable file path."""
  if path and (not os.access(Path(path).absolute().parent, os.W_OK) or os.path.isdir(path)):
    raise UserError(f"--json (={path!r}) must be a file in a writable directory; choose another path")


def set_precision(config):
  """Enable float64 in JAX if and only if a dtype of the config needs it."""
  jax.config.update("jax_enable_x64", "float64" in (config.dtype, config.param_dtype))


def make_folder(path: Path) -> None:
  """Create a folder for results, with its parents, unless it exists.

  Raises:
    UserError: the folder cannot be created.
  """
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"cannot create the folder {path} ({error.strerror}); choose another for the results") from error


def run(main, continues: bool = False):
  """Parse the flags, call `main()` and exit; errors become a sentence on stderr.

  Exit codes: 2 on a `UserError`, 75 on `Stopped`, 130 on Ctrl-C.

  Args:
    continues: whether the same command continues where it stopped; if so, the message on Ctrl-C mentions it.
  """
  compiled_programs.define_flag()
  if isinstance(sys.stdout, io.TextIOWrapper):  # not that of a notebook
    sys.stdout.reconfigure(line_buffering=True)  # a log of stdout and stderr has the lines in the order of printing
  app.run(lambda _: _end_process(lambda: _exit_on_errors(lambda: _start(main), continues)), flags_parser=_parse_flags)


def _start(main):
  config = flags.FLAGS.config if "config" in flags.FLAGS else base.get_config()
  compiled_programs.enable(config.data.cache_dir)
  main()


def _parse_flags(argv):
  with exit_on_flag_errors():
    rest = flags.FLAGS(argv)
    if "config" in flags.FLAGS:
      _check_config_keys(flags.FLAGS.config, base.get_config())
    if rest[1:]:
      raise UserError(f"expected only --flags, found {' '.join(rest[1:])}; see --help")
    return rest


def _check_config_keys(found, expected: ConfigDict, section: str = ""):
  """Raise `UserError` unless a config has exactly the keys of configs/base.py, each with a value of its type."""
  if not isinstance(found, ConfigDict):
    getattr(found, "items", None)  # a placeholder for a file that failed to load raises its error here
    where = f"the config's {section.rstrip('.')}" if section else "the return value of the config file's get_config()"
    raise UserError(f"{where} must be a ConfigDict; found {found!r:.60}; start from base.get_config()")
  if missing := [f"{section}{key}" for key in expected if key not in found]:
    raise UserError(f"the config has no {', '.join(missing)}; start from base.get_config(), which has every key")
  if unknown := [f"{section}{key}" for key in found if key not in expected]:
    raise UserError(f"unknown config key: {', '.join(unknown)}; configs/base.py lists all keys")
  for key, value in expected.items():
    kind = expected.get_type(key)
    if isinstance(value, ConfigDict):
      _check_config_keys(found[key], value, f"{section}{key}.")
    elif type(found[key]) not in (kind, int if kind is float else kind, type(value)):
      name, kind = f"{section}{key}", kind.__name__
      raise UserError(f"{name} (={found[key]!r:.60}) must be of type {kind}; set --config.{name}")


def _end_process(command):
  """Call `command()`; on an error, end this process without waiting for the others, except after a graceful stop."""
  try:
    command()
  except BaseException as error:
    if getattr(error, "code", None) != STOPPED:
      distributed.exit_process(error)
    raise


def _exit_on_errors(main, continues: bool = False):
  """Call `main()`; turn errors that a user can fix into a sentence and an exit code, see `run`."""
  absl.logging.set_verbosity(absl.logging.WARNING)
  absl.logging.get_absl_handler().setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
  sys.unraisablehook = _report_unraisable
  try:
    main()
  except UserError as error:
    _exit_with_error(str(error))
  except Stopped as stopped:
    to_stderr(stopped)
    sys.exit(STOPPED)
  except OSError as error:
    what = f"{error.filename!r}" if error.filename else "a file or a connection"
    _exit_with_error(
      f"{what} could not be used: {error.strerror or error}; check the path, its permissions and the free space"
    )
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    _exit_with_error(f"a device is out of memory: {str(error)[:200]}; experiments.plan shows which settings fit")
  except (RuntimeError, AssertionError) as error:
    if not _is_backend_failure(error):
      raise
    wanted, found = os.environ.get("JAX_PLATFORMS", ""), str(error).partition(" (set JAX_PLATFORMS")[0]
    _exit_with_error(
      f"JAX must find a device of JAX_PLATFORMS (={wanted!r}); {found.rstrip('.') or 'it finds none'}; for a GPU, "
      "install requirements-gpu.txt and check nvidia-smi; for any device that JAX finds, unset JAX_PLATFORMS"
    )
  except KeyboardInterrupt:
    to_stderr("stopped; the same command continues from the last saved state, if any" if continues else "interrupted")
    sys.exit(130)


def _is_backend_failure(error: Exception) -> bool:
  """Whether JAX failed to find a device of JAX_PLATFORMS. Without a GPU, it raises an AssertionError without text."""
  return traceback.extract_tb(error.__traceback__)[-1].filename.endswith("xla_bridge.py")


def _report_unraisable(unraisable):
  """Python's hook, without the exceptions that tensorstore raises per array when a save fails."""
  if str(unraisable.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(unraisable)


def _exit_with_error(sentence: str):
  """Print one line on stderr, below any progress bar, and exit with code 2."""
  with contextlib.suppress(OSError):  # stderr may be a log on a full disk
    tqdm.write(f"error: {' '.join(sentence.split())}", file=sys.stderr)
  sys.exit(2)
