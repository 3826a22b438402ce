"""The tool that trains the restorers: rounds by the clock, stopped and gone on with."""

import csv
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'tools'))
import rounds
import wild

from enhance_lib.applications.restorer import Restorer
from enhance_lib.toolbox.errors import EnhanceError
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
    "A small network, small crops, no benchmark, and a clock on which each look takes a second."
    monkeypatch.setattr(rounds, 'Restorer', lambda scale: Restorer(scale, (8, 8), 1, 1))
    monkeypatch.setattr(rounds, 'SIZE', 32)
    monkeypatch.setattr(rounds, 'BATCH', 2)
    monkeypatch.setattr(rounds, 'EPOCH', 40)
    monkeypatch.setattr(rounds, 'WARM_UP', 5)
    monkeypatch.setattr(rounds, 'VALID', {'size': 32, 'crops': 2})
    monkeypatch.setattr(rounds, 'wild_scores', scores)
    monkeypatch.setattr(rounds, 'published', list)
    seconds = itertools.count()
    monkeypatch.setattr(rounds, 'time', SimpleNamespace(monotonic=lambda: next(seconds)))


def scores(name, enhance, tasks):
    "Of the degraded photos as they are, and of what came out. Undamaged ones have no mean PSNR."
    assert tasks == ('x1', 'good', 'noise15', 'noise25', 'noise50')
    luma = {'input': 28.0, NAME: 29.0}[name]
    return {
        'x1': {'luma': luma, 'LPIPS': 0.2, 'photos': 100},
        'good': {'LPIPS': 0.1, 'photos': 100} | ({} if name == 'input' else {'luma': 40.0}),
    }


MINUTES = 2  # 120 seconds, of which a step takes two: one before the batch and one after it


def one_round(photos, tmp_path, out):
    rounds.train(NAME, [photos], MINUTES, tmp_path / 'home', out, 0)
    return tmp_path / 'home' / NAME


def rows(folder):
    with (folder / 'log.csv').open(newline='') as file:
        return list(csv.DictReader(file))


def diary(folder):
    return json.loads((folder / 'rounds.json').read_text())


@pytest.fixture
def out(tmp_path):
    (tmp_path / 'out').mkdir()
    return tmp_path / 'out'


def test_a_round_ends_on_time_and_publishes(photos, tmp_path, out, capsys):
    folder = one_round(photos, tmp_path, out)
    curve = rows(folder)
    assert [int(row['steps']) for row in curve] == [20, 40, 60]  # epochs of 40 crops, the end
    assert [float(row['minutes']) for row in curve] == [0.7, 1.3, 2.0]
    assert {row['round'] for row in curve} == {'1'} and len({row['input L1'] for row in curve}) == 1
    assert {p.name for p in folder.glob('sheet*')} == {'sheet-1-0.png', 'sheet-1-end.png'}
    assert Image.open(folder / 'sheet-1-end.png').width > 3 * 32
    assert not list(folder.glob('*.ckpt'))
    (done,) = diary(folder)
    assert done['steps'] == 60 and done['minutes'] == MINUTES and done['published'] is True
    model = load_model(out / f'{NAME}.safetensors')
    assert model.card['training']['rounds'] == [done]
    assert model.card['training']['photos'] == {'/'.join(photos.parts[-2:]): 22}
    of_x1, of_good = model.card['scores'].values()
    assert (of_x1['input'], of_x1['output'], of_x1['LPIPS']) == (28.0, 29.0, [0.2, 0.2])
    assert 'input' not in of_good and '100 photos' in of_good['protocol']
    assert model.card['task'] == 'wild'
    assert 'published' in capsys.readouterr().out


def test_the_baseline_is_that_of_the_degraded_photos_as_they_are():
    x, y = torch.zeros(2, 3, 8, 8), torch.full((2, 3, 16, 16), 0.1)
    x[1] += 0.4  # off by .1 and by .3
    l1, error = rounds.baseline_of(SimpleNamespace(valid=[(x, y)]))
    assert l1 == pytest.approx(0.2) and error == pytest.approx((0.01 + 0.09) / 2)
    assert rounds.decibels(0.01) == pytest.approx(20) and rounds.decibels(0) == 100


