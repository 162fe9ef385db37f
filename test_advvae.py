"""The facts of the method, one a test: python -m pytest -q. No network, no MNIST, nothing timed.

Run as a script, python test_advvae.py, this file is the benchmark instead; with a word behind it one of the
longer measurements that the README reports: departures, probe, classes, picture, exercise, endurance.
"""

import contextlib
import copy
import gzip
import io
import math
import os
import random
import re
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import types
from dataclasses import replace
from pathlib import Path
from unittest import mock

import matplotlib.figure
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Bernoulli, Normal, kl_divergence
from torch.utils.flop_counter import FlopCounterMode
from torchvision.utils import save_image

import advvae
from advvae import TERMS, AdvVAE, Adversary, Config, Data, TripleSampler

HERE = Path(__file__).parent
pytestmark = pytest.mark.filterwarnings("error")
EVERY_TERM = Config(leak_weight=1.0)  # the extension, too


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def correlation(a, b):
    return torch.corrcoef(torch.stack([a, b]))[0, 1]


def digits(n, test=200, seed=0):
    """A small typeset Data."""
    generator = seeded(seed)
    images, labels, factors = advvae.typeset(n, generator)
    test_images, test_labels, test_factors = advvae.typeset(test, generator)
    return Data("typeset", images, labels, test_images, test_labels, factors, test_factors)


@pytest.fixture(scope="module")
def data():
    return digits(600)


def new_nets(layout=torch.contiguous_format, device="cpu"):
    """The same untrained networks each time; the adversary with the extension's classifier."""
    torch.manual_seed(0)
    model, adversary = AdvVAE(), Adversary(10)
    adversary.of_z = advvae.ZClassifier(10, model.z_dim)
    return (net.to(device, memory_format=layout) for net in (model, adversary))


@pytest.fixture
def nets():
    return tuple(new_nets())


@pytest.fixture
def triple(data):
    return next(iter(TripleSampler(data.images, data.labels, 32, seeded())))


def optimizers(model, adversary, rate=1e-3, adversary_rate=1e-3):
    return torch.optim.Adam(model.parameters(), rate), torch.optim.Adam(adversary.parameters(), adversary_rate)


def copied(net):
    return {name: value.clone() for name, value in net.named_parameters()}


def moved(net, before):
    return {name for name, value in net.named_parameters() if not torch.equal(value, before[name])}


# 1. Networks


def test_codes_and_images_have_their_shapes_and_ranges(nets, data):
    """encode gives s, mu and logvar; decode gives pixels in [0, 1]; sizes of the codes are free."""
    model = AdvVAE(s_dim=3, z_dim=5)
    s, mu, logvar = model.encode(data.images[:7])
    assert s.shape == (7, 3) and mu.shape == logvar.shape == (7, 5)
    x = model.decode(100 * mu, 100 * s)
    assert x.shape == (7, 1, 28, 28) and 0 <= x.min() and x.max() <= 1
    assert nets[1](data.images[:7], data.labels[:7]).shape == (7,)


def test_f_z_sees_s(nets, data):
    """The same image with another s has another q(z | x, s): f_z is given both, as in Figure 1."""
    f_z, x = nets[0].f_z, data.images[:4]
    s = torch.randn(4, 16, generator=seeded())
    for one, other in zip(f_z(x, s), f_z(x, s.flip(0))):
        assert not torch.allclose(one, other)


def test_reparameterize_draws_from_q():
    """z has mean mu and standard deviation exp(logvar/2), and the same generator draws the same z."""
    mu, logvar = torch.full((50_000, 2), 3.0), torch.tensor([0.0, -2.0]).expand(50_000, 2)
    z = AdvVAE().reparameterize(mu, logvar, seeded())
    assert torch.allclose(z.mean(0), torch.tensor([3.0, 3.0]), atol=0.02)
    assert torch.allclose(z.std(0), torch.exp(torch.tensor([0.0, -1.0])), rtol=0.02)
    assert torch.equal(z, AdvVAE().reparameterize(mu, logvar, seeded()))


def test_gradients_pass_the_draw():
    """That of z by mu is 1, that by logvar half of z - mu."""
    mu, logvar = torch.zeros(5, 2, requires_grad=True), torch.ones(5, 2, requires_grad=True)
    z = AdvVAE().reparameterize(mu, logvar, seeded())
    z.sum().backward()
    torch.testing.assert_close(mu.grad, torch.ones(5, 2))
    torch.testing.assert_close(logvar.grad, (z / 2).detach())


def test_the_adversary_is_conditional(nets, data):
    """One image, two class ids: two verdicts, and how far apart they are depends on the image."""
    x, adversary = data.images[:8], nets[1].eval()
    one, other = (adversary(x, torch.full((8,), id)) for id in (0, 1))
    assert (one - other).abs().min() > 1e-6 and (one - other).std() > 1e-4


def test_the_adversary_is_lipschitz(nets):
    """Every layer's largest singular value is about 1, however large its weights were."""
    adversary = nets[1].train()
    with torch.no_grad():
        for name, p in adversary.named_parameters():
            if name.endswith("original"):
                p.mul_(50)
        for _ in range(30):  # the power iteration runs at each call in train mode
            adversary(torch.rand(4, 1, 28, 28, generator=seeded()), torch.arange(4))
        layers = [m for m in adversary.modules() if hasattr(m, "parametrizations")]
        assert len(layers) == 4
        for layer in layers:
            assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2) < 1.2


# 2. Triples and data


def numbered(labels):
    """Images that carry their own index, to see which were drawn."""
    index = torch.arange(len(labels)).float()
    return index.view(-1, 1, 1, 1).expand(-1, 1, 28, 28), torch.as_tensor(labels)


def drawn(sampler):
    """One epoch as index tensors i1, i1_same, i2 and the labels id2 and id1."""
    batches = [(*(x[:, 0, 0, 0].long() for x in batch[:3]), *batch[3:]) for batch in sampler]
    return [torch.cat(column) for column in zip(*batches)]


def test_every_image_is_x1_once_an_epoch():
    """The last, smaller batch included; and in another order in the next epoch."""
    images, labels = numbered([0, 1, 2] * 11)
    sampler = TripleSampler(images, labels, 8, seeded())
    assert [len(batch[0]) for batch in sampler] == [8, 8, 8, 8, 1] and len(sampler) == 5
    first, second = drawn(sampler)[0], drawn(sampler)[0]
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(33))
    assert not torch.equal(first, second)


def test_x1_same_is_uniform_over_x1s_class():
    """Classes of any sizes, one image included, with labels that are any integers in any order."""
    images, labels = numbered([7] * 5 + [-3] * 20 + [1000] + [7] * 5)
    sampler = TripleSampler(images, labels, 10, seeded())
    epochs = [drawn(sampler) for _ in range(400)]
    i1, same, _, _, id1 = (torch.cat(column) for column in zip(*epochs))
    assert torch.equal(labels[i1], labels[same]) and torch.equal(labels[i1], id1)
    for label, size in ((7, 10), (-3, 20), (1000, 1)):
        counts = same[labels[i1] == label].bincount(minlength=len(labels))[labels == label]
        expected = 400.0  # size images, each 400 times x1, spread over size images
        assert len(counts) == size and (counts - expected).abs().max() < 5 * expected**0.5


def test_x2_is_uniform_and_independent_of_x1():
    """x2 is any image, with its own label as id2; it has x1's class no more often than by chance."""
    images, labels = numbered([0] * 30 + [1] * 10)
    epochs = [drawn(TripleSampler(images, labels, 16, seeded(k))) for k in range(300)]
    i1, _, i2, id2, _ = (torch.cat(column) for column in zip(*epochs))
    assert torch.equal(labels[i2], id2)
    assert (i2.bincount(minlength=40) - 300.0).abs().max() < 5 * 300**0.5
    assert abs((labels[i1] == id2).float().mean() - (0.75**2 + 0.25**2)) < 0.02


def test_typeset_repeats():
    """Same seed, same digits; another seed, others; and render gives them back from their factors."""
    images, labels, factors = advvae.typeset(50, seeded(1))
    assert images.shape == (50, 1, 28, 28) and 0 <= images.min() and images.max() <= 1
    assert torch.equal(images, advvae.typeset(50, seeded(1))[0])
    assert not torch.equal(images, advvae.typeset(50, seeded(2))[0])
    assert torch.equal(images, advvae.render(labels, factors))


def test_typesets_factors_move_what_they_name(data):
    """Slant and thickness agree with the measured ones; size and shift with the ink's extent and centre."""
    x, f = data.images, data.factors
    assert correlation(advvae.slant(x), f["slant"]) > 0.95
    assert correlation(advvae.stroke_thickness(x), f["thickness"]) > 0.9
    assert (advvae.stroke_thickness(x) - f["thickness"]).abs().mean() < 0.4  # pixels

    def centre(images):
        ink, place = images[:, 0] / images.sum(dim=(1, 2, 3)).view(-1, 1, 1), torch.arange(28.0)
        return torch.stack([ink.sum(1) @ place, ink.sum(2) @ place])

    for name, way in (("shift_x", (1.0, 0.0)), ("shift_y", (0.0, 1.0))):
        pixel_on = advvae.render(data.labels, f | {name: f[name] + 1})
        assert torch.allclose((centre(pixel_on) - centre(x)).mean(1), torch.tensor(way), atol=0.02)
    height = (x.amax(dim=(1, 3)) > 0.5).sum(1)
    assert correlation(height.float(), f["size"]) > 0.75
    assert (height - f["size"]).abs().mean() < 1.5  # thick strokes stick out
    one = {name: values[:1] for name, values in f.items()}
    drawn_at = [advvae.render(data.labels[:1], one | {"slant": torch.tensor([v])}) for v in (-0.4, 0.0, 0.4)]
    slants = [advvae.slant(image) for image in drawn_at]
    assert slants[1] - slants[0] > 0.3 and slants[2] - slants[1] > 0.3


def test_typesets_factors_say_nothing_of_the_class(data):
    """No factor differs between the digits, so a z that holds the factors alone is at chance."""
    images, labels, factors = advvae.typeset(5000, seeded(3))
    for name, values in factors.items():
        means = torch.stack([values[labels == c].float().mean() for c in range(10)])
        assert means.std() < 0.1 * values.float().std(), name


def idx_bytes(array):
    header = struct.pack(f">BBBB{array.dim()}I", 0, 0, 8, array.dim(), *array.shape)
    return header + bytes(array.flatten().int().tolist())


