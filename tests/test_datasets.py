"""Samples, tables and sheets; and `get_dataset` against a server of our own."""

import hashlib
import io
import os
import re
import shutil
import sys
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from common import BANDS, assert_same, noise, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from enhance_lib.toolbox import datasets
from enhance_lib.toolbox.datasets import (
    DATASETS,
    SAMPLES,
    PhotoSet,
    data_folder,
    datasets_markdown,
    datasets_table,
    get_dataset,
    make_sheet,
    name_lot,
    read_table,
    sample_photo,
    sample_photos,
    split_sheet,
    write_table,
)
from enhance_lib.toolbox.files import find_photos, save_photo

# --- samples ---------------------------------------------------------------------------------


@pytest.mark.parametrize('name', SAMPLES)
def test_samples(name):
    photo = sample_photo(name)
    assert photo.mode == 'RGB'
    assert min(photo.size) >= 256
    assert np.asarray(photo).std() > 5  # a picture, and not a blank
    assert SAMPLES[name].split in ('train', 'held-out') and SAMPLES[name].license


def test_split_of_the_samples():
    "By photo, so that nothing a network learned from is ever in its score."
    held_out = sample_photos('held-out')
    assert list(held_out) == ['cat', 'coffee', 'china']
    train = [name for name, sample in SAMPLES.items() if sample.split == 'train']
    assert not set(train) & set(held_out)
    assert len(train) + len(held_out) == len(SAMPLES)
    assert len({s.load for s in SAMPLES.values()}) == len(SAMPLES)
    with refused("'validation'", 'held-out'):
        sample_photos('validation')
    with refused("'dog'", 'cat'):
        sample_photo('dog')


# --- tables ----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    "Twelve empty files by the names of photos."
    home = tmp_path / 'photos'
    (home / 'sub').mkdir(parents=True)
    for i in range(12):
        (home / ('sub' if i % 3 == 0 else '.') / f'{i:02}.jpg').touch()
    return home


def test_name_lot():
    "The first as coreutils says: printf a.jpg | b2sum -l 64."
    assert name_lot('a.jpg') == 0xFE47F0026E12A789 / 2**64
    lots = np.array([name_lot(f'{i}.jpg') for i in range(10_000)])
    assert 0 <= lots.min() and lots.max() < 1
    share = np.histogram(lots, 10, (0, 1))[0] / 1000
    assert np.abs(share - 1).max() < 0.12  # four standard deviations
    neighbors = np.corrcoef(lots[:-1], lots[1:])[0, 1]
    assert abs(neighbors) < 0.05


def test_table(tmp_path, folder):
    table = write_table(folder, tmp_path / 'out' / 'table.csv', 0.25)
    assert list(table) == ['fnames', 'is_val']
    assert table['fnames'].tolist() == [
        p.relative_to(folder).as_posix() for p in find_photos(folder)
    ]
    again = read_table(tmp_path / 'out' / 'table.csv', folder)
    assert again['is_val'].dtype == bool
    assert again.equals(table)
    lines = (tmp_path / 'out' / 'table.csv').read_text().splitlines()
    assert lines[0] == 'fnames,is_val' and len(lines) == 13
    # each photo's lot decides, and nothing else
    assert table['is_val'].tolist() == [name_lot(n) < 0.25 for n in table['fnames']]


@pytest.mark.parametrize('valid, count', [(0, 0), (0.001, 1), (1, 12)])
def test_share(tmp_path, folder, valid, count):
    assert write_table(folder, tmp_path / 'table.csv', valid)['is_val'].sum() == count


def test_share_is_about_what_was_asked(tmp_path):
    for i in range(400):
        (tmp_path / f'{i}.jpg').touch()
    table = write_table(tmp_path, tmp_path / 'table.csv', 0.2)
    assert abs(table['is_val'].mean() - 0.2) < 0.08  # four standard deviations


