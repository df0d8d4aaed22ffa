"""`config.data` → a `Dataset` of packed sequences, from which `loader` makes the batch of a step.

Sequences come from a folder filled by `experiments.prepare_data`, or from a folder in `cache_dir`, which is filled on
first use and is named by a hash of everything that determines the sequences. With `source=stream`, training sequences
are packed while the text is read.
"""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from switchlora_jax.data import corpus, documentation, preparation, shards, tokenizer
from switchlora_jax.data.loader import SequenceStream
from switchlora_jax.data.preparation import Request
from switchlora_jax.data.readers import BAD_ROWS, FIELD, RowOptions
from switchlora_jax.data.shards import PACKINGS, PackedSequences
from switchlora_jax.errors import UserError
from switchlora_jax.runs.tokenizer_files import tokenizer_in

TOKENIZER = "--config.data.tokenizer"
HELD_OUT = 100  # the last 1/HELD_OUT of the training sequences is held out if there is no validation text
SOURCES = {
  "docs": "documentation of the installed packages",
  "text": "your own files, packed into cache_dir first",
  "prepared": "a folder filled by experiments.prepare_data",
  "stream": "your own files, packed while they are read",
}


class Dataset(NamedTuple):
  """Packed sequences for training and validation.

  Attributes:
    train: [sequences, seq_len] on disk, or a stream of sequences of unknown length.
    valid: [sequences, seq_len] on disk.
    tokenizer_path: the tokenizer of the tokens, see `tokenizer.load_tokenizer`.
    fingerprint: hash of the sequences and the tokenizer, 16 hexadecimal digits; of a stream, hash of the validation
      sequences, the tokenizer, and the training files' paths, sizes and modification times.
    bytes_per_token: UTF-8 bytes per token of the validation text, or of the whole text if validation is held out of it.
      Padding is not counted.
    summary: sizes to print: source, fingerprint, and for train and valid the numbers of documents, characters, bytes,
      tokens and rows; with padding, also of the tokens that were cut off, and of padding.
  """

  train: PackedSequences | SequenceStream
  valid: PackedSequences
  tokenizer_path: str
  fingerprint: str
  bytes_per_token: float
  summary: dict


def check_data_config(config) -> None:
  """Checks `config.data` before any expensive work: source, globs, tokenizer and prepared folder.

  Raises:
    UserError: a setting is invalid.
  """
  data = config.data
  if data.source not in SOURCES:
    known = ", ".join(f"{name} ({what})" for name, what in SOURCES.items())
    raise UserError(
      f"--config.data.source (={data.source!r}) must be one of {known}; "
      "for your files pass --config.data.source=text --config.data.path='c4/*.json.gz'"
    )
  if data.epochs < 1:
    raise UserError(f"data.epochs (={data.epochs}) must be at least 1; set --config.data.epochs")
  if data.bad_rows not in BAD_ROWS:
    raise UserError(f"data.bad_rows (={data.bad_rows!r}) must be {' or '.join(BAD_ROWS)}; set --config.data.bad_rows")
  if data.packing not in PACKINGS:
    raise UserError(
      f"data.packing (={data.packing!r}) must be pack (documents are joined and cut into rows) or pad (each document "
      "is one row, cut or padded); set --config.data.packing"
    )
  rows = {"field": FIELD, "bad_rows": BAD_ROWS[0]}
  unused = {"docs": ("path", "eval_path", *rows), "prepared": ("eval_path", *rows)}.get(data.source, ())
  for key in unused:
    if data[key] != rows.get(key, ""):
      raise UserError(
        f"--config.data.{key} (={data[key]!r}) is not used when --config.data.source is {data.source}; "
        "leave it out, or add --config.data.source=text to train on your files"
      )
  if data.source == "prepared":
    _check_prepared(config)
  else:
    _text_origin(data)
    _check_tokenizer(config)


def open_dataset(config, *, progress: bool = True, share: tuple[int, int] = (0, 1)) -> Dataset:
  """Opens the packed sequences that `config` trains and validates on, and makes them first if necessary.

  With `data.packing=pack`, documents are joined, each ended by EOS, and cut into sequences of `seq_len` tokens; the
  remainder is dropped. With `pad`, each document is cut or padded to one sequence. Without validation text, the last 1%
  of the training sequences, at least one, is held out.

  Args:
    config: the resolved config.
    progress: whether to show progress bars.
    share: the files to verify, see `shards.verify_checksums`.

  Raises:
    UserError: `check_data_config` fails, before any expensive work; or the text is too short, or a file is damaged.
  """
  check_data_config(config)
  folder = _expanded(config.data.path) if config.data.source == "prepared" else _fill_cache(config, progress)
  manifest = shards.read_manifest(folder)
  shards.verify_checksums(folder, manifest, progress, share)
  if config.data.source == "stream":
    return _open_stream(config, folder, manifest)
  _check_length(_split_sizes(manifest), config)
  return open_folder(folder, manifest, config.data.source)


