"""The facts of the method, one a test: python -m pytest -q. No network, no MNIST, nothing timed.

Run as a script, python test_advvae.py, this file is the benchmark; with a word behind it, what the README says.
"""

import copy
import io
import math
import re
import statistics
import struct
import subprocess
import sys
import time
import types
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import matplotlib
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.distributions import Bernoulli, Normal, kl_divergence
from torch.utils.flop_counter import FlopCounterMode

import advvae
from advvae import AdvVAE, Adversary, Config, Data, TripleSampler

HERE = Path(__file__).parent
pytestmark = pytest.mark.filterwarnings("error")

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

@pytest.fixture
def nets():
    """Untrained networks, the same each time."""
    torch.manual_seed(0)
    return AdvVAE(), Adversary(10)

@pytest.fixture
def triple(data):
    return next(iter(TripleSampler(data.images, data.labels, 32, seeded())))

def step(model, adversary, triple, config, generator, rate=1e-3, adversary_rate=1e-3):
    """train_step with new optimizers."""
    optimizers = torch.optim.Adam(model.parameters(), rate), torch.optim.Adam(adversary.parameters(), adversary_rate)
    return advvae.train_step(model, adversary, *optimizers, triple, config, generator)

def small_typeset(monkeypatch, n=300, module=advvae):
    """load_data("typeset") has n images."""
    full = module.typeset
    monkeypatch.setattr(module, "typeset", lambda count, *rest: full(min(count, n), *rest))

def command(folder, *more):
    """A command line that trains on typeset and writes into folder only."""
    return ["--dataset", "typeset", "--device", "cpu", "--checkpoint", str(folder / "a.pt"),
            "--figures-dir", str(folder / "figures"), *more]  # fmt: skip

def refused(capsys, argv):
    """main must refuse argv: exit code 2, and one line on stderr, which is returned."""
    with pytest.raises(SystemExit) as exit:
        advvae.main(argv)
    message = capsys.readouterr().err
    assert exit.value.code == 2 and message.count("\n") == 1 and message.startswith("advvae.py: ")
    return message

# 1. Networks
def test_codes_and_images_have_their_shapes_and_ranges(nets, data):
    """encode gives s, mu and logvar; decode gives pixels in [0, 1]; sizes of the codes are free."""
    model = AdvVAE(s_dim=3, z_dim=5)
    s, mu, logvar = model.encode(data.images[:7])
    assert s.shape == (7, 3) and mu.shape == logvar.shape == (7, 5)
    x = model.decode(100 * mu, 100 * s)
    assert x.shape == (7, 1, 28, 28) and 0 <= x.min() and x.max() <= 1
    assert nets[1](data.images[:7], data.labels[:7]).shape == (7,)

def test_f_z_sees_s_and_the_adversary_the_class(nets, data):
    """The same images with another s have another q(z | x, s), with another class id another verdict."""
    x, s = data.images[:8], torch.randn(8, Config.s_dim, generator=seeded())
    for one, other in zip(nets[0].f_z(x, s), nets[0].f_z(x, s.flip(0))):
        assert not torch.isclose(one, other).all(dim=1).any()
    one, other = (nets[1].eval()(x, torch.full((8,), c)) for c in (0, 1))
    assert (one - other).abs().min() > 1e-6 and (one - other).std() > 1e-4  # how much depends on the image

@torch.no_grad()
def test_z_scales_the_decoders_channels(nets):
    """Where its first number sets all scales at 7x7, or all at 14x14, to 0, nothing else of z and s shows."""
    model, (z, s) = nets[0], torch.randn(2, 8, 16, generator=seeded())
    for channels in (slice(16), slice(16, 32)):
        for p in model.decoder.scales.parameters():
            p.zero_()
        model.decoder.scales.weight[channels, 0] = -1
        z[:, 0] = 0
        assert model.decode(z, s).std(dim=0).max() > 1e-3
        z[:, 0] = 1
        assert model.decode(z, s).std(dim=0).max() < 1e-6

def test_reparameterize_draws_from_q_and_gradients_pass():
    """z has mean mu and standard deviation exp(logvar/2); its gradients are 1 and (z - mu)/2."""
    mu, logvar = torch.tensor([[3.0, 3.0], [0.0, -2.0]]).unsqueeze(1).repeat(1, 50_000, 1).requires_grad_()
    z = AdvVAE().reparameterize(mu, logvar, seeded())
    torch.testing.assert_close(z.mean(0), torch.tensor([3.0, 3.0]), atol=0.02, rtol=0)
    torch.testing.assert_close(z.std(0), torch.exp(torch.tensor([0.0, -1.0])), atol=0, rtol=0.02)
    of_mu, of_logvar = torch.autograd.grad(z.sum(), (mu, logvar))
    torch.testing.assert_close(of_mu, torch.ones_like(z))
    torch.testing.assert_close(of_logvar, (z - mu) / 2, rtol=1e-3, atol=1e-5)

def test_the_adversarys_features_are_lipschitz(nets):
    """Spectral norm: each layer's largest singular value is about 1, however large its weights were."""
    adversary = nets[1].train().requires_grad_(False)
    for p in adversary.parameters():
        p.mul_(50)
    for _ in range(30):  # the power iteration runs at each call in train mode
        adversary(torch.rand(4, 1, 28, 28, generator=seeded()), torch.arange(4))
    layers = [layer for layer in adversary.features.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    norms = [torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() for layer in layers]
    assert norms == [pytest.approx(1, abs=0.2)] * len(layers) != []

# 2. Triples
def epochs_of(labels, batch_size, epochs):
    """TripleSampler on images that carry their own index: labels, i1, i1_same, i2 and id2 of all epochs."""
    labels, images = torch.tensor(labels), torch.arange(len(labels)).view(-1, 1, 1, 1) * torch.ones(1, 28, 28)
    sampler = TripleSampler(images, labels, batch_size, seeded())
    batches = [(*(x[:, 0, 0, 0].long() for x in b[:3]), b[3]) for _ in range(epochs) for b in sampler]
    return labels, *(torch.cat(column) for column in zip(*batches))

def test_every_image_is_x1_once_an_epoch(data):
    """The last, smaller batch included; in another order next epoch; the same again from the same seed."""
    one, again = ([*TripleSampler(data.images, data.labels, 250, seeded())] for _ in range(2))
    assert [len(x1) for x1, *_ in one] == [250, 250, 100]
    assert all(torch.equal(x, y) for xs, ys in zip(one, again) for x, y in zip(xs, ys))
    first, second = epochs_of([0, 1, 2] * 11, 8, epochs=2)[1].split(33)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(33)) != first.tolist()
    assert not torch.equal(first, second)

