"""Runs over folders: all cores, killed and gone on with, nothing of somebody else touched."""

import multiprocessing
import os
import shutil
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from common import one_line
from photo_folder import NAMES, contents, make_photos, rows

from enhance_lib.toolbox.errors import EnhanceError
from enhance_lib.toolbox.files import write_atomically
from enhance_lib.toolbox.folders import (
    FolderReport,
    _in_processes,
    check_folders,
    output_names,
    run_folder,
)


@pytest.fixture
def photos(tmp_path):
    return make_photos(tmp_path / 'photos')


def copy(source, targets, job):
    "Work that costs next to nothing: a copy with the job behind it, in each output folder."
    for target in targets:
        with write_atomically(target) as part:
            part.write_bytes(Path(source).read_bytes() + str(job).encode())


def copied(photos, *folders, job=0, format=None, n_workers=1):
    sources = output_names(photos, format)
    return run_folder(
        copy, sources, list(folders), 'log.csv', lambda name: job, n_workers, progress=False
    )


# What is done, and what is not


def test_a_run_makes_what_is_missing_and_keeps_the_rest(photos, tmp_path):
    one, two = tmp_path / 'one', tmp_path / 'two'
    assert copied(photos, one, two) == FolderReport(len(NAMES), 0, {})
    before = contents(one), contents(two)
    (one / 'a.png').unlink()
    (two / 'b.jpg').unlink()
    assert copied(photos, one, two) == FolderReport(2, len(NAMES) - 2, {})
    assert (contents(one), contents(two)) == before


def test_another_job_makes_everything_anew(photos, tmp_path):
    for job in (0, {'seed': 1}, 0):
        assert copied(photos, tmp_path / 'out', job=job).made == len(NAMES)
        fresh = tmp_path / f'fresh {job}'
        copied(photos, fresh, job=job)
        assert contents(tmp_path / 'out') == contents(fresh)


def test_format_and_back_again(photos, tmp_path):
    "What an earlier run made is not foreign to a later one, whatever was done in between."
    for format in ('jpg', 'png', 'jpg'):
        report = copied(photos, tmp_path / 'out', format=format)
        assert report.made + report.kept == len(NAMES)


def test_photo_that_comes_back_is_not_foreign(photos, tmp_path):
    copied(photos, tmp_path / 'out')
    (photos / 'n1.png').rename(tmp_path / 'n1.png')
    copied(photos, tmp_path / 'out')
    (tmp_path / 'n1.png').rename(photos / 'n1.png')
    assert copied(photos, tmp_path / 'out').kept == len(NAMES)


def fail_between(source, targets, job):
    "Work that leaves half of a pair, and no sentence."
    targets[0].parent.mkdir(parents=True, exist_ok=True)
    targets[0].write_bytes(b'half')
    raise KeyError('seven')


def test_half_of_a_pair_does_not_stay(tmp_path):
    folders = [tmp_path / 'one', tmp_path / 'two']
    report = run_folder(fail_between, {'a.png': 'a.png'}, folders, 'log.csv', str, 1, False)
    assert (report.made, report.kept) == (0, 0)
    assert report.failed == {'a.png': "'a.png' failed (KeyError: 'seven')."}
    assert str(report) == f'Photos: made 0, there already 0, failed 1\n  {report.failed["a.png"]}'
    for folder in folders:
        assert list(contents(folder)) == ['log.csv']
        assert rows(folder / 'log.csv')['a.png']['error'] == report.failed['a.png']
    assert run_folder(copy, {'a.png': __file__}, folders, 'log.csv', str, 1, False).made == 1
    assert rows(folders[0] / 'log.csv')['a.png']['error'] == ''


def test_name_that_is_no_text_is_no_reason_to_stop(photos, tmp_path):
    "On Linux a name is any bytes; old disks hold names in Latin-1."
    try:
        shutil.copy(photos / 'a.png', photos / os.fsdecode(b'caf\xe9.png'))
    except (OSError, UnicodeError):
        pytest.skip('this file system wants names to be text')
    assert copied(photos, tmp_path / 'out').made == len(NAMES) + 1
    assert copied(photos, tmp_path / 'out').kept == len(NAMES) + 1


# Names


