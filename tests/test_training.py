"""What a Learner lacks: half precision that ends, trainings that survive being killed, averages."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import noise
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from tiny import (
    CPU,
    GRAIN,
    Adam,
    CancelBatchException,
    CancelFitException,
    Evil,
    Killed,
    RMSProp,
    equal_weights,
    seed_all,
    tiny_dls,
    tiny_learner,
    tiny_net,
    train,
)
from torch import nn

import enhance_lib
from enhance_lib.applications.scoreboard import TASKS
from enhance_lib.toolbox import training
from enhance_lib.toolbox.checkpoints import save_checkpoint
from enhance_lib.toolbox.errors import EnhanceError
from enhance_lib.toolbox.pairs import recipe_dls
from enhance_lib.toolbox.tensors import to_photo
from enhance_lib.toolbox.training import (
    MUON,
    Augment,
    AutocastCPU,
    BatchPSNR,
    Callback,
    CheckpointEachEpoch,
    Snapshots,
    WeightAverage,
    half_precision,
    muon_groups,
    psnr_learner,
)


class Stop(Callback):
    "Raise an exception at an event of a batch of an epoch."

    order = 90

    def __init__(self, what, epoch=0, iter=1, at='before_batch', order=90):
        self.what, self.where, self.order = what, (epoch, iter), order
        setattr(self, at, self.stop)

    def stop(self):
        if self.training and (self.epoch, self.iter) == self.where:
            raise self.what


class Look(Callback):
    "Write down what a batch looks like."

    def __init__(self, order, what, at='after_pred'):
        self.order, self.seen, self.what = order, [], what
        setattr(self, at, self.look)

    def look(self):
        self.seen.append(self.what(self))


def last_line(error):
    "fastai puts a line of its own before the message of an error in a callback."
    first, _, message = str(error.value).partition('\n\t')
    assert 'CheckpointEachEpoch' in first
    assert message and '\n' not in message
    return message


# Half precision


@pytest.fixture
def in_bfloat16(monkeypatch):
    "As on a CPU that is faster with it; whatever a test leaves on is switched off after it."
    monkeypatch.setattr(training, 'half_dtype', lambda device: torch.bfloat16)
    monkeypatch.setattr(enhance_lib.toolbox.device, 'half_dtype', lambda device: torch.bfloat16)
    yield
    torch.set_autocast_enabled('cpu', False)
    for _ in range(torch.autocast_increment_nesting()):
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()


def test_without_half_precision_the_callback_changes_nothing(monkeypatch):
    "Not even a `forward` that somebody gave to the model."
    monkeypatch.setattr(training, 'half_dtype', lambda device: None)
    calls, look = [], Look(5, lambda cb: cb.pred.dtype)
    learn = tiny_learner(cbs=[AutocastCPU(), look])
    forward = learn.model.forward
    learn.model.forward = mine = lambda x: calls.append(1) or forward(x)
    train(learn, 2)
    assert vars(learn.model)['forward'] is mine and len(calls) == 8
    assert set(look.seen) == {torch.float32}
    assert equal_weights(learn.model, train(tiny_learner(), 2).model)


def watched_net(inside):
    "A network that writes down what its first layer computes in."
    net = tiny_net()
    net[0].register_forward_hook(lambda layer, x, y: inside.append(y.dtype))
    return net


def hooks_of(model):
    return len(model._forward_hooks) + len(model._forward_pre_hooks) + ('forward' in vars(model))


def test_a_cpu_with_half_precision_computes_in_it(in_bfloat16):
    inside = []
    after = Look(5, lambda cb: (cb.pred.dtype, torch.is_autocast_enabled('cpu')))
    loss = Look(15, lambda cb: (cb.loss_grad.dtype, torch.is_autocast_enabled('cpu')), 'after_loss')
    learn = tiny_learner(cbs=[AutocastCPU(), after, loss])
    learn.model[0].register_forward_hook(lambda layer, x, y: inside.append(y.dtype))
    train(learn, 2)
    assert len(inside) == 8  # 3 batches to train with and 1 to validate with, twice
    assert set(inside) == {torch.bfloat16}
    assert set(after.seen) == set(loss.seen) == {(torch.float32, False)}
    assert {p.dtype for p in learn.model.parameters()} == {torch.float32}
    assert not torch.is_autocast_enabled('cpu') and not hooks_of(learn.model)
    exact = train(tiny_learner(), 2)
    assert not equal_weights(learn.model, exact.model)
    assert equal_weights(learn.model, exact.model, within=0.05)
    with learn.no_bar(), learn.no_logging():  # afterwards
        predictions, targets = learn.get_preds()
    assert predictions.shape == targets.shape == (2, 3, 8, 8)
    assert predictions.dtype == torch.float32


def test_parts_that_are_called_on_their_own_compute_in_it(in_bfloat16):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.generator, self.critic, self.dtypes = tiny_net(), tiny_net(), set()

        def forward(self, x):
            self.dtypes.add(torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled() else 0)
            return self.generator(x)

    learn = tiny_learner(model=Two(), cbs=[AutocastCPU('generator', 'critic')])
    learn.splitter = lambda model: [list(model.parameters())]
    inside = []
    learn.model.generator[0].register_forward_hook(lambda layer, x, y: inside.append(y.dtype))
    train(learn, 1)
    assert set(inside) == {torch.bfloat16} and learn.model.dtypes == {0}
    assert not hooks_of(learn.model.generator) and not hooks_of(learn.model.critic)


def test_a_gpu_is_left_to_fastai(in_bfloat16):
    learn = tiny_learner(cbs=[AutocastCPU()])
    learn.dls.device = torch.device('meta')
    callback = next(cb for cb in learn.cbs if isinstance(cb, AutocastCPU))
    callback.before_fit()
    assert not hooks_of(learn.model)
    callback.after_fit()


def failing_loss(what):
    def loss(prediction, target):
        raise what

    return loss


class Interrupted(nn.Module):
    def forward(self, x):
        raise KeyboardInterrupt


STOPS = {
    'error in the loss': ({'loss': failing_loss(RuntimeError('no'))}, None),
    'interrupt in the loss': ({'loss': failing_loss(KeyboardInterrupt())}, None),
    'error in the model': ({}, None),
    'interrupt in the model': ({}, None),
    'canceled batch': ({}, (CancelBatchException, 'after_pred')),
    'canceled fit': ({}, (CancelFitException, 'after_pred')),
    'canceled before the model': ({}, (CancelBatchException, 'before_batch')),
    'interrupt after the model': ({}, (KeyboardInterrupt, 'after_pred')),
}


@pytest.mark.parametrize('name', STOPS)
def test_autocast_ends_with_a_training_that_is_stopped(name, in_bfloat16):
    """Or else all that follows in the notebook is computed in bfloat16. Worse: autocast's cache of
    weights is never cleared again, so that later trainings compute with old weights."""
    options, stop = STOPS[name]
    inside = []
    learn = tiny_learner(cbs=[AutocastCPU()], model=watched_net(inside), **options)
    if name == 'error in the model':
        learn.model[3] = nn.Conv2d(7, 4, 1)  # does not fit what comes
    if name == 'interrupt in the model':
        learn.model[3] = Interrupted()
    try:
        train(learn, 1, [Stop(stop[0](), at=stop[1])] if stop else [])
    except (RuntimeError, KeyboardInterrupt):
        pass
    else:
        assert name.startswith('canceled') and not hooks_of(learn.model)
    x = torch.ones(2, 2)
    assert not torch.is_autocast_enabled('cpu') and (x @ x).dtype == torch.float32
    assert set(inside) == {torch.bfloat16}
    inside.clear()
    learn.model[3], learn.loss_func = nn.Dropout(0.2), nn.MSELoss()
    before = learn.model[0].weight.detach().clone()
    train(learn, 2)
    assert inside == [torch.bfloat16] * 8
    assert not torch.equal(learn.model[0].weight, before)
    assert not hooks_of(learn.model) and not torch.is_autocast_enabled('cpu')
    learn.model(torch.rand(1, 3, 8, 8))
    assert inside[-1] == torch.float32


def test_a_model_of_a_training_that_failed_can_be_copied_and_trained_by_another(in_bfloat16):
    model = tiny_net()
    with pytest.raises(RuntimeError):
        train(tiny_learner(model=model, loss=failing_loss(RuntimeError('no')), cbs=[AutocastCPU()]))
    twin = copy.deepcopy(model).eval()
    x = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(twin(x), model.eval()(x))
    train(tiny_learner(model=model, cbs=[AutocastCPU()]), 1)
    assert not hooks_of(model)  # neither of the two is left
    with torch.no_grad():
        assert not torch.equal(twin.eval()(x), model.eval()(x))  # the copy has weights of its own


@pytest.mark.parametrize(
    'device, dtype, asked',
    [
        ('cuda', torch.bfloat16, 'to_bf16'),
        ('cuda', torch.float16, 'to_fp16'),
        ('cpu', torch.bfloat16, 'add_cb'),
        ('cpu', None, 'add_cb'),
        ('mps', None, 'add_cb'),
    ],
)
def test_half_precision_is_what_the_device_is_fast_with(device, dtype, asked, monkeypatch):
    "bfloat16 or float16 on a GPU; on others a callback that knows for itself."

    class Stub:
        model = nn.Conv2d(3, 3, 3)
        dls = SimpleNamespace(device=torch.device(device))

        def __getattr__(self, name):
            return lambda *given: (name, *given)

    monkeypatch.setattr(training, 'half_dtype', lambda device: dtype)
    name, *given = half_precision(Stub(), 'generator')
    assert name == asked
    assert [cb.parts for cb in given] == ([('generator',)] if asked == 'add_cb' else [])
    form = torch.contiguous_format if device == 'mps' else torch.channels_last
    assert Stub.model.weight.is_contiguous(memory_format=form)


# A training that is killed


@pytest.mark.parametrize('opt_func', [Adam, RMSProp])
def test_a_training_killed_in_any_epoch_ends_as_if_it_had_not_been(opt_func, tmp_path):
    straight = train(tiny_learner(opt_func=opt_func))
    assert not equal_weights(straight.model, tiny_learner().model, within=0.01)  # it learned
    for epoch, at, when in [(1, 'before_batch', 0), (2, 'after_step', 2), (3, 'before_batch', 0)]:
        path = tmp_path / f'{epoch}'
        with pytest.raises(Killed):
            stop = Stop(Killed(), epoch, when, at)
            train(tiny_learner(opt_func=opt_func), cbs=[CheckpointEachEpoch(path), stop])
        learn = tiny_learner(seed=99, opt_func=opt_func)  # all has to come from the checkpoint
        assert not equal_weights(straight.model, learn.model, within=0.01)
        train(learn, cbs=[CheckpointEachEpoch(path)])
        assert equal_weights(straight.model, learn.model, within=1e-6)


def test_a_training_killed_before_the_first_checkpoint_starts_anew(tmp_path):
    with pytest.raises(Killed):
        train(tiny_learner(), cbs=[CheckpointEachEpoch(tmp_path / 'c'), Stop(Killed(), 0, 1)])
    assert not list(tmp_path.iterdir())
    learn = train(tiny_learner(), cbs=[CheckpointEachEpoch(tmp_path / 'c')])
    assert equal_weights(train(tiny_learner()).model, learn.model, within=1e-6)


def test_a_training_may_be_killed_again_and_again(tmp_path, in_bfloat16):
    straight = train(tiny_learner(cbs=[AutocastCPU()]))
    for run, epoch in enumerate([1, 1, 2, 3, None]):
        cbs = [CheckpointEachEpoch(tmp_path / 'c')]
        learn = tiny_learner(seed=run, cbs=[AutocastCPU()])
        if epoch:
            cbs.append(Stop(Killed(), epoch, 1, 'before_batch', order=-5))
            with pytest.raises(Killed):
                train(learn, cbs=cbs)
        else:
            train(learn, cbs=cbs)
    assert equal_weights(straight.model, learn.model, within=1e-6)


def test_a_training_with_a_worker_goes_on_as_well(tmp_path):
    straight = train(tiny_learner(n_workers=1), 2)
    with pytest.raises(Killed):
        cbs = [CheckpointEachEpoch(tmp_path / 'c'), Stop(Killed(), 1, 1)]
        train(tiny_learner(n_workers=1), 2, cbs)
    learn = train(tiny_learner(seed=9, n_workers=1), 2, [CheckpointEachEpoch(tmp_path / 'c')])
    assert equal_weights(straight.model, learn.model, within=1e-6)


def test_a_finished_training_is_not_trained_again(tmp_path):
    path = tmp_path / 'c'
    first = train(tiny_learner(), cbs=[CheckpointEachEpoch(path)])
    assert equal_weights(first.model, train(tiny_learner()).model)  # the callback changed nothing
    content = path.read_bytes()
    steps = Look(5, lambda cb: cb.iter, 'after_step')
    again = train(tiny_learner(seed=5, cbs=[steps]), cbs=[CheckpointEachEpoch(path)])
    assert not steps.seen
    assert equal_weights(first.model, again.model)
    assert path.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ['c']


def test_another_number_of_epochs_is_refused_and_the_model_stays(tmp_path):
    path = tmp_path / 'c'
    train(tiny_learner(), 2, [CheckpointEachEpoch(path)])
    content = path.read_bytes()
    for epochs in (1, 3):
        learn, same = tiny_learner(seed=4), tiny_learner(seed=4)
        with pytest.raises(EnhanceError) as error:
            train(learn, epochs, [CheckpointEachEpoch(path)])
        message = last_line(error)
        assert str(path) in message and f'(epochs was 2, not {epochs})' in message
        assert equal_weights(learn.model, same.model)
    assert path.read_bytes() == content


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    path, other = tmp_path / 'c', nn.Linear(3, 2)
    save_checkpoint(path, 1, model=other, optimizer=Adam(list(other.parameters()), 0.1))
    with pytest.raises(EnhanceError) as error:
        train(tiny_learner(), 2, [CheckpointEachEpoch(path)])
    assert str(path) in last_line(error)
    learn = tiny_learner()
    learn.create_opt()
    save_checkpoint(path, 1, model=learn.model, optimizer=learn.opt)  # of a loop by hand
    with pytest.raises(EnhanceError):
        train(learn, 2, [CheckpointEachEpoch(path)])
    evil = Evil(tmp_path / 'it ran')
    path.write_bytes(pickle.dumps(evil, protocol=2))
    with pytest.raises(EnhanceError) as error:
        train(tiny_learner(), 1, [CheckpointEachEpoch(path)])
    assert 'weights_only' not in last_line(error) and not evil.folder.exists()


def test_the_callback_loads_to_the_device_of_the_training(tmp_path, monkeypatch):
    asked, load = [], torch.load

    def look(*args, map_location, **kwargs):
        asked.append(map_location)
        return load(*args, map_location=map_location, **kwargs)

    train(tiny_learner(), 1, [CheckpointEachEpoch(tmp_path / 'c')])
    monkeypatch.setattr(torch, 'load', look)
    train(tiny_learner(), 1, [CheckpointEachEpoch(tmp_path / 'c')])
    assert asked == [CPU]


def test_the_callback_does_not_belong_to_a_learner(tmp_path):
    "There it would also act on lr_find, get_preds and validate, and on a second training."
    with pytest.raises(EnhanceError, match='belongs to one training') as error:
        tiny_learner(cbs=[CheckpointEachEpoch(tmp_path / 'c')])
    assert 'fit(…, cbs=CheckpointEachEpoch(path))' in last_line(error)
    assert not list(tmp_path.iterdir())


def test_what_comes_after_a_training_is_not_disturbed(tmp_path):
    path = tmp_path / 'c'
    learn = train(tiny_learner(), 2, [CheckpointEachEpoch(path)])
    content = path.read_bytes()
    with torch.no_grad():
        learn.model[4].bias += 1  # as somebody goes on working with the model
    bias = learn.model[4].bias.detach().clone()
    with learn.no_bar(), learn.no_logging():
        assert np.isfinite(learn.validate()[0])
        predictions, targets = learn.get_preds()
        assert predictions.shape == targets.shape == (2, 3, 8, 8)
        learn.lr_find(num_it=20, show_plot=False)
    assert torch.equal(learn.model[4].bias, bias)
    assert path.read_bytes() == content
    train(learn, 1, [CheckpointEachEpoch(tmp_path / 'd')])  # another training, another file
    assert path.read_bytes() == content and not torch.equal(learn.model[4].bias, bias)


class Float16(Callback):
    "What MixedPrecision does on a GPU that computes in float16: it brings a scaler."

    order = 10

    def __init__(self, value):
        self.value = value

    def before_fit(self):
        self.learn.scaler = torch.amp.GradScaler('cpu', init_scale=self.value)

    def after_step(self):
        self.learn.scaler.load_state_dict(
            {**self.learn.scaler.state_dict(), 'scale': 2 * self.learn.scaler.get_scale()}
        )


def test_the_scaler_of_float16_is_kept_too(tmp_path):
    with pytest.raises(Killed):
        stop = Stop(Killed(), 1, 1)
        train(tiny_learner(), 2, [CheckpointEachEpoch(tmp_path / 'c'), Float16(4.0), stop])
    learn = train(tiny_learner(seed=3), 2, [CheckpointEachEpoch(tmp_path / 'c'), Float16(1024.0)])
    assert learn.scaler.get_scale() == 4 * 2**6  # 3 steps in each epoch


def test_a_training_goes_on_with_another_kind_of_number(tmp_path):
    "Today in float32, tomorrow on a GPU in float16, then in float32: the scale begins anew."
    for first, second in (([], [Float16(4.0)]), ([Float16(4.0)], [])):
        path = tmp_path / f'{len(first)}'
        with pytest.raises(Killed):
            train(tiny_learner(), 2, [CheckpointEachEpoch(path), *first, Stop(Killed(), 1, 1)])
        learn = train(tiny_learner(), 2, [CheckpointEachEpoch(path), *second])
        assert not learn.recorder.values[0] and learn.recorder.values[1]  # the first was skipped
        if second:
            assert learn.scaler.get_scale() == 4 * 2**3


SCRIPT = """
import os, signal, sys
import torch
from tiny import tiny_learner, train
from enhance_lib.toolbox.training import Callback, CheckpointEachEpoch

