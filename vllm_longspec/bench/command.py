# SPDX-License-Identifier: Apache-2.0
"""`vllm-longspec bench`: methods side by side on real prompts.

    vllm-longspec bench --target T --draft D --workload govreport,aime24 --methods vanilla,seq,tree --out results/
    vllm-longspec bench ... --workload my-prompts.jsonl
    vllm-longspec bench --url http://HOST:PORT --methods NAME ...

Each method gets a server of its own, one after the other, and all workloads at all temperatures are sent to it. What is
measured is written at once; `--resume` goes on with a run that was stopped.
"""

import argparse
import functools
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

from vllm_longspec.bench.cells import Key, Store, cell_of
from vllm_longspec.bench.client import Load, measure
from vllm_longspec.bench.environment import environment
from vllm_longspec.bench.figures import all_figures
from vllm_longspec.bench.methods import DEFAULT_GAMMA, METHODS, PEER_TOKENS, PEERS, Method, check_name, read_methods
from vllm_longspec.bench.plots import check_matplotlib
from vllm_longspec.bench.prompts import Chosen, Renderer, choose, choose_own
from vllm_longspec.bench.report import Report, read_baseline
from vllm_longspec.bench.server import Server, ServerError, exit_on_signals, run_server
from vllm_longspec.bench.workloads import WORKLOADS
from vllm_longspec.training.generate import check_engine_arguments, json_object
from vllm_longspec.version import __version__

