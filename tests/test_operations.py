"""What operations do to pixels and to sizes: the plain ones, and what holds for all of them."""

from collections import Counter

import numpy as np
import pytest
from common import one_line
from photo_folder import both_modes, same, smooth_photo
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont
from scipy.stats import chisquare

from enhance_lib.crappify import apply_steps, dice  # and the operations of lesson 01 are there
from enhance_lib.toolbox.datasets import sample_photo
from enhance_lib.toolbox.errors import EnhanceError
from enhance_lib.toolbox.operations import KERNELS, OPERATIONS, Between, OneOf, resize


def noisy_pixels(width, height, mode, seed=0):
    shape = (height, width, 3) if mode == 'RGB' else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@both_modes
@pytest.mark.parametrize('size', [(37, 23), (80, 61), (10, 7), (53, 9), (1, 1), (159, 122)])
def test_plain_bilinear_is_that_of_torch(size, mode):
    "Up and down; torch too looks at the two nearest pixels unless it is told to antialias."
    import torch
    from torch.nn.functional import interpolate

    pixels = noisy_pixels(53, 41, mode)
    ours = OPERATIONS['resize'](Image.fromarray(pixels), *size, 'bilinear', antialias=False)
    x = torch.from_numpy(pixels.reshape(41, 53, -1)).permute(2, 0, 1)[None].double()
    expected = interpolate(x, size=size[::-1], mode='bilinear', align_corners=False)
    expected = expected[0].permute(1, 2, 0).numpy()
    # half a level is rounding
    difference = np.abs(np.asarray(ours, float).reshape(expected.shape) - expected)
    assert ours.size == size and ours.mode == mode
    assert difference.max() <= 0.5 + 1e-3


def test_plain_bicubic_has_the_weights_of_keys():
    "Enlarged twice, a new pixel lies a quarter or three quarters of the way between two old ones."
    row = np.zeros((1, 12), np.uint8)
    row[0, 6] = 128  # its weights times 128 come out, on a background that hides no negative ones
    background = 64
    ours = OPERATIONS['resize'](Image.fromarray(row + background), 24, 1, antialias=False)
    # 1.5d³-2.5d²+1 near and -0.5d³+2.5d²-4d+2 far: at distances .25 .75 1.25 1.75
    weights = np.array([0.8671875, 0.2265625, -0.0703125, -0.0234375])
    expected = np.zeros(24)
    for i, w in enumerate(128 * weights):
        expected[[12 - i, 13 + i]] = w  # the center of old pixel 6 lies between new 12 and 13
    np.testing.assert_array_equal(np.asarray(ours)[0], np.rint(background + expected))


def test_plain_bicubic_down_takes_four_old_pixels_and_no_more():
    "Shrunk 4 times, a new pixel lies midway between two old ones: weights -1 9 9 -1 sixteenths."
    row = np.random.default_rng(1).integers(60, 190, 40).astype(np.uint8)
    ours = OPERATIONS['resize'](Image.fromarray(row[None]), 10, 1, antialias=False)
    taps = np.stack([np.roll(row, -shift)[::4] for shift in (0, 1, 2, 3)], 1).astype(float)
    np.testing.assert_array_equal(np.asarray(ours)[0], np.rint(taps @ [-1, 9, 9, -1] / 16))


@both_modes
@pytest.mark.parametrize('antialias', [True, False])
@pytest.mark.parametrize('kernel', ['bilinear', 'bicubic'])
def test_resize_keeps_a_plain_photo_plain(kernel, antialias, mode):
    photo = Image.new(mode, (31, 17), 201 if mode == 'L' else (3, 130, 255))
    for size in [(9, 40), (62, 8), (31, 17)]:
        out = OPERATIONS['resize'](photo, *size, kernel, antialias)
        assert same(out, Image.new(mode, size, photo.getpixel((0, 0))))


