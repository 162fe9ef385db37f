"""Disentangling factors of variation with adversarial training, in one file.

An annotated implementation of the training procedure of

    Mathieu, Zhao, Sprechmann, Ramesh, LeCun: "Disentangling factors of variation in
    deep representations using adversarial training" (NIPS 2016, arXiv 1611.03383),

with networks and loss weights of its own, to be read beside the paper. "Departure:"
marks what differs from it or from the authors' released code
(MichaelMathieu/factors-variation); small differences in numbers stand in brackets.

From images and class labels, the method learns two codes of an image x:

    s   the *specified* factor: what the label says (which digit it is)
    z   the *unspecified* factors: everything else (slant, stroke width, handwriting)

Nothing ever says what z should be. This is the paper's Figure 1 (x1_same is its x1',
the terms' numbers are ours), with this file's sections in brackets:

    triples [2]     x1;  x1_same, of x1's class;  x2, any image, of class id2

    codes [1]       s1 = f_s(x1)      s1_same = f_s(x1_same)      s2 = f_s(x2)
                    z1 ~ q(z | x1, s1), by f_z        z ~ N(0, I)

    decoder [1]     Dec(z1, s1) ------> is it x1?      term 1 [3], with the KL of z1
                    Dec(z1, s1_same) -> is it x1?      term 2 [3]
                    Dec(z1, s2) ------> adversary      term 3 [3]  | both must pass for
                    Dec(z, s2) -------> adversary      term 4 [3]  | real images of id2

    adversary [1]   learns to tell the real x2 from both fakes, given id2

One step of training goes through this figure once [4]. The rest of the file serves the
method: data [5], measures [6], checkpoint and command line [7], pictures [8].

To train, measure and draw: python advvae.py --epochs 20. For all flags: --help.
"""

# What `uv run advvae.py` installs before it runs this file:
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.3", "torchvision>=0.18", "matplotlib>=3.10.7"]
# ///

import argparse
import io
import json
import math
import socket
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from matplotlib import figure, font_manager, get_data_path
from matplotlib import style, textpath, transforms
from matplotlib.backends.backend_agg import RendererAgg
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

@dataclass
class Config:
    """Every setting of a training. Raises UserError for numbers that can't be meant."""
    epochs: int = 20  # in each of them every training image is x1 once
    batch_size: int = 256  # triples a step (authors' code: 16)
    learning_rate: float = 3e-3  # at the beginning, of both sides (authors' code: 0.01)
    seed: int = 0  # same seed, same CPU: same result
    s_dim: int = 16  # dimensions of s (authors' code: 64)
    z_dim: int = 16  # dimensions of z (authors' code: 512)

    # Compute in 16 bits: 1.5 to 1.7 times as fast on CPUs for which Linux lists
    # avx512_bf16 or amx_bf16, and slower on others.
    bfloat16: bool = False

    # The weights of the terms. Departure: they are our own, and what differs most from
    # the authors' code, whose weights are given here in our units, nats per image. With
    # theirs z keeps the class, and only the adversary makes the decoder ignore it.

    # Term 1's likelihood (authors' code: 0.5).
    # Too little: only term 2 fills z. Too much: s holds all of x1.
    reconstruction_weight: float = 0.5

    # Term 1's KL (authors' code: 0.6; the same for mu, not for logvar: see kl_term).
    # Too little: z keeps the class. Too much: all images of a class look alike.
    kl_weight: float = 8.0

    # Term 2 (authors' code: 1).
    # Too little: s holds the whole image, z nothing. Too much: blur.
    swap_weight: float = 1.0

    # Term 3, adversary, z of another image (authors' code: 7.8).
    # Too little: blur, or the decoder ignores s. Too much: it ignores z.
    adversary_weight: float = 60.0

    # Term 4, adversary, z from the prior (authors' code: 0).
    # Too little: images from random z get worse. Too much: the decoder ignores z.
    prior_weight: float = 30.0

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            least = 1 if field.name in ("epochs", "batch_size", "s_dim", "z_dim") else 0
            in_range = least <= value < 1e18  # false for NaN, too
            if not in_range or value != field.type(value):  # 2.5 is no int
                wanted = f"{field.type.__name__}, {least} or more"
                raise UserError(f"{field.name} is {value}; it must be {wanted}")
            setattr(self, field.name, field.type(value))  # NumPy's numbers become plain

# ---- 1. Networks: f_s, f_z, the decoder, the adversary ------------------------------
# Departure: the authors' encoders share all layers but the last, and halve images of
# 32x32 pixels three times. Here f_s and f_z are two networks, so that f_z can see s,
# and for speed one layer turns 28x28 pixels into 7x7 maps.

class SpecifiedEncoder(nn.Module):
    """f_s: s = f_s(x), real-valued and deterministic.
    x (N, 1, 28, 28) in [0, 1] -> s (N, s_dim)."""

    def __init__(self, s_dim):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, kernel_size=8, stride=4, padding=2)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=3)
        self.hidden = nn.Linear(32 * 5 * 5, 128)
        self.out = nn.Linear(128, s_dim)

    def forward(self, x):
        h = F.leaky_relu(self.conv1(x), 0.2)  # (N, 16, 7, 7)
        h = F.leaky_relu(self.conv2(h), 0.2)  # (N, 32, 5, 5)
        h = h.flatten(1)  # (N, 32 * 5 * 5)
        h = F.leaky_relu(self.hidden(h), 0.2)  # (N, 128)
        return self.out(h)  # (N, s_dim)

class UnspecifiedEncoder(nn.Module):
    """f_z: q(z | x, s) = N(mu, exp(logvar)), each dimension by itself.
    x (N, 1, 28, 28) in [0, 1], s (N, s_dim) -> mu (N, z_dim), logvar (N, z_dim)."""

    def __init__(self, s_dim, z_dim):
        super().__init__()
        self.conv = nn.Conv2d(1, 16, kernel_size=8, stride=4, padding=2)
        self.hidden1 = nn.Linear(16 * 7 * 7 + s_dim, 512)
        self.hidden2 = nn.Linear(512 + s_dim, 256)
        self.out = nn.Linear(256, 2 * z_dim)

    def forward(self, x, s):
        # f_z sees s, as in the paper, so that z can leave out what s already says.
        # Departure: in the authors' code f_z sees x only.
        h = F.leaky_relu(self.conv(x), 0.2)  # (N, 16, 7, 7)
        h = h.flatten(1)  # (N, 16 * 7 * 7)
        h = torch.cat([h, s], dim=1)  # (N, 16 * 7 * 7 + s_dim)
        h = F.leaky_relu(self.hidden1(h), 0.2)  # (N, 512)

        # s enters once more: without that, fewer Dec(z1, s2) show the class of s2.
        h = torch.cat([h, s], dim=1)  # (N, 512 + s_dim)
        h = F.leaky_relu(self.hidden2(h), 0.2)  # (N, 256)

        # The draw of z and the KL are computed in 32 bits, even with bfloat16.
        mu, logvar = self.out(h).float().chunk(2, dim=1)  # each (N, z_dim)
        return mu, logvar

