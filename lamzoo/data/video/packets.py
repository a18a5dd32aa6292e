"""Packet index of a video: the times of its frames, and the key frames at which decoding can start."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import median_low
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from lamzoo.errors import MissingExtraError
from lamzoo.reading import open_regular

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream

_SOUGHT_BY_DTS = ("mpegts", "mpeg")  # seeking uses decoding times; in other formats display times
_BACK = Fraction(1, 4)  # seconds by which a decoding time may be before the last one if some are interpolated
_LONGEST = 7 * 24 * 3600  # maximum duration of a video, seconds: a week
_OPEN_ENDED = ("mpegts", "mpeg", "asf")  # formats that don't store their length


class UnreadableVideo(Exception):
    """The reason why a video is unreadable, in a few words."""


class KeyPacket(NamedTuple):
    """A packet at which decoding can start."""

    number: int  # number of packets before it
    stamp: int  # display time of its frame
    sought: int | None  # timestamp to seek to


@dataclass(frozen=True)
class PacketIndex:
    """The frames of a video according to its packets; times in units of ``unit`` seconds.

    Attributes:
        stamps: display times of the frames, ascending.
        end: end of the last frame.
        unit: seconds.
        numbers: number of packets before that of each stamp.
        keys: packets at which decoding can start, in file order; the video starts at the first one. Empty for files
            without marked key frames, which are decoded from their first packet.
        trusted: whether decoded frames have these timestamps; if not, only the order is that of the frames.
        open_ended: whether the container doesn't store its length, so that only the last frame shows truncation.
        suspect: whether the file may be damaged, so that a frame that can't be decoded is an error.
    """

    stamps: list[int]
    end: int
    unit: Fraction
    numbers: dict[int, int]
    keys: list[KeyPacket]
    trusted: bool
    open_ended: bool
    suspect: bool = False

    @cached_property
    def times(self) -> list[float]:
        """Time of each frame, seconds from the first frame."""
        return [self._seconds(stamp) for stamp in self.stamps]

    @property
    def duration(self) -> float:
        """Duration from the start of the first frame to the end of the last one, seconds."""
        return self._seconds(self.end)

    def _seconds(self, stamp: int) -> float:
        # Integers up to the division, which rounds once.
        return (stamp - self.stamps[0]) * self.unit.numerator / self.unit.denominator


def import_av() -> ModuleType:
    """Imports and returns PyAV.

    Raises:
        MissingExtraError: PyAV is not installed.
    """
    try:
        import av
    except ImportError:
        raise MissingExtraError(
            "Reading videos needs PyAV, which is not installed; pip install 'lamzoo[video]'."
        ) from None
    return av


def open_container(path: Path) -> InputContainer:
    """Opens a file, and no other files or addresses that it refers to; tags in unknown encodings are ignored."""
    options = {"protocol_whitelist": "file"}
    return import_av().open(f"file:{path}", container_options=options, metadata_errors="replace")


def read_index(container: InputContainer, stream: VideoStream, path: Path) -> PacketIndex:
    """Reads all packets of a newly opened file.

    Raises:
        UnreadableVideo: the file has no frames, is damaged or truncated, its timestamps restart in the middle, or it
            would last over a week.
    """
    name, rate, unit = container.format.name, stream.average_rate, stream.time_base or Fraction(1)
    usual = round(1 / (rate * unit)) if rate else 0
    pts: list[int | None] = []
    dts: list[int | None] = []
    lengths: list[int] = []
    starts: list[int] = []  # packets with a key frame
    hidden: set[int] = set()  # packets without a frame to show
    places: list[int | None] = []  # in the file
    suspect: list[int] = []  # packets that the demuxer takes for damaged
    try:
        for number, packet in enumerate(container.demux(stream)):
            if is_flush(packet):
                break
            pts.append(packet.pts)
            dts.append(packet.dts)
            lengths.append(packet.duration or usual)
            if packet.is_keyframe:
                starts.append(number)
            if packet.is_discard or not packet.size:
                hidden.add(number)
            places.append(packet.pos)
            if packet.is_corrupt and starts:
                suspect.append(number)
    except import_av().FFmpegError as error:
        raise UnreadableVideo(f"it cannot be read past {len(pts)} frames ({error.strerror})") from error
    whole = next((number for number in suspect if not _is_joint(name, stream.id, path, places, number)), None)
    _check_length(container, stream, path, len(pts) if whole is None else whole)
    if whole is not None:
        raise UnreadableVideo(f"it is damaged or cut short after {whole} frames")

    first = starts[0] if starts else 0  # a recording may begin between key frames
    stamps = _known(pts[first:])
    # AVI has no display times; if frames are stored in another order than shown, FFmpeg interpolates them.
    trusted = stamps is not None and not (name == "avi" and stream.codec_context.has_b_frames)
    if stamps is None:
        stamps = _known(dts[first:]) or list(accumulate(lengths[first:-1], initial=0))
    numbers = {
        stamp: number
        for number, stamp in enumerate(stamps, first)
        if number < len(pts) and number not in hidden and (stamp >= stamps[0] or not trusted)
    }
    if not numbers:
        raise UnreadableVideo("it has no frames")
    keys = [
        KeyPacket(number, stamps[number - first], dts[number] if name in _SOUGHT_BY_DTS else pts[number])
        for number in starts
    ]
    back = _BACK / unit if name in _SOUGHT_BY_DTS else math.inf
    if trusted and (
        any(later.stamp <= key.stamp for key, later in pairwise(keys))
        or any(stamp - later > back for stamp, later in pairwise(entry for entry in dts if entry is not None))
    ):
        raise UnreadableVideo("its timestamps restart in the middle, as in concatenated files, which remuxing repairs")
    if name == "apng":
        del keys[1:]  # all are marked, though each may depend on the previous frame
    rising = sorted(numbers)
    steps = [later - stamp for stamp, later in pairwise(rising)] or [0]
    end = rising[-1] + (lengths[numbers[rising[-1]]] or median_low(steps))
    if (end - rising[0]) * unit > _LONGEST:  # frames sampled by time would fill the memory
        raise UnreadableVideo(f"its timestamps are damaged: they span {float((end - rising[0]) * unit):.3g} s")
    return PacketIndex(rising, end, unit, numbers, keys, trusted, name in _OPEN_ENDED, bool(suspect))


def is_flush(packet: Packet) -> bool:
    """Returns whether a packet is the one that PyAV adds to flush the decoder."""
    return packet.size == 0 and packet.dts is None


def read_bytes(path: Path, count: int, *, from_end: bool = False) -> bytes:
    """Reads the first or the last bytes of a file."""
    with open_regular(path) as file:
        if from_end:
            file.seek(max(0, path.stat().st_size - count))
        return file.read(count)


def _known(column: list[int | None]) -> list[int] | None:
    known = [entry for entry in column if entry is not None]
    return known if len(known) == len(column) else None


def _check_length(container: InputContainer, stream: VideoStream, path: Path, got: int) -> None:
    """Raises an error if the container declares more content than the file has."""
    names = container.format.name.split(",")
    if "mov" in names and got < len(stream.index_entries):
        raise UnreadableVideo(f"it is cut short: it has {got} of its {len(stream.index_entries)} frames")
    size = path.stat().st_size
    if "mpegts" in names and size % _transport_packet(read_bytes(path, 4096))[0]:
        raise UnreadableVideo(f"it is cut short after {got} frames: its last packet is incomplete")
    if "matroska" in names and (end := _matroska_end(read_bytes(path, 4096))) > size:
        raise UnreadableVideo(f"it is cut short: it has {size} of its {end} bytes, with {got} frames")
    if "gif" in names and not read_bytes(path, 64, from_end=True).rstrip(b"\0").endswith(b";"):
        raise UnreadableVideo(f"it is cut short in or after its frame {got}")


def _is_joint(name: str, pid: int, path: Path, places: Sequence[int | None], number: int) -> bool:
    """Returns whether a packet that the demuxer marks as damaged may be intact, which decoding its frame then shows.

    In an MPEG transport stream, the packet counter of a stream jumps where packets are lost and where files were
    concatenated. Within a frame only the former occurs. FFmpeg marks the damaged frame or the previous one.
    """
    first, last = (places[at] if at < len(places) else None for at in (number, number + 2))
    if name != "mpegts" or first is None:
        return False
    length, sync = _transport_packet(read_bytes(path, 4096))
    with open_regular(path) as file:
        file.seek(first)
        packets = file.read(-1 if last is None else max(0, last - first))
    counter = None
    for at in range(sync, len(packets), length):
        header = packets[at : at + 4]
        if (
            len(header) < 4 or header[0] != 0x47 or header[1] & 0x80
        ):  # out of sync, or marked as damaged by the receiver
            return False
        if (header[1] & 0x1F) << 8 | header[2] == pid and header[3] & 0x10:  # a packet of the stream, with a payload
            begins = bool(header[1] & 0x40)
            if not begins and counter is not None and (header[3] - counter) % 16 > 1:  # 0 is a packet sent twice
                return False
            counter = header[3]
    return True


def _transport_packet(head: bytes) -> tuple[int, int]:
    """Returns the length of a packet of an MPEG transport stream and the place of its sync byte; 1, 0 if unknown."""
    for length, sync in ((188, 0), (192, 4), (204, 0)):  # plain, with a time before it, with a check sum behind it
        if len(head) >= 4 * length and all(head[at] == 0x47 for at in range(sync, 4 * length, length)):
            return length, sync
    return 1, 0


def _matroska_end(head: bytes) -> int:
    """Returns the size in bytes that a Matroska or WebM file declares; 0 if it declares none."""
    at = 0
    for name in (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"):  # its header, then everything else
        if head[at : at + 4] != name or len(head) < at + 12:
            return 0
        at += 4
        length = 9 - head[at].bit_length()
        unknown = (1 << 7 * length) - 1  # as in a live recording
        size = int.from_bytes(head[at : at + length]) & unknown
        at += length + size
    return 0 if size == unknown else at
