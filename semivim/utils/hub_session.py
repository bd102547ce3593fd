"""Talk to the Hugging Face Hub within bounded time, and say in one line what went wrong."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub import constants, hf_hub_download, set_client_factory
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import _http

_TRIES = 3
_UPLOAD_FACTOR = 6  # the Hub may work on a commit for a while before it answers
_MEANING = {
    400: "the Hub refused the data",
    401: "no valid token for it, or no such repository; run `hf auth login` or set HF_TOKEN",
    403: "the token may not do this; give it access to the repository",
    404: "no such repository, or a private one that the token may not see",
    409: "conflicts with what is there",
    429: "too many requests",
}
_MISSING = {"RevisionNotFound": "no such revision or tag", "EntryNotFound": "no such file in the repository"}


class HubError(ValueError):
    """The Hub could not do it; the message is one line: repository, address, cause."""


@contextmanager
def hub_session(repo_id: str) -> Iterator[None]:
    """Bound every request that huggingface_hub sends inside the block, and turn its failures into `HubError`.

    A request is tried at most three times and waits ``HF_HUB_DOWNLOAD_TIMEOUT`` seconds (10 by default) for an answer,
    six times that for an upload. A rate limit is reported at once instead of slept through. A copy in the cache is
    still used where the Hub does not answer. The settings are the process's, so the block is not for threads.

    Args:
        repo_id: Repository named in the error.

    Raises:
        HubError: For any failure of the Hub, the network or the cache.
    """
    previous = _http._GLOBAL_CLIENT_FACTORY
    guard = _Guard(repo_id)

    def factory() -> Any:
        client = previous()
        hooks = client.event_hooks
        client.event_hooks = {
            "request": [*hooks["request"], guard.before],
            "response": [*hooks["response"], guard.after],
        }
        return client

    set_client_factory(factory)
    try:
        yield
    except (HTTPError, OSError, EntryNotFoundError, RuntimeError, HubError) as error:
        _raise_hub_error(repo_id, error)
    finally:
        set_client_factory(previous)


def fetch(repo_id: str, filename: str, revision: str | None = None, cache_dir: str | Path | None = None) -> Path:
    """Download one file into the cache, or find it there, and check its content against the Hub's checksum.

    Args:
        repo_id: ``org/name``.
        filename: Path inside the repository.
        revision: Branch, tag or commit; the main branch if None.
        cache_dir: Cache folder; huggingface_hub's own if None.

    Returns:
        Path of the file in the cache.

    Raises:
        HubError: If it cannot be had, or its bytes are not the ones the Hub announced; the bad copy is removed.
    """
    with hub_session(repo_id):
        path = Path(hf_hub_download(repo_id, filename, revision=revision, cache_dir=cache_dir))
    blob = path.resolve()
    # the cache names a blob by its ETag: the SHA-256 of a large file, git's SHA-1 of a small one
    if re.fullmatch(r"[0-9a-f]{64}", blob.name):
        found = sha256(blob)
    elif re.fullmatch(r"[0-9a-f]{40}", blob.name):
        data = blob.read_bytes()
        found = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    else:
        # a cache without symbolic links keeps no ETag beside the file
        return path
    if found != blob.name:
        path.unlink()
        blob.unlink(missing_ok=True)
        raise HubError(
            f"{repo_id}: {filename}: checksum {found}, wanted {blob.name}; the copy in {blob.parent} was damaged "
            "on the way and is removed, run again"
        )
    return path


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


class _Guard:
    """Event hooks of an HTTP client that count the tries of each request and cap its waits."""

    def __init__(self, repo_id: str) -> None:
        self.repo_id = repo_id
        self.tries: Counter[tuple[str, str]] = Counter()

    def before(self, request: Any) -> None:
        key = (request.method, str(request.url))
        limit = float(constants.HF_HUB_DOWNLOAD_TIMEOUT) * (1 if request.method in ("GET", "HEAD") else _UPLOAD_FACTOR)
        if self.tries[key] >= _TRIES:
            self._give_up(key[1], f"no complete answer in {_TRIES} tries of {limit:g} s")
        self.tries[key] += 1
        waits = request.extensions.get("timeout") or dict.fromkeys(("connect", "read", "write", "pool"))
        request.extensions["timeout"] = {name: min(limit, wait or limit) for name, wait in waits.items()}

    def after(self, response: Any) -> None:
        method, url = key = (response.request.method, str(response.request.url))
        status = response.status_code
        if status == 429 and (method != "HEAD" or self.tries[key] > 1):
            self._give_up(url, _status_line(response))
        if status >= 500 and self.tries[key] >= _TRIES:
            self._give_up(url, f"{_status_line(response)} ({_TRIES} tries)")
        if status < 400 and method != "GET":
            # a GET may still break off in its body, so it keeps its count
            del self.tries[key]

    def _give_up(self, url: str, cause: str) -> NoReturn:
        raise HubError(f"{self.repo_id}: {url}: {cause}")


def _status_line(response: Any) -> str:
    status = response.status_code
    otherwise = "the Hub failed, try again later" if status >= 500 else "unexpected answer"
    meaning = _MISSING.get(response.headers.get("X-Error-Code", "")) or _MEANING.get(status, otherwise)
    said = response.headers.get("X-Error-Message")
    if status == 429:
        limit = re.search(r"t=(\d+)", response.headers.get("RateLimit", ""))
        wait = response.headers.get("Retry-After") or (limit and limit[1])
        meaning += f", wait {wait} s and run again" if wait else ", wait a few minutes and run again"
    return f"{status} {response.reason_phrase}: {meaning}" + (f" (the Hub says: {said})" if said else "")


def _raise_hub_error(repo_id: str, error: Exception) -> NoReturn:
    """Raise the `HubError` that names the first cause in the chain, or the error itself if it is not the Hub's."""
    cached = "; no copy in the cache" if isinstance(error, LocalEntryNotFoundError) else ""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, HubError):
            raise HubError(f"{link}{cached}") from error
        if isinstance(link, HfHubHTTPError):
            raise HubError(f"{repo_id}: {link.response.url}: {_status_line(link.response)}{cached}") from error
        if isinstance(link, OfflineModeIsEnabled):
            raise HubError(f"{repo_id}: {constants.ENDPOINT}: offline mode is on (HF_HUB_OFFLINE=1){cached}") from error
        if isinstance(link, HTTPError):
            cause = f"{type(link).__name__}: {' '.join(str(link).split())}"
            raise HubError(f"{repo_id}: {_url(link)}: {cause}{cached}") from error
        link = link.__cause__ or link.__context__
    if isinstance(error, (OSError, EntryNotFoundError)):
        raise HubError(f"{repo_id}: {constants.ENDPOINT}: {' '.join(str(error).split())}") from error
    raise error


def _url(error: HTTPError) -> str:
    try:
        return str(error.request.url)
    except RuntimeError:
        # httpx's errors carry the request only once it has been built
        return constants.ENDPOINT
