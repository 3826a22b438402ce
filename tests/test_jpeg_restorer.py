"""The JPEG restorer: its pairs, its networks, its losses, and what the published weights reach."""

import hashlib
import importlib
import importlib.util
import io
import math
import random
import warnings
from functools import cache, partial

import numpy as np
import pytest
import torch
from beside import SHARED, yardstick
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from torch import nn

from enhance_lib.enhance_lib import jpeg_restorer, workbench
from enhance_lib.crappify import Between, OneOf
from enhance_lib.applications.jpeg_blind import (
    BlindRestorer,
    DamageEstimator,
    LearnDamage,
    damage,
    grid_lines,
)
from enhance_lib.jpeg_restorer import (
    ConstrainedRestorer,
    ConvUnit,
    ImageRestorer,
    PUBLISHED,
    WEB,
    grid_of,
    jpeg_recipe,
    log_mse,
    luma_steps,
    psnr_b,
    restorer_learner,
    root_mse,
    start_small,
    summed_mse,
    train_published,
)
from enhance_lib.toolbox.training import last_layer_group, muon, muon_groups
from enhance_lib.applications.scoreboard import TASKS
from enhance_lib.toolbox.models import read_card
from enhance_lib.toolbox.tensors import to_tensor
from enhance_lib.toolbox.datasets import sample_photo
from enhance_lib.toolbox.errors import EnhanceError
from enhance_lib.toolbox.files import open_photo, save_photo
from enhance_lib.toolbox.show import Budget
from enhance_lib.toolbox.checkpoints import load_checkpoint, save_checkpoint
from enhance_lib.toolbox.models import PhotoModel, WEIGHTS, load_model, save_weights
from enhance_lib.toolbox.pairs import recipe_dls
from enhance_lib.toolbox.training import AutocastCPU
from enhance_lib.workbench import set_seed

with warnings.catch_warnings():
    warnings.simplefilter('ignore', FutureWarning)
    from fastai.optimizer import OptimWrapper

VAL, CLASSIC5 = SHARED / 'data' / 'bsds500' / 'val', SHARED / 'data' / 'bench' / 'Classic5'
has_val = pytest.mark.skipif(not VAL.is_dir(), reason='BSDS500 does not lie beside it')
has_bench = pytest.mark.skipif(
    not CLASSIC5.is_dir(), reason='the benchmark sets do not lie beside it'
)
both = pytest.mark.parametrize('name', PUBLISHED)
NETWORKS = {'jpeg-q10': ConstrainedRestorer, 'jpeg-blind': BlindRestorer}

the_model = cache(load_model)  # for tests that leave it as it is


class Killed(BaseException):
    "As sudden as a kill: nobody catches it, whoever catches every Exception."


def seed(number):
    "Start all random numbers from here."
    random.seed(number), np.random.seed(number), torch.manual_seed(number)


def saved_as_jpeg(photo, quality, **options):
    "What Pillow makes of a photo."
    file = io.BytesIO()
    photo.save(file, 'JPEG', quality=quality, **options)
    return Image.open(file).convert(photo.mode)


def noise_photo(width, height, mode='RGB'):
    "A photo of random pixels, always the same."
    shape = (height, width, len(mode)) if len(mode) > 1 else (height, width)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(pixels, mode)


def place_photo(width, height):
    "Red and blue say in which column a pixel is, green in which row."
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x % 256, y, x // 256], -1).astype(np.uint8))


def levels(x):
    "A tensor (C, H, W) in [0, 1] as an array (H, W, C) of levels."
    return (x.permute(1, 2, 0) * 255).round().byte().numpy()


class Small(PhotoModel):
    "Stands in for the network where a small one will do; it starts by doing nothing."

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.PReLU())
        self.last = nn.Conv2d(8, 3, 3, padding=1)
        nn.init.zeros_(self.last.weight)

    def forward(self, x):
        return x + self.last(self.body(x))


def equal_weights(a, b, within=0.0):
    "Whether two models have the same numbers."
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    return all((a[k] - b[k]).abs().max() <= within for k in a)


@pytest.fixture(scope='module')
def paths(tmp_path_factory):
    "Five photos that are large enough to validate with, as files."
    folder = tmp_path_factory.mktemp('photos')
    names = ('brick', 'camera', 'flower', 'gravel', 'rocket')
    photos = {n: sample_photo(n).crop((0, 0, 330, 330)) for n in names}
    return [save_photo(p, folder / f'{n}.png') for n, p in photos.items()]


# Pairs


def test_the_recipe_is_that_of_the_original_project():
    "Shrunk half of the times, turned half of the times, then cropped, then JPEG of quality 10."
    factors, turns, n = [], [], 1000
    for i in range(n):
        plan = jpeg_recipe(10).draw(i, size=128)
        assert plan['steps'] == [['jpeg', {'quality': 10, 'subsampling': '4:2:0'}]]
        *before, (crop, how) = plan['before']
        assert crop == 'crop' and how['size'] == 128
        operations = [op for op, _ in before]
        assert operations in ([], ['rescale'], ['rotate'], ['rescale', 'rotate'])
        factors += [values['factor'] for op, values in before if op == 'rescale']
        turns += [values['degrees'] for op, values in before if op == 'rotate']
    assert abs(len(factors) - n / 2) < 80 and abs(len(turns) - n / 2) < 80  # five sigma
    for found, choices in ((factors, (0.9, 0.8, 0.7, 0.6)), (turns, (90, 180, 270))):
        assert set(found) == set(choices)
        assert min(map(found.count, choices)) > len(found) / len(choices) / 2


def test_bad_is_what_pillow_makes_of_good():
    "Pixel for pixel: so nothing was turned, cut or rounded after the JPEG."
    photos = [sample_photo(n).crop((0, 0, 250, 220)) for n in ('rocket', 'flower', 'brick')]
    dls = recipe_dls(
        photos, photos, jpeg_recipe(10), 128, bs=3, augment=False, per_photo=3, device='cpu'
    )
    for degraded, clean in [*dls.train, *dls.valid]:
        assert degraded.shape == clean.shape == (3, 3, 128, 128)
        assert degraded.dtype == torch.float32
        assert 0 <= min(degraded.min(), clean.min()) and max(degraded.max(), clean.max()) <= 1
        for b, g in zip(degraded, clean):
            expected = saved_as_jpeg(Image.fromarray(levels(g)), 10)
            assert np.array_equal(levels(b), np.asarray(expected))


@pytest.mark.parametrize(
    'quality',
    [0, 96, -1, 10.5, 'ten', None, Between(0, 50), Between(50, 96), OneOf(10, 200)]
    + [OneOf(Between(1, 5), 96), Between(5.0, 50.0)],
    ids=repr,
)
def test_an_impossible_quality_is_refused(quality):
    "When the recipe is made, not somewhere in a training."
    with pytest.raises(EnhanceError, match='1 to 95') as error:
        jpeg_recipe(quality)
    assert str(quality) in str(error.value)