@pytest.mark.parametrize(
    'names, expected',
    [
        (['a.jpg', 'b.png'], ['a.png', 'b.png']),
        (['a.jpg', 'a.png'], ['a.jpg.png', 'a.png.png']),
        (['a.jpg', 'a.jpg.png', 'a.png'], ['a.jpg.png', 'a.jpg.png.png', 'a.png.png']),
        (['a.JPG', 'a.jpeg'], ['a.JPG.png', 'a.jpeg.png']),
        (['A.jpg', 'a.png'], ['A.jpg.png', 'a.png.png']),  # one file, on many disks
        (['A.JPG.webp', 'A.png', 'a.jpg'], ['A.JPG.webp.png', 'A.png.png', 'a.jpg.png']),
    ],
)
def test_same_names_of_different_formats_all_survive(tmp_path, names, expected):
    for name in names:
        (tmp_path / name).touch()
    found = output_names(tmp_path, 'png')
    assert {target: path.name for target, path in found.items()} == dict(zip(expected, names))
    assert output_names(tmp_path) == {name: tmp_path / name for name in names}


def test_unknown_format_is_refused(photos):
    with pytest.raises(EnhanceError) as error:
        output_names(photos, 'pngg')
    assert '.png' in one_line(error)


# Folders that must be left alone


def test_foreign_photos_in_the_output_are_refused_and_untouched(photos, tmp_path):
    out = tmp_path / 'out'
    out.mkdir()
    (out / 'a.png').write_bytes(b'somebody else made this')
    (out / 'notes.txt').write_text('mine')
    before = contents(out)
    with pytest.raises(EnhanceError) as error:
        copied(photos, out)
    assert 'a.png' in one_line(error)
    assert contents(out) == before


def test_foreign_photo_beside_ours_is_refused_before_anything_is_changed(photos, tmp_path):
    out = tmp_path / 'out'
    copied(photos, out)
    shutil.copy(photos / 'a.png', photos / 'new.png')
    (out / 'new.png').write_bytes(b'somebody else made this')
    before = contents(out)
    with pytest.raises(EnhanceError):
        copied(photos, out, job=1)
    assert contents(out) == before


@pytest.mark.parametrize('job', [0, 1])
@pytest.mark.parametrize('first_run', [False, True])
def test_foreign_photos_in_the_second_folder_are_untouched(photos, tmp_path, first_run, job):
    "Also when those in the first are of an earlier run: it made none of what is in the other."
    out, album = tmp_path / 'out', tmp_path / 'album'
    if first_run:
        copied(photos, out)
    shutil.copytree(photos, album)
    before = contents(album)
    with pytest.raises(EnhanceError) as error:
        copied(photos, out, album, job=job)
    one_line(error)
    assert contents(album) == before


@pytest.mark.parametrize(
    'text', ['a,b\n1,2\n', '', 'fname\na.png\n', '\x00\n', 'fnames,job,error\na.png,0\n']
)
def test_foreign_table_is_refused_and_untouched(photos, tmp_path, text):
    out = tmp_path / 'out'
    out.mkdir()
    (out / 'log.csv').write_text(text)
    with pytest.raises(EnhanceError) as error:
        copied(photos, out)
    assert 'log.csv' in one_line(error)
    assert (out / 'log.csv').read_text() == text


def test_other_files_in_the_output_stay(photos, tmp_path):
    out = tmp_path / 'out'
    (out / 'sub').mkdir(parents=True)
    others = {'notes.txt': 'mine', 'sub/holiday.png': 'mine', '.part': 'mine', 'x.part': 'mine'}
    for name, text in others.items():
        (out / name).write_text(text)
    copied(photos, out)
    assert {name: (out / name).read_text() for name in others} == others


def test_sources_are_never_overwritten(photos):
    "`run_folder` itself looks, for callers that name files instead of a folder."
    before = contents(photos)
    with pytest.raises(EnhanceError) as error:
        copied(photos, photos)
    assert 'would be overwritten' in one_line(error)
    assert contents(photos) == before


