"""SentencePiece tokenizers: train one on documents, or load one."""

import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from switchlora_jax.data.readers import BadRow, Document, pieces_of
from switchlora_jax.errors import UserError
from switchlora_jax.runs.files import write_bytes

SAMPLE = 20_000_000  # characters at the start of the text that the tokenizer is trained on
MAX_SENTENCE = 1000  # characters per training sentence; SentencePiece skips lines longer than 4192 bytes


def train_tokenizer(documents: Iterable[Document | BadRow], vocab_size: int, path: str | os.PathLike) -> None:
  """Trains a byte-pair model and writes it to `path` atomically. Deterministic: the same documents give the same file.

  Special ids are T5's: pad 0, eos 1, unk 2, no bos. Decoding restores newlines and runs of spaces. Characters outside
  the vocabulary are encoded as bytes. U+2581 (▁), SentencePiece's mark of a space, comes back as a space.

  Args:
    documents: the training text. At most the first `SAMPLE` characters are used. Rows without text are ignored.
    vocab_size: maximum number of pieces. A short text may yield fewer.
    path: the file to write.

  Raises:
    UserError: the text is empty or cannot be read, or the vocabulary is too small for it.
  """
  model, failures = io.BytesIO(), []
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=_recording(_training_sentences(documents), failures),
      model_writer=model,
      model_type="bpe",
      vocab_size=vocab_size,
      hard_vocab_limit=False,  # allows fewer pieces for a short text
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
    if failures:  # reading the text failed; SentencePiece reports it as an error of its own
      raise failures[0] from None
    found = "the text is empty" if "sentences_.empty()" in str(error) else str(error).rpartition("] ")[2] or error
    raise UserError(
      f"could not train a tokenizer of {vocab_size} pieces (the model's vocabulary) on this text: {found}; "
      "256 pieces are bytes and each distinct letter needs one: use more text, a larger vocabulary, or pass a tokenizer"
    ) from error
  write_bytes(Path(path), model.getvalue())


def load_tokenizer(path: str | os.PathLike) -> sentencepiece.SentencePieceProcessor:
  """Loads a SentencePiece model.

  Raises:
    UserError: there is no such file, it is not a SentencePiece model, or the model has no end-of-sentence piece.
  """
  name = f"the tokenizer {str(path)!r}"
  if not os.path.isfile(path):  # Path.is_file raises if a parent folder may not be entered
    raise UserError(
      f"{name} must be a SentencePiece model; there is no such file; pass an existing model, or let one be trained"
    )
  try:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
  except RuntimeError as error:
    raise UserError(
      f"{name} must be a SentencePiece model; reading it failed ({error}); pass another, or let one be trained"
    ) from error
  if processor.eos_id() < 0:
    raise UserError(f"{name} must have an end-of-sentence piece, to mark the end of a document; train it with eos_id=1")
  return processor


def check_vocabulary(path: str | os.PathLike, vocab_size: int) -> None:
  """Raises `UserError` if the tokenizer in `path` has more than `vocab_size` pieces."""
  found = load_tokenizer(path).get_piece_size()
  if found > vocab_size:
    raise UserError(
      f"the tokenizer {str(path)!r} must fit into the model's vocabulary (={vocab_size}); it has {found} pieces; "
      f"pass --config.model.vocab_size={found} or more, or a smaller tokenizer"
    )


def _recording(sentences: Iterator[str], failures: list[BaseException]) -> Iterator[str]:
  """Yields the sentences; appends an exception that ends them."""
  try:
    yield from sentences
  except GeneratorExit:
    raise
  except BaseException as error:
    failures.append(error)
    raise


def _training_sentences(documents: Iterable[Document | BadRow]) -> Iterator[str]:
  """The lines of the first documents, cut to at most `MAX_SENTENCE` characters."""
  budget = SAMPLE
  for document in documents:
    if isinstance(document, BadRow):
      continue
    text = _first_characters(document, budget)
    for line in text.split("\n"):
      yield from (line[start : start + MAX_SENTENCE] for start in range(0, len(line), MAX_SENTENCE))
    budget -= len(text)
    if budget <= 0:
      return


def _first_characters(document: Document, count: int) -> str:
  """The first `count` characters of a document. Pieces after them are not read."""
  found, length = [], 0
  for piece in pieces_of(document):
    found.append(piece[: count - length])
    length += len(found[-1])
    if length == count:
      break
  return "".join(found)
