"""Exact and approximate search of embeddings by their number: time of a query, recall, build time and memory.

    python -m benchmarks.search_index 10000 100000 1000000
    python -m benchmarks.search_index --table      prints the table of stored results

The embeddings, 512 wide, are drawn: points of a space of 32 or 64 dimensions around 2,000 centres, with noise in all
512, in place of the videos of an archive. A query is one of them with more noise, as a text near a video.
Times are CPU times of one thread. Each size is measured in a process of its own, for its memory. Existing rows are not
measured again.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.rows import STORED, measured_on, read_rows, write_rows
from lamzoo.profiling.latency import device_label
from lamzoo.reading import read_text
from lamzoo.video.clusters import import_faiss, stored_search

RESULTS = STORED / "search_index.csv"
_WIDTH, _CENTRES = 512, 2_000
_INNER = (32, 64)  # dimensions of the points; with more of them, neighbours are spread over more clusters
_QUERIES, _TOP = 100, 10


@dataclass(frozen=True)
class Row:
    """One number of embeddings.

    Attributes:
        count: number of embeddings.
        inner: dimensions of the space that they were drawn in, before the noise.
        exact_ms: median time of a query that reads all, milliseconds.
        approximate_ms: median time of a query in the clusters, milliseconds.
        recall: share of the 10 exact answers among the 10 approximate ones, percent, mean over 100 queries.
        build_seconds: time to cluster the embeddings, once.
        open_seconds: time to open the stored clusters.
        embeddings_mib: memory of the embeddings, MiB.
        added_mib: resident memory that the approximate search adds, MiB.
        stored_mib: size of the file of the clusters, MiB.
        device: label of the processor.
        faiss: version of faiss.
    """

    count: int
    inner: int
    exact_ms: float
    approximate_ms: float
    recall: float
    build_seconds: float
    open_seconds: float
    embeddings_mib: float
    added_mib: float
    stored_mib: float
    device: str
    faiss: str


def draw(count: int, inner: int, queries: int = _QUERIES, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns embeddings ``(count, 512)`` and queries ``(queries, 512)`` of length 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    centres, outwards = normal(_CENTRES, inner), normal(inner, _WIDTH) / inner**0.5
    embeddings = torch.empty(count, _WIDTH)
    for part in embeddings.split(50_000):  # in place, because a million are 2 GB
        centre = torch.randint(_CENTRES, (len(part),), generator=generator)
        points = (centres[centre] + 0.7 * normal(len(part), inner)) @ outwards
        part.copy_(F.normalize(points + 0.2 * normal(len(part), _WIDTH), dim=1))
    near = embeddings[torch.randint(count, (queries,), generator=generator)]
    return embeddings, F.normalize(near + 0.5 * F.normalize(normal(queries, _WIDTH), dim=1), dim=1)


def measure(count: int, inner: int) -> Row:
    """Measures a number of embeddings drawn in a space of so many dimensions, in this process."""
    torch.set_num_threads(1)
    faiss = import_faiss()
    faiss.omp_set_num_threads(1)
    embeddings, queries = draw(count, inner)
    exact = (queries @ embeddings.T).topk(_TOP).indices.tolist()
    exact_ms = _median_ms(queries, lambda query: (embeddings @ query).topk(_TOP))
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder) / "index.safetensors"
        started = time.process_time()
        stored_search(index, embeddings)
        built = time.process_time() - started
        before, started = _resident_mib(), time.process_time()
        search = stored_search(index, embeddings)
        opened, added = time.process_time() - started, _resident_mib() - before
        stored = index.with_name(f"{index.name}.clusters").stat().st_size / 2**20
    found = [[place for _, place in search.search(query, _TOP)] for query in queries]
    recall = np.mean([len(set(ours) & set(theirs)) / _TOP for ours, theirs in zip(found, exact, strict=True)])
    approximate_ms = _median_ms(queries, lambda query: search.search(query, _TOP))
    return Row(
        count, inner, round(exact_ms, 2), round(approximate_ms, 2), round(100 * float(recall), 1),
        round(built - opened, 1), round(opened, 2), round(embeddings.nbytes / 2**20, 1), round(added, 1),
        round(stored, 2), device_label(torch.device("cpu")), faiss.__version__,
    )  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Returns the rows as a Markdown table."""
    lines = [
        "| embeddings | drawn in | exact, ms | clusters, ms | recall@10, % | build, s | open, s | MiB | added, MiB |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row.count:,} | {row.inner} | {row.exact_ms:.1f} | {row.approximate_ms:.1f} | {row.recall:.1f} "
        f"| {row.build_seconds:.1f} | {row.open_seconds:.1f} | {row.embeddings_mib:,.0f} | {row.added_mib:,.0f} |"
        for row in sorted(rows, key=lambda row: (row.inner, row.count))
    ]
    return "\n".join(lines) + "\n" + measured_on(f"{row.device}, one thread, faiss {row.faiss}" for row in rows)


def _median_ms(queries: Tensor, search: Callable[[Tensor], object]) -> float:
    seconds = []
    for query in queries[:20]:
        started = time.process_time()
        search(query)
        seconds.append(time.process_time() - started)
    return 1000 * float(np.median(seconds))


def _resident_mib() -> float:
    (line,) = (line for line in read_text(Path("/proc/self/status")).splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", nargs="*", type=int, help="numbers of embeddings")
    parser.add_argument("--table", action="store_true", help="print the table of stored results")
    arguments = parser.parse_args()
    rows = read_rows(RESULTS, Row)
    if arguments.table:
        print(table(rows))
        return
    wanted = itertools.product(sorted(set(arguments.counts)), _INNER)
    missing = [each for each in wanted if each not in {(row.count, row.inner) for row in rows}]
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        for row in pool.map(measure, *zip(*missing, strict=True)) if missing else ():
            rows.append(row)
            write_rows(RESULTS, rows)


if __name__ == "__main__":
    main()
