"""Measures against other libraries, published figures and sums by hand; bad input; downloads."""

import hashlib
import http.server
import importlib.util
import io
import json
import os
import pickle
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageFilter
from skimage.color import rgb2ycbcr
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity
from torch import nn

from enhance_lib.enhance_lib import measure
from enhance_lib.toolbox.operations import resize
from enhance_lib.applications.scoreboard import (
    TASKS,
    bench_pairs,
    board_pairs,
    board_row,
    lpips,
    mean_luma_psnr,
    plot_scoreboard,
    scoreboard,
)
from enhance_lib.measure import (
    crop_border,
    feature_distance,
    luma,
    luma_psnr,
    mse,
    psnr,
    radial_spectrum,
    rgb_to_ycbcr,
    ssim,
    ycbcr_to_rgb,
)
from enhance_lib.toolbox.features import FeatureNet, feature_net, measuring_net
from enhance_lib.toolbox.models import read_card
from enhance_lib.toolbox.operations import identity_baseline
from enhance_lib.toolbox.tensors import to_photo, to_tensor
from enhance_lib.toolbox.datasets import sample_photo, sample_photos
from enhance_lib.toolbox.errors import EnhanceError
from enhance_lib.toolbox.show import Budget

SHARED = Path(__file__).parents[1].parent / 'shared'
SQUEEZENET = SHARED / 'pretrained' / 'squeezenet1_1.pth'


def needs(path):
    "Skip where a file beside the project is missing, as it is for most."
    return pytest.mark.skipif(not path.exists(), reason=f'there is no {path}')


def one_line(error):
    message = str(error.value)
    assert message and '\n' not in message
    return message


def noise(width=20, height=14, mode='RGB', seed=0):
    shape = (height, width, 3) if mode == 'RGB' else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def flat(level, size=(16, 16), mode='RGB'):
    return Image.fromarray(np.full((*size[::-1], 3)[: 3 if mode == 'RGB' else 2], level, np.uint8))


def batch(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def tiny_net(*weights):
    "A network of 1×1 layers (outputs, inputs), each tapped, so that its features are sums by hand."
    layers = nn.Sequential(*(nn.Conv2d(len(w[0]), len(w), 1, bias=False) for w in weights))
    with torch.no_grad():
        for layer, w in zip(layers, weights):
            layer.weight.copy_(torch.tensor(w)[:, :, None, None])
    return FeatureNet(layers, tuple(range(len(weights))))


COLORS = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]  # features that are the colors


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    "No test finds a network kept by another test or by the user, and none goes to the web."
    from torchvision.models import SqueezeNet1_1_Weights

    row = SqueezeNet1_1_Weights.IMAGENET1K_V1.value
    name = row.url.rsplit('/')[-1]
    monkeypatch.setattr(row, 'url', f'http://127.0.0.1:9/{name}')  # where nobody answers
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    monkeypatch.delenv('ENHANCE_FEATURES', raising=False)
    forget()
    yield
    forget()


def forget():
    measure._load_net.cache_clear()
    measure._load_lpips.cache_clear()


@pytest.fixture(scope='session')
def squeezenet(tmp_path_factory):
    "A file of SqueezeNet 1.1 in torchvision's layout: the trained one, or else one with noise."
    if SQUEEZENET.exists():
        return SQUEEZENET
    from torchvision.models import squeezenet1_1

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        path = tmp_path_factory.mktemp('made') / 'squeezenet1_1.pth'
        torch.save(squeezenet1_1().state_dict(), path)
    return path


# Agreement with other libraries

few = settings(max_examples=20, deadline=None)


@st.composite
def two_pictures(draw, smallest=1):
    side = st.integers(smallest, 18)
    shape = (draw(side), draw(side)) + draw(st.sampled_from([(), (3,)]))
    a = draw(arrays(np.uint8, shape))
    near = np.random.default_rng(draw(st.integers(0, 99))).integers(-9, 10, shape)
    b = draw(st.sampled_from([(a + near).clip(0, 255).astype(np.uint8), 255 - a, a]))
    return a, b


def skimage_psnr(a, b, data_range):
    with np.errstate(divide='ignore'):
        return peak_signal_noise_ratio(a, b, data_range=data_range)


def skimage_ssim(a, b, data_range, channel_axis):
    return structural_similarity(
        *(np.asarray(x, float) for x in (a, b)),
        data_range=data_range,
        channel_axis=channel_axis,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )


@few
@given(two_pictures())
def test_mse_and_psnr_of_photos_are_those_of_skimage(pixels):
    a, b = pixels
    photos = Image.fromarray(b), Image.fromarray(a)
    error, decibels = mse(*photos), psnr(*photos)
    assert type(error) is float and type(decibels) is float
    assert error == pytest.approx(mean_squared_error(a / 255, b / 255), rel=1e-4, abs=1e-12)
    assert decibels == pytest.approx(skimage_psnr(a, b, 255), abs=1e-3)


@few
@given(two_pictures(smallest=11))
def test_ssim_of_photos_and_batches_is_that_of_skimage(pixels):
    a, b = pixels
    photos = Image.fromarray(b), Image.fromarray(a)
    expected = skimage_ssim(a, b, 255, -1 if a.ndim == 3 else None)
    ours = ssim(*photos)
    assert type(ours) is float and ours == pytest.approx(expected, abs=1e-6)
    # another implementation
    values = ssim(*(to_tensor(p) for p in photos))
    assert values.shape == (1,) and values[0] == pytest.approx(expected, abs=1e-4)


def test_ssim_of_a_batch_of_plain_gray_is_one():
    "Where single precision rounds the variance away, it was .997."
    plain = torch.full((1, 1, 11, 11), 213 / 255)
    assert float(ssim(plain, plain)) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize('channels', [1, 3])
def test_batches_give_one_number_per_picture(channels):
    import torchmetrics.functional.image as tm

    target = batch(4, channels, 23, 31)
    strength = torch.tensor([0.02, 0.1, 0.3, 0.6]).view(4, 1, 1, 1)  # four that differ much
    prediction = target + strength * (batch(4, channels, 23, 31, seed=1) - target)
    found = [f(prediction, target) for f in (mse, psnr, ssim)]
    assert [x.shape for x in found] == [(4,)] * 3
    pairs = list(zip(target.double().numpy(), prediction.double().numpy()))
    np.testing.assert_allclose(found[0], [mean_squared_error(*p) for p in pairs], rtol=1e-5)
    np.testing.assert_allclose(found[1], [skimage_psnr(*p, 1) for p in pairs], rtol=1e-5)
    np.testing.assert_allclose(found[2], [skimage_ssim(*p, 1, 0) for p in pairs], atol=1e-4)
    decibels = [
        float(tm.peak_signal_noise_ratio(p, t, data_range=1.0)) for p, t in zip(prediction, target)
    ]
    np.testing.assert_allclose(found[1], decibels, rtol=1e-5)


def test_ssim_leaves_out_the_border():
    "torchmetrics reflects the picture there, skimage and the paper don't: equal but for that."
    from torchmetrics.functional.image import structural_similarity_index_measure

    target = batch(2, 3, 90, 120)
    prediction = target + 0.3 * (batch(2, 3, 90, 120, seed=1) - target)
    theirs = structural_similarity_index_measure(
        prediction, target, data_range=1.0, reduction='none'
    )
    torch.testing.assert_close(ssim(prediction, target), theirs, atol=0.01, rtol=0)
    # what is only at the border counts for less: the windows that look at it lie farther in
    spoiled = target.clone()
    spoiled[..., 0] = 0
    expected = [skimage_ssim(*p, 1, 0) for p in zip(target.numpy(), spoiled.numpy())]
    np.testing.assert_allclose(ssim(spoiled, target), expected, atol=1e-4)


