import gzip
import json
import os
import socket
import time
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from tiny import write_lines

from switchlora_jax.data import corpus, readers
from switchlora_jax.errors import UserError

ROWS = corpus.RowOptions(flags="--")


def train_documents(path, eval_path=""):
  """All training documents, in order."""
  return [text for part in corpus.open_corpus(str(path), eval_path, ROWS).train for text in part]


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
  text = corpus.open_corpus(f"{files}/**", "", ROWS)
  once = [["é one\n\n two"], ["three\n"], ["four\nfive", "six"], ["seven", ""], ["eight", "nine\u2028ten"]]
  assert [list(part) for part in text.train] == once == [list(part) for part in text.train]
  assert text.valid is None


def test_files_are_read_without_network_or_cache(files, offline):
  assert len(train_documents(f"{files}/**")) == 8
  assert not offline and not (files / "hub_cache").exists()


def test_files_are_read_lazily(tmp_path):
  (tmp_path / "a.jsonl").write_bytes(json_lines("fine") + b"not json\n")
  (part,) = corpus.open_corpus(f"{tmp_path}/*", "", ROWS).train
  documents = iter(part)
  assert next(documents) == "fine"
  with pytest.raises(UserError):
    next(documents)


def test_a_file_of_long_documents_is_read_lazily(tmp_path):
  (tmp_path / "a.jsonl").write_bytes(json_lines("a" * 500_000) * 60 + b"\xff")  # the invalid byte follows after 30 MB
  (part,) = corpus.open_corpus(f"{tmp_path}/*", "", ROWS).train
  assert len(next(iter(part))) == 500_000


def test_training_and_validation_must_not_share_files(files):
  text = corpus.open_corpus(f"{files}/*.txt", f"{files}/*.gz", ROWS)
  assert [[list(part) for part in parts] for parts in text[:2]] == [[["é one\n\n two"]], [["three\n"]]]
  with pytest.raises(
    UserError, match=r"--path and --eval_path both match .*a\[1\]\.txt \(shared files: 1\); narrow one"
  ):
    corpus.open_corpus(f"{files}/*", f"{files}/*.txt", ROWS)


def test_a_shared_file_is_detected_through_links_and_relative_paths(files, monkeypatch):
  monkeypatch.chdir(files)
  (files / "link").symlink_to(files / "b.md.gz")
  for same in ("*.txt", "deep/../*.txt", "link", "./link"):
    with pytest.raises(UserError, match="--path and --eval_path both match"):
      corpus.open_corpus(f"{files}/*", same, ROWS)


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
  ],
)
def test_a_glob_that_matches_nothing_is_a_user_error(path, eval_path, message):
  with pytest.raises(UserError, match=message):
    corpus.open_corpus(path, eval_path, ROWS)


