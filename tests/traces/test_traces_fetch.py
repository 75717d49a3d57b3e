"""Fetching from a server on this machine: checksums, whole or nothing, clear errors."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from l3env.errors import TraceError
from l3env.traces import catalog
from l3env.traces.fetch import fetch

BODY = b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,3,4\n" + b"2023-11-16 18:15:47,5,6\n" * 9000


class Handler(BaseHTTPRequestHandler):
    requests_count = 0

    def do_GET(self) -> None:
        type(self).requests_count += 1
        if self.path == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY if self.path != "/cut" else BODY[:100])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Handler.requests_count = 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("L3ENV_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "traces"


def manifest(folder: Path, url: str, checksum: str) -> Path:
    path = folder / f"{hashlib.sha256((url + checksum).encode()).hexdigest()[:8]}.toml"
    path.write_text(
        f'[demo]\nwhat = "x"\nformat = "azure-csv"\nfiles = ["a/demo.csv", "a/demo.part.csv"]\nurl = "{url}"\n'
        f'licence = "none"\nrequests = 1\nbytes = 1\nstored_sha256 = ""\n{checksum}\n'
    )
    return path


def whole(body: bytes) -> str:
    return f'url_sha256 = "{hashlib.sha256(body).hexdigest()}"'


def test_fetch_checks_and_keeps(tmp_path: Path, server: str, cache: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    source = manifest(tmp_path, f"{server}/demo", whole(BODY))
    path = fetch("demo", lambda done, total: seen.append((done, total)), manifest=source)
    assert path == cache / "a" / "demo.csv"
    assert path.read_bytes() == BODY
    assert seen[-1] == (len(BODY), len(BODY))
    assert fetch("demo", manifest=source) == path
    assert Handler.requests_count == 1  # a good copy is not fetched again
    path.write_bytes(b"damaged")
    assert fetch("demo", manifest=source).read_bytes() == BODY
    assert Handler.requests_count == 2


def test_a_published_file_is_checked_by_the_rows_we_know(tmp_path: Path, server: str, cache: Path) -> None:
    known = hashlib.sha256(BODY[:5000]).hexdigest()
    good = f'url_prefix_bytes = 5000\nurl_prefix_sha256 = "{known}"'
    assert fetch("demo", manifest=manifest(tmp_path, f"{server}/demo", good)).read_bytes() == BODY
    (cache / "a" / "demo.csv").unlink()
    bad = f'url_prefix_bytes = 4999\nurl_prefix_sha256 = "{known}"'
    with pytest.raises(TraceError, match="first 4999 bytes"):
        fetch("demo", manifest=manifest(tmp_path, f"{server}/demo", bad))


@pytest.mark.parametrize(
    ("page", "checksum", "expected"),
    [
        ("demo", whole(b"other"), "nothing was kept"),
        ("demo", "", "no checksum"),
        ("missing", whole(BODY), "answers 404"),
        ("cut", whole(BODY), "demo: .*/cut"),
    ],
)
def test_failures_leave_nothing(
    tmp_path: Path, server: str, cache: Path, page: str, checksum: str, expected: str
) -> None:
    with pytest.raises(TraceError, match=expected):
        fetch("demo", manifest=manifest(tmp_path, f"{server}/{page}", checksum))
    assert list((cache / "a").iterdir()) == []


def test_no_network(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(TraceError, match=r"cannot be reached .*L3ENV_TRACE_DIR"):
        fetch("demo", manifest=manifest(tmp_path, "http://127.0.0.1:9/demo", whole(BODY)))
    assert list((cache / "a").iterdir()) == []


def test_names(cache: Path) -> None:
    with pytest.raises(TraceError, match="'nothing' is not in the manifest; expected one of azure-conv-2023"):
        fetch("nothing")
    with pytest.raises(TraceError, match=r"published as many files at https://github\.com/alibaba/ServeGen"):
        fetch("servegen-deepseek-r1")


def test_a_fetched_file_is_found_by_name(server: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "azure-2023").mkdir(parents=True)
    (cache / "azure-2023" / "AzureLLMInferenceTrace_conv.csv").write_bytes(BODY)
    monkeypatch.delenv("L3ENV_TRACE_DIR", raising=False)
    monkeypatch.setattr(catalog, "CHECKOUT", cache / "no" / "checkout")
    workload = catalog.resolve("azure-conv-2023", 0)
    assert workload is not None
    assert len(workload) == 9001
    assert "part" not in workload.source  # the whole file, not the part the manifest describes


def test_a_damaged_manifest(tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_text('[demo]\nwhat = "x"\ncolour = 1\n')
    with pytest.raises(TraceError, match=r"\[demo\]: unknown key colour"):
        catalog.read_manifest(path)
    other = tmp_path / "n.toml"
    other.write_text('[demo]\nwhat = "x"\n')
    with pytest.raises(TraceError, match=r"\[demo\].*missing"):
        catalog.read_manifest(other)
