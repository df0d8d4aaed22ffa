"""Tokenizers: the interface, the kinds behind it, and training.

A setting names a tokenizer by a file, a folder or a model of the Hugging Face hub (`locate`), or asks for one to be
trained (`size_to_train`).
"""

import functools
import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece
import tokenizers

from switchlora_jax.data.fast_tokenizer import FastTokenizer, train_byte_level
from switchlora_jax.data.readers import BadRow, Document, pieces_of
from switchlora_jax.errors import UserError
from switchlora_jax.runs.files import file_sha256, write_bytes
from switchlora_jax.runs.hub import folder_of
from switchlora_jax.runs.tokenizer_files import FAST, KEPT, MODEL_CONFIG, SENTENCEPIECE, is_fast, tokenizer_in

TRAIN, TRAIN_BYTES = "train:", "train_bytes:"  # followed by the size of the vocabulary
PROBE = "The Tide  rises:\n\tÀ la mer, ½ ﬁn ①. "  # capitals, accents, compatibility characters, runs of spaces
SAMPLE = 20_000_000  # characters at the start of the text that the tokenizer is trained on
MAX_SENTENCE = 1000  # characters per training sentence; SentencePiece skips lines longer than 4192 bytes


def train_tokenizer(documents: Iterable[Document | BadRow], vocab_size: int, path: str | os.PathLike) -> None:
  """Trains a byte-pair tokenizer and writes it atomically. Deterministic: the same documents give the same file.

  A `path` that ends in `.json` selects a byte-level tokenizer, see `fast_tokenizer.train_byte_level`; any other selects
  a SentencePiece model. Its special ids are T5's: pad 0, eos 1, unk 2, no bos. Decoding restores newlines and runs of
  spaces. Characters outside the vocabulary are encoded as bytes. U+2581 (▁), SentencePiece's mark of a space, comes
  back as a space.

  Args:
    documents: the training text. At most the first `SAMPLE` characters are used. Rows without text are ignored.
    vocab_size: maximum number of pieces. A short text may yield fewer.
    path: the file to write.

  Raises:
    UserError: the text is empty or cannot be read, or the vocabulary is too small for it.
  """
  if is_fast(path):
    return train_byte_level(_first_texts(documents), vocab_size, Path(path))
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


class Tokenizer(Protocol):
  """A tokenizer of any kind.

  Attributes:
    size: number of ids; the largest id is less.
    eos: id of the end of a document. `encode` never gives it.
    bos, pad: ids of these special tokens; None if the tokenizer has none.
    prefix: ids that its own post-processing puts before a text, such as BOS. `encode` leaves them out.
  """

  size: int
  eos: int
  bos: int | None
  pad: int | None
  prefix: tuple[int, ...]

  def encode(self, texts: Sequence[str], parallel: bool = True) -> list[list[int]]:
    """The ids of each text, without special tokens. The texts are valid Unicode.

    Args:
      texts: any number of texts, which are encoded independently of each other.
      parallel: whether to use all cores.
    """

  def decode(self, ids: Sequence[int]) -> str:
    """The text of ids. An incomplete character gives U+FFFD; special tokens give no text."""

  def token_bytes(self, token: int) -> bytes:
    """The UTF-8 bytes that an id stands for; empty for special tokens and the unknown token."""

  def unknown(self, text: str) -> list[str]:
    """The parts of a text that have no tokens of their own: they are encoded as the unknown token, or dropped."""


class SentencePieceTokenizer:
  """A SentencePiece model, which implements `Tokenizer`."""

  prefix: tuple[int, ...] = ()

  def __init__(self, path: Path):
    name = f"the tokenizer {str(path)!r}"
    try:
      self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except RuntimeError as error:
      raise UserError(
        f"{name} must be a SentencePiece model; reading it failed ({error}); pass another, or let one be trained"
      ) from error
    if self._processor.eos_id() < 0:
      raise UserError(
        f"{name} must have an end-of-sentence piece, to mark the end of a document; train it with eos_id=1"
      )
    self.size, self.eos = self._processor.get_piece_size(), self._processor.eos_id()
    self.bos, self.pad = (
      number if number >= 0 else None for number in (self._processor.bos_id(), self._processor.pad_id())
    )

  def encode(self, texts: Sequence[str], parallel: bool = True) -> list[list[int]]:
    """See `Tokenizer.encode`."""
    return self._processor.encode(list(texts), num_threads=-1 if parallel else 1)

  def decode(self, ids: Sequence[int]) -> str:
    """See `Tokenizer.decode`."""
    return self._processor.decode(list(ids))

  def token_bytes(self, token: int) -> bytes:
    """See `Tokenizer.token_bytes`."""
    if self._processor.is_control(token) or self._processor.is_unknown(token):
      return b""
    piece = self._processor.id_to_piece(token)
    return bytes([int(piece[3:5], 16)]) if self._processor.is_byte(token) else piece.replace("▁", " ").encode()

  def unknown(self, text: str) -> list[str]:
    """See `Tokenizer.unknown`."""
    pieces = self._processor.encode(text, return_type="proto").pieces
    return [piece.surface for piece in pieces if piece.id == self._processor.unk_id()]


