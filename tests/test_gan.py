"""The GAN: critic and generator, what their losses are, and stopping and going on."""

import math

import numpy as np
import pytest
import torch
from beside import SHARED, needs
from fastai.callback.core import Callback
from fastai.torch_core import set_seed
from PIL import Image
from tiny import Killed
from torch import nn
from torch.nn import functional as F

from enhance_lib.applications.batch import generate_folder
from enhance_lib.crappify import RECIPES, get_recipe
from enhance_lib.gan import (
    LOG_2,
    Critic,
    accuracy,
    critic_dls,
    critic_learner,
    cross_entropy,
    fit_gan,
    gan_learner,
    gradient_penalty,
    wasserstein,
)
from enhance_lib.toolbox.checkpoints import load_checkpoint
from enhance_lib.toolbox.datasets import sample_photo
from enhance_lib.toolbox.errors import EnhanceError
from enhance_lib.toolbox.features import FeatureNet
from enhance_lib.toolbox.files import find_photos, save_photo
from enhance_lib.toolbox.models import WEIGHTS, PhotoModel, load_model, read_card
from enhance_lib.toolbox.pairs import recipe_dls
from enhance_lib.unet import UNet

VAL = SHARED / 'data' / 'bsds500' / 'val'
has_val = needs(VAL)


class Tint(PhotoModel):
    "A generator of three numbers."

    multiple, margin = 8, 8

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3, 1, 1))

    def forward(self, x):
        return x + self.shift


class Always(nn.Module):
    "A critic that says the same of everything, and has something to train."

    def __init__(self, answer=0.0):
        super().__init__()
        self.answer = nn.Parameter(torch.tensor(answer))

    def forward(self, x):
        return self.answer + 0 * x.mean((1, 2, 3))[:, None]


class KillAfter(Callback):
    "A kill after some epochs."

    order = 100  # after the checkpoint was written

    def __init__(self, epochs):
        self.epochs = epochs

    def after_epoch(self):
        self.epochs -= 1
        if not self.epochs:
            raise Killed


@pytest.fixture(scope='module')
def net():
    "A small network with random weights, for the feature distance."
    set_seed(0)
    return FeatureNet(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), (1,))


@pytest.fixture(scope='module')
def photos():
    "Pieces of photos."
    cat, coffee = sample_photo('cat'), sample_photo('coffee')
    return [p.crop((x, 40, x + 96, 136)) for p in (cat, coffee) for x in (0, 100, 200)]


@pytest.fixture(scope='module')
def folder(photos, tmp_path_factory):
    "Photos in a folder."
    home = tmp_path_factory.mktemp('photos')
    for i, photo in enumerate(photos):
        save_photo(photo, home / f'{i}.png')
    return home


def dls_of(photos, size=64, bs=2):
    "Pairs by recipe gan."
    return recipe_dls(photos, photos[:2], get_recipe('gan'), size, bs, augment=False, device='cpu')


def a_gan(photos, net, generator=None, critic=None, **options):
    "A `GANLearner` of small parts."
    set_seed(0)
    options = {'content': F.l1_loss, 'net': net, 'half': False, 'every': 2, **options}
    return gan_learner(dls_of(photos), generator or Tint(), critic or Critic(8), **options)


def trained(learn, n=1, rate=2e-4):
    "Epochs of it, without a table."
    with learn.no_bar(), learn.no_logging():
        learn.fit(n, rate)
    return [row['who'] for row in learn.gan_monitor.steps]


class Seen(nn.Module):
    "A feature network of one convolution; a list, as of `feature_extractor`."

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)

    def forward(self, x):
        return [self.conv(x)]


class Say(Callback):
    "Say that the critic's losses were these."

    order = -10  # before anybody looks at it

    def __init__(self, *losses):
        self.losses = iter(losses)

    def after_loss(self):
        if self.training and not self.gan_trainer.gen_mode:
            self.learn.loss = torch.tensor(next(self.losses))


# Who trains


