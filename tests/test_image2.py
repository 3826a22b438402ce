"""The calls of Image 2.0 and of super-resolution in real time."""

import numpy as np
import pytest
from echo import Same, Twice
from PIL import Image

import enhance_lib.applications.image2 as module
from enhance_lib.applications.image2 import compare, enhance_image, predict, upgrade
from enhance_lib.toolbox.datasets import sample_photo
from enhance_lib.toolbox.errors import EnhanceError
from enhance_lib.toolbox.files import open_photo, save_photo
from enhance_lib.toolbox.models import load_model


@pytest.fixture(scope='module')
def cat():
    return sample_photo('cat').crop((100, 50, 220, 130))  # 120×80, an eye


# Enlarge and enhance in steps


def test_rounds_enlarge_and_enhance(cat):
    model = Same()
    assert predict(model, cat, 2, 3, device='cpu').size == (240, 160)
    # 2 ** (1/3) and 2 ** (2/3) times 80 and 120
    assert model.sizes == [(101, 151), (127, 190), (160, 240)]
    model = Same()
    predict(model, cat, 2, 1, enhance_first=True, device='cpu')
    assert model.sizes == [(80, 120), (160, 240)]


def test_rounds_of_a_model_that_enlarges_have_the_size_of_the_step_as_output(cat):
    model = Twice()
    assert predict(model, cat, 4, 2, device='cpu').size == (480, 320)
    assert model.sizes == [(80, 120), (160, 240)]
    model = Twice()
    assert predict(model, cat, 1.5, 1, enhance_first=True, device='cpu').size == (180, 120)
    assert model.sizes == [(80, 120), (60, 90)]


def test_one_round_is_lanczos_and_the_model(cat):
    larger = cat.resize((240, 160), Image.Resampling.LANCZOS)
    assert predict(Same(), cat, 2, 1, device='cpu').tobytes() == larger.tobytes()
    model = load_model()
    assert model.card['name'] == 'jpeg-blind'
    expected = np.asarray(model.predict(larger)).astype(int)
    got = np.asarray(predict(model, cat, 2, 1, device='cpu')).astype(int)
    assert np.abs(got - expected).max() <= 1


def test_upgrade_enhances_tiny_photos_first(cat):
    # the shorter side is 80: 3.5 times; first from level 3 and scale 3 up
    for level, rounds in ((3, 4), (2, 2)):
        model = Same()
        assert upgrade(model, cat, level, device='cpu').size == (420, 280)
        assert len(model.sizes) == rounds
    model = Same()
    assert upgrade(model, cat, 3, enlarge=False, device='cpu').size == cat.size
    assert len(model.sizes) == 3


def test_compare_gives_the_upgraded_and_the_merely_enlarged_photo(cat, tmp_path):
    cat.save(tmp_path / 'cat.png')
    better, larger = compare(load_model('jpeg-q10'), tmp_path / 'cat.png', device='cpu')
    assert better.size == larger.size == (420, 280)
    assert larger.tobytes() == cat.resize((420, 280), Image.Resampling.LANCZOS).tobytes()
    assert better.tobytes() != larger.tobytes()


@pytest.mark.parametrize('mode', ['L', 'LA', 'RGB', 'RGBA'])
def test_predict_keeps_the_mode(cat, mode):
    assert predict(load_model('jpeg-q10'), cat.convert(mode), 1.5, 2, device='cpu').mode == mode


def test_settings_of_steps_that_are_not_possible(cat):
    for options, words in (
        ({'scale_factor': 200}, 'more than 100,000,000'),
        ({'scale_factor': 0}, 'scale of 0'),
        ({'enhancement_level': 11}, 'level of 11'),
    ):
        with pytest.raises(EnhanceError, match=words):
            predict(Same(), cat, **options)


# Enlarge in real time


class Four(Same):
    "Each pixel becomes 4×4."

    scale = 4

    def forward(self, x):
        return super().forward(x).repeat_interleave(4, 2).repeat_interleave(4, 3)


@pytest.fixture
def tiny():
    return Four()


@pytest.mark.parametrize('mode', ['L', 'RGB', 'RGBA', 'LA', 'P', 'I;16', 'CMYK', '1'])
def test_photos_of_any_mode_are_enlarged(mode, tiny, tmp_path):
    photo = sample_photo('cat').crop((0, 0, 12, 9))
    if mode == 'I;16':
        photo = Image.fromarray(np.asarray(photo.convert('L'), np.uint16) * 257)
    else:
        photo = photo.convert(mode)
    better = enhance_image(photo, sr_path=tmp_path / 'better.png', model=tiny)
    assert better.size == (48, 36)
    assert better.mode == {'L': 'L', '1': 'L', 'I;16': 'L', 'LA': 'LA', 'RGBA': 'RGBA'}.get(
        mode, 'RGB'
    )
    assert open_photo(tmp_path / 'better.png', None).size == (48, 36)


def test_a_photo_or_a_path(tiny, tmp_path):
    "Both give the same, and one of them is needed."
    photo = sample_photo('cat').crop((0, 0, 12, 9))
    path = save_photo(photo, tmp_path / 'small.png')
    assert enhance_image(lr_path=path, model=tiny) == enhance_image(photo, model=tiny)
    for options in ({}, {'lr_image': photo, 'lr_path': path}):
        with pytest.raises(EnhanceError, match='either'):
            enhance_image(**options, model=tiny)


def test_it_can_be_shown(tiny, monkeypatch):
    shown = {}
    monkeypatch.setattr(module, 'show_photos', lambda photos, width: shown.update(photos))
    enhance_image(Image.new('L', (9, 9)), visualize=True, model=tiny)
    assert [p.size for p in shown.values()] == [(36, 36)] * 2


@pytest.mark.parametrize('size', [(7, 100), (100, 7), (1, 1)])
def test_too_small_a_photo_is_refused(size, tiny):
    with pytest.raises(EnhanceError, match='8×8 or more') as error:
        enhance_image(Image.new('RGB', size), model=tiny)
    assert '\n' not in str(error.value)


def test_too_large_an_output_is_refused_before_it_is_computed(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(Four, 'predict', lambda *a, **k: pytest.fail('it was computed'))
    with pytest.raises(EnhanceError, match='10400×10400 pixels, more than 100,000,000') as error:
        enhance_image(Image.new('RGB', (2600, 2600)), sr_path=tmp_path / 'a.png', model=tiny)
    assert '\n' not in str(error.value)
    with pytest.raises(EnhanceError, match='48×48'):
        enhance_image(Image.new('RGB', (12, 12)), model=tiny, max_pixels=2000)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('scale', [1, 3, 8, 0, -4])
def test_a_scale_that_there_is_no_model_for(scale, tiny):
    with pytest.raises(EnhanceError, match='2 or 4'):
        enhance_image(Image.new('RGB', (9, 9)), scale=scale)
    with pytest.raises(EnhanceError, match='enlarges 4 times'):
        enhance_image(Image.new('RGB', (9, 9)), scale=scale, model=tiny)


def test_what_is_no_photo(tiny, tmp_path):
    (tmp_path / 'text.jpg').write_text('no photo at all')
    for path in (tmp_path / 'text.jpg', tmp_path / 'none.png', tmp_path):
        with pytest.raises(EnhanceError) as error:
            enhance_image(lr_path=path, sr_path=tmp_path / 'out.png', model=tiny)
        assert path.name in str(error.value)
    assert not (tmp_path / 'out.png').exists()
