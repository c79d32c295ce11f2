"""Tables: embeddings whose rows stay with weightd, and are read when they are looked up."""
