"""Any photo in: what is looked at, chosen, tiled, kept and refused; folders; the command."""

import contextlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageDraw
from torch import nn
from torch.nn import functional as F

import enhance_lib.enhance as module
from enhance_lib.enhance_lib import command_line
from enhance_lib.crappify import jpeg
from enhance_lib.applications.batch import enhance_folder
from enhance_lib.applications.evaluate import model_table
from enhance_lib.applications.image2 import compare, predict, upgrade
from enhance_lib.enhance import (
    Inspection,
    Plan,
    choose,
    detail_share,
    enhance,
    find_scale_factor,
    flat_share,
    follow,
    jpeg_quality,
    noise_level,
    plan_for,
)
from enhance_lib.toolbox.files import as_photo, open_pixels, save_pixels
from enhance_lib.toolbox.datasets import sample_photo
from enhance_lib.toolbox.errors import EnhanceError
from enhance_lib.toolbox.files import open_photo, save_photo
from enhance_lib.toolbox.models import PhotoModel, load_model, published

posix = pytest.mark.skipif(os.name != 'posix', reason='uses signals and limits of Unix')


@pytest.fixture(scope='module')
def cat():
    return sample_photo('cat').crop((100, 50, 220, 130))  # 120×80, an eye


@pytest.fixture
def in_float32(monkeypatch):
    "Half precision rounds each tile by itself."
    monkeypatch.setattr('enhance_lib.workbench.half_dtype', lambda device: None)


def array(height, width, n_channels, dtype=np.uint8, seed=0):
    top = np.iinfo(dtype).max
    rng = np.random.default_rng(seed)
    return rng.integers(0, top, (height, width, n_channels), dtype, endpoint=True)


class Same(PhotoModel):
    "Gives back what it gets, and notes the sizes (height, width)."

    margin, tile = 0, 4096

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, x):
        self.sizes.append(tuple(x.shape[2:]))
        return x


class Twice(Same):
    "Each pixel becomes 2×2."

    scale = 2

    def forward(self, x):
        return super().forward(x).repeat_interleave(2, 2).repeat_interleave(2, 3)


# Looking and choosing


def test_quality_of_tables_that_pillow_did_not_make(tmp_path, cat):
    cat.save(tmp_path / 'a.jpg', quality=80)
    tables = Image.open(tmp_path / 'a.jpg').quantization
    doubled = {k: [min(2 * step, 255) for step in table] for k, table in tables.items()}
    cat.save(tmp_path / 'b.jpg', qtables=doubled)
    # libjpeg: steps are in proportion to 200 - 2 * quality from 50 up: 40 at 80, so 80 at 60
    assert abs(jpeg_quality(tmp_path / 'b.jpg') - 60) <= 1
    assert jpeg_quality((tmp_path / 'b.jpg').read_bytes()) == jpeg_quality(tmp_path / 'b.jpg')


def test_quality_of_what_is_no_jpeg(tmp_path, cat):
    cat.save(tmp_path / 'a.png')
    (tmp_path / 'a.jpg').write_text('no photo')
    for source in (tmp_path / 'a.png', tmp_path / 'a.jpg', tmp_path / 'gone.jpg', cat, b''):
        assert jpeg_quality(source) is None


def test_noise_of_a_plain_photo_is_what_was_added():
    rng = np.random.default_rng(0)
    for sigma in (2, 5, 10):
        y = np.rint(128 + sigma * rng.standard_normal((256, 256))).astype(np.uint8)
        # the quietest tenth of squares is a little below their mean
        assert 0.8 * sigma < noise_level(Image.fromarray(y)) <= sigma
    assert noise_level(Image.new('RGB', (300, 200), 'red')) < 1e-9
    assert noise_level(Image.new('L', (20, 20))) == 0  # no square fits


def test_noise_in_one_half_is_not_that_of_the_photo():
    y = np.full((128, 256), 128, np.uint8)
    y[:, 128:] += np.random.default_rng(0).integers(0, 60, (128, 128), np.uint8)
    assert noise_level(Image.fromarray(y)) < 1e-9


def test_detail_of_waves_that_are_known():
    x = np.arange(256)
    for frequency, expected in ((0.05, 0), (0.4, 1)):  # cycles per pixel
        wave = 128 + 100 * np.sin(2 * np.pi * frequency * x)[None].repeat(256, 0)
        share = detail_share(Image.fromarray(wave.astype(np.uint8)))
        assert abs(share - expected) < 0.02
    assert detail_share(Image.new('L', (63, 300))) == 1


@pytest.mark.parametrize('scale', [0.5, 1, 1.5, 2, 3, 4, 6, 16])
@pytest.mark.parametrize('quality', [None, 30, 91, 92, 95, 96, 100])
def test_the_rule_says_what_it_does(quality, scale):
    for noise, detail, flat in itertools.product((0.0, 9.0), (0.001, 0.5), (0.1, 0.9)):
        plan = choose(Inspection(1, quality, noise, detail, flat), scale)
        nothing = quality >= 96 if quality else flat == 0.9
        assert (plan.clean is None) == nothing
        assert ('halved' in plan.why) == (plan.shrink == 2)
        if nothing or (quality or 0) >= 92:
            assert plan.shrink == 1, 'a good photo keeps its pixels'
        assert (plan.model is None) == (scale * plan.shrink <= 1), (
            'more pixels only where they are asked for'
        )
        if plan.model:
            assert plan.model in plan.why
            per_round = load_scale(plan.model)
            reach = per_round**plan.level
            assert reach >= plan.shrink * scale
            # not a round more than it takes
            assert plan.level == 1 or reach / per_round < plan.shrink * scale
        assert (f'{plan.level} rounds' in plan.why) == (plan.level > 1)


