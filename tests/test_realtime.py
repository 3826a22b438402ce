"""Super-resolution in real time: the network, the relativistic game, and what is refused."""

import copy
import math

import numpy as np
import pytest
import torch
from beside import SHARED, yardstick
from fastai.callback.core import Callback
from PIL import Image
from torch import nn
from torch.nn import functional as F

import enhance_lib.realtime as module
from enhance_lib.feature_loss import FeatureLoss
from enhance_lib.applications.scoreboard import bench_pairs
from enhance_lib.measure import feature_distance
from enhance_lib.toolbox.features import FeatureNet, feature_net
from enhance_lib.toolbox.models import WEIGHTS, read_card
from enhance_lib.toolbox.tensors import to_tensor
from enhance_lib.toolbox.datasets import sample_photo
from enhance_lib.toolbox.errors import EnhanceError
from enhance_lib.toolbox.files import open_photo, save_photo
from enhance_lib.toolbox.show import Budget
from enhance_lib.applications.image2 import enhance_image
from enhance_lib.realtime import (
    DOWNSCALING,
    DenseBlock,
    DenseCritic,
    PUBLISHED,
    RRDB,
    RealtimeSR,
    compare_downscaling,
    downscaling_recipe,
    fold_batch_norm,
    generator_content,
    interpolate,
    output_speed,
    realtime_gan,
    relativistic_loss,
    train_published,
    without_block,
)
from enhance_lib.toolbox.show import StrengthSlider, save_gif
from enhance_lib.toolbox.training import Snapshots, WeightAverage, realtime_learner
from enhance_lib.toolbox.models import load_model, save_weights
from enhance_lib.toolbox.pairs import recipe_dls
from enhance_lib.toolbox.training import CheckpointEachEpoch
from enhance_lib.workbench import set_seed

SET5 = SHARED / 'data' / 'bench' / 'Set5'
has_set5 = pytest.mark.skipif(not SET5.is_dir(), reason='Set5 does not lie beside it')


def one_line(error):
    "The words of an error, which must be one sentence or two, not a page."
    words = str(error.value)
    assert '\n' not in words and len(words) < 400
    return words


class Seen(FeatureNet):
    "Features of one convolution with fixed weights."

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()), (1,))


def pieces(n=4, side=72, seed=0):
    "Pieces of photos."
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        photo = sample_photo(('cat', 'coffee', 'china')[i % 3])
        left, top = (int(rng.integers(s - side)) for s in photo.size)
        found.append(photo.crop((left, top, left + side, top + side)))
    return found


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


@pytest.mark.parametrize('wrong', [0, 1, 5, 8, 2.0, True, 'x4', None])
def test_another_scale_is_refused(wrong):
    with pytest.raises(EnhanceError, match='2, 3 or 4') as error:
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


@pytest.mark.parametrize('options', [{'scale': 4}, {'scale': 2, 'wide': True}])
def test_folding_batch_norm_changes_nothing(options):
    "And what comes out is an ordinary network without it."
    model = stirred(RealtimeSR(n_blocks=1, norm=True, **options))
    before = copy.deepcopy(model.state_dict())
    folded = fold_batch_norm(model)
    x = torch.rand(1, 3, 17, 23)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model.eval()(x), atol=1e-4, rtol=1e-4)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()), 'it was changed'
    fresh = RealtimeSR(**folded.arguments).eval()
    fresh.load_state_dict(folded.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(fresh(x), folded(x))


@pytest.mark.parametrize('block', [0, 1, 2])
def test_what_is_left_without_a_block(block):
    "The other blocks in their order, as an ordinary network; the one that is given stays whole."
    model = stirred(RealtimeSR(2, n_blocks=3)).eval()
    for i, rrdb in enumerate(model.body):
        nn.init.constant_(rrdb.skip, 10 + i)
    before = copy.deepcopy(model.state_dict())
    smaller = without_block(model, block)
    assert [rrdb.skip.item() for rrdb in smaller.body] == [10 + i for i in range(3) if i != block]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()), 'it was changed'
    fresh = RealtimeSR(**smaller.arguments).eval()
    assert fresh.margin == smaller.margin == model.margin - 9
    fresh.load_state_dict(smaller.state_dict())
    x = torch.rand(1, 3, 17, 23)
    nn.init.zeros_(model.body[block].skip)  # a block that adds nothing
    with torch.no_grad():
        torch.testing.assert_close(fresh(x), model(x))
        torch.testing.assert_close(smaller(x), model(x))