def test_overlapping_folders_are_refused(photos, tmp_path):
    (tmp_path / 'link').symlink_to(photos)
    around = {'the same': photos, 'inside': photos / 'out', 'around': tmp_path}
    others = {'by another way': photos / 'sub' / '..', 'a link': tmp_path / 'link'}
    for what, out in (around | others).items():
        for folders in ([out], [tmp_path / 'out', out], [out, None]):
            with pytest.raises(EnhanceError) as error:
                check_folders(photos, *folders)
            assert one_line(error), what
    for second in (tmp_path / 'out', tmp_path / 'out' / 'clean'):
        with pytest.raises(EnhanceError):
            check_folders(photos, tmp_path / 'out', second)
    (tmp_path / 'file').write_text('mine')
    with pytest.raises(EnhanceError, match='is a file'):
        check_folders(photos, tmp_path / 'file')
    check_folders(photos, tmp_path / 'out', tmp_path / 'other', None)


@contextmanager
def bound_by_permissions(tmp_path):
    "Run as a user whom permissions bind; root may write everywhere."
    if os.geteuid():
        yield
        return
    # the way to the folder has to be open
    modes = {p: p.stat().st_mode for p in tmp_path.parents if p.stat().st_uid == 0}
    for folder, mode in modes.items():
        folder.chmod(mode | 0o055)
    tmp_path.chmod(0o755)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        for folder, mode in modes.items():
            folder.chmod(mode)


@pytest.mark.skipif(os.name != 'posix', reason='needs the permissions of Unix')
@pytest.mark.parametrize('mode', [0o555, 0o444, 0o000])
@pytest.mark.parametrize('with_part', [False, True])
def test_output_that_may_not_be_written_is_named(photos, tmp_path, mode, with_part):
    out = tmp_path / 'out'
    out.mkdir()
    if with_part:
        (out / '.enhance-0-0.part').touch()
    out.chmod(mode)
    try:
        with bound_by_permissions(tmp_path), pytest.raises(EnhanceError) as error:
            copied(photos, out)
    finally:
        out.chmod(0o755)
    assert 'out' in one_line(error)


# Killed, and what is left


def end_own_process(source, targets, job):
    "Work that a worker does not survive, as if the system had run out of memory."
    if job == 'kill' and not (flag := targets[0].parent / 'flag').exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    with write_atomically(targets[0]) as part:  # the other worker is ended too, at any moment
        part.write_bytes(b'done')


def test_killed_worker_gives_a_sentence_and_the_next_run_goes_on(tmp_path):
    names = [f'{i}.png' for i in range(40)]
    work = (end_own_process, {n: Path(n) for n in names}, [tmp_path / 'out'], 'log.csv')
    job = {n: 'kill' if n == '20.png' else 'go on' for n in names}
    with pytest.raises(EnhanceError) as error:
        run_folder(*work, job.get, 2, progress=False)
    assert 'Run again' in one_line(error)
    report = run_folder(*work, job.get, 2, progress=False)
    assert report.made + report.kept == 40
    assert all((tmp_path / 'out' / n).read_bytes() == b'done' for n in names)


def test_what_a_killed_run_left_is_removed(photos, tmp_path):
    one, two = tmp_path / 'one', tmp_path / 'two'
    left = [
        one / '.enhance-a.part',
        one / 'sub' / '.enhance-b-1.part',
        two / '.enhance-c-2.part',
    ]
    for part in left:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(b'half a photo')
    copied(photos, one, two)
    assert not any(part.exists() for part in left)


def nothing(i):
    "Work that costs nothing."
    if i % 1000 == 7:
        raise ValueError('seven')


@pytest.mark.parametrize('n_workers', [1, 2])
def test_tasks_are_not_drawn_long_before_they_are_done(n_workers):
    "A million tasks must not wait in memory: at most one batch is out."
    drawn, done, ahead = 0, 0, 0

    def tasks():
        nonlocal drawn
        for i in range(3000):
            drawn += 1
            yield (i,)

    errors = []
    for error in _in_processes(nothing, tasks(), n_workers):
        ahead = max(ahead, drawn - done)
        done += 1
        errors.append(error)
    assert done == drawn == 3000
    assert ahead <= 64 * n_workers
    wrong = [i for i, error in enumerate(errors) if error]
    assert wrong == [7, 1007, 2007], 'results in the order of the tasks'
    assert 'seven' in errors[7]


def test_run_leaves_no_threads_or_processes(photos, tmp_path):
    threads = set(threading.enumerate())
    assert copied(photos, tmp_path / 'out', n_workers=2).made == len(NAMES)
    assert multiprocessing.active_children() == []
    assert set(threading.enumerate()) <= threads