def reparameterize(mu, logvar, generator=None):
    """A draw of z from q(z | x, s) through which gradients reach mu and logvar.

        z = mu + exp(logvar / 2) * eps,   eps ~ N(0, I)

    mu (N, z_dim), logvar (N, z_dim) -> z (N, z_dim)."""
    # Drawn on the CPU: a seed gives the same numbers on every device.
    eps = torch.randn(mu.shape, generator=generator).to(mu.device)
    return mu + torch.exp(logvar / 2) * eps

class Decoder(nn.Module):
    """Dec: x~ = Dec(z, s). z (N, z_dim), s (N, s_dim) -> x~ (N, 1, 28, 28) in [0, 1].

    Departure: s draws, z bends. From s alone come 16 maps of 7x7 numbers; z multiplies
    each number by 1 + gain and adds a shift (feature-wise modulation, Perez et al.
    2018, here number by number), so that one z can do the same to whatever s drew. In
    the authors' code the outputs of a layer of z and of a layer of s are summed."""

    def __init__(self, s_dim, z_dim):
        super().__init__()
        self.draw1 = nn.Linear(s_dim, 128)
        self.draw2 = nn.Linear(128, 16 * 7 * 7)
        self.bend1 = nn.Linear(z_dim, 128)
        self.bend2 = nn.Linear(128, 2 * 16 * 7 * 7)
        self.conv1 = nn.Conv2d(16, 4 * 16, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(16, 4 * 1, kernel_size=5, padding=2)

    def forward(self, z, s):
        # s draws.
        h = F.leaky_relu(self.draw1(s), 0.2)  # (N, 128)
        maps = self.draw2(h).view(-1, 16, 7, 7)  # (N, 16, 7, 7)

        # z bends.
        h = F.leaky_relu(self.bend1(z), 0.2)  # (N, 128)
        bend = self.bend2(h).view(-1, 2 * 16, 7, 7)  # (N, 2 * 16, 7, 7)
        gain, shift = bend.chunk(2, dim=1)  # each (N, 16, 7, 7)
        h = maps * (1 + gain) + shift  # (N, 16, 7, 7)
        h = F.leaky_relu(h, 0.2)

        # Two convolutions. After each, 4 channels become the 2x2 pixels of one.
        h = F.pixel_shuffle(self.conv1(h), 2)  # (N, 16, 14, 14)
        h = F.leaky_relu(h, 0.2)
        h = F.pixel_shuffle(self.conv2(h), 2)  # (N, 1, 28, 28)
        return torch.sigmoid(h)

class Adversary(nn.Module):
    """Adv: is x a real image of class id? It exists for training only.
    x (N, 1, 28, 28) in [0, 1], class_id (N,) -> verdict (N,), a logit: > 0 says "real".

    Departure: it is a projection discriminator (Miyato and Koyama 2018), which compares
    features of x with a learned vector of the class. In the authors' code learned maps
    of the class are added to what three of its convolutions give.

    Departure: spectral norm (Miyato et al. 2018) divides each layer's weights by their
    largest singular value, of which it keeps an estimate. That bounds how steep the
    adversary is, and so how hard terms 3 and 4 can push."""

    def __init__(self, n_classes):
        super().__init__()
        self.conv = spectral_norm(nn.Conv2d(16, 64, kernel_size=3))
        self.hidden = spectral_norm(nn.Linear(64 * 5 * 5, 256))
        self.how_real = spectral_norm(nn.Linear(256, 1))
        self.class_vector = spectral_norm(nn.Embedding(n_classes, 256))

    def forward(self, x, class_id):
        # Features of the image. First, each patch of 4x4 pixels becomes 16 channels.
        h = F.pixel_unshuffle(x, 4)  # (N, 16, 7, 7)
        h = F.leaky_relu(self.conv(h), 0.2)  # (N, 64, 5, 5)
        h = h.flatten(1)  # (N, 64 * 5 * 5)
        features = F.leaky_relu(self.hidden(h), 0.2)  # (N, 256)

        # How real does it look, and how well does it fit the class?
        looks_real = self.how_real(features).squeeze(1)  # (N,)
        fits_class = (self.class_vector(class_id) * features).sum(dim=1)  # (N,)
        return looks_real + fits_class

class AdvVAE(nn.Module):
    """What remains after training: f_s, f_z and the decoder."""

    def __init__(self, s_dim=Config.s_dim, z_dim=Config.z_dim):
        super().__init__()
        self.f_s = SpecifiedEncoder(s_dim)
        self.f_z = UnspecifiedEncoder(s_dim, z_dim)
        self.decoder = Decoder(s_dim, z_dim)

    def encode(self, x):
        """x (N, 1, 28, 28) -> s (N, s_dim), mu (N, z_dim), logvar (N, z_dim)."""
        s = self.f_s(x)
        mu, logvar = self.f_z(x, s)
        return s, mu, logvar

# ---- 2. Triples ---------------------------------------------------------------------

class TripleSampler:
    """Iterating over it gives one epoch of batches (x1, x1_same, x2, id2).

    x1        each image once, in random order; (N, 1, 28, 28)
    x1_same   a random image of x1's class, by chance x1 itself; (N, 1, 28, 28)
    x2        a random image of the whole set; (N, 1, 28, 28)
    id2       the class of x2; (N,)

    Departure: the authors' code draws x1, too, with replacement, and all classes
    equally often, whatever their sizes."""

    def __init__(self, images, labels, batch_size, generator):
        self.images = images
        self.labels = labels
        self.batch_size = batch_size
        self.generator = generator

        # For each class, the indices of its images.
        self.members = []
        for c in labels.unique():
            self.members.append((labels == c).nonzero().flatten().cpu())

    def __len__(self):
        return math.ceil(len(self.images) / self.batch_size)

    def __iter__(self):
        n = len(self.images)
        first = torch.randperm(n, generator=self.generator)
        second = torch.randint(n, (n,), generator=self.generator)

        # For each image, the index of a random one of its class.
        same = torch.empty(n, dtype=torch.long)
        for members in self.members:
            size = len(members)
            chosen = torch.randint(size, (size,), generator=self.generator)
            same[members] = members[chosen]

        for start in range(0, n, self.batch_size):
            i1 = first[start : start + self.batch_size]
            i2 = second[start : start + self.batch_size]
            x1 = self.images[i1]
            x1_same = self.images[same[i1]]
            x2 = self.images[i2]
            id2 = self.labels[i2]
            yield x1, x1_same, x2, id2

# ---- 3. The four terms, of which term 1 has two parts, and the adversary's loss -----
# All are scalars >= 0, in nats per image: sums over pixels or dimensions, means over
# the batch. Departure: the authors' code takes terms 1 to 3 for several images and
# pairs of the triple; here each is taken once.

def reconstruction_term(x1, x1_decoded):
    """Term 1, likelihood: x1 must come out of its own codes.

        -log p(x1 | z1, s1) + constant  =  sum over pixels of  (2 x1 - 2 Dec(z1, s1))^2

    This is a Gaussian of variance 1/2 on pixels scaled to [-1, 1], 2 x - 1, as in the
    authors' code. Both (N, 1, 28, 28) in [0, 1]."""
    return (2 * x1 - 2 * x1_decoded).square().sum() / len(x1)

def kl_term(mu, logvar):
    """Term 1, KL: what z1 says of x1 has a price, which bounds how much it can say.

        KL(N(mu, exp(logvar)) || N(0, I))
            =  1/2 sum over dimensions of  (mu^2 + exp(logvar) - 1 - logvar)

    Both (N, z_dim).

    Departure: the authors' KL takes f_z's second output as log sigma, their draws of z
    take it as log sigma^2. Here it is log sigma^2 in both."""
    of_dimensions = 0.5 * (mu.square() + logvar.exp() - 1 - logvar)  # (N, z_dim)
    return of_dimensions.sum(dim=1).mean()

def swap_term(x1, x1_from_same):
    """Term 2: x1 must also come out with the s of another image of its class.

        -log p(x1 | z1, s1_same) + constant,   s1_same = f_s(x1_same)

    So s is to hold what the class's images share. Both (N, 1, 28, 28) in [0, 1]."""
    return reconstruction_term(x1, x1_from_same)

def adversary_term(verdict):
    """Term 3: Dec(z1, s2) must pass for a real image of class id2. Verdicts (N,).

        -log sigmoid(Adv(Dec(z1, s2), id2))  =  softplus(-Adv(Dec(z1, s2), id2))

    Whatever z1 knows of x1's class must not show. The likelihoods of terms 1 and 2
    don't ask for that: a z that holds all of x1, and a decoder that ignores s, suit
    them. The KL puts a price on such a z, but forbids nothing.

    This is the non-saturating loss (Goodfellow et al. 2014): it pushes hardest while
    the adversary wins."""
    return F.softplus(-verdict).mean()

def prior_term(verdict):
    """Term 4: so must Dec(z, s2), whose z comes from no image. Verdicts (N,).

        -log sigmoid(Adv(Dec(z, s2), id2)),   z ~ N(0, I)

    Departure: the authors' code has this term, too, but runs with a weight of 0."""
    return adversary_term(verdict)

def adversary_loss(verdict_real, verdict_swapped, verdict_sampled):
    """What the adversary minimizes, so that real images and fakes count alike:

        - log sigmoid(Adv(x2, id2))
        - 1/2 log(1 - sigmoid(Adv(Dec(z1, s2), id2)))
        - 1/2 log(1 - sigmoid(Adv(Dec(z, s2), id2)))

    where -log(1 - sigmoid(v)) = softplus(v). Verdicts (N,) each.

    Departure: the authors' code aims at 0.95 for "real" instead of 1, and never shows
    its adversary Dec(z, s2)."""
    on_real = F.softplus(-verdict_real).mean()
    on_swapped = F.softplus(verdict_swapped).mean()
    on_sampled = F.softplus(verdict_sampled).mean()
    return on_real + 0.5 * on_swapped + 0.5 * on_sampled

# ---- 4. Training: one step, and the loop --------------------------------------------

def train_step(model, adversary, optimizers, triple, config, generator):
    """Figure 1, once through: encoders and decoder take a step, then the adversary.

    triple is what TripleSampler gives, optimizers are model's and adversary's. Returns
    the terms and how the adversary does, numbers by name. A weight of 0 takes its term
    out of the sum and nothing else: it is measured, and the adversary still learns."""
    x1, x1_same, x2, id2 = triple
    optimizer, adversary_optimizer = optimizers

    # Codes: s of all three images, z of x1, and a z that no image gave.
    s1 = model.f_s(x1)
    s1_same = model.f_s(x1_same)
    s2 = model.f_s(x2)
    mu, logvar = model.f_z(x1, s1)
    z1 = reparameterize(mu, logvar, generator)
    z = torch.randn(z1.shape, generator=generator).to(z1.device)

    # Decodings: two that must be x1, and two fakes of class id2.
    x1_decoded = model.decoder(z1, s1)
    x1_from_same = model.decoder(z1, s1_same)
    fake_swapped = model.decoder(z1, s2)
    fake_sampled = model.decoder(z, s2)

    # What the adversary says of the fakes. Gradients go through it, back to the fakes,
    # but its own weights get none, and eval mode freezes spectral norm's estimates.
    adversary.requires_grad_(False)
    adversary.eval()
    verdict_swapped = adversary(fake_swapped, id2)
    verdict_sampled = adversary(fake_sampled, id2)

    # The four terms: the first two are term 1.
    reconstruction = reconstruction_term(x1, x1_decoded)
    kl = kl_term(mu, logvar)
    swap = swap_term(x1, x1_from_same)
    adversarial = adversary_term(verdict_swapped)
    prior = prior_term(verdict_sampled)

    # Encoders and decoder descend the weighted sum.
    loss = (
        config.reconstruction_weight * reconstruction
        + config.kl_weight * kl
        + config.swap_weight * swap
        + config.adversary_weight * adversarial
        + config.prior_weight * prior
    )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

    # The adversary's turn: the real x2 and the same fakes, all of class id2. detach()
    # keeps its gradients out of encoders and decoder.
    adversary.requires_grad_(True)
    adversary.train()
    with parametrize.cached():  # spectral norm makes one estimate for all three
        verdict_real = adversary(x2, id2)
        verdict_swapped = adversary(fake_swapped.detach(), id2)
        verdict_sampled = adversary(fake_sampled.detach(), id2)

    loss_of_adversary = adversary_loss(verdict_real, verdict_swapped, verdict_sampled)
    adversary_optimizer.zero_grad()
    loss_of_adversary.backward()
    adversary_optimizer.step()

    verdicts_on_fakes = torch.cat([verdict_swapped, verdict_sampled])
    return {
        "reconstruction": reconstruction.item(),
        "kl": kl.item(),
        "swap": swap.item(),
        "adversary": adversarial.item(),
        "prior": prior.item(),
        "adversary_loss": loss_of_adversary.item(),
        "right_on_real": (verdict_real > 0).float().mean().item(),
        "right_on_fakes": (verdicts_on_fakes < 0).float().mean().item(),
    }

def train(config, data, checkpoint=None, saved=None):
    """Train an AdvVAE on data (section 5). Returns the model, in eval mode, and the
    history: of each epoch, the means of what train_step returns.

    checkpoint, if given, is the file to write after each epoch; saved, if given, what
    read_checkpoint returned: training goes on from there and, with the same config on
    the CPU, ends in the very weights of an uninterrupted training. Raises UserError if
    a loss is no longer finite, or if saved holds other networks."""
    # The networks, and for each side an optimizer, whose learning rate the loop below
    # sets. A first beta of 0.5 is usual with adversaries.
    torch.manual_seed(config.seed)
    device = data.images.device
    model = AdvVAE(config.s_dim, config.z_dim).to(device)
    adversary = Adversary(int(data.labels.max()) + 1).to(device)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.5, 0.99))
    adversary_optimizer = torch.optim.Adam(adversary.parameters(), betas=(0.5, 0.99))
    optimizers = (optimizer, adversary_optimizer)

    # All other random numbers (triples, eps, z) come from one generator.
    generator = torch.Generator().manual_seed(config.seed)
    sampler = TripleSampler(data.images, data.labels, config.batch_size, generator)
    history = []

    if saved:
        restore(model, saved["model"])
        restore(adversary, saved["adversary"])
        restore(optimizer, saved["optimizer"])
        restore(adversary_optimizer, saved["adversary_optimizer"])
        generator.set_state(saved["generator"])
        history = saved["history"]

    for epoch in range(len(history) + 1, config.epochs + 1):
        start = time.perf_counter()
        sums = {}
        for step, triple in enumerate(sampler):
            # Departure: the learning rate is constant in the first half of training and
            # falls linearly to 0 in the second. In the authors' code it doesn't fall.
            epochs_done = epoch - 1 + (step + 0.5) / len(sampler)  # at mid-step
            rate = config.learning_rate * min(1, 2 * (1 - epochs_done / config.epochs))
            optimizer.param_groups[0]["lr"] = rate
            adversary_optimizer.param_groups[0]["lr"] = rate

            # Autocast keeps 16-bit copies of weights; none is used after it changed.
            with torch.autocast(device.type, torch.bfloat16, enabled=config.bfloat16):
                measures = train_step(
                    model, adversary, optimizers, triple, config, generator
                )
            for name, value in measures.items():
                sums[name] = sums.get(name, 0) + value
            progress(f"epoch {epoch}/{config.epochs}", (step + 1) / len(sampler))

        means = {name: total / len(sampler) for name, total in sums.items()}
        history.append(means)
        line = "  ".join(f"{name} {value:.2f}" for name, value in means.items())
        if not all(math.isfinite(value) for value in means.values()):
            tip = "try a lower --learning-rate or lower weights"
            raise UserError(f"epoch {epoch} ends in {line}; {tip}")
        seconds = time.perf_counter() - start
        left = f"{seconds * (config.epochs - epoch) / 60:.1f} min left"
        say(f"epoch {epoch}/{config.epochs}  {line}  {seconds:.1f} s, {left}")

        if checkpoint:
            state = {
                "model": model.state_dict(),
                "adversary": adversary.state_dict(),
                "optimizer": optimizer.state_dict(),
                "adversary_optimizer": adversary_optimizer.state_dict(),
                "generator": generator.get_state(),
                "history": history,
                "config": asdict(config),
                "dataset": data.name,
            }
            save_checkpoint(checkpoint, state)

    return model.eval(), history

