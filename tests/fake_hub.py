"""A Hub in a thread: the endpoints that huggingface_hub uses to push and to pull a model."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_good"


class FakeHub:
    """Contents of the Hub.

    Attributes:
        repositories: name -> {"private", "gated", "branches": {branch: commit},
            "commits": {commit: {path: bytes}}, "messages": [message]}.
        stored: SHA-256 -> bytes, of large files.
        failing: beginnings of "METHOD path" -> status of the answer.
        seen: "METHOD path" of every request.
    """

    def __init__(self):
        self.repositories, self.stored, self.failing, self.seen = {}, {}, {}, []
        self.open_to_read = True

    def add(self, name, files=None, **settings):
        """Make a repository with one commit."""
        self.repositories[name] = {
            "private": False,
            "gated": False,
            "branches": {},
            "commits": {},
            "messages": [],
            **settings,
        }
        self.commit(name, "main", files or {}, "initial commit")
        return self.repositories[name]

    def commit(self, name, branch, files, message):
        repository = self.repositories[name]
        before = repository["commits"].get(repository["branches"].get(branch), {})
        content = {**before, **files}
        text = json.dumps([message, sorted((k, v.hex()) for k, v in content.items())])
        commit = hashlib.sha1(f"{text}{len(repository['messages'])}".encode()).hexdigest()
        repository["commits"][commit] = content
        repository["branches"][branch] = commit
        repository["messages"].append(message)
        return commit

    def files(self, name, branch="main"):
        repository = self.repositories[name]
        return repository["commits"][repository["branches"][branch]]


def make_handler(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        # ---- answers

        def answer(self, status, body=b"", **headers):
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for key, value in {"Content-Length": len(body), **headers}.items():
                self.send_header(key.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def refuse(self, status, code=None):
            headers = {} if code is None else {"X_Error_Code": code, "X_Error_Message": code}
            self.answer(status, {"error": code or "no"}, **headers)

        def body(self):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        # ---- requests

        def do_GET(self):
            self.handle_request()

        do_HEAD = do_POST = do_PUT = do_GET

        def handle_request(self):
            path = unquote(urlsplit(self.path).path)
            body = self.body()
            hub.seen.append(f"{self.command} {path}")
            for beginning, status in hub.failing.items():
                if f"{self.command} {path}".startswith(beginning):
                    return self.refuse(status)
            for method, pattern, act in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method:
                    return act(self, body, *match.groups())
            return self.refuse(404)

        def may_write(self):
            if self.headers.get("Authorization") == f"Bearer {TOKEN}":
                return True
            self.refuse(401, "Invalid credentials in Authorization header")
            return False

        def find(self, name, revision=None):
            """Return (repository, commit), or answer and return None."""
            repository = hub.repositories.get(name)
            allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            if repository is None or (repository["private"] and not allowed):
                return self.refuse(401 if not allowed else 404, "RepoNotFound")
            commit = repository["branches"].get(revision or "main", revision)
            if commit not in repository["commits"]:
                return self.refuse(404, "RevisionNotFound")
            return repository, commit

        def create(self, body):
            if not self.may_write():
                return None
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            url = f"{self.address()}/{name}"
            if name in hub.repositories:
                return self.answer(409, {"url": url, "error": "there already"})
            private = asked.get("private") or asked.get("visibility") == "private"
            hub.add(name, {".gitattributes": b""}, private=bool(private))
            return self.answer(200, {"url": url, "name": name})

        def validate(self, body):
            return self.answer(200, {"warnings": [], "errors": []})

        def branch(self, body, name, branch):
            repository, commit = self.find(name)
            if branch in repository["branches"]:
                return self.refuse(409)
            repository["branches"][branch] = commit
            return self.answer(200, {})

        def info(self, body, name, revision=None):
            found = self.find(name, revision)
            if found is None:
                return None
            repository, commit = found
            files = [{"rfilename": path} for path in repository["commits"][commit]]
            facts = {"_id": "1", "id": name, "modelId": name, "sha": commit, "siblings": files}
            return self.answer(200, {**facts, "private": repository["private"], "tags": []})

        def tree(self, body, name, revision):
            found = self.find(name, revision)
            if found is None:
                return None
            repository, commit = found
            entries = []
            for path, content in repository["commits"][commit].items():
                entry = {"type": "file", "path": path, "size": len(content), "oid": sha1(content)}
                if is_large(path):
                    oid = hashlib.sha256(content).hexdigest()
                    entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 130}
                entries.append(entry)
            return self.answer(200, entries)

        def preupload(self, body, name, revision):
            if not self.may_write() or self.find(name, revision) is None:
                return None
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_large(file["path"]) else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})

        def batch(self, body, name):
            objects = []
            for asked in json.loads(body)["objects"]:
                entry = {"oid": asked["oid"], "size": asked["size"]}
                if asked["oid"] not in hub.stored:
                    href = f"{self.address()}/upload/{asked['oid']}"
                    entry["actions"] = {"upload": {"href": href}}
                objects.append(entry)
            return self.answer(200, {"transfer": "basic", "objects": objects})

        def upload(self, body, oid):
            assert hashlib.sha256(body).hexdigest() == oid
            hub.stored[oid] = body
            return self.answer(200)

        def commit(self, body, name, revision):
            if not self.may_write() or self.find(name, revision) is None:
                return None
            files, message = {}, ""
            for line in filter(None, body.split(b"\n")):
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "header":
                    message = value["summary"]
                elif entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = hub.stored[value["oid"]]
            commit = hub.commit(name, revision, files, message)
            url = f"{self.address()}/{name}/commit/{commit}"
            return self.answer(200, {"commitUrl": url, "commitOid": commit})

        def resolve(self, body, name, revision, path):
            found = self.find(name, revision)
            if found is None:
                return None
            repository, commit = found
            if repository["gated"]:
                return self.refuse(403, "GatedRepo")
            content = repository["commits"][commit].get(path)
            if content is None:
                return self.refuse(404, "EntryNotFound")
            headers = {"X_Repo_Commit": commit, "ETag": f'"{sha1(content)}"'}
            if is_large(path):
                oid = hashlib.sha256(content).hexdigest()
                headers |= {"X_Linked_Etag": f'"{oid}"', "X_Linked_Size": len(content)}
            return self.answer(200, content, **headers)

        def address(self):
            return f"http://127.0.0.1:{self.server.server_address[1]}"

    name = r"([\w.-]+/[\w.-]+)"
    ROUTES = (
        (("POST",), "/api/repos/create", Handler.create),
        (("POST",), "/api/validate-yaml", Handler.validate),
        (("POST",), f"/api/models/{name}/branch/(.+)", Handler.branch),
        (("GET",), f"/api/models/{name}(?:/revision/(.+))?", Handler.info),
        (("GET",), f"/api/models/{name}/tree/(.+?)/?", Handler.tree),
        (("POST",), f"/api/models/{name}/preupload/(.+)", Handler.preupload),
        (("POST",), f"/{name}\\.git/info/lfs/objects/batch", Handler.batch),
        (("PUT",), "/upload/(.+)", Handler.upload),
        (("POST",), f"/api/models/{name}/commit/(.+)", Handler.commit),
        (("HEAD", "GET"), f"/{name}/resolve/([^/]+)/(.+)", Handler.resolve),
    )
    return Handler


def is_large(path):
    return path.endswith((".safetensors", ".bin"))


def sha1(content):
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


@contextmanager
def serving(hub):
    """Serve a Hub, and yield its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(hub))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
