"""SentencePiece: train a tokenizer on documents, load one, turn documents into tokens."""

import io
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece

from switchlora_jax.errors import UserError

SAMPLE = 20_000_000  # characters that training looks at, at most: the first ones
STRETCH = 1000  # characters of a line that training takes in one piece
BATCH = 1_000_000  # characters that are encoded at once


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
      f"could not train a tokenizer of --config.model.vocab_size (={vocab_size}) pieces on this text: {found}; "
      "256 pieces are bytes and each letter takes one: use more text, a larger vocabulary, or --config.data.tokenizer"
    ) from error
  unfinished = Path(f"{path}.{os.getpid()}.tmp")
  unfinished.write_bytes(model.getvalue())
  os.replace(unfinished, path)


def load_tokenizer(path: str | os.PathLike, vocab_size: int) -> sentencepiece.SentencePieceProcessor:
  """The SentencePiece model in `path`, if a model with `vocab_size` embeddings can use it."""
  flag = f"--config.data.tokenizer (={str(path)!r})"
  if not Path(path).is_file():
    raise UserError(f"{flag} must be a SentencePiece model; there is no such file; pass one, or '' to train one")
  try:
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
  except RuntimeError as error:
    raise UserError(
      f"{flag} must be a SentencePiece model; it is not ({error}); pass one, or '' to train one"
    ) from error
  if tokenizer.eos_id() < 0:
    raise UserError(
      f"{flag} must have an end-of-sentence piece, which ends documents; it has none; train it with eos_id=1"
    )
  if tokenizer.get_piece_size() > vocab_size:
    raise UserError(
      f"{flag} must fit in the model's vocabulary (={vocab_size}); it has {tokenizer.get_piece_size()} pieces; "
      f"pass --config.model.vocab_size={tokenizer.get_piece_size()} or more, or a smaller tokenizer"
    )
  return tokenizer


def encode_documents(
  tokenizer: sentencepiece.SentencePieceProcessor,
  documents: Iterable[str],
  report: Callable[[int, int], None],
) -> Iterator[np.ndarray]:
  """The tokens of the documents, each document ended by EOS, as int32 arrays of about a million characters each.

  Empty documents are left out. `report(documents, characters)` says what each array holds.
  """
  for group in _groups(_parts(documents)):
    texts, ends = zip(*group, strict=True)
    report(sum(ends), sum(map(len, texts)))
    encoded = zip(tokenizer.encode(list(texts)), ends, strict=True)  # on all cores
    yield np.concatenate([np.asarray(ids + [tokenizer.eos_id()] * end, np.int32) for ids, end in encoded])


def _parts(documents: Iterable[str]) -> Iterator[tuple[str, bool]]:
  """(text, whether its document ends with it): documents, the long ones cut after a newline so that each part fits."""
  for document in documents:
    start = 0
    while len(document) - start > BATCH:
      cut = document.rfind("\n", start, start + BATCH) + 1 or start + BATCH
      yield document[start:cut], False
      start = cut
    if document:
      yield document[start:], True


def _groups(parts: Iterator[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
  group, characters = [], 0
  for part in parts:
    group.append(part)
    characters += len(part[0])
    if characters >= BATCH:
      yield group
      group, characters = [], 0
  if group:
    yield group


def _stretches(documents: Iterable[str]) -> Iterator[str]:
  """The lines of the first documents, cut where the trainer would pass over them for their length."""
  budget = SAMPLE
  for document in documents:
    for line in document[:budget].split("\n"):
      yield from (line[start : start + STRETCH] for start in range(0, len(line), STRETCH))
    budget -= len(document)
    if budget <= 0:
      return