# ==== This was the paper's method. What follows feeds it, measures it and draws it. ==

# ---- 5. Data: MNIST and its kin, and digits drawn from matplotlib's fonts -----------

@dataclass
class Data:
    """A data set. Strokes are bright on black: slant and thickness are measured of what
    is bright. Raises UserError if images or labels aren't as the comments say."""
    name: str
    images: torch.Tensor  # (M, 1, 28, 28), float32 in [0, 1]
    labels: torch.Tensor  # (M,), integers from 0 up, two classes or more
    test_images: torch.Tensor  # (N, 1, 28, 28), float32 in [0, 1]
    test_labels: torch.Tensor  # (N,), the same; none is larger than all of labels
    factors: dict | None = None  # typeset only: what render drew the images from
    test_factors: dict | None = None

    def __post_init__(self):
        self.check(self.images, self.labels)
        self.check(self.test_images, self.test_labels)
        self.labels, self.test_labels = self.labels.long(), self.test_labels.long()
        if self.images.mean() > 0.5:
            say(f"{self.name} is mostly bright: if strokes are dark, take 1 - images")

    def check(self, x, y):
        right = len(x) > 0 and x.shape[1:] == (1, 28, 28) and x.dtype == torch.float32
        if not right or not 0 <= x.min() <= x.max() <= 1:
            raise UserError(f"{self.name}: images must be 1x28x28, float32 in [0, 1]")

        right = y.shape == x.shape[:1] and not y.is_floating_point()
        if not right or not 0 <= y.min() < y.max() <= self.labels.max():
            raise UserError(f"{self.name}: labels must be as class Data says")