def test_x1_same_is_uniform_over_x1s_class():
    """Classes of any sizes, one image included, with labels that are any integers in any order."""
    labels, i1, same, _, _ = epochs_of([7] * 5 + [-3] * 20 + [1000] + [7] * 5, 10, epochs=400)
    assert torch.equal(labels[i1], labels[same])
    assert (same.bincount() - 400).abs().max() < 5 * 400**0.5
    assert abs((same == i1).float().mean() - 3 / 31) < 0.01  # x1 itself as often as any other of its class

def test_x2_is_uniform_and_independent():
    """x2 is any image, with its own label as id2; it has x1's class no more often than by chance."""
    labels, i1, same, i2, id2 = epochs_of([0] * 30 + [1] * 10, 16, epochs=300)
    assert torch.equal(labels[i2], id2) and (i2.bincount() - 300).abs().max() < 5 * 300**0.5
    assert abs((labels[i1] == id2).float().mean() - (0.75**2 + 0.25**2)) < 0.02
    assert all(abs((i == i2).float().mean() - 1 / 40) < 0.007 for i in (i1, same))

# 3. The four terms
def test_terms_agree_with_torch_distributions():
    """Nats per image: Gaussians on pixels in [-1, 1] but for a constant, two normals, Bernoulli verdicts."""
    (x, decoded), (mu, logvar) = (torch.rand(2, 6, *size, generator=seeded()) for size in ((1, 28, 28), (4,)))
    nll = -Normal(2 * decoded - 1, 0.5**0.5).log_prob(2 * x - 1) - 0.5 * math.log(math.pi)
    kl = kl_divergence(Normal(mu, torch.exp(logvar / 2)), Normal(0.0, 1.0))
    verdicts, fakes = torch.randn(6, generator=seeded(1)), torch.randn(12, generator=seeded(2))
    passes = -Bernoulli(logits=verdicts).log_prob(torch.ones(6)).mean()
    found = -Bernoulli(logits=fakes).log_prob(torch.zeros(12)).mean()
    torch.testing.assert_close(advvae.reconstruction_term(x, decoded), nll.sum(dim=(1, 2, 3)).mean())
    torch.testing.assert_close(advvae.swap_term(x, decoded), nll.sum(dim=(1, 2, 3)).mean())
    torch.testing.assert_close(advvae.kl_term(mu, logvar), kl.sum(dim=1).mean())
    torch.testing.assert_close(advvae.adversary_term(verdicts), passes)
    torch.testing.assert_close(advvae.prior_term(verdicts), passes)
    torch.testing.assert_close(advvae.adversary_loss(verdicts, fakes), passes + found)

# 4. Training

TERMS = ("reconstruction", "kl", "swap", "adversary", "prior")

def weighted(*weights, **settings):
    return Config(**{f"{name}_weight": float(weight) for name, weight in zip(TERMS, weights)}, **settings)

def same(one, other):
    """Which of their weights two networks share."""
    return {torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters())}

@pytest.mark.parametrize("name, networks, sources", [
    ("reconstruction", {"f_s", "f_z", "decoder"}, {"x1"}),
    ("kl", {"f_s", "f_z"}, {"x1"}),
    ("swap", {"f_s", "f_z", "decoder"}, {"x1", "x1_same"}),
    ("adversary", {"f_s", "f_z", "decoder"}, {"x1", "x2"}),
    ("prior", {"f_s", "decoder"}, {"x2"}),
])  # fmt: skip
def test_each_term_reaches_its_networks_and_images_only(name, networks, sources, nets, triple, monkeypatch):
    """Term 2 reaches f_s through x1_same; term 3 reaches z1 and s2; term 4 can't reach f_z; and so on."""
    images = {key: x.clone().requires_grad_() for key, x in zip(("x1", "x1_same", "x2"), triple)}
    monkeypatch.setattr(advvae, "adversary_loss", lambda real, fakes: fakes.sum())  # or x2 is reached by that
    step(*nets, (*images.values(), triple[3]), weighted(*(name == term for term in TERMS)), seeded())
    reached = {key.split(".")[0]: set() for key, _ in nets[0].named_parameters()}
    for key, p in nets[0].named_parameters():
        reached[key.split(".")[0]].add((p.grad != 0).any().item())
    assert reached == {network: {network in networks} for network in reached}
    assert {key for key, x in images.items() if x.grad is not None and x.grad.any()} == sources

def test_terms_are_of_the_codes_that_figure_1_says(nets, triple):
    """Each computed by hand from encode, decode and Adv, on the networks as they were before the step."""
    for p in nets[0].parameters():
        p.data *= 2  # so that all that goes in makes a difference
    (model, adversary), generator, (x1, x1_same, x2, id2) = copy.deepcopy(nets), seeded(5), triple
    measures = step(*nets, triple, Config(), seeded(5))
    s1, mu, logvar = model.encode(x1)
    s1_same, s2 = model.f_s(x1_same), model.f_s(x2)
    z1 = model.reparameterize(mu, logvar, generator)
    z = torch.randn(z1.shape, generator=generator)
    judge = lambda z: advvae.adversary_term(adversary.eval()(model.decode(z, s2), id2))  # noqa: E731
    wanted = advvae.reconstruction_term(x1, model.decode(z1, s1)), advvae.kl_term(mu, logvar)
    wanted += advvae.reconstruction_term(x1, model.decode(z1, s1_same)), judge(z1), judge(z)
    for name, value in zip(TERMS, wanted):
        torch.testing.assert_close(measures[name], value.detach(), rtol=1e-4, atol=1e-5, msg=name)

def test_weights_scale_their_terms(nets, triple):
    """The step's gradient is the weighted sum of the terms' own; nothing is left of an earlier step's."""

    def gradients(*weights):
        both = model, adversary = copy.deepcopy(nets)
        for p in [*model.parameters(), *adversary.parameters()]:
            p.grad = torch.full_like(p, 1e6)
        step(*both, triple, weighted(*weights), seeded())
        assert all(p.grad.abs().max() < 1e5 for p in adversary.parameters())
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    weights = torch.tensor([0.3, 2.0, 0.7, 5.0, 4.0])
    wanted = sum(weight * gradients(*one) for weight, one in zip(weights, torch.eye(5)))
    torch.testing.assert_close(gradients(*weights), wanted, rtol=1e-3, atol=1e-4)

@pytest.mark.parametrize("name", TERMS)
def test_a_weight_of_0_takes_out_its_term_and_nothing_else(name, nets, triple):
    """All terms are still measured, and the adversary looks on: it learns the same from the same fakes."""
    model, adversary = copy.deepcopy(nets)
    whole = step(model, adversary, triple, Config(), seeded())
    assert step(*nets, triple, replace(Config(), **{f"{name}_weight": 0.0}), seeded()) == whole
    assert same(nets[1], adversary) == {True} and False in same(nets[0], model)

