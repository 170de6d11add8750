"""Speed of training, against PyTorch; and of empirical NTKs, against neural-tangents.

    python benchmarks/training.py
    python benchmarks/training.py --parts ntk --repeats 9
    python benchmarks/training.py --parts methods --methods PGD APART

Training: the same network (NTK parametrisation, the same parameters), the same images, batches of the same size, the
same attack (PGD with equal steps from the clean image) and the same optimiser (SGD with momentum), until the
device is done. Methods: the same residual network with batch norm, one update written down for PyTorch as usual
(`torch_methods.py`). Both sides begin at the same parameters; their first losses on one batch must agree. Kernels: the
full
n c x n c NTK of the same network at the same parameters; entries must agree. Sides are run in turn, in one process, and
ratios are of medians. PyTorch is optional, and so is its compiler, which wants a C++ compiler: what is not there is
skipped, with the reason in the results.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measure import command_line
from rich.console import Console
from rich.table import Table

import ntkadv as na
from ntkadv.kernels import empirical_ntk
from ntkadv.scripts import launch, settings_of
from ntkadv.training import APARTTraining, FGSMTraining, Method, PGDTraining, StandardTraining, TRADESTraining
from ntkadv.training import train as train_network

RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is trained, which kernels are computed, and how often."""

    parts: tuple[Literal["training", "methods", "ntk"], ...] = ("training", "methods", "ntk")
    """What is measured."""
    networks: tuple[str, ...] = ("mlp-3-512", "cnn-3-32")
    """Networks to train: kind, depth, width."""
    image: tuple[int, int, int] = (32, 32, 3)
    """Shape of the images, which are random: speed does not depend on them."""
    n_train: int = 2048
    """Training images."""
    batch_size: int = 128
    """Images in a step."""
    attack_steps: tuple[int, ...] = (0, 7)
    """Steps of PGD; 0 is training without attacks."""
    methods: tuple[str, ...] = ("standard", "FGSM", "PGD", "TRADES", "APART")
    """Methods on a residual network with batch norm; PGD and TRADES attack with the most steps of --attack-steps."""
    residual: tuple[int, ...] = (16, 32, 64)
    """Channels of the stages of that network, of one block each."""
    seconds: float = 3.0
    """About how long a side is measured at a time."""
    kernels: tuple[str, ...] = ("mlp-3-512-16", "mlp-3-512-64", "cnn-3-32-16", "cnn-3-32-32")
    """Networks whose NTK is computed: kind, depth, width, images."""
    repeats: int = 5
    """How often each side is measured."""
    threads: int = 2
    """Threads of PyTorch. Those of JAX are as many as there are cores; measure on as many."""
    seed: int = 0
    """Seed of images and parameters."""
    output: Path = RESULTS / "training.json"
    """File of the results."""

    def __post_init__(self) -> None:
        unknown = set(self.methods) - set(METHODS)
        if unknown:
            raise ValueError(f"methods must be among {list(METHODS)}, got {sorted(unknown)}.")
        for name in (*self.networks, *self.kernels):
            kind, *numbers = name.split("-")
            if kind not in ("mlp", "cnn") or len(numbers) != 2 + (name in self.kernels):
                raise ValueError(f"networks are called mlp-DEPTH-WIDTH, kernels mlp-DEPTH-WIDTH-IMAGES, got {name!r}.")


Side = Callable[[int], Any]
"""Does so many steps, and waits for them."""