home = sys.argv[1]
torch.set_num_threads(1)

class Die(Callback):
    order = 90
    def before_batch(self):
        if self.training and (self.epoch, self.iter) == (2, 1):
            os.kill(os.getpid(), signal.SIGKILL)

def die_while_writing():
    save = torch.save
    def half(states, target):
        save(states, target)
        if states['step'] == 3:
            os.truncate(target, os.path.getsize(target) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    torch.save = half

def run(name, seed, checkpoint, die=None):
    if die == 'writing':
        die_while_writing()
    learn = tiny_learner(seed, cbs=[Die()] if die == 'training' else [])
    train(learn, cbs=[CheckpointEachEpoch(f'{home}/{checkpoint}')])
    torch.save(learn.model.state_dict(), f'{home}/{name}.weights')

# a process for each run: each is really killed, and the libraries are imported only once
for job in [
    ('straight', 0, 'one'),
    ('killed', 0, 'two', 'training'),
    ('killed-again', 1, 'two', 'writing'),
    ('finished', 2, 'two'),
]:
    child = os.fork()
    if not child:
        try:
            run(*job)
        except BaseException as e:
            print(e, file=sys.stderr)
            os._exit(1)
        os._exit(0)
    print(job[0], os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_training_that_is_really_killed_goes_on(tmp_path):
    "In the middle of an epoch, and again in the middle of writing a checkpoint."
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, '-c', SCRIPT, tmp_path],
        env={**os.environ, 'PYTHONPATH': f'{here}{os.pathsep}{here.parent}'},
        capture_output=True,
        text=True,
        timeout=120,
    )
    ends = ['straight 0', 'killed -9', 'killed-again -9', 'finished 0']
    assert done.stdout.splitlines() == ends, done.stderr
    straight, finished = (
        torch.load(tmp_path / f'{name}.weights') for name in ('straight', 'finished')
    )
    assert all((straight[k] - finished[k]).abs().max() <= 1e-6 for k in straight)