def test_the_generator_trains_once_the_critic_is_good_enough(photos, net):
    "The critic trains until its loss is below the threshold; the generator has one step."
    learn = a_gan(3 * photos, net, critic=Always(), critic_thresh=0.6)
    learn.add_cb(Say(0.7, 0.65, 0.5, 0.9, 0.2, 0.61, 0.61))
    assert ''.join(who[0] for who in trained(learn)) == 'cccgccgcc'


def test_a_critic_that_never_gets_there_never_stops(photos, net):
    "An answer of 0 costs log 2: above any threshold."
    learn = a_gan(photos, net, critic=Always(), critic_thresh=0.69)
    assert trained(learn, 1, 0.0) == ['critic'] * 3


def test_batch_norm_counts_only_for_who_trains(photos, net):
    "fastai puts both in training mode at the start of an epoch, and the generator to validate."

    class Normed(Tint):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return super().forward(self.norm(x))

    learn = a_gan(photos, net, Normed(), Always(), critic_thresh=0.69)
    before = {k: v.clone() for k, v in learn.model.generator.state_dict().items()}
    assert trained(learn, 2, 0.0) == ['critic'] * 3 + ['generator'] + ['critic'] * 2
    after = learn.model.generator.state_dict()
    assert int(after['norm.num_batches_tracked'] - before['norm.num_batches_tracked']) == 1


def test_wasserstein_has_five_steps_of_the_critic_for_one(photos, net):
    "By number, as its loss has no threshold."
    learn = a_gan(4 * photos, net, critic=Always(), wgan=True)
    assert ''.join(who[0] for who in trained(learn, 1, 0.0)) == 'cccccgcccccg'


def test_only_the_active_network_moves(photos, net):
    "Without momentum, neither moves in a step of the other."
    learn = a_gan(photos, net, critic=Always(0.5), critic_thresh=0.6)
    tint, critic = learn.model.generator.shift, learn.model.critic.answer
    learn.add_cb(Say(0.9, 0.9, 0.9))
    trained(learn, rate=0.1)
    assert float(tint.detach().abs().sum()) == 0 and float(critic) != 0.5
    learn = a_gan(photos, net, critic=Always(0.5), critic_thresh=0.6)
    learn.gan_trainer.gen_first = True
    tint, critic = learn.model.generator.shift, learn.model.critic.answer
    learn.add_cb(Say(0.9, 0.9))
    moved = []

    class Note(Callback):
        order = 90

        def after_batch(self):
            if self.training:
                moved.append((float(tint.detach().abs().sum()), float(critic.detach())))

    learn.add_cb(Note())
    trained(learn, rate=0.1)
    first, second, third = moved
    assert first[0] > 0 and first[1] == 0.5  # the generator alone
    assert second[0] == third[0] == first[0] and second[1] != third[1]  # then the critic alone


@pytest.mark.parametrize('threshold', [0, -1, LOG_2, 0.7, float('nan')])
def test_a_threshold_outside_its_range_is_refused(threshold, photos, net):
    "With the range."
    with pytest.raises(EnhanceError, match='more than 0.*less than 0.693'):
        a_gan(photos, net, critic_thresh=threshold)


# What a step costs


def test_the_losses_by_hand(photos, net):
    "A critic that says 2 of everything is right about photos, and wrong about pictures."
    learn = a_gan(photos, net, critic=Always(2.0), weights=(3.0, 50.0))
    right, wrong = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    assert trained(learn, 1, 0.0) == ['critic'] * 3
    for row in learn.gan_monitor.steps:
        assert row['loss'] == pytest.approx((right + wrong) / 2, abs=1e-5)
    learn = a_gan(photos, net, critic=Always(2.0), weights=(3.0, 50.0))
    learn.gan_trainer.gen_first = True
    trained(learn, 1, 0.0)
    degraded, clean = learn.dls.one_batch()
    adversarial, content = right, float(F.l1_loss(degraded, clean))
    learn.gan_trainer.switch(True)
    loss = learn.loss_func(degraded, clean)
    assert float(loss) == pytest.approx(3 * adversarial + 50 * content, rel=1e-5)


