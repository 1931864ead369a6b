"""Where chests are kept: LMDB and files (the default), and what stands behind a URL."""
