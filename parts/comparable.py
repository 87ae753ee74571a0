"""Compare the texts of data directories and runs, and warn about runs that cannot be compared."""

from pathlib import Path

from parts.reading import read_json


def text_of(directory):
    """Return the fingerprint of a data directory's text; None if it is not known."""
    file = Path(directory) / "tokenizer.json"
    return read_json(file).get("text") if file.exists() else None


def identity(text):
    """Return the part of a fingerprint that identifies its text; None if there is none."""
    return text.get("sha256", text.get("source")) if isinstance(text, dict) else None


def texts_differ(text, other):
    """Return whether two fingerprints are known to belong to different texts."""
    known = identity(text), identity(other)
    return None not in known and known[0] != known[1]


def changed_text(run, directory):
    """Return a warning if a data directory holds another text than a run was trained on; otherwise
    return ""."""
    trained_on = read_json(Path(run) / "config.json").get("text")
    if not texts_differ(trained_on, text_of(directory)):
        return ""
    return (f"{directory} holds another text than {run} was trained on: the run may have seen part "
            "of it in training")


def say_differences(folders):
    """Print and return a sentence that names what differs between runs so that their numbers cannot
    be compared, as far as the runs record it; otherwise return ""."""
    found = [facts(Path(folder)) for folder in folders]
    what = [name for name in (found[0] if found else ())
            if len({repr(one[name]) for one in found if one[name] is not None}) > 1]
    if not what:
        return ""
    text = f"these runs have different {' and '.join(what)}: compare nothing that depends on them"
    print(text)
    return text


def facts(folder):
    """Return what the losses and FLOPs of a run depend on; None for what it does not record."""
    config, tokenizer = (read_json(file) if file.exists() else {}
                         for file in (folder / "config.json", folder / "tokenizer.json"))
    settings = config.get("settings")
    names = ("tokens", "special", "pattern") if "tokens" in tokenizer else ("name",)
    return {"tokenizers": [tokenizer.get(name) for name in names] if tokenizer else None,
            "texts": identity(config.get("text")),
            "FLOP accountings": settings.get("accounting") if isinstance(settings, dict) else None}
