"""The settings of a training run, from the command line of train.py or from an earlier run.

A run stores its settings in config.json. `--resume` reads them from there and checks each one by
the type of its flag; flags on the command line replace them.
"""

import argparse
from dataclasses import fields, replace
from pathlib import Path

from model import INJECTIONS, PRESETS, ParcaeConfig
from parts.cli import (
    COUNT,
    LOOPS,
    POSITIVE,
    SEED,
    Parser,
    UserError,
    check_idle,
    flag_of,
    new_directory,
    number,
    some_path,
)
from parts.config import read_config
from parts.machine import SMALL
from parts.reading import read_json
from parts.run_directory import mend_before_reading
from parts.tokenizer import load_tokenizer, same_tokens

DEFAULT_DATA = "data/stdlib"
DEFAULT_STEPS = 1200
DEFAULT_PRESET = "parcae-one"
DEFAULT_RATE, PAPER_RATE = 2e-2, 8e-3
BATCH = number(int, 1, 2 ** 20)  # a larger number is a typing error that would fill the memory


def make_parser(about):
    """Return the parser of train.py's flags; about: the text at the top of --help."""
    parser = Parser(description=about)
    add = parser.add_argument
    add("--out", type=new_directory, default="out/default", metavar="DIR",
        help="run directory to write (default: %(default)s)")
    add("--resume", action="store_true",
        help="continue the run in --out with its settings; flags given here change them")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--dry-run", action="store_true",
        help="print what config.json would hold, such as the FLOPs of a token, and stop")
    add("--data", type=some_path, default=DEFAULT_DATA, metavar="DIR",
        help="data directory made by data.py (default: %(default)s, made if missing)")
    add("--preset", choices=PRESETS, default=DEFAULT_PRESET, metavar="NAME",
        help=f"model size, one of {', '.join(PRESETS)} (default: %(default)s)")
    add("--init-from", type=some_path, metavar="DIR",
        help="start from the model and the weights of another run instead of --preset; model "
        "flags may change it if the weights still fit")

    add = parser.add_argument_group("budget (the run ends when the first is spent; default: "
                                    f"{DEFAULT_STEPS} steps)").add_argument
    add("--max-steps", type=COUNT, metavar="N", help="optimiser steps")
    add("--max-tokens", type=COUNT, metavar="D", help="training tokens")
    add("--max-flops", type=number(float, 1), metavar="C",
        help="training FLOPs, counted from the depths that are drawn")
    add("--accounting", choices=("exact", "paper"), default="exact",
        help="how FLOPs are counted (default: exact)")

    add = parser.add_argument_group("optimisation").add_argument
    add("--batch-size", type=BATCH, default=16, metavar="N",
        help="sequences in a step, over all ranks (default: %(default)s)")
    add("--micro-batch", type=BATCH, metavar="N",
        help="sequences in one forward pass on a device (default: its whole share of a step)")
    add("--depth-sampling", choices=("per-sequence", "per-batch", "fixed"), default="per-sequence",
        help="number of loops: drawn for each sequence (default), drawn once for the batch, or "
        "always --mean-recurrence")
    add("--loop-from", type=number(float, 0, 1), default=0, metavar="F",
        help="loop only once until this share of the budget is spent (default: %(default)s)")
    add("--muon-lr", type=POSITIVE, metavar="LR",
        help=f"peak learning rate of Muon (default: the paper's {PAPER_RATE}; {DEFAULT_RATE} for "
        f"{DEFAULT_PRESET}, for which it was measured)")
    add("--adamw-lr", type=POSITIVE, metavar="LR",
        help="peak learning rate of AdamW (default: that of Muon)")
    add("--cooldown", type=number(float, 0, 1), default=0.5, metavar="F",
        help="last share of the budget, in which both rates fall to 0 (default: %(default)s)")
    add("--weight-decay", type=number(float, 0), default=0.2, help="of Muon; it falls to 0 "
        "and acts on weights that the update shrinks anyway (default: %(default)s)")
    add("--grad-clip", type=POSITIVE, default=1.0,
        help="largest norm of the gradient (default: %(default)s)")
    add("--seed", type=SEED, default=0, help="for weights, data order and depths (default: 0)")

    add = parser.add_argument_group("evaluation").add_argument
    add("--eval-every", type=COUNT, default=400, metavar="N",
        help="steps between evaluations and checkpoints (default: %(default)s)")
    add("--eval-sequences", type=COUNT, default=64, metavar="N",
        help="val sequences in an evaluation; the last one reads 8 times as many (default: 64)")
    add("--eval-recurrence", type=LOOPS, nargs="+", default=[1, 2, 4, 8, 16], metavar="T",
        help="loops in the last evaluation; the mean recurrence is added (default: 1 2 4 8 16)")

    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto",
        help="of the activations (default: bfloat16 if the machine multiplies it faster)")
    add("--threads", type=number(int, 1, 1024), metavar="N",
        help=f"CPU threads (default: 1 for models of up to {SMALL} channels, so that their losses "
        "do not depend on the number of cores; for others OMP_NUM_THREADS or all cores)")
    add("--compile", action=argparse.BooleanOptionalAction, default=False,
        help="compile the layers with torch.compile (default: no)")
    add_model_flags(parser)
    return parser


