"""The daemon's numbers: statistics, Prometheus metrics and `weightd top`."""
