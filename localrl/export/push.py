"""Send a staged folder to a repository of the Hub: private by default, all or nothing."""

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
"""Before the second and the third attempt. The client retries most calls by itself, but not the
one that makes the commit."""

HUBS_OWN = {".gitattributes", "README.md"}
"""What a repository made on the website may hold."""


@dataclass(frozen=True)
class Pushed:
    """What became of a push."""

    url: str
    private: bool
    changed: bool
    """False when the repository held the same files already."""


def push(api: HfApi, folder: Path, repo_id: str, *, public: bool, message: str) -> Pushed:
    """Make `repo_id` hold the staged files, in one commit; nothing when it holds them already.

    Bytes that an earlier attempt has sent are not sent again.

    Raises: HubError when the repository is public without `public`, or holds something else;
    otherwise what the client raises: see `localrl.export.hub.explained`.
    """
    api.whoami()  # a token that does not work is better known before anything is made
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
    """Raises: HubError when the files must not go there. What is not said to be private is not."""
    if not info.private and not public:
        raise HubError(
            f"{repo_id} is public, so nothing was uploaded. Push to a new name, make it private in "
            "its settings on the Hub, or say --public."
        )
    names = {file.rfilename for file in info.siblings or ()}
    if MARK not in names and (others := sorted(names - HUBS_OWN)):
        raise HubError(
            f"{repo_id} holds something that localrl did not push ({', '.join(others[:3])}), so it "
            "is left alone. Push to a new name."
        )


def _upload(api: HfApi, folder: Path, info: ModelInfo, message: str) -> None:
    """One commit on top of what `_check` has seen.

    An allowed file that this run does not have is left from an earlier push, and does not belong to
    these weights any more; the repository's history keeps it.
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
    """Try again after what passes by itself; a commit that got through is found, not repeated."""
    for wait in WAITS_S:
        try:
            return attempt()
        except Exception as error:
            if not is_passing(error):
                raise
        time.sleep(wait)
    return attempt()