def test_each_step_moves_its_own_side_only(nets, triple):
    """One moves all of f_s, f_z and decoder, the other all of the adversary, whose loss falls."""
    old = copy.deepcopy(nets)
    step(*nets, triple, Config(), seeded(), adversary_rate=0)
    assert same(old[0], nets[0]) == {False} and same(old[1], nets[1]) == {True}
    between = copy.deepcopy(nets)
    losses = [step(*nets, triple, Config(), seeded(), rate=0)["adversary_loss"] for _ in range(29)]
    assert same(between[0], nets[0]) == {True} and same(between[1], nets[1]) == {False}
    assert losses[-1] < 0.8 * losses[0]

def test_the_adversary_sees_the_real_x2_and_both_fakes(nets, triple):
    """All with id2; it stands still while terms 3 and 4 ask, then learns from those very images, detached."""
    calls = {False: [], True: []}  # does it learn: images, ids, verdicts

    def look(net, inputs, verdicts):
        calls[net.training or any(p.requires_grad for p in net.parameters())].append((*inputs, verdicts))

    nets[1].register_forward_hook(look)
    measures = step(*nets, triple, Config(), seeded())
    (fakes, ids, _), (x, learned, verdicts) = (map(torch.cat, zip(*calls[key])) for key in (False, True))
    assert torch.equal(x, torch.cat([triple[2], fakes])) and fakes.requires_grad and not x.requires_grad
    assert torch.equal(ids, triple[3].repeat(2)) and torch.equal(learned, triple[3].repeat(3))
    real, fake = verdicts.detach().split([32, 64])
    torch.testing.assert_close(measures["adversary_loss"], advvae.adversary_loss(real, fake))
    assert measures["right_on_real"] == (real > 0).float().mean()
    assert measures["right_on_fakes"] == (fake < 0).float().mean()

def test_the_fast_path_has_the_plain_paths_losses(nets, triple):
    """channels_last agrees with the plain layout to 1e-4, bfloat16 with float32 to 2 %; terms are float32."""
    losses = []
    for layout, fast in ((torch.contiguous_format, 0), (torch.channels_last, 0), (torch.channels_last, 1)):
        model, adversary = (net.to(memory_format=layout) for net in copy.deepcopy(nets))
        with torch.autocast("cpu", torch.bfloat16, enabled=fast == 1):
            losses.append(list(step(model, adversary, triple, Config(), seeded()).values())[:6])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses[2], losses[0], rtol=0.02, atol=1e-3)
    assert losses[2] != losses[0]

def test_same_seed_same_weights(data):
    """Two runs with one seed end bit-equal, history and all; torch's own generator is left where it was."""
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    a, b = (advvae.train(Config(epochs=1, batch_size=100), data) for _ in range(2))
    assert torch.equal(torch.rand(3), wanted)
    assert same(a, b) == {True} and a.history == b.history

@pytest.fixture
def steps(monkeypatch):
    """What train gave to each of its steps, none of which learns; the rates and the precision there."""
    seen = []

    def look(optimizer, adversary_optimizer, triple, **given):
        rates = [o.param_groups[0]["lr"] for o in (optimizer, adversary_optimizer)]
        precision = (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        seen.append(types.SimpleNamespace(x1=triple[0], rates=rates, precision=precision, **given))
        return {"kl": torch.tensor(float(len(triple[0])))}

    monkeypatch.setattr(advvae, "train_step", look)
    return seen

def test_another_seed_changes_the_weights_and_the_order(data, steps):
    """Weights at the start and order of the images; a step's random numbers come from the same generator."""
    a, b, c = (advvae.train(Config(epochs=1, seed=seed, batch_size=600), data) for seed in (0, 0, 1))
    assert same(a, b) == {True} and same(a, c) == {False}
    assert torch.equal(steps[0].x1, steps[1].x1) and not torch.equal(steps[0].x1, steps[2].x1)
    assert [s.generator.initial_seed() for s in steps] == [0, 0, 1]

def test_the_learning_rate_is_constant_for_half_of_the_steps_then_falls_to_0(data, steps):
    """Linearly, for both optimizers."""
    advvae.train(Config(epochs=4, batch_size=60, learning_rate=1.0), data)
    wanted = [min(1, 2 * (1 - (step + 0.5) / 40)) for step in range(40)]
    assert [given.rates for given in steps] == [pytest.approx([rate, rate]) for rate in wanted]

def test_an_epochs_means_are_over_images(data, steps):
    """Not over steps, the last of which has fewer images. With bfloat16, layers compute in it."""
    for bfloat16, precision in enumerate((torch.float32, torch.bfloat16)):
        history = advvae.train(Config(epochs=2, batch_size=250, bfloat16=bfloat16), data).history
        assert history == [{"kl": pytest.approx((2 * 250**2 + 100**2) / 600)}] * 2
        assert steps[-1].precision == precision

def test_importing_does_nothing(tmp_path):
    """`import advvae` only defines: no output, no files, and torch's random numbers stay where they were."""
    code = f"import sys, torch; sys.path.insert(0, {str(HERE)!r}); sys.dont_write_bytecode = True\n"
    code += "old = torch.get_rng_state(); import advvae; assert torch.equal(torch.get_rng_state(), old)"
    ended = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True)
    assert (ended.returncode, ended.stdout, ended.stderr, [*tmp_path.iterdir()]) == (0, b"", b"", [])

def test_a_loss_that_is_not_finite_stops_the_run(data):
    """With a message that says in which epoch, and what to try."""
    with pytest.raises(advvae.UserError, match=r"epoch 1 .*(nan|inf).*lower --learning-rate"):
        advvae.train(Config(epochs=2, learning_rate=1e9, batch_size=60), data)

# 5. typeset
def test_typeset_repeats(monkeypatch):
    """Whatever torch's seed; render gives the digits back; no test digit is a training digit."""
    small_typeset(monkeypatch)
    data, _, again = advvae.load_data("typeset"), torch.manual_seed(7), advvae.load_data("typeset")
    both = torch.cat([data.images, data.test_images]).flatten(1)
    assert len(both.unique(dim=0)) == len(both) == 600
    assert torch.equal(again.images, data.images) and torch.equal(again.test_images, data.test_images)
    assert torch.equal(advvae.render(data.labels, data.factors), data.images)

