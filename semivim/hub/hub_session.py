"""Requests to the Hugging Face Hub that take bounded time, and fail with one line."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub import constants, hf_hub_download, set_client_factory
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import _http, logging, validate_repo_id

from semivim.utils.user_error import UserError, one_line

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


class HubError(UserError):
    """The Hub could not do it; the message is one line: repository, address, cause."""


@contextmanager
def hub_session(repo_id: str, keep_others: bool = False) -> Iterator[None]:
    """Bound every request that huggingface_hub sends inside the block, and turn its failures into `HubError`.

    A request is tried at most three times and waits ``HF_HUB_DOWNLOAD_TIMEOUT`` seconds (10 by default) for an answer,
    six times that for an upload. A rate limit is reported at once instead of slept through. A copy in the cache is
    still used where the Hub does not answer. The settings are the process's, so the block is not for threads.

    Args:
        repo_id: Repository named in the error.
        keep_others: Leave errors alone that did not come of a request, as the block does more than request.

    Raises:
        HubError: For any failure of the Hub, the network or the cache.
    """
    previous = _http._GLOBAL_CLIENT_FACTORY
    guard = _Guard(repo_id)

    def factory() -> Any:
        client: Any = previous()
        client.send = guard.bound(client.send)
        return client

    verbosity = logging.get_verbosity()
    set_client_factory(factory)
    # what would be logged about each try is in the error, if there is one
    logging.set_verbosity_error()
    try:
        yield
    except (HTTPError, OSError, EntryNotFoundError, RuntimeError, HubError) as error:
        if keep_others and not is_hub_error(error):
            raise
        _raise_hub_error(repo_id, error)
    finally:
        logging.set_verbosity(verbosity)
        set_client_factory(previous)


def is_hub_error(error: BaseException) -> bool:
    """Whether an error came of a request to the Hub, or of one that was not sent."""
    return any(isinstance(link, (HubError, HTTPError, OfflineModeIsEnabled)) for link in _chain(error))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those that led to it, the last first."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


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


def check_repo_id(repo_id: str, argument: str) -> None:
    """Refuse what cannot be the name of a repository.

    Args:
        repo_id: Should be ``org/name``.
        argument: Its name in the error.

    Raises:
        UserError: If it is anything else.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"{argument}: wanted org/name, got {repo_id!r}: {one_line(error)}") from error
    if "/" not in repo_id:
        raise UserError(f"{argument}: wanted org/name, got {repo_id!r}")


class _Guard:
    """Counts the tries of each request of an HTTP client, and caps its waits."""

    def __init__(self, repo_id: str) -> None:
        self.repo_id = repo_id
        self.tries: Counter[tuple[str, str]] = Counter()

    def bound(self, send: Callable[..., Any]) -> Callable[..., Any]:
        """The client's ``send``, that gives up sooner and says why."""

        def bounded_send(request: Any, **options: Any) -> Any:
            method, url = key = (request.method, str(request.url))
            limit_s = float(constants.HF_HUB_DOWNLOAD_TIMEOUT) * (1 if method in ("GET", "HEAD") else _UPLOAD_FACTOR)
            if self.tries[key] >= _TRIES:
                self._give_up(url, f"no complete answer in {_TRIES} tries")
            self.tries[key] += 1
            waits = request.extensions.get("timeout") or dict.fromkeys(("connect", "read", "write", "pool"))
            request.extensions["timeout"] = {name: min(limit_s, wait or limit_s) for name, wait in waits.items()}
            try:
                response = send(request, **options)
            except HTTPError as error:
                if self.tries[key] >= _TRIES:
                    self._give_up(url, f"{_network_cause(error)} ({_TRIES} tries)")
                raise
            self._judge(response, key)
            return response

        return bounded_send

    def _judge(self, response: Any, key: tuple[str, str]) -> None:
        method, url = key
        status = response.status_code
        if status == 429 and (method != "HEAD" or self.tries[key] > 1):
            self._give_up(url, _status_line(response))
        if status >= 500 and self.tries[key] >= _TRIES:
            self._give_up(url, f"{_status_line(response)} ({_TRIES} tries)")
        if status < 400 and method != "GET":
            # a GET may still break off in its body, so it keeps its count
            del self.tries[key]

    def _give_up(self, url: str, cause: str) -> NoReturn:
        raise HubError(f"{self.repo_id}: {_address(url)}: {cause}")


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
    """Raise the `HubError` that names the cause found first in the chain of errors."""
    cached = "; no copy in the cache" if isinstance(error, LocalEntryNotFoundError) else ""
    where, cause = constants.ENDPOINT, " ".join(str(error).split())
    for link in _chain(error):
        if isinstance(link, HubError):
            raise link
        if isinstance(link, (HTTPError, OfflineModeIsEnabled)):
            where, cause = _describe(link)
            break
    raise HubError(f"{repo_id}: {where}: {cause}{cached}") from error


def _describe(error: HTTPError | OfflineModeIsEnabled) -> tuple[str, str]:
    """Address and cause of an error."""
    if isinstance(error, OfflineModeIsEnabled):
        return constants.ENDPOINT, "offline mode is on (HF_HUB_OFFLINE=1)"
    if isinstance(error, HfHubHTTPError):
        return _address(error.response.url), _status_line(error.response)
    return _address(error.request.url), _network_cause(error)


def _network_cause(error: HTTPError) -> str:
    text = " ".join(str(error).split())
    return "no answer in time" if type(error).__name__.endswith("Timeout") else f"{type(error).__name__}: {text}"


def _address(url: Any) -> str:
    # the query of an upload address is a signature, which is a secret
    return str(url).partition("?")[0]
