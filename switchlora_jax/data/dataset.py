"""config.data → packed rows; `batches` makes of them the batch of a step.

Rows come from a folder that `experiments.prepare_data` filled, or from one in `cache_dir` whose name says what it was
made from and which is filled now; or they are packed while the text is read (source=stream).
"""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import sentencepiece

from switchlora_jax.data import corpus, documentation, packing, preparation, shards, stream, tokenizer
from switchlora_jax.data.preparation import TRAIN, Request
from switchlora_jax.data.shards import Rows
from switchlora_jax.data.stream import Stream
from switchlora_jax.errors import UserError
from switchlora_jax.runs.files import file_sha256

HELD_OUT = 100  # one row in so many validates where the text has no validation files
FLAGS = ("--config.data.path", "--config.data.eval_path")
SOURCES = {
  "docs": "documentation of the installed packages",
  "text": "your own files, packed into cache_dir first",
  "prepared": "a folder that experiments.prepare_data filled",
  "stream": "your own files, packed while they are read",
}


class Dataset(NamedTuple):
  """Packed rows, and what they are.

  Attributes:
    train: [rows, seq_len], on disk; or a stream of such rows, of unknown length.
    valid: [rows, seq_len], on disk.
    tokenizer_path: the SentencePiece model of the tokens.
    fingerprint: of the rows and the tokenizer, 16 hexadecimal digits; where they were made does not change it.
    bytes_per_token: of the validation text as UTF-8, or where training lends its last rows of all text.
    summary: sizes to print: source, fingerprint, and of train and valid the documents, characters, bytes, tokens, rows.
  """

  train: Rows | Stream
  valid: Rows
  tokenizer_path: str
  fingerprint: str
  bytes_per_token: float
  summary: dict


def check(config) -> None:
  """Find what is wrong with `config.data` before anything expensive: source, globs, tokenizer, prepared rows."""
  data = config.data
  if data.source not in SOURCES:
    known = ", ".join(f"{name} ({what})" for name, what in SOURCES.items())
    raise UserError(
      f"--config.data.source (={data.source!r}) must be one of {known}; "
      "for your files pass --config.data.source=text --config.data.path='c4/*.json.gz'"
    )
  if data.epochs < 1:
    raise UserError(f"data.epochs (={data.epochs}) must be at least 1; set --config.data.epochs")
  unread = {"docs": ("path", "eval_path"), "prepared": ("eval_path",)}.get(data.source, ())
  for key in unread:
    if data[key]:
      raise UserError(
        f"--config.data.{key} (={data[key]!r}) is not read when --config.data.source is {data.source}; "
        "leave it out, or add --config.data.source=text to train on your files"
      )
  if data.source == "prepared":
    _check_prepared(config)
  else:
    _origin(data)
    if data.tokenizer:
      tokenizer.check_vocabulary(_expanded(data.tokenizer), config.model.vocab_size)
    elif data.source == "stream":
      raise UserError("--config.data.source=stream needs a SentencePiece model; set --config.data.tokenizer")


def prepare(config, *, progress: bool = True, share: tuple[int, int] = (0, 1)) -> Dataset:
  """The rows that `config` trains and validates on: found in a folder, or made now.

  Documents are joined, each ended by EOS, and cut into rows of `seq_len` tokens; the remainder is
  dropped. Text without validation files lends its last hundredth of the rows, at least one.

  Args:
    share: see `shards.verify`.
  Raises:
    UserError: before anything expensive where `check` finds a mistake; else where the text is too short.
  """
  check(config)
  folder = _expanded(config.data.path) if config.data.source == "prepared" else _fill_cache(config, progress)
  manifest = shards.read_manifest(folder)
  shards.verify(folder, manifest, progress, share)
  if config.data.source == "stream":
    return _open_stream(config, folder, manifest)
  _check_rows(_held_out(manifest), config)
  return open_folder(folder, manifest, config.data.source)


def check_ahead(data: Dataset, config, ahead: int) -> None:
  """Raise `UserError` unless the rows last for a run that left out so many batches; a stream tells when it ends."""
  if isinstance(data.train, Stream):
    return
  wanted, found = (config.steps + ahead) * config.batch_size, len(data.train)
  if wanted > found * config.data.epochs:
    raise UserError(
      f"the run goes on {ahead:,} batches ahead in the data, to leave out loss spikes, and so takes {wanted:,} rows; "
      f"there are {found:,}, used data.epochs (={config.data.epochs}) times; repeat them once more: "
      f"--config.data.epochs={-(-wanted // found)}"
    )


def _expanded(path: str) -> Path:
  return Path(path).expanduser()


def _check_prepared(config) -> None:
  """Whether a prepared folder, by its manifest, is finished and fits the model, the tokenizer and the run's length."""
  data, folder = config.data, _expanded(config.data.path)
  manifest = shards.read_manifest(folder)
  if manifest is None:
    unfinished = (folder / preparation.PROGRESS).exists()
    raise UserError(
      f"--config.data.path (={data.path!r}) must be a folder that experiments.prepare_data has filled; "
      f"{'it is not finished: run that command again' if unfinished else 'it has no manifest.json'}"
    )
  if (found := manifest["request"]["seq_len"]) != config.seq_len:
    raise UserError(
      f"seq_len (={config.seq_len}) must be that of the prepared rows in {folder} (={found}); "
      f"set --config.seq_len={found}, or prepare the text with --seq_len={config.seq_len}"
    )
  if data.tokenizer:
    tokenizer.load_tokenizer(_expanded(data.tokenizer))
    if file_sha256(_expanded(data.tokenizer)) != manifest["tokenizer"]:
      raise UserError(
        f"--config.data.tokenizer (={data.tokenizer!r}) is not the tokenizer that {folder} was prepared with; "
        "leave it out, or prepare the text with it"
      )
  tokenizer.check_vocabulary(folder / shards.TOKENIZER, config.model.vocab_size)
  _check_rows(_held_out(manifest), config)


