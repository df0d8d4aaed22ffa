import json
import os
import re
import resource
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from switchlora_jax.data import shards
from switchlora_jax.data.shards import MANIFEST, PackedSequences
from switchlora_jax.errors import UserError
from switchlora_jax.runs.files import file_sha256, read_checksummed_json, write_bytes, write_checksummed_json
from switchlora_jax.runs.tokenizer_files import SENTENCEPIECE


def write_folder(tmp_path, counts=(3, 3, 2), seq_len=4):
  """Writes shards of `counts` sequences with distinct tokens; returns their manifest and the tokens."""
  array = np.arange(sum(counts) * seq_len, dtype=np.uint16).reshape(-1, seq_len)
  pieces = np.split(array, np.cumsum(counts)[:-1])
  (tmp_path / SENTENCEPIECE).write_bytes(b"a model")
  written = [shards.write_shard(tmp_path / f"train-{n:05}.npy", piece) for n, piece in enumerate(pieces)]
  manifest = {"tokenizer": file_sha256(tmp_path / SENTENCEPIECE), "train": {"rows": len(array), "shards": written}}
  write_checksummed_json(tmp_path / MANIFEST, manifest | {"valid": None})
  return shards.read_manifest(tmp_path), array


# Sequences.


@st.composite
def split_rows(draw):
  """Sequences in several shards, and the same sequences as an array."""
  each, last, full = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(0, 4))
  counts = [each] * full + [min(last, each)]
  array = np.arange(sum(counts) * 3, dtype=np.uint16).reshape(-1, 3)
  return PackedSequences(np.split(array, np.cumsum(counts)[:-1]), 0, len(array)), array


@given(both=split_rows(), data=st.data())
def test_sequences_are_those_of_the_shards_in_order(both, data):
  found, array = both
  for _ in range(data.draw(st.integers(0, 2))):  # slices of slices
    part = slice(*(data.draw(st.none() | st.integers(-30, 30)) for _ in range(2)))
    found, array = found[part], array[part]
  assert len(found) == len(array) and found.shape == array.shape and found.dtype == array.dtype
  np.testing.assert_array_equal(np.asarray(found), array)
  if len(array):
    picks = data.draw(st.lists(st.integers(-len(array), len(array) - 1)))
    np.testing.assert_array_equal(found[np.array(picks, int)], array[np.array(picks, int)])
    np.testing.assert_array_equal(found[picks[0] if picks else -1], array[picks[0] if picks else -1])


def test_invalid_indices_raise_index_error():
  found = PackedSequences([np.zeros((3, 2)), np.zeros((2, 2))], 0, 5)
  for which in (5, -6, np.array([0, 5])):
    with pytest.raises(IndexError):
      found[which]
  with pytest.raises(IndexError):
    found[1:4][3]
  with pytest.raises(IndexError, match="a step of 2"):
    found[::2]


def test_shards_are_memory_mapped_and_indexing_returns_plain_arrays(tmp_path):
  manifest, array = write_folder(tmp_path)
  found = shards.open_sequences(tmp_path, manifest["train"])
  maps = Path("/proc/self/maps").read_text()
  assert all(str(tmp_path / f"train-{n:05}.npy") in maps for n in range(3))
  assert type(found[np.array([7, 0])]) is type(found[3]) is np.ndarray
  np.testing.assert_array_equal(found, array)


def test_thousands_of_shards_do_not_need_as_many_open_files(tmp_path):
  manifest, array = write_folder(tmp_path, counts=(1,) * 90)
  limits = resource.getrlimit(resource.RLIMIT_NOFILE)
  resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, limits[1]))
  try:
    shards.verify_checksums(tmp_path, manifest, progress=False)
    found = shards.open_sequences(tmp_path, manifest["train"])
    np.testing.assert_array_equal(found, array)
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


# Files.


