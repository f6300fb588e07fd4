"""rms_norm, swiglu and rope, forward alone and forward + backward, against what the models of transformers compute.

    python bench/bench_layers.py [--quick] [--rounds 5] [--clock wall|cpu] [--threads N]

The floor is bytes: a copy that reads and writes as many (forward 2, 3 and 2 numbers an element of the result, backward 3, 5 and 2).
On a GPU both sides are torch's: these ops have CPU kernels alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.harness import run_file
from bench.layers import layers, value_and_gradients

FORWARD, BACKWARD = {"rms_norm": 2, "swiglu": 3, "rope": 2}, {"rms_norm": 3, "swiglu": 5, "rope": 2}  # numbers an element


def bench_layers(versus, device, quick, dtype):
    for tokens in (64,) if quick else (64, 4096):
        found = layers(lambda *shape: torch.randn(*shape, device=device).to(dtype), tokens, 512, 1408, 8, 64)
        for name, layer in found.items():
            grad = torch.randn_like(layer.ours(*layer.inputs))
            for passes in ("forward", "forward + backward"):
                moved = FORWARD[name] + (BACKWARD[name] if "backward" in passes else 0)
                from_, to = torch.empty(2, layer.elements * moved // 2, dtype=dtype, device=device)

                def run(function, layer=layer, grad=grad, whole="backward" in passes):
                    if not whole:
                        with torch.no_grad():
                            return function(*layer.inputs)
                    return value_and_gradients(function, layer.inputs, layer.num_grads, grad)

                sides = {
                    "fastalign": lambda run=run, layer=layer: run(layer.ours),
                    "torch": lambda run=run, layer=layer: run(layer.torch),
                    "floor": lambda from_=from_, to=to: to.copy_(from_),
                }
                shape = f"{tokens} x {layer.elements // tokens}, {passes}"
                versus(name, shape, dtype, sides, bytes=float(layer.elements * moved * dtype.itemsize))


if __name__ == "__main__":
    run_file(__file__)
