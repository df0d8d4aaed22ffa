"""A check that all processes of a run have started, before `jax.distributed.initialize`.

If a process is missing, JAX (0.10.2) aborts the waiting ones (SIGABRT) without naming it. In this check,
process 0 listens at the coordinator's address, the other processes send it their number and the number of processes
that they were started with, and all of them receive the same answer.
"""

import contextlib
import re
import socket
import time

from switchlora_jax.errors import UserError

PATIENCE = 5.0  # seconds for one exchange of lines
HELLO = re.compile(r"process (\d+) of (\d+)\n")


def wait_for_all(coordinator: str, count: int, process: int, seconds: float) -> None:
  """Return once all `count` processes have called this function.

  Args:
    coordinator: HOST:PORT at which process 0 listens.

  Raises:
    UserError: within `seconds`, on every process that has started, if another one is missing or its flags differ.
  """
  deadline = time.monotonic() + seconds
  answer = (_collect if process == 0 else _register)(coordinator, count, process, seconds, deadline)
  if answer != "go":
    raise UserError(answer)


def _register(coordinator: str, count: int, process: int, seconds: float, deadline: float) -> str:
  """Return the answer of process 0, which may start later than this process."""
  host, _, port = coordinator.rpartition(":")
  while True:
    try:
      with socket.create_connection((host.strip("[]"), int(port)), timeout=min(PATIENCE, seconds)) as connection:
        connection.settimeout(max(0.0, deadline - time.monotonic()) + PATIENCE)
        connection.sendall(f"process {process} of {count}\n".encode())
        answer = connection.makefile(encoding="utf-8").readline().strip()
        return answer or f"process 0 at {coordinator} ended before all processes had started; see its output"
    except (OSError, UnicodeError) as error:  # UnicodeError: an invalid host name
      if time.monotonic() > deadline:
        return (
          f"process {process} could not reach process 0 at {coordinator} within {seconds} s (--coordinator_timeout): "
          f"{error}; check that process 0 was started, --coordinator, and the firewall"
        )
    time.sleep(0.2)


def _collect(coordinator: str, count: int, process: int, seconds: float, deadline: float) -> str:
  """Return the answer of process 0, after sending it to the processes that have registered."""
  port, ipv6, arrived = coordinator.rpartition(":")[2], socket.has_dualstack_ipv6(), []
  with contextlib.ExitStack() as stack:
    try:
      family = socket.AF_INET6 if ipv6 else socket.AF_INET
      server = stack.enter_context(socket.create_server(("", int(port)), family=family, dualstack_ipv6=ipv6))
    except OSError as error:
      return (
        f"process 0 cannot listen at port {port} of {coordinator}: {error.strerror}; "
        f"end the program that uses it, or give all processes another --coordinator"
      )
    while not (answer := _answer([(int(hello[1]), int(hello[2])) for _, hello in arrived], count)):
      server.settimeout(max(0.01, deadline - time.monotonic()))
      try:
        connection = stack.enter_context(server.accept()[0])
      except TimeoutError:
        missing = sorted(set(range(1, count)) - {int(hello[1]) for _, hello in arrived})
        answer = (
          f"process {', '.join(map(str, missing))} of {count} did not connect to {coordinator} within {seconds} s "
          f"(--coordinator_timeout); check that it was started, and its output"
        )
        break
      connection.settimeout(PATIENCE)
      with contextlib.suppress(OSError, ValueError):  # a port scanner, for example
        if hello := HELLO.fullmatch(connection.makefile(encoding="utf-8").readline(100)):
          arrived.append((connection, hello))
    for connection, _ in arrived:
      with contextlib.suppress(OSError):
        connection.sendall(f"{answer}\n".encode())
  return answer


def _answer(arrived: list[tuple[int, int]], count: int) -> str:
  """Return "go" or an error, given the (number, count) of each process that has registered; "" to wait for more."""
  numbers = [number for number, _ in arrived]
  for number, own_count in arrived:
    if own_count != count:
      return (
        f"process {number} was started with --num_processes={own_count} and process 0 with {count}; "
        "pass the same number to all"
      )
    if numbers.count(number) > 1:
      return f"two processes were started with --process_id={number}; number them from 0 to {count - 1}"
  return "go" if len(arrived) == count - 1 else ""
