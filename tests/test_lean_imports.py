"""Lightning starts without what torchmetrics would load for nobody, and all of it is there for whoever asks."""

import subprocess
import sys

PROGRAM = """
import sys
import dmaml_pl, pytorch_lightning
unneeded = {"scipy.signal", "scipy.stats", "torchvision", "torchvision.models"}
assert not unneeded & sys.modules.keys(), unneeded & sys.modules.keys()

import torch, torchmetrics
boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
print(float(torchmetrics.functional.detection.intersection_over_union(boxes, boxes / 2)))
import scipy.signal, torchvision
print(len(scipy.signal.windows.hamming(5)), torchvision.ops.box_area(boxes).item())
"""


def test_lightning_starts_without_torchvision_and_scipy_which_are_there_when_a_metric_asks() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0.25", "5", "4.0"]
