"""Webdataset shards from names and bytes."""

import io
import tarfile
from pathlib import Path


def write_shard(path: Path, samples: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in samples.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path
