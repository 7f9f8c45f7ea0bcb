"""`swap(model, graphs=True)`: the decode steps of a model recorded once for each kind of step, and replayed.

* `step`      one call of a model: is it a decode step, and what decides how it runs
* `outputs`   what a call returned, taken apart and put together again
* `caches`    the tensors of a static cache: identity, adoption, one step back
* `watch`     whether a model is still the one that was recorded
* `recorder`  the protocol of what records, and CUDA graphs, which do
* `replays`   the recordings of one model: when to run, to record, to replay, to let go
* `site`      the outcome that puts all this in the place of a model's forward
"""
