"""`torch.hub` finds every model, in a checkout and in the zip file that GitHub serves."""

import io
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import timm
import torch

import semivim.models  # noqa: F401
from tests.hub_client import HubClient, shared_home, shared_hub
from tests.released import as_bytes, released_weights
from tests.run_folder import write_run

_ROOT = Path(__file__).parent.parent


def _own_models() -> list[str]:
    return [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("semivim.")]


def _github_zip() -> bytes:
    """The repository under one folder named after the commit, whose entry comes first."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("org-semivim-0123abc/", b"")
        for path in [_ROOT / "hubconf.py", *sorted((_ROOT / "semivim").rglob("*.py"))]:
            archive.write(path, f"org-semivim-0123abc/{path.relative_to(_ROOT)}")
    return data.getvalue()


@pytest.fixture
def github() -> Iterator[str]:
    data = _github_zip()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/org/semivim/zipball/main" else 404)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Keep test output clean."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_local_checkout_makes_the_model_timm_makes() -> None:
    torch.manual_seed(0)
    found = torch.hub.load(str(_ROOT), "test_vim", source="local", num_classes=3)
    torch.manual_seed(0)
    wanted = timm.create_model("test_vim", num_classes=3)
    for name, value in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def test_zip_of_github_with_every_model_and_pretrained_weights(github: str, tmp_path: Path) -> None:
    run = write_run(tmp_path)
    shared_hub().add("org/hubconf", {name: (run / name).read_bytes() for name in ("config.json", "model.safetensors")})
    tiny = released_weights(timm.create_model("vim_tiny_patch16_224"))
    tiny["head.bias"] = torch.arange(1000.0)
    shared_hub().add("hustvl/Vim-tiny-midclstok", {"vim_t_midclstok_76p1acc.pth": as_bytes({"model": tiny})})
    code = """
import torch
torch.hub.set_dir(folder)
torch.hub._git_archive_link = lambda owner, name, ref: f"{github}/{owner}/{name}/zipball/{ref}"
repo, trust = "org/semivim:main", dict(trust_repo=True, skip_validation=True)
names = torch.hub.list(repo, **trust, verbose=False)
helps = [torch.hub.help(repo, name, **trust) for name in names]
weights = dict(hf_hub_id="org/hubconf", num_classes=5)
model = torch.hub.load(repo, "test_vim", pretrained=True, pretrained_cfg_overlay=weights, **trust, verbose=False).eval()
tiny = torch.hub.load(repo, "vim_tiny_patch16_224", pretrained=True, **trust, verbose=False)
import semivim
from semivim.ops import use_backend
with use_backend("reference"):
    logits = model(torch.ones(1, 3, 32, 32))
result = dict(names=names, helps=helps, file=semivim.__file__, logits=logits.tolist(), bias=tiny.head.bias.tolist())
"""
    with HubClient(shared_hub().url, shared_home(), imports="") as client:
        answer = client.run(code, folder=str(tmp_path / "hub"), github=github)
    assert answer.result, answer.stderr
    assert sorted(answer.result["names"]) == _own_models() and "semivim_base" in answer.result["names"]
    assert all(text and text.strip() for text in answer.result["helps"])
    assert answer.result["file"].startswith(str(tmp_path / "hub"))
    assert answer.result["bias"] == tiny["head.bias"].tolist()
    wanted = timm.create_model(f"local-dir:{run}", pretrained=True).eval()(torch.ones(1, 3, 32, 32))
    assert torch.allclose(torch.tensor(answer.result["logits"]), wanted, atol=1e-6)
