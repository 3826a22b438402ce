"""Measures against other libraries, published figures and sums by hand; bad input."""

import warnings

import numpy as np
import pytest
import torch
from beside import SHARED, needs, yardstick
from by_hand import (
    COLORS,
    MEAN,
    batch,
    distance_by_hand,
    feature_net_of,
    flat,
    skimage_psnr,
    skimage_ssim,
)
from common import noise, one_line
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageFilter
from skimage.color import rgb2ycbcr
from skimage.metrics import mean_squared_error

from enhance_lib.measure import (
    _ssim_on_gpu,
    crop_border,
    feature_distance,
    fine_detail,
    luma,
    luma_psnr,
    mse,
    psnr,
    radial_spectrum,
    rgb_to_ycbcr,
    ssim,
    ycbcr_to_rgb,
)
from enhance_lib.toolbox.datasets import sample_photo
from enhance_lib.toolbox.errors import EnhanceError
from enhance_lib.toolbox.features import feature_net
from enhance_lib.toolbox.tensors import to_photo, to_tensor

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
    x = [to_tensor(p) for p in photos]
    for values in (ssim(*x), _ssim_on_gpu(*x)):  # another implementation, which runs here too
        assert values.shape == (1,) and values[0] == pytest.approx(expected, abs=1e-6)


def test_ssim_of_a_batch_of_plain_gray_is_one():
    "Where single precision rounds the variance away, it was .997."
    plain = torch.full((1, 1, 11, 11), 213 / 255)
    for value in (ssim(plain, plain), _ssim_on_gpu(plain, plain)):
        assert float(value) == pytest.approx(1, abs=1e-6)


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
    a, b = noise((11, 11)), noise((11, 11), seed=1)
    expected = skimage_ssim(a, b, 255, -1)
    assert ssim(a, b) == pytest.approx(expected, abs=1e-6)
    assert ssim(to_tensor(a), to_tensor(b))[0] == pytest.approx(expected, abs=1e-4)


@pytest.mark.filterwarnings('ignore:Converting a tensor')  # the matter of another test
def test_measures_leave_no_graph_and_no_change():
    "Half precision is measured in single; a prediction that is being trained stays as it is."
    target = batch(2, 3, 40, 40)
    prediction = (target * 0.9).requires_grad_()
    kept = prediction.detach().clone()
    for f in (
        mse,
        psnr,
        ssim,
        luma_psnr,
        lambda a, b: feature_distance(a, b, feature_net_of(COLORS)),
    ):
        values = f(prediction, target)
        assert not values.requires_grad and values.dtype == torch.float32
        assert torch.equal(values, f(prediction.double(), target.double()))
    assert torch.equal(prediction, kept) and prediction.grad is None
    half = psnr(prediction.half(), target.half())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, psnr(prediction, target), atol=0.01, rtol=0)


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
    a, b = noise((width, height), seed=seed), noise((width, height), seed=seed + 100)
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


@needs(SHARED / 'tools' / 'yardstick.py')
@pytest.mark.parametrize('mode', ['RGB', 'L'])
@pytest.mark.parametrize('border', [0, 1, 4])
def test_luma_psnr_is_that_of_the_yardstick(mode, border):
    clean = sample_photo('cat').convert(mode)
    degraded = clean.filter(ImageFilter.GaussianBlur(1.5))
    y = [yardstick().to_y(p) for p in (degraded, clean)]
    # one channel is taken for luma as it is, by both
    np.testing.assert_allclose(luma(to_tensor(clean))[0, 0] * 255, y[1], atol=1e-3)
    assert luma_psnr(degraded, clean, border) == pytest.approx(
        yardstick().psnr(*y, border), abs=1e-3
    )


def test_cropping_takes_the_border_and_nothing_else():
    x = torch.arange(5 * 7).view(1, 5, 7)
    assert crop_border(x, 0).shape == (1, 5, 7)
    assert crop_border(x, 2).tolist() == [[[16, 17, 18]]]
    clean = noise((12, 12))
    degraded = clean.copy()
    degraded.paste((255, 0, 9), (0, 0, 12, 2))  # spoil two rows at the top
    assert luma_psnr(degraded, clean, 1) < 40 and luma_psnr(degraded, clean, 2) == np.inf


