"""Every published model and every command gives what it gave before.

`python tests/test_references.py` writes the references anew: after a round of training, or where a
result is meant to change.
"""

import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from PIL import Image

from enhance_lib.applications.batch import crappify_folder, resize_folder
from enhance_lib.applications.evaluate import evaluate, evaluation_means
from enhance_lib.applications.image2 import upgrade
from enhance_lib.crappify import get_recipe
from enhance_lib.enhance import enhance
from enhance_lib.toolbox.datasets import sample_photo
from enhance_lib.toolbox.files import open_photo
from enhance_lib.toolbox.models import load_model, published

HERE = Path(__file__).parent / 'references'


def degraded(side=96):
    "A cup and its letters, through JPEG: small enough to keep."
    photo = sample_photo('coffee').crop((120, 140, 120 + side, 140 + side))
    return get_recipe('jpeg10').pair(photo, 3, 'coffee')[0]


def of_model(name):
    "What a model makes of the photo, in float32, so that it is the same on every machine."
    model = load_model(name)
    photo = degraded(96 if model.scale == 1 else 48)
    return model.predict(photo, fast=False)


def of_enhance(name):
    "What `enhance` makes of small photos that get different plans."
    photo = sample_photo('cat').crop((100, 60, 220, 160))
    if name == 'file':
        with TemporaryDirectory() as folder:
            photo.save(Path(folder) / 'cat.jpg', quality=30)
            return enhance(Path(folder) / 'cat.jpg').photo
    if name == 'noisy':
        noise = np.random.default_rng(0).normal(0, 15, (100, 120, 3))
        photo = Image.fromarray((np.asarray(photo) + noise).clip(0, 255).astype(np.uint8))
        return enhance(photo, scale=1, keep_colors=True, strength=0.8).photo
    if name == 'larger':
        return enhance(photo, scale=1.7).photo
    return upgrade(load_model('jpeg-blind'), photo, 3)  # as Image 2.0 does


def of_folders():
    "Means over the files that the folder commands write, and what `evaluate` measures."
    with TemporaryDirectory() as folder:
        folder = Path(folder)
        for name in ('cat', 'coffee'):
            (folder / 'clean').mkdir(exist_ok=True)
            sample_photo(name).save(folder / 'clean' / f'{name}.png')
        options = {'n_workers': 1, 'progress': False}
        resize_folder(folder / 'clean', folder / 'small', 128, **options)
        found = {}
        for recipe in ('image2', 'gan'):
            crappify_folder(folder / 'small', folder / recipe, recipe, 5, **options)
        crappify_folder(
            folder / 'small', folder / 'c', 'jpeg10', 1, 64, folder / 'c-clean', 'png', **options
        )
        for path in sorted(folder.rglob('*.png')):
            pixels = np.asarray(open_photo(path, None), float)
            key = path.relative_to(folder).as_posix()
            found[key] = [*pixels.shape, round(pixels.mean(), 2), round(pixels.std(), 2)]
        table = evaluate(['unet-mse'], folder / 'small', folder / 'image2', progress=False)
        for picture, row in evaluation_means(table).iterrows():
            found[f'evaluate {picture}'] = [round(float(v), 3) for v in row]
        return found


MODELS = published()
CASES = ('file', 'noisy', 'larger', 'image2')
needs_features = pytest.mark.skipif(
    not os.environ.get('ENHANCE_FEATURES'), reason='ENHANCE_FEATURES names no feature network'
)


def difference(made, name):
    "The largest difference from the reference, in levels of 0 to 255."
    kept = open_photo(HERE / f'{name}.png', None)
    assert (made.size, made.mode) == (kept.size, kept.mode)
    return np.abs(np.asarray(made, int) - np.asarray(kept, int)).max()


@pytest.mark.parametrize('name', MODELS)
def test_model_makes_the_same_picture(name):
    assert difference(of_model(name), name) <= 1


@pytest.mark.parametrize('name', CASES)
def test_enhance_makes_the_same_picture(name):
    # half precision differs between processors by more than one level
    assert difference(of_enhance(name), f'enhance-{name}') <= 4


@needs_features
def test_commands_write_the_same():
    kept = json.loads((HERE / 'folders.json').read_text())
    made = of_folders()
    assert made.keys() == kept.keys()
    for name, values in kept.items():
        np.testing.assert_allclose(made[name], values, rtol=2e-3, atol=0.02, err_msg=name)


if __name__ == '__main__':
    for name in MODELS:
        of_model(name).save(HERE / f'{name}.png')
    for name in CASES:
        of_enhance(name).save(HERE / f'enhance-{name}.png')
    (HERE / 'folders.json').write_text(json.dumps(of_folders(), indent=1) + '\n')
    sys.stdout.write(f'{len(MODELS) + len(CASES)} pictures\n')