def test_the_rate_rises_stays_and_falls_and_the_next_round_is_gentler(
    photos, tmp_path, out, monkeypatch
):
    rates, began = [], []

    def before_batch(self, original=rounds.Clock.before_batch):
        original(self)
        if self.training:
            rates.append((self.minutes / self.limit, self.opt.hypers[-1]['lr']))

    def before_fit(self, original=rounds.Clock.before_fit):
        original(self)
        began.append({k: v.clone() for k, v in self.model.state_dict().items()})

    monkeypatch.setattr(rounds.Clock, 'before_batch', before_batch)
    monkeypatch.setattr(rounds.Clock, 'before_fit', before_fit)
    folder = one_round(photos, tmp_path, out)
    expected = [
        3e-3 * min((i + 1) / 5, 1) * min((1 - share) / 0.7, 1) for i, (share, _) in enumerate(rates)
    ]
    assert [rate for _, rate in rates] == pytest.approx(expected)
    assert rates[0][1] < 1e-3 < 3e-3 == max(rate for _, rate in rates) and rates[-1][1] < 1e-4
    ended = load_model(folder / f'{NAME}.safetensors').state_dict()
    rates.clear()
    one_round(photos, tmp_path, out)
    assert all(v.allclose(ended[k]) for k, v in began[1].items())
    assert max(rate for _, rate in rates) == 2e-3
    assert [row['round'] for row in rows(folder)][-1] == '2'
    assert [row['rate'] for row in diary(folder)] == [3e-3, 2e-3]


def command(photos, tmp_path, out):
    places = ['--home', str(tmp_path / 'home'), '--out', str(out), '--photos', str(photos)]
    return rounds.main([NAME, '--minutes', str(MINUTES), '--workers', '0', *places])


def test_a_round_that_was_stopped_resumes(photos, tmp_path, out, monkeypatch, capsys):
    def stop(self, original=rounds.Clock.after_batch):
        original(self)
        if self.training and self.steps == 50:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rounds.Clock, 'after_batch', stop)
        assert command(photos, tmp_path, out) == 130
    assert 'resumes from the last checkpoint' in capsys.readouterr().err
    folder = tmp_path / 'home' / NAME
    kept = torch.load(folder / 'round-1.ckpt', weights_only=True)['parts']
    assert kept['clock'] == {'steps': 40, 'minutes': pytest.approx(80 / 60)}
    assert not list(out.iterdir())
    assert command(photos, tmp_path, out) == 0
    assert 'round 1 resumes, 1 of 2 minutes done' in capsys.readouterr().out
    assert [int(row['steps']) for row in rows(folder)] == [20, 40, 60]
    assert diary(folder)[0]['steps'] == 60, 'the time before counts'


def test_a_round_that_was_killed_while_it_was_measured_is_published(
    photos, tmp_path, out, monkeypatch, capsys
):
    def fail(*_):
        raise EnhanceError('The blind protocol failed.')

    with monkeypatch.context() as patch:
        patch.setattr(rounds, 'wild_scores', fail)
        assert command(photos, tmp_path, out) == 2
    assert capsys.readouterr().err == 'The blind protocol failed.\n'
    folder = tmp_path / 'home' / NAME
    assert diary(folder)[0]['published'] is None and not list(out.iterdir())
    assert command(photos, tmp_path, out) == 0
    assert diary(folder)[0]['published'] is True and len(diary(folder)) == 2