def test_cross_entropy_and_accuracy_by_hand():
    "Of every place, against one label for a picture."
    scores, labels = torch.tensor([[0.0, 2.0], [-1.0, 1.0]]), torch.tensor([1.0, 0.0])
    softplus = [math.log(1 + math.exp(x)) for x in (0, -2, -1, 1)]
    assert float(cross_entropy(scores, labels)) == pytest.approx(sum(softplus) / 4, abs=1e-6)
    assert float(accuracy(scores, labels)) == 0.5  # exactly 0 is no photo


def test_wasserstein_and_its_penalty_by_hand(photos, net):
    "Flat critics have a slope of 0, which is 1 off; the weight of the penalty is 10."
    scores, labels = torch.tensor([[3.0, 5.0], [1.0, -3.0]]), torch.tensor([1.0, 0.0])
    assert float(wasserstein(scores, labels)) == (-3 - 5 + 1 - 3) / 4
    x = torch.rand(2, 3, 8, 8)
    assert float(gradient_penalty(Always(), x, 1 - x).detach()) == 1
    learn = a_gan(photos, net, critic=Always(1.0), wgan=True)
    found = []

    class Note(Callback):
        order = 90

        def after_loss(self):
            found.append((float(self.loss.detach()), float(self.loss_grad.detach())))

    learn.add_cb(Note())
    trained(learn, 1, 0.0)
    assert found[0] == pytest.approx((0, 10))


# The critic


@pytest.mark.parametrize(
    'options, places',
    [({}, 169), ({'n_blocks': 3}, 25), ({'spectral': False}, 169), ({'detail': 0}, 169)],
)
def test_each_critic_votes_in_so_many_places(options, places):
    "128 pixels become 16 (or 8), and the last kernel of 4 leaves 13 (or 5) of them, squared."
    critic = Critic(**{'width': 8, **options})
    assert critic(torch.rand(2, 3, 128, 128)).shape == (2, places)
    normed = [m for m in critic.modules() if hasattr(m, 'weight_orig')]
    assert bool(normed) is options.get('spectral', True)


def test_a_critic_with_features_votes_there_too():
    "31×31 places of a convolution of 64 pixels, and the 25 of its own; the network stays."
    seen = Seen()
    critic = Critic(8, features=seen)
    x = torch.rand(2, 3, 64, 64)
    assert critic(x).shape == (2, 5 * 5 + 31 * 31)
    critic(x).sum().backward()
    assert all(p.grad is None for p in seen.parameters())
    assert not any(p is q for p in critic.parameters() for q in seen.parameters())
    assert any(p.grad is not None for p in critic.heads.parameters())


def test_the_gain_is_of_spectral_norm_alone():
    "Answers are multiplied by it."
    set_seed(0)
    critic = Critic(8, gain=1.0).eval()
    x = torch.rand(1, 3, 64, 64)
    once = critic(x)
    critic.gain = 30.0
    assert torch.allclose(critic(x), 30 * once)
    assert Critic(8, spectral=False).gain == 1


@pytest.mark.parametrize('size', [(32, 31), (8, 8)])
def test_a_critic_refuses_pictures_that_are_too_small(size):
    "With the least size."
    with pytest.raises(EnhanceError, match='needs 32×32 pixels or more'):
        Critic(8)(torch.rand(1, 3, *size))


def test_a_critic_and_crops_of_different_sizes_are_refused_before_training(photos, net):
    "Crops of 64 pixels, a critic that needs 128."
    with pytest.raises(EnhanceError, match='needs 128×128 pixels or more, and got 64×64'):
        a_gan(photos, net, critic=Critic(4, n_blocks=4))


def test_a_generator_of_another_size_is_refused_before_training(photos, net):
    "One that enlarges, for photos that are as large as the degraded ones."

    class Twice(Tint):
        def forward(self, x):
            return F.interpolate(x + self.shift, scale_factor=2)

    with pytest.raises(EnhanceError, match='makes 128×128 pixels, and the clean photos have 64×64'):
        a_gan(photos, net, Twice())


# Generated pictures on disk