def test_figures_by_hand():
    "A tenth is 20 dB, one level 20 log10(255); SSIM of two flat photos has a formula."
    assert mse(flat(0), flat(51)) == pytest.approx(0.04)
    assert psnr(torch.full((1, 3, 8, 8), 0.4), torch.full((1, 3, 8, 8), 0.5))[0] == pytest.approx(
        20, abs=1e-4
    )
    assert psnr(flat(100), flat(101)) == pytest.approx(48.1308, abs=1e-3)
    a, b, c = 0.2, 0.6, 0.01**2  # no variance: only the term of the means is left
    expected = (2 * a * b + c) / (a**2 + b**2 + c)
    assert ssim(flat(51), flat(153)) == pytest.approx(expected, abs=1e-6)
    x, y = (torch.full((1, 1, 12, 12), v) for v in (a, b))
    assert ssim(x, y)[0] == pytest.approx(expected, abs=1e-4)


def test_ssim_works_down_to_one_window():
    a, b = noise(11, 11), noise(11, 11, seed=1)
    expected = skimage_ssim(a, b, 255, -1)
    assert ssim(a, b) == pytest.approx(expected, abs=1e-6)
    assert ssim(to_tensor(a), to_tensor(b))[0] == pytest.approx(expected, abs=1e-4)


@pytest.mark.filterwarnings('ignore:Converting a tensor')  # the matter of another test
def test_measures_leave_no_graph_and_no_change():
    "Half precision is measured in single; a prediction that is being trained stays as it is."
    target = batch(2, 3, 40, 40)
    prediction = (target * 0.9).requires_grad_()
    kept = prediction.detach().clone()
    for f in (mse, psnr, ssim, luma_psnr, lambda a, b: feature_distance(a, b, tiny_net(COLORS))):
        values = f(prediction, target)
        assert not values.requires_grad and values.dtype == torch.float32
        assert torch.equal(values, f(prediction.double(), target.double()))
    assert torch.equal(prediction, kept) and prediction.grad is None
    half = psnr(prediction.half(), target.half())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, psnr(prediction, target), atol=0.01, rtol=0)


@few
@given(arrays(np.uint8, st.sampled_from([(1, 1), (3, 5), (4, 2, 3), (1, 7, 3)])))
def test_a_photo_becomes_a_tensor_and_back(pixels):
    x = to_tensor(Image.fromarray(pixels))
    assert x.dtype == torch.float32 and x.shape[0] == 1 and x.shape[2:] == pixels.shape[:2]
    expected = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    np.testing.assert_allclose(x[0] * 255, expected, atol=1e-4)
    for y in (x, x[0]):
        np.testing.assert_array_equal(np.asarray(to_photo(y)), pixels)


def test_a_tensor_is_cut_off_and_rounded():
    x = torch.tensor([[-0.3, 0.0, 0.4 / 255], [0.6 / 255, 1.0, 7.0]])[None]
    for y in (x, x.requires_grad_(), x.detach().double()):
        assert np.asarray(to_photo(y)).tolist() == [[0, 0, 0], [1, 255, 255]]


# Luma


def test_ycbcr_is_that_of_skimage():
    pixels = np.random.default_rng(0).random((2, 9, 13, 3))
    pixels[0, 0, :5] = [[0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]]
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    ours = rgb_to_ycbcr(x)
    np.testing.assert_allclose(ours.permute(0, 2, 3, 1), rgb2ycbcr(pixels) / 255, atol=2e-6)
    # black and white have no color and the ends of the studio range
    corners = (ours[0, :, 0, :2].T * 255).tolist()
    assert corners == [pytest.approx([16, 128, 128]), pytest.approx([235, 128, 128])]
    assert torch.equal(luma(x), ours[:, :1])
    torch.testing.assert_close(ycbcr_to_rgb(ours), x, atol=1e-5, rtol=0)


def test_ycbcr_is_not_rounded_by_half_precision():
    x = batch(2, 3, 16, 16)
    plain = rgb_to_ycbcr(x)
    back = ycbcr_to_rgb(plain)
    with torch.autocast('cpu', torch.bfloat16):
        assert (x.flatten(2) @ x.flatten(2).mT).dtype == torch.bfloat16  # it does its work here
        for ours, expected in [
            (rgb_to_ycbcr(x), plain),
            (ycbcr_to_rgb(plain), back),
            (luma(x), plain[:, :1]),
        ]:
            assert ours.dtype == torch.float32 and torch.equal(ours, expected)
        assert luma_psnr(x, x * 0.9).dtype == torch.float32


@few
@given(st.integers(1, 14), st.integers(1, 14), st.integers(0, 6), st.integers(0, 99))
def test_luma_psnr_is_that_of_skimage(width, height, border, seed):
    a, b = noise(width, height, seed=seed), noise(width, height, seed=seed + 100)
    if 2 * border >= min(width, height):
        with pytest.raises(EnhanceError, match=f'{border} pixels'):
            luma_psnr(a, b, border)
        return
    y = [rgb2ycbcr(p)[border : height - border, border : width - border, 0] for p in (a, b)]
    expected = skimage_psnr(*y, 255)
    ours = luma_psnr(a, b, border)
    assert type(ours) is float and ours == pytest.approx(expected, abs=1e-3)
    both = luma_psnr(*(to_tensor(p).repeat(2, 1, 1, 1) for p in (a, b)), border)
    assert both.tolist() == [pytest.approx(expected, abs=1e-3)] * 2


