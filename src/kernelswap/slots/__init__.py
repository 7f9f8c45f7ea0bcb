"""The only code that changes a live model. A swap gives a module a one-step subclass of its own class (design decision D1).

* `state`    what is known about one swapped module, and where to find it
* `rebuild`  a forward that finds another function under a global name
* `classes`  the subclasses, and how a module moves between them
* `check`    the first call of a kernel, beside the model's own run
* `module`   install and restore; why a module cannot be swapped
* `function` the same for a function that a module's forward looks up as a global
"""