def test_what_is_published_stays_if_it_is_better(photos, tmp_path, out, capsys):
    folder = one_round(photos, tmp_path, out)
    first = (out / f'{NAME}.safetensors').read_bytes()
    flat = [Image.new('RGB', (64, 64), 'gray')] * 2
    dls = rounds.recipe_dls(flat, flat, rounds.wild_recipe(), size=32, bs=2)
    worse = [{'minutes': 1, 'steps': 1, 'L1': 9.0}]
    rounds.publish(NAME, dls, worse, {}, out, folder)
    assert (out / f'{NAME}.safetensors').read_bytes() == first
    assert diary(folder)[-1]['published'] is False
    better = [{**worse[0], 'L1': 0.0}]
    save_weights(Restorer(1, (8, 8), 1, 1), folder / f'{NAME}.safetensors')
    rounds.publish(NAME, dls, better, {}, out, folder)
    assert (out / f'{NAME}.safetensors').read_bytes() != first
    assert diary(folder)[-1]['published'] is True


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


def test_without_checkpoints_a_round_begins_with_what_is_published(monkeypatch, tmp_path):
    "The folder of checkpoints is not in the repository: a new machine has none."
    knows = Restorer(1, (8, 8), 1, 1)
    knows.card = {'training': {'rounds': [{'minutes': 90}, {'minutes': 60}]}}
    monkeypatch.setattr(rounds, 'published', lambda: [NAME])
    monkeypatch.setattr(rounds, 'load_model', lambda name: knows)
    assert rounds.new_model(NAME, tmp_path) is knows
    assert rounds.Clock(tmp_path / NAME, 1, None, ()).number == 3
    assert rounds.Clock(tmp_path / 'restore-x2', 1, None, ()).number == 1


@pytest.mark.parametrize(
    'arguments, words',
    [
        ([], 'Name a folder of photos'),
        (['--photos', 'nowhere'], 'nowhere'),
        (['--minutes', '0'], 'A round in minutes of 0.0'),
        (['--minutes', 'nan'], 'A round in minutes of nan'),
    ],
)
def test_what_cannot_be_done_is_said(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rounds, 'SHARED', tmp_path)
    assert rounds.main([NAME, '--home', str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count('\n') == 1


PRINTED = (
    'good     enhance  100 photos  luma inf dB  RGB inf dB  SSIM 0.9987  LPIPS 0.0086  '
    'lowest luma 37.1 dB\n'
    'x1       enhance   99 photos  luma 28.50 dB  RGB 26.85 dB  SSIM 0.8011  LPIPS 0.2237  '
    'lowest luma 20.0 dB\n'
)


def test_scores_of_the_blind_protocol_are_read():
    "Half of the undamaged photos come back as they were: their PSNR is infinite."
    scores = wild.read_scores(PRINTED)
    assert scores['good'] == {'SSIM': 0.9987, 'LPIPS': 0.0086, 'lowest luma': 37.1, 'photos': 100}
    assert scores['x1']['luma'] == 28.5 and scores['x1']['RGB'] == 26.85
    assert scores['x1']['photos'] == 99 and scores['x1']['lowest luma'] == 20.0


def test_a_set_that_was_killed_while_it_was_made_is_made_anew(tmp_path, monkeypatch):
    calls = []

    def protocol(*arguments):
        calls.append(arguments[0])
        if arguments[0] == 'score':
            return PRINTED
        for task in wild.TASKS:
            for part in ('clean', 'degraded'):
                (arguments[1] / task / part).mkdir(parents=True)
            if calls == ['make']:
                raise EnhanceError('killed')
            Image.new('RGB', (8, 8)).save(arguments[1] / task / 'degraded' / 'a.png')

    monkeypatch.setattr(wild, 'run_protocol', protocol)
    monkeypatch.setattr(wild, 'FOLDER', tmp_path / 'wild')
    monkeypatch.setattr(wild, 'PROTOCOL', Path(__file__))

    def enhance(path, scale):
        return Image.open(path).resize((8 * scale, 8 * scale))

    with pytest.raises(EnhanceError):
        wild.wild_scores('a', enhance)
    assert wild.wild_scores('a', enhance)['x1']['luma'] == 28.5
    assert calls == ['make', 'make', 'score']
    assert Image.open(tmp_path / 'wild' / 'x4' / 'a' / 'a.png').size == (32, 32)
    monkeypatch.setattr(wild, 'PROTOCOL', tmp_path / 'none')
    assert wild.wild_scores('a', enhance) == {}
