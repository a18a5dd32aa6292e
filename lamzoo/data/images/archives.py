"""Image archives: npz files of JPEG bytes, and webdataset tar shards."""

from __future__ import annotations

import functools
import glob
import io
import logging
import re
import tarfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from lamzoo.data.arrays import check_packed, read_npz
from lamzoo.data.images.decode import IMAGE_EXTENSIONS
from lamzoo.data.images.image_dataset import ImageSource
from lamzoo.data.json_files import read_json, read_lines
from lamzoo.data.paths import check_folder, expand_wildcards, file_exists, is_hidden, visible
from lamzoo.data.splits import SPLIT_NAMES, find_split, synonyms
from lamzoo.errors import DataError, MissingSplitError
from lamzoo.files import shortened
from lamzoo.reading import decode, open_regular, parse_int

_logger = logging.getLogger(__name__)

_LONGEST_TEXT = 2**24  # bytes
#: Exceptions of tarfile for damaged headers; it parses numbers and texts without checks of its own.
_BROKEN_TAR = (
    tarfile.TarError,
    OSError,
    ValueError,
    EOFError,
    LookupError,
    ArithmeticError,
    MemoryError,
    RecursionError,
)
_BRACE = re.compile(r"\{([^{}]*)\}")
_MOST_SHARDS, _MOST_DIGITS = 100_000, 18


def npz_splits(folder: Path) -> list[str]:
    """Returns the names of the npz files in a folder, without the extension."""
    return [path.stem for path in visible(folder, "*.npz")]