def load_yardstick():
    spec = importlib.util.spec_from_file_location('yardstick', SHARED / 'tools' / 'yardstick.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs(SHARED / 'tools' / 'yardstick.py')
@pytest.mark.parametrize('mode', ['RGB', 'L'])
@pytest.mark.parametrize('shave', [0, 1, 4])
def test_luma_psnr_is_that_of_the_yardstick(mode, border):
    yardstick = load_yardstick()
    clean = sample_photo('cat').convert(mode)
    degraded = clean.filter(ImageFilter.GaussianBlur(1.5))
    y = [yardstick.to_y(p) for p in (degraded, clean)]
    # one channel is taken for luma as it is, by both
    np.testing.assert_allclose(luma(to_tensor(clean))[0, 0] * 255, y[1], atol=1e-3)
    assert luma_psnr(degraded, clean, border) == pytest.approx(yardstick.psnr(*y, border), abs=1e-3)


def test_shaving_takes_the_border_and_nothing_else():
    x = torch.arange(5 * 7).view(1, 5, 7)
    assert crop_border(x, 0).shape == (1, 5, 7)
    assert crop_border(x, 2).tolist() == [[[16, 17, 18]]]
    clean = noise(12, 12)
    degraded = clean.copy()
    degraded.paste((255, 0, 9), (0, 0, 12, 2))  # spoil two rows at the top
    assert luma_psnr(degraded, clean, 1) < 40 and luma_psnr(degraded, clean, 2) == np.inf


@needs(SHARED / 'data' / 'bench' / 'Set5')
@pytest.mark.parametrize('scale, published', [(2, 33.66), (3, 30.39), (4, 28.42)])
def test_bicubic_on_set5_is_what_papers_report(scale, published):
    pairs = bench_pairs(SHARED / 'data' / 'bench' / 'Set5' / f'x{scale}')
    assert len(pairs) == 5
    assert all(hr.size == (lr.width * scale, lr.height * scale) for lr, hr in pairs)

    def enlarge(p):
        return resize(p, p.width * scale, p.height * scale)

    assert mean_luma_psnr(enlarge, pairs, scale) == pytest.approx(published, abs=0.05)


def test_the_mean_is_over_pairs():
    "20 dB and 40 dB are 30 dB, although the mean of their errors is 23 dB."
    pairs = [(flat(100, mode='L'), flat(b, mode='L')) for b in (101, 110)]
    one, ten = 20 * np.log10(255), 20 * np.log10(255 / 10)
    assert mean_luma_psnr(lambda p: p, iter(pairs)) == pytest.approx((one + ten) / 2, abs=1e-3)


# Bad input

net = tiny_net(COLORS)


def distance(a, b):
    return feature_distance(a, b, net)


ALL = pytest.mark.parametrize(
    'measured', [mse, psnr, ssim, luma_psnr, distance, lpips], ids=lambda f: f.__name__
)


@ALL
@pytest.mark.parametrize(
    'prediction, target, words',
    [
        (noise(40, 32), noise(32, 40), ['40×32 RGB', '32×40 RGB']),
        (noise(40, 40), noise(40, 40, 'L'), ['40×40 RGB', '40×40 L']),
        (noise(40, 40), batch(1, 3, 40, 40), ['Image', 'Tensor']),
        (batch(1, 3, 40, 40), noise(40, 40), ['Tensor', 'Image']),
        (np.zeros((40, 40, 3)), np.zeros((40, 40, 3)), ['ndarray and ndarray']),
        (noise(40, 40), np.asarray(noise(40, 40)), ['Image', 'ndarray']),
        (batch(3, 40, 40), batch(3, 40, 40), ['(3, 40, 40)', '(N, C, H, W)']),
        (batch(1, 3, 40, 40), batch(1, 3, 40, 41), ['(1, 3, 40, 40)', '(1, 3, 40, 41)']),
        (batch(1, 1, 40, 40), batch(1, 3, 40, 40), ['(1, 1, 40, 40)', '(1, 3, 40, 40)']),
        (batch(1, 3, 40, 40), batch(2, 3, 40, 40), ['(1, 3, 40, 40)', '(2, 3, 40, 40)']),
        (batch(0, 3, 40, 40), batch(0, 3, 40, 40), ['(0, 3, 40, 40)', 'no pixels']),
        (batch(1, 3, 0, 40), batch(1, 3, 0, 40), ['(1, 3, 0, 40)', 'no pixels']),
        (noise(40, 40).convert('RGBA'), noise(40, 40).convert('RGBA'), ['RGBA', 'L or RGB']),
        (noise(40, 40).convert('P'), noise(40, 40).convert('P'), ['mode P', 'L or RGB']),
        (None, noise(40, 40), ['NoneType']),
        ('a.png', 'b.png', ['str and str']),
    ],
)
def test_two_that_do_not_fit_together(measured, prediction, target, words):
    with pytest.raises(EnhanceError) as error:
        measured(prediction, target)
    message = one_line(error)
    assert all(w in message for w in words), message


def spoiled(value):
    x = batch(1, 3, 40, 40)
    x[0, 1, 2, 3] = value
    return x


@ALL
@pytest.mark.parametrize('which', ['prediction', 'target'])
@pytest.mark.parametrize(
    'wrong, words',
    [
        (batch(1, 3, 40, 40) * 255, ['[0, 255]', '255']),
        (batch(1, 3, 40, 40) * 2 - 1, ['[-1, 1]', '-1']),
        (batch(1, 3, 40, 40) * 255 - 128, ['[0, 1]']),
        (torch.randint(0, 256, (1, 3, 40, 40), dtype=torch.uint8), ['torch.uint8', '255']),
        (torch.ones(1, 3, 40, 40, dtype=torch.int64), ['whole numbers', 'torch.int64']),
        (spoiled(torch.nan), ['1 NaN or infinite of 4,800']),
        (spoiled(torch.inf), ['1 NaN or infinite of 4,800']),
        (spoiled(-torch.inf), ['1 NaN or infinite of 4,800']),
    ],
    ids='0-255 -1-1 -128-127 uint8 int64 nan inf -inf'.split(),
)
def test_numbers_that_are_no_picture(measured, which, wrong, words):
    given = {'prediction': batch(1, 3, 40, 40), 'target': batch(1, 3, 40, 40)} | {which: wrong}
    with pytest.raises(EnhanceError) as error:
        measured(**given) if measured is not distance else measured(*given.values())
    message = one_line(error)
    assert which in message and all(w in message for w in words), message


def test_a_prediction_may_leave_the_range_a_little():
    "It is measured as it is: a ringing of 0.2 beyond white counts."
    prediction, target = torch.full((1, 1, 8, 8), 1.2), torch.ones(1, 1, 8, 8)
    assert mse(prediction, target)[0] == pytest.approx(0.04, rel=1e-5)
    assert mse(prediction - 1.4, target - 1)[0] == pytest.approx(0.04, rel=1e-5)


@pytest.mark.parametrize(
    'measured, size, words',
    [
        (ssim, (10, 30), ['11×11', '10×30']),
        (ssim, (30, 10), ['11×11', '30×10']),
        (distance, (31, 40), ['32×32', '31×40']),
        (distance, (40, 31), ['32×32', '40×31']),
        (lpips, (31, 40), ['32×32', '(3, 40, 31)']),
        (lpips, (40, 31), ['32×32', '(3, 31, 40)']),
    ],
)
def test_pictures_too_small(measured, size, words):
    for a, b in [(noise(*size), noise(*size)), (to_tensor(noise(*size)),) * 2]:
        with pytest.raises(EnhanceError) as error:
            measured(a, b)
        assert all(w in one_line(error) for w in words)


@pytest.mark.parametrize('shave', [-1, 7, 8, 1000])
def test_shaving_too_much(border):
    for a in (noise(20, 14), batch(2, 3, 14, 20)):
        with pytest.raises(EnhanceError) as error:
            luma_psnr(a, a, border)
        assert f'{border} pixels' in one_line(error) and '20×14' in one_line(error)


@pytest.mark.parametrize(
    'x, words',
    [
        (batch(2, 3, 5, 5), '(2, 3, 5, 5)'),
        (batch(5, 5), '(5, 5)'),
        (batch(2, 5, 5), '(2, 5, 5)'),
        (torch.full((1, 5, 5), torch.nan), '25 NaN or infinite of 25'),
    ],
)
def test_tensors_that_are_not_one_photo(x, words):
    with pytest.raises(EnhanceError) as error:
        to_photo(x)
    assert words in one_line(error)


def test_an_empty_photo():
    with pytest.raises(EnhanceError):
        psnr(Image.new('RGB', (0, 5)), Image.new('RGB', (0, 5)))


def no_crash(channels, measured):
    x = batch(1, channels, 40, 40)
    with pytest.raises(EnhanceError) as error:
        measured(x, x * 0.9)
    assert f'{channels}' in one_line(error)


def test_luma_of_two_channels():
    no_crash(2, luma_psnr)


def test_luma_of_four_channels():
    no_crash(4, luma_psnr)


@pytest.mark.parametrize('channels', [2, 4])
def test_features_of_other_channels(channels):
    no_crash(channels, distance)


def test_lpips_needs_color():
    with pytest.raises(EnhanceError, match='color') as error:
        lpips(noise(40, 40, 'L'), noise(40, 40, 'L'))
    assert '(1, 40, 40)' in one_line(error)
    with pytest.raises(EnhanceError, match="'resnet'.*'squeeze', 'alex' or 'vgg'"):
        lpips(noise(40, 40), noise(40, 40), 'resnet')


# Identical pictures


@pytest.mark.parametrize('x', [noise(40, 36), noise(40, 36, 'L'), flat(0, (40, 40)), None])
def test_identical_pictures_are_perfect_and_raise_no_warning(x):
    a, b = (batch(3, 3, 40, 36),) * 2 if x is None else (x, x.copy())
    perfect = {mse: 0.0, psnr: np.inf, ssim: 1.0, luma_psnr: np.inf, distance: 0.0}
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for measured, value in perfect.items():
            found = measured(a, b)
            if x is None:
                assert found.tolist() == [pytest.approx(value, abs=1e-6)] * 3
            else:
                assert found == pytest.approx(value, abs=1e-6)
        assert mean_luma_psnr(lambda p: p, [(a, b)]) == np.inf


# The feature network

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def by_hand(a, b, weights):
    "The distance between two pictures (3, H, W) for `tiny_net(*weights)`, in plain NumPy."
    a, b = ((x.transpose(1, 2, 0).astype(float) - MEAN) / STD for x in (a, b))
    found = []
    for w in weights:
        a, b = a @ np.array(w).T, b @ np.array(w).T
        p, t = (x / np.linalg.norm(x, axis=2, keepdims=True) for x in (a, b))
        found.append(((p - t) ** 2).sum(2).mean())
    return np.mean(found)


@pytest.mark.parametrize(
    'weights',
    [
        [COLORS],
        [[[0.5, -1.0, 2.0], [1.5, 0.25, -0.5]]],
        [[[0.5, -1.0, 2.0], [1.5, 0.25, -0.5]], [[1.0, 2.0], [-3.0, 0.5], [0.0, 1.0]]],
    ],
    ids=['colors', 'one layer', 'two layers'],
)
def test_feature_distance_by_hand(weights):
    a, b = batch(3, 3, 33, 40), batch(3, 3, 33, 40, seed=1)
    b[2, :, :, :20] = a[2, :, :, :20]  # half of the third is the same
    ours = feature_distance(a, b, tiny_net(*weights))
    expected = [by_hand(p, t, weights) for p, t in zip(a.numpy(), b.numpy())]
    assert ours.shape == (3,) and ours[2] < 0.7 * ours[1]
    np.testing.assert_allclose(ours, expected, rtol=1e-3)
    photo = feature_distance(to_photo(a[0]), to_photo(b[0]), tiny_net(*weights))
    assert type(photo) is float and photo == pytest.approx(expected[0], rel=0.02)


def test_features_at_right_angles_are_2_apart():
    "Red by the one, green by the other: |(1, 0) - (0, 1)|² = 2; and length does not count."
    colors = torch.tensor(MEAN, dtype=torch.float32).view(1, 3, 1, 1).repeat(3, 1, 32, 32)
    colors[0, 0] += 0.1
    colors[1, 1] += 0.1
    colors[2, 0] += 0.3
    values = feature_distance(colors[[0, 0]], colors[[1, 2]], tiny_net(COLORS))
    assert values.tolist() == [pytest.approx(2, abs=1e-3), pytest.approx(0, abs=1e-3)]


def test_gray_is_color_with_three_channels_alike():
    a, b = batch(2, 1, 32, 32), batch(2, 1, 32, 32, seed=1)
    net = feature_net('random')
    gray = feature_distance(a, b, net)
    torch.testing.assert_close(
        gray, feature_distance(*(x.expand(-1, 3, -1, -1) for x in (a, b)), net)
    )
    assert gray.min() > 1e-4
    photos = noise(32, 32, 'L'), noise(32, 32, 'L', seed=1)
    assert distance(*photos) == pytest.approx(distance(*(p.convert('RGB') for p in photos)))


def test_the_network_is_frozen():
    net = feature_net('random')
    around = nn.Sequential(nn.Conv2d(3, 3, 1), net)
    assert list(net.parameters()) and not any(p.requires_grad for p in net.parameters())
    for call in (net.train, net.eval, around.train, lambda: net.train(True)):
        call()
        assert not any(m.training for m in net.modules())
    assert around.train().training and around[0].training  # the rest of the model does train
    dropped = FeatureNet(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Dropout(0.9)), (1,)).train()
    x = batch(1, 3, 4, 4)
    assert torch.equal(dropped(x)[0], dropped(x)[0])


