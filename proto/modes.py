"""How a client computes FFNs, and which of these modes a calibration is for."""

from __future__ import annotations

from weightd_proto.weightd_pb2 import Calibration

EXACT, PREDICT, THRESHOLD = "exact", "predict", "threshold"
# Tokens whose neurons stay leased. In threshold mode the neurons of a few tokens are most of a layer.
WINDOW_TOKENS = {PREDICT: 4, THRESHOLD: 0}


def lossy_mode(calibration: Calibration) -> str:
    """The mode that a calibration is for: predict or threshold."""
    return calibration.lossy_mode or PREDICT