SOURCES = {
    "mnist": torchvision.datasets.MNIST,
    "fashion-mnist": torchvision.datasets.FashionMNIST,
    "kmnist": torchvision.datasets.KMNIST,
}

def load_data(name, data_dir="data", device="cpu"):
    """The Data called name: typeset, or one of SOURCES, downloaded into data_dir if it
    isn't there; auto is mnist or, if that can't be had, typeset. Raises UserError."""
    if name == "auto":
        try:
            return load_data("mnist", data_dir, device)
        except UserError as error:
            say("!" * 80)
            say(f"NOT MNIST BUT TYPESET, because {error}")
            say("!" * 80)
            return load_data("typeset", data_dir, device)

    if name == "typeset":
        say("Drawing 70,000 digits")
        generator = torch.Generator().manual_seed(0)  # the same digits for every --seed
        x, y, factors = typeset(60_000, generator)
        test_x, test_y, test_factors = typeset(10_000, generator)
    elif name in SOURCES:
        try:
            train_part = SOURCES[name](data_dir, train=True, download=True)
            test_part = SOURCES[name](data_dir, train=False)
        except Exception as error:  # downloads and damaged files fail in many ways
            raise UserError(
                f"{name} can't be had in {data_dir} ({error!r:.200}): delete what is "
                "damaged there, go online and run again, or use --dataset typeset"
            ) from error
        x, y = train_part.data.unsqueeze(1) / 255, train_part.targets
        test_x, test_y = test_part.data.unsqueeze(1) / 255, test_part.targets
        factors = test_factors = None
        say(f"Read {len(x):,} training and {len(test_x):,} test images from {data_dir}")
    else:
        raise UserError(f"there is no data set {name}: see --help")

    x, test_x = x.to(device), test_x.to(device)
    y, test_y = y.to(device), test_y.to(device)
    return Data(name, x, y, test_x, test_y, factors, test_factors)

