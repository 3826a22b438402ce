"""Super-resolution in real time: the network, the relativistic critic, and what is refused."""

import copy
import math

import numpy as np
import pytest
import torch
from beside import SHARED, needs, yardstick
from common import one_line, pieces
from fastai.callback.core import Callback
from fastai.torch_core import set_seed
from PIL import Image
from torch import nn
from torch.nn import functional as F

import enhance_lib.realtime as module
from enhance_lib import feature_loss
from enhance_lib.applications.scoreboard import bench_pairs
from enhance_lib.feature_loss import FeatureLoss
from enhance_lib.gan import fit_gan
from enhance_lib.measure import feature_distance
from enhance_lib.realtime import (
    DOWNSCALING,
    RRDB,
    DenseBlock,
    DenseCritic,
    RealtimeSR,
    compare_downscaling,
    downscaling_recipe,
    generator_content,
    interpolate,
    output_speed,
    realtime_gan,
    relativistic_loss,
)
from enhance_lib.toolbox.datasets import sample_photo
from enhance_lib.toolbox.errors import EnhanceError
from enhance_lib.toolbox.features import FeatureNet, feature_net
from enhance_lib.toolbox.models import WEIGHTS, load_model, published, read_card, save_weights
from enhance_lib.toolbox.pairs import recipe_dls
from enhance_lib.toolbox.tensors import to_tensor

NAMES = [name for name in published() if name.startswith('realtime')]
SET5 = SHARED / 'data' / 'bench' / 'Set5'
has_set5 = needs(SET5)


class Seen(FeatureNet):
    "Features of one convolution with fixed weights."

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()), (1,))


def small_dls(scale=4, n=4, size=64, bs=2):
    return recipe_dls(pieces(n), pieces(2, seed=1), downscaling_recipe('any', scale), size, bs)


def stirred(model, seed=0):
    "The same network with other weights and statistics everywhere, as if it had been trained."
    torch.manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.05)
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(), layer.running_var.uniform_(0.5, 2)
            nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    return model


# The network


def test_a_dense_block_by_hand():
    "With 1×1 pictures only the middle of each kernel counts, so it can be written as matrices."
    torch.manual_seed(0)
    block = DenseBlock(channels=4, growth=2)
    nn.init.constant_(block.skip, 0.5)
    x = torch.randn(1, 4, 1, 1)
    w1, w2, w3 = (c[0].weight[:, :, 1, 1] for c in (block.conv1, block.conv2, block.conv3))
    b1, b2, b3 = (c[0].bias for c in (block.conv1, block.conv2, block.conv3))
    v = x[0, :, 0, 0]

    def prelu(z):
        return torch.where(z > 0, z, 0.25 * z)  # 0.25 is how PyTorch begins

    a = prelu(w1 @ v + b1)
    b = prelu(w2 @ torch.cat([v, a]) + b2)
    wanted = v + 0.5 * (w3 @ torch.cat([a, b]) + b3)  # the third does not see x itself
    torch.testing.assert_close(block(x)[0, :, 0, 0], wanted)


def test_the_skip_of_an_rrdb_goes_around_all():
    "Where it is 0, nothing is added; it is learned, and so are those inside."
    rrdb = RRDB()
    x = torch.rand(1, 64, 6, 6)
    nn.init.zeros_(rrdb.skip)
    assert torch.equal(rrdb(x), x)
    scales = [name for name, p in rrdb.named_parameters() if p.ndim == 0]
    assert len(scales) == 4 and 'skip' in scales


@pytest.mark.parametrize('scale', [2, 3, 4])
@pytest.mark.parametrize('options', [{}, {'wide': True}, {'norm': True}])
def test_an_untrained_network_is_bicubic(scale, options):
    "As Pillow has it, away from the border and up to rounding."
    photo = sample_photo('cat').crop((0, 0, 40, 32))
    made = RealtimeSR(scale, 1, **options).predict(photo)
    size = (40 * scale, 32 * scale)
    wanted = photo.resize(size, Image.Resampling.BICUBIC)
    assert made.size == size
    assert np.abs(np.asarray(made, int) - np.asarray(wanted, int)).max() <= 1