def test_gradients_pass_through_the_network_to_the_picture():
    net = feature_net('random')
    before = [p.clone() for p in net.parameters()]
    x = batch(1, 3, 40, 40).requires_grad_()
    features = net(x)
    assert len(features) == 7 and [f.shape[1] for f in features] == [
        64,
        128,
        256,
        384,
        384,
        512,
        512,
    ]
    sum(f.square().mean() for f in features).backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() > 0
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(p, q) for p, q in zip(before, net.parameters()))


def test_taps_are_where_they_should_be():
    "After which layer, and the layers behind the last are left out."
    layers = nn.Sequential(*(nn.Conv2d(3, c, 1) for c in (3, 3, 3)), nn.Conv2d(3, 5, 1))
    net = FeatureNet(layers, (0, 2))
    x = batch(2, 3, 4, 5)
    first, third = net(x)
    assert len(net.layers) == 3
    normal = (x - torch.tensor(MEAN).view(3, 1, 1).float()) / torch.tensor(STD).view(
        3, 1, 1
    ).float()
    torch.testing.assert_close(first, layers[0](normal))
    torch.testing.assert_close(third, layers[:3](normal))


def features(net):
    return net(batch(1, 3, 48, 48))


def same_features(a, b):
    return all(torch.equal(x, y) for x, y in zip(features(a), features(b), strict=True))


def test_random_weights_are_always_the_same_and_take_no_luck_from_others():
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    a = feature_net('random')
    assert torch.equal(torch.rand(4), expected)
    forget()
    torch.manual_seed(6)
    b = feature_net('random')
    assert a is not b and same_features(a, b)
    assert feature_net('random') is b  # kept, not made again


def test_making_the_network_leaves_the_luck_of_gpus_alone(monkeypatch):
    seeds = []
    monkeypatch.setattr(torch.cuda, 'manual_seed_all', seeds.append)
    feature_net('random')
    assert seeds == []


def test_a_network_first_used_in_inference_mode_still_gives_gradients():
    with torch.inference_mode():
        feature_net('random')
    x = batch(1, 3, 40, 40).requires_grad_()
    sum(f.sum() for f in feature_net('random')(x)).backward()
    assert x.grad.abs().max() > 0


def test_measuring_while_training_raises_no_warning():
    prediction = batch(1, 3, 8, 8).requires_grad_()
    torch.set_warn_always(True)  # or else it would come only once in a process
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            assert psnr(prediction, batch(1, 3, 8, 8, seed=1))[0] > 0
    finally:
        torch.set_warn_always(False)


def test_measures_are_not_rounded_by_half_precision():
    target = batch(1, 3, 48, 48)
    prediction = target * 0.9 + 0.1 * batch(1, 3, 48, 48, seed=1)
    plain = ssim(prediction, target), distance(prediction, target)
    with torch.autocast('cpu', torch.bfloat16):
        half = ssim(prediction, target), distance(prediction, target)
    assert half[1].dtype == torch.float32
    torch.testing.assert_close(half, plain)