def write_mnist(folder, n=30, labels=None, size=28):
    """n random images as MNIST's four files under folder."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    labels = torch.arange(n) % 3 if labels is None else torch.tensor(labels)
    for part in ("train", "t10k"):
        images = torch.randint(256, (n, size, size), generator=seeded())
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return raw


def test_idx_files_are_read(tmp_path):
    """Files in MNIST's format, with classes that needn't be 0, 1, ...: ids count them from 0, in order."""
    write_mnist(tmp_path, labels=[3, 9, 5] * 10)
    mnist = advvae.load_data("mnist", tmp_path)
    assert mnist.images.shape == (30, 1, 28, 28) and mnist.images.max() <= 1 < 255 * mnist.images.max()
    assert mnist.labels[:3].tolist() == [0, 2, 1] and mnist.factors is None


@pytest.fixture
def no_network(monkeypatch):
    def refuse(self):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr("torchvision.datasets.MNIST.download", refuse)


def test_auto_is_typeset_where_there_is_no_mnist(tmp_path, no_network, monkeypatch, capsys):
    """Said loudly, with what to do; and MNIST once its files are there."""
    small_typeset(monkeypatch)
    assert advvae.load_data("auto", tmp_path / "none").name == "typeset"
    said = capsys.readouterr().out
    assert "NOT MNIST" in said and "train-images-idx3-ubyte" in said and "!!!!!" in said
    write_mnist(tmp_path)
    assert advvae.load_data("auto", tmp_path).name == "mnist"
    assert capsys.readouterr().out == ""


def test_a_download_times_out_and_the_timeout_ends_with_it(tmp_path, monkeypatch):
    """20 seconds for each answer; before and after, what the caller has set."""
    timeouts = []

    def download(self):
        timeouts.append(socket.getdefaulttimeout())
        raise RuntimeError("no network")

    monkeypatch.setattr("torchvision.datasets.MNIST.download", download)
    socket.setdefaulttimeout(7)
    try:
        with pytest.raises(advvae.UserError):
            advvae.load_data("mnist", tmp_path)
        assert timeouts == [20] and socket.getdefaulttimeout() == 7
    finally:
        socket.setdefaulttimeout(None)


# 3. The four terms


def test_terms_agree_with_torch_distributions():
    """1 and 2 are Gaussian on pixels in [-1, 1], up to a constant; the KL is of two normals; 3, 4 are -log p(real)."""
    x, decoded = (torch.rand(6, 1, 28, 28, generator=seeded(k)) for k in (0, 1))
    log_p = Normal(2 * decoded - 1, 0.5**0.5).log_prob(2 * x - 1) - Normal(0.0, 0.5**0.5).log_prob(torch.tensor(0.0))
    torch.testing.assert_close(advvae.reconstruction_term(x, decoded), -log_p.sum(dim=(1, 2, 3)).mean())
    torch.testing.assert_close(advvae.swap_term(x, decoded), -log_p.sum(dim=(1, 2, 3)).mean())
    mu, logvar = torch.randn(6, 4, generator=seeded(2)), torch.randn(6, 4, generator=seeded(3))
    kl = kl_divergence(Normal(mu, torch.exp(logvar / 2)), Normal(0.0, 1.0)).sum(dim=1).mean()
    torch.testing.assert_close(advvae.kl_term(mu, logvar), kl)
    assert advvae.kl_term(torch.zeros(3, 4), torch.zeros(3, 4)) == 0
    verdicts, fakes = torch.randn(6, generator=seeded(4)), torch.randn(12, generator=seeded(5))
    passes = -Bernoulli(logits=verdicts).log_prob(torch.ones(6)).mean()
    torch.testing.assert_close(advvae.adversary_term(verdicts), passes)
    torch.testing.assert_close(advvae.prior_term(verdicts), passes)
    torch.testing.assert_close(
        advvae.adversary_loss(verdicts, fakes), passes - Bernoulli(logits=fakes).log_prob(torch.zeros(12)).mean()
    )


def test_terms_are_in_nats_per_image(nets, triple):
    """A batch twice as long, of the same images twice, has the same terms: sums over pixels, means over images."""
    config, model, adversary = Config(), *nets
    model.reparameterize = lambda mu, logvar, generator: mu
    once = advvae.four_terms(model, adversary.eval(), triple, config, seeded())[0]
    twice = advvae.four_terms(model, adversary, [torch.cat([t, t]) for t in triple], config, seeded())[0]
    for name in ("reconstruction", "kl", "swap", "adversary"):
        torch.testing.assert_close(once[name], twice[name], rtol=1e-4, atol=1e-5)
    gray = (2 * triple[0] - 1).square().sum() / 32  # an untrained decoder says about 0.5 everywhere
    torch.testing.assert_close(once["reconstruction"], gray, rtol=0.1, atol=0)


REACH = {  # term: the networks and the images of the triple that its gradient reaches
    "reconstruction": ({"f_s", "f_z", "decoder"}, {"x1"}),
    "kl": ({"f_s", "f_z"}, {"x1"}),
    "swap": ({"f_s", "f_z", "decoder"}, {"x1", "x1_same"}),
    "adversary": ({"f_s", "f_z", "decoder"}, {"x1", "x2"}),
    "prior": ({"f_s", "decoder"}, {"x2"}),
    "leak": ({"f_s", "f_z"}, {"x1"}),
}


@pytest.mark.parametrize("name", TERMS)
def test_each_term_reaches_its_parameters_and_no_others(name, nets, triple):
    """Term 2 reaches f_s through x1_same; term 3 reaches z1 and s2; term 4 can't reach f_z; and so on."""
    model, adversary = nets
    images = {key: x.clone().requires_grad_() for key, x in zip(("x1", "x1_same", "x2"), triple)}
    adversary.eval().requires_grad_(False)
    terms, *_ = advvae.four_terms(model, adversary, (*images.values(), *triple[3:]), EVERY_TERM, seeded())
    terms[name].backward()
    networks, reached_images = REACH[name]
    reached = {key for key, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert reached == {key for key, _ in model.named_parameters() if key.split(".")[0] in networks}
    assert {key for key, x in images.items() if x.grad is not None and x.grad.abs().max() > 0} == reached_images
    assert all(p.grad is None for p in adversary.parameters())


def test_terms_are_of_the_codes_that_figure_1_says(nets, triple):
    """Each term computed here by hand from encode, decode and Adv: z1 and z drawn in that order."""
    model, adversary = nets
    x1, x1_same, x2, id2, id1 = triple
    of_z = copy.deepcopy(adversary.of_z)
    terms, fakes, _ = advvae.four_terms(model, adversary.eval(), triple, EVERY_TERM, seeded(5))
    generator = seeded(5)
    s1, mu, logvar = model.encode(x1)
    s1_same, s2 = model.f_s(x1_same), model.f_s(x2)
    z1 = model.reparameterize(mu, logvar, generator)
    z = torch.randn(z1.shape, generator=generator)
    nll = lambda x: 4 * (x1 - x).square().sum(dim=(1, 2, 3)).mean()  # noqa: E731
    by_hand = {
        "reconstruction": nll(model.decode(z1, s1)),
        "kl": advvae.kl_term(mu, logvar),
        "swap": nll(model.decode(z1, s1_same)),
        "adversary": -adversary(model.decode(z1, s2), id2).sigmoid().log().mean(),
        "prior": -adversary(model.decode(z, s2), id2).sigmoid().log().mean(),
    }
    of_z.fit(mu, logvar, id1)
    by_hand["leak"] = advvae.leak_term(logits(of_z, z1), id1)
    for name, value in by_hand.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(fakes, torch.cat([model.decode(z1, s2), model.decode(z, s2)]))


# 4. Training


def test_the_generators_step_leaves_the_adversary_alone(nets, triple):
    """With the adversary's rate at 0, the step moves all of f_s, f_z and decoder, and no weight of it."""
    model, adversary = nets
    before, adversary_before = copied(model), copied(adversary)
    buffers = {name: b.clone() for name, b in adversary.named_buffers()}
    advvae.train_step(model, adversary, *optimizers(model, adversary, adversary_rate=0), triple, Config(), seeded())
    assert moved(model, before) == set(before)
    assert moved(adversary, adversary_before) == set()
    assert any(not torch.equal(b, buffers[name]) for name, b in adversary.named_buffers())  # its power iterations


def test_the_adversarys_step_reaches_only_the_adversary(nets, triple):
    """With the others' rate at 0, the step moves the adversary, whose loss falls, and nothing else."""
    model, adversary = nets
    before, adversary_before = copied(model), copied(adversary)
    both = optimizers(model, adversary, rate=0)
    losses = []
    for _ in range(30):
        losses.append(advvae.train_step(model, adversary, *both, triple, EVERY_TERM, seeded())["adversary_loss"])
    assert moved(model, before) == set()
    assert moved(adversary, adversary_before) == set(adversary_before)
    assert losses[-1] < 0.7 * losses[0]


def test_the_adversary_sees_the_real_x2_and_both_fakes(nets, triple):
    """Its own batch is x2 and the fakes of terms 3 and 4, each of them with id2; only then can it learn."""
    model, adversary = nets
    seen = []

    def look(net, inputs, output):
        seen.append((net.training or any(p.requires_grad for p in net.parameters()), *inputs, output))

    adversary.register_forward_hook(look)
    measures = advvae.train_step(model, adversary, *optimizers(model, adversary), triple, Config(), seeded())
    (judging_learns, fakes, _, _), (learning, x, ids, verdicts) = seen
    assert not judging_learns and learning
    assert torch.equal(x, torch.cat([triple[2], fakes])) and not x.requires_grad
    assert torch.equal(ids, triple[3].repeat(3))
    real, fake = verdicts.split([32, 64])
    torch.testing.assert_close(measures["adversary_loss"], advvae.adversary_loss(real, fake))
    assert measures["right_on_real"] == (real > 0).float().mean()
    assert measures["right_on_fakes"] == (fake < 0).float().mean()


@pytest.mark.parametrize("name", TERMS)
def test_a_weight_of_0_removes_its_term(name, nets, triple):
    """Neither reported nor computed: f_s, decoder and adversary have less to do. The random numbers stay."""
    model, adversary = nets
    sizes = {}
    for key, net in {"f_s": model.f_s, "decoder": model.decoder, "adversary": adversary}.items():
        net.register_forward_hook(lambda net, inputs, output, key=key: sizes.update({key: len(output)}))
    config = replace(EVERY_TERM, **{f"{name}_weight": 0.0})
    whole, part = seeded(), seeded()
    advvae.four_terms(model, copy.deepcopy(adversary), triple, EVERY_TERM, whole)
    terms, *_ = advvae.four_terms(model, adversary, triple, config, part)
    assert set(terms) == set(TERMS) - {name} and torch.equal(whole.get_state(), part.get_state())
    assert sizes["f_s"] == 32 * (3 - (name == "swap"))
    assert sizes["decoder"] == 32 * (4 - (name not in ("kl", "leak")))
    assert sizes["adversary"] == 32 * (2 - (name in ("adversary", "prior")))
    measures = advvae.train_step(model, adversary, *optimizers(model, adversary), triple, config, seeded())
    assert name not in measures


def test_without_terms_3_and_4_there_is_no_adversary(nets, triple):
    """Both weights 0: x2 isn't encoded, and the adversary is neither asked nor trained."""
    model, adversary = nets
    adversary.register_forward_hook(lambda *_: pytest.fail("the adversary was asked"))
    model.f_s.register_forward_hook(lambda net, inputs, s: sizes.append(len(s)))
    config, sizes = Config(adversary_weight=0.0, prior_weight=0.0), []
    measures = advvae.train_step(model, adversary, *optimizers(model, adversary), triple, config, seeded())
    assert set(measures) == {"reconstruction", "kl", "swap"} and sizes == [64]
    history = advvae.train(replace(config, epochs=1), digits(100)).history
    assert set(history[0]) == {"reconstruction", "kl", "swap"}


def test_weights_scale_their_terms(nets, triple):
    """The step descends the sum of weight times term: its gradient is the weighted sum of the terms' own."""
    model, adversary = nets
    weights = dict(zip([f"{name}_weight" for name in TERMS], (0.3, 2.0, 0.7, 5.0, 4.0, 6.0)))
    config = Config(**weights, bfloat16=0)
    adversary.eval().requires_grad_(False)
    terms, *_ = advvae.four_terms(model, copy.deepcopy(adversary), triple, config, seeded())
    for p in [*model.parameters(), *adversary.parameters()]:
        p.grad = torch.full_like(p, 1e6)  # left by an earlier step
    parameter = model.f_s[-1].weight
    wanted = sum(config.weights[k] * torch.autograd.grad(t, parameter, retain_graph=True)[0] for k, t in terms.items())
    advvae.train_step(model, adversary, *optimizers(model, adversary), triple, config, seeded())
    torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-5)
    assert all(p.grad.abs().max() < 1e5 for p in adversary.parameters())


