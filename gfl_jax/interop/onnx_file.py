"""A detector as an ONNX file: for runtimes without JAX."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from gfl_jax.detectors.dense import Detector
from gfl_jax.interop.onnx_graph import model_of
from gfl_jax.interop.onnx_ops import RULES
from gfl_jax.interop.programs import INPUTS, OUTPUTS, Output, arguments, program, weights_of
from gfl_jax.models.network import Network, Variables


def onnx_model(
    network: Network,
    variables: Variables,
    detector: Detector,
    canvas: Sequence[int],
    output: Output,
    about: Mapping[str, Any],
) -> Any:
    """A detector with its weights as an ONNX model, for any number of images.

    Computed in float32, also where the network was trained in bfloat16.

    Args:
        network: the network.
        variables: its weights.
        detector: what its outputs mean.
        canvas: height and width of images, in pixels.
        output: what it returns.
        about: its metadata: strings by name, or what JSON can hold.

    Raises:
        InputError: it has an operation that cannot be written in ONNX.
        MissingExtraError: onnx is not installed.
    """
    network = network.with_dtype("float32")
    run, weights = program(network, detector, output), weights_of(variables)

    def closed(*inputs):
        return run(weights, *inputs)

    traced = jax.jit(closed).trace(*arguments(canvas))
    results = [path[0].key for path, _ in jax.tree.leaves_with_path(traced.out_info)]
    model = model_of(traced, list(INPUTS), results, RULES)
    said = {
        "canvas": list(canvas),
        "output": output,
        "inputs": {name: INPUTS[name] for name in (x.name for x in model.graph.input)},
        "outputs": {name: OUTPUTS[output][name] for name in results},
        **about,
    }
    for name, value in said.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        model.metadata_props.add(key=name, value=text)
    return model
