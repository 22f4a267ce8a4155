"""Adapters: one module per detector library. `kdtoolkit.adapt` imports a module when it is given such a model."""
