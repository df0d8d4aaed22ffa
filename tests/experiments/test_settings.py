"""What grid commands are told: numbers, keys, configs; mistakes are sentences."""

import os
from types import SimpleNamespace

import pytest
from grids import tiny_base
from paths import ROOT

from experiments.common import settings
from switchlora_jax.errors import UserError


def test_numbers_of_a_flag():
  assert settings.numbers("learning_rates", ["1e-3", "2"], float) == [1e-3, 2.0]
  assert settings.numbers("ranks", ["8", "16"], int) == [8, 16]
  assert settings.numbers("ranks", None, int) == settings.numbers("ranks", [], int) == []
  for words, kind in ((["8.5"], int), (["1e-3", ""], float), (["fast"], float)):
    with pytest.raises(UserError, match=r"--ranks must be a list of numbers such as 1e-3,2e-3 or 32,16; "):
      settings.numbers("ranks", words, kind)


def test_a_value_on_the_command_line_gets_the_type_of_its_key(tmp_path):
  config = tiny_base(tmp_path).config
  values = {
    "rank": ("8", 8),
    "learning_rate": ("1e-3", 1e-3),  # None in the config
    "clip_norm": ("2", 2.0),
    "remat": ("full", "full"),
    "count_per_element": ("True", True),
    "switch.reset": ("false", False),
    "switch.decay_to": ("0.3", 0.3),
    "data.path": ("c4/*.json.gz", "c4/*.json.gz"),
    "data.tokenizer": ("", ""),
  }
  for key, (text, value) in values.items():
    found = settings.parse_value(config, key, text)
    assert found == value and type(found) is type(value), key


@pytest.mark.parametrize(
  ("key", "text", "sentence"),
  [
    ("rnk", "8", "unknown config key 'rnk'; every key stands in configs/base.py"),
    ("switch.intervl", "8", "unknown config key 'switch.intervl'; every key stands in configs/base.py"),
    ("rank.x", "8", "unknown config key 'rank.x'; every key stands in configs/base.py"),
    ("", "8", "unknown config key ''; every key stands in configs/base.py"),
    ("rank", "8.5", "rank must be of type int; found '8.5'"),
    ("clip_norm", "much", "clip_norm must be of type float; found 'much'"),
    ("switch.reset", "1", "switch.reset must be of type bool; found '1'"),
    ("switch", "8", "switch must be of type ConfigDict; found '8'"),
  ],
)
def test_a_wrong_value_on_the_command_line_is_a_sentence(tmp_path, key, text, sentence):
  with pytest.raises(UserError) as caught:
    settings.parse_value(tiny_base(tmp_path).config, key, text)
  assert str(caught.value) == sentence


def test_the_base_of_a_config_in_the_repository():
  base = settings.base_from_file("llama_tiny", {"steps": 7, "switch.interval": 20})
  assert (base.config.steps, base.config.switch.interval, base.config.rank) == (7, 20, 32)
  assert base.file == str(ROOT / "configs" / "llama_tiny.py")
  with pytest.raises(UserError, match="unknown config key 'stepz'"):
    settings.base_from_file("llama_tiny", {"stepz": 7})


def test_the_package_is_found_from_any_directory(tmp_path, monkeypatch):
  monkeypatch.setenv("PYTHONPATH", "elsewhere")
  assert settings.environment()["PYTHONPATH"] == f"{ROOT}{os.pathsep}elsewhere"
  monkeypatch.delenv("PYTHONPATH")
  monkeypatch.setenv("SOME_SETTING", "kept")
  assert settings.environment()["PYTHONPATH"] == str(ROOT) and settings.environment()["SOME_SETTING"] == "kept"


def test_one_process_a_core_or_one_where_there_are_accelerators(monkeypatch):
  answer, asked = SimpleNamespace(stdout="cpu\n"), []
  monkeypatch.setattr(settings, "subprocess", SimpleNamespace(run=lambda command, **_: asked.append(command) or answer))
  settings.platform.cache_clear()
  assert settings.default_processes() == len(os.sched_getaffinity(0)) and settings.platform() == "cpu"
  settings.platform.cache_clear()
  answer.stdout = "gpu\n"
  assert settings.default_processes() == 1 and settings.platform() == "gpu"
  settings.platform.cache_clear()
  assert len(asked) == 2, "once in a process"