def _origin(data) -> list:
  """What the text is made from, as JSON: it changes when the text may have changed."""
  if data.source == "docs":
    return sorted(documentation.package_versions().items())
  text = _corpus(data)
  return [[part.origin() for part in parts or ()] for parts in (text.train, text.valid)]


def _fill_cache(config, progress: bool) -> Path:
  """The folder of `cache_dir` with the rows of the text; of a stream, of the text that validates."""
  data = config.data
  facts = [data.source, _origin(data)]
  given = str(_expanded(data.tokenizer)) if data.tokenizer else f"{TRAIN}{config.model.vocab_size}"
  request = Request(facts, given, config.seq_len)
  return cached(data.cache_dir, data.source, request, partial(_corpus, data, progress), progress)


def cached(cache_dir: str, name: str, request: Request, read: Callable[[], corpus.Corpus], progress: bool) -> Path:
  """The folder `NAME-…` of a cache that holds such rows: filled now, unless it was; see `preparation.prepare`."""
  folder = _expanded(cache_dir) / f"{name}-{_key(request)}"
  preparation.prepare(folder, request, read, wait=True, progress=progress)
  return folder


def _corpus(data, progress: bool = False) -> corpus.Corpus:
  """The text that is packed into the cache."""
  if data.source == "docs":
    text = documentation.documentation(progress)
    return corpus.Corpus([text.train], [text.valid], {"overlap": documentation.overlap(*text)})
  text = corpus.open_corpus(data.path, data.eval_path, FLAGS)
  return stream.validation(text) if data.source == "stream" else text


def _key(request: Request) -> str:
  """A name for everything that decides the rows, this code included."""
  digest = hashlib.sha256()
  for module in (corpus, documentation, packing, preparation, shards, tokenizer):
    digest.update(Path(module.__file__).read_bytes())
  digest.update(json.dumps([request.facts(), sentencepiece.__version__]).encode())
  return digest.hexdigest()[:16]


def open_folder(folder: Path, manifest: dict, source: str) -> Dataset:
  """The rows of a folder that is filled; `source` is only named."""
  summary = summarize(manifest, source)
  fingerprint, left = summary["fingerprint"], summary["train"]["rows"]
  train = shards.open_rows(folder, manifest["train"])
  train, valid = train[:left], shards.open_rows(folder, manifest["valid"]) if manifest["valid"] else train[left:]
  told = manifest["valid"] or manifest["train"]
  return Dataset(
    train, valid, str(folder / shards.TOKENIZER), fingerprint, told["bytes"] / max(1, told["tokens"]), summary
  )


def summarize(manifest: dict, source: str) -> dict:
  """The sizes of a prepared folder, as `Dataset.summary`."""
  return {"source": source, "fingerprint": shards.fingerprint(manifest)} | _held_out(manifest) | manifest["notes"]


def _open_stream(config, folder: Path, manifest: dict) -> Dataset:
  """Training text as it is read; the folder has the rows of the text that validates."""
  data, validates = config.data, manifest["train"]
  text = corpus.open_corpus(data.path, data.eval_path, FLAGS)
  origin = json.dumps([part.origin() for part in text.train])
  fingerprint = hashlib.sha256(f"{shards.fingerprint(manifest)} {origin}".encode()).hexdigest()[:16]
  sizes = {"train": {"read from": data.path}, "valid": {k: v for k, v in validates.items() if k != "shards"}}
  return Dataset(
    train=Stream(text.train, folder / shards.TOKENIZER, config.seq_len),
    valid=shards.open_rows(folder, validates),
    tokenizer_path=str(folder / shards.TOKENIZER),
    fingerprint=fingerprint,
    bytes_per_token=validates["bytes"] / max(1, validates["tokens"]),
    summary={"source": data.source, "fingerprint": fingerprint} | sizes,
  )


def _held_out(manifest: dict) -> dict[str, dict]:
  """The sizes of training and validation, where training lends the last of its rows if the text has no other."""
  sizes = {
    name: {key: value for key, value in manifest[name].items() if key != "shards"}
    for name in ("train", "valid")
    if manifest[name]
  }
  if "valid" not in sizes:
    train, seq_len = sizes["train"], manifest["request"]["seq_len"]
    held = min(train["rows"], max(1, train["rows"] // HELD_OUT))
    train["rows"] -= held
    sizes["valid"] = {"held out of": "train, its last rows", "tokens": held * seq_len, "rows": held}
  return sizes


def _check_rows(sizes: dict[str, dict], config) -> None:
  """Whether the rows, `sizes` as in the summary, last for the run."""
  found, seq_len = sizes["train"]["rows"], config.seq_len
  wanted = config.steps * config.batch_size
  if not found:
    raise UserError(
      f"the text must hold at least one row of {seq_len} tokens besides validation; it has "
      f"{sizes['train']['tokens']:,} tokens; add text, or lower --config.seq_len"
    )
  if wanted > found * config.data.epochs:
    epochs = -(-wanted // found)
    raise UserError(
      f"the run takes {wanted:,} rows ({config.steps:,} steps of {config.batch_size}) and the text has {found:,} rows "
      f"of {seq_len} tokens, enough for {found * config.data.epochs // config.batch_size:,} steps in data.epochs "
      f"(={config.data.epochs}); add text, lower --config.steps, or repeat it: --config.data.epochs={epochs}"
    )
