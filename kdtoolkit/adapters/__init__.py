"""Adapters, one file a detector library; `kdtoolkit.contract.adapt` imports them when such a model is handed in."""