@pytest.mark.parametrize('quality', [1, 95, Between(1, 95), OneOf(Between(1, 5), 95)], ids=repr)
def test_the_worst_and_the_best_quality_are_possible(quality):
    "The degraded photo is Pillow's, of the quality that was drawn."
    photo, recipe = noise_photo(40, 30), jpeg_recipe(quality, '4:4:4', before=())
    drawn = recipe.draw(3)['steps'][0][1]['quality']
    degraded, clean = recipe.pair(photo, 3)
    assert clean.tobytes() == photo.tobytes()
    assert degraded.tobytes() == saved_as_jpeg(photo, drawn, subsampling='4:4:4').tobytes()


def test_a_photo_smaller_than_the_crop_is_refused():
    "With both sizes."
    photo = noise_photo(100, 90)
    dls = recipe_dls([photo], [photo], jpeg_recipe(10, before=()), 128, device='cpu')
    with pytest.raises(EnhanceError, match='100×90.*128×128'):
        dls.one_batch()
    dls = recipe_dls([photo], [photo], jpeg_recipe(10), 128, device='cpu')
    with pytest.raises(EnhanceError, match='128×128'):
        dls.one_batch()


def test_web_photos_are_saved_once_or_twice_with_any_grid():
    """Twice in 0.6 × 0.97 of the cases, never in 0.4 × 0.03; shifted by 0 to 15.

    The last grid starts top left in most of them, as that of a file does: each side in
    2/3 + 1/48 of the cases.
    """
    plans = [WEB.draw(i) for i in range(2000)]
    times = [len(plan['steps']) for plan in plans]
    assert abs(times.count(2) - 1164) < 110 and abs(times.count(0) - 24) < 24  # five sigma
    drawn = [values for plan in plans for _, values in plan['steps']]
    assert {v['quality'] for v in drawn} == set(range(5, 96))
    assert {v['shift_x'] for v in drawn} == {v['shift_y'] for v in drawn} == set(range(16))
    assert {v['subsampling'] for v in drawn} == {'4:2:0', '4:4:4'}
    last = [plan['steps'][-1][1] for plan in plans if len(plan['steps']) == 2]
    aligned = sum(v['shift_x'] == 0 for v in last) / len(last)
    assert abs(aligned - (2 / 3 + 1 / 48)) < 0.1  # five sigma
    gray = sum(['color', {'factor': 0}] in plan['before'] for plan in plans)
    assert abs(gray - 300) < 80


# A grid of crops


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 300), st.integers(1, 90), st.integers(1, 70))
def test_the_grid_covers_every_pixel(width, height, size):
    "With as few crops as possible; of a photo that is smaller there are none."
    crops = grid_of([place_photo(width, height)], size)
    if min(width, height) < size:
        assert crops == []
        return
    assert len(crops) == math.ceil(width / size) * math.ceil(height / size)
    assert all(crop.size == (size, size) for crop in crops)
    seen = np.concatenate([np.asarray(crop).reshape(-1, 3) for crop in crops])
    assert len(np.unique(seen, axis=0)) == width * height


def test_a_grid_of_paths_is_that_of_the_photos(tmp_path):
    "In their order, and without the one that is too small."
    photos = [place_photo(*size) for size in ((70, 40), (31, 90), (32, 33))]
    files = [save_photo(p, tmp_path / f'{i}.png') for i, p in enumerate(photos)]
    ours, same = grid_of(photos, 32), grid_of(files, 32)
    assert len(ours) == 3 * 2 + 0 + 1 * 2
    assert [p.tobytes() for p in ours] == [p.tobytes() for p in same]
    assert ours[1].getpixel((0, 0)) == (32, 0, 0) and ours[2].getpixel((0, 0)) == (38, 0, 0)


def test_each_crop_of_a_grid_occurs_once_in_an_epoch():
    "The eight crops of one photo are told apart by their first pixel."
    crops = grid_of([place_photo(128, 64)], 32)
    dls = recipe_dls(crops, crops, jpeg_recipe(before=()), 32, bs=4, augment=False, device='cpu')
    for _ in range(2):
        seen = [tuple(levels(x)[0, 0, :2]) for _, clean in dls.train for x in clean]
        assert sorted(seen) == [(x, y) for x in (0, 32, 64, 96) for y in (0, 32)]


# The networks


def test_the_restorer_has_313066_parameters():
    "Weights, biases and one number for each PReLU, unit by unit."
    first = (3 * 9 * 128 + 128) + (128 * 128 + 128) + 1 + (128 * 9 * 128 + 128) + 1
    second = (128 * 9 * 64 + 64) + (64 * 64 + 64) + 1 + (64 * 9 * 64 + 64) + 1
    third = (64 * 9 * 32 + 32) + (32 * 32 + 32) + 1 + (32 * 9 * 32 + 32) + 1
    end = (32 * 16 + 16) + 1 + (16 * 25 * 3 + 3)
    count = sum(p.numel() for p in ImageRestorer().parameters())
    assert count == first + second + third + end == 167682 + 114882 + 28770 + 1732 == 313066


def test_the_layers_of_the_restorer_are_those_of_the_original_project():
    "In the order in which a photo goes through them."
    net, found = ImageRestorer(), []

    def look(layer, inputs, output):
        if isinstance(layer, nn.Conv2d):
            assert layer.stride == (1, 1) and layer.bias is not None
            found.append((layer.in_channels, layer.out_channels, *layer.kernel_size))
        else:
            found.append(type(layer))

    for layer in net.modules():
        if not list(layer.children()):
            layer.register_forward_hook(look)
    net(torch.rand(1, 3, 9, 9))
    expected = []
    for a, b in ((3, 128), (128, 64), (64, 32)):
        expected += [(a, b, 3, 3), (b, b, 1, 1), nn.PReLU, (b, b, 3, 3), nn.PReLU]
    assert found == [*expected, (32, 16, 1, 1), nn.PReLU, (16, 3, 5, 5)]


def reach(net, at):
    "The first and last row and column of the output that a pixel of the input changes."
    x = torch.rand(1, 3, 120, 120, dtype=torch.double)
    y = x.clone()
    y[..., at[0], at[1]] += 1
    with torch.inference_mode():
        changed = (net.double()(x) != net(y))[0].any(0)
    rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
    return tuple(int(v) for side in (rows, columns) for v in (side.min(), side.max()))


def test_the_restorer_sees_17_pixels():
    "Six kernels of 3×3 and one of 5×5 reach 6 + 2 pixels to each side, and so does its margin."
    assert reach(ImageRestorer(), (50, 60)) == (42, 58, 52, 68)
    assert ImageRestorer.margin == 8


