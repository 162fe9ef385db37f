# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.3", "torchvision>=0.18", "matplotlib>=3.10.7"]
# ///
"""Disentangling factors of variation with adversarial training, in one file.

A reference implementation of Mathieu, Zhao, Sprechmann, Ramesh, LeCun, "Disentangling factors of variation
in deep representations using adversarial training" (NIPS 2016, arXiv 1611.03383), to be read beside the
paper from top to bottom: sections 1 to 4 in half an hour (skip the data sets at first), 5 and 6 in another.
(Left out: the paper's data sets Sprites, NORB, Extended YaleB and their networks.)

From images and class labels, learn two codes: s, the *specified* factor (what the label says: which digit
it is), and z, the *unspecified* ones (everything else: slant, stroke width, size, handwriting). Nothing ever
says what z should be; training only knows which images share a class. The paper's Figure 1, with this
file's sections in brackets; f_s is called SpecifiedEncoder here, f_z UnspecifiedEncoder, Dec Decoder:

    triples [2]     x1;  x1_same, of x1's class;  x2, any image, of class id2
    codes [1]       s1 = f_s(x1)      s1_same = f_s(x1_same)      s2 = f_s(x2)
                    z1 ~ f_z(x1, s1)  z ~ N(0, I)
    decoder [1]     Dec(z1, s1) ------> is it x1?      term 1 [3], with the KL of z1
                    Dec(z1, s1_same) -> is it x1?      term 2
                    Dec(z1, s2) ------> adversary      term 3   | the two fakes: each must
                    Dec(z, s2) -------> adversary      term 4   | pass for a real image of id2
    adversary [1]   learns to tell the real x2 from both fakes, given id2

One step and the loop [4]; what z and s know [5]; pictures, the swap grid last [6].

    python advvae.py --epochs 20            train, evaluate, draw into figures/
    python advvae.py --dataset typeset      the same with digits set in type: nothing to download
    python advvae.py --resume               go on where it was interrupted
    python advvae.py --plot-only            draw again from advvae.pt
    python advvae.py --help                 every flag, its default and its unit

Change what you like: a network may be anything that keeps its shapes in and out, a term anything that gives
a scalar; `python -m pytest` says which fact of the method a change breaks. Beyond the paper there is
one extension, off by default and marked as such: --leak-weight [3].
"""

import argparse
import copy
import functools
import io
import math
import os
import socket
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch  # torchvision and matplotlib take seconds to import, and are imported where they are used
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

# ---- Configuration: the settings; the command line's flags are made from it ----------------------

TERMS = "reconstruction", "kl", "swap", "adversary", "prior", "leak"  # leak is an extension, off by default
CPUINFO = Path("/proc/cpuinfo")  # where Linux lists a processor's features
BFLOAT16_IS_FAST = int(CPUINFO.exists() and "_bf16" in CPUINFO.read_text())  # avx512_bf16 or amx_bf16


class UserError(Exception):
    """What the user can put right. main prints it as one line and exits with code 2."""


def setting(default, low, high, text):
    """A field of Config: its default, its least and its greatest value, and what it is."""
    return field(default=default, metadata={"low": low, "high": high, "text": text})


@dataclass
class Config:
    """The settings, chosen by measurement on MNIST where no source is named. Raises UserError."""

    epochs: int = setting(20, 0, 10**6, "passes over the training set, each image once as x1")
    batch_size: int = setting(512, 1, 10**6, "triples a step (authors' code: 16); 128 at 3e-3: sharper")
    learning_rate: float = setting(4e-3, 0, 1, "of both Adams (authors': 0.01); falls to 0 from half-way on")
    seed: int = setting(0, 0, 2**63 - 1, "same seed, same machine: same result on the CPU")
    reconstruction_weight: float = setting(0.2, 0, 1e6, "of term 1's likelihood; 0 removes a term")
    kl_weight: float = setting(8.0, 0, 1e6, "of term 1's KL")
    swap_weight: float = setting(1.0, 0, 1e6, "of term 2; the others are relative to it (authors' code: 1)")
    adversary_weight: float = setting(30.0, 0, 1e6, "of term 3")
    prior_weight: float = setting(30.0, 0, 1e6, "of term 4 (authors' code: 0)")
    leak_weight: float = setting(0.0, 0, 1e6, "of the extension, what z tells of the class; try 60")
    s_dim: int = setting(16, 1, 1000, "dimensions of s (authors' code: 64)")
    z_dim: int = setting(16, 1, 1000, "dimensions of z (authors' code: 512)")
    bfloat16: int = setting(BFLOAT16_IS_FAST, 0, 1, "1: bfloat16 on a CPU; default 1 if it is built for it")

    @property
    def weights(self):
        """The weight of each term, by the term's name."""
        return {name: getattr(self, f"{name}_weight") for name in TERMS}

    def __post_init__(self):
        for f in fields(self):
            value, low, high = getattr(self, f.name), f.metadata["low"], f.metadata["high"]
            if not low <= value <= high:
                raise UserError(f"{f.name} is {value}; it must be from {low} to {high}")
        if not any(weight for name, weight in self.weights.items() if name not in ("kl", "leak")):
            raise UserError("every term that decodes has weight 0: there is nothing to train")


# ---- 1. Networks: f_s, f_z, the decoder, the adversary -------------------------------------------
# Effects of departures are measured on MNIST after 6 epochs, seed 0, where the file as it stands gives:
# class told from z 28.5 %, swapped class right 97.1 %, reconstruction .0198, and prior samples have .77 of
# the real images' variance within a class (`python test_advvae.py departures`).
# Departure: the authors' networks halve images padded to 32x32 three times, in four convolutions or more.
# Here the first layer goes to 7x7 maps at once, for speed. Three 4x4 convolutions with stride 2 and their
# mirror image: z 29.5 %, swap 97.0 %, reconstruction .0238, variance .96.


class SpecifiedEncoder(nn.Sequential):
    """f_s: s = f_s(x), real-valued and deterministic. (N, 1, 28, 28) in [0, 1] -> (N, s_dim)."""

    def __init__(self, s_dim):
        super().__init__(
            nn.Conv2d(1, 16, 8, stride=4, padding=2), nn.LeakyReLU(0.2),  # (N, 16, 7, 7)
            nn.Conv2d(16, 32, 3), nn.Flatten(), nn.LeakyReLU(0.2),  # (N, 32, 5, 5), (N, 800)
            nn.Linear(800, 128), nn.LeakyReLU(0.2), nn.Linear(128, s_dim),
        )  # fmt: skip


