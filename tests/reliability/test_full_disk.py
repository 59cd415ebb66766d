"""A disk that fills up under a running node, on a real small file system: it goes on serving, and by itself it goes on
with all the rest when there is room again."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.reliability.site import MODEL, site
from tests.support.processes import wait_until

pytestmark = [pytest.mark.postgres, pytest.mark.mqtt, pytest.mark.system]

# Nothing is taken up before it is used; less would be no disk to place a model on.
ROOMY = 8 << 30
FULL_S = 2.0


class SmallDisk:
    """A tmpfs whose size changes while it is in use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has_room(self) -> None:
        """Plenty of it."""
        assert self._mount(f"remount,size={ROOMY}") == ""

    def is_full(self) -> None:
        """Not a page is left."""
        for _ in range(20):
            used = os.statvfs(self.folder)
            # Refused when somebody wrote meanwhile: a size below what is used.
            if not self._mount(f"remount,size={(used.f_blocks - used.f_bfree) * used.f_frsize}"):
                break
        assert os.statvfs(self.folder).f_bfree == 0

    def _mount(self, options: str) -> str:
        """ "" or why not."""
        command = ["mount", "-t", "tmpfs", "-o", options, "slmfleet-test", self.folder]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stderr.strip() if done.returncode else ""

    @classmethod
    @contextlib.contextmanager
    def mounted(cls, folder: Path) -> Iterator[SmallDisk]:
        """On a new folder, for as long as the block runs."""
        folder.mkdir()
        disk = cls(folder)
        if problem := disk._mount(f"mode=0700,size={ROOMY}"):
            pytest.skip(f"no file system of our own here: {problem}")
        try:
            yield disk
        finally:
            subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
@pytest.mark.timeout(120)
def test_a_full_disk_stops_nothing_that_is_served_and_mends_by_itself() -> None:
    with contextlib.ExitStack() as stack:
        fleet = stack.enter_context(site())
        disk = stack.enter_context(SmallDisk.mounted(fleet.folder / "edge-1"))
        node = fleet.add_node("edge-1")
        stack.callback(lambda: node.child and node.child.kill(node.child.descendants()))
        fleet.serve_model()
        pid = node.child and node.child.pid
        with node.asker().all_along(MODEL) as asked:
            disk.is_full()
            fleet.deploy("while-full")
            threading.Event().wait(FULL_S)
            disk.has_room()
            fleet.await_agreement(60)
            wait_until(lambda: node.name in fleet.warm("while-full"), "the change came through", 30)
        assert node.child is not None
        assert node.child.process.poll() is None, node.child.output[-3000:]
        assert node.child.pid == pid
        assert asked.failures == []
        assert asked.answered > 0
        # What was numbered is there; what could not be written never had a number.
        found = fleet.await_rows(node, 75)
        assert found.twice == []
        assert len([key for key in node.numbered.last if key[0] == "metrics"]) == 1, (
            "one epoch: the daemon never restarted"
        )