def test_the_steps_are_those_of_the_standard():
    "Quality 50 is the table of annex K of ITU-T T.81, and 10 five times that, up to 255."
    rows = [[16, 11, 10, 16, 24, 40, 51, 61], [12, 12, 14, 19, 26, 58, 60, 55]]
    half, tenth = ((luma_steps(q) * 255).round().int().view(8, 8).tolist() for q in (50, 10))
    assert half[:2] == rows and half[7] == [72, 92, 95, 98, 112, 100, 103, 99]
    assert tenth == [[min(5 * step, 255) for step in row] for row in half]
    for quality in (0, 96, 10.5):
        with pytest.raises(EnhanceError, match='1 to 95'):
            luma_steps(quality)


def waves_in_steps(change, quality):
    "Of the luma of a change (3, H, W), by scipy: (blocks down, blocks across, 8, 8)."
    from scipy.fft import dctn

    luma = np.tensordot([0.299, 0.587, 0.114], change.double().numpy(), 1) * 255
    blocks = luma.reshape(luma.shape[0] // 8, 8, luma.shape[1] // 8, 8).swapaxes(1, 2)
    steps = (luma_steps(quality) * 255).view(8, 8).numpy()
    return dctn(blocks, axes=(2, 3), norm='ortho') / steps


@pytest.mark.parametrize('quality', [10, 60])
@pytest.mark.parametrize('strength', [0.01, 0.3])
def test_no_wave_moves_further_than_half_a_step(quality, strength):
    "Far less or much further than the restorer within wants; colors move as it wants."
    torch.manual_seed(0)
    net, x = ConstrainedRestorer(quality).eval(), torch.rand(1, 3, 24, 40)
    nn.init.normal_(net.last.weight, std=strength)
    with torch.no_grad():
        free, bound = ImageRestorer.forward(net, x)[0] - x[0], net(x)[0] - x[0]
    wanted, found = (waves_in_steps(change, quality) for change in (free, bound))
    assert np.allclose(found, np.tanh(2 * wanted) / 2, atol=1e-3)
    assert np.abs(found).max() < 0.5001
    assert torch.allclose(bound[0] - bound[1], free[0] - free[1], atol=1e-5)


def test_the_constraint_has_no_parameters():
    "Nor anything in its file that the restorer within has not."
    net = ConstrainedRestorer(20)
    assert list(net.state_dict()) == list(ImageRestorer().state_dict())
    assert sum(p.numel() for p in net.parameters()) == 313066 and net.arguments == {'quality': 20}
    assert ImageRestorer().load_state_dict(the_model('jpeg-q10').state_dict())


def test_what_is_bent_is_bent_in_whole_floats_too():
    "In half precision the bounds hold to a hundredth of a step."
    torch.manual_seed(0)
    net, x = ConstrainedRestorer(10).eval(), torch.rand(1, 3, 64, 64)
    nn.init.normal_(net.last.weight, std=0.3)
    with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16):
        moved = waves_in_steps((net(x) - x)[0], 10)
    assert 0.45 < np.abs(moved).max() < 0.51


def test_the_blind_restorer_has_1060948_parameters():
    "The restorer, fourteen maps more at its start, the path that looks, and the estimator."
    look = (192 * 9 * 128 + 128 + 1) + 2 * (128 * 9 * 128 + 128 + 1) + (128 * 8 * 64 + 8 * 64)
    estimator = (109 * 96 + 96 + 1) + (96 * 9 * 96 + 96 + 1) + (96 * 9 * 64 + 64 + 1) + 64 * 4 + 4
    count = sum(p.numel() for p in BlindRestorer().parameters())
    assert count == 313066 + 14 * 9 * 128 + look + estimator == 1060948


def test_the_blind_restorer_sees_no_further_than_its_margin():
    "And not much less, with all of its weights at work. Beyond it there is only rounding."
    torch.manual_seed(0)
    net = BlindRestorer().eval().double()
    margin, x = net.margin, torch.rand(1, 3, 256, 256).double()
    seen = 0
    for at in ((120, 120), (127, 127), (123, 121)):
        y = x.clone()
        y[..., at[0], at[1]] = 1 - y[..., at[0], at[1]]
        with torch.inference_mode():
            changed = (net(x) - net(y))[0].abs().amax(0) > 1e-12
        rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
        reached = [at[0] - rows.min(), rows.max() - at[0], at[1] - columns.min()]
        seen = max(seen, *map(int, reached), int(columns.max()) - at[1])
    assert margin - 16 <= seen <= margin and margin % 8 == 0


# What guides it


def striped(phase, period=8, size=64, step=0.05):
    "Level stripes of columns that jump up and down by turns, the first jump at column `phase`."
    columns = (torch.arange(size) - phase).div(period, rounding_mode='floor') % 2
    return (0.4 + step * columns).expand(1, 3, size, size)


@pytest.mark.parametrize('phase', range(8))
def test_grid_lines_lie_where_the_columns_jump(phase):
    "Upright ones only; and none for stripes of another width, or a ramp."
    upright, level = grid_lines(striped(phase))[0]
    mean = upright[:, 16:48].view(64, 4, 8).mean((0, 1))
    assert int(mean.argmax()) == phase and float(mean[phase]) > 1.5
    assert float(mean[(phase + 4) % 8]) < -0.5
    assert float(level.abs().max()) < 1e-3
    turned = grid_lines(striped(phase).mT)[0]
    assert torch.allclose(turned[1], upright.T) and torch.allclose(turned[0], level.T)


def test_no_grid_no_lines():
    "Of a slope that runs through, and of stripes that are not 8 wide; away from the borders."
    ramp = torch.linspace(0, 1, 128).expand(1, 3, 128, 128)
    assert float(grid_lines(ramp)[..., 32:96].abs().max()) < 0.01
    other = grid_lines(striped(0, period=5, size=80))[0, 0, :, 24:56]
    assert float(other.view(80, 4, 8).mean((0, 1)).max()) < 0.6


def test_damage_by_hand():
    "(ln MSE + 7) / 2 of what lies around."
    clean = torch.rand(1, 3, 96, 96)
    assert torch.allclose(damage(clean, clean), torch.tensor((math.log(1e-5) + 7) / 2), atol=1e-4)
    degraded = clean.clone()
    degraded[..., 48:] += 0.1
    told = damage(degraded, clean)[0, 0]
    assert told.shape == (12, 12)
    assert torch.allclose(told[:, 9:], torch.tensor((math.log(0.01 + 1e-5) + 7) / 2), atol=1e-3)
    assert torch.allclose(told[:, :3], torch.tensor((math.log(1e-5) + 7) / 2), atol=1e-3)


