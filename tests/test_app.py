"""The app: its parts, and as visitors use it, in JupyterLab and in Voilà, driven in a browser."""

import importlib.util
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import urllib.error
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from enhance_lib.app import CompareSlider, DownloadButton
from enhance_lib.applications.enhance_app import MAX_UPLOAD, EnhanceApp
from enhance_lib.enhance import enhance
from enhance_lib.toolbox.datasets import sample_photo
from enhance_lib.toolbox.errors import EnhanceError
from enhance_lib.toolbox.files import encode_photo, open_photo
from enhance_lib.toolbox.show import uploaded_file

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope='module')
def cat():
    return sample_photo('cat').crop((100, 50, 220, 130))  # 120×80, an eye


@pytest.fixture(scope='module')
def phone(cat):
    "The content of a phone's JPEG: the camera was turned."
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    cat.save(file, 'JPEG', quality=60, exif=exif)
    return file.getvalue()


def upload(app, name, content):
    "Choose a file, as FileUpload of ipywidgets 8 reports it."
    now = datetime.now(UTC)
    file = {'name': name, 'type': '', 'size': len(content), 'last_modified': now}
    app.upload.value = ({**file, 'content': memoryview(content)},)


def text(app):
    return re.sub('<[^>]*>', '', app.says.value)


# The slider


def test_slider_shows_both_pictures_as_they_are():
    red, blue = (Image.new('RGB', (100, 40), c) for c in ('red', 'blue'))
    slider = CompareSlider(red, blue, position=30, labels=['', ''])
    for trait, color in (('before', (255, 0, 0)), ('after', (0, 0, 255))):
        picture = np.asarray(open_photo(getattr(slider, trait))).astype(int)
        assert np.abs(picture - color).max() <= 2
    row = np.asarray(slider.picture())[35]
    assert (row[:28, 0] > 250).all() and (row[33:, 2] > 250).all()


def test_slider_stays_on_the_picture(cat):
    slider = CompareSlider(cat, cat)
    for asked, given in ((-5, 0), (130, 100), (42.5, 42.5)):
        slider.position = asked
        assert slider.position == given


def test_slider_lays_transparent_photos_on_white():
    clear = Image.new('RGBA', (30, 20), (0, 0, 0, 0))
    assert np.asarray(open_photo(CompareSlider(clear, clear).before)).min() > 250


def test_slider_of_two_sizes_is_refused(cat):
    with pytest.raises(EnhanceError, match='120×80 and 60×40'):
        CompareSlider(cat, cat.resize((60, 40)))


def test_pages_without_a_kernel_show_a_picture(cat):
    data, _ = CompareSlider(cat, cat)._repr_mimebundle_()
    assert set(data) >= {'application/vnd.jupyter.widget-view+json', 'image/png'}
    import base64

    assert Image.open(io.BytesIO(base64.b64decode(data['image/png']))).size == cat.size


def test_download_answers_only_what_it_knows():
    sent = []
    button = DownloadButton(lambda: ('a.webp', b'12'))
    button.send = lambda message, buffers: sent.append((message, buffers))
    button.answer(button, {'wanted': 'secrets'}, [])
    assert sent == []
    button.answer(button, {'wanted': 'file'}, [])
    assert sent == [({'name': 'a.webp', 'type': 'image/webp'}, [b'12'])]
    button.make = lambda: None  # there is no file yet, or making it failed with a sentence
    button.answer(button, {'wanted': 'file'}, [])
    assert len(sent) == 1


# The app without a browser


def test_upload_of_ipywidgets_7_and_8():
    "Colab has long had 7, whose value is a dict."
    seven = type('Upload', (), {'value': {'a.png': {'metadata': {}, 'content': b'12'}}})
    eight = type('Upload', (), {'value': ({'name': 'a.png', 'content': memoryview(b'12')},)})
    assert uploaded_file(seven) == uploaded_file(eight) == ('a.png', b'12')
    for nothing in ({}, ()):
        assert uploaded_file(type('Upload', (), {'value': nothing})) is None


