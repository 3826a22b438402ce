"Tiny photos, networks and trainings, in which everything that happens is known or drawn."

import os
import random
import resource
import warnings
from contextlib import contextmanager

import numpy as np
import torch
from common import noise
from PIL import Image
from torch import nn

from enhance_lib.crappify import Recipe, Step
from enhance_lib.toolbox.pairs import recipe_dls

with warnings.catch_warnings():
    warnings.simplefilter('ignore', FutureWarning)
    import fastai.callback.schedule  # noqa: F401 (gives Learner its fit_one_cycle)
    from fastai.callback.core import CancelBatchException, CancelFitException  # noqa: F401
    from fastai.learner import Learner
    from fastai.optimizer import Adam, RMSProp  # noqa: F401

CPU = torch.device('cpu')
GRAIN = Recipe('grain', (Step('noise', sigma=20),))
TRAIN_PHOTOS = [noise((20, 18), seed=i) for i in range(6)]


class Killed(BaseException):
    "As sudden as a kill: nobody catches it, whoever catches every Exception."


class Evil:
    "Makes a folder when it is unpickled."

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def place_photo(width, height, seed=0):
    "Red says in which column a pixel is, green in which row; blue is noise."
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
    return Image.fromarray(pixels)


def integers(photo):
    "The pixels of a photo, to compute with."
    return np.asarray(photo).astype(int)


def levels(x):
    "A tensor (C, H, W) in [0, 1] as an array (H, W, C) of levels, which must be whole numbers."
    values = x.permute(1, 2, 0).numpy().astype(float) * 255
    assert np.abs(values - values.round()).max() < 1e-3
    return values.round().astype(int)


def equal_weights(a, b, within=0.0):
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    return all((a[k].double() - b[k].double()).abs().max() <= within for k in a)


def seed_all(seed):
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)


def tiny_net():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Conv2d(4, 3, 3, padding=1),
    )


def two_groups(model):
    return [list(model[:2].parameters()), list(model[4:].parameters())]


def tiny_dls(n_workers=0, recipe=GRAIN, size=8):
    options = {'bs': 2, 'n_workers': n_workers, 'device': 'cpu'}
    return recipe_dls(TRAIN_PHOTOS, TRAIN_PHOTOS[:2], recipe, size, **options)


def tiny_learner(seed=0, opt_func=Adam, cbs=(), loss=None, model=None, n_workers=0):
    "A training in which everything is drawn: first weights, order, crops, flips, noise, dropout."
    seed_all(seed)
    return Learner(
        tiny_dls(n_workers),
        model or tiny_net(),
        loss_func=loss or nn.MSELoss(),
        opt_func=opt_func,
        splitter=two_groups,
        cbs=list(cbs),
    )


def train(learn, epochs=4, cbs=(), lr=slice(1e-3, 2e-2)):
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(epochs, lr, cbs=list(cbs))
    return learn


@contextmanager
def disk_of(size):
    "No file may become larger than `size` bytes: a write beyond it fails, as on a full disk."
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
