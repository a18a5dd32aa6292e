"""Approximate search of many embeddings with faiss: clusters of them, of which a query reads the nearest."""

from __future__ import annotations

import hashlib
import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from lamzoo.errors import DataError, MissingExtraError
from lamzoo.files import atomic_files
from lamzoo.reading import open_regular, reason

_logger = logging.getLogger(__name__)

#: Number of embeddings from which clusters save a query more than 10 ms; benchmarks/search_index.py measures it.
APPROXIMATE_FROM = 100_000

RECALL = 0.95  # of the best 10, for which the number of clusters is chosen that a query reads
_ITERATIONS = 10  # of k-means
_TRIED = 64  # queries that choose it
_SAMPLED = 64  # embeddings per cluster that k-means sees
_KEY = "lamzoo.clusters"  # in the metadata of the file: the sha256 of the embeddings


@dataclass(frozen=True, eq=False)
class Clusters:
    """Clusters of embeddings by cosine similarity; about the square root of their number.

    Attributes:
        centroids: ``(K, D)``, float32, of length 1.
        cluster: ``(N,)``, int64: the cluster of each embedding.
        probed: number of clusters that a query reads.
    """

    centroids: Tensor
    cluster: Tensor
    probed: int


def cluster_embeddings(embeddings: Tensor) -> Clusters:
    """Clusters embeddings with k-means, with a fixed seed, and chooses how many clusters a query reads.

    The number is doubled until 64 queries, embeddings with random vectors of the same length added, find
    :data:`RECALL` of the best 10.

    Args:
        embeddings: ``(N, D)``, float32, of length 1, on the CPU; N at least 1.

    Raises:
        MissingExtraError: faiss is not installed.
    """
    faiss = import_faiss()
    count, width = embeddings.shape
    clusters = round(math.sqrt(count))
    means = faiss.Kmeans(
        width, clusters, niter=_ITERATIONS, spherical=True, max_points_per_centroid=_SAMPLED, min_points_per_centroid=1
    )
    means.train(embeddings.numpy())
    cluster = means.index.search(embeddings.numpy(), 1)[1][:, 0]
    found = Clusters(F.normalize(torch.from_numpy(means.centroids), dim=1), torch.from_numpy(cluster), 1)
    generator = torch.Generator().manual_seed(0)
    queries = embeddings[torch.randint(count, (_TRIED,), generator=generator)]
    noise = torch.randn(_TRIED, width, generator=generator)
    queries = F.normalize(queries + F.normalize(noise, dim=1), dim=1)
    top = min(10, count)
    best = (queries @ embeddings.T).topk(top).indices.tolist()
    search = ClusteredSearch(embeddings, found)
    for probed in (2**power for power in range(math.ceil(math.log2(clusters)) + 1)):
        found = replace(found, probed=min(probed, clusters))
        search.probe(found.probed)
        hits = sum(
            index in exact for query, exact in zip(queries, best, strict=True) for _, index in search.search(query, top)
        )
        if hits >= RECALL * top * _TRIED:
            break
    return found


class ClusteredSearch:
    """Searches the nearest clusters of a query; the scores of what is found are exact.

    Args:
        embeddings: ``(N, D)``, float32, of length 1, on the CPU; they are copied.
        clusters: their clusters.

    Raises:
        MissingExtraError: faiss is not installed.
    """

    def __init__(self, embeddings: Tensor, clusters: Clusters) -> None:
        faiss = import_faiss()
        count, width = embeddings.shape
        quantizer = faiss.IndexFlatIP(width)
        quantizer.add(clusters.centroids.numpy())
        self._index = faiss.IndexIVFFlat(quantizer, width, len(clusters.centroids), faiss.METRIC_INNER_PRODUCT)
        self._index.own_fields, self._quantizer = False, quantizer
        self._index.is_trained = True
        self.probe(clusters.probed)
        ids = torch.arange(count)
        arrays = [each.contiguous().numpy() for each in (embeddings, ids, clusters.cluster)]  # keeps the copies alive
        self._index.add_core(count, *map(faiss.swig_ptr, arrays), None)

    def probe(self, count: int) -> None:
        """Sets the number of clusters that a query reads."""
        self._index.nprobe = count

    def search(self, query: Tensor, top: int) -> list[tuple[float, int]]:
        """Returns scores and indices of up to ``top`` embeddings near a query ``(D,)`` of length 1, the best first."""
        scores, found = (each[0].tolist() for each in self._index.search(query.numpy()[None], top))
        return [(score, index) for score, index in zip(scores, found, strict=True) if index >= 0]


def stored_search(path: Path, embeddings: Tensor) -> ClusteredSearch:
    """Returns the search of an index's embeddings; their clusters are kept in ``INDEX.clusters``, beside the index.

    The file holds tensors in safetensors, not an index of faiss, whose reader is not made for files from elsewhere. It
    is written again if the embeddings have changed. If it can't be written, the clusters are used without it, with a
    warning.

    Args:
        path: the index.
        embeddings: its embeddings, as for :class:`ClusteredSearch`.

    Raises:
        MissingExtraError: faiss is not installed.
    """
    import_faiss()
    file = path.with_name(f"{path.name}.clusters")
    digest = hashlib.sha256(embeddings.contiguous().numpy().data).hexdigest()
    clusters = _read(file, digest, embeddings)
    if clusters is None:
        clusters = cluster_embeddings(embeddings)
        tensors = {
            "centroids": clusters.centroids, "cluster": clusters.cluster, "probed": torch.tensor(clusters.probed)
        }  # fmt: skip
        try:
            with atomic_files(DataError) as stage:
                save_file(tensors, stage(file), metadata={_KEY: digest})
        except DataError as error:  # such as an index on a medium that can't be written; the search needs no file
            _logger.warning("clustered for this run alone: %s", error)
    return ClusteredSearch(embeddings, clusters)


def import_faiss() -> Any:
    """Returns the module ``faiss``.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise MissingExtraError(
            "approximate search needs faiss: pip install 'lamzoo[faiss]'; or search exactly (--exact)"
        ) from error
    return faiss


def _read(file: Path, digest: str, embeddings: Tensor) -> Clusters | None:
    """Reads the clusters of these embeddings; None if there is no such file, or it is damaged."""
    if not file.exists():
        return None
    try:
        with open_regular(file), safe_open(file, "pt") as opened:  # safetensors would wait for the other end of a pipe
            if (opened.metadata() or {}).get(_KEY) != digest:
                return None
            centroids, cluster, probed = (
                opened.get_tensor(name).clone() for name in ("centroids", "cluster", "probed")
            )
    except (OSError, SafetensorError, ValueError) as error:
        _logger.warning("clustered again: %s can't be read (%s)", file, reason(error))
        return None
    right = centroids.ndim == 2 and centroids.shape[1] == embeddings.shape[1] and cluster.shape == embeddings.shape[:1]
    right = right and len(centroids) > 0 and probed.shape == () and bool(centroids.isfinite().all())
    right = right and (centroids.dtype, cluster.dtype, probed.dtype) == (torch.float32, torch.int64, torch.int64)
    if not right or not 0 <= int(cluster.min()) <= int(cluster.max()) < len(centroids) >= int(probed) > 0:
        _logger.warning("clustered again: %s does not fit the embeddings", file)
        return None
    return Clusters(centroids, cluster, int(probed))
