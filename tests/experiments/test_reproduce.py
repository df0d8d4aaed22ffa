"""Reproducing an item: what is said, what would be run, and what is handed to the grid."""

import re
import shlex
from types import SimpleNamespace

import pytest
from grids import command, fake_runs, imported
from paths import GOLDEN

from experiments.common import children, sweep
from experiments.common.trials import make_trial
from experiments.paper import items
from switchlora_jax.data import preparation
from switchlora_jax.data.corpus import open_corpus
from switchlora_jax.data.readers import RowOptions
from switchlora_jax.errors import UserError


def said(capsys, *flags) -> str:
  """What the command prints."""
  with imported("reproduce", *flags) as reproduce:
    reproduce.main()
  return capsys.readouterr().out


def planned(capsys, *flags) -> list[dict[str, str]]:
  """{flag: value} of each command that --dry_run prints."""
  heading, *commands = said(capsys, *flags, "--dry_run").splitlines()
  assert heading.startswith("table") or heading.startswith("figure")
  assert all(re.match(r"\S+ -m experiments\.(prepare_data|pretrain) ", line) for line in commands)
  return parsed("pretrain", commands)


def parsed(name: str, commands: list[str]) -> list[dict[str, str]]:
  """{flag: value} of those commands that run experiments.NAME."""
  words = [shlex.split(line) for line in commands]
  return [dict(word.split("=", 1) for word in line[3:]) for line in words if line[2] == f"experiments.{name}"]


@pytest.mark.parametrize(("flags", "found"), [([], "missing"), (["--item=table12"], "'table12', which does not exist")])
def test_an_unknown_item_says_which_there_are(flags, found):
  with imported("reproduce", *flags) as reproduce, pytest.raises(UserError) as caught:
    reproduce.main()
  assert str(caught.value) == f"--item is {found}; it must be one of {', '.join(items.ITEMS)}"


def test_a_mistake_ends_the_command_with_a_sentence():
  done = command("reproduce", "--item=table2", "--set=rank")
  assert done.returncode == 2 and "Traceback" not in done.stderr
  assert "error: --set=rank must be KEY=VALUE, for example --set=data.path=" in done.stderr


@pytest.mark.parametrize(
  ("item", "row"), [("table1", "| 130M | 768 | 12 |"), ("table4", "| 1.3B, rank 512 | 609.7M |")]
)
def test_facts_are_printed_beside_the_papers(capsys, item, row):
  text = said(capsys, f"--item={item}")
  ours, papers = re.fullmatch(
    rf"{item}: .*\nours, from the configs:\n\n(.*)\nthe paper's:\n\n(.*)\n", text, re.S
  ).groups()
  assert row in ours and ours == papers


@pytest.mark.parametrize(("item", "row"), [("table8", "| GaLore | 2e-06 |"), ("table9", "| SwitchLoRA | 1e-05 |")])
def test_what_is_used_as_the_paper_has_it_says_by_what(capsys, item, row):
  text = said(capsys, f"--item={item}")
  assert row in text and "the paper's" in text
  assert "\nours are the same: experiments.finetune_glue uses them by default for models nearer to " in text


def fine_tuning(line: str) -> SimpleNamespace:
  """What experiments.finetune_glue reads of a printed command."""
  words = shlex.split(line)
  assert words[1:3] == ["-m", "experiments.finetune_glue"]
  with imported("finetune_glue", *words[3:]) as read:
    names = ("MODEL", "TASK", "DATA", "SEEDS", "WORKDIR", "RATES", "EPOCHS", "SEQ_LEN", "ROWS")
    return SimpleNamespace(**{name.lower(): getattr(read, name).value for name in names})