def test_drawings_are_not_cleaned(tmp_path):
    drawing = Image.new('RGB', (600, 300), 'white')
    ImageDraw.Draw(drawing).rectangle((40, 40, 200, 120), 'navy')
    drawing.save(tmp_path / 'a.png')
    better = enhance(tmp_path / 'a.png')
    assert better.photo.tobytes() == drawing.tobytes() and 'drawn' in better.plan.why
    drawing.save(tmp_path / 'a.jpg', quality=30)  # a JPEG of it has ripples to be cleaned
    assert 'jpeg-blind' in enhance(tmp_path / 'a.jpg').plan.why


def test_flat_share_counts_neighbors():
    assert flat_share(Image.new('RGB', (40, 30), 'navy')) == 1
    half = np.zeros((2, 5, 3), np.uint8)
    half[:, 3:, 2] = 9  # one change in four, and in one channel only
    assert flat_share(Image.fromarray(half)) == 0.75
    assert flat_share(Image.new('L', (1, 9))) == 0


def load_scale(name):
    return model_table().loc[name, 'scale']


def test_scale_rule_at_its_limits():
    # (width, height) -> factor, from the description of Image 2.0
    table = {(99, 400): 3.5, (100, 400): 3, (159, 160): 3, (160, 160): 2.5, (200, 200): 2}
    table |= {(255, 300): 2, (256, 256): 2, (256, 400): 1.28, (512, 10): 1, (400, 511): 512 / 511}
    for size, factor in table.items():
        assert find_scale_factor(Image.new('L', size)) == pytest.approx(factor)
        assert find_scale_factor(Image.new('L', size), enlarge=False) == 1


def test_choosing_pays_on_photos_that_wild_made_bad(tmp_path):
    "On crops of photos that the thresholds were not found on."
    from enhance_lib.crappify import RECIPES, apply_steps
    from enhance_lib.measure import psnr

    fixed = [Plan(c, s, m, 1, 1, '') for c, s, m in FIXED]
    sums = np.zeros(len(fixed) + 1)
    for name in ('cat', 'coffee', 'china'):
        for seed in range(20, 26):
            plan = RECIPES['wild'].draw(seed, name, 256)
            good = apply_steps(sample_photo(name), plan['before'])
            *steps, (_, last) = plan['steps']
            path = tmp_path / 'sent.jpg'
            apply_steps(good, steps).save(path, **last)
            bad = open_photo(path)
            chosen = plan_for(bad, jpeg_quality(path), scale=1)
            for i, plan in enumerate([*fixed, chosen]):
                sums[i] += psnr(as_photo(follow(plan, np.asarray(bad))), good)
    assert sums[-1] > sums[:-1].max(), sums / 18


FIXED = [
    (None, 1, None),
    ('jpeg-blind', 1, None),
    (None, 2, 'realtime-x4-any'),
    ('jpeg-blind', 2, 'realtime-x4-any'),
]


def test_spoiled_weights_are_said_to_be():
    class Spoiled(Same):
        def forward(self, x):
            return x * torch.nan

    with pytest.raises(EnhanceError, match='NaN'):
        enhance(Image.new('RGB', (20, 20)), model=Spoiled())


# The API of Image 2.0


def test_rounds_enlarge_and_enhance(cat):
    model = Same()
    assert predict(model, cat, 2, 3, device='cpu').size == (240, 160)
    # 2 ** (1/3) and 2 ** (2/3) times 80 and 120
    assert model.sizes == [(101, 151), (127, 190), (160, 240)]
    model = Same()
    predict(model, cat, 2, 1, enhance_first=True, device='cpu')
    assert model.sizes == [(80, 120), (160, 240)]


def test_rounds_of_a_model_that_enlarges_have_the_size_of_the_step_as_output(cat):
    model = Twice()
    assert predict(model, cat, 4, 2, device='cpu').size == (480, 320)
    assert model.sizes == [(80, 120), (160, 240)]
    model = Twice()
    assert predict(model, cat, 1.5, 1, enhance_first=True, device='cpu').size == (180, 120)
    assert model.sizes == [(80, 120), (60, 90)]


def test_one_round_is_lanczos_and_the_model(cat):
    larger = cat.resize((240, 160), Image.Resampling.LANCZOS)
    assert predict(Same(), cat, 2, 1, device='cpu').tobytes() == larger.tobytes()
    model = load_model()
    assert model.card['name'] == 'jpeg-blind'
    expected = np.asarray(model.predict(larger)).astype(int)
    got = np.asarray(predict(model, cat, 2, 1, device='cpu')).astype(int)
    assert np.abs(got - expected).max() <= 1


