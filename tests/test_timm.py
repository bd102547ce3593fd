import timm

from semivim._timm import feature_take_indices, update_model_input_size


def test_the_private_names_do_what_the_models_rely_on():
    assert feature_take_indices(6, 2) == ([4, 5], 5)
    assert feature_take_indices(6, [-1, 0]) == ([5, 0], 5)
    model = timm.create_model("test_vit", device="meta")
    update_model_input_size(model, (32, 64), patch_size=8)
    config = timm.models.get_model_input_config(model)
    assert config["input_size"] == (3, 32, 64)
    assert timm.models.get_model_args(model)["patch_size"] == 8
