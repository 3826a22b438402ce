"""Photos to tensors, and two batches that have to fit together before anything is measured."""

import numpy as np
import pytest
import torch
from common import noise, refused
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from enhance_lib.toolbox.tensors import (
    as_batches,
    check_batches,
    check_prediction,
    per_picture,
    to_photo,
    to_tensor,
)

X = to_tensor(noise())


@pytest.mark.parametrize('mode', ['1', 'LA', 'RGBA', 'P', 'CMYK', 'I;16'])
def test_other_modes_become_no_tensor(mode):
    with refused(mode, 'use L or RGB'):
        to_tensor(Image.new(mode, (3, 2)))


def test_gray_and_colors_come_back():
    for mode in ('L', 'RGB'):
        photo = noise(mode=mode)
        assert to_photo(to_tensor(photo)).tobytes() == photo.tobytes()


def test_photos_and_batches_are_measured_as_batches():
    for pair in ((noise(), noise(seed=1)), (X, to_tensor(noise(seed=1)))):
        a, b = as_batches(*pair)
        assert torch.equal(a, X) and b.shape == (1, 3, 14, 20) and b.dtype == torch.float32
    a, _ = as_batches(X.half().requires_grad_(), X)
    assert a.dtype == torch.float32 and not a.requires_grad
    values = torch.tensor([3.0, 4.0])
    assert per_picture(values, noise()) == 3.0 and per_picture(values, X) is values


@pytest.mark.parametrize(
    'prediction, target, words',
    [
        (noise(), noise((20, 15)), ['20×14 RGB', '20×15 RGB']),
        (noise(), noise(mode='L'), ['20×14 RGB', '20×14 L']),
        (noise(), X, ['Image and Tensor']),
        (X, X.numpy(), ['Tensor and ndarray']),
        (X, X[:, :1], ['(1, 3, 14, 20)', '(1, 1, 14, 20)']),
        (X[0], X[0], ['(3, 14, 20)']),
        (X[:, :2], X[:, :2], ['C being 1 or 3']),
        (X[..., :0], X[..., :0], ['no pixels']),
        (X, (255 * X).byte(), ['target', 'uint8']),
        (255 * X, X, ['prediction', '[0, 255]']),
        (X, 2 * X - 1, ['target', '[-1, 1]']),
        (X * torch.nan, X, ['prediction', '840 NaN']),
    ],
)
def test_what_cannot_be_compared_is_refused(prediction, target, words):
    with refused(*words):
        as_batches(prediction, target)


def test_a_prediction_may_be_far_off_but_not_of_another_unit():
    check_prediction(X * 15 - 7, X)
    check_prediction(X * torch.nan, X)
    with refused('[0, 255]'):
        check_prediction(X * 255, X)
    for target in (X * 255, X * torch.nan):
        with refused('target'):
            check_prediction(X, target)
        with refused('target'):
            check_batches(X, target)


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


@pytest.mark.parametrize('shape', [(2, 3, 5, 5), (5, 5), (2, 5, 5)])
def test_what_is_not_one_photo_becomes_none(shape):
    with refused(str(shape)):
        to_photo(torch.rand(shape))
    with refused('25 NaN or infinite of 25'):
        to_photo(torch.full((1, 5, 5), torch.nan))
