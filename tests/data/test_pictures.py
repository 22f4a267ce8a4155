import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from kdtoolkit.data.pictures import PictureError, check_whole, decode, seen_size

HEIGHT, WIDTH = 30, 40


def pixels(seed=7):
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def save(picture, path, **options):
    picture.save(path, **options)
    return path


def read(path, size=(HEIGHT, WIDTH)):
    return decode(path, size).permute(1, 2, 0).numpy()


def turned(array, orientation):
    """What is stored so that `orientation` shows the array."""
    flipped = {2: array[:, ::-1], 3: array[::-1, ::-1], 4: array[::-1]}
    quarter = {5: array.swapaxes(0, 1), 6: np.rot90(array), 7: array[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(array, 3)}
    return {1: array, **flipped, **quarter}[orientation]


@pytest.mark.parametrize("ending", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_shown_as_one_sees_it(tmp_path, ending, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(turned(pixels(), orientation))
    path = save(stored, tmp_path / f"x.{ending}", exif=exif, **({"lossless": True} if ending == "webp" else {}))
    assert seen_size(path) == (WIDTH, HEIGHT, orientation != 1)
    assert np.array_equal(read(path), pixels())


def chunk(kind, data):
    """A chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


TURNED = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, 6, 0, 0)  # EXIF that says orientation 6
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
RAW = b"\nexif\n%d\n%s\n" % (len(TURNED) + 6, (b"Exif\0\0" + TURNED).hex().encode())
BEHIND = {
    "EXIF": chunk(b"eXIf", TURNED),
    "EXIF far from the end": chunk(b"eXIf", TURNED) + chunk(b"prVt", bytes(70_000)),
    "XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),  # as exiftool writes it
    "text": chunk(b"tEXt", b"Raw profile type exif\0" + RAW),  # as older versions of ImageMagick write it
    "packed text": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(RAW)),
}


@pytest.mark.parametrize("behind", BEHIND.values(), ids=BEHIND)
def test_orientation_behind_the_pixels_of_a_png(tmp_path, behind):
    path = save(Image.fromarray(turned(pixels(), 6)), tmp_path / "x.png")
    whole = path.read_bytes()
    path.write_bytes(whole[:-12] + behind + whole[-12:])
    assert seen_size(path) == (WIDTH, HEIGHT, True)
    assert np.array_equal(read(path), pixels())


def test_a_png_is_not_decoded_to_see_that_it_is_whole(tmp_path, monkeypatch):
    path = save(Image.fromarray(pixels()), tmp_path / "x.png")
    whole = path.read_bytes()
    path.write_bytes(whole[:-12] + chunk(b"tIME", bytes(7)) + whole[-12:] + b"behind")
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
    assert seen_size(path) == (WIDTH, HEIGHT, False)


@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "webp", "gif", "bmp"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9])
def test_files_that_are_cut_short_are_found_without_decoding(tmp_path, ending, share):
    path = save(Image.fromarray(pixels()), tmp_path / f"x.{ending}")
    whole = path.read_bytes()
    assert seen_size(path) == (WIDTH, HEIGHT, False)
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(PictureError, match="the file cannot be decoded"):
        seen_size(path)


def test_a_jpeg_with_a_thumbnail_that_is_cut_short(tmp_path):
    thumbnail = io.BytesIO()
    Image.fromarray(pixels()).save(thumbnail, "jpeg")
    path = save(Image.fromarray(pixels()), tmp_path / "x.jpg", comment=thumbnail.getvalue())
    assert seen_size(path) == (WIDTH, HEIGHT, False)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(PictureError, match="truncated"):
        seen_size(path)


def test_whole_files_with_something_behind_are_taken(tmp_path):
    for ending in ("jpg", "png"):
        path = save(Image.fromarray(pixels()), tmp_path / f"x.{ending}")
        path.write_bytes(path.read_bytes() + bytes(100_000))  # as phones append films
        assert seen_size(path) == (WIDTH, HEIGHT, False)


def grey(values, bits):
    """Grey of 16 bits of which the lower `bits` are used."""
    return Image.fromarray((values[..., 0].astype(np.uint16) << (bits - 8)) + (1 << (bits - 8)) - 1)


def three(values):
    return np.repeat(values[..., :1], 3, 2)


def transparent_palette(values):
    picture = Image.fromarray(values // 128 * 255).quantize(8)
    picture.info["transparency"] = bytes([0, 128, 255])
    return picture


MODES = {
    "L": (lambda v: Image.fromarray(v[..., 0]), three, "png"),
    "LA": (lambda v: Image.fromarray(v[..., 0]).convert("LA"), three, "png"),
    "1": (lambda v: Image.fromarray(v[..., 0] > 127), lambda v: 255 * (three(v) > 127), "png"),
    "P": (lambda v: Image.fromarray(v // 128 * 255).quantize(8), lambda v: v // 128 * 255, "png"),
    "P, transparent": (transparent_palette, lambda v: v // 128 * 255, "png"),
    "RGBA": (lambda v: Image.fromarray(np.dstack([v, v[..., 0]])), lambda v: v, "png"),
    "CMYK": (lambda v: Image.fromarray(v).convert("CMYK"), lambda v: v, "tiff"),
    "I;16": (lambda v: grey(v, 16), three, "png"),
    "I;16, 12 bits": (lambda v: grey(v, 12), three, "png"),
    "I;16, 10 bits": (lambda v: grey(v, 10), three, "tiff"),
    "I;16, 8 bits": (lambda v: grey(v, 8), three, "tiff"),
    "I": (lambda v: Image.fromarray(v[..., 0].astype(np.int32) << 8), three, "tiff"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("error")
def test_all_kinds_of_pixels_become_rgb(tmp_path, mode):
    make, expected, kind = MODES[mode]
    path = save(make(pixels()), tmp_path / f"x.{kind}")
    with Image.open(path) as image:
        assert image.mode == mode.split(",")[0]
    assert np.abs(read(path).astype(int) - expected(pixels())).max() <= 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((HEIGHT, WIDTH), np.float32), "floating-point"),
        (np.full((HEIGHT, WIDTH), 1 << 20, np.int32), "beyond 16"),
    ],
)
def test_pixels_without_a_stated_range_are_refused(tmp_path, values, message):
    path = save(Image.fromarray(values), tmp_path / "x.tiff")
    with pytest.raises(PictureError, match=rf"{message}.* store it with 8 or 16 bits"):
        read(path)


def png_of_16_bit_colours(path, values):
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    return path


def test_16_bit_colours_are_read_and_never_turn_black(tmp_path):
    wide = pixels().astype(np.uint16)
    assert np.array_equal(read(png_of_16_bit_colours(tmp_path / "a.png", wide << 8)), pixels())
    for bits in (8, 12):
        with pytest.raises(
            PictureError, match=r"its 16-bit colours use the lower 12 bits alone.* store it with 8 bits"
        ):
            read(png_of_16_bit_colours(tmp_path / "b.png", wide << (bits - 8)))


@pytest.mark.parametrize("ending", ["gif", "png", "webp", "tiff"])
def test_of_animations_and_pages_the_first_image_is_taken(tmp_path, ending):
    frames = [Image.fromarray(np.full((HEIGHT, WIDTH, 3), value, np.uint8)) for value in (40, 200)]
    path = save(frames[0], tmp_path / f"x.{ending}", save_all=True, append_images=frames[1:])
    assert seen_size(path) == (WIDTH, HEIGHT, False)
    assert np.abs(read(path).astype(int) - 40).max() <= 2


def test_scaling_down_is_antialiased(tmp_path):
    stripes = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    stripes[:, ::2] = 200
    path = save(Image.fromarray(stripes), tmp_path / "x.png")
    image = read(path, (8, 10)).astype(int)
    assert np.abs(image[:, 1:-1] - 100).max() < 15  # a nearest neighbour gives 0 or 200


@pytest.mark.parametrize("orientation", [1, 6])
def test_large_jpegs_come_out_nearly_as_if_decoded_in_full(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    smooth = np.asarray(Image.fromarray(pixels()).resize((640, 480), Image.Resampling.BICUBIC))
    path = save(Image.fromarray(turned(smooth, orientation)), tmp_path / "x.jpg", exif=exif, quality=95)
    expected = np.asarray(Image.fromarray(smooth).resize((61, 47), Image.Resampling.BILINEAR)).astype(int)
    found = read(path, (47, 61))
    assert found.shape == expected.shape
    assert np.abs(found - expected).mean() < 2


@pytest.mark.filterwarnings("error")
def test_images_that_pillow_takes_for_attacks_are_read_up_to_a_limit(tmp_path, monkeypatch):
    path = save(Image.fromarray(pixels()), tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert seen_size(path) == (WIDTH, HEIGHT, False)
    assert np.array_equal(read(path), pixels())
    assert Image.MAX_IMAGE_PIXELS == 10
    monkeypatch.setattr("kdtoolkit.data.pictures.MAX_PIXELS", 1000)
    with pytest.raises(PictureError, match=r"the file has 40x30 pixels, and at most .* are read; cut it into tiles"):
        seen_size(path)


def test_a_library_that_replaces_pillows_open_changes_nothing(tmp_path, monkeypatch):
    path = save(Image.fromarray(pixels()), tmp_path / "a.png")
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("replaced"))
    assert np.array_equal(read(path), pixels())


def test_pixels_are_looked_at(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)).save(path)
    check_whole(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:200] + bytes(50) + whole[250:])  # both ends are good
    with pytest.raises(PictureError, match="cannot be decoded"):
        check_whole(path)
