"""Where tiles lie, how they are cut, and what a network makes of a photo in tiles."""

import numpy as np
import pytest
import torch
from common import BANDS, array, assert_same, noise, refused
from echo import Same
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from enhance_lib.toolbox import tiles
from enhance_lib.toolbox.datasets import sample_photo
from enhance_lib.toolbox.errors import EnhanceError
from enhance_lib.toolbox.models import PhotoModel, load_model
from enhance_lib.toolbox.tiles import (
    Blend,
    ceil_div,
    cut_tiles,
    even_boxes,
    fade_window,
    fitting_tile,
    grown_box,
    run_tiles,
    tile_boxes,
)

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


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 99), st.integers(1, 99), st.integers(1, 40), st.integers(0, 30),
    st.integers(1, 16),
)  # fmt: skip
def test_outer_boxes_lie_on_the_grid(width, height, tile, margin, multiple):
    for box in tile_boxes(width, height, tile, 0):
        outer = grown_box(box, margin, multiple, width, height)
        for low, high, from_, to, end in zip(box, box[2:], outer, outer[2:], (width, height)):
            assert from_ % multiple == 0 and (to % multiple == 0 or to == end)
            assert 0 <= from_ <= max(low - margin, 0) and min(high + margin, end) <= to <= end
            assert to - from_ <= tile + 2 * margin + 2 * multiple


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 99), st.integers(1, 99), st.integers(1, 40), st.integers(1, 16))
@example(40, 32, 39, 1)
def test_a_photo_is_cut_into_few_tiles_of_about_one_size(width, height, most, multiple):
    "Each pixel lies in one tile; 40 pixels are cut in two halves, not in 39 and one."
    boxes = even_boxes(width, height, most, multiple)
    covered = np.zeros((height, width), int)
    for left, top, right, bottom in boxes:
        covered[top:bottom, left:right] += 1
        assert left % multiple == top % multiple == 0
        assert max(right - left, bottom - top) < most + multiple
    for sides in ([r - l for l, _, r, _ in boxes], [b - t for _, t, _, b in boxes]):
        assert max(sides) - min(sides) < 2 * multiple  # none is a mere strip
    assert (covered == 1).all()
    assert len(boxes) <= -(-width // most) * -(-height // most)


def test_the_tiles_of_a_megapixel():
    "By hand: 1155 = 288 + 3 · 289 and 866 = 288 + 2 · 289; on a grid of 8, 145 and 109 steps."
    for multiple, right, bottom in ((1, 289, 289), (8, 1155 - 3 * 288, 866 - 2 * 288)):
        boxes = even_boxes(1155, 866, 344, multiple)
        assert boxes[0] == (0, 0, 288, 288) and len(boxes) == 4 * 3
        left, top, *end = boxes[-1]
        assert end == [1155, 866] and (1155 - left, 866 - top) == (right, bottom)


@pytest.mark.parametrize(('most', 'multiple'), [(0, 1), (-3, 1), (8, 0)])
def test_impossible_grids(most, multiple):
    with pytest.raises(EnhanceError, match='not possible'):
        even_boxes(9, 9, most, multiple)


# --- a network over tiles -------------------------------------------------------------------


class Convs(PhotoModel):
    "Random convolutions that see `margin` pixels, and enlarge; 8-pixel blocks if asked for."

    def __init__(self, scale=1, margin=2, multiple=1):
        super().__init__()
        torch.manual_seed(0)
        self.scale, self.margin, self.multiple = scale, margin, multiple
        layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()]
        layers += [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()] * (margin - 2)
        self.body = nn.Sequential(*layers, nn.Conv2d(8, 3 * scale**2, 3, padding=1))

    def forward(self, x):
        if self.multiple > 1:  # depends on where blocks lie
            mean = F.avg_pool2d(x, self.multiple)
            x = x - 0.5 * F.interpolate(mean, scale_factor=self.multiple)
        return F.pixel_shuffle(self.body(x).sigmoid(), self.scale)


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 150),
    width=st.integers(1, 150),
    scale=st.sampled_from([1, 2, 3, 4]),
    margin=st.integers(2, 9),
    tile=st.integers(32, 80),
    multiple=st.sampled_from([1, 1, 4, 8]),
    more=st.integers(0, 20),
    deep=st.booleans(),
)
def test_tiles_equal_the_whole_where_overlap_covers_what_is_seen(
    height, width, scale, margin, tile, multiple, more, deep
):
    model = Convs(scale, margin, multiple)
    if multiple > 1:  # a block at the edge of what is seen is seen whole
        model.margin += multiple
    pixels = array(height, width, 3, np.uint16 if deep else np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('enhance_lib.toolbox.models.half_dtype', lambda device: None)
        whole = run_tiles(model, pixels, 'cpu', tile=4096)
        tiled = run_tiles(model, pixels, 'cpu', tile=tile, overlap=2 * model.margin + more)
    assert tiled.shape == (height * scale, width * scale, 3) and tiled.dtype == pixels.dtype
    assert np.abs(tiled.astype(int) - whole).max() <= 1


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    tile=st.integers(32, 64),
    overlap=st.integers(0, 60),
    margin=st.integers(0, 20),
    n_channels=st.sampled_from([1, 3]),
)
def test_tiles_of_what_changes_nothing_are_the_photo(
    height, width, tile, overlap, margin, n_channels
):
    "Whatever is blended, weights sum to 1."
    model = Same()
    model.margin, model.gray = margin, True
    pixels = array(height, width, n_channels)
    assert (run_tiles(model, pixels, 'cpu', tile, overlap) == pixels).all()


