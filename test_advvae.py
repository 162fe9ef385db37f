"""The facts of the method, one a test: python -m pytest -q test_advvae.py

No test needs a network or MNIST, and none is timed. The order is that of advvae.py:
networks, triples, terms, training; then data, measures, the program, its pictures.
"""

import copy
import io
import json
import math
import os
import re
import struct
import subprocess
import sys
import types
from dataclasses import fields, replace
from pathlib import Path
from unittest import mock

import matplotlib
import numpy
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.distributions import Bernoulli, Normal, kl_divergence

import advvae
from advvae import Adversary, AdvVAE, Config, Data, TripleSampler

HERE = Path(__file__).parent
pytestmark = pytest.mark.filterwarnings("error")

def text_of(name):
    return (HERE / name).read_text(encoding="utf-8")

def seeded(seed=0):
    return torch.Generator().manual_seed(seed)

def digits(n, test=200):
    """A small typeset Data."""
    generator = seeded()
    images, labels, factors = advvae.typeset(n, generator)
    test_images, test_labels, test_factors = advvae.typeset(test, generator)
    return Data("typeset", images, labels, test_images, test_labels, factors, test_factors)

@pytest.fixture(scope="module")
def data():
    return digits(600)

@pytest.fixture
def nets():
    """Untrained networks, the same each time."""
    torch.manual_seed(0)
    return AdvVAE(), Adversary(10)

@pytest.fixture
def triple(data):
    return next(iter(TripleSampler(data.images, data.labels, 32, seeded())))

def step(model, adversary, triple, config, seed=0, rate=1e-3, adversary_rate=1e-3):
    """train_step with new optimizers."""
    optimizer = torch.optim.Adam(model.parameters(), rate)
    adversary_optimizer = torch.optim.Adam(adversary.parameters(), adversary_rate)
    optimizers = (optimizer, adversary_optimizer)
    return advvae.train_step(model, adversary, optimizers, triple, config, seeded(seed))

def equal_weights(one, other):
    """For each parameter of two networks, in order: is it the same in both?"""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return [torch.equal(p, q) for p, q in pairs]

# ---- 1. Networks --------------------------------------------------------------------

def test_codes_and_images_have_their_shapes_and_ranges(data):
    """encode gives s, mu and logvar of any sizes; the decoder gives pixels in [0, 1]."""
    model = AdvVAE(s_dim=3, z_dim=5)
    s, mu, logvar = model.encode(data.images[:7])
    assert s.shape == (7, 3)
    assert mu.shape == (7, 5)
    assert logvar.shape == (7, 5)

    x = model.decoder(100 * mu, 100 * s)
    assert x.shape == (7, 1, 28, 28)
    assert 0 <= x.min() and x.max() <= 1

def test_f_z_sees_s(nets, data):
    """The same images with another s have another q(z | x, s), in mu and in logvar."""
    model, _ = nets
    x = data.images[:8]
    s = torch.randn(8, Config.s_dim, generator=seeded())
    mu, logvar = model.f_z(x, s)
    other_mu, other_logvar = model.f_z(x, s.flip(0))
    assert not torch.isclose(mu, other_mu).all(dim=1).any()
    assert not torch.isclose(logvar, other_logvar).all(dim=1).any()

@pytest.mark.parametrize("cut", ["hidden1", "hidden2"])
def test_s_enters_f_z_twice(cut, nets, data):
    """With one entry cut off, the same image with another s still has another mu."""
    f_z = nets[0].f_z
    getattr(f_z, cut).weight.data[:, -Config.s_dim :] = 0
    x = data.images[:1].expand(8, -1, -1, -1)
    s = torch.randn(8, Config.s_dim, generator=seeded())
    mu, _ = f_z(x, s)
    assert mu.std(dim=0).min() > 1e-4

def test_the_adversary_sees_the_class(nets, data):
    """Another class id gives another verdict; by how much depends on the image."""
    adversary = nets[1].eval()
    x = data.images[:8]
    as_0 = adversary(x, torch.full((8,), 0))
    as_1 = adversary(x, torch.full((8,), 1))
    assert as_0.shape == (8,)
    assert (as_0 - as_1).abs().min() > 1e-6
    assert (as_0 - as_1).std() > 1e-4

def test_s_draws_and_z_bends(nets):
    """The two meet in one place, maps * (1 + gain) + shift: a gain of -1 wipes out all
    that s drew, and a shift shows all the same."""
    decoder = nets[0].decoder
    s = torch.randn(8, Config.s_dim, generator=seeded())
    z = torch.randn(8, Config.z_dim, generator=seeded(1))
    assert decoder(z[:1].expand(8, -1), s).std(dim=0).max() > 1e-3
    assert decoder(z, s[:1].expand(8, -1)).std(dim=0).max() > 1e-3

    gain = slice(0, 16 * 7 * 7)
    shift = slice(16 * 7 * 7, None)
    decoder.bend2.weight.data.zero_()
    decoder.bend2.bias.data[gain] = -1
    x = decoder(z, s)
    assert x.std(dim=0).max() < 1e-6
    decoder.bend2.bias.data[shift] += 1
    assert (decoder(z, s) - x).abs().max() > 1e-3

def test_reparameterize_draws_from_q():
    """z has mean mu and standard deviation exp(logvar / 2)."""
    mu = torch.tensor([3.0, 0.0]).expand(50_000, 2)
    logvar = torch.tensor([0.0, -2.0]).expand(50_000, 2)
    z = advvae.reparameterize(mu, logvar, seeded())
    torch.testing.assert_close(z.mean(0), torch.tensor([3.0, 0.0]), atol=0.02, rtol=0)
    wanted = torch.exp(torch.tensor([0.0, -1.0]))
    torch.testing.assert_close(z.std(0), wanted, atol=0, rtol=0.02)

def test_gradients_reach_mu_and_logvar_through_a_draw():
    """The derivative of z is 1 in mu and (z - mu) / 2 in logvar."""
    mu = torch.zeros(5, 3, requires_grad=True)
    logvar = torch.ones(5, 3, requires_grad=True)
    z = advvae.reparameterize(mu, logvar, seeded())
    of_mu, of_logvar = torch.autograd.grad(z.sum(), (mu, logvar))
    torch.testing.assert_close(of_mu, torch.ones(5, 3))
    torch.testing.assert_close(of_logvar, (z - mu) / 2)

def test_spectral_norm_bounds_the_adversary(nets, data):
    """The largest singular value of each layer is about 1, however large its weights."""
    adversary = nets[1].train().requires_grad_(False)
    for p in adversary.parameters():
        p.mul_(50)
    for _ in range(30):  # the estimate becomes better with each call in train mode
        adversary(data.images[:4], data.labels[:4])

    names = ("conv", "hidden", "how_real", "class_vector")
    for name in names:
        weight = getattr(adversary, name).weight.flatten(1)
        largest = torch.linalg.matrix_norm(weight, 2).item()
        assert largest == pytest.approx(1, abs=0.2), name

# ---- 2. Triples ---------------------------------------------------------------------

def indices_of(labels, batch_size, epochs):
    """What TripleSampler draws, as indices: i1, i1_same, i2, and id2. Its images carry
    their own index in every pixel."""
    index = torch.arange(len(labels)).view(-1, 1, 1, 1)
    sampler = TripleSampler(index * torch.ones(1, 28, 28), labels, batch_size, seeded())
    i1, i1_same, i2, id2 = [], [], [], []
    for _ in range(epochs):
        for batch in sampler:
            i1.append(batch[0][:, 0, 0, 0].long())
            i1_same.append(batch[1][:, 0, 0, 0].long())
            i2.append(batch[2][:, 0, 0, 0].long())
            id2.append(batch[3])
    return torch.cat(i1), torch.cat(i1_same), torch.cat(i2), torch.cat(id2)

def test_every_image_is_x1_once_an_epoch():
    """In another order in the next epoch; the last batch is smaller."""
    labels = torch.tensor([0, 1, 2] * 11)
    first, second = indices_of(labels, 8, epochs=2)[0].split(33)
    assert sorted(first.tolist()) == list(range(33))
    assert sorted(second.tolist()) == list(range(33))
    assert first.tolist() != list(range(33))
    assert first.tolist() != second.tolist()

    sampler = TripleSampler(torch.zeros(33, 1, 28, 28), labels, 8, seeded())
    assert [len(x1) for x1, _, _, _ in sampler] == [8, 8, 8, 8, 1]
    assert len(sampler) == 5

def test_triples_repeat_with_the_seed(data):
    """Two samplers with equal generators give equal batches."""
    one = TripleSampler(data.images, data.labels, 250, seeded())
    again = TripleSampler(data.images, data.labels, 250, seeded())
    for batch, batch_again in zip(one, again, strict=True):
        for x, x_again in zip(batch, batch_again, strict=True):
            assert torch.equal(x, x_again)

def test_x1_same_is_uniform_over_x1s_class():
    """Whatever sizes the classes have, one image included; it may be x1 itself."""
    labels = torch.tensor([7] * 5 + [3] * 20 + [1000] + [7] * 5)
    i1, i1_same, _, _ = indices_of(labels, 10, epochs=400)
    assert torch.equal(labels[i1], labels[i1_same])

    # Each image is drawn 400 times, give or take five standard deviations.
    assert (i1_same.bincount() - 400).abs().max() < 5 * 400**0.5
    itself = (i1 == i1_same).float().mean()
    assert itself == pytest.approx(3 / 31, abs=0.01)

def test_x2_is_uniform_and_independent():
    """x2 is any image, with its own label; its class is x1's as often as by chance."""
    labels = torch.tensor([0] * 30 + [1] * 10)
    i1, i1_same, i2, id2 = indices_of(labels, 16, epochs=300)
    assert torch.equal(labels[i2], id2)
    assert (i2.bincount() - 300).abs().max() < 5 * 300**0.5

    one_class = (labels[i1] == id2).float().mean()
    assert one_class == pytest.approx(0.75**2 + 0.25**2, abs=0.02)
    assert (i2 == i1).float().mean() == pytest.approx(1 / 40, abs=0.007)
    assert (i2 == i1_same).float().mean() == pytest.approx(1 / 40, abs=0.007)

