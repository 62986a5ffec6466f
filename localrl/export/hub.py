"""The Hub's client with timeouts, and a one-sentence message for each of its failures.

Tokens stay where the client keeps them: nothing here reads, accepts or prints one.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi, constants, set_client_factory
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars, validate_repo_id
from huggingface_hub.utils._http import default_client_factory

from localrl.errors import ConfigError, HubError

CONNECT_S, ANSWER_S = 10.0, 60.0
"""Seconds without a connection, or without a byte, after which a call fails; the client's own
HF_HUB_DOWNLOAD_TIMEOUT overrides the second."""


def connect() -> HfApi:
    """Create a client with this machine's Hub settings (HF_ENDPOINT, HF_HOME, token) and timeouts.

    Makes no network call.
    """
    told = "HF_HUB_DOWNLOAD_TIMEOUT" in os.environ
    answer_s = float(constants.HF_HUB_DOWNLOAD_TIMEOUT) if told else ANSWER_S

    def factory():
        client = default_client_factory()  # its hook enforces HF_HUB_OFFLINE
        client.timeout = (min(CONNECT_S, answer_s), answer_s, answer_s, answer_s)
        return client

    set_client_factory(factory)
    if not sys.stderr.isatty():
        disable_progress_bars()
    return HfApi()


def check_repo_id(repo_id: str) -> None:
    """Check for a valid `user/name` of the Hub.

    Raises: ConfigError, suggesting a name, if it is not.
    """
    try:
        validate_repo_id(repo_id)
        if repo_id.count("/") == 1:
            return
        reason = "it must be a user or organisation and a name, separated by one '/'"
    except HFValidationError as error:
        reason = str(error).rstrip(".")
    user, _, name = repo_id.rpartition("/")
    wish = "/".join((_suggest(user) or "user", _suggest(name) or "adapter"))
    raise ConfigError(f"{repo_id!r} is not a Hub repository id: {reason}. Try {wish}.")


def _suggest(text: str) -> str:
    plain = re.sub(r"[^\w.-]+", "-", text, flags=re.ASCII)
    return re.sub(r"([.-])[.-]+", r"\1", plain).strip("-.")[:48]


@contextmanager
def explained(later: str) -> Iterator[None]:
    """Turn any error of the client into one HubError whose message ends with `later`.

    Raises: HubError. The client's errors have no common class: connection errors are not OSError,
    and xet raises RuntimeError.
    """
    try:
        yield
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise HubError(f"{_sentence(error)} {later}") from error


def is_passing(error: Exception) -> bool:
    """Return True if the same call may succeed soon: a network problem or a busy Hub."""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return status in (408, 429) or status >= 500
    return isinstance(error, HTTPError)


def _sentence(error: Exception) -> str:
    if isinstance(error, LocalTokenNotFoundError):
        return "There is no token for the Hub on this machine. Run `hf auth login`."
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the Hub was not called. Unset it to continue."
    if isinstance(error, GatedRepoError):
        return f"This repository is gated: accept its terms on the Hub first. {_said(error)}"
    if isinstance(error, RepositoryNotFoundError):
        return "The Hub has no such repository, or your token may not see it."
    if isinstance(error, HfHubHTTPError):
        return _refusal(error)
    if isinstance(error, HTTPError):
        kind = type(error).__name__
        return f"{constants.ENDPOINT} did not answer ({kind}: {plain(str(error))})."
    if isinstance(error, ValueError) and "Invalid metadata" in str(error):
        return (
            f"The Hub refused the model card; please report this. {plain(str(error)).rstrip('.')}."
        )
    return f"{plain(str(error)).rstrip('.') or type(error).__name__}."


def _refusal(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if status == 401:
        return f"The Hub refused the token {_token_place()}. Run `hf auth login`."
    if status in (402, 403):
        return (
            f"The Hub did not allow this ({status}). {_said(error)} It needs a token with write "
            "access for this user or organisation, and free storage there."
        )
    if status in (409, 412):
        return f"Someone else changed the repository in the meantime ({status})."
    if status == 429:
        return "The Hub is rate limiting this client (429). Wait a few minutes."
    return f"The Hub answered with status {status}. {_said(error)}".rstrip()


def _token_place() -> str:
    """Describe where the client found its token; never the token itself."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name, "").strip():
            return f"in the environment variable {name}"
    return "that `hf auth login` stored"


def _said(error: HfHubHTTPError) -> str:
    text = plain(error.server_message or "")
    return f"It says: {text.rstrip('.')}." if text else ""


def plain(text: str) -> str:
    """Sanitise external text: one line, no control characters, nothing like a token."""
    line = "".join(c for c in " ".join(text.split()) if c.isprintable())
    return re.sub(r"hf_\w+", "(a token)", line)[:400]
