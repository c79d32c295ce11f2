"""Names of the files that daemon and client both use."""

from __future__ import annotations

# In the folder of a store.
DAEMON_LOCK_FILE = "weightd.lock"  # {"pid": ..., "address": ...} of the daemon that serves the store, which locks it

# In the folder of a model.
BUNDLES_FILE = "bundles.bin"

# Of a calibration; flashclient.model.predictor_file specifies their format.
PREDICTORS_FILE = "predictors.safetensors"
STATISTICS_FILE = "statistics.safetensors"
REPORT_FILE = "report.json"
CALIBRATION_FILES = (PREDICTORS_FILE, STATISTICS_FILE, REPORT_FILE)
ALIGNMENT_BYTES = 64  # of every tensor in them: a cache line, enough for any vector load
