import json
import os

import pytest

from adaptrank import _files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write(folder, **texts):
    for name, text in texts.items():
        (folder / name).write_text(text)


class Interrupted(Exception):
    pass


def write_and_fail(atomic, path, **texts):
    with atomic(path) as temporary:
        if texts:
            write(temporary, **texts)
        else:
            temporary.write_text("half")
        raise Interrupted


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path):
    file = tmp_path / "table.json"
    _files.write_json(file, {"a": 1})
    assert file.read_text() == '{\n  "a": 1\n}\n'
    with pytest.raises(Interrupted):
        write_and_fail(_files.atomic_file, file)
    assert json.loads(file.read_text()) == {"a": 1}
    assert names(tmp_path) == ["table.json"]


def test_of_two_files_neither_is_renamed_after_an_error(tmp_path):
    def write_two():
        with _files.atomic_file(tmp_path / "first") as first:
            first.write_text("1")
            write_and_fail(_files.atomic_file, tmp_path / "second")

    with pytest.raises(Interrupted):
        write_two()
    assert names(tmp_path) == []


def test_files_move_into_a_folder_that_keeps_its_others(tmp_path):
    out = tmp_path / "a" / "out"
    out.mkdir(parents=True)
    write(out, kept="kept", page="old")
    with _files.atomic_files(out) as temporary:
        write(temporary, page="new")
    assert names(out) == ["kept", "page"]
    assert (out / "page").read_text() == "new"
    with pytest.raises(Interrupted):
        write_and_fail(_files.atomic_files, out, page="newer")
    assert names(out) == ["kept", "page"]
    assert (out / "page").read_text() == "new"


def test_a_folder_is_replaced_with_all_its_files(tmp_path):
    out = tmp_path / "a" / "out"
    for name in ("old", "new"):
        with _files.atomic_folder(out) as temporary:
            write(temporary, **{name: name})
    assert names(out) == ["new"]
    with pytest.raises(Interrupted):
        write_and_fail(_files.atomic_folder, out, newer="newer")
    assert names(out) == ["new"]
    assert names(out.parent) == ["out"]


def test_a_folder_comes_back_if_the_last_rename_fails(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    write(out, old="old")
    replace = os.replace

    def refuse_new(source, target):
        if str(source).endswith(".new"):
            raise Interrupted
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse_new)
    with pytest.raises(Interrupted), _files.atomic_folder(out):
        pass
    assert names(tmp_path) == ["out"]
    assert names(out) == ["old"]


def test_leftovers_are_the_temporary_names_of_one_path(tmp_path):
    killed = tmp_path / ".out.123.new"
    killed.mkdir()
    (tmp_path / ".other.123.new").mkdir()
    assert _files.leftovers(tmp_path / "out") == [killed]
