"""Detectors of torchvision's, each loaded once."""

import detectors
import pytest


@pytest.fixture(scope="session")
def retinanet(shared):
    return detectors.Golden(shared, "retinanet")


@pytest.fixture(scope="session")
def faster_rcnn_v2(shared):
    return detectors.Golden(shared, "fasterrcnn_v2")


@pytest.fixture(scope="session")
def mask_rcnn(shared):
    return detectors.Golden(shared, "maskrcnn")