# ---- 3. The four terms --------------------------------------------------------------

def test_likelihoods_are_gaussian():
    """Nats per image of a Gaussian of variance 1/2 on pixels in [-1, 1], less a constant."""
    x, decoded = torch.rand(2, 6, 1, 28, 28, generator=seeded())
    density = Normal(2 * decoded - 1, 0.5**0.5)
    nats = -density.log_prob(2 * x - 1) - 0.5 * math.log(math.pi)
    wanted = nats.sum(dim=(1, 2, 3)).mean()
    torch.testing.assert_close(advvae.reconstruction_term(x, decoded), wanted)
    torch.testing.assert_close(advvae.swap_term(x, decoded), wanted)

def test_the_kl_is_that_of_two_gaussians():
    """q(z | x, s) against N(0, I): summed over dimensions, averaged over images."""
    mu, logvar = torch.randn(2, 6, 4, generator=seeded())
    wanted = kl_divergence(Normal(mu, torch.exp(logvar / 2)), Normal(0.0, 1.0))
    torch.testing.assert_close(advvae.kl_term(mu, logvar), wanted.sum(dim=1).mean())

def test_adversarial_terms_are_log_probabilities():
    """Verdicts are logits: the fakes are to be called real, the adversary is to be right."""
    real, swapped, sampled = torch.randn(3, 6, generator=seeded())

    def nats(verdict, answer):
        return -Bernoulli(logits=verdict).log_prob(torch.full((6,), answer)).mean()

    torch.testing.assert_close(advvae.adversary_term(swapped), nats(swapped, 1.0))
    torch.testing.assert_close(advvae.prior_term(sampled), nats(sampled, 1.0))
    wanted = nats(real, 1.0) + (nats(swapped, 0.0) + nats(sampled, 0.0)) / 2
    torch.testing.assert_close(advvae.adversary_loss(real, swapped, sampled), wanted)

# ---- 4. Training --------------------------------------------------------------------

TERMS = ("reconstruction", "kl", "swap", "adversary", "prior")

def weighted(reconstruction=0, kl=0, swap=0, adversary=0, prior=0, **settings):
    """A Config with these weights, 0 where none is given."""
    return Config(
        reconstruction_weight=reconstruction,
        kl_weight=kl,
        swap_weight=swap,
        adversary_weight=adversary,
        prior_weight=prior,
        **settings,
    )

@pytest.mark.parametrize(
    "term, networks, images",
    [
        ("reconstruction", {"f_s", "f_z", "decoder"}, {"x1"}),
        ("kl", {"f_s", "f_z"}, {"x1"}),
        ("swap", {"f_s", "f_z", "decoder"}, {"x1", "x1_same"}),
        ("adversary", {"f_s", "f_z", "decoder"}, {"x1", "x2"}),
        ("prior", {"f_s", "decoder"}, {"x2"}),
    ],
)
def test_each_term_reaches_its_networks_and_images(term, networks, images, nets, triple):
    """And no others: term 2 reaches f_s through x1_same, term 3 reaches z1 and s2, term 4
    can't reach f_z."""
    model, adversary = nets
    x1, x1_same, x2 = (x.clone().requires_grad_() for x in triple[:3])
    sources = {"x1": x1, "x1_same": x1_same, "x2": x2}

    # The adversary's own loss, too, has gradients in the real x2: here it has none.
    def on_fakes(real, swapped, sampled):
        return swapped.sum() + sampled.sum()

    with mock.patch.object(advvae, "adversary_loss", on_fakes):
        step(model, adversary, (x1, x1_same, x2, triple[3]), weighted(**{term: 1}))

    for name in ("f_s", "f_z", "decoder"):
        for p in getattr(model, name).parameters():
            reached = p.grad is not None and p.grad.any().item()
            assert reached == (name in networks), name
    for name, x in sources.items():
        reached = x.grad is not None and x.grad.any().item()
        assert reached == (name in images), name

def test_terms_are_of_the_codes_that_figure_1_says(nets, triple):
    """Each computed by hand, with the networks as they were before the step."""
    for p in nets[0].parameters():
        p.data *= 2  # so that all that goes in makes a difference
    model, adversary = copy.deepcopy(nets)
    measures = step(*nets, triple, Config(), seed=5)

    generator = seeded(5)
    x1, x1_same, x2, id2 = triple
    s1, mu, logvar = model.encode(x1)
    z1 = advvae.reparameterize(mu, logvar, generator)
    z = torch.randn(z1.shape, generator=generator)
    adversary.eval()

    wanted = {
        "reconstruction": advvae.reconstruction_term(x1, model.decoder(z1, s1)),
        "kl": advvae.kl_term(mu, logvar),
        "swap": advvae.swap_term(x1, model.decoder(z1, model.f_s(x1_same))),
        "adversary": advvae.adversary_term(adversary(model.decoder(z1, model.f_s(x2)), id2)),
        "prior": advvae.prior_term(adversary(model.decoder(z, model.f_s(x2)), id2)),
    }
    for name, value in wanted.items():
        assert measures[name] == pytest.approx(value.item(), rel=1e-4), name

def test_weights_scale_their_terms(nets, triple):
    """A step's gradient is the weighted sum of the terms' own, and forgets the last one."""

    def gradient(config):
        model, adversary = copy.deepcopy(nets)
        for p in [*model.parameters(), *adversary.parameters()]:
            p.grad = torch.full_like(p, 1e6)  # left over from an earlier step
        step(model, adversary, triple, config)
        assert all(p.grad.abs().max() < 1e5 for p in adversary.parameters())
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    weights = {"reconstruction": 0.3, "kl": 2, "swap": 0.7, "adversary": 5, "prior": 4}
    wanted = 0
    for name, weight in weights.items():
        wanted = wanted + weight * gradient(weighted(**{name: 1}))
    torch.testing.assert_close(gradient(weighted(**weights)), wanted, rtol=1e-3, atol=1e-4)

@pytest.mark.parametrize("term", TERMS)
def test_a_weight_of_0_takes_out_its_term_only(term, nets, triple):
    """All terms are still measured, and the adversary learns the same as ever."""
    model, adversary = copy.deepcopy(nets)
    with_all = step(model, adversary, triple, Config())
    without = step(*nets, triple, replace(Config(), **{f"{term}_weight": 0}))
    assert without == with_all
    assert all(equal_weights(nets[1], adversary))
    assert not all(equal_weights(nets[0], model))

def test_each_side_moves_in_its_own_step_only(nets, triple):
    """One step moves all of f_s, f_z and the decoder, the other all of the adversary."""
    old = copy.deepcopy(nets)
    step(*nets, triple, Config(), adversary_rate=0)
    assert not any(equal_weights(old[0], nets[0]))
    assert all(equal_weights(old[1], nets[1]))

    old = copy.deepcopy(nets)
    step(*nets, triple, Config(), rate=0)
    assert all(equal_weights(old[0], nets[0]))
    assert not any(equal_weights(old[1], nets[1]))

def test_the_adversary_learns(nets, triple):
    """Its loss falls while encoders and decoder stand still."""
    losses = []
    for _ in range(30):
        losses.append(step(*nets, triple, Config(), rate=0)["adversary_loss"])
    assert losses[-1] < 0.8 * losses[0]

def test_the_adversary_learns_from_the_real_x2_and_both_fakes(nets, triple):
    """All are of class id2. The fakes are the very ones of terms 3 and 4, detached; while
    those are computed the adversary stands still, spectral norm's estimates included."""
    asked, learned = [], []
    buffers = copy.deepcopy(dict(nets[1].named_buffers()))

    def look(adversary, inputs, verdict):
        x, class_id = inputs
        assert torch.equal(class_id, triple[3])
        if adversary.training:
            assert all(p.requires_grad for p in adversary.parameters())
            learned.append((x, verdict.detach()))
        else:
            assert not any(p.requires_grad for p in adversary.parameters())
            assert all(b.equal(buffers[name]) for name, b in adversary.named_buffers())
            asked.append(x)

    nets[1].register_forward_hook(look)
    measures = step(*nets, triple, Config())
    (real, on_real), (swapped, on_swapped), (sampled, on_sampled) = learned
    assert torch.equal(real, triple[2])
    assert torch.equal(swapped, asked[0]) and torch.equal(sampled, asked[1])
    assert asked[0].requires_grad and asked[1].requires_grad
    assert not swapped.requires_grad and not sampled.requires_grad

    loss = advvae.adversary_loss(on_real, on_swapped, on_sampled)
    assert measures["adversary_loss"] == pytest.approx(loss.item(), rel=1e-5)
    right = (torch.cat([on_swapped, on_sampled]) < 0).float().mean()
    assert measures["right_on_real"] == pytest.approx((on_real > 0).float().mean().item())
    assert measures["right_on_fakes"] == pytest.approx(right.item())

def test_bfloat16_has_the_losses_of_float32(nets, triple):
    """To 2 percent. mu and logvar, which the KL needs exactly, are float32 in both."""
    plain = step(*copy.deepcopy(nets), triple, Config())
    with torch.autocast("cpu", torch.bfloat16):
        fast = step(*copy.deepcopy(nets), triple, Config())
        _, mu, logvar = nets[0].encode(triple[0])
    assert mu.dtype == logvar.dtype == torch.float32
    assert fast != plain
    for name in (*TERMS, "adversary_loss"):
        assert fast[name] == pytest.approx(plain[name], rel=0.02, abs=1e-3), name

def test_same_seed_same_weights(data):
    """Two runs with one seed end bit-equal, history and all; another seed does not."""
    model, history = advvae.train(Config(epochs=1, batch_size=100), data)
    again, history_again = advvae.train(Config(epochs=1, batch_size=100), data)
    other, _ = advvae.train(Config(epochs=1, batch_size=100, seed=1), data)
    assert all(equal_weights(model, again))
    assert history == history_again
    assert not any(equal_weights(model, other))