def test_the_fast_path_has_the_plain_paths_losses(triple):
    """Same seed, first step: channels_last agrees with the plain layout to 1e-4, bfloat16 with float32 to 2 %."""

    def first_losses(layout, bfloat16):
        model, adversary = new_nets(layout)
        both = optimizers(model, adversary)
        measures = advvae.train_step(model, adversary, *both, triple, Config(bfloat16=bfloat16), seeded())
        assert all(value.dtype == torch.float32 for value in measures.values())
        return {name: value for name, value in measures.items() if "right" not in name}

    plain = first_losses(torch.contiguous_format, 0)
    torch.testing.assert_close(first_losses(torch.channels_last, 0), plain, rtol=1e-4, atol=1e-5)
    fast = first_losses(torch.channels_last, 1)
    torch.testing.assert_close(fast, plain, rtol=0.02, atol=1e-3)
    assert fast != plain


def test_same_seed_same_weights(data):
    """Two runs with one seed end bit-equal, history and all; another seed ends elsewhere."""
    a, b, c = (advvae.train(Config(epochs=1, seed=seed, batch_size=100), data) for seed in (0, 0, 1))
    assert a.history == b.history
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))
    assert not any(torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters()))


def test_what_changes_from_step_to_step(data, monkeypatch):
    """The learning rate of both optimizers is constant for half of the steps, then falls linearly to 0; the weight
    of the extension rises linearly for half of them, then is constant. The history has each epoch's means."""
    rates, leak_weights = [], []

    def spy(model, adversary, optimizer, adversary_optimizer, triple, config, generator):
        for o in (optimizer, adversary_optimizer):
            o.step()
        rates.append([o.param_groups[0]["lr"] for o in (optimizer, adversary_optimizer)])
        leak_weights.append(config.leak_weight)
        return {"kl": torch.tensor(float(len(rates)))}

    monkeypatch.setattr(advvae, "train_step", spy)
    config = Config(epochs=4, batch_size=60, learning_rate=1.0, leak_weight=60.0)
    history = advvae.train(config, data).history
    assert leak_weights == pytest.approx([60 * min(1, 2 * (step + 0.5) / 40) for step in range(40)])
    assert [means["kl"] for means in history] == pytest.approx([5.5, 15.5, 25.5, 35.5])
    wanted = [min(1, 2 * (1 - (step + 0.5) / 40)) for step in range(40)]
    assert all(pair == pytest.approx([want] * 2) for pair, want in zip(rates, wanted, strict=True))


def test_a_checkpoint_gives_the_model_back(data, tmp_path):
    """load_checkpoint: same codes, same decodings, eval mode, by weights_only loading; sizes from its config."""
    path = tmp_path / "a.pt"
    model = advvae.train(Config(epochs=1, s_dim=3, z_dim=4), data, path)
    loaded = advvae.load_checkpoint(path)
    assert not loaded.training and (loaded.dataset, loaded.history) == (model.dataset, model.history)
    for one, other in zip(model.encode(data.test_images), loaded.encode(data.test_images)):
        assert torch.equal(one, other)
    saved = torch.load(path, weights_only=True)
    assert saved["history"] == model.history and saved["config"]["s_dim"] == 3 and saved["dataset"] == "typeset"
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_a_checkpoint_is_whole_or_the_old_one(data, tmp_path, monkeypatch):
    """When writing breaks off half-way, the file under the checkpoint's name is still the old one."""
    path = tmp_path / "a.pt"
    advvae.train(Config(epochs=0), data, path)
    old = path.read_bytes()

    def break_off(saved, file):
        file.write(old[: len(old) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", break_off)
    with pytest.raises(OSError):
        advvae.train(Config(epochs=1), data, path)
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_a_full_disk_is_said_in_one_line(tmp_path, monkeypatch, capsys):
    """Whatever could not be written: exit code 2, no traceback."""
    small_typeset(monkeypatch)
    for place in ("train", "draw_figures"):
        with monkeypatch.context() as patch:
            patch.setattr(advvae, place, mock.Mock(side_effect=OSError(28, "No space left on device", "a.pt")))
            assert "No space left" in refused(capsys, command(tmp_path, "--epochs", "0"))


def weights_of(path):
    return torch.load(path, weights_only=True)["model"]


def same_weights(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, monkeypatch, capsys):
    """Interrupted in any epoch but the first and resumed, it ends with the very same weights and table."""
    small_typeset(monkeypatch)
    settings = ["--epochs", "4", "--batch-size", "100", "--z-dim", "5", "--leak-weight", "60"]
    advvae.main(command(tmp_path / "whole", *settings))
    table = capsys.readouterr().out.split("What z and s know")[1].split("Pictures")[0]
    for steps in (3, 7, 11):  # each epoch has 3
        folder = tmp_path / str(steps)
        with monkeypatch.context() as patch:
            patch.setattr(advvae, "train_step", interrupted_after(steps))
            advvae.main(command(folder, *settings))
        assert not same_weights(weights_of(folder / "a.pt"), weights_of(tmp_path / "whole" / "a.pt"))
        capsys.readouterr()
        advvae.main(command(folder, "--resume"))
        assert same_weights(weights_of(folder / "a.pt"), weights_of(tmp_path / "whole" / "a.pt"))
        assert table in capsys.readouterr().out


def interrupted_after(steps):
    """A train_step that takes so many steps; then someone presses Ctrl-C."""
    step, calls = advvae.train_step, iter(range(steps))

    def interrupted(*args):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return step(*args)

    return interrupted


def test_training_can_go_on_twice_from_one_checkpoint(data, tmp_path):
    """Going on leaves what load_checkpoint gave as it was: Adam moves its own copy of the moments."""
    advvae.train(Config(epochs=1, batch_size=100), data, tmp_path / "a.pt")
    saved = advvae.load_checkpoint(tmp_path / "a.pt").saved
    one, other = (advvae.train(Config(epochs=3, batch_size=100), data, saved=saved) for _ in range(2))
    for a, b in zip(one.parameters(), other.parameters()):
        assert torch.equal(a, b)


def test_resume_keeps_the_settings_and_lets_epochs_grow(tmp_path, monkeypatch, capsys):
    """A flag that says otherwise is an error that names it; more epochs are trained, fewer are an error."""
    small_typeset(monkeypatch)
    advvae.main(command(tmp_path, "--epochs", "1", "--z-dim", "5"))
    old = (tmp_path / "a.pt").read_bytes()
    for flags in (["--z-dim", "16"], ["--kl-weight", "3.0"], ["--dataset", "mnist"], ["--epochs", "0"], ["--seed", "1"]):
        message = refused(capsys, command(tmp_path, "--resume", *flags))
        assert " ".join(flags) + " contradicts" in message and (tmp_path / "a.pt").read_bytes() == old
    advvae.main(command(tmp_path, "--resume", "--z-dim", "5", "--epochs", "2"))
    model = advvae.load_checkpoint(tmp_path / "a.pt")
    assert len(model.history) == 2 and model.z_dim == 5
    assert "not allowed with" in refused(capsys, command(tmp_path, "--resume", "--plot-only"))


@pytest.mark.parametrize("part", ["adversary", "optimizer", "adversary_optimizer", "generator", "history"])
@pytest.mark.parametrize("fault", ["missing", "of another shape"])
def test_a_checkpoint_that_does_not_fit_is_not_resumed(part, fault, tmp_path, monkeypatch, capsys):
    """Of another version of the file, say: refused in one line, its bytes stay."""
    small_typeset(monkeypatch)
    advvae.main(command(tmp_path, "--epochs", "1"))
    saved = torch.load(tmp_path / "a.pt", weights_only=True)
    if fault == "missing":
        del saved[part]
    elif part == "history":
        saved[part] = 7
    elif part == "generator":
        saved[part] = saved[part][:-1]
    else:
        tensors = list(saved[part]["state"].values())[-1] if "optimizer" in part else saved[part]
        name = [name for name, value in tensors.items() if value.dim()][-1]
        tensors[name] = tensors[name][:1, None].clone()
    torch.save(saved, tmp_path / "a.pt")
    old = (tmp_path / "a.pt").read_bytes()
    refused(capsys, command(tmp_path, "--resume", "--epochs", "2"))
    assert (tmp_path / "a.pt").read_bytes() == old


def test_a_checkpoint_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    """Or a power cut could leave an empty file under that name."""
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a)))
    advvae.save_checkpoint(tmp_path / "a.pt", {})
    assert calls == ["fsync", "replace"]


def altered(folder, **changes):
    """A checkpoint of an untrained model with other things in it; the flags that name its place."""
    advvae.train(Config(epochs=0), digits(40), folder / "a.pt")
    torch.save(torch.load(folder / "a.pt", weights_only=True) | changes, folder / "a.pt")
    return ["--checkpoint", str(folder / "a.pt"), "--figures-dir", str(folder), "--data-dir", str(folder)]


@pytest.mark.parametrize("part, hint", [("dataset", "none of the data sets"), ("device", "no checkpoint")])
def test_a_checkpoint_names_a_data_set_and_a_device_that_exist(part, hint, tmp_path, capsys):
    """What another program wrote there, or damage, is refused in one line."""
    places = altered(tmp_path, **{part: "mine"})
    for flag in ("--plot-only", "--resume"):
        assert hint in refused(capsys, [*places, flag])


