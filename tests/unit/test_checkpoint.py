# SPDX-License-Identifier: Apache-2.0
import errno
import json
import logging
import os
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from tests.models import SIZES, glide_shapes
from vllm_longspec.proposers.glide import checkpoint
from vllm_longspec.proposers.glide.checkpoint import (
    DraftCheckpoint,
    NoGlideDraftError,
    UnseenDraftError,
    find_file,
    inspect_draft,
    read_draft,
)
from vllm_longspec.targets.families import FAMILIES

CONFIG = {**SIZES, "vocab_size": 64, "model_type": "llama", "architectures": ["LlamaGlideDecoderLayer"]}


def glide_weights(prefix=""):
    return {prefix + name: torch.zeros(shape) for name, shape in glide_shapes(CONFIG).items()}


def write(folder, weights, *, file_name="model.safetensors", **config):
    """A checkpoint; a setting of None is left out of config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    merged = {name: value for name, value in {**CONFIG, **config}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(merged))
    if file_name.endswith(".safetensors"):
        save_file(weights, folder / file_name)
    else:
        torch.save(weights, folder / file_name)
    return str(folder)


def inspected(*arguments: str) -> DraftCheckpoint:
    """A draft, as `inspect_draft` sees it."""
    found = inspect_draft(*arguments)
    assert found is not None
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_published_layout(tmp_path, family):
    model = write(tmp_path, glide_weights(), model_type=family, architectures=[FAMILIES[family]])
    found = inspected(model)
    assert (found.model, found.architecture, found.config["model_type"]) == (model, FAMILIES[family], family)


@pytest.mark.parametrize("architectures", [None, [], ["LlamaForCausalLM"], ["SomethingElse"]])
@pytest.mark.parametrize("file_name", ["model.safetensors", "draft.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("prefix", ["", "glide.", "model."])
def test_recognised_by_parameter_names(tmp_path, architectures, file_name, prefix):
    model = write(tmp_path, glide_weights(prefix), file_name=file_name, architectures=architectures)
    found = inspected(model)
    assert found.architecture == "LlamaGlideDecoderLayer"
    assert found.shapes == glide_shapes(CONFIG)


def test_recognised_across_shards(tmp_path):
    weights = glide_weights()
    halves = sorted(weights)[::2], sorted(weights)[1::2]
    for number, names in enumerate(halves, start=1):
        write(tmp_path, {name: weights[name] for name in names}, file_name=f"model-0000{number}-of-00002.safetensors")
    assert inspect_draft(str(tmp_path)) is not None


def test_recognised_by_architecture_without_weights(tmp_path):
    # `--load-format dummy` needs nothing but a config.
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert inspected(str(tmp_path)).architecture == "LlamaGlideDecoderLayer"


def test_biases_and_unused_projections_are_optional(tmp_path):
    weights = {
        name: weight
        for name, weight in glide_weights().items()
        if not name.endswith("bias") and name not in ("cross_attn.k_proj.weight", "cross_attn.v_proj.weight")
    }
    assert inspect_draft(write(tmp_path, weights)) is not None


@pytest.mark.parametrize("architectures", [None, ["LlamaForCausalLM"]])
def test_another_kind_of_draft_is_none_whatever_it_is_called(tmp_path, architectures):
    weights = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2), "lm_head.weight": torch.zeros(2, 2)}
    folder = tmp_path / "sail" / "longspec-glide-vicuna-7b"
    assert inspect_draft(write(folder, weights, architectures=architectures)) is None


@pytest.mark.parametrize(
    "model", ["ngram", "[ngram]", "package.module.Proposer", "s3://bucket/draft", "/no/such/draft"]
)
def test_what_is_no_checkpoint_is_none(model, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **kwargs: pytest.fail("asked the hub"))
    assert inspect_draft(model) is None


def test_broken_files_are_none(tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert inspect_draft(str(tmp_path)) is None
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "architectures": None}))
    (tmp_path / "model.safetensors").write_text("not a header")
    assert inspect_draft(str(tmp_path)) is None


@pytest.mark.parametrize("model_type", ["olmo2", None])
def test_unknown_family_is_refused(tmp_path, model_type):
    with pytest.raises(ValueError, match=rf"model_type {model_type!r}.*supported are llama, qwen2") as error:
        inspect_draft(write(tmp_path, glide_weights(), model_type=model_type))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("prefix", ["", "glide."])
@pytest.mark.parametrize("name", ["mlp.up_proj.weight", "post_cross_attention_layernorm.weight"])
def test_missing_parameter_is_refused(tmp_path, prefix, name):
    weights = glide_weights(prefix)
    del weights[prefix + name]
    with pytest.raises(ValueError, match=rf"lacks parameters: {prefix}{name};") as error:
        inspect_draft(write(tmp_path, weights, architectures=None))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["lm_head.weight", "self_attn.o_proj.bias", "glide.mlp.up_proj.weight"])
def test_unexpected_parameter_is_refused(tmp_path, name):
    weights = glide_weights() | {name: torch.zeros(1)}
    with pytest.raises(ValueError, match=rf"has unexpected parameters: {name};"):
        inspect_draft(write(tmp_path, weights))


def test_only_a_few_wrong_names_are_listed(tmp_path):
    weights = glide_weights() | {f"layers.{layer}.weight": torch.zeros(1) for layer in range(5)}
    with pytest.raises(ValueError, match=r"layers\.0\.weight, layers\.1\.weight, layers\.2\.weight and 2 more"):
        inspect_draft(write(tmp_path, weights))


def test_named_glide_with_the_weights_of_another_model_is_refused(tmp_path):
    weights = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match=r"lacks parameters: cross_attn\.o_proj\.weight.* and \d+ more"):
        inspect_draft(write(tmp_path, weights))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that has the files put into `files`, and counts what it hands out; an empty local cache."""
    state = SimpleNamespace(files={}, downloads=[], headers=0)

    def download(repo_id, file_name, revision=None):
        assert (repo_id, revision) == ("someone/draft", "main")
        if file_name not in state.files:
            raise huggingface_hub.errors.EntryNotFoundError(file_name)
        state.downloads.append(file_name)
        return state.files[file_name]

    def parse_header(self, repo_id, file_name, revision=None):
        if file_name not in state.files:
            raise huggingface_hub.errors.EntryNotFoundError(file_name)
        state.headers += 1
        return SimpleNamespace(
            tensors={name: SimpleNamespace(shape=list(shape)) for name, shape in glide_shapes(CONFIG).items()}
        )

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "parse_safetensors_file_metadata", parse_header)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return state