@pytest.fixture
def steps(monkeypatch):
    """What train gives to each of its steps, none of which learns."""
    seen = []

    def look(model, adversary, optimizers, triple, config, generator):
        seen.append(
            types.SimpleNamespace(
                model=copy.deepcopy(model),
                rates=[optimizer.param_groups[0]["lr"] for optimizer in optimizers],
                x1=triple[0],
                dtype=(torch.ones(2, 2) @ torch.ones(2, 2)).dtype,
                generator=generator,
            )
        )
        return {"kl": float(len(seen))}

    monkeypatch.setattr(advvae, "train_step", look)
    return seen

def test_the_seed_sets_the_first_weights_and_the_order(data, steps):
    """And the generator of all that a step draws."""
    for seed in (0, 1):
        advvae.train(Config(epochs=1, seed=seed, batch_size=600), data)
    assert not any(equal_weights(steps[0].model, steps[1].model))
    assert not torch.equal(steps[0].x1, steps[1].x1)
    assert [given.generator.initial_seed() for given in steps] == [0, 1]

def test_the_learning_rate_is_constant_then_falls_to_0(data, steps):
    """From half of the steps on, linearly, for both sides."""
    advvae.train(Config(epochs=4, batch_size=60, learning_rate=1.0), data)
    for i, given in enumerate(steps):
        wanted = min(1, 2 * (1 - (i + 0.5) / 40))
        assert given.rates == pytest.approx([wanted, wanted])

def test_the_history_has_each_epochs_means(data, steps):
    """Of three steps each: here these return 1, 2, 3 and 4, 5, 6."""
    _, history = advvae.train(Config(epochs=2, batch_size=250), data)
    assert history == [{"kl": 2.0}, {"kl": 5.0}]

def test_bfloat16_is_off_unless_it_is_asked_for(data, steps):
    """The same default on every machine."""
    advvae.train(Config(epochs=1, batch_size=600), data)
    advvae.train(Config(epochs=1, batch_size=600, bfloat16=True), data)
    assert [given.dtype for given in steps] == [torch.float32, torch.bfloat16]

def test_a_loss_that_is_not_finite_stops_training(data):
    """With a message that says in which epoch, and what to try."""
    config = Config(epochs=2, learning_rate=1e9, batch_size=60)
    with pytest.raises(advvae.UserError, match="epoch 1 .*(nan|inf).*lower --learning-rate"):
        advvae.train(config, data)

def test_config_takes_numpys_numbers_and_refuses_what_cant_be_meant():
    """A sweep over np.logspace is saved and read like any other training."""
    config = Config(seed=numpy.int64(3), batch_size=128.0, kl_weight=numpy.float64(2))
    for field in fields(Config):
        assert type(getattr(config, field.name)) is field.type
    for bad in ({"epochs": 1.5}, {"epochs": 0}, {"kl_weight": -1}, {"seed": 2**63}):
        with pytest.raises(advvae.UserError, match=f"{next(iter(bad))} is"):
            Config(**bad)
    for bad in (math.nan, math.inf):
        with pytest.raises(advvae.UserError, match="swap_weight is"):
            Config(swap_weight=bad)

# ---- 5. Data ------------------------------------------------------------------------

def small_typeset(monkeypatch, n=300, module=advvae):
    """From now on load_data("typeset") has n images."""
    full = module.typeset
    monkeypatch.setattr(module, "typeset", lambda count, *rest: full(min(count, n), *rest))

def test_typeset_repeats(monkeypatch):
    """Whatever torch's own seed is; and no test digit is a training digit."""
    small_typeset(monkeypatch)
    data = advvae.load_data("typeset")
    torch.manual_seed(7)
    again = advvae.load_data("typeset")
    assert torch.equal(again.images, data.images)
    assert torch.equal(again.test_images, data.test_images)
    both = torch.cat([data.images, data.test_images]).flatten(1)
    assert len(both.unique(dim=0)) == 600

def test_render_draws_an_image_from_its_factors_alone(data):
    """The same again, and the same wherever on the sheet the image is drawn."""
    assert torch.equal(advvae.render(data.labels, data.factors), data.images)
    last = {name: values[-1:] for name, values in data.factors.items()}
    alone = advvae.render(data.labels[-1:], last)
    torch.testing.assert_close(alone, data.images[-1:], atol=0.02, rtol=0)

def correlation(a, b):
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()

def test_typesets_factors_move_what_they_name(data):
    """Slant and pen are seen in the measured slant and thickness, size is the height of
    the ink, a shift by 1 moves an image by a pixel, one by 0.3 by as much as that."""
    x, factors = data.images, data.factors
    assert correlation(advvae.slant(x), factors["slant"]) > 0.95
    assert correlation(advvae.stroke_thickness(x), factors["pen"]) > 0.8

    rows_with_ink = (x.amax(dim=(1, 3)) > 0.5).sum(dim=1)
    too_tall = rows_with_ink - factors["size"] - factors["pen"]
    assert too_tall.abs().mean() < 1

    right = advvae.render(data.labels, factors | {"shift_x": factors["shift_x"] + 1})
    assert (right - x.roll(1, dims=3)).abs().mean() < 0.003
    down = advvae.render(data.labels, factors | {"shift_y": factors["shift_y"] + 1})
    assert (down - x.roll(1, dims=2)).abs().mean() < 0.003

    def centre(images):
        columns = images.sum(dim=(1, 2))
        return (columns * torch.arange(28)).sum(dim=1) / columns.sum(dim=1)

    moved = advvae.render(data.labels, factors | {"shift_x": factors["shift_x"] + 0.3})
    assert (centre(moved) - centre(x) - 0.3).abs().mean() < 0.03

def test_typesets_factors_say_nothing_of_the_class():
    """No factor differs between the digits, so a z that holds only these is at chance."""
    _, labels, factors = advvae.typeset(5000, seeded(3))
    for name, values in factors.items():
        values = values.float()
        means = torch.stack([values[labels == c].mean() for c in range(10)])
        assert means.std() < 0.1 * values.std(), name

def test_typeset_draws_any_characters():
    """Wide ones are as wide as tall ones are tall, and the whole of it is in the image."""
    images, labels, factors = advvae.typeset(200, seeded(), "AWi-")
    assert torch.equal(images, advvae.render(labels, factors, "AWi-"))
    dash = images[labels == 3]
    columns_with_ink = (dash.amax(dim=(1, 2)) > 0.5).sum(dim=1)
    assert (columns_with_ink - factors["size"][labels == 3]).mean() > 0

NOISE = torch.randint(256, (50, 28, 28), generator=seeded())

def idx(array):
    """The content of an IDX file of bytes, the format of MNIST's files."""
    header = struct.pack(f">4B{array.dim()}I", 0, 0, 8, array.dim(), *array.shape)
    return header + bytes(array.flatten().tolist())

def write_mnist(folder, train=NOISE[:30], test=NOISE[30:], classes=(3, 9, 5)):
    """These images as MNIST's four files under folder, of these classes in turn."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for part, images in (("train", train), ("t10k", test)):
        labels = torch.tensor(classes).repeat(len(images))[: len(images)]
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    return raw

@pytest.fixture
def download(monkeypatch):
    """Stands for torchvision's download of a file; it fails."""
    fake = mock.Mock(side_effect=RuntimeError("no\nnetwork"))
    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", fake)
    return fake

def test_mnist_is_read_from_torchvisions_folder(tmp_path, download):
    """Pixels become 0 to 1. What is there isn't downloaded; what isn't there, is."""
    download.side_effect = lambda *_, **__: write_mnist(tmp_path)
    data = advvae.load_data("mnist", tmp_path)
    assert download.call_count == 4
    assert torch.equal(data.images[:, 0], NOISE[:30] / 255)
    assert torch.equal(data.test_images[:, 0], NOISE[30:] / 255)
    assert data.labels.tolist() == [3, 9, 5] * 10
    assert len(data.test_labels) == 20

    advvae.load_data("mnist", tmp_path)
    assert download.call_count == 4

def test_auto_is_typeset_where_mnist_cannot_be_had(tmp_path, monkeypatch, download, capsys):
    """Said loudly, with what to do; and it is MNIST once its files are there."""
    small_typeset(monkeypatch)
    assert advvae.load_data("auto", tmp_path).name == "typeset"
    said = capsys.readouterr().out
    assert "!!!!!" in said and "NOT MNIST" in said and "go online" in said
    assert "no\\nnetwork" in said  # the cause, in one line

    write_mnist(tmp_path)
    assert advvae.load_data("auto", tmp_path).name == "mnist"

def with_a_nan(x):
    return torch.where(torch.arange(x.numel()).view_as(x) == 5000, math.nan, x)

@pytest.mark.parametrize("part", ["images", "test_images"])
def test_images_that_cannot_be_trained_on_are_refused(part, data):
    """[-1, 1], 0 to 255, bytes, a NaN, no channel, three channels, 27 rows, none."""
    x = getattr(data, part)
    rgb = x.expand(-1, 3, 28, 28)
    wrong = [2 * x - 1, 255 * x, x.byte(), with_a_nan(x), x[:, 0], rgb, x[:, :, :27], x[:0]]
    for images in wrong:
        with pytest.raises(advvae.UserError, match="images must be"):
            replace(data, **{part: images})

@pytest.mark.parametrize("part", ["labels", "test_labels"])
def test_labels_that_cannot_be_trained_on_are_refused(part, data):
    """Too few, floats, from -1, one class; and a test class that training doesn't have."""
    y = getattr(data, part)
    wrong = [y[1:], y.float(), y - 1, 0 * y]
    if part == "test_labels":
        wrong.append(y + 1)
    for labels in wrong:
        with pytest.raises(advvae.UserError, match="labels must be"):
            replace(data, **{part: labels})
    assert replace(data, **{part: y.int()}).labels.dtype == torch.int64

def test_dark_strokes_are_pointed_out(data, capsys):
    """Slant and thickness would be read of the background."""
    replace(data)
    assert capsys.readouterr().out == ""
    replace(data, images=1 - data.images)
    assert "1 - images" in capsys.readouterr().out

# ---- 6. Measures --------------------------------------------------------------------