# PSNR


@pytest.mark.parametrize('task', ['x1', 'x2'])
def test_psnr_of_batches_is_that_of_scikit_image(task):
    "A mean over photos, not over batches; a small input is enlarged as by Pillow."
    photos = [noise((24, 24), seed=i).resize((48, 48), Image.Resampling.BICUBIC) for i in range(3)]
    recipe = TASKS['x2'] if task == 'x2' else GRAIN
    dls = recipe_dls(photos, photos, recipe, 32, bs=2, device='cpu')
    metrics = [BatchPSNR('input', 'x'), BatchPSNR()]
    learner = SimpleNamespace()
    for metric in metrics:
        metric.reset()
        assert metric.value is None
    wanted = {'input': [], 'output': []}
    for degraded, clean in dls.valid:
        shown = clean + 0.2 * torch.randn_like(clean)  # leaves [0, 1]
        learner.xb, learner.yb, learner.pred = (degraded,), (clean,), shown
        for metric in metrics:
            metric.accumulate(learner)
        for x, y, made in zip(degraded, clean, shown):
            larger = to_photo(x).resize((32, 32), Image.Resampling.BICUBIC)
            pair = [np.asarray(p).astype(float) for p in (to_photo(y), larger)]
            wanted['input'].append(peak_signal_noise_ratio(*pair, data_range=255))
            pair = [p.clamp(0, 1).double().numpy() for p in (y, made)]
            wanted['output'].append(peak_signal_noise_ratio(*pair, data_range=1))
    assert len(wanted['input']) == 3
    assert metrics[0].value == pytest.approx(np.mean(wanted['input']), abs=0.02)  # Pillow rounds
    assert metrics[1].value == pytest.approx(np.mean(wanted['output']), abs=1e-4)
    assert [m.name for m in metrics] == ['input', 'output']


