# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.3", "torchvision>=0.18", "matplotlib>=3.10.7"]
# ///
"""Disentangling factors of variation with adversarial training, in one file.

A reference implementation of Mathieu, Zhao, Sprechmann, Ramesh, LeCun, "Disentangling factors of variation
in deep representations using adversarial training" (NIPS 2016, arXiv 1611.03383), to be read beside the
paper from top to bottom. Sections 1 to 4 are its method ("Departure" marks the main differences from it and
from the authors' code, MichaelMathieu/factors-variation); the rest feeds, measures and draws it.

From images and class labels, learn two codes: s, the *specified* factor (what the label says: which digit
it is), and z, the *unspecified* ones (everything else: slant, stroke width, size, handwriting). Nothing ever
says what z should be; training only knows the images' classes. The paper's Figure 1, with this file's
sections in brackets; f_s is called SpecifiedEncoder here, f_z UnspecifiedEncoder, Dec Decoder:

    triples [2]     x1;  x1_same, of x1's class;  x2, any image, of class id2
    codes [1]       s1 = f_s(x1)      s1_same = f_s(x1_same)      s2 = f_s(x2)
                    z1 ~ f_z(x1, s1)  z ~ N(0, I)
    decoder [1]     Dec(z1, s1) ------> is it x1?      term 1 [3], with the KL of z1
                    Dec(z1, s1_same) -> is it x1?      term 2
                    Dec(z1, s2) ------> adversary      term 3   | the two fakes: each must
                    Dec(z, s2) -------> adversary      term 4   | pass for a real image of id2
    adversary [1]   learns to tell the real x2 from both fakes, given id2

A step of training goes once through this figure [4]. Then: data, MNIST by default [5]; what z and s know
[6]; checkpoint and command line [7]; pictures, the swap grid last [8]. Left out: the paper's other data.
To run: python advvae.py --epochs 20 (trains, evaluates, draws into figures/); --help lists the flags.
"""

import argparse
import functools
import io
import math
import socket
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
import torch
import torch.nn.functional as F
import torchvision
from matplotlib import figure, font_manager, get_data_path, textpath, transforms
from matplotlib.backends.backend_agg import RendererAgg
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

class UserError(Exception):
    """What the user can put right. main prints it as one line and exits with code 2."""

@dataclass
class Config:
    """Every setting. Weights (the paper gives none) multiply terms in nats per image. Raises UserError."""
    epochs: int = 20  # passes over the training set, each image once as x1
    batch_size: int = 256  # triples a step (authors' code: 16)
    learning_rate: float = 3e-3  # of both Adams (authors' code: 0.01); falls in training's second half
    seed: int = 0  # same seed, same CPU: same result
    # Weights of the terms. (Authors' code, in our units: 0.5, 0.6, 1, 7.8, 0. A plain VAE: 1, 1, 0, 0, 0.)
    reconstruction_weight: float = 0.5  # term 1. Too little: only term 2 fills z. Too much: s holds x1
    kl_weight: float = 8.0  # term 1's KL. Too little: z keeps the class. Too much: all of a class look alike
    swap_weight: float = 1.0  # term 2. Too little: s holds the whole image, z nothing. Too much: blur
    adversary_weight: float = 60.0  # term 3. Too little: blur, or s is ignored. Too much: z is ignored
    prior_weight: float = 30.0  # term 4. Too little: samples z ~ N(0, I) get worse. Too much: z is ignored
    s_dim: int = 16  # dimensions of s (authors' code: 64)
    z_dim: int = 16  # dimensions of z (authors' code: 512)
    # 1: a CPU trains layers in bfloat16, 16 bits a number; up to twice as fast where Linux lists avx512_bf16
    # or amx_bf16. Weights, images and terms stay float32: hence .float() where a network ends (not f_s).
    bfloat16: int = int(Path("/proc/cpuinfo").exists() and "_bf16" in Path("/proc/cpuinfo").read_text())

    def __post_init__(self):
        for name, value in asdict(self).items():
            least = 1 if name in ("epochs", "batch_size", "s_dim", "z_dim") else 0
            if not least <= value < 2**63:  # false for NaN, too; torch takes seeds below 2**63
                raise UserError(f"{name} is {value}; it must be a number from {least} up")

# ---- 1. Networks: f_s, f_z, the decoder, the adversary -------------------------------------------
# Departure: the authors' encoders share all but their last layer, and their networks halve images (padded
# to 32x32) three times. Here f_s and f_z are apart and, for speed, images become 7x7 maps at once.
class SpecifiedEncoder(nn.Sequential):
    """f_s: s = f_s(x), real-valued and deterministic. (N, 1, 28, 28) in [0, 1] -> (N, s_dim)."""
    def __init__(self, s_dim):
        super().__init__(
            nn.Conv2d(1, 16, 8, stride=4, padding=2), nn.LeakyReLU(0.2),  # (N, 16, 7, 7)
            nn.Conv2d(16, 32, 3), nn.Flatten(), nn.LeakyReLU(0.2),  # (N, 32, 5, 5), (N, 800)
            nn.Linear(32 * 5 * 5, 128), nn.LeakyReLU(0.2), nn.Linear(128, s_dim))  # fmt: skip

class UnspecifiedEncoder(nn.Module):
    """f_z: mu, logvar = f_z(x, s). (N, 1, 28, 28) in [0, 1], (N, s_dim) -> twice (N, z_dim)."""
    def __init__(self, s_dim, z_dim):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 8, stride=4, padding=2), nn.Flatten(), nn.LeakyReLU(0.2))
        self.hidden1 = nn.Sequential(nn.Linear(16 * 7 * 7 + s_dim, 512), nn.LeakyReLU(0.2))
        self.hidden2 = nn.Sequential(nn.Linear(512 + s_dim, 256), nn.LeakyReLU(0.2))
        self.out = nn.Linear(256, 2 * z_dim)

    def forward(self, x, s):
        # Departure, from the authors' code only: as in the paper, f_z sees s, so it needn't find the class.
        h = self.hidden1(torch.cat([self.stem(x), s], dim=1))  # (N, 16 * 7 * 7 + s_dim) -> (N, 512)
        h = self.hidden2(torch.cat([h, s], dim=1))  # (N, 256)
        return self.out(h).float().chunk(2, dim=1)  # mu, logvar

