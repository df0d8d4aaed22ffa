"""The check that all processes have started, with threads as processes: all continue, or all get the same error."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from experiments.common.rendezvous import wait_for_all
from switchlora_jax.errors import UserError


@pytest.fixture
def coordinator():
  """Return a HOST:PORT at which nothing listens."""
  with socket.create_server(("127.0.0.1", 0)) as server:
    return f"127.0.0.1:{server.getsockname()[1]}"


def outcomes(coordinator, started, seconds=10.0):
  """Return the error, or None, of each process; `started` has the (count, number) that each was started with."""

  def one(place):
    try:
      return wait_for_all(coordinator, *place, seconds)
    except UserError as error:
      return str(error)

  with ThreadPoolExecutor(len(started)) as pool:
    return list(pool.map(one, started))


@pytest.mark.parametrize("count", [2, 3, 5])
def test_all_continue_once_all_have_started(coordinator, count):
  assert outcomes(coordinator, [(count, process) for process in range(count)]) == [None] * count


def test_process_0_may_start_last(coordinator):
  with ThreadPoolExecutor(1) as pool:
    other = pool.submit(wait_for_all, coordinator, 2, 1, 10.0)
    time.sleep(0.5)
    assert not other.done()
    wait_for_all(coordinator, 2, 0, 10.0)
    assert other.result(10) is None


def test_the_port_is_free_again_at_once(coordinator):
  for _ in range(2):
    assert outcomes(coordinator, [(2, 0), (2, 1)]) == [None, None]


def test_missing_processes_are_named_on_all_that_started(coordinator):
  found = outcomes(coordinator, [(4, 0), (4, 2)], seconds=1.0)
  assert found[0] == found[1]
  assert found[0].startswith(f"process 1, 3 of 4 did not connect to {coordinator} within 1.0 s (--coordinator_timeout)")


def test_an_unreachable_coordinator_is_an_error_in_time(coordinator):
  start = time.monotonic()
  (found,) = outcomes(coordinator, [(2, 1)], seconds=1.0)
  assert time.monotonic() - start < 5
  assert found.startswith(f"process 1 could not reach process 0 at {coordinator} within 1.0 s") and "refused" in found


@pytest.mark.parametrize("host", ["nowhere.invalid", "a..b", "x" * 70])
def test_an_unknown_host_is_an_error(host):
  (found,) = outcomes(f"{host}:61440", [(2, 1)], seconds=0.1)
  assert f"could not reach process 0 at {host}:61440" in found


def test_duplicates_and_different_counts_are_named_on_all_that_started(coordinator):
  found = outcomes(coordinator, [(3, 0), (3, 1), (3, 1)])
  assert found == ["two processes were started with --process_id=1; number them from 0 to 2"] * 3
  found = outcomes(coordinator, [(2, 0), (3, 1)])
  assert found == ["process 1 was started with --num_processes=3 and process 0 with 2; pass the same number to all"] * 2


def test_a_port_in_use_is_an_error():
  with socket.create_server(("", 0)) as server:
    (found,) = outcomes(f"127.0.0.1:{server.getsockname()[1]}", [(2, 0)])
  assert "process 0 cannot listen at port" in found and found.endswith("give all processes another --coordinator")


def test_a_port_scanner_is_not_counted(coordinator):
  host, port = coordinator.split(":")
  with ThreadPoolExecutor(2) as pool:
    first = pool.submit(wait_for_all, coordinator, 2, 0, 10.0)
    time.sleep(0.3)
    with socket.create_connection((host, int(port))) as stranger:
      stranger.sendall(b"GET / HTTP/1.1\n")
    with socket.create_connection((host, int(port))) as stranger:
      stranger.sendall(b"\xff\xfe\n")
    assert not first.done()
    wait_for_all(coordinator, 2, 1, 10.0)
    assert first.result(10) is None