def test_psnr_of_a_perfect_prediction_is_a_number():
    metric = BatchPSNR()
    metric.reset()
    x = torch.rand(2, 3, 8, 8)
    metric.accumulate(SimpleNamespace(xb=(x,), yb=(x,), pred=x.clone()))
    assert metric.value == pytest.approx(100)


def test_a_psnr_learner_shows_input_and_output():
    seed_all(0)
    learn = train(psnr_learner(tiny_dls(), tiny_net(), nn.L1Loss(), half=False, **MUON), 1)
    assert learn.recorder.metric_names[:5] == [
        'epoch',
        'train_loss',
        'valid_loss',
        'input',
        'output',
    ]
    assert isinstance(learn.loss_func, nn.L1Loss) and learn.wd == 0
    assert not any(isinstance(cb, AutocastCPU) for cb in learn.cbs)
    learn = psnr_learner(tiny_dls(), tiny_net())
    assert any(isinstance(cb, AutocastCPU) for cb in learn.cbs)


# Muon


def test_muon_gets_kernels_and_adam_the_rest():
    "Together both groups are all parameters, each of them once."
    net = nn.utils.weight_norm(nn.Conv2d(4, 4, 3))  # with a length, (4, 1, 1, 1), for each kernel
    net = nn.Sequential(net, nn.BatchNorm2d(4), nn.PReLU(), nn.Conv2d(4, 2, 1))
    net.last = nn.Conv2d(2, 3, 5)
    net.blast = nn.Conv2d(3, 3, 3)  # merely ends in it
    adam, kernels = muon_groups(net)
    assert adam['use_fallback'] and 'use_fallback' not in kernels
    found = [tuple(p.shape) for p in kernels['params']]
    assert found == [(4, 4, 3, 3), (2, 4, 1, 1), (3, 3, 3, 3)]
    together = [id(p) for group in (adam, kernels) for p in group['params']]
    assert sorted(together) == sorted(id(p) for p in net.parameters())