DEFAULT_OUTPUT_LEN = 1024
DEFAULT_WARMUPS = 2
# At once, also into a pipe: progress bars go another way.
say = functools.partial(print, flush=True)
# Of large targets.
_START_TIMEOUT = 3600.0
_PACKAGES = ("torch", "triton", "vllm", "transformers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    model = parser.add_argument_group("what is measured")
    model.add_argument("--target", metavar="T", help="the model: a folder or repository; with --url the server's own")
    model.add_argument("--draft", metavar="D", help="a GLIDE draft, for seq and tree")
    model.add_argument(
        "--methods",
        type=_names,
        action="extend",
        metavar="NAME,...",
        help=f"of {', '.join(METHODS)}; without it vanilla and tree, or magicdec if there is no --draft. "
        "With --url any name",
    )
    model.add_argument(
        "--peers", type=_names, action="extend", default=[], metavar="NAME,...", help=f"of {', '.join(PEERS)}"
    )
    model.add_argument(
        "--method",
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="any other method, as --speculative-config takes it; may be repeated",
    )
    model.add_argument(
        "--gamma", type=int, default=DEFAULT_GAMMA, metavar="N", help=f"that seq drafts ({DEFAULT_GAMMA})"
    )
    model.add_argument(
        "--peer-tokens", type=int, default=PEER_TOKENS, metavar="N", help=f"that a peer drafts ({PEER_TOKENS})"
    )
    model.add_argument(
        "--url", metavar="URL", help="measure a server that runs, http://HOST:PORT, instead of starting any"
    )

    prompts = parser.add_argument_group("prompts")
    prompts.add_argument(
        "--workload",
        type=_names,
        action="extend",
        required=True,
        metavar="NAME,...",
        help=f"of {', '.join(WORKLOADS)}, or files of prompts: JSON lines with messages, prompt (or text) or input_ids",
    )
    prompts.add_argument(
        "--workload-data", type=Path, metavar="FOLDER", help="read workloads from here, not from the hub"
    )
    prompts.add_argument("--max-prompts", type=int, metavar="N", help="of each workload; without it all")
    prompts.add_argument("--chat-template", type=Path, metavar="FILE", help="instead of the tokenizer's own")
    prompts.add_argument("--no-chat-template", action="store_true", help="texts as they are, for base models")

    load = parser.add_argument_group("load")
    load.add_argument(
        "--output-len", type=int, default=DEFAULT_OUTPUT_LEN, metavar="N", help=f"new tokens ({DEFAULT_OUTPUT_LEN})"
    )
    load.add_argument("--ignore-eos", action="store_true", help="always as many new tokens")
    load.add_argument("--temperatures", type=_temperatures, default=[0.0], metavar="T,...", help="such as 0,1 (0)")
    load.add_argument("--seed", type=int, default=0, help="of the prompts' order and of sampling (0)")
    come = load.add_mutually_exclusive_group()
    come.add_argument("--batch", type=int, metavar="N", help="requests at a time (1)")
    come.add_argument("--request-rate", type=float, metavar="R", help="requests a second, at random times")
    load.add_argument(
        "--warmups",
        type=int,
        default=DEFAULT_WARMUPS,
        metavar="N",
        help=f"requests before anything is timed, of each workload ({DEFAULT_WARMUPS})",
    )

    engine = parser.add_argument_group("servers")
    engine.add_argument(
        "--max-model-len", type=int, metavar="N", help="window of prompt and answer; without it the target's"
    )
    engine.add_argument(
        "--engine",
        type=json_object,
        default={},
        metavar="JSON",
        help='engine arguments of vLLM, such as {"tensor_parallel_size": 2}',
    )

    add("--out", type=Path, required=True, metavar="FOLDER", help="where results and the report go")
    add("--resume", action="store_true", help="go on with a run that was stopped, or add methods and workloads to it")
    add("--baseline", type=Path, metavar="FOLDER", help="another run's --out, to compare with")


def _names(text: str) -> list[str]:
    return [name for name in (part.strip() for part in text.split(",")) if name]


def _temperatures(text: str) -> list[float]:
    try:
        values = [float(name) for name in _names(text)]
    except ValueError:
        values = []
    if not values or not all(0 <= value < float("inf") for value in values) or len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of different temperatures, such as 0,1")
    return values


@dataclass(frozen=True)
class Target:
    """The model that answers."""

    name: str  # a folder or repository, for its tokenizer
    served_name: str
    max_model_len: int


def run(arguments: argparse.Namespace) -> None:
    _check(arguments)
    methods = _methods(arguments)
    baseline = read_baseline(arguments.baseline) if arguments.baseline is not None else None
    target = _running_target(arguments) if arguments.url is not None else _target(arguments)
    tokenizer, chosen = _prompts(arguments, target)
    settings = _settings(arguments, target)
    if baseline is not None:
        baseline.check(settings)
    store = Store(arguments.out, settings, arguments.resume)
    for each in chosen.values():
        say(each.describe())
    bench = Bench(arguments, methods, target, tokenizer, chosen, store)
    exit_on_signals()
    try:
        bench.run()
    except KeyboardInterrupt:
        raise ValueError(f"stopped; what was measured is in {arguments.out}: go on with --resume") from None
    finally:
        cells = store.all([method.name for method in methods], list(chosen))
        if cells:
            environments = list({json.dumps(cell.environment): cell.environment for cell in cells}.values())
            lines = list(dict.fromkeys(cell.description for cell in cells))
            report = Report(settings, environments, lines, all_figures(cells, arguments.output_len), baseline)
            files = report.write(arguments.out)
            say(f"\n{report.summary()}\n{files[-1]} has all of it; beside it are the same figures as JSON and Markdown")


def _check(arguments: argparse.Namespace) -> None:
    """Raises ValueError for what can be seen without a model."""
    for name, least in (("max_prompts", 1), ("output_len", 2), ("batch", 1), ("gamma", 1), ("peer_tokens", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be {least} or more, got {value}")
    if arguments.warmups < 0:
        raise ValueError(f"--warmups must not be negative, got {arguments.warmups}")
    if arguments.request_rate is not None and not arguments.request_rate > 0:
        raise ValueError(
            f"--request-rate must be more than 0, got {arguments.request_rate:g}: leave it out for --batch"
        )
    if arguments.chat_template is not None and arguments.no_chat_template:
        raise ValueError("--chat-template and --no-chat-template are mutually exclusive: leave one out")
    if not arguments.workload:
        raise ValueError(f"--workload names none: give some of {', '.join(WORKLOADS)}, or files")
    keys = [_workload_key(name) for name in arguments.workload]
    for name, key in zip(arguments.workload, keys, strict=True):
        if keys.count(key) > 1:
            raise ValueError(f"--workload has {key} twice: leave one out, or rename the file")
        if name not in WORKLOADS and not Path(name).is_file():
            raise ValueError(
                f"--workload {name}: there is neither such a file nor such a workload; there is {', '.join(WORKLOADS)}"
            )
    if arguments.url is None:
        if arguments.target is None:
            raise ValueError("give --target, or --url of a server that runs")
    else:
        for name in ("draft", "engine", "peers", "method", "max_model_len"):
            if getattr(arguments, name):
                option = f"--{name.replace('_', '-')}"
                raise ValueError(f"{option} is of servers that this command starts: leave it out with --url")
        if len(arguments.methods or ()) != 1:
            raise ValueError("--url measures one server: give its method a name by --methods NAME")
    check_matplotlib()


def _workload_key(name: str) -> str:
    return name if name in WORKLOADS else Path(name).name


def _methods(arguments: argparse.Namespace) -> list[Method]:
    if arguments.url is not None:
        [name] = arguments.methods
        check_name("--methods", name)
        return [Method(name, None)]
    names = arguments.methods
    if names is None:
        names = ["vanilla", "tree" if arguments.draft is not None else "magicdec"]
    return read_methods(
        names, arguments.peers, arguments.method, arguments.draft, arguments.gamma, arguments.peer_tokens
    )


# Engine arguments with an option of their own, or that are not the user's to set here.
_OWN = {
    "model": "--target",
    "max_model_len": "--max-model-len",
    "speculative_config": "--methods or --method",
    "seed": "--seed",
    "served_model_name": "nothing: it is the target's",
    "per_request_spec_decode_metrics": "nothing: it is set",
}


def engine_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of vLLM's engine for every server.

    Raises:
        ValueError: one is unknown, or has an option of its own.
    """
    check_engine_arguments("--engine", arguments.engine, _OWN)
    # Each prompt is computed anew, also where it came before at another temperature: a cached one has no time to the
    # first token.
    return {"max_model_len": arguments.max_model_len, "enable_prefix_caching": False, **arguments.engine}


def flags(engine: dict[str, Any]) -> Iterator[str]:
    """Engine arguments as options of `vllm serve`."""
    for name, value in engine.items():
        option = name.replace("_", "-")
        if value is True:
            yield f"--{option}"
        elif value is False:
            yield f"--no-{option}"
        elif isinstance(value, list):
            yield from (f"--{option}", *(json.dumps(each) if isinstance(each, dict) else str(each) for each in value))
        elif value is not None:
            yield from (f"--{option}", json.dumps(value) if isinstance(value, dict) else str(value))


def _target(arguments: argparse.Namespace) -> Target:
    from vllm.engine.arg_utils import EngineArgs

    engine = engine_arguments(arguments)
    try:
        config = EngineArgs(model=arguments.target, **engine).create_model_config()
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"--target {arguments.target} is no model that vLLM reads: give a folder with one, or its name on the "
            f"Hugging Face hub ({reason})"
        ) from error
    return Target(arguments.target, arguments.target, config.max_model_len)


def _running_target(arguments: argparse.Namespace) -> Target:
    """Of a server that runs.

    Raises:
        ServerError: it does not answer, or is not vLLM.
    """
    if not arguments.url.startswith(("http://", "https://")):
        raise ServerError(f"--url {arguments.url} is no address of a server: give http://HOST:PORT")
    models = f"{arguments.url.rstrip('/')}/v1/models"
    request = Request(models)
    # As vLLM's request function does.
    if key := os.environ.get("OPENAI_API_KEY"):
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    try:
        # Proxies are not for servers that are named by address.
        with build_opener(ProxyHandler({})).open(request, timeout=30) as response:
            model = json.load(response)["data"][0]
            served_name, root, length = model["id"], model.get("root"), int(model["max_model_len"])
    except HTTPError as error:
        way_out = "set OPENAI_API_KEY to its --api-key" if error.code == 401 else "is it vLLM's?"
        raise ServerError(f"--url {arguments.url}: {models} answers {error.code} {error.reason}: {way_out}") from error
    except (URLError, OSError) as error:
        raise ServerError(f"--url {arguments.url} does not answer ({error}): is the server running?") from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ServerError(f"--url {arguments.url}: {models} does not answer as vLLM does") from error
    return Target(arguments.target or root or served_name, served_name, length)


def _prompts(arguments: argparse.Namespace, target: Target) -> tuple[Any, dict[str, Chosen]]:
    """The tokenizer, and the prompts of each workload by its key."""
    from transformers import AutoConfig, AutoTokenizer

    room = target.max_model_len - arguments.output_len
    if room < 1:
        raise ValueError(
            f"--output-len {arguments.output_len} leaves no room for a prompt in a window of {target.max_model_len}: "
            "give a smaller one"
        )
    engine = arguments.engine
    trust = {"trust_remote_code": engine.get("trust_remote_code", False), "revision": engine.get("revision")}
    tokenizer: Any = AutoTokenizer.from_pretrained(engine.get("tokenizer") or target.name, **trust)
    template = arguments.chat_template.read_text() if arguments.chat_template is not None else None
    # A workload of the user's may do without a template, the others may not.
    as_they_are = arguments.no_chat_template or not set(arguments.workload) & WORKLOADS.keys()
    renderer = Renderer(tokenizer, target.name, room, template, as_they_are)
    chosen = {}
    for name in arguments.workload:
        if name in WORKLOADS:
            each = choose(WORKLOADS[name], arguments.workload_data, renderer, arguments.max_prompts, arguments.seed)
        else:
            size = AutoConfig.from_pretrained(target.name, **trust).get_text_config().vocab_size
            each = choose_own(Path(name), renderer, size, arguments.max_prompts, arguments.seed)
        chosen[_workload_key(name)] = each
    return tokenizer, chosen


def _settings(arguments: argparse.Namespace, target: Target) -> dict[str, Any]:
    """What all cells of a run share. What prompts consist of is in the cells."""
    return {
        "target": target.name,
        "version": __version__,
        "url": arguments.url,
        "max_model_len": target.max_model_len,
        "output_len": arguments.output_len,
        "ignore_eos": arguments.ignore_eos,
        "batch": None if arguments.request_rate is not None else arguments.batch or 1,
        "request_rate": arguments.request_rate,
        "warmups": arguments.warmups,
        "seed": arguments.seed,
        "max_prompts": arguments.max_prompts,
        "engine": arguments.engine,
    }


class Bench:
    """Measures what a run lacks.

    Args:
        chosen: prompts by the workload's key.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        methods: Sequence[Method],
        target: Target,
        tokenizer: Any,
        chosen: dict[str, Chosen],
        store: Store,
    ):
        self.arguments = arguments
        self.methods = methods
        self.target = target
        self.tokenizer = tokenizer
        self.chosen = chosen
        self.store = store
        url = arguments.url
        # Of a server that runs, neither its machine nor its versions are known.
        self.environment = environment(_PACKAGES) if url is None else {"server": url}
        self.environment["vllm-longspec"] = __version__
        self.done = {
            key
            for method in methods
            for key in self._keys(method)
            if store.has(key, method, chosen[key.workload].prompts)
        }
        self._seconds: list[float] = []  # of what was measured

    def _keys(self, method: Method) -> list[Key]:
        return [
            Key(method.name, workload, temperature)
            for temperature in self.arguments.temperatures
            for workload in self.chosen
        ]

    def _num_missing(self) -> int:
        return sum(key not in self.done for method in self.methods for key in self._keys(method))

    def run(self) -> None:
        """Measures, one method after the other.

        Raises:
            ServerError: a server failed. What was measured until then is kept.
        """
        if self.done:
            say(f"{len(self.done)} measurements are there, {self._num_missing()} are missing")
        for method in self.methods:
            missing = [key for key in self._keys(method) if key not in self.done]
            if not missing:
                continue
            if self.arguments.url is not None:
                self._measure(method, missing, self.arguments.url.rstrip("/"), None)
                continue
            engine = engine_arguments(self.arguments) | {"seed": self.arguments.seed}
            log = self.arguments.out / "logs" / f"{method.name}.log"
            say(f"\n{method.name}: starting a server; its log is {log}")
            with run_server(
                [self.target.name, *flags(engine), *method.arguments()],
                {**os.environ, **method.environment},
                log,
                timeout=_START_TIMEOUT,
                on_ready=lambda seconds: say(f"  ready after {seconds:.0f} s"),
            ) as server:
                self._measure(method, missing, server.url, server)

    def _measure(self, method: Method, keys: Sequence[Key], url: str, server: Server | None) -> None:
        for key in keys:
            say(f"{method.name} on {key.workload} at temperature {key.temperature:g}{self._time_left()}")
            prompts = self.chosen[key.workload].prompts
            load = Load(
                output_len=self.arguments.output_len,
                temperature=key.temperature,
                seed=self.arguments.seed,
                batch=None if self.arguments.request_rate is not None else self.arguments.batch or 1,
                rate=self.arguments.request_rate,
                warmups=self.arguments.warmups,
                ignore_eos=self.arguments.ignore_eos,
            )
            start = time.monotonic()
            try:
                result, answers = measure(url, self.target.served_name, self.tokenizer, prompts, load)
            except ServerError as error:
                if server is None or server.process.poll() is None:
                    raise ServerError(f"{method.name} on {key.workload}: {error}.") from error
                raise ServerError(f"{method.name} on {key.workload}: vllm serve exited while it answered.") from error
            self._seconds.append(time.monotonic() - start)
            cell = cell_of(key, method, self.environment, self.chosen[key.workload], result, answers)
            self.store.add(cell)
            self.done.add(key)

    def _time_left(self) -> str:
        if not self._seconds:
            return f"; {self._num_missing()} measurements to go"
        minutes = self._num_missing() * sum(self._seconds) / len(self._seconds) / 60
        return f"; {self._num_missing()} measurements to go, about {max(1, round(minutes))} min"
