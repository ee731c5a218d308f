# SPDX-License-Identifier: Apache-2.0
"""What is measured side by side: ways to decode, each with what `vllm serve` is told.

`vanilla` decodes without speculation. `seq`, `tree` and `magicdec` are this plugin's. Peers are vLLM's own methods:
`eagle3=HEAD`, `draft=MODEL`, `ngram`, `suffix`. Any other speculative configuration can be given a name.
"""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VANILLA = "vanilla"
METHODS = (VANILLA, "seq", "tree", "magicdec")
PEERS = ("eagle3=HEAD", "draft=MODEL", "ngram", "suffix")
DEFAULT_GAMMA = 4
# As many as the examples of vLLM's documentation take.
PEER_TOKENS = 5


@dataclass(frozen=True)
class Method:
    name: str
    # What vLLM is told; None for plain decoding, and for a server whose configuration is not known.
    speculative_config: dict[str, Any] | None
    # Variables that the server must have, whatever this process has.
    environment: Mapping[str, str] = field(default_factory=dict)

    def arguments(self) -> list[str]:
        """Of `vllm serve`."""
        if self.speculative_config is None:
            return []
        # A request's metrics have every step of it, which is what the report is made of.
        steps = ["--per-request-spec-decode-metrics", "detailed"]
        return ["--speculative-config", json.dumps(self.speculative_config), *steps]


def read_methods(
    names: Sequence[str],
    peers: Sequence[str],
    others: Sequence[str],
    draft: str | None,
    gamma: int = DEFAULT_GAMMA,
    peer_tokens: int = PEER_TOKENS,
) -> list[Method]:
    """The methods that the command line names, vanilla first.

    Args:
        names: of `METHODS`.
        peers: of `PEERS`, with what they need.
        others: NAME=JSON, where JSON is a speculative configuration of vLLM's.
        draft: a GLIDE draft.
        gamma: tokens that `seq` drafts.
        peer_tokens: tokens that a peer drafts; `suffix` decides itself.

    Raises:
        ValueError: there is no such method, it lacks something, or two have one name.
    """
    methods = [_method(name, draft, gamma) for name in names]
    methods += [_peer(peer, peer_tokens) for peer in peers]
    methods += [_other(text) for text in others]
    seen: set[str] = set()
    for method in methods:
        if method.name in seen:
            raise ValueError(f"method {method.name} is given twice: leave one out, or give it another name")
        seen.add(method.name)
    if not methods:
        raise ValueError("--methods names none: give some of " + ", ".join(METHODS))
    # What others are compared with comes first, so that an interrupted run has it.
    return sorted(methods, key=lambda method: method.name != VANILLA)


def _method(name: str, draft: str | None, gamma: int) -> Method:
    if name == VANILLA:
        return Method(name, None)
    if name == "magicdec":
        return Method(name, {"method": "magicdec"})
    if name not in METHODS:
        peers = ", ".join(PEERS)
        raise ValueError(f"--methods {name}: there is {', '.join(METHODS)}; --peers has vLLM's own: {peers}")
    if draft is None:
        raise ValueError(f"--methods {name} needs a GLIDE draft: give --draft, or leave {name} out")
    _check_draft(draft)
    if name == "seq":
        return Method(name, {"model": draft, "gamma": gamma})
    return Method(name, {"model": draft})


def _peer(text: str, num_tokens: int) -> Method:
    name, _, model = text.partition("=")
    tokens = {"num_speculative_tokens": num_tokens}
    if name in ("eagle3", "draft"):
        if not model:
            what = "head" if name == "eagle3" else "model"
            raise ValueError(f"--peers {name} needs its {what}: give {name}={what.upper()}")
        _check_folder("--peers", text, model)
        return Method(name, {"method": "eagle3" if name == "eagle3" else "draft_model", "model": model, **tokens})
    if name not in ("ngram", "suffix"):
        raise ValueError(f"--peers {name}: there is {', '.join(PEERS)}; --method NAME=JSON names any other")
    if model:
        raise ValueError(f"--peers {text}: {name} needs no model; give {name}")
    if name == "ngram":
        # On the GPU: vLLM schedules the other one synchronously.
        return Method(name, {"method": "ngram_gpu", **tokens})
    if importlib.util.find_spec("arctic_inference") is None:
        raise ValueError("--peers suffix needs Arctic Inference: pip install arctic-inference, or leave suffix out")
    # Without the answers of earlier requests: they are those of the same prompts, of warm-ups and other temperatures.
    config = {"method": "suffix", "suffix_decoding_max_cached_requests": 0}
    # vLLM has it for its older model runner only.
    return Method(name, config, {"VLLM_USE_V2_MODEL_RUNNER": "0"})


def _other(text: str) -> Method:
    name, _, value = text.partition("=")
    try:
        config = json.loads(value)
    except ValueError as error:
        raise ValueError(f"--method {text}: what follows NAME= is not JSON ({error})") from error
    if not name or not isinstance(config, dict):
        raise ValueError(f"--method {text}: give NAME=JSON, where JSON is an object that --speculative-config takes")
    if name == VANILLA:
        raise ValueError(f"--method {VANILLA} is decoding without speculation: give another name")
    check_name("--method", name)
    return Method(name, config)


def _check_draft(draft: str) -> None:
    """Raises ValueError for a folder that is not there or has no GLIDE draft."""
    _check_folder("--draft", draft, draft)
    if not Path(draft).is_dir():
        return
    # Imported here: it imports vLLM, which takes seconds.
    from vllm_longspec.proposers.glide.checkpoint import NoGlideDraftError, read_draft

    try:
        read_draft(draft, expected=True)
    except NoGlideDraftError as error:
        raise ValueError(
            f"--draft takes a GLIDE draft, and {error}: give one, or --peers draft={draft} for a model of another kind"
        ) from None


def _check_folder(option: str, text: str, model: str) -> None:
    """Raises ValueError for the path of a model that is not there: its server starts when others have been measured.

    What may be the name of a repository is left to the server.
    """
    is_path = model.startswith((".", "/", "~")) or model.count("/") > 1
    if is_path and not Path(model).exists():
        raise ValueError(f"{option} {text}: there is no {model}; give a folder, or a name on the Hugging Face hub")


def check_name(option: str, name: str) -> None:
    """Raises ValueError for a method's name that cannot be part of a file's."""
    if not all(character.isalnum() or character in "-_.@" for character in name):
        raise ValueError(f"{option} {name}: a name has letters, digits and - _ . @ only")


def draws_as_vanilla(config: Mapping[str, Any] | None) -> bool:
    """Whether tokens at a temperature above 0 are those of decoding without speculation, with the same seed.

    vLLM's own methods draw by rejection sampling, which has the same distribution but not the same tokens.

    Args:
        config: a method's speculative configuration.
    """
    return config is None or config.get("method") in (None, "glide", "magicdec")
