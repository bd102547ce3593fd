"""Publish a training run to the Hugging Face Hub, and check it by downloading it again."""

import json
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch
import yaml
from huggingface_hub import HfApi
from torch import Tensor, nn

import semivim
from semivim.hub.hub_session import HubError, check_repo_id, fetch, hub_session, sha256
from semivim.hub.model_card import (
    RUN_FILES,
    Run,
    check_license,
    model_card,
    public_args,
    public_config,
    public_license,
    public_metrics,
    read_run,
)
from semivim.hub.model_folder import load_folder
from semivim.runs.run_folder import ARGS, CONFIG, METRICS
from semivim.utils.preprocessing import resolve_preprocessing
from semivim.utils.user_error import UserError, one_line

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Publication:
    """What was published: its address, the commit ("" for a dry run), the files with their sizes in bytes, the card."""

    url: str
    commit: str
    files: dict[str, int]
    card: str


def publish(
    run_dir: str | Path,
    repo_id: str,
    tag: str | None = None,
    license_id: str | None = None,
    private: bool = False,
    dry_run: bool = False,
) -> Publication:
    """Upload the best model of a run, download it into an empty cache, compare logits bit for bit.

    Args:
        run_dir: Run folder, with ``model.safetensors`` and ``config.json`` of the best model.
        repo_id: Repository ``org/name``; made if it does not exist.
        tag: Name to give the commit, not yet in use.
        license_id: License of the weights, an identifier of the Hub's, e.g. ``apache-2.0``; that of the pretrained
            weights the run started from if None, and none where these name none.
        private: Publish to a private repository; an existing public one is refused.
        dry_run: Check the run and write the card, but send nothing.

    Returns:
        What was, or would be, published.

    Raises:
        UserError: If the run folder is incomplete, its weights do not load or give non-finite logits, or ``repo_id``,
            ``tag`` or ``license_id`` cannot be a name of the kind, or a file cannot be read or copied.
        HubError: If the Hub or the network fails, the repository's visibility or the tag is in the way, or what comes
            back is not what was sent.
    """
    _check_names(repo_id, tag, license_id)
    run = read_run(Path(run_dir))
    try:
        with TemporaryDirectory(prefix="semivim-publish-") as stage:
            return _publish(run, Path(stage), repo_id, tag, license_id, private, dry_run)
    except OSError as error:
        raise UserError(f"run folder {run.folder} cannot be copied: {one_line(error)}") from error


def _publish(
    run: Run, stage: Path, repo_id: str, tag: str | None, license_id: str | None, private: bool, dry_run: bool
) -> Publication:
    card = _stage(run, stage, repo_id, tag or "", license_id)
    images, logits = _reference_logits(stage, f"run folder {run.folder}")
    files = {path.name: path.stat().st_size for path in sorted(stage.iterdir())}
    api = HfApi(library_name="semivim", library_version=semivim.__version__)
    url = f"{api.endpoint}/{repo_id}"
    if dry_run:
        return Publication(url, "", files, card)
    with hub_session(repo_id):
        commit = _upload(api, stage, repo_id, tag, private)
    _logger.info("Uploaded to %s, commit %s; checking it from an empty cache", url, commit)
    try:
        if tag:
            with hub_session(repo_id):
                api.create_tag(repo_id, tag=tag, revision=commit)
        _check_upload(stage, repo_id, tag or commit, images, logits)
    except HubError as error:
        raise HubError(f"{error}; commit {commit} is uploaded, but not tagged or not checked") from error
    return Publication(url, commit, files, card)


def _check_names(repo_id: str, tag: str | None, license_id: str | None) -> None:
    check_repo_id(repo_id, "--repo")
    # less than git allows: a tag stands in an address and in hf-hub:org/name@tag, where main is the branch
    if tag is not None and not re.fullmatch(r"(?!main$)\w+([.-](?!lock$)\w+)*", tag, re.ASCII):
        raise UserError(
            f"--tag: wanted letters, digits and '_', with single '.' or '-' between, no main, no .lock; got {tag!r}"
        )
    if license_id is not None:
        check_license(license_id, "--license")


def _stage(run: Run, stage: Path, repo_id: str, revision: str, license_id: str | None) -> str:
    """Lay out the files to upload, without paths of this machine and without any pickle; return the card."""
    for name in RUN_FILES:
        shutil.copyfile(run.folder / name, stage / name)
    license_id = public_license(run, license_id)
    (stage / CONFIG).write_text(json.dumps(public_config(run, license_id), indent=2), encoding="utf-8")
    args, _ = public_args(run.args)
    (stage / ARGS).write_text(yaml.safe_dump(args, sort_keys=False), encoding="utf-8")
    (stage / METRICS).write_text(json.dumps(public_metrics(run.metrics), indent=1), encoding="utf-8")
    card = model_card(run, repo_id, revision, semivim.__version__, license_id)
    (stage / "README.md").write_text(card, encoding="utf-8")
    return card


def _reference_logits(stage: Path, where: str) -> tuple[Tensor, Tensor]:
    """Two fixed random images and the logits that the staged weights give them."""
    model = load_folder(stage, where)
    size = resolve_preprocessing(model, where)["input_size"]
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    logits = _logits(model, images)
    if not logits.isfinite().all():
        raise UserError(f"{where}: the weights give logits that are not finite")
    return images, logits


@torch.inference_mode()
def _logits(model: nn.Module, images: Tensor) -> Tensor:
    return model.eval()(images)


def _upload(api: HfApi, stage: Path, repo_id: str, tag: str | None, private: bool) -> str:
    """Create the repository if need be, upload the folder in one commit, return the commit."""
    api.create_repo(repo_id, private=private, exist_ok=True)
    if private and not api.model_info(repo_id).private:
        raise HubError(f"{repo_id}: {api.endpoint}/{repo_id}: exists and is public, wanted a private repository")
    if tag and tag in [ref.name for ref in api.list_repo_refs(repo_id).tags]:
        raise HubError(f"{repo_id}: {api.endpoint}/{repo_id}: tag {tag} exists, wanted a new one")
    architecture = json.loads((stage / CONFIG).read_text(encoding="utf-8"))["architecture"]
    return api.upload_folder(repo_id=repo_id, folder_path=stage, commit_message=f"Add {architecture}").oid


def _check_upload(stage: Path, repo_id: str, revision: str, images: Tensor, logits: Tensor) -> None:
    """Fail unless the published files, fetched into an empty cache, are the staged ones and give the same logits."""
    with TemporaryDirectory(prefix="semivim-check-") as cache:
        for path in stage.iterdir():
            found = sha256(fetch(repo_id, path.name, revision, cache))
            if found != sha256(path):
                raise HubError(f"{repo_id}: {path.name} at {revision} has SHA-256 {found}, wanted {sha256(path)}")
        with hub_session(repo_id):
            model = timm.create_model(f"hf-hub:{repo_id}@{revision}", pretrained=True, cache_dir=cache)
        if not torch.equal(_logits(model, images), logits):
            raise HubError(f"{repo_id}: the weights at {revision} give other logits than the run's")
