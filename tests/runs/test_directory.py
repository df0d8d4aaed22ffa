"""The directory of a run: which config may continue it, its lock, and opening it for reading."""

import errno
import fcntl
import json
import logging
import os
import subprocess
from types import SimpleNamespace

import jax
import pytest
from tiny import resolved

from switchlora_jax.errors import UserError
from switchlora_jax.runs import directory as run_directory


@pytest.fixture
def dataset(tmp_path):
  (tmp_path / "some.model").write_bytes(b"pieces")
  return SimpleNamespace(also=(), fingerprint="abc", tokenizer_path=str(tmp_path / "some.model"))


def start(workdir, config, dataset):
  run_directory.prepare(workdir, config)
  run_directory.record(workdir, config, dataset)


def edit_config_json(workdir, edit):
  """Applies `edit` to the contents of config.json, in place."""
  path = workdir / "config.json"
  saved = json.loads(path.read_text())
  edit(saved)
  path.write_text(json.dumps(saved))


def test_config_and_tokenizer_are_recorded(tmp_path, dataset):
  start(tmp_path / "run", resolved(tmp_path), dataset)
  saved = run_directory.read(tmp_path / "run")
  assert saved["config"]["rank"] == 4
  assert saved["config"]["learning_rate"] == 2e-2
  assert saved["versions"]["jax"] and saved["devices"].startswith("8 × ")
  assert (tmp_path / "run" / "tokenizer.model").read_bytes() == b"pieces"


def test_keys_that_do_not_affect_results_may_change(tmp_path, dataset, caplog):
  start(tmp_path / "run", resolved(tmp_path), dataset)
  start(tmp_path / "run", resolved(tmp_path, eval_every=3, checkpoint_every=2, hang_seconds=9.0), dataset)
  assert caplog.records == []


def test_a_run_from_before_a_config_key_continues_with_the_value_that_it_had(tmp_path, dataset, caplog):
  start(tmp_path / "run", resolved(tmp_path), dataset)
  path = tmp_path / "run" / "config.json"
  saved = json.loads(path.read_text())
  for key in ("field", "bad_rows"):
    del saved["config"]["data"][key]
  path.write_text(json.dumps(saved))
  start(tmp_path / "run", resolved(tmp_path, data__bad_rows="skip"), dataset)
  assert caplog.records == []
  with pytest.raises(UserError, match=r"another config \(data\.field: 'text' → 'body'\)"):
    start(tmp_path / "run", resolved(tmp_path, data__field="body"), dataset)


@pytest.mark.parametrize("method", ["switchlora", "galore"])
def test_a_run_from_before_two_learning_rates_and_optimizers_continues(tmp_path, dataset, caplog, method):
  """Also from before some methods: their sections are not compared."""
  config = resolved(tmp_path, method=method)
  start(tmp_path / "run", config, dataset)
  path = tmp_path / "run" / "config.json"
  saved = json.loads(path.read_text())
  for key in ("rest_learning_rate", "warm_start_rest_learning_rate", "schedule", "optimizer", "fira", "apollo"):
    del saved["config"][key]
  del saved["config"]["galore"]["directions"]
  for key in ("candidates", "decay", "start", "slots", "min_age", "snr_below"):
    del saved["config"]["switch"][key]
  path.write_text(json.dumps(saved))
  read = run_directory.read(tmp_path / "run")["config"]
  assert read == {key: value for key, value in config.to_dict().items() if key not in ("fira", "apollo")}
  start(tmp_path / "run", config, dataset)
  assert caplog.records == []
  for key, change in {"optimizer.weight_decay": "0.0 → 0.1", "rest_learning_rate": ".* → 0.5"}.items():
    with pytest.raises(UserError, match=rf"another config \({key}: {change}\)"):
      start(
        tmp_path / "run", resolved(tmp_path, method=method, **{key.replace(".", "__"): float(change[-3:])}), dataset
      )