class Decoder(nn.Module):
    """Dec: x~ = Dec(z, s). (N, z_dim), (N, s_dim) -> (N, 1, 28, 28) in [0, 1]."""
    def __init__(self, s_dim, z_dim):
        super().__init__()
        self.to_7x7 = nn.Sequential(
            nn.Linear(z_dim + s_dim, 256), nn.LeakyReLU(0.2),
            nn.Linear(256, 16 * 7 * 7), nn.LeakyReLU(0.2), nn.Unflatten(1, (16, 7, 7)))
        self.to_14x14 = nn.Sequential(
            nn.Conv2d(16, 64, 3, padding=1),  # (N, 64, 7, 7)
            nn.PixelShuffle(2), nn.LeakyReLU(0.2))  # (N, 16, 14, 14): 4 channels become 2x2 pixels
        self.to_28x28 = nn.Sequential(nn.Conv2d(16, 4, 5, padding=2), nn.PixelShuffle(2))  # (N, 1, 28, 28)
        self.scales = nn.Linear(z_dim, 16 + 16)  # the scales, less 1, of the channels at 7x7 and 14x14

    def forward(self, z, s):
        # Departure: z also scales the channels, alike in every class; the authors' z enters only once.
        scale_7x7, scale_14x14 = (1 + self.scales(z)).view(-1, 16 + 16, 1, 1).chunk(2, dim=1)
        h = scale_7x7 * self.to_7x7(torch.cat([z, s], dim=1))  # (N, 16, 1, 1) * (N, 16, 7, 7)
        h = scale_14x14 * self.to_14x14(h)  # (N, 16, 1, 1) * (N, 16, 14, 14)
        return self.to_28x28(h).float().sigmoid()  # (N, 1, 28, 28)

class Adversary(nn.Module):
    """Adv(x, id): (N, 1, 28, 28) in [0, 1], class ids (N,) -> verdicts (N,), logits: > 0 says "real".
    Departure: a projection discriminator (Miyato and Koyama 2018), which compares features of x with a
    learned vector of the class; the authors' code adds learned maps of the class to its convolutions.
    Departure: spectral norm (Miyato et al. 2018): each layer's weights are divided by their largest singular
    value, which bounds the adversary's slope, and so how hard terms 3 and 4 can push."""
    def __init__(self, n_classes):
        super().__init__()
        self.features = nn.Sequential(
            nn.PixelUnshuffle(4),  # (N, 16, 7, 7): a patch of 4x4 pixels becomes 16 channels
            spectral_norm(nn.Conv2d(16, 64, 3)), nn.Flatten(), nn.LeakyReLU(0.2),  # (N, 64, 5, 5), (N, 1600)
            spectral_norm(nn.Linear(64 * 5 * 5, 256)), nn.LeakyReLU(0.2))  # (N, 256)
        self.real = spectral_norm(nn.Linear(256, 1))
        self.of_class = spectral_norm(nn.Embedding(n_classes, 256))

    def forward(self, x, class_id):
        h = self.features(x)
        return (self.real(h).squeeze(1) + (self.of_class(class_id) * h).sum(dim=1)).float()  # (N,)

class AdvVAE(nn.Module):
    """What remains after training: f_s, f_z and the decoder."""
    def __init__(self, s_dim=Config.s_dim, z_dim=Config.z_dim):
        super().__init__()
        self.z_dim = z_dim
        self.f_s = SpecifiedEncoder(s_dim)
        self.f_z = UnspecifiedEncoder(s_dim, z_dim)
        self.decoder = Decoder(s_dim, z_dim)

    def encode(self, x):
        """x (N, 1, 28, 28) in [0, 1] -> s (N, s_dim), mu (N, z_dim), logvar (N, z_dim)."""
        s = self.f_s(x)
        return s, *self.f_z(x, s)

    def reparameterize(self, mu, logvar, generator=None):
        """z = mu + exp(logvar/2) eps with eps ~ N(0, I): a draw that gradients pass. All (N, z_dim)."""
        return mu + torch.exp(logvar / 2) * torch.randn(mu.shape, generator=generator, device=mu.device)

    def decode(self, z, s):
        """z (N, z_dim), s (N, s_dim) -> x~ (N, 1, 28, 28) in [0, 1]."""
        return self.decoder(z, s)

# ---- 2. Triples ----------------------------------------------------------------------------------
class TripleSampler:
    """Iterating gives an epoch of batches (x1, x1_same, x2, id2), Figure 1's inputs. Each image is x1 once;
    x1_same is uniform over x1's class, x2 over all images; id2 (N,) is x2's label."""
    def __init__(self, images, labels, batch_size, generator):
        self.images, self.labels, self.batch_size, self.generator = images, labels, batch_size, generator
        self.classes = [(labels == c).nonzero().flatten() for c in labels.unique()]  # indices of images

    def __len__(self):
        return math.ceil(len(self.images) / self.batch_size)

    def __iter__(self):
        n, draw = len(self.images), {"generator": self.generator, "device": self.images.device}
        partner = torch.empty(n, dtype=torch.long, device=self.images.device)
        for members in self.classes:  # x1_same, by index; it may be x1 itself, as in the authors' code
            partner[members] = members[torch.randint(len(members), members.shape, **draw)]
        # Departure: the authors' code draws x1 with replacement, and all classes equally often.
        order, others = torch.randperm(n, **draw), torch.randint(n, (n,), **draw)
        for i1, i2 in zip(order.split(self.batch_size), others.split(self.batch_size)):
            yield self.images[i1], self.images[partner[i1]], self.images[i2], self.labels[i2]