def test_classes_in_codes_with_known_answers():
    """A code that is the class, one that tells odd from even (ln 2 nats), one of noise."""
    labels, test_labels = torch.randint(10, (2, 5000), generator=seeded())
    noise, test_noise = torch.randn(2, 5000, 10, generator=seeded(1))
    torch.manual_seed(0)

    def probe(of_labels):
        codes = of_labels(labels) + 0.01 * noise
        test_codes = of_labels(test_labels) + 0.01 * test_noise
        found = advvae.class_in("it", codes, labels, test_codes, test_labels)
        return found["class from it"], found["class from it, nats"]

    right, nats = probe(lambda y: F.one_hot(y, 10))
    assert right > 0.99 and nats == pytest.approx(math.log(10), abs=0.06)
    right, nats = probe(lambda y: (y % 2).unsqueeze(1))
    assert right == pytest.approx(0.2, abs=0.03) and nats == pytest.approx(math.log(2), abs=0.1)
    right, nats = probe(lambda y: 0 * y.unsqueeze(1))
    assert right == pytest.approx(0.1, abs=0.03) and nats < 0.02

def swap_pairs(data):
    """Test images in pairs of different classes: i1, i2."""
    y = data.test_labels
    i1 = (y != y.roll(1)).nonzero().flatten()
    return i1, (i1 - 1) % len(y)

def test_whose_class_a_swap_shows(data):
    """It is s's if the swap is x2, z's if it is x1, and neither's if it is a third one."""
    i1, i2 = swap_pairs(data)
    y = data.test_labels
    third = (y[i1] + 1) % 10
    third = torch.where(third == y[i2], (third + 1) % 10, third)

    # A judge that is never wrong: it finds the image among those it knows.
    def judge(images):
        return F.one_hot(images[:, 0, 0, 0].long(), 10)

    def shares(shown):
        swapped = shown.view(-1, 1, 1, 1).expand(-1, 1, 28, 28)
        labelled = y.view(-1, 1, 1, 1).expand(-1, 1, 28, 28)
        other = (labelled + 1) % 10
        found = advvae.class_shown(judge, swapped, y[i1], y[i2], other, labelled, y)
        assert found["prior samples of s's class"] == 0
        assert found["real images judged right"] == 1
        names = ("s's class", "z's class", "neither")
        return [found[f"swaps that show {name}"] for name in names]

    assert shares(y[i2]) == [1, 0, 0]
    assert shares(y[i1]) == [0, 1, 0]
    assert shares(third) == [0, 0, 1]

def style_slopes(swapped, data):
    i1, i2 = swap_pairs(data)
    x, y = data.test_images, data.test_labels
    found = advvae.style_kept(swapped, x[i1], x[i2], y[i1], y[i2])
    names = ("slant", "thickness")
    slopes = [[found[f"{name}, slope on {code}'s source"] for code in "zs"] for name in names]
    return slopes[0] + slopes[1]

def leaning(data):
    """Digits that lean the more, the higher they are, and besides each by itself."""
    slant = 0.04 * (data.test_labels - 4.5) + 0.4 * data.test_factors["slant"]
    factors = data.test_factors | {"slant": slant}
    images = advvae.render(data.test_labels, factors)
    return replace(data, test_images=images, test_factors=factors)

@pytest.fixture(scope="module")
def many():
    return digits(20, test=2000)

def test_style_slopes_of_swaps_that_copy(many):
    """A swap that is x1 has slopes 1 and 0, one that is x2 has 0 and 1."""
    i1, i2 = swap_pairs(many)
    x = many.test_images
    assert style_slopes(x[i1], many) == pytest.approx([1, 0, 1, 0], abs=1e-4)
    assert style_slopes(x[i2], many) == pytest.approx([0, 1, 0, 1], abs=1e-4)

def test_style_slopes_compare_within_pairs_of_classes(many):
    """A perfect swap leans as its class does, and beyond that as x1 does beyond its own.
    Its slopes are 1 and 0, although what x2 leans says much of what the swap leans."""
    data = leaning(many)
    i1, i2 = swap_pairs(data)
    y, factors = data.test_labels, data.test_factors
    own = factors["slant"][i1] - 0.04 * (y[i1] - 4.5)
    factors = {name: values[i1] for name, values in factors.items()}
    swapped = advvae.render(y[i2], factors | {"slant": own + 0.04 * (y[i2] - 4.5)})
    assert style_slopes(swapped, data)[:2] == pytest.approx([1, 0], abs=0.1)

    # A third of the style has a slope of a third; a correlation would be 1.
    third = advvae.render(y[i2], factors | {"slant": own / 3 + 0.04 * (y[i2] - 4.5)})
    assert style_slopes(third, data)[:2] == pytest.approx([1 / 3, 0], abs=0.05)

class Known(nn.Module):
    """A perfect model of data: s is the class, z the true factors, and the decoder draws
    what they say. Besides, z tells of the class: in 4 dimensions loudly in mu, but drowned
    in z's noise; in 3 dimensions better, but each class has 8 places there, scattered
    among those of the others."""

    def __init__(self, data):
        super().__init__()
        images = [*data.images, *data.test_images]
        self.index = {x.numpy().tobytes(): i for i, x in enumerate(images)}
        labels = torch.cat([data.labels, data.test_labels])
        self.s = F.one_hot(labels).float()

        self.names = list(data.factors)
        factors = [torch.cat([data.factors[n], data.test_factors[n]]) for n in self.names]
        factors = torch.stack(factors, dim=1).float()
        self.middle, self.spread = factors.mean(0), factors.std(0)

        generator = seeded(1)
        loud = torch.randn(10, 1, 4, generator=generator).expand(-1, 8, -1)
        places = 2 * torch.randn(10, 8, 3, generator=generator)
        self.means = torch.cat([loud, places], dim=2)  # (10, 8, 7)
        place = torch.randint(8, labels.shape, generator=generator)
        standard = (factors - self.middle) / self.spread
        self.mu = torch.cat([standard, self.means[labels, place]], dim=1)
        self.std = torch.tensor([0.01] * 6 + [4.0] * 4 + [0.4] * 3)
        self.decoded = []  # each z and s that the decoder was given

    def encode(self, x):
        i = [self.index[image.tobytes()] for image in x.numpy()]
        return self.s[i], self.mu[i], 2 * self.std.log().expand(len(x), -1)

    def decoder(self, z, s):
        self.decoded.append((z, s))
        factors = self.middle + self.spread * z[:, :6]
        factors = dict(zip(self.names, factors.T))
        factors["font"] = factors["font"].round().long().clamp(0, 6)
        factors["pen"] = factors["pen"].clamp_min(0)
        return advvae.render(s.argmax(1), factors)

@pytest.fixture(scope="module")
def known():
    """Known, its data, and what evaluate says of them."""
    data = digits(3000, test=1000)
    model = Known(data)
    return model, data, advvae.evaluate(model, data)

def test_evaluate_on_codes_with_known_answers(known):
    """s is the class, z the factors, decodings are perfect."""
    _, data, r = known
    assert r["class from s"] == 1
    assert r["class from s, nats"] == pytest.approx(math.log(10), abs=0.05)
    assert r["class by chance"] == pytest.approx(data.test_labels.bincount().max().item() / 1000)

    # As good as the judge is on real images, and never the class of z's source.
    real = r["real images judged right"]
    assert real > 0.8
    assert r["swaps that show s's class"] > real - 0.1
    assert r["prior samples of s's class"] > real - 0.25
    three = [r[f"swaps that show {whose}"] for whose in ("s's class", "z's class", "neither")]
    assert sum(three) == pytest.approx(1)
    assert r["squared error of reconstructions"] < 1e-4
    assert r["squared error of swaps"] < 1e-4
    for what in ("swaps", "samples", "real images"):
        assert 0 < r[f"Frechet distance, {what}"] < 2

    for name in ("slant", "thickness"):
        assert r[f"{name}, slope on z's source"] == pytest.approx(1, abs=0.15)
        assert r[f"{name}, slope on s's source"] == pytest.approx(0, abs=0.1)
    for name in ("slant", "size", "pen", "shift_x", "shift_y"):
        assert 0.99 < r[f"true {name} in z, R2"] < 0.99999
        assert abs(r[f"true {name} in s, R2"]) < 0.05

def test_draws_of_z_are_probed_and_well(known):
    """The probe finds nearly what can be found in draws, by Bayes' rule, and finds in mu
    what z's noise drowns."""
    model, data, r = known
    noise = torch.randn(1000, 1, 1, 7, generator=seeded())
    draws = model.mu[3000:, None, None, 6:] + model.std[6:] * noise
    log_p = Normal(model.means, model.std[6:]).log_prob(draws).sum(3).logsumexp(2)
    best = (log_p.argmax(1) == data.test_labels).float().mean()
    assert best - 0.12 < r["class from z"] < best + 0.03 < 0.9
    assert 0.5 < r["class from z, nats"] < math.log(10) - 0.3
    assert r["class from mu"] > 0.99

def test_what_evaluate_decodes(known):
    """Of test images: mu with their own s, mu with the s of one of another class, and
    draws from the prior with their own s."""
    model, _, r = known
    mu, s = model.mu[3000:], model.s[3000:]
    (z_swapped, s_swapped), (z_decoded, s_decoded), (z_sampled, s_sampled) = model.decoded
    assert torch.equal(z_decoded, mu) and torch.equal(s_decoded, s)
    assert torch.equal(s_sampled, s)
    assert (z_sampled.std(0) - 1).abs().max() < 0.1 and z_sampled.mean(0).abs().max() < 0.15

    # Nine of ten test images are swapped: those whose partner is of another class.
    where = [(mu == z).all(dim=1).nonzero().item() for z in z_swapped]
    assert len(set(where)) == len(where) > 850
    assert not (s[where] == s_swapped).all(dim=1).any()
    assert s_swapped.sum(0).min() > 50

    kl = advvae.kl_term(mu, 2 * model.std.log().expand(1000, -1)).item()
    assert r["KL of z, nats"] == pytest.approx(kl, rel=1e-5)

def test_what_is_fitted_is_fitted_to_training_images(known):
    """If all labels are one off there and all factors negated, nothing is right."""
    data = known[1]
    negated = {name: -factor for name, factor in data.factors.items()}
    wrong = replace(data, labels=(data.labels + 1) % 10, factors=negated)
    r = advvae.evaluate(Known(data), wrong)
    assert r["class from s"] == 0
    assert max(r["class from z"], r["class from mu"]) < 0.1
    assert r["real images judged right"] < 0.1
    assert r["true slant in z, R2"] < 0

