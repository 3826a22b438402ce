"""The JPEG restorer: its pairs, its networks, its losses, and what the published weights reach."""

import hashlib
import io
import math
import random
import warnings
from functools import cache, partial

import numpy as np
import pytest
import torch
from beside import SHARED, yardstick
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from torch import nn

from enhance_lib.applications.scoreboard import TASKS
from enhance_lib.jpeg_restorer import (
    WEB,
    ConvUnit,
    ImageRestorer,
    grid_of,
    jpeg_recipe,
    last_layer_group,
    log_mse,
    restorer_learner,
    root_mse,
    start_small,
    summed_mse,
)
from enhance_lib.toolbox.datasets import sample_photo
from enhance_lib.toolbox.errors import EnhanceError
from enhance_lib.toolbox.files import open_photo, save_photo
from enhance_lib.toolbox.models import WEIGHTS, PhotoModel, load_model, read_card
from enhance_lib.toolbox.operations import Between, OneOf
from enhance_lib.toolbox.pairs import recipe_dls
from enhance_lib.toolbox.training import AutocastCPU

with warnings.catch_warnings():
    warnings.simplefilter('ignore', FutureWarning)
    from fastai.optimizer import OptimWrapper

CLASSIC5 = SHARED / 'data' / 'bench' / 'Classic5'
has_bench = pytest.mark.skipif(
    not CLASSIC5.is_dir(), reason='the benchmark sets do not lie beside it'
)
NETWORKS = {
    'jpeg-q10': 'enhance_lib.jpeg_restorer.ImageRestorer',
    'jpeg-blind': 'enhance_lib.applications.jpeg_blind.BlindRestorer',
}
both = pytest.mark.parametrize('name', NETWORKS)

the_model = cache(load_model)  # for tests that leave it as it is


def seed(number):
    "Start all random numbers from here."
    random.seed(number), np.random.seed(number), torch.manual_seed(number)


def saved_as_jpeg(photo, quality, **options):
    "What Pillow makes of a photo."
    file = io.BytesIO()
    photo.save(file, 'JPEG', quality=quality, **options)
    return Image.open(file).convert(photo.mode)


def noise_photo(width, height, mode='RGB'):
    "A photo of random pixels, always the same."
    shape = (height, width, len(mode)) if len(mode) > 1 else (height, width)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(pixels, mode)


def place_photo(width, height):
    "Red and blue say in which column a pixel is, green in which row."
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x % 256, y, x // 256], -1).astype(np.uint8))


def levels(x):
    "A tensor (C, H, W) in [0, 1] as an array (H, W, C) of levels."
    return (x.permute(1, 2, 0) * 255).round().byte().numpy()


class Small(PhotoModel):
    "Stands in for the network where a small one will do; it starts by doing nothing."

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.PReLU())
        self.last = nn.Conv2d(8, 3, 3, padding=1)
        nn.init.zeros_(self.last.weight)

    def forward(self, x):
        return x + self.last(self.body(x))


def equal_weights(a, b, within=0.0):
    "Whether two models have the same numbers."
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    return all((a[k] - b[k]).abs().max() <= within for k in a)


# Pairs


def test_the_recipe_is_that_of_the_original_project():
    "Half are downscaled, half are rotated; all are cropped and saved as JPEG of quality 10."
    factors, turns, n = [], [], 1000
    for i in range(n):
        plan = jpeg_recipe(10).draw(i, size=128)
        assert plan['steps'] == [['jpeg', {'quality': 10, 'subsampling': '4:2:0'}]]
        *before, (crop, how) = plan['before']
        assert crop == 'crop' and how['size'] == 128
        operations = [op for op, _ in before]
        assert operations in ([], ['rescale'], ['rotate'], ['rescale', 'rotate'])
        factors += [values['factor'] for op, values in before if op == 'rescale']
        turns += [values['degrees'] for op, values in before if op == 'rotate']
    assert abs(len(factors) - n / 2) < 80 and abs(len(turns) - n / 2) < 80  # five sigma
    for found, choices in ((factors, (0.9, 0.8, 0.7, 0.6)), (turns, (90, 180, 270))):
        assert set(found) == set(choices)
        assert min(map(found.count, choices)) > len(found) / len(choices) / 2


