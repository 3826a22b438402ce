"""Feature loss and Gram matrices against sums by hand; presets; batches that don't fit."""

import numpy as np
import pytest
import torch
from by_hand import batch
from fastai.metrics import LossMetrics
from torch import nn

from enhance_lib.applications.image2 import PerceptualLossVGG16
from enhance_lib.crappify import RECIPES
from enhance_lib.feature_loss import PRESETS, FeatureLoss, feature_loss, gram_matrix
from enhance_lib.jpeg_restorer import ImageRestorer
from enhance_lib.measure import feature_distance
from enhance_lib.toolbox.datasets import sample_photos
from enhance_lib.toolbox.errors import EnhanceError
from enhance_lib.toolbox.features import FeatureNet, feature_extractor, measuring_net
from enhance_lib.toolbox.pairs import recipe_dls
from enhance_lib.toolbox.show import Budget
from enhance_lib.toolbox.training import psnr_learner


def known_net(*kernels):
    "A network of 1×1 convolutions, one after another, whose weights are `kernels`; no norm."
    layers = []
    for kernel in kernels:
        kernel = torch.tensor(kernel)
        layer = nn.Conv2d(kernel.shape[1], len(kernel), 1, bias=False)
        layer.weight.data = kernel[:, :, None, None]
        layers.append(layer)
    net = FeatureNet(nn.Sequential(*layers), tuple(range(len(layers))))
    net.mean.zero_()
    net.std.fill_(1)
    return net


@pytest.fixture
def two_layers():
    "f1 = 2·red, f2 = 2·green; then g = f1 − f2."
    return known_net([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]], [[1.0, -1.0]])


def color(red, green, blue=0.0, size=2):
    "A picture of one color."
    return torch.tensor([red, green, blue]).view(1, 3, 1, 1).expand(1, 3, size, size).clone()


def test_the_loss_by_hand(two_layers):
    """From black to (.5, .25, 0). Pixels: .75/3 = .25. First layer: 0 against 1 and .5: mean .75.
    Its Gram matrix, each product summed over 4 places and divided by 2·4: (1, .5, .5, .25)/2, mean
    .28125. Second: .5, and its Gram matrix .25·4/4 = .25."""
    loss = FeatureLoss(two_layers, features=(10.0, 100.0), gram=(32.0, 1000.0), pixel=4.0)
    total = float(loss(color(0.0, 0.0), color(0.5, 0.25)))
    assert total == pytest.approx(4 * 0.25 + 10 * 0.75 + 100 * 0.5 + 32 * 0.28125 + 1000 * 0.25)
    assert {name: float(term) for name, term in loss.terms.items()} == pytest.approx(
        {'pixel': 1.0, 'features_0': 7.5, 'features_1': 50.0, 'gram_0': 9.0, 'gram_1': 250.0}
    )
    assert float(loss.gram_0) == pytest.approx(9.0)


def test_what_weighs_nothing_is_left_out(two_layers):
    loss = FeatureLoss(two_layers, features=(0.0, 1.0), gram=(), pixel=0.0)
    assert float(loss(color(0.0, 0.0), color(0.5, 0.25))) == pytest.approx(0.5)
    assert set(loss.terms) == {'features_1'}
    with pytest.raises(AttributeError, match='gram_0'):
        loss.gram_0  # noqa: B018


def test_features_are_divided(two_layers):
    loss = FeatureLoss(two_layers, features=(0.0, 1.0), gram=(0.0, 1.0), pixel=0.0, divide=5.0)
    total = float(loss(color(0.0, 0.0), color(0.5, 0.25)))
    assert total == pytest.approx(0.5 / 5 + 0.25 / 25)


def test_features_of_unit_length(two_layers):
    "Nothing against (1, .5) made one long: 1; a photo half as bright has the same features then."
    loss = FeatureLoss(two_layers, features=(1.0,), gram=(), pixel=0.0, unit=True)
    assert float(loss(color(0.0, 0.0), color(0.5, 0.25))) == pytest.approx(1)
    assert float(loss(color(0.25, 0.125), color(0.5, 0.25))) == pytest.approx(0, abs=1e-6)


