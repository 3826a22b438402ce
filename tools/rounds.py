"""Train a restorer in rounds: `make round MODEL=restore-x1 MINUTES=90`.

A round may be stopped at any time: the same command goes on with it, and after its end begins the
next one, from the weights of the last. In the folder of the model, `_rounds/MODEL`, `log.csv` holds
the validation curve, `sheet-….png` some of the validation photos (degraded, restored, clean) every
half hour. At the end, weights that are better on the validation photos than the published ones take
their place.
"""

import argparse
import csv
import json
import sys
import time
import warnings
from pathlib import Path

import torch
from torch.nn import functional as F
from torchvision.utils import save_image
from weights import PHOTOS, SHARED, machine
from wild import wild_scores

from enhance_lib.applications.restorer import Restorer
from enhance_lib.crappify import wild_recipe
from enhance_lib.toolbox.checkpoints import load_checkpoint, save_checkpoint
from enhance_lib.toolbox.device import autocast
from enhance_lib.toolbox.errors import EnhanceError
from enhance_lib.toolbox.files import find_photos, write_atomically
from enhance_lib.toolbox.models import WEIGHTS, load_model, published, save_weights
from enhance_lib.toolbox.pairs import recipe_dls
from enhance_lib.toolbox.training import MUON, WeightAverage, psnr_learner, set_seed

with warnings.catch_warnings():
    warnings.simplefilter('ignore', FutureWarning)  # fastai still uses torch.jit
    from fastai.callback.core import Callback, CancelFitException
    from fastai.callback.training import GradientClip

ROOT = Path(__file__).resolve().parent.parent
MODELS = {'restore-x1': 1, 'restore-x2': 2, 'restore-x4': 4}  # name -> scale
SIZE, BATCH = 128, 8  # side of a clean crop in pixels, pairs in a batch
RATES, WARM_UP = (3e-3, 2e-3), 200  # the highest of the first round and of others; steps up to it
FLAT = 0.3  # share of a round before the rate falls, to nothing at its end
DECAY = 0.995  # of the average of the weights: 200 steps, since a fall averages too
EPOCH = 4000  # crops between two validations, each with a checkpoint
SHEETS = 1800  # seconds between two sheets
VALID = {'size': 192, 'crops': 8}  # of each of the photos that validate: every twentieth


class Clock(Callback):
    "What a round does by the clock: its rate, validation, checkpoints and sheets, and its end."

    order = 70  # after the average

    def __init__(self, folder, minutes, average):
        self.folder, self.limit, self.average = folder, 60 * minutes, average
        self.number, self.seconds, self.steps = len(read_rounds(folder)) + 1, 0.0, 0

    def state_dict(self):
        return {'seconds': self.seconds, 'steps': self.steps}

    def load_state_dict(self, state):
        self.seconds, self.steps = state['seconds'], state['steps']

    def _parts(self):
        return {'model': self.model, 'optimizer': self.opt, 'average': self.average, 'clock': self}

    def before_fit(self):
        path = self.folder / 'round.ckpt'
        if path.exists():
            load_checkpoint(path, self.dls.device, **self._parts())
            done = f'{self.seconds / 60:.0f} of {self.limit / 60:.0f} minutes done'
            print(f'round {self.number} goes on, {done}', flush=True)
        else:
            set_seed(self.number)  # other crops than in the rounds before
        self.began = time.monotonic() - self.seconds

    def share(self):
        "How much of the round is over, 0 to 1."
        self.seconds = time.monotonic() - self.began
        return min(self.seconds / self.limit, 1.0)

    def before_batch(self):
        if self.training:
            fall = min((1 - self.share()) / (1 - FLAT), 1.0)
            highest = RATES[min(self.number, 2) - 1]
            self.opt.set_hyper('lr', highest * min((self.steps + 1) / WARM_UP, 1.0) * fall)

    def after_batch(self):
        if self.training:
            self.steps += 1
            if self.share() == 1:
                raise CancelFitException

    def before_validate(self):
        self.raw = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.average.keep()

    def after_validate(self):
        sheet = self.folder / f'sheet-{self.number}-{int(self.seconds // SHEETS)}.png'
        if not sheet.exists():
            write_sheet(self.learn, sheet)
        self.model.load_state_dict(self.raw)

    def after_epoch(self):
        write_row(self.folder, self, *self.learn.final_record[1:])
        save_checkpoint(self.folder / 'round.ckpt', self.steps, **self._parts())


def write_row(folder, clock, loss, before, after):
    "Add a row to the validation curve, and print it."
    row = {'round': clock.number, 'minutes': f'{clock.seconds / 60:.1f}', 'steps': clock.steps}
    row |= {'L1': f'{loss:.5f}', 'input dB': f'{before:.3f}', 'output dB': f'{after:.3f}'}
    path = folder / 'log.csv'
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
    save_image(rows.flatten(0, 1), path, nrow=3)


