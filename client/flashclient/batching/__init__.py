"""Many sequences of one model at once: they advance together, one token a step, and share what a step reads."""
