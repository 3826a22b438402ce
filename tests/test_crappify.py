"""Making photos bad: what operations do to pixels, what recipes draw, folders that survive."""

import base64
import csv
import hashlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageDraw, ImageFont
from scipy.stats import chisquare

from enhance_lib.enhance_lib import crappify
from enhance_lib.applications.batch import CrappifyPair, crappify_folder, resize_folder
from enhance_lib.crappify import (
    Between,
    Degrader,
    OneOf,
    RECIPES,
    Recipe,
    Step,
    apply_steps,
    dice,
    get_recipe,
)
from enhance_lib.toolbox.folders import run_folder
from enhance_lib.toolbox.operations import KERNELS, OPERATIONS, resize
from enhance_lib.toolbox.show import CrappifyWidget, SLIDERS
from enhance_lib.toolbox.datasets import sample_photo
from enhance_lib.toolbox.errors import EnhanceError
from enhance_lib.toolbox.files import open_photo, write_atomically


def one_line(error):
    "The message of a caught error, which must be a single sentence or a few on one line."
    message = str(error.value)
    assert message and '\n' not in message
    return message


def smooth_photo(width=60, height=44, mode='RGB', seed=0):
    "A photo with soft shapes and some grain, so that every operation has something to change."
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    pixels = pixels + rng.normal(0, 6, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)


def noisy_pixels(width, height, mode, seed=0):
    shape = (height, width, 3) if mode == 'RGB' else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def same(a, b):
    return a.size == b.size and a.mode == b.mode and a.tobytes() == b.tobytes()


both_modes = pytest.mark.parametrize('mode', ['L', 'RGB'])


# Resizing


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


def test_antialias_matters_on_the_way_down():
    photo = Image.fromarray(noisy_pixels(80, 80, 'L'))
    plain, smoothed = (
        np.asarray(OPERATIONS['shrink'](photo, 4, 'bicubic', antialias)) for antialias in (0, 1)
    )
    assert plain.std() > 2 * smoothed.std()  # of noise, averaging leaves little


@both_modes
def test_down_and_up_is_two_resizes_by_pillow(mode):
    photo = smooth_photo(61, 45, mode)
    out = OPERATIONS['down_and_up'](photo, 0.5, 0.3, 'box', 'bilinear')
    small = photo.resize((30, 14), Image.Resampling.BOX)  # round(30.5) and round(13.5)
    assert same(out, small.resize((61, 45), Image.Resampling.BILINEAR))
    assert same(OPERATIONS['down_and_up'](photo, 1, 1), photo)


# The other operations


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
}
CHANGING = {  # of a photo of 60×44
    'resize': ({'width': 33, 'height': 21}, (33, 21)),
    'shrink': ({'scale': 4}, (15, 11)),
    'crop': ({'size': 20}, (20, 20)),
    'trim': ({'multiple': 16}, (48, 32)),
    'rescale': ({'factor': 0.7}, (42, 31)),
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


@both_modes
@pytest.mark.parametrize('quality', [1, 10, 50, 95])
@pytest.mark.parametrize('subsampling', ['4:2:0', '4:2:2', '4:4:4'])
def test_jpeg_is_the_round_trip_of_pillow(quality, subsampling, mode):
    photo = smooth_photo(mode=mode)
    file = io.BytesIO()
    photo.save(file, 'JPEG', quality=quality, subsampling=subsampling)
    assert same(OPERATIONS['jpeg'](photo, quality, subsampling), Image.open(file).convert(mode))


def test_jpeg_subsampling_loses_color():
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, ::2] = (255, 0, 0)  # red and blue columns, one pixel wide
    pixels[:, 1::2] = (0, 0, 255)
    photo = Image.fromarray(pixels)
    spread = {
        s: np.asarray(OPERATIONS['jpeg'](photo, 95, s))[..., 0].std() for s in ('4:2:0', '4:4:4')
    }
    assert spread['4:4:4'] > 100 > 2 * spread['4:2:0']
    error = [
        np.abs(np.asarray(OPERATIONS['jpeg'](sample_photo('cat'), q), float) - sample_photo('cat'))
        for q in (10, 50, 90)
    ]
    assert error[0].mean() > error[1].mean() > error[2].mean()


@both_modes
@pytest.mark.parametrize('shift', [(4, 4), (15, 0), (0, 15), (3, 11)])
def test_shifted_jpeg_is_that_of_a_larger_photo_that_was_cropped_afterwards(shift, mode):
    "Exactly, in all blocks that lie inside; the first of a row or column see what was cut off."
    large = sample_photo('cat').crop((100, 40, 196, 136)).convert(mode)
    photo = large.crop((*shift, 96, 96))
    file = io.BytesIO()
    large.save(file, 'JPEG', quality=10, subsampling='4:2:0')
    expected = np.asarray(Image.open(file).convert(mode).crop((*shift, 96, 96)))
    ours = OPERATIONS['jpeg'](photo, 10, shift_x=shift[0], shift_y=shift[1])
    assert (ours.size, ours.mode) == (photo.size, mode)
    assert np.array_equal(np.asarray(ours)[32:, 32:], expected[32:, 32:])
    straight = np.asarray(OPERATIONS['jpeg'](photo, 10))
    assert not np.array_equal(straight[32:, 32:], expected[32:, 32:])


def test_shifted_jpeg_makes_no_edge_where_the_photo_begins():
    "What is put before the photo goes on as its border does: a plain photo stays plain."
    plain = Image.new('RGB', (40, 30), (200, 90, 30))
    ours = np.asarray(OPERATIONS['jpeg'](plain, 10, shift_x=5, shift_y=3)).astype(int)
    straight = np.asarray(OPERATIONS['jpeg'](plain, 10)).astype(int)
    assert np.abs(ours - straight[0, 0]).max() == 0


def test_shifted_jpeg_begins_with_a_part_of_a_block():
    "Of quality 1 hardly more than the mean of a block is left: so its borders can be counted."
    ramp = Image.fromarray(np.tile(np.arange(60, dtype=np.uint8) * 4, (16, 1)))
    for shift in (0, 3, 13):
        row = np.asarray(OPERATIONS['jpeg'](ramp, 1, shift_x=shift))[8].astype(int)
        jumps = np.flatnonzero(np.diff(row)) + 1
        assert set((jumps + shift) % 8) == {0}


