"""The files of a compiled program are unpacked once per node, also by many processes at once."""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path

import pytest

from ray_zerocopy import ZeroCopyError
from ray_zerocopy._model import package

FILES = {"data/model/a.so": b"code" * 1000, "data/model/a.json": b"{}"}
KEY = package.hash_files(FILES)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary directory for this test, and in it the directory of the packages."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"ray_zerocopy-{os.getuid()}"


def test_many_at_once_leave_one_directory(root: Path) -> None:
    """Sixteen threads get one directory with all files, which only this user can write."""
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(package.unpack_files(KEY, FILES))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [str(root / KEY)] * 16
    assert os.listdir(root) == [KEY]
    assert {name: (root / KEY / name).read_bytes() for name in FILES} == FILES
    assert root.stat().st_mode & 0o777 == 0o700


def test_other_content_has_another_key() -> None:
    """The key depends on each name and each byte."""
    keys = [package.hash_files(files) for files in (FILES, {"b": FILES["data/model/a.so"]}, {**FILES, "c": b""})]
    assert len({KEY, *keys}) == 3


def test_a_damaged_directory_is_replaced(root: Path) -> None:
    """If a cleaner of temporary files removed a file, or a crash cut it, the next unpacking writes it again."""
    directory = Path(package.unpack_files(KEY, FILES))
    (directory / "data/model/a.so").write_bytes(b"co")
    (directory / "data/model/a.json").unlink()
    assert package.unpack_files(KEY, FILES) == str(directory)
    assert (directory / "data/model/a.so").read_bytes() == FILES["data/model/a.so"]
    assert os.listdir(root) == [KEY]


def test_what_a_killed_process_left_is_removed(root: Path) -> None:
    """A directory that was being written is never opened, and is removed after ten minutes."""
    for name, age in ((".old", 3600), (".new", 0)):
        (root / name / "data").mkdir(parents=True)
        os.utime(root / name, (package.time.time() - age,) * 2)
    os.chmod(root, 0o700)
    package.unpack_files(KEY, FILES)
    assert sorted(os.listdir(root)) == [".new", KEY]


def test_a_directory_without_room_is_an_error_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the temporary directory cannot be written, the error names it, the size and the remedy."""
    monkeypatch.setattr(tempfile, "tempdir", "/proc")
    with pytest.raises(ZeroCopyError, match=r"4002 bytes .*/proc/ray_zerocopy-.*TMPDIR"):
        package.unpack_files(KEY, FILES)


def test_a_directory_of_others_is_refused(root: Path) -> None:
    """Code is not opened from a directory that another user can write."""
    root.mkdir()
    os.chmod(root, 0o777)
    with pytest.raises(ZeroCopyError, match="chmod 700"):
        package.unpack_files(KEY, FILES)


def test_vector_sets_of_inductor_are_flags_of_linux() -> None:
    """What inductor calls AVX512 needs flags that this CPU has, if it has them at all."""
    level, here = package.features_of("x86-64-v3", "AVX2 unknown"), package.cpu_features()
    assert level <= here
    assert package.features_of("znver4", "AVX2") == here  # which instructions that allows is not known here
    if "avx512f" in here:
        assert "avx512f" not in level
        assert "avx512f" in package.features_of("x86-64-v4", "AVX2")
