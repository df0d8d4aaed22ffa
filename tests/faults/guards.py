"""Breaks each guard of `guards.toml`, one at a time in a copy of the code, and sees the test of its fault fail.

python tests/faults/guards.py            # all: half an hour on 2 cores
python tests/faults/guards.py 7 12       # those of some cases of docs/faults.md

A test that passes where its guard is broken finds nothing: it is named, and the exit code is 1.
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
PATIENCE = "120"  # seconds after which a run that a broken guard lets hang has failed


class Guard(NamedTuple):
  """A line of code that keeps a promise, what takes its place to break it, and the test that must see it."""

  case: int
  file: str
  line: str
  broken: str
  test: str


def guards() -> list[Guard]:
  """Those of `guards.toml`."""
  return [Guard(**guard) for guard in tomllib.loads(Path(__file__).with_suffix(".toml").read_text())["guard"]]


def broken(guard: Guard, code: str) -> str:
  """The code of its file without the guard."""
  if (count := code.count(guard.line)) != 1:
    raise ValueError(f"{guard.file} must have this once, and has it {count} times: {guard.line}")
  return code.replace(guard.line, guard.broken)


def copy(folder: Path):
  """The files of the repository as they are now, those that git ignores left out."""
  listed = subprocess.run(
    ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
  )
  for name in filter(None, listed.stdout.decode().split("\0")):
    if (ROOT / name).exists():
      (folder / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy2(ROOT / name, folder / name)


def seen(guard: Guard, folder: Path) -> str | None:
  """How the test fails in a copy in which the guard is broken, in a line; None where it does not."""
  path = folder / guard.file
  whole = path.read_text()
  path.write_text(broken(guard, whole))
  command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "--faults", guard.test]
  environment = os.environ | {"FAULTS_PATIENCE": PATIENCE, "COLUMNS": "200"}
  try:
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment).stdout
  finally:
    path.write_text(whole)
  failed = re.search(r"^FAILED \S+ - (.*)$", said, re.M)  # not ERROR: a fixture that fails has seen nothing
  return failed and failed[1]


def main(cases: set[int]) -> int:
  """Break the guards of these cases, or all; returns how many nobody missed."""
  missed = 0
  with tempfile.TemporaryDirectory() as folder:
    copy(Path(folder))
    for guard in guards():
      if not cases or guard.case in cases:
        began = time.monotonic()
        how = seen(guard, Path(folder))
        missed += how is None
        print(f"case {guard.case}: {guard.file}: {' '.join(guard.line.split())}")
        print(f"  {f'seen: {how}' if how else 'NOT SEEN'}; {guard.test}, {time.monotonic() - began:.0f} s", flush=True)
  return missed


if __name__ == "__main__":
  sys.exit(main({int(case) for case in sys.argv[1:]}) > 0)
