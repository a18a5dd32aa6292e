"""Clips in GRID's layout that a small model understands in seconds: a word is a tone and a bright place on the lips."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path

import numpy as np
from PIL import Image

WORDS = (("bin", "lay"), ("red", "blue"), ("now", "soon"))
TIMES = ((0.6, 1.0), (1.0, 1.4), (1.4, 2.0))
FRAMES = 75
ALL = [word for slot in WORDS for word in slot]


def write_speech(folder: Path, copies: int = 3) -> Path:
    """Writes ``captions.jsonl``, ``mouth.npz`` and ``logmel.npz``: every sentence, some copies of each for training."""
    generator = np.random.default_rng(0)
    lines, files, sounds = [], [], []
    for split, count in (("train", copies), ("val", 1), ("test", 1)):
        for copy in range(count):
            for sentence in itertools.product(*WORDS):
                shift = generator.integers(-5, 6) / 25  # seconds
                frames = generator.integers(60, 90, (FRAMES, 48, 80), dtype=np.uint8)
                sound = generator.integers(0, 20, (4 * FRAMES, 64), dtype=np.uint8)
                words = []
                for word, (start, end) in zip(sentence, TIMES, strict=True):
                    start, end, number = round(start + shift, 2), round(end + shift, 2), ALL.index(word)
                    words.append([word, start, end])
                    frames[round(start * 25) : round(end * 25), 14:42, 26 + 7 * number : 32 + 7 * number] = 220
                    sound[round(start * 100) : round(end * 100), 10 * number : 10 * number + 9] = 200
                buffer = io.BytesIO()
                Image.fromarray(frames.reshape(-1, 80)).save(buffer, "JPEG", quality=90)
                files.append(buffer.getvalue())
                sounds.append(sound)
                name = f"{split}{copy}-{'-'.join(sentence)}"
                lines.append(
                    {"id": name, "n_frames": FRAMES, "text": " ".join(sentence), "words": words, "split": split}
                )
    offsets = np.cumsum([0, *map(len, files)], dtype=np.int64)
    np.savez(folder / "mouth.npz", jpeg=np.frombuffer(b"".join(files), np.uint8), offsets=offsets)
    np.savez(folder / "logmel.npz", logmel=np.stack(sounds))
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
