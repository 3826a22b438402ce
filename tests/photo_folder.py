"Folders of soft photos, and what is in them: for the tests of operations and of folder runs."

import csv
import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

NAMES = [
    'a.png',
    'b.jpg',
    'sub/a.png',
    'sub/deeper/c d.bmp',
    'Straße/żółw.png',
    '日本.jpg',
    *(f'n{i}.png' for i in range(6)),
]
both_modes = pytest.mark.parametrize('mode', ['L', 'RGB'])


def smooth_photo(width=60, height=44, mode='RGB', seed=0):
    "A photo with soft shapes and some grain, so that every operation has something to change."
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    pixels = pixels + rng.normal(0, 6, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)


def same(a, b):
    return a.size == b.size and a.mode == b.mode and a.tobytes() == b.tobytes()


def make_photos(folder):
    "Fill a folder with photos of different sizes and kinds, by the names in `NAMES`."
    for i, name in enumerate(NAMES):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = 'L' if i % 4 == 3 else 'RGB'
        smooth_photo(40 + 7 * i, 60 - 2 * i, mode, seed=i).save(path)
    return folder


def contents(folder):
    "What a folder holds: {name: hash}, the CSV and hidden files too."
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(Path(folder).rglob('*'))
        if p.is_file()
    }


def rows(log):
    with log.open(newline='', encoding='utf-8') as file:
        return {row['fnames']: row for row in csv.DictReader(file)}