def test_the_waves_are_those_of_jpeg():
    "Against scipy's cosine transform."
    from scipy.fft import dctn

    block = torch.rand(1, 1, 8, 8)
    found = torch.nn.functional.conv2d(block, DamageEstimator().waves).flatten()
    wanted = dctn(block[0, 0].numpy(), norm='ortho').ravel()[1:]
    assert np.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize('size', [(64, 64), (64, 104), (8, 8), (8, 48)])
def test_the_estimator_tells_four_numbers_for_each_block(size):
    "Of photos that are not square, too; turned over, the rows stay in their places."
    x = torch.rand(2, 3, *size)
    found = DamageEstimator()(x, grid_lines(x))
    assert found.shape == (2, 4, size[0] // 8, size[1] // 8)


@pytest.mark.parametrize('degraded, clean', [(20, 60), (40, 90)])
def test_the_published_estimator_tells_bad_from_good(degraded, clean):
    "And is off by less than 2 dB on a photo that it has not seen."
    model, photo = the_model('jpeg-blind'), sample_photo('cat').crop((0, 0, 320, 240))
    told = []
    for quality in (degraded, clean):
        x = to_tensor(saved_as_jpeg(photo, quality))
        with torch.inference_mode():
            model(x)
        true = float(damage(x, to_tensor(photo)).mean())
        told.append(float(model.told[:, 0].mean()))
        assert abs(told[-1] - true) < 2 * math.log(10) / 20
    assert told[0] > told[1]


def test_the_estimator_learns_while_the_network_is_trained(paths):
    "In twenty steps its error falls by a quarter and more, compared with none that learns."
    errors = {}
    for name, callbacks in (('with', [LearnDamage()]), ('without', [])):
        set_seed(0)
        dls = recipe_dls(
            paths, paths[:2], jpeg_recipe(10), size=32, bs=4, per_photo=8, augment=False
        )
        learn = restorer_learner(dls, BlindRestorer().start_from(the_model('jpeg-q10')), root_mse)
        learn.fit(2, 1e-3, cbs=callbacks)
        x, y = dls.valid.one_batch()
        with torch.inference_mode():
            learn.model(x)
            errors[name] = float((learn.model.told[:, :1] - damage(x, y)).abs().mean())
    assert errors['with'] < 0.75 * errors['without']


def test_the_blind_restorer_starts_as_the_one_it_is_given():
    "To the last bit or so, though its other path is full of random numbers; it is a copy."
    torch.manual_seed(0)
    restorer, x = ImageRestorer(), torch.rand(2, 3, 24, 32)
    blind = BlindRestorer().start_from(restorer)
    with torch.inference_mode():
        assert torch.allclose(blind(x), restorer(x), atol=1e-6)
        assert float(blind.look(x).std()) > 1e-3
        blind.last.weight.zero_()
        assert float(restorer.last.weight.std()) > 1e-3


def test_every_path_of_the_blind_restorer_learns():
    "After one step the maps count, so their path gets gradients too."
    torch.manual_seed(0)
    blind, x = BlindRestorer().start_from(ImageRestorer()), torch.rand(1, 3, 16, 16)
    step = torch.optim.SGD(blind.parameters(), 0.1)
    for _ in range(2):
        step.zero_grad()
        summed_mse(blind(x), torch.zeros_like(x)).backward()
        step.step()
    assert all(float(p.grad.abs().max()) > 0 for p in blind.parameters())


@pytest.mark.parametrize('residual', [True, False])
def test_without_a_last_layer_the_input_or_nothing_is_left(residual):
    "Residual: what the network gives is added to its input."
    net, x = ImageRestorer(residual=residual), torch.rand(2, 3, 11, 14)
    nn.init.zeros_(net.last.weight), nn.init.zeros_(net.last.bias)
    assert torch.equal(net(x), x if residual else torch.zeros_like(x))


def test_the_residual_is_added():
    "The same weights with and without it differ by the input."
    plain, residual, x = ImageRestorer(False), ImageRestorer(True), torch.rand(1, 3, 9, 9)
    residual.load_state_dict(plain.state_dict())
    with torch.inference_mode():
        assert torch.allclose(residual(x), plain(x) + x) and float(plain(x).std()) > 0.01


def test_what_comes_out_is_as_large_as_what_went_in():
    "Also where it is smaller than what the network sees."
    net = ImageRestorer()
    for size in ((2, 2), (4, 30), (18, 16)):
        assert net(torch.rand(2, 3, *size)).shape == (2, 3, *size)


def test_start_small_draws_weights_and_leaves_the_rest():
    "All of one spread, 0.001, or whatever is asked for; biases and PReLUs are not touched."
    torch.manual_seed(0)
    net = ImageRestorer()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    for std in (1e-3, 0.02):
        assert start_small(net, **({} if std == 1e-3 else {'std': std})) is net
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d):  # at least 384 numbers: 0.2 is more than five sigma
                weight = layer.weight.detach()
                assert float(weight.std()) == pytest.approx(std, rel=0.2)
                assert abs(float(weight.mean())) < 0.3 * std
    weights = {f'{n}.weight' for n, m in net.named_modules() if isinstance(m, nn.Conv2d)}
    assert len(weights) == 11
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in weights)


@pytest.mark.parametrize('channels', [(3, 128), (11, 128), (64, 32)])
def test_merged_layers_give_what_the_layers_give(channels):
    "In eval without gradients; zeros beyond the border included. What came in stays."
    torch.manual_seed(0)
    unit, x = ConvUnit(*channels), torch.randn(2, channels[0], 9, 12)
    for slope in (unit[2], unit[4]):
        nn.init.constant_(slope.weight, 0.3)
    with torch.inference_mode():
        before = x.clone()
        layers = unit(x)
        unit.eval()
        merged = unit(x)
    assert torch.allclose(layers, merged, atol=1e-5) and float(layers.std()) > 0.01
    assert torch.equal(x, before)


def test_gradients_take_the_long_way():
    "In eval too: all six tensors and both slopes get theirs, the same as while training."
    torch.manual_seed(0)
    unit, x, found = ConvUnit(3, 8), torch.randn(1, 3, 9, 9), []
    for mode in (True, False):
        unit.train(mode).zero_grad()
        unit(x).square().sum().backward()
        found.append([p.grad.clone() for p in unit.parameters()])
    assert len(found[0]) == 8 and all(float(g.abs().max()) > 0 for g in found[0])
    assert all(torch.equal(a, b) for a, b in zip(*found))


# Losses


def test_summed_mse_by_hand():
    "Errors of 0.5, 1 and 2: 0.25 + 1 + 4, over the whole batch."
    x, y = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    x[0, 0, 0, 0], x[0, 2, 3, 1], x[1, 1, 1, 1] = 0.5, -1.0, 2.0
    assert float(summed_mse(x, y)) == 5.25


