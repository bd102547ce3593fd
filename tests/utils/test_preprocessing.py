"""Preprocessing that a config states is held against what can be drawn."""

import pytest
import timm

import semivim  # noqa: F401
from semivim.utils.preprocessing import MAX_SIDE_PX, check_preprocessing, resolve_preprocessing
from semivim.utils.user_error import UserError


def test_every_config_of_timm_is_taken():
    names = timm.list_models("*", include_tags=True)
    for name in names:
        check_preprocessing(timm.get_pretrained_cfg(name).to_dict(), name)
    assert len(names) > 1000


def test_preprocessing_is_timms():
    model = timm.create_model("test_vit", in_chans=1)
    found = resolve_preprocessing(model, "model", {"mean": [0.3], "crop_pct": 0.5})
    assert (found["input_size"][0], found["mean"], found["crop_pct"]) == (1, (0.3,), 0.5)
    assert resolve_preprocessing(model, "model") == timm.data.resolve_input_data_config(model)


def test_alpha_gets_a_mean_and_a_deviation_beside_those_of_the_colours():
    model = timm.create_model("test_vit", in_chans=4)
    config = model.pretrained_cfg
    for args in ({"in_chans": 4}, {"input_size": [4, 160, 160]}):
        found = resolve_preprocessing(model, "model", args)
        assert (found["mean"], found["std"]) == ((*config["mean"], 0.5), (*config["std"], 0.5))
    found = resolve_preprocessing(model, "model", {"in_chans": 4, "mean": [0.1, 0.2, 0.3, 0.4], "std": [0.3]})
    assert (found["input_size"][0], found["mean"], found["std"]) == (4, (0.1, 0.2, 0.3, 0.4), (0.3,) * 4)
    with pytest.raises(UserError, match="^model: it takes images of 4 channels, wanted --in-chans 4 too$"):
        resolve_preprocessing(model, "model", {"in_chans": None, "input_size": None})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("input_size", [3, MAX_SIDE_PX + 1, 9]),
        ("input_size", [3, 0, 9]),
        ("input_size", [9, 9]),
        ("input_size", "3x9x9"),
        ("input_size", [3, True, 9]),
        ("mean", []),
        ("mean", ["a"]),
        ("mean", 7),
        ("mean", [0.5, 0.5]),
        ("std", [0.5] * 4),
        ("mean", [float("nan")] * 3),
        ("std", [0.0, 0.1, 0.1]),
        ("std", [-0.1] * 3),
        ("interpolation", "sharp"),
        ("interpolation", ["bicubic"]),
        ("crop_pct", 0),
        ("crop_pct", -1),
        ("crop_pct", 2.5),
        ("crop_pct", "x"),
        ("crop_mode", "magic"),
        ("crop_mode", ["center"]),
    ],
)
def test_what_cannot_be_meant_is_named(field, value):
    model = timm.create_model("test_vit")
    model.pretrained_cfg = model.pretrained_cfg | {field: value}
    with pytest.raises(UserError, match=rf"^what: {field} is .*, wanted ") as error:
        resolve_preprocessing(model, "what")
    assert "\n" not in str(error.value)


def test_large_images_and_odd_channels_are_refused():
    model = timm.create_model("test_vit", in_chans=5)
    with pytest.raises(UserError, match="^what: it takes images of 5 channels, wanted 1, 3 or 4"):
        resolve_preprocessing(model, "what")
    model = timm.create_model("test_vit")
    model.pretrained_cfg = model.pretrained_cfg | {"crop_pct": 1e-4}
    with pytest.raises(UserError, match="^what: images would have a side of 1600000 pixels"):
        resolve_preprocessing(model, "what")
