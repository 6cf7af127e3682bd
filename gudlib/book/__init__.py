"""The notebooks as a book: their files, claims and runs, and what a machine needs for them."""