@pytest.mark.parametrize('valid', [-0.1, 1.1, 20, float('nan')])
def test_impossible_share(tmp_path, folder, valid):
    with refused(str(valid), '0 to 1'):
        write_table(folder, tmp_path / 'table.csv', valid)
    assert not (tmp_path / 'table.csv').exists()


@pytest.mark.parametrize('valid', [0.1, 0.2, 0.5, 0.75])
def test_split_is_stable(tmp_path, valid):
    "A photo that was trained on never joins the validation set, however many are added."
    before = {}
    for i in np.random.default_rng(0).permutation(30):
        (tmp_path / f'photo {i}.jpg').touch()
        table = write_table(tmp_path, tmp_path / 'table.csv', valid)
        after = dict(zip(table['fnames'], table['is_val']))
        assert len(after) == len(before) + 1
        assert not [name for name, held_back in before.items() if after[name] and not held_back]
        before = after


@pytest.mark.parametrize(
    'text, words',
    [
        ('fnames\na.jpg\n', ['no column is_val']),
        ('name,val\na.jpg,True\n', ['no column fnames and no column is_val']),
        ('fnames,is_val\na.jpg,perhaps\n', ['column is_val', 'True and False']),
        ('fnames,is_val\na.jpg,2\n', ['column is_val']),
        ('fnames,is_val\na.jpg,\nb.jpg,True\n', ['column is_val']),
        ('', ['not a CSV table']),
        ('fnames,is_val\na.jpg,True\nb,c,d,e\n', ['not a CSV table']),
        (b'\xff\xfe\0\x01', []),
        ('fnames,is_val\n,True\n', ['fnames']),
    ],
)
def test_bad_table(tmp_path, folder, text, words):
    path = tmp_path / 'table.csv'
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with refused('table.csv', *words):
        read_table(path, folder)


def test_a_table_is_text_whatever_its_name(tmp_path, folder):
    path = tmp_path / 'table.csv.gz'
    table = write_table(folder, path)
    assert read_table(path, folder).equals(table)


@pytest.mark.parametrize('yes, no', [('True', 'False'), ('true', 'FALSE'), ('1', '0')])
def test_ways_to_say_yes(tmp_path, yes, no):
    (tmp_path / 't.csv').write_text(f'fnames,is_val\n007,{yes}\nb.jpg,{no}\n')
    table = read_table(tmp_path / 't.csv')
    assert table['is_val'].tolist() == [True, False]
    assert table['fnames'].tolist() == ['007', 'b.jpg']  # names, not numbers


def test_table_that_is_not_there(tmp_path):
    with refused('no table', 'gone.csv'):
        read_table(tmp_path / 'gone.csv')
    with refused(str(tmp_path)):
        read_table(tmp_path)


def test_missing_photos_are_listed(tmp_path, folder):
    path = tmp_path / 'table.csv'
    write_table(folder, path)
    (folder / '01.jpg').unlink()
    with refused('1 photo', '01.jpg', 'table.csv', str(folder)) as caught:
        read_table(path, folder)
    assert '…' not in str(caught.value)
    assert len(read_table(path)) == 12  # without a folder nothing is looked for
    shutil.rmtree(folder)
    with refused('12 photos', '…') as caught:
        read_table(path, folder)
    assert str(caught.value).count('.jpg') == 10


@pytest.mark.skipif(sys.platform != 'linux', reason='only Linux has names that are not Unicode')
def test_names_that_are_not_unicode(tmp_path):
    "As an old camera card or archive has them."
    path = tmp_path / os.fsdecode(b'caf\xe9.png')
    save_photo(noise(), path)
    write_table(tmp_path, tmp_path / 'table.csv')
    assert read_table(tmp_path / 'table.csv', tmp_path)['fnames'].tolist() == [path.name]


# --- sheets ----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.tuples(st.integers(1, 90), st.integers(1, 90)), st.sampled_from(list(BANDS)))
def test_sheet_round_trip(size, mode):
    clean, degraded = noise(size, mode), noise(size, mode, 1)
    sheet = make_sheet(clean, degraded)
    assert sheet.size == (2 * size[0], size[1])
    assert np.array_equal(np.asarray(sheet), np.concatenate([clean, degraded], 1))
    for half, photo in zip(split_sheet(sheet), (clean, degraded)):
        assert_same(half, photo)