def test_a_file_of_weights_is_used(squeezenet, monkeypatch):
    "Against torchvision's own network with these weights, up to each tap."
    from torchvision.models import squeezenet1_1

    whole = squeezenet1_1()
    whole.load_state_dict(torch.load(squeezenet, weights_only=True))
    named = feature_net(squeezenet)
    x = batch(1, 3, 48, 48)
    normal = (x - torch.tensor(MEAN).view(3, 1, 1).float()) / torch.tensor(STD).view(
        3, 1, 1
    ).float()
    with torch.no_grad():
        for tap, found in zip((1, 4, 7, 9, 10, 11, 12), named(x), strict=True):
            torch.testing.assert_close(found, whole.eval().features[: tap + 1](normal))
    assert not same_features(named, feature_net('random'))
    monkeypatch.setenv('ENHANCE_FEATURES', str(squeezenet))
    assert feature_net() is feature_net(str(squeezenet))
    assert not same_features(feature_net('random'), named)  # what is asked for comes first


class Trap:
    "A pickle that makes a folder when it is opened carelessly."

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize('save', [torch.save, None], ids=['torch', 'pickle'])
def test_a_file_that_would_run_code_does_not(save, tmp_path):
    file, mark = tmp_path / 'weights.pth', tmp_path / 'ran'
    if save:
        save(Trap(mark), file)
    else:
        file.write_bytes(pickle.dumps(Trap(mark), protocol=2))
        pickle.loads(file.read_bytes())
        mark.rmdir()  # the trap works
    with pytest.raises(EnhanceError) as error:
        feature_net(file)
    assert not mark.exists()
    assert 'weights.pth' in one_line(error) and 'SqueezeNet' in one_line(error)


def wrong_file(kind, squeezenet):
    "The bytes of a file that is not the weights of SqueezeNet 1.1."
    if kind == 'truncated':
        return squeezenet.read_bytes()[:1_000_000]
    if kind in (plain := {'text': b'hello, this is no network\n', 'page': b'<!DOCTYPE html>'}):
        return plain[kind]
    state = torch.load(squeezenet, weights_only=True)
    file = io.BytesIO()
    torch.save(
        {
            'other keys': {'layer.weight': torch.ones(2)},
            'other sizes': {k: v[:1] for k, v in state.items()},
            'one key less': dict(list(state.items())[1:]),
            'list': [1, 2],
            'tensor': torch.ones(3),
        }[kind],
        file,
    )
    return file.getvalue()


@pytest.mark.parametrize(
    'kind', 'truncated,text,page,list,tensor,other keys,other sizes,one key less'.split(',')
)
@pytest.mark.parametrize('how', ['argument', 'environment'])
def test_a_wrong_file_of_weights(kind, how, squeezenet, tmp_path, monkeypatch):
    file = tmp_path / 'weights.pth'
    file.write_bytes(wrong_file(kind, squeezenet))
    if how == 'environment':
        monkeypatch.setenv('ENHANCE_FEATURES', str(file))
    with pytest.raises(EnhanceError) as error:
        feature_net(file if how == 'argument' else None)
    message = one_line(error)
    assert str(file) in message and 'SqueezeNet' in message and 'ENHANCE_FEATURES' in message


def test_an_empty_file_of_weights(tmp_path):
    file = tmp_path / 'weights.pth'
    file.write_bytes(b'')
    with pytest.raises(EnhanceError):
        feature_net(file)


def test_a_missing_file_of_weights(tmp_path, monkeypatch):
    monkeypatch.setenv('ENHANCE_FEATURES', str(tmp_path / 'nowhere.pth'))
    for call in (feature_net, lambda: distance_by_default(noise(32, 32))):
        with pytest.raises(EnhanceError, match='ENHANCE_FEATURES') as error:
            call()
        assert 'nowhere.pth' in one_line(error)
    with pytest.raises(EnhanceError):
        feature_net(tmp_path)  # a folder


def distance_by_default(photo):
    return feature_distance(photo, photo)


def test_only_a_smoke_run_does_without_the_network(monkeypatch, squeezenet, tmp_path, capsys):
    assert same_features(measuring_net(Budget('smoke')), feature_net('random'))
    assert 'Markdown' in capsys.readouterr().out  # it says so
    for name in ('lesson', 'full'):
        with pytest.raises(EnhanceError, match='ENHANCE_FEATURES'):
            measuring_net(Budget(name))
    monkeypatch.setenv('ENHANCE_FEATURES', str(squeezenet))
    for name in Budget.names:
        assert measuring_net(Budget(name)) is feature_net(squeezenet)
    assert 'Markdown' not in capsys.readouterr().out


# Downloads


