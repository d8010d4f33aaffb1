"""A Hub of models on this machine: an HTTP server with those parts of its interface that huggingface_hub uses here."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from huggingface_hub import ModelCard

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Serves repositories, and takes uploads and new repositories.

    Attributes:
        url: address of the server.
        repositories: by name, such as "user/model", the content of each file by path.
        private: by name, whether the repository was made private.
        paths: paths that were requested.
    """

    def __init__(self):
        self.repositories = {}
        self.private = {}
        self.paths = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()

    def add(self, name, folder):
        """Adds a repository with the files of a folder."""
        files = (path for path in folder.rglob("*") if path.is_file())
        self.repositories[name] = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, content=b"", status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.hub.paths.append(path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            name = match[1]
            if name not in self.hub.repositories:
                return self.missing("RepoNotFound")
            files = [{"rfilename": file} for file in sorted(self.hub.repositories[name])]
            return self.answer({"id": name, "sha": COMMIT, "siblings": files, "tags": [], "private": False})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+", path):
            files = self.hub.repositories[match[1]].items()
            listed = [{"type": "file", "path": f, "size": len(c), "oid": digest(c)} for f, c in files]
            return self.answer(listed)
        name, _, rest = path[1:].partition("/resolve/")
        file = rest.partition("/")[2]
        if name not in self.hub.repositories:
            return self.missing("RepoNotFound")
        if file not in self.hub.repositories[name]:
            return self.missing("EntryNotFound")
        content = self.hub.repositories[name][file]
        return self.answer(content, ETag=f'"{digest(content)}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    def missing(self, code):
        self.answer(status=404, X_Error_Code=code, X_Error_Message="not there", X_Repo_Commit=COMMIT)

    def do_POST(self):
        self.hub.paths.append(self.path)
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.headers.get("Authorization") != "Bearer token":
            return self.answer({"error": "Invalid username or password."}, 401)
        if self.path == "/api/validate-yaml":  # the Hub demands a header with these
            header = ModelCard(json.loads(body)["content"]).data
            absent = [name for name in ("license", "library_name") if header.get(name) is None]
            return self.answer({"errors": [{"message": f"no {name}"} for name in absent], "warnings": []})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if name in self.hub.repositories:
                return self.answer({"url": f"{self.hub.url}/{name}", "name": name}, 409)
            self.hub.repositories[name] = {}
            self.hub.private[name] = asked.get("private") or asked.get("visibility") == "private"
            return self.answer({"url": f"{self.hub.url}/{name}", "name": name})
        name, _, action = self.path.removeprefix("/api/models/").rpartition("/main")[0].rpartition("/")
        if action == "preupload":
            files = json.loads(body)["files"]
            return self.answer(
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
                    ]
                }
            )
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.hub.repositories[name][line["value"]["path"]] = content
        return self.answer({"commitUrl": f"{self.hub.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT})


def digest(content):
    return hashlib.sha256(content).hexdigest()
