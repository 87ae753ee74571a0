"""The configuration of a model, its presets, and reading it back from a run."""

import math
import typing
from dataclasses import dataclass, field
from pathlib import Path

from parts.errors import UserError
from parts.reading import read_json

LARGEST = 2 ** 24  # of any number; a larger one must be a typing error


def option(default, about):
    """Return a field with a default and a text for --help."""
    return field(default=default, metadata={"about": about})


@dataclass
class ParcaeConfig:
    vocab_size: int = option(32768, "tokens in the vocabulary")
    block_size: int = option(2048, "longest context, in tokens")
    n_embd: int = option(768, "channels, d")
    n_head: int = option(6, "attention heads")
    n_prelude: int = option(2, "layers before the loop, P")
    n_recurrent: int = option(2, "layers in the loop, R; 0 is a plain transformer")
    n_coda: int = option(2, "layers after the loop, C")
    mlp_width: int | None = option(None, "hidden channels of the MLP; None is 4 * n_embd")
    mean_recurrence: int = option(8, "mean number of loops in training, mu_rec; 1: run once")
    backprop_depth: int | None = option(None, "how many last loops get a gradient, "
                                        "mu_bwd; None is ceil(mu_rec / 2)")
    injection: str = option("diagonal", "how a loop adds the prelude's output")
    prelude_norm: bool = option(True, "normalise the prelude's output")
    qk_norm: bool = option(True, "normalise queries and keys")
    value_embeds: bool = option(False, "gated per-token tables for values, every second layer and "
                                "the last")
    tie_embeddings: bool = option(True, "the head is the embedding")
    state_init: str = option("normal", "start state of the loop in training: normal or zero")
    rope_base: float = option(50_000.0, "base of the rotary positions")
    norm_eps: float = option(1e-5, "epsilon of the RMSNorms")

    def __post_init__(self):
        self.check_types()
        if self.mlp_width is None:
            self.mlp_width = 4 * self.n_embd
        if self.backprop_depth is None:
            self.backprop_depth = math.ceil(self.mean_recurrence / 2)

        self.need(self.norm_eps > 0, "norm_eps", "above 0")
        for name in ("vocab_size", "block_size", "n_embd", "n_head", "mlp_width",
                     "mean_recurrence", "backprop_depth", "rope_base"):
            self.need(getattr(self, name) >= 1, name, "at least 1")
        for name in ("n_prelude", "n_recurrent", "n_coda"):
            self.need(getattr(self, name) >= 0, name, "at least 0")
        self.need(self.n_layer > 0, "n_recurrent", "at least 1 if there is no other layer")
        pairs = 2 * self.n_head  # each head rotates pairs of channels
        self.need(self.n_embd % pairs == 0, "n_embd", f"a multiple of 2 * n_head ({pairs})")
        self.need(self.state_init in ("normal", "zero"), "state_init", "normal or zero")

    def check_types(self):
        """Raise UserError for a value without its field's type, as files may hold, or too large."""
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        for name, kind in typing.get_type_hints(type(self)).items():
            kinds = typing.get_args(kind) or (kind,)  # (int, NoneType) of int | None
            value = getattr(self, name)
            allowed = (int, float) if kinds == (float,) else kinds
            self.need(type(value) in allowed, name, words[kinds[0]])  # bool is an int to isinstance
            if type(value) in (int, float):
                self.need(abs(value) < LARGEST, name, f"closer to 0 than {LARGEST:,}")

    def check_length(self, tokens):
        """Raise UserError for a sequence that is longer than block_size."""
        if tokens > self.block_size:
            raise UserError(f"{tokens} tokens do not fit block_size {self.block_size}")

    def need(self, ok, name, allowed):
        if not ok:
            raise UserError(f"{name} is {getattr(self, name)!r}, must be {allowed}")

    @property
    def n_layer(self):
        """Return the number of distinct layers, P + R + C."""
        return self.n_prelude + self.n_recurrent + self.n_coda


def published_size(layers, channels, heads):
    """Return a preset of table 6, with equally many layers before, in and after the loop."""
    return dict(n_prelude=layers, n_recurrent=layers, n_coda=layers, n_embd=channels,
                n_head=heads, value_embeds=True)


def without_loop(size):
    """Return a preset's plain transformer: the same layers without loop, injection and C_proj."""
    layers = size["n_prelude"] + size["n_recurrent"] + size["n_coda"]
    return size | dict(n_prelude=layers, n_recurrent=0, n_coda=0)


PRESETS = {
    "parcae-140m": published_size(2, 768, 6),
    "parcae-370m": published_size(4, 1024, 8),
    "parcae-770m": published_size(6, 1280, 10),
    "parcae-1.3b": published_size(8, 1536, 12),
    # what `python train.py` trains: a shape in which looping gains much
    "parcae-one": dict(n_prelude=0, n_recurrent=1, n_coda=0, n_embd=64, n_head=2,
                       value_embeds=True, mean_recurrence=4, block_size=256),
    "parcae-nano": dict(n_prelude=1, n_recurrent=2, n_coda=1, n_embd=64, n_head=2,
                        value_embeds=True, mean_recurrence=4, block_size=256),
    "parcae-micro": dict(n_prelude=2, n_recurrent=2, n_coda=2, n_embd=256, n_head=4,
                         value_embeds=True, block_size=256, vocab_size=4096),
}
PRESETS |= {name.replace("parcae", "gpt"): without_loop(size) for name, size in PRESETS.items()}


def parse_config(file, parse):
    """Return parse(the JSON object in a file). Raises UserError that names the file."""
    try:
        return parse(read_json(file))
    except KeyError as error:
        raise UserError(f"{file} has no {error}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not the JSON of a model for this code: {error}") from None


def read_config(run_directory):
    """Return the ParcaeConfig of a run directory. Raises UserError."""
    file = Path(run_directory) / "config.json"
    if not file.exists():
        raise UserError(f"{run_directory} holds no model: {file} does not exist; "
                        "train one first: python train.py")
    return parse_config(file, lambda settings: ParcaeConfig(**settings["model"]))
