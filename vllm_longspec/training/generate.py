# SPDX-License-Identifier: Apache-2.0
"""`vllm-longspec generate`: the target's own answers, which are what a draft should learn to predict.

    vllm-longspec generate --target T --prompts P.jsonl --out data/

Prompts are JSON objects, one a line, with one of

    {"messages": [{"role": "user", "content": "..."}, ...]}     rendered by the target's chat template
    {"prompt": "..."}                                           text, tokenised as it is; also as "text"
    {"input_ids": [...]}                                        token ids

A conversation that ends with an answer is answered anew. What comes out are shards that `vllm-longspec train` reads:

    {"id": "17.0", "input_ids": [...], "loss_mask": [0, ..., 1], "finish_reason": "stop"}

The id is the number of the prompt, counted from 0 over all files, and of the answer to it. A shard is written when
its last answer is there, under another name until it is complete. `--resume` reads which answers there are and goes on
with the others: each has a seed of its own, so a run that was stopped gives what one that was not gives.
"""

import argparse
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from vllm_longspec.proposers.glide.convert import read_target
from vllm_longspec.version import __version__

MANIFEST = "manifest.json"
DEFAULT_MAX_TOKENS = 4096
DEFAULT_SHARD_SIZE = 256
# Added to the name of a file that is being written.
_UNFINISHED = ".unfinished"
_KINDS = ("messages", "prompt", "input_ids")
# Another name of `prompt`, as data sets of plain texts have it. Beside a key of `_KINDS` it is ignored as any other.
_TEXT = "text"
# Lines that are named of each kind of prompt that is left out.
_NAMED_LINES = 20
# Requests that the engine has at a time, for each that it runs: enough that it never waits for another.
_REQUESTS_AHEAD = 2


@dataclass(frozen=True)
class Settings:
    """What decides the answers. A run is only resumed with the same."""

    target: str
    revision: str | None
    prompts: dict[str, str]  # path -> SHA-256
    samples: int
    max_tokens: int
    temperature: float | None  # None: the target's generation_config.json, or 1
    top_p: float | None
    top_k: int | None
    seed: int
    chat_template_kwargs: dict[str, Any]
    max_model_len: int | None


class Prompt(NamedTuple):
    number: int  # among those of all files, from 0
    place: str  # file and line
    kind: str  # one of `_KINDS`
    content: Any
    tools: list[Any] | None


@dataclass
class Counts:
    """What has become of the prompts."""

    answers: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    finish_reasons: Counter[str] = field(default_factory=Counter)
    # What is left out -> where, and how many in all.
    left_out: dict[str, list[str]] = field(default_factory=dict)
    num_left_out: Counter[str] = field(default_factory=Counter)
    answered_anew: int = 0

    def leave_out(self, reason: str, place: str) -> None:
        self.num_left_out[reason] += 1
        named = self.left_out.setdefault(reason, [])
        if len(named) < _NAMED_LINES:
            named.append(place)

    def describe(self) -> Iterator[str]:
        yield f"{self.answers} answers of {self.answer_tokens} tokens to {self.prompt_tokens} tokens of prompts"
        if self.answered_anew:
            yield f"{self.answered_anew} conversations ended with an answer, which the target's own has replaced"
        for reason, number in self.num_left_out.items():
            places = ", ".join(self.left_out[reason]) + (", ..." if number > len(self.left_out[reason]) else "")
            yield f"{number} prompts left out, {reason}: {places}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", required=True, help="the model that answers: a folder or repository")
    parser.add_argument("--revision", help="of its repository")
    parser.add_argument(
        "--prompts", type=Path, nargs="+", action="extend", required=True, metavar="FILE", help="JSON lines"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the shards go")
    parser.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="answers to each prompt (1)")
    parser.add_argument(
        "--max-tokens", type=int, default=DEFAULT_MAX_TOKENS, metavar="N", help=f"of an answer ({DEFAULT_MAX_TOKENS})"
    )
    own = "the target's own, from its generation_config.json"
    parser.add_argument("--temperature", type=float, metavar="T", help=f"{own}, or 1")
    parser.add_argument("--top-p", type=float, metavar="P", help=own)
    parser.add_argument("--top-k", type=int, metavar="K", help=own)
    parser.add_argument("--seed", type=int, default=0, help="of the answers, each of which gets one of its own (0)")
    parser.add_argument(
        "--chat-template-kwargs",
        type=json_object,
        default={},
        metavar="JSON",
        help='such as {"enable_thinking": false}',
    )
    parser.add_argument("--text", action="store_true", help="write the answers' text beside their tokens")
    parser.add_argument(
        "--shard-size",
        type=int,
        default=DEFAULT_SHARD_SIZE,
        metavar="N",
        help=f"answers in a file ({DEFAULT_SHARD_SIZE})",
    )
    parser.add_argument("--draft", metavar="DRAFT", help="generate faster with this draft; answers stay what they are")
    parser.add_argument(
        "--engine",
        type=json_object,
        default={},
        metavar="JSON",
        help='engine arguments of vLLM, such as {"tensor_parallel_size": 2}',
    )