class UnspecifiedEncoder(nn.Module):
    """f_z: mu, logvar = f_z(x, s). (N, 1, 28, 28) in [0, 1], (N, s_dim) -> twice (N, z_dim)."""

    def __init__(self, s_dim, z_dim):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 8, stride=4, padding=2), nn.Flatten(), nn.LeakyReLU(0.2))
        self.hidden = nn.Sequential(nn.Linear(784 + s_dim, 256), nn.LeakyReLU(0.2))
        self.scale = nn.Linear(s_dim, 256)
        self.out = nn.Linear(256, 2 * z_dim)

    def forward(self, x, s):
        # f_z sees s, as in the paper, so that it needn't recognize the digit by itself. (Not in the authors'
        # code. Without, training collapses; at a quarter of the learning rate: swap 91.4 %, reconstruction
        # .0291.) Departure: s also scales each feature, as what shows the slant may differ by digit.
        # Without: z 30.3 %, reconstruction .0225.
        h = self.hidden(torch.cat([self.stem(x), s], dim=1))  # (N, 256)
        return self.out(h * (1 + self.scale(s))).float().chunk(2, dim=1)


class Decoder(nn.Module):
    """Dec: x~ = Dec(z, s). (N, z_dim), (N, s_dim) -> (N, 1, 28, 28) in [0, 1]."""

    def __init__(self, s_dim, z_dim):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(z_dim + s_dim, 192), nn.LeakyReLU(0.2),
            nn.Linear(192, 784), nn.LeakyReLU(0.2), nn.Unflatten(1, (16, 7, 7)),
            nn.Conv2d(16, 16, 3, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(16, 16, 3, padding=1),  # (N, 16, 7, 7): 16 channels are a patch of 4x4 pixels
            nn.PixelShuffle(4),  # (N, 1, 28, 28)
        )  # fmt: skip

    def forward(self, z, s):
        return self.net(torch.cat([z, s], dim=1)).float().sigmoid()


class Adversary(nn.Module):
    """Adv: images (N, 1, 28, 28) in [0, 1], class ids (N,) -> verdicts (N,): logits, > 0 for "real".

    Departure: the authors' code adds learned maps per class to the output of several convolutions;
    here the features are compared with a learned vector per class (Miyato and Koyama 2018). One
    such map in place of the vector: z 28.7 %, swap 96.5 %, reconstruction .0197.
    Departure: every weight matrix is divided by its spectral norm (Miyato et al. 2018), which keeps
    the adversary's slope, and so the push of terms 3 and 4, bounded. Without:
    z 36.5 %, swap 95.9 %, reconstruction .0272.
    """

    def __init__(self, n_classes):
        super().__init__()
        self.features = nn.Sequential(
            nn.PixelUnshuffle(4),  # (N, 16, 7, 7)
            spectral_norm(nn.Conv2d(16, 32, 3)), nn.Flatten(), nn.LeakyReLU(0.2),  # (N, 32, 5, 5), (N, 800)
            spectral_norm(nn.Linear(800, 128)), nn.LeakyReLU(0.2),
        )  # fmt: skip
        self.real = spectral_norm(nn.Linear(128, 1))
        self.of_class = spectral_norm(nn.Embedding(n_classes, 128))

    def forward(self, x, id):
        h = self.features(x).float()  # (N, 128)
        return self.real(h).squeeze(1) + (self.of_class(id) * h).sum(dim=1)


class AdvVAE(nn.Module):
    """What remains after training: f_s, f_z and the decoder. The adversary serves training only."""

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


# ---- 2. Triples (x1, x1_same, x2), and the data sets that they are drawn from --------------------


class TripleSampler:
    """Iterating gives one epoch of batches (x1, x1_same, x2, id2, id1); each image is x1 exactly once.

    images (M, 1, 28, 28) and labels (M,), any integers, lie on one device, which is generator's too.
    x1_same is uniform over x1's class, x2 over all images; id2 is x2's label (caption of Figure 1), id1
    is x1's, which only the extension uses.
    Departure: x1_same may be x1 itself, as in the authors' code: 1 draw in 6,000 on MNIST. So a class may
    have a single image.
    """

    def __init__(self, images, labels, batch_size, generator):
        self.images, self.labels = images, labels
        self.batch_size, self.generator = batch_size, generator
        # by_class lists the images class by class; class c begins at first[c] and has size[c] images.
        _, self.class_of, self.size = labels.unique(return_inverse=True, return_counts=True)
        self.by_class = self.class_of.argsort(stable=True)
        self.first = self.size.cumsum(0) - self.size

    def __len__(self):
        return math.ceil(len(self.images) / self.batch_size)

    def __iter__(self):
        draw = {"generator": self.generator, "device": self.images.device}
        for i1 in torch.randperm(len(self.images), **draw).split(self.batch_size):
            c = self.class_of[i1]
            # 2**40 is so large that the remainder is as good as uniform
            i1_same = self.by_class[self.first[c] + torch.randint(2**40, c.shape, **draw) % self.size[c]]
            i2 = torch.randint(len(self.images), c.shape, **draw)
            yield self.images[i1], self.images[i1_same], self.images[i2], self.labels[i2], self.labels[i1]


@dataclass
class Data:
    """A data set on one device: images (M, 1, 28, 28) in [0, 1], labels (M,) = class ids 0, 1, ..."""

    name: str
    images: torch.Tensor
    labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    factors: dict | None = None  # of typeset only: what `render` drew each image from, tensors (M,)
    test_factors: dict | None = None


IDX_DATASETS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}  # torchvision's names


def load_data(name, data_dir="data", device="cpu"):
    """The Data called name: typeset, auto or a key of IDX_DATASETS (fetched if absent). Raises UserError."""
    if name == "typeset":
        generator = torch.Generator().manual_seed(0)  # the same digits for every --seed and device
        training, test = typeset(60_000, generator, device), typeset(10_000, generator, device)
        return Data(name, *training[:2], *test[:2], training[2], test[2])
    from torchvision import datasets

    auto = name == "auto"  # MNIST or, where it can't be had, typeset
    name = "mnist" if auto else name
    if name not in IDX_DATASETS:
        raise UserError(f"'{name}' is none of the data sets {', '.join(IDX_DATASETS)}, typeset")
    folder = Path(data_dir) / IDX_DATASETS[name] / "raw"
    files = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    absent = not all((folder / file).is_file() for file in files)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # seconds: some firewalls swallow a request without a word
    try:
        make = getattr(datasets, IDX_DATASETS[name])
        parts = [make(data_dir, train=training, download=absent) for training in (True, False)]
        for part in parts:
            if not len(part.data) == len(part.targets) > 1 or part.data.shape[1:] != (28, 28):
                raise ValueError(f"{len(part.targets)} labels for images {tuple(part.data.shape)}")
        classes = parts[0].targets.unique()
        if not torch.isin(parts[1].targets, classes).all():
            raise ValueError("a class that only the test set has")
    except Exception as error:  # on bad files torchvision raises almost anything, AssertionError included
        why = (str(error).strip() or type(error).__name__).splitlines()[-1]
        if not absent:
            raise UserError(f"{folder} holds no {name} ({why}); delete it and run again") from error
        ways = f"go online and run again, or put {', '.join(files)} there, or use --dataset typeset"
        why = f"{name} is not in {folder} and can't be downloaded ({why}); {ways}"
        if not auto:
            raise UserError(why) from error
        print("!" * 100, f"NOT MNIST BUT TYPESET, the embedded data set: {why}", "!" * 100, sep="\n")
        return load_data("typeset", device=device)
    finally:
        socket.setdefaulttimeout(timeout)
    images, test_images = (part.data.unsqueeze(1).to(device) / 255 for part in parts)  # (M, 1, 28, 28)
    labels, test_labels = (torch.searchsorted(classes, part.targets).to(device) for part in parts)
    return Data(name, images, labels, test_images, test_labels)