def test_a_visit(cat, phone):
    app = EnhanceApp(device='cpu')
    assert app.go.disabled and app.download.layout.display == 'none'
    upload(app, 'phone.jpg', phone)
    assert '80×120 pixels' in text(app), 'it should stand upright'
    assert app.upload.value == (), 'or the same file could not be chosen again'
    app.go.click()
    assert app.wait()
    assert '280×420 pixels. JPEG of quality 60' in text(app)
    assert app.slider and app.download.layout.display is None
    name, content = app._file()
    assert name == 'phone-enhanced.jpg'
    assert content == enhance(phone, device='cpu').encode(name)
    upload(app, 'next.png', encode_photo(cat, 'next.png'))
    assert app.result is None and app.download.layout.display == 'none', 'of the photo before'


def test_colab_is_asked_to_show_custom_widgets(monkeypatch):
    asked = []
    output = types.SimpleNamespace(enable_custom_widget_manager=lambda: asked.append('yes'))
    monkeypatch.setitem(sys.modules, 'google.colab', types.SimpleNamespace(output=output))
    EnhanceApp()
    assert asked == ['yes']


def test_settings_are_used(cat):
    app = EnhanceApp(device='cpu')
    upload(app, 'a.png', encode_photo(cat, 'a.png'))
    app.model.options = [*app.model.options, ('srcnn-x2', 'srcnn-x2')]
    app.model.value, app.scale.value, app.strength.value = 'srcnn-x2', 2, 0.5
    app.go.click()
    assert app.wait()
    expected = enhance(cat, 'srcnn-x2', 2, strength=0.5, device='cpu')
    assert (app.result.pixels == expected.pixels).all()
    assert 'srcnn-x2, as asked' in text(app)


def test_sample_has_an_original_and_so_numbers():
    app = EnhanceApp(device='cpu')
    app.sample.value = 'coffee'
    app.go.click()
    assert app.wait()
    before, after = map(
        float, re.search(r'([\d.]+) dB before, ([\d.]+) dB after', text(app)).groups()
    )
    assert after > before > 20


def test_models_can_be_chosen_once_they_are_known():
    app, end = EnhanceApp(), time.monotonic() + 30
    while len(app.model.options) == 1:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert ('realtime-x4', 'realtime-x4') in app.model.options


@pytest.mark.parametrize(
    'name, content, words',
    [
        ('notes.jpg', b'buy milk', 'not a photo'),
        ('empty.png', b'', '0 bytes'),
        ('half.jpg', None, 'damaged'),
        ('large.png', b'0' * 3000, 'more than 0.0025 MB'),
    ],
)
def test_files_that_are_refused_with_a_sentence(phone, name, content, words):
    app = EnhanceApp(max_upload=2500)
    upload(app, name, phone[:1500] if content is None else content)
    assert words in text(app) and name in text(app) and app.go.disabled
    assert 'class="error"' in app.says.value


def test_a_name_is_text_and_never_code(cat):
    app = EnhanceApp()
    upload(app, '<img src=x onerror=alert(1)>.png', encode_photo(cat, 'a.png'))
    assert '<img' not in app.says.value and '&lt;img' in app.says.value


@pytest.mark.parametrize(
    'error', [EnhanceError("'a.png': too bright."), RuntimeError('/home/me/x')]
)
def test_errors_of_the_work_are_sentences_without_paths(cat, error, monkeypatch):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr('enhance_lib.enhance.enhance', fails)
    app = EnhanceApp()
    upload(app, 'a.png', encode_photo(cat, 'a.png'))
    app.go.click()
    assert app.wait()
    told = str(error) if isinstance(error, EnhanceError) else 'Something went wrong (RuntimeError)'
    assert told.replace("'", '&#x27;') in app.says.value and '/home' not in app.says.value
    assert not app.go.disabled, 'it has to go on working'


def test_cancel_stops_between_tiles(cat, monkeypatch):
    reached, go_on = threading.Event(), threading.Event()

    def slow(*args, progress, **kwargs):
        progress(0.1)
        reached.set()
        go_on.wait(30)
        progress(0.2)
        raise AssertionError('the second tile should not have been reached')

    monkeypatch.setattr('enhance_lib.enhance.enhance', slow)
    app = EnhanceApp()
    upload(app, 'a.png', encode_photo(cat, 'a.png'))
    app.go.click()
    assert reached.wait(30)
    assert app.bar.value == 0.1 and app.cancel.layout.display is None and app.upload.disabled
    app.go.click()  # a second press while it works does nothing
    app.cancel.click()
    go_on.set()
    assert app.wait()
    assert text(app) == 'Canceled.' and app.result is None and not app.go.disabled