@contextmanager
def served(data, promised=None, status=200):
    "A server on this machine that gives `data` for any name: its address, and what was asked for."
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path.strip('/'))
            self.send_response(status)
            self.send_header('Content-Length', str(promised or len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f'http://127.0.0.1:{server.server_address[1]}', asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def point_at(monkeypatch):
    "Let torchvision look for SqueezeNet elsewhere."
    from torchvision.models import SqueezeNet1_1_Weights

    def point(url):
        monkeypatch.setattr(SqueezeNet1_1_Weights.IMAGENET1K_V1.value, 'url', url)

    return point


def hashed_name(data):
    "The name that torchvision gives a file: with the first 8 digits of its SHA-256."
    return f'squeezenet1_1-{hashlib.sha256(data).hexdigest()[:8]}.pth'


def test_the_network_is_downloaded_once(squeezenet, point_at, tmp_path):
    data = squeezenet.read_bytes()
    name = hashed_name(data)
    with served(data) as (url, asked):
        point_at(f'{url}/{name}')
        first = feature_net()
        assert same_features(first, feature_net(squeezenet))
        assert feature_net() is first
        assert (tmp_path / 'torch' / 'hub' / 'checkpoints' / name).read_bytes() == data
        forget()  # as in the next session
        assert same_features(feature_net(), feature_net(squeezenet))
        assert asked == [name]
    forget()
    assert same_features(feature_net(), first)  # and without a server
    assert distance_by_default(noise(40, 40)) == 0


def test_the_file_named_in_the_environment_spares_the_download(squeezenet, point_at, monkeypatch):
    monkeypatch.setenv('ENHANCE_FEATURES', str(squeezenet))
    with served(squeezenet.read_bytes()) as (url, asked):
        point_at(f'{url}/{hashed_name(squeezenet.read_bytes())}')
        feature_net()
        assert asked == []


@pytest.mark.parametrize('fault', ['changed', 'cut', 'page', 'broken off', 'no such page', 'down'])
def test_a_download_that_fails(fault, squeezenet, point_at, tmp_path):
    data = squeezenet.read_bytes()
    name, options = hashed_name(data), {}
    if fault == 'changed':
        wrong = data[:1000] + bytes([data[1000] ^ 1]) + data[1001:]  # one bit
    elif fault == 'cut':
        wrong = data[:100_000]
    elif fault == 'broken off':
        wrong, options = data[:100_000], {'promised': len(data)}
    else:
        wrong = b'<html>Please log in to the wireless network</html>'
    if fault == 'no such page':
        options = {'status': 404}
    with served(wrong, **options) as (url, asked):
        point_at(f'{url}/{name}')
        if fault != 'down':
            with pytest.raises(EnhanceError, match='could not be downloaded') as error:
                feature_net()
            assert asked == [name]
    if fault == 'down':
        with pytest.raises(EnhanceError, match='could not be downloaded') as error:
            feature_net()
    assert 'ENHANCE_FEATURES' in one_line(error) and 'SqueezeNet' in one_line(error)
    kept = tmp_path / 'torch' / 'hub' / 'checkpoints'
    assert [p.name for p in kept.iterdir()] == []  # nothing that would be taken for good later
    with served(data) as (url, asked):  # try again when you are online
        point_at(f'{url}/{name}')
        assert feature_net() and asked == [name]


def keep(folder, data, name='squeezenet1_1-b8a52dc0.pth'):
    "Put a file where torchvision keeps what it has downloaded."
    kept = folder / 'torch' / 'hub' / 'checkpoints'
    kept.mkdir(parents=True)
    (kept / name).write_bytes(data)


def test_the_name_that_torchvision_gives_its_file(squeezenet, tmp_path):
    keep(tmp_path, squeezenet.read_bytes())
    assert same_features(feature_net(), feature_net(squeezenet))


def feature_net_by_lpips():
    lpips(noise(32, 32), noise(32, 32))


@pytest.mark.parametrize(
    'load, kind',
    [
        (feature_net, 'truncated'),
        (feature_net_by_lpips, 'truncated'),
        (feature_net_by_lpips, 'other keys'),
        (feature_net, 'page'),
        (feature_net, 'text'),
        (feature_net, 'other keys'),
        (feature_net, 'list'),
        (feature_net_by_lpips, 'page'),
        (feature_net_by_lpips, 'list'),
    ],
)
def test_a_damaged_file_in_the_store_of_torch(load, kind, squeezenet, tmp_path):
    "torch checks what it downloads, but not what it has kept: so a damaged file is found here."
    keep(tmp_path, wrong_file(kind, squeezenet))
    with pytest.raises(EnhanceError):
        load()


def test_a_file_in_the_store_that_would_run_code_does_not(tmp_path):
    file, mark = io.BytesIO(), tmp_path / 'ran'
    torch.save(Trap(mark), file)
    keep(tmp_path, file.getvalue())
    try:
        feature_net()
    except Exception:
        pass  # what is raised is the matter of another test
    assert not mark.exists()


# LPIPS


@needs(SQUEEZENET)
def test_lpips_is_that_of_torchmetrics(tmp_path):
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

    keep(tmp_path, SQUEEZENET.read_bytes())
    photo = sample_photo('cat').crop((60, 40, 188, 136))
    blurred = [photo.filter(ImageFilter.GaussianBlur(r)) for r in (0.7, 1.5, 3)]
    assert lpips(photo, photo) == pytest.approx(0, abs=1e-6)
    values = [lpips(b, photo) for b in blurred]
    assert type(values[0]) is float and 0.01 < values[0] < values[1] < values[2]
    several = lpips(torch.cat([to_tensor(b) for b in blurred]), to_tensor(photo).repeat(3, 1, 1, 1))
    assert several.shape == (3,) and several.tolist() == [
        pytest.approx(v, abs=1e-5) for v in values
    ]
    expected = [
        float(
            learned_perceptual_image_patch_similarity(
                to_tensor(b), to_tensor(photo), net_type='squeeze', normalize=True
            )
        )
        for b in blurred
    ]
    assert values == pytest.approx(expected, abs=1e-6)
    # a prediction a little out of range is cut off first: torchmetrics would refuse it
    x = to_tensor(photo)
    assert lpips(x * 1.4 - 0.2, x)[0] == pytest.approx(
        float(lpips((x * 1.4 - 0.2).clamp(0, 1), x)[0]), abs=1e-6
    )


@needs(SQUEEZENET)
def test_lpips_of_a_target_a_little_out_of_range(tmp_path):
    keep(tmp_path, SQUEEZENET.read_bytes())
    x = batch(1, 3, 40, 40)
    expected = lpips(x, (x * 1.2).clamp(0, 1))
    torch.testing.assert_close(lpips(x, x * 1.2), expected)


def test_lpips_offline():
    with pytest.raises(EnhanceError, match='could not be downloaded') as error:
        lpips(noise(40, 40), noise(40, 40))
    assert 'LPIPS' in one_line(error) and 'feature_distance' in one_line(error)


# The spectrum


def waves(fx, fy, size=256, amplitude=100):
    y, x = np.mgrid[:size, :size]
    pixels = 127.5 + amplitude * np.sin(2 * np.pi * (fx * x + fy * y))
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


@pytest.mark.parametrize('frequency', [0.05, 0.2, 0.33, 0.45])
@pytest.mark.parametrize('angle', [0, 45, 90, 120])
def test_waves_show_at_their_frequency(frequency, angle):
    fx, fy = frequency * np.cos(np.radians(angle)), frequency * np.sin(np.radians(angle))
    frequencies, decibels = radial_spectrum(waves(fx, fy))
    assert frequencies.shape == decibels.shape == (64,)
    assert abs(frequencies[decibels.argmax()] - frequency) <= 1 / 128  # the width of a ring
    elsewhere = np.abs(frequencies - frequency) > 4 / 128
    elsewhere[0] = False  # see test_the_mean_is_no_detail
    assert decibels[elsewhere].max() < decibels.max() - 30


def test_rings_cover_everything_up_to_the_finest_wave():
    for rings in (1, 10, 64):
        frequencies, _ = radial_spectrum(noise(150, 128, 'L'), rings)
        edges = np.linspace(0, 0.5, rings + 1)
        np.testing.assert_allclose(frequencies, (edges[1:] + edges[:-1]) / 2)
    # long photos too: the wave is as fine along both sides
    for size in [(300, 128), (128, 300)]:
        photo = waves(0.2, 0, 300).crop((0, 0, *size))
        frequencies, decibels = radial_spectrum(photo)
        assert abs(frequencies[decibels.argmax()] - 0.2) <= 1 / 128


@pytest.mark.parametrize('sigma', [5, 30])
def test_white_noise_has_its_variance_at_every_frequency(sigma):
    "Parseval: the mean power is the variance, of numbers in [0, 1]."
    pixels = 127.5 + np.random.default_rng(0).normal(0, sigma, (384, 512))
    photo = Image.fromarray(np.rint(pixels).clip(0, 255).astype(np.uint8))
    _, decibels = radial_spectrum(photo)
    assert np.abs(decibels[2:] - 20 * np.log10(sigma / 255)).max() < 1.5
    assert decibels[16:].mean() == pytest.approx(20 * np.log10(sigma / 255), abs=0.1)


def test_the_spectrum_of_other_modes():
    "One channel is luma as it is; of colors the luma has 219 levels between black and white."
    gray = noise(140, 130, 'L')
    _, expected = radial_spectrum(gray)
    faint = 20 * np.log10(219 / 255)
    color = gray.convert('RGB')
    for photo, change in [
        (color, faint),
        (color.convert('RGBA'), faint),
        (gray.convert('LA'), 0),
        (Image.merge('LA', (gray, Image.new('L', gray.size, 255))), 0),
    ]:
        _, decibels = radial_spectrum(photo)
        np.testing.assert_allclose(decibels, expected + change, atol=0.01)
    _, ours = radial_spectrum(noise(140, 130))
    y = rgb2ycbcr(noise(140, 130))[..., 0]
    y = Image.fromarray(np.rint(y).astype(np.uint8))
    np.testing.assert_allclose(ours, radial_spectrum(y)[1], atol=0.2)


def test_the_mean_is_no_detail():
    "A fine wave has no coarse detail, though its mean in the fading window is not its mean."
    _, decibels = radial_spectrum(waves(0.05, 0))
    assert decibels[0] < decibels.max() - 40


def test_a_flat_photo_has_no_detail():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert (radial_spectrum(flat(90, (130, 130)))[1] < -100).all()


@pytest.mark.parametrize('size', [(127, 400), (400, 127), (1, 1)])
def test_a_photo_too_small_for_the_spectrum(size):
    with pytest.raises(EnhanceError, match='64 rings need 128') as error:
        radial_spectrum(noise(*size, 'L'))
    assert f'not {min(size)}' in one_line(error)
    with pytest.raises(EnhanceError, match='70 rings need 140'):
        radial_spectrum(noise(139, 200), 70)


# Benchmarks, cards and the scoreboard


def test_bench_pairs(tmp_path):
    photos = {f'{n}_{k}.png': noise(*s, seed=i) for i, n in enumerate('ab') for k, s in SIZES}
    for name, photo in photos.items():
        photo.save(tmp_path / name)
    noise().save(tmp_path / 'other.png')
    pairs = bench_pairs(str(tmp_path))
    assert [(degraded.tobytes(), clean.tobytes()) for degraded, clean in pairs] == [
        (photos[f'{n}_LR.png'].tobytes(), photos[f'{n}_HR.png'].tobytes()) for n in 'ab'
    ]


SIZES = [('LR', (6, 4)), ('HR', (12, 8))]


def test_bench_pairs_that_are_none(tmp_path):
    with pytest.raises(EnhanceError, match='nowhere'):
        bench_pairs(tmp_path / 'nowhere')
    noise().save(tmp_path / 'a_LR.png')
    with pytest.raises(EnhanceError, match='_HR') as error:
        bench_pairs(tmp_path)
    assert str(tmp_path) in one_line(error)
    noise().save(tmp_path / 'b_HR.png')
    with pytest.raises(EnhanceError, match='b_LR.png') as error:
        bench_pairs(tmp_path)
    one_line(error)


@pytest.mark.parametrize('where', ['DIV2K_valid_HR', 'a_HR/x2'])
def test_bench_pairs_in_a_folder_of_that_name(where, tmp_path):
    folder = tmp_path / where
    folder.mkdir(parents=True)
    for kind, size in SIZES:
        noise(*size).save(folder / f'a_{kind}.png')
    assert [(degraded.size, clean.size) for degraded, clean in bench_pairs(folder)] == [
        ((6, 4), (12, 8))
    ]


@pytest.mark.filterwarnings('ignore::RuntimeWarning')
def test_the_mean_of_no_pairs():
    with pytest.raises(EnhanceError):
        mean_luma_psnr(lambda p: p, [])


def test_cards(tmp_path):
    path = tmp_path / 'x.json'
    path.write_text('{"license": "CC0", "author": "Müller"}', encoding='utf-8')
    assert read_card(path) == read_card(str(path)) == {'license': 'CC0', 'author': 'Müller'}


@pytest.mark.parametrize(
    'data, words',
    [
        (None, 'There is no card'),
        (b'', 'can not be read'),
        (b'{"a": 1', 'can not be read'),
        (b'\xff\xfe{}', 'can not be read'),
        (b'[{"task": "x2"}]', 'not a JSON object'),
        (b'null', 'not a JSON object'),
        (b'3', 'not a JSON object'),
    ],
)
def test_cards_that_are_none(data, words, tmp_path):
    path = tmp_path / 'model.json'
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(EnhanceError, match=words) as error:
        read_card(path)
    assert 'model.json' in one_line(error)
    with pytest.raises(EnhanceError, match='can not be read'):
        read_card(tmp_path)


def test_the_tasks_are_what_they_say():
    "The held-out photos, shrunk by Pillow's bicubic, or gray and through Pillow's JPEG."
    names = list(sample_photos('held-out'))
    for scale in (2, 3, 4):
        pairs = board_pairs(f'x{scale}')
        assert len(pairs) == len(names)
        for degraded, clean in pairs:
            assert clean.width % scale == 0 and clean.height % scale == 0
            small = clean.resize((clean.width // scale, clean.height // scale), Image.BICUBIC)
            assert degraded.mode == 'RGB' and degraded.tobytes() == small.tobytes()
    for (degraded, clean), photo in zip(
        board_pairs('gray-jpeg20'), sample_photos('held-out').values()
    ):
        file = io.BytesIO()
        photo.convert('L').save(file, 'JPEG', quality=20)
        assert clean.mode == degraded.mode == 'L' and degraded.size == clean.size == photo.size
        np.testing.assert_array_equal(np.asarray(degraded), np.asarray(Image.open(file)))


def test_what_is_not_enhanced_is_enlarged_by_bicubic():
    photo = noise(10, 6)
    assert identity_baseline(photo, (10, 6)) is photo
    large = identity_baseline(photo, (30, 18))
    assert large.tobytes() == photo.resize((30, 18), Image.BICUBIC).tobytes()


def test_unknown_tasks():
    for call in (lambda: board_pairs('x5'), lambda: board_row('mine', 'x5', net=net)):
        with pytest.raises(EnhanceError, match="'x5'") as error:
            call()
        assert all(task in one_line(error) for task in TASKS)


@pytest.fixture
def small_tasks(monkeypatch):
    "Tasks whose photos are two small pieces of the held-out ones."
    pieces = {
        name: photo.crop((100, 100, 170, 153))
        for name, photo in list(sample_photos('held-out').items())[:2]
    }
    monkeypatch.setattr(measure, 'sample_photos', lambda split: pieces)


@pytest.mark.parametrize('task', TASKS)
def test_the_row_of_the_input_is_worked_out_with_skimage(task, small_tasks):
    row = board_row('input', task, net=net)
    border = int(task[1:]) if task.startswith('x') else 0
    found = []
    for degraded, clean in board_pairs(task):
        large = degraded.resize(clean.size, Image.BICUBIC) if border else degraded
        color = clean.mode == 'RGB'
        a, b = (rgb2ycbcr(p)[..., 0] if color else np.asarray(p, float) for p in (large, clean))
        inner = (slice(border, -border),) * 2 if border else (slice(None),) * 2
        a, b = a[inner], b[inner]
        rgb = [np.asarray(p.convert('RGB')).transpose(2, 0, 1) / 255 for p in (large, clean)]
        found.append(
            [
                skimage_psnr(a, b, 255),
                skimage_ssim(a, b, 255, None),
                by_hand(*rgb, [COLORS]),
                clean.width * clean.height,
            ]
        )
    decibels, similarity, features, _ = np.mean(found, 0)
    assert (row['task'], row['model'], row['parameters']) == (task, 'input', 0)
    assert row['dB'] == pytest.approx(decibels, abs=0.0051)
    assert row['SSIM'] == pytest.approx(similarity, abs=0.0001)
    assert row['feature distance'] == pytest.approx(features, rel=0.01)
    assert row['s/MP'] >= 0  # the input itself takes no time, see the next test
    assert json.loads(json.dumps(row)) == row  # it can stand on a card


def test_time_is_that_of_enhancing_alone(small_tasks, monkeypatch):
    "A clock that only `enhance` moves on: 0.5 s for each photo, without the first, warming call."
    clock, calls = [0.0], []
    monkeypatch.setattr(measure.time, 'perf_counter', lambda: clock[0])

    def enhance(degraded):
        clock[0] += 0.5
        calls.append(degraded.size)
        return degraded.resize((degraded.width * 2, degraded.height * 2), Image.BICUBIC)

    row = board_row('mine', 'x2', enhance, 1234, net)
    assert len(calls) == 3 and row['parameters'] == 1234
    assert row['s/MP'] == pytest.approx(2 * 0.5 / (2 * 70 * 52 / 1e6), rel=1e-3)
    assert row['dB'] == board_row('input', 'x2', net=net)['dB']


def test_a_better_model_gets_better_figures(small_tasks):
    "One that knows the answer is perfect."
    answers = {degraded.tobytes(): clean for degraded, clean in board_pairs('x2')}
    row = board_row('oracle', 'x2', lambda degraded: answers[degraded.tobytes()], net=net)
    assert (row['dB'], row['SSIM'], row['feature distance']) == (np.inf, 1.0, 0.0)


@pytest.mark.parametrize(
    'task, enhance, words',
    [
        ('x2', lambda degraded: degraded, ['35×26', '70×52']),
        ('x2', lambda degraded: degraded.resize((71, 52)), ['71×52', '70×52']),
        ('x2', lambda degraded: degraded.resize((70, 52)).convert('L'), ['70×52 L', '70×52 RGB']),
        ('gray-jpeg20', lambda degraded: degraded.convert('RGB'), ['70×53 RGB', '70×53 L']),
        ('x2', lambda degraded: None, ['NoneType']),
        ('x2', lambda degraded: to_tensor(degraded.resize((70, 52))), ['Tensor', 'Image']),
    ],
)
def test_a_model_that_gives_something_else(task, enhance, words, small_tasks):
    with pytest.raises(EnhanceError) as error:
        board_row('mine', task, enhance, net=net)
    assert all(w in one_line(error) for w in words)


def row(task, model, dB=20.0, distance=0.5):
    return {'task': task, 'model': model, 'dB': dB, 'SSIM': 0.8, 'feature distance': distance}


@pytest.fixture
def weights(monkeypatch, tmp_path):
    "An empty folder of published weights."
    folder = tmp_path / 'weights'
    folder.mkdir()
    monkeypatch.setattr(measure, 'WEIGHTS', folder)
    return folder


def test_the_scoreboard_holds_published_rows_and_yours(weights):
    cards = {
        'a': {'scoreboard': [row('x2', 'input', 28), row('x2', 'a', 30)]},
        'b': {'scoreboard': [row('x2', 'input', 28), row('x4', 'b', 25), row('x3', 'mine', 1)]},
        'c': {'about': 'weights that are not measured'},
    }
    for name, card in cards.items():
        (weights / f'{name}.json').write_text(json.dumps(card))
    (weights / 'a.safetensors').write_bytes(b'')
    table = scoreboard(row('x2', 'mine', 29), row('x2', 'a', 31), row('x4', 'a', 24))
    assert list(zip(table['task'], table['model'], table['dB'])) == [
        ('x2', 'input', 28),
        ('x2', 'mine', 29),
        ('x2', 'a', 31),  # yours, not the published 30
        ('x3', 'mine', 1),
        ('x4', 'a', 24),
        ('x4', 'b', 25),
    ]
    assert list(table.index) == list(range(6))
    assert 'mine' not in scoreboard().query('task == "x2"')['model'].tolist()


@pytest.mark.parametrize('exists', [True, False])
def test_the_scoreboard_without_published_weights(exists, weights):
    if not exists:
        weights.rmdir()
    table = scoreboard(row('x2', 'mine', 29), row('x2', 'input', 28), row('x2', 'mine', 30))
    assert table['model'].tolist() == ['input', 'mine'] and table['dB'].tolist() == [28, 30]


def test_the_scoreboard_without_rows(weights):
    assert len(scoreboard()) == 0


@pytest.mark.parametrize('rows', [None, {'task': 'x2'}, [{'task': 'x2'}], ['x2'], 'x2'])
def test_the_scoreboard_of_a_wrong_card(rows, weights):
    (weights / 'wrong.json').write_text(json.dumps({'scoreboard': rows}))
    with pytest.raises(EnhanceError, match='wrong.json'):
        scoreboard()


def test_the_scoreboard_names_a_broken_card(weights):
    (weights / 'broken.json').write_text('{')
    with pytest.raises(EnhanceError, match='broken.json'):
        scoreboard(row('x2', 'mine'))


@pytest.fixture
def drawn(monkeypatch):
    "What `plot_scoreboard` draws: (axes, dots, rings, arrows, texts)."
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    shown = []
    monkeypatch.setattr(plt, 'show', lambda: shown.append(plt.gcf()))

    def draw(table):
        plot_scoreboard(table)
        (fig,) = shown
        (ax,) = fig.axes
        fig.canvas.draw()
        marks = {True: [], False: []}  # filled or not
        for c in ax.collections:
            marks[len(c.get_facecolor()) > 0].extend(tuple(map(float, o)) for o in c.get_offsets())
        arrows = [(t.xyann, t.xy) for t in ax.texts if getattr(t, 'arrow_patch', None)]
        names = [t.get_text() for t in ax.texts if t.get_text()]
        return ax, marks[True], marks[False], arrows, names

    yield draw
    plt.close('all')


def test_the_plane_of_one_task(drawn, weights):
    ax, dots, rings, arrows, names = drawn(
        scoreboard(row('x2', 'input', 28, 0.3), row('x2', 'a', 30, 0.2), row('x2', 'b', 29, 0.1))
    )
    assert sorted(dots) == [(29, 0.1), (30, 0.2)] and rings == [(28, 0.3)]
    assert sorted(arrows) == [((28, 0.3), (29, 0.1)), ((28, 0.3), (30, 0.2))]
    assert sorted(names) == ['a', 'b']
    assert ax.yaxis_inverted() and [t.get_text() for t in ax.get_legend().texts] == ['x2']


def test_the_plane_of_several_tasks(drawn, weights):
    n = len(TASKS)
    rows = [row(t, m, 25 + i, 0.1 * i) for t in TASKS for i, m in enumerate(['input', 'a', 'b'])]
    rows.append(row('new', 'alone', 31, 0.4))  # without an input: a dot and no arrow
    ax, dots, rings, arrows, names = drawn(scoreboard(*rows))
    assert sorted(dots) == sorted([(26, 0.1), (27, 0.2)] * n + [(31, 0.4)])
    assert rings == [(25, 0)] * n
    assert len(arrows) == 2 * n and all(start == (25, 0) for start, _ in arrows)
    assert sorted(names) == ['a'] * n + ['alone'] + ['b'] * n
    assert [t.get_text() for t in ax.get_legend().texts] == sorted([*TASKS, 'new'])


def test_no_name_of_the_plane_covers_another(drawn, weights):
    near = [row('x2', f'model {i}', 30 + 0.01 * i, 0.2) for i in range(4)]
    ax, dots, _, _, names = drawn(scoreboard(row('x2', 'input', 28, 0.3), *near))
    assert len(dots) == len(names) == 4
    boxes = [t.get_window_extent() for t in ax.texts if t.get_text()]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(ax.get_window_extent().contains(*corner) for b in boxes for corner in b.corners())


def test_the_plane_without_a_model(drawn, weights):
    _, dots, rings, _, names = drawn(scoreboard(row('x2', 'input', 28, 0.3)))
    assert (dots, rings, names) == ([], [(28, 0.3)], [])


def test_the_plane_with_a_model_that_has_no_feature_distance(drawn, weights):
    some = {'task': 'x2', 'model': 'a', 'dB': 30}
    *_, names = drawn(scoreboard(row('x2', 'input', 28, 0.3), some, row('x2', 'b', 29, 0.2)))
    assert names == ['b']
