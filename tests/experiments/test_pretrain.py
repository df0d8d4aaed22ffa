"""The command itself, as a user meets it: real processes."""

import functools
import re

import jax
import pytest
from fault_runs import small_config
from forks import forks
from grids import command, imported
from paths import GOLDEN, ROOT
from tiny import flags_of

from configs import llama_tiny
from switchlora_jax.config import resolve


@pytest.fixture(scope="module")
def pretrain():
  """flag, … -> what the command left; JAX is imported once for all processes."""
  with forks(ROOT) as run:
    yield functools.partial(run, "pretrain")


def test_dry_run_prints_what_scripts_read_and_writes_nothing(pretrain, tmp_path):
  workdir = tmp_path / "run"
  done = pretrain("--config=configs/llama_1b.py", "--config.rank=512", "--dry_run", f"--workdir={workdir}")
  assert done.code == 0, done.stderr
  assert "\ntrainable parameters: 609.7M (609,720,320)\n" in done.stdout
  assert "\nfrozen parameters: 1207.9M (1,207,910,400)\n" in done.stdout
  assert "\nlearning_rate: 0.02\n" in done.stdout
  assert "\ntokens per step: 786,432\n" in done.stdout
  # Per layer kind, spares (c - r)·(in + out), cursor and timers; per parameter two moments, per vector a count.
  spares = 24 * (4 * 1536 * 4096 + 3 * 1536 * 7509) * 4 + 24 * 7 * (1 + 2 * 512) * 4
  assert f"\ncandidates: {spares / 2**20:,.1f} MiB ({spares:,} bytes)\n" in done.stdout
  counts = 24 * 7 * 2 * 512 + 5  # embedding, two norms a block (stacked), last norm, head
  optimizer = 2 * 609_720_320 * 4 + counts * 4
  assert f"\noptimizer: {optimizer / 2**20:,.1f} MiB ({optimizer:,} bytes)\n" in done.stdout
  assert not workdir.exists()


def test_a_warm_start_sets_the_architecture_that_the_command_line_does_not(pretrain, tmp_path):
  source = GOLDEN / "families" / "qwen3"
  options = (f"--config.warm_start_from={source}", "--config.rank=4", "--config.seq_len=16", "--dry_run")
  done = pretrain(*options, "--config.data.tokenizer=mine.model", "--config.model.rope.base=5e5")
  assert done.code == 0, done.stderr
  (line,) = [line for line in done.stdout.splitlines() if line.startswith("set from ")]
  assert line.startswith(f"set from {source}: model.vocab_size=48 model.hidden_size=16 ")
  assert " model.head_dim=8 " in line and " model.qk_norm=True" in line
  assert "rope.base" not in line and "data.tokenizer" not in line
  assert "model.rope.base  " in done.stdout and "500000.0 (default 10000.0)" in done.stdout
  quiet = pretrain(*options, "--quiet")
  assert quiet.code == 0 and "set from" not in quiet.stdout
  other = pretrain(f"--config.warm_start_from={tmp_path}", "--dry_run")
  assert other.code == 2 and "--config.warm_start_from: " in other.stderr and "must be the directory" in other.stderr


def test_a_run_from_ones_own_text_ends_with_its_report(tmp_path):
  """With the flags of users; its program is that of tests/faults."""
  workdir = tmp_path / "run"
  done = command("pretrain", *flags_of(small_config(tmp_path, log_every=10)), f"--workdir={workdir}", user_flags=True)
  assert done.returncode == 0, done.stderr
  for pattern in (
    r"data: text, fingerprint [0-9a-f]{16}",
    r"validation perplexity: \d+\.\d\d",
    r"tokens per second: [\d,]+",
    r"sample: '.*' → '",
    rf"loss curve: {workdir}/loss.png",
    rf"saved in: {workdir}",
    r"continue for twice as long: \S*python\S* -m experiments.pretrain .*--config.steps=80",
  ):
    assert re.search(pattern, done.stdout), pattern
  assert "step 40: validation perplexity" in done.stdout
  assert re.findall(r"^train: (\d+) of 40, ", done.stderr, re.MULTILINE) == ["10", "20", "30", "40"]
  assert "\r" not in done.stdout + done.stderr
  assert {"loss.png", "checkpoints", "config.json", "metrics.jsonl"} <= {path.name for path in workdir.iterdir()}


MISTAKES = {
  "unknown key": (["--config.rnk=4"], r"error: .*rnk.*rank"),
  "unknown nested key": (["--config.switch.intervl=4"], r"error: .*intervl.*interval"),
  "wrong type": (["--config.rank=four"], r"error: .*four"),
  "unknown flag": (["--worckdir=x"], r"error: .*worckdir.*workdir"),
  "unknown method": (["--config.method=loar"], r"error: method \(='loar'\) must be one of"),
  "no workdir": ([], r"error: --workdir is missing"),
  "no such tokenizer": (["--workdir={tmp}/run", "--config.data.tokenizer=nowhere.model"], r"error: .*nowhere\.model"),
  "path not read": (["--workdir={tmp}/run", "--config.data.path={tmp}/*"], r"error: .*add --config.data.source=text"),
  "empty glob": (
    ["--workdir={tmp}/run", "--config.data.source=text", "--config.data.path={tmp}/*.gz"],
    r"error: .*no file",
  ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(pretrain, tmp_path, name):
  flags, pattern = MISTAKES[name]
  done = pretrain(*(flag.format(tmp=tmp_path) for flag in flags))
  assert done.code == 2
  assert re.search(pattern, done.stderr), done.stderr
  assert "Traceback" not in done.stderr
  assert not (tmp_path / "run" / "config.json").exists()


def test_a_config_file_that_is_not_there_is_one_sentence():
  done = command("pretrain", "--config=configs/llama_3m.py", "--dry_run")
  assert done.returncode == 2 and "llama_3m" in done.stderr and "Traceback" not in done.stderr


def test_the_default_is_compared_with_other_methods_at_its_budget():
  config = llama_tiny.get_config()
  with imported("pretrain") as module:
    line = module.comparison(resolve(config, jax.device_count()))
    config.steps = 2000
    assert module.comparison(resolve(config, jax.device_count())) is None
  for method, (perplexity, bits) in llama_tiny.REFERENCE.items():
    assert f"{method} {perplexity:.2f} ({bits:.3f} bits per byte)" in line
