"""The workbench: pairs that fit, trainings that survive being killed, tiles, weights with cards."""

import errno
import gc
import hashlib
import importlib
import json
import os
import pickle
import random
import resource
import subprocess
import sys
import warnings
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastcore.foundation import L
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps
from scipy.ndimage import uniform_filter
from torch import nn
from torch.nn import functional as F

from enhance_lib.enhance_lib import srcnn, workbench
from enhance_lib.applications.batch import crappify_folder
from enhance_lib.crappify import Recipe, Step
from enhance_lib.applications.scoreboard import TASKS
from enhance_lib.toolbox.errors import EnhanceError
from enhance_lib.toolbox.files import save_photo
from enhance_lib.toolbox.tiles import tile_boxes
from enhance_lib.srcnn import SRCNN
from enhance_lib.toolbox.checkpoints import (
    LoaderState,
    load_checkpoint,
    random_states,
    save_checkpoint,
    set_random_states,
)
from enhance_lib.toolbox.device import autocast, half_dtype, pick_device
from enhance_lib.toolbox.models import PhotoModel, load_model, published, save_weights
from enhance_lib.toolbox.pairs import (
    Pairs,
    PhotoCache,
    crop_pair,
    degraded_versions,
    folder_dls,
    pair_loaders,
    recipe_dls,
)
from enhance_lib.toolbox.training import AutocastCPU, CheckpointEachEpoch, half_precision

with warnings.catch_warnings():
    warnings.simplefilter('ignore', FutureWarning)
    import fastai.callback.schedule  # noqa: F401 (gives Learner its fit_one_cycle)
    from fastai.callback.core import Callback, CancelBatchException, CancelFitException
    from fastai.learner import Learner
    from fastai.optimizer import Adam, RMSProp

CPU = torch.device('cpu')


def one_line(error):
    "The message of a caught error, which must be a single sentence or a few on one line."
    message = str(error.value)
    assert message and '\n' not in message
    return message


@contextmanager
def refused(*words):
    "What happens inside has to raise EnhanceError, with all of `words` in its only line."
    with pytest.raises(EnhanceError) as error:
        yield
    message = one_line(error)
    for word in words:
        assert str(word) in message


class Killed(BaseException):
    "As sudden as a kill: nobody catches it, whoever catches every Exception."


class Evil:
    "Makes a folder when it is unpickled."

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def noise_photo(width=24, height=20, mode='RGB', seed=0):
    bands = len(mode)
    shape = (height, width, bands) if bands > 1 else (height, width)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(pixels, mode)


def place_photo(width, height, seed=0):
    "Red says in which column a pixel is, green in which row; blue is noise."
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
    return Image.fromarray(pixels)


def pixels(photo):
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


def eight(array):
    "All ways to lay a square on the table."
    turned = [np.rot90(array, k) for k in range(4)]
    return turned + [t[:, ::-1] for t in turned]


# Devices


def test_the_cpu_is_always_there():
    assert pick_device('cpu') == CPU
    assert pick_device(CPU) == CPU
    assert isinstance(pick_device(), torch.device)


@pytest.mark.parametrize(
    'name', ['gpu', '', 'cuda:99', 'xpu:7', 'hpu', 'meta', 'cpu\n', -1, 3.5, [], 'x' * 999]
)
def test_a_device_that_is_not_there_is_refused(name):
    with refused('There is no device', 'There are: cpu'):
        pick_device(name)


def test_cuda_is_refused_where_there_is_none(monkeypatch):
    def empty(*args, device=None, **kwargs):
        raise RuntimeError('Found no NVIDIA driver\non your system.')

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
    assert pick_device() == CPU
    monkeypatch.setattr(torch, 'empty', empty)
    with refused("'cuda'", 'There are: cpu.'):
        pick_device('cuda')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    with refused("'cuda:3'", 'There are: cpu, cuda.'):
        pick_device('cuda:3')


def test_the_fastest_device_is_chosen(monkeypatch):
    asked = []

    def empty(*args, device):
        asked.append(device.type)
        return torch.zeros(1)

    monkeypatch.setattr(torch, 'empty', empty)
    for cuda, mps, best in [(1, 1, 'cuda'), (1, 0, 'cuda'), (0, 1, 'mps'), (0, 0, 'cpu')]:
        monkeypatch.setattr(torch.cuda, 'is_available', lambda there=cuda: bool(there))
        monkeypatch.setattr(torch.backends.mps, 'is_available', lambda there=mps: bool(there))
        assert pick_device().type == best
    assert asked == ['cuda', 'cuda', 'mps', 'cpu']  # each was tried out


def pretend_cpu(monkeypatch, avx=False, amx=False):
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: avx, raising=False)
    monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: amx, raising=False)


def test_half_precision_only_where_it_is_faster(monkeypatch):
    for avx, amx in [(True, False), (False, True), (True, True)]:
        pretend_cpu(monkeypatch, avx, amx)
        assert half_dtype(CPU) == torch.bfloat16
    pretend_cpu(monkeypatch)
    assert half_dtype(CPU) is None
    monkeypatch.delattr(torch.cpu, '_is_avx512_bf16_supported')  # another version of torch
    monkeypatch.delattr(torch.cpu, '_is_amx_tile_supported')
    assert half_dtype(CPU) is None
    assert half_dtype(torch.device('mps')) is None