def test_bad_sheets():
    with refused('(20, 14)', '(20, 15)'):
        make_sheet(noise(), noise((20, 15)))
    with refused('RGB', 'L'):
        make_sheet(noise(), noise(mode='L'))
    with refused('21'):
        split_sheet(noise((21, 3)))


def test_profile_outlives_a_sheet():
    photo = noise((40, 30))
    photo.info = {'icc_profile': b'a profile'}
    assert make_sheet(photo, photo).info == {'icc_profile': b'a profile'}


# --- sets to download ------------------------------------------------------------------------


def png():
    file = io.BytesIO()
    Image.new('RGB', (3, 2), 'red').save(file, 'PNG')
    return file.getvalue()


def tgz(**files):
    "A .tgz of these files (name -> bytes)."
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode='w:gz') as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def zipped(**files):
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return file.getvalue()


INSIDE = {'top/images/a.png': png(), 'top/images/b.png': png(), 'top/README': b'hello'}


class Server:
    "Serves `files` (path -> bytes), the first `cuts` times only half of what it promised."

    def __init__(self):
        self.files, self.asked, self.cuts = {}, [], 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.asked.append(self.path)
                data = server.files.get(self.path)
                if data is None:
                    return self.send_error(404)
                self.send_response(200)
                self.send_header('Content-Length', str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2] if server.cuts > 0 else data)
                server.cuts -= 1

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.http.server_port}'
        # the poll is how long shutting down takes
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr('time.sleep', lambda seconds: None)  # pooch waits before it tries again
    for name in 'http_proxy', 'https_proxy', 'all_proxy':  # the server is on this machine
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    server = Server()
    yield server
    server.close()


@pytest.fixture
def offer(server, monkeypatch):
    "A function that puts an archive on the server and a row that points to it in the table."

    def offer(data, suffix='.tgz', **change):
        server.files['/files/set' + suffix] = data
        row = {
            'name': 'tiny',
            'about': 'two photos',
            'url': f'{server.url}/files/set{suffix}',
            'size': len(data),
            'checksum': 'sha256:' + hashlib.sha256(data).hexdigest(),
            'license': 'CC0',
            'cite': 'nobody',
            'photos': 'top/images',
        }
        monkeypatch.setattr(datasets, 'DATASETS', {'tiny': PhotoSet(**{**row, **change})})

    return offer


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob('*'))


ALL = ['tiny', 'tiny/top', 'tiny/top/README', 'tiny/top/images']
ALL = [*ALL, 'tiny/top/images/a.png', 'tiny/top/images/b.png']


@pytest.mark.parametrize('suffix', ['.tgz', '.tar.gz', '.zip', '.test.zip'])
def test_success(tmp_path, server, offer, suffix):
    offer(zipped(**INSIDE) if suffix.endswith('.zip') else tgz(**INSIDE), suffix)
    folder = get_dataset('tiny', tmp_path / 'new' / 'data')
    assert folder == tmp_path / 'new' / 'data' / 'tiny' / 'top' / 'images'
    assert [p.name for p in find_photos(folder)] == ['a.png', 'b.png']
    assert (folder / 'a.png').read_bytes() == png()
    assert names(tmp_path / 'new' / 'data') == ALL  # and no archive
    assert server.asked == [f'/files/set{suffix}']
    assert get_dataset('tiny', str(tmp_path / 'new' / 'data')) == folder
    assert len(server.asked) == 1


def test_photos_at_the_top(tmp_path, offer):
    offer(zipped(**{'a.png': png()}), '.zip', photos='.')
    folder = get_dataset('tiny', tmp_path)
    assert folder == tmp_path / 'tiny'
    assert find_photos(folder) == [folder / 'a.png']


def test_md5(tmp_path, offer):
    data = tgz(**INSIDE)
    offer(data, checksum='md5:' + hashlib.md5(data).hexdigest())
    assert get_dataset('tiny', tmp_path).is_dir()


