"""Pairs that fit: crops of one place, in any of eight ways, on the fly or from two folders."""

import gc
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from common import noise, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import GRAIN, integers, levels, place_photo, seed_all

from enhance_lib.applications.batch import crappify_folder
from enhance_lib.applications.scoreboard import TASKS
from enhance_lib.crappify import Recipe, Step, get_recipe
from enhance_lib.toolbox import pairs as module
from enhance_lib.toolbox.errors import EnhanceError
from enhance_lib.toolbox.pairs import (
    Pairs,
    PhotoCache,
    crop_pair,
    degraded_versions,
    folder_dls,
    pair_loaders,
    recipe_dls,
)


def eight(array):
    "All ways to lay a square on the table."
    turned = [np.rot90(array, k) for k in range(4)]
    return turned + [t[:, ::-1] for t in turned]


@pytest.fixture
def opened(monkeypatch):
    "The names of the files that are opened."
    names, really_open = [], module.open_photo
    monkeypatch.setattr(
        module, 'open_photo', lambda p: names.append(Path(p).stem) or really_open(p)
    )
    return names


# The cache of photos


def test_cache_keeps_what_fits(tmp_path, opened):
    sizes = {'a': (20, 10), 'b': (10, 20), 'c': (20, 10), 'd': (5, 5), 'e': (3, 3)}
    photos = {n: noise(s, seed=i) for i, (n, s) in enumerate(sizes.items())}
    for name, photo in photos.items():
        photo.save(tmp_path / f'{name}.png')
    keep = PhotoCache(0.0013)  # 1300 bytes: two photos of 600 and one of 75
    for _ in range(3):
        for name, photo in photos.items():
            ours = keep(tmp_path / f'{name}.png')
            assert ours.mode == 'RGB' and (integers(ours) == integers(photo)).all()
    assert opened == list('abcde') + list('ce') * 2  # e takes 27 bytes, of which 25 are left
    assert keep.room == pytest.approx(1300 - 600 - 600 - 75)
    assert {p.stem for p in keep.photos} == set('abd')


def test_cache_without_room_keeps_nothing(tmp_path):
    noise().save(tmp_path / 'a.png')
    keep = PhotoCache(0)
    assert keep(tmp_path / 'a.png') is not keep(tmp_path / 'a.png')
    assert not keep.photos and keep.room == 0


def test_cache_gives_photos_back_as_they_are():
    photo, keep = noise(mode='RGBA'), PhotoCache()
    assert keep(photo) is photo
    assert not keep.photos and keep.room == 2000e6


def test_cache_counts_a_gray_photo_as_rgb(tmp_path):
    noise((30, 10), 'L').save(tmp_path / 'a.png')
    keep = PhotoCache(0.001)
    assert keep(tmp_path / 'a.png').mode == 'RGB'
    assert keep.room == pytest.approx(100)


def test_cache_keeps_nothing_of_a_damaged_file(tmp_path):
    path = tmp_path / 'a.png'
    noise((60, 60)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:3000])
    keep = PhotoCache(1)
    with refused(str(path)):
        keep(path)
    assert not keep.photos and keep.room == 1e6
    path.write_bytes(whole)  # repaired
    assert keep(path).size == (60, 60)


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
    small_crop, clean_crop = crop_pair(degraded, clean, scale * small, rng)
    assert small_crop.size == (small, small)
    assert clean_crop.size == (scale * small, scale * small)
    np.testing.assert_array_equal(integers(small_crop), integers(clean_crop)[::scale, ::scale])
    left, top, _ = clean_crop.getpixel((0, 0))
    expected = clean.crop((left, top, left + scale * small, top + scale * small))
    np.testing.assert_array_equal(integers(clean_crop), integers(expected))
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
        ((8, 8), (16, 16), 0, ['crop of 0']),
        ((8, 8), (16, 16), -2, ['crop of -2']),
    ],
)
def test_pairs_that_do_not_fit_are_refused(degraded, clean, size, words):
    for rng in (None, np.random.default_rng(0)):
        with refused(*words):
            crop_pair(Image.new('RGB', degraded), Image.new('RGB', clean), size, rng)


# Pairs


def crops_of_two_sizes(item, rng):
    "A place of a photo, 4×4 degraded and 8×8 clean."
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
    assert [round(float(x) * 255) for x, _ in values] == seen
    assert [round(float(y) * 255) for _, y in values] == [s + 1 for s in seen]


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


