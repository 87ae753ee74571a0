"""Import and export models and tokenizers in the formats of other projects.

    python -m tools.published import SandyResearch/parcae-140m --out out/140m  a folder works, too
    python -m tools.published export out/default --out exported
    python -m tools.published tokenizer DIR --out tokenizers/theirs
    python data.py text book.txt --tokenizer tokenizers/theirs

`import` reads a model in the format of the published Parcae code and makes a run directory. That
format is config.json, weights in pytorch_model.bin, model.pt or model.safetensors, and a Hugging
Face tokenizer.json.
`export` does the reverse, but tokenizer.json stays in this project's format. `tokenizer` imports a
byte-level BPE without a model. An error names what is not implemented here, and what the published
format cannot say: a field, a rule or a tensor that you added.
"""

import re
from dataclasses import asdict, replace
from pathlib import Path

import torch

from data import from_hub
from model import Parcae, count_parameters
from parts.cli import Parser, UserError, run_script, some_path
from parts.config import ParcaeConfig, parse_config
from parts.files import whole_directory, whole_file, write_json
from parts.reading import check_finite, fit_weights, load_checkpoint, misfits, read_json
from parts.tokenizer import checked_encoding, load_tokenizer, save_tokenizer

WEIGHTS = ("pytorch_model.bin", "model.pt", "model.safetensors")

# ----------------------------------------------------------------------------- the config

# Fields of the published config.json, and our names for them.
FIELDS = {
    "padded_vocab_size": "vocab_size", "block_size": "block_size", "n_embd": "n_embd",
    "num_attention_heads": "n_head", "n_layers_in_prelude": "n_prelude",
    "n_layers_in_recurrent_block": "n_recurrent", "n_layers_in_coda": "n_coda",
    "intermediate_size": "mlp_width", "mean_recurrence": "mean_recurrence",
    "mean_backprop_depth": "backprop_depth", "injection_type": "injection",
    "prelude_norm": "prelude_norm", "qk_norm": "qk_norm", "tie_embeddings": "tie_embeddings",
    "norm_eps": "norm_eps", "rope_settings.rope_base": "rope_base"}
# Fields that must have this value, since no other one is implemented here.
FIXED = {
    "block_class_name": "TransformerPreNormBlock", "norm_class_name": "RMSNorm",
    "mlp_class_name": "BaseMLP", "nonlin_name": "ReLU2", "mup_model_scaling_factor": 1,
    "rope_settings.use_rope": True, "rope_settings.rope_condense_ratio": 1}
# Fields that must equal one of ours or be switched off: all layers here have the same sizes.
REPEATED = {
    "num_key_value_heads": "n_head", "recurrent_embedding_dimension": "n_embd",
    "recurrent_intermediation_embedding_dimension": "mlp_width"}
# Fields that do not change what the model computes. A field that is in none of these tables must be
# switched off: false, null, 0 or empty.
FREE = {
    "name", "hf_config", "vocab_size", "padding_multiple", "attn_impl", "init_orthogonal",
    "skip_initialization", "use_fused_head", "activation_checkpoint_impl", "simple_ops",
    "strategy", "sampling_scheme", "lockstep_n", "lockstep_k", "curriculum_target",
    "recurrent_iteration_method", "_class_name", "model_class_name", "architecture_class_name"}
# Values of init_strategy that only set the initial weights. Others (takase, takase-scaled,
# scaled-and-logit-scale) also scale embeddings, logits or residuals in every forward pass.
STARTS = {"scaled-zero", "scaled", "scaled-stuck", "scaled-large-embed", "small", "normal", "bert",
          "kaiming", "llama", "llama-by-dim", "megatron", "megatron2", "mitchell", "wang"}
STATES = {"zero": "zero", "normal": "normal", "like-init": "normal"}  # theirs: ours
STACKS = ("n_layers_in_prelude", "n_layers_in_recurrent_block", "n_layers_in_coda")