@pytest.mark.parametrize('gray', [True, False])
def test_noise_has_its_sigma_and_no_bias(gray):
    photo = Image.new('RGB', (200, 200), (128, 128, 128))
    pixels = np.asarray(OPERATIONS['noise'](photo, 10, gray, seed=3), float) - 128
    assert abs(pixels.mean()) < 0.25  # 5 standard errors of 40,000 draws
    assert pixels.std() == pytest.approx(10, rel=0.02)
    equal = (pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all()
    assert equal == gray
    if not gray:
        channels = np.corrcoef(pixels.reshape(-1, 3).T)
        assert np.abs(channels - np.eye(3)).max() < 0.03


@both_modes
def test_noise_depends_on_its_seed_alone(mode):
    photo = smooth_photo(mode=mode)
    one, again, other = (OPERATIONS['noise'](photo, 10, seed=s) for s in (1, 1, 2))
    assert same(one, again) and not same(one, other)
    assert same(OPERATIONS['noise'](photo, 0), photo)


def test_noise_is_cut_off_at_black_and_white():
    "Wrapped around, white would turn black."
    for level in (0, 255):
        pixels = np.asarray(OPERATIONS['noise'](Image.new('L', (50, 50), level), 10), int)
        assert np.abs(pixels - level).max() < 60


@pytest.mark.parametrize('colors', [2, 8, 32, 256])
def test_dither_has_few_colors_and_the_same_brightness(colors):
    photo = sample_photo('cat').crop((0, 0, 200, 200))
    out = OPERATIONS['dither'](photo, colors)
    found = len(out.getcolors(200 * 200))
    assert colors / 2 <= found <= colors
    if colors >= 8:  # dots of Floyd and Steinberg keep the mean where the palette spans the photo
        assert np.asarray(out, float).mean() == pytest.approx(np.asarray(photo).mean(), abs=3)


@pytest.mark.parametrize('kind', ['gaussian', 'box'])
def test_blur_spreads_a_dot(kind):
    pixels = np.zeros((41, 41), np.float32)
    pixels[20, 20] = 255
    photo = Image.fromarray(pixels.astype(np.uint8))
    out = np.asarray(OPERATIONS['blur'](photo, 2, kind), float)
    if kind == 'box':  # reaching 2 pixels: 5×5
        expected = np.zeros((41, 41))
        expected[18:23, 18:23] = 255 / 25
    else:
        from scipy.ndimage import gaussian_filter

        expected = gaussian_filter(pixels, 2)
    assert np.abs(out - expected).max() <= 1.2  # Pillow nears the Gaussian by boxes
    assert same(OPERATIONS['blur'](photo, 0, kind), photo)


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


def test_crop_and_trim_cut_where_they_say():
    pixels = noisy_pixels(30, 21, 'RGB')
    photo = Image.fromarray(pixels)
    for (x, y), (left, top) in {(0, 0): (0, 0), (1, 1): (22, 13), (0.5, 0): (11, 0)}.items():
        out = np.asarray(OPERATIONS['crop'](photo, 8, x, y))
        np.testing.assert_array_equal(out, pixels[top : top + 8, left : left + 8])
    np.testing.assert_array_equal(np.asarray(OPERATIONS['trim'](photo, 4)), pixels[:20, :28])
    assert same(OPERATIONS['gray'](photo), photo.convert('L'))


BAD = [
    ('resize', {'width': 5, 'height': 5, 'kernel': 'bicubc'}, 'Did you mean bicubic'),
    ('resize', {'width': 0, 'height': 5}, '0×5'),
    ('resize', {'width': 5, 'height': -1}, '5×-1'),
    ('down_and_up', {'up': 'cubic'}, 'cubic'),
    ('jpeg', {'quality': 0}, '0'),
    ('jpeg', {'quality': 96}, '96'),
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
]


@pytest.mark.parametrize('op, parameters, word', BAD, ids=lambda v: str(v))
def test_impossible_parameters_are_refused_in_a_sentence(op, parameters, word):
    with pytest.raises(EnhanceError) as error:
        OPERATIONS[op](smooth_photo(), **parameters)
    assert word in one_line(error)


# Drawing


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


@pytest.mark.parametrize('ends', [(2, 1), (0.5, 0.4), (float('nan'), 1), (0, float('nan'))])
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


@pytest.mark.parametrize(
    'make, word',
    [
        (lambda: Step('jpg'), 'Did you mean jpeg'),
        (lambda: Step('jpeg', qualty=10), 'Did you mean quality'),
        (lambda: Step('jpeg', photo=None), 'photo'),
        (lambda: Step('jpeg', p=1.1), '1.1'),
        (lambda: Step('jpeg', p=-0.1), '-0.1'),
        (lambda: Step('jpeg', p=float('nan')), 'nan'),
        (lambda: get_recipe('imag2'), 'Did you mean image2'),
        (lambda: Degrader('wilde'), 'Did you mean wild'),
        (lambda: CrappifyPair('gam'), 'gan'),
        (lambda: RECIPES['image2'].draw(-1), '-1'),
    ],
)
def test_mistakes_in_a_recipe_are_named(make, word):
    with pytest.raises(EnhanceError) as error:
        make()
    assert word in one_line(error)


def test_unknown_recipe_lists_all_there_are():
    with pytest.raises(EnhanceError) as error:
        get_recipe('nothing like it')
    assert all(name in one_line(error) for name in RECIPES)


@pytest.mark.parametrize('p', [0, 0.3, 1])
def test_step_happens_as_often_as_it_says(p):
    rng = dice(0)
    done = sum(bool(Step('gray', p=p).draw(rng)) for _ in range(4000))
    assert abs(done - 4000 * p) <= 5 * (4000 * p * (1 - p)) ** 0.5


# What the recipes draw


def draws(recipe, n, key='steps'):
    return [RECIPES[recipe].draw(0, f'{i}.jpg')[key] for i in range(n)]


def of(plans, op):
    "The parameters of all steps of a kind."
    return [parameters for plan in plans for name, parameters in plan if name == op]


def about(count, n, p):
    "Is this count one that n draws of probability p give? Wrong by chance 1 in a million times."
    return abs(count - n * p) <= 5 * (n * p * (1 - p)) ** 0.5 + 1


def uniform(values, low, high):
    values = np.array(values)
    assert low - 1e-4 <= values.min() and values.max() <= high + 1e-4  # drawn with 4 digits
    counts, _ = np.histogram(values, 8, (low - 1e-4, high + 1e-4))
    assert chisquare(counts).pvalue > 1e-5


def evenly(values, choices):
    counts = Counter(values)
    assert set(counts) == set(choices)
    assert chisquare([counts[c] for c in choices]).pvalue > 1e-5


def test_image2_draws_what_it_promises():
    n = 20_000
    plans = draws('image2', n)
    known = {'jpeg', 'blur', 'brightness', 'color', 'contrast', 'down_and_up'}
    assert {name for plan in plans for name, _ in plan} <= known
    assert max(len(plan) for plan in plans) <= len(known)

    jpegs = [p['quality'] for p in of(plans, 'jpeg')]
    assert about(len(jpegs), n, 0.95)
    low = [q for q in jpegs if q < 40]
    assert about(len(low), len(jpegs), 0.5)
    evenly(low, range(15, 20))
    evenly([q for q in jpegs if q >= 40], range(55, 75))

    blurs = of(plans, 'blur')
    assert about(len(blurs), n, 0.005)
    assert {b['radius'] for b in blurs} == {1}
    assert {b['kind'] for b in blurs} == {'gaussian', 'box'}
    for op in ('brightness', 'color', 'contrast'):
        factors = [p['factor'] for p in of(plans, op)]
        assert about(len(factors), n, 0.001) and len(factors) > 2
        assert all(0.95 <= f <= 1.05 for f in factors) and max(factors) > min(factors)

    small = of(plans, 'down_and_up')
    assert about(len(small), n, 0.95)
    for axis in ('width', 'height'):
        uniform([p[axis] for p in small], 1 / 2.6, 1 / 1.4)
    assert abs(np.corrcoef([p['width'] for p in small], [p['height'] for p in small])[0, 1]) < 0.04
    ways = itertools.product(('nearest', 'bilinear', 'bicubic'), repeat=2)
    evenly([(p['down'], p['up']) for p in small], list(ways))
    orders = {tuple(name for name, _ in plan if name in ('jpeg', 'down_and_up')) for plan in plans}
    assert orders == {(), ('jpeg',), ('down_and_up',), ('jpeg', 'down_and_up')}


def test_gan_draws_what_it_promises():
    n = 4000
    plans = draws('gan', n)
    orders = {tuple(name for name, _ in plan) for plan in plans}
    full = ('down_and_up', 'contrast', 'text', 'dither')
    assert orders == {full, full[:3], full[:2], (*full[:2], 'dither')}
    uniform([p['width'] for p in of(plans, 'down_and_up')], 0.5, 0.8)
    uniform([p['height'] for p in of(plans, 'down_and_up')], 0.5, 0.8)
    uniform([p['factor'] for p in of(plans, 'contrast')], 0.5, 1.7)
    assert about(len(of(plans, 'text')), n, 0.8) and about(len(of(plans, 'dither')), n, 0.5)
    evenly([p['colors'] for p in of(plans, 'dither')], range(8, 33))


def test_jpeg10_draws_what_it_promises():
    n = 4000
    assert all(plan == [['jpeg', {'quality': 10}]] for plan in draws('jpeg10', 50))
    before = draws('jpeg10', n, 'before')
    factors = [p['factor'] for p in of(before, 'rescale')]
    degrees = [p['degrees'] for p in of(before, 'rotate')]
    assert about(len(factors), n, 0.5) and about(len(degrees), n, 0.5)
    assert about(sum(len(plan) == 2 for plan in before), n, 0.25)
    evenly(factors, [0.9, 0.8, 0.7, 0.6])
    evenly(degrees, [90, 180, 270])


def test_skyline_draws_what_it_promises():
    for i in range(20):
        plan = RECIPES['skyline'].draw(i, 'a')
        assert plan['before'] == [['resize', {'width': 1024, 'height': 1024}], ['gray', {}]]
        assert plan['steps'] == [['jpeg', {'quality': 20}]]


def test_any_kernel_draws_what_it_promises():
    plans = draws('any-kernel', 7000)
    assert {(len(plan), plan[0][0], plan[0][1]['scale']) for plan in plans} == {(1, 'shrink', 4)}
    kinds = Counter(
        (p['kernel'], p['kernel'] == 'nearest' or p.get('antialias', True))
        for p in of(plans, 'shrink')
    )  # for 'nearest' antialiasing is without effect
    expected = {
        ('nearest', True): 2000,
        ('bilinear', False): 2000,
        ('bicubic', False): 2000,
        ('bicubic', True): 1000,
    }
    assert set(kinds) == set(expected)
    assert chisquare([kinds[k] for k in expected], list(expected.values())).pvalue > 1e-5
    assert draws('any-kernel', 1, 'before') == [[['trim', {'multiple': 4}]]]


def test_wild_is_wild_within_bounds():
    plans = draws('wild', 3000)
    names = [[name for name, _ in plan] for plan in plans]
    assert all(n[-1] == 'jpeg' for n in names)
    most = Counter()
    for n in names:
        most |= Counter(n[:-1])  # the greatest count of each
    assert set(most.values()) == {2}
    assert {'down_and_up', 'blur', 'noise', 'jpeg'} <= set(most)
    assert ('brightness' in most) and ('contrast' in most) and ('color' in most)
    pairs = [(a, b) for n in names for a, b in itertools.pairwise(n[:-1])]
    counts = Counter(pairs)
    there, back = counts['blur', 'down_and_up'], counts['down_and_up', 'blur']
    assert there > 100 and about(there, there + back, 0.5), 'the order leans to one side'
    assert len({json.dumps(plan) for plan in plans}) > 2990


def plain(value):
    "Is this made of nothing but what JSON knows (and no numpy number that looks like it)?"
    if type(value) in (list, dict):
        return all(plain(v) for v in (value.values() if type(value) is dict else value))
    return type(value) in (str, int, float, bool, type(None))


@pytest.mark.parametrize('name', RECIPES)
def test_what_is_drawn_survives_json(name):
    for i in range(200):
        plan = RECIPES[name].draw(0, str(i), 32)
        assert json.loads(json.dumps(plan)) == plan and plain(plan)


@pytest.mark.parametrize('name', RECIPES)
def test_draws_depend_on_seed_and_name_alone(name):
    recipe = RECIPES[name]
    names = [f'{i}.jpg' for i in range(50)]
    forth = {n: recipe.draw(5, n) for n in names}
    np.random.seed(0)
    random.seed(0)
    assert {n: recipe.draw(5, n) for n in reversed(names)} == forth
    if name != 'skyline':  # which leaves nothing to chance
        assert [recipe.draw(6, n) for n in names] != list(forth.values())
        assert len({json.dumps(plan) for plan in forth.values()}) > 3


def test_no_seed_draws_anew_each_time():
    plans = {json.dumps(RECIPES['wild'].draw(None, 'a.jpg')) for _ in range(20)}
    assert len(plans) == 20


@pytest.mark.parametrize('name', RECIPES)
def test_same_seed_and_name_give_the_same_bytes(name):
    photo = smooth_photo()
    one, again = (RECIPES[name].pair(photo, 3, 'x.png') for _ in range(2))
    assert same(one[0], again[0]) and same(one[1], again[1])


def test_degrader_needs_no_settings():
    photo = sample_photo('cat').resize((90, 60))
    out = Degrader()(photo)
    assert (out.size, out.mode) == (photo.size, 'RGB') and not same(out, photo)
    assert same(Degrader('gan', 2)(photo, 'a'), RECIPES['gan'](photo, 2, 'a'))


def expected_size(recipe, plan, width, height):
    "The size of the good and the degraded photo, worked out from the size of the photo and the plan."
    for op, p in plan['before']:
        if op == 'rescale':
            width, height = (max(round(s * p['factor']), 1) for s in (width, height))
        if op == 'rotate' and p['degrees'] != 180:
            width, height = height, width
        if op == 'resize':
            width, height = p['width'], p['height']
        if op == 'trim':
            width, height = width // 4 * 4, height // 4 * 4
        if op == 'crop':
            width = height = p['size']
    scale = 4 if recipe == 'any-kernel' else 1
    return (width, height), (width // scale, height // scale)


@pytest.mark.parametrize('recipe', RECIPES)
@settings(max_examples=15, deadline=None)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    mode=st.sampled_from(['L', 'RGB']),
    seed=st.integers(0, 2**31),
    size=st.none() | st.sampled_from([1, 8, 32]),
)
@example(width=1, height=1, mode='RGB', seed=0, size=None)
@example(width=1, height=5000, mode='RGB', seed=1, size=None)
@example(width=5000, height=1, mode='L', seed=2, size=None)
@example(width=33, height=31, mode='RGB', seed=2, size=32)
def test_recipes_take_photos_of_any_size(recipe, width, height, mode, seed, size):
    plan = RECIPES[recipe].draw(seed, 'a', size)
    good_size, bad_size = expected_size(recipe, plan, width, height)
    photo = Image.new(mode, (width, height), 90 if mode == 'L' else (90, 100, 200))
    try:
        degraded, clean = RECIPES[recipe].pair(photo, seed, 'a', size)
    except EnhanceError as e:
        assert '\n' not in str(e)
        # it can't be trimmed, cut out or divided: the only excuses
        uncut = {**plan, 'before': [step for step in plan['before'] if step[0] != 'crop']}
        (w, h), _ = expected_size(recipe, uncut, width, height)
        too_small = size is not None and size > min(w, h)
        assert too_small or (recipe == 'any-kernel' and (min(w, h) < 4 or size == 1))
        return
    assert (clean.size, degraded.size) == (good_size, bad_size)
    assert degraded.mode == clean.mode == ('L' if recipe == 'skyline' else mode)


# Folders


SHARED_FIXTURE = HealthCheck.function_scoped_fixture  # the photos are only read

NAMES = [
    'a.png',
    'b.jpg',
    'sub/a.png',
    'sub/deeper/c d.bmp',
    'Straße/żółw.png',
    '日本.jpg',
    *(f'n{i}.png' for i in range(6)),
]


@pytest.fixture
def photos(tmp_path):
    "A folder of photos of different sizes and kinds."
    folder = tmp_path / 'photos'
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


def crappified(photos, out, *args, **kwargs):
    return crappify_folder(photos, out, *args, **{'n_workers': 1, 'progress': False} | kwargs)


@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    recipe=st.sampled_from([name for name in RECIPES if name != 'skyline']),
    seed=st.integers(0, 2**31),
)
@example(recipe='skyline', seed=0)  # its photos have a million pixels: once is enough
def test_folder_does_not_depend_on_the_number_of_workers(photos, recipe, seed):
    with tempfile.TemporaryDirectory() as folder:
        base, found = Path(folder), []
        for n in (1, 2, 4):
            degraded, clean = base / f'bad{n}', base / f'good{n}'
            report = crappified(photos, degraded, recipe, seed, clean_path=clean, n_workers=n)
            assert (report.made, report.kept, report.failed) == (len(NAMES), 0, {})
            found.append((contents(degraded), contents(clean)))
        assert found[0] == found[1] == found[2]
        assert set(NAMES) | {'crappify.csv'} == set(found[0][0])
        assert set(NAMES) <= set(found[0][1])
        pixels = [hash(open_photo(base / 'bad1' / name).tobytes()) for name in NAMES]
        assert len(set(pixels)) == len(NAMES)