def test_a_step_of_muon_is_about_as_long_in_all_directions():
    "A matrix of m×n moves by .2 √max(m, n) times the rate; only faint directions by less."
    seed_all(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU())
    net.last = nn.Conv2d(16, 3, 3, padding=1)
    before = [p.detach().clone() for p in net.parameters()]
    learn = psnr_learner(tiny_dls(), net, half=False, **MUON)
    train(learn, 1, [Stop(CancelFitException(), 0, 0, 'after_step')], lr=slice(2.5e-3, 2.5e-2))
    # one cycle begins with a 25th of the highest rate
    rates = [h['lr'] for h in learn.opt.hypers]
    assert rates == pytest.approx([1e-4, 1e-3], rel=1e-3)
    kernels = {id(p) for p in muon_groups(net)[1]['params']}
    assert len(kernels) == 1
    for p, old in zip(net.parameters(), before):
        moved = p.detach() - old
        if id(p) not in kernels:
            # Adam with Nesterov's momentum: the first step is .95 + 1 times the rate
            assert float(moved.abs().max()) == pytest.approx(1.95 * rates[0], rel=0.01)
            continue
        gradient = learn.opt.opt.state[p]['momentum_buffer'].flatten(1)  # of the one step
        step = moved.flatten(1) / rates[1]
        lengths = torch.linalg.svdvals(step) / (0.2 * max(step.shape) ** 0.5)
        assert 0.8 < float(lengths.max()) < 1.25
        strong = torch.linalg.svdvals(gradient) / torch.linalg.norm(gradient) > 0.02
        assert strong.sum() > 3 and float(lengths[: int(strong.sum())].min()) > 0.6


