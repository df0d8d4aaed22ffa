"""Processes that wait for each other, as threads: all go on together, or all hear why not."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from experiments.common.rendezvous import meet
from switchlora_jax.errors import UserError


@pytest.fixture
def coordinator():
  """HOST:PORT at which nothing listens."""
  with socket.create_server(("127.0.0.1", 0)) as server:
    return f"127.0.0.1:{server.getsockname()[1]}"


def outcomes(coordinator, come, seconds=10.0):
  """Of processes that come as [(how many it says there are, which it says it is)]: None or a sentence."""

  def one(place):
    try:
      return meet(coordinator, *place, seconds)
    except UserError as error:
      return str(error)

  with ThreadPoolExecutor(len(come)) as pool:
    return list(pool.map(one, come))


@pytest.mark.parametrize("count", [2, 3, 5])
def test_all_go_on_when_all_have_come(coordinator, count):
  assert outcomes(coordinator, [(count, process) for process in range(count)]) == [None] * count


def test_the_first_may_be_the_last_to_come(coordinator):
  with ThreadPoolExecutor(1) as pool:
    other = pool.submit(meet, coordinator, 2, 1, 10.0)
    time.sleep(0.5)
    assert not other.done()
    meet(coordinator, 2, 0, 10.0)
    assert other.result(10) is None


def test_the_port_is_free_again_at_once(coordinator):
  for _ in range(2):
    assert outcomes(coordinator, [(2, 0), (2, 1)]) == [None, None]


def test_who_is_missing_is_named_to_all_that_came(coordinator):
  found = outcomes(coordinator, [(4, 0), (4, 2)], seconds=1.0)
  assert found[0] == found[1]
  assert found[0].startswith(f"process 1, 3 of 4 did not come to {coordinator} within 1.0 s (--coordinator_timeout)")


def test_a_coordinator_that_nobody_reaches_is_a_sentence_in_time(coordinator):
  start = time.monotonic()
  (found,) = outcomes(coordinator, [(2, 1)], seconds=1.0)
  assert time.monotonic() - start < 5
  assert found.startswith(f"process 1 could not reach process 0 at {coordinator} within 1.0 s") and "refused" in found


@pytest.mark.parametrize("host", ["nowhere.invalid", "a..b", "x" * 70])
def test_a_host_that_does_not_exist_is_a_sentence(host):
  (found,) = outcomes(f"{host}:61440", [(2, 1)], seconds=0.1)
  assert f"could not reach process 0 at {host}:61440" in found


def test_twins_and_other_counts_are_named_to_all_that_came(coordinator):
  found = outcomes(coordinator, [(3, 0), (3, 1), (3, 1)])
  assert found == ["two processes were started with --process_id=1; number them from 0 to 2"] * 3
  found = outcomes(coordinator, [(2, 0), (3, 1)])
  assert found == ["process 1 was started with --num_processes=3 and process 0 with 2; give all the same"] * 2


def test_a_port_in_use_is_a_sentence():
  with socket.create_server(("", 0)) as server:
    (found,) = outcomes(f"127.0.0.1:{server.getsockname()[1]}", [(2, 0)])
  assert "process 0 cannot listen at port" in found and found.endswith("give all processes another --coordinator")


def test_a_stranger_is_not_counted(coordinator):
  host, port = coordinator.split(":")
  with ThreadPoolExecutor(2) as pool:
    first = pool.submit(meet, coordinator, 2, 0, 10.0)
    time.sleep(0.3)
    with socket.create_connection((host, int(port))) as stranger:
      stranger.sendall(b"GET / HTTP/1.1\n")
    with socket.create_connection((host, int(port))) as stranger:
      stranger.sendall(b"\xff\xfe\n")
    assert not first.done()
    meet(coordinator, 2, 1, 10.0)
    assert first.result(10) is None
