"""Runs that were trained, read back: their weights, the rank of what they have learnt, and what the command leaves."""

import json
import shutil

import jax
import numpy as np
import pytest
import small_model
import tiny
from grids import imported
from ml_collections import FrozenConfigDict
from tiny import resolved

from experiments.common import spectra
from switchlora_jax.analysis.ranks import KINDS
from switchlora_jax.errors import UserError
from switchlora_jax.interop import pretrained
from switchlora_jax.models.llama import LLaMA
from switchlora_jax.runs.directory import open_run
from switchlora_jax.training import trainer

pytestmark = pytest.mark.slow

RANK, WIDTH, LAYERS = 2, 16, 2
RUNS = {
  "full": dict(method="full"),
  "lora": dict(method="lora"),
  "switchlora": dict(method="switchlora", switch__decay_to=0.9, switch__freeze_steps=0),  # a switch in most steps
}
NUMBERS = {4: 3.5, 8: 5.25, 12: 6.0}  # in place of the effective rank that training records: it takes long to compile


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder with a short run each, by its name."""
  folder = tmp_path_factory.mktemp("ranks")
  recorded = iter([*NUMBERS.values()] * len(RUNS))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(trainer, "make_mesh", lambda **_: small_model.mesh(1))
    patch.setattr(trainer, "make_learnt_rank", lambda first: lambda *_: next(recorded))
    for name, changes in RUNS.items():
      trainer.train(resolved(folder, 1, rank=RANK, learning_rate=1e-2, **changes), folder / name)
  return folder


@pytest.fixture(scope="module")
def measured(folder):
  """{name: what is measured of the run}."""
  return {name: spectra.measure_spectra(open_run(folder / name)) for name in RUNS}


def learnt_rank(run, step=12) -> np.ndarray:
  """Ranks of W_t - W_0, [kinds, layers]."""
  return np.array([run["learnt"][step][kind]["rank"] for kind in KINDS])


def test_lora_learns_no_more_than_its_vectors_can_say(measured):
  """Those of W_T, and those that W_0 was made with."""
  assert np.all(learnt_rank(measured["lora"]) == 2 * RANK)


def test_switching_goes_beyond_that_and_full_rank_is_full(measured):
  switched = np.array([learnt_rank(measured["switchlora"], step) for step in NUMBERS])
  assert np.all(switched[-1] > 2 * RANK) and np.all(np.diff(switched, axis=0) >= 0)
  assert np.all(learnt_rank(measured["full"]) == WIDTH)


def test_weights_are_the_merged_ones_of_the_newest_checkpoint(folder, measured):
  for name, run in measured.items():
    blocks = pretrained.load(folder / name).weights["blocks"]
    for kind in KINDS:
      expected = np.linalg.svd(np.asarray(blocks[kind]["kernel"], np.float64), compute_uv=False)
      found = np.array(run["weights"][kind]["singular_values"])
      np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
      assert found.shape == (LAYERS, WIDTH)
      squares = expected**2
      ratio = squares.sum(-1) ** 2 / (squares**2).sum(-1)
      np.testing.assert_allclose(run["weights"][kind]["effective_rank"], ratio, rtol=1e-4)
    assert (run["run"], run["method"], run["step"]) == (name, RUNS[name]["method"], 12)


def test_every_checkpoint_and_what_training_recorded_is_there(measured):
  for run in measured.values():
    assert list(run["learnt"]) == list(NUMBERS) and run["learnt_rank"] == [[*pair] for pair in NUMBERS.items()]
    grown = [np.mean([np.sum(run["learnt"][step][kind]["singular_values"]) for kind in KINDS]) for step in NUMBERS]
    assert 0 < grown[0] < grown[1] < grown[2]


def test_the_command_leaves_numbers_and_pictures(folder, tmp_path, capsys):
  with imported("ranks", f"--run={folder / 'full'}", f"--run={folder / 'lora'}", f"--out={tmp_path / 'new'}") as module:
    module.main()
  text = capsys.readouterr().out
  assert "| full | rank of W − W₀ | 16.0 | 16.0 |" in text and "| lora | rank of W − W₀ | 4.0 | 4.0 |" in text
  found = json.loads((tmp_path / "new" / "ranks.json").read_text())
  assert [run["run"] for run in found] == ["full", "lora"] and [run["rank"] for run in found] == [None, RANK]
  assert all(
    (tmp_path / "new" / name).stat().st_size > 20_000
    for name in ("weights.png", "weights.svg", "learnt.png", "learnt.svg")
  )


def test_a_run_from_anothers_weights_has_no_start(folder, tmp_path, capsys):
  """Its weights are shown nevertheless."""
  directory = tmp_path / "warm"
  directory.mkdir()
  for path in (folder / "lora").iterdir():
    (directory / path.name).symlink_to(path)
  saved = json.loads((directory / "config.json").read_text())
  saved["config"]["warm_start_from"] = str(folder / "full")
  (directory / "config.json").unlink()
  (directory / "config.json").write_text(json.dumps(saved))
  spectra.conclude([open_run(directory)], tmp_path / "out")
  text = capsys.readouterr().out
  assert "warm: W − W₀ is not measured: it started from another run's weights" in text
  assert "effective rank of W |" in text and "W₀ |" not in text
  assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["ranks.json", "weights.png", "weights.svg"]


def test_a_run_in_float64_is_measured(tmp_path, monkeypatch):
  """In float32 none of its checksums would be right. Its blocks have two linear layers, which compile faster."""
  kinds = ("up", "down")
  monkeypatch.setattr(LLaMA, "block_class", small_model.TwoLinearBlock)
  monkeypatch.setattr(spectra, "KINDS", kinds)
  with jax.enable_x64(True):
    workdir = tiny.saved_run(tmp_path / "run", dtype="float64", param_dtype="float64", method="lora")
  found = spectra.measure_spectra(open_run(workdir))
  assert [found["learnt"][0][kind]["rank"] for kind in kinds] == [[4] * LAYERS] * 2 and found["rank"] == 4


def test_damaged_checkpoints_are_left_out(folder, tmp_path, caplog):
  """And it is an error only where no other is there."""
  workdir = shutil.copytree(folder / "lora", tmp_path / "run")
  run, files = open_run(workdir), lambda step: (workdir / "checkpoints" / str(step)).rglob("*")
  damage = lambda step: [path.write_bytes(b"") for path in files(step) if path.is_file()]
  damage(12)
  found = spectra.measure_spectra(run)
  assert found["step"] == 8 and list(found["learnt"]) == [4, 8] and "step 12 is skipped" in caplog.text
  damage(4), damage(8)
  with pytest.raises(UserError, match="can be read back"):
    spectra.measure_spectra(run)


@pytest.mark.parametrize("key", ["param_dtype", "warm_start_from", "relora"])
def test_a_run_of_other_code_is_a_sentence(folder, key):
  run = open_run(folder / "lora")
  config = run.config.to_dict() | {"method": "relora"}
  del config[key]
  with pytest.raises(UserError, match="was made by another version of the code: a key of its config is missing"):
    spectra.measure_spectra(run._replace(config=FrozenConfigDict(config)))


@pytest.mark.parametrize(
  ("flags", "sentence"),
  [
    ([], "--run is missing"),
    (["--run={folder}/nowhere"], "nowhere must be the directory of a run, .*; there is no such directory"),
    (["--run={folder}/full", "--run={folder}/empty"], "the run in .*empty has saved no checkpoint yet"),
    (["--run={folder}/full", "--run={folder}/lora/../full"], "given twice with the name full"),
    (
      ["--run={folder}/full", "--out={folder}/full/config.json"],
      r"cannot create the folder .*config.json \(File exists\)",
    ),
  ],
)
def test_mistakes_are_sentences(folder, flags, sentence):
  (folder / "empty").mkdir(exist_ok=True)
  for name in ("config.json", "tokenizer.model"):
    shutil.copy(folder / "full" / name, folder / "empty")
  given = [flag.format(folder=folder) for flag in flags]
  with imported("ranks", *given) as module, pytest.raises(UserError, match=sentence):
    module.main()
  assert not (folder / "empty" / "checkpoints").exists()
