"""The scoreboard: pairs, tasks, rows by hand, cards that have none, the plane; LPIPS."""

import io
import json

import numpy as np
import pytest
import torch
from beside import SHARED, needs
from by_hand import (
    COLORS,
    batch,
    distance_by_hand,
    feature_net_of,
    flat,
    skimage_psnr,
    skimage_ssim,
)
from common import noise, one_line
from PIL import Image, ImageFilter
from skimage.color import rgb2ycbcr

import enhance_lib.applications.scoreboard as module
from enhance_lib.applications.scoreboard import (
    TASKS,
    bench_pairs,
    board_pairs,
    board_row,
    lpips,
    mean_luma_psnr,
    plot_scoreboard,
    scoreboard,
)
from enhance_lib.toolbox.datasets import sample_photo, sample_photos
from enhance_lib.toolbox.errors import EnhanceError
from enhance_lib.toolbox.operations import resize
from enhance_lib.toolbox.tensors import to_tensor

SQUEEZENET = SHARED / 'pretrained' / 'squeezenet1_1.pth'


net = feature_net_of(COLORS)


# Pairs


@needs(SHARED / 'data' / 'bench' / 'Set5')
@pytest.mark.parametrize('scale, published', [(2, 33.66), (3, 30.39), (4, 28.42)])
def test_bicubic_on_set5_is_what_papers_report(scale, published):
    pairs = bench_pairs(SHARED / 'data' / 'bench' / 'Set5' / f'x{scale}')
    assert len(pairs) == 5
    assert all(hr.size == (lr.width * scale, lr.height * scale) for lr, hr in pairs)

    def enlarge(p):
        return resize(p, p.width * scale, p.height * scale)

    assert mean_luma_psnr(enlarge, pairs, scale) == pytest.approx(published, abs=0.05)


def test_the_mean_is_over_pairs():
    "20 dB and 40 dB are 30 dB, although the mean of their errors is 23 dB."
    pairs = [(flat(100, mode='L'), flat(b, mode='L')) for b in (101, 110)]
    one, ten = 20 * np.log10(255), 20 * np.log10(255 / 10)
    assert mean_luma_psnr(lambda p: p, iter(pairs)) == pytest.approx((one + ten) / 2, abs=1e-3)


SIZES = [('LR', (6, 4)), ('HR', (12, 8))]


def test_bench_pairs(tmp_path):
    photos = {f'{n}_{k}.png': noise(s, seed=i) for i, n in enumerate('ab') for k, s in SIZES}
    for name, photo in photos.items():
        photo.save(tmp_path / name)
    noise().save(tmp_path / 'other.png')
    pairs = bench_pairs(str(tmp_path))
    assert [(degraded.tobytes(), clean.tobytes()) for degraded, clean in pairs] == [
        (photos[f'{n}_LR.png'].tobytes(), photos[f'{n}_HR.png'].tobytes()) for n in 'ab'
    ]


def test_bench_pairs_that_are_none(tmp_path):
    with pytest.raises(EnhanceError, match='nowhere'):
        bench_pairs(tmp_path / 'nowhere')
    noise().save(tmp_path / 'a_LR.png')
    with pytest.raises(EnhanceError, match='_HR') as error:
        bench_pairs(tmp_path)
    assert str(tmp_path) in one_line(error)
    noise().save(tmp_path / 'b_HR.png')
    with pytest.raises(EnhanceError, match='b_LR.png') as error:
        bench_pairs(tmp_path)
    one_line(error)


@pytest.mark.parametrize('where', ['DIV2K_valid_HR', 'a_HR/x2'])
def test_bench_pairs_in_a_folder_of_that_name(where, tmp_path):
    folder = tmp_path / where
    folder.mkdir(parents=True)
    for kind, size in SIZES:
        noise(size).save(folder / f'a_{kind}.png')
    assert [(degraded.size, clean.size) for degraded, clean in bench_pairs(folder)] == [
        ((6, 4), (12, 8))
    ]


@pytest.mark.filterwarnings('ignore::RuntimeWarning')
def test_the_mean_of_no_pairs():
    with pytest.raises(EnhanceError):
        mean_luma_psnr(lambda p: p, [])


# Tasks and rows


