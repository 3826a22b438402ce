"""Train a restorer in rounds: `make round MODEL=restore-x1 MINUTES=90`.

A round may be stopped at any time: the same command resumes it, and after its end begins the next
one, from the weights of the last. In the folder of the model, `_rounds/MODEL`, `log.csv` holds the
validation curve, `sheet-….png` some of the validation photos (degraded, restored, clean) every half
hour. At the end, weights that are better on the validation photos than the published ones take
their place.

Chosen by pilots on one core of two each, on a draft of the recipe (PSNR of 28 damaged and of 14
noisy validation crops, sigma 25): this U-Net, 64, 80 and 128 maps wide, predicting what to add,
29.06 and 29.22 dB after 7 minutes, 29.31 and 29.47 dB after 19; predicting the photo 28.12 and
28.44, 28.37 and 28.81 dB; a network of one size, 64 channels and 12 blocks at half the side,
predicting what to add, 28.52 and 28.05 dB after 7.
"""

import argparse
import csv
import json
import math
import sys
import time
import warnings
from pathlib import Path

import torch
from torch.nn import functional as F
from torchvision.utils import save_image
from weights import PHOTOS, SHARED, machine
from wild import nothing, tasks_of, wild_scores

from enhance_lib.applications.restorer import Restorer
from enhance_lib.crappify import wild_recipe
from enhance_lib.srcnn import enlarge
from enhance_lib.toolbox.checkpoints import load_checkpoint, save_checkpoint
from enhance_lib.toolbox.device import autocast
from enhance_lib.toolbox.errors import EnhanceError, check_within
from enhance_lib.toolbox.files import find_photos, write_atomically
from enhance_lib.toolbox.models import WEIGHTS, load_model, published, save_weights
from enhance_lib.toolbox.pairs import recipe_dls
from enhance_lib.toolbox.training import MUON, WeightAverage, psnr_learner, set_seed

with warnings.catch_warnings():
    warnings.simplefilter('ignore', FutureWarning)  # fastai still uses torch.jit
    from fastai.callback.core import Callback, CancelFitException
    from fastai.callback.training import GradientClip
    from fastai.learner import AvgMetric
    from fastai.metrics import mse

ROOT = Path(__file__).resolve().parent.parent
MODELS = {'restore-x1': 1, 'restore-x2': 2, 'restore-x4': 4}  # name -> scale
SIZE, BATCH = 128, 8  # side of a clean crop in pixels, pairs in a batch
RATES, WARM_UP = (3e-3, 2e-3), 200  # the highest of the first round and of others; steps up to it
FLAT = 0.3  # share of a round before the rate falls, to nothing at its end
DECAY = 0.995  # of the average of the weights: 200 steps, since a fall averages too
EPOCH = 4000  # crops between two validations, each with a checkpoint
SHEETS = 30  # minutes between two sheets
VALID = {'size': 192, 'crops': 8}  # of each of the photos that validate: every twentieth


class Clock(Callback):
    "What a round does by the clock: its rate, validation, checkpoints and sheets, and its end."

    order = 70  # after the average

    def __init__(self, folder, minutes, average, baseline):
        self.folder, self.limit, self.average, self.baseline = folder, minutes, average, baseline
        self.number, self.minutes, self.steps = len(read_rounds(folder)) + 1, 0.0, 0
        self.checkpoint = folder / f'round-{self.number}.ckpt'
        self.highest = RATES[min(self.number, len(RATES)) - 1]

    def state_dict(self):
        return {'minutes': self.minutes, 'steps': self.steps}

    def load_state_dict(self, state):
        self.minutes, self.steps = state['minutes'], state['steps']

    def _parts(self):
        return {'model': self.model, 'optimizer': self.opt, 'average': self.average, 'clock': self}

    def before_fit(self):
        if self.checkpoint.exists():
            load_checkpoint(self.checkpoint, self.dls.device, **self._parts())
            done = f'{self.minutes:.0f} of {self.limit:g} minutes done'
            print(f'round {self.number} resumes, {done}', flush=True)
        self.began = time.monotonic() - 60 * self.minutes

    def progress(self):
        "How much of the round is over, 0 to 1."
        self.minutes = (time.monotonic() - self.began) / 60
        return min(self.minutes / self.limit, 1.0)

    def before_batch(self):
        if self.training:
            fall = min((1 - self.progress()) / (1 - FLAT), 1.0)
            self.opt.set_hyper('lr', self.highest * min((self.steps + 1) / WARM_UP, 1.0) * fall)

    def after_batch(self):
        if self.training:
            self.steps += 1
            if self.progress() == 1:
                raise CancelFitException

    def before_validate(self):
        self.raw = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.average.keep()

    def after_validate(self):
        sheet = self.folder / f'sheet-{self.number}-{int(self.minutes // SHEETS)}.png'
        if not sheet.exists():
            write_sheet(self.learn, sheet)
        self.model.load_state_dict(self.raw)

    def after_epoch(self):
        save_checkpoint(self.checkpoint, self.steps, **self._parts())
        write_row(self, *self.learn.final_record[1:])


