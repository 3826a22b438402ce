"""Budget, pictures, sliders, uploads and checks: what the notebook on `toolbox.show` leaves out."""

import base64
import io
from types import SimpleNamespace

import numpy as np
import pytest
from common import assert_same, encoded, noise, refused
from matplotlib import pyplot as plt
from PIL import Image

from enhance_lib.toolbox.show import (
    Budget,
    PhotoSliders,
    check,
    save_gif,
    show_photos,
    upload_button,
    uploaded_file,
    uploaded_photo,
    use_small_figures,
)


def test_budget(monkeypatch):
    monkeypatch.delenv('ENHANCE_BUDGET', raising=False)
    assert Budget().name == 'lesson'
    monkeypatch.setenv('ENHANCE_BUDGET', '')
    assert Budget().name == 'lesson'
    monkeypatch.setenv('ENHANCE_BUDGET', 'smoke')
    assert Budget()(1, 2, 3) == 1
    assert repr(Budget()) == "Budget('smoke')"
    assert [Budget(name)(1, 2, 3) for name in ('smoke', 'lesson', 'full')] == [1, 2, 3]
    monkeypatch.setenv('ENHANCE_BUDGET', 'huge')
    with refused("'huge'", 'smoke, lesson, full'):
        Budget()
    assert Budget('full').name == 'full'


# --- pictures ---------------------------------------------------------------------------------


@pytest.fixture
def figure(monkeypatch):
    "A function that shows photos, and gives the figure."
    monkeypatch.setattr(plt, 'show', lambda: None)

    def show(*args, **kwargs):
        show_photos(*args, **kwargs)
        return plt.gcf()

    yield show
    plt.close('all')


def seen(fig):
    "The pictures of a figure, by title."
    return {ax.get_title(): ax.images[0].get_array() for ax in fig.axes if ax.images}


def test_photos_with_their_titles(figure):
    photos = {'one': noise(), 'two': noise(mode='L'), 'three': noise(mode='RGBA')}
    for fig in figure(photos), figure(list(photos.values()), list(photos)):
        assert list(seen(fig)) == list(photos)
        for title, array in seen(fig).items():
            assert np.array_equal(array, np.asarray(photos[title]))


def test_a_part_of_each_photo(figure):
    (array,) = seen(figure([noise()], box=(3, 2, 13, 9))).values()
    assert np.array_equal(array, np.asarray(noise())[2:9, 3:13])


@pytest.mark.parametrize(
    'n, cols, rows_and_cols', [(3, None, (1, 3)), (5, None, (2, 4)), (5, 2, (3, 2))]
)
def test_rows(figure, n, cols, rows_and_cols):
    fig = figure([noise(seed=i) for i in range(n)], cols=cols)
    assert fig.axes[0].get_gridspec().get_geometry() == rows_and_cols
    assert sum(bool(ax.images) for ax in fig.axes) == n
    assert sum(ax.axison for ax in fig.axes) == n  # and nothing where no photo is


def test_gray_is_shown_as_it_is(figure):
    "Not stretched from black to white."
    image = figure([Image.new('L', (9, 9), 100)]).axes[0].images[0]
    assert image.get_clim() == (0, 255) and image.get_cmap().name == 'gray'


@pytest.mark.parametrize('width, kind', [(50, 'nearest'), (3000, 'antialiased')])
def test_enlarged_pixels_are_squares(figure, width, kind):
    image = figure([noise((width, 10))], width=5).axes[0].images[0]
    assert image.get_interpolation() == kind


def test_nothing_to_show():
    for nothing in [], {}:
        with refused('no photos'):
            show_photos(nothing)


def test_small_figures(monkeypatch):
    asked = {}
    name = 'matplotlib_inline.backend_inline.set_matplotlib_formats'
    monkeypatch.setattr(name, lambda *kinds, **options: asked.update({kinds: options}))
    use_small_figures()
    assert asked == {('jpeg',): {'pil_kwargs': {'quality': 92}}}


# --- sliders ----------------------------------------------------------------------------------


@pytest.fixture
def sliders():
    "A gray photo whose level and width follow sliders; and what was asked of it."
    asked = []

    def draw(level, how_wide):
        asked.append((level, how_wide))
        return Image.new('L', (int(how_wide), 8), int(level))

    return PhotoSliders(draw, level=(0, 255, 1, 100), how_wide=(4, 40, 0.5, 20)), asked


def shown_by(widget):
    return Image.open(io.BytesIO(widget.picture.value))


def test_sliders_start_where_told(sliders):
    widget, asked = sliders
    assert widget.values == {'level': 100, 'how_wide': 20}
    assert asked == [(100, 20)]
    assert_same(shown_by(widget), Image.new('L', (20, 8), 100))
    level, how_wide = widget.sliders.values()
    assert (level.min, level.max, level.step, level.readout_format) == (0, 255, 1, '.0f')
    assert (how_wide.min, how_wide.max, how_wide.step, how_wide.readout_format) == (
        4,
        40,
        0.5,
        '.2f',
    )
    assert how_wide.description == 'how wide'


