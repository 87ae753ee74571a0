"""Models and tokenizers of others: what they compute, what comes back, what is refused."""

import json
import os
import sys
import types
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, save_run, script

from data import make_tokenizer, prepare
from model import INJECTIONS, Diagonal, Parcae, ParcaeConfig
from parts.cli import UserError
from parts.tokenizer import begin_token, load_tokenizer, save_tokenizer
from tools.published import export_model, import_model, our_name, read_tokenizer

PARITY = json.loads((Path(__file__).parent / "parity.json").read_text())


@pytest.fixture
def published(tmp_path):
    """A directory in the published format, its parameters filled by a rule from their names."""
    theirs = {"injection.log_A": "adapter.A_log", "injection.": "adapter.",
              "recurrent.": "core_block.", "C_proj.": "C.", "norm_f.": "ln_f.",
              "norm_prelude.": "ln_prelude."}
    c = PARITY["config"]
    model = Parcae(ParcaeConfig(c["vocab_size"], c["block_size"], c["n_embd"], 2, 2, 2, 2,
                                mlp_width=64, value_embeds=True))
    weights = {}
    for name, p in model.named_parameters():
        for ours, their_part in theirs.items():
            if name.startswith(ours):
                name = their_part + name.removeprefix(ours)
                break
        name = name if name.startswith("value_embeds") else "transformer." + name
        phase = (zlib.crc32(name.encode()) % 10007) / 1000
        w = torch.sin(0.37 * torch.arange(p.numel(), dtype=torch.float64) + phase).view(p.shape)
        if p.ndim == 2:
            w = w / p.shape[1] ** 0.5
        else:
            w = 0.1 * w + ("norm" in name or ".ln_" in name)
        weights[name] = w.float()
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    weights["freqs_cis"] = torch.zeros(1, 24, 1, 8, 2)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(PARITY["config"]))
    return tmp_path

# ------------------------------------------------------------------ what a model computes


@pytest.mark.parametrize("recurrence", [1, 2, 4, 8])
def test_logits_of_the_published_implementation(published, recurrence):
    model, tokenizer = import_model(published)
    logits, loss = model(torch.tensor(PARITY["tokens"]), recurrence=recurrence)
    assert loss is None and tokenizer is None and logits.dtype == torch.float32
    expected = torch.tensor(PARITY["logits"][str(recurrence)])
    torch.testing.assert_close(logits[0], expected, atol=1e-4, rtol=0)


def test_training_step_of_the_published_implementation(published):
    model, step = import_model(published)[0].train(), PARITY["train"]
    _, loss = model(torch.tensor(PARITY["tokens"]), torch.tensor(step["targets"]),
                    depths=torch.tensor(step["depths"]))
    loss.backward()
    total = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    assert loss.item() == pytest.approx(step["loss"], rel=1e-4)
    assert total == pytest.approx(step["total_grad_norm"], rel=1e-4)
    ours = dict(model.named_parameters())
    for name, norm in step["grad_norm"].items():
        assert ours[our_name(name)].grad.norm().item() == pytest.approx(norm, rel=1e-3), name


def test_their_linear_injection_is_the_concatenation(published):
    """W [h; e], the state's half first."""
    weights = torch.load(published / "pytorch_model.bin", weights_only=True)
    for name in ("A_log", "dt_bias", "B"):
        del weights[f"transformer.adapter.{name}"]
    W = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    weights["transformer.adapter.adapter.weight"] = W
    torch.save(weights, published / "pytorch_model.bin")
    config = PARITY["config"] | {"injection_type": "linear"}
    (published / "config.json").write_text(json.dumps(config))
    model, _ = import_model(published)
    assert model.config.injection == "concat"
    h, e = torch.randn(2, 3, 5, 32, generator=torch.Generator().manual_seed(1))
    expected = torch.cat([h, e], dim=-1) @ W.T
    torch.testing.assert_close(model.injection(h, model.injection.input(e)), expected)
    export_model(model, published / "again")
    assert torch.equal(torch.load(published / "again" / "pytorch_model.bin")[
        "transformer.adapter.adapter.weight"], W)
    saved = json.loads((published / "again" / "config.json").read_text())
    assert saved["injection_type"] == "linear"