def add_config(hub, folder, architectures):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "architectures": architectures}))
    hub.files["config.json"] = folder / "config.json"


@pytest.mark.parametrize("architectures", [None, ["LlamaGlideDecoderLayer"], ["LlamaForCausalLM"]])
def test_hub_header_is_read_without_the_weights(hub, tmp_path, architectures):
    add_config(hub, tmp_path / "hub", architectures)
    hub.files["model.safetensors"] = None
    assert inspected("someone/draft", "main").shapes == glide_shapes(CONFIG)
    assert (hub.downloads, hub.headers) == (["config.json"], 1)


def test_hub_index_is_enough(hub, tmp_path):
    add_config(hub, tmp_path / "hub", None)
    index = tmp_path / "hub" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(glide_weights(), "model-00001-of-00001.safetensors")}))
    hub.files["model.safetensors.index.json"] = index
    assert inspected("someone/draft", "main").shapes == dict.fromkeys(glide_shapes(CONFIG))
    assert (hub.downloads, hub.headers) == (["config.json", "model.safetensors.index.json"], 0)


@pytest.mark.parametrize(
    ("architectures", "recognised"), [(None, True), (["LlamaGlideDecoderLayer"], True), (["LlamaForCausalLM"], False)]
)
def test_hub_bin_file_is_downloaded_only_for_a_likely_draft(hub, tmp_path, architectures, recognised):
    add_config(hub, tmp_path / "hub", architectures)
    write(tmp_path / "weights", glide_weights(), file_name="pytorch_model.bin")
    hub.files["pytorch_model.bin"] = tmp_path / "weights" / "pytorch_model.bin"
    assert (inspect_draft("someone/draft", "main") is not None) is recognised
    assert ("pytorch_model.bin" in hub.downloads) is recognised


def test_hub_without_the_repository(hub):
    assert inspect_draft("someone/draft", "main") is None


@pytest.mark.parametrize("file_name", ["model.safetensors", "pytorch_model.bin"])
def test_cache_is_enough_without_a_network(tmp_path, monkeypatch, file_name):
    def no_network(*args, **kwargs):
        raise huggingface_hub.errors.OfflineModeIsEnabled("HF_HUB_OFFLINE=1")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_network)
    monkeypatch.setattr(huggingface_hub.HfApi, "parse_safetensors_file_metadata", no_network)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--draft"
    write(repository / "snapshots" / "0123abcd", glide_weights(), file_name=file_name, architectures=None)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    assert inspected("someone/draft").architecture == "LlamaGlideDecoderLayer"
    assert inspect_draft("someone/other") is None