def config_from(settings):
    """Return the ParcaeConfig for a published config.json, a dict. Raises UserError for a setting
    that is not implemented here, KeyError for a missing one."""
    if isinstance(settings.get("model"), dict):
        raise UserError("this is a run directory of this project: nothing to import")
    settings = dict(settings)
    for name, value in settings.pop("rope_settings").items():
        settings[f"rope_settings.{name}"] = value
    if "n_layer" in settings:  # a GPT: one stack of layers, and nothing that concerns a loop
        settings |= zip(STACKS, (settings.pop("n_layer"), 0, 0))
    if settings.get("n_layers_in_recurrent_block") == 0:
        for name in ("injection_type", "prelude_norm", "mean_recurrence", "mean_backprop_depth"):
            settings.setdefault(name, getattr(ParcaeConfig(), FIELDS[name]))
    ours = {our_field: settings.pop(field) for field, our_field in FIELDS.items()}
    if ours["injection"] == "linear":  # an old export of this project says "concat"
        ours["injection"] = "concat"

    start = settings.pop("init_strategy", None) or "scaled-zero"
    one_of("init_strategy", start, STARTS, "which may scale embeddings, logits or residuals; ")
    state = settings.pop("state_init", "normal")
    one_of("state_init", state, STATES)
    required = FIXED | {name: ours[our_field] for name, our_field in REPEATED.items()}
    required["recurrent_num_attention_heads"] = ours["n_head"]
    for name, value in settings.items():
        as_required = name in required and value == required[name]
        switched_off = not value and name not in FIXED
        if not (name in FREE or as_required or switched_off):
            only = f", only {required[name]!r}" if name in required else ""
            raise UserError(f"{name} is {value!r}, which is not implemented here{only}")
    return ParcaeConfig(**ours, state_init=STATES[state])


def one_of(name, value, allowed, why=""):
    if value not in allowed:
        raise UserError(f"{name} is {value!r}, {why}must be one of {', '.join(sorted(allowed))}")


def settings_of(config):
    """Return the published config.json, a dict, for a ParcaeConfig."""
    named = FIELDS | REPEATED | {"vocab_size": "vocab_size"}
    settings = FIXED | {field: getattr(config, ours) for field, ours in named.items()}
    settings["model_class_name"] = "Parcae" if config.n_recurrent else "GPT"
    settings["state_init"] = "zero" if config.state_init == "zero" else "like-init"
    if config.injection == "concat":
        settings["injection_type"] = "linear"
    if not config.n_recurrent:  # a GPT has one stack
        for name in STACKS:
            del settings[name]
        settings["n_layer"] = config.n_layer
    settings["rope_settings"] = {
        name.removeprefix("rope_settings."): settings.pop(name)
        for name in list(settings) if name.startswith("rope_settings.")}
    return settings

# ----------------------------------------------------------------------------- the weights

# How names begin, theirs: ours. The first entry that fits is used, in both directions.
RENAMED = {
    "transformer.adapter.adapter.weight": "injection.W",
    "transformer.adapter.A_log": "injection.log_A", "transformer.adapter.": "injection.",
    "transformer.core_block.": "recurrent.", "transformer.C.": "C_proj.",
    "transformer.ln_f.": "norm_f.", "transformer.ln_prelude.": "norm_prelude.",
    "transformer.prelude.": "prelude.", "transformer.h.": "prelude.",
    "value_embeds.": "value_embeds.", "lm_head.": "lm_head.", "transformer.": ""}


def our_name(name):
    """Return our name for a tensor of the published format."""
    for theirs, ours in RENAMED.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def their_name(name, config):
    """Return the published format's name for a tensor that has our name."""
    part, number, *rest = name.split(".")
    if not config.n_recurrent and part in ("prelude", "coda"):  # a GPT has one stack
        number = int(number) + (config.n_prelude if part == "coda" else 0)
        return ".".join(["transformer.h", str(number), *rest])
    for theirs, ours in RENAMED.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)


# The tensors of each injection that the format has: their shapes, in units of n_embd.
INJECTED = {"diagonal": {"log_A": [1], "dt_bias": [1], "B": [1, 1]}, "concat": {"W": [1, 2]},
            "add": {}}


