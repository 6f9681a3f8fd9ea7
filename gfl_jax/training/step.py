"""The optimiser and the one train step, written for one device and mapped over all of them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from gfl_jax.data.batch import Batch
from gfl_jax.detectors.dense import Detector
from gfl_jax.detectors.inference import Detections
from gfl_jax.models.heads import Outputs
from gfl_jax.models.network import Arrays, Network, Variables

Scalars = dict[str, Float[Array, ""]]
PerImage = dict[str, Float[Array, " b"]]


@dataclasses.dataclass(frozen=True)
class Train:
    """The schedule. SGD in PyTorch's form: v = momentum v + g + weight_decay p; p -= lr v.

    batch_size: images a step over all devices, a multiple of devices x `accumulate`.
    lr: for a batch of 16; scaled by batch_size / 16.
    epochs, milestones: length, and epochs after which the rate is multiplied by 0.1.
    warmup_steps, warmup_factor: the rate begins as warmup_factor * lr and, in this many steps,
        rises to lr; linearly, or (warmup 'constant') all at once at their end.
    bias_lr, bias_decay: factors of the rate of convolutions' biases and of the decay of all biases.
    clip_norm: largest norm of the whole gradient; 0 for no clipping.
    ema_decay: of an average of the parameters that is evaluated instead; 0 for none.
    mapping: how the step is laid over devices.
    accumulate: parts in which a device computes its images one after another, for memory; each
        costs a further forward pass. The step is that of the whole batch.
    eval_batch: images of each device at once in evaluation; it does not depend on the number of
        devices, and so neither do the results.
    eval_every: epochs between evaluations, 0 for the last only.
    checkpoint_every: steps between checkpoints, 0 for every epoch.
    log_every: steps between entries of the metrics files.
    seed: of initial weights, batches and augmentation.
    """

    batch_size: int = 16
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    epochs: int = 12
    milestones: tuple[int, ...] = (8, 11)
    warmup_steps: int = 500
    warmup_factor: float = 0.001
    warmup: Literal["linear", "constant"] = "linear"
    bias_lr: float = 1.0
    bias_decay: float = 1.0
    clip_norm: float = 0.0
    ema_decay: float = 0.0
    mapping: Literal["pmap", "shard_map"] = "pmap"
    accumulate: int = 1
    eval_batch: int = 8
    eval_every: int = 1
    checkpoint_every: int = 0
    log_every: int = 10
    seed: int = 0

    def __post_init__(self):
        for field in ("batch_size", "epochs", "lr", "log_every", "accumulate", "eval_batch"):
            if getattr(self, field) <= 0:
                raise ValueError(f"train.{field} is {getattr(self, field)}; it must be positive")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"train.ema_decay is {self.ema_decay}; it must be in [0, 1)")


class TrainState(NamedTuple):
    """All that a step changes: what a checkpoint holds.

    step: steps taken.  variables: of the network.  optimizer: momenta.  ema: averaged parameters,
    empty without averaging.
    """

    step: Int[Array, ""]
    variables: Variables
    optimizer: optax.OptState
    ema: Arrays

    def evaluated(self) -> Variables:
        """The variables that evaluation uses: averaged parameters if there are any."""
        return self.variables._replace(params=self.ema or self.variables.params)

    def items(self) -> dict[str, Any]:
        """The state as a checkpoint keeps it: `weights`, for inference; `training`, all else."""
        raw = self.variables.params if self.ema else {}
        return {"weights": self.evaluated(), "training": (self.step, self.optimizer, raw)}

    @classmethod
    def from_items(cls, items: Mapping[str, Any]) -> "TrainState":
        """The inverse of `items`."""
        weights, (step, optimizer, raw) = items["weights"], items["training"]
        variables = weights._replace(params=raw or weights.params)
        return cls(step, variables, optimizer, weights.params if raw else {})


def learning_rate(train: Train, steps_per_epoch: int) -> optax.Schedule:
    """Warm-up times a step schedule; the base rate is scaled by batch_size / 16."""
    base = train.lr * train.batch_size / 16
    drops = {milestone * steps_per_epoch: 0.1 for milestone in train.milestones}
    steps = optax.piecewise_constant_schedule(base, drops)
    # As in the reference, the whole rate is reached at the last of the warm-up's steps.
    last = max(train.warmup_steps - 1, 1)
    start = train.warmup_factor if train.warmup_steps else 1.0
    rise = optax.linear_schedule(start, 1.0, last)

    def warmup(step):
        return jnp.where(step < last, start, 1.0) if train.warmup == "constant" else rise(step)

    return lambda step: warmup(step) * steps(step)


def sgd(train: Train, schedule: optax.Schedule) -> optax.GradientTransformation:
    """SGD in PyTorch's form: weight decay enters the gradient before the momentum."""

    def decay(gradient: Arrays, params: Arrays | None) -> Arrays:
        assert params is not None
        factors = {
            name: train.weight_decay * (train.bias_decay if name.endswith(".bias") else 1.0)
            for name in params
        }
        return {name: g + factors[name] * params[name] for name, g in gradient.items()}

    def faster_biases(update: Arrays, params: Arrays | None) -> Arrays:
        def factor(name: str) -> float:
            module, _, leaf = name.rpartition(".")
            return train.bias_lr if leaf == "bias" and f"{module}.kernel" in update else 1.0

        return {name: factor(name) * u for name, u in update.items()}

    return optax.chain(
        optax.clip_by_global_norm(train.clip_norm) if train.clip_norm else optax.identity(),
        optax.stateless(decay),
        optax.trace(train.momentum),
        optax.stateless(faster_biases) if train.bias_lr != 1 else optax.identity(),
        optax.scale_by_learning_rate(schedule),
    )


