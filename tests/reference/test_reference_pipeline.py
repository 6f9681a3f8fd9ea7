"""From pixels on disk to the network's input, bit for bit after resizing."""

import json

import numpy as np

from gfl_jax.data import images
from gfl_jax.data.batch import Sample, pad
from gfl_jax.models.heads import OutputSpec
from gfl_jax.models.network import Model, Network


def test_resize_and_flip(pipeline_case):
    meta = json.loads(str(pipeline_case["meta"]))
    for entry in meta["images"]:
        i = entry["index"]
        image, boxes = pipeline_case[f"images.{i}"], pipeline_case[f"boxes.{i}"]
        assert image.shape[:2] == tuple(entry["raw_shape"])
        for long_side, short_side in meta["rules"]:
            rule = f"{long_side}x{short_side}"
            found, scale = images.resize_keep_ratio(image, long_side, short_side)
            scaled = images.scale_boxes(boxes, scale, found.shape[:2])
            mirrored, flipped = images.flip(found, scaled)
            step = meta["sampling"][rule]
            np.testing.assert_array_equal(mirrored, found[:, ::-1])
            for name, ours in {
                "resized": found[::step, ::step],
                "resized_mean": found.mean((0, 1)),
                "resized_shape": found.shape[:2],
                "scale_factor": scale,
                "resized_boxes": scaled,
                "flipped_boxes": flipped,
            }.items():
                theirs = pipeline_case[f"{name}.{i}.{rule}"]
                np.testing.assert_array_equal(ours, theirs, err_msg=f"{name}.{i}.{rule}")


def test_normalise_and_pad(pipeline_case, compare):
    """`batch.rgb` is what ResNets of torchvision see; `caffe` is BGR minus the means of FCOS."""
    found = [images.resize_keep_ratio(pipeline_case[f"images.{i}"], 160, 96)[0] for i in (1, 2)]
    batch = pad([Sample(image, (1.0, 1.0), np.zeros((0, 4)), np.zeros(0)) for image in found])
    preprocessing = {
        "rgb": (Model().mean, Model().std, "rgb"),
        "caffe": ((102.9801, 115.9465, 122.7717), (1.0,) * 3, "bgr"),
    }
    for colours, (mean, std, order) in preprocessing.items():
        model = Model(mean=mean, std=std, channel_order=order)
        network = Network(model, OutputSpec(cls=1, box=4))
        ours = np.asarray(network.normalize(batch.images, batch.sizes)).transpose(0, 3, 1, 2)
        assert ours.shape == tuple(pipeline_case[f"batch_shape.{colours}"])
        padded = -(-batch.sizes // 32) * 32
        np.testing.assert_array_equal(padded, pipeline_case[f"pad_shape.{colours}"])
        ours = ours[:, :, ::2, ::2]
        theirs = pipeline_case[f"batch.{colours}"]
        compare(f"batch.{colours}", ours, theirs, 1e-6)
        np.testing.assert_array_equal(ours == 0, theirs == 0)