def test_features_of_unit_length_are_the_feature_distance():
    torch.manual_seed(0)
    net, (a, b) = measuring_net(Budget('smoke')), torch.rand(2, 2, 3, 64, 64)
    n = len(net.taps)
    options = {'pixel': 0.0, 'features': n * (1 / n,), 'gram': (), 'unit': True, 'half': False}
    told = float(FeatureLoss(net, **options)(a, b))
    assert told == pytest.approx(float(feature_distance(a, b, net).mean()), rel=1e-4)


def test_photos_are_resized_for_the_network():
    seen = []
    net = known_net([[1.0, 0.0, 0.0]])
    net.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    loss = FeatureLoss(net, features=(1.0,), gram=(), pixel=0.0, size=8, half=False)
    x = batch(1, 3, 32, 16)
    loss(x, x)
    assert [tuple(s.shape) for s in seen] == [(1, 3, 8, 8)] * 2
    wide = x[..., ::2].repeat_interleave(2, 3)  # the mean of 4×2 equal pairs is each 8×8's pixel
    loss(wide, wide)
    assert seen[-1].mean() == pytest.approx(float(wide.mean()), abs=0.01)


@pytest.mark.parametrize('half', [True, False])
def test_the_same_picture_costs_nothing(half):
    loss = FeatureLoss(feature_extractor(weights='random'), half=half)
    x = batch(2, 3, 64, 48)
    assert float(loss(x, x.clone())) == 0
    assert float(loss(x, batch(2, 3, 64, 48, seed=1))) > 0
    assert set(loss.terms) == {
        'pixel',
        *(f'{k}_{i}' for k in ('features', 'gram') for i in range(4)),
    }


def test_gradients_reach_the_prediction_and_nothing_else():
    loss = FeatureLoss(feature_extractor(weights='random'))
    before = {k: v.clone() for k, v in loss.state_dict().items()}
    prediction = batch(1, 3, 64, 64).requires_grad_()
    target = batch(1, 3, 64, 64, seed=1).requires_grad_()
    loss(prediction, target).backward()
    assert prediction.grad.abs().min() >= 0 and prediction.grad.abs().mean() > 0
    assert all(p.grad is None and not p.requires_grad for p in loss.parameters())
    assert all(torch.equal(v, before[k]) for k, v in loss.state_dict().items())


def test_each_term_pulls():
    "No term is cut off from the prediction."
    net = feature_extractor(weights='random')
    kinds = [{'pixel': 1.0, 'features': (), 'gram': ()}]
    for i in range(4):
        alone = (*i * [0.0], 1.0)
        kinds += [{'pixel': 0.0, 'features': alone, 'gram': ()}]
        kinds += [{'pixel': 0.0, 'features': (), 'gram': alone}]
    for kind in kinds:
        prediction = batch(1, 3, 64, 64).requires_grad_()
        FeatureLoss(net, **kind)(prediction, batch(1, 3, 64, 64, seed=1)).backward()
        assert float(prediction.grad.abs().max()) > 0, kind


def test_the_network_stays_in_eval():
    "Batch norm and dropout would give other features each time."
    loss = feature_loss('vgg16_bn', 'random').train()
    assert not any(m.training for m in loss.net.modules())
    x = batch(1, 3, 64, 64)
    assert float(loss(x, x)) == 0


def test_the_gradient_by_finite_differences(two_layers):
    "autograd against the slope itself, in float64."
    loss = FeatureLoss(two_layers.double(), features=(1.0, 2.0), gram=(), half=False)
    x, y = batch(1, 3, 4, 4).double(), batch(1, 3, 4, 4, seed=1).double()
    x.requires_grad_()
    loss(x, y).backward()
    step = torch.zeros_like(x)
    step[0, 1, 2, 3] = 1e-3
    with torch.no_grad():
        slope = (loss(x + step, y) - loss(x - step, y)) / 2e-3
    assert float(slope) == pytest.approx(float(x.grad[0, 1, 2, 3]), rel=1e-2)


