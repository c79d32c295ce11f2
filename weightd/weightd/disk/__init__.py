"""Files read and written past the page cache."""
