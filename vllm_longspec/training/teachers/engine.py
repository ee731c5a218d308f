# SPDX-License-Identifier: Apache-2.0
"""The process of a `VllmTeacher`'s engine: prefills the samples that it is sent, and captures what they ask for.

    python -m vllm_longspec.training.teachers.engine DESCRIPTOR

The descriptor is of one end of a pipe of Python's `multiprocessing`. First it gets the settings, and answers with the
sizes of the target; then samples, and answers with the name of each that has ended. It ends when it is told to, and
when nobody is at the other end any more.
"""

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import fields
from multiprocessing.connection import Connection
from typing import Any

from vllm_longspec.proposers.capture.spool import CaptureRequest
from vllm_longspec.training.teachers.vllm import TargetSizes

# What the teacher gives itself.
_OWN_ARGUMENTS = ("model", "revision", "speculative_config", "enable_prefix_caching", "skip_tokenizer_init")
_OWN_PREFIX = "spec_"


def engine_arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of vLLM's `EngineArgs`; may set VLLM_ALLOW_LONG_MAX_MODEL_LEN.

    Raises:
        ValueError: one that the user gives is unknown, or the teacher's own.
    """
    from vllm.engine.arg_utils import EngineArgs

    given = settings["engine"]
    known = {field.name for field in fields(EngineArgs)}
    for name in given:
        if name in _OWN_ARGUMENTS or name.startswith(_OWN_PREFIX):
            raise ValueError(f"{name} is not an option of a teacher's engine, which sets it itself: leave it out")
        if name not in known:
            raise ValueError(f"{name!r} is no engine argument of vLLM's: leave it out")
    arguments = {
        "model": settings["target"],
        "revision": settings["revision"],
        # Parts of prompts are a few sizes at most, too long for vLLM's graphs; requests never decode.
        "compilation_config": {"cudagraph_mode": "NONE"},
        "generation_config": "vllm",
        "disable_log_stats": True,
        **given,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "speculative_config": {
            "method": "capture",
            "spool": settings["spool"],
            "copy_length": 0,
            "couple_noise": False,
            "adaptive_verification": False,
        },
    }
    max_length = settings["max_length"]
    if (max_model_len := given.get("max_model_len")) is not None:
        if max_length is not None and max_model_len <= max_length:
            raise ValueError(
                f"max_model_len is {max_model_len}, but samples may have {max_length} tokens, and a request one more: "
                "leave it out"
            )
        return arguments
    # Checks that the target has such a window, and says what it is if none is asked for.
    plain = EngineArgs(**{**arguments, "speculative_config": None, "max_model_len": max_length})
    max_length = plain.create_model_config().max_model_len
    # A request must have room for a token after its prompt, which the target never computes here. So a sample may take
    # all of the window.
    os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    arguments["max_model_len"] = max_length + 1
    return arguments


def serve(connection: Connection, settings: Mapping[str, Any]) -> None:
    from vllm import EngineArgs, LLMEngine, SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.usage.usage_lib import UsageContext

    # Not `LLM`, which wants a tokenizer to warm up.
    engine = LLMEngine.from_engine_args(EngineArgs(**engine_arguments(settings)), usage_context=UsageContext.LLM_CLASS)
    model_config = engine.model_config
    try:
        connection.send(
            (
                "ready",
                (
                    model_config.max_model_len - 1,
                    TargetSizes(
                        model_config.get_total_num_kv_heads(),
                        model_config.get_head_size(),
                        model_config.get_hidden_size(),
                        model_config.dtype,
                    ),
                ),
            )
        )
        names: dict[str, str] = {}  # request id -> name, of requests that run
        while True:
            while connection.poll(0 if names else None):
                kind, *message = connection.recv()
                if kind == "close":
                    return
                if kind == "abort":
                    engine.abort_request(list(names))
                    names.clear()
                    continue
                name, input_ids, rows = message
                params = SamplingParams(
                    temperature=0.0,
                    max_tokens=1,
                    detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                    extra_args=CaptureRequest(name, len(input_ids), rows).to_extra_args(),
                )
                (prompt,) = engine.renderer.render_cmpl([{"prompt_token_ids": input_ids.tolist()}])
                engine.add_request(name, prompt, params)
                names[name] = name
            for output in engine.step():
                if output.finished and names.pop(output.request_id, None) is not None:
                    connection.send(("ended", output.request_id))
    finally:
        engine.engine_core.shutdown()


def main() -> int:
    connection = Connection(int(sys.argv[1]))
    settings: dict[str, Any] = {}
    try:
        settings = connection.recv()
        serve(connection, settings)
    except (EOFError, ConnectionError):
        # The trainer is gone, and nobody else removes what it has not read.
        if settings:
            shutil.rmtree(settings["spool"], ignore_errors=True)
        return 1
    except Exception as error:
        kind = "refused" if isinstance(error, ValueError) else "failed"
        connection.send((kind, " ".join(str(error).split())))
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
