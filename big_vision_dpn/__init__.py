"""Dual PatchNorm for Vision Transformers, in the layout of big_vision."""

import os

# TensorFlow only reads data here; its start-up messages say nothing of use.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
# oneDNN's sums depend on the processor; batches shall not.
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
