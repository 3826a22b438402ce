"""Photo in, photo out, whatever its size; weights that come with a card, or are refused."""

import errno
import hashlib
import importlib
import json
import os
import pickle
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from common import noise, refused
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps
from scipy.ndimage import uniform_filter
from tiny import Evil, Killed, disk_of, equal_weights, integers
from torch import nn
from torch.nn import functional as F

from enhance_lib import srcnn
from enhance_lib.srcnn import SRCNN
from enhance_lib.toolbox import models, tiles
from enhance_lib.toolbox.errors import EnhanceError
from enhance_lib.toolbox.models import (
    PhotoModel,
    load_model,
    published,
    read_card,
    save_weights,
)


@pytest.fixture(autouse=True)
def tiles_of_any_size(monkeypatch):
    "So that small photos have several."
    monkeypatch.setattr(tiles, 'LEAST_TILE', 1)


# Predictions


class Double(PhotoModel):
    "Each pixel becomes four of the negative: what comes out is known exactly."

    scale, margin = 2, 0

    def __init__(self, gray=False):
        super().__init__()
        self.arguments, self.gray, self.seen = {'gray': gray}, gray, []

    def forward(self, x):
        self.seen.append(tuple(x.shape))
        return 1 - x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def doubled_negative(photo):
    "The same by Pillow, for L and RGB."
    return ImageOps.invert(photo.resize((2 * photo.width, 2 * photo.height), Image.NEAREST))


class Blur(PhotoModel):
    "The mean of 7×7 pixels. It sees 3 pixels far."

    margin = 3

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.ones(1))
        self.shapes = []

    def forward(self, x):
        self.shapes.append(tuple(x.shape[2:]))
        return self.weights * F.avg_pool2d(F.pad(x, (3, 3, 3, 3), mode='replicate'), 7, 1)


def blurred(photo):
    "The same by scipy."
    size = (7, 7, 1)[: np.asarray(photo).ndim]
    return uniform_filter(np.asarray(photo, float), size, mode='nearest')


def bright_srcnn(scale=1, residual=True, seed=0, size=1.0):
    "An untrained SRCNN that changes a photo a lot."
    torch.manual_seed(seed)
    model = SRCNN(scale, residual)
    with torch.no_grad():
        for p in model.parameters():
            p *= size
    return model


@pytest.mark.parametrize('gray', [False, True])
@pytest.mark.parametrize('size', [(1, 1), (1, 9), (11, 1), (7, 5), (16, 16), (33, 47)])
@pytest.mark.parametrize('mode', ['L', 'RGB'])
def test_what_comes_out_is_what_the_network_made(mode, size, gray):
    photo, model = noise(size, mode), Double(gray)
    model.tile = 16
    better = model.predict(photo)
    expected = doubled_negative(photo)
    assert better.mode == mode and better.size == expected.size
    assert (integers(better) == integers(expected)).all()
    assert {shape[:2] for shape in model.seen} == {(1, 1 if gray and mode == 'L' else 3)}
    assert (len(model.seen) > 1) == (max(size) > 16)


@pytest.mark.parametrize('gray', [False, True])
@pytest.mark.parametrize('mode', ['LA', 'RGBA'])
def test_transparency_is_kept(mode, gray):
    photo = noise((12, 9), mode)
    better = Double(gray).predict(photo)
    assert better.mode == mode and better.size == (24, 18)
    colors = 'L' if mode == 'LA' else 'RGB'
    alpha = photo.getchannel('A')
    # transparent pixels too: their colors are only hidden
    opaque = Image.merge(colors, photo.split()[:-1])
    ours = Image.merge(colors, better.split()[:-1])
    assert (integers(ours) == integers(doubled_negative(opaque))).all()
    expected = alpha.resize((24, 18), Image.Resampling.BICUBIC)
    assert (integers(better.getchannel('A')) == integers(expected)).all()
    for level in (0, 77, 255):
        photo.putalpha(level)
        assert set(integers(Double(gray).predict(photo).getchannel('A')).flat) == {level}


def test_photos_of_other_modes_come_out_as_they_are_opened():
    rgb = noise((10, 6))
    palette = rgb.quantize(8)
    better = Double().predict(palette)
    assert better.mode == 'RGB'
    assert (integers(better) == integers(doubled_negative(palette.convert('RGB')))).all()
    two = noise((10, 6), 'L').convert('1')
    better = Double(gray=True).predict(two)
    assert better.mode == 'L'
    assert (integers(better) == integers(doubled_negative(two.convert('L')))).all()
    deep = Image.fromarray(np.array([[0, 257 * 10, 257 * 200, 65535]], np.uint16))
    better = Double().predict(deep)
    assert better.mode == 'L' and better.size == (8, 2)
    assert integers(better)[0].tolist() == [255, 255, 245, 245, 55, 55, 0, 0]