def test_folder_does_what_the_log_says(photos, tmp_path):
    degraded, clean = tmp_path / 'degraded', tmp_path / 'clean'
    crappified(photos, degraded, 'jpeg10', 4, clean_path=clean, format='png', size=16)
    log = rows(degraded / 'crappify.csv')
    assert len(log) == len(NAMES)
    for name in NAMES:
        target = Path(name).with_suffix('.png').as_posix()
        if name in ('a.png', 'sub/a.png'):
            assert target in log
        expected = RECIPES['jpeg10'].pair(open_photo(photos / name), 4, name, 16)
        assert same(open_photo(degraded / target, None), expected[0])
        assert same(open_photo(clean / target, None), expected[1])
        plan = json.loads(log[target]['job'])
        assert log[target]['error'] == ''
        assert same(apply_steps(open_photo(photos / name), plan['before']), expected[1])
        assert same(apply_steps(expected[1], plan['steps']), expected[0])


@pytest.mark.parametrize('clash', [['a.png'], ['a.png', 'a.jpg.png'], ['a.jpeg', 'a.JPG']])
def test_same_names_of_different_formats_all_survive(photos, tmp_path, clash):
    for path in list(photos.glob('*.*')):
        path.unlink()
    shutil.rmtree(photos / 'sub')
    shutil.rmtree(photos / 'Straße')
    names = ['a.jpg', *clash]
    for i, name in enumerate(names):
        smooth_photo(20 + i, 20, seed=i).save(photos / name)
    report = crappified(photos, tmp_path / 'degraded', 'image2', format='png')
    assert report.made == len(names)
    found = [p for p in (tmp_path / 'degraded').iterdir() if p.suffix == '.png']
    assert sorted(open_photo(p).width for p in found) == [20 + i for i in range(len(names))]