# Bad input


net = feature_net_of(COLORS)


def distance(a, b):
    return feature_distance(a, b, net)


@pytest.mark.parametrize(
    'prediction, target, words',
    [
        (noise((40, 32)), noise((32, 40)), ['40×32 RGB', '32×40 RGB']),
        (noise((40, 40)), noise((40, 40), 'L'), ['40×40 RGB', '40×40 L']),
        (noise((40, 40)), batch(1, 3, 40, 40), ['Image', 'Tensor']),
        (batch(1, 3, 40, 40), noise((40, 40)), ['Tensor', 'Image']),
        (np.zeros((40, 40, 3)), np.zeros((40, 40, 3)), ['ndarray and ndarray']),
        (noise((40, 40)), np.asarray(noise((40, 40))), ['Image', 'ndarray']),
        (batch(3, 40, 40), batch(3, 40, 40), ['(3, 40, 40)', '(N, C, H, W)']),
        (batch(1, 3, 40, 40), batch(1, 3, 40, 41), ['(1, 3, 40, 40)', '(1, 3, 40, 41)']),
        (batch(1, 1, 40, 40), batch(1, 3, 40, 40), ['(1, 1, 40, 40)', '(1, 3, 40, 40)']),
        (batch(1, 3, 40, 40), batch(2, 3, 40, 40), ['(1, 3, 40, 40)', '(2, 3, 40, 40)']),
        (batch(0, 3, 40, 40), batch(0, 3, 40, 40), ['(0, 3, 40, 40)', 'no pixels']),
        (batch(1, 3, 0, 40), batch(1, 3, 0, 40), ['(1, 3, 0, 40)', 'no pixels']),
        (noise((40, 40)).convert('RGBA'), noise((40, 40)).convert('RGBA'), ['RGBA', 'L or RGB']),
        (noise((40, 40)).convert('P'), noise((40, 40)).convert('P'), ['mode P', 'L or RGB']),
        (None, noise((40, 40)), ['NoneType']),
        ('a.png', 'b.png', ['str and str']),
    ],
)
def test_two_that_do_not_fit_together(prediction, target, words):
    with pytest.raises(EnhanceError) as error:
        mse(prediction, target)
    message = one_line(error)
    assert all(w in message for w in words), message


def spoiled(value):
    x = batch(1, 3, 40, 40)
    x[0, 1, 2, 3] = value
    return x


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
def test_numbers_that_are_no_picture(which, wrong, words):
    given = {'prediction': batch(1, 3, 40, 40), 'target': batch(1, 3, 40, 40)} | {which: wrong}
    with pytest.raises(EnhanceError) as error:
        mse(**given)
    message = one_line(error)
    assert which in message and all(w in message for w in words), message


@pytest.mark.parametrize(
    'measured', [mse, psnr, ssim, luma_psnr, distance], ids=lambda f: f.__name__
)
def test_every_measure_checks_what_it_gets(measured):
    x, photo = batch(1, 3, 40, 40), noise((40, 32))
    for pair in [(x * 255, x), (x, spoiled(torch.nan)), (x, x[..., :9]), (photo, x)]:
        with pytest.raises(EnhanceError):
            measured(*pair)
    with pytest.raises(EnhanceError, match='differ'):
        measured(photo, photo.convert('L'))
    for channels in (2, 4):
        x = batch(1, channels, 40, 40)
        with pytest.raises(EnhanceError, match=str(channels)):
            measured(x, x * 0.9)


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
    ],
)
def test_pictures_too_small(measured, size, words):
    for a, b in [(noise(size), noise(size)), (to_tensor(noise(size)),) * 2]:
        with pytest.raises(EnhanceError) as error:
            measured(a, b)
        assert all(w in one_line(error) for w in words)