def init_state(
    variables: Variables, optimizer: optax.GradientTransformation, train: Train
) -> TrainState:
    """The state before the first step from these variables."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        variables=variables,
        optimizer=optimizer.init(variables.params),
        ema=dict(variables.params) if train.ema_decay else {},
    )


def abstract_state(network: Network, train: Train) -> TrainState:
    """Shapes and dtypes of a run's state, to restore it into."""
    optimizer = sgd(train, optax.constant_schedule(0.0))
    return jax.eval_shape(lambda: init_state(network.init(0), optimizer, train))


def make_train_step(
    network: Network,
    detector: Detector,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    train: Train,
) -> Callable[..., tuple[TrainState, Scalars, PerImage]]:
    """`train_step(state, batch, *, axis_name)`: one step on one device's share of the batch.

    Returns the new state, scalars of the global batch (each loss term, their sum `loss`,
    `grad_norm` and `lr`) and every image's share of the loss terms.

    The counts that losses are divided by, the losses and the gradients are summed over `axis_name`,
    so that the step does not depend on how images are spread over devices.
    """

    def forward(variables: Variables, batch: Batch) -> tuple[Outputs, Arrays]:
        """The outputs of all images and the new statistics, the mean of those of the parts."""

        def apply(part):
            return network.apply(variables, *part, train=True)

        if train.accumulate == 1:
            return apply((batch.images, batch.sizes))
        # Of each part only inputs and outputs are kept; going back computes the part again. So the
        # losses see the whole batch, and what they divide by is right.
        parts = jax.tree.map(
            lambda x: x.reshape(train.accumulate, -1, *x.shape[1:]), (batch.images, batch.sizes)
        )
        outputs, stats = lax.map(jax.checkpoint(apply), parts)
        whole = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)
        return whole, jax.tree.map(lambda x: x.mean(0), stats)

    def train_step(
        state: TrainState, batch: Batch, *, axis_name: str
    ) -> tuple[TrainState, Scalars, PerImage]:
        def objective(params: Arrays):
            variables = state.variables._replace(params=params)
            outputs, stats = forward(variables, batch)
            losses = detector.losses(outputs, batch, lambda count: lax.psum(count, axis_name))
            return sum(losses.terms.values()), (losses, stats)

        gradient, (losses, stats) = jax.grad(objective, has_aux=True)(state.variables.params)
        gradient, terms = lax.psum((gradient, losses.terms), axis_name)
        stats = lax.pmean(stats, axis_name)

        with jax.named_scope("optimizer"):
            updates, momenta = optimizer.update(gradient, state.optimizer, state.variables.params)
            params = optax.apply_updates(state.variables.params, updates)
            ema = {
                name: train.ema_decay * average + (1 - train.ema_decay) * params[name]
                for name, average in state.ema.items()
            }
        scalars = terms | {
            "loss": sum(terms.values()),
            "grad_norm": optax.global_norm(gradient),
            "lr": schedule(state.step),
        }
        variables = state.variables._replace(params=params, stats=stats)
        return TrainState(state.step + 1, variables, momenta, ema), scalars, losses.per_image

    return train_step


def make_predict(network: Network, detector: Detector) -> Callable[[Variables, Batch], Detections]:
    """`predict(variables, batch)`: detections of one device's images, in original pixels."""

    def predict(variables: Variables, batch: Batch) -> Detections:
        outputs, _ = network.apply(variables, batch.images, batch.sizes, train=False)
        return detector.detections(outputs, batch.sizes, batch.scales)

    return predict


def make_forward(network: Network) -> Callable:
    """`forward(variables, batch)`: the network alone, for timing it without post-processing."""
    return lambda variables, batch: network.apply(
        variables, batch.images, batch.sizes, train=False
    )[0]
