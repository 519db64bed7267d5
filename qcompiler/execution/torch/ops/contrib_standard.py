"""Ops that ONNX Runtime has in the standard domain, where ONNX lacks or lacked them."""

from qcompiler.execution.torch.op_table import OpTable
from qcompiler.execution.torch.ops.contrib_normalization import simplified_layer_normalization
from qcompiler.execution.torch.ops.normalization import layer_normalization

TABLE = OpTable()

# ONNX has had this one since opset 17; ONNX Runtime fuses it in models of every opset.
TABLE.op("LayerNormalization")(layer_normalization)
TABLE.op("SimplifiedLayerNormalization")(simplified_layer_normalization)
