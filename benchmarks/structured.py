# SPDX-License-Identifier: Apache-2.0
"""Tokens per step of requests with a JSON schema, and of the same texts without it, in engines with a trained pair:

    python -m benchmarks.structured [--options '{}' '{"gamma": 4}'] [--sampling '{"temperature": 0}' ...]

The prompts are those of the pair's prompts.jsonl; each request has one of two schemas, and no white space between
JSON's tokens. Plain decoding answers them first, and every set of options must give the same tokens. Then the requests
come again without their schemas, and the target is made to draw the tokens of before at every position: what is
accepted of the same text by trees that no grammar has touched. On a CPU the engine runs in Triton's interpreter, as the
README says.
"""

import argparse
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks import PAIR
from benchmarks.acceptance import Engine, read_prompts
from benchmarks.reporting import environment, markdown

SAMPLINGS: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 1.0}]
# The default tree, and a chain.
OPTIONS: list[dict[str, Any]] = [{}, {"gamma": 4}]
# A key of vLLM's `extra_args`.
REPLAYED = "replayed_token_ids"

# Models that were trained on source code alone would indent for ever.
GRAMMARS = {"backend": "xgrammar", "disable_any_whitespace": True}
TEXT = {"type": "string", "maxLength": 24}
NUMBER = {"type": "integer", "minimum": 0, "maximum": 999}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


SCHEMAS = (
    _object(
        name=TEXT,
        age=NUMBER,
        tags={"type": "array", "items": TEXT, "minItems": 1, "maxItems": 3},
        address=_object(street=TEXT, city=TEXT),
    ),
    {
        "type": "array",
        "items": _object(call={"enum": ["open", "read", "write", "close"]}, path=TEXT, line=NUMBER),
        "minItems": 2,
        "maxItems": 4,
    },
)


def replay() -> None:
    """Makes vLLM's sampler draw what a request gives as `extra_args[REPLAYED]`, whatever the target's logits are."""
    from vllm.v1.worker.gpu.sample.sampler import Sampler

    add_request, sample = Sampler.add_request, Sampler.sample
    texts: dict[int, list[int]] = {}

    def keep_text(self: Any, req_idx: int, sampling_params: Any) -> None:
        add_request(self, req_idx, sampling_params)
        texts[req_idx] = (sampling_params.extra_args or {}).get(REPLAYED, [])

    def draw_text(
        self: Any,
        logits: Any,
        expanded_idx_mapping: Any,
        idx_mapping: Any,
        idx_mapping_np: Any,
        pos: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        sampled, processed = sample(
            self, logits, expanded_idx_mapping, idx_mapping, idx_mapping_np, pos, *args, **kwargs
        )
        prompt_lens = self.req_states.prompt_len.gpu[expanded_idx_mapping]
        places = (pos + 1 - prompt_lens).tolist()
        for row, (slot, place) in enumerate(zip(expanded_idx_mapping.tolist(), places, strict=True)):
            if 0 <= place < len(texts.get(slot, ())):
                sampled[row] = texts[slot][place]
        return sampled, processed

    Sampler.add_request, Sampler.sample = keep_text, draw_text  # type: ignore[method-assign]


def with_schemas(num_requests: int) -> list[dict[str, Any]]:
    from vllm.sampling_params import StructuredOutputsParams

    return [
        {"structured_outputs": StructuredOutputsParams(json=SCHEMAS[index % len(SCHEMAS)])}
        for index in range(num_requests)
    ]


def main() -> None:
    arguments = parse_arguments()
    prompts = [ids[: arguments.prompt_tokens] for ids in read_prompts(arguments.pair, arguments.prompts, [])]
    prompts = prompts[: arguments.prompts]
    limits = [arguments.tokens] * len(prompts)
    arguments.engine = {"structured_outputs_config": GRAMMARS, **arguments.engine}
    replay()
    plain: list[list[list[int]]] = []
    records: list[dict[str, Any]] = []
    num_different = 0
    for options in [None, *arguments.options]:
        engine = Engine(arguments.pair, options, arguments)
        for index, sampling in enumerate(arguments.sampling):
            tokens, with_schema = engine.generate(prompts, sampling, limits, with_schemas(len(prompts)))
            if options is None:
                plain.append(tokens)
                continue
            texts = [{"extra_args": {REPLAYED: each}} for each in tokens]
            replayed, without = engine.generate(prompts, sampling, limits, texts)
            if replayed != tokens:
                raise AssertionError("the texts of the second run are not those of the first")
            different = sum(one != other for one, other in zip(tokens, plain[index], strict=True))
            num_different += different
            records.append(
                {
                    "options": options,
                    "sampling": sampling,
                    "tokens_per_step": with_schema,
                    "tokens_per_step_without_schema": without,
                    "requests_that_differ": different,
                    "tokens": sum(map(len, tokens)),
                }
            )
            print(json.dumps(records[-1]), flush=True)
        del engine
        gc.collect()
    print(markdown([list(records[0]), *([str(value) for value in record.values()] for record in records)]))
    result: dict[str, Any] = {
        "pair": arguments.pair.name,
        "prompts": len(prompts),
        "prompt_tokens": arguments.prompt_tokens,
        "dtype": arguments.dtype,
        "environment": environment(arguments.commit),
        "records": records,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    if num_different and arguments.dtype == "float32":
        sys.exit(f"{num_different} requests differ from plain decoding")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pair", type=Path, default=PAIR, help="folder with target/, draft/ and prompts.jsonl")
    add("--options", type=json.loads, nargs="+", default=OPTIONS, help="speculative options, JSON, one set or more")
    add("--sampling", type=json.loads, nargs="+", default=SAMPLINGS, help="sampling parameters, JSON, one set or more")
    add("--prompts", type=int, default=16)
    add("--prompt-tokens", type=int, default=2048, help="to which prompts are cut")
    add("--tokens", type=int, default=128, help="generated tokens at most")
    add("--batch", type=int, default=16)
    add("--dtype", default="float32")
    add("--engine", type=json.loads, default={}, help="further arguments of the engine, JSON")
    add("--commit", help="the plugin's, where there is no git to ask")
    add("--out", type=Path, help="a file for the figures, as JSON")
    arguments = parser.parse_args()
    # Several engines in one process, one after the other, whose sampler is replaced here.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    return arguments


if __name__ == "__main__":
    main()