def test_a_photo_that_arrives_in_the_middle_does_not_mix_with_the_other(cat, monkeypatch):
    go_on = threading.Event()

    def slow(content, **kwargs):
        go_on.wait(30)
        return enhance(content, 'jpeg-q10', 1)

    monkeypatch.setattr('enhance_lib.enhance.enhance', slow)
    app = EnhanceApp()
    upload(app, 'first.png', encode_photo(cat, 'a.png'))
    app.go.click()
    upload(app, 'second.png', encode_photo(cat.resize((50, 50)), 'a.png'))
    assert 'second.png' in text(app) and 'later' in text(app)
    go_on.set()
    assert app.wait()
    assert app.result.photo.size == cat.size and app._file()[0] == 'first-enhanced.png'


def test_an_error_after_the_work_does_not_leave_it_busy(cat, monkeypatch):
    monkeypatch.setattr(EnhanceApp, '_sentence', lambda *args: 1 / 0)
    app = EnhanceApp(device='cpu')
    upload(app, 'a.png', encode_photo(cat, 'a.png'))
    app.go.click()
    assert app.wait()
    assert 'ZeroDivisionError' in text(app) and not app.go.disabled and app.result is None


def test_cancel_after_the_end_says_nothing(cat):
    app = EnhanceApp(device='cpu')
    upload(app, 'a.png', encode_photo(cat, 'a.png'))
    app.go.click()
    assert app.wait()
    said = text(app)
    app.cancel.click()
    assert text(app) == said and app.result


def test_pages_that_are_left_out_are_spoken_of(cat):
    file = io.BytesIO()
    cat.save(file, 'TIFF', save_all=True, append_images=[cat, cat])
    app = EnhanceApp(device='cpu')
    upload(app, 'scan.tif', file.getvalue())
    assert '3 frames; only the first is used' in text(app) and text(app).endswith('Press Enhance.')


def test_transparency_that_a_download_cannot_have_is_spoken_of(cat):
    clear = cat.convert('RGBA')
    clear.putalpha(100)
    app = EnhanceApp(device='cpu')
    upload(app, 'a.png', encode_photo(clear, 'a.png'))
    app.go.click()
    assert app.wait()
    assert app._file()[0] == 'a-enhanced.png' and 'transparency' not in text(app)
    app.name = 'a.bmp'  # as if it had come as one
    assert app._file()[0] == 'a-enhanced.bmp' and 'no transparency' in text(app)


def test_zoom_shows_a_piece_of_the_full_picture(cat):
    app = EnhanceApp(device='cpu', preview=90)
    upload(app, 'a.png', encode_photo(cat, 'a.png'))
    app.scale.value = 2
    app.go.click()
    assert app.wait()
    assert open_photo(app.slider.after).size == (90, 60)
    app.slider.focus = [0.75, 0.5]
    assert app.zoom.value and app.slider.focus == []
    piece = open_photo(app.slider.after)
    assert piece.size == (90, 90)
    # 30 pixels of the result around 3/4 of its width and half of its height
    expected = app.result.photo.crop((165, 65, 195, 95)).resize((90, 90), Image.Resampling.NEAREST)
    difference = np.asarray(piece).astype(int) - np.asarray(expected)
    assert np.abs(difference).mean() < 3
    app.slider.focus = [0.1, 0.1]
    assert not app.zoom.value and open_photo(app.slider.after).size == (90, 60)


def test_download_of_a_format_that_cannot_be_written_is_png(cat):
    app = EnhanceApp(device='cpu')
    upload(app, 'photo', encode_photo(cat, 'a.png'))
    app.go.click()
    assert app.wait()
    name, content = app._file()
    assert name == 'photo-enhanced.png' and Image.open(io.BytesIO(content)).format == 'PNG'


