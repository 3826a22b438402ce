"""Any photo in: what is looked at, chosen, kept and refused."""

import io
import itertools
import json
import math
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from echo import Same, Twice
from PIL import Image, ImageCms, ImageDraw

import enhance_lib.enhance as module
from enhance_lib.crappify import RECIPES, Recipe, Step, jpeg
from enhance_lib.enhance import (
    Inspection,
    Plan,
    choose,
    enhance,
    find_scale_factor,
    flat_share,
    follow,
    jpeg_quality,
    noise_level,
    plan_for,
)
from enhance_lib.measure import psnr
from enhance_lib.toolbox.datasets import sample_photo, sample_photos
from enhance_lib.toolbox.errors import EnhanceError
from enhance_lib.toolbox.files import as_photo, open_photo, save_pixels
from enhance_lib.toolbox.models import WEIGHTS, load_model, published, read_card
from enhance_lib.toolbox.operations import Between


@pytest.fixture(scope='module')
def cat():
    return sample_photo('cat').crop((100, 50, 220, 130))  # 120×80, an eye


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


@pytest.mark.parametrize('name', ['cat', 'coffee', 'china', 'grass'])
def test_noise_is_estimated_as_by_scikit_image(name):
    "Square by square, on the photo, on what JPEG left of it, and where much of it is plain."
    from skimage.restoration import estimate_sigma

    photo = {**sample_photos('train'), **sample_photos('held-out')}[name].convert('L')
    photo = photo.crop((0, 0, 160, 128))
    for kind in (photo, jpeg(photo, quality=40), photo.point(lambda level: max(level, 90))):
        y = np.asarray(kind, float)
        squares = [y[i : i + 32, j : j + 32] for i in range(0, 128, 32) for j in range(0, 160, 32)]
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', RuntimeWarning)  # a plain square has no median
            sigmas = np.nan_to_num([estimate_sigma(square) for square in squares])
        assert noise_level(kind) == pytest.approx(np.percentile(sigmas, 10), abs=1e-9)


def test_noise_in_one_half_is_not_that_of_the_photo():
    y = np.full((128, 256), 128, np.uint8)
    y[:, 128:] += np.random.default_rng(0).integers(0, 60, (128, 128), np.uint8)
    assert noise_level(Image.fromarray(y)) < 1e-9


@pytest.mark.parametrize('scale', [0.5, 1, 1.5, 2, 3, 4, 6, 16])
@pytest.mark.parametrize('quality', [None, 30, 91, 92, 95, 96, 100])
def test_the_rule_says_what_it_does(quality, scale):
    for noise, flat in itertools.product((0.0, 4.0, 4.1, 9.0), (0.1, 0.9)):
        plan = choose(Inspection(1, quality, noise, flat), scale)
        drawn = quality is None and flat == 0.9
        nothing = drawn or ((quality or 0) >= 96 and noise <= 4)
        wanted = 'restore-x1' if noise > 4 else 'jpeg-blind'
        assert plan.clean == (None if nothing else wanted)
        assert (plan.clean or 'nothing to clean') in plan.why
        assert (plan.model is None) == (scale <= 1), 'more pixels only where they are asked for'
        if plan.model:
            assert plan.model in plan.why
            per_round = read_card(WEIGHTS / f'{plan.model}.json')['scale']
            reach = per_round**plan.level
            assert reach >= scale
            # not a round more than it takes
            assert plan.level == 1 or reach / per_round < scale
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


def test_scale_rule_at_its_limits():
    # (width, height) -> factor, from the description of Image 2.0
    table = {(99, 400): 3.5, (100, 400): 3, (159, 160): 3, (160, 160): 2.5, (200, 200): 2}
    table |= {(255, 300): 2, (256, 256): 2, (256, 400): 1.28, (512, 10): 1, (400, 511): 512 / 511}
    for size, factor in table.items():
        assert find_scale_factor(Image.new('L', size)) == pytest.approx(factor)
        assert find_scale_factor(Image.new('L', size), enlarge=False) == 1