# The data set `typeset`: the digits of matplotlib's own fonts, each drawn with known slant, stroke
# thickness, size and shift. Files of faces, with the degrees that each leans by. (Left out: cmmi10,
# whose old-style digits differ in size, so size would tell the class; cmti10, not in every version.)
FACES = {f"DejaVu{face}": 0 for face in "Sans Sans-Bold SansMono SansMono-Bold Serif Serif-Bold".split()}
FACES |= {f"DejaVu{face}Oblique": 11 for face in "Sans- Sans-Bold SansMono- SansMono-Bold".split()}
FACES |= {"DejaVuSerif-Italic": 11, "DejaVuSerif-BoldItalic": 11, "STIXGeneral": 0, "STIXGeneralBol": 0}
FACES |= {"STIXGeneralItalic": 16.3, "STIXGeneralBolIta": 16.3}
FACES |= {"cmr10": 0, "cmb10": 0, "cmss10": 0, "cmtt10": 0}
CELL, HEIGHT = 128, 80  # dots: a digit is rasterized HEIGHT tall in the middle of a square of CELL


@functools.cache
def glyph_atlas():
    """Every face's digits as distances to their edge (20, 10, 64, 64), and its stroke thickness (20,).

    In heights of a digit; positive inside. Faces that lean are put upright first: `render` gives all slant.
    """
    from matplotlib import figure, font_manager, get_data_path, patches
    from matplotlib.textpath import TextPath
    from matplotlib.transforms import Affine2D

    sheet = figure.Figure(figsize=(10, len(FACES)), dpi=CELL)
    for row, (face, degrees) in enumerate(FACES.items()):
        font = font_manager.FontProperties(fname=f"{get_data_path()}/fonts/ttf/{face}.ttf")
        for digit in range(10):
            outline = TextPath((0, 0), str(digit), prop=font).transformed(Affine2D().skew_deg(-degrees, 0))
            (x0, y0), (x1, y1) = outline.get_extents().get_points()
            place = Affine2D().translate(-(x0 + x1) / 2, -(y0 + y1) / 2).scale(HEIGHT / (y1 - y0))
            place.translate(CELL * (digit + 0.5), CELL * (len(FACES) - row - 0.5))
            sheet.add_artist(patches.PathPatch(outline, transform=place, facecolor="black", linewidth=0))
    raster = io.BytesIO()
    sheet.savefig(raster, format="raw", dpi=CELL, facecolor="white")
    dots = torch.frombuffer(raster.getbuffer(), dtype=torch.uint8)
    ink = 1 - dots.view(len(FACES), CELL, 10, CELL, 4)[..., 0].transpose(1, 2) / 255  # (20, 10, 128, 128)
    # From each dot to the nearest one without ink and to the nearest one with it, or 12 if that is less.
    d = torch.where(torch.stack([ink <= 0.5, ink > 0.5]), 0.0, 12**2)
    for axis in (-1, -2):
        d = functools.reduce(torch.minimum, (d.roll(k, axis) + k**2 for k in range(-12, 13)))
    inside, outside = d.sqrt() - 0.5  # the edge lies half a dot before the nearest dot on its other side
    signed = torch.where(ink > 0.5, inside, -outside)
    thickness = stroke_thickness(ink.reshape(-1, 1, CELL, CELL)).view(len(FACES), 10).mean(dim=1)
    return F.avg_pool2d(signed, 2) / HEIGHT, thickness / HEIGHT


def render(labels, factors):
    """Draw digits labels (N,) with factors, a dict of tensors (N,): images (N, 1, 28, 28) in [0, 1].

    font indexes FACES; slant is in pixels to the right per pixel upward (a shear: it thins upright strokes
    by up to a tenth); thickness of the strokes, size (height), shift_x (right), shift_y (down), in pixels.
    """
    atlas, own = (table.to(labels.device) for table in glyph_atlas())
    images = []
    for i in torch.arange(len(labels), device=labels.device).split(1000):
        names = ("font", "slant", "size", "shift_x", "shift_y", "thickness")
        font, slant, size, dx, dy, thickness = (factors[name][i] for name in names)
        # Which place of its cell shows at (x, y) of the image, both from -1 to 1? Undo shift, slant, size.
        k, dx, dy = (28 / CELL) * HEIGHT / size, dx / 14, dy / 14
        theta = torch.stack([k, k * slant, -k * (dx + slant * dy), 0 * k, k, -k * dy], dim=1).view(-1, 2, 3)
        grid = F.affine_grid(theta, (len(i), 1, 28, 28), align_corners=False)
        cells = atlas[font, labels[i]].unsqueeze(1)  # (n, 1, 64, 64)
        inside = F.grid_sample(cells, grid, padding_mode="border", align_corners=False)  # (n, 1, 28, 28)
        # In pixels; strokes are fattened by moving their edge. A pixel on the edge is covered in part.
        size, more = size.view(-1, 1, 1, 1), (thickness - own[font] * size).view(-1, 1, 1, 1)
        images.append((size * inside + more / 2 + 0.5).clamp(0, 1))
    return torch.cat(images)


def typeset(n, generator, device="cpu"):
    """n random digits drawn with a CPU generator: images (n, 1, 28, 28), labels (n,), `render`'s factors."""
    ranges = dict(slant=(-0.5, 0.5), size=(16, 22), shift_x=(-2, 2), shift_y=(-2, 2), thickness=(1.5, 4.0))
    labels = torch.randint(10, (n,), generator=generator)
    factors = {"font": torch.randint(len(FACES), (n,), generator=generator)}
    for name, (low, high) in ranges.items():
        factors[name] = low + (high - low) * torch.rand(n, generator=generator)
    # Thinned by more than .7 pixels a bold face loses its hairlines; fattened by more than 2, loops fill.
    own = glyph_atlas()[1][factors["font"]] * factors["size"]
    factors["thickness"] = own + (factors["thickness"] - own).clamp(-0.7, 2.0)
    labels, factors = labels.to(device), {name: factor.to(device) for name, factor in factors.items()}
    return render(labels, factors), labels, factors


# ---- 3. The four terms, in nats per image: sums over pixels and dimensions, means over the batch -