def test_the_page_does_not_wait_for_torch():
    "The app is there before torch is imported."
    code = (
        'import sys, enhance_lib.applications.enhance_app\n'
        'large = {"torch", "fastai", "pandas"} & set(sys.modules)\n'
        'sys.exit(f"imported: {large}" if large else 0)'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Serving it


@pytest.mark.parametrize('host', ['0.0.0.0', '192.168.1.7', '::', 'example.org'])
def test_it_does_not_listen_elsewhere_without_a_token(host):
    command = [sys.executable, ROOT / 'tools' / 'app.py', '--host', host, '--no-browser']
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and 'TOKEN=' in done.stderr and 'Traceback' not in done.stderr


@pytest.mark.parametrize(
    'host, expected',
    [
        ('192.168.0.7', 'http://192.168.0.7:9000/?token=a%20b%26c%231'),
        ('::1', 'http://[::1]:9000/?token=a%20b%26c%231'),
        ('0.0.0.0', f'http://{socket.gethostname()}:9000/?token=a%20b%26c%231'),
        ('::', f'http://{socket.gethostname()}:9000/?token=a%20b%26c%231'),
        ('photos.example', 'http://photos.example:9000/?token=a%20b%26c%231'),
    ],
)
def test_the_address_shown_is_one_that_others_can_open(host, expected):
    spec = importlib.util.spec_from_file_location('serve_app', ROOT / 'tools' / 'app.py')
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.address(host, 9000, 'a b&c#1') == expected


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def serve(command, port, log, **environment):
    "A server, and its address once it answers."
    process = subprocess.Popen(
        command,
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, **environment},
        start_new_session=True,
    )
    address, end = f'http://127.0.0.1:{port}', time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f'{address}/api')
            break
        except urllib.error.HTTPError:  # it answers
            break
        except OSError:
            assert process.poll() is None and time.monotonic() < end, Path(log.name).read_text()
            time.sleep(0.1)
    return process, address


def stop(process):
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(20)


CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser')
needs_browser = pytest.mark.skipif(
    CHROMIUM is None,
    reason='no browser: apt-get install chromium (Debian) gives the tests one',
)


@pytest.fixture(scope='module')
def browser():
    from playwright.sync_api import sync_playwright

    quiet = '--no-sandbox --disable-gpu --disable-background-networking --disable-component-update'
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, headless=True, args=quiet.split()
        )
        yield browser
        browser.close()


class Visit:
    "A page that remembers what it asked for and what went wrong on it."

    def __init__(self, browser, address):
        self.page = browser.new_page(viewport={'width': 1100, 'height': 1000})
        self.asked, self.errors = [], []
        self.page.on('request', lambda request: self.asked.append(request.url))
        self.page.on('pageerror', lambda error: self.errors.append(str(error)))
        self.page.on(
            'console',
            lambda message: self.errors.append(message.text) if message.type == 'error' else None,
        )
        self.address = address

    def choose(self, path):
        with self.page.expect_file_chooser() as chooser:
            self.page.get_by_text('Choose a photo').click()
        chooser.value.set_files(path)

    def says(self, words, seconds=60):
        self.page.get_by_role('status').filter(has_text=words).wait_for(timeout=1000 * seconds)

    def enhance(self):
        self.page.get_by_role('button', name='Enhance').click()

    def check_slider(self):
        slider = self.page.get_by_role('slider', name='Compare before and after')
        box = slider.bounding_box()
        where = lambda share: (box['x'] + share * box['width'], box['y'] + 60)  # noqa: E731
        self.page.mouse.move(*where(0.5))
        self.page.mouse.down()
        self.page.mouse.move(*where(0.3))
        self.page.mouse.up()
        assert slider.get_attribute('aria-valuenow') == '30'
        slider.focus()
        for key, position in (('ArrowRight', 32), ('PageDown', 22), ('End', 100), ('Home', 0)):
            self.page.keyboard.press(key)
            assert slider.get_attribute('aria-valuenow') == str(position)

    def download(self):
        with self.page.expect_download() as download:
            self.page.get_by_role('button', name='Download').click()
        return download.value.suggested_filename, Path(download.value.path()).read_bytes()

    def check_quiet(self, allowed=()):
        elsewhere = [
            url for url in self.asked if not url.startswith((self.address, 'blob:', 'data:'))
        ]
        assert elsewhere == [], 'no request to another host'
        ours = [e for e in self.errors if not any(words in e for words in allowed)]
        assert ours == []


