"""Trials of a sweep: their configs and names, base configs, and the devices that they are resolved for."""

import contextlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from grids import FULL, LORA, tiny_base
from paths import ROOT

from experiments.common import trials as trials_module
from experiments.common.trials import (
  Variant,
  base_from_file,
  first_seed_trials,
  make_trial,
  parse_config_value,
  probe_devices,
)
from switchlora_jax.errors import UserError

BOTH = Variant("full", {"method": "full"}, (1e-3, 2e-3), rest_learning_rates=(1e-3, 4e-3))


def test_a_trial_is_resolved_for_the_platform_of_its_run(tmp_path, monkeypatch):
  """Otherwise a finished run, whose saved config has bfloat16, would not be recognised."""
  base, variant = tiny_base(tmp_path), Variant("lora", {"method": "lora"})
  for platform, dtype in (("cpu", "float32"), ("gpu", "bfloat16")):
    monkeypatch.setattr(trials_module, "probe_devices", lambda platform=platform: (platform, 1))
    assert make_trial(base, variant, None, 0).config.dtype == dtype


def test_a_trial_is_resolved_for_the_number_of_devices_of_its_run(tmp_path, monkeypatch):
  base = tiny_base(tmp_path, sharding__fsdp=4, sharding__frozen="sharded")
  for devices, sentence in ((4, None), (2, r"sharding\.fsdp \(=4\) must divide the number of devices \(=2\)")):
    monkeypatch.setattr(trials_module, "probe_devices", lambda devices=devices: ("gpu", devices))
    with pytest.raises(UserError, match=sentence) if sentence else contextlib.nullcontext():
      assert make_trial(base, LORA, None, 0).config.sharding.fsdp == 4


def test_trials_of_a_sweep_and_their_names(tmp_path):
  base = tiny_base(tmp_path, seed=7)
  before = base.config.to_dict()
  trials = first_seed_trials(base, (LORA, FULL))
  names = [*(f"lora-rank-4_lr={rate}_seed=7" for rate in ("0.001", "0.01", "0.1")), "full_lr=0.001_seed=7"]
  assert [trial.name for trial in trials] == names
  rates = [trial.config.learning_rate for trial in trials]
  assert rates == [1e-3, 1e-2, 1e-1, 1e-3], "each from the base config, not from the previous trial"
  assert [trial.config.method for trial in trials] == ["lora", "lora", "lora", "full"]
  assert base.config.to_dict() == before


@pytest.mark.parametrize("label", ["N = 5", "350M, galore, rank 32, length 512", "a/b\\c: *?", "../up", "…", "-x", "é"])
def test_names_are_safe_in_a_file_system(tmp_path, label):
  name = make_trial(tiny_base(tmp_path), Variant(label, {}), 5e-4, 3).name
  assert re.fullmatch(r"[\w.=-]*_lr=0\.0005_seed=3", name) and not name.startswith("-")
  assert Path(name).name == name


def test_labels_that_name_the_same_directory_are_refused(tmp_path):
  with pytest.raises(UserError, match=r"duplicate runs \(a-b_lr=0\.02_seed=0\); give each value once"):
    first_seed_trials(tiny_base(tmp_path), (Variant("a b", {}), Variant("a-b", {"rank": 6})))
  with pytest.raises(UserError, match="duplicate runs"):
    first_seed_trials(tiny_base(tmp_path), (Variant("a", {}, (1e-2, 2e-2, 0.01)),))


def test_a_sweep_of_both_rates_has_their_product_and_readable_names(tmp_path):
  trials = first_seed_trials(tiny_base(tmp_path), (BOTH,))
  pairs = [("0.001", "0.001"), ("0.001", "0.004"), ("0.002", "0.001"), ("0.002", "0.004")]
  assert [trial.name for trial in trials] == [f"full_lr={rate}_rest={rest}_seed=0" for rate, rest in pairs]
  found = [(trial.config.learning_rate, trial.config.rest_learning_rate) for trial in trials]
  assert found == [trial.point for trial in trials] == [(1e-3, 1e-3), (1e-3, 4e-3), (2e-3, 1e-3), (2e-3, 4e-3)]
  assert trials[1].overrides["rest_learning_rate"] == 4e-3