def test_what_a_gpu_began_is_not_resumed_without_one(tmp_path, monkeypatch, capsys):
    """Its random numbers can't go on elsewhere; the message doesn't propose a flag that would be refused."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no cuda; go on where it began" in refused(capsys, [*altered(tmp_path, device="cuda"), "--resume"])


class Payload:
    def __reduce__(self):
        return exec, ("raise SystemExit('the payload ran')",)


def test_a_checkpoints_code_does_not_run(tmp_path, capsys):
    """A pickle can name any function to call; weights_only=True refuses it."""
    torch.save({"config": Payload()}, tmp_path / "a.pt")
    for flags in ([], ["--resume"], ["--plot-only"]):
        assert "no checkpoint" in refused(capsys, command(tmp_path, *flags))


@pytest.mark.parametrize("weights", [{"swap_weight": 1e6}, {"leak_weight": 60.0}])
def test_a_loss_that_is_not_finite_stops_the_run(weights, data, tmp_path):
    """With a message that names it, and with the last checkpoint as it was; with the extension, too."""
    path = tmp_path / "a.pt"
    advvae.train(Config(epochs=0), data, path)
    old = path.read_bytes()
    with pytest.raises(advvae.UserError, match=r"(nan|inf) at epoch 1, step \d+: try a lower --learning-rate"):
        advvae.train(Config(epochs=2, learning_rate=1, batch_size=20, **weights), data, path)
    assert path.read_bytes() == old


# The extension


def class_codes(shift, n=4000):
    """mu, logvar, z and ids of two classes whose z are N(-shift, I) and N(shift, I)."""
    id = torch.arange(n) % 2
    mu = shift * (2 * id.unsqueeze(1) - 1) + 0.8 * torch.randn(n, 3, generator=seeded(1))
    logvar = torch.full((n, 3), 2 * math.log(0.6))  # 0.8^2 + 0.6^2 = 1
    return mu, logvar, mu + 0.6 * torch.randn(n, 3, generator=seeded(2)), id


def logits(classifier, z):
    return classifier(*classifier.features(z))


def test_the_classifiers_gaussians_are_fitted_to_each_class():
    """Before it has learned, its logits are their log densities; a class that it has not seen has N(0, I)."""
    mu, logvar, z, id = class_codes(0.5)
    classifier = advvae.ZClassifier(3, 3)
    classifier.fit(mu, logvar, id)
    means = torch.tensor([-0.5, 0.5, 0.0])
    wanted = torch.stack([Normal(mean, 1.0).log_prob(z).sum(dim=1) for mean in means], dim=1)
    torch.testing.assert_close(logits(classifier, z).detach(), wanted, atol=0.15, rtol=0.1)


def test_the_classifiers_gaussians_forget_by_images_not_by_batches():
    """What was counted of a class fades as much over two batches of 256 without it as over one of 512."""
    mu, logvar, _, id = class_codes(0.5, n=512)
    one, other = advvae.ZClassifier(3, 3), advvae.ZClassifier(3, 3)
    for classifier, batch in ((one, 512), (other, 256)):
        classifier.sums.fill_(1)
        for part in zip(mu.split(batch), logvar.split(batch), id.split(batch)):
            classifier.fit(*part)
    torch.testing.assert_close(one.sums[2], torch.full((4, 4), 0.9))
    torch.testing.assert_close(other.sums[2], one.sums[2])


def test_the_leak_is_0_at_most_the_entropy_and_near_what_z_tells():
    """Of z that is the same for both classes, of z that gives the class away, of z in between."""
    for shift, low, high in ((0.0, -0.02, 0.02), (0.5, 0.2, 0.35), (5.0, 0.68, math.log(2) + 1e-6)):
        mu, logvar, z, id = class_codes(shift)
        classifier = advvae.ZClassifier(2, 3)
        classifier.fit(mu, logvar, id)
        assert low <= advvae.leak_term(logits(classifier, z), id).item() <= high


def test_the_classifiers_waves_find_ripples_that_its_gaussians_miss():
    """Two classes alike in mean and variance: where z has more of one, wave by wave, it has less of the other."""
    z = torch.randn(20000, 3, generator=seeded(1))
    id = (torch.rand(20000, generator=seeded(2)) < (1 + (2 * z[:, 0] + 2 * z[:, 1]).cos()) / 2).long()
    for waves, low, high in ((True, 0.1, math.log(2)), (False, -0.1, 0.06)):
        classifier = advvae.ZClassifier(2, 3)
        classifier.signal.fill_(waves)
        optimizer = torch.optim.Adam(classifier.parameters(), 1e-3)
        for _ in range(40):
            optimizer.zero_grad()
            (-advvae.leak_term(logits(classifier, z[:4000]), id[:4000])).backward()
            optimizer.step()
        assert low < advvae.leak_term(logits(classifier, z[4000:]), id[4000:]).item() < high


def test_the_classifiers_waves_do_not_see_dimensions_that_are_all_noise():
    """Of z's variance of 1, exp(logvar) is noise: all of it in the last dimension, a tenth in the others."""
    mu, id = torch.zeros(512, 3), torch.arange(512) % 2
    classifier = advvae.ZClassifier(2, 3)
    for _ in range(500):
        classifier.fit(mu, torch.tensor([0.1, 0.1, 1.0]).log().expand(512, 3), id)
    torch.testing.assert_close(classifier.signal, torch.tensor([0.9, 0.9, 0.0]), atol=1e-3, rtol=0)
    classifier.of_waves.data[:, 0] = torch.randn(2048, generator=seeded())
    z = torch.randn(100, 3, generator=seeded())
    of_class = lambda z: logits(classifier, z) @ torch.tensor([1.0, -1.0])  # noqa: E731  the Gaussians are alike
    torch.testing.assert_close(of_class(z), of_class(z + torch.tensor([0.0, 0.0, 1.0])), atol=0.05, rtol=0)
    assert (of_class(z) - of_class(z + torch.tensor([0.0, 1.0, 0.0]))).abs().max() > 1


def test_f_z_feels_the_waves():
    """Not only the Gaussians: a gradient reaches z through its waves."""
    classifier, z = advvae.ZClassifier(2, 3), torch.randn(8, 3, generator=seeded()).requires_grad_()
    classifier.signal.fill_(1)
    classifier.features(z)[1].sum().backward()
    assert z.grad.abs().min() > 0


def test_the_classifier_ascends_the_leak_of_x1s_class(nets, triple):
    """Its gradient in a step is that of minus leak_term, on z1's features and id1."""
    (model, adversary), config = nets, replace(EVERY_TERM, bfloat16=0)
    of_z = copy.deepcopy(adversary.of_z)
    *_, z_features = advvae.four_terms(model, copy.deepcopy(adversary).eval(), triple, config, seeded())
    (-advvae.leak_term(of_z(*(x.detach() for x in z_features)), triple[4])).backward()
    advvae.train_step(model, adversary, *optimizers(model, adversary), triple, config, seeded())
    torch.testing.assert_close(adversary.of_z.of_waves.grad, of_z.of_waves.grad, rtol=1e-4, atol=1e-6)


def test_f_z_meets_a_mean_of_what_the_classifier_makes_of_waves():
    """In eval mode; how far the mean follows goes by images, not by batches."""
    mu, logvar, _, id = class_codes(0.5, n=512)
    one, other = advvae.ZClassifier(2, 3), advvae.ZClassifier(2, 3)
    for classifier, batch in ((one, 512), (other, 256)):
        classifier.of_waves.data += 1
        for part in zip(mu.split(batch), logvar.split(batch), id.split(batch)):
            classifier.fit(*part)
        torch.testing.assert_close(classifier.mean_of_waves, torch.full((2048, 2), 0.02))
    met, in_training = logits(one.eval(), mu), logits(one.train(), mu)
    one.of_waves.data *= 0.02
    torch.testing.assert_close(met, logits(one, mu))
    assert not torch.equal(met, in_training)


def test_the_classifier_ascends_what_f_z_descends(nets, triple):
    """f_z's step lowers the leak; the adversary's step raises it."""
    model, adversary = nets
    config = Config(**{f"{name}_weight": 0.0 for name in TERMS[:-1] if name != "swap"}, swap_weight=1e-9, leak_weight=1)
    still = torch.optim.SGD(adversary.parameters(), 0.0), torch.optim.SGD(model.parameters(), 0.0)
    adam = optimizers(model, adversary)[1], torch.optim.Adam(model.parameters(), 1e-4)
    step = lambda *both: advvae.train_step(model, adversary, *both, triple, config, seeded())["leak"]  # noqa: E731
    up = [step(still[1], adam[0]) for _ in range(30)]  # the classifier alone
    adversary.of_z.mean_of_waves.copy_(adversary.of_z.of_waves.detach())  # or the mean would go on rising
    down = [step(adam[1], still[0]) for _ in range(30)]  # f_z alone
    assert up[0] + 0.05 < down[0] > down[-1]


@pytest.mark.parametrize("weight", [0.0, 60.0])
def test_the_classifier_exists_only_with_the_extension(weight, data, tmp_path):
    """Without it the adversary is the paper's, and the checkpoint holds no more than that."""
    advvae.train(Config(epochs=0, leak_weight=weight), data, tmp_path / "a.pt")
    names = torch.load(tmp_path / "a.pt", weights_only=True)["adversary"]
    assert any(name.startswith("of_z.") for name in names) == (weight > 0)


def test_the_extension_survives_rare_classes():
    """A class with one image, met once in 40 steps: no NaN."""
    small = digits(40)
    small.labels[:] = torch.arange(40) == 7
    config = Config(epochs=20, batch_size=1, leak_weight=60.0, learning_rate=1e-4)
    assert math.isfinite(advvae.train(config, small).history[-1]["leak"])


# 5. What z and s know


def test_a_probe_finds_what_there_is_and_no_more():
    """Codes of noise give chance, codes that are the one-hot label give 100 %."""
    labels, test_labels = (torch.randint(10, (n,), generator=seeded(n)) for n in (5000, 2000))
    one_hot, test_one_hot = F.one_hot(labels, 10).float(), F.one_hot(test_labels, 10).float()
    noise = lambda n: torch.randn(n, 10, generator=seeded(n + 1))  # noqa: E731
    codes, test_codes = noise(5000), noise(2000)
    torch.manual_seed(0)
    assert abs(advvae.probe_accuracy(lambda i: codes[i], test_codes, labels, test_labels, seeded()) - 0.1) < 0.03
    assert advvae.probe_accuracy(lambda i: one_hot[i], test_one_hot, labels, test_labels, seeded()) == 1
    hidden = lambda one_hot, noise: noise + 0.5 * one_hot  # noqa: E731  in between: found, but not always
    codes, test_codes = hidden(one_hot, codes), hidden(test_one_hot, test_codes)
    assert 0.12 < advvae.probe_accuracy(lambda i: codes[i], test_codes, labels, test_labels, seeded()) < 0.5


def labelled_digits(n):
    """A typeset Data of n training and 1,000 test images whose corner pixel tells the label."""
    data = digits(n, test=1000)
    data.images[:, 0, 0, 0], data.test_images[:, 0, 0, 0] = data.labels / 100, data.test_labels / 100
    return data


class Known(nn.Module):
    """A model whose codes are known: s is the label, read from a corner pixel; z the true slant and thickness."""

    def __init__(self, data):
        super().__init__()
        self.means = torch.stack([data.images[data.labels == c].mean(0) for c in range(10)])

    def encode(self, x):
        s = F.one_hot((100 * x[:, 0, 0, 0]).round().long(), 10).float()
        mu = torch.stack([advvae.slant(x), advvae.stroke_thickness(x)], dim=1)
        return s, mu, torch.full_like(mu, -20.0)

    reparameterize = AdvVAE.reparameterize

    def decode(self, z, s):
        return self.means[s.argmax(1)]


def test_evaluate_on_codes_with_known_answers(capsys):
    """s is the label: 100 %. z is slant and thickness: R2 near 1. The decoder ignores z: no diversity, no transfer."""
    data = labelled_digits(12_000)
    r = advvae.evaluate(Known(data), data)
    assert r["s_accuracy"] == 1 and r["judge_accuracy"] > 0.97
    assert r["swap_accuracy"] > 0.9 and r["prior_accuracy"] > 0.9
    assert r["z_accuracy"] < 0.6 and abs(r["z_accuracy"] - r["mu_accuracy"]) < 0.05
    assert r["prior_diversity"] < 1e-6 and abs(r["slant_from_z"]) < 0.15 and abs(r["thickness_from_z"]) < 0.15
    assert r["z_r2_slant"] > 0.9 and r["z_r2_thickness"] > 0.8 and abs(r["s_r2_slant"]) < 0.05
    assert r["swap_true_mse"] > 0.02
    assert r["majority_rate"] == pytest.approx(data.test_labels.bincount().max().item() / 1000)
    table = capsys.readouterr().out
    assert f"{r['z_accuracy']:.1%}" in table and "chance" in table