def test_a_run_that_reset_the_state_on_a_switch_or_not_continues(tmp_path, dataset, caplog):
  """Earlier versions had the key `switch.reset`, true or false."""
  for reset, state in ((True, "reset"), (False, "keep")):
    config, workdir = resolved(tmp_path, switch__state=state), tmp_path / state
    start(workdir, config, dataset)
    saved = json.loads((workdir / "config.json").read_text())
    del saved["config"]["switch"]["state"]
    saved["config"]["switch"]["reset"] = reset
    (workdir / "config.json").write_text(json.dumps(saved))
    assert run_directory.read(workdir)["config"] == config.to_dict()
    start(workdir, config, dataset)
    with pytest.raises(UserError, match=rf"another config \(switch\.state: '{state}' → 'transport'\)"):
      start(workdir, resolved(tmp_path, switch__state="transport"), dataset)
  assert caplog.records == []


def test_a_run_from_before_other_architectures_continues(tmp_path, dataset, caplog):
  config, sizes = resolved(tmp_path), ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
  start(tmp_path / "run", config, dataset)
  path = tmp_path / "run" / "config.json"
  saved = json.loads(path.read_text())
  saved["config"]["model"] = {key: saved["config"]["model"][key] for key in sizes}
  path.write_text(json.dumps(saved))
  assert run_directory.read(tmp_path / "run")["config"] == config.to_dict()
  start(tmp_path / "run", config, dataset)
  assert caplog.records == []
  with pytest.raises(UserError, match=r"another config \(model\.num_kv_heads: 2 → 1\)"):
    start(tmp_path / "run", resolved(tmp_path, model__num_kv_heads=1), dataset)
  del saved["config"]["model"]["num_heads"]
  path.write_text(json.dumps(saved))
  assert "num_heads" not in run_directory.read(tmp_path / "run")["config"]["model"], "the error comes with its use"


def test_micro_batches_may_change_and_the_global_batch_may_not(tmp_path, dataset):
  start(tmp_path / "run", resolved(tmp_path, batch_size=32), dataset)
  start(tmp_path / "run", resolved(tmp_path, batch_size=32, accumulation=4), dataset)
  with pytest.raises(UserError, match=r"another config \(batch_size: 32 → 16\)"):
    run_directory.prepare(tmp_path / "run", resolved(tmp_path, batch_size=16, accumulation=2))


def test_the_path_of_prepared_data_may_change_but_not_that_of_text(tmp_path, dataset):
  for source in ("prepared", "text"):
    first, second = (resolved(tmp_path, data__source=source, data__path=path) for path in ("here", "there"))
    start(tmp_path / source, first, dataset)
    if source == "prepared":
      start(tmp_path / source, second, dataset)
    else:
      with pytest.raises(UserError, match=r"data\.path: 'here' → 'there'"):
        start(tmp_path / source, second, dataset)


@pytest.mark.parametrize(("method", "ratio"), [("lora", 0.1), ("lora", 0.0), ("galore", 0.1)])
def test_a_run_whose_learning_rate_had_a_lower_bound_is_refused(tmp_path, dataset, method, ratio):
  """Runs made before `schedule` was recorded. Only a lower bound above 0 affects results."""
  workdir, config = tmp_path / "run", resolved(tmp_path, method=method, min_lr_ratio=ratio)
  start(workdir, config, dataset)
  start(workdir, config, dataset)
  saved = json.loads((workdir / "config.json").read_text())
  del saved["schedule"]
  (workdir / "config.json").write_text(json.dumps(saved))
  if (method, ratio) == ("lora", 0.1):
    with pytest.raises(UserError, match=r"min_lr_ratio \(=0\.1\) was a lower bound .*git revision"):
      start(workdir, config, dataset)
  else:
    start(workdir, config, dataset)


