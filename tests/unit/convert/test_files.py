"""Folders that appear whole or not at all."""

import shutil
import types

import pytest

from megatron_scope.convert import files
from megatron_scope.convert.files import check_space, copy_companions, new_folder
from megatron_scope.errors import DataError


def test_a_folder_takes_its_name_at_the_end(tmp_path):
    out = tmp_path / "deep" / "out"
    with new_folder(out) as folder:
        assert folder.parent == out.parent and folder.name.startswith(".") and not out.exists()
        (folder / "a").write_text("1")
    assert (out / "a").read_text() == "1" and list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit, OSError])
def test_any_error_leaves_nothing(tmp_path, error):
    out = tmp_path / "out"
    with pytest.raises(error), new_folder(out) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "a").write_text("1")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_removed(tmp_path):
    out = tmp_path / "out"
    left = new_folder(out)
    partial = left.__enter__()
    (partial / "old").write_text("1")
    with new_folder(out) as folder:
        assert list(folder.iterdir()) == []
        (folder / "new").write_text("2")
    assert [path.name for path in out.iterdir()] == ["new"] and list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "link to nothing"])
def test_what_exists_is_not_overwritten(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "link to nothing":
        out.symlink_to(tmp_path / "nothing")
    else:
        out.mkdir()
        if kind == "folder":
            (out / "mine").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError) as raised, new_folder(out):
        raise AssertionError("not reached")
    assert str(raised.value) == f"{out} exists already; remove it or name another folder"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_without_room_is_refused(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    check_space(tmp_path / "a" / "b", free // 2)
    with pytest.raises(DataError) as raised:
        check_space(tmp_path / "a" / "b", 10 * free)
    message = str(raised.value)
    assert message.startswith(f"{tmp_path / 'a' / 'b'} needs {10 * free / 1e9:.2f} GB but {tmp_path} has ")
    assert message.endswith("GB free; make room or name a folder on another disk")


def test_the_disk_of_a_relative_path_is_looked_at(tmp_path, monkeypatch):
    seen = []

    def usage(path):
        seen.append(path)
        return types.SimpleNamespace(free=0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", usage)
    with pytest.raises(DataError, match=r"has 0\.00 GB free"):
        check_space(files.Path("out"), 1)
    assert seen == [tmp_path]


def test_links_to_files_are_copied_as_files(tmp_path):
    """As the cache of the Hugging Face hub keeps them."""
    (tmp_path / "blob").write_text("tokens")
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "tokenizer.json").symlink_to(tmp_path / "blob")
    (source / "model.safetensors").symlink_to(tmp_path / "blob")
    copy_companions(source, out)
    assert [path.name for path in out.iterdir()] == ["tokenizer.json"]
    assert not (out / "tokenizer.json").is_symlink() and (out / "tokenizer.json").read_text() == "tokens"