def check_length_after_skips(data: Dataset, config, skipped: int) -> None:
  """Raises `UserError` if the data do not suffice after `skipped` batches were left out because of loss spikes.

  A stream, whose length is unknown, is not checked: it raises when it ends.
  """
  if isinstance(data.train, SequenceStream):
    return
  needed, available = (config.steps + skipped) * config.batch_size, len(data.train)
  if needed > available * config.data.epochs:
    raise UserError(
      f"the run skips {skipped:,} batches because of loss spikes and so needs {needed:,} rows; the text has "
      f"{available:,} rows and is used data.epochs (={config.data.epochs}) times; repeat it once more: "
      f"--config.data.epochs={-(-needed // available)}"
    )


def _expanded(path: str) -> Path:
  return Path(path).expanduser()


def _check_tokenizer(config) -> None:
  """Checks the tokenizer of text that is not prepared, or the size of the one to train."""
  given, vocab_size = config.data.tokenizer, config.model.vocab_size
  size = tokenizer.size_to_train(given, TOKENIZER)
  if given and size is None:
    tokenizer.check_vocabulary(tokenizer.locate(given, TOKENIZER), vocab_size)
  elif config.data.source == "stream":
    raise UserError("--config.data.source=stream needs an existing tokenizer; set --config.data.tokenizer")
  elif size is not None and size > vocab_size:
    raise UserError(
      f"{TOKENIZER} (={given!r}) must fit into the model's vocabulary (={vocab_size}); "
      f"pass --config.model.vocab_size={size} or more, or a smaller size"
    )


def _check_prepared(config) -> None:
  """Checks that the prepared folder is finished, and that it fits the model, the tokenizer and the number of steps."""
  data, folder = config.data, _expanded(config.data.path)
  manifest = shards.read_manifest(folder)
  if manifest is None:
    unfinished = (folder / preparation.PROGRESS).exists()
    raise UserError(
      f"--config.data.path (={data.path!r}) must be a folder filled by experiments.prepare_data; "
      f"{'it is not finished: run that command again' if unfinished else 'it has no manifest.json'}"
    )
  if (found := manifest["request"]["seq_len"]) != config.seq_len:
    raise UserError(
      f"seq_len (={config.seq_len}) must be that of the prepared rows in {folder} (={found}); "
      f"set --config.seq_len={found}, or prepare the text with --seq_len={config.seq_len}"
    )
  if (made := shards.packing_of(manifest)) != data.packing:
    raise UserError(
      f"data.packing (={data.packing!r}) must be that of the prepared rows in {folder} (={made!r}); "
      f"set --config.data.packing={made}, or prepare the text with --packing={data.packing}"
    )
  if data.tokenizer:
    if tokenizer.size_to_train(data.tokenizer, TOKENIZER) is not None:
      raise UserError(
        f"{TOKENIZER} (={data.tokenizer!r}) trains a tokenizer, but the text in {folder} was prepared with one; leave "
        "it out, or prepare the text with it"
      )
    path = tokenizer.locate(data.tokenizer, TOKENIZER)
    tokenizer.load_tokenizer(path)
    if tokenizer.tokenizer_sha256(path) != manifest["tokenizer"]:
      raise UserError(
        f"--config.data.tokenizer (={data.tokenizer!r}) is not the tokenizer that {folder} was prepared with; "
        "leave it out, or prepare the text with it"
      )
  tokenizer.check_vocabulary(tokenizer_in(folder), config.model.vocab_size)
  _check_length(_split_sizes(manifest), config)


def _text_origin(data) -> list:
  """Versions of the packages, or paths, sizes and times of the files, to detect that the text has changed."""
  if data.source == "docs":
    return sorted(documentation.package_versions().items())
  text = _open_corpus(data)
  return [[part.origin() for part in parts or ()] for parts in (text.train, text.valid)]


def _fill_cache(config, progress: bool) -> Path:
  """The cache folder with the packed text, filled if necessary. Of a stream, only the validation text is packed."""
  data = config.data
  origin = [data.source, _text_origin(data)]
  model = data.tokenizer or f"{tokenizer.TRAIN}{config.model.vocab_size}"
  if tokenizer.size_to_train(model, TOKENIZER) is None:
    model = str(tokenizer.locate(model, TOKENIZER))
  request = Request(origin, model, config.seq_len, field=data.field, bad_rows=data.bad_rows, packing=data.packing)
  return cached_folder(data.cache_dir, data.source, request, partial(_open_corpus, data, progress), progress)


def cached_folder(
  cache_dir: str, name: str, request: Request, read: Callable[[], corpus.Corpus], progress: bool
) -> Path:
  """The folder `NAME-KEY` of the cache, filled if necessary. See `preparation.fill_folder` for the arguments."""
  folder = _expanded(cache_dir) / f"{name}-{_cache_key(request)}"
  preparation.fill_folder(folder, request, read, wait=True, progress=progress)
  return folder


