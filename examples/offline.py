# SPDX-License-Identifier: Apache-2.0
"""Offline generation with a LongSpec GLIDE draft: the text, and how many tokens a step of the target yields.

    .venv/bin/python -m examples.offline [--prompt TEXT] [--temperature T] [--max-tokens N] [options of vLLM's engine]

Without options it is the small pair that ships with the repository; another one is given as vLLM takes it:

    .venv/bin/python -m examples.offline --model TARGET --speculative-model DRAFT --speculative-tree-shape 4 16 16

Without a GPU, Triton's interpreter runs the kernels in float32:

    TRITON_INTERPRET=1 OPENBLAS_NUM_THREADS=1 .venv/bin/python -m examples.offline \\
        --dtype float32 --enforce-eager --block-size 32 --kv-cache-memory-bytes 67108864
"""

import argparse

from vllm import LLM, EngineArgs, SamplingParams
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser

TARGET = "benchmarks/pair/target"
DRAFT = "benchmarks/pair/draft"
PROMPT = "class TestReader(unittest.TestCase):\n    def setUp(self):\n"


def main() -> None:
    parser = FlexibleArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default=PROMPT)
    # Greedy, a model this small repeats itself, which is easy to draft.
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--max-tokens", type=int, default=64)
    # Here only because it adds options to the command line; an engine loads plugins itself.
    load_general_plugins()
    EngineArgs.add_cli_args(parser)
    parser.set_defaults(model=TARGET)
    args = parser.parse_args()
    given = args.speculative_config or {}
    if not (args.spec_model or args.spec_method or given.keys() & {"model", "method"}):
        args.spec_model = DRAFT

    # A GLIDE draft is recognised from its checkpoint; the plugin needs no import.
    llm = LLM.from_engine_args(EngineArgs.from_cli_args(args))
    sampling = SamplingParams(temperature=args.temperature, seed=0, max_tokens=args.max_tokens)
    outputs = llm.generate(args.prompt, sampling)
    print(args.prompt + outputs[0].outputs[0].text)

    counters = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    drafts = counters["vllm:spec_decode_num_drafts"]
    accepted = counters["vllm:spec_decode_num_accepted_tokens"]
    # The first token comes with the prompt's step.
    length = 1 + accepted / drafts if drafts else 1
    print(f"\nAcceptance length: {length:.2f} tokens a step ({drafts} trees, {accepted} accepted tokens)")


if __name__ == "__main__":
    main()