def reconstruction_term(x1, x1_decoded):
    """Term 1, likelihood. x1 and Dec(z1, s1), both (N, 1, 28, 28) in [0, 1]; scalar >= 0.

        -log p(x1 | z1, s1) = sum over pixels of ((2 x1 - 1) - (2 x~ - 1))^2,   x~ = Dec(z1, s1)

    This is a Gaussian of variance 1/2 on pixels scaled to [-1, 1], without its constant: the squared
    error of the authors' code. (With the other usual likelihood, Bernoulli: z 21.7 %, swap 97.4 %,
    reconstruction .0231, variance .65.)
    """
    return (2 * x1 - 2 * x1_decoded).square().sum() / len(x1)


def kl_term(mu, logvar):
    """Term 1, KL: at least what z1 tells of x1, on average. Both (N, z_dim); scalar >= 0.

        KL(N(mu, exp(logvar)) || N(0, I)) = 1/2 sum over dimensions of  mu^2 + exp(logvar) - 1 - logvar
    """
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(dim=1).mean()


def swap_term(x1, x1_decoded):
    """Term 2: decoded with the code of another image of its class, x1 must still come out; scalar >= 0.

        -log p(x1 | z1, s1_same),   s1_same = f_s(x1_same)

    So the decoder can take from s only what a class shares.
    Departure: the authors' code takes term 1 for all three images, term 2 in both directions and term 3
    for two pairs; here each is taken once, for x1. Less work a step; the effect is not measured.
    """
    return reconstruction_term(x1, x1_decoded)


def adversary_term(verdicts):
    """Term 3: a decoding with any image's s must pass for a real one. Verdicts (N,); scalar >= 0.

        -log sigmoid(Adv(Dec(z1, s2), id2)),   which is softplus(-Adv(Dec(z1, s2), id2))

    Whatever z1 knows of x1's class must not show. Terms 1 and 2 alone are content with a z that carries
    everything and a decoder that ignores s: at a VAE's own KL weight of 1, swap 16.4 % after 20 epochs.
    Terms 3 and 4 prevent it: 95.8 %. At our weight the KL does so too, and they make decodings sharp and
    varied (README, What each term does). (This form of the loss pushes even while the adversary wins.)
    """
    return F.softplus(-verdicts).mean()


def prior_term(verdicts):
    """Term 4: a decoding of a draw from the prior must pass for a real one too. Verdicts (N,); scalar >= 0.

        -log sigmoid(Adv(Dec(z, s2), id2)),   z ~ N(0, I)

    In Figure 1, but of weight 0 in the authors' code. Without it, samples vary less: .75 instead of .89,
    after 20 epochs.
    """
    return adversary_term(verdicts)


def adversary_loss(real, fake):
    """What the adversary descends: its verdicts on the real x2 (N,) and on the fakes (2N,); scalar >= 0.

        -log sigmoid(Adv(x2, id2)) - mean over the fakes of  log(1 - sigmoid(Adv(fake, id2)))
    """
    return F.softplus(-real).mean() + F.softplus(fake).mean()


class ZClassifier(nn.Module):
    """Extension, made only if --leak-weight is given: logits of the class (N, n_classes), from z's features.

    They are a sum of two: the log densities of Gaussians, one fitted to each class's z over the last 5,000
    images or so, so that f_z can't outrun them; and a linear function of random waves of z (Rahimi and Recht
    2007). f_z learns to hide the class in ripples of z's density, too fine for the Gaussians. A network of
    layers would take tens of passes to learn these; the waves take one or two.
    """

    def __init__(self, n_classes, z_dim):
        super().__init__()
        generator = torch.Generator().manual_seed(0)  # the same waves for every --seed
        self.register_buffer("frequencies", 0.7 * torch.randn(z_dim, 2048, generator=generator))
        self.register_buffer("phases", 2 * math.pi * torch.rand(2048, generator=generator))
        self.of_waves = nn.Parameter(torch.zeros(2048, n_classes))
        # Running means over 25,000 images or so. Of of_waves, since of_waves itself swings to and fro; and
        # of the share of each z dimension's variance that is not noise: all noise, it drowns the others.
        self.register_buffer("mean_of_waves", torch.zeros(2048, n_classes))
        self.register_buffer("signal", torch.zeros(z_dim))
        self.register_buffer("sums", torch.zeros(n_classes, 1 + z_dim, 1 + z_dim))

    @torch.no_grad()
    def fit(self, mu, logvar, id):
        """Count z ~ N(mu, exp(logvar)) of classes id (N,) in, and let what was counted before fade."""
        a = F.pad(mu, (1, 0), value=1.0)  # (1, mu): sums of a a^T hold the count, the sum of z and of z z^T
        self.sums *= 0.9 ** (len(mu) / 512)
        noise = logvar.exp()
        self.sums.index_add_(0, id, a.unsqueeze(2) * a.unsqueeze(1) + F.pad(noise, (1, 0)).diag_embed())
        rate = 1 - 0.98 ** (len(mu) / 512)
        self.signal.lerp_(1 - noise.mean(dim=0), rate)
        self.mean_of_waves.lerp_(self.of_waves, rate)

    def features(self, z):
        """z (N, z_dim) -> its log density by each class's Gaussian (N, n_classes), its waves (N, 2048)."""
        sums = self.sums + 1e-3 * torch.eye(self.sums.shape[1], device=z.device)  # not seen yet: N(0, I)
        moments = sums / sums[:, :1, :1]
        mean = moments[:, 0, 1:]  # (n_classes, z_dim)
        covariance = moments[:, 1:, 1:] - mean.unsqueeze(2) * mean.unsqueeze(1)
        root = torch.linalg.cholesky_ex(covariance).L  # not finite when training diverges: train says so
        gaussians = torch.distributions.MultivariateNormal(mean, scale_tril=root, validate_args=False)
        waves = torch.addmm(self.phases, z * self.signal, self.frequencies).cos()
        return gaussians.log_prob(z.unsqueeze(1)), waves

    def forward(self, log_densities, waves):
        of_waves = self.of_waves if self.training else self.mean_of_waves  # f_z meets the mean
        return log_densities + (waves @ of_waves).float()


def leak_term(logits, id1):
    """Extension: what z1 tells of x1's class. The ZClassifier's logits (N, n_classes), ids (N,); scalar.

        H(id1) - E[-log p(id1 | z1)],   a lower bound of the mutual information I(z; id)

    Of terms 1 to 4 only the KL asks z to drop what it knows of the class, and with it everything else; the
    others look at decodings. The classifier ascends this, the encoders descend it.
    """
    shares = torch.distributions.Categorical(probs=torch.bincount(id1).float())
    return shares.entropy() - F.cross_entropy(logits, id1)


# ---- 4. Training: one step, and the loop ---------------------------------------------------------


