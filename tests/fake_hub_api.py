"""The calls that `fake_hub.FakeHub` answers, one function each."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from fake_hub import Handler

TEXT = (".json", ".md", ".txt", ".jsonl", ".jinja", ".py", ".gitattributes")
"""Ends of names that the Hub takes as text; all else goes to LFS or xet."""

KIND = r"(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
REPO = r"/(?P<name>(?:datasets/)?[^/]+/[^/]+)"


def whoami(call: Handler) -> None:
    role = {"accessToken": {"role": "read" if call.hub.readonly else "write"}}
    call.answer({"type": "user", "name": call.hub.user, "orgs": [], "auth": role})


def create(call: Handler) -> None:
    wish = json.loads(call.body)
    name = f"{wish.get('organization') or call.hub.user}/{wish['name']}"
    if name in call.hub.repos:
        return call.refuse(409, "You already created this model repo")
    # Like the Hub, which writes a first commit, and is public when it is not told otherwise.
    call.hub.put(name, {".gitattributes": b""}, private=wish.get("visibility") == "private")
    return call.answer({"url": f"{call.hub.url}/{name}", "name": name})


def validate_yaml(call: Handler) -> None:
    front = re.match(r"---\n(.*?)\n---", json.loads(call.body)["content"], re.DOTALL)
    try:
        loaded = yaml.safe_load(front.group(1)) if front else None
        wrong = [] if isinstance(loaded, dict) else ["the card has no metadata"]
    except yaml.YAMLError as error:
        wrong = [str(error)]
    errors = [{"message": message} for message in wrong]
    call.answer({"errors": errors, "warnings": []}, 400 if wrong else 200)


def info(call: Handler, kind: str, name: str) -> None:
    if repo := call.repo(name, kind):
        files = [
            {"rfilename": path, "size": len(data), "blobId": repo.oid(path)}
            for path, data in sorted(repo.files.items())
        ]
        head = {"_id": "1", "id": name, "sha": repo.head, "private": repo.private}
        call.answer({**head, "tags": [], "downloads": 0, "likes": 0, "siblings": files})


def tree(call: Handler, kind: str, name: str) -> None:
    if repo := call.repo(name, kind):
        call.answer([repo.entry(path) for path in sorted(repo.files)])


def preupload(call: Handler, kind: str, name: str) -> None:
    if repo := call.repo(name, kind):
        answers = []
        for file in json.loads(call.body)["files"]:
            path = file["path"]
            mode = "regular" if path.endswith(TEXT) else "lfs"
            answer = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            if path in repo.files:
                answer["oid"] = repo.lfs.get(path) or repo.oid(path)
            answers.append(answer)
        call.answer({"files": answers})


def lfs_batch(call: Handler, name: str) -> None:
    objects = []
    for wanted in json.loads(call.body)["objects"]:
        answer = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in call.hub.blobs:
            upload = {"href": f"{call.hub.url}/lfs/{wanted['oid']}", "header": {}}
            verify = {"href": f"{call.hub.url}/lfs-verify", "header": {}}
            answer["actions"] = {"upload": upload, "verify": verify}
        objects.append(answer)
    call.answer({"transfer": "basic", "objects": objects})


def lfs_put(call: Handler, oid: str) -> None:
    if hashlib.sha256(call.body).hexdigest() != oid:
        return call.refuse(400, "sha256 mismatch")
    call.hub.blobs[oid] = call.body
    return call.answer()


def lfs_verify(call: Handler) -> None:
    wanted = json.loads(call.body)
    there = len(call.hub.blobs.get(wanted["oid"], b"")) == wanted["size"]
    call.answer(status=200 if there else 404)


def xet_token(call: Handler, kind: str, name: str) -> None:
    expires = int(time.time()) + 3600
    headers = {
        "X-Xet-Cas-Url": call.hub.url,
        "X-Xet-Access-Token": "xet",
        "X-Xet-Token-Expiration": str(expires),
    }
    call.answer({"accessToken": "xet", "casUrl": call.hub.url, "exp": expires}, headers=headers)


def store(call: Handler) -> None:
    call.hub.stored.append(call.body)
    call.answer({"was_inserted": True, "result": 1})


def commit(call: Handler, kind: str, name: str) -> None:
    if not (repo := call.repo(name, kind)):
        return None
    head, *lines = [json.loads(line) for line in call.body.splitlines() if line.strip()]
    parent = head["value"].get("parentCommit")
    if parent and parent != repo.head:
        return call.refuse(412, "A commit has happened since. Please refresh and try again.")
    for line in lines:
        key, value = line["key"], line["value"]
        path = value["path"]
        repo.lfs.pop(path, None)
        if key == "file":
            repo.files[path] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            if value["oid"] not in call.hub.blobs and not call.hub.stored:
                return call.refuse(400, f"{path} was not uploaded")
            repo.files[path] = call.hub.blobs.get(value["oid"], b"")
            repo.lfs[path] = value["oid"]
        else:
            del repo.files[path]
    changes = [(line["key"], line["value"]["path"]) for line in lines]
    oid = repo.commit(head["value"]["summary"], changes)
    url = f"{call.hub.url}/{name}/commit/{oid}"
    return call.answer({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})


def resolve(call: Handler, name: str, path: str) -> None:
    if not (repo := call.repo(name)):
        return None
    if path not in repo.files:
        return call.refuse(404, "Entry not found", "EntryNotFound")
    data, etag = repo.files[path], repo.lfs.get(path) or repo.oid(path)
    headers = {"ETag": f'"{etag}"', "X-Repo-Commit": repo.head, "Accept-Ranges": "bytes"}
    if call.command == "HEAD":
        return call.answer(b"", headers={**headers, "Content-Length": str(len(data))})
    start = re.match(r"bytes=(\d+)-", call.headers.get("Range", ""))
    if start is None:
        return call.answer(data, headers=headers)
    first = int(start.group(1))
    headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
    return call.answer(data[first:], 206, headers)


ROUTES: list[tuple[str, str, Any]] = [
    ("GET", "/api/whoami-v2", whoami),
    ("POST", "/api/repos/create", create),
    ("POST", "/api/validate-yaml", validate_yaml),
    ("GET", f"/api/{KIND}(?:/revision/[^/]+)?", info),
    ("GET", f"/api/{KIND}/tree/[^/]+", tree),
    ("POST", f"/api/{KIND}/preupload/[^/]+", preupload),
    ("POST", f"/api/{KIND}/commit/[^/]+", commit),
    ("GET", f"/api/{KIND}/xet-write-token/[^/]+", xet_token),
    ("POST", rf"{REPO}\.git/info/lfs/objects/batch", lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", lfs_put),
    ("POST", "/lfs-verify", lfs_verify),
    ("POST", "/v[12]/xorbs/.*|/v1/shards|/shards", store),
    ("GET HEAD", f"{REPO}/resolve/[^/]+/(?P<path>.+)", resolve),
]
"""Methods, address, function; whatever is not here is answered 404."""
