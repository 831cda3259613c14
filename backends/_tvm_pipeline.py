"""The passes of TVM that loops of ours need on their way to LLVM: a good third of its own list.

Left out is ``StorageRewrite``, which forgets that accumulators live in registers: ``LowerTVMBuiltin`` would then take
them from the heap, each one, in each tile. Left out are also those for GPUs and for TVM's schedules, and those that
LLVM repeats: common subexpressions, hoisting of conditions, partition of loops.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import s_tir, tirx

NAME = "fxopt"


def _passes() -> list[Any]:
    return [
        s_tir.transform.CanonicalizeLoop(),  # to here for the functions that there was no rule for
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.CompactBufferAllocation(),
        s_tir.transform.LowerMatchBuffer(),
        s_tir.transform.LowerOpaqueBlock(),
        s_tir.transform.StmtSimplify(),  # else FlattenBuffer folds indices inside of conditions to wrong ones
        tirx.transform.FlattenBuffer(),
        tirx.transform.BF16ComputeLegalize(),
        tirx.transform.ConvertSSA(),  # rounding to bfloat16 repeats what it rounds, and variables that are bound in it
        tirx.transform.NarrowDataType(32),
        tirx.transform.VectorizeLoop(True),
        tirx.transform.UnrollLoop(),
        tirx.transform.StmtSimplify(),
        tirx.transform.RemoveNoOp(),
        s_tir.transform.RewriteUnsafeSelect(),
        tirx.transform.FP8ComputeLegalize(),
        tirx.transform.VerifyMemory(),
        tirx.transform.AnnotateEntryFunc(),
        tirx.transform.SplitHostDevice(),
        tirx.transform.MakePackedAPI(),
        tirx.transform.FP8StorageLegalize(),
        tirx.transform.BF16StorageLegalize(),
    ]


def _pipeline() -> tuple[Any, Any, Any]:
    own = tirx.compilation_pipeline
    return tvm.transform.Sequential(_passes()), own.finalize_host_passes, own.finalize_device_passes


tirx.compilation_pipeline.register_tir_pipeline(NAME, _pipeline)