# ---- 3. The four terms, in nats per image: sums over pixels and dimensions, means over the batch -
def reconstruction_term(x1, x1_decoded):
    """Term 1, likelihood. x1 and Dec(z1, s1), both (N, 1, 28, 28) in [0, 1]; scalar >= 0.

        -log p(x1 | z1, s1) = sum over pixels of ((2 x1 - 1) - (2 x~ - 1))^2,   x~ = Dec(z1, s1)

    That is a Gaussian of variance 1/2 on pixels in [-1, 1] without its constant; so in the authors' code."""
    return (2 * x1 - 2 * x1_decoded).square().sum() / len(x1)

def kl_term(mu, logvar):
    """Term 1, KL: z1 holds at most this many nats of x1, on average. Both (N, z_dim); scalar >= 0.

        KL(N(mu, exp(logvar)) || N(0, I)) = 1/2 sum over dimensions of  mu^2 + exp(logvar) - 1 - logvar

    Departure: f_z's second output is log sigma to the authors' KL, but log sigma^2 to their draws of z1."""
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(dim=1).mean()

def swap_term(x1, x1_swapped):
    """Term 2: decoded with the s of another image of its class, x1 must still come out; scalar >= 0.

        -log p(x1 | z1, s1_same),   s1_same = f_s(x1_same)

    So s is to hold what the class shares. Departure: the authors' code takes term 1 for all three images,
    term 2 in both directions and term 3 for two pairs; here each is taken once, for x1."""
    return reconstruction_term(x1, x1_swapped)

def adversary_term(verdicts):
    """Term 3: decoded with x2's s, z1 must pass for a real image of class id2. Verdicts (N,); scalar >= 0.

        -log sigmoid(Adv(Dec(z1, s2), id2)),   which is softplus(-Adv(Dec(z1, s2), id2))

    Whatever z1 knows of x1's class must not show; likelihoods alone allow a z that carries everything. The
    non-saturating loss (Goodfellow et al. 2014) pushes hardest while the adversary wins."""
    return F.softplus(-verdicts).mean()

def prior_term(verdicts):
    """Term 4: so must z drawn from the prior. Verdicts (N,); scalar >= 0.

        -log sigmoid(Adv(Dec(z, s2), id2)),   z ~ N(0, I)

    Departure: the authors' code has it, too, but runs with a weight of 0."""
    return adversary_term(verdicts)

def adversary_loss(real, fakes):
    """The adversary's loss, of its verdicts on the real x2 (N,) and on both fakes (2N,); scalar >= 0.

        -log sigmoid(Adv(x2, id2)) - mean over both fakes of  log(1 - sigmoid(Adv(fake, id2)))

    Departure: the authors' code aims at 0.95 instead of 1 for "real", and never shows it Dec(z, s2)."""
    return F.softplus(-real).mean() + F.softplus(fakes).mean()

# ---- 4. Training: one step, and the loop ---------------------------------------------------------
def train_step(model, adversary, optimizer, adversary_optimizer, triple, config, generator):
    """Figure 1, once through, and a step of both sides. Returns the terms and how the adversary does.
    A weight of 0 only takes its term out of the sum: it is still measured, the adversary still trains."""
    x1, x1_same, x2, id2 = triple
    # Codes. One call on a joined batch gives what three calls would, and faster.
    s1, s1_same, s2 = model.f_s(torch.cat([x1, x1_same, x2])).chunk(3)
    mu, logvar = model.f_z(x1, s1)
    z1 = model.reparameterize(mu, logvar, generator)
    z = torch.randn(z1.shape, generator=generator, device=z1.device)  # from the prior
    # Decodings: Dec(z1, s1) and Dec(z1, s1_same), to be x1; Dec(z1, s2) and Dec(z, s2), the fakes of id2.
    x1_decoded, x1_swapped = model.decode(torch.cat([z1, z1]), torch.cat([s1, s1_same])).chunk(2)
    fakes = model.decode(torch.cat([z1, z]), torch.cat([s2, s2]))
    # Terms. Gradients pass through the adversary to the fakes, but its weights get none; and in eval mode
    # spectral norm's running estimates of their largest singular values stand still.
    adversary.eval().requires_grad_(False)
    reconstruction = reconstruction_term(x1, x1_decoded)
    kl = kl_term(mu, logvar)
    swap = swap_term(x1, x1_swapped)
    verdicts, verdicts_prior = adversary(fakes, torch.cat([id2, id2])).chunk(2)
    term3 = adversary_term(verdicts)  # printed as "adversary"
    term4 = prior_term(verdicts_prior)  # printed as "prior"
    # The encoders and the decoder descend the weighted sum. (KL can't reach the decoder, nor term 4 f_z.)
    loss = config.reconstruction_weight * reconstruction + config.kl_weight * kl + config.swap_weight * swap
    loss = loss + config.adversary_weight * term3 + config.prior_weight * term4
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    # The adversary learns to tell the real x2 from the same fakes, detached: only the adversary moves.
    adversary.train().requires_grad_(True)
    judged = torch.cat([x2, fakes.detach()])  # in one call: one update of spectral norm
    of_real, of_fakes = adversary(judged, torch.cat([id2, id2, id2])).split([len(x2), len(fakes)])
    loss_of_adversary = adversary_loss(of_real, of_fakes)
    adversary_optimizer.zero_grad()
    loss_of_adversary.backward()
    adversary_optimizer.step()
    measures = {"reconstruction": reconstruction, "kl": kl, "swap": swap, "adversary": term3, "prior": term4,
                "adversary_loss": loss_of_adversary, "right_on_real": (of_real > 0).float().mean(),
                "right_on_fakes": (of_fakes < 0).float().mean()}  # fmt: skip
    return {name: value.detach() for name, value in measures.items()}

