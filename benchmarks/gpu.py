"""Times training and prediction of GFL on an accelerator, with synthetic images.

    python benchmarks/gpu.py [--batch 4 8 16 32] [--canvas 800 1344] [--out FOLDER]
                             [--skip torch correct ...]

Needs no data and no network: jax, flax and optax beside this package, and PyTorch for the other
side. Every measurement runs in a process of its own, one after another, so that its peak memory is
its own and a failure loses nothing else. FOLDER gets one line of JSON per measurement, with
--trace also a profile and the text of the compiled step.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

PEAK_TFLOPS = {"H100": 989.4, "H200": 989.4, "A100": 312.0, "B200": 2250.0, "V100": 125.0}
"""Dense bfloat16 matrix products (V100: float16), from the makers' data sheets."""

OBJECTS, SLOTS = 7, 100


def main() -> None:
    """Runs every measurement, or in a child process one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--canvas", type=int, nargs=2, default=[800, 1344], metavar=("H", "W"))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--depth", type=int, default=50, help="layers of the ResNet")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--skip", nargs="*", default=[], choices=[*KINDS], help="kinds left out")
    parser.add_argument("--only", nargs="*", default=[], choices=[*KINDS], help="the only kinds")
    parser.add_argument("--out", type=Path, default=Path("benchmark_gpu"))
    parser.add_argument("--trace", action="store_true", help="keep a profile of training")
    parser.add_argument("--timeout", type=float, default=600, help="seconds per measurement")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.child:
        print(json.dumps(KINDS[args.child](args)))
        return
    for kind in args.only or KINDS:
        if kind in args.skip:
            continue
        for batch in args.batch if kind != "correct" else [2]:
            measure(kind, batch, args)


def measure(kind: str, batch: int, args: argparse.Namespace) -> None:
    """One measurement in a process of its own: a line on the screen and in results.jsonl."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child", kind, "--batch", str(batch)]
    began = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout)
        lines = done.stdout.strip().splitlines()
        result = json.loads(lines[-1]) if not done.returncode else {"error": done.stderr[-1500:]}
    except subprocess.TimeoutExpired:
        result = {"error": f"took longer than {args.timeout} s"}
    result = {"kind": kind, "batch": batch, **result, "wall_s": time.perf_counter() - began}
    with (args.out / "results.jsonl").open("a") as file:
        file.write(json.dumps(result) + "\n")
    print(
        "  ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in result.items()
        ),
        flush=True,
    )


# ---------------------------------------------------------------------------- this package


def experiment(args):
    """Network, detector, optimiser, step and a state with random weights."""
    import jax.numpy as jnp

    from gfl_jax.detectors.dense import Detector
    from gfl_jax.models.network import Model, Network
    from gfl_jax.models.resnet import Backbone
    from gfl_jax.training.step import Train, init_state, learning_rate, make_train_step, sgd

    detector, train = Detector(), Train(batch_size=args.batch[0])
    model = Model(backbone=Backbone(depth=args.depth), dtype=args.dtype)
    network = Network(model, detector.predicts(80))
    variables = network.init(0)
    # Residual branches start at zero, and products with zeros are faster than those of training.
    params = {
        k: jnp.full_like(v, 0.2) if ".bn" in k and k.endswith("scale") else v
        for k, v in variables.params.items()
    }
    schedule = learning_rate(train, 1000)
    optimizer = sgd(train, schedule)
    step = make_train_step(network, detector, optimizer, schedule, train)
    return network, detector, step, init_state(variables._replace(params=params), optimizer, train)


def synthetic_batch(args, count: int):
    """Images of noise with `OBJECTS` objects each, of all sizes."""
    import numpy as np

    from gfl_jax.data.batch import Batch

    rng = np.random.default_rng(0)
    height, width = args.canvas
    size = np.exp(rng.uniform(np.log(12), np.log(height * 0.9), (count, SLOTS, 2)))
    corner = rng.uniform(0, 1, (count, SLOTS, 2)) * np.maximum([width, height] - size, 1)
    return Batch(
        images=rng.integers(0, 256, (count, height, width, 3), np.uint8),
        sizes=np.tile(np.array([[height, width - 11]], np.int32), (count, 1)),
        scales=np.ones((count, 2), np.float32),
        boxes=np.concatenate([corner, corner + size], -1)
        .clip(0, [width - 11, height] * 2)
        .astype(np.float32),
        labels=rng.integers(0, 80, (count, SLOTS)).astype(np.int32),
        box_mask=np.tile(np.arange(SLOTS) < OBJECTS, (count, 1)),
        image_mask=np.ones(count, bool),
    )