def values(model):
    "Numbers in a network: weights, and what batch norm has counted."
    return sum(v.numel() for v in model.state_dict().values() if v.is_floating_point())


def test_its_size():
    "By hand; the one that it is after has 1.34 million values, and none has more than 1.35."
    dense = (64 * 32 + 96 * 32 + 64 * 64) * 9 + (32 + 32 + 64) + 2 + 1
    others = 3 * 64 * 9 + 64 + 64 * 64 * 9 + 64
    last = 64 * 48 * 9 + 48
    assert values(RealtimeSR()) == 4 * (3 * dense + 1) + others + last == 1_063_320
    assert values(RealtimeSR(wide=True, norm=True)) == pytest.approx(1.34e6, abs=5e3)
    assert values(RealtimeSR(wide=True, norm=True)) <= 1.35e6


@pytest.mark.parametrize('wrong', [0, 1, 5, 2.5, True, 'x4', None])
def test_another_scale_is_refused(wrong):
    with pytest.raises(EnhanceError, match='no scale .*2, 3, 4') as error:
        RealtimeSR(wrong)
    one_line(error)


@pytest.mark.parametrize('wrong', [0, -1, 1.5])
def test_no_blocks_are_refused(wrong):
    with pytest.raises(EnhanceError, match='1 or more'):
        RealtimeSR(n_blocks=wrong)


@pytest.mark.parametrize('scale', [2, 3, 4])
@pytest.mark.parametrize('wide', [False, True])
def test_the_margin_is_how_far_the_network_sees(scale, wide):
    "No further, so that tiles give what the whole photo gives; and no nearer."
    model = stirred(RealtimeSR(scale, 1, wide=wide)).eval()
    margin = model.margin
    x = torch.rand(1, 3, 1, 2 * margin + 12).expand(-1, -1, 5, -1).clone()
    changed = x.clone()
    changed[..., margin + 6] = 1 - changed[..., margin + 6]  # one column
    with torch.no_grad():
        moved = (model.double()(x.double()) - model(changed.double())).abs().amax((0, 1, 2)) > 0
    columns = moved.nonzero()[:, 0]
    first, last = columns.min().item() // scale, columns.max().item() // scale
    assert (first, last) == (6, 2 * margin + 6)


def test_tiles_make_no_difference():
    whole = stirred(RealtimeSR(2, 1)).eval()
    model = copy.deepcopy(whole)
    model.tile = 24
    photo = sample_photo('coffee').crop((0, 0, 70, 61))
    a, b = (np.asarray(m.predict(photo, fast=False), int) for m in (model, whole))
    assert np.abs(a - b).max() <= 1


def test_speed_is_counted_in_output(monkeypatch):
    "Frames of 64×32 pixels in half a second each; what the scale does not divide is left out."
    sizes = []

    class Sized(RealtimeSR):
        def forward(self, x):
            sizes.append(tuple(x.shape))
            return super().forward(x)

    def seconds(run, device):
        run()
        return 0.5

    monkeypatch.setattr(module, '_seconds', seconds)
    found = output_speed(Sized(4, 1), 66, 34, 'cpu', repeats=1)
    assert set(sizes) == {(1, 3, 8, 16)}
    assert found == {'frames/s': 2, 'MP/s': pytest.approx(2 * 64 * 32 / 1e6)}


# Downscaled by any kernel


BY_HAND = {
    'nearest': 255,  # pixel 2 alone
    'bilinear': 127.5,  # pixels 1 and 2, half of each
    'bicubic': 0.5625 * 255,  # Keys' kernel with a = -1/2, half a pixel away
    'bilinear, antialiased': 255 / 4,  # (3.5 + 0.5) / 16 of the light
    'bicubic, antialiased': 255 / 4,  # a = -1/2: (0.964 + 0.091 - 0.048 - 0.007) / 4
}