class Leaky(Known):
    """mu names the class by a thirtieth of z's noise, and the decoder makes the image as bright as z says."""

    def encode(self, x):
        s = super().encode(x)[0]
        return s, s / 30, torch.zeros_like(s)

    def decode(self, z, s):
        return self.means[s.argmax(1)] * z[:, :1, None, None].sigmoid()


def test_sampled_z_is_probed_and_the_prior_is_sampled():
    """A class that only mu names, far under the noise, is told from mu and not from z; the prior has its own spread."""
    data = labelled_digits(3000)
    r = advvae.evaluate(Leaky(data), data)
    assert r["mu_accuracy"] > 0.99 and r["z_accuracy"] < 0.2
    assert r["kl"] == pytest.approx(1 / 30**2 / 2, rel=1e-3) and r["prior_diversity"] > 0.02


def test_what_is_fitted_is_fitted_on_the_training_images(capsys):
    """There all labels are one off and all factors negated: nothing is right on the test images."""
    data = labelled_digits(3000)
    factors = {name: -factor for name, factor in data.factors.items()}
    wrong = replace(data, labels=(data.labels + 1) % 10, factors=factors)
    r = advvae.evaluate(Known(data), wrong)
    assert r["s_accuracy"] == 0 and max(r["judge_accuracy"], r["swap_accuracy"]) < 0.1 and r["z_r2_slant"] < 0


def test_evaluate_repeats_and_leaves_torchs_generator_alone(data, capsys):
    """Called twice it prints one and the same table; the caller's own random numbers go on as before."""
    model = AdvVAE()
    torch.manual_seed(7)
    first = advvae.evaluate(model, data)
    after = torch.rand(1)
    second = advvae.evaluate(model, data)
    assert {k: v for k, v in second.items() if "_r2_" not in k} == {k: v for k, v in first.items() if "_r2_" not in k}
    assert second == pytest.approx(first, abs=1e-5)  # on some versions LAPACK's least squares differ in a last bit
    torch.manual_seed(7)
    assert torch.equal(torch.rand(1), after)


def test_slant_and_thickness_measure_known_strokes():
    """A bar 3 pixels wide is 3 pixels thick, at any height; sheared by 1/2 it has slant 1/2."""
    bar = torch.zeros(1, 1, 28, 28)
    bar[..., 4:24, 12:15] = 1
    assert advvae.stroke_thickness(bar).item() == pytest.approx(3 / (1 + 3 / 20), rel=0.05)  # its short ends count too
    assert abs(advvae.slant(bar).item()) < 1e-4
    leaning = torch.zeros(1, 1, 28, 28)
    for y in range(4, 24):
        x = round(13 - 0.5 * (y - 13.5))
        leaning[..., y, x - 1 : x + 2] = 1
    assert advvae.slant(leaning).item() == pytest.approx(0.5, abs=0.02)


def test_linear_r2_is_a_share_of_variance():
    """1 for a linear function of the codes, 1/2 with as much noise again, 0 for noise alone."""
    codes, noise = torch.randn(4000, 3, generator=seeded()), torch.randn(4000, generator=seeded(1))
    signal = codes @ torch.tensor([0.6, 0.8, 0.0]) + 5
    for factor, want in ((signal, 1.0), (signal + noise, 0.5), (noise, 0.0)):
        r2 = advvae.linear_r2(codes[:2000], factor[:2000], codes[2000:], factor[2000:])
        assert r2 == pytest.approx(want, abs=0.05)


# 6. Pictures


def test_rows_of_the_swap_grid_share_z_and_columns_share_s(data, monkeypatch):
    """White images are Dec(row's z, column's s); the orange ones on the left gave z, the blue ones above gave s."""
    grids, n = [], torch.arange(10.0).view(10, 1)
    monkeypatch.setattr(advvae, "save_grid", lambda *args: grids.append(args[-1]))
    paint = lambda z, s: (z[:, :1] + s).view(-1, 1, 1, 1).expand(-1, 1, 28, 28)  # noqa: E731
    model = types.SimpleNamespace(encode=lambda x: (n, 10 * n, None), f_s=lambda x: n, decode=paint, z_dim=1)
    advvae.plot_swap(model, data, None)
    advvae.plot_samples(model, data, None)
    swap, samples = grids
    assert torch.equal(swap[1:, 1:, 0, 0, 0], 10 * n + n.T)
    x = advvae.one_of_each_class(data)[:, 0]
    assert torch.equal(swap[0, 1:, 2], x) and torch.equal(swap[1:, 0, 0], x)  # blue has all blue, orange all red
    styles = samples[:, 1:, 0, 0, 0] - n
    torch.testing.assert_close(styles, styles[:1].expand(10, -1))


# The program


def small_typeset(monkeypatch, n=300, module=advvae):
    full = module.typeset
    monkeypatch.setattr(module, "typeset", lambda count, *rest: full(min(count, n), *rest))


def command(tmp_path, *more):
    return ["--dataset", "typeset", "--device", "cpu", "--checkpoint", str(tmp_path / "a.pt"),
            "--figures-dir", str(tmp_path / "figures"), *more]  # fmt: skip


PICTURES = [f"typeset-{what}.png" for what in ("curves", "interpolation", "samples", "swap")]


def test_main_trains_evaluates_and_draws(tmp_path, monkeypatch, capsys):
    """End to end on 300 typeset digits: a loadable checkpoint, the table, four PNGs; then --plot-only draws again."""
    small_typeset(monkeypatch)
    advvae.main(command(tmp_path, "--epochs", "2"))
    said = capsys.readouterr().out
    assert "\r" not in said and "\033" not in said  # not a terminal: one line an epoch
    assert re.search(r"epoch 2/2  reconstruction .* kl .* swap .* adversary .* prior", said)
    assert "class told from sampled z" in said
    advvae.load_checkpoint(tmp_path / "a.pt")
    pictures = tmp_path / "figures"
    assert sorted(p.name for p in pictures.iterdir()) == PICTURES
    swap = (pictures / "typeset-swap.png").read_bytes()
    assert swap.startswith(b"\x89PNG") and len(swap) > 10_000
    for picture in pictures.iterdir():
        picture.unlink()
    checkpoint = (tmp_path / "a.pt").read_bytes()
    advvae.main(command(tmp_path, "--plot-only"))
    assert sorted(p.name for p in pictures.iterdir()) == PICTURES
    assert (pictures / "typeset-swap.png").read_bytes() == swap
    assert (tmp_path / "a.pt").read_bytes() == checkpoint


def test_progress_is_live_on_a_terminal(data, monkeypatch):
    """There a line is rewritten in place, with step, images/s and the time left."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    advvae.train(Config(epochs=1, batch_size=10), data)
    said = sys.stdout.getvalue()
    assert re.search(r"\repoch 1/1  step 40/60  [\d,]+ images/s  0 min \d\d s left\033\[K\r", said)
    assert said.rstrip().split("\r")[-1].startswith("\033[Kepoch 1/1  reconstruction")


def test_ctrl_c_ends_training_and_keeps_what_was_learned(tmp_path, monkeypatch, capsys):
    """The model is put back to the end of its last whole epoch, evaluated, drawn and saved."""
    small_typeset(monkeypatch)
    monkeypatch.setattr(advvae, "train_step", interrupted_after(4))
    advvae.main(command(tmp_path, "--epochs", "9", "--batch-size", "150"))
    said = capsys.readouterr().out
    assert "Ctrl-C: back to the end of epoch 2; --resume goes on" in said and "class told from s" in said
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == PICTURES
    assert len(advvae.load_checkpoint(tmp_path / "a.pt").history) == 2


def test_ctrl_c_takes_back_what_is_no_whole_epoch(data, tmp_path, monkeypatch):
    """What train returns is what the checkpoint holds, not two steps further."""
    monkeypatch.setattr(advvae, "train_step", interrupted_after(6))  # each epoch has 4
    model = advvae.train(Config(epochs=9, batch_size=150), data, tmp_path / "a.pt")
    assert same_weights(weights_of(tmp_path / "a.pt"), model.state_dict())


def test_ctrl_c_in_the_first_epoch_keeps_the_old_checkpoint(data, tmp_path, monkeypatch):
    """Nothing whole has been learned, so nothing is written over."""
    advvae.train(Config(epochs=0), data, tmp_path / "a.pt")
    old = (tmp_path / "a.pt").read_bytes()
    monkeypatch.setattr(advvae, "train_step", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        advvae.train(Config(epochs=2), data, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").read_bytes() == old


def test_ctrl_c_elsewhere_ends_without_a_traceback(tmp_path, monkeypatch, capsys):
    """While data are loaded, say: exit code 130, as shells expect, and nothing said."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(advvae, "load_data", interrupted)
    with pytest.raises(SystemExit) as exit:
        advvae.main(command(tmp_path))
    assert exit.value.code == 130 and capsys.readouterr().err.strip() == ""


def test_epochs_0_is_an_untrained_model(tmp_path, monkeypatch, capsys):
    """It is evaluated, drawn and saved like any other, without a warning or a curve."""
    small_typeset(monkeypatch)
    advvae.main(command(tmp_path, "--epochs", "0"))
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == PICTURES


def refused(capsys, argv):
    """main must refuse argv: exit code 2, and one line on stderr, which is returned."""
    with pytest.raises(SystemExit) as exit:
        advvae.main(argv)
    message = capsys.readouterr().err
    assert exit.value.code == 2 and message.count("\n") == 1 and message.startswith("advvae.py: ")
    return message


@pytest.mark.parametrize("flags, hint", [
    (["--dataset", "imagenet"], "mnist"),
    (["--epochs", "-1"], "must be from 0 to"),
    (["--epochs", "1.5"], "invalid int value"),
    (["--batch-size", "0"], "must be from 1 to"),
    (["--learning-rate", "nan"], "must be from 0 to"),
    (["--kl-weight", "inf"], "must be from 0 to"),
    (["--swap-weight", "-1"], "must be from 0 to"),
    (["--z-dim", ""], "invalid int value"),
    (["--device", "abacus"], "cpu"),
    (["--seed", "9" * 30], "must be from 0 to"),
    (["--no-such-flag"], "--help"),
    ([f"--{term}-weight=0" for term in ("reconstruction", "swap", "adversary", "prior")], "nothing to train"),
])  # fmt: skip
def test_bad_flags_are_refused_in_one_line(flags, hint, tmp_path, capsys):
    """Exit code 2, no traceback, what to do, and nothing written."""
    assert hint in refused(capsys, command(tmp_path, *flags))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "", "1e308", "9" * 30, "1.5", "one"])
