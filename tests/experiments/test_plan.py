"""The plan command: what it prints and writes, and what it refuses before anything is compiled."""

import json

import jax
import pytest
from grids import command, imported

from switchlora_jax.errors import UserError
from switchlora_jax.planning import topology

SMALL = [
  *(f"--config.model.{key}" for key in ("hidden_size=32", "intermediate_size=48", "num_heads=2", "num_layers=2")),
  *("--config.batch_size=32", "--config.seq_len=16", "--config.model.vocab_size=64", "--config.rank=4"),
  *("--config.accumulation=2", "--config.steps=1000"),
]


@pytest.fixture
def no_gpu_compiler(monkeypatch):
  """As where the GPU extra is missing; and this process' environment stays as it is."""
  monkeypatch.setattr(topology, "without_gpus", lambda: None)
  monkeypatch.setattr(topology, "gpu_mesh", lambda *_: None)


@pytest.mark.slow
def test_a_column_for_each_method(no_gpu_compiler, tmp_path, capsys):
  out = tmp_path / "out.json"
  with imported("plan", *SMALL, "--methods=full,lora", f"--json={out}", "--largest") as plan:
    plan.main()
  printed, progress = capsys.readouterr()
  first, header, *lines, last = printed.splitlines()
  assert first.startswith("per device of 1x1x8 h100, bfloat16, XLA for CPUs, since the GPU extra is missing")
  assert header.split() == ["full", "lora"]
  assert len({len(line) for line in [header, *lines]}) == 1, "aligned"
  labels = [line.split("  ")[0] for line in lines if line[0] != " "]
  assert labels[:6] == ["trainable", "frozen", "candidates", "optimizer", "activations and temporaries", "peak memory"]
  assert "all-reduce per step" in labels and "all-gather per step" not in labels and "in host memory" not in printed
  full, lora = json.loads(out.read_text())
  assert full["program"] == "full" and lora["program"] == "lora"
  assert full["trainable"] > lora["trainable"] and full["frozen"] == 0 < lora["frozen"]
  assert full["traffic"][0]["kind"] == "all-reduce" and full["traffic"][0]["sent"] > 0
  assert full["estimate"]["step"] > 0
  assert list(full["tried"]) == ["2", "4"] and full["largest"] == 4, "no micro-batch is larger than a device's rows"
  assert progress.count("compiling ") == 4 and progress.count(" s, peak ") == 4
  assert "compiling lora, micro-batch 4 × 16 …\n" in progress
  assert "not measured" in last


def test_a_warm_start_is_a_column_of_its_own(no_gpu_compiler, monkeypatch):
  flags = [*SMALL, "--methods=full,lora", "--config.warm_start_steps=200"]
  with imported("plan", *flags) as plan:
    monkeypatch.setattr(plan, "compiled", lambda name, where, config, phase: (name, phase))
    monkeypatch.setattr(plan.planner, "estimate", lambda *_: None)
    where = plan.machine()
    found = [column.plan for config in plan.configs(8).values() for column in plan.columns(where, config)]
  assert found == [("full", 0), ("full (warm start)", 0), ("lora", 1)]


def test_the_limit_and_the_links_are_what_the_flags_say(no_gpu_compiler):
  with imported("plan", "--gpu=a100", "--memory_fraction=0.5", "--link=7", "--topology=1x2x4") as plan:
    where = plan.machine()
    assert where.limit == topology.read_gpu("a100").memory / 2
  assert (where.gpu.nvlink, where.gpu.network) == (7e9, 7e9)
  assert (where.per_host, where.mesh.size) == (4, 8)


def test_candidates_on_the_host_have_a_line(no_gpu_compiler):
  with imported("plan") as plan:
    blank = plan.StepPlan(*[0] * 11, traffic=[], seconds=0.0)._replace(host=2**20, tokens=1, moved=1)
    where = plan.machine()
    column = plan.Column("switchlora", blank, plan.planner.estimate(blank, where.gpu, "float32", 8), {})
    lines = [line.split() for line in plan.table(where, [column]).splitlines()]
  assert "of these, in host memory 1.0 MiB".split() in lines


def test_by_default_the_config_s_own_method(no_gpu_compiler):
  with imported("plan", "--config.method=relora") as plan:
    assert list(plan.configs(8)) == ["relora"]


@pytest.mark.parametrize(
  ("flags", "sentence"),
  [
    (["--gpu=h42"], "no description of GPU 'h42'; expected one of a100, a100-40, h100, h200"),
    (["--topology=8"], "a topology must be slices × hosts × GPUs per host, such as 1x2x8 for 16 GPUs; found '8'"),
    (["--methods=full,loar"], "--methods has loar; expected some of full, lora"),
    (["--link=0"], r"--link \(=0.0\) must be greater than 0; leave it out for the links of h100"),
    (["--config.batch_size=100"], r"batch_size \(=100\) must be a multiple of devices × accumulation \(=8 × 2\)"),
  ],
)
def test_mistakes_are_sentences(no_gpu_compiler, monkeypatch, flags, sentence):
  with imported("plan", *SMALL, *flags) as plan, pytest.raises(UserError, match=sentence):
    monkeypatch.setattr(plan.planner, "plan_step", lambda *_: pytest.fail("compiled before it was checked"))
    plan.main()


def test_a_mistake_ends_the_command_with_a_sentence():
  done = command("plan", "--gpu=h42")
  assert done.returncode == 2 and done.stderr.startswith("error: no description of GPU 'h42'")


def test_it_simulates_as_many_cpus_as_there_are_gpus(no_gpu_compiler):
  with imported("plan", "--topology=1x2x4") as plan:
    assert plan.machine().cpus.devices.size == len(jax.devices("cpu")) == 8
