"""Leases: one holder per unit, released by the kernel when the holder dies."""

import os
import signal

import pytest

from datatools import DataError, files


def in_child(call):
    """Run `call` in a forked process that then waits; returns its process id and what `call` returned, as a number."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write, bytes([int(call())]))
        signal.pause()
    os.close(write)
    answer = os.read(read, 1)[0]
    os.close(read)
    return pid, answer


def test_a_unit_has_one_holder_until_it_is_given_back_or_its_holder_dies(tmp_path):
    path = tmp_path / ".leases"
    with files.Leases(path) as leases:
        assert leases.take(3) and leases.take(2**40)
        pid, taken = in_child(lambda: [child := files.Leases(path), child.take(3) * 2 + child.take(4)][1])
        assert taken == 1 and not leases.take(4)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert leases.take(4)
        leases.give_back(3)
        pid, taken = in_child(lambda: files.Leases(path).take(3))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert taken == 1


def test_a_missing_file_and_a_link_are_refused(tmp_path):
    with pytest.raises(DataError, match="nothing"):
        files.Leases(tmp_path / "nothing", create=False)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Exception, match="link"):
        files.Leases(tmp_path / "link")


def test_the_holder_of_a_folder(tmp_path):
    assert files.holder(tmp_path) is None
    with files.lock_folder(tmp_path):
        assert f'"pid": {os.getpid()}' in str(files.holder(tmp_path))
        with pytest.raises(files.InUse, match=f"process {os.getpid()}"), files.lock_folder(tmp_path):
            pass
    assert files.holder(tmp_path) is None