def test_a_folder_is_generated_once_and_anew_for_other_weights(folder, tmp_path):
    "As PNG; a picture that is missing is made again."
    model = Tint()
    run = {'path': folder, 'generated_path': tmp_path, 'progress': False}
    assert generate_folder(model, **run).made == 6
    (tmp_path / '3.png').unlink()
    report = generate_folder(model, **run)
    assert (report.made, report.kept) == (1, 5)
    with torch.no_grad():
        model.shift += 0.1
    assert generate_folder(model, **run).made == 6
    degraded, made = (np.asarray(Image.open(f / '0.png'), float) for f in (folder, tmp_path))
    assert np.abs(made - np.clip(degraded + 25.5, 0, 255)).max() <= 1


def test_a_critic_learns_from_both_versions_of_a_crop(folder, tmp_path):
    "In turn: generated, labeled 0, and the same place of the photo, labeled 1."
    generate_folder(Tint(), folder, tmp_path, progress=False)  # does nothing
    dls = critic_dls(folder, tmp_path, size=64, bs=4, device='cpu')
    (fake, no), (photo, yes) = dls.valid_ds[0], dls.valid_ds[1]
    assert (float(no), float(yes)) == (0, 1) and torch.allclose(fake, photo)
    x, labels = dls.one_batch()
    assert x.shape == (4, 3, 64, 64) and labels.shape == (4,)
    learn = critic_learner(dls, Critic(8), half=False)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    assert 0 <= learn.validate()[1] <= 1


def test_an_empty_folder_of_pictures_is_refused(folder, tmp_path):
    "By its name."
    with pytest.raises(EnhanceError, match='empty'):
        critic_dls(folder, tmp_path / 'empty')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(EnhanceError, match='empty'):
        critic_dls(folder, tmp_path / 'empty')


# Stopping and going on


def whole_training(photos, net, checkpoint, epochs=(2, 2), kill=None, seed=0, generator=None):
    "A training with everything random: all its weights, and the learner."
    set_seed(0)
    learn = a_gan(photos, net, generator or UNet('test_resnet', False), critic_thresh=0.69)
    set_seed(seed)
    if kill:
        learn.add_cb(KillAfter(kill))
    with learn.no_bar(), learn.no_logging():
        fit_gan(learn, epochs, checkpoint=checkpoint)
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()]), learn


@pytest.fixture(scope='module')
def straight(photos, net, tmp_path_factory):
    "A training of two rates that nobody killed."
    return whole_training(photos, net, tmp_path_factory.mktemp('straight') / 'a')


@pytest.mark.parametrize('kill', [1, 2, 3])
def test_a_training_goes_on_as_if_it_had_not_been_killed(kill, straight, photos, net, tmp_path):
    "In either of two rates of two epochs, or between them."
    weights, first = straight
    with pytest.raises(Killed):
        whole_training(photos, net, tmp_path / 'a', kill=kill)
    resumed, second = whole_training(photos, net, tmp_path / 'a', seed=99)  # another process
    for noted in ('steps', 'scores'):
        a, b = (getattr(learn.gan_monitor, noted) for learn in (first, second))
        assert [row['step'] for row in a] == [row['step'] for row in b]
        assert [row.get('who') for row in a] == [row.get('who') for row in b]
    assert torch.allclose(weights, resumed, atol=1e-5)
    assert len({row['who'] for row in first.gan_monitor.steps}) == 2


def test_a_checkpoint_of_another_model_is_refused(photos, net, tmp_path):
    "It is left as it was."
    whole_training(photos, net, tmp_path / 'a', (1, 0), generator=Tint())
    path = tmp_path / 'a.0.ckpt'
    old = path.read_bytes()
    with pytest.raises(EnhanceError, match=r'a\.0\.ckpt.*does not fit this training'):
        whole_training(photos, net, tmp_path / 'a', (1, 0))
    assert path.read_bytes() == old


