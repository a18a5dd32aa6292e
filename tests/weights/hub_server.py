"""A small server that speaks the hub's protocol on this machine, and misbehaves on request."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_LONG = 60.0  # seconds that an answer is held at most


class HubServer:
    """Serves ``{"owner/name": {"file": bytes}}`` at ``url``, at the revisions ``main`` and ``commit``.

    ``etags`` states other hashes of files than their sha256. ``status`` answers every request so; ``cut`` closes each
    download halfway; ``corrupt`` flips a bit of it; ``stall`` holds all answers until the server ends; ``gather`` holds
    a download until as many ``HEAD`` of its file have come. ``seen`` counts ``(method, path)``. Uploads, without
    large-file storage, are added to ``repos``, the messages of their commits to ``messages``, and the visibility that
    was asked for to ``private``; ``large`` sends their files to a large-file storage, which refuses them.
    """

    def __init__(self, repos: dict[str, dict[str, bytes]] | None = None) -> None:
        self.repos = repos or {}
        self.commit = COMMIT
        self.etags: dict[str, str] = {}
        self.status: int | None = None
        self.cut = False
        self.corrupt = False
        self.stall = False
        self.gather = 0
        self._news = threading.Condition()
        self._ended = False
        self.seen: Counter[tuple[str, str]] = Counter()
        self.messages: list[str] = []
        self.private: dict[str, bool | None] = {}
        self.large = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_POST(self) -> None:
                hub.receive(self)

            def do_PUT(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                hub._refuse(self, 413, "")

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        with self._news:
            self._ended = True
            self._news.notify_all()
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        with self._news:
            self.seen[request.command, request.path] += 1
            self._news.notify_all()
            self._news.wait_for(lambda: self._ended or not self.stall, _LONG)
        repo, _, rest = request.path.lstrip("/").partition("/resolve/")
        revision, _, filename = rest.partition("/")
        if self.status is not None:
            return self._refuse(request, self.status, "")
        if repo not in self.repos:
            return self._refuse(request, 404, "RepoNotFound")
        if revision not in ("main", self.commit):
            return self._refuse(request, 404, "RevisionNotFound")
        if filename not in self.repos[repo]:
            return self._refuse(request, 404, "EntryNotFound")
        data = self.repos[repo][filename]
        request.send_response(200)
        request.send_header("ETag", f'"{self.etags.get(filename, hashlib.sha256(data).hexdigest())}"')
        request.send_header("X-Repo-Commit", self.commit)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if not body:
            return None
        if self.corrupt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        half = len(data) // 2
        request.wfile.write(data[:half])
        request.wfile.flush()
        with self._news:
            self._news.wait_for(lambda: self._ended or self.seen["HEAD", request.path] >= self.gather, _LONG)
        if self.cut:
            request.close_connection = True
            return None
        request.wfile.write(data[half:])
        return None

    def receive(self, request: BaseHTTPRequestHandler) -> None:
        """Answers the requests of an upload: creation of the repository, kinds of the files, commit."""
        self.seen[request.command, request.path] += 1
        body = request.rfile.read(int(request.headers["Content-Length"]))
        place = request.path.removeprefix("/api/").split("/")
        if self.status is not None:
            return self._refuse(request, self.status, "")
        answer: dict[str, Any] = {}  # also of the check of a README.md
        if place == ["repos", "create"]:
            asked = json.loads(body)
            repo = f"{asked.get('organization', 'user')}/{asked['name']}"
            if repo in self.repos:
                return self._answer_json(request, {"error": "exists", "url": f"{self.url}/{repo}"}, 409)
            self.repos[repo] = {}
            visible = asked.get("visibility")  # of huggingface_hub 2, for "private" of 1
            self.private[repo] = asked.get("private") if visible is None else visible == "private"
            answer = {"url": f"{self.url}/{repo}"}
        elif place[-2:] == ["preupload", "main"]:
            files = json.loads(body)["files"]
            mode = "lfs" if self.large else "regular"
            answer = {"files": [{"path": file["path"], "uploadMode": mode, "shouldIgnore": False} for file in files]}
        elif place[-2:] == ["objects", "batch"]:
            upload = {"upload": {"href": f"{self.url}/storage"}}
            objects = [{**each, "actions": upload} for each in json.loads(body)["objects"]]
            answer = {"transfer": "basic", "objects": objects}
        elif place[-2:] == ["commit", "main"]:
            repo = "/".join(place[1:3])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "header":
                    self.messages.append(line["value"]["summary"])
                else:
                    content = base64.b64decode(line["value"]["content"])
                    self.repos[repo][line["value"]["path"]] = content
            answer = {"commitUrl": f"{self.url}/{repo}/commit/{self.commit}", "commitOid": self.commit, "success": True}
        self._answer_json(request, answer, 200)

    def _answer_json(self, request: BaseHTTPRequestHandler, answer: dict[str, Any], status: int) -> None:
        data = json.dumps(answer).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def _refuse(self, request: BaseHTTPRequestHandler, status: int, code: str) -> None:
        request.send_response(status)
        if code:
            request.send_header("X-Error-Code", code)
        if code == "EntryNotFound":
            request.send_header("X-Repo-Commit", self.commit)
        request.send_header("Content-Length", "0")
        request.end_headers()