def train(config, data, checkpoint=None, resume=False):
    """Train an AdvVAE on data: it has .config, .dataset (a name) and .history (each epoch's means). Writes
    checkpoint, if given, after each epoch; resume goes on from it and, with the same config and data, on the
    CPU ends in the very weights of an uninterrupted run. Raises UserError if a loss is no longer finite."""
    generator = torch.Generator(data.images.device).manual_seed(config.seed)  # of triples, eps and z
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers go on as before
        torch.manual_seed(config.seed)  # of the first weights
        model, adversary = AdvVAE(config.s_dim, config.z_dim), Adversary(int(data.labels.max()) + 1)
    for net in (model, adversary):
        net.to(generator.device, memory_format=torch.channels_last)  # in which convolutions are fastest
    model.config, model.dataset, model.history = config, data.name, []
    parts = {"model": model, "adversary": adversary}  # by train_step's names
    parts["optimizer"] = torch.optim.Adam(model.parameters(), betas=(0.5, 0.99))
    parts["adversary_optimizer"] = torch.optim.Adam(adversary.parameters(), betas=(0.5, 0.99))
    if resume:
        saved = load_checkpoint(checkpoint).saved
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        generator.set_state(saved["generator"])
        model.history = saved["history"]
    sampler = TripleSampler(data.images, data.labels, config.batch_size, generator)
    for epoch in range(len(model.history) + 1, config.epochs + 1):
        start, sums = time.perf_counter(), 0
        for step, triple in enumerate(sampler, start=1):
            # Departure: the learning rate is constant for half of the steps, then falls linearly to 0.
            done = (epoch - 1 + (step - 0.5) / len(sampler)) / config.epochs  # in the middle of the step
            for group in parts["optimizer"].param_groups + parts["adversary_optimizer"].param_groups:
                group["lr"] = config.learning_rate * min(1, 2 * (1 - done))
            with torch.autocast("cpu", torch.bfloat16, enabled=config.bfloat16 > 0):
                measures = train_step(**parts, triple=triple, config=config, generator=generator)
            sums = sums + len(triple[0]) * torch.stack(list(measures.values()))
        means = dict(zip(measures, (sums / len(data.images)).tolist()))  # over images, each at its own step
        line = "  ".join(f"{name} {value:.2f}" for name, value in means.items())
        if not all(math.isfinite(value) for value in means.values()):
            raise UserError(f"epoch {epoch} ends in {line}; try a lower --learning-rate or lower weights")
        model.history.append(means)
        if checkpoint:
            save_checkpoint(checkpoint, parts, generator)
        seconds = time.perf_counter() - start
        left = f"{seconds * (config.epochs - epoch) / 60:.1f} min left"
        print(f"epoch {epoch}/{config.epochs}  {line}  {seconds:.1f} s, {left}", flush=True)
    return model.eval()

# ==== This was the paper's method. What follows feeds it, measures it and draws it. ===============
# ---- 5. Data: MNIST and its kin, and characters set in type --------------------------------------
SOURCES = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST", "auto": "MNIST"}
DIGITS = "0123456789"

@dataclass
class Data:
    """A data set on one device. Raises UserError if it isn't as the comments say."""
    name: str
    images: torch.Tensor  # (M, 1, 28, 28), float32 in [0, 1]
    labels: torch.Tensor  # (M,), integers from 0 up, two classes or more; test labels are none but these
    test_images: torch.Tensor
    test_labels: torch.Tensor
    factors: dict | None = None  # of typeset: what `render` drew each image from, tensors (M,) on the CPU
    test_factors: dict | None = None

    def __post_init__(self):
        most, pairs = self.labels.max(), ((self.images, self.labels), (self.test_images, self.test_labels))
        for x, y in pairs:
            if y.shape != x.shape[:1] or y.is_floating_point() or not 0 <= y.min() < y.max() <= most:
                raise UserError(f"{self.name}: labels must be M integers from 0 up, of two classes at least")
            if x.shape[1:] != (1, 28, 28) or x.dtype != torch.float32 or not 0 <= x.min() <= x.max() <= 1:
                raise UserError(f"{self.name}: images must be float32 in [0, 1], (M, 1, 28, 28)")
        self.labels, self.test_labels = self.labels.long(), self.test_labels.long()

def load_data(name, data_dir="data", device="cpu"):
    """The Data called name: typeset, one of SOURCES (downloaded into data_dir unless it is there), or auto:
    mnist or, where that can't be had, typeset. Raises UserError that says what to do."""
    if name == "typeset":
        generator = torch.Generator().manual_seed(0)  # the same digits for every --seed and device
        x, y, factors = typeset(60_000, generator)
        test_x, test_y, test_factors = typeset(10_000, generator)
        return Data(name, *(t.to(device) for t in (x, y, test_x, test_y)), factors, test_factors)
    if name not in SOURCES:
        raise UserError(f"'{name}' is none of the data sets typeset, {', '.join(SOURCES)}")
    try:
        source = getattr(torchvision.datasets, SOURCES[name])
        train_part, test_part = source(data_dir, download=True), source(data_dir, train=False)
    except Exception as error:  # downloads, damaged and unreadable files fail in many ways
        why = f"{data_dir}/{SOURCES[name]} can't be filled or read ({error!r:.200}); delete what is damaged"
        why += " there, go online and run again, or use --dataset typeset"
        if name != "auto":
            raise UserError(why) from error
        print("!" * 99, f"NOT MNIST BUT TYPESET, which needs no download: {why}", "!" * 99, sep="\n")
        return load_data("typeset", device=device)
    x, test_x = (part.data.to(device).unsqueeze(1) / 255 for part in (train_part, test_part))
    y, test_y = (part.targets.to(device) for part in (train_part, test_part))
    print(f"Read {len(x):,} training and {len(test_x):,} test images from {data_dir}/{SOURCES[name]}")
    return Data(name.replace("auto", "mnist"), x, y, test_x, test_y)