def test_root_mse_by_hand():
    "Two photos, off by 0.3 and 0.1: the mean of two roots, not the root of a mean."
    x = torch.full((2, 3, 8, 8), 0.5)
    y = x + torch.tensor([0.3, -0.1]).view(2, 1, 1, 1)
    assert float(root_mse(y, x)) == pytest.approx(0.2, rel=1e-3)


def test_root_mse_of_identical_photos_has_a_gradient():
    "The slope of a root at zero is infinite, and would spoil all weights."
    x = torch.full((2, 3, 8, 8), 0.5)
    y = x.clone().requires_grad_()
    loss = root_mse(y, x)
    loss.backward()
    assert float(loss) < 0.0011 and y.grad.abs().max() == 0


def test_log_mse_by_hand():
    "Off by 0.1 and by 0.01: 20 and 40 dB, so 30 dB on average, but for the floor."
    x = torch.full((2, 3, 8, 8), 0.5)
    y = x + torch.tensor([0.1, -0.01]).view(2, 1, 1, 1)
    assert -10 / math.log(10) * float(log_mse(y, x, floor=0)) == pytest.approx(30, abs=1e-3)
    floored = (math.log(0.01 + 1e-4) + math.log(1e-4 + 1e-4)) / 2
    assert float(log_mse(y, x)) == pytest.approx(floored, abs=1e-3)
    assert float(log_mse(x, x)) == pytest.approx(math.log(1e-4), abs=1e-3)


# Training


def small_dls(bs=4, n=8):
    "The same crops in the same order, each time."
    seed(0)
    photos = [sample_photo('rocket'), sample_photo('flower')]
    return recipe_dls(
        photos, photos, jpeg_recipe(10), 24, bs=bs, per_photo=n // 2, augment=False, device='cpu'
    )


def quietly(learn, *args):
    "`fit` without a bar or a table."
    with learn.no_bar(), learn.no_logging():
        learn.fit(*args)
    return learn


def test_the_last_layer_is_a_group_of_its_own():
    "Together both groups are all parameters, each of them once."
    net = ImageRestorer()
    body, last = ({id(p) for p in group} for group in last_layer_group(net))
    assert last == {id(net.last.weight), id(net.last.bias)}
    assert not body & last and body | last == {id(p) for p in net.parameters()}
    assert [len(g) for g in last_layer_group(net)] == [len(body), len(last)]


def test_two_rates_are_trained_with():
    "The first step of Adam moves a number by its rate at most, and many by just that."
    net = ImageRestorer()
    before = [[p.detach().clone() for p in group] for group in last_layer_group(net)]
    learn = quietly(restorer_learner(small_dls(n=4), net, half=False), 1, slice(1e-3, 1e-5))
    assert [h['lr'] for h in learn.opt.hypers] == pytest.approx([1e-3, 1e-5])
    for old, new, rate in zip(before, last_layer_group(net), (1e-3, 1e-5)):
        moved = max(float((a - b.detach()).abs().max()) for a, b in zip(old, new))
        assert moved == pytest.approx(rate, rel=0.01)


def test_muon_gets_kernels_and_adam_the_rest():
    "Together both groups are all parameters, each of them once."
    net = nn.utils.weight_norm(nn.Conv2d(4, 4, 3))  # with a length, (4, 1, 1, 1), for each kernel
    net = nn.Sequential(net, nn.BatchNorm2d(4), nn.PReLU(), nn.Conv2d(4, 2, 1))
    net.last = nn.Conv2d(2, 3, 5)
    adam, kernels = muon_groups(net)
    assert adam['use_fallback'] and 'use_fallback' not in kernels
    assert [tuple(p.shape) for p in kernels['params']] == [(4, 4, 3, 3), (2, 4, 1, 1)]
    together = [id(p) for group in (adam, kernels) for p in group['params']]
    assert sorted(together) == sorted(id(p) for p in net.parameters())


def test_a_step_of_muon_is_about_as_long_in_all_directions():
    "A matrix of m×n moves by .2 √max(m, n) times the rate; only faint directions by less."
    net = ImageRestorer()
    before = [p.detach().clone() for p in net.parameters()]
    learn = restorer_learner(small_dls(n=4), net, half=False)
    learn.opt_func, learn.splitter = muon, muon_groups
    quietly(learn, 1, slice(1e-4, 1e-3))
    assert [h['lr'] for h in learn.opt.hypers] == pytest.approx([1e-4, 1e-3])
    kernels = {id(p) for p in muon_groups(net)[1]['params']}
    for p, old in zip(net.parameters(), before):
        moved = p.detach() - old
        if id(p) not in kernels:
            # Nesterov's momentum: the first step is .9 + 1 times the rate
            assert float(moved.abs().max()) == pytest.approx(1.9e-4, rel=0.01)
            continue
        gradient = learn.opt.opt.state[p]['momentum_buffer'].flatten(1)  # of the one step
        step = moved.flatten(1) / 1e-3
        lengths = torch.linalg.svdvals(step) / (0.2 * max(step.shape) ** 0.5)
        assert 0.8 < float(lengths.max()) < 1.25
        strong = torch.linalg.svdvals(gradient) / torch.linalg.norm(gradient) > 0.02
        assert strong.any() and float(lengths[: int(strong.sum())].min()) > 0.6