def test_upgrade_enhances_tiny_photos_first(cat):
    # the shorter side is 80: 3.5 times; first from level 3 and scale 3 up
    for level, rounds in ((3, 4), (2, 2)):
        model = Same()
        assert upgrade(model, cat, level, device='cpu').size == (420, 280)
        assert len(model.sizes) == rounds
    model = Same()
    assert upgrade(model, cat, 3, enlarge=False, device='cpu').size == cat.size
    assert len(model.sizes) == 3


def test_compare_gives_the_upgraded_and_the_merely_enlarged_photo(cat, tmp_path):
    cat.save(tmp_path / 'cat.png')
    better, larger = compare(load_model('jpeg-q10'), tmp_path / 'cat.png', device='cpu')
    assert better.size == larger.size == (420, 280)
    assert larger.tobytes() == cat.resize((420, 280), Image.Resampling.LANCZOS).tobytes()
    assert better.tobytes() != larger.tobytes()


@pytest.mark.parametrize('mode', ['L', 'LA', 'RGB', 'RGBA'])
def test_predict_keeps_the_mode(cat, mode):
    assert predict(load_model('jpeg-q10'), cat.convert(mode), 1.5, 2, device='cpu').mode == mode


# Enhance


@pytest.mark.parametrize('size', [(1, 1), (1, 90), (3, 2), (8, 8), (33, 65)])
@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK'])
def test_photos_of_every_size_and_mode(cat, size, mode):
    photo = cat.convert('RGB').resize(size).convert(mode)
    better = enhance(photo, scale=2).photo
    assert better.size == (2 * size[0], 2 * size[1])
    modes = {'1': 'L', 'P': 'RGB', 'CMYK': 'RGB'}
    assert better.mode == modes.get(mode, mode)


@pytest.mark.parametrize('scale', [0.5, 1, 1.3, 2, 2.5, 4, 5])
@pytest.mark.parametrize('name', [None, 'srcnn-x3', 'jpeg-q10'])
def test_any_scale(cat, scale, name):
    better = enhance(cat, name, scale)
    assert better.photo.size == (round(120 * scale), round(80 * scale))
    assert better.plan.scale == scale


def test_auto_is_the_scale_of_image_2(cat):
    assert enhance(cat).photo.size == (420, 280)
    assert enhance(Image.new('RGB', (600, 20))).photo.size == (600, 20)


def test_a_model_by_name_is_used_once_at_its_scale(cat):
    by_name = np.asarray(enhance(cat, 'srcnn-x2', 2).photo).astype(int)
    expected = np.asarray(load_model('srcnn-x2').predict(cat)).astype(int)
    assert np.abs(by_name - expected).max() <= 1
    assert 'srcnn-x2, as asked' in enhance(cat, 'srcnn-x2', 2).plan.why


@pytest.mark.parametrize(('scale', 'level'), [('auto', None), (2, 3), (0.5, None)])
def test_a_restorer_of_jpeg_works_before_its_grid_is_stretched(cat, scale, level, in_float32):
    bad = jpeg(cat, quality=10)
    better = enhance(bad, 'jpeg-q10', scale, level)
    by_hand, model = bad, load_model('jpeg-q10')
    for _ in range(level or 1):
        by_hand = model.predict(by_hand, fast=False)
    by_hand = by_hand.resize(better.photo.size, Image.Resampling.LANCZOS)
    assert better.photo.size == tuple(round(better.plan.scale * side) for side in cat.size)
    assert np.abs(np.asarray(better.photo).astype(int) - np.asarray(by_hand)).max() <= 1
    assert better.plan.why.startswith('cleaned with jpeg-q10; made ')


def test_another_model_of_one_size_works_on_what_was_enlarged(cat):
    "As in Image 2.0, whose networks have learned to sharpen that."
    model = Same()
    enhance(cat, model, 2, 2)
    heights = [size[0] for size in model.sizes]
    assert len(heights) == 2 and heights[0] < heights[1] == 2 * cat.height


def test_so_little_more_is_not_worth_it():
    "512 / 480 is 1.07: it stays as it is, whoever chooses the model."
    photo = Image.new('RGB', (480, 360), 'gray')
    for model in (None, 'jpeg-q10', 'srcnn-x2'):
        assert enhance(photo, model).photo.size == photo.size


def test_level_is_the_number_of_rounds(cat):
    for level in (1, 2, 10):
        model = Same()
        enhance(cat, model, 1, level)
        assert len(model.sizes) == level
    told = []
    better = enhance(cat, scale=1, level=3, progress=told.append)  # rounds of cleaning
    assert better.plan.model is None and '3 rounds' in better.plan.why and len(told) == 3


def test_numbers_of_numpy_are_numbers(cat):
    better = enhance(cat, scale=np.int64(2), level=np.int32(1), strength=np.float32(0.5))
    assert better.photo.size == (240, 160)


def test_resolution_of_a_tiff_is_kept(tmp_path):
    save_pixels(array(8, 8, 3, np.uint16), tmp_path / 'a.tif', {'dpi': (300, 300)})
    assert [round(float(d)) for d in Image.open(tmp_path / 'a.tif').info['dpi']] == [300, 300]
    assert round(float(open_pixels(tmp_path / 'a.tif')[1]['dpi'][0])) == 300