def test_both_photos_of_a_pair_are_augmented_alike_in_all_eight_ways():
    degraded, clean = place_photo(4, 4), place_photo(8, 8)
    ways, large = [eight(integers(p)[..., :2]) for p in (degraded, clean)]
    pairs = Pairs(lambda item, rng: (degraded, clean), [0])
    np.random.seed(0)
    counts = np.zeros(8, int)
    for _ in range(800):
        x, y = (levels(p)[..., :2] for p in pairs[0])
        found = [i for i, way in enumerate(ways) if (way == x).all()]
        assert len(found) == 1 and (large[found[0]] == y).all()
        counts[found[0]] += 1
    assert counts.min() > 50 and counts.max() < 150  # 100 each; 50 off is five sigma


def test_pairs_without_augmentation_stay_as_they_were_made():
    "And are of other places in each epoch, unlike fixed ones."
    pairs = Pairs(crops_of_two_sizes, [place_photo(40, 32)], augment=False)
    corners = set()
    for _ in range(40):
        degraded, clean = (levels(x) for x in pairs[0])
        assert (np.diff(clean[0, :, 0]) == 1).all() and (np.diff(clean[:, 0, 1]) == 1).all()
        assert (np.diff(degraded[0, :, 0]) == 2).all() and (np.diff(degraded[:, 0, 1]) == 2).all()
        corners.add(tuple(clean[0, 0, :2]))
    assert len(corners) > 10


def test_batches_with_labels_keep_them():
    "Only pictures have a layout."
    pairs = [(torch.rand(3, 4, 4), torch.tensor(float(i % 2))) for i in range(4)]
    x, label = pair_loaders(pairs, pairs, bs=4, device='cpu').one_batch()
    assert x.is_contiguous(memory_format=torch.channels_last) and label.shape == (4,)


# Loaders that make pairs on the fly