def test_our_former_exports_of_the_concatenation_are_read(build, tokens, tmp_path):
    model = build(injection="concat").eval()
    export_model(model, tmp_path)
    weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    weights["transformer.adapter.W"] = weights.pop("transformer.adapter.adapter.weight")
    torch.save(weights, tmp_path / "pytorch_model.bin")
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"injection_type": "concat"}))
    assert torch.equal(import_model(tmp_path)[0](tokens)[0], model(tokens)[0])

# ------------------------------------------------------------------ what comes back


def test_the_published_names_come_back(published):
    before = torch.load(published / "pytorch_model.bin", weights_only=True)
    export_model(import_model(published)[0], published / "again")
    after = torch.load(published / "again" / "pytorch_model.bin", weights_only=True)
    del before["freqs_cis"]
    assert before.keys() == after.keys()
    assert all(torch.equal(w, after[name]) for name, w in before.items())
    assert not list((published / "again").glob("*.tmp"))
    ours = json.loads((published / "again" / "config.json").read_text())
    theirs = PARITY["config"]
    assert {k: v for k, v in ours.items() if k in theirs} == {k: theirs[k] for k in ours}


@pytest.mark.parametrize("config", [
    {"value_embeds": True}, {"tie_embeddings": False, "prelude_norm": False},
    {"injection": "concat"}, {"injection": "add"},
    {"n_prelude": 3, "n_recurrent": 0, "n_coda": 0, "value_embeds": True},
    {"state_init": "zero", "mean_recurrence": 1, "mlp_width": 80}],
    ids=["looped", "untied", "concat", "add", "plain", "fixed depth"])
def test_an_exported_model_reads_back_identical(build, tokens, tmp_path, config):
    model = build(**config).eval()
    export_model(model, tmp_path)
    again, _ = import_model(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(tokens, recurrence=3)[0], model(tokens, recurrence=3)[0])


def test_a_gpt_is_one_stack(build, tokens, tmp_path):
    model = build(n_prelude=2, n_recurrent=0, n_coda=1).eval()
    export_model(model, tmp_path)
    weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert "transformer.h.2.mlp.fc.weight" in weights and not any("coda" in n for n in weights)
    os.replace(tmp_path / "pytorch_model.bin", tmp_path / "model.pt")
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["n_layer"] == 3
    for name in ("injection_type", "prelude_norm", "mean_recurrence", "mean_backprop_depth",
                 "recurrent_embedding_dimension"):
        del settings[name]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert torch.equal(import_model(tmp_path)[0](tokens)[0], model(tokens)[0])


def test_safetensors_are_read(published, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    expected = import_model(published)[0].state_dict()
    weights = torch.load(published / "pytorch_model.bin", weights_only=True)
    weights = {name: w.clone() for name, w in weights.items()}  # shared memory is refused
    safetensors.save_file(weights, published / "model.safetensors")
    (published / "pytorch_model.bin").unlink()
    found = import_model(published)[0].state_dict()
    assert all(torch.equal(w, found[name]) for name, w in expected.items())
    (published / "model.safetensors").write_bytes(b"x" * 50)
    with pytest.raises(UserError, match="is not a checkpoint that can be read"):
        import_model(published)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match="model.safetensors .*pip install safetensors"):
        import_model(published)

# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("change, said", [
    ({"logit_softcap": 30.0}, "logit_softcap is 30.0, which is not implemented here"),
    ({"bias": True}, "bias is True"),
    ({"nonlin_name": "GELU"},
     "nonlin_name is 'GELU', which is not implemented here, only 'ReLU2'"),
    ({"num_key_value_heads": 1},
     "num_key_value_heads is 1, which is not implemented here, only 2"),
    ({"rope_settings": {"use_rope": False, "rope_base": 1e4}}, "rope_settings.use_rope is False"),
    ({"a_new_thing": 3}, "a_new_thing is 3"),
    ({"injection_type": "no-such-rule"}, "injection is 'no-such-rule', must be one of diagonal"),
    ({"state_init": "embed"}, "state_init is 'embed'"),
    ({"init_strategy": "takase"}, "init_strategy is 'takase', which may scale"),
    ({"init_strategy": "takase-scaled"}, "init_strategy is 'takase-scaled'"),
    ({"init_strategy": "scaled-and-logit-scale"}, "init_strategy is 'scaled-and-logit-scale'"),
    ({"block_size": "x"}, "is not the JSON of a model"),
    ({"recurrent_embedding_dimension": 64}, "recurrent_embedding_dimension is 64"),
    ({"n_embd": 64, "recurrent_embedding_dimension": 64},
     r"C_proj.weight is \(32, 32\), must be \(64, 64\)"),
    ({"n_layers_in_coda": 1}, "no coda.0.attn.ve_gate.weight; .*unknown coda.1"),
    ({"n_layers_in_coda": 3}, "no coda.2")])
def test_what_is_not_implemented_is_refused_by_name(published, change, said):
    (published / "config.json").write_text(json.dumps(PARITY["config"] | change))
    with pytest.raises(UserError, match=said):
        import_model(published)


@dataclass
class Wider(ParcaeConfig):
    loop_scale: float = 1.0


def with_field(model, value):
    model.config = Wider(**asdict(model.config), loop_scale=value)


def with_parameter(model, value):
    model.recurrent[0].mlp.gate = value


@pytest.mark.parametrize("change, said", [
    (lambda m: with_field(m, 0.5), "loop_scale is 0.5"),
    (lambda m: with_field(m, 1.0), "loop_scale is 1.0"),  # its default: it may do something
    (lambda m: setattr(m.config, "state_init", "ones"), "state_init is 'ones'"),
    (lambda m: setattr(m.config, "injection", "mine"),
     "injection is 'mine'; unknown injection.B; unknown injection.dt_bias; .*log_A"),
    (lambda m: with_parameter(m, torch.nn.Linear(32, 128)),
     "unknown recurrent.0.mlp.gate.bias; unknown recurrent.0.mlp.gate.weight"),
    (lambda m: m.register_buffer("loops", torch.zeros(4)), "unknown loops"),
    (lambda m: setattr(m.coda[0], "norm_2", torch.nn.Identity()), "no coda.0.norm_2.weight"),
    (lambda m: setattr(m.coda[0].attn, "c_k", torch.nn.Linear(32, 16, bias=False)),
     r"coda.0.attn.c_k.weight is \(16, 32\), must be \(32, 32\)"),
    (lambda m: setattr(m.norm_f, "weight", torch.nn.Parameter(torch.ones(32) * 1j)),
     "norm_f.weight is torch.complex64")])
