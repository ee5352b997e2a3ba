"""Files that cannot be opened for want of a descriptor: the process is told of it, and no file is blamed."""

import os
import resource

import pytest

from prelude.data import host
from prelude.data.errors import UserError
from prelude.data.host import NoMoreFiles, raise_files, refuse_few_files
from prelude.data.image_folder import open_folder
from prelude.data.open_files import OpenFiles


@pytest.fixture
def no_more():
    """Called, it leaves this process so many files that it can still open."""
    before, taken = resource.getrlimit(resource.RLIMIT_NOFILE), []

    def leave(files: int) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(before[0], 1024), before[1]))
        while True:
            try:
                taken.append(os.open(os.devnull, os.O_RDONLY))
            except OSError:
                break
        for _ in range(files):
            os.close(taken.pop())

    yield leave
    for fd in taken:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture
def shards(tmp_path):
    paths = tuple(str(tmp_path / f"{nth}.tar") for nth in range(9))
    for nth, path in enumerate(paths):
        with open(path, "wb") as file:
            file.write(bytes([nth]) * 10)
    return paths


def test_shards_are_read_through_as_few_files_as_are_left(shards, no_more):
    files = OpenFiles(shards)
    no_more(3)
    assert [files.read(nth, 0, 1)[0] for nth in (*range(9), *range(9))] == [*range(9), *range(9)]


def test_a_process_that_can_open_nothing_blames_no_shard_and_no_image(shards, no_more, tmp_path):
    files = OpenFiles(shards)
    (tmp_path / "photos").mkdir()
    for name in ("a.jpg", "a.txt"):
        (tmp_path / "photos" / name).write_bytes(b"an image")
    folder = open_folder(str(tmp_path / "photos"))
    no_more(0)
    for read in (
        lambda: files.read(0, 0, 1),
        lambda: OpenFiles((folder,)).read(0, 0, 8),
        lambda: folder.index("txt"),
        lambda: open_folder(str(tmp_path / "photos")),
    ):
        with pytest.raises(NoMoreFiles, match="files open that it may.*write `ulimit -n"):
            read()
    files.will_read([(0, 0, 1)])  # advice only


def test_a_run_raises_its_limit_and_is_refused_where_its_connections_do_not_fit(monkeypatch):
    allowed = [1024, 4096]
    monkeypatch.setattr(host.resource, "getrlimit", lambda _: tuple(allowed))
    monkeypatch.setattr(host.resource, "setrlimit", lambda _, both: allowed.__setitem__(slice(None), both))
    raise_files()
    assert allowed == [4096, 4096]
    for world_size in (1, 8, 512):
        refuse_few_files(world_size, 0)
    with pytest.raises(UserError, match="Rank 0 of 1024 has up to 4230 files.*may have 4096; the hard limit is 4096"):
        refuse_few_files(1024, 0)
    refuse_few_files(1024, 1)  # which keeps no store
    with pytest.raises(UserError, match="Rank 1 of 2048 has up to 4230 files"):
        refuse_few_files(2048, 1)
    allowed[:] = 1024, resource.RLIM_INFINITY
    refuse_few_files(8192, 0)
    raise_files()
    assert allowed == [65536, resource.RLIM_INFINITY]
