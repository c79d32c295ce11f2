"""How a client computes FFNs, which of these modes a calibration is for, and how a client holds keys and values."""

from __future__ import annotations

from weightd_proto.weightd_pb2 import Calibration

EXACT, PREDICT, THRESHOLD = "exact", "predict", "threshold"
# Tokens whose neurons stay leased. In threshold mode the neurons of a few tokens are most of a layer.
WINDOW_TOKENS = {PREDICT: 4, THRESHOLD: 0}
KV_PLAIN, KV_INT8 = "plain", "int8"  # keys and values in the dtype of the model; in blocks of Q8_0
KV_DTYPES = (KV_PLAIN, KV_INT8)


def lossy_mode(calibration: Calibration) -> str:
    """The mode that a calibration is for: predict or threshold."""
    return calibration.lossy_mode or PREDICT
