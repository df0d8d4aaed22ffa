"""The list of guards follows the code: each is there to be broken, and the test that is to see it exists."""

import re
from pathlib import Path

import pytest
from guards import broken, guards
from paths import ROOT

GUARDS = guards()


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: f"{guard.case}-{Path(guard.file).stem}")
def test_a_guard_can_be_broken_and_has_a_test(guard):
  code = (ROOT / guard.file).read_text()
  compile(broken(guard, code), guard.file, "exec")
  path, name = guard.test.split("::")
  assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.M)


def test_every_case_has_a_guard():
  assert {guard.case for guard in GUARDS} == set(range(1, 20))