def test_degraded_is_what_pillow_makes_of_clean():
    "Pixel for pixel: so nothing was rotated, cut or rounded after the JPEG."
    photos = [sample_photo(n).crop((0, 0, 250, 220)) for n in ('rocket', 'flower', 'brick')]
    dls = recipe_dls(
        photos, photos, jpeg_recipe(10), 128, bs=3, augment=False, per_photo=3, device='cpu'
    )
    for degraded, clean in [*dls.train, *dls.valid]:
        assert degraded.shape == clean.shape == (3, 3, 128, 128)
        assert degraded.dtype == torch.float32
        assert 0 <= min(degraded.min(), clean.min()) and max(degraded.max(), clean.max()) <= 1
        for b, g in zip(degraded, clean):
            expected = saved_as_jpeg(Image.fromarray(levels(g)), 10)
            assert np.array_equal(levels(b), np.asarray(expected))


@pytest.mark.parametrize(
    'quality',
    [0, 96, -1, 10.5, 'ten', None, Between(0, 50), Between(50, 96), OneOf(10, 200)]
    + [OneOf(Between(1, 5), 96), Between(5.0, 50.0)],
    ids=repr,
)
def test_an_impossible_quality_is_refused(quality):
    "When the recipe is made, not somewhere in a training."
    with pytest.raises(EnhanceError, match='1 to 95') as error:
        jpeg_recipe(quality)
    assert str(quality) in str(error.value)


@pytest.mark.parametrize('quality', [1, 95, Between(1, 95), OneOf(Between(1, 5), 95)], ids=repr)
def test_the_worst_and_the_best_quality_are_possible(quality):
    "The degraded photo is Pillow's, of the quality that was drawn."
    photo, recipe = noise_photo(40, 30), jpeg_recipe(quality, '4:4:4', before=())
    drawn = recipe.draw(3)['steps'][0][1]['quality']
    degraded, clean = recipe.pair(photo, 3)
    assert clean.tobytes() == photo.tobytes()
    assert degraded.tobytes() == saved_as_jpeg(photo, drawn, subsampling='4:4:4').tobytes()


def test_a_photo_smaller_than_the_crop_is_refused():
    "With both sizes."
    photo = noise_photo(100, 90)
    dls = recipe_dls([photo], [photo], jpeg_recipe(10, before=()), 128, device='cpu')
    with pytest.raises(EnhanceError, match='100×90.*128×128'):
        dls.one_batch()
    dls = recipe_dls([photo], [photo], jpeg_recipe(10), 128, device='cpu')
    with pytest.raises(EnhanceError, match='128×128'):
        dls.one_batch()


def test_web_photos_are_saved_once_or_twice_with_any_grid():
    """Twice in 0.6 × 0.97 of the cases, never in 0.4 × 0.03; shifted by 0 to 15.

    The last grid starts top left in most of them, as that of a file does: each side in
    2/3 + 1/48 of the cases.
    """
    plans = [WEB.draw(i) for i in range(2000)]
    times = [len(plan['steps']) for plan in plans]
    assert abs(times.count(2) - 1164) < 110 and abs(times.count(0) - 24) < 24  # five sigma
    drawn = [values for plan in plans for _, values in plan['steps']]
    assert {v['quality'] for v in drawn} == set(range(5, 96))
    assert {v['shift_x'] for v in drawn} == {v['shift_y'] for v in drawn} == set(range(16))
    assert {v['subsampling'] for v in drawn} == {'4:2:0', '4:4:4'}
    last = [plan['steps'][-1][1] for plan in plans if len(plan['steps']) == 2]
    aligned = sum(v['shift_x'] == 0 for v in last) / len(last)
    assert abs(aligned - (2 / 3 + 1 / 48)) < 0.1  # five sigma
    gray = sum(['color', {'factor': 0}] in plan['before'] for plan in plans)
    assert abs(gray - 300) < 80


# A grid of crops


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 300), st.integers(1, 90), st.integers(1, 70))
def test_the_grid_covers_every_pixel(width, height, size):
    "With as few crops as possible; of a photo that is smaller there are none."
    crops = grid_of([place_photo(width, height)], size)
    if min(width, height) < size:
        assert crops == []
        return
    assert len(crops) == math.ceil(width / size) * math.ceil(height / size)
    assert all(crop.size == (size, size) for crop in crops)
    seen = np.concatenate([np.asarray(crop).reshape(-1, 3) for crop in crops])
    assert len(np.unique(seen, axis=0)) == width * height


