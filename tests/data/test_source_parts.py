import numpy as np

from semivim.data.source_parts import select_images
from semivim.data.sources import ImageSource
from tests.data.pictures import Pictures


def test_selected_images_keep_names_and_get_labels():
    names = [f"{i}.png" for i in range(6)]
    source = ImageSource(Pictures(), np.full(6, -1), ["a", "b"], names, "root")
    part = select_images(source, np.array([4, 1]), np.array([0, 1, 0, 1, 0, 1]))
    assert part.labels.tolist() == [0, 1]
    assert [part.image(i).getpixel((0, 0)) for i in range(2)] == [4, 1]
    assert [part.describe(i) for i in range(2)] == ["root/4.png", "root/1.png"]
    assert (part.class_names, part.num_classes) == (["a", "b"], 2)


# Joined sources are tested in test_sources.py and test_sources_images.py.
