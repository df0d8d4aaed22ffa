"""How every command starts and fails: flags with help, and a user's mistake as one sentence."""

import contextlib
import logging
import os
import sys
import traceback
from pathlib import Path

import absl.logging
import jax
import ml_collections
from absl import app, flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from configs import base
from experiments.common import distributed
from switchlora_jax.errors import STOPPED, Stopped, UserError, to_stderr

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PARSERS = tuple(str(Path(package.__file__).parent) for package in (ml_collections, flags))


@contextlib.contextmanager
def mistakes_as_sentences():
  """What flags and ml_collections raise for a wrong flag, key, value or config file ends the program with exit 2."""
  try:
    yield
  except (UserError, flags.Error) as error:
    said, traced, trace = str(error).partition("Traceback (most recent call last):")  # which ml_collections quotes
    _fail(_of_config_file(error) or said + (trace.splitlines()[-1] if traced else ""))
  except Exception as error:  # a config file is code: it may raise anything
    _fail(_of_config_file(error) or _of_key(error))


def _of_config_file(error: BaseException | None) -> str | None:
  """The sentence for an error that comes out of a config file, which only `config_flags` calls, else None.

  ml_collections and absl raise something else in its place: it is looked for in all that led to `error`.
  """
  while error:
    frames = traceback.extract_tb(error.__traceback__)
    called = [n for n, frame in enumerate(frames) if frame.filename == config_flags.config_flags.__file__]
    inside = [f for f in frames[called[-1] :] if not f.filename.startswith((*PARSERS, "<frozen"))] if called else []
    if inside:
      line = f"{inside[0].filename}, line {inside[0].lineno}"
      return f"the config file failed at {line}: {type(error).__name__}: {error}; mend that line"
    error = error.__cause__ or error.__context__
  return None


def _of_key(error: Exception) -> str:
  """The sentence for what ml_collections raises of a key or a file."""
  if isinstance(error, AttributeError) and error.name == "get_config":
    return "the config file must define get_config(), and does not; see configs/llama_tiny.py"
  if isinstance(error, AttributeError | KeyError):  # it quotes its own message once or twice
    found = str(error).replace("\\n", " ").replace("\\'", "").replace("'", "").strip('"')
    return f"unknown config key: {found}; every key stands in configs/base.py"
  cause = error.__cause__ if "earlier failure to load" in str(error) else error
  return (
    f"--config could not be used: {cause}; name a file like configs/llama_tiny.py, and set keys as --config.rank=64"
  )


def define_config(name: str = "llama_tiny"):
  """The --config flag, with a file of configs/ as default; `--config.KEY=VALUE` sets one key."""
  with mistakes_as_sentences():  # overrides of the default's keys are looked up already here
    description = "config file; --config.KEY=VALUE sets one key, configs/base.py explains all"
    return config_flags.DEFINE_config_file("config", str(CONFIGS / f"{name}.py"), description)


def check_json(path: str | None):
  """Raise `UserError` unless --json, where it is given, is a file that can be written."""
  if path and (not os.access(Path(path).absolute().parent, os.W_OK) or os.path.isdir(path)):
    raise UserError(f"--json (={path!r}) must be a file in a directory that can be written; choose another")


def set_precision(config):
  """Let JAX have float64 where a config asks for it, and only there."""
  jax.config.update("jax_enable_x64", "float64" in (config.dtype, config.param_dtype))


def make_folder(path: Path) -> None:
  """Make a folder for results, where there is none.

  Raises:
    UserError: it cannot be made.
  """
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"the folder {path} cannot be made ({error.strerror}); choose another for the results") from error


def run(main, continues: bool = False):
  """Parse the flags and call `main()`; exit with a sentence: 2 on a `UserError`, 75 on `Stopped`, 130 on Ctrl-C.

  Args:
    continues: the same command goes on where it was stopped, rather than start anew; Ctrl-C says so.
  """
  app.run(lambda _: _ended(lambda: _guarded(main, continues)), flags_parser=_parse)


def _parse(argv):
  with mistakes_as_sentences():
    rest = flags.FLAGS(argv)
    if "config" in flags.FLAGS:
      _check_keys(flags.FLAGS.config, base.get_config())
    if rest[1:]:
      raise UserError(f"expected only --flags, found {' '.join(rest[1:])}; see --help")
    return rest


def _check_keys(found, expected: ConfigDict, section: str = ""):
  """Raise unless what a config file returned has the keys of configs/base.py, each with a value of its type.

  A file that could not be loaded says so when it is touched here.
  """
  if not isinstance(found, ConfigDict):
    getattr(found, "items", None)
    where = f"the config's {section.rstrip('.')}" if section else "what get_config() of the config file returns"
    raise UserError(f"{where} must be a ConfigDict; found {found!r:.60}; start from base.get_config()")
  if missing := [f"{section}{key}" for key in expected if key not in found]:
    raise UserError(f"the config has no {', '.join(missing)}; start from base.get_config(), which has every key")
  if unknown := [f"{section}{key}" for key in found if key not in expected]:
    raise UserError(f"unknown config key: {', '.join(unknown)}; every key stands in configs/base.py")
  for key, value in expected.items():
    kind = expected.get_type(key)
    if isinstance(value, ConfigDict):
      _check_keys(found[key], value, f"{section}{key}.")
    elif type(found[key]) not in (kind, int if kind is float else kind, type(value)):
      name, kind = f"{section}{key}", kind.__name__
      raise UserError(f"{name} (={found[key]!r:.60}) must be of type {kind}; set --config.{name}")


def _ended(command):
  """Call `command()`; one of several processes that fails does not wait for the others; told to stop, all end."""
  try:
    command()
  except BaseException as error:
    if getattr(error, "code", None) != STOPPED:
      distributed.exit_process(error)
    raise


def _guarded(main, continues: bool = False):
  absl.logging.set_verbosity(absl.logging.WARNING)
  absl.logging.get_absl_handler().setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
  try:
    main()
  except UserError as error:
    _fail(str(error))
  except Stopped as stopped:
    to_stderr(stopped)
    sys.exit(STOPPED)
  except OSError as error:
    what = f"{error.filename!r}" if error.filename else "a file or a connection"
    _fail(f"{what} could not be used: {error.strerror or error}; check the path, its permissions and the free space")
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    _fail(f"a device has not enough memory: {str(error)[:200]}; see what fits with experiments.plan")
  except KeyboardInterrupt:
    what = "stopped; the same command continues from what was saved, if anything was yet"
    to_stderr(what if continues else "interrupted")
    sys.exit(130)


def _fail(sentence: str):
  with contextlib.suppress(OSError):  # the disk of a log is full
    tqdm.write(f"error: {' '.join(sentence.split())}", file=sys.stderr)  # on a line of its own, whatever bar is shown
  sys.exit(2)