def test_any_number_works_or_is_refused(value, tmp_path, capsys, monkeypatch):
    """Each flag with each of them: a training whose losses are finite, or exit code 2 and nothing written."""
    few, run = digits(40, test=10), mock.Mock()
    monkeypatch.setattr(advvae, "run", run)
    for setting in advvae.fields(Config):
        run.reset_mock()
        argv = command(tmp_path, f"--{setting.name.replace('_', '-')}={value}")
        low, high = setting.metadata["low"], setting.metadata["high"]
        numbers = {"0": 0} if setting.type is int else {"0": 0.0, "1.5": 1.5}
        if value in numbers and low <= numbers[value] <= high:
            advvae.main(argv)
            losses = advvae.train(replace(run.call_args[0][1], epochs=1), few).history[0]
            assert all(map(math.isfinite, losses.values()))
        else:
            assert setting.name.replace("_", "-") in refused(capsys, argv).replace("_", "-")
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_is_not_there_is_refused(tmp_path, capsys, monkeypatch):
    """--device cuda without a GPU is an error, not a silent use of the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device auto" in refused(capsys, command(tmp_path, "--device", "cuda"))


def test_a_file_that_is_no_checkpoint_is_neither_read_nor_overwritten(tmp_path, capsys, monkeypatch):
    """As --checkpoint, for training and for --plot-only: refused, and its bytes stay."""
    small_typeset(monkeypatch)
    advvae.main(command(tmp_path, "--epochs", "0"))
    whole = (tmp_path / "a.pt").read_bytes()
    foreign = io.BytesIO()
    torch.save({"weights": torch.zeros(3)}, foreign)
    capsys.readouterr()
    for content in (b"", b"my thesis", gzip.compress(b"x" * 1000), foreign.getvalue(), whole[: len(whole) // 2]):
        (tmp_path / "a.pt").write_bytes(content)
        for flags in (["--epochs", "0"], ["--plot-only"]):
            assert "no checkpoint of this advvae.py" in refused(capsys, command(tmp_path, *flags))
        assert (tmp_path / "a.pt").read_bytes() == content


def test_paths_that_cannot_be_are_refused(tmp_path, capsys):
    """A figures path that is a file, a checkpoint that is a folder or isn't there."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    figures = command(tmp_path)[:-1] + [str(tmp_path / "file")]
    assert "name another place" in refused(capsys, figures)
    assert "name another" in refused(capsys, command(tmp_path, "--checkpoint", str(tmp_path / "folder")))
    assert "name another" in refused(capsys, command(tmp_path, "--checkpoint", str(tmp_path / "file" / "a.pt")))
    assert "name another" in refused(capsys, command(tmp_path, "--checkpoint", ""))
    assert "train first" in refused(capsys, command(tmp_path, "--plot-only"))
    assert (tmp_path / "file").read_text() == "mine"


def test_plot_only_wants_the_checkpoints_own_data_set(tmp_path, capsys, monkeypatch):
    """--dataset may say it again, but not name another."""
    small_typeset(monkeypatch)
    advvae.main(command(tmp_path, "--epochs", "0"))
    capsys.readouterr()
    assert "trained on typeset" in refused(capsys, command(tmp_path, "--plot-only", "--dataset", "mnist"))


def test_mnist_that_cannot_be_had_is_an_error(tmp_path, no_network, capsys):
    """--dataset mnist with no files and no network: an error that says where to put which files, never typeset."""
    message = refused(capsys, command(tmp_path, "--dataset", "mnist", "--data-dir", str(tmp_path / "none")))
    assert "t10k-labels-idx1-ubyte" in message and "--dataset typeset" in message
    assert not (tmp_path / "a.pt").exists()


@pytest.mark.parametrize("dataset", ["mnist", "auto"])
@pytest.mark.parametrize("fault", ["cut", "empty", "magic", "labels", "none", "size", "new class"])
def test_corrupt_idx_files_are_refused(fault, dataset, tmp_path, no_network, capsys):
    """Cut short, empty, of another format, with too few labels or images of another size: one line, also for auto."""
    raw = write_mnist(tmp_path, size=32 if fault == "size" else 28)
    images, labels = raw / "train-images-idx3-ubyte", raw / "t10k-labels-idx1-ubyte"
    if fault == "cut":
        images.write_bytes(images.read_bytes()[:-100])
    elif fault == "empty":
        labels.write_bytes(b"")
    elif fault == "magic":
        images.write_bytes(b"\x7fELF" + images.read_bytes()[4:])
    elif fault == "labels":
        labels.write_bytes(idx_bytes(torch.zeros(7, dtype=torch.long)))
    elif fault == "none":
        images.write_bytes(idx_bytes(torch.zeros(0, 28, 28, dtype=torch.long)))
    elif fault == "new class":
        labels.write_bytes(idx_bytes(torch.full((30,), 8)))
    message = refused(capsys, command(tmp_path, "--dataset", dataset, "--data-dir", str(tmp_path)))
    assert "holds no mnist" in message and "delete it" in message
    assert not (tmp_path / "a.pt").exists()


@pytest.mark.parametrize("images", [
    torch.randint(256, (3, 28, 28), generator=seeded()), torch.zeros(30, 28, 28), torch.full((30, 28, 28), 255),
    torch.arange(30).view(-1, 1, 1).expand(-1, 28, 28), torch.full((2, 28, 28), 7),
], ids=["three", "black", "white", "each of one gray", "two of one class"])  # fmt: skip
def test_odd_data_give_no_nan(images, tmp_path, capsys):
    """Three images in all, images without a line in them: trained on, judged and drawn, every number finite."""
    raw = write_mnist(tmp_path, labels=[9, 9] if len(images) == 2 else [9, 4, 9] * (len(images) // 3))
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(images))
    data = advvae.load_data("mnist", tmp_path)
    model = advvae.train(Config(epochs=2, leak_weight=60.0), data)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert all(map(math.isfinite, advvae.evaluate(model, data).values()))
    advvae.draw_figures(model, data, tmp_path)
    assert " nan" not in capsys.readouterr().out


def test_a_path_that_the_terminal_cannot_show(data, tmp_path):
    """Where stdout is ASCII, a folder with an umlaut in its name is written to and named all the same."""
    folder = tmp_path / "Übung"
    folder.mkdir()
    advvae.train(Config(epochs=0), data, folder / "a.pt")
    paths = ["--checkpoint", folder / "a.pt", "--figures-dir", folder]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    argv = [sys.executable, HERE / "advvae.py", "--plot-only", "--device", "cpu", *paths]
    ended = subprocess.run(argv, env=environment, capture_output=True)
    assert (ended.returncode, ended.stderr) == (0, b"") and rb"\xdcbung" in ended.stdout
    assert (folder / "typeset-swap.png").exists()


def mutations(whole, n, seed=0):
    """n damaged copies of whole: bytes changed, cut out, put in twice, or all cut from some place on; never empty."""
    generator = random.Random(seed)
    for _ in range(n):
        damaged = bytearray(whole)
        for _ in range(generator.choice((1, 1, 2, 10))):
            i, length = generator.randrange(len(damaged)), generator.choice((1, 4, 100))
            kind = generator.randrange(4)
            if kind == 0:
                damaged[i] ^= 1 << generator.randrange(8)
            elif kind == 1:
                del damaged[max(i, 1) : i + length]
            elif kind == 2:
                damaged[i:i] = damaged[i : i + length]
            else:
                del damaged[max(i, 1) :]
        yield bytes(damaged)


def fuzz(folder, n):
    """Load n damaged checkpoints and n damaged MNIST files: how many were loaded and refused, and the MiB it took."""
    raw, checkpoint, counts = write_mnist(folder), folder / "a.pt", {}
    advvae.train(Config(epochs=0, s_dim=2, z_dim=2), digits(20, test=10), checkpoint)
    places = [(checkpoint, lambda: advvae.load_checkpoint(checkpoint))]
    places += [(file, lambda: advvae.load_data("mnist", folder)) for file in sorted(raw.iterdir())]
    for _, load in places:
        load()
    before = peak_memory()
    for path, load in places:
        whole = path.read_bytes()
        for damaged in mutations(whole, n if path == checkpoint else n // 4):
            path.write_bytes(damaged)
            try:
                load()
                outcome = "loaded"
            except advvae.UserError as error:
                assert "\n" not in str(error)
                outcome = "refused"
            key = f"{path.suffix or path.name[:5] + path.name.split('-')[1]} {outcome}"
            counts[key] = counts.get(key, 0) + 1
        path.write_bytes(whole)
    return counts, peak_memory() - before


def test_damaged_files_are_loaded_or_refused(tmp_path, no_network):
    """Nothing but a UserError comes out, whatever happened to the bytes."""
    counts, mebibytes = fuzz(tmp_path, 200)
    assert sum(counts.values()) == 400 and mebibytes < 300


def small_run(folder, *flags):
    """A training on 300 digits that neither evaluates nor draws."""
    with pytest.MonkeyPatch.context() as patch:
        small_typeset(patch)
        for name in ("evaluate", "draw_figures"):
            patch.setattr(advvae, name, mock.Mock())
        advvae.main(command(Path(folder), "--batch-size", "50", *flags))


def kill_and_resume(folder, kills, seed=0):
    """Kill a training so many times, each time at a random moment; end it. How many checkpoints it left."""
    generator, left = random.Random(seed), 0
    for _ in range(kills):
        flags = ["--resume"] if (folder / "a.pt").exists() else ["--epochs", "60"]
        code = f"import test_advvae; test_advvae.small_run({str(folder)!r}, *{flags})"
        child = subprocess.Popen([sys.executable, "-c", code], cwd=HERE, stdout=subprocess.PIPE, text=True)
        next(line for line in child.stdout if line.startswith("Training"))
        time.sleep(generator.random())
        child.kill()
        child.communicate()
        if (folder / "a.pt").exists():
            advvae.load_checkpoint(folder / "a.pt")
            left += 1
    small_run(folder, *(["--resume"] if left else ["--epochs", "60"]))
    return left


def test_a_killed_run_can_be_resumed(tmp_path, capsys):
    """SIGKILL at any moment leaves a whole checkpoint, and what resumes from it ends with the very same weights."""
    small_run(tmp_path / "whole", "--epochs", "60")
    kill_and_resume(tmp_path / "killed", 3)
    assert same_weights(weights_of(tmp_path / "killed" / "a.pt"), weights_of(tmp_path / "whole" / "a.pt"))


def test_help_names_every_flag_and_default(capsys):
    """Each field of Config is a flag with its default."""
    with pytest.raises(SystemExit) as exit:
        advvae.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert exit.value.code == 0
    for setting in advvae.fields(Config):
        assert re.search(rf"--{setting.name.replace('_', '-')} N .*?\(default: {setting.default}\)", said)


def test_importing_does_nothing(tmp_path):
    """`import advvae` only defines: no output, no files."""
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); sys.dont_write_bytecode = True; import advvae"
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "") and list(tmp_path.iterdir()) == []


def test_inline_metadata_equals_requirements():
    """`uv run advvae.py` and `pip install -r requirements.txt` install the same."""
    block = (HERE / "advvae.py").read_text().split("# ///")[1]
    inline = re.findall(r'"([^"]+)"', block.split("dependencies")[1])
    assert inline == (HERE / "requirements.txt").read_text().split()
    assert '"torch>=' in block and 'requires-python = ">=3.10"' in block


# The README's exercises and notebook


def blocks(language, text):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def section(title):
    return (HERE / "README.md").read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]