def add_model_flags(parser):
    """Add a flag for each field of ParcaeConfig."""
    default = ParcaeConfig(**PRESETS[DEFAULT_PRESET])
    group = parser.add_argument_group(f"model (defaults are for {DEFAULT_PRESET}; another --preset "
                                      "has other values; these flags change them)")
    for field in model_fields():
        # a field whose default is None, as mlp_width, is computed from other fields
        value = None if field.default is None else getattr(default, field.name)
        names = f": {', '.join(INJECTIONS)}" if field.name == "injection" else ""
        how = {"help": f"{field.metadata.get('about', '')}{names} (default: {value})"}
        if field.type is bool:
            how |= {"action": argparse.BooleanOptionalAction}
        elif field.type is str:
            how |= {"metavar": "NAME"}
        else:
            how |= {"metavar": "N", "type": float if field.type is float else int}
        group.add_argument(flag_of(field.name), **how)


def model_fields():
    """Return the fields of ParcaeConfig that have flags: all but vocab_size, set by the data."""
    return fields(ParcaeConfig)[1:]


def parse_args(about, words=None):
    """Return the settings of a run from the command line; with --resume, stored settings fill in
    for flags not given. about: the text at the top of --help. Raises UserError."""
    parser = make_parser(about)
    args = parser.parse_args(words)
    if args.resume:
        check_idle(parser, args, ["overwrite"], "--resume continues the run in --out")
        mend_before_reading(args.out)
        args = resumed(parser, words, Path(args.out) / "config.json")
    elif args.init_from:
        check_idle(parser, args, ["preset"], "--init-from replaces --preset")
    if not (args.max_steps or args.max_tokens or args.max_flops):
        args.max_steps = DEFAULT_STEPS
    small = args.preset == DEFAULT_PRESET and not args.init_from
    args.muon_lr = args.muon_lr or (DEFAULT_RATE if small else PAPER_RATE)
    return args


def resumed(parser, words, file):
    """Return the settings in a run's config.json, changed by the command line. Raises UserError if
    they cannot be read, or if the command line changes what the run's checkpoint computes."""
    if not file.exists():
        raise UserError(f"--out {file.parent} holds no run to resume: {file} does not exist")
    config = read_json(file)
    stored, model = config.get("settings"), config.get("model")
    if not isinstance(stored, dict) or not isinstance(model, dict):
        raise UserError(f"{file} does not belong to a run: it has no settings or no model")
    try:
        saved = parser.checked({name: value for name, value in stored.items()
                                if name != "out" and value is not None})
    except UserError as error:
        raise UserError(f"{file}, settings: {error}") from None
    # data is None unless it was stored: the default data may not be what the run read
    args = parser.parse_args(words, argparse.Namespace(**{"data": None} | saved))
    if args.data is None:
        raise UserError(f"{file} names no data that the run read: give --data DIR")

    may_change = ("mean_recurrence", "backprop_depth")
    fixed = [field.name for field in model_fields() if field.name not in may_change]
    for name in ("preset", "init_from", "seed", "accounting", *fixed):
        before, now = saved.get(name, parser.get_default(name)), getattr(args, name)
        if now not in (before, model.get(name)):  # a flag may repeat the preset's value
            raise UserError(f"{flag_of(name)} is {now}, in the run to resume it is "
                            f"{'not given' if before is None else before}: its checkpoint does not "
                            "fit these settings")
    return args


def model_of(args, tokenizer):
    """Return the ParcaeConfig of a run that is new, is resumed or starts from another run. Raises
    UserError."""
    given = {field.name: getattr(args, field.name) for field in model_fields()
             if getattr(args, field.name) is not None}
    source = args.out if args.resume else args.init_from
    if source:
        config = read_config(source)
        check_tokenizer(args, tokenizer, source, config)
        if given.get("mean_recurrence", config.mean_recurrence) != config.mean_recurrence:
            given = {"backprop_depth": None} | given  # derive it from the new mean, if not given
        config = replace(config, **given)
    else:
        vocab_size = -(-tokenizer.n_vocab // 64) * 64  # GPUs compute faster on multiples of 64
        config = ParcaeConfig(**PRESETS[args.preset] | given | {"vocab_size": vocab_size})
    if not config.n_recurrent and given.get("mean_recurrence", 1) > 1:
        raise UserError(f"--mean-recurrence is {args.mean_recurrence}, must be 1: this model has "
                        "no loop (--n-recurrent 0)")
    return config


def check_tokenizer(args, tokenizer, source, config):
    """Raise UserError if the data's tokens do not fit the run `source` to continue from."""
    run = f"--out {source}" if args.resume else f"--init-from {source}"
    if args.resume or (Path(source) / "tokenizer.json").exists():
        if not same_tokens(load_tokenizer(source), tokenizer):
            raise UserError(f"--data {args.data} has other tokens than {run}; make it with: "
                            f"python data.py ... --tokenizer {source}")
    if tokenizer.n_vocab > config.vocab_size:
        raise UserError(f"--data {args.data} has {tokenizer.n_vocab} tokens, but the model of "
                        f"{run} has {config.vocab_size}")