@pytest.mark.parametrize('kernel', DOWNSCALING)
def test_kernels_by_hand(kernel):
    "Rows in which the third of each four pixels is white; looked at far from the border."
    row = np.tile(np.array([0, 0, 255, 0], np.uint8), (24, 6))
    photo = Image.fromarray(np.repeat(row[:, :, None], 3, 2))
    found = np.asarray(downscaling_recipe(kernel)(photo))
    assert found.shape == (6, 6, 3)
    assert found[2:4, 2:4].astype(float) == pytest.approx(BY_HAND[kernel], abs=1)


def test_any_kernel_is_drawn_anew():
    "Each of them comes up, and a seed gives the same again."
    photo = sample_photo('china').crop((0, 0, 64, 64))
    found = {downscaling_recipe('any')(photo, seed).tobytes() for seed in range(40)}
    wanted = {downscaling_recipe(name)(photo).tobytes() for name in DOWNSCALING}
    assert found == wanted and len(wanted) == len(DOWNSCALING)


def test_an_unknown_kernel_is_refused():
    with pytest.raises(EnhanceError, match='Did you mean nearest') as error:
        downscaling_recipe('neerest')
    one_line(error)


def test_comparing_kernels_measures_bicubic_rightly():
    "By hand: luma of BT.601 in 16 to 235, two pixels cropped; and a network that is bicubic."
    cat = sample_photo('cat')
    table = compare_downscaling({'untrained': RealtimeSR(2, 1)}, [cat], 2)
    assert list(table.index) == [*DOWNSCALING, 'mean']
    clean = cat.crop((0, 0, cat.width // 2 * 2, cat.height // 2 * 2))
    for name, (kernel, antialias) in DOWNSCALING.items():
        large = downscaling_recipe(name, 2)(cat).resize(clean.size, Image.Resampling.BICUBIC)
        a, b = (np.asarray(p, float)[2:-2, 2:-2] for p in (large, clean))
        off = (a - b) @ [65.481 / 255, 128.553 / 255, 24.966 / 255]
        expected = 10 * math.log10(255**2 / (off**2).mean())
        assert table.loc[name, 'bicubic'] == pytest.approx(expected, abs=0.01), (kernel, antialias)
    assert table['untrained'].to_numpy() == pytest.approx(table['bicubic'].to_numpy(), abs=0.05)
    assert table.loc['mean', 'bicubic'] == pytest.approx(table['bicubic'][:-1].mean())


# The adversarial training


def test_the_relativistic_loss_by_hand():
    "On 2 and 0 for photos, 1 and -1 for pictures; written with logarithms, and swapped."
    photos, pictures = torch.tensor([[2.0], [0.0]]), torch.tensor([[1.0], [-1.0]])

    def cost(z):
        return math.log(1 + math.exp(-z))  # -log σ(z)

    critic = (cost(2) + cost(0)) / 2 + (cost(0) + cost(2)) / 2
    generator = (cost(-2) + cost(0)) / 2 + (cost(0) + cost(-2)) / 2
    assert float(relativistic_loss(photos, pictures)) == pytest.approx(critic, abs=1e-6)
    assert float(relativistic_loss(pictures, photos)) == pytest.approx(generator, abs=1e-6)
    far = torch.tensor([[1e4]])
    assert float(relativistic_loss(-far, far)) == pytest.approx(4e4)  # no overflow


def test_the_critic_gives_one_number_for_any_size():
    critic = DenseCritic(8)
    for size in ((32, 32), (40, 64)):
        assert critic(torch.rand(3, 3, *size)).shape == (3, 1)
    kernels = [m for m in critic.modules() if isinstance(m, nn.Conv2d)]
    assert [k.out_channels for k in kernels] == [8, 8, 16, 16, 32, 32, 64, 64]
    assert [k.stride[0] for k in kernels] == [1, 2] * 4
    assert isinstance(critic.body[1], nn.LeakyReLU), 'no batch norm right after the picture'
    with pytest.raises(EnhanceError, match='side of a picture of 31 .*32 or more'):
        critic(torch.rand(1, 3, 32, 31))


@pytest.fixture
def content():
    "A content loss on a feature network that is there."
    return FeatureLoss(Seen(), features=(1.0,), gram=(), pixel=0.0)


def a_gan(content, **options):
    set_seed(1)
    options = {'every': 2, 'net': Seen(), 'half': False} | options
    return realtime_gan(small_dls(), RealtimeSR(4, 1), DenseCritic(4), content, **options)


def test_the_losses_by_hand(content):
    learn = a_gan(content, adversarial=0.3)
    gan, loss = learn.model, learn.loss_func
    gan.generator = stirred(gan.generator)
    small, clean = learn.dls.one_batch()
    gan.eval()
    with torch.no_grad():
        made = gan.generator(small)
        real, fake = gan.critic(clean), gan.critic(made)
        wanted = content(made, clean) + 0.3 * relativistic_loss(fake, real)
        torch.testing.assert_close(loss.generator(made, clean), wanted)
        torch.testing.assert_close(loss.critic(real, small), relativistic_loss(real, fake))


def test_they_train_in_turn(content):
    "One step each in an epoch; the other stays as it is."
    seen = []

    class Look(Callback):
        order = 90

        def before_batch(self):
            self.before = copy.deepcopy(self.learn.model.state_dict())

        def after_step(self):
            now = dict(self.learn.model.named_parameters())
            seen.append({n.split('.')[0] for n, p in now.items() if not p.equal(self.before[n])})

    learn = a_gan(content)
    with learn.no_bar(), learn.no_logging():
        learn.fit(4, 1e-3, cbs=Look())
    assert len(seen) == 8, seen
    # fastai begins an epoch with the generator, which validation needs last, but for the first
    pairs = list(zip(seen[::2], seen[1::2]))
    assert pairs[0] == ({'critic'}, {'generator'})
    assert all(a != b and len(a) == len(b) == 1 for a, b in pairs), seen


def test_it_ends_with_the_ema(content, tmp_path):
    "As any adversarial training; and what was done is not done again."
    first, again = a_gan(content), a_gan(content)
    for learn in (first, again):
        with learn.no_bar(), learn.no_logging():
            fit_gan(learn, (2,), (1e-3,), tmp_path / 'a')
    a, b = (learn.model.state_dict() for learn in (first, again))
    assert all(torch.equal(a[k], b[k]) for k in a) and len(again.gan_monitor.steps) == 4
    assert list(first.gan_monitor.scores[0]) == ['step', 'PSNR (dB)', 'SSIM', 'feature distance']
    assert first.gan_monitor.scores == again.gan_monitor.scores


def test_a_loss_of_nan_stops_the_training(content):
    learn = a_gan(lambda made, clean: (made * float('nan')).mean())
    with pytest.raises(EnhanceError, match='The loss of the generator is nan'):
        learn.fit(2, 1e-3)


@pytest.mark.parametrize('network', ['squeezenet', 'vgg19'])
def test_content_is_nothing_for_the_same_and_pixels_add(network):
    "With random weights: the shapes fit, and L1 on pixels comes on top with its weight."
    torch.manual_seed(0)
    loss = generator_content(network, weights='random')
    torch.manual_seed(0)
    with_pixels = generator_content(network, 0.5, weights='random')
    y = to_tensor(sample_photo('cat').crop((0, 0, 64, 64)))
    x = (y + 0.1).clamp(0, 1)
    assert float(loss(y, y)) == pytest.approx(0, abs=1e-6)
    added = float(with_pixels(x, y)) - float(loss(x, y))
    assert float(loss(x, y)) > 0 and added == pytest.approx(0.5 * float(F.l1_loss(x, y)), rel=0.02)


def test_a_file_of_vgg19_is_not_given_to_the_network_of_style(monkeypatch):
    "EfficientNet would load nothing of it, and say nothing."
    asked = []
    monkeypatch.setattr(feature_loss, 'feature_loss', lambda *given: asked.append(given))
    generator_content('vgg19', weights='vgg19.pth')
    assert asked == [('content', 'vgg19.pth'), ('style', None)]


def test_another_content_is_refused():
    with pytest.raises(EnhanceError, match="no content loss on 'vgg16'.*vgg19"):
        generator_content('vgg16')


# From faithful to crisp


def test_between_two_networks():
    "The ends are the two; half way is their mean; neither of them changes."
    a, b = stirred(RealtimeSR(2, 1), 1), stirred(RealtimeSR(2, 1), 2)
    before = copy.deepcopy(a.state_dict())
    for strength in (0, 0.5, 1):
        made = interpolate(a, b, strength).state_dict()
        for name, value in made.items():
            wanted = (1 - strength) * a.state_dict()[name] + strength * b.state_dict()[name]
            torch.testing.assert_close(value, wanted)
    assert all(torch.equal(before[k], v) for k, v in a.state_dict().items())


@pytest.mark.parametrize('wrong', [-0.1, 1.1, float('nan'), float('inf')])
def test_a_strength_outside_its_range_is_refused(wrong):
    a = RealtimeSR(2, 1)
    with pytest.raises(EnhanceError, match='0 to 1'):
        interpolate(a, a, wrong)


def test_nothing_is_between_different_networks():
    with pytest.raises(EnhanceError, match='different layers'):
        interpolate(RealtimeSR(2, 1), RealtimeSR(4, 1), 0.5)


# What is published


def on_card(name, where):
    "What the card of a model says about some photos."
    return read_card(WEIGHTS / f'{name}.json')['scores'][where]


@pytest.mark.parametrize('name, least', [('realtime-x4', 31.2), ('realtime-x2', 37.0)])
def test_psnr_on_set5(name, least):
    assert on_card(name, 'Set5')['output'] >= least


def test_psnr_on_bsds():
    assert on_card('realtime-x4', 'BSDS500 val')['output'] >= 26.9


def test_any_kernel_is_half_a_decibel_better_in_the_mean():
    means = [on_card(f'realtime-x4{kind}', 'Set5, any way') for kind in ('', '-any')]
    assert means[1]['output'] >= means[0]['output'] + 0.5


def test_the_gan_halves_the_feature_distance_of_bicubic():
    before, after = on_card('realtime-x4-gan', 'Set5')['feature distance']
    assert after <= before / 2


@has_set5
@pytest.mark.parametrize('name', NAMES)
def test_the_card_is_right_by_an_independent_measure(name):
    model = load_model(name)
    found, _ = yardstick().score_sr(model.predict, SHARED / 'data' / 'bench', 'Set5', model.scale)
    assert found == pytest.approx(on_card(name, 'Set5')['output'], abs=0.02)


@has_set5
def test_the_feature_distance_on_the_card_is_that_of_the_weights():
    "With the network that it is measured with, where that lies beside the project."
    features = SHARED / 'pretrained' / 'squeezenet1_1.pth'
    if not features.is_file():
        pytest.skip('SqueezeNet does not lie beside the project')
    net, model, found = feature_net(features), load_model('realtime-x4-gan'), []
    for small, clean in bench_pairs(SET5 / 'x4'):
        found.append(feature_distance(model.predict(small), clean, net))
    _, after = on_card('realtime-x4-gan', 'Set5')['feature distance']
    assert sum(found) / len(found) == pytest.approx(after, abs=0.001)


@pytest.mark.parametrize('name', NAMES)
def test_what_is_published_is_small(name):
    "At most 5.4 MB in float32, and half of that on the disk."
    assert values(load_model(name)) * 4 <= 5.4e6
    assert (WEIGHTS / f'{name}.safetensors').stat().st_size <= 2.8e6


def test_weights_come_back(tmp_path):
    model = stirred(RealtimeSR(3, 1, norm=True, wide=True))
    save_weights(model, tmp_path / 'own.safetensors')
    photo = sample_photo('cat').crop((0, 0, 20, 16))
    assert load_model(tmp_path / 'own.safetensors').predict(photo) == model.predict(photo)