def main(settings: Settings) -> int:
    """Measure, print and save; give 1 where sides disagree."""
    console = Console()
    result: dict[str, Any] = {
        "command": command_line(),
        "environment": na.runs.environment()
        | {"torch": na.runs.package_version("torch"), "load": os.getloadavg(), "cores": _cores()},
        "settings": settings_of(settings),
        "skipped": {},
        "training": [],
        "methods": [],
        "ntk": [],
    }

    def save() -> None:
        settings.output.parent.mkdir(parents=True, exist_ok=True)
        settings.output.write_text(json.dumps(result, indent=2) + "\n")

    if "training" in settings.parts:
        for name in settings.networks:
            for steps in settings.attack_steps:
                console.print(f"training: {name}, {steps} steps of attack")
                result["training"].append(training(settings, name, steps, result["skipped"]))
                save()
    if "methods" in settings.parts:
        for name in settings.methods:
            console.print(f"method: {name}")
            result["methods"].append(method(settings, name, result["skipped"]))
            save()
    if "ntk" in settings.parts:
        for name in settings.kernels:
            console.print(f"kernel: {name}")
            result["ntk"].append(kernel(settings, name))
            save()
    console.print(*tables(result), f"saved to {settings.output}", sep="\n")
    for side, reason in result["skipped"].items():
        console.print(f"not measured: {side}: {reason}")
    agreeing = (row["apart"] < (1e-2 if row.get("random") else 1e-3) for part in _PARTS for row in result[part])
    return 0 if all(agreeing) else 1


_PARTS = ("training", "methods", "ntk")


def _cores() -> int | None:
    """Count the cores that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def build(name: str, settings: Settings) -> tuple[na.architectures.Network, Any]:
    """Make a network by its name, and its parameters."""
    kind, depth, width = name.split("-")[:3]
    make = {"mlp": na.architectures.mlp, "cnn": na.architectures.cnn}[kind]
    arch = make(depth=int(depth), width=int(width), num_classes=10)
    return arch, arch.init(jax.random.key(settings.seed), settings.image)


def images(settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Draw images and labels."""
    rng = np.random.default_rng(settings.seed)
    x = rng.random((settings.n_train, *settings.image), np.float32)
    return x, rng.integers(0, 10, settings.n_train).astype(np.int32)


EPS, RATE, MOMENTUM = 8 / 255, 1e-3, 0.9


def training(settings: Settings, name: str, attack_steps: int, skipped: dict[str, str]) -> dict[str, Any]:
    """Measure steps of training: ours, PyTorch, and PyTorch compiled."""
    arch, params = build(name, settings)
    x, labels = images(settings)
    sides: dict[str, Side] = {"ntkadv": ours(settings, arch, params, x, labels, attack_steps)}
    first = {"ntkadv": first_loss(arch, params, x[: settings.batch_size], labels[: settings.batch_size], attack_steps)}
    try:
        import torch  # noqa: F401 # pyright: ignore[reportMissingImports] - optional
    except ImportError as error:
        skipped["PyTorch"] = str(error)
    else:
        for side, compiled in (("PyTorch", False), ("PyTorch, compiled", True)):
            # The compiler fails in many ways, all of them for want of something outside.
            try:
                run, loss = theirs(settings, arch, params, x, labels, attack_steps, compiled=compiled)
                run(1)
            except Exception as error:
                if not compiled:
                    raise
                skipped[f"{side}, {name}, PGD-{attack_steps}"] = f"{type(error).__name__}: {error}".splitlines()[0][
                    :300
                ]
                continue
            sides[side], first[side] = run, loss
    case = f"{name}, " + (f"PGD-{attack_steps}" if attack_steps else "no attack")
    return {"case": case, **compared(settings, sides, first)}


METHODS: dict[str, Callable[[na.attacks.Linf, int], Method]] = {
    "standard": lambda threat, steps: StandardTraining(loss="cross_entropy"),
    "FGSM": lambda threat, steps: FGSMTraining(threat, step=1.0, random_start=False),
    "PGD": lambda threat, steps: PGDTraining(pgd(steps), loss="cross_entropy"),
    "TRADES": lambda threat, steps: TRADESTraining(threat, steps=steps),
    "APART": lambda threat, steps: APARTTraining(threat),
}
RANDOM = ("TRADES", "APART")


