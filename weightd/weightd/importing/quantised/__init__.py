"""Numbers with scales apart from them: their values, and the blocks of GGML's formats that hold the same."""