@pytest.mark.parametrize('name', ['jpeg-q10', 'jpeg-blind', 'srcnn-x3', 'realtime-x2'])
def test_published_models_that_are_exact(name):
    model = load_model(name)
    assert model.exact
    photo = sample_photo('china').crop((100, 100, 231, 211))
    pixels = np.asarray(photo)
    whole = run_tiles(model, pixels, 'cpu', tile=1024, fast=False).astype(int)
    tiled = run_tiles(model, pixels, 'cpu', tile=64, fast=False).astype(int)
    assert np.abs(tiled - whole).max() <= 1
    by_predict = np.asarray(model.predict(photo, fast=False)).astype(int)
    assert np.abs(tiled - by_predict).max() <= 1


def test_no_seam_shows_where_tiles_differ():
    "A network whose result depends on the whole tile: neighbors fade into each other."

    class Mean(Same):
        exact, margin = False, 4

        def forward(self, x):
            return x.mean((2, 3), keepdim=True).expand_as(x).contiguous()

    ramp = np.linspace(0, 255, 400).astype(np.uint8)[None, :, None].repeat(64, 0).repeat(3, 2)
    faded = run_tiles(Mean(), ramp, 'cpu', tile=64).astype(int)
    hard = run_tiles(Mean(), ramp, 'cpu', tile=64, overlap=0).astype(int)
    assert np.abs(np.diff(hard, axis=1)).max() > 30  # 64 of 400 pixels are 41 levels
    assert np.abs(np.diff(faded, axis=1)).max() <= 2


class Needs(Same):
    "Runs out of memory for more than `most` pixels."

    def __init__(self, most, error=MemoryError()):  # noqa: B008
        super().__init__()
        self.most, self.error = most, error

    def forward(self, x):
        if x.shape[2] * x.shape[3] > self.most:
            raise self.error
        return super().forward(x)


@pytest.mark.parametrize(
    'error', [RuntimeError('not enough memory: you tried to allocate 9 GB'), MemoryError()]
)
def test_tiles_are_halved_until_they_fit(error):
    model, pixels = Needs(70 * 70, error), array(300, 300, 3)
    result = run_tiles(model, pixels, 'cpu', tile=256)
    assert (result == pixels).all()
    assert max(height * width for height, width in model.sizes) > 70 * 70 / 4, 'halved too often'


def test_no_memory_even_for_the_least_tile():
    with pytest.raises(EnhanceError, match='not enough memory on cpu even for tiles of 32 pixels'):
        run_tiles(Needs(10), array(100, 100, 3), 'cpu')


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    for words in 'shapes differ', 'an illegal memory access', 'unsupported memory format':
        with pytest.raises(RuntimeError, match=words):
            run_tiles(Needs(10, RuntimeError(words)), array(100, 100, 3), 'cpu')