def test_choosing_pays_on_photos_that_wild_degraded(tmp_path):
    "On photos that no limit was found on, each saved as a JPEG last; lesson 10 takes more."
    fixed = [Plan(clean, None, 1, 1, '') for clean in (None, 'jpeg-blind')]
    sums = np.zeros(len(fixed) + 1)
    for name in ('cat', 'coffee', 'china'):
        for seed in range(21, 27):
            degraded, clean = RECIPES['wild'].pair(sample_photo(name), seed, name, 256)
            degraded.save(tmp_path / 'sent.jpg', quality=90)
            received = open_photo(tmp_path / 'sent.jpg')
            chosen = plan_for(received, jpeg_quality(tmp_path / 'sent.jpg'), scale=1)
            for i, plan in enumerate([*fixed, chosen]):
                sums[i] += psnr(as_photo(follow(plan, np.asarray(received))), clean)
    assert sums[-1] > sums[:-1].max() + 18 * 0.5, sums / 18  # half a decibel and more


def test_noisy_photos_come_out_better_than_from_the_network_of_lesson_01():
    "Its thirty lines make 32.0, 28.7 and 25.5 dB of these, as its table says."
    night = Recipe(
        'night', (Step('noise', sigma=Between(15.0, 35.0)), Step('jpeg', quality=Between(70, 95)))
    )
    for name, reached in {'cat': 32.0, 'coffee': 28.7, 'china': 25.5}.items():
        degraded, clean = night.pair(sample_photo(name), seed=1, name=name)
        assert psnr(enhance(degraded, scale=1).photo, clean) > reached, name


def test_spoiled_weights_are_said_to_be():
    class Spoiled(Same):
        def forward(self, x):
            return x * torch.nan

    with pytest.raises(EnhanceError, match='NaN'):
        enhance(Image.new('RGB', (20, 20)), model=Spoiled())


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
def test_a_restorer_of_jpeg_works_before_its_grid_is_stretched(cat, scale, level, monkeypatch):
    # half precision rounds each tile by itself
    monkeypatch.setattr('enhance_lib.toolbox.models.half_dtype', lambda device: None)
    degraded = jpeg(cat, quality=10)
    better = enhance(degraded, 'jpeg-q10', scale, level)
    by_hand, model = degraded, load_model('jpeg-q10')
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


def test_sixteen_bits_are_more_than_eight(tmp_path):
    "A slow ramp comes back with more steps than 8 bits have, and alpha too."
    ramp = np.linspace(0, 8000, 300).astype(np.uint16)[None].repeat(40, 0)
    better = enhance(Image.fromarray(ramp), 'srcnn-jpeg20', 1).pixels
    assert better.dtype == np.uint16 and len(np.unique(better)) > 100  # 8 bits: 32
    assert np.abs(better[..., 0].astype(int) - ramp).max() < 1500
    four = np.dstack([ramp] * 3 + [ramp[:, ::-1]])
    better = enhance(save_pixels(four, tmp_path / 'a.png').read_bytes(), 'realtime-x2', 2).pixels
    assert better.shape == (80, 600, 4) and better.dtype == np.uint16
    assert len(np.unique(better[..., 3])) > 256


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
    nothing = Plan(None, None, 1, 1.0, 'fine as it is')
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

    card = json.loads((WEIGHTS / 'srcnn-x2.json').read_text())
    for name in ('evil.safetensors', 'evil.pth'):
        (tmp_path / name).write_bytes(pickle.dumps(Evil()))
        (tmp_path / 'evil.json').write_text(json.dumps(card))
        with pytest.raises(EnhanceError):
            enhance(cat, tmp_path / name)
    assert not (tmp_path / 'ran').exists()


# What it costs


def test_enhancing_a_jpeg_imports_nothing_heavy(cat, tmp_path):
    "torch takes two seconds and half a gigabyte; these would take as much again."
    cat.save(tmp_path / 'a.jpg', quality=60)
    code = (
        'import sys; from enhance_lib.applications.command_line import enhance\n'
        f'code = enhance([{str(tmp_path / "a.jpg")!r}])\n'
        'heavy = "fastai timm pandas matplotlib skimage torchvision torchmetrics scipy IPython"\n'
        'sys.exit(code or " ".join(set(heavy.split()) & set(sys.modules)) or 0)'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'cleaned with jpeg-blind; made 3.5 times' in done.stdout  # both kinds of networks