def four_terms(model, adversary, triple, config, generator):
    """Figure 1, once through: the terms, the fakes (2N, 1, 28, 28), z1's features for the extension."""
    x1, x1_same, x2, id2, id1 = triple
    # A term of weight 0 is left out with all that only it needs: images, decodings, fakes. (Not its random
    # numbers: whatever is left out, the others stay the same.)
    weights, none = config.weights, x1[:0]
    judged = [name for name in ("adversary", "prior") if weights[name]]

    # Codes: one call of f_s for the whole triple.
    images = [x1, x1_same if weights["swap"] else none, x2 if judged else none]
    s1, s1_same, s2 = model.f_s(torch.cat(images)).split([len(x) for x in images])
    mu, logvar = model.f_z(x1, s1)
    z1 = model.reparameterize(mu, logvar, generator)
    z_features = ()
    if weights["leak"]:
        adversary.of_z.fit(mu, logvar, id1)
        z_features = adversary.of_z.features(z1)
    z = torch.randn(z1.shape, generator=generator, device=z1.device)

    # Decodings: one call of the decoder for all pairs of codes.
    pairs = {"reconstruction": (z1, s1), "swap": (z1, s1_same), "adversary": (z1, s2), "prior": (z, s2)}
    pairs = {name: pair for name, pair in pairs.items() if weights[name]}
    zs, ss = zip(*pairs.values())
    decoded = dict(zip(pairs, model.decode(torch.cat(zs), torch.cat(ss)).split(len(x1))))

    # Verdicts: one call of the adversary for both fakes, which claim to be of x2's class.
    fakes = torch.cat([none, *(decoded[name] for name in judged)])
    verdicts = adversary(fakes, id2.repeat(len(judged))).split(len(x1)) if judged else ()
    verdicts = dict(zip(judged, verdicts))

    terms = {
        "reconstruction": lambda: reconstruction_term(x1, decoded["reconstruction"]),
        "kl": lambda: kl_term(mu, logvar),
        "swap": lambda: swap_term(x1, decoded["swap"]),
        "adversary": lambda: adversary_term(verdicts["adversary"]),
        "prior": lambda: prior_term(verdicts["prior"]),
        "leak": lambda: leak_term(adversary.of_z(*z_features), id1),
    }
    return {name: term() for name, term in terms.items() if weights[name]}, fakes, z_features


def train_step(model, adversary, optimizer, adversary_optimizer, triple, config, generator):
    """One step of both sides on one batch of triples: a dict of the terms and the adversary's score."""
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=config.bfloat16 > 0)
    # Encoders and decoder descend the weighted terms. The adversary passes gradients on, its weights stand
    # still (eval() also rests the power iteration by which spectral_norm learns its norms).
    adversary.eval().requires_grad_(False)
    with autocast:
        terms, fakes, z_features = four_terms(model, adversary, triple, config, generator)
    optimizer.zero_grad()
    weights = config.weights
    sum(weights[name] * term for name, term in terms.items()).backward()
    optimizer.step()
    measures = {name: term.detach() for name, term in terms.items()}
    if not len(fakes) and not weights["leak"]:
        return measures
    # The adversary learns to tell the real x2 from those fakes. Nothing else moves.
    adversary.train().requires_grad_(True)
    x2, id2, id1 = triple[2:]
    loss = 0
    with autocast:
        if len(fakes):
            x = torch.cat([x2, fakes.detach()])
            real, fake = adversary(x, id2.repeat(len(x) // len(x2))).split([len(x2), len(fakes)])
            loss = adversary_loss(real, fake)
            right = {"right_on_real": (real > 0).float().mean(), "right_on_fakes": (fake < 0).float().mean()}
            measures |= {"adversary_loss": loss.detach()} | right
        if weights["leak"]:
            loss = loss - leak_term(adversary.of_z(*(x.detach() for x in z_features)), id1)
    adversary_optimizer.zero_grad()
    loss.backward()
    adversary_optimizer.step()
    return measures


def train(config, data, checkpoint=None, saved=None):
    """Train on data, on its device: the AdvVAE, with .dataset and .history. Ctrl-C ends it early.

    Writes checkpoint, if given, after every epoch; goes on from saved, load_checkpoint's .saved, to the
    very weights that training in one go has on the CPU, if config is the same. Raises UserError when a loss
    is no longer finite; the checkpoint is then the last whole epoch's.
    """
    torch.manual_seed(config.seed)  # for the networks' first weights; the rest draws from generator
    generator = torch.Generator(data.images.device).manual_seed(config.seed)
    place = {"device": data.images.device, "memory_format": torch.channels_last}  # the fastest layout
    model = AdvVAE(config.s_dim, config.z_dim).to(**place)
    n_classes = int(data.labels.max()) + 1
    adversary = Adversary(n_classes)
    if config.leak_weight:
        adversary.of_z = ZClassifier(n_classes, config.z_dim)
    adversary.to(**place)
    model.dataset, model.history, live = data.name, [], sys.stdout.isatty()
    sampler = TripleSampler(data.images, data.labels, config.batch_size, generator)
    optimizers = [torch.optim.Adam(net.parameters(), betas=(0.5, 0.99)) for net in (model, adversary)]
    parts = dict(model=model, adversary=adversary)
    parts |= dict(optimizer=optimizers[0], adversary_optimizer=optimizers[1])
    if saved:
        restore(saved, parts, generator)
    last = snapshot(config, parts, generator)
    try:
        for epoch in range(len(model.history) + 1, config.epochs + 1):
            start, seen, sums = time.perf_counter(), 0, 0
            for step, triple in enumerate(sampler, start=1):
                done = (epoch - 1 + (step - 0.5) / len(sampler)) / config.epochs  # in the middle of the step
                for optimizer in optimizers:
                    optimizer.param_groups[0]["lr"] = config.learning_rate * min(1, 2 * (1 - done))
                # The extension rises from 0: at full weight from the beginning it keeps z shut.
                now = replace(config, leak_weight=config.leak_weight * min(1, 2 * done))
                measures = train_step(model, adversary, *optimizers, triple, now, generator)
                seen += len(triple[0])
                sums += len(triple[0]) * torch.stack(list(measures.values()))
                if step % 20 and step < len(sampler):  # to read numbers at every step would stall a GPU
                    continue
                means = dict(zip(measures, (sums / seen).tolist()))
                for name, value in means.items():
                    if not math.isfinite(value):
                        hint = "try a lower --learning-rate or lower weights; the checkpoint is as it was"
                        raise UserError(f"{name} is {value} at epoch {epoch}, step {step}: {hint}")
                rate = seen / (time.perf_counter() - start)
                if live:
                    left = round(((config.epochs - epoch + 1) * len(data.images) - seen) / rate)
                    line = f"epoch {epoch}/{config.epochs}  step {step}/{len(sampler)}  {rate:,.0f} images/s"
                    print(f"{line}  {left // 60} min {left % 60:02} s left", end="\033[K\r", flush=True)
            model.history.append(means)
            line = "  ".join(f"{name} {value:.2f}" for name, value in means.items())
            clear = "\033[K" if live else ""
            print(f"{clear}epoch {epoch}/{config.epochs}  {line}  {rate:,.0f} images/s", flush=True)
            last = snapshot(config, parts, generator)
            if checkpoint:
                save_checkpoint(checkpoint, last)
    except KeyboardInterrupt:
        if not last["history"]:
            raise  # there is nothing to keep
        restore(last, parts, generator)
        print(f"\nCtrl-C: back to the end of epoch {len(model.history)}; --resume goes on there", flush=True)
    if checkpoint:  # once more: Ctrl-C may have come while it was written, and --epochs 0 has no epoch
        save_checkpoint(checkpoint, last)
    return model.eval()


# ---- 5. What do z and s know? --------------------------------------------------------------------


@torch.enable_grad()  # evaluate, which calls it, is under no_grad
def fit_classifier(net, inputs_at, labels, epochs, generator):
    """Train net to tell labels (M,) from inputs_at(indices); return its accuracy: f(inputs, labels)."""
    steps = math.ceil(len(labels) / 500)
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=epochs * steps)
    for _ in range(epochs):
        shuffled = torch.randperm(len(labels), generator=generator, device=labels.device)
        for i in shuffled.tensor_split(steps):  # of equal sizes: batch norm can't take a last batch of one
            optimizer.zero_grad()
            F.cross_entropy(net(inputs_at(i)), labels[i]).backward()
            optimizer.step()
            schedule.step()
    net.eval()
    return lambda inputs, truth: (net(inputs).argmax(dim=1) == truth).float().mean().item()


def probe_accuracy(codes, test_codes, labels, test_labels, generator, width=256, epochs=15):
    """The test accuracy in [0, 1] of a two-hidden-layer network that learns to tell the class from codes.

    codes(indices) gives those of training images, (n, d): z is drawn anew each time. test_codes (M, d). The
    paper has such classifiers too.
    """
    net = nn.Sequential(
        nn.Linear(test_codes.shape[1], width), nn.BatchNorm1d(width), nn.ReLU(),
        nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, int(labels.max()) + 1),
    )  # fmt: skip
    return fit_classifier(net.to(labels.device), codes, labels, epochs, generator)(test_codes, test_labels)


