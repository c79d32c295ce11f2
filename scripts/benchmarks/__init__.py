"""What the benchmarks share: processes, cgroups, reports."""
