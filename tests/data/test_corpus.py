import bz2
import gzip
import importlib.util
import json
import lzma
import os
import socket
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from paths import ROOT
from tiny import write_lines

from switchlora_jax.data import corpus
from switchlora_jax.errors import UserError

FLAGS = ("--path", "--eval_path")
COMPRESSORS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


def train_documents(path, eval_path=""):
  """All training documents, in order."""
  return [text for part in corpus.open_corpus(str(path), eval_path, FLAGS).train for text in part]


def json_lines(*texts):
  return "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts).encode()


def write_parquet(path, **columns):
  pyarrow.parquet.write_table(pyarrow.table(columns), path)


@pytest.fixture
def files(tmp_path):
  """Files of every format, in nested folders."""
  (tmp_path / "deep" / "er").mkdir(parents=True)
  (tmp_path / "a[1].txt").write_bytes("é one\r\n\n two".encode())
  (tmp_path / "b.md.gz").write_bytes(gzip.compress(b"three\n"))
  (tmp_path / "deep" / "c.json").write_bytes(b"\n" + json_lines("four\nfive", "six"))
  (tmp_path / "deep" / "er" / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "seven"}\n{"url": [], "text": ""}'))
  write_parquet(tmp_path / "e.parquet", n=[1, 2], text=["eight", "nine\u2028ten"])
  return tmp_path


@pytest.fixture
def offline(monkeypatch, tmp_path):
  """Blocks the network and gives `datasets` an empty cache. Returns the addresses to which connections were tried."""
  import datasets

  tried = []

  def refuse(*address, **_):
    tried.append(address)
    raise socket.gaierror(-2, "Name or service not known")

  monkeypatch.setattr(socket.socket, "connect", refuse)
  monkeypatch.setattr(socket, "getaddrinfo", refuse)
  monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between two attempts
  monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub_cache")
  return tried


# Local files.


def test_a_glob_of_mixed_formats_can_be_read_repeatedly(files):
  text = corpus.open_corpus(f"{files}/**", "", FLAGS)
  once = [["é one\n\n two"], ["three\n"], ["four\nfive", "six"], ["seven", ""], ["eight", "nine\u2028ten"]]
  assert [list(part) for part in text.train] == once == [list(part) for part in text.train]
  assert text.valid is None


@pytest.mark.parametrize("ending", COMPRESSORS)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_compressed_files_are_decompressed(tmp_path, name, ending):
  content = json_lines("one", "two") if name == "a.jsonl" else b"one\ntwo"
  (tmp_path / f"{name}.{ending}").write_bytes(COMPRESSORS[ending](content))
  assert train_documents(f"{tmp_path}/*") == (["one", "two"] if name == "a.jsonl" else ["one\ntwo"])


@pytest.mark.parametrize(("ending", "package"), [("zst", "zstandard"), ("lz4", "lz4")])
def test_a_missing_decompressor_is_a_user_error(tmp_path, ending, package):
  if importlib.util.find_spec(package):
    pytest.skip(f"{package} is installed")
  (tmp_path / f"a.jsonl.{ending}").write_bytes(json_lines("one"))
  with pytest.raises(UserError, match=rf"not supported; pip install {package} if it is missing, or convert"):
    train_documents(f"{tmp_path}/*")


def test_files_are_read_without_network_or_cache(files, offline):
  assert len(train_documents(f"{files}/**")) == 8
  assert not offline and not (files / "hub_cache").exists()


def test_files_are_read_lazily(tmp_path):
  (tmp_path / "a.jsonl").write_bytes(json_lines("fine") + b"not json\n")
  (part,) = corpus.open_corpus(f"{tmp_path}/*", "", FLAGS).train
  documents = iter(part)
  assert next(documents) == "fine"
  with pytest.raises(UserError):
    next(documents)


def test_a_file_of_long_documents_is_read_lazily(tmp_path):
  (tmp_path / "a.jsonl").write_bytes(json_lines("a" * 500_000) * 60 + b"\xff")  # the invalid byte follows after 30 MB
  (part,) = corpus.open_corpus(f"{tmp_path}/*", "", FLAGS).train
  assert len(next(iter(part))) == 500_000