def test_unknown_format_is_refused(photos, tmp_path):
    with pytest.raises(EnhanceError) as error:
        crappified(photos, tmp_path / 'degraded', format='pngg')
    assert '.png' in one_line(error)


def test_name_that_is_no_text_is_no_reason_to_stop(photos, tmp_path):
    "On Linux a name is any bytes; old disks hold names in Latin-1."
    try:
        shutil.copy(photos / 'a.png', photos / os.fsdecode(b'caf\xe9.png'))
    except (OSError, UnicodeError):
        pytest.skip('this file system wants names to be text')
    report = crappified(photos, tmp_path / 'degraded')
    assert report.made == len(NAMES) + 1
    assert crappified(photos, tmp_path / 'degraded').kept == len(NAMES) + 1


def test_second_run_keeps_everything(photos, tmp_path):
    degraded, clean = tmp_path / 'degraded', tmp_path / 'clean'
    crappified(photos, degraded, 'gan', clean_path=clean)
    before = {p: p.stat().st_mtime_ns for p in [*degraded.rglob('*.*'), *clean.rglob('*.*')]}
    report = crappified(photos, degraded, 'gan', clean_path=clean)
    assert (report.made, report.kept) == (0, len(NAMES))
    after = {p: p.stat().st_mtime_ns for p in before}
    assert [p for p in before if before[p] != after[p] and p.suffix != '.csv'] == []


