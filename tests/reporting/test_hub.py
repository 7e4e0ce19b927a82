"""Pushing to a stand-in for the hub: the calls of its HTTP API that the installed huggingface_hub makes, answered on 127.0.0.1.

Nothing here has been tried against the real hub.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from bench.audit.stamp import write_stamp
from bench.reporting.hub import push
from bench.reporting.tables.references import load_reference
from tests.reporting.cells import write_cell

TOKEN = "hf_of_this_test"


class Hub(ThreadingHTTPServer):
    """Takes repositories and commits, as the hub documents them, and keeps what arrives."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories: dict[str, dict[str, object]] = {}
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_) -> None:
        pass

    def do_POST(self) -> None:
        hub = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        hub.tokens.add(self.headers.get("Authorization"))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            status = 409 if name in hub.repositories else 200
            hub.repositories.setdefault(name, asked)
            self.answer(status, {"url": f"{hub.url}/datasets/{name}"})
        elif self.path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            self.answer(200, {"errors": [], "warnings": []})
        elif self.path == "/api/datasets/me/results/preupload/main":
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            self.answer(200, {"files": files})
        elif self.path == "/api/datasets/me/results/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer(200, {"commitUrl": f"{hub.url}/datasets/me/results/commit/1", "commitOid": "1" * 40})
        else:
            self.answer(404, {"error": f"the stand-in does not know {self.path}"})

    def do_GET(self) -> None:  # after a refusal the client asks whether the repository is there all the same
        self.answer(401, {"error": "Invalid username or password."})

    def answer(self, status: int, content: object) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def results(tmp_path) -> Path:
    """Two finished cells, one of them with maps; beside them what must not be sent."""
    root = tmp_path / "results"
    write_cell(root, seed=0)
    write_cell(root, seed=1, maps=False)
    unfinished = write_cell(root, seed=2)
    (unfinished / "DONE").unlink()
    (root / "trainings" / "1234").mkdir(parents=True)
    (root / "trainings" / "1234" / "model.safetensors").write_bytes(b"weights")
    next(root.glob("cells/*/DONE")).with_name("model.safetensors").write_bytes(b"weights")
    return root


def test_finished_records_and_tables_arrive_and_no_weights(hub, results):
    url = push(results, "me/results", private=False, endpoint=hub.url)
    assert url == f"{hub.url}/datasets/me/results"
    sent = {"record.json", "samples.parquet", "maps.safetensors", "DONE"}
    done = {path.parent for path in results.rglob("DONE")}
    expected = {path.relative_to(results).as_posix() for folder in done for path in folder.iterdir() if path.name in sent}
    assert len(expected) == 7
    assert set(hub.files) == expected | {"README.md", "leaderboard.csv", "leaderboard.json"}
    assert all(hub.files[path] == (results / path).read_bytes() for path in expected)
    assert b"weights" not in hub.files.values()


def test_the_card_names_its_data_and_shows_the_table(hub, results):
    push(results, "me/results", private=False, endpoint=hub.url)
    card = hub.files["README.md"].decode()
    assert "data_files: leaderboard.csv" in card
    assert "2 cells" in card
    assert "| Method" in card


def test_stamps_go_with_the_records_they_are_of(hub, results):
    stamped, changed = sorted(path.parent for path in results.rglob("DONE"))
    for folder in (stamped, changed):
        write_stamp(folder, weights_sha256="0" * 64, largest_difference=0.0)
    (changed / "VERIFIED.json").write_text('{"record_sha256": "that of another"}')
    push(results, "me/results", private=False, endpoint=hub.url)
    assert [path for path in hub.files if path.endswith("VERIFIED.json")] == [f"{stamped.relative_to(results)}/VERIFIED.json"]


def test_published_figures_stand_in_the_card_if_asked_for(hub, tmp_path):
    write_cell(tmp_path, dataset="rafdb", entry="rafdb", backbone="resnet50")
    push(tmp_path, "me/results", private=False, reference=load_reference("paper"), endpoint=hub.url)
    assert "reported, unverified" in hub.files["README.md"].decode()


@pytest.mark.parametrize("private", [False, True])
def test_a_repository_is_made_as_asked_and_may_be_there_already(hub, results, private):
    for _ in range(2):
        push(results, "me/results", private=private, endpoint=hub.url)
    assert hub.repositories["me/results"]["type"] == "dataset"
    assert hub.repositories["me/results"].get("visibility") == ("private" if private else None)


@pytest.mark.parametrize("name", ["record.json", "samples.parquet", "maps.safetensors"])
def test_nothing_is_sent_if_a_file_was_changed(hub, results, name):
    changed = next(path for path in results.rglob(name) if (path.parent / "DONE").exists())
    changed.write_bytes(changed.read_bytes() + b"\n")
    with pytest.raises(ValueError, match=rf"{changed.parent.name}/{name} was changed.*bench verify"):
        push(results, "me/results", private=False, endpoint=hub.url)
    assert not hub.repositories
    assert not hub.files


def test_who_is_not_logged_in_is_told_how(hub, results, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(OSError, match=r"hf auth login; or set HF_TOKEN"):
        push(results, "me/results", private=False, endpoint=hub.url)
    assert not hub.files


def test_a_server_that_cannot_be_reached_is_named(results, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(OSError, match=r"cannot reach http://127.0.0.1:9 .*HF_ENDPOINT"):
        push(results, "me/results", private=False, endpoint="http://127.0.0.1:9")


@pytest.mark.slow
def test_the_command_takes_endpoint_and_token_from_the_environment(hub, results, run_bench):
    done = run_bench("publish", "--hub", "me/results", "--private", cwd=results.parent, env={"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN})
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/datasets/me/results" in done.stdout
    assert hub.repositories["me/results"]["visibility"] == "private"
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert "leaderboard.csv" in hub.files