def decibels(error: float) -> float:
    "PSNR of a mean squared error in [0, 1]."
    return -10 * math.log10(max(error, 1e-10))


def baseline_of(dls) -> tuple[float, float]:
    "L1 and mean squared error of the degraded validation photos as they are, in [0, 1]."
    means = []
    for x, y in dls.valid:
        difference = enlarge(x, y.shape[2] // x.shape[2]) - y
        errors = difference.abs().mean((1, 2, 3)), difference.square().mean((1, 2, 3))
        means.append(torch.stack(errors, 1).cpu())
    return tuple(torch.cat(means).mean(0).tolist())


def write_row(clock, loss, error):
    "Add a row to the validation curve, and print it. PSNR is that of the mean squared error."
    row = {'round': clock.number, 'minutes': f'{clock.minutes:.1f}', 'steps': clock.steps}
    row |= {'input L1': f'{clock.baseline[0]:.5f}', 'L1': f'{loss:.5f}'}
    row |= {'input dB': f'{decibels(clock.baseline[1]):.2f}', 'dB': f'{decibels(error):.2f}'}
    path = clock.folder / 'log.csv'
    new = not path.exists()
    with path.open('a', newline='') as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(', '.join(f'{k} {v}' for k, v in row.items()), flush=True)


def write_sheet(learn, path):
    "A row for each of the first validation pairs: degraded, restored, clean."
    x, y = learn.dls.valid.one_batch()
    with torch.no_grad(), autocast(x.device):
        better = learn.model(x)
    parts = (F.interpolate(x, y.shape[2:], mode='nearest'), better, y)
    rows = torch.stack([part.float().clamp(0, 1).cpu() for part in parts], 1)
    with write_atomically(path) as temporary:
        save_image(rows.flatten(0, 1), temporary, nrow=3, format='png')


def read_rounds(folder: Path) -> list[dict]:
    "The rounds that ended: minutes, steps, rate, L1 and dB on the validation photos."
    path = folder / 'rounds.json'
    if path.exists():
        return json.loads(path.read_text())
    return load_model(folder.name).card['training']['rounds'] if folder.name in published() else []


def write_rounds(folder, rounds):
    with write_atomically(folder / 'rounds.json') as temporary:
        temporary.write_text(json.dumps(rounds, indent=1))


def new_model(name: str, folder: Path) -> Restorer:
    "What a round begins with: the last one's end, or what is published, or an untrained network."
    last = folder / f'{name}.safetensors'
    if last.with_suffix('.json').exists() or name in published():
        return load_model(last if last.with_suffix('.json').exists() else name)
    model = Restorer(MODELS[name])  # one that enlarges begins with what `restore-x1` knows
    if model.scale > 1 and 'restore-x1' in published():
        own, others = model.state_dict(), load_model('restore-x1').state_dict()
        fitting = {k: v for k, v in others.items() if v.shape == own[k].shape}
        model.load_state_dict(fitting | {k: own[k] for k in ('last.weight', 'last.bias')}, False)
    return model


def learner(dls, model):
    "A `Learner` with Muon that validates by L1 and mean squared error."
    learn = psnr_learner(dls, model, F.l1_loss, **MUON)
    learn.metrics = [AvgMetric(mse)]
    return learn


def train(name, folders, minutes, home, out, workers):
    "One round, or what is left of it; then publish the weights if they are better."
    folder = home / name
    folder.mkdir(parents=True, exist_ok=True)
    photos = {'/'.join(Path(f).parts[-2:]): find_photos(f) for f in folders}
    everything = sorted({p for found in photos.values() for p in found})
    valid = everything[::20]
    train = sorted({*everything} - {*valid})
    rounds = read_rounds(folder)
    set_seed(len(rounds))  # other crops than in the rounds before
    dls = recipe_dls(
        train,
        valid * VALID['crops'],
        wild_recipe(MODELS[name]),
        size=SIZE,
        bs=BATCH,
        valid_size=VALID['size'],
        per_photo=max(EPOCH // max(len(train), 1), 1),
        n_workers=workers,
    )
    data = {where: len(found) for where, found in photos.items()}
    if rounds and rounds[-1].get('published') is None and (folder / f'{name}.json').exists():
        publish(name, dls, rounds, data, out, folder)  # what was killed before its end
    average = WeightAverage(DECAY)
    clock = Clock(folder, minutes, average, baseline_of(dls))
    learn = learner(dls, new_model(name, folder))
    with learn.no_bar(), learn.no_logging():
        learn.fit(10**6, cbs=[GradientClip(1.0), average, clock])
        average.keep()
        loss, error = (float(v) for v in learn.validate())
    write_sheet(learn, folder / f'sheet-{clock.number}-end.png')
    write_row(clock, loss, error)
    save_weights(learn.model, folder / f'{name}.safetensors', half=True)
    done = {'minutes': minutes, 'steps': clock.steps, 'rate': clock.highest}
    done |= {'L1': round(loss, 5), 'dB': round(decibels(error), 2), 'published': None}
    rounds.append(done)
    write_rounds(folder, rounds)
    clock.checkpoint.unlink(missing_ok=True)
    publish(name, dls, rounds, data, out, folder)


def publish(name, dls, rounds, photos, out, folder):
    "Publish the weights of the last round, unless those that are published are better."
    path = out / f'{name}.safetensors'
    better = True
    if path.with_suffix('.json').exists():
        learn = learner(dls, load_model(path))
        with learn.no_bar():
            before = float(learn.validate()[0])
        better = rounds[-1]['L1'] < before
        print(f'{name}: L1 {rounds[-1]["L1"]:.5f}, published {before:.5f}', flush=True)
    if better:
        write_card(name, [*rounds[:-1], rounds[-1] | {'published': True}], photos, path, folder)
    rounds[-1]['published'] = better
    write_rounds(folder, rounds)


def scores_of(name, model):
    "The blind protocol for a card: luma PSNR before and after, and the other measures likewise."
    tasks, scores = tasks_of(model), {}
    before = wild_scores('input', nothing, tasks)
    after = wild_scores(name, lambda path, scale: model.predict(path), tasks)
    for task, score in after.items():
        protocol = f'luma PSNR, blind protocol (make bench), {score.pop("photos")} photos'
        pairs = {m: [before[task][m], v] for m, v in score.items() if m in before[task]}
        if 'luma' in pairs:
            pairs['input'], pairs['output'] = pairs.pop('luma')
        scores[f'BSDS500 val, {task}'] = {**pairs, 'protocol': protocol}
    return scores


def write_card(name, rounds, photos, path, folder):
    "Measure the weights of the last round, and publish them."
    model = load_model(folder / f'{name}.safetensors')
    scores = scores_of(name, model)
    save_weights(
        model,
        path,
        half=True,
        task='wild',
        recipe=wild_recipe(model.scale).about,
        budget='full',
        training={
            'photos': photos,
            'how': f'L1, Muon, crops of {SIZE}×{SIZE} in batches of {BATCH}, every twentieth photo '
            'validates',
            'rounds': rounds,
        },
        scores=scores,
        machine=machine(),
        command=f'make round MODEL={name} MINUTES={rounds[-1]["minutes"]:g}',
        license='Apache-2.0',
    )
    print(f'{name}: published; {json.dumps(scores)}')


def main(arguments=None):
    shown = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shown)
    parser.add_argument('model', choices=MODELS)
    parser.add_argument('--minutes', type=float, default=90, help='of the round (default 90)')
    parser.add_argument('--photos', nargs='*', default=[], help='folders of clean photos')
    parser.add_argument('--home', type=Path, default=ROOT / '_rounds', help='for checkpoints')
    parser.add_argument('--out', type=Path, default=WEIGHTS, help='by default the package')
    parser.add_argument('--workers', type=int, default=1, help='processes that make pairs')
    given = parser.parse_args(arguments)
    folders = given.photos or [str(SHARED / p) for p in PHOTOS if (SHARED / p).is_dir()]
    try:
        check_within('A round in minutes', given.minutes, 0.01, 10_000)
        if not folders:
            raise EnhanceError("Name a folder of photos: make round PHOTOS='folder another'.")
        train(given.model, folders, given.minutes, given.home, given.out, given.workers)
    except EnhanceError as e:
        # fastai puts a line of its own before the words of a callback
        print(str(e).splitlines()[-1], file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('\nstopped; the same command resumes from the last checkpoint', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
