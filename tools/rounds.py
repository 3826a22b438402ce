"""Train a restorer in rounds: `make round MODEL=restore-x1 MINUTES=90`.

A round may be stopped at any time: the same command goes on with it. The next command begins the
next round. Its rate stays high, and falls to nothing in the last fifth (warm-up, stable, decay;
Hu et al. 2024); the round after it goes on from before the fall. In the folder of the model,
`_rounds/MODEL`, `log.csv` holds the validation curve, `sheet-….png` some of the validation photos
(degraded, restored, clean) every half hour. At the end, weights that are better on the validation
photos than the published ones take their place.
"""

import argparse
import csv
import json
import sys
import time
from pathlib import Path

import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.training import GradientClip
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

ROOT = Path(__file__).resolve().parent.parent
MODELS = {'restore-x1': 1, 'restore-x2': 2, 'restore-x4': 4}  # name -> scale
SIZE, BATCH = 128, 8  # side of a clean crop in pixels, pairs in a batch
RATE, WARM_UP, STABLE = (
    3e-3,
    200,
    0.8,
)  # the highest, steps up to it, share of a round before the fall
EPOCH = 8000  # crops between two validations, each with a checkpoint
SHEETS = 1800  # seconds between two sheets
VALID = {'size': 192, 'crops': 8}  # of each of the photos that validate: every twentieth


class Clock(Callback):
    "What a round does by the clock: its rate, validation, checkpoints and sheets, and its end."

    order = 70  # after the average

    def __init__(self, folder, minutes, average):
        self.folder, self.limit, self.average = folder, 60 * minutes, average
        self.number, self.seconds, self.steps = len(read_rounds(folder)) + 1, 0.0, 0

    def state_dict(self):
        return {'number': self.number, 'seconds': self.seconds, 'steps': self.steps}

    def load_state_dict(self, state):
        if state['number'] == self.number:  # else it is where the round before ended
            self.seconds, self.steps = state['seconds'], state['steps']

    def _parts(self):
        return {'model': self.model, 'optimizer': self.opt, 'average': self.average, 'clock': self}

    def save(self, name):
        "Keep all that the training needs to go on."
        save_checkpoint(self.folder / name, self.steps, **self._parts())

    def before_fit(self):
        there = [self.folder / name for name in ('round.ckpt', 'stable.ckpt')]
        path = next((path for path in there if path.exists()), None)
        if path:
            load_checkpoint(path, self.dls.device, **self._parts())
            done = f'{self.seconds / 60:.0f} of {self.limit / 60:.0f} minutes done'
            print(f'round {self.number} goes on from {path.name}, {done}', flush=True)
        if not self.seconds:
            set_seed(self.number)  # other crops than in the rounds before
        self.began = time.monotonic() - self.seconds
        self.fell = self.share() > STABLE

    def share(self):
        "How much of the round is over, 0 to 1."
        self.seconds = time.monotonic() - self.began
        return min(self.seconds / self.limit, 1.0)

    def before_batch(self):
        if self.training:
            share = self.share()
            if share > STABLE and not self.fell:
                self.fell = True
                self.save('next.ckpt')
            fall = min((1 - share) / (1 - STABLE), 1.0)
            self.opt.set_hyper('lr', RATE * min((self.steps + 1) / WARM_UP, 1.0) * fall)

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
        self.save('round.ckpt')


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
    return json.loads(path.read_text()) if path.exists() else []


def new_model(name):
    "An untrained restorer; one that enlarges begins with what `restore-x1` knows."
    model = Restorer(MODELS[name])
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
    average = WeightAverage()
    clock = Clock(folder, minutes, average)
    learn = psnr_learner(dls, new_model(name), F.l1_loss, **MUON)
    with learn.no_bar(), learn.no_logging():
        learn.fit(10**6, RATE, cbs=[GradientClip(1.0), average, clock])
        average.keep()
        scores = [float(v) for v in learn.validate()]
    write_sheet(learn, folder / f'sheet-{clock.number}-end.png')
    write_row(folder, clock, *scores)
    done = {'minutes': minutes, 'steps': clock.steps, 'L1': round(scores[0], 5)}
    rounds = [*read_rounds(folder), {**done, 'output dB': round(scores[2], 3)}]
    save_weights(learn.model, folder / f'{name}.safetensors', half=True)
    with write_atomically(folder / 'rounds.json') as temporary:
        temporary.write_text(json.dumps(rounds, indent=1))
    (folder / 'next.ckpt').replace(folder / 'stable.ckpt')
    (folder / 'round.ckpt').unlink(missing_ok=True)
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
            'loss': f'L1, Muon, rate {RATE}, crops of {SIZE}×{SIZE} in batches of {BATCH}, EMA',
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