# For the README's exercise 7: what all DejaVu and STIX faces have, but mere dots and bars, and one of each
# shape (once all are equally tall, "o" looks like "O").
CHARACTERS = (DIGITS + "ABCDEFGHJKLMNOPQRSTUVWXYZabdefghijklmnqrtuyÆØÞßæðþđħĸŁŊŋŒƀƈƐƒƕƛƪƫƭƺƾɐɑɒɓɔɕɖɗɘəɚɜɝɞ"
    "ɟɠɢɣɤɥɦɧɩɬɮɯɰɱɲɳɴɶɷɸɹɺɻɼɾɿʁʂʃʅʆʇʈʉʋʌʍʎʏʐʑʒʓʔʕʖʗʘʚʛʜʝʞʠʣʤʥʦʧʨΓΔΞΣΦΨΩαβγδζλμνξπρςστφχωϘϚϛϝϞϟϠϡЂЉЊЋЏД"
    "ЖЛУЦЧШЩЪЫЬЭЮЯвгдилмтфщъыюђљћѢѣҐ!#$%&()*+/:;<=>?@[\\]{}~¢£¤¥§©«¬®°±¶»¿×÷‟†‡‹›€∂")  # fmt: skip
# Faces of matplotlib's own fonts, and the degrees they lean by. (Not cmmi10: its digits differ in size.)
FACES = {"DejaVuSans": 0, "DejaVuSans-Bold": 0, "DejaVuSansMono": 0, "DejaVuSansMono-Bold": 0,
         "DejaVuSerif": 0, "DejaVuSerif-Bold": 0, "DejaVuSans-Oblique": 11, "DejaVuSans-BoldOblique": 11,
         "DejaVuSansMono-Oblique": 11, "DejaVuSansMono-BoldOblique": 11, "DejaVuSerif-Italic": 11,
         "DejaVuSerif-BoldItalic": 11, "STIXGeneral": 0, "STIXGeneralBol": 0, "STIXGeneralItalic": 16.3,
         "STIXGeneralBolIta": 16.3, "cmr10": 0, "cmb10": 0, "cmss10": 0, "cmtt10": 0}  # fmt: skip
CELL, HEIGHT = 128, 80  # dots: a character is drawn HEIGHT tall (or wide) in the middle of a square of CELL

@functools.cache
def glyph_atlas(characters):
    """Of faces with all characters, put upright: signed distance fields (faces, characters, 64, 64), how far
    inside the outline each place is, and stroke thickness (faces,), in heights of a character."""
    distances, thickness = [], []
    for face, degrees in FACES.items():
        font = font_manager.FontProperties(fname=f"{get_data_path()}/fonts/ttf/{face}.ttf")
        if not all(font_manager.get_font(font.get_file()).get_char_index(ord(c)) for c in characters):
            continue
        sheet = RendererAgg(CELL * len(characters), CELL, dpi=CELL)
        fill = sheet.new_gc()
        fill.set_linewidth(0)
        for column, character in enumerate(characters):
            outline = textpath.TextPath((0, 0), character, prop=font)
            outline = outline.transformed(transforms.Affine2D().skew_deg(-degrees, 0))  # upright
            box = outline.get_extents()
            place = transforms.Affine2D().translate(-(box.x0 + box.x1) / 2, -(box.y0 + box.y1) / 2)
            place.scale(HEIGHT / max(box.width, box.height)).translate(CELL * (column + 0.5), CELL * 0.5)
            sheet.draw_path(fill, outline, place, (0.0, 0.0, 0.0))
        dots = torch.frombuffer(sheet.buffer_rgba(), dtype=torch.uint8).view(CELL, len(characters), CELL, 4)
        ink = dots[..., 3].transpose(0, 1) / 255  # how opaque: (characters, 128, 128)
        # Distance transform: the squared distance from each dot to the nearest one without ink, and to the
        # nearest one with it, or 12**2 if that is less; along rows, then along columns.
        squared = torch.where(torch.stack([ink <= 0.5, ink > 0.5]), 0.0, 12**2)
        for axis in (-1, -2):
            squared = torch.stack([squared.roll(k, axis) + k**2 for k in range(-12, 13)]).amin(dim=0)
        inside, outside = squared.sqrt() - 0.5  # the edge is half a dot before the nearest dot beyond it
        distances.append(F.avg_pool2d(torch.where(ink > 0.5, inside, -outside), 2) / HEIGHT)
        thickness.append(stroke_thickness(ink.unsqueeze(1)).mean() / HEIGHT)
    return torch.stack(distances), torch.stack(thickness)

def render(labels, factors, characters=DIGITS):
    """Draw characters[label] for labels (N,) and factors, a dict of (N,): images (N, 1, 28, 28) in [0, 1].
    slant is in pixels right per pixel up; stroke thickness, size (height), shift_x, shift_y in pixels."""
    (atlas, face_thickness), images = glyph_atlas(characters), []
    for i in torch.arange(len(labels)).split(1000):
        f = {name: values[i] for name, values in factors.items()}
        # Where in its cell is what shows at (x, y), both from -1 to 1, y down? Undo shift, slant, size.
        k, dx, dy = (28 / CELL) * HEIGHT / f["size"], f["shift_x"] / 14, f["shift_y"] / 14
        theta = torch.stack([k, k * f["slant"], -k * (dx + f["slant"] * dy), 0 * k, k, -k * dy], dim=1)
        grid = F.affine_grid(theta.view(-1, 2, 3), (len(i), 1, 28, 28), align_corners=False)
        cells = atlas[f["font"], labels[i]].unsqueeze(1)  # (n, 1, 64, 64)
        inside = F.grid_sample(cells, grid, padding_mode="border", align_corners=False)  # (n, 1, 28, 28)
        # In pixels; strokes are fattened by moving their edge. A pixel on the edge is covered in part.
        more = f["thickness"] - face_thickness[f["font"]] * f["size"]
        images.append((f["size"].view(-1, 1, 1, 1) * inside + more.view(-1, 1, 1, 1) / 2 + 0.5).clamp(0, 1))
    return torch.cat(images)

