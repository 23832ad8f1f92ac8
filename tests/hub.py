"""A hub on this machine: the endpoints that publishing calls, answered as huggingface.co answers huggingface_hub.

    with Hub() as hub:
        hub.users["hf_..."] = "fox"
        ... HF_ENDPOINT=hub.url python -m infer.publish ...
        hub.repositories["fox/name"].files["README.md"]

Files go to it by git LFS where HF_HUB_DISABLE_XET is set, else as huggingface.co has them: by hf_xet, which cuts them
into pieces, many of which come in one request. Of those the lengths are kept, and `files` has the sha256 that was told.

A fault is put in the way of a kind of request: hub.faults["commit"] = [503, "cut"] answers the first with 503 and cuts
the connection of the second in the middle; the third goes through. "lost" does what was asked and cuts then, "silent"
does nothing.
"""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

ROUTES = {  # kind: (method, path)
    "whoami": ("GET", r"/api/whoami-v2"),
    "create": ("POST", r"/api/repos/create"),
    "validate": ("POST", r"/api/validate-yaml"),
    "may write": ("GET", r"/api/models/([^/]+/[^/]+)/auth-check/write"),
    "info": ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/main)?"),
    "preupload": ("POST", r"/api/models/([^/]+/[^/]+)/preupload/main"),
    "commit": ("POST", r"/api/models/([^/]+/[^/]+)/commit/main"),
    "batch": ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch"),
    "upload": ("PUT", r"/storage/([0-9a-f]{64})"),
    "verify": ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/verify"),
    "xet": ("GET", r"/api/models/([^/]+/[^/]+)/xet-write-token/main"),
    "pieces": ("POST", r"/v1/xorbs/default/([0-9a-f]{64})"),
    "shard": ("POST", r"/v1/shards"),  # which pieces make which file
}
# A storage service trusts an address that nobody else knows, or a token for an hour; the hub's may not arrive there.
STORAGE = {"upload": "", "pieces": "for-an-hour", "shard": "for-an-hour"}
LFS = (".safetensors", ".png")  # what the hub's .gitattributes would send there


@dataclass
class Repository:
    private: bool = False
    files: dict = field(default_factory=dict)  # path: bytes, or the sha256 of what came in pieces
    commits: list = field(default_factory=lambda: ["0" * 40])
    lines: list = field(default_factory=list)  # of every commit, as they arrived

    @property
    def sha(self):
        return self.commits[-1]


