# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""A small Hugging Face Hub on this machine, for what huggingface_hub and diffusers say to the real one."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants, hf_api


Files = dict[str, bytes]


class Hub:
    """Repositories by name, each its files by revision. Uploads go to the revision "main"."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Files]] = {}
        self.url = ""

    def put(self, repo_id: str, folder: Path, revision: str = "main") -> None:
        files = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
        self.repositories.setdefault(repo_id, {})[revision] = files

    def revision(self, repo_id: str, name: str) -> Files:
        """Raises the name of the Hub's own error for what is not there."""
        if repo_id not in self.repositories:
            raise LookupError("RepoNotFound")
        revisions = self.repositories[repo_id]
        for revision, files in revisions.items():
            if name in (revision, commit_of(revision, files)):
                return files
        raise LookupError("RevisionNotFound")

    def file(self, repo_id: str, revision: str, name: str) -> bytes:
        files = self.revision(repo_id, revision)
        if name not in files:
            raise LookupError("EntryNotFound")
        return files[name]


def commit_of(revision: str, files: Files) -> str:
    """Forty hexadecimal digits, as a commit has."""
    sizes = sorted((name, len(data)) for name, data in files.items())
    return hashlib.sha1(repr((revision, sizes)).encode()).hexdigest()


class Answers(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *arguments) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        try:
            if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                repo_id, revision, name = match.groups()
                data = self.hub.file(*match.groups())
                commit = commit_of(*self.named(repo_id, revision))
                etag = hashlib.sha1(data).hexdigest()
                self.say(data, ETag=f'"{etag}"', **{"X-Repo-Commit": commit, "Accept-Ranges": "bytes"})
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
                repo_id, revision = match[1], match[2] or "main"
                files = self.hub.revision(repo_id, revision)
                siblings = [{"rfilename": name} for name in files]
                about = {"id": repo_id, "sha": commit_of(*self.named(repo_id, revision)), "siblings": siblings}
                self.say_json(about | {"tags": [], "private": False})
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
                files = self.hub.revision(*match.groups())
                self.say_json(
                    [
                        {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                        for name, data in files.items()
                    ]
                )
            else:
                self.refuse("EntryNotFound")
        except LookupError as error:
            self.refuse(str(error))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        if path == "/api/validate-yaml":
            self.say_json({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            repo_id = f"{asked['organization']}/{asked['name']}"
            self.hub.repositories.setdefault(repo_id, {"main": {}})
            self.say_json({"url": f"{self.hub.url}/{repo_id}", "id": repo_id})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            names = [file["path"] for file in json.loads(body)["files"]]
            self.say_json({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            files = self.hub.repositories[match[1]]["main"]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = commit_of("main", files)
            url = f"{self.hub.url}/{match[1]}/commit/{commit}"
            self.say_json({"success": True, "commitOid": commit, "commitUrl": url})
        else:
            self.refuse("EntryNotFound")

    def named(self, repo_id: str, revision: str) -> tuple[str, Files]:
        files = self.hub.revision(repo_id, revision)
        return next((name, files) for name, each in self.hub.repositories[repo_id].items() if each is files)

    def refuse(self, error: str) -> None:
        self.say(b"", status=404, **{"X-Error-Code": error, "X-Error-Message": error})

    def say_json(self, answer) -> None:
        self.say(json.dumps(answer).encode(), **{"Content-Type": "application/json"})

    def say(self, data: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


class Server(ThreadingHTTPServer):
    request_queue_size = 64  # diffusers fetches a model's files at once


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    server = Server(("127.0.0.1", 0), type("TheseAnswers", (Answers,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    """What huggingface_hub talks to in this process. Its address and whether to ask it are read when it is imported."""
    with running_hub() as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setenv("HF_TOKEN", "hf_none")
        yield hub