def test_typesets_factors_move_what_they_name(data):
    """Slant and thickness are the measured ones, size is the ink's height, shift 1 moves it by a pixel."""
    x, f = data.images, data.factors
    assert correlation(advvae.slant(x), f["slant"]) > 0.95
    assert (advvae.stroke_thickness(x) - f["thickness"]).abs().mean() < 0.4  # pixels
    assert ((x.amax(dim=(1, 3)) > 0.5).sum(1) - f["size"]).abs().mean() < 1.5  # thick strokes stick out
    for name, axis in (("shift_x", 3), ("shift_y", 2)):
        moved = advvae.render(data.labels, f | {name: f[name] + 1})
        assert (moved - x.roll(1, axis)).abs().mean() < 0.002
    upright = advvae.slant(advvae.render(data.labels, f | {"slant": 0 * f["slant"]}))
    means = torch.stack([upright[f["font"] == font].mean() for font in range(20)])
    assert means.abs().max() < 0.12  # also of faces that lean by themselves

def test_typesets_factors_say_nothing_of_the_class():
    """No factor differs between the digits, so a z that holds the factors alone is at chance."""
    _, labels, factors = advvae.typeset(5000, seeded(3))
    for name, values in factors.items():
        means = torch.stack([values[labels == c].float().mean() for c in range(10)])
        assert means.std() < 0.1 * values.float().std(), name

def test_typeset_sets_any_characters():
    """Wide ones fit their cell as tall ones do; faces that lack one of the characters are left out."""
    images, labels, factors = advvae.typeset(200, seeded(), "AWi-")
    assert torch.equal(images, advvae.render(labels, factors, "AWi-")) and len(labels.unique()) == 4
    inside, thickness = advvae.glyph_atlas("AWi-")  # (faces, 4, 64, 64), (faces,)
    assert max(inside[..., (0, -1), :].max(), inside[..., (0, -1)].max()) < 0 < inside.amax((2, 3)).min()
    assert 0 < len(advvae.glyph_atlas("Ж")[1]) < len(thickness) == len(advvae.glyph_atlas("0123456789")[1])

def test_no_two_characters_look_alike(monkeypatch):
    """All are in 16 faces, and each has its own shape (seen in one face) once all are equally tall or wide."""
    fonts = [f"{matplotlib.get_data_path()}/fonts/ttf/{face}.ttf" for face in advvae.FACES]
    known = [set(advvae.font_manager.get_font(font).get_charmap()) for font in fonts]
    assert sum(set(map(ord, advvae.CHARACTERS)) <= characters for characters in known) == 16
    monkeypatch.setattr(advvae, "FACES", {"DejaVuSerif": 0})
    ink = (20 * advvae.glyph_atlas.__wrapped__(advvae.CHARACTERS)[0][0] + 0.5).clamp(0, 1).flatten(1)  # 20 pixels tall
    assert len(ink) == 267 and torch.pdist(ink).square().min() > 0.05 * ink.square().sum(dim=1).median()

# 6. What z and s know
class Known(nn.Module):
    """A perfect model of data: s is the class, z the true factors, and the decoder draws what they say.

    Besides, z tells of the class: in 4 dimensions loudly in mu, but drowned in z's noise; in 3 dimensions
    better, but each class has 8 places there, scattered among those of the others."""

    def __init__(self, data):
        super().__init__()
        self.index = {x.numpy().tobytes(): i for i, x in enumerate([*data.images, *data.test_images])}
        labels, generator = torch.cat([data.labels, data.test_labels]), seeded(1)
        factors = [torch.cat([f, data.test_factors[name]]) for name, f in data.factors.items()]
        factors = torch.stack(factors, dim=1)
        self.names, self.middle, self.spread = list(data.factors), factors.mean(0), factors.std(0)
        loud, places = (torch.randn(10, *size, generator=generator) for size in ((1, 4), (8, 3)))
        self.means = torch.cat([loud.expand(-1, 8, -1), 2 * places], dim=2)  # (10, 8, 7)
        of_class = self.means[labels, torch.randint(8, labels.shape, generator=generator)]
        self.s = F.one_hot(labels).float()
        self.mu = torch.cat([(factors - self.middle) / self.spread, of_class], 1)
        self.std = torch.tensor([0.01] * 6 + [4.0] * 4 + [0.4] * 3)
        self.decoded = []  # each z and s that decode was given

    reparameterize = AdvVAE.reparameterize

    def encode(self, x):
        i = [self.index[image.tobytes()] for image in x.numpy()]
        return self.s[i], self.mu[i], 2 * self.std.log().expand(len(x), -1)

    def decode(self, z, s):
        self.decoded.append((z, s))
        factors = dict(zip(self.names, (self.middle + self.spread * z[:, :6]).T))
        factors["font"] = factors["font"].round().long().clamp(0, 19)
        return advvae.render(s.argmax(1), factors)

@pytest.fixture(scope="module")
def known():
    """Known, its data and what evaluate says of them."""
    data = digits(3000, test=1000)
    model = Known(data)
    return model, data, advvae.evaluate(model, data)

def test_evaluate_on_codes_with_known_answers(known):
    """s is the class, z the factors, decodings are perfect."""
    _, data, r = known
    assert r["class from s"] == 1
    assert r["class by chance"] == pytest.approx(max(data.test_labels.bincount()) / 1000)
    for kind in ("swapped", "drawn", "prior", "real"):
        assert r[f"right class, {kind}"] > 0.7 and 0.1 < r[f"Frechet distance, {kind}"] < 1
    assert r["squared error, decoded"] < 1e-4 and r["squared error, swapped"] < 1e-4
    for name in ("slant", "thickness"):
        assert r[f"{name} from z's source, r"] > 0.7 and abs(r[f"{name} from s's source, r"]) < 0.2
    for name in ("slant", "thickness", "size", "shift_x", "shift_y"):
        assert 0.99 < r[f"true {name} from z, R2"] < 0.99999 and abs(r[f"true {name} from s, R2"]) < 0.05

def test_sampled_z_is_probed_by_a_strong_probe(known):
    """It finds in draws nearly what can be found, by Bayes' rule, and in mu what z's noise drowns."""
    model, data, r = known
    draws = model.mu[3000:, None, None, 6:] + model.std[6:] * torch.randn(1000, 1, 1, 7, generator=seeded())
    log_p = Normal(model.means, model.std[6:]).log_prob(draws).sum(3).logsumexp(2)  # (1000, 10)
    best = (log_p.argmax(1) == data.test_labels).float().mean()
    assert best - 0.12 < r["class from z"] < best + 0.03 < 0.9
    assert r["class from mu"] > 0.99