def tensors_of(config):
    """Return {our name: meta tensor} for all tensors of a config in the published format."""
    d, width, vocab = config.n_embd, config.mlp_width, config.vocab_size
    weights = {"wte": (vocab, d), "norm_f": (d,), "lm_head": (vocab, d)}
    layers = [f"{part}.{i}" for part in ("prelude", "recurrent", "coda")
              for i in range(getattr(config, f"n_{part}"))]
    for i, layer in enumerate(layers):
        weights |= {f"{layer}.attn.{name}": (d, d) for name in ("c_q", "c_k", "c_v", "c_proj")}
        weights |= {f"{layer}.norm_1": (d,), f"{layer}.norm_2": (d,),
                    f"{layer}.mlp.fc": (width, d), f"{layer}.mlp.proj": (d, width)}
        if config.value_embeds and (i % 2 == 1 or i == config.n_layer - 1):
            weights[f"{layer}.attn.ve_gate"] = config.n_head, min(d, 32)
            weights[f"value_embeds.{i}"] = vocab, d
    shapes = {}
    if config.n_recurrent:
        weights["C_proj"] = (d, d)
        if config.prelude_norm:
            weights["norm_prelude"] = (d,)
        for name, sides in INJECTED.get(config.injection, {}).items():
            shapes[f"injection.{name}"] = [side * d for side in sides]
    shapes |= {f"{name}.weight": shape for name, shape in weights.items()}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def check_can_be_said(config, weights):
    """Raise UserError that names what the published format cannot say about a model: a field that
    an import would not bring back, or a rule or a tensor that the format does not have."""
    wanted, again = config, config_from(settings_of(config))
    if not config.n_recurrent:  # a GPT has one stack
        wanted = replace(config, n_prelude=config.n_layer, n_coda=0)
    unsaid = []
    for name, value in asdict(wanted).items():
        if name == "value_embeds":
            continue  # the weights show it
        if name in FIELDS.values() or name == "state_init":
            comes_back = getattr(again, name) == value
        else:  # as in an import, a field that the other side does not know must be switched off
            comes_back = not value
        if not comes_back:
            unsaid.append(name)
    if config.n_recurrent and config.injection not in INJECTED:
        unsaid.append("injection")
    problems = [f"{name} is {getattr(config, name)!r}" for name in unsaid]
    problems += misfits(tensors_of(config), weights)
    if problems:
        raise UserError("the published format cannot say what this model computes: "
                        f"{'; '.join(problems)}")


def to_float32(w):
    """Return a floating-point tensor in float32, as models here have it, any other unchanged."""
    return w.float() if w.is_floating_point() else w


def read_weights(folder):
    """Return the state dict from a directory in the published format. Raises UserError."""
    file = next((folder / name for name in WEIGHTS if (folder / name).exists()), None)
    if file is None:
        raise UserError(f"{folder} holds no weights: none of {', '.join(WEIGHTS)} exists")
    if file.suffix != ".safetensors":
        weights = load_checkpoint(file)
        if not isinstance(weights, dict) or not all(map(torch.is_tensor, weights.values())):
            raise UserError(f"{file} must hold a plain state dict, names and tensors")
        return weights
    try:
        from safetensors.torch import load_file
        return load_file(file)
    except ImportError:
        raise UserError(f"{file} needs another package: pip install safetensors") from None
    except Exception as error:  # the reader may raise anything for a damaged file
        raise UserError(f"{file} is not a checkpoint that can be read: {error}") from None

# ----------------------------------------------------------------------------- whole models


def local_files(source):
    """Return the folder `source`, or a download of "owner/name" from the hub. Raises UserError."""
    if Path(source).is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        return Path(source)
    for name in WEIGHTS:  # one file of weights is enough: they are large
        wanted = ["config.json", "tokenizer.json", name]
        try:
            folder = from_hub("snapshot_download", str(source), allow_patterns=wanted)
        except UserError as error:
            raise UserError(f"{source} is not a directory here; {error}") from None
        if (folder / name).exists():
            break
    return folder


