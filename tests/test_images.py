"""Files of images: what is found, how it is read, what is refused."""

import struct

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from flax_dlvc import images
from flax_dlvc.images import ImageError, find_images, read_image

PIXELS = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def test_an_image_of_the_right_size_is_its_pixels(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / 'a.png')
    np.testing.assert_array_equal(read_image(tmp_path / 'a.png', (32, 32, 3)), PIXELS)


def test_a_wide_image_is_cropped_to_its_middle(tmp_path):
    wide = np.concatenate([np.zeros_like(PIXELS), PIXELS, np.zeros_like(PIXELS)], axis=1)
    Image.fromarray(wide).save(tmp_path / 'a.png')
    np.testing.assert_array_equal(read_image(tmp_path / 'a.png', (32, 32, 3)), PIXELS)


def test_scaled_up_and_down(tmp_path):
    Image.new('RGB', (400, 300), (10, 200, 30)).save(tmp_path / 'a.jpg', quality=95)
    for size in (8, 512):
        image = read_image(tmp_path / 'a.jpg', (size, size, 3))
        assert image.shape == (size, size, 3) and image.dtype == np.uint8
        assert np.abs(image.astype(int) - (10, 200, 30)).max() <= 2


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'I;16'])
def test_every_mode_becomes_colour_or_grey(tmp_path, mode):
    image = Image.new(mode, (5, 7))
    image.save(tmp_path / ('a.tif' if mode == 'CMYK' else 'a.png'))
    (path,) = tmp_path.iterdir()
    assert read_image(path, (4, 4, 3)).shape == (4, 4, 3)
    assert read_image(path, (4, 4, 1)).shape == (4, 4, 1)


def test_16_bits_are_scaled_and_transparency_is_white(tmp_path):
    Image.fromarray(np.full((4, 4), 0x80FF, np.uint16)).save(tmp_path / 'deep.png')
    assert (read_image(tmp_path / 'deep.png', (4, 4, 1)) == 0x80).all()
    (tmp_path / 'deep.pgm').write_bytes(b'P5 4 4 65535\n' + b'\x80\xff' * 16)  # in Pillow of 32 bits
    assert (read_image(tmp_path / 'deep.pgm', (4, 4, 1)) == 0x80).all()
    Image.new('RGBA', (4, 4), (255, 0, 0, 0)).save(tmp_path / 'clear.png')
    assert (read_image(tmp_path / 'clear.png', (4, 4, 3)) == 255).all()


@pytest.mark.parametrize(('kind', 'value'), [(np.float32, 0.5), (np.int32, 1 << 20), (np.int32, -1), (np.int32, 255)])
def test_numbers_of_unknown_scale_are_refused(tmp_path, kind, value):
    Image.fromarray(np.full((4, 4), value, kind)).save(tmp_path / 'a.tif')
    with pytest.raises(ImageError, match='8 or 16'):
        read_image(tmp_path / 'a.tif', (4, 4, 1))


@pytest.mark.parametrize('orientation', range(10))
def test_a_photograph_is_turned_upright_whatever_else_its_camera_wrote(tmp_path, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(PIXELS).save(tmp_path / 'a.png', exif=exif)
    with Image.open(tmp_path / 'a.png') as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(read_image(tmp_path / 'a.png', (32, 32, 3)), upright)
    assert np.array_equal(upright, PIXELS) == (orientation not in range(2, 9))

    exif[ExifTags.Base.ResolutionUnit] = 7
    content = exif.tobytes()
    entry = struct.pack('>HHI', ExifTags.Base.ResolutionUnit, 3, 1)  # a SHORT, one of it
    assert content.count(entry) == 1
    content = content.replace(entry, struct.pack('>HHI', ExifTags.Base.ResolutionUnit, 2, 1))  # ASCII
    Image.fromarray(PIXELS).save(tmp_path / 'odd.png', exif=content)
    np.testing.assert_array_equal(read_image(tmp_path / 'odd.png', (32, 32, 3)), upright)


@pytest.mark.parametrize('keep', [0, 1, 20, 200, 1500])
@pytest.mark.parametrize('kind', ['png', 'jpg', 'gif', 'webp', 'bmp', 'tif'])
def test_a_truncated_file_is_refused(tmp_path, kind, keep):
    path = tmp_path / f'a.{kind}'
    Image.fromarray(PIXELS.repeat(2, 0).repeat(2, 1)).save(path)
    content = path.read_bytes()
    assert read_image(path, (32, 32, 3)).shape == (32, 32, 3)
    path.write_bytes(content[: min(keep, len(content) // 2)])
    with pytest.raises(ImageError) as caught:
        read_image(path, (32, 32, 3))
    assert str(caught.value) and '\n' not in str(caught.value)


def test_what_is_no_image_is_refused(tmp_path):
    (tmp_path / 'a.png').write_text('not an image')
    for path in (tmp_path / 'a.png', tmp_path, tmp_path / 'missing.png'):
        with pytest.raises(ImageError):
            read_image(path, (8, 8, 3))


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path):
    Image.new('1', (20_000, 20_000)).save(tmp_path / 'bomb.png')
    assert (tmp_path / 'bomb.png').stat().st_size < 100_000
    with pytest.raises(ImageError, match=r'20000 x 20000 pixels|decompression bomb'):
        read_image(tmp_path / 'bomb.png', (8, 8, 3))


def test_the_pixel_limit(tmp_path, monkeypatch):
    Image.new('L', (10, 10)).save(tmp_path / 'a.png')
    monkeypatch.setattr(images, 'MAX_PIXELS', 100)
    assert read_image(tmp_path / 'a.png', (4, 4, 1)).shape == (4, 4, 1)
    monkeypatch.setattr(images, 'MAX_PIXELS', 99)
    with pytest.raises(ImageError, match='10 x 10 pixels are more than 99'):
        read_image(tmp_path / 'a.png', (4, 4, 1))


def test_files_folders_and_globs(tmp_path):
    for name in ('b.png', 'a.JPG', 'c/d.webp', 'c/notes.txt', 'c/paper.pdf', '[e].png'):  # Pillow only writes PDF
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('')

    def found(*names):
        return [str(path.relative_to(tmp_path)) for path in find_images(str(tmp_path / name) for name in names)]

    assert found('.') == ['[e].png', 'a.JPG', 'b.png', 'c/d.webp']
    assert found('b.png', 'c') == ['b.png', 'c/d.webp']
    assert found('*.png') == ['[e].png', 'b.png']
    assert found('**/*.webp') == ['c/d.webp']
    assert found('?') == ['c/d.webp']  # a folder
    assert found('**/c') == ['c/d.webp']  # a folder, once more
    assert [path.name for path in find_images([f'{tmp_path}/**/'])] == ['[e].png', 'a.JPG', 'b.png', 'd.webp']
    assert found('**') == ['[e].png', 'a.JPG', 'b.png', 'c/d.webp', 'c/notes.txt', 'c/paper.pdf']
    assert found('[e].png') == ['[e].png']  # a file of that very name
    assert found('missing.png', '*.gif') == ['missing.png', '*.gif']
    assert found('x' * 300) == ['x' * 300]  # longer than a name can be
