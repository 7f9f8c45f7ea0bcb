"""Libraries that ask for kernels in their own words, translated: one folder each."""