def test_min_lr_ratio_without_a_value_is_a_changed_key(tmp_path, dataset):
  workdir, config = tmp_path / "run", resolved(tmp_path, method="lora", min_lr_ratio=0.1)
  start(workdir, config, dataset)
  edit_config_json(workdir, lambda saved: (saved.pop("schedule"), saved["config"].update(min_lr_ratio=None)))
  with pytest.raises(UserError, match=r"another config \(min_lr_ratio: None → 0\.1\)"):
    start(workdir, config, dataset)


@pytest.mark.parametrize("section", ["data", "switch", "model"])
def test_a_config_without_a_section_is_refused_with_the_version_that_can_continue_it(tmp_path, dataset, section):
  start(tmp_path / "run", resolved(tmp_path), dataset)
  edit_config_json(tmp_path / "run", lambda saved: saved["config"].pop(section))
  with pytest.raises(UserError, match=rf"differs in the keys {section}\..*git revision"):
    run_directory.prepare(tmp_path / "run", resolved(tmp_path))


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.model", "checkpoints"])
def test_a_directory_that_is_not_a_run_is_refused(tmp_path, missing):
  refused = lambda found: pytest.raises(
    UserError, match=f"^--run=x must be .* config.json, tokenizer.model and .*{found}"
  )
  check = lambda folder: run_directory.check_is_run("--run=x", folder, "tokenizer.model", "checkpoints")
  for part in {"config.json", "tokenizer.model", "checkpoints"} - {missing}:
    (tmp_path / part).touch()
  with refused("; they are not there; give"):
    check(tmp_path)
  with refused("; there is no such directory; give"):
    check(tmp_path / "none")
  (tmp_path / missing).touch()
  check(tmp_path)


def test_another_run_is_refused(tmp_path, dataset):
  start(tmp_path / "run", resolved(tmp_path), dataset)
  with pytest.raises(UserError, match=r"another config \(rank: 4 → 6; switch.interval: 2 → 4\)"):
    run_directory.prepare(tmp_path / "run", resolved(tmp_path, rank=6, switch__interval=4))


def test_a_run_whose_config_has_other_keys_is_refused_with_the_version_that_can_continue_it(tmp_path, dataset):
  start(tmp_path / "run", resolved(tmp_path), dataset)
  path = tmp_path / "run" / "config.json"
  saved = json.loads(path.read_text()) | {"git_revision": "0123abc"}
  saved["config"]["an_old_key"] = saved["config"].pop("rank")
  path.write_text(json.dumps(saved))
  message = r"differs in the keys an_old_key, rank; continue it with .* \(git revision 0123abc\), or choose a new"
  with pytest.raises(UserError, match=message):
    run_directory.prepare(tmp_path / "run", resolved(tmp_path))


def test_more_steps_extend_a_run_with_a_warning_and_fewer_are_refused(tmp_path, dataset, caplog):
  start(tmp_path / "run", resolved(tmp_path), dataset)
  longer = resolved(tmp_path, steps=24)
  with caplog.at_level(logging.WARNING):
    start(tmp_path / "run", longer, dataset)
  assert "extending the run from 12 to 24 steps" in caplog.text
  start(tmp_path / "run", resolved(tmp_path), dataset)  # before the first step is trained, fewer steps are accepted
  run_directory.update(tmp_path / "run", longer)
  with pytest.raises(UserError, match="steps: 24 → 12"):
    run_directory.prepare(tmp_path / "run", resolved(tmp_path))


def test_other_data_are_refused(tmp_path, dataset):
  start(tmp_path / "run", resolved(tmp_path), dataset)
  dataset.fingerprint = "xyz"
  with pytest.raises(UserError, match=r"other data \(fingerprint abc, now xyz\)"):
    run_directory.record(tmp_path / "run", resolved(tmp_path), dataset)


def test_other_package_versions_give_a_warning(tmp_path, dataset, caplog):
  start(tmp_path / "run", resolved(tmp_path), dataset)
  path = tmp_path / "run" / "config.json"
  path.write_text(path.read_text().replace('"optax": "', '"optax": "0.'))
  run_directory.prepare(tmp_path / "run", resolved(tmp_path))
  assert "optax: 0." in caplog.text and "devices" not in caplog.text