def test_a_photo_is_never_made_smaller_than_it_is_on_the_way(cat):
    model = Twice()
    enhance(cat, model, 1.5, 2)
    # after the first round 1.5 ** 0.5 times as large
    assert model.sizes == [(80, 120), (98, 147)]


def test_a_good_photo_with_nothing_to_do_stays_as_it_is(tmp_path):
    sample_photo('coffee').save(tmp_path / 'a.jpg', quality=98)
    better = enhance(tmp_path / 'a.jpg')
    assert 'nothing to clean' in better.plan.why
    assert better.photo.tobytes() == open_photo(tmp_path / 'a.jpg').tobytes()


def test_strength_mixes(cat):
    class White(Same):
        def forward(self, x):
            return torch.ones_like(x)

    black = Image.new('RGB', (30, 20))
    for strength, level in ((0.0, 0), (0.25, 64), (1.0, 255)):
        assert (np.asarray(enhance(black, White(), 1, strength=strength).photo) == level).all()
    larger = cat.resize((240, 160), Image.Resampling.LANCZOS)
    assert enhance(cat, 'srcnn-x2', 2, strength=0).photo.tobytes() == larger.tobytes()


def test_colors_of_large_areas_are_kept(cat):
    class Redder(Same):
        def forward(self, x):
            return (x + x.new_tensor([0.1, 0, -0.05])[:, None, None]).clamp(0, 1)

    photo = sample_photo('coffee').crop((0, 0, 160, 160))
    before = np.asarray(photo).astype(int)
    plain = np.asarray(enhance(photo, Redder(), 1).photo).astype(int)
    kept = np.asarray(enhance(photo, Redder(), 1, keep_colors=True).photo).astype(int)
    assert abs((plain - before).mean((0, 1))[2]) > 8
    assert np.abs((kept - before).mean((0, 1))).max() < 1


def test_sixteen_bits_are_more_than_eight(cat):
    "A slow ramp comes back with more steps than 8 bits have, and alpha too."
    ramp = np.linspace(0, 8000, 300).astype(np.uint16)[None].repeat(40, 0)
    better = enhance(Image.fromarray(ramp), 'srcnn-jpeg20', 1).pixels
    assert better.dtype == np.uint16 and len(np.unique(better)) > 100  # 8 bits: 32
    assert np.abs(better[..., 0].astype(int) - ramp).max() < 1500
    four = np.dstack([ramp] * 3 + [ramp[:, ::-1]])
    better = enhance_bytes(four, 'realtime-x2', 2)
    assert better.shape == (80, 600, 4) and better.dtype == np.uint16
    assert len(np.unique(better[..., 3])) > 256


def enhance_bytes(pixels, model, scale):
    with contextlib.ExitStack() as stack:
        import tempfile

        folder = stack.enter_context(tempfile.TemporaryDirectory())
        path = save_pixels(pixels, Path(folder) / 'a.png')
        return enhance(path.read_bytes(), model, scale).pixels


def test_alpha_is_enlarged_beside_the_colors(cat):
    photo = cat.convert('RGBA')
    alpha = cat.convert('L')
    photo.putalpha(alpha)
    better = enhance(photo, scale=2).photo
    expected = alpha.resize((240, 160), Image.Resampling.LANCZOS)
    assert better.getchannel('A').tobytes() == expected.tobytes()


def test_what_is_hidden_leaves_no_rim():
    "A white square on black that nobody sees: all that is seen stays white."
    pixels = np.zeros((60, 60, 4), np.uint8)
    pixels[20:40, 20:40] = 255
    better = enhance(as_photo(pixels), scale=2).pixels
    assert better.shape == (120, 120, 4)
    assert better[better[..., 3] > 0][:, :3].min() > 250
    nothing = np.zeros((20, 20, 4), np.uint8)
    assert (enhance(as_photo(nothing), scale=2).pixels[..., 3] == 0).all()


