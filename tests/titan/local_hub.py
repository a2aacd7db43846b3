"""A Hugging Face Hub on this machine: what its own client libraries ask of it, over HTTP.

    with local_hub({"datasets/allenai/c4": folder, "owner/model": other}) as (url, seen):
        ...  # processes that start with HF_ENDPOINT=url read the folders by name

Serves folders as repositories of one revision, read-only: what a dataset holds, and files, whole or
by range.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REVISION = "0123456789abcdef0123456789abcdef01234567"
LAST_MODIFIED = "2026-01-01T00:00:00.000Z"


def _entry(folder: Path, file: Path) -> dict[str, object]:
    digest = hashlib.sha1(file.read_bytes()).hexdigest()
    name = file.relative_to(folder).as_posix()
    return {"type": "file", "path": name, "oid": digest, "size": file.stat().st_size}


class _Hub(BaseHTTPRequestHandler):
    repositories: Mapping[str, Path] = {}
    seen: list[str] = []  # noqa: RUF012 - of the class made for one server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path).strip("/")
        self.seen.append(f"{self.command} {path}")
        is_api, path = path.startswith("api/"), path.removeprefix("api/")
        name = next((name for name in self.repositories if path.startswith(f"{name}/")), "")
        folder, words = self.repositories.get(name), path.removeprefix(name).split("/")[1:]
        if folder is None:
            self._send(404, b"{}")
        elif not is_api and words[0] == "resolve":
            self._send_file(folder.joinpath(*words[2:]), with_body=with_body)
        elif is_api and words[0] == "revision":
            about = {"id": name.removeprefix("datasets/"), "sha": REVISION}
            self._send_json({**about, "lastModified": LAST_MODIFIED, "private": False, "tags": []})
        elif is_api and words[0] == "tree":
            below = folder.joinpath(*words[2:])
            files = sorted(file for file in below.rglob("*") if file.is_file())
            self._send_json([_entry(folder, file) for file in files])
        else:
            self._send(404, b"{}")

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send_file(self, file: Path, *, with_body: bool) -> None:
        if not file.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        content = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": REVISION}
        headers |= {"Accept-Ranges": "bytes"}
        span = self.headers.get("Range")
        if span is None:
            return self._send(200, content, headers, with_body=with_body)
        first, _, last = span.removeprefix("bytes=").partition("-")
        begin, end = int(first), min(int(last or len(content)) + 1, len(content))
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(content)}"
        self._send(206, content[begin:end], headers, with_body=with_body)

    def _send(
        self,
        status: int,
        body: bytes,
        headers: Mapping[str, str] | None = None,
        *,
        with_body: bool = True,
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing: tests look at `seen`."""


@contextlib.contextmanager
def local_hub(repositories: Mapping[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """(URL, the requests so far) of a server that has these folders, while the context lasts."""
    handler = type("Hub", (_Hub,), {"repositories": repositories, "seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", handler.seen
    finally:
        server.shutdown()
        server.server_close()
