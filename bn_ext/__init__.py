"""A custom C++/CUDA BatchNorm for PyTorch: a drop-in for torch.nn.BatchNorm1d, BatchNorm2d and BatchNorm3d."""

from bn_ext import _opacus
from bn_ext._build_info import BuildInfo, build_info, version
from bn_ext._recompute import recompute
from bn_ext.convert import convert, revert, reverted
from bn_ext.explain import Explanation, PassPlan, explain
from bn_ext.functional import batch_norm
from bn_ext.fuse import FuseReport, fuse
from bn_ext.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d

__version__ = version()

_opacus.register_when_imported()

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BuildInfo",
    "Explanation",
    "FuseReport",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "PassPlan",
    "batch_norm",
    "build_info",
    "convert",
    "explain",
    "fuse",
    "recompute",
    "revert",
    "reverted",
]
