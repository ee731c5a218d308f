# SPDX-License-Identifier: Apache-2.0
"""An engine whose steps the test makes, in a process of its own: requests come while others run, some of them
are refused or aborted, and what was said and counted comes back as JSON.

A scene is a dictionary. All of its entries may be left out:

- "running": {name: request}, there from the first step on;
- "arriving": {name: request}, one in every step from the third on, so that every state of the others is met;
- "logprobs_mode", "structured_outputs_backend": what an engine is started with, changed before the scene;
- "reasoning_end": a token that ends reasoning; what comes before it knows no grammar;
- "beams": {name: {"prompt": token ids, "search": keyword arguments of BeamSearchParams}}, searched in the end.

A request is {"prompt": token ids, "sampling": keyword arguments of SamplingParams}, with "priority" and "abort_after"
(so many tokens) if need be.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tests.engine import running, sampling_of
from tests.process import run_alone


def play(scenes: Sequence[Mapping[str, Any]], **settings: Any) -> dict[str, Any]:
    """Plays the scenes one after the other with one engine.

    Returns "scenes", each with "errors" (by name, of requests that were refused), "requests" (by name, of all others),
    "beams" and "backend" (of structured outputs); "counted", vLLM's metrics at the end; "log", the lines that a user
    sees.
    """
    result, printed = run_alone(_play, scenes, settings)
    return result | {"log": printed.splitlines()}


class Play:
    """A scene that is played."""

    def __init__(self, llm: Any, scene: Mapping[str, Any]):
        self.engine = llm.llm_engine
        self.scene = scene
        self.num_steps = 0
        self.errors: dict[str, str] = {}
        self.requests: dict[str, dict[str, Any]] = {}

    def run(self) -> None:
        for name, request in self.scene.get("running", {}).items():
            self._add(name, request)
        self._step()
        self._step()
        for name, request in self.scene.get("arriving", {}).items():
            self._add(name, request)
            self._step()
        while self.engine.has_unfinished_requests():
            self._step()
        # The steps in flight come back, and with them the blocks.
        self._step()
        for request in self.requests.values():
            request["outputs"] = [output for _, output in sorted(request["outputs"].items())]

    def _add(self, name: str, request: dict[str, Any]) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = sampling_of(request["sampling"])
        if "output_kind" in sampling:
            sampling["output_kind"] = RequestOutputKind[sampling["output_kind"]]
        try:
            self.engine.add_request(
                name,
                {"prompt_token_ids": request["prompt"]},
                SamplingParams(**sampling),
                priority=request.get("priority", 0),
            )
        except Exception as error:
            self.errors[name] = f"{type(error).__name__}: {error}"
        else:
            self.requests[name] = {"outputs": {}, "prompt_logprobs": None, "first_step": None, "finished": False}

    def _step(self) -> None:
        self.num_steps += 1
        for output in self.engine.step():
            name, request = output.request_id, self.requests[output.request_id]
            for completion in output.outputs:
                self._note(request["outputs"].setdefault(completion.index, _no_output()), name, completion)
            request["finished"] = output.finished
            if output.prompt_logprobs:
                # The first token of a prompt has none.
                request["prompt_logprobs"] = _logprobs(output.prompt_logprobs[1:])
            if request["first_step"] is None and any(each["tokens"] for each in request["outputs"].values()):
                request["first_step"] = self.num_steps
            limit = self._given(name).get("abort_after")
            if limit is not None and not output.finished and len(request["outputs"][0]["tokens"]) >= limit:
                self.engine.abort_request([name])

    def _note(self, noted: dict[str, Any], name: str, completion: Any) -> None:
        piece = {"tokens": list(completion.token_ids), "text": completion.text}
        if completion.logprobs is not None:
            piece["logprobs"] = _logprobs(completion.logprobs)
        if self._given(name)["sampling"].get("output_kind") == "DELTA":
            noted["pieces"] += 1
            for column, values in piece.items():
                noted[column] = values if noted[column] is None else noted[column] + values
        else:
            noted |= piece
        noted["reason"] = completion.finish_reason
        if completion.spec_decode_metrics is not None:
            noted["metrics"] = completion.spec_decode_metrics.to_dict()

    def _given(self, name: str) -> dict[str, Any]:
        return (self.scene.get("running", {}) | self.scene.get("arriving", {}))[name]


def _no_output() -> dict[str, Any]:
    return {"tokens": [], "text": "", "logprobs": None, "reason": None, "metrics": None, "pieces": 0}


def _logprobs(positions: Any) -> list[dict[str, float]]:
    return [{str(token): value.logprob for token, value in position.items()} for position in positions]


def _set(llm: Any, scene: Mapping[str, Any]) -> None:
    """Changes what vLLM takes from its configuration at start-up, which saves a start for each value."""
    if mode := scene.get("logprobs_mode"):

        def set_mode(worker: Any) -> None:
            runner = worker.model_runner
            for reader in (runner.sampler, runner.prompt_logprobs_worker):
                assert hasattr(reader, "logprobs_mode")
                reader.logprobs_mode = mode

        llm.collective_rpc(set_mode)
    manager = llm.llm_engine.engine_core.engine_core.structured_output_manager
    if backend := scene.get("structured_outputs_backend"):
        llm.llm_engine.vllm_config.structured_outputs_config.backend = backend
        # Made when a request first needs them.
        assert hasattr(manager, "backend") and hasattr(manager, "_grammar_bitmask")
        manager.backend = manager._grammar_bitmask = None
        # From vLLM 0.33 on a manager refuses requests that need another.
        manager.backend_name = None
    if token := scene.get("reasoning_end"):
        assert hasattr(manager, "reasoner_cls")
        manager.reasoner_cls = _reasoning_parser(token)


def _reasoning_parser(end: str) -> type:
    from vllm.reasoning.basic_parsers import BaseThinkingReasoningParser

    class Parser(BaseThinkingReasoningParser):
        start_token = "<|endoftext|>"
        end_token = end

    return Parser


def _search(llm: Any, prompt: list[int], search: dict[str, Any]) -> list[dict[str, Any]]:
    from vllm.sampling_params import BeamSearchParams

    (found,) = llm.beam_search([{"prompt_token_ids": prompt}], BeamSearchParams(**search))
    return [{"tokens": beam.tokens, "logprob": beam.cum_logprob} for beam in found.sequences]


def _play(scenes: Sequence[Mapping[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    with running(settings) as llm:
        played = [_play_scene(llm, scene) for scene in scenes]
        llm.llm_engine.do_log_stats()
        counted = {
            metric.name: getattr(metric, "value", None) if hasattr(metric, "value") else getattr(metric, "values", None)
            for metric in llm.llm_engine.get_metrics()
        }
    return {"scenes": played, "counted": counted}


def _play_scene(llm: Any, scene: Mapping[str, Any]) -> dict[str, Any]:
    _set(llm, scene)
    play = Play(llm, scene)
    play.run()
    beams = {name: _search(llm, each["prompt"], each["search"]) for name, each in scene.get("beams", {}).items()}
    backend = type(llm.llm_engine.engine_core.engine_core.structured_output_manager.backend).__name__
    return {"errors": play.errors, "requests": play.requests, "beams": beams, "backend": backend}