# Gram matrices


def test_the_gram_matrix_against_numpy():
    features = batch(2, 5, 4, 3)
    told = gram_matrix(features)
    for one, x in zip(told, features.numpy(), strict=True):
        wanted = np.tensordot(x, x, axes=([1, 2], [1, 2])) / x.size
        np.testing.assert_allclose(one, wanted, rtol=1e-5)


def test_the_gram_matrix_knows_no_place():
    features = batch(1, 5, 6, 6)
    places = torch.randperm(36, generator=torch.Generator().manual_seed(0))
    shuffled = features.flatten(2)[..., places].view_as(features)
    torch.testing.assert_close(gram_matrix(shuffled), gram_matrix(features))
    channels = features[:, [1, 0, 2, 3, 4]]
    assert not torch.allclose(gram_matrix(channels), gram_matrix(features), atol=1e-3)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_the_gram_matrix_of_large_features_in_half_precision(dtype):
    "300² · 64·64 is 3.7e8; float16 ends at 65504."
    features = torch.full((1, 2, 64, 64), 300.0).to(dtype)
    with torch.autocast('cpu', torch.bfloat16):
        told = gram_matrix(features)
    assert told.dtype == torch.float32
    torch.testing.assert_close(told, torch.full((1, 2, 2), float(features[0, 0, 0, 0]) ** 2 / 2))


def test_half_precision_is_near_the_whole():
    "In bfloat16 a number has three digits."
    net = feature_extractor(weights='random')
    x, y = batch(1, 3, 64, 64), batch(1, 3, 64, 64, seed=1)
    whole = FeatureLoss(net, half=False)(x, y)
    with torch.autocast('cpu', torch.bfloat16):
        around = FeatureLoss(net, half=False)(x.bfloat16(), y.bfloat16())
    torch.testing.assert_close(FeatureLoss(net)(x, y), whole, rtol=0.02, atol=0)
    torch.testing.assert_close(around, whole, rtol=0.02, atol=0)
    assert around.dtype == torch.float32


# Presets


def test_layers_of_content_are_convolutions():
    "conv2_2, conv3_4 and conv5_4 are features[7], [16] and [34] of VGG-19."
    loss = feature_loss('content', 'random')
    assert loss.net.taps == (7, 16, 34)
    assert all(isinstance(loss.net.layers[i], nn.Conv2d) for i in loss.net.taps)
    assert (loss.size, loss.divide) == (224, 12.75)
    assert [loss.net.layers[i].out_channels for i in loss.net.taps] == [128, 256, 512]


def test_the_loss_of_fastais_course():
    "Weights 5, 15, 2, and their squares times 5000; the last layers before three poolings."
    loss = PerceptualLossVGG16('random')
    assert loss.net.taps == (22, 32, 42)
    assert all(isinstance(loss.net.layers[i], nn.ReLU) for i in loss.net.taps)
    assert loss.weights == {
        **{'pixel': 1.0, 'features_0': 5, 'features_1': 15, 'features_2': 2},
        **{'gram_0': 125_000, 'gram_1': 1_125_000, 'gram_2': 20_000},
    }
    assert feature_loss('vgg16', 'random').weights == loss.weights


@pytest.mark.parametrize('preset', PRESETS)
def test_every_preset_gives_a_number_that_pulls(preset):
    loss = feature_loss(preset, 'random')
    prediction = batch(1, 3, 64, 64).requires_grad_()
    value = loss(prediction, batch(1, 3, 64, 64, seed=1))
    value.backward()
    assert value.dim() == 0 and value.isfinite() and prediction.grad.isfinite().all()
    assert float(prediction.grad.abs().max()) > 0