def test_evaluate_repeats(nets, data):
    """Twice the same table, also where the caller has switched gradients off."""
    first = advvae.evaluate(nets[0], data)
    with torch.no_grad():
        again = advvae.evaluate(nets[0], data)
    with torch.inference_mode():
        and_again = advvae.evaluate(nets[0], data)
    assert again == pytest.approx(first, abs=1e-5)
    assert and_again == pytest.approx(first, abs=1e-5)

def test_frechet_distance_is_that_of_two_gaussians():
    """Independent, turned or not: |difference of means|^2 + |of standard deviations|^2."""
    a, b = torch.randn(2, 50_000, 3, generator=seeded())
    mean = torch.tensor([1.0, 0.0, -2.0])
    std = torch.tensor([3.0, 1.0, 0.5])
    wanted = mean.square().sum() + (std - 2).square().sum()
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=seeded()))
    for rotation in (torch.eye(3), turn):
        found = advvae.frechet_distance(2 * a @ rotation, (mean + std * b) @ rotation)
        assert found == pytest.approx(wanted.item(), rel=0.03)
    assert abs(advvae.frechet_distance(a, a)) < 1e-6

def bar(lean):
    """A stroke 3 pixels wide and 20 high that leans by so many pixels a pixel."""
    image = torch.zeros(1, 1, 28, 28)
    for y in range(4, 24):
        x = round(13 - lean * (y - 13.5))
        image[..., y, x - 1 : x + 2] = 1
    return image

def test_slant_and_thickness_measure_known_strokes():
    """A bar 3 pixels wide is 3 thick (its two ends count a little); sheared, it leans."""
    assert advvae.stroke_thickness(bar(0)).item() == pytest.approx(3 / (1 + 3 / 20), rel=0.05)
    assert advvae.slant(bar(0)).item() == pytest.approx(0, abs=1e-4)
    assert advvae.slant(bar(0.5)).item() == pytest.approx(0.5, abs=0.02)

def test_slant_and_thickness_take_gray_images_only():
    """In color they would be silently wrong."""
    for measure in (advvae.slant, advvae.stroke_thickness):
        for images in (torch.rand(5, 3, 28, 28), torch.rand(5, 28, 28)):
            with pytest.raises(ValueError, match="gray"):
                measure(images)

def test_odd_data_give_no_nan(tmp_path):
    """Three images, or all of them black: finite weights, finite results."""
    for name, images in (("three", NOISE[:3]), ("black", 0 * NOISE[:30])):
        write_mnist(tmp_path / name, images, images)
        odd = advvae.load_data("mnist", tmp_path / name)
        model, _ = advvae.train(Config(epochs=2), odd)
        assert all(torch.isfinite(p).all() for p in model.parameters())
        assert all(map(math.isfinite, advvae.evaluate(model, odd).values()))

# ---- Does it learn? -----------------------------------------------------------------

def test_it_learns():
    """After a short training s tells the class, swaps obey s, and slant follows z."""
    data = digits(3000, test=1000)
    torch.manual_seed(0)
    before = advvae.evaluate(AdvVAE(), data)
    model, _ = advvae.train(Config(epochs=4, batch_size=64), data)
    after = advvae.evaluate(model, data)

    thresholds = {
        "class from s": 0.9,
        "swaps that show s's class": 0.75,
        "prior samples of s's class": 0.7,
        "slant, slope on z's source": 0.6,
        "true slant in z, R2": 0.6,
    }
    for name, threshold in thresholds.items():
        assert before[name] < threshold < after[name], name
    assert after["class from z"] < 0.6
    assert abs(after["slant, slope on s's source"]) < 0.3
    assert after["squared error of reconstructions"] < 0.05

def test_the_adversary_makes_the_decoder_obey_s():
    """Where z is cheap, terms 1 and 2 are content with swaps that ignore s: these are more
    like x1 than like x2's digit in the style of x1. With terms 3 and 4 most obey s."""
    data = digits(4000, test=1000)
    i1, i2 = swap_pairs(data)
    factors = {name: values[i1] for name, values in data.test_factors.items()}
    truth = advvae.render(data.test_labels[i2], factors)

    def share_that_obeys(adversary_weight, prior_weight):
        weights = (0.2, 0.1, 1, adversary_weight, prior_weight)
        config = weighted(*weights, epochs=2, batch_size=64, s_dim=2)
        model, _ = advvae.train(config, data)
        with torch.no_grad():
            s, mu, _ = model.encode(data.test_images)
            swapped = model.decoder(mu[i1], s[i2])
        to_truth = (swapped - truth).square().sum(dim=(1, 2, 3))
        to_x1 = (swapped - data.test_images[i1]).square().sum(dim=(1, 2, 3))
        return (to_truth < to_x1).float().mean()

    assert share_that_obeys(0, 0) < 0.4
    assert share_that_obeys(60, 30) > 0.6

# ---- 7. Checkpoint and command line -------------------------------------------------

def flags(folder, *more):
    """A command line that trains on typeset and writes into folder only."""
    checkpoint = str(folder / "a.pt")
    figures = str(folder / "figures")
    common = ["--dataset", "typeset", "--device", "cpu"]
    return common + ["--checkpoint", checkpoint, "--figures-dir", figures, *more]

def refused(capsys, argv):
    """main must refuse argv with exit code 2 and one line on stderr, which is returned."""
    with pytest.raises(SystemExit) as exit:
        advvae.main(argv)
    message = capsys.readouterr().err
    assert exit.value.code == 2
    assert message.startswith("advvae.py: ") and message.count("\n") == 1
    return message

@pytest.fixture
def brief(monkeypatch):
    """main trains on 300 typeset digits, and neither measures nor draws."""
    small_typeset(monkeypatch)
    monkeypatch.setattr(advvae, "evaluate", lambda *_: {})
    monkeypatch.setattr(advvae, "save_grid", lambda *_, **__: None)

def test_importing_does_nothing(tmp_path):
    """`import advvae` only defines: no output, no files, no random number is used up."""
    code = f"""
import sys, torch
sys.path.insert(0, {str(HERE)!r})
sys.dont_write_bytecode = True
old = torch.get_rng_state()
import advvae
assert torch.equal(torch.get_rng_state(), old)
"""
    python = [sys.executable, "-W", "error", "-c", code]
    ended = subprocess.run(python, cwd=tmp_path, capture_output=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"", b"")
    assert not list(tmp_path.iterdir())

def test_a_line_is_out_at_once(monkeypatch):
    """Also into a file or a pipe; and no line of the program is printed otherwise."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw))
    advvae.say("epoch 1/20")
    assert raw.getvalue().startswith(b"epoch 1/20")
    for call in re.findall(r"(?m)^.*\bprint\(.*$", text_of("advvae.py")):
        assert "flush=True" in call or "file=sys.stderr" in call

def test_progress_shows_on_a_terminal_only(monkeypatch, capsys, data):
    """One line in place, which is wiped out at the end of an epoch."""
    advvae.train(Config(epochs=1, batch_size=300), data)
    assert "\r" not in capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    advvae.train(Config(epochs=1, batch_size=300), data)
    said = capsys.readouterr().out
    assert said.startswith("\repoch 1/1: 50%")
    assert f"\r{'':40}\repoch 1/1  reconstruction" in said

@pytest.mark.parametrize(
    "flag, value, hint",
    [
        ("kl-weight", "-1", "kl_weight is"),
        ("prior-weight", "nan", "prior_weight is"),
        ("batch-size", "0", "batch_size is"),
        ("epochs", "0", "epochs is"),
        ("epochs", "1.5", "epochs"),
        ("no-such-flag", "1", "no-such-flag"),
        ("dataset", "imagenet", "--help"),
        ("device", "abacus", "--device cpu"),
        ("device", "cuda", "--device cpu"),
        ("figures-dir", __file__, __file__),
        ("checkpoint", f"{__file__}/a.pt", __file__),
        ("checkpoint", __file__, "name another --checkpoint"),
    ],
)
def test_bad_settings_are_refused_in_one_line(flag, value, hint, tmp_path, monkeypatch, capsys):
    """Exit code 2 and what is wrong, before anything is trained or overwritten."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(advvae, "train", mock.Mock())
    if value == "cuda":  # as torch says it on a machine without a GPU
        fault = AssertionError("Torch not compiled with CUDA enabled")
        monkeypatch.setattr(torch, "zeros", mock.Mock(side_effect=fault))
    assert hint in refused(capsys, flags(tmp_path, f"--{flag}", value))
    assert not advvae.train.called

def test_help_explains_every_flag(capsys):
    """Each field of Config is a flag, with its default."""
    with pytest.raises(SystemExit):
        advvae.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for field in fields(Config):
        assert f"--{field.name.replace('_', '-')} " in said
        assert field.type is bool or f"(default: {field.default}" in said

def test_flags_become_the_config(brief, tmp_path):
    """Every flag reaches the setting of its name."""
    wanted = Config(1, 100, 0.001, 7, 3, 4, True, 0.1, 0.2, 0.3, 0.4, 0.5)
    argv = []
    for field in fields(Config):
        value = getattr(wanted, field.name)
        argv.append(f"--{field.name.replace('_', '-')}")
        argv += [] if value is True else [str(value)]
    advvae.main(flags(tmp_path, *argv))
    assert advvae.read_checkpoint(tmp_path / "a.pt")["config"] == wanted

def test_a_checkpoint_gives_the_model_back(data, tmp_path):
    """In eval mode; the file holds data only, no code."""
    path = tmp_path / "a.pt"
    config = Config(epochs=1, s_dim=3, z_dim=numpy.int64(4))
    model, history = advvae.train(config, data, path)
    loaded = advvae.load_checkpoint(path)
    assert not loaded.training
    assert all(equal_weights(model, loaded))
    saved = advvae.read_checkpoint(path)
    assert (saved["config"], saved["history"]) == (config, history)

