"""Train the published weights again, from folders of photos, and write them with their cards."""

import argparse
import os
import platform
import sys
from functools import partial
from pathlib import Path
from statistics import mean

import torch

from enhance_lib.applications.publish import PUBLISHED, train_published
from enhance_lib.applications.scoreboard import TASKS, bench_pairs, board_row
from enhance_lib.crappify import Recipe, Step
from enhance_lib.measure import feature_distance, luma_psnr, psnr, radial_spectrum, ssim
from enhance_lib.realtime import compare_downscaling
from enhance_lib.toolbox.errors import EnhanceError
from enhance_lib.toolbox.features import feature_net
from enhance_lib.toolbox.files import find_photos, open_photo
from enhance_lib.toolbox.models import WEIGHTS, save_weights
from enhance_lib.toolbox.operations import identity_baseline
from enhance_lib.toolbox.show import Budget

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / 'shared' / 'data'
FEATURES = ROOT.parent / 'shared' / 'pretrained' / 'squeezenet1_1.pth'
# Freely licensed, clean photos; those of BSDS500 are for research, and measured on.
PHOTOS = ('photos',)


# What a model for color JPEG is measured on: in words, and as a recipe without chance.
JPEG = {
    **{
        f'quality {q}': Recipe('jpeg', (Step('jpeg', quality=q),))
        for q in (10, 20, 30, 40, 50, 70, 90)
    },
    'quality 10, then 50 shifted by 4': Recipe(
        'double', (Step('jpeg', quality=10, shift_x=4, shift_y=4), Step('jpeg', quality=50))
    ),
}
MEASURED = {'jpeg-q10': ('quality 10',), 'jpeg-blind': tuple(JPEG)}  # the others: see `scores_of`


def scores_of(model):
    "What a model reaches on the usual sets, as far as they lie beside the project."
    name, task, scale = model.card['name'], model.card['task'], model.scale
    if scale > 1:
        return scores_of_enlarging(model, scale)
    if task == 'gan':
        return scores_of_gan(model)
    scores = {}
    for where, folder in (('BSDS500 val', 'bsds500/val'), ('Classic5', 'bench/Classic5')):
        if not (SHARED / folder).is_dir():
            continue
        if name not in MEASURED:
            photos = [open_photo(p, 'RGB') for p in find_photos(SHARED / folder)]
            pairs = [TASKS[task].pair(photo) for photo in photos]
            scores[where] = scored(model, pairs, luma_psnr)
            scores[where]['protocol'] = 'PSNR of the gray photo, JPEG by Pillow, no border shaved'
            continue
        photos = [open_photo(p, None) for p in find_photos(SHARED / folder)]
        gray = photos[0].mode == 'L'
        kind = 'gray PSNR, JPEG by Pillow' if gray else 'RGB PSNR, JPEG by Pillow (4:2:0)'
        for what in MEASURED[name]:
            pairs = [JPEG[what].pair(photo) for photo in photos]
            score = scored(model, pairs, psnr)
            scores[f'{where}, {what}'] = {**score, 'protocol': f'{kind}, no border shaved'}
    return scores


def scores_of_enlarging(model, scale):
    "The same for a model whose output is larger than its input."
    folder = SHARED / 'bench' / 'Set5' / f'x{scale}'
    pairs = bench_pairs(folder) if folder.is_dir() else []
    if not pairs:
        return {}
    measure = partial(luma_psnr, border=scale)
    by = f'luma PSNR (BT.601, studio range), {scale} pixels shaved'
    protocol = f"{by}, small photos by MATLAB's bicubic, input enlarged by Pillow's"
    scores = {'Set5': {**scored(model, pairs, measure), 'protocol': protocol}}
    if not model.card['name'].startswith('realtime'):
        return scores
    net, outputs = feature_net(), [model.predict(small) for small, _ in pairs]
    both = [
        [feature_distance(p, clean, net) for p in (identity_baseline(small, clean.size), y)]
        for y, (small, clean) in zip(outputs, pairs)
    ]
    scores['Set5']['feature distance'] = [round(mean(values), 4) for values in zip(*both)]
    photos = [clean for _, clean in pairs]
    table = compare_downscaling({'it': model}, photos, scale)
    scores['Set5, any way'] = {
        'input': round(table.loc['mean', 'bicubic'], 2),
        'output': round(table.loc['mean', 'it'], 2),
        'by way': table['it'].drop('mean').round(2).to_dict(),
        'protocol': f'{by}, mean over five ways to make photos small (lesson 08)',
    }
    folder = SHARED / 'bsds500' / 'val'
    if folder.is_dir():
        recipe = TASKS[model.card['task']]
        pairs = [recipe.pair(open_photo(p, 'RGB')) for p in find_photos(folder)]
        score = scored(model, pairs, measure)
        scores['BSDS500 val'] = {**score, 'protocol': f"{by}, small photos by Pillow's bicubic"}
    return scores