@pytest.mark.parametrize('who', ['critic', 'generator'])
def test_a_loss_of_nan_stops_the_training(who, photos, net, tmp_path):
    "The last good checkpoint is kept, and named."

    class Spoil(Callback):
        order = -5

        def after_loss(self):
            if self.training and self.epoch == 1 and self.gan_trainer.gen_mode == (who[0] == 'g'):
                self.learn.loss = self.learn.loss * float('nan')

    learn = a_gan(photos, net, critic_thresh=0.69)
    learn.add_cbs([Say(0.1, 0.9, 0.1, 0.1, 0.1, 0.1), Spoil()])
    with pytest.raises(EnhanceError, match=rf'loss of the {who} is nan at step \d.*a\.0\.ckpt'):
        with learn.no_bar(), learn.no_logging():
            fit_gan(learn, (3, 0), checkpoint=tmp_path / 'a')
    step, parts = load_checkpoint(tmp_path / 'a.0.ckpt')
    assert step == 1 and all(v.isfinite().all() for v in parts['model'].values())


def test_the_generator_ends_with_the_ema_of_its_weights(photos, net):
    "By hand: the mean of the first two steps, then 0.4 of each new one; and it is scored."
    learn, seen = a_gan(3 * photos, net, critic=Always(), wgan=True), []

    class Look(Callback):
        def after_batch(self):
            if self.training:
                seen.append(learn.model.generator.shift.detach().clone())

    learn.add_cb(Look())
    with learn.no_bar(), learn.no_logging():
        fit_gan(learn, (1, 1), (0.1, 0.05), decay=0.6)
    assert len(seen) == 18 and len({float(s.sum()) for s in seen}) > 2
    wanted = seen[0]
    for i, value in enumerate(seen[1:], 2):  # over both rates
        wanted = wanted.lerp(value, max(1 / i, 0.4))
    assert torch.allclose(learn.model.generator.shift, wanted, atol=1e-6)
    assert not torch.allclose(seen[-1], wanted)
    last = learn.gan_monitor.scores[-1]
    before = [row['step'] for row in learn.gan_monitor.scores]
    learn.gan_monitor.score()
    assert learn.gan_monitor.scores[-1] == last and before[-1] == 18


def test_a_training_that_was_done_gives_the_same_again(photos, net, tmp_path):
    "Not a step more, and the EMA, not the last weights."
    first, _ = whole_training(photos, net, tmp_path / 'a', (1, 1), generator=Tint())
    again, learn = whole_training(photos, net, tmp_path / 'a', (1, 1), generator=Tint())
    assert torch.equal(first, again) and len(learn.gan_monitor.steps) == 6


# What is published


def on_val(name):
    "What the card says of a model on BSDS500 val."
    return read_card(WEIGHTS / f'{name}.json')['scores']['BSDS500 val']


def test_unet_gan_gains():
    "0.7 dB over the input, with no less SSIM."
    score = on_val('unet-gan')
    assert score['output'] >= score['input'] + 0.7
    assert score['SSIM'][1] >= score['SSIM'][0]


def test_unet_gan_is_a_quarter_under_unet_mse():
    "In feature distance."
    gan, mse = (on_val(f'unet-{name}')['feature distance'][1] for name in ('gan', 'mse'))
    assert gan <= 0.75 * mse


def test_unet_gan_is_no_further_than_unet_feature():
    "In feature distance."
    gan, feature = (on_val(f'unet-{name}')['feature distance'][1] for name in ('gan', 'feature'))
    assert gan <= feature


def test_unet_gan_has_as_much_fine_detail_as_photos():
    "Energy in the top octave within 15%; that of unet-mse falls far short."
    assert on_val('unet-gan')['top octave'][1] == pytest.approx(1, abs=0.15)
    assert on_val('unet-mse')['top octave'][1] < 0.6


@has_val
def test_the_card_is_right():
    "Every tenth photo gains about as much as the card says of all, by scikit-image."
    from skimage.metrics import peak_signal_noise_ratio

    gains, model = [], load_model('unet-gan')
    for path in find_photos(VAL)[::10]:
        degraded, clean = RECIPES['gan'].pair(Image.open(path), 0, path.name, 256)
        before, after = (
            peak_signal_noise_ratio(np.asarray(clean), np.asarray(p))
            for p in (degraded, model.predict(degraded))
        )
        gains.append(after - before)
    score = on_val('unet-gan')
    assert np.mean(gains) == pytest.approx(score['output'] - score['input'], abs=0.8)
