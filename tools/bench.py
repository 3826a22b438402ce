"""Measure speed and quality side by side, and say so in a table: `make bench`.

The table goes to standard output and to `_bench/bench.md`.
"""

import json
import multiprocessing
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

from enhance_lib.applications.batch import crappify_folder
from enhance_lib.crappify import RECIPES
from enhance_lib.toolbox.datasets import data_folder, sample_photos
from enhance_lib.toolbox.files import find_photos, open_photo, save_photo

ROOT = Path(__file__).resolve().parent.parent


def make_crops(
    folder: Path,
    n: int,
    seed: int = 0,
):
    "Write `n` crops of the sample photos, with sides of 256 to 512 pixels, as PNG."
    rng, photos = np.random.default_rng(seed), list(sample_photos().values())
    for i in range(n):
        photo = photos[i % len(photos)]
        w, h = (int(rng.integers(256, min(512, side) + 1)) for side in photo.size)
        left, top = int(rng.integers(photo.width - w + 1)), int(rng.integers(photo.height - h + 1))
        crop = photo.crop((left, top, left + w, top + h))
        crop.save(folder / f'{i:04}.png', compress_level=1)


def plain_loop(paths: list[Path], out: Path):
    "What one would write without the library's folders."
    for path in paths:
        save_photo(RECIPES['gan'](open_photo(path), 0, path.name), out / path.name)


def two_plain_loops(paths: list[Path], out: Path):
    "Half of the photos in each of two processes that know nothing of each other."
    fork = multiprocessing.get_context('fork')
    halves = [fork.Process(target=plain_loop, args=(paths[i::2], out)) for i in range(2)]
    for process in halves:
        process.start()
    for process in halves:
        process.join()
        if process.exitcode:
            raise RuntimeError('a plain loop failed')


def speed_of_crappify(n: int = 200, repeats: int = 3):
    "A plain loop in one process against `crappify_folder` on two, taking turns."
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / 'photos'
        photos.mkdir()
        make_crops(photos, n)
        paths = find_photos(photos)
        ways = {
            'loop': lambda out: plain_loop(paths, out),
            'two': lambda out: two_plain_loops(paths, out),
            'folder': lambda out: crappify_folder(
                photos, out, 'gan', 0, n_workers=2, progress=False
            ),
        }
        seconds = {way: [] for way in ways}
        for i in range(repeats):
            for way, do in ways.items():
                start = time.perf_counter()
                do(Path(folder) / f'{way}{i}')
                seconds[way].append(time.perf_counter() - start)
    # the fastest of each: what else the machine does can only slow them down
    loop, two, both = (n / min(seconds[way]) for way in ways)
    what = f'crappify, recipe gan, {n} crops of 256 to 512 pixels, PNG'
    yield f'{what}: plain loop', f'{loop:.1f} photos/s', ''
    yield f'{what}: `crappify_folder`, 2 workers', f'{both:.1f} photos/s', ''
    yield f'ratio of the two (best of {repeats} runs each)', f'{both / loop:.2f}×', '1.6× or more'
    # Where this is far below 2, the machine was busy and the ratio above says little.
    what = 'the same ratio for two plain loops side by side: what the machine gave'
    yield what, f'{two / loop:.2f}×', ''


def peak_memory() -> dict[str, float]:
    "The peak resident memory of this process and of the largest of its ended workers, in MB."
    unit = 1e6 if sys.platform == 'darwin' else 1e3  # bytes there, kB elsewhere
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    status = Path('/proc/self/status')
    if status.exists():  # Linux lets a process inherit `ru_maxrss` of the one that started it
        lines = status.read_text().splitlines()
        own = next(int(line.split()[1]) for line in lines if line.startswith('VmHWM')) / 1e3
    workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / unit
    return {'parent': own, 'worker': workers}


def memory_of_crappify(numbers: tuple = (200, 800)):
    "Peak memory of `crappify_folder`, each time in a process of its own."
    for n in numbers:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / 'photos').mkdir()
            make_crops(Path(folder) / 'photos', n)
            command = [sys.executable, __file__, '--memory', folder]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        peak = json.loads(done.stdout)
        measured = f'{peak["parent"]:.0f} MB, {peak["worker"]:.0f} MB'
        what = f'peak memory of `crappify_folder`, {n} crops, 2 workers: parent, largest worker'
        yield what, measured, 'the same for any number'