def test_what_evaluate_decodes(known):
    """Of test images: mu with its own s; mu and a draw of z with the s of one of another class; z ~ N(0, I)."""
    model, data, r = known
    mu, s = model.mu[3000:], model.s[3000:]
    own, other = sorted((s2 for z, s2 in model.decoded if z.equal(mu)), key=lambda s2: not s2.equal(s))
    random = (z for z, _ in model.decoded if not z.equal(mu))
    drawn, prior = sorted(random, key=lambda z: ((z - mu) / model.std).std())
    assert torch.equal(own, s) and not (other == s).all(dim=1).any() and other.sum(0).min() > 50
    assert any(z is drawn and s2.equal(other) for z, s2 in model.decoded)
    for draws in ((drawn - mu) / model.std, prior):
        assert (draws.std(0) - 1).abs().max() < 0.1 and draws.mean(0).abs().max() < 0.15
    kl = advvae.kl_term(mu, 2 * model.std.log().expand(1000, -1)).item()
    assert r["KL of z, nats"] == pytest.approx(kl, rel=1e-5)

def test_what_is_fitted_is_fitted_on_the_training_images(known):
    """There all labels are one off and all factors negated: nothing is right on the test images."""
    data = known[1]
    negated = {name: -factor for name, factor in data.factors.items()}
    r = advvae.evaluate(Known(data), replace(data, labels=(data.labels + 1) % 10, factors=negated))
    assert r["class from s"] == 0 and r["true slant from z, R2"] < 0
    assert max(r[f"right class, {kind}"] for kind in ("real", "swapped", "prior")) < 0.1
    assert max(r["class from z"], r["class from mu"]) < 0.1

def test_evaluate_repeats_and_leaves_torchs_generator_alone(nets, data):
    """Called twice it gives one and the same table; the caller's own random numbers go on as before."""
    torch.manual_seed(7)
    first = advvae.evaluate(nets[0], data)
    after = torch.rand(3)
    assert advvae.evaluate(nets[0], data) == pytest.approx(first, abs=1e-5)  # LAPACK may differ in a last bit
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), after)

def test_frechet_distance_is_that_of_two_gaussians():
    """Both diagonal, turned or not: |difference of means|^2 + |difference of standard deviations|^2."""
    a, b = torch.randn(2, 50_000, 3, generator=seeded())
    mean, std = torch.tensor([1.0, 0.0, -2.0]), torch.tensor([3.0, 1.0, 0.5])
    for turn in (torch.eye(3), torch.linalg.qr(torch.randn(3, 3, generator=seeded()))[0]):
        distance = advvae.frechet_distance(2 * a @ turn, (mean + std * b) @ turn).item()
        assert distance == pytest.approx((mean.square() + (std - 2).square()).sum().item(), rel=0.03)
    assert abs(advvae.frechet_distance(a, a)) < 1e-6

def test_slant_and_thickness_measure_known_strokes():
    """A bar 3 pixels wide is 3 pixels thick, at any height; sheared by 1/2 it has slant 1/2."""
    bar, leaning = torch.zeros(2, 1, 1, 28, 28)
    bar[..., 4:24, 12:15] = 1
    for y in range(4, 24):
        x = round(13 - 0.5 * (y - 13.5))
        leaning[..., y, x - 1 : x + 2] = 1
    assert advvae.stroke_thickness(bar).item() == pytest.approx(3 / (1 + 3 / 20), rel=0.05)  # ends count, too
    assert abs(advvae.slant(bar).item()) < 1e-4
    assert advvae.slant(leaning).item() == pytest.approx(0.5, abs=0.02)

# Learning
def test_it_learns():
    """A short training: s tells the class, swaps obey s, slant follows z; untrained, none of it."""
    data, _ = digits(4000, test=1000), torch.manual_seed(0)
    untrained = advvae.evaluate(AdvVAE(), data)
    trained = advvae.evaluate(advvae.train(Config(epochs=4, batch_size=64), data), data)
    wanted = {"class from s": 0.9, "right class, swapped": 0.75, "right class, prior": 0.7,
              "slant from z's source, r": 0.7, "true slant from z, R2": 0.6}  # fmt: skip
    for name, threshold in wanted.items():
        assert untrained[name] < threshold < trained[name], name
    assert trained["class from z"] < 0.6 and abs(trained["slant from s's source, r"]) < 0.3
    assert trained["squared error, decoded"] < 0.05 < untrained["squared error, decoded"]

def test_the_adversary_makes_the_decoder_obey_s():
    """At a plain VAE's KL weight terms 1 and 2 let swaps ignore s; with term 3 or 4 they obey it."""
    data, obeyed = digits(4000, test=1000), {}
    x, y, f = data.test_images, data.test_labels, data.test_factors
    truth, other = advvae.render(y.roll(1), f), y.roll(1) != y
    for weights in ((0, 0), (30, 0), (0, 30)):
        model = advvae.train(weighted(0.2, 1, 1, *weights, epochs=2, batch_size=64), data)
        s, mu, _ = model.encode(x)
        swapped = model.decode(mu, s.roll(1, dims=0))
        to_truth, to_x = ((swapped - image).square().sum(dim=(1, 2, 3)) for image in (truth, x))
        obeyed[weights] = (to_truth < to_x)[other].float().mean()  # x2's class in x1's style, rather than x1
    assert obeyed[0, 0] < 0.45 and min(obeyed[30, 0], obeyed[0, 30]) > 0.55

# The program
@pytest.fixture
def brief(monkeypatch):
    """main trains on 300 typeset digits, and neither evaluates nor draws."""
    small_typeset(monkeypatch)
    for name in ("evaluate", "plot_curves", "save_grid"):
        monkeypatch.setattr(advvae, name, lambda *_: None)

@pytest.mark.parametrize("flag, value, hint", [
    ("kl-weight", -1, "kl_weight is"), ("swap-weight", "nan", "swap_weight is"), ("seed", 2**63, "seed is"),
    ("prior-weight", "inf", "prior_weight"), ("batch-size", 0, "batch_size is"), ("epochs", 0, "epochs is"),
    ("epochs", "1.5", "epochs"), ("no-such-flag", 1, "no-such-flag"), ("dataset", "imagenet", "kmnist"),
    ("device", "abacus", "--device cpu"), ("device", "cuda", "--device cpu"),
    ("figures-dir", __file__, __file__), ("checkpoint", f"{__file__}/a.pt", __file__)])  # fmt: skip