def test_the_tasks_are_what_they_say():
    "The held-out photos, shrunk by Pillow's bicubic, or gray and through Pillow's JPEG."
    names = list(sample_photos('held-out'))
    for scale in (2, 3, 4):
        pairs = board_pairs(f'x{scale}')
        assert len(pairs) == len(names)
        for degraded, clean in pairs:
            assert clean.width % scale == 0 and clean.height % scale == 0
            small = clean.resize((clean.width // scale, clean.height // scale), Image.BICUBIC)
            assert degraded.mode == 'RGB' and degraded.tobytes() == small.tobytes()
    for (degraded, clean), photo in zip(
        board_pairs('gray-jpeg20'), sample_photos('held-out').values()
    ):
        file = io.BytesIO()
        photo.convert('L').save(file, 'JPEG', quality=20)
        assert clean.mode == degraded.mode == 'L' and degraded.size == clean.size == photo.size
        np.testing.assert_array_equal(np.asarray(degraded), np.asarray(Image.open(file)))


def test_unknown_tasks():
    for call in (lambda: board_pairs('x5'), lambda: board_row('mine', 'x5', net=net)):
        with pytest.raises(EnhanceError, match="'x5'") as error:
            call()
        assert all(task in one_line(error) for task in TASKS)


@pytest.fixture
def small_tasks(monkeypatch):
    "Tasks whose photos are two small pieces of the held-out ones."
    pieces = {
        name: photo.crop((100, 100, 170, 153))
        for name, photo in list(sample_photos('held-out').items())[:2]
    }
    monkeypatch.setattr(module, 'sample_photos', lambda split: pieces)


@pytest.mark.parametrize('task', TASKS)
def test_the_row_of_the_input_is_worked_out_with_skimage(task, small_tasks):
    row = board_row('input', task, net=net)
    border = int(task[1:]) if task.startswith('x') else 0
    found = []
    for degraded, clean in board_pairs(task):
        large = degraded.resize(clean.size, Image.BICUBIC) if border else degraded
        color = clean.mode == 'RGB'
        a, b = (rgb2ycbcr(p)[..., 0] if color else np.asarray(p, float) for p in (large, clean))
        inner = (slice(border, -border),) * 2 if border else (slice(None),) * 2
        a, b = a[inner], b[inner]
        rgb = [np.asarray(p.convert('RGB')).transpose(2, 0, 1) / 255 for p in (large, clean)]
        found.append(
            [
                skimage_psnr(a, b, 255),
                skimage_ssim(a, b, 255, None),
                distance_by_hand(*rgb, [COLORS]),
                clean.width * clean.height,
            ]
        )
    decibels, similarity, features, _ = np.mean(found, 0)
    assert (row['task'], row['model'], row['parameters']) == (task, 'input', 0)
    assert row['dB'] == pytest.approx(decibels, abs=0.0051)
    assert row['SSIM'] == pytest.approx(similarity, abs=0.0001)
    assert row['feature distance'] == pytest.approx(features, rel=0.01)
    assert row['s/MP'] >= 0  # the input itself takes no time, see the next test
    assert json.loads(json.dumps(row)) == row  # it can stand on a card


def test_time_is_that_of_enhancing_alone(small_tasks, monkeypatch):
    "A clock that only `enhance` moves on: 0.5 s for each photo, without the first, warming call."
    clock, calls = [0.0], []
    monkeypatch.setattr(module.time, 'perf_counter', lambda: clock[0])

    def enhance(degraded):
        clock[0] += 0.5
        calls.append(degraded.size)
        return degraded.resize((degraded.width * 2, degraded.height * 2), Image.BICUBIC)

    row = board_row('mine', 'x2', enhance, 1234, net)
    assert len(calls) == 3 and row['parameters'] == 1234
    assert row['s/MP'] == pytest.approx(2 * 0.5 / (2 * 70 * 52 / 1e6), rel=1e-3)
    assert row['dB'] == board_row('input', 'x2', net=net)['dB']


def test_a_better_model_gets_better_figures(small_tasks):
    "One that knows the answer is perfect."
    answers = {degraded.tobytes(): clean for degraded, clean in board_pairs('x2')}
    row = board_row('oracle', 'x2', lambda degraded: answers[degraded.tobytes()], net=net)
    assert (row['dB'], row['SSIM'], row['feature distance']) == (np.inf, 1.0, 0.0)


@pytest.mark.parametrize(
    'task, enhance, words',
    [
        ('x2', lambda degraded: degraded, ['35×26', '70×52']),
        ('x2', lambda degraded: degraded.resize((71, 52)), ['71×52', '70×52']),
        ('x2', lambda degraded: degraded.resize((70, 52)).convert('L'), ['70×52 L', '70×52 RGB']),
        ('gray-jpeg20', lambda degraded: degraded.convert('RGB'), ['70×53 RGB', '70×53 L']),
        ('x2', lambda degraded: None, ['NoneType']),
        ('x2', lambda degraded: to_tensor(degraded.resize((70, 52))), ['Tensor', 'Image']),
    ],
)
def test_a_model_that_gives_something_else(task, enhance, words, small_tasks):
    with pytest.raises(EnhanceError) as error:
        board_row('mine', task, enhance, net=net)
    assert all(w in one_line(error) for w in words)


# The board


def row(task, model, dB=20.0, distance=0.5):
    return {'task': task, 'model': model, 'dB': dB, 'SSIM': 0.8, 'feature distance': distance}


@pytest.fixture
def weights(monkeypatch, tmp_path):
    "An empty folder of published weights."
    folder = tmp_path / 'weights'
    folder.mkdir()
    monkeypatch.setattr(module, 'WEIGHTS', folder)
    return folder


def test_the_scoreboard_holds_published_rows_and_yours(weights):
    cards = {
        'a': {'scoreboard': [row('x2', 'input', 28), row('x2', 'a', 30)]},
        'b': {'scoreboard': [row('x2', 'input', 28), row('x4', 'b', 25), row('x3', 'mine', 1)]},
        'c': {'about': 'weights that are not measured'},
    }
    for name, card in cards.items():
        (weights / f'{name}.json').write_text(json.dumps(card))
    (weights / 'a.safetensors').write_bytes(b'')
    table = scoreboard(row('x2', 'mine', 29), row('x2', 'a', 31), row('x4', 'a', 24))
    assert list(zip(table['task'], table['model'], table['dB'])) == [
        ('x2', 'input', 28),
        ('x2', 'mine', 29),
        ('x2', 'a', 31),  # yours, not the published 30
        ('x3', 'mine', 1),
        ('x4', 'a', 24),
        ('x4', 'b', 25),
    ]
    assert list(table.index) == list(range(6))
    assert 'mine' not in scoreboard().query('task == "x2"')['model'].tolist()


@pytest.mark.parametrize('exists', [True, False])
def test_the_scoreboard_without_published_weights(exists, weights):
    if not exists:
        weights.rmdir()
    table = scoreboard(row('x2', 'mine', 29), row('x2', 'input', 28), row('x2', 'mine', 30))
    assert table['model'].tolist() == ['input', 'mine'] and table['dB'].tolist() == [28, 30]


def test_the_scoreboard_without_rows(weights):
    assert len(scoreboard()) == 0


@pytest.mark.parametrize('rows', [None, {'task': 'x2'}, [{'task': 'x2'}], ['x2'], 'x2'])
def test_the_scoreboard_of_a_wrong_card(rows, weights):
    (weights / 'wrong.json').write_text(json.dumps({'scoreboard': rows}))
    with pytest.raises(EnhanceError, match='wrong.json'):
        scoreboard()


def test_the_scoreboard_names_a_broken_card(weights):
    (weights / 'broken.json').write_text('{')
    with pytest.raises(EnhanceError, match='broken.json'):
        scoreboard(row('x2', 'mine'))


@pytest.fixture
def drawn(monkeypatch):
    "What `plot_scoreboard` draws: (axes, dots, rings, arrows, texts)."
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    shown = []
    monkeypatch.setattr(plt, 'show', lambda: shown.append(plt.gcf()))

    def draw(table):
        plot_scoreboard(table)
        (fig,) = shown
        (ax,) = fig.axes
        fig.canvas.draw()
        marks = {True: [], False: []}  # filled or not
        for c in ax.collections:
            marks[len(c.get_facecolor()) > 0].extend(tuple(map(float, o)) for o in c.get_offsets())
        arrows = [(t.xyann, t.xy) for t in ax.texts if getattr(t, 'arrow_patch', None)]
        names = [t.get_text() for t in ax.texts if t.get_text()]
        return ax, marks[True], marks[False], arrows, names

    yield draw
    plt.close('all')


def test_the_plane_of_one_task(drawn, weights):
    ax, dots, rings, arrows, names = drawn(
        scoreboard(row('x2', 'input', 28, 0.3), row('x2', 'a', 30, 0.2), row('x2', 'b', 29, 0.1))
    )
    assert sorted(dots) == [(29, 0.1), (30, 0.2)] and rings == [(28, 0.3)]
    assert sorted(arrows) == [((28, 0.3), (29, 0.1)), ((28, 0.3), (30, 0.2))]
    assert sorted(names) == ['a', 'b']
    assert ax.yaxis_inverted() and [t.get_text() for t in ax.get_legend().texts] == ['x2']


def test_the_plane_of_several_tasks(drawn, weights):
    n = len(TASKS)
    rows = [row(t, m, 25 + i, 0.1 * i) for t in TASKS for i, m in enumerate(['input', 'a', 'b'])]
    rows.append(row('new', 'alone', 31, 0.4))  # without an input: a dot and no arrow
    ax, dots, rings, arrows, names = drawn(scoreboard(*rows))
    assert sorted(dots) == sorted([(26, 0.1), (27, 0.2)] * n + [(31, 0.4)])
    assert rings == [(25, 0)] * n
    assert len(arrows) == 2 * n and all(start == (25, 0) for start, _ in arrows)
    assert sorted(names) == ['a'] * n + ['alone'] + ['b'] * n
    assert [t.get_text() for t in ax.get_legend().texts] == sorted([*TASKS, 'new'])


def test_no_name_of_the_plane_covers_another(drawn, weights):
    near = [row('x2', f'model {i}', 30 + 0.01 * i, 0.2) for i in range(4)]
    ax, dots, _, _, names = drawn(scoreboard(row('x2', 'input', 28, 0.3), *near))
    assert len(dots) == len(names) == 4
    boxes = [t.get_window_extent() for t in ax.texts if t.get_text()]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(ax.get_window_extent().contains(*corner) for b in boxes for corner in b.corners())


def test_the_plane_without_a_model(drawn, weights):
    _, dots, rings, _, names = drawn(scoreboard(row('x2', 'input', 28, 0.3)))
    assert (dots, rings, names) == ([], [(28, 0.3)], [])


def test_the_plane_with_a_model_that_has_no_feature_distance(drawn, weights):
    some = {'task': 'x2', 'model': 'a', 'dB': 30}
    *_, names = drawn(scoreboard(row('x2', 'input', 28, 0.3), some, row('x2', 'b', 29, 0.2)))
    assert names == ['b']


# LPIPS


@pytest.fixture
def store(monkeypatch, tmp_path):
    "Where torch keeps what it has downloaded: empty, and nobody answers where it would ask."
    from torchvision.models import SqueezeNet1_1_Weights

    row = SqueezeNet1_1_Weights.IMAGENET1K_V1.value
    monkeypatch.setattr(row, 'url', f'http://127.0.0.1:9/{row.url.rsplit("/")[-1]}')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    module._load_lpips.cache_clear()
    yield tmp_path / 'torch' / 'hub' / 'checkpoints'
    module._load_lpips.cache_clear()


@pytest.fixture
def network_is_there(store):
    store.mkdir(parents=True)
    (store / 'squeezenet1_1-b8a52dc0.pth').symlink_to(SQUEEZENET)


@needs(SQUEEZENET)
def test_lpips_is_that_of_torchmetrics(network_is_there):
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

    photo = sample_photo('cat').crop((60, 40, 188, 136))
    blurred = [photo.filter(ImageFilter.GaussianBlur(r)) for r in (0.7, 1.5, 3)]
    assert lpips(photo, photo) == pytest.approx(0, abs=1e-6)
    values = [lpips(b, photo) for b in blurred]
    assert type(values[0]) is float and 0.01 < values[0] < values[1] < values[2]
    several = lpips(torch.cat([to_tensor(b) for b in blurred]), to_tensor(photo).repeat(3, 1, 1, 1))
    assert several.shape == (3,) and several.tolist() == [
        pytest.approx(v, abs=1e-5) for v in values
    ]
    expected = [
        float(
            learned_perceptual_image_patch_similarity(
                to_tensor(b), to_tensor(photo), net_type='squeeze', normalize=True
            )
        )
        for b in blurred
    ]
    assert values == pytest.approx(expected, abs=1e-6)
    # a prediction a little out of range is cut off first: torchmetrics would refuse it
    x = to_tensor(photo)
    assert lpips(x * 1.4 - 0.2, x)[0] == pytest.approx(
        float(lpips((x * 1.4 - 0.2).clamp(0, 1), x)[0]), abs=1e-6
    )


@needs(SQUEEZENET)
def test_lpips_of_a_target_a_little_out_of_range(network_is_there):
    x = batch(1, 3, 40, 40)
    expected = lpips(x, (x * 1.2).clamp(0, 1))
    torch.testing.assert_close(lpips(x, x * 1.2), expected)


def test_lpips_offline(store):
    with pytest.raises(EnhanceError, match='could not be downloaded') as error:
        lpips(noise((40, 40)), noise((40, 40)))
    assert 'LPIPS' in one_line(error) and 'feature_distance' in one_line(error)


def test_lpips_needs_color():
    with pytest.raises(EnhanceError, match='color') as error:
        lpips(noise((40, 40), 'L'), noise((40, 40), 'L'))
    assert '(1, 40, 40)' in one_line(error)
    with pytest.raises(EnhanceError, match="'resnet'.*'squeeze', 'alex' or 'vgg'"):
        lpips(noise((40, 40)), noise((40, 40)), 'resnet')


def test_lpips_needs_pictures_that_are_large_enough():
    for size in ((31, 40), (40, 31)):
        with pytest.raises(EnhanceError, match='32×32'):
            lpips(noise(size), noise(size))