def test_a_run_that_is_stopped_and_resumed_is_the_uninterrupted_one(
    brief, tmp_path, monkeypatch, capsys
):
    """Ctrl-C: exit code 130, a line that names --resume, and in the end the same weights."""
    settings = ("--epochs", "4", "--batch-size", "100", "--z-dim", "5")  # 3 steps an epoch
    advvae.main(flags(tmp_path / "whole", *settings))
    real = advvae.train_step
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        calls = mock.Mock(side_effect=[None] * 7 + [KeyboardInterrupt])
        patch.setattr(advvae, "train_step", lambda *given: calls() or real(*given))
        advvae.main(flags(tmp_path / "stopped", *settings))
    assert re.fullmatch(".*--resume.*\n", capsys.readouterr().err)
    stopped = tmp_path / "stopped" / "a.pt"
    assert len(advvae.read_checkpoint(stopped)["history"]) == 2

    advvae.main(flags(tmp_path / "stopped", "--resume"))
    whole = tmp_path / "whole" / "a.pt"
    assert all(equal_weights(advvae.load_checkpoint(whole), advvae.load_checkpoint(stopped)))
    histories = [advvae.read_checkpoint(path)["history"] for path in (whole, stopped)]
    assert histories[0] == histories[1] and len(histories[0]) == 4

def test_resume_takes_all_settings_but_epochs_from_the_checkpoint(brief, tmp_path, capsys):
    """And says so. A new run says that it replaces the file."""
    first = ("--epochs", "1", "--batch-size", "100", "--z-dim", "5")
    advvae.main(flags(tmp_path, *first))
    assert "replaced" not in capsys.readouterr().out
    advvae.main(flags(tmp_path, *first))
    assert "a.pt will be replaced; --resume" in capsys.readouterr().out

    advvae.main(flags(tmp_path, "--resume", "--epochs", "3", "--z-dim", "9", "--seed", "8"))
    assert "settings, but for --epochs, are those of" in capsys.readouterr().out
    saved = advvae.read_checkpoint(tmp_path / "a.pt")
    assert saved["config"] == Config(epochs=3, batch_size=100, z_dim=5)
    assert len(saved["history"]) == 3

def test_other_networks_start_anew_but_cannot_be_resumed(brief, tmp_path, monkeypatch, capsys):
    """What every exercise does: change a network, with an old advvae.pt in the folder."""
    one_epoch = ("--epochs", "1", "--batch-size", "100")
    advvae.main(flags(tmp_path, *one_epoch))
    old = (tmp_path / "a.pt").read_bytes()

    class Changed(Adversary):
        def __init__(self, n_classes):
            super().__init__(n_classes)
            self.conv = nn.Conv2d(16, 64, kernel_size=3)

    monkeypatch.setattr(advvae, "Adversary", Changed)
    message = refused(capsys, flags(tmp_path, "--resume", "--epochs", "2"))
    assert "other networks" in message and "without --resume" in message
    assert (tmp_path / "a.pt").read_bytes() == old
    advvae.main(flags(tmp_path, *one_epoch))
    assert (tmp_path / "a.pt").read_bytes() != old

def test_other_classes_cannot_be_resumed(tmp_path, data, monkeypatch, capsys):
    """Data with another number of classes need another adversary."""
    small_typeset(monkeypatch)
    fewer = replace(data, labels=data.labels % 7, test_labels=data.test_labels % 7)
    advvae.train(Config(epochs=1), fewer, tmp_path / "a.pt")
    message = refused(capsys, flags(tmp_path, "--resume", "--epochs", "2"))
    assert "other networks" in message

def test_a_checkpoint_holds_nothing_of_its_device(data, tmp_path):
    """A run that began on a GPU can be resumed without one: all random numbers come from
    a generator on the CPU, and tensors are read to the CPU."""
    advvae.train(Config(epochs=1), data, tmp_path / "a.pt")
    loaded = mock.Mock(wraps=torch.load)
    with mock.patch.object(torch, "load", loaded):
        saved = advvae.read_checkpoint(tmp_path / "a.pt")
    assert loaded.call_args.kwargs["map_location"] == "cpu"
    assert "device" not in saved
    assert saved["generator"].shape == torch.Generator("cpu").get_state().shape

class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('it ran')",)

@pytest.mark.parametrize("content", [b"", b"my thesis", {"config": Bomb()}, {"weights": 1}])
def test_a_file_that_is_no_checkpoint_is_not_read(content, tmp_path, monkeypatch, capsys):
    """One line, nothing is trained, no code in it runs, and the file stays."""
    path = tmp_path / "a.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    old = path.read_bytes()
    monkeypatch.setattr(advvae, "train", mock.Mock())
    assert "is no checkpoint" in refused(capsys, flags(tmp_path, "--resume"))
    if isinstance(content, bytes):  # else it may be of an older advvae.py: a run may start
        assert "is no checkpoint" in refused(capsys, flags(tmp_path))
    assert path.read_bytes() == old
    assert not advvae.train.called

def test_a_checkpoint_that_is_a_link_stays_one(data, tmp_path):
    """The file that it names, on a bigger disk perhaps, is written."""
    (tmp_path / "disk").mkdir()
    link = tmp_path / "a.pt"
    try:
        link.symlink_to(tmp_path / "disk" / "real.pt")
    except OSError:
        pytest.skip("no links here")
    for _ in range(2):
        advvae.train(Config(epochs=1), data, link)
        assert link.is_symlink()
        assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real.pt"]
    advvae.load_checkpoint(tmp_path / "disk" / "real.pt")