def read_rounds(folder):
    "The rounds that ended, for the card: minutes, steps, and what the photos that validate say."
    path = folder / 'rounds.json'
    if path.exists():
        return json.loads(path.read_text())
    return load_model(folder.name).card['training']['rounds'] if folder.name in published() else []


def new_model(name, folder):
    "What a round begins with: what the last one ended with, or what is published, or little."
    last = folder / f'{name}.safetensors'
    if last.exists() or name in published():
        return load_model(last if last.exists() else name)
    model = Restorer(MODELS[name])  # one that enlarges begins with what `restore-x1` knows
    if model.scale > 1 and 'restore-x1' in published():
        own, others = model.state_dict(), load_model('restore-x1').state_dict()
        fitting = {k: v for k, v in others.items() if v.shape == own[k].shape}
        model.load_state_dict(fitting | {k: own[k] for k in ('last.weight', 'last.bias')}, False)
    return model


def train(name, folders, minutes, home, out, workers):
    "One round, or what is left of it; then publish the weights if they are better."
    folder = home / name
    folder.mkdir(parents=True, exist_ok=True)
    photos = sorted({p for f in folders for p in find_photos(f)})
    valid = photos[::20]
    learning = sorted({*photos} - {*valid})
    dls = recipe_dls(
        learning,
        valid * VALID['crops'],
        wild_recipe(MODELS[name]),
        size=SIZE,
        bs=BATCH,
        valid_size=VALID['size'],
        per_photo=max(EPOCH // max(len(learning), 1), 1),
        n_workers=workers,
    )
    average = WeightAverage(DECAY)
    clock = Clock(folder, minutes, average)
    learn = psnr_learner(dls, new_model(name, folder), F.l1_loss, **MUON)
    with learn.no_bar(), learn.no_logging():
        learn.fit(10**6, cbs=[GradientClip(1.0), average, clock])
        average.keep()
        scores = [float(v) for v in learn.validate()]
    write_sheet(learn, folder / f'sheet-{clock.number}-end.png')
    write_row(folder, clock, *scores)
    done = {'minutes': minutes, 'steps': clock.steps, 'rate': RATES[min(clock.number, 2) - 1]}
    done |= {'L1': round(scores[0], 5)}
    rounds = [*read_rounds(folder), {**done, 'output dB': round(scores[2], 3)}]
    save_weights(learn.model, folder / f'{name}.safetensors', half=True)
    (folder / 'round.ckpt').unlink(missing_ok=True)
    with write_atomically(folder / 'rounds.json') as temporary:
        temporary.write_text(json.dumps(rounds, indent=1))
    publish(name, dls, rounds, photos, out, folder)


def publish(name, dls, rounds, photos, out, folder):
    "Publish the weights of the last round, unless those that are published are better."
    path = out / f'{name}.safetensors'
    if path.exists():
        with (learn := psnr_learner(dls, load_model(path), F.l1_loss)).no_bar():
            loss = float(learn.validate()[0])
        if loss <= rounds[-1]['L1']:
            print(f'{name}: not better than what is published (L1 {loss:.5f}), so not published')
            return
    model = load_model(folder / f'{name}.safetensors')
    tasks = ('x1', 'good', 'noise15', 'noise25', 'noise50') if model.scale == 1 else ()
    scores = wild_scores(name, lambda p, scale: model.predict(p), tasks or (f'x{model.scale}',))
    card = save_weights(
        model,
        path,
        half=True,
        task='wild',
        recipe=wild_recipe(model.scale).about,
        budget='full',
        training={
            'photos': f'data/photos, {len(photos)}, every twentieth of them to validate with',
            'loss': f'L1, Muon, crops of {SIZE}×{SIZE} in batches of {BATCH}, EMA',
            'rounds': rounds,
        },
        scores={
            k: {**v, 'protocol': 'blind protocol on BSDS500 val: make bench'}
            for k, v in scores.items()
        },
        machine=machine(),
        command=f'make round MODEL={name} MINUTES={rounds[-1]["minutes"]}',
        license='Apache-2.0',
    )
    print(f'{name}: published; {json.dumps(card["scores"])}')


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('model', choices=MODELS)
    parser.add_argument('--minutes', type=float, default=90, help='of the round (default 90)')
    parser.add_argument('--photos', nargs='*', default=[], help='folders of clean photos')
    parser.add_argument('--home', type=Path, default=ROOT / '_rounds', help='for checkpoints')
    parser.add_argument('--out', type=Path, default=WEIGHTS, help='by default the package')
    parser.add_argument('--workers', type=int, default=1, help='processes that make pairs')
    given = parser.parse_args(arguments)
    folders = given.photos or [str(SHARED / p) for p in PHOTOS if (SHARED / p).is_dir()]
    try:
        if not folders:
            raise EnhanceError("Name a folder of photos: make round PHOTOS='folder another'.")
        train(given.model, folders, given.minutes, given.home, given.out, given.workers)
    except EnhanceError as e:
        # fastai puts a line of its own before the words of a callback
        print(str(e).splitlines()[-1], file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('\nstopped; the same command goes on from the last checkpoint', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
