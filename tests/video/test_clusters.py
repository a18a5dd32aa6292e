"""Approximate search finds what exact search finds, and its file is read as tensors, checked, and never believed."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.rows import read_rows, write_rows
from benchmarks.search_index import Row, draw, measure, table
from lamzoo.errors import MissingExtraError
from lamzoo.video import search
from lamzoo.video.clusters import ClusteredSearch, Clusters, cluster_embeddings, stored_search
from lamzoo.video.search import VideoIndex

pytest.importorskip("faiss")


@pytest.fixture(scope="module", params=[32, 64])
def drawn(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    return draw(2000, request.param, 40)


def best(embeddings: Tensor, query: Tensor, top: int = 10) -> list[int]:
    return (embeddings @ query).topk(top).indices.tolist()


def test_recall_is_that_of_the_promise(drawn: tuple[Tensor, Tensor]) -> None:
    embeddings, queries = drawn
    clusters = cluster_embeddings(embeddings)
    assert len(clusters.centroids) == 45 and 1 <= clusters.probed <= 45
    clustered = ClusteredSearch(embeddings, clusters)
    found = [clustered.search(query, 10) for query in queries]
    hits = sum(
        index in best(embeddings, query) for query, answers in zip(queries, found, strict=True) for _, index in answers
    )
    assert hits >= 0.95 * 10 * len(queries)
    for query, answers in zip(queries[:3], found, strict=False):
        for score, index in answers:
            assert score == pytest.approx(float(embeddings[index] @ query), abs=1e-5)
    exact = ClusteredSearch(embeddings, dataclasses.replace(clusters, probed=45))
    assert [index for _, index in exact.search(queries[0], 10)] == best(embeddings, queries[0])


def test_a_search_that_reads_too_few_reads_all(drawn: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings, queries = drawn
    monkeypatch.setattr(search, "encode_texts", lambda model, texts, size: queries[int(texts[0])][None])
    apart = Clusters(embeddings[:2], torch.arange(2000) % 2, 1)
    options: dict[str, Any] = {"videos": [Path(str(i)) for i in range(2000)], "durations": [1.0] * 2000}
    exact = VideoIndex(nn.Linear(1, 1), Path("index"), embeddings=embeddings, **options)
    near = dataclasses.replace(exact, clusters=ClusteredSearch(embeddings, apart))
    assert len(near.search("0", 10)) == 10
    assert [match.path for match in near.search("0", 1500)] == [match.path for match in exact.search("0", 1500)]


def test_clusters_are_stored_and_made_again_for_other_embeddings_or_a_damaged_file(
    drawn: tuple[Tensor, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    embeddings, index = drawn[0][:300], tmp_path / "index.safetensors"
    stored_search(index, embeddings)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    written = file.stat().st_mtime_ns
    stored_search(index, embeddings)
    assert file.stat().st_mtime_ns == written
    with safe_open(file, "pt") as opened:
        metadata, tensors = opened.metadata(), {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    wrong: list[dict[str, Tensor]] = [
        {"cluster": tensors["cluster"] + 99},
        {"cluster": tensors["cluster"][:-1].clone()},
        {"centroids": tensors["centroids"] * torch.nan},
        {"probed": torch.tensor(0)},
    ]
    for change in wrong:
        save_file({**tensors, **change}, file, metadata=metadata)
        caplog.clear()
        stored_search(index, embeddings)
        assert "clustered again" in caplog.text
        assert file.read_bytes() == whole
    file.write_bytes(whole[:-9])
    stored_search(index, embeddings)
    assert file.read_bytes() == whole
    stored_search(index, embeddings.flip(0))
    assert file.read_bytes() != whole


def test_clusters_that_cannot_be_stored_are_searched_all_the_same(
    drawn: tuple[Tensor, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    embeddings, index = drawn[0][:300], tmp_path / "index.safetensors"
    (tmp_path / "index.safetensors.clusters").mkdir()
    found = stored_search(index, embeddings.T.contiguous().T).search(embeddings[7], 1)
    assert found[0][1] == 7 and "clustered for this run alone" in caplog.text
    assert "index.safetensors.clusters is a folder" in caplog.text


def test_without_faiss_the_way_out_is_named(drawn: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingExtraError, match=r"lamzoo\[faiss\].*--exact"):
        cluster_embeddings(drawn[0])


def test_the_benchmark_measures_both(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        row = measure(500, 32)
    finally:
        torch.set_num_threads(threads)
    assert row.recall >= 90 and row.exact_ms > 0 and row.approximate_ms > 0
    write_rows(tmp_path / "rows.csv", [row])
    assert read_rows(tmp_path / "rows.csv", Row) == [row]
    assert "| 500 | " in table([row])