def typeset(n, generator, characters=DIGITS):
    """n random characters: images (n, 1, 28, 28) in [0, 1], labels (n,), `render`'s factors; on the CPU."""
    face_thickness = glyph_atlas(characters)[1]
    labels = torch.randint(len(characters), (n,), generator=generator)
    factors = {"font": torch.randint(len(face_thickness), (n,), generator=generator)}
    ranges = dict(slant=(-0.5, 0.5), size=(16, 22), shift_x=(-2, 2), shift_y=(-2, 2), thickness=(1.5, 4))
    for name, (low, high) in ranges.items():
        factors[name] = low + (high - low) * torch.rand(n, generator=generator)
    # Thinned by more than .7 pixels a bold face loses its hairlines; fattened by more than 2, loops fill.
    own = face_thickness[factors["font"]] * factors["size"]
    factors["thickness"] = own + (factors["thickness"] - own).clamp(-0.7, 2.0)
    return render(labels, factors, characters), labels, factors

# ---- 6. What do z and s know? --------------------------------------------------------------------
def fit_classifier(net, inputs, labels, epochs, generator, std=None):
    """Train net to tell labels (M,) from inputs (M, ...) or new draws around them; net in eval mode."""
    steps = math.ceil(len(labels) / 500)  # in batches of equal sizes: batch norm can't take a last one of 1
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=epochs * steps)
    for _ in range(epochs):
        x = inputs if std is None else torch.normal(inputs, std, generator=generator)
        for i in torch.randperm(len(labels), generator=generator, device=labels.device).tensor_split(steps):
            optimizer.zero_grad()
            F.cross_entropy(net(x[i]), labels[i]).backward()
            optimizer.step()
            schedule.step()
    return net.eval()

def probe_accuracy(codes, test_codes, labels, test_labels, generator, std=None, width=256, epochs=15):
    """How well codes (M, d), or draws around them, tell the class: on test_codes (N, d), the accuracy in
    [0, 1] of a network with two hidden layers (the authors' code: one), as in the paper's experiments."""
    sizes = width, width, int(labels.max()) + 1
    net = torchvision.ops.MLP(codes.shape[1], sizes, norm_layer=nn.BatchNorm1d).to(codes.device)
    fit_classifier(net, codes, labels, epochs, generator, std)
    return (net(test_codes).argmax(dim=1) == test_labels).float().mean()

def fit_judge(images, labels, generator, epochs=3):
    """A small classifier of images (M, 1, 28, 28). Its last layer is judge[-1]; what goes in, features."""
    judge = nn.Sequential(
        nn.Conv2d(1, 32, 5, stride=2, padding=2), nn.BatchNorm2d(32), nn.ReLU(),  # (N, 32, 14, 14)
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),  # (N, 64, 7, 7)
        nn.Flatten(), nn.Linear(64 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, int(labels.max()) + 1))
    judge.to(images.device, memory_format=torch.channels_last)
    return fit_classifier(judge, images, labels, epochs, generator)

def slant(images):
    """Slant, (N, 1, H, W) -> (N,): pixels to the right per pixel upward, by second moments of the ink."""
    ink = images[:, 0] / images.sum(dim=(1, 2, 3)).clamp_min(1e-6).view(-1, 1, 1)
    y, x = torch.meshgrid(*(torch.arange(n, device=ink.device) for n in ink.shape[1:]), indexing="ij")
    dy, dx = (at - (ink * at).sum(dim=(1, 2), keepdim=True) for at in (y, x))  # from the centre of the ink
    return -(ink * dx * dy).sum(dim=(1, 2)) / (ink * dy * dy).sum(dim=(1, 2)).clamp_min(1e-6)

def stroke_thickness(images):
    """(N, 1, H, W) -> (N,) in pixels: twice the ink over the length of its edge; a stroke has two edges."""
    x = F.pad(images[:, 0], (0, 1, 0, 1))
    edge = torch.hypot(x[:, :-1, 1:] - x[:, :-1, :-1], x[:, 1:, :-1] - x[:, :-1, :-1]).sum(dim=(1, 2))
    return 2 * x.sum(dim=(1, 2)) / edge.clamp_min(1e-6)

def frechet_distance(a, b):
    """|mean(a) - mean(b)|^2 + trace(A + B - 2 (A B)^(1/2)), A and B the covariances of features a (N, d) and
    b (M, d): FID's squared distance of two Gaussians (Heusel et al. 2017)."""
    a, b = a.cpu().double(), b.cpu().double()
    trace = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).sqrt().real.sum()  # of (A B)^(1/2)
    return ((a.mean(dim=0) - b.mean(dim=0)).square() + a.var(dim=0) + b.var(dim=0)).sum() - 2 * trace

def linear_r2(codes, factor, test_codes, test_factor):
    """The share of test_factor (N,)'s variance that a linear function, fitted to codes (M, d), explains."""
    codes, test_codes = (F.pad(c.cpu(), (0, 1), value=1.0) for c in (codes, test_codes))
    fitted = test_codes @ torch.linalg.lstsq(codes, factor.unsqueeze(1), driver="gelsy").solution
    return 1 - (test_factor - fitted.squeeze(1)).var() / test_factor.var()

