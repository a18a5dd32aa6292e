"""Downloads, driven through the real hub client against a server on this machine."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import huggingface_hub.file_download
import pytest

from lamzoo import hub
from lamzoo.errors import HashMismatchError, WeightsError, WeightsNotFoundError
from lamzoo.weights.files import read_state_dict
from tests.weights.hub_server import COMMIT, HubServer

REPO, FILE = "zoo/model", "model.safetensors"
DATA = bytes(range(256)) * 1000


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with HubServer({REPO: {FILE: DATA}}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def leftovers(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.suffix == ".incomplete" or path.name.startswith("tmp_")]


def test_a_file_is_downloaded_once_and_then_comes_from_the_cache(server: HubServer, tmp_path: Path) -> None:
    path = hub.download(REPO, FILE, cache_dir=tmp_path)
    assert path.read_bytes() == DATA
    asked = sum(server.seen.values())
    assert hub.download(REPO, FILE, cache_dir=tmp_path) == path
    assert hub.download(REPO, FILE, revision=COMMIT, cache_dir=tmp_path) == path
    assert sum(server.seen.values()) == asked


@pytest.mark.parametrize(
    ("repo", "file", "revision", "says"),
    [
        ("zoo/other", FILE, None, "no repository 'zoo/other'"),
        (REPO, "other.safetensors", None, "no file zoo/model/other.safetensors"),
        (REPO, FILE, "v9", "no revision 'v9'"),
    ],
)
def test_a_404_names_what_is_not_there(
    server: HubServer, tmp_path: Path, repo: str, file: str, revision: str | None, says: str
) -> None:
    with pytest.raises(WeightsNotFoundError, match=says):
        hub.download(repo, file, revision=revision, cache_dir=tmp_path)


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_server_error_is_one_error_at_once(server: HubServer, tmp_path: Path, status: int) -> None:
    server.status = status
    with pytest.raises(WeightsError, match=f"The hub answered {status} for zoo/model/model.safetensors"):
        hub.download(REPO, FILE, cache_dir=tmp_path)
    assert sum(server.seen.values()) == 1


@pytest.mark.parametrize(("chunk", "says"), [(10_000_000, "broke off"), (1000, "stopped halfway 3 times")])
def test_a_download_that_stops_halfway_ends_in_one_error_and_leaves_nothing(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, says: str
) -> None:
    # A file longer than a chunk brings some bytes with each attempt, which the hub client repeats without end.
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", chunk)
    monkeypatch.setattr(huggingface_hub.file_download, "time", SimpleNamespace(sleep=lambda seconds: None))
    server.cut = True
    with pytest.raises(WeightsError, match=says):
        hub.download(REPO, FILE, cache_dir=tmp_path)
    assert not leftovers(tmp_path)
    assert hub.cached(REPO, FILE, cache_dir=tmp_path) is None
    server.cut = False
    assert hub.download(REPO, FILE, cache_dir=tmp_path).read_bytes() == DATA


def test_a_server_that_never_answers_is_given_up_within_ten_seconds(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hub.ANSWER_SECONDS < 10
    monkeypatch.setattr(hub, "ANSWER_SECONDS", 1.0)
    server.stall = True
    start = time.monotonic()
    with pytest.raises(hub.HubUnreachableError, match=r"127\.0\.0\.1"):
        hub.download(REPO, FILE, cache_dir=tmp_path)
    assert time.monotonic() - start < 30


def test_no_network_fails_at_once_and_says_how_to_bring_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub, "hf_hub_download", None)  # which tries for half a minute
    with pytest.raises(hub.HubUnreachableError, match="hf download zoo/model model.safetensors"):
        hub.download(REPO, FILE, cache_dir=tmp_path)


def test_name_resolution_that_hangs_is_given_up_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(hub, "ANSWER_SECONDS", 0.3)
    done = threading.Event()
    monkeypatch.setattr(hub, "get_hf_file_metadata", lambda *args, **kwargs: done.wait(60))
    start = time.monotonic()
    try:
        with pytest.raises(hub.HubUnreachableError, match="does not answer"):
            hub.download(REPO, FILE, cache_dir=tmp_path)
        assert time.monotonic() - start < 30
    finally:
        done.set()


def test_offline_uses_the_cache_and_never_asks(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = hub.download(REPO, FILE, cache_dir=tmp_path)
    server.seen.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.download(REPO, FILE, cache_dir=tmp_path) == path
    with pytest.raises(hub.HubUnreachableError, match="HF_HUB_OFFLINE"):
        hub.download(REPO, "other.safetensors", cache_dir=tmp_path)
    assert not server.seen


def test_a_read_only_cache_is_read_and_refuses_a_download_in_one_sentence(server: HubServer, tmp_path: Path) -> None:
    # In a child process, so that it can give up root, whom no file mode stops.
    for folder in [tmp_path, *tmp_path.parents]:
        if Path(tempfile.gettempdir()) in folder.parents:
            folder.chmod(0o755)
    cache = tmp_path / "cache"
    hub.download(REPO, FILE, cache_dir=cache)
    for path in [cache, *cache.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o555 if path.is_dir() else 0o444)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            found = hub.download(REPO, FILE, cache_dir=cache).read_bytes() == DATA
            server.repos["zoo/second"] = {FILE: DATA}
            try:
                hub.download("zoo/second", FILE, cache_dir=cache)
                said = "no error"
            except WeightsError as error:
                said = str(error)
            os.write(writing, f"{found} {said}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    server.repos["zoo/second"] = {FILE: DATA}
    os.waitpid(child, 0)
    answer = os.read(reading, 10_000).decode()
    os.close(reading)
    for path in [cache, *cache.rglob("*")]:
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
    assert answer.startswith("True zoo/second/model.safetensors cannot be stored in the cache"), answer
    assert "Permission denied" in answer


def test_a_full_disk_leaves_nothing_half_written(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(url: str, temp_file: object, **kwargs: object) -> None:
        temp_file.write(DATA[:100])  # type: ignore[attr-defined]
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(huggingface_hub.file_download, "http_get", full)
    with pytest.raises(WeightsError, match="No space left on device"):
        hub.download(REPO, FILE, cache_dir=tmp_path)
    assert not leftovers(tmp_path)
    assert hub.cached(REPO, FILE, cache_dir=tmp_path) is None


def test_two_processes_that_want_one_file_download_it_once(server: HubServer, tmp_path: Path) -> None:
    hub.download(REPO, FILE, cache_dir=tmp_path / "alone")
    heads = server.seen["HEAD", f"/{REPO}/resolve/main/{FILE}"]
    server.seen.clear()
    server.gather = 2 * heads  # the first to download waits for the other to want the file, too
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        jobs = [pool.submit(hub.download, REPO, FILE, cache_dir=tmp_path / "both") for _ in range(2)]
        paths = [job.result(timeout=60) for job in jobs]
    assert paths[0] == paths[1]
    assert paths[0].read_bytes() == DATA
    assert server.seen["HEAD", f"/{REPO}/resolve/main/{FILE}"] >= 2 * heads
    assert server.seen["GET", f"/{REPO}/resolve/main/{FILE}"] == 1


def flip(path: Path) -> None:
    data = path.read_bytes()
    path.resolve().write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def test_a_download_that_arrives_damaged_is_not_kept_and_the_next_one_is_right(
    server: HubServer, tmp_path: Path
) -> None:
    server.corrupt = True
    with pytest.raises(HashMismatchError, match="arrived twice with another sha256"):
        hub.download(REPO, FILE, cache_dir=tmp_path)
    assert hub.cached(REPO, FILE, cache_dir=tmp_path) is None
    server.corrupt = False
    assert hub.download(REPO, FILE, cache_dir=tmp_path).read_bytes() == DATA


@pytest.mark.parametrize("etag", [hashlib.sha256(DATA).hexdigest(), git_sha1(DATA)])
def test_a_file_that_was_damaged_in_the_cache_is_downloaded_again(server: HubServer, tmp_path: Path, etag: str) -> None:
    server.etags[FILE] = etag
    path = hub.download(REPO, FILE, cache_dir=tmp_path)
    flip(path)
    assert hub.download(REPO, FILE, cache_dir=tmp_path).read_bytes() == DATA
    asked = sum(server.seen.values())
    assert hub.download(REPO, FILE, cache_dir=tmp_path).read_bytes() == DATA
    assert sum(server.seen.values()) == asked


def test_a_mirror_with_names_of_its_own_is_believed(server: HubServer, tmp_path: Path) -> None:
    server.etags[FILE] = "7-5f3"
    path = hub.download(REPO, FILE, cache_dir=tmp_path)
    assert hub.is_intact(path) is None
    assert hub.download(REPO, FILE, cache_dir=tmp_path) == path


def test_damaged_weights_are_removed_with_their_blob_for_every_snapshot_that_links_it(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_CHECKED_BYTES", 0)  # as for weights, which are checked when they are read
    old = hub.download(REPO, FILE, revision=COMMIT, cache_dir=tmp_path)
    server.commit = COMMIT[::-1]
    new = hub.download(REPO, FILE, cache_dir=tmp_path)
    assert new != old
    assert new.samefile(old)
    flip(new)
    with pytest.raises(HashMismatchError, match="it was removed from the cache"):
        read_state_dict(new)
    assert not new.is_symlink()
    assert hub.download(REPO, FILE, cache_dir=tmp_path).read_bytes() == DATA
    assert hub.download(REPO, FILE, revision=COMMIT, cache_dir=tmp_path).read_bytes() == DATA


def test_a_refused_file_that_is_as_the_hub_had_it_gives_way_to_a_newer_commit(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = hub.download(REPO, FILE, cache_dir=tmp_path)
    server.repos[REPO][FILE], server.commit = b"better", COMMIT[::-1]
    assert hub.download(REPO, FILE, cache_dir=tmp_path) == bad
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "unset HF_HUB_OFFLINE" in str(hub.discard(bad))
    assert hub.download(REPO, FILE, cache_dir=tmp_path) == bad
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert "tell its authors" in str(hub.discard(bad))
    assert bad.read_bytes() == DATA
    better = hub.download(REPO, FILE, cache_dir=tmp_path)
    assert better.read_bytes() == b"better"
    server.repos[REPO][FILE] = b"best"  # of the same commit, as a mirror may do
    assert "tell its authors" in str(hub.discard(better))
    assert hub.download(REPO, FILE, cache_dir=tmp_path).read_bytes() == b"best"


@pytest.mark.parametrize("revision", [None, COMMIT])
def test_a_refused_file_that_is_as_the_hub_has_it_stays_for_other_programs(
    server: HubServer, tmp_path: Path, revision: str | None
) -> None:
    path = hub.download(REPO, FILE, revision=revision, cache_dir=tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for server.status in (None, 503, None):
        assert "tell its authors" in str(hub.discard(path))
        assert hub.download(REPO, FILE, revision=revision, cache_dir=tmp_path) == path
    assert sorted(tmp_path.rglob("*")) == before
    assert path.read_bytes() == DATA


def test_a_folder_in_place_of_a_cached_file_is_named(server: HubServer, tmp_path: Path) -> None:
    blob = hub.download(REPO, FILE, cache_dir=tmp_path).resolve()
    blob.unlink()
    blob.mkdir()
    with pytest.raises(WeightsError, match=f"it is a folder.*delete {blob}"):
        hub.download(REPO, FILE, cache_dir=tmp_path)
    blob.rmdir()
    assert hub.download(REPO, FILE, cache_dir=tmp_path).read_bytes() == DATA


def test_only_files_of_a_hub_cache_are_removed(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / "x"
    linked = tmp_path / "models--a--b" / "snapshots" / COMMIT / FILE
    for path in (blob, linked):
        path.parent.mkdir(parents=True)
    blob.write_bytes(DATA)
    linked.symlink_to(blob)
    assert hub.discard(blob) is None
    assert hub.discard(linked) is None  # it links to another place than the cache's
    assert blob.read_bytes() == linked.read_bytes() == DATA


@pytest.mark.parametrize("content", [b"\xff\xfe", b"", b"../../..", b"a\0b"])
def test_a_damaged_reference_is_written_again(server: HubServer, tmp_path: Path, content: bytes) -> None:
    path = hub.download(REPO, FILE, cache_dir=tmp_path)
    reference = path.parents[2] / "refs" / "main"
    reference.write_bytes(content)
    assert hub.download(REPO, FILE, cache_dir=tmp_path) == path
    assert reference.read_text() == COMMIT


@pytest.mark.parametrize(
    ("repo", "file", "revision"),
    [
        (REPO, "../../../etc/passwd", None),
        (REPO, "/etc/passwd", None),
        (REPO, "a\\b", None),
        (REPO, FILE, "../../x"),
        (REPO, FILE, "refs/../../x"),
        (REPO, FILE, "a\0b"),
        ("zoo/..", FILE, None),
        ("../zoo", FILE, None),
    ],
)
def test_a_name_that_leads_out_of_the_repository_is_refused(
    server: HubServer, tmp_path: Path, repo: str, file: str, revision: str | None
) -> None:
    with pytest.raises(WeightsNotFoundError, match=r"cannot be a|is not the name of"):
        hub.download(repo, file, revision=revision, cache_dir=tmp_path)
    assert not server.seen
    assert not list(tmp_path.iterdir())


def test_partial_downloads_of_killed_processes_are_removed_when_they_are_old(server: HubServer, tmp_path: Path) -> None:
    folder = hub.download(REPO, FILE, cache_dir=tmp_path).parents[2] / "blobs"
    for name, age in (("new.incomplete", 0), ("old.incomplete", 2 * 86400)):
        (folder / name).write_bytes(b"half")
        os.utime(folder / name, (time.time() - age,) * 2)
    server.repos[REPO]["other.txt"] = b"x"
    hub.download(REPO, "other.txt", cache_dir=tmp_path)
    assert [path.name for path in folder.glob("*.incomplete")] == ["new.incomplete"]