# Where nothing is seen, the reason is said: through the hub's real client, from a server of our own.

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does: what is wrong is in a header, a file's commit and hash in others."""

    files: dict[str, bytes] = {}
    # Repository -> status and error code.
    refusals = {
        "someone/gated": (403, "GatedRepo"),
        "someone/private": (401, "RepoNotFound"),
        "someone/forbidden": (403, ""),
        "someone/busy": (503, ""),
    }

    def do_GET(self):
        owner, name, _, revision, file_name = self.path.lstrip("/").split("/")
        status, code = self.refusals.get(f"{owner}/{name}", (404, "RepoNotFound"))
        content = b""
        if name == "draft":
            status, code, content = 200, "", self.files.get(file_name, b"")
            if revision not in ("main", COMMIT):
                status, code = 404, "RevisionNotFound"
            elif file_name not in self.files:
                status, code = 404, "EntryNotFound"
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{file_name}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Lets the hub's client ask a server of our own, whose files can be set, with an empty local cache."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    path = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + path)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Hub, "files", {})
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    # The client asks several times, and waits in between.
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    huggingface_hub.close_session()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
    huggingface_hub.close_session()


def reason(error, model):
    said = str(error.value)
    assert "\n" not in said
    assert said.startswith(f"{model} ")
    return said.removeprefix(f"{model} ")


def files_of(folder):
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


@pytest.mark.parametrize("file_name", ["model.safetensors", "pytorch_model.bin"])
def test_hub_is_asked(server, tmp_path, file_name):
    Hub.files.update(files_of(write(tmp_path / "hub", glide_weights(), file_name=file_name, architectures=None)))
    for revision in (None, "main", COMMIT):
        assert read_draft("someone/draft", revision).shapes == glide_shapes(CONFIG)


@pytest.mark.parametrize(
    ("model", "revision", "said"),
    [
        ("someone/mispelt", None, "is neither a local folder nor a repository that the Hugging Face hub shows"),
        ("someone/private", None, "check the name, and for a private repository give your token in HF_TOKEN"),
        ("someone/gated", None, "is a gated repository: ask for access on its page of the Hugging Face hub"),
        ("someone/draft", "v2", "has no revision 'v2': give one of its branches, tags or commits"),
        ("someone/forbidden", None, "cannot be read with this user's access to the Hugging Face hub (status 403)"),
        ("someone/busy", None, "could not be read from the Hugging Face hub, which answered with status 503"),
        ("not a/name", None, "is neither a local folder nor a possible name of a repository"),
    ],
)
def test_hub_that_does_not_give_the_draft(server, model, revision, said):
    with pytest.raises(UnseenDraftError) as error:
        read_draft(model, revision, expected=True)
    assert said in reason(error, model)
    assert inspect_draft(model, revision) is None


def test_repository_that_is_no_draft(server):
    with pytest.raises(NoGlideDraftError) as error:
        read_draft("someone/draft", expected=True)
    assert reason(error, "someone/draft") == "is not one, it has no config.json"


def test_hub_that_is_not_there(server):
    server.shutdown()
    server.server_close()
    with pytest.raises(UnseenDraftError) as error:
        read_draft("someone/draft", "v2", expected=True)
    said = reason(error, "someone/draft")
    assert said.startswith(
        "is not in the cache of the Hugging Face hub at revision v2, and the hub could not be asked ("
    )
    assert said.endswith("check the network and HF_ENDPOINT, or give a local folder")