@pytest.mark.parametrize('kernel', ['bilinear', 'bicubic'])
@pytest.mark.parametrize('width', [20, 30, 80, 100])
def test_plain_resize_keeps_a_ramp_away_from_the_border(kernel, width):
    ramp = np.tile(4 * np.arange(40, dtype=np.uint8) + 20, (3, 1))
    out = OPERATIONS['resize'](Image.fromarray(ramp), width, 3, kernel, antialias=False)
    centers = (np.arange(width) + 0.5) * 40 / width - 0.5
    inside = (centers >= 2) & (centers <= 37)
    difference = np.abs(np.asarray(out, float)[1] - (4 * centers + 20))[inside]
    assert inside.sum() > 10 and difference.max() <= 0.5 + 1e-3


@both_modes
@pytest.mark.parametrize('kernel', KERNELS)
def test_antialiased_resize_is_that_of_pillow(kernel, mode):
    photo = Image.fromarray(noisy_pixels(53, 41, mode))
    for size in [(20, 31), (90, 17), (1, 1)]:
        expected = photo.resize(size, getattr(Image.Resampling, kernel.upper()))
        assert same(OPERATIONS['resize'](photo, *size, kernel), expected)


def test_lanczos_enlarges_as_pillow_does():
    "Enlarging is where antialiasing changes nothing; Pillow rounds between its two passes."
    photo = sample_photo('cat').crop((100, 40, 160, 90))
    ours = np.asarray(resize(photo, 150, 125, 'lanczos', antialias=False), int)[10:-10, 10:-10]
    pillow = np.asarray(photo.resize((150, 125), Image.Resampling.LANCZOS), int)[10:-10, 10:-10]
    assert np.abs(ours - pillow).max() <= 2


def test_box_without_antialiasing_is_nearest():
    photo = smooth_photo()
    assert resize(photo, 7, 9, 'box', antialias=False) == resize(photo, 7, 9, 'nearest')


def test_antialias_matters_on_the_way_down():
    photo = Image.fromarray(noisy_pixels(80, 80, 'L'))
    plain, smoothed = (
        np.asarray(OPERATIONS['shrink'](photo, 4, 'bicubic', antialias)) for antialias in (0, 1)
    )
    assert plain.std() > 2 * smoothed.std()  # of noise, averaging leaves little


# All operations


KEEPING = {
    'down_and_up': {},
    'jpeg': {},
    'blur': {},
    'noise': {},
    'dither': {},
    'brightness': {'factor': 0.7},
    'contrast': {'factor': 0.7},
    'color': {'factor': 0.3},
    'text': {},
    'sharpen': {},
}


CHANGING = {  # of a photo of 60×44
    'resize': ({'width': 33, 'height': 21}, (33, 21)),
    'shrink': ({'scale': 4}, (15, 11)),
    'crop': ({'size': 20}, (20, 20)),
    'trim': ({'multiple': 16}, (48, 32)),
    'rescale': ({'factor': 0.7}, (42, 31)),
    'fit': ({'size': (90, 66), 'scale': 3}, (30, 22)),
    'rotate': ({'degrees': 270}, (44, 60)),
    'gray': ({}, (60, 44)),
}


def test_every_operation_is_tested_here():
    assert set(KEEPING) | set(CHANGING) == set(OPERATIONS)


@both_modes
@pytest.mark.parametrize('op', KEEPING)
def test_operation_keeps_size_and_mode(op, mode):
    photo = smooth_photo(mode=mode)
    before = photo.tobytes()
    out = OPERATIONS[op](photo, **KEEPING[op])
    assert (out.size, out.mode) == (photo.size, mode)
    assert photo.tobytes() == before, 'the photo given was changed'
    if (op, mode) != ('color', 'L'):  # gray stays gray
        assert out.tobytes() != before


@both_modes
@pytest.mark.parametrize('op', CHANGING)
def test_operation_changes_size_as_told(op, mode):
    parameters, size = CHANGING[op]
    photo = smooth_photo(mode=mode)
    before = photo.tobytes()
    out = OPERATIONS[op](photo, **parameters)
    assert out.size == size
    assert out.mode == ('L' if op == 'gray' else mode)
    assert photo.tobytes() == before, 'the photo given was changed'


