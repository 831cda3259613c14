"""Which layers quantization harms: one at a time is quantized, and the outputs are compared with float."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxopt import ops, progress
from fxopt.passbase import PassContext
from fxopt.passes.insert_fake_quant import calibrate, insert, quality
from fxopt.passes.insert_fake_quant.quantization import Quantization
from fxopt.program import source_line
from fxopt.rewriter import Rewriter
from fxopt.sweep import LayerSensitivity, Sensitivity

if TYPE_CHECKING:
    from fxopt.passes.insert_fake_quant import InsertFakeQuant


def measure(options: InsertFakeQuant, rewriter: Rewriter, ctx: PassContext) -> Sensitivity:
    """Quantize one layer after the other as *options* say, on a graph ready for insert-fake-quant.

    Ranges of all layers are found in one run over the calibration data; the outputs are compared on kept-back batches.

    Raises:
        PreconditionError: there is no calibration data.
    """
    run = Quantization(options, rewriter, ctx)
    if options.activations == "static":
        insert.split_units(rewriter, run.scheme)
    run.decide()
    exact = rewriter.program.copy()
    modes, names = dict(run.modes), set[str]()
    for name, mode in modes.items():
        run.modes = {name: mode}
        names |= {node.name for node in run.place(exact).sources()}
    batches = ctx.batches(options)
    run.ranges = calibrate.observe(exact, batches, names, options.calibrator, run.scheme.activation)
    kept = calibrate.kept_back(ctx.batches(options))
    nodes = {node.name: node for node in exact.graph.nodes}
    found = []
    for i, (name, mode) in enumerate(modes.items(), start=1):
        progress.say(f"layer {i} of {len(modes)} alone in int8")
        run.modes = {name: mode}
        worst = min(quality.outputs(exact, run.trial(exact), kept), key=lambda one: one.snr_db, default=None)
        if worst is not None:
            node = nodes[name]
            weight = str(ops.arguments(node)["weight"].target)
            where = source_line(node)
            found.append(LayerSensitivity(name, weight, ops.kind(node), worst.cosine, worst.snr_db, where))
    return Sensitivity(tuple(sorted(found, key=lambda one: one.snr_db)), dict(run.reasons))
