"""Where kernels come from: each file is one `Source` (`types.py`). A source finds, reads and fetches; it never decides.

Every source has a `key`, which its candidates carry as `candidate.source`. To add one, write a file here and let its
tests inherit `tests/contract/sources.py`.
"""