# typeset: digits of which we know the style, since it was drawn at random. The faces
# come with matplotlib; all are upright and regular, as slant and boldness are factors.
FACES = ["DejaVuSans", "DejaVuSansMono", "DejaVuSerif", "STIXGeneral"]
FACES += ["cmr10", "cmss10", "cmtt10"]
DIGITS = "0123456789"

def typeset(n, generator, characters=DIGITS):
    """n random characters: images (n, 1, 28, 28) in [0, 1], labels (n,), and factors, a
    dict of tensors (n,) of which none tells the class. Lengths are in pixels."""
    def uniform(low, high):
        return low + (high - low) * torch.rand(n, generator=generator)

    labels = torch.randint(len(characters), (n,), generator=generator)
    factors = {
        "font": torch.randint(len(FACES), (n,), generator=generator),  # in FACES
        "slant": uniform(-0.5, 0.5),  # to the right, per pixel upward
        "size": uniform(15, 20),  # height, or width if that is more
        "pen": uniform(0, 2.5),  # by how much strokes are fattened
        "shift_x": uniform(-2, 2),  # to the right
        "shift_y": uniform(-2, 2),  # down
    }
    return render(labels, factors, characters), labels, factors

def render(labels, factors, characters=DIGITS):
    """Draw characters[label] for labels (N,), with factors as typeset makes them.
    -> (N, 1, 28, 28) in [0, 1]."""
    outlines = []
    for face in FACES:
        outlines.append([outline(face, character) for character in characters])

    canvas = RendererAgg(28, 28, dpi=72)  # at 72 dots an inch, widths are in pixels
    pen = canvas.new_gc()
    pen.set_snap(False)  # else outlines are moved to whole pixels
    factors = {name: values.tolist() for name, values in factors.items()}
    images = []
    for i, label in enumerate(labels.tolist()):
        size = factors["size"][i]
        lean = factors["slant"][i] * size
        x = 14 + factors["shift_x"][i]
        y = 14 - factors["shift_y"][i]  # counts upward
        place = transforms.Affine2D.from_values(size, 0, lean, size, x, y)
        pen.set_linewidth(factors["pen"][i])
        canvas.clear()
        canvas.draw_path(pen, outlines[factors["font"][i]][label], place, (0, 0, 0))

        # How opaque a pixel becomes, 0 to 255, says how much of it is covered.
        pixels = torch.frombuffer(canvas.buffer_rgba(), dtype=torch.uint8)
        images.append(pixels.view(1, 28, 28, 4)[..., 3] / 255)
    return torch.stack(images)

def outline(face, character):
    """A character's outline, its middle at (0, 0), 1 high (1 wide, if it is wide)."""
    font = font_manager.FontProperties(fname=f"{get_data_path()}/fonts/ttf/{face}.ttf")
    path = textpath.TextPath((0, 0), character, prop=font)
    box = path.get_extents()
    to_unit = transforms.Affine2D()
    to_unit.translate(-(box.x0 + box.x1) / 2, -(box.y0 + box.y1) / 2)
    to_unit.scale(1 / max(box.width, box.height))
    return path.transformed(to_unit)

# ---- 6. What do z and s know, and do swaps obey them? -------------------------------

@torch.inference_mode(False)  # so that it works in a caller's inference_mode, too
@torch.no_grad()
def evaluate(model, data, seed=0):
    """Measure model on data's test images; what has to be fitted is fitted to training
    images. Prints the results and returns them, numbers by name."""
    # The judge comes first: with one seed it is the same for every model.
    torch.manual_seed(seed)
    judge = fit_judge(data.images, data.labels)

    # Codes of training and of test images, and a draw of z for each.
    model.eval()
    s, mu, logvar = model.encode(data.images)
    z = reparameterize(mu, logvar)
    x, y = data.test_images, data.test_labels
    test_s, test_mu, test_logvar = model.encode(x)
    test_z = reparameterize(test_mu, test_logvar)

    # Swaps Dec(mu1, s2) of pairs of test images of different classes, x1 and x2.
    partner = torch.randperm(len(x)).to(x.device)
    i1 = (y != y[partner]).nonzero().squeeze(1)
    i2 = partner[i1]
    id1 = y[i1]
    id2 = y[i2]
    swapped = model.decoder(test_mu[i1], test_s[i2])

    # Reconstructions, and prior samples Dec(z, s), z ~ N(0, I).
    decoded = model.decoder(test_mu, test_s)
    sampled = model.decoder(torch.randn_like(test_mu), test_s)

    # z is drawn anew in each pass; to find faint traces of the class takes many passes.
    std = torch.exp(logvar / 2)
    results = class_in("z", mu, data.labels, test_z, y, std, epochs=40)
    results |= class_in("mu", mu, data.labels, test_mu, y)
    results |= class_in("s", s, data.labels, test_s, y)
    results["class by chance"] = y.bincount().max().item() / len(y)
    results |= class_shown(judge, swapped, id1, id2, sampled, x, y)
    results |= style_kept(swapped, x[i1], x[i2], id1, id2)
    results |= likeness(judge, data.images, swapped, sampled, x)
    results["squared error of reconstructions"] = F.mse_loss(decoded, x).item()
    results["KL of z, nats"] = kl_term(test_mu, test_logvar).item()
    if data.factors:
        results |= true_factors(data, swapped, i1, id2, z, test_z, s, test_s)

    say(f"\nWhat z and s know ({data.name}, test images)")
    for name, value in results.items():
        say(f"  {name:<34}{value:9.4f}")
    return results

