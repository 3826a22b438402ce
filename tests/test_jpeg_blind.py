"""The blind JPEG restorer: what guides it, its network, and what its published weights reach."""

import io
import math
from functools import cache

import numpy as np
import pytest
import torch
from beside import SHARED, needs, yardstick
from fastai.torch_core import set_seed
from PIL import Image
from scipy.fft import dctn
from skimage.metrics import peak_signal_noise_ratio
from torch import nn

from enhance_lib.applications.jpeg_blind import (
    BlindRestorer,
    DamageEstimator,
    FoldedUnit,
    damage,
    grid_lines,
    learn_damage,
)
from enhance_lib.jpeg_restorer import (
    ImageRestorer,
    jpeg_recipe,
    restorer_learner,
    root_mse,
    summed_mse,
)
from enhance_lib.toolbox.datasets import sample_photo
from enhance_lib.toolbox.models import load_model
from enhance_lib.toolbox.pairs import recipe_dls
from enhance_lib.toolbox.tensors import to_tensor

VAL = SHARED / 'data' / 'bsds500' / 'val'
has_val = needs(VAL)

the_model = cache(load_model)  # for tests that leave it as it is


def saved_as_jpeg(photo, quality):
    "What Pillow makes of a photo."
    file = io.BytesIO()
    photo.save(file, 'JPEG', quality=quality)
    return Image.open(file).convert(photo.mode)


# The network


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
    margin, x = net.margin, torch.rand(1, 3, 192, 192).double()
    seen = 0
    with torch.inference_mode():
        before = net(x)
        for at in ((96, 96), (103, 97)):
            y = x.clone()
            y[..., at[0], at[1]] = 1 - y[..., at[0], at[1]]
            changed = (before - net(y))[0].abs().amax(0) > 1e-12
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


@pytest.mark.parametrize('low, high', [(20, 60), (40, 90)])
def test_the_published_estimator_tells_low_quality_from_high(low, high):
    "And is off by less than 2 dB on a photo that it has not seen."
    model, photo = the_model('jpeg-blind'), sample_photo('cat').crop((0, 0, 320, 240))
    told = []
    for quality in (low, high):
        x = to_tensor(saved_as_jpeg(photo, quality))
        with torch.inference_mode():
            model(x)
        true = float(damage(x, to_tensor(photo)).mean())
        told.append(float(model.told[:, 0].mean()))
        assert abs(told[-1] - true) < 2 * math.log(10) / 20
    assert told[0] > told[1]


def test_the_estimator_learns_while_the_network_is_trained():
    "In sixteen steps its error falls by a quarter and more, compared with none that learns."
    names, errors = ('brick', 'camera', 'flower', 'rocket'), {}
    photos = [sample_photo(name).crop((0, 0, 330, 330)) for name in names]
    for name, callbacks in (('with', [learn_damage()]), ('without', [])):
        set_seed(0)
        dls = recipe_dls(
            photos,
            photos[:2],
            jpeg_recipe(10),
            size=32,
            bs=4,
            per_photo=8,
            device='cpu',
            augment=False,
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


def test_in_pieces_it_gives_what_it_gives_at_once():
    "Pieces that end inside a block of the path that looks; the last ones are smaller."
    torch.manual_seed(0)
    net, x = BlindRestorer().eval(), torch.rand(1, 3, 72, 104)
    net.piece = 48
    with torch.inference_mode():
        assert torch.allclose(net.enhance_tile(x), net(x), atol=1e-5)


@pytest.mark.parametrize('channels', [(17, 128), (64, 32)])
def test_merged_layers_give_what_the_layers_give(channels):
    "In eval without gradients; zeros beyond the border included. What came in stays."
    torch.manual_seed(0)
    unit, x = FoldedUnit(*channels), torch.randn(2, channels[0], 9, 12)
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
    unit, x, found = FoldedUnit(3, 8), torch.randn(1, 3, 9, 9), []
    for mode in (True, False):
        unit.train(mode).zero_grad()
        unit(x).square().sum().backward()
        found.append([p.grad.clone() for p in unit.parameters()])
    assert len(found[0]) == 8 and all(float(g.abs().max()) > 0 for g in found[0])
    assert all(torch.equal(a, b) for a, b in zip(*found))


# What both published models reach


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
    assert on_val('jpeg-q10', 10)['output'] >= 27.04


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
@pytest.mark.parametrize('quality, every', [(10, 1), (40, 1), (90, 2)])
def test_the_blind_model_harms_no_piece(quality, every, pieces):
    "By more than 0.05 dB."
    assert gains('jpeg-blind', pieces[::every], quality).min() >= -0.05


@pytest.mark.parametrize('quality', [10, 30, 50, 70, 90])
def test_the_blind_model_harms_no_photo(quality):
    "The same of the hundred whole photos, by the card."
    assert on_val('jpeg-blind', quality)['least gain of a photo'] >= -0.05


@has_val
def test_the_blind_model_mends_double_jpeg(pieces):
    "Quality 10, four pixels cut off at the left and top, quality 50: the grids differ."
    found = []
    for folder in pieces[::2]:
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