def damage_of_gan():
    "How bad the recipe gan makes photos."
    places = [ROOT.parent / 'shared' / 'data' / 'bsds500' / 'val']
    places.append(data_folder() / 'bsds500' / 'BSR' / 'BSDS500' / 'data' / 'images' / 'val')
    what, target = 'damage by recipe gan, 256×256 crops of BSDS500 val, seed 0', '20 to 22 dB'
    folder = next((p for p in places if p.is_dir()), None)
    if folder is None:
        yield f'{what}: mean PSNR, SSIM', 'no data', target
        return
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    psnr, ssim = [], []
    for path in find_photos(folder):
        degraded, clean = map(np.asarray, RECIPES['gan'].pair(open_photo(path), 0, path.name, 256))
        psnr.append(peak_signal_noise_ratio(clean, degraded, data_range=255))
        ssim.append(structural_similarity(clean, degraded, channel_axis=2, data_range=255))
    measured = f'{np.mean(psnr):.2f} dB, {np.mean(ssim):.3f}'
    yield f'{what}, {len(psnr)} photos: mean PSNR, SSIM', measured, target


def fastest(ways: dict[str, Callable], repeats: int = 5) -> dict[str, float]:
    "Seconds of the fastest run of each way, the ways taking turns after one run to warm up."
    for do in ways.values():
        do()
    seconds = {way: [] for way in ways}
    for _ in range(repeats):
        for way, do in ways.items():
            start = time.perf_counter()
            do()
            seconds[way].append(time.perf_counter() - start)
    return {way: min(found) for way, found in seconds.items()}