def test_photos_that_are_there_already(tmp_path, server, offer):
    "Fetched by hand, as the messages advise."
    offer(tgz(**INSIDE))
    (tmp_path / 'tiny' / 'top' / 'images').mkdir(parents=True)
    assert get_dataset('tiny', tmp_path) == tmp_path / 'tiny' / 'top' / 'images'
    assert server.asked == []


@pytest.mark.parametrize('with_checksum', [True, False])
def test_cut_short_every_time(tmp_path, server, offer, with_checksum):
    offer(tgz(**INSIDE), **({} if with_checksum else {'checksum': None}))
    server.cuts = 99
    with refused('tiny', 'could not be downloaded', server.url, "sample_photos('train')"):
        get_dataset('tiny', tmp_path)
    assert len(server.asked) == 3
    assert names(tmp_path) == []


def test_cut_short_twice(tmp_path, server, offer):
    offer(tgz(**INSIDE))
    server.cuts = 2
    get_dataset('tiny', tmp_path)
    assert len(server.asked) == 3
    assert names(tmp_path) == ALL


def test_interrupted_then_whole(tmp_path, server, offer):
    "After a failure the same call does all of it."
    offer(tgz(**INSIDE))
    server.cuts = 3
    with refused('could not be downloaded'):
        get_dataset('tiny', tmp_path)
    get_dataset('tiny', tmp_path)
    assert names(tmp_path) == ALL


def test_wrong_checksum(tmp_path, server, offer):
    offer(tgz(**INSIDE), checksum='sha256:' + '0' * 64)
    with refused('tiny', server.url, 'not what was expected', str(tmp_path / 'tiny')):
        get_dataset('tiny', tmp_path)
    assert names(tmp_path) == []


def test_wrong_size_where_there_is_no_checksum(tmp_path, server, offer):
    offer(tgz(**INSIDE), size=12_345, checksum=None)
    with refused('tiny', f'{len(tgz(**INSIDE)):,} bytes', '12,345', server.url):
        get_dataset('tiny', tmp_path)
    assert names(tmp_path) == []


def test_size_that_is_not_known(tmp_path, offer):
    offer(tgz(**INSIDE), size=0, checksum=None)
    assert get_dataset('tiny', tmp_path).is_dir()


def test_missing_file(tmp_path, server, offer):
    offer(tgz(**INSIDE))
    server.files.clear()
    with refused('tiny', 'could not be downloaded', server.url, 'HTTPError'):
        get_dataset('tiny', tmp_path)
    assert names(tmp_path) == []


def test_offline(tmp_path, server, offer):
    offer(tgz(**INSIDE))
    server.close()  # so nobody listens on its port
    with refused('tiny', 'could not be downloaded', 'sample_photos', server.url) as caught:
        get_dataset('tiny', tmp_path)
    assert f"put them into '{tmp_path / 'tiny' / 'top' / 'images'}'" in str(caught.value)
    assert names(tmp_path) == []


@pytest.mark.parametrize('name', ['../outside.png', '/outside.png', 'top/../../../outside.png'])
@pytest.mark.parametrize('suffix', ['.tgz', '.zip'])
def test_nothing_lands_outside(tmp_path, offer, suffix, name):
    "The tar is refused whole; from a zip such members are left out."
    if name.startswith('/'):
        name = str(tmp_path / 'outside.png')
    files, home = {**INSIDE, name: png()}, tmp_path / 'home'
    if suffix == '.tgz':
        offer(tgz(**files), suffix)
        if name.startswith('/'):  # then only its slash goes, and it stays inside
            get_dataset('tiny', home)
        else:
            with refused('tiny', 'could not be unpacked', 'outside'):
                get_dataset('tiny', home)
            assert [n for n in names(home) if n != 'set.tgz'] == []
    else:
        offer(zipped(**files), suffix)
        get_dataset('tiny', home)
        assert names(home) == ALL
    assert names(tmp_path)[0] == 'home'
    assert [p for p in tmp_path.iterdir()] == [home]
    assert not (home / 'outside.png').exists()


