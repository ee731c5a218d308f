# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` for as long as it is needed."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path

import psutil

START_TIMEOUT = 600.0  # seconds
_STOP_TIMEOUT = 30.0
# Ends the server when the process that started it is killed, which cannot stop it any more. The kernel keeps this over
# the call of another program. Set by a program of its own: code between fork and exec is unsafe in a process with
# threads. The parent may have ended before it was set.
_PR_SET_PDEATHSIG = 1
_TIED = f"""
import ctypes, os, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl({_PR_SET_PDEATHSIG}, int(signal.SIGTERM), 0, 0, 0):
    raise OSError(ctypes.get_errno(), "prctl")
if os.getppid() != int(sys.argv[1]):
    sys.exit("the process that started this server has ended")
os.execv(sys.argv[2], sys.argv[2:])
"""
# Pydantic says what is wrong on the lines after this one; the last of them ends with how it says that to programs.
_VALIDATION = re.compile(r"\d+ validation errors? for \S+$")
_DETAILS, _MOST_DETAILS = " [type=", 3
# What vLLM puts before a line of its log; all of it may be missing.
_PREFIX = re.compile(r"(?:\([\w-]+(?: pid=\d+)?\) )?(?:(?P<level>[A-Z]+) \d\d-\d\d [\d:]+ \[[^]]+\] )?")


class ServerError(ValueError):
    """Something a person should read instead of a traceback."""


@dataclass
class Server:
    port: int
    # The process group of the server is its own.
    process: subprocess.Popen
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def request(self, method: str, path: str, body: dict | None = None, timeout: float = START_TIMEOUT) -> HTTPResponse:
        # http.client rather than urllib, which would send this through a proxy where one is set.
        connection = HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        connection.request(method, path, body and json.dumps(body), {"Content-Type": "application/json"})
        return connection.getresponse()

    def metric(self, name: str) -> float:
        """One of vLLM's Prometheus metrics, such as `vllm:num_preemptions_total`, summed over its labels.

        Raises:
            ServerError: there is no such metric.
        """
        with self.request("GET", "/metrics") as response:
            lines = response.read().decode().splitlines()
        values = [float(line.rsplit(maxsplit=1)[1]) for line in lines if line.startswith(f"{name}{{")]
        if not values:
            raise ServerError(f"vllm serve has no metric {name}.")
        return sum(values)


@contextmanager
def run_server(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    *,
    folder: Path | None = None,
    command: str = "vllm.entrypoints.cli.main",
    timeout: float = START_TIMEOUT,
    on_ready: Callable[[float], None] = lambda seconds: None,
) -> Iterator[Server]:
    """Runs `vllm serve` on a free port of 127.0.0.1, yields it once it answers and shuts it down whatever happens.

    On Linux also when this process is killed, or the thread that called this ends.

    Args:
        arguments: of `vllm serve`: the model and options, without host and port.
        environment: all variables.
        log: the file that its output goes to.
        folder: where it runs.
        command: the module of vLLM's command.
        timeout: seconds until it must answer.
        on_ready: is told how many seconds that took.

    Raises:
        ServerError: the server failed, or its user could not reach it; says what its log says.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                *_tied_to_this_process(),
                *(sys.executable, "-m", command, "serve", *arguments, "--host", "127.0.0.1", "--port", str(port)),
            ],
            cwd=folder,
            env=dict(environment),
            stdout=output,
            stderr=subprocess.STDOUT,
            # A session of its own: Ctrl-C reaches this program alone, and one signal all of the server's processes.
            start_new_session=True,
        )
    server = Server(port, process, log)
    try:
        on_ready(_wait_until_ready(server, timeout))
        yield server
    except (ServerError, HTTPException, OSError) as error:
        raise ServerError(f"{what_went_wrong(log)}\n\n{error} The whole log is {log}.") from error
    finally:
        _stop(process)


def _tied_to_this_process() -> list[str]:
    """What a command must begin with to be ended with this process."""
    if not sys.platform.startswith("linux"):
        return []
    return [sys.executable, "-I", "-S", "-c", _TIED, str(os.getpid())]


def exit_on_signals() -> None:
    """Makes `kill` and a closed terminal shut the server down just as Ctrl-C does.

    Signals that this process was told to ignore stay ignored, as `nohup` wants it.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: sys.exit(128 + number))


def what_went_wrong(log: Path) -> str:
    """The first errors of a server's log (what follows them is usually their echo), or its end if it names none.

    Without the process, level, time and place that vLLM puts before each line. Warnings may speak of errors too.
    """
    lines = log.read_text(errors="replace").splitlines()
    logged = [(match["level"], line[match.end() :].strip()) for line in lines if (match := _PREFIX.match(line))]
    errors = [
        _with_details(text, [following for _, following in logged[place + 1 : place + 1 + _MOST_DETAILS]])
        for place, (level, text) in enumerate(logged)
        if level in (None, "ERROR", "CRITICAL") and "Error: " in text
    ]
    return "\n".join(list(dict.fromkeys(errors))[:5] or lines[-10:])


def _with_details(error: str, following: Sequence[str]) -> str:
    """An error, with the first of the lines that follow it in the log if they say what is wrong."""
    if not _VALIDATION.search(error):
        return error
    for line in following:
        text, has_ended, _ = f" {line}".partition(_DETAILS)
        error += text
        if has_ended:
            break
    return error


def _wait_until_ready(server: Server, timeout: float) -> float:
    """Waits until the server answers, and returns how many seconds that took."""
    start = time.monotonic()
    while time.monotonic() - start < timeout:
        if server.process.poll() is not None:
            raise ServerError(f"vllm serve exited with {server.process.returncode}.")
        with suppress(OSError), server.request("GET", "/health") as response:
            if response.status == 200:
                return time.monotonic() - start
        time.sleep(0.5)
    raise ServerError(f"vllm serve was not ready after {timeout:g} s.")


def _stop(process: subprocess.Popen) -> None:
    """Asks the server to shut down, then makes sure that none of its processes is left."""
    descendants = []
    with suppress(psutil.NoSuchProcess):
        # Not all of them need be in its group.
        descendants = psutil.Process(process.pid).children(recursive=True)
    try:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_STOP_TIMEOUT)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for descendant in descendants:
            with suppress(psutil.NoSuchProcess):
                descendant.kill()
        process.wait()
