"""Read text from sources. Each returns two lists of documents, to train on and to validate on.

To add a source of your own, write a function and give it an entry in SOURCES.
"""

import os
import sysconfig
import zlib
from pathlib import Path

from parts.cli import UserError, progress_bar

# These names are missing or different in some distributions of Python. Without them, the same
# version of Python gives the same text everywhere.
NOT_EVERYWHERE = {
    "test", "tests", "idlelib", "tkinter", "turtledemo", "lib2to3", "ensurepip", "distutils",
    "macholib", "lib-dynload", "site-packages", "dist-packages", "__phello__", "sitecustomize.py",
    "usercustomize.py", "_distutils_system_mod.py"}
TEXT_SUFFIXES = (".txt", ".md", ".py")  # of the files in a folder that are read


def for_validation(name):
    """Return whether a file is for validation: about one in 20 is, by a hash of its path."""
    return zlib.crc32(os.fsencode(name.as_posix())) % 20 == 0


def stdlib_docs():
    """Return (train, val), lists of the source files of Python's standard library."""
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
    """Return (train, val), lists of texts from files, which are each cut in two, and from folders.
    Raises UserError, also for a file that is there twice, and OSError."""
    train, val, read = [], [], set()
    for file in map(Path, files):
        names = files_in(file) if file.is_dir() else []
        for path in [file / name for name in names] or [file]:
            if path.resolve() in read:
                raise UserError(f"{path} is there twice: train and val would share text")
            read.add(path.resolve())
        if file.is_dir():
            parts = folder_docs(file, names)
        else:
            text = read_text(file)
            if len(text) < 2:
                raise UserError(f"{file} is too short: it must have at least 2 characters")
            parts = cut([text])
        train += parts[0]
        val += parts[1]
    return train, val


def cut(texts):
    """Return (train, val): the first nine tenths of each text, and the rest of each."""
    at = [len(text) * 9 // 10 for text in texts]
    return [t[:i] for t, i in zip(texts, at)], [t[i:] for t, i in zip(texts, at)]


def folder_docs(folder, names):
    """Return (train, val), lists of the texts in a folder's files; names: see files_in. A file goes
    into one list; if one list would get at most 1% of the text, as with few files, each file is cut
    instead. Files that are not UTF-8 are left out, with a message. Raises UserError."""
    bad, train, val = [], [], []
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
    """Return the paths of the text files in a folder, relative to it and in the same order on every
    system. Hidden names and links to folders are skipped. Raises OSError."""
    def refuse(error):
        raise error
    names = []
    for place, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names += [Path(place, name).relative_to(folder) for name in files
                  if not name.startswith(".") and name.lower().endswith(TEXT_SUFFIXES)]
    return sorted((name for name in names if (folder / name).is_file()), key=Path.as_posix)


# text_docs gets the command line's FILEs
SOURCES = {"stdlib": stdlib_docs, "text": text_docs}