@pytest.mark.parametrize(
    'capability, dtype',
    [
        ((7, 5), torch.float16),
        ((6, 1), torch.float16),
        ((8, 0), torch.bfloat16),
        ((8, 9), torch.bfloat16),
        ((10, 0), torch.bfloat16),
    ],
)
def test_half_precision_on_a_pretended_gpu(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    assert half_dtype(torch.device('cuda')) == dtype


def test_autocast_computes_in_half_only_inside(monkeypatch):
    pretend_cpu(monkeypatch, avx=True)
    x = torch.ones(2, 2)
    with autocast(CPU):
        assert (x @ x).dtype == torch.bfloat16
    with autocast(CPU, enabled=False):
        assert (x @ x).dtype == torch.float32
    assert (x @ x).dtype == torch.float32
    with torch.autocast('cpu', torch.bfloat16), autocast(CPU, enabled=False):
        assert (x @ x).dtype == torch.float32
    pretend_cpu(monkeypatch)
    with autocast(CPU):
        assert (x @ x).dtype == torch.float32


# The cache of photos


def test_cache_keeps_what_fits(tmp_path, monkeypatch):
    sizes = {'a': (20, 10), 'b': (10, 20), 'c': (20, 10), 'd': (5, 5), 'e': (3, 3)}
    photos = {n: noise_photo(*s, seed=i) for i, (n, s) in enumerate(sizes.items())}
    for name, photo in photos.items():
        photo.save(tmp_path / f'{name}.png')
    opened, really_open = [], workbench.open_photo
    monkeypatch.setattr(
        workbench, 'open_photo', lambda p, *a: opened.append(p.stem) or really_open(p, *a)
    )
    keep = PhotoCache(0.0013)  # 1300 bytes: two photos of 600 and one of 75
    for _ in range(3):
        for name, photo in photos.items():
            ours = keep(tmp_path / f'{name}.png')
            assert ours.mode == 'RGB' and (pixels(ours) == pixels(photo)).all()
    assert opened == list('abcde') + list('ce') * 2  # e takes 27 bytes, of which 25 are left
    assert keep.room == pytest.approx(1300 - 600 - 600 - 75)
    assert {p.stem for p in keep.photos} == set('abd')


def test_cache_without_room_keeps_nothing(tmp_path):
    noise_photo().save(tmp_path / 'a.png')
    keep = PhotoCache(0)
    assert keep(tmp_path / 'a.png') is not keep(tmp_path / 'a.png')
    assert not keep.photos and keep.room == 0


def test_cache_gives_photos_back_as_they_are():
    photo, keep = noise_photo(mode='RGBA'), PhotoCache()
    assert keep(photo) is photo
    assert not keep.photos and keep.room == 2000e6


def test_cache_counts_a_gray_photo_as_rgb(tmp_path):
    noise_photo(30, 10, 'L').save(tmp_path / 'a.png')
    keep = PhotoCache(0.001)
    assert keep(tmp_path / 'a.png').mode == 'RGB'
    assert keep.room == pytest.approx(100)


def test_cache_keeps_nothing_of_a_damaged_file(tmp_path):
    noise_photo(60, 60).save(tmp_path / 'a.png')
    whole = (tmp_path / 'a.png').read_bytes()
    (tmp_path / 'a.png').write_bytes(whole[:3000])
    keep = PhotoCache(1)
    with refused(tmp_path / 'a.png'):
        keep(tmp_path / 'a.png')
    with refused(tmp_path / 'b.png'):
        keep(tmp_path / 'b.png')
    assert not keep.photos and keep.room == 1e6
    (tmp_path / 'a.png').write_bytes(whole)  # repaired
    assert keep(tmp_path / 'a.png').size == (60, 60)


# Crops


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 40), st.integers(1, 40), st.data(), st.booleans(),
)  # fmt: skip
def test_both_crops_show_the_same_place(scale, width, height, data, random_place):
    clean = place_photo(scale * width, scale * height)
    degraded = Image.fromarray(np.asarray(clean)[::scale, ::scale])
    small = data.draw(st.integers(1, min(width, height)))
    rng = np.random.default_rng(data.draw(st.integers(0, 99))) if random_place else None
    bad_crop, good_crop = crop_pair(degraded, clean, scale * small, rng)
    assert bad_crop.size == (small, small)
    assert good_crop.size == (scale * small, scale * small)
    np.testing.assert_array_equal(pixels(bad_crop), pixels(good_crop)[::scale, ::scale])
    left, top, _ = good_crop.getpixel((0, 0))
    expected = clean.crop((left, top, left + scale * small, top + scale * small))
    np.testing.assert_array_equal(pixels(good_crop), pixels(expected))
    if not random_place:
        assert (left, top) == (scale * ((width - small) // 2), scale * ((height - small) // 2))


def test_crops_lie_everywhere():
    photo, rng = place_photo(6, 5), np.random.default_rng(0)
    corners = {crop_pair(photo, photo, 3, rng)[0].getpixel((0, 0))[:2] for _ in range(300)}
    assert corners == {(x, y) for x in range(4) for y in range(3)}


@pytest.mark.parametrize(
    'degraded, clean, size, words',
    [
        ((10, 10), (20, 21), 8, ['10×10', '20×21']),
        ((10, 10), (15, 15), 5, ['10×10', '15×15']),
        ((10, 10), (20, 30), 10, ['10×10', '20×30']),
        ((10, 10), (5, 5), 4, ['10×10', '5×5']),
        ((10, 10), (10, 9), 4, ['10×9']),
        ((10, 10), (20, 20), 9, ['9', '2']),
        ((10, 10), (40, 40), 10, ['10', '4']),
        ((10, 10), (20, 20), 22, ['20×20', '22×22']),
        ((10, 30), (10, 30), 11, ['10×30', '11×11']),
    ],
)
def test_pairs_that_do_not_fit_are_refused(degraded, clean, size, words):
    for rng in (None, np.random.default_rng(0)):
        with refused(*words):
            crop_pair(Image.new('RGB', degraded), Image.new('RGB', clean), size, rng)


@pytest.mark.parametrize('size', [0, -2])
def test_a_crop_of_no_pixels_is_refused(size):
    with refused(size):
        crop_pair(Image.new('RGB', (8, 8)), Image.new('RGB', (16, 16)), size)


# Pairs


def crops_of_two_sizes(item, rng):
    "A place of a photo, 4×4 in bad and 8×8 in good."
    return crop_pair(item.resize((20, 16), Image.Resampling.NEAREST), item, 8, rng)


def test_pairs_have_a_length_and_start_over_with_each_item():
    seen = []

    def make(item, rng):
        seen.append(item)
        return Image.new('L', (1, 1), item), Image.new('L', (1, 1), item + 1)

    pairs = Pairs(make, [10, 20, 30], per_item=2)
    assert len(pairs) == 6 and len(Pairs(make, [])) == 0 and len(Pairs(make, iter('ab'))) == 2
    values = [pairs[i] for i in range(6)]
    assert seen == [10, 20, 30, 10, 20, 30]
    assert [round(float(b) * 255) for b, _ in values] == seen
    assert [round(float(g) * 255) for _, g in values] == [s + 1 for s in seen]


def test_pairs_are_float_tensors_from_0_to_1():
    photo = Image.fromarray(np.array([[[0, 51, 255]]], np.uint8))
    for fixed in (True, False):
        for x in Pairs(lambda item, rng: (photo, photo), [0], fixed=fixed)[0]:
            assert x.dtype == torch.float32 and x.shape == (3, 1, 1)
            torch.testing.assert_close(x.flatten(), torch.tensor([0, 0.2, 1]))


def test_fixed_pairs_are_always_the_same():
    photos = [place_photo(40, 32, seed) for seed in range(2)]
    pairs = Pairs(crops_of_two_sizes, photos, per_item=4, fixed=True)
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    first = [pairs[i] for i in range(8)]
    assert (np.random.get_state()[1] == before).all()  # nor do they disturb a training
    np.random.seed(2)
    again = [Pairs(crops_of_two_sizes, photos, 4, True)[i] for i in range(8)]
    assert all(torch.equal(a, b) for p, q in zip(first, again) for a, b in zip(p, q))
    corners = [tuple(levels(clean)[0, 0, :2]) for _, clean in first]
    assert len(set(corners)) > 4  # each pair is of another place
    for degraded, clean in first:  # upright: columns and rows count upwards
        assert (np.diff(levels(clean)[0, :, 0]) == 1).all()
        assert (np.diff(levels(degraded)[:, 0, 1]) == 2).all()


def test_other_pairs_follow_the_random_state_of_numpy():
    pairs = Pairs(crops_of_two_sizes, [place_photo(40, 32)])
    np.random.seed(5)
    first = [pairs[0][1] for _ in range(5)]
    np.random.seed(5)
    again = [pairs[0][1] for _ in range(5)]
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert len({x.numpy().tobytes() for x in first}) > 1


def test_bad_and_good_are_turned_alike_in_all_eight_ways():
    degraded, clean = place_photo(4, 4), place_photo(8, 8)
    ways, big = [eight(pixels(p)[..., :2]) for p in (degraded, clean)]
    pairs = Pairs(lambda item, rng: (degraded, clean), [0])
    np.random.seed(0)
    counts = np.zeros(8, int)
    for _ in range(800):
        x, y = (levels(p)[..., :2] for p in pairs[0])
        augment = [i for i, way in enumerate(ways) if (way == x).all()]
        assert len(augment) == 1 and (big[augment[0]] == y).all()
        counts[augment[0]] += 1
    assert counts.min() > 50 and counts.max() < 150  # 100 each; 50 off is five sigma


def test_pairs_that_are_not_turned_stay_as_they_were_made():
    "And are of other places in each epoch, unlike fixed ones."
    pairs = Pairs(crops_of_two_sizes, [place_photo(40, 32)], augment=False)
    corners = set()
    for _ in range(40):
        degraded, clean = (levels(x) for x in pairs[0])
        assert (np.diff(clean[0, :, 0]) == 1).all() and (np.diff(clean[:, 0, 1]) == 1).all()
        assert (np.diff(degraded[0, :, 0]) == 2).all() and (np.diff(degraded[:, 0, 1]) == 2).all()
        corners.add(tuple(clean[0, 0, :2]))
    assert len(corners) > 10


# Loaders that make pairs on the fly


def same_place(degraded, whole, photo, clean, scale=2):
    "Whether `degraded` (turned somehow) is cut out of `whole` where `clean` is cut out of `photo`."
    for b, g in zip(eight(levels(degraded)), eight(levels(clean))):
        left, top = g[0, 0, :2]
        size = len(g)
        if np.array_equal(g, pixels(photo)[top : top + size, left : left + size]):
            small = size // scale
            at = pixels(whole)[top // scale :, left // scale :][:small, :small]
            return left % scale == 0 and top % scale == 0 and np.array_equal(b, at)
    return False


def test_batches_of_half_sized_and_whole_crops():
    photos = [noise_photo(40, 36, seed=i) for i in range(5)]
    dls = recipe_dls(photos, photos[:3], 'any-kernel', size=16, bs=2, valid_size=24, device='cpu')
    shapes = [(tuple(b.shape), tuple(g.shape)) for b, g in dls.train]
    assert shapes == [((2, 3, 4, 4), (2, 3, 16, 16))] * 2  # the fifth is dropped
    shapes = [(tuple(b.shape), tuple(g.shape)) for b, g in dls.valid]
    assert shapes == [((2, 3, 6, 6), (2, 3, 24, 24)), ((1, 3, 6, 6), (1, 3, 24, 24))]
    dls = recipe_dls(photos, photos[:1], TASKS['x2'], 16, 2, per_photo=3, device='cpu')
    assert len(list(dls.train)) == len(dls.train) == 7  # 15 crops
    for degraded, clean in [*dls.train, *dls.valid]:
        assert degraded.shape[1:] == (3, 8, 8) and clean.shape[1:] == (3, 16, 16)
        assert degraded.dtype == clean.dtype == torch.float32
        assert degraded.min() >= 0 and clean.max() <= 1 and clean.std() > 0.1


def test_fewer_photos_than_a_batch_still_train():
    photos = [noise_photo(seed=i) for i in range(3)]
    dls = recipe_dls(photos, photos[:1], TASKS['x2'], size=8, bs=8, device='cpu')
    assert [len(b) for b, _ in dls.train] == [3] and [len(b) for b, _ in dls.valid] == [1]
    dls = recipe_dls(photos, photos[:1], TASKS['x2'], size=8, bs=3, device='cpu')
    assert [len(b) for b, _ in dls.train] == [3]


def test_gray_photos_have_one_channel():
    photos = [noise_photo(30, 30, 'L')]
    dls = recipe_dls(photos, photos, TASKS['x3'], size=12, bs=1, device='cpu')
    assert [tuple(x.shape) for x in next(iter(dls.train))] == [(1, 1, 4, 4), (1, 1, 12, 12)]


def test_each_crop_is_crappified_anew():
    "Cut first, then shrunk: exactly what Pillow makes of the crop."
    photo = place_photo(41, 33)
    dls = recipe_dls([photo], [photo], TASKS['x2'], size=12, per_photo=8, bs=1, device='cpu')
    for degraded, clean in [*dls.valid, *dls.train]:
        upright = [g for g in eight(levels(clean[0])) if g[0, 0, 0] < g[0, 1, 0]]
        upright = next(g for g in upright if g[0, 0, 1] < g[1, 0, 1] and g[0, 0, 1] == g[0, 1, 1])
        small = Image.fromarray(upright.astype(np.uint8)).resize((6, 6), Image.Resampling.BICUBIC)
        assert any((way == pixels(small)).all() for way in eight(levels(degraded[0])))


@pytest.mark.parametrize('once', [False, True])
@pytest.mark.parametrize('augment', [False, True])
def test_crops_are_turned_unless_told_otherwise(augment, once):
    "Columns and rows of a crop that was not turned count upwards."
    photo = place_photo(41, 33)
    recipe = Recipe('same', ())
    dls = recipe_dls(
        [photo], [photo], recipe, 12, bs=1, per_photo=40, once=once, augment=augment, device='cpu'
    )
    goods = [levels(clean[0]) for _, clean in dls.train]
    upright = [g[0, 0, 0] < g[0, 1, 0] and g[0, 0, 1] < g[1, 0, 1] for g in goods]
    assert all(upright) != augment and any(upright)


@pytest.mark.parametrize('kind', ['photos', 'paths', 'folder'])
def test_once_crappifies_each_photo_as_a_whole(kind, tmp_path):
    photo = place_photo(41, 33)
    whole = photo.crop((0, 0, 40, 32)).resize((20, 16), Image.Resampling.BICUBIC)
    photo.save(tmp_path / 'a.png')
    source = {'photos': [photo], 'paths': [tmp_path / 'a.png'], 'folder': str(tmp_path)}[kind]
    dls = recipe_dls(
        source, source, TASKS['x2'], size=12, bs=4, per_photo=20, once=True, device='cpu'
    )
    pairs = [p for batch in [*dls.train, *dls.valid, *dls.train] for p in zip(*batch)]
    assert len(pairs) == 41
    assert all(same_place(degraded, whole, photo, clean) for degraded, clean in pairs)
    corners = {tuple(levels(clean)[0, 0, :2]) for _, clean in pairs}
    assert len(corners) > 10


def test_once_opens_and_crappifies_only_once(tmp_path, monkeypatch):
    noise_photo().save(tmp_path / 'a.png')
    opened, really_open = [], workbench.open_photo
    monkeypatch.setattr(
        workbench, 'open_photo', lambda p, *a: opened.append(p) or really_open(p, *a)
    )
    recipe = Recipe('grain', (Step('noise', sigma=30),))
    dls = recipe_dls(tmp_path, tmp_path, recipe, 20, per_photo=9, bs=3, once=True, device='cpu')
    degraded = [b for batch, _ in dls.train for b in batch]
    assert len(opened) == 1
    # 24×20 has 5 places for a crop of 20: the noise is part of the place
    assert len({x.numpy().tobytes() for x in degraded}) <= 5 * 8


def test_once_makes_the_same_whatever_comes_first(tmp_path):
    "The degraded photo depends on its name alone, so that a training that goes on finds it again."
    noise_photo().save(tmp_path / 'a.png')
    recipe, batches = Recipe('grain', (Step('noise', sigma=30),)), []
    for seed in (0, 1, 2):
        np.random.seed(seed)
        dls = recipe_dls(tmp_path, tmp_path, recipe, size=16, bs=1, once=True, device='cpu')
        next(iter(dls.train))  # which may be of any place
        batches.append(next(iter(dls.valid)))
    assert not torch.equal(*batches[0])
    assert all(torch.equal(degraded, batches[0][0]) for degraded, _ in batches)


def test_once_makes_the_same_of_photos_in_memory_in_every_run():
    recipe, batches = Recipe('grain', (Step('noise', sigma=30),)), []
    held = [noise_photo(seed=3).copy() for _ in range(3)]  # as another process holds it
    for photo in held:
        dls = recipe_dls([photo], [photo], recipe, size=16, bs=1, once=True, device='cpu')
        batches.append(next(iter(dls.valid)))
    assert all(torch.equal(clean, batches[0][1]) for _, clean in batches)
    assert all(torch.equal(degraded, batches[0][0]) for degraded, _ in batches)


def test_once_neither_the_folder_nor_the_other_photos_matter(tmp_path):
    recipe, batches = Recipe('grain', (Step('noise', sigma=30),)), []
    for folder, names in (('here', ['m.png']), ('there', ['a.png', 'm.png', 'z.png'])):
        (tmp_path / folder).mkdir()
        paths = [tmp_path / folder / name for name in names]
        for path in paths:
            noise_photo().save(path)
        held = [tmp_path / folder / 'm.png']
        dls = recipe_dls(paths, held, recipe, size=16, bs=1, once=True, device='cpu')
        batches.append(next(iter(dls.valid))[0])
    assert torch.equal(*batches)


@pytest.mark.parametrize('kind', ['photos', 'paths'])
def test_once_throws_the_dice_of_each_photo_by_itself(kind, tmp_path):
    "By its name: even the same photo, named twice, gets another noise."
    noise_photo().save(tmp_path / 'a.png')
    one = noise_photo() if kind == 'photos' else tmp_path / 'a.png'
    recipe = Recipe('grain', (Step('noise', sigma=30),))
    dls = recipe_dls([one], [one] * 3, recipe, size=20, bs=3, once=True, device='cpu')
    ((degraded, clean),) = dls.valid
    whole = pixels(noise_photo())
    seen = []
    for b, g in zip(degraded, clean):
        (left,) = (x for x in range(5) if (levels(g) == whole[:, x : x + 20]).all())
        seen.append(np.pad(levels(b) - levels(g), [(0, 0), (left, 4 - left), (0, 0)]))
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        both = (seen[i] != 0).any((0, 2)) & (seen[j] != 0).any((0, 2))
        assert both.sum() >= 16 and (seen[i] != seen[j])[:, both].mean() > 0.5


@pytest.mark.parametrize('once', [False, True])
def test_photos_are_decoded_before_the_workers_start(once, tmp_path):
    "Workers are new in every epoch, and would decode all photos again."
    for i in range(3):
        noise_photo(seed=i).save(tmp_path / f'{i}.png')
    make = dict(recipe=TASKS['x2'], size=8, bs=3, once=once, device='cpu')
    alone = recipe_dls(tmp_path, tmp_path, **make)
    with_worker = recipe_dls(tmp_path, tmp_path, n_workers=1, **make)
    expected = list(alone.valid)
    for path in tmp_path.iterdir():
        path.write_bytes(b'gone')
    for ours, theirs in zip(list(with_worker.valid)[0], expected[0]):
        assert torch.equal(ours, theirs)
    assert len(list(with_worker.train)) == 1
    with refused(tmp_path):  # no worker is needed to find out
        recipe_dls(tmp_path, tmp_path, n_workers=1, **make)


@pytest.mark.parametrize('once', [False, True])
def test_a_worker_makes_batches_too(once):
    photos = [place_photo(30, 28, i) for i in range(4)]
    make = dict(recipe=TASKS['x2'], size=8, bs=2, once=once, device='cpu')
    with_worker = recipe_dls(photos, photos[:2], n_workers=1, **make)
    alone = recipe_dls(photos, photos[:2], n_workers=0, **make)
    # to the end: a worker that is left waiting takes 5 seconds to go
    for ours, expected in zip(list(with_worker.valid)[0], list(alone.valid)[0]):
        assert torch.equal(ours, expected)
    torch.manual_seed(0)
    first = [g for _, g in with_worker.train]
    again = [g for _, g in with_worker.train]
    assert len(first) == 2 and first[0].shape == (2, 3, 8, 8)
    assert not torch.equal(torch.cat(first), torch.cat(again))  # each epoch has other crops


def test_validation_is_the_same_in_every_epoch_and_run():
    photos = [noise_photo(40, 40, seed=i) for i in range(3)]
    runs = []
    for seed in (0, 1):
        np.random.seed(seed), torch.manual_seed(seed), random.seed(seed)
        dls = recipe_dls(photos, photos, 'wild', size=16, bs=3, device='cpu')
        runs += [next(iter(dls.valid)) for _ in range(2)]
        train = [next(iter(dls.train)) for _ in range(2)]
        assert not torch.equal(train[0][1], train[1][1])
    for run in runs[1:]:
        assert torch.equal(run[0], runs[0][0]) and torch.equal(run[1], runs[0][1])


def test_loaders_that_can_not_be_made_are_refused(tmp_path):
    photos = [noise_photo()]
    with refused('no photo to train'):
        recipe_dls([], photos, 'image2', device='cpu')
    with refused('no photo to validate'):
        recipe_dls(photos, [], 'image2', device='cpu')
    with refused('no photo to train'):
        recipe_dls(photos, photos, 'image2', per_photo=0, device='cpu')
    for folder in ('gone', str(tmp_path / 'gone'), tmp_path):  # tmp_path is empty
        with refused(folder):
            recipe_dls(folder, photos, 'image2', device='cpu')
        with refused(folder):
            recipe_dls(photos, folder, 'image2', device='cpu')
    with refused("'image3'", 'image2'):
        recipe_dls(photos, photos, 'image3', device='cpu')
    with refused("'nowhere'"):
        recipe_dls(photos, photos, 'image2', device='nowhere')


@pytest.mark.parametrize('once', [False, True])
def test_crops_that_can_not_be_cut_are_refused(once, tmp_path):
    photos = [noise_photo(40, 19)]
    make = dict(once=once, bs=1, device='cpu')
    dls = recipe_dls(photos, photos, TASKS['x2'], size=20, **make)
    for dl in (dls.train, dls.valid):
        with refused('20'):
            list(dl)
    with refused('15'):  # 'trim' before the crop does not make 15 even
        list(recipe_dls(photos, photos, TASKS['x4'], size=15, **make).train)
    (tmp_path / 'a.png').write_bytes(b'no photo')
    with refused(tmp_path / 'a.png'):
        list(recipe_dls(tmp_path, tmp_path, 'image2', size=8, **make).train)


def test_an_error_in_a_worker_is_a_photo_error_too(monkeypatch):
    # how long the worker, which is left waiting, is waited for
    monkeypatch.setattr(torch.utils.data._utils, 'MP_STATUS_CHECK_INTERVAL', 0.2)
    photos = [noise_photo(10, 10)]
    dls = recipe_dls(photos, photos, 'image2', size=20, bs=1, n_workers=1, device='cpu')
    with pytest.raises(EnhanceError, match='smaller than the crop') as error:
        list(dls.train)
    del error, dls
    gc.collect()


# Loaders from two folders


def two_folders(home, names, scale=2, bad_suffix=None, size=(24, 20)):
    "Clean photos that say where each pixel is, and every `scale`-th of their pixels as degraded ones."
    for i, name in enumerate(names):
        clean = place_photo(*size, seed=i)
        degraded = Image.fromarray(np.asarray(clean)[::scale, ::scale])
        for folder, photo in (('clean', clean), ('degraded', degraded)):
            path = home / folder / name
            if folder == 'degraded' and bad_suffix:
                path = path.with_suffix(bad_suffix)
            path.parent.mkdir(parents=True, exist_ok=True)
            photo.save(path, quality=95)
    return home / 'clean', home / 'degraded'


def test_pairs_from_two_folders(tmp_path):
    clean, degraded = two_folders(tmp_path, [f'{i:02}.png' for i in range(20)] + ['sub/20.png'])
    dls = folder_dls(clean, str(degraded), size=8, bs=4, per_photo=2, device='cpu')
    assert len(dls.train_ds) == 36 and len(dls.valid_ds) == 3  # 0, 10 and 20 validate
    assert [p.as_posix() for p in dls.valid_ds.items] == ['00.png', '10.png', 'sub/20.png']
    batches = [*dls.train, *dls.valid]
    assert [len(b) for b, _ in batches] == [4] * 9 + [3]
    for bad_one, good_one in (p for batch in batches for p in zip(*batch)):
        assert any(
            (b == g[::2, ::2]).all() or (b == g[1::2, ::2]).all()
            or (b == g[::2, 1::2]).all() or (b == g[1::2, 1::2]).all()  # where it was turned
            for b, g in [(levels(bad_one), levels(good_one))]
        )  # fmt: skip


def test_a_table_says_which_photos_validate(tmp_path):
    clean, degraded = two_folders(tmp_path, ['a.png', 'b.png', 'c.png', 'd.png'])
    table = tmp_path / 'table.csv'
    table.write_text('fnames,is_val\nb.png,True\nc.png,False\na.png,false\n')  # not d
    dls = folder_dls(clean, degraded, 8, bs=1, table=table, device='cpu')
    assert [p.name for p in dls.valid_ds.items] == ['b.png']
    assert [p.name for p in dls.train_ds.items] == ['c.png', 'a.png']
    whole = Image.open(degraded / 'b.png'), Image.open(clean / 'b.png')
    (x,), (y,) = next(iter(dls.valid))
    assert same_place(x, whole[0], whole[1], y)


def test_suffixes_may_differ(tmp_path):
    clean, degraded = two_folders(tmp_path, ['a.png', 'b.x.png'], bad_suffix='.jpg')
    (clean / 'c.d.png').write_bytes((clean / 'a.png').read_bytes())
    Image.open(degraded / 'a.jpg').save(degraded / 'c.d.webp')
    assert sorted(p.name for p in degraded.iterdir()) == ['a.jpg', 'b.x.jpg', 'c.d.webp']
    dls = folder_dls(clean, degraded, size=8, bs=2, device='cpu')
    assert [tuple(x.shape) for x in next(iter(dls.train))] == [(2, 3, 4, 4), (2, 3, 8, 8)]


def test_missing_partners_are_named(tmp_path):
    clean, degraded = two_folders(tmp_path, [f'{i:02}.png' for i in range(14)])
    for i in range(3):
        (degraded / f'{i:02}.png').unlink()
    with refused('3 photos', degraded, '00.png', '01.png', '02.png'):
        folder_dls(clean, degraded, size=8, device='cpu')
    for i in range(3, 13):
        (degraded / f'{i:02}.png').unlink()
    with pytest.raises(EnhanceError) as error:
        folder_dls(clean, degraded, size=8, device='cpu')
    message = one_line(error)
    assert '13 photos' in message and '09.png, …' in message and '10.png' not in message


def test_who_belongs_to_whom(tmp_path):
    clean, degraded = tmp_path / 'clean', tmp_path / 'degraded'
    for folder, names in {
        clean: [
            'a.png',
            'b.jpg',
            'b.png',
            'c.jpg',
            'c.png',
            'sub/d.jpg',
            'e.png',
            'f.jpg',
            'f.png',
        ],
        degraded: [
            'a.jpg',
            'b.jpg',
            'b.png',
            'c.jpg.png',
            'c.png.png',
            'sub/d.webp',
            'f.png',
            'z.png',
        ],
    }.items():
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            noise_photo().save(folder / name)
    found = {
        k.as_posix(): v.relative_to(degraded).as_posix()
        for k, v in degraded_versions(clean, degraded).items()
    }
    assert found == {
        'a.png': 'a.jpg',
        'b.jpg': 'b.jpg',
        'b.png': 'b.png',
        'c.jpg': 'c.jpg.png',
        'c.png': 'c.png.png',
        'sub/d.jpg': 'sub/d.webp',
        'f.png': 'f.png',  # so f.jpg and e.png have none
    }


@pytest.mark.parametrize(
    'goods, bads', [(['a.jpg', 'a.png'], ['a.webp']), (['a.jpg'], ['a.png', 'a.webp'])]
)
def test_it_is_said_when_nobody_can_know_who_belongs_to_whom(tmp_path, goods, bads):
    for folder, names in (('clean', goods), ('degraded', bads)):
        (tmp_path / folder).mkdir()
        for name in names:
            noise_photo().save(tmp_path / folder / name)
    with refused('a.jpg', tmp_path / 'degraded', 'not clear'):
        folder_dls(tmp_path / 'clean', tmp_path / 'degraded', size=8, device='cpu')


@pytest.mark.parametrize('format', [None, 'png'])
def test_what_crappify_folder_writes_is_found_again(tmp_path, format):
    (tmp_path / 'clean').mkdir()
    for name in 'x.bmp', 'x.png', 'y.jpg':
        noise_photo(seed=len(name) + ord(name[-1])).save(tmp_path / 'clean' / name)
    recipe = Recipe('as it is', (Step('brightness', factor=1.0),))
    crappify_folder(
        tmp_path / 'clean',
        tmp_path / 'degraded',
        recipe,
        format=format,
        n_workers=1,
        progress=False,
    )
    versions = degraded_versions(tmp_path / 'clean', tmp_path / 'degraded')
    assert len(versions) == 3
    for name in 'x.bmp', 'x.png':
        degraded = Image.open(versions[Path(name)]).convert('RGB')
        assert (pixels(degraded) == pixels(Image.open(tmp_path / 'clean' / name))).all()


@pytest.mark.parametrize('augment', [False, True])
def test_pairs_from_folders_are_turned_only_when_asked(tmp_path, augment):
    clean, degraded = two_folders(tmp_path, ['a.png', 'b.png'], scale=1)
    dls = folder_dls(clean, degraded, size=20, bs=1, per_photo=30, augment=augment, device='cpu')
    upright = [levels(y[0])[0, 0, 0] < levels(y[0])[0, -1, 0] for _, y in dls.train]
    assert all(upright) != augment


def test_folders_that_do_not_fit_are_refused(tmp_path):
    clean, degraded = two_folders(tmp_path, ['a.png', 'b.png'])
    with refused(tmp_path / 'gone'):
        folder_dls(tmp_path / 'gone', degraded, size=8, device='cpu')
    with refused(tmp_path / 'gone'):
        folder_dls(clean, tmp_path / 'gone', size=8, device='cpu')
    with refused(tmp_path / 'gone.csv'):
        folder_dls(clean, degraded, size=8, table=tmp_path / 'gone.csv', device='cpu')
    table = tmp_path / 'table.csv'
    for content, word in [
        ('fnames,is_val\na.png,True\nb.png,True\n', 'train'),
        ('fnames,is_val\na.png,False\n', 'validate'),
        ('fnames,is_val\n', 'train'),
        ('fnames,is_val\na.png,True\nz.png,False\n', 'z.png'),
        ('name\na.png\n', 'fnames'),
    ]:
        table.write_text(content)
        with refused(word):
            folder_dls(clean, degraded, size=8, table=table, device='cpu')
    (clean / 'b.png').unlink()
    with refused('train'):  # the only photo validates
        folder_dls(clean, degraded, size=8, device='cpu')


def test_a_pair_that_does_not_fit_is_refused_when_its_turn_comes(tmp_path):
    clean, degraded = two_folders(tmp_path, ['a.png', 'b.png'])
    dls = folder_dls(clean, degraded, size=22, bs=1, device='cpu')
    with refused('24×20', '22×22'):
        list(dls.train)
    with refused('7', '2'):
        list(folder_dls(clean, degraded, size=7, bs=1, device='cpu').train)
    Image.new('RGB', (13, 10)).save(degraded / 'b.png')
    with refused(clean / 'b.png', '13×10', '24×20'):
        list(folder_dls(clean, degraded, size=8, bs=1, device='cpu').train)
    (degraded / 'b.png').write_bytes(b'')
    with refused(degraded / 'b.png'):
        list(folder_dls(clean, degraded, size=8, bs=1, device='cpu').train)


# Training in half precision


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


TRAIN_PHOTOS = [noise_photo(20, 18, seed=i) for i in range(6)]


def tiny_learner(seed=0, opt_func=Adam, cbs=(), loss=None, model=None, n_workers=0):
    "A training in which everything is drawn: first weights, order, crops, turns, noise, dropout."
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    recipe = Recipe('grain', (Step('noise', sigma=20),))
    dls = recipe_dls(
        TRAIN_PHOTOS, TRAIN_PHOTOS[:2], recipe, 8, bs=2, n_workers=n_workers, device='cpu'
    )
    return Learner(
        dls,
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


@pytest.fixture
def clean_autocast():
    "Whatever a test leaves on is switched off after it."
    yield
    torch.set_autocast_enabled('cpu', False)
    for _ in range(torch.autocast_increment_nesting()):
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()


def test_without_half_precision_the_callback_changes_nothing(monkeypatch):
    monkeypatch.setattr(workbench, 'half_dtype', lambda device: None)
    look = Look(5, lambda cb: cb.pred.dtype)
    with_it = train(tiny_learner(cbs=[AutocastCPU(), look]), 2)
    without = train(tiny_learner(), 2)
    assert set(look.seen) == {torch.float32}
    assert equal_weights(with_it.model, without.model)


def watched_net(inside):
    "A network that writes down what its first layer computes in."
    net = tiny_net()
    net[0].register_forward_hook(lambda layer, x, y: inside.append(y.dtype))
    return net


def hooks_of(model):
    return len(model._forward_hooks) + len(model._forward_pre_hooks) + ('forward' in vars(model))


def test_a_cpu_with_half_precision_computes_in_it(monkeypatch, clean_autocast):
    monkeypatch.setattr(workbench, 'half_dtype', lambda device: torch.bfloat16)
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


def test_a_gpu_is_left_to_fastai(monkeypatch):
    monkeypatch.setattr(workbench, 'half_dtype', lambda device: torch.float16)
    learn = tiny_learner(cbs=[AutocastCPU()])
    learn.dls.device = torch.device('meta')
    callback = next(cb for cb in learn.cbs if isinstance(cb, AutocastCPU))
    callback.before_fit()
    assert not hooks_of(learn.model)
    callback.after_fit()


def test_predictions_after_a_training_work(monkeypatch, clean_autocast):
    monkeypatch.setattr(workbench, 'half_dtype', lambda device: torch.bfloat16)
    learn = train(tiny_learner(cbs=[AutocastCPU()]), 1)
    with learn.no_bar(), learn.no_logging():
        predictions, targets = learn.get_preds()
        learn.validate()
    assert predictions.shape == targets.shape == (2, 3, 8, 8)
    assert predictions.dtype == torch.float32
    assert not torch.is_autocast_enabled('cpu')


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
def test_autocast_ends_with_a_training_that_is_stopped(name, monkeypatch, clean_autocast):
    """Or else all that follows in the notebook is computed in bfloat16. Worse: autocast's cache of
    weights is never cleared again, so that later trainings compute with old weights."""
    monkeypatch.setattr(workbench, 'half_dtype', lambda device: torch.bfloat16)
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


# Checkpoints


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

    random.seed(1), np.random.seed(2), torch.manual_seed(3)
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
    assert torch.load(tmp_path / 'states', weights_only=True).keys() == {
        'python', 'numpy', 'torch', 'cuda', 'mps'
    }  # fmt: skip


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


@pytest.mark.parametrize('opt_func', [Adam, RMSProp])
def test_a_training_killed_in_any_epoch_ends_as_if_it_had_not_been(opt_func, tmp_path):
    straight = train(tiny_learner(opt_func=opt_func))
    assert not equal_weights(straight.model, tiny_learner().model, within=0.01)  # it learned
    for epoch in range(1, 4):
        for at, when in [('before_batch', 0), ('after_step', 2)]:
            path = tmp_path / f'{epoch}-{at}'
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


def test_a_training_may_be_killed_again_and_again(tmp_path, monkeypatch, clean_autocast):
    monkeypatch.setattr(workbench, 'half_dtype', lambda device: torch.bfloat16)
    straight = train(tiny_learner(cbs=[AutocastCPU()]))
    for run, epoch in enumerate([1, 1, 2, 3, None]):
        # killed where autocast is off: that it stays on is another test
        cbs = [CheckpointEachEpoch(tmp_path / 'c')]
        if epoch:
            cbs.append(Stop(Killed(), epoch, 1, 'before_batch', order=-5))
        learn = tiny_learner(seed=run, cbs=[AutocastCPU()])
        if epoch:
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
    content = path.read_bytes()
    steps = Look(5, lambda cb: cb.iter, 'after_step')
    again = train(tiny_learner(seed=5, cbs=[steps]), cbs=[CheckpointEachEpoch(path)])
    assert not steps.seen
    assert equal_weights(first.model, again.model)
    assert path.read_bytes() == content


def test_keeping_on_changes_nothing_of_a_training(tmp_path):
    plain = train(tiny_learner(), 2)
    kept = train(tiny_learner(), 2, [CheckpointEachEpoch(tmp_path / 'c')])
    assert equal_weights(plain.model, kept.model)
    assert [p.name for p in tmp_path.iterdir()] == ['c']


def last_line(error):
    "fastai puts a line of its own before the message of an error in a callback."
    first, _, message = str(error.value).partition('\n\t')
    assert 'KeepGoing' in first
    assert message and '\n' not in message
    return message


def test_another_number_of_epochs_is_refused(tmp_path):
    path = tmp_path / 'c'
    train(tiny_learner(), 2, [CheckpointEachEpoch(path)])
    content = path.read_bytes()
    for epochs in (1, 3):
        with pytest.raises(EnhanceError) as error:
            train(tiny_learner(), epochs, [CheckpointEachEpoch(path)])
        message = last_line(error)
        assert str(path) in message and f'(epochs was 2, not {epochs})' in message
    assert path.read_bytes() == content


def test_a_training_that_is_refused_leaves_the_model_as_it_was(tmp_path):
    train(tiny_learner(), 2, [CheckpointEachEpoch(tmp_path / 'c')])
    learn, same = tiny_learner(seed=4), tiny_learner(seed=4)
    with pytest.raises(EnhanceError):
        train(learn, 3, [CheckpointEachEpoch(tmp_path / 'c')])
    assert equal_weights(learn.model, same.model)


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    path = tmp_path / 'c'
    save_checkpoint(
        path, 1, model=nn.Linear(3, 2), optimizer=Adam([nn.Parameter(torch.ones(1))], 0.1)
    )
    with pytest.raises(EnhanceError) as error:
        train(tiny_learner(), 2, [CheckpointEachEpoch(path)])
    assert str(path) in last_line(error)
    with refused(path, 'Remove it'):
        load_checkpoint(path, model=tiny_net())
    with refused(path):
        load_checkpoint(path, model=nn.Linear(3, 2), schedule=nn.Linear(1, 1))  # not in it


def test_a_checkpoint_of_a_loop_by_hand_is_refused_by_the_callback(tmp_path):
    path, learn = tmp_path / 'c', tiny_learner()
    learn.create_opt()
    save_checkpoint(path, 1, model=learn.model, optimizer=learn.opt)
    with pytest.raises(EnhanceError):
        train(learn, 2, [CheckpointEachEpoch(path)])


def half_fitting():
    "Two networks of which the first layer fits, and the second does not."
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 3)), nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)
    )


