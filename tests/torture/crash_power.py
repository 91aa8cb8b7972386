"""A power loss at any moment: what was written is recorded, and what a disk may hold of it is made up.

What was not fsynced may be there, torn, zeroed, or missing: a file's bytes, and each name that was put into
or taken from a folder since that folder was fsynced, independently of one another. That is more than a
journalling file system allows itself.
"""

import os
from contextlib import contextmanager
from pathlib import Path

ROOT = 0


class Recorder:
    """What happens below a folder while `recording`: events as (what, node, ...), nodes numbered from 1.

    ("create", node, folder, name, is_folder) · ("write", node, bytes) · ("sync", node) · ("remove", folder,
    name) · ("move", node, folder, name, new folder, new name) · ("done", anything)
    """

    def __init__(self, root):
        self.root, self.events, self.nodes, self.bytes = str(root), [], {"": ROOT}, {}

    def done(self, what):
        """Note that a promise was made here, of which a power loss may take nothing."""
        self._look()
        self.events.append(("done", what))

    @contextmanager
    def recording(self):
        """With the calls of `os` that this goes through, wrapped."""
        names = ("fsync", "rename", "replace", "unlink", "remove", "rmdir")
        real = {name: getattr(os, name) for name in names}
        os.fsync = lambda handle: self._sync(handle, real["fsync"])
        for name in ("rename", "replace"):
            setattr(os, name, lambda old, new, call=real[name]: self._move(old, new, call))
        for name in ("unlink", "remove", "rmdir"):
            setattr(os, name, lambda path, *, dir_fd=None, call=real[name]: self._remove(path, dir_fd, call))
        try:
            yield
        finally:
            for name, call in real.items():
                setattr(os, name, call)

    def _inside(self, path):
        """The path below the root, or None."""
        inner = os.path.relpath(path, self.root)
        return None if inner.startswith("..") else "" if inner == "." else inner

    def _look(self):
        """Note what was made and written since the last look."""
        for folder, folders, files in os.walk(self.root):
            for name in sorted(folders + files):
                path = os.path.join(folder, name)
                inner, is_folder = self._inside(path), name in folders
                if inner not in self.nodes:
                    node = self.nodes[inner] = len(self.events) + 1
                    self.events.append(("create", node, self.nodes[self._inside(folder)], name, is_folder))
                if not is_folder and (data := Path(path).read_bytes()) != self.bytes.get(self.nodes[inner]):
                    self.bytes[self.nodes[inner]] = data
                    self.events.append(("write", self.nodes[inner], data))

    def _sync(self, handle, call):
        self._look()
        call(handle)
        inner = self._inside(os.readlink(f"/proc/self/fd/{handle}"))
        if inner is not None:
            self.events.append(("sync", self.nodes[inner]))

    def _move(self, old, new, call):
        self._look()
        call(old, new)
        before, after = self._inside(old), self._inside(new)
        node = self.nodes.pop(before)
        for path in [path for path in self.nodes if path.startswith(before + "/")]:
            self.nodes[after + path.removeprefix(before)] = self.nodes.pop(path)
        self.nodes[after] = node
        self.events.append(("move", node, *self._place(before), *self._place(after)))

    def _remove(self, path, dir_fd, call):
        self._look()
        folder = os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd is not None else ""
        call(path, dir_fd=dir_fd)
        inner = self._inside(os.path.join(folder, path))
        if inner is not None:
            del self.nodes[inner]
            self.events.append(("remove", *self._place(inner)))

    def _place(self, inner):
        folder, name = os.path.split(inner)
        return self.nodes[folder], name


class Disk:
    """What was made durable of the first events, and what may or may not have been."""

    def __init__(self, events):
        self.durable, self.waiting = {ROOT: {}}, {ROOT: []}     # by folder: entries; changes since its sync
        self.content, self.safe, self.promises = {}, set(), []  # by file: bytes; those that were synced
        for event in events:
            getattr(self, f"_{event[0]}")(*event[1:])

    def _create(self, node, folder, name, is_folder):
        if is_folder:
            self.durable[node], self.waiting[node] = {}, []
        else:
            self.content[node] = b""
        self.waiting[folder].append((node, "", name))

    def _write(self, node, data):
        self.content[node] = data
        self.safe.discard(node)

    def _sync(self, node):
        if node in self.content:
            self.safe.add(node)
            return
        for change in self.waiting[node]:
            _apply(self.durable[node], change)
        self.waiting[node] = []

    def _remove(self, folder, name):
        self.waiting[folder].append((None, name, ""))

    def _move(self, node, folder, name, new_folder, new_name):
        assert folder == new_folder, "nothing is moved between folders"
        self.waiting[folder].append((node, name, new_name))

    def _done(self, what):
        self.promises.append(what)

    def lay_out(self, path, source, node=ROOT):
        """Make one of the states that the disk may be in."""
        path.mkdir()
        entries, waiting = dict(self.durable[node]), self.waiting[node]
        how = source.choice(("none", "all", "first", "some"))
        first = source.randrange(len(waiting) + 1)
        for place, change in enumerate(waiting):
            if (how == "all" or (how == "first" and place < first)
                    or (how == "some" and source.random() < 0.5)):
                _apply(entries, change)
        for name, inner in entries.items():
            if inner in self.content:
                whole = self.content[inner]
                (path / name).write_bytes(whole if inner in self.safe else _torn(whole, source))
            else:
                self.lay_out(path / name, source, inner)


def _apply(entries, change):
    node, old, new = change
    entries.pop(old, None)
    if new:
        entries[new] = node


def _torn(whole, source):
    """What may be left of bytes that were not synced."""
    cut = source.randrange(len(whole) + 1)
    return source.choice((whole, b"", whole[:cut], bytes(len(whole)), whole[:cut] + bytes(len(whole) - cut),
                          bytes(cut) + whole[cut:], whole[:cut] + source.randbytes(len(whole) - cut)))