def test_a_photo_is_turned_upright_first(tmp_path):
    photo, exif = noise((10, 6)), Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn it clockwise
    photo.save(tmp_path / 'a.png', exif=exif)
    better = Double().predict(tmp_path / 'a.png')
    assert better.size == (12, 20)
    expected = doubled_negative(photo.transpose(Image.Transpose.ROTATE_270))
    assert (integers(better) == integers(expected)).all()
    kept = Image.Exif()
    kept.load(better.info.get('exif', b''))
    assert kept.get(0x0112, 1) == 1  # or else viewers would turn it again


def test_the_color_profile_is_kept_and_the_photo_given_is_left_alone(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    photo = noise((9, 7))
    photo.info = {'icc_profile': profile, 'dpi': (300, 300), 'comment': 'x'}
    before, info = photo.tobytes(), dict(photo.info)
    better = Double().predict(photo)
    assert better.info == {'icc_profile': profile, 'dpi': (300, 300)}
    assert photo.tobytes() == before and photo.info == info and photo.size == (9, 7)
    photo.save(tmp_path / 'a.png', icc_profile=profile)
    assert Double().predict(str(tmp_path / 'a.png')).info['icc_profile'] == profile


@pytest.mark.parametrize('mode', ['L', 'RGB'])
@pytest.mark.parametrize('scale', [2, 3, 4])
def test_an_srcnn_of_nothing_but_zeros_is_bicubic_by_pillow(scale, mode):
    "Its residual is 0: what is left is the enlarging, at the border too."
    # of mid tones: between its two directions Pillow cuts off what goes beyond black and white
    photo = noise((24, 17), 'L').point(lambda v: 64 + v // 2)
    model = bright_srcnn(scale, size=0.0)
    model.tile = 10
    expected = photo.resize((scale * 24, scale * 17), Image.Resampling.BICUBIC)
    ours = model.predict(photo.convert(mode), fast=False)
    assert ours.mode == mode
    difference = integers(ours).reshape(17 * scale, 24 * scale, -1) - integers(expected)[..., None]
    # and it rounds in between
    assert np.abs(difference).max() <= 2 and np.abs(difference).mean() < 0.4


@pytest.mark.parametrize('scale, residual', [(1, False), (2, True), (2, False), (3, True)])
def test_tiles_of_srcnn_are_parts_of_the_whole(scale, residual):
    photo, model = noise((45, 38)), bright_srcnn(scale, residual, size=1.3)
    model.tile = 1000
    whole = integers(model.predict(photo, fast=False))
    assert whole.std() > 5 and whole.shape == (38 * scale, 45 * scale, 3)
    bicubic = integers(photo.resize((45 * scale, 38 * scale), Image.Resampling.BICUBIC))
    assert np.abs(whole - bicubic).mean() > 2  # the network does something
    for model.tile in (16, 38):
        tiled = integers(model.predict(photo, fast=False))
        assert np.abs(tiled - whole).max() <= 1
    seams = tiles.run_tiles(model, np.asarray(photo), 'cpu', 16, overlap=0, fast=False)
    if residual or scale == 1:
        assert np.abs(seams.astype(int) - whole).max() > 1


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(4, 24), st.sampled_from([1, 2, 8]),
    st.sampled_from(['L', 'RGB']),
)  # fmt: skip
@example(1, 1, 4, 8, 'L')
@example(40, 1, 4, 8, 'RGB')
def test_tiles_with_a_margin_are_parts_of_the_whole(width, height, tile, multiple, mode):
    photo, model = noise((width, height), mode), Blur()
    model.tile, model.multiple = tile, multiple
    ours = integers(model.predict(photo, fast=False))
    assert ours.shape[:2] == (height, width)
    assert np.abs(ours - blurred(photo)).max() <= 0.5 + 1e-3  # half a level is rounding
    assert all(side % multiple == 0 and side >= 3 for shape in model.shapes for side in shape)
    # 3 that it sees, and 4 to blend over
    assert max(max(shape) for shape in model.shapes) <= tile + 2 * (3 + 4) + 2 * multiple


class Blocks(Blur):
    "The mean of each block of 8×8 pixels: as a U-Net, it sees where the grid of blocks lies."

    multiple, margin, tile = 8, 8, 16

    def forward(self, x):
        return F.interpolate(F.avg_pool2d(x, 8), scale_factor=8)


def blocks_of(photo):
    "The same by numpy, the last row and column repeated until the sides can be divided by 8."
    array = np.asarray(photo, float)
    height, width = array.shape[:2]
    array = np.pad(array, [(0, -height % 8), (0, -width % 8), (0, 0)], mode='edge')
    means = array.reshape(array.shape[0] // 8, 8, array.shape[1] // 8, 8, 3).mean((1, 3))
    return means.repeat(8, 0).repeat(8, 1)[:height, :width]


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(1, 50), st.integers(1, 50), st.integers(4, 24), st.integers(0, 20))
@example(13, 9, 16, 8)
@example(40, 32, 16, 8)
@example(40, 37, 16, 8)  # the last tile starts on the grid
@example(48, 32, 16, 3)  # nor does the margin move a tile off the grid
def test_tiles_of_a_network_with_a_grid_are_parts_of_the_whole(width, height, tile, margin):
    photo, model = noise((width, height)), Blocks()
    model.tile, model.margin = tile, margin
    ours = integers(model.predict(photo, fast=False))
    assert np.abs(ours - blocks_of(photo)).max() <= 0.5 + 1e-3


class Bilinear(Blur):
    "As `Blocks`, smoothly enlarged again and doubled: each pixel sees up to 12 pixels far."

    multiple, margin, scale = 8, 12, 2

    def forward(self, x):
        return F.interpolate(F.avg_pool2d(x, 8), scale_factor=16, mode='bilinear')


@pytest.mark.parametrize('size', [(37, 50), (61, 7), (8, 8)])
def test_tiles_of_a_network_that_sees_far_on_its_grid_are_parts_of_the_whole(size):
    photo, model = noise(size), Bilinear()
    model.tile = 1000
    whole = integers(model.predict(photo, fast=False))
    assert whole.shape == (2 * size[1], 2 * size[0], 3)
    for model.tile in (7, 16, 31):
        assert np.abs(integers(model.predict(photo, fast=False)) - whole).max() <= 1


@pytest.mark.parametrize('mode', ['train', 'eval'])
def test_the_network_predicts_in_eval_mode_and_goes_back(mode):
    seen = []

    class Watched(Blur):
        def forward(self, x):
            seen.append((self.training, torch.is_grad_enabled(), x.requires_grad))
            if fail:
                raise RuntimeError('shapes differ')
            return super().forward(x)

    model, fail = getattr(Watched(), mode)(), False
    model.predict(noise())
    assert seen == [(False, False, False)] and model.training == (mode == 'train')
    fail = True
    with pytest.raises(RuntimeError):
        model.predict(noise())
    assert model.training == (mode == 'train')
    assert torch.is_grad_enabled() and all(p.grad is None for p in model.parameters())


def test_a_frozen_layer_stays_frozen():
    class Net(Blur):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

    for net_trains in (True, False):
        for norm_trains in (True, False):
            model = Net().train(net_trains)
            model.norm.train(norm_trains)
            model.predict(noise())
            assert model.training == net_trains and model.norm.training == norm_trains


@pytest.mark.parametrize('size', [(40, 24), (7, 5)])
def test_the_network_gets_its_photo_in_the_fast_layout(size):
    """All channels of a pixel side by side, and strides that say so for the batch, too.

    A batch of one with any other stride passes for channels_last, but not to the convolutions.
    """
    strides = []

    class Look(PhotoModel):
        def forward(self, x):
            strides.append((x.shape, x.stride()))
            return x

    Look().predict(Image.new('RGB', size, 'red'))
    ((_, c, h, w), found) = strides[0]
    assert found == (c * h * w, 1, c * w, c)


def test_a_network_can_be_trained_after_it_predicted():
    model = bright_srcnn()
    model.predict(noise(mode='L'))
    model(torch.rand(1, 1, 20, 20)).mean().backward()
    assert all(p.grad is not None for p in model.parameters())


class Overflowing(Blur):
    "Gives NaN in half precision, as a network whose sums go beyond 65504."

    def forward(self, x):
        self.shapes.append(torch.is_autocast_enabled('cpu'))
        y = F.conv2d(x, torch.eye(3)[..., None, None])  # what autocast computes in half precision
        return y if y.dtype == torch.float32 else y * torch.nan


def test_where_half_precision_overflows_float32_is_taken(monkeypatch):
    monkeypatch.setattr(models, 'half_dtype', lambda device: torch.bfloat16)
    photo, model = noise(), Overflowing()
    assert (integers(model.predict(photo)) == integers(photo)).all()
    assert model.shapes == [True, False]
    model.shapes.clear()
    assert (integers(model.predict(photo, fast=False)) == integers(photo)).all()
    assert model.shapes == [False]
    monkeypatch.setattr(models, 'half_dtype', lambda device: None)
    model.shapes.clear()
    model.predict(photo)
    assert model.shapes == [False]
    assert not torch.is_autocast_enabled('cpu')


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('half', [torch.bfloat16, None])
def test_spoiled_weights_are_refused(value, half, monkeypatch):
    monkeypatch.setattr(models, 'half_dtype', lambda device: half)
    model = Blur().train()
    with torch.no_grad():
        model.weights[0] = value
    with refused('Blur', 'NaN'):
        model.predict(Image.new('RGB', (8, 8), 'white'))
    assert model.training


@pytest.mark.parametrize('scale', [1, 3])
def test_half_precision_hardly_shows(scale, monkeypatch):
    "bfloat16 keeps 8 bits of the residual, and the residual is small."
    monkeypatch.setattr(models, 'half_dtype', lambda device: torch.bfloat16)
    photo, model = noise((40, 30)), bright_srcnn(scale, size=0.7)
    exact = integers(model.predict(photo, fast=False))
    fast = integers(model.predict(photo))
    bicubic = integers(photo.resize(model.predict(photo).size, Image.Resampling.BICUBIC))
    assert np.abs(exact - bicubic).max() > 3
    assert np.abs(fast - exact).max() <= 2 and np.abs(fast - exact).mean() < 0.2
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_photos_and_devices_that_cannot_be_used_are_refused(tmp_path):
    model = Double()
    with refused(str(tmp_path / 'gone.png')):
        model.predict(tmp_path / 'gone.png')
    with refused('folder'):
        model.predict(tmp_path)
    (tmp_path / 'a.png').write_bytes(b'text')
    with refused(str(tmp_path / 'a.png')):
        model.predict(str(tmp_path / 'a.png'))
    with refused("'nowhere'", 'cpu'):
        model.predict(noise(), device='nowhere')
    assert not model.seen


# Weights and their cards


def a_card(path):
    return json.loads(path.with_suffix('.json').read_text(encoding='utf-8'))


def change_card(path, **changes):
    "Change the card as a stranger would, or an accident."
    card = {k: v for k, v in {**a_card(path), **changes}.items() if v is not ...}
    path.with_suffix('.json').write_text(json.dumps(card))


def sign(path):
    "Make the checksum on the card that of the file, so that only what is in it can be wrong."
    change_card(path, sha256=hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / 'my-x2.safetensors'
    save_weights(bright_srcnn(2), path)
    return path


@pytest.mark.parametrize('as_text', [True, False])
@pytest.mark.parametrize('scale, residual', [(1, False), (3, True)])
def test_weights_come_back_exactly(scale, residual, as_text, tmp_path):
    model, path = bright_srcnn(scale, residual), tmp_path / 'new' / 'a.b.safetensors'
    card = save_weights(model, str(path) if as_text else path)
    assert sorted(p.name for p in path.parent.iterdir()) == ['a.b.json', 'a.b.safetensors']
    ours = load_model(str(path) if as_text else path)
    assert type(ours) is SRCNN and equal_weights(ours, model)
    assert (ours.scale, ours.residual, ours.training) == (scale, residual, False)
    assert ours.card == card == a_card(path)
    photo = noise(mode='L')
    assert integers(ours.predict(photo)).tolist() == integers(model.predict(photo)).tolist()


def test_weights_after_predicting_and_training_come_back_too(tmp_path):
    "channels_last, gradients and all."
    model = bright_srcnn()
    model.predict(noise())
    model(torch.rand(1, 1, 20, 20)).mean().backward()
    save_weights(model.train(), tmp_path / 'a.safetensors')
    assert equal_weights(load_model(tmp_path / 'a.safetensors'), model)


def test_the_card_says_what_the_weights_are(tmp_path):
    path = tmp_path / 'my-x3.safetensors'
    card = save_weights(
        bright_srcnn(3), path, recipe='größer', scores={'dB': [30.5, None]}, sha256='wrong'
    )
    assert card == a_card(path) == {
        'name': 'my-x3',
        'architecture': 'enhance_lib.srcnn.SRCNN',
        'arguments': {'scale': 3, 'residual': True},
        'scale': 3,
        # 64 filters of 9×9, 32 of 64, one of 32 times 5×5, and a bias for each
        'parameters': 64 * 81 + 64 + 32 * 64 + 32 + 25 * 32 + 1,
        'recipe': 'größer',
        'scores': {'dB': [30.5, None]},
        'sha256': hashlib.sha256(path.read_bytes()).hexdigest(),
    }  # fmt: skip
    assert card['parameters'] == 8129
    assert 'größer' in path.with_suffix('.json').read_text(encoding='utf-8')


def tensors_of(path):
    "The tensors of a .safetensors file, read by hand: a length, a JSON header, then numbers."
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], 'little')
    header = json.loads(content[8:start])
    header.pop('__metadata__', None)
    kinds = {'F32': np.float32, 'F16': np.float16}
    return {
        name: np.frombuffer(
            content[start + t['data_offsets'][0] : start + t['data_offsets'][1]], kinds[t['dtype']]
        ).reshape(t['shape'])
        for name, t in header.items()
    }


