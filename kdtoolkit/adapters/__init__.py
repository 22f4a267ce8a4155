"""Adapters, one file a detector library; `kdtoolkit.adapt` imports them when such a model is handed in."""
