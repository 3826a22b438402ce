"""Where tiles lie, how they are cut, and what a network makes of a photo in tiles."""

import numpy as np
import pytest
from common import BANDS, assert_same, noise, refused
from hypothesis import given, settings
from hypothesis import strategies as st

from enhance_lib.toolbox.tiles import cut_tiles, tile_boxes

# --- boxes ------------------------------------------------------------------------------------


sizes = st.tuples(st.integers(1, 90), st.integers(1, 90))

# steps of at least 8 pixels, or else 90×90 pixels give 8,000 tiles; small steps come further down
cuts = st.integers(8, 100).flatmap(lambda t: st.tuples(st.just(t), st.integers(0, t - 8)))


@settings(max_examples=60, deadline=None)
@given(sizes, cuts)
def test_tile_boxes(size, cut):
    (width, height), (tile, overlap) = size, cut
    boxes = tile_boxes(width, height, tile, overlap)
    covered = np.zeros((height, width), bool)
    for left, top, right, bottom in boxes:
        assert 0 <= left and right <= width and 0 <= top and bottom <= height
        assert (right - left, bottom - top) == (min(tile, width), min(tile, height))
        covered[top:bottom, left:right] = True
    assert covered.all()
    assert boxes == sorted(boxes, key=lambda box: (box[1], box[0]))  # row by row
    assert len(set(boxes)) == len(boxes)
    for low, high in (0, 2), (1, 3):
        starts = sorted({(box[low], box[high]) for box in boxes})
        for (_, end), (start, _) in zip(starts, starts[1:]):
            assert end - start >= overlap


def test_tile_boxes_by_hand():
    assert tile_boxes(10, 4, 4, 0) == [(0, 0, 4, 4), (4, 0, 8, 4), (6, 0, 10, 4)]
    assert tile_boxes(10, 3, 4, 1) == [(0, 0, 4, 3), (3, 0, 7, 3), (6, 0, 10, 3)]
    assert tile_boxes(4, 4, 4, 3) == [(0, 0, 4, 4)]


@pytest.mark.parametrize('tile, overlap', [(0, 0), (-1, 0), (8, 8), (8, -1), (8, 9)])
def test_impossible_tiles(tile, overlap):
    with refused(str(overlap if tile > 0 else tile)):
        tile_boxes(10, 10, tile, overlap)


@pytest.mark.parametrize('mode', BANDS)
def test_cut_tiles(mode):
    photo = noise((40, 30), mode)
    photo.info = {'icc_profile': b'a profile'}
    tiles = cut_tiles(photo, 16, 4)
    assert [box for box, _ in tiles] == tile_boxes(40, 30, 16, 4)
    for box, tile in tiles:
        assert_same(tile, photo.crop(box))
        assert tile.info == photo.info
    ((box, whole),) = cut_tiles(photo)
    assert box == (0, 0, 40, 30)
    assert_same(whole, photo)