@torch.random.fork_rng(devices=[])  # the caller's random numbers go on as before
def evaluate(model, data, seed=0):
    """Print what z and s know of the test images; return it as a dict. All fits are to training images."""
    x, y, test_x, test_y = data.images, data.labels, data.test_images, data.test_labels
    generator = torch.Generator(x.device).manual_seed(seed)
    torch.manual_seed(seed)  # of the classifiers' first weights
    x2 = torch.randint(len(test_x), test_y.shape, generator=generator, device=x.device)
    while (same := test_y[x2] == test_y).any():  # s is to come from an image of another class
        x2[same] = torch.randint(len(test_x), (int(same.sum()),), generator=generator, device=x.device)
    with torch.no_grad():
        (s, mu, logvar), (test_s, test_mu, test_logvar) = model.eval().encode(x), model.encode(test_x)
        test_z = model.reparameterize(test_mu, test_logvar, generator)
        # Swaps are of mu, as in the swap grid; "drawn" ones of a draw of z, as in term 3.
        decoded, swapped = model.decode(test_mu, test_s), model.decode(test_mu, test_s[x2])
        drawn = model.decode(test_z, test_s[x2])
        sampled = model.decode(torch.randn(test_z.shape, generator=generator, device=x.device), test_s)
    std = torch.exp(logvar / 2)  # z is drawn anew in each pass; faint traces take many passes
    r = {"class from z": probe_accuracy(mu, test_z, y, test_y, generator, std, epochs=40)}
    r["class from mu"] = probe_accuracy(mu, test_mu, y, test_y, generator)
    r["class from s"] = probe_accuracy(s, test_s, y, test_y, generator)
    r["class by chance"] = test_y.bincount().max() / len(test_y)
    judge = fit_judge(x, y, generator)  # says which class a decoded image has
    judged = {"swapped": (swapped, test_y[x2]), "drawn": (drawn, test_y[x2]),
              "prior": (sampled, test_y), "real": (test_x, test_y)}
    with torch.no_grad():
        of_real = judge[:-1](x[torch.randperm(len(x), generator=generator, device=x.device)[:10_000]])
        for kind, (images, labels) in judged.items():
            features = judge[:-1](images)
            r[f"right class, {kind}"] = (judge[-1](features).argmax(dim=1) == labels).float().mean()
            r[f"Frechet distance, {kind}"] = frechet_distance(features, of_real)
    r["squared error, decoded"] = F.mse_loss(decoded, test_x)
    r["KL of z, nats"] = kl_term(test_mu, test_logvar)
    for name, measured in (("slant", slant), ("thickness", stroke_thickness)):
        for code, source in (("z", test_x), ("s", test_x[x2])):
            both = torch.stack([measured(swapped), measured(source)])
            r[f"{name} from {code}'s source, r"] = torch.corrcoef(both)[0, 1].nan_to_num(0)
    if data.factors:
        true = render(test_y[x2].cpu(), data.test_factors)
        r["squared error, swapped"] = F.mse_loss(swapped.cpu(), true)
        z = model.reparameterize(mu, logvar, generator)
        for name in ("slant", "thickness", "size", "shift_x", "shift_y"):
            factor, test_factor = data.factors[name], data.test_factors[name]
            r[f"true {name} from z, R2"] = linear_r2(z, factor, test_z, test_factor)
            r[f"true {name} from s, R2"] = linear_r2(s, factor, test_s, test_factor)
    print(f"\nWhat z and s know ({data.name}, test images)")
    for what in r:
        r[what] = float(r[what])
        print(f"  {what:<30}{r[what]:9.4f}", flush=True)
    return r

# ---- 7. Checkpoint and command line --------------------------------------------------------------
def save_checkpoint(path, parts, generator):
    """Write parts and all else that the rest of training depends on."""
    model, saved = parts["model"], {name: part.state_dict() for name, part in parts.items()}
    saved |= {"config": asdict(model.config), "dataset": model.dataset, "history": model.history}
    saved |= {"generator": generator.get_state(), "device": generator.device.type}
    torch.save(saved, content := io.BytesIO())  # torch's own message on a full disk is obscure
    Path(f"{path}.tmp").write_bytes(content.getbuffer())
    Path(f"{path}.tmp").replace(path)  # only now: a run that is stopped before keeps the last one whole

def load_checkpoint(path, device="cpu"):
    """The trained AdvVAE on device, in eval mode; its .saved is all that was written. Raises UserError."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)  # data only: no code in it runs
        model = AdvVAE(saved["config"]["s_dim"], saved["config"]["z_dim"])
        model.load_state_dict(saved["model"])
        model.config, model.dataset = Config(**saved["config"]), saved["dataset"]
        model.history, model.saved = saved["history"], saved
    except Exception as error:  # torch.load raises almost anything on a file of another kind
        fault = "is no checkpoint of this advvae.py: move it"
        fault = "isn't there: train first" if isinstance(error, FileNotFoundError) else fault
        raise UserError(f"{path} {fault}, or name another --checkpoint") from error
    return model.to(device, memory_format=torch.channels_last).eval()

def command_line(argv):
    """The flags as a dict; with --resume, the checkpoint's settings. Raises UserError."""
    flags = asdict(Config()) | {"dataset": "auto", "data_dir": "data", "device": "auto"}
    flags |= {"checkpoint": "advvae.pt", "figures_dir": "figures"}
    tip = f"""Data sets: typeset, {", ".join(SOURCES)} (mnist or, where it can't be had, typeset).
        Devices: cpu, cuda, mps (never tested), auto (cuda or cpu). Settings: see Config in advvae.py."""
    # Without defaults we see what was given; without a usage line an error is one line.
    parser = argparse.ArgumentParser("advvae.py", argparse.SUPPRESS, tip, argument_default=argparse.SUPPRESS)
    for name, default in flags.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), help=f"default {default}")
    parser.add_argument("--resume", action="store_true", help="go on from --checkpoint, or to more --epochs")
    given = vars(parser.parse_args(argv))
    flags |= {"resume": False} | given
    if flags["resume"]:
        saved = load_checkpoint(flags["checkpoint"]).saved
        flags |= saved["config"] | {"dataset": saved["dataset"], "device": saved["device"]}
        flags["epochs"] = max(given.get("epochs", flags["epochs"]), len(saved["history"]))
        for name, value in given.items():
            if value not in ("auto", flags[name]):  # auto agrees with whatever was saved
                name = f"--{name.replace('_', '-')} {value}"
                raise UserError(f"{name} contradicts {flags['checkpoint']}, which goes on without it")
    return flags

