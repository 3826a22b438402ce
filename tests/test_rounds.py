"""The tool that trains the restorers: rounds by the clock, stopped and gone on with."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'tools'))
import rounds

from enhance_lib.applications.restorer import Restorer
from enhance_lib.toolbox.models import load_model, save_weights

NAME = 'restore-x1'


@pytest.fixture
def photos(tmp_path):
    "A folder of 22 photos, of which two validate."
    rng = np.random.default_rng(0)
    folder = tmp_path / 'photos'
    folder.mkdir()
    for i in range(22):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize((96, 80), Image.Resampling.BICUBIC).save(folder / f'{i:02}.png')
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    "A small network, small crops, and no benchmark."
    monkeypatch.setattr(rounds, 'Restorer', lambda scale: Restorer(scale, (8, 8), 1, 1))
    monkeypatch.setattr(rounds, 'SIZE', 32)
    monkeypatch.setattr(rounds, 'BATCH', 2)
    monkeypatch.setattr(rounds, 'EPOCH', 40)
    monkeypatch.setattr(rounds, 'VALID', {'size': 32, 'crops': 2})
    monkeypatch.setattr(rounds, 'wild_scores', lambda *_: {'x1': {'luma': 29.0}})
    monkeypatch.setattr(rounds, 'published', list)


def one_round(photos, tmp_path, minutes=0.05, name=NAME, out=None):
    rounds.train(name, [photos], minutes, tmp_path / 'home', out or tmp_path / 'out', 0)
    return tmp_path / 'home' / name


def rows(folder):
    with (folder / 'log.csv').open(newline='') as file:
        return list(csv.DictReader(file))


@pytest.fixture
def out(tmp_path):
    (tmp_path / 'out').mkdir()
    return tmp_path / 'out'


def test_a_round_ends_on_time_and_publishes(photos, tmp_path, out, capsys):
    folder = one_round(photos, tmp_path)
    curve = rows(folder)
    assert len(curve) > 1 and all(row['round'] == '1' for row in curve)
    assert float(curve[-1]['minutes']) == pytest.approx(0.05, abs=0.05)
    steps = [int(row['steps']) for row in curve]
    assert steps == sorted(steps) and steps[0] == 20  # twenty steps are an epoch of forty crops
    assert {p.name for p in folder.glob('sheet*')} == {'sheet-1-0.png', 'sheet-1-end.png'}
    assert Image.open(folder / 'sheet-1-end.png').width > 3 * 32
    assert not (folder / 'round.ckpt').exists()
    (done,) = json.loads((folder / 'rounds.json').read_text())
    assert done['steps'] == steps[-1] and done['minutes'] == 0.05
    model = load_model(out / f'{NAME}.safetensors')
    assert model.card['training']['rounds'] == [done]
    assert model.card['scores']['x1']['luma'] == 29.0 and model.card['task'] == 'wild'
    assert 'published' in capsys.readouterr().out


def test_the_rate_rises_stays_and_falls_and_the_next_round_is_gentler(
    photos, tmp_path, out, monkeypatch
):
    rates, began = [], []

    def before_batch(self, original=rounds.Clock.before_batch):
        original(self)
        if self.training:
            rates.append((self.share(), self.opt.hypers[-1]['lr']))

    def before_fit(self, original=rounds.Clock.before_fit):
        original(self)
        began.append({k: v.clone() for k, v in self.model.state_dict().items()})

    monkeypatch.setattr(rounds.Clock, 'before_batch', before_batch)
    monkeypatch.setattr(rounds.Clock, 'before_fit', before_fit)
    monkeypatch.setattr(rounds, 'WARM_UP', 5)
    folder = one_round(photos, tmp_path)
    assert rates[0][1] == pytest.approx(3e-3 / 5)
    assert {rate for share, rate in rates[5:] if share < 0.29} == {3e-3}
    falling = [(share, rate) for share, rate in rates if share > 0.35]
    assert all(
        rate == pytest.approx(3e-3 * (1 - s) / 0.7, rel=0.2, abs=1e-4) for s, rate in falling
    )
    ended = load_model(folder / f'{NAME}.safetensors').state_dict()
    rates.clear()
    one_round(photos, tmp_path)
    assert all(torch.equal(v, ended[k]) for k, v in began[1].items())
    assert max(rate for _, rate in rates) == 2e-3
    assert [row['round'] for row in rows(folder)][-1] == '2'
    done = json.loads((folder / 'rounds.json').read_text())
    assert [row['rate'] for row in done] == [3e-3, 2e-3]


def test_a_round_that_was_stopped_goes_on(photos, tmp_path, out, monkeypatch, capsys):
    stopped_at = []

    def stop(self, original=rounds.Clock.after_batch):
        original(self)
        if self.training and self.steps == 50:
            stopped_at.append(self.seconds)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rounds.Clock, 'after_batch', stop)
        arguments = [NAME, '--minutes', '0.1', '--photos', str(photos), '--workers', '0']
        places = ['--home', str(tmp_path / 'home'), '--out', str(out)]
        assert rounds.main([*arguments, *places]) == 130
    assert 'goes on from the last checkpoint' in capsys.readouterr().err
    folder = tmp_path / 'home' / NAME
    kept = torch.load(folder / 'round.ckpt', weights_only=True)['parts']
    assert kept['clock']['steps'] == 40 and not list(out.iterdir())
    assert rounds.main([*arguments, *places]) == 0
    assert 'round 1 goes on' in capsys.readouterr().out
    steps = [int(row['steps']) for row in rows(folder)]
    assert steps[:3] == [20, 40, 60]
    (done,) = json.loads((folder / 'rounds.json').read_text())
    assert done['steps'] == steps[-1]


def test_what_is_published_stays_if_it_is_better(photos, tmp_path, out, capsys):
    one_round(photos, tmp_path)
    first = (out / f'{NAME}.safetensors').read_bytes()
    path = tmp_path / 'home' / NAME / 'rounds.json'
    assert json.loads(path.read_text())
    dls = rounds.recipe_dls([Image.new('RGB', (64, 64))] * 2, [Image.new('RGB', (64, 64))] * 2,
                            rounds.wild_recipe(), size=32, bs=2)  # fmt: skip
    folder = tmp_path / 'home' / NAME
    worse = [{'minutes': 1, 'steps': 1, 'L1': 9.0, 'output dB': 1.0}]
    rounds.publish(NAME, dls, worse, [], out, folder)
    assert (out / f'{NAME}.safetensors').read_bytes() == first
    assert 'not better' in capsys.readouterr().out
    better = [{**worse[0], 'L1': 0.0}]
    save_weights(Restorer(1, (8, 8), 1, 1), folder / f'{NAME}.safetensors')
    rounds.publish(NAME, dls, better, [], out, folder)
    assert (out / f'{NAME}.safetensors').read_bytes() != first


def test_a_larger_one_begins_with_what_the_first_knows(monkeypatch, tmp_path):
    knows = Restorer(1, (8, 8), 1, 1)
    torch.nn.init.normal_(knows.last.weight)
    monkeypatch.setattr(rounds, 'published', lambda: [NAME])
    monkeypatch.setattr(rounds, 'load_model', lambda name: knows)
    for name in ('restore-x2', 'restore-x4'):
        model = rounds.new_model(name, tmp_path)
        assert torch.equal(model.middle[0].conv1.weight, knows.middle[0].conv1.weight)
        assert not model.last.weight.any(), 'it begins with bicubic'
        assert model.head.weight.shape[1] == 3


def test_without_checkpoints_a_round_goes_on_from_what_is_published(monkeypatch, tmp_path):
    "The folder of checkpoints is not in the repository: a new machine has none."
    knows = Restorer(1, (8, 8), 1, 1)
    knows.card = {'training': {'rounds': [{'minutes': 90}, {'minutes': 60}]}}
    monkeypatch.setattr(rounds, 'published', lambda: [NAME])
    monkeypatch.setattr(rounds, 'load_model', lambda name: knows)
    assert rounds.new_model(NAME, tmp_path) is knows
    clock = rounds.Clock(tmp_path / NAME, 1, None)
    assert clock.number == 3
    assert rounds.Clock(tmp_path / 'restore-x2', 1, None).number == 1


def test_without_photos_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rounds, 'SHARED', tmp_path)
    assert rounds.main([NAME, '--home', str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith('Name a folder of photos')
    assert rounds.main([NAME, '--home', str(tmp_path), '--photos', str(tmp_path / 'no')]) == 2
    assert 'no' in capsys.readouterr().err
