"""The data that the frozen artefacts were made with, drawn from seeds. A change here makes the artefacts unusable."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CLASSES = {"blue": (40, 60, 200), "red": (200, 60, 40)}
WORDS = (("red", "blue"), ("at", "by"), ("left", "right"))
ALL_WORDS = [word for slot in WORDS for word in slot]
_TIMES = ((0.6, 1.0), (1.0, 1.4), (1.4, 2.0))  # of the words, in seconds
_FRAMES = 75  # of a clip, 25 a second


def photo(label: int, number: int) -> Image.Image:
    """Noise of 32 x 32 pixels around the colour of a class."""
    noise = np.random.default_rng((label, number)).integers(-40, 40, (32, 32, 3))
    return Image.fromarray(np.clip(np.array([*CLASSES.values()][label]) + noise, 0, 255).astype(np.uint8))


def pixels() -> Tensor:
    """Returns two photographs of each class, prepared without lamzoo: ``(4, 3, 32, 32)``, from -1 to 1."""
    photos = [np.asarray(photo(label, number)) for label in range(len(CLASSES)) for number in (100, 101)]
    return torch.tensor(np.stack(photos)).permute(0, 3, 1, 2) / 127.5 - 1


def write_photos(folder: Path, each: int = 20) -> Path:
    """Writes ``<class>/<number>.png``, without splits."""
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number in range(each):
            photo(label, number).save(folder / name / f"{number:02}.png")
    return folder


def write_speech(folder: Path) -> Path:
    """Writes 32 clips of three words in GRID's layout (face and sound); a word is a patch and a tone."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    lines, files, sounds = [], [], []
    for split, copies in (("train", 2), ("val", 1), ("test", 1)):
        for copy, sentence in itertools.product(range(copies), itertools.product(*WORDS)):
            shift = generator.integers(-5, 6) / 25  # seconds
            sound = generator.integers(0, 20, (4 * _FRAMES, 64), dtype=np.uint8)
            words = []
            for word, (start, end) in zip(sentence, _TIMES, strict=True):
                start, end, number = round(start + shift, 2), round(end + shift, 2), ALL_WORDS.index(word)
                words.append([word, start, end])
                sound[round(start * 100) : round(end * 100), 10 * number : 10 * number + 9] = 200
            frames = generator.integers(0, 40, (15, 64, 64, 3), dtype=np.uint8)
            colour, height, place = (slot.index(word) for slot, word in zip(WORDS, sentence, strict=True))
            frames[:, 8 + 24 * height :, 8 + 24 * place : 32 + 24 * place, 2 * colour] = 220
            file = io.BytesIO()
            Image.fromarray(frames.reshape(-1, 64, 3)).save(file, "PNG", compress_level=1)
            files.append(file.getvalue())
            sounds.append(sound)
            name = f"{split}{copy}-{'-'.join(sentence)}"
            lines.append({"id": name, "n_frames": _FRAMES, "text": " ".join(sentence), "words": words, "split": split})
    offsets = np.cumsum([0, *map(len, files)], dtype=np.int64)
    np.savez(folder / "face.npz", jpeg=np.frombuffer(b"".join(files), np.uint8), offsets=offsets)
    np.savez(folder / "logmel.npz", logmel=np.stack(sounds))
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
