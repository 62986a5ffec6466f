"""Uploading a staged folder to a Hub repository: private by default, all or nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, ModelInfo
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from localrl.errors import HubError
from localrl.export.hub import is_passing
from localrl.export.staging import ALLOWED, MARK

WAITS_S = (1.0, 5.0)
"""Seconds to wait before the second and third attempt. The client retries most calls itself, but
not the one that makes the commit."""

HUBS_OWN = {".gitattributes", "README.md"}
"""Files that a repository created on the website may contain."""


@dataclass(frozen=True)
class Pushed:
    """The outcome of a push."""

    url: str
    private: bool
    changed: bool
    """False if the repository already had the same files."""


def push(api: HfApi, folder: Path, repo_id: str, *, public: bool, message: str) -> Pushed:
    """Upload the staged files to `repo_id` in one commit; do nothing if it already has them.

    Bytes sent by an earlier attempt are not sent again.

    Raises: HubError if the repository is public without `public`, or contains something else;
    otherwise the client's errors, see `localrl.export.hub.explained`.
    """
    api.whoami()  # detect an invalid token before anything is created
    info = _look(api, repo_id)
    if info is None:
        api.create_repo(repo_id, private=not public)
        info = api.model_info(repo_id)
    _check(info, repo_id, public)
    _persist(lambda: _upload(api, folder, info, message))
    after = api.model_info(repo_id)
    url = f"{api.endpoint}/{repo_id}"
    return Pushed(url, private=after.private is True, changed=after.sha != info.sha)


def _look(api: HfApi, repo_id: str) -> ModelInfo | None:
    try:
        return api.model_info(repo_id)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return None


def _check(info: ModelInfo, repo_id: str, public: bool) -> None:
    """Check that the files may be uploaded. A repository not marked private counts as public.

    Raises: HubError if they may not.
    """
    if not info.private and not public:
        raise HubError(
            f"{repo_id} is public, so nothing was uploaded. Push to a new name, make it private in "
            "its settings on the Hub, or pass --public."
        )
    names = {file.rfilename for file in info.siblings or ()}
    if MARK not in names and (others := sorted(names - HUBS_OWN)):
        raise HubError(
            f"{repo_id} contains files that localrl did not push ({', '.join(others[:3])}), so "
            "nothing was uploaded. Push to a new name."
        )


def _upload(api: HfApi, folder: Path, info: ModelInfo, message: str) -> None:
    """Make one commit on top of the state seen by `_check`.

    An allowed file that this run lacks is left from an earlier push and no longer belongs to these
    weights, so it is deleted; the repository's history keeps it.
    """
    there = {file.rfilename for file in info.siblings or ()}
    stale = [name for name in ALLOWED if name in there and not (folder / name).exists()]
    api.upload_folder(
        repo_id=info.id,
        folder_path=folder,
        allow_patterns=list(ALLOWED),
        delete_patterns=stale or None,
        commit_message=message,
        parent_commit=info.sha,
    )


def _persist(attempt: Callable[[], None]) -> None:
    """Retry after temporary failures; a commit that got through is detected, not repeated."""
    for wait in WAITS_S:
        try:
            return attempt()
        except Exception as error:
            if not is_passing(error):
                raise
        time.sleep(wait)
    return attempt()
