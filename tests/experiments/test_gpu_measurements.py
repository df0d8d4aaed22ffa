"""The measurements on a GPU, tried with tiny models on the CPU."""

import json

import pytest
from grids import command, imported


def test_a_measurement_that_fails_or_takes_too_long_is_reported():
  with imported("measurements.gpu", "--small") as gpu:
    assert gpu.measure_in_child("step 350M full", 0) == {"failed": "no result within the 0 s that were left"}
    failed = gpu.measure_in_child("step 350M nothing", 60)["failed"]
  assert failed.startswith("error: method (='nothing') must be one of full, lora")


def test_results_have_units():
  with imported("measurements.gpu") as gpu:
    shown = [gpu.shown(value) for value in (3 * 2**30, 0.123456, True, 12)]
  assert shown == ["3.00 GiB", "0.1235", "True", "12"]


@pytest.mark.slow
def test_all_measurements_on_the_cpu(tmp_path):
  out = tmp_path / "gpu.json"
  done = command("measurements.gpu", "--small", f"--json={out}")
  assert done.returncode == 0, done.stderr
  results = json.loads(out.read_text())
  with imported("measurements.gpu") as gpu:
    assert list(results) == list(gpu.MEASUREMENTS)
  assert not [result for result in results.values() if "failed" in result]
  assert results["resume"]["same_to_the_bit"] and results["resume"]["arrays"] > 40
  steps = [result for name, result in results.items() if name.startswith("step")]
  assert all(step["seconds"] > 0 and step["mfu"] is None and step["planned_memory"] > 1e6 for step in steps)
  host, device = results["step 350M switchlora host"], results["step 350M switchlora"]
  assert host["loss"] == device["loss"]  # the placement does not change the numbers
  assert len(done.stdout.splitlines()) == len(results) + 1
