"""Files of a model that daemon and client both name."""

from __future__ import annotations

# Of a calibration; flashclient.model.predictor_file specifies their format.
PREDICTORS_FILE = "predictors.safetensors"
STATISTICS_FILE = "statistics.safetensors"
REPORT_FILE = "report.json"
ALIGNMENT_BYTES = 64  # of every tensor in them: a cache line, enough for any vector load
