"""A Hugging Face hub on this machine: it serves folders as repositories, and refuses as the real one does."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

COMMIT = "0123456789" * 4
# what the real one answers, by the last part of a repository's name
REFUSALS = {
    "gated": (401, "GatedRepo"),
    "closed": (403, "GatedRepo"),
    "none": (401, "RepoNotFound"),
    "forbidden": (403, ""),
}


@contextmanager
def serve(repositories: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Address of a hub that has these folders, by their names, and the list of what it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            asked.append(self.path)
            self._answer(*self._found())

        def _found(self) -> tuple[Any, ...]:
            """Status, headers and content."""
            parts = urlsplit(self.path).path.strip("/").removeprefix("datasets/").split("/")
            if parts == [""]:
                return (200,)
            for part in parts:
                if part in REFUSALS:
                    status, code = REFUSALS[part]
                    return status, {"X-Error-Code": code} if code else {}
            of_api = parts[0] == "api"
            name = "/".join(parts[2:4] if of_api else parts[:2])
            if name not in repositories:
                return 404, {"X-Error-Code": "RepoNotFound"}
            if of_api:
                about = [] if "tree" in parts else {"id": name, "sha": COMMIT, "siblings": []}
                return 200, {"Content-Type": "application/json"}, json.dumps(about).encode()
            file = repositories[name].joinpath(*parts[4:])  # name / resolve / revision / file
            if parts[2:3] != ["resolve"] or not file.is_file():
                return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
            content = file.read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, content

        def _answer(self, status: int, headers: dict[str, str] | None = None, content: bytes = b"") -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