def scores_of_gan(model):
    "The same for recipe gan, by all measures, with seed 0, so that it is the same each time."
    folder = SHARED / 'bsds500' / 'val'
    if not folder.is_dir():
        return {}
    paths, net = find_photos(folder), feature_net()
    pairs = [TASKS['gan'].pair(open_photo(p, 'RGB'), 0, p.name, 256) for p in paths]
    outputs = [model.predict(degraded) for degraded, _ in pairs]
    score = scored(model, pairs, psnr, outputs)
    for name, measure in (('SSIM', ssim), ('feature distance', partial(feature_distance, net=net))):
        both = [
            [measure(p, clean) for p in (degraded, y)]
            for y, (degraded, clean) in zip(outputs, pairs)
        ]
        score[name] = [round(mean(values), 4) for values in zip(*both)]
    photos = zip(*((degraded, y, clean) for y, (degraded, clean) in zip(outputs, pairs)))
    before, after, right = (sum(map(top_octave, some)) for some in photos)
    score['top octave'] = [round(energy / right, 3) for energy in (before, after)]
    protocol = (
        'RGB PSNR and SSIM (scikit-image) of 256×256 crops, recipe gan, seed 0; feature distance: '
        "SqueezeNet 1.1; top octave: energy of all photos, relative to the originals'"
    )
    return {'BSDS500 val': {**score, 'protocol': protocol}}


def top_octave(photo):
    "The energy of a photo from a quarter of a cycle per pixel to a half, by its radial spectrum."
    frequency, power = radial_spectrum(photo)
    ring = frequency * 10 ** (power / 10)  # a ring has as many waves as it is long
    return float(ring[frequency >= 0.25].sum())


def scored(model, pairs, measure, outputs=None):
    "In dB: mean of the input (enlarged by bicubic if smaller) and of the output; least gain."
    before = [measure(identity_baseline(degraded, clean.size), clean) for degraded, clean in pairs]
    outputs = outputs or [model.predict(degraded) for degraded, _ in pairs]
    after = [measure(y, clean) for y, (_, clean) in zip(outputs, pairs)]
    return {
        'input': round(mean(before), 2),
        'output': round(mean(after), 2),
        'least gain of a photo': round(min(b - a for a, b in zip(before, after)), 2),
    }


def train(name, folders, budget, home, out, workers):
    "Train one model, going on from its checkpoint, and write weights and card."
    plan = PUBLISHED[name]
    photos = [p for folder in folders for p in find_photos(folder)]
    model, history = train_published(name, photos, home / f'{name}.ckpt', budget, workers)
    rows = [
        board_row('input', plan.task),
        board_row(name, plan.task, model.predict, sum(p.numel() for p in model.parameters())),
    ]
    model.card = {'name': name, 'task': plan.task}
    card = save_weights(
        model,
        out / f'{name}.safetensors',
        half=plan.half,
        task=plan.task,
        recipe=plan.rounds[-1].recipe.about,
        budget=budget.name,
        training={
            'photos, as often as their folder was named': {
                '/'.join(Path(f).parts[-2:]): folders.count(f) * len(find_photos(f))
                for f in folders
            },
            **({'start': plan.start} if plan.start else {}),
            'epochs': sum(row['epochs'] for row in history),
            'validation': {k: round(v, 4) for k, v in history[-1].items()},
        },
        scores=scores_of(model),
        scoreboard=rows,
        machine=machine(),
        command=f'make weights MODELS={name} BUDGET={budget.name}',
        license='Apache-2.0',
    )
    said = [f'{k} {v["input"]} → {v["output"]} dB' for k, v in card['scores'].items()]
    print(f'{name}: {", ".join(said) or "no benchmark here"}; {out / name}.safetensors', flush=True)


def machine():
    "What this is running on."
    gpu = f'{torch.cuda.get_device_name()}, ' if torch.cuda.is_available() else ''
    return f'{gpu}{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}'


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--models', nargs='*', default=[], help='which; by default all')
    parser.add_argument(
        '--photos', nargs='*', default=[], help='folders; one named twice counts twice'
    )
    parser.add_argument('--budget', default='full', help='smoke, lesson or full')
    parser.add_argument('--out', type=Path, help='by default the package, or _weights/BUDGET')
    parser.add_argument('--workers', type=int, default=0, help='processes that make pairs')
    given = parser.parse_args(arguments)
    if FEATURES.is_file():
        os.environ.setdefault('ENHANCE_FEATURES', str(FEATURES))
    try:
        budget = Budget(given.budget)
        unknown = [n for n in given.models if n not in PUBLISHED]
        if unknown:
            raise EnhanceError(
                f'There is no model {unknown[0]!r}. There are: {", ".join(PUBLISHED)}.'
            )
        folders = given.photos or [str(SHARED / p) for p in PHOTOS if (SHARED / p).is_dir()]
        if not folders:
            raise EnhanceError("Name a folder of photos: make weights PHOTOS='folder another'.")
        feature_net()  # what is missing is said before the training, not after it
        home = ROOT / '_weights' / budget.name
        out = given.out or (WEIGHTS if budget.name == 'full' else home)
        for name in given.models or PUBLISHED:
            train(name, folders, budget, home, out, given.workers)
    except EnhanceError as e:
        # fastai puts a line of its own before the words of a callback
        print(str(e).splitlines()[-1], file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
