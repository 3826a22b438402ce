"""What several tests need: photos and files to try, and what is expected of errors."""

import io
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from enhance_lib.toolbox.datasets import sample_photo
from enhance_lib.toolbox.errors import EnhanceError

BANDS = {'L': 1, 'LA': 2, 'RGB': 3, 'RGBA': 4}


def noise(size=(20, 14), mode='RGB', seed=0):
    "A photo of random pixels: nothing about it can be right by luck."
    shape = (size[1], size[0], BANDS[mode])
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(pixels[..., 0] if mode == 'L' else pixels, mode)


def array(height, width, n_channels, dtype=np.uint8, seed=0):
    "Random pixels (height, width, n_channels) over the whole range of their type."
    top = np.iinfo(dtype).max
    rng = np.random.default_rng(seed)
    return rng.integers(0, top, (height, width, n_channels), dtype, endpoint=True)


def pieces(n=4, side=72, seed=0):
    "Squares cut out of the held-out photos."
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        photo = sample_photo(('cat', 'coffee', 'china')[i % 3])
        left, top = (int(rng.integers(s - side)) for s in photo.size)
        found.append(photo.crop((left, top, left + side, top + side)))
    return found


def encoded(image, format, **options):
    "The bytes of the file that Pillow makes of an image."
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def pixels(image):
    return np.asarray(image).tolist()


def assert_same(one, other):
    assert (one.mode, one.size) == (other.mode, other.size)
    assert np.array_equal(np.asarray(one), np.asarray(other))


def one_line(error):
    "The words of a caught error, which must be one sentence or a few on one line, not a page."
    words = str(error.value)
    assert words and '\n' not in words and len(words) < 600
    return words


def refused(*words):
    "A context where an `EnhanceError` of one line is raised, which holds all the words."

    @contextmanager
    def context():
        with pytest.raises(EnhanceError) as caught:
            yield caught
        message = str(caught.value)
        assert isinstance(caught.value, ValueError)
        assert '\n' not in message and ' at 0x' not in message
        for word in words:
            assert word in message

    return context()


@contextmanager
def silent():
    "No warning at all may come."
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        yield