def test_a_slider_that_is_dragged_draws_anew(sliders):
    widget, asked = sliders
    first = widget.picture.value
    widget.sliders['level'].value = 200
    assert_same(shown_by(widget), Image.new('L', (20, 8), 200))
    widget.sliders['how_wide'].value = 30.5
    assert_same(shown_by(widget), Image.new('L', (30, 8), 200))
    assert widget.values == {'level': 200, 'how_wide': 30.5}
    assert asked == [(100, 20), (200, 20), (200, 30.5)]
    widget.sliders['level'].value, widget.sliders['how_wide'].value = 100, 20
    assert widget.picture.value == first
    assert not any(slider.continuous_update for slider in widget.sliders.values())


def test_sliders_hold_their_limits(sliders):
    widget, _ = sliders
    widget.sliders['level'].value = 1000
    assert widget.values['level'] == 255


def test_sliders_leave_a_still_picture(sliders):
    "For pages without a kernel: of how the sliders stand when the cell runs."
    widget, _ = sliders
    widget.sliders['level'].value = 50
    bundle = widget._repr_mimebundle_()
    still = Image.open(io.BytesIO(base64.b64decode(bundle['image/png'])))
    assert still.format == 'PNG'
    assert_same(still, Image.new('L', (20, 8), 50))
    view = bundle['application/vnd.jupyter.widget-view+json']
    assert view['model_id'] == widget.box.model_id
    assert bundle['text/plain'] == "PhotoSliders({'level': 50.0, 'how_wide': 20.0})"
    assert {widget.picture, *widget.sliders.values()} <= set(everything_in(widget.box))


def everything_in(box):
    for child in box.children:
        yield child
        yield from everything_in(child) if hasattr(child, 'children') else ()


def test_gif(tmp_path):
    frames = [Image.new('RGB', (12, 9), color) for color in ('red', 'lime', 'blue')]
    path = save_gif(frames, tmp_path / 'a.gif', seconds=0.2)
    with Image.open(path) as gif:
        assert (gif.n_frames, gif.size, gif.info['loop']) == (3, (12, 9), 0)
        for i, frame in enumerate(frames):
            gif.seek(i)
            assert gif.info['duration'] == (1000 if i == 2 else 200)  # milliseconds
            assert_same(gif.convert('RGB'), frame)
    with refused('no frames'):
        save_gif([], tmp_path / 'b.gif')


# --- uploads and exercises --------------------------------------------------------------------


def test_uploaded_photo():
    data, other = encoded(noise(), 'PNG'), noise(seed=1)
    seven = SimpleNamespace(value={'a.png': {'metadata': {}, 'content': data}})
    eight = SimpleNamespace(value=({'name': 'a.png', 'content': memoryview(data)},))
    for button in seven, eight:
        assert_same(uploaded_photo(button, other), noise())
        assert uploaded_photo(button, other, 'L').mode == 'L'
    for nothing in {}, (), None:
        assert uploaded_photo(SimpleNamespace(value=nothing), other) is other
    with refused("'diary.jpg'"):
        text = {'name': 'diary.jpg', 'content': memoryview(b'Dear diary')}
        uploaded_photo(SimpleNamespace(value=(text,)), other)


def test_uploaded_file():
    seven = SimpleNamespace(value={'a.png': {'metadata': {}, 'content': b'data'}})
    eight = SimpleNamespace(value=({'name': 'a.png', 'content': memoryview(b'data')},))
    assert uploaded_file(seven) == uploaded_file(eight) == ('a.png', b'data')
    assert uploaded_file(upload_button()) is None


def test_upload_button():
    button = upload_button()
    assert button.accept == 'image/*' and not button.multiple
    assert uploaded_photo(button, 'nothing yet') == 'nothing yet'


@pytest.fixture
def shown(monkeypatch):
    "The Markdown that is displayed."
    texts = []
    monkeypatch.setattr('IPython.display.display', lambda markdown: texts.append(markdown.data))
    return texts


def test_check(shown):
    def wrong():
        assert 1 + 1 == 3, 'count again'

    def no_hint():
        raise AssertionError

    def broken():
        raise KeyError('y')

    assert check(lambda: None) is True
    assert [check(f) for f in (wrong, no_hint, broken)] == [False] * 3
    assert 'Right' in shown[0] and 'Not yet' not in shown[0]
    assert 'count again' in shown[1]
    assert 'not right yet' in shown[2]
    assert 'KeyError' in shown[3] and 'y' in shown[3]
    assert all('Not yet' in text for text in shown[1:])