class NpzSource(ImageSource):
    """``root/<split>.npz`` with the arrays ``jpeg``, ``offsets`` and ``labels``, and ``root/classes.json``.

    Args:
        root: the folder.
        split: which file.

    Raises:
        DataError: there is no such folder or split, or the arrays or the classes are inconsistent.
    """

    def __init__(self, root: Path, split: str) -> None:
        check_folder(root)
        self.split = find_split(split, npz_splits(root), str(root))
        self._path = root / f"{self.split}.npz"
        self.classes, self.identifiers = read_classes(root / "classes.json")
        self._bytes, self._offsets, self._labels = self._arrays()

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, index: int) -> tuple[BinaryIO, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, stop = self._offsets[index : index + 2]
        return io.BytesIO(self._bytes[start:stop].tobytes()), int(self._labels[index])

    def name(self, index: int) -> str:
        return f"{self._path}[{index}]"

    def labels(self) -> list[int]:
        return self._labels.tolist()

    def sizes(self) -> list[int]:
        return np.diff(self._offsets).tolist()

    def _arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        jpeg, offsets, labels = read_npz(self._path, ("jpeg", "offsets", "labels")).values()
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise DataError(f"{self._path}: labels is {labels.dtype} {labels.shape}; it must be a row of integers")
        check_packed(self._path, jpeg, offsets, len(labels), "labels")
        highest = np.inf if self.classes is None else len(self.classes) - 1
        wrong = np.flatnonzero((labels < 0) | (labels > highest))
        if len(wrong):
            known = "" if self.classes is None else f", but classes.json has {len(self.classes)} classes"
            raise DataError(f"{self._path}: label {labels[wrong[0]]} of image {wrong[0]} is out of range{known}")
        return jpeg, offsets, labels


class _Image(NamedTuple):
    shard: Path
    key: str
    start: int
    size: int
    label: int


class ShardSample(NamedTuple):
    """A sample of a webdataset shard.

    Attributes:
        shard: the tar file.
        key: the sample's name, with its folder in the shard.
        extension: extension of its image or video, in lower case, with the dot.
        start: offset of the image or video in the shard, bytes.
        size: size of the image or video, bytes.
        texts: the sample's other files by extension, in lower case, with the dot.
    """

    shard: Path
    key: str
    extension: str
    start: int
    size: int
    texts: Mapping[str, bytes]


class TarSource(ImageSource):
    """Local webdataset shards with random access: every sample is ``KEY.jpg`` (or png, ...) with ``KEY.cls``.

    The headers of the shards are read once, at the start, so that the data set has a length and an order, and
    evaluation can resume. Keys may contain dots, and extensions may be in upper case; see :func:`shard_samples`.
    ``classes.json`` or ``classnames.txt`` in the folder of the shards has the class names.

    Args:
        pattern: a path with ``*``, ``{000..012}``, ``{a,b}`` and ``{split}``; see :func:`create_dataset`.
        split: replaces ``{split}``.

    Raises:
        DataError: a shard does not exist, is remote or damaged, or a sample has no image or label.
    """

    how_to_split = "put {split} into the pattern in place of the split's name"

    def __init__(self, pattern: str, split: str) -> None:
        shards, self.split = find_shards(pattern, split)
        beside = shards[0].parent
        self.classes, self.identifiers = read_classes(beside / "classes.json")
        names = beside / "classnames.txt"
        if not self.classes and file_exists(names):
            self.classes = read_lines(names)
        samples = shard_samples(shards, IMAGE_EXTENSIONS, (".cls",), "image", ".cls label")
        self._images = [_Image(each.shard, each.key, each.start, each.size, _label(each)) for each in samples]

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> tuple[BinaryIO, int]:
        image = self._images[index]
        try:
            with open_regular(image.shard) as file:
                file.seek(image.start)
                return io.BytesIO(file.read(image.size)), image.label
        except OSError as error:
            raise DataError(f"cannot read {image.shard}: {error.strerror}") from error

    def name(self, index: int) -> str:
        return f"{self._images[index].shard}[{self._images[index].key}]"

    def labels(self) -> list[int]:
        return [image.label for image in self._images]

    def sizes(self) -> list[int]:
        return [image.size for image in self._images]


def shard_samples(
    shards: Sequence[Path], media: Collection[str], texts: Sequence[str], what: str, text: str
) -> Iterator[ShardSample]:
    """Yields the samples of webdataset shards: files with the same key, an image or video and at least one text.

    The key ends at the last dot before a known extension, so it may contain dots; extensions are case-insensitive.
    Files with an unknown extension, or with an additional part as ``KEY.mask.png`` beside ``KEY.png``, are ignored;
    their number is logged once, with the name of the first. Hidden files are skipped.

    Args:
        shards: uncompressed tar files.
        media: extensions of images or videos, in lower case, with the dot.
        texts: extensions of the files that are read with the headers, likewise.
        what: name of the medium, in messages.
        text: name of the text, in messages.

    Yields:
        The samples, shard by shard, in the order of their images or videos.

    Raises:
        DataError: a shard is damaged, cut short or without samples, a sample has no medium, two of them or no text, or
            a file exists twice.
    """
    ignored: list[str] = []
    members = 0
    for shard in shards:
        samples = []
        files, others, count = _read_shard(shard, media, texts, text)
        whole = {key for key, parts in files.items() if len(parts) > 1 and not parts.keys() <= set(texts)}
        for key, parts in files.items():
            found = [extension for extension in parts if extension in media]
            if key not in whole and _belongs_to(key, whole):
                others += [f"{key}{extension}" for extension in parts]
            elif not found:
                raise DataError(f"{shard}: the sample {key!r} has no {what} ({', '.join(sorted(media))})")
            elif len(found) > 1:
                raise DataError(
                    f"{shard} has the sample {key!r} twice, as {found[0]} and {found[1]}; rename one of them"
                )
            elif key not in whole:
                raise DataError(f"{shard}: the sample {key!r} has no {text}")
            else:
                extension, place = found[0], parts[found[0]]
                read = {other: part.text for other, part in parts.items() if other != extension}
                samples.append(ShardSample(shard, key, extension, place.start, place.size, read))
        if not samples:
            raise DataError(f"{shard} has no {what} with a {text}; complete it, or remove it")
        yield from sorted(samples, key=lambda sample: sample.start)
        ignored += [f"{shard}[{name}]" for name in others]
        members += count
    if ignored:
        _warn_once(
            f"{len(ignored)} of the {members} files in {_listed(shards)} are not a {what} or text of a sample and are "
            f"ignored, such as {ignored[0]}"
        )


def find_shards(pattern: str, split: str) -> tuple[list[Path], str | None]:
    """Returns the tar files that match a pattern.

    Returns:
        The shards, and the name of the split in the data if the pattern has ``{split}``.

    Raises:
        DataError: the shards are remote, or some or all of them are missing.
        MissingSplitError: there are only shards of other splits; lists those.
    """
    if re.match(r"(pipe:|[a-z0-9]+://)", pattern):
        raise DataError(f"the shards {pattern!r} are not local; download them and give their path")
    if "{split}" not in pattern:
        shards = _expand(pattern)
        if not shards:
            raise DataError(f"there is no shard {pattern}; give tar files, such as wds:DIR/*.tar")
        return shards, None
    for name in synonyms(split):
        shards = _expand(pattern.replace("{split}", name))
        if shards:
            return shards, name
    others = sorted(name for name in SPLIT_NAMES if _expand(pattern.replace("{split}", name)))
    raise MissingSplitError(f"the shards {pattern!r} have no split {split!r}; they have {', '.join(others) or 'none'}")


def read_classes(path: Path) -> tuple[list[str] | None, list[str] | None]:
    """Reads class names and identifiers from JSON, a list of names or of ``[identifier, name]``.

    Returns:
        The names, and the identifiers if there are any; ``None`` if there is no file.

    Raises:
        DataError: the file has another content.
    """
    if not file_exists(path):
        return None, None
    entries = read_json(path, file_names=True)
    entries = entries if isinstance(entries, list) else []
    pairs = [entry if isinstance(entry, list) else [None, entry] for entry in entries]
    if not pairs or not all(len(pair) == 2 and isinstance(pair[1], str) for pair in pairs):
        raise DataError(f"{path} must be a list of class names or of [identifier, name]")
    identifiers = [pair[0] for pair in pairs]
    whole = all(isinstance(identifier, str) for identifier in identifiers)
    return [pair[1] for pair in pairs], identifiers if whole else None


def _expand(pattern: str) -> list[Path]:
    """Expands braces as a shell does, then wildcards; each alternative of a brace must exist."""
    found: dict[Path, None] = {}  # in order, without repetitions
    missing: list[Path] = []
    for plain in _braces(pattern):
        paths = expand_wildcards(plain) if glob.has_magic(plain) else [Path(plain)]
        found |= dict.fromkeys(path for path in paths if file_exists(path))
        missing += [path for path in paths if not file_exists(path)] if paths else [Path(plain)]
    if found and missing:
        raise DataError(f"the shard {missing[0]} is missing; restore it, or give a pattern without it")
    return list(found)


def _braces(pattern: str) -> list[str]:
    expanded = [pattern]
    while expanded and _BRACE.search(expanded[0]):  # each pass replaces one brace in all
        whole = []
        for one in expanded:
            match = _BRACE.search(one)
            assert match is not None  # all have the same number of braces
            parts = _alternatives(match[1], pattern)
            whole += [one[: match.start()] + part + one[match.end() :] for part in parts]
            if len(whole) > _MOST_SHARDS:
                raise _too_many(pattern)
        expanded = whole
    return expanded


def _alternatives(inside: str, pattern: str) -> list[str]:
    span = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if span is None:
        return inside.split(",")
    width = len(span[1])
    if max(width, len(span[2])) > _MOST_DIGITS or int(span[2]) - int(span[1]) >= _MOST_SHARDS:
        raise _too_many(pattern)
    return [str(number).zfill(width) for number in range(int(span[1]), int(span[2]) + 1)]


def _too_many(pattern: str) -> DataError:
    return DataError(f"the pattern {shortened(pattern)} matches more than {_MOST_SHARDS} shards; correct its braces")


class _Part(NamedTuple):
    start: int
    size: int
    text: bytes


def _read_shard(
    shard: Path, media: Collection[str], texts: Sequence[str], text: str
) -> tuple[dict[str, dict[str, _Part]], list[str], int]:
    """Returns the files of a shard by key and extension, the names of ignored files, and the number of all files."""
    files: dict[str, dict[str, _Part]] = {}
    ignored: list[str] = []
    count = 0
    last = -1
    try:
        with open_regular(shard) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for entry in archive:
                if entry.offset <= last or entry.size < 0:
                    raise tarfile.ReadError(f"the header of {entry.name} is damaged")
                last = entry.offset
                if entry.isdir() or is_hidden(entry.name):
                    continue
                count += 1
                key, extension = split_member(entry.name, (*media, *texts))
                if not extension or not entry.isfile():
                    ignored.append(entry.name)
                    continue
                parts = files.setdefault(key, {})
                if extension in parts:
                    raise DataError(f"{shard} has {key}{extension} twice; rename one of them")
                if entry.issparse() or (extension in texts and entry.size > _LONGEST_TEXT):
                    raise tarfile.ReadError(f"{entry.name} is sparse, or longer than a {text} can be")
                content = archive.extractfile(entry) if extension in texts else None
                parts[extension] = _Part(entry.offset_data, entry.size, b"" if content is None else content.read())
            _check_end(file, archive.offset, count)
    except _BROKEN_TAR as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{shard} is not a complete, uncompressed webdataset shard: {reason}; replace it") from error
    return files, ignored, count


def _check_end(file: BinaryIO, offset: int, count: int) -> None:
    """Raises an error unless zeros are all that follows the last file: tarfile takes any other block for the end too.

    Args:
        file: the archive.
        offset: the end of its last file.
        count: the number of files before it.
    """
    file.seek(offset)
    rest = file.read(2**20)
    if len(rest) < tarfile.BLOCKSIZE or any(rest[: tarfile.BLOCKSIZE]):
        raise tarfile.ReadError(f"it is damaged or cut short after {count} files, where its end mark is missing")
    while rest:
        if rest.strip(b"\0"):
            raise tarfile.ReadError(f"more follows its end mark after {count} files, as in concatenated archives")
        rest = file.read(2**20)


def split_member(name: str, extensions: Collection[str]) -> tuple[str, str]:
    """Splits a file name into its key and its extension, in lower case, with the dot.

    The extension is ``""`` if it is not in ``extensions``, or if the key would be empty.
    """
    key, dot, extension = name.rpartition(".")
    extension = f"{dot}{extension}".lower()
    if extension not in extensions or not key.rpartition("/")[2]:
        return name, ""
    return key, extension


def _belongs_to(key: str, whole: Collection[str]) -> bool:
    """Returns whether a key consists of the key of a complete sample and an additional part after a dot."""
    folder, slash, name = key.rpartition("/")
    ends = [index for index, letter in enumerate(name) if letter == "."]
    return any(f"{folder}{slash}{name[:end]}" in whole for end in ends)


def _label(sample: ShardSample) -> int:
    text = sample.texts[".cls"]
    try:
        return parse_int(decode(text).strip())
    except ValueError:
        raise DataError(
            f"{sample.shard}: the label of the sample {sample.key!r} is {text[:20]!r}, not a class number"
        ) from None


def _listed(shards: Sequence[Path]) -> str:
    return str(shards[0]) if len(shards) == 1 else f"{shards[0]} and {len(shards) - 1} more shards"


@functools.cache
def _warn_once(message: str) -> None:
    _logger.warning(message)
