"""The command `enhance`, and folder runs of it: one photo, many photos, faults and kills."""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from PIL import Image

from enhance_lib.applications import command_line
from enhance_lib.applications.batch import enhance_folder
from enhance_lib.toolbox.datasets import sample_photo
from enhance_lib.toolbox.errors import EnhanceError
from enhance_lib.toolbox.files import open_photo, save_photo
from enhance_lib.toolbox.models import WEIGHTS, published

posix = pytest.mark.skipif(os.name != 'posix', reason='uses signals and limits of Unix')


# Folders


def make_photos(folder, n, side=24, quality=60):
    folder.mkdir(parents=True, exist_ok=True)
    cat = sample_photo('cat')
    for i in range(n):
        photo = cat.crop((3 * i, 2 * i, 3 * i + side + i % 5, 2 * i + side))
        photo.save(folder / f'p{i:02}.jpg', quality=quality)
    return folder


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*.*'))}


def call(*arguments):
    "The command `enhance` in this process: its exit code."
    return command_line.enhance([str(a) for a in arguments])


def test_a_hundred_photos_with_three_broken_ones(tmp_path, capsys):
    photos, out = make_photos(tmp_path / 'photos', 97), tmp_path / 'better'
    whole = (photos / 'p00.jpg').read_bytes()
    (photos / 'cut.jpg').write_bytes(whole[: len(whole) // 2])
    (photos / 'empty.jpg').touch()
    (photos / 'text.jpg').write_text('not a photo')
    assert call(photos, '--out', out, '--scale', 1, '--model', 'jpeg-q10') == 1
    assert len(list(out.glob('p*.jpg'))) == 97 and not list(out.glob('[cet]*.jpg'))
    err = capsys.readouterr().err
    assert 'made 97, there already 0, failed 3' in err
    lines = [line for line in err.splitlines() if line.startswith('  ')]
    assert len(lines) == 3
    for name, why in (('cut', 'damaged'), ('empty', '0 bytes'), ('text', 'not a photo')):
        assert any(f'{name}.jpg' in line and why in line for line in lines)
    assert call(photos, '--out', out, '--scale', 1, '--model', 'jpeg-q10') == 1
    assert 'made 0, there already 97, failed 3' in capsys.readouterr().err


def test_other_settings_make_the_photos_anew(tmp_path):
    photos, out = make_photos(tmp_path / 'photos', 2), tmp_path / 'better'
    small = partial(enhance_folder, photos, out, 'jpeg-q10', progress=False)
    assert small(scale=1).made == 2
    assert small(scale=1).kept == 2
    for other in ({'scale': 1.5}, {'scale': 1, 'strength': 0.5}, {'scale': 1, 'level': 2}):
        assert small(**other).made == 2
    assert enhance_folder(photos, out, 'srcnn-jpeg20', 1, progress=False).made == 2


def test_folders_with_comparisons_and_another_format(tmp_path):
    photos, out, both = make_photos(tmp_path / 'photos', 2), tmp_path / 'b', tmp_path / 'both'
    make_photos(photos / 'inside', 1)
    report = enhance_folder(photos, out, 'srcnn-x2', 2, format='png', compared=both, progress=False)
    assert report.made == 3 and not report.failed
    assert sorted(contents(out)) == ['enhance.csv', 'inside/p00.png', 'p00.png', 'p01.png']
    better, sheet = (Image.open(f / 'p01.png') for f in (out, both))
    assert better.size == (50, 48) and sheet.size == (100, 48)
    assert sheet.crop((50, 0, 100, 48)).tobytes() == better.convert('RGB').tobytes()


@pytest.mark.parametrize('scale, model', [(0, None), (math.nan, None), (1, 'srcnn-3x')])
def test_nothing_is_written_for_settings_that_are_not_possible(tmp_path, scale, model):
    photos = make_photos(tmp_path / 'photos', 1)
    with pytest.raises(EnhanceError):
        enhance_folder(photos, tmp_path / 'out', model, scale)
    assert not (tmp_path / 'out').exists()


def _run_once(photos, out):
    enhance_folder(photos, out, 'jpeg-q10', 1, progress=False)


@posix
def test_killed_at_any_of_8_moments_and_run_again(tmp_path):
    "Each run starts from a process that has loaded the package already, as forks of it."
    photos = make_photos(tmp_path / 'photos', 12, side=96)
    expected = tmp_path / 'expected'
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['enhance_lib.applications.batch', 'enhance_lib.jpeg_restorer'])
    first = context.Process(target=_run_once, args=(photos, expected))
    start = time.monotonic()
    first.start()
    while not (expected / 'p00.jpg').exists():
        assert time.monotonic() < start + 60 and first.is_alive()
        time.sleep(0.002)
    begin = time.monotonic()
    first.join(60)
    length = time.monotonic() - begin
    cut_short = 0
    for moment in range(8):
        out = tmp_path / f'out{moment}'
        run = context.Process(target=_run_once, args=(photos, out))
        run.start()
        while not (out / 'enhance.csv').exists():  # so that a slow start changes nothing
            assert run.is_alive() or run.exitcode == 0
            time.sleep(0.001)
        time.sleep(length * moment / 8)
        run.kill()
        run.join()
        cut_short += len(list(out.glob('*.jpg'))) < 12
        for path in out.glob('*.jpg'):
            Image.open(path).load()  # raises OSError where half of it is missing
    assert cut_short >= 4, 'killed too late to test anything'
    again = context.Process(target=_run_all, args=(photos, tmp_path))
    again.start()
    again.join(120)
    assert again.exitcode == 0
    for moment in range(8):
        assert contents(tmp_path / f'out{moment}') == contents(expected)


def _run_all(photos, base):
    for moment in range(8):
        _run_once(photos, base / f'out{moment}')


# The command


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_photos(tmp_path / 'photos', 2)
    make_photos(tmp_path / 'more', 2, side=30)
    return tmp_path


FAST = ('--model', 'jpeg-q10', '--scale', '1')


def test_one_photo_goes_beside_it(folder, capsys):
    assert call('photos/p00.jpg', *FAST) == 0
    assert sorted(contents(folder / 'photos')) == ['p00-enhanced.jpg', 'p00.jpg', 'p01.jpg']
    assert capsys.readouterr().out.startswith('photos/p00-enhanced.jpg: 24×24 pixels: cleaned with')


def test_names_for_one_photo(folder):
    assert call('photos/p00.jpg', '--out', 'new.png', *FAST) == 0
    assert call('photos/p00.jpg', '--out', 'sub/', '--format', 'webp', *FAST) == 0
    assert call('--lr-path', 'photos/p01.jpg', '--sr_path', 'old.png', '--compare', *FAST) == 0
    assert {'new.png', 'sub/p00-enhanced.webp', 'old.png', 'old-compared.png'} <= set(
        contents(folder)
    )


def test_a_file_that_is_there_is_not_overwritten_unless_asked(folder, capsys):
    make_photos(folder, 1, side=40)
    precious = (folder / 'p00.jpg').read_bytes()
    assert call('photos/p00.jpg', '--out', 'p00.jpg', *FAST) == 2
    assert 'p00.jpg' in capsys.readouterr().err and (folder / 'p00.jpg').read_bytes() == precious
    assert call('photos/p00.jpg', '--out', 'p00.jpg', '--overwrite', *FAST) == 0
    assert (folder / 'p00.jpg').read_bytes() != precious
    (folder / 'new-compared.png').write_text('mine')
    assert call('photos/p00.jpg', '--out', 'new.jpg', '--compare', *FAST) == 2
    assert (folder / 'new-compared.png').read_text() == 'mine'
    assert not (folder / 'new.jpg').exists()


def test_stars_and_a_second_run(folder, capsys):
    "As a shell that does not expand stars gives them; results are not enhanced again."
    assert call('photos/*.jpg', *FAST) == 0
    assert call('photos/*.jpg', '--overwrite', *FAST) == 0
    names = ['p00-enhanced.jpg', 'p00.jpg', 'p01-enhanced.jpg', 'p01.jpg']
    assert sorted(contents(folder / 'photos')) == names
    assert call('nothing/*.jpg', *FAST) == 2
    assert 'nothing/*.jpg' in capsys.readouterr().err


def test_a_format_that_cannot_be_saved_is_refused_before_the_work(folder, monkeypatch):
    monkeypatch.setattr('enhance_lib.enhance.enhance', lambda *a, **k: pytest.fail('it has begun'))
    assert call('photos/p00.jpg', '--out', 'o.xyz', *FAST) == 2
    assert call('photos/p00.jpg', '--format', 'tga2', *FAST) == 2


def test_several_photos_and_folders(folder, capsys):
    assert call('photos', '--out', 'a', *FAST) == 0
    assert sorted(contents(folder / 'a')) == ['enhance.csv', 'p00.jpg', 'p01.jpg']
    assert call('photos', 'more', 'photos/p00.jpg', '--out', 'b', *FAST) == 0
    assert sorted(contents(folder / 'b')) == [
        *('enhance.csv', 'more/p00.jpg', 'more/p01.jpg', 'p00.jpg'),
        *('photos/p00.jpg', 'photos/p01.jpg'),
    ]
    assert call('photos', '--compare', *FAST) == 0
    assert len(contents(folder / 'photos-enhanced')) == 3
    assert len(contents(folder / 'photos-enhanced-compared')) == 3
    assert call('photos/p00.jpg', 'photos/p01.jpg', *FAST) == 0
    assert len(contents(folder / 'photos')) == 4
    (folder / 'broken.jpg').write_text('no photo')
    capsys.readouterr()
    assert call('broken.jpg', 'more/p00.jpg', *FAST) == 1
    assert 'broken.jpg' in capsys.readouterr().err
    assert (folder / 'more' / 'p00-enhanced.jpg').exists()


@pytest.mark.parametrize(
    'arguments, words',
    [
        ([], 'Name a photo'),
        (['gone.jpg'], 'gone.jpg'),
        (['fotos'], "no file 'fotos'"),
        (['fotos', '--out', 'better'], "no file 'fotos'"),
        (['file'], "'file' is not a photo"),
        (['gone/' + 300 * 'x' + '.jpg'], 'xxx'),
        (['photos/p00.jpg', '--model', 'srcnn-3x'], 'Did you mean'),
        (['photos/p00.jpg', '--scale', 'large'], '--scale large'),
        (['photos/p00.jpg', '--scale', 'nan'], 'scale of nan'),
        (['photos/p00.jpg', '--scale', '-1'], 'scale of -1'),
        (['photos/p00.jpg', '--scale', '1000'], 'more than 100,000,000'),
        (['photos/p00.jpg', '--level', '12'], 'level of 12'),
        (['photos/p00.jpg', '--strength', '2'], 'strength of 2'),
        (['photos/p00.jpg', '--device', 'cuda:9'], 'cuda:9'),
        (['photos/p00.jpg', '--out', 'photos/p00.jpg'], 'would be overwritten'),
        (['photos/p00.jpg', '--format', 'mp3'], '.mp3'),
        (['photos', '--format', 'mp3'], 'mp3'),
        (['photos', '--out', 'photos'], 'overlap'),
        (['photos', '--out', 'file'], 'is a file'),
        (['photos', 'more', '--out', 'file.txt'], 'looks like a file'),
        (['photos/p00.jpg', '--out', 'a.jpg', '--format', 'png'], 'two formats'),
        (['photos/p00.jpg', 'more/p00.jpg', '--out', 'x'], "would become 'p00.jpg'"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(folder, capsys, arguments, words):
    (folder / 'file').write_text('mine')
    before = contents(folder)
    assert call(*arguments) == 2
    out, err = capsys.readouterr()
    assert words in err and err.startswith('enhance: ') and err.count('\n') == 1 and out == ''
    assert contents(folder) == before


def test_list_shows_models_and_scores(capsys):
    assert call('--list') == 0
    out = capsys.readouterr().out
    assert all(name in out for name in published())
    card = json.loads((WEIGHTS / 'realtime-x4.json').read_text())
    assert f'→ {card["scores"]["Set5"]["output"]:.2f} dB' in out


def test_warnings_are_sentences(folder):
    Image.new('RGBA', (20, 20), (9, 9, 9, 0)).save('clear.png')
    code = (
        'import sys; from enhance_lib.applications.command_line import enhance; sys.exit(enhance())'
    )
    flags = ['clear.png', '--out', 'clear.jpg', *FAST]
    done = subprocess.run([sys.executable, '-c', code, *flags], capture_output=True, text=True)
    assert done.returncode == 0 and 'laid on white' in done.stderr
    assert (
        done.stderr.count('\n') == 1 and '.py' not in done.stderr and 'Warning' not in done.stderr
    )


@posix
def test_a_name_that_cannot_be_printed_stops_nothing(folder):
    strange = os.fsdecode(b'Z\xfcrich.jpg')
    try:
        (folder / 'photos' / 'p00.jpg').rename(folder / 'photos' / strange)
    except OSError:
        pytest.skip('this disk takes no such name')
    code = (
        'import sys; from enhance_lib.applications.command_line import enhance; sys.exit(enhance())'
    )
    done = subprocess.run(
        [sys.executable, '-c', code, f'photos/{strange}', 'photos/p01.jpg', *FAST],
        capture_output=True,
        env={**os.environ, 'PYTHONIOENCODING': 'ascii:strict'},
    )
    assert done.returncode == 0, done.stderr
    assert len(contents(folder / 'photos')) == 4


def test_results_of_a_folder_run_are_not_lost_by_enhancing_them_again(folder, capsys):
    "What is outdated in the folder is removed before it is made anew: not what it is made from."
    assert call('photos', '--out', 'better', *FAST) == 0
    before = contents(folder)
    capsys.readouterr()
    again = ('better/p00.jpg', 'better/p01.jpg', '--out', 'better', '--model', 'jpeg-q10')
    assert call(*again, '--scale', '2') == 2
    assert 'would be overwritten' in capsys.readouterr().err
    assert contents(folder) == before


def test_a_photo_put_where_one_has_failed_is_somebody_elses(folder, capsys):
    (folder / 'photos' / 'p00.jpg').write_text('broken')
    assert call('photos', '--out', 'better', *FAST) == 1
    make_photos(folder / 'better', 1)
    before = contents(folder / 'better')
    for scale in '1', '2':
        capsys.readouterr()
        assert call('photos', '--out', 'better', '--model', 'jpeg-q10', '--scale', scale) == 2
        assert 'p00.jpg' in capsys.readouterr().err
        assert contents(folder / 'better') == before


def test_two_photos_that_would_become_one_file(folder, capsys):
    photo = open_photo(folder / 'photos' / 'p00.jpg')
    save_photo(photo, folder / 'a.jpg'), save_photo(photo, folder / 'a.png')
    assert call('a.jpg', 'a.png', '--format', 'webp', '--overwrite', *FAST) == 1
    assert 'a.png' in capsys.readouterr().err
    assert (folder / 'a-enhanced.webp').exists()
    assert call('a.jpg', 'a.png', '--compare', *FAST) == 1
    out, err = capsys.readouterr()
    assert 'a-enhanced-compared.png' in out and 'as another photo did' in err
    assert not (folder / 'a-enhanced.png').exists()


def test_sheets_of_before_and_after_are_no_photos_to_enhance(folder, capsys):
    assert call('photos/*.jpg', '--compare', *FAST) == 0
    names = sorted(contents(folder / 'photos'))
    capsys.readouterr()
    assert call('photos/*', '--compare', '--overwrite', *FAST) == 0
    assert sorted(contents(folder / 'photos')) == names
    assert 'p00-enhanced-compared.png' in capsys.readouterr().err, 'left out without a word'


@posix
def test_ctrl_c_in_the_middle_leaves_nothing_half_written(tmp_path):
    photos = make_photos(tmp_path / 'photos', 100, side=96)
    code = (
        'import sys; from enhance_lib.applications.command_line import enhance; sys.exit(enhance())'
    )
    flags = [str(photos), '--out', str(tmp_path / 'out'), *FAST]
    process = subprocess.Popen(
        [sys.executable, '-c', code, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 60
    while len(list(tmp_path.glob('out/*.jpg'))) < 3:
        assert time.monotonic() < end and process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert 'enhance: stopped. Run it again to go on.' in err and 'Traceback' not in err
    done = list(tmp_path.glob('out/*.jpg'))
    assert 3 <= len(done) < 100
    for path in done:
        Image.open(path).load()
    assert not list(tmp_path.glob('out/.*'))
