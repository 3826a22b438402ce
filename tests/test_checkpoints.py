"""Checkpoints: a training that is killed goes on as if it had not been, or says why it cannot."""

import errno
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from common import refused
from fastcore.foundation import L
from tiny import (
    Adam,
    Evil,
    Killed,
    disk_of,
    equal_weights,
    seed_all,
    tiny_dls,
    tiny_net,
    two_groups,
)
from torch import nn
from torch.nn import functional as F

from enhance_lib.toolbox import checkpoints
from enhance_lib.toolbox.checkpoints import (
    LoaderState,
    load_checkpoint,
    plain,
    random_states,
    save_checkpoint,
    set_random_states,
)

# Random states


def test_random_states_bring_the_numbers_back(tmp_path):
    def draw():
        np.random.standard_normal()  # leaves the second of two numbers behind
        return (
            random.random(),
            random.gauss(0, 1),
            np.random.standard_normal(),
            np.random.randint(2**31),
            float(torch.rand(1)),
        )

    seed_all(1)
    random.gauss(0, 1), np.random.standard_normal()  # halfway through a pair
    states = random_states()
    path = tmp_path / 'checkpoint'
    save_checkpoint(path, 7)
    first = draw()
    assert draw() != first
    set_random_states(states)
    assert draw() == first
    assert load_checkpoint(path) == (7, {})
    assert draw() == first


def test_random_states_are_plain(tmp_path):
    torch.save(random_states(), tmp_path / 'states')
    kept = torch.load(tmp_path / 'states', weights_only=True)
    assert kept.keys() == {'python', 'numpy', 'torch', 'cuda', 'mps'}


def test_plain_values_by_hand():
    class Kind(torch.Tensor): ...

    made = plain(
        {'a': [np.float32(0.5), (np.arange(2), L(1, 2))], 'b': torch.ones(1).as_subclass(Kind)}
    )
    assert made['a'] == [0.5, ([0, 1], [1, 2])] and type(made['a'][1][1]) is list
    assert type(made['b']) is torch.Tensor


# What is kept