@pytest.mark.parametrize('op', [op for op in OPERATIONS if op != 'gray'])
def test_profile_outlives_every_operation(op):
    photo = smooth_photo()
    photo.info = {'icc_profile': b'a profile', 'dpi': (72, 72)}
    parameters = {'resize': {'width': 8, 'height': 8}, 'crop': {'size': 8}}.get(op, {})
    assert apply_steps(photo, [[op, parameters]]).info['icc_profile'] == b'a profile'


def test_profile_of_colors_is_dropped_with_the_colors():
    photo = smooth_photo()
    photo.info = {'icc_profile': b'a profile', 'dpi': (72, 72)}
    assert apply_steps(photo, [['gray', {}]]).info == {'dpi': (72, 72)}


BAD = [
    ('resize', {'width': 5, 'height': 5, 'kernel': 'bicubc'}, 'Did you mean bicubic'),
    ('resize', {'width': 0, 'height': 5}, '0×5'),
    ('resize', {'width': 5, 'height': -1}, '5×-1'),
    ('down_and_up', {'up': 'cubic'}, 'cubic'),
    ('jpeg', {'quality': 0}, '0'),
    ('jpeg', {'quality': 101}, '101'),
    ('jpeg', {'subsampling': '4:0:0'}, '4:4:4'),
    ('jpeg', {'shift_x': 16}, '16'),
    ('jpeg', {'shift_y': -1}, '-1'),
    ('blur', {'kind': 'boxy'}, 'Did you mean box'),
    ('blur', {'radius': -1}, '-1'),
    ('noise', {'sigma': -0.1}, '-0.1'),
    ('noise', {'sigma': float('nan')}, 'nan'),
    ('dither', {'colors': 1}, '1'),
    ('dither', {'colors': 257}, '257'),
    ('rotate', {'degrees': 45}, '45'),
    ('crop', {'size': 45}, '60×44'),
    ('crop', {'size': 0}, '0'),
    ('crop', {'size': -5}, '-5'),
    ('shrink', {'scale': 8}, '60×44'),
    ('shrink', {'scale': 0}, '0'),
    ('trim', {'multiple': 45}, '60×44'),
    ('trim', {'multiple': 0}, '0'),
    ('brightness', {'factor': -1}, '-1'),
    ('contrast', {'factor': float('nan')}, 'nan'),
    ('color', {'factor': float('inf')}, 'inf'),
    ('text', {'size': 50}, '50'),
    ('text', {'x': float('nan')}, 'nan'),
    ('text', {'shade': 256}, '256'),
    ('down_and_up', {'width': float('inf')}, 'inf'),
    ('down_and_up', {'height': 0}, '0'),
    ('rescale', {'factor': 1e6}, '1000000'),
    ('dither', {'colors': 2.5}, '2.5'),
    ('crop', {'size': 5, 'x': 2}, '2'),
    ('crop', {'size': 5, 'zoom': 0}, '0'),
    ('crop', {'size': 5, 'zoom': 2}, '2'),
    ('fit', {'size': (60, 44), 'scale': 0}, '0'),
    ('fit', {'size': (60, 44), 'scale': 8}, '60×44'),
    ('fit', {'size': (60, 44), 'kernel': 'boxy'}, 'Did you mean box'),
    ('sharpen', {'radius': -1}, '-1'),
    ('sharpen', {'amount': float('nan')}, 'nan'),
    ('blur', {'stretch': -1}, '-1'),
    ('noise', {'width': float('inf')}, 'inf'),
    ('noise', {'seed': -1}, '-1'),
    ('noise', {'sigma': 'much'}, "'much'"),
    ('blur', {'radius': 1e30}, '1e+30'),
    ('resize', {'width': 5, 'height': 5, 'kernel': []}, 'bicubic'),
]


