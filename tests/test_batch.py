"""Folders that are crappified or resized, killed and gone on with; and pairs on the fly."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
from common import one_line
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from photo_folder import NAMES, contents, make_photos, rows, same, smooth_photo
from PIL import Image

from enhance_lib.applications.batch import CrappifyPair, crappify_folder, resize_folder
from enhance_lib.crappify import RECIPES, Recipe, Step, apply_steps
from enhance_lib.toolbox.errors import EnhanceError
from enhance_lib.toolbox.files import open_photo


@pytest.fixture
def photos(tmp_path):
    return make_photos(tmp_path / 'photos')


def crappified(photos, out, *args, **kwargs):
    return crappify_folder(photos, out, *args, **{'n_workers': 1, 'progress': False} | kwargs)


@settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    recipe=st.sampled_from([name for name in RECIPES if name != 'skyline']),
    seed=st.integers(0, 2**31),
)
@example(recipe='skyline', seed=0)  # its photos have a million pixels: once is enough
def test_folder_does_not_depend_on_the_number_of_workers(photos, recipe, seed):
    with tempfile.TemporaryDirectory() as folder:
        base, found = Path(folder), []
        for n in (1, 2):
            degraded, clean = base / f'degraded{n}', base / f'clean{n}'
            report = crappified(photos, degraded, recipe, seed, clean_path=clean, n_workers=n)
            assert (report.made, report.kept, report.failed) == (len(NAMES), 0, {})
            found.append((contents(degraded), contents(clean)))
        assert found[0] == found[1]
        assert set(NAMES) | {'crappify.csv'} == set(found[0][0])
        assert set(NAMES) <= set(found[0][1])
        pixels = [hash(open_photo(base / 'degraded1' / name).tobytes()) for name in NAMES]
        assert len(set(pixels)) == len(NAMES)


def test_folder_does_what_the_log_says(photos, tmp_path):
    degraded, clean = tmp_path / 'degraded', tmp_path / 'clean'
    crappified(photos, degraded, 'jpeg10', 4, clean_path=clean, format='png', size=16)
    log = rows(degraded / 'crappify.csv')
    assert len(log) == len(NAMES)
    for name in NAMES:
        target = Path(name).with_suffix('.png').as_posix()
        if name in ('a.png', 'sub/a.png'):
            assert target in log
        expected = RECIPES['jpeg10'].pair(open_photo(photos / name), 4, name, 16)
        assert same(open_photo(degraded / target, None), expected[0])
        assert same(open_photo(clean / target, None), expected[1])
        plan = json.loads(log[target]['job'])
        assert log[target]['error'] == ''
        assert same(apply_steps(open_photo(photos / name), plan['before']), expected[1])
        assert same(apply_steps(expected[1], plan['steps']), expected[0])


def test_second_run_keeps_everything(photos, tmp_path):
    degraded, clean = tmp_path / 'degraded', tmp_path / 'clean'
    crappified(photos, degraded, 'gan', clean_path=clean)
    before = {p: p.stat().st_mtime_ns for p in [*degraded.rglob('*.*'), *clean.rglob('*.*')]}
    report = crappified(photos, degraded, 'gan', clean_path=clean)
    assert (report.made, report.kept) == (0, len(NAMES))
    after = {p: p.stat().st_mtime_ns for p in before}
    assert [p for p in before if before[p] != after[p] and p.suffix != '.csv'] == []


def test_only_what_differs_is_made_anew(photos, tmp_path):
    "Two recipes that agree about all photos but a few."
    often = Recipe('often', (Step('jpeg', quality=20), Step('blur', p=0.5, radius=2)))
    rarely = Recipe('rarely', (Step('jpeg', quality=20), Step('blur', p=0.2, radius=2)))
    differ = [n for n in NAMES if often.draw(0, n) != rarely.draw(0, n)]
    assert 0 < len(differ) < len(NAMES), 'choose other probabilities'
    degraded = tmp_path / 'degraded'
    crappified(photos, degraded, often)
    before = {n: (degraded / n).stat().st_mtime_ns for n in NAMES}
    report = crappified(photos, degraded, rarely)
    assert (report.made, report.kept) == (len(differ), len(NAMES) - len(differ))
    assert {n for n in NAMES if before[n] != (degraded / n).stat().st_mtime_ns} == set(differ)


@pytest.mark.parametrize('n_workers', [1, 2])
def test_failed_photos_are_reported_and_the_others_done(photos, tmp_path, n_workers):
    (photos / 'empty.png').touch()
    (photos / 'text.jpg').write_text('This is not a photo.')
    whole = (photos / 'n5.png').read_bytes()
    (photos / 'cut.png').write_bytes(whole[: len(whole) // 2])
    smooth_photo(5, 50).save(photos / 'narrow.png')
    wrong = {'empty.png', 'text.jpg', 'cut.png', 'narrow.png'}
    degraded, clean = tmp_path / 'degraded', tmp_path / 'clean'
    for kept in (0, len(NAMES)):  # a second run tries the failed ones again
        report = crappified(photos, degraded, size=24, clean_path=clean, n_workers=n_workers)
        assert (report.made, report.kept) == (len(NAMES) - kept, kept)
        assert set(report.failed) == wrong
        for why in report.failed.values():
            assert '\n' not in why
            assert 'Error' not in why, 'a sentence, not the name of a class'
        for name in ('empty.png', 'text.jpg', 'cut.png'):
            assert name in report.failed[name]
            assert name in str(report)
        assert 'narrow.png' in report.failed['narrow.png'], 'which photo is too small?'
        log = rows(degraded / 'crappify.csv')
        assert {n for n, row in log.items() if row['error']} == wrong
        assert log['empty.png']['error'] == report.failed['empty.png']
        for folder in (degraded, clean):
            assert not wrong & set(contents(folder))
            assert set(NAMES) <= set(contents(folder))


def test_repaired_photo_is_made_and_its_error_goes(photos, tmp_path):
    (photos / 'x.png').touch()
    crappified(photos, tmp_path / 'degraded')
    smooth_photo().save(photos / 'x.png')
    report = crappified(photos, tmp_path / 'degraded')
    assert (report.made, report.kept, report.failed) == (1, len(NAMES), {})
    assert not any(row['error'] for row in rows(tmp_path / 'degraded' / 'crappify.csv').values())


def test_overlapping_folders_are_refused(photos, tmp_path):
    before = contents(photos)
    for call in (
        lambda: crappified(photos, photos / 'degraded'),
        lambda: crappified(photos, tmp_path / 'degraded', clean_path=photos),
        lambda: crappified(photos, tmp_path / 'degraded', clean_path=tmp_path / 'degraded'),
        lambda: resize_folder(photos, tmp_path, 16, 1, False),
    ):
        with pytest.raises(EnhanceError, match='overlap'):
            call()
    assert contents(photos) == before
    assert not (tmp_path / 'degraded').exists()


def test_folders_that_are_none(photos, tmp_path):
    (tmp_path / 'file').write_text('mine')
    (tmp_path / 'nothing').mkdir()
    for what, call in {
        'output is a file': lambda: crappified(photos, tmp_path / 'file'),
        'clean_path is a file': lambda: crappified(
            photos, tmp_path / 'degraded', clean_path=tmp_path / 'file'
        ),
        'output in a file': lambda: crappified(photos, tmp_path / 'file' / 'degraded'),
        'input is missing': lambda: crappified(tmp_path / 'missing', tmp_path / 'degraded'),
        'input is a file': lambda: crappified(tmp_path / 'file', tmp_path / 'degraded'),
        'input is empty': lambda: crappified(tmp_path / 'nothing', tmp_path / 'degraded'),
    }.items():
        with pytest.raises(EnhanceError) as error:
            call()
        assert one_line(error), what
        assert not (tmp_path / 'degraded').exists(), what
    assert (tmp_path / 'file').read_text() == 'mine'


# Settings


def test_recipe_that_changes_the_clean_photo_needs_a_folder_for_it(photos, tmp_path):
    for settings_ in ({'recipe': 'jpeg10'}, {'recipe': 'any-kernel'}, {'size': 20}):
        with pytest.raises(EnhanceError) as error:
            crappified(photos, tmp_path / 'degraded', **settings_)
        assert 'clean_path' in one_line(error)
    assert not (tmp_path / 'degraded').exists()


@pytest.mark.parametrize('settings_', [{'size': 0}, {'size': -3}, {'seed': -1}, {'n_workers': 0}])
def test_settings_that_are_not_possible(photos, tmp_path, settings_):
    with pytest.raises(EnhanceError) as error:
        crappified(photos, tmp_path / 'degraded', clean_path=tmp_path / 'clean', **settings_)
    assert str(next(iter(settings_.values()))) in one_line(error)
    assert not (tmp_path / 'degraded').exists(), 'nothing is left of a run that could not start'


def test_resize_folder_makes_the_shorter_side_exact(photos, tmp_path):
    small = tmp_path / 'small'
    for size, n_workers in ((17, 2), (131, 1)):  # down and up
        report = resize_folder(photos, small, size, n_workers, False)
        assert report.made == len(NAMES)
        for name in NAMES:
            old, new = open_photo(photos / name), open_photo(small / name)
            assert min(new.size) == size
            ratio = max(old.size) / min(old.size)
            assert abs(max(new.size) - size * ratio) <= 0.5
            assert (new.width > new.height) == (old.width > old.height)
            if name.endswith('.png'):
                assert same(new, old.resize(new.size, Image.Resampling.BICUBIC))
    assert resize_folder(photos, small, 131, 1, False).kept == len(NAMES)
    with pytest.raises(EnhanceError):
        resize_folder(photos, tmp_path / 'none', 0, 1, False)


# Killed at any moment


@pytest.fixture(scope='module')
def many(tmp_path_factory):
    "24 photos, and what an uninterrupted run makes of them: photos, degraded, clean."
    base = tmp_path_factory.mktemp('many')
    (base / 'photos').mkdir()
    for i in range(24):
        smooth_photo(150 + i, 140, seed=i).save(base / 'photos' / f'{i}.png', compress_level=1)
    report = run_many(base / 'photos', base, 1)
    assert report.made == 24
    return base


def run_many(photos, base, n_workers):
    return crappify_folder(
        photos, base / 'degraded', 'wild', 5, 128, base / 'clean', 'png', n_workers, progress=False
    )


# The marker is for finding the processes again. The first line says that work is about to begin.
RUN = """
import sys
from pathlib import Path
from enhance_lib.applications.batch import crappify_folder
marker, photos, base, n = sys.argv[1:]
print('go', flush=True)
base = Path(base)
out = base / 'degraded'
crappify_folder(photos, out, 'wild', 5, 128, base / 'clean', 'png', int(n), progress=False)
"""


def alive(marker):
    "The ids of living processes with the marker in their command line; workers are copies."
    found = []
    for folder in Path('/proc').glob('[0-9]*'):
        try:
            if marker.encode() in (folder / 'cmdline').read_bytes():  # empty for a zombie
                found.append(int(folder.name))
        except OSError:
            pass  # it ended meanwhile
    return found


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def start_run(photos, base, n_workers):
    marker = f'marker-{uuid.uuid4().hex}'
    command = [sys.executable, '-c', RUN, marker, photos, base, str(n_workers)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert run.stdout.readline() == b'go\n'
    return run, marker


linux = pytest.mark.skipif(not Path('/proc/self/cmdline').exists(), reason='looks into /proc')


@linux
@settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(finished=st.integers(0, 44), more=st.floats(0, 0.05), n_workers=st.sampled_from([1, 2]))
@example(finished=0, more=0.0, n_workers=2)
@example(finished=23, more=0.01, n_workers=2)
def test_killed_at_any_moment_and_run_again(many, finished, more, n_workers):
    "Killed a moment after `finished` of its 48 files, so that a slow machine changes nothing."
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        run, marker = start_run(many / 'photos', base, n_workers)
        assert wait_until(lambda: len(list(base.rglob('*.png'))) >= finished, 60)
        time.sleep(more)
        run.kill()
        run.wait()
        ended = wait_until(lambda: not alive(marker), 10)
        for left in alive(marker):  # or they would stay when this test fails
            os.kill(left, signal.SIGKILL)
        assert ended, 'workers outlive the command'
        for path in base.rglob('*.png'):
            Image.open(path).load()  # raises OSError where half of it is missing
        report = run_many(many / 'photos', base, 1)
        assert report.made + report.kept == 24 and not report.failed
        for half in ('degraded', 'clean'):
            assert contents(base / half) == contents(many / half), 'not as if never killed'


@linux
def test_killed_over_and_over_the_same_run_gets_done(many, tmp_path):
    base = tmp_path / 'out'
    for i in range(3):
        run, marker = start_run(many / 'photos', base, 2)
        wait_until(lambda i=i: len(list(base.rglob('*.png'))) > 8 * i, 60)
        run.kill()
        run.wait()
        wait_until(lambda marker=marker: not alive(marker), 5)
    assert run_many(many / 'photos', base, 2).kept > 0
    for half in ('degraded', 'clean'):
        assert contents(base / half) == contents(many / half)


@pytest.mark.parametrize('method', ['spawn', 'forkserver'])
def test_workers_start_where_processes_are_not_forked(photos, tmp_path, method):
    "As on Windows and macOS, and on Linux from Python 3.14."
    code = (
        'import multiprocessing, sys; multiprocessing.set_start_method(sys.argv[1])\n'
        'from enhance_lib.applications.batch import crappify_folder\n'
        'print(crappify_folder(sys.argv[2], sys.argv[3], seed=1, n_workers=2, progress=False))'
    )
    command = [sys.executable, '-c', code, method, photos, tmp_path / 'degraded']
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == f'Photos: made {len(NAMES)}, there already 0, failed 0', (
        done.stderr
    )
    crappified(photos, tmp_path / 'here', seed=1)
    assert contents(tmp_path / 'degraded') == contents(tmp_path / 'here')


# Pairs on the fly


@pytest.fixture
def flat(tmp_path):
    "Photos without subfolders, of one size class."
    folder = tmp_path / 'flat'
    folder.mkdir()
    for i in range(10):
        smooth_photo(50 + i, 48, seed=i).save(folder / f'{i}.png')
    return folder


def test_pair_equals_what_the_folder_run_writes(flat, tmp_path):
    from fastai.vision.core import PILImage

    degraded, clean = tmp_path / 'degraded', tmp_path / 'clean'
    crappified(flat, degraded, 'wild', 7, 32, clean)
    pair = CrappifyPair('wild', 32, 7)
    for path in sorted(flat.iterdir()):
        for source in (path, str(path)):
            ours = pair(source)
            assert [type(photo) for photo in ours] == [PILImage, PILImage]
            assert same(ours[0], open_photo(degraded / path.name))
            assert same(ours[1], open_photo(clean / path.name))


def test_pair_of_a_photo_in_a_subfolder_is_that_of_the_folder_run(photos, tmp_path):
    crappified(photos, tmp_path / 'degraded', 'wild', 2, format='png')
    pair = CrappifyPair('wild', seed=2, path=photos)
    degraded, _ = pair(photos / 'sub' / 'deeper' / 'c d.bmp')
    assert same(degraded, open_photo(tmp_path / 'degraded' / 'sub' / 'deeper' / 'c d.png'))


def test_pair_of_gray_photos_is_black_and_white(flat):
    from fastai.vision.core import PILImageBW

    degraded, clean = CrappifyPair('skyline', seed=0)(flat / '0.png')
    assert type(degraded) is type(clean) is PILImageBW
    assert degraded.mode == clean.mode == 'L' and degraded.size == (1024, 1024)


def test_pair_without_a_seed_follows_that_of_numpy(flat):
    pair, path = CrappifyPair('wild', 32), flat / '0.png'
    np.random.seed(3)
    first, second = pair(path)[0], pair(path)[0]
    np.random.seed(3)
    assert same(pair(path)[0], first)
    assert not same(first, second)


def test_validation_batch_is_the_same_with_and_without_workers(flat):
    from fastai.data.core import TfmdLists
    from fastai.vision.augment import IntToFloatTensor
    from fastai.vision.core import ToTensor

    batches = []
    for n in (0, 2):
        sets = TfmdLists(
            sorted(flat.iterdir()), CrappifyPair('wild', 32, 0), splits=[range(4), range(4, 10)]
        )
        loaders = sets.dataloaders(
            bs=3, after_item=ToTensor, after_batch=IntToFloatTensor, num_workers=n
        )
        batches.append([b for _ in range(2) for b in loaders.valid])
    for a, b in zip(*batches, strict=True):
        assert a[0].shape == a[1].shape == (3, 3, 32, 32)
        assert (a[0] == b[0]).all() and (a[1] == b[1]).all()
        assert (a[0] != a[1]).any()
    assert len(batches[0]) == 4
    assert (batches[0][0][0] == batches[0][2][0]).all(), 'each epoch validates on the same photos'