def exercise(number):
    """What the README says of an exercise: advvae.py with the change made, the commands' flags, the Python."""
    preamble, *exercises = section("Exercises").split("\n### ")
    text = next(text for text in exercises if text.startswith(f"{number}. "))
    source = (HERE / "advvae.py").read_text()
    for block in blocks("diff", text):
        lines = block.splitlines(keepends=True)
        old, new = ("".join(line[1:] for line in lines if line[0] == sign) for sign in "-+")
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    python = "".join(blocks("python", text))
    return source, [line.split()[2:] for line in blocks("sh", text)], python and blocks("python", preamble)[0] + python


@pytest.fixture
def elsewhere(tmp_path, monkeypatch, no_network):
    """An empty folder to work in, matplotlib without a screen, data sets of 300 digits, trainings of one epoch."""
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)

    def shorten(module):
        train = module.train
        small_typeset(monkeypatch, module=module)
        monkeypatch.setattr(module, "train", lambda config, *rest: train(replace(config, epochs=1), *rest))

    return shorten


@pytest.mark.parametrize("number", range(1, 11))
def test_an_exercise_can_be_done(number, elsewhere, monkeypatch, capsys):
    """Its change fits advvae.py as it is, what results trains, and its Python runs."""
    source, commands, python = exercise(number)
    module = types.ModuleType("advvae")
    monkeypatch.setitem(sys.modules, "advvae", module)
    exec(source, vars(module))
    elsewhere(module)
    for flags in commands:
        module.main(flags)
    exec(python, {})
    assert "nan" not in capsys.readouterr().out


def test_the_notebooks_lines_run(elsewhere):
    """Just as they stand in the README, with two pictures of one's own."""
    elsewhere(advvae)
    advvae.main(["--dataset", "typeset", "--device", "cpu"])
    names = re.findall(r"\w+\.png", section("In a notebook"))
    for name, ink in zip(names, digits(2).images, strict=True):
        save_image(1 - F.pad(ink, (3, 3)), name)
    known = {}
    exec("".join(blocks("python", section("In a notebook"))), known)
    assert known["swapped"].shape == (2, 1, 28, 28)


def run_exercise(number, data_dir="data"):
    """Do an exercise in a copy of advvae.py, as its text says; its pictures go to the folder exercise-<number>."""
    source, commands, python = exercise(number)
    data, folder = Path(data_dir).resolve(), Path(f"exercise-{number}")
    data.mkdir(exist_ok=True)
    folder.mkdir()
    (folder / "advvae.py").write_text(source)
    (folder / "data").symlink_to(data)
    (folder / "exercise.py").write_text(python)
    for line in [["advvae.py", *flags] for flags in commands] + [["exercise.py"]]:
        subprocess.run([sys.executable, *line], cwd=folder, check=True)


# Learning


def test_it_learns(capsys):
    """A short training on typeset: s tells the class, swaps obey s, slant follows z; untrained, none of it."""
    data = digits(8000, test=1000)
    config = Config(epochs=6, batch_size=64)
    untrained = advvae.evaluate(advvae.train(replace(config, epochs=0), data), data)
    trained = advvae.evaluate(advvae.train(config, data), data)
    wanted = {"s_accuracy": 0.95, "swap_accuracy": 0.85, "prior_accuracy": 0.85, "slant_from_z": 0.7, "z_r2_slant": 0.7}
    for name, threshold in wanted.items():
        assert trained[name] > threshold, name
        assert untrained[name] < threshold - 0.1, name
    assert trained["z_accuracy"] < trained["s_accuracy"] - 0.2
    assert abs(trained["slant_from_s"]) < 0.3
    assert trained["reconstruction_mse"] < 0.05 < untrained["reconstruction_mse"]


def test_the_adversary_makes_the_decoder_obey_s(monkeypatch, capsys):
    """At a plain VAE's KL weight terms 1 and 2 let z carry all and swaps ignore s; with term 3 or 4 they obey it."""
    monkeypatch.setattr(advvae, "probe_accuracy", mock.Mock(return_value=0.0))  # slow, and not asked here
    data, obeyed = digits(8000, test=1000), {}
    for weights in ((0, 0), (30, 0), (0, 30)):
        plain = Config(epochs=3, batch_size=64, kl_weight=1, adversary_weight=weights[0], prior_weight=weights[1])
        obeyed[weights] = advvae.evaluate(advvae.train(plain, data), data)["swap_accuracy"]
    assert obeyed[0, 0] < 0.4 and min(obeyed[30, 0], obeyed[0, 30]) > 0.7


# The README's table of departures: python test_advvae.py departures [data folder]


class ClassMaps(Adversary):
    """Conditional as in the authors' code: a learned map per class, added to a convolution's output."""

    def __init__(self, n_classes):
        super().__init__(n_classes)
        self.map = nn.Embedding(n_classes, 5 * 5)
        nn.init.normal_(self.map.weight, std=0.1)

    def forward(self, x, id):
        fold, convolution, *rest = self.features
        h = convolution(fold(x)) + self.map(id).view(-1, 1, 5, 5)
        return self.real(nn.Sequential(*rest)(h).float()).squeeze(1)


def strided(norm=lambda layer: layer):
    """The authors' kind of layers: 4x4 convolutions with stride 2, (N, 1, 28, 28) -> (N, 1024)."""
    layers = (1, 16, 1), (16, 32, 1), (32, 64, 2)
    convs = [(norm(nn.Conv2d(i, o, 4, stride=2, padding=p)), nn.LeakyReLU(0.2)) for i, o, p in layers]
    return nn.Sequential(*[layer for pair in convs for layer in pair], nn.Flatten())


def strided_f_s(s_dim):
    return nn.Sequential(strided(), nn.Linear(1024, 128), nn.LeakyReLU(0.2), nn.Linear(128, s_dim))


def strided_f_z(s_dim, z_dim, make=advvae.UnspecifiedEncoder):
    net = make(s_dim, z_dim)
    net.stem, net.hidden[0] = strided(), nn.Linear(1024 + s_dim, 256)
    return net


def strided_decoder(s_dim, z_dim, make=advvae.Decoder):
    net, act = make(s_dim, z_dim), nn.LeakyReLU(0.2)
    net.net = nn.Sequential(
        nn.Linear(z_dim + s_dim, 128), act, nn.Linear(128, 1024), act, nn.Unflatten(1, (64, 4, 4)),
        nn.ConvTranspose2d(64, 32, 3, stride=2, padding=1), act,
        nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1), act, nn.ConvTranspose2d(16, 1, 4, stride=2, padding=1),
    )  # fmt: skip
    return net


def strided_adversary(n_classes):
    net, norm = Adversary(n_classes), advvae.spectral_norm
    net.features = nn.Sequential(strided(norm), norm(nn.Linear(1024, 128)), nn.LeakyReLU(0.2))
    return net


class Unscaled(advvae.UnspecifiedEncoder):
    """f_z that is given s beside its features, and nothing more."""

    def forward(self, x, s):
        return self.out(self.hidden(torch.cat([self.stem(x), s], dim=1))).float().chunk(2, dim=1)


class Blind(Unscaled):
    """f_z that doesn't see s, as in the authors' code."""

    def forward(self, x, s):
        return super().forward(x, 0 * s)


def bernoulli_term(x1, x1_decoded):
    return F.binary_cross_entropy(x1_decoded, x1, reduction="sum") / len(x1)


DEPARTURES = {
    "the file as it is": {},
    "no spectral norm": {"spectral_norm": lambda layer: layer},
    "class maps in the adversary": {"Adversary": ClassMaps},
    "strided networks": {"SpecifiedEncoder": strided_f_s, "UnspecifiedEncoder": strided_f_z,
                         "Decoder": strided_decoder, "Adversary": strided_adversary},
    "f_z blind to s": {"UnspecifiedEncoder": Blind},
    "f_z's features not scaled by s": {"UnspecifiedEncoder": Unscaled},
    "Bernoulli likelihood": {"reconstruction_term": bernoulli_term},
}  # fmt: skip


@contextlib.contextmanager
def departure(name):
    """advvae with one of the changes."""
    with contextlib.ExitStack() as patches:
        for key, value in DEPARTURES[name].items():
            patches.enter_context(mock.patch.object(advvae, key, value))
        yield


def departures(data_dir="data"):
    """Train 6 epochs on MNIST with each change alone, seed 0, and print the README's rows."""
    data = advvae.load_data("mnist", data_dir)
    for name in DEPARTURES:
        with departure(name):
            r = advvae.evaluate(advvae.train(Config(epochs=6), data), data)
        shares = " | ".join(f"{r[key + '_accuracy']:.1%}" for key in ("z", "s", "swap", "prior"))
        print(f"| {name} | {shares} | {r['prior_diversity']:.2f} | {r['reconstruction_mse']:.4f} |", flush=True)


@pytest.mark.parametrize("name", DEPARTURES)
def test_departures_train(name, data):
    """Each change of the README's table of departures makes networks that fit together and a loss that is finite."""
    with departure(name):
        assert math.isfinite(advvae.train(Config(epochs=1, batch_size=100), data).history[0]["swap"])


# The benchmark: python test_advvae.py [cpu|cuda|mps]


class Trainer:
    """Training steps as `train` takes them, on typeset digits, one at each call."""

    def __init__(self, images, labels, config):
        self.config, self.generator = config, torch.Generator(images.device).manual_seed(0)
        self.model, self.adversary = new_nets(torch.channels_last, images.device)
        self.optimizers = optimizers(self.model, self.adversary)
        sampler = TripleSampler(images, labels, config.batch_size, self.generator)
        endless = (triple for _ in iter(int, 1) for triple in sampler)
        self.sample = (triple for triple in endless if len(triple[0]) == config.batch_size).__next__

    def __call__(self):
        triple = self.sample()
        advvae.train_step(self.model, self.adversary, *self.optimizers, triple, self.config, self.generator)


def synchronize(device):
    if device in ("cuda", "mps"):
        getattr(torch, device).synchronize()


def seconds_of(function, device, at_least):
    """How long each call of function took, in calls of at_least seconds in all."""
    times, begin = [], time.perf_counter()
    while time.perf_counter() - begin < at_least:
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return times


def split(trainer, device, at_least):
    """The share of a step that each of its parts takes, medians; the device is waited for around each."""
    spent, steps = {}, []

    def timed(part, function):
        def wrapped(*args, **kwargs):
            synchronize(device)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            synchronize(device)
            spent[part] = spent.get(part, 0) + time.perf_counter() - start
            return result

        return wrapped

    with contextlib.ExitStack() as patches:
        places = {"sampling": (trainer, "sample"), "backward": (torch.Tensor, "backward")}
        nets = vars(trainer.model)["_modules"] | {"adversary": trainer.adversary}
        places |= {f"{name}, forward": (net, "forward") for name, net in nets.items()}
        for part, (owner, method) in places.items():
            patches.enter_context(mock.patch.object(owner, method, timed(part, getattr(owner, method))))
        for optimizer in trainer.optimizers:
            patches.enter_context(mock.patch.object(optimizer, "step", timed("optimizers", optimizer.step)))
        begin = time.perf_counter()
        while time.perf_counter() - begin < at_least:
            spent.clear()
            timed("step", trainer)()
            steps.append(dict(spent))
    parts = [part for part in steps[0] if part != "step"]
    return {part: statistics.median(step[part] / step["step"] for step in steps) for part in parts}