def test_what_the_format_cannot_say_is_refused_by_name(
        build, tmp_path, monkeypatch, change, said):
    """A field, a rule or a tensor of a student's own is never dropped without a word."""
    monkeypatch.setitem(INJECTIONS, "mine", Diagonal)
    model = build()
    change(model)
    with pytest.raises(UserError, match=f"the published format cannot say .*{said}"):
        export_model(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_new_field_that_is_switched_off_is_no_obstacle(build, tokens, tmp_path):
    model = build().eval()
    with_field(model, 0.0)
    export_model(model, tmp_path)
    assert torch.equal(import_model(tmp_path)[0](tokens)[0], model(tokens)[0])


def test_a_tied_matrix_may_have_either_name(build, tokens, tmp_path):
    model = build().eval()
    export_model(model, tmp_path)
    weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    for name in ("transformer.wte.weight", "lm_head.weight"):
        once = {other: w for other, w in weights.items() if other != name}
        torch.save(once, tmp_path / "pytorch_model.bin")
        assert torch.equal(import_model(tmp_path)[0](tokens)[0], model(tokens)[0])


def test_weights_are_cast_to_float32_where_nothing_is_lost(build, tmp_path):
    export_model(build(), tmp_path)
    weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    torch.save({name: w.bfloat16() for name, w in weights.items()}, tmp_path / "pytorch_model.bin")
    w = import_model(tmp_path)[0].wte.weight
    assert torch.equal(w, weights["transformer.wte.weight"].bfloat16().float())
    for dtype in (torch.complex64, torch.int64, torch.bool):
        changed = weights | {"transformer.ln_f.weight": torch.ones(32, dtype=dtype)}
        torch.save(changed, tmp_path / "pytorch_model.bin")
        with pytest.raises(UserError, match=f"norm_f.weight is {dtype}, must be torch.float32"):
            import_model(tmp_path)


def test_a_tensor_under_two_names_is_refused(build, tmp_path):
    export_model(build(), tmp_path)
    weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    weights["wte.weight"] = weights["transformer.wte.weight"] + 1
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="hold wte.weight under two names"):
        import_model(tmp_path)


def test_foreign_files_are_refused(published):
    good = torch.load(published / "pytorch_model.bin", weights_only=True)
    damaged = good | {"transformer.ln_f.weight": torch.full((32,), torch.nan)}
    for weights, said in (({"model": {"state": 1}}, "must hold a plain state dict"),
                          (damaged, "are damaged: norm_f.weight is not finite")):
        torch.save(weights, published / "pytorch_model.bin")
        with pytest.raises(UserError, match=said):
            import_model(published)
    (published / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="holds no weights: none of pytorch_model.bin, model.pt"):
        import_model(published)
    for content, said in (("[1]", "is not the JSON of a model"),
                          ("{", "is not the JSON of a model"), ("{}", "has no 'rope_settings'"),
                          ('{"model": {}}', "is a run directory of this project")):
        (published / "config.json").write_text(content)
        with pytest.raises(UserError, match=said):
            import_model(published)


def test_a_tied_head_that_differs_is_not_lost_unnoticed(build, tmp_path):
    export_model(build(), tmp_path)
    weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    weights["lm_head.weight"] = next(w for n, w in weights.items() if "wte" in n) + 1
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="one would be lost"):
        import_model(tmp_path)


