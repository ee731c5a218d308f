# SPDX-License-Identifier: Apache-2.0
"""An engine whose steps the test makes, started as a program of its own: requests come while others run, some of them
are refused, and what was said and counted comes back as JSON.

Reads {"settings": ..., "running": [request], "arriving": {name: request}} from its standard input; a request is
{"prompt": token ids, "sampling": keyword arguments of SamplingParams}. Writes its result to the file that it is given.
"""

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    import torch
    from vllm import LLM, SamplingParams

    from tests.engine import CPU_SETTINGS, SETTINGS

    specification = json.load(sys.stdin)
    defaults = SETTINGS if torch.cuda.is_available() else SETTINGS | CPU_SETTINGS
    engine = LLM(**(defaults | specification["settings"])).llm_engine
    errors: dict[str, str] = {}
    finished: dict[str, dict[str, Any]] = {}

    def add(name: str, request: dict[str, Any]) -> None:
        try:
            params = SamplingParams(detokenize=False, **request["sampling"])
            engine.add_request(name, {"prompt_token_ids": request["prompt"]}, params)
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"

    def step() -> None:
        for output in engine.step():
            if output.finished:
                completion = output.outputs[0]
                metrics = getattr(completion, "spec_decode_metrics", None)
                finished[output.request_id] = {
                    "tokens": list(completion.token_ids),
                    "reason": completion.finish_reason,
                    "metrics": metrics.to_dict() if metrics is not None else None,
                }

    for number, request in enumerate(specification["running"]):
        add(f"running {number}", request)
    # One arrives in every step from the third on, so that every state of the others is met.
    step()
    step()
    for name, request in specification["arriving"].items():
        add(name, request)
        step()
    while engine.has_unfinished_requests():
        step()
    # The steps in flight come back, and with them the blocks.
    step()
    engine.do_log_stats()
    counted = {
        metric.name: getattr(metric, "value", None) if hasattr(metric, "value") else getattr(metric, "values", None)
        for metric in engine.get_metrics()
    }
    result = {"errors": errors, "finished": finished, "counted": counted}
    Path(sys.argv[1]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
