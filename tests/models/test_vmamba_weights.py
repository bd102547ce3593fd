import io
import pickle
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import timm
import torch

from semivim.convert import convert
from semivim.flags.model_flags import check_weights_file
from semivim.models import VMamba
from semivim.models.vmamba_weights import checkpoint_filter_fn
from tests.released_vmamba import as_bytes, detector, first_names, released_weights, single_file, training_state
from tests.tolerance import assert_close

SMALL = {"embed_dim": 8, "depths": (1, 1, 1, 1)}
VANILLA = {"ssm_ratio": 2, "d_state": 4, "mlp_ratio": 0, "vanilla": True}
RELEASES = "https://github.com/MzeroMiko/VMamba/releases/download/"


@pytest.fixture(params=[{}, VANILLA], ids=["final", "vanilla"])
def model(request):
    torch.manual_seed(4)
    return VMamba(num_classes=5, **SMALL, **request.param).eval()


def same(mapped, model):
    wanted = model.state_dict()
    return mapped.keys() == wanted.keys() and all(torch.equal(mapped[k], wanted[k]) for k in wanted)


def test_every_layout_gives_our_names_and_shapes(model):
    state = released_weights(model)
    assert len(state) == len(model.state_dict()) and "layers.0.downsample" in "".join(state)
    for weights in (state, single_file(state), model.state_dict(), {f"module.{k}": v for k, v in state.items()}):
        assert same(checkpoint_filter_fn(weights, model), model)
        assert same(checkpoint_filter_fn(dict(sorted(weights.items())), model), model)
        assert same(checkpoint_filter_fn(training_state(weights), model), model)
    average = checkpoint_filter_fn(training_state(state), model, container="model_ema")
    assert torch.equal(average["norm.weight"], model.norm.weight + 1)


def test_the_first_releases_names():
    model = VMamba(num_classes=5, **SMALL, **VANILLA)
    state = first_names(released_weights(model))
    assert {"patch_embed.proj.weight", "layers.2.blocks.0.self_attention.Ds", "norm.bias", "head.bias"} <= state.keys()
    assert not any(key.startswith("classifier") or ".op." in key for key in state)
    assert same(checkpoint_filter_fn(state, model), model)


def test_a_detectors_backbone_brings_all_but_the_classifier(model):
    state = {"meta": {"epoch": 12}, "state_dict": detector(released_weights(model))}
    mapped = checkpoint_filter_fn(state, model)
    assert set(model.state_dict()) - set(mapped) == {"head.fc.weight", "head.fc.bias"}
    model.reset_classifier(0)
    assert same(mapped, model)


def test_what_fits_no_parameter_is_named(model):
    state = released_weights(model)
    with pytest.raises(ValueError, match=r"1 keys that the model lacks: stages\.0\.blocks\.0\.gamma"):
        checkpoint_filter_fn({**state, "layers.0.blocks.0.gamma": torch.ones(8)}, model)
    with pytest.raises(ValueError, match="entries epoch, wanted 'model' among them"):
        checkpoint_filter_fn({"epoch": 3}, model)
    with pytest.raises(ValueError, match=r"norm\.weight is of torch\.int8, wanted floating point"):
        checkpoint_filter_fn({"classifier.norm.weight": torch.ones(64, dtype=torch.int8)}, model)


def test_every_published_tag_says_where_it_comes_from():
    tags = timm.list_models("*vmamba*", pretrained=True)
    assert len(tags) == 9
    files = [timm.get_pretrained_cfg(tag).url for tag in tags]
    assert len(set(files)) == 9
    for tag, url in zip(tags, files, strict=True):
        cfg = timm.get_pretrained_cfg(tag)
        # The number sign of a release's name is escaped, or what stands behind it would be no part of the address.
        release = "%23v0cls/vssm" if "vanilla" in tag else "%23v2cls/vssm1_" if "_s1l" in tag else "%23v2cls/vssm_"
        assert url.startswith(RELEASES + release) and url.endswith(".pth")
        assert tag.split("vmamba_")[1].split("_")[0].split(".")[0] in url
        assert cfg.license == "mit" and cfg.paper_ids == "arXiv:2401.10166" and cfg.origin_url
        assert (cfg.crop_pct, cfg.interpolation, cfg.mean[0], cfg.std[0]) == (0.875, "bicubic", 0.485, 0.229)


@pytest.fixture
def server():
    """Answers with the bytes that ``files`` holds under a path as the client spelt it, escapes included."""
    files = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = files.get(self.path)
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}/", files
        httpd.shutdown()


@pytest.mark.filterwarnings("ignore:.*TypedStorage")
@pytest.mark.parametrize("layout", [dict, single_file])
@pytest.mark.parametrize("tag", ["vmamba_tiny_s1l8.mzeromiko_in1k", "vanilla_vmamba_small.mzeromiko_in1k"])
def test_pretrained_reads_the_release_over_http(tag, layout, server, tmp_path, monkeypatch):
    """A published file's layout under its address, from another host; small weights; then other classes, channels."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    address, files = server
    kwargs = {**SMALL, "d_state": 3} if "vanilla" in tag else SMALL
    torch.manual_seed(7)
    source = timm.create_model(tag.split(".")[0], **kwargs).eval()
    url = timm.get_pretrained_cfg(tag).url
    path = "/" + url.removeprefix("https://github.com/")
    files[path] = as_bytes(training_state(layout(released_weights(source))))
    with pytest.raises(pickle.UnpicklingError, match=r"yacs\.config\.CfgNode"):
        torch.load(io.BytesIO(files[path]), weights_only=True)
    overlay = {"url": address + path[1:]}
    model = timm.create_model(tag, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(model(x), source(x))
        other = timm.create_model(
            tag, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7, in_chans=1, **kwargs
        )
        assert other(x[:, :1]).shape == (2, 7)
    assert_close("stem", other.stem.conv1.weight, source.stem.conv1.weight.sum(1, keepdim=True))
    assert torch.equal(other.norm.weight, source.norm.weight)
    pyramid = timm.create_model(tag, pretrained=True, pretrained_cfg_overlay=overlay, features_only=True, **kwargs)
    with torch.no_grad():
        maps = source.forward_intermediates(x, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(pyramid.eval()(x), maps, strict=True))


def test_a_published_file_becomes_a_timm_folder(tmp_path):
    source = timm.create_model("test_vmamba", num_classes=10).eval()
    path = tmp_path / "in.pth"
    path.write_bytes(as_bytes(training_state(single_file(released_weights(source)))))
    check_weights_file(path)
    convert(path, "test_vmamba", tmp_path / "out")
    restored = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(restored(x), source(x))
    path.write_bytes(as_bytes({"state_dict": detector(released_weights(source))}))
    headless = convert(path, "test_vmamba", tmp_path / "headless")
    assert headless.num_classes == 0
    with torch.no_grad():
        assert torch.equal(headless(x), source.forward_head(source.forward_features(x), pre_logits=True))
