"""generate(): prompts, arguments, drafts, caches and statistics of a generation."""
