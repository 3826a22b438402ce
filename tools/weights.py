"""Train the published weights again, from folders of photos, and write them with their cards."""

import argparse
import importlib
import os
import platform
import sys
from pathlib import Path

import torch

from enhance_lib.measure import (
    TASKS,
    WEIGHTS,
    bench_pairs,
    board_row,
    feature_net,
    mean_luma_psnr,
    unenhanced,
)
from enhance_lib.photos import Budget, PhotoError, find_photos, open_photo
from enhance_lib.workbench import save_weights

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / 'shared' / 'data'
FEATURES = ROOT.parent / 'shared' / 'pretrained' / 'squeezenet1_1.pth'
LESSONS = ('srcnn',)  # modules with PUBLISHED and train_published
# Clean photos, so they count twice. Those of BSDS500 were JPEG-coded by their makers.
PHOTOS = ('photos', 'photos', 'bsds500/train', 'bsds500/test')


def published():
    "Which lesson trains which model: name -> module."
    modules = [importlib.import_module(f'enhance_lib.{name}') for name in LESSONS]
    return {name: module for module in modules for name in module.PUBLISHED}


def scores_of(model):
    "What a model reaches on the usual sets, as far as they lie beside the project."
    task, scale = model.card['task'], model.scale
    scores = {}
    if scale > 1:
        folder = SHARED / 'bench' / 'Set5' / f'x{scale}'
        pairs = bench_pairs(folder) if folder.is_dir() else []
        if pairs:
            scores['Set5'] = scored(model, pairs, scale)
            scores['Set5']['protocol'] = (
                f'luma PSNR (BT.601, studio range), {scale} pixels shaved, small photos by '
                "MATLAB's bicubic, input enlarged by Pillow's"
            )
        return scores
    for name, folder in (('BSDS500 val', 'bsds500/val'), ('Classic5', 'bench/Classic5')):
        if (SHARED / folder).is_dir():
            photos = [open_photo(p, 'RGB') for p in find_photos(SHARED / folder)]
            pairs = [TASKS[task].pair(photo) for photo in photos]
            scores[name] = scored(model, pairs, 0)
            scores[name]['protocol'] = 'PSNR of the gray photo, JPEG by Pillow, no border shaved'
    return scores


def scored(model, pairs, shave):
    "Mean PSNR in dB of the input, enlarged by bicubic where it is smaller, and of the output."
    sizes = {id(bad): good.size for bad, good in pairs}
    before = mean_luma_psnr(lambda bad: unenhanced(bad, sizes[id(bad)]), pairs, shave)
    return {
        'input': round(before, 2),
        'output': round(mean_luma_psnr(model.predict, pairs, shave), 2),
    }


def train(name, module, folders, budget, home, out):
    "Train one model, going on from its checkpoint, and write weights and card."
    task = module.PUBLISHED[name]['task']
    photos = [p for folder in folders for p in find_photos(folder)]
    model, history = module.train_published(name, photos, home / f'{name}.ckpt', budget)
    rows = [
        board_row('input', task),
        board_row(name, task, model.predict, sum(p.numel() for p in model.parameters())),
    ]
    model.card = {'task': task}
    card = save_weights(
        model,
        out / f'{name}.safetensors',
        task=task,
        recipe=TASKS[task].about,
        budget=budget.name,
        training={
            'photos, as often as their folder was named': {
                '/'.join(Path(f).parts[-2:]): folders.count(f) * len(find_photos(f))
                for f in folders
            },
            'epochs': len(history),
            'validation': {k: round(v, 4) for k, v in history[-1].items()},
        },
        scores=scores_of(model),
        scoreboard=rows,
        machine=f'{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}',
        command=f'make weights MODELS={name} BUDGET={budget.name}',
        licence='Apache-2.0',
    )
    said = [f'{k} {v["input"]} → {v["output"]} dB' for k, v in card['scores'].items()]
    print(f'{name}: {", ".join(said) or "no benchmark here"}; {out / name}.safetensors', flush=True)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--models', nargs='*', default=[], help='which; by default all')
    parser.add_argument(
        '--photos', nargs='*', default=[], help='folders; one named twice counts twice'
    )
    parser.add_argument('--budget', default='full', help='smoke, lesson or full')
    parser.add_argument('--out', type=Path, help='by default the package, or _weights/BUDGET')
    given = parser.parse_args(arguments)
    if FEATURES.is_file():
        os.environ.setdefault('ENHANCE_FEATURES', str(FEATURES))
    known = published()
    try:
        budget = Budget(given.budget)
        unknown = [n for n in given.models if n not in known]
        if unknown:
            raise PhotoError(f'There is no model {unknown[0]!r}. There are: {", ".join(known)}.')
        folders = given.photos or [str(SHARED / p) for p in PHOTOS if (SHARED / p).is_dir()]
        if not folders:
            raise PhotoError("Name a folder of photos: make weights PHOTOS='folder another'.")
        feature_net()  # what is missing is said before the training, not after it
        home = ROOT / '_weights' / budget.name
        out = given.out or (WEIGHTS if budget.name == 'full' else home)
        for name in given.models or known:
            train(name, known[name], folders, budget, home, out)
    except PhotoError as e:
        print(e, file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
