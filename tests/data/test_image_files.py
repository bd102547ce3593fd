import pytest

from semivim.data.image_files import classes_of_files, find_image_files, image_extensions, is_hidden


def test_extensions_are_those_that_pillow_decodes():
    extensions = image_extensions()
    assert {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".jp2"} <= extensions
    assert not extensions & {".pdf", ".eps", ".h5", ".mpg", ".grib", ".emf", ".txt", ""}


def test_what_is_left_out_is_counted_in_one_line(write_images, caplog):
    root = write_images(["a/1.png", "a/._1.png", "b/2.JPG", "__MACOSX/a/1.png", ".x/3.png"])
    for name in ("notes.txt", "a/more.txt", "README", "b/Thumbs.db"):
        (root / name).write_text("no image")
    assert find_image_files(str(root)).names == ["a/1.png", "b/2.JPG"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{root}: left out 3 hidden (such as '.x'), 2 .txt (such as 'a/more.txt'), 1 .db (such as 'b/Thumbs.db'), "
        "1 without extension (such as 'README')"
    ]


def test_folder_of_images_only_logs_nothing(write_images, caplog):
    assert find_image_files(str(write_images(["a/1.png", "2.png"]))).names == ["2.png", "a/1.png"]
    assert not caplog.records


def test_at_most_five_kinds_are_named(tmp_path, caplog):
    for extension in "abcdefg":
        (tmp_path / f"x.{extension}").write_text("")
    assert not find_image_files(str(tmp_path)).names
    assert caplog.records[0].getMessage().endswith("1 .e (such as 'x.e') and 2 more kinds")


def test_folder_that_links_lead_to_again_counts_once(write_images):
    root = write_images(["a/1.png"])
    (root / "a/round").symlink_to(root)
    found = find_image_files(str(root))
    assert found.names == ["a/1.png"]
    assert found.repeated == [f"{root}/a/round"]


@pytest.mark.parametrize(("name", "hidden"), [(".x.jpg", True), ("._x", True), ("__MACOSX", True), ("x.jpg", False)])
def test_hidden_names(name, hidden):
    assert is_hidden(name) is hidden


def test_class_is_the_outermost_folder():
    assert classes_of_files(["cat/1.png", "cat/more/2.png", "3.png"]) == ["cat", "cat", ""]