@pytest.mark.parametrize("scale", items.SCALES)
def test_the_models_of_glue_are_trained_and_then_fine_tuned(capsys, scale):
  """With several seeds, a dry run cannot know yet which is the best: it names the first of each line."""
  text = said(capsys, "--item=table7", f"--scale={scale}", "--seeds=2", "--workdir=a b", "--dry_run")
  *trained, last = [line for line in text.splitlines()[1:] if "prepare_data" not in line]
  workdirs = [shlex.split(line)[-1].removeprefix("--workdir=") for line in trained]
  found, own = fine_tuning(last), "1.3B-full" if scale == "paper" else "6-layers-256-full-for-1.3B"
  assert len(trained) == 4 and found.model == workdirs[:2] and f"a b/cells/{own}_lr=0.001_seed=0" in found.model
  assert (found.task, found.data, found.workdir) == (["cola", "stsb", "mrpc", "rte", "sst2"], "hub", "a b/glue")
  if scale == "paper":
    assert (found.rates, found.epochs, found.seq_len, found.rows, found.seeds) == ([], 30, 512, None, 5)
  else:
    assert [float(rate) for rate in found.rates] == [1e-4, 3e-4, 1e-3]
    assert (found.epochs, found.seq_len, found.rows, found.seeds) == (5, 128, 1000, 3)


@pytest.mark.parametrize(("seq_len", "wanted"), [(64, 64), (1024, 512)])
def test_no_row_is_longer_than_in_pre_training_or_in_the_paper(capsys, seq_len, wanted):
  text = said(capsys, "--item=table6", f"--set=seq_len={seq_len}", "--dry_run")
  assert fine_tuning(text.splitlines()[-1]).seq_len == wanted


def test_the_best_run_of_each_line_is_fine_tuned(capsys, monkeypatch, tmp_path):
  runs = fake_runs(monkeypatch)
  low_rank = [f"{method}-rank-32-for-350M-rank-256_lr=0.0{n}" for n, method in ((2, "switchlora"), (1, "galore"))]
  names = [f"6-layers-128-{name}" for name in ("full-for-350M_lr=0.001", *low_rank)]
  best = [f"{name}_seed={seed}" for name, seed in zip(names, (1, 0, 1), strict=True)]
  runs.losses.update({name: 2.0 for name in best} | {best[1]: 2.5})
  text = said(capsys, "--item=table6", "--seeds=2", "--processes=1", f"--workdir={tmp_path}")
  assert len(runs.started) == 6
  ours, papers, last = re.fullmatch(
    r"table6, .*?\n(\|.*)\n\nthe paper's, after fine-tuning:\n\n(.*)\nto fine-tune ours:\n\n(.*)\n", text, re.S
  ).groups()
  assert re.search(r"\| 6 layers × 128, galore, rank 32 \(for 350M, rank 256\) \| .* \| 21\.61 \|", ours)
  assert "| GaLore | 40.23±2 |" in papers
  assert fine_tuning(last).model == [str(tmp_path / "cells" / name) for name in best]


@pytest.mark.parametrize("flags", [["--scale=paper", "--set=data.source=text"], ["--set=data.source=stream"]])
def test_where_no_text_is_named_it_says_what_to_add(capsys, tmp_path, flags):
  """A dry run prints its commands nevertheless; else it ends before anything is run."""
  flags = ["--item=table3", f"--workdir={tmp_path / 'grid'}", *flags]
  with imported("reproduce", *flags, "--dry_run") as reproduce:
    reproduce.main()
  printed, sentence = capsys.readouterr()
  assert printed.count("experiments.pretrain") == 3
  assert re.search(r"data\.path is empty.* add --set=data\.path=.* --set=data\.source=prepared --set=data", sentence)
  with imported("reproduce", *flags) as reproduce, pytest.raises(UserError, match=r"data\.path is empty") as caught:
    reproduce.main()
  assert str(caught.value) in sentence and not (tmp_path / "grid").exists()


@pytest.mark.parametrize("flags", [[], ["--scale=paper", "--set=data.source=text", "--set=data.path=c4/*"]])
def test_where_there_is_a_text_a_dry_run_asks_for_none(capsys, flags):
  with imported("reproduce", "--item=table3", *flags, "--dry_run") as reproduce:
    reproduce.main()
  assert capsys.readouterr().err == ""