def test_a_grid_of_paths_is_that_of_the_photos(tmp_path):
    "In their order, and without the one that is too small."
    photos = [place_photo(*size) for size in ((70, 40), (31, 90), (32, 33))]
    files = [save_photo(p, tmp_path / f'{i}.png') for i, p in enumerate(photos)]
    ours, same = grid_of(photos, 32), grid_of(files, 32)
    assert len(ours) == 3 * 2 + 0 + 1 * 2
    assert [p.tobytes() for p in ours] == [p.tobytes() for p in same]
    assert ours[1].getpixel((0, 0)) == (32, 0, 0) and ours[2].getpixel((0, 0)) == (38, 0, 0)


def test_each_crop_of_a_grid_occurs_once_in_an_epoch():
    "The eight crops of one photo are told apart by their first pixel."
    crops = grid_of([place_photo(128, 64)], 32)
    dls = recipe_dls(crops, crops, jpeg_recipe(before=()), 32, bs=4, augment=False, device='cpu')
    for _ in range(2):
        seen = [tuple(levels(x)[0, 0, :2]) for _, clean in dls.train for x in clean]
        assert sorted(seen) == [(x, y) for x in (0, 32, 64, 96) for y in (0, 32)]


# The networks


def test_the_restorer_has_313066_parameters():
    "Weights, biases and one number for each PReLU, unit by unit."
    first = (3 * 9 * 128 + 128) + (128 * 128 + 128) + 1 + (128 * 9 * 128 + 128) + 1
    second = (128 * 9 * 64 + 64) + (64 * 64 + 64) + 1 + (64 * 9 * 64 + 64) + 1
    third = (64 * 9 * 32 + 32) + (32 * 32 + 32) + 1 + (32 * 9 * 32 + 32) + 1
    end = (32 * 16 + 16) + 1 + (16 * 25 * 3 + 3)
    count = sum(p.numel() for p in ImageRestorer().parameters())
    assert count == first + second + third + end == 167682 + 114882 + 28770 + 1732 == 313066


def test_the_layers_of_the_restorer_are_those_of_the_original_project():
    "In the order in which a photo goes through them."
    net, found = ImageRestorer(), []

    def look(layer, inputs, output):
        if isinstance(layer, nn.Conv2d):
            assert layer.stride == (1, 1) and layer.bias is not None
            found.append((layer.in_channels, layer.out_channels, *layer.kernel_size))
        else:
            found.append(type(layer))

    for layer in net.modules():
        if not list(layer.children()):
            layer.register_forward_hook(look)
    net(torch.rand(1, 3, 9, 9))
    expected = []
    for a, b in ((3, 128), (128, 64), (64, 32)):
        expected += [(a, b, 3, 3), (b, b, 1, 1), nn.PReLU, (b, b, 3, 3), nn.PReLU]
    assert found == [*expected, (32, 16, 1, 1), nn.PReLU, (16, 3, 5, 5)]


def reach(net, at):
    "The first and last row and column of the output that a pixel of the input changes."
    x = torch.rand(1, 3, 120, 120, dtype=torch.double)
    y = x.clone()
    y[..., at[0], at[1]] += 1
    with torch.inference_mode():
        changed = (net.double()(x) != net(y))[0].any(0)
    rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
    return tuple(int(v) for side in (rows, columns) for v in (side.min(), side.max()))


def test_the_restorer_sees_17_pixels():
    "Six kernels of 3×3 and one of 5×5 reach 6 + 2 pixels to each side, and so does its margin."
    assert reach(ImageRestorer(), (50, 60)) == (42, 58, 52, 68)
    assert ImageRestorer.margin == 8


@pytest.mark.parametrize('residual', [True, False])
def test_without_a_last_layer_the_input_or_nothing_is_left(residual):
    "Residual: what the network gives is added to its input."
    net, x = ImageRestorer(residual=residual), torch.rand(2, 3, 11, 14)
    nn.init.zeros_(net.last.weight), nn.init.zeros_(net.last.bias)
    assert torch.equal(net(x), x if residual else torch.zeros_like(x))