# ---- 8. Pictures, the swap grid last, and main ---------------------------------------------------
BLUE, ORANGE, WHITE = torch.tensor([[0.5, 0.75, 1], [1, 0.7, 0.3], [1, 1, 1]]).view(3, 3, 1, 1)  # s, z, Dec

def one_of_each_class(data):
    """The first test image of each of the first ten classes, (10, 1, 28, 28): nothing is picked by hand."""
    return torch.stack([data.test_images[data.test_labels == c][0] for c in data.test_labels.unique()[:10]])

@torch.no_grad()
def save_grid(path, title, model, zs, ss, left, top):
    """Save a picture of Dec(z, s), a row for each z of zs (R, z_dim), a column for each s of ss (C, s_dim);
    left (R, 1, 28, 28) and top (C, 1, 28, 28) are the images that gave them, black if none did."""
    rows = [torch.cat([torch.zeros(1, 3, 28, 28), top.cpu() * BLUE])]  # each (1 + C, 3, 28, 28)
    for z, source in zip(zs, left.cpu() * ORANGE):
        rows.append(torch.cat([source[None], model.decode(z.expand(len(ss), -1), ss).cpu() * WHITE]))
    grid = torchvision.utils.make_grid(torch.cat(rows), nrow=1 + len(ss), pad_value=0.25)
    axes = figure.Figure(figsize=(6.2, 6.6), layout="constrained").subplots()  # inches
    axes.set(title=title, xlabel="each column: one s", ylabel="each row: one z", xticks=[], yticks=[])
    axes.imshow(grid.permute(1, 2, 0).numpy())
    axes.figure.savefig(path, dpi=110)

def plot_curves(model, data, path):
    """model's history by epoch: the terms, the adversary's loss and how often it is right."""
    axes = figure.Figure(figsize=(8, 4.5), layout="constrained").subplots()
    for name in model.history[0]:
        values = [means[name] for means in model.history]
        axes.plot(range(1, len(values) + 1), values, ".-", label=name.replace("_", " "))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    axes.set(title=f"{data.name}: terms and losses in nats, shares of 1", xlabel="epoch", yscale="log")
    axes.figure.savefig(path, dpi=110)

def plot_samples(model, data, path):
    """A random z ~ N(0, I) along each row, the s of a test image of each class down each column."""
    x = one_of_each_class(data)
    zs = torch.randn(10, model.z_dim, generator=torch.Generator().manual_seed(0)).to(x.device)
    save_grid(path, f"{data.name}: the blue image's class, any style", model, zs, model.f_s(x), 0 * x, x)

def plot_interpolation(model, data, path):
    """From one test image to another: s to the right, z downwards."""
    x = one_of_each_class(data)
    t = torch.linspace(0, 1, len(x), device=x.device).unsqueeze(1)
    s, mu, _ = model.encode(x)
    ways = torch.lerp(mu[0], mu[-1], t), torch.lerp(s[0], s[-1], t)
    ends = torch.cat([x[:1], 0 * x[1:-1], x[-1:]])
    save_grid(path, f"{data.name}: from one test image's s and z to another's", model, *ways, ends, ends)

def plot_swap(model, data, path):
    """The swap grid: mu of a test image of each class along each row, s of the same down each column."""
    x = one_of_each_class(data)
    s, mu, _ = model.encode(x)
    save_grid(path, f"{data.name}: the blue image's class, the orange one's style", model, mu, s, x, x)

def main(argv=None):
    """Train, evaluate and draw. What the user can put right ends in one line on stderr and exit code 2."""
    socket.setdefaulttimeout(20)  # seconds: some firewalls swallow a download's request without a word
    try:
        flags = command_line(argv)
        config = Config(**{name: flags[name] for name in asdict(Config())})
        cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
        device = flags["device"].replace("auto", "cuda" if cuda else "cpu")
        if not {"cpu": True, "cuda": cuda, "mps": mps}.get(device):
            raise UserError(f"there is no device {device} here; use --device cpu, or resume where it began")
        checkpoint, folder = Path(flags["checkpoint"]), Path(flags["figures_dir"])
        for place in (folder, checkpoint.parent):
            place.mkdir(parents=True, exist_ok=True)  # better a fault now than after training
        if checkpoint.exists() and not flags["resume"]:
            load_checkpoint(checkpoint)  # refuses any other file
            print(f"{checkpoint} is replaced after the first epoch; --resume would go on from it")
        data = load_data(flags["dataset"], flags["data_dir"], device)
        print(f"Training on {data.name}, {device}; the learning rate falls after {config.epochs / 2} epochs")
        model = train(config, data, checkpoint, flags["resume"])
        evaluate(model, data)
        for plot in (plot_curves, plot_samples, plot_interpolation, plot_swap):
            plot(model, data, folder / f"{data.name}-{plot.__name__.removeprefix('plot_')}.png")
        print(f"Weights: {checkpoint}. Pictures: {folder}/{data.name}-swap.png and three more.", flush=True)
    except KeyboardInterrupt:
        print("advvae.py: stopped; if an epoch was whole, --resume goes on after it", file=sys.stderr)
        sys.exit(130)
    except (UserError, OSError) as error:  # OSError: a full disk, a folder that can't be written to
        print(f"advvae.py: {error}", file=sys.stderr)
        sys.exit(2)

if __name__ == "__main__":
    main()