def test_training_and_validation_must_not_share_files(files):
  text = corpus.open_corpus(f"{files}/*.txt", f"{files}/*.gz", FLAGS)
  assert [[list(part) for part in parts] for parts in text[:2]] == [[["é one\n\n two"]], [["three\n"]]]
  with pytest.raises(
    UserError, match=r"--path and --eval_path both match .*a\[1\]\.txt \(shared files: 1\); narrow one"
  ):
    corpus.open_corpus(f"{files}/*", f"{files}/*.txt", FLAGS)


def test_a_shared_file_is_detected_through_links_and_relative_paths(files, monkeypatch):
  monkeypatch.chdir(files)
  (files / "link").symlink_to(files / "b.md.gz")
  for same in ("*.txt", "deep/../*.txt", "link", "./link"):
    with pytest.raises(UserError, match="--path and --eval_path both match"):
      corpus.open_corpus(f"{files}/*", same, FLAGS)


def test_a_file_that_a_glob_matches_twice_is_listed_once(files):
  assert len(corpus.matching_files(f"{files}/**/**", "--path")) == 5


@pytest.mark.parametrize("name", ["a.JSONL", "a.Json", "a.jsonl.GZ", "a.JSON.gz"])
def test_suffixes_are_case_insensitive(tmp_path, name):
  packed = gzip.compress if name.lower().endswith("gz") else bytes
  (tmp_path / name).write_bytes(packed(json_lines("one", "two")))
  assert train_documents(tmp_path / name) == ["one", "two"]


def test_the_origin_of_a_file_changes_with_its_size_and_modification_time(tmp_path):
  path = write_lines(tmp_path / "a.jsonl", ["one"])
  before = corpus.LocalFile(str(path)).origin()
  assert corpus.LocalFile(str(path)).origin() == before == json.loads(json.dumps(before))
  os.utime(path, ns=(1, 1))
  touched = corpus.LocalFile(str(path)).origin()
  write_lines(path, ["three"])
  os.utime(path, ns=(1, 1))
  assert len({tuple(origin) for origin in (before, touched, corpus.LocalFile(str(path)).origin())}) == 3


@pytest.mark.parametrize(
  ("path", "eval_path", "message"),
  [
    ("", "", r"--path must be a glob of text files; it is empty; pass e\.g\. --path='c4/\*\.json\.gz'"),
    ("none/*.txt", "", r"--path \(='none/\*\.txt'\) must match .* it matches no file"),
    (str(Path(__file__)), "none", r"--eval_path \(='none'\) must match"),
    (str(ROOT), "", "matches no file"),
  ],
)
def test_a_glob_that_matches_nothing_is_a_user_error(path, eval_path, message):
  with pytest.raises(UserError, match=message):
    corpus.open_corpus(path, eval_path, FLAGS)


def corrupted(packed: bytes) -> bytes:
  return packed[: len(packed) // 2] + b"\xff" * 20


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    (
      "a.jsonl",
      json_lines("x") + b'{"txt": "y"}\n',
      r"a\.jsonl, line 2: expected .*`text`.*; found the fields \['txt'\]",
    ),
    ("a.jsonl", b'{"text": 3}\n', r'line 1: .*found \{"text": 3\}; write one such object per line'),
    (
      "a.jsonl",
      json_lines("x") + b'{"text": "\\ud800"}\n',
      r"a\.jsonl, line 2: .*found invalid JSON \(.*surrogates not allowed",
    ),
    ("a.jsonl", json_lines("x") + b"[" * 100_000, r"a\.jsonl, line 2: .*found invalid JSON \(maximum recursion"),
    ("a.json", b'[\n{"text": "x"}]', r"a\.json, line 1: .*found invalid JSON"),
    ("a.json", b'["x"]', r'found \["x"\]'),
    ("a.txt", b"caf\xe9", r"a\.txt must be UTF-8 text .*UnicodeDecodeError.*; convert or"),
    ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl must be UTF-8 text"),
    ("a.json.gz", b'{"text": "x"}', r"a\.json\.gz must be .*compressed as its suffix says\).*BadGzipFile"),
    ("a.txt.gz", gzip.compress(bytes(range(97, 123)) * 999, mtime=0)[:-9], r"a\.txt\.gz must be .*EOFError"),
    ("a.txt.gz", gzip.compress(b"x" * 99, mtime=0)[:10] + b"\xff" * 20, r"a\.txt\.gz must be .*: Error -3"),
    ("a.txt.bz2", corrupted(bz2.compress(b"x" * 99)), r"a\.txt\.bz2 must be .*OSError"),
    ("a.txt.xz", corrupted(lzma.compress(b"x" * 99)), r"a\.txt\.xz must be .*LZMAError"),
    ("a.txt.xz", lzma.compress(b"x" * 99)[:-40], r"a\.txt\.xz must be .*EOFError"),
    ("a.tar.gz", gzip.compress(b"x", mtime=0), r"a\.tar\.gz must be .*NotImplementedError"),
    ("a.zip", b"PK\x03\x04", r"a\.zip must be .*BadZipFile"),
    ("a[1].gz", gzip.compress(b"x", mtime=0)[:-1], r"a\[1\]\.gz must be .*; convert or rename it"),
    ("a.parquet", b"PAR1", r"a\.parquet must be a Parquet file with a column `text` of strings; .*ArrowInvalid"),
  ],
)
def test_an_unreadable_file_is_a_user_error(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=message) as caught:
    train_documents(f"{tmp_path}/*")
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("columns", "message"),
  [
    ({"txt": ["x"]}, "No match for FieldRef"),
    ({"text": [1]}, "found 1; leave such rows out"),
    ({"text": ["x", None]}, "found None"),
  ],
)
def test_parquet_without_text_strings_is_a_user_error(tmp_path, columns, message):
  write_parquet(tmp_path / "a.parquet", **columns)
  with pytest.raises(
    UserError, match=rf"a\.parquet must be a Parquet file with a column `text` of strings; .*{message}"
  ):
    train_documents(f"{tmp_path}/*")