def test_a_file_in_place_of_the_directory_is_an_error(tmp_path):
  (tmp_path / "run").write_text("")
  with pytest.raises(UserError, match="cannot be written"):
    run_directory.prepare(tmp_path / "run", resolved(tmp_path))


def test_a_read_only_directory_is_an_error(tmp_path, monkeypatch):
  def refuse(*_, **__):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr("pathlib.Path.touch", refuse)  # the tests may run as root, which ignores file modes
  with pytest.raises(UserError, match=r"cannot be written \(Permission denied\)"):
    run_directory.prepare(tmp_path / "run", resolved(tmp_path))


def test_checkpoints_without_config_are_refused(tmp_path):
  (tmp_path / "run" / "checkpoints").mkdir(parents=True)
  with pytest.raises(UserError, match=r"no config\.json"):
    run_directory.prepare(tmp_path / "run", resolved(tmp_path))


def test_a_config_json_with_a_byte_order_mark_is_read(saved):
  path, before = saved / "config.json", run_directory.read(saved)
  path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
  assert run_directory.read(saved) == before


@pytest.mark.parametrize("contents", ["{", "[]", "null", '{"architectures": ["LlamaForCausalLM"]}'])
def test_a_damaged_config_json_is_an_error(tmp_path, contents):
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "config.json").write_text(contents)
  with pytest.raises(UserError, match=r"not the JSON that a run writes \(.*\); restore it, or name another directory"):
    run_directory.prepare(tmp_path / "run", resolved(tmp_path))


WRONG_VALUES = {"config": None, "devices": None, "versions": [], "data_fingerprint": 7}


@pytest.mark.parametrize(("key", "value"), [*WRONG_VALUES.items(), ("devices", "cpu"), ("git_revision", 1)])
def test_a_value_of_the_wrong_type_in_config_json_is_an_error(saved, key, value):
  edit_config_json(saved, lambda contents: contents.update({key: value}))
  for opens in (run_directory.open_run, lambda folder: run_directory.prepare(folder, None)):
    with pytest.raises(UserError, match=rf"not the JSON that a run writes \({key} is .*\); restore it, or name"):
      opens(saved)


def test_steps_without_a_value_do_not_extend_a_run(tmp_path, dataset):
  start(tmp_path / "run", resolved(tmp_path), dataset)
  edit_config_json(tmp_path / "run", lambda saved: saved["config"].update(steps=None))
  with pytest.raises(UserError, match=r"another config \(steps: None → 12\)"):
    run_directory.prepare(tmp_path / "run", resolved(tmp_path))


def git(folder, *words):
  identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
  done = subprocess.run(["git", "-C", str(folder), *identity, *words], check=True, capture_output=True, text=True)
  return done.stdout.strip()


def test_the_git_revision_is_that_of_the_code_and_not_of_an_enclosing_repository(tmp_path, monkeypatch):
  """If installed into the .venv of another project, the package is untracked in that project's repository."""
  code = tmp_path / "site-packages" / "directory.py"
  code.parent.mkdir()
  code.touch()
  monkeypatch.setattr(run_directory, "__file__", str(code))
  git(tmp_path, "init", "--quiet")
  git(tmp_path, "commit", "--quiet", "--allow-empty", "--message=another project")
  assert run_directory.git_revision() is None
  git(tmp_path, "add", ".")
  git(tmp_path, "commit", "--quiet", "--message=this code")
  assert run_directory.git_revision() == git(tmp_path, "rev-parse", "HEAD")


def test_a_config_that_is_removed_while_the_run_trains_is_an_error(tmp_path):
  with pytest.raises(UserError, match=r"config.json was removed while the run trained; put it back"):
    run_directory.update(tmp_path, None)