def class_in(name, codes, labels, test_codes, test_labels, std=None, epochs=15):
    """How much do codes (M, d), or draws with std around them, tell of labels (M,)? A
    network has to tell, as in the paper, here with two hidden layers (authors' code:
    one). Returns its accuracy on test_codes (N, d), 0 to 1, and the nats that it finds:
    an estimate from below of the mutual information, which is at most the entropy of
    the class (2.3 nats for ten classes of one size)."""
    n_classes = int(labels.max()) + 1
    net = torchvision.ops.MLP(codes.shape[1], [256, 256, n_classes], nn.BatchNorm1d)
    net = fit_classifier(net.to(codes.device), codes, labels, std, epochs)
    logits = net(test_codes)

    accuracy = (logits.argmax(dim=1) == test_labels).float().mean()
    frequency = test_labels.bincount() / len(test_labels)
    entropy = torch.distributions.Categorical(frequency).entropy()
    nats = entropy - F.cross_entropy(logits, test_labels)
    return {
        f"class from {name}": accuracy.item(),
        f"class from {name}, nats": nats.item(),
    }

def class_shown(judge, swapped, id1, id2, sampled, x, y):
    """Whose class does a swap show: id2, of the image that gave s; id1, of the one that
    gave z; or neither? Do samples show y, the class that gave their s? Shares, 0 to 1,
    of what the judge says, and how often it is right on real images x."""
    shown = judge(swapped).argmax(dim=1)
    shown_sampled = judge(sampled).argmax(dim=1)
    shown_real = judge(x).argmax(dim=1)

    def share(hits):
        return hits.float().mean().item()

    return {
        "swaps that show s's class": share(shown == id2),
        "swaps that show z's class": share(shown == id1),
        "swaps that show neither": share((shown != id1) & (shown != id2)),
        "prior samples of s's class": share(shown_sampled == y),
        "real images judged right": share(shown_real == y),
    }

def style_kept(swapped, x1, x2, id1, id2):
    """How much style does a swap take from x1, which gave z, and how much from x2,
    which gave s? For slant and for thickness, the slopes a and b with which a * (x1's)
    + b * (x2's) comes closest to the swap's: 1 and 0 are perfect."""
    # 4s lean less than 1s. For that not to count as style, each pair of classes is a
    # cell of its own, and only what differs within a cell is compared.
    cell = id1 * (id2.max() + 1) + id2

    def within_cells(values):
        means = cell.bincount(values) / cell.bincount()
        return (values - means[cell]).cpu()

    results = {}
    for name, measure in (("slant", slant), ("thickness", stroke_thickness)):
        of_x1 = within_cells(measure(x1))
        of_x2 = within_cells(measure(x2))
        of_swap = within_cells(measure(swapped))
        sources = torch.stack([of_x1, of_x2], dim=1)
        slopes = torch.linalg.lstsq(sources, of_swap).solution
        results[f"{name}, slope on z's source"] = slopes[0].item()
        results[f"{name}, slope on s's source"] = slopes[1].item()
    return results

def likeness(judge, images, swapped, sampled, x):
    """Do swaps and samples look like real images, and vary as they do? Frechet
    distances to at most 10,000 training images, in the judge's last hidden layer; that
    of real test images x is the best to be expected. Compare what one judge says."""
    features = judge[:-1]
    some = torch.randperm(len(images))[:10_000]
    real = features(images[some])
    return {
        "Frechet distance, swaps": frechet_distance(features(swapped), real),
        "Frechet distance, samples": frechet_distance(features(sampled), real),
        "Frechet distance, real images": frechet_distance(features(x), real),
    }

def true_factors(data, swapped, i1, id2, z, test_z, s, test_s):
    """typeset knows the truth. How far are swaps from x2's digit drawn with the factors
    of x1, test image i1 (mean squared error)? Which share of a factor's variance is a
    linear function of z, of s (R2, at most 1)?"""
    i1 = i1.cpu()
    of_x1 = {name: values[i1] for name, values in data.test_factors.items()}
    truth = render(id2.cpu(), of_x1)
    results = {"squared error of swaps": F.mse_loss(swapped.cpu(), truth).item()}
    for name in ("slant", "size", "pen", "shift_x", "shift_y"):
        factor, test_factor = data.factors[name], data.test_factors[name]
        results[f"true {name} in z, R2"] = linear_r2(z, factor, test_z, test_factor)
        results[f"true {name} in s, R2"] = linear_r2(s, factor, test_s, test_factor)
    return results

@torch.enable_grad()
def fit_classifier(net, inputs, labels, std, epochs):
    """Train net to tell labels (M,) from inputs (M, ...) or, unless std is None, from
    draws of N(inputs, std^2), new ones in each pass. Returns net in eval mode."""
    steps = math.ceil(len(labels) / 500)
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, epochs * steps)
    for epoch in range(epochs):
        x = inputs if std is None else torch.normal(inputs, std)
        # In steps of equal sizes: batch norm can't learn from a last one of one image.
        for i in torch.randperm(len(labels)).tensor_split(steps):
            optimizer.zero_grad()
            F.cross_entropy(net(x[i]), labels[i]).backward()
            optimizer.step()
            schedule.step()
        progress("fitting classifiers", (epoch + 1) / epochs)
    return net.eval()