def run(arguments: argparse.Namespace) -> None:
    for name, least in (("samples", 1), ("max_tokens", 1), ("shard_size", 1)):
        if (value := getattr(arguments, name)) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be {least} or more, got {value}")
    for path in arguments.prompts:
        if arguments.prompts.count(path) > 1:
            raise ValueError(f"--prompts has {path} twice: leave one out, --samples 2 gives two answers to each prompt")
    engine = engine_arguments(arguments)
    _check_sampling(arguments)
    # Answers of a target that has no drafts would be of no use; `train` would refuse it only when all are there.
    read_target(arguments.target, arguments.revision)
    vocab_size = _vocab_size(arguments.target, arguments.revision)
    prompt_files = {str(path): check_prompts(path, vocab_size) for path in arguments.prompts}
    kinds = set().union(*(prompts.kinds for prompts in prompt_files.values()))
    if "messages" in kinds:
        _check_chat_template(arguments.target, arguments.revision)
    if (total := sum(prompts.number for prompts in prompt_files.values())) == 0:
        raise ValueError("--prompts has no prompts: give a file with at least one line")
    settings = Settings(
        arguments.target,
        arguments.revision,
        {path: prompts.digest for path, prompts in prompt_files.items()},
        arguments.samples,
        arguments.max_tokens,
        arguments.temperature,
        arguments.top_p,
        arguments.top_k,
        arguments.seed,
        arguments.chat_template_kwargs,
        engine.get("max_model_len"),
    )
    done = open_folder(arguments.out, settings, arguments.resume)
    if len(done) == total * arguments.samples:
        print(f"{arguments.out}: all of {len(done)} answers are there")
        return
    generator = Generator(arguments, settings, engine, needs_tokenizer=arguments.text or kinds != {"input_ids"})
    generator.run(read_prompts(arguments.prompts), total, done)


def _given_sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    values = {name: getattr(arguments, name) for name in ("temperature", "top_p", "top_k")}
    return {name: value for name, value in values.items() if value is not None}


def json_object(text: str) -> dict[str, Any]:
    """The type of an argument whose value is a JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def engine_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of vLLM's `LLM`, as far as the command line says.

    Raises:
        ValueError: one is unknown, or has an option of its own.
    """
    check_engine_arguments(
        "--engine", arguments.engine, {"model": "--target", "revision": "--revision", "seed": "--seed"}
    )
    engine = {"model": arguments.target, "revision": arguments.revision, **arguments.engine}
    if arguments.draft is not None:
        if engine.get("speculative_config") is not None:
            raise ValueError("--draft and the speculative_config of --engine are mutually exclusive: leave one out")
        engine["speculative_config"] = {"model": arguments.draft}
    return engine


def check_engine_arguments(option: str, given: Iterable[str], own: Mapping[str, str]) -> None:
    """Raises ValueError for a name that is no engine argument of vLLM's, or has an option of its own, as `own` says."""
    from vllm.engine.arg_utils import EngineArgs

    known = {field.name for field in fields(EngineArgs)}
    for name in given:
        if name in own:
            raise ValueError(f"{option} has {name!r}: give {own[name]} instead")
        if name not in known:
            raise ValueError(f"{option} has {name!r}, which is no engine argument of vLLM's: leave it out")


def _check_sampling(arguments: argparse.Namespace) -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    for name, value in _given_sampling(arguments).items():
        try:
            SamplingParams(**{name: value})
        except (ValueError, VLLMValidationError) as error:
            raise ValueError(f"--{name.replace('_', '-')} {value}: {error}") from error


def _vocab_size(target: str, revision: str | None) -> int:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(target, revision=revision)
    return config.get_text_config().vocab_size


