"""Models and data from a network: whether its servers answer is known in seconds, and said in one line if not."""

import errno
import logging
import os
import re
import sys
import threading
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any
from urllib.parse import urlsplit

from oats_vision.errors import OatsVisionError, one_line

log = logging.getLogger(__name__)

_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS)
PATIENCE = 5.0  # seconds that a server has to answer, where HF_HUB_ETAG_TIMEOUT does not say


@contextmanager
def hub(failed: str, advice: str, kind: type[OatsVisionError], repository: str = "model") -> Iterator[None]:
    """Use the Hugging Face hub inside the block; its cache alone, at once, where the hub cannot be reached.

    The libraries would retry for a minute, and for each file again. Proxies, HF_ENDPOINT and HF_HUB_OFFLINE count
    as they do for them.

    Args:
        failed: what the error begins with.
        advice: what the user can give in place of what the hub has.
        repository: what the hub calls it: model or dataset.

    Raises:
        kind: the hub cannot be reached and the cache lacks something, or the hub refuses.
    """
    from huggingface_hub import constants

    endpoint = constants.ENDPOINT
    down = None if constants.is_offline_mode() else unreachable(endpoint)
    try:
        if down:
            with _offline():
                yield
        else:
            yield
    except Exception as problem:  # of the hub's libraries, as it is or as the reason of one of ours
        cache = _cache(repository)
        reason = (
            _refusal(problem, repository, endpoint)
            or _missing(problem, down, endpoint, cache, advice)
            or _unwritable(problem, cache)
        )
        if reason is None:
            raise
        log.debug("%s", failed, exc_info=True)
        raise kind(f"{failed}: {reason}") from None  # which says all
    if down:
        log.warning(
            "%s cannot be reached (%s): what its cache holds was used. HF_HUB_OFFLINE=1 does so without asking",
            _host(endpoint),
            down,
        )


def unreachable(url: str, patience: float | None = None) -> str | None:
    """Why the server of an address gives no answer within some seconds; None if it gives one, of whatever status."""
    from huggingface_hub import get_session

    seconds = patience or float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or PATIENCE)
    outcome: list[str | None] = []

    def ask() -> None:
        try:  # with the client that will download: the same proxies and certificates
            get_session().head(url, timeout=seconds)
            outcome.append(None)
        except Exception as problem:  # each release of the hub has its own HTTP library
            outcome.append(plain_reason(problem))

    # looking up a name heeds no timeout
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return outcome[0] if outcome else f"no answer in {seconds:g} s"


def plain_reason(problem: BaseException) -> str:
    """One line of what went wrong, without the numbers of the operating system."""
    return re.sub(r"^<urlopen error (.*)>$", r"\1", re.sub(r"\[Errno -?\d+\] ", "", one_line(problem)))


@contextmanager
def github(failed: str, cached: bool) -> Iterator[None]:
    """Use torch.hub inside the block, whose downloads have no timeout; what it prints goes to standard error.

    Args:
        failed: what the error begins with.
        cached: whether the repository is on this machine, so that at most its weights are asked for.

    Raises:
        ModelError: GitHub cannot be reached, or a download fails.
    """
    import torch

    from oats_vision.errors import ModelError

    advice = (
        f"What is downloaded once is kept in {torch.hub.get_dir()}. Without a network give a clone, as "
        "hub:DIRECTORY:ENTRY, and for its architecture with random weights `pretrained=False`"
    )
    down = None if cached else unreachable("https://github.com")
    if down:
        raise ModelError(f"{failed}: github.com cannot be reached ({down}). {advice}")
    try:
        with redirect_stdout(sys.stderr):
            yield
    except Exception as problem:  # of the repository's own code, as above
        for one in _chain(problem):
            if isinstance(one, urllib.error.HTTPError):
                raise ModelError(f"{failed}: {one.url} answers {one.code} ({one.reason}): check the name") from None
            if isinstance(one, urllib.error.URLError | TimeoutError):
                reason = f"its files cannot be downloaded ({plain_reason(one)})"
                raise ModelError(f"{failed}: {reason}. {advice}") from None
        raise