# An average of the weights


class Weights(Callback):
    "Writes down the weights after each step."

    def __init__(self):
        self.seen = []

    def after_batch(self):
        if self.training:
            self.seen.append(copy.deepcopy(dict(self.model.state_dict())))


def averaged_by_hand(seen, decay):
    "The mean of the first steps, then a share of each new one; numbers that count are the last."
    average = {k: v.double() for k, v in seen[0].items()}
    for n, now in enumerate(seen[1:], 2):
        share = max(1 / n, 1 - decay)
        average = {k: average[k] * (1 - share) + share * now[k].double() for k in average}
    counts = {k: v.double() for k, v in seen[-1].items() if not v.is_floating_point()}
    return average | counts


@pytest.mark.parametrize('half', [False, True])
def test_the_average_is_that_by_hand(half, in_bfloat16):
    "Of the weights and of batch norm's means, and in half precision as well."
    average, weights = WeightAverage(0.6), Weights()
    learn = tiny_learner(cbs=[AutocastCPU()] if half else [])
    train(learn, 2, cbs=[average, weights])
    assert len(weights.seen) == 6
    last = weights.seen[-1]
    assert all(torch.equal(v, last[k]) for k, v in learn.model.state_dict().items())
    wanted = averaged_by_hand(weights.seen, 0.6)
    average.keep()
    kept = learn.model.state_dict()
    assert kept.keys() == wanted.keys() and not torch.equal(kept['0.weight'], last['0.weight'])
    assert all((kept[k] - wanted[k]).abs().max() < 1e-6 for k in wanted)


