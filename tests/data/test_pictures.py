"""load_picture gives the RGB picture that a person sees, whatever the file's mode; what is no picture says why."""

from __future__ import annotations

import io
import os
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from condu_ray.data import Picture, load_picture, open_pictures, open_task
from condu_ray.data.picture import LONGEST, MAX_BYTES, MAX_PIXELS, Unreadable, decode, inspect, to_rgb
from condu_ray.errors import DataError


def load(make, tmp_path, body, name="x.png"):
    return load_picture(Picture(str(make.write(tmp_path / name, body))))


def quarters(mode="RGB"):
    """8 x 4 pixels: red left, blue right, so that a turn shows."""
    image = Image.new("RGB", (8, 4), (255, 0, 0))
    image.paste((0, 0, 255), (4, 0, 8, 4))
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I"])
def test_every_png_mode_becomes_rgb(make, tmp_path, mode):
    source = Image.new("L", (5, 3), 255)
    image = source.convert("I").convert(mode) if mode == "I;16" else source.convert(mode)
    if mode in ("I;16", "I"):
        image = Image.fromarray(np.full((3, 5), 65535, np.uint16))
    got = load(make, tmp_path, make.encoded(image))
    assert (got.mode, got.size) == ("RGB", (5, 3))
    assert np.asarray(got).min() == 255


def test_sixteen_bits_keep_their_greys(make, tmp_path):
    every = np.arange(65536).astype(np.uint16).reshape(256, 256)
    got = np.asarray(load(make, tmp_path, make.encoded(Image.fromarray(every))))[..., 0]
    assert np.array_equal(got, np.rint(every / 257))


def test_integers_beyond_sixteen_bits_are_black_and_white():
    got = to_rgb(Image.fromarray(np.array([[-(2**31), -1, 0, 65535, 65536, 2**31 - 1]], np.int32)))
    assert np.asarray(got)[..., 0].tolist() == [[0, 0, 0, 255, 255, 255]]


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_many_bits_a_pixel_are_not_made_doubles(kind):
    image = Image.fromarray(np.ones((500, 500), kind))
    tracemalloc.start()
    to_rgb(image)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 12 * 500 * 500


def test_float_tiff_from_zero_to_one(make, tmp_path):
    ramp = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    got = np.asarray(load(make, tmp_path, make.encoded(Image.fromarray(ramp), "TIFF"), "x.tif"))[..., 1]
    assert np.array_equal(got, np.rint(ramp * 255))


def test_floats_above_one_are_greys_and_what_is_no_number_is_black(make, tmp_path):
    values = np.array([[np.nan, -np.inf, -3, 0.4, 1.6], [2, 254.6, 255, 300, np.inf]], np.float32)
    got = np.asarray(load(make, tmp_path, make.encoded(Image.fromarray(values), "TIFF"), "x.tif"))[..., 1]
    assert got.tolist() == [[0, 0, 0, 0, 2], [2, 255, 255, 255, 255]]
    dark = np.array([[np.nan, -np.inf, 1.0]], np.float32)
    got = np.asarray(load(make, tmp_path, make.encoded(Image.fromarray(dark), "TIFF"), "y.tif"))[..., 1]
    assert got.tolist() == [[0, 0, 255]]


def test_transparent_parts_are_white(make, tmp_path):
    image = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    image.putpixel((0, 0), (10, 20, 30, 255))
    got = load(make, tmp_path, make.encoded(image))
    assert got.getpixel((0, 0)) == (10, 20, 30)
    assert got.getpixel((3, 3)) == (255, 255, 255)


def test_palette_with_a_transparent_colour(make, tmp_path):
    image = Image.new("P", (4, 4), 0)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.putpixel((1, 1), 1)
    got = load(make, tmp_path, make.encoded(image, transparency=0))
    assert got.getpixel((1, 1)) == (200, 100, 50)
    assert got.getpixel((0, 0)) == (255, 255, 255)


def test_cmyk_jpeg_keeps_its_colour(make, tmp_path):
    body = make.encoded(Image.new("RGB", (16, 16), (200, 30, 30)).convert("CMYK"), "JPEG", quality=95)
    red, green, blue = load(make, tmp_path, body, "x.jpg").getpixel((8, 8))
    assert red > 180 and green < 60 and blue < 60


@pytest.mark.parametrize(("kind", "name"), [("GIF", "x.gif"), ("WEBP", "x.webp"), ("PNG", "x.png")])
def test_an_animation_is_its_first_frame(make, tmp_path, kind, name):
    frames = [Image.new("RGB", (6, 6), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    got = load(make, tmp_path, make.encoded(frames[0], kind, save_all=True, append_images=frames[1:]), name)
    red, green, _ = got.getpixel((3, 3))
    assert red > 200 and green < 50


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})], ids=["png", "tiff", "lzw"]
)
@pytest.mark.parametrize(
    ("orientation", "size", "red_at"),
    [(1, (8, 4), (0, 0)), (2, (8, 4), (7, 0)), (3, (8, 4), (7, 3)), (4, (8, 4), (0, 3))]
    + [(5, (4, 8), (0, 0)), (6, (4, 8), (3, 0)), (7, (4, 8), (3, 7)), (8, (4, 8), (0, 7))],
)
def test_exif_orientation_is_applied(make, tmp_path, orientation, size, red_at, kind, options):
    image = quarters()
    exif = image.getexif()
    exif[0x0112] = orientation
    body = make.encoded(image, kind, exif=exif, **options)
    got = load(make, tmp_path, body)
    assert got.size == size == inspect(body)
    assert got.getpixel(red_at) == (255, 0, 0)
    assert got.getpixel((size[0] - 1 - red_at[0], size[1] - 1 - red_at[1])) == (0, 0, 255)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")  # PIL's own, about the very damage made here