def fit_judge(images, labels, epochs=3):
    """A small classifier of images (M, 1, 28, 28): it says which class an image shows.
    judge[-1] is its last layer; judge[:-1], all before, gives an image's features."""
    judge = nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=5, stride=2, padding=2),  # (N, 32, 14, 14)
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, kernel_size=3, stride=2, padding=1),  # (N, 64, 7, 7)
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 128),
        nn.ReLU(),
        nn.Linear(128, int(labels.max()) + 1),
    )
    return fit_classifier(judge.to(images.device), images, labels, None, epochs)

def ink_of(images):
    """(N, 1, H, W) -> (N, H, W). Raises ValueError for images that aren't gray."""
    if images.dim() != 4 or images.shape[1] != 1:
        raise ValueError(f"takes gray images, (N, 1, H, W), not {tuple(images.shape)}")
    return images[:, 0]

def slant(images):
    """How far strokes lean, in pixels to the right per pixel upward, by the second
    moments of the ink. Gray images, bright strokes on black, (N, 1, H, W) -> (N,)."""
    ink = ink_of(images)
    ink = ink / ink.sum(dim=(1, 2), keepdim=True).clamp_min(1e-6)
    y = torch.arange(ink.shape[1], device=ink.device).view(-1, 1)  # counts downward
    x = torch.arange(ink.shape[2], device=ink.device).view(1, -1)
    dy = y - (ink * y).sum(dim=(1, 2), keepdim=True)  # from the centre of the ink
    dx = x - (ink * x).sum(dim=(1, 2), keepdim=True)
    covariance = (ink * dx * dy).sum(dim=(1, 2))
    variance = (ink * dy * dy).sum(dim=(1, 2))
    return -covariance / variance.clamp_min(1e-6)

def stroke_thickness(images):
    """Twice the ink over the length of its edge, as a stroke has two edges; in pixels.
    Gray images, bright strokes on black, (N, 1, H, W) -> (N,)."""
    ink = F.pad(ink_of(images), (1, 1, 1, 1))
    step_x = ink[:, :-1, 1:] - ink[:, :-1, :-1]
    step_y = ink[:, 1:, :-1] - ink[:, :-1, :-1]
    edge = torch.hypot(step_x, step_y).sum(dim=(1, 2))
    return 2 * ink.sum(dim=(1, 2)) / edge.clamp_min(1e-6)

def frechet_distance(a, b):
    """Of features a (N, d) and b (M, d), as in FID (Heusel et al. 2017):

        |mean(a) - mean(b)|^2 + trace(cov(a) + cov(b) - 2 (cov(a) cov(b))^(1/2))
    """
    a, b = a.cpu().double(), b.cpu().double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    means = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    # The trace of a root is the sum of the roots of the eigenvalues.
    root = torch.linalg.eigvals(cov_a @ cov_b).sqrt().real.sum()
    return (means + cov_a.trace() + cov_b.trace() - 2 * root).item()

def linear_r2(codes, factor, test_codes, test_factor):
    """Which share of test_factor (N,)'s variance is a linear function of test_codes
    (N, d), one that was fitted to codes (M, d) and factor (M,)? At most 1."""
    centred = (codes - codes.mean(dim=0)).cpu()
    weights = torch.linalg.lstsq(centred, factor).solution
    residual = test_factor - test_codes.cpu() @ weights
    return (1 - residual.var() / test_factor.var()).item()

# ---- 7. Checkpoint and command line -------------------------------------------------

class UserError(Exception):
    """What the user can put right. main prints it as one line and exits with code 2."""

def say(line):
    """Print a line at once, also where the output goes to a file or a pipe."""
    print(line, flush=True)

def progress(what, share):
    """On a terminal, show in place how far it is; at a share of 1 that is wiped out."""
    if sys.stdout.isatty():
        line = f"{what}: {share:.0%}" if share < 1 else ""
        print(f"\r{line:<40}\r", end="", flush=True)

def save_checkpoint(path, state):
    """Write the dict state to path: whole, or not at all."""
    content = io.BytesIO()  # torch.save itself raises no OSError on a full disk
    torch.save(state, content)
    path = Path(path).resolve()  # of a link, the file that it names
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_bytes(content.getbuffer())
    unfinished.replace(path)  # a run that is stopped before keeps the old file

def read_checkpoint(path):
    """The dict that train wrote to path, with a Config as config. Raises UserError."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)  # runs no code
        saved["config"] = Config(**saved["config"])
    except FileNotFoundError as error:
        raise UserError(f"{path} isn't there: train first") from error
    except Exception as error:  # torch.load raises almost anything on another file
        raise UserError(f"{path} is no checkpoint of this advvae.py") from error
    return saved

def restore(part, state):
    """Give a network or an optimizer its saved state. Raises UserError."""
    try:
        part.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            "the checkpoint holds other networks, of a changed advvae.py or for other "
            "classes: train anew, without --resume"
        ) from error

def load_checkpoint(path, device="cpu"):
    """The trained AdvVAE, on device and in eval mode. Raises UserError."""
    saved = read_checkpoint(path)
    model = AdvVAE(saved["config"].s_dim, saved["config"].z_dim)
    restore(model, saved["model"])
    return model.to(device).eval()

def command_line(argv):
    """The flags, by name. Config explains the settings."""
    usage = argparse.SUPPRESS  # so that an error is one line
    description = "Train on images, measure what z and s know, draw swap grids."
    parser = argparse.ArgumentParser("advvae.py", usage, description)

    def flag(name, default, meaning):
        help = f"{meaning} (default: {default})"
        parser.add_argument(name, type=type(default), default=default, help=help)

    flag("--batch-size", Config.batch_size, "triples a step")
    flag("--learning-rate", Config.learning_rate, "at the beginning")
    flag("--seed", Config.seed, "of all that is random")
    flag("--s-dim", Config.s_dim, "dimensions of s")
    flag("--z-dim", Config.z_dim, "dimensions of z")
    flag("--reconstruction-weight", Config.reconstruction_weight, "of term 1")
    flag("--kl-weight", Config.kl_weight, "of the KL in term 1")
    flag("--swap-weight", Config.swap_weight, "of term 2")
    flag("--adversary-weight", Config.adversary_weight, "of term 3")
    flag("--prior-weight", Config.prior_weight, "of term 4")
    sources = ", ".join(SOURCES)
    flag("--dataset", "auto", f"{sources}, typeset, auto: mnist or else typeset")
    flag("--data-dir", "data", "where downloaded images are kept")
    flag("--device", "auto", "cpu, cuda, mps, auto: cuda or else cpu")
    flag("--checkpoint", "advvae.pt", "file for the weights")
    flag("--figures-dir", "figures", "folder for pictures and results")

    epochs = f"passes over the images (default: {Config.epochs}, or as before)"
    resume = "go on from --checkpoint, with its settings, to --epochs"
    parser.add_argument("--epochs", type=int, help=epochs)
    parser.add_argument("--resume", action="store_true", help=resume)
    parser.add_argument("--bfloat16", action="store_true", help="faster on some CPUs")
    return parser.parse_args(argv)

def pick_device(name):
    """The device called name; auto is cuda or, without it, cpu. Raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:  # the latter: torch without CUDA
        raise UserError(f"there is no device {name} here: use --device cpu") from error
    return name

