"""A server on a free port of this machine that speaks as much of the Hub's protocol as we use."""

import hashlib
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

GOOD_TOKEN = "hf_good"


@dataclass
class Repository:
    """Files by revision, and who may read them."""

    files: dict  # revision -> {filename: bytes}
    is_gated: bool = False
    wrong_sha256: set = field(default_factory=set)  # files that the server states a wrong one of


@dataclass
class Server:
    """What is served, and the requests that came: (method, path)."""

    url: str
    repositories: dict = field(default_factory=dict)  # "owner/name" -> Repository
    files: dict = field(default_factory=dict)  # "/path" -> bytes, as on any other server
    cut: set = field(default_factory=set)  # paths that break off half-way
    requests: list = field(default_factory=list)


def commit_of(repository, revision):
    return hashlib.sha1(f"{repository} {revision}".encode()).hexdigest()


@contextmanager
def serve():
    """Serves until the block ends."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    http.served = Server(url=f"http://127.0.0.1:{http.server_port}")
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield http.served
    finally:
        http.shutdown()
        http.server_close()
        thread.join(timeout=10)


class _Handler(BaseHTTPRequestHandler):
    timeout = 10

    def do_HEAD(self):
        self.server.served.requests.append((self.command, self.path))
        path = self.path.split("?")[0]
        if "/resolve/" in path:
            self._answer_as_hub(*path[1:].split("/resolve/"))
        elif path in self.server.served.files:
            self._answer(200, self.server.served.files[path], cut=path in self.server.served.cut)
        else:
            self._answer(404)

    do_GET = do_HEAD

    def log_message(self, format, *args):
        pass

    def _answer_as_hub(self, name, rest):
        revision, filename = rest.split("/", 1)
        repository = self.server.served.repositories.get(name)
        if repository is None:
            return self._answer(404, error="RepoNotFound")
        if repository.is_gated and self.headers.get("Authorization") != f"Bearer {GOOD_TOKEN}":
            return self._answer(403, error="GatedRepo")
        commits = {commit_of(name, known): known for known in repository.files}
        files = repository.files.get(commits.get(revision, revision))
        if files is None:
            return self._answer(404, error="RevisionNotFound")
        commit = revision if revision in commits else commit_of(name, revision)
        headers = {"X-Repo-Commit": commit}
        if filename not in files:
            return self._answer(404, error="EntryNotFound", headers=headers)
        content = files[filename]
        headers["ETag"] = f'"{hashlib.sha1(content).hexdigest()}"'
        if not filename.endswith(".json"):  # the Hub keeps large files apart
            stated = b"another" if filename in repository.wrong_sha256 else content
            headers["X-Linked-Etag"] = f'"{hashlib.sha256(stated).hexdigest()}"'
            headers["X-Linked-Size"] = str(len(content))
        return self._answer(200, content, headers=headers)

    def _answer(self, status, content=b"", *, error=None, headers=None, cut=False):
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) // 2] if cut else content)
