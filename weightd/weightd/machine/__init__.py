"""What this machine can give: memory limits, memory pressure, and what `weightd doctor` reports."""