def test_links_to_the_outside(tmp_path, offer):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode='w:gz') as archive:
        link = tarfile.TarInfo('top')
        link.type, link.linkname = tarfile.SYMTYPE, '../..'
        archive.addfile(link)
        member = tarfile.TarInfo('top/images/a.png')
        archive.addfile(member)
    offer(file.getvalue())
    with refused('could not be unpacked'):
        get_dataset('tiny', tmp_path / 'home')
    assert [p.name for p in tmp_path.iterdir()] == ['home']


@pytest.mark.parametrize('suffix', ['.tgz', '.zip', '.bin'])
def test_not_an_archive(tmp_path, server, offer, suffix):
    "A page that says sorry, as servers send them. Mended there, it works at the next call."
    offer(b'<html>Sorry</html>', suffix, checksum=None, size=0)
    with refused('tiny', 'could not be unpacked', 'sample_photos'):
        get_dataset('tiny', tmp_path)
    assert not (tmp_path / 'tiny').exists()
    assert not [n for n in names(tmp_path) if n.endswith('.part')]
    if suffix == '.bin':
        return
    server.files['/files/set' + suffix] = (tgz if suffix == '.tgz' else zipped)(**INSIDE)
    for archive in tmp_path.glob('*set' + suffix):
        archive.unlink()  # as the message says, where it is still there
    assert get_dataset('tiny', tmp_path).is_dir()
    assert names(tmp_path) == ALL


def test_archive_without_the_folder(tmp_path, server, offer):
    "However often one tries, and with nothing left that looks like the data set."
    offer(tgz(**{'other/a.png': png()}))
    for _ in range(2):
        with refused('tiny', "no folder 'top/images'", 'sample_photos'):
            get_dataset('tiny', tmp_path)
        assert not (tmp_path / 'tiny').exists()


def test_folder_with_something_else_in_it(tmp_path, offer):
    "Photos put in the wrong place by hand are not touched, and the message says where they go."
    offer(tgz(**INSIDE))
    (tmp_path / 'tiny').mkdir()
    (tmp_path / 'tiny' / 'mine.png').write_bytes(png())
    with refused('tiny', str(tmp_path / 'tiny' / 'top' / 'images')):
        get_dataset('tiny', tmp_path)
    assert (tmp_path / 'tiny' / 'mine.png').read_bytes() == png()


def test_archive_of_somebody_else(tmp_path, offer):
    "A file in the folder that only has the archive's name is not ours to replace or remove."
    offer(tgz(**INSIDE))
    (tmp_path / 'set.tgz').write_bytes(b'my own')
    assert get_dataset('tiny', tmp_path).is_dir()
    assert (tmp_path / 'set.tgz').read_bytes() == b'my own'


def test_interrupted_unpacking(tmp_path, offer):
    "What an earlier run left is cleared away, and none of it gets into the data set."
    left = tmp_path / '.enhance-tiny.part' / 'top' / 'images'
    left.mkdir(parents=True)
    (left / 'half.png').write_bytes(b'half')
    offer(tgz(**INSIDE))
    get_dataset('tiny', tmp_path)
    assert names(tmp_path) == ALL


def test_killed_while_unpacking(tmp_path, offer, monkeypatch):
    "The data set appears at once or not at all."
    offer(tgz(**INSIDE))

    def half(archive, folder, **kwargs):
        (Path(folder) / 'top' / 'images').mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr('shutil.unpack_archive', half)
        with pytest.raises(KeyboardInterrupt):
            get_dataset('tiny', tmp_path)
    assert not (tmp_path / 'tiny').exists()
    get_dataset('tiny', tmp_path)
    assert names(tmp_path) == ALL