@pytest.fixture(scope='module')
def files(tmp_path_factory, cat, phone):
    folder = tmp_path_factory.mktemp('files')
    cat.save(folder / 'cat.png')
    (folder / 'phone.jpg').write_bytes(phone)
    (folder / 'notes.jpg').write_text('buy milk')
    noise = np.random.default_rng(0).integers(0, 256, (1800, 3800, 3), np.uint8)
    Image.fromarray(noise).save(folder / 'twenty.png', compress_level=0)  # 20.5 MB
    with (folder / 'over.png').open('wb') as file:
        file.truncate(MAX_UPLOAD + 1)
    return folder


def visit_with(files, page, wait=60):
    "What every visitor does, wherever the app runs."
    for name, where in (('cat.png', '420×280'), ('phone.jpg', '280×420')):
        page.choose(files / name)
        page.says('Press Enhance')
        page.enhance()
        page.says(f'{where} pixels', wait)
        page.check_slider()
        got, content = page.download()
        stem, suffix = name.split('.')
        assert got == f'{stem}-enhanced.{suffix}'
        assert content == enhance(files / name).encode(got)
    page.choose(files / 'notes.jpg')
    page.says('not a photo')
    page.choose(files / 'over.png')
    page.says('more than 50 MB')
    page.choose(files / 'twenty.png')
    page.says('twenty.png: 3800×1800 pixels. Press Enhance.')


@pytest.fixture(scope='module')
def voila(tmp_path_factory):
    port, log = free_port(), tmp_path_factory.mktemp('voila') / 'log'
    command = [sys.executable, ROOT / 'tools' / 'app.py', '--port', str(port), '--no-browser']
    with log.open('w') as file:
        process, address = serve(command, port, file)
        yield address
        stop(process)


@needs_browser
def test_in_voila(browser, voila, files):
    page = Visit(browser, voila)
    page.page.goto(voila)
    page.page.get_by_text('Choose a photo').wait_for(timeout=30_000)
    assert page.page.get_by_role('button', name='Enhance').is_disabled()
    visit_with(files, page)
    page.check_quiet()
    page.page.close()


@needs_browser
def test_visitors_do_not_see_each_other(browser, voila, files):
    pages = [Visit(browser, voila) for _ in range(2)]
    for page in pages:
        page.page.goto(voila)
        page.page.get_by_text('Choose a photo').wait_for(timeout=30_000)
    pages[0].choose(files / 'cat.png')
    pages[0].says('cat.png')
    pages[1].choose(files / 'phone.jpg')
    pages[1].says('phone.jpg')
    assert pages[0].page.get_by_text('phone.jpg').count() == 0
    for page in pages:
        page.page.close()


@needs_browser
def test_in_jupyterlab(browser, files, tmp_path):
    shutil.copy(ROOT / 'app' / 'enhance.ipynb', tmp_path)
    port, token = free_port(), 'letmein'
    options = ['--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={port}']
    options += [
        f'--config={ROOT / "app" / "jupyter_lab.json"}',
        f'--IdentityProvider.token={token}',
    ]
    folders = {f'JUPYTER{name}_DIR': str(tmp_path / name) for name in ('_CONFIG', 'LAB_SETTINGS')}
    with (tmp_path / 'log').open('w') as log:
        command = [sys.executable, '-m', 'jupyterlab', *options, f'--notebook-dir={tmp_path}']
        process, address = serve(command, port, log, **folders)
        page = Visit(browser, address)
        try:
            page.page.goto(f'{address}/lab/tree/enhance.ipynb?token={token}')
            run = page.page.get_by_text('Run', exact=True).first
            run.wait_for(timeout=60_000)
            # "Run All Cells" does nothing before the kernel is there, and says nothing.
            page.page.get_by_text('Python 3 (ipykernel) | Idle').wait_for(timeout=120_000)
            news = page.page.get_by_role('button', name='No', exact=True)
            if news.count():  # whether it may fetch news
                news.click()
            run.click()
            page.page.get_by_text('Run All Cells', exact=True).click()
            page.page.get_by_text('Choose a photo').wait_for(timeout=60_000)
            visit_with(files, page)
            page.check_quiet(allowed=('news', 'Failed to load resource', 'kernel'))
        finally:
            page.page.close()
            stop(process)


def test_the_app_is_one_cell():
    nb = json.loads((ROOT / 'app' / 'enhance.ipynb').read_text(encoding='utf-8'))
    assert [''.join(c['source']) for c in nb['cells']] == [
        'from enhance_lib.applications.enhance_app import EnhanceApp\n\nEnhanceApp()'
    ]