def locate(name: str, key: str) -> Path:
  """The file of the tokenizer that a setting names. Models of the hub are downloaded, their tokenizers alone.

  Args:
    name: a SentencePiece model, a tokenizer.json, a folder with one, or `hub:NAME[@REVISION]`. Of a folder with both
      files, tokenizer.model is used.
    key: the setting, for messages, such as `--tokenizer`.

  Raises:
    UserError: the folder or the model has neither file, or the hub cannot be reached. A file is not checked.
  """
  path = folder_of(name, (*KEPT, MODEL_CONFIG), key, f"its {FAST} or {SENTENCEPIECE}")
  if not os.path.isdir(path):
    return path
  if not (found := tokenizer_in(path)).exists():
    raise UserError(
      f"{key} (={name!r}) must have a {SENTENCEPIECE} or a {FAST}; it has neither; pass another tokenizer, or let one "
      "be trained"
    )
  return found


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
  """Loads a SentencePiece model, or a file of the `tokenizers` library if its name ends in `.json`.

  Raises:
    UserError: the file is missing or holds no tokenizer, or the tokenizer has no EOS token.
  """
  if not os.path.isfile(path):  # Path.is_file raises if a parent folder may not be entered
    raise UserError(
      f"the tokenizer {str(path)!r} must be a SentencePiece model or a tokenizer.json; there is no such file; pass an "
      "existing tokenizer, or let one be trained"
    )
  path = Path(path)
  return _load_fast(path, _modified(path)) if is_fast(path) else SentencePieceTokenizer(path)


@functools.lru_cache(2)  # a large file takes seconds to load, and a run asks for it several times
def _load_fast(path: Path, modified: tuple) -> FastTokenizer:
  return FastTokenizer(path)


def _modified(path: Path) -> tuple:
  """Times and sizes of a tokenizer.json and of the files beside it, which change if the tokenizer does."""
  files = [path, *(path.with_name(name) for name in (*KEPT, MODEL_CONFIG))]
  return tuple((stat.st_mtime_ns, stat.st_size) for stat in (file.stat() for file in files if file.exists()))


def tokenizer_sha256(path: Path) -> str:
  """Hash of what determines the ids of a text and EOS: the file, and of a tokenizer.json also the id of EOS.

  Raises:
    UserError: see `load_tokenizer`; not for a SentencePiece model.
    OSError: a SentencePiece model cannot be read.
  """
  if not is_fast(path):
    return file_sha256(path)
  return hashlib.sha256(f"{file_sha256(path)} {load_tokenizer(path).eos}".encode()).hexdigest()


def gives_same_ids(path: Path, other: Path) -> bool:
  """Whether two tokenizers are the same: equal checksums, a tokenizer.json written again, or a conversion.

  They are compared by EOS and the ids of a sample text; two tokenizer.json also by the bytes of the ids that both have.
  """
  if tokenizer_sha256(path) == tokenizer_sha256(other):
    return True
  if not (is_fast(path) or is_fast(other)):
    return False
  both = load_tokenizer(path), load_tokenizer(other)
  shared = range(min(tokenizer.size for tokenizer in both) if is_fast(path) and is_fast(other) else 0)
  found = [(t.eos, t.encode([PROBE]), [t.token_bytes(token) for token in shared]) for t in both]
  return found[0] == found[1]


def library_version(name: str) -> tuple[str, str]:
  """(package, version) of the library that a tokenizer belongs to, from its path or its `train:SIZE`."""
  if is_fast(name) or name.startswith(TRAIN_BYTES):
    return "tokenizers", tokenizers.__version__
  return "sentencepiece", sentencepiece.__version__


def copy_in_run(name: str, workdir: Path) -> str:
  """`data.tokenizer` of a run as the copy in its directory, which stays if the file is moved; "" and `train:SIZE` stay.

  Args:
    name: the value of `data.tokenizer`.
    workdir: the directory of the run.
  """
  return str(tokenizer_in(workdir)) if name and size_to_train(name, "data.tokenizer") is None else name


def size_to_train(name: str, key: str) -> int | None:
  """SIZE if a setting is `train:SIZE` or `train_bytes:SIZE`; None if it names a tokenizer.

  Raises:
    UserError: SIZE is not a number. `key` is the setting in the message.
  """
  for kind in (TRAIN, TRAIN_BYTES):
    if name.startswith(kind):
      size = name.removeprefix(kind)
      if not (size.isascii() and size.isdecimal() and len(size) < 10):
        raise UserError(f"{key} (={name!r}) must give the number of pieces, as in {kind}32000")
      return int(size)
  return None


def check_vocabulary(path: str | os.PathLike, vocab_size: int) -> None:
  """Raises `UserError` if the tokenizer in `path` has more than `vocab_size` ids."""
  found = load_tokenizer(path).size
  if found > vocab_size:
    raise UserError(
      f"the tokenizer {str(path)!r} must fit into the model's vocabulary (={vocab_size}); it has {found} pieces; "
      f"pass --config.model.vocab_size={found} or more, or a smaller tokenizer"
    )


def lossy_example(tokenizer: Tokenizer) -> tuple[str, str] | None:
  """A text and what decoding its ids gives instead, if the tokenizer changes text; else None."""
  found = tokenizer.decode(tokenizer.encode([PROBE])[0])
  return None if found == PROBE else (PROBE, found)


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
  for text in _first_texts(documents):
    for line in text.split("\n"):
      yield from (line[start : start + MAX_SENTENCE] for start in range(0, len(line), MAX_SENTENCE))


def _first_texts(documents: Iterable[Document | BadRow]) -> Iterator[str]:
  """The texts of the first documents, `SAMPLE` characters in all."""
  budget = SAMPLE
  for document in documents:
    if isinstance(document, BadRow):
      continue
    text = _first_characters(document, budget)
    yield text
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