def test_an_epoch_of_the_learner_is_that_of_a_loop_by_hand():
    "In float32, with torch's Adam and the same crops; the last layer at half the rate."
    seed(1)
    by_hand, net = ImageRestorer(), ImageRestorer()
    net.load_state_dict(by_hand.state_dict())
    # Adam turns a rounding error of a gradient near zero into a whole step: both round alike
    by_hand.to(memory_format=torch.channels_last)
    body = [p for n, p in by_hand.named_parameters() if not n.startswith('last.')]
    groups = [{'params': body, 'lr': 1e-3}, {'params': by_hand.last.parameters(), 'lr': 5e-4}]
    optimizer = torch.optim.Adam(groups)
    steps = 0
    for degraded, clean in small_dls().train:
        loss = ((by_hand(degraded) - clean) ** 2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
    learn = restorer_learner(small_dls(), net, half=False)
    learn.opt_func = partial(OptimWrapper, opt=torch.optim.Adam)
    quietly(learn, 1, slice(1e-3, 5e-4))
    assert steps == 2 and equal_weights(by_hand, net, within=1e-6)
    assert not equal_weights(ImageRestorer(), net, within=1e-3)


def test_half_precision_can_be_left_out():
    "On a CPU it is a callback of the workbench."
    for half in (True, False):
        learn = restorer_learner(small_dls(), Small(), half=half)
        assert any(isinstance(cb, AutocastCPU) for cb in learn.cbs) == half
        assert learn.loss_func is summed_mse and learn.wd == 0


@pytest.mark.parametrize('bs', [2, 3, 5])
def test_the_learner_shows_the_psnr_of_scikit_image(bs):
    "The mean over the photos, whether or not the last batch is as large as the others."
    photos = [sample_photo(n).crop((0, 0, 60, 60)) for n in ('coins', 'rocket', 'brick')]
    photos += [sample_photo('flower').crop((300, 200, 360, 260)), sample_photo('cat')]
    dls = recipe_dls(photos, photos, jpeg_recipe(before=()), 32, bs=bs, device='cpu')
    torch.manual_seed(0)
    net = Small()
    nn.init.normal_(net.last.weight, std=0.2)  # so that it leaves [0, 1] here and there
    learn = restorer_learner(dls, net, half=False)
    assert list(learn.metrics.attrgot('name')) == ['input', 'output']
    with learn.no_bar():
        _, before, after = learn.validate()
    found = []
    for degraded, clean in dls.valid:
        with torch.inference_mode():
            output = net(degraded)
        for b, o, g in zip(*(x.double().numpy() for x in (degraded, output.clamp(0, 1), clean))):
            found.append([peak_signal_noise_ratio(g, x, data_range=1) for x in (b, o)])
    assert len(found) == 5 and (output.min() < 0 or output.max() > 1)
    assert [before, after] == pytest.approx(np.mean(found, 0), abs=1e-3)


# PSNR-B


def by_yim_and_bovik(prediction, target, block=8):
    "Their formula, on luma of studio range, or on gray as it is."

    def y(photo):
        a = np.asarray(photo, float)
        return a / 255 if a.ndim == 2 else (16 + a @ [65.481, 128.553, 24.966] / 255) / 255

    a = y(prediction)
    n_v, n_h = a.shape
    jumps = (a[:, 1:] - a[:, :-1]) ** 2, ((a[1:] - a[:-1]) ** 2).T
    across, total, borders = 0, 0, 0
    for jump, length, width in zip(jumps, (n_v, n_h), (n_h, n_v)):
        across += jump[:, block - 1 :: block].sum()
        total += jump.sum()
        borders += length * (width / block) - 1
    others = n_v * (n_h - 1) + n_h * (n_v - 1) - borders
    d_b, d_bc = across / borders, (total - across) / others
    eta = math.log2(block) / math.log2(min(n_h, n_v)) if d_b > d_bc else 0
    error = np.mean((a - y(target)) ** 2) + eta * (d_b - d_bc)
    return -10 * np.log10(error)


@pytest.mark.parametrize('size', [(64, 48), (61, 45), (9, 30), (33, 10)])
@pytest.mark.parametrize('mode', ['L', 'RGB'])
def test_psnr_b_is_that_of_the_paper(mode, size):
    "With blocks that stand out, and, the other way round, without."
    photo = sample_photo('cat').crop((130, 60, 130 + size[0], 60 + size[1])).convert(mode)
    degraded = saved_as_jpeg(photo, 5)
    for prediction, target in ((degraded, photo), (photo, degraded)):
        expected = by_yim_and_bovik(prediction, target)
        assert psnr_b(prediction, target) == pytest.approx(expected, abs=1e-3)


def test_psnr_b_by_hand():
    "A jump of d in the middle of 16×16: MSE d²/2, and ¾ of 16 d² over 2 × (16 × 2 - 1) borders."
    target, degraded = np.full((16, 16), 100, np.uint8), np.full((16, 16), 100, np.uint8)
    degraded[:, 8:] = 120
    expected = -10 * math.log10((20 / 255) ** 2 * (1 / 2 + 3 / 4 * 16 / 62))
    assert psnr_b(Image.fromarray(degraded), Image.fromarray(target)) == pytest.approx(expected)
    assert psnr_b(Image.fromarray(target), Image.fromarray(degraded)) == pytest.approx(
        -10 * math.log10((20 / 255) ** 2 / 2)  # no blocks in what is looked at
    )


def test_psnr_b_of_identical_photos():
    "Infinite for a ramp; but blocks count even where the original has them too."
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8), (40, 1)))
    assert psnr_b(ramp, ramp) == math.inf
    degraded = saved_as_jpeg(sample_photo('cat').crop((0, 0, 64, 64)), 5)
    assert psnr_b(degraded, degraded) == pytest.approx(
        by_yim_and_bovik(degraded, degraded), abs=1e-3
    )


def test_psnr_b_of_photos_that_differ_in_kind():
    "In size or mode."
    photo = noise_photo(20, 16)
    for other in (noise_photo(16, 20), noise_photo(20, 17), photo.convert('L')):
        with pytest.raises(EnhanceError, match='differ'):
            psnr_b(photo, other)


@pytest.mark.parametrize('size', [(8, 8), (8, 30), (300, 7), (1, 1)])
def test_psnr_b_of_photos_without_a_border_of_blocks(size):
    "Refused in a sentence, as SSIM refuses photos smaller than its window."
    with pytest.raises(EnhanceError, match=f'{size[0]}×{size[1]}'):
        psnr_b(noise_photo(*size), noise_photo(*size))


# Training the published models


@pytest.fixture(scope='module')
def trained(paths, tmp_path_factory):
    "Both models at smoke: name -> model, history, checkpoint."
    home = tmp_path_factory.mktemp('trained')
    found = {}
    for name in PUBLISHED:
        checkpoint = home / f'{name}.ckpt'
        found[name] = *train_published(name, paths, checkpoint, Budget('smoke')), checkpoint
    return found


@both
def test_both_models_train_at_smoke(name, trained, tmp_path):
    "What is made can be saved, and is found again by its card."
    model, (row,), checkpoint = trained[name]
    assert type(model) is NETWORKS[name] and row['epochs'] == 1
    assert set(row) == {'epochs', 'loss', 'input', 'output'}
    assert all(map(math.isfinite, row.values())) and 15 < row['input'] < 45
    assert checkpoint.with_suffix('.0.ckpt').exists()
    save_weights(model, tmp_path / 'a.safetensors')
    assert equal_weights(load_model(tmp_path / 'a.safetensors'), model.cpu())


def test_the_blind_model_starts_from_the_specialist(paths, tmp_path, monkeypatch):
    "A training that ends before its first step has the specialist's weights, not its bounds."

    def learner(dls, model, loss):
        found.append(model)
        raise Killed

    found = []
    monkeypatch.setattr(jpeg_restorer, 'restorer_learner', learner)
    for name in ('jpeg-blind', 'jpeg-q10'):
        with pytest.raises(Killed):
            train_published(name, paths, tmp_path / 'a.ckpt', Budget('smoke'))
    blind, specialist = found
    assert type(blind) is BlindRestorer and type(specialist) is ConstrainedRestorer
    assert torch.equal(blind.last.weight, the_model('jpeg-q10').last.weight)
    x = torch.rand(1, 3, 16, 16)
    with torch.inference_mode():
        unbound = ImageRestorer.forward(the_model('jpeg-q10'), x)
        assert torch.allclose(blind(x), unbound, atol=1e-5)
    assert not equal_weights(specialist, the_model('jpeg-q10'))