def method(settings: Settings, name: str, skipped: dict[str, str]) -> dict[str, Any]:
    """Measure steps of one method on a residual network with batch norm: ours, and PyTorch."""
    attack_steps, size = max(settings.attack_steps), settings.batch_size
    network = residual(settings)
    x, labels = images(settings)
    run = our_method(settings, network, name, x, labels)
    sides: dict[str, Side] = {"ntkadv": run}
    first = {"ntkadv": float(our_method(settings, network, name, x[:size], labels[:size])(0, (0,)).history["loss"][0])}
    try:
        import torch_methods
    except ImportError as error:
        skipped["PyTorch"] = str(error)
    else:
        given = {"eps": EPS, "steps": attack_steps, "rate": RATE, "momentum": MOMENTUM, "threads": settings.threads}
        (loss,) = torch_methods.run(name, network, x[:size], labels[:size], size, **given)(1)
        sides["PyTorch"], first["PyTorch"] = torch_methods.run(name, network, x, labels, size, **given), loss
    case = f"{name}-{attack_steps}" if name in ("PGD", "TRADES") else name
    return {"case": case, "random": name in RANDOM, **compared(settings, sides, first)}


def residual(settings: Settings) -> na.vision.PreActResNet:
    """Make the network of the methods."""
    widths = settings.residual
    return na.vision.PreActResNet(
        stem=widths[0], widths=widths, blocks=(1,) * len(widths), channels_in=settings.image[-1],
        key=jax.random.key(settings.seed),
    )  # fmt: skip


def our_method(
    settings: Settings, network: na.vision.VisionModel, name: str, x: np.ndarray, labels: np.ndarray
) -> Callable[..., Any]:
    """Training here, as it is called: so many steps, and where losses are recorded."""
    data, chosen = dataset(x, labels), METHODS[name](na.attacks.Linf(EPS), max(settings.attack_steps))
    optimizer = optax.sgd(RATE, momentum=MOMENTUM)

    def run(steps: int, record_at: tuple[int, ...] = ()) -> Any:
        done = train_network(
            network, data, method=chosen, steps=steps, key=jax.random.key(settings.seed), record_at=record_at,
            optimizer=optimizer, batch_size=settings.batch_size, progress=False,
        )  # fmt: skip
        jax.block_until_ready(done.params)
        return done

    return run


def dataset(x: np.ndarray, labels: np.ndarray) -> na.Dataset:
    """Give images and labels as a data set."""
    return na.Dataset.from_arrays(
        name="random", x_train=x, y_train=labels, x_test=x[:1], y_test=labels[:1], num_classes=10
    )


def compared(settings: Settings, sides: dict[str, Side], first: dict[str, float]) -> dict[str, Any]:
    """Measure sides in turn, and say how far their first losses are apart."""
    measured = in_turn(sides, settings.repeats, settings.seconds)
    reference = first["ntkadv"]
    return {
        "sides": {side: {"steps_per_s": rate, "all": rates} for side, (rate, rates) in measured.items()},
        "times_faster": {
            side: measured["ntkadv"][0] / rate for side, (rate, _) in measured.items() if side != "ntkadv"
        },
        "apart": max(abs(value - reference) / reference for value in first.values()),
    }


def pgd(attack_steps: int) -> na.attacks.PGD:
    """PGD as it is done in training: from the clean image, the last iterate."""
    return na.attacks.PGD(
        na.attacks.Linf(EPS), steps=attack_steps, step_size=EPS / 4, loss="cross_entropy", random_start=False,
        keep_best=False,
    )  # fmt: skip


def first_loss(arch: Any, params: Any, x: np.ndarray, labels: np.ndarray, attack_steps: int) -> float:
    """Loss on one batch, attacked, before training."""
    key = jax.random.key(0)
    points = pgd(attack_steps)(functools.partial(arch.apply, params), x, labels, key=key) if attack_steps else x
    return float(jnp.mean(na.attacks.LOSSES["cross_entropy"](arch.apply(params, points), jnp.asarray(labels))))


