import re

import pytest
from grids import imported
from tiny import sentences, write_lines

from switchlora_jax.data import tokenizer
from switchlora_jax.errors import UserError


def test_every_cost_is_a_line(tmp_path, monkeypatch, capsys):
  write_lines(tmp_path / "a.jsonl", sentences(0, 100))
  tokenizer.train_tokenizer(sentences(0, 100), 320, tmp_path / "own.model")
  flags = [f"--path={tmp_path}/*.jsonl", f"--tokenizer={tmp_path}/own.model", "--characters=20000", "--shards=7"]
  with imported("benchmark_data", *flags) as command:
    monkeypatch.setattr(command, "BATCHES", ((4, 8),))
    monkeypatch.setattr(command, "READ", 3200)
    shards = []
    monkeypatch.setattr(
      command, "time_batches", lambda found, size, f=command.time_batches: shards.append(found) or f(found, size)
    )
    command.main()
  read, first, *lines = capsys.readouterr().out.splitlines()
  assert re.fullmatch(r"\.jsonl +0\.01 MB on disk +[\d.]+ MB of text per second", read)
  assert first.startswith("100 documents, ")
  names = ["", "SentencePiece, one thread", "SentencePiece, all cores", "preparation, rows of 8", "batches of 4 × 8"]
  assert all(line.startswith(name) for line, name in zip(lines, names, strict=True))
  assert all(float(number) > 0 for line in lines[1:] for number in line.split()[-2:])
  assert 7 <= len(shards[0]._shards) <= 8 and len(shards[0]) == sum(map(len, shards[0]._shards))


def test_the_library_alone_is_a_line_of_a_fast_tokenizer(tmp_path, capsys):
  tokenizer.train_tokenizer(sentences(0, 100), 320, tmp_path / "tokenizer.json")
  with imported("benchmark_data") as command:
    command.time_tokenizer(tmp_path / "tokenizer.json", sentences(0, 100))
  names = ["tokenizers, one thread", "tokenizers, all cores", "encode_batch of the library"]
  lines = capsys.readouterr().out.splitlines()
  assert [line[:34].strip() for line in lines] == names


def test_no_text_is_a_sentence(tmp_path):
  (tmp_path / "a.jsonl").write_text("")
  tokenizer.train_tokenizer(sentences(0, 100), 320, tmp_path / "own.model")
  with (
    imported("benchmark_data", f"--path={tmp_path}/*.jsonl", f"--tokenizer={tmp_path}/own.model") as command,
    pytest.raises(UserError, match="the 1 matching files are empty"),
  ):
    command.main()