def _cache_key(request: Request) -> str:
  """Hash of everything that determines the sequences, 16 hexadecimal digits."""
  contents = [preparation.FORMAT_VERSION, request.to_json(), tokenizer.library_version(request.tokenizer)[1]]
  return hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:16]


def _local_corpus(data) -> corpus.Corpus:
  """The text that `data.path` and `data.eval_path` name."""
  return corpus.open_corpus(data.path, data.eval_path, RowOptions(data.field, data.bad_rows))


def _open_corpus(data, progress: bool = False) -> corpus.Corpus:
  """The text to pack into the cache."""
  if data.source == "docs":
    text = documentation.read_documentation(progress)
    return corpus.Corpus([text.train], [text.valid], {"overlap": documentation.ngram_overlap(*text)})
  text = _local_corpus(data)
  return _validation_corpus(text) if data.source == "stream" else text


def _validation_corpus(text: corpus.Corpus) -> corpus.Corpus:
  """A corpus of the validation text alone, as `train`; raises `UserError` if there is none."""
  if text.valid is None:
    raise UserError(
      "--config.data.source=stream needs validation text; set --config.data.eval_path, or use a dataset of the hub "
      "that has a split `validation`"
    )
  return corpus.Corpus(text.valid, None)


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
  return {"source": source, "fingerprint": shards.fingerprint(manifest)} | _split_sizes(manifest) | manifest["notes"]


def _open_stream(config, folder: Path, manifest: dict) -> Dataset:
  """Opens the training text as a stream, and the packed validation text, which is the split `train` of the folder."""
  data, valid = config.data, manifest["train"]
  text = _local_corpus(data)
  origin = json.dumps([part.origin() for part in text.train] + ([data.field] if data.field != FIELD else []))
  fingerprint = hashlib.sha256(f"{shards.fingerprint(manifest)} {origin}".encode()).hexdigest()[:16]
  sizes = {"train": {"read from": data.path.encode(errors="backslashreplace").decode()}, "valid": _printed_sizes(valid)}
  return Dataset(
    train=SequenceStream(text.train, tokenizer_in(folder), config.seq_len, data.packing == "pad"),
    valid=shards.open_sequences(folder, valid),
    tokenizer_path=str(tokenizer_in(folder)),
    fingerprint=fingerprint,
    bytes_per_token=bytes_per_token(valid),
    summary={"source": data.source, "fingerprint": fingerprint} | sizes,
  )


def _split_sizes(manifest: dict) -> dict[str, dict]:
  """Sizes of `train` and `valid`. Without validation text, the last training sequences are counted as `valid`."""
  padded = shards.packing_of(manifest) == "pad"
  sizes = {name: _printed_sizes(manifest[name]) for name in preparation.SPLITS if manifest[name]}
  if "valid" not in sizes:
    train, seq_len = sizes["train"], manifest["request"]["seq_len"]
    held = min(train["rows"], max(1, train["rows"] // HELD_OUT))
    train["rows"] -= held
    tokens = {} if padded else {"tokens": held * seq_len}  # with padding they would have to be read to be counted
    sizes["valid"] = {"held out of": "train, its last rows", **tokens, "rows": held}
  return sizes


def _printed_sizes(split: dict) -> dict:
  """The sizes of a split, with the number of skipped rows if there are any, and those of padding if it is padded."""
  sizes = {key: value for key, value in split.items() if key not in ("shards", "bad_rows", "cut_tokens", "padding")}
  skipped = split.get("bad_rows", 0)
  sizes |= {"bad rows skipped": skipped} if skipped else {}
  if "padding" in split:
    kept, padding = split["tokens"] - split["cut_tokens"], split["padding"]
    share = f"{padding / max(1, kept + padding):.1%} of the rows"
    sizes |= {"tokens cut off": split["cut_tokens"], "tokens in rows": kept, "padding": share}
  return sizes


def _check_length(sizes: dict[str, dict], config) -> None:
  """Raises `UserError` if the run needs more training sequences than there are. `sizes` is as in the summary."""
  available, seq_len = sizes["train"]["rows"], config.seq_len
  needed = config.steps * config.batch_size
  if not available and config.data.packing == "pad":
    raise UserError(
      "with data.packing=pad each document is one row, and the text has none besides validation; give a text of more "
      "documents, such as JSON lines, or set --config.data.packing=pack"
    )
  if not available:
    raise UserError(
      f"the text must hold at least one row of {seq_len} tokens besides validation; it has "
      f"{sizes['train']['tokens']:,} tokens; add text, or lower --config.seq_len"
    )
  if needed > available * config.data.epochs:
    steps, epochs = available * config.data.epochs // config.batch_size, -(-needed // available)
    raise UserError(
      f"the run needs {needed:,} rows ({config.steps:,} steps of {config.batch_size}); the text has {available:,} rows "
      f"of {seq_len} tokens, enough for {steps:,} steps with data.epochs (={config.data.epochs}); add text, lower "
      f"--config.steps, or repeat the text: --config.data.epochs={epochs}"
    )