def test_what_is_missing_is_made_again(photos, tmp_path):
    degraded, clean = tmp_path / 'degraded', tmp_path / 'clean'
    crappified(photos, degraded, 'gan', clean_path=clean)
    before = contents(degraded), contents(clean)
    (degraded / 'a.png').unlink()
    (clean / 'b.jpg').unlink()
    report = crappified(photos, degraded, 'gan', clean_path=clean)
    assert (report.made, report.kept) == (2, len(NAMES) - 2)
    assert (contents(degraded), contents(clean)) == before


def test_another_seed_or_recipe_makes_anew_what_differs(photos, tmp_path):
    degraded = tmp_path / 'degraded'
    crappified(photos, degraded, 'image2', 0)
    for recipe, seed in [('image2', 1), ('gan', 1), ('image2', 0)]:
        report = crappified(photos, degraded, recipe, seed)
        assert (report.made, report.kept) == (len(NAMES), 0)
        fresh = tmp_path / f'{recipe}{seed}'
        crappified(photos, fresh, recipe, seed)
        assert contents(degraded) == contents(fresh)


def test_only_what_differs_is_made_anew(photos, tmp_path):
    "Two recipes that agree about all photos but a few."
    often = Recipe('often', (Step('jpeg', quality=20), Step('blur', p=0.5, radius=2)))
    rarely = Recipe('rarely', (Step('jpeg', quality=20), Step('blur', p=0.2, radius=2)))
    differ = [n for n in NAMES if often.draw(0, n) != rarely.draw(0, n)]
    assert 0 < len(differ) < len(NAMES), 'choose other probabilities'
    degraded = tmp_path / 'degraded'
    crappified(photos, degraded, often)
    before = {n: (degraded / n).stat().st_mtime_ns for n in NAMES}
    report = crappified(photos, degraded, rarely)
    assert (report.made, report.kept) == (len(differ), len(NAMES) - len(differ))
    assert {n for n in NAMES if before[n] != (degraded / n).stat().st_mtime_ns} == set(differ)


def test_format_and_back_again(photos, tmp_path):
    "What an earlier run made is not foreign to a later one, whatever was done in between."
    for format in ('jpg', 'png', 'jpg'):
        report = crappified(photos, tmp_path / 'degraded', 'image2', format=format)
        assert report.made + report.kept == len(NAMES)


def test_photo_that_comes_back_is_not_foreign(photos, tmp_path):
    crappified(photos, tmp_path / 'degraded')
    (photos / 'n1.png').rename(tmp_path / 'n1.png')
    crappified(photos, tmp_path / 'degraded')
    (tmp_path / 'n1.png').rename(photos / 'n1.png')
    assert crappified(photos, tmp_path / 'degraded').kept == len(NAMES)


