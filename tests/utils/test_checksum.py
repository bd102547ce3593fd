import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from semivim.utils.checksum import check_seal, seal_checkpoint, seal_safetensors
from semivim.utils.files import check_weights_file, load_untrusted
from semivim.utils.user_error import UserError

WEIGHTS = {"weight": torch.arange(64.0), "bias": torch.ones(3)}


@pytest.fixture(params=["w.pth", "w.safetensors"])
def sealed(request, tmp_path):
    path = tmp_path / request.param
    if path.suffix == ".pth":
        torch.save(WEIGHTS, path)
        seal_checkpoint(path)
    else:
        save_file(WEIGHTS, path, metadata={"format": "pt"})
        seal_safetensors(path)
    return path


def test_sealed_file_is_read_as_before(sealed):
    check_weights_file(sealed)
    for mmap in (False, True):
        content = load_file(sealed) if sealed.suffix == ".safetensors" else torch.load(sealed, mmap=mmap)
        assert all(torch.equal(content[name], WEIGHTS[name]) for name in WEIGHTS)
    if sealed.suffix == ".pth":
        assert zipfile.ZipFile(sealed).testzip() is None


def test_every_flipped_bit_is_found(sealed):
    """Any byte of the file but the digest's name, the digest's own included."""
    whole = sealed.read_bytes()
    name = whole.find(b'"semivim.sha256":"')
    for place in range(0, len(whole), 3):
        if name <= place < name + len('"semivim.sha256":"'):
            continue
        sealed.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(UserError, match=rf"{sealed.name} is (damaged|not a readable)") as error:
            check_weights_file(sealed)
        assert "\n" not in str(error.value)


def test_cut_file_is_named(sealed):
    whole = sealed.read_bytes()
    for size in (0, 3, 10, 30, len(whole) // 2, len(whole) - 71, len(whole) - 70, len(whole) - 1):
        sealed.write_bytes(whole[:size])
        with pytest.raises(UserError, match=rf"{sealed.name} is (damaged|not a readable)"):
            check_weights_file(sealed)


def test_files_of_others_have_no_seal_and_are_read(tmp_path):
    torch.save(WEIGHTS, tmp_path / "w.pth")
    torch.save(WEIGHTS, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(WEIGHTS, tmp_path / "w.safetensors")
    for path in tmp_path.iterdir():
        check_seal(path)
        check_weights_file(path)
    assert set(load_untrusted(tmp_path / "old.pth")) == set(WEIGHTS)
