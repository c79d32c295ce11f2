"""The store on flash: models, their catalog, checksums, calibrations and the device profile."""