def slant(images):
    """Slant, (N, 1, H, W) -> (N,): pixels to the right per pixel upward, by second moments of the ink."""
    ink = images[:, 0] / images.sum(dim=(1, 2, 3)).clamp_min(1e-6).view(-1, 1, 1)
    axes = torch.meshgrid(*(torch.arange(n, device=ink.device) for n in ink.shape[1:]), indexing="ij")
    dy, dx = (axis - (ink * axis).sum(dim=(1, 2), keepdim=True) for axis in axes)
    return -(ink * dx * dy).sum(dim=(1, 2)) / (ink * dy * dy).sum(dim=(1, 2)).clamp_min(1e-6)


def stroke_thickness(images):
    """(N, 1, H, W) -> (N,) in pixels: twice the ink over the length of its edge; a stroke has two edges."""
    x = F.pad(images[:, 0], (0, 1, 0, 1))
    edge = torch.hypot(x[:, :-1, 1:] - x[:, :-1, :-1], x[:, 1:, :-1] - x[:, :-1, :-1]).sum(dim=(1, 2))
    return 2 * x.sum(dim=(1, 2)) / edge.clamp_min(1e-6)


def linear_r2(codes, factor, test_codes, test_factor):
    """The share of test_factor (N,)'s variance that a linear function, fitted to codes (M, d), explains."""
    # On the CPU, whose lstsq has gelsy, which copes with constant dimensions.
    codes, test_codes = (F.pad(c.cpu(), (0, 1), value=1.0) for c in (codes, test_codes))
    factor, test_factor = factor.cpu(), test_factor.cpu()
    fitted = test_codes @ torch.linalg.lstsq(codes, factor.unsqueeze(1), driver="gelsy").solution
    return 1 - ((test_factor - fitted.squeeze(1)).var() / test_factor.var()).item()


@torch.no_grad()
@torch.random.fork_rng(devices=[])  # the caller's random numbers on the CPU go on as before
def evaluate(model, data, seed=0):
    """Print a table of what z and s know, and return its numbers as a dict; accuracies are in [0, 1]."""
    # What is fitted is fitted on the training images; every number is of the test images.
    x, y, test_x, test_y = data.images, data.labels, data.test_images, data.test_labels
    torch.manual_seed(seed)  # for the classifiers' first weights
    generator = torch.Generator(x.device).manual_seed(seed)
    draw_z = functools.partial(model.reparameterize, generator=generator)
    s, mu, logvar = model.eval().encode(x)
    test_s, test_mu, test_logvar = model.encode(test_x)
    z, test_z = draw_z(mu, logvar), draw_z(test_mu, test_logvar)
    other = torch.randperm(len(test_y), generator=generator, device=x.device)  # who gives s to each z
    reconstructed, swapped = model.decode(test_mu, test_s), model.decode(test_mu, test_s[other])
    sampled = model.decode(draw_z(0 * test_mu, 0 * test_logvar), test_s)  # z ~ N(0, I)
    results = {"majority_rate": test_y.bincount().max().item() / len(test_y)}

    def row(key, value, what, against):
        value = torch.as_tensor(value).nan_to_num(0, 0, 0).item()  # 0 if undefined, as of constant images
        results[key] = value
        style = ".1%" if key.endswith("accuracy") else ".4f" if key.endswith("mse") else ".2f"
        print(f"  {what:<53}{value:>7{style}}   ({against})", flush=True)

    print(f"\nWhat z and s know ({data.name}, test images)")
    chance = f"chance {results['majority_rate']:.1%}"
    probe = functools.partial(probe_accuracy, labels=y, test_labels=test_y, generator=generator)
    accuracy = probe(lambda i: draw_z(mu[i], logvar[i]), test_z, epochs=40)  # faint traces take long
    row("z_accuracy", accuracy, "class told from sampled z", chance)
    row("mu_accuracy", probe(mu.__getitem__, test_mu), "class told from mu", chance)
    row("s_accuracy", probe(s.__getitem__, test_s), "class told from s", "100% is best")
    # The judge, a small classifier of real training images, says which class a decoded image has.
    judge = nn.Sequential(
        nn.Conv2d(1, 32, 5, stride=2, padding=2), nn.BatchNorm2d(32), nn.ReLU(),  # (N, 32, 14, 14)
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),  # (N, 64, 7, 7)
        nn.Flatten(), nn.Linear(64 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, int(y.max()) + 1),
    ).to(x.device, memory_format=torch.channels_last)  # fmt: skip
    judge = fit_classifier(judge, x.__getitem__, y, epochs=3, generator=generator)
    results["judge_accuracy"] = judge(test_x, test_y)
    ceiling = f"real images {results['judge_accuracy']:.1%}"
    row("swap_accuracy", judge(swapped, test_y[other]), "swapped image Dec(mu1, s2) has x2's class", ceiling)
    row("prior_accuracy", judge(sampled, test_y), "prior sample Dec(z, s2) has x2's class", ceiling)
    classes = [test_y == c for c in test_y.unique()]
    drawn, real = (sum(of[c].var(0, correction=0).sum() for c in classes) for of in (sampled, test_x))
    row("prior_diversity", drawn / real, "within-class variance, prior samples / real images", "1 is best")
    mse = F.mse_loss(reconstructed, test_x)
    row("reconstruction_mse", mse, "reconstruction, squared error a pixel", "0 is best")
    row("kl", kl_term(test_mu, test_logvar), "KL of z, nats an image", "0: z is empty")
    # Classes differ a little in both measures. A perfect swap moves only what differs within classes.
    for name, measure in (("slant", slant), ("thickness", stroke_thickness)):
        of_swapped, of_x = measure(swapped), measure(test_x)
        within = sum((of_x[c] - of_x[c].mean()).square().sum() for c in classes)
        within = within / (of_x - of_x.mean()).square().sum().clamp_min(1e-6)  # as a share of all variance
        for code, source, best in (("z", of_x, within), ("s", of_x[other], 1 - within)):
            r = torch.corrcoef(torch.stack([of_swapped, source]))[0, 1]
            text = f"{name} of swapped image and of {code}'s source, r"
            row(f"{name}_from_{code}", r, text, f"a perfect swap: {best:.2f}")
    if data.factors:
        for name in ("slant", "thickness", "size", "shift_x", "shift_y"):
            for code, fit, test, best in (("z", z, test_z, "1 is best"), ("s", s, test_s, "0 is best")):
                r2 = linear_r2(fit, data.factors[name], test, data.test_factors[name])
                row(f"{code}_r2_{name}", r2, f"true {name} from {code}, linear R2", best)
        mse = F.mse_loss(swapped, render(test_y[other], data.test_factors))
        row("swap_true_mse", mse, "swapped image and its true rendering, squared error", "0 is best")
    print(flush=True)
    return results


