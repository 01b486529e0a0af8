"""Images of other depths than 8 bits keep their contrast, whatever white is in them; a guess is noted."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from focalnet.cli import depth
from focalnet.cli.images import read_image

EIGHT = np.linspace(0, 255, 64).round().reshape(8, 8)
RAMP = (EIGHT / 255).astype(np.float32)


@pytest.fixture(autouse=True)
def _nothing_noted_before(monkeypatch):
    monkeypatch.setattr(depth, "_noted", set())


def grey(values, path, **options):
    """What is read of an image of these values."""
    Image.fromarray(values).save(path, **options)
    pixels = np.asarray(read_image(path))
    assert pixels.dtype == np.uint8 and (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "deep.jp2"])
def test_16_bit_grey_has_the_upper_8_of_the_bits_that_it_uses(name, bits, tmp_path, capsys):
    values = np.linspace(0, 2**bits - 1, 64).astype(np.uint16).reshape(8, 8)
    if name.endswith("jp2"):
        # Pillow reads these at full scale, and so they are taken.
        assert (grey(values, tmp_path / name) == values // 256).all()
        assert capsys.readouterr().err == ""
        return
    assert (grey(values, tmp_path / name) == values >> (bits - 8)).all()
    noted = capsys.readouterr().err
    assert noted == "" if bits == 16 else f"{name} is 16-bit grey" in noted and f"taken for {bits} bits" in noted


def test_12_bits_that_the_file_states_are_no_guess(tmp_path, capsys):
    """A dark image of a 12-bit camera: packed two values in three bytes, white is 4095 although none is brighter
    than 255."""
    tags = {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 277: 1, 278: 1, 279: 3}
    data = bytes([0x0F, 0xF0, 0x10])  # 255 and 16
    offset = 8 + 2 + 12 * (len(tags) + 1) + 4
    entries = sorted({**tags, 273: offset}.items())
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    head = b"II*\0" + struct.pack("<IH", 8, len(entries))
    (tmp_path / "packed.tif").write_bytes(head + directory + struct.pack("<I", 0) + data)
    assert np.asarray(read_image(tmp_path / "packed.tif"))[0, :, 0].tolist() == [255 >> 4, 16 >> 4]
    assert capsys.readouterr().err == ""


def test_the_white_that_a_tiff_states_is_taken(tmp_path, capsys):
    tags = ImageFileDirectory_v2()
    tags[281] = 4095
    values = np.array([[0, 256, 512]], np.uint16)
    assert grey(values, tmp_path / "stated.tif", tiffinfo=tags).tolist() == [[0, 16, 32]]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "values, expected, note",
    [
        (RAMP, EIGHT, None),
        ((EIGHT // 4 / 255).astype(np.float32), EIGHT // 4, None),
        (RAMP * 255, EIGHT, "taken for 8 bits"),
        (RAMP * 4095, EIGHT, "taken for 12 bits"),
        (RAMP * 65535, EIGHT, "taken for 16 bits"),
        (RAMP * 2 - 1, EIGHT, "negative"),
        (RAMP * 1e12, EIGHT, "beyond 32 bits"),
        ((EIGHT * 257).astype(np.int32), EIGHT, "taken for 16 bits"),
        (EIGHT.astype(np.int32), EIGHT, "taken for 8 bits"),
        (EIGHT.astype(np.int32) - 100, EIGHT, "negative"),
    ],
    ids=["0..1", "dim", "0..255", "0..4095", "0..65535", "-1..1", "1e12", "int 16", "int 8", "int negative"],
)
def test_32_bits_are_scaled_by_their_range(values, expected, note, tmp_path, capsys):
    assert (grey(values, tmp_path / "deep.tif") == expected).all()
    noted = capsys.readouterr().err
    assert noted == "" if note is None else note in noted and noted.count("\n") == 1


@pytest.mark.parametrize("value", [0, 1, -7, 0.5])
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_constant_images_are_read(value, dtype, tmp_path):
    expected = {np.float32: {0: 0, 1: 255, 0.5: 128}, np.int32: {1: 1}}[dtype].get(value, 0)
    assert (grey(np.full((4, 4), value, dtype), tmp_path / "flat.tif") == expected).all()


def test_values_that_are_not_finite_are_black_and_do_not_count(tmp_path):
    values = RAMP.copy()
    values[0, :3] = np.nan, np.inf, -np.inf
    expected = np.where(np.isfinite(values), EIGHT, 0)
    assert (grey(values, tmp_path / "holes.tif") == expected).all()


def test_an_image_without_any_finite_value_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no value in it is finite"):
        grey(np.full((4, 4), np.nan, np.float32), tmp_path / "empty.tif")


def test_a_note_is_made_once_for_all_images_alike(tmp_path, capsys):
    for name in ("a.tif", "b.tif"):
        grey((RAMP * 4000).astype(np.uint16), tmp_path / name)
    noted = capsys.readouterr().err
    assert noted.count("note: ") == 1 and "a.tif" in noted


@pytest.mark.parametrize("channels, bits, note", [(3, 12, "12"), (4, 12, "12"), (2, 12, "12"), (3, 16, None)])
def test_colour_of_16_bits_that_pillow_cuts_to_almost_nothing_is_noted(channels, bits, note, tmp_path, capsys):
    values = np.full((2, 2, channels), 2**bits - 1, ">u2")
    if channels in (2, 4):
        values[..., -1] = 65535  # opaque
    rows = b"".join(b"\0" + row.tobytes() for row in values)

    def chunk(name, content):
        body = name + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 2, 2, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "colour.png").write_bytes(png)
    read_image(tmp_path / "colour.png")
    noted = capsys.readouterr().err
    assert noted == "" if note is None else f"uses at most {note}" in noted
