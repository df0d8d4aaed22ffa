"""The printed descriptions of runs, data and results."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import resolved, sentences

from configs.base import get_config
from switchlora_jax.data import tokenizer
from switchlora_jax.parallel.sharding import make_mesh
from switchlora_jax.training import report
from switchlora_jax.training.phases import build_phase


def test_sizes_are_counted():
  tree = {"a": jnp.zeros((1000, 1234)), "b": {"c": jnp.zeros(3, jnp.bfloat16)}}
  assert report.parameters_line("trainable", tree) == "trainable parameters: 1.2M (1,234,003)"
  assert report.size_line("optimizer", tree) == "optimizer: 4.7 MiB (4,936,006 bytes)"


def test_a_kernel_with_a_residual_counts_as_one_parameter_of_three_bytes():
  tree = {"q": {"kernel": jnp.zeros((10, 20), jnp.bfloat16), "kernel_tail": jnp.zeros((10, 20), jnp.int8)}}
  assert report.parameters_line("frozen", tree) == "frozen parameters: 0.0M (200)"
  assert report.size_line("frozen", tree).endswith("(600 bytes)")


def test_the_description_of_a_run_has_its_sizes_and_cycles(tmp_path):
  config = resolved(tmp_path)
  text = report.describe_run(config, build_phase(config, make_mesh()).abstract)
  assert (
    text.startswith("learning_rate: 0.02\nrest_learning_rate: 0.02\ndtype: float32\n") and "switch.interval" not in text
  )
  assert "\ntokens per step: 128\n" in text
  # r/(c-r) · Σ 3^(-(t+1) / (p·T)) / interval = 4/12 · 0.6675 / 2
  assert "candidates cycled over the run, hidden × hidden layers: 0.11 times" in text
  plain = resolved(tmp_path, method="lora")
  assert "cycled" not in report.describe_run(plain, build_phase(plain, make_mesh()).abstract)


def test_data_are_described():
  sizes = {"documents": 3, "tokens": 4567, "rows": 12}
  summary = {"source": "docs", "fingerprint": "f00", "train": sizes, "valid": {"held out of": "train", "rows": 2}}
  assert report.describe_data(summary | {"overlap": 0.0123}) == (
    "data: docs, fingerprint f00\n  train: 3 documents, 4,567 tokens, 12 rows\n  valid: held out of train, 2 rows\n"
    "  8-word sequences of validation that occur in training: 1.23%"
  )


def test_further_texts_are_described():
  sizes = {"source": "docs", "fingerprint": "f00", "train": {"rows": 12}, "valid": {"rows": 2}}
  further = {"mixture old/*": {"share": "0.1 of all rows", "rows": 1200}, "valid old": {"rows": 7}}
  assert report.describe_data(sizes | {"further": further}).splitlines()[3:] == [
    "  mixture old/*: share 0.1 of all rows, 1,200 rows",
    "  valid old: 7 rows",
  ]


def test_metrics_that_are_missing_or_not_finite_do_not_raise():
  assert report._validation_lines([]) == report._training_lines([]) == []
  rows = [{"step": 3, "tokens_per_second": 5.0}, {"step": 3, "val_loss": None, "val_ppl": None}]
  assert report._validation_lines(rows) == [
    "validation perplexity: not finite (loss not finite nats per token, step 3)"
  ]
  assert report._training_lines(rows) == ["tokens per second: 5 (median)"]


def test_the_last_perplexity_is_printed_with_bits_per_byte():
  rows = [{"step": step, "val_loss": 3.5, "val_ppl": 33.12 + step, "val_bpb": 1.23456} for step in (1, 2)]
  assert report._validation_lines(rows) == [
    "validation perplexity: 35.12 (loss 3.5000 nats per token, step 2)",
    "validation bits per byte: 1.2346 (perplexity is per token; this compares tokenizers)",
  ]


def test_perplexities_before_and_after_are_printed_for_a_run_that_starts_from_weights():
  """And those of further validation texts, in any run that has them; one may have diverged."""
  rows = [
    {"step": step, "val_loss": 3.5, "val_ppl": 33.1 + step, "val_ppl/old": old} for step, old in ((0, 9.0), (2, None))
  ]
  lines = ["step 0: validation perplexity 33.10; old 9.00", "step 2: validation perplexity 35.10; old not finite"]
  assert report._validation_lines(rows)[1:] == lines
  from_weights = [{key: value for key, value in row.items() if "/" not in key} for row in rows]
  assert report._validation_lines(from_weights)[1:] == [line.partition(";")[0] for line in lines]


@pytest.mark.parametrize(("error", "warned"), [(2.0, True), (None, True), (1.0, False)])
def test_an_inexact_perplexity_is_reported(error, warned):
  """`None` is NaN, of a single validation row."""
  rows = [{"step": 1, "val_loss": 3.5, "val_ppl": 33.1, "val_ppl_se": error}]
  warnings = [line for line in report._validation_lines(rows) if line.startswith("WARNING: few validation rows")]
  assert len(warnings) == warned and all("--config.data.eval_path" in line for line in warnings)


def test_spikes_are_counted_including_rolled_back_ones():
  rows = [{"step": 1, "spike": 0, "loss": 2.0}, {"step": 1, "val_loss": None, "val_ppl": None}, {"step": 2, "spike": 1}]
  assert report._training_lines(rows)[-1] == "loss spikes: 1"
  assert report._training_lines([*rows, {"step": 3, "spike": 0, "rollbacks": 2}])[-1] == "loss spikes: 3"


def test_the_command_to_continue_is_the_current_one_with_more_steps(monkeypatch):
  monkeypatch.setattr(
    sys, "argv", ["pretrain.py", "--config.data.path=a/*.txt", "--config.steps=10", "--workdir=runs/a"]
  )
  assert report.continue_command(20).endswith("'--config.data.path=a/*.txt' --workdir=runs/a --config.steps=20")
  monkeypatch.setattr(sys, "argv", ["pretrain.py", "--config.steps", "10", "--workdir=runs/a"])
  assert report.continue_command(20).endswith(" --workdir=runs/a --config.steps=20")


@pytest.fixture(scope="module")
def sentence_pieces(tmp_path_factory):
  """A tokenizer, and the tokens of 40 documents of about 30 tokens, each with EOS."""
  path = tmp_path_factory.mktemp("tokenizer") / "some.model"
  documents = sentences(0, 40)
  tokenizer.train_tokenizer(documents, 300, path)
  processor = tokenizer.load_tokenizer(path)
  return processor, [[*processor.encode([text])[0], processor.eos] for text in documents]


def test_a_sample_begins_with_a_document(sentence_pieces):
  """Held-out rows begin anywhere in a text; rows of a validation text begin with its first document."""
  processor, documents = sentence_pieces
  tokens = np.concatenate(documents)
  text = lambda rows, **how: processor.decode(report.sample_prompt(rows, processor, 12, **how))
  whole = tokens[: len(tokens) // 64 * 64].reshape(-1, 64)
  assert sentences(0, 1)[0].startswith(text(whole, starts=True))
  cut = tokens[7 : 7 + 64 * 8].reshape(-1, 64)
  assert not processor.decode(cut[0].tolist()).startswith("Wave")
  assert sentences(1, 2)[0].startswith(text(cut, starts=False))
  short = np.concatenate([documents[0][:3], [processor.eos], tokens])[None, :64]
  assert text(short, starts=True) == processor.decode(documents[0][:3])


def test_a_sample_of_a_text_without_documents_begins_with_a_word(sentence_pieces):
  processor, documents = sentence_pieces
  tokens = np.array(documents[5][:-1])
  (inside,) = [n for n in range(1, 9) if processor.token_bytes(int(tokens[n])) == b"a" and n < 4][:1] or [1]
  row = tokens[None, inside:]
  words = processor.decode(report.sample_prompt(row, processor, 8, starts=False))
  assert words.startswith(" ") and words.strip().split()[0] in sentences(5, 6)[0].split()
  assert report.sample_prompt(np.full((1, 8), 40), processor, 4, starts=False) == [40] * 4


def test_the_hand_over_of_a_warm_start_is_reported():
  rows = [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.0, "hand_over": 1}, {"step": 2, "val_loss": 3.0}]
  expected = "hand-over of the warm start after step 1: loss 5.0000 before, 4.0000 after"
  assert report._training_lines(rows) == [expected]
  assert report._training_lines(rows[:1]) == []


def test_the_changed_keys_of_a_config_are_a_table():
  defaults = get_config()
  assert report.describe_changes(defaults, get_config()) == "config: the defaults of configs/base.py"
  defaults.rank, defaults.learning_rate, defaults.switch.interval = 32, 1e-2, 7
  defaults.data.path = "a/*"
  assert report.describe_changes(defaults, get_config()).splitlines() == [
    "config, where it differs from configs/base.py (config.json has all keys):",
    "  data.path        'a/*' (default '')",
    "  learning_rate    0.01 (default None)",
    "  rank             32 (default 128)",
    "  switch.interval  7 (default 40)",
  ]