def test_a_checkpoint_that_is_not_there_is_a_start(tmp_path):
    model = tiny_net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    assert load_checkpoint(tmp_path / 'gone', model=model) == (0, {})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_checkpoint_keeps_parts_and_values(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / 'deep' / 'er' / 'checkpoint'
    model, other = tiny_net(), tiny_net()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    model(torch.rand(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    history = [{'loss': np.float32(0.5), 'rates': (np.arange(2), 3)}]
    save_checkpoint(path, 3, model=model, optimizer=optimizer, history=history, name='x', n=None)
    optimizer2 = torch.optim.Adam(other.parameters(), 0.5)
    step, kept = load_checkpoint(path, model=other, optimizer=optimizer2, name='x', n=None)
    assert step == 3 and equal_weights(model, other)
    assert kept['history'] == [{'loss': 0.5, 'rates': ([0, 1], 3)}]
    assert kept['name'] == 'x' and kept['n'] is None  # given back, as history is, asked for or not
    assert optimizer2.param_groups[0]['lr'] == 0.01
    for (_, a), (_, b) in zip(optimizer.state.items(), optimizer2.state.items()):
        assert torch.equal(a['exp_avg'], b['exp_avg'])
    assert [p.name for p in path.parent.iterdir()] == ['checkpoint']


def test_the_order_of_the_photos_comes_back(tmp_path):
    dls, other = tiny_dls(), tiny_dls()
    order, same = LoaderState(dls), LoaderState(other)
    save_checkpoint(tmp_path / 'c', 1, order=order)
    first = [dls.train.get_idxs() for _ in range(3) if dls.train.randomize() is None]
    load_checkpoint(tmp_path / 'c', order=same)
    again = [other.train.get_idxs() for _ in range(3) if other.train.randomize() is None]
    assert first == again and len(set(map(tuple, first))) > 1


def test_what_an_optimizer_remembers_goes_where_its_weights_are(tmp_path, monkeypatch):
    kept = trained_parts('fastai', 0, 1)
    save_checkpoint(tmp_path / 'c', 1, optimizer=kept['optimizer'])
    there = tiny_net().to('meta')  # a device that every machine has, but random numbers have not
    monkeypatch.setattr(checkpoints, 'set_random_states', lambda states: None)
    optimizer = Adam(two_groups(there), 0.1)
    load_checkpoint(tmp_path / 'c', device='meta', optimizer=optimizer)
    states = [optimizer.state[p]['grad_avg'].device.type for p in there.parameters()]
    assert set(states) == {'meta'}


# A loop by hand that is killed


def loop_by_hand(seed, path, epochs=4, die=None):
    "A loop as a lesson would write it, which keeps the order of its photos as well."
    seed_all(seed)
    dls, model = tiny_dls(), tiny_net()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=3 * epochs)
    parts = {'model': model, 'optimizer': optimizer, 'schedule': schedule}
    parts |= {'order': LoaderState(dls), 'epochs': epochs}
    start, kept = load_checkpoint(path, **parts)
    losses = kept.get('losses', [])
    for epoch in range(start, epochs):
        for i, (degraded, clean) in enumerate(dls.train):
            if (epoch, i) == die:
                raise Killed
            loss = F.mse_loss(model(degraded), clean)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        save_checkpoint(path, epoch + 1, **parts, losses=losses)
    return model, losses


def test_a_loop_by_hand_goes_on_as_if_it_had_not_been_killed(tmp_path):
    straight, losses = loop_by_hand(0, tmp_path / 'straight')
    for epoch in (1, 2, 3):
        path = tmp_path / f'killed in {epoch}'
        with pytest.raises(Killed):
            loop_by_hand(0, path, die=(epoch, 1))
        model, again = loop_by_hand(7, path)  # all has to come from the checkpoint
        assert equal_weights(straight, model, within=1e-6)
        assert len(losses) == 12 and again == pytest.approx(losses, abs=1e-6)


# What does not fit


def trained_parts(kind, seed, steps):
    "A network, its optimizer and an order, after some steps."
    torch.manual_seed(seed)
    model = tiny_net()
    lr = 0.1 + seed
    by_torch = kind == 'torch'
    optimizer = (
        torch.optim.Adam(model.parameters(), lr) if by_torch else Adam(two_groups(model), lr)
    )
    for _ in range(steps):
        model(torch.rand(2, 3, 5, 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {'model': model, 'optimizer': optimizer, 'order': LoaderState(tiny_dls())}


def bits_of(parts):
    "All that parts hold, in plain numbers."

    def plain(x):
        if isinstance(x, torch.Tensor):
            return str(x.dtype), x.tolist()
        if isinstance(x, dict):
            return {k: plain(v) for k, v in x.items()}
        return [plain(v) for v in x] if isinstance(x, list | tuple | L) else x

    return {name: plain(part.state_dict()) for name, part in parts.items()}


REFUSALS = {
    'another value': ({'epochs': 3}, {}, '(epochs was 2, not 3)'),
    'another name': ({'epochs': 2, 'name': 'y'}, {}, '(name was x, not y)'),
    'no such value': ({'seed': 0}, {}, 'seed'),
    'no such part': ({'schedule': nn.Linear(1, 1)}, {}, 'schedule'),
    'another part': ({'more': nn.Linear(1, 1)}, {}, 'Linear'),
    'no random states': ({}, {'random': {}}, ''),
    'spoiled random states': ({}, {'random': {'python': (3, (1, 2), None)}}, ''),
    'no optimizer': ({}, {'optimizer': 5}, ''),
    'no order': ({}, {'order': {'order': 'x'}}, ''),
}


@pytest.mark.parametrize('steps', [0, 2])
@pytest.mark.parametrize('kind', ['fastai', 'torch'])
def test_any_refusal_leaves_all_parts_as_they_were(kind, steps, tmp_path):
    path = tmp_path / 'c'
    kept = trained_parts(kind, 0, 3)
    for more, changes, words in REFUSALS.values():
        save_checkpoint(path, 1, **kept, epochs=2, name='x', more=nn.Linear(2, 2))
        content = torch.load(path, weights_only=True)
        for name, value in changes.items():
            (content if name == 'random' else content['parts'])[name] = value
        torch.save(content, path)
        parts = trained_parts(kind, 5, steps)
        before, same = bits_of(parts), trained_parts(kind, 5, steps)
        with refused(str(path), words, 'Remove it'):
            load_checkpoint(path, **parts, **more)
        assert bits_of(parts) == before
        for p in (parts, same):  # and they go on as if nothing had been
            torch.manual_seed(1)
            p['model'](torch.rand(2, 3, 5, 5)).square().mean().backward()
            p['optimizer'].step()
        assert equal_weights(parts['model'], same['model'])
    save_checkpoint(path, 1, **kept, epochs=2)
    load_checkpoint(path, **parts, epochs=2)
    assert bits_of(parts) == bits_of(kept)


def test_a_model_that_fits_in_its_first_layer_stays_as_it_was(tmp_path):
    kept, other = tiny_net()[:1], tiny_net()
    save_checkpoint(tmp_path / 'c', 1, model=kept)
    before = bits_of({'model': other})
    with refused(str(tmp_path / 'c')):
        load_checkpoint(tmp_path / 'c', model=other)
    assert bits_of({'model': other}) == before


def test_a_damaged_checkpoint_is_refused(tmp_path):
    path = tmp_path / 'c'
    save_checkpoint(path, 1, model=tiny_net())
    whole = path.read_bytes()
    for content in [b'', b'x', whole[:10], whole[: len(whole) // 2], whole[:-1], b'\n' * 50]:
        path.write_bytes(content)
        with refused(str(path), 'Remove it'):
            load_checkpoint(path, model=tiny_net())
    path.unlink()
    path.mkdir()
    with refused(str(path)):
        load_checkpoint(path, model=tiny_net())


@pytest.mark.parametrize(
    'content', [[], 5, {}, {'parts': {}}, {'parts': {}, 'random': {}, 'step': 1}, None]
)
def test_a_checkpoint_of_another_kind_is_refused(content, tmp_path):
    torch.save(content, tmp_path / 'c')
    with refused(str(tmp_path / 'c'), 'Remove it'):
        load_checkpoint(tmp_path / 'c')


@pytest.mark.parametrize('kind', ['pickle', 'torch', 'old torch', 'part'])
def test_a_program_in_a_checkpoint_is_not_run(kind, tmp_path):
    path, evil = tmp_path / 'c', Evil(tmp_path / 'it ran')
    if kind == 'pickle':
        path.write_bytes(pickle.dumps(evil, protocol=2))
    elif kind == 'part':
        save_checkpoint(path, 1, model=tiny_net(), extra=evil)
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=kind == 'torch')
    with refused(str(path)) as error:
        load_checkpoint(path, model=tiny_net())
    assert 'weights_only' not in str(error.value)
    assert not evil.folder.exists()
    torch.load(path, weights_only=False) if kind != 'pickle' else pickle.loads(path.read_bytes())
    assert evil.folder.exists()  # it would have run


# Written whole, or not at all


@pytest.mark.parametrize('failure', [OSError(errno.ENOSPC, 'No space left'), Killed()])
def test_a_checkpoint_is_replaced_whole_or_not_at_all(failure, tmp_path, monkeypatch):
    path = tmp_path / 'c'
    save_checkpoint(path, 1, model=tiny_net())
    whole = path.read_bytes()

    def half(states, target):
        Path(target).write_bytes(whole[: len(whole) // 2])
        raise failure

    monkeypatch.setattr(torch, 'save', half)
    if isinstance(failure, OSError):
        with refused(str(path), 'No space left'):
            save_checkpoint(path, 2, model=tiny_net())
    else:
        with pytest.raises(Killed):
            save_checkpoint(path, 2, model=tiny_net())
    assert path.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == ['c']
    assert load_checkpoint(path)[0] == 1


def test_a_full_disk_costs_no_checkpoint(tmp_path):
    path = tmp_path / 'c'
    save_checkpoint(path, 1)
    with refused(str(path)), disk_of(100_000):
        save_checkpoint(path, 2, model=nn.Linear(1000, 1000))
    assert load_checkpoint(path)[0] == 1
    assert [p.name for p in tmp_path.iterdir()] == ['c']