# The hub.


@pytest.fixture
def hub(tmp_path, offline):
  """A local folder that stands in for a hub dataset: two training shards and one validation shard."""
  folder = tmp_path / "hub"
  write_lines(folder / "train-00.jsonl", ["one", "two"])
  write_lines(folder / "train-01.jsonl", ["three"])
  write_lines(folder / "validation.jsonl", ["four"])
  return folder


def test_a_hub_dataset_has_one_part_per_shard(hub, offline, tmp_path):
  text = corpus.open_corpus(f"hub:{hub}", "", FLAGS)
  once = [[["one", "two"], ["three"]], [["four"]]]
  assert [[list(part) for part in parts] for parts in text[:2]] == once
  assert [[list(part) for part in parts] for parts in text[:2]] == once, "differs on the second read"
  assert [part.origin() for part in text.train] == [[f"hub:{hub}, train", n, 2] for n in (0, 1)]
  assert not offline, "the network was used"
  assert {path.name for path in tmp_path.iterdir()} <= {"hub", "hub_cache"}


def test_a_hub_dataset_may_lack_a_validation_split(hub):
  (hub / "validation.jsonl").unlink()
  assert corpus.open_corpus(f"hub:{hub}", "", FLAGS).valid is None


def test_an_unreachable_hub_dataset_is_a_user_error(offline):
  message = (
    r"hub:no-such/set could not be opened: ConnectionError: .*; it needs network access .*pass its files: --path='c4/en"
  )
  with pytest.raises(UserError, match=message):
    corpus.open_corpus("hub:no-such/set", "", FLAGS)
  assert offline


def test_a_hub_dataset_with_eval_path_or_without_train_split_is_a_user_error(hub):
  with pytest.raises(UserError, match=r"--eval_path \(='x'\) is not used with hub:.*; leave it out"):
    corpus.open_corpus(f"hub:{hub}", "x", FLAGS)
  for path in hub.glob("train*"):
    path.unlink()
  with pytest.raises(UserError, match=r"must have a split `train`; it has validation"):
    corpus.open_corpus(f"hub:{hub}", "", FLAGS)


def test_a_hub_dataset_without_a_text_field_is_a_user_error(hub):
  (hub / "train-01.jsonl").write_text('{"txt": "x"}\n')
  (hub / "train-00.jsonl").write_text('{"txt": "x"}\n')
  with pytest.raises(
    UserError, match=r"^hub:\S+, train must have a field `text` of strings; found \['txt'\]; choose ano"
  ):
    train_documents(f"hub:{hub}")


def test_an_unreadable_hub_shard_is_a_user_error(hub):
  text = corpus.open_corpus(f"hub:{hub}", "", FLAGS)
  (hub / "train-01.jsonl").write_text("{")
  assert list(text.train[0]) == ["one", "two"]
  with pytest.raises(UserError, match=r"^hub:\S+, train, shard 1: reading failed with .*; the same command continues"):
    list(text.train[1])