def ours(settings: Settings, arch: Any, params: Any, x: np.ndarray, labels: np.ndarray, attack_steps: int) -> Side:
    """Training here, as it is called."""
    data = dataset(x, labels)
    method = (
        PGDTraining(pgd(attack_steps), loss="cross_entropy") if attack_steps else StandardTraining(loss="cross_entropy")
    )
    optimizer = optax.sgd(RATE, momentum=MOMENTUM)

    def run(steps: int) -> None:
        done = train_network(
            arch, data, method=method, steps=steps, key=jax.random.key(settings.seed), params=params,
            optimizer=optimizer, batch_size=settings.batch_size, record_at=(), progress=False,
        )  # fmt: skip
        jax.block_until_ready(done.params)

    return run


def theirs(
    settings: Settings, arch: Any, params: Any, x: np.ndarray, labels: np.ndarray, attack_steps: int, *, compiled: bool
) -> tuple[Side, float]:
    """Train in PyTorch, as it is written there; also give the loss on the first batch."""
    import torch  # pyright: ignore[reportMissingImports] - optional
    from torch.nn import functional  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(settings.threads)
    layers = torch_layers(arch, params, settings.image)
    weights = [tensor.clone().requires_grad_() for layer in layers for tensor in layer.tensors]
    channels_last = any(layer.kind == "conv" for layer in layers)
    images_nchw = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
    if channels_last:
        images_nchw = images_nchw.to(memory_format=torch.channels_last)
    classes = torch.from_numpy(labels.astype(np.int64))

    def forward(z: Any) -> Any:
        z, tensors = z - 0.5, iter(weights)
        for number, layer in enumerate(layers):
            w, b = next(tensors), next(tensors)
            if layer.kind == "conv":
                z = functional.conv2d(z, w * layer.w_scale, b * layer.b_scale, padding=layer.padding)
            else:
                if z.ndim == 4:
                    # The order in which the parameters here have the pixels: channels last.
                    z = z.permute(0, 2, 3, 1).reshape(len(z), -1)
                z = functional.linear(z, w * layer.w_scale, b * layer.b_scale)
            if number < len(layers) - 1:
                z = torch.relu(z)
        return z

    call = torch.compile(forward) if compiled else forward
    optimizer = torch.optim.SGD(weights, lr=RATE, momentum=MOMENTUM)

    def attacked(clean: Any, y: Any) -> Any:
        point = clean
        for _ in range(attack_steps):
            point = point.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(functional.cross_entropy(call(point), y), point)
            with torch.no_grad():
                point = point + EPS / 4 * gradient.sign()
                point = torch.clamp(torch.min(torch.max(point, clean - EPS), clean + EPS), 0, 1)
        return point.detach()

    generator = torch.Generator().manual_seed(settings.seed)

    def run(steps: int) -> None:
        for _ in range(steps):
            places = torch.randperm(len(classes), generator=generator)[: settings.batch_size]
            y = classes[places]
            loss = functional.cross_entropy(call(attacked(images_nchw[places], y)), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    size = settings.batch_size
    points = attacked(images_nchw[:size], classes[:size])
    with torch.no_grad():
        loss = float(functional.cross_entropy(forward(points), classes[:size]))
    return run, loss


@dataclasses.dataclass(frozen=True, eq=False)
class TorchLayer:
    """One affine layer: its weights in the order of PyTorch, and the factors of the NTK parametrisation."""

    kind: Literal["conv", "dense"]
    tensors: tuple[Any, Any]
    w_scale: float
    b_scale: float
    padding: int = 0


def torch_layers(arch: Any, params: Any, image: tuple[int, int, int]) -> list[TorchLayer]:
    """Translate a plain network of this package."""
    import torch  # pyright: ignore[reportMissingImports] - optional

    found: list[TorchLayer] = []
    for layer, held in zip(arch.layer.layers, params, strict=True):
        if isinstance(layer, (na.architectures.Dense, na.architectures.Conv)):
            w, b = (torch.from_numpy(np.array(held[name])) for name in ("w", "b"))
            fan_in = int(np.prod(w.shape[:-1]))
            scales = {"w_scale": layer.w_std / fan_in**0.5, "b_scale": layer.b_std}
            if isinstance(layer, na.architectures.Conv):
                w = w.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
                found.append(TorchLayer("conv", (w, b), padding=layer.kernel_size // 2, **scales))
            else:
                found.append(TorchLayer("dense", (w.T.contiguous(), b), **scales))
    del image
    return found


# Fewest steps at a time. A run here ends with one more, which proves that the network it leaves is a good one.
_STEPS = 20


def in_turn(sides: dict[str, Side], repeats: int, seconds: float) -> dict[str, tuple[float, list[float]]]:
    """Measure all sides in turn, each for some seconds: steps per second, the median and all of them."""
    counts = {}
    for side, run in sides.items():
        run(2)
        start = time.perf_counter()
        run(2)
        counts[side] = max(_STEPS, round(2 * seconds / (time.perf_counter() - start)))
        run(counts[side] // 4 + 1)
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(repeats):
        for side, run in sides.items():
            start = time.perf_counter()
            run(counts[side])
            rates[side].append(counts[side] / (time.perf_counter() - start))
    return {side: (statistics.median(found), found) for side, found in rates.items()}


def kernel(settings: Settings, name: str) -> dict[str, Any]:
    """Measure entries of the NTK: ours, and each implementation of neural-tangents."""
    arch, params = build(name, settings)
    n = int(name.split("-")[3])
    x = images(settings)[0][:n]
    nt = na.architectures.import_neural_tangents()
    sides: dict[str, Callable[[], np.ndarray]] = {
        "ntkadv": lambda: empirical_ntk(arch.apply, params, x, max_bytes=2**31)
    }
    for implementation, label in ((1, "Jacobian contraction"), (2, "NTK-vector products"), (3, "structured")):
        compute = jax.jit(nt.empirical_ntk_fn(
            lambda p, x: arch.apply(p, x), trace_axes=(), vmap_axes=0, implementation=implementation
        ))  # fmt: skip
        sides[f"neural-tangents, {label}"] = lambda compute=compute: np.asarray(compute(x, None, params))
    kernels, failed = {}, {}
    for side, run in list(sides.items()):
        try:
            kernels[side] = run()
        except Exception as error:
            if side == "ntkadv":
                raise
            failed[side] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            del sides[side]
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(settings.repeats):
        for side, run in sides.items():
            start = time.perf_counter()
            run()
            seconds[side].append(time.perf_counter() - start)
    medians = {side: statistics.median(taken) for side, taken in seconds.items()}
    entries, ours = kernels["ntkadv"].size, kernels["ntkadv"]
    scale = np.abs(ours).max()
    return {
        "case": f"{name} images",
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "sides": {side: {"entries_per_s": entries / medians[side], "seconds": seconds[side]} for side in sides},
        "not_run": failed,
        "times_faster_than_best": min(medians[side] for side in sides if side != "ntkadv") / medians["ntkadv"],
        "apart": float(max(np.abs(theirs - ours).max() for theirs in kernels.values()) / scale),
    }


def tables(result: dict[str, Any]) -> list[Table]:
    """Show rates, and how many times as fast it is here."""
    training = Table("case", "side", "steps / s", "ntkadv is faster", title="training")
    for row in (*result["training"], *result["methods"]):
        for side, entry in row["sides"].items():
            faster = f"{row['times_faster'][side]:.2f} x" if side in row["times_faster"] else ""
            training.add_row(row["case"], side, f"{entry['steps_per_s']:.2f}", faster)
    ntk = Table("case", "side", "entries / s", "ntkadv is faster", title="empirical NTK")
    for row in result["ntk"]:
        ours = row["sides"]["ntkadv"]["entries_per_s"]
        for side, entry in row["sides"].items():
            faster = "" if side == "ntkadv" else f"{ours / entry['entries_per_s']:.2f} x"
            ntk.add_row(row["case"], side, f"{entry['entries_per_s']:.0f}", faster)
    return [training, ntk]


if __name__ == "__main__":
    launch(main, Settings, __doc__)
