"""How every command starts and fails: flags with help, and a user's mistake as one sentence."""

import contextlib
import logging
import sys
from pathlib import Path

import absl.logging
import jax
from absl import app, flags
from ml_collections import config_flags

from switchlora_jax.errors import STOPPED, Stopped, UserError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@contextlib.contextmanager
def mistakes_as_sentences():
  """What flags and ml_collections raise for a wrong flag, key, value or config file ends the program with exit 2."""
  try:
    yield
  except (AttributeError, KeyError) as error:  # ml_collections quotes its own message once or twice
    found = " ".join(str(error).replace("\\n", " ").replace("\\'", "").replace("'", "").strip('"').split())
    _fail(f"unknown config key: {found}; every key stands in configs/base.py")
  except (flags.Error, TypeError, ValueError, OSError, SyntaxError, ImportError) as error:
    cause = error.__cause__ if "earlier failure to load" in str(error) else error
    _fail(" ".join(str(cause).split()))


def define_config(name: str = "llama_tiny"):
  """The --config flag, with a file of configs/ as default; `--config.KEY=VALUE` sets one key."""
  with mistakes_as_sentences():  # overrides of the default's keys are looked up already here
    description = "config file; --config.KEY=VALUE sets one key, configs/base.py explains all"
    return config_flags.DEFINE_config_file("config", str(CONFIGS / f"{name}.py"), description)


def set_precision(config):
  """Let JAX have float64 where a config asks for it, and only there."""
  jax.config.update("jax_enable_x64", "float64" in (config.dtype, config.param_dtype))


def run(main):
  """Parse the flags and call `main()`; exit with a sentence: 2 on a `UserError`, 75 on `Stopped`, 130 on Ctrl-C."""
  app.run(lambda _: _guarded(main), flags_parser=_parse)


def _parse(argv):
  with mistakes_as_sentences():
    rest = flags.FLAGS(argv)
    if "config" in flags.FLAGS:
      flags.FLAGS.config.items()  # a file that could not be loaded says so when it is first touched
    if rest[1:]:
      raise ValueError(f"expected only --flags, found {' '.join(rest[1:])}; see --help")
    return rest


def _guarded(main):
  absl.logging.set_verbosity(absl.logging.WARNING)
  absl.logging.get_absl_handler().setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
  try:
    main()
  except UserError as error:
    _fail(str(error))
  except Stopped as stopped:
    sys.stderr.write(f"\n{stopped}\n")
    sys.exit(STOPPED)
  except KeyboardInterrupt:
    sys.stderr.write("\nstopped; the same command continues from the last checkpoint, if one was saved yet\n")
    sys.exit(130)


def _fail(sentence: str):
  sys.stderr.write(f"error: {sentence}\n")
  sys.exit(2)