def test_a_full_disk_is_one_line_and_leaves_the_old_checkpoint(brief, tmp_path, capsys):
    """Writing breaks off in the middle of the file."""
    resource = pytest.importorskip("resource")  # Unix
    advvae.main(flags(tmp_path, "--epochs", "1"))
    old = (tmp_path / "a.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, limits[1]))
    try:
        message = refused(capsys, flags(tmp_path, "--epochs", "1", "--seed", "1"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in message
    assert (tmp_path / "a.pt").read_bytes() == old

def test_damaged_files_are_refused_in_one_line(tmp_path, capsys):
    """A cut one, and images of 32x32 pixels."""
    raw = write_mnist(tmp_path)
    argv = flags(tmp_path, "--dataset", "mnist", "--data-dir", str(tmp_path))
    (raw / "t10k-images-idx3-ubyte").write_bytes(idx(NOISE[:20])[:-9])
    assert str(tmp_path) in refused(capsys, argv)
    (raw / "t10k-images-idx3-ubyte").write_bytes(idx(torch.zeros(20, 32, 32).int()))
    assert "28" in refused(capsys, argv)

# ---- 8. Pictures and main -----------------------------------------------------------

def test_main_trains_measures_and_draws(tmp_path, monkeypatch, capsys):
    """A line an epoch, the results printed and saved, three pictures, the swap grid last."""
    small_typeset(monkeypatch)
    advvae.main(flags(tmp_path, "--epochs", "2", "--checkpoint", str(tmp_path / "new" / "a.pt")))
    said = capsys.readouterr().out
    lines = r"(?m)^epoch (\d)/2  reconstruction .* kl .* swap .* s, \d\.\d min left$"
    assert re.findall(lines, said) == ["1", "2"]
    assert (tmp_path / "new" / "a.pt").exists()

    pictures = sorted((tmp_path / "figures").glob("*.png"), key=os.path.getmtime)
    names = [f"typeset-{what}.png" for what in ("samples", "interpolation", "swap")]
    assert [path.name for path in pictures] == names
    saved = tmp_path / "figures" / "typeset-results.json"
    results = json.loads(saved.read_text(encoding="utf-8"))
    for name, value in results.items():
        assert f"  {name:<34}{value:9.4f}\n" in said

def grid(plot, data):
    """What plot draws of a model to which each class's first test image gives z = 0, 1,
    ..., 9 and s = 0, 10, ..., 90, and which decodes these to z + s. Returns the numbers
    in the white images (10, 10), the images left of them and above them, and the first
    test images."""
    labels = data.test_labels.tolist()
    first = torch.stack([data.test_images[labels.index(c)] for c in range(10)])
    z = torch.arange(10.0).view(10, 1)

    def encode(x):
        assert torch.equal(x, first)
        return 10 * z, z, None

    def decoder(z, s):
        return ((z + s) / 100).view(-1, 1, 1, 1).expand(-1, 1, 28, 28)

    model = types.SimpleNamespace(encode=encode, decoder=decoder)
    make_grid = torchvision.utils.make_grid
    with mock.patch.object(torchvision.utils, "make_grid", wraps=make_grid) as made:
        plot(model, data, io.BytesIO())
    images = made.call_args.args[0].unflatten(0, (-1, made.call_args.kwargs["nrow"]))
    return 100 * images[1:, 1:, 0, 0, 0], images[1:, 0], images[0, 1:], first

# Rows share z = 0, 1, ..., 9, columns s = 0, 10, ..., 90.
Z_PLUS_S = torch.arange(100.0).view(10, 10).T

def test_rows_of_the_swap_grid_share_z_and_columns_share_s(data):
    """Left, orange, is the image that gave z; above, blue, the one that gave s."""
    white, left, top, first = grid(advvae.plot_swap, data)
    torch.testing.assert_close(white, Z_PLUS_S)
    red, blue = 0, 2
    assert torch.equal(left[:, red], first[:, 0])
    assert torch.equal(top[:, blue], first[:, 0])
    assert left[:, blue].sum() < left[:, red].sum()
    assert top[:, red].sum() < top[:, blue].sum()

def test_the_interpolation_goes_from_one_image_to_another(data):
    """To the right s changes, downward z, in equal steps."""
    white, left, top, _ = grid(advvae.plot_interpolation, data)
    torch.testing.assert_close(white, Z_PLUS_S)
    assert not left[1:-1].any() and not top[1:-1].any()

def test_rows_of_the_samples_share_a_z_from_the_prior(data):
    """Each row has another z, which no image gave; columns share the s of an image."""
    white, left, top, first = grid(advvae.plot_samples, data)
    z = white - Z_PLUS_S[:1]
    torch.testing.assert_close(z, z[:, :1].expand(10, 10), atol=1e-4, rtol=0)
    assert len(z[:, 0].unique()) == 10
    assert not left.any()
    assert torch.equal(top[:, 2], first[:, 0])

def test_pictures_are_the_same_whatever_the_users_style(data, nets, tmp_path):
    """A matplotlibrc may turn images upside down, or draw them in another size."""
    odd = {
        "image.origin": "lower",
        "savefig.bbox": "tight",
        "figure.facecolor": "black",
        "text.hinting": "force_autohint",
        "path.sketch": (5, 50, 5),
        "lines.linewidth": 9,
    }

    def draw():
        advvae.plot_swap(nets[0], data, tmp_path / "swap.png")
        digits = advvae.render(data.labels, data.factors)
        return (tmp_path / "swap.png").read_bytes(), digits

    picture, digits = draw()
    with matplotlib.rc_context(odd):
        picture_again, digits_again = draw()
    assert picture == picture_again
    assert torch.equal(digits, digits_again)

# ---- The README ---------------------------------------------------------------------

def test_inline_metadata_equals_requirements():
    """`uv run advvae.py` and `pip install -r requirements.txt` install the same."""
    dependencies = text_of("advvae.py").split("# ///")[1].split("dependencies")[1]
    assert re.findall(r'"([^"]+)"', dependencies) == text_of("requirements.txt").split()

def test_files_are_read_as_utf_8():
    """On Windows the README would otherwise be read in another encoding."""
    source = text_of("test_advvae.py")
    assert ".read_text" + "()" not in source
    assert "open" + "(" not in source

# ---- The README's exercises: python test_advvae.py exercise 4 -----------------------

def changed(source, diff):
    """source with a diff applied: each group of lines with - is replaced by those with +
    that follow it. The lines with - must stand in source exactly once."""
    for hunk in re.findall(r"(?m)(?:^-.*\n)+(?:^\+.*\n)*", diff):
        old = "".join(line[1:] for line in hunk.splitlines(True) if line[0] == "-")
        new = "".join(line[1:] for line in hunk.splitlines(True) if line[0] == "+")
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source

def exercise(number):
    """The README's exercise as steps: advvae.py as it is to be changed, and either the
    flags to run it with or the Python to run beside it."""
    text = re.split(r"\n##+ ", text_of("README.md").split(f"\n### {number}. ")[1])[0]
    source = text_of("advvae.py")
    steps = []
    for language, block in re.findall(r"```(diff|sh|python)\n(.*?)```", text, re.DOTALL):
        if language == "diff":
            source = changed(text_of("advvae.py"), block)
        elif language == "sh":
            for command in block.splitlines():
                steps.append((source, command.removeprefix("python advvae.py ").split(), ""))
        else:
            steps.append((source, [], block))
    return steps

def module_of(source):
    """The module that import advvae is to give from now on."""
    module = types.ModuleType("advvae")
    exec(source, vars(module))
    return module

def shorten(monkeypatch, module):
    """Data sets of 300 images and trainings of one epoch, pictures without a screen."""
    matplotlib.use("Agg")
    small_typeset(monkeypatch, module=module)
    train = module.train

    def briefly(config, *rest):
        return train(replace(config, epochs=1), *rest)

    monkeypatch.setattr(module, "train", briefly)

@pytest.mark.parametrize("number", range(1, 9))
def test_an_exercise_can_be_done(number, tmp_path, monkeypatch, download, capsys):
    """Its change fits advvae.py, and what it says to run, runs; without a network."""
    monkeypatch.chdir(tmp_path)
    for source, argv, python in exercise(number):
        module = module_of(source)
        monkeypatch.setitem(sys.modules, "advvae", module)
        shorten(monkeypatch, module)
        if argv:
            module.main(argv)
        else:
            exec(python, {})
    assert "nan" not in capsys.readouterr().out

def do_exercise(number, *more):
    """Do an exercise as the README says; more flags are for all of its commands. The
    changed file goes to exercise-<number>/, all else to where the commands put it."""
    folder = Path(f"exercise-{number}")
    folder.mkdir(exist_ok=True)
    for source, argv, python in exercise(number):
        (folder / "advvae.py").write_text(source, "utf-8")
        (folder / "exercise.py").write_text(python, "utf-8")
        script = ["advvae.py", *argv, *more] if argv else ["exercise.py"]
        subprocess.run([sys.executable, folder / script[0], *script[1:]], check=True)

# ---- The README's tables: python test_advvae.py adversary, ... terms ----------------

KL_WEIGHTS = (0.5, 1, 2, 4, 8, 16)
WITHOUT_3_AND_4 = {"adversary_weight": 0, "prior_weight": 0}

def measured(data, config, **weights):
    """evaluate's results after a training as config says, but with these weights."""
    model, _ = advvae.train(replace(config, **weights), data)
    return advvae.evaluate(model, data)

SLANT = "slant, slope on z's source"

def row(results):
    """The columns that the README's tables have, in one line."""
    percent = ["swaps that show s's class", "swaps that show z's class", "swaps that show neither"]
    percent += ["class from z", "prior samples of s's class"]
    numbers = [f"{100 * results[name]:.1f} %" for name in percent]
    numbers.append(f"{results['squared error of reconstructions']:.4f}")
    numbers.append(f"{results['Frechet distance, swaps']:.1f}")
    numbers.append(f"{results[SLANT]:.2f}")
    return " | ".join(numbers)

def settings_of(argv):
    """The data and a Config of six epochs, as flags of advvae.py say."""
    flags = advvae.command_line(argv)
    data = advvae.load_data(flags.dataset, flags.data_dir, advvae.pick_device(flags.device))
    return data, Config(epochs=flags.epochs or 6, seed=flags.seed, bfloat16=flags.bfloat16)

def adversary(*argv):
    """What the adversary is for: print a table, and draw figures/readme-curve.png."""
    data, config = settings_of(argv)
    lines = {"with the adversary (terms 3 and 4)": [], "without it": []}
    for kl_weight in KL_WEIGHTS:
        for (name, shares), weights in zip(lines.items(), ({}, WITHOUT_3_AND_4)):
            results = measured(data, config, kl_weight=kl_weight, **weights)
            shares.append(results["swaps that show s's class"])
            print(f"KL weight {kl_weight} {name} | {row(results)}", flush=True)
    draw_curve(lines, "figures/readme-curve.png")

@matplotlib.style.context("default")
def draw_curve(lines, path):
    """The share of swaps that obey s, by KL weight: a line for each of lines."""
    axes = matplotlib.figure.Figure(figsize=(6, 3.6), layout="constrained").subplots()
    axes.set_prop_cycle(color=["black", "gray"])  # blue and orange mean s and z
    for name, shares in lines.items():
        axes.plot(KL_WEIGHTS, [100 * share for share in shares], "o-", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(KL_WEIGHTS, [str(weight) for weight in KL_WEIGHTS])
    axes.set(xlabel="weight of the KL (default: 8)", ylim=(0, 102))
    axes.set(ylabel="swaps that show the digit of s, %")
    axes.legend()
    axes.figure.savefig(path, dpi=110)

TERMS_LEFT_OUT = {
    "all terms": {},
    "without term 2": {"swap_weight": 0},
    "without term 3": {"adversary_weight": 0},
    "without term 4": {"prior_weight": 0},
    "without terms 3 and 4": WITHOUT_3_AND_4,
}

def terms(*argv):
    """What each term does: print a table, at the default KL weight and at 1."""
    data, config = settings_of(argv)
    for kl_weight in (Config.kl_weight, 1):
        for name, weights in TERMS_LEFT_OUT.items():
            results = measured(data, config, kl_weight=kl_weight, **weights)
            print(f"KL weight {kl_weight} {name} | {row(results)}", flush=True)

def test_the_readmes_tables_can_be_made(tmp_path, monkeypatch, capsys):
    """A row for each training, and the curve."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "figures").mkdir()
    small_typeset(monkeypatch)
    here = sys.modules[__name__]
    monkeypatch.setattr(here, "KL_WEIGHTS", (1, 8))
    monkeypatch.setattr(here, "TERMS_LEFT_OUT", {"without term 3": {"adversary_weight": 0}})
    argv = ("--dataset", "typeset", "--epochs", "1")
    adversary(*argv)
    assert (tmp_path / "figures" / "readme-curve.png").exists()
    assert len(re.findall(r"(?m)^KL weight .* \| .* %", capsys.readouterr().out)) == 4
    terms(*argv)
    assert len(re.findall(r"(?m)^KL weight .* \| .* %", capsys.readouterr().out)) == 2

# ---- Solutions of two projects: python test_advvae.py project unseen ----------------
# Unseen: swap in classes that training never saw. Chance: bring class from z to chance.
# Stop here if you want to find solutions of your own.

# What eight upright faces have in common, one of each shape: "o" looks like "O" once
# both are equally tall.
CHARACTERS = (
    "0123456789ABCDEFGHJKLMNOPQRSTUVWXYZabdefghijklmnqrtuyÆØÞßæðþđħĸŁŊŋŒƀƈƐƒƕƛƪƫƭƺƾɐɑɒɓɔɕ"
    "ɖɗɘəɚɜɝɞɟɠɢɣɤɥɦɧɩɬɮɯɰɱɲɳɴɶɷɸɹɺɻɼɾɿʁʂʃʅʆʇʈʉʋʌʍʎʏʐʑʒʓʔʕʖʗʘʚʛʜʝʞʠʣʤʥʦʧʨΓΔΞΣΦΨΩαβγδζλμνξ"
    "πρςστφχωϘϚϛϝϞϟϠϡЂЉЊЋЏДЖЛУЦЧШЩЪЫЬЭЮЯвгдилмтфщъыюђљћѢѣҐ!#$%&()*+/:;<=>?@[\\]{}~¢£¤¥§©«¬"
    "®°±¶»¿×÷‟†‡‹›€∂"
)
UPRIGHT_FACES = [
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "STIXGeneral",
    "STIXGeneralBol",
]

@mock.patch.object(advvae, "FACES", UPRIGHT_FACES)
def unseen(*argv, counts=(10, 30, 100, 247), n=60_000):
    """Swap in characters that training never saw, after it saw 10 to 247 others.

    Judged by a classifier that knows 60 characters: the 20 that training doesn't see,
    and 40 others. Prints which share of swaps it recognizes and whether their slant is
    that of z's image, and draws the curve and a grid.
    """
    flags = advvae.command_line(argv)
    folder = Path("exercise-unseen")
    folder.mkdir(exist_ok=True)
    new = CHARACTERS[8::13]
    seen = [character for character in CHARACTERS if character not in new]
    known = new + "".join(seen[::6][:40])

    generator = seeded()
    torch.manual_seed(0)
    images, labels, _ = advvae.typeset(n, generator, known)
    judge = advvae.fit_judge(images, labels, epochs=10)
    x2, id2, _ = advvae.typeset(n // 6, generator, known)
    is_new = id2 < len(new)
    real = judge(x2).argmax(dim=1) == id2
    print(f"real images of new characters recognized: {real[is_new].float().mean():.1%}")

    shares = []
    for count in counts:
        # So many of the others, evenly spread.
        some = "".join(seen[i * len(seen) // count] for i in range(count))
        x, y, _ = advvae.typeset(n, generator, some)
        test_x, test_y, factors = advvae.typeset(n // 6, generator, some)
        data = Data(f"{count} characters", x, y, test_x, test_y)
        config = Config(
            epochs=flags.epochs or 10,
            s_dim=64,
            kl_weight=12,
            adversary_weight=30,
            prior_weight=15,
            bfloat16=flags.bfloat16,
        )
        model, _ = advvae.train(config, data)

        with torch.no_grad():
            _, mu, _ = model.encode(test_x)
            s2 = model.f_s(x2)
            swapped = model.decoder(mu, s2)
            right = judge(swapped).argmax(dim=1) == id2
        trained = torch.tensor([character in some for character in known])[id2]
        share = right[is_new].float().mean().item()
        shares.append(share)
        old = right[trained].float().mean().item()
        print(f"{count} characters: {share:.1%} of the new, {old:.1%} of those trained on")

        # A model that copies the image of s would do well so far. But swaps are to lean
        # as the image of z does.
        slants = torch.stack([advvae.slant(swapped), factors["slant"]])
        r = torch.corrcoef(slants[:, is_new])[0, 1]
        print(f"slant of swaps to the new, and of the image that gave z: r {r:.2f}")

        # Ten of the new characters, in the style of ten images.
        first = [(id2 == c).nonzero()[0].item() for c in id2[is_new].unique()[:10]]
        title = f"new characters, after {count} others"
        advvae.save_grid(
            folder / f"{count}.png", title, model, mu[:10], s2[first], test_x[:10], x2[first]
        )
    draw_unseen(counts, shares, folder / "curve.png")

@matplotlib.style.context("default")
def draw_unseen(counts, shares, path):
    """The share of new characters that are recognized, by the number of those seen."""
    axes = matplotlib.figure.Figure(figsize=(6, 3.6), layout="constrained").subplots()
    axes.plot(counts, [100 * share for share in shares], "o-")
    axes.set_xscale("log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set(xlabel="characters seen in training", ylabel="new ones recognized, %", ylim=(0, 100))
    axes.figure.savefig(path, dpi=110)

def test_the_unseen_characters_are_of_different_shapes():
    """All are in all of the faces, and no two look alike once they are equally tall."""
    for face in UPRIGHT_FACES:
        path = f"{matplotlib.get_data_path()}/fonts/ttf/{face}.ttf"
        known = set(matplotlib.font_manager.get_font(path).get_charmap())
        assert set(map(ord, CHARACTERS)) <= known, face

    n = len(CHARACTERS)
    assert n == 267
    plain = {"slant": 0, "size": 20, "pen": 0, "shift_x": 0, "shift_y": 0}
    factors = {name: torch.full((n,), float(value)) for name, value in plain.items()}
    factors["font"] = torch.zeros(n, dtype=torch.long)
    with mock.patch.object(advvae, "FACES", ["DejaVuSerif"]):
        ink = advvae.render(torch.arange(n), factors, CHARACTERS).flatten(1)
    assert torch.pdist(ink).square().min() > 0.05 * ink.square().sum(dim=1).median()

def test_the_project_of_unseen_classes_can_be_done(tmp_path, monkeypatch, capsys):
    """At a small size."""
    monkeypatch.chdir(tmp_path)
    unseen("--epochs", "1", counts=(10, 30), n=600)
    assert len(re.findall(r"% of the new", capsys.readouterr().out)) == 2
    names = {path.name for path in (tmp_path / "exercise-unseen").iterdir()}
    assert names == {"10.png", "30.png", "curve.png"}

# z at chance. A classifier reads z, and f_z writes against it. Trained by gradients
# alone it would be outrun: f_z moves the class to where it doesn't look yet. So part of
# it is fitted in closed form, anew in every step.
Z_AT_CHANCE = '''
-            yield x1, x1_same, x2, id2
+            yield x1, x1_same, x2, id2, self.labels[i1]

-# ---- 4. Training: one step, and the loop --------------------------------------------
+class Reader(nn.Module):
+    """What does z tell of the class, in nats? Logits are log densities of one Gaussian
+    per class, fitted to the last 5,000 images or so, plus a linear function of random
+    waves of z, which is trained like the adversary."""
+
+    def __init__(self, n_classes, z_dim):
+        super().__init__()
+        empty = 1e-3 * torch.eye(1 + z_dim)
+        self.register_buffer("sums", empty.repeat(n_classes, 1, 1))
+        self.register_buffer("frequencies", 0.7 * torch.randn(z_dim, 2048))
+        self.register_buffer("phases", 2 * math.pi * torch.rand(2048))
+        self.of_waves = nn.Linear(2048, n_classes)
+
+    def fit(self, mu, logvar, class_id):
+        # With a = (1, mu), the sums of a a^T hold the count, the sum of mu, of mu mu^T.
+        a = F.pad(mu, (1, 0), value=1.0)
+        outer = a.unsqueeze(2) * a.unsqueeze(1)
+        noise = F.pad(logvar.exp(), (1, 0)).diag_embed()
+        self.sums.mul_(0.95)  # what was counted before fades
+        self.sums.index_add_(0, class_id, outer + noise)
+
+    @torch.autocast("cpu", enabled=False)  # Gaussians need all of float32's digits
+    def forward(self, z, class_id):
+        moments = self.sums / self.sums[:, :1, :1]
+        mean = moments[:, 0, 1:]  # (n_classes, z_dim)
+        outer = mean.unsqueeze(2) * mean.unsqueeze(1)
+        covariance = moments[:, 1:, 1:] - outer
+        gaussians = torch.distributions.MultivariateNormal(mean, covariance)
+        waves = torch.cos(z @ self.frequencies + self.phases)
+        logits = gaussians.log_prob(z.unsqueeze(1)) + self.of_waves(0.15 * waves)
+        return math.log(logits.shape[1]) - F.cross_entropy(logits, class_id)
+
+# ---- 4. Training: one step, and the loop --------------------------------------------

-    x1, x1_same, x2, id2 = triple
+    x1, x1_same, x2, id2, id1 = triple

-    prior = prior_term(verdict_sampled)
+    prior = prior_term(verdict_sampled)
+    adversary.reader.fit(mu.detach(), logvar.detach(), id1)
+    leak = adversary.reader(z1, id1)  # a fifth term: the encoders lower it

-        + config.prior_weight * prior
+        + config.prior_weight * prior
+        + adversary.leak_weight * leak

-    adversary_optimizer.zero_grad()
+    loss_of_adversary = loss_of_adversary - adversary.reader(z1.detach(), id1)
+    adversary_optimizer.zero_grad()

-    adversary = Adversary(int(data.labels.max()) + 1).to(device)
+    adversary = Adversary(int(data.labels.max()) + 1)
+    adversary.reader = Reader(int(data.labels.max()) + 1, config.z_dim)
+    adversary.to(device)

-            optimizer.param_groups[0]["lr"] = rate
+            optimizer.param_groups[0]["lr"] = rate
+            # At full weight from the beginning, z would stay shut.
+            adversary.leak_weight = 150 * min(1, 2 * epochs_done / config.epochs)
'''

def chance(*argv):
    """Train with the fifth term, by the flags that go with it."""
    module = module_of(changed(text_of("advvae.py"), Z_AT_CHANCE))
    weights = ["--kl-weight", "6", "--adversary-weight", "30", "--prior-weight", "15"]
    files = ["--checkpoint", "chance.pt", "--figures-dir", "exercise-chance"]
    module.main(["--z-dim", "10", *weights, *files, *argv])

    data, _ = settings_of(argv)
    other_tellers(module.load_checkpoint("chance.pt"), data)

def other_tellers(model, data):
    """What tells the class even where draws of z don't? The logvar of q(z | x, s). And
    slant and thickness of the images alone, which a z that keeps them has to tell."""
    with torch.no_grad():
        _, _, logvar = model.encode(data.images)
        _, _, test_logvar = model.encode(data.test_images)

    def style(images):
        return torch.stack([advvae.slant(images), advvae.stroke_thickness(images)], dim=1)

    torch.manual_seed(0)
    labels, test_labels = data.labels, data.test_labels
    print(advvae.class_in("logvar", logvar, labels, test_logvar, test_labels))
    measured = style(data.images), labels, style(data.test_images), test_labels
    print(advvae.class_in("slant and thickness", *measured))

def test_the_project_of_a_z_at_chance_can_be_done(tmp_path, monkeypatch, capsys):
    """At a small size: the change fits advvae.py, and what results trains."""
    monkeypatch.chdir(tmp_path)
    small_typeset(monkeypatch)
    load = module_of

    def small_module(source):
        module = load(source)
        small_typeset(monkeypatch, module=module)
        return module

    monkeypatch.setattr(sys.modules[__name__], "module_of", small_module)
    chance("--dataset", "typeset", "--epochs", "1")
    said = capsys.readouterr().out
    assert "nan" not in said
    for name in ("z", "logvar", "slant and thickness"):
        assert f"class from {name}" in said

def project(name, *argv):
    """Do one of the two projects, unseen or chance; more flags are advvae.py's."""
    {"unseen": unseen, "chance": chance}[name](*argv)

COMMANDS = {
    "exercise": do_exercise,
    "adversary": adversary,
    "terms": terms,
    "project": project,
}

if __name__ == "__main__":
    COMMANDS[sys.argv[1]](*sys.argv[2:])