def test_a_refused_checkpoint_leaves_the_model_as_it_was(tmp_path):
    kept, other = half_fitting()
    save_checkpoint(tmp_path / 'c', 1, model=kept)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with refused(tmp_path / 'c'):
        load_checkpoint(tmp_path / 'c', model=other)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


def test_an_optimizer_that_does_not_fit_leaves_the_model_as_it_was(tmp_path):
    kept, other = tiny_net(), tiny_net()
    save_checkpoint(tmp_path / 'c', 1, model=kept, optimizer=Adam([list(kept.parameters())], 0.1))
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with refused(tmp_path / 'c'):
        load_checkpoint(tmp_path / 'c', model=other, optimizer=Adam(two_groups(other), 0.1))
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


def trained_parts(kind, seed, steps):
    "A network, its optimizer and an order, after some steps."
    torch.manual_seed(seed)
    model = tiny_net()
    make = {'fastai': lambda m: Adam(two_groups(m), 0.1 + seed), 'torch': torch_adam(0.1 + seed)}
    optimizer = make[kind](model)
    dls = recipe_dls(TRAIN_PHOTOS, TRAIN_PHOTOS, TASKS['x2'], 8, bs=2, device='cpu')
    for _ in range(steps):
        model(torch.rand(2, 3, 5, 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {'model': model, 'optimizer': optimizer, 'order': LoaderState(dls)}


def torch_adam(lr):
    return lambda model: torch.optim.Adam(model.parameters(), lr)


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
        with refused(path, words, 'Remove it'):
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


def test_what_an_optimizer_remembers_goes_where_its_weights_are(tmp_path, monkeypatch):
    learn = train(tiny_learner(), 1)
    save_checkpoint(tmp_path / 'c', 1, optimizer=learn.opt)
    there = tiny_net().to('meta')  # a device that every machine has, but random numbers have not
    monkeypatch.setattr(workbench, 'set_random_states', lambda states: None)
    optimizer = Adam(two_groups(there), 0.1)
    load_checkpoint(tmp_path / 'c', device='meta', optimizer=optimizer)
    states = [optimizer.state[p]['grad_avg'].device.type for p in there.parameters()]
    assert set(states) == {'meta'}


def test_the_callback_loads_to_the_device_of_the_training(tmp_path, monkeypatch):
    asked, load = [], torch.load

    def look(*args, map_location, **kwargs):
        asked.append(map_location)
        return load(*args, map_location=map_location, **kwargs)

    train(tiny_learner(), 1, [CheckpointEachEpoch(tmp_path / 'c')])
    monkeypatch.setattr(torch, 'load', look)
    train(tiny_learner(), 1, [CheckpointEachEpoch(tmp_path / 'c')])
    assert asked == [CPU]


def test_a_damaged_checkpoint_is_refused(tmp_path):
    path = tmp_path / 'c'
    save_checkpoint(path, 1, model=tiny_net())
    whole = path.read_bytes()
    for content in [b'', b'x', whole[:10], whole[: len(whole) // 2], whole[:-1], b'\n' * 50]:
        path.write_bytes(content)
        with refused(path, 'Remove it'):
            load_checkpoint(path, model=tiny_net())
    path.unlink()
    path.mkdir()
    with refused(path):
        load_checkpoint(path, model=tiny_net())


@pytest.mark.parametrize(
    'content', [[], 5, {}, {'parts': {}}, {'parts': {}, 'random': {}, 'step': 1}, None]
)
def test_a_checkpoint_of_another_kind_is_refused(content, tmp_path):
    torch.save(content, tmp_path / 'c')
    with refused(tmp_path / 'c', 'Remove it'):
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
    with refused(path):
        load_checkpoint(path, model=tiny_net())
    with pytest.raises(EnhanceError) as error:
        train(tiny_learner(), 1, [CheckpointEachEpoch(path)])
    message = last_line(error)
    assert str(path) in message and 'weights_only' not in message
    assert not evil.folder.exists()
    torch.load(path, weights_only=False) if kind != 'pickle' else pickle.loads(path.read_bytes())
    assert evil.folder.exists()  # it would have run


@pytest.mark.parametrize('failure', [OSError(errno.ENOSPC, 'No space left'), Killed()])
def test_a_checkpoint_is_replaced_whole_or_not_at_all(failure, tmp_path, monkeypatch):
    path = tmp_path / 'c'
    save_checkpoint(path, 1, model=tiny_net())
    whole = path.read_bytes()

    def half(states, target):
        Path(target).write_bytes(whole[: len(whole) // 2])
        raise failure

    monkeypatch.setattr(torch, 'save', half)
    with pytest.raises(EnhanceError if isinstance(failure, OSError) else Killed) as error:
        save_checkpoint(path, 2, model=tiny_net())
    if isinstance(failure, OSError):
        assert str(path) in one_line(error) and 'No space left' in one_line(error)
    assert path.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == ['c']
    assert load_checkpoint(path)[0] == 1


@contextmanager
def disk_of(size):
    "No file may become larger than `size` bytes: a write beyond it fails, as on a full disk."
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_a_photo_error(tmp_path):
    path = tmp_path / 'c'
    save_checkpoint(path, 1)
    with refused(path), disk_of(100_000):
        save_checkpoint(path, 2, model=nn.Linear(1000, 1000))


def test_a_full_disk_costs_no_checkpoint(tmp_path):
    path = tmp_path / 'c'
    save_checkpoint(path, 1)
    with pytest.raises((EnhanceError, RuntimeError)), disk_of(100_000):
        save_checkpoint(path, 2, model=nn.Linear(1000, 1000))
    assert load_checkpoint(path)[0] == 1
    assert [p.name for p in tmp_path.iterdir()] == ['c']


def test_the_callback_does_not_belong_to_a_learner(tmp_path):
    "There it would also act on lr_find, get_preds and validate, and on a second training."
    with pytest.raises(EnhanceError, match='KeepGoing belongs to one training') as error:
        tiny_learner(cbs=[CheckpointEachEpoch(tmp_path / 'c')])
    assert 'fit(…, cbs=KeepGoing(path))' in last_line(error)
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


def test_the_order_of_the_photos_comes_back(tmp_path):
    dls, other = (
        recipe_dls(TRAIN_PHOTOS, TRAIN_PHOTOS, TASKS['x2'], 8, bs=2, device='cpu') for _ in 'ab'
    )
    order, same = LoaderState(dls), LoaderState(other)
    save_checkpoint(tmp_path / 'c', 1, order=order)  # of plain numbers
    first = [dls.train.get_idxs() for _ in range(3) if dls.train.randomize() is None]
    load_checkpoint(tmp_path / 'c', order=same)
    again = [other.train.get_idxs() for _ in range(3) if other.train.randomize() is None]
    assert first == again and len(set(map(tuple, first))) > 1


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
import os, random, signal, sys
import numpy as np, torch, warnings
warnings.simplefilter('ignore')
import fastai.callback.schedule
from fastai.callback.core import Callback
from fastai.learner import Learner
from PIL import Image
from torch import nn
from enhance_lib.crappify import Recipe, Step
from enhance_lib.workbench import KeepGoing, recipe_dls

home = sys.argv[1]
torch.set_num_threads(1)

class Die(Callback):
    order = 90
    def before_batch(self):
        if self.training and (self.epoch, self.iter) == (2, 1):
            os.kill(os.getpid(), signal.SIGKILL)

def die_while_writing():
    save, saved = torch.save, []
    def half(states, target):
        save(states, target)
        saved.append(target)
        if states['step'] == 3:
            os.truncate(target, os.path.getsize(target) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    torch.save = half

def run(name, seed, checkpoint, die=None):
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    noise = np.random.default_rng(0).integers(0, 256, (6, 20, 20, 3), dtype=np.uint8)
    photos = [Image.fromarray(n) for n in noise]
    recipe = Recipe('grain', (Step('noise', sigma=20),))
    dls = recipe_dls(photos, photos[:2], recipe, 8, bs=2, device='cpu')
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Dropout(.2), nn.Conv2d(4, 3, 1))
    if die == 'writing':
        die_while_writing()
    learn = Learner(dls, net, nn.MSELoss(), cbs=[Die] if die == 'training' else [])
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(4, 1e-2, cbs=KeepGoing(f'{home}/{checkpoint}'))
    torch.save(net.state_dict(), f'{home}/{name}.weights')

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
    script = tmp_path / 'script.py'
    script.write_text(SCRIPT)
    root = Path(workbench.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, script, tmp_path],
        env={**os.environ, 'PYTHONPATH': str(root)},
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


# Training loops by hand


def loop_by_hand(seed, path, epochs=4, die=None):
    "A loop as a lesson would write it, which keeps the order of its photos as well."
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    recipe = Recipe('grain', (Step('noise', sigma=20),))
    dls = recipe_dls(TRAIN_PHOTOS, TRAIN_PHOTOS[:2], recipe, 8, bs=2, device='cpu')
    model = tiny_net()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=3 * epochs)
    parts = {
        'model': model,
        'optimizer': optimizer,
        'schedule': schedule,
        'order': LoaderState(dls),
    }
    start, kept = load_checkpoint(path, **parts, epochs=epochs)
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
        save_checkpoint(path, epoch + 1, **parts, epochs=epochs, losses=losses)
    return model, losses


@pytest.mark.parametrize('epoch', [1, 2, 3])
def test_a_loop_by_hand_goes_on_too(epoch, tmp_path):
    straight, losses = loop_by_hand(0, tmp_path / 'one')
    with pytest.raises(Killed):
        loop_by_hand(0, tmp_path / 'two', die=(epoch, 1))
    model, again = loop_by_hand(7, tmp_path / 'two')
    assert equal_weights(straight, model, within=1e-6)
    assert len(losses) == 12 and again == pytest.approx(losses, abs=1e-6)


@contextmanager
def killed_after(epoch, monkeypatch):
    "The loop of lesson 03 dies when it has written the checkpoint of this epoch."

    def save_and_die(path, step, **parts):
        save_checkpoint(path, step, **parts)
        if step == epoch:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(srcnn, 'save_checkpoint', save_and_die)
        with pytest.raises(Killed):
            yield


def fit_srcnn(path, seed, epochs=3, photos=None, recipe=TASKS['x2']):
    "The loop of lesson 03 on photos that are twice as large as the network's input."
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    photos = photos or [noise_photo(32, 30, 'L', seed=i) for i in range(6)]
    dls = recipe_dls(photos, photos[:1], recipe, 24, bs=2, once=True, device='cpu')
    model = SRCNN(2, residual=True)
    return model, srcnn.fit(model, dls, epochs, checkpoint=path, progress=False)


@pytest.mark.parametrize('kind', ['photos', 'paths'])
def test_the_loop_of_lesson_04_goes_on_as_if_it_had_not_been_killed(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(workbench, 'half_dtype', lambda device: None)
    recipe = Recipe('grain', (Step('noise', sigma=20), *TASKS['x2'].steps))
    for i in range(6):
        noise_photo(32, 30, 'L', seed=i).save(tmp_path / f'{i}.png')

    def photos():  # as each process has them
        paths = [tmp_path / f'{i}.png' for i in range(6)]
        return [Image.open(p).copy() for p in paths] if kind == 'photos' else paths

    straight, history = fit_srcnn(tmp_path / 'one', 0, photos=photos(), recipe=recipe)
    for epoch in (1, 2):
        with killed_after(epoch, monkeypatch):
            fit_srcnn(tmp_path / f'two-{epoch}', 0, photos=photos(), recipe=recipe)
        model, again = fit_srcnn(tmp_path / f'two-{epoch}', 5, photos=photos(), recipe=recipe)
        assert len(history) == len(again) == 3
        assert equal_weights(straight, model, within=1e-6)
        for row, same in zip(history, again):
            assert row == pytest.approx(same, abs=1e-4)


def test_a_published_model_goes_on_as_if_its_training_had_not_been_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(workbench, 'half_dtype', lambda device: None)
    for i in range(5):
        place_photo(300, 296, seed=i).save(tmp_path / f'{i}.png')
    photos = [tmp_path / f'{i}.png' for i in (4, 0, 2, 1, 3, 3)]

    def run(name):
        # 8 crops of each photo; two rounds, of 5 and 3 epochs
        budget = lambda smoke, *_: 8 if smoke == 1 else ((5, 4e-3), (3, 2e-3))  # noqa: E731
        return srcnn.train_published('srcnn-x2', photos, tmp_path / name, budget)

    monkeypatch.setattr(srcnn, 'progress_bar', lambda epochs: epochs)
    straight, history = run('one')
    with killed_after(3, monkeypatch):
        run('two')
    model, again = run('two')
    assert (
        [row['epoch'] for row in again]
        == [row['epoch'] for row in history]
        == [1, 2, 3, 4, 5, 1, 2, 3]
    )
    assert equal_weights(straight, model, within=1e-6)
    assert not equal_weights(straight, SRCNN(2, residual=True), within=1e-3)


def test_the_loop_of_lesson_04_refuses_another_number_of_epochs(tmp_path):
    fit_srcnn(tmp_path / 'c', 0, epochs=1)
    with refused(tmp_path / 'c', '(epochs was 1, not 2)'):
        fit_srcnn(tmp_path / 'c', 0, epochs=2)


def test_the_loop_of_lesson_04_keeps_its_history_and_does_nothing_twice(tmp_path, monkeypatch):
    path = tmp_path / 'c'
    with killed_after(2, monkeypatch):
        fit_srcnn(path, 0)
    _, kept = load_checkpoint(path)
    model, history = fit_srcnn(path, 0)
    assert [row['epoch'] for row in history] == [1, 2, 3]
    assert history[:2] == kept['history']
    again, same = fit_srcnn(path, 8)
    assert same == history and equal_weights(model, again)


# Enhancing photos


class Double(PhotoModel):
    "Each pixel becomes four of the negative: what comes out is known exactly."

    scale, margin = 2, 0

    def __init__(self, gray=False):
        super().__init__()
        self.arguments, self.gray, self.seen = {'gray': gray}, gray, []

    def forward(self, x):
        self.seen.append(tuple(x.shape))
        return 1 - x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def doubled_negative(photo):
    "The same by Pillow, for L and RGB."
    return ImageOps.invert(photo.resize((2 * photo.width, 2 * photo.height), Image.NEAREST))


class Blur(PhotoModel):
    "The mean of 7×7 pixels. It sees 3 pixels far."

    margin = 3

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.ones(1))
        self.shapes = []

    def forward(self, x):
        self.shapes.append(tuple(x.shape[2:]))
        return self.weights * F.avg_pool2d(F.pad(x, (3, 3, 3, 3), mode='replicate'), 7, 1)


def blurred(photo):
    "The same by scipy."
    size = (7, 7, 1)[: np.asarray(photo).ndim]
    return uniform_filter(np.asarray(photo, float), size, mode='nearest')


def bright_srcnn(scale=1, residual=True, seed=0, size=1.0):
    "An untrained SRCNN that changes a photo a lot."
    torch.manual_seed(seed)
    model = SRCNN(scale, residual)
    with torch.no_grad():
        for p in model.parameters():
            p *= size
    return model


@pytest.mark.parametrize('gray', [False, True])
@pytest.mark.parametrize('size', [(1, 1), (1, 9), (11, 1), (7, 5), (16, 16), (33, 47)])
@pytest.mark.parametrize('mode', ['L', 'RGB'])
def test_what_comes_out_is_what_the_network_made(mode, size, gray):
    photo, model = noise_photo(*size, mode=mode), Double(gray)
    model.tile = 16
    better = model.predict(photo)
    expected = doubled_negative(photo)
    assert better.mode == mode and better.size == expected.size
    assert (pixels(better) == pixels(expected)).all()
    assert {shape[:2] for shape in model.seen} == {(1, 1 if gray and mode == 'L' else 3)}
    assert (len(model.seen) > 1) == (max(size) > 16)


@pytest.mark.parametrize('gray', [False, True])
@pytest.mark.parametrize('mode', ['LA', 'RGBA'])
def test_transparency_is_kept(mode, gray):
    photo = noise_photo(12, 9, mode)
    better = Double(gray).predict(photo)
    assert better.mode == mode and better.size == (24, 18)
    colors = 'L' if mode == 'LA' else 'RGB'
    alpha = photo.getchannel('A')
    # transparent pixels too: their colors are only hidden
    plain = Image.merge(colors, photo.split()[:-1])
    ours = Image.merge(colors, better.split()[:-1])
    assert (pixels(ours) == pixels(doubled_negative(plain))).all()
    expected = alpha.resize((24, 18), Image.Resampling.BICUBIC)
    assert (pixels(better.getchannel('A')) == pixels(expected)).all()
    for level in (0, 77, 255):
        photo.putalpha(level)
        assert set(pixels(Double(gray).predict(photo).getchannel('A')).flat) == {level}


def test_photos_of_other_modes_come_out_as_they_are_opened():
    rgb = noise_photo(10, 6)
    palette = rgb.quantize(8)
    better = Double().predict(palette)
    assert better.mode == 'RGB'
    assert (pixels(better) == pixels(doubled_negative(palette.convert('RGB')))).all()
    two = noise_photo(10, 6, 'L').convert('1')
    better = Double(gray=True).predict(two)
    assert better.mode == 'L'
    assert (pixels(better) == pixels(doubled_negative(two.convert('L')))).all()
    deep = Image.fromarray(np.array([[0, 257 * 10, 257 * 200, 65535]], np.uint16))
    better = Double().predict(deep)
    assert better.mode == 'L' and better.size == (8, 2)
    assert pixels(better)[0].tolist() == [255, 255, 245, 245, 55, 55, 0, 0]


def test_a_photo_is_turned_upright_first(tmp_path):
    photo, exif = noise_photo(10, 6), Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn it clockwise
    photo.save(tmp_path / 'a.png', exif=exif)
    better = Double().predict(tmp_path / 'a.png')
    assert better.size == (12, 20)
    expected = doubled_negative(photo.transpose(Image.Transpose.ROTATE_270))
    assert (pixels(better) == pixels(expected)).all()
    kept = Image.Exif()
    kept.load(better.info.get('exif', b''))
    assert kept.get(0x0112, 1) == 1  # or else viewers would turn it again


def test_the_color_profile_is_kept_and_the_photo_given_is_left_alone(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    photo = noise_photo(9, 7)
    photo.info = {'icc_profile': profile, 'dpi': (300, 300), 'comment': 'x'}
    before, info = photo.tobytes(), dict(photo.info)
    better = Double().predict(photo)
    assert better.info == {'icc_profile': profile, 'dpi': (300, 300)}
    assert photo.tobytes() == before and photo.info == info and photo.size == (9, 7)
    photo.save(tmp_path / 'a.png', icc_profile=profile)
    assert Double().predict(str(tmp_path / 'a.png')).info['icc_profile'] == profile


@pytest.mark.parametrize('mode', ['L', 'RGB'])
@pytest.mark.parametrize('scale', [2, 3, 4])
def test_an_srcnn_of_nothing_but_zeros_is_bicubic_by_pillow(scale, mode):
    "Its residual is 0: what is left is the enlarging, at the border too."
    # of mid tones: between its two directions Pillow cuts off what goes beyond black and white
    photo = noise_photo(24, 17, 'L').point(lambda v: 64 + v // 2)
    model = bright_srcnn(scale, size=0.0)
    model.tile = 10
    expected = photo.resize((scale * 24, scale * 17), Image.Resampling.BICUBIC)
    ours = model.predict(photo.convert(mode), fast=False)
    assert ours.mode == mode
    difference = pixels(ours).reshape(17 * scale, 24 * scale, -1) - pixels(expected)[..., None]
    # and it rounds in between
    assert np.abs(difference).max() <= 2 and np.abs(difference).mean() < 0.4


@pytest.mark.parametrize('residual', [True, False])
@pytest.mark.parametrize('scale', [1, 2, 3, 4])
def test_tiles_of_srcnn_are_parts_of_the_whole(scale, residual):
    photo, model = noise_photo(45, 38), bright_srcnn(scale, residual, size=1.3)
    model.tile = 1000
    whole = pixels(model.predict(photo, fast=False))
    assert whole.std() > 5 and whole.shape == (38 * scale, 45 * scale, 3)
    bicubic = pixels(photo.resize((45 * scale, 38 * scale), Image.Resampling.BICUBIC))
    assert np.abs(whole - bicubic).mean() > 2  # the network does something
    for model.tile in (7, 16, 38, 44):
        tiled = pixels(model.predict(photo, fast=False))
        assert np.abs(tiled - whole).max() <= 1
    model.tile, model.margin = 16, 0
    if residual or scale == 1:
        assert np.abs(pixels(model.predict(photo, fast=False)) - whole).max() > 1


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(4, 24), st.sampled_from([1, 2, 8]),
    st.sampled_from(['L', 'RGB']),
)  # fmt: skip
@example(1, 1, 4, 8, 'L')
@example(40, 1, 4, 8, 'RGB')
def test_tiles_with_a_margin_are_parts_of_the_whole(width, height, tile, multiple, mode):
    photo, model = noise_photo(width, height, mode), Blur()
    model.tile, model.multiple = tile, multiple
    ours = pixels(model.predict(photo, fast=False))
    assert ours.shape[:2] == (height, width)
    assert np.abs(ours - blurred(photo)).max() <= 0.5 + 1e-3  # half a level is rounding
    assert all(side % multiple == 0 and side >= 3 for shape in model.shapes for side in shape)
    assert max(max(shape) for shape in model.shapes) <= tile + 2 * 3 + 2 * multiple


class Blocks(Blur):
    "The mean of each block of 8×8 pixels: as a U-Net, it sees where the grid of blocks lies."

    multiple, margin, tile = 8, 8, 16

    def forward(self, x):
        return F.interpolate(F.avg_pool2d(x, 8), scale_factor=8)


def blocks_of(photo):
    "The same by numpy, the last row and column repeated until the sides can be divided by 8."
    array = np.asarray(photo, float)
    height, width = array.shape[:2]
    array = np.pad(array, [(0, -height % 8), (0, -width % 8), (0, 0)], mode='edge')
    means = array.reshape(array.shape[0] // 8, 8, array.shape[1] // 8, 8, 3).mean((1, 3))
    return means.repeat(8, 0).repeat(8, 1)[:height, :width]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 50), st.integers(1, 50), st.integers(4, 24), st.integers(0, 20))
@example(13, 9, 16, 8)
@example(40, 32, 16, 8)
@example(40, 37, 16, 8)  # the last tile starts on the grid
@example(48, 32, 16, 3)  # nor does the margin move a tile off the grid
def test_tiles_of_a_network_with_a_grid_are_parts_of_the_whole(width, height, tile, margin):
    photo, model = noise_photo(width, height), Blocks()
    model.tile, model.margin = tile, margin
    ours = pixels(model.predict(photo, fast=False))
    assert np.abs(ours - blocks_of(photo)).max() <= 0.5 + 1e-3


class Bilinear(Blur):
    "As `Blocks`, smoothly enlarged again and doubled: each pixel sees up to 12 pixels far."

    multiple, margin, scale = 8, 12, 2

    def forward(self, x):
        return F.interpolate(F.avg_pool2d(x, 8), scale_factor=16, mode='bilinear')


@pytest.mark.parametrize('size', [(40, 32), (37, 50), (61, 7), (5, 33), (8, 8), (64, 64)])
def test_tiles_of_a_network_that_sees_far_on_its_grid_are_parts_of_the_whole(size):
    photo, model = noise_photo(*size), Bilinear()
    model.tile = 1000
    whole = pixels(model.predict(photo, fast=False))
    assert whole.shape == (2 * size[1], 2 * size[0], 3)
    for model.tile in (4, 7, 8, 13, 16, 24, 31):
        assert np.abs(pixels(model.predict(photo, fast=False)) - whole).max() <= 1


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 99), st.integers(1, 99), st.integers(1, 40), st.integers(0, 30),
    st.integers(1, 16),
)  # fmt: skip
def test_outer_boxes_lie_on_the_grid(width, height, tile, margin, multiple):
    for box in tile_boxes(width, height, tile, 0):
        outer = workbench.grown_box(box, margin, multiple, width, height)
        for low, high, from_, to, end in zip(box, box[2:], outer, outer[2:], (width, height)):
            assert from_ % multiple == 0 and (to % multiple == 0 or to == end)
            assert 0 <= from_ <= max(low - margin, 0) and min(high + margin, end) <= to <= end
            assert to - from_ <= tile + 2 * margin + 2 * multiple


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 99), st.integers(1, 99), st.integers(1, 40), st.integers(1, 16))
@example(40, 32, 39, 1)
def test_a_photo_is_cut_into_few_tiles_of_about_one_size(width, height, most, multiple):
    "Each pixel lies in one tile; 40 pixels are cut in two halves, not in 39 and one."
    boxes = workbench.even_boxes(width, height, most, multiple)
    covered = np.zeros((height, width), int)
    for left, top, right, bottom in boxes:
        covered[top:bottom, left:right] += 1
        assert left % multiple == top % multiple == 0
        assert max(right - left, bottom - top) < most + multiple
    for sides in ([r - l for l, _, r, _ in boxes], [b - t for _, t, _, b in boxes]):
        assert max(sides) - min(sides) < 2 * multiple  # none is a mere strip
    assert (covered == 1).all()
    assert len(boxes) <= -(-width // most) * -(-height // most)


def test_the_tiles_of_a_megapixel():
    "By hand: 1155 = 288 + 3 · 289 and 866 = 288 + 2 · 289; on a grid of 8, 145 and 109 steps."
    for multiple, right, bottom in ((1, 289, 289), (8, 1155 - 3 * 288, 866 - 2 * 288)):
        boxes = workbench.even_boxes(1155, 866, 344, multiple)
        assert boxes[0] == (0, 0, 288, 288) and len(boxes) == 4 * 3
        left, top, *end = boxes[-1]
        assert end == [1155, 866] and (1155 - left, 866 - top) == (right, bottom)


@pytest.mark.parametrize(('most', 'multiple'), [(0, 1), (-3, 1), (8, 0)])
def test_impossible_tiles(most, multiple):
    with pytest.raises(EnhanceError, match='not possible'):
        workbench.even_boxes(9, 9, most, multiple)


@pytest.mark.parametrize('mode', ['train', 'eval'])
def test_the_network_predicts_in_eval_mode_and_goes_back(mode):
    seen = []

    class Watched(Blur):
        def forward(self, x):
            seen.append((self.training, torch.is_grad_enabled(), x.requires_grad))
            if fail:
                raise RuntimeError('out of memory')
            return super().forward(x)

    model, fail = getattr(Watched(), mode)(), False
    model.predict(noise_photo())
    assert seen == [(False, False, False)] and model.training == (mode == 'train')
    fail = True
    with pytest.raises(RuntimeError):
        model.predict(noise_photo())
    assert model.training == (mode == 'train')
    assert torch.is_grad_enabled() and all(p.grad is None for p in model.parameters())


def test_a_frozen_layer_stays_frozen():
    class Net(Blur):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

    for net_trains in (True, False):
        for norm_trains in (True, False):
            model = Net().train(net_trains)
            model.norm.train(norm_trains)
            model.predict(noise_photo())
            assert model.training == net_trains and model.norm.training == norm_trains


@pytest.mark.parametrize('size', [(40, 24), (7, 5)])
def test_the_network_gets_its_photo_in_the_fast_layout(size):
    """All channels of a pixel side by side, and strides that say so for the batch, too.

    A batch of one with any other stride passes for channels_last, but not to the convolutions.
    """
    strides = []

    class Look(PhotoModel):
        def forward(self, x):
            strides.append((x.shape, x.stride()))
            return x

    Look().predict(Image.new('RGB', size, 'red'))
    ((_, c, h, w), found) = strides[0]
    assert found == (c * h * w, 1, c * w, c)


def test_a_network_can_be_trained_after_it_predicted():
    model = bright_srcnn()
    model.predict(noise_photo(mode='L'))
    model(torch.rand(1, 1, 20, 20)).mean().backward()
    assert all(p.grad is not None for p in model.parameters())


class Overflowing(Blur):
    "Gives NaN in half precision, as a network whose sums go beyond 65504."

    def forward(self, x):
        self.shapes.append(torch.is_autocast_enabled('cpu'))
        y = F.conv2d(x, torch.eye(3)[..., None, None])  # what autocast computes in half precision
        return y if y.dtype == torch.float32 else y * torch.nan


def test_where_half_precision_overflows_float32_is_taken(monkeypatch):
    monkeypatch.setattr(workbench, 'half_dtype', lambda device: torch.bfloat16)
    photo, model = noise_photo(), Overflowing()
    assert (pixels(model.predict(photo)) == pixels(photo)).all()
    assert model.shapes == [True, False]
    model.shapes.clear()
    assert (pixels(model.predict(photo, fast=False)) == pixels(photo)).all()
    assert model.shapes == [False]
    monkeypatch.setattr(workbench, 'half_dtype', lambda device: None)
    model.shapes.clear()
    model.predict(photo)
    assert model.shapes == [False]
    assert not torch.is_autocast_enabled('cpu')


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('half', [torch.bfloat16, None])
def test_spoiled_weights_are_refused(value, half, monkeypatch):
    monkeypatch.setattr(workbench, 'half_dtype', lambda device: half)
    model = Blur().train()
    with torch.no_grad():
        model.weights[0] = value
    with refused('Blur', 'NaN'):
        model.predict(Image.new('RGB', (8, 8), 'white'))
    assert model.training


@pytest.mark.parametrize('scale', [1, 3])
def test_half_precision_hardly_shows(scale, monkeypatch):
    "bfloat16 keeps 8 bits of the residual, and the residual is small."
    monkeypatch.setattr(workbench, 'half_dtype', lambda device: torch.bfloat16)
    photo, model = noise_photo(40, 30), bright_srcnn(scale, size=0.7)
    exact = pixels(model.predict(photo, fast=False))
    fast = pixels(model.predict(photo))
    bicubic = pixels(photo.resize(model.predict(photo).size, Image.Resampling.BICUBIC))
    assert np.abs(exact - bicubic).max() > 3
    assert np.abs(fast - exact).max() <= 2 and np.abs(fast - exact).mean() < 0.2
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_photos_and_devices_that_can_not_be_used_are_refused(tmp_path):
    model = Double()
    with refused(tmp_path / 'gone.png'):
        model.predict(tmp_path / 'gone.png')
    with refused('folder'):
        model.predict(tmp_path)
    (tmp_path / 'a.png').write_bytes(b'text')
    with refused(tmp_path / 'a.png'):
        model.predict(str(tmp_path / 'a.png'))
    with refused("'nowhere'", 'cpu'):
        model.predict(noise_photo(), device='nowhere')
    assert not model.seen


# Weights and their cards


def a_card(path):
    return json.loads(path.with_suffix('.json').read_text(encoding='utf-8'))


def change_card(path, **changes):
    "Change the card as a stranger would, or an accident."
    card = {k: v for k, v in {**a_card(path), **changes}.items() if v is not ...}
    path.with_suffix('.json').write_text(json.dumps(card))


def sign(path):
    "Make the checksum on the card that of the file, so that only what is in it can be wrong."
    change_card(path, sha256=hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / 'my-x2.safetensors'
    save_weights(bright_srcnn(2), path)
    return path


@pytest.mark.parametrize('as_text', [True, False])
@pytest.mark.parametrize('scale, residual', [(1, False), (3, True)])
def test_weights_come_back_exactly(scale, residual, as_text, tmp_path):
    model, path = bright_srcnn(scale, residual), tmp_path / 'new' / 'a.b.safetensors'
    card = save_weights(model, str(path) if as_text else path)
    assert sorted(p.name for p in path.parent.iterdir()) == ['a.b.json', 'a.b.safetensors']
    ours = load_model(str(path) if as_text else path)
    assert type(ours) is SRCNN and equal_weights(ours, model)
    assert (ours.scale, ours.residual, ours.training) == (scale, residual, False)
    assert ours.card == card == a_card(path)
    photo = noise_photo(mode='L')
    assert pixels(ours.predict(photo)).tolist() == pixels(model.predict(photo)).tolist()


def test_weights_after_predicting_and_training_come_back_too(tmp_path):
    "channels_last, gradients and all."
    model = bright_srcnn()
    model.predict(noise_photo())
    model(torch.rand(1, 1, 20, 20)).mean().backward()
    save_weights(model.train(), tmp_path / 'a.safetensors')
    assert equal_weights(load_model(tmp_path / 'a.safetensors'), model)


def test_the_card_says_what_the_weights_are(tmp_path):
    path = tmp_path / 'my-x3.safetensors'
    card = save_weights(
        bright_srcnn(3), path, recipe='größer', scores={'dB': [30.5, None]}, sha256='wrong'
    )
    assert card == a_card(path) == {
        'name': 'my-x3',
        'architecture': 'enhance_lib.srcnn.SRCNN',
        'arguments': {'scale': 3, 'residual': True},
        'scale': 3,
        # 64 filters of 9×9, 32 of 64, one of 32 times 5×5, and a bias for each
        'parameters': 64 * 81 + 64 + 32 * 64 + 32 + 25 * 32 + 1,
        'recipe': 'größer',
        'scores': {'dB': [30.5, None]},
        'sha256': hashlib.sha256(path.read_bytes()).hexdigest(),
    }  # fmt: skip
    assert card['parameters'] == 8129
    assert 'größer' in path.with_suffix('.json').read_text(encoding='utf-8')


def tensors_of(path):
    "The tensors of a .safetensors file, read by hand: a length, a JSON header, then numbers."
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], 'little')
    header = json.loads(content[8:start])
    header.pop('__metadata__', None)
    kinds = {'F32': np.float32, 'F16': np.float16}
    return {
        name: np.frombuffer(
            content[start + t['data_offsets'][0] : start + t['data_offsets'][1]], kinds[t['dtype']]
        ).reshape(t['shape'])
        for name, t in header.items()
    }


@pytest.mark.parametrize('half', [True, False])
def test_weights_are_stored_as_they_should_be(half, tmp_path):
    model, path = bright_srcnn(), tmp_path / 'a.safetensors'
    save_weights(model, path, half=half)
    stored = tensors_of(path)
    expected = {k: v.numpy() for k, v in model.state_dict().items()}
    assert set(stored) == set(expected) and len(stored) == 6
    kind = np.float16 if half else np.float32
    for name, values in expected.items():
        assert stored[name].dtype == kind
        np.testing.assert_array_equal(stored[name], values.astype(kind))
    ours = load_model(path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert equal_weights(ours, model) != half
    assert equal_weights(ours, model, within=1e-3)
    assert {p.dtype for p in model.parameters()} == {torch.float32}  # not touched


@pytest.mark.parametrize(
    'value, half',
    [(1e5, True), (-65520, True), (np.nan, True), (np.nan, False), (-np.inf, False)],
)
def test_weights_that_are_no_numbers_or_too_large_are_refused(value, half, weights):
    "float16 ends at 65504: what is larger would become infinity."
    old, model = weights.read_bytes(), bright_srcnn(2)
    with torch.no_grad():
        model.conv1.bias[0] = value
    with refused(weights, 'NaN'):
        save_weights(model, weights, half=half)
    assert weights.read_bytes() == old and load_model(weights)
    with torch.no_grad():
        model.conv1.bias[0] = 65504
    save_weights(model, weights, half=True)
    assert load_model(weights).conv1.bias[0] == 65504


@pytest.mark.parametrize('name', ['a.pth', 'a', 'a.safetensors.bak', 'safetensors', '.safetensors'])
def test_weights_have_their_own_suffix(name, tmp_path):
    with refused(tmp_path / name, '.safetensors'):
        save_weights(bright_srcnn(), tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'damage',
    {
        'empty': lambda c: b'',
        'cut': lambda c: c[:-1],
        'half': lambda c: c[: len(c) // 2],
        'longer': lambda c: c + b'x',
        'a bit of a number': lambda c: c[:-5] + bytes([c[-5] ^ 1]) + c[-4:],
        'a bit of the header': lambda c: c[:20] + bytes([c[20] ^ 4]) + c[21:],
    }.items(),
    ids=lambda item: item[0],
)
def test_damaged_weights_are_refused(damage, weights):
    name, change = damage
    weights.write_bytes(change(weights.read_bytes()))
    with refused(weights, 'checksum'):
        load_model(weights)
    if name != 'a bit of a number':  # with the right checksum, what is in the file is refused
        sign(weights)
        with refused(weights, 'SRCNN'):
            load_model(weights)


@pytest.mark.parametrize('checksum', ['0' * 64, '', None, 5, [], ...])
def test_a_wrong_checksum_is_refused(checksum, weights):
    change_card(weights, sha256=checksum)
    with refused(weights, 'checksum'):
        load_model(weights)


def test_weights_of_another_shape_are_refused(weights):
    from safetensors.torch import load_file, save_file

    state = load_file(weights)
    wrong = {
        'one more': {**state, 'conv4.bias': torch.ones(1)},
        'one less': {k: v for k, v in state.items() if k != 'conv2.bias'},
        'other shape': {**state, 'conv1.weight': torch.ones(64, 3, 9, 9)},
        'none': {},
        'other names': {f'x{k}': v for k, v in state.items()},
    }
    for tensors in wrong.values():
        save_file(tensors, weights)
        sign(weights)
        with refused(weights, 'SRCNN'):
            load_model(weights)
    save_file(state, weights)
    sign(weights)
    assert load_model(weights)


@pytest.mark.parametrize(
    'content',
    [None, b'', b'{', b'[]', b'5', b'"text"', b'null', b'\xff\xfe{}', b'{"a": 1}x', b'{"a": \n\n1'],
)
def test_a_card_that_is_none_is_refused(content, weights):
    card = weights.with_suffix('.json')
    card.unlink() if content is None else card.write_bytes(content)
    with refused(card):
        load_model(weights)
    card.unlink(missing_ok=True)
    card.mkdir()
    with refused(card):
        load_model(weights)


def test_an_empty_card_is_refused(weights):
    weights.with_suffix('.json').write_text('{}')
    with refused(weights):
        load_model(weights)


def test_a_card_of_nothing_but_brackets_is_refused(weights):
    weights.with_suffix('.json').write_text('[' * 100_000)
    with refused(weights.with_suffix('.json')):
        load_model(weights)


@pytest.mark.parametrize(
    'architecture',
    [
        'os.system',
        'builtins.eval',
        'subprocess.Popen',
        'torch.nn.Linear',
        'SRCNN',
        'srcnn.SRCNN',
        'enhance_lib.SRCNN',
        'enhance_lib.photos.open_photo',
        'enhance_lib.photos.EnhanceError',
        'enhance_lib.workbench.nn.Linear',
        'enhance_lib.workbench.nn',
        'enhance_lib.workbench.Path',
        'enhance_lib.workbench.Callback',
        'enhance_lib.workbench.importlib.import_module',
        'enhance_lib.srcnn.SRCNN.forward',
        'enhance_lib.srcnn.srcnn',
        'enhance_lib.srcnn.',
        'enhance_lib.srcnn',
        'enhance_lib..x',
        'enhance_lib...os.system',
        'enhance_lib.gone.Model',
        'enhance_lib.srcnn.deeper.Model',
        'enhance_lib.weights.x',
        'enhance_lib/../os.system',
        'enhance_lib.srcnn .SRCNN',
        'enhance_lib.\nsrcnn.SRCNN',
        'enhance_library.srcnn.SRCNN',
        '../enhance_lib.srcnn.SRCNN',
        'enhance_lib.' + 'x' * 5000 + '.SRCNN',
        '',
        '.',
        None,
        5,
        True,
        [],
        ['enhance_lib.srcnn.SRCNN'],
        {'enhance_lib.srcnn': 'SRCNN'},
        ...,
    ],
    ids=lambda a: repr(a)[:40],
)
def test_an_architecture_that_is_none_of_the_package_is_refused(architecture, weights):
    change_card(weights, architecture=architecture)
    with refused(weights, 'not a model of enhance_lib'):
        load_model(weights)


@pytest.mark.parametrize('module', ['strange', 'enhance_library', 'odd.enhance_lib'])
def test_a_module_of_somebody_else_is_not_even_imported(module, weights, monkeypatch):
    folder = weights.parent / 'site'
    path = folder / (module.replace('.', '/') + '.py')
    path.parent.mkdir(parents=True)
    path.write_text(f"open({str(folder / 'it ran')!r}, 'w')\nfrom enhance_lib.srcnn import SRCNN\n")
    monkeypatch.syspath_prepend(folder)
    change_card(weights, architecture=f'{module}.SRCNN')
    with refused(weights, 'not a model of enhance_lib'):
        load_model(weights)
    assert not (folder / 'it ran').exists()
    importlib.import_module(module)
    assert (folder / 'it ran').exists()  # it could have been


def test_an_architecture_without_a_network_does_not_fit(weights):
    "The class that all models share is one of the package's, but has no weights."
    change_card(weights, architecture='enhance_lib.workbench.PhotoModel', arguments={})
    with refused(weights, 'PhotoModel'):
        load_model(weights)


@pytest.mark.parametrize(
    'arguments',
    [
        [],
        [2],
        'scale',
        '',
        5,
        None,
        True,
        {'depth': 5},
        {'scale': 2, 'residual': True, 'self': 1},
        {'scale': 0},
        {'scale': '2'},
        {'scale': None},
        {'scale': [2]},
        {'': 1},
    ],
    ids=repr,
)
def test_arguments_that_do_not_fit_are_refused(arguments, weights):
    change_card(weights, arguments=arguments)
    with refused(weights, 'SRCNN'):
        load_model(weights)


def test_an_error_without_a_message_is_refused_too(weights, monkeypatch):
    class Silent(PhotoModel):
        def __init__(self, **arguments):
            raise ValueError

    monkeypatch.setattr(srcnn, 'Silent', Silent, raising=False)
    change_card(weights, architecture='enhance_lib.srcnn.Silent')
    with refused(weights, 'Silent'):
        load_model(weights)


@pytest.mark.parametrize('scale', [10**6, 5, -1, 2.5, 2.0, True])
def test_a_scale_that_is_not_possible_is_refused(scale, weights):
    change_card(weights, arguments={'scale': scale})
    with refused(weights):
        load_model(weights)


@pytest.mark.parametrize('name', ['evil.safetensors', 'evil.pth', 'evil.pkl', 'evil', 'evil.json'])
@pytest.mark.parametrize('kind', ['pickle', 'torch'])
def test_a_program_in_weights_is_not_run(kind, name, tmp_path):
    path, evil = tmp_path / name, Evil(tmp_path / 'it ran')
    card = {
        'architecture': 'enhance_lib.srcnn.SRCNN',
        'arguments': {'scale': 2},
        'sha256': None,
    }
    torch.save(evil, path) if kind == 'torch' else path.write_bytes(pickle.dumps(evil, protocol=2))
    if path.suffix != '.json':
        card['sha256'] = hashlib.sha256(path.read_bytes()).hexdigest()
        path.with_suffix('.json').write_text(json.dumps(card))
    with refused(path):
        load_model(path)
    assert not evil.folder.exists()
    content = path.read_bytes()
    torch.load(BytesIO(content), weights_only=False) if kind == 'torch' else pickle.loads(content)
    assert evil.folder.exists()  # it would have run


def test_names_of_other_files_are_refused_with_a_reason(tmp_path):
    for suffix in ('.pth', '.pt', '.pkl', '.ckpt', '.bin'):
        with refused(tmp_path / f'a{suffix}', 'save_weights'):
            load_model(tmp_path / f'a{suffix}')
    (tmp_path / 'a.txt').write_text('x')
    with refused(tmp_path / 'a.txt', 'safetensors'):
        load_model(tmp_path / 'a.txt')
    with refused(tmp_path / 'a.safetensors'):
        load_model(tmp_path / 'a.safetensors')
    (tmp_path / 'b.safetensors').mkdir()
    with refused(tmp_path / 'b.safetensors'):
        load_model(tmp_path / 'b.safetensors')


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    "A folder of published weights."
    monkeypatch.setattr(workbench, 'WEIGHTS', tmp_path / 'shelf')
    for name in ('srcnn-x2', 'srcnn-x3', 'unet-jpeg'):
        save_weights(bright_srcnn(2, seed=len(name)), tmp_path / 'shelf' / f'{name}.safetensors')
    return tmp_path / 'shelf'


def test_published_weights_have_a_card(shelf):
    assert published() == ['srcnn-x2', 'srcnn-x3', 'unet-jpeg']
    (shelf / 'srcnn-x3.json').unlink()
    (shelf / 'unet-jpeg.safetensors').unlink()
    (shelf / 'notes.txt').write_text('x')
    assert published() == ['srcnn-x2']
    with refused("'srcnn-x3'", 'There are: srcnn-x2.'):
        load_model('srcnn-x3')
    assert load_model('srcnn-x2').card == a_card(shelf / 'srcnn-x2.safetensors')


def test_no_weights_at_all_are_published(tmp_path, monkeypatch):
    monkeypatch.setattr(workbench, 'WEIGHTS', tmp_path / 'gone')
    assert published() == []
    with refused("'srcnn-x2'"):
        load_model('srcnn-x2')


def test_unknown_names_are_refused_with_those_there_are(shelf, tmp_path):
    with refused("'srcnn-x5'", 'Did you mean srcnn-x', 'There are: srcnn-x2, srcnn-x3, unet-jpeg.'):
        load_model('srcnn-x5')
    with refused("'unetjpg'", 'Did you mean unet-jpeg?'):
        load_model('unetjpg')
    for name in ('zzz', '', '.', '..', '/', 'SRCNN-X2', 'srcnn-x2.json', '../shelf/srcnn-x2'):
        with refused('srcnn-x2'):
            load_model(name)
    for folder in (tmp_path, str(shelf), shelf / 'srcnn-x2'):
        with refused(folder, 'There are: srcnn-x2'):
            load_model(folder)


def test_a_very_long_name_is_refused(shelf):
    with refused('There are: srcnn-x2'):
        load_model('x' * 5000)
    with refused('There is no file'):
        load_model('x' * 5000 + '.safetensors')


def test_a_refused_name_stays_on_one_line(shelf):
    for name in ('a\nb', 'a\0b'):
        with refused('There are: srcnn-x2'):
            load_model(name)


def test_weights_that_can_not_be_read_are_refused(weights, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, 'Permission denied', str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, 'read_bytes', refuse)
        with refused(weights, 'Permission denied'):
            load_model(weights)
    monkeypatch.setattr(Path, 'read_text', lambda path, **_: refuse(path))
    with refused(weights.with_suffix('.json'), 'Permission denied'):
        load_model(weights)


def test_a_full_disk_leaves_no_half_of_a_pair(shelf):
    path = shelf / 'srcnn-x2.safetensors'
    old = path.read_bytes()
    with refused(path), disk_of(20_000):  # the weights take 33 kB
        save_weights(bright_srcnn(2, seed=77), path)
    assert path.read_bytes() == old and 'srcnn-x2' in published()
    assert equal_weights(load_model('srcnn-x2'), bright_srcnn(2, seed=8))
    assert not list(shelf.glob('.*'))
    with refused(path.with_suffix('.json')), disk_of(40_000):  # enough for the weights alone
        save_weights(bright_srcnn(2, seed=77), path, notes='x' * 50_000)
    assert 'srcnn-x2' not in published()  # rather none than a pair that does not fit
    assert not list(shelf.glob('.*'))
    save_weights(bright_srcnn(2, seed=77), path)
    assert equal_weights(load_model('srcnn-x2'), bright_srcnn(2, seed=77))


@pytest.mark.parametrize('call', [1, 2])
def test_being_killed_while_writing_leaves_no_pair_that_does_not_fit(call, shelf, monkeypatch):
    "Whatever is left, it is the old pair, or the new one, or it is not offered."
    path, replaced, replace = shelf / 'srcnn-x2.safetensors', [], os.replace

    def die(source, target):
        replaced.append(Path(target).suffix)
        if len(replaced) == call:
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', die)
        with pytest.raises(Killed):
            save_weights(bright_srcnn(2, seed=77), path)
    assert replaced == ['.safetensors', '.json'][:call]
    assert path.exists() and not path.with_suffix('.json').exists()
    assert published() == ['srcnn-x3', 'unet-jpeg']
    with refused(path.with_suffix('.json')):
        load_model(path)


def test_being_killed_before_the_weights_are_written_leaves_the_old_pair(shelf, monkeypatch):
    def die(path, content):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, 'write_bytes', die)
        with pytest.raises(Killed):
            save_weights(bright_srcnn(2, seed=77), shelf / 'srcnn-x2.safetensors')
    assert equal_weights(load_model('srcnn-x2'), bright_srcnn(2, seed=8))


@pytest.mark.parametrize('value', [{1, 2}, Path('x'), [{'deep': {1}}], b'x', {(1, 2): 3}], ids=repr)
def test_a_card_that_can_not_be_written_is_refused_and_costs_nothing(value, weights):
    old = weights.read_bytes()
    with refused(weights, 'card'):
        save_weights(bright_srcnn(2, seed=77), weights, value=value)
    assert weights.read_bytes() == old and load_model(weights)


def test_numbers_of_numpy_may_stand_on_a_card(weights):
    numbers = {'dB': np.float32(30.5), 'n': np.int64(3), 'all': (np.arange(2), np.bool_(True))}
    card = save_weights(bright_srcnn(2), weights, scores=numbers)
    assert a_card(weights)['scores'] == {'dB': 30.5, 'n': 3, 'all': [[0, 1], True]}
    assert load_model(weights).card['sha256'] == card['sha256']


@pytest.mark.parametrize('place', ['folder', 'in a file', 'card'])
def test_a_place_where_weights_can_not_be_written_is_refused(place, tmp_path):
    path = tmp_path / 'a.safetensors'
    if place == 'folder':
        path.mkdir()
    elif place == 'card':
        path.with_suffix('.json').mkdir()
    else:
        (tmp_path / 'file').write_text('x')
        path = tmp_path / 'file' / 'a.safetensors'
    with refused(path.parent):
        save_weights(bright_srcnn(), path)


def test_a_model_without_arguments_can_be_saved(tmp_path):
    card = save_weights(Blur(), tmp_path / 'a.safetensors')
    assert card['arguments'] == a_card(tmp_path / 'a.safetensors')['arguments'] == {}


def test_tied_weights_are_saved_or_refused(tmp_path):
    model = bright_srcnn()
    model.conv4 = model.conv3
    try:
        save_weights(model, tmp_path / 'a.safetensors')
    except EnhanceError:
        pass


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

    monkeypatch.setattr(workbench, 'half_dtype', lambda device: dtype)
    name, *given = half_precision(Stub(), 'generator')
    assert name == asked
    assert [cb.parts for cb in given] == ([('generator',)] if asked == 'add_cb' else [])
    form = torch.contiguous_format if device == 'mps' else torch.channels_last
    assert Stub.model.weight.is_contiguous(memory_format=form)


def test_worker_processes_can_be_handed_what_makes_pairs(tmp_path):
    "Where processes do not start as copies (Windows; Python 3.14), it travels as a pickle."
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8))
    for folder in 'clean', 'degraded':
        for i in range(2):
            save_photo(photo, tmp_path / folder / f'{i}.png')
    made = [recipe_dls([photo], [photo], 'wild', 16, once=once, device='cpu') for once in (0, 1)]
    made += [folder_dls(tmp_path / 'clean', tmp_path / 'degraded', 16, device='cpu')]
    for dls in made:
        for pairs in (dls.train_ds, dls.valid_ds):
            again = pickle.loads(pickle.dumps(pairs))
            assert len(again) == len(pairs)
            for a, b in zip(again[0], pairs[0]):
                assert a.shape == b.shape == (3, 16, 16)


def test_batches_with_labels_keep_them():
    "Only pictures have a layout."
    pairs = [(torch.rand(3, 4, 4), torch.tensor(float(i % 2))) for i in range(4)]
    x, label = pair_loaders(pairs, pairs, bs=4, device='cpu').one_batch()
    assert x.is_contiguous(memory_format=torch.channels_last) and label.shape == (4,)
