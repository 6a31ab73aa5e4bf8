"""Gradual global pruning, with and without RigL's replacement, as loops of its definition.

GraNet is Algorithm 1 of Liu et al. 2021 (https://arxiv.org/abs/2106.10404). The cubic schedule is that of Zhu & Gupta 2017
(https://arxiv.org/abs/1710.01878).
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch

import dst
from dst import methods
from dst.allocation import Global
from tests.parity.replacement import drop_smallest, grow_largest
from tests.small import Small, random_gradients

STEPS, EVERY, STOP = 20, 3, 15


def sparsity(step, initial, final, start=0, stop=STOP):
    """s_t = s_f + (s_i - s_f)(1 - p)^3 as a fraction, of decimals."""
    initial, final = Fraction(str(initial)), Fraction(str(final))
    progress = min(Fraction(1), max(Fraction(0), Fraction(step - start, stop - start)))
    return final + (initial - final) * (1 - progress) ** 3


def kept(total, s):
    """What floor(s · total) zeros leave, without an error of rounding."""
    return total - math.floor(Fraction(str(s)) * total)


def global_loop(initial, steps_with_update, regrow):
    """Train under the method and under a loop of its definition, and compare the masks after every step."""
    torch.manual_seed(0)
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    make = methods.granet if regrow else methods.gmp
    method = make(0.2, update_every=EVERY, initial_density=initial, stop=STOP, allocation=Global())
    sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=STEPS)
    layers, total = sparsifier.layers, sum(layer.weights for layer in sparsifier.layers)
    mine = [layer.part(sparsifier.masks[layer.parameter]).flatten().clone() for layer in layers]
    trace = [sum(int(m.sum()) for m in mine)]
    for step in range(STEPS):
        random_gradients(model, step)
        values = [layer.part(model.get_parameter(layer.parameter).detach()).flatten().clone() for layer in layers]
        gradients = [layer.part(model.get_parameter(layer.parameter).grad).flatten().abs() for layer in layers]
        if step in steps_with_update:
            budget = kept(total, sparsity(step, 1 - initial, 0.8))
            everything = torch.cat([v.abs().masked_fill(~m, -1) for v, m in zip(values, mine, strict=True)])
            if budget < sum(int(m.sum()) for m in mine):
                chosen = torch.zeros(total, dtype=torch.bool)
                chosen[everything.argsort(descending=True)[:budget]] = True
                mine = list(chosen.split([layer.weights for layer in layers]))
            fraction = 0.25 * (1 + math.cos(math.pi * step / STOP)) if regrow and step < STOP else 0
            for mask, value, gradient in zip(mine, values, gradients, strict=True):
                assert mask.any()
                if mask.all():
                    continue
                number = math.floor(fraction * int(mask.sum()))
                drop_smallest(mask, value, number)
                grow_largest(mask, gradient, number)
        sparsifier.before_step()
        for layer, mask in zip(layers, mine, strict=True):
            assert torch.equal(layer.part(sparsifier.masks[layer.parameter]).flatten(), mask), (step, layer.label)
        optimizer.step()
        trace.append(sum(int(m.sum()) for m in mine))
    assert trace[-1] == kept(total, 0.8) == sparsifier.active
    assert trace == sorted(trace, reverse=True)
    return sparsifier, trace


UPDATES = [0, 3, 6, 9, 12, 15]