def test_an_unknown_model_is_refused(paths, tmp_path):
    "With those there are."
    with pytest.raises(EnhanceError, match="'jpeg-q9'.*jpeg-q10, jpeg-blind"):
        train_published('jpeg-q9', paths, tmp_path / 'a.ckpt', Budget('smoke'))


def test_a_checkpoint_of_another_network_is_refused(trained, paths, monkeypatch):
    "By its name, and it is left as it was."
    _, _, checkpoint = trained['jpeg-q10']
    old = checkpoint.with_suffix('.0.ckpt').read_bytes()
    monkeypatch.setattr(jpeg_restorer, 'ConstrainedRestorer', Small)
    with pytest.raises(EnhanceError, match=r'jpeg-q10\.0\.ckpt.* does not fit'):
        train_published('jpeg-q10', paths, checkpoint, Budget('smoke'))
    assert checkpoint.with_suffix('.0.ckpt').read_bytes() == old


def test_every_twentieth_photo_validates_and_the_others_train(tmp_path, monkeypatch):
    "In the order of their names; one that was named twice trains twice."
    asked = []

    def loaders(train, valid, *args, **kwargs):
        asked.extend((train, valid, kwargs['augment']))
        raise Killed

    monkeypatch.setattr(jpeg_restorer, 'recipe_dls', loaders)
    names = [f'{i:02}.png' for i in reversed(range(40))]
    with pytest.raises(Killed):
        train_published('jpeg-q10', [*names, '20.png', '07.png'], tmp_path / 'a', Budget('full'))
    train, valid, augment = asked
    assert valid == ['00.png', '20.png'] and augment is False
    assert sorted(train) == sorted([n for n in names if n not in valid] + ['07.png'])


@pytest.mark.parametrize('checkpoints', [1, 2, 3])
def test_a_training_goes_on_as_if_it_had_not_been_killed(checkpoints, paths, tmp_path, monkeypatch):
    "Killed in either of two rounds of two epochs, or between them. A small network stands in."
    monkeypatch.setattr(workbench, 'half_dtype', lambda device: None)
    monkeypatch.setattr(jpeg_restorer, 'ConstrainedRestorer', Small)

    shared = {'recipe': jpeg_recipe(10), 'loss': summed_mse, 'bs': 8, 'per_photo': 4, 'epochs': 2}
    rounds = ({**shared, 'lr': 1e-3, 'size': 32}, {**shared, 'lr': 7e-4, 'size': 48})

    def budget(smoke, lesson, full):
        return 4 if smoke == 1 else rounds

    def save_and_die(*args, **parts):
        written.append(save_checkpoint(*args, **parts))
        if len(written) == checkpoints:
            raise Killed

    written = []
    straight, history = train_published('jpeg-q10', paths, tmp_path / 'one.ckpt', budget)
    with monkeypatch.context() as patch:
        patch.setattr(workbench, 'save_checkpoint', save_and_die)
        with pytest.raises(Killed):
            train_published('jpeg-q10', paths, tmp_path / 'two.ckpt', budget)
    seed(99)  # another process
    model, again = train_published('jpeg-q10', paths, tmp_path / 'two.ckpt', budget)
    assert [row['epochs'] for row in history] == [2, 2]
    assert equal_weights(straight, model, within=1e-6)
    for row, same in zip(history, again, strict=True):
        assert row == pytest.approx(same, abs=1e-4)
    assert float(model.last.weight.detach().abs().max()) > 1e-4  # it started from zero
    for i, highest in enumerate((1e-3, 7e-4)):  # it has fallen; Adam's is a tenth of Muon's
        _, parts = load_checkpoint(tmp_path / f'one.{i}.ckpt')
        others, kernels = (group['lr'] for group in parts['optimizer']['param_groups'])
        assert others == pytest.approx(kernels / 10) and 0 < kernels < highest / 2


# What is published