@pytest.mark.parametrize('n_workers', [1, 2])
def test_failed_photos_are_reported_and_the_others_done(photos, tmp_path, n_workers):
    (photos / 'empty.png').touch()
    (photos / 'text.jpg').write_text('This is not a photo.')
    whole = (photos / 'n5.png').read_bytes()
    (photos / 'cut.png').write_bytes(whole[: len(whole) // 2])
    smooth_photo(5, 50).save(photos / 'narrow.png')
    wrong = {'empty.png', 'text.jpg', 'cut.png', 'narrow.png'}
    degraded, clean = tmp_path / 'degraded', tmp_path / 'clean'
    for kept in (0, len(NAMES)):  # a second run tries the failed ones again
        report = crappified(photos, degraded, size=24, clean_path=clean, n_workers=n_workers)
        assert (report.made, report.kept) == (len(NAMES) - kept, kept)
        assert set(report.failed) == wrong
        for why in report.failed.values():
            assert '\n' not in why
            assert 'Error' not in why, 'a sentence, not the name of a class'
        for name in ('empty.png', 'text.jpg', 'cut.png'):
            assert name in report.failed[name]
            assert name in str(report)
        assert 'narrow.png' in report.failed['narrow.png'], 'which photo is too small?'
        log = rows(degraded / 'crappify.csv')
        assert {n for n, row in log.items() if row['error']} == wrong
        assert log['empty.png']['error'] == report.failed['empty.png']
        for folder in (degraded, clean):
            assert not wrong & set(contents(folder))
            assert set(NAMES) <= set(contents(folder))


def test_repaired_photo_is_made_and_its_error_goes(photos, tmp_path):
    (photos / 'x.png').touch()
    crappified(photos, tmp_path / 'degraded')
    smooth_photo().save(photos / 'x.png')
    report = crappified(photos, tmp_path / 'degraded')
    assert (report.made, report.kept, report.failed) == (1, len(NAMES), {})
    assert not any(row['error'] for row in rows(tmp_path / 'degraded' / 'crappify.csv').values())


# Folders that must be left alone


def test_foreign_photos_in_the_output_are_refused_and_untouched(photos, tmp_path):
    degraded = tmp_path / 'degraded'
    degraded.mkdir()
    (degraded / 'a.png').write_bytes(b'somebody else made this')
    (degraded / 'notes.txt').write_text('mine')
    before = contents(degraded)
    with pytest.raises(EnhanceError) as error:
        crappified(photos, degraded)
    assert 'a.png' in one_line(error)
    assert contents(degraded) == before


def test_foreign_photo_beside_ours_is_refused_before_anything_is_changed(photos, tmp_path):
    degraded = tmp_path / 'degraded'
    crappified(photos, degraded)
    smooth_photo().save(photos / 'new.png')
    (degraded / 'new.png').write_bytes(b'somebody else made this')
    before = contents(degraded)
    with pytest.raises(EnhanceError):
        crappified(photos, degraded, seed=1)
    assert contents(degraded) == before


@pytest.mark.parametrize('seed', [0, 1])
@pytest.mark.parametrize('first_run', [False, True])
def test_foreign_photos_in_good_path_are_refused_and_untouched(photos, tmp_path, first_run, seed):
    "Also when the degraded ones are of an earlier run: it made none of what is in the other folder."
    degraded, album = tmp_path / 'degraded', tmp_path / 'album'
    if first_run:
        crappified(photos, degraded)
    shutil.copytree(photos, album)
    before = contents(album)
    with pytest.raises(EnhanceError) as error:
        crappified(photos, degraded, seed=seed, clean_path=album)
    one_line(error)
    assert contents(album) == before


@pytest.mark.parametrize('text', ['a,b\n1,2\n', '', 'fname\na.png\n', '\x00\n'])
def test_foreign_table_is_refused_and_untouched(photos, tmp_path, text):
    degraded = tmp_path / 'degraded'
    degraded.mkdir()
    (degraded / 'crappify.csv').write_text(text)
    with pytest.raises(EnhanceError) as error:
        crappified(photos, degraded)
    assert 'crappify.csv' in one_line(error)
    assert (degraded / 'crappify.csv').read_text() == text


def test_other_files_in_the_output_stay(photos, tmp_path):
    degraded = tmp_path / 'degraded'
    (degraded / 'sub').mkdir(parents=True)
    others = {'notes.txt': 'mine', 'sub/holiday.png': 'mine', '.part': 'mine', 'x.part': 'mine'}
    for name, text in others.items():
        (degraded / name).write_text(text)
    crappified(photos, degraded)
    assert {name: (degraded / name).read_text() for name in others} == others


def outputs_that_overlap(photos, tmp_path):
    (tmp_path / 'link').symlink_to(photos)
    yield 'the same', photos
    yield 'inside', photos / 'degraded'
    yield 'around', tmp_path
    yield 'by another way', photos / 'sub' / '..'
    yield 'a link', tmp_path / 'link'


def test_overlapping_folders_are_refused(photos, tmp_path):
    before = contents(photos)
    for what, out in outputs_that_overlap(photos, tmp_path):
        for call in (
            lambda out=out: crappified(photos, out),
            lambda out=out: crappified(photos, tmp_path / 'degraded', clean_path=out),
            lambda out=out: resize_folder(photos, out, 16, 1, False),
        ):
            with pytest.raises(EnhanceError) as error:
                call()
            assert one_line(error), what
    with pytest.raises(EnhanceError):
        crappified(photos, tmp_path / 'degraded', clean_path=tmp_path / 'degraded')
    with pytest.raises(EnhanceError):
        crappified(photos, tmp_path / 'degraded', clean_path=tmp_path / 'degraded' / 'clean')
    assert contents(photos) == before
    assert not (tmp_path / 'degraded').exists()


def test_folders_that_are_none(photos, tmp_path):
    (tmp_path / 'file').write_text('mine')
    (tmp_path / 'nothing').mkdir()
    for what, call in {
        'output is a file': lambda: crappified(photos, tmp_path / 'file'),
        'good_path is a file': lambda: crappified(
            photos, tmp_path / 'degraded', clean_path=tmp_path / 'file'
        ),
        'output in a file': lambda: crappified(photos, tmp_path / 'file' / 'degraded'),
        'input is missing': lambda: crappified(tmp_path / 'missing', tmp_path / 'degraded'),
        'input is a file': lambda: crappified(tmp_path / 'file', tmp_path / 'degraded'),
        'input is empty': lambda: crappified(tmp_path / 'nothing', tmp_path / 'degraded'),
    }.items():
        with pytest.raises(EnhanceError) as error:
            call()
        assert one_line(error), what
        assert not (tmp_path / 'degraded').exists(), what
    assert (tmp_path / 'file').read_text() == 'mine'


@contextmanager
def bound_by_permissions(tmp_path):
    "Run as a user whom permissions bind; root may write everywhere."
    if os.geteuid():
        yield
        return
    # the way to the folder has to be open
    modes = {p: p.stat().st_mode for p in tmp_path.parents if p.stat().st_uid == 0}
    for folder, mode in modes.items():
        folder.chmod(mode | 0o055)
    tmp_path.chmod(0o755)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        for folder, mode in modes.items():
            folder.chmod(mode)


@pytest.mark.skipif(os.name != 'posix', reason='needs the permissions of Unix')
@pytest.mark.parametrize('mode', [0o555, 0o444, 0o000])
@pytest.mark.parametrize('with_part', [False, True])
def test_output_that_may_not_be_written_is_named(photos, tmp_path, mode, with_part):
    degraded = tmp_path / 'degraded'
    degraded.mkdir()
    if with_part:
        (degraded / '.enhance-0-0.part').touch()
    degraded.chmod(mode)
    try:
        with bound_by_permissions(tmp_path), pytest.raises(EnhanceError) as error:
            crappified(photos, degraded)
    finally:
        degraded.chmod(0o755)
    assert 'degraded' in one_line(error)


def test_recipe_that_changes_the_good_photo_needs_a_folder_for_it(photos, tmp_path):
    for settings_ in ({'recipe': 'jpeg10'}, {'recipe': 'any-kernel'}, {'size': 20}):
        with pytest.raises(EnhanceError) as error:
            crappified(photos, tmp_path / 'degraded', **settings_)
        assert 'good_path' in one_line(error)
    assert not (tmp_path / 'degraded').exists()


@pytest.mark.parametrize('settings_', [{'size': 0}, {'size': -3}, {'seed': -1}, {'n_workers': 0}])
def test_settings_that_are_not_possible(photos, tmp_path, settings_):
    with pytest.raises(EnhanceError) as error:
        crappified(photos, tmp_path / 'degraded', clean_path=tmp_path / 'clean', **settings_)
    assert str(next(iter(settings_.values()))) in one_line(error)
    assert not (tmp_path / 'degraded').exists(), 'nothing is left of a run that could not start'


def test_resize_folder_makes_the_shorter_side_exact(photos, tmp_path):
    small = tmp_path / 'small'
    for size, n_workers in ((17, 2), (131, 1)):  # down and up
        report = resize_folder(photos, small, size, n_workers, False)
        assert report.made == len(NAMES)
        for name in NAMES:
            old, new = open_photo(photos / name), open_photo(small / name)
            assert min(new.size) == size
            ratio = max(old.size) / min(old.size)
            assert abs(max(new.size) - size * ratio) <= 0.5
            assert (new.width > new.height) == (old.width > old.height)
            if name.endswith('.png'):
                assert same(new, old.resize(new.size, Image.Resampling.BICUBIC))
    assert resize_folder(photos, small, 131, 1, False).kept == len(NAMES)
    with pytest.raises(EnhanceError):
        resize_folder(photos, tmp_path / 'none', 0, 1, False)


# Killed at any moment


@pytest.fixture(scope='module')
def many(tmp_path_factory):
    "24 photos, and what an uninterrupted run makes of them: photos, degraded, clean."
    base = tmp_path_factory.mktemp('many')
    (base / 'photos').mkdir()
    for i in range(24):
        smooth_photo(150 + i, 140, seed=i).save(base / 'photos' / f'{i}.png', compress_level=1)
    report = run_many(base / 'photos', base, 1)
    assert report.made == 24
    return base


def run_many(photos, base, n_workers):
    return crappify_folder(
        photos, base / 'degraded', 'wild', 5, 128, base / 'clean', 'png', n_workers, progress=False
    )


# The marker is for finding the processes again. The first line says that work is about to begin.
RUN = """
import sys
from pathlib import Path
from enhance_lib.crappify import crappify_folder
marker, photos, base, n = sys.argv[1:]
print('go', flush=True)
base = Path(base)
crappify_folder(photos, base / 'bad', 'wild', 5, 128, base / 'good', 'png', int(n), progress=False)
"""


def alive(marker):
    "The ids of living processes with the marker in their command line; workers are copies."
    found = []
    for folder in Path('/proc').glob('[0-9]*'):
        try:
            if marker.encode() in (folder / 'cmdline').read_bytes():  # empty for a zombie
                found.append(int(folder.name))
        except OSError:
            pass  # it ended meanwhile
    return found


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def start_run(photos, base, n_workers):
    marker = f'marker-{uuid.uuid4().hex}'
    command = [sys.executable, '-c', RUN, marker, photos, base, str(n_workers)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert run.stdout.readline() == b'go\n'
    return run, marker


linux = pytest.mark.skipif(not Path('/proc/self/cmdline').exists(), reason='looks into /proc')


@linux
@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(finished=st.integers(0, 44), more=st.floats(0, 0.05), n_workers=st.sampled_from([1, 2]))
@example(finished=0, more=0.0, n_workers=2)
@example(finished=23, more=0.01, n_workers=2)
def test_killed_at_any_moment_and_run_again(many, finished, more, n_workers):
    "Killed a moment after `finished` of its 48 files, so that a slow machine changes nothing."
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        run, marker = start_run(many / 'photos', base, n_workers)
        assert wait_until(lambda: len(list(base.rglob('*.png'))) >= finished, 60)
        time.sleep(more)
        run.kill()
        run.wait()
        ended = wait_until(lambda: not alive(marker), 10)
        for left in alive(marker):  # or they would stay when this test fails
            os.kill(left, signal.SIGKILL)
        assert ended, 'workers outlive the command'
        for path in base.rglob('*.png'):
            Image.open(path).load()  # raises OSError where half of it is missing
        report = run_many(many / 'photos', base, 1)
        assert report.made + report.kept == 24 and not report.failed
        for half in ('degraded', 'clean'):
            assert contents(base / half) == contents(many / half), 'not as if never killed'


@linux
def test_killed_over_and_over_the_same_run_gets_done(many, tmp_path):
    base = tmp_path / 'out'
    for i in range(3):
        run, marker = start_run(many / 'photos', base, 2)
        wait_until(lambda i=i: len(list(base.rglob('*.png'))) > 8 * i, 60)
        run.kill()
        run.wait()
        wait_until(lambda marker=marker: not alive(marker), 5)
    assert run_many(many / 'photos', base, 2).kept > 0
    for half in ('degraded', 'clean'):
        assert contents(base / half) == contents(many / half)


def end_own_process(source, targets, job):
    "Work that a worker does not survive, as if the system had run out of memory."
    if job == 'kill' and not (flag := targets[0].parent / 'flag').exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    with write_atomically(targets[0]) as part:  # the other worker is ended too, at any moment
        part.write_bytes(b'done')


def test_killed_worker_gives_a_sentence_and_the_next_run_goes_on(tmp_path):
    names = [f'{i}.png' for i in range(40)]
    work = (end_own_process, {n: Path(n) for n in names}, [tmp_path / 'out'], 'log.csv')
    job = {n: 'kill' if n == '20.png' else 'go on' for n in names}
    with pytest.raises(EnhanceError) as error:
        run_folder(*work, job.get, 2, progress=False)
    assert 'Run again' in one_line(error)
    report = run_folder(*work, job.get, 2, progress=False)
    assert report.made + report.kept == 40
    assert all((tmp_path / 'out' / n).read_bytes() == b'done' for n in names)


def test_what_a_killed_run_left_is_removed(photos, tmp_path):
    degraded, clean = tmp_path / 'degraded', tmp_path / 'clean'
    left = [
        degraded / '.enhance-a.part',
        degraded / 'sub' / '.enhance-b-1.part',
        clean / '.enhance-c-2.part',
    ]
    for part in left:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(b'half a photo')
    crappified(photos, degraded, clean_path=clean)
    assert not any(part.exists() for part in left)


# Memory


def nothing(i):
    "Work that costs nothing."
    if i % 1000 == 7:
        raise ValueError('seven')


@pytest.mark.parametrize('n_workers', [1, 2])
def test_tasks_are_not_drawn_long_before_they_are_done(n_workers):
    "A million tasks must not wait in memory: at most one batch is out."
    drawn, done, ahead = 0, 0, 0

    def tasks():
        nonlocal drawn
        for i in range(3000):
            drawn += 1
            yield (i,)

    errors = []
    for error in crappify._in_processes(nothing, tasks(), n_workers):
        ahead = max(ahead, drawn - done)
        done += 1
        errors.append(error)
    assert done == drawn == 3000
    assert ahead <= 64 * n_workers
    wrong = [i for i, error in enumerate(errors) if error]
    assert wrong == [7, 1007, 2007], 'results in the order of the tasks'
    assert 'seven' in errors[7]


def test_run_leaves_no_threads_or_processes(photos, tmp_path):
    import multiprocessing

    threads = set(threading.enumerate())
    crappified(photos, tmp_path / 'degraded', n_workers=2)
    assert multiprocessing.active_children() == []
    assert set(threading.enumerate()) <= threads


# fastai


@pytest.fixture
def flat(tmp_path):
    "Photos without subfolders, of one size class."
    folder = tmp_path / 'flat'
    folder.mkdir()
    for i in range(10):
        smooth_photo(50 + i, 48, seed=i).save(folder / f'{i}.png')
    return folder


def test_pair_equals_what_the_folder_run_writes(flat, tmp_path):
    from fastai.vision.core import PILImage

    degraded, clean = tmp_path / 'degraded', tmp_path / 'clean'
    crappified(flat, degraded, 'wild', 7, 32, clean)
    pair = CrappifyPair('wild', 32, 7)
    for path in sorted(flat.iterdir()):
        for source in (path, str(path)):
            ours = pair(source)
            assert [type(photo) for photo in ours] == [PILImage, PILImage]
            assert same(ours[0], open_photo(degraded / path.name))
            assert same(ours[1], open_photo(clean / path.name))


def test_pair_of_gray_photos_is_black_and_white(flat):
    from fastai.vision.core import PILImageBW

    degraded, clean = CrappifyPair('skyline', seed=0)(flat / '0.png')
    assert type(degraded) is type(clean) is PILImageBW
    assert degraded.mode == clean.mode == 'L' and degraded.size == (1024, 1024)


def test_pair_without_a_seed_follows_that_of_numpy(flat):
    pair, path = CrappifyPair('wild', 32), flat / '0.png'
    np.random.seed(3)
    first, second = pair(path)[0], pair(path)[0]
    np.random.seed(3)
    assert same(pair(path)[0], first)
    assert not same(first, second)


def test_validation_batch_is_the_same_with_and_without_workers(flat):
    from fastai.data.core import TfmdLists
    from fastai.vision.augment import IntToFloatTensor
    from fastai.vision.core import ToTensor

    batches = []
    for n in (0, 2):
        sets = TfmdLists(
            sorted(flat.iterdir()), CrappifyPair('wild', 32, 0), splits=[range(4), range(4, 10)]
        )
        loaders = sets.dataloaders(
            bs=3, after_item=ToTensor, after_batch=IntToFloatTensor, num_workers=n
        )
        batches.append([b for _ in range(2) for b in loaders.valid])
    for a, b in zip(*batches, strict=True):
        assert a[0].shape == a[1].shape == (3, 3, 32, 32)
        assert (a[0] == b[0]).all() and (a[1] == b[1]).all()
        assert (a[0] != a[1]).any()
    assert len(batches[0]) == 4
    assert (batches[0][0][0] == batches[0][2][0]).all(), 'each epoch validates on the same photos'


# The widget


@pytest.mark.parametrize('label', SLIDERS)
def test_each_slider_changes_the_picture(label):
    op, use, low, high, _, neutral = SLIDERS[label]
    photo = sample_photo('cat').resize((90, 60))
    widget = CrappifyWidget(photo)
    before = widget.picture.value
    assert widget.steps() == []
    assert same(Image.open(io.BytesIO(before)), photo)
    value = low if neutral != low else high
    widget.sliders[op].value = value
    assert widget.steps() == [[op, use(value)]]
    after = Image.open(io.BytesIO(widget.picture.value))
    assert same(after, OPERATIONS[op](photo, **use(value))) and not same(after, photo)
    widget.sliders[op].value = neutral
    assert widget.picture.value == before


def test_sliders_combine_and_start_where_told():
    widget = CrappifyWidget(sample_photo('cat').resize((90, 60)), jpeg=10, blur=2)
    assert widget.steps() == [['blur', {'radius': 2.0}], ['jpeg', {'quality': 10}]]


def test_widget_shows_a_picture_where_there_is_no_kernel():
    photo = sample_photo('cat').resize((90, 60))
    widget = CrappifyWidget(photo, noise=20)
    bundle = widget._repr_mimebundle_()
    shown = Image.open(io.BytesIO(base64.b64decode(bundle['image/png'])))
    assert (shown.format, shown.size) == ('PNG', (90, 60)) and not same(shown.convert('RGB'), photo)
    view = bundle['application/vnd.jupyter.widget-view+json']
    assert view['model_id'] == widget.box.model_id
    assert '/' not in bundle['text/plain'], 'no place on a disk'


# Color profiles


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


# Kernels without antialiasing


def test_lanczos_enlarges_as_pillow_does():
    "Enlarging is where antialiasing changes nothing; Pillow rounds between its two passes."
    photo = sample_photo('cat').crop((100, 40, 160, 90))
    ours = np.asarray(resize(photo, 150, 125, 'lanczos', antialias=False), int)[10:-10, 10:-10]
    pillow = np.asarray(photo.resize((150, 125), Image.Resampling.LANCZOS), int)[10:-10, 10:-10]
    assert np.abs(ours - pillow).max() <= 2


def test_box_without_antialiasing_is_nearest():
    photo = smooth_photo()
    assert resize(photo, 7, 9, 'box', antialias=False) == resize(photo, 7, 9, 'nearest')


@pytest.mark.parametrize('method', ['spawn', 'forkserver'])
def test_workers_start_where_processes_are_not_forked(photos, tmp_path, method):
    "As on Windows and macOS, and on Linux from Python 3.14."
    code = (
        'import multiprocessing, sys; multiprocessing.set_start_method(sys.argv[1])\n'
        'from enhance_lib.crappify import crappify_folder\n'
        'print(crappify_folder(sys.argv[2], sys.argv[3], seed=1, n_workers=2, progress=False))'
    )
    command = [sys.executable, '-c', code, method, photos, tmp_path / 'degraded']
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == f'Photos: made {len(NAMES)}, there already 0, failed 0', (
        done.stderr
    )
    crappified(photos, tmp_path / 'here', seed=1)
    assert contents(tmp_path / 'degraded') == contents(tmp_path / 'here')


def test_pair_of_a_photo_in_a_subfolder_is_that_of_the_folder_run(photos, tmp_path):
    crappified(photos, tmp_path / 'degraded', 'wild', 2, format='png')
    pair = CrappifyPair('wild', seed=2, path=photos)
    degraded, _ = pair(photos / 'sub' / 'deeper' / 'c d.bmp')
    assert same(degraded, open_photo(tmp_path / 'degraded' / 'sub' / 'deeper' / 'c d.png'))