@pytest.mark.parametrize(
    'n_blocks, block, words',
    [
        (1, 0, 'one block alone'),
        (2, 2, '0 to 1'),
        (2, -1, '0 to 1'),
        (2, 1.0, '0 to 1'),
        (3, 'a', '0 to 2'),
    ],
)
def test_a_block_that_can_not_be_left_out(n_blocks, block, words):
    with pytest.raises(EnhanceError, match=words) as error:
        without_block(RealtimeSR(n_blocks=n_blocks), block)
    one_line(error)


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


# Made small in some way


BY_HAND = {
    'nearest': 255,  # pixel 2 alone
    'bilinear': 127.5,  # pixels 1 and 2, half of each
    'bicubic': 0.5625 * 255,  # Keys' kernel with a = -1/2, half a pixel away
    'bilinear, antialiased': 255 / 4,  # (3.5 + 0.5) / 16 of the light
    'bicubic, antialiased': 255 / 4,  # a = -1/2: (0.964 + 0.091 - 0.048 - 0.007) / 4
}


@pytest.mark.parametrize('way', DOWNSCALING)
def test_ways_by_hand(way):
    "Rows in which the third of each four pixels is white; looked at far from the border."
    row = np.tile(np.array([0, 0, 255, 0], np.uint8), (24, 6))
    photo = Image.fromarray(np.repeat(row[:, :, None], 3, 2))
    found = np.asarray(downscaling_recipe(way)(photo))
    assert found.shape == (6, 6, 3)
    assert found[2:4, 2:4].astype(float) == pytest.approx(BY_HAND[way], abs=1)


def test_any_way_is_drawn_anew():
    "Each of them comes up, and a seed gives the same again."
    photo = sample_photo('china').crop((0, 0, 64, 64))
    found = {downscaling_recipe('any')(photo, seed).tobytes() for seed in range(40)}
    wanted = {downscaling_recipe(way)(photo).tobytes() for way in DOWNSCALING}
    assert found == wanted and len(wanted) == len(DOWNSCALING)


@pytest.mark.parametrize('scale', [2, 3, 4])
def test_wild_makes_small_too(scale):
    photo = sample_photo('cat').crop((0, 0, 98, 86))
    for seed in range(5):
        small, clean = downscaling_recipe('wild', scale).pair(photo, seed)
        assert clean.size == (small.width * scale, small.height * scale)


def test_an_unknown_way_is_refused():
    with pytest.raises(EnhanceError, match='Did you mean nearest') as error:
        downscaling_recipe('neerest')
    one_line(error)


