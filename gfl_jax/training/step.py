"""The optimiser and the train step, written for one device and mapped over all of them."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from gfl_jax.data.batch import Batch
from gfl_jax.detectors.dense import Detector
from gfl_jax.distributed import AXIS
from gfl_jax.errors import InputError
from gfl_jax.models.heads import Outputs
from gfl_jax.models.network import Arrays, Network, Variables
from gfl_jax.training.loggers import Log

Scalars = dict[str, Float[Array, ""]]
PerImage = dict[str, Float[Array, " b"]]


@dataclasses.dataclass(frozen=True)
class Train:
    """The schedule. SGD in PyTorch's form: v = momentum v + g + weight_decay p; p -= lr v.

    Attributes:
        batch_size: images per step over all devices; a multiple of devices x accumulate.
        lr: learning rate for a batch of 16; it is scaled by batch_size / 16.
        momentum: fraction of the velocity that a step keeps.
        weight_decay: multiple of the parameters that is added to their gradients.
        epochs: length of the training.
        milestones: epochs after which the learning rate is multiplied by 0.1.
        warmup_steps: steps in which the learning rate rises from warmup_factor * lr to lr.
        warmup_factor: where the rise begins, as a factor of lr.
        warmup: 'linear' rises with every step; 'constant' jumps at the end.
        bias_lr: factor on the learning rate of the convolutions' biases.
        bias_decay: factor on weight_decay for all biases.
        clip_norm: largest global norm of the gradient; 0: no clipping.
        ema_decay: decay per step of the moving average of the parameters, which is evaluated in
            their place; 0: no average.
        mapping: how the step is mapped over devices; 'auto': pmap in one process, shard_map in
            several.
        accumulate: parts into which a device splits its images to save memory; more than 1 costs a
            second forward pass. The step is still that of the whole batch.
        eval_batch: images per device and batch in evaluation. It does not depend on the number of
            devices, and so neither do the results.
        eval_every: epochs between evaluations; 0: only after the last.
        checkpoint_every: steps between checkpoints; 0: one after each epoch.
        log_every: steps between metrics entries.
        log: where these and pictures go.
        profile: FIRST:LAST, such as 20:25: steps (counted from 0, LAST not included) that
            jax.profiler traces to the folder `profile` of the work directory; empty: none.
        seed: seed of initial weights, batches and augmentation.
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
    mapping: Literal["auto", "pmap", "shard_map"] = "auto"
    accumulate: int = 1
    eval_batch: int = 8
    eval_every: int = 1
    checkpoint_every: int = 0
    log_every: int = 10
    log: Log = Log()
    profile: str = ""
    seed: int = 0

    def __post_init__(self):
        for field in ("batch_size", "epochs", "lr", "log_every", "accumulate", "eval_batch"):
            if getattr(self, field) <= 0:
                raise InputError(f"train.{field} is {getattr(self, field)}; it must be positive")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"train.ema_decay is {self.ema_decay}; it must be in [0, 1)")
        if self.profile and not self.profile_steps:
            raise InputError(
                f"train.profile is {self.profile!r}; give FIRST:LAST, steps with FIRST < LAST, "
                "such as 20:25"
            )

    @property
    def profile_steps(self) -> range:
        """The steps that are profiled."""
        match = re.fullmatch(r"(\d+):(\d+)", self.profile)
        return range(int(match[1]), int(match[2])) if match else range(0)


class TrainState(NamedTuple):
    """Everything that a step changes, and a checkpoint holds.

    Attributes:
        step: number of steps taken.
        variables: of the network.
        optimizer: momenta.
        ema: averaged parameters; empty without averaging.
    """

    step: Int[Array, ""]
    variables: Variables
    optimizer: optax.OptState
    ema: Arrays

    def evaluated(self) -> Variables:
        """The variables to evaluate: with averaged parameters if there are any."""
        return self.variables._replace(params=self.ema or self.variables.params)

    def items(self) -> dict[str, Any]:
        """The state as checkpoints store it: `weights`, for inference; `training`, the rest."""
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
    # As in the reference, the last warm-up step already has the full rate.
    last = max(train.warmup_steps - 1, 1)
    start = train.warmup_factor if train.warmup_steps else 1.0
    rise = optax.linear_schedule(start, 1.0, last)

    def warmup(step):
        return jnp.where(step < last, start, 1.0) if train.warmup == "constant" else rise(step)

    return lambda step: warmup(step) * steps(step)


