"""Progress is a bar at a terminal and whole lines elsewhere."""

import io
import math
import os
import re
import time

import pytest
from tqdm import tqdm

from switchlora_jax import progress
from switchlora_jax.progress import print_line, progress_bar


def test_a_file_gets_whole_lines(capsys):
  """Also when bars are nested, other lines are printed meanwhile, and a bar is refreshed or closed twice."""
  with progress_bar(total=10, desc="train", unit="step", seconds=math.inf) as bar:
    for step in range(1, 11):
      bar.set_postfix({"loss": f"{5 / step:.3f}"}, refresh=False)
      bar.update()
      if step % 5 == 0:
        bar.refresh()
        bar.refresh()
        with progress_bar(total=3, desc="validate") as inner:
          inner.update(3)
        print_line(f"step {step}: validation perplexity 7.00")
        tqdm.write("error: another line")
  out, err = capsys.readouterr()
  assert "\r" not in out + err and "\x1b" not in out + err and "\n\n" not in err
  rate = r"[\d.]+step/s, 00:0\d elapsed, 00:00 left"
  wanted = [rf"train: 5 of 10, {rate}, loss=1\.000", rf"train: 10 of 10, {rate}, loss=0\.500"]
  assert [bool(re.fullmatch(*pair)) for pair in zip(wanted, err.splitlines(), strict=True)] == [True, True], err
  assert out.count("\n") == 4


def test_lines_are_few_and_short_work_prints_none(capsys):
  for _ in progress_bar(range(1000), desc="verify data", unit="file"):
    pass
  assert capsys.readouterr().err == ""
  with progress_bar(desc="tokenize", unit="char", unit_scale=True, seconds=0.05) as bar:
    for _ in range(12):
      time.sleep(0.01)
      bar.update(10_000)
  lines = capsys.readouterr().err.splitlines()
  assert 2 <= len(lines) <= 4 and lines[-1].startswith("tokenize: 120k, ") and "left" not in lines[-1]
  assert len(set(lines)) == len(lines)


def test_lines_show_the_rate_that_is_set(capsys):
  """The mean since the start would contain compilation."""
  with progress_bar(total=100, desc="train", seconds=math.inf) as bar:
    progress.set_rate(bar, 12.5)
    bar.update(50)
    bar.refresh()
    assert re.fullmatch(r"train: 50 of 100, 12\.50step/s, 00:00 elapsed, 00:04 left\n", capsys.readouterr().err)


def test_nothing_is_printed_if_it_is_not_shown(capsys):
  with progress_bar(total=2, desc="train", shown=False, seconds=0) as bar:
    bar.update()
    bar.refresh()
  assert capsys.readouterr().err == ""


@pytest.mark.parametrize("size", [(80, 24), (0, 0)])
def test_a_terminal_gets_a_bar(monkeypatch, size):
  """Also one without a size, as of the command `script`."""
  terminal = io.StringIO()
  terminal.isatty, terminal.fileno = lambda: True, lambda: 2
  monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size(size))
  monkeypatch.setattr(progress.sys, "stderr", terminal)
  with progress_bar(total=4, desc="train") as bar:
    bar.update(4)
  assert re.search(r"\rtrain: 100%\|[#█]+\| 4/4 ", terminal.getvalue())