def test_bad_settings_are_refused_in_one_line(flag, value, hint, tmp_path, monkeypatch, capsys):
    """Exit code 2, what is wrong, and nothing trained."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(advvae, "train", mock.Mock())
    assert hint in refused(capsys, command(tmp_path, f"--{flag}", str(value))) and not advvae.train.called

def test_help_names_every_flag_and_its_default(capsys):
    """Each field of Config is a flag."""
    with pytest.raises(SystemExit):
        advvae.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for name, default in {"dataset": "auto", "checkpoint": "advvae.pt", **asdict(Config())}.items():
        assert f"--{name.replace('_', '-')} {name.upper()} default {default} " in said

def test_inline_metadata_equals_requirements():
    """`uv run advvae.py` and `pip install -r requirements.txt` install the same."""
    dependencies = (HERE / "advvae.py").read_text().split("# ///")[1].split("dependencies")[1]
    assert re.findall(r'"([^"]+)"', dependencies) == (HERE / "requirements.txt").read_text().split()

NOISE = torch.randint(256, (50, 28, 28), generator=seeded())
BOMB = type("Bomb", (), {"__reduce__": lambda self: (exec, ("raise SystemExit('it ran')",))})()
Z_PLUS_S = torch.arange(100.0).view(10, 10).T  # rows share z = 0, 1, ..., 9, columns s = 0, 10, ..., 90

def idx(array):
    """The content of an IDX file of bytes."""
    header = struct.pack(f">4B{array.dim()}I", 0, 0, 8, array.dim(), *array.shape)
    return header + bytes(array.flatten().tolist())

def write_mnist(folder, train=NOISE[:30], test=NOISE[30:]):
    """These images as MNIST's four files under folder, of the classes 3, 9 and 5 in turn; where they are."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for part, images in (("train", train), ("t10k", test)):
        labels = torch.tensor([3, 9, 5] * 10)[: len(images)]
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            (raw / f"{part}-{kind}-ubyte").write_bytes(idx(array))
    return raw

@pytest.fixture
def download(monkeypatch):
    """Stands for torchvision's download of a file; it fails."""
    fake = mock.Mock(side_effect=RuntimeError("no\nnetwork"))
    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", fake)
    return fake

def mnist(folder, *more):
    return command(folder, "--dataset", "mnist", "--data-dir", str(folder), *more)

def test_mnist_is_read_from_torchvisions_folder(tmp_path, download, capsys):
    """Pixels from 0 to 1, no network if the four files are there; they are downloaded if not."""
    download.side_effect = lambda *_, **__: write_mnist(tmp_path)
    for calls in (4, 0):
        download.reset_mock()
        read = advvae.load_data("mnist", tmp_path)
        assert torch.equal(read.images[:, 0], NOISE[:30] / 255) and read.labels.tolist() == [3, 9, 5] * 10
        assert torch.equal(read.test_images[:, 0], NOISE[30:] / 255) and len(read.test_labels) == 20
        assert f"30 training and 20 test images from {tmp_path}" in capsys.readouterr().out
        assert download.call_count == calls

def test_auto_is_typeset_where_mnist_cannot_be_had(tmp_path, brief, download, capsys):
    """Said loudly, with what to do; and it is MNIST once its files are there."""
    assert advvae.load_data("auto", tmp_path).name == "typeset"
    said = capsys.readouterr().out
    assert all(what in said for what in ("!!!!!", "NOT MNIST", "--dataset typeset", "no\\nnetwork"))
    write_mnist(tmp_path)
    assert advvae.load_data("auto", tmp_path).name == "mnist"

def test_damaged_files_are_refused_in_one_line(tmp_path, capsys):
    """A cut one, and images of 32x32 pixels; the message says where they are."""
    raw = write_mnist(tmp_path)
    for content, hint in ((idx(NOISE[:20])[:-9], str(tmp_path)), (idx(torch.zeros(20, 32, 32).int()), "28")):
        (raw / "t10k-images-idx3-ubyte").write_bytes(content)
        assert hint in refused(capsys, mnist(tmp_path))

@pytest.mark.parametrize("part, change", [
    ("images", lambda x: 2 * x - 1), ("images", lambda x: 255 * x), ("images", lambda x: x.round().byte()),
    ("images", lambda x: torch.where(torch.arange(x.numel()).view_as(x) == 5000, math.nan, x)),
    ("images", lambda x: x.squeeze(1)), ("images", lambda x: x[:, :, :27]), ("images", lambda x: x[:0]),
    ("labels", lambda y: y[1:]), ("labels", lambda y: y.float()), ("labels", lambda y: y - 1),
    ("labels", lambda y: 0 * y)])  # fmt: skip
def test_data_are_refused_that_cannot_be_trained_on(part, change, data):
    """[-1, 1], 0..255, bytes, NaN, no channel, 27x28, none; too few, floats, -1, one class (not int32)."""
    for name in (part, f"test_{part}"):
        with pytest.raises(advvae.UserError, match="images must be|labels must be"):
            replace(data, **{name: change(getattr(data, name))})
    assert replace(data, labels=data.labels.int()).labels.dtype == torch.int64

@pytest.mark.parametrize("images", [NOISE[:3], 0 * NOISE[:30]], ids=["three", "black"])
def test_odd_data_give_no_nan(images, tmp_path):
    """Three images, or all of them black: finite weights, finite results."""
    write_mnist(tmp_path, images, images)
    model = advvae.train(Config(epochs=2), odd := advvae.load_data("mnist", tmp_path))
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert all(map(math.isfinite, advvae.evaluate(model, odd).values()))

def test_a_checkpoint_gives_the_model_back(data, tmp_path):
    """In eval mode, with config, data set and history; what it holds is data only."""
    model = advvae.train(Config(epochs=1, s_dim=3, z_dim=4), data, tmp_path / "a.pt")
    loaded = advvae.load_checkpoint(tmp_path / "a.pt")
    assert not loaded.training and (loaded.config, loaded.history) == (model.config, model.history)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert torch.load(tmp_path / "a.pt", weights_only=True)["history"] == model.history

def test_a_full_disk_is_one_line_and_leaves_the_old_checkpoint(brief, tmp_path, capsys):
    """Writing breaks off in the middle of the file."""
    resource = pytest.importorskip("resource")  # Unix
    advvae.main(command(tmp_path, "--epochs", "1"))
    old, limits = (tmp_path / "a.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, limits[1]))
    try:
        assert "File too large" in refused(capsys, command(tmp_path, "--epochs", "1", "--seed", "1"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "a.pt").read_bytes() == old

@pytest.mark.parametrize("content", [b"", b"my thesis", {"config": BOMB}, {"weights": torch.zeros(3)}])
def test_a_file_that_is_no_checkpoint_is_refused_and_stays(content, tmp_path, monkeypatch, capsys):
    """Before anything is trained; no code in it runs."""
    path = tmp_path / "a.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    old, _ = path.read_bytes(), monkeypatch.setattr(advvae, "train", mock.Mock())
    for flags in ([], ["--resume"]):
        assert "is no checkpoint of this advvae.py" in refused(capsys, command(tmp_path, *flags))
    assert path.read_bytes() == old and not advvae.train.called

def test_a_run_stopped_by_ctrl_c_and_resumed_is_the_uninterrupted_one(brief, tmp_path, monkeypatch, capsys):
    """Exit code 130, a line that names --resume, the whole epochs kept; in the end, the very same weights."""
    settings, real = ("--epochs", "4", "--batch-size", "100", "--z-dim", "5"), advvae.train_step  # 3 an epoch
    advvae.main(command(tmp_path / "whole", *settings))
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        calls = mock.Mock(side_effect=[None] * 7 + [KeyboardInterrupt])
        patch.setattr(advvae, "train_step", lambda **what: calls() or real(**what))
        advvae.main(command(tmp_path / "stopped", *settings))
    assert re.fullmatch(".*--resume.*\n", capsys.readouterr().err)
    assert len(advvae.load_checkpoint(tmp_path / "stopped" / "a.pt").history) == 2
    advvae.main(command(tmp_path / "stopped", "--resume"))
    one, other = (advvae.load_checkpoint(tmp_path / name / "a.pt") for name in ("whole", "stopped"))
    assert one.history == other.history and len(one.history) == 4
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))

