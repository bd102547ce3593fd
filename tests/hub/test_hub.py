"""Runs are published over real HTTP, and pulled again as a user would."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.hub_client import Answer, shared_client, shared_hub
from tests.hub_server import Fault, HubServer
from tests.run_folder import write_run

_PUBLISH = (
    "import os\n"
    "from semivim.hub.hub import publish\n"
    "os.environ['HF_TOKEN'] = options.pop('token', 'hf_write')\n"
    "try:\n    result = vars(publish(run, repo, **options))\n"
    "finally:\n    os.environ['HF_TOKEN'] = 'hf_write'"
)
_PULL = (
    "import os, tempfile, timm, torch\n"
    "os.environ['HF_TOKEN'] = token\n"
    "try:\n"
    "    model = timm.create_model(name, pretrained=True, cache_dir=tempfile.mkdtemp(dir=os.environ['HF_HOME']))\n"
    "finally:\n    os.environ['HF_TOKEN'] = 'hf_write'\n"
    "result = model.eval()(torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)).tolist()"
)
_numbers = itertools.count()


@pytest.fixture
def hub() -> Iterator[HubServer]:
    server = shared_hub()
    yield server
    server.fault = None


@pytest.fixture
def repo() -> str:
    return f"org/run{next(_numbers)}"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


def _publish(run: Path, repo: str, **options: object) -> Answer:
    return shared_client().run(_PUBLISH, run=str(run), repo=repo, options=options)


def _shift_weights(run: Path, by: float) -> None:
    weights = load_file(run / "model.safetensors")
    weights["head.bias"] += by
    save_file(weights, run / "model.safetensors")


def _pull(name: str, token: str = "hf_write") -> Answer:
    return shared_client().run(_PULL, name=name, token=token)


def test_push_and_pull_by_name_tag_and_commit(hub: HubServer, repo: str, run_dir: Path, tmp_path: Path) -> None:
    first = _publish(run_dir, repo, tag="v1")
    assert first.result, first.stderr
    assert f"GET /{repo}/resolve/v1/config.json" in hub.requests
    other = write_run(tmp_path)
    _shift_weights(other, 0.5)
    second = _publish(other, repo)
    assert second.result, second.stderr
    old, new = _pull(f"local-dir:{run_dir}"), _pull(f"local-dir:{other}")
    assert old.result and new.result and old.result != new.result, old.stderr
    assert _pull(f"hf-hub:{repo}@v1").result == old.result
    assert _pull(f"hf-hub:{repo}@{first.result['commit']}").result == old.result
    assert _pull(f"hf-hub:{repo}").result == new.result
    assert not hub.tokens_on_cdn


def test_what_is_published_holds_no_pickle_and_no_path_of_the_machine(hub: HubServer, repo: str, run_dir: Path) -> None:
    assert _publish(run_dir, repo).result
    stored = hub.repos[repo]
    files = stored.commits[stored.branches["main"]]
    wanted = {"model.safetensors", "config.json", "README.md", "args.yaml", "metrics.json", "summary.csv", "curves.png"}
    assert set(files) == wanted | {".gitattributes"}
    assert not any(b"/home" in data or b"pickle" in data for data in files.values())
    assert files["model.safetensors"] == (run_dir / "model.safetensors").read_bytes()


def test_private_repository_needs_the_token(hub: HubServer, repo: str, run_dir: Path) -> None:
    assert _publish(run_dir, repo, private=True).result
    assert hub.repos[repo].private
    assert _pull(f"hf-hub:{repo}", "hf_read").result
    assert "401" in _pull(f"hf-hub:{repo}", "hf_nobody").error


def test_private_refuses_a_public_repository_before_uploading(hub: HubServer, repo: str, run_dir: Path) -> None:
    hub.add(repo, {"README.md": b"public"})
    start = len(hub.requests)
    assert "exists and is public" in _publish(run_dir, repo, private=True).line
    assert not [r for r in hub.requests[start:] if "commit" in r or "cdn" in r]


def test_existing_tag_is_refused_before_uploading(hub: HubServer, repo: str, run_dir: Path) -> None:
    assert _publish(run_dir, repo, tag="v1").result
    commits = len(hub.repos[repo].commits)
    assert "tag v1 exists" in _publish(run_dir, repo, tag="v1").line
    assert len(hub.repos[repo].commits) == commits


def test_dry_run_sends_nothing(hub: HubServer, repo: str, run_dir: Path) -> None:
    start = len(hub.requests)
    answer = _publish(run_dir, repo, dry_run=True)
    assert answer.result["commit"] == "" and answer.result["files"]["model.safetensors"] > 0
    assert hub.requests[start:] == [] and repo not in hub.repos


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        pytest.param(Fault("POST /api/repos", 401), "401 Unauthorized: no valid token", id="401"),
        pytest.param(Fault("POST .*preupload", 403), "403 Forbidden: the token may not", id="403"),
        pytest.param(Fault("POST .*preupload", 404), "404 Not Found", id="404"),
        pytest.param(Fault("POST .*preupload", 429, {"Retry-After": "90"}), "429 .*wait 90 s", id="429"),
        pytest.param(Fault("POST .*commit", 500), "500 .*the Hub failed", id="500"),
        pytest.param(Fault("PUT /cdn", 500), "500 .*the Hub failed", id="500-upload"),
        pytest.param(Fault("POST /api/repos", "hang"), "no answer in time", id="hang"),
        pytest.param(Fault("POST .*/tag/", 403), "403 Forbidden.*commit [0-9a-f]{40} is uploaded", id="tag"),
        pytest.param(Fault("GET /cdn", "corrupt"), "checksum .*commit [0-9a-f]{40} is uploaded", id="corrupt"),
    ],
)
def test_failure_is_one_line(hub: HubServer, repo: str, tmp_path: Path, fault: Fault, cause: str) -> None:
    run = write_run(tmp_path)
    # weights of its own, or the server would know them already
    _shift_weights(run, 1.0 + int(repo.removeprefix("org/run")))
    hub.fault = fault
    answer = _publish(run, repo, tag="v1")
    assert answer.line.startswith(f"HubError: {repo}: "), answer.line
    assert re.search(cause, answer.line), answer.line


def test_read_only_token(repo: str, run_dir: Path) -> None:
    assert "403 Forbidden" in _publish(run_dir, repo, token="hf_read").line


def test_changed_upload_is_noticed(hub: HubServer, repo: str, run_dir: Path) -> None:
    hub.fault = Fault("POST .*commit", "swap")
    answer = _publish(run_dir, repo)
    assert "config.json at" in answer.line and "SHA-256" in answer.line


def test_other_logits_after_the_download_are_noticed(repo: str, run_dir: Path) -> None:
    code = (
        "import torch\nfrom semivim.hub import hub\n"
        "right, answers = hub._logits, iter([torch.zeros(2, 5), torch.full((2, 5), 1e-7)])\n"
        "hub._logits = lambda model, images: next(answers)\n"
        "try:\n    hub.publish(run, repo)\n"
        "finally:\n    hub._logits = right"
    )
    assert "give other logits" in shared_client().run(code, run=str(run_dir), repo=repo).line


def test_bad_run_folder(tmp_path: Path, repo: str) -> None:
    assert "lacks model.safetensors, config.json" in _publish(tmp_path, repo).line
    run = write_run(tmp_path)
    (run / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:5000])
    assert f"run folder {run}: the weights do not load" in _publish(run, repo).line
    write_run(run)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "architecture": "no_such_model"}))
    assert "no_such_model" in _publish(run, repo).line


def test_weights_that_are_not_finite_are_refused(tmp_path: Path, repo: str) -> None:
    run = write_run(tmp_path)
    weights = load_file(run / "model.safetensors")
    weights["head.bias"][0] = float("nan")
    save_file(weights, run / "model.safetensors")
    assert "not finite" in _publish(run, repo).line


@pytest.mark.parametrize("name", ["alone", "a/b/c", "org/bad name", "org/two\nlines"])
def test_bad_repository_name(run_dir: Path, name: str) -> None:
    assert _publish(run_dir, name, dry_run=True).line.startswith("UserError: --repo: wanted org/name, got ")


@pytest.mark.parametrize("tag", ["", "bad tag~", "v1/2", "a..b", "-v", "v1.", "é", "v1\n", "v.lock", "main"])
def test_bad_tag(repo: str, run_dir: Path, tag: str) -> None:
    assert _publish(run_dir, repo, tag=tag, dry_run=True).line.startswith("UserError: --tag: wanted letters")


def test_bad_license(repo: str, run_dir: Path) -> None:
    for license_id in ("", "MIT", "gpl 3", "mit\n"):
        answer = _publish(run_dir, repo, license_id=license_id, dry_run=True)
        assert answer.line.startswith("UserError: --license: wanted an identifier")


def test_license_is_published_in_card_and_config(hub: HubServer, repo: str, run_dir: Path) -> None:
    assert _publish(run_dir, repo, tag="v1.0-rc1", license_id="cc-by-4.0").result
    stored = hub.repos[repo]
    files = stored.commits[stored.branches["main"]]
    assert b"license: cc-by-4.0" in files["README.md"]
    assert json.loads(files["config.json"])["pretrained_cfg"]["license"] == "cc-by-4.0"


def test_license_of_the_weights_a_run_began_with_is_published(repo: str, tmp_path: Path) -> None:
    run = write_run(tmp_path)
    config = json.loads((run / "config.json").read_text())
    config["pretrained_cfg"]["license"] = "cc-by-nc-4.0"
    (run / "config.json").write_text(json.dumps(config))
    assert "\nlicense:" not in _publish(run, repo, dry_run=True).result["card"]
    (run / "args.yaml").write_text("pretrained: true")
    assert "\nlicense: cc-by-nc-4.0\n" in _publish(run, repo, dry_run=True).result["card"]
