"""Where processes wait for each other before JAX connects them.

JAX aborts a process that waits in vain. Here each finds out who is missing, and says so: process 0 listens, the others
come with their number and theirs of the whole, and all are told to go on, or why not.
"""

import contextlib
import re
import socket
import time

from switchlora_jax.errors import UserError

PATIENCE = 5.0  # seconds for one exchange of lines
_HELLO = re.compile(r"process (\d+) of (\d+)\n")


def meet(coordinator: str, processes: int, process: int, seconds: float) -> None:
  """Return when all of the two or more `processes` have come to `coordinator`, HOST:PORT, where process 0 listens.

  Raises:
    UserError: not all came within so many seconds, or they do not fit together; on every process that came.
  """
  deadline = time.monotonic() + seconds
  if process == 0:
    _receive(coordinator, processes, seconds, deadline)
    return
  with _reach(coordinator, process, seconds, deadline) as connection:
    connection.settimeout(max(0.0, deadline - time.monotonic()) + PATIENCE)
    try:
      connection.sendall(f"process {process} of {processes}\n".encode())
      answer = connection.makefile(encoding="utf-8").readline()
    except OSError as error:
      answer = f"{error}\n"
  if answer != "go\n":
    raise UserError(answer.strip() or f"process 0 at {coordinator} ended before all processes had come; see its output")


def _receive(coordinator: str, processes: int, seconds: float, deadline: float):
  """The part of process 0."""
  with contextlib.ExitStack() as stack:
    server, come = stack.enter_context(_listen(coordinator)), {}
    answer = ""
    while not answer:
      try:
        server.settimeout(max(0.01, deadline - time.monotonic()))
        connection = stack.enter_context(server.accept()[0])
        answer = _welcome(connection, come, processes)
      except TimeoutError:
        missing = ", ".join(str(other) for other in range(1, processes) if other not in come)
        answer = (
          f"process {missing} of {processes} did not come to {coordinator} within {seconds} s (--coordinator_timeout); "
          f"see whether it was started, and what it says"
        )
    for connection in come.values():
      with contextlib.suppress(OSError):
        connection.sendall(f"{answer}\n".encode())
  if answer != "go":
    raise UserError(answer)


def _welcome(connection, come: dict, processes: int) -> str:
  """Note who has come, in `come`; the answer for all if there is one by now."""
  connection.settimeout(PATIENCE)
  try:
    hello = _HELLO.fullmatch(connection.makefile(encoding="utf-8").readline(100))
  except (OSError, ValueError):
    hello = None
  if not hello:  # something else that looks at ports
    return ""
  process, count = int(hello[1]), int(hello[2])
  twin = come.get(process)
  come[process] = connection
  if count != processes:
    return (
      f"process {process} was started with --num_processes={count} and process 0 with {processes}; give all the same"
    )
  if twin:
    come[-1] = twin  # it waits for an answer too
    return f"two processes were started with --process_id={process}; number them from 0 to {processes - 1}"
  return "go" if len(come) == processes - 1 else ""


def _listen(coordinator: str) -> socket.socket:
  both = socket.has_dualstack_ipv6()
  try:
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", _port(coordinator)), family=family, dualstack_ipv6=both)
  except OSError as error:
    raise UserError(
      f"process 0 cannot listen at port {_port(coordinator)} of {coordinator}: {error.strerror}; "
      f"end what uses it, or give all processes another --coordinator"
    ) from error


def _reach(coordinator: str, process: int, seconds: float, deadline: float) -> socket.socket:
  """A connection to process 0, which may be started later than this one."""
  host = coordinator.rsplit(":", 1)[0].strip("[]")
  while True:
    try:
      return socket.create_connection((host, _port(coordinator)), timeout=min(PATIENCE, seconds))
    except (OSError, UnicodeError) as error:  # the latter of a name that no host can have
      if time.monotonic() > deadline:
        raise UserError(
          f"process {process} could not reach process 0 at {coordinator} within {seconds} s (--coordinator_timeout): "
          f"{error}; check that process 0 was started, --coordinator, and the firewall"
        ) from error
    time.sleep(0.2)


def _port(coordinator: str) -> int:
  return int(coordinator.rsplit(":", 1)[1])
