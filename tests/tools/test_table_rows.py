"""Every row of every table: the whole network is built, a small one steps and predicts."""

import dataclasses

import jax
import numpy as np
import pytest

from gfl_jax.distributed import REPLICATED, SHARDED, Pmap
from gfl_jax.models.network import Network
from gfl_jax.models.ssd import SSDModel
from gfl_jax.tools.tables import TABLES, jobs_of, small
from gfl_jax.training.evaluator import make_predict
from gfl_jax.training.step import (
    init_state,
    learning_rate,
    make_train_step,
    sgd,
)

ROWS = {name: row for table in TABLES for row, name in jobs_of(table).values()}

# One of each kind; all rows step with --slow.
QUICK = {
    "1a_atss_joint",
    "1a_fcos_iou_branch",
    "1b_retinanet_joint",
    "1b_ssd512",
    "2a_atss_gaussian",
}


@pytest.fixture(autouse=True)
def _forget_programs():
    """Frees what a row compiled."""
    yield
    jax.clear_caches()


def smallest(experiment):
    """A row's choices with the narrowest network, its ResNet frozen: it compiles sooner."""
    data = dataclasses.replace(experiment.data, scale=(64, 64), repeats=1)
    experiment = small(dataclasses.replace(experiment, data=data), 3000)
    model = experiment.model
    if isinstance(model, SSDModel):
        model = dataclasses.replace(model, width=4)
    else:
        model = dataclasses.replace(
            model,
            backbone=dataclasses.replace(
                model.backbone, width=4, norm="frozen_bn", frozen_stages=4
            ),
            neck=dataclasses.replace(model.neck, width=32),
            head=dataclasses.replace(model.head, width=32, stacked_convs=1),
        )
    return dataclasses.replace(experiment, model=model)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_full_size_has_a_loss_and_detections(name, make_batch):
    experiment, num_classes = ROWS[name].experiment, 80
    side = 512 if isinstance(experiment.model, SSDModel) else 64
    network = Network(experiment.model, experiment.detector.predicts(num_classes))
    batch = make_batch([3, 0], (side, side), classes=num_classes)

    def run(batch):
        variables = network.init(0)
        outputs, _ = network.apply(variables, batch.images, batch.sizes, train=True)
        losses = experiment.detector.losses(outputs, batch)
        return losses, experiment.detector.detections(outputs, batch.sizes, batch.scales)

    losses, detections = jax.eval_shape(run, batch)
    assert all(term.shape == () for term in losses.terms.values())
    assert detections.boxes.shape == (2, experiment.detector.inference.max_per_image, 4)


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ROWS],
)
def test_a_row_takes_two_steps_and_predicts(name, make_batch):
    experiment = smallest(ROWS[name].experiment)
    network = Network(experiment.model, experiment.detector.predicts(3))
    batch = make_batch([3, 0], (64, 64))
    schedule = learning_rate(experiment.train, 100)
    optimizer = sgd(experiment.train, schedule)
    step = make_train_step(network, experiment.detector, optimizer, schedule, experiment.train)
    one = Pmap(jax.local_devices()[:1])
    step = one.map(step, outputs=(REPLICATED, REPLICATED, SHARDED))
    state = one.replicate(init_state(network.init(0), optimizer, experiment.train))
    for _ in range(2):
        state, scalars, _ = step(state, one.shard(batch))
    scalars = one.fetch_replicated(scalars)
    assert all(np.isfinite(value) for value in scalars.values())
    assert scalars["loss"] > 0
    assert scalars["grad_norm"] > 0
    predict = one.map(make_predict(network, experiment.detector), outputs=SHARDED)
    found = one.fetch_sharded(predict(state.variables, one.shard(batch)))
    assert np.isfinite(found.boxes).all()
    assert ((found.scores >= 0) & (found.scores <= 1)).all()