def test_damaged_exif_does_not_lose_the_picture(make, tmp_path):
    image = Image.new("RGB", (8, 8), (1, 2, 3))
    assert load(make, tmp_path, make.encoded(image, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")).size == (8, 8)


def test_a_byte_range_of_a_larger_file(make, tmp_path):
    body = make.picture_bytes(7)
    path = make.write(tmp_path / "many.tar", b"x" * 100 + body + b"y" * 100)
    got = load_picture(Picture(str(path), 100, len(body)))
    assert np.array_equal(np.asarray(got), np.asarray(Image.open(io.BytesIO(body))))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_cut_off_picture_is_found(make, kind):
    body = make.picture_bytes(1, (64, 64), kind)
    assert inspect(body) == (64, 64)
    with pytest.raises(Unreadable):
        inspect(body[: len(body) // 2])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "empty file"),
        (b"this is no picture", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not a picture"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100), "HEIC, which is not read: convert it to JPEG"),
        (b'<?xml version="1.0"?>\n<svg width="8" height="8"/>', "SVG, which is not read: convert it to PNG"),
        (b'<!DOCTYPE html>\n<html><body>Not found <svg width="8"/></body></html>', "not a picture"),
    ],
)
def test_what_is_no_picture_says_so(body, said):
    with pytest.raises(Unreadable, match=said):
        inspect(body)


def test_a_file_that_is_too_large_is_not_read(make, tmp_path):
    path = make.write(tmp_path / "x.png", b"")
    os.truncate(path, MAX_BYTES + 1)
    for picture in (Picture(str(path)), Picture(str(path), 0, MAX_BYTES + 1)):
        tracemalloc.start()
        with pytest.raises(DataError, match="too large: over 512 MiB"):
            load_picture(picture)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert most < 2**20


@pytest.mark.parametrize("pixels", [MAX_PIXELS, 2 * 10**8])
def test_a_decompression_bomb_is_not_decoded(make, pixels):
    body = bytearray(make.encoded(Image.new("1", (8, 8))))
    header = (2**13).to_bytes(4) + (pixels // 2**13 + 1).to_bytes(4)
    body[16:24] = header
    body[29:33] = zlib.crc32(bytes(body[12:29])).to_bytes(4)
    with pytest.raises(Unreadable, match="too large"):
        inspect(bytes(body))


@pytest.mark.parametrize("size", [(2 * LONGEST + 1, 2), (2, 2 * LONGEST + 1)])
@pytest.mark.parametrize("look", [inspect, decode])
def test_a_long_thin_picture_is_refused_as_it_would_grow_with_its_short_side(make, size, look):
    with pytest.raises(Unreadable, match=f"{size[0]} x {size[1]} pixels are too long and thin"):
        look(make.picture_bytes(1, size))
    look(make.picture_bytes(1, (2 * LONGEST, 2)))


def test_learning_skips_a_long_thin_picture_and_predicting_names_it(make, tmp_path):
    make.image_folder(tmp_path / "in", ["a", "b"], count=20)
    thin = make.write(tmp_path / "in" / "a" / "thin.png", make.picture_bytes(77, (2000, 1)))
    task = open_task("t", tmp_path / "in")
    assert [(one.path, one.reason) for one in task.skipped] == [("a/thin.png", "2000 x 1 pixels are too long and thin")]
    with pytest.raises(DataError, match=r"thin\.png cannot be used \(2000 x 1 pixels are too long and thin\)"):
        open_pictures([str(thin)])


def test_a_picture_that_went_away(tmp_path):
    with pytest.raises(DataError, match=r"gone\.png cannot be read any more \(no such file\)"):
        load_picture(Picture(str(tmp_path / "gone.png")))


def test_open_pictures_takes_files_and_folders(make, tmp_path):
    make.image_folder(tmp_path / "in", ["b", "a"], count=2)
    make.write(tmp_path / "in" / "a" / "notes.txt", b"no picture, and not taken for one")
    make.write(tmp_path / "in" / ".hidden.png", b"hidden")
    single = make.write(tmp_path / "z.png", make.picture_bytes(99))
    got = [picture.path for picture in open_pictures([str(single), str(tmp_path / "in")])]
    assert got == [str(single)] + [str(tmp_path / "in" / name) for name in ("a/2.png", "a/3.png", "b/0.png", "b/1.png")]


def test_open_pictures_names_what_is_wrong(make, tmp_path):
    good = make.write(tmp_path / "good.png", make.picture_bytes(1))
    bad = make.write(tmp_path / "note.jpg", b"this is no picture")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"there is no picture .*goood\.png: did you mean good\.png\?"):
        open_pictures([str(good), str(tmp_path / "goood.png")])
    with pytest.raises(DataError, match=r"note\.jpg cannot be used \(not a picture\)"):
        open_pictures([str(good), str(bad)])
    with pytest.raises(DataError, match="empty holds no pictures"):
        open_pictures([str(tmp_path / "empty")])