@pytest.mark.parametrize('half', [True, False])
def test_weights_are_stored_as_they_should_be(half, tmp_path):
    model, path = bright_srcnn(), tmp_path / 'a.safetensors'
    save_weights(model, path, half=half)
    stored = tensors_of(path)
    expected = {k: v.numpy() for k, v in model.state_dict().items()}
    assert set(stored) == set(expected) and len(stored) == 6
    kind = np.float16 if half else np.float32
    for name, values in expected.items():
        assert stored[name].dtype == kind
        np.testing.assert_array_equal(stored[name], values.astype(kind))
    ours = load_model(path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert equal_weights(ours, model) != half
    assert equal_weights(ours, model, within=1e-3)
    assert {p.dtype for p in model.parameters()} == {torch.float32}  # not touched


@pytest.mark.parametrize(
    'value, half',
    [(1e5, True), (-65520, True), (np.nan, True), (np.nan, False), (-np.inf, False)],
)
def test_weights_that_are_no_numbers_or_too_large_are_refused(value, half, weights):
    "float16 ends at 65504: what is larger would become infinity."
    old, model = weights.read_bytes(), bright_srcnn(2)
    with torch.no_grad():
        model.conv1.bias[0] = value
    with refused(str(weights), 'NaN'):
        save_weights(model, weights, half=half)
    assert weights.read_bytes() == old and load_model(weights)
    with torch.no_grad():
        model.conv1.bias[0] = 65504
    save_weights(model, weights, half=True)
    assert load_model(weights).conv1.bias[0] == 65504


@pytest.mark.parametrize('name', ['a.pth', 'a', 'a.safetensors.bak', 'safetensors', '.safetensors'])
def test_weights_have_their_own_suffix(name, tmp_path):
    with refused(str(tmp_path / name), '.safetensors'):
        save_weights(bright_srcnn(), tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'damage',
    {
        'empty': lambda c: b'',
        'cut': lambda c: c[:-1],
        'half': lambda c: c[: len(c) // 2],
        'longer': lambda c: c + b'x',
        'a bit of a number': lambda c: c[:-5] + bytes([c[-5] ^ 1]) + c[-4:],
        'a bit of the header': lambda c: c[:20] + bytes([c[20] ^ 4]) + c[21:],
    }.items(),
    ids=lambda item: item[0],
)
def test_damaged_weights_are_refused(damage, weights):
    name, change = damage
    weights.write_bytes(change(weights.read_bytes()))
    with refused(str(weights), 'checksum'):
        load_model(weights)
    if name != 'a bit of a number':  # with the right checksum, what is in the file is refused
        sign(weights)
        with refused(str(weights), 'SRCNN'):
            load_model(weights)


@pytest.mark.parametrize('checksum', ['0' * 64, '', None, 5, [], ...])
def test_a_wrong_checksum_is_refused(checksum, weights):
    change_card(weights, sha256=checksum)
    with refused(str(weights), 'checksum'):
        load_model(weights)


def test_weights_of_another_shape_are_refused(weights):
    from safetensors.torch import load_file, save_file

    state = load_file(weights)
    wrong = {
        'one more': {**state, 'conv4.bias': torch.ones(1)},
        'one less': {k: v for k, v in state.items() if k != 'conv2.bias'},
        'other shape': {**state, 'conv1.weight': torch.ones(64, 3, 9, 9)},
        'none': {},
        'other names': {f'x{k}': v for k, v in state.items()},
    }
    for tensors in wrong.values():
        save_file(tensors, weights)
        sign(weights)
        with refused(str(weights), 'SRCNN'):
            load_model(weights)
    save_file(state, weights)
    sign(weights)
    assert load_model(weights)


@pytest.mark.parametrize(
    'content',
    [None, b'', b'{', b'[]', b'5', b'"text"', b'null', b'\xff\xfe{}', b'{"a": 1}x', b'{"a": \n\n1'],
)
def test_a_card_that_is_none_is_refused(content, weights):
    card = weights.with_suffix('.json')
    card.unlink() if content is None else card.write_bytes(content)
    with refused(str(card)):
        load_model(weights)
    card.unlink(missing_ok=True)
    card.mkdir()
    with refused(str(card)):
        load_model(weights)


def test_an_empty_card_is_refused(weights):
    weights.with_suffix('.json').write_text('{}')
    with refused(str(weights)):
        load_model(weights)


def test_a_card_of_nothing_but_brackets_is_refused(weights):
    weights.with_suffix('.json').write_text('[' * 100_000)
    with refused(str(weights.with_suffix('.json'))):
        load_model(weights)


@pytest.mark.parametrize(
    'architecture',
    [
        'os.system',
        'builtins.eval',
        'subprocess.Popen',
        'torch.nn.Linear',
        'SRCNN',
        'srcnn.SRCNN',
        'enhance_lib.SRCNN',
        'enhance_lib.toolbox.files.open_photo',
        'enhance_lib.toolbox.files.EnhanceError',
        'enhance_lib.toolbox.models.nn.Linear',
        'enhance_lib.toolbox.models.nn',
        'enhance_lib.toolbox.models.Path',
        'enhance_lib.toolbox.training.Callback',
        'enhance_lib.toolbox.models.importlib.import_module',
        'enhance_lib.srcnn.SRCNN.forward',
        'enhance_lib.srcnn.srcnn',
        'enhance_lib.srcnn.',
        'enhance_lib.srcnn',
        'enhance_lib..x',
        'enhance_lib...os.system',
        'enhance_lib.gone.Model',
        'enhance_lib.srcnn.deeper.Model',
        'enhance_lib.weights.x',
        'enhance_lib/../os.system',
        'enhance_lib.srcnn .SRCNN',
        'enhance_lib.\nsrcnn.SRCNN',
        'enhance_library.srcnn.SRCNN',
        '../enhance_lib.srcnn.SRCNN',
        'enhance_lib.' + 'x' * 5000 + '.SRCNN',
        '',
        '.',
        None,
        5,
        True,
        [],
        ['enhance_lib.srcnn.SRCNN'],
        {'enhance_lib.srcnn': 'SRCNN'},
        ...,
    ],
    ids=lambda a: repr(a)[:40],
)
def test_an_architecture_that_is_none_of_the_package_is_refused(architecture, weights):
    change_card(weights, architecture=architecture)
    with refused(str(weights), 'not a model of enhance_lib'):
        load_model(weights)


@pytest.mark.parametrize('module', ['strange', 'enhance_library', 'odd.enhance_lib'])
def test_a_module_of_somebody_else_is_not_even_imported(module, weights, monkeypatch):
    folder = weights.parent / 'site'
    path = folder / (module.replace('.', '/') + '.py')
    path.parent.mkdir(parents=True)
    path.write_text(f"open({str(folder / 'it ran')!r}, 'w')\nfrom enhance_lib.srcnn import SRCNN\n")
    monkeypatch.syspath_prepend(folder)
    change_card(weights, architecture=f'{module}.SRCNN')
    with refused(str(weights), 'not a model of enhance_lib'):
        load_model(weights)
    assert not (folder / 'it ran').exists()
    importlib.import_module(module)
    assert (folder / 'it ran').exists()  # it could have been


def test_an_architecture_without_a_network_does_not_fit(weights):
    "The class that all models share is one of the package's, but has no weights."
    change_card(weights, architecture='enhance_lib.toolbox.models.PhotoModel', arguments={})
    with refused(str(weights), 'PhotoModel'):
        load_model(weights)


@pytest.mark.parametrize(
    'arguments',
    [
        [],
        [2],
        'scale',
        '',
        5,
        None,
        True,
        {'depth': 5},
        {'scale': 2, 'residual': True, 'self': 1},
        {'scale': 0},
        {'scale': '2'},
        {'scale': None},
        {'scale': [2]},
        {'': 1},
    ],
    ids=repr,
)
def test_arguments_that_do_not_fit_are_refused(arguments, weights):
    change_card(weights, arguments=arguments)
    with refused(str(weights), 'SRCNN'):
        load_model(weights)


def test_an_error_without_a_message_is_refused_too(weights, monkeypatch):
    class Silent(PhotoModel):
        def __init__(self, **arguments):
            raise ValueError

    monkeypatch.setattr(srcnn, 'Silent', Silent, raising=False)
    change_card(weights, architecture='enhance_lib.srcnn.Silent')
    with refused(str(weights), 'Silent'):
        load_model(weights)


@pytest.mark.parametrize('scale', [10**6, 5, -1, 2.5, 2.0, True])
def test_a_scale_that_is_not_possible_is_refused(scale, weights):
    change_card(weights, arguments={'scale': scale})
    with refused(str(weights)):
        load_model(weights)


@pytest.mark.parametrize('name', ['evil.safetensors', 'evil.pth', 'evil.pkl', 'evil', 'evil.json'])
@pytest.mark.parametrize('kind', ['pickle', 'torch'])
def test_a_program_in_weights_is_not_run(kind, name, tmp_path):
    path, evil = tmp_path / name, Evil(tmp_path / 'it ran')
    card = {
        'architecture': 'enhance_lib.srcnn.SRCNN',
        'arguments': {'scale': 2},
        'sha256': None,
    }
    torch.save(evil, path) if kind == 'torch' else path.write_bytes(pickle.dumps(evil, protocol=2))
    if path.suffix != '.json':
        card['sha256'] = hashlib.sha256(path.read_bytes()).hexdigest()
        path.with_suffix('.json').write_text(json.dumps(card))
    with refused(str(path)):
        load_model(path)
    assert not evil.folder.exists()
    content = path.read_bytes()
    torch.load(BytesIO(content), weights_only=False) if kind == 'torch' else pickle.loads(content)
    assert evil.folder.exists()  # it would have run


def test_names_of_other_files_are_refused_with_a_reason(tmp_path):
    for suffix in ('.pth', '.pt', '.pkl', '.ckpt', '.bin'):
        with refused(str(tmp_path / f'a{suffix}'), 'save_weights'):
            load_model(tmp_path / f'a{suffix}')
    (tmp_path / 'a.txt').write_text('x')
    with refused(str(tmp_path / 'a.txt'), 'safetensors'):
        load_model(tmp_path / 'a.txt')
    with refused(str(tmp_path / 'a.safetensors')):
        load_model(tmp_path / 'a.safetensors')
    (tmp_path / 'b.safetensors').mkdir()
    with refused(str(tmp_path / 'b.safetensors')):
        load_model(tmp_path / 'b.safetensors')


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    "A folder of published weights."
    monkeypatch.setattr(models, 'WEIGHTS', tmp_path / 'shelf')
    for name in ('srcnn-x2', 'srcnn-x3', 'unet-jpeg'):
        save_weights(bright_srcnn(2, seed=len(name)), tmp_path / 'shelf' / f'{name}.safetensors')
    return tmp_path / 'shelf'


def test_published_weights_have_a_card(shelf):
    assert published() == ['srcnn-x2', 'srcnn-x3', 'unet-jpeg']
    (shelf / 'srcnn-x3.json').unlink()
    (shelf / 'unet-jpeg.safetensors').unlink()
    (shelf / 'notes.txt').write_text('x')
    assert published() == ['srcnn-x2']
    with refused("'srcnn-x3'", 'There are: srcnn-x2.'):
        load_model('srcnn-x3')
    assert load_model('srcnn-x2').card == a_card(shelf / 'srcnn-x2.safetensors')


def test_no_weights_at_all_are_published(tmp_path, monkeypatch):
    monkeypatch.setattr(models, 'WEIGHTS', tmp_path / 'gone')
    assert published() == []
    with refused("'srcnn-x2'"):
        load_model('srcnn-x2')


def test_unknown_names_are_refused_with_those_there_are(shelf, tmp_path):
    with refused("'srcnn-x5'", 'Did you mean srcnn-x', 'There are: srcnn-x2, srcnn-x3, unet-jpeg.'):
        load_model('srcnn-x5')
    with refused("'unetjpg'", 'Did you mean unet-jpeg?'):
        load_model('unetjpg')
    for name in ('zzz', '', '.', '..', '/', 'SRCNN-X2', 'srcnn-x2.json', '../shelf/srcnn-x2'):
        with refused('srcnn-x2'):
            load_model(name)
    for folder in (tmp_path, str(shelf), shelf / 'srcnn-x2'):
        with refused(str(folder), 'There are: srcnn-x2'):
            load_model(folder)


def test_a_very_long_name_is_refused(shelf):
    with refused('There are: srcnn-x2'):
        load_model('x' * 5000)
    with refused('There is no file'):
        load_model('x' * 5000 + '.safetensors')


def test_a_refused_name_stays_on_one_line(shelf):
    for name in ('a\nb', 'a\0b'):
        with refused('There are: srcnn-x2'):
            load_model(name)


def test_weights_that_cannot_be_read_are_refused(weights, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, 'Permission denied', str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, 'read_bytes', refuse)
        with refused(str(weights), 'Permission denied'):
            load_model(weights)
    monkeypatch.setattr(Path, 'read_text', lambda path, **_: refuse(path))
    with refused(str(weights.with_suffix('.json')), 'Permission denied'):
        load_model(weights)


def test_a_full_disk_leaves_no_half_of_a_pair(shelf):
    path = shelf / 'srcnn-x2.safetensors'
    old = path.read_bytes()
    with refused(str(path)), disk_of(20_000):  # the weights take 33 kB
        save_weights(bright_srcnn(2, seed=77), path)
    assert path.read_bytes() == old and 'srcnn-x2' in published()
    assert equal_weights(load_model('srcnn-x2'), bright_srcnn(2, seed=8))
    assert not list(shelf.glob('.*'))
    with refused(str(path.with_suffix('.json'))), disk_of(40_000):  # enough for the weights alone
        save_weights(bright_srcnn(2, seed=77), path, notes='x' * 50_000)
    assert 'srcnn-x2' not in published()  # rather none than a pair that does not fit
    assert not list(shelf.glob('.*'))
    save_weights(bright_srcnn(2, seed=77), path)
    assert equal_weights(load_model('srcnn-x2'), bright_srcnn(2, seed=77))


@pytest.mark.parametrize('call', [1, 2])
def test_being_killed_while_writing_leaves_no_pair_that_does_not_fit(call, shelf, monkeypatch):
    "Whatever is left, it is the old pair, or the new one, or it is not offered."
    path, replaced, replace = shelf / 'srcnn-x2.safetensors', [], os.replace

    def die(source, target):
        replaced.append(Path(target).suffix)
        if len(replaced) == call:
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', die)
        with pytest.raises(Killed):
            save_weights(bright_srcnn(2, seed=77), path)
    assert replaced == ['.safetensors', '.json'][:call]
    assert path.exists() and not path.with_suffix('.json').exists()
    assert published() == ['srcnn-x3', 'unet-jpeg']
    with refused(str(path.with_suffix('.json'))):
        load_model(path)


def test_being_killed_before_the_weights_are_written_leaves_the_old_pair(shelf, monkeypatch):
    def die(path, content):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, 'write_bytes', die)
        with pytest.raises(Killed):
            save_weights(bright_srcnn(2, seed=77), shelf / 'srcnn-x2.safetensors')
    assert equal_weights(load_model('srcnn-x2'), bright_srcnn(2, seed=8))


@pytest.mark.parametrize('value', [{1, 2}, Path('x'), [{'deep': {1}}], b'x', {(1, 2): 3}], ids=repr)
def test_a_card_that_cannot_be_written_is_refused_and_costs_nothing(value, weights):
    old = weights.read_bytes()
    with refused(str(weights), 'card'):
        save_weights(bright_srcnn(2, seed=77), weights, value=value)
    assert weights.read_bytes() == old and load_model(weights)


def test_numbers_of_numpy_may_stand_on_a_card(weights):
    numbers = {'dB': np.float32(30.5), 'n': np.int64(3), 'all': (np.arange(2), np.bool_(True))}
    card = save_weights(bright_srcnn(2), weights, scores=numbers)
    assert a_card(weights)['scores'] == {'dB': 30.5, 'n': 3, 'all': [[0, 1], True]}
    assert load_model(weights).card['sha256'] == card['sha256']


@pytest.mark.parametrize('place', ['folder', 'in a file', 'card'])
def test_a_place_where_weights_cannot_be_written_is_refused(place, tmp_path):
    path = tmp_path / 'a.safetensors'
    if place == 'folder':
        path.mkdir()
    elif place == 'card':
        path.with_suffix('.json').mkdir()
    else:
        (tmp_path / 'file').write_text('x')
        path = tmp_path / 'file' / 'a.safetensors'
    with refused(str(path.parent)):
        save_weights(bright_srcnn(), path)


def test_a_model_without_arguments_can_be_saved(tmp_path):
    card = save_weights(Blur(), tmp_path / 'a.safetensors')
    assert card['arguments'] == a_card(tmp_path / 'a.safetensors')['arguments'] == {}


# Models of one's own


class Tint(PhotoModel):
    "What a learner writes in a notebook."

    def __init__(self, strength=1.0):
        super().__init__()
        self.arguments = {'strength': strength}
        self.factor = nn.Parameter(torch.tensor(strength))

    def forward(self, x):
        return x * self.factor


@pytest.fixture
def tint(tmp_path):
    path = tmp_path / 'tint.safetensors'
    model = Tint(0.5)
    with torch.no_grad():
        model.factor[()] = 0.25
    save_weights(model, path, notes='mine')
    return path


def test_a_class_of_ones_own_is_made_with_the_arguments_on_the_card(tint):
    model = load_model(tint, Tint)
    assert type(model) is Tint and model.arguments == {'strength': 0.5}
    assert float(model.factor.detach()) == 0.25 and not model.training
    assert model.card == a_card(tint) and model.card['notes'] == 'mine'
    assert model.predict(Image.new('L', (3, 2), 200)).getpixel((0, 0)) == 50


def test_a_model_that_was_made_is_filled(tint):
    model = Tint(0.9).train()
    assert load_model(str(tint), model) is model
    assert float(model.factor.detach()) == 0.25 and not model.training
    assert model.card['arguments'] == {'strength': 0.5}


def test_a_foreign_class_on_a_card_is_refused_where_none_is_handed_over(tint):
    assert a_card(tint)['architecture'].endswith('test_models.Tint')
    with refused(str(tint), 'test_models.Tint', 'not a model of enhance_lib', 'load_model(path'):
        load_model(tint)


@pytest.mark.parametrize('kind', [Blur, Blur(), SRCNN, SRCNN(), 'Tint', 5, Tint.forward])
def test_what_is_handed_over_has_to_fit(kind, tint):
    with refused(str(tint), 'does not fit'):
        load_model(tint, kind)


def test_handing_over_a_class_skips_no_other_check(tint):
    tint.write_bytes(tint.read_bytes()[:-1] + b'x')
    for kind in (Tint, Tint()):
        with refused(str(tint), 'checksum'):
            load_model(tint, kind)
    tint.with_suffix('.json').unlink()
    with refused('There is no card'):
        load_model(tint, Tint)


# What is published


def test_the_networks_that_see_the_whole_photo_are_known():
    seeing = [name for name in published() if not load_model(name).exact]
    assert seeing == ['unet-feature', 'unet-gan', 'unet-mse']


LIGHT = """
import sys
from PIL import Image
from enhance_lib.toolbox.models import load_model
heavy = 'fastai timm pandas matplotlib skimage torchvision torchmetrics'.split()
for name in sys.argv[1:]:
    better = load_model(name).predict(Image.new('RGB', (32, 32), 'gray'))
    print(name, better.width, *[name for name in heavy if name in sys.modules])
"""


def test_a_published_model_runs_on_torch_alone():
    "Nobody who only wants better photos should wait for fastai."
    names = [name for name in published() if not name.startswith('unet')]
    scales = [models.read_card(models.WEIGHTS / f'{name}.json')['scale'] for name in names]
    root = Path(models.__file__).parents[2]
    command = [sys.executable, '-c', LIGHT, *names]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=100)
    wanted = [f'{name} {32 * scale}' for name, scale in zip(names, scales)]
    assert done.stdout.splitlines() == wanted, done.stderr


@pytest.mark.parametrize(
    'data, words',
    [
        (None, 'There is no card'),
        (b'', 'cannot be read'),
        (b'{"a": 1', 'cannot be read'),
        (b'\xff\xfe{}', 'cannot be read'),
        (b'[{"task": "x2"}]', 'not a JSON object'),
        (b'null', 'not a JSON object'),
    ],
)
def test_cards_that_are_none(data, words, tmp_path):
    path = tmp_path / 'model.json'
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(EnhanceError, match=words) as error:
        read_card(path)
    assert 'model.json' in str(error.value)
    path.write_text('{"license": "CC0", "author": "Müller"}', encoding='utf-8')
    assert read_card(path) == read_card(str(path)) == {'license': 'CC0', 'author': 'Müller'}