def test_resume_takes_more_epochs_and_no_other_setting(brief, tmp_path, capsys):
    """A contradiction is named; auto, or what holds anyway, is none. A new run says that it replaces it."""
    for old in (False, True):
        advvae.main(command(tmp_path, "--epochs", "1", "--batch-size", "100", "--z-dim", "5"))
        assert ("a.pt is replaced" in capsys.readouterr().out) is old
    advvae.main(command(tmp_path, "--resume", "--z-dim", "5", "--kl-weight", "8"))
    advvae.main(command(tmp_path, "--resume", "--epochs", "3", "--dataset", "auto", "--device", "auto"))
    assert re.search(r"learning rate .* 1\.5 epochs", capsys.readouterr().out)
    model = advvae.load_checkpoint(tmp_path / "a.pt")
    assert len(model.history) == 3 and model.config == Config(epochs=3, batch_size=100, z_dim=5)
    for flag in ("--z-dim 6", "--kl-weight 3.0", "--dataset mnist", "--device cuda", "--epochs 2"):
        assert f"{flag} contradicts" in refused(capsys, command(tmp_path, "--resume", *flag.split()))

def test_main_trains_evaluates_and_draws(tmp_path, monkeypatch, capsys):
    """A line an epoch, the table, four PNGs, the swap grid last. Folders are made."""
    small_typeset(monkeypatch)
    advvae.main(command(tmp_path, "--epochs", "2", "--checkpoint", str(tmp_path / "new" / "a.pt")))
    said, pngs = capsys.readouterr().out, (tmp_path / "figures").iterdir()
    assert re.findall(r"\nepoch (\d)/2  reconstruction .* kl .* swap .* s, \d\.\d min left", said) == ["1", "2"]
    assert "What z and s know (typeset, test images)\n  class from z " in said
    names = [path.name for path in sorted(pngs, key=lambda path: path.stat().st_mtime_ns)]
    assert names == [f"typeset-{what}.png" for what in ("curves", "samples", "interpolation", "swap")]
    assert (tmp_path / "new" / "a.pt").exists()

def grid(plot, data):
    """z + s of plot's 10x10 white images, the images left of them and above them, and each class's first test
    image; to these the model gives z = 0, 1, ..., 9 and s = 0, 10, ..., 90."""
    first = torch.stack([data.test_images[data.test_labels.tolist().index(c)] for c in range(10)])
    z = torch.arange(10.0).view(10, 1)
    encode = lambda x: (10 * z, z, None) if torch.equal(x, first) else pytest.fail()  # noqa: E731
    decode = lambda z, s: ((z + s) / 100).view(-1, 1, 1, 1).expand(-1, 1, 28, 28)  # noqa: E731
    model = types.SimpleNamespace(encode=encode, f_s=lambda x: encode(x)[0], decode=decode, z_dim=1)
    with mock.patch.object(torchvision.utils, "make_grid", wraps=torchvision.utils.make_grid) as made:
        plot(model, data, io.BytesIO())
    images = made.call_args.args[0].unflatten(0, (-1, made.call_args.kwargs["nrow"]))
    return 100 * images[1:, 1:, 0, 0, 0], images[1:, 0], images[0, 1:], first

def test_rows_share_z_and_columns_share_s(data):
    """In both grids: to the right s changes, downwards z. Test images, orange and blue, gave them."""
    torch.testing.assert_close(grid(advvae.plot_interpolation, data)[0], Z_PLUS_S)
    white, left, top, first = grid(advvae.plot_swap, data)
    torch.testing.assert_close(white, Z_PLUS_S)
    assert torch.equal(left[:, 0], first[:, 0]) and torch.equal(top[:, 2], first[:, 0])
    assert left[:, 2].sum() < left[:, 0].sum() and top[:, 0].sum() < top[:, 2].sum()

def test_rows_of_the_samples_share_a_z_from_the_prior(data):
    """Each row has another z, which no image gave; columns share the s of the test image above."""
    white, left, top, first = grid(advvae.plot_samples, data)
    z = white - Z_PLUS_S[:1]
    torch.testing.assert_close(z, z[:, :1].expand(10, 10), atol=1e-4, rtol=0)
    assert len(z[:, 0].unique()) == 10 and not left.any() and torch.equal(top[:, 2], first[:, 0])

# The README's exercises
def blocks(language, text):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)

def section(title):
    return (HERE / "README.md").read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]

def exercise(number):
    """What the README says of an exercise: advvae.py with the change made, the commands' flags, the Python."""
    preamble, *exercises = section("Exercises").split("\n### ")
    text = next(text for text in exercises if text.startswith(f"{number}. "))
    source = (HERE / "advvae.py").read_text()
    for change in filter(None, "\n".join(blocks("diff", text)).split("\n\n")):
        old, new = ("".join(re.findall(rf"(?m)^{sign}(.*\n)", change + "\n")) for sign in (r"\-", r"\+"))
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    python = "".join(blocks("python", text))
    commands = re.findall("`python advvae.py ([^`]*)`", text)
    return source, [flags.split() for flags in commands], python and blocks("python", preamble)[0] + python

def shorten(monkeypatch, module):
    """Data sets of 300 images in 2 fonts, trainings of one epoch, pictures without a screen."""
    train = module.train
    monkeypatch.setattr(module, "FACES", dict(list(module.FACES.items())[:2]))
    matplotlib.use("Agg")
    small_typeset(monkeypatch, module=module)
    monkeypatch.setattr(module, "train", lambda config, *rest: train(replace(config, epochs=1), *rest))

