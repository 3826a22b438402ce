"""Every recipe trains, goes on where it was killed, and belongs to a published model."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from enhance_lib.applications import publish
from enhance_lib.applications.publish import PUBLISHED, Round, shortened, train_published
from enhance_lib.applications.scoreboard import TASKS
from enhance_lib.toolbox.errors import EnhanceError
from enhance_lib.toolbox.models import load_model, published
from enhance_lib.toolbox.show import Budget

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'tools'))

SMOKE = Budget('smoke')


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "Two small photos: the first validates."
    folder, rng = tmp_path_factory.mktemp('photos'), np.random.default_rng(0)
    paths = []
    for i in range(2):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8))
        path = folder / f'{i}.png'
        coarse.resize((288, 288), Image.Resampling.BICUBIC).save(path)
        paths.append(path)
    return paths


@pytest.fixture(autouse=True)
def random_features(monkeypatch):
    "The trained network is not needed to see that a round runs."
    monkeypatch.setenv('ENHANCE_FEATURES', 'random')


def test_every_published_model_has_a_recipe_and_the_other_way_round():
    in_rounds = {name for name in published() if name.startswith('restore-')}  # see test_rounds
    assert set(PUBLISHED) == set(published()) - in_rounds
    for name, plan in PUBLISHED.items():
        card = load_model(name).card
        assert plan.task == card['task'] and plan.task in TASKS
        assert bool(plan.start) == bool(card['training'].get('start'))


@pytest.mark.parametrize('name', PUBLISHED)
def test_every_recipe_trains(name, photos, tmp_path, monkeypatch):
    "The first round, and the first that runs otherwise: the others differ in numbers alone."
    plan = PUBLISHED[name]
    rounds = [
        part for i, part in enumerate(plan.rounds) if i == 0 or part.run != plan.rounds[0].run
    ]
    short = publish.replace(plan, rounds=tuple(rounds[:2]))
    monkeypatch.setitem(PUBLISHED, name, short)
    start = plan.model().state_dict()
    model, history = train_published(name, photos, tmp_path / 'a.ckpt', SMOKE)
    assert len(history) == len(short.rounds)
    assert all(np.isfinite(list(row.values())).all() for row in history)
    assert type(model) is type(load_model(name)) and model.scale == load_model(name).scale
    assert model.arguments == load_model(name).arguments
    assert any(not torch.equal(v.cpu(), start[k]) for k, v in model.state_dict().items())


def test_a_killed_training_ends_in_the_same_weights(photos, tmp_path, monkeypatch):
    straight, _ = train_published('realtime-x4', photos, tmp_path / 'one.ckpt', SMOKE)
    calls = []

    def dies(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(*arguments)

    run = publish.run_learner
    monkeypatch.setattr(publish, 'run_learner', dies)
    with pytest.raises(KeyboardInterrupt):
        train_published('realtime-x4', photos, tmp_path / 'two.ckpt', SMOKE)
    again, _ = train_published('realtime-x4', photos, tmp_path / 'two.ckpt', SMOKE)
    for a, b in zip(straight.state_dict().values(), again.state_dict().values()):
        assert torch.equal(a, b)


def test_keep_ends_between_the_weights_before_and_after(photos, tmp_path, monkeypatch):
    ends, real = {}, PUBLISHED['srcnn-x2']
    for keep in (0.0, 0.5, 1.0):
        rounds = (publish.replace(real.rounds[0], keep=keep),)
        torch.manual_seed(3)
        kept = real.model()
        plan = publish.replace(real, rounds=rounds, model=lambda kept=kept: kept)
        monkeypatch.setitem(PUBLISHED, 'srcnn-x2', plan)
        before = kept.conv1.weight.detach().clone()
        model, _ = train_published('srcnn-x2', photos, tmp_path / f'{keep}.ckpt', SMOKE)
        ends[keep] = model.conv1.weight.detach() - before
    assert float(ends[0.0].abs().max()) == 0
    assert float(ends[1.0].abs().max()) > 0
    assert torch.allclose(ends[0.5], ends[1.0] / 2, atol=1e-7)


def test_only_full_leaves_a_round_as_it_is():
    part = Round(TASKS['x4'], 7, 1e-3, size=160, bs=16, per_photo=20)
    assert shortened(part, Budget('full')) == part
    short = shortened(part, SMOKE)
    assert (short.epochs, short.size, short.bs, short.per_photo, short.lr) == (1, 64, 4, 1, 1e-3)


def test_what_cannot_be_trained_is_said(photos, tmp_path):
    with pytest.raises(EnhanceError, match='Did you mean realtime-x4'):
        train_published('realtime-x5', photos, tmp_path / 'a.ckpt', SMOKE)
    with pytest.raises(EnhanceError, match='no photo to'):
        train_published('srcnn-x2', photos[:1], tmp_path / 'a.ckpt', SMOKE)


def test_make_weights_refuses_and_explains(capsys, tmp_path):
    from weights import main

    assert main(['--models', 'srcnn', '--photos', str(tmp_path)]) == 2
    assert 'srcnn-x2' in capsys.readouterr().err


def test_make_weights_writes_weights_and_card(photos, tmp_path, monkeypatch):
    import weights

    monkeypatch.setattr(weights, 'SHARED', tmp_path / 'none')
    monkeypatch.setattr(weights, 'ROOT', tmp_path)
    arguments = ['--models', 'srcnn-x4', '--photos', str(photos[0].parent), '--budget', 'smoke']
    assert weights.main([*arguments, '--out', str(tmp_path / 'out')]) == 0
    model = load_model(tmp_path / 'out' / 'srcnn-x4.safetensors')
    assert model.card['budget'] == 'smoke' and model.card['scores'] == {}
    assert model.card['training']['epochs'] == 1 and model.card['license'] == 'Apache-2.0'
