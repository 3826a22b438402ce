"""Photo files of every kind, good and bad: what the notebook on `toolbox.files` leaves out."""

import io
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import warnings
import zlib
from contextlib import contextmanager
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import tifffile
from common import BANDS, array, assert_same, encoded, noise, pixels, refused, silent
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from enhance_lib.toolbox.datasets import sample_photo
from enhance_lib.toolbox.errors import EnhanceError, EnhanceWarning
from enhance_lib.toolbox.files import (
    FORMATS,
    SUFFIXES,
    as_photo,
    buffered,
    encode_pixels,
    find_photos,
    open_photo,
    open_pixels,
    save_photo,
    save_pixels,
    write_atomically,
)

ORIENTATION = 0x112  # the number of the EXIF tag


def png(width, height, depth, color, rows, **chunks):
    "A PNG by hand, for the kinds that Pillow can't write."

    def chunk(kind, data):
        return (
            struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
        )

    header = struct.pack('>IIBBBBB', width, height, depth, color, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + b''.join(
        [
            chunk(b'IHDR', header),
            *(chunk(kind.encode(), data) for kind, data in chunks.items()),
            chunk(b'IDAT', zlib.compress(b''.join(b'\0' + row for row in rows))),
            chunk(b'IEND', b''),
        ]
    )


def icc_profile(kind, space, connection, **tags):
    "An ICC profile by hand, version 2.4."
    d50 = struct.pack('>3I', 0xF6D6, 0x10000, 0xD32D)
    body, table = b'', struct.pack('>I', len(tags))
    for name, data in tags.items():
        offset = 128 + 4 + 12 * len(tags) + len(body)
        table += name.encode() + struct.pack('>II', offset, len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack('>I', 128 + len(table) + len(body)) + bytes(4) + b'\x02\x40\0\0'
    head += kind + space + connection + bytes(12) + b'acsp' + bytes(28) + d50
    return head.ljust(128, b'\0') + table + body


def gray_profile():
    "Gray with a gamma of 2.2."
    white = b'XYZ ' + bytes(4) + struct.pack('>3I', 0xF6D6, 0x10000, 0xD32D)
    gamma = b'curv' + bytes(4) + struct.pack('>IH', 1, 0x0233)
    return icc_profile(b'mntr', b'GRAY', b'XYZ ', wtpt=white, kTRC=gamma)


def cmyk_profile():
    "An odd printer: cyan prints middle gray (L* = 50), black black, magenta and yellow nothing."
    straight = bytes(range(256))
    identity = struct.pack('>9I', 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    # two points per ink, cyan varying slowest and black fastest; L* from 0 to 100 is 0 to 255,
    # and a* = b* = 0 is 128
    black = bytes([0, 128, 128])
    inks = (bytes([255, 128, 128]) + black) * 4 + (bytes([128, 128, 128]) + black) * 4
    table = b'mft1' + bytes(4) + bytes([4, 3, 2, 0]) + identity + straight * 4 + inks + straight * 3
    return icc_profile(b'prtr', b'CMYK', b'Lab ', A2B0=table)


def srgb_profile():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()


@contextmanager
def as_nobody():
    "Without root's right to read and write everything."
    root = hasattr(os, 'geteuid') and os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def lent():
    "A folder that others may look into, which pytest's own may not be."
    if not hasattr(os, 'geteuid'):
        pytest.skip('this system has no permissions of the Unix kind')
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    with as_nobody():
        if not folder.is_dir():
            pytest.skip('the folder for temporary files is closed to others')
    yield folder
    for path in [folder, *folder.rglob('*')]:
        path.chmod(0o700)
    shutil.rmtree(folder)


# --- what can be opened ----------------------------------------------------------------------


@pytest.mark.parametrize('kind', [str, Path, open])
def test_open_by_name(tmp_path, kind):
    photo = noise()
    path = tmp_path / 'a b é 照片.png'
    photo.save(path)
    source = open(path, 'rb') if kind is open else kind(path)
    with silent():
        assert_same(open_photo(source), photo)
    if kind is open:
        source.close()


@pytest.mark.parametrize('kind', [bytes, bytearray, memoryview, io.BytesIO])
def test_open_from_memory(kind):
    assert_same(open_photo(kind(encoded(noise(), 'PNG'))), noise())


@pytest.mark.parametrize('encoding', ['utf-8', 'latin-1'])
def test_file_opened_as_text(tmp_path, encoding):
    "In UTF-8 reading fails by itself, in Latin-1 it gives letters: one sentence for both."
    path = tmp_path / 'a.jpg'
    noise().save(path)
    for call in open_photo, open_pixels, buffered:
        with open(path, encoding=encoding) as file, refused('a.jpg', 'opened as text', "'rb'"):
            call(file)
        with open(path, encoding=encoding) as file, refused("'mine'", 'opened as text'):
            call(file, name='mine')


def test_open_image_leaves_it_alone():
    image = noise(mode='RGBA')
    image.info['dpi'] = (72, 72)
    before = image.copy()
    photo = open_photo(image, 'L')
    photo.putpixel((0, 0), 1)
    photo.info.clear()
    assert_same(image, before)
    assert image.info == {'dpi': (72, 72)}
    copy = open_photo(before, 'RGBA')
    copy.putpixel((0, 0), (1, 2, 3, 4))
    assert_same(before, image)


def test_bad_image_objects_are_named_without_their_address():
    with refused('unknown range', 'mode F'):
        open_photo(Image.new('F', (2, 2)))
    with refused('not a photo'):
        open_photo(io.BytesIO(b'nothing'))


def test_lazily_opened_image_that_is_damaged(tmp_path):
    path = tmp_path / 'half.png'
    path.write_bytes(encoded(noise((60, 60)), 'PNG')[:3000])
    with Image.open(path) as image, refused('half.png', 'damaged'):
        open_photo(image)


@pytest.mark.parametrize('mode', ['XYZ', 'CMYK', 'P'])
def test_unknown_mode(mode):
    with refused(repr(mode), 'RGB, RGBA, L, LA'):
        open_photo(encoded(noise(), 'PNG'), mode)


# red, green, blue and yellow in the corners of the upright photo, which is 32×48
CORNERS = {'R': (255, 0, 0), 'G': (0, 255, 0), 'B': (0, 0, 255), 'Y': (255, 255, 0)}

# The corners of the stored photo, from the table of the tag in the EXIF standard: orientation 6
# means that row 0 is the right side and column 0 is the top, so top left is green, and so on.
STORED = {1: 'RGBY', 2: 'GRYB', 3: 'YBGR', 4: 'BYRG', 5: 'RBGY', 6: 'GYRB', 7: 'YGBR', 8: 'BRYG'}


def corners(letters, size):
    "A gray photo whose corners (top left, top right, bottom left, bottom right) are colored."
    image = Image.new('RGB', size, 'gray')
    for i, letter in enumerate(letters):
        image.paste(
            CORNERS[letter],
            ((i % 2) * (size[0] - 16), (i // 2) * (size[1] - 16))
            + (
                (i % 2) * (size[0] - 16) + 16,
                (i // 2) * (size[1] - 16) + 16,
            ),
        )
    return image


def assert_upright(photo):
    assert photo.size == (32, 48)
    for letter, at in zip('RGBY', [(8, 8), (24, 8), (8, 40), (24, 40)]):
        assert np.allclose(photo.getpixel(at), CORNERS[letter], atol=6), letter


@pytest.mark.parametrize('orientation', STORED)
@pytest.mark.parametrize('format', ['JPEG', 'PNG', 'WEBP', 'TIFF'])
def test_orientation(tmp_path, format, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    size = (32, 48) if orientation < 5 else (48, 32)
    options = {'JPEG': {'subsampling': 0, 'quality': 100}, 'WEBP': {'lossless': True}}
    stored = corners(STORED[orientation], size)
    data = encoded(stored, format, exif=exif, **options.get(format, {}))
    photo = open_photo(data)
    assert_upright(photo)
    path = save_photo(photo, tmp_path / 'saved.png')
    with Image.open(path) as again:
        assert again.getexif().get(ORIENTATION, 1) == 1
        assert_upright(again)
    assert_upright(open_photo(path))


def test_orientation_of_an_image_that_is_open():
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    with Image.open(io.BytesIO(encoded(corners('GYRB', (48, 32)), 'PNG', exif=exif))) as image:
        photo = open_photo(image)
    assert_upright(photo)
    assert_upright(open_photo(photo))  # and not turned twice


def test_orientation_out_of_range_is_ignored():
    exif = Image.Exif()
    exif[ORIENTATION] = 9
    assert_upright(open_photo(encoded(corners('RGBY', (32, 48)), 'PNG', exif=exif)))


def test_other_exif_is_kept(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION], exif[0x10F] = 8, 'A maker of cameras'
    photo = open_photo(encoded(noise(), 'JPEG', exif=exif))
    for suffix in '.jpg', '.png', '.webp', '.avif':
        with Image.open(save_photo(photo, tmp_path / f'a{suffix}')) as saved:
            assert saved.getexif()[0x10F] == 'A maker of cameras'
            assert saved.getexif().get(ORIENTATION, 1) == 1


def test_broken_exif_warns_and_opens(tmp_path):
    photo = noise()
    for exif in b'Exif\0\0rubbish', b'Exif\0\0MM\0.\0\0\0\x08\0\0':
        path = tmp_path / 'broken.png'
        photo.save(path, exif=exif)
        with pytest.warns(EnhanceWarning, match=r'broken\.png.*EXIF.*damaged'):
            opened = open_photo(path)
        assert_same(opened, photo)
        with silent():
            assert_same(open_photo(save_photo(opened, tmp_path / 'again.tif')), photo)


@pytest.mark.parametrize('suffix', ['.jpg', '.png', '.webp', '.tif', '.avif'])
@pytest.mark.parametrize('info', [{'exif': b'Exif\0\0rubbish'}, {'dpi': (float('nan'),) * 2}])
def test_broken_info_does_not_keep_a_photo_from_being_saved(tmp_path, suffix, info):
    "JPEG files with rubbish for EXIF open without Pillow's noticing, TIFF may have 0/0 dpi."
    photo = noise()
    photo.info = info
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', EnhanceWarning)
        path = save_photo(photo, tmp_path / f'a{suffix}')
        assert open_photo(path).size == photo.size


def test_exif_too_long_for_jpeg(tmp_path):
    "TIFF and PNG hold EXIF of any length, JPEG 64 KB: the photo matters more."
    photo = noise()
    photo.info['exif'] = b'Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0' + bytes(70_000)
    with pytest.warns(EnhanceWarning, match=r'a\.jpg.*EXIF'):
        path = save_photo(photo, tmp_path / 'a.jpg')
    assert open_photo(path).size == photo.size


# --- kinds of pixels -------------------------------------------------------------------------


def test_gray_and_black_and_white():
    gray = noise(mode='L')
    assert_same(open_photo(encoded(gray, 'PNG'), None), gray)
    assert pixels(open_photo(encoded(gray, 'PNG'))) == [[[v] * 3 for v in r] for r in pixels(gray)]
    bits = png(8, 1, 1, 0, [b'\x0f'])
    assert pixels(open_photo(bits, None)) == [[0, 0, 0, 0, 255, 255, 255, 255]]
    assert pixels(open_photo(bits, 'L')) == [[0, 0, 0, 0, 255, 255, 255, 255]]


def test_luma_of_colors():
    "BT.601: 0.299 R + 0.587 G + 0.114 B."
    photo = open_photo(png(3, 1, 8, 2, [bytes([255, 0, 0, 0, 255, 0, 0, 0, 255])]), 'L')
    assert np.allclose(pixels(photo), [[76, 150, 29]], atol=1)


PALETTE = bytes([255, 0, 0, 0, 0, 255])  # red, blue


def test_palette():
    data = png(3, 1, 8, 3, [bytes([0, 1, 0])], PLTE=PALETTE)
    photo = open_photo(data, None)
    assert photo.mode == 'RGB'
    assert pixels(photo) == [[[255, 0, 0], [0, 0, 255], [255, 0, 0]]]


def test_palette_with_transparency():
    data = png(2, 1, 8, 3, [bytes([0, 1])], PLTE=PALETTE, tRNS=bytes([0]))
    photo = open_photo(data, None)
    assert photo.mode == 'RGBA'
    assert pixels(photo) == [[[255, 0, 0, 0], [0, 0, 255, 255]]]
    assert pixels(open_photo(data)) == [[[255, 255, 255], [0, 0, 255]]]


def test_one_transparent_color():
    "PNG may name one gray or color as transparent instead of an alpha channel."
    gray = png(2, 1, 8, 0, [bytes([15, 16])], tRNS=struct.pack('>H', 16))
    assert pixels(open_photo(gray, None)) == [[[15, 255], [16, 0]]]
    assert pixels(open_photo(gray)) == [[[15, 15, 15], [255, 255, 255]]]
    color = png(2, 1, 8, 2, [bytes([1, 2, 3, 4, 5, 6])], tRNS=struct.pack('>3H', 4, 5, 6))
    assert pixels(open_photo(color, None)) == [[[1, 2, 3, 255], [4, 5, 6, 0]]]


def test_gif_with_transparency():
    image = Image.new('P', (2, 1))
    image.putpalette(PALETTE)
    image.putpixel((1, 0), 1)
    data = encoded(image, 'GIF', transparency=1)
    assert pixels(open_photo(data, None)) == [[[255, 0, 0, 255], [0, 0, 255, 0]]]
    assert pixels(open_photo(data)) == [[[255, 0, 0], [255, 255, 255]]]


def test_transparency_is_laid_on_white():
    "Half of black on white is gray, and what can't be seen has no color."
    data = png(3, 1, 8, 6, [bytes([0, 0, 0, 128, 200, 0, 0, 0, 9, 8, 7, 255])])
    assert_same(open_photo(data, None), open_photo(data, 'RGBA'))
    assert pixels(open_photo(data, None)) == [[[0, 0, 0, 128], [200, 0, 0, 0], [9, 8, 7, 255]]]
    assert np.allclose(pixels(open_photo(data)), [[[127] * 3, [255] * 3, [9, 8, 7]]], atol=1)
    gray = png(2, 1, 8, 4, [bytes([0, 128, 77, 0])])
    assert pixels(open_photo(gray, None)) == [[[0, 128], [77, 0]]]
    assert np.allclose(pixels(open_photo(gray, 'L')), [[127, 255]], atol=1)
    assert np.allclose(pixels(open_photo(gray)), [[[127] * 3, [255] * 3]], atol=1)


def test_alpha_can_be_asked_for():
    assert pixels(open_photo(png(1, 1, 8, 0, [b'\x07']), 'LA')) == [[[7, 255]]]
    assert pixels(open_photo(png(1, 1, 8, 0, [b'\x07']), 'RGBA')) == [[[7, 7, 7, 255]]]


DEEP = [0, 257 * 1, 257 * 100, 257 * 254, 65535]

SHALLOW = [0, 1, 100, 254, 255]


def test_16_bit_gray(tmp_path):
    array = np.array([DEEP], np.uint16)
    tiff, big = tmp_path / 'a.tif', tmp_path / 'big.tif'
    tifffile.imwrite(tiff, array, photometric='minisblack')
    tifffile.imwrite(big, array, photometric='minisblack', byteorder='>')
    iio.imwrite(tmp_path / 'a.png', array)
    by_hand = png(5, 1, 16, 0, [struct.pack('>5H', *DEEP)])
    pgm = b'P5 5 1 65535\n' + struct.pack('>5H', *DEEP)
    for source in tiff, big, tmp_path / 'a.png', by_hand, pgm, Image.fromarray(array):
        photo = open_photo(source, None)
        assert photo.mode == 'L'
        assert pixels(photo) == [SHALLOW]
        assert pixels(open_photo(source)) == [[[v] * 3 for v in SHALLOW]]


def test_16_bit_gray_rounds():
    "Half a level is 128.5: below it goes down, above it goes up."
    data = png(4, 1, 16, 0, [struct.pack('>4H', 128, 129, 257 + 128, 257 + 129)])
    assert pixels(open_photo(data, None)) == [[0, 1, 1, 2]]


def test_16_bit_gray_with_one_transparent():
    data = png(2, 1, 16, 0, [struct.pack('>2H', 257 * 7, 65535)], tRNS=struct.pack('>H', 65535))
    assert pixels(open_photo(data, None)) == [[[7, 255], [255, 0]]]
    # the low byte of 256 is that of black, and 30001 is not the level that is named
    for clear in (256, 30000):
        row = struct.pack('>3H', 0, clear, 30001)
        data = png(3, 1, 16, 0, [row], tRNS=struct.pack('>H', clear))
        levels = pixels(open_photo(data, None))[0]
        assert levels == [[0, 255], [round(clear / 257), 0], [117, 255]]
    assert open_photo(data).info.get('transparency') is None


@pytest.mark.parametrize('bands, color', [(3, 2), (4, 6)])
def test_16_bit_color(bands, color):
    deep = np.random.default_rng(0).integers(0, 65536, (6, 5, bands))
    deep[..., 3:] = 65535
    data = png(5, 6, 16, color, [row.astype('>u2').tobytes() for row in deep])
    photo = open_photo(data, None)
    assert photo.mode == ('RGB', 'RGBA')[bands - 3]
    assert np.abs(np.asarray(photo, int) - np.rint(deep / 257)).max() <= 1


def test_16_bit_color_tiff(tmp_path):
    "Pillow reads some kinds of these and not others: right, or refused with a sentence."
    deep = np.random.default_rng(0).integers(0, 65536, (6, 5, 3)).astype(np.uint16)
    for options in {'byteorder': '<'}, {'byteorder': '>'}, {'planarconfig': 'separate'}:
        array = deep.transpose(2, 0, 1) if 'planarconfig' in options else deep
        tifffile.imwrite(tmp_path / 'a.tif', array, photometric='rgb', **options)
        try:
            photo = open_photo(tmp_path / 'a.tif')
        except EnhanceError:
            assert options != {'byteorder': '<'}
        else:
            assert np.abs(np.asarray(photo, int) - np.rint(deep / 257)).max() <= 1


@pytest.mark.parametrize('kind', [np.int32, np.uint32, np.float32])
@pytest.mark.parametrize('values', [[[0, 100_000]], [[-1, 5]], [[0, 255]]])
def test_numbers_of_unknown_range_are_refused(tmp_path, kind, values):
    "0 to 255 in 32 bits are refused too: taken for 16 bits the photo would be all but black."
    tifffile.imwrite(tmp_path / 'a.tif', np.array(values).astype(kind), photometric='minisblack')
    with refused('a.tif', '8-bit'):
        open_photo(tmp_path / 'a.tif')


@pytest.mark.parametrize('format', ['JPEG', 'TIFF'])
def test_cmyk_without_profile(format):
    "Pillow's plain formula: R = 255 - C where there is no black, and black is black."
    image = Image.new('CMYK', (16, 8))
    image.paste((255, 0, 0, 0), (0, 0, 8, 8))
    image.paste((0, 0, 0, 255), (8, 0, 16, 8))
    options = {'quality': 100} if format == 'JPEG' else {}
    photo = open_photo(encoded(image, format, **options), None)
    assert photo.mode == 'RGB'
    assert np.allclose(photo.getpixel((4, 4)), (0, 255, 255), atol=4)
    assert np.allclose(photo.getpixel((12, 4)), (0, 0, 0), atol=4)


def test_cmyk_with_profile():
    "L* = 128 / 2.55 = 50.2 is 119 in sRGB, and the profile goes: it says nothing about RGB."
    image = Image.new('CMYK', (8, 8), (255, 0, 0, 0))
    photo = open_photo(encoded(image, 'JPEG', icc_profile=cmyk_profile(), quality=100))
    assert np.allclose(photo.getpixel((4, 4)), (119, 119, 119), atol=3)
    assert 'icc_profile' not in photo.info
    white = open_photo(encoded(Image.new('CMYK', (8, 8)), 'JPEG', icc_profile=cmyk_profile()))
    assert np.allclose(white.getpixel((4, 4)), (255, 255, 255), atol=3)


@pytest.mark.parametrize('profile', [b'rubbish', cmyk_profile()[:200], srgb_profile()])
def test_cmyk_with_a_useless_profile(profile):
    image = Image.new('CMYK', (8, 8), (255, 0, 0, 0))
    photo = open_photo(encoded(image, 'JPEG', icc_profile=profile, quality=100))
    assert np.allclose(photo.getpixel((4, 4)), (0, 255, 255), atol=4)


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new('RGB', (8, 8), color) for color in ('red', 'lime', 'blue')]
    for format, suffix in ('GIF', 'gif'), ('TIFF', 'tif'), ('WEBP', 'webp'), ('PNG', 'png'):
        path = tmp_path / f'a.{suffix}'
        lossless = {'lossless': True} if format == 'WEBP' else {}
        frames[0].save(path, format, save_all=True, append_images=frames[1:], **lossless)
        with pytest.warns(EnhanceWarning, match=rf'a\.{suffix}.* 3 frames') as caught:
            photo, (array, _) = open_photo(path), open_pixels(path)
        assert len(caught) == 2
        assert {w.filename for w in caught} == {__file__}  # they point at who asked for the photo
        assert_same(photo, frames[0])
        assert_same(open_photo(as_photo(array)), frames[0])


def test_phone_previews_are_not_frames(tmp_path):
    path = tmp_path / 'phone.jpg'
    noise().save(path, 'MPO', save_all=True, append_images=[noise(seed=1)], quality=100)
    with silent():
        photo = open_photo(path)
    assert np.allclose(np.asarray(photo, int), np.asarray(Image.open(path).convert('RGB')), atol=1)


# --- color profiles --------------------------------------------------------------------------


@pytest.mark.parametrize('suffix', ['.jpg', '.png', '.webp', '.tif', '.avif'])
def test_profile_is_kept(tmp_path, suffix):
    profile, first = srgb_profile(), tmp_path / f'first{suffix}'
    noise().save(first, icc_profile=profile)
    photo = open_photo(first)
    assert photo.info['icc_profile'] == profile
    second = save_photo(photo, tmp_path / f'second{suffix}')
    with Image.open(second) as image:  # as any other program would find it
        assert image.info['icc_profile'] == profile
    assert open_photo(second).info['icc_profile'] == profile


def test_profile_goes_when_its_colors_go():
    gray = encoded(noise(mode='L'), 'PNG', icc_profile=gray_profile())
    assert open_photo(gray, None).info['icc_profile'] == gray_profile()
    assert open_photo(gray, 'L').info['icc_profile'] == gray_profile()
    assert 'icc_profile' not in open_photo(gray, 'RGB').info
    color = encoded(noise(), 'PNG', icc_profile=srgb_profile())
    assert 'icc_profile' not in open_photo(color, 'L').info
    assert open_photo(color, 'RGBA').info['icc_profile'] == srgb_profile()
    assert 'icc_profile' not in open_photo(encoded(noise(), 'PNG', icc_profile=b'rubbish')).info


def test_resolution_is_kept(tmp_path):
    photo = open_photo(encoded(noise(), 'JPEG', dpi=(300, 300)))
    with Image.open(save_photo(photo, tmp_path / 'a.jpg')) as saved:
        assert saved.info['dpi'] == (300, 300)


# --- saving ----------------------------------------------------------------------------------

STARTS = {  # how the files start, from the formats' own standards
    **dict.fromkeys(['.jpg', '.jpeg', '.jpe', '.jfif'], b'\xff\xd8\xff'),
    **dict.fromkeys(['.png', '.apng'], b'\x89PNG\r\n\x1a\n'),
    **dict.fromkeys(['.tif', '.tiff'], b'II*\0'),
    **dict.fromkeys(['.ppm', '.pnm'], b'P6'),
    '.bmp': b'BM',
    '.gif': b'GIF8',
    '.webp': b'RIFF',
}

LOSSLESS = ['.png', '.apng', '.tif', '.bmp', '.ppm']


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_every_suffix(tmp_path, suffix):
    "Small steps of few colors, so that the lossy formats and GIF's palette come near them."
    photo = Image.fromarray(np.indices((16, 16)).sum(0).astype(np.uint8) * 4 + 60).convert('RGB')
    path = save_photo(photo, tmp_path / f'a{suffix.upper()}')
    assert path == tmp_path / f'a{suffix.upper()}'
    assert path.read_bytes().startswith(STARTS.get(suffix, b''))
    again = open_photo(path)
    assert np.abs(np.asarray(again, int) - np.asarray(photo, int)).max() <= 8
    assert find_photos(tmp_path) == [path]


@pytest.mark.parametrize('suffix', LOSSLESS)
def test_lossless(tmp_path, suffix):
    for mode in ('L', 'RGB') if suffix in ('.bmp', '.ppm') else BANDS:
        photo = noise((13, 7), mode)
        with silent():
            assert_same(open_photo(save_photo(photo, tmp_path / f'a{suffix}'), None), photo)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(['.png', '.tif']),
    st.sampled_from(list(BANDS)),
    st.integers(1, 50),
    st.integers(1, 50),
    st.integers(0, 99),
)
def test_lossless_at_any_size(suffix, mode, width, height, seed):
    photo = noise((width, height), mode, seed)
    with tempfile.TemporaryDirectory() as folder:
        assert_same(open_photo(save_photo(photo, Path(folder, f'a{suffix}')), None), photo)


def test_quality(tmp_path):
    photo = sample_photo('cat').crop((100, 50, 228, 178))
    for suffix in '.jpg', '.webp', '.avif':
        low = save_photo(photo, tmp_path / f'low{suffix}', quality=20)
        high = save_photo(photo, tmp_path / f'high{suffix}', quality=95)
        assert low.stat().st_size < high.stat().st_size / 2
        error = np.asarray(open_photo(high), float) - np.asarray(photo, float)
        assert np.sqrt((error**2).mean()) < 4


@pytest.mark.parametrize('suffix', ['.jpg', '.avif'])
def test_full_resolution_of_colors(tmp_path, suffix):
    "Columns of one pixel in red and blue: at half the resolution both would be purple."
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:, ::2, 0] = pixels[:, 1::2, 2] = 200
    saved = open_photo(save_photo(Image.fromarray(pixels), tmp_path / f'a{suffix}'))
    assert np.abs(np.asarray(saved, int) - pixels).max() < 20


@pytest.mark.parametrize('suffix', ['.jpg', '.webp', '.avif'])
@pytest.mark.parametrize('quality', [-5, 0, 101, 500])
def test_impossible_quality(tmp_path, suffix, quality):
    "Each format takes another of these for something else, silently."
    with refused(str(quality), '1 to 100'):
        save_photo(noise(), tmp_path / f'a{suffix}', quality)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', ['a', 'a.xyz', 'a.eps', 'a.pdf', 'a.jpg.part', '.jpg'])
def test_unknown_suffix(tmp_path, name):
    with refused(name, 'suffix', '.png', '.jpg'):
        save_photo(noise(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_folder_as_target(tmp_path):
    (tmp_path / 'a.png').mkdir()
    with refused('a.png', 'is a folder'):
        save_photo(noise(), tmp_path / 'a.png')
    with refused(str(tmp_path)):
        save_photo(noise(), tmp_path)


def test_missing_folders_are_made(tmp_path):
    assert_same(open_photo(save_photo(noise(), tmp_path / 'a' / 'b c' / 'ü.png')), noise())
    (tmp_path / 'file').write_text('')
    with refused('file', 'could not be written'):
        save_photo(noise(), tmp_path / 'file' / 'a.png')


@pytest.mark.parametrize('suffix', ['.jpg', '.bmp', '.ppm'])
@pytest.mark.parametrize('mode', ['LA', 'RGBA'])
def test_transparency_is_laid_on_white_where_there_is_none(tmp_path, suffix, mode):
    photo = Image.new(mode, (8, 8), 0)  # black, and not to be seen
    path = tmp_path / f'a{suffix}'
    with pytest.warns(EnhanceWarning, match=rf'a\{suffix}.*no transparency') as caught:
        save_photo(photo, path)
    assert caught[0].filename == __file__
    again = open_photo(path, None)
    assert again.mode == mode[:-1]
    assert set(np.asarray(again).flat) == {255}


@pytest.mark.parametrize('suffix', ['.gif', '.png', '.tif', '.webp'])
@pytest.mark.parametrize('mode', ['LA', 'RGBA'])
def test_transparency_is_kept_where_there_is_one(tmp_path, suffix, mode):
    photo = Image.new(mode, (8, 8), 0)
    photo.paste(Image.new(mode, (4, 8), 'white'))
    with silent():
        again = open_photo(save_photo(photo, tmp_path / f'a{suffix}'), 'RGBA')
    assert (np.asarray(again)[:, :4] == 255).all()
    assert (np.asarray(again)[:, 4:, 3] == 0).all()


def test_photos_without_transparency_save_without_a_word(tmp_path):
    for mode in 'L', 'RGB':
        for suffix in SUFFIXES:
            with silent():
                save_photo(noise(mode=mode), tmp_path / f'a{suffix}')


def test_failing_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = save_photo(noise(), tmp_path / 'a.png')
    old = path.read_bytes()

    def full_disk(self, target, *args, **kwargs):
        Path(target).write_bytes(b'half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(Image.Image, 'save', full_disk)
    with refused('a.png', 'could not be written', 'No space left on device'):
        save_photo(noise(seed=1), path)
    assert [p.name for p in tmp_path.iterdir()] == ['a.png']
    assert path.read_bytes() == old


def test_too_large_for_the_format(tmp_path):
    "WebP ends at 16,383 pixels and JPEG at 65,500: a sentence, and no half file."
    for suffix, width in ('.webp', 16_384), ('.jpg', 65_501):
        with refused(f'a{suffix}', 'could not be written'):
            save_photo(Image.new('RGB', (width, 1)), tmp_path / f'a{suffix}')
    assert not list(tmp_path.iterdir())


def test_any_error_or_interrupt_leaves_the_old_file(tmp_path):
    path = tmp_path / 'a.txt'
    path.write_text('old')
    for error in RuntimeError, KeyboardInterrupt:
        with pytest.raises(error), write_atomically(path) as temporary:
            assert temporary.parent == path.parent
            temporary.write_text('half')
            raise error
        assert path.read_text() == 'old'
        assert [p.name for p in tmp_path.iterdir()] == ['a.txt']
    with write_atomically(path) as temporary:
        temporary.write_text('new')
        assert path.read_text() == 'old'
    assert path.read_text() == 'new'


def test_killed_in_mid_write(tmp_path):
    path = save_photo(noise(), tmp_path / 'a.png')
    old = path.read_bytes()
    code = (
        'import sys, time\n'
        'from enhance_lib.toolbox.files import write_atomically\n'
        'with write_atomically(sys.argv[1]) as temporary:\n'
        "    temporary.write_bytes(b'half')\n"
        "    print('half', flush=True)\n"
        '    time.sleep(60)\n'
    )
    command = [sys.executable, '-c', code, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == 'half\n'
        process.kill()
    assert path.read_bytes() == old
    assert find_photos(tmp_path) == [path]  # what is left of the other is no photo


def test_long_names(tmp_path):
    "File systems allow 255 bytes a name; the temporary name must not need more."
    path = tmp_path / ('é' * 123 + '.png')
    assert len(path.name.encode()) == 250
    assert_same(open_photo(save_photo(noise(), path)), noise())
    too_long = tmp_path / ('a' * 300 + '.png')
    with refused('aaa.png'):
        save_photo(noise(), too_long)
    with refused('aaa.png'):
        open_photo(too_long)
    with refused('aaa'):
        find_photos('a' * 300)


@pytest.mark.skipif(sys.platform != 'linux', reason='only Linux has names that are not Unicode')
def test_names_that_are_not_unicode(tmp_path):
    "As an old camera card or archive has them."
    path = tmp_path / os.fsdecode(b'caf\xe9.png')
    save_photo(noise(), path)
    assert_same(open_photo(path), noise())
    assert find_photos(tmp_path) == [path]


def test_impossible_names(tmp_path):
    for call in open_photo, find_photos, lambda path: save_photo(noise(), path):
        with refused('nul'):
            call(tmp_path / 'nul\0byte.png')


# --- bad input -------------------------------------------------------------------------------


def test_missing_file_and_folder(tmp_path):
    with refused('no file', 'gone.jpg'):
        open_photo(tmp_path / 'gone.jpg')
    with refused('no file', 'gone.jpg'):
        open_photo(str(tmp_path / 'nowhere' / 'gone.jpg'))
    with refused('is a folder'):
        open_photo(tmp_path)


def test_messages_name_the_whole_path(tmp_path):
    "In a tree of folders the last part alone would not say which file it is."
    path = tmp_path / 'summer' / 'a.jpg'
    for source in path, str(path):
        with refused(f"'{path}'"):
            open_photo(source)
    with refused("'my photo'"):
        open_photo(path, name='my photo')


def test_not_a_photo(tmp_path):
    path = tmp_path / 'a.jpg'
    for data, word in [
        (b'', 'empty'),
        (b'Dear diary', 'not a photo'),
        (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n', 'not a photo'),
        (b'\0\0\0\x18ftypheic\0\0\0\0mif1heic', 'HEIC'),
        (b'\0\0\0\x18ftypmif1\0\0\0\0mif1heic', 'HEIC'),
        (b'%PDF-1.4\n', 'not a photo'),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'not a photo'),
    ]:
        path.write_bytes(data)
        with refused('a.jpg', word):
            open_photo(path)
    assert 'EPS' not in FORMATS  # Pillow would start Ghostscript on it


def test_wrong_suffix_does_not_matter(tmp_path):
    path = tmp_path / 'a.jpg'
    path.write_bytes(encoded(noise(), 'PNG'))
    assert_same(open_photo(path), noise())


def test_bomb_is_refused_by_its_header(monkeypatch):
    "None of these has pixels: who looked further than the header would call it damaged."
    bombs = {
        'PNG': png(30_000, 30_000, 8, 2, []),
        'GIF': b'GIF89a' + struct.pack('<HHBBB', 65535, 65535, 0, 0, 0)
        + b',' + struct.pack('<4HB', 0, 0, 65535, 65535, 0) + b'\x02\0;',
        'BMP': b'BM' + struct.pack('<IHHI', 54, 0, 0, 54)
        + struct.pack('<IiiHHIIiiII', 40, 30_000, 30_000, 1, 24, 0, 0, 0, 0, 0, 0),
        'PPM': b'P6 30000 30000 255\n',
    }  # fmt: skip
    monkeypatch.setattr(Image.Image, 'load', lambda self: pytest.fail('its pixels were asked for'))
    for kind, data in bombs.items():
        with refused(f"'{kind}'", 'million pixels', 'MAX_IMAGE_PIXELS'):
            open_photo(data, name=kind)


def test_large_photos_are_no_bombs(monkeypatch):
    "Pillow warns from half of its limit on; phones reach that."
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 200)
    with silent():
        assert open_photo(encoded(noise((20, 14)), 'PNG')).size == (20, 14)
    with refused('million pixels'):
        open_photo(encoded(noise((21, 20)), 'PNG'))


def small_files():
    "A small file of each kind, with what a decoder can stumble over."
    exif = Image.Exif()
    exif[ORIENTATION], exif[0x10F] = 6, 'maker'
    photo, deep = noise((11, 9)), Image.fromarray(np.arange(99, dtype=np.uint16).reshape(9, 11))
    return {
        'JPEG': encoded(photo, 'JPEG', exif=exif, dpi=(72, 72)),
        'progressive': encoded(photo, 'JPEG', progressive=True),
        'CMYK': encoded(photo.convert('CMYK'), 'JPEG', icc_profile=gray_profile()),
        'PNG': encoded(photo, 'PNG', exif=exif, icc_profile=gray_profile()),
        'PNG16': encoded(deep, 'PNG'),
        'palette': encoded(photo.quantize(8), 'PNG', transparency=3),
        'GIF': encoded(photo.quantize(8), 'GIF', transparency=3),
        'TIFF': encoded(photo, 'TIFF', exif=exif, dpi=(72, 72)),
        'TIFF16': encoded(deep, 'TIFF'),
        'LZW': encoded(photo, 'TIFF', compression='tiff_lzw'),
        'WEBP': encoded(photo, 'WEBP', exif=exif),
        'alpha': encoded(noise((11, 9), 'RGBA'), 'WEBP', lossless=True),
        'BMP': encoded(photo, 'BMP'),
        'PPM': encoded(photo, 'PPM'),
        **({'AVIF': encoded(photo, 'AVIF')} if 'AVIF' in FORMATS else {}),
    }


FILES = small_files()


def opened(data):
    "The photo, or None where it is refused: anything else is a failure."
    # a wrong byte may say that the photo is 100 million pixels: that would only take time
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter('ignore')
        patch.setattr(Image, 'MAX_IMAGE_PIXELS', 100_000)
        try:
            photo = open_photo(data, None)
        except EnhanceError as e:
            assert '\n' not in str(e)
            return None
    assert photo.mode in BANDS
    return photo


@pytest.mark.parametrize('kind', FILES)
def test_cut_short(kind):
    "At any length: refused, or nothing that matters was lost."
    whole = opened(FILES[kind])
    assert whole is not None
    for length in range(len(FILES[kind])):
        photo = opened(FILES[kind][:length])
        if photo is not None:
            assert_same(photo, whole)
    assert opened(FILES[kind][: len(FILES[kind]) // 2]) is None


@pytest.mark.parametrize('kind', FILES)
def test_any_byte_wrong(kind):
    "A wrong byte may go unnoticed, but nothing else than `EnhanceError` may come of it."
    data = FILES[kind]
    for i in range(min(len(data), 700)):
        for wrong in data[i] ^ 1, data[i] ^ 0x80, 255 - data[i], 0:
            opened(data[:i] + bytes([wrong]) + data[i + 1 :])


@st.composite
def spoiled(draw):
    "A small file with some of its bytes changed, put in or left out, and perhaps cut short."
    data = bytearray(FILES[draw(st.sampled_from(sorted(FILES)))])
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data) - 1))
        data[at : at + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


@settings(max_examples=500, deadline=None)
@given(spoiled())
def test_spoiled_files(data):
    "What opens can be saved, too."
    photo = opened(data)
    if photo is not None and max(photo.size) < 1000:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter('ignore')
            for suffix in '.png', '.jpg', '.tif':
                save_photo(photo, Path(folder, f'a{suffix}'))


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([b'', *(data[:n] for data in FILES.values() for n in (4, 12, 30))]),
    st.binary(max_size=300),
)
def test_random_bytes(head, rest):
    opened(head + rest)


@pytest.mark.parametrize('size', [(1, 1), (1, 5000), (5000, 1)])
def test_extreme_shapes(tmp_path, size):
    photo = noise(size)
    for suffix in '.png', '.tif', '.bmp':
        assert_same(open_photo(save_photo(photo, tmp_path / f'a{suffix}')), photo)
    for suffix in '.jpg', '.webp', '.gif':
        assert open_photo(save_photo(photo, tmp_path / f'a{suffix}')).size == size


def test_no_permission_to_read(lent):
    path = save_photo(noise(), lent / 'in' / 'a.png')
    path.chmod(0)
    with as_nobody(), refused('a.png', 'permission denied'):
        open_photo(path)
    path.chmod(0o644)
    path.parent.chmod(0)  # nor may anybody know whether there is a file in the folder
    with as_nobody(), refused('a.png', 'permission denied'):
        open_photo(path)


def test_no_permission_to_write(lent):
    path = save_photo(noise(), lent / 'in' / 'a.png')
    path.parent.chmod(0o555)
    with as_nobody(), refused('a.png', 'could not be written', 'ermission denied'):
        save_photo(noise(seed=1), path)
    with as_nobody(), refused('b.png', 'could not be written', 'ermission denied'):
        save_photo(noise(), path.parent / 'new' / 'b.png')
    assert_same(open_photo(path), noise())
    path.parent.chmod(0)
    with as_nobody(), refused('a.png', 'ermission denied'):
        save_photo(noise(seed=1), path)


def test_no_permission_to_look(lent):
    "A folder that can't be looked into is not an empty one."
    save_photo(noise(), lent / 'a.png')
    save_photo(noise(), lent / 'in' / 'b.png')
    for mode in 0, 0o444:
        (lent / 'in').chmod(mode)
        for folder in lent, lent / 'in', lent / 'in' / 'deeper':
            with as_nobody(), refused(str(lent / 'in'), 'permission denied'):
                find_photos(folder)


# --- finding ---------------------------------------------------------------------------------


def test_find_photos(tmp_path):
    names = ['b.JPG', 'a.png', 'sub/c.webp', 'sub/deep er/é.tiff', 'z.jpeg']
    others = ['notes.txt', 'a.jpg.part', 'model.pth', '.hidden.jpg', '.cache/d.jpg', 'jpg', 'a.eps']
    for name in [*names, *others, 'sub/.enhance-1-2.part', '._a.png']:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / 'folder.jpg').mkdir()
    expected = ['a.png', 'b.JPG', 'sub/c.webp', 'sub/deep er/é.tiff', 'z.jpeg']
    for folder in tmp_path, str(tmp_path):
        assert [p.relative_to(tmp_path).as_posix() for p in find_photos(folder)] == expected


def test_find_photos_in_a_hidden_folder(tmp_path):
    "Only what is hidden inside counts: the folder itself was asked for."
    path = save_photo(noise(), tmp_path / '.mine' / 'a.png')
    assert find_photos(tmp_path / '.mine') == [path]


def test_nothing_to_find(tmp_path):
    with refused('no photo', str(tmp_path), '.jpg'):
        find_photos(tmp_path)
    with refused('no folder', 'gone'):
        find_photos(tmp_path / 'gone')
    path = save_photo(noise(), tmp_path / 'a.png')
    with refused('a.png', 'is a file'):
        find_photos(path)


# --- sixteen bits ----------------------------------------------------------------------------


@pytest.mark.parametrize('n_channels', [1, 2, 3, 4])
@pytest.mark.parametrize('suffix', ['png', 'tif'])
def test_sixteen_bits_survive_a_file(tmp_path, n_channels, suffix):
    pixels = array(13, 17, n_channels, np.uint16)
    path = save_pixels(pixels, tmp_path / f'a.{suffix}')
    again, _ = open_pixels(path)
    expected = pixels[..., [0, 0, 0, 1]] if (suffix, n_channels) == ('tif', 2) else pixels
    assert again.dtype == np.uint16 and (again == expected).all()


def test_a_packed_tiff_keeps_its_16_bits(tmp_path):
    "As programs for photos write it."
    pixels = array(20, 30, 3, np.uint16)
    for compression in ('lzw', 'zlib'):
        tifffile.imwrite(tmp_path / 'a.tif', pixels, photometric='rgb', compression=compression)
        assert (open_pixels(tmp_path / 'a.tif')[0] == pixels).all()


def test_png_keeps_profile_exif_and_resolution_with_16_bits(tmp_path):
    exif = Image.Exif()
    exif[0x010F] = 'Camera'
    profile = srgb_profile()
    info = {'icc_profile': profile, 'exif': exif.tobytes(), 'dpi': (300, 300)}
    save_pixels(array(5, 6, 3, np.uint16), tmp_path / 'a.png', info)
    photo = Image.open(tmp_path / 'a.png')
    photo.load()
    assert photo.info['icc_profile'] == profile
    assert photo.getexif()[0x010F] == 'Camera'
    assert [round(d) for d in photo.info['dpi']] == [300, 300]
    _, kept = open_pixels(tmp_path / 'a.png')
    assert kept['icc_profile'] == profile and 'exif' in kept


@pytest.mark.parametrize('orientation', range(1, 9))
def test_sixteen_bits_are_turned_upright_as_pillow_turns_eight(tmp_path, orientation):
    pixels = array(4, 7, 3, np.uint16)
    exif = Image.Exif()
    exif[0x0112] = orientation
    save_pixels(pixels, tmp_path / 'a.png', {'exif': exif.tobytes()})
    turned, _ = open_pixels(tmp_path / 'a.png')
    expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / 'a.png')))
    assert turned.dtype == np.uint16
    assert (turned >> 8 == expected).all()


def test_eight_bits_stay_eight_bits(tmp_path):
    for mode in ('L', 'LA', 'RGB', 'RGBA'):
        photo = Image.fromarray(array(9, 8, 4), 'RGBA').convert(mode)
        photo.save(tmp_path / 'a.png')
        pixels, _ = open_pixels(tmp_path / 'a.png')
        assert pixels.dtype == np.uint8 and as_photo(pixels).mode == mode
        assert as_photo(pixels).tobytes() == photo.tobytes()


def test_sixteen_bits_become_eight_where_the_format_has_no_more(tmp_path):
    pixels = np.full((8, 8, 3), 257 * 100, np.uint16)
    save_pixels(pixels, tmp_path / 'a.bmp')
    assert (np.asarray(Image.open(tmp_path / 'a.bmp')) == 100).all()


def test_a_pillow_image_of_16_bits_keeps_them():
    ramp = np.arange(0, 65536, 64, dtype=np.uint16).reshape(16, 64)
    pixels, _ = open_pixels(Image.fromarray(ramp))
    assert (pixels[..., 0] == ramp).all()


@pytest.mark.parametrize('orientation', [3, 6])
@pytest.mark.parametrize('kind', ['PNG', 'TIFF, largest byte first'])
def test_a_pillow_image_of_16_bits_is_turned_upright(orientation, kind):
    gray, file, exif = array(4, 7, 1, np.uint16)[..., 0], io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    if kind == 'PNG':
        Image.fromarray(gray).save(file, 'PNG', exif=exif)
    else:
        options = {'byteorder': '>', 'metadata': None}
        tifffile.imwrite(file, gray, extratags=[(0x0112, 'H', 1, orientation, True)], **options)
    file.seek(0)
    pixels, _ = open_pixels(Image.open(file))
    turned = {3: np.rot90(gray, 2), 6: np.rot90(gray, -1)}[orientation]
    assert pixels.dtype == np.uint16 and pixels.dtype.isnative
    assert np.array_equal(pixels[..., 0], turned)


@pytest.mark.skipif(os.name != 'posix', reason='uses signals and limits of Unix')
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, dtype):
    import resource  # Unix has it

    path = save_pixels(array(8, 8, 3, dtype), tmp_path / 'a.png')
    before, limit = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        with pytest.raises(EnhanceError, match='could not be written'):
            save_pixels(array(200, 200, 3, dtype), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, kept)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ['a.png']


@pytest.mark.parametrize('kind', [bytes, bytearray, memoryview, io.BytesIO, open])
def test_a_buffered_source_can_be_read_twice(tmp_path, kind):
    data = encoded(noise(), 'PNG')
    (tmp_path / 'a.png').write_bytes(data)
    with open(tmp_path / 'a.png', 'rb') as file:
        source = buffered(file if kind is open else kind(data))
    assert source == data
    assert_same(open_photo(source), open_photo(source))
    array, _ = open_pixels(source)
    assert_same(as_photo(array), noise())


def test_what_can_be_read_twice_stays_as_it_is(tmp_path):
    "A path is not read: its file may be large, or not be there."
    for source in str(tmp_path / 'gone.png'), tmp_path / 'gone.png', b'bytes', noise():
        assert buffered(source) is source


@pytest.mark.parametrize('depth', [np.uint8, np.uint16])
@pytest.mark.parametrize('suffix', ['png', 'tif'])
def test_pixels_are_read_from_the_disk_once(tmp_path, monkeypatch, depth, suffix):
    path, asked = save_pixels(array(6, 5, 3, depth), tmp_path / f'a.{suffix}'), []
    open_ = Path.open
    monkeypatch.setattr(Path, 'open', lambda self, *a: asked.append(self) or open_(self, *a))
    monkeypatch.setattr(Path, 'read_bytes', lambda self: pytest.fail('read once more'))
    opened, _ = open_pixels(path)
    assert asked == [path]
    assert (opened == array(6, 5, 3, depth)).all()


def test_errors_of_pixels_name_the_file(tmp_path):
    path = tmp_path / 'half.png'
    path.write_bytes(encoded(noise((60, 60)), 'PNG')[:3000])
    for source in path, str(path), open(path, 'rb'):
        with refused(str(path), 'damaged'):
            open_pixels(source)
    with refused("'my scan'", 'damaged'):
        open_pixels(path.read_bytes(), 'my scan')
    with refused(str(tmp_path / 'gone.png'), 'no file'):
        open_pixels(tmp_path / 'gone.png')
    with Image.open(path) as image, refused('half.png', 'damaged'):
        open_pixels(image)


@pytest.mark.parametrize('n_channels', [1, 2, 3, 4])
@pytest.mark.parametrize('suffix', ['png', 'tif', 'jpg'])
@pytest.mark.parametrize('depth', [np.uint8, np.uint16])
@pytest.mark.filterwarnings('ignore:.*no transparency')
def test_encoded_pixels_are_what_would_be_saved(tmp_path, n_channels, suffix, depth):
    data = array(7, 9, n_channels, depth)
    path = save_pixels(data, tmp_path / f'a.{suffix}')
    assert encode_pixels(data, path.name) == path.read_bytes()


# --- what a worker or the command line has to load --------------------------------------------


def test_light_modules():
    "A worker process of a folder run would load torch or pandas once each."
    light = 'files errors folders operations datasets show'.split()
    heavy = {'torch', 'pandas', 'matplotlib', 'ipywidgets', 'fastai', 'skimage', 'sklearn'}
    code = (
        'import sys\n'
        f'for name in {light}:\n'
        "    __import__('enhance_lib.toolbox.' + name)\n"
        f'    print(name, *sorted({heavy} & set(sys.modules)))\n'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.splitlines() == light, done.stderr
