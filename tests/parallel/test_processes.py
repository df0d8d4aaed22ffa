"""What processes agree on, with threads for processes and a dictionary for the store between them."""

import itertools
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchlora_jax.errors import UserError
from switchlora_jax.parallel import processes


class Store:
  """The key-value store of `jax.distributed`, as far as it is used."""

  def __init__(self):
    self._values, self._changed = {}, threading.Condition()

  def key_value_set(self, key, value):
    with self._changed:
      assert key not in self._values, "the real one refuses this"
      self._values[key] = value
      self._changed.notify_all()

  def blocking_key_value_get(self, key, timeout_in_ms):
    with self._changed:
      if not self._changed.wait_for(lambda: key in self._values, min(20, timeout_in_ms / 1000)):
        raise jax.errors.JaxRuntimeError(f"DEADLINE_EXCEEDED: nobody set {key}")
      return self._values[key]


def run_on(count, main):
  """What `main(process)` returns, or the exception it raises, in each of so many processes."""
  here = threading.local()

  class Turns:
    def __next__(self):
      return next(here.turns)

  class State:
    client, num_processes = Store(), count
    process_id = property(lambda _: here.process)

  def start(process):
    here.process, here.turns = process, itertools.count()
    try:
      return main(process)
    except Exception as error:
      return error

  with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(count) as pool:
    patch.setattr(jax, "process_index", lambda: here.process)
    patch.setattr(jax, "process_count", lambda: count)
    patch.setattr(processes, "_turns", Turns())
    patch.setattr(processes.distributed, "global_state", State())
    return list(pool.map(start, range(count)))


def fail(error):
  raise error


@given(st.integers(1, 4), st.lists(st.integers(), min_size=1, max_size=3))
def test_each_hears_what_all_say_each_time(count, rounds):
  found = run_on(count, lambda process: [processes.exchange(f"{process} says {n}") for n in rounds])
  assert found == [[[f"{process} says {n}" for process in range(count)] for n in rounds]] * count


@given(st.lists(st.booleans(), min_size=2, max_size=4))
def test_where_one_fails_all_stop_with_its_sentence(failing):
  action = lambda process: lambda: fail(UserError(f"{process} is full; empty it")) if failing[process] else process
  found = run_on(len(failing), lambda process: processes.on_all_processes(action(process)))
  if not any(failing):
    assert found == list(range(len(failing)))
  else:
    first = failing.index(True)
    assert {type(error) for error in found} == {UserError}
    assert {str(error) for error in found} == {f"process {first}: {first} is full; empty it"}


def test_a_mistake_that_all_make_is_nobodys():
  found = run_on(3, lambda _: processes.on_all_processes(lambda: fail(UserError("rank is too large"))))
  assert {str(error) for error in found} == {"rank is too large"}


def test_what_nobody_expected_keeps_its_type_where_it_happened():
  found = run_on(2, lambda process: processes.on_all_processes(lambda: 1 / process))
  assert type(found[0]) is ZeroDivisionError
  assert type(found[1]) is UserError and str(found[1]) == "process 0: ZeroDivisionError: division by zero"


def test_the_first_acts_alone():
  done = []
  assert run_on(3, lambda process: processes.on_first_process(lambda: done.append(process) or "here")) == [
    "here",
    None,
    None,
  ]
  assert done == [0]


def test_the_others_come_after_the_first():
  done = []
  found = run_on(3, lambda process: processes.first_then_others(lambda: done.append(process) or process))
  assert found == [0, 1, 2] and done[0] == 0 and sorted(done) == [0, 1, 2]


def test_no_other_begins_where_the_first_fails():
  done = []
  act = lambda process: fail(UserError("no text")) if process == 0 else done.append(process)
  found = run_on(3, lambda process: processes.first_then_others(lambda: act(process)))
  assert {str(error) for error in found} == {"process 0: no text"} and done == []


def test_the_same_facts_are_no_mistake():
  assert run_on(3, lambda _: processes.check_same({"rank": 4, "data.path": "é"})) == [None] * 3