def import_model(source):
    """Return (model in eval mode, tokenizer or None); source: see local_files. Raises UserError."""
    folder = local_files(source)
    file = folder / "config.json"
    if not file.exists():
        raise UserError(f"{folder} holds no model: {file} does not exist")
    config = parse_config(file, config_from)
    weights = {}
    for theirs, w in read_weights(folder).items():
        name = our_name(theirs)
        if name in weights:
            raise UserError(f"the weights in {folder} hold {name} under two names")
        if not name.endswith("freqs_cis"):  # rotary angles, which the model computes itself
            weights[name] = to_float32(w)

    # Their config does not tell two facts: value embeddings, and which name a tied matrix has.
    config.value_embeds = any(name.startswith("value_embeds") for name in weights)
    names = {"wte.weight", "lm_head.weight"}
    if config.tie_embeddings and (there := names & weights.keys()):
        weights = dict.fromkeys(names, weights[there.pop()]) | weights

    model = Parcae(config)
    fit_weights(model, weights, f"the weights in {folder} do not fit its config.json")
    check_finite(model, folder)
    tokenizer = read_tokenizer(folder) if (folder / "tokenizer.json").exists() else None
    return model.eval(), tokenizer


def export_model(model, directory):
    """Write a model in the published format, in float32. Raises UserError: check_can_be_said."""
    directory = Path(directory)
    ours = {name: to_float32(w).cpu() for name, w in model.state_dict().items()}
    check_can_be_said(model.config, ours)
    weights = {their_name(name, model.config): w for name, w in ours.items()}
    with whole_file(directory / "pytorch_model.bin", "wb") as file:
        torch.save(weights, file)
    write_json(directory / "config.json", settings_of(model.config))

# ----------------------------------------------------------------------------- tokenizers

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Hugging Face writes a byte as a character: itself if printable, otherwise from chr(256) on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [b for b in range(256) if b not in PRINTABLE]
BYTE_OF = {chr(b): b for b in PRINTABLE} | {chr(256 + i): b for i, b in enumerate(OTHERS)}


def to_bytes(token):
    """Return the bytes of a token that Hugging Face writes as a text: b" the" for "Ġthe"."""
    return bytes(BYTE_OF[c] for c in token)


def read_tokenizer(source):
    """Return the tiktoken.Encoding from a tokenizer.json of Hugging Face or of this project.
    source: the file or its directory. Raises UserError."""
    file = Path(source)
    if file.is_dir():
        file = file / "tokenizer.json"
    saved = read_json(file)
    if "model" not in saved and file.name == "tokenizer.json":
        return load_tokenizer(file.parent)
    try:
        return from_hugging_face(saved)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not a tokenizer of this project or a Hugging Face byte-level "
                        f"BPE: {error}") from None


def need(ok, what):
    """Raise UserError if not ok. what: the property of a tokenizer that is not supported here."""
    if not ok:
        raise UserError(f"{what}: not byte-level BPE as it is implemented here")


def from_hugging_face(saved):
    """Return a tiktoken.Encoding with the same ids, from the JSON of a Hugging Face tokenizer, a
    dict. Raises UserError for what is not plain byte-level BPE."""
    model, normalizer = saved["model"], saved.get("normalizer") or {}
    need(model.get("type", "BPE") == "BPE", f"model is {model.get('type')}")
    need(not normalizer, f"normalizer is {normalizer.get('type')}")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        need(not model.get(name), f"{name} is {model.get(name)!r}")
    pattern = split_pattern(saved.get("pre_tokenizer") or {})

    # Text never becomes a special token here, so an added token that text may contain is refused.
    special = {}
    for token in saved.get("added_tokens", []):
        need(token.get("special"), f"added token {token['content']!r} is not special")
        special[token["content"]] = token["id"]

    # ranks: the id of each token; order: the place of each pair in the list of merges
    ranks = {to_bytes(token): i for token, i in model["vocab"].items() if token not in special}
    need(all(bytes([b]) in ranks for b in range(256)), "the vocabulary lacks some of the 256 bytes")
    order = {}
    for i, merge in enumerate(model["merges"]):
        a, b = merge.split(" ") if isinstance(merge, str) else merge
        order[to_bytes(a), to_bytes(b)] = i
    check_merges(ranks, order, model.get("ignore_merges"))
    return checked_encoding("hugging-face", pattern, ranks, special)


