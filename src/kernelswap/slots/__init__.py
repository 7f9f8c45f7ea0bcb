"""The only code that changes a live model. A swap gives a module a one-step subclass of its own class (design decision D1).

* `state`     what is known about one swapped module, and where to find it
* `rebuild`   a forward that finds another function under a global name
* `forwards`  what stands before a kernel, where anything does
* `classes`   the subclasses, and how a module moves between them
* `check`     the first call of a kernel, beside the model's own run
* `obstacles` why a module cannot be swapped, and what a kernel would go round
* `module`    install and restore
* `function`  the same for a function that a module's forward looks up as a global
"""