def _refusal(problem: Exception, repository: str, endpoint: str) -> str | None:
    """What the hub answered if it does not give what was asked for."""
    from huggingface_hub import errors

    chain = list(_chain(problem))
    messages = " ".join(map(str, chain))
    login = "log in with `hf auth login` or set HF_TOKEN"
    for one in chain:
        name = getattr(one, "repo_id", None) or "it"
        place = f"{endpoint}/{'datasets/' * (repository == 'dataset')}{name}"
        if isinstance(one, errors.GatedRepoError):
            return f"{name} is gated: accept its terms at {place}, then {login}"
        if isinstance(one, errors.RepositoryNotFoundError):
            return f"{_host(endpoint)} has no such {repository}, or it is private: check the name, or {login}"
        if isinstance(one, errors.RevisionNotFoundError):
            return f"{name} has no such revision"
        if isinstance(one, errors.HfHubHTTPError) and not isinstance(one, errors.EntryNotFoundError):
            status = one.response.status_code
            wrong = f"{login} (a token that is set may have expired)" if status in (401, 403) else "try again later"
            return f"{_host(endpoint)} answers {status}: {wrong}"
    if any(type(one).__name__ == "DatasetNotFoundError" for one in chain):  # `datasets` drops the reason
        if "gated" in messages:
            return f"it is gated: accept its terms on its page at {endpoint}, then {login}"
        return f"{_host(endpoint)} has no such {repository}, or it is private: check the name, or {login}"
    return None


def _cache(repository: str) -> str:
    """The folder that what was downloaded is kept in."""
    if repository == "dataset":
        import datasets

        return str(datasets.config.HF_DATASETS_CACHE)
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE


def _unwritable(problem: Exception, cache: str) -> str | None:
    """What there is to do about a cache that cannot be written, if it is that."""
    for one in _chain(problem):
        if isinstance(one, OSError) and one.errno in _UNWRITABLE:
            said = f"the cache {cache} cannot be written ({os.strerror(one.errno)})"
            return f"{said}: free some space, or set HF_HOME to a folder that can be written"
    return None


def _missing(problem: Exception, down: str | None, endpoint: str, cache: str, advice: str) -> str | None:
    """What there is to do about a hub that is out of reach, if it is that."""
    from huggingface_hub import constants, errors

    lost = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError, TimeoutError)
    libraries = ("httpx", "httpx2", "requests", "urllib3", "aiohttp")
    chain = [
        one for one in _chain(problem) if isinstance(one, lost) or type(one).__module__.partition(".")[0] in libraries
    ]
    if not chain:
        return None
    lacking = f"its files are not all in the cache {cache}"
    if constants.is_offline_mode():
        return f"HF_HUB_OFFLINE is set, and {lacking}: unset it to download them. Without a network {advice}"
    reason = down or plain_reason(chain[-1])
    return (
        f"{_host(endpoint)} cannot be reached ({reason}), and {lacking}. Without a network {advice} "
        "(HF_HUB_OFFLINE=1 takes what is cached and does not ask)"
    )


def _chain(problem: BaseException | None) -> Iterator[BaseException]:
    """The error and what it comes from."""
    seen: set[int] = set()
    while problem is not None and id(problem) not in seen:
        seen.add(id(problem))
        yield problem
        problem = problem.__cause__ or problem.__context__


def _host(url: str) -> str:
    return urlsplit(url).netloc or url


@contextmanager
def _offline() -> Iterator[None]:
    """The hub's libraries as under HF_HUB_OFFLINE=1, which they read only once, when they are imported."""
    from huggingface_hub import constants

    places: list[Any] = [constants]
    if "datasets" in sys.modules:
        import datasets

        places.append(datasets.config)
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value
