"""Runs the training command with a fault in it: `python tests/faults/inject.py MODULE:FUNCTION[=ARGUMENT] --flags`.

The function is defined in a test module. It is called first, with the argument as a string if there is one, and patches
the code that should fail. Then the command runs as usual.
"""

import importlib
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main(fault: str):
  """Calls the function of the fault, then runs the command."""
  sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent / "helpers"), str(HERE)]
  name, _, argument = fault.partition("=")
  module, _, function = name.partition(":")
  getattr(importlib.import_module(module), function)(*([argument] if argument else []))
  runpy.run_module("experiments.pretrain", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
  main(sys.argv.pop(1))