# ---- 6. Pictures, the swap grid last -------------------------------------------------------------

# Colors: a blue image gave s, an orange one gave z, a white one is decoded.
BLUE, ORANGE, WHITE = torch.tensor([[0.45, 0.75, 1.0], [1.0, 0.7, 0.3], [1.0, 1.0, 1.0]]).view(3, 3, 1, 1)


def one_of_each_class(data, nth=0):
    """The nth test image of each of the first ten classes, (10, 1, 28, 28): nothing is picked by hand."""
    places = [(data.test_labels == c).nonzero().flatten() for c in data.test_labels.unique()[:10]]
    return data.test_images[torch.stack([place[nth % len(place)] for place in places])]


def save_grid(path, title, legend, x_label, y_label, *panels):
    """A PNG of panels (R, C, 3, 28, 28) side by side, each with both labels."""
    from matplotlib.figure import Figure
    from torchvision.utils import make_grid

    rows, columns = panels[0].shape[:2]
    size = (0.52 * columns + 0.4) * len(panels) + 0.4, 0.52 * rows + 1.3  # inches
    figure = Figure(figsize=size, layout="constrained")
    for axes, images in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        grid = make_grid(images.flatten(0, 1), nrow=columns, padding=2, pad_value=0.25)
        axes.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set(xticks=[], yticks=[], xlabel=x_label, ylabel=y_label)
    figure.suptitle(title)
    figure.supxlabel(legend, fontsize="small")
    figure.savefig(path, dpi=110)


def plot_curves(model, data, path):
    """model's history: the terms, and what the adversary gets right, by epoch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    titles = "terms 1 and 2, nats", "terms 3 and 4, the adversary's loss, nats", "adversary is right, share"
    curves = "reconstruction swap kl", "adversary prior adversary_loss leak", "right_on_real right_on_fakes"
    for axes, title, keys in zip(figure.subplots(1, 3), titles, curves):
        for key in keys.split():
            values = [means[key] for means in model.history if key in means]
            if values:  # a term of weight 0 has none
                axes.plot(range(1, len(values) + 1), values, ".-", label=key.replace("_", " "))
        axes.set(title=title, xlabel="epoch", ylim=(min(0, axes.dataLim.y0), None))
        if axes.lines:
            axes.legend()
    figure.suptitle(f"{data.name}: training")
    figure.savefig(path, dpi=110)


@torch.no_grad()
def plot_samples(model, data, path):
    """A fixed s along each row, one z ~ N(0, I) down each column."""
    x = one_of_each_class(data)
    z = torch.randn(12, model.z_dim, generator=torch.Generator().manual_seed(0)).to(x.device)
    sampled = torch.stack([model.decode(z, s.expand(12, -1)) for s in model.f_s(x)])  # (10, 12, 1, 28, 28)
    legend = "Each row keeps the class of its blue image. Each column has one random style."
    labels = "z ~ N(0, I), drawn once for each column", "s of the blue test image"
    images = torch.cat([x[:, None].cpu() * BLUE, sampled.cpu() * WHITE], dim=1)
    save_grid(path, f"{data.name}: samples Dec(z, s)", legend, *labels, images)


@torch.no_grad()
def plot_interpolation(model, data, path):
    """Between two test images, three times: s along the horizontal axis, z along the vertical one."""
    a, b = one_of_each_class(data), one_of_each_class(data, nth=1).roll(-1, dims=0)
    (s_a, z_a, _), (s_b, z_b, _) = model.encode(a), model.encode(b)
    t = torch.linspace(0, 1, 7, device=s_a.device).unsqueeze(1)
    panels = []
    for k in range(0, min(len(s_a), 9), 3):
        s, zs = torch.lerp(s_a[k], s_b[k], t), torch.lerp(z_a[k], z_b[k], t)
        panels.append(torch.stack([model.decode(z.expand(7, -1), s) for z in zs]).cpu() * WHITE)
    legend = "Top left and bottom right: two test images, reconstructed. Other corners: z and s swapped."
    labels = "s: one class to the next", "z: one style to another"
    save_grid(path, f"{data.name}: interpolation of s and z", legend, *labels, *panels)


@torch.no_grad()
def plot_swap(model, data, path):
    """The swap grid: z of one test image along each row, s of another down each column."""
    x = one_of_each_class(data)
    s, mu, _ = model.encode(x)
    swapped = torch.stack([model.decode(z.expand(len(s), -1), s) for z in mu])  # (10, 10, 1, 28, 28)
    top = torch.cat([torch.zeros(1, 3, 28, 28), x.cpu() * BLUE])[None]
    rows = torch.cat([x[:, None].cpu() * ORANGE, swapped.cpu() * WHITE], dim=1)
    legend = "White: Dec(z, s), the column's class in the row's style. On the diagonal, reconstructions."
    labels = "s from the blue image above", "z from the orange image on the left"
    save_grid(path, f"{data.name}: swapping s and z of test images", legend, *labels, torch.cat([top, rows]))


def draw_figures(model, data, folder):
    """All four pictures, as <data set>-<what>.png in folder."""
    for plot in (plot_curves, plot_samples, plot_interpolation, plot_swap):
        plot(model, data, Path(folder) / f"{data.name}-{plot.__name__.removeprefix('plot_')}.png")
    print(f"Pictures in {folder}: {data.name}-swap.png, -interpolation, -samples, -curves", flush=True)


# ---- The checkpoint and the command line ---------------------------------------------------------


def snapshot(config, parts, generator):
    """A checkpoint: copies of all that the rest of training depends on, to go on to the last bit."""
    states = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
    model = parts["model"]
    told = {"config": asdict(config), "dataset": model.dataset, "history": model.history.copy()}
    return states | told | {"generator": generator.get_state(), "device": generator.device.type}


def restore(saved, parts, generator):
    """Put training back to where snapshot saw it. Raises UserError if saved doesn't fit."""
    try:
        for name, part in parts.items():
            part.load_state_dict(copy.deepcopy(saved[name]))  # an optimizer would go on in saved's tensors
            for weight, state in getattr(part, "state", {}).items():  # optimizers don't look at shapes
                if not weight.shape == state["exp_avg"].shape == state["exp_avg_sq"].shape:
                    raise ValueError("an optimizer of another shape")
        generator.set_state(saved["generator"].cpu())
    except Exception as error:  # what doesn't fit fails in many ways
        raise UserError("the checkpoint doesn't fit this advvae.py or this data; train anew") from error
    parts["model"].history = saved["history"].copy()