@pytest.mark.parametrize('border', [-1, 7, 8, 1000])
def test_cropping_too_much(border):
    for a in (noise((20, 14)), batch(2, 3, 14, 20)):
        with pytest.raises(EnhanceError) as error:
            luma_psnr(a, a, border)
        assert f'{border} pixels' in one_line(error) and '20×14' in one_line(error)


def test_an_empty_photo():
    with pytest.raises(EnhanceError):
        psnr(Image.new('RGB', (0, 5)), Image.new('RGB', (0, 5)))


# Identical pictures


@pytest.mark.parametrize('x', [noise((40, 36)), noise((40, 36), 'L'), flat(0, (40, 40)), None])
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


# What a network sees


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
    ours = feature_distance(a, b, feature_net_of(*weights))
    expected = [distance_by_hand(p, t, weights) for p, t in zip(a.numpy(), b.numpy())]
    assert ours.shape == (3,) and ours[2] < 0.7 * ours[1]
    np.testing.assert_allclose(ours, expected, rtol=1e-3)
    photo = feature_distance(to_photo(a[0]), to_photo(b[0]), feature_net_of(*weights))
    assert type(photo) is float and photo == pytest.approx(expected[0], rel=0.02)


def test_features_at_right_angles_are_2_apart():
    "Red by the one, green by the other: |(1, 0) - (0, 1)|² = 2; and length does not count."
    colors = torch.tensor(MEAN, dtype=torch.float32).view(1, 3, 1, 1).repeat(3, 1, 32, 32)
    colors[0, 0] += 0.1
    colors[1, 1] += 0.1
    colors[2, 0] += 0.3
    values = feature_distance(colors[[0, 0]], colors[[1, 2]], feature_net_of(COLORS))
    assert values.tolist() == [pytest.approx(2, abs=1e-3), pytest.approx(0, abs=1e-3)]


def test_gray_is_color_with_three_channels_alike():
    a, b = batch(2, 1, 32, 32), batch(2, 1, 32, 32, seed=1)
    net = feature_net('random')
    gray = feature_distance(a, b, net)
    torch.testing.assert_close(
        gray, feature_distance(*(x.expand(-1, 3, -1, -1) for x in (a, b)), net)
    )
    assert gray.min() > 1e-4
    photos = noise((32, 32), 'L'), noise((32, 32), 'L', seed=1)
    assert distance(*photos) == pytest.approx(distance(*(p.convert('RGB') for p in photos)))


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
        frequencies, _ = radial_spectrum(noise((150, 128), 'L'), rings)
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
    gray = noise((140, 130), 'L')
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
    _, ours = radial_spectrum(noise((140, 130)))
    y = rgb2ycbcr(noise((140, 130)))[..., 0]
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
        radial_spectrum(noise(size, 'L'))
    assert f'not {min(size)}' in one_line(error)
    with pytest.raises(EnhanceError, match='70 rings need 140'):
        radial_spectrum(noise((139, 200)), 70)


# Fine detail


def test_fine_detail_by_hand():
    "Half the contrast is a quarter of the power; noise adds, and a soft photo lacks."
    photo = noise((150, 130))
    half = photo.point(lambda v: 64 + v // 2)
    assert fine_detail(photo, photo) == 0
    assert fine_detail(half, photo) == pytest.approx(-20 * np.log10(2), abs=0.1)
    cat = sample_photo('cat')
    assert fine_detail(cat.filter(ImageFilter.GaussianBlur(1)), cat) < -10
    dirt = np.random.default_rng(0).integers(-20, 21, (cat.height, cat.width, 3))
    dirty = Image.fromarray((np.asarray(cat) + dirt).clip(0, 255).astype(np.uint8))
    assert fine_detail(dirty, cat) > 2


def test_fine_detail_of_photos_that_are_small_or_differ():
    assert fine_detail(noise((32, 33)), noise((32, 33))) == 0
    with pytest.raises(EnhanceError, match='need 32 pixels per side, not 31'):
        fine_detail(noise((31, 40)), noise((31, 40)))
    with pytest.raises(EnhanceError, match='differ'):
        fine_detail(noise((40, 40)), noise((41, 40)))
