"""A small Hugging Face hub on this machine: models can be made, committed to and downloaded."""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_write"


class Hub:
    """What it has.

    Attributes:
        url: of it.
        models: files of each model by their names.
        private: whether each model is.
        messages: of the commits.
    """

    def __init__(self):
        self.url = ""
        self.models: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.messages: list[str] = []


@contextlib.contextmanager
def running() -> Iterator[Hub]:
    """A hub at a port of 127.0.0.1 while the `with` lasts."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, content, status=200, **headers):
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": len(data), **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = self.path.partition("?")[0]
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.answer({"error": "Invalid username or password."}, 401)
            elif path == "/api/repos/create":
                said = json.loads(body)
                name = f"{said['organization']}/{said['name']}"
                if said["organization"] != "me":
                    self.answer({"error": "You don't have the rights to create a model"}, 403)
                elif name in hub.models:
                    self.answer({"error": "exists", "url": f"{hub.url}/{name}"}, 409)
                else:
                    hub.models[name] = {}
                    hub.private[name] = (
                        said.get("visibility") == "private" or said.get("private") is True
                    )
                    self.answer({"url": f"{hub.url}/{name}", "name": name})
            elif "/preupload/" in path:
                files = json.loads(body)["files"]
                regular = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in files
                ]
                self.answer({"files": regular})
            elif "/commit/" in path:
                name = path.removeprefix("/api/models/").partition("/commit/")[0]
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "header":
                        hub.messages.append(value["summary"])
                    else:
                        hub.models[name][value["path"]] = base64.b64decode(value["content"])
                url = f"{hub.url}/{name}/commit/{'a' * 40}"
                self.answer({"commitOid": "a" * 40, "commitUrl": url, "success": True})
            else:  # the check of the card's metadata
                self.answer({"errors": [], "warnings": []})

        def do_GET(self):
            path = self.path.partition("?")[0].lstrip("/")
            name, _, file = path.removeprefix("api/models/").partition("/resolve/")
            files = hub.models.get("/".join(name.split("/")[:2]))
            if files is None:
                self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            elif file:
                content = files[file.partition("/")[2]]  # after the revision
                etag = f'"{hashlib.sha1(content).hexdigest()}"'
                self.answer(content, ETag=etag, X_Repo_Commit="a" * 40)
            elif "/tree/" in path:
                self.answer(
                    [
                        {"type": "file", "path": f, "size": len(c), "oid": "b" * 40}
                        for f, c in files.items()
                    ]
                )
            else:
                siblings = [{"rfilename": file} for file in files]
                self.answer({"id": "me/x", "sha": "a" * 40, "siblings": siblings})

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
