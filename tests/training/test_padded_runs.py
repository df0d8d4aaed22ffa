"""Runs on padded rows: they continue bitwise, and count and print their tokens without padding."""

import shutil

import pytest
from short_runs import lines, train
from small_model import same_bits
from tiny import sentences, write_lines

from switchlora_jax.training import report

pytestmark = [pytest.mark.user_flags, pytest.mark.two_linear_layers]


@pytest.fixture(scope="module")
def run(folder):
  """A run of 12 steps on padded rows of 16 tokens, saved after 6 and 12 of them."""
  short = [text[: 5 + n % 60] for n, text in enumerate(sentences(0, 120))]
  path = write_lines(folder / "lines.jsonl", short)
  changes = dict(method="switchlora", checkpoint_every=6, data__packing="pad", data__path=str(path))
  return train(folder, "whole", **changes), changes


@pytest.mark.slow
def test_a_padded_run_continues_bitwise(run, folder):
  whole, changes = run
  shutil.copytree(whole.workdir, folder / "again")
  shutil.rmtree(folder / "again" / "checkpoints" / "12")
  again = train(folder, "again", **changes)
  assert again.outcome.first_step == 6
  assert lines(again) == lines(whole) and lines(again, "val_loss") == lines(whole, "val_loss")
  assert same_bits(again.outcome.state, whole.outcome.state)


def test_a_padded_run_counts_and_prints_its_tokens(run):
  whole, _ = run
  counts = [int((rows >= 0).sum()) for _, _, rows in whole.batches]
  assert [row["tokens"] for row in lines(whole)] == counts and len(set(counts)) > 1
  share = 1 - sum(counts) / (12 * 8 * 16)
  assert [row["padding_share"] for row in lines(whole)] == pytest.approx([1 - count / 128 for count in counts])
  assert report._padding_lines(whole.outcome) == [
    f"tokens trained on: {sum(counts):,}, without padding, which was {share:.1%} of the rows"
  ]
