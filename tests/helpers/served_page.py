"""``focalnet app`` in a process of its own, which writes down what it opens for writing and whom it connects to."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

# Python tells an audit hook of every file that is opened and every connection, whoever asks.
AUDITED = """
import os, sys
log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def note(event, args):
    if event == "open" and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        os.write(log, f"write {args[0]}\\n".encode())
    elif event in ("os.mkdir", "os.rename", "os.link", "os.symlink"):
        os.write(log, f"write {args[event != 'os.mkdir']}\\n".encode())
    elif event in ("socket.connect", "socket.sendto", "socket.getaddrinfo"):
        os.write(log, f"connect {args[0 if event == 'socket.getaddrinfo' else 1]}\\n".encode())
sys.addaudithook(note)
sys.argv = ["focalnet", *sys.argv[2:]]
from focalnet.cli import main
main()
"""


class ServedPage:
    """The address and the process of a page."""

    def __init__(self, process, address, log, folder):
        self.process, self.address, self.folder = process, address.rstrip("/"), folder
        self._log = log

    def noted(self, kind):
        lines = self._log.read_text().splitlines()
        return [line.partition(" ")[2] for line in lines if line.startswith(kind)]

    def memory(self):
        """Resident bytes of the process."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(status.partition("VmRSS:")[2].split()[0])

    def get(self, path, headers=None, data=None):
        """The status and the body of an answer."""
        request = urllib.request.Request(self.address + path, data=data, headers=headers or {})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def upload(self, name, content):
        """The status and the body of the answer to an upload, as a browser sends it."""
        head = f'--cut\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
        body = head.encode() + content + b"\r\n--cut--\r\n"
        return self.get("/gradio_api/upload", {"Content-Type": "multipart/form-data; boundary=cut"}, body)

    def look_at(self, file):
        """The last message of the event that an uploaded file sets off; ``file`` is what a browser would send."""
        config = json.loads(self.get("/config")[1])
        event = next(one for one in config["dependencies"] if one["targets"][0][1] == "change")
        session = f"session{time.monotonic_ns()}"
        body = {"data": [file, 1, 1, 0], "fn_index": event["id"], "session_hash": session}
        json_body = {"Content-Type": "application/json"}
        status, answer = self.get("/gradio_api/queue/join", json_body, json.dumps(body).encode())
        assert status == 200, answer
        _, stream = self.get(f"/gradio_api/queue/data?session_hash={session}")
        messages = [json.loads(line[5:]) for line in stream.decode().splitlines() if line.startswith("data:")]
        return next(message for message in messages if message["msg"] == "process_completed")


@contextmanager
def served(folder, *arguments):
    """A page on a free port, with ``folder`` as home, working and temporary folder."""
    places = {name: folder / name for name in ("home", "work", "tmp")}
    for place in places.values():
        place.mkdir()
    log = folder / "audit.log"
    own = {"HOME": places["home"], "TMPDIR": places["tmp"], "TORCHINDUCTOR_CACHE_DIR": places["tmp"]}
    environment = os.environ | {name: str(place) for name, place in own.items()} | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", AUDITED, log, "app", "--port", "0", *arguments]
    process = subprocess.Popen(
        list(map(str, command)), cwd=places["work"], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        yield ServedPage(process, process.stdout.readline().strip(), log, folder)
    finally:
        process.terminate()
        process.wait(timeout=60)
        process.stdout.close()


def uploaded(page, name, content):
    """An uploaded file, as a browser names it in an event."""
    status, answer = page.upload(name, content)
    assert status == 200, answer
    return {"path": json.loads(answer)[0], "orig_name": name, "meta": {"_type": "gradio.FileData"}}