def test_the_residual_is_added():
    "The same weights with and without it differ by the input."
    plain, residual, x = ImageRestorer(False), ImageRestorer(True), torch.rand(1, 3, 9, 9)
    residual.load_state_dict(plain.state_dict())
    with torch.inference_mode():
        assert torch.allclose(residual(x), plain(x) + x) and float(plain(x).std()) > 0.01


def test_what_comes_out_is_as_large_as_what_went_in():
    "Also where it is smaller than what the network sees."
    net = ImageRestorer()
    for size in ((2, 2), (4, 30), (18, 16)):
        assert net(torch.rand(2, 3, *size)).shape == (2, 3, *size)


def test_start_small_draws_weights_and_leaves_the_rest():
    "All of one spread, 0.001, or whatever is asked for; biases and PReLUs are not touched."
    torch.manual_seed(0)
    net = ImageRestorer()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    for std in (1e-3, 0.02):
        assert start_small(net, **({} if std == 1e-3 else {'std': std})) is net
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d):  # at least 384 numbers: 0.2 is more than five sigma
                weight = layer.weight.detach()
                assert float(weight.std()) == pytest.approx(std, rel=0.2)
                assert abs(float(weight.mean())) < 0.3 * std
    weights = {f'{n}.weight' for n, m in net.named_modules() if isinstance(m, nn.Conv2d)}
    assert len(weights) == 11
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in weights)


# Losses


def test_summed_mse_by_hand():
    "Errors of 0.5, 1 and 2: 0.25 + 1 + 4, over the whole batch."
    x, y = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    x[0, 0, 0, 0], x[0, 2, 3, 1], x[1, 1, 1, 1] = 0.5, -1.0, 2.0
    assert float(summed_mse(x, y)) == 5.25


def test_root_mse_by_hand():
    "Two photos, off by 0.3 and 0.1: the mean of two roots, not the root of a mean."
    x = torch.full((2, 3, 8, 8), 0.5)
    y = x + torch.tensor([0.3, -0.1]).view(2, 1, 1, 1)
    assert float(root_mse(y, x)) == pytest.approx(0.2, rel=1e-3)


def test_root_mse_of_identical_photos_has_a_gradient():
    "The slope of a root at zero is infinite, and would spoil all weights."
    x = torch.full((2, 3, 8, 8), 0.5)
    y = x.clone().requires_grad_()
    loss = root_mse(y, x)
    loss.backward()
    assert float(loss) < 0.0011 and y.grad.abs().max() == 0


def test_log_mse_by_hand():
    "Off by 0.1 and by 0.01: 20 and 40 dB, so 30 dB on average, but for the floor."
    x = torch.full((2, 3, 8, 8), 0.5)
    y = x + torch.tensor([0.1, -0.01]).view(2, 1, 1, 1)
    assert -10 / math.log(10) * float(log_mse(y, x, floor=0)) == pytest.approx(30, abs=1e-3)
    floored = (math.log(0.01 + 1e-4) + math.log(1e-4 + 1e-4)) / 2
    assert float(log_mse(y, x)) == pytest.approx(floored, abs=1e-3)
    assert float(log_mse(x, x)) == pytest.approx(math.log(1e-4), abs=1e-3)


# Training


def small_dls(bs=4, n=8):
    "The same crops in the same order, each time."
    seed(0)
    photos = [sample_photo('rocket'), sample_photo('flower')]
    return recipe_dls(
        photos, photos, jpeg_recipe(10), 24, bs=bs, per_photo=n // 2, augment=False, device='cpu'
    )


def quietly(learn, *args):
    "`fit` without a bar or a table."
    with learn.no_bar(), learn.no_logging():
        learn.fit(*args)
    return learn


def test_the_last_layer_is_a_group_of_its_own():
    "Together both groups are all parameters, each of them once."
    net = ImageRestorer()
    body, last = ({id(p) for p in group} for group in last_layer_group(net))
    assert last == {id(net.last.weight), id(net.last.bias)}
    assert not body & last and body | last == {id(p) for p in net.parameters()}
    assert [len(g) for g in last_layer_group(net)] == [len(body), len(last)]


