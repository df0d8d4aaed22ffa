"""Folders of packed sequences: in the cache, where they are filled on first use, or prepared by the user.

A folder of the cache is named by a hash of everything that determines its sequences.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from switchlora_jax.data import corpus, preparation, shards, tokenizer
from switchlora_jax.data.loader import SequenceStream
from switchlora_jax.data.mixture import Mixture
from switchlora_jax.data.preparation import Request
from switchlora_jax.data.shards import PackedSequences
from switchlora_jax.runs.tokenizer_files import tokenizer_in

SKIPPED = "bad rows skipped"  # key of printed sizes
HELD_OUT = 100  # without a validation text, the last 1/100 of the training sequences is held out


class PackedText(NamedTuple):
  """The sequences of one text.

  Attributes:
    label: name of the text, for metrics and messages.
    rows: [sequences, seq_len] on disk.
    bytes_per_token: UTF-8 bytes of text per token, without padding.
    fingerprint: hash of the sequences and the tokenizer, 16 hexadecimal digits.
    sizes: to print, as in `Dataset.summary`.
  """

  label: str
  rows: PackedSequences
  bytes_per_token: float
  fingerprint: str
  sizes: Mapping[str, Any] = MappingProxyType({})

  @property
  def bad_rows(self) -> int:
    """Number of rows of its files that have no text and were left out."""
    return self.sizes.get(SKIPPED, 0)


class Dataset(NamedTuple):
  """Packed sequences for training and validation.

  Attributes:
    train: [sequences, seq_len] on disk, or a stream of sequences of unknown length, or a mixture of texts.
    valid: [sequences, seq_len] on disk.
    tokenizer_path: the tokenizer of the tokens, see `tokenizer.load_tokenizer`.
    fingerprint: hash of the sequences and the tokenizer, 16 hexadecimal digits; of a stream, hash of the validation
      sequences, the tokenizer, and the training files' paths, sizes and modification times. That of a mixture depends
      on all its texts and their shares. `also` has no part in it.
    bytes_per_token: UTF-8 bytes per token of the validation text, or of the whole text if validation is held out of it.
      Padding is not counted.
    summary: sizes to print: source, fingerprint, and for train and valid the numbers of documents, characters, bytes,
      tokens and rows; with padding, also of the tokens that were cut off, and of padding.
    also: further validation texts.
  """

  train: PackedSequences | SequenceStream | Mixture
  valid: PackedSequences
  tokenizer_path: str
  fingerprint: str
  bytes_per_token: float
  summary: dict
  also: tuple[PackedText, ...] = ()


def cached_folder(
  cache_dir: str, name: str, request: Request, read: Callable[[], corpus.Corpus], progress: bool
) -> Path:
  """The folder `NAME-KEY` of the cache, filled if necessary. See `preparation.fill_folder` for the arguments."""
  folder = cache_folder(cache_dir, name, request)
  preparation.fill_folder(folder, request, read, wait=True, progress=progress)
  return folder


def cache_folder(cache_dir: str, name: str, request: Request) -> Path:
  """The folder `NAME-KEY` of the cache, which may not exist."""
  return Path(cache_dir).expanduser() / f"{name}-{cache_key(request)}"


def cache_key(request: Request) -> str:
  """Hash of everything that determines the sequences, 16 hexadecimal digits."""
  contents = [preparation.FORMAT_VERSION, request.to_json(), tokenizer.library_version(request.tokenizer)[1]]
  return hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:16]


def open_folder(folder: Path, manifest: dict, source: str) -> Dataset:
  """Opens a finished folder. `source` only appears in the summary."""
  summary = summarize_folder(manifest, source)
  count = summary["train"]["rows"]
  packed = shards.open_sequences(folder, manifest["train"])
  measured = manifest["valid"] or manifest["train"]
  return Dataset(
    train=packed[:count],
    valid=shards.open_sequences(folder, manifest["valid"]) if manifest["valid"] else packed[count:],
    tokenizer_path=str(tokenizer_in(folder)),
    fingerprint=summary["fingerprint"],
    bytes_per_token=bytes_per_token(measured),
    summary=summary,
  )


def bytes_per_token(split: dict) -> float:
  """UTF-8 bytes of text per token in the rows of a split, from its entry in the manifest.

  Of documents that were cut, the bytes of the rest of their text are not counted: it is assumed to have as many bytes
  per token as the whole text. EOS has none, and is counted as a token.
  """
  whole, cut = split["tokens"], split.get("cut_tokens", 0)
  if not cut:
    return split["bytes"] / max(1, whole)
  of_text = split["bytes"] / (whole - split["documents"])
  return of_text * (whole - cut - split["documents"]) / (whole - cut)


def summarize_folder(manifest: dict, source: str) -> dict:
  """`Dataset.summary` of a finished folder."""
  return {"source": source, "fingerprint": shards.fingerprint(manifest)} | split_sizes(manifest) | manifest["notes"]


def split_sizes(manifest: dict) -> dict[str, dict]:
  """Sizes of `train` and `valid`. Without validation text, the last training sequences are counted as `valid`."""
  padded = shards.packing_of(manifest) == "pad"
  sizes = {name: printed_sizes(manifest[name]) for name in preparation.SPLITS if manifest[name]}
  if "valid" not in sizes:
    train, seq_len = sizes["train"], manifest["request"]["seq_len"]
    held = min(train["rows"], max(1, train["rows"] // HELD_OUT))
    train["rows"] -= held
    tokens = {} if padded else {"tokens": held * seq_len}  # with padding they would have to be read to be counted
    sizes["valid"] = {"held out of": "train, its last rows", **tokens, "rows": held}
  return sizes


def printed_sizes(split: dict) -> dict:
  """The sizes of a split, with the number of skipped rows if there are any, and those of padding if it is padded."""
  sizes = {key: value for key, value in split.items() if key not in ("shards", "bad_rows", "cut_tokens", "padding")}
  skipped = split.get("bad_rows", 0)
  sizes |= {SKIPPED: skipped} if skipped else {}
  if "padding" in split:
    kept, padding = split["tokens"] - split["cut_tokens"], split["padding"]
    share = f"{padding / max(1, kept + padding):.1%} of the rows"
    sizes |= {"tokens cut off": split["cut_tokens"], "tokens in rows": kept, "padding": share}
  return sizes