def test_a_second_run_in_the_same_directory_is_refused_while_the_first_is_running(tmp_path):
  message = rf"another run trains in --workdir={tmp_path} \(process {os.getpid()} on \S+, since .*\); wait until it"
  with run_directory.locked(tmp_path), pytest.raises(UserError, match=message), run_directory.locked(tmp_path):
    pass
  with run_directory.locked(tmp_path):
    pass


def test_a_surviving_process_of_an_earlier_run_prevents_a_new_one(tmp_path, monkeypatch):
  """Process 2 of an earlier run still holds its lock. Processes 2 and 0 of a new run are refused."""
  as_process = lambda number: monkeypatch.setattr(jax, "process_index", lambda: number)
  as_process(2)
  refused = lambda: pytest.raises(UserError, match=rf"another run trains .* \(process {os.getpid()} on ")
  with run_directory.locked(tmp_path):
    with refused(), run_directory.locked(tmp_path):
      pass
    as_process(0)
    with refused(), run_directory.locked(tmp_path):
      pass
  with run_directory.locked(tmp_path):
    for number in (1, 2):
      as_process(number)
      with run_directory.locked(tmp_path):
        pass


def test_without_file_locks_a_run_continues_with_a_warning(tmp_path, monkeypatch, caplog):
  def refuse(*_):
    raise OSError(errno.ENOLCK, "No locks available")

  monkeypatch.setattr(fcntl, "flock", refuse)
  with run_directory.locked(tmp_path):
    assert "cannot be locked (No locks available); make sure that no other run trains in it" in caplog.text


def test_an_exception_of_the_run_is_not_reported_as_a_lock_error(tmp_path):
  with pytest.raises(OSError, match="the disk"), run_directory.locked(tmp_path):
    raise OSError("the disk")


# --- opening a run for reading ------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path, dataset):
  """The directory of a run with checkpoints of steps 4 and 7."""
  workdir = tmp_path / "run"
  start(workdir, resolved(tmp_path), dataset)
  for step in (7, 4):
    (workdir / "checkpoints" / str(step)).mkdir(parents=True)
    (workdir / "checkpoints" / str(step) / "manifest.json").touch()
  (workdir / "checkpoints" / "9").mkdir()  # incomplete
  return workdir


def test_open_run_returns_the_recorded_values(saved):
  run = run_directory.open_run(saved)
  recorded = run_directory.read(saved)
  assert (run.fingerprint, run.devices, run.revision, run.steps) == ("abc", 8, recorded["git_revision"], [4, 7])
  assert run.config.to_dict() == recorded["config"]
  assert run.architecture == recorded["config"]["model"]
  assert run.tokenizer.read_bytes() == b"pieces"


def test_a_step_without_a_checkpoint_is_refused(saved):
  run = run_directory.open_run(saved)
  run.check_step(4, "--step")
  with pytest.raises(UserError, match=r"--step \(=5\) must be .*: 4, 7; name one of them"):
    run.check_step(5, "--step")


def test_a_directory_without_a_run_or_checkpoint_cannot_be_opened(saved, tmp_path):
  for step in (4, 7):
    (saved / "checkpoints" / str(step) / "manifest.json").unlink()
  with pytest.raises(UserError, match="has saved no checkpoint yet; let it train longer"):
    run_directory.open_run(saved)
  (saved / "tokenizer.model").unlink()
  for folder in (saved, tmp_path / "none"):
    with pytest.raises(UserError, match=f"^{folder} must be the directory of a run"):
      run_directory.open_run(folder)


def test_a_key_that_the_saved_config_lacks_is_named_with_the_revision(saved):
  run = run_directory.open_run(saved)._replace(revision="0123abc")
  message = r"made by another version of the code: a key of its config is missing \(.*missing_key.*revision 0123abc\)"
  with pytest.raises(UserError, match=message), run.missing_key_as_error():
    _ = run.config.missing_key