def test_a_difference_is_named_on_all():
  facts = [{"rank": 4, "seed": 0}, {"rank": 4, "seed": 0}, {"rank": 8, "only here": None}]
  found = run_on(3, lambda process: processes.check_same(facts[process]))
  assert {type(error) for error in found} == {UserError} and len({str(error) for error in found}) == 1
  assert str(found[0]).startswith(
    "process 2 was not started like process 0: only here is None there and unset on process 0; "
    "rank is 8 there and 4 on process 0; seed is unset there and 0 on process 0; start all"
  )


@pytest.mark.parametrize(
  ("held", "message"),
  [
    ([["H100"] * 2, ["H100"] * 2], None),
    ([["H100"] * 2, ["H100"]], "found 2 × H100 on process 0, 1 × H100 on process 1; give"),
    ([["H100"] * 2, ["H100", "A100"]], "found 2 × H100 on process 0, 2 × A100/H100 on process 1; give"),
  ],
)
def test_processes_have_the_same_devices(monkeypatch, held, message):
  device = lambda process, kind: SimpleNamespace(process_index=process, device_kind=kind)
  devices = [device(process, kind) for process, kinds in enumerate(held) for kind in kinds]
  monkeypatch.setattr(jax, "devices", lambda: devices)
  found = run_on(2, lambda _: processes.check_devices())
  assert found == [None, None] if message is None else all(message in str(error) for error in found)


def test_a_process_without_devices_stops_all(monkeypatch):
  monkeypatch.setattr(jax, "devices", lambda: jax.process_index() and fail(RuntimeError("no GPU\nat all")))
  found = run_on(2, lambda _: processes.check_devices())
  assert {str(error) for error in found} == {
    "process 1: JAX found no devices for all processes: no GPU; see JAX_PLATFORMS and the GPUs of each"
  }


def test_one_process_needs_nobody(capsys):
  assert processes.is_first() and processes.exchange("a") == ["a"]
  assert (
    processes.on_all_processes(lambda: 1)
    == processes.on_first_process(lambda: 1)
    == processes.first_then_others(lambda: 1)
    == 1
  )
  with pytest.raises(UserError, match=r"^rank$"):
    processes.on_all_processes(lambda: fail(UserError("rank")))
  with pytest.raises(KeyError, match="rank"):
    processes.on_all_processes(lambda: fail(KeyError("rank")))
  processes.check_same(json.loads('{"rank": 4}'))
  processes.check_devices()
  processes.print_once("once")
  assert capsys.readouterr().out == "once\n"


def test_only_the_first_speaks(capsys):
  run_on(3, lambda process: processes.print_once(f"from {process}"))
  assert capsys.readouterr().out == "from 0\n"


def ends(monkeypatch, leavers, error, count=3):
  """(process, exit code) of those of `count` that leave, in the order in which they end; and how long all took."""
  ended = []
  monkeypatch.setattr(
    processes.os, "_exit", lambda code: ended.append((processes.distributed.global_state.process_id, code))
  )
  began = time.monotonic()
  run_on(count, lambda process: processes.exit_process(error) if process in leavers else None)
  return ended, time.monotonic() - began


def test_where_all_fail_the_first_ends_last_and_at_once(monkeypatch):
  ended, seconds = ends(monkeypatch, {0, 1, 2}, SystemExit(2))
  assert sorted(ended) == [(0, 2), (1, 2), (2, 2)] and ended[-1] == (0, 2) and seconds < processes.FAREWELL / 2


def test_the_first_waits_for_the_others_so_long_and_no_longer(monkeypatch):
  monkeypatch.setattr(processes, "FAREWELL", 0.5)
  ended, seconds = ends(monkeypatch, {0, 1}, SystemExit(2))
  assert ended == [(1, 2), (0, 2)] and 0.4 < seconds < 5


def test_one_of_the_others_waits_for_nobody(monkeypatch, capsys):
  ended, seconds = ends(monkeypatch, {2}, ValueError("why"))
  assert ended == [(2, 1)] and seconds < processes.FAREWELL / 2
  assert capsys.readouterr().err.endswith("ValueError: why\n")


def test_a_process_alone_ends_as_python_does(monkeypatch, capsys):
  ended, _ = ends(monkeypatch, {0}, ValueError("why"), count=1)
  assert not ended and not capsys.readouterr().err