@pytest.mark.parametrize("number", range(1, 9))
def test_an_exercise_can_be_done(number, tmp_path, monkeypatch, download, capsys):
    """Its change fits advvae.py as it is, what results trains, and its Python runs; without a network."""
    monkeypatch.chdir(tmp_path)
    source, commands, python = exercise(number)
    module = types.ModuleType("advvae")
    monkeypatch.setitem(sys.modules, "advvae", module)
    exec(source, vars(module))
    shorten(monkeypatch, module)
    for flags in commands:
        module.main(flags)
    exec(python, {})
    assert "nan" not in capsys.readouterr().out

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

# The README's table of departures: python test_advvae.py departures [data folder]
class ClassMaps(Adversary):
    """Conditional as in the authors' code: learned maps of the class, added to the convolution's output."""

    def __init__(self, n_classes):
        super().__init__(n_classes)
        self.maps = nn.Embedding(n_classes, 64 * 5 * 5)
        nn.init.normal_(self.maps.weight, std=0.1)

    def forward(self, x, class_id):
        fold, convolution, *rest = self.features
        h = convolution(fold(x)) + self.maps(class_id).view(-1, 64, 5, 5)
        return self.real(nn.Sequential(*rest)(h)).squeeze(1).float()

def strided(norm=lambda layer: layer):
    """The authors' kind of layers: 4x4 convolutions with stride 2, (N, 1, 28, 28) -> (N, 64 * 4 * 4)."""
    layers = nn.Conv2d(1, 16, 4, 2, padding=1), nn.Conv2d(16, 32, 4, 2, padding=1), nn.Conv2d(32, 64, 4, 2, padding=2)
    return nn.Sequential(*[part for layer in layers for part in (norm(layer), nn.LeakyReLU(0.2))], nn.Flatten())

def strided_f_s(s_dim):
    return nn.Sequential(strided(), nn.Linear(64 * 4 * 4, 128), nn.LeakyReLU(0.2), nn.Linear(128, s_dim))

def strided_f_z(s_dim, z_dim, make=advvae.UnspecifiedEncoder):
    net = make(s_dim, z_dim)
    net.stem, net.hidden1[0] = strided(), nn.Linear(64 * 4 * 4 + s_dim, net.hidden1[0].out_features)
    return net

def strided_adversary(n_classes):
    net, norm = Adversary(n_classes), advvae.spectral_norm
    net.features = nn.Sequential(strided(norm), norm(nn.Linear(64 * 4 * 4, net.real.in_features)), nn.LeakyReLU(0.2))
    return net

class Blind(advvae.UnspecifiedEncoder):
    """f_z that doesn't see s, as in the authors' code."""

    def forward(self, x, s):
        return super().forward(x, 0 * s)

class Unscaled(advvae.Decoder):
    """A decoder whose channels z doesn't scale."""

    def forward(self, z, s):
        return self.to_28x28(self.to_14x14(self.to_7x7(torch.cat([z, s], dim=1)))).float().sigmoid()

DEPARTURES = {
    "the file as it is": {"Config": Config},
    "no spectral norm": {"spectral_norm": lambda layer: layer},
    "class maps in the adversary": {"Adversary": ClassMaps},
    "three strided convolutions": {"SpecifiedEncoder": strided_f_s, "UnspecifiedEncoder": strided_f_z,
                                   "Adversary": strided_adversary},
    "z doesn't scale the decoder's channels": {"Decoder": Unscaled},
    "f_z blind to s": {"UnspecifiedEncoder": Blind},
}  # fmt: skip

def departures(data_dir="data"):
    """Train 6 epochs on MNIST with each change alone, seed 0, and print the README's figures."""
    data = advvae.load_data("mnist", data_dir)
    for name, change in DEPARTURES.items():
        with mock.patch.multiple(advvae, **change):
            r = advvae.evaluate(advvae.train(Config(epochs=6), data), data)
        right = f"{100 * r['right class, swapped']:.1f} / {100 * r['right class, prior']:.1f}"
        frechet = f"{r['Frechet distance, swapped']:.1f} / {r['Frechet distance, prior']:.1f}"
        z, error = f"{100 * r['class from z']:.1f}", f"{r['squared error, decoded']:.4f}"
        print(f"{name}: {z}; {right}; {frechet}; {error}", flush=True)

@pytest.mark.parametrize("name", DEPARTURES)
def test_departures_train(name, data):
    """Each change of the table of departures makes networks that fit together and a loss that is finite."""
    with mock.patch.multiple(advvae, **DEPARTURES[name]):
        assert math.isfinite(advvae.train(Config(epochs=1, batch_size=100), data).history[0]["swap"])

# The benchmark: python test_advvae.py
def seconds_of(function, at_least):
    """The median time of a call of function, in calls of at_least seconds in all."""
    times, begin = [], time.perf_counter()
    while time.perf_counter() - begin < at_least:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)

def trainer(config):
    """A function that takes a training step on a batch of typeset digits, as `train` does."""
    images, labels, _ = advvae.typeset(3 * config.batch_size, seeded())
    triple = next(iter(TripleSampler(images, labels, config.batch_size, seeded())))
    nets = [net.to(memory_format=torch.channels_last) for net in (AdvVAE(), Adversary(10))]
    optimizers = [torch.optim.Adam(net.parameters()) for net in nets]

    def train_step():
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bfloat16 > 0):
            advvae.train_step(*nets, *optimizers, triple, config, seeded())

    return train_step

def benchmark():
    """Print the speed of a training step beside the machine's own. What is compared is timed in turns."""
    types = {"float32": torch.float32}
    if Config.bfloat16:  # elsewhere it is slow beyond measure
        types["bfloat16"] = torch.bfloat16
    steps = {name: trainer(Config(bfloat16=name == "bfloat16")) for name in types}
    matrices = {name: torch.randn(2048, 2048).to(dtype) for name, dtype in types.items()}
    with FlopCounterMode(display=False) as counter:
        steps["float32"]()
    operations, times = counter.get_total_flops() / Config.batch_size, {name: [] for name in types}
    for _ in range(9):  # the first turn warms up
        for name, a in matrices.items():
            times[name].append((seconds_of(lambda a=a: a @ a, 0.3), seconds_of(steps[name], 1)))
    print(f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}, batches of {Config.batch_size}")
    print(f"{operations / 1e6:.1f} million operations a triple")
    for name in types:
        product, step = (statistics.median(column) for column in zip(*times[name][1:]))
        rate, triples = 2 * 2048**3 / product, Config.batch_size / step
        print(f"{name:9} matrix product {rate / 1e9:,.0f} GFLOP/s, training {triples:,.0f} triples/s, "
              f"{60_000 / triples:.1f} s for 60,000, {operations * triples / rate:.0%} of the product's rate")  # fmt: skip

if __name__ == "__main__":
    measurements = {"departures": departures, "exercise": run_exercise}
    measurements.get("".join(sys.argv[1:2]), benchmark)(*sys.argv[2:])