# ---- 8. Pictures, the swap grid last, and main --------------------------------------

# The image that gave s is blue, the one that gave z orange.
BLUE = torch.tensor([0.5, 0.75, 1.0]).view(3, 1, 1)
ORANGE = torch.tensor([1.0, 0.7, 0.3]).view(3, 1, 1)

def one_of_each_class(data):
    """The first test image of each of the first ten classes: nothing is picked by hand.
    (10, 1, 28, 28)."""
    classes = data.test_labels.unique()[:10]
    return torch.stack([data.test_images[data.test_labels == c][0] for c in classes])

@torch.no_grad()
@style.context("default")  # whatever the user's matplotlibrc says
def save_grid(path, title, model, zs, ss, left, top):
    """Save a picture of Dec(z, s), a row for each z of zs (R, z_dim), a column for each
    s of ss (C, s_dim). left (R, 1, 28, 28) and top (C, 1, 28, 28) are the images that
    gave them, black where none did."""
    images = [torch.zeros(1, 3, 28, 28), top.cpu() * BLUE]  # the upper row
    for z, source in zip(zs, left):
        decoded = model.decoder(z.expand(len(ss), -1), ss)
        images.append(source.unsqueeze(0).cpu() * ORANGE)
        images.append(decoded.cpu().expand(-1, 3, -1, -1))
    images = torch.cat(images)
    grid = torchvision.utils.make_grid(images, nrow=1 + len(ss), pad_value=0.25)

    axes = figure.Figure(figsize=(6.2, 6.6), layout="constrained").subplots()  # inches
    axes.imshow(grid.permute(1, 2, 0).numpy())
    axes.set(title=title, xlabel="each column: one s", ylabel="each row: one z")
    axes.set(xticks=[], yticks=[])
    axes.figure.savefig(path, dpi=110)

def plot_samples(model, data, path):
    """A random z ~ N(0, I) along each row, the s of an image down each column."""
    x = one_of_each_class(data)
    s, mu, _ = model.encode(x)
    z = torch.randn(mu.shape, generator=torch.Generator().manual_seed(0)).to(mu.device)
    title = f"{data.name}: the blue image's class, any style"
    save_grid(path, title, model, z, s, left=0 * x, top=x)

def plot_interpolation(model, data, path):
    """From one test image to another: s changes to the right, z downward."""
    x = one_of_each_class(data)
    s, mu, _ = model.encode(x)
    share = torch.linspace(0, 1, len(x), device=x.device).unsqueeze(1)
    ss = torch.lerp(s[0], s[-1], share)
    zs = torch.lerp(mu[0], mu[-1], share)
    ends = torch.cat([x[:1], 0 * x[1:-1], x[-1:]])
    title = f"{data.name}: from one image's s and z to another's"
    save_grid(path, title, model, zs, ss, left=ends, top=ends)

def plot_swap(model, data, path):
    """The swap grid: one image's mu along each row, one's s down each column."""
    x = one_of_each_class(data)
    s, mu, _ = model.encode(x)
    title = f"{data.name}: the blue image's class, the orange one's style"
    save_grid(path, title, model, mu, s, left=x, top=x)

def run(flags):
    """Train, measure and draw, as the flags say. Raises UserError or OSError."""
    # Better a fault now than after training.
    checkpoint, folder = Path(flags.checkpoint), Path(flags.figures_dir)
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    device = pick_device(flags.device)

    # The settings are those of the flags, or those of the checkpoint.
    saved = None
    dataset = flags.dataset
    settings = {}
    for field in fields(Config):
        if getattr(flags, field.name, None) is not None:
            settings[field.name] = getattr(flags, field.name)
    config = Config(**settings)

    if flags.resume:
        saved = read_checkpoint(checkpoint)
        dataset = saved["dataset"]
        epochs = saved["config"].epochs if flags.epochs is None else flags.epochs
        config = replace(saved["config"], epochs=epochs)
        say(f"Data set and settings, but for --epochs, are those of {checkpoint}")
    elif checkpoint.exists():
        if not zipfile.is_zipfile(checkpoint):  # torch's files are zip files
            raise UserError(f"{checkpoint} is no checkpoint: name another --checkpoint")
        say(f"{checkpoint} will be replaced; --resume would go on from it")

    data = load_data(dataset, flags.data_dir, device)
    say(f"Training on {data.name}, {device}, {config.epochs} epochs")
    model, _ = train(config, data, checkpoint, saved)
    results = evaluate(model, data)

    # Results beside the pictures, the swap grid last.
    start = folder / data.name
    Path(f"{start}-results.json").write_text(json.dumps(results, indent=2), "utf-8")
    plot_samples(model, data, f"{start}-samples.png")
    plot_interpolation(model, data, f"{start}-interpolation.png")
    plot_swap(model, data, f"{start}-swap.png")
    say(f"Weights: {checkpoint}. Pictures and results: {start}-*.png, -results.json")

def main(argv=None):
    """Run as the command line says. What the user can put right ends in one line."""
    socket.setdefaulttimeout(20)  # seconds; some firewalls never answer a download
    try:
        run(command_line(argv))
    except KeyboardInterrupt:
        tip = "--resume goes on after the last whole epoch"
        print(f"advvae.py: stopped; {tip}", file=sys.stderr)
        sys.exit(130)
    except (UserError, OSError) as error:  # the latter: a full disk, say
        print(f"advvae.py: {error}", file=sys.stderr)
        sys.exit(2)

if __name__ == "__main__":
    main()
