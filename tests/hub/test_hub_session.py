"""Every way the Hub can fail gives one line that names repository, address and cause, within bounded time."""

import hashlib
import itertools
import re
import socket
from collections.abc import Iterator

import pytest

from tests.hub_client import HubClient, shared_client, shared_home, shared_hub
from tests.hub_server import Fault, HubServer

_FETCH = "from semivim.hub.hub_session import fetch\nresult = fetch(repo, name).read_bytes().hex()"
_DATA = bytes(range(256)) * 64
_numbers = itertools.count()


@pytest.fixture
def hub() -> Iterator[HubServer]:
    server = shared_hub()
    yield server
    server.fault = None


@pytest.fixture
def repo(hub: HubServer) -> str:
    name = f"org/files{next(_numbers)}"
    hub.add(name, {"model.safetensors": _DATA, "config.json": b"{}"})
    return name


def test_fetch_gives_the_bytes_and_keeps_them(hub: HubServer, repo: str) -> None:
    assert shared_client().run(_FETCH, repo=repo, name="model.safetensors").result == _DATA.hex()
    start = len(hub.requests)
    assert shared_client().run(_FETCH, repo=repo, name="model.safetensors").result == _DATA.hex()
    assert not [r for r in hub.requests[start:] if r.startswith("GET")]
    assert not hub.tokens_on_cdn


_ANY, _LARGE = "(GET|HEAD) /org", "GET /cdn"


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        pytest.param(Fault(_ANY, 401), "401 Unauthorized: no valid token", id="401"),
        pytest.param(Fault(_ANY, 403), "403 Forbidden: the token may not do this", id="403"),
        pytest.param(Fault(_ANY, 404), "404 Not Found: no such repository", id="404"),
        pytest.param(Fault(_ANY, 429), "429 Too Many Requests: .* wait a few minutes", id="429"),
        pytest.param(Fault(_ANY, 429, {"Retry-After": "300"}), "429 .* wait 300 s", id="429-retry-after"),
        pytest.param(Fault(_ANY, 429, {"RateLimit": '"api";r=0;t=55'}), "429 .* wait 55 s", id="429-ratelimit"),
        pytest.param(Fault(_ANY, 500), r"500 .* the Hub failed, .*\(3 tries\)", id="500"),
        pytest.param(Fault(_LARGE, 500), "500 .* the Hub failed", id="500-body"),
        pytest.param(Fault(_ANY, "hang"), r"no answer in time \(3 tries\)", id="hang"),
        pytest.param(Fault(_LARGE, "hang"), r"no answer in time \(3 tries\)", id="hang-body"),
        pytest.param(Fault(_LARGE, "truncate"), "no complete answer in 3 tries", id="truncate"),
    ],
)
def test_failure_is_one_line(hub: HubServer, repo: str, fault: Fault, cause: str) -> None:
    hub.fault = fault
    address = "http://localhost" if fault.pattern == _LARGE else f"{hub.url}/{repo}/resolve/main/model.safetensors"
    answer = shared_client().run(_FETCH, repo=repo, name="model.safetensors")
    assert answer.line.startswith(f"HubError: {repo}: {address}")
    assert re.search(cause, answer.line), answer.line
    assert answer.seconds < 10


def test_corrupted_file_is_named_removed_and_fetched_anew(hub: HubServer, repo: str) -> None:
    hub.fault = Fault(_LARGE, "corrupt", times=1)
    answer = shared_client().run(_FETCH, repo=repo, name="model.safetensors")
    assert f"{repo}: model.safetensors: checksum" in answer.line
    assert f"wanted {hashlib.sha256(_DATA).hexdigest()}" in answer.line
    assert shared_client().run(_FETCH, repo=repo, name="model.safetensors").result == _DATA.hex()


def test_corrupted_small_file_is_found_by_its_git_hash(hub: HubServer, repo: str) -> None:
    hub.fault = Fault("GET .*config.json", "corrupt")
    assert "config.json: checksum" in shared_client().run(_FETCH, repo=repo, name="config.json").line


@pytest.mark.parametrize(("pattern", "kind"), [(_ANY, 500), (_ANY, 429), (_LARGE, "truncate")])
def test_passing_fault_is_survived(hub: HubServer, repo: str, pattern: str, kind: int | str) -> None:
    hub.fault = Fault(pattern, kind, times=1)
    assert shared_client().run(_FETCH, repo=repo, name="model.safetensors").result == _DATA.hex()


@pytest.mark.parametrize(
    ("name", "revision", "cause"),
    [("other.bin", None, "no such file"), ("config.json", "v9", "no such revision or tag")],
)
def test_missing_file_or_revision(repo: str, name: str, revision: str | None, cause: str) -> None:
    code = _FETCH.replace("(repo, name)", "(repo, name, revision)")
    assert f"404 Not Found: {cause}" in shared_client().run(code, repo=repo, name=name, revision=revision).line


@pytest.mark.parametrize("kind", [500, 429, "hang"])
def test_cached_copy_serves_while_the_hub_is_down(hub: HubServer, repo: str, kind: int | str) -> None:
    assert shared_client().run(_FETCH, repo=repo, name="config.json").result
    hub.fault = Fault(_ANY, kind)
    assert shared_client().run(_FETCH, repo=repo, name="config.json").result == b"{}".hex()


def test_without_network(repo: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    shared_client().run(_FETCH, repo=repo, name="config.json")
    with HubClient(closed, shared_home()) as client:
        refused = client.run(_FETCH, repo=repo, name="model.safetensors")
        cached = client.run(_FETCH, repo=repo, name="config.json")
        # what HF_HUB_OFFLINE=1 sets when huggingface_hub is imported
        client.run("from huggingface_hub import constants\nconstants.HF_HUB_OFFLINE = True")
        offline = client.run(_FETCH, repo=repo, name="model.safetensors")
        offline_cached = client.run(_FETCH, repo=repo, name="config.json")
    address = f"HubError: {repo}: {closed}"
    assert refused.line.startswith(f"{address}/{repo}/resolve/main/model.safetensors: ConnectError: ")
    assert refused.line.endswith("(3 tries)")
    assert offline.line == f"{address}: offline mode is on (HF_HUB_OFFLINE=1); no copy in the cache"
    assert cached.result == offline_cached.result == b"{}".hex()


def test_session_restores_the_client_and_the_log_level() -> None:
    answer = shared_client().run(
        "from huggingface_hub.utils import _http, logging\n"
        "from semivim.hub.hub_session import hub_session\n"
        "state = lambda: (_http._GLOBAL_CLIENT_FACTORY, logging.get_verbosity())\n"
        "logging.set_verbosity_warning()\n"
        "before = state()\n"
        "with hub_session('a/b'):\n    inside = state()\n"
        "result = [before == state(), before[0] is inside[0]]"
    )
    assert answer.result == [True, False], answer.error


def test_signature_of_an_address_stays_secret() -> None:
    code = (
        "from semivim.hub.hub_session import _address\n"
        "result = _address('https://bucket.example/file?X-Amz-Signature=secret')"
    )
    assert shared_client().run(code).result == "https://bucket.example/file"


def test_private_name_of_huggingface_hub_exists() -> None:
    """`hub_session` reads the client factory that `set_client_factory` replaces; the library has no reader of it."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    previous = _http._GLOBAL_CLIENT_FACTORY
    assert callable(previous)
    try:
        set_client_factory(other := lambda: previous())
        assert _http._GLOBAL_CLIENT_FACTORY is other
    finally:
        set_client_factory(previous)
