import pytest
import torch

from parts.cli import UserError
from parts.draft import draft_stream
from parts.generation import generate
from parts.recording import Recorder, speed_up


@pytest.mark.parametrize("kwargs", [{}, {"value_embeds": True}, {"n_recurrent": 0}])
def test_text_is_that_of_plain_generation(build, tokens, kwargs):
    """Two caches after one another, and beyond the block of 32, where no cache serves."""
    model = build(**kwargs).eval()
    ask = {"recurrence": 3, "temperature": 0}
    plain = [generate(model, idx, 20, **ask) for idx in (tokens, tokens[:1, :5])]
    model.advance = Recorder(model.advance)
    recorded = [generate(model, idx, 20, **ask) for idx in (tokens, tokens[:1, :5])]
    assert all(map(torch.equal, recorded, plain))


def test_recorded_drafts_write_the_text_of_plain_generation(build, tokens):
    model = build().eval()
    ask = {"recurrence": 5, "temperature": 0}
    plain = generate(model, tokens[:1, :6], 24, **ask)
    model.advance = Recorder(model.advance)
    new = draft_stream(model, tokens[:1, :6], 24, draft=2, ahead=3, **ask)
    assert torch.equal(torch.cat([tokens[:1, :6], *new], dim=1), plain)
    drafts_and_checks = {(1, 0, 2), (4, 2, 5)}
    assert drafts_and_checks <= {(shape[1], *loops) for shape, *loops in
                                 model.advance.recordings}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_every_place(build, tokens, dtype):
    model = build(value_embeds=True).eval()
    model.compute_dtype = dtype
    full = model(tokens, recurrence=3)[0]
    cache = model.new_cache(len(tokens), 24, 3)  # more than is ever written
    model.advance = Recorder(model.advance)
    with torch.no_grad():
        pieces = [
            model.advance(tokens[:, a:b], cache, 0, 3)[0] for a, b in ((0, 5), (5, 6), (6, 16))
        ]
    close = 1e-5 if dtype == torch.float32 else 0.15
    torch.testing.assert_close(torch.cat(pieces, 1), full, atol=close, rtol=1e-4)


def test_shapes_do_not_depend_on_the_position(build, tokens):
    """One graph of one token, whatever is in the cache: what can be recorded."""
    model, graphs = build().eval(), []
    torch._dynamo.reset()
    compiled = torch.compile(model.advance, dynamic=False, fullgraph=True,
                             backend=lambda graph, _: graphs.append(graph) or graph)
    model.advance = Recorder(compiled)
    generate(model, tokens, 10, recurrence=3)
    assert len(graphs) == 1


def test_a_full_cache_is_refused(build, tokens):
    model = build().eval()
    cache = model.new_cache(len(tokens), 8, 2)
    for advance in (model.advance, Recorder(model.advance)):
        cache.pos = 0
        model.advance = advance
        with torch.no_grad():
            model.advance(tokens[:, :8], cache, 0, 2)[0]
            with pytest.raises(UserError, match="9 tokens do not fit a cache of 8"):
                model.advance(tokens[:, :1], cache, 0, 2)[0]
    with pytest.raises(UserError, match="40 tokens do not fit block_size 32"):
        model.new_cache(1, 40, 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_cuda_graph_makes_the_same_text(build, tokens, compiled):
    model, tokens = build(value_embeds=True).eval().cuda(), tokens.cuda()
    plain = generate(model, tokens, 16, recurrence=4, temperature=0)
    speed_up(model, compiled)
    assert torch.equal(generate(model, tokens, 16, recurrence=4, temperature=0), plain)
    assert all(r.graph is not None for r in model.advance.recordings.values())
    drafted = torch.cat([*draft_stream(model, tokens[:1], 16, recurrence=4, draft=1,
                                       temperature=0)], dim=1)
    assert torch.equal(torch.cat([tokens[:1], drafted], dim=1), plain[:1])