@pytest.mark.parametrize('epoch', [1, 3])
def test_a_killed_training_ends_in_the_same_average(epoch, tmp_path):
    def run(path, seed, *cbs):
        average, learn = WeightAverage(0.7), tiny_learner(seed)
        train(learn, cbs=[average, CheckpointEachEpoch(path, average=average), *cbs])
        average.keep()
        return learn.model

    straight = run(tmp_path / 'one', 0)
    with pytest.raises(Killed):
        run(tmp_path / 'two', 0, Stop(Killed(), epoch, 1))
    resumed = run(tmp_path / 'two', 9)
    assert equal_weights(straight, resumed, within=1e-6)
    assert not equal_weights(straight, train(tiny_learner()).model, within=1e-4)


def test_the_average_of_a_network_that_cannot_be_copied():
    "Weight norm of the old kind, as in fastai's U-Net."
    model = tiny_net()
    model[0] = nn.utils.weight_norm(model[0])
    model(torch.rand(1, 3, 8, 8))
    average, weights = WeightAverage(0.5), Weights()
    learn = train(tiny_learner(model=model), 1, cbs=[average, weights])
    average.keep()
    wanted = averaged_by_hand(weights.seen, 0.5)['0.weight_v']
    assert (learn.model[0].weight_v - wanted).abs().max() < 1e-6


def test_an_average_of_nothing_is_nothing():
    learn, average = tiny_learner(), WeightAverage()
    same = copy.deepcopy(learn.model)
    average.keep()
    assert equal_weights(learn.model, same)


# Pictures


def test_snapshots_show_the_network_and_disturb_nothing():
    photo = noise((16, 12))
    snapshots = Snapshots(photo, every=4)
    learn = train(tiny_learner(), 3, cbs=[snapshots])  # 9 steps
    assert list(snapshots.frames) == ['step 0', 'step 4', 'step 8']
    assert {p.size for p in snapshots.frames.values()} == {(16, 12)}
    with torch.no_grad():
        first = to_photo(tiny_learner().model.eval()(snapshots.x))
    assert snapshots.frames['step 0'].tobytes() == first.tobytes()  # in eval mode
    assert equal_weights(learn.model, train(tiny_learner(), 3).model)


def test_both_photos_of_a_pair_are_augmented_alike():
    learn, augment = tiny_learner(), Augment(degrees=30)
    learn.add_cb(augment)
    _, clean = learn.dls.one_batch()
    learn.xb, learn.yb, learn.training = (clean,), (clean,), True
    augment('before_batch')
    assert torch.equal(learn.xb[0], learn.yb[0]) and not torch.equal(learn.xb[0], clean)
    assert type(learn.xb[0]) is torch.Tensor and learn.xb[0].shape == clean.shape
    assert 0 <= float(learn.xb[0].min()) and float(learn.xb[0].max()) <= 1
    learn.xb, learn.yb, learn.training = (clean,), (clean,), False
    augment('before_batch')
    assert learn.xb[0] is clean


def test_seeds_are_set_from_here():
    assert 'set_seed' in training.__all__
    draws = []
    for _ in range(2):
        training.set_seed(3)
        draws.append((float(torch.rand(1)), np.random.rand()))
    assert draws[0] == draws[1]
