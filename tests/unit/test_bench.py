# SPDX-License-Identifier: Apache-2.0
"""`vllm-longspec bench` against a server that only speaks vLLM's protocol, and what it makes of what was measured."""

import argparse
import json
import os
import random
import re
import signal
import threading
import time
from dataclasses import asdict, replace
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoTokenizer

from benchmarks import PAIR, ROOT
from vllm_longspec import commands
from vllm_longspec.bench import client, command, plots
from vllm_longspec.bench import environment as machine
from vllm_longspec.bench.cells import Answer, Cell, Key, Store, digest
from vllm_longspec.bench.client import Load, measure, read_stream
from vllm_longspec.bench.figures import all_figures
from vllm_longspec.bench.methods import METHODS, read_methods
from vllm_longspec.bench.report import Baseline, Report
from vllm_longspec.bench.server import ServerError
from vllm_longspec.bench.workloads import WORKLOADS

TARGET = str(PAIR / "target")
STEPS = [(3, 2), (3, 0), (1, 1)]  # drafted, accepted


class FakeServer(ThreadingHTTPServer):
    """Answers as vLLM does: the first token, then what each of `STEPS` emits."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[dict] = []
        # The request, counted from 0, that fails, and what is sent instead.
        self.failing: tuple[int, str] | None = None
        # The request that has a process killed, and which.
        self.killing: tuple[int, int] | None = None
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()
        self.with_details = True
        self.drafts = self.accepted = 0
        self.api_key: str | None = None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def log_message(self, *arguments):
        pass

    def send(self, text, status=200):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self):
        authorised = self.server.api_key is None or self.headers["Authorization"] == f"Bearer {self.server.api_key}"
        if self.path == "/v1/models" and not authorised:
            self.send("{}", 401)
        elif self.path == "/v1/models":
            model = {"id": "served", "root": TARGET, "max_model_len": 256}
            self.send(json.dumps({"data": [model]}))
        elif self.path == "/metrics":
            counts = {"num_drafts": self.server.drafts, "num_accepted_tokens": self.server.accepted}
            counts["num_draft_tokens"] = 3 * self.server.drafts
            lines = [f'vllm:spec_decode_{name}_total{{engine="0"}} {count}' for name, count in counts.items()]
            position = f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{position="0"}} {self.server.drafts}'
            self.send("\n".join([*lines, position]))

    def do_POST(self):
        with self.server.lock:
            self.server.under_way += 1
            self.server.most_under_way = max(self.server.most_under_way, self.server.under_way)
        # Requests that are sent at a time meet here.
        time.sleep(0.1)
        self.answer()
        with self.server.lock:
            self.server.under_way -= 1

    def answer(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        number = len(self.server.requests)
        self.server.requests.append(body)
        if self.server.killing is not None and self.server.killing[0] == number:
            os.kill(self.server.killing[1], signal.SIGKILL)
            return
        if self.server.failing is not None and self.server.failing[0] == number:
            self.send(self.server.failing[1], 400)
            return
        self.server.drafts += len(STEPS)
        self.server.accepted += sum(accepted for _, accepted in STEPS)
        # By the seed, so that answers can be told apart.
        token = body["seed"] + 10
        events = []
        for count in (1, *(1 + accepted for _, accepted in STEPS)):
            events.append({"choices": [{"text": "x", "token_ids": [token] * count}]})
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": 7}
        last = {"choices": [], "usage": usage}
        if self.server.with_details:
            drafted, accepted = ([step[index] for step in STEPS] for index in (0, 1))
            steps = {"num_spec_steps": len(STEPS), "per_step_drafted": drafted, "per_step_accepted": accepted}
            last["metrics"] = {"speculative_decoding": steps}
        lines = [f"data: {json.dumps(event)}\n\n" for event in (*events, last)]
        self.send("".join([*lines, "data: [DONE]\n\n"]))


@pytest.fixture(autouse=True)
def signals_are_left_alone(monkeypatch):
    monkeypatch.setattr(command, "exit_on_signals", lambda: None)


@pytest.fixture
def server():
    with FakeServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "own.jsonl"
    lines = [{"prompt": "def f(x):"}, {"input_ids": [5, 6, 7]}, {"prompt": "x " * 400}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def bench(server, prompts, out, *options):
    url = server if isinstance(server, str) else server.url
    given = ["--url", url, "--workload", str(prompts), "--output-len", "16", "--out", str(out)]
    given += [] if "--methods" in options else ["--methods", "mine"]
    commands.main(["bench", *given, *options])


def error_of(capsys, *arguments):
    with pytest.raises(SystemExit) as error:
        bench(*arguments)
    message = str(error.value.code)
    assert message.startswith("vllm-longspec bench: ") and "\n" not in message
    return message


def test_a_running_server_is_measured(server, prompts, tmp_path, capsys):
    out = tmp_path / "out"
    bench(server, prompts, out, "--temperatures", "0,0.5", "--warmups", "1", "--seed", "3", "--batch", "2")
    assert "own.jsonl: 2 prompts of 3 to" in capsys.readouterr().out
    # A warm-up and two prompts at each temperature, as they were asked for.
    assert [request["temperature"] for request in server.requests] == [0.0] * 3 + [0.5] * 3
    assert all(request["max_tokens"] == 16 and request["model"] == "served" for request in server.requests)
    for timed in (server.requests[1:3], server.requests[4:]):
        assert sorted(request["seed"] for request in timed) == [3, 4]
        assert [5, 6, 7] in [request["prompt"] for request in timed]
    report = json.loads((out / "report.json").read_text())
    first, second = report["figures"]
    assert (first["temperature"], second["temperature"]) == (0.0, 0.5)
    assert first["num_prompts"] == 2 and first["output_tokens"] == 14
    assert first["tokens_per_step"] == 2.0
    assert first["by_depth"] == [pytest.approx(2 / 3), pytest.approx(1 / 3)]
    assert first["drafted"] == {"3": pytest.approx(2 / 3), "1": pytest.approx(1 / 3)}
    # What is not of this command's own servers is not said to be.
    assert report["environments"] == [{"server": server.url, "vllm-longspec": report["settings"]["version"]}]
    assert {path.name for path in out.iterdir()} >= {"report.md", "report.html", "report-t0.svg", "report-t0.5.svg"}


@pytest.mark.parametrize(("options", "at_a_time"), [((), 1), (("--batch", "2"), 2), (("--request-rate", "1000"), 2)])
def test_requests_come_as_they_are_asked_to(server, prompts, tmp_path, options, at_a_time):
    bench(server, prompts, tmp_path / "out", "--warmups", "0", *options)
    assert server.most_under_way == at_a_time


def test_a_workload_from_a_folder_in_a_template_of_the_users(server, tmp_path):
    problems = (json.dumps({"problem": f"Find {name}."}) + "\n" for name in "xyz")
    (tmp_path / "aime24.jsonl").write_text("".join(problems))
    (tmp_path / "template").write_text("[{{ messages[0]['content'] }}]")
    options = ["--workload-data", str(tmp_path), "--chat-template", str(tmp_path / "template"), "--ignore-eos"]
    bench(server, "aime24", tmp_path / "out", *options, "--max-prompts", "2", "--warmups", "0")
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    texts = {tokenizer.decode(request["prompt"]) for request in server.requests}
    assert len(texts) == 2 and texts <= {f"[Find {name}.]" for name in "xyz"}
    assert all(request["ignore_eos"] for request in server.requests)


def test_a_run_that_is_interrupted_says_how_to_go_on(server, prompts, tmp_path, capsys, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "measure", interrupted)
    message = error_of(capsys, server, prompts, tmp_path / "out")
    assert message.endswith(f"stopped; what was measured is in {tmp_path}/out: go on with --resume")


def test_counters_stand_in_for_what_requests_do_not_say(server, prompts, tmp_path):
    server.with_details = False
    bench(server, prompts, tmp_path / "out")
    [figures] = json.loads((tmp_path / "out" / "report.json").read_text())["figures"]
    assert figures["tokens_per_step"] == 2.0 and figures["by_depth"] == [1.0]
    # From the chunks of the streams: tokens 1 to 3 in one step, 4 in one, 5 and 6 in one. A part has two tokens.
    assert figures["by_position"] == {"0": 3.0, "4": 1.5}
    assert figures["drafted"] == {}


def test_a_run_that_stopped_goes_on(server, prompts, tmp_path, capsys):
    out = tmp_path / "out"
    options = ("--temperatures", "0,1", "--warmups", "0")
    server.failing = (3, json.dumps({"error": {"message": "no room\nfor it"}}))
    message = error_of(capsys, server, prompts, out, *options)
    assert re.search(r"mine on own\.jsonl: request [12] of 2 failed: 400 Bad Request: no room for it", message)
    [figures] = json.loads((out / "report.json").read_text())["figures"]
    assert figures["temperature"] == 0.0
    server.failing = None
    assert "has a run: go on with it by --resume" in error_of(capsys, server, prompts, out, *options)
    others = error_of(capsys, server, prompts, out, *options, "--resume", "--output-len", "8")
    assert "--resume with output_len 8, but the run in" in others
    assert len(server.requests) == 4
    bench(server, prompts, out, *options, "--resume")
    assert len(server.requests) == 6 and all(request["temperature"] == 1.0 for request in server.requests[4:])
    assert len(json.loads((out / "report.json").read_text())["figures"]) == 2
    # A run grows: what is there stays in the report.
    other = tmp_path / "other.jsonl"
    other.write_text('{"input_ids": [9]}\n')
    bench(server, other, out, "--warmups", "0", "--resume")
    assert len(server.requests) == 7
    report = json.loads((out / "report.json").read_text())
    assert [(each["workload"], each["temperature"]) for each in report["figures"]] == [
        ("other.jsonl", 0.0),
        ("own.jsonl", 0.0),
        ("own.jsonl", 1.0),
    ]
    assert len(report["prompts"]) == 2
    with prompts.open("a") as file:
        file.write('{"input_ids": [9]}\n')
    assert "was measured with another set of prompts" in error_of(capsys, server, prompts, out, *options, "--resume")


def test_a_run_that_is_killed_keeps_what_was_measured(server, prompts, tmp_path):
    out = tmp_path / "out"
    options = ("--temperatures", "0,1", "--warmups", "0", "--max-prompts", "1")
    ready, set_ready = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.read(ready, 1)
            bench(server, prompts, out, *options)
        finally:
            os._exit(1)
    server.killing = 1, pid
    os.write(set_ready, b"x")
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    server.killing = None
    bench(server, prompts, out, *options, "--resume")
    # The one that was under way was sent twice.
    assert [request["temperature"] for request in server.requests] == [0.0, 1.0, 1.0]
    assert len(json.loads((out / "report.json").read_text())["figures"]) == 2


def test_runs_are_compared(server, prompts, tmp_path, capsys):
    bench(server, prompts, tmp_path / "one")
    bench(server, prompts, tmp_path / "two", "--baseline", str(tmp_path / "one"))
    text = (tmp_path / "two" / "report.md").read_text()
    [row] = re.findall(r"### Compared with \S+one\n\n.*\n.*\n(.*)\n", text)
    assert row.startswith("| own.jsonl | mine | ") and row.endswith("| 2.00 | 2.00 |")
    assert "there is no" in error_of(capsys, server, prompts, tmp_path / "three", "--baseline", str(tmp_path))
    options = ["--baseline", str(tmp_path / "one"), "--output-len", "8"]
    message = error_of(capsys, server, prompts, tmp_path / "three", *options)
    assert "one was measured with output_len 16, not 8: give the same, or leave --baseline out" in message
    assert not (tmp_path / "three").exists()
    # Other prompts have nothing in common but their name.
    bench(server, prompts, tmp_path / "three", "--baseline", str(tmp_path / "one"), "--max-prompts", "1")
    text = (tmp_path / "three" / "report.md").read_text()
    assert re.search(r"one\n\n- max prompts: 1, before none\n- mine on own.jsonl is left out: its prompts are", text)
    assert "| before |" not in text


def test_proxies_are_bypassed(server, prompts, tmp_path, monkeypatch):
    """Nobody listens where the proxy is said to be."""
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "example.org")
    monkeypatch.delenv("no_proxy", raising=False)
    bench(server, prompts, tmp_path / "out")
    assert os.environ["NO_PROXY"] == "example.org" and "no_proxy" not in os.environ


def test_what_was_asked_before_is_not_in_the_prefix_cache(server, prompts, tmp_path):
    bench(server, prompts, tmp_path / "out", "--temperatures", "0,1", "--warmups", "2", "--max-prompts", "2")
    salts = [request["cache_salt"] for request in server.requests]
    # Two warm-ups and two prompts of each cell: those of a cell have one salt, a warm-up its own.
    assert [salts.count(salt) for salt in salts] == [1, 1, 2, 2] * 2


def test_arrivals_follow_from_the_seed(monkeypatch):
    async def benchmark(**arguments):
        drawn.append((random.random(), np.random.gamma(1.0, 2.0)))
        return {"errors": []}

    drawn: list = []
    monkeypatch.setattr(client, "benchmark", benchmark)
    for seed in (1, 1, 2):
        load = Load(output_len=2, temperature=0.0, seed=seed, batch=None, rate=1.0, warmups=0, ignore_eos=False)
        measure("http://127.0.0.1:1", "m", None, [], load)
    assert drawn[0] == drawn[1] and drawn[0][0] != drawn[2][0] and drawn[0][1] != drawn[2][1]


def test_a_server_may_want_a_key(server, prompts, tmp_path, capsys, monkeypatch):
    server.api_key = "secret"
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    message = error_of(capsys, server, prompts, tmp_path / "out")
    assert "/v1/models answers 401 Unauthorized: set OPENAI_API_KEY" in message
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    bench(server, prompts, tmp_path / "out", "--max-prompts", "1")


def test_settings_of_a_run_that_measured_nothing_may_change(server, prompts, tmp_path, capsys):
    out = tmp_path / "out"
    server.failing = (0, "no")
    error_of(capsys, server, prompts, out, "--warmups", "0")
    server.failing = None
    bench(server, prompts, out, "--warmups", "0", "--resume", "--output-len", "8")
    assert json.loads((out / "run.json").read_text())["settings"]["output_len"] == 8


@pytest.mark.parametrize("content", ["{", "[]", '{"settings": 3}'])
def test_a_folder_of_something_else_is_no_run(tmp_path, content):
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "any.json").touch()
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run.json is not of a run: give another folder"):
        Store(tmp_path, {}, resume=True)


def test_cells_do_not_share_a_file(tmp_path):
    store = Store(tmp_path / "out", {}, resume=False)
    [method] = read_methods(["magicdec"], [], [], None)
    measured = replace(cell("magicdec", [Answer([1, 2], [1, 1])]), speculative_config={"method": "magicdec"})
    keys = [Key("magicdec", workload, temperature) for workload in ("a b", "a_b") for temperature in (0.1, 0.1 + 1e-9)]
    for key in keys:
        store.add(replace(measured, key=key, prompts=digest([])))
    assert {each.key for each in store.all([], [])} == set(keys)
    assert all(store.has(key, method, []) for key in keys)
    other = keys[0]._replace(temperature=1.0)
    store._path(keys[0]).rename(store._path(other))
    with pytest.raises(ValueError, match="was measured with another method, workload or temperature"):
        store.has(other, method, [])


def test_what_is_wrong_is_said_before_anything_starts(server, prompts, tmp_path, capsys):
    out = tmp_path / "out"
    for options, message in [
        (("--output-len", "1"), "--output-len must be 2 or more, got 1"),
        (
            ("--workload", "nothing"),
            "--workload nothing: there is neither such a file nor such a workload; there is gov",
        ),
        (("--workload", f"{prompts},{prompts}"), "--workload has own.jsonl twice"),
        (("--workload", str(prompts)), "--workload has own.jsonl twice"),
        (("--methods", "a", "--methods", "b"), "--url measures one server"),
        (("--draft", "D"), "--draft is of servers that this command starts: leave it out with --url"),
        (("--methods", "a,b"), "--url measures one server"),
        (("--methods", "org/model"), "--methods org/model: a name has letters, digits"),
        (("--request-rate", "0"), "--request-rate must be more than 0"),
        (("--request-rate", "nan"), "--request-rate must be more than 0, got nan"),
        (("--output-len", "256"), "--output-len 256 leaves no room for a prompt in a window of 256"),
        (("--workload", "aime24", "--no-chat-template", "--workload-data", str(tmp_path)), "aime24.jsonl; save the"),
        (("--workload", "aime24"), "has no chat template: give one by --chat-template"),
    ]:
        assert message in error_of(capsys, server, prompts, out, *options)
    assert not server.requests and not out.exists()
    out.mkdir()
    (out / "thesis.tex").touch()
    assert "has something that is no run" in error_of(capsys, server, prompts, out)


def test_a_file_without_prompts_is_named(server, tmp_path, capsys):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    assert "empty.jsonl has no prompts: give a file" in error_of(capsys, server, empty, tmp_path / "out")


def test_an_address_is_one(prompts, tmp_path, capsys):
    message = error_of(capsys, "127.0.0.1:8000", prompts, tmp_path / "out")
    assert message.endswith("--url 127.0.0.1:8000 is no address of a server: give http://HOST:PORT")


def test_a_dead_server_is_one_line(prompts, tmp_path, capsys):
    message = error_of(capsys, "http://127.0.0.1:1", prompts, tmp_path / "out")
    assert "--url http://127.0.0.1:1 does not answer" in message and "is the server running?" in message


def test_matplotlib_is_asked_for_first(monkeypatch):
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'vllm-longspec\[bench\]'"):
        plots.check_matplotlib()


def test_a_stream_that_fails_says_so():
    fine = b'data: {"choices": [{"text": "a", "token_ids": [1]}]}\n\n'
    assert read_stream([fine[:20], fine[20:], b": ping\n\ndata: [DONE]\n\n"]).token_ids == [1]
    with pytest.raises(ServerError, match="failed while it generated: out of it"):
        read_stream([fine, b'data: {"error": {"message": "out of it"}}\n\n'])
    with pytest.raises(ServerError, match="sends no token ids"):
        read_stream([b'data: {"choices": [{"text": "a"}]}\n\n'])


def test_methods_are_what_vllm_is_told():
    found = read_methods(
        ["seq", "vanilla", "tree", "magicdec"], ["eagle3=HEAD", "draft=MODEL", "ngram"], ['x={"a": 1}'], "D", 3, 6
    )
    configs = {method.name: method.speculative_config for method in found}
    assert next(iter(configs)) == "vanilla"
    assert configs == {
        "vanilla": None,
        "seq": {"model": "D", "gamma": 3},
        "tree": {"model": "D"},
        "magicdec": {"method": "magicdec"},
        "eagle3": {"method": "eagle3", "model": "HEAD", "num_speculative_tokens": 6},
        "draft": {"method": "draft_model", "model": "MODEL", "num_speculative_tokens": 6},
        "ngram": {"method": "ngram_gpu", "num_speculative_tokens": 6},
        "x": {"a": 1},
    }
    # vLLM refuses to count for who does not speculate.
    assert found[0].arguments() == []
    assert found[1].arguments()[2:] == ["--per-request-spec-decode-metrics", "detailed"]


def test_suffix_decoding_runs_on_the_older_runner(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    [method] = read_methods([], ["suffix"], [], None)
    assert method.environment == {"VLLM_USE_V2_MODEL_RUNNER": "0"}
    # Nor does it remember answers to the prompts that it is asked again.
    assert method.speculative_config == {"method": "suffix", "suffix_decoding_max_cached_requests": 0}


@pytest.mark.parametrize(
    ("names", "peers", "others", "message"),
    [
        (["tree"], [], [], "--methods tree needs a GLIDE draft: give --draft, or leave tree out"),
        (["seq"], [], [], "--methods seq needs a GLIDE draft"),
        (
            ["fast"],
            [],
            [],
            "--methods fast: there is vanilla, seq, tree, magicdec; --peers has vLLM's own: eagle3=HEAD",
        ),
        (["vanilla", "vanilla"], [], [], "method vanilla is given twice"),
        ([], ["eagle3"], [], "--peers eagle3 needs its head: give eagle3=HEAD"),
        ([], ["draft="], [], "--peers draft needs its model: give draft=MODEL"),
        ([], ["ngram=x"], [], "ngram needs no model"),
        ([], ["medusa"], [], "--peers medusa: there is eagle3=HEAD"),
        ([], ["suffix"], [], "pip install arctic-inference"),
        ([], [], ["x"], "what follows NAME= is not JSON"),
        ([], [], ["x=[]"], "give NAME=JSON"),
        ([], [], ["a/b={}"], "letters, digits"),
        ([], [], [], "--methods names none"),
        ([], ["eagle3=nowhere/run/head"], [], "--peers eagle3=nowhere/run/head: there is no nowhere/run/head; give"),
    ],
)
def test_methods_that_cannot_be_are_refused(names, peers, others, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_methods(names, peers, others, None)
    assert "\n" not in str(error.value)


def test_a_draft_that_is_none_is_said_before_others_are_measured(tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"--draft {tmp_path}/draft: there is no {tmp_path}/draft; give")):
        read_methods(["vanilla", "tree"], [], [], f"{tmp_path}/draft")
    (tmp_path / "draft").mkdir()
    for other in (f"{tmp_path}/draft", TARGET):
        with pytest.raises(ValueError) as error:
            read_methods(["vanilla", "seq"], [], [], other)
        said = str(error.value)
        assert said.startswith(f"--draft takes a GLIDE draft, and {other} is not one") and "\n" not in said
    assert len(read_methods(["vanilla", "tree"], ["eagle3=someone/head"], [], str(PAIR / "draft"))) == 3


def test_engine_arguments_are_options_of_vllm_serve():
    engine = {"dtype": "float32", "enforce_eager": True, "enable_prefix_caching": False, "max_model_len": None}
    engine |= {"hf_overrides": {"a": 1}, "cudagraph_capture_sizes": [1, 2]}
    assert list(command.flags(engine)) == [
        *("--dtype", "float32", "--enforce-eager", "--no-enable-prefix-caching"),
        *("--hf-overrides", '{"a": 1}', "--cudagraph-capture-sizes", "1", "2"),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", '{"model": "x"}'], "--engine has 'model': give --target instead"),
        (["--engine", '{"sped": 1}'], "--engine has 'sped', which is no engine argument"),
        (["--methods", "tree"], "--methods tree needs a GLIDE draft"),
        (["--target", "/no/model"], "--target /no/model is no model that vLLM reads: give a folder"),
        (["--chat-template", "/no/template"], "No such file or directory: '/no/template'"),
    ],
)
def test_servers_that_cannot_be_are_refused(options, message, prompts, tmp_path):
    given = ["--target", TARGET, "--workload", str(prompts), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=re.escape(message)) as error:
        commands.main(["bench", *given, *options])
    assert "\n" not in str(error.value.code)


def cell(method, answers, seconds=1.0, workload="w", is_speculative=True, prompts="same"):
    lengths = [len(answer.token_ids) for answer in answers]
    latencies = {f"{what}_{name}_ms": 1.0 for name in ("ttft", "tpot") for what in ("median", "p99")}
    result = {
        "input_lens": [10] * len(answers),
        "output_lens": lengths,
        "total_output_tokens": sum(lengths),
        "output_throughput": sum(lengths) / seconds,
        "latencies": [seconds + 0.5] * len(answers),
        "ttfts": [0.5] * len(answers),
        **latencies,
    }
    return Cell(Key(method, workload, 0.0), None, {"device": "x"}, prompts, "two", result, answers, is_speculative)


def test_figures_are_those_of_the_answers():
    tokens = list(range(9))
    vanilla = cell("vanilla", [Answer(tokens, [1] * 9), Answer(tokens, [1] * 9)], 2.0, is_speculative=False)
    # The first has two steps without draft tokens; the second accepts more at its end than it takes.
    answers = [
        Answer(tokens, [1, 3, 1, 1, 3], drafted=[5, 4], accepted=[2, 2]),
        Answer([*tokens[:6], 9, 7, 8], [1, 4, 4], drafted=[5, 5], accepted=[3, 5]),
    ]
    plain, tree = all_figures([vanilla, cell("tree", answers)], 16)
    assert (plain.tokens_per_step, plain.speedup, plain.identical) == (1.0, None, None)
    assert plain.user_tokens_per_second == 4.0 and tree.user_tokens_per_second == 8.0
    assert tree.speedup == 2.0
    assert (tree.identical, tree.compared, tree.first_differences) == (1, 2, [7])
    assert tree.tokens_per_step == (8 + 8) / 6
    assert tree.by_depth == [1.0, 1.0, 0.5, 0.25, 0.25]
    assert tree.drafted == {0: 2 / 6, 4: 1 / 6, 5: 3 / 6}
    # Steps of the first by its chunks, of the second by its metrics: at 1, 4, 5, 6, and at 1 and 5.
    assert tree.by_position == {0: 3.5, 4: 2.0, 6: 3.0}


@pytest.mark.parametrize(
    ("tokens", "chunks", "accepted", "steps"),
    [
        # The last step accepts 3 of which one is taken, after two steps without draft tokens.
        (8, [1, 3, 1, 1, 2], [2, 3], 4),
        # The last step has no draft tokens.
        (8, [1, 3, 3, 1], [2, 2], 3),
        # All steps after the first in one chunk: the totals say that the last took one of three.
        (8, [1, 3, 4], [2, 1, 3], 3),
        # An answer that ends with the prompt's token.
        (1, [1], [], 0),
    ],
)
def test_steps_count_what_the_answer_takes(tokens, chunks, accepted, steps):
    answer = Answer(list(range(tokens)), chunks, drafted=[5] * len(accepted), accepted=accepted)
    [figures] = all_figures([cell("tree", [answer])], 16)
    assert figures.tokens_per_step == (pytest.approx((tokens - 1) / steps) if steps else None)


def test_counters_see_steps_without_drafts():
    one = cell("mine", [Answer(list(range(11)), [1] * 11)])
    one.result |= {"spec_decode_num_drafts": 2, "spec_decode_accepted_tokens": 6, "spec_decode_acceptance_length": 4.0}
    assert all_figures([one], 16)[0].tokens_per_step == 10 / 4


def test_parts_of_answers_are_the_same_for_all_cells():
    cells = [cell("vanilla", [Answer(list(range(n)), [1] * n)], is_speculative=False) for n in (20, 60)]
    short, long = (all_figures([each], 64)[0].by_position for each in cells)
    assert list(short) == [0, 8, 16] and list(long) == list(range(0, 64, 8))


def test_speeds_of_two_machines_are_not_divided():
    answers = [Answer([1, 2], [1, 1])]
    vanilla, tree = cell("vanilla", answers, is_speculative=False), cell("tree", answers)
    tree.environment = {"device": "y"}
    figures = all_figures([vanilla, tree], 16)
    assert (figures[1].speedup, figures[1].identical, figures[1].compared) == (None, 1, 1)
    text = Report({"target": "t"}, [{"device": "x"}, {"device": "y"}], [], figures, None).as_markdown()
    assert re.search(r"\| w \| tree .*\| 1 of 1 \| 2 \|\n", text) and "- Measured on (2): device y\n" in text


@pytest.mark.parametrize(
    ("temperature", "config", "compared"),
    [
        (0.0, {"method": "eagle3", "model": "HEAD"}, 1),
        (1.0, {"method": "eagle3", "model": "HEAD"}, None),
        (1.0, {"model": "D", "gamma": 4}, 1),
        (1.0, {"method": "magicdec"}, 1),
    ],
)
def test_vllms_own_methods_draw_other_tokens(temperature, config, compared):
    cells = [cell(name, [Answer([1, 2], [1, 1])], is_speculative=name != "vanilla") for name in ("vanilla", "x")]
    for each in cells:
        each.key = each.key._replace(temperature=temperature)
    cells[1].speculative_config = config
    assert all_figures(cells, 16)[1].compared == compared


def test_the_number_of_gpus_is_recorded(monkeypatch):
    answer = SimpleNamespace(stdout="NVIDIA H100, 1.0\nNVIDIA H100, 1.0\nNVIDIA L4, 1.0\n")
    monkeypatch.setattr(machine.subprocess, "run", lambda *arguments, **keywords: answer)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = machine.environment()
    assert (found["device"], found["GPUs"], found["driver"]) == ("NVIDIA H100 + NVIDIA L4", "3", "1.0")
    for visible, device, number in [
        ("2", "NVIDIA L4", "1"),
        ("0,1", "NVIDIA H100", "2"),
        ("GPU-a", "NVIDIA H100", "1"),
    ]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        found = machine.environment()
        assert (found["device"], found["GPUs"]) == (device, number)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert machine.environment()["GPUs"] == "0"


def test_only_the_same_prompts_are_compared():
    answers = [Answer([1, 2], [1, 1])]
    _, tree = all_figures([cell("vanilla", answers, is_speculative=False), cell("tree", answers, prompts="other")], 16)
    assert (tree.speedup, tree.identical, tree.compared) == (None, None, None)


class Page(HTMLParser):
    """What a page names, and its text."""

    def __init__(self, text):
        super().__init__()
        self.outside, self.text, self.open = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)
        for name, value in attributes:
            if name in ("href", "src", "xlink:href", "srcset", "data", "action") and not re.match("#|data:", value):
                self.outside.append(value)
        if tag in ("script", "iframe", "object", "img"):
            self.outside.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if "url(" in data or "@import" in data:
            self.outside.append(data)


def test_the_page_holds_all_and_asks_for_nothing(tmp_path):
    answers = [Answer([1, 2, 3, 4], [1, 3], drafted=[4], accepted=[2])]
    cells = [cell("vanilla", [Answer([1, 2, 3, 4], [1] * 4)], 3.0, "<b>&.jsonl", is_speculative=False)]
    cells += [cell("tree", answers, 1.0, "<b>&.jsonl")]
    figures = all_figures(cells, 16)
    before = [{**asdict(each), "user_tokens_per_second": 1.5, "environment": {"device": "<old>"}} for each in figures]
    settings = {"target": "a/<target>", "engine": {"seed": 1}}
    baseline = Baseline("old", {**settings, "engine": {}}, before)
    report = Report(settings, [{"device": "GPU"}], ["2 prompts"], figures, baseline)
    report.write(tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert page.outside == [] and page.open == []
    text = " ".join(page.text)
    for words in ("a/<target>", "<b>&.jsonl", "3.00x", "1 of 1", "4: 100%", "Compared with old", "2.00x", "2 prompts"):
        assert words in text, words
    assert 'engine: {"seed": 1}, before {}' in text and "device: x, before <old>" in text
    # The plot is in the page, as text that can be searched.
    assert "speed-up over vanilla" in text and "tokens per step by position" in text
    table = (tmp_path / "report.md").read_text()
    assert "| <b>&.jsonl | tree | 1 | 3.00x | 3.00 | 3.0 |" in table
    assert json.loads((tmp_path / "report.json").read_text())["figures"][1]["speedup"] == 3.0


def test_the_page_about_it_names_its_options_and_no_others():
    page = (ROOT / "docs" / "benchmarking.md").read_text()
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    options = {option for option in parser._option_string_actions if option.startswith("--")} - {"--help"}
    said = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", page))
    assert options - said == set()
    # Of vLLM's own.
    assert said - options == {"--per-request-spec-decode-metrics", "--speculative-config", "--api-key"}
    for name in (*WORKLOADS, *METHODS):
        assert f"`{name}`" in page
    for workload in WORKLOADS.values():
        assert f"`{workload.repository}`" in page and workload.revision[:7] in page
        assert f"`{workload.local_file}`" in page
