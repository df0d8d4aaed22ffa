"""The ablations: their lines make sense, differ, and have the config's own setting among them."""

import importlib

import pytest
from grids import command, imported
from ml_collections import ConfigDict

from experiments.common.trials import base_from_file, first_seed_trials
from experiments.paper import studies
from switchlora_jax.config import resolve
from switchlora_jax.errors import UserError
from switchlora_jax.runs.directory import differences

NAMES = ("interval", "ratio", "grid", "freeze", "init", "rank", "state", "decay", "slots", "candidates", "order")
CONFIGS = ("llama_tiny", "llama_130m")


def load(name):
  return ConfigDict(importlib.import_module(f"configs.{name}").get_config())


def resolved(name: str, study: str) -> dict[str, dict]:
  """{label: resolved config} of a study's lines."""
  base = base_from_file(name, {})
  trials = first_seed_trials(base, studies.study_variants(study, base.config))
  return {trial.variant.label: trial.config.to_dict() for trial in trials}


def test_there_are_these_eleven():
  assert tuple(studies.STUDIES) == NAMES


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("study", NAMES)
def test_lines_make_sense_differ_and_hold_the_configs_own_setting(name, study):
  lines = resolved(name, study)
  assert len(lines) == len(studies.study_variants(study, load(name))) > 1  # each label once
  own = resolve(load(name), devices=1).to_dict()
  assert [label for label, config in lines.items() if differences(config, own) == []] != []
  same = [(a, b) for a in lines for b in lines if a < b and differences(lines[a], lines[b]) == []]
  assert same == []


def changed(study: str, key: str, name: str = "llama_130m") -> list:
  """The values of a key in the lines of a study."""
  return [variant.overrides[key] for variant in studies.study_variants(study, load(name))]


def test_values_around_the_papers():
  assert changed("interval", "switch.interval") == [10, 20, 40, 80, 160, 0]
  assert changed("ratio", "switch.decay_point") == [0.03, 0.1, 0.3, 0.9]
  assert changed("freeze", "switch.freeze_steps") == [0, 1, 2, 5, 10, 20]
  assert changed("init", "switch.init") == ["switchlora", "lora"]
  assert changed("rank", "rank") == [32, 64, 128, 256]
  assert changed("order", "switch.order") == ["sequential", "random"]
  pairs = zip(changed("grid", "switch.interval"), changed("grid", "switch.decay_point"), strict=True)
  assert list(pairs) == [(interval, ratio) for interval in (40, 80, 160) for ratio in (0.03, 0.1, 0.3)]


def test_values_that_the_config_cannot_have_are_left_out():
  config = load("llama_tiny")
  config.rank, config.switch.interval = 96, 10
  values = lambda study, key: [variant.overrides[key] for variant in studies.study_variants(study, config)]
  assert values("interval", "switch.interval") == [10, 20, 40, 0]  # N = 5
  assert values("freeze", "switch.freeze_steps") == [0, 1, 2, 5]
  assert [variant.overrides["rank"] for variant in studies.study_variants("rank", config)] == [24, 48, 96]  # hidden 128


@pytest.mark.parametrize("study", NAMES)
def test_a_config_that_never_switches_has_nothing_to_study(study):
  config = load("llama_130m")
  config.switch.interval = 0
  with pytest.raises(UserError, match=r"the subject of every study; set --config\.switch\.interval"):
    studies.study_variants(study, config)


def test_studies_of_two_keys_have_all_combinations():
  pairs = lambda study, *keys: list(zip(*(changed(study, f"switch.{key}") for key in keys), strict=True))
  assert pairs("state", "state", "freeze_steps") == [(s, n) for s in ("reset", "keep", "transport") for n in (5, 0)]
  assert pairs("decay", "decay", "start") == [(d, n) for d in ("exponential", "learning_rate") for n in (0, 100)]
  labels = {study: [v.label for v in studies.study_variants(study, load("llama_130m"))] for study in ("state", "decay")}
  assert labels["state"][:3] == ["reset, N = 5", "reset, N = 0", "keep, N = 5"]
  assert labels["decay"][1:3] == ["from step 100, exponential", "from step 0, learning rate"]


@pytest.mark.parametrize("study", NAMES)
def test_values_follow_the_config(study):
  """A config with its own values is among its lines, whatever they are."""
  config = load("llama_130m")
  config.rank = 24
  config.switch.update(
    interval=60, freeze_steps=3, decay_point=0.25, init="lora", order="random", state="keep", start=7
  )
  keys = studies.study_variants(study, config)[0].overrides.keys() - {"method"}
  own = {key: config[key] if "." not in key else config.switch[key.removeprefix("switch.")] for key in keys}
  assert [
    variant for variant in studies.study_variants(study, config) if variant.overrides == {"method": "switchlora"} | own
  ] != []


def test_ablate_runs_the_lines_of_its_study_at_every_rate(tmp_path, monkeypatch):
  found = {}
  flags = ["--study=order", "--learning_rates=1e-2,2e-2", "--seeds=3", "--processes=2", f"--workdir={tmp_path}"]
  with imported("ablate", *flags, "--config.rank=16", "--config.method=lora") as ablate:
    monkeypatch.setattr(
      ablate.sweep, "run_sweep", lambda base, variants, **options: found.update(base=base, variants=variants) or []
    )
    monkeypatch.setattr(ablate.results, "conclude", lambda *arguments: found.update(concluded=arguments))
    ablate.main()
  trials = first_seed_trials(found["base"], found["variants"])
  assert [(c.config.switch.order, c.learning_rate) for c in trials] == [
    (order, rate) for order in ("sequential", "random") for rate in (1e-2, 2e-2)
  ]
  assert {(c.config.method, c.config.rank) for c in trials} == {("switchlora", 16)}
  variants, _, options, title = found["concluded"]
  assert variants == found["variants"] and options["seeds"] == 3 and options["workdir"] == tmp_path
  assert title == "in which order candidates come (section 2.2 of the paper)"


@pytest.mark.parametrize(
  ("flags", "sentence"),
  [
    (
      [],
      f"--study is missing; it must be one of {', '.join(NAMES)}",
    ),
    (["--study=order"], "--workdir is missing"),
    (["--study=order", "--learning_rates=fast"], "--learning_rates must be a list of numbers"),
  ],
)
def test_mistakes_are_sentences(flags, sentence):
  with imported("ablate", *flags) as ablate, pytest.raises(UserError, match=sentence):
    ablate.main()


def test_an_unknown_study_says_which_there_are():
  done = command("ablate", "--study=intervals", "--workdir=nowhere")
  assert done.returncode == 2 and "Traceback" not in done.stderr
  expected = f"--study is 'intervals', which does not exist; it must be one of {', '.join(NAMES)}"
  assert f"error: {expected}\n" in done.stderr
