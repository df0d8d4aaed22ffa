"""SentencePiece: train a tokenizer on documents, or load one."""

import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from switchlora_jax.errors import UserError
from switchlora_jax.runs.files import write_bytes

SAMPLE = 20_000_000  # characters that training looks at, at most: the first ones
STRETCH = 1000  # characters of a line that training takes in one piece


def train_tokenizer(documents: Iterable[str], vocab_size: int, path: str | os.PathLike) -> None:
  """Write a byte-pair model of at most `vocab_size` pieces to `path`: T5's pad 0, eos 1, unk 2 and no bos.

  It loses nothing: newlines and runs of spaces survive, and what is not among its pieces is spelt in
  bytes. The same documents give the same file; a file that exists is complete.
  """
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=_stretches(documents),
      model_writer=model,
      model_type="bpe",
      vocab_size=vocab_size,
      hard_vocab_limit=False,  # a short text may have fewer pieces
      pad_id=0,
      eos_id=1,
      unk_id=2,
      bos_id=-1,
      normalization_rule_name="identity",
      remove_extra_whitespaces=False,
      add_dummy_prefix=False,
      byte_fallback=True,
      split_digits=True,
      minloglevel=2,
    )
  except RuntimeError as error:
    found = "it is empty" if "sentences_.empty()" in str(error) else error
    raise UserError(
      f"could not train a tokenizer of {vocab_size} pieces (the model's vocabulary) on this text: {found}; "
      "256 pieces are bytes and each letter takes one: use more text, a larger vocabulary, or name a tokenizer"
    ) from error
  write_bytes(Path(path), model.getvalue())


def load_tokenizer(path: str | os.PathLike) -> sentencepiece.SentencePieceProcessor:
  """The SentencePiece model in `path`, which must be able to end a document."""
  name = f"the tokenizer {str(path)!r}"
  if not os.path.isfile(path):  # nor where a folder may not be entered, which Path.is_file raises
    raise UserError(f"{name} must be a SentencePiece model; there is no such file; name one, or have one trained")
  try:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
  except RuntimeError as error:
    raise UserError(
      f"{name} must be a SentencePiece model; it is not ({error}); name one, or have one trained"
    ) from error
  if processor.eos_id() < 0:
    raise UserError(f"{name} must have an end-of-sentence piece, which ends documents; train it with eos_id=1")
  return processor


def check_vocabulary(path: str | os.PathLike, vocab_size: int) -> None:
  """Raise `UserError` unless a model with `vocab_size` embeddings can use the tokenizer in `path`."""
  found = load_tokenizer(path).get_piece_size()
  if found > vocab_size:
    raise UserError(
      f"the tokenizer {str(path)!r} must fit in the model's vocabulary (={vocab_size}); it has {found} pieces; "
      f"pass --config.model.vocab_size={found} or more, or a smaller tokenizer"
    )


def _stretches(documents: Iterable[str]) -> Iterator[str]:
  """The lines of the first documents, cut where the trainer would pass over them for their length."""
  budget = SAMPLE
  for document in documents:
    for line in document[:budget].split("\n"):
      yield from (line[start : start + STRETCH] for start in range(0, len(line), STRETCH))
    budget -= len(document)
    if budget <= 0:
      return