@both
def test_the_card_says_what_there_is(name):
    "Class, arguments, task and checksum; and where the weights came from."
    path = WEIGHTS / f'{name}.safetensors'
    card, model = read_card(path.with_suffix('.json')), the_model(name)
    module, _, kind = card['architecture'].rpartition('.')
    assert getattr(importlib.import_module(module), kind) is type(model) is NETWORKS[name]
    rebuilt = type(model)(**card['arguments']).state_dict()
    assert {k: v.shape for k, v in rebuilt.items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    assert card['parameters'] == sum(p.numel() for p in model.parameters())
    assert card['task'] == PUBLISHED[name]['task'] == 'jpeg10' and card['scale'] == 1
    assert card['sha256'] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [row['model'] for row in card['scoreboard']] == ['input', name]
    assert card['scoreboard'][1]['dB'] > card['scoreboard'][0]['dB']


@both
def test_the_card_says_where_the_weights_came_from(name):
    "Trained at the full budget, by `make weights`."
    card = read_card(WEIGHTS / f'{name}.json')
    assert {'recipe', 'training', 'scores', 'command', 'license', 'machine'} <= set(card)
    assert card['budget'] == 'full'


@both
def test_the_weights_are_small(name):
    "At most 5 MB on disk."
    assert (WEIGHTS / f'{name}.safetensors').stat().st_size <= 5_000_000


def test_the_task_is_jpeg_of_quality_10():
    "Of the photo as it is: on the scoreboard nothing is drawn."
    photo = noise_photo(50, 41)
    degraded, clean = TASKS['jpeg10'].pair(photo, 7)
    assert clean.tobytes() == photo.tobytes()
    assert degraded.tobytes() == saved_as_jpeg(photo, 10).tobytes()


@pytest.fixture(scope='module')
def pieces(tmp_path_factory):
    "A piece of every fifth photo of BSDS500 val, each in a folder of its own."
    folders = []
    for path in sorted(VAL.glob('*.jpg'))[::5]:
        folders.append(tmp_path_factory.mktemp('piece'))
        # multiples of 16, so that its blocks are those of the whole photo
        Image.open(path).convert('RGB').crop((16, 96, 160, 240)).save(folders[-1] / 'a.png')
    assert len(folders) == 20
    return tuple(folders)


@cache
def gains(name, folders, quality):
    "What a model gains by the yardstick on each of some pieces, in dB."
    score, fix = yardstick().score_jpeg_rgb, the_model(name).predict
    found = [score(fix, folder, quality) for folder in folders]
    return np.array([after - before for before, after, _ in found])


def on_val(name, quality):
    "What the card says of the whole of BSDS500 val; `make bench` measures it anew."
    return the_model(name).card['scores'][f'BSDS500 val, quality {quality}']


@has_val
@pytest.mark.parametrize(
    'name, quality', [('jpeg-q10', 10), ('jpeg-blind', 10), ('jpeg-blind', 40)]
)
def test_the_card_is_right(name, quality, pieces):
    "Pieces of twenty photos gain about as much as the card says of a hundred whole ones."
    said, found = on_val(name, quality), gains(name, pieces, quality).mean()
    assert found == pytest.approx(said['output'] - said['input'], abs=0.12)


def test_the_specialist_on_bsds500():
    "At quality 10."
    assert on_val('jpeg-q10', 10)['output'] >= 27.05


@has_bench
def test_the_specialist_on_classic5():
    "By the yardstick, and the card says the same."

    def fix(gray):
        return np.asarray(the_model('jpeg-q10').predict(Image.fromarray(gray)))

    before, after, _ = yardstick().score_jpeg(fix, CLASSIC5, 10)
    assert after >= 29.45
    said = the_model('jpeg-q10').card['scores']['Classic5, quality 10']
    assert [said['input'], said['output']] == pytest.approx([before, after], abs=0.02)


@has_val
def test_the_blind_model_is_nearly_as_good_as_the_specialist(pieces):
    "At the one quality that the specialist knows, within 0.15 dB."
    assert on_val('jpeg-blind', 10)['output'] >= on_val('jpeg-q10', 10)['output'] - 0.15
    assert gains('jpeg-blind', pieces, 10).mean() >= gains('jpeg-q10', pieces, 10).mean() - 0.15


@has_val
def test_the_blind_model_gains_at_quality_40(pieces):
    "By 0.6 dB or more."
    assert gains('jpeg-blind', pieces, 40).mean() >= 0.6


@has_val
@pytest.mark.parametrize('quality', [10, 30, 50, 70, 90])
def test_the_blind_model_harms_no_piece(quality, pieces):
    "By more than 0.05 dB."
    assert gains('jpeg-blind', pieces, quality).min() >= -0.05


@pytest.mark.parametrize('quality', [10, 30, 50, 70, 90])
def test_the_blind_model_harms_no_photo(quality):
    "The same of the hundred whole photos, by the card."
    assert on_val('jpeg-blind', quality)['least gain of a photo'] >= -0.05


@has_val
def test_the_blind_model_mends_double_jpeg(pieces):
    "Quality 10, four pixels cut off at the left and top, quality 50: the grids differ."
    found = []
    for folder in pieces:
        photo = Image.open(folder / 'a.png')
        box = (4, 4, *photo.size)
        degraded = saved_as_jpeg(saved_as_jpeg(photo, 10).crop(box), 50)
        clean = np.asarray(photo.crop(box))
        before, after = (
            peak_signal_noise_ratio(clean, np.asarray(p))
            for p in (degraded, the_model('jpeg-blind').predict(degraded))
        )
        found.append(after - before)
    assert np.mean(found) >= 1
    said = the_model('jpeg-blind').card['scores']['BSDS500 val, quality 10, then 50 shifted by 4']
    assert said['output'] - said['input'] >= 1


@pytest.mark.parametrize('name', ['cat', 'coffee'])  # china comes from a JPEG file
def test_the_blind_model_leaves_a_clean_photo_nearly_as_it_is(name):
    "38 dB is an error of about three levels."
    photo = sample_photo(name).crop((160, 60, 320, 220))
    better = the_model('jpeg-blind').predict(photo)
    assert peak_signal_noise_ratio(np.asarray(photo), np.asarray(better)) >= 38


# Any photo


@both
@pytest.mark.parametrize('size', [(1, 1), (33, 21), (7, 300), (2, 1)])
@pytest.mark.parametrize('mode', ['L', 'LA', 'RGB', 'RGBA'])
def test_photos_of_any_size_and_mode_come_out_as_they_went_in(mode, size, name):
    "Alpha exactly."
    photo = noise_photo(*size, mode)
    better = the_model(name).predict(photo)
    assert (better.mode, better.size) == (mode, size)
    if mode.endswith('A'):
        assert better.getchannel('A').tobytes() == photo.getchannel('A').tobytes()


@both
def test_gray_of_16_bits_is_taken_as_it_is_opened(name, tmp_path):
    "Divided by 257, as `open_photo` does."
    deep = Image.fromarray(np.linspace(0, 65535, 40 * 30).reshape(30, 40).astype(np.uint16))
    deep.save(tmp_path / 'a.png')
    better = the_model(name).predict(tmp_path / 'a.png')
    eight = np.rint(np.asarray(deep) / 257).astype(np.uint8)
    assert better.mode == 'L' and better.tobytes() == (
        the_model(name).predict(Image.fromarray(eight)).tobytes()
    )
    assert open_photo(tmp_path / 'a.png', None).tobytes() == eight.tobytes()


@both
def test_tiles_are_parts_of_the_whole(name):
    "Tiles of an odd size, in float32: at most a level off, by rounding."
    model = load_model(name)
    photo = saved_as_jpeg(sample_photo('coffee').crop((200, 100, 315, 193)), 10)
    model.tile = 10_000
    whole = np.asarray(model.predict(photo, fast=False), int)
    model.tile = 47
    tiled = np.asarray(model.predict(photo, fast=False), int)
    assert np.abs(tiled - whole).max() <= 1
    assert np.abs(whole - np.asarray(photo, int)).max() > 5  # it does something


@both
def test_half_precision_costs_next_to_nothing(name):
    "Within 0.02 dB of float32."
    clean = sample_photo('china').crop((200, 150, 328, 278))
    degraded = saved_as_jpeg(clean, 10)
    a, b = (
        peak_signal_noise_ratio(
            np.asarray(clean), np.asarray(the_model(name).predict(degraded, fast=fast))
        )
        for fast in (True, False)
    )
    assert a == pytest.approx(b, abs=0.02)


@both
def test_spoiled_weights_are_refused(name):
    "One of the numbers is NaN."
    model = load_model(name)
    with torch.no_grad():
        model.last.weight[0, 0, 0, 0] = math.nan
    with pytest.raises(EnhanceError, match='NaN'):
        model.predict(noise_photo(20, 20))


def test_a_unit_is_three_convolutions():
    "Small enough to follow: identities inside, so a positive photo comes out as it went in."
    unit = ConvUnit(1, 1)
    for layer in (unit[0], unit[1], unit[3]):
        nn.init.dirac_(layer.weight), nn.init.zeros_(layer.bias)
    x = torch.rand(1, 1, 5, 5)
    assert torch.equal(unit(x), x)
    assert torch.allclose(unit(-x), -x * 0.25**2)  # PReLU starts at a quarter, twice