def train(args) -> dict:
    """Seconds per train step through the package's own mapping, and its memory."""
    import jax

    from gfl_jax.distributed import REPLICATED, SHARDED, parallel

    began = time.perf_counter()
    _, _, step, state = experiment(args)
    devices = parallel("auto", jax.devices()[:1])
    mapped = devices.map(step, outputs=(REPLICATED, REPLICATED, SHARDED), donate=True)
    state = devices.replicate(state)
    batch = devices.shard(synthetic_batch(args, args.batch[0]))
    lowered = mapped.lower(state, batch)
    compile_began = time.perf_counter()
    compiled = lowered.compile()
    compile_s = time.perf_counter() - compile_began
    if args.trace:
        (args.out / f"step_{args.batch[0]}.hlo").write_text(compiled.as_text())

    def run(steps):
        nonlocal state
        start = time.perf_counter()
        for _ in range(steps):
            state, scalars, _ = compiled(state, batch)
        jax.block_until_ready(state)
        return (time.perf_counter() - start) / steps, float(scalars["loss"].reshape(-1)[0])

    run(3)
    times = [run(max(args.steps // 4, 1)) for _ in range(4)]
    seconds = statistics.median(t for t, _ in times)
    if args.trace:
        with jax.profiler.trace(str(args.out / f"trace_{args.batch[0]}")):
            run(3)
    return {
        **speed(seconds, args.batch[0], flops(lowered), jax.devices()[0].device_kind),
        "loss": times[-1][1],
        "compile_s": compile_s,
        "ready_s": compile_began - began + compile_s,
        **memory(jax.devices()[0]),
    }


def predict(args) -> dict:
    """Seconds per batch for detections, and for the network's outputs alone."""
    import jax

    network, detector, _, state = experiment(args)
    variables, batch = jax.device_put((state.variables, synthetic_batch(args, args.batch[0])))

    def outputs(variables, batch):
        return network.apply(variables, batch.images, batch.sizes, train=False)[0]

    def detections(variables, batch):
        return detector.detections(outputs(variables, batch), batch.sizes, batch.scales)

    found = {}
    for name, function in {"detections": detections, "outputs": outputs}.items():
        lowered = jax.jit(function).lower(variables, batch)
        compiled = lowered.compile()
        seconds = timed(lambda c=compiled: jax.block_until_ready(c(variables, batch)), args.steps)
        numbers = speed(seconds, args.batch[0], flops(lowered), jax.devices()[0].device_kind)
        found |= {f"{name}_{key}": value for key, value in numbers.items()}
    return found | memory(jax.devices()[0])


def correct(args) -> dict:
    """Largest difference of parameters after one step between this device and the CPU, float32.

    Relative to the largest change of any entry of the same array.
    """
    import jax
    import numpy as np

    args.dtype, args.canvas, args.batch = "float32", [256, 320], [2]
    jax.config.update("jax_default_matmul_precision", "highest")
    from gfl_jax.distributed import REPLICATED, SHARDED, parallel

    _, _, step, state = experiment(args)
    start = jax.tree.map(np.asarray, state)
    ends = []
    for device in (jax.devices()[0], jax.devices("cpu")[0]):
        devices = parallel("auto", [device])
        with jax.default_device(device):
            mapped = devices.map(step, outputs=(REPLICATED, REPLICATED, SHARDED))
            batch = devices.shard(synthetic_batch(args, 2))
            ends.append(devices.fetch_replicated(mapped(devices.replicate(start), batch)[0]))
    here, cpu = (end.variables.params for end in ends)
    worst = {
        name: float(
            np.abs(here[name] - cpu[name]).max() / (np.abs(cpu[name] - before).max() + 1e-12)
        )
        for name, before in start.variables.params.items()
    }
    name = max(worst, key=lambda key: worst[key])
    return {
        "device": jax.devices()[0].device_kind,
        "worst": worst[name],
        "name": name,
        "median": statistics.median(worst.values()),
    }


def timed(function, steps: int) -> float:
    """Median seconds of a call, after three to warm up."""
    times = []
    for _ in range(3 + steps):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


def speed(seconds: float, count: int, operations: float, kind: str) -> dict:
    """Milliseconds per batch and image, images/s and share of the device's peak."""
    peak = next((peak for name, peak in PEAK_TFLOPS.items() if name in kind), float("nan"))
    return {
        "device": kind,
        "ms": 1000 * seconds,
        "ms_per_image": 1000 * seconds / count,
        "images_per_s": count / seconds,
        "tflop_per_image": operations / count / 1e12,
        "share_of_peak": operations / seconds / (peak * 1e12),
    }


def flops(lowered) -> float:
    """Floating-point operations of a program as written, before the compiler changes it."""
    cost = lowered.cost_analysis()
    return float((cost[0] if isinstance(cost, list) else cost)["flops"])


def memory(device) -> dict:
    """Peak memory of a device, or on a CPU of this process, in GiB."""
    if stats := device.memory_stats():
        return {"peak_gib": stats["peak_bytes_in_use"] / 2**30}
    return {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


# ---------------------------------------------------------------------------- PyTorch


def torch_train(args, compiled: bool = False) -> dict:
    """The same network, losses and optimiser in PyTorch: channels_last, autocast to bfloat16."""
    import torch
    import torch_side

    seconds = torch_side.train(
        synthetic_batch(args, args.batch[0]), args.depth, args.dtype, args.steps, compiled
    )
    kind = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    numbers = speed(seconds.pop("seconds"), args.batch[0], 0.0, kind) | seconds
    return {key: value for key, value in numbers.items() if value}


def torch_compiled(args) -> dict:
    """The same under torch.compile."""
    return torch_train(args, compiled=True)


KINDS = {
    "train": train,
    "predict": predict,
    "correct": correct,
    "torch": torch_train,
    "torch_compiled": torch_compiled,
}

if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    main()