def same_place(degraded, whole, photo, clean, scale=2):
    "Whether `degraded` (in some way) is cut out of `whole` where `clean` is cut out of `photo`."
    for b, g in zip(eight(levels(degraded)), eight(levels(clean))):
        left, top = g[0, 0, :2]
        size = len(g)
        if np.array_equal(g, integers(photo)[top : top + size, left : left + size]):
            small = size // scale
            at = integers(whole)[top // scale :, left // scale :][:small, :small]
            return left % scale == 0 and top % scale == 0 and np.array_equal(b, at)
    return False


def test_batches_of_small_and_whole_crops():
    photos = [noise((40, 36), seed=i) for i in range(5)]
    any_kernel = get_recipe('any-kernel')
    dls = recipe_dls(photos, photos[:3], any_kernel, size=16, bs=2, valid_size=24, device='cpu')
    shapes = [(tuple(x.shape), tuple(y.shape)) for x, y in dls.train]
    assert shapes == [((2, 3, 4, 4), (2, 3, 16, 16))] * 2  # the fifth is dropped
    shapes = [(tuple(x.shape), tuple(y.shape)) for x, y in dls.valid]
    assert shapes == [((2, 3, 6, 6), (2, 3, 24, 24)), ((1, 3, 6, 6), (1, 3, 24, 24))]
    dls = recipe_dls(photos, photos[:1], TASKS['x2'], 16, 2, per_photo=3, device='cpu')
    assert len(list(dls.train)) == len(dls.train) == 7  # 15 crops
    for degraded, clean in [*dls.train, *dls.valid]:
        assert degraded.shape[1:] == (3, 8, 8) and clean.shape[1:] == (3, 16, 16)
        assert degraded.dtype == clean.dtype == torch.float32
        assert degraded.min() >= 0 and clean.max() <= 1 and clean.std() > 0.1


def test_fewer_photos_than_a_batch_still_train():
    photos = [noise(seed=i) for i in range(3)]
    for bs in (8, 3):
        dls = recipe_dls(photos, photos[:1], TASKS['x2'], size=8, bs=bs, device='cpu')
        assert [len(x) for x, _ in dls.train] == [3] and [len(x) for x, _ in dls.valid] == [1]


def test_gray_photos_have_one_channel():
    photos = [noise((30, 30), 'L')]
    dls = recipe_dls(photos, photos, TASKS['x3'], size=12, bs=1, device='cpu')
    assert [tuple(x.shape) for x in next(iter(dls.train))] == [(1, 1, 4, 4), (1, 1, 12, 12)]


def test_each_crop_is_degraded_anew():
    "Cut first, then shrunk: exactly what Pillow makes of the crop."
    photo = place_photo(41, 33)
    dls = recipe_dls([photo], [photo], TASKS['x2'], size=12, per_photo=8, bs=1, device='cpu')
    for degraded, clean in [*dls.valid, *dls.train]:
        upright = [g for g in eight(levels(clean[0])) if g[0, 0, 0] < g[0, 1, 0]]
        upright = next(g for g in upright if g[0, 0, 1] < g[1, 0, 1] and g[0, 0, 1] == g[0, 1, 1])
        small = Image.fromarray(upright.astype(np.uint8)).resize((6, 6), Image.Resampling.BICUBIC)
        assert any((way == integers(small)).all() for way in eight(levels(degraded[0])))


@pytest.mark.parametrize('once', [False, True])
@pytest.mark.parametrize('augment', [False, True])
def test_crops_are_augmented_unless_told_otherwise(augment, once):
    "Columns and rows of a crop that was not flipped count upwards."
    photo, same = place_photo(41, 33), Recipe('same', ())
    options = {'per_photo': 40, 'once': once, 'augment': augment, 'device': 'cpu'}
    dls = recipe_dls([photo], [photo], same, 12, bs=1, **options)
    crops = [levels(clean[0]) for _, clean in dls.train]
    upright = [g[0, 0, 0] < g[0, 1, 0] and g[0, 0, 1] < g[1, 0, 1] for g in crops]
    assert all(upright) != augment and any(upright)


@pytest.mark.parametrize('kind', ['photos', 'paths', 'folder'])
def test_once_degrades_each_photo_as_a_whole(kind, tmp_path):
    photo = place_photo(41, 33)
    whole = photo.crop((0, 0, 40, 32)).resize((20, 16), Image.Resampling.BICUBIC)
    photo.save(tmp_path / 'a.png')
    source = {'photos': [photo], 'paths': [tmp_path / 'a.png'], 'folder': str(tmp_path)}[kind]
    options = {'size': 12, 'bs': 4, 'per_photo': 20, 'once': True, 'device': 'cpu'}
    dls = recipe_dls(source, source, TASKS['x2'], **options)
    pairs = [p for batch in [*dls.train, *dls.valid, *dls.train] for p in zip(*batch)]
    assert len(pairs) == 41
    assert all(same_place(degraded, whole, photo, clean) for degraded, clean in pairs)
    corners = {tuple(levels(clean)[0, 0, :2]) for _, clean in pairs}
    assert len(corners) > 10


def test_once_opens_and_degrades_only_once(tmp_path, opened):
    noise((24, 20)).save(tmp_path / 'a.png')
    dls = recipe_dls(tmp_path, tmp_path, GRAIN, 20, per_photo=9, bs=3, once=True, device='cpu')
    degraded = [x for batch, _ in dls.train for x in batch]
    assert len(opened) == 1
    # 24×20 has 5 places for a crop of 20: the noise is part of the place
    assert len({x.numpy().tobytes() for x in degraded}) <= 5 * 8


def test_once_makes_the_same_whatever_comes_first(tmp_path):
    "The degraded photo depends on its name alone, so that a training that goes on finds it again."
    noise((24, 20)).save(tmp_path / 'a.png')
    for sources in ([tmp_path / 'a.png'], [noise((24, 20))]):
        batches = []
        for seed in (0, 1, 2):
            np.random.seed(seed)
            dls = recipe_dls(sources, sources, GRAIN, size=16, bs=1, once=True, device='cpu')
            next(iter(dls.train))  # which may be of any place
            batches.append(next(iter(dls.valid)))
        assert not torch.equal(*batches[0])
        assert all(torch.equal(degraded, batches[0][0]) for degraded, _ in batches)


def test_once_neither_the_folder_nor_the_other_photos_matter(tmp_path):
    batches = []
    for folder, names in (('here', ['m.png']), ('there', ['a.png', 'm.png', 'z.png'])):
        (tmp_path / folder).mkdir()
        paths = [tmp_path / folder / name for name in names]
        for path in paths:
            noise((24, 20)).save(path)
        held = [tmp_path / folder / 'm.png']
        dls = recipe_dls(paths, held, GRAIN, size=16, bs=1, once=True, device='cpu')
        batches.append(next(iter(dls.valid))[0])
    assert torch.equal(*batches)


@pytest.mark.parametrize('kind', ['photos', 'paths'])
def test_once_draws_for_each_photo_by_itself(kind, tmp_path):
    "By its name: even the same photo, named twice, gets another noise."
    noise((24, 20)).save(tmp_path / 'a.png')
    one = noise((24, 20)) if kind == 'photos' else tmp_path / 'a.png'
    dls = recipe_dls([one], [one] * 3, GRAIN, size=20, bs=3, once=True, device='cpu')
    ((degraded, clean),) = dls.valid
    whole = integers(noise((24, 20)))
    seen = []
    for x, y in zip(degraded, clean):
        (left,) = (at for at in range(5) if (levels(y) == whole[:, at : at + 20]).all())
        seen.append(np.pad(levels(x) - levels(y), [(0, 0), (left, 4 - left), (0, 0)]))
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        both = (seen[i] != 0).any((0, 2)) & (seen[j] != 0).any((0, 2))
        assert both.sum() >= 16 and (seen[i] != seen[j])[:, both].mean() > 0.5


@pytest.mark.parametrize('once', [False, True])
def test_a_worker_makes_the_same_of_photos_that_were_decoded_before(once, tmp_path):
    "Workers are new in every epoch, and would decode all photos again."
    for i in range(4):
        place_photo(30, 28, i).save(tmp_path / f'{i}.png')
    make = {'recipe': TASKS['x2'], 'size': 8, 'bs': 2, 'once': once, 'device': 'cpu'}
    alone = recipe_dls(tmp_path, tmp_path, **make)
    with_worker = recipe_dls(tmp_path, tmp_path, n_workers=1, **make)
    expected = list(alone.valid)
    for path in tmp_path.iterdir():
        path.write_bytes(b'gone')
    # to the end: a worker that is left waiting takes 5 seconds to go
    for ours, theirs in zip(list(with_worker.valid), expected):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    torch.manual_seed(0)
    first, again = (torch.cat([y for _, y in with_worker.train]) for _ in range(2))
    assert first.shape == (4, 3, 8, 8) and not torch.equal(first, again)  # each epoch has others
    with refused(str(tmp_path)):  # no worker is needed to find out
        recipe_dls(tmp_path, tmp_path, n_workers=1, **make)


def test_validation_is_the_same_in_every_epoch_and_run():
    photos = [noise((40, 40), seed=i) for i in range(3)]
    runs = []
    for seed in (0, 1):
        seed_all(seed)
        dls = recipe_dls(photos, photos, get_recipe('wild'), size=16, bs=3, device='cpu')
        runs += [next(iter(dls.valid)) for _ in range(2)]
        train = [next(iter(dls.train)) for _ in range(2)]
        assert not torch.equal(train[0][1], train[1][1])
    for run in runs[1:]:
        assert torch.equal(run[0], runs[0][0]) and torch.equal(run[1], runs[0][1])


def test_loaders_that_cannot_be_made_are_refused(tmp_path):
    photos = [noise()]
    with refused('no photo to train'):
        recipe_dls([], photos, GRAIN, device='cpu')
    with refused('no photo to validate'):
        recipe_dls(photos, [], GRAIN, device='cpu')
    with refused('no photo to train'):
        recipe_dls(photos, photos, GRAIN, per_photo=0, device='cpu')
    for folder in ('gone', str(tmp_path / 'gone'), tmp_path):  # tmp_path is empty
        with refused(str(folder)):
            recipe_dls(folder, photos, GRAIN, device='cpu')
        with refused(str(folder)):
            recipe_dls(photos, folder, GRAIN, device='cpu')
    with refused("'image2' makes no pairs", 'get_recipe'):
        recipe_dls(photos, photos, 'image2', device='cpu')
    with refused("'nowhere'"):
        recipe_dls(photos, photos, GRAIN, device='nowhere')


@pytest.mark.parametrize('once', [False, True])
def test_crops_that_cannot_be_cut_are_refused(once, tmp_path):
    photos, make = [noise((40, 19))], {'once': once, 'bs': 1, 'device': 'cpu'}
    dls = recipe_dls(photos, photos, TASKS['x2'], size=20, **make)
    for dl in (dls.train, dls.valid):
        with refused('photo 0', '20') if dl is dls.train else refused('20'):
            list(dl)
    with refused('15'):  # 'trim' before the crop does not make 15 even
        list(recipe_dls(photos, photos, TASKS['x4'], size=15, **make).train)
    (tmp_path / 'a.png').write_bytes(b'no photo')
    with refused(str(tmp_path / 'a.png')):
        list(recipe_dls(tmp_path, tmp_path, GRAIN, size=8, **make).train)


def test_an_error_in_a_worker_is_one_too(monkeypatch):
    # how long the worker, which is left waiting, is waited for
    monkeypatch.setattr(torch.utils.data._utils, 'MP_STATUS_CHECK_INTERVAL', 0.2)
    photos = [noise((10, 10))]
    dls = recipe_dls(photos, photos, GRAIN, size=20, bs=1, n_workers=1, device='cpu')
    with pytest.raises(EnhanceError, match='smaller than the crop') as error:
        list(dls.train)
    del error, dls
    gc.collect()


# Loaders from two folders


def two_folders(home, names, scale=2, suffix=None, size=(24, 20)):
    "Clean photos that say where each pixel is; degraded ones have every `scale`-th pixel of them."
    for i, name in enumerate(names):
        clean = place_photo(*size, seed=i)
        degraded = Image.fromarray(np.asarray(clean)[::scale, ::scale])
        for folder, photo in (('clean', clean), ('degraded', degraded)):
            path = home / folder / name
            if folder == 'degraded' and suffix:
                path = path.with_suffix(suffix)
            path.parent.mkdir(parents=True, exist_ok=True)
            photo.save(path, quality=95)
    return home / 'clean', home / 'degraded'


def test_pairs_from_two_folders(tmp_path):
    clean, degraded = two_folders(tmp_path, [f'{i:02}.png' for i in range(20)] + ['sub/20.png'])
    dls = folder_dls(clean, str(degraded), size=8, bs=4, per_photo=2, device='cpu')
    assert len(dls.train_ds) == 36 and len(dls.valid_ds) == 3  # 0, 10 and 20 validate
    assert [p.as_posix() for p in dls.valid_ds.items] == ['00.png', '10.png', 'sub/20.png']
    batches = [*dls.train, *dls.valid]
    assert [len(x) for x, _ in batches] == [4] * 9 + [3]
    for small, whole in (pair for batch in batches for pair in zip(*batch)):
        assert np.array_equal(levels(small), levels(whole)[::2, ::2])


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
    clean, degraded = two_folders(tmp_path, ['a.png', 'b.x.png'], suffix='.jpg')
    (clean / 'c.d.png').write_bytes((clean / 'a.png').read_bytes())
    Image.open(degraded / 'a.jpg').save(degraded / 'c.d.webp')
    assert sorted(p.name for p in degraded.iterdir()) == ['a.jpg', 'b.x.jpg', 'c.d.webp']
    dls = folder_dls(clean, degraded, size=8, bs=2, device='cpu')
    assert [tuple(x.shape) for x in next(iter(dls.train))] == [(2, 3, 4, 4), (2, 3, 8, 8)]


def test_missing_partners_are_named(tmp_path):
    clean, degraded = two_folders(tmp_path, [f'{i:02}.png' for i in range(14)])
    for i in range(3):
        (degraded / f'{i:02}.png').unlink()
    with refused('3 photos', str(degraded), '00.png', '01.png', '02.png'):
        folder_dls(clean, degraded, size=8, device='cpu')
    for i in range(3, 13):
        (degraded / f'{i:02}.png').unlink()
    with refused('13 photos', '09.png, …') as error:
        folder_dls(clean, degraded, size=8, device='cpu')
    assert '10.png' not in str(error.value)


def fill(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise((8, 8)).save(folder / name)
    return folder


def test_who_belongs_to_whom(tmp_path):
    clean = 'a.png b.jpg b.png c.jpg c.png sub/d.jpg e.png f.jpg f.png'.split()
    degraded = 'a.jpg b.jpg b.png c.jpg.png c.png.png sub/d.webp f.png z.png'.split()
    clean, degraded = fill(tmp_path / 'clean', clean), fill(tmp_path / 'degraded', degraded)
    found = {
        name.as_posix(): path.relative_to(degraded).as_posix()
        for name, path in degraded_versions(clean, degraded).items()
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
    'clean, degraded',
    [
        (['a.jpg', 'a.png'], ['a.webp']),
        (['a.jpg'], ['a.png', 'a.webp']),
        (['a.jpg'], ['a.jpg.png', 'a.jpg.webp']),
    ],
)
def test_it_is_said_when_nobody_can_know_who_belongs_to_whom(tmp_path, clean, degraded):
    folders = fill(tmp_path / 'clean', clean), fill(tmp_path / 'degraded', degraded)
    with refused('a.jpg', str(tmp_path / 'degraded'), 'not clear'):
        folder_dls(*folders, size=8, device='cpu')


@settings(max_examples=150, deadline=None)
@given(*[st.lists(st.sampled_from('a.jpg a.png a.jpg.png a.png.png b.jpg b.png'.split()), unique=True)] * 2)  # fmt: skip  # noqa: E501
def test_no_version_has_two_owners_and_a_photo_of_the_same_name_comes_first(clean, degraded):
    def listed(folder):
        return [Path(folder) / n for n in sorted(clean if folder == 'clean' else degraded)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, 'find_photos', listed)
        try:
            found = degraded_versions('clean', 'degraded')
        except EnhanceError:
            return
    assert len(set(found.values())) == len(found)
    for name, path in found.items():
        assert path.name == name.name or name.name not in degraded
        assert path.name.startswith(name.stem)


@pytest.mark.parametrize('format', [None, 'png'])
def test_what_crappify_folder_writes_is_found_again(tmp_path, format):
    (tmp_path / 'clean').mkdir()
    for name in 'x.bmp', 'x.png', 'y.jpg':
        noise(seed=len(name) + ord(name[-1])).save(tmp_path / 'clean' / name)
    recipe = Recipe('as it is', (Step('brightness', factor=1.0),))
    options = {'format': format, 'n_workers': 1, 'progress': False}
    crappify_folder(tmp_path / 'clean', tmp_path / 'degraded', recipe, **options)
    versions = degraded_versions(tmp_path / 'clean', tmp_path / 'degraded')
    assert len(versions) == 3
    for name in 'x.bmp', 'x.png':
        degraded = Image.open(versions[Path(name)]).convert('RGB')
        assert (integers(degraded) == integers(Image.open(tmp_path / 'clean' / name))).all()


@pytest.mark.parametrize('augment', [False, True])
def test_pairs_from_folders_are_augmented_only_when_asked(tmp_path, augment):
    clean, degraded = two_folders(tmp_path, ['a.png', 'b.png'], scale=1)
    dls = folder_dls(clean, degraded, size=20, bs=1, per_photo=30, augment=augment, device='cpu')
    upright = [levels(y[0])[0, 0, 0] < levels(y[0])[0, -1, 0] for _, y in dls.train]
    assert all(upright) != augment


def test_folders_that_do_not_fit_are_refused(tmp_path):
    clean, degraded = two_folders(tmp_path, ['a.png', 'b.png'])
    with refused(str(tmp_path / 'gone')):
        folder_dls(tmp_path / 'gone', degraded, size=8, device='cpu')
    with refused(str(tmp_path / 'gone')):
        folder_dls(clean, tmp_path / 'gone', size=8, device='cpu')
    with refused(str(tmp_path / 'gone.csv')):
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
    with refused(str(clean / 'b.png'), '13×10', '24×20'):
        list(folder_dls(clean, degraded, size=8, bs=1, device='cpu').train)
    (degraded / 'b.png').write_bytes(b'')
    with refused(str(degraded / 'b.png')):
        list(folder_dls(clean, degraded, size=8, bs=1, device='cpu').train)


def test_worker_processes_can_be_handed_what_makes_pairs(tmp_path):
    "Where processes do not start as copies (Windows; Python 3.14), it travels as a pickle."
    photo = noise((24, 24))
    for folder in 'clean', 'degraded':
        fill(tmp_path / folder, ['0.png', '1.png'])
    made = [recipe_dls([photo], [photo], GRAIN, 8, once=once, device='cpu') for once in (0, 1)]
    made += [folder_dls(tmp_path / 'clean', tmp_path / 'degraded', 8, device='cpu')]
    for dls in made:
        for pairs in (dls.train_ds, dls.valid_ds):
            again = pickle.loads(pickle.dumps(pairs))
            assert len(again) == len(pairs)
            for a, b in zip(again[0], pairs[0]):
                assert a.shape == b.shape == (3, 8, 8)