def test_the_papers_scale_has_the_papers_data(capsys):
  """C4 in sequences of the length of each line, T5's vocabulary, C4's validation split, at least 46M documents."""
  text = said(capsys, "--item=table2", "--scale=paper", "--dry_run").splitlines()[1:]
  assert ["prepare_data" in line for line in text] == [True] * 2 + [False] * 11
  prepared = [{k: v for k, v in found.items() if k != "--take"} for found in parsed("prepare_data", text)]
  shared = {"--source": "c4", "--tokenizer": "t5.model"}
  assert prepared == [shared | {"--seq_len": str(n), "--out": f"data/c4_{n}"} for n in (256, 512)]
  assert [found["--take"] for found in parsed("prepare_data", text)] == ["46000000", "67000000"]
  for trial in parsed("pretrain", text):
    assert trial["--config.data.source"] == "prepared"
    assert trial["--config.data.path"] == f"data/c4_{trial.get('--config.seq_len', 512)}"
    assert not {"--config.data.tokenizer", "--config.data.eval_path"} & {*trial}


def test_galores_table_2_is_printed_as_its_numbers_beside_the_runs(capsys):
  """Padded rows of C4 for the longest run of the protocol: 100,000 steps of 512 documents, and 5%."""
  text = said(capsys, "--item=galore_table2", "--scale=paper", "--dry_run")
  heading, numbers, rest = re.fullmatch(r"(.*)\n\n(numbers of .*:\n\n.*?)\n\n(.*)", text, re.S).groups()
  assert "the column `paper` is of the GaLore paper (arXiv 2403.03507, Table 2)" in heading
  assert numbers.startswith("numbers of the GaLore paper (arXiv 2403.03507, Table 2), not ours:\n")
  assert "| low-rank | 78.18 | 45.51 | 37.41 | 142.53 |" in numbers
  (prepared,) = parsed("prepare_data", rest.splitlines())
  assert (prepared["--packing"], prepared["--seq_len"], prepared["--take"]) == ("pad", "256", "54000000")
  trials = parsed("pretrain", rest.splitlines())
  assert len(trials) == 20 and {trial["--config.data.packing"] for trial in trials} == {"pad"}
  assert {trial["--config.data.path"] for trial in trials} == {prepared["--out"]} == {"data/c4_256_pad"}


def test_a_local_copy_of_c4_is_prepared_in_the_same_way(capsys):
  given = {"path": "c4/train*", "eval_path": "c4/valid*", "tokenizer": "own/t5.model", "field": "content"}
  flags = ["--item=table3", "--scale=paper", *(f"--set=data.{key}={value}" for key, value in given.items())]
  text = said(capsys, *flags, "--dry_run").splitlines()[1:]
  (found,) = parsed("prepare_data", text)
  assert {key: found[f"--{key}"] for key in given} == given and found["--source"] == "c4"
  assert {(t["--config.data.source"], t["--config.data.path"]) for t in parsed("pretrain", text)} == {
    ("prepared", "data/c4_512")
  }


def test_all_items_prepare_a_folder_in_the_same_way(capsys):
  """A folder cannot be extended."""
  commands = {}
  for name in ("table2", "table3", "table5", "figure10"):
    for found in parsed("prepare_data", said(capsys, f"--item={name}", "--scale=paper", "--dry_run").splitlines()):
      assert commands.setdefault(found["--out"], found) == found
  assert len(commands) == 2


def test_a_prepared_folder_must_have_the_papers_data(tmp_path, monkeypatch):
  for name in ("train.txt", "valid.txt"):
    (tmp_path / name).write_text("".join(f"{n}: a sentence of the {name} is here\n" for n in range(200)))
  text = open_corpus(f"{tmp_path}/train.txt", f"{tmp_path}/valid.txt", RowOptions())
  origin = [[part.origin() for part in parts] for parts in (text.train, text.valid)]
  request = preparation.Request(origin, "train:300", 16)
  manifest = preparation.fill_folder(tmp_path / "c4", request, lambda: text, wait=False, progress=False)
  own, enough = {"data.tokenizer": f"{tmp_path}/c4/tokenizer.model"}, [SimpleNamespace(steps=4, batch_size=2)]
  with imported("reproduce", "--item=table3") as reproduce:
    check = lambda configs, keys, found=manifest: reproduce.check_prepared(tmp_path / "c4", found, configs, keys)
    check(enough, own | {"data.path": f"{tmp_path}/t*.txt", "data.eval_path": f"{tmp_path}/v*.txt"})
    for configs, keys, found, sentence in (
      (enough, {}, manifest, r"its tokenizer has 300 pieces, not T5's 32,000; move it away"),
      (enough, own, manifest | {"valid": None}, "it has no validation split"),
      ([SimpleNamespace(steps=9999, batch_size=2)], own, manifest, "training rows, and a run needs 19,998"),
      (enough, {"data.tokenizer": str(GOLDEN / "huggingface" / "bpe.model")}, manifest, r"is not data\.tokenizer"),
      (enough, own | {"data.path": f"{tmp_path}/*.txt"}, manifest, r"it was not made of the files of data\.path"),
    ):
      with pytest.raises(UserError, match=sentence):
        check(configs, keys, found)


