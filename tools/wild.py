"""The blind protocol: photos of BSDS500 val, damaged as found in the wild, and how they fare."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from enhance_lib.toolbox.errors import EnhanceError
from enhance_lib.toolbox.files import find_photos, open_photo
from enhance_lib.toolbox.operations import resize

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / 'shared'
PROTOCOL = SHARED / 'tools' / 'wild_set.py'
FOLDER = ROOT / '_bench' / 'wild'
TASKS = ('x1', 'x2', 'x4', 'good', 'noise15', 'noise25', 'noise50')  # folders of FOLDER
MEASURES = ('luma', 'RGB', 'SSIM', 'LPIPS', 'lowest luma')  # in dB, but for SSIM and LPIPS


def run_protocol(*arguments) -> str:
    "What the protocol prints. It measures LPIPS with SqueezeNet, which lies beside the project."
    home = FOLDER.parent / 'torch'
    network = home / 'hub' / 'checkpoints' / 'squeezenet1_1-b8a52dc0.pth'
    network.parent.mkdir(parents=True, exist_ok=True)
    if not os.path.lexists(network):
        network.symlink_to(SHARED / 'pretrained' / 'squeezenet1_1.pth')
    command = [sys.executable, PROTOCOL, *map(str, arguments)]
    variables = {**os.environ, 'TORCH_HOME': str(home)}
    done = subprocess.run(command, env=variables, text=True, stdout=subprocess.PIPE)
    if done.returncode:
        raise EnhanceError(f'The blind protocol failed ({PROTOCOL.name} {arguments[0]}).')
    return done.stdout


def read_scores(printed: str) -> dict[str, dict[str, float]]:
    "The means by task, from what the protocol prints. Equal photos have no PSNR: it is left out."
    found = {}
    for line in printed.splitlines():
        values = {m: re.search(rf'(?<!\w){m} +([\d.]+|inf)', line)[1] for m in MEASURES}
        found[line.split()[0]] = {m: float(v) for m, v in values.items() if v != 'inf'}
        found[line.split()[0]]['photos'] = int(re.search(r'(\d+) photos', line)[1])
    return found


def scale_of(task: str) -> int:
    "How many times larger per side the result of a task is."
    return int(task[1:]) if task.startswith('x') else 1


def tasks_of(model) -> tuple:
    "What a restorer is measured by."
    return tuple(task for task in TASKS if scale_of(task) == model.scale)


def nothing(path, scale):
    "The line to beat: the degraded photo as it is, enlarged by bicubic."
    photo = open_photo(path, 'RGB')
    return resize(photo, scale * photo.width, scale * photo.height)


def wild_scores(
    name: str,  # of the folders that hold what comes out
    enhance: Callable,  # function(path, scale) -> the better photo, scale times as large
    tasks: tuple = TASKS,  # of these
) -> dict[str, dict[str, float]]:  # means over the photos of each task; {} without the protocol
    "Run and score the blind protocol."
    if not PROTOCOL.is_file():
        return {}
    if not FOLDER.is_dir():
        part = FOLDER.with_name('wild.part')
        shutil.rmtree(part, ignore_errors=True)
        run_protocol('make', part)
        part.rename(FOLDER)
    for task in tasks:
        scale = scale_of(task)
        out = FOLDER / task / name
        out.mkdir(exist_ok=True)
        for path in find_photos(FOLDER / task / 'degraded'):
            enhance(path, scale).save(out / f'{path.stem}.png', compress_level=1)
    return read_scores(run_protocol('score', FOLDER, name, *tasks))
