"""Where text comes from: each source gives two lists of documents, to train on and to validate.

A source of your own is a function and an entry in SOURCES.
"""

import os
import sysconfig
import zlib
from pathlib import Path

from parts.cli import UserError, progress_bar

# What some distributions of Python leave out or make anew: without it, the same version of Python
# gives the same text everywhere.
NOT_EVERYWHERE = {
    "test", "tests", "idlelib", "tkinter", "turtledemo", "lib2to3", "ensurepip", "distutils",
    "macholib", "lib-dynload", "site-packages", "dist-packages", "__phello__", "sitecustomize.py",
    "usercustomize.py", "_distutils_system_mod.py"}
TEXT_SUFFIXES = (".txt", ".md", ".py")  # of the files that are read of a folder


def for_validation(name):
    """Return whether a file is for validation: every 20th or so, by a hash of its path."""
    return zlib.crc32(os.fsencode(name.as_posix())) % 20 == 0


def stdlib_docs():
    """Return (train, val), lists of source texts, see for_validation."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [path.relative_to(root) for path in root.rglob("*.py")]
    train, val = [], []
    for name in sorted(names, key=Path.as_posix):  # the same order on every system
        made_here = name.parts[0].startswith(("config-", "_sysconfigdata"))
        if made_here or NOT_EVERYWHERE & set(name.parts):
            continue
        try:
            text = (root / name).read_text(encoding="utf-8-sig")
        except (UnicodeDecodeError, OSError):
            continue
        (val if for_validation(name) else train).append(text)
    return train, val


def read_text(path):
    """Return the text of a UTF-8 file, without a byte order mark. Raises UserError."""
    try:
        return Path(path).read_bytes().decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte "
                        f"{error.start}") from None


def text_docs(files):
    """Return (train, val), lists of the texts of files, each cut in two, and of folders. Raises
    UserError, OSError."""
    train, val = [], []
    for file in map(Path, files):
        if file.is_dir():
            parts = folder_docs(file)
        else:
            text = read_text(file)
            if len(text) < 2:
                raise UserError(f"{file} is too short, must have at least 2 characters")
            parts = cut([text])
        train += parts[0]
        val += parts[1]
    return train, val


def cut(texts):
    """Return (train, val): of each text the first nine tenths and the rest."""
    at = [len(text) * 9 // 10 for text in texts]
    return [t[:i] for t, i in zip(texts, at)], [t[i:] for t, i in zip(texts, at)]


def folder_docs(folder):
    """Return (train, val), lists of the texts in a folder and in the folders below it, each file
    for one of the two. Where that leaves one of them less than a hundredth of the text, as with few
    files, each file is cut. Files that are not UTF-8 are left out and named. Raises UserError."""
    names, bad, train, val = files_in(folder), [], [], []
    for name in progress_bar(names, desc=f"reading {folder}", unit="file", delay=1):
        try:
            (val if for_validation(name) else train).append(read_text(folder / name))
        except UserError:
            bad.append(name.as_posix())
    if bad:
        print(f"{folder}: {len(bad)} of {len(names)} files are not UTF-8 text and are left out: "
              + ", ".join(bad[:3]) + (", ..." if len(bad) > 3 else ""))
    sizes = sum(map(len, train)), sum(map(len, val))
    if min(sizes) <= sum(sizes) / 100:
        train, val = cut([text for text in train + val if len(text) > 1])
    if not train:
        raise UserError(f"{folder} has no text: none of its {len(names)} files of the kinds "
                        f"{', '.join(TEXT_SUFFIXES)} has 2 characters of UTF-8")
    return train, val


def files_in(folder):
    """Return the paths below a folder of the text files in it, in the same order on every system.
    Links to folders are not followed. Raises OSError."""
    def refuse(error):
        raise error
    names = []
    for place, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names += [Path(place, name).relative_to(folder) for name in files
                  if not name.startswith(".") and name.lower().endswith(TEXT_SUFFIXES)]
    return sorted((name for name in names if (folder / name).is_file()), key=Path.as_posix)


SOURCES = {"stdlib": stdlib_docs, "text": text_docs}  # the last gets the command line's FILEs