def save_checkpoint(path, saved):
    """Write path in one go: a temporary file beside it takes its name once it is whole and on the disk."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(saved, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path, device="cpu"):
    """The trained AdvVAE in eval mode, on device, with .dataset (a name), .history (a dict of means for each
    epoch) and .saved (what --resume goes on from). Raises UserError if it is no checkpoint of this file."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)  # data only: no code in it runs
        config = Config(**saved["config"])
        model = AdvVAE(config.s_dim, config.z_dim).to(device, memory_format=torch.channels_last)
        model.load_state_dict(saved["model"])
        model.dataset, model.history = saved["dataset"], [dict(means) for means in saved["history"]]
        model.saved = saved
        if saved["device"] not in ("cuda", "mps", "cpu"):
            raise ValueError(saved["device"])
    except OSError as error:
        raise UserError(f"can't read {path} ({error.strerror}); train first, or name another") from error
    except Exception as error:  # torch.load raises almost anything on a file of another kind
        raise UserError(f"{path} is no checkpoint of this advvae.py; move it, or name another") from error
    return model.eval()


def run(args, config, saved):
    """What the command line asks for, in main's args; saved is what to go on from. Raises UserError."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = next(name for name in available if available[name]) if args.device == "auto" else args.device
    if not available[device]:
        way = "go on where it began, or train anew" if saved else "use --device auto"
        raise UserError(f"this machine, or this torch, has no {device}; {way}")
    checkpoint, picture = Path(args.checkpoint), Path(args.figures_dir) / "any.png"
    # Can all be written? Better said now than after training.
    for path in [picture] if args.plot_only else [picture, checkpoint]:
        if not path.name or path.is_dir():
            raise UserError(f"'{path}' is no name for a file; name another place")
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name).close()
    # An older checkpoint is written over, any other file is not.
    if args.plot_only or (checkpoint.exists() and not saved):
        model = load_checkpoint(checkpoint, device)
    if args.plot_only and args.dataset not in ("auto", model.dataset):
        raise UserError(f"{checkpoint} was trained on {model.dataset}, not on {args.dataset}")
    data = load_data(model.dataset if args.plot_only else args.dataset, args.data_dir, device)
    if not args.plot_only:
        print(f"Training on {len(data.images):,} images of {data.name}, on {device}", flush=True)
        model = train(config, data, checkpoint, saved)
        print(f"Weights in {checkpoint}: draw again with --plot-only, load with advvae.load_checkpoint")
        evaluate(model, data)
    draw_figures(model, data, args.figures_dir)


def main(argv=None):
    """The command line: train, evaluate, draw. A UserError ends in one line on stderr and exit code 2."""
    defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=defaults)
    parser.error = lambda message: parser.exit(2, f"advvae.py: {message}; see python advvae.py --help\n")
    training = parser.add_argument_group("training")
    weights = parser.add_argument_group("weights", "of the terms, which are all in nats per image")
    for f in fields(Config):
        group, flag = weights if "weight" in f.name else training, f"--{f.name.replace('_', '-')}"
        group.add_argument(flag, type=f.type, default=f.default, metavar="N", help=f.metadata["text"])
    add = parser.add_argument_group("data, device, files").add_argument
    names = ["auto", *IDX_DATASETS, "typeset"]
    add("--dataset", default="auto", choices=names, help="auto is mnist or, without that, typeset")
    add("--data-dir", default="data", metavar="PATH", help="folder where data sets lie or are downloaded to")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="auto is cuda, mps or cpu")
    add("--checkpoint", default="advvae.pt", metavar="PATH", help="file, written after every epoch")
    add("--figures-dir", default="figures", metavar="PATH", help="folder for the pictures")
    way = parser.add_mutually_exclusive_group().add_argument
    way("--resume", action="store_true", help="go on from --checkpoint with its settings or other --epochs")
    way("--plot-only", action="store_true", help="only draw again, from --checkpoint")
    args, saved = parser.parse_args(argv), None
    try:
        if args.resume:
            saved = load_checkpoint(args.checkpoint).saved
            kept = saved["config"] | {"dataset": saved["dataset"], "device": saved["device"]}
            parser.set_defaults(**kept)
            args = parser.parse_args(argv)  # again: what is not given is now the checkpoint's
            for name, value in kept.items():
                given = getattr(args, name)
                if given != value and not (name == "epochs" and given >= len(saved["history"])):
                    flag = f"--{name.replace('_', '-')} {given}"
                    raise UserError(f"{flag} contradicts {args.checkpoint}, which has {value}; leave it out")
        run(args, Config(**{f.name: getattr(args, f.name) for f in fields(Config)}), saved)
    except UserError as error:
        parser.exit(2, f"advvae.py: {error}\n")
    except OSError as error:  # a full disk, a folder that is read-only
        parser.exit(2, f"advvae.py: can't write ({error}); make room, or name another place\n")
    except KeyboardInterrupt:  # outside of training, where there is nothing to keep
        parser.exit(130, "\n")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 can name any file, too
    main()
