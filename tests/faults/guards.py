"""Breaks each guard of `guards.toml`, one at a time in a copy of the code, and verifies that its test fails.

python tests/faults/guards.py            # all guards: half an hour on 2 cores
python tests/faults/guards.py 7 12       # the guards of some cases of docs/faults.md

A test that passes although its guard is broken is printed as NOT DETECTED, and the exit code is 1.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
RUN_TIMEOUT = "120"  # seconds after which a run that hangs without its guard has failed


class Guard(NamedTuple):
  """A line of code behind a guarantee, its broken replacement, and the test that must fail with the replacement."""

  case: int
  file: str
  line: str
  broken: str
  test: str


def guards() -> list[Guard]:
  """Reads `guards.toml`."""
  return [Guard(**guard) for guard in tomllib.loads(Path(__file__).with_suffix(".toml").read_text())["guard"]]


def broken(guard: Guard, code: str) -> str:
  """Returns the code of a file with the guard replaced."""
  if (count := code.count(guard.line)) != 1:
    raise ValueError(f"{guard.file} must have this once, and has it {count} times: {guard.line}")
  return code.replace(guard.line, guard.broken)


def copy_repository(folder: Path):
  """Copies the current files of the repository, except those that git ignores."""
  listed = subprocess.run(
    ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
  )
  for name in filter(None, listed.stdout.decode().split("\0")):
    if (ROOT / name).exists():
      (folder / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy2(ROOT / name, folder / name)


def failure_without(guard: Guard, folder: Path) -> str | None:
  """Returns one line on how the test fails in a copy with a broken guard, or None if it passes."""
  path = folder / guard.file
  whole = path.read_text()
  path.write_text(broken(guard, whole))
  command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "--faults", guard.test]
  environment = os.environ | {"FAULTS_RUN_TIMEOUT": RUN_TIMEOUT, "COLUMNS": "200"}
  try:
    output = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment).stdout
  finally:
    path.write_text(whole)
  failed = re.search(r"^FAILED \S+ - (.*)$", output, re.M)  # not ERROR: a failed fixture detects nothing
  return failed and failed[1]


def main(cases: set[int]) -> int:
  """Breaks the guards of `cases`, or all guards if it is empty; returns the number of undetected ones."""
  missed = 0
  with tempfile.TemporaryDirectory() as folder:
    copy_repository(Path(folder))
    for guard in guards():
      if not cases or guard.case in cases:
        began = time.monotonic()
        failure = failure_without(guard, Path(folder))
        missed += failure is None
        print(f"case {guard.case}: {guard.file}: {' '.join(guard.line.split())}")
        print(
          f"  {f'detected: {failure}' if failure else 'NOT DETECTED'}; {guard.test}, {time.monotonic() - began:.0f} s",
          flush=True,
        )
  return missed


if __name__ == "__main__":
  sys.exit(main({int(case) for case in sys.argv[1:]}) > 0)