def benchmark(device):
    """Print the speed of a training step beside the machine's own. What is compared is timed in turns."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, batches of {Config.batch_size}, medians\n")
    images, labels, _ = advvae.typeset(60_000, seeded(), device)
    types = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    matrices = {key: torch.randn(2048, 2048, device=device).to(dtype) for key, dtype in types.items()}
    trainers = {key: Trainer(images, labels, Config(bfloat16=key == "bfloat16")) for key in types}
    with FlopCounterMode(display=False) as counter:
        trainers["float32"]()
    operations = counter.get_total_flops() / Config.batch_size
    extended = {key: Trainer(images, labels, replace(trainers[key].config, leak_weight=60.0)) for key in types}
    products, steps, longer = ({key: [] for key in types} for _ in range(3))
    for turn in range(9):  # the first warms up
        for key in types:
            a = matrices[key]
            products[key] += seconds_of(lambda: a @ a, device, 0.3)[0 if turn else -1 :]
            steps[key] += seconds_of(trainers[key], device, 1)[0 if turn else -1 :]
            longer[key] += seconds_of(extended[key], device, 1)[0 if turn else -1 :]
    rate = {key: 2 * 2048**3 / statistics.median(times) for key, times in products.items()}
    step = {key: statistics.median(times) for key, times in steps.items()}
    epoch = {key: seconds / Config.batch_size * 60_000 for key, seconds in step.items()}

    def row(what, values, form):
        print(f"{what:34}" + "".join(f"{value:>12{form}}" for value in values))

    print(" " * 34 + "".join(f"{key:>12}" for key in types))
    row("matrix product, GFLOP/s", [r / 1e9 for r in rate.values()], ",.0f")
    row("training, triples/s", [Config.batch_size / seconds for seconds in step.values()], ",.0f")
    row("seconds for 60,000 triples", epoch.values(), ".1f")
    row("  x float32 product, TFLOP", [seconds * rate["float32"] / 1e12 for seconds in epoch.values()], ".2f")
    row("with the extension, times as long", [statistics.median(longer[key]) / step[key] for key in types], ".2f")
    row("million operations a triple", [operations / 1e6] * 2, ".1f")
    row("  of the float32 product's rate", [operations * 60_000 / s / rate["float32"] for s in epoch.values()], ".0%")
    parts = [split(trainer, device, 3) for trainer in trainers.values()]
    for part in parts[0]:
        row(f"share of a step: {part}", [shares[part] for shares in parts], ".1%")

    print(f"\n{'images':>10}{'batch':>8}{'triples/s':>12}{'peak memory, MiB':>20}")
    for n, batch in ((10_000, 256), (60_000, 256), (240_000, 256), (60_000, 64), (60_000, 1024)):
        print(run_python(f"import test_advvae; test_advvae.one_size({n}, {batch}, {device!r})"), end="", flush=True)
    start = "import time; start = time.perf_counter(); "
    took = "; print(f'{time.perf_counter() - start:.2f}')"
    print("\nseconds, once each")
    row("import advvae, after torch", [float(run_python(f"import torch; {start}import advvae{took}"))], ".2f")
    row("70,000 digits of typeset", [float(run_python(f"import advvae; {start}advvae.load_data('typeset'){took}"))], ".2f")
    first = "import os, sys, advvae; step = advvae.train_step; end = lambda *a: (step(*a), os._exit(0)); "
    begin = time.perf_counter()
    run_python(first + f"advvae.train_step = end; advvae.main(['--dataset=typeset', '--device={device}'])")
    row("start to the end of the first step", [time.perf_counter() - begin], ".2f")


def run_python(code):
    """What another python prints for code, in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        paths = f"import sys; sys.path.insert(0, {str(HERE)!r}); "
        command = [sys.executable, "-c", paths + code]
        return subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True).stdout


def peak_memory():
    """This process's, in MiB; 0 on Windows, which has no module resource."""
    if sys.platform == "win32":
        return 0.0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def one_size(n, batch, device):
    """One row of the benchmark's table: n images, one batch size; memory is this process's peak."""
    images, labels, _ = advvae.typeset(n, seeded(), device)
    trainer = Trainer(images, labels, Config(batch_size=batch))
    seconds_of(trainer, device, 1)
    rate = batch / statistics.median(seconds_of(trainer, device, 5))
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else peak_memory()
    print(f"{n:10,}{batch:8,}{rate:12,.0f}{peak:20,.0f}")


# A stronger probe than evaluate's: python test_advvae.py probe <checkpoint> [data folder], some minutes


@torch.no_grad()
def told(model, data, width, epochs):
    """The test accuracies with which networks of such a width, trained so long, tell the class from z and from s."""
    (s, mu, logvar), (test_s, test_mu, test_logvar) = model.encode(data.images), model.encode(data.test_images)
    torch.manual_seed(0)
    generator = seeded()
    test_z = model.reparameterize(test_mu, test_logvar, generator)
    z_at = lambda i: model.reparameterize(mu[i], logvar[i], generator)  # noqa: E731
    rest = data.labels, data.test_labels, generator, width, epochs
    return advvae.probe_accuracy(z_at, test_z, *rest), advvae.probe_accuracy(s.__getitem__, test_s, *rest)


class Sines(nn.Linear):
    """A first layer that finds ripples in z's density: waves of z, blind to dimensions that are all noise."""

    def __init__(self, signal, width):
        super().__init__(len(signal), width)
        self.signal = signal

    def forward(self, z):
        return (5 * super().forward(z * self.signal)).sin()


@torch.no_grad()
def strong_probe(checkpoint="advvae.pt", data_dir="data", width=1024, epochs=50):
    """Print what a wide network that is trained long finds in z and in s, and what one of sines finds in z."""
    model = advvae.load_checkpoint(checkpoint)
    data = advvae.load_data(model.dataset, data_dir)
    from_z, from_s = told(model, data, int(width), int(epochs))
    print(f"class told by {width} units, {epochs} epochs: from sampled z {from_z:.1%}, from s {from_s:.1%}")
    (_, mu, logvar), (_, test_mu, test_logvar) = model.encode(data.images), model.encode(data.test_images)
    torch.manual_seed(0)
    first = Sines(1 - logvar.exp().mean(dim=0), int(width)), nn.Linear(int(width), 256)
    net = nn.Sequential(*first, nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, int(data.labels.max()) + 1))
    z_at = lambda i: model.reparameterize(mu[i], logvar[i])  # noqa: E731
    accuracy = advvae.fit_classifier(net, z_at, data.labels, int(epochs), seeded())
    from_z = accuracy(model.reparameterize(test_mu, test_logvar), data.test_labels)
    print(f"class told by {width} sines, {epochs} epochs: from sampled z {from_z:.1%}")


# Does z mean the same in every class? python test_advvae.py classes <checkpoint> [data folder]


@torch.no_grad()
def classes(checkpoint="advvae.pt", data_dir="data"):
    """Print how far slant and thickness carry over in swaps from each class to the others, and into it from them."""
    model = advvae.load_checkpoint(checkpoint)
    data = advvae.load_data(model.dataset, data_dir)
    x, labels = data.test_images, data.test_labels
    s, mu, _ = model.encode(x)
    members = [labels == c for c in labels.unique()]
    swapped = [model.decode(mu, s[c].mean(dim=0).expand(len(x), -1)) for c in members]  # with each class's mean s
    print("r of z's source and the swapped image, by class   " + "".join(f"{c:6}" for c in range(len(members))))
    for measure in (advvae.slant, advvae.stroke_thickness):
        of_x, of_swapped = measure(x), [measure(images) for images in swapped]
        # (z's class, s's class)
        r = torch.tensor([[correlation(of_x[c], of_class[c]) for of_class in of_swapped] for c in members])
        for source, sums in (("z's source", r.sum(dim=1)), ("s's source", r.sum(dim=0))):
            means = (sums - r.diag()) / (len(members) - 1)
            print(f"{f'{measure.__name__}, class of {source}':<50}" + "".join(f"{value:6.2f}" for value in means))


# A picture for the README: python test_advvae.py picture [data folder], some minutes


@torch.no_grad()
def picture(data_dir="data", folder="figures", epochs=20):
    """Draw mnist-codes.png: what probes tell after some of the epochs, and what a swap takes from z's source."""
    data, by_epoch = advvae.load_data("mnist", data_dir), {}

    def look(path, saved):
        if len(saved["history"]) in (1, 2, 3, 5, 7, 10, 15, epochs):
            model = AdvVAE()
            model.load_state_dict(saved["model"])
            by_epoch[len(saved["history"])] = told(model.eval(), data, width=256, epochs=15)

    with torch.enable_grad(), mock.patch.object(advvae, "save_checkpoint", look):
        model = advvae.train(Config(epochs=epochs), data, checkpoint="none")
    figure = matplotlib.figure.Figure(figsize=(13, 4), layout="constrained")
    axes, *places = figure.subplots(1, 3)
    for code, values in zip("zs", zip(*by_epoch.values())):
        axes.plot(by_epoch.keys(), values, ".-", label=f"from {code}")
    axes.axhline(data.test_labels.bincount().max() / len(data.test_labels), color="gray", label="chance")
    axes.set(title="the class, told by probes", xlabel="epoch", ylabel="test accuracy", ylim=(0, 1.02))
    axes.legend(loc="center right")
    x = data.test_images[:2000]
    s, mu, _ = model.encode(x)
    swapped = model.decode(mu, s[torch.randperm(len(x), generator=seeded())])
    for place, measure in zip(places, (advvae.slant, advvae.stroke_thickness)):
        r = correlation(measure(x), measure(swapped))
        place.plot(measure(x), measure(swapped), ".", markersize=2)
        place.set(title=f"{measure.__name__.replace('_', ' ')}, r = {r:.2f}")
        place.set(xlabel="the image that gave z", ylabel="swapped image")
    figure.savefig(Path(folder) / "mnist-codes.png", dpi=110)


# Kills and damaged files by the dozen: python test_advvae.py endurance, some minutes


def endurance(folder, n):
    """Kill a training n times, load 100 n damaged files, and print what came of it."""
    small_run(folder / "whole", "--epochs", "60")
    left = kill_and_resume(folder / "killed", n)
    same = same_weights(weights_of(folder / "killed" / "a.pt"), weights_of(folder / "whole" / "a.pt"))
    print(f"\n{n} kills, {left} checkpoints, all whole; resumed, the end is {'' if same else 'NOT '}bit-equal")
    with mock.patch("torchvision.datasets.MNIST.download", side_effect=RuntimeError("no network")):
        print("{}; {:.0f} MiB more memory than for whole files".format(*fuzz(folder / "fuzz", 50 * n)))


if __name__ == "__main__":
    measurements = {"departures": departures, "probe": strong_probe, "classes": classes, "picture": picture,
                    "exercise": run_exercise}  # fmt: skip
    if sys.argv[1:2] == ["endurance"]:
        with tempfile.TemporaryDirectory() as folder:
            endurance(Path(folder), 50)
    elif sys.argv[1:] and sys.argv[1] in measurements:
        measurements[sys.argv[1]](*sys.argv[2:])
    else:
        benchmark(sys.argv[1] if len(sys.argv) > 1 else "cuda" if torch.cuda.is_available() else "cpu")