@pytest.mark.parametrize('op, parameters, word', BAD, ids=lambda v: str(v))
def test_impossible_parameters_are_refused_in_a_sentence(op, parameters, word):
    with pytest.raises(EnhanceError) as error:
        OPERATIONS[op](smooth_photo(), **parameters)
    assert word in one_line(error)


# One by one


@both_modes
def test_text_touches_nothing_but_itself(mode):
    photo = smooth_photo(200, 100, mode)
    words, x, y, size = 'DSC_0042', 0.2, 0.3, 0.25
    out = OPERATIONS['text'](photo, words, x, y, size, shade=0)
    box = ImageDraw.Draw(photo).textbbox(
        (x * 200, y * 100), words, font=ImageFont.load_default(size * 100)
    )
    changed = ImageChops.difference(photo.convert('RGB'), out.convert('RGB')).getbbox()
    assert changed[0] >= int(box[0]) and changed[1] >= int(box[1])
    assert changed[2] <= box[2] + 1 and changed[3] <= box[3] + 1
    assert changed[2] - changed[0] > 0.8 * (box[2] - box[0])
    assert out.convert('L').crop(changed).getextrema()[0] == 0, 'the letters are black'


@both_modes
@pytest.mark.parametrize('op', ['brightness', 'contrast', 'color'])
def test_factor_one_changes_nothing(op, mode):
    photo = smooth_photo(mode=mode)
    assert same(OPERATIONS[op](photo, 1.0), photo)
    assert same(OPERATIONS[op](photo), photo)


@both_modes
def test_factor_zero(mode):
    "Black, the mean of the gray photo, and the gray photo: as Pillow documents."
    photo = smooth_photo(mode=mode)
    gray = photo.convert('L')
    mean = int(np.asarray(gray, float).mean() + 0.5)
    assert same(OPERATIONS['brightness'](photo, 0), Image.new(mode, photo.size))
    assert same(OPERATIONS['contrast'](photo, 0), Image.new('L', photo.size, mean).convert(mode))
    assert same(OPERATIONS['color'](photo, 0), gray.convert(mode))


def test_brightness_multiplies():
    photo = Image.new('RGB', (4, 4), (10, 100, 200))
    assert OPERATIONS['brightness'](photo, 1.5).getpixel((0, 0)) == (15, 150, 255)


