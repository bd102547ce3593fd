import sys

import numpy as np
import pytest

from semivim.data import open_source
from semivim.data.embedded import HELD_OUT, SIDE, PhotoCrops
from semivim.utils.user_error import UserError

pytest.importorskip("sklearn")


def test_no_pixel_is_trained_on_and_held_out():
    train, held_out = PhotoCrops(True), PhotoCrops(False)
    assert len(train) > 500 and len(held_out) > 50
    assert {photo for photo, *_ in train.places} == {photo for photo, *_ in held_out.places} == {0, 1}
    right_end = max(left + SIDE for _, _, left in train.places)
    assert right_end <= 640 - HELD_OUT <= min(left for _, _, left in held_out.places)
    for crops in (train, held_out):
        for index in (0, len(crops) - 1):
            assert crops(index).size == (SIDE, SIDE)
    assert not np.array_equal(np.asarray(train(0)), np.asarray(train(1)))


def test_they_are_a_dataset_without_labels():
    source = open_source("embedded/photos", split="validation")
    assert len(source) == len(PhotoCrops(False))
    assert (source.labels == -1).all()
    assert source.image(3).tobytes() == PhotoCrops(False)(3).tobytes()
    with pytest.raises(UserError, match="split 'test-2' of 'embedded/photos' does not exist"):
        open_source("embedded/photos", split="test-2")


def test_scikit_learn_is_asked_for(monkeypatch):
    from semivim.data import embedded

    embedded._photos.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"pip install 'semivim\[demo\]'"):
        PhotoCrops(True)
