import io

import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from semivim.utils.pixels import DEFAULT_RULES, PixelRules, to_8_bit, uses_little_of_its_range, usual_rules, white_value

DEEP = np.array([[0, 15, 16, 2048, 4095]], dtype=np.uint16)


def written(image, kind, **options):
    """The image as Pillow reads it from a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(io.BytesIO(file.getvalue()))


def shown(image, rules=DEFAULT_RULES):
    image = to_8_bit(image, rules)
    return image.mode, np.asarray(image).tolist()


def with_colour_key(mode, pixel, key):
    return written(Image.new(mode, (1, 1), pixel), "PNG", transparency=key)


@pytest.mark.parametrize(
    ("image", "mode", "pixel"),
    [
        (Image.new("RGBA", (1, 1), (10, 20, 30, 0)), "RGB", [255, 255, 255]),
        (Image.new("RGBA", (1, 1), (10, 20, 30, 255)), "RGB", [10, 20, 30]),
        (Image.new("RGBA", (1, 1), (0, 0, 0, 51)), "RGB", [204, 204, 204]),
        (Image.new("RGBa", (1, 1), (0, 0, 0, 0)), "RGB", [255, 255, 255]),
        (Image.new("LA", (1, 1), (7, 0)), "L", 255),
        (Image.new("LA", (1, 1), (7, 255)), "L", 7),
        (with_colour_key("RGB", (1, 2, 3), (1, 2, 3)), "RGB", [255, 255, 255]),
        (with_colour_key("RGB", (1, 2, 3), (1, 2, 4)), "RGB", [1, 2, 3]),
        (with_colour_key("L", 9, 9), "L", 255),
        (with_colour_key("L", 9, 8), "L", 9),
    ],
)
def test_transparency_is_composed_on_white(image, mode, pixel):
    assert shown(image) == (mode, [[pixel]])


def test_background_of_another_colour():
    rules = PixelRules((200, 100, 0))
    assert shown(Image.new("RGBA", (1, 1), (0, 0, 0, 0)), rules) == ("RGB", [[[200, 100, 0]]])
    assert shown(Image.new("LA", (1, 1), (7, 0)), rules) == ("RGB", [[[200, 100, 0]]])
    assert shown(Image.new("LA", (1, 1), (7, 0)), PixelRules((9, 9, 9))) == ("L", [[9]])
    assert shown(Image.new("RGB", (1, 1), (1, 2, 3)), rules) == ("RGB", [[[1, 2, 3]]])


@pytest.mark.parametrize(
    ("image", "mode", "pixel"),
    [
        (Image.new("RGBA", (1, 1), (10, 20, 30, 0)), "RGBA", [10, 20, 30, 0]),
        (written(Image.new("RGBA", (1, 1), (10, 20, 30, 77)), "TIFF"), "RGBA", [10, 20, 30, 77]),
        (Image.new("LA", (1, 1), (7, 9)), "RGBA", [7, 7, 7, 9]),
        (with_colour_key("RGB", (1, 2, 3), (1, 2, 3)), "RGBA", [1, 2, 3, 0]),
        (with_colour_key("L", 9, 9), "RGBA", [9, 9, 9, 0]),
        (Image.new("RGB", (1, 1), (1, 2, 3)), "RGB", [1, 2, 3]),
        (Image.new("L", (1, 1), 7), "L", 7),
        (Image.new("CMYK", (1, 1), (0, 255, 0, 0)), "RGB", [255, 0, 255]),
        (Image.new("I;16", (1, 1), 32768), "L", 128),
    ],
)
def test_alpha_is_kept_where_it_is_a_channel(image, mode, pixel):
    assert shown(image, usual_rules(4)) == (mode, [[pixel]])
    assert usual_rules(1) == usual_rules(3) == DEFAULT_RULES


def test_a_fourth_channel_that_pillow_drops_is_refused():
    image = written(Image.new("RGBX", (1, 1), (1, 2, 3, 4)), "TIFF")
    assert shown(image) == ("RGB", [[[1, 2, 3]]])
    with pytest.raises(ValueError, match="its fourth channel is not declared as alpha, wanted 2 as TIFF's Ex"):
        shown(image, usual_rules(4))


def test_deep_pixels_are_scaled_by_what_the_file_states():
    tags = ImageFileDirectory_v2()
    tags[281] = 4095  # MaxSampleValue
    assert shown(written(Image.fromarray(DEEP), "TIFF", tiffinfo=tags)) == ("L", [[0, 0, 1, 128, 255]])
    for kind in ("TIFF", "PNG"):
        assert shown(written(Image.fromarray(DEEP * 16), kind)) == ("L", [[0, 0, 1, 128, 255]])
    header = b"P5 5 1 4095\n"
    assert shown(Image.open(io.BytesIO(header + DEEP.astype(">u2").tobytes()))) == ("L", [[0, 0, 1, 128, 255]])


@pytest.mark.parametrize(("stated", "white"), [(0, 65535), (200, 65535), (1023, 1023), (65535, 65535)])
def test_stated_maximum_must_be_one_of_a_deep_image(stated, white):
    tags = ImageFileDirectory_v2()
    tags[281] = stated
    assert white_value(written(Image.fromarray(DEEP), "TIFF", tiffinfo=tags), DEFAULT_RULES) == white


def test_max_value_is_white():
    rules = PixelRules(max_value=4095)
    assert shown(Image.fromarray(DEEP), rules) == ("L", [[0, 0, 1, 128, 255]])
    wide = np.array([[-5, 0, 2048, 4095, 70000]], dtype=np.int32)  # as signed CT values
    assert shown(Image.fromarray(wide), rules) == ("L", [[0, 0, 128, 255, 255]])
    assert shown(Image.new("L", (1, 1), 7), rules) == ("L", [[7]])
    with pytest.raises(ValueError, match=r"mode I\), wanted 8 or 16 bits a channel, or --max-value"):
        shown(Image.fromarray(wide))
    with pytest.raises(ValueError, match=r"mode F\), wanted 8 or 16 bits a channel$"):
        shown(Image.new("F", (1, 1)), rules)


def test_little_used_range_is_found():
    deep = Image.fromarray(DEEP)
    assert uses_little_of_its_range(deep, DEFAULT_RULES) == 4095
    assert uses_little_of_its_range(deep, PixelRules(max_value=4095)) is None
    assert uses_little_of_its_range(Image.fromarray(DEEP * 2 + 2), DEFAULT_RULES) is None  # 1/8 of the range
    assert uses_little_of_its_range(Image.fromarray(DEEP * 0), DEFAULT_RULES) is None
    assert uses_little_of_its_range(Image.new("L", (1, 1), 3), DEFAULT_RULES) is None