def _check_chat_template(target: str, revision: str | None) -> None:
    from transformers import AutoTokenizer

    if AutoTokenizer.from_pretrained(target, revision=revision).chat_template is None:
        raise ValueError(
            f"--prompts has messages, but target {target} has no chat template: give prompt or input_ids instead"
        )


class PromptFile(NamedTuple):
    number: int  # of prompts
    digest: str  # SHA-256
    kinds: frozenset[str]  # of `_KINDS`


def check_prompts(path: Path, vocab_size: int) -> PromptFile:
    """Reads all lines.

    Raises:
        ValueError: a line is not a prompt; with its number.
    """
    number = 0
    kinds: set[str] = set()
    digest = hashlib.sha256()
    with path.open("rb") as lines:
        for line_number, line in enumerate(lines, start=1):
            digest.update(line)
            if not line.strip():
                continue
            try:
                kind, content, _ = parse_prompt(line)
            except ValueError as error:
                raise ValueError(f"{path} line {line_number}: {error}") from error
            if kind == "input_ids" and max(content) >= vocab_size:
                raise ValueError(
                    f"{path} line {line_number}: token id {max(content)} is not in the target's vocabulary of "
                    f"{vocab_size}"
                )
            number += 1
            kinds.add(kind)
    return PromptFile(number, digest.hexdigest(), frozenset(kinds))


def read_prompts(paths: Iterable[Path]) -> Iterator[Prompt]:
    """All prompts of files that `check_prompts` has seen."""
    number = 0
    for path in paths:
        with path.open("rb") as lines:
            for line_number, line in enumerate(lines, start=1):
                if line.strip():
                    yield Prompt(number, f"{path} line {line_number}", *parse_prompt(line))
                    number += 1


