# SPDX-License-Identifier: Apache-2.0
"""Tool calls and reasoning over HTTP: with a draft vLLM's parsers make of the text what they make of it without."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.server import DRAFT, EXACT, TARGET, Server, serve
from benchmarks.soak import COMMAND
from tests import dashboard

TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
OPTIONS = [
    *EXACT,
    *("--max-model-len", "512", "--max-num-seqs", "8", "--max-num-batched-tokens", "512"),
    *("--chat-template", TEMPLATE),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    *("--reasoning-parser", "semicolon", "--reasoning-parser-plugin", "tests/e2e/reasoning_parser.py"),
    *("--structured-outputs-config.backend", "xgrammar"),
    *("--structured-outputs-config.disable_any_whitespace", "true"),
]
PARAMETERS = {
    "type": "object",
    "properties": {"to": {"enum": ["left", "right"]}, "by": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["to", "by"],
    "additionalProperties": False,
}
# vLLM holds a strict tool's arguments to its schema.
STRICT, LOOSE = (
    {
        "tools": [{"type": "function", "function": {"name": "move", "parameters": PARAMETERS, "strict": strict}}],
        "parallel_tool_calls": False,
    }
    for strict in (True, False)
)
# The shipped model knows no tools, so grammars make it call one; and it would reason for longer if its end were no
# likelier than it is.
CALL = r'<tool_call>\n\{"name": "move", "arguments": \{"to": "[a-z_]{3,9}", "by": [0-9]{1,2}\}\}\n</tool_call>'
REASONING_END, LIKELIER = 27, 8.0  # the token of ";"
REQUESTS: dict[str, dict[str, Any]] = {
    "named tool": {**STRICT, "tool_choice": {"type": "function", "function": {"name": "move"}}},
    "required tool": {**STRICT, "tool_choice": "required"},
    "tool in the text": {**LOOSE, "structured_outputs": {"regex": CALL}},
    "text": {"max_tokens": 40},
}


def ask(server: Server, body: dict[str, Any]) -> dict[str, Any]:
    with server.request("POST", "/v1/chat/completions", body) as response:
        answer = json.loads(response.read())
        assert response.status == 200, answer
    (choice,) = answer["choices"]
    return _noted(choice["finish_reason"], choice["message"])


def ask_for_stream(server: Server, body: dict[str, Any]) -> dict[str, Any]:
    whole: dict[str, Any] = {"content": "", "reasoning": "", "tool_calls": []}
    reason = None
    with server.request("POST", "/v1/chat/completions", body | {"stream": True}) as response:
        assert response.status == 200, response.read()
        for line in response:
            data = line.decode().removeprefix("data:").strip()
            if not data or data == "[DONE]":
                continue
            (choice,) = json.loads(data)["choices"]
            reason = choice["finish_reason"] or reason
            delta = choice["delta"]
            for part in ("content", "reasoning"):
                whole[part] += delta.get(part) or ""
            for call in delta.get("tool_calls") or []:
                calls = whole["tool_calls"]
                if call["index"] == len(calls):
                    calls.append({"function": {"name": "", "arguments": ""}})
                for part in ("name", "arguments"):
                    calls[call["index"]]["function"][part] += call["function"].get(part) or ""
    return _noted(reason, whole)


def _noted(reason: str | None, message: dict[str, Any]) -> dict[str, Any]:
    calls = [call["function"] for call in message.get("tool_calls") or []]
    return {
        "reason": reason,
        "content": message["content"] or "",
        "reasoning": message.get("reasoning") or "",
        "calls": [(call["name"], call["arguments"]) for call in calls],
    }


def answers(server: Server) -> dict[str, dict[str, Any]]:
    """What all requests get, whole and in a stream, by name; several at a time."""
    bodies = {
        name: {
            "model": TARGET,
            "messages": [{"role": "user", "content": "def move(self, to, by):"}],
            "temperature": 0.8,
            "seed": number,
            "logit_bias": {str(REASONING_END): LIKELIER},
            "max_tokens": 80,
            **request,
        }
        for number, (name, request) in enumerate(REQUESTS.items())
    }
    with ThreadPoolExecutor(4) as pool:
        whole = {name: pool.submit(ask, server, body) for name, body in bodies.items()}
        streams = {f"{name}, streamed": pool.submit(ask_for_stream, server, body) for name, body in bodies.items()}
        return {name: answer.result() for name, answer in (whole | streams).items()}


def test_tool_calls_and_reasoning():
    with serve("chat-plain", *OPTIONS, command=COMMAND) as server:
        plain = answers(server)
    with serve(
        "chat", *OPTIONS, "--speculative-model", DRAFT, "--speculative-tree-shape", "2", "4", command=COMMAND
    ) as server:
        drafted = answers(server)
        assert server.metric("vllm:spec_decode_num_accepted_tokens_total") > 0
        with server.request("GET", "/metrics") as response:
            assert dashboard.missing(response.read().decode()) == []
    assert drafted == plain
    for name in ("named tool", "required tool", "tool in the text"):
        ((called, arguments),) = drafted[name]["calls"]
        assert called == "move" and json.loads(arguments).keys() == {"to", "by"}
    # All of them reasoned before, which only a parser takes out of the text.
    assert all(answer["reasoning"] for answer in drafted.values())
    assert drafted["text"]["content"] and not drafted["text"]["calls"]
