"""Communication between processes, simulated by threads that share a dictionary as their store."""

import itertools
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchlora_jax.errors import UserError
from switchlora_jax.parallel import processes


class Store:
  """Stand-in for the client of `jax.distributed`."""

  def __init__(self):
    self._values, self._changed = {}, threading.Condition()

  def key_value_set(self, key, value, allow_overwrite):
    with self._changed:
      assert key not in self._values and not allow_overwrite, "the real store raises an error"
      self._values[key] = value
      self._changed.notify_all()

  def blocking_key_value_get(self, key, timeout_in_ms):
    with self._changed:
      if not self._changed.wait_for(lambda: key in self._values, min(20, timeout_in_ms / 1000)):
        raise jax.errors.JaxRuntimeError(f"DEADLINE_EXCEEDED: no value for {key}")
      return self._values[key]


def run_on(count, main):
  """Return the result of `main(process)`, or the exception it raises, for each of `count` processes."""
  local = threading.local()

  class Calls:
    def __next__(self):
      return next(local.calls)

  class State:
    client, num_processes = Store(), count
    process_id = property(lambda _: local.process)

  def start(process):
    local.process, local.calls = process, itertools.count()
    try:
      return main(process)
    except Exception as error:
      return error

  with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(count) as pool:
    patch.setattr(jax, "process_index", lambda: local.process)
    patch.setattr(jax, "process_count", lambda: count)
    patch.setattr(processes, "_calls", Calls())
    patch.setattr(processes.distributed, "global_state", State())
    return list(pool.map(start, range(count)))


def fail(error):
  raise error


@given(st.integers(1, 4), st.lists(st.integers(), min_size=1, max_size=3))
def test_every_process_receives_all_texts_of_each_call(count, rounds):
  found = run_on(count, lambda process: [processes.exchange(f"{process} says {n}") for n in rounds])
  assert found == [[[f"{process} says {n}" for process in range(count)] for n in rounds]] * count


@given(st.lists(st.booleans(), min_size=2, max_size=4))
def test_a_failure_of_one_process_is_raised_on_all(failing):
  action = lambda process: lambda: fail(UserError(f"{process} is full; empty it")) if failing[process] else process
  found = run_on(len(failing), lambda process: processes.on_all_processes(action(process)))
  if not any(failing):
    assert found == list(range(len(failing)))
  else:
    first = failing.index(True)
    assert {type(error) for error in found} == {UserError}
    assert {str(error) for error in found} == {f"process {first}: {first} is full; empty it"}


def test_an_error_of_all_processes_names_no_process():
  found = run_on(3, lambda _: processes.on_all_processes(lambda: fail(UserError("rank is too large"))))
  assert {str(error) for error in found} == {"rank is too large"}


def test_an_unexpected_error_keeps_its_type_on_its_own_process():
  found = run_on(2, lambda process: processes.on_all_processes(lambda: 1 / process))
  assert type(found[0]) is ZeroDivisionError
  assert type(found[1]) is UserError and str(found[1]) == "process 0: ZeroDivisionError: division by zero"


def test_on_first_process_runs_only_on_process_0():
  done = []
  assert run_on(3, lambda process: processes.on_first_process(lambda: done.append(process) or "here")) == [
    "here",
    None,
    None,
  ]
  assert done == [0]


def test_first_then_others_runs_on_process_0_first():
  done = []
  found = run_on(3, lambda process: processes.first_then_others(lambda: done.append(process) or process))
  assert found == [0, 1, 2] and done[0] == 0 and sorted(done) == [0, 1, 2]


def test_the_others_do_not_run_if_process_0_fails():
  done = []
  act = lambda process: fail(UserError("no text")) if process == 0 else done.append(process)
  found = run_on(3, lambda process: processes.first_then_others(lambda: act(process)))
  assert {str(error) for error in found} == {"process 0: no text"} and done == []


def test_check_same_accepts_equal_facts():
  assert run_on(3, lambda _: processes.check_same({"rank": 4, "data.path": "é"})) == [None] * 3


def test_a_difference_is_named_on_all_processes():
  facts = [{"rank": 4, "seed": 0}, {"rank": 4, "seed": 0}, {"rank": 8, "only here": None}]
  found = run_on(3, lambda process: processes.check_same(facts[process]))
  assert {type(error) for error in found} == {UserError} and len({str(error) for error in found}) == 1
  assert str(found[0]).startswith(
    "process 2 was not started like process 0: only here is None there and unset on process 0; "
    "rank is 8 there and 4 on process 0; seed is unset there and 0 on process 0; start all"
  )


@pytest.mark.parametrize(
  ("device_kinds", "message"),
  [
    ([["H100"] * 2, ["H100"] * 2], None),
    ([["H100"] * 2, ["H100"]], "found 2 × H100 on process 0, 1 × H100 on process 1; give"),
    ([["H100"] * 2, ["H100", "A100"]], "found 2 × H100 on process 0, 2 × A100/H100 on process 1; give"),
  ],
)
def test_check_devices(monkeypatch, device_kinds, message):
  device = lambda process, kind: SimpleNamespace(process_index=process, device_kind=kind)
  devices = [device(process, kind) for process, kinds in enumerate(device_kinds) for kind in kinds]
  monkeypatch.setattr(jax, "devices", lambda: devices)
  found = run_on(2, lambda _: processes.check_devices())
  assert found == [None, None] if message is None else all(message in str(error) for error in found)


def test_a_process_without_devices_is_named_on_all(monkeypatch):
  monkeypatch.setattr(jax, "devices", lambda: jax.process_index() and fail(RuntimeError("no GPU\nat all")))
  found = run_on(2, lambda _: processes.check_devices())
  assert {str(error) for error in found} == {
    "process 1: JAX found no devices for all processes: no GPU; check JAX_PLATFORMS and the GPUs of each process"
  }


def test_a_single_process_does_not_communicate(capsys):
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


def test_print_once_prints_on_process_0(capsys):
  run_on(3, lambda process: processes.print_once(f"from {process}"))
  assert capsys.readouterr().out == "from 0\n"