def test_tile_fits_what_is_free(monkeypatch):
    model, cpu = load_model('realtime-x4'), torch.device('cpu')

    def with_free(megabytes):
        free = type('Free', (), {'available': megabytes * 1e6})
        monkeypatch.setattr(tiles.psutil, 'virtual_memory', lambda: free)
        return fitting_tile(model, cpu)

    assert with_free(64_000) == model.tile
    small = with_free(200)
    assert 32 < small < model.tile
    assert (small + 2 * model.margin) ** 2 * model.memory <= 100e6
    assert with_free(1) == 32


@pytest.mark.parametrize('tile', [31, 0, -5])
def test_tiles_that_are_not_possible(tile):
    with pytest.raises(EnhanceError, match=f'A tile of {tile} pixels is not possible: 32 or more'):
        run_tiles(Same(), array(9, 9, 3), 'cpu', tile=tile)
    with pytest.raises(EnhanceError, match='overlap of -1 pixels'):
        run_tiles(Same(), array(9, 9, 3), 'cpu', overlap=-1)


def test_ceil_div_rounds_up():
    assert [ceil_div(a, 4) for a in (0, 1, 4, 5, 8, -1)] == [0, 1, 1, 2, 2, 0]


def test_windows_by_hand():
    "Nothing for 2 pixels at an inner edge, then up within 4; all at the edges of the photo."
    rise = [0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1]
    assert fade_window(8, 16, 16, dead=2, fade=4).tolist() == rise
    assert fade_window(0, 8, 16, dead=2, fade=4).tolist() == rise[::-1]
    assert fade_window(0, 8, 8, dead=2, fade=4).tolist() == [1] * 8
    both = fade_window(4, 12, 16, dead=2, fade=4)
    assert both.tolist() == np.minimum(rise, rise[::-1]).tolist() and both.dtype == np.float32
    assert fade_window(8, 12, 12, dead=1, fade=0).tolist() == [0, 0.5, 1, 1]


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_blend_is_the_weighted_mean_and_writes_what_is_finished(dtype):
    top = np.iinfo(dtype).max
    blend = Blend(np.full((3, 3, 2), 7, dtype))
    window = torch.tensor([[1.0, 1, 0.5], [0.25, 1, 1]])
    a, b = torch.rand(2, 2, 3), torch.rand(2, 2, 3) * 3 - 1  # the second leaves [0, 1]
    blend.add(a, 0, 0, window)
    blend.finish(1)
    assert (blend.out[1:] == 7).all()  # not yet
    assert blend.sums.shape == (3, 1, 3)  # and row 0 is forgotten
    blend.add(b, 1, 0, window)
    blend.finish(3)
    middle = (a[:, 1] * window[1] + b[:, 0] * window[0]) / (window[1] + window[0])
    for row, values in enumerate([a[:, 0], middle, b[:, 1]]):
        expected = (values.clamp(0, 1) * top).T.numpy()
        assert np.abs(blend.out[row] - expected).max() <= 0.51, row


def test_gray_through_a_network_for_colors_is_bt601():
    class Colors(PhotoModel):
        margin = 0

        def forward(self, x):
            assert x.shape[1] == 3
            return x * torch.tensor([1.0, 0.5, 0.25])[:, None, None]

    pixels = array(40, 50, 1)
    made = run_tiles(Colors(), pixels, 'cpu', tile=32)
    expected = pixels * (0.299 + 0.587 * 0.5 + 0.114 * 0.25)
    assert made.shape == pixels.shape and np.abs(made - expected).max() <= 0.501


def test_progress_is_told_and_may_stop():
    told = []
    run_tiles(Same(), array(64, 96, 3), 'cpu', tile=32, on_tile=told.append)
    assert told == pytest.approx([i / 6 for i in range(1, 7)])

    def stop(fraction):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        run_tiles(Same(), array(64, 96, 3), 'cpu', tile=32, on_tile=stop)
