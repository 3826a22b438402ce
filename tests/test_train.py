"""Training a U-Net from disk: what is kept, going on after a stop, bad input said in advance."""

import inspect
import json

import numpy as np
import pytest
import torch
from common import pieces
from fastai.callback.core import Callback
from fastai.learner import load_learner
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

import enhance_lib.applications.train as module
from enhance_lib.applications.train import TrainingPlan, export_unet, train_unet
from enhance_lib.crappify import RECIPES
from enhance_lib.toolbox.errors import EnhanceError
from enhance_lib.toolbox.models import load_model
from enhance_lib.toolbox.pairs import recipe_dls
from enhance_lib.toolbox.tensors import to_tensor
from enhance_lib.unet import get_unet

SMALL = {'model_name': 'test_resnet', 'pretrained': False}


def test_what_is_kept_gives_the_same_photos(tmp_path):
    dls = recipe_dls(pieces(2), pieces(1), RECIPES['gan'], 64, 2)
    learn = get_unet(dls, **SMALL, blur=False, self_attention=False)
    last = learn.model.net.layers[-2]  # the last convolution, zero until it is trained
    for p in last.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    export_unet(learn, tmp_path / 'a.b', recipe='gan')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.b.json', 'a.b.pkl', 'a.b.safetensors']
    photo = pieces(1)[0]
    photo.save(tmp_path / 'photo.png')
    with torch.inference_mode():
        wanted = learn.model.eval().cpu()(to_tensor(photo))[0]
    opened = load_learner(tmp_path / 'a.b.pkl')
    with opened.no_bar():
        levels, told, _ = opened.predict(tmp_path / 'photo.png')
    assert levels.shape == wanted.shape and int(levels.max()) > 1  # to look at: 0 to 255
    torch.testing.assert_close(told.as_subclass(torch.Tensor), wanted)
    again = load_model(tmp_path / 'a.b.safetensors')
    assert again.card['recipe'] == 'gan'
    with torch.inference_mode():
        torch.testing.assert_close(again(to_tensor(photo))[0], wanted)


# Training from disk


def test_all_settings_show_in_the_signature():
    "The command line and the docs read it."
    plan = inspect.signature(TrainingPlan).parameters
    told = inspect.signature(train_unet).parameters
    assert set(told) == {*plan, 'resume', 'device'}
    assert all(told[name].default == p.default for name, p in plan.items())
    with pytest.raises(TypeError, match='size'):
        train_unet('clean', size=64)


@pytest.fixture
def folders(tmp_path):
    "Ten clean photos and degraded ones, and the table that says which validate."
    for i, photo in enumerate(pieces(10)):
        for folder, kept in (('clean', photo), ('degraded', RECIPES['image2'](photo, i))):
            (tmp_path / folder).mkdir(exist_ok=True)
            kept.save(tmp_path / folder / f'{i}.png')
    rows = '\n'.join(f'{i}.png,{i > 7}' for i in range(10))
    (tmp_path / 'photos.csv').write_text(f'fnames,is_val\n{rows}\n')
    return tmp_path


QUICK = {**SMALL, 'loss': 'l1', 'sizes': (64,), 'bs': 4, 'frozen_epochs': 1, 'unfrozen_epochs': 1}


def quick(*args, **options):
    "Train for a second or so."
    return train_unet(*args, **QUICK | options)


def test_a_training_from_disk(folders):
    options = {'degraded': folders / 'degraded', 'table': folders / 'photos.csv', 'sizes': (72,)}
    scores = quick(folders / 'clean', folders / 'mine', **options, device='cpu')
    found = [
        peak_signal_noise_ratio(
            *(np.asarray(Image.open(folders / side / f'{i}.png')) for side in ('clean', 'degraded'))
        )
        for i in (8, 9)
    ]
    assert scores['input'] == pytest.approx(np.mean(found), abs=0.01)
    card = json.loads((folders / 'mine.json').read_text())
    assert card['photos'] == 8 and card['recipe'] == 'pairs from disk' and card['loss'] == 'l1'
    assert card['validation'] == pytest.approx(scores)
    assert load_model(folders / 'mine.safetensors').predict(pieces(1)[0]).size == (72, 72)
    assert not (folders / 'mine.training').exists()


def test_a_training_by_a_recipe_with_a_table(folders):
    quick(folders / 'clean', folders / 'mine', table=folders / 'photos.csv', recipe='gan')
    card = json.loads((folders / 'mine.json').read_text())
    assert card['photos'] == 8 and card['recipe'] == 'gan'
    quick(folders / 'clean', folders / 'other', resume=True)  # of nothing: it begins
    assert json.loads((folders / 'other.json').read_text())['photos'] == 9