def test_turned_photos_profiles_and_exif(cat, tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 8, 'Camera'
    cat.save(tmp_path / 'a.jpg', exif=exif, icc_profile=profile, dpi=(72, 72), quality=90)
    path = enhance(tmp_path / 'a.jpg', scale=2).save(tmp_path / 'b.jpg')
    photo = Image.open(path)
    assert photo.size == (160, 240)
    assert photo.info['icc_profile'] == profile
    assert photo.getexif()[0x010F] == 'Camera'
    assert photo.getexif().get(0x0112, 1) == 1, 'it would be turned twice'


@pytest.mark.parametrize('open_', [Path, str, lambda p: p.read_bytes(), lambda p: p.open('rb')])
def test_every_kind_of_source_gives_the_same(cat, tmp_path, open_):
    path = tmp_path / 'a.jpg'
    cat.save(path, quality=50)
    got = enhance(open_(path), scale=1)
    assert got.photo.tobytes() == enhance(path, scale=1).photo.tobytes()
    assert 'JPEG of quality 50' in got.plan.why


def test_buffers_are_photos_and_text_is_none(cat, tmp_path):
    path = tmp_path / 'a.jpg'
    cat.save(path, quality=50)
    for kind in (bytearray, memoryview):
        got = enhance(kind(path.read_bytes()), 'srcnn-jpeg20', 1)
        assert got.photo.tobytes() == enhance(path, 'srcnn-jpeg20', 1).photo.tobytes()
    for encoding in ('latin-1', 'utf-8'):
        with path.open(encoding=encoding) as file, pytest.raises(EnhanceError, match='as text'):
            enhance(file)


def test_progress_is_told_and_may_stop_it(cat):
    told = []
    enhance(cat.resize((300, 300)), 'jpeg-q10', 1, level=3, tile=64, progress=told.append)
    assert told == sorted(told) and len(told) == 3 * 25 and told[-1] == pytest.approx(1)

    def stop(fraction):
        raise InterruptedError('enough')

    with pytest.raises(InterruptedError):
        enhance(cat, progress=stop)


def test_large_photos_show_a_bar(cat, capsys, monkeypatch):
    enhance(cat, Same(), 1)
    assert capsys.readouterr().out == ''
    enhance(cat.resize((1200, 1000)), Same(), 1)
    shown = capsys.readouterr().out
    assert '100.00%' in shown and shown.rsplit('\r', 2)[1].isspace() and shown[-1] == '\r'
    nothing = Plan(None, 1, None, 1, 1.0, 'fine as it is')
    monkeypatch.setattr(module, 'plan_for', lambda *_: nothing)
    enhance(cat.resize((1200, 1000)))
    assert capsys.readouterr().out == ''


def test_it_shows_itself(cat):
    better = enhance(cat)
    assert repr(better).startswith('420×280 pixels: ')
    assert Image.open(io.BytesIO(better._repr_png_())).size == (420, 280)


# Bad input


@pytest.mark.parametrize(
    'wrong, words',
    [
        ({'model': 'srcnn-3x'}, 'srcnn-x3'),
        ({'model': 'weights.pth'}, 'pickle'),
        ({'scale': 0}, 'scale of 0'),
        ({'scale': -2}, 'scale of -2'),
        ({'scale': math.nan}, 'scale of nan'),
        ({'scale': math.inf}, 'scale of inf'),
        ({'scale': 'large'}, "scale of 'large'"),
        ({'scale': 300}, 'more than 100,000,000'),
        ({'level': 0}, 'level of 0'),
        ({'level': 11}, 'level of 11'),
        ({'level': 1.5}, 'level of 1.5'),
        ({'level': 'high'}, "level of 'high'"),
        ({'strength': -0.1}, 'strength of -0.1'),
        ({'strength': 1.01}, 'strength of 1.01'),
        ({'strength': math.nan}, 'strength of nan'),
        ({'strength': 'full'}, "strength of 'full'"),
        ({'device': 'gpu7'}, 'gpu7'),
        ({'tile': 8}, 'tile of 8'),
    ],
)
def test_settings_that_are_not_possible(cat, wrong, words):
    with pytest.raises(EnhanceError) as error:
        enhance(cat, **wrong)
    assert words in str(error.value) and '\n' not in str(error.value)


def test_an_unknown_model_is_answered_with_those_there_are(cat):
    with pytest.raises(EnhanceError) as error:
        enhance(cat, 'no such thing at all')
    assert all(name in str(error.value) for name in published())


def test_a_photo_past_the_limit_may_stay_as_large_as_it_is(cat):
    assert enhance(cat, scale=1, max_pixels=10).photo.size == cat.size
    with pytest.raises(EnhanceError, match=r'240×160 pixels, more than 10\.'):
        enhance(cat, scale=2, max_pixels=10)
    with pytest.raises(EnhanceError, match='more than 100,000,000'):
        predict(Same(), cat, 200)


@pytest.mark.parametrize('content', [b'', b'no photo', b'\x89PNG\r\n\x1a\n' + 30 * b'\x10'])
def test_files_that_are_no_photos(tmp_path, content):
    (tmp_path / 'a.png').write_bytes(content)
    with pytest.raises(EnhanceError, match=r'a\.png'):
        enhance(tmp_path / 'a.png')
    with pytest.raises(EnhanceError, match='mine'):
        enhance(content, name='mine')
    with pytest.raises(EnhanceError, match=r'gone\.png'):
        enhance(tmp_path / 'gone.png')


def test_a_program_in_weights_is_not_run(cat, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / 'ran',))

    card = json.loads((module.WEIGHTS / 'srcnn-x2.json').read_text())
    for name in ('evil.safetensors', 'evil.pth'):
        (tmp_path / name).write_bytes(pickle.dumps(Evil()))
        (tmp_path / 'evil.json').write_text(json.dumps(card))
        with pytest.raises(EnhanceError):
            enhance(cat, tmp_path / name)
    assert not (tmp_path / 'ran').exists()


# Folders


def make_photos(folder, n, side=24, quality=60):
    folder.mkdir(parents=True, exist_ok=True)
    cat = sample_photo('cat')
    for i in range(n):
        photo = cat.crop((3 * i, 2 * i, 3 * i + side + i % 5, 2 * i + side))
        photo.save(folder / f'p{i:02}.jpg', quality=quality)
    return folder


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*.*'))}


def call(*arguments):
    "The command `enhance` in this process: its exit code."
    return command_line.enhance([str(a) for a in arguments])