def test_models_on_the_hub_need_its_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    needed = "some/model is on the Hugging Face hub: pip install huggingface_hub"
    with pytest.raises(UserError, match=needed):
        import_model("some/model")
    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = lambda name, allow_patterns: str(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with pytest.raises(UserError, match=f"{tmp_path} holds no model"):
        import_model("some/model")


def test_one_file_of_weights_is_fetched(monkeypatch, published):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append(allow_patterns)
        return str(published)
    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    (published / "pytorch_model.bin").rename(published / "model.pt")
    assert import_model("some/model")[0].config.n_embd == 32
    assert [names[-1] for names in asked] == ["pytorch_model.bin", "model.pt"]

# ------------------------------------------------------------------ Hugging Face tokenizers

TEXTS = ["", "a", "def f(x):\n        return x + 1  # comment\n",
         "naïve café, 你好世界, здравствуй, שלום, ไทย",
         "👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u200b\ufeff\u2028", "\x00\x01\r\n\t\v\f   \n\n\n     x",
         " " * 1000, "1234567890.5e-10"]
SPLITS = {"gpt2": None,
          "cl100k": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"}


@pytest.fixture(scope="module")
def corpus():
    return [(ROOT / name).read_text() for name in ("model.py", "data.py", "train.py")]


def hugging_face(corpus, directory, split, first=()):
    """Train a byte-level BPE with the tokenizers package; first: special tokens that take the
    first ids."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import pre_tokenizers as pre
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    level = pre.ByteLevel(add_prefix_space=False, use_regex=split == "gpt2")
    tokenizer.pre_tokenizer = level
    if split != "gpt2":
        pattern = tokenizers.Regex(SPLITS[split])
        tokenizer.pre_tokenizer = pre.Sequence([pre.Split(pattern, "isolated"), level])
    tokenizer.train_from_iterator(corpus, tokenizers.trainers.BpeTrainer(
        vocab_size=1500, special_tokens=list(first), initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False))
    tokenizer.add_special_tokens(["<|bos|>"])
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    return tokenizer


@pytest.mark.parametrize("split, first", [("gpt2", ()), ("cl100k", ("<|endoftext|>", "<|pad|>"))])
def test_a_hugging_face_tokenizer_keeps_its_ids(corpus, tmp_path, split, first):
    theirs = hugging_face([*corpus, *TEXTS, "<|endoftext|>"], tmp_path / "hf", split, first)
    ours = read_tokenizer(tmp_path / "hf")
    assert ours.n_vocab == theirs.get_vocab_size()
    texts = [*TEXTS, *corpus[:1], "   \t  spaces \n\n\n   x" + " " * 70 + "y",
             "naïve café — “quotes” don't DON'T we'll", "日本語のテキスト 한국어 עברית العربية",
             "🙂👩‍👩‍👧‍👦🇫🇷 emoji", "\x00\x01\x7f\u00ad\u2028\ufeff", "1234567890 3.14159 0x1F",
             "def f(x):\n\treturn x**2  # ok\r\n"]
    rng = np.random.default_rng(0)
    texts += ["".join(map(chr, rng.integers(1, 0xD800, 200))) for _ in range(20)]
    for text in texts:
        assert ours.encode_ordinary(text) == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ours.encode_ordinary(text)) == text
    assert begin_token(ours) == theirs.token_to_id("<|endoftext|>" if first else "<|bos|>")
    save_tokenizer(ours, tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path)
    for text in texts:
        assert again.encode_ordinary(text) == ours.encode_ordinary(text)

    # as the README says to use it
    source = tmp_path / "hf" / "tokenizer.json"
    done = script("tools/published.py", "tokenizer", source, "--out", tmp_path / "ours")
    assert done.returncode == 0 and "1,5" in done.stdout, done.stderr
    out = prepare("text", tmp_path / "data", str(tmp_path / "ours"), [ROOT / "data.py"])
    assert load_tokenizer(out).encode_ordinary("def f") == theirs.encode("def f").ids


@pytest.mark.parametrize("change, said", [
    (lambda t: t.update(normalizer={"type": "NFC"}), "normalizer is NFC"),
    (lambda t: t["model"].update(type="Unigram"), "model is Unigram"),
    (lambda t: t["pre_tokenizer"].update(add_prefix_space=True), "add_prefix_space True"),
    (lambda t: t.update(pre_tokenizer={"type": "Metaspace"}), "ends with Metaspace"),
    (lambda t: t["model"]["merges"].insert(40, t["model"]["merges"].pop(300)),
     "does not follow the order of the merges"),
    (lambda t: t["model"]["merges"].pop(0), "does not follow the order of the merges"),
    (lambda t: t["model"].update(dropout=0.1), "dropout is 0.1"),
    (lambda t: t["model"].update(continuing_subword_prefix="##"), "subword_prefix is '##'"),
    (lambda t: t["model"]["vocab"].pop("a"), "lacks some of the 256 bytes"),
    (lambda t: t["model"].pop("merges"), "is not a tokenizer of this project")])
def test_other_tokenizers_are_refused(corpus, tmp_path, change, said):
    hugging_face(corpus, tmp_path, "gpt2")
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    change(saved)
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match=said):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("added, extra, said", [
    ({"content": "    ", "id": 1501, "special": False}, None,
     "added token '    ' is not special"),
    (None, "xqz", "is made by no merge")])
def test_ids_that_would_differ_are_refused(corpus, tmp_path, added, extra, said):
    hugging_face(corpus, tmp_path, "gpt2")
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    if added:
        saved["added_tokens"].append(added)
    else:
        saved["model"]["vocab"][extra] = 1501
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match=said):
        read_tokenizer(tmp_path)
    if extra:
        # with this, the tokenizers package takes whole words from the vocabulary, as tiktoken does
        saved["model"]["ignore_merges"] = True
        (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
        assert read_tokenizer(tmp_path).encode_ordinary("xqz") == [1501]

# ------------------------------------------------------------------ command line


@pytest.fixture
def run_directory(build, tmp_path):
    save_run(build(vocab_size=320, value_embeds=True), tmp_path / "run")
    save_tokenizer(make_tokenizer("bytes"), tmp_path / "run" / "tokenizer.json")
    return tmp_path / "run"


def test_a_run_goes_out_and_comes_back(run_directory, tmp_path):
    done = script("tools/published.py", "export", run_directory, "--out", tmp_path / "exported")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "exported").iterdir()) == [
        "config.json", "pytorch_model.bin", "tokenizer.json"]
    (tmp_path / "again").mkdir()  # an empty directory may be there
    done = script("tools/published.py", "import", tmp_path / "exported", "--out",
                  tmp_path / "again")
    assert done.returncode == 0, done.stderr
    model = Parcae.from_pretrained(run_directory)
    parameters = sum(p.numel() for p in model.parameters())
    assert f"1 + 2 looped + 1 layers, {parameters:,} parameters" in done.stdout
    assert f"python sample.py --run {tmp_path / 'again'}" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "exported", "run"]
    idx = torch.arange(20)[None]
    again = Parcae.from_pretrained(tmp_path / "again")
    assert again.config == model.config
    assert torch.equal(again(idx, recurrence=3)[0], model(idx, recurrence=3)[0])

    # what sample.py says is the same
    texts = []
    for name in ("run", "again"):
        said = script("sample.py", "--run", tmp_path / name, "--tokens", 20, "--device", "cpu")
        assert said.returncode == 0, said.stderr
        texts.append([line for line in said.stdout.split("\n") if "tokens/s" not in line])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("action", ["import", "export", "tokenizer"])
def test_nothing_of_the_users_is_replaced(run_directory, tmp_path, action):
    source = run_directory
    if action == "import":
        export_model(Parcae.from_pretrained(run_directory), tmp_path / "theirs")
        source = tmp_path / "theirs"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".notes").write_text("mine")
    for out, said in ((tmp_path / "mine", "holds .notes"), (source, "holds "),
                      (tmp_path / "mine" / ".notes", "is not a directory"),
                      (".", "is the current directory")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
        done = script("tools/published.py", action, source, "--out", out, cwd=tmp_path / "empty")
        assert done.returncode == 2 and said in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1
        after = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
        assert after == before


@pytest.mark.parametrize("words, said", [
    (["import", "none"], "none holds no model"), (["export", "none"], "none holds no model"),
    (["tokenizer", "none.json"], "none.json does not exist"), (["sell", "run"], "is 'sell', must"),
    (["import", "run"], "is a run directory of this project"), (["import", ""], "is empty")])
def test_mistakes_get_one_line_and_leave_nothing(run_directory, tmp_path, words, said):
    done = script("tools/published.py", *words, "--out", "new", cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_tokenizer_that_its_model_has_no_room_for_is_refused(build, tmp_path):
    export_model(build(vocab_size=256), tmp_path / "theirs")
    save_tokenizer(make_tokenizer("bytes"), tmp_path / "theirs" / "tokenizer.json")
    done = script("tools/published.py", "import", tmp_path / "theirs", "--out", tmp_path / "new")
    assert done.returncode == 2 and "has 257 tokens, its model 256" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_a_full_disk_leaves_nothing(run_directory, tmp_path, full_disk):
    done = script("tools/published.py", "export", run_directory, "--out", tmp_path / "new")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