def parse_prompt(line: bytes) -> tuple[str, Any, list[Any] | None]:
    """Kind, content and tools of a prompt. Raises ValueError for any other line."""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"not a JSON object, but {type(value).__name__}")
    keys = [key for key in _KINDS if key in value] or [key for key in (_TEXT,) if key in value]
    if len(keys) != 1:
        raise ValueError(f"has {' and '.join(keys) or 'none'} of {', '.join((*_KINDS, _TEXT))}: give one of them")
    [key] = keys
    kind, content, tools = "prompt" if key == _TEXT else key, value[key], value.get("tools")
    if kind == "messages":
        _check_messages(content)
    elif kind == "prompt":
        if not isinstance(content, str) or not content:
            raise ValueError(f"{key} must be a text that is not empty")
    elif not isinstance(content, list) or not content or not all(map(_is_token_id, content)):
        raise ValueError("input_ids must be a list of token ids that is not empty")
    if tools is not None and (kind != "messages" or not isinstance(tools, list)):
        raise ValueError("tools must be a list, beside messages")
    return kind, content, tools


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list that is not empty")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"a message must be an object with a role, got {json.dumps(message)[:80]}")
        content = message.get("content")
        if not isinstance(content, str | None) or not (content or "tool_calls" in message):
            raise ValueError(f"the content of a message of {message['role']} must be a text")
    if all(message["role"] in ("assistant", "system") for message in messages):
        raise ValueError("messages must have one to answer, besides those of system and assistant")


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def to_answer(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages without an answer at their end."""
    end = len(messages)
    while messages[end - 1]["role"] == "assistant":
        end -= 1
    return messages[:end]


def open_folder(folder: Path, settings: Settings, resume: bool) -> set[str]:
    """Makes the folder of a run, or finds one; returns the ids of the answers in it.

    Raises:
        ValueError: there is a run that is not to be resumed, or one with other settings.
    """
    manifest = folder / MANIFEST
    shards = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
    if not manifest.exists():
        if shards:
            raise ValueError(f"--out {folder} has {shards[0].name}, which is not of a run: give another folder")
        folder.mkdir(parents=True, exist_ok=True)
        return set()
    found = read_settings(manifest)
    if not resume:
        raise ValueError(f"--out {folder} has a run: go on with it by --resume, or give another folder")
    # As they are read back.
    wanted = json.loads(json.dumps(asdict(settings)))
    for name, value in wanted.items():
        # Answers are told by the numbers of their prompts, which follow from the order of the files.
        is_same = found.get(name) == value and (name != "prompts" or list(found[name]) == list(value))
        if not is_same:
            raise ValueError(
                f"--resume with {name} {json.dumps(value)}, but the run in {folder} has {json.dumps(found.get(name))}: "
                "give the same, or another folder"
            )
    done: set[str] = set()
    for unfinished in folder.glob(f"*{_UNFINISHED}"):
        unfinished.unlink()
    for shard in shards:
        with shard.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    done.add(json.loads(line)["id"])
                except (ValueError, KeyError, TypeError):
                    raise ValueError(
                        f"{shard} line {number} is no answer of a run: move the file away, and --resume generates its "
                        "answers anew"
                    ) from None
    return done


def read_settings(manifest: Path) -> dict[str, Any]:
    """The settings of a run, of its manifest. Raises ValueError for any other file."""
    try:
        return dict(json.loads(manifest.read_text())["settings"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{manifest} is not of a run: give another folder") from None


def write_atomically(path: Path, text: str) -> None:
    unfinished = path.with_name(f"{path.name}{_UNFINISHED}")
    try:
        with unfinished.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(path)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ValueError(f"{path} cannot be written ({error.strerror}): make room, and give --resume") from None
        raise


def seed_of(seed: int, answer: str) -> int:
    """The seed of an answer, which does not depend on which others are generated with it."""
    return int.from_bytes(hashlib.sha256(f"{seed} {answer}".encode()).digest()[:7])


class Request(NamedTuple):
    """An answer to be."""

    name: str
    prompt_ids: list[int]
    max_tokens: int


class Generator:
    """Runs an engine over prompts and writes shards.

    Args:
        engine: arguments of vLLM's `LLM`.
        needs_tokenizer: whether there is text.
    """

    def __init__(
        self, arguments: argparse.Namespace, settings: Settings, engine: Mapping[str, Any], needs_tokenizer: bool
    ):
        from vllm import LLM

        self.arguments = arguments
        self.settings = settings
        self.counts = Counts()
        skip = {} if needs_tokenizer else {"skip_tokenizer_init": True}
        try:
            self.llm = LLM(**{"disable_log_stats": True, **skip, **engine})
        except RuntimeError as error:
            # What an engine in a process of its own fails with, it has printed.
            raise ValueError(
                f"the engine does not start ({error}): give --engine what vllm serve needs for {arguments.target}"
            ) from error
        self.engine = self.llm.llm_engine
        self.tokenizer = self.llm.get_tokenizer() if needs_tokenizer else None
        self.max_model_len = self.llm.model_config.max_model_len
        self.sampling = self._sampling_params()
        self.finished: list[dict[str, Any]] = []  # of the shard that is not complete
        shards = sorted(arguments.out.glob("answers-*.jsonl"))
        self.next_shard = 1 + int(shards[-1].stem.removeprefix("answers-")) if shards else 0

    def _sampling_params(self) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        own = self.llm.model_config.get_diff_sampling_param()
        params = SamplingParams.from_optional(**{**own, **_given_sampling(self.arguments)})
        if self.tokenizer is None:
            # vLLM asks the tokenizer what ends an answer.
            config = self.llm.model_config
            for ends in (config.hf_text_config.eos_token_id, config.try_get_generation_config().get("eos_token_id")):
                ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
                params.stop_token_ids = [*(params.stop_token_ids or ()), *ends]
        params.detokenize = self.arguments.text
        params.output_kind = RequestOutputKind.FINAL_ONLY
        return params

    def run(self, prompts: Iterable[Prompt], total: int, done: set[str]) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            self._write_manifest(finished=False)
            try:
                self._generate(self._requests(prompts, done), total * self.settings.samples - len(done))
            except EngineDeadError as error:
                raise ValueError(
                    f"the engine has stopped, see what it printed above ({error}): finished answers are kept, give "
                    "--resume to go on"
                ) from error
            finally:
                self._write_shard()
            self._write_manifest(finished=True)
        except KeyboardInterrupt:
            raise ValueError(f"stopped; finished answers are in {self.arguments.out}: go on with --resume") from None
        finally:
            self.engine.engine_core.shutdown()
        for line in self.counts.describe():
            print(line)

    def _requests(self, prompts: Iterable[Prompt], done: set[str]) -> Iterator[Request | None]:
        """What is to be generated; None for what is left out."""
        for prompt in prompts:
            names = [f"{prompt.number}.{sample}" for sample in range(self.settings.samples)]
            missing = [name for name in names if name not in done]
            if not missing:
                continue
            try:
                ids = self._token_ids(prompt)
            except Exception as error:  # templates raise errors of their own
                place = f"{prompt.place} ({' '.join(str(error).split())})"
                self.counts.leave_out("refused by the chat template", place)
                yield from [None] * len(missing)
                continue
            room = self.max_model_len - len(ids)
            if room < 1:
                self.counts.leave_out(f"too long for the window of {self.max_model_len} tokens", prompt.place)
                yield from [None] * len(missing)
                continue
            for name in missing:
                yield Request(name, ids, min(room, self.settings.max_tokens))

    def _token_ids(self, prompt: Prompt) -> list[int]:
        if prompt.kind == "input_ids":
            return prompt.content
        # Its methods are typed for more than is asked of them here.
        tokenizer: Any = self.tokenizer
        if prompt.kind == "prompt":
            return tokenizer.encode(prompt.content)
        messages = to_answer(prompt.content)
        self.counts.answered_anew += len(messages) < len(prompt.content)
        return tokenizer.apply_chat_template(
            messages,
            tools=prompt.tools,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            **self.settings.chat_template_kwargs,
        )

    def _generate(self, requests: Iterator[Request | None], total: int) -> None:
        from tqdm import tqdm
        from vllm import RequestOutput

        running: dict[str, Request] = {}
        most = _REQUESTS_AHEAD * self.llm.llm_engine.vllm_config.scheduler_config.max_num_seqs
        started = time.monotonic()
        with tqdm(total=total, unit="answer", dynamic_ncols=True) as progress:
            exhausted = False
            while not exhausted or running:
                while not exhausted and len(running) < most:
                    request = next(requests, _END)
                    if request is _END:
                        exhausted = True
                    elif request is None:
                        progress.update()
                    else:
                        running[request.name] = request
                        self._submit(request)
                if not running:
                    continue
                for output in self.engine.step():
                    if isinstance(output, RequestOutput) and output.finished:
                        self._finish(running.pop(output.request_id), output.outputs[0])
                        progress.set_postfix_str(
                            f"{self.counts.answer_tokens / (time.monotonic() - started):.0f} tokens/s", refresh=False
                        )
                        progress.update()

    def _submit(self, request: Request) -> None:
        params = self.sampling.clone()
        params.max_tokens = request.max_tokens
        params.seed = seed_of(self.settings.seed, request.name)
        (prompt,) = self.engine.renderer.render_cmpl([{"prompt_token_ids": request.prompt_ids}])
        self.engine.add_request(request.name, prompt, params)

    def _finish(self, request: Request, completion: Any) -> None:
        answer = list(completion.token_ids)
        record = {
            "id": request.name,
            "input_ids": request.prompt_ids + answer,
            "loss_mask": [0] * len(request.prompt_ids) + [1] * len(answer),
            "finish_reason": completion.finish_reason,
        }
        if self.arguments.text:
            record["answer"] = completion.text
        self.counts.answers += 1
        self.counts.prompt_tokens += len(request.prompt_ids)
        self.counts.answer_tokens += len(answer)
        self.counts.finish_reasons[completion.finish_reason] += 1
        self.finished.append(record)
        if len(self.finished) == self.arguments.shard_size:
            self._write_shard()

    def _write_shard(self) -> None:
        if not self.finished:
            return
        lines = (json.dumps(record, separators=(",", ":")) + "\n" for record in self.finished)
        write_atomically(self.arguments.out / f"answers-{self.next_shard:06d}.jsonl", "".join(lines))
        self.next_shard += 1
        self.finished.clear()

    def _write_manifest(self, finished: bool) -> None:
        from vllm import __version__ as vllm_version

        sampling = self.sampling
        manifest = {
            "finished": finished,
            "settings": asdict(self.settings),
            # As resolved.
            "sampling": {name: getattr(sampling, name) for name in _SAMPLING_NAMES},
            "max_model_len": self.max_model_len,
            "target_commit": getattr(self.llm.model_config.hf_config, "_commit_hash", None),
            "draft": self.arguments.draft,
            "engine": self.arguments.engine,
            "versions": {"vllm": vllm_version, "vllm_longspec": __version__},
            # Of this run; one that was resumed has others before it.
            "counts": vars(self.counts),
        }
        write_atomically(self.arguments.out / MANIFEST, json.dumps(manifest, indent=2) + "\n")


_END: Any = object()
_SAMPLING_NAMES = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
