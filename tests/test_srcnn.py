"""SRCNN: the network of the paper, the loop, and weights that keep what their cards say."""

import math
import warnings

import numpy as np
import pytest
import torch
from beside import SHARED, yardstick
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.nn import functional as F

from enhance_lib import srcnn
from enhance_lib.applications.batch import SheetPairs, write_sheets
from enhance_lib.applications.scoreboard import TASKS
from enhance_lib.measure import rgb_to_ycbcr
from enhance_lib.srcnn import SRCNN, enlarge, fit, luma_pair, validate
from enhance_lib.toolbox.datasets import sample_photo
from enhance_lib.toolbox.errors import EnhanceError
from enhance_lib.toolbox.files import find_photos, save_photo
from enhance_lib.toolbox.models import WEIGHTS, load_model, published, read_card
from enhance_lib.toolbox.pairs import pair_loaders, recipe_dls
from enhance_lib.toolbox.tensors import to_photo, to_tensor

TASK_OF = {  # published model -> task of the scoreboard, scale
    'srcnn-x2': ('x2', 2),
    'srcnn-x3': ('x3', 3),
    'srcnn-x4': ('x4', 4),
    'srcnn-jpeg20': ('gray-jpeg20', 1),
}
has_bench = pytest.mark.skipif(
    not (SHARED / 'data' / 'bench').is_dir(), reason='the benchmark sets do not lie beside it'
)


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "A folder of three photos, which at half their size are still larger than the crop."
    folder = tmp_path_factory.mktemp('photos')
    for name in ('rocket', 'coins', 'flower'):
        save_photo(sample_photo(name).crop((0, 0, 300, 300)), folder / f'{name}.png')
    return folder


def in_plain_torch(net):
    "The network of S3 as one would write it with torch's own layers."

    def layer(ours, k):
        conv = nn.Conv2d(
            ours.in_channels, ours.out_channels, k, padding=2, padding_mode='replicate'
        )
        conv.load_state_dict(ours.state_dict())
        return conv

    return nn.Sequential(
        layer(net.conv1, 9), nn.ReLU(), layer(net.conv2, 1), nn.ReLU(), layer(net.conv3, 5)
    )


# The network


@settings(deadline=None, max_examples=15)
@given(st.integers(5, 30), st.integers(5, 30), st.booleans())
def test_the_network_is_that_of_the_paper(height, width, residual):
    torch.manual_seed(0)
    net, x = SRCNN(residual=residual), torch.rand(2, 1, height, width)
    expected = in_plain_torch(net)(x) + (x if residual else 0)
    assert torch.allclose(net(x), expected, atol=1e-5)


def test_it_has_8129_parameters():
    assert sum(p.numel() for p in SRCNN().parameters()) == 5248 + 2080 + 801 == 8129


@pytest.mark.parametrize('scale', [2, 3, 4])
@settings(deadline=None, max_examples=10)
@given(st.data())
def test_enlarge_is_bicubic_of_pillow(scale, data):
    w, h, seed = (data.draw(st.integers(*r)) for r in ((2, 20), (2, 20), (0, 99)))
    # from 64 to 191, so that nothing is cut off at 0 or 255, which Pillow does
    pixels = np.random.default_rng(seed).integers(64, 192, (h, w)).astype(np.float32)
    pillow = Image.fromarray(pixels).resize((w * scale, h * scale), Image.Resampling.BICUBIC)
    ours = enlarge(torch.from_numpy(pixels)[None, None] / 255, scale)[0, 0] * 255
    assert np.abs(ours.numpy() - np.asarray(pillow)).max() < 0.01


def test_colors_are_carried_by_bicubic():
    torch.manual_seed(0)
    net, x = SRCNN(scale=3), to_tensor(sample_photo('coffee').crop((200, 100, 240, 130)))
    with torch.inference_mode():
        y, cb, cr = rgb_to_ycbcr(net.enhance_tile(x))[0]
        large = enlarge(rgb_to_ycbcr(x), 3)
        assert torch.allclose(torch.stack([cb, cr]), large[0, 1:], atol=1e-4)
        wider = F.pad(large[:, :1], (6, 6, 6, 6), mode='replicate')
        assert torch.allclose(y, net(wider, pad=0)[0, 0], atol=1e-4)
        inside = (slice(6, -6), slice(6, -6))  # where no padding is seen, it is the plain network
        assert torch.allclose(y[inside], net(large[:, :1])[0, 0][inside], atol=1e-4)


