"""Overhead of checksums: correct shares, and the run directory is unchanged afterwards, also after Ctrl-C."""

import re

import jax
import pytest
from grids import imported
from small_model import mesh
from tiny import saved_run

from experiments.common import save_cost
from experiments.common.save_cost import SaveTimes
from switchlora_jax.runs import manifest


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The directory of a run with a checkpoint of step 0."""
  return saved_run(tmp_path_factory.mktemp("run") / "run")


def contents(run):
  return {path: path.stat().st_mtime_ns for path in run.rglob("*") if path != run}


def test_shares_are_of_a_save():
  lines = save_cost.cost_table(
    [SaveTimes(2, 0.1, 0.04, 0.2), SaveTimes(1, 0.01, 0.02, 0.3), SaveTimes(4, 0, 0, 0)]
  ).splitlines()
  assert [line.split()[-3:] for line in lines[2:3]] == [["to", "the", "save"]]
  assert lines[1].split()[-6:] == ["2.000", "s", "1.000", "s", "4.000", "s"]
  expected = ["1.0% 0.0% 5.0%", "2.0% 0.0% 2.0%", "3.0% 0.0% 7.0%", "10.0% 0.0% 30.0%", "1.0% 0.0% 5.0%"]
  assert [" ".join(line.split()[-3:]) for line in lines[3:]] == expected


def test_the_whole_state_is_saved_again_and_the_run_is_as_before(run, capsys, monkeypatch):
  before, saved, write = contents(run), [], manifest.write
  monkeypatch.setattr(manifest, "write", lambda *it: (saved.append(it[2]), write(*it)))
  with imported("checkpoints", f"--run={run}", "--cost", "--saves=3") as checkpoints:
    checkpoints.main()
  said = capsys.readouterr().out
  assert contents(run) == before
  newest = manifest.read(run / "checkpoints" / "0")
  assert saved == [newest.arrays] * 4  # once more, for what is compiled
  assert re.match(r"step 0: \d\.\d\d MiB \(.* bytes\), saved 3 times on 8 × cpu", said)
  assert float(said.partition("seconds per save")[2].split()[0]) > 0


def test_ctrl_c_leaves_nothing(run, monkeypatch):
  before = contents(run)

  def interrupted(folder):
    assert folder.is_relative_to(run)
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    verify = manifest.verify
    patch.setattr(manifest, "verify", lambda folder, *share: verify(folder, *share) if share else interrupted(folder))
    save_cost.cost_report(run, 3)
  assert contents(run) == before


def test_a_save_is_longer_than_its_manifest(tmp_path):
  state = jax.device_put({"x": jax.numpy.ones((500, 500))}, mesh(1).devices.flat[0])
  size, saves = save_cost.time_saves(state, tmp_path / "checkpoints", 2)
  assert size > 0 and len(saves) == 2
  for save in saves:
    assert 0 < save.files < save.whole and save.arrays > 0 < save.verify
