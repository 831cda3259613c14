"""The command ``fxopt``: compile, look at, run and compare models without writing Python.

    fxopt compile models:resnet18 --input 'f32[1,3,224,224]' -o m.fxopt
    fxopt run m.fxopt --inputs image.npy -o answer.npz

A MODEL is ``module:factory`` (a model, a function or class that makes one, or ``(model, example_inputs)``), a ``.pt2``
file of torch.export, or a ``.fxopt`` file. Every command takes ``--json``. Exit status: 0 all is well, 1 the answer is
no (it does not compile, differs, fails), 2 the command was wrong.
"""

from __future__ import annotations

from fxopt.cli.app import app, main

__all__ = ["app", "main"]
