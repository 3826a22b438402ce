"""The callbacks of adversarial training: who moves, what is noted, going on, and NaN."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.torch_core import set_seed
from fastai.vision.gan import FixedGANSwitcher, gan_loss_from_func
from tiny import GRAIN, TRAIN_PHOTOS, Killed
from torch import nn
from torch.nn import functional as F

from enhance_lib.toolbox.adversarial import (
    GradientPenalty,
    adversarial_learner,
    plot_adversarial,
)
from enhance_lib.toolbox.checkpoints import load_checkpoint
from enhance_lib.toolbox.errors import EnhanceError
from enhance_lib.toolbox.pairs import recipe_dls
from enhance_lib.toolbox.training import CheckpointEachEpoch


class Tint(nn.Module):
    "A generator of three numbers and a batch norm, which counts what passes."

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3, 1, 1))
        self.count = nn.BatchNorm2d(3)

    def forward(self, x):
        return x + self.shift + 0 * self.count(x)


class Mean(nn.Module):
    "A critic of one factor: how bright, in each picture."

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return self.factor * x.mean((1, 2, 3))[:, None]


def squared(judged, label):
    return (judged - label[:, None]).square().mean()


def a_training(cbs=(), measures=None, every=2):
    "Six steps in an epoch, in turn; the same each time."
    set_seed(0)
    crops = {'size': 16, 'bs': 1, 'augment': False, 'device': 'cpu'}
    dls = recipe_dls(TRAIN_PHOTOS, TRAIN_PHOTOS[:2], GRAIN, **crops)
    measures = measures or {'bright': lambda made, clean: made.mean()}
    losses, turns = gan_loss_from_func(F.l1_loss, squared), FixedGANSwitcher(n_crit=1, n_gen=1)
    options = {'every': every, 'half': False, 'cbs': cbs}
    return adversarial_learner(dls, Tint(), Mean(), losses, turns, measures, **options)


def fit(learn, epochs=1, rate=1e-2, cbs=None):
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs, rate, cbs=cbs)
    return learn


def test_only_the_active_network_moves_and_counts():
    "Neither moves or counts in the other's step, or on validation photos."
    moved = []

    class Look(Callback):
        order = 90

        def before_batch(self):
            self.before = {k: v.clone() for k, v in self.model.state_dict().items()}

        def after_batch(self):
            now = self.model.state_dict().items()
            names = {k.split('.')[0] for k, v in now if not torch.equal(v, self.before[k])}
            moved.append(names if self.training else (names, 'validation'))

    fit(a_training([Look()]), epochs=2)
    # fastai begins every epoch but the first with the generator, which validation needed
    first = [{'critic'}, {'generator'}] * 3
    seen = [names for names in moved if isinstance(names, set)]
    assert seen[:6] == first and all(len(names) == 1 for names in seen) and len(seen) == 12
    assert [names for names in moved if isinstance(names, tuple)] == 4 * [(set(), 'validation')]


def test_a_gradient_of_nothing_is_nothing():
    "Not zeros, which would age Adam's averages: its state has as many steps as there were."
    learn = fit(a_training())
    steps = [learn.opt.state[p]['step'] for p in learn.model.parameters() if p in learn.opt.state]
    shift, factor = learn.model.generator.shift, learn.model.critic.factor
    assert (learn.opt.state[shift]['step'], learn.opt.state[factor]['step']) == (3, 3)
    assert set(steps) == {3}


def test_the_monitor_notes_steps_and_the_mean_of_each_measure():
    "A measure may give a number or one a picture, on any device or none."
    measures = {
        'each': lambda made, clean: made.mean((1, 2, 3)),
        'number': lambda made, clean: 7,
        'largest': lambda made, clean: float(made.max()),
    }
    learn = a_training(measures=measures, every=4)
    inputs = torch.cat([x for x, _ in learn.dls.valid])
    monitor = fit(learn).gan_monitor
    assert [row['step'] for row in monitor.steps] == list(range(6))
    assert [row['who'] for row in monitor.steps] == 3 * ['critic', 'generator']
    assert [row['step'] for row in monitor.scores] == [0, 4]
    first = monitor.scores[0]
    assert first['each'] == pytest.approx(float(inputs.mean()), abs=1e-6)
    assert first['number'] == 7
    assert first['largest'] == pytest.approx(float(inputs.amax((1, 2, 3)).mean()), abs=1e-6)
    wanted = (inputs[0] * 255).round()
    assert np.array_equal(np.asarray(monitor.strip(1)['step 0']), wanted.permute(1, 2, 0).byte())
    assert list(monitor.strip(5)) == ['step 0', 'step 4']


def test_scoring_changes_nothing():
    "The same weights with a look after every step, and with none but the first."
    one, other = fit(a_training(every=1)), fit(a_training(every=100))
    for a, b in zip(one.model.state_dict().values(), other.model.state_dict().values()):
        assert torch.equal(a, b)


@pytest.mark.parametrize('kill', [1, 2])
def test_a_monitor_goes_on_from_a_checkpoint(kill, tmp_path):
    "Who trains next, steps, scores, pictures."

    class Kill(Callback):
        order = 100  # after the checkpoint was written

        def after_epoch(self):
            if self.epoch + 1 == kill:
                raise Killed

    def run(path, *cbs):
        learn = a_training(every=5)
        checkpoint = CheckpointEachEpoch(path, monitor=learn.gan_monitor)
        return fit(learn, 3, cbs=[checkpoint, *cbs]).gan_monitor

    straight = run(tmp_path / 'a')
    with pytest.raises(Killed):
        run(tmp_path / 'b', Kill())
    again = run(tmp_path / 'b')
    assert again.steps == straight.steps and again.scores == straight.scores
    assert len(again.pictures) == len(straight.pictures) == len(straight.scores)
    assert all(torch.equal(a, b) for a, b in zip(again.pictures, straight.pictures))


def test_a_checkpoint_without_a_monitor_is_refused(tmp_path):
    "It is of another training."
    fit(a_training(), cbs=CheckpointEachEpoch(tmp_path / 'a'))
    learn = a_training()
    with pytest.raises(EnhanceError, match='does not fit this training'):
        fit(learn, cbs=CheckpointEachEpoch(tmp_path / 'a', monitor=learn.gan_monitor))


class Spoil(Callback):
    "Make a loss NaN, or a weight, in the second epoch."

    order = -5

    def __init__(self, who, what):
        self.who, self.what = who, what

    def after_loss(self):
        if self.training and self.epoch == 1 and self.gan_trainer.gen_mode == (self.who[0] == 'g'):
            self.learn.loss = self.learn.loss * float(self.what)


@pytest.mark.parametrize('who, what', [('critic', 'nan'), ('generator', 'inf')])
def test_a_loss_that_is_no_number_stops_the_training(who, what, tmp_path):
    "The last good checkpoint stays, and is named."
    path = tmp_path / 'a.ckpt'
    learn = a_training([Spoil(who, what)])
    wanted = rf'loss of the {who} is {what} at step \d+.*a\.ckpt'
    with pytest.raises(EnhanceError, match=wanted):
        fit(learn, 3, cbs=CheckpointEachEpoch(path, monitor=learn.gan_monitor))
    step, parts = load_checkpoint(path)
    assert step == 1 and all(v.isfinite().all() for v in parts['model'].values())
    with pytest.raises(EnhanceError, match='There is no checkpoint'):
        fit(a_training([Spoil(who, what)]), 3)


def test_an_output_of_nan_stops_the_training():
    "Before anything is measured of it."
    learn = a_training()
    with torch.no_grad():
        learn.model.generator.shift.fill_(float('nan'))
    with pytest.raises(EnhanceError, match='output of the generator is NaN at step 0'):
        fit(learn)


def test_the_penalty_moves_the_critic_alone():
    "By its weight; the loss that is noted is without it."
    seen = []

    def penalty(critic, clean, generated):
        seen.append((clean.shape, generated.shape, generated.requires_grad))
        return critic.factor  # a slope of 1

    one, other = (
        fit(a_training([GradientPenalty(penalty, weight)] if weight else []), rate=1e-3)
        for weight in (1e4, 0)
    )
    assert seen == 3 * [((1, 3, 16, 16), (1, 3, 16, 16), False)]
    assert one.gan_monitor.steps[0] == other.gan_monitor.steps[0]
    assert float(one.model.critic.factor.detach()) == pytest.approx(1 - 3e-3, abs=1e-4)
    assert float(other.model.critic.factor.detach()) != pytest.approx(1 - 3e-3, abs=1e-4)


@pytest.mark.parametrize('n', [1, 2, 4])
def test_the_plot_has_a_row_for_two_measures(n, monkeypatch):
    "And a title that names each; every dashed line is where it began."
    matplotlib.use('Agg')
    monkeypatch.setattr(plt, 'show', lambda: None)
    measures = {f'm{i}': lambda made, clean, i=i: i + made.mean() for i in range(n)}
    monitor = fit(a_training(measures=measures)).gan_monitor
    plot_adversarial(monitor, 'a title')
    figure = plt.gcf()
    axes = [ax for ax in figure.axes if ax.axison]
    assert figure.get_suptitle() == 'a title' and len(axes) == 1 + n
    for i, ax in enumerate(axes[1:]):
        line, before = ax.lines
        assert ax.get_ylabel() == f'm{i}' and list(line.get_xdata()) == [0, 2, 4, 6]
        assert before.get_ydata()[0] == line.get_ydata()[0] == monitor.scores[0][f'm{i}']
    assert [len(line.get_xdata()) for line in axes[0].lines] == [3, 3]
    plt.close(figure)