def test_without_weights_the_loss_says_where_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setenv('ENHANCE_FEATURES', str(tmp_path / 'nowhere.pth'))
    with pytest.raises(EnhanceError, match='nowhere.pth.*ENHANCE_FEATURES'):
        FeatureLoss()


def test_an_unknown_preset_suggests_another():
    with pytest.raises(EnhanceError, match="'squeezenett'.*squeezenet"):
        feature_loss('squeezenett')


# Input


@pytest.mark.parametrize(
    'prediction, target, words',
    [
        (batch(2, 3, 64, 64) * 255, batch(2, 3, 64, 64), r'\[0, 255\]'),
        (batch(2, 3, 64, 64), batch(2, 3, 64, 64) * 255, r'\[0, 255\]'),
        (batch(2, 3, 64, 64), batch(2, 3, 64, 64) * 2 - 1, r'\[-1, 1\]'),
        (batch(2, 3, 64, 32), batch(2, 3, 64, 64), '64, 32'),
        (batch(1, 3, 64, 64), batch(2, 3, 64, 64), 'one shape'),
        (batch(3, 64, 64), batch(3, 64, 64), 'N, C, H, W'),
        (batch(2, 2, 64, 64), batch(2, 2, 64, 64), 'C being 1 or 3'),
        (batch(0, 3, 64, 64), batch(0, 3, 64, 64), 'no pixels'),
        (batch(2, 3, 64, 64), (batch(2, 3, 64, 64) * 255).byte(), 'whole numbers'),
        (batch(2, 3, 64, 64), batch(2, 3, 64, 64) / 0, 'NaN or infinite'),
        (batch(2, 3, 8, 8), batch(2, 3, 8, 8), '8×8 pixels are too few'),
    ],
)
def test_batches_that_cannot_be_compared(prediction, target, words):
    loss = FeatureLoss(feature_extractor(weights='random'))
    with pytest.raises(EnhanceError, match=words):
        loss(prediction, target)


@pytest.mark.parametrize('kind', ['features', 'gram'])
def test_more_weights_than_layers(kind, two_layers):
    weights = {'features': (), 'gram': (), kind: (0.0, 1.0, 1.0)}
    loss = FeatureLoss(two_layers, **weights)
    with pytest.raises(EnhanceError, match=f'gives 2 layers.*{kind}_2'):
        loss(color(0.0, 0.0), color(0.5, 0.25))


def test_a_network_that_begins_may_be_far_off():
    loss = FeatureLoss(feature_extractor(weights='random'))
    clean = batch(1, 3, 64, 64)
    assert float(loss(clean * 8 - 3, clean)) > 0
    assert loss(clean * torch.nan, clean).isnan()  # as a scaler of gradients expects it


def test_gray_photos():
    loss = FeatureLoss(feature_extractor(weights='random'))
    x, y = batch(1, 1, 64, 64), batch(1, 1, 64, 64, seed=1)
    three = loss(x.expand(1, 3, 64, 64), y.expand(1, 3, 64, 64))
    torch.testing.assert_close(loss(x, y), three, rtol=0.01, atol=0)


def test_a_learner_shows_the_terms():
    "fastai finds them as attributes of the loss; they are means over the validation set."
    photos = [*sample_photos('train').values()][:2]
    dls = recipe_dls(photos, photos, RECIPES['image2'], size=64, bs=2, augment=False)
    loss = FeatureLoss(feature_extractor(weights='random'), half=False)
    learn = psnr_learner(dls, ImageRestorer(), loss, half=False)
    learn.metrics = LossMetrics(['pixel', 'features_1', 'gram_3'])
    learn.fit(1, 1e-4)
    degraded, clean = dls.valid.one_batch()
    with torch.no_grad():
        loss(learn.model.eval()(degraded), clean)
    told = learn.recorder.values[-1][2:]
    wanted = [float(loss.terms[name]) for name in ('pixel', 'features_1', 'gram_3')]
    assert [float(v) for v in told] == pytest.approx(wanted, rel=1e-3)