def test_without_a_rest_sweep_the_rest_follows_the_learning_rate_or_the_config(tmp_path):
  trial = make_trial(tiny_base(tmp_path), FULL, 2e-3, 0)
  assert (trial.name, trial.config.rest_learning_rate) == ("full_lr=0.002_seed=0", 2e-3)
  fixed = make_trial(tiny_base(tmp_path, rest_learning_rate=5e-3), FULL, 2e-3, 0)
  assert (fixed.name, fixed.config.rest_learning_rate) == ("full_lr=0.002_seed=0", 5e-3)


# --- base configs ----------------------------------------------------------------------------------------------------


def test_a_value_on_the_command_line_gets_the_type_of_its_key(tmp_path):
  config = tiny_base(tmp_path).config
  values = {
    "rank": ("8", 8),
    "learning_rate": ("1e-3", 1e-3),  # None in the config
    "clip_norm": ("2", 2.0),
    "remat": ("full", "full"),
    "count_per_element": ("True", True),
    "model.qk_norm": ("false", False),
    "switch.decay_to": ("0.3", 0.3),
    "data.path": ("c4/*.json.gz", "c4/*.json.gz"),
    "data.tokenizer": ("", ""),
  }
  for key, (text, value) in values.items():
    found = parse_config_value(config, key, text)
    assert found == value and type(found) is type(value), key


@pytest.mark.parametrize(
  ("key", "text", "sentence"),
  [
    ("rnk", "8", "unknown config key 'rnk'; configs/base.py lists all keys"),
    ("switch.intervl", "8", "unknown config key 'switch.intervl'; configs/base.py lists all keys"),
    ("rank.x", "8", "unknown config key 'rank.x'; configs/base.py lists all keys"),
    ("", "8", "unknown config key ''; configs/base.py lists all keys"),
    ("rank", "8.5", "rank must be of type int; found '8.5'"),
    ("clip_norm", "much", "clip_norm must be of type float; found 'much'"),
    ("model.qk_norm", "1", "model.qk_norm must be of type bool; found '1'"),
    ("switch", "8", "switch must be of type ConfigDict; found '8'"),
  ],
)
def test_a_wrong_value_on_the_command_line_is_an_error(tmp_path, key, text, sentence):
  with pytest.raises(UserError) as caught:
    parse_config_value(tiny_base(tmp_path).config, key, text)
  assert str(caught.value) == sentence


def test_the_base_of_a_config_in_the_repository():
  base = base_from_file("llama_tiny", {"steps": 7, "switch.interval": 20})
  assert (base.config.steps, base.config.switch.interval, base.config.rank) == (7, 20, 32)
  assert base.file == str(ROOT / "configs" / "llama_tiny.py")
  with pytest.raises(UserError, match="unknown config key 'stepz'"):
    base_from_file("llama_tiny", {"stepz": 7})


# --- devices ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def probe(monkeypatch):
  """What the child process that finds the devices does, and its command each time it is started."""
  answer = SimpleNamespace(stdout="", stderr="", returncode=0, asked=[])
  run = lambda command, **_: answer.asked.append(command) or answer
  monkeypatch.setattr(trials_module, "subprocess", SimpleNamespace(run=run))
  probe_devices.cache_clear()
  yield answer
  probe_devices.cache_clear()


def test_the_devices_are_found_once_per_process(probe):
  probe.stdout = "gpu 4\n"
  assert probe_devices() == probe_devices() == ("gpu", 4) and len(probe.asked) == 1


def test_the_probe_is_a_command_that_finds_the_devices_of_a_run():
  environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
  with pytest.MonkeyPatch.context() as patch:
    for name, value in environment.items():
      patch.setenv(name, value)
    probe_devices.cache_clear()
    assert probe_devices() == ("cpu", 4)
  probe_devices.cache_clear()


def test_devices_that_jax_does_not_find_are_an_error(probe):
  probe.returncode, probe.stderr = 1, "Traceback …\nRuntimeError: no device\n"
  with pytest.raises(
    UserError, match=r"^JAX does not find its devices: RuntimeError: no device; a run would not start"
  ):
    probe_devices()