def test_an_untrained_residual_of_zero_is_bicubic():
    net = SRCNN(scale=2, residual=True)
    nn.init.zeros_(net.conv3.weight), nn.init.zeros_(net.conv3.bias)
    small = sample_photo('cat').crop((100, 40, 260, 140))
    large = np.asarray(small.resize((320, 200), Image.Resampling.BICUBIC), int)
    assert np.abs(np.asarray(net.predict(small), int) - large).max() <= 3  # rounded twice in Pillow


# Pairs


def test_a_sheet_wants_two_of_one_size(tmp_path):
    "Or else `degraded` would be cut at other places than `clean`, without a word."
    with pytest.raises(EnhanceError, match='cat.* 225×150 .* 450×300'):
        write_sheets({'cat': sample_photo('cat')}, tmp_path, TASKS['x2'])
    assert not list(tmp_path.iterdir())


def test_sheets_hold_clean_left_and_degraded_right(tmp_path):
    cat = sample_photo('cat')
    assert write_sheets({'cat': cat}, tmp_path) == 64  # 1024×1024 in tiles of 128×128
    pairs = SheetPairs(tmp_path)
    assert len(pairs) == 64
    clean = np.asarray(cat.resize((1024, 1024), Image.Resampling.BICUBIC).convert('L'))
    by_name = dict(zip([p.stem for p in pairs.paths], range(64)))
    degraded_tile, clean_tile = pairs[by_name['cat-256-128']]
    assert degraded_tile.shape == clean_tile.shape == (1, 128, 128)
    here = clean[128:256, 256:384]
    assert np.array_equal((clean_tile[0] * 255).round().numpy(), here)
    off = np.abs((degraded_tile[0] * 255).numpy() - here)
    assert 0.5 < off.mean() < 10  # JPEG of quality 20


def test_sheets_that_are_none(tmp_path):
    with pytest.raises(EnhanceError):
        SheetPairs(tmp_path)
    save_photo(sample_photo('cat').crop((0, 0, 33, 20)), tmp_path / 'odd.png')
    with pytest.raises(EnhanceError, match='33 wide'):
        SheetPairs(tmp_path)[0]


def test_luma_pair_brings_both_to_one_size():
    degraded, clean = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 24, 24)
    x, y = luma_pair(degraded, clean)
    assert x.shape == y.shape == (2, 1, 24, 24)
    by_hand = (16 + 65.481 * clean[:, 0] + 128.553 * clean[:, 1] + 24.966 * clean[:, 2]) / 255
    assert torch.allclose(y[:, 0], by_hand, atol=1e-5)
    gray = torch.rand(1, 1, 8, 8)
    assert luma_pair(gray, gray)[0] is gray


# Training


def gray_dls(photos):
    paths = find_photos(photos)
    return recipe_dls(
        paths[:2], paths[2:], TASKS['gray-jpeg20'], 32, bs=4, per_photo=8, device='cpu'
    )


def test_validation_by_hand(photos):
    class Half(nn.Module):
        def forward(self, x, pad=0):
            return x[..., 6:-6, 6:-6] / 2

    dls = gray_dls(photos)
    before, after = [], []
    for degraded, clean in dls.valid:
        inside = (slice(None), slice(None), slice(6, 26), slice(6, 26))
        before.append(F.mse_loss(degraded[inside], clean[inside]))
        after.append(F.mse_loss(degraded[inside] / 2, clean[inside]))
    expected = [-10 * math.log10(torch.stack(e).mean()) for e in (before, after)]
    found = validate(Half(), dls)
    assert found == pytest.approx(expected, abs=0.1)  # half precision rounds the prediction


def test_training_beats_its_input(photos):
    torch.manual_seed(0)
    np.random.seed(0)
    history = fit(SRCNN(residual=True), gray_dls(photos), 5, lr=2e-3, progress=False)
    assert [row['epoch'] for row in history] == list(range(1, 6))
    assert history[-1]['loss'] < history[0]['loss']
    assert history[-1]['PSNR'] == pytest.approx(-10 * math.log10(history[-1]['loss']))
    assert len({row['input'] for row in history}) == 1  # the same pairs each time