class Stop(Callback):
    "Ctrl-C in the n-th epoch."

    order = 100

    def __init__(self, n):
        self.n = n

    def after_epoch(self):
        self.n -= 1
        if not self.n:
            raise KeyboardInterrupt


def interrupted(monkeypatch, n, *args, **options):
    "Start a training that is stopped after its n-th epoch."
    with monkeypatch.context() as patch:
        patch.setattr(module, 'get_unet', lambda *a, **k: get_unet(*a, **k, cbs=Stop(n)))
        with pytest.raises(KeyboardInterrupt):
            quick(*args, **options)


def test_a_training_that_was_stopped_goes_on(folders, monkeypatch):
    "And ends with the same weights: in the first phase, between the two, and in the second size."
    plan = {'sizes': (64, 72), 'device': 'cpu'}
    plan |= {'degraded': folders / 'degraded', 'table': folders / 'photos.csv'}
    quick(folders / 'clean', folders / 'whole', **plan)
    whole = load_model(folders / 'whole.safetensors').state_dict()
    for n in (1, 2, 3):
        args = folders / 'clean', folders / f'mine{n}'
        interrupted(monkeypatch, n, *args, **plan)
        assert not (folders / f'mine{n}.safetensors').exists()
        with pytest.raises(EnhanceError, match='interrupted in .*resume') as error:
            quick(*args, **plan)
        assert '\n' not in str(error.value)
        quick(*args, **plan, resume=True)
        mine = load_model(folders / f'mine{n}.safetensors').state_dict()
        for name, p in whole.items():
            torch.testing.assert_close(mine[name], p, msg=f'{name}, stopped after {n}')


def test_a_training_goes_on_only_as_it_was_begun(folders, monkeypatch):
    args = folders / 'clean', folders / 'mine'
    interrupted(monkeypatch, 1, *args)
    for setting, told in (({'bs': 2}, 'bs 4, not 2'), ({'recipe': 'wild'}, 'recipe image2')):
        with pytest.raises(EnhanceError, match=f'begun with {told}'):
            quick(*args, resume=True, **setting)
    (folders / 'mine.training' / 'plan.json').write_text('{')
    with pytest.raises(EnhanceError, match='plan.json.*cannot be read'):
        quick(*args, resume=True)


@pytest.mark.parametrize('suffix', ['safetensors', 'json', 'pkl'])
def test_what_is_there_is_not_overwritten(tmp_path, suffix):
    (tmp_path / f'mine.{suffix}').write_bytes(b'precious')
    with pytest.raises(EnhanceError, match=f'{suffix}. is there already'):
        quick(tmp_path / 'clean', tmp_path / 'mine')
    assert (tmp_path / f'mine.{suffix}').read_bytes() == b'precious'


@pytest.mark.parametrize(
    'change, words',
    [
        ({'loss': 'msee'}, "no loss 'msee'.*mse"),
        ({'model_name': 'test_resnt'}, 'Did you mean test_resnet'),
        ({'model_name': 'vit_tiny_patch16_224'}, 'cannot be built'),
        ({'recipe': 'gann'}, 'Did you mean gan'),
        ({'sizes': (100,)}, '72×72 is smaller'),
        ({'table': 'no_column.csv'}, 'no column is_val'),
        ({'table': 'missing.csv'}, r'12 photos of .* are not in .*: 10.png, .*19.png, …'),
        ({'table': 'no_valid.csv'}, 'no photo to validate with'),
        ({'table': 'nowhere.csv'}, 'nowhere.csv'),
        ({'degraded': 'odd'}, 'clean/3.png.*50×50.*72×72'),
        ({'degraded': 'nowhere'}, 'nowhere'),
    ],
)
def test_what_cannot_be_trained_says_so(folders, change, words):
    (folders / 'no_column.csv').write_text('fnames\n1.png\n')
    rows = '\n'.join(f'{i}.png,{i % 2}' for i in range(22))
    (folders / 'missing.csv').write_text(f'fnames,is_val\n{rows}\n')
    (folders / 'no_valid.csv').write_text('fnames,is_val\n1.png,False\n2.png,False\n')
    (folders / 'odd').mkdir()
    for path in (folders / 'degraded').iterdir():
        size = (50, 50) if path.stem == '3' else (72, 72)
        Image.open(path).resize(size).save(folders / 'odd' / path.name)
    change = {k: folders / v if k in ('table', 'degraded') else v for k, v in change.items()}
    with pytest.raises(EnhanceError, match=words):
        quick(folders / 'clean', folders / 'mine', **change)
    assert not [*folders.glob('mine.*s*')]  # neither weights nor a learner