def split_pattern(pre_tokenizer):
    """Return the regular expression with which a pre_tokenizer splits text. Raises UserError."""
    *splits, last = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kind, prefix = last.get("type"), last.get("add_prefix_space")
    need(kind == "ByteLevel" and not prefix,
         f"pre_tokenizer ends with {kind}, add_prefix_space {prefix}")
    patterns = [GPT2_PATTERN] if last.get("use_regex", True) else []
    for step in splits:
        plain = step["type"] == "Split" and step["behavior"] == "Isolated"
        need(plain and not step.get("invert") and "Regex" in step["pattern"],
             f"pre_tokenizer has {step['type']}")
        patterns.append(step["pattern"]["Regex"])
    need(len(patterns) == 1, f"pre_tokenizer splits by {len(patterns)} patterns")
    return patterns[0]


def check_merges(ranks, order, ignore_merges):
    """Raise UserError if tiktoken and Hugging Face would split a text into different tokens.

    tiktoken merges the neighbours whose union has the lowest id; Hugging Face merges the pair that
    comes first in the list of merges. They agree if the list is in the order of the ids that its
    merges make. A word that is a token, but that no merge makes, is one token for tiktoken, and for
    Hugging Face only if ignore_merges is set."""
    before = -1
    for token in sorted(filter(lambda token: len(token) > 1, ranks), key=ranks.get):
        parts, name = last_parts(token, ranks), f"token {ranks[token]} ({token!r})"
        if len(parts) > 2:
            need(ignore_merges, f"{name} is made by no merge")
            continue
        place = order.get(tuple(parts), -1)
        need(place > before, f"{name} does not follow the order of the merges")
        before = place


def last_parts(token, ranks):
    """Return the parts before tiktoken's last merge to a token: two, or more if it gets stuck."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        unions = [ranks.get(a + b, ranks[token]) for a, b in zip(parts, parts[1:])]
        i = unions.index(min(unions))
        if unions[i] >= ranks[token]:
            break
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def check_empty(directory):
    """Raise UserError if a directory is not empty, so that no file of the user is replaced."""
    for file in directory.glob("*"):
        raise UserError(f"--out {directory} holds {file.name}: choose a new directory")


def convert(action, source, folder):
    """Do an action, a name in ACTIONS, with a source and write the result into a folder. Return
    (model, tokenizer), each of them None where there is none. Raises UserError."""
    model, tokenizer = None, None
    if action == "import":
        model, tokenizer = import_model(source)
        if tokenizer and tokenizer.n_vocab > model.config.vocab_size:
            raise UserError(f"the tokenizer in {source} has {tokenizer.n_vocab} tokens, "
                            f"its model {model.config.vocab_size}")
        with whole_file(folder / "ckpt.pt", "wb") as file:
            torch.save({"model": model.state_dict()}, file)
        write_json(folder / "config.json", {"model": asdict(model.config), "source": source})
    elif action == "export":
        model = Parcae.from_pretrained(source)
        export_model(model, folder)
        if (Path(source) / "tokenizer.json").exists():
            tokenizer = load_tokenizer(source)
    else:
        tokenizer = read_tokenizer(source)
    if tokenizer:
        save_tokenizer(tokenizer, folder / "tokenizer.json")
    return model, tokenizer


# action: the command to continue with
ACTIONS = {"import": "python sample.py --run {out}",
           "export": "python -m tools.published import {out} --out DIR",
           "tokenizer": "python data.py text FILE --tokenizer {out}"}


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("action", metavar="ACTION", choices=ACTIONS, help=", ".join(ACTIONS))
    parser.add_argument("source", type=some_path, metavar="SOURCE", help="import: a directory or a "
                        "name on the Hugging Face hub; export: a run directory; tokenizer: a "
                        "tokenizer.json or its directory")
    parser.add_argument("--out", type=some_path, required=True, metavar="DIR",
                        help="directory to make; it must be new or empty")
    args = parser.parse_args()
    with whole_directory(args.out, check_empty) as folder:
        model, tokenizer = convert(args.action, args.source, folder)
    made = f"a tokenizer of {tokenizer.n_vocab:,} tokens" if tokenizer else \
        "no tokenizer.json, which sample.py needs"
    if model:
        c, size = model.config, count_parameters(model)
        made = (f"{c.n_prelude} + {c.n_recurrent} looped + {c.n_coda} layers, {size:,} parameters; "
                f"{made}")
    print(f"{args.out}: {made}\ncontinue with: {ACTIONS[args.action].format(out=args.out)}")


if __name__ == "__main__":
    run_script(main)