class Hub:
    def __init__(self):
        self.users, self.repositories, self.storage = {}, {}, {}  # token: user, id: Repository, sha256: bytes
        self.pieces = []  # lengths in bytes
        self.faults, self.requests = {}, []  # kind: what is next, [(kind, body)]
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # an answer in two parts would wait 40 ms

            def handle_one(self):
                hub.handle(self)

            do_GET = do_POST = do_PUT = handle_one

            def log_message(self, *_):
                """Nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def kinds(self):
        return [kind for kind, _ in self.requests]

    def handle(self, request):
        path = request.path.split("?")[0]
        for kind, (method, pattern) in ROUTES.items():
            if request.command == method and (found := re.fullmatch(pattern, path)):
                break
        else:
            request.rfile.read(int(request.headers.get("content-length", 0)))
            self.requests.append((f"{request.command} {path}", b""))
            return self.answer(request, 404, dict(error="no such address"))
        fault = self.faults[kind].pop(0) if self.faults.get(kind) else None
        length = int(request.headers.get("content-length", 0))
        if fault == "cut":  # after half of what is sent, as when a cable is pulled
            request.rfile.read(length // 2)
            request.connection.shutdown(socket.SHUT_RDWR)
            request.close_connection = True
            return None
        if fault == "silent":
            threading.Event().wait(1)
            request.close_connection = True
            return None
        body = self.chunks(request) if "chunked" in request.headers.get("transfer-encoding", "") else None
        body = request.rfile.read(length) if body is None else body
        self.requests.append((kind, body))
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if kind in STORAGE:
            assert token == STORAGE[kind], "the token went to the storage"
        elif token not in self.users:
            return self.answer(request, 401, dict(error="Invalid credentials in Authorization header"))
        if fault == "lost":  # done, but the answer does not arrive
            self.act(kind, found.groups(), body, self.users.get(token))
            request.connection.shutdown(socket.SHUT_RDWR)
            request.close_connection = True
            return None
        if fault:
            return self.answer(request, fault, dict(error="try again later"))
        return self.answer(request, *self.act(kind, found.groups(), body, self.users.get(token)))

    @staticmethod
    def chunks(request):
        body = b""
        while size := int(request.rfile.readline(), 16):
            body += request.rfile.read(size)
            request.rfile.readline()
        request.rfile.readline()
        return body

    @staticmethod
    def answer(request, status, content):
        data = json.dumps(content).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def act(self, kind, where, body, user):
        """-> (status, content)"""
        repository = self.repositories.get(where[0]) if where else None
        if kind == "upload":
            assert hashlib.sha256(body).hexdigest() == where[0]
            self.storage[where[0]] = body
            return 200, {}
        if kind == "pieces":  # each has its length packed, its kind of packing, and its length in front
            while body[0] == 0:
                self.pieces.append(int.from_bytes(body[5:8], "little"))
                body = body[8 + int.from_bytes(body[1:4], "little") :] or b"end"
            return 200, dict(was_inserted=True)
        if kind == "shard":
            return 200, dict(result=1)
        if kind == "whoami":
            return 200, dict(type="user", name=user, orgs=[])
        if kind == "create":
            return self.create(json.loads(body), user)
        if kind == "validate":
            return self.validate(json.loads(body)["content"])
        if repository is None or repository.private and where[0].split("/")[0] != user:
            return 404, dict(error="Repository not found")
        if kind == "info":
            siblings = [dict(rfilename=path) for path in repository.files]
            return 200, dict(id=where[0], sha=repository.sha, private=repository.private, siblings=siblings, tags=[])
        if where[0].split("/")[0] != user:
            return 403, dict(error=f"You don't have write access to {where[0]}")
        return getattr(self, kind.replace(" ", "_"))(where[0], repository, body)

    def create(self, asked, user):
        owner = asked.get("organization") or user
        name = f"{owner}/{asked['name']}"
        if owner != user:
            return 403, dict(error=f"You don't have the rights to create a model under the namespace {owner!r}")
        if name in self.repositories:
            return 409, dict(error="You already created this model repo", url=f"{self.url}/{name}")
        private = asked.get("private") is True or asked.get("visibility") == "private"
        self.repositories[name] = Repository(private)
        return 200, dict(url=f"{self.url}/{name}", name=name)

    @staticmethod
    def validate(text):
        head = yaml.safe_load(re.match(r"---\n([\S\s]*?)\n---\n", text)[1])
        errors = [dict(message=f'"{name}" must be a string') for name in ("license", "base_model", "instance_prompt")
                  if not isinstance(head.get(name, ""), str)]  # fmt: skip
        return (400, dict(errors=errors, warnings=[])) if errors else (200, dict(errors=[], warnings=[]))

    def may_write(self, name, repository, body):
        return 200, {}

    def preupload(self, name, repository, body):
        files = []
        for asked in json.loads(body)["files"]:
            path = asked["path"]
            mode, there = "lfs" if path.endswith(LFS) else "regular", repository.files.get(path)
            found = dict(path=path, uploadMode=mode, shouldIgnore=False)
            if isinstance(there, str):
                found["oid"] = there
            elif there is not None:
                git = hashlib.sha1(b"blob %d\0" % len(there) + there)
                found["oid"] = (hashlib.sha256(there) if mode == "lfs" else git).hexdigest()
            files.append(found)
        return 200, dict(files=files)

    def batch(self, name, repository, body):
        objects = []
        for asked in json.loads(body)["objects"]:
            if asked["oid"] not in self.storage:
                verify = dict(href=f"{self.url}/{name}.git/info/lfs/objects/verify")
                asked["actions"] = dict(upload=dict(href=f"{self.url}/storage/{asked['oid']}"), verify=verify)
            objects.append(asked)
        return 200, dict(transfer="basic", objects=objects)

    def verify(self, name, repository, body):
        asked = json.loads(body)
        there = self.storage.get(asked["oid"])
        return (200, {}) if there is not None and len(there) == asked["size"] else (404, dict(error="not there"))

    def xet(self, name, repository, body):
        return 200, dict(accessToken=STORAGE["pieces"], exp=int(time.time()) + 3600, casUrl=self.url)

    def commit(self, name, repository, body):
        lines = [json.loads(line) for line in body.splitlines()]
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.storage.get(value["oid"], value["oid"])
            elif line["key"] == "deletedFile":
                del repository.files[value["path"]]
        repository.lines.append(lines)
        repository.commits.append(hashlib.sha1(body + repository.sha.encode()).hexdigest())
        return 200, dict(commitUrl=f"{self.url}/{name}/commit/{repository.sha}", commitOid=repository.sha, success=True)
