"""Measuring models on a folder of photos, and the table of what is published."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from enhance_lib.applications.batch import crappify_folder
from enhance_lib.applications.evaluate import (
    evaluate,
    evaluation_means,
    model_table,
    plot_evaluation,
    save_evaluation,
)
from enhance_lib.toolbox.datasets import sample_photo
from enhance_lib.toolbox.errors import EnhanceError, EnhanceWarning
from enhance_lib.toolbox.features import FeatureNet
from enhance_lib.toolbox.files import save_photo
from enhance_lib.toolbox.models import WEIGHTS, published, read_card


@pytest.fixture(scope='module')
def net():
    "A small network with random weights, for the feature distance."
    torch.manual_seed(0)
    return FeatureNet(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), (1,))


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    "Clean and degraded photos in folders of a folder."
    home = tmp_path_factory.mktemp('photos')
    cat, coffee = sample_photo('cat'), sample_photo('coffee')
    for i, (photo, x) in enumerate((p, x) for p in (cat, coffee) for x in (0, 100, 200)):
        save_photo(photo.crop((x, 40, x + 96, 136)), home / 'clean' / f'{i}.png')
    crappify_folder(home / 'clean', home / 'degraded', 'gan', progress=False)
    return home


def test_evaluate_measures_input_and_models(folders, net):
    "Of a model that does nothing, the same as of the input; scikit-image agrees on the PSNR."
    from skimage.metrics import peak_signal_noise_ratio

    table = evaluate(
        {'nothing': lambda degraded: degraded},
        folders / 'clean',
        folders / 'degraded',
        net=net,
        progress=False,
    )
    assert list(table['picture'].unique()) == ['input', 'nothing'] and len(table) == 12
    wide = table.pivot(index='photo', columns='picture', values='PSNR (dB)')
    assert (wide['input'] == wide['nothing']).all()
    pair = (np.asarray(Image.open(folders / f / '2.png')) for f in ('clean', 'degraded'))
    assert wide.loc['2.png', 'input'] == pytest.approx(peak_signal_noise_ratio(*pair), abs=1e-3)
    assert evaluation_means(table).loc['input', 'PSNR (dB)'] == pytest.approx(wide['input'].mean())
    assert table.attrs['failed'] == []


def test_evaluate_on_a_sample_is_the_same_each_time(folders, net):
    "By the seed; another seed draws others."
    run = partial_evaluate(folders, net)
    first, again = (list(run(seed=1)['photo'].unique()) for _ in range(2))
    assert first == again and len(first) == 3
    assert any(list(run(seed=s)['photo'].unique()) != first for s in range(2, 6))


def partial_evaluate(folders, net):
    "Three of the photos, made bad by a recipe."

    def run(**options):
        models = {'nothing': lambda degraded: degraded}
        return evaluate(models, folders / 'clean', sample=3, net=net, progress=False, **options)

    return run


def test_evaluate_keeps_two_files_of_one_name_apart(folders, net, tmp_path):
    "By their paths; a name that is there once stays short."
    paths = [tmp_path / folder / 'mine.safetensors' for folder in ('first', 'second')]
    for path in paths:
        path.parent.mkdir()
        for suffix in ('.safetensors', '.json'):
            shutil.copy(WEIGHTS / f'srcnn-jpeg20{suffix}', path.with_suffix(suffix))
    models = [*paths, 'srcnn-jpeg20']
    table = evaluate(
        models, folders / 'clean', folders / 'degraded', net=net, sample=1, progress=False
    )
    assert list(table['picture']) == ['input', *map(str, paths), 'srcnn-jpeg20']


def test_evaluate_names_what_it_could_not_measure(folders, net, tmp_path):
    "And measures the others; nothing at all is an error."
    for name in ('0.png', '1.png'):
        save_photo(Image.open(folders / 'degraded' / name), tmp_path / name)
    nothing = {'nothing': lambda degraded: degraded}
    with pytest.warns(EnhanceWarning, match='4 photos could not be measured'):
        table = evaluate(nothing, folders / 'clean', tmp_path, net=net, progress=False)
    assert len(table) == 4 and len(table.attrs['failed']) == 4
    (tmp_path / 'none').mkdir()
    save_photo(Image.open(folders / 'degraded' / '0.png'), tmp_path / 'none' / 'other.png')
    with pytest.raises(EnhanceError, match='No photo could be measured'):
        evaluate(nothing, folders / 'clean', tmp_path / 'none', net=net, progress=False)
    with pytest.raises(EnhanceError, match='A sample of 0'):
        evaluate(nothing, folders / 'clean', sample=0, net=net, progress=False)
    with pytest.raises(EnhanceError, match='Name a model'):
        evaluate([], folders / 'clean', net=net)


def test_an_evaluation_is_written_and_drawn(folders, net, tmp_path):
    "The table comes back from its file; the plots have a row for each measure."
    table = partial_evaluate(folders, net)()
    save_evaluation(table, tmp_path / 'found')
    back = pd.read_csv(tmp_path / 'found.csv')
    assert list(back.columns) == list(table.columns) and len(back) == len(table)
    assert Image.open(tmp_path / 'found.png').format == 'PNG'
    assert len(plot_evaluation(table, ('MSE',)).axes) == 2


def test_the_published_models_are_told_from_their_cards():
    table = model_table()
    assert list(table.index) == published()
    for name in published():
        card = read_card(WEIGHTS / f'{name}.json')
        assert table.loc[name, 'scale'] == card['scale']
        assert table.loc[name, 'parameters'] == f'{card["parameters"] / 1e6:.2f} M'
        for score in list(card.get('scores', {}).values())[:1]:
            assert f'→ {score["output"]:.2f} dB' in table.loc[name, 'score']