@pytest.mark.parametrize('degrees', [90, 180, 270])
def test_rotate_is_counter_clockwise(degrees):
    pixels = noisy_pixels(7, 5, 'RGB')
    out = OPERATIONS['rotate'](Image.fromarray(pixels), degrees)
    np.testing.assert_array_equal(np.asarray(out), np.rot90(pixels, degrees // 90))


def test_a_zoomed_crop_is_a_larger_square_made_small():
    photo = smooth_photo(200, 120)
    for zoom, side in ((0.5, 80), (0.25, 120)):  # 160 are more than there is
        left, top = round(0.3 * (200 - side)), round(1.0 * (120 - side))
        square = photo.crop((left, top, left + side, top + side))
        expected = square.resize((40, 40), Image.Resampling.LANCZOS)
        assert same(OPERATIONS['crop'](photo, 40, 0.3, 1.0, zoom), expected)


def test_fit_gives_the_size_before_whatever_came_in_between():
    photo = smooth_photo(60, 45)
    steps = [['rescale', {'factor': 0.3}], ['rotate', {'degrees': 90}], ['fit', {'scale': 5}]]
    assert apply_steps(photo, steps).size == (12, 9)
    assert apply_steps(photo, [*steps, ['fit', {}]]).size == (60, 45)
    assert same(OPERATIONS['fit'](photo, photo.size), photo)


@both_modes
def test_sharpen_is_the_unsharp_mask(mode):
    "What a blur takes away is added once more: an edge gets a dark and a bright side."
    pixels = np.full((9, 40), 100, np.uint8)
    pixels[:, 20:] = 150
    edge = Image.fromarray(pixels).convert(mode)
    row = np.asarray(OPERATIONS['sharpen'](edge, 2, 1.0).convert('L'))[4].astype(int)
    blurred = np.asarray(edge.convert('L').filter(ImageFilter.GaussianBlur(2)))[4].astype(int)
    assert np.abs(row - (2 * pixels[4].astype(int) - blurred)).max() <= 1
    assert row.min() < 90 and row.max() > 160 and row[0] == 100 and row[-1] == 150
    assert same(OPERATIONS['sharpen'](edge, 2, 0), edge)


def test_crop_and_trim_cut_where_they_say():
    pixels = noisy_pixels(30, 21, 'RGB')
    photo = Image.fromarray(pixels)
    for (x, y), (left, top) in {(0, 0): (0, 0), (1, 1): (22, 13), (0.5, 0): (11, 0)}.items():
        out = np.asarray(OPERATIONS['crop'](photo, 8, x, y))
        np.testing.assert_array_equal(out, pixels[top : top + 8, left : left + 8])
    np.testing.assert_array_equal(np.asarray(OPERATIONS['trim'](photo, 4)), pixels[:20, :28])
    assert same(OPERATIONS['gray'](photo), photo.convert('L'))


@pytest.mark.parametrize('colors', [2, 8, 32, 256])
def test_dither_has_few_colors_and_the_same_brightness(colors):
    photo = sample_photo('cat').crop((0, 0, 200, 200))
    out = OPERATIONS['dither'](photo, colors)
    found = len(out.getcolors(200 * 200))
    assert colors / 2 <= found <= colors
    if colors >= 8:  # dots of Floyd and Steinberg keep the mean where the palette spans the photo
        assert np.asarray(out, float).mean() == pytest.approx(np.asarray(photo).mean(), abs=3)


# Chance


def test_between_includes_both_ends_of_whole_numbers():
    rng = dice(0)
    counts = Counter(Between(15, 19).draw(rng) for _ in range(5000))
    assert set(counts) == {15, 16, 17, 18, 19}
    assert chisquare(list(counts.values())).pvalue > 1e-4
    assert all(isinstance(value, int) for value in counts)
    assert Between(3, 3).draw(rng) == 3


def test_between_floats_is_uniform():
    draws = np.array([Between(0.5, 2.0).draw(dice(i)) for i in range(3000)])
    assert draws.min() >= 0.5 and draws.max() <= 2.0
    counts, _ = np.histogram(draws, 10, (0.5, 2.0))
    assert chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize(
    'ends', [(2, 1), (0.5, 0.4), (float('nan'), 1), (0, float('nan')), ('1', 2), (1, None)]
)
def test_between_refuses_ends_that_are_not_in_order(ends):
    with pytest.raises(EnhanceError) as error:
        Between(*ends)
    assert str(ends[0]) in one_line(error)


def test_one_of_keeps_to_its_weights():
    rng = dice(0)
    counts = Counter(OneOf('a', 'b', 'c', 'd', weights=[1, 2, 5, 0]).draw(rng) for _ in range(8000))
    assert set(counts) == set('abc')
    assert chisquare([counts[k] for k in 'abc'], [1000, 2000, 5000]).pvalue > 1e-4
    counts = Counter(OneOf(0, 1, 2).draw(rng) for _ in range(6000))
    assert chisquare([counts[k] for k in range(3)]).pvalue > 1e-4


def test_one_of_draws_what_it_holds():
    rng = dice(0)
    draws = {OneOf(Between(1, 2), OneOf(7, 8), 'x').draw(rng) for _ in range(200)}
    assert draws == {1, 2, 7, 8, 'x'}


@pytest.mark.parametrize(
    'weights', [[1], [1, 2, 3], [0, 0], [-1, 2], [float('nan'), 1], [float('inf'), 1]]
)
def test_one_of_refuses_weights_that_make_no_sense(weights):
    with pytest.raises(EnhanceError) as error:
        OneOf('a', 'b', weights=weights)
    one_line(error)


def test_one_of_needs_a_choice():
    with pytest.raises(EnhanceError):
        OneOf()