def test_c4_that_is_not_prepared_is_an_error_with_the_command(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  flags, sentence = ["--item=table3", "--scale=paper", "--workdir=x"], r"^prepare the data first, by: .*=data/c4_512$"
  with imported("reproduce", *flags) as reproduce, pytest.raises(UserError, match=sentence):
    reproduce.main()
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("scale", items.SCALES)
def test_a_dry_run_prints_a_command_for_every_cell_and_runs_nothing(capsys, monkeypatch, tmp_path, scale):
  monkeypatch.setattr(sweep, "run_sweep", None)
  monkeypatch.setattr(children, "subprocess", None)
  monkeypatch.chdir(tmp_path)
  trials = planned(capsys, "--item=table2", f"--scale={scale}")
  assert len({trial["--workdir"] for trial in trials}) == len(trials) == len(items.ITEMS["table2"].lines)
  first = trials[0]
  assert first["--config"].endswith("/configs/llama_tiny.py" if scale == "mini" else "/configs/llama_350m.py")
  assert (first["--config.method"], first["--config.seed"]) == ("full", "0")
  name = "3-layers-96-full-for-130M" if scale == "mini" else "130M-full"
  assert first["--workdir"] == f"runs/table2/cells/{name}_lr=0.001_seed=0"
  assert list(tmp_path.iterdir()) == []


def test_the_commands_fill_the_directory_in_which_the_results_are_looked_for(capsys, tmp_path):
  """Run them anywhere, then give the same --workdir without --dry_run."""
  flags = ["--item=figure9", "--seeds=2", f"--workdir={tmp_path}"]
  trials = planned(capsys, *flags)
  assert sorted(trial["--config.seed"] for trial in trials) == ["0", "0", "1", "1"]
  with imported("reproduce", *flags) as reproduce:
    base = items.base_config("mini")
    variants = reproduce.item_variants(items.ITEMS["figure9"], base, {})
  wanted = [make_trial(base, variant, None, seed) for seed in (0, 1) for variant in variants]
  assert [trial["--workdir"] for trial in trials] == [str(tmp_path / "cells" / trial.name) for trial in wanted]


def test_set_changes_every_line(capsys):
  flags = [
    "--set=steps=300",
    "--set=warmup_steps=30",
    "--set=data.path=a b/*",
    "--set=data.source=text",
    "--set=count_per_element=true",
  ]
  for item in ("table2", "table5", "figure6"):  # of which Table 5 sets the steps itself
    trials = planned(capsys, f"--item={item}", *flags)
    for trial in trials:
      found = [
        trial[f"--config.{key}"] for key in ("steps", "warmup_steps", "data.path", "data.source", "count_per_element")
      ]
      assert found == ["300", "30", "a b/*", "text", "True"]
  trials = planned(capsys, "--item=table2", "--scale=paper", "--set=accumulation=3", "--set=batch_size=24")
  assert {(trial["--config.accumulation"], trial["--config.batch_size"]) for trial in trials} == {("3", "24")}


def test_set_moves_the_middle_of_an_ablation(capsys):
  trials = planned(capsys, "--item=figure7", "--set=switch.interval=12", "--set=batch_size=16")
  assert {trial["--config.switch.interval"] for trial in trials} == {"12", "24", "48"}
  assert {trial["--config.batch_size"] for trial in trials} == {"16"}
  trials = planned(capsys, "--item=figure9", "--scale=paper")
  assert {trial["--config.batch_size"] for trial in trials} == {"128"}
  trials = planned(capsys, "--item=figure9", "--scale=paper", "--set=batch_size=64")
  assert {trial["--config.batch_size"] for trial in trials} == {"64"}


@pytest.mark.parametrize(
  ("flags", "sentence"),
  [
    (["--set=steps"], r"--set=steps must be KEY=VALUE, for example --set=data\.path='c4/\*\.json\.gz'"),
    (["--set=stepz=3"], r"unknown config key 'stepz'; configs/base\.py lists all keys"),
    (["--set=data.path=c4/*", "--scale=paper"], r"data\.path and data\.eval_path must be given together: .*validation"),
    (["--set=steps=1e3"], "steps must be of type int; found '1e3'"),
    (["--set=switch=3"], "switch must be of type ConfigDict; found '3'"),
    (["--set=steps=-3"], r"steps \(=-3\) must be greater than 0"),
    (["--set=eval_every=7"], r"the validation loss is compared at step 570 .*--config\.eval_every to a divisor of 570"),
    (["--set=rank=8"], r"--set=rank would contradict the labels of the lines"),
    (["--set=model.num_layers=1"], r"--set=model\.num_layers would contradict the labels of the lines"),
    (["--item=table5", "--set=seq_len=64"], r"--set=seq_len makes two lines identical"),
    ([], "--workdir is missing"),
  ],
)
def test_mistakes_are_sentences_before_anything_is_run(tmp_path, flags, sentence):
  workdir = [f"--workdir={tmp_path / 'grid'}"] if flags else []
  with imported("reproduce", "--item=table2", *workdir, *flags) as reproduce, pytest.raises(UserError, match=sentence):
    reproduce.main()
  assert not (tmp_path / "grid").exists()


def test_what_is_trained_is_handed_to_the_grid(tmp_path, monkeypatch, capsys):
  found = {}
  flags = ["--item=table3", "--seeds=2", "--processes=1", f"--workdir={tmp_path}"]
  flags += ["--set=data.source=text", "--set=data.path=books/*"]
  with imported("reproduce", *flags) as reproduce:
    monkeypatch.setattr(
      reproduce.sweep, "run_sweep", lambda base, variants, **options: found.update(base=base, variants=variants) or []
    )
    monkeypatch.setattr(reproduce.results, "conclude", lambda *arguments: found.update(concluded=arguments))
    reproduce.main()
  assert [(variant.label, variant.paper) for variant in found["variants"]] == [
    ("6 layers × 256, full (for 1.3B)", 15.23),
    ("6 layers × 256, switchlora, rank 32 (for 1.3B, rank 256)", 15.89),
    ("6 layers × 256, switchlora, rank 64 (for 1.3B, rank 512)", 15.01),
  ]
  assert found["base"].overrides["data.source"] == found["base"].config.data.source == "text"
  _, _, options, title = found["concluded"]
  assert options == {"workdir": tmp_path, "seeds": 2, "processes": 1, "read_at": 0.95}
  assert title == (
    "table3, mini scale: models of an eighth of the width and rank and a quarter of the depth, at step 570 of 600; "
    "in the paper: perplexity of 1.3B at 38,000 of 40,000 steps"
  )


@pytest.mark.parametrize(("item", "shown"), [("figure10", True), ("figure2", False)])
def test_singular_values_are_shown_where_the_figure_shows_them(tmp_path, monkeypatch, item, shown):
  run, shown_runs = SimpleNamespace(workdir=tmp_path / "run"), []
  with imported("reproduce", f"--item={item}", f"--workdir={tmp_path}") as reproduce:
    monkeypatch.setattr(reproduce, "open_run", lambda workdir: workdir)
    monkeypatch.setattr(reproduce.spectra, "conclude", lambda *arguments: shown_runs.append(arguments))
    monkeypatch.setattr(reproduce.sweep, "run_sweep", lambda base, variants, **options: [run])
    monkeypatch.setattr(reproduce.results, "conclude", lambda *arguments: None)
    reproduce.main()
  assert shown_runs == ([([tmp_path / "run"], tmp_path, False)] if shown else [])
