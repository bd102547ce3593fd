import io
import tarfile

import pytest

from semivim.data import open_source
from semivim.data.tar_files import index_tar


@pytest.fixture
def pack(write_images, tmp_path):
    def write(names, arcname="."):
        root, path = write_images(names), tmp_path / "data.tar"
        with tarfile.open(path, "w") as tar:
            tar.add(root, arcname=arcname)
        return path

    return write


def test_hidden_files_are_no_images_and_every_format_is_read(pack, caplog):
    path = pack(["cat/1.webp", "dog/2.tif", "cat/._1.jpg", "__MACOSX/cat/1.jpg", "dog/more/3.bmp"])
    source = open_source("", str(path))
    assert source.names == ["cat/1.webp", "dog/2.tif", "dog/more/3.bmp"]
    assert source.labels.tolist() == [0, 1, 1]
    assert source.class_names == ["cat", "dog"]
    assert "data.tar: left out 2 hidden (such as '__MACOSX/cat/1.jpg')" in caplog.text
    assert source.image(2).getpixel((0, 0)) == (40, 40, 40)


def test_folders_around_all_classes_are_left_off(pack):
    assert set(index_tar(str(pack(["cat/1.png", "dog/2.png"], "data/train")))) == {"cat/1.png", "dog/2.png"}


def test_only_class_keeps_its_folder(pack):
    assert set(index_tar(str(pack(["cat/1.png", "cat/2.png"])))) == {"cat/1.png", "cat/2.png"}


def test_tar_in_a_tar_is_a_folder(pack, tmp_path):
    inner = pack(["1.png", "2.png"]).read_bytes()
    with tarfile.open(tmp_path / "outer.tar", "w") as tar:
        for name in ("cat.tar", "dog.tar"):
            member = tarfile.TarInfo(name)
            member.size = len(inner)
            tar.addfile(member, io.BytesIO(inner))
    source = open_source("", str(tmp_path / "outer.tar"))
    assert source.names == ["cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"]
    assert [source.image(i).getpixel((0, 0))[0] for i in range(4)] == [0, 10, 0, 10]
