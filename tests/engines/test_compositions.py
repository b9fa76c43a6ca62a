"""Property: on random chains of layers, closed form and autograd compute the same stage to 1e-12 in float64."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_altmin.engines import stage_engine
from tests.engines.catalogue import TOLERANCE, largest_difference
from tests.engines.compositions import chains


@given(chains(), st.booleans())
@settings(max_examples=100, deadline=None)
def test_engines_agree_on_random_compositions(chain: tuple[nn.Sequential, Tensor], freeze: bool) -> None:
    """Catches rules that are right alone and wrong together: a gradient handed on in the wrong place, order or shape,
    a state given to the wrong layer, a frozen layer that cuts the layers below it off.
    """
    network, x = chain
    modules = list(network)
    if not modules:
        return
    if freeze:
        for parameter in list(network.parameters())[::2]:
            parameter.requires_grad_(False)
    with torch.no_grad():
        engines = [stage_engine(modules, kind) for kind in ("closed_form", "autograd")]
        random = torch.get_rng_state()
        kept = {name: buffer.clone() for name, buffer in network.named_buffers()}
        results = []
        for engine in engines:
            torch.set_rng_state(random)
            for name, buffer in network.named_buffers():
                buffer.copy_(kept[name])
            output, state = engine.encode(x)
            after = {name: buffer.clone() for name, buffer in network.named_buffers()}
            results.append((output, state, after, torch.get_rng_state()))
        (output, ours, buffers, random_ours), (expected, theirs, buffers_expected, random_theirs) = results
        assert largest_difference(output, expected) <= TOLERANCE
        assert torch.equal(random_ours, random_theirs)
        for name, buffer in buffers_expected.items():
            assert largest_difference(buffers[name].double(), buffer.double()) <= TOLERANCE

        grad, moved = torch.randn_like(output), x + 0.1 * torch.randn_like(x)
        before = torch.get_rng_state()
        for view in ("fixed", "live"):
            a, b = (getattr(e, view)(moved, s) for e, s in zip(engines, (ours, theirs), strict=True))
            if view == "live":
                got = {id(p): g for p, g in a.parameter_gradients(grad)}
                wanted = {id(p): g for p, g in b.parameter_gradients(grad)} if got else {}
                assert set(got) == {id(p) for p in network.parameters() if p.requires_grad} == set(wanted)
                for key, gradient in wanted.items():
                    assert largest_difference(got[key], gradient) <= TOLERANCE
            assert largest_difference(a.output(), b.output()) <= TOLERANCE
            assert largest_difference(a.input_gradient(grad), b.input_gradient(grad)) <= TOLERANCE
        assert torch.equal(torch.get_rng_state(), before)
        assert all(torch.equal(b, buffers_expected[n]) for n, b in network.named_buffers())


@given(chains(), st.sampled_from(["fixed", "live"]), st.sampled_from([1.0, 1e-3]))
@settings(max_examples=60, deadline=None)
def test_moved_chains_agree_with_autograd(chain: tuple[nn.Sequential, Tensor], view: str, size: float) -> None:
    """Catches a move that is added twice or to the wrong layer, and a rule that has spent what a later one reads: the
    residual, and the gradients asked for after it, are those at ``x + move``, whether or not ``x`` was overwritten.
    """
    network, x = chain
    modules = list(network)
    if not modules:
        return
    move = size * torch.randn_like(x)
    with torch.no_grad():
        ours, theirs = (stage_engine(modules, kind) for kind in ("closed_form", "autograd"))
        random = torch.get_rng_state()
        kept = {name: buffer.clone() for name, buffer in network.named_buffers()}
        output, state = theirs.encode(x)
        expected = getattr(theirs, view)(x, state, move)
        target, grad = torch.randn_like(output), torch.randn_like(output)
        residual = expected.output() - getattr(theirs, view)(x, state).output() - target
        for spend in (False, True):
            torch.set_rng_state(random)
            for name, buffer in network.named_buffers():
                buffer.copy_(kept[name])
            code, taken = x.clone(), target.clone()
            _, state = ours.encode(code)
            at = getattr(ours, view)(code, state, move)
            found = at.residual(output, taken, spend)
            assert largest_difference(found, residual) <= TOLERANCE
            if view == "live":
                wanted = {id(p): g for p, g in expected.parameter_gradients(grad)}
                for parameter, gradient in at.parameter_gradients(grad):
                    assert largest_difference(gradient, wanted[id(parameter)]) <= TOLERANCE
            if not spend:
                assert torch.equal(code, x)
                assert torch.equal(taken, target)
                assert largest_difference(at.input_gradient(grad), expected.input_gradient(grad)) <= TOLERANCE