def test_a_hundred_photos_with_three_broken_ones(tmp_path, capsys):
    photos, out = make_photos(tmp_path / 'photos', 97), tmp_path / 'better'
    whole = (photos / 'p00.jpg').read_bytes()
    (photos / 'cut.jpg').write_bytes(whole[: len(whole) // 2])
    (photos / 'empty.jpg').touch()
    (photos / 'text.jpg').write_text('not a photo')
    assert call(photos, '--out', out, '--scale', 1, '--model', 'jpeg-q10') == 1
    assert len(list(out.glob('p*.jpg'))) == 97 and not list(out.glob('[cet]*.jpg'))
    err = capsys.readouterr().err
    assert 'made 97, there already 0, failed 3' in err
    lines = [line for line in err.splitlines() if line.startswith('  ')]
    assert len(lines) == 3
    for name, why in (('cut', 'damaged'), ('empty', '0 bytes'), ('text', 'not a photo')):
        assert any(f'{name}.jpg' in line and why in line for line in lines)
    assert call(photos, '--out', out, '--scale', 1, '--model', 'jpeg-q10') == 1
    assert 'made 0, there already 97, failed 3' in capsys.readouterr().err


def test_other_settings_make_the_photos_anew(tmp_path):
    photos, out = make_photos(tmp_path / 'photos', 2), tmp_path / 'better'
    small = partial(enhance_folder, photos, out, 'jpeg-q10', progress=False)
    assert small(scale=1).made == 2
    assert small(scale=1).kept == 2
    for other in ({'scale': 1.5}, {'scale': 1, 'strength': 0.5}, {'scale': 1, 'level': 2}):
        assert small(**other).made == 2
    assert enhance_folder(photos, out, 'srcnn-jpeg20', 1, progress=False).made == 2


def test_folders_with_comparisons_and_another_format(tmp_path):
    photos, out, both = make_photos(tmp_path / 'photos', 2), tmp_path / 'b', tmp_path / 'both'
    make_photos(photos / 'inside', 1)
    report = enhance_folder(photos, out, 'srcnn-x2', 2, format='png', compared=both, progress=False)
    assert report.made == 3 and not report.failed
    assert sorted(contents(out)) == ['enhance.csv', 'inside/p00.png', 'p00.png', 'p01.png']
    better, sheet = (Image.open(f / 'p01.png') for f in (out, both))
    assert better.size == (50, 48) and sheet.size == (100, 48)
    assert sheet.crop((50, 0, 100, 48)).tobytes() == better.convert('RGB').tobytes()


@pytest.mark.parametrize('scale, model', [(0, None), (math.nan, None), (1, 'srcnn-3x')])
def test_nothing_is_written_for_settings_that_are_not_possible(tmp_path, scale, model):
    photos = make_photos(tmp_path / 'photos', 1)
    with pytest.raises(EnhanceError):
        enhance_folder(photos, tmp_path / 'out', model, scale)
    assert not (tmp_path / 'out').exists()


def _run_once(photos, out):
    enhance_folder(photos, out, 'jpeg-q10', 1, progress=False)


@posix
def test_killed_at_any_of_20_moments_and_run_again(tmp_path):
    "Each run starts from a process that has loaded the package already, as forks of it."
    photos = make_photos(tmp_path / 'photos', 12, side=96)
    expected = tmp_path / 'expected'
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['enhance_lib.enhance'])
    first = context.Process(target=_run_once, args=(photos, expected))
    start = time.monotonic()
    first.start()
    while not (expected / 'p00.jpg').exists():
        assert time.monotonic() < start + 60 and first.is_alive()
        time.sleep(0.002)
    begin = time.monotonic()
    first.join(60)
    length = time.monotonic() - begin
    cut_short = 0
    for moment in range(20):
        out = tmp_path / f'out{moment}'
        run = context.Process(target=_run_once, args=(photos, out))
        run.start()
        while not (out / 'enhance.csv').exists():  # so that a slow start changes nothing
            assert run.is_alive() or run.exitcode == 0
            time.sleep(0.001)
        time.sleep(length * moment / 20)
        run.kill()
        run.join()
        cut_short += len(list(out.glob('*.jpg'))) < 12
        for path in out.glob('*.jpg'):
            Image.open(path).load()  # raises OSError where half of it is missing
    assert cut_short >= 10, 'killed too late to test anything'
    again = context.Process(target=_run_all, args=(photos, tmp_path))
    again.start()
    again.join(120)
    assert again.exitcode == 0
    for moment in range(20):
        assert contents(tmp_path / f'out{moment}') == contents(expected)


def _run_all(photos, base):
    for moment in range(20):
        _run_once(photos, base / f'out{moment}')


# The command


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_photos(tmp_path / 'photos', 2)
    make_photos(tmp_path / 'more', 2, side=30)
    return tmp_path


FAST = ('--model', 'jpeg-q10', '--scale', '1')


def test_one_photo_goes_beside_it(folder, capsys):
    assert call('photos/p00.jpg', *FAST) == 0
    assert sorted(contents(folder / 'photos')) == ['p00-enhanced.jpg', 'p00.jpg', 'p01.jpg']
    assert capsys.readouterr().out.startswith('photos/p00-enhanced.jpg: 24×24 pixels: cleaned with')


def test_names_for_one_photo(folder):
    assert call('photos/p00.jpg', '--out', 'new.png', *FAST) == 0
    assert call('photos/p00.jpg', '--out', 'sub/', '--format', 'webp', *FAST) == 0
    assert call('--lr-path', 'photos/p01.jpg', '--sr_path', 'old.png', '--compare', *FAST) == 0
    assert {'new.png', 'sub/p00-enhanced.webp', 'old.png', 'old-compared.png'} <= set(
        contents(folder)
    )


def test_a_file_that_is_there_is_not_overwritten_unless_asked(folder, capsys):
    make_photos(folder, 1, side=40)
    precious = (folder / 'p00.jpg').read_bytes()
    assert call('photos/p00.jpg', '--out', 'p00.jpg', *FAST) == 2
    assert 'p00.jpg' in capsys.readouterr().err and (folder / 'p00.jpg').read_bytes() == precious
    assert call('photos/p00.jpg', '--out', 'p00.jpg', '--overwrite', *FAST) == 0
    assert (folder / 'p00.jpg').read_bytes() != precious
    (folder / 'new-compared.png').write_text('mine')
    assert call('photos/p00.jpg', '--out', 'new.jpg', '--compare', *FAST) == 2
    assert (folder / 'new-compared.png').read_text() == 'mine'
    assert not (folder / 'new.jpg').exists()


def test_stars_and_a_second_run(folder, capsys):
    "As a shell that does not expand stars gives them; results are not enhanced again."
    assert call('photos/*.jpg', *FAST) == 0
    assert call('photos/*.jpg', '--overwrite', *FAST) == 0
    names = ['p00-enhanced.jpg', 'p00.jpg', 'p01-enhanced.jpg', 'p01.jpg']
    assert sorted(contents(folder / 'photos')) == names
    assert call('nothing/*.jpg', *FAST) == 2
    assert 'nothing/*.jpg' in capsys.readouterr().err


def test_a_format_that_can_not_be_saved_is_refused_before_the_work(folder, monkeypatch):
    monkeypatch.setattr(module, 'enhance', lambda *a, **k: pytest.fail('it has begun'))
    assert call('photos/p00.jpg', '--out', 'o.xyz', *FAST) == 2
    assert call('photos/p00.jpg', '--format', 'tga2', *FAST) == 2


def test_several_photos_and_folders(folder, capsys):
    assert call('photos', '--out', 'a', *FAST) == 0
    assert sorted(contents(folder / 'a')) == ['enhance.csv', 'p00.jpg', 'p01.jpg']
    assert call('photos', 'more', 'photos/p00.jpg', '--out', 'b', *FAST) == 0
    assert sorted(contents(folder / 'b')) == [
        *('enhance.csv', 'more/p00.jpg', 'more/p01.jpg', 'p00.jpg'),
        *('photos/p00.jpg', 'photos/p01.jpg'),
    ]
    assert call('photos', '--compare', *FAST) == 0
    assert len(contents(folder / 'photos-enhanced')) == 3
    assert len(contents(folder / 'photos-enhanced-compared')) == 3
    assert call('photos/p00.jpg', 'photos/p01.jpg', *FAST) == 0
    assert len(contents(folder / 'photos')) == 4
    (folder / 'broken.jpg').write_text('no photo')
    capsys.readouterr()
    assert call('broken.jpg', 'more/p00.jpg', *FAST) == 1
    assert 'broken.jpg' in capsys.readouterr().err
    assert (folder / 'more' / 'p00-enhanced.jpg').exists()


@pytest.mark.parametrize(
    'arguments, words',
    [
        ([], 'Name a photo'),
        (['gone.jpg'], 'gone.jpg'),
        (['fotos'], "no file 'fotos'"),
        (['fotos', '--out', 'better'], "no file 'fotos'"),
        (['file'], "'file' is not a photo"),
        (['gone/' + 300 * 'x' + '.jpg'], 'xxx'),
        (['photos/p00.jpg', '--model', 'srcnn-3x'], 'Did you mean'),
        (['photos/p00.jpg', '--scale', 'large'], '--scale large'),
        (['photos/p00.jpg', '--scale', 'nan'], 'scale of nan'),
        (['photos/p00.jpg', '--scale', '-1'], 'scale of -1'),
        (['photos/p00.jpg', '--scale', '1000'], 'more than 100,000,000'),
        (['photos/p00.jpg', '--level', '12'], 'level of 12'),
        (['photos/p00.jpg', '--strength', '2'], 'strength of 2'),
        (['photos/p00.jpg', '--device', 'cuda:9'], 'cuda:9'),
        (['photos/p00.jpg', '--out', 'photos/p00.jpg'], 'would be overwritten'),
        (['photos/p00.jpg', '--format', 'mp3'], '.mp3'),
        (['photos', '--format', 'mp3'], 'mp3'),
        (['photos', '--out', 'photos'], 'overlap'),
        (['photos', '--out', 'file'], 'is a file'),
        (['photos', 'more', '--out', 'file.txt'], 'looks like a file'),
        (['photos/p00.jpg', '--out', 'a.jpg', '--format', 'png'], 'two formats'),
        (['photos/p00.jpg', 'more/p00.jpg', '--out', 'x'], "would become 'p00.jpg'"),
    ],
)
def test_what_can_not_be_done_is_one_sentence(folder, capsys, arguments, words):
    (folder / 'file').write_text('mine')
    before = contents(folder)
    assert call(*arguments) == 2
    out, err = capsys.readouterr()
    assert words in err and err.startswith('enhance: ') and err.count('\n') == 1 and out == ''
    assert contents(folder) == before


def test_list_shows_models_and_scores(capsys):
    assert call('--list') == 0
    out = capsys.readouterr().out
    assert all(name in out for name in published())
    card = json.loads((module.WEIGHTS / 'realtime-x4.json').read_text())
    assert f'→ {card["scores"]["Set5"]["output"]:.2f} dB' in out


def test_warnings_are_sentences(folder):
    Image.new('RGBA', (20, 20), (9, 9, 9, 0)).save('clear.png')
    code = 'import sys; from enhance_lib.command_line import enhance; sys.exit(enhance())'
    flags = ['clear.png', '--out', 'clear.jpg', *FAST]
    done = subprocess.run([sys.executable, '-c', code, *flags], capture_output=True, text=True)
    assert done.returncode == 0 and 'laid on white' in done.stderr
    assert (
        done.stderr.count('\n') == 1 and '.py' not in done.stderr and 'Warning' not in done.stderr
    )


@posix
def test_a_name_that_can_not_be_printed_stops_nothing(folder):
    strange = os.fsdecode(b'Z\xfcrich.jpg')
    try:
        (folder / 'photos' / 'p00.jpg').rename(folder / 'photos' / strange)
    except OSError:
        pytest.skip('this disk takes no such name')
    code = 'import sys; from enhance_lib.command_line import enhance; sys.exit(enhance())'
    done = subprocess.run(
        [sys.executable, '-c', code, f'photos/{strange}', 'photos/p01.jpg', *FAST],
        capture_output=True,
        env={**os.environ, 'PYTHONIOENCODING': 'ascii:strict'},
    )
    assert done.returncode == 0, done.stderr
    assert len(contents(folder / 'photos')) == 4


def test_results_of_a_folder_run_are_not_lost_by_enhancing_them_again(folder, capsys):
    "What is outdated in the folder is removed before it is made anew: not what it is made from."
    assert call('photos', '--out', 'better', *FAST) == 0
    before = contents(folder)
    capsys.readouterr()
    again = ('better/p00.jpg', 'better/p01.jpg', '--out', 'better', '--model', 'jpeg-q10')
    assert call(*again, '--scale', '2') == 2
    assert 'would be overwritten' in capsys.readouterr().err
    assert contents(folder) == before


def test_a_photo_put_where_one_has_failed_is_somebody_elses(folder, capsys):
    (folder / 'photos' / 'p00.jpg').write_text('broken')
    assert call('photos', '--out', 'better', *FAST) == 1
    make_photos(folder / 'better', 1)
    before = contents(folder / 'better')
    for scale in '1', '2':
        capsys.readouterr()
        assert call('photos', '--out', 'better', '--model', 'jpeg-q10', '--scale', scale) == 2
        assert 'p00.jpg' in capsys.readouterr().err
        assert contents(folder / 'better') == before


def test_two_photos_that_would_become_one_file(folder, capsys):
    photo = open_photo(folder / 'photos' / 'p00.jpg')
    save_photo(photo, folder / 'a.jpg'), save_photo(photo, folder / 'a.png')
    assert call('a.jpg', 'a.png', '--format', 'webp', '--overwrite', *FAST) == 1
    assert 'a.png' in capsys.readouterr().err
    assert (folder / 'a-enhanced.webp').exists()
    assert call('a.jpg', 'a.png', '--compare', *FAST) == 1
    out, err = capsys.readouterr()
    assert 'a-enhanced-compared.png' in out and 'as another photo did' in err
    assert not (folder / 'a-enhanced.png').exists()


def test_sheets_of_before_and_after_are_no_photos_to_enhance(folder, capsys):
    assert call('photos/*.jpg', '--compare', *FAST) == 0
    names = sorted(contents(folder / 'photos'))
    capsys.readouterr()
    assert call('photos/*', '--compare', '--overwrite', *FAST) == 0
    assert sorted(contents(folder / 'photos')) == names
    assert 'p00-enhanced-compared.png' in capsys.readouterr().err, 'left out without a word'


@posix
def test_ctrl_c_in_the_middle_leaves_nothing_half_written(tmp_path):
    photos = make_photos(tmp_path / 'photos', 40, side=96)
    code = 'import sys; from enhance_lib.command_line import enhance; sys.exit(enhance())'
    flags = [str(photos), '--out', str(tmp_path / 'out'), *FAST]
    process = subprocess.Popen(
        [sys.executable, '-c', code, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 60
    while len(list(tmp_path.glob('out/*.jpg'))) < 3:
        assert time.monotonic() < end and process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert 'enhance: stopped. Run it again to go on.' in err and 'Traceback' not in err
    done = list(tmp_path.glob('out/*.jpg'))
    assert 3 <= len(done) < 40
    for path in done:
        Image.open(path).load()
    assert not list(tmp_path.glob('out/.*'))
