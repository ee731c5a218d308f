# SPDX-License-Identifier: Apache-2.0
"""A reasoning parser of vLLM's with a token that the shipped pair has."""

from vllm.reasoning import ReasoningParserManager
from vllm.reasoning.deepseek_r1_reasoning_parser import DeepSeekR1ReasoningParser


@ReasoningParserManager.register_module("semicolon")  # type: ignore[arg-type]
class SemicolonReasoningParser(DeepSeekR1ReasoningParser):
    start_token = "<|endoftext|>"
    end_token = ";"
