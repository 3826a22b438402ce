"""The commands as a shell runs them: flags, exit codes, messages without tracebacks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from enhance_lib.applications import command_line

COMMANDS = ['enhance', 'enhance_resize', 'enhance_crappify', 'enhance_train', 'enhance_evaluate']
FLAGS = {
    'enhance': (
        'out model scale level strength keep-colors device tile format compare '
        'overwrite list lr-path sr-path'
    ).split(),
    'enhance_resize': 'path resized-path size num-workers'.split(),
    'enhance_crappify': 'path degraded-path recipe seed size clean-path format num-workers'.split(),
    'enhance_train': (
        'path degraded-path df recipe model-name pretrained loss size bs '
        'frozen-epochs unfrozen-epochs num-workers resume out'
    ).split(),
    'enhance_evaluate': 'path degraded-path models recipe seed size sample out'.split(),
}
CALL = 'import sys; from enhance_lib.applications.command_line import {0}; sys.exit({0}())'


def start(name, *flags, **kwargs):
    command = [sys.executable, '-c', CALL.format(name), *map(str, flags)]
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    return subprocess.Popen(command, **pipes | kwargs)


def run(name, *flags):
    "Exit code, standard output and standard error."
    process = start(name, *flags)
    out, err = process.communicate(timeout=60)
    assert 'Traceback' not in out + err, err
    return process.returncode, out, err


def make_photos(folder, n, side=40):
    "Photos with some content, whose names begin with p."
    folder.mkdir()
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((side + i, side)).save(folder / f'p{i}.png')
    return folder


@pytest.fixture
def photos(tmp_path):
    return make_photos(tmp_path / 'photos', 4)


def made(folder):
    return sorted(p.name for p in Path(folder).glob('*.png'))


ALL = ['p0.png', 'p1.png', 'p2.png', 'p3.png']


@pytest.mark.parametrize('name', COMMANDS)
def test_console_script_is_installed(name):
    script = Path(sys.executable).parent / name
    done = subprocess.run([script, '--help'], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith(f'usage: {name}')


@pytest.mark.parametrize('name', COMMANDS)
def test_help_names_every_flag(name):
    status, out, err = run(name, '--help')
    assert status == 0 and err == ''
    for flag in FLAGS[name]:
        assert f'--{flag}' in out.replace('_', '-')
    assert 'folder of' in out, 'what the flags mean'
    assert '--pdb' not in out and '--xtra' not in out, 'flags for other people'


@pytest.mark.parametrize('name', COMMANDS)
def test_help_needs_no_large_library(name):
    code = (
        'import sys; sys.argv[1:] = ["--help"]\n'
        f'from enhance_lib.applications.command_line import {name}\n'
        f'try: {name}()\n'
        'except SystemExit: pass\n'
        'large = {"numpy", "torch", "fastai", "PIL", "pandas", "matplotlib"} & set(sys.modules)\n'
        'sys.exit(f"imported: {large}" if large else 0)'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_work_needs_no_torch(photos, tmp_path):
    "It would make a command wait for seconds, and each worker take hundreds of megabytes."
    code = (
        'import sys; from enhance_lib.applications.command_line import enhance_crappify\n'
        f'enhance_crappify(["--path={photos}", "--degraded-path={tmp_path / "degraded"}"])\n'
        'large = {"torch", "fastai", "pandas", "matplotlib", "skimage"} & set(sys.modules)\n'
        'sys.exit(f"imported: {large}" if large else 0)'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    'flags',
    [
        ['--path', '{in}', '--degraded_path', '{out}', '--num_workers', '1'],
        ['--path', '{in}', '--degraded-path', '{out}', '--num-workers', '1'],
        ['--path={in}', '--degraded_path={out}', '--num-workers=1'],
        ['--num_workers=2', '--degraded-path={out}', '--path={in}', '--seed=3', '--recipe=wild'],
    ],
)
def test_flags_in_every_spelling(tmp_path, flags):
    photos, out = make_photos(tmp_path / 'my_clean-photos', 4), tmp_path / 'an_output=folder'
    flags = [flag.replace('{in}', str(photos)).replace('{out}', str(out)) for flag in flags]
    status, shown, err = run('enhance_crappify', *flags)
    assert status == 0, err
    assert made(out) == ALL and (out / 'crappify.csv').exists()
    assert 'made 4' in shown


def test_every_flag_has_its_effect(photos, tmp_path):
    degraded, clean = tmp_path / 'degraded', tmp_path / 'clean'
    status, _, err = run(
        'enhance_crappify',
        *('--path', photos, '--degraded-path', degraded, '--clean-path', clean),
        *('--recipe', 'jpeg10', '--seed', 7, '--size', 12, '--format', 'bmp', '--num-workers', 1),
    )
    assert status == 0, err
    from enhance_lib.crappify import RECIPES
    from enhance_lib.toolbox.files import open_photo

    for i in range(4):
        pair = RECIPES['jpeg10'].pair(open_photo(photos / f'p{i}.png'), 7, f'p{i}.png', 12)
        for folder, expected in zip((degraded, clean), pair):
            assert open_photo(folder / f'p{i}.bmp').tobytes() == expected.tobytes()


def test_resize(photos, tmp_path):
    small = tmp_path / 'small'
    flags = ['--path', photos, '--resized_path', small, '--size', '16', '--num_workers', '1']
    status, out, err = run('enhance_resize', *flags)
    assert status == 0, err
    assert 'made 4' in out
    # 40 to 43 wide, 40 high
    assert [Image.open(small / n).size for n in ALL] == [(16, 16), (16, 16), (17, 16), (17, 16)]
    status, out, _ = run('enhance_resize', *flags)
    assert status == 0 and 'made 0' in out and 'there already 4' in out
    size = Image.open(small / 'p0.png').size
    status, _, err = run('enhance_resize', *flags[:4])
    assert status == 0, err
    assert size == (16, 16) and Image.open(small / 'p0.png').size == (256, 256)


def test_warnings_of_a_process_are_as_they_were_after_a_command(photos, tmp_path, capsys):
    "A notebook that calls one goes on."
    import warnings

    from enhance_lib.applications.command_line import enhance_resize

    usual = warnings.formatwarning
    for folder, code in ((tmp_path / 'small', 0), (photos, 2)):
        flags = ['--path', photos, '--resized-path', folder, '--size', 16, '--num-workers', 1]
        assert enhance_resize([str(flag) for flag in flags]) == code
        assert warnings.formatwarning is usual


@pytest.fixture
def refused(capsys):
    "A function that gives the one line which a command says when it can't start."

    def called(name, *flags):
        assert getattr(command_line, name)([str(flag) for flag in flags]) == 2
        out, err = capsys.readouterr()
        assert out == ''
        assert err.startswith(f'{name}: ') and err.endswith('\n') and err.count('\n') == 1
        return err

    return called


def test_a_process_that_cannot_start_says_why_and_ends_with_2():
    status, out, err = run('enhance_resize')
    assert (status, out) == (2, '')
    assert err == 'enhance_resize: --path and --resized-path must be given. See --help.\n'


@pytest.mark.parametrize('name', ['enhance_resize', 'enhance_crappify'])
def test_missing_flags(name, photos, refused):
    err = refused(name)
    assert f'--{FLAGS[name][0]}' in err and f'--{FLAGS[name][1]}' in err
    err = refused(name, '--path', photos)
    assert '--path' not in err and f'--{FLAGS[name][1]}' in err


def test_folders_that_cannot_be_used(photos, tmp_path, refused):
    missing = tmp_path / 'missing'
    assert 'missing' in refused('enhance_crappify', '--path', missing, '--degraded-path', 'x')
    assert 'missing' in refused('enhance_resize', '--path', missing, '--resized-path', 'x')
    err = refused('enhance_crappify', '--path', photos, '--degraded-path', photos)
    assert 'photos' in err
    assert not missing.exists() and not Path('x').exists()


def test_settings_that_cannot_be_used(photos, tmp_path, refused):
    flags = ['--path', photos, '--degraded-path', tmp_path / 'degraded']
    err = refused('enhance_crappify', *flags, '--recipe', 'skylin')
    assert 'Did you mean skyline?' in err
    assert 'clean_path' in refused('enhance_crappify', *flags, '--recipe', 'skyline')
    assert '0 workers' in refused('enhance_crappify', *flags, '--num-workers', '0')
    assert 'pngg' in refused('enhance_crappify', *flags, '--format', 'pngg')
    refused('enhance_crappify', *flags, '--seed=-1')
    refused(
        'enhance_resize', '--path', photos, '--resized-path', tmp_path / 'degraded', '--size', '0'
    )
    assert not (tmp_path / 'degraded').exists()


@pytest.mark.parametrize('flags', [['--size', 'large'], ['--seed', '1.5'], ['--color', 'red']])
def test_flags_that_make_no_sense(photos, flags):
    status, out, err = run('enhance_crappify', '--path', photos, '--degraded-path', 'x', *flags)
    assert status == 2 and out == ''
    assert flags[0] in err
    assert not Path('x').exists()


@pytest.mark.parametrize('n_workers', [1, 2])
def test_broken_photos_are_named_and_the_others_done(photos, tmp_path, n_workers):
    (photos / 'empty.png').touch()
    (photos / 'text.png').write_text('This is not a photo.')
    degraded = tmp_path / 'degraded'
    flags = ['--path', photos, '--degraded-path', degraded, '--num-workers', n_workers]
    for _ in range(2):
        status, _, err = run('enhance_crappify', *flags)
        assert status == 1
        assert made(degraded) == ALL
        assert 'empty.png' in err and 'text.png' in err and 'p0.png' not in err
        assert 'failed 2' in err
    (photos / 'empty.png').unlink()
    (photos / 'text.png').unlink()
    status, out, _ = run('enhance_crappify', *flags)
    assert status == 0 and 'made 0, there already 4, failed 0' in out


@pytest.mark.skipif(os.name != 'posix', reason='sends the signal of Ctrl-C as Unix does')
@pytest.mark.parametrize('n_workers, after', [(1, 3), (2, 0), (2, 3)])
def test_ctrl_c_says_one_line_and_the_next_run_finishes(tmp_path, n_workers, after):
    "A terminal sends the signal to the command and to all of its workers."
    photos, degraded = make_photos(tmp_path / 'photos', 60, 200), tmp_path / 'degraded'
    flags = ['--path', photos, '--degraded-path', degraded, '--recipe', 'wild', '--format', 'png']
    flags += ['--num-workers', n_workers]
    process = start('enhance_crappify', *flags, start_new_session=True)
    end = time.monotonic() + 30
    # the table is written just before the workers start
    while not (degraded / 'crappify.csv').exists() or len(made(degraded)) < after:
        assert time.monotonic() < end and process.poll() is None, process.communicate()
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert 'Traceback' not in out + err, err
    assert err.strip() == 'enhance_crappify: stopped. Run it again to go on.'
    done = made(degraded)
    assert len(done) < 60, 'stopped too late to test anything'
    for name in done:
        Image.open(degraded / name).load()  # raises OSError where half of it is missing
    status, out, err = run('enhance_crappify', *flags)
    assert status == 0, err
    assert f'made {60 - len(done)}, there already {len(done)}' in out
    assert len(made(degraded)) == 60 and not list(degraded.glob('.*'))


# Training


SHORT = '--model_name test_resnet --pretrained no --loss mse --size 32 --bs 2'.split()
SHORT += '--frozen_epochs 0 --num_workers 0'.split()


def test_training_with_the_flags_of_image_2(tmp_path):
    "As Image 2.0 spells them: a table, clean photos, degraded photos."
    photos = make_photos(tmp_path / 'photos', 4)
    degraded, table, out = (tmp_path / name for name in ('degraded', 'fnames.csv', 'mine'))
    run('enhance_crappify', '--path', photos, '--degraded-path', degraded)
    table.write_text('fnames,is_val\np0.png,False\np1.png,False\np2.png,True\np3.png,False\n')
    status, shown, err = run(
        'enhance_train',
        *('--df', table, '--path', photos, '--degraded_path', degraded),
        *('--unfrozen_epochs', 1, '--out', out, *SHORT),
    )
    assert status == 0, err
    assert shown.startswith('A U-Net on test_resnet: 2.9 million parameters\n')
    assert f'{out}.safetensors: ' in shown and 'dB before' in shown and 'Epoch 1/1' in shown
    made = sorted(p.name for p in tmp_path.glob('mine*'))
    assert made == ['mine.json', 'mine.pkl', 'mine.safetensors']


def test_training_that_cannot_begin(photos, tmp_path, refused):
    assert '--path must be given' in refused('enhance_train')
    flags = ['--path', photos, '--out', tmp_path / 'mine']
    for more, words in (
        (['--size', 'large'], '--size large'),
        (['--df', tmp_path / 'gone.csv'], 'gone.csv'),
        (['--pretrained', tmp_path / 'gone.pth'], 'gone.pth'),
    ):
        assert words in refused('enhance_train', *flags, *SHORT, *more)
    assert not list(tmp_path.glob('mine*'))


@pytest.mark.skipif(os.name != 'posix', reason='sends the signal of Ctrl-C as Unix does')
def test_a_training_that_was_stopped_goes_on_with_resume(photos, tmp_path, refused):
    flags = ['--path', photos, '--out', tmp_path / 'mine', '--unfrozen_epochs', 400, *SHORT]
    process = start('enhance_train', *flags)
    end = time.monotonic() + 60
    while not list(tmp_path.glob('mine.training/*.ckpt')):
        assert time.monotonic() < end and process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and 'Traceback' not in err
    assert err.strip() == 'enhance_train: stopped. Run it again with --resume to go on.'
    assert 'interrupted' in refused('enhance_train', *flags)
    assert 'begun with bs 2, not 1' in refused('enhance_train', *flags, '--resume', '--bs', 1)
    assert not list(tmp_path.glob('mine.s*'))


@pytest.fixture(scope='module')
def features(tmp_path_factory):
    "A file of a feature network, with random weights."
    import torch
    from torchvision.models import squeezenet1_1

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('features') / 'squeezenet1_1.pth'
    torch.save(squeezenet1_1(weights=None).state_dict(), path)
    return {**os.environ, 'ENHANCE_FEATURES': str(path)}


def test_evaluation_writes_a_table_and_plots(photos, tmp_path, features):
    "Two photos of the folder, degraded by a recipe, and measured as they are and enhanced."
    out = tmp_path / 'found'
    flags = ['--models', 'unet-mse', '--size', 40, '--sample', 2, '--out', out]
    process = start('enhance_evaluate', '--path', photos, *flags, env=features)
    said, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert 'PSNR (dB)' in said and f'{out}.csv, {out}.png' in said
    rows = out.with_suffix('.csv').read_text().splitlines()
    assert rows[0] == 'photo,picture,MSE,PSNR (dB),SSIM,feature distance,fine detail (dB)'
    assert [row.split(',')[1] for row in rows[1:]] == ['input', 'unet-mse'] * 2
    assert Image.open(out.with_suffix('.png')).format == 'PNG'


def test_evaluation_names_photos_without_a_partner(photos, tmp_path, features):
    "The others are measured, and the exit code is 1."
    degraded, names = tmp_path / 'degraded', sorted(p.name for p in photos.iterdir())
    degraded.mkdir()
    Image.open(photos / names[0]).save(degraded / names[0])
    flags = ['--degraded_path', degraded, '--models', 'unet-mse', '--size', 40]
    flags += ['--out', tmp_path / 'a']
    process = start('enhance_evaluate', '--path', photos, *flags, env=features)
    said, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert f'{len(names) - 1} photos could not be measured' in err and names[1] in err
    assert 'Traceback' not in err


def test_an_evaluation_that_was_stopped_begins_anew(photos, monkeypatch, capsys):
    "It keeps nothing, so there is nothing to go on from."
    from enhance_lib.applications.command_line import enhance_evaluate

    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr('enhance_lib.applications.evaluate.evaluate', stopped)
    assert enhance_evaluate(['--path', str(photos)]) == 130
    assert capsys.readouterr().err == '\nenhance_evaluate: stopped. Run it again to begin anew.\n'


def test_evaluation_that_cannot_begin(photos, tmp_path, refused):
    "Exit code 2 and one sentence; nothing is written."
    assert '--path must be given' in refused('enhance_evaluate')
    for words, *flags in (
        ("'unet-msr'", '--models', 'unet-msr'),
        ("'gna'", '--recipe', 'gna'),
        ('nowhere', '--degraded_path', 'nowhere'),
    ):
        more = ['--path', photos, '--out', tmp_path / 'out']
        assert words in refused('enhance_evaluate', *more, *flags)
    assert not list(tmp_path.glob('out*'))