def test_a_killed_training_ends_in_the_same_weights(photos, tmp_path, monkeypatch):
    "Killed in its second epoch: the order of the crops goes on as well."

    def trained(path):
        torch.manual_seed(0)
        np.random.seed(0)
        dls, net = gray_dls(photos), SRCNN(residual=True)
        dls.train.rng.seed(0)
        return net, fit(net, dls, 2, checkpoint=path, progress=False)

    straight, history = trained(tmp_path / 'one.ckpt')
    with monkeypatch.context() as patch:
        epochs = iter([srcnn.train_epoch])
        patch.setattr(srcnn, 'train_epoch', lambda *args: next(epochs)(*args))
        with pytest.raises(StopIteration):
            trained(tmp_path / 'two.ckpt')
    again, same = trained(tmp_path / 'two.ckpt')
    assert same == history and len(history) == 2
    assert all(map(torch.equal, straight.state_dict().values(), again.state_dict().values()))


def test_a_checkpoint_of_another_network(photos, tmp_path):
    path = tmp_path / 'a.ckpt'
    fit(SRCNN(residual=True), gray_dls(photos), 1, checkpoint=path, progress=False)

    class Wider(SRCNN):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(1, 65, 9), nn.Conv2d(65, 32, 1)

    with pytest.raises(EnhanceError, match=r'a\.ckpt.* does not fit'):
        fit(Wider(), gray_dls(photos), 1, checkpoint=path, progress=False)


# What is published


def test_all_are_there():
    assert {n for n in published() if n.startswith('srcnn')} == set(TASK_OF)


@pytest.mark.parametrize('name', TASK_OF)
def test_the_card_says_what_there_is(name):
    task, scale = TASK_OF[name]
    model, card = load_model(name), read_card(WEIGHTS / f'{name}.json')
    assert isinstance(model, SRCNN) and model.scale == card['scale'] == scale
    assert card['parameters'] == 8129 and card['task'] == task and card['budget'] == 'full'
    assert {'recipe', 'training', 'scores', 'command', 'license', 'machine'} <= set(card)
    assert [row['model'] for row in card['scoreboard']] == ['input', name]
    before, after = card['scoreboard']
    assert after['dB'] > before['dB'] and after['SSIM'] > before['SSIM']
    assert (WEIGHTS / f'{name}.safetensors').stat().st_size < 50_000


@has_bench
@pytest.mark.parametrize('scale, least', [(2, 36.1), (3, 32.1), (4, 29.9)])
def test_set5_by_the_yardstick(scale, least):
    model = load_model(f'srcnn-x{scale}')
    measured, _ = yardstick().score_sr(model.predict, SHARED / 'data' / 'bench', 'Set5', scale)
    assert measured >= least
    assert model.card['scores']['Set5']['output'] == pytest.approx(measured, abs=0.02)


@has_bench
def test_classic5_by_the_yardstick():
    model = load_model('srcnn-jpeg20')

    def fix(gray):
        return np.asarray(model.predict(Image.fromarray(gray)))

    folder = SHARED / 'data' / 'bench' / 'Classic5'
    before, after, _ = yardstick().score_jpeg(fix, folder, 20)
    assert after - before >= 0.5
    said = model.card['scores']['Classic5']
    assert [said['input'], said['output']] == pytest.approx([before, after], abs=0.02)


@pytest.mark.parametrize('name', TASK_OF)
def test_half_precision_costs_next_to_nothing(name):
    "Within 0.02 dB of the same weights run plainly."
    photo = sample_photo('china').crop((160, 120, 352, 264))
    model, (degraded, clean) = load_model(name), TASKS[TASK_OF[name][0]].pair(photo)
    with torch.inference_mode():
        plain = to_photo(load_model(name).enhance_tile(to_tensor(degraded)))
    fast = model.predict(degraded)
    truth = np.asarray(clean, float)
    decibels = [
        10 * np.log10(255**2 / np.mean((np.asarray(p) - truth) ** 2)) for p in (plain, fast)
    ]
    assert abs(decibels[0] - decibels[1]) < 0.02


def test_loaders_on_sheets(tmp_path):
    write_sheets({'cat': sample_photo('cat')}, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        dls = pair_loaders(SheetPairs(tmp_path), SheetPairs(tmp_path), bs=8, device='cpu')
        degraded, clean = dls.one_batch()
    assert degraded.shape == clean.shape == (8, 1, 128, 128) and len(dls.train) == 8


def test_no_epochs_are_refused(photos):
    with pytest.raises(EnhanceError, match='0 epochs'):
        fit(SRCNN(), gray_dls(photos), 0, progress=False)
