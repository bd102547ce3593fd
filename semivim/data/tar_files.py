"""Images in a plain tar file by index, read in place; the folders in it are the classes."""

import posixpath
import tarfile
from collections.abc import Iterator

from semivim.data.image_files import image_extensions, is_hidden, log_left_out
from semivim.utils.user_error import UserError


def index_tar(path: str) -> dict[str, tuple[str, int, int]]:
    """Index the images of a tar file, in which a tar file counts as a folder of its name.

    Folders that hold all images between them and the root, such as the ``train`` of ``tar cf data.tar train``, are
    left off the names. Of members with one name the last counts, as when the file is unpacked.

    Returns:
        Relative name of each image, and its file, offset and size in bytes.

    Raises:
        UserError: If the file is not a plain tar file.
    """
    places: dict[str, tuple[str, int, int]] = {}
    left_out: list[str] = []
    try:
        with tarfile.open(path, "r:") as archive:
            for name, offset, size in _members(archive, "", 0):
                is_image = posixpath.splitext(name)[1].lower() in image_extensions()
                if not is_image or any(is_hidden(part) for part in name.split("/")):
                    left_out.append(name)
                else:
                    places[name] = (path, offset, size)
    except tarfile.TarError as error:
        raise UserError(f"{path} is not a plain tar file: {error}") from error
    log_left_out(path, left_out)
    while places and len({name.split("/", 1)[0] for name in places}) == 1 and all(n.count("/") > 1 for n in places):
        places = {name.split("/", 1)[1]: place for name, place in places.items()}
    return places


def _members(archive: tarfile.TarFile, folder: str, start: int) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of each file, of those in inner tar files too."""
    for member in archive:
        if not member.isfile():
            continue
        name = posixpath.normpath(posixpath.join(folder, member.name.lstrip("/")))
        if name.lower().endswith(".tar"):
            with tarfile.open(fileobj=archive.extractfile(member), mode="r:") as inner:
                yield from _members(inner, name[: -len(".tar")], start + member.offset_data)
        else:
            yield name, start + member.offset_data, member.size