def test_write_bytes_is_atomic(tmp_path, monkeypatch):
  path = tmp_path / "file"
  write_bytes(path, b"old")

  def fail(*_):
    raise OSError("disk full")

  for name in ("fsync", "replace"):
    with monkeypatch.context() as patch:
      patch.setattr(os, name, fail)
      with pytest.raises(OSError, match="disk full"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
  write_bytes(path, b"new")
  assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_checksummed_json_round_trips(tmp_path):
  contents = {"a": [1, 2.5, None], "b": {"é": "x"}}
  write_checksummed_json(tmp_path / "file", contents)
  assert read_checksummed_json(tmp_path / "file") == contents
  assert read_checksummed_json(tmp_path / "none") is None


@settings(deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
def test_any_change_of_checksummed_json_is_detected(tmp_path_factory, place, byte):
  path = tmp_path_factory.getbasetemp() / "changed.json"
  contents = {"request": {"seq_len": 16}, "train": {"rows": 12345, "shards": [["a", 12345, "f" * 64]]}}
  write_checksummed_json(path, contents)
  changed = bytearray(path.read_bytes())
  changed[int(place * len(changed))] = byte
  path.write_bytes(changed)
  try:
    assert read_checksummed_json(path) == contents  # the change is in white space
  except UserError as error:
    assert re.search(
      r"changed\.json is not the JSON that was written \(.*\); delete .*, and prepare it again", str(error)
    )


@pytest.mark.parametrize(
  "contents", [b"", b"{", b"null", b"[]", b"{}", b"3", b"\xff\xfe", b'"sha256"', b'{"sha256": 1}']
)
def test_a_damaged_manifest_is_a_user_error(tmp_path, contents):
  (tmp_path / MANIFEST).write_bytes(contents)
  with pytest.raises(UserError, match=r"manifest\.json is not the JSON that was written"):
    shards.read_manifest(tmp_path)


def test_an_unreadable_manifest_is_a_user_error(tmp_path):
  for folder in (tmp_path / ("a" * 300), tmp_path):  # a file name that is too long; a directory in place of the file
    tmp_path.joinpath(MANIFEST).mkdir(exist_ok=True)
    with pytest.raises(UserError, match=r"manifest\.json must be a file that can be read; \[Errno"):
      shards.read_manifest(folder)


# Checksums.


def test_unchanged_files_pass_verification(tmp_path):
  manifest, _ = write_folder(tmp_path)
  shards.verify_checksums(tmp_path, manifest, progress=False)


def flip_bit(path):
  contents = bytearray(path.read_bytes())
  contents[-1] ^= 1
  path.write_bytes(contents)


CHANGES = {
  "changed": flip_bit,
  "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
  "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("name", ["train-00000.npy", "train-00002.npy", SENTENCEPIECE])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_truncated_or_missing_file_is_named(tmp_path, name, change):
  manifest, _ = write_folder(tmp_path)
  CHANGES[change](tmp_path / name)
  found = "No such file or directory" if change == "missing" else "[0-9a-f]{64}"
  message = rf"{re.escape(name)} must have the SHA-256 [0-9a-f]{{64}}; found {found}; restore it, or prepare the data"
  with pytest.raises(UserError, match=message):
    shards.verify_checksums(tmp_path, manifest, progress=False)


@pytest.mark.parametrize("name", ["train-00000.npy", "train-00001.npy", "train-00002.npy", SENTENCEPIECE])
def test_every_file_is_verified_by_exactly_one_process(tmp_path, name):
  manifest, _ = write_folder(tmp_path)
  flip_bit(tmp_path / name)
  found = []
  for process in range(3):
    try:
      shards.verify_checksums(tmp_path, manifest, progress=False, share=(process, 3))
    except UserError:
      found.append(process)
  assert len(found) == 1


def test_validation_shards_are_verified(tmp_path):
  manifest, _ = write_folder(tmp_path)
  shard = shards.write_shard(tmp_path / "valid-00000.npy", np.zeros((2, 4), np.uint16))
  manifest["valid"] = {"rows": 2, "shards": [shard]}
  shards.verify_checksums(tmp_path, manifest, progress=False)
  flip_bit(tmp_path / "valid-00000.npy")
  with pytest.raises(UserError, match=r"valid-00000\.npy must have"):
    shards.verify_checksums(tmp_path, manifest, progress=False)


def test_the_fingerprint_depends_only_on_tokenizer_and_sequences(tmp_path):
  manifest, _ = write_folder(tmp_path)
  other = json.loads(json.dumps(manifest))
  other["train"]["shards"][0][0], other["notes"] = "renamed.npy", "elsewhere"
  assert shards.fingerprint(other) == shards.fingerprint(manifest)
  prints = {shards.fingerprint(manifest), shards.fingerprint(manifest | {"tokenizer": "x"})}
  prints.add(shards.fingerprint(manifest | {"valid": manifest["train"]}))
  other["train"]["shards"][0][2] = "x"
  assert len(prints | {shards.fingerprint(other)}) == 4


@pytest.mark.parametrize("which", [0, 7, [2, 5], [6]])
def test_a_shard_truncated_while_open_is_a_user_error(tmp_path, which):
  """Without the check, reading beyond the end of the file is a SIGBUS, which Python cannot handle."""
  manifest, _ = write_folder(tmp_path)
  found = shards.open_sequences(tmp_path, manifest["train"])
  for name in ("train-00000.npy", "train-00001.npy", "train-00002.npy"):
    os.truncate(tmp_path / name, os.path.getsize(tmp_path / name) - 1)
  with pytest.raises(UserError, match=r"train-0000\d.npy must have 1\d\d bytes; it was cut to 1\d\d during the run"):
    found[np.array(which)]


def test_a_shard_removed_while_open_stays_readable(tmp_path):
  manifest, array = write_folder(tmp_path)
  found = shards.open_sequences(tmp_path, manifest["train"])
  for path in tmp_path.glob("*.npy"):
    path.unlink()
  np.testing.assert_array_equal(np.asarray(found), array)