def test_a_folder_is_an_error_that_names_the_glob_of_its_files(tmp_path):
  for name in ("flat/a.txt", "deep/b.txt", "deep/er/c.txt", "odd [1]/d.txt", "none/.hidden"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
  (tmp_path / "broken").symlink_to("nowhere")
  found = {}
  for name in ("flat", "deep/", "odd [1]", "none", "broken", "*"):
    with pytest.raises(UserError) as caught:
      corpus.matching_files(f"{tmp_path}/{name}", "--path")
    found[name] = str(caught.value).split("files; ", 1)[1].replace(f"{tmp_path}/", "").split(", and quote")[0]
  assert found == {
    "flat": "flat is a folder; pass its files, in quotes: --path='flat/*'",
    "deep/": "deep/ is a folder; pass its files, in quotes: --path='deep/**/*'",
    "odd [1]": "odd [1] is a folder; pass its files, in quotes: --path='odd [[]1]/*'",
    "none": "none is a folder without files",
    "broken": "it matches no file; check it with ls",
    "*": "deep is a folder; pass its files, in quotes: --path='*/**/*'",
  }
  assert corpus.matching_files(f"{tmp_path}/odd [[]1]/*", "--path") == (f"{tmp_path}/odd [1]/d.txt",)


ODD_NAMES = [*b"a::b http::c * [1] ? # %20 caf\xe9 ~ -".split(), b"a b", b"line\nbreak", "é\u2028😀".encode()]


@pytest.mark.parametrize("suffix", ["jsonl.gz", "txt", "parquet"])
def test_any_legal_file_name_is_read(tmp_path, suffix):
  for number, name in enumerate(ODD_NAMES):
    path = os.path.join(os.fsencode(tmp_path), name + b"." + suffix.encode())
    if suffix == "parquet":
      with open(path, "wb") as file:
        write_parquet(file, text=[str(number)])
    else:
      with open(path, "wb") as file:
        file.write(gzip.compress(json_lines(str(number))) if suffix == "jsonl.gz" else str(number).encode())
  assert sorted(train_documents(f"{tmp_path}/*")) == sorted(map(str, range(len(ODD_NAMES))))
  for number, name in enumerate(ODD_NAMES):
    path = f"{tmp_path}/{os.fsdecode(name)}.{suffix}"
    assert train_documents(path) == [str(number)]
    json.dumps(corpus.LocalFile(path).origin()).encode()


# Rows without text.


def test_bad_rows_are_errors_or_yielded_in_place(tmp_path):
  (tmp_path / "a.jsonl").write_bytes(json_lines("one") + b'{"text": null}\n' + json_lines("two"))
  stop, skip = (
    corpus.open_corpus(f"{tmp_path}/*", "", ROWS._replace(bad_rows=what)).train[0] for what in readers.BAD_ROWS
  )
  with pytest.raises(UserError, match=r'a\.jsonl, line 2: .*; found \{"text": null\}; .*, or pass --bad_rows=skip to'):
    list(stop)
  one, bad, two = skip
  assert (one, two) == ("one", "two") and isinstance(bad, readers.BadRow)


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
  text = corpus.open_corpus(f"hub:{hub}", "", ROWS)
  once = [[["one", "two"], ["three"]], [["four"]]]
  assert [[list(part) for part in parts] for parts in text[:2]] == once
  assert [[list(part) for part in parts] for parts in text[:2]] == once, "differs on the second read"
  assert [part.origin() for part in text.train] == [[f"hub:{hub}, train", n, 2] for n in (0, 1)]
  assert not offline, "the network was used"
  assert {path.name for path in tmp_path.iterdir()} <= {"hub", "hub_cache"}


def test_a_hub_dataset_may_lack_a_validation_split(hub):
  (hub / "validation.jsonl").unlink()
  assert corpus.open_corpus(f"hub:{hub}", "", ROWS).valid is None


def test_an_unreachable_hub_dataset_is_a_user_error(offline):
  message = (
    r"hub:no-such/set could not be opened: ConnectionError: .*; it needs network access .*pass its files: --path='c4/en"
  )
  with pytest.raises(UserError, match=message):
    corpus.open_corpus("hub:no-such/set", "", ROWS)
  assert offline


def test_a_hub_dataset_with_eval_path_or_without_train_split_is_a_user_error(hub):
  with pytest.raises(UserError, match=r"--eval_path \(='x'\) is not used with hub:.*; leave it out"):
    corpus.open_corpus(f"hub:{hub}", "x", ROWS)
  for path in hub.glob("train*"):
    path.unlink()
  with pytest.raises(UserError, match=r"must have a split `train`; it has validation"):
    corpus.open_corpus(f"hub:{hub}", "", ROWS)


def test_a_hub_dataset_without_a_text_field_is_a_user_error(hub):
  (hub / "train-01.jsonl").write_text('{"txt": "x"}\n')
  (hub / "train-00.jsonl").write_text('{"txt": "x"}\n')
  with pytest.raises(
    UserError,
    match=r"^hub:\S+, train must have a field `text` of strings; found \['txt'\]; pass --field=txt, or choose",
  ):
    train_documents(f"hub:{hub}")


def test_hub_text_is_cleaned_and_rows_without_text_are_named_or_skipped(hub):
  (hub / "train-00.jsonl").write_bytes(json_lines("\ufeffone") + b'{"text": null}\n')
  message = r"^hub:\S+, train, shard 0, row 2: expected a string in the field `text`; found None; .* --bad_rows=skip"
  with pytest.raises(UserError, match=message):
    train_documents(f"hub:{hub}")
  one, bad = corpus.open_corpus(f"hub:{hub}", "", ROWS._replace(bad_rows="skip")).train[0]
  assert one == "one" and isinstance(bad, readers.BadRow)


def test_a_zstandard_file_of_the_hub_is_read_whole_or_refused(hub):
  """The reader of fsspec returns the first frame, and the start of one that is cut."""
  (hub / "train-00.jsonl").unlink()
  (hub / "train-01.jsonl").unlink()
  frames = [zstandard.compress(json_lines(f"{n}")) for n in range(3)]
  path = hub / "train.jsonl.zst"
  path.write_bytes(b"".join(frames))
  assert train_documents(f"hub:{hub}") == ["0", "1", "2"]
  path.write_bytes(b"".join(frames)[:-5])
  with pytest.raises(UserError, match=r"train, shard 0: reading failed with .*; the same command continues"):
    train_documents(f"hub:{hub}")
  with fsspec.open(hub / "other.zst", "wb", compression="infer") as file:
    file.write(b"as before")
  assert zstandard.decompress((hub / "other.zst").read_bytes(), 99) == b"as before"


def test_an_unreadable_hub_shard_is_a_user_error(hub):
  text = corpus.open_corpus(f"hub:{hub}", "", ROWS)
  (hub / "train-01.jsonl").write_text("{")
  assert list(text.train[0]) == ["one", "two"]
  with pytest.raises(UserError, match=r"^hub:\S+, train, shard 1: reading failed with .*; the same command continues"):
    list(text.train[1])