def one_megapixel() -> Image.Image:
    "A picture of 1000×1000 pixels from 16 crops of the held-out photos."
    rng, photos = np.random.default_rng(0), list(sample_photos('held-out').values())
    whole = Image.new('RGB', (1000, 1000))
    for i in range(16):
        photo = photos[i % 3]
        left, top = int(rng.integers(photo.width - 249)), int(rng.integers(photo.height - 249))
        crop = photo.crop((left, top, left + 250, top + 250))
        whole.paste(crop, (250 * (i % 4), 250 * (i // 4)))
    return whole


def speed_of_predict():
    "`predict` against the same weights run plainly, on a photo whose result has 1 megapixel."
    import torch

    from enhance_lib.applications.scoreboard import TASKS
    from enhance_lib.measure import luma_psnr
    from enhance_lib.toolbox.device import half_dtype
    from enhance_lib.toolbox.models import load_model
    from enhance_lib.toolbox.tensors import to_photo, to_tensor

    clean = one_megapixel()
    fast = '4× or more' if half_dtype(torch.device('cpu')) else '2× or more'
    for name, task, repeats, ratio_wanted, loss_allowed in (
        ('srcnn-jpeg20', 'gray-jpeg20', 5, '2× or more', '0.02 dB at most'),
        ('srcnn-x2', 'x2', 5, '2× or more', '0.02 dB at most'),
        ('jpeg-q10', 'jpeg10', 2, fast, '0.05 dB at most'),
        ('jpeg-blind', 'jpeg10', 3, fast, '0.05 dB at most'),
        ('realtime-x4', 'x4', 3, '', '0.05 dB at most'),
    ):
        plain, model = load_model(name).train(), load_model(name)  # plain: no layers merged
        degraded, truth = TASKS[task].pair(clean)
        plain.piece = max(degraded.size)  # what is restored at a time, where that is done in pieces

        @torch.inference_mode()
        def plainly(plain=plain, degraded=degraded):
            return to_photo(plain.enhance_tile(to_tensor(degraded)))

        ways = {
            'plain': plainly,
            'predict': lambda model=model, degraded=degraded: model.predict(degraded),
        }
        best = fastest(ways, repeats)
        quality = {way: luma_psnr(do(), truth) for way, do in ways.items()}
        what = f'{name}, 1 megapixel of output, CPU'
        yield f'{what}: float32, contiguous, whole photo', f'{1 / best["plain"]:.2f} MP/s', ''
        yield f'{what}: `predict`', f'{1 / best["predict"]:.2f} MP/s', ''
        ratio, off = best['plain'] / best['predict'], quality['predict'] - quality['plain']
        yield f'ratio of the two (best of {repeats} runs each)', f'{ratio:.2f}×', ratio_wanted
        yield 'what `predict` loses in quality (luma)', f'{-off:.4f} dB', loss_allowed


def opencv_espcn() -> tuple[Callable | None, str]:
    "ESPCN as OpenCV runs it, from array to array; and, if it cannot be had, why."
    weights = Path(os.environ.get('ENHANCE_ESPCN', ''))
    if not weights.is_file():
        return None, 'no weights: name a file ESPCN_x4.pb in ENHANCE_ESPCN'
    try:
        from cv2 import dnn_superres
    except ImportError:
        return None, 'OpenCV is missing: pip install opencv-contrib-python'
    network = dnn_superres.DnnSuperResImpl_create()
    network.readModel(str(weights))
    network.setModel('espcn', 4)
    return network.upsample, ''


def speed_of_enlarging():
    "Output of the real-time networks beside bicubic and, where its weights are, ESPCN."
    import torch

    from enhance_lib.applications.scoreboard import TASKS
    from enhance_lib.realtime import output_speed
    from enhance_lib.toolbox.models import load_model
    from enhance_lib.toolbox.operations import identity_baseline

    clean = one_megapixel()
    small, _ = TASKS['x4'].pair(clean)
    model = load_model('realtime-x4')
    ways = {
        'bicubic (Pillow)': lambda: identity_baseline(small, clean.size),
        'realtime-x4, `predict`': lambda: model.predict(small),
    }
    espcn, why = opencv_espcn()
    if espcn:
        ways['ESPCN (OpenCV)'] = lambda: espcn(np.asarray(small))
    for way, seconds in fastest(ways, 15).items():
        target = '3 MP/s or more' if 'realtime' in way else ''
        yield f'×4, 1 megapixel of output, CPU: {way}', f'{1 / seconds:.1f} MP/s', target
    if not espcn:
        yield '×4, 1 megapixel of output, CPU: ESPCN (OpenCV)', why, ''
    for name in ('realtime-x4', 'realtime-x2'):
        what = f'{name}, 1920×1080 of output in half precision'
        if not torch.cuda.is_available():
            yield f'{what}, GPU', 'no GPU here', 'more than 60 frames/s'
            continue
        speed = output_speed(load_model(name), device='cuda', repeats=50)
        target = 'more than 60 frames/s' if name == 'realtime-x4' else ''
        yield f'{what}, {torch.cuda.get_device_name()}', f'{speed["frames/s"]:.0f} frames/s', target


def memory_of_large_photos():
    "Peak memory of a photo of 24 megapixels, each time in a process of its own."
    for name, way in (
        ('jpeg-q10', 'predict'),
        ('jpeg-blind', 'predict'),
        ('jpeg-blind', 'enhance'),
    ):
        command = [sys.executable, __file__, '--memory-of', name, way]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        grown = json.loads(done.stdout)
        what = (
            f'{name}, `{way}`, 24 megapixels, CPU: peak memory above that of the loaded libraries'
        )
        yield what, f'{grown:.0f} MB', '1500 MB at most'


def grown_by(name: str, way: str) -> float:
    "MB that this process has grown by, at its peak, to enhance a photo of 24 megapixels."
    from enhance_lib.enhance import enhance
    from enhance_lib.toolbox.models import load_model

    model = load_model(name)
    ways = {
        'predict': model.predict,
        'enhance': lambda photo: enhance(photo, model, 1, device='cpu', progress=False),
    }
    ways[way](Image.new('RGB', (64, 64)))  # loads what is loaded late
    before = peak_memory()['parent']
    ways[way](one_megapixel().resize((6000, 4000)))
    return peak_memory()['parent'] - before


def speed_of_enhance():
    "`enhance` against the time that the model itself takes, on a photo of 1 megapixel."
    from enhance_lib.enhance import enhance
    from enhance_lib.toolbox.models import load_model

    photo = one_megapixel()
    for name in ('jpeg-q10', 'jpeg-blind', 'srcnn-jpeg20'):
        model = load_model(name)
        ways = {
            'predict': lambda model=model: model.predict(photo),
            'enhance': lambda name=name: enhance(photo, name, 1, device='cpu', progress=False),
        }
        best = fastest(ways, 5)
        what = f'{name}, 1 megapixel, CPU: `enhance(model=…)` takes, of what `predict` does'
        yield f'{what} (best of 5)', f'{best["enhance"] / best["predict"]:.2f}×', '1.3× at most'


def start_of_command(repeats: int = 3):
    "What the command costs before the first photo is there."

    def cost(*arguments):
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run([command, *arguments], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return used, time.perf_counter() - start

    command = Path(sys.executable).parent / 'enhance'
    cpu = min(cost('--help')[0] for _ in range(repeats))
    yield f'`enhance --help`, CPU time (best of {repeats})', f'{cpu:.2f} s', '0.6 s at most'
    with tempfile.TemporaryDirectory() as folder:
        photo = Path(folder) / 'photo.jpg'
        save_photo(one_megapixel().crop((0, 0, 500, 500)), photo, quality=60)
        seconds = min(cost(photo, '--scale', '2', '--overwrite')[1] for _ in range(repeats))
    what = f'`enhance photo.jpg --scale 2`, 0.25 megapixels, from a cold start (best of {repeats})'
    yield what, f'{seconds:.1f} s', '10 s at most'


def start_of_app():
    "Seconds from opening the app's page to its upload button, in a browser."
    what, target = '`make app`: from opening the page to the upload button', '5 s at most'
    chromium = shutil.which('chromium')
    if not chromium:
        yield what, 'no Chromium here', target
        return
    from playwright.sync_api import sync_playwright

    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    command = [sys.executable, ROOT / 'tools' / 'app.py', '--port', str(port), '--no-browser']
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds = []
    try:
        with sync_playwright() as playwright:
            options = {'executable_path': chromium, 'args': ['--no-sandbox', '--disable-gpu']}
            browser = playwright.chromium.launch(**options)
            end = time.monotonic() + 120
            while len(seconds) < 3:
                if server.poll() is not None or time.monotonic() > end:
                    yield what, 'the app did not start', target
                    return
                time.sleep(5)  # the visitor before still imports torch
                page, start = browser.new_page(), time.perf_counter()
                try:
                    page.goto(f'http://127.0.0.1:{port}')
                except Exception:  # it does not listen yet
                    page.close()
                    continue
                page.get_by_text('Choose a photo').wait_for()
                seconds.append(time.perf_counter() - start)
                page.close()
            browser.close()
    finally:
        server.terminate()
        server.wait()
    times = ', '.join(f'{s:.1f}' for s in seconds)
    yield f'{what} (three times)', f'{times} s', target


def gain_of_choosing():
    "What `enhance` chooses against doing always the same, on photos that recipe wild made bad."
    from enhance_lib.enhance import Plan, follow, jpeg_quality, plan_for
    from enhance_lib.measure import psnr
    from enhance_lib.toolbox.files import as_photo

    folder = ROOT.parent / 'shared' / 'data' / 'bsds500' / 'val'
    what = 'choosing, 256×256 crops of BSDS500 val, recipe wild, seed 0, then JPEG 90, RGB PSNR'
    if not folder.is_dir():
        yield what, 'no data', ''
        return
    ways = {
        'leave it': Plan(None, None, 1, 1, ''),
        'always jpeg-blind': Plan('jpeg-blind', None, 1, 1, ''),
        'always restore-x1': Plan('restore-x1', None, 1, 1, ''),
    }
    found = {way: [] for way in (*ways, 'choose')}
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / 'sent.jpg'
        for path in find_photos(folder):
            sent, clean = RECIPES['wild'].pair(open_photo(path), 0, path.name, 256)
            sent.save(file, quality=90)
            degraded = open_photo(file)
            chosen = plan_for(degraded, jpeg_quality(file), scale=1)
            for way, plan in {**ways, 'choose': chosen}.items():
                found[way].append(psnr(as_photo(follow(plan, np.asarray(degraded))), clean))
    means = {way: float(np.mean(values)) for way, values in found.items()}
    for way, mean in means.items():
        target = 'more than each of the others' if way == 'choose' else ''
        yield f'{what}: {way}', f'{mean:.2f} dB', target


def quality_in_the_wild():
    "The blind protocol: nothing done, `enhance` as it is, but for the size, and the restorers."
    from wild import TASKS, nothing, tasks_of, wild_scores

    from enhance_lib.enhance import enhance
    from enhance_lib.toolbox.models import load_model, published

    targets = {'x1': '29.0 dB, LPIPS 0.201', 'good': 'lowest 37.1 dB, LPIPS 0.0086'}
    targets |= {'noise15': 'RGB 32.3 dB', 'noise25': 'RGB 29.9 dB', 'noise50': 'RGB 26.8 dB'}
    ways = {'input': (nothing, TASKS)}
    ways['enhance'] = (lambda path, scale: enhance(path, scale=scale).photo), TASKS
    for name in published():
        if name.startswith('restore-'):
            model = load_model(name)
            ways[name] = (lambda path, scale, model=model: model.predict(path)), tasks_of(model)
    for name, (way, tasks) in ways.items():
        scores = wild_scores(name, way, tasks)
        for task, score in scores.items():
            measures = [m for m in ('luma', 'lowest luma', 'RGB', 'SSIM', 'LPIPS') if m in score]
            what = f'blind protocol, {task}, {score["photos"]} photos of BSDS500 val: {name}'
            target = '' if name == 'input' else targets.get(task, '')
            yield what, ', '.join(f'{m} {score[m]:g}' for m in measures), target
        if not scores:
            yield f'blind protocol: {name}', 'no data', ''


def speed_of_training():
    "Steps of SRCNN in float32 against half precision with channels_last, on a batch in memory."
    import torch

    from enhance_lib.srcnn import SRCNN
    from enhance_lib.toolbox.device import autocast, half_dtype

    x = torch.rand(16, 1, 64, 64)
    ways = {}
    for half in (False, True):
        layout = torch.channels_last if half else torch.contiguous_format
        model = SRCNN(residual=True).to(memory_format=layout)

        def steps(model=model, half=half):
            for _ in range(10):
                with autocast(torch.device('cpu'), half):
                    loss = model(x, pad=0).float().square().mean()
                loss.backward()

        ways[half] = steps
    best = fastest(ways, 3)
    kind = half_dtype(torch.device('cpu')) or 'float32: this CPU has no fast half precision'
    what = 'training SRCNN, 16 crops of 64×64'
    yield f'{what}: float32', f'{10 / best[False]:.1f} steps/s', ''
    yield f'{what}: {kind}'.replace('torch.', ''), f'{10 / best[True]:.1f} steps/s', ''
    yield 'ratio of the two (best of 3 runs each)', f'{best[False] / best[True]:.2f}×', ''


def speed_of_unet_training(n: int = 4):
    "Steps of the U-Net with pairs made on the fly against the same on a batch in memory."
    import torch
    from torch.nn import functional as F

    from enhance_lib.toolbox.device import autocast
    from enhance_lib.toolbox.pairs import recipe_dls
    from enhance_lib.unet import get_unet

    photos = [p for p in sample_photos('train').values() if min(p.size) >= 128] * 2 * n
    photos = photos[: 16 * n]
    dls = recipe_dls(
        photos, photos[:1], RECIPES['gan'], size=128, bs=16, augment=False, device='cpu'
    )
    kind = {'pretrained': False, 'blur': False, 'self_attention': False}
    model = get_unet(dls, 'test_resnet', **kind).model.train()
    optimizer = torch.optim.Adam(model.parameters())
    in_memory = [dls.one_batch()] * n

    def train(batches):
        for x, y in batches:
            with autocast(x.device):
                prediction = model(x)
            F.mse_loss(prediction.float(), y).backward()
            optimizer.step()
            optimizer.zero_grad()

    ways = {'memory': lambda: train(in_memory), 'pipeline': lambda: train(dls.train)}
    best = fastest(ways, 3)
    what = 'training the U-Net on test_resnet, 16 crops of 128×128, recipe gan, CPU'
    yield f'{what}: a batch in memory', f'{n / best["memory"]:.2f} steps/s', ''
    yield f'{what}: through `recipe_dls`', f'{n / best["pipeline"]:.2f} steps/s', ''
    ratio = best['pipeline'] / best['memory']
    what = 'a step through the pipeline takes (best of 3 runs each)'
    yield what, f'{ratio:.3f}×', '1.15× at most'


def quality_of_published():
    "The published models on the usual sets, where these lie beside the project."
    from weights import scores_of

    from enhance_lib.toolbox.models import load_model, published

    targets = {
        ('srcnn-x2', 'Set5'): '36.1 dB',
        ('srcnn-x3', 'Set5'): '32.1 dB',
        ('srcnn-x4', 'Set5'): '29.9 dB',
        ('srcnn-jpeg20', 'BSDS500 val'): '+0.5 dB',
        ('jpeg-q10', 'BSDS500 val, quality 10'): '27.0 dB',
        ('jpeg-q10', 'Classic5, quality 10'): '29.35 dB',
        ('jpeg-blind', 'BSDS500 val, quality 10'): "0.15 dB below jpeg-q10's at most",
        ('jpeg-blind', 'BSDS500 val, quality 40'): '+0.6 dB',
        ('jpeg-blind', 'BSDS500 val, quality 10, then 50 shifted by 4'): '+1 dB',
        ('unet-mse', 'BSDS500 val'): '+1.2 dB, SSIM +0.02',
        ('unet-feature', 'BSDS500 val'): 'no dB lost, feature distance 25% less',
        ('unet-gan', 'BSDS500 val'): "+0.7 dB, feature distance 25% under unet-mse's and not "
        "above unet-feature's, top octave 0.85 to 1.15",
        ('realtime-x4', 'Set5'): '31.2 dB',
        ('realtime-x2', 'Set5'): '37.0 dB',
        ('realtime-x4', 'BSDS500 val'): '26.9 dB',
        ('realtime-x4-any', 'Set5, any way'): "0.5 dB above realtime-x4's",
        ('realtime-x4-gan', 'Set5'): "feature distance at most half of bicubic's",
    }
    for name in published():
        if name.startswith('restore-'):  # see `quality_in_the_wild`
            continue
        scores = scores_of(load_model(name))
        for where, score in scores.items():
            measured = f'{score["input"]:.2f} → {score["output"]:.2f} dB'
            if 'least gain of a photo' in score:
                least = score['least gain of a photo']
                measured += f', {least:+.2f} dB for the photo that gains least'
            for other in ('SSIM', 'feature distance', 'top octave'):
                if other in score:
                    measured += f', {other} {score[other][0]:.3f} → {score[other][1]:.3f}'
            target = targets.get((name, where), '')
            yield f'{name} on {where}: {score["protocol"]}', measured, target
        if not scores:
            yield f'{name} on the usual sets', 'no data', ''


# Each yields rows: what, measured, target.
MEASUREMENTS: list[Callable] = [
    speed_of_crappify,
    memory_of_crappify,
    damage_of_gan,
    speed_of_predict,
    speed_of_enlarging,
    memory_of_large_photos,
    speed_of_enhance,
    start_of_command,
    start_of_app,
    gain_of_choosing,
    quality_in_the_wild,
    speed_of_training,
    speed_of_unet_training,
    quality_of_published,
]


def processor() -> str:
    "The model of the CPU."
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return models[0] if models else platform.processor() or platform.machine()


def head() -> str:
    "How, on what and with what it was measured."
    load = f', load {os.getloadavg()[0]:.1f} before the start' if hasattr(os, 'getloadavg') else ''
    libraries = ', '.join(f'{name} {version(name)}' for name in ('torch', 'numpy', 'pillow'))
    return '\n'.join(
        [
            '# Benchmark',
            '',
            '- protocol: the rows compared are measured in turns on the same photos, nothing else '
            'should run; memory is resident memory',
            f'- machine: {os.cpu_count()} cores, {processor()}{load}',
            f'- versions: Python {platform.python_version()}, {libraries}',
            '- command: `make bench`',
            '',
            '| what | measured | target |',
            '|---|---|---|',
        ]
    )


def main():
    "Print the table row by row and write it at the end."
    table = [head()]
    print(table[0], flush=True)
    for measure in MEASUREMENTS:
        for row in measure():
            table.append(f'| {" | ".join(row)} |')
            print(table[-1], flush=True)
    out = ROOT / '_bench' / 'bench.md'
    out.parent.mkdir(exist_ok=True)
    out.write_text('\n'.join(table) + '\n', encoding='utf-8')


if __name__ == '__main__':
    if sys.argv[1:2] == ['--memory']:
        base = Path(sys.argv[2])
        crappify_folder(base / 'photos', base / 'degraded', 'gan', 0, n_workers=2, progress=False)
        json.dump(peak_memory(), sys.stdout)
    elif sys.argv[1:2] == ['--memory-of']:
        json.dump(grown_by(*sys.argv[2:4]), sys.stdout)
    else:
        main()