def test_two_rates_are_trained_with():
    "The first step of Adam moves a number by its rate at most, and many by just that."
    net = ImageRestorer()
    before = [[p.detach().clone() for p in group] for group in last_layer_group(net)]
    learn = quietly(restorer_learner(small_dls(n=4), net, half=False), 1, slice(1e-3, 1e-5))
    assert [h['lr'] for h in learn.opt.hypers] == pytest.approx([1e-3, 1e-5])
    for old, new, rate in zip(before, last_layer_group(net), (1e-3, 1e-5)):
        moved = max(float((a - b.detach()).abs().max()) for a, b in zip(old, new))
        assert moved == pytest.approx(rate, rel=0.01)


def test_an_epoch_of_the_learner_is_that_of_a_loop_by_hand():
    "In float32, with torch's Adam and the same crops; the last layer at half the rate."
    seed(1)
    by_hand, net = ImageRestorer(), ImageRestorer()
    net.load_state_dict(by_hand.state_dict())
    # Adam turns a rounding error of a gradient near zero into a whole step: both round alike
    by_hand.to(memory_format=torch.channels_last)
    body = [p for n, p in by_hand.named_parameters() if not n.startswith('last.')]
    groups = [{'params': body, 'lr': 1e-3}, {'params': by_hand.last.parameters(), 'lr': 5e-4}]
    optimizer = torch.optim.Adam(groups)
    steps = 0
    for degraded, clean in small_dls().train:
        loss = ((by_hand(degraded) - clean) ** 2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
    learn = restorer_learner(small_dls(), net, half=False)
    learn.opt_func = partial(OptimWrapper, opt=torch.optim.Adam)
    quietly(learn, 1, slice(1e-3, 5e-4))
    assert steps == 2 and equal_weights(by_hand, net, within=1e-6)
    assert not equal_weights(ImageRestorer(), net, within=1e-3)


def test_half_precision_can_be_left_out():
    "On a CPU it is a callback."
    for half in (True, False):
        learn = restorer_learner(small_dls(), Small(), half=half)
        assert any(isinstance(cb, AutocastCPU) for cb in learn.cbs) == half
        assert learn.loss_func is summed_mse and learn.wd == 0


@pytest.mark.parametrize('bs', [2, 3, 5])
def test_the_learner_shows_the_psnr_of_scikit_image(bs):
    "The mean over the photos, whether or not the last batch is as large as the others."
    photos = [sample_photo(n).crop((0, 0, 60, 60)) for n in ('coins', 'rocket', 'brick')]
    photos += [sample_photo('flower').crop((300, 200, 360, 260)), sample_photo('cat')]
    dls = recipe_dls(photos, photos, jpeg_recipe(before=()), 32, bs=bs, device='cpu')
    torch.manual_seed(0)
    net = Small()
    nn.init.normal_(net.last.weight, std=0.2)  # so that it leaves [0, 1] here and there
    learn = restorer_learner(dls, net, half=False)
    assert list(learn.metrics.attrgot('name')) == ['input', 'output']
    with learn.no_bar():
        _, before, after = learn.validate()
    found = []
    for degraded, clean in dls.valid:
        with torch.inference_mode():
            output = net(degraded)
        for b, o, g in zip(*(x.double().numpy() for x in (degraded, output.clamp(0, 1), clean))):
            found.append([peak_signal_noise_ratio(g, x, data_range=1) for x in (b, o)])
    assert len(found) == 5 and (output.min() < 0 or output.max() > 1)
    assert [before, after] == pytest.approx(np.mean(found, 0), abs=1e-3)


# What is published


@both
def test_the_card_says_what_there_is(name):
    "Class, arguments, task and checksum; and where the weights came from."
    path = WEIGHTS / f'{name}.safetensors'
    card, model = read_card(path.with_suffix('.json')), the_model(name)
    kind = type(model)
    assert card['architecture'] == f'{kind.__module__}.{kind.__qualname__}' == NETWORKS[name]
    rebuilt = kind(**card['arguments']).state_dict()
    assert {k: v.shape for k, v in rebuilt.items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    assert card['parameters'] == sum(p.numel() for p in model.parameters())
    assert card['task'] == 'jpeg10' and card['scale'] == 1
    assert card['sha256'] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [row['model'] for row in card['scoreboard']] == ['input', name]
    assert card['scoreboard'][1]['dB'] > card['scoreboard'][0]['dB']


@both
def test_the_card_says_where_the_weights_came_from(name):
    "Trained at the full budget, by `make weights`."
    card = read_card(WEIGHTS / f'{name}.json')
    assert {'recipe', 'training', 'scores', 'command', 'license', 'machine'} <= set(card)
    assert card['budget'] == 'full'
    assert (WEIGHTS / f'{name}.safetensors').stat().st_size <= 5_000_000


def test_the_task_is_jpeg_of_quality_10():
    "Of the photo as it is: on the scoreboard nothing is drawn."
    photo = noise_photo(50, 41)
    degraded, clean = TASKS['jpeg10'].pair(photo, 7)
    assert clean.tobytes() == photo.tobytes()
    assert degraded.tobytes() == saved_as_jpeg(photo, 10).tobytes()


@has_bench
def test_the_specialist_on_classic5():
    "By the yardstick, and the card says the same."

    def fix(gray):
        return np.asarray(the_model('jpeg-q10').predict(Image.fromarray(gray)))

    before, after, _ = yardstick().score_jpeg(fix, CLASSIC5, 10)
    assert after >= 29.35
    said = the_model('jpeg-q10').card['scores']['Classic5, quality 10']
    assert [said['input'], said['output']] == pytest.approx([before, after], abs=0.02)


# Any photo


@both
@pytest.mark.parametrize('size', [(1, 1), (33, 21), (7, 300)])
@pytest.mark.parametrize('mode', ['L', 'LA', 'RGB', 'RGBA'])
def test_photos_of_any_size_and_mode_come_out_as_they_went_in(mode, size, name):
    "Alpha exactly."
    photo = noise_photo(*size, mode)
    better = the_model(name).predict(photo)
    assert (better.mode, better.size) == (mode, size)
    if mode.endswith('A'):
        assert better.getchannel('A').tobytes() == photo.getchannel('A').tobytes()


@both
def test_gray_of_16_bits_is_taken_as_it_is_opened(name, tmp_path):
    "Divided by 257, as `open_photo` does."
    deep = Image.fromarray(np.linspace(0, 65535, 40 * 30).reshape(30, 40).astype(np.uint16))
    deep.save(tmp_path / 'a.png')
    better = the_model(name).predict(tmp_path / 'a.png')
    eight = np.rint(np.asarray(deep) / 257).astype(np.uint8)
    assert better.mode == 'L' and better.tobytes() == (
        the_model(name).predict(Image.fromarray(eight)).tobytes()
    )
    assert open_photo(tmp_path / 'a.png', None).tobytes() == eight.tobytes()


@both
def test_tiles_are_parts_of_the_whole(name):
    "Tiles of an odd size, in float32: at most a level off, by rounding."
    model = load_model(name)
    photo = saved_as_jpeg(sample_photo('coffee').crop((200, 100, 315, 193)), 10)
    model.tile = 10_000
    whole = np.asarray(model.predict(photo, fast=False), int)
    model.tile = 47
    tiled = np.asarray(model.predict(photo, fast=False), int)
    assert np.abs(tiled - whole).max() <= 1
    assert np.abs(whole - np.asarray(photo, int)).max() > 5  # it does something


@both
def test_half_precision_costs_next_to_nothing(name):
    "Within 0.02 dB of float32."
    clean = sample_photo('china').crop((200, 150, 328, 278))
    degraded = saved_as_jpeg(clean, 10)
    a, b = (
        peak_signal_noise_ratio(
            np.asarray(clean), np.asarray(the_model(name).predict(degraded, fast=fast))
        )
        for fast in (True, False)
    )
    assert a == pytest.approx(b, abs=0.02)


@both
def test_spoiled_weights_are_refused(name):
    "One of the numbers is NaN."
    model = load_model(name)
    with torch.no_grad():
        model.last.weight[0, 0, 0, 0] = math.nan
    with pytest.raises(EnhanceError, match='NaN'):
        model.predict(noise_photo(20, 20))


def test_a_unit_is_three_convolutions():
    "Small enough to follow: identities inside, so a positive photo comes out as it went in."
    unit = ConvUnit(1, 1)
    for layer in (unit[0], unit[1], unit[3]):
        nn.init.dirac_(layer.weight), nn.init.zeros_(layer.bias)
    x = torch.rand(1, 1, 5, 5)
    assert torch.equal(unit(x), x)
    assert torch.allclose(unit(-x), -x * 0.25**2)  # PReLU starts at a quarter, twice