def test_hub_that_is_not_asked(server, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    with pytest.raises(UnseenDraftError) as error:
        read_draft("someone/draft", expected=True)
    assert "the hub is not asked (HF_HUB_OFFLINE): download it first, or unset" in reason(error, "someone/draft")


def test_hub_that_goes_away_before_the_weights_are_seen(server, tmp_path):
    """Whether it is a GLIDE draft only its parameters say, and they are not in the cache."""
    Hub.files.update(files_of(write(tmp_path / "hub", glide_weights(), architectures=["LlamaForCausalLM"])))
    huggingface_hub.hf_hub_download("someone/draft", "config.json")
    server.shutdown()
    server.server_close()
    with pytest.raises(UnseenDraftError) as error:
        read_draft("someone/draft", expected=True)
    assert "the hub could not be asked" in reason(error, "someone/draft")


def test_hub_that_does_not_answer_is_asked_once(server, monkeypatch):
    """The client waits for it half a minute each time."""
    asked = []

    def busy(self):
        asked.append(self.path)
        self.send_error(503)

    monkeypatch.setattr(Hub, "do_HEAD", busy)
    monkeypatch.setattr(Hub, "do_GET", busy)
    with pytest.raises(UnseenDraftError):
        read_draft("someone/draft", expected=True)
    assert len(set(asked)) == 1


def test_hub_with_a_damaged_header(server, tmp_path):
    files = files_of(write(tmp_path / "hub", glide_weights(), architectures=None))
    Hub.files.update(files | {"model.safetensors": (10**12).to_bytes(8, "little") + b"{}"})
    with pytest.raises(UnseenDraftError) as error:
        read_draft("someone/draft", expected=True)
    assert "has a model.safetensors that is damaged" in reason(error, "someone/draft")


def test_bin_file_of_a_draft_that_is_asked_for_is_looked_at(server, tmp_path):
    """An ordinary architecture says nothing against it then."""
    folder = write(tmp_path / "hub", glide_weights(), file_name="pytorch_model.bin", architectures=["LlamaForCausalLM"])
    Hub.files.update(files_of(folder))
    assert inspect_draft("someone/draft") is None
    assert read_draft("someone/draft", expected=True).shapes == glide_shapes(CONFIG)


def test_full_cache_is_named(server, tmp_path, monkeypatch):
    def no_space(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_space)
    with pytest.raises(UnseenDraftError) as error:
        read_draft("someone/draft", expected=True)
    assert "cannot be put into the cache of the Hugging Face hub" in reason(error, "someone/draft")


def test_file_beside_the_weights_that_cannot_be_looked_for_is_named(server, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(checkpoint.logger, "propagate", True)
    caplog.set_level(logging.WARNING, logger=checkpoint.logger.name)
    Hub.files.update(files_of(write(tmp_path / "hub", glide_weights())))

    def said():
        return [record.getMessage() for record in caplog.records if record.name == checkpoint.logger.name]

    assert find_file("someone/draft", "frequent_tokens.json") is None
    assert not said()
    server.shutdown()
    server.server_close()
    assert find_file("someone/draft", "other.json") is None
    (line,) = said()
    assert line.startswith("other.json of draft someone/draft is not used: the draft is not in the cache")
    # Offline the cache is all there is.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert find_file("someone/draft", "other.json") is None
    assert len(said()) == 1


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("s3://bucket/draft", "is in object storage, where no GLIDE draft is looked for: copy it to a local folder"),
        ("GS://bucket/draft", "is in object storage, where no GLIDE draft is looked for: copy it to a local folder"),
        ("az://bucket", "is in object storage, where no GLIDE draft is looked for: copy it to a local folder"),
        ("https://huggingface.co/someone/draft", "is an address, where no GLIDE draft is looked for"),
        ("/no/such/draft", "is neither a local folder nor the name of a repository: check it"),
        ("draft", "is neither a local folder nor the name of a repository: check it"),
        (__file__, "is a file: give the folder that it lies in"),
    ],
)
def test_place_where_no_draft_is_looked_for(model, said):
    with pytest.raises(UnseenDraftError) as error:
        read_draft(model, expected=True)
    assert said in reason(error, model)


def test_modelscope_is_not_searched(monkeypatch):
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "True")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **kwargs: pytest.fail("asked the hub"))
    with pytest.raises(UnseenDraftError) as error:
        read_draft("someone/draft", expected=True)
    assert "no GLIDE draft is looked for on ModelScope" in reason(error, "someone/draft")


@pytest.mark.parametrize("revision", [2, 1.0, ["main"]])
def test_revision_that_is_no_string(revision):
    """vLLM reads `--speculative-config.revision 2` as a number."""
    with pytest.raises(NoGlideDraftError, match="revision must be a string, got"):
        read_draft("someone/draft", revision)


def test_local_folder_that_is_no_draft(tmp_path):
    for break_it, said in (
        (lambda: None, "is not one, it has no config.json"),
        (lambda: (tmp_path / "config.json").write_text("{"), "is not known to be one, its config.json is not JSON"),
        (lambda: write(tmp_path, {"a": torch.zeros(1)}, architectures=None), "is not one"),
        (
            lambda: (tmp_path / "model.safetensors").write_text("not a header"),
            "is not known to be one, its model.safetensors is damaged",
        ),
    ):
        break_it()
        with pytest.raises(NoGlideDraftError) as error:
            read_draft(str(tmp_path), expected=True)
        assert reason(error, tmp_path).startswith(said)
        assert not isinstance(error.value, UnseenDraftError)


def test_what_may_not_be_read_is_named(tmp_path, monkeypatch):
    """Permissions mean nothing to the user that runs tests in a container."""
    folder, weights = write(tmp_path, glide_weights()), str(tmp_path / "model.safetensors")
    may_read = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != weights and may_read(path, mode))
    with pytest.raises(ValueError, match=r"but its model\.safetensors may not be read: change its permissions"):
        read_draft(folder)
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != folder and may_read(path, mode))
    for file in tmp_path.iterdir():
        file.unlink()
    with pytest.raises(UnseenDraftError) as error:
        read_draft(folder, expected=True)
    assert reason(error, folder) == "is a folder that may not be read: change its permissions"


def test_files_of_a_trainer_are_no_weights(tmp_path):
    write(tmp_path, glide_weights(), file_name="pytorch_model.bin", architectures=None)
    for name in ("training_args.bin", "optimizer.pt"):
        (tmp_path / name).write_bytes(b"no weights")
    assert read_draft(str(tmp_path)).shapes == glide_shapes(CONFIG)
