"""Transformers: `use_kernels=True`, `KernelConfig`, attention strings, on top of any release from 5.10 on.

config     KernelConfig: a value, read by `mapping`
mapping    its forms -> entries; every problem with its place
wanted     entries + a model -> what `Swapper.swap` takes
switch     one model on and off, and what is said about it
seams      where Transformers is taken over, and how it is given back
attention  attention strings
"""
