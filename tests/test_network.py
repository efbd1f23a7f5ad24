"""Models, tokenizers and data of a hub that is there, refuses, is silent, or is not there: a server on this machine."""

import resource
import socket
import time
from collections.abc import Iterator

import datasets
import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, hf_api

import oats_vision as ov
from hub import serve
from oats_vision import network
from oats_vision.errors import DataError, ModelError

NOBODY = "http://127.0.0.1:9"  # where nobody listens


@pytest.fixture
def endpoint(monkeypatch, tmp_path):
    """Sets the hub's address, with an empty cache, as HF_ENDPOINT and HF_HOME do before the libraries are imported."""

    def use(url: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(hf_api.api, "endpoint", url)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", url)

    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    huggingface_hub.close_session()
    yield use
    huggingface_hub.close_session()


@pytest.fixture
def hub(endpoint, model_directory, language_directory) -> Iterator[list[str]]:
    """A hub with a model of timm's and a language model; what it was asked for."""
    with serve({"org/vit": model_directory, "org/llama": language_directory}) as (url, asked):
        endpoint(url)
        yield asked


SOURCES = {
    "a model of timm": (lambda: ov.load_model("vit_tiny_patch16_224"), ModelError, "`pretrained=False`"),
    "an alias": (lambda: ov.load_model("dinov2_vits14"), ModelError, "model 'dinov2_vits14' cannot be loaded"),
    "a model of the hub": (lambda: ov.load_model("hf:org/other"), ModelError, "a local directory as `model`"),
    "its architecture": (lambda: ov.load_model("hf:org/other", pretrained=False), ModelError, "a local directory"),
    "a tokenizer": (lambda: ov.load_tokenizer("hf:org/other"), ModelError, "has no tokenizer"),
    "pictures": (lambda: _pictures("hf:org/other"), DataError, "a local folder"),
    "a stream": (lambda: _pictures("hf:org/other", streaming=True), DataError, "a local folder"),
    "a known text": (lambda: ov.load_tokens("c4", None, tokens=9), DataError, "a local folder or file"),
}


def _pictures(source: str, **options: object) -> object:
    return ov.load_pictures(source, torch.nn.Identity(), batch_size=1, **options)


@pytest.mark.parametrize(("load", "kind", "words"), SOURCES.values(), ids=SOURCES.keys())
def test_without_a_network_one_line_says_so_at_once(endpoint, tmp_path, caplog, load, kind, words):
    endpoint(NOBODY)
    start = time.monotonic()
    with pytest.raises(kind) as error:
        load()
    assert time.monotonic() - start < 5
    message = str(error.value)
    assert "\n" not in message
    assert "127.0.0.1:9 cannot be reached (Connection refused)" in message
    assert words in message
    assert "HF_HUB_OFFLINE=1" in message
    cache = datasets.config.HF_DATASETS_CACHE if kind is DataError else tmp_path / "cache"
    assert f"the cache {cache}" in message
    assert not caplog.records  # nothing retried
    assert not constants.is_offline_mode()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gated", "org/gated is gated: accept its terms at http.*/org/gated, then log in with `hf auth login`"),
        ("closed", "org/closed is gated"),
        ("none", "has no such model, or it is private: check the name, or log in"),
        ("unknown", "has no such model"),
        ("forbidden", "answers 403: log in"),
    ],
)
def test_what_the_hub_refuses_is_said(hub, name, words):
    with pytest.raises(ModelError, match=rf"model 'hf:org/{name}' cannot be loaded: .*{words}"):
        ov.load_model(f"hf:org/{name}")
    with pytest.raises(ModelError, match=rf"hf:org/{name} has no tokenizer that can be loaded: .*{words}"):
        ov.load_tokenizer(f"hf:org/{name}")


@pytest.mark.parametrize(
    ("name", "words"),
    [("gated", "it is gated: accept its terms|is gated"), ("none", "no such dataset"), ("unknown", "no such dataset")],
)
def test_data_that_the_hub_refuses_is_said(hub, name, words):
    with pytest.raises(DataError, match=words) as error:
        _pictures(f"hf:org/{name}")
    assert "\n" not in str(error.value)


def test_what_is_cached_loads_when_the_hub_is_gone(hub, endpoint, pictures, caplog):
    model, _ = ov.load_model("hf:org/vit")
    ov.load_tokenizer("hf:org/llama")
    endpoint(NOBODY)
    again, _ = ov.load_model("hf:org/vit")
    assert torch.equal(again.head.weight, model.head.weight)
    assert [record.getMessage() for record in caplog.records] == [
        "127.0.0.1:9 cannot be reached (Connection refused): what its cache holds was used. HF_HUB_OFFLINE=1 does so "
        "without asking"
    ]
    assert ov.load_tokenizer("hf:org/llama")("the mat")["input_ids"]


def test_offline_mode_asks_nobody(hub, monkeypatch):
    ov.load_model("hf:org/vit")
    hub.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    ov.load_model("hf:org/vit")
    with pytest.raises(ModelError, match=r"HF_HUB_OFFLINE is set, and its files are not all in the cache .*: unset it"):
        ov.load_model("hf:org/other")
    assert not hub


def test_a_hub_that_is_silent_is_not_waited_for(endpoint, monkeypatch):
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.3")
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint(f"http://127.0.0.1:{server.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(ModelError, match=r"cannot be reached \((timed out|no answer in 0.3 s)\)"):
            ov.load_model("hf:org/other")
        assert time.monotonic() - start < 3


def test_a_proxy_is_asked(hub, endpoint, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", constants.ENDPOINT)
    huggingface_hub.close_session()
    assert network.unreachable("http://hub.invalid/") is None
    assert hub == ["http://hub.invalid/"]
    monkeypatch.setenv("NO_PROXY", "hub.invalid")
    huggingface_hub.close_session()
    assert network.unreachable("http://hub.invalid/") is not None


def test_github_that_cannot_be_reached_is_said_and_a_clone_needs_none(endpoint, monkeypatch, tmp_path):
    monkeypatch.setenv("HTTPS_PROXY", NOBODY)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    huggingface_hub.close_session()
    with pytest.raises(ModelError, match=r"github.com cannot be reached .* kept in .*/hub\. .* hub:DIRECTORY:ENTRY"):
        ov.load_model("hub:dinov2_vits14", trust_remote_code=True)
    clone = tmp_path / "hub" / "org_repo_main"
    clone.mkdir(parents=True)
    (clone / "hubconf.py").write_text("def entry(pretrained):\n    raise RuntimeError('it ran')\n")
    with pytest.raises(ModelError, match="it ran"):
        ov.load_model("hub:org/repo:main:entry", trust_remote_code=True)


def test_a_cache_on_a_full_disk_is_said(hub, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(ModelError) as error:
            ov.load_model("hf:org/vit")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"the cache {tmp_path / 'cache'} cannot be written (File too large): free some space" in str(error.value)
    assert "HF_HOME" in str(error.value)
