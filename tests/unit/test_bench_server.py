# SPDX-License-Identifier: Apache-2.0
"""Servers are started, watched and stopped with all that they have started; a small module stands in for vLLM's."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from vllm_longspec.bench.server import ServerError, exit_on_signals, run_server, what_went_wrong

# Serves /health after it has started a child that leaves its process group.
MODULE = """
import os, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
assert sys.argv[1:3] == ["serve", "model"], sys.argv
if "--fail" in sys.argv:
    print("INFO starting")
    place = "11-28 02:23:25 [core.py:12]"
    print(f"(APIServer pid=1) WARNING {place} there may be errors like `OSError: [Errno 24]`")
    print(f"(VllmWorker-0 pid=12) ERROR {place}     raise ValueError")
    print(f"(VllmWorker-0 pid=12) ERROR {place} ValueError: no such model")
    print(f"(EngineCore pid=13) ERROR {place} ValueError: no such model")
    print("RuntimeError: the engine failed")
    sys.exit(3)
if "--hang" in sys.argv:
    time.sleep(600)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/exit":
            os._exit(7)
        self.send_response(200)
        self.end_headers()
        body = {"/metrics": 'a:b_total{x="0"} 2\\na:b_total{x="1"} 3\\n', "/health": ""}.get(self.path, f"{child.pid}")
        self.wfile.write(body.encode())
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def start(tmp_path):
    (tmp_path / "stand_in.py").write_text(MODULE)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    return lambda *options, **keywords: run_server(
        ["model", *options], environment, tmp_path / "logs" / "x.log", command="stand_in", **keywords
    )


def has_ended(pid):
    """Whether a process that was killed is gone, which takes a moment."""
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


def test_nothing_of_a_server_is_left(start):
    seconds: list[float] = []
    with start(on_ready=seconds.append) as server:
        with server.request("GET", "/child") as response:
            child = int(response.read())
        assert server.url == f"http://127.0.0.1:{server.port}"
        assert server.metric("a:b_total") == 5
        with pytest.raises(ServerError, match="no metric a:c"):
            server.metric("a:c")
        assert psutil.Process(child).status() != psutil.STATUS_ZOMBIE
    assert len(seconds) == 1
    assert has_ended(child) and server.process.poll() is not None


def test_the_log_says_why_a_server_does_not_start(start, tmp_path):
    with pytest.raises(ServerError) as error, start("--fail"):
        pass
    lines = str(error.value).splitlines()
    assert lines[:2] == ["ValueError: no such model", "RuntimeError: the engine failed"]
    assert lines[-1] == f"vllm serve exited with 3. The whole log is {tmp_path}/logs/x.log."


@pytest.mark.parametrize(
    ("details", "said"),
    [
        (["  Value error, no such draft [type=value_error, input_value=1]"], "Value error, no such draft"),
        (["foo", "  Unexpected keyword argument [type=unexpected]", "  more"], "foo Unexpected keyword argument"),
        (["  Value error, no such draft.", "Please", "try", "another"], "Value error, no such draft. Please try"),
    ],
)
def test_what_validation_says_is_on_the_lines_after_it(tmp_path, details, said):
    log = tmp_path / "x.log"
    error = "pydantic_core._pydantic_core.ValidationError: 1 validation error for SpeculativeConfig"
    log.write_text("\n".join(["Traceback", f"(APIServer pid=1) {error}", *(f"(APIServer pid=1) {d}" for d in details)]))
    assert what_went_wrong(log) == f"{error} {said}"


def test_a_server_that_hangs_is_stopped(start):
    with pytest.raises(ServerError, match="not ready after 1 s"), start("--hang", timeout=1):
        pass


def test_a_server_that_dies_is_said_to_have(start):
    with (
        pytest.raises(ServerError, match=r"The whole log is "),
        start() as server,
        server.request("GET", "/exit") as response,
    ):
        response.read()


PARENT = """
import os, sys
from pathlib import Path
from vllm_longspec.bench.server import run_server
with run_server(["model", "--hang"], os.environ, Path(sys.argv[1]), command="stand_in"):
    pass
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels do not tell a process that its parent ended")
def test_a_server_ends_with_the_process_that_started_it(start, tmp_path):
    path = os.pathsep.join([str(tmp_path), os.getcwd(), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path / "log")], env=environment)
    server = None
    try:
        for _ in range(300):
            children = psutil.Process(parent.pid).children()
            if children and "stand_in" in children[0].cmdline()[1:3]:
                server = children[0]
                break
            time.sleep(0.1)
    finally:
        parent.kill()
        parent.wait()
    assert server is not None
    try:
        assert has_ended(server.pid)
    finally:
        if server.is_running():
            server.kill()


def test_signals_that_are_ignored_stay_so():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        exit_on_signals()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        with pytest.raises(SystemExit, match="143"):
            signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