def sgd(train: Train, schedule: optax.Schedule) -> optax.GradientTransformation:
    """SGD in PyTorch's form: weight decay enters the gradient before the momentum."""

    def biases(params: Arrays) -> dict[str, bool]:
        return {name: name.endswith(".bias") for name in params}

    def others(params: Arrays) -> dict[str, bool]:
        return {name: not name.endswith(".bias") for name in params}

    def biases_of_convolutions(params: Arrays) -> dict[str, bool]:
        beside = {name.replace(".kernel", ".bias") for name in params if name.endswith(".kernel")}
        return {name: name in beside for name in params}

    return optax.chain(
        optax.clip_by_global_norm(train.clip_norm) if train.clip_norm else optax.identity(),
        optax.add_decayed_weights(train.weight_decay, others),
        optax.add_decayed_weights(train.weight_decay * train.bias_decay, biases),
        optax.trace(train.momentum),
        optax.masked(optax.scale(train.bias_lr), biases_of_convolutions),
        optax.scale_by_learning_rate(schedule),
    )


def init_state(
    variables: Variables, optimizer: optax.GradientTransformation, train: Train
) -> TrainState:
    """The state before the first step, with these variables."""
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
    """One step on one device's share of the batch, to be mapped over the devices.

    The losses, the counts they are divided by and the gradients are summed over AXIS, so that the
    step does not depend on how images are spread over devices.

    Returns:
        `train_step(state, batch)`: the new state, scalars of the global batch (each loss term,
        their sum `loss`, `grad_norm` and `lr`) and every image's share of the loss terms.
    """

    def forward(variables: Variables, batch: Batch) -> tuple[Outputs, Arrays]:
        """The outputs of all images and the new statistics, averaged over the parts."""

        def apply(part):
            return network.apply(variables, *part, train=True)

        if train.accumulate == 1:
            return apply((batch.images, batch.sizes))
        # Only inputs and outputs of each part are kept; the backward pass recomputes the rest. So
        # the losses see the whole batch, and the counts they divide by are right.
        parts = jax.tree.map(
            lambda x: x.reshape(train.accumulate, -1, *x.shape[1:]), (batch.images, batch.sizes)
        )
        outputs, stats = lax.map(jax.checkpoint(apply), parts)
        whole = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)
        return whole, jax.tree.map(lambda x: x.mean(0), stats)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Scalars, PerImage]:
        def objective(params: Arrays):
            variables = state.variables._replace(params=params)
            outputs, stats = forward(variables, batch)
            losses = detector.losses(outputs, batch, lambda count: lax.psum(count, AXIS))
            return sum(losses.terms.values()), (losses, stats)

        gradient, (losses, stats) = jax.grad(objective, has_aux=True)(state.variables.params)
        gradient, terms = lax.psum((gradient, losses.terms), AXIS)
        stats = lax.pmean(stats, AXIS)

        with jax.named_scope("optimizer"):
            updates, momenta = optimizer.update(gradient, state.optimizer, state.variables.params)
            params = optax.apply_updates(state.variables.params, updates)
            ema = state.ema
            if train.ema_decay:
                ema = optax.incremental_update(params, ema, 1 - train.ema_decay)
        scalars = terms | {
            "loss": sum(terms.values()),
            "grad_norm": optax.tree.norm(gradient),
            "lr": schedule(state.step),
        }
        variables = state.variables._replace(params=params, stats=stats)
        return TrainState(state.step + 1, variables, momenta, ema), scalars, losses.per_image

    return train_step
