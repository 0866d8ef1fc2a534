"""Kernels for image encoders that learn by contrast, for use in any trainer of PyTorch models.

    from fastmoco.kernels import info_nce, nt_xent, sgd_ema, ema, batch_norm_act, photometric

Each runs as a Triton kernel on a GPU, and on a CPU as compiled loops or in plain torch (`reference.py`): `impl`.
Files of this folder carry the names of their kernels. In this package such a name is the function; the file's other
names, `cost` for one, are imported from the file: `from fastmoco.kernels.info_nce import cost`.
"""

from fastmoco.kernels.batch_norm import Norm, batch_norm_act
from fastmoco.kernels.enqueue import enqueue
from fastmoco.kernels.info_nce import info_nce
from fastmoco.kernels.nt_xent import nt_xent
from fastmoco.kernels.photometric import photometric
from fastmoco.kernels.sgd_ema import ema, sgd_ema
from fastmoco.kernels.tensor_table import TensorTable

__all__ = ["Norm", "TensorTable", "batch_norm_act", "ema", "enqueue", "info_nce", "nt_xent", "photometric", "sgd_ema"]