def test_full_disk_while_unpacking(tmp_path, server, offer, monkeypatch):
    "The archive is whole and may have taken an hour: with room made it is not fetched again."
    offer(tgz(**INSIDE))

    def full(archive, folder, **kwargs):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr('shutil.unpack_archive', full)
        with refused('tiny', 'No space left on device'):
            get_dataset('tiny', tmp_path)
    get_dataset('tiny', tmp_path)
    assert len(server.asked) == 1
    assert names(tmp_path) == ALL


def test_no_place_to_store(tmp_path, server, offer):
    offer(tgz(**INSIDE))
    (tmp_path / 'file').write_text('')
    with refused('tiny', 'could not be stored', str(tmp_path / 'file')):
        get_dataset('tiny', tmp_path / 'file')
    with refused('tiny', 'could not be stored', str(tmp_path / 'file')):
        get_dataset('tiny', tmp_path / 'file' / 'deeper')
    assert server.asked == []


def test_login(tmp_path, server, offer):
    offer(b'', login=True, url='https://example.org/set?id=1')
    folder = tmp_path / 'tiny' / 'top' / 'images'
    with refused('tiny needs a login', 'https://example.org/set?id=1', f"into '{folder}'"):
        get_dataset('tiny', tmp_path)
    assert names(tmp_path) == [] and server.asked == []
    folder.mkdir(parents=True)
    assert get_dataset('tiny', tmp_path) == folder


def test_unknown_name(tmp_path):
    with refused("'bsd'", *DATASETS):
        get_dataset('bsd', tmp_path)


def test_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('ENHANCE_DATA', str(tmp_path / 'mine'))
    assert data_folder() == tmp_path / 'mine'
    monkeypatch.setenv('ENHANCE_DATA', '~/mine')  # a notebook's %env does not look at the ~
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('USERPROFILE', str(tmp_path))
    assert data_folder() == tmp_path / 'mine'


def test_data_folder_of_the_project(tmp_path, monkeypatch):
    "From wherever in it the work is done; from elsewhere it is the user's cache."
    monkeypatch.delenv('ENHANCE_DATA', raising=False)
    (tmp_path / 'project' / 'enhance_lib').mkdir(parents=True)
    (tmp_path / 'project' / 'nbs').mkdir()
    monkeypatch.chdir(tmp_path / 'project' / 'nbs')
    assert data_folder().name == 'enhance_lib' and tmp_path not in data_folder().parents
    (tmp_path / 'project' / 'settings.ini').touch()
    assert data_folder() == tmp_path / 'project' / 'data'
    monkeypatch.chdir(tmp_path / 'project')
    assert data_folder() == tmp_path / 'project' / 'data'


def test_enhance_data_is_used(tmp_path, offer, monkeypatch):
    offer(tgz(**INSIDE))
    monkeypatch.setenv('ENHANCE_DATA', str(tmp_path))
    assert get_dataset('tiny') == tmp_path / 'tiny' / 'top' / 'images'


def test_the_real_table():
    "A wrong row shows here and not after a download of gigabytes."
    for name, row in DATASETS.items():
        assert row.name == name
        assert row.url.startswith('https://')
        assert row.about and row.license and row.cite
        if row.login:
            continue
        assert row.size > 0
        assert re.search(r'\.(tgz|tar\.gz|zip)$', row.url)
        digits = {'sha256': 64, 'md5': 32}
        if row.checksum:
            kind, value = row.checksum.split(':')
            assert re.fullmatch(f'[0-9a-f]{{{digits[kind]}}}', value)


def test_datasets_markdown_and_table():
    page, table = datasets_markdown(), datasets_table()
    sections = dict(zip(DATASETS, page.split('\n## ')[1:], strict=True))
    for name, row in DATASETS.items():
        section = sections[name]
        assert section.startswith(name + '\n')
        for what in row.about, f'<{row.url}>', row.license, row.cite:
            assert what in section
        assert (row.checksum or 'none published') in section
        assert ('login' in section) == row.login
        assert table.loc[name, 'license'] == row.license
    assert '3,531 MB' in sections['div2k-train']
    assert '`bsds500/BSR/BSDS500/data/images`' in sections['bsds500']
    assert page.endswith('\n') and '\n\n\n' not in page