def test_comparing_ways_measures_bicubic_rightly():
    "By hand: luma of BT.601 in 16 to 235, two pixels shaved; and a network that is bicubic."
    cat = sample_photo('cat')
    table = compare_downscaling({'untrained': RealtimeSR(2, 1)}, [cat], 2)
    assert list(table.index) == [*DOWNSCALING, 'mean']
    clean = cat.crop((0, 0, cat.width // 2 * 2, cat.height // 2 * 2))
    for way, (kernel, antialias) in DOWNSCALING.items():
        large = downscaling_recipe(way, 2)(cat).resize(clean.size, Image.Resampling.BICUBIC)
        a, b = (np.asarray(p, float)[2:-2, 2:-2] for p in (large, clean))
        off = (a - b) @ [65.481 / 255, 128.553 / 255, 24.966 / 255]
        expected = 10 * math.log10(255**2 / (off**2).mean())
        assert table.loc[way, 'bicubic'] == pytest.approx(expected, abs=0.01), (kernel, antialias)
    assert table['untrained'].to_numpy() == pytest.approx(table['bicubic'].to_numpy(), abs=0.05)
    assert table.loc['mean', 'bicubic'] == pytest.approx(table['bicubic'][:-1].mean())


# The game


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
    with pytest.raises(EnhanceError, match='32×32 pixels or more, and got 31×32'):
        critic(torch.rand(1, 3, 32, 31))


@pytest.fixture
def content(monkeypatch):
    "A content loss on a feature network that is there."
    loss = FeatureLoss(Seen(), features=(1.0,), gram=(), pixel=0.0)
    monkeypatch.setattr(module, 'generator_content', lambda *a, **k: loss)
    return loss


def a_game(content, **options):
    set_seed(1)
    options = {'every': 2, 'net': Seen(), 'half': False} | options
    return realtime_gan(small_dls(), RealtimeSR(4, 1), DenseCritic(4), content, **options)


def test_the_losses_of_the_game_by_hand(content):
    learn = a_game(content, adversarial=0.3)
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


def test_they_take_turns(content):
    "One step each in an epoch; who is not on stays as it is."
    seen = []

    class Look(Callback):
        order = 90

        def before_batch(self):
            self.before = copy.deepcopy(self.learn.model.state_dict())

        def after_step(self):
            now = dict(self.learn.model.named_parameters())
            seen.append({n.split('.')[0] for n, p in now.items() if not p.equal(self.before[n])})

    learn = a_game(content)
    learn.fit(4, 1e-3, cbs=Look())
    assert len(seen) == 8, seen
    # fastai begins an epoch with the generator, which validation needs last, but for the first
    pairs = list(zip(seen[::2], seen[1::2]))
    assert pairs[0] == ({'critic'}, {'generator'})
    assert all(a != b and len(a) == len(b) == 1 for a, b in pairs), seen


class Killed(Exception):
    pass


class Kill(Callback):
    order = 95

    def __init__(self, epoch):
        self.at = epoch

    def before_epoch(self):
        if self.epoch == self.at:
            raise Killed('here')


@pytest.mark.parametrize('kill', [1, 2])
def test_a_game_goes_on_as_if_it_had_not_been_killed(kill, content, tmp_path):
    "Both networks, both averages, and what was seen."

    def run(path, *cbs):
        learn, average = a_game(content), WeightAverage(0.9)
        keep_going = CheckpointEachEpoch(path, watch=learn.watch, average=average)
        try:
            learn.fit(3, 1e-3, cbs=[average, keep_going, *cbs])
        except Killed:
            return None
        average.keep()
        return learn

    straight = run(tmp_path / 'a.ckpt')
    assert run(tmp_path / 'b.ckpt', Kill(kill)) is None
    again = run(tmp_path / 'b.ckpt')
    a, b = (learn.model.state_dict() for learn in (straight, again))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert straight.watch.looks == again.watch.looks


def test_a_loss_of_nan_stops_the_game(content):
    learn = a_game(lambda made, clean: (made * float('nan')).mean())
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
    monkeypatch.setattr(module, 'feature_loss', lambda *given: asked.append(given))
    generator_content('vgg19', weights='vgg19.pth')
    assert asked == [('content', 'vgg19.pth'), ('style', None)]


def test_another_content_is_refused():
    with pytest.raises(EnhanceError, match="no content loss on 'vgg16'.*vgg19"):
        generator_content('vgg16')


def test_the_moving_average_by_hand():
    "The mean of the first steps, then a share of each new one."
    learn = realtime_learner(small_dls(), RealtimeSR(4, 1), half=False)
    seen = []

    class Look(Callback):
        def after_batch(self):
            if self.training:
                seen.append(float(self.learn.model.body[0].skip))

    average = WeightAverage(0.6)
    learn.fit(2, 1e-2, cbs=[average, Look()])
    assert len(seen) == 4 and len(set(seen)) == 4
    wanted = seen[0]
    for i, value in enumerate(seen[1:], 2):
        wanted += max(1 / i, 0.4) * (value - wanted)
    average.keep()
    assert float(learn.model.body[0].skip) == pytest.approx(wanted, abs=1e-6)


# Film and animation


def test_a_film_of_a_training(tmp_path):
    photo = sample_photo('cat').crop((0, 0, 16, 12))
    film = Snapshots(photo, every=3)
    learn = realtime_learner(small_dls(), RealtimeSR(4, 1), half=False)
    learn.fit(2, 1e-2, cbs=film)
    assert list(film.frames) == ['step 0', 'step 3']
    path = save_gif([*film.frames.values()], tmp_path / 'film.gif', seconds=0.1)
    with Image.open(path) as gif:
        assert gif.n_frames == 2 and gif.size == (64, 48)
        assert gif.info['duration'] == 100
    with pytest.raises(EnhanceError, match='no frames'):
        save_gif([], tmp_path / 'none.gif')


# The knob


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
    with pytest.raises(EnhanceError, match='from 0 to 1'):
        interpolate(a, a, wrong)


def test_nothing_is_between_different_networks():
    with pytest.raises(EnhanceError, match='different layers'):
        interpolate(RealtimeSR(2, 1), RealtimeSR(4, 1), 0.5)


def test_the_slider_shows_what_was_asked_for():
    photo = sample_photo('cat').crop((0, 0, 20, 16))
    slider = StrengthSlider(stirred(RealtimeSR(2, 1), 1), stirred(RealtimeSR(2, 1), 2), photo, 3)
    assert list(slider.photos) == [0.0, 0.5, 1.0]
    shown = set()
    for strength in slider.photos:
        slider.slider.value = strength
        assert slider.picture.value == slider.photos[strength]
        shown.add(slider.picture.value)
    assert len(shown) == 3
    assert 'image/png' in slider._repr_mimebundle_()


@pytest.mark.parametrize('steps', [0, 1, -3])
def test_a_slider_needs_two_strengths(steps):
    with pytest.raises(EnhanceError, match='2 or more'):
        StrengthSlider(RealtimeSR(2, 1), RealtimeSR(2, 1), Image.new('RGB', (9, 9)), steps)


# One call


@pytest.fixture
def tiny():
    return RealtimeSR(4, 1).eval()


@pytest.mark.parametrize('mode', ['L', 'RGB', 'RGBA', 'LA', 'P', 'I;16', 'CMYK', '1'])
def test_photos_of_any_mode_are_enlarged(mode, tiny, tmp_path):
    photo = sample_photo('cat').crop((0, 0, 12, 9))
    if mode == 'I;16':
        photo = Image.fromarray(np.asarray(photo.convert('L'), np.uint16) * 257)
    else:
        photo = photo.convert(mode)
    better = enhance_image(photo, sr_path=tmp_path / 'better.png', model=tiny)
    assert better.size == (48, 36)
    assert better.mode == {'L': 'L', '1': 'L', 'I;16': 'L', 'LA': 'LA', 'RGBA': 'RGBA'}.get(
        mode, 'RGB'
    )
    assert open_photo(tmp_path / 'better.png', None).size == (48, 36)


def test_a_photo_or_a_path(tiny, tmp_path):
    "Both give the same, and one of them is needed."
    photo = sample_photo('cat').crop((0, 0, 12, 9))
    path = save_photo(photo, tmp_path / 'small.png')
    assert enhance_image(lr_path=path, model=tiny) == enhance_image(photo, model=tiny)
    for options in ({}, {'lr_image': photo, 'lr_path': path}):
        with pytest.raises(EnhanceError, match='either'):
            enhance_image(**options, model=tiny)


def test_it_can_be_shown(tiny, monkeypatch):
    shown = {}
    monkeypatch.setattr(module, 'show_photos', lambda photos, width: shown.update(photos))
    enhance_image(Image.new('L', (9, 9)), visualize=True, model=tiny)
    assert [p.size for p in shown.values()] == [(36, 36)] * 2


@pytest.mark.parametrize('size', [(7, 100), (100, 7), (1, 1)])
def test_too_small_a_photo_is_refused(size, tiny):
    with pytest.raises(EnhanceError, match='8×8 or more') as error:
        enhance_image(Image.new('RGB', size), model=tiny)
    one_line(error)


def test_too_large_an_output_is_refused_before_it_is_computed(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(RealtimeSR, 'predict', lambda *a, **k: pytest.fail('it was computed'))
    with pytest.raises(EnhanceError, match='10400×10400 pixels, more than 100,000,000') as error:
        enhance_image(Image.new('RGB', (2600, 2600)), sr_path=tmp_path / 'a.png', model=tiny)
    one_line(error)
    with pytest.raises(EnhanceError, match='48×48'):
        enhance_image(Image.new('RGB', (12, 12)), model=tiny, max_pixels=2000)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('scale', [1, 3, 8, 0, -4])
def test_a_scale_that_there_is_no_model_for(scale, tiny):
    with pytest.raises(EnhanceError, match='2 or 4'):
        enhance_image(Image.new('RGB', (9, 9)), scale=scale)
    with pytest.raises(EnhanceError, match='enlarges 4 times'):
        enhance_image(Image.new('RGB', (9, 9)), scale=scale, model=tiny)


def test_what_is_no_photo(tiny, tmp_path):
    (tmp_path / 'text.jpg').write_text('no photo at all')
    for path in (tmp_path / 'text.jpg', tmp_path / 'none.png', tmp_path):
        with pytest.raises(EnhanceError) as error:
            enhance_image(lr_path=path, sr_path=tmp_path / 'out.png', model=tiny)
        assert path.name in one_line(error)
    assert not (tmp_path / 'out.png').exists()


# What is published


@pytest.mark.parametrize('name', PUBLISHED)
def test_every_round_of_the_published_training_runs(name, content, tmp_path, monkeypatch):
    "At the smallest budget; each leaves its checkpoint, and a second call takes no step more."
    paths = [save_photo(p, tmp_path / f'{i}.png') for i, p in enumerate(pieces(5, 160))]
    monkeypatch.setattr(module, 'load_model', lambda name: RealtimeSR(4, 2))
    monkeypatch.setattr(module, 'RealtimeSR', lambda scale: RealtimeSR(scale, 2))
    monkeypatch.setattr(module, 'realtime_gan', lambda *a, **k: realtime_gan(*a, **k, net=Seen()))
    model, history = train_published(name, paths, tmp_path / 'a.ckpt', Budget('smoke'))
    plan = PUBLISHED[name]
    assert len(history) == len(plan['rounds'])
    assert all(math.isfinite(value) for row in history for value in row.values())
    assert model.scale == plan['scale']
    assert len(model.body) == 2 - sum('without' in part for part in plan['rounds'])
    kept = {p.name for p in tmp_path.glob('*.ckpt')}
    assert kept == {f'a.{i}.ckpt' for i in range(len(plan['rounds']))}
    in_training, forward = [], RealtimeSR.forward
    monkeypatch.setattr(
        RealtimeSR, 'forward', lambda self, x: in_training.append(self.training) or forward(self, x)
    )
    again, _ = train_published(name, paths, tmp_path / 'a.ckpt', Budget('smoke'))
    assert in_training and not any(in_training)
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    with pytest.raises(EnhanceError, match=name):
        train_published(name + 'q', paths, tmp_path / 'b.ckpt', Budget('smoke'))


def test_a_share_of_a_round_is_kept():
    class Learn:
        model = RealtimeSR(2, 1)

        def fit_flat_cos(self, *args, **kwargs):
            stirred(self.model, 1)

        def validate(self):
            return 0.5, 20.0

    learn = Learn()
    before = copy.deepcopy(learn.model)
    scores = module._fit(learn, {'epochs': 1, 'lr': 1e-3, 'share': 0.25}, 'no.ckpt')
    assert scores == {'loss': 0.5, 'PSNR': 20.0}
    after = stirred(copy.deepcopy(before), 1)
    for key, value in learn.model.state_dict().items():
        expected = 0.75 * before.state_dict()[key] + 0.25 * after.state_dict()[key]
        assert torch.allclose(value, expected, atol=1e-6)


def test_mostly_one_way():
    "Weights of 1, 1, 1, 1 and 8: two thirds of 600, give or take four deviations of 11.5."
    recipe = module._mostly(8)
    ways = [recipe.draw(0, str(i))['steps'][0][1] for i in range(600)]
    usual = sum(way['kernel'] == 'bicubic' and way['antialias'] for way in ways)
    assert abs(usual - 400) < 46
    assert {(way['kernel'], way['antialias']) for way in ways} == set(DOWNSCALING.values())
    assert '8 times as often' in recipe.about


def on_card(name, where):
    "What the card of a model says about some photos."
    return read_card(WEIGHTS / f'{name}.json')['scores'][where]


@pytest.mark.parametrize('name, least', [('realtime-x4', 31.2), ('realtime-x2', 37.0)])
def test_psnr_on_set5(name, least):
    assert on_card(name, 'Set5')['output'] >= least


def test_psnr_on_bsds():
    assert on_card('realtime-x4', 'BSDS500 val')['output'] >= 26.9


def test_any_way_is_half_a_decibel_better_in_the_mean():
    means = [on_card(f'realtime-x4{kind}', 'Set5, any way') for kind in ('', '-any')]
    assert means[1]['output'] >= means[0]['output'] + 0.5


def test_the_gan_halves_the_feature_distance_of_bicubic():
    before, after = on_card('realtime-x4-gan', 'Set5')['feature distance']
    assert after <= before / 2


@has_set5
@pytest.mark.parametrize('name', PUBLISHED)
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


@pytest.mark.parametrize('name', PUBLISHED)
def test_what_is_published_is_small(name):
    "At most 5.4 MB in float32, and half of that on the disk."
    assert values(load_model(name)) * 4 <= 5.4e6
    assert (WEIGHTS / f'{name}.safetensors').stat().st_size <= 2.8e6


def test_weights_come_back(tmp_path):
    model = stirred(RealtimeSR(3, 1, norm=True, wide=True))
    save_weights(model, tmp_path / 'own.safetensors')
    photo = sample_photo('cat').crop((0, 0, 20, 16))
    assert load_model(tmp_path / 'own.safetensors').predict(photo) == model.predict(photo)
